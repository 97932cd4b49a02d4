"""Decoding steps that are measured: shapes, what they must read, and caches full of numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.cache_problem import Cache
from fastattn.quantized import Quantized

# Most telling first: middle sizes, the longest single sequence, the largest batch, the smallest.
BATCHES_AND_LENGTHS = (
    (16, 8192), (1, 131072), (64, 8192), (1, 8192), (16, 32768), (4, 32768), (64, 1024),
    (1, 1024), (64, 32768), (4, 8192), (1, 32768), (16, 131072), (4, 131072), (16, 1024),
    (4, 1024), (64, 131072),
)  # fmt: skip
BLOCK_SIZES = (16, 256)
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# Room behind each row's tokens, full of NaN: caches are allocated ahead.
SPARE = 256


@dataclass(frozen=True)
class DecodeCase:
    """One step of decoding, whose new tokens are in the cache already.

    Attributes:
        batch: sequences.
        length: tokens of each in the cache.
        num_heads, num_heads_kv, head_dim: Llama 3 8B's.
        seqlen_q: query rows of a sequence; more than one are causal (speculation).
        block_size: of a paged cache; 0 is a contiguous one.
        stored: "int8" or "fp8" with a scale for each token and head; "" as dtype.
        dtype: of q, and of a cache that is not quantised, a name in torch.
        part: what is timed.
    """

    batch: int
    length: int
    num_heads: int = 32
    num_heads_kv: int = 8
    head_dim: int = 128
    seqlen_q: int = 1
    block_size: int = 0
    stored: str = ""
    dtype: str = "bfloat16"
    part: str = "decode"

    @property
    def capacity(self) -> int:
        """Tokens that there is room for in each row: whole blocks."""
        size = self.block_size or 1
        return -(-(self.length + SPARE) // size) * size

    @property
    def layout(self) -> str:
        """ "contiguous" or "paged" with the block size, and how numbers are stored."""
        layout = f"paged {self.block_size}" if self.block_size else "contiguous"
        return f"{layout}, {self.stored}" if self.stored else layout

    @property
    def flops(self) -> float:
        """Two products of all query rows with all keys."""
        return 4.0 * self.batch * self.num_heads * self.seqlen_q * self.length * self.head_dim

    @property
    def bytes(self) -> float:
        """Of the live keys and values, with their scales; q and the result are not counted."""
        return float(self.batch * self.length * self._token_bytes)

    @property
    def memory_bytes(self) -> float:
        """Of the whole caches."""
        return float(self.batch * self.capacity * self._token_bytes)

    @property
    def _token_bytes(self) -> int:
        itemsize = 1 if self.stored else getattr(torch, self.dtype).itemsize
        return 2 * self.num_heads_kv * (self.head_dim * itemsize + (4 if self.stored else 0))

    def __str__(self) -> str:
        length = f"{self.length // 1024}k" if self.length % 1024 == 0 else f"{self.length}"
        text = f"{self.batch} x {length}, {self.layout}"
        return text if self.seqlen_q == 1 else f"{text}, {self.seqlen_q} queries"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        derived = {"label": str(self), "layout": self.layout}
        return {**asdict(self), **derived, "flops": self.flops, "bytes": self.bytes}


@dataclass(frozen=True, eq=False)
class DecodeInputs:
    """A case's tensors.

    Attributes:
        q: (batch, seqlen_q, num_heads, head_dim).
        k_cache, v_cache: (batch, capacity, num_heads_kv, head_dim), or blocks in scrambled order;
            NaN behind the tokens, and whatever it is where they are quantised.
        seqlens: int32 (batch,).
        block_table: int32 (batch, capacity // block_size), or None.
    """

    case: DecodeCase
    q: Tensor
    k_cache: Tensor | Quantized
    v_cache: Tensor | Quantized
    seqlens: Tensor
    block_table: Tensor | None = None

    @property
    def kwargs(self) -> dict[str, Any]:
        """Of `fastattn.attention_with_kv_cache`, besides q and the caches."""
        causal = self.case.seqlen_q > 1
        return {
            "cache_seqlens": self.seqlens,
            "block_table": self.block_table,
            "causal": causal,
        }

    @property
    def cache(self) -> Cache:
        """The cache as the library's own plain torch sees it."""
        (k, k_scale), (v, v_scale) = (
            (cache.values, cache.scale) if isinstance(cache, Quantized) else (cache, None)
            for cache in (self.k_cache, self.v_cache)
        )
        lengths = [self.case.length] * self.case.batch
        return Cache(k, v, k_scale, v_scale, self.seqlens, self.block_table, lengths)

    def sliced(self) -> tuple[Tensor, Tensor]:
        """The live keys and values of a contiguous cache, views (batch, heads, length, dim)."""
        caches = (self.cache.k, self.cache.v)
        k, v = (cache[:, : self.case.length].transpose(1, 2) for cache in caches)
        return k, v


def make_decode_inputs(case: DecodeCase, device: torch.device, seed: int = 0) -> DecodeInputs:
    """Draws a case's tensors on the device, in the dtype that they are kept in: some are huge."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.batch, case.capacity)
    table = None
    if case.block_size:
        columns = case.capacity // case.block_size
        numbers = torch.randperm(case.batch * columns, generator=generator, device=device)
        table = numbers.to(torch.int32).view(case.batch, columns)
        shape = (numbers.numel(), case.block_size)
    k, v = (_draw_cache(case, shape, table, generator) for _ in range(2))
    q = torch.randn(
        (case.batch, case.seqlen_q, case.num_heads, case.head_dim),
        generator=generator, device=device, dtype=getattr(torch, case.dtype),
    )  # fmt: skip
    return DecodeInputs(case, q, k, v, _lengths(case, case.length, device), table)


def _lengths(case: DecodeCase, length: int, device: torch.device) -> Tensor:
    return torch.full((case.batch,), length, dtype=torch.int32, device=device)


def _draw_cache(
    case: DecodeCase, rows: tuple[int, int], table: Tensor | None, generator: torch.Generator
) -> Tensor | Quantized:
    device, shape = generator.device, (*rows, case.num_heads_kv, case.head_dim)
    if case.stored:
        # Numbers of about unit size, whose scales differ by token.
        if case.stored == "int8":
            values = torch.randint(
                -127, 128, shape, generator=generator, device=device, dtype=torch.int8
            )
        else:
            values = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            values = values.to(STORED[case.stored])
        unit = 1 / 73 if case.stored == "int8" else 1.0
        scale = torch.rand(shape[:-1], generator=generator, device=device).add_(0.5).mul_(unit)
        return Quantized(values, scale)
    values = torch.randn(
        shape, generator=generator, device=device, dtype=getattr(torch, case.dtype)
    )
    if table is None:
        values[:, case.length :] = float("nan")
    elif case.length % case.block_size == 0:
        unused = table[:, case.length // case.block_size :].flatten().long()
        values[unused] = float("nan")
    return values


def make_empty_inputs(case: DecodeCase, device: torch.device) -> DecodeInputs:
    """Tensors of a case's shapes whose caches hold no tokens and take little memory.

    A call on them compiles what a call on the case's own tensors needs: all that the compiler
    looks at (sizes, strides' divisibility, alignment) is the same. All elements of a cache are one.
    """
    dtype = getattr(torch, case.dtype)
    rows = (case.batch, case.capacity)
    table = None
    if case.block_size:
        columns = case.capacity // case.block_size
        table = torch.zeros(case.batch, columns, dtype=torch.int32, device=device)
        rows = (case.batch * columns, case.block_size)
    row = torch.zeros(case.head_dim, dtype=STORED.get(case.stored, dtype), device=device)
    values = row.expand(*rows, case.num_heads_kv, case.head_dim)
    cache: Tensor | Quantized = values
    if case.stored:
        cache = Quantized(values, torch.ones(*rows, case.num_heads_kv, device=device))
    shape = (case.batch, case.seqlen_q, case.num_heads, case.head_dim)
    q = torch.ones(shape, dtype=dtype, device=device)
    return DecodeInputs(case, q, cache, cache, _lengths(case, 0, device), table)


def decode_cases(quick: bool = False) -> list[DecodeCase]:
    """The matrix, with 8-bit caches and speculation on the shapes that tell most."""
    first, rest = BATCHES_AND_LENGTHS[:4], BATCHES_AND_LENGTHS[4:]
    plain = [DecodeCase(*shape) for shape in first]
    cases = [*plain, *(replace(case, block_size=BLOCK_SIZES[0]) for case in plain)]
    cases += [replace(plain[0], stored="int8"), replace(plain[0], stored="fp8")]
    cases += [replace(plain[0], seqlen_q=4), replace(plain[0], block_size=BLOCK_SIZES[1])]
    if quick:
        return cases
    for case in (DecodeCase(*shape) for shape in rest):
        cases += [case, replace(case, block_size=BLOCK_SIZES[0])]
    for stored in STORED:
        cases += [replace(case, stored=stored) for case in plain[1:]]
        cases.append(replace(plain[0], stored=stored, block_size=BLOCK_SIZES[0]))
    cases += [replace(case, seqlen_q=4) for case in plain[1:]]
    cases.append(replace(plain[0], seqlen_q=4, block_size=BLOCK_SIZES[0]))
    cases += [
        replace(DecodeCase(*shape), block_size=BLOCK_SIZES[1]) for shape in BATCHES_AND_LENGTHS[1:]
    ]
    return cases


def decode_sweep_cases(quick: bool = False) -> list[DecodeCase]:
    """The shapes on which configs are compared, contiguous before paged."""
    shapes = ((16, 8192), (1, 32768), (64, 8192), (4, 32768), (1, 8192), (1, 131072))
    plain = [DecodeCase(*shape) for shape in (shapes[:2] if quick else shapes)]
    paged = [replace(case, block_size=BLOCK_SIZES[0]) for case in plain[:3]]
    return plain[:3] + paged + plain[3:]
