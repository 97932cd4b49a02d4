"""The sweep of decoding configs: what is tried, which came out best, and that as source.

    python -m benchmarks.decode_sweep benchmarks/results/FILE.json [--write decode_config.py]

prints the winners of a file as a table for `kernels/attention/decode_config.py`, with the file that
measured them, or writes it there in place of the table before.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.decode_cases import DecodeCase, DecodeInputs, make_empty_inputs
from benchmarks.decode_checks import Config, DecodeCheck, EmptyCheck, as_config
from benchmarks.measured import TableCommand, Winner, best_everywhere
from benchmarks.providers import Provider
from fastattn.torch_ops import kernels

Row = dict[str, Any]

STAGE = "decode-sweep"
# (block_n, num_stages) for a head_dim of 128 in 16 bits; smaller heads take more keys a tile.
# Bytes in flight are what counts: their stages take up to 180 of sm_90's 227 KiB of shared memory.
_TILES = ((64, 3), (64, 4), (64, 2), (128, 2), (32, 4), (128, 3), (64, 5), (32, 6))
_WARPS = (4, 8)
_SPLIT_FACTORS = (1.0, 0.5, 2.0, 0.0, 4.0)  # of today's number; 0 is no split at all


def current_config(case: DecodeCase, device: torch.device) -> Config:
    """What dispatch chooses for a case today."""
    inputs = make_empty_inputs(case, device)
    config = kernels().select_decode_config(inputs.q, _cached(inputs), _modifiers(case))
    return dataclasses.astuple(config)


def candidates(case: DecodeCase, device: torch.device) -> list[Config]:
    """Today's config first; then other tiles, and then other splits and ways to join them."""
    today = as_config(current_config(case, device))
    wider = max(1, 128 // max(case.head_dim, 64))
    found = [today]
    for block_n, num_stages in _TILES:
        for num_warps in _WARPS:
            tile = {"block_n": block_n * wider, "num_stages": num_stages, "num_warps": num_warps}
            found.append(dataclasses.replace(today, **tile))
    most = max(1, -(-case.capacity // today.block_n))
    for factor in _SPLIT_FACTORS:
        splits = min(most, max(1, round(today.num_splits * factor)))
        for last_combines in (False, True) if splits > 1 else (False,):
            changed = {"num_splits": splits, "last_combines": last_combines}
            found.append(dataclasses.replace(today, **changed))
    return list(dict.fromkeys(map(dataclasses.astuple, found)))


def joint_config(rows: Iterable[Row]) -> Config | None:
    """The fastest tile with the fastest splits of one case, if they were not timed together."""
    timed = [row for row in rows if "ms" in row]
    today = next((row for row in timed if row["current"]), None)
    if today is None:
        return None
    best = as_config(tuple(today["config"].values()))
    for names in (("block_n", "num_warps", "num_stages"), ("num_splits", "last_combines")):
        # Among those that differ from today's config in these alone.
        others = set(today["config"]) - set(names)
        own = [r for r in timed if all(r["config"][n] == today["config"][n] for n in others)]
        fastest = min(own, key=lambda row: row["ms"])["config"]
        best = dataclasses.replace(best, **{name: fastest[name] for name in names})
    values = dataclasses.astuple(best)
    return None if any(tuple(row["config"].values()) == values for row in timed) else values


def checks_of(case: DecodeCase, config: Config) -> list[DecodeCheck | EmptyCheck]:
    """What must be right before a config is timed on a case."""
    problem = f"one token, paged {case.block_size}" if case.block_size else "one token"
    empty = EmptyCheck(case, config)
    # The few tokens of a check take few splits, however many the timed ones have.
    splits = min(4, as_config(config).num_splits)
    few = dataclasses.astuple(dataclasses.replace(as_config(config), num_splits=splits))
    heads = (case.num_heads, case.num_heads_kv)
    check = DecodeCheck(few, case.head_dim, empty.dtype, problem, heads=heads, appends=False)
    return [check, empty]


def config_provider(values: Config) -> Provider:
    """The launcher with one config, as a provider."""

    def prepare(inputs: DecodeInputs) -> Callable[[], Tensor]:
        attention, config, q = kernels(), as_config(values), inputs.q
        cached, modifiers = _cached(inputs), _modifiers(inputs.case)
        out = torch.full_like(q, float("nan"))
        partial: dict[str, Tensor | None] = {}
        if config.num_splits > 1:
            parts, rows, heads = config.num_splits * q.shape[0], q.shape[1], q.shape[2]
            for name, shape in (
                ("partial_out", (parts, rows, heads, q.shape[3])),
                ("partial_lse", (parts, heads, rows)),
            ):
                partial[name] = q.new_full(shape, math.nan, dtype=torch.float32)
        if config.last_combines:
            size = config.num_counters(q, cached)
            partial["counters"] = torch.zeros(size, dtype=torch.int32, device=q.device)

        def run() -> Tensor:
            attention.launch_attention_decode(q, cached, out, None, modifiers, config, **partial)
            return out

        return run

    return Provider(f"fastattn {as_config(values)}", prepare)


def _cached(inputs: DecodeInputs) -> Any:
    attention, cache = kernels(), inputs.cache
    return attention.CachedKeys(
        attention.readable(cache.k),
        attention.readable(cache.v),
        cache.k_scale,
        cache.v_scale,
        seqlens=cache.seqlens,
        block_table=cache.block_table,
    )


def _modifiers(case: DecodeCase) -> Any:
    window_right = 0 if case.seqlen_q > 1 else -1
    return kernels().Modifiers(softmax_scale=case.head_dim**-0.5, window_right=window_right)


def config_fields(values: Config) -> Row:
    """A config as fields of a row."""
    config = as_config(values)
    return {"config": dataclasses.asdict(config), "config_label": str(config)}


def best_configs(rows: Iterable[Row]) -> list[Row]:
    """For each case of the sweep the configs from the fastest on, beside today's."""
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        if row["stage"] == STAGE and "config" in row:
            by_case.setdefault(row["case"]["label"], []).append(row)
    found = []
    for label, own in by_case.items():
        ranked = sorted((row for row in own if "ms" in row), key=lambda row: row["ms"])
        if not ranked:
            continue
        today = next((row for row in ranked if row["current"]), None)
        found.append(
            {
                "chip": own[0]["chip"],
                "case": label,
                "layout": own[0]["case"]["layout"],
                "head_dim": own[0]["case"]["head_dim"],
                "dtype": own[0]["case"]["dtype"],
                "config": ranked[0]["config"],
                "config_label": ranked[0]["config_label"],
                "ms": ranked[0]["ms"],
                "gb_per_s": ranked[0]["gb_per_s"],
                "current_label": today and today["config_label"],
                "current_ms": today and today["ms"],
                "speedup_over_current": today and today["ms"] / ranked[0]["ms"],
                "runners_up": [row["config_label"] for row in ranked[1:4]],
                "last_combines_gain": _last_combines_gain(ranked),
            }
        )
    return found


def _last_combines_gain(rows: Sequence[Row]) -> float | None:
    """How many times faster the last program joins today's splits than a second launch does."""
    today = next((row["config"] for row in rows if row["current"]), None)
    if today is None:
        return None
    times = {
        last: row["ms"]
        for row in rows
        for last in (False, True)
        if row["config"] == {**today, "last_combines": last}
    }
    return times[False] / times[True] if len(times) == 2 else None


def winners(document: Row) -> list[Winner]:
    """The tile that is best over all cases of each class that dispatch tells apart.

    Its score is the geometric mean, over the cases, of the fastest time over its own, with the
    splits that suit it best there. Only tiles that ran on every case count.
    """
    from fastattn.kernels.attention.decode_config import DECODE_SPACE, decode_class

    groups: dict[tuple[Any, ...] | None, dict[str, dict[tuple[Any, ...], Row]]] = {}
    for row in document["rows"]:
        if row["stage"] == STAGE and "ms" in row:
            case, config = row["case"], row["config"]
            key = decode_class(
                row["chip"], case["head_dim"], getattr(torch, case["dtype"]),
                case["seqlen_q"] * (case["num_heads"] // case["num_heads_kv"]), 0,
                quantized=bool(case["stored"]), paged=bool(case["block_size"]),
            )  # fmt: skip
            tiles = groups.setdefault(key, {}).setdefault(case["label"], {})
            tile = tuple(config[name] for name in DECODE_SPACE.values)
            if tile not in tiles or row["ms"] < tiles[tile]["ms"]:
                tiles[tile] = row
    found = []
    for key, cases in groups.items():
        best = best_everywhere(list(cases.values()))
        if key is not None and best is not None:
            tile, reached = best
            rows = {label: tiles[tile] for label, tiles in cases.items()}
            values = dict(zip(DECODE_SPACE.values, tile, strict=True))
            found.append(Winner(key, values, reached, rows))
    return found


def _space() -> Any:
    from fastattn.kernels.attention.decode_config import DECODE_SPACE

    return DECODE_SPACE


TABLE = TableCommand("benchmarks.decode_sweep", STAGE, winners, _space)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints or writes the winners of the file on the command line; returns the exit status."""
    return TABLE.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
