"""Speculative sampling: which tokens of a draft the target model keeps, exactly.

A cheap model, or a look-up in the text so far, drafts a few tokens; the target model is run once on
all of them; and what is emitted is distributed as if the target had sampled token by token:
Leviathan et al., arXiv:2211.17192, and Chen et al., arXiv:2302.01318.

Plain torch is enough. Of the K + 1 distributions only the drafted tokens' probabilities are
needed, which are K log-sum-exps, and one whole distribution a row, where the first token fails.
Nothing here makes the host wait, so a decoding loop with it can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.philox import WORD, philox
from fastattn.sampling.arguments import check_scores, check_token_range, check_tokens, per_row
from fastattn.sampling.params import TINY_TEMPERATURE
from fastattn.sampling.statistics import log_probabilities, wide_dtype
from fastattn.validation import check_lengths, check_tensor, describe

# The last word of Philox's counter. `sample` has 0 and 1: drafts drawn with the same seed and step
# are then independent of what decides on them, without which the result would not be exact.
_STREAM = 2
# Bits of a uniform: (word + 0.5) * 2**-52 is a float64 without rounding.
_UNIFORM_BITS = 52


class Verified(NamedTuple):
    """What `speculative_verify` emits.

    Attributes:
        num_accepted: int64 (batch,), how many drafted tokens are kept, 0..K.
        tokens: int64 (batch, K + 1): those, then one more from the target, then -1. The row's step
            goes on by num_accepted + 1. The token past the accepted ones is -1 too if the target's
            scores there hold a NaN or +inf, or nothing but -inf: an error, as for `sample`.
    """

    num_accepted: Tensor
    tokens: Tensor


def speculative_verify(
    draft_tokens: Tensor,
    target_logits: Tensor,
    *,
    draft_probs: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_lengths: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    warp: Callable[[Tensor], Tensor] | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
) -> Verified:
    """Keeps a prefix of each draft, and draws the token after it, as the target would have.

        keep token x with probability min(1, p(x) / q(x)), up to the first that is not kept
        draw in its place from max(p - q, 0) over its sum, or after a whole draft from p

    p is what the target gives, q what the draft was drawn from. Without `draft_probs` or
    `draft_logits` the draft is taken as certain (n-gram look-up, or a greedy draft model):
    q(x) = 1, so x is kept with probability p(x), and otherwise anything but x is drawn.

    Args:
        draft_tokens: int32 or int64 (batch, K), K >= 0.
        target_logits: (batch, K + 1, vocab_size), any floating dtype and strides: position i is
            what the target says after i drafted tokens.
        draft_probs: floating (batch, K, vocab_size), the very probabilities that each drafted token
            was drawn from, after temperature and cuts, with sum 1.
        draft_logits: instead of draft_probs: scores whose softmax those are, -inf where cut.
            `temperature` and `warp` do not apply to them.
        draft_lengths: int32 or int64 (batch,), how many of the K are drafted; None: all. What lies
            behind may hold anything.
        temperature: of the target, a number or a floating tensor (batch,). Below 1e-10 the row is
            greedy: p is 1 for the largest logit, of lowest id on a tie, and 0 for the others.
        warp: further cuts of the target: takes scores (batch * (K + 1), vocab_size), float32
            (float64) and divided by temperature, and returns them with -inf where cut, for instance
            `epsilon_filter`. Target probabilities that are at hand go in as their logarithm.
        seed: an int, or int64 (batch,), the key of each row's noise; None draws one a row from
            torch's generator.
        step: an int, or int64 (batch,): the step of the first token. What happens to a row follows
            from its inputs, seed and step alone. The noise is not that of `sample`, so drafts may
            be drawn with the same seed and step.

    Returns:
        Verified(num_accepted, tokens). Computed in float32 (float64), from uniforms of 52 bits;
        the token after the draft is drawn by sums of integers, the same in any order, in which
        probabilities below 2**-(61 - log2(vocab_size)) of the largest count as 0 (2**-43 for 2**18
        tokens).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. Values of
            tokens and lengths on a GPU are looked at only within `fastattn.testing.debug()`; there
            a drafted token outside of the vocabulary is not kept.
    """
    _check(draft_tokens, target_logits, draft_probs, draft_logits, draft_lengths)
    batch, count = draft_tokens.shape
    device = target_logits.device
    divisor = per_row("temperature", temperature, (batch,), device, lowest=0.0)
    draft = draft_tokens.long()
    is_draft = torch.ones_like(draft, dtype=torch.bool)
    if draft_lengths is not None:
        is_draft = torch.arange(count, device=device) < draft_lengths[:, None]
    check_token_range("draft_tokens", draft, is_draft, target_logits.shape[-1])
    scores, greedy = _target_scores(target_logits, divisor, warp)
    keep_noise, draw_noise = _uniforms(seed, step, batch, count, device)

    best = None if greedy is False else _largest(scores)
    kept = torch.zeros_like(is_draft)
    if greedy is not True:
        log_q = _draft_log_probability(draft, draft_probs, draft_logits)
        # p >= q passes whatever the noise, and a NaN never does.
        kept = keep_noise.log() < _log_probability(scores[:, :count], draft) - log_q
    if best is not None:
        kept = _choose(greedy, draft == best[:, :count], kept)
    num_accepted = (kept & is_draft).long().cumprod(1).sum(1)

    at = num_accepted[:, None]
    token = torch.zeros_like(at) if best is None else best.gather(1, at)
    if greedy is not True:
        rejected = _pad(is_draft).gather(1, at)
        p = _widen(_at(scores, at))
        if count and draft_probs is not None:
            rest = _residual(p.softmax(-1), _at(draft_probs, at), rejected)
        elif count and draft_logits is not None:
            rest = _residual(p.softmax(-1), _widen(_at(draft_logits, at)).softmax(-1), rejected)
        else:
            rest = _without(p, _pad(draft).gather(1, at), rejected)
        token = _choose(greedy, token, _draw(rest, draw_noise.gather(1, at)))
    place = torch.arange(count + 1, device=device)
    tokens = torch.where(place < at, _pad(draft), torch.where(place == at, token, -1))
    return Verified(num_accepted, tokens)


def _target_scores(
    logits: Tensor, temperature: float | Tensor, warp: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, bool | Tensor]:
    """The target's scores (batch, K + 1, vocab_size), and which rows are greedy.

    Where all are, or none is, that is a Python bool, and half of the work is left out.
    """
    greedy: bool | Tensor
    if isinstance(temperature, Tensor):
        greedy = temperature < TINY_TEMPERATURE  # (batch, 1)
        scores = _widen(logits) / temperature.masked_fill(greedy, 1)[..., None].to(
            wide_dtype(logits)
        )
    else:
        greedy = temperature < TINY_TEMPERATURE
        is_one = greedy or temperature == 1
        scores = logits if is_one else _widen(logits) / temperature
    if warp is not None:
        shape = scores.shape
        scores = warp(_widen(scores).flatten(0, 1))
        check_tensor("the result of warp", scores)
        if scores.shape != (shape[0] * shape[1], shape[2]):
            raise ValueError(
                f"the result of warp must have shape {(shape[0] * shape[1], shape[2])}, "
                f"got {describe(scores)}"
            )
        scores = scores.view(shape)
    return scores, greedy


def _uniforms(
    seed: int | Tensor | None, step: int | Tensor, batch: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Uniforms in (0, 1), float64: to keep or not (batch, K), and to draw with (batch, K + 1).

    Those of position i are of the row's step + i, so they do not depend on K.
    """
    if seed is None:
        seed = torch.randint(0, 2**63 - 1, (batch,), dtype=torch.int64, device=device)
    keys = _per_row_integer("seed", seed, batch, device)
    steps = _per_row_integer("step", step, batch, device) + torch.arange(count + 1, device=device)
    zero = torch.zeros_like(steps)
    words = philox(keys, (zero, steps & WORD, (steps >> 32) & WORD, zero + _STREAM))
    first, second = (
        (((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-_UNIFORM_BITS
        for high, low in (words[:2], words[2:])
    )
    return first[:, :count], second


def _residual(p: Tensor, q: Tensor, rejected: Tensor) -> Tensor:
    """Weights (batch, vocab_size): max(p - q, 0) where a token was rejected, else p."""
    rest = torch.where(rejected, (p - q.to(p.dtype)).clamp(min=0), p)
    # p and q that are equal up to rounding may leave nothing, and then are as good as equal.
    return torch.where((rest > 0).any(-1, keepdim=True), rest, p)


def _without(scores: Tensor, token: Tensor, rejected: Tensor) -> Tensor:
    """The same for a draft that was certain: p without the token, where that was rejected."""
    tokens = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(rejected & (tokens == token), -math.inf).softmax(-1)


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """A token of each row (batch, 1) by weight, or -1 where these are NaN or all 0.

    By inversion, in integers: their sums are exact, so neither the device nor the order in which a
    parallel sum runs can change the token. The largest weight becomes 2**(61 - log2(vocab_size)),
    so the sum stays below 2**62.
    """
    bits = 61 - (weights.shape[-1] - 1).bit_length()
    largest = weights.amax(-1, keepdim=True)
    valid = (largest > 0) & (largest < math.inf)
    # Exact but for the quotient, which makes of the largest at most one more than 2**bits.
    sums = (weights.double() * (2.0**bits / largest.double())).long().cumsum(-1)
    total = sums[:, -1:]
    # float64 may round the product up to the sum itself.
    goal = torch.minimum((uniform * total.double()).long(), total - 1)
    return torch.where(valid, torch.searchsorted(sums, goal, right=True), -1)


def _largest(scores: Tensor) -> Tensor:
    """The token of the largest score, lowest on a tie; -1 where that is NaN or -inf."""
    token = scores.argmax(-1, keepdim=True)
    score = scores.gather(-1, token)
    return torch.where(score > -math.inf, token, -1)[..., 0]


def _draft_log_probability(
    draft: Tensor, probs: Tensor | None, logits: Tensor | None
) -> float | Tensor:
    """log q of the drafted tokens; 0 for a draft that was certain."""
    if logits is not None:
        return _log_probability(logits, draft)
    if probs is None:
        return 0.0
    index = draft.clamp(0, probs.shape[-1] - 1)[..., None]
    return _widen(probs.gather(-1, index)[..., 0]).log()


def _log_probability(scores: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(scores) of tokens; -inf for one outside of the vocabulary."""
    inside = (tokens >= 0) & (tokens < scores.shape[-1])
    return log_probabilities(scores, tokens.where(inside, 0)).masked_fill(~inside, -math.inf)


def _at(values: Tensor, position: Tensor) -> Tensor:
    """The vector of each row (batch, vocab_size) at its position (batch, 1), or at the last."""
    index = position.clamp(max=values.shape[1] - 1)
    return values.gather(1, index[..., None].expand(-1, 1, values.shape[-1]))[:, 0]


def _choose(condition: bool | Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """torch.where, without a condition on the device where it is the same for all."""
    if isinstance(condition, bool):
        return chosen if condition else other
    return torch.where(condition, chosen, other)


def _pad(values: Tensor) -> Tensor:
    """One more column, of 0."""
    return torch.cat([values, values.new_zeros(values.shape[0], 1)], 1)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(wide_dtype(tensor))


def _per_row_integer(name: str, value: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """An int, or an int64 tensor of one a row, as (batch, 1)."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int or an int64 tensor, got {describe(value)}")
        check_tokens(name, value, (batch,), device)
        return value[:, None]
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits with sign, got {value}")
    return torch.full((batch, 1), value, dtype=torch.int64, device=device)


def _check(
    draft_tokens: Tensor,
    target_logits: Tensor,
    draft_probs: Tensor | None,
    draft_logits: Tensor | None,
    draft_lengths: Tensor | None,
) -> None:
    check_scores("target_logits", target_logits, ("batch", "K + 1", "vocab_size"))
    batch, positions, vocab_size = target_logits.shape
    if positions < 1:
        raise ValueError(
            f"target_logits must have K + 1 >= 1 positions, got {describe(target_logits)}"
        )
    device = target_logits.device
    check_tokens("draft_tokens", draft_tokens, (batch, positions - 1), device)
    if draft_probs is not None and draft_logits is not None:
        raise ValueError("draft_logits must be None where draft_probs are given, got both")
    for name, value in (("draft_probs", draft_probs), ("draft_logits", draft_logits)):
        if value is None:
            continue
        check_scores(name, value)
        if value.shape != (batch, positions - 1, vocab_size) or value.device != device:
            raise ValueError(
                f"{name} must have shape {(batch, positions - 1, vocab_size)} and be on {device}, "
                f"got {describe(value)}"
            )
    if draft_lengths is not None:
        check_lengths("draft_lengths", draft_lengths, batch, positions - 1, device)
