"""The gallery: `python -m examples.gallery` runs every entry, each of which is a script of its own.

An entry is a module of this folder. The first line of its docstring is its title, and it has

    run(options) -> Results     measures, draws into `options.out`, and states the spread
    describe(figures) -> str    its section of docs/gallery.md, with the figures filled in

    if __name__ == "__main__":
        gallery.main(__file__, __doc__, run, describe)

`main` gives it --quick, --check, --out, --seed and --threads, writes its JSON and its section. What
entries read, texts and models, is in gallery_data.py.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import track as rich_track

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs" / "gallery.md"
# In the order of the gallery.
NAMES = (
    "masks", "similarity", "token_classes", "finetune_heads", "fill_the_blank", "training_signal",
    "decoding_strategies", "family_costs", "long_perplexity", "translate",
)  # fmt: skip
ROUNDING = 1e-3
"""Relative difference that another number of threads or another torch may make of any figure."""

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
T = TypeVar("T")


class Entry(NamedTuple):
    """One script: its module, the first line of its docstring, and the command that runs it."""

    name: str
    title: str
    command: str


@dataclass(frozen=True)
class Options:
    """What the command line says: less work, the folder to write to, and what is drawn from."""

    quick: bool = False
    out: Path = RESULTS
    seed: int = 0


@dataclass(frozen=True)
class Results:
    """What a run measured, as JSON can hold it.

    Attributes:
        figures: numbers and texts, in dicts and lists.
        spread: by patterns of dotted places ("pooling.*.accuracy"), how far another run may lie
            from this one: an absolute difference, or None where it is not compared (a time). The
            first pattern that fits counts; what has none is the same but for `ROUNDING`.
    """

    figures: dict[str, Any]
    spread: dict[str, float | None] = field(default_factory=dict)


def entries() -> list[Entry]:
    """The scripts that are here, in the order of the gallery."""
    found = []
    for name in NAMES:
        path = HERE / f"{name}.py"
        if path.is_file():
            title = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or name
            found.append(Entry(name, title.splitlines()[0], f"python -m examples.{name}"))
    return found


def main(
    file: str,
    doc: str | None,
    run: Callable[[Options], Results],
    describe: Callable[[dict[str, Any]], str],
) -> None:
    """Runs an entry as the command line says."""
    name, command = Path(file).stem, f"python -m examples.{Path(file).stem}"
    parser = argparse.ArgumentParser(
        prog=command, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small, under 20 s: shows it runs")
    parser.add_argument("--check", action="store_true", help="run again and compare, write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # the models come with packages
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) if given.check else given.out
        out.mkdir(parents=True, exist_ok=True)
        results = run(Options(given.quick, out, given.seed))
    figures = _rounded(results.figures)
    if given.check:
        raise SystemExit(compare(name, figures, load_results(name, given.out)))
    written = {
        "command": command,
        "settings": {"seed": given.seed, "threads": given.threads, "quick": given.quick},
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "fastattn": importlib.metadata.version("fastattn")},
        "spread": {**results.spread, "*": f"{ROUNDING} of its size"},
        "figures": figures,
    }  # fmt: skip
    text = json.dumps(written, indent=1, ensure_ascii=False)
    text = re.sub(r"(?<=[\d\[,])\n +(?=[-\d\]])", " ", text)  # numbers in a row
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    section = describe(figures)
    console.print(section, markup=False)
    if out == RESULTS and not given.quick:
        write_section(name, section)
    console.print(f"written: {out / name}.json and its pictures", style="bold", soft_wrap=True)


def load_results(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The JSON that a run of an entry wrote."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def compare(name: str, figures: dict[str, Any], committed: dict[str, Any]) -> int:
    """Prints where figures lie outside of the committed spread; 0 where none does."""
    ours, theirs = dict(leaves(figures)), dict(leaves(committed["figures"]))
    wrong = sorted(set(ours) ^ set(theirs))
    for place in ours.keys() & theirs.keys():
        if not _within(ours[place], theirs[place], spread_of(place, committed["spread"])):
            wrong.append(f"{place}: {theirs[place]!r} was committed, {ours[place]!r} came out")
    for line in wrong:
        console.print(line, markup=False)
    console.print(f"{name}: {len(theirs)} figures, {len(wrong)} outside of their spread")
    return int(bool(wrong))


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and text of nested dicts and lists, by its dotted place."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, part in items:
        inner = f"{place}.{key}" if place else str(key)
        if isinstance(part, Mapping | list | tuple):
            yield from leaves(part, inner)
        else:
            yield inner, part


def spread_of(place: str, spread: Mapping[str, Any]) -> float | str | None:
    return next(value for key, value in spread.items() if fnmatch.fnmatchcase(place, key))


def _within(ours: Any, theirs: Any, spread: Any) -> bool:
    if spread is None:
        return True
    if not isinstance(theirs, float | int) or not isinstance(ours, float | int):
        return ours == theirs
    if isinstance(spread, str):
        return math.isclose(ours, theirs, rel_tol=ROUNDING, abs_tol=1e-6)
    return abs(ours - theirs) <= spread


def _rounded(value: Any) -> Any:
    """Five digits of each number: what is behind them is another machine's."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def marks(name: str) -> tuple[str, str]:
    """The lines of docs/gallery.md between which an entry's section stands."""
    return f"<!-- written by examples/{name}.py -->\n", f"<!-- end of {name} -->"


def read_section(name: str) -> str:
    """An entry's section as docs/gallery.md has it; "" where it has none yet."""
    begin, end = marks(name)
    return DOCS.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()


def write_section(name: str, section: str) -> None:
    """Puts a section between its marks."""
    begin, end = marks(name)
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    DOCS.write_text(f"{before}{begin}\n{section.strip()}\n\n{end}{after}", encoding="utf-8")


def fill(name: str, figures: Mapping[str, Any], **more: Any) -> str:
    """sections/NAME.md with figures in the places of their {names}, as `str.format` fills them."""
    text = (HERE / "sections" / f"{name}.md").read_text(encoding="utf-8")
    return text.format(**figures, **more)


def picture(file: str, alt: str) -> str:
    """A picture of examples/results, as a line of docs/gallery.md."""
    return f"![{alt}](../examples/results/{file})"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown: the first column left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def track(steps: Iterable[T], text: str) -> Iterable[T]:
    """A progress bar on stderr, nothing where that is a file."""
    stderr = Console(stderr=True)
    return rich_track(steps, text, console=stderr, transient=True, disable=not stderr.is_terminal)


def run_all() -> int:
    """Every entry in a process of its own; how many failed."""
    failed = []
    for entry in track(entries(), "gallery"):
        console.rule(f"{entry.name}: {entry.title}", align="left")
        command = [sys.executable, "-m", f"examples.{entry.name}", *sys.argv[1:]]
        if subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(entry.name)
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="bold red")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(run_all())
