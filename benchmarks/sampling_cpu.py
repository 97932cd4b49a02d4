"""Drawing a token on the CPU: fastattn against the processors and warpers of transformers.

    python -m benchmarks.sampling_cpu [--threads 2] [--seconds 2] [--out benchmarks/results]

Both do the same to the same logits: `generate`'s order of processors, softmax and multinomial on
the one side, `fastattn.sample` with a state, which it also brings up to date, on the other. They
take turns, a few calls each, and medians are compared: what else the machine does meets both. The
first call of each turn is not counted, since the threads of the one before may still be spinning.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import SamplerState, SamplingParams, sample

CHAINS: dict[str, dict[str, Any]] = {
    "penalty, k=50, p=0.9": {
        "repetition_penalty": 1.2, "temperature": 0.8, "top_k": 50, "top_p": 0.9,
    },
    "p=0.9": {"top_p": 0.9},
}  # fmt: skip
VOCAB_SIZES = (32_000, 128_000)
BATCHES = (1, 8, 64)
FAMILIES = ("peaked", "flat")
PROMPT = 256  # tokens under the repetition penalty
TARGETS = {1: 8.0, 8: 15.0, 64: 15.0}
TURN = 4


@dataclass(frozen=True)
class Row:
    """One comparison. Times are medians in milliseconds."""

    chain: str
    family: str
    vocab_size: int
    batch: int
    transformers_ms: float
    fastattn_ms: float
    speedup: float
    target: float
    calls: int


def make_logits(family: str, batch: int, vocab_size: int) -> Tensor:
    """ "peaked": falling with the logarithm of a token's rank, twice as steep as Zipf's law, as a
    language model's are; "flat": normal, of deviation 1, whose nucleus is most of the vocabulary.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, vocab_size, generator=generator)
    if family == "flat":
        return noise
    ranks = torch.arange(1, vocab_size + 1).log()
    logits = torch.empty(batch, vocab_size)
    for row in range(batch):
        order = torch.randperm(vocab_size, generator=generator)
        logits[row] = (10 - 2 * ranks + noise[row] * 0.5)[order]
    return logits


def transformers_chain(logits: Tensor, input_ids: Tensor, chain: dict[str, Any]) -> Callable:
    """A function that does what `generate` does to the logits of a step."""
    from transformers.generation import logits_process as processors

    steps: list[Any] = []
    if "repetition_penalty" in chain:
        steps.append(processors.RepetitionPenaltyLogitsProcessor(chain["repetition_penalty"]))
    if "temperature" in chain:
        steps.append(processors.TemperatureLogitsWarper(chain["temperature"]))
    if "top_k" in chain:
        steps.append(processors.TopKLogitsWarper(chain["top_k"]))
    steps.append(processors.TopPLogitsWarper(chain["top_p"]))

    def draw() -> Tensor:
        scores = logits
        for step in steps:
            scores = step(input_ids, scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0]

    return draw


def measure(chain: str, family: str, vocab_size: int, batch: int, seconds: float) -> Row:
    """Times both in turns for about `seconds`, at least three turns each."""
    logits = make_logits(family, batch, vocab_size)
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, vocab_size, (batch, PROMPT), generator=generator)
    state = SamplerState.from_prompt(input_ids, vocab_size)
    params = SamplingParams(**CHAINS[chain])
    theirs = transformers_chain(logits, input_ids, CHAINS[chain])

    def ours() -> Any:
        return sample(logits, params, state)

    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times["ours"]) < 3 * TURN:
        for name, draw in (("theirs", theirs), ("ours", ours)):
            draw()
            for _ in range(TURN):
                began = time.perf_counter()
                draw()
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return Row(
        chain, family, vocab_size, batch, medians["theirs"], medians["ours"],
        medians["theirs"] / medians["ours"], TARGETS[batch], len(times["ours"]),
    )  # fmt: skip


def print_table(rows: list[Row]) -> None:
    """The rows as a table; in green where the target is reached."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="One step of sampling on the CPU, medians")
    for column in ("chain", "logits", "vocabulary", "batch", "transformers", "fastattn", "speedup"):
        table.add_column(column, justify="left" if column in ("chain", "logits") else "right")
    for row in rows:
        color = "green" if row.speedup >= row.target else "red"
        table.add_row(
            row.chain, row.family, f"{row.vocab_size:,}", str(row.batch),
            f"{row.transformers_ms:.2f} ms", f"{row.fastattn_ms:.2f} ms",
            f"[{color}]{row.speedup:.1f}x[/] of {row.target:.0f}x",
        )  # fmt: skip
    Console(width=110).print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Speedups by batch, a panel for each vocabulary size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, panels = plt.subplots(1, len(VOCAB_SIZES), figsize=(10, 4), sharey=True)
    for panel, vocab_size in zip(panels, VOCAB_SIZES, strict=True):
        here = [row for row in rows if row.vocab_size == vocab_size]
        for chain, marker in zip(CHAINS, "os", strict=True):
            for family, style in zip(FAMILIES, ("-", "--"), strict=True):
                line = [row for row in here if (row.chain, row.family) == (chain, family)]
                panel.plot(
                    [str(row.batch) for row in line], [row.speedup for row in line],
                    style + marker, label=f"{chain}, {family}",
                )  # fmt: skip
        targets = [TARGETS[batch] for batch in BATCHES]
        panel.plot([str(batch) for batch in BATCHES], targets, "k:", label="target")
        panel.set(title=f"vocabulary {vocab_size:,}", xlabel="batch", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("times as fast as transformers")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measures everything; writes sampling_cpu.json and sampling_cpu.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = [
        measure(chain, family, vocab_size, batch, options.seconds)
        for chain in CHAINS
        for family in FAMILIES
        for vocab_size in VOCAB_SIZES
        for batch in BATCHES
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    import transformers

    record = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastattn": fastattn.__version__,
        "rows": [asdict(row) for row in rows],
    }
    (options.out / "sampling_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print_table(rows)
    plot(rows, options.out / "sampling_cpu.png")
    return rows


if __name__ == "__main__":
    main()
