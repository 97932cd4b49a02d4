"""Dropout of attention weights, as a value: which weights are kept follows from a seed alone.

The random bits of a weight are Philox4x32-10 (`fastattn.philox`) of its place: key = the seed,
counter = (column // 4, row, head, sequence), and word column % 4 of the four that come out.
Forward, backward and every implementation that follows this draw the same mask, which is never
stored, whatever their tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn.philox import WORD, philox


@dataclass(frozen=True, eq=False)
class Dropout:
    """Weights are dropped with probability `p`, the others grow by 1 / (1 - p).

    Args:
        p: in (0, 1). It is rounded to a multiple of 2**-32.
        seed: int64 tensor of one element; None where the implementation draws for itself.
        first_sequence: number of the first sequence that it is applied to.
    """

    p: float
    seed: Tensor | None = None
    first_sequence: int = 0

    def drawn(self, device: torch.device) -> Dropout:
        """The same with a seed, drawn from torch's generator of the device where there is none.

        A tensor that never leaves the device: replaying a CUDA graph draws another one, and
        `torch.utils.checkpoint` draws the same again.
        """
        if self.seed is not None:
            return self
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
        return replace(self, seed=seed)

    def at(self, index: int) -> Dropout:
        """This dropout for sequence `index` alone."""
        return replace(self, first_sequence=self.first_sequence + index)

    def keep(self, num_sequences: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
        """Which weights stay: bool (num_sequences, num_heads, seqlen_q, seqlen_k)."""
        if self.seed is None:
            raise ValueError("seed must be a tensor to say which weights are kept, got None")
        device = self.seed.device
        sequence, head, row = (
            torch.arange(start, start + size, device=device)
            for start, size in (
                (self.first_sequence, num_sequences), (0, num_heads), (0, seqlen_q),
            )
        )  # fmt: skip
        quads = torch.arange(-(-seqlen_k // 4), device=device)
        counters = torch.broadcast_tensors(
            quads, row[:, None], head[:, None, None], sequence[:, None, None, None]
        )
        words = torch.stack(philox(self.seed, counters), -1).flatten(-2)
        return words[..., :seqlen_k] >= threshold(self.p)


def threshold(p: float) -> int:
    """A weight is kept if its 32 random bits, as a number, are at least this."""
    return min(round(p * 2**32), WORD)
