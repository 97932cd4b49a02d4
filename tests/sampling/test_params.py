"""SamplingParams: what it takes, what it refuses, and what a GPU's tensors are clamped to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastattn import SamplingParams
from fastattn.sampling.params import clamp


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_k", -1), ("top_p", -0.1), ("top_p", 1.1), ("top_p", math.nan),
        ("min_p", -0.1), ("min_p", 1.5), ("min_tokens_to_keep", 0),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
        ("presence_penalty", math.inf), ("frequency_penalty", math.nan),
        ("seed", 2**63), ("logprobs", -1), ("logprobs_of", "both"),
    ],
)  # fmt: skip
def test_host_values_out_of_range_raise_at_once(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"), ("top_k", 5.0), ("top_k", True), ("min_tokens_to_keep", 1.0),
        ("seed", 1.0), ("logprobs", 2.0), ("top_p", None),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_raise(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must"):
        SamplingParams(**{name: value})


def test_ends_of_the_ranges_are_accepted() -> None:
    SamplingParams(temperature=0.0, top_k=0, top_p=0.0, min_p=1.0, min_tokens_to_keep=1, seed=-1)
    SamplingParams(temperature=1, top_p=1, repetition_penalty=1e-3, presence_penalty=-2)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("temperature", [-1.0, math.nan, 0.5], [0.0, 0.0, 0.5]),
        ("top_p", [-1.0, 2.0, math.nan], [0.0, 1.0, 1.0]),
        ("min_p", [-1.0, 2.0, math.nan], [0.0, 1.0, 0.0]),
        ("repetition_penalty", [-1.0, 0.0, math.nan, 1.5], [1.0, 1.0, 1.0, 1.5]),
        ("presence_penalty", [math.nan, -2.0], [0.0, -2.0]),
        ("top_k", [-5, 7], [0, 7]),
        ("min_tokens_to_keep", [-5, 7], [1, 7]),
    ],
)
def test_tensors_are_clamped_as_documented(
    name: str, given: list[float], expected: list[float]
) -> None:
    clamped = clamp(name, torch.tensor(given))
    assert isinstance(clamped, torch.Tensor)
    assert clamped.tolist() == expected


def test_penalties_say_what_state_they_need() -> None:
    assert not SamplingParams().needs_seen and not SamplingParams().needs_counts
    assert SamplingParams(repetition_penalty=torch.ones(2)).needs_seen
    assert SamplingParams(presence_penalty=0.1).needs_counts
    assert SamplingParams(frequency_penalty=torch.zeros(2)).needs_counts
