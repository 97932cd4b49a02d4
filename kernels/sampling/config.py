"""Tiles of the sampling kernel. They follow compile reports where MEASURED_SAMPLE has no entry."""

from dataclasses import dataclass

from fastattn.kernels.attention.config import chip_of as chip_of
from fastattn.kernels.measured import ConfigSpace, Measured, ProblemClass, powers_of_two

# Up to so many rows do not fill a chip with programs: smaller tiles may suit them.
FEW_ROWS = 8


@dataclass(frozen=True)
class SampleConfig:
    """How a row is cut.

    Attributes:
        block: tokens of a tile, a power of two.
        capacity: scores that a tile keeps at most, a power of two. Rows drawn from more tokens
            than the tiles keep are read again; what is kept is written and read once more.
    """

    block: int
    capacity: int
    num_warps: int

    def num_tiles(self, vocab_size: int) -> int:
        """Tiles of a row."""
        return -(-vocab_size // self.block)

    def fitted(self, vocab_size: int, top_n: int) -> "SampleConfig":
        """With a tile no larger than a row, which keeps the `top_n` most likely tokens."""
        block = min(self.block, max(128, 1 << (vocab_size - 1).bit_length()))
        capacity = max(self.capacity, 1 << max(top_n - 1, 0).bit_length())
        return SampleConfig(block, min(capacity, block), self.num_warps)

    def __str__(self) -> str:
        return f"{self.block} tokens, {self.capacity} kept, {self.num_warps} warps"


# Offsets within a tile are 16 bits. Larger tiles spill registers, and smaller ones keep more.
CONFIGS = {
    "sm_80": SampleConfig(4096, 64, 16),
    "sm_90": SampleConfig(4096, 64, 16),
    "sm_100": SampleConfig(4096, 64, 16),
    "sm_120": SampleConfig(4096, 64, 16),
    "gfx942": SampleConfig(4096, 64, 8),
    "interpreter": SampleConfig(4096, 64, 4),
}

SAMPLE_SPACE = ConfigSpace(
    "MEASURED_SAMPLE",
    SampleConfig,
    parts={
        "chip": tuple(chip for chip in CONFIGS if chip != "interpreter"),
        "rows": ("few", "many"),
    },
    values={
        "block": powers_of_two(128, 32768),
        "capacity": powers_of_two(16, 32768),
        "num_warps": powers_of_two(1, 16),
    },
    rule=lambda config: (
        f"capacity must be at most block = {config.block}, got {config.capacity}"
        if config.capacity > config.block
        else ""
    ),
)

# Measured on no device yet: see `benchmarks/sampling_sweep.py`, which writes this table.
MEASURED_SAMPLE: dict[ProblemClass, Measured] = {}

SAMPLE_SPACE.check_table(MEASURED_SAMPLE)


def sample_class(chip: str, batch: int) -> ProblemClass | None:
    """The class of a draw for `batch` rows; None in the interpreter."""
    return None if chip == "interpreter" else (chip, "few" if batch <= FEW_ROWS else "many")


def select_sample_config(
    chip: str, vocab_size: int, top_n: int, batch: int = FEW_ROWS + 1
) -> SampleConfig:
    """The tile for a vocabulary; `top_n` most likely tokens must fit into what a tile keeps.

    Where few rows have a config of their own, sums of probabilities are added in another order
    there: a score that lies on a top-p border within float32's rounding may be kept in a small
    batch and cut in a large one. All else of a draw is the same bits whatever the tiles.
    """
    measured = MEASURED_SAMPLE.get(sample_class(chip, batch))
    config = CONFIGS[chip] if measured is None else measured.config
    return config.fitted(vocab_size, top_n)
