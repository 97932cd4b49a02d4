"""Sampling in the benchmarks, without a GPU: cases, what is right, providers, stages, targets."""

from __future__ import annotations

import io
import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import plan, report, sampling_providers, sampling_sweep, stages
from benchmarks.accuracy import WrongResult
from benchmarks.measure import rank
from benchmarks.progress import Progress
from benchmarks.providers import Provider
from benchmarks.results import Results
from benchmarks.sampling_accuracy import SamplingChecker
from benchmarks.sampling_cases import (
    BATCHES,
    DTYPES,
    SETTINGS,
    VOCAB_SIZES,
    SamplingCase,
    SamplingInputs,
    make_sampling_inputs,
    sampling_cases,
    sampling_sweep_cases,
)
from benchmarks.sampling_checks import SampleCheck, as_config
from benchmarks.timing import HostTimer, Timing
from fastattn import sample
from fastattn.testing import WorkMeter

CPU = torch.device("cpu")
TINY = SamplingCase(6, 300, "top-k + top-p", "float32")
PENALTY = replace(TINY, setting="penalty, top-k + top-p")


class FixedTimer:
    """Runs everything once and says that it took so many milliseconds."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def __call__(self, runs: list[Callable[[], Any]]) -> Timing:
        for run in runs:
            run()
        return Timing(self.ms, self.ms, self.ms, 1, f"made up {self.ms}")


def reference(
    name: str = "fastattn", change: Callable[[Tensor], Any] = lambda tokens: tokens
) -> Provider:
    """The reference implementation, whose tokens `change` may spoil."""
    base = sampling_providers.fastattn_sampling(name, impl="reference")

    def prepare(inputs: SamplingInputs) -> Callable[[], Any]:
        run = base.prepare(inputs)
        return lambda: change(run())

    return replace(base, prepare=prepare)


def make_bench(tmp_path: Path, own_plan: plan.Plan, providers: list[Provider]) -> stages.Bench:
    environment = {"device": "TEST", "date": "2000-01-01T00:00", "torch": "0", "triton": "0"}
    bench = stages.Bench(
        plan=own_plan,
        device=CPU,
        chip="interpreter",
        timer=FixedTimer(2.0),
        host_timer=HostTimer(calls=1, samples=2),
        sampling_timer=FixedTimer(0.5),
        sweep_timer=FixedTimer(0.25),
        providers=[],
        sampling_providers=providers,
        results=Results(tmp_path / "results.json", environment=environment, providers={}),
        progress=Progress(own_plan.total_seconds, io.StringIO()),
    )
    bench.results.document["ceilings"] = {"copy_gb_per_s": 1.0, "matmul_tflops": 1.0}
    return bench


def saved(bench: stages.Bench) -> dict[str, Any]:
    return json.loads(bench.results.path.read_text())


# --- cases


def test_matrix_is_every_batch_vocabulary_dtype_and_setting() -> None:
    found = sampling_cases()
    assert len(found) == len(set(found)) == len(set(map(str, found)))
    peaked = {(x.batch, x.vocab_size, x.dtype, x.setting) for x in found if x.family == "peaked"}
    assert peaked == {
        (batch, vocab_size, dtype, setting)
        for batch in (1, 4, 16, 64, 256, 512)
        for vocab_size in (32000, 128256)
        for dtype in ("bfloat16", "float32")
        for setting in SETTINGS
    }
    assert set(BATCHES) == {1, 4, 16, 64, 256, 512} and set(VOCAB_SIZES) == {32000, 128256}
    assert found[0] == SamplingCase(64, 128256, "top-k + top-p")
    assert set(sampling_cases(quick=True)) < set(found)
    assert set(sampling_sweep_cases(quick=True)) < set(sampling_sweep_cases()) < set(found)
    # Of either class of batches that dispatch tells apart.
    assert {case.batch <= 8 for case in sampling_sweep_cases(quick=True)} == {True, False}


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_what_the_case_says(dtype: str) -> None:
    case = replace(PENALTY, dtype=dtype, batch=70)
    inputs = make_sampling_inputs(case, CPU)
    assert inputs.logits.numel() * inputs.logits.itemsize == case.bytes
    assert str(inputs.logits.dtype) == f"torch.{dtype}" and inputs.logits.isfinite().all()
    assert not torch.equal(inputs.logits[0], inputs.logits[69])
    assert inputs.state is not None and (inputs.state.seen != 0).any(1).all()
    before = inputs.state.clone()
    first = sample(inputs.logits, inputs.params, inputs.state, impl="reference")
    assert inputs.state.step.tolist() == [1] * 70
    seeds, pointers = inputs.seeds.clone(), (inputs.seeds.data_ptr(), inputs.state.seen.data_ptr())
    inputs.rewind()
    assert (inputs.seeds != seeds).all() and torch.equal(inputs.state.seen, before.seen)
    assert pointers == (inputs.seeds.data_ptr(), inputs.state.seen.data_ptr())
    second = sample(inputs.logits, inputs.params, inputs.state, impl="reference")
    assert not torch.equal(first, second)


def test_flat_logits_keep_most_of_the_vocabulary_and_peaked_ones_little() -> None:
    shares = {}
    for family in ("peaked", "flat"):
        case = SamplingCase(8, 4000, "top-p", "float32", family)
        inputs = make_sampling_inputs(case, CPU)
        checker = SamplingChecker(inputs)
        shares[family] = float(checker._possible.float().mean())
    assert shares["peaked"] < 0.05 and shares["flat"] > 0.5


@pytest.mark.interpreter
@pytest.mark.parametrize("setting", ["temperature", "penalty, top-k + top-p"])
def test_predicted_bytes_are_those_of_the_kernel(setting: str) -> None:
    """Candidates are counted at their most, and lie between half of it and that."""
    case = SamplingCase(2, 9000, setting, "float32")
    inputs = make_sampling_inputs(case, CPU)
    config = sampling_sweep.current_config(case, CPU)
    run = sampling_sweep.config_provider(config).prepare(inputs)
    with WorkMeter() as work:
        run()
    moved = work.bytes_loaded + work.bytes_stored
    predicted = case.predicted_bytes(*config[:2])
    assert 0.97 * predicted <= moved <= predicted


# --- no time without the right tokens


@pytest.mark.parametrize("case", [TINY, PENALTY, replace(TINY, setting="greedy")], ids=str)
def test_the_reference_is_right(case: SamplingCase) -> None:
    inputs = make_sampling_inputs(case, CPU)
    provider = reference()
    row = SamplingChecker(inputs, draws=200).check(provider, provider.prepare(inputs))
    assert row["near_ties"] == 0 and row["draws"] == 204
    assert abs(row.get("deviations", 0.0)) < 4


def _bump(tokens: Tensor) -> Tensor:
    return (tokens + 1) % TINY.vocab_size


@pytest.mark.parametrize(
    ("setting", "change", "message"),
    [
        ("top-k + top-p", _bump, "are not the reference's"),
        ("greedy", _bump, "are not the reference's"),
        ("top-k + top-p", lambda tokens: tokens.float(), "largest logit"),
    ],
)
def test_a_wrong_token_of_ours_is_found(
    setting: str, change: Callable[[Tensor], Any], message: str
) -> None:
    inputs = make_sampling_inputs(replace(TINY, setting=setting), CPU)
    provider = reference(change=change)
    with pytest.raises(WrongResult, match=message):
        SamplingChecker(inputs).check(provider, provider.prepare(inputs))


def test_a_state_that_does_not_hold_the_token_is_found() -> None:
    inputs = make_sampling_inputs(PENALTY, CPU)
    run = reference().prepare(inputs)
    assert inputs.state is not None
    seen = inputs.state.seen

    def forgets() -> Tensor:
        before = seen.clone()
        tokens = run()
        seen.copy_(before)
        return tokens

    with pytest.raises(WrongResult, match="seen of row"):
        SamplingChecker(inputs).check(reference(), forgets)


def _support_without(inputs: SamplingInputs) -> Callable[[], Tensor]:
    """Draws from all of the softmax."""
    return lambda: torch.multinomial(inputs.logits.softmax(-1), 1)[:, 0]


def _likeliest(inputs: SamplingInputs) -> Callable[[], Tensor]:
    return lambda: inputs.logits.argmax(-1)


def _wrong_shape(inputs: SamplingInputs) -> Callable[[], Tensor]:
    return lambda: inputs.logits.argmax(-1)[:, None]


@pytest.mark.parametrize(
    ("setting", "prepare", "message"),
    [
        ("top-k + top-p", _support_without, "lie outside of the set that is kept"),
        ("greedy", _support_without, "lie outside"),
        ("temperature", _support_without, "deviations apart"),
        ("top-p", _likeliest, "deviations apart"),
        ("top-k + top-p", _wrong_shape, "expected tokens of shape"),
    ],
)
def test_a_peer_that_draws_from_something_else_is_found(
    setting: str, prepare: Callable[[SamplingInputs], Callable[[], Tensor]], message: str
) -> None:
    torch.manual_seed(0)
    inputs = make_sampling_inputs(replace(TINY, setting=setting, batch=64), CPU)
    with pytest.raises(WrongResult, match=message):
        SamplingChecker(inputs).check(Provider("peer", prepare), prepare(inputs))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [sampling_providers.SORT_CHAIN, sampling_providers.TRANSFORMERS])
def test_peers_draw_from_the_same_distribution(name: str, setting: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    (provider,) = [x for x in sampling_providers.find_sampling_providers() if x.name == name]
    for dtype in DTYPES:
        inputs = make_sampling_inputs(replace(TINY, setting=setting, batch=64, dtype=dtype), CPU)
        row = SamplingChecker(inputs).check(provider, provider.prepare(inputs))
        assert row["draws"] >= 512
        assert setting == "greedy" or abs(row["deviations"]) < 4


# --- providers


class FakeFlashInfer(types.ModuleType):
    """flashinfer.sampling in torch, which records what it was called with."""

    def __init__(self) -> None:
        super().__init__("flashinfer.sampling")
        self.places: list[tuple[int, int]] = []

    def _draw(self, scores: Tensor, seed: int, offset: int) -> Tensor:
        assert scores.dtype == torch.float32
        self.places.append((seed, offset))
        generator = torch.Generator().manual_seed(seed + offset)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0].int()

    def softmax(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        return (logits / temperature).softmax(-1)

    def sampling_from_logits(self, logits: Tensor, *, seed: int, offset: int) -> Tensor:
        return self._draw(logits, seed, offset)

    def sampling_from_probs(self, probs: Tensor, *, seed: int, offset: int) -> Tensor:
        return self._draw(probs.log(), seed, offset)

    def top_p_sampling_from_probs(
        self, probs: Tensor, top_p: float, *, seed: int, offset: int
    ) -> Tensor:
        values, tokens = probs.sort(-1, descending=True)
        kept = values.masked_fill(values.cumsum(-1) - values >= top_p, 0.0)
        return self._draw(torch.zeros_like(probs).scatter(1, tokens, kept).log(), seed, offset)

    def top_k_top_p_sampling_from_logits(
        self, logits: Tensor, top_k: int, top_p: float, *, seed: int, offset: int
    ) -> Tensor:
        kth = logits.topk(top_k).values[:, -1:]
        probs = logits.masked_fill(logits < kth, -math.inf).softmax(-1)
        return self.top_p_sampling_from_probs(probs, top_p, seed=seed, offset=offset)


def test_flashinfer_is_called_as_its_version_0_6_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    package, library = types.ModuleType("flashinfer"), FakeFlashInfer()
    package.__version__, package.sampling, package.__path__ = "0.6.13", library, []
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", library)
    found = {x.name: x for x in sampling_providers.find_sampling_providers()}
    ways = [found["FlashInfer"], found["FlashInfer, probabilities"]]
    assert [x.version for x in ways] == ["0.6.13"] * 2
    ran = []
    for setting in SETTINGS:
        case = replace(TINY, setting=setting, batch=32, dtype="bfloat16")
        inputs = make_sampling_inputs(case, CPU)
        for provider in ways:
            if not provider.reason_to_skip(case):
                SamplingChecker(inputs).check(provider, provider.prepare(inputs))
                ran.append((provider.name, setting))
                # No two draws of a function have the same place.
                assert len(set(library.places)) == len(library.places) > 10
                library.places.clear()
    first, second = (x.name for x in ways)
    assert ran == [
        (first, "top-k + top-p"), (first, "top-p"), (first, "temperature"), (second, "temperature")
    ]  # fmt: skip


def test_peers_are_named_and_say_what_they_do_not_draw() -> None:
    found = {x.name: x for x in sampling_providers.find_sampling_providers()}
    assert list(found)[:2] == ["fastattn", "logits.amax"]
    for provider in found.values():
        assert provider.version or provider.absent, provider.name
    peer = replace(found["FlashInfer"], absent="")
    assert "penalties" in peer.reason_to_skip(PENALTY)
    assert "greedy" in peer.reason_to_skip(replace(TINY, setting="greedy"))
    assert peer.reason_to_skip(TINY) == ""
    for name in ("fastattn", "logits.amax", "torch sort chain", "transformers"):
        assert found[name].skip(PENALTY) == ""


def test_the_floor_is_no_peer() -> None:
    rows = [
        {"provider": "fastattn", "ms": 1.2},
        {"provider": "logits.amax", "ms": 1.0, "role": "floor"},
        {"provider": "torch sort chain", "ms": 6.0},
    ]
    rank(rows)
    ours, floor, chain = rows
    assert ours["ratio_to_floor"] == 1.2 and ours["ratio_to_best_peer"] == 5.0
    assert "ratio_to_floor" not in floor and chain["ratio_to_floor"] == 6.0


# --- the stages


def test_wrong_providers_get_no_time_and_ours_fails_the_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    peers = sampling_providers.find_sampling_providers()
    providers = [
        reference(),
        peers[1],
        Provider("wrong", _likeliest),
        replace(reference("picky"), skip=lambda case: "no"),
        Provider("absent", _likeliest, absent="not installed"),
        next(x for x in peers if x.name == sampling_providers.SORT_CHAIN),
    ]
    case = replace(TINY, batch=64)
    own_plan = plan.Plan(stages=["sampling"], sampling=[case], total_seconds=300)
    bench = make_bench(tmp_path, own_plan, providers)
    assert stages.run_plan(bench), bench.failures
    rows = {row["provider"]: row for row in saved(bench)["rows"]}
    assert list(rows) == ["fastattn", "logits.amax", "wrong", "picky", "torch sort chain"]
    assert "deviations apart" in rows["wrong"]["error"] and "ms" not in rows["wrong"]
    ours = rows["fastattn"]
    assert (ours["ms"], ours["method"], ours["near_ties"]) == (0.5, "made up 0.5", 0)
    assert ours["ratio_to_floor"] == 1.0 and ours["ratio_to_best_peer"] == 1.0
    assert ours["gb_per_s"] == pytest.approx(case.bytes / 0.5e6, rel=1e-5)
    assert ours["percent_of_copy"] == pytest.approx(100 * case.bytes / 0.5e6, rel=1e-5)
    assert "tflops" not in ours and rows["logits.amax"]["role"] == "floor"
    assert len(saved(bench)["summary"]["sampling_targets"]) == 3
    spoiled = make_bench(tmp_path, own_plan, [reference(change=_bump)])
    assert not stages.run_plan(spoiled) and "sampling, 64 x 300" in spoiled.failures[0]


@pytest.mark.interpreter
def test_stages_of_sampling_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, with the kernels in the interpreter and one config that cannot be right."""
    monkeypatch.setattr(sampling_sweep, "BLOCKS", (128, 96))
    monkeypatch.setattr(sampling_sweep, "CAPACITIES", (64,))
    monkeypatch.setattr(sampling_sweep, "WARPS", (4,))
    check_run = SampleCheck.run
    monkeypatch.setattr(
        SampleCheck,
        "run",
        lambda self, device: check_run(replace(self, group="joint", batches=(1,)), device),
    )
    case = SamplingCase(2, 200, "top-k + top-p", "float32")
    own_plan = plan.Plan(
        stages=["parity", "ceilings", "sampling", "sampling-sweep"],
        checks=[SampleCheck("numbers", "bf16", 100)],
        sampling=[case, replace(case, setting="penalty, top-k + top-p")],
        sampling_sweep=[case],
        copy_bytes=2**20,
        matmul_size=64,
        total_seconds=600,
    )
    # So few draws that the interpreter gets through them.
    monkeypatch.setattr("benchmarks.sampling_accuracy._MOST_CALLS", 4)
    amax = sampling_providers.find_sampling_providers()[1]
    bench = make_bench(tmp_path, own_plan, [sampling_providers.fastattn_sampling(), amax])
    right = stages.run_plan(bench)
    document = saved(bench)
    assert bench.failures == [] and right
    assert {stage["status"] for stage in document["stages"].values()} == {"done"}
    ours = [row for row in document["rows"] if row.get("provider") == "fastattn"]
    assert [row["case"]["label"] for row in ours] == list(map(str, own_plan.sampling))
    assert all(row["ratio_to_floor"] == 1.0 and row["draws"] == 8 for row in ours)
    assert all(row["predicted_bytes"] > row["case"]["bytes"] for row in ours)
    swept = [x for x in document["rows"] if x["stage"] == "sampling-sweep" and "case" in x]
    assert [row["config"]["block"] for row in swept if "error" in row] == [96]
    timed = [row for row in swept if "ms" in row]
    assert [(row["config"]["block"], row["current"]) for row in timed] == [
        (256, True),
        (128, False),
    ]
    (best,) = document["summary"]["best_sampling_configs"]
    assert best["ms"] == 0.25 and best["speedup_over_current"] == 1.0
    titles = [table.title for table in report.tables(document)]
    assert "Best configs of the sampling sweep" in titles
    assert any(title.startswith("sampling: us") for title in titles)
    assert str(as_config((128, 64, 4))) == "128 tokens, 64 kept, 4 warps"
