"""Set up for every test: where Triton kernels run, on which device, with how many threads."""

import importlib.util
import os
import sys

# NumPy multiplies the interpreter's tiles, which are too small to share out between threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    # Triton reads this when it is imported, and again when a kernel is defined.
    if "triton" in sys.modules:
        raise RuntimeError(
            "triton was imported before tests/conftest.py could set TRITON_INTERPRET"
        )
    os.environ["TRITON_INTERPRET"] = "1"

from fastattn.testing.interpreter import is_interpreting, repair


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "interpreter: needs Triton's interpreter; skipped where kernels are compiled"
    )
    config.addinivalue_line("markers", "whole_tiles: sampling with the tiles that dispatch selects")
    if "OMP_NUM_THREADS" not in os.environ:
        worker = "PYTEST_XDIST_WORKER" in os.environ
        torch.set_num_threads(1 if worker else min(4, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpreter") and not _can_interpret():
            item.add_marker(pytest.mark.skip(reason="needs Triton's interpreter"))


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter() -> None:
    if _can_interpret():
        repair()


@pytest.fixture(scope="session")
def device() -> str:
    """Where to run: "cuda" where kernels can be compiled for it, else "cpu"."""
    return "cuda" if torch.cuda.is_available() and not is_interpreting() else "cpu"


def _can_interpret() -> bool:
    return is_interpreting() and importlib.util.find_spec("triton") is not None
