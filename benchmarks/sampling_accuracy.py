"""The check before a time of sampling: which tokens are right.

fastattn draws the token of the reference. Where it draws another, rounding must explain it: a draw
is the token of the largest score + noise in the set that is kept, so whatever float32 does to a
border, the set lies between the tokens that are surely kept and those that are possibly kept, and

    drawn is possibly kept, and value(drawn) >= value(t) of every t that is surely kept,

both values with what float32 may be off by. Values here are float64 sums of the reference's scores
and of noise whose logarithms are float64.

Peers draw other noise. None of their tokens may lie outside of what is possibly kept, over many
draws, and the mean log-probability of these draws must be that of the distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResult, spread
from benchmarks.providers import Provider
from benchmarks.sampling_cases import SETTINGS, SamplingInputs
from fastattn import SamplerState, SamplingParams, sample
from fastattn.sampling import ERROR_TOKEN, noise, reference
from fastattn.sampling.params import TINY_TEMPERATURE
from fastattn.sampling.problem import SampleProblem, make_sample_problem

EPS = torch.finfo(torch.float32).eps
# Roundings of a value: penalty, presence and frequency, bias, temperature, two logarithms, one sum.
_VALUE_ROUNDINGS = 8
# Of a sum of probabilities in our kernel: a tree over a tile, one tile after another, exponentials.
_OWN_ROUNDINGS = 128
_RATIO_ROUNDINGS = 64
# Deviations of a mean beyond which a distribution is another one.
_FAR = 8.0
DRAWS = 512
CHECKED_ROWS = 128
_MOST_CALLS = 64


def peer_slack(vocab_size: int) -> float:
    """What a peer's cumulative sum over a vocabulary, in any order and float32, may be off by."""
    return 2 * math.sqrt(vocab_size) * EPS


def exact_noise(problem: SampleProblem) -> Tensor:
    """Noise of all tokens, float64 (batch, vocab_size): of the same 40 bits, with exact logarithms.

    1 - u is rounded to float32, as all implementations do.
    """
    seeds, steps = problem.seeds[:, None], problem.steps[:, None]
    tokens = torch.arange(problem.vocab_size, device=problem.device)
    u = noise.uniform(noise.first_bytes(seeds, steps, tokens), noise.words(seeds, steps, tokens))
    near = u.double() + u.double() ** 2 * 0.5
    far = -(1 - u).clamp_min(2.0**-24).double().log()
    return -torch.where(u < 2.0**-10, near, far).log()


@dataclass(frozen=True, eq=False)
class Kept:
    """What a problem's rows may draw from.

    Attributes:
        scores: float64 (batch, vocab_size), the reference's float32 after the temperature.
        slack: float64 (batch, 1), what a score may be off by: 0 where every step is IEEE's.
        certain, possible: bool (batch, vocab_size), what is kept however sums are rounded, and what
            some rounding keeps.
        alone: bool (batch, 1), rows with one winner: greedy, or with a score of +inf.
        failed: bool (batch,), rows without a distribution.
    """

    scores: Tensor
    slack: Tensor
    certain: Tensor
    possible: Tensor
    alone: Tensor
    failed: Tensor

    @property
    def ambiguous(self) -> Tensor:
        """bool (batch,): rows in which rounding decides whether some token is kept."""
        return (self.certain != self.possible).any(-1)


def find_kept(problem: SampleProblem, mass_slack: float) -> Kept:
    """What is surely and what is possibly kept.

    Args:
        mass_slack: what a sum of probabilities may be off by.
    """
    processed = reference.processed(problem)
    failed = processed.isnan().any(-1) | (processed == -math.inf).all(-1)
    temperature = torch.as_tensor(problem.setting("temperature"), device=problem.device)
    heat = temperature.expand(problem.batch)[:, None]
    greedy = heat < TINY_TEMPERATURE
    heat = torch.where(greedy, 1.0, heat).to(processed.dtype)
    scores = (processed / heat).double()
    slack = torch.zeros(problem.batch, 1, dtype=torch.float64, device=problem.device)
    if problem.params.needs_counts:
        # presence + frequency * count may be one fused operation, rounded once and not twice.
        sizes = (problem.logits.float() / heat).abs() + scores.abs()
        largest = sizes.masked_fill(~sizes.isfinite(), 0.0).amax(-1, keepdim=True)
        slack = _VALUE_ROUNDINGS * EPS * (1 + largest)
    # One winner: at temperature 0, and where a score is +inf.
    infinite = scores.amax(-1, keepdim=True) == math.inf
    tokens = torch.arange(problem.vocab_size, device=problem.device)
    winner = torch.where(
        greedy[:, 0], reference.lowest_argmax(processed), reference.lowest_argmax(scores)
    )
    alone, wins = greedy | infinite, tokens == winner[:, None]
    near = wins | ((slack > 0) & (scores >= scores.amax(-1, keepdim=True) - 2 * slack))
    certain, possible = _cut(problem, scores, slack, mass_slack)
    return Kept(
        scores, slack, torch.where(alone, wins, certain), torch.where(alone, near, possible),
        alone, failed,
    )  # fmt: skip


def _cut(
    problem: SampleProblem, scores: Tensor, slack: Tensor, mass_slack: float
) -> tuple[Tensor, Tensor]:
    """What top-k, top-p and min-p surely and possibly keep: the reference's rules, both ways."""
    vocab_size = problem.vocab_size

    def rows(name: str) -> Tensor:
        value = torch.as_tensor(problem.setting(name), device=problem.device)
        return value.expand(problem.batch)[:, None]

    descending = scores.sort(-1, descending=True).values
    least = rows("min_tokens_to_keep").long().clamp(1, vocab_size)
    top_k = rows("top_k").long()
    top_k = torch.where((top_k < 1) | (top_k > vocab_size), vocab_size, top_k.maximum(least))
    kth = descending.gather(1, top_k - 1)
    after = descending.gather(1, top_k.clamp_max(vocab_size - 1))
    all_kept = top_k == vocab_size
    relative = (descending - descending[:, :1]).exp()
    weight = relative if problem.params.joint else relative * (descending >= kth)
    mass = weight / weight.sum(-1, keepdim=True)
    before = mass.cumsum(-1) - mass
    first = torch.searchsorted(-descending, -descending)
    before = before.gather(1, first.clamp_max(vocab_size - 1))
    top_p, ratio = rows("top_p").double(), rows("min_p").double()
    found = []
    for sign in (-1.0, 1.0):
        if sign < 0:
            keep = torch.where(slack > 0, descending > after + 2 * slack, descending >= kth)
            keep = keep | all_kept
        else:
            keep = descending >= kth - 2 * slack
        keep = keep & ((before < top_p + sign * mass_slack) | (top_p >= 1))
        keep = keep & (relative * (1 + sign * _RATIO_ROUNDINGS * EPS) >= ratio)
        last = keep.sum(-1, keepdim=True).maximum(least) - 1
        # What is banned is never drawn, also where nothing is cut.
        found.append((scores >= descending.gather(1, last)) & (scores > -math.inf))
    return found[0], found[1]


# --- fastattn beside the reference


def check_tokens(problem: SampleProblem, drawn: Tensor, expected: Tensor) -> int:
    """Compares the kernel's tokens with the reference's; returns how many are near ties.

    Args:
        problem: with the state as it was before the draw.

    Raises:
        WrongResult: a token is another one, and rounding does not explain it.
    """
    other = drawn != expected
    if not bool(other.any()):
        return 0
    right = explained(problem, drawn)
    if not bool(right.all()):
        row = int((~right).nonzero()[0])
        raise WrongResult(
            f"{int((~right).sum())} of {len(drawn)} tokens are not the reference's, and rounding "
            f"does not explain them: row {row} drew {int(drawn[row])}, the reference "
            f"{int(expected[row])}"
        )
    return int(other.sum())


def explained(problem: SampleProblem, drawn: Tensor) -> Tensor:
    """bool (batch,): whether a token can be the draw of its row, but for rounding."""
    kept = find_kept(problem, _OWN_ROUNDINGS * EPS)
    shift = exact_noise(problem).masked_fill(kept.alone, 0.0)
    values = kept.scores + shift
    raw = problem.logits.double().abs()
    temperature = torch.as_tensor(problem.setting("temperature"), device=problem.device)
    heat = temperature.expand(problem.batch)[:, None].double()
    sizes = kept.scores.abs() + shift.abs() + raw / torch.where(kept.alone, 1.0, heat)
    unsure = _VALUE_ROUNDINGS * EPS * (1 + sizes.masked_fill(~sizes.isfinite(), 0.0))
    # One winner is the lowest of the largest scores: no value of another comes near it.
    unsure = torch.where(kept.alone, kept.slack, unsure)
    bound = (values - unsure).masked_fill(~kept.certain, -math.inf).amax(-1)
    index = drawn.clamp(0, problem.vocab_size - 1)[:, None]
    highest = (values + unsure).gather(1, index)[:, 0]
    possible = kept.possible.gather(1, index)[:, 0] & (index[:, 0] == drawn)
    return torch.where(kept.failed, drawn == ERROR_TOKEN, possible & (highest >= bound))


def check_draw(
    logits: Tensor, params: SamplingParams, state: SamplerState | None, draw: Callable[[], Any]
) -> tuple[Any, SampleProblem, int]:
    """Draws once: tokens are the reference's, and the state is marked with them.

    Args:
        draw: gives tokens, or a `Sample`, and marks `state`.

    Returns:
        What was drawn; the problem with the state before it; and how many near ties there were.

    Raises:
        WrongResult: a token, or an entry of the state, is wrong.
    """
    before = None if state is None else state.clone()
    drawn = draw()
    tokens = drawn if isinstance(drawn, Tensor) else drawn.tokens
    twin = None if before is None else before.clone()
    expected: Any = sample(logits, params, twin, impl="reference")
    expected = expected if isinstance(expected, Tensor) else expected.tokens
    problem = make_sample_problem(logits, params, before)
    near_ties = check_tokens(problem, tokens, expected)
    check_state(before, state, tokens)
    return drawn, problem, near_ties


def check_state(before: SamplerState | None, after: SamplerState | None, tokens: Tensor) -> None:
    """Compares a state after a draw with the one before it, marked with the tokens in plain torch.

    Raises:
        WrongResult: an entry differs.
    """
    if before is None or after is None:
        return
    marked = before.clone()
    marked.add(tokens)
    for name in ("seen", "counts", "step"):
        one, two = getattr(after, name), getattr(marked, name)
        if one is not None and not torch.equal(one, two):
            row = int((one != two).view(len(tokens), -1).any(-1).nonzero()[0])
            raise WrongResult(f"{name} of row {row} does not hold the token that was drawn")


# --- anyone, over many draws


class SamplingChecker:
    """What is right for a case, computed once for all providers.

    Of a large batch 128 rows are looked at, the first and the last among them.

    Args:
        inputs: of the case; the settings of a case are numbers.
        draws: tokens that are looked at at least, of at most 64 calls.
    """

    def __init__(self, inputs: SamplingInputs, draws: int = DRAWS) -> None:
        self._inputs = inputs
        rows = spread(inputs.case.batch, CHECKED_ROWS)
        self._calls = min(_MOST_CALLS, max(2, -(-draws // len(rows))))
        self._index = torch.tensor(rows, device=inputs.logits.device)
        problem = self._problem(inputs.state)
        self._possible = find_kept(problem, peer_slack(inputs.case.vocab_size)).possible
        scores = reference.filtered(problem.logits, problem.params, problem.state)
        self._log_p = scores.double().log_softmax(-1)
        surprise = self._log_p.masked_fill(self._log_p == -math.inf, 0.0)
        p = self._log_p.exp()
        mean = (p * surprise).sum(-1)
        self._mean = float(mean.sum())
        self._variance = float((p * (surprise - mean[:, None]) ** 2).sum())

    def _problem(self, state: SamplerState | None) -> SampleProblem:
        """The rows that are looked at, with seeds as they are now."""
        inputs, index = self._inputs, self._index
        if state is not None:
            state = SamplerState(state.seen[index], state.step[index], state.vocab_size)
        params = SamplingParams(seed=inputs.seeds[index], **SETTINGS[inputs.case.setting])
        return make_sample_problem(inputs.logits[index], params, state)

    def check(self, provider: Provider, run: Callable[[], Any]) -> dict[str, Any]:
        """Checks what a provider's function draws; returns what a row keeps of it.

        Raises:
            WrongResult: a token is not one that could be drawn, or too seldom what it should be.
        """
        inputs = self._inputs
        row: dict[str, Any] = {}
        if provider.is_ours:
            row["near_ties"] = self._check_ours(run)
        inputs.rewind()
        first = run()
        if first.is_floating_point():
            if not torch.equal(first, inputs.logits.amax(-1)):
                raise WrongResult("what is not tokens must be the largest logit of each row")
            return row
        drawn = [self._check_form(first)]
        for _ in range(self._calls - 1):
            inputs.rewind()
            drawn.append(self._check_form(run()))
        inputs.rewind()
        return {**row, **self._judge(torch.stack(drawn, 1)[self._index])}

    def _check_ours(self, run: Callable[[], Any]) -> int:
        """One draw beside the reference's, and the state after it; how many near ties there are."""
        state = self._inputs.state
        before = None if state is None else state.clone()
        tokens = run()
        check_state(before, state, tokens)
        problem = self._problem(before)
        twin = None if problem.state is None else problem.state.clone()
        expected: Any = sample(problem.logits, problem.params, twin, impl="reference")
        return check_tokens(problem, tokens[self._index], expected)

    def _check_form(self, tokens: Tensor) -> Tensor:
        if tokens.shape != (self._inputs.case.batch,) or tokens.is_floating_point():
            raise WrongResult(
                f"expected tokens of shape ({self._inputs.case.batch},), got {tokens.dtype} of "
                f"shape {tuple(tokens.shape)}"
            )
        return tokens.long().clone()

    def _judge(self, tokens: Tensor) -> dict[str, Any]:
        """Tokens (rows, calls)."""
        vocab_size = self._inputs.case.vocab_size
        index = tokens.clamp(0, vocab_size - 1)
        wrong = ~self._possible.gather(1, index) | (index != tokens)
        if bool(wrong.any()):
            row, call = wrong.nonzero()[0].tolist()
            raise WrongResult(
                f"{int(wrong.sum())} of {tokens.numel()} tokens lie outside of the set that is "
                f"kept, the first {int(tokens[row, call])} in row {int(self._index[row])}"
            )
        log_p = self._log_p.gather(1, index)
        # What only a rounded border keeps has no probability in the reference: it is left out.
        real = log_p > -math.inf
        found: dict[str, Any] = {"draws": tokens.numel()}
        if self._variance > 0:
            expected = self._mean * tokens.shape[1]
            total = float(log_p.masked_fill(~real, 0.0).sum())
            found["deviations"] = (total - expected) / math.sqrt(self._variance * tokens.shape[1])
            if abs(found["deviations"]) > _FAR:
                raise WrongResult(
                    f"the mean log-probability of {tokens.numel()} draws is "
                    f"{total / tokens.numel():.4f}, that of the distribution "
                    f"{expected / tokens.numel():.4f}: {found['deviations']:.1f} deviations apart"
                )
        return found
