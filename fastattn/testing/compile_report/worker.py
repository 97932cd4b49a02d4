"""A worker of the compile report: lists the cases for one target and compiles them.

Started as a process of its own (see ``pool``) with a request as JSON in its only argument:
``target``, ``factories``, ``kernel`` and ``case`` (filters), ``shard`` ``[i, n]`` (compile every
n-th case from the i-th) and ``first`` (skip the cases before this index). It answers with one
JSON object a line on standard output.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastattn.testing.compile_report.rows import TARGETS, CompileCase, Row, Target

Factory = Callable[[Target], Iterable[CompileCase]]


class _Driver:
    """Stands in for Triton's driver, so that the JIT compiles for a chip that is not there."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


@dataclass(frozen=True)
class Compilation:
    """One call of ``JITFunction.run``: its ``CompiledKernel``, or the error's text."""

    function: str
    kernel: Any
    error: str | None
    seconds: float
    cached: bool


@contextmanager
def compiling_only(target: Target) -> Iterator[list[Compilation]]:
    """Within it a launch of any ``@triton.jit`` function compiles it for ``target`` and stops.

    Yields a list to which the launches are added.
    """
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must be unset to compile, got it set")
    done: list[Compilation] = []
    misses: list[bool] = []
    original = JITFunction.run
    previous_listener = triton.knobs.compilation.listener

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        misses.clear()
        begin = time.perf_counter()
        kernel, error = None, None
        try:
            kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as exception:  # noted, and the launcher goes on to its next kernel
            error = f"{type(exception).__name__}: {exception}"
        seconds = time.perf_counter() - begin
        # No call of the listener at all: the JIT had the kernel in this process's memory.
        cached = error is None and not any(misses)
        done.append(Compilation(self.fn.__name__, kernel, error, seconds, cached))
        return kernel

    def listen(*, cache_hit: bool, **_: Any) -> None:
        misses.append(not cache_hit)

    triton.runtime.driver.set_active(_Driver(target))
    JITFunction.run = compile_instead
    triton.knobs.compilation.listener = listen
    try:
        yield done
    finally:
        JITFunction.run = original
        triton.knobs.compilation.listener = previous_listener


def load_factory(name: str) -> Factory:
    """The function that "package.module:function" or "path/to/file.py:function" names."""
    place, _, function = name.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import {place}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    factory: Factory = getattr(module, function)
    return factory


def config_text(config: object) -> str:
    """A config as the table shows it."""
    if (
        dataclasses.is_dataclass(config)
        and not isinstance(config, type)
        and type(config).__str__ is object.__str__
    ):
        return " ".join(f"{f.name}={getattr(config, f.name)}" for f in dataclasses.fields(config))
    return str(config)


def compile_case(case: CompileCase, target: Target) -> list[Row]:
    """Compile the kernels of a case, under :func:`compiling_only`'s protection."""
    from fastattn.testing.compile_report.resources import measure

    base = describe(case, target)
    stderr_start = _stderr_size()
    rows = []
    with compiling_only(target) as compilations:
        try:
            case.launch()
        except Exception as exception:
            text = "".join(traceback.format_exception(exception))
            rows.append(replace(base, error=f"{type(exception).__name__}: {exception}\n{text}"))
    if not compilations and not rows:
        return [replace(base, error="the launcher launched no kernel")]
    measured = []
    for item in compilations:
        row = replace(base, function=item.function, seconds=item.seconds, cached=item.cached)
        if item.error is not None:
            # What the compiler passes say goes to standard error, not into the exception.
            said = _compiler_errors(stderr_start)
            measured.append(replace(row, error=f"{item.error}\n{said}".strip()))
            continue
        try:
            measured.append(replace(row, **measure(item.kernel, target)))
        except Exception as exception:
            text = f"cannot read the compiled kernel: {type(exception).__name__}: {exception}"
            measured.append(replace(row, error=text))
    some_have_dots = any(row.dots for row in measured)
    rows = [
        replace(
            row,
            expect_tensor_cores=case.expect_tensor_cores and (row.dots > 0 or not some_have_dots),
        )
        for row in measured
    ] + rows
    return rows


def describe(case: CompileCase, target: Target) -> Row:
    """The row of a case before it is compiled."""
    return Row(
        kernel=case.kernel,
        case=case.case,
        config=config_text(case.config),
        target=target.name,
        shared_limit=target.shared_limit,
    )


def _stderr_size() -> int:
    return os.fstat(2).st_size


def _compiler_errors(start: int) -> str:
    """Lines with "error" on standard error since ``start``, if that is a file."""
    try:
        text = os.pread(2, 1 << 20, start).decode(errors="replace")
    except OSError:  # a terminal or a pipe
        return ""
    return "\n".join([line for line in text.splitlines() if "error" in line.lower()][:5])


def _selected(case: CompileCase, request: dict[str, Any]) -> bool:
    def matches(text: str, parts: list[str]) -> bool:
        return not parts or any(part in text for part in parts)

    return matches(case.kernel, request["kernel"]) and matches(case.case, request["case"])


def run(request: dict[str, Any], say: Callable[..., None]) -> None:
    """Answer a request through ``say(kind, **values)``."""
    target = TARGETS[request["target"]]
    try:
        with compiling_only(target):  # a factory may ask Triton for the current target
            cases = [
                case
                for name in request["factories"]
                for case in load_factory(name)(target)
                if _selected(case, request)
            ]
    except Exception as exception:
        reason = f"cannot list the cases for {target.name}: {type(exception).__name__}: {exception}"
        say("failed", error=f"{reason}\n{traceback.format_exc()}")
        return
    shard, shards = request["shard"]
    mine = list(enumerate(cases))[shard::shards]
    say("listed", count=len(mine))
    for index, case in mine:
        if index < request["first"]:
            continue
        say("started", row={"index": index, **describe(case, target).to_dict()})
        rows = compile_case(case, target)
        say("compiled", index=index, rows=[row.to_dict() for row in rows])
    say("finished")


def main() -> None:
    """Read the request from the command line and answer on standard output."""
    # Triton prints the PTX of a failed compilation to standard output: the answers get a
    # descriptor of their own, and what is printed joins standard error.
    answers = os.fdopen(os.dup(1), "w")
    sys.stdout.flush()
    os.dup2(2, 1)

    def say(kind: str, **values: Any) -> None:
        answers.write(json.dumps({"kind": kind, **values}) + "\n")
        answers.flush()

    run(json.loads(sys.argv[1]), say)


if __name__ == "__main__":
    main()
