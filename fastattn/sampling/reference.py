"""The specification of `sample`: plain torch, a full sort, one rule after another.

Scores are float32, or float64 for float64 logits; probabilities that top_p and min_p cut by are
summed in float64, so that only the other implementations' rounding can tell a border apart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.sampling.bits import unpack_mask
from fastattn.sampling.noise import gumbel
from fastattn.sampling.params import TINY_TEMPERATURE, Number, SamplingParams
from fastattn.sampling.problem import ERROR_TOKEN, Sample, SampleProblem, make_sample_problem
from fastattn.sampling.state import SamplerState


def filtered(logits: Tensor, params: SamplingParams, state: SamplerState | None = None) -> Tensor:
    """Scores of the tokens that can be drawn, -inf for those that cannot; marks nothing.

    Returns:
        float32 (float64 for float64 logits) (batch, vocab_size). A row at temperature 0, or with
        +inf, keeps its winner alone. A row without a distribution is NaN throughout.
    """
    return _filtered(make_sample_problem(logits, params, state))


def probabilities(
    logits: Tensor, params: SamplingParams, state: SamplerState | None = None
) -> Tensor:
    """The probability of each token to be drawn, float64 (batch, vocab_size); NaN as `filtered`."""
    return _log_softmax(filtered(logits, params, state)).exp()


def run(problem: SampleProblem) -> Sample:
    """Draws a token from each row, and marks it in the state."""
    scores = _filtered(problem)
    tokens = torch.arange(problem.vocab_size, device=problem.device)
    noise = gumbel(problem.seeds[:, None], problem.steps[:, None], tokens)
    failed = scores.isnan().any(-1)
    drawn = lowest_argmax(scores + noise).masked_fill(failed, ERROR_TOKEN)
    sample = Sample(drawn)
    if problem.params.logprobs is not None:
        raw = problem.params.logprobs_of == "raw"
        sample = log_probabilities(
            _log_softmax(_float(problem.logits)) if raw else _log_softmax(scores),
            drawn,
            problem.params.logprobs,
        )
    if problem.state is not None:
        problem.state.add(drawn)
    return sample


def processed(problem: SampleProblem) -> Tensor:
    """Scores after penalties, bias and bans, before the temperature."""
    scores = _float(problem.logits)
    state, params = problem.state, problem.params
    if params.needs_seen:
        assert state is not None
        penalty = _column(problem.setting("repetition_penalty"))
        seen = unpack_mask(state.seen, problem.vocab_size)
        scores = torch.where(
            seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores
        )
    if params.needs_counts:
        assert state is not None and state.counts is not None
        presence = _column(problem.setting("presence_penalty"))
        frequency = _column(problem.setting("frequency_penalty"))
        scores = scores - (presence * (state.counts > 0) + frequency * state.counts)
    if (bias := problem.dense_bias()) is not None:
        scores = scores + bias
    if (bans := problem.dense_bans()) is not None:
        scores = scores.masked_fill(bans, -math.inf)
    return scores


def lowest_argmax(scores: Tensor) -> Tensor:
    """The lowest index of each row's largest value, int64 (batch,)."""
    tokens = torch.arange(scores.shape[1], device=scores.device)
    largest = scores == scores.amax(-1, keepdim=True)
    return torch.where(largest, tokens, scores.shape[1]).amin(-1).clamp_max(scores.shape[1] - 1)


def log_probabilities(logprobs: Tensor, drawn: Tensor, n: int) -> Sample:
    """A `Sample` from log-probabilities (batch, vocab_size) and drawn tokens (batch,)."""
    failed = drawn == ERROR_TOKEN
    of_drawn = logprobs.gather(1, drawn.clamp_min(0)[:, None])[:, 0].masked_fill(failed, math.nan)
    if not n:
        return Sample(drawn, of_drawn.to(torch.float32))
    values, tokens = logprobs.sort(dim=-1, descending=True, stable=True)
    values, tokens = values[:, :n], tokens[:, :n]
    tokens = tokens.masked_fill((values == -math.inf) | failed[:, None], ERROR_TOKEN)
    values = values.masked_fill(failed[:, None], math.nan)
    return Sample(drawn, of_drawn.to(torch.float32), tokens, values.to(torch.float32))


def _filtered(problem: SampleProblem) -> Tensor:
    scores = processed(problem)
    failed = scores.isnan().any(-1) | (scores == -math.inf).all(-1)
    temperature = _column(problem.setting("temperature"))
    greedy = torch.as_tensor(temperature, device=problem.device) < TINY_TEMPERATURE
    winner = lowest_argmax(scores)
    scores = scores / torch.where(greedy, 1.0, temperature).to(scores.dtype)
    kept = scores >= _threshold(problem, scores)
    # One winner: at temperature 0, and where a score is +inf (or has become it).
    infinite = scores.amax(-1, keepdim=True) == math.inf
    winner = torch.where(greedy[:, 0] if greedy.dim() else greedy, winner, lowest_argmax(scores))
    tokens = torch.arange(problem.vocab_size, device=problem.device)
    kept = torch.where(greedy | infinite, tokens == winner[:, None], kept)
    return scores.masked_fill(~kept, -math.inf).masked_fill(failed[:, None], math.nan)


def _threshold(problem: SampleProblem, scores: Tensor) -> Tensor:
    """The least score that is kept, (batch, 1)."""
    vocab_size = problem.vocab_size
    descending = scores.sort(-1, descending=True).values
    least = _rows(problem, "min_tokens_to_keep").clamp(1, vocab_size)
    top_k = _rows(problem, "top_k")
    top_k = torch.where((top_k < 1) | (top_k > vocab_size), vocab_size, top_k.maximum(least))
    kth = descending.gather(1, top_k - 1)
    keep = descending >= kth
    relative = (descending.double() - descending[:, :1].double()).exp()
    weight = relative if problem.params.joint else relative * keep
    mass = weight / weight.sum(-1, keepdim=True)
    before = mass.cumsum(-1) - mass
    # Equal scores have the mass before the first of them.
    first = torch.searchsorted(-descending, -descending)
    before = before.gather(1, first.clamp_max(vocab_size - 1))  # past the end for NaN
    top_p = _rows(problem, "top_p").double()
    keep &= (before < top_p) | (top_p >= 1)
    keep &= relative >= _rows(problem, "min_p")
    last = keep.sum(-1, keepdim=True).maximum(least) - 1
    return descending.gather(1, last)


def _rows(problem: SampleProblem, name: str) -> Tensor:
    """A setting as a tensor (batch, 1)."""
    value = torch.as_tensor(problem.setting(name), device=problem.device)
    if not value.is_floating_point():
        value = value.to(torch.int64)
    return value.expand(problem.batch)[:, None]


def _column(value: Number) -> Number:
    return value[:, None] if isinstance(value, Tensor) else value


def _float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_softmax(scores: Tensor) -> Tensor:
    """In float64; a row with +inf has all its mass on the first."""
    tokens = torch.arange(scores.shape[1], device=scores.device)
    infinite = scores.amax(-1, keepdim=True) == math.inf
    alone = torch.where(tokens == lowest_argmax(scores)[:, None], 0.0, -math.inf)
    return torch.where(infinite, alone, scores.double()).log_softmax(-1)
