"""Generation on the CPU: our decoders against `generate` of transformers, the same weights.

    python -m benchmarks.generation_cpu [--threads 2] [--tokens 128] [--out benchmarks/results]

Random weights of the sizes of SmolLM2-135M and GPT-2 small, float32. Both continue the same prompts
by as many tokens, through their own `generate`; transformers with its growing and with its static
cache, whichever is faster. "Compiled" is ours after `Decoder.compile()`. The floor of a step is
what reading each weight once costs: a pass of torch.mv over all matrices that a step needs, as they
lie in memory, and a pass of torch.sum; the faster of the two is taken. All take turns, and medians
are compared: what else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastattn
from fastattn import SamplingParams
from fastattn.generation import GenerationConfig, generate
from fastattn.models import load
from fastattn.models.decoder import Decoder

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M": (
        "Llama",
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "max_position_embeddings": 8192, "tie_word_embeddings": True},
    ),
    "GPT-2 small": ("GPT2", {}),
}  # fmt: skip
CACHES = ("dynamic", "static")
PROMPT = 32
CUTS = {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2}
"""What sampling is measured with."""


@dataclass(frozen=True)
class Task:
    """How many prompts are continued, and how; what is expected of it.

    Attributes:
        speedup: times as fast as transformers.
        floor: times the cost of reading the weights once that a step may take.
        over_greedy: times as long as greedy decoding of the same prompts.
    """

    strategy: str
    batch: int
    speedup: float | None = None
    floor: float | None = None
    over_greedy: float | None = None


TASKS = (
    Task("greedy", 1, speedup=1.8, floor=1.4),
    Task("greedy, compiled", 1, speedup=1.8, floor=1.4),
    Task("sampling", 1, over_greedy=1.03),
    Task("4 beams", 1, speedup=1.5),
    Task("greedy", 8, speedup=1.4),
    Task("sampling", 8, over_greedy=1.03),
)


@dataclass(frozen=True)
class Row:
    """One comparison; times are medians in milliseconds for a token of every prompt.

    `same_tokens` is the share of tokens that are those of transformers; None where they are drawn,
    each by its own generator.
    """

    model: str
    strategy: str
    batch: int
    tokens: int
    fastattn_ms: float
    transformers_ms: float
    transformers_cache: str
    mv_ms: float
    sum_ms: float
    greedy_ms: float
    same_tokens: float | None
    repeats: int

    @property
    def speedup(self) -> float:
        """Times as fast as transformers."""
        return self.transformers_ms / self.fastattn_ms

    @property
    def over_floor(self) -> float:
        """Times the cost of reading the weights once."""
        return self.fastattn_ms / min(self.mv_ms, self.sum_ms)

    @property
    def over_greedy(self) -> float:
        """Times as long as greedy decoding of the same prompts."""
        return self.fastattn_ms / self.greedy_ms


@dataclass(frozen=True)
class Models:
    """The model of transformers, and ours with the same weights, as it is and compiled."""

    theirs: Any
    ours: Decoder
    compiled: Decoder


def make_models(name: str) -> Models:
    """With random weights."""
    import transformers

    family, options = CONFIGS[name]
    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, f"{family}Config")(**options, eos_token_id=None)
    torch.manual_seed(0)
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    theirs = getattr(transformers, kind)(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        models = Models(theirs, load(folder), load(folder))
    models.compiled.compile()
    return models


def run_ours(model: Decoder, prompts: Tensor, tokens: int, strategy: str) -> Tensor:
    """New tokens (batch, tokens)."""
    options: dict[str, Any] = {}
    if strategy == "sampling":
        options = {"do_sample": True, "sampling": SamplingParams(**CUTS, seed=0)}
    elif strategy == "4 beams":
        options = {"num_beams": 4}
    config = GenerationConfig(tokens, min_new_tokens=tokens, eos_tokens=(), **options)
    return generate(model, prompts, config).tokens


def run_theirs(model: Any, prompts: Tensor, tokens: int, strategy: str, cache: str) -> Tensor:
    """The same by transformers."""
    options: dict[str, Any] = {} if cache == "dynamic" else {"cache_implementation": cache}
    if strategy == "4 beams":
        options["num_beams"] = 4
    options |= {"do_sample": strategy == "sampling", **(CUTS if strategy == "sampling" else {})}
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, max_new_tokens=tokens,
        min_new_tokens=tokens, **options,
    )  # fmt: skip
    return ids[:, prompts.shape[1] :]


def weights_of_a_step(model: Decoder) -> list[Tensor]:
    """All matrices that a token is multiplied by, the head's among them."""
    weights = [part.weight for part in model.modules() if isinstance(part, nn.Linear)]
    return [*weights, model.embedding.weight] if model.config.tied else weights


def read_by_mv(weights: list[Tensor]) -> Callable[[], None]:
    """A pass of torch.mv over the weights, as they lie in memory."""
    inputs = {size: torch.randn(size) for size in {weight.shape[1] for weight in weights}}

    @torch.no_grad()
    def read() -> None:
        for weight in weights:
            torch.mv(weight, inputs[weight.shape[1]])

    return read


def read_by_sum(weights: list[Tensor]) -> Callable[[], None]:
    """A pass of torch.sum over the weights."""

    @torch.no_grad()
    def read() -> None:
        for weight in weights:
            weight.sum()

    return read


Runs = dict[Any, Callable[[], Any]]


def time_in_turns(runs: Runs, repeats: int, again: Callable[[Any], int]) -> tuple[Any, Any]:
    """Medians in seconds, and what each run gave last; one turn more comes first, untimed.

    Args:
        again: how often a run is repeated within a turn.
    """
    times: dict[Any, list[float]] = {key: [] for key in runs}
    results = {}
    for turn in range(repeats + 1):
        for key, run in runs.items():
            for _ in range(again(key)):
                began = time.perf_counter()
                results[key] = run()
                if turn:
                    times[key].append(time.perf_counter() - began)
    return {key: statistics.median(values) for key, values in times.items()}, results


def measure(name: str, batch: int, tokens: int, repeats: int, models: Models) -> list[Row]:
    """All tasks on `batch` prompts, in turns."""
    ours = models.ours
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, ours.vocab_size, (batch, PROMPT), generator=generator)
    weights = weights_of_a_step(ours)
    runs: Runs = {"mv": read_by_mv(weights), "sum": read_by_sum(weights)}
    strategies = [task.strategy for task in TASKS if task.batch == batch]
    for strategy in strategies:
        kind, _, compiled = strategy.partition(", ")
        own = models.compiled if compiled else ours
        runs[strategy, "fastattn"] = lambda m=own, k=kind: run_ours(m, prompts, tokens, k)
        for cache in CACHES:
            runs[strategy, cache] = lambda k=kind, c=cache: run_theirs(
                models.theirs, prompts, tokens, k, c
            )
    seconds, results = time_in_turns(
        runs, repeats, lambda key: 5 if isinstance(key, str) else 2 if key[1] == "fastattn" else 1
    )
    rows = []
    for strategy in strategies:
        best = min(CACHES, key=lambda cache: seconds[strategy, cache])
        same = (results[strategy, "fastattn"] == results[strategy, best]).float().mean().item()
        token = {key: seconds[strategy, key] * 1e3 / tokens for key in ("fastattn", best)}
        rows.append(Row(
            name, strategy, batch, tokens, token["fastattn"], token[best], best,
            seconds["mv"] * 1e3, seconds["sum"] * 1e3, seconds["greedy", "fastattn"] * 1e3 / tokens,
            None if strategy == "sampling" else same, repeats,
        ))  # fmt: skip
    return rows


def task_of(row: Row) -> Task:
    """What is expected of a row."""
    return next(t for t in TASKS if (t.strategy, t.batch) == (row.strategy, row.batch))


def print_table(rows: list[Row]) -> None:
    """The rows as a table; in green where a target is reached."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Generation on the CPU, float32, medians")
    for column in ("model", "strategy", "batch", "transformers", "fastattn", "tokens/s", "speedup",
                   "weights once", "over it", "over greedy", "same tokens"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "strategy") else "right")

    def shown(value: float, good: bool, target: float | None) -> str:
        if target is None:
            return f"{value:.2f}x"
        return f"[{'green' if good else 'red'}]{value:.2f}x[/] of {target:.2f}x"

    for row in rows:
        task = task_of(row)
        table.add_row(
            row.model, row.strategy, str(row.batch),
            f"{row.transformers_ms:.1f} ms ({row.transformers_cache})", f"{row.fastattn_ms:.1f} ms",
            f"{row.batch * 1e3 / row.fastattn_ms:.1f}",
            shown(row.speedup, row.speedup >= (task.speedup or 0), task.speedup),
            f"{min(row.mv_ms, row.sum_ms):.1f} ms",
            shown(row.over_floor, row.over_floor <= (task.floor or 0), task.floor),
            shown(row.over_greedy, row.over_greedy <= (task.over_greedy or 0), task.over_greedy),
            "drawn" if row.same_tokens is None else f"{row.same_tokens:.1%}",
        )  # fmt: skip
    Console(width=160).print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Tokens a second of both, and what the weights alone would allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axis = plt.subplots(figsize=(max(6, 1.3 * len(rows)), 4.5))
    for index, row in enumerate(rows):
        for offset, ms, color, name in (
            (-0.2, row.transformers_ms, "tab:gray", "transformers"),
            (0.2, row.fastattn_ms, "tab:blue", "fastattn"),
        ):
            rate, label = row.batch * 1e3 / ms, None if index else name
            axis.bar_label(
                axis.bar(index + offset, rate, 0.4, color=color, label=label), fmt="%.0f"
            )
        floor = row.batch * 1e3 / min(row.mv_ms, row.sum_ms)
        axis.plot([index - 0.4, index + 0.4], [floor, floor], "k--")
    names = [f"{row.model}\n{row.strategy}\nbatch {row.batch}" for row in rows]
    axis.set_xticks(range(len(rows)), names, fontsize=8)
    axis.set(ylabel="tokens per second", yscale="log")
    axis.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.plot([], [], "k--", label="what reading the weights once a step would allow")
    figure.legend(loc="upper center", ncol=3, frameon=False)
    axis.grid(alpha=0.3, axis="y", which="both")
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measures everything; writes generation_cpu.json and generation_cpu.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each row")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], choices=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in options.models:
        models = make_models(name)
        for batch in options.batches:
            rows += measure(name, batch, options.tokens, options.repeats, models)
    options.out.mkdir(parents=True, exist_ok=True)
    import transformers

    record = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastattn": fastattn.__version__,
        "rows": [
            {**asdict(row), "speedup": row.speedup, "over_floor": row.over_floor,
             "over_greedy": row.over_greedy} for row in rows
        ],
    }  # fmt: skip
    (options.out / "generation_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print_table(rows)
    plot(rows, options.out / "generation_cpu.png")
    return rows


if __name__ == "__main__":
    main()
