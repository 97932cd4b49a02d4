"""How much work the backward kernels do, counted exactly; and the memory that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import Causal, Lengths, Prefix, T5Bias, Window, biases, masks
from fastattn.masks import Mask
from fastattn.testing import WorkMeter, make_qkv

pytestmark = pytest.mark.interpreter

BLOCK = 64
DIM = 16
PAIR = 2 * BLOCK * BLOCK * DIM  # FLOPs of one product of a tile


class Measurement:
    """The work of both passes of one problem, counted apart."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None = None,
        bias: Any = None,
        trained: str = "q k v bias relative sinks",
        sinks: Tensor | None = None,
        allocations: Allocations | None = None,
    ) -> None:
        from fastattn.kernels.attention import (
            Gradients,
            Modifiers,
            launch_attention_backward,
            launch_attention_forward,
        )
        from fastattn.kernels.attention.config import BackwardConfig, TileConfig

        made = None if bias is None else biases.as_bias(bias)
        parts = {**vars(masks.take_apart(mask)), **vars(biases.take_apart(made))}
        modifiers = Modifiers(softmax_scale=0.25, sinks=sinks, **parts)
        tile = TileConfig(BLOCK, BLOCK, 4, 1)
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
        stats = torch.empty(2, q.shape[0], q.shape[2], q.shape[1])
        with WorkMeter(q=q, k=k, v=v) as self.forward:
            launch_attention_forward(
                q, k, v, out, None, modifiers, softmax_stats=stats, config=tile
            )
        dout = torch.randn_like(out)
        wanted = {
            "q": q, "k": k, "v": v, "bias": modifiers.bias, "relative": modifiers.relative_bias,
            "sinks": sinks,
        }  # fmt: skip
        gradients = Gradients(
            *(
                torch.zeros_like(tensor) if name in trained.split() and tensor is not None else None
                for name, tensor in wanted.items()
            )
        )
        named = {
            "out": out, "dout": dout, "stats": stats, "table": modifiers.relative_bias,
            **{name: tensor for name, tensor in vars(gradients).items() if tensor is not None},
        }  # fmt: skip
        with WorkMeter(q=q, k=k, v=v, **named) as self.backward, allocations or Allocations():
            launch_attention_backward(
                q, k, v, out, stats, dout, None, modifiers, gradients,
                config=BackwardConfig(tile, tile, tile),
            )  # fmt: skip


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the tensors that launchers make inside.

    The interpreter's own tensors, which stand for registers, come from other functions.
    """

    COUNTED = frozenset({"empty_like", "new_empty", "new_zeros", "zeros_like", "sum", "clone"})

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.COUNTED:
            self.bytes += result.untyped_storage().nbytes()
        return result


def qkv(seqlen_q: int, seqlen_k: int, heads: int = 1, heads_kv: int = 1, batch: int = 1) -> Any:
    return make_qkv(batch, seqlen_q, seqlen_k, heads, heads_kv, DIM)


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


MASKS: dict[str, tuple[Mask | None, int, int]] = {
    "bidirectional": (None, 200, 130),
    "causal": (Causal(), 256, 256),
    "causal, seqlen_q < seqlen_k": (Causal(), 100, 200),
    "causal, seqlen_q > seqlen_k": (Causal(), 200, 100),
    "window": (Window(30, 70), 200, 200),
    "narrow window": (Window(2, 3), 200, 150),
    "left padded": (
        Lengths(torch.tensor([130, 200]), starts_k=torch.tensor([70, 0])) & Causal(), 200, 200
    ),
    "prefix": (Prefix(torch.tensor([90, 0])), 150, 150),
    "lengths of rows": (
        Lengths(torch.tensor([100, 200]), seqlens_q=torch.tensor([65, 0])), 200, 200
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_seven_products_for_each_tile_that_the_forward_pass_visits(name: str) -> None:
    mask, seqlen_q, seqlen_k = MASKS[name]
    q, k, v = qkv(seqlen_q, seqlen_k, batch=2)
    work = Measurement(q, k, v, mask)
    tiles = seqlen_tiles = work.forward.dots // 2
    if mask is not None:
        seqlen_tiles = int(
            (mask.tiles(seqlen_q, seqlen_k, BLOCK, BLOCK).expand(2, -1, -1) > 0).sum()
        )
    assert tiles == seqlen_tiles
    assert work.forward.dot_flops == 2 * tiles * PAIR
    assert work.backward.dot_flops == 7 * tiles * PAIR
    assert work.backward.dot_flops == 3.5 * work.forward.dot_flops


def test_causal_walks_the_triangle_both_ways() -> None:
    q, k, v = qkv(512, 512)
    work = Measurement(q, k, v, Causal())
    assert work.backward.dots == 7 * 36  # of 64: n (n + 1) / 2 for n = 8


@pytest.mark.parametrize(
    ("trained", "products"), [("q", 3), ("k", 3), ("v", 2), ("k v", 4), ("q v", 5), ("sinks", 0)]
)
def test_frozen_operands_cost_no_products(trained: str, products: int) -> None:
    q, k, v = qkv(256, 256)
    work = Measurement(q, k, v, Causal(), trained=trained, sinks=torch.zeros(1))
    assert work.backward.dots == products * 10


def test_grouped_heads_are_summed_in_registers() -> None:
    q, k, v = qkv(128, 192, heads=4, heads_kv=2, batch=2)
    work = Measurement(q, k, v)
    # Each gradient is written once, and nothing is written for a head that has none of its own.
    assert work.backward.stored["dk"] == size_of(k)
    assert work.backward.stored["dv"] == size_of(v)
    assert work.backward.stored["dq"] == size_of(q)
    assert work.backward.stored["other"] == 2 * 4 * 128 * 4  # delta
    # Keys are read once for each block of rows, and once for all of their own group.
    assert work.backward.loaded["k"] == (2 * 2 + 1) * size_of(k)


def test_a_bias_that_is_shared_takes_two_products_more() -> None:
    """And one of each sequence's and head's own takes none: its gradient is there already."""
    q, k, v = qkv(128, 192, heads=2, batch=2)
    tiles = 2 * 2 * 2 * 3
    own = Measurement(q, k, v, bias=torch.zeros(2, 2, 128, 192))
    assert own.backward.dots == 7 * tiles
    assert own.backward.stored["dbias"] == 4 * 2 * 2 * 128 * 192
    shared = Measurement(q, k, v, bias=torch.zeros(128, 192))
    assert shared.backward.dots == 9 * tiles
    assert shared.backward.stored["dbias"] == 4 * 128 * 192


@pytest.mark.parametrize("shape", [(2, 1, 192), (128, 1), (2, 1, 1)], ids=str)
def test_a_bias_of_rows_or_keys_takes_no_product_more(shape: tuple[int, ...]) -> None:
    q, k, v = qkv(128, 192, heads=2, batch=2)
    work = Measurement(q, k, v, bias=torch.zeros(shape))
    assert work.backward.dots == 7 * 2 * 2 * 2 * 3


def test_far_tiles_of_a_t5_bias_read_one_entry_and_sum_once() -> None:
    radius, blocks = 20, 6
    table = torch.zeros(8, 1)
    q, k, v = qkv(blocks * BLOCK, blocks * BLOCK)
    work = Measurement(q, k, v, bias=T5Bias(table, max_distance=radius))
    near = 3 * blocks - 2  # the diagonal and its neighbours
    far = blocks * blocks - near
    # Both walks read the bias: a gather where it varies, one entry where it does not.
    assert work.backward.loaded["table"] == 4 * 2 * (near * BLOCK * BLOCK + far)
    # Each block of rows stores each distance that it reaches once: the inner ones, and both ends.
    entries = sum(
        sum(-radius < d < radius for d in range(-BLOCK * (block + 1), BLOCK * (blocks - block)))
        for block in range(blocks)
    )
    sums = work.backward.stored["other"] - 4 * blocks * BLOCK  # less delta
    assert sums == 4 * (entries + 2 * blocks)


def scratch(seqlen: int, **options: Any) -> int:
    """Bytes that the backward pass allocates beyond what it is given."""
    allocations = Allocations()
    q, k, v = qkv(seqlen, seqlen, heads=2)
    Measurement(q, k, v, allocations=allocations, **options)
    return allocations.bytes


@pytest.mark.parametrize("kind", ["causal", "T5Bias", "bias of keys", "shared bias", "sinks"])
def test_memory_grows_with_the_length_and_not_with_its_square(kind: str) -> None:
    def options(seqlen: int) -> dict[str, Any]:
        return {
            "causal": {"mask": Causal()},
            "T5Bias": {"bias": T5Bias(torch.zeros(8, 2), max_distance=20)},
            "bias of keys": {"bias": torch.zeros(1, 1, 1, seqlen)},
            "shared bias": {"bias": torch.zeros(1, 1, seqlen, seqlen)},
            "sinks": {"sinks": torch.zeros(2)},
        }[kind]

    once, twice = scratch(256, **options(256)), scratch(512, **options(512))
    assert 0 < once < twice <= 2 * once
