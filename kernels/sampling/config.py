"""Tiles of the sampling kernel. They follow compile reports where MEASURED_CONFIGS has no entry."""

from dataclasses import dataclass

from fastattn.kernels.attention.config import chip_of as chip_of

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

# What the parts of a key in MEASURED_CONFIGS may be.
_CLASS_PARTS = {
    "chip": tuple(chip for chip in CONFIGS if chip != "interpreter"),
    "rows": ("few", "many"),
}
ConfigClass = tuple[str, str]

# Measured on no device yet: see `benchmarks/sampling_sweep.py`, which writes this table.
# (chip, rows): (block, capacity, num_warps)
MEASURED_CONFIGS: dict[ConfigClass, tuple[int, int, int]] = {}


def config_class(chip: str, batch: int) -> ConfigClass:
    """The key in MEASURED_CONFIGS of a draw for `batch` rows."""
    return chip, "few" if batch <= FEW_ROWS else "many"


def check_measured_configs(table: dict[ConfigClass, tuple[int, int, int]]) -> None:
    """Raises ValueError, naming the entry, unless keys can occur and configs have sizes that run.

    Registers are not looked at: the compile report does, for each config in use.
    """
    for key, config in table.items():
        entry = f"MEASURED_CONFIGS[{key!r}] = {config!r}:"
        if len(key) != len(_CLASS_PARTS) or len(config) != 3:
            raise ValueError(
                f"{entry} must be ({', '.join(_CLASS_PARTS)}): (block, capacity, num_warps)"
            )
        for part, (name, known) in zip(key, _CLASS_PARTS.items(), strict=True):
            if part not in known:
                raise ValueError(f"{entry} {name} must be one of {known}, got {part!r}")
        block, capacity, num_warps = config
        for name, value, low, high in (
            ("block", block, 128, 32768),
            ("capacity", capacity, 16, block),
            ("num_warps", num_warps, 1, 16),
        ):
            if not low <= value <= high or value & (value - 1):
                raise ValueError(
                    f"{entry} {name} must be a power of two in {low}..{high}, got {value}"
                )


check_measured_configs(MEASURED_CONFIGS)


def select_sample_config(
    chip: str, vocab_size: int, top_n: int, batch: int = FEW_ROWS + 1
) -> SampleConfig:
    """The tile for a vocabulary; `top_n` most likely tokens must fit into what a tile keeps.

    Where few rows have a config of their own, sums of probabilities are added in another order
    there: a score that lies on a top-p border within float32's rounding may be kept in a small
    batch and cut in a large one. All else of a draw is the same bits whatever the tiles.
    """
    measured = MEASURED_CONFIGS.get(config_class(chip, batch))
    config = CONFIGS[chip] if measured is None else SampleConfig(*measured)
    block = min(config.block, max(128, 1 << (vocab_size - 1).bit_length()))
    capacity = max(config.capacity, 1 << max(top_n - 1, 0).bit_length())
    return SampleConfig(block, min(capacity, block), config.num_warps)
