"""What the sampling kernels share: operands, the processed logits of a tile, and keys of floats.

A tile is (BLOCK // 32, 32) tokens, so that a word of a bitmask is loaded once for its 32 tokens.
The words are dealt to the tiles of a row four at a time, like cards: tokens that are often likely
lie next to each other in most vocabularies, and would otherwise crowd into one tile.
Everything is float32 from the first step on, in the order of Hugging Face's processors: repetition,
presence and frequency penalties, bias, bans, temperature.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Words of 32 tokens that stay together: 128 tokens, 256 bytes of half-precision logits.
CARD = tl.constexpr(4)


class Setting(NamedTuple):
    """A number for each row (`ptr`), or one for all (`value`, where ptr is None)."""

    ptr: Any
    value: Any


class Table(NamedTuple):
    """A (row, entry) operand: logits, bitmask words, counts. stride_row 0 is one for all rows."""

    ptr: Any
    stride_row: Any


class Processing(NamedTuple):
    """What is done to logits before anything is cut; None members are off.

    Kernels take the members one by one, as those of `Terms` in `kernels/attention/tile.py`.
    """

    seen: Any  # Table of bitmask words
    counts: Any  # Table of int32
    bias: Any  # Table of floats
    allowed: Any  # Table of bitmask words
    repetition: Any  # numbers of this row
    presence: Any
    frequency: Any
    temperature: Any


@triton.jit
def load_setting(setting, row):
    """The number of a row, float32."""
    if setting.ptr is None:
        value = tl.cast(setting.value, tl.float32)
    else:
        value = tl.load(setting.ptr + row).to(tl.float32)
    return value


@triton.jit
def table_row(table, row):
    """Pointer to the first entry of a row."""
    return table.ptr + tl.cast(row, tl.int64) * table.stride_row


@triton.jit
def dealt_word(tile, place, num_tiles):
    """Number, in its row, of the word at `place` of a tile."""
    return (place // CARD * num_tiles + tile) * CARD + place % CARD


@triton.jit
def tile_words(tile, num_tiles, BLOCK: tl.constexpr):
    """Numbers of a tile's words, in rising order."""
    return dealt_word(tile, tl.arange(0, BLOCK // 32), num_tiles)


@triton.jit
def load_bits(table, row, word, vocab_size):
    """A bitmask for the tokens of some words, as 0 and 1."""
    words = tl.load(table_row(table, row) + word, mask=word * 32 < vocab_size, other=0)
    return (words[:, None] >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def tokens_of(word):
    """Numbers of the tokens of some words."""
    return word[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def processed_scores(logits, processing, row, word, vocab_size):
    """Scores of the tokens of some words; -inf past the vocabulary's end."""
    token = tokens_of(word)
    inside = token < vocab_size
    x = tl.load(table_row(logits, row) + token, mask=inside, other=float("-inf")).to(tl.float32)
    if processing.seen.ptr is not None:
        seen = load_bits(processing.seen, row, word, vocab_size)
        divisor = tl.broadcast_to(processing.repetition, x.shape)
        penalized = tl.where(x > 0, tl.div_rn(x, divisor), x * divisor)
        x = tl.where(seen != 0, penalized, x)
    if processing.counts.ptr is not None:
        count = tl.load(table_row(processing.counts, row) + token, mask=inside, other=0)
        present = tl.where(count > 0, processing.presence, 0.0)
        x -= present + processing.frequency * count.to(tl.float32)
    if processing.bias.ptr is not None:
        x += tl.load(table_row(processing.bias, row) + token, mask=inside, other=0.0).to(tl.float32)
    if processing.allowed.ptr is not None:
        bits = load_bits(processing.allowed, row, word, vocab_size)
        x = tl.where(bits != 0, x, -float("inf"))
    # Temperature 0 is greedy, and divides by nothing.
    divisor = tl.where(processing.temperature > 0, processing.temperature, 1.0)
    x = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    return tl.where(inside, x + 0.0, -float("inf"))  # + 0.0 makes one zero of two


@triton.jit
def key_of(x):
    """int32 keys in the order of float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def float_of(key):
    """The number that a key stands for."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def relative_weight(x, largest):
    """exp(x - largest), also where both are infinite."""
    return tl.where(x == largest, 1.0, tl.exp(x - largest))
