"""The benchmarks without a GPU: the whole flow on the CPU, with timers put in, and a fake CUDA."""

import functools
import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cases, gpu, parity, plan, plots, pool, report, stages, sweep
from benchmarks import results as results_file
from benchmarks.accuracy import Oracle, WrongResult, sample_heads, sample_rows
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.measure import DeviceLost, guarded
from benchmarks.progress import Progress
from benchmarks.providers import Provider, fastattn_provider, find_providers, sdpa_provider
from benchmarks.results import Results
from benchmarks.timing import HostTimer, Timing
from fastattn import attention

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = Case(2, 80, 4, 2, 16, causal=True, dtype="float32")


class FixedTimer:
    """Runs everything once and says that it took 2 ms."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, runs: object) -> Timing:
        self.calls += 1
        for run in runs:
            run()
        return Timing(2.0, 1.5, 3.0, 1, "made up")


def reference_provider(name: str = "reference", change: object = None) -> Provider:
    """The reference implementation, whose output `change` may spoil."""

    def prepare(inputs: Inputs) -> object:
        def run() -> torch.Tensor:
            out = attention(inputs.q, inputs.k, inputs.v, impl="reference", **inputs.kwargs)
            return out if change is None else change(out)

        return run

    return Provider(name, prepare, "1.0")


def make_bench(tmp_path: Path, own_plan: plan.Plan, providers: list[Provider]) -> stages.Bench:
    results = Results(
        tmp_path / "results.json",
        environment=results_file.describe_environment(CPU),
        providers=gpu.describe_providers(providers),
    )
    return stages.Bench(
        plan=own_plan,
        device=CPU,
        chip="interpreter",
        timer=FixedTimer(),
        host_timer=HostTimer(calls=1, samples=2),
        providers=providers,
        results=results,
        progress=Progress(own_plan.total_seconds, io.StringIO()),
    )


def saved(bench: stages.Bench) -> dict[str, object]:
    return json.loads(bench.results.path.read_text())


# --- no number without parity


def test_samples_hold_the_first_and_the_last() -> None:
    rows = sample_rows(5000, most=100)
    assert len(rows) == len(set(rows)) == 100 and rows == sorted(rows)
    assert rows[:25] == list(range(25)) and rows[-25:] == list(range(4975, 5000))
    assert sample_rows(7, most=100) == list(range(7))
    heads = sample_heads(Case(3, 16, 5, 5, 16))
    assert heads[0] == (0, 0) and heads[-1] == (2, 4) and len(heads) == 4
    assert sample_heads(Case(1, 16, 1, 1, 16)) == [(0, 0)]


def _spoil(where: tuple[object, ...], value: float) -> object:
    def change(out: torch.Tensor) -> torch.Tensor:
        out[where] += value
        return out

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out * 1.01, "RMS error"),
        (_spoil((1, 79, 3, 5), 0.05), "max error"),
        (_spoil((0, 40, 2, 0), math.nan), "NaN"),
        (lambda out: out.transpose(1, 2), "shape"),
        (lambda out: out.double(), "float64"),
    ],
)
def test_oracle_finds_wrong_results(change: object, message: str) -> None:
    inputs = make_inputs(TINY, CPU)
    # One head of two sequences: elements elsewhere are only looked at for NaN.
    oracle = Oracle(inputs, most_heads=2)
    with pytest.raises(WrongResult, match=message):
        oracle.check(reference_provider(change=change).prepare(inputs)())


def test_oracle_does_not_look_at_padding() -> None:
    inputs = make_inputs(replace(TINY, feature="padded", causal=False), CPU)
    provider = reference_provider(change=_spoil((0, slice(40, None)), 7.0))
    assert Oracle(inputs).check(provider.prepare(inputs)()).passed


def test_a_wrong_or_failing_provider_gets_an_error_and_no_time(tmp_path: Path) -> None:
    def fail(out: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this")

    providers = [
        reference_provider(),
        reference_provider("wrong", lambda out: out + 1),
        reference_provider("failing", fail),
        Provider("absent", reference_provider().prepare, absent="not installed"),
        replace(reference_provider("picky"), skip=lambda case: "it takes no causal mask"),
        reference_provider("after"),
    ]
    bench = make_bench(tmp_path, plan.Plan(stages=["forward"], forward=[TINY]), providers)
    assert stages.run_plan(bench)  # peers do not decide whether we are right
    document = saved(bench)
    rows = {row["provider"]: row for row in document["rows"]}
    assert list(rows) == ["reference", "wrong", "failing", "picky", "after"]
    assert bench.timer.calls == 2
    assert {name for name, row in rows.items() if "ms" in row} == {"reference", "after"}
    assert rows["wrong"]["error"].startswith("FAILED (max error")
    assert rows["failing"]["error"] == "RuntimeError: no kernel for this"
    assert rows["picky"]["skipped"] == "it takes no causal mask"
    assert rows["after"]["ratio_to_best_peer"] == 1.0
    assert document["providers"]["absent"] == "absent: not installed"


def test_our_own_wrong_result_fails_the_run(tmp_path: Path) -> None:
    providers = [reference_provider("fastattn", lambda out: out + 1), reference_provider()]
    bench = make_bench(tmp_path, plan.Plan(stages=["forward"], forward=[TINY]), providers)
    assert gpu.run(bench) == 1
    (failure,) = saved(bench)["summary"]["failures"]
    assert "max error" in failure


def test_an_error_that_breaks_the_device_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(out: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr("benchmarks.measure.device_works", lambda: False)
        monkeypatch.setattr("benchmarks.stages.device_works", lambda: False)
        raise RuntimeError("an illegal memory access was encountered")

    providers = [reference_provider(), reference_provider("broken", fail), reference_provider("c")]
    own_plan = plan.Plan(stages=["forward", "features"], forward=[TINY], features=[TINY])
    bench = make_bench(tmp_path, own_plan, providers)
    assert gpu.run(bench) == 1
    document = saved(bench)
    assert document["status"] == "device lost" and list(document["stages"]) == ["forward"]
    assert [row["provider"] for row in document["rows"]] == ["reference", "broken"]
    with pytest.raises(DeviceLost):
        guarded({}, lambda: fail(torch.zeros(1)))


# --- the file


def test_file_is_valid_after_every_row_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    results = Results(tmp_path / "folder" / "a.json", environment={"device": "x"})
    for number in range(3):
        results.add({"n": number, "ratio": math.inf, "gone": None, "f": 1 / 3, "t": (1, 2)})
        document = json.loads(results.path.read_text())
        assert len(document["rows"]) == number + 1
    assert document["rows"][2] == {"n": 2, "ratio": "inf", "f": 0.333333, "t": [1, 2]}
    with pytest.raises(TypeError):
        results.add({"n": object()})
    assert json.loads(results.path.read_text()) == document
    assert [path.name for path in results.path.parent.iterdir()] == ["a.json"]


def test_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    def interrupt(out: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    providers = [reference_provider(), reference_provider("b", interrupt), reference_provider("c")]
    bench = make_bench(tmp_path, plan.Plan(stages=["forward"], forward=[TINY]), providers)
    assert gpu.run(bench) == 130
    document = saved(bench)
    assert document["status"] == document["stages"]["forward"]["status"] == "interrupted"
    assert [row["provider"] for row in document["rows"]] == ["reference"]
    assert document["rows"][0]["ms"] == 2.0


def test_file_names_tell_device_date_and_commit(tmp_path: Path) -> None:
    environment = {"device": "NVIDIA H200", "date": "2030-01-02T03:04", "commit": "abc123"}
    path = results_file.default_path(environment, tmp_path)
    assert path.name == "nvidia-h200-2030-01-02-abc123.json"
    path.touch()
    assert results_file.default_path(environment, tmp_path).stem.endswith("abc123-2")
    dirty = {**environment, "dirty": True}
    assert results_file.default_path(dirty, tmp_path).stem.endswith("abc123-dirty")


# --- the time


def test_budget_is_under_nine_minutes_and_rolls_over() -> None:
    assert plan.TOTAL_SECONDS <= 520
    names = list(plan.BUDGETS)
    assert plan.stage_seconds("parity", names, plan.TOTAL_SECONDS) == plan.BUDGETS["parity"]
    # What parity did not need goes to the stages after it, and the last may use all that is left.
    assert plan.stage_seconds("forward", names, 450.0) > plan.BUDGETS["forward"]
    assert plan.stage_seconds("sampling-sweep", names, 77.0) == 77.0


def test_stage_without_time_is_cut_short_and_says_so(tmp_path: Path) -> None:
    checks = [parity.FeatureCheck("bidirectional", "fp32")]
    own_plan = plan.Plan(
        stages=["parity", "forward"], checks=checks, forward=[TINY, TINY], total_seconds=-1.0
    )
    bench = make_bench(tmp_path, own_plan, [reference_provider(), reference_provider("b")])
    assert not stages.run_plan(bench)  # parity that was not completed is not parity
    document = saved(bench)
    assert document["stages"]["forward"]["status"] == "cut short"
    assert document["stages"]["forward"]["not_reached"] == 4
    assert document["stages"]["parity"]["not_reached"] == 1
    assert document["summary"]["failures"] == ["1 checks were not reached"]
    assert document["rows"] == []


# --- worker processes


def _check(task: str) -> dict[str, object]:
    if task == "dies":
        os._exit(3)
    if task == "hangs":
        time.sleep(600)
    if task == "raises":
        raise ValueError("as it should")
    return {"value": task.upper()}


def test_pool_survives_what_its_workers_do_not() -> None:
    tasks = ["a", "dies", "raises", "hangs", "b"]
    found: dict[str, dict[str, object]] = {}
    left = pool.run_tasks(
        tasks, _check, time.monotonic() + 300, found.__setitem__, workers=2, task_seconds=3.0
    )
    assert left == 0 and set(found) == set(tasks)
    assert found["a"] == {"value": "A"} and found["b"] == {"value": "B"}
    assert found["raises"] == {"error": "ValueError: as it should"}
    assert "status 3" in found["dies"]["error"]
    assert "no answer within 3 s" in found["hangs"]["error"]


def test_pool_says_when_no_worker_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_START_SECONDS", 0.0)
    with pytest.raises(pool.PoolUnavailable, match="no answer"):
        pool.run_tasks(["a"], _check, time.monotonic() + 60, lambda *_: None, workers=1)


def test_checks_run_here_where_no_worker_can_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_START_SECONDS", 0.0)
    monkeypatch.setattr(parity, "run_config", lambda task, device: {"max_error": 0.0})
    checks = [parity.ConfigCheck((64, 64, 4, 1), 16, "fp32")]
    own_plan = plan.Plan(stages=["parity"], checks=checks, workers=1, total_seconds=60)
    bench = make_bench(tmp_path, own_plan, [])
    assert stages.run_plan(bench)
    assert [row["passed"] for row in saved(bench)["rows"]] == [True]


def test_workers_leave_a_core_and_memory_free() -> None:
    assert pool.worker_count(16, 130e9) == 14
    assert pool.worker_count(4, 130e9) == 3
    assert pool.worker_count(16, 5e9) == 2
    assert pool.worker_count(1, 1e9) == 1


# --- parity and the sweep


def test_every_tile_that_dispatch_may_choose_is_checked() -> None:
    from fastattn.kernels.attention.config import HALF_CONFIGS, select_forward_config

    for chip in HALF_CONFIGS:
        checked = {
            (check.config, check.head_dim, check.dtype)
            for check in parity.dispatch_checks(chip, parity.DTYPES)
        }
        for name, dtype in parity.DTYPES.items():
            for head_dim in (64, 128, 256):
                for seqlen in (1, 65, 4096):
                    for modifiers in (0, 1, 3):
                        config = select_forward_config(chip, head_dim, dtype, seqlen, modifiers)
                        assert (parity.as_tuple(config), head_dim, name) in checked


@pytest.mark.interpreter
def test_check_of_a_tile_finds_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels import attention as kernels

    check = parity.ConfigCheck(
        (64, 64, 4, 1), 16, "fp32", True, ("dense bias", "softcap"), shape=(1, 80, 112, 1, 1)
    )
    result = parity.run_check(check, "cpu")
    assert "error" not in result and result["max_error"] <= result["allowed_max_error"]
    launch = kernels.launch_attention_forward

    def launch_without_last_row(q: torch.Tensor, *args: object, **kwargs: object) -> None:
        launch(q, *args, **kwargs)
        args[2][:, -1] = float("nan")

    monkeypatch.setattr(kernels, "launch_attention_forward", launch_without_last_row)
    assert "NaN" in parity.run_check(check, "cpu")["error"]


def test_sweep_tries_todays_tile_first_and_checks_all() -> None:
    case = cases.sweep_cases()[0]
    tiles = sweep.candidates("sm_90", case)
    assert tiles[0] == sweep.current_tile("sm_90", case) and len(tiles) == len(set(tiles)) > 10
    checks = sweep.candidate_checks("sm_90", cases.sweep_cases())
    checks = [check for check in checks if isinstance(check, parity.ConfigCheck)]
    assert {(check.head_dim, check.causal) for check in checks} == {
        (head_dim, causal) for head_dim in (64, 128) for causal in (False, True)
    }
    assert {check.config for check in checks if (check.head_dim, check.causal) == (128, False)} == {
        *tiles
    }


# --- all together


@pytest.mark.interpreter
def test_whole_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage, with the kernels in the interpreter and one tile that cannot be right."""
    from fastattn.kernels.attention import config

    tiles = (config.TileConfig(64, 32, 4, 1), config.TileConfig(64, 24, 4, 1))
    monkeypatch.setattr(config, "FORWARD_CANDIDATES", tiles)
    monkeypatch.setattr(config, "BACKWARD_ROWS_CANDIDATES", tiles[1:])
    monkeypatch.setattr(config, "BACKWARD_KEYS_CANDIDATES", tiles[1:])
    small = functools.partial(replace, shape=(1, 64, 80, 1, 1))
    for name in ("run_config", "run_gradients"):
        check = getattr(parity, name)
        monkeypatch.setattr(
            parity, name, lambda task, device, check=check: check(small(task), device)
        )
    case = Case(2, 72, 2, 2, 16, dtype="float32")
    features = [replace(case, num_heads_kv=1, causal=True)]
    others = [name for name in cases.FEATURES if name not in ("plain", "dropout")]
    features += [replace(case, feature=name) for name in others]
    one = replace(case, causal=True, batch=1)
    checks = [parity.FeatureCheck("grouped-query", "bf16")]
    checks += parity.dispatch_checks("interpreter", ["fp32"])
    own_plan = plan.Plan(
        checks=checks,
        forward=[case, replace(case, causal=True)],
        features=features,
        backward=[replace(one, part="training")],
        sweep=[replace(one, part=part) for part in ("forward", "rows", "keys")],
        overhead=replace(case, batch=1),
        copy_bytes=2**20,
        matmul_size=64,
    )
    providers = [fastattn_provider(), sdpa_provider("MATH"), sdpa_provider("CUDNN_ATTENTION")]
    bench = make_bench(tmp_path, own_plan, providers)
    status = gpu.finish(bench, gpu.run(bench))
    document = saved(bench)
    assert bench.failures == [] and status == 0 and document["status"] == "done"
    assert {stage["status"] for stage in document["stages"].values()} == {"done"}
    assert list(document["stages"]) == list(plan.BUDGETS)
    assert set(document["ceilings"]) == {"copy_gb_per_s", "matmul_tflops"}
    ours = [row for row in document["rows"] if row.get("provider") == "fastattn"]
    assert len(ours) == 2 + 1 + len(features)
    for row in ours:
        assert row["ms"] == 2.0 and row["ratio_to_best_peer"] == 1.0
        assert row["percent_of_ceiling"] > 0 and row["max_error"] <= row["allowed_max_error"]
    cudnn = [row for row in document["rows"] if row.get("provider") == "SDPA CUDNN"]
    assert cudnn and all("error" in row for row in cudnn)
    overhead = [row for row in document["rows"] if row["stage"] == "overhead"]
    assert len(overhead) == 3 and all("ms" in row for row in overhead)
    swept = {
        (row["case"]["part"], *row["tile"][:2]): row for row in document["rows"] if "tile" in row
    }
    assert "ms" in swept[("forward", 64, 32)]
    for part in ("forward", "rows", "keys"):
        assert "ms" in swept[(part, 64, 64)]
        assert "error" in swept[(part, 64, 24)]  # no power of two
    best = document["summary"]["best_tiles"]
    assert [found["part"] for found in best] == ["forward", "rows", "keys"]
    for found in best:
        assert found["current_tile"] == [64, 64, 4, 1] and found["chip"] == "interpreter"
    assert len(document["summary"]["targets"]) == 4
    for table in report.tables(document):
        assert str(table).splitlines()[0] == table.title
    assert plots.main([str(bench.results.path)]) == 0


def test_absent_peers_are_named_with_the_reason() -> None:
    for provider in find_providers():
        assert provider.version or provider.absent, provider.name
    by_name = {provider.name: provider for provider in find_providers()}
    assert by_name["SDPA FLASH"].skip(Case(1, 64, 1, 1, 16, feature="padded"))
    assert by_name["SDPA MATH"].skip(Case(1, 16384, 32, 32, 64))
    assert by_name["SDPA MATH"].skip(Case(8, 2048, 32, 32, 64)) == ""
    assert by_name["FlashInfer"].skip(Case(1, 64, 1, 1, 16, feature="T5 bias"))


def test_command_without_cuda_says_so_and_exits_2(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "x.json")],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2, process.stderr
    assert "CUDA" in process.stderr and process.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--budget-seconds", "0"], ["--workers", "-1"], ["--stage", "x"]]
)
def test_bad_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.parse(arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err
