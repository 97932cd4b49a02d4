"""Runs the workers of the compile report and gathers their rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO, Any

from fastattn.testing.compile_report.rows import CompileReportError, Progress, Row

_WORKER = "fastattn.testing.compile_report.worker"


def run_workers(
    targets: list[str],
    request: dict[str, Any],
    jobs: int,
    progress: Callable[[Progress], None] | None,
) -> list[Row]:
    """Compile in worker processes, one target each, at most ``jobs`` at a time.

    With more jobs than targets, a target's cases are dealt out to several workers. ``request`` is
    what every worker is told: factories and filters.
    """
    shards = max(1, math.ceil(jobs / max(1, len(targets))))
    pool = _Pool(progress)
    threads = ThreadPoolExecutor(max_workers=jobs)
    futures = [
        threads.submit(pool.run_shard, {**request, "target": name, "shard": [shard, shards]})
        for name in targets
        for shard in range(shards)
    ]
    try:
        for future in as_completed(futures):
            future.result()
    except BaseException:  # Ctrl-C too: leave no worker behind
        pool.stop()
        for future in futures:
            future.cancel()
        raise
    finally:
        threads.shutdown()
    order = {name: index for index, name in enumerate(targets)}
    return [row for _, row in sorted(pool.rows, key=lambda item: (order[item[1].target], item[0]))]


class _Pool:
    """What the threads share: the rows so far, the progress and the running processes."""

    def __init__(self, progress: Callable[[Progress], None] | None) -> None:
        self.rows: list[tuple[int, Row]] = []  # (index of the case, row)
        self._progress = progress
        self._done = self._total = 0
        self._running: list[subprocess.Popen[str]] = []
        self._stopped = False
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Kill the running workers and let no other start."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def run_shard(self, request: dict[str, Any]) -> None:
        """Run one worker; where the compiler takes it down, go on with another after that case."""
        first = 0
        while True:
            crashed = self._run_worker({**request, "first": first})
            if crashed is None or self._stopped:
                return
            first = crashed + 1

    def _run_worker(self, request: dict[str, Any]) -> int | None:
        """Run a worker to its end; returns the index of the case that it died of, if it did."""
        current: dict[str, Any] | None = None
        finished = False
        with tempfile.TemporaryFile() as stderr:
            process = self._start(request, stderr)
            if process is None:
                return None
            with process:
                assert process.stdout is not None  # it was opened as a pipe
                for line in process.stdout:
                    message = json.loads(line)
                    kind = message["kind"]
                    if kind == "listed":
                        self._step(total=message["count"] if request["first"] == 0 else 0)
                    elif kind == "started":
                        current = message["row"]
                        names = ("target", "kernel", "case", "config")
                        self._step(current=" ".join(current[name] for name in names))
                    elif kind == "compiled":
                        self._add(message["index"], message["rows"])
                        current = None
                    elif kind == "failed":
                        raise CompileReportError(message["error"])
                    elif kind == "finished":
                        finished = True
            with self._lock:
                self._running.remove(process)
            if finished or self._stopped:
                return None
            stderr.seek(0, os.SEEK_END)
            stderr.seek(max(0, stderr.tell() - 4000))
            last_words = stderr.read().decode(errors="replace")
            report = f"worker died with status {process.returncode}\n{last_words}"
        if current is None:
            raise CompileReportError(report)
        index = current.pop("index")
        self._add(index, [{**current, "error": report}])
        return int(index)

    def _start(self, request: dict[str, Any], stderr: IO[bytes]) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=_worker_environment(),
            )
            self._running.append(process)
            return process

    def _add(self, index: int, rows: list[dict[str, Any]]) -> None:
        with self._lock:
            self.rows.extend((index, Row.from_dict(row)) for row in rows)
        self._step(done=1)

    def _step(self, *, done: int = 0, total: int = 0, current: str = "") -> None:
        with self._lock:
            self._done += done
            self._total += total
            if self._progress is not None and (done or total or current):
                self._progress(Progress(self._done, self._total, current))


def _worker_environment() -> dict[str, str]:
    """This process's environment, in compiled mode and with what it can import."""
    env = {
        name: value
        for name, value in os.environ.items()
        # Interpreter and compiler cannot share a process; the binary alone does not say enough.
        if name not in ("TRITON_INTERPRET", "TRITON_STORE_BINARY_ONLY")
    }
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # The report must not depend on the machine's GPU, so the workers see none.
    env["CUDA_VISIBLE_DEVICES"] = env["HIP_VISIBLE_DEVICES"] = ""
    return env
