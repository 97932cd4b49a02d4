"""Recorded attention calls: the weights are those that the model attended with."""

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import visualize
from fastattn.masks import Lengths, Mask, Packed, Window
from fastattn.nn import KVCache
from fastattn.testing import assert_parity
from tests.visualize.common import random


def weights_of(q: Tensor, k: Tensor, visible: Tensor, added: Tensor | float = 0.0) -> Tensor:
    """From the definition: q (rows, heads, dim), k (keys, heads_kv, dim) -> (heads, rows, keys)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("mhd,nhd->hmn", q, k) * q.shape[-1] ** -0.5 + added
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


class Tiny(nn.Module):
    """Two layers that share one module, behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.layer = nn.Linear(32, 96)

    def forward(self, ids: Tensor, fail: bool = False) -> Tensor:
        x = self.embedding(ids)
        for _ in range(2):
            q, k, v = self.layer(x).unflatten(-1, (3, 2, 16)).unbind(-3)
            x = fastattn.attention(q, k, v, causal=True).flatten(-2)
        if fail:
            raise RuntimeError("stop")
        return x


def test_layers_that_share_a_module_and_runs() -> None:
    model, ids = Tiny(), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with visualize.record_attention(model, layers=[1]) as record:
        model(ids)
        model(ids[:, :3])
    assert [(call.run, call.layer) for call in record.calls] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [sorted(call.problems) for call in record.calls] == [[], [0, 1], [], [0, 1]]
    assert record.find(-1) is record.calls[3] and record.find(-1, run=0) is record.calls[1]
    assert record.find(1).weights(1).shape == (2, 3, 3)
    assert record.num_layers(record.calls[0]) == 2
    with pytest.raises(RuntimeError, match="stop"):
        visualize.capture(model, (ids, True), layer=0)
    assert not model.layer._forward_hooks and not model.layer._forward_pre_hooks
    with visualize.record_attention(model, sequences=[1]) as record:
        pass
    model(ids)
    assert record.calls == []


def test_what_was_kept_does_not_change_with_its_buffers() -> None:
    q, k, v = random(3, 1, 5, 2, 8).clone()
    before = q.clone(), k.clone()
    with visualize.record_attention() as record:
        fastattn.attention(q, k, v)
    q.zero_(), k.zero_()
    visible = torch.ones(5, 5, dtype=torch.bool)
    assert_parity(
        record.find(0).weights(),
        weights_of(before[0][0], before[1][0], visible),
        weights_of(before[0][0].double(), before[1][0].double(), visible),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_masks_biases_and_grouped_heads_of_one_sequence(packed: bool) -> None:
    lengths = [7, 4, 9]
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05])
    if packed:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        q, k = random(20, 4, 8), random(20, 2, 8, seed=1)
        mask: Mask = Packed(ends) & Window(3, 0)
    else:
        q, k = random(3, 9, 4, 8), random(3, 9, 2, 8, seed=1)
        mask = Window(3, 0) & Lengths(torch.tensor(lengths))
    with visualize.record_attention(sequences=[1]) as record:
        fastattn.attention(q, k, k, mask=mask, bias=fastattn.ALiBi(slopes))
    call = record.find(0)
    assert call.packed == packed and sorted(call.problems) == [1]
    actual = call.weights(1, heads=[3, 0], rows=[2, 3])
    if packed:
        q, k = q[7:11], k[7:11]
    else:
        q, k, actual = q[1, :4], k[1, :4], actual[..., :4]
    place = torch.arange(4)
    far = (place[:, None] - place).abs()
    visible = (place[:, None] >= place) & (far <= 3)
    results = [
        weights_of(q.to(kind), k.to(kind), visible, -slopes.to(kind)[:, None, None] * far)
        for kind in (torch.float32, torch.float64)
    ]
    assert_parity(actual, *(result[[3, 0]][:, [2, 3]] for result in results))
    mean = call.weights(1, rows=[2, 3], average_heads=True)[..., :4]
    assert_parity(mean, *(result[:, [2, 3]].mean(0) for result in results))
    with pytest.raises(LookupError, match=r"sequence must be one that was kept, \[1\], got 0"):
        call.weights(0)


def turned(x: Tensor) -> Tensor:
    """Rotary embedding of (seqlen, heads, 8) from its definition, in the dtype of x."""
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * 1e4 ** -(torch.arange(4) / 4)
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


@pytest.mark.parametrize("rotary", [None, fastattn.Rotary.make(8, 12)])
def test_a_cache(rotary: fastattn.Rotary | None) -> None:
    cache = KVCache(2, 2, 12, 2, 8, dtype=torch.float32)
    q, k, v = random(2, 7, 4, 8), random(2, 7, 2, 8, seed=1), random(2, 7, 2, 8, seed=2)
    with visualize.record_attention() as record:
        for part in (slice(0, 5), slice(5, 7)):
            for layer in range(2):
                new = (x[:, part] * (layer + 1) for x in (q, k, v))
                cache.attention(layer, *new, causal=True, rotary=rotary)
            cache.advance(part.stop - part.start)
        cache.attention(1, q[:, :3])
    assert [call.kind for call in record.calls] == ["self"] * 4 + ["cross"]
    turn = turned if rotary is not None else torch.clone
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    for call, (rows, factor) in enumerate(((slice(0, 5), 1), (slice(0, 5), 2), (slice(5, 7), 1))):
        results = []
        for kind in (torch.float32, torch.float64):
            wide_q, wide_k = turn(q[1].to(kind) * factor), turn(k[1].to(kind) * factor)
            whole = weights_of(wide_q, wide_k, visible)
            results.append(whole[:, rows, : rows.stop])
        assert_parity(record.calls[call].weights(1), *results)
    results = []
    for kind in (torch.float32, torch.float64):
        seen_k = turn(k[1].to(kind) * 2)
        results.append(weights_of(q[1, :3].to(kind), seen_k, torch.ones(3, 7, dtype=torch.bool)))
    assert_parity(record.find(0, "cross").weights(1), *results)
