"""What must be right of sampling before it is timed: every check finds what it is for."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import parity, plan, sampling_checks
from benchmarks.accuracy import WrongResult
from benchmarks.sampling_accuracy import EPS, check_tokens, exact_noise, explained, find_kept
from benchmarks.sampling_checks import (
    GROUPS,
    SampleCheck,
    SampleGraphCheck,
    SampleInvarianceCheck,
    make_rows,
)
from benchmarks.sampling_logprobs import check_logprobs
from fastattn import SamplerState, SamplingParams, sample
from fastattn.sampling import Sample, reference
from fastattn.sampling.noise import gumbel
from fastattn.sampling.problem import SampleProblem, make_sample_problem

CPU = torch.device("cpu")
VOCAB = 211


def problem_of(group: str, place: int = 0, batch: int = 7, dtype: str = "fp32") -> SampleProblem:
    """A setting of a group on rows of every kind."""
    logits = make_rows(batch, VOCAB, dtype, CPU)
    state = None
    if group in ("repetition", "penalties"):
        state = sampling_checks._make_state(batch, VOCAB, group == "penalties", CPU)
    settings = GROUPS[group](batch, VOCAB, CPU)[place]
    params = SamplingParams(seed=torch.arange(batch) * 31 + 2**33, **settings)
    return make_sample_problem(logits, params, state)


def drawn_by_reference(problem: SampleProblem) -> Any:
    state = None if problem.state is None else problem.state.clone()
    return sample(problem.logits, problem.params, state, impl="reference")


# --- which tokens are right

ALL = [(group, place) for group in GROUPS for place in range(len(GROUPS[group](7, VOCAB, CPU)))]


@pytest.mark.parametrize(("group", "place"), ALL)
def test_kept_is_what_the_reference_keeps(group: str, place: int) -> None:
    for batch, dtype in ((7, "fp32"), (5, "bf16")):
        problem = problem_of(group, place, batch, dtype)
        kept = find_kept(problem, 0.0)
        scores = reference.filtered(problem.logits, problem.params, problem.state)
        failed = scores.isnan().any(-1)
        assert torch.equal(kept.failed, failed)
        wanted = (scores > -math.inf)[~failed]
        assert (kept.certain & ~kept.possible)[~failed].sum() == 0
        assert not (kept.certain[~failed] & ~wanted).any()
        assert not (wanted & ~kept.possible[~failed]).any()
        if group != "penalties" and "min_p" not in GROUPS[group](7, VOCAB, CPU)[place]:
            # Every step is IEEE's: nothing is left to rounding but sums, which are exact here.
            assert torch.equal(kept.certain[~failed], wanted)
            assert torch.equal(kept.possible[~failed], wanted)


def test_noise_is_the_references_but_for_the_rounding_of_logarithms() -> None:
    problem = problem_of("numbers", batch=64)
    tokens = torch.arange(VOCAB)
    rounded = gumbel(problem.seeds[:, None], problem.steps[:, None], tokens).double()
    exact = exact_noise(problem)
    assert ((rounded - exact).abs() <= 4 * EPS * (1 + exact.abs())).all()
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize(("group", "place"), ALL)
def test_the_reference_explains_itself(group: str, place: int) -> None:
    problem = problem_of(group, place)
    drawn = drawn_by_reference(problem)
    tokens = drawn if isinstance(drawn, Tensor) else drawn.tokens
    assert explained(problem, tokens).all()
    # No other token is one that rounding could give.
    for shift in (1, 57, 100):
        others = torch.where(tokens < 0, 5, (tokens + shift) % VOCAB)
        assert not explained(problem, others).any()


def near_tie(gap: float) -> tuple[SampleProblem, Tensor, Tensor]:
    """A row whose two best values lie `gap` rounding units of the best apart, and their tokens."""
    problem = problem_of("numbers", batch=1)
    value = reference.processed(problem).double() + exact_noise(problem)
    first, second = value.topk(2).indices[0]
    logits = problem.logits.clone()
    shift = float(value[0, first] - value[0, second])
    logits[0, second] += shift - gap * EPS * float(value[0, first].abs())
    return make_sample_problem(logits, problem.params, None), first[None], second[None]


def test_only_rounding_makes_a_near_tie() -> None:
    problem, first, second = near_tie(2.0)
    assert check_tokens(problem, second, second) == 0
    assert check_tokens(problem, second, first) == check_tokens(problem, first, second) == 1
    problem, first, second = near_tie(200.0)
    assert torch.equal(drawn_by_reference(problem), first)
    with pytest.raises(WrongResult, match=f"row 0 drew {int(second)}, the reference {int(first)}"):
        check_tokens(problem, second, first)


def test_a_token_on_a_border_of_mass_may_be_kept_or_cut() -> None:
    """Four tokens of a quarter: the third begins at a half, which is where top_p cuts."""
    quarters = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).mul(1e-3)
    mass = quarters.double().softmax(-1).cumsum(-1)[0]
    for shift, ambiguous in ((0.0, True), (1e-4, False), (-1e-4, False)):
        params = SamplingParams(seed=torch.tensor([5]), top_p=float(mass[1]) + shift)
        problem = make_sample_problem(quarters, params, None)
        kept = find_kept(problem, 128 * EPS)
        assert kept.ambiguous.tolist() == [ambiguous]
        assert kept.certain.sum() == (3 if shift > 0 else 2)
        # What is kept in one way of two may be drawn, and need not be.
        best_of = [
            (kept.scores + exact_noise(problem)).masked_fill(~own, -math.inf).argmax(-1)
            for own in (kept.certain, kept.possible)
        ]
        assert all(explained(problem, token).all() for token in best_of)


# --- checks


def test_plan_covers_every_config_dtype_batch_and_group() -> None:
    from fastattn.kernels.sampling.config import CONFIGS, FEW_ROWS, select_sample_config

    found = plan.make_plan("sm_90", ["parity"], 500, quick=False, workers=0, subjects=["sampling"])
    checks = list(found.checks)
    assert pickle.loads(pickle.dumps(checks)) == checks and len(checks) == len(set(checks))
    draws = [check for check in checks if isinstance(check, SampleCheck)]
    for dtype in parity.DTYPES:
        own = [check for check in draws if check.dtype == dtype]
        assert {check.group for check in own} == set(GROUPS)
        assert any(isinstance(check, SampleGraphCheck) and check.dtype == dtype for check in checks)
        assert any(isinstance(x, SampleInvarianceCheck) and x.dtype == dtype for x in checks)
    half = [check for check in draws if check.dtype == "bf16"]
    assert {32000, 50257, 128256, 151936} <= {x.vocab_size for x in half if x.group == "numbers"}
    assert {check.batches for check in draws} == {(7, 1, 64)}
    for chip in CONFIGS:
        checked = {
            select_sample_config(chip, check.vocab_size, 0, batch)
            for check in half
            for batch in check.batches
        }
        for vocab_size in (2, 127, 129, 500, 1000, 2000, 5000, 32000, 10**6):
            for batch in (1, FEW_ROWS, FEW_ROWS + 1, 512):
                assert select_sample_config(chip, vocab_size, 0, batch) in checked
    only_attention = plan.make_plan(
        "sm_90", ["parity"], 500, quick=False, workers=0, subjects=["attention"]
    )
    assert not any(isinstance(check, SampleCheck) for check in only_attention.checks)


def test_rows_are_of_every_kind() -> None:
    logits = make_rows(7, VOCAB, "bf16", CPU)
    assert logits.dtype == torch.bfloat16
    assert (logits[1] == -math.inf).all() and logits[5].isnan().sum() == 1
    assert (logits[3] == math.inf).sum() == 2 and logits[2].argmax() == VOCAB // 3
    assert logits[4].unique().numel() == 10 and (logits[6] == 0).all()
    assert logits[6].signbit().any() and not logits[6].signbit().all()
    assert make_rows(64, VOCAB, "fp32", CPU).isfinite().all()


@pytest.fixture
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One setting of each group, since the interpreter is slow."""
    for name, make in dict(GROUPS).items():
        place = 9 if name == "numbers" else 0
        monkeypatch.setitem(
            GROUPS, name, lambda *args, make=make, place=place: [make(*args)[place]]
        )
    monkeypatch.setattr(sampling_checks, "_STEPS", 2)


def small(group: str, **fields: Any) -> SampleCheck:
    return replace(SampleCheck(group, "bf16", VOCAB, (7,)), **fields)


@pytest.mark.usefixtures("few_settings")
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_right(group: str, device: str) -> None:
    result = parity.run_check(small(group), device)
    assert "error" not in result, result
    assert result["draws"] == 7 * (2 if group in ("repetition", "penalties") else 1)
    assert result["near_ties"] == 0


@pytest.mark.usefixtures("few_settings")
def test_a_check_runs_its_config(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels.sampling import sampler

    launched = []
    kernel = sampler._sample_kernel

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def launch(*args: Any, **kwargs: Any) -> Any:
                launched.append((kwargs["BLOCK"], kwargs["CAPACITY"], kwargs["num_warps"]))
                return kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(sampler, "_sample_kernel", Recorder())
    result = parity.run_check(small("numbers", config=(128, 32, 4), batches=(2,)), device)
    assert "error" not in result and launched == [(128, 32, 4)]


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], Any]) -> None:
    """What the kernel draws is changed: `change` of the draw and the state."""

    def spoiled(logits: Tensor, params: Any, state: Any = None, *, impl: str = "auto") -> Any:
        # The reference in the kernel's place: these tests are of the checks.
        return change(sample(logits, params, state, impl="reference"), state)

    monkeypatch.setattr(sampling_checks, "sample", spoiled)


def _other_token(drawn: Any, state: Any) -> Any:
    drawn[0] += 1
    return drawn


def _no_error(drawn: Any, state: Any) -> Any:
    return drawn.clamp_min(0)


def _forgets(drawn: Any, state: SamplerState) -> Any:
    state.seen[0] = 0
    return drawn


def _counts_twice(drawn: Any, state: SamplerState) -> Any:
    assert state.counts is not None
    state.counts[0, drawn[0]] += 1
    return drawn


def _stays(drawn: Any, state: SamplerState) -> Any:
    state.step.sub_(1)
    return drawn


def _less_likely(drawn: Sample, state: Any) -> Sample:
    assert drawn.logprobs is not None
    return drawn._replace(logprobs=drawn.logprobs - 1e-4)


def _reversed(drawn: Sample, state: Any) -> Sample:
    assert drawn.top_tokens is not None
    return drawn._replace(top_tokens=drawn.top_tokens.flip(1))


@pytest.mark.usefixtures("few_settings")
@pytest.mark.parametrize(
    ("group", "change", "message"),
    [
        ("numbers", _other_token, "1 of 7 tokens are not the reference's"),
        ("numbers", _no_error, "row 1 drew 0, the reference -1"),
        ("repetition", _forgets, "step 0, .*seen of row 0"),
        ("penalties", _counts_twice, "counts of row 0"),
        ("repetition", _stays, "step of row 0"),
        ("log-probabilities", _less_likely, "log-probability: FAILED"),
        ("log-probabilities", _reversed, "likeliest tokens"),
    ],
)
def test_a_check_finds_what_is_wrong(
    group: str, change: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda drawn, state: drawn)
    assert "error" not in parity.run_check(small(group, dtype="fp32"), "cpu")
    spoil(monkeypatch, change)
    error = parity.run_check(small(group, dtype="fp32"), "cpu")["error"]
    assert re.search(message, error), error


@pytest.mark.usefixtures("few_settings")
def test_many_near_ties_are_no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda drawn, state: drawn)
    monkeypatch.setattr(
        sampling_checks, "check_draw", lambda logits, params, state, draw: (draw(), None, 2)
    )
    assert "not chance" in parity.run_check(small("numbers"), "cpu")["error"]


def test_a_token_that_the_reference_does_not_have_twice() -> None:
    problem = problem_of("log-probabilities", batch=5)
    drawn = drawn_by_reference(problem)
    check_logprobs(problem, drawn)
    twice = drawn.top_tokens.clone()
    twice[0, 1] = twice[0, 0]
    with pytest.raises(WrongResult, match="likeliest tokens of row 0"):
        check_logprobs(problem, drawn._replace(top_tokens=twice))
    late = drawn._replace(logprobs=drawn.logprobs.masked_fill(torch.arange(5) == 2, math.nan))
    with pytest.raises(WrongResult, match="NaN in rows"):
        check_logprobs(problem, late)


# --- graphs and batches


@pytest.mark.usefixtures("few_settings")
def test_replays_are_compared_with_calls(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SampleGraphCheck("fp32", VOCAB, 3, 3)
    assert parity.run_check(task, device).get("error") is None
    capture = sampling_checks.captured

    def stale(step: Callable[[], Tensor], state: list[Tensor]) -> Callable[[], Tensor]:
        """A graph that does not see the state on the device advance."""
        run, first = capture(step, state), [x.clone() for x in state]

        def replay() -> Tensor:
            for tensor, own in zip(state, first, strict=True):
                tensor.copy_(own)
            return run()

        return replay

    monkeypatch.setattr(sampling_checks, "captured", stale)
    assert "replay" in parity.run_check(task, device)["error"]


@pytest.mark.usefixtures("few_settings")
def test_rows_are_compared_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    task = SampleInvarianceCheck("fp32", VOCAB)
    spoil(monkeypatch, lambda drawn, state: drawn)
    assert "error" not in parity.run_check(task, "cpu")
    spoil(monkeypatch, lambda drawn, state: (drawn + (len(drawn) == 7)) % VOCAB)
    assert "in a batch of 7" in parity.run_check(task, "cpu")["error"]
    # With configs of their own, rows may differ where they are near ties, and these are none.
    monkeypatch.setitem(_measured(), ("sm_90", "few"), (2048, 64, 8))
    assert "rounding does not explain" in parity.run_check(task, "cpu")["error"]


def _measured() -> dict[Any, Any]:
    from fastattn.kernels.sampling import config

    return config.MEASURED_SAMPLE
