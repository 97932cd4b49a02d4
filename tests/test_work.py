"""How much work the kernels do, counted exactly: the speed that a CPU can prove."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import ALiBi, Causal, Lengths, Packed, Prefix, T5Bias, Window, biases, masks
from fastattn.masks import Mask
from fastattn.testing import WorkMeter, make_qkv
from fastattn.testing.features import FEATURES
from fastattn.testing.inputs import make_packed_qkv
from fastattn.testing.interpreter.accesses import Access, Observer, observing

pytestmark = pytest.mark.interpreter

BLOCK = 64
DIM = 16


def measure(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_m: int = BLOCK,
    block_n: int = BLOCK,
    mask: Mask | None = None,
    bias: Any = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    **named: Tensor,
) -> WorkMeter:
    """The work of one launch of the forward kernel with given tiles."""
    from fastattn.kernels.attention import Modifiers, launch_attention_forward
    from fastattn.kernels.attention.config import TileConfig

    mask_parts, bias_parts = masks.take_apart(mask), biases.take_apart(bias)
    modifiers = Modifiers(softmax_scale=0.25, sinks=sinks, **vars(mask_parts), **vars(bias_parts))
    out = q.new_full((*q.shape[:-1], v.shape[-1]), float("nan"))
    lse = None
    if return_lse:
        shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.full(shape, float("nan"))
    config = TileConfig(block_m, block_n, 4, 1)
    with WorkMeter(q=q, k=k, v=v, out=out, lse=lse, **named) as work:
        launch_attention_forward(q, k, v, out, lse, modifiers, config=config)
    assert work.launches == 1
    return work


def tiles_visited(work: WorkMeter) -> int:
    """A tile of keys costs two products: with q, and with v."""
    assert work.dots % 2 == 0
    return work.dots // 2


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def qkv(seqlen_q: int, seqlen_k: int, heads: int = 1, heads_kv: int = 1, batch: int = 1) -> Any:
    return make_qkv(batch, seqlen_q, seqlen_k, heads, heads_kv, DIM)


# Tiles.


def test_causal_visits_the_lower_triangle_of_tiles() -> None:
    q, k, v = qkv(1024, 1024)
    work = measure(q, k, v, block_m=128, block_n=128, mask=Causal())
    assert tiles_visited(work) == 36  # of 64: n (n + 1) / 2 for n = 8
    assert work.dot_flops == 36 * 2 * (2 * 128 * 128 * DIM)
    assert work.loaded["k"] == work.loaded["v"] == 36 * 128 * DIM * 4


def test_bidirectional_visits_every_tile() -> None:
    q, k, v = qkv(512, 256)
    assert tiles_visited(measure(q, k, v)) == 8 * 4


def test_a_window_costs_its_width_and_not_the_length() -> None:
    width = 100
    tiles = {}
    for seqlen in (512, 1024):
        q, k, v = qkv(seqlen, seqlen)
        tiles[seqlen] = tiles_visited(measure(q, k, v, mask=Window(width, 0)))
        # Each block of rows sees at most BLOCK + width keys.
        assert tiles[seqlen] <= seqlen // BLOCK * ((BLOCK + width) // BLOCK + 1)
    first_rows = 2  # blocks at the start see fewer keys, whatever the length
    per_block = (tiles[1024] - tiles[512]) / (512 // BLOCK)
    assert tiles[1024] == per_block * (1024 // BLOCK - first_rows) + 1 + 2


def test_a_padded_batch_costs_the_sum_of_its_lengths() -> None:
    lengths = [512, 64, 128, 0]
    q, k, v = qkv(512, 512, batch=4)
    ends = torch.tensor(lengths)
    work = measure(q, k, v, mask=Lengths(ends, seqlens_q=ends))
    assert tiles_visited(work) == sum((length // BLOCK) ** 2 for length in lengths)
    assert work.loaded["q"] == sum(lengths) * DIM * 4
    # Without seqlens_q the padding's rows are computed, over the keys that exist.
    work = measure(q, k, v, mask=Lengths(ends))
    assert tiles_visited(work) == sum(512 // BLOCK * (length // BLOCK) for length in lengths)
    # Keys that do not exist are not read, also within a tile.
    work = measure(q, k, v, mask=Lengths(torch.tensor([100, 1, 0, 512])))
    assert work.loaded["k"] == work.loaded["v"] == 512 // BLOCK * (100 + 1 + 512) * DIM * 4


def test_left_padding_is_not_visited() -> None:
    q, k, v = qkv(256, 256, batch=2)
    ends, starts = torch.tensor([256, 256]), torch.tensor([192, 0])
    work = measure(q, k, v, mask=Lengths(ends, starts_k=starts) & Causal())
    # The first sequence's rows see only the last tile, and only the last block of rows sees it.
    assert tiles_visited(work) == 1 + (1 + 2 + 3 + 4)


def test_packed_sequences_cost_their_own_squares() -> None:
    lengths = [192, 64, 0, 128]
    q, k, v = make_packed_qkv(lengths, lengths, 1, head_dim=DIM)
    ends = torch.tensor([0, 192, 256, 256, 384])
    work = measure(q, k, v, mask=Packed(ends), q_all=q)
    assert tiles_visited(work) == sum((length // BLOCK) ** 2 for length in lengths)
    assert work.loaded["q"] == size_of(q)
    assert work.stored["out"] == size_of(q)


def test_a_prefix_costs_its_tiles_and_the_triangle() -> None:
    q, k, v = qkv(256, 256)
    work = measure(q, k, v, mask=Prefix(torch.tensor([128])))
    assert tiles_visited(work) == 2 + 2 + 3 + 4


MASKS: dict[str, tuple[Mask, int, int]] = {
    "causal, seqlen_q < seqlen_k": (Causal(), 100, 200),
    "causal, seqlen_q > seqlen_k": (Causal(), 200, 100),
    "window": (Window(30, 70), 200, 200),
    "narrow window": (Window(2, 3), 200, 150),
    "window to one side": (Window(None, 10), 150, 200),
    "left padded": (
        Lengths(torch.tensor([130, 200]), starts_k=torch.tensor([70, 0])) & Causal(), 200, 200
    ),
    "prefix": (Prefix(torch.tensor([90, 0])), 150, 150),
    "prefix in a window": (Prefix(torch.tensor([90, 10])) & Window(40, None), 200, 200),
    "lengths of rows": (
        Lengths(torch.tensor([100, 200]), seqlens_q=torch.tensor([65, 0])), 200, 200
    ),
}  # fmt: skip


@pytest.mark.parametrize("blocks", [(64, 64), (32, 64), (64, 32)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_foretells_the_tiles_that_are_visited(name: str, blocks: tuple[int, int]) -> None:
    mask, seqlen_q, seqlen_k = MASKS[name]
    q, k, v = qkv(seqlen_q, seqlen_k, batch=2)
    tiles = mask.tiles(seqlen_q, seqlen_k, *blocks)
    foretold = int((tiles.expand(2, -1, -1) > 0).sum())
    work = measure(q, k, v, block_m=blocks[0], block_n=blocks[1], mask=mask)
    assert tiles_visited(work) == foretold


# Bytes.


@pytest.mark.parametrize("seqlen", [100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_q_is_read_once_and_out_is_written_once(seqlen: int, dtype: torch.dtype) -> None:
    q, k, v = make_qkv(2, seqlen, seqlen, 2, head_dim=40, head_dim_v=24, dtype=dtype)
    work = measure(q, k, v, mask=Causal(), return_lse=True)
    assert work.loaded["q"] == size_of(q)
    assert work.stored["out"] == q.numel() // 40 * 24 * q.element_size()
    assert work.stored["lse"] == q.numel() // 40 * 4
    assert work.loaded["out"] == work.stored["q"] == work.stored["k"] == work.stored["v"] == 0
    # Nothing else is stored, and no other tensor is loaded from.
    assert work.stored["other"] == work.loaded["other"] == 0


def test_keys_are_read_once_for_each_block_of_rows() -> None:
    q, k, v = qkv(200, 150)
    work = measure(q, k, v)
    assert work.loaded["k"] == work.loaded["v"] == 4 * size_of(k)


def test_grouped_heads_read_the_keys_that_they_share() -> None:
    q, k, v = qkv(64, 100, heads=4, heads_kv=2, batch=2)
    work = measure(q, k, v)
    # Each query head reads its keys from k itself; an expanded copy would count as "other".
    assert work.loaded["k"] == work.loaded["v"] == 2 * size_of(k)
    assert work.loaded["other"] == work.stored["other"] == 0


def test_operands_with_gaps_are_not_copied() -> None:
    case = next(row for row in FEATURES if row.layout == "gaps").case(torch.float32)
    with WorkMeter(q=case.q, k=case.k, v=case.v) as work:
        out = fastattn.attention(case.q, case.k, case.v, impl="triton")
    assert isinstance(out, Tensor)
    assert work.launches == 1
    assert work.loaded["q"] == size_of(case.q)
    assert work.loaded["other"] == 0
    assert work.stored["other"] == size_of(out)


def test_a_full_bias_is_read_once() -> None:
    q, k, v = qkv(100, 150, heads=2, batch=2)
    bias = torch.randn(2, 2, 100, 150)
    assert measure(q, k, v, bias=biases.as_bias(bias), bias_=bias).loaded["bias_"] == size_of(bias)
    mask = torch.rand(2, 2, 100, 150) < 0.5
    work = measure(q, k, v, mask=masks.as_mask(mask), mask_=mask)
    assert work.loaded["mask_"] == size_of(mask)
    # Under a causal mask, only the tiles that are visited.
    q, k, v = qkv(128, 128)
    bias = torch.randn(128, 128)
    work = measure(q, k, v, bias=biases.as_bias(bias), mask=Causal(), bias_=bias)
    assert work.loaded["bias_"] == 3 * BLOCK * BLOCK * 4


@pytest.mark.parametrize("kind", ["bias", "mask"])
@pytest.mark.parametrize(
    ("shape", "elements_a_tile"),
    [
        ((1, 1, 128, 128), BLOCK * BLOCK),
        ((128, 128), BLOCK * BLOCK),
        ((2, 1, 1, 128), BLOCK),  # key padding: a vector a tile
        ((2, 1, 128, 1), BLOCK),
        ((2, 2, 1, 1), 1),
    ],
    ids=str,
)
def test_what_is_broadcast_is_read_as_such(
    shape: tuple[int, ...], elements_a_tile: int, kind: str
) -> None:
    q, k, v = qkv(128, 128, heads=2, batch=2)
    tensor = torch.randn(shape)
    if kind == "mask":
        tensor = tensor > 0
        work = measure(q, k, v, mask=masks.as_mask(tensor), small=tensor)
    else:
        work = measure(q, k, v, bias=biases.as_bias(tensor), small=tensor)
    # 4 tiles for each of 4 heads, all of them read from the small tensor's own memory.
    assert work.loaded["small"] == 16 * elements_a_tile * tensor.element_size()
    assert work.loaded["other"] == 0


def test_expanded_is_read_like_broadcast() -> None:
    q, k, v = qkv(128, 128, heads=2, batch=2)
    padding = torch.rand(2, 1, 1, 128) < 0.5
    work = measure(q, k, v, mask=masks.as_mask(padding.expand(2, 2, 128, 128)), small=padding)
    assert work.loaded["small"] == 16 * BLOCK
    assert work.loaded["other"] == 0


def test_alibi_reads_a_slope_a_tile() -> None:
    q, k, v = qkv(128, 128, heads=2)
    slopes = torch.tensor([0.5, 0.25])
    assert measure(q, k, v, bias=ALiBi(slopes), slopes=slopes).loaded["slopes"] == 8 * 4


class Extent(Observer):
    """The lowest and the highest byte that was loaded within given bounds."""

    def __init__(self, tensor: Tensor) -> None:
        self.start = tensor.data_ptr()
        self.end = self.start + size_of(tensor)
        self.addresses: set[int] = set()

    def accessed(self, access: Access) -> None:
        if access.kind == "load":
            inside = (access.addresses >= self.start) & (access.addresses < self.end)
            self.addresses.update(int(address) for address in access.addresses[inside])


def test_t5_bias_reads_its_table_only() -> None:
    heads, seqlen, radius = 2, 640, 64
    q, k, v = qkv(seqlen, seqlen, heads=heads)
    table = torch.randn(16, heads)
    parts = biases.take_apart(T5Bias(table, max_distance=radius))
    by_distance = parts.relative_bias
    assert by_distance is not None
    assert by_distance.shape == (heads, 2 * radius + 1)

    class Made(biases.Bias):
        """The same bias with a table that the meter knows."""

        def add_to(self, before: biases.BiasParts) -> biases.BiasParts:
            return replace(before, relative_bias=by_distance)

    seen = Extent(by_distance)
    with observing(seen):
        work = measure(q, k, v, bias=Made(), table=by_distance)
    assert work.loaded["other"] == work.stored["other"] == 0
    assert len(seen.addresses) == by_distance.numel()
    # Tiles within the radius of the diagonal gather; each of the others loads one entry.
    blocks = seqlen // BLOCK
    near = sum(
        abs(i - j) * BLOCK < radius + BLOCK - 1 for i in range(blocks) for j in range(blocks)
    )
    assert near == 3 * blocks - 2
    entries = near * BLOCK * BLOCK + (blocks * blocks - near)
    assert work.loaded["table"] == heads * entries * 4


def test_t5_bias_never_exists_as_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, seqlen = 2, 192
    q, k, v = qkv(seqlen, seqlen, heads=heads)
    largest = max(size_of(q), size_of(v), (2 * 128 + 1) * heads * 8)
    assert largest < heads * seqlen * seqlen  # bytes of even a mask of one byte

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        worst = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple) else (result,):
                if isinstance(item, Tensor):
                    Allocations.worst = max(Allocations.worst, item.untyped_storage().nbytes())
            return result

    with Allocations():
        fastattn.attention(q, k, v, bias=T5Bias(torch.randn(32, heads)), impl="triton")
    assert 0 < Allocations.worst <= largest


def test_sinks_are_read_once_a_block_of_rows() -> None:
    q, k, v = qkv(128, 256, heads=3, heads_kv=3)
    sinks = torch.randn(3)
    assert measure(q, k, v, sinks=sinks, sinks_=sinks).loaded["sinks_"] == 2 * size_of(sinks)


# Attention weights on demand.


def test_weights_cost_only_the_heads_and_rows_asked_for() -> None:
    q, k, _ = qkv(512, 256, heads=8, heads_kv=2)
    lse = torch.zeros(1, 8, 512)
    with WorkMeter(q=q, k=k, lse=lse) as work:
        weights = fastattn.attention_weights(q, k, lse, heads=[6], rows=[3, 400], impl="triton")
    assert work.launches == 1
    assert work.stored["other"] == size_of(weights) == 2 * 256 * 4
    tiles = 256 // BLOCK
    assert work.dots == tiles
    assert work.loaded["q"] == tiles * 2 * DIM * 4
    assert work.loaded["k"] == size_of(k) // 2
    assert work.loaded["lse"] == tiles * 2 * 4


def test_averaged_weights_are_written_once() -> None:
    q, k, _ = qkv(100, 100, heads=4, heads_kv=4)
    lse = torch.zeros(1, 4, 100)
    with WorkMeter(q=q, k=k, lse=lse) as work:
        weights = fastattn.attention_weights(q, k, lse, average_heads=True, impl="triton")
    assert weights.shape == (1, 100, 100)
    assert work.stored["other"] == size_of(weights)
