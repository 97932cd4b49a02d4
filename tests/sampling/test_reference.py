"""The set of tokens that can be drawn, against the processors and warpers of transformers.

The two agree but on borders, where transformers cuts by place in a sort and fastattn by value:

- Ties. Of the tokens that tie with the least that top_p (or min_tokens_to_keep) keeps, transformers
  keeps those that its sort, which is not stable, happens to have put last. fastattn keeps them all.
- Rounding. A token whose cut is decided by a sum of probabilities within the rounding of a float32
  cumulative sum of p, or by a ratio within a rounding of min_p, may fall either way.
- Underflow. Where min_p keeps a number of tokens whatever their score, transformers ranks them by
  probability, and those below float32's range are all 0 to it: which of them it keeps is chance.

A difference of any other kind fails. `test_a_tie_on_the_border_stays` shows the first kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastattn import SamplerState, SamplingParams, sample
from fastattn.sampling import Sample, reference

UNIT = 2.0**-24  # half a unit in the last place of 1, float32
VOCAB_SIZES = [1, 5, 33, 128, 1000, 4099, 20_000]


def _logits(family: str, vocab_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, vocab_size, generator=generator)
    if family == "peaked":
        noise = noise - 3 * torch.arange(1, vocab_size + 1).log()
        return noise[:, torch.randperm(vocab_size, generator=generator)]
    if family == "flat":
        return noise * 0.1
    if family == "tied":
        return (noise * 2).round()
    if family == "equal":
        return torch.full((2, vocab_size), 1.5)
    if family == "infinite":
        gone = torch.rand(2, vocab_size, generator=generator) < 0.9
        gone[:, seed % vocab_size] = False
        return noise.masked_fill(gone, -torch.inf)
    assert family == "wide"
    return noise * 20


@st.composite
def _settings(draw: Any) -> dict[str, Any]:
    return {
        "temperature": draw(st.sampled_from([1.0, 0.1, 0.7, 1.3, 10.0])),
        "top_k": draw(st.sampled_from([0, 0, 1, 2, 50, 300, 10**6])),
        "top_p": draw(st.sampled_from([1.0, 1e-9, 0.1, 0.5, 0.9, 0.99, 0.999])),
        "min_p": draw(st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0])),
        "min_tokens_to_keep": draw(st.sampled_from([1, 1, 2, 30])),
        "repetition_penalty": draw(st.sampled_from([1.0, 0.6, 1.3])),
    }


def _transformers_keeps(logits: Tensor, input_ids: Tensor, given: dict[str, Any]) -> Tensor:
    """bool (batch, vocab_size), in the order of `generate`."""
    least = given["min_tokens_to_keep"]
    scores = logits
    if given["repetition_penalty"] != 1:
        scores = RepetitionPenaltyLogitsProcessor(given["repetition_penalty"])(input_ids, scores)
    scores = TemperatureLogitsWarper(given["temperature"])(input_ids, scores)
    if given["top_k"]:
        scores = TopKLogitsWarper(given["top_k"], min_tokens_to_keep=least)(input_ids, scores)
    if given["top_p"] < 1:
        scores = TopPLogitsWarper(given["top_p"], min_tokens_to_keep=least)(input_ids, scores)
    if given["min_p"]:
        scores = MinPLogitsWarper(given["min_p"], min_tokens_to_keep=least)(input_ids, scores)
    return scores > -torch.inf


def _on_border(logits: Tensor, params: SamplingParams, state: SamplerState) -> Tensor:
    """bool (batch, vocab_size): tokens whose cut hangs on rounding."""
    scores = reference.filtered(logits, replace(params, top_p=1.0, min_p=0.0), state).double()
    mass = scores.softmax(-1)
    ordered, order = scores.sort(-1, descending=True)
    sums = mass.gather(1, order).cumsum(-1)
    before = sums.gather(1, torch.searchsorted(-ordered, -scores)) - mass
    # A float32 cumulative sum of n numbers, that end at 1, is wrong by n roundings at most.
    near = (before - params.top_p).abs() <= (scores.shape[1] + 4) * UNIT
    ratio = (scores - ordered[:, :1]).exp()
    # Two exponentials of float32 scores: their rounding, and that of the scores themselves.
    rounding = (8 + 2 * scores.clamp_min(-1e4).abs().amax(-1, keepdim=True)) * UNIT
    near |= (ratio / params.min_p - 1).abs() <= rounding if params.min_p else False
    return near & (scores > -torch.inf)


@settings(max_examples=250, deadline=None)
@given(
    family=st.sampled_from(["peaked", "flat", "tied", "equal", "infinite", "wide"]),
    vocab_size=st.sampled_from(VOCAB_SIZES),
    given=_settings(),
    seed=st.integers(0, 2**31),
)
@example(  # kept by min_tokens_to_keep, with probabilities below float32's range
    family="peaked",
    vocab_size=4099,
    given={
        "temperature": 0.1, "top_k": 300, "top_p": 1e-9, "min_p": 0.0, "min_tokens_to_keep": 30,
        "repetition_penalty": 1.0,
    },
    seed=0,
)  # fmt: skip
def test_the_same_tokens_can_be_drawn_as_with_transformers(
    family: str, vocab_size: int, given: dict[str, Any], seed: int
) -> None:
    logits = _logits(family, vocab_size, seed)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab_size, (2, 12), generator=generator)
    state = SamplerState.from_prompt(input_ids, vocab_size)
    params = SamplingParams(**given, seed=seed, logprobs=vocab_size)
    scores = reference.filtered(logits, params, state)
    ours, theirs = scores > -torch.inf, _transformers_keeps(logits, input_ids, given)

    least = scores.masked_fill(~ours, torch.inf).amin(-1, keepdim=True)
    tied = ours & (scores == least)
    rounding = _on_border(logits, params, state)
    differs = ours != theirs
    if (differs & tied & ours).any():
        event("a tie on a border, kept by fastattn only")
    if (differs & ~tied & rounding).any():
        event("a border within rounding")
    # Scores that tie with one on a border fall with it, those kept by place included.
    raw = SamplingParams(**{**given, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    relative = reference.filtered(logits, raw, state).log_softmax(-1)
    underflow = (relative < -80) & (params.min_p > 0) & (given["min_tokens_to_keep"] > 1)
    if (differs & underflow).any():
        event("a probability below float32's range")
    wrong = differs & ~rounding & ~(tied & ours) & ~underflow
    assert not wrong.any(), (wrong.nonzero().tolist(), scores[wrong])

    drawn = sample(logits, params, state.clone(), impl="cpu")
    assert isinstance(drawn, Sample) and drawn.top_tokens is not None
    fast = torch.zeros(2, vocab_size + 1, dtype=torch.bool)
    fast.scatter_(1, drawn.top_tokens % (vocab_size + 1), True)
    wrong = (fast[:, :vocab_size] != ours) & ~rounding
    assert not wrong.any(), (wrong.nonzero().tolist(), scores[wrong])
    assert fast.gather(1, drawn.tokens[:, None]).all()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_tie_on_the_border_stays(impl: str) -> None:
    """Four tokens of probability 1/4 at p = 0.6: three suffice, and transformers keeps three."""
    logits = torch.tensor([[2.0, 2.0, 2.0, 2.0, -50.0]])
    assert int((TopPLogitsWarper(0.6)(None, logits) > -torch.inf).sum()) == 3
    drawn = sample(logits, SamplingParams(top_p=0.6, logprobs=5), impl=impl)
    assert isinstance(drawn, Sample) and drawn.top_tokens is not None
    assert drawn.top_tokens.tolist() == [[0, 1, 2, 3, -1]]


def test_joint_top_p_is_of_all_tokens() -> None:
    """Probabilities 0.4, 0.3, 0.2, 0.1: top_k = 2 leaves 0.57 and 0.43 of 1."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for joint, number in ((False, 1), (True, 2)):
        params = SamplingParams(top_k=2, top_p=0.5, joint=joint)
        kept = torch.where(torch.arange(4) < number, logits, -torch.inf)
        expected = kept.double().log_softmax(-1).exp()
        assert torch.equal(reference.probabilities(logits, params), expected)


def test_penalties_bias_and_bans_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0, 0.5, 1.0]])
    state = SamplerState.from_prompt(torch.tensor([[0, 1]]), 5, counts=True)
    state.add(torch.tensor([2]))
    state.add(torch.tensor([2]))
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5,
        logit_bias={3: 1.5}, banned=[4], temperature=0.5,
    )  # fmt: skip
    scores = reference.filtered(logits, params, state)
    expected = [2 / 2, -1 * 2, 3 / 2 - 0.25 - 2 * 0.5, 0.5 + 1.5, -torch.inf]
    assert scores.tolist() == [[2 * score for score in expected]]


def test_rows_have_settings_of_their_own() -> None:
    """A batch with a tensor of each number is the batches of its rows."""
    torch.manual_seed(0)
    logits = torch.randn(4, 300) * 3
    rows = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0]),
        "top_k": torch.tensor([0, 5, 40, 0]),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 0.8]),
        "min_p": torch.tensor([0.0, 0.1, 0.0, 0.2]),
        "min_tokens_to_keep": torch.tensor([1, 3, 1, 2]),
        "repetition_penalty": torch.tensor([1.0, 1.3, 0.7, 1.1]),
        "presence_penalty": torch.tensor([0.0, 0.5, 0.0, -0.5]),
        "frequency_penalty": torch.tensor([0.1, 0.0, 0.0, 0.5]),
    }
    prompt = torch.randint(0, 300, (4, 50))
    state = SamplerState.from_prompt(prompt, 300, counts=True)
    state.add(torch.arange(4))
    seed = torch.arange(4) + 10
    for impl in ("cpu", "reference"):
        together = sample(
            logits, SamplingParams(**rows, seed=seed, logprobs=300), state.clone(), impl=impl
        )
        for row in range(4):
            alone = SamplerState.from_prompt(prompt[row : row + 1], 300, counts=True)
            alone.add(torch.tensor([row]))
            numbers = {name: values[row].item() for name, values in rows.items()}
            params = SamplingParams(**numbers, seed=int(seed[row]), logprobs=300)
            drawn = sample(logits[row : row + 1], params, alone, impl=impl)
            for mine, its in zip(drawn, together, strict=True):
                assert isinstance(mine, Tensor) and isinstance(its, Tensor)
                torch.testing.assert_close(mine[0], its[row], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_taken_as_float32(dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 1000) * 3).to(dtype)
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=3)
    for impl in ("cpu", "reference"):
        drawn, expected = (sample(values, params, impl=impl) for values in (logits, logits.float()))
        assert isinstance(drawn, Tensor) and isinstance(expected, Tensor)
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("kind", ["filtered", "raw"])
@pytest.mark.parametrize("vocab_size", [100, 9000])
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.7}])
def test_log_probabilities_are_those_of_a_softmax(
    kwargs: dict[str, Any], vocab_size: int, kind: str
) -> None:
    logits = torch.randn(3, vocab_size) * 2
    params = SamplingParams(temperature=0.8, seed=7, logprobs=5, logprobs_of=kind, **kwargs)
    expected = reference.probabilities(logits, params).log()
    if kind == "raw":
        expected = logits.double().log_softmax(-1)
    for impl in ("cpu", "reference"):
        drawn = sample(logits, params, impl=impl)
        assert isinstance(drawn, Sample) and drawn.logprobs is not None
        assert drawn.top_logprobs is not None and drawn.top_tokens is not None
        own = expected.gather(1, drawn.tokens[:, None])[:, 0]
        # float32: the sum's roundings, and those of numbers up to 20.
        limit = (32 + 20) * 2 * UNIT
        assert (drawn.logprobs.double() - own).abs().max() <= limit
        top = expected.topk(5)
        gone = top.values == -torch.inf
        assert torch.equal(drawn.top_tokens, top.indices.masked_fill(gone, -1))
        assert torch.equal(drawn.top_logprobs == -torch.inf, gone)
        assert (drawn.top_logprobs - top.values).masked_fill(gone, 0).abs().max() <= limit
