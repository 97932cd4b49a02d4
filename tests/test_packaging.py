"""The wheel and the sdist: what is in them, and whether they import away from the checkout."""

import ast
import email
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from fastattn.version import __version__

ROOT = Path(__file__).resolve().parents[1]

# Building in a copy keeps build/ and *.egg-info out of the checkout, and what an earlier build left
# there out of the wheel. tests and benchmarks are copied because a wheel must leave them out.
FOLDERS = ["fastattn", "kernels", "tests", "benchmarks"]

DUMMY_KERNELS = "WHOSE = 'somebody else'\n"


def run(*arguments: object, cwd: Path, **env: str) -> str:
    """Run a command and return its output; on failure, fail the test with that output."""
    process = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, f"{arguments} failed:\n{process.stdout}"
    return process.stdout


def run_python(code: str, *, cwd: Path, pythonpath: list[Path]) -> str:
    path = os.pathsep.join(str(entry) for entry in pythonpath)
    return run(sys.executable, "-c", textwrap.dedent(code), cwd=cwd, PYTHONPATH=path)


def build_wheel(source: Path, folder: Path) -> Path:
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"),
        *("--no-deps", "--no-build-isolation", "--wheel-dir", folder, source),
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def python_sources() -> dict[str, Path]:
    """Return the checkout's Python files by the name each must have in a wheel."""
    sources = {}
    for package, top in (("fastattn", ROOT / "fastattn"), ("fastattn/kernels", ROOT / "kernels")):
        for file in top.rglob("*.py"):
            name = PurePosixPath(package, file.relative_to(top).as_posix())
            if "__pycache__" not in name.parts:
                sources[str(name)] = file
    return sources


def archive_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}


def package_files(wheel: Path) -> dict[str, bytes]:
    """Return the wheel's files without its metadata."""
    return {n: data for n, data in archive_files(wheel).items() if ".dist-info/" not in n}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the unpacked wheel."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def other_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds another project's top-level package `kernels`."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(DUMMY_KERNELS)
    return folder


def test_symlink_is_relative() -> None:
    link = ROOT / "fastattn" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files = archive_files(wheel)
    tops = {PurePosixPath(name).parts[0] for name in files}
    assert tops == {"fastattn", next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in files if "__pycache__" in name]
    assert "fastattn/py.typed" in files


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    sources = python_sources()
    assert any(name.startswith("fastattn/kernels/attention/") for name in sources)
    packed = {name: data for name, data in package_files(wheel).items() if name.endswith(".py")}
    assert packed.keys() == sources.keys()
    assert [name for name in packed if packed[name] != sources[name].read_bytes()] == []


def test_metadata(wheel: Path) -> None:
    files = archive_files(wheel)
    info = next(PurePosixPath(name).parts[0] for name in files if ".dist-info/" in name)
    metadata = email.message_from_bytes(files[f"{info}/METADATA"])
    assert metadata["Name"] == "fastattn"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.10"
    unconditional = {r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r}
    assert unconditional == {"torch>=2.6", "numpy", 'triton>=3.6; platform_system == "Linux"'}
    extras = {"cli", "transformers", "visualize", "models", "examples", "test", "dev"}
    assert set(metadata.get_all("Provides-Extra") or []) == extras
    entry_points = files[f"{info}/entry_points.txt"].decode()
    assert "fastattn = fastattn.cli:main" in entry_points.splitlines()


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # Older Pythons have no such filter, and it is our own archive.
        options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path / "unpacked", **options)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert package_files(build_wheel(unpacked, tmp_path)) == package_files(wheel)


def test_wheel_imports_beside_another_kernels(
    site: Path, other_kernels: Path, tmp_path: Path
) -> None:
    """From a folder that is not the checkout, with `kernels` already taken by another project."""
    code = """
        import importlib, pkgutil, sys
        import kernels
        assert kernels.WHOSE == "somebody else"

        import fastattn, fastattn.kernels
        print("file", fastattn.__file__)
        found = pkgutil.walk_packages(fastattn.kernels.__path__, "fastattn.kernels.")
        for module in found:
            print("kernel", importlib.import_module(module.name).__file__)
        assert sys.modules["kernels"] is kernels
    """
    output = run_python(code, cwd=tmp_path, pythonpath=[other_kernels, site])
    files = [line.split(maxsplit=1) for line in output.splitlines()]
    outside = [file for _, file in files if not Path(file).is_relative_to(site)]
    assert outside == []
    wanted = [name for name in python_sources() if name.startswith("fastattn/kernels/")]
    assert sum(kind == "kernel" for kind, _ in files) == len(wanted)


def test_checkout_leaves_the_name_kernels_alone(other_kernels: Path) -> None:
    """Even from the checkout's root, where `kernels/` is a folder on the path."""
    code = "import kernels, fastattn; print(kernels.WHOSE); print(fastattn.__file__)"
    output = run_python(code, cwd=ROOT, pythonpath=[ROOT, other_kernels]).splitlines()
    assert output == ["somebody else", str(ROOT / "fastattn" / "__init__.py")]


def test_kernels_import_nothing_of_the_rest() -> None:
    """kernels/ is the lowest floor: its modules import each other, as fastattn.kernels, no more."""
    offenders = []
    for file in (ROOT / "kernels").rglob("*.py"):
        folder = ("fastattn", "kernels", *file.relative_to(ROOT / "kernels").parts[:-1])
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = folder[: len(folder) + 1 - node.level] if node.level else ()
                module = ".".join([*base, *([node.module] if node.module else [])])
                names = [f"{module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                ours = name.split(".")[0] in {"fastattn", "kernels"}
                upper = ours and not name.startswith("fastattn.kernels.")
                if upper or name.startswith(("torch.nn", "torch.autograd")):
                    offenders.append(f"{file}:{node.lineno}: import of {name}")
    assert offenders == []
