"""Cuts by what a row's distribution looks like: typical, epsilon and eta sampling.

    sample(epsilon_filter(logits, 3e-4), params)

Each takes scores (..., vocab_size) and returns them with -inf where they are cut, equal to Hugging
Face's TypicalLogitsWarper, EpsilonLogitsWarper and EtaLogitsWarper. They are plain torch: seldom
used beside top-k, top-p and min-p, which `sample` does in its one read. Hugging Face applies them
after those; here they come first, or with the others as the `warp` of `speculative_verify`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.sampling.arguments import check_count, check_scores, per_row
from fastattn.sampling.statistics import wide_dtype


def typical_filter(
    scores: Tensor, mass: float | Tensor = 0.9, *, min_tokens_to_keep: int = 1
) -> Tensor:
    """Keeps the tokens whose surprise is closest to the entropy, until they hold `mass`.

    Locally typical sampling (Meister et al., arXiv:2202.00666): in order of |-log p - entropy|, up
    to and with the token that brings their probability to `mass`, and all tied with it.

    Args:
        scores: (..., vocab_size), any floating dtype; the computation is float32 (float64).
        mass: greater than 0, less than 1: a number, or a tensor (...) of one a row.
        min_tokens_to_keep: so many of the most typical stay at least.

    Returns:
        Scores in a new tensor of the same shape and dtype, -inf where cut.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    wide = _check("scores", scores, min_tokens_to_keep)
    rows, device = scores.shape[:-1], scores.device
    bound = per_row("mass", mass, rows, device, lowest=0.0, highest=1.0, open_ends=True)
    log_p = torch.log_softmax(wide, -1)
    distance = (-log_p - _entropy(log_p)).abs()
    # The order is by distance, of which no top-k is known in advance: this one has to sort.
    ordered, order = distance.sort(-1)
    cumulative = log_p.exp().gather(-1, order).cumsum(-1)
    last = (cumulative < bound).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    cut = ordered > ordered.gather(-1, last)
    cut[..., :min_tokens_to_keep] = False
    return scores.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)


def epsilon_filter(
    scores: Tensor, epsilon: float | Tensor, *, min_tokens_to_keep: int = 1
) -> Tensor:
    """Keeps the tokens of probability at least `epsilon` (Hewitt et al., arXiv:2210.15191).

    Args:
        scores: (..., vocab_size), any floating dtype; the computation is float32 (float64).
        epsilon: greater than 0, less than 1: a number, or a tensor (...) of one a row. The paper
            uses 3e-4 to 9e-4.
        min_tokens_to_keep: so many of the most likely stay at least, with all tied with them.

    Returns:
        Scores in a new tensor of the same shape and dtype, -inf where cut.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    wide = _check("scores", scores, min_tokens_to_keep)
    rows, device = scores.shape[:-1], scores.device
    bound = per_row("epsilon", epsilon, rows, device, lowest=0.0, highest=1.0, open_ends=True)
    return _cut_below(scores, wide.softmax(-1), bound, min_tokens_to_keep)


def eta_filter(scores: Tensor, epsilon: float | Tensor, *, min_tokens_to_keep: int = 1) -> Tensor:
    """Keeps the tokens of probability at least min(epsilon, sqrt(epsilon) * exp(-entropy)).

    Eta sampling (Hewitt et al., arXiv:2210.15191): where a row is flat, less likely tokens stay.

    Args:
        scores: (..., vocab_size), any floating dtype; the computation is float32 (float64).
        epsilon: greater than 0, less than 1: a number, or a tensor (...) of one a row. The paper
            uses 3e-4 to 4e-3.
        min_tokens_to_keep: so many of the most likely stay at least, with all tied with them.

    Returns:
        Scores in a new tensor of the same shape and dtype, -inf where cut.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    wide = _check("scores", scores, min_tokens_to_keep)
    rows, device = scores.shape[:-1], scores.device
    bound = per_row("epsilon", epsilon, rows, device, lowest=0.0, highest=1.0, open_ends=True)
    log_p = torch.log_softmax(wide, -1)
    flat = (-_entropy(log_p)).exp()
    eta = (flat * bound**0.5).clamp(max=bound)
    return _cut_below(scores, log_p.exp(), eta, min_tokens_to_keep)


def _check(name: str, scores: Tensor, min_tokens_to_keep: int) -> Tensor:
    check_scores(name, scores)
    check_count("min_tokens_to_keep", min_tokens_to_keep)
    return scores.to(wide_dtype(scores))


def _entropy(log_p: Tensor) -> Tensor:
    """Of log-probabilities that are there already: `statistics.entropy` would compute them anew."""
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1, keepdim=True)


def _cut_below(
    scores: Tensor, probabilities: Tensor, bound: float | Tensor, min_tokens_to_keep: int
) -> Tensor:
    kept = scores.topk(min(min_tokens_to_keep, scores.shape[-1]), -1).values[..., -1:]
    return scores.masked_fill((probabilities < bound) & (scores < kept), -math.inf)
