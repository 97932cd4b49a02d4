"""From the rows of a sweep to source: what all sweeps share."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def score(config: Any, cases: Iterable[dict[Any, Row]]) -> float:
    """The geometric mean, over cases, of the fastest time over a config's; at most 1.

    Args:
        cases: timed rows by config, each with this one.
    """
    logs = [math.log(min(row["ms"] for row in own.values()) / own[config]["ms"]) for own in cases]
    return math.exp(sum(logs) / len(logs))


def best_everywhere(cases: Sequence[dict[Any, Row]]) -> tuple[Any, float] | None:
    """The config of the best score, and the score, among those with a time on every case."""
    everywhere = set.intersection(*(set(own) for own in cases)) if cases else set()
    if not everywhere:
        return None
    scores = {config: score(config, cases) for config in everywhere}
    best = max(scores, key=lambda config: scores[config])
    return best, scores[best]


@dataclass(frozen=True)
class Winner:
    """The config that is best over all cases of a class.

    Attributes:
        problem_class: as dispatch tells problems apart.
        config: values of the config's fields that the class's `ConfigSpace` knows.
        score: of it, `score`.
        rows: its row of each case, by label.
    """

    problem_class: tuple[Any, ...]
    config: dict[str, Any]
    score: float
    rows: dict[str, Row]


def measured_by(document: Row, name: str) -> list[str]:
    """Lines of a comment that say on what, when and by which file a table was measured."""
    environment = document["environment"]
    return [
        f"# Measured on {environment['device']} on {environment['date'][:10]} by",
        f"# benchmarks/results/{name}: torch {environment['torch']}, triton "
        f"{environment.get('triton')}, commit {environment.get('commit') or 'unknown'}.",
    ]


def as_table(document: Row, name: str, found: Iterable[Winner], space: Any) -> str:
    """Winners as a table of Python.

    Args:
        document: a results file.
        name: of that file, which each entry names as its measure.
        space: the `ConfigSpace` of the table.

    Raises:
        ValueError: dispatch would refuse an entry.
    """
    lines = [
        *measured_by(document, name),
        f"# ({', '.join(space.parts)}): a config, and its file",
        f"{space.table}: dict[ProblemClass, Measured] = {{",
    ]
    for winner in found:
        try:
            space.check_class(winner.problem_class)
            space.make_config(winner.config)
        except ValueError as error:
            raise ValueError(f"{space.table}[{winner.problem_class!r}]: {error}") from error
        fields = ", ".join(f"{field}={value!r}" for field, value in winner.config.items())
        count = len(winner.rows)
        lines += [
            f"    # {100 * winner.score:.0f}% of the fastest on average over {count} cases",
            f"    ({json.dumps(winner.problem_class)[1:-1]}): Measured(",
            f"        {space.config.__name__}({fields}), {json.dumps(name)}",
            "    ),",
        ]
    return "\n".join([*lines, "}"]) + "\n"


def write_table(table: str, path: Path, name: str) -> None:
    """Puts a table, from its comment on, into a file in place of the one that is there.

    Args:
        name: of the table.

    Raises:
        ValueError: there is none.
    """
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"^# Measured on .*?^{name}.*?\}}\n", re.DOTALL | re.MULTILINE)
    text, count = pattern.subn(lambda _: table, text, count=1)
    if count == 0:
        raise ValueError(f"{path} must hold a table {name} to replace, found none")
    path.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class TableCommand:
    """The command that prints or writes the winners of a sweep.

    Attributes:
        module: what `python -m` calls it.
        stage: of the sweep.
        winners: of a document; empty where nothing was timed.
        space: gives the `ConfigSpace` of the table.
    """

    module: str
    stage: str
    winners: Callable[[Row], list[Winner]]
    space: Callable[[], Any]

    def run(self, arguments: Sequence[str] | None = None) -> int:
        """Prints or writes the winners of the file on the command line; the exit status."""
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}", description="The winners of a sweep as source."
        )
        parser.add_argument("file", type=Path, help="a file that `make gpu` wrote")
        parser.add_argument("--write", type=Path, help="the file that the table goes into")
        options = parser.parse_args(arguments)
        path = options.file
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 2
        found = self.winners(document)
        if not found:
            print(f"{path} has no timed rows of {self.stage}", file=sys.stderr)
            return 1
        try:
            table = as_table(document, path.name, found, self.space())
            if options.write is None:
                print(table, end="")
            else:
                write_table(table, options.write, self.space().table)
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        return 0
