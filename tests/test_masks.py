"""Masks as values: what they show, how they join, and the tiles that they touch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn import Causal, Lengths, Packed, Prefix, Window
from fastattn.masks import (
    DenseMask,
    Joined,
    Mask,
    MaskParts,
    as_mask,
    find_packed,
    join,
    take_apart,
)

SHAPES = [(6, 6), (4, 9), (9, 4), (1, 7), (7, 1), (3, 0)]
Rule = Callable[[int, int, int, int, int], bool]


def by_definition(batch: int, seqlen_q: int, seqlen_k: int, rule: Rule) -> Tensor:
    """Bool (batch, 1, seqlen_q, seqlen_k): `rule(b, i, j, position of i, seqlen_k)`, one by one."""
    position = [i + seqlen_k - seqlen_q for i in range(seqlen_q)]
    visible = [
        [[rule(b, i, j, position[i], seqlen_k) for j in range(seqlen_k)] for i in range(seqlen_q)]
        for b in range(batch)
    ]
    return torch.tensor(visible, dtype=torch.bool).reshape(batch, 1, seqlen_q, seqlen_k)


LENGTHS = torch.tensor([3, 0, 5])
STARTS = torch.tensor([1, 0, 4], dtype=torch.int32)
ROWS = torch.tensor([2, 6, 0])

RULES: dict[str, tuple[Mask, Rule]] = {
    "Causal": (Causal(), lambda b, i, j, at, n: j <= at),
    "Window(2, 1)": (Window(2, 1), lambda b, i, j, at, n: at - 2 <= j <= at + 1),
    "Window(2, None)": (Window(2, None), lambda b, i, j, at, n: at - 2 <= j),
    "Window(None, 3)": (Window(None, 3), lambda b, i, j, at, n: j <= at + 3),
    "Window(0, 0)": (Window(0, 0), lambda b, i, j, at, n: j == at),
    "Window()": (Window(), lambda b, i, j, at, n: True),
    "Prefix": (Prefix(LENGTHS), lambda b, i, j, at, n: j <= at or j < LENGTHS[b]),
    "Lengths": (Lengths(LENGTHS), lambda b, i, j, at, n: j < LENGTHS[b]),
    "Lengths, starts": (
        Lengths(LENGTHS, starts_k=STARTS),
        lambda b, i, j, at, n: STARTS[b] <= j < LENGTHS[b],
    ),
    "Lengths, rows": (
        Lengths(LENGTHS, seqlens_q=ROWS),
        lambda b, i, j, at, n: j < LENGTHS[b] and i < ROWS[b],
    ),
    "Causal & Window & Lengths": (
        Causal() & Window(3, 2) & Lengths(LENGTHS),
        lambda b, i, j, at, n: at - 3 <= j <= at and j < LENGTHS[b],
    ),
    "Prefix & Lengths": (
        Prefix(LENGTHS) & Lengths(ROWS),
        lambda b, i, j, at, n: (j <= at or j < LENGTHS[b]) and j < ROWS[b],
    ),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_dense_is_the_definition(name: str, shape: tuple[int, int]) -> None:
    mask, rule = RULES[name]
    wanted = by_definition(3, *shape, rule)
    dense = mask.dense(*shape)
    assert dense.dtype == torch.bool
    assert dense.shape[0] in (1, 3)
    assert torch.equal(dense.expand(wanted.shape), wanted)


@pytest.mark.parametrize("name", RULES)
def test_one_sequence_of_a_mask_is_that_sequence(name: str) -> None:
    mask, rule = RULES[name]
    wanted = by_definition(3, 6, 6, rule)
    for index in range(3):
        assert torch.equal(mask.at(index, 6, 6).dense(6, 6), wanted[index : index + 1])


def test_dense_of_a_tensor_is_the_tensor_broadcast() -> None:
    tensor = torch.tensor([True, False, True])
    assert as_mask(tensor).dense(2, 3).tolist() == [[[[True, False, True]] * 2]]
    tensor = torch.rand(2, 3, 4, 5) < 0.5
    assert torch.equal(as_mask(tensor).dense(4, 5), tensor)
    assert torch.equal(as_mask(tensor).at(1, 3, 5).dense(3, 5), tensor[1:, :, :3])


def test_packed_sequences_see_only_themselves() -> None:
    packed = Packed(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 4, 6]))
    which_q, which_k = [0, 0, 2, 2, 2], [0, 0, 0, 1, 2, 2]
    wanted = torch.tensor([[q == k for k in which_k] for q in which_q])
    assert torch.equal(packed.dense(5, 6), wanted[None, None])
    # Positions are counted within each sequence: 2 of 3, and 3 of 2.
    causal = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 1, 1],
        ]
    )
    assert torch.equal((packed & Causal()).dense(5, 6), causal.bool()[None, None])
    assert (packed.num_sequences, packed.max_seqlen_q, packed.max_seqlen_k) == (3, 3, 3)


def test_packed_with_a_mask_of_each_sequence() -> None:
    own = torch.rand(2, 3, 3, 3) < 0.5
    dense = (Packed(torch.tensor([0, 3, 5])) & own).dense(5, 5)
    assert dense.shape == (1, 3, 5, 5)
    assert torch.equal(dense[0, :, :3, :3], own[0])
    assert torch.equal(dense[0, :, 3:, 3:], own[1, :, :2, :2])
    assert not dense[0, :, :3, 3:].any()
    assert not dense[0, :, 3:, :3].any()


def test_packed_reads_its_longest_sequence_unless_it_is_told() -> None:
    ends = torch.tensor([0, 4, 6])
    assert Packed(ends).max_seqlen_q == Packed(ends).max_seqlen_k == 4
    told = Packed(ends, max_seqlen_q=9)
    assert (told.max_seqlen_q, told.max_seqlen_k) == (9, 9)
    other = Packed(ends, torch.tensor([0, 1, 8]), max_seqlen_q=5)
    assert (other.max_seqlen_q, other.max_seqlen_k) == (5, 7)
    assert Packed(torch.tensor([0])).max_seqlen_q == 0


def test_show_draws_a_mask() -> None:
    assert Causal().show(2, 4) == "# # # .\n# # # #"
    assert Window(1, 0).show(3, 3) == "# . .\n# # .\n. # #"
    both = Lengths(torch.tensor([1, 2]))
    assert both.show(1, 3) == "# . ."
    assert both.show(1, 3, index=1) == "# # ."


# Joining.


def test_joins_are_flat_and_in_order() -> None:
    joined = Window(2, 1) & Lengths(LENGTHS) & Causal()
    assert isinstance(joined, Joined)
    assert [type(part) for part in joined.parts] == [Window, Lengths, Causal]


def test_a_tensor_joins_from_both_sides() -> None:
    tensor = torch.ones(4, 4, dtype=torch.bool).triu()
    for joined in (tensor & Causal(), Causal() & tensor, join(Causal(), DenseMask(tensor))):
        assert torch.equal(joined.dense(4, 4)[0, 0], torch.eye(4, dtype=torch.bool))


def test_what_cannot_be_joined() -> None:
    with pytest.raises(TypeError, match="mask must be a bool tensor or a mask"):
        Causal() & 1  # type: ignore[operator]
    with pytest.raises(TypeError, match="mask must be bool"):
        Causal() & torch.ones(3, 3)
    for make in (
        lambda: Prefix(LENGTHS) & Causal(),
        lambda: Causal() & Prefix(LENGTHS),
        lambda: Lengths(LENGTHS) & Window(3, 0) & Prefix(LENGTHS),
    ):
        with pytest.raises(ValueError, match="Prefix joined with a causal mask"):
            make()


def test_parts_of_a_join_are_the_tightest() -> None:
    parts = take_apart(Window(5, 3) & Window(2, None) & Window(None, 9))
    assert (parts.window_left, parts.window_right) == (2, 3)
    parts = take_apart(
        Lengths(torch.tensor([5, 2]), starts_k=torch.tensor([1, 0]))
        & Lengths(
            torch.tensor([3, 4]), starts_k=torch.tensor([0, 1]), seqlens_q=torch.tensor([7, 8])
        )
    )
    for name, wanted in (("seqlens_k", [3, 2]), ("starts_k", [1, 1]), ("seqlens_q", [7, 8])):
        assert getattr(parts, name).tolist() == wanted
    assert take_apart(Prefix(torch.tensor([4])) & Prefix(torch.tensor([2]))).prefix.tolist() == [2]
    one, other = torch.tensor([True, False]), torch.tensor([True, True])
    assert take_apart(as_mask(one) & other).mask.flatten().tolist() == [True, False]
    assert vars(take_apart(None)) == vars(MaskParts())


def test_packed_is_found_within_a_join() -> None:
    packed = Packed(torch.tensor([0, 3]))
    assert find_packed(Causal() & packed) is packed
    assert find_packed(packed) is packed
    assert find_packed(Causal()) is None
    assert find_packed(None) is None


# Tiles.


def test_tiles_of_a_causal_mask_are_the_lower_triangle() -> None:
    tiles = Causal().tiles(1024, 1024, 128, 128)
    assert tiles.shape == (1, 8, 8)
    wanted = torch.ones(8, 8, dtype=torch.int8).tril(-1) * 2 + torch.eye(8, dtype=torch.int8)
    assert torch.equal(tiles[0], wanted)
    assert int((tiles > 0).sum()) == 36


def test_tiles_past_the_edge_count_what_exists() -> None:
    # 5 x 3 in tiles of 2 x 2: the last row and the last column of tiles are cut by the edge only.
    assert Window().tiles(5, 3, 2, 2).tolist() == [[[2, 2]] * 3]
    tiles = Lengths(torch.tensor([3, 2, 0])).tiles(2, 4, 2, 2)
    assert tiles.tolist() == [[[2, 1]], [[2, 0]], [[0, 0]]]


@st.composite
def masked_problems(draw: st.DrawFn) -> tuple[Mask, int, int]:
    seqlen_q, seqlen_k = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    sides = st.none() | st.integers(0, 45)
    length = st.integers(0, seqlen_k)

    def pair(values: st.SearchStrategy[int]) -> Tensor:
        return torch.tensor([draw(values), draw(values)])

    mask: Mask = Window(draw(sides), draw(sides))
    if draw(st.booleans()):
        starts = pair(length) if draw(st.booleans()) else None
        rows = pair(st.integers(0, seqlen_q)) if draw(st.booleans()) else None
        mask = mask & Lengths(pair(length), starts_k=starts, seqlens_q=rows)
    if draw(st.booleans()) and take_apart(mask).window_right != 0:
        mask = mask & Prefix(pair(length))
    return mask, seqlen_q, seqlen_k


@settings(max_examples=200, deadline=None)
@given(masked_problems())
def test_visible_keys_of_any_join_are_an_interval_that_moves_with_the_row(
    problem: tuple[Mask, int, int],
) -> None:
    """What the kernels build on: an interval a row, both of whose ends grow with the row."""
    mask, seqlen_q, seqlen_k = problem
    for rows in mask.dense(seqlen_q, seqlen_k)[:, 0].tolist():
        before = (0, 0)
        for row in rows:
            seen = [key for key, visible in enumerate(row) if visible]
            if not seen:
                continue
            assert len(seen) == seen[-1] - seen[0] + 1
            assert seen[0] >= before[0]
            assert seen[-1] >= before[1]
            before = (seen[0], seen[-1])


@settings(max_examples=60, deadline=None)
@given(masked_problems(), st.integers(1, 20), st.integers(1, 20))
def test_tiles_are_those_of_the_dense_mask(
    problem: tuple[Mask, int, int], block_m: int, block_n: int
) -> None:
    mask, seqlen_q, seqlen_k = problem
    dense = mask.dense(seqlen_q, seqlen_k)[:, 0]
    tiles = mask.tiles(seqlen_q, seqlen_k, block_m, block_n)
    for index in range(dense.shape[0]):
        for i in range(tiles.shape[1]):
            for j in range(tiles.shape[2]):
                rows = slice(i * block_m, (i + 1) * block_m)
                tile = dense[index, rows, j * block_n : (j + 1) * block_n]
                wanted = 2 if bool(tile.all()) else int(tile.any())
                assert int(tiles[index, i, j]) == wanted


def test_masks_cannot_be_changed() -> None:
    for mask in (Window(1, 2), Lengths(LENGTHS), Packed(torch.tensor([0, 3])), Causal()):
        with pytest.raises(AttributeError):
            mask.left = 3  # type: ignore[misc]
