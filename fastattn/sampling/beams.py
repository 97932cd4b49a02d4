"""One step of beam search: the best continuations of every beam."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.sampling.arguments import check_count, check_flags, check_scores
from fastattn.sampling.statistics import softmax_moments, wide_dtype
from fastattn.validation import check_tensor, describe


class BeamStep(NamedTuple):
    """The best continuations of a batch, best first; each (batch, num_candidates).

    Attributes:
        scores: float32 (float64 where an input is), with the log-probability of the new token.
        tokens: int64, the new token.
        beams: int64 in 0..num_beams - 1, the beam that it continues.
    """

    scores: Tensor
    tokens: Tensor
    beams: Tensor


def beam_step(
    logits: Tensor,
    scores: Tensor,
    *,
    num_candidates: int | None = None,
    finished: Tensor | None = None,
    pad_token: int | None = None,
) -> BeamStep:
    """log-softmax, plus the beams' scores, and the best of all that continues any of them.

    What `generate(num_beams=...)` of Hugging Face does in each step, up to the order of equal
    scores, which is unspecified as in `torch.topk`. Length penalty and early stopping are the
    caller's: candidates that end a sequence are taken out of the list, and as 2 * num_beams come
    back, at least num_beams remain to go on with where there is one end token.

    Neither the log-probabilities nor their sums with the scores are stored for the vocabulary:
    log-softmax keeps the order within a beam, so the best of all are among the best of each.
    torch's topk and a chunked log-sum-exp each read the logits, and what follows is num_beams *
    num_candidates numbers: a kernel of our own would save one read of logits that a model has
    just spent far more on.

    Args:
        logits: (batch * num_beams, vocab_size) or (batch, num_beams, vocab_size), any floating
            dtype and strides. Tokens at -inf never continue a beam while there are others.
        scores: floating (batch, num_beams), sums of log-probabilities. -inf is a beam that does not
            count: start with [0, -inf, -inf, ...], since all beams still are the same. Whatever
            the dtype of logits, keep these in float32.
        num_candidates: how many come back; default 2 * num_beams. Hugging Face takes
            max(2, 1 + number of end tokens) * num_beams.
        finished: bool (batch, num_beams): these beams are not continued, whatever their logits.
        pad_token: with it, a finished beam stays in the race as it is: its one continuation is this
            token, and its score does not change. Without it, it has none.

    Returns:
        BeamStep(scores, tokens, beams). Where fewer than num_candidates continuations are possible
        the last have score -inf. A NaN in a beam that goes on, or +inf, makes its scores NaN, which
        come first, as in torch.topk.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    logits = _check(logits, scores, num_candidates, finished, pad_token)
    num_beams, vocab_size = logits.shape[-2:]
    count = 2 * num_beams if num_candidates is None else num_candidates
    if count > num_beams * vocab_size:
        raise ValueError(
            f"num_candidates must be at most num_beams * vocab_size = {num_beams * vocab_size}, "
            f"got {count}"
        )
    values, tokens = logits.topk(min(count, vocab_size), dim=-1)
    moments = softmax_moments(logits)
    largest, log_sum = moments.maximum[..., None], moments.log_sum[..., None]
    log_p = (values.double() - largest - log_sum).masked_fill(largest == -math.inf, -math.inf)
    totals = log_p + scores[..., None].double()
    if finished is not None:
        totals = totals.masked_fill(finished[..., None], -math.inf)
        if pad_token is not None:
            first = torch.arange(totals.shape[-1], device=totals.device) == 0
            stays = finished[..., None] & first
            totals = torch.where(stays, scores[..., None].double(), totals)
            tokens = tokens.masked_fill(stays, pad_token)
    best, places = totals.flatten(1).topk(count, dim=-1)
    best = best.to(torch.promote_types(wide_dtype(logits), wide_dtype(scores)))
    return BeamStep(best, tokens.flatten(1).gather(1, places), places // totals.shape[-1])


def _check(
    logits: Tensor,
    scores: Tensor,
    num_candidates: int | None,
    finished: Tensor | None,
    pad_token: int | None,
) -> Tensor:
    """logits as (batch, num_beams, vocab_size), if everything is as `beam_step` says."""
    check_scores("logits", logits)
    check_tensor("scores", scores)
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores must have a floating dtype, got {describe(scores)}")
    if scores.dim() != 2 or scores.device != logits.device:
        raise ValueError(
            f"scores must have shape (batch, num_beams) and be on {logits.device}, "
            f"got {describe(scores)}"
        )
    batch, num_beams = scores.shape
    if logits.dim() == 2 and logits.shape[0] == batch * num_beams:
        logits = logits.unflatten(0, (batch, num_beams))
    if logits.shape[:-1] != scores.shape:
        raise ValueError(
            f"logits must have shape ({batch} * {num_beams}, vocab_size) or ({batch}, {num_beams}, "
            f"vocab_size) to fit scores, got {describe(logits)}"
        )
    if num_candidates is not None:
        check_count("num_candidates", num_candidates)
    if finished is not None:
        check_flags("finished", finished, scores.shape, logits.device)
    if pad_token is not None:
        check_count("pad_token", pad_token, lowest=0)
        if finished is None:
            raise ValueError(f"pad_token needs finished to say which beams are, got {pad_token}")
    return logits
