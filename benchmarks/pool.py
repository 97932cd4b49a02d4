"""Runs checks in worker processes: kernels compile on all cores, and a crash stays where it was.

A check that compiles a kernel takes a second or more of one core, so a few hundred of them would
not fit a run. And after an illegal access a CUDA context is lost: here that costs one worker, which
is replaced, and not the measurements that follow.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Check = Callable[[Any], dict[str, Any]]
OnResult = Callable[[Any, dict[str, Any]], None]

_START_SECONDS = 120.0


class PoolUnavailable(RuntimeError):
    """No worker could start; the message says why. Results so far have been handed over."""


def worker_count(cpus: int, free_bytes: float) -> int:
    """Workers for a machine: a core stays free, and each is granted 2 GiB of GPU memory."""
    return max(1, min(14, cpus - 1, int(free_bytes // 2**31)))


def run_here(tasks: Sequence[Any], check: Check, deadline: float, on_result: OnResult) -> int:
    """Runs tasks one by one in this process; returns how many the deadline left over.

    Raises:
        RuntimeError: a check took the CUDA context down, so that the rest would fail too.
    """
    for index, task in enumerate(tasks):
        if time.monotonic() >= deadline:
            return len(tasks) - index
        on_result(task, check(task))
        if not device_works():
            raise RuntimeError(f"the CUDA context was lost in: {task}")
    return 0


def run_tasks(
    tasks: Sequence[Any],
    check: Check,
    deadline: float,
    on_result: OnResult,
    *,
    workers: int,
    task_seconds: float = 120.0,
) -> int:
    """Runs `check(task)` for each task in worker processes.

    Args:
        tasks, check: picklable; `check` returns a dict and catches the errors that it expects.
        deadline: on `time.monotonic`'s clock; workers still busy then are ended.
        on_result: called in this process with each task and its result. A task that took its
            worker down, or ran past `task_seconds`, has the result {"error": ...}.
        workers: processes at a time.

    Returns:
        The number of tasks without a result.

    Raises:
        PoolUnavailable: tasks are left, and every worker failed before its first task.
    """
    pool = _Pool(check, deque(tasks), on_result, task_seconds)
    try:
        for _ in range(min(workers, len(tasks))):
            pool.start()
        while pool.workers and time.monotonic() < deadline:
            pool.step(min(1.0, max(0.0, deadline - time.monotonic())))
    finally:
        pool.stop()
    return len(tasks) - pool.done


@dataclass
class _Worker:
    process: Any
    connection: Connection
    since: float
    task: Any = None
    ready: bool = False


class _Pool:
    def __init__(
        self, check: Check, waiting: deque[Any], on_result: OnResult, task_seconds: float
    ) -> None:
        self.workers: list[_Worker] = []
        self.done = 0
        self._check, self._waiting = check, waiting
        self._on_result, self._task_seconds = on_result, task_seconds
        self._context = multiprocessing.get_context("spawn")

    def start(self) -> None:
        """Starts one worker."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._check), daemon=True)
        process.start()
        theirs.close()
        self.workers.append(_Worker(process, ours, time.monotonic()))

    def stop(self) -> None:
        """Ends all workers."""
        for worker in list(self.workers):
            self._remove(worker)

    def step(self, seconds: float) -> None:
        """Waits for messages for at most `seconds`, and handles them."""
        ready = wait([worker.connection for worker in self.workers], seconds)
        for worker in list(self.workers):
            if worker.connection in ready:
                try:
                    kind, value = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join(5)
                    self._lose(worker, f"the worker died, status {worker.process.exitcode}")
                    continue
                self._handle(worker, kind, value)
            elif time.monotonic() - worker.since > self._limit(worker):
                self._lose(worker, f"no answer within {self._limit(worker):.0f} s")

    def _limit(self, worker: _Worker) -> float:
        return self._task_seconds if worker.ready else _START_SECONDS

    def _handle(self, worker: _Worker, kind: str, value: Any) -> None:
        worker.since = time.monotonic()
        worker.ready = True
        if kind == "result":
            task, worker.task = worker.task, None
            result, usable = value
            self._finish(task, result)
            if not usable:
                self._remove(worker)
                if self._waiting:
                    self.start()
                return
        if not self._waiting:
            self._remove(worker)
            return
        worker.task = self._waiting.popleft()
        with contextlib.suppress(OSError):  # it died while idle: the next receive finds that out
            worker.connection.send(worker.task)

    def _lose(self, worker: _Worker, reason: str) -> None:
        self._remove(worker)
        if worker.task is not None:
            self._finish(worker.task, {"error": reason})
            if self._waiting:
                self.start()
        elif self._waiting and not self.workers:
            raise PoolUnavailable(f"no worker process could start: {reason}")

    def _finish(self, task: Any, result: dict[str, Any]) -> None:
        self.done += 1
        self._on_result(task, result)

    def _remove(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.connection.close()
        worker.process.kill()  # it is idle, or past its time
        worker.process.join(5)


def _work(connection: Connection, check: Check) -> None:
    """A worker: announces itself, then answers tasks until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.init()
    connection.send(("ready", None))
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            result = check(task)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        # Where the context is lost, another process gets a new one.
        connection.send(("result", (result, device_works())))


def device_works() -> bool:
    """Whether the CUDA context is still usable; True where there is none."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
