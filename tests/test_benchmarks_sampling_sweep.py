"""The sweep of sampling configs: what is tried, and how its winner becomes dispatch's choice."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sampling_sweep
from benchmarks.sampling_accuracy import SamplingChecker
from benchmarks.sampling_cases import SamplingCase, make_sampling_inputs, sampling_sweep_cases
from benchmarks.sampling_checks import SampleCheck
from fastattn.kernels.measured import Measured
from fastattn.kernels.sampling.config import SampleConfig
from tests.bad_arguments import check

CPU = torch.device("cpu")
CASE = SamplingCase(64, 128256, "top-k + top-p")
FEW = replace(CASE, batch=1)


def test_every_config_whose_tiles_fit_is_tried_and_todays_first() -> None:
    found = sampling_sweep.candidates(CASE, CPU)
    assert found[0] == sampling_sweep.current_config(CASE, CPU) and len(found) == len(set(found))
    tried = set(found)
    assert {block for block, *_ in tried} == {2048, 4096, 8192}
    assert {capacity for _, capacity, _ in tried} == {64, 128}
    assert {warps for *_, warps in tried} == {4, 8, 16}
    # 64 scores of a tile to a thread of 4 warps, and 32 candidates of a row.
    assert not {(8192, 64, 4), (8192, 128, 4), (2048, 64, 4), (2048, 128, 8)} & tried
    assert {(4096, 64, 16), (4096, 64, 4), (2048, 64, 8), (8192, 128, 8)} <= tried
    assert len(tried) == 12


def test_each_config_is_checked_on_what_it_is_timed_on() -> None:
    for case in sampling_sweep_cases():
        for config in sampling_sweep.candidates(case, CPU):
            (own,) = sampling_sweep.checks_of(case, config)
            assert isinstance(own, SampleCheck) and own.config == config
            assert (own.vocab_size, own.dtype) == (case.vocab_size, "bf16")


@pytest.mark.interpreter
@pytest.mark.parametrize("setting", ["top-k + top-p", "penalty, top-k + top-p", "temperature"])
def test_a_config_runs_by_the_launcher(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.sampling_accuracy._MOST_CALLS", 2)
    inputs = make_sampling_inputs(SamplingCase(2, 300, setting, "float32"), CPU)
    for config in ((128, 64, 4), (512, 32, 4)):
        provider = sampling_sweep.config_provider(config)
        run = provider.prepare(inputs)
        assert SamplingChecker(inputs).check(provider, run)["near_ties"] == 0
        assert provider.note(inputs)["predicted_bytes"] > inputs.case.bytes
        assert provider.is_ours


def row(
    case: SamplingCase, ms: float | None, config: tuple[int, int, int], current: bool = False
) -> Any:
    fields = sampling_sweep.config_fields(config)
    found = {"stage": sampling_sweep.STAGE, "chip": "sm_90", "case": case.to_dict(), **fields}
    found["current"] = current
    return {**found, "error": "x"} if ms is None else {**found, "ms": ms, "gb_per_s": 1 / ms}


TODAY, SMALL, LARGE = (4096, 64, 16), (2048, 64, 8), (8192, 64, 16)


def swept_rows(small_alone: float = 0.5, small_many: float = 1.2) -> list[Any]:
    """Times of three configs on one row and on 64: today's takes 1."""
    rows = []
    for case, small, large in ((FEW, small_alone, 1.5), (CASE, small_many, 0.9)):
        rows += [row(case, 1.0, TODAY, current=True), row(case, small, SMALL)]
        rows += [row(case, large, LARGE), row(case, None, (2048, 128, 4))]
    rows.append(row(CASE, 0.1, (4096, 128, 8)))  # on one of the two only
    return rows


def test_best_of_each_case() -> None:
    few, many = sampling_sweep.best_configs(swept_rows())
    assert tuple(few["config"].values()) == SMALL and few["speedup_over_current"] == 2.0
    assert many["ms"] == 0.1 and many["current_ms"] == 1.0 and len(many["runners_up"]) == 3
    assert sampling_sweep.best_configs([row(CASE, None, TODAY)]) == []


def winners(rows: list[Any]) -> dict[Any, Any]:
    found = sampling_sweep.winners({"rows": rows})
    return {winner.problem_class: tuple(winner.config.values()) for winner in found}


def test_classes_of_batches_part_only_where_that_pays() -> None:
    few, many = ("sm_90", "few"), ("sm_90", "many")
    assert winners(swept_rows()) == {few: SMALL, many: (4096, 128, 8)}
    both = [own for own in swept_rows() if own["config"]["capacity"] == 64]
    assert winners(both) == {few: SMALL, many: LARGE}
    # The small tile is best over both by far, and the large one wins 64 rows by less than 3%.
    close = [own for own in swept_rows(0.5, 0.92) if own["config"]["capacity"] == 64]
    assert winners(close) == {few: SMALL, many: SMALL}
    assert winners(close[:3]) == {few: SMALL}  # a sweep that was cut short
    assert winners([row(CASE, None, TODAY)]) == {}


def swept_file(folder: Path, rows: list[Any]) -> str:
    environment = {"device": "TEST", "date": "2000-01-01T00:00", "torch": "0", "triton": "0"}
    path = folder / "test-2000.json"
    path.write_text(json.dumps({"environment": environment, "rows": rows}))
    return str(path)


@pytest.fixture
def config_source(tmp_path: Path) -> Path:
    """A copy of config.py to write to."""
    from fastattn.kernels.sampling import config

    assert config.__file__ is not None
    return Path(shutil.copy(config.__file__, tmp_path / "config.py"))


def test_dispatch_chooses_the_written_winners(
    config_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = swept_file(config_source.parent, swept_rows())
    assert sampling_sweep.main([path]) == 0
    printed = capsys.readouterr().out
    assert "benchmarks/results/test-2000.json" in printed and "100% of the fastest" in printed
    before = runpy.run_path(str(config_source))
    for _ in range(2):  # in place of the empty table, and of its own
        assert sampling_sweep.main([path, "--write", str(config_source)]) == 0
    assert config_source.read_text().count("MEASURED_SAMPLE: ") == 1
    after = runpy.run_path(str(config_source))
    ruled, chosen = (x["select_sample_config"] for x in (before, after))
    for batch, wanted in ((1, SMALL), (8, SMALL), (9, (4096, 128, 8)), (512, (4096, 128, 8))):
        config = dataclasses.astuple(chosen("sm_90", 128256, 0, batch))
        assert config == wanted != dataclasses.astuple(ruled("sm_90", 128256, 0, batch))
    # Small vocabularies and many top tokens bound a measured config as they do any.
    assert dataclasses.astuple(chosen("sm_90", 100, 0, 1)) == (128, 64, 8)
    assert dataclasses.astuple(chosen("sm_90", 128256, 200, 1)) == (2048, 256, 8)
    for chip in ("sm_80", "interpreter"):
        arguments = (chip, 128256, 0, 1)
        assert dataclasses.astuple(chosen(*arguments)) == dataclasses.astuple(ruled(*arguments))
    assert sampling_sweep.main([swept_file(config_source.parent, [])]) == 1
    assert sampling_sweep.main([str(config_source.parent / "no")]) == 2


def test_a_measured_config_is_the_one_that_a_draw_runs_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fastattn.kernels.sampling import config, sampler

    launched = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: launched.append((grid[0], kwargs["BLOCK"]))

    monkeypatch.setattr(sampler, "_sample_kernel", Recorder())
    monkeypatch.setattr(sampler, "chip_of", lambda device: "sm_120")
    measured = Measured(SampleConfig(1024, 32, 4), "some.json")
    monkeypatch.setitem(config.MEASURED_SAMPLE, ("sm_120", "few"), measured)
    for batch in (8, 9):
        inputs = make_sampling_inputs(SamplingCase(batch, 5000, "greedy"), CPU)
        tokens, counters = (torch.zeros(batch, dtype=x) for x in (torch.int64, torch.int32))
        sampler.launch_sample(
            inputs.logits, sampler.Sampling(temperature=0.0, seed=1), tokens, counters
        )
    assert launched == [(8 * 5, 1024), (9 * 2, 4096)]


@pytest.mark.parametrize(
    ("key", "config", "words"),
    [
        (("sm_99", "few"), (2048, 64, 8), ("chip must be one of", "'sm_99'")),
        (("interpreter", "few"), (2048, 64, 8), ("chip must be one of", "'interpreter'")),
        (("sm_90", "some"), (2048, 64, 8), ("rows must be one of", "'some'")),
        (("sm_90", "few"), (3000, 64, 8), ("block must be one of", "got 3000")),
        (("sm_90", "few"), (65536, 64, 8), ("block must be one of", "got 65536")),
        (("sm_90", "few"), (2048, 4096, 8), ("capacity must be at most block = 2048, got 4096",)),
        (("sm_90", "few"), (2048, 64, 32), ("num_warps must be one of", "got 32")),
    ],
)
def test_a_bad_measured_config_is_refused(key: Any, config: Any, words: tuple[str, ...]) -> None:
    from fastattn.kernels.sampling.config import SAMPLE_SPACE

    SAMPLE_SPACE.check_table({("sm_90", "many"): Measured(SampleConfig(2048, 64, 8), "a.json")})
    table = {key: Measured(SampleConfig(*config), "a.json")}
    check(
        lambda: SAMPLE_SPACE.check_table(table), ValueError, (f"MEASURED_SAMPLE[{key!r}]: ", *words)
    )


def test_what_dispatch_would_refuse_is_not_written(
    config_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = config_source.read_text()
    path = swept_file(config_source.parent, [row(CASE, 1.0, (2048, 64, 3))])
    assert sampling_sweep.main([path, "--write", str(config_source)]) == 2
    assert "num_warps must be one of (1, 2, 4, 8, 16), got 3" in capsys.readouterr().err
    assert config_source.read_text() == before
    config_source.write_text("A = 1\n")
    path = swept_file(config_source.parent, swept_rows())
    assert sampling_sweep.main([path, "--write", str(config_source)]) == 2
    assert "must hold a table MEASURED_SAMPLE" in capsys.readouterr().err
