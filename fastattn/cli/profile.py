"""`fastattn profile`: latency, throughput, utilization, memory, and where the time goes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from fastattn.profiling.results import Case, Profile
    from fastattn.profiling.run import Plan
    from fastattn.profiling.subject import Subject


def profile(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A Hugging Face folder or a GGUF file. Words such as batch=1,2 belong to --sweep.",
            show_default=False,
        ),
    ] = None,
    random: Annotated[
        str | None,
        typer.Option(
            show_default=False,
            help="Instead of MODEL: known shapes with random weights, such as llama-3-8b, gpt2, "
            "bert-base, t5-base.",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(show_default="1; 8 of an encoder")] = None,
    prompt: Annotated[
        int | None, typer.Option(show_default="128", help="Tokens of each request or text.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(show_default="32", help="Tokens that each request gets.")
    ] = None,
    padding: Annotated[
        float | None,
        typer.Option(show_default="0 and 0.5", help="Of an encoder: share of the batch, 0 to 1."),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="AXIS=VALUES...",
            show_default=False,
            help="All combinations of batch=1,2,4 prompt=32,128 new-tokens=64 padding=0,0.5.",
        ),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            help="fastattn, transformers or transformers+fastattn (theirs with our attention); "
            "may be repeated. Default: fastattn beside transformers.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(show_default="fp32 on a CPU, bf16 on a GPU", help="fp32, fp16 or bf16."),
    ] = None,
    device: Annotated[
        str, typer.Option(show_default=False, help="Default: cuda if there is one.")
    ] = "",
    repeats: Annotated[int, typer.Option(help="Timed runs of each case.")] = 3,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
    html_path: Annotated[
        Path | None,
        typer.Option("--html", help="Write a report that needs no network to this file."),
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="Write all pictures to this file (PNG, SVG, PDF).")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write a Chrome or Perfetto trace of the first case to this file."),
    ] = None,
) -> None:
    """Profile a model: latency, throughput, utilization, memory, and where the time goes.

    fastattn and the stock model take turns, their outputs compared first: one that is wrong gets no
    figures, and the command exits with 1.
    """
    from fastattn.profiling import plots, report
    from fastattn.profiling.run import check_writable, make_plan, run_plan
    from fastattn.profiling.subject import open_subject

    files = {"--json": json_path, "--html": html_path, "--plot": plot_path}
    try:
        model, sweeps = _sort(words or [], sweep or [])
        subject = open_subject(model, random=random)
        cases = _cases(subject, sweeps, batch, prompt, new_tokens, padding)
        plan = make_plan(
            subject, cases=cases, providers=provider or None, dtype=dtype, device=device or None,
            repeats=repeats, trace=trace,
        )  # fmt: skip
        for option, path in files.items():
            if path is not None:
                check_writable(option, path)
        _check_format(plot_path)
        with _progress(plan) as show:
            found = run_plan(plan, show)
        _print(found)
        if json_path is not None:
            found.save(json_path)
        if html_path is not None:
            report.write_html(found, html_path)
        if plot_path is not None and plots.panels(found):
            plots.plot(found, plot_path)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        typer.echo(f"fastattn profile: {error}", err=True)
        raise typer.Exit(2) from error
    if not found.passed:
        raise typer.Exit(1)


def _sort(words: list[str], sweep: list[str]) -> tuple[str | None, list[str]]:
    """The model, and all words of the sweep: the shell gives those after the first to MODEL."""
    sweeps, models = list(sweep), []
    for word in words:
        if sweep and "=" in word and not Path(word).exists():
            sweeps.append(word)
        else:
            models.append(word)
    if len(models) > 1:
        raise ValueError(f"MODEL must be one folder or file, got {', '.join(models)}")
    return (models[0] if models else None), sweeps


def _cases(
    subject: Subject,
    sweeps: list[str],
    batch: int | None,
    prompt: int | None,
    new_tokens: int | None,
    padding: float | None,
) -> list[Case]:
    from fastattn.profiling.sweep import make_cases, parse_sweep

    if subject.kind == "encoder" and new_tokens is not None:
        raise ValueError(
            f"--new-tokens must be left out: {subject.name} is an encoder, which makes none; got "
            f"{new_tokens}"
        )
    return make_cases(
        subject.kind, parse_sweep(sweeps), batch=batch, prompt=prompt, new_tokens=new_tokens,
        padding=padding,
    )  # fmt: skip


def _check_format(path: Path | None) -> None:
    """Raises ValueError unless matplotlib writes files of that name."""
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(f"--plot must end with one of {', '.join(sorted(known))}, got {path}")


@contextmanager
def _progress(plan: Plan) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, which vanishes when all is done."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)

        yield show


def _print(found: Profile) -> None:
    from fastattn.cli.profile_tables import print_profile

    # Into a file or a pipe, rich would assume 80 columns.
    print_profile(found, Console(width=None if sys.stdout.isatty() else 132, highlight=False))
