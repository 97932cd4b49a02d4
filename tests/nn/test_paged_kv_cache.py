"""What only the paged cache does: blocks taken, shared, copied before a write, and given back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import attention
from fastattn.nn import CacheFullError, PagedKVCache
from fastattn.testing import assert_parity

LAYERS = 2


def make(device: str, num_blocks: int = 8, block_size: int = 4, **options: Any) -> PagedKVCache:
    options = {"max_batch": 4, "max_seqlen": 16, "dtype": torch.float32, **options}
    cache = PagedKVCache(LAYERS, num_blocks, block_size, 1, 4, device=device, **options)
    for store in (cache.keys, cache.values):
        if store.values.dtype == torch.float32:
            store.values.fill_(float("nan"))
    return cache


def write(
    cache: PagedKVCache, count: int, rows: list[int], value: float, layers: int = LAYERS
) -> None:
    k = torch.full((len(rows), count, 1, 4), value, device=cache.device)
    for layer in range(layers):
        cache.append(layer, k, -k, rows=rows)
    if layers == LAYERS:
        cache.advance(count, rows=rows)


def numbers(cache: PagedKVCache, layer: int, row: int) -> list[float]:
    k, v = cache.read(layer, row)
    assert torch.equal(k, -v)
    return k[:, 0, 0].tolist()


def test_blocks_are_taken_as_rows_grow_and_given_back(device: str) -> None:
    cache = make(device)
    write(cache, 4, [0], 1.0)
    assert (len(cache.blocks(0)), cache.num_free_blocks) == (1, 7)
    write(cache, 1, [0], 2.0)
    assert (len(cache.blocks(0)), cache.num_free_blocks) == (2, 6)
    cache.rollback(1, rows=[0])
    assert (len(cache.blocks(0)), cache.num_free_blocks) == (1, 7)
    cache.free(0)
    assert (cache.blocks(0), cache.num_free_blocks) == ((), 8)
    assert cache.block_table.tolist() == [[0] * 4] * 4


def test_padding_that_did_not_count_gives_its_blocks_back(device: str) -> None:
    cache = make(device, num_blocks=16)
    k = torch.zeros(4, 9, 1, 4, device=device)
    for layer in range(LAYERS):
        cache.append(layer, k, k)
    assert cache.num_free_blocks == 16 - 4 * 3
    cache.advance([9, 4, 5, 0])
    assert [len(cache.blocks(row)) for row in range(4)] == [3, 1, 2, 0]


def test_a_full_pool_refuses_all_rows_before_any_layer_is_written(device: str) -> None:
    cache = make(device, num_blocks=4)
    write(cache, 4, [0, 1, 2], 1.0)
    stored, table = cache.keys.values.clone(), cache.block_table.clone()
    with pytest.raises(CacheFullError, match="3 blocks needed, 1 free of 4") as caught:
        write(cache, 1, [2, 0, 1], 2.0)
    assert (caught.value.needed, caught.value.free, caught.value.total) == (3, 1, 4)
    with pytest.raises(CacheFullError):
        cache.reserve([1, 4, 1], rows=[0, 1, 2])
    assert torch.equal(cache.keys.values.view(torch.int32), stored.view(torch.int32))
    assert torch.equal(cache.block_table, table)
    assert (cache.lengths, cache.num_free_blocks) == ((4, 4, 4, 0), 1)
    cache.free(1)
    write(cache, 1, [2, 0], 2.0)
    assert numbers(cache, 1, 2) == [1.0] * 4 + [2.0]


def test_a_row_longer_than_max_seqlen_is_no_question_of_free_blocks(device: str) -> None:
    cache = make(device, max_seqlen=10)  # capacity 12: the last block is not filled
    write(cache, 10, [0], 1.0)
    assert cache.capacity == 12
    with pytest.raises(ValueError, match=r"in 0\.\.0 tokens for row 0, .* max_seqlen 10, got 1"):
        write(cache, 1, [0], 1.0)


def test_sharing_takes_no_block_and_the_first_writer_gets_a_copy(device: str) -> None:
    cache = make(device)
    write(cache, 6, [0], 1.0)
    cache.fork(0, 1)
    cache.share_prefix(0, 2, 3)
    first, last = cache.blocks(0)
    assert cache.blocks(1) == (first, last) and cache.blocks(2) == (first,)
    assert (cache.num_free_blocks, cache.allocator.owners(first)) == (6, 3)
    write(cache, 1, [1], 2.0)
    assert cache.blocks(1)[0] == first and cache.blocks(1)[1] != last
    write(cache, 1, [0], 3.0)
    assert cache.blocks(0) == (first, last), "its sole owner now, who writes in place"
    write(cache, 1, [2], 4.0)
    assert cache.blocks(2)[0] != first
    for layer in range(LAYERS):
        assert numbers(cache, layer, 0) == [1.0] * 6 + [3.0]
        assert numbers(cache, layer, 1) == [1.0] * 6 + [2.0]
        assert numbers(cache, layer, 2) == [1.0] * 3 + [4.0]
    assert cache.num_free_blocks == 8 - 4


def test_a_shared_block_that_is_full_is_never_copied(device: str) -> None:
    cache = make(device)
    write(cache, 8, [0], 1.0)
    cache.fork(0, 1)
    assert cache.blocks_needed(1, rows=[0, 1]) == 2
    write(cache, 1, [0, 1], 2.0)
    assert cache.blocks(0)[:2] == cache.blocks(1)[:2]


def test_copies_count_in_what_is_needed(device: str) -> None:
    """Three owners of a partly filled block, all about to write: two copies, no more."""
    cache = make(device, num_blocks=3)
    write(cache, 2, [0], 1.0)
    cache.fork(0, 1)
    cache.fork(0, 2)
    assert [cache.blocks_needed(1, rows=list(range(n))) for n in (1, 2, 3)] == [1, 2, 2]
    cache.fork(0, 3)
    assert cache.blocks_needed(1) == 3
    with pytest.raises(CacheFullError, match="3 blocks needed, 2 free of 3"):
        cache.reserve(1)
    assert len({cache.blocks(row) for row in range(4)}) == 1
    cache.free(3)
    write(cache, 1, [2, 0, 1], 2.0)
    assert cache.num_free_blocks == 0
    assert all(numbers(cache, 1, row) == [1.0, 1.0, 2.0] for row in range(3))


def test_a_fork_in_the_middle_of_a_step_spoils_nothing(device: str) -> None:
    """Layer 0 has written behind the length when the block becomes shared, then layer 1 writes."""
    cache = make(device)
    write(cache, 2, [0], 1.0)
    write(cache, 1, [0], 2.0, layers=1)
    cache.fork(0, 1)
    k = torch.full((1, 1, 1, 4), 2.0, device=device)
    cache.append(1, k, -k, rows=[0])
    cache.advance(1, rows=[0])
    write(cache, 1, [1], 3.0)
    for layer in range(LAYERS):
        assert numbers(cache, layer, 0) == [1.0, 1.0, 2.0]
        assert numbers(cache, layer, 1) == [1.0, 1.0, 3.0]


def test_beam_search_copies_blocks_only_where_beams_part(device: str) -> None:
    cache = make(device, num_blocks=10)
    write(cache, 7, [0], 1.0)
    for beam in range(1, 4):
        cache.fork(0, beam)
    stored = cache.keys.values.clone()
    cache.reorder([2, 2, 0, 1])
    assert torch.equal(cache.keys.values.view(torch.int32), stored.view(torch.int32))
    assert cache.num_free_blocks == 8
    k = torch.arange(4.0, device=device)[:, None, None, None].expand(4, 1, 1, 4) + 10
    for layer in range(LAYERS):
        cache.append(layer, k, -k)
    cache.advance(1)
    assert cache.num_free_blocks == 10 - 1 - 4, "one block for all, and the last of each"
    cache.reorder([3, 3, 0, 3])
    assert cache.num_free_blocks == 10 - 1 - 2
    last = [numbers(cache, 0, beam)[7:] for beam in range(4)]
    assert last == [[13.0], [13.0], [10.0], [13.0]]


def test_reserved_blocks_stay_until_the_row_is_cut(device: str) -> None:
    cache = make(device)
    cache.reserve(9, rows=[1])
    table = cache.block_table[1].tolist()
    write(cache, 2, [1], 1.0)
    assert (len(cache.blocks(1)), cache.block_table[1].tolist()) == (3, table)
    cache.reserve(1, rows=[1])
    assert len(cache.blocks(1)) == 3, "a smaller reservation takes nothing back"
    write(cache, 7, [1], 2.0)
    cache.rollback(0, rows=[1])
    assert len(cache.blocks(1)) == 3
    cache.reserve(7, rows=[1])
    cache.crop(9)
    assert len(cache.blocks(1)) == 3


def test_idle_rows_of_a_graph_write_to_blocks_of_their_own(device: str) -> None:
    """A graph over all rows writes to idle ones too: reserve gives them a block, advance(0)."""
    cache = make(device)
    write(cache, 3, [2], 1.0)
    cache.reserve(1)
    k = torch.full((4, 1, 1, 4), 9.0, device=device)
    for layer in range(LAYERS):
        cache.append(layer, k, -k)  # as a replay would
    cache.seqlens.add_(1)
    cache.advance([0, 0, 1, 0], replayed=True)
    assert cache.seqlens.tolist() == [0, 0, 4, 0] == list(cache.lengths)
    assert numbers(cache, 0, 2) == [1.0, 1.0, 1.0, 9.0]
    blocks = [cache.blocks(row) for row in range(4)]
    assert len({block for row in blocks for block in row}) == 4


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_copies_carry_the_scales_of_tokens(device: str, quantization: str) -> None:
    cache = make(device, quantization=quantization)
    for store in (cache.keys, cache.values):
        assert store.scale is not None
        store.scale.fill_(float("nan"))
    k = torch.tensor([1.0, 100.0, 0.01], device=device)[None, :, None, None].expand(1, 3, 1, 4)
    for layer in range(LAYERS):
        cache.append(layer, k, -k, rows=[0])
    cache.advance(3, rows=[0])
    cache.fork(0, 1)
    write(cache, 1, [0, 1], 5.0)
    assert cache.blocks(0) != cache.blocks(1)
    expected = torch.tensor([1.0, 100.0, 0.01, 5.0])
    for layer in range(LAYERS):
        for row in (0, 1):
            # One rounding unit of float32: the largest of a token is stored exactly.
            got = torch.tensor(numbers(cache, layer, row))
            assert ((got - expected).abs() <= torch.finfo(torch.float32).eps * expected).all()


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_scrambled_shared_and_poisoned_blocks(device: str, block_size: int) -> None:
    """Rows whose blocks lie in any order, some shared, NaN in all that is not live."""
    cache = make(device, num_blocks=-(-40 // block_size) + 8, block_size=block_size)
    generator = torch.Generator().manual_seed(0)
    rows: list[Tensor] = [torch.empty(0, 1, 4, device=device)] * 4

    def grow(chosen: list[int], count: int) -> None:
        q = torch.randn(len(chosen), count, 2, 4, generator=generator).to(device)
        k = torch.randn(len(chosen), count, 1, 4, generator=generator).to(device)
        for index, row in enumerate(chosen):
            rows[row] = torch.cat((rows[row], k[index]))
        for layer in range(LAYERS):
            out = cache.attention(layer, q, k, -k, causal=True, rows=chosen)
            assert isinstance(out, Tensor)
            for index, row in enumerate(chosen):
                full = q[index : index + 1], rows[row][None], -rows[row][None]
                exact = attention(*(x.double() for x in full), causal=True)
                assert_parity(out[index : index + 1], attention(*full, causal=True), exact)
        cache.advance(count, rows=chosen)
        used = {block for row in range(4) for block in cache.blocks(row)}
        free = [block for block in range(cache.num_blocks) if block not in used]
        for store in (cache.keys, cache.values):
            store.values[:, free] = float("nan")

    grow([3, 1], 5)
    grow([0], 1)
    cache.rollback(3, rows=[3])
    rows[3] = rows[3][:-3]
    grow([1, 0, 3], 4)
    cache.share_prefix(1, 2, 7)
    rows[2] = rows[1][:7]
    grow([2, 1], 2)
    cache.reorder([2, 0, 2, 3])
    rows[:] = [rows[2], rows[0], rows[2], rows[3]]
    grow([0, 1, 2, 3], 3)
    free = cache.num_free_blocks
    cache.reset()
    assert free < cache.num_free_blocks == cache.num_blocks


def test_a_failed_copy_gives_its_blocks_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(device)
    write(cache, 2, [0], 1.0)
    cache.fork(0, 1)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for the copy")

    monkeypatch.setattr(cache, "_copy_blocks", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        write(cache, 3, [0], 2.0)
    assert cache.num_free_blocks == 7
    assert cache.blocks(0) == cache.blocks(1)
    monkeypatch.undo()
    write(cache, 3, [0], 2.0)
    assert numbers(cache, 1, 0) == [1.0, 1.0, 2.0, 2.0, 2.0]
    assert numbers(cache, 1, 1) == [1.0, 1.0]


def test_only_changed_entries_are_sent(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step sends nothing of the table while rows stay within their blocks."""
    cache = make(device)
    write(cache, 1, [0, 1, 2, 3], 1.0)
    sent: list[int] = []
    original: Callable[[Any], Tensor] = cache._to_device

    def recorded(values: Any) -> Tensor:
        sent.append(len(values))
        return original(values)

    monkeypatch.setattr(cache, "_to_device", recorded)
    for _ in range(3):
        write(cache, 1, [0, 1, 2, 3], 1.0)
    assert sent == []
    write(cache, 1, [0, 1, 2, 3], 1.0)
    assert sent == [2 * 4], "where, and which block, for four rows"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be >= 1, got 0"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"max_batch": 0}, "max_batch must be >= 1, got 0"),
        ({"max_seqlen": -1}, "max_seqlen must be >= 1, got -1"),
    ],
)
def test_sizes_are_checked(device: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(device, **options)


def test_repr_shows_occupancy(device: str) -> None:
    cache = make(device)
    write(cache, 6, [0], 1.0)
    cache.fork(0, 3)
    text = repr(cache)
    assert "2 of 4 rows hold 12 tokens" in text
    assert "2 of 8 blocks of 4 used, 2 shared" in text
