"""Typical, epsilon and eta cuts, against Hugging Face's warpers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.sampling.filters import epsilon_filter, eta_filter, typical_filter

FILTERS = [
    (typical_filter, "TypicalLogitsWarper", [0.2, 0.9, 0.999]),
    (epsilon_filter, "EpsilonLogitsWarper", [3e-4, 0.01, 0.9]),
    (eta_filter, "EtaLogitsWarper", [3e-4, 0.05, 0.9]),
]


def _scores(vocab: int) -> Tensor:
    """Rows from flat to peaked, with ties, banned tokens, one that is all equal, one certain."""
    generator = torch.Generator().manual_seed(vocab)
    scale = torch.tensor([0.0, 0.1, 1.0, 3.0, 10.0, 3.0, 3.0, 1.0])[:, None]
    scores = torch.randn(8, vocab, generator=generator) * scale
    scores[5] = scores[5].round()
    scores[6, ::3] = -math.inf
    scores[7, 1:] = -math.inf
    return scores


@pytest.mark.parametrize("least", [1, 3, 5000])
@pytest.mark.parametrize("vocab", [17, 1000])
@pytest.mark.parametrize(("cut", "peer", "values"), FILTERS)
def test_equals_hugging_face(
    cut: Any, peer: str, values: list[float], vocab: int, least: int
) -> None:
    transformers = pytest.importorskip("transformers")
    scores = _scores(vocab)
    removed = 0
    for value in values:
        warper = getattr(transformers, peer)(value, min_tokens_to_keep=least)
        result = cut(scores, value, min_tokens_to_keep=least)
        assert torch.equal(result, warper(None, scores)), value
        removed += int((result != scores).sum())
    assert (removed > 0) == (least < vocab)


@pytest.mark.parametrize(("cut", "peer", "values"), FILTERS)
def test_a_value_a_row_any_shape_and_dtype(cut: Any, peer: str, values: list[float]) -> None:
    scores = _scores(60).view(2, 4, 60).bfloat16()
    value = torch.tensor(values * 2 + values[:2]).view(2, 4)
    before = scores.clone()
    result = cut(scores, value)
    assert torch.equal(scores, before)
    assert result.dtype == torch.bfloat16 and result.shape == scores.shape
    alone = [[cut(scores[i, j].float(), float(value[i, j])) for j in range(4)] for i in range(2)]
    assert torch.equal(result.float(), torch.stack([torch.stack(row) for row in alone]))
    compiled = torch.compile(cut, fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores, value), result)


@pytest.mark.parametrize(("cut", "peer", "values"), FILTERS)
def test_bad_arguments_are_named(cut: Any, peer: str, values: list[float]) -> None:
    scores = torch.zeros(2, 8)
    name = "mass" if cut is typical_filter else "epsilon"
    for value in (0.0, 1.0, -0.5, math.nan):
        with pytest.raises(ValueError, match=f"{name} must be greater than 0 and less than 1"):
            cut(scores, value)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(2,\)"):
        cut(scores, torch.tensor([0.5]))
    with pytest.raises(ValueError, match="min_tokens_to_keep must be at least 1, got 0"):
        cut(scores, 0.5, min_tokens_to_keep=0)
    with pytest.raises(TypeError, match="scores must have a floating dtype"):
        cut(scores.int(), 0.5)
