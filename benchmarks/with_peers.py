"""Runs a module with the wheels of a folder at hand, without a network and installing nothing.

    PYTHONPATH=. python -m benchmarks.with_peers FOLDER benchmarks.gpu [ARGUMENTS ...]

`make gpu PEERS=FOLDER` calls it. Each wheel is unpacked by pip into a temporary folder, which comes
after the checkout on PYTHONPATH and is removed at the end. What this Python has already is kept:
above all its torch and Triton, which the peers have to work with.

Exit status: that of the module; 2 where it cannot be started.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fetch_peers import Run, last_error, run_command

_NEVER = re.compile(r"(torch|torchvision|torchaudio|triton|pytorch_triton|numpy|fastattn)$")


@dataclass(frozen=True)
class Wheel:
    """What became of one wheel.

    Attributes:
        name, version: by its file.
        folder: where it was unpacked; None where it was not.
        why: it was not.
    """

    name: str
    version: str
    folder: Path | None = None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}: {'taken' if self.folder else f'not taken, {self.why}'}"


def take_wheels(source: Path, target: Path, run: Run = run_command) -> list[Wheel]:
    """Unpacks the wheels of a folder, each into a folder of its own below `target`.

    Raises:
        ValueError: `source` is no folder, or holds no wheel.
    """
    files = sorted(source.glob("*.whl")) if source.is_dir() else []
    if not files:
        what = "it holds no wheel" if source.is_dir() else "there is no such folder"
        raise ValueError(f"PEERS must be a folder that `make peers` filled, got {source}: {what}")
    return [_take(path, target, run) for path in files]


def _take(path: Path, target: Path, run: Run) -> Wheel:
    name, version, *_ = (*path.name.split("-"), "unknown version")
    if _NEVER.match(name.lower()):
        return Wheel(name, version, why="it is never taken from a folder of peers")
    if installed := installed_version(name):
        return Wheel(name, version, why=f"{installed} is installed")
    folder = target / name
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install"]
    command += ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(folder)]
    process = run([*command, str(path)])
    if process.returncode:
        return Wheel(name, version, why=last_error(process))
    return Wheel(name, version, folder)


def installed_version(name: str) -> str:
    """The version of a distribution that this Python has; "" if it has none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def environment_with(wheels: Sequence[Wheel], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables for a process that finds these wheels, behind what PYTHONPATH has already."""
    folders = [wheel.folder for wheel in wheels if wheel.folder is not None]
    before = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    programs = [str(folder / "bin") for folder in folders if (folder / "bin").is_dir()]
    return {
        **environment,
        "PYTHONPATH": os.pathsep.join([*before, *map(str, folders)]),
        "PATH": os.pathsep.join([*programs, environment.get("PATH", os.defpath)]),
    }


def run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a module in a process of its own; its exit status. Signals are the module's to handle.

    Ctrl-C reaches it from the terminal; a request to end is handed on.
    """
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], env=dict(environment))
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        return process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None, run: Run = run_command) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.with_peers",
        description="Runs a module with the wheels of a folder at hand.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fastattn-peers-") as target:
        try:
            wheels = take_wheels(options.folder, Path(target), run)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        for wheel in wheels:
            print(wheel, flush=True)
        environment = environment_with(wheels, os.environ)
        return run_module(options.module, options.arguments, environment)


if __name__ == "__main__":
    sys.exit(main())
