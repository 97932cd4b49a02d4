"""Packaging. The Triton kernels are picked up as `fastattn.kernels` through a symlink."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Return `__version__` from fastattn/version.py, without importing the package."""
    text = (ROOT / "fastattn" / "version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('fastattn/version.py has no line of the form __version__ = "..."')
    return match.group(1)


def read_long_description() -> str:
    """Return the README, or nothing where only the sources were copied."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


CLI = ["typer", "rich", "matplotlib"]
TRANSFORMERS = ["transformers>=5.17", "safetensors", "tokenizers"]
MODELS = ["safetensors", "gguf"]
EXAMPLES = ["sacrebleu>=2.4", *CLI, *TRANSFORMERS]
TEST = [
    "pytest>=8",
    "pytest-benchmark",
    "pytest-xdist",
    "hypothesis",
    "selenium>=4.20",  # the HTML report is opened in a headless Chromium
    "setuptools>=70.1",  # the packaging test builds a wheel with the one at hand
    *MODELS,
    *EXAMPLES,
]
DEV = ["ruff", "mypy"]

setup(
    name="fastattn",
    version=read_version(),
    description="Triton attention and sampling kernels that drop into PyTorch transformers",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    author="The fastattn authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # Namespace discovery, because kernels/ has no __init__.py at its root: a top-level `kernels`
    # is another project's import name.
    packages=find_namespace_packages(
        include=["fastattn", "fastattn.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"": ["py.typed", "*.json", "*.jsonl", "*.tsv", "*.txt"]},
    install_requires=[
        "torch>=2.6",
        'triton>=3.6; platform_system == "Linux"',
        "numpy",
    ],
    extras_require={
        "cli": CLI,
        "transformers": TRANSFORMERS,
        "visualize": ["matplotlib"],
        "models": MODELS,
        "examples": EXAMPLES,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["fastattn = fastattn.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
