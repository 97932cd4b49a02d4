"""How often the sampling kernel reads a row again: on real logits of SmolLM2.

    python -m benchmarks.sampling_refinement [--positions 200] [--check 2] [--out FOLDER]

Each tile of a row keeps between a number that top-k asks for (or half its capacity) and its
capacity of scores, cut by bisection on keys. A row is settled where no threshold of its settings
lies below the highest cut of its tiles; else it is refined, which reads the logits again for every
step of a search. The rule follows from the logits alone, so it is applied here in NumPy, with the
kernel's own bisection, to the logits of every position of a text; and on some rows, of those that
are refined and those that are not, the kernel itself is run and its refinements are counted (in
Triton's interpreter where there is no GPU: a GPU's kernel cannot be counted, and is left out).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL = "SmolLM2-135M-Instruct"
TOPIC = "exceptions"
TEMPERATURES = (0.7, 1.0, 1.5)
SETTINGS: dict[str, dict[str, Any]] = {
    "top_k=50, top_p=0.9": {"top_k": 50, "top_p": 0.9},
    "top_p=0.9": {"top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
}
# Beside the capacity in use, of which the rate is the answer.
CAPACITIES = (32, 64, 128, 256)
EMPTY_KEY = -2139095041  # of -inf


@dataclass(frozen=True)
class Row:
    """One setting at one temperature: how many positions are refined, and what was drawn from.

    `refined` is by capacity; `kept_median`, `kept_p95` and `kept_largest` count the tokens that
    can be drawn; `checked` and `agreed` the rows that the kernel itself was run on.
    """

    setting: str
    temperature: float
    positions: int
    refined: dict[int, int]
    kept_median: float
    kept_p95: float
    kept_largest: int
    checked: int
    agreed: int


def keys_of(x: NDArray) -> NDArray:
    """Keys in the order of float32 numbers, int64."""
    bits = (x + np.float32(0.0)).view(np.int32)  # + 0.0 makes one zero of two
    return np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)


def tile_cuts(keys: NDArray, block: int, capacity: int, needed: int) -> NDArray:
    """The cut of each tile, (rows, tiles): `_choose_candidates` of the kernel, all at once."""
    rows, vocab_size = keys.shape
    tiles = -(-vocab_size // block)
    padded = np.full((rows, tiles * block), EMPTY_KEY, dtype=np.int64)
    padded[:, :vocab_size] = keys
    # Dealt as `dealt_word` of the kernel does.
    card = min(block, 128)
    tiled = (
        padded.reshape(rows, block // card, tiles, card).swapaxes(1, 2).reshape(rows, tiles, block)
    )
    count = (tiled > EMPTY_KEY).sum(-1)
    low = np.full((rows, tiles), EMPTY_KEY + 1, dtype=np.int64)
    high = tiled.max(-1)
    # The kernel stops for `count <= capacity`, so of larger numbers only that they are matters.
    tops = np.partition(tiled, block - capacity - 1, axis=-1)[..., -(capacity + 1) :]
    while (active := (count > capacity) & (low < high)).any():
        middle = (low + high + 1) >> 1
        above = (tops >= middle[..., None]).sum(-1)
        enough = above >= needed
        low = np.where(active & enough, middle, low)
        count = np.where(active & enough, above, count)
        high = np.where(active & ~enough, middle - 1, high)
    return np.where(count > capacity, low + 1, low)


def thresholds(x: NDArray, setting: dict[str, Any]) -> tuple[NDArray, NDArray]:
    """Keys (rows,) of the top-k threshold alone, and of all thresholds together."""
    rows, vocab_size = x.shape
    descending = np.sort(x, axis=1)[:, ::-1]
    largest = descending[:, :1].astype(np.float64)
    weight = np.exp(descending - largest)
    by_k = np.full(rows, EMPTY_KEY + 1, dtype=np.int64)
    k = setting.get("top_k", 0)
    if 0 < k < vocab_size:
        kth = descending[:, k - 1]
        by_k = keys_of(kth)
        weight = np.where(descending >= kth[:, None], weight, 0.0)
    final = by_k
    if (p := setting.get("top_p", 1.0)) < 1.0:
        mass = weight.cumsum(1)
        place = (mass < p * mass[:, -1:]).sum(1)
        final = np.maximum(final, keys_of(descending[np.arange(rows), place]))
    if (ratio := setting.get("min_p", 0.0)) > 0:
        bound = (largest[:, 0] + np.log(ratio)).astype(np.float32)
        final = np.maximum(final, keys_of(bound))
    return by_k, final


def is_settled(x: NDArray, setting: dict[str, Any], block: int, capacity: int) -> NDArray:
    """Whether the candidates settle each row's draw, bool (rows,); x (rows, vocabulary) float32."""
    k = setting.get("top_k", 0)
    needed = min(k, capacity) if 0 < k < x.shape[1] else capacity // 2
    cut = tile_cuts(keys_of(x), block, capacity, needed).max(-1)
    by_k, final = thresholds(x, setting)
    settled: NDArray = final >= cut
    if 0 < k < x.shape[1]:
        settled &= by_k >= cut
    return settled


def real_logits(positions: int, topic: str = TOPIC) -> NDArray:
    """Logits (positions, vocabulary) of SmolLM2 at every position of a text of Python's manual."""
    import pydoc_data.topics

    import torch
    import transformers

    from fastattn.cli.demo_smollm2 import smollm2_folder

    folder = smollm2_folder()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(pydoc_data.topics.topics[topic], add_special_tokens=False)["input_ids"]
    if len(ids) < positions:
        raise ValueError(f"positions must be at most {len(ids)}, the text's, got {positions}")
    with torch.no_grad():
        logits: NDArray = model(torch.tensor([ids[:positions]])).logits[0].float().numpy()
    return logits


def kernel_refines(logits: NDArray, temperature: float, setting: dict[str, Any]) -> bool:
    """Whether the kernel, in Triton's interpreter, refines this row (1, vocabulary)."""
    import torch

    from fastattn import SamplingParams, sample
    from fastattn.torch_sample_ops import kernels

    kernels()  # imports it, repaired
    join: Any = importlib.import_module("fastattn.kernels.sampling.join")
    calls = []
    original = join.refine

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    params = SamplingParams(temperature=temperature, seed=3, **setting)
    row = torch.from_numpy(logits.copy())
    join.refine = counted
    try:
        drawn = sample(row, params, impl="triton")
    finally:
        join.refine = original
    expected = sample(row, params, impl="reference")
    if not torch.equal(drawn, expected):  # type: ignore[arg-type]
        raise RuntimeError(f"the kernel drew {drawn}, the reference {expected}")
    return bool(calls)


def measure(
    logits: NDArray, setting: str, temperature: float, block: int, capacity: int, check: int
) -> Row:
    """Applies the rule to all rows, and runs the kernel on `check` of them, of both kinds."""
    x = logits / np.float32(temperature)
    rows = {c: is_settled(x, SETTINGS[setting], block, c) for c in {*CAPACITIES, capacity}}
    final = thresholds(x, SETTINGS[setting])[1]
    kept = (keys_of(x) >= final[:, None]).sum(1)
    settled = rows[capacity]
    # At the border between both kinds first: refined with few tokens, settled with many.
    by_kept = np.argsort(kept, kind="stable")
    few, many = by_kept[~settled[by_kept]], by_kept[settled[by_kept]][::-1]
    pairs = [*few[:1], *many[:1], *few[:0:-1][:1], *many[:0:-1][:1]]
    chosen = [int(row) for row in pairs][:check]
    agreed = sum(
        kernel_refines(logits[row : row + 1], temperature, SETTINGS[setting]) == (not settled[row])
        for row in chosen
    )
    return Row(
        setting, temperature, len(logits),
        {c: int((~rows[c]).sum()) for c in sorted(rows)},
        float(np.median(kept)), float(np.quantile(kept, 0.95)), int(kept.max()),
        len(chosen), int(agreed),
    )  # fmt: skip


def print_table(rows: list[Row], capacity: int) -> None:
    """A line for each setting and temperature."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Rows that the sampling kernel reads again, {MODEL}")
    for column in ("settings", "temperature", "drawn from", "most", "refined"):
        table.add_column(column, justify="left" if column == "settings" else "right")
    others = [c for c in rows[0].refined if c != capacity]
    for other in others:
        table.add_column(f"if {other} kept", justify="right")
    table.add_column("kernel says so", justify="right")
    for row in rows:
        share = row.refined[capacity] / row.positions
        table.add_row(
            row.setting, f"{row.temperature:g}",
            f"{row.kept_median:,.0f} tokens", f"{row.kept_largest:,}",
            f"[bold]{row.refined[capacity]} of {row.positions}, {share:.1%}[/]",
            *(f"{row.refined[c] / row.positions:.1%}" for c in others),
            f"{row.agreed} of {row.checked}" if row.checked else "",
        )  # fmt: skip
    Console(width=130).print(table)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measures everything; writes sampling_refinement.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=200)
    parser.add_argument("--check", type=int, default=2, help="rows a line that the kernel runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported
    from fastattn.kernels.sampling.config import select_sample_config

    check = options.check if os.environ.get("TRITON_INTERPRET") == "1" else 0
    logits = real_logits(options.positions)
    config = select_sample_config("sm_90", logits.shape[1], 0)
    rows = [
        measure(logits, setting, temperature, config.block, config.capacity, check)
        for setting in SETTINGS
        for temperature in TEMPERATURES
    ]
    record = {
        "model": MODEL,
        "text": f"pydoc_data.topics.topics[{TOPIC!r}]",
        "vocab_size": logits.shape[1],
        "block": config.block,
        "capacity": config.capacity,
        "rows": [asdict(row) for row in rows],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "sampling_refinement.json").write_text(json.dumps(record, indent=1) + "\n")
    print_table(rows, config.capacity)
    return rows


if __name__ == "__main__":
    main()
