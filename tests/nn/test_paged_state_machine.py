"""PagedKVCache against plain Python lists: any order of operations, in a pool that is often full.

Each token is a number of its own. A row of the model is the list of its tokens; what the cache
holds is gathered through the table that lies on the device.
"""

from collections import Counter
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastattn.nn import CacheFullError, PagedKVCache

LAYERS, BLOCKS, SIZE, ROWS, LONGEST = 2, 7, 3, 4, 11

row_lists = st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True)
counts = st.integers(1, 5)
one_row = st.integers(0, ROWS - 1)
per_row = st.lists(st.integers(0, 5), min_size=ROWS, max_size=ROWS)


class PagedCacheMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache(
            LAYERS, BLOCKS, SIZE, 1, 1, max_batch=ROWS, max_seqlen=LONGEST, head_dim_v=2,
            dtype=torch.float32, device="cpu",
        )  # fmt: skip
        for store in (self.cache.keys, self.cache.values):
            store.values.fill_(float("nan"))
        self.addresses = self.cache.seqlens.data_ptr(), self.cache.block_table.data_ptr()
        self.model: list[list[int]] = [[] for _ in range(ROWS)]
        self.reserved = [0] * ROWS
        self.begun: dict[int, list[int]] = {}  # tokens that layer 0 alone has written so far
        self.widest: dict[int, int] = {}  # most tokens written at once in such a step
        self.next_token = 1

    # ---- the model's side

    def new_tokens(self, rows: list[int], count: int) -> list[list[int]]:
        first = self.next_token
        self.next_token += count * len(rows)
        return [list(range(first + i * count, first + (i + 1) * count)) for i in range(len(rows))]

    def blocks_needed(self, rows: list[int], ends: list[int]) -> int:
        """From the tables alone: blocks to add, and shared ones to copy before they are written."""
        tables = [self.cache.blocks(row) for row in range(ROWS)]
        owners = Counter(block for table in tables for block in table)
        needed, writers = 0, Counter()
        for row, end in zip(rows, ends, strict=True):
            length, table = len(self.model[row]), tables[row]
            if end > length:
                needed += max(0, -(-end // SIZE) - len(table))
                writers.update(table[length // SIZE : -(-end // SIZE)])
        return needed + sum(min(times, owners[block] - 1) for block, times in writers.items())

    def refusal(self, rows: list[int], ends: list[int]) -> type[Exception] | None:
        if max(ends) > LONGEST:
            return ValueError
        full = self.blocks_needed(rows, ends) > self.cache.num_free_blocks
        return CacheFullError if full else None

    def snapshot(self) -> tuple:
        stored = (self.cache.keys.values, self.cache.values.values)
        return (
            self.cache.lengths,
            self.cache.seqlens.tolist(),
            self.cache.block_table.tolist(),
            [self.cache.blocks(row) for row in range(ROWS)],
            [self.cache.allocator.owners(block) for block in range(BLOCKS)],
            [tensor.view(torch.int32).tolist() for tensor in stored],  # NaN equals itself as bits
        )

    def refused(self, error: type[Exception], operation: Callable[[], object]) -> None:
        before = self.snapshot()
        try:
            operation()
        except error as caught:
            if isinstance(caught, CacheFullError):
                assert caught.needed > caught.free == self.cache.num_free_blocks
        else:
            raise AssertionError(f"{error.__name__} was expected")
        assert self.snapshot() == before

    def ended(self, rows: list[int]) -> None:
        """What an operation on rows ends: their reservation and their step."""
        for row in rows:
            self.reserved[row] = 0
            self.begun.pop(row, None)

    # ---- tensors

    def write(self, layer: int, rows: list[int], tokens: list[list[int]]) -> None:
        k = torch.tensor(tokens, dtype=torch.float32)[:, :, None, None] + 0.25 * layer
        v = torch.cat((-k, k + 0.5), dim=-1)
        if tokens[0][0] % 2:
            self.cache.append(layer, k, v, rows=rows)
            return
        q = torch.ones(len(rows), len(tokens[0]), 2, 1)
        out = self.cache.attention(layer, q, k, v, causal=True, rows=rows)
        assert torch.isfinite(out).all(), "unused memory leaked into a result"

    # ---- steps

    @rule(rows=row_lists, count=counts, kept=per_row)
    def append(self, rows: list[int], count: int, kept: list[int]) -> None:
        tokens = self.new_tokens(rows, count)
        error = self.refusal(rows, [len(self.model[row]) + count for row in rows])
        if error is not None:
            self.refused(error, lambda: self.write(0, rows, tokens))
            return
        for layer in range(LAYERS):
            self.write(layer, rows, tokens)
        kept = [min(kept[row], count) for row in rows]
        too_many = [count + 1, *kept[1:]]
        self.refused(ValueError, lambda: self.cache.advance(too_many, rows=rows))
        self.cache.advance(kept, rows=rows)
        for row, new, number in zip(rows, tokens, kept, strict=True):
            self.model[row] += new[:number]
            self.begun.pop(row, None)

    @rule(rows=row_lists, count=counts)
    def begin(self, rows: list[int], count: int) -> None:
        tokens = self.new_tokens(rows, count)
        error = self.refusal(rows, [len(self.model[row]) + count for row in rows])
        if error is not None:
            self.refused(error, lambda: self.write(0, rows, tokens))
            return
        self.write(0, rows, tokens)
        for row, new in zip(rows, tokens, strict=True):
            self.widest[row] = max(len(new), self.widest[row] if row in self.begun else 0)
            self.begun[row] = new
        self.refused(ValueError, lambda: self.cache.advance(1, rows=rows))

    @precondition(lambda self: self.begun)
    @rule()
    def finish(self) -> None:
        """The other layers of steps that were begun; other rows may have changed in between."""
        for row, tokens in sorted(self.begun.items()):
            end = len(self.model[row]) + len(tokens)
            error = self.refusal([row], [end])  # where the row was forked since
            if error is not None:
                self.refused(error, lambda row=row, new=tokens: self.write(1, [row], [new]))
                self.cache.rollback(0, rows=[row])
            else:
                self.write(1, [row], [tokens])
                self.cache.advance(len(tokens), rows=[row])
                self.model[row] += tokens
            if error is not None:
                self.reserved[row] = 0
        self.begun.clear()

    @rule(rows=row_lists, count=counts)
    def fail(self, rows: list[int], count: int) -> None:
        """A call that takes blocks, and then is refused by the attention function."""
        ends = [len(self.model[row]) + count for row in rows]
        if self.refusal(rows, ends) or any(row in self.begun for row in rows):
            return
        tensor = torch.zeros(len(rows), count, 1, 1)
        free, lengths = self.cache.num_free_blocks, self.cache.lengths
        copied = self.blocks_needed(rows, ends) - sum(
            max(0, -(-end // SIZE) - len(self.cache.blocks(row)))
            for row, end in zip(rows, ends, strict=True)
        )
        try:
            self.cache.attention(0, tensor, tensor, tensor, rows=rows)  # v has the wrong size
        except ValueError:
            pass
        else:
            raise AssertionError("ValueError was expected")
        assert self.cache.lengths == lengths
        # Copies of shared blocks are the rows' own from here on; all else was handed back.
        assert self.cache.num_free_blocks == free - copied

    @rule(rows=row_lists, count=counts)
    def reserve(self, rows: list[int], count: int) -> None:
        ends = [len(self.model[row]) + count for row in rows]
        error = self.refusal(rows, ends)
        if error is not None:
            self.refused(error, lambda: self.cache.reserve(count, rows=rows))
            return
        assert self.cache.blocks_needed(count, rows=rows) == self.blocks_needed(rows, ends)
        self.cache.reserve(count, rows=rows)
        assert self.cache.blocks_needed(count, rows=rows) == 0
        for row, end in zip(rows, ends, strict=True):
            self.reserved[row] = max(self.reserved[row], end)

    # ---- rows

    @rule(rows=row_lists, numbers=per_row)
    def roll_back(self, rows: list[int], numbers: list[int]) -> None:
        numbers = [numbers[row] for row in rows]
        pairs = list(zip(rows, numbers, strict=True))
        if any(number > len(self.model[row]) for row, number in pairs):
            self.refused(ValueError, lambda: self.cache.rollback(numbers, rows=rows))
            return
        self.cache.rollback(numbers, rows=rows)
        for row, number in pairs:
            del self.model[row][len(self.model[row]) - number :]
        self.ended(rows)

    @rule(rows=row_lists, length=st.integers(-1, LONGEST))
    def crop(self, rows: list[int], length: int) -> None:
        if length < 0:
            self.refused(ValueError, lambda: self.cache.crop(length, rows=rows))
            return
        self.cache.crop(length, rows=rows)
        for row in rows:
            del self.model[row][length:]
        self.ended(rows)

    @rule(row=one_row)
    def free(self, row: int) -> None:
        self.cache.free(row)
        self.model[row] = []
        self.ended([row])

    @precondition(lambda self: self.cache.num_free_blocks == 0)
    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.model = [[] for _ in range(ROWS)]
        self.ended(list(range(ROWS)))

    @rule(rows=row_lists, index=st.lists(one_row, min_size=ROWS, max_size=ROWS))
    def reorder(self, rows: list[int], index: list[int]) -> None:
        index = [entry % len(rows) for entry in index[: len(rows)]]
        self.refused(ValueError, lambda: self.cache.reorder([*index, 0], rows=rows))
        self.refused(ValueError, lambda: self.cache.reorder([*index[1:], -1], rows=rows))
        self.cache.reorder(index, rows=rows)
        moved = [list(self.model[rows[entry]]) for entry in index]
        for row, tokens in zip(rows, moved, strict=True):
            self.model[row] = tokens
        self.ended(rows)

    @rule(source=one_row, into=one_row, length=st.integers(0, LONGEST) | st.none())
    def share(self, source: int, into: int, length: int | None) -> None:
        """Forks where no length is given."""
        target = into  # `target` is a word of hypothesis

        def operation() -> None:
            if length is None:
                self.cache.fork(source, target)
            else:
                self.cache.share_prefix(source, target, length)

        known = len(self.model[source])
        wanted = known if length is None else length
        if source == target or self.model[target] or target in self.begun or wanted > known:
            self.refused(ValueError, operation)
            return
        free = self.cache.num_free_blocks + len(self.cache.blocks(target))
        operation()
        assert self.cache.num_free_blocks == free, "sharing takes no block"
        self.model[target] = self.model[source][:wanted]
        self.reserved[target] = 0

    # ---- what must hold after each of them

    @invariant()
    def rows_hold_what_the_model_holds(self) -> None:
        cache = self.cache
        assert cache.lengths == tuple(map(len, self.model))
        assert cache.seqlens.tolist() == list(cache.lengths)
        assert self.addresses == (cache.seqlens.data_ptr(), cache.block_table.data_ptr())
        table = cache.block_table.to(torch.int64)
        k, v = cache.keys.values, cache.values.values
        for row, tokens in enumerate(self.model):
            position = torch.arange(len(tokens))
            place = table[row, position // SIZE], position % SIZE
            expected = torch.tensor(tokens, dtype=torch.float32)
            for layer in range(LAYERS):
                keys = expected + 0.25 * layer
                assert torch.equal(k[layer][place][:, 0, 0], keys)
                assert torch.equal(v[layer][place][:, 0], torch.stack((-keys, keys + 0.5), -1))
        for row, tokens in self.begun.items():
            position = torch.arange(len(tokens)) + len(self.model[row])
            written = k[0, table[row, position // SIZE], position % SIZE, 0, 0]
            assert written.tolist() == tokens

    @invariant()
    def every_block_is_free_or_owned(self) -> None:
        cache = self.cache
        tables = [cache.blocks(row) for row in range(ROWS)]
        for row, table in enumerate(tables):
            assert len(set(table)) == len(table), "a row holds a block twice"
            unused = [0] * (cache.block_table.shape[1] - len(table))
            assert cache.block_table[row].tolist() == [*table, *unused]
            length, begun = len(self.model[row]), len(self.begun.get(row, []))
            most = length + max(begun, self.widest.get(row, 0) if begun else 0)
            assert len(table) >= -(-max(length + begun, self.reserved[row]) // SIZE)
            assert len(table) <= -(-max(most, self.reserved[row]) // SIZE), "kept too much"
        owners = Counter(block for table in tables for block in table)
        assert all(cache.allocator.owners(block) == owners[block] for block in range(BLOCKS))
        assert cache.num_free_blocks == BLOCKS - len(owners), "a block is lost"
        free = [block for block in range(BLOCKS) if not owners[block]]
        for store in (cache.keys, cache.values):
            store.values[:, free] = float("nan")  # nobody may read them


PagedCacheMachine.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestPagedCache = PagedCacheMachine.TestCase
