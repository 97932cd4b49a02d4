"""`fastattn verify`: is every feature as accurate as plain torch, here, on this machine?"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from fastattn.testing.tolerance import Comparison
    from fastattn.testing.verify import Result
    from fastattn.testing.verify_model import ModelResult

RULE = (
    "Shown is the largest error of the output against float64. Passed: output, log-sum-exp,\n"
    "weights and caches have at most 2 x torch's error + one rounding unit, as maximum and root\n"
    "mean square."
)
GRADIENT_RULE = (
    "Shown is the gradient that uses most of what the rule allows: its largest error against\n"
    "float64. Passed: output, log-sum-exp, weights and each gradient have at most 2 x torch's\n"
    "error + one rounding unit, as maximum and root mean square."
)
MODEL_RULE = (
    "Largest error against the model in float64 with eager attention. Passed: at most 2 x the\n"
    "error of eager attention + one rounding unit, as maximum and root mean square."
)


def verify(
    device: Annotated[
        str,
        typer.Option(help="cuda, or cpu for Triton's interpreter. Default: cuda if there is one."),
    ] = "",
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="fp32, fp16 or bf16; may be repeated. Default: all, and fp32 for --model."
        ),
    ] = None,
    feature: Annotated[
        str | None, typer.Option(help="Only features whose name contains this.")
    ] = None,
    grad: Annotated[
        bool, typer.Option("--grad", help="Verify the backward pass too: each gradient by itself.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Name or folder of a Hugging Face model to compare with and without."),
    ] = None,
    impl: Annotated[
        str,
        typer.Option(help="What computes the model's attention: auto, triton, sdpa, reference."),
    ] = "auto",
    jobs: Annotated[
        int,
        typer.Option(
            show_default=False, help="Processes on the CPU. Default: one a core, at most 8."
        ),
    ] = 0,
) -> None:
    """Compare every feature, or a model, with float64: exits with 1 if any fails the 2x rule."""
    from fastattn.testing.interpreter import is_interpreting

    if grad and model is not None:
        raise typer.BadParameter(
            "gradients are verified feature by feature, and not of a --model", param_hint="--grad"
        )
    device = _chosen_device(device)
    if device.startswith("cpu") and (model is None or impl == "triton"):
        _interpret()
    elif device.startswith("cuda") and is_interpreting():
        raise typer.BadParameter(
            "TRITON_INTERPRET is set, and kernels would not run on the GPU: unset it",
            param_hint="--device",
        )
    started = time.perf_counter()
    try:
        if model is not None:
            results, passed = _verify_model(model, device, dtype or ["fp32"], impl)
        else:
            results, passed = _verify_features(device, dtype, feature, grad, jobs)
    except (ValueError, RuntimeError, NotImplementedError, OSError) as error:
        typer.echo(f"fastattn verify: {error}", err=True)
        raise typer.Exit(2) from error
    if json_path is not None:
        document = {
            "device": _describe(device),
            "grad": grad,
            "versions": _versions(),
            "seconds": round(time.perf_counter() - started, 1),
            "passed": passed,
            "results": results,
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if not passed:
        raise typer.Exit(1)


def _chosen_device(device: str) -> str:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {device}", param_hint="--device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device", param_hint="--device")
    return device


def _interpret() -> None:
    """Makes kernels run in Triton's interpreter, if need be by starting Python again."""
    # NumPy multiplies the interpreter's tiles, which are too small to share out between threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    if "triton" in sys.modules:  # it has read the setting already
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _verify_features(
    device: str, dtypes: list[str] | None, substring: str | None, grad: bool, jobs: int
) -> tuple[list[dict[str, Any]], bool]:
    from fastattn.testing.verify import DTYPES, find_features, verify

    rows = find_features(substring, grad=grad)
    dtypes = dtypes or list(DTYPES)
    jobs = jobs or min(os.cpu_count() or 1, 8)
    started = time.perf_counter()
    with _progress() as bar:
        task = bar.add_task("", total=len(rows) * len(dtypes), failed="")
        failures = 0

        def show(result: Result) -> None:
            nonlocal failures
            failures += not result.passed
            failed = f"[red]{failures} failed" if failures else ""
            bar.update(task, advance=1, description=result.feature, failed=failed)

        results = verify(device, dtypes, rows, grad=grad, jobs=jobs, progress=show)
    _print_features(results, device, grad, time.perf_counter() - started)
    return [result.to_dict() for result in results], all(result.passed for result in results)


def _verify_model(
    name: str, device: str, dtypes: list[str], impl: str
) -> tuple[list[dict[str, Any]], bool]:
    from fastattn.testing.verify_model import verify_model

    results = []
    for dtype in dtypes:
        with _progress() as bar:
            bar.add_task(f"{name} in {dtype}", total=None, failed="")
            results.append(verify_model(name, device, dtype, impl))
        _print_model(results[-1])
    return [result.to_dict() for result in results], all(result.passed for result in results)


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]}"),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )


def _console() -> Console:
    # Into a file or a pipe, rich would assume 80 columns.
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _table(*first: str) -> Table:
    table = Table(header_style="bold")
    for name in first:
        table.add_column(name, no_wrap=True)
    for name in ("fastattn", "torch", "ratio"):
        table.add_column(name, justify="right")
    table.add_column("result", overflow="fold")
    return table


def _cells(part: Comparison) -> tuple[str, str, str]:
    return f"{part.max_error:.2e}", f"{part.baseline_max_error:.2e}", _ratio(part)


def _ratio(part: Comparison) -> str:
    if part.baseline_max_error > 0:
        return f"{part.max_error / part.baseline_max_error:.2f}"
    return "exact" if part.max_error == 0 else "inf"


def _verdict(passed: bool, text: str) -> str:
    return f"[green]{text}" if passed else f"[bold red]{text}"


def _print_features(results: list[Result], device: str, grad: bool, seconds: float) -> None:
    table = _table("feature", "dtype", *(["gradient"] if grad else []))
    for before, result in zip([None, *results], results, strict=False):
        new = before is None or before.feature != result.feature
        shown = result.worst_gradient if grad else "out"
        part = result.parts.get(shown or "")
        table.add_row(
            result.feature if new else "",
            result.dtype,
            *([shown] if grad else []),
            *(_cells(part) if part is not None else ("", "", "")),
            _verdict(result.passed, result.verdict),
        )
    console = _console()
    console.print(table)
    for result in results:
        if not result.passed:
            console.print(str(result), markup=False)
    failed = sum(not result.passed for result in results)
    console.print(GRADIENT_RULE if grad else RULE, style="dim", markup=False)
    console.print(
        _verdict(not failed, f"{len(results) - failed} of {len(results)} passed")
        + f"[/] on {_describe(device)} in {seconds:.0f} s"
    )


def _print_model(result: ModelResult) -> None:
    console = _console()
    table = _table(f"{result.model}, {result.dtype}")
    for name, part in result.parts.items():
        failures = f"FAIL ({', '.join(part.failures)})"
        table.add_row(
            name, *_cells(part), _verdict(part.passed, "pass" if part.passed else failures)
        )
    console.print(table)
    if result.argmax is not None and result.baseline_argmax is not None:
        console.print(
            f"argmax of the logits as in float64: {result.argmax:.2%} of positions with fastattn, "
            f"{result.baseline_argmax:.2%} with eager attention"
        )
    console.print(result.report, markup=False)
    console.print(MODEL_RULE, style="dim", markup=False)
    console.print(_verdict(result.passed, "passed" if result.passed else "FAILED"))


def _describe(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return "cpu, in Triton's interpreter" if os.environ.get("TRITON_INTERPRET") else "cpu"


def _versions() -> dict[str, str]:
    from importlib import metadata

    import torch

    from fastattn import __version__

    versions = {"fastattn": __version__, "torch": torch.__version__}
    for name in ("triton", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
