"""Rotary against its formula in complex numbers, and against the models that people load."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import Rotary
from fastattn.testing import assert_parity

BATCH, SEQLEN, HEADS, DIM = 2, 5, 3, 12


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def by_definition(
    x: Tensor, angles: Tensor, interleaved: bool, positions: Tensor, rotary_dim: int
) -> Tensor:
    """Each pair as a complex number, multiplied by e^(i angle)."""
    out = x.clone()
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            for pair in range(rotary_dim // 2):
                one, other = (
                    (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + rotary_dim // 2)
                )
                turn = cmath.exp(1j * float(angles[positions[b, s], pair]))
                for h in range(x.shape[2]):
                    turned = complex(float(x[b, s, h, one]), float(x[b, s, h, other])) * turn
                    out[b, s, h, one], out[b, s, h, other] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("rotary_dim", [12, 8, 2])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_pairs_are_turned_by_their_angle(interleaved: bool, rotary_dim: int) -> None:
    x = draw(BATCH, SEQLEN, HEADS, DIM)
    angles = draw(20, rotary_dim // 2)
    positions = torch.tensor([[0, 3, 3, 19, 7], [5, 4, 3, 2, 1]])
    rotary = Rotary(angles.cos(), angles.sin(), interleaved)
    wanted = by_definition(x, angles, interleaved, positions, rotary_dim)
    actual = rotary.apply(x, positions)
    assert (actual - wanted).abs().max() <= 10 * torch.finfo(torch.float64).eps * x.abs().max()
    assert torch.equal(actual[..., rotary_dim:], x[..., rotary_dim:])
    assert rotary.rotary_dim == rotary_dim
    assert rotary.max_position == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_operands_are_turned_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    x = draw(BATCH, SEQLEN, HEADS, DIM).to(dtype)
    positions = torch.arange(SEQLEN).expand(BATCH, -1)
    rotary = Rotary.make(DIM, 8)
    actual = rotary.apply(x, positions)
    assert actual.dtype == dtype
    assert torch.equal(actual, rotary.apply(x.float(), positions).to(dtype))


def test_turning_keeps_products_that_depend_on_the_distance_alone() -> None:
    q, k = draw(1, 1, 1, DIM), draw(1, 1, 1, DIM).flip(-1)
    angles = torch.arange(30, dtype=torch.float64)[:, None] * draw(DIM // 2)
    rotary = Rotary(angles.cos(), angles.sin())

    def product(at_q: int, at_k: int) -> float:
        turned = [rotary.apply(x, torch.tensor([[p]])) for x, p in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(29, 24), rel=1e-12)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-3)


@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_make_gives_the_tables_of_the_paper(base: float) -> None:
    rotary = Rotary.make(8, 300, base=base, interleaved=True)
    assert rotary.cos.shape == rotary.sin.shape == (300, 4)
    assert rotary.cos.dtype == torch.float32
    assert rotary.interleaved
    for position in (0, 1, 17, 299):
        for pair in range(4):
            angle = position / base ** (2 * pair / 8)
            half_ulp = torch.finfo(torch.float32).eps / 2
            assert abs(float(rotary.cos[position, pair]) - math.cos(angle)) <= half_ulp
            assert abs(float(rotary.sin[position, pair]) - math.sin(angle)) <= half_ulp


def parity_with(theirs: Any, rotary: Rotary, x: Tensor, positions: Tensor) -> None:
    """`theirs(x, cos, sin)` is plain torch in the dtype of its arguments."""
    ours = rotary.apply(x, positions)
    wide = Rotary(rotary.cos.double(), rotary.sin.double(), rotary.interleaved)
    exact = wide.apply(x.double(), positions)
    cos, sin = rotary.cos[positions], rotary.sin[positions]
    assert_parity(ours, theirs(x, cos, sin), exact)
    # Their function is ours where rounding plays no part.
    their_exact = theirs(x.double(), cos.double(), sin.double())
    assert (their_exact - exact).abs().max() <= 1e-14


def test_halves_are_those_of_llama() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")

    def theirs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        whole = [torch.cat((table, table), -1) for table in (cos, sin)]
        return llama.apply_rotary_pos_emb(x, x, *whole, unsqueeze_dim=2)[0]

    x = draw(BATCH, SEQLEN, HEADS, DIM, dtype=torch.float32)
    positions = torch.tensor([[0, 1, 2, 3, 4], [30, 31, 32, 33, 34]])
    parity_with(theirs, Rotary.make(DIM, 40), x, positions)


def test_pairs_are_those_of_gptj() -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    rotary_dim = 8

    def theirs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = gptj.apply_rotary_pos_emb(x[..., :rotary_dim], sin, cos)
        return torch.cat((turned, x[..., rotary_dim:]), -1)

    x = draw(BATCH, SEQLEN, HEADS, DIM, dtype=torch.float32)
    positions = torch.tensor([[0, 1, 2, 3, 4], [30, 31, 32, 33, 34]])
    parity_with(theirs, Rotary.make(rotary_dim, 40, interleaved=True), x, positions)


TABLE = torch.ones(4, 3)
BAD: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "cos is a list": (lambda: Rotary([1.0], TABLE), TypeError, ("Rotary cos must be a", "[1.0]")),  # type: ignore[arg-type]
    "cos of rank 3": (
        lambda: Rotary(TABLE[None], TABLE[None]),
        ValueError,
        ("Rotary cos must be floating point of shape (max_position, rotary_dim // 2)", "(1, 4, 3)"),
    ),
    "cos of integers": (
        lambda: Rotary(TABLE.long(), TABLE.long()),
        ValueError,
        ("Rotary cos", "int64"),
    ),
    "sin of another shape": (
        lambda: Rotary(TABLE, TABLE[:3]),
        ValueError,
        ("Rotary sin must have the shape, dtype and device of cos", "(4, 3)", "(3, 3)"),
    ),
    "sin of another dtype": (lambda: Rotary(TABLE, TABLE.half()), ValueError, ("sin", "float16")),
    "no angles": (
        lambda: Rotary(TABLE[:, :0], TABLE[:, :0]),
        ValueError,
        ("Rotary cos must have at least one angle", "(4, 0)"),
    ),
    "interleaved is a number": (
        lambda: Rotary(TABLE, TABLE, 1),  # type: ignore[arg-type]
        TypeError,
        ("Rotary interleaved must be True or False", "1"),
    ),
    "positions of floats": (
        lambda: Rotary(TABLE, TABLE, positions=TABLE),
        TypeError,
        ("Rotary positions must be int32 or int64", "float32"),
    ),
    "positions in one dimension": (
        lambda: Rotary(TABLE, TABLE, positions=torch.arange(3)),
        ValueError,
        ("Rotary positions must have shape (batch, seqlen)", "(3,)"),
    ),
    "odd rotary_dim": (lambda: Rotary.make(5, 4), ValueError, ("rotary_dim must be even", "5")),
    "rotary_dim 0": (lambda: Rotary.make(0, 4), ValueError, ("rotary_dim must be at least 2", "0")),
    "rotary_dim is a float": (lambda: Rotary.make(4.0, 4), TypeError, ("rotary_dim", "4.0")),  # type: ignore[arg-type]
    "no positions": (lambda: Rotary.make(4, 0), ValueError, ("max_position must be at least 1",)),
    "negative base": (
        lambda: Rotary.make(4, 4, base=-1.0),
        ValueError,
        ("base must be a positive number", "-1.0"),
    ),
    "base is text": (
        lambda: Rotary.make(4, 4, base="1"),  # type: ignore[arg-type]
        TypeError,
        ("base must be", "'1'"),
    ),
    "x too narrow": (
        lambda: Rotary(TABLE, TABLE).apply(torch.ones(1, 1, 1, 4), torch.zeros(1, 1).long()),
        ValueError,
        ("x must be floating point", "rotary_dim = 6", "(1, 1, 1, 4)"),
    ),
    "positions of another shape": (
        lambda: Rotary(TABLE, TABLE).apply(torch.ones(1, 2, 1, 6), torch.zeros(2, 1).long()),
        ValueError,
        ("positions must have shape (batch, seqlen) = (1, 2)", "(2, 1)"),
    ),
    "position past the tables": (
        lambda: Rotary(TABLE, TABLE).apply(torch.ones(1, 2, 1, 6), torch.tensor([[0, 4]])),
        ValueError,
        ("positions must lie in 0..3", "0..4"),
    ),
    "negative position": (
        lambda: Rotary(TABLE, TABLE).apply(torch.ones(1, 2, 1, 6), torch.tensor([[-1, 0]])),
        ValueError,
        ("positions must lie in 0..3", "-1..0"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    for word in words:
        assert word in str(raised.value)
