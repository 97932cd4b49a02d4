"""The block allocator: nothing lost, nothing owned twice, refusals that change nothing."""

import pickle

import pytest

from fastattn.nn import CacheFullError
from fastattn.nn.block_allocator import BlockAllocator


def counts(allocator: BlockAllocator) -> list[int]:
    return [allocator.owners(block) for block in range(allocator.num_blocks)]


def test_every_block_is_given_out_once() -> None:
    allocator = BlockAllocator(5)
    blocks = [*allocator.allocate(2), *allocator.allocate(0), *allocator.allocate(3)]
    assert sorted(blocks) == list(range(5))
    assert (allocator.num_free, allocator.num_used) == (0, 5)


def test_a_full_pool_refuses_with_the_figures_and_changes_nothing() -> None:
    allocator = BlockAllocator(3)
    allocator.allocate(1)
    before = counts(allocator)
    with pytest.raises(CacheFullError, match=r"3 blocks needed, 2 free of 3") as caught:
        allocator.allocate(3)
    assert (caught.value.needed, caught.value.free, caught.value.total) == (3, 2, 3)
    assert counts(allocator) == before
    assert len(allocator.allocate(2)) == 2
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_block_is_free_when_its_last_owner_lets_go() -> None:
    allocator = BlockAllocator(2)
    (block,) = allocator.allocate(1)
    allocator.retain([block, block])
    assert (allocator.owners(block), allocator.num_shared) == (3, 1)
    allocator.release([block, block])
    assert (allocator.owners(block), allocator.num_free, allocator.num_shared) == (1, 1, 0)
    allocator.release([block])
    assert allocator.allocate(2)[0] == block, "freed last, given out first"


def test_release_and_retain_are_all_or_nothing() -> None:
    allocator = BlockAllocator(3)
    first, second = allocator.allocate(2)
    unused = ({0, 1, 2} - {first, second}).pop()
    before = counts(allocator)
    for refused in ([first, unused], [first, 3], [-1]):
        with pytest.raises(ValueError, match="blocks must"):
            allocator.release(refused)
        with pytest.raises(ValueError, match="blocks must"):
            allocator.retain(refused)
    with pytest.raises(ValueError, match=f"block {first} 2 times, it has 1 owner"):
        allocator.release([second, first, first])
    assert counts(allocator) == before
    assert allocator.num_free == 1


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_pool_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks must be >= 1, got {size}"):
        BlockAllocator(size)


def test_counts_must_be_ints() -> None:
    allocator = BlockAllocator(2)
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        allocator.allocate(-1)
    with pytest.raises(TypeError, match="count must be ints"):
        allocator.allocate(1.0)
    with pytest.raises(TypeError, match="num_blocks must be an int, got True"):
        BlockAllocator(True)
    assert allocator.num_free == 2
