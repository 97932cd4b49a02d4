"""Tiles of the sampling kernel. They follow compile reports; none has been timed yet."""

from dataclasses import dataclass

from fastattn.kernels.attention.config import chip_of as chip_of


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


def select_sample_config(chip: str, vocab_size: int, top_n: int) -> SampleConfig:
    """The tile for a vocabulary; `top_n` most likely tokens must fit into what a tile keeps."""
    config = CONFIGS[chip]
    block = min(config.block, max(128, 1 << (vocab_size - 1).bit_length()))
    capacity = max(config.capacity, 1 << max(top_n - 1, 0).bit_length())
    return SampleConfig(block, min(capacity, block), config.num_warps)
