"""Contrastive decoding: what a large model likes and a small one does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.sampling.arguments import check_scores, per_row
from fastattn.sampling.statistics import wide_dtype
from fastattn.validation import describe


def contrastive_scores(
    expert_logits: Tensor,
    amateur_logits: Tensor,
    *,
    plausibility: float | Tensor = 0.1,
    amateur_weight: float | Tensor = 1.0,
    amateur_temperature: float | Tensor = 1.0,
) -> Tensor:
    """Scores of contrastive decoding (Li et al., arXiv:2210.15097), to sample from or to search by.

        log p_expert - amateur_weight * log p_amateur  if p_expert >= plausibility * max(p_expert)
        -inf                                           else

    The cut keeps the difference from favoring tokens that only the amateur finds even less likely
    than the expert. The paper's alpha is `plausibility`, its tau `amateur_temperature`, and its
    amateur_weight is 1; O'Brien and Lewis (arXiv:2309.09117) have beta = w / (1 - w) for a weight
    w below 1, up to a factor on the scores.

    Greedy: `sample(contrastive_scores(large, small), SamplingParams(temperature=0.0))`. Plain torch
    is enough: two reads and a write of the vocabulary beside two runs of models.

    Args:
        expert_logits: (..., vocab_size), any floating dtype.
        amateur_logits: the same shape, any floating dtype.
        plausibility: in 0..1, a number or a tensor (...) of one a row. 1 leaves only the expert's
            most likely tokens; 0 cuts nothing but what the expert excludes (-inf).
        amateur_weight: at least 0, as above, a number or a tensor (...). 0 leaves the expert's
            log-probabilities, whatever the amateur says.
        amateur_temperature: greater than 0, a number or a tensor (...): divides the amateur's
            logits.

    Returns:
        float32 (..., vocab_size), float64 where an input is. A token that is plausible and that the
        amateur excludes scores +inf. NaN in either row: NaN, or -inf throughout, so that `sample`
        reports the row. Differentiable.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    check_scores("expert_logits", expert_logits)
    check_scores("amateur_logits", amateur_logits)
    if amateur_logits.shape != expert_logits.shape or amateur_logits.device != expert_logits.device:
        raise ValueError(
            f"amateur_logits must be {describe(expert_logits)} up to dtype like expert_logits, "
            f"got {describe(amateur_logits)}"
        )
    rows, device = expert_logits.shape[:-1], expert_logits.device
    cut = per_row("plausibility", plausibility, rows, device, lowest=0.0, highest=1.0)
    weight = per_row("amateur_weight", amateur_weight, rows, device, lowest=0.0)
    temperature = per_row(
        "amateur_temperature", amateur_temperature, rows, device,
        lowest=0.0, highest=math.inf, open_ends=True,
    )  # fmt: skip

    dtype = torch.promote_types(wide_dtype(expert_logits), wide_dtype(amateur_logits))
    expert = expert_logits.to(dtype)
    # p / max(p) is exp(x - max): the cut needs no softmax. Only -inf is below the lowest number.
    log_cut = cut.log() if isinstance(cut, Tensor) else math.log(cut) if cut > 0 else -math.inf
    bound = (expert.detach().amax(-1, keepdim=True) + log_cut).clamp(min=torch.finfo(dtype).min)
    scores = torch.log_softmax(expert, -1)
    if isinstance(weight, Tensor) or weight > 0:
        amateur = amateur_logits.to(dtype)
        if isinstance(temperature, Tensor) or temperature != 1:
            amateur = amateur / temperature
        penalty = torch.log_softmax(amateur, -1)
        if isinstance(weight, Tensor):
            penalty = (penalty * weight).masked_fill(weight == 0, 0)  # 0 * -inf would be NaN
        elif weight != 1:
            penalty = penalty * weight
        scores = scores - penalty
    return torch.where(expert >= bound, scores, -math.inf)
