"""How much a decoding step reads and writes, counted exactly: the speed that a CPU can prove.

Decoding is bound by memory, so its bytes are its time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import Rotary, T5Bias, Window
from fastattn.testing import WorkMeter

pytestmark = pytest.mark.interpreter

TILE = 64  # keys of a tile, in the interpreter's config
DIM = 16
LENGTHS = (200, 0, 130, 63)


class Step:
    """One call on caches of float32, and what it read and wrote."""

    def __init__(
        self,
        *,
        lengths: tuple[int, ...] = LENGTHS,
        capacity: int = 256,
        heads: int = 4,
        heads_kv: int = 2,
        seqlen_q: int = 1,
        splits: int = 1,
        block_size: int | None = None,
        quantized: str | None = None,
        last_combines: bool = False,
        patch: pytest.MonkeyPatch | None = None,
        **options: Any,
    ) -> None:
        self.lengths, self.heads, self.heads_kv = lengths, heads, heads_kv
        self.splits, self.seqlen_q = splits, seqlen_q
        batch = len(lengths)
        self.q = torch.randn(batch, seqlen_q, heads, DIM)
        self.k, self.v = (torch.randn(batch, seqlen_q, heads_kv, DIM) for _ in range(2))
        rows = (batch, capacity)
        self.table = None
        if block_size is not None:
            columns = -(-capacity // block_size)
            rows = (batch * columns, block_size)
            self.table = torch.randperm(batch * columns).reshape(batch, columns).to(torch.int32)
        self.caches: list[Any] = [torch.randn(*rows, heads_kv, DIM) for _ in range(2)]
        if quantized is not None:
            self.caches = [fastattn.Quantized.make(cache, quantized) for cache in self.caches]
        self.work = self._run(patch, last_combines, options)

    def _run(
        self, patch: pytest.MonkeyPatch | None, last_combines: bool, options: dict[str, Any]
    ) -> WorkMeter:
        from fastattn.kernels import attention

        assert patch is not None
        select = attention.select_decode_config

        def chosen(*arguments: Any) -> Any:
            config = select(*arguments)
            assert config.block_n == TILE
            return replace(config, num_splits=self.splits, last_combines=last_combines)

        patch.setattr(attention, "select_decode_config", chosen)
        seqlens = torch.tensor(self.lengths, dtype=torch.int32)
        names = {"q": self.q, "k": self.k, "v": self.v, "seqlens": seqlens, "table": self.table}
        for name, cache in zip(("k_cache", "v_cache"), self.caches, strict=True):
            plain = isinstance(cache, Tensor)
            names[name] = cache if plain else cache.values
            names[f"{name}_scale"] = None if plain else cache.scale
        with WorkMeter(**names) as work:
            fastattn.attention_with_kv_cache(
                self.q, *self.caches, self.k, self.v, cache_seqlens=seqlens,
                block_table=self.table, causal=True, impl="triton", **options,
            )  # fmt: skip
        patch.setattr(attention, "select_decode_config", select)
        return work

    def cached_bytes(self, width: int = 4) -> int:
        """Bytes of the live keys: each once for its head."""
        return sum(self.lengths) * self.heads_kv * DIM * width


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_each_live_key_is_read_once_and_each_new_one_written_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Step(patch=monkeypatch)
    work = step.work
    assert work.launches == 1
    assert work.loaded["k_cache"] == work.loaded["v_cache"] == step.cached_bytes()
    for name in ("q", "k", "v"):
        assert work.loaded[name] == size_of(getattr(step, name))
    assert work.stored["k_cache"] == work.stored["v_cache"] == size_of(step.k)
    out = size_of(step.q)
    assert work.bytes_stored == out + size_of(step.k) + size_of(step.v)
    # Beside that only the lengths, one for each program.
    assert work.loaded["seqlens"] == len(step.lengths) * step.heads_kv * 4
    assert work.loaded["other"] == 0


def test_nothing_is_in_proportion_to_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (Step(capacity=n, patch=monkeypatch).work for n in (256, 4096))
    assert (small.loaded, small.stored, small.dots) == (large.loaded, large.stored, large.dots)
    paged = (Step(capacity=n, block_size=16, patch=monkeypatch).work for n in (256, 4096))
    small, large = paged
    assert (small.loaded, small.stored, small.dots) == (large.loaded, large.stored, large.dots)


@pytest.mark.parametrize("heads", [2, 8, 32])
def test_keys_are_read_once_whatever_the_size_of_the_group(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(heads=heads, patch=monkeypatch)
    assert step.work.loaded["k_cache"] == step.work.loaded["v_cache"] == step.cached_bytes()
    # A tile of keys costs two products for all heads of its group, and new keys are a tile too.
    tiles = sum(-(-length // TILE) + 1 for length in step.lengths)
    assert step.work.dots == 2 * tiles * step.heads_kv


def test_a_few_tokens_read_the_keys_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(seqlen_q=4, patch=monkeypatch)
    assert step.work.launches == 1
    assert step.work.loaded["k_cache"] == step.work.loaded["v_cache"] == step.cached_bytes()


@pytest.mark.parametrize("last_combines", [False, True])
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_splits_add_their_partial_results_alone(
    splits: int, last_combines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(splits=splits, last_combines=last_combines, patch=monkeypatch)
    work = step.work
    assert work.launches == (1 if last_combines else 2)
    assert work.loaded["k_cache"] == work.loaded["v_cache"] == step.cached_bytes()
    assert work.loaded["q"] == splits * size_of(step.q)
    assert work.loaded["k"] == size_of(step.k)
    # Splits without keys write -inf as their log-sum-exp, and no more. New keys are the last's.
    written = 0
    for length in step.lengths:
        tiles = -(-length // TILE)
        used = -(-tiles // -(-tiles // splits)) if tiles else 0
        written += used + (used < splits)
    partial = written * step.heads * DIM * 4 + splits * len(step.lengths) * step.heads * 4
    counters = 0
    if last_combines:
        groups = len(step.lengths) * step.heads_kv
        counters = groups * splits * 4
    assert work.loaded["other"] == partial + counters
    out = size_of(step.q)
    reset = groups * 4 if last_combines else 0
    assert work.stored["other"] == partial + counters + reset + out


def test_block_numbers_are_read_once_a_tile_or_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Step(block_size=128, patch=monkeypatch)
    tiles = sum(-(-length // TILE) for length in whole.lengths)
    new = len(whole.lengths)
    assert whole.work.loaded["table"] == (tiles + new) * whole.heads_kv * 4
    small = Step(block_size=16, patch=monkeypatch)
    assert small.work.loaded["table"] == (sum(small.lengths) + new) * small.heads_kv * 4
    for step in (whole, small):
        assert step.work.loaded["k_cache"] == step.work.loaded["v_cache"] == step.cached_bytes()


def test_a_window_reads_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(mask=Window(70, 0), patch=monkeypatch)
    # The query stands at `length`, and sees the 70 keys before it, and its own.
    keys = sum(min(length, 70) for length in step.lengths)
    assert step.work.loaded["k_cache"] == keys * step.heads_kv * DIM * 4
    tiles = sum(-(-length // TILE) - max(0, length - 70) // TILE + 1 for length in step.lengths)
    assert step.work.dots == 2 * tiles * step.heads_kv


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_cache_is_a_quarter_and_its_scales(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(quantized=kind, patch=monkeypatch)
    assert step.work.loaded["k_cache"] == step.work.loaded["v_cache"] == step.cached_bytes(1)
    scales = sum(step.lengths) * step.heads_kv * 4
    assert step.work.loaded["k_cache_scale"] == step.work.loaded["v_cache_scale"] == scales
    assert step.work.stored["k_cache_scale"] == len(step.lengths) * step.heads_kv * 4


def test_rotation_reads_partners_and_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = Rotary.make(DIM, 512)
    step = Step(rotary=rotary, patch=monkeypatch)
    assert step.work.loaded["q"] == 2 * size_of(step.q)
    assert step.work.loaded["k"] == 2 * size_of(step.k)
    # Two numbers for each element that is turned.
    assert step.work.loaded["other"] == 2 * (size_of(step.q) + size_of(step.k))
    assert step.work.loaded["k_cache"] == step.cached_bytes()


def test_far_keys_read_one_entry_of_a_bias_by_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = T5Bias(torch.randn(8, 4), bidirectional=False, max_distance=20)
    near, far = (
        Step(lengths=(n,), capacity=1024, bias=bias, patch=monkeypatch).work for n in (60, 1000)
    )
    tiles = -(-1000 // TILE) - 1
    # 16 rows of a tile, of which each reads one entry for the keys that are further than 20 away.
    assert (
        far.loaded["other"] - near.loaded["other"] <= (tiles + 2) * 16 * 4 * 2 + 16 * TILE * 4 * 2
    )


def test_a_chunk_of_a_prompt_skips_what_no_row_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 new tokens behind 64: two blocks of 64 rows, one sees 2 tiles of keys, the other 3."""
    step = Step(lengths=(64,), seqlen_q=128, heads=1, heads_kv=1, patch=monkeypatch)
    assert step.work.launches == 2  # the new tokens are appended first
    assert step.work.dots == 2 * (2 + 3)
    assert step.work.loaded["k_cache"] == (2 + 3) * TILE * DIM * 4
