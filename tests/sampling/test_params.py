"""SamplingParams: what it takes, what it refuses, and what a GPU's tensors are clamped to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastattn import SamplerState, SamplingParams, sample
from fastattn.sampling.params import FLOAT_MAX, clamp


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


# Four tokens whose likeliest is drawn in less than half of the cases.
LOGITS = torch.tensor([[0.0, 0.1, 0.3, 0.2]]).expand(256, -1)
SEEDS = torch.arange(256)
ALL = {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("name", "value", "drawn"),
    [
        ("temperature", 0.0, {2}), ("top_k", 1, {2}), ("top_p", 0.0, {2}), ("min_p", 1.0, {2}),
        ("temperature", FLOAT_MAX, ALL), ("top_k", 0, ALL), ("top_k", 2**31 - 1, ALL),
        ("top_p", 1, ALL), ("min_p", 0, ALL),
        # Token 1 was in the prompt, 3 was drawn once.
        ("repetition_penalty", 1e-3, {1}), ("repetition_penalty", 1, ALL),
        ("presence_penalty", -FLOAT_MAX, {3}), ("presence_penalty", FLOAT_MAX, {0, 1, 2}),
        ("frequency_penalty", -FLOAT_MAX, {3}), ("frequency_penalty", FLOAT_MAX, {0, 1, 2}),
    ],
)  # fmt: skip
def test_ends_of_the_ranges_are_accepted_and_drawn_by(
    name: str, value: float, drawn: set[int]
) -> None:
    params = SamplingParams(**{name: value}, seed=SEEDS)
    assert getattr(params, name) == value
    state = SamplerState.from_prompt(torch.ones(256, 1, dtype=torch.int64), 4, counts=True)
    assert state.counts is not None
    state.counts[:, 3] = 1
    tokens = sample(LOGITS, params, state)
    assert isinstance(tokens, torch.Tensor)
    assert set(tokens.tolist()) == drawn


@pytest.mark.parametrize(("keep", "drawn"), [(1, {2}), (2, {2, 3}), (4, ALL)])
def test_tokens_to_keep_bound_the_cut(keep: int, drawn: set[int]) -> None:
    params = SamplingParams(top_k=1, top_p=0.0, min_p=1.0, min_tokens_to_keep=keep, seed=SEEDS)
    tokens = sample(LOGITS, params)
    assert isinstance(tokens, torch.Tensor)
    assert set(tokens.tolist()) == drawn


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_seeds_at_the_ends_draw_as_their_tensors_do(seed: int) -> None:
    params = SamplingParams(seed=seed)
    assert params.seed == seed
    rows = torch.linspace(0, 1, 4000).expand(4, -1)
    by_number, by_tensor = (
        sample(rows, SamplingParams(seed=key)) for key in (seed, torch.full((4,), seed))
    )
    assert isinstance(by_number, torch.Tensor) and isinstance(by_tensor, torch.Tensor)
    assert torch.equal(by_number, by_tensor)
    assert by_number.unique().numel() == 1  # equal rows and seeds
    assert not torch.equal(by_number, sample(rows, SamplingParams(seed=12)))


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
