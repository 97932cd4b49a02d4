"""Tile configurations, and which one a problem gets.

Each chip has three tiles a head dimension: for plain and causal attention, for one modifier
that needs registers of its own, and for several or for few rows. None of them spills a register or
exceeds the chip's shared memory: `fastattn.testing.compile_report` compiles them all. Within that
they follow compile reports alone, where MEASURED_ATTENTION has no entry. `make gpu` and
`fastattn tune` sweep the candidates below.
"""

import functools
from dataclasses import dataclass

import torch

from fastattn.kernels.measured import ConfigSpace, Measured, ProblemClass, powers_of_two


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options of a kernel that walks over tiles."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def launch_options(self) -> dict[str, int]:
        """The options in the words of a Triton launch. AMD's backend knows no register limit."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}, {self.num_warps} warps, {self.num_stages} stages"
        return tile if self.max_registers is None else f"{tile}, {self.max_registers} registers"


@dataclass(frozen=True)
class Tiles:
    """The tiles of one chip, dtype and head dimension."""

    plain: TileConfig
    modified: TileConfig
    crowded: TileConfig


# block_m, block_n, num_warps, num_stages, and perhaps a register limit.
_Tile = tuple[int, int, int, int] | tuple[int, int, int, int, int]


def _tiles(
    plain: _Tile, modified: _Tile, crowded: _Tile, max_registers: int | None = None
) -> Tiles:
    return Tiles(*(_config(tile, max_registers) for tile in (plain, modified, crowded)))


def _config(tile: _Tile, max_registers: int | None) -> TileConfig:
    return TileConfig(*tile[:4], tile[4] if len(tile) == 5 else max_registers)


# (block_m, block_n, num_warps, num_stages) by chip and by head dimension up to the key.
HALF_CONFIGS: dict[str, dict[int, Tiles]] = {
    # 163 KiB of shared memory (A100).
    "sm_80": {
        64: _tiles((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        128: _tiles((128, 32, 8, 3), (64, 64, 8, 2), (32, 32, 8, 2)),
        256: _tiles((64, 64, 8, 2), (64, 32, 8, 1), (64, 32, 8, 1)),
    },
    # 227 KiB (H100, H200). A warpgroup's wgmma takes 64 rows; fewer fall back to mma.
    "sm_90": {
        64: _tiles((128, 128, 8, 3), (128, 64, 8, 3), (64, 32, 4, 2)),
        128: _tiles((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        256: _tiles((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    },
    # 227 KiB (B200); 512 columns of tensor memory.
    "sm_100": {
        64: _tiles((128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        128: _tiles((128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _tiles((64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    },
    # 99 KiB (RTX 30, 40, 50, L4, L40).
    "sm_120": {
        64: _tiles((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
        128: _tiles((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        256: _tiles((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)),
    },
    # 64 KiB (MI300); four warps may use 512 registers, eight only 256.
    "gfx942": {
        64: _tiles((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 2)),
        128: _tiles((128, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        256: _tiles((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 4, 1)),
    },
}

# float32 products run on the ordinary units, from registers: small tiles on every chip. Left alone,
# ptxas spills a few of their registers to fit more programs on a multiprocessor; a limit stops it.
_FLOAT32_TILES: dict[int, tuple[_Tile, _Tile, _Tile]] = {
    64: ((32, 32, 8, 2), (32, 16, 8, 1), (32, 16, 8, 1)),
    128: ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    256: ((16, 16, 8, 1), (32, 16, 8, 2), (32, 16, 8, 2)),
}
FLOAT32_CONFIGS: dict[str, dict[int, Tiles]] = {
    chip: {
        limit: _tiles(*three, max_registers=None if chip == "gfx942" else 255)
        for limit, three in _FLOAT32_TILES.items()
    }
    for chip in HALF_CONFIGS
}

# In the interpreter a tile costs about the same whatever its size.
INTERPRETER_CONFIG = TileConfig(64, 64, 4, 1)

# What the sweep of `make gpu` tries beside the selected tiles.
FORWARD_CANDIDATES = tuple(
    TileConfig(block_m, block_n, num_warps, num_stages)
    for block_m, block_n, num_warps in (
        (128, 128, 8),
        (128, 64, 8),
        (128, 64, 4),
        (128, 32, 8),
        (64, 128, 4),
        (64, 64, 4),
        (64, 64, 8),
    )
    for num_stages in (2, 3, 4)
)
BACKWARD_ROWS_CANDIDATES = tuple(
    TileConfig(*tile)
    for tile in (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (128, 32, 8, 2),
        (128, 32, 8, 3),
        (64, 32, 4, 2),
        (128, 128, 8, 2),
    )
)
BACKWARD_KEYS_CANDIDATES = tuple(
    TileConfig(*tile)
    for tile in (
        (64, 128, 8, 2),
        (32, 128, 8, 2),
        (32, 128, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 8, 2),
        (64, 64, 8, 3),
        (32, 64, 4, 2),
        (32, 64, 8, 2),
    )
)


def padded_dim(head_dim: int) -> int:
    """The power of two that a tile's head dimension is padded to; tensor cores want 16 or more."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.cache
def chip_of(device: torch.device) -> str:
    """The row of HALF_CONFIGS for a device; "interpreter" on CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in ((8, 6), (8, 9)) or major == 12:
        return "sm_120"
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


def tiles(chip: str, head_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a chip for the larger of both head dimensions."""
    table = (FLOAT32_CONFIGS if dtype == torch.float32 else HALF_CONFIGS)[chip]
    return table[next(limit for limit in table if head_dim <= limit)]


# Up to so many rows do not fill a tile: they get the crowded one, whatever was measured.
FEW_ROWS = 64
HEAD_DIMS = (64, 128, 256)

# What is measured: problems of many rows without a modifier. Not float32: it takes a limit of
# registers. "causal" is any limit to the right. Rows (dQ) and keys (dK, dV) are the backward walks.
ATTENTION_SPACE = ConfigSpace(
    "MEASURED_ATTENTION",
    TileConfig,
    parts={
        "chip": tuple(HALF_CONFIGS),
        "part": ("forward", "rows", "keys"),
        "dtype": ("float16", "bfloat16"),
        "head_dim": HEAD_DIMS,
        "mask": ("full", "causal"),
    },
    values={
        "block_m": powers_of_two(16, 256),
        "block_n": powers_of_two(16, 256),
        "num_warps": powers_of_two(1, 16),
        "num_stages": tuple(range(1, 9)),
    },
)

# Measured on no device yet: see `benchmarks/sweep.py`, which writes this table.
MEASURED_ATTENTION: dict[ProblemClass, Measured] = {}

ATTENTION_SPACE.check_table(MEASURED_ATTENTION)


def attention_class(
    part: str,
    chip: str,
    head_dim: int,
    dtype: torch.dtype,
    num_modifiers: int,
    *,
    causal: bool,
) -> ProblemClass | None:
    """The class of a problem of many rows; None where rules alone choose its tiles.

    Args:
        part: "forward", or of the backward pass "rows" or "keys".
        chip, head_dim, dtype, num_modifiers: as for `select_forward_config`.
        causal: whether there is a limit to the right.
    """
    if chip == "interpreter" or num_modifiers or dtype == torch.float32:
        return None
    limit = next(limit for limit in HEAD_DIMS if head_dim <= limit)
    mask = "causal" if causal else "full"
    return chip, part, str(dtype).removeprefix("torch."), limit, mask


def _measured_tile(problem_class: ProblemClass | None) -> TileConfig | None:
    measured = MEASURED_ATTENTION.get(problem_class) if problem_class is not None else None
    return None if measured is None else measured.config


def select_forward_config(
    chip: str,
    head_dim: int,
    dtype: torch.dtype,
    seqlen_q: int,
    num_modifiers: int,
    causal: bool = False,
) -> TileConfig:
    """The tile for a problem.

    Args:
        chip: a key of HALF_CONFIGS, or "interpreter".
        head_dim: the larger of the key and value head dimensions.
        dtype: of q, k and v.
        seqlen_q: rows of the longest sequence.
        num_modifiers: how many need registers of their own (`Modifiers.num_modifiers`).
        causal: whether there is a limit to the right.
    """
    if chip == "interpreter":
        return INTERPRETER_CONFIG
    chosen = tiles(chip, head_dim, dtype)
    if num_modifiers > 1 or seqlen_q <= FEW_ROWS:
        return chosen.crowded
    problem_class = attention_class("forward", chip, head_dim, dtype, num_modifiers, causal=causal)
    if (measured := _measured_tile(problem_class)) is not None:
        return measured
    return chosen.modified if num_modifiers else chosen.plain


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of the backward kernels: by rows (dQ), by keys (dK, dV), and of a shared dense bias."""

    rows: TileConfig
    keys: TileConfig
    bias: TileConfig

    def __str__(self) -> str:
        return f"rows {self.rows}; keys {self.keys}; bias {self.bias}"


@dataclass(frozen=True)
class BackwardTiles:
    """The backward tiles of one chip, dtype and head dimension.

    `by_distance` is for the walk by rows where a bias by distance needs its gradient, which takes
    block_m <= block_n; so do the crowded tiles.
    """

    rows: Tiles
    keys: Tiles
    by_distance: TileConfig
    bias: TileConfig


def _backward_tiles(
    rows: tuple[_Tile, _Tile, _Tile],
    keys: tuple[_Tile, _Tile, _Tile],
    by_distance: _Tile,
    bias: _Tile,
    max_registers: int | None = None,
) -> BackwardTiles:
    return BackwardTiles(
        _tiles(*rows, max_registers),
        _tiles(*keys, max_registers),
        _config(by_distance, max_registers),
        _config(bias, max_registers),
    )


# By chip and by head dimension up to the key: rows (plain, modified, crowded), keys, by_distance,
# bias. Like the forward tiles, they follow compile reports; none has been timed yet.
HALF_BACKWARD_CONFIGS: dict[str, dict[int, BackwardTiles]] = {
    "sm_80": {
        64: _backward_tiles(
            ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1)),
            ((32, 64, 8, 2), (32, 32, 4, 2, 255), (32, 32, 4, 1)),
            (32, 64, 8, 2),
            (32, 32, 4, 1),
        ),
        128: _backward_tiles(
            ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
            ((32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 8, 1)),
            (32, 32, 8, 1),
            (16, 32, 4, 1),
        ),
        256: _backward_tiles(
            ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            (32, 32, 8, 1),
            (16, 32, 4, 1),
            255,
        ),
    },
    "sm_90": {
        64: _backward_tiles(
            ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2)),
            ((64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 4, 2)),
            (64, 64, 8, 2),
            (64, 64, 8, 1),
        ),
        128: _backward_tiles(
            ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
            ((32, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1)),
            (32, 64, 8, 2),
            (64, 64, 8, 1),
        ),
        256: _backward_tiles(
            ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
            ((64, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            (32, 32, 8, 1),
            (16, 32, 4, 1),
            255,
        ),
    },
    "sm_100": {
        64: _backward_tiles(
            ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
            ((64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2)),
            (64, 64, 8, 2),
            (64, 64, 8, 1),
            255,
        ),
        128: _backward_tiles(
            ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
            ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)),
            (32, 64, 8, 2),
            (64, 64, 8, 1),
            255,
        ),
        256: _backward_tiles(
            ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
            ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            (32, 32, 8, 1),
            (16, 32, 4, 1),
            255,
        ),
    },
    "sm_120": {
        64: _backward_tiles(
            ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 1, 255)),
            ((32, 64, 8, 2), (32, 32, 4, 2, 255), (32, 32, 4, 1)),
            (32, 64, 8, 2),
            (32, 32, 4, 1, 255),
        ),
        128: _backward_tiles(
            ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
            ((32, 64, 8, 2), (32, 64, 8, 1), (32, 32, 8, 1)),
            (32, 32, 8, 1),
            (16, 32, 4, 1),
            255,
        ),
        256: _backward_tiles(
            ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
            (32, 32, 8, 1),
            (16, 32, 4, 1),
            255,
        ),
    },
    "gfx942": {
        64: _backward_tiles(
            ((64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)),
            ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 4, 1)),
            (32, 64, 8, 1),
            (64, 64, 8, 1),
        ),
        128: _backward_tiles(
            ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)),
            ((32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1)),
            (32, 32, 4, 1),
            (32, 32, 4, 1),
        ),
        256: _backward_tiles(
            ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1)),
            ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
            (32, 32, 4, 1),
            (32, 32, 4, 1),
        ),
    },
}


def _float32_backward_tiles(chip: str) -> dict[int, BackwardTiles]:
    """Small tiles with a register limit, for the reasons that the forward pass has."""
    small, wide = (16, 16, 4, 1), (16, 16, 16, 1)
    # Plain, modified or crowded, shared bias. Four of AMD's warps may use 512 registers each.
    table: dict[int, tuple[_Tile, _Tile, _Tile]] = {
        64: ((32, 32, 8, 1), small, small),
        128: (small, small, small),
        256: (small, small, small) if chip == "gfx942" else ((16, 16, 8, 1), wide, (16, 16, 8, 1)),
    }
    return {
        limit: _backward_tiles(
            (plain, crowded, crowded),
            (plain, crowded, crowded),
            crowded,
            bias,
            None if chip == "gfx942" else 255,
        )
        for limit, (plain, crowded, bias) in table.items()
    }


FLOAT32_BACKWARD_CONFIGS = {chip: _float32_backward_tiles(chip) for chip in HALF_BACKWARD_CONFIGS}


def select_backward_config(
    chip: str,
    head_dim: int,
    dtype: torch.dtype,
    num_modifiers: int,
    by_distance: bool,
    causal: bool = False,
) -> BackwardConfig:
    """The backward tiles for a problem.

    Args:
        chip, head_dim, dtype, num_modifiers, causal: as for `select_forward_config`.
        by_distance: whether a bias by distance needs a gradient: block_m <= block_n by rows then.
    """
    if chip == "interpreter":
        return BackwardConfig(INTERPRETER_CONFIG, INTERPRETER_CONFIG, INTERPRETER_CONFIG)
    table = (FLOAT32_BACKWARD_CONFIGS if dtype == torch.float32 else HALF_BACKWARD_CONFIGS)[chip]
    chosen = table[next(limit for limit in table if head_dim <= limit)]
    if num_modifiers > 1:
        return BackwardConfig(chosen.rows.crowded, chosen.keys.crowded, chosen.bias)
    if num_modifiers == 0:
        rows, keys = (
            _measured_tile(attention_class(part, chip, head_dim, dtype, 0, causal=causal))
            for part in ("rows", "keys")
        )
        return BackwardConfig(rows or chosen.rows.plain, keys or chosen.keys.plain, chosen.bias)
    rows = chosen.by_distance if by_distance else chosen.rows.modified
    return BackwardConfig(rows, chosen.keys.modified, chosen.bias)


@dataclass(frozen=True)
class WeightsConfig:
    """Tile sizes and launch options of the weights kernel."""

    block_m: int
    block_n: int
    num_warps: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}, {self.num_warps} warps"


INTERPRETER_WEIGHTS_CONFIG = WeightsConfig(64, 64, 4)


def select_weights_config(head_dim: int, dtype: torch.dtype) -> WeightsConfig:
    """One square tile a program: the kernel is bound by the bytes it writes."""
    if dtype == torch.float32:
        return WeightsConfig(32, 32, 8)
    if head_dim > 128:
        return WeightsConfig(32, 32, 4)
    return WeightsConfig(64, 64, 4)
