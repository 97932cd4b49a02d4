"""What may be measured about a kernel: classes of problems, and the configs that may serve them.

Configs follow from rules, and the rules from compile reports, unless a table has a measured one for
the problem's class. A class is a tuple of plain values, the chip first. Tables that ship name the
file that measured each entry; callers that measured on their own device pass configs to launchers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

ProblemClass = tuple[Any, ...]


@dataclass(frozen=True)
class Measured:
    """A config, and the file in `benchmarks/results/` that measured it."""

    config: Any
    file: str


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """Those from `low` to `high`, both included."""
    return tuple(1 << bit for bit in range(low.bit_length() - 1, high.bit_length()))


@dataclass(frozen=True)
class ConfigSpace:
    """The classes of problems that a kernel tells apart, and the configs that may serve one.

    Attributes:
        table: name of the kernel's table of measured configs.
        config: the dataclass of its configs.
        parts: of a class by name, each with what it may be.
        values: of a config's fields by name, each with what it may be. Others keep their defaults.
        rule: what is wrong with fields that are right one by one; "" if nothing is.
    """

    table: str
    config: type
    parts: Mapping[str, tuple[Any, ...]]
    values: Mapping[str, tuple[Any, ...]]
    rule: Callable[[Any], str] = lambda config: ""

    def check_class(self, problem_class: ProblemClass) -> None:
        """Raises ValueError unless problems can be of this class."""
        if len(problem_class) != len(self.parts):
            raise ValueError(f"a class must be ({', '.join(self.parts)}), got {problem_class!r}")
        for part, (name, known) in zip(problem_class, self.parts.items(), strict=True):
            _check_member(name, part, known)

    def make_config(self, values: Mapping[str, Any]) -> Any:
        """The config of these fields.

        Registers and shared memory are not looked at: the compile report does, for each config in
        use that ships.

        Raises:
            ValueError: a field is unknown, missing, or cannot compile.
        """
        if set(values) != set(self.values):
            raise ValueError(f"a config must have {list(self.values)}, got {list(values)}")
        for name, value in values.items():
            _check_member(name, value, self.values[name])
        config = self.config(**values)
        if wrong := self.rule(config):
            raise ValueError(wrong)
        return config

    def as_values(self, config: Any) -> dict[str, Any]:
        """The fields that may differ, by name: the inverse of `make_config`."""
        names = [field.name for field in fields(config)]
        return {name: getattr(config, name) for name in names if name in self.values}

    def check_table(self, table: Mapping[ProblemClass, Measured]) -> None:
        """Raises ValueError, naming the entry, unless classes can occur and configs may compile."""
        for problem_class, measured in table.items():
            try:
                self.check_class(problem_class)
                if self.make_config(self.as_values(measured.config)) != measured.config:
                    raise ValueError(f"only {list(self.values)} may differ from their defaults")
            except ValueError as error:
                raise ValueError(f"{self.table}[{problem_class!r}]: {error}") from error


def _check_member(name: str, value: Any, known: tuple[Any, ...]) -> None:
    # True is 1 to `in`.
    if value not in known or type(value) not in {type(other) for other in known}:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")
