"""Sets of tokens as bits: bit t % 32 of word t // 32 is token t."""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 32


def num_words(vocab_size: int) -> int:
    """Words of 32 bits for a set of tokens."""
    return -(-vocab_size // WORD_BITS)


def pack_mask(mask: Tensor) -> Tensor:
    """Bits from booleans: (..., vocab_size) bool -> (..., ceil(vocab_size / 32)) int32.

    The bits past the vocabulary are 0.
    """
    vocab_size = mask.shape[-1]
    padding = num_words(vocab_size) * WORD_BITS - vocab_size
    padded = torch.nn.functional.pad(mask, (0, padding)).unflatten(-1, (-1, WORD_BITS))
    # int64 until the end: bit 31 is the sign of an int32, and the conversion keeps the bits.
    weights = torch.ones((), dtype=torch.int64, device=mask.device) << torch.arange(
        WORD_BITS, device=mask.device
    )
    return (padded * weights).sum(-1).to(torch.int32)


def unpack_mask(words: Tensor, vocab_size: int) -> Tensor:
    """Booleans from bits: (..., ceil(vocab_size / 32)) int32 -> (..., vocab_size) bool."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    bits = (words[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :vocab_size].to(torch.bool)
