"""The sweep of tile configs: what is tried, and which one came out best."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from benchmarks.parity import ConfigCheck, as_tuple, show_config
from benchmarks.providers import Provider

Tile = tuple[int, int, int, int]


def current_tile(chip: str, case: Case) -> Tile:
    """The tile that dispatch chooses for a case today."""
    from fastattn.kernels.attention.config import select_forward_config

    dtype = getattr(torch, case.dtype)
    return as_tuple(select_forward_config(chip, case.head_dim, dtype, case.seqlen, 0))


def candidates(chip: str, case: Case) -> list[Tile]:
    """Today's tile first, then FORWARD_CANDIDATES."""
    from fastattn.kernels.attention.config import FORWARD_CANDIDATES

    tiles = [current_tile(chip, case), *map(as_tuple, FORWARD_CANDIDATES)]
    return list(dict.fromkeys(tiles))


def candidate_checks(chip: str, cases: Iterable[Case]) -> list[ConfigCheck]:
    """A check for each tile, head_dim and mask that the sweep is going to time."""
    checks = [
        ConfigCheck(tile, case.head_dim, "bf16", case.causal)
        for case in cases
        for tile in candidates(chip, case)
    ]
    return list(dict.fromkeys(checks))


def tile_provider(tile: Tile) -> Provider:
    """The forward kernel's launcher with one tile, as a provider."""

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        from fastattn.kernels.attention import Modifiers, launch_attention_forward
        from fastattn.kernels.attention.config import TileConfig

        case = inputs.case
        modifiers = Modifiers(
            softmax_scale=case.head_dim**-0.5, window_right=0 if case.causal else -1
        )
        config = TileConfig(*tile)
        out = torch.full_like(inputs.q, float("nan"))

        def run() -> Tensor:
            launch_attention_forward(
                inputs.q, inputs.k, inputs.v, out, None, modifiers, config=config
            )
            return out

        return run

    return Provider(f"fastattn {show_config(tile)}", prepare)


def best_tiles(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best tile for each (chip, head_dim, causal), beside the one that dispatch has today.

    The score of a tile is the geometric mean, over the shapes, of the fastest time of a shape over
    the tile's. Only shapes that all tiles were tried on count, and tiles that ran on all of those.
    """
    groups: dict[tuple[str, int, bool], dict[int, list[dict[str, Any]]]] = defaultdict(dict)
    for row in rows:
        case = row["case"]
        shapes = groups[(row["chip"], case["head_dim"], case["causal"])]
        shapes.setdefault(case["seqlen"], []).append(row)
    found = []
    for (chip, head_dim, causal), shapes in groups.items():
        most = max(len(rows) for rows in shapes.values())
        complete = {seqlen: rows for seqlen, rows in shapes.items() if len(rows) == most}
        scores = _scores(complete)
        if not scores:
            continue
        best = max(scores, key=lambda tile: scores[tile])
        current = next(
            (tuple(row["tile"]) for row in shapes[min(complete)] if row["current"]), None
        )
        found.append(
            {
                "chip": chip,
                "head_dim": head_dim,
                "causal": causal,
                "seqlens": sorted(complete),
                "tile": best,
                "score": scores[best],
                "tflops": _tflops(complete, best),
                "current_tile": current,
                "current_tflops": _tflops(complete, current),
                "speedup_over_current": scores[best] / scores[current]
                if current in scores
                else None,
                "runners_up": sorted(scores, key=lambda tile: -scores[tile])[1:4],
            }
        )
    return found


def _scores(shapes: dict[int, list[dict[str, Any]]]) -> dict[Any, float]:
    times = [
        {tuple(row["tile"]): row["ms"] for row in rows if "ms" in row} for rows in shapes.values()
    ]
    if not times or not all(times):
        return {}
    everywhere = set.intersection(*(set(own) for own in times))
    return {
        tile: math.exp(sum(math.log(min(own.values()) / own[tile]) for own in times) / len(times))
        for tile in times[0]
        if tile in everywhere
    }


def _tflops(shapes: dict[int, list[dict[str, Any]]], tile: Tile | None) -> dict[str, float]:
    """By seqlen; rows without a time are left out."""
    return {
        str(seqlen): row["tflops"]
        for seqlen, rows in sorted(shapes.items())
        for row in rows
        if tuple(row["tile"]) == tile and "tflops" in row
    }
