"""The sweep of tile configs: what is tried, which one came out best, and that as source.

Forward, the walk by rows (dQ) and the walk by keys (dK, dV) are swept apart, each as the one launch
of its kernel: the part of a case says which.

    python -m benchmarks.sweep benchmarks/results/FILE.json [--write config.py]

prints the winners of a file as a table for `kernels/attention/config.py`, with the file that
measured them, or writes it there in place of the table before.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from benchmarks.measured import TableCommand, Winner, best_everywhere
from benchmarks.parity import (
    DTYPES,
    ConfigCheck,
    GradientCheck,
    Tile,
    TileCheck,
    as_tuple,
    backward_tiles,
    show_config,
)
from benchmarks.providers import Provider

STAGE = "sweep"


def _dtype_name(case: Case) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == getattr(torch, case.dtype))


def current_tile(chip: str, case: Case) -> Tile:
    """The tile that dispatch chooses for a case's part today."""
    from fastattn.kernels.attention.config import select_forward_config

    if case.part in ("rows", "keys"):
        rows, keys, _ = backward_tiles(chip, case.head_dim, _dtype_name(case), causal=case.causal)
        return rows if case.part == "rows" else keys
    dtype = getattr(torch, case.dtype)
    config = select_forward_config(chip, case.head_dim, dtype, case.seqlen, 0, case.causal)
    return as_tuple(config)


def candidates(chip: str, case: Case) -> list[Tile]:
    """Today's tile first, then those that `config.py` names for the part."""
    from fastattn.kernels.attention import config

    found = {
        "rows": config.BACKWARD_ROWS_CANDIDATES,
        "keys": config.BACKWARD_KEYS_CANDIDATES,
    }.get(case.part, config.FORWARD_CANDIDATES)
    return list(dict.fromkeys([current_tile(chip, case), *map(as_tuple, found)]))


def check_of(chip: str, case: Case, tile: Tile) -> TileCheck:
    """What must be right before a tile is timed: in the backward pass, beside today's others."""
    dtype = _dtype_name(case)
    if case.part == "forward":
        return ConfigCheck(tile, case.head_dim, dtype, case.causal)
    rows, keys, bias = backward_tiles(chip, case.head_dim, dtype, causal=case.causal)
    rows, keys = (tile, keys) if case.part == "rows" else (rows, tile)
    # Without groups of heads, like the timed shapes.
    shape = (*GradientCheck.shape[:4], GradientCheck.shape[3])
    return GradientCheck(rows, keys, bias, case.head_dim, dtype, case.causal, shape=shape)


def candidate_checks(chip: str, cases: Iterable[Case]) -> list[TileCheck]:
    """A check for each tile, head_dim and mask that the sweep is going to time."""
    checks = [check_of(chip, case, tile) for case in cases for tile in candidates(chip, case)]
    return list(dict.fromkeys(checks))


def tile_provider(tile: Tile, part: str = "forward") -> Provider:
    """The launcher of a part's kernel with one tile, as a provider."""
    launch = {"forward": _forward, "rows": _rows, "keys": _keys}[part]

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        from fastattn.kernels.attention.config import TileConfig

        return launch(inputs, TileConfig(*tile))

    name = show_config(tile) if part == "forward" else f"{part} {show_config(tile)}"
    return Provider(f"fastattn {name}", prepare)


def _modifiers(case: Case) -> Any:
    from fastattn.kernels.attention import Modifiers

    return Modifiers(softmax_scale=case.head_dim**-0.5, window_right=0 if case.causal else -1)


def _forward(inputs: Inputs, config: Any) -> Callable[[], Tensor]:
    from fastattn.kernels.attention import launch_attention_forward

    modifiers, out = _modifiers(inputs.case), torch.full_like(inputs.q, float("nan"))

    def run() -> Tensor:
        launch_attention_forward(inputs.q, inputs.k, inputs.v, out, None, modifiers, config=config)
        return out

    return run


def _backward_operands(inputs: Inputs) -> tuple[Any, ...]:
    """What both walks of the backward pass read, as their launchers take it."""
    from fastattn.kernels.attention import launch_attention_forward

    case, q, dout = inputs.case, inputs.q, inputs.dout
    if dout is None:
        raise ValueError(f"inputs must be of a part that differentiates, got {case.part!r}")
    modifiers, out = _modifiers(case), torch.full_like(q, float("nan"))
    stats = q.new_empty(2, case.batch, case.num_heads, case.seqlen, dtype=torch.float32)
    launch_attention_forward(q, inputs.k, inputs.v, out, None, modifiers, softmax_stats=stats)
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2).contiguous()
    if case.causal:
        delta[:, :, 0] = 0.0  # the kernels take delta to be 0 for a row that sees one key
    return q, inputs.k, inputs.v, dout, stats, delta, modifiers


def _rows(inputs: Inputs, config: Any) -> Callable[[], dict[str, Tensor]]:
    from fastattn.kernels.attention.backward_rows import launch_backward_rows

    operands, dq = _backward_operands(inputs), torch.full_like(inputs.q, float("nan"))

    def run() -> dict[str, Tensor]:
        launch_backward_rows(*operands, dq=dq, input_precision="ieee", config=config)
        return {"dq": dq}

    return run


def _keys(inputs: Inputs, config: Any) -> Callable[[], dict[str, Tensor]]:
    from fastattn.kernels.attention.backward_keys import launch_backward_keys

    operands = _backward_operands(inputs)
    dk, dv = (torch.full_like(tensor, float("nan")) for tensor in (inputs.k, inputs.v))

    def run() -> dict[str, Tensor]:
        launch_backward_keys(*operands, dk=dk, dv=dv, input_precision="ieee", config=config)
        return {"dk": dk, "dv": dv}

    return run


def best_tiles(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best tile for each (chip, part, head_dim, causal), beside what dispatch has today.

    The score of a tile is the geometric mean, over the shapes, of the fastest time of a shape over
    the tile's. Only shapes that all tiles were tried on count, and tiles that ran on all of those.
    """
    groups: dict[tuple[str, str, int, bool], dict[int, list[dict[str, Any]]]] = defaultdict(dict)
    for row in rows:
        case = row["case"]
        shapes = groups[(row["chip"], case["part"], case["head_dim"], case["causal"])]
        shapes.setdefault(case["seqlen"], []).append(row)
    found = []
    for (chip, part, head_dim, causal), shapes in groups.items():
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
                "part": part,
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


def winners(document: dict[str, Any]) -> list[Winner]:
    """The tile of the best score, `measured.score`, of each class that dispatch tells apart.

    Only tiles that ran on every case of a class count. A class whose best tile has a limit of
    registers is left out: rules chose that tile, and go on to.
    """
    from fastattn.kernels.attention.config import ATTENTION_SPACE, attention_class

    groups: dict[Any, dict[str, dict[Tile, dict[str, Any]]]] = defaultdict(dict)
    for row in document["rows"]:
        if row["stage"] == STAGE and "ms" in row:
            case = row["case"]
            key = attention_class(
                case["part"], row["chip"], case["head_dim"], getattr(torch, case["dtype"]), 0,
                causal=case["causal"],
            )  # fmt: skip
            groups[key].setdefault(case["label"], {})[tuple(row["tile"])] = row
    found = []
    for key, cases in groups.items():
        best = best_everywhere(list(cases.values()))
        if key is not None and best is not None and len(best[0]) == len(ATTENTION_SPACE.values):
            tile, reached = best
            rows = {label: own[tile] for label, own in cases.items()}
            values = dict(zip(ATTENTION_SPACE.values, tile, strict=True))
            found.append(Winner(key, values, reached, rows))
    return found


def _space() -> Any:
    from fastattn.kernels.attention.config import ATTENTION_SPACE

    return ATTENTION_SPACE


TABLE = TableCommand("benchmarks.sweep", STAGE, winners, _space)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints or writes the winners of the file on the command line; returns the exit status."""
    return TABLE.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
