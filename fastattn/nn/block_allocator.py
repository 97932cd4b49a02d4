"""Which blocks of a paged cache are free, and how many owners each of the others has.

Host side only: plain integers, nothing on a device. Every method either does all that it was
asked, or raises and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from fastattn.nn.arguments import as_integers, check_positive


class CacheFullError(RuntimeError):
    """Not enough free blocks. Nothing was changed: free or roll back a row and try again.

    Attributes:
        needed, free, total: blocks that the call needs, that are free, and that the pool has.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        self.needed, self.free, self.total = needed, free, total
        super().__init__(needed, free, total)  # these, so that the error can be pickled

    def __str__(self) -> str:
        return (
            f"the cache is full: {self.needed} blocks needed, {self.free} free of {self.total}; "
            "free or roll back a row, or build the cache with a larger num_blocks"
        )


class BlockAllocator:
    """A pool of `num_blocks` blocks, numbered from 0, each with a count of its owners.

    Blocks freed last are given out first, so that a small working set stays in the device's cache.
    """

    def __init__(self, num_blocks: int) -> None:
        check_positive("num_blocks", num_blocks)
        self._owners = [0] * num_blocks
        self._free = list(range(num_blocks))[::-1]

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool, free or not."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        """Blocks without an owner."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one owner."""
        return self.num_blocks - self.num_free

    @property
    def num_shared(self) -> int:
        """Blocks with more than one owner."""
        return sum(owners > 1 for owners in self._owners)

    def owners(self, block: int) -> int:
        """How many owners a block has; 0 if it is free."""
        self._check((block,), lowest=0)
        return self._owners[block]

    def allocate(self, count: int) -> list[int]:
        """`count` free blocks, each now with one owner.

        Raises:
            CacheFullError: fewer are free.
        """
        (count,) = as_integers("count", (count,))
        if count < 0:
            raise ValueError(f"count must be >= 0, got {count}")
        if count > self.num_free:
            raise CacheFullError(count, self.num_free, self.num_blocks)
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._owners[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more owner for each of these blocks, which must be in use."""
        blocks = tuple(blocks)
        self._check(blocks, lowest=1)
        for block in blocks:
            self._owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One owner less for each of these blocks; without any left a block is free again."""
        blocks = tuple(blocks)
        self._check(blocks, lowest=1)
        for block, times in Counter(blocks).items():
            if times > self._owners[block]:
                raise ValueError(
                    f"blocks releases block {block} {times} times, it has "
                    f"{self._owners[block]} owners"
                )
        for block in blocks:
            self._owners[block] -= 1
            if self._owners[block] == 0:
                self._free.append(block)

    def _check(self, blocks: Sequence[int], lowest: int) -> None:
        for block in as_integers("blocks", blocks):
            if not 0 <= block < self.num_blocks:
                raise ValueError(f"blocks must lie in 0..{self.num_blocks - 1}, got {block}")
            if self._owners[block] < lowest:
                raise ValueError(f"blocks must be in use, block {block} is free")
