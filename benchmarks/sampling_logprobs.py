"""Log-probabilities of a draw, by the parity rule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResult
from benchmarks.sampling_accuracy import EPS, find_kept
from fastattn.sampling import Sample, reference
from fastattn.sampling.problem import SampleProblem
from fastattn.testing.tolerance import compare

_BORDER = 128 * EPS


def check_logprobs(problem: SampleProblem, drawn: Sample) -> None:
    """Log-probabilities of the drawn and of the likeliest tokens, and which those are.

    Exact is log_softmax in float64 of the scores that are kept, plain torch is that in float32.
    Rows of which rounding decides whether a token is kept are left out: they have two answers.

    Args:
        problem: with the state as it was before the draw.

    Raises:
        WrongResult: the rule is broken, or a token is not among the likeliest.
    """
    kept = find_kept(problem, _BORDER)
    rows = ~(kept.failed | kept.ambiguous)
    if not torch.equal(drawn.logprobs.isnan(), kept.failed):  # type: ignore[union-attr]
        raise WrongResult("log-probabilities must be NaN in rows without a distribution alone")
    scores = _distribution(problem, rows)
    exact, baseline = scores.double().log_softmax(-1), scores.float().log_softmax(-1)
    own = drawn.tokens[rows][:, None]
    parts = {"log-probability": (drawn.logprobs[rows][:, None], own)}  # type: ignore[index]
    if drawn.top_tokens is not None and drawn.top_logprobs is not None:
        tokens, values = drawn.top_tokens[rows], drawn.top_logprobs[rows]
        _check_order(scores, tokens)
        # -1 marks places past the last token that has a probability.
        beyond = tokens < 0
        if not torch.equal(beyond, values == -math.inf):
            raise WrongResult("top tokens must be -1 where their log-probability is -inf alone")
        parts["top log-probabilities"] = (values.masked_fill(beyond, 0.0), tokens)
    for name, (found, tokens) in parts.items():
        index = tokens.clamp_min(0)
        truth, plain = (x.gather(1, index).masked_fill(tokens < 0, 0.0) for x in (exact, baseline))
        comparison = compare(found, plain, truth)
        if not comparison.passed:
            raise WrongResult(f"{name}: {comparison}")


def _distribution(problem: SampleProblem, rows: Tensor) -> Tensor:
    """Scores (rows, vocab_size) whose softmax is what log-probabilities are of, float32."""
    if problem.params.logprobs_of == "raw":
        scores = problem.logits[rows].float()
    else:
        scores = reference.filtered(problem.logits, problem.params, problem.state)[rows]
    # The first +inf has all of the mass.
    infinite = scores.amax(-1, keepdim=True) == math.inf
    tokens = torch.arange(problem.vocab_size, device=scores.device)
    wins = tokens == reference.lowest_argmax(scores)[:, None]
    return torch.where(infinite, torch.where(wins, 0.0, -math.inf), scores)


def _check_order(scores: Tensor, tokens: Tensor) -> None:
    """The likeliest tokens by the scores; which of equal ones come is left open."""
    count = tokens.shape[1]
    largest = scores.sort(-1, descending=True).values[:, :count]
    found = scores.gather(1, tokens.clamp_min(0)).masked_fill(tokens < 0, -math.inf)
    if not torch.allclose(found, largest, rtol=8 * EPS, atol=8 * EPS):
        row = int((~torch.isclose(found, largest)).any(-1).nonzero()[0])
        raise WrongResult(
            f"the likeliest tokens of row {row} must have scores {largest[row].tolist()}, got "
            f"{tokens[row].tolist()} of {found[row].tolist()}"
        )
    ordered = tokens.sort(-1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise WrongResult("a token is among the likeliest twice")
