"""From the tiles of a row to its token: thresholds, the draw, log-probabilities, the state.

Top-k, top-p and min-p are thresholds on the score, found among the candidates that the tiles kept,
and the token is argmax(score + Gumbel noise) of those above them. That is exact where no threshold
lies below what some tile has cut away, which every row checks. Where one does, the row's logits are
searched instead (`refine.py`).
"""

import triton
import triton.language as tl

from fastattn.kernels.sampling.logits import (
    dealt_word,
    float_of,
    key_of,
    processed_scores,
    relative_weight,
    table_row,
    tokens_of,
)
from fastattn.kernels.sampling.noise import token_noise
from fastattn.kernels.sampling.refine import refine
from fastattn.kernels.sampling.search import (
    EMPTY_KEY,
    NO_TOKEN,
    best_of,
    highest_threshold,
    ratio_threshold,
)

ERROR_TOKEN = tl.constexpr(-1)
# What a tile says of itself: its maximum, mass and best score; its cut, how many candidates and how
# many scores above -inf it has, its best token, whether it holds NaN.
TILE_FLOATS = tl.constexpr(3)
TILE_INTS = tl.constexpr(5)


@triton.jit
def join_tiles(
    row,
    logits,
    processing,
    filtered,
    heat,
    k,
    p,
    least_ratio,
    keep,
    seed,
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
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILES: tl.constexpr,
    TOP_N: tl.constexpr,
    JOINT: tl.constexpr,
):
    """What the program that finishes a row last does."""
    number = tl.arange(0, TILES)
    inside = number < num_tiles
    floats = tile_floats + (row * num_tiles + number) * TILE_FLOATS
    ints = tile_ints + (row * num_tiles + number) * TILE_INTS
    # Others have just written them: not from this multiprocessor's own cache.
    maxima = tl.load(floats, mask=inside, other=-float("inf"), cache_modifier=".cg")
    masses = tl.load(floats + 1, mask=inside, other=0.0, cache_modifier=".cg")
    cuts = tl.load(ints, mask=inside, other=EMPTY_KEY + 1, cache_modifier=".cg")
    written = tl.load(ints + 1, mask=inside, other=0, cache_modifier=".cg")
    finite = tl.sum(tl.load(ints + 2, mask=inside, other=0, cache_modifier=".cg"))
    bad = tl.max(tl.load(ints + 4, mask=inside, other=0, cache_modifier=".cg"))
    largest = tl.max(maxima)
    mass = tl.sum(tl.where(masses > 0, masses * relative_weight(maxima, largest), 0.0))

    slot = tl.arange(0, CAPACITY)
    base = (row * num_tiles + number).to(tl.int64)[:, None] * CAPACITY + slot[None, :]
    valid = slot[None, :] < written[:, None]
    x = tl.load(candidates + base, mask=valid, other=-float("inf"), cache_modifier=".cg")
    token = tl.load(offsets + base, mask=valid, other=0, cache_modifier=".cg").to(tl.int32)
    token = dealt_word(number[:, None], token // 32, num_tiles) * 32 + token % 32
    token = tl.where(valid, token, NO_TOKEN)
    key = key_of(x)
    weight = tl.where(valid, relative_weight(x, largest), 0.0)
    threshold = tl.cast(EMPTY_KEY + 1, tl.int64)
    best_token = tl.cast(NO_TOKEN, tl.int32)
    if filtered:
        # What lies below the highest cut may be incomplete, and counts for nothing here.
        cut = tl.max(cuts)
        complete = valid & (key >= cut)
        lowest = threshold
        highest = key_of(largest).to(tl.int64)
        ones = tl.where(complete, 1.0, 0.0)
        weight_above = tl.where(complete, weight, 0.0)
        exact = bad == bad
        if k < finite:
            threshold = highest_threshold(key, ones, k, lowest, highest)
            exact = threshold >= cut
        whole = mass
        if not JOINT:
            if k < finite:
                above = key >= threshold.to(tl.int32)
                whole = tl.sum(tl.where(above, weight_above, 0.0))
        by_mass = lowest
        if p < 1.0:
            by_mass = highest_threshold(key, weight_above, p * whole, lowest, highest)
        by_ratio = lowest
        if least_ratio > 0:
            by_ratio = ratio_threshold(least_ratio, largest, lowest, highest)
        wanted = tl.maximum(by_mass, by_ratio)
        if (keep > 1) & (wanted > lowest):
            by_count = highest_threshold(key, ones, keep, lowest, highest)
            wanted = tl.minimum(wanted, by_count)
        threshold = tl.maximum(threshold, wanted)
        # Exact if no tile has cut away what is not below the threshold.
        if (exact & (threshold >= cut)) | (bad != 0):
            survives = valid & (key >= threshold.to(tl.int32))
            noise = token_noise(seed, step, tl.where(valid, token, 0))
            score = tl.where(survives, x + noise, -float("inf"))
            _, best_token = best_of(score, token)
            mass = tl.sum(tl.where(survives, weight, 0.0))
        else:
            best_token, mass, threshold = refine(
                logits,
                processing,
                row,
                seed,
                step,
                k,
                p,
                least_ratio,
                keep,
                largest,
                mass,
                finite,
                vocab_size,
                num_tiles,
                BLOCK,
                JOINT,
            )
    else:
        scores = tl.load(floats + 2, mask=inside, other=-float("inf"), cache_modifier=".cg")
        drawn = tl.load(ints + 3, mask=inside, other=NO_TOKEN, cache_modifier=".cg")
        _, best_token = best_of(scores, drawn)
    wrong = (bad != 0) | (finite == 0)
    # Greedy rows, and those with a score of +inf, have one winner, and all of the mass is its.
    alone = (heat <= 0) | (largest == float("inf"))
    tl.store(tokens + row, tl.where(wrong, ERROR_TOKEN, best_token).to(tl.int64))
    if steps is not None:
        tl.store(steps + row, step + 1)
    if not wrong:
        if state_seen.ptr is not None:
            word = table_row(state_seen, row) + best_token // 32
            tl.store(word, tl.load(word) | (1 << best_token % 32))
        if state_counts.ptr is not None:
            drawn_before = table_row(state_counts, row) + best_token
            tl.store(drawn_before, tl.load(drawn_before) + 1)
    if logprobs is not None:
        # The score of the token again, from the 32 tokens that it is one of.
        word = tl.where(wrong, 0, best_token) // 32 + tl.arange(0, 1)
        near = processed_scores(logits, processing, row, word, vocab_size)
        drawn_x = tl.sum(tl.where(tokens_of(word) == best_token, near, 0.0))
        value = tl.where(alone, 0.0, drawn_x - largest - tl.log(mass))
        tl.store(logprobs + row, tl.where(wrong, float("nan"), value))
    for rank in tl.static_range(TOP_N):
        best_key = tl.max(tl.where(valid, key, EMPTY_KEY))
        chosen = tl.min(tl.where(valid & (key == best_key), token, NO_TOKEN))
        found = tl.where(alone, chosen == best_token, best_key >= threshold) & (not wrong)
        likely_x = float_of(best_key)
        value = tl.where(alone, 0.0, likely_x - largest - tl.log(mass))
        value = tl.where(found, value, -float("inf"))
        tl.store(top_tokens + row * TOP_N + rank, tl.where(found, chosen, -1).to(tl.int64))
        tl.store(top_logprobs + row * TOP_N + rank, tl.where(wrong, float("nan"), value))
        valid = valid & (token != chosen)
