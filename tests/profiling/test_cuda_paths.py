"""What only runs on a GPU, against stand-ins: order of calls, what is counted, what is not."""

from __future__ import annotations

import mmap
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.profiler import DeviceType

from fastattn.nn import BaseKVCache
from fastattn.profiling import clocks, memory, operators
from fastattn.profiling.providers import OurDecoding
from fastattn.profiling.results import OUTSIDE

CUDA = torch.device("cuda")


def test_the_clock_waits_once_and_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    now = iter([0.0, 5.0, 105.0, 107.0, 110.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            assert stream == "stream"
            self.at = next(now)
            log.append("record")

        def elapsed_time(self, other: Event) -> float:
            log.append("read")
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    clock = clocks.make_clock(CUDA)
    clock.mark()
    clock.mark()
    clock.pause()  # what a graph's capture takes
    for _ in range(3):
        clock.mark()
    assert clock.intervals_ms() == [5.0, 2.0, 3.0]
    assert log == ["wait", *["record"] * 5, "wait", *["read"] * 3]


def test_the_host_clock_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.001, 0.5, 0.502])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(now))
    clock = clocks.make_clock(torch.device("cpu"))
    clock.mark()
    clock.mark()
    clock.pause()
    clock.mark()
    clock.mark()
    assert clock.intervals_ms() == pytest.approx([1.0, 2.0])


class Steps:
    """A model and a session that note what is called; each step's token is one more."""

    replayable = True

    def __init__(self, room: int) -> None:
        self.log: list[Any] = []
        self.cache = mock.MagicMock(spec=BaseKVCache)
        self.cache.device, self.cache.max_batch = CUDA, 2
        self.cache.max_seqlen, self.cache.lengths = 7 + room, (7, 7)
        self.cache.reserve.side_effect = lambda n: self.log.append(f"reserve {n}")
        self.cache.advance.side_effect = lambda n, replayed: self.log.append(
            f"advance {n} {replayed}"
        )

    def step(self, tokens: torch.Tensor, session: Any) -> torch.Tensor:
        self.log.append("step")
        return torch.nn.functional.one_hot(tokens[:, 0] + 1, 50).float()

    def rollback(self, counts: list[int]) -> None:
        self.log.append(f"rollback {counts}")


@pytest.mark.parametrize(("room", "warm"), [(20, 2), (1, 1)])
def test_a_step_is_captured_once_and_then_replayed(
    room: int, warm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(room)

    class Graph:
        def replay(self) -> None:
            steps.log.append("replay")

    class Capture:
        def __init__(self, graph: Graph) -> None:
            steps.log.append("capture")

        def __enter__(self) -> None:
            # A capture runs nothing; this stand-in does, as if it had been the first replay.
            self.saved = decoding.tokens.clone()

        def __exit__(self, *_: object) -> None:
            decoding.tokens.copy_(self.saved)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    decoding = OurDecoding(steps, steps, torch.tensor([[3], [4]]))
    decoding.prepare()
    assert steps.log == [
        *["step"] * warm, f"rollback {[warm] * 2}", "reserve 1", "capture", "step"
    ]  # fmt: skip
    assert decoding.tokens.tolist() == [[3], [4]]  # the warm-up chose others
    steps.log.clear()
    decoding.step()
    assert steps.log == ["reserve 1", "replay", "advance 1 True"]


def test_on_a_cpu_nothing_is_captured() -> None:
    steps = Steps(20)
    steps.cache.device = torch.device("cpu")
    decoding = OurDecoding(steps, steps, torch.tensor([[3], [4]]))
    decoding.prepare()
    assert steps.log == []
    decoding.step()
    assert steps.log == ["step"] and decoding.tokens.tolist() == [[4], [5]]


def test_peak_memory_is_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    for name, value in (
        ("synchronize", None), ("memory_allocated", 700), ("reset_peak_memory_stats", None),
        ("max_memory_allocated", 1900),
    ):  # fmt: skip
        monkeypatch.setattr(
            torch.cuda, name, lambda device, name=name, value=value: (log.append(name), value)[1]
        )
    with memory.PeakMemory(CUDA) as found:
        log.append("run")
    assert (found.before, found.peak, found.source) == (700, 1900, "allocated")
    assert (
        log.index("reset_peak_memory_stats") < log.index("run") < log.index("max_memory_allocated")
    )
    assert log[0] == log[log.index("run") + 1] == "synchronize"


def test_peak_memory_of_a_process_forgets_earlier_peaks() -> None:
    size = 80 * 2**20
    # Pages of its own: what the tests before have freed would be given out again, unnoticed.
    with memory.PeakMemory(torch.device("cpu")) as first, mmap.mmap(-1, size) as pages:
        for place in range(0, size, mmap.PAGESIZE):
            pages[place] = 1
    with memory.PeakMemory(torch.device("cpu")) as second:
        pass
    assert first.peak - first.before > 0.9 * size
    assert second.source == "RSS" and second.peak - second.before < 0.2 * size


def event(name: str, kind: Any, parent: Any = None, host: float = 0, device: float = 0) -> Any:
    return SimpleNamespace(
        name=name, device_type=kind, cpu_parent=parent, cpu_time_total=host,
        self_cpu_time_total=host / 2, device_time_total=device,
    )  # fmt: skip


def test_operators_and_kernels_of_a_gpu_go_by_its_time() -> None:
    linear = event("aten::linear", DeviceType.CPU, host=900, device=3000)
    events = [
        linear,
        event("aten::mm", DeviceType.CPU, linear, host=800, device=3000),
        event("aten::add", DeviceType.CPU, host=70, device=1000),
        event("cudaLaunchKernel", DeviceType.CPU, host=60),
        event("gemm", DeviceType.CUDA, device=3000),
        event("_attention_decode_kernel", DeviceType.CUDA, device=5000),  # launched by no operator
        event("vectorized_add", DeviceType.CUDA, device=1000),
    ]
    assert operators.top_operators(events, CUDA) == {
        "aten::linear": (1, 3.0),
        "aten::add": (1, 1.0),
    }
    kernels = operators.leaf_kernels(events, CUDA)
    assert kernels == {
        "gemm": (1, 3.0), "_attention_decode_kernel": (1, 5.0), "vectorized_add": (1, 1.0)
    }  # fmt: skip
    shares = operators._shares(operators.top_operators(events, CUDA), 9.0, 1)
    assert [(one.name, round(one.percent)) for one in shares] == [
        ("aten::linear", 33), ("aten::add", 11), (OUTSIDE, 56)
    ]  # fmt: skip


def test_what_is_allocated_at_once() -> None:
    def moved(at: int, size: int, address: int) -> dict[str, Any]:
        return {"name": "[memory]", "ts": at, "args": {"Bytes": size, "Addr": address}}

    events = [
        moved(4, -30, 2), moved(1, 10, 1), moved(2, 30, 2), moved(5, 25, 3), moved(6, -10, 1),
        moved(3, -500, 9),  # from before: it is not in the sum
        {"name": "aten::add", "ts": 0},
    ]  # fmt: skip
    assert operators.peak_of(events) == 40
