"""Contrastive scores, against the formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.sampling.contrastive import contrastive_scores
from fastattn.testing import assert_parity


def _formula(
    expert: Tensor, amateur: Tensor, alpha: Any, weight: Any, tau: Any, dtype: torch.dtype
) -> Tensor:
    """Li et al., equations 2 and 3, with probabilities and a set; alpha, weight, tau (rows, 1)."""
    p = expert.to(dtype).softmax(-1)
    head = p.double() >= alpha * p.double().amax(-1, keepdim=True)
    scores = p.log() - weight * (amateur.to(dtype) / tau).log_softmax(-1)
    return scores.masked_fill(~head, -math.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_papers_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    expert, amateur = (torch.randn(4, 3001, generator=generator).mul(3).to(dtype) for _ in "ea")
    default = contrastive_scores(expert, amateur)
    args = (expert, amateur, 0.1, 1.0, 1.0)
    assert default.dtype == torch.float32
    assert 4 < default.isfinite().sum() < 1000
    assert_parity(default, _formula(*args, torch.float32), _formula(*args, torch.float64))

    alpha = torch.tensor([0.0, 0.01, 0.5, 1.0])
    weight = torch.tensor([0.0, 0.5, 1.0, 2.0])
    tau = torch.tensor([0.5, 1.0, 1.5, 3.0])
    rows = contrastive_scores(
        expert, amateur, plausibility=alpha, amateur_weight=weight, amateur_temperature=tau
    )
    args = (expert, amateur, alpha[:, None], weight[:, None], tau[:, None])
    assert_parity(rows, _formula(*args, torch.float32), _formula(*args, torch.float64))
    assert rows[0].isfinite().all()
    assert torch.equal(rows[3].isfinite(), expert[3] == expert[3].amax())


def test_it_prefers_what_only_the_expert_knows() -> None:
    """Of two tokens that the expert finds equally likely, the one that the amateur does not."""
    expert = torch.tensor([[3.0, 3.0, 2.0, -9.0]])
    amateur = torch.tensor([[3.0, 0.0, 2.0, -90.0]])
    scores = contrastive_scores(expert, amateur)
    assert int(scores.argmax()) == 1
    assert scores[0, 3] == -math.inf  # implausible, however much less the amateur likes it


def test_excluded_tokens_and_errors() -> None:
    expert = torch.tensor([[1.0, 0.5, -math.inf, -math.inf]])
    amateur = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    for plausibility in (0.0, 0.3):
        scores = contrastive_scores(expert, amateur, plausibility=plausibility)
        assert scores[0].isfinite().tolist() == [True, False, False, False]
        assert scores[0, 1:].tolist() == [math.inf, -math.inf, -math.inf]
    ignored = contrastive_scores(expert, amateur, amateur_weight=0.0)
    assert torch.equal(ignored, expert.log_softmax(-1))
    bad = torch.tensor([[1.0, math.nan, 0.0, 0.0]])
    good = torch.zeros(1, 4)
    for scores in (contrastive_scores(bad, good), contrastive_scores(good, bad)):
        assert not (scores > -math.inf).any()  # NaN or -inf: nothing that could be drawn
    for weight in (0.0, torch.zeros(1)):
        assert torch.equal(
            contrastive_scores(good, bad, amateur_weight=weight), good.log_softmax(-1)
        )
        assert torch.equal(contrastive_scores(expert, amateur, amateur_weight=weight), ignored)


def test_shapes_gradient_and_compile() -> None:
    expert = torch.randn(2, 3, 40, requires_grad=True)
    amateur = torch.randn(2, 3, 40).half()
    scores = contrastive_scores(expert, amateur, amateur_weight=0.5)
    kept = scores > -math.inf
    assert kept.any(-1).all()
    (grad,) = torch.autograd.grad(scores[kept].sum(), expert)
    assert grad.isfinite().all() and grad.any()
    compiled = torch.compile(contrastive_scores, fullgraph=True, backend="eager")
    assert torch.equal(compiled(expert, amateur, amateur_weight=0.5), scores)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"amateur_logits": torch.zeros(2, 5)}, ValueError, "amateur_logits must be"),
        ({"expert_logits": torch.zeros(2, 4).int()}, TypeError, "expert_logits must have a float"),
        ({"plausibility": 1.5}, ValueError, r"plausibility must be in 0\.\.1, got 1.5"),
        ({"plausibility": torch.zeros(3)}, ValueError, r"plausibility must have shape \(2,\)"),
        ({"amateur_weight": -1}, ValueError, "amateur_weight must be finite and at least 0"),
        ({"amateur_weight": "1"}, TypeError, "amateur_weight must be a number or a tensor"),
        ({"amateur_temperature": 0.0}, ValueError, "amateur_temperature must be greater than 0"),
        (
            {"amateur_temperature": torch.tensor([1.0, math.nan])},
            ValueError,
            "amateur_temperature must be greater than 0 and less than inf, got nan",
        ),
    ],
)
def test_bad_arguments_are_named(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"expert_logits": torch.zeros(2, 4), "amateur_logits": torch.zeros(2, 4)}
    with pytest.raises(error, match=message):
        contrastive_scores(**{**given, **kwargs})
