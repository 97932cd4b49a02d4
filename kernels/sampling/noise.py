"""Gumbel noise of a token, from nothing but (seed of its row, step, token).

argmax(score + noise) draws from softmax(scores), whatever else is in the batch and however it is
tiled. The noise is -log(E) with E = -log(1 - u) exponential, so that u near 0, and not near 1,
makes the large values. u has 40 bits: the first 8 are a byte of Philox4x64-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) with key = (seed, 0), counter =
(token // 32 + 1, step, 0, 0); the other 32 are word token % 4 of Philox4x32-10 with key = seed,
counter = (token // 4, step low, step high, 0). `fastattn.sampling.noise` says why.
"""

import triton
import triton.language as tl


@triton.jit
def _gumbel(byte, word):
    """Noise from the first 8 bits and the other 32 (integers)."""
    u = byte.to(tl.float32) * 0.00390625 + (word.to(tl.float32) + 0.5) * 9.094947017729282e-13
    near = u + u * u * 0.5
    far = -tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))
    return -tl.log(tl.where(u < 0.0009765625, near, far))


@triton.jit
def _words(seed, step, quad):
    """Four words of 32 bits for each quad of tokens."""
    zero = quad * 0
    low = (step & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = (step >> 32).to(tl.int32)
    return tl.philox(seed, quad, zero + low, zero + high, zero)


@triton.jit
def _long_words(seed, step, group):
    """Four words of 64 bits for each group of 32 tokens."""
    block = group.to(tl.int64) + 1
    zero = block * 0
    return tl.philox(seed, block, zero + step, zero, zero)


@triton.jit
def _in_order(a, b, c, d):
    """Four tensors (n, m) side by side, (n, m, 2, 2)."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def group_noise(seed, step, group):
    """Noise of the tokens of some groups of 32, (len(group), 32)."""
    num: tl.constexpr = group.shape[0]
    a, b, c, d = _long_words(seed, step, group[:, None])
    long_words = tl.reshape(_in_order(a, b, c, d), (num, 4, 1))
    shift = (tl.arange(0, 8) * 8).to(tl.uint64)[None, None, :]
    byte = tl.reshape(((long_words >> shift) & 255).to(tl.int32), (num, 32))
    quad = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    a, b, c, d = _words(seed, step, quad)
    word = tl.reshape(_in_order(a, b, c, d), (num, 32)).to(tl.uint32)
    return _gumbel(byte, word)


@triton.jit
def _of_four(a, b, c, d, place):
    return tl.where(place == 0, a, tl.where(place == 1, b, tl.where(place == 2, c, d)))


@triton.jit
def token_noise(seed, step, token):
    """Noise of any tokens."""
    a, b, c, d = _long_words(seed, step, token // 32)
    long_word = _of_four(a, b, c, d, token % 32 // 8)
    byte = ((long_word >> (token % 8 * 8).to(tl.uint64)) & 255).to(tl.int32)
    a, b, c, d = _words(seed, step, token // 4)
    return _gumbel(byte, _of_four(a, b, c, d, token % 4).to(tl.uint32))
