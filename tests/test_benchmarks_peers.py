"""Wheels of peers: fetched by pinned versions, and at hand for one process alone."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import fetch_peers, with_peers
from tests.bad_arguments import check

ROOT = Path(__file__).resolve().parents[1]


def make_wheel(folder: Path, name: str, source: str, tag: str = "py3-none-any") -> Path:
    """A wheel of one module, with a script beside it."""
    path, info = folder / f"{name}-1.0-{tag}.whl", f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": source,
        f"{name}-1.0.data/scripts/{name}-program": "#!/bin/sh\nexit 0\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            entry = zipfile.ZipInfo(file)
            entry.external_attr = 0o100755 << 16
            wheel.writestr(entry, text)
    return path


def test_a_module_runs_with_the_wheels_that_fit(tmp_path: Path) -> None:
    peers = tmp_path / "peers"
    peers.mkdir()
    make_wheel(peers, "some_peer", "ANSWER = 42")
    make_wheel(peers, "other_python", "", tag="cp27-cp27m-win32")
    make_wheel(peers, "numpy", "raise RuntimeError('never')")
    make_wheel(peers, "rich", "raise RuntimeError('installed here')")
    (tmp_path / "some_module.py").write_text(
        "import numpy, rich, shutil, sys, some_peer\n"
        "print(some_peer.ANSWER, bool(shutil.which('some_peer-program')), sys.argv[1:])\n"
        "print(some_peer.__file__)\nsys.exit(7)\n"
    )
    command = [sys.executable, "-m", "benchmarks.with_peers", str(peers), "some_module", "--quick"]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path, "PIP_INDEX_URL": "http://127.0.0.1:9"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert process.returncode == 7, process.stderr
    *verdicts, printed, file = process.stdout.splitlines()
    assert printed == "42 True ['--quick']"
    assert not Path(file).exists()  # the folder lives as long as the process
    assert verdicts[0] == "numpy 1.0: not taken, it is never taken from a folder of peers"
    assert "other_python 1.0: not taken," in verdicts[1] and "not a supported" in verdicts[1]
    assert verdicts[2].startswith("rich 1.0: not taken, ") and "installed" in verdicts[2]
    assert verdicts[3] == "some_peer 1.0: taken"


def test_what_is_on_the_path_already_comes_first(tmp_path: Path) -> None:
    (tmp_path / "b" / "bin").mkdir(parents=True)
    wheels = [
        with_peers.Wheel("a", "1", tmp_path / "a"),
        with_peers.Wheel("b", "1", tmp_path / "b"),
        with_peers.Wheel("c", "1", why="no"),
    ]
    found = with_peers.environment_with(wheels, {"PYTHONPATH": ".", "PATH": "/bin", "X": "1"})
    assert found["PYTHONPATH"] == f".:{tmp_path / 'a'}:{tmp_path / 'b'}"
    assert found["PATH"] == f"{tmp_path / 'b' / 'bin'}:/bin" and found["X"] == "1"


def test_a_folder_without_wheels_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, words in ((tmp_path, "it holds no wheel"), (tmp_path / "no", "no such folder")):
        assert with_peers.main([str(folder), "this"]) == 2
        error = capsys.readouterr().err
        assert "PEERS must be a folder" in error and str(folder) in error and words in error


def test_pinned_wheels_are_fetched_without_what_they_depend_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def pip(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        commands.append(command)
        name, _, version = command[-1].partition("==")
        if name == "fa3-fwd":
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No such version\n")
        folder = Path(command[command.index("--dest") + 1])
        (folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(b"0" * 10**6)
        return subprocess.CompletedProcess(command, 0, "", "")

    assert fetch_peers.main([str(tmp_path / "new"), "--python", "3.11"], pip) == 1
    printed = capsys.readouterr().out
    requirements = fetch_peers.read_requirements()
    assert [command[-1] for command in commands] == requirements
    for command in commands:
        assert {"--no-deps", "--only-binary=:all:", "manylinux_2_28_x86_64"} <= set(command)
        assert command[command.index("--python-version") + 1] == "3.11"
    assert "fa3-fwd==0.0.3                     not fetched: No such version" in printed
    count = len(requirements) - 1
    assert f"{count} wheels, {count:.1f} MB, in {tmp_path / 'new'}" in printed
    # The peers that this project is measured beside, each with one version.
    names = {requirement.partition("==")[0] for requirement in requirements}
    assert {"liger-kernel", "fla-core", "conch-triton-kernels", "flashinfer-python"} <= names
    assert not {"torch", "triton", "numpy", "transformers"} & names


def test_a_requirement_without_a_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "peers.txt"
    path.write_text("# all\nliger-kernel==0.8.5\nfla-core>=0.5\n")
    check(lambda: fetch_peers.read_requirements(path), ValueError, ("NAME==VERSION", "fla-core>="))
