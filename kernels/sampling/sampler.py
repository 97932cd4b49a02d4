"""The whole draw in one launch and, but for rare rows, one read of the logits.

Each program holds a tile of a row in registers: it processes the scores, keeps their maximum and
sum of exponentials, and either draws within the tile (unfiltered rows) or keeps its largest scores
as candidates, cut by bisection on integer keys so that their number lies between what top-k asks
for and CAPACITY. The program that finishes a row last goes on to `join.py`.
"""

import torch
import triton
import triton.language as tl

from fastattn.kernels.sampling.config import SampleConfig, chip_of, select_sample_config
from fastattn.kernels.sampling.join import TILE_FLOATS, TILE_INTS, join_tiles
from fastattn.kernels.sampling.logits import (
    Processing,
    key_of,
    load_setting,
    processed_scores,
    relative_weight,
    tile_words,
    tokens_of,
)
from fastattn.kernels.sampling.noise import group_noise
from fastattn.kernels.sampling.operands import Sampling, setting, table
from fastattn.kernels.sampling.search import (
    EMPTY_KEY,
    NO_TOKEN,
    best_of,
)

# As in `fastattn.sampling.params`.
TINY_TEMPERATURE = tl.constexpr(1e-10)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _choose_candidates(key, count, needed, CAPACITY: tl.constexpr):
    """The lowest key such that between `needed` and CAPACITY of a tile's keys are at least it.

    Where ties leave no such key, the first above the tied one: fewer are then kept.
    """
    low = tl.cast(EMPTY_KEY + 1, tl.int64)
    high = tl.max(key).to(tl.int64)
    while (count > CAPACITY) & (low < high):
        middle = (low + high + 1) >> 1
        above = tl.sum((key >= middle.to(tl.int32)).to(tl.int32))
        enough = above >= needed
        low = tl.where(enough, middle, low)
        count = tl.where(enough, above, count)
        high = tl.where(enough, high, middle - 1)
    return tl.where(count > CAPACITY, low + 1, low).to(tl.int32)


@triton.jit
def _store_candidates(candidates, offsets, key, x, offset, cut, CAPACITY: tl.constexpr):
    """Writes what is kept of a tile, and after it the first of those just below the cut.

    The latter fill up what ties have left empty, lowest tokens first, for those who ask for the
    most likely tokens. Returns how many are above the cut, and how many were written.
    """
    kept = key >= cut
    place = _places(kept)
    tl.store(candidates + place, x, mask=kept)
    tl.store(offsets + place, offset, mask=kept)
    count = tl.sum(kept.to(tl.int32))
    below = tl.max(tl.where(kept, EMPTY_KEY, key))
    tied = (key == below) & (below > EMPTY_KEY)
    place = count + _places(tied)
    tied = tied & (place < CAPACITY)
    tl.store(candidates + place, x, mask=tied)
    tl.store(offsets + place, offset, mask=tied)
    return count + tl.sum(tied.to(tl.int32))


@triton.jit
def _places(chosen):
    """Consecutive numbers, from 0, for the chosen elements of a tile, in the order of tokens."""
    flags = chosen.to(tl.int32)
    in_group = tl.sum(flags, 1)
    before = tl.cumsum(in_group, 0) - in_group
    return before[:, None] + tl.cumsum(flags, 1) - 1


@triton.jit
def _finite(number):
    """NaN as 0, and infinities as the largest numbers."""
    number = tl.where(number == number, number, 0.0)
    return tl.minimum(tl.maximum(number, -LARGEST_FLOAT), LARGEST_FLOAT)


@triton.jit(do_not_specialize=["seed"])
def _sample_kernel(
    logits,
    seen,
    counts,
    bias,
    allowed,
    temperature,
    top_k,
    top_p,
    min_p,
    min_keep,
    repetition,
    presence,
    frequency,
    seeds,
    seed,
    state_seen,
    state_counts,
    steps,
    candidates,
    offsets,
    tile_floats,
    tile_ints,
    counters,
    tokens,
    logprobs,
    top_tokens,
    top_logprobs,
    vocab_size,
    num_tiles,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILES: tl.constexpr,
    TOP_N: tl.constexpr,
    JOINT: tl.constexpr,
):
    tile = tl.program_id(0) % num_tiles
    row = tl.program_id(0) // num_tiles
    # Tensors come as they are: what is out of range is brought into it here.
    heat = load_setting(temperature, row)
    heat = tl.where(heat >= TINY_TEMPERATURE, tl.minimum(heat, LARGEST_FLOAT), 0.0)
    penalty = load_setting(repetition, row)
    penalty = tl.where(penalty > 0, tl.minimum(penalty, LARGEST_FLOAT), 1.0)
    processing = Processing(
        seen,
        counts,
        bias,
        allowed,
        penalty,
        _finite(load_setting(presence, row)),
        _finite(load_setting(frequency, row)),
        heat,
    )
    k = load_setting(top_k, row)
    p = load_setting(top_p, row)
    p = tl.where(p < 1.0, tl.maximum(p, 0.0), 1.0)
    least_ratio = load_setting(min_p, row)
    least_ratio = tl.where(least_ratio > 0, tl.minimum(least_ratio, 1.0), 0.0)
    keep = tl.maximum(load_setting(min_keep, row), 1.0)
    uses_k = (k > 0) & (k < vocab_size)
    k = tl.where(uses_k, tl.maximum(k, keep), vocab_size)
    filtered = (heat > 0) & (uses_k | (p < 1.0) | (least_ratio > 0))
    noise_key = tl.cast(seed, tl.int64)
    if seeds is not None:
        noise_key = tl.load(seeds + row)
    step = tl.zeros([], tl.int64)
    if steps is not None:
        step = tl.load(steps + row)

    words = tile_words(tile, num_tiles, BLOCK)
    token = tokens_of(words)
    x = processed_scores(logits, processing, row, words, vocab_size)
    key = key_of(x)
    bad = tl.max((x != x).to(tl.int32))
    largest = tl.max(x)
    finite = tl.sum((key > EMPTY_KEY).to(tl.int32))
    mass = tl.sum(tl.where(key > EMPTY_KEY, relative_weight(x, largest), 0.0))
    place = row * num_tiles + tile
    best_score = tl.cast(-float("inf"), tl.float32)
    best_token = tl.cast(NO_TOKEN, tl.int32)
    cut = tl.cast(EMPTY_KEY + 1, tl.int32)
    count = tl.zeros([], tl.int32)
    if filtered | (TOP_N > 0):
        needed = tl.minimum(tl.maximum(k, TOP_N), CAPACITY)
        needed = tl.where(uses_k, needed, CAPACITY // 2).to(tl.int32)
        cut = _choose_candidates(key, finite, needed, CAPACITY)
        base = tl.cast(place, tl.int64) * CAPACITY
        offset = tokens_of(tl.arange(0, BLOCK // 32)).to(tl.int16)
        count = _store_candidates(candidates + base, offsets + base, key, x, offset, cut, CAPACITY)
    if not filtered:
        score = x
        if heat > 0:
            score += group_noise(noise_key, step, words)
        best_score, best_token = best_of(score, token)
    floats = tile_floats + place * TILE_FLOATS
    tl.store(floats, largest)
    tl.store(floats + 1, mass)
    tl.store(floats + 2, best_score)
    ints = tile_ints + place * TILE_INTS
    tl.store(ints, cut)
    tl.store(ints + 1, count)
    tl.store(ints + 2, finite)
    tl.store(ints + 3, best_token)
    tl.store(ints + 4, bad)

    # The program that finishes the row last goes on with it: which one that is changes nothing.
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == num_tiles - 1:
        tl.store(counters + row, 0)
        join_tiles(
            row,
            logits,
            processing,
            filtered,
            heat,
            k,
            p,
            least_ratio,
            keep,
            noise_key,
            step,
            state_seen,
            state_counts,
            steps,
            candidates,
            offsets,
            tile_floats,
            tile_ints,
            tokens,
            logprobs,
            top_tokens,
            top_logprobs,
            vocab_size,
            num_tiles,
            BLOCK,
            CAPACITY,
            TILES,
            TOP_N,
            JOINT,
        )


def launch_sample(
    logits: torch.Tensor,
    sampling: Sampling,
    tokens: torch.Tensor,
    counters: torch.Tensor,
    *,
    logprobs: torch.Tensor | None = None,
    top_tokens: torch.Tensor | None = None,
    top_logprobs: torch.Tensor | None = None,
    config: SampleConfig | None = None,
) -> None:
    """Draws a token for each row of `logits` (batch, vocab_size), and updates the state.

    `tokens` is int64 (batch,); -1 marks a row that holds NaN or nothing to draw. `logprobs` is
    float32 (batch,), `top_tokens` int64 and `top_logprobs` float32 (batch, n): of the distribution
    that is drawn from (at temperature 0, of softmax over the processed scores). `counters` are
    `batch` int32 zeros, and zeros again afterwards. Arguments are taken as valid: the callers check
    them.

    One launch. A call reads the logits once, a bit a token of each bitmask in use, and what the
    tiles keep: at most `config.capacity` scores and offsets a tile, 6 bytes each. A row that is
    drawn from more tokens than that is read again, about 32 times for each threshold.
    """
    batch, vocab_size = logits.shape
    if batch == 0:
        return
    top_n = 0 if top_tokens is None else top_tokens.shape[1]
    if config is None:
        config = select_sample_config(chip_of(logits.device), vocab_size, top_n, batch)
    num_tiles = config.num_tiles(vocab_size)
    places = batch * num_tiles
    candidates, offsets, tile_floats, tile_ints = (
        torch.empty(places * entries, dtype=dtype, device=logits.device)
        for entries, dtype in (
            (config.capacity, torch.float32),
            (config.capacity, torch.int16),
            (TILE_FLOATS.value, torch.float32),
            (TILE_INTS.value, torch.int32),
        )
    )
    seeds = sampling.seed if isinstance(sampling.seed, torch.Tensor) else None
    _sample_kernel[(places,)](
        table(logits),
        table(sampling.seen if sampling.reads_seen else None),
        table(sampling.counts if sampling.reads_counts else None),
        table(sampling.bias),
        table(sampling.allowed),
        setting(sampling.temperature),
        setting(sampling.top_k),
        setting(sampling.top_p),
        setting(sampling.min_p),
        setting(sampling.min_tokens_to_keep),
        setting(sampling.repetition_penalty),
        setting(sampling.presence_penalty),
        setting(sampling.frequency_penalty),
        seeds,
        0 if seeds is not None else sampling.seed,
        table(sampling.seen),
        table(sampling.counts),
        sampling.step,
        candidates,
        offsets,
        tile_floats,
        tile_ints,
        counters,
        tokens,
        logprobs,
        top_tokens,
        top_logprobs,
        vocab_size,
        num_tiles,
        BLOCK=config.block,
        CAPACITY=config.capacity,
        TILES=1 << (num_tiles - 1).bit_length(),
        TOP_N=top_n,
        JOINT=sampling.joint,
        num_warps=config.num_warps,
    )
