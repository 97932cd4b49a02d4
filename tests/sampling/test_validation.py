"""What `sample` refuses, and what it makes of rows without a distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastattn import SamplerState, SamplingParams, dispatch, sample
from fastattn.sampling import ERROR_TOKEN, Sample, pack_mask
from fastattn.sampling.problem import make_sample_problem
from fastattn.testing import debug

BATCH, VOCAB = 3, 70
IMPLS = ["cpu", "reference"]


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must have one value a row"),
        ({"temperature": torch.ones(3, dtype=torch.int64)}, TypeError, "temperature must be float"),
        ({"top_k": torch.ones(3)}, TypeError, "top_k must be int32 or int64"),
        ({"top_p": torch.tensor([0.5, 1.5, 0.5])}, ValueError, r"top_p must be .* in row 1"),
        ({"seed": torch.zeros(3, dtype=torch.int32)}, ValueError, "seed must be int64"),
        ({"logprobs": VOCAB + 1}, ValueError, "logprobs must be at most vocab_size = 70"),
        ({"logit_bias": torch.zeros(VOCAB + 1)}, ValueError, "logit_bias must be of shape"),
        ({"logit_bias": torch.zeros(VOCAB, dtype=torch.int64)}, TypeError, "logit_bias must be fl"),
        ({"logit_bias": {VOCAB: 1.0}}, ValueError, "logit_bias must hold token ids in 0..69"),
        ({"logit_bias": {0: math.inf}}, ValueError, "logit_bias of token 0 must be finite or -inf"),
        ({"logit_bias": [1.0]}, TypeError, "logit_bias must be a tensor, a dict or None"),
        ({"banned": [-1]}, ValueError, "banned must hold token ids"),
        ({"banned": 5}, TypeError, "banned must be a list"),
        ({"banned": torch.zeros(VOCAB)}, TypeError, "banned must be bool"),
        ({"allowed": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, "allowed must be int32"),
        ({"allowed": torch.zeros(3, 3)}, ValueError, "allowed must be int32"),
        ({"repetition_penalty": 1.1}, ValueError, "state must be a SamplerState where"),
    ],
)
def test_settings_that_do_not_fit_raise(
    kwargs: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sample(torch.zeros(BATCH, VOCAB), SamplingParams(**kwargs))


@pytest.mark.parametrize(
    ("logits", "error", "match"),
    [
        ([1.0], TypeError, "logits must be a torch.Tensor"),
        (torch.zeros(VOCAB), ValueError, r"logits must be \(batch, vocab_size\)"),
        (torch.zeros(1, 0), ValueError, r"logits must be \(batch, vocab_size\)"),
        (torch.zeros(1, 5, dtype=torch.int64), TypeError, "logits must be float16"),
    ],
)
def test_logits_that_are_none_raise(logits: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sample(logits)


def test_states_that_do_not_fit_raise() -> None:
    logits = torch.zeros(BATCH, VOCAB)
    with pytest.raises(ValueError, match=r"state must be of \(3, 70\)"):
        sample(logits, state=SamplerState.make(BATCH, VOCAB + 1))
    with pytest.raises(ValueError, match="state must have counts"):
        sample(logits, SamplingParams(presence_penalty=1.0), SamplerState.make(BATCH, VOCAB))
    with pytest.raises(TypeError, match="state must be a SamplerState"):
        sample(logits, state=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="params must be SamplingParams"):
        sample(logits, {"top_k": 5})  # type: ignore[arg-type]


def test_implementations_run_or_raise_with_reasons() -> None:
    with pytest.raises(ValueError, match="impl must be one of"):
        sample(torch.zeros(1, 5), impl="sdpa")
    with pytest.raises(NotImplementedError, match="float64 is not in the CPU path"):
        sample(torch.zeros(1, 5, dtype=torch.float64), impl="cpu")
    problem = make_sample_problem(torch.zeros(1, 5), SamplingParams(), None)
    assert dispatch.select(problem).name == "cpu"
    double = make_sample_problem(torch.zeros(1, 5, dtype=torch.float64), SamplingParams(), None)
    assert dispatch.select(double).name == "reference"
    assert "cpu: runs" in str(dispatch.explain(problem))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("vocab_size", [VOCAB, 5000])
@pytest.mark.parametrize(
    "kwargs", [{}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}, {"min_p": 0.1}]
)
def test_rows_without_a_distribution_give_the_error_token(
    kwargs: dict[str, Any], vocab_size: int, impl: str
) -> None:
    logits = torch.randn(5, vocab_size)
    logits[0, 3] = math.nan
    logits[1] = -math.inf
    logits[2, 5] = logits[2, 60] = math.inf
    logits[3] = -math.inf
    logits[3, 11] = -1e4
    params = SamplingParams(logprobs=2, seed=1, **kwargs)
    drawn = sample(logits, params, impl=impl)
    assert isinstance(drawn, Sample)
    assert drawn.tokens[:4].tolist() == [ERROR_TOKEN, ERROR_TOKEN, 5, 11]
    assert 0 <= int(drawn.tokens[4]) < vocab_size
    assert drawn.logprobs is not None and drawn.top_tokens is not None
    assert drawn.logprobs[:2].isnan().all() and drawn.logprobs[2:4].tolist() == [0, 0]
    assert drawn.top_tokens[:4].tolist() == [[-1, -1], [-1, -1], [5, -1], [11, -1]]
    with debug(), pytest.raises(ValueError, match=r"got rows \[0, 1\] without a distribution"):
        sample(logits, params, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_bans_leave_nothing_or_heal_nan(impl: str) -> None:
    logits = torch.randn(1, VOCAB)
    nothing = pack_mask(torch.zeros(1, VOCAB, dtype=torch.bool))
    drawn = sample(logits, SamplingParams(allowed=nothing), impl=impl)
    assert isinstance(drawn, torch.Tensor) and drawn.tolist() == [ERROR_TOKEN]
    logits[0, 7] = math.nan
    drawn = sample(logits, SamplingParams(banned=[7]), impl=impl)
    assert isinstance(drawn, torch.Tensor) and int(drawn) not in (7, ERROR_TOKEN)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_batch_gives_no_tokens(impl: str) -> None:
    drawn = sample(torch.zeros(0, VOCAB), SamplingParams(top_p=0.9), impl=impl)
    assert isinstance(drawn, torch.Tensor) and drawn.shape == (0,)
