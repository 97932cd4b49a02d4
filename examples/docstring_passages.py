"""Real labelled text that every Python has: docstrings of the standard library's packages.

The label of a docstring is its package. Licence of the texts: PSF-2.0.
"""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

PACKAGES = (
    "asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib",
    "xml",
)  # fmt: skip
LICENSE = "PSF-2.0"
MIN_WORDS = 10
HELD_OUT_SHARE = 0.3
# A training passage that shares more of its words than this with a held-out one is left out.
NEAR_DUPLICATE = 0.7


class Passage(NamedTuple):
    """One docstring: its words, its label (an index of PACKAGES) and the file it is from."""

    text: str
    label: int
    file: str


@functools.cache
def load_passages() -> tuple[Passage, ...]:
    """The docstrings of PACKAGES, without their tests; one that is found again is left out.

    Raises:
        FileNotFoundError: this Python comes without the sources of a package.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    passages: dict[str, Passage] = {}
    for label, package in enumerate(PACKAGES):
        for path in sorted((root / package).rglob("*.py")):
            file = path.relative_to(root)
            if {"test", "tests"} & set(file.parts):
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                docstring = ast.get_docstring(node) if isinstance(node, documented) else None
                text = " ".join((docstring or "").split())
                if text.count(" ") >= MIN_WORDS - 1:
                    passages.setdefault(text, Passage(text, label, file.as_posix()))
    missing = set(range(len(PACKAGES))) - {passage.label for passage in passages.values()}
    if missing:
        names = ", ".join(PACKAGES[label] for label in sorted(missing))
        raise FileNotFoundError(f"the Python sources in {root} have no docstrings of {names}")
    return tuple(passages.values())


@functools.cache
def split_by_file(
    passages: tuple[Passage, ...], seed: int
) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
    """Passages to train on and held-out ones, which share no file.

    Of each package, files drawn at random are held out, up to HELD_OUT_SHARE of its passages.
    """
    held_out_files: set[str] = set()
    for label in range(len(PACKAGES)):
        sizes = Counter(passage.file for passage in passages if passage.label == label)
        room = HELD_OUT_SHARE * sum(sizes.values())
        for file in random.Random(seed).sample(sorted(sizes), len(sizes)):
            if sizes[file] <= room:
                held_out_files.add(file)
                room -= sizes[file]
    held_out = tuple(passage for passage in passages if passage.file in held_out_files)
    unseen = [_words(passage) for passage in held_out]

    def is_new(passage: Passage) -> bool:
        words = _words(passage)
        return all(len(words & w) <= NEAR_DUPLICATE * len(words | w) for w in unseen)

    rest = (passage for passage in passages if passage.file not in held_out_files)
    return tuple(passage for passage in rest if is_new(passage)), held_out


def _words(passage: Passage) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", passage.text.lower()))
