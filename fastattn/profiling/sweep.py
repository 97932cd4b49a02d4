"""Cases from a few numbers: `batch=1,2,4,8 prompt=32,128` is eight of them."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastattn.profiling.results import Case

AXES = ("batch", "prompt", "new-tokens", "padding")
"""What can be swept."""

Axis = Sequence[float]


def parse_sweep(texts: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Values by axis from words such as "batch=1,2,4", of which a text may have several.

    Raises:
        ValueError: a word is not of that form, an axis is unknown or comes twice, or a value is no
            number.
    """
    axes: dict[str, tuple[float, ...]] = {}
    for word in itertools.chain.from_iterable(text.split() for text in texts):
        name, equals, values = word.partition("=")
        if not equals:
            raise ValueError(f"sweep must be words such as batch=1,2,4 prompt=32,128, got {word!r}")
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, n=1)
            raise ValueError(
                f"sweep must be over {', '.join(AXES)}, got {name!r}"
                + (f" (nearest: {near[0]})" if near else "")
            )
        if name in axes:
            raise ValueError(f"sweep must give {name} once, got it again as {word!r}")
        axes[name] = tuple(_number(name, text) for text in values.split(","))
    return axes


def _number(axis: str, text: str) -> float:
    try:
        return float(text) if axis == "padding" else int(text)
    except ValueError:
        wanted = "shares such as 0.5" if axis == "padding" else "integers"
        raise ValueError(f"sweep of {axis} must be {wanted}, got {text!r}") from None


def make_cases(
    kind: str, sweep: Mapping[str, Sequence[float]] | None = None, **fixed: Any
) -> list[Case]:
    """All combinations of a sweep.

    Args:
        kind: "decoder", "encoder" or "encoder-decoder".
        sweep: values by axis.
        fixed: batch, prompt, new_tokens, padding where they are not swept; None: the default, which
            for an encoder is a batch of 8 without padding and with half of it.

    Raises:
        ValueError: a value is given twice, by the sweep and by itself.
    """
    swept = dict(sweep or {})
    encodes = kind == "encoder"
    defaults: dict[str, Sequence[float]] = {
        "batch": (8,) if encodes else (1,),
        "prompt": (128,),
        "new-tokens": (0,) if encodes else (32,),
        "padding": (0.0, 0.5) if encodes else (0.0,),
    }
    axes = {}
    for axis, default in defaults.items():
        value = fixed.get(axis.replace("-", "_"))
        if value is not None and axis in swept:
            raise ValueError(f"{axis} must be given once: it is {value}, and swept too")
        axes[axis] = swept.get(axis, default if value is None else (value,))
    return [
        Case(int(batch), int(prompt), int(new), float(padding))
        for batch, prompt, new, padding in itertools.product(*axes.values())
    ]
