"""A cache and what it should give, by a definition that shares no code with the library."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import torch
from torch import Tensor

CAPACITY, HEADS, HEADS_KV, DIM, DIM_V = 24, 4, 2, 8, 6
SCALE = DIM**-0.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


class Store:
    """A cache in one of the layouts, all NaN, beside the tokens that it should hold."""

    def __init__(
        self,
        layout: str,
        batch: int,
        capacity: int = CAPACITY,
        heads: int = HEADS_KV,
        dims: tuple[int, int] = (DIM, DIM_V),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.table: Tensor | None = None
        shape: tuple[int, int] = (batch, capacity)
        if layout.startswith("blocks"):
            size = int(layout.split()[-1])
            blocks = batch * (capacity // size)
            order = torch.randperm(blocks + 3, generator=generator(9))[:blocks]
            self.table = order.reshape(batch, -1).to(torch.int32)
            shape = (blocks + 3, size)
        self.k, self.v = (torch.full((*shape, heads, dim), math.nan, dtype=dtype) for dim in dims)
        if layout == "strided":
            self.k, self.v = (
                torch.full((shape[0], heads, shape[1], dim + 3), math.nan, dtype=dtype)
                .transpose(1, 2)[..., 1:-2]
                for dim in dims
            )  # fmt: skip

    def place(self, row: int, position: int) -> tuple[int, int]:
        if self.table is None:
            return row, position
        size = self.k.shape[1]
        return int(self.table[row, position // size]), position % size

    def fill(self, row: int, keys: Tensor, values: Tensor) -> None:
        for position, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.k[self.place(row, position)] = key
            self.v[self.place(row, position)] = value

    def tokens(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        places = [self.place(row, position) for position in range(length)]
        empty = [stored.new_zeros(0, *stored.shape[2:]) for stored in (self.k, self.v)]
        if not places:
            return empty[0], empty[1]
        keys, values = (torch.stack([s[place] for place in places]) for s in (self.k, self.v))
        return keys, values

    def without_unused_blocks(self, totals: list[int]) -> Tensor | None:
        """The table with nonsense behind each row's last block."""
        if self.table is None:
            return None
        table, size = self.table.clone(), self.k.shape[1]
        for row, total in enumerate(totals):
            table[row, -(-total // size) :] = -7 if row % 2 else 10**6
        return table


Score = Callable[[int, int, int, int, int, float], "float | None"]


def by_definition(
    q: Tensor, rows: list[tuple[Tensor, Tensor]], score: Score, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention a query at a time; `score(b, h, i, p, j, product)` of query i at position p with
    key j, None where it may not be seen. `rows` are each row's keys and values, new ones too."""
    batch, seqlen_q, heads, _ = q.shape
    dim_v = rows[0][1].shape[-1]
    out = torch.zeros(batch, seqlen_q, heads, dim_v, dtype=torch.float64)
    lse = torch.full((batch, heads, seqlen_q), -math.inf, dtype=torch.float64)
    for b, (keys, values) in enumerate(rows):
        group = heads // keys.shape[1]
        for h in range(heads):
            for i in range(seqlen_q):
                position = len(keys) - seqlen_q + i
                seen = {}
                for j in range(len(keys)):
                    product = float(q[b, i, h].double() @ keys[j, h // group].double())
                    value = score(b, h, i, position, j, product)
                    if value is not None:
                        seen[j] = value
                terms = list(seen.values()) + ([float(sinks[h])] if sinks is not None else [])
                if not terms:
                    continue
                total = math.fsum(math.exp(term) for term in terms)
                lse[b, h, i] = math.log(total)
                for j, value in seen.items():
                    out[b, i, h] += math.exp(value) / total * values[j, h // group].double()
    return out, lse


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    """Equal up to the rounding of a few dozen float64 operations."""
    assert actual.shape == wanted.shape
    assert not actual.isnan().any()
    assert torch.equal(torch.isneginf(actual), torch.isneginf(wanted))
    finite = torch.isfinite(wanted)
    if finite.any():
        error = (actual - wanted)[finite].abs().max()
        assert error <= 200 * torch.finfo(torch.float64).eps * wanted[finite].abs().max().clamp(1)


def turned(x: Tensor, angles: Tensor, interleaved: bool, positions: Tensor) -> Tensor:
    """Independent of `fastattn.rotary`: pairs as complex numbers; x (seqlen, heads, dim)."""
    out, count = x.clone(), angles.shape[1]
    for s, position in enumerate(positions.tolist()):
        for pair in range(count):
            one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + count)
            for h in range(x.shape[1]):
                z = complex(float(x[s, h, one]), float(x[s, h, other]))
                z *= cmath.exp(1j * float(angles[position, pair]))
                out[s, h, one], out[s, h, other] = z.real, z.imag
    return out
