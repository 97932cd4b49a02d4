"""A table as text: what the tables of a report are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
RATIO = "vs best peer"


@dataclass(frozen=True)
class Table:
    """A title, names of columns, and cells as text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.columns))]
        text = [
            "  ".join(
                cell.ljust(width) if is_text(place, name) else cell.rjust(width)
                for place, (cell, width, name) in enumerate(
                    zip(line, widths, self.columns, strict=True)
                )
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, text[0], "-" * len(text[0]), *text[1:]])


def is_text(place: int, name: str) -> bool:
    """Whether a column, by its place and name, is aligned as text."""
    return place == 0 or name in ("who", "what", "error")


def show_number(value: Any, form: str) -> str:
    """A number in a format; "" for what is no number."""
    return form.format(value) if isinstance(value, (int, float)) else ""
