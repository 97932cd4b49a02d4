"""What a kernel touches in the interpreter, as events; and which tensor an address belongs to.

The repaired interpreter reports every launch, memory access, matrix product and transcendental to
the observers that are switched on (:func:`observing`). The work meter counts them; the bounds
check refuses a bad one. An access is reported before it happens, so an observer can stop it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Addresses = NDArray[np.uint64]


class OutOfBoundsError(IndexError):
    """A kernel touched memory outside the tensors that it was given."""


@dataclass(frozen=True)
class Region:
    """The bytes of one tensor, or of a whole storage.

    ``levels`` are (stride in bytes, size) of the dimensions, widest stride first, where the
    elements leave gaps; it is empty where the region has none.
    """

    name: str
    start: int
    end: int
    itemsize: int = 1
    levels: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of_tensor(cls, name: str, tensor: torch.Tensor) -> Region:
        """The elements of a tensor, and not what lies between them if it is strided."""
        itemsize = tensor.element_size()
        start = tensor.data_ptr()
        if tensor.numel() == 0:
            return cls(name, start, start, itemsize)
        dims = [
            (stride * itemsize, size)
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            if size > 1 and stride > 0
        ]
        extent, elements, overlapping = itemsize, 1, False
        for stride, size in sorted(dims):
            overlapping |= stride < extent  # a step does not leave what lies inside of it
            extent += stride * (size - 1)
            elements *= size
        gapless = extent == elements * itemsize
        levels = () if overlapping or gapless else tuple(sorted(dims, reverse=True))
        return cls(name, start, start + extent, itemsize, levels)

    @classmethod
    def of_storage(cls, name: str, tensor: torch.Tensor) -> Region:
        """The whole storage behind a tensor."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        return cls(name, start, start + storage.nbytes())

    def contains(self, addresses: Addresses) -> NDArray[np.bool_]:
        """Which of the addresses lie on one of the region's elements."""
        offsets = addresses.astype(np.int64) - self.start
        inside = (offsets >= 0) & (offsets < self.end - self.start)
        if self.levels:
            for stride, size in self.levels:
                offsets = offsets - np.minimum(offsets // stride, size - 1) * stride
            inside &= offsets < self.itemsize
        return inside

    def covers(self, first: int, last: int) -> bool:
        """Whether all bytes from ``first`` to ``last`` are inside, known without a closer look."""
        return not self.levels and self.start <= first and last < self.end

    def distance(self, address: int) -> int:
        """Bytes from the region to an address; 0 inside its extent."""
        return max(self.start - address, address - self.end + 1, 0)


@dataclass(frozen=True)
class Access:
    """The active lanes of one load, store or atomic.

    ``addresses`` holds the first byte of each active lane (at least one), ``width`` the bytes of
    a lane, ``program`` the program ids (x, y, z).
    """

    kind: str  # "load", "store" or "atomic"
    addresses: Addresses
    width: int
    program: tuple[int, ...]

    def escaped(self, regions: Sequence[Region]) -> Addresses:
        """First bytes of the lanes that do not lie inside one of the regions."""
        first, last = int(self.addresses.min()), int(self.addresses.max()) + self.width - 1
        if any(region.covers(first, last) for region in regions):
            return self.addresses[:0]
        ends = self.addresses + np.uint64(self.width - 1)
        inside = np.zeros(self.addresses.shape, dtype=bool)
        for region in regions:
            inside |= region.contains(self.addresses) & region.contains(ends)
        return self.addresses[~inside]


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, and its tensor arguments as the kernel sees them."""

    kernel: str
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def storages(self) -> list[Region]:
        """The storages of the arguments, each once."""
        regions = {
            tensor.untyped_storage().data_ptr(): Region.of_storage(name, tensor)
            for name, tensor in reversed(list(self.tensors.items()))
        }
        return list(regions.values())


class Observer:
    """Base of what can listen; every method does nothing until it is overridden."""

    def launched(self, launch: Launch) -> None:
        """A launch begins."""

    def accessed(self, access: Access) -> None:
        """Memory is about to be touched, by at least one lane."""

    def multiplied(self, batch: int, m: int, n: int, k: int) -> None:
        """A ``tl.dot`` of ``batch`` products (m, k) x (k, n)."""

    def computed(self, function: str, count: int) -> None:
        """A transcendental function was applied to ``count`` elements."""


_observers: list[Observer] = []


def observers() -> tuple[Observer, ...]:
    """The observers that are switched on, outermost first."""
    return tuple(_observers)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Switch an observer on; off again at the end, also after an exception. They nest."""
    _observers.append(observer)
    try:
        yield
    finally:
        # By identity: two observers may compare equal.
        del _observers[max(i for i, other in enumerate(_observers) if other is observer)]


class BoundsCheck(Observer):
    """Refuses an access outside the given tensors.

    Args:
        tensors: tensors by name, of which only the elements themselves may be touched. Without
            any, each launch may touch the whole storages of its own tensor arguments.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self._named = [Region.of_tensor(name, t) for name, t in (tensors or {}).items()]
        self._storages = {t.untyped_storage().data_ptr() for t in (tensors or {}).values()}
        self._regions = list(self._named)
        self._kernel = ""

    def launched(self, launch: Launch) -> None:
        self._kernel = launch.kernel
        others = [region for region in launch.storages() if region.start not in self._storages]
        self._regions = self._named + others

    def accessed(self, access: Access) -> None:
        escaped = access.escaped(self._regions)
        if escaped.size:
            raise OutOfBoundsError(self._describe(access, escaped))

    def _describe(self, access: Access, escaped: Addresses) -> str:
        what = (
            f"{self._kernel} program {access.program}: {access.kind} of {access.width} bytes a "
            f"lane, {escaped.size} of {access.addresses.size} active lanes out of bounds"
        )
        candidates = [region for region in self._regions if region.end > region.start]
        if not candidates:
            return f"{what}: the launch has no tensor argument"
        address, region = min(
            ((int(a), r) for r in candidates for a in (escaped.min(), escaped.max())),
            key=lambda pair: pair[1].distance(pair[0]),
        )
        offset = address - region.start
        return (
            f"{what}; the nearest tensor is {region.name}, {region.end - region.start} bytes long, "
            f"touched at byte offset {offset}"
        )


def named_tensors(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Check tensors given by name; None values are left out.

    Raises:
        TypeError: a value is neither a tensor nor None.
        ValueError: a tensor is not on the CPU, where the interpreter works on a copy.
    """
    checked = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(tensor).__name__}")
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is on {tensor.device}, expected cpu: for other devices the interpreter "
                "works on a copy, whose addresses are not the tensor's"
            )
        checked[name] = tensor
    return checked
