"""What is drawn: the distribution, and that a draw follows from seed, step and row alone."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastattn import SamplerState, SamplingParams, sample
from fastattn.sampling import reference
from fastattn.sampling.noise import LARGEST, first_bytes, gumbel, gumbel_of, uniform, words

# Drawing 200k tokens from 50k takes minutes a setting: that is for FASTATTN_DRAWS=200000.
DRAWS = {128: 200_000, 4000: 8_000, 50_000: 1_000}
if "FASTATTN_DRAWS" in os.environ:
    DRAWS = dict.fromkeys(DRAWS, int(os.environ["FASTATTN_DRAWS"]))

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "top_k and top_p": {"top_k": 50, "top_p": 0.9, "temperature": 0.8},
    "all cuts": {"top_k": 60, "top_p": 0.95, "min_p": 0.05, "temperature": 1.3},
    "joint": {"top_k": 30, "top_p": 0.7, "joint": True},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.3, "top_p": 0.9},
    "bans and bias": {"banned": [0, 1, 2], "logit_bias": {5: 1.0}, "top_k": 40},
    "keeps several": {"top_p": 0.01, "min_tokens_to_keep": 12},
}


def _row(vocab_size: int) -> Tensor:
    """One row of logits: a few likely tokens before a long tail."""
    generator = torch.Generator().manual_seed(vocab_size)
    ranks = torch.randperm(vocab_size, generator=generator) + 1
    return (5 - 1.5 * ranks.log() + 0.1 * torch.randn(vocab_size, generator=generator))[None]


def _state(batch: int, vocab_size: int) -> SamplerState:
    """Rows that have seen the same few tokens, likely ones among them."""
    likely = _row(vocab_size)[0].topk(3).indices
    prompt = torch.cat((likely, torch.arange(5)))
    state = SamplerState.from_prompt(prompt.expand(batch, -1), vocab_size, counts=True)
    state.add(likely[:1].expand(batch))
    return state


def _draw(name: str, vocab_size: int, num_draws: int, first_seed: int = 0) -> Tensor:
    """Draws from one row of logits, each with a seed of its own."""
    params = SamplingParams(**SETTINGS[name], seed=torch.arange(num_draws) + first_seed)
    state = _state(num_draws, vocab_size)
    drawn = sample(_row(vocab_size).expand(num_draws, -1), params, state, impl="cpu")
    assert isinstance(drawn, Tensor)
    return drawn


def _chi_square_excess(counts: Tensor, expected: Tensor) -> float:
    """How many standard deviations the chi-square statistic lies above its mean.

    Bins of less than 10 expected draws are put together, the likeliest first, so that the statistic
    is close to its limit. Its cube root is near normal (Wilson and Hilferty 1931).
    """
    order = expected.argsort(descending=True)
    counts, expected = counts[order].double(), expected[order]
    large = int((expected >= 10).sum())
    rest = (expected[large:].cumsum(0) / 10).floor().long()
    # The last of the rest may be less than 10: it joins the one before, whichever that is.
    if len(rest) and rest.max() > 0:
        rest = rest.clamp_max(int(rest.max()) - 1)
    elif large and len(rest):
        rest = rest - 1
    bins = torch.cat((torch.arange(large), large + rest))
    num = int(bins.max()) + 1
    observed = torch.zeros(num, dtype=torch.float64).index_add_(0, bins, counts)
    wanted = torch.zeros(num, dtype=torch.float64).index_add_(0, bins, expected)
    if num < 2:
        return 0.0
    freedom = num - 1
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize("vocab_size", DRAWS)
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_filtered_distribution(name: str, vocab_size: int) -> None:
    num_draws = DRAWS[vocab_size]
    chunk = max(1, 20_000_000 // vocab_size)
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for start in range(0, num_draws, chunk):
        tokens = _draw(name, vocab_size, min(chunk, num_draws - start), start)
        counts += tokens.bincount(minlength=vocab_size)
    params, state = SamplingParams(**SETTINGS[name]), _state(1, vocab_size)
    probability = reference.probabilities(_row(vocab_size), params, state)[0]
    assert counts.sum() == num_draws
    assert not counts[probability == 0].any(), "a token outside of the set was drawn"
    # One in 30000 at chance; the seeds are fixed, so it passes always or never.
    assert _chi_square_excess(counts, probability * num_draws) < 4


def test_the_chi_square_sees_a_small_error() -> None:
    """A distribution that is wrong by 5 percent of one token's share is noticed."""
    probability = reference.probabilities(_row(128), SamplingParams())[0]
    wrong = probability.clone()
    wrong[probability.argmax()] *= 0.95
    counts = _draw("plain", 128, DRAWS[128]).bincount(minlength=128)
    assert _chi_square_excess(counts, wrong / wrong.sum() * DRAWS[128]) > 4


def test_seeds_and_steps_are_independent() -> None:
    """Pairs of draws with seeds one apart, and steps one apart, fill the product distribution."""
    num_draws, vocab_size = 100_000, 8
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1))
    probability = reference.probabilities(logits, SamplingParams())[0]
    expected = (probability[:, None] * probability).flatten() * num_draws

    def draw(first_seed: int, step: int) -> Tensor:
        state = SamplerState.make(num_draws, vocab_size)
        state.step.fill_(step)
        params = SamplingParams(seed=torch.arange(num_draws) * 2 + first_seed)
        drawn = sample(logits.expand(num_draws, -1), params, state, impl="cpu")
        assert isinstance(drawn, Tensor)
        return drawn

    base = draw(0, 0)
    for other in (draw(1, 0), draw(0, 1), draw(0, 2**32)):
        counts = (base * vocab_size + other).bincount(minlength=vocab_size**2)
        assert _chi_square_excess(counts, expected) < 4


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["plain", "top_k", "top_p", "all cuts"])
@pytest.mark.parametrize("vocab_size", [128, 9001])
def test_a_draw_does_not_depend_on_its_batch(name: str, vocab_size: int, impl: str) -> None:
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(0)) * 2
    seed, step = torch.arange(6) * 2**33 - 5, torch.arange(6) * 2**31

    def draw(rows: list[int]) -> list[int]:
        state = SamplerState.make(len(rows), vocab_size)
        state.step.copy_(step[rows])
        drawn = sample(
            logits[rows], SamplingParams(**SETTINGS[name], seed=seed[rows]), state, impl=impl
        )
        assert isinstance(drawn, Tensor)
        return drawn.tolist()

    together = draw([0, 1, 2, 3, 4, 5])
    assert [draw([row])[0] for row in range(6)] == together
    assert draw([4, 4, 1]) == [together[4], together[4], together[1]]


@pytest.mark.parametrize("vocab_size", [128, 4000, 9001])
@pytest.mark.parametrize("name", SETTINGS)
def test_both_implementations_draw_the_same_tokens(name: str, vocab_size: int) -> None:
    num_draws = 300
    params = SamplingParams(**SETTINGS[name], seed=torch.arange(num_draws))
    logits = _row(vocab_size).expand(num_draws, -1)
    expected = sample(logits, params, _state(num_draws, vocab_size), impl="reference")
    assert torch.equal(_draw(name, vocab_size, num_draws), torch.as_tensor(expected))


def test_a_seed_of_none_follows_torchs_generator() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        drawn = sample(torch.zeros(20, 1000))
        assert isinstance(drawn, Tensor)
        return drawn

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert len(draw(0).unique()) > 10, "rows have noise of their own"


def test_rare_tokens_are_drawn() -> None:
    """Noise reaches what probabilities down to 2**-34 need: its uniforms have 40 bits."""
    byte, word = torch.tensor([0, 0, 0, 1, 255]), torch.tensor([0, 1, 2**32 - 1, 0, 2**32 - 1])
    noise = gumbel_of(uniform(byte, word))
    assert noise.isfinite().all()
    assert 28.4 < float(noise[0]) < LARGEST
    assert bool((noise.diff() <= 0).all())
    # P(noise > x) is 1 - exp(-exp(-x)), near exp(-x); seen as the number of tokens above 10.
    tokens = torch.arange(2_000_000)
    drawn = gumbel(torch.tensor([3]), torch.tensor([0]), tokens)
    wanted = len(tokens) * math.exp(-10)
    assert abs(int((drawn > 10).sum()) - wanted) < 5 * wanted**0.5


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345, -(2**40)])
@pytest.mark.parametrize("step", [0, 2**40 + 17, 2**63 - 1])
def test_fast_noise_is_the_specified_noise(seed: int, step: int) -> None:
    """Also: the first bytes, made in torch, are those of NumPy's generator."""
    from fastattn.sampling.cpu import noise as fast

    tokens = torch.arange(5003)
    key = torch.tensor(seed), torch.tensor(step)
    row = fast.row_bytes(seed, step, 5003)
    assert (row == first_bytes(*key, tokens).numpy()).all()
    ones = np.ones(5003, dtype=np.int64)
    made = fast.words(ones * seed, ones * step, tokens.numpy())
    assert (made.astype(np.int64) == words(*key, tokens).numpy()).all()
    noise = fast.gumbel(ones[:1] * seed, ones[:1] * step, tokens.numpy(), row)
    torch.testing.assert_close(torch.from_numpy(noise), gumbel(*key, tokens))
