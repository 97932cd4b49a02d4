"""Tiles of the decoding kernels, and how many programs share the keys of a sequence.

Like the tiles in `config.py` they follow compile reports, where MEASURED_DECODE has no entry.
"""

import functools
from dataclasses import dataclass

import torch

from fastattn.kernels.attention.cached_keys import CachedKeys
from fastattn.kernels.attention.config import (
    HEAD_DIMS,
    TileConfig,
    chip_of,
    select_forward_config,
)
from fastattn.kernels.attention.operands import Modifiers
from fastattn.kernels.measured import ConfigSpace, Measured, ProblemClass, powers_of_two

# Query rows of the smallest tile: those that one token of a group of heads has, or a few tokens.
FEW_ROWS = 16
# New tokens that the attention kernel appends itself: a tile as tensor cores want it at least.
NEW_ROWS = 16
# Rows that a program of the append kernel writes.
APPEND_ROWS = 16
# Splits under batch_invariant=True, whatever the batch: enough for one sequence of a model with 8
# key/value heads to fill half of a large GPU. More rows than these make programs enough unsplit.
FIXED_SPLITS = 8
FIXED_SPLIT_ROWS = 128
MAX_SPLITS = 128
# Programs that share a multiprocessor: their tiles take at most half of its shared memory.
PROGRAMS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True)
class DecodeConfig:
    """How one decoding step runs.

    Attributes:
        block_m: query rows of a tile, those of all heads of a group together.
        block_n: keys of a tile.
        num_splits: programs that share the keys of a sequence and head.
        last_combines: the splits are joined by the program that finishes last, not by a launch.
        appends: up to NEW_ROWS new tokens are appended on the way, not by a launch.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    num_splits: int = 1
    last_combines: bool = False
    max_registers: int | None = None
    appends: bool = True

    @property
    def launch_options(self) -> dict[str, int]:
        """The options in the words of a Triton launch."""
        return TileConfig(
            self.block_m, self.block_n, self.num_warps, self.num_stages, self.max_registers
        ).launch_options

    @property
    def one_walk(self) -> bool:
        """Whether all tiles are masked alike: few rows wait for memory, and masks cost nothing."""
        return self.block_m <= 32

    @property
    def block_splits(self) -> int:
        """Splits that are joined at a time."""
        return min(32, 1 << (self.num_splits - 1).bit_length())

    def blocks_m(self, q: torch.Tensor, cached: CachedKeys) -> int:
        """Tiles of query rows of one key/value head."""
        return -(-q.shape[1] * (q.shape[2] // cached.k.shape[-2]) // self.block_m)

    def num_counters(self, q: torch.Tensor, cached: CachedKeys) -> int:
        """Results that splits share: entries of `counters` that the last program needs."""
        return q.shape[0] * cached.k.shape[-2] * self.blocks_m(q, cached)

    def __str__(self) -> str:
        tile = TileConfig(
            self.block_m, self.block_n, self.num_warps, self.num_stages, self.max_registers
        )
        splits = f"{self.num_splits} split{'s' if self.num_splits > 1 else ''}"
        return f"{tile}, {splits}{', last combines' if self.last_combines else ''}"


# (block_n, num_stages) of tiles of few rows, by chip and by head dimension up to the key: keys and
# values of all stages in half of the chip's shared memory.
_HALF_TILES: dict[str, dict[int, tuple[int, int]]] = {
    "sm_80": {64: (128, 2), 128: (64, 2), 256: (32, 2)},
    "sm_90": {64: (128, 3), 128: (64, 3), 256: (32, 3)},
    "sm_100": {64: (128, 3), 128: (64, 3), 256: (32, 3)},
    "sm_120": {64: (64, 2), 128: (32, 2), 256: (16, 2)},
    "gfx942": {64: (64, 1), 128: (64, 1), 256: (32, 1)},
}

# What is measured: few rows without a modifier. Not float32: it takes a limit of registers.
DECODE_SPACE = ConfigSpace(
    "MEASURED_DECODE",
    TileConfig,
    parts={
        "chip": tuple(_HALF_TILES),
        "dtype": ("float16", "bfloat16"),
        "head_dim": HEAD_DIMS,
        "cache": ("contiguous", "contiguous, quantized", "paged", "paged, quantized"),
    },
    values={
        "block_m": (FEW_ROWS,),
        "block_n": powers_of_two(16, 256),
        "num_warps": powers_of_two(1, 16),
        "num_stages": tuple(range(1, 9)),
    },
)

# Measured on no device yet: see `benchmarks/decode_sweep.py`, which writes this table.
MEASURED_DECODE: dict[ProblemClass, Measured] = {}

DECODE_SPACE.check_table(MEASURED_DECODE)


def decode_class(
    chip: str,
    head_dim: int,
    dtype: torch.dtype,
    num_rows: int,
    num_modifiers: int,
    *,
    quantized: bool,
    paged: bool,
) -> ProblemClass | None:
    """The class of a step of few rows: one token, or a few. None where rules alone choose its tile.

    Arguments are as for `decode_tile`.
    """
    if chip == "interpreter" or num_modifiers or num_rows > FEW_ROWS or dtype == torch.float32:
        return None
    limit = next(limit for limit in HEAD_DIMS if head_dim <= limit)
    cache = "paged" if paged else "contiguous"
    cache = f"{cache}, quantized" if quantized else cache
    return chip, str(dtype).removeprefix("torch."), limit, cache


def class_of_step(q: torch.Tensor, cached: CachedKeys, modifiers: Modifiers) -> ProblemClass | None:
    """`decode_class` of a step's operands."""
    return decode_class(
        chip_of(q.device),
        max(q.shape[-1], cached.v.shape[-1]),
        q.dtype,
        q.shape[1] * (q.shape[2] // cached.k.shape[-2]),
        modifiers.num_modifiers,
        quantized=cached.k_scale is not None,
        paged=cached.block_table is not None,
    )


def decode_tile(
    chip: str,
    head_dim: int,
    dtype: torch.dtype,
    num_rows: int,
    num_modifiers: int,
    *,
    quantized: bool,
    paged: bool,
    rotary: bool,
) -> TileConfig:
    """The tile for `num_rows` query rows of a group; the forward pass's where they are many.

    `num_modifiers` is that of `Modifiers`; scales, block numbers and angles need registers as well.
    Few rows without modifiers have the tile of MEASURED_DECODE, if there is one for their class.
    """
    problem_class = decode_class(
        chip, head_dim, dtype, num_rows, num_modifiers, quantized=quantized, paged=paged
    )
    if problem_class in MEASURED_DECODE:
        return MEASURED_DECODE[problem_class].config
    block_m = FEW_ROWS if num_rows <= FEW_ROWS else 32
    if chip == "interpreter":
        return TileConfig(block_m if num_rows <= 32 else 64, 64, 4, 1)
    # Four of AMD's warps may use 512 registers each, more of them only 256.
    amd = chip == "gfx942"
    if dtype == torch.float32:
        # Products of float32 run from registers, as in `config.py`.
        block_n = 32 if num_rows <= 32 and head_dim <= 128 else 16
        registers, num_warps = (None, 4) if amd else (255, 8)
        return TileConfig(block_m if num_rows <= 32 else 16, block_n, num_warps, 1, registers)
    if num_rows > 32 and quantized:
        return TileConfig(64 if head_dim <= 128 else 32, 32, 8, 1)
    if num_rows > 32:
        return select_forward_config(
            chip, head_dim, dtype, num_rows, num_modifiers + paged + rotary
        )
    table = _HALF_TILES[chip]
    block_n, num_stages = table[next(limit for limit in table if head_dim <= limit)]
    if quantized and head_dim <= 128:
        block_n = max(block_n, 64)  # its keys take half of the memory
    num_warps = 8 if (block_m > 16 or num_modifiers) and not amd else 4
    # One stage more where block numbers must be there before the keys can be asked for.
    return TileConfig(block_m, block_n, num_warps, num_stages + (paged and num_stages > 1))


def appends_itself(chip: str, dtype: torch.dtype) -> bool:
    """Whether the attention kernel appends; float32 has no registers left for it."""
    return dtype != torch.float32 or chip == "interpreter"


@functools.lru_cache(maxsize=4096)
def select_num_splits(num_programs: int, num_tiles: int, slots: int) -> int:
    """Programs that share the keys of a sequence.

    As few as leave their last wave at least 85% as full as the best choice does.

    Args:
        num_programs: programs of an unsplit launch.
        num_tiles: tiles of keys that a sequence may have; its true length is on the device.
        slots: programs that the chip runs at a time.
    """
    limit = min(MAX_SPLITS, num_tiles, max(1, slots))
    if num_programs == 0 or limit <= 1 or num_programs >= 0.8 * slots:
        return 1

    def filled(splits: int) -> float:
        waves = num_programs * splits / slots
        return waves / -(-num_programs * splits // slots)

    best = max(filled(splits) for splits in range(1, limit + 1))
    return next(splits for splits in range(1, limit + 1) if filled(splits) >= 0.85 * best)


@functools.cache
def program_slots(device: torch.device) -> int:
    """Decoding programs that a device runs at a time."""
    if device.type == "cpu":
        return 8  # so that the interpreter splits too
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR


def select_decode_config(
    q: torch.Tensor,
    cached: CachedKeys,
    modifiers: Modifiers,
    batch_invariant: bool = False,
    tile: TileConfig | None = None,
) -> DecodeConfig:
    """How a step runs: from shapes alone, so that nothing waits for the device.

    With `batch_invariant` nothing depends on the batch size, so that neither do the bits. A `tile`
    that the caller measured for `class_of_step` takes the place of `decode_tile`'s.
    """
    batch, seqlen_q, num_heads, head_dim = q.shape
    num_key_heads = cached.k.shape[-2]
    num_rows = seqlen_q * (num_heads // num_key_heads)
    head_dim = max(head_dim, cached.v.shape[-1])
    chip = chip_of(q.device)
    if tile is None:
        tile = decode_tile(
            chip,
            head_dim,
            q.dtype,
            num_rows,
            modifiers.num_modifiers,
            quantized=cached.k_scale is not None,
            paged=cached.block_table is not None,
            rotary=cached.cos is not None,
        )
    if batch_invariant:
        num_splits = FIXED_SPLITS if num_rows <= FIXED_SPLIT_ROWS else 1
    else:
        num_tiles = -(-cached.capacity // tile.block_n)
        if modifiers.window_left >= 0:
            num_tiles = min(num_tiles, -(-(modifiers.window_left + seqlen_q) // tile.block_n) + 1)
        # A split must read more than it costs. It costs partial results, float32, written and read:
        # 8 bytes a row and dimension. A tile is 4 bytes a key and dimension: 2 of key, 2 of value.
        fewest_tiles = max(1, -(-2 * num_rows // tile.block_n))
        num_tiles //= fewest_tiles
        num_programs = batch * num_key_heads * -(-num_rows // tile.block_m)
        num_splits = select_num_splits(num_programs, max(1, num_tiles), program_slots(q.device))
    return DecodeConfig(
        tile.block_m,
        tile.block_n,
        tile.num_warps,
        tile.num_stages,
        num_splits,
        max_registers=tile.max_registers,
        appends=appends_itself(chip, q.dtype),
    )
