"""Trains a small T5 to translate program messages from English to German, on real gettext catalogs.

    python examples/train_t5_bias.py

T5 knows where a word stands only by its learned relative position bias: a table of a bias for each
head and bucket of distances, `fastattn.T5Bias`. This script trains it in two ways:

1. through the Triton kernels and their gradient of the table, beside the reference implementation
   and float64, a few small batches (on a CPU in Triton's interpreter);
2. for long, with the implementation that `impl="auto"` takes; then it translates messages that it
   has not seen, scores them with sacrebleu and shows what the tables have learned.

The messages are those of git and GCC (GPL-2, GPL-3+), read from where Debian installs them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import gettext_pairs
import t5_checkpoint
import torch
import typer
from gettext_pairs import DataError, Example, Pair, batches, collate
from rich.console import Console
from t5_kernel_check import check_kernels, progress_bar
from t5_report import draw, print_results
from t5_scores import most_similar, score, translate
from t5_small import Config, T5Small, loss, make_optimizer

import fastattn

NEEDS = ("tokenizers", "sacrebleu", "matplotlib")


@dataclass(frozen=True)
class Settings:
    """Of the long training."""

    steps: int
    seed: int = 0
    vocab_size: int = 2000
    batch_tokens: int = 500  # padded, on the longer side
    learning_rate: float = 2e-3
    table_learning_rate: float = 4e-2
    warmup_share: float = 0.1
    clip_norm: float = 1.0
    evaluations: int = 12
    num_valid: int = 500
    num_test: int = 500


def train(
    model: T5Small,
    train_examples: Sequence[Example],
    valid_examples: Sequence[Example],
    settings: Settings,
    impl: str = "auto",
) -> list[dict[str, float]]:
    """Trains the model; a record for each evaluation, the first before the first step.

    Adam with learning rates that rise linearly and then fall by a cosine to 0.
    """
    optimizer = make_optimizer(model, settings.learning_rate, settings.table_learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    device = str(model.embedding.weight.device)
    stream = _endless(train_examples, settings)
    every = max(1, settings.steps // settings.evaluations)
    records = [{"step": 0.0, "seconds": 0.0, "valid": evaluate(model, valid_examples, impl)}]
    total, started = torch.zeros((), device=device), time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("training", total=settings.steps, note="")
        for step in range(1, settings.steps + 1):
            model.train()
            value = loss(model, next(stream).to(device), impl)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            schedule.step()
            total += value.detach()
            if step % every == 0 or step == settings.steps:
                seconds = time.perf_counter() - started
                valid = evaluate(model, valid_examples, impl)
                mean = total.item() / (step - records[-1]["step"])
                records.append({"step": step, "seconds": seconds, "train": mean, "valid": valid})
                total.zero_()
            bar.update(task, advance=1, note=f"held-out loss {records[-1]['valid']:.2f}")
    return records


def _rate(step: int, settings: Settings) -> float:
    """The learning rate's factor, 0 to 1."""
    warmup = max(1, round(settings.warmup_share * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup))


def _endless(examples: Sequence[Example], settings: Settings) -> Iterator[gettext_pairs.Batch]:
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        yield from map(collate, batches(examples, settings.batch_tokens, generator))


@torch.no_grad()
def evaluate(model: T5Small, examples: Sequence[Example], impl: str = "auto") -> float:
    """Mean cross entropy of a held-out target token, in nats."""
    model.eval()
    device = str(model.embedding.weight.device)
    total, tokens = 0.0, 0
    for group in batches(examples, 4000, None):
        count = sum(len(example.target) for example in group)
        total += loss(model, collate(group).to(device), impl).item() * count
        tokens += count
    return total / tokens


def run(
    pairs: Sequence[Pair],
    settings: Settings,
    check_steps: int,
    check_impl: str,
    device: str,
    save: Path | None = None,
) -> dict[str, Any]:
    """Everything that is measured; the trained model goes to the folder `save`."""
    parts = gettext_pairs.split_pairs(pairs, settings.num_valid, settings.num_test)
    tokenizer = gettext_pairs.train_tokenizer(parts.train, settings.vocab_size)
    train_set, valid_set, test_set = (gettext_pairs.encode(tokenizer, part) for part in parts)
    config = Config(tokenizer.get_vocab_size())
    checks = {}
    if check_steps:
        # Torch's own fast path goes along, to show what rounding alone does.
        for impl in dict.fromkeys((check_impl, "sdpa")):
            checks[impl] = check_kernels(
                train_set, config, check_steps, device, settings.seed, impl
            )
    torch.manual_seed(settings.seed)
    model = T5Small(config).to(device)
    records = train(model, train_set, valid_set, settings)
    if save is not None:
        t5_checkpoint.save(model, tokenizer, save)
    started = time.perf_counter()
    texts = translate(model, tokenizer, test_set)
    seconds = time.perf_counter() - started
    scores = {
        "model": score(texts, parts.test),
        "most similar training message": score(
            most_similar(tokenizer, parts.train, parts.test), parts.test
        ),
        "English left as it is": score([pair.english for pair in parts.test], parts.test),
    }
    return {
        "settings": asdict(settings),
        "model": {
            **asdict(config),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "pairs": {name: len(part) for name, part in parts._asdict().items()},
        "train_tokens": [sum(len(example[side]) for example in train_set) for side in (0, 1)],
        "beside_reference": checks,
        "training": records,
        "translation_seconds": seconds,
        "scores": scores,
        # The first of the test set, whose order is that of a hash of the English.
        "samples": [
            {"english": pair.english, "german": pair.german, "model": text}
            for pair, text in zip(parts.test[:10], texts, strict=False)
        ],
        "bias_by_distance": {
            name: bias.by_distance().detach().cpu().tolist()
            for name, bias in zip(("encoder", "decoder"), model.biases(), strict=True)
        },
    }


def main(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the .mo files, at any depth, before /usr/share/locale."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda; by default cuda where there is one.")
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="Of the long training.")] = 1500,
    check_steps: Annotated[
        int, typer.Option(min=0, help="Of the training beside the reference; 0 leaves it out.")
    ] = 30,
    check_impl: Annotated[
        str, typer.Option(help="What is trained beside the reference: triton or sdpa.")
    ] = "triton",
    seed: Annotated[int, typer.Option(help="Of weights, order and dropout.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for figures, tables and plots.")
    ] = Path(__file__).parent / "results",
    save: Annotated[
        Path | None,
        typer.Option(help="Folder for the model, as fastattn.models and transformers load it."),
    ] = None,
) -> None:
    """Train a small T5 on gettext catalogs through fastattn's relative position bias."""
    device = _check(device)
    started = time.perf_counter()
    try:
        catalogs = gettext_pairs.find_catalogs(data)
        counted = {name: gettext_pairs.read_catalog(path) for name, path in catalogs.items()}
        pairs = [pair for catalog in counted.values() for pair in catalog]
        results = run(pairs, Settings(steps, seed), check_steps, check_impl, device, save)
    except (DataError, NotImplementedError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    results["catalogs"] = {
        name: {"pairs": len(counted[name]), "package": package, "licence": licence}
        for name, (package, licence) in gettext_pairs.CATALOGS.items()
    }
    results.update(_environment(device), seconds=time.perf_counter() - started)
    output.mkdir(parents=True, exist_ok=True)
    target = output / "train_t5_bias"
    target.with_suffix(".json").write_text(_as_json(results), encoding="utf-8")
    plots = draw(results, target)
    console = Console(highlight=False, record=True, width=None if sys.stdout.isatty() else 110)
    print_results(results, console)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    target.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ", ".join(path.name for path in (*plots, target.with_suffix(".txt")))
    console.print(f"written: {target}.json, {names}", style="bold", soft_wrap=True)


def _as_json(results: dict[str, Any]) -> str:
    """Six digits of each number, and lists of numbers on one line each."""
    short = json.loads(
        json.dumps(results), parse_float=lambda digits: float(f"{float(digits):.6g}")
    )
    text = json.dumps(short, indent=1, ensure_ascii=False)
    return re.sub(r"\[([^\[\]{}\"]+)\]", lambda m: f"[{' '.join(m[1].split())}]", text) + "\n"


def _check(device: str) -> str:
    """The device to use, or an error that says what is missing."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(f"error: this example needs: pip install {' '.join(missing)}", err=True)
        raise typer.Exit(1)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {device}", param_hint="--device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device", param_hint="--device")
    if not device.startswith("cuda") and "OMP_NUM_THREADS" not in os.environ:
        # Of such small matrices: more gain little where cores are free, and lose much where not.
        torch.set_num_threads(1)
    return device


def _environment(device: str) -> dict[str, Any]:
    names = ("torch", "triton", "tokenizers", "sacrebleu")
    found = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu,
        "versions": {
            "fastattn": fastattn.__version__,
            "python": platform.python_version(),
            **found,
        },
    }


if __name__ == "__main__":
    typer.run(main)
