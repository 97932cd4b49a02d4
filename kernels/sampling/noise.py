"""Gumbel noise of a token, from nothing but (seed of its row, step, token).

argmax(score + noise) draws from softmax(scores), whatever else is in the batch and however it is
tiled. The words are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): key = the seed, counter = (token // 4, step low, step high, 0), word token % 4.

The noise is -log(E) with E = -log(1 - u) exponential, so that u near 0, and not near 1, makes the
large values. Where the 32 bits of u are below 2**12 a second counter (..., 1) adds 32 more. So u
goes down to 2**-65, and a token of probability 2**-60 is drawn as often as it should be.
"""

import triton
import triton.language as tl

RARE = tl.constexpr(12)  # bits of u below which more are drawn


@triton.jit
def gumbel(word, more):
    """Noise from 32 random bits and, where they are few, 32 more (both uint32)."""
    coarse = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    fine = word.to(tl.float32) * 2.3283064365386963e-10
    fine += (more.to(tl.float32) + 0.5) * 5.421010862427522e-20
    u = tl.where((word >> RARE) == 0, fine, coarse)
    near = u + u * u * 0.5
    far = -tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))
    return -tl.log(tl.where(u < 0.0009765625, near, far))


@triton.jit
def group_bits(seed, step, group, more: tl.constexpr):
    """32 random bits for each token of some groups of 32, (len(group), 32)."""
    quad = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    zero = quad * 0
    low = (step & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = (step >> 32).to(tl.int32)
    a, b, c, d = tl.philox(seed, quad, zero + low, zero + high, zero + more)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (group.shape[0], 32)).to(tl.uint32)


@triton.jit
def group_noise(seed, step, group):
    """Noise of the tokens of some groups of 32."""
    words = group_bits(seed, step, group, 0)
    more = words
    if tl.max(((words >> RARE) == 0).to(tl.int32)) != 0:  # one tile in two hundred
        more = group_bits(seed, step, group, 1)
    return gumbel(words, more)


@triton.jit
def token_bits(seed, step, token, more: tl.constexpr):
    """A word for each of any tokens."""
    zero = token * 0
    low = (step & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = (step >> 32).to(tl.int32)
    a, b, c, d = tl.philox(seed, token // 4, zero + low, zero + high, zero + more)
    place = token % 4
    word = tl.where(place == 0, a, tl.where(place == 1, b, tl.where(place == 2, c, d)))
    return word.to(tl.uint32)


@triton.jit
def token_noise(seed, step, token):
    """Noise of any tokens."""
    words = token_bits(seed, step, token, 0)
    more = words
    if tl.max(((words >> RARE) == 0).to(tl.int32)) != 0:
        more = token_bits(seed, step, token, 1)
    return gumbel(words, more)
