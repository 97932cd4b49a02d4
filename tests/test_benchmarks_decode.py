"""Decoding in the benchmarks, without a GPU: cases, providers, checks, configs and targets."""

from __future__ import annotations

import io
import json
import math
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    decode_providers,
    decode_sweep,
    plan,
    plots,
    report,
    stages,
    targets,
)
from benchmarks.accuracy import WrongResult
from benchmarks.decode_accuracy import DecodeOracle, sample_key_heads
from benchmarks.decode_cases import (
    DecodeCase,
    DecodeInputs,
    decode_cases,
    decode_sweep_cases,
    make_decode_inputs,
    make_empty_inputs,
)
from benchmarks.decode_checks import DecodeCheck, EmptyCheck
from benchmarks.progress import Progress
from benchmarks.providers import Provider
from benchmarks.results import Results
from benchmarks.timing import HostTimer, Timing, TwoTimers
from fastattn import attention_with_kv_cache

CPU = torch.device("cpu")
TINY = DecodeCase(2, 96, 4, 2, 16, dtype="float32")
LAYOUTS = [
    TINY,
    replace(TINY, block_size=16),
    replace(TINY, seqlen_q=3),
    replace(TINY, stored="int8", block_size=32),
    replace(TINY, stored="fp8", seqlen_q=2),
]


class FixedTimer:
    """Runs everything once and says that it took so many milliseconds."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def __call__(self, runs: list[Callable[[], Any]]) -> Timing:
        for run in runs:
            run()
        return Timing(self.ms, self.ms, self.ms, 1, f"made up {self.ms}")


def reference(
    name: str = "fastattn", change: Callable[[Tensor], Any] = lambda out: out
) -> Provider:
    """The reference implementation, whose output `change` may spoil."""
    base = decode_providers.fastattn_decode(name, impl="reference")

    def prepare(inputs: DecodeInputs) -> Callable[[], Any]:
        run = base.prepare(inputs)
        return lambda: change(run())

    return replace(base, prepare=prepare)


def make_bench(tmp_path: Path, own_plan: plan.Plan, providers: list[Provider]) -> stages.Bench:
    environment = {"device": "TEST", "date": "2000-01-01T00:00", "torch": "0", "triton": "0"}
    return stages.Bench(
        plan=own_plan,
        device=CPU,
        chip="interpreter",
        timer=FixedTimer(2.0),
        host_timer=HostTimer(calls=1, samples=2),
        decode_timer=TwoTimers(FixedTimer(0.5), FixedTimer(0.7)),
        sweep_timer=FixedTimer(0.25),
        providers=[],
        decode_providers=providers,
        results=Results(tmp_path / "results.json", environment=environment, providers={}),
        progress=Progress(own_plan.total_seconds, io.StringIO()),
    )


def saved(bench: stages.Bench) -> dict[str, Any]:
    return json.loads(bench.results.path.read_text())


# --- cases


def test_matrix_is_every_batch_length_and_layout() -> None:
    found = decode_cases()
    assert len(found) == len(set(found)) == 3 * 16 + 2 * 5 + 5
    plain = {
        (case.batch, case.length, case.block_size)
        for case in found
        if case.seqlen_q == 1 and not case.stored
    }
    assert plain == {
        (batch, length, block_size)
        for batch in (1, 4, 16, 64)
        for length in (1024, 8192, 32768, 131072)
        for block_size in (0, 16, 256)
    }
    assert {case.stored for case in found} == {"", "int8", "fp8"}
    assert {(case.num_heads, case.num_heads_kv, case.head_dim) for case in found} == {(32, 8, 128)}
    assert found[0] == DecodeCase(16, 8192) and set(decode_cases(quick=True)) < set(found)
    assert len(set(map(str, found))) == len(found)
    assert set(decode_sweep_cases(quick=True)) < set(decode_sweep_cases()) <= set(found)


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_bytes_are_those_of_the_live_tokens(case: DecodeCase) -> None:
    inputs = make_decode_inputs(case, CPU)
    stored = [inputs.cache.k, inputs.cache.v, inputs.cache.k_scale, inputs.cache.v_scale]
    whole = sum(x.numel() * x.itemsize for x in stored if x is not None)
    assert whole == case.memory_bytes
    assert case.bytes == whole * case.length / case.capacity
    assert case.capacity > case.length


def test_memory_behind_the_tokens_is_nan_and_nowhere_else() -> None:
    for case in (TINY, replace(TINY, block_size=16)):
        inputs = make_decode_inputs(case, CPU)
        for cache in (inputs.k_cache, inputs.v_cache):
            missing = torch.isnan(cache[..., 0, 0]).sum()
            assert missing == case.batch * (case.capacity - case.length)
        if inputs.block_table is not None:
            assert sorted(inputs.block_table.flatten().tolist()) == list(range(44))
            assert inputs.block_table[0].tolist() != list(range(22))


@pytest.mark.parametrize("case", [*LAYOUTS, DecodeCase(1, 1024), DecodeCase(16, 1024)], ids=str)
def test_empty_inputs_look_like_the_real_ones_to_a_compiler(case: DecodeCase) -> None:
    real, empty = make_decode_inputs(case, CPU), make_empty_inputs(case, CPU)
    assert empty.seqlens.tolist() == [0] * case.batch
    for name in ("k", "v", "k_scale", "v_scale", "block_table"):
        one, other = getattr(real.cache, name), getattr(empty.cache, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            kinds = [
                [(stride == 1, stride % 16 == 0) for stride in x.stride()] for x in (one, other)
            ]
            assert kinds[0] == kinds[1]
    storage = empty.cache.k.untyped_storage().nbytes()
    assert storage <= 256


# --- no time without the right result


def test_sampled_heads_hold_the_first_and_the_last() -> None:
    heads = sample_key_heads(DecodeCase(16, 1024))
    assert heads[0] == (0, 0) and heads[-1] == (15, 7) and len(heads) == 4
    assert sample_key_heads(replace(TINY, batch=1, num_heads_kv=1)) == [(0, 0)]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_oracle_agrees_with_the_reference(case: DecodeCase) -> None:
    inputs = make_decode_inputs(case, CPU)
    assert DecodeOracle(inputs).check(reference().prepare(inputs)()).passed


def _add(index: tuple[Any, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(out: Tensor) -> Tensor:
        out[index] += value
        return out

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out * 1.01, "RMS error"),
        (_add((0, 0, 1, 3), 0.05), "max error"),
        (_add((1, 0, 3, 3), 0.05), "max error"),
        (_add((0, 0, 2, 0), math.nan), "NaN"),
        (lambda out: out.transpose(1, 2), "shape"),
        (lambda out: out.double(), "float64"),
    ],
)
def test_oracle_finds_wrong_results(change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = make_decode_inputs(TINY, CPU)
    with pytest.raises(WrongResult, match=message):
        DecodeOracle(inputs, most=2).check(change(reference().prepare(inputs)()))


def test_who_reads_past_a_row_is_wrong() -> None:
    inputs = make_decode_inputs(TINY, CPU)
    longer = replace(inputs, seqlens=inputs.seqlens + 1)
    with pytest.raises(WrongResult, match="NaN"):
        DecodeOracle(inputs).check(reference().prepare(longer)())


def test_wrong_providers_get_no_time_and_ours_fails_the_run(tmp_path: Path) -> None:
    providers = [
        reference(),
        reference("wrong", lambda out: out + 1),
        Provider("absent", reference().prepare, absent="not installed"),
        replace(reference("picky"), skip=lambda case: "no"),
        reference("peer"),
    ]
    own_plan = plan.Plan(stages=["decode"], decode=[TINY], total_seconds=300)
    bench = make_bench(tmp_path, own_plan, providers)
    bench.results.document["ceilings"] = {"copy_gb_per_s": 1.0, "matmul_tflops": 1.0}
    assert stages.run_plan(bench)
    rows = {row["provider"]: row for row in saved(bench)["rows"]}
    assert list(rows) == ["fastattn", "wrong", "picky", "peer"]
    assert "FAILED" in rows["wrong"]["error"] and "ms" not in rows["wrong"]
    ours = rows["fastattn"]
    assert (ours["ms"], ours["events_ms"], ours["method"]) == (0.5, 0.7, "made up 0.5")
    assert ours["ratio_to_best_peer"] == 1.0 and "events_ms" not in rows["wrong"]
    assert ours["gb_per_s"] == pytest.approx(TINY.bytes / 0.5e6, rel=1e-5)
    assert ours["percent_of_copy"] == pytest.approx(100 * TINY.bytes / 0.5e6, rel=1e-5)
    spoiled = make_bench(tmp_path, own_plan, [reference(change=lambda out: out + 1)])
    assert not stages.run_plan(spoiled) and "decode, " in spoiled.failures[0]


def test_a_step_that_does_not_fit_is_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**36))
    bench = make_bench(tmp_path, plan.Plan(), [reference()])
    bench.device = torch.device("cuda", 0)
    case = DecodeCase(64, 131072)
    assert stages.measure_case(bench, {"stage": "decode"}, case, [(reference(), {})]) == []
    (row,) = bench.results.rows
    assert "needs 32.1 GiB, 16.0 are free" in row["skipped"] and bench.not_reached == 0
    (target, *_) = targets.evaluate_decoding(bench.results.rows)
    assert "needs" in target["missing"][str(case)]


# --- providers


@pytest.mark.parametrize("seqlen_q", [1, 4])
def test_sdpa_takes_the_live_part_of_the_cache(seqlen_q: int) -> None:
    inputs = make_decode_inputs(replace(TINY, seqlen_q=seqlen_q), CPU)
    run = decode_providers.sdpa_decode("MATH").prepare(inputs)
    assert DecodeOracle(inputs).check(run()).passed


def test_peers_are_named_and_say_what_they_do_not_run() -> None:
    found = {provider.name: provider for provider in decode_providers.find_decode_providers()}
    for provider in found.values():
        assert provider.version or provider.absent, provider.name
    paged, quantised = replace(TINY, block_size=16), replace(TINY, stored="int8")
    for name in ("SDPA FLASH", "SDPA CUDNN", "SDPA EFFICIENT", "SDPA MATH"):
        assert found[name].skip(TINY) == "" and found[name].skip(paged)
    assert found["SDPA MATH"].skip(DecodeCase(64, 8192))
    assert "256" in found["flash-attn 2"].skip(paged)
    assert found["flash-attn 2"].skip(replace(TINY, block_size=256)) == ""
    assert found["flash-attn 3"].skip(paged) == "" and found["FlashInfer"].skip(paged) == ""
    for name in list(found)[1:]:
        assert found[name].skip(quantised)
    assert found["fastattn"].skip(quantised) == ""


@pytest.mark.parametrize(
    ("module", "argument"), [("flash_attn", "block_table"), ("flash_attn_interface", "page_table")]
)
def test_flash_attn_is_called_as_its_generation_wants(
    module: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def flash_attn_with_kvcache(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Any:
        calls.append(set(kwargs))
        table = kwargs.pop(argument, None)
        out = attention_with_kv_cache(q, k, v, block_table=table, impl="reference", **kwargs)
        return (out, None) if module == "flash_attn_interface" else out

    library = types.ModuleType(module)
    library.flash_attn_with_kvcache, library.__version__ = flash_attn_with_kvcache, "9"
    monkeypatch.setitem(__import__("sys").modules, module, library)
    found = {x.version: x for x in decode_providers.find_decode_providers()}["9"]
    for case in (TINY, replace(TINY, block_size=16, seqlen_q=2)):
        inputs = make_decode_inputs(case, CPU)
        assert DecodeOracle(inputs).check(found.prepare(inputs)()).passed
    assert calls == [{"cache_seqlens", "causal"}, {"cache_seqlens", "causal", argument}]


def test_flashinfer_gets_pages_of_the_same_memory() -> None:
    for case in (TINY, replace(TINY, block_size=32, length=90)):
        inputs = make_decode_inputs(case, CPU)
        (k, v), indptr, indices, last = decode_providers.flashinfer_pages(inputs)
        assert k.data_ptr() == inputs.k_cache.data_ptr() and v.shape == k.shape
        row = indices[indptr[1] : indptr[2]].long()
        tokens = k[row].flatten(0, 1)
        length = (len(row) - 1) * k.shape[1] + int(last[1])
        assert length == case.length
        cache = inputs.cache
        table = None if cache.block_table is None else cache.block_table[1].long()
        own = cache.k[1] if table is None else cache.k[table].flatten(0, 1)
        assert torch.equal(tokens[:length], own[:length])


# --- all stages


@pytest.mark.interpreter
def test_stages_of_decoding_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, with the kernels in the interpreter and one tile that cannot be right."""
    monkeypatch.setattr(decode_sweep, "_TILES", ((32, 1), (12, 1)))
    monkeypatch.setattr(decode_sweep, "_WARPS", (4,))
    small = {"lengths": (70, 0), "capacity": 96, "heads": (2, 1)}
    check_run = DecodeCheck.run
    monkeypatch.setattr(
        DecodeCheck, "run", lambda self, device: check_run(replace(self, **small), device)
    )
    own_plan = plan.Plan(
        stages=["parity", "ceilings", "decode", "decode-sweep"],
        checks=[EmptyCheck(TINY), EmptyCheck(replace(TINY, block_size=16))],
        decode=LAYOUTS,
        decode_sweep=[replace(TINY, head_dim=128, num_heads=2, num_heads_kv=1)],
        copy_bytes=2**20,
        matmul_size=64,
        total_seconds=300,
    )
    providers = [decode_providers.fastattn_decode(), decode_providers.sdpa_decode("MATH")]
    bench = make_bench(tmp_path, own_plan, providers)
    right = stages.run_plan(bench)
    document = saved(bench)
    assert bench.failures == [] and right
    assert {stage["status"] for stage in document["stages"].values()} == {"done"}
    ours = [row for row in document["rows"] if row.get("provider") == "fastattn"]
    assert [row["case"]["label"] for row in ours] == list(map(str, LAYOUTS))
    assert all(row["percent_of_copy"] > 0 and row["events_ms"] == 0.7 for row in ours)
    assert all("splits" in row["config_label"] for row in ours if row["case"]["seqlen_q"] == 1)
    swept = [row for row in document["rows"] if row["stage"] == "decode-sweep" and "case" in row]
    wrong = [row for row in swept if "error" in row]
    assert [row["config"]["block_n"] for row in wrong] == [12]
    timed = [row for row in swept if "ms" in row]
    assert timed[0]["current"] and {row["config"]["last_combines"] for row in timed} == {
        True,
        False,
    }
    (best,) = document["summary"]["best_configs"]
    assert best["ms"] == 0.25 and best["speedup_over_current"] == 1.0
    assert len(document["summary"]["decode_targets"]) == 3
    titles = [table.title for table in report.tables(document)]
    assert any(title.startswith("decode: us") for title in titles)
    assert "Best configs of the decoding sweep" in titles
    assert plots.main([str(bench.results.path)]) == 0
    assert (tmp_path / "results-decode.png").stat().st_size > 10_000
