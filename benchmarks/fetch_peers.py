"""Fills a folder with the wheels of the peers, for a GPU machine without a network.

    python -m benchmarks.fetch_peers FOLDER [--python 3.12] [--machine x86_64]

`make peers` calls it, on a machine with a network; `make gpu PEERS=FOLDER` takes wheels from there.
What is fetched stands in `peers.txt`. Nothing that these depend on is followed, so that neither
torch nor CUDA comes along. Needs pip and nothing else.

Exit status: 0 all wheels are there; 1 some are not, and why was printed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("peers.txt")
# Wheels for this glibc or an older one run on every Linux that CUDA 12 supports.
_NEWEST_GLIBC = 28

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command and keeps what it prints."""
    return subprocess.run(command, capture_output=True, text=True)


def read_requirements(path: Path = REQUIREMENTS) -> list[str]:
    """The pinned requirements of a file.

    Raises:
        ValueError: a line does not name exactly one version.
    """
    lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    found = [line for line in lines if line]
    for line in found:
        if not re.fullmatch(r"[\w.-]+==[\w.]+", line):
            raise ValueError(f"{path}: expected NAME==VERSION, got {line!r}")
    return found


def platforms(machine: str) -> list[str]:
    """pip's names of the Linux platforms that wheels may be made for, the newest first."""
    modern = [f"manylinux_2_{minor}_{machine}" for minor in range(_NEWEST_GLIBC, 4, -1)]
    return [*modern, f"manylinux2014_{machine}", f"linux_{machine}"]


def download(
    requirement: str, folder: Path, python: str, machine: str, run: Run = run_command
) -> tuple[Path | None, str]:
    """Fetches one wheel for a Python and a machine; the file, or None and why there is none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--python-version", python]
    for platform in platforms(machine):
        command += ["--platform", platform]
    with tempfile.TemporaryDirectory(dir=folder) as own:
        process = run([*command, "--dest", own, requirement])
        if process.returncode:
            return None, last_error(process)
        (fetched,) = Path(own).glob("*.whl")
        return fetched.replace(folder / fetched.name), ""


def last_error(process: subprocess.CompletedProcess[str]) -> str:
    """What pip gives as the reason of a failure, in a line."""
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    text = errors[-1] if errors else f"pip ended with status {process.returncode}"
    return text.removeprefix("ERROR:").strip()


def main(arguments: Sequence[str] | None = None, run: Run = run_command) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fetch_peers",
        description="Fetches the wheels of the peers, for a machine without a network.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of that machine (default: %(default)s)")
    parser.add_argument("--machine", default="x86_64", help="or aarch64 (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python must be like 3.12, got {options.python!r}")
    options.folder.mkdir(parents=True, exist_ok=True)
    requirements, total, missing = read_requirements(), 0, 0
    for number, requirement in enumerate(requirements, 1):
        path, why = download(requirement, options.folder, options.python, options.machine, run)
        if path is None:
            missing += 1
            result = f"not fetched: {why}"
        else:
            total += path.stat().st_size
            result = f"{path.stat().st_size / 1e6:8.1f} MB"
        print(f"{number:3}/{len(requirements)}  {requirement:34} {result}", flush=True)
    print(f"{len(requirements) - missing} wheels, {total / 1e6:.1f} MB, in {options.folder}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
