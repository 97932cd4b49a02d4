"""Count the work of Triton kernels, exactly, in the interpreter.

    with WorkMeter(q=q, k=k, v=v, out=out) as work:
        launch_attention_forward(q, k, v, out)
    assert work.loaded["k"] == k.numel() * k.element_size()   # each key is read once

What is counted is what the kernels ask for: no cache, no coalescing. A lane that is masked off
counts nothing, and a value that two lanes load counts twice.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

import torch

from fastattn.testing.interpreter import repair, require_interpreting
from fastattn.testing.interpreter.accesses import (
    Access,
    Launch,
    Observer,
    Region,
    named_tensors,
    observing,
)

__all__ = ["WorkMeter", "roofline_seconds"]

OTHER = "other"


class WorkMeter(Observer):
    """Context manager that counts what the kernels launched inside it do.

    Args:
        tensors: CPU tensors by name, to count traffic by tensor; None values are left out. Bytes
            belong to the first one named whose elements they are, also where views interleave
            in one storage.

    Attributes:
        launches: kernel launches.
        bytes_loaded, bytes_stored: bytes of the active lanes. An atomic counts as both.
        loaded, stored: the same by tensor name, and under "other" for all other memory.
        dots: calls of ``tl.dot``.
        dot_flops: 2 * m * n * k for each product in them.
        transcendentals: elements that exp, exp2, log, log2, sin, cos, sqrt, rsqrt and erf were
            applied to, by function; functions that were not used are missing.

    The counts are final when the block ends, and what ran before an exception stays counted.
    Meters nest, and each counts for itself. Entering one again later goes on counting.

    Raises:
        RuntimeError: on entering, if Triton does not interpret here.
        TypeError, ValueError: a value is no tensor, or is not on the CPU, or is named "other".
    """

    def __init__(self, **tensors: torch.Tensor | None) -> None:
        require_interpreting("WorkMeter")
        if OTHER in tensors:
            raise ValueError(f"{OTHER!r} is the name of all tensors without one: choose another")
        named = named_tensors(tensors)
        self._regions = [Region.of_tensor(name, tensor) for name, tensor in named.items()]
        self._tensors = named  # kept alive: freed memory could become another tensor's
        self._active: AbstractContextManager[None] | None = None
        self.launches = 0
        self.dots = 0
        self.dot_flops = 0
        self.loaded: dict[str, int] = dict.fromkeys([*named, OTHER], 0)
        self.stored: dict[str, int] = dict.fromkeys([*named, OTHER], 0)
        self.transcendentals: dict[str, int] = {}

    @property
    def bytes_loaded(self) -> int:
        """Bytes loaded, from any memory."""
        return sum(self.loaded.values())

    @property
    def bytes_stored(self) -> int:
        """Bytes stored, to any memory."""
        return sum(self.stored.values())

    def __enter__(self) -> WorkMeter:
        if self._active is not None:
            raise RuntimeError("this WorkMeter is already counting: use another one inside it")
        repair()
        self._active = observing(self)
        self._active.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        active, self._active = self._active, None
        if active is not None:
            active.__exit__(None, None, None)

    def launched(self, launch: Launch) -> None:
        self.launches += 1

    def accessed(self, access: Access) -> None:
        counted = self._by_tensor(access)
        for kind, total in (("load", self.loaded), ("store", self.stored)):
            if access.kind in (kind, "atomic"):
                for name, lanes in counted.items():
                    total[name] += lanes * access.width

    def multiplied(self, batch: int, m: int, n: int, k: int) -> None:
        self.dots += 1
        self.dot_flops += 2 * batch * m * n * k

    def computed(self, function: str, count: int) -> None:
        self.transcendentals[function] = self.transcendentals.get(function, 0) + count

    def _by_tensor(self, access: Access) -> dict[str, int]:
        """Active lanes of an access by the name of the tensor that they touch."""
        lanes: dict[str, int] = {}
        left = access.addresses
        first, last = int(left.min()), int(left.max())
        for region in self._regions:
            if region.covers(first, last):
                return {**lanes, region.name: left.size}
            inside = region.contains(left)
            lanes[region.name] = int(inside.sum())
            left = left[~inside]
            if not left.size:
                return lanes
        return {**lanes, OTHER: left.size}

    def __str__(self) -> str:
        def by_name(counts: dict[str, int]) -> str:
            used = [f"{name} {count:,}" for name, count in counts.items() if count]
            return f" ({', '.join(used)})" if used else ""

        return (
            f"launches {self.launches:,}; "
            f"bytes loaded {self.bytes_loaded:,}{by_name(self.loaded)}; "
            f"bytes stored {self.bytes_stored:,}{by_name(self.stored)}; "
            f"dots {self.dots:,} ({self.dot_flops:,} FLOPs)"
            f"{'; elements' if self.transcendentals else ''}{by_name(self.transcendentals)}"
        )


def roofline_seconds(work: WorkMeter, bytes_per_second: float, flops_per_second: float) -> float:
    """Least time for the counted work: its memory traffic or its dots, whichever takes longer.

    Args:
        work: a meter that has counted.
        bytes_per_second: memory bandwidth, at which every counted byte is charged.
        flops_per_second: throughput of the matrix units.

    Raises:
        ValueError: a rate is not positive.
    """
    for name, rate in (
        ("bytes_per_second", bytes_per_second),
        ("flops_per_second", flops_per_second),
    ):
        if not rate > 0:
            raise ValueError(f"{name} must be positive, got {rate}")
    traffic = work.bytes_loaded + work.bytes_stored
    return max(traffic / bytes_per_second, work.dot_flops / flops_per_second)
