"""What is measured and how it is timed: cases, timers, and a CUDA that is not there."""

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, gpu, plan
from benchmarks import results as results_file
from benchmarks.accuracy import Oracle
from benchmarks.cases import Case, make_inputs
from benchmarks.decode_checks import DecodeCheck
from benchmarks.providers import sdpa_provider
from benchmarks.timing import CudaTimer, HostTimer, TwoTimers, input_sets, percentile, summarize
from fastattn import attention

CPU = torch.device("cpu")


def test_forward_matrix_is_16k_tokens_of_width_2048() -> None:
    found = cases.forward_cases()
    assert {case.seqlen for case in found} == {512, 1024, 2048, 4096, 8192, 16384}
    assert len(found) == len(set(found)) == 6 * 2 * 2
    for case in found:
        assert case.batch * case.seqlen == 16384
        assert (case.num_heads, case.head_dim) in ((32, 64), (16, 128))
        assert case.dtype == "bfloat16"
    assert set(cases.forward_cases(quick=True)) < set(found)


def test_flops_are_those_of_the_two_products() -> None:
    case = Case(2, 48, 4, 4, 16, dtype="float32")
    inputs = make_inputs(case, CPU)
    with FlopCounterMode(display=False) as counter:
        attention(inputs.q, inputs.k, inputs.v, impl="reference")
    assert case.flops == counter.get_total_flops()
    assert replace(case, causal=True).flops == case.flops / 2


def test_padding_counts_neither_as_flops_nor_as_bytes() -> None:
    whole = Case(4, 64, 2, 2, 16)
    padded, padded_keys = (replace(whole, feature=name) for name in ("padded", "padded keys"))
    assert padded.lengths == [16, 32, 48, 64]
    assert padded.flops == 4 * 2 * 16 * sum(n * n for n in padded.lengths)
    assert padded_keys.flops == 4 * 2 * 16 * 64 * sum(padded.lengths)
    assert padded.bytes / whole.bytes == sum(padded.lengths) / (4 * 64)


@pytest.mark.parametrize("feature", [name for name in cases.FEATURES if name != "dropout"])
def test_dense_mask_and_bias_are_the_same_problem_as_the_values(feature: str) -> None:
    """SDPA, given the dense tensors, agrees with the reference, given masks and biases."""
    case = Case(4, 48, 2, 2, 16, feature=feature, dtype="float32")
    inputs = make_inputs(case, CPU)
    oracle = Oracle(inputs)
    assert oracle.check(sdpa_provider("MATH").prepare(inputs)()).passed
    out = attention(inputs.q, inputs.k, inputs.v, impl="reference", **inputs.kwargs)
    assert oracle.check(out).passed


def test_percentile_is_numpys() -> None:
    values = torch.rand(11, generator=torch.Generator().manual_seed(0)).tolist()
    for fraction in (0.0, 0.2, 0.5, 0.8, 0.93, 1.0):
        assert percentile(values, fraction) == pytest.approx(np.quantile(values, fraction))
    timing = summarize([3.0, 1.0, 2.0], "m")
    assert (timing.median_ms, timing.repetitions, timing.method) == (2.0, 3, "m")
    assert timing.p20_ms < timing.median_ms < timing.p80_ms
    with pytest.raises(ValueError, match="expected values"):
        percentile([], 0.5)


def test_host_timer_measures_a_known_wait() -> None:
    timing = HostTimer(calls=2, samples=5)([lambda: time.sleep(0.01)])
    assert 10 <= timing.p20_ms <= timing.median_ms < 30


def test_small_inputs_are_rotated_until_they_pass_the_cache() -> None:
    assert input_sets(case_bytes=300e6, cache_bytes=60e6) == 1
    assert input_sets(case_bytes=50e6, cache_bytes=60e6) == 3
    assert 1 < input_sets(case_bytes=1, cache_bytes=60e6) <= 32


class FakeCuda:
    """torch.cuda with a clock of its own: what is queued on the device advances it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.replays = 0
        self.queue: list[float] | None = None
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                fake.replays += 1
                fake.now += sum(self.captured)

        @contextlib.contextmanager
        def capture(graph: Graph) -> object:
            fake.queue = []
            yield
            graph.captured, fake.queue = fake.queue, None

        class Stream:
            def wait_stream(self, other: "Stream") -> None: ...

        class Properties:
            name, major, minor, multi_processor_count = "Test Device", 9, 0, 132
            total_memory, L2_cache_size = 80 << 30, 1 << 20

        class Flush:
            def zero_(self) -> None:
                fake.now += 1000.0

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda: None,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: Properties,
            "get_device_capability": lambda device: (9, 0),
            "mem_get_info": lambda device: (70 << 30, 80 << 30),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("benchmarks.timing.torch.empty", lambda *args, **kwargs: Flush())

    def kernel(self, ms: float) -> object:
        def run() -> None:
            if self.queue is None:
                self.now += ms
            else:
                self.queue.append(ms)

        return run


def test_cuda_timer_takes_a_long_kernel_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    timing = CudaTimer()([cuda.kernel(2.0)])
    assert timing.median_ms == pytest.approx(2.0)  # without the flush
    assert timing.method == "events, cold L2" and timing.repetitions >= 7
    assert cuda.replays == 0


def test_cuda_timer_replays_a_graph_of_a_short_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    timing = CudaTimer()([cuda.kernel(0.010), cuda.kernel(0.020), cuda.kernel(0.030)])
    assert timing.median_ms == pytest.approx(0.020)  # each input set as often as the others
    assert "graph" in timing.method and "3 input sets" in timing.method
    assert cuda.replays > timing.repetitions


def test_cuda_timer_takes_the_method_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    timing = CudaTimer(method="events")([cuda.kernel(0.010)])
    assert timing.median_ms == pytest.approx(0.010) and timing.method == "events, cold L2"
    timing = CudaTimer(method="graph")([cuda.kernel(9.0)])
    # Not ten calls of what takes long.
    assert timing.median_ms == pytest.approx(9.0) and "graph of 1 calls" in timing.method
    with pytest.raises(ValueError, match="method must be"):
        CudaTimer(method="clock")


def test_decoding_is_timed_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    timer = TwoTimers(CudaTimer(method="graph"), CudaTimer(method="events"))
    assert timer.cache_bytes == 1 << 20
    assert "graph" in timer([cuda.kernel(0.3)]).method
    assert "events" in timer.events([cuda.kernel(0.3)]).method


def test_cuda_timer_says_when_a_graph_was_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def refuse(graph: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    timing = CudaTimer()([cuda.kernel(0.01)])
    assert timing.median_ms == pytest.approx(0.01)
    assert "not permitted" in timing.method


def test_environment_is_read_only_from_what_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    commands = []

    def answer(*command: str) -> str:
        commands.append(command)
        return "1980 MHz, 3201 MHz, 1980 MHz, 90.1 W, 700.00 W, 34\n" if len(command) == 3 else ""

    device = torch.device("cuda", 0)
    clocks = results_file.read_clocks(device, answer)
    assert clocks["clocks.sm"] == "1980 MHz" and clocks["temperature.gpu"] == "34"
    assert commands[0][0] == "nvidia-smi" and commands[0][1].startswith("--query-gpu=")
    assert results_file.read_clocks(device, lambda *command: "") == {}
    environment = results_file.describe_environment(device, lambda *command: "")
    assert environment["device"] == "Test Device" and environment["capability"] == "9.0"
    assert environment["torch"] == torch.__version__ and environment["commit"] == ""


def test_plan_and_files_of_a_gpu_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command would do on a device of compute capability 9.0; nothing is run."""
    FakeCuda(monkeypatch)
    path = tmp_path / "run.json"
    bench = gpu.make_bench(gpu.parse(["--output", str(path), "--workers", "3"]))
    assert bench.chip == "sm_90" and bench.plan.workers == 3
    assert list(bench.plan.stages) == list(plan.BUDGETS)
    assert {check.dtype for check in bench.plan.checks} == {"bf16", "fp16", "fp32"}
    assert len(bench.plan.forward) == 24 and len(bench.plan.sweep) == 36
    assert len(bench.plan.backward) == 29
    assert len(bench.plan.decode) == 63 and len(bench.plan.decode_sweep) == 9
    assert bench.decode_timer.graph.method == "graph"
    assert bench.decode_timer.events.method == "events"
    assert len(bench.plan.sampling) == 122 and len(bench.plan.sampling_sweep) == 6
    assert bench.sampling_timer.method == "graph"
    kinds = {type(check).__name__ for check in bench.plan.checks}
    assert {"SampleCheck", "DecodeCheck", "GraphCheck", "InvarianceCheck", "EmptyCheck"} <= kinds
    assert len(bench.plan.checks) == len(set(bench.plan.checks))
    names = [provider.name for provider in bench.decode_providers]
    assert names[:2] == ["fastattn", "SDPA FLASH"] and "FlashInfer" in names
    names = [provider.name for provider in bench.sampling_providers]
    assert names[:2] == ["fastattn", "logits.amax"] and "FlashInfer" in names
    names = [provider.name for provider in bench.providers]
    assert names[:5] == ["fastattn", "SDPA FLASH", "SDPA CUDNN", "SDPA EFFICIENT", "SDPA MATH"]
    assert json.loads(path.read_text())["environment"]["chip"] == "sm_90"
    quick = gpu.make_bench(
        gpu.parse(["--quick", "--stage", "sweep", "--stage", "ceilings", "--output", str(path)])
    )
    assert quick.plan.stages == ["ceilings", "sweep"] and len(quick.plan.sweep) == 12
    assert quick.plan.workers >= 1
    decode = gpu.make_bench(gpu.parse(["--only", "decode", "--output", str(path)]))
    assert decode.plan.stages == ["parity", "ceilings", "decode", "decode-sweep"]
    kinds = {type(check).__name__ for check in decode.plan.checks}
    assert "DecodeCheck" in kinds and "GradientCheck" not in kinds
    features = [check.name for check in decode.plan.checks if hasattr(check, "name")]
    assert features and all(name.startswith("cache") for name in features)
    sampling = gpu.make_bench(gpu.parse(["--only", "sampling", "--output", str(path)]))
    assert sampling.plan.stages == ["parity", "ceilings", "sampling", "sampling-sweep"]
    kinds = {type(check).__name__ for check in sampling.plan.checks}
    assert kinds == {"SampleCheck", "SampleGraphCheck", "SampleInvarianceCheck"}
    attention = gpu.make_bench(gpu.parse(["--only", "attention", "--output", str(path)]))
    assert not {"decode", "sampling", "sampling-sweep"} & set(attention.plan.stages)
    assert "sweep" in attention.plan.stages
    assert not any(isinstance(check, DecodeCheck) for check in attention.plan.checks)
