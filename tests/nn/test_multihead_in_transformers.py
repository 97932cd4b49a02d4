"""MultiheadAttention inside torch's transformers: really called, with the stock model's results."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn.nn import MultiheadAttention
from fastattn.testing import assert_parity
from tests.nn.multihead_cases import plain, stock_of


@dataclass
class Calls:
    """How often each way was taken."""

    ours: int = 0
    fused: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    counted = Calls()
    attend = MultiheadAttention._attend

    def ours(self: MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        counted.ours += 1
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "_attend", ours)
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        original = getattr(torch, name)

        def fused(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            counted.fused += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, fused)
    yield counted


def with_our_attention(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, MultiheadAttention.from_torch(child))
    return model


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": contextlib.nullcontext,
}
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 1 + [True] * 5])


@pytest.mark.parametrize("norm_first", [False, True], ids=["norm last", "norm first"])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("masked", ["", "padding", "causal", "padding, causal"])
def test_transformer_encoder(masked: str, context: str, norm_first: bool, calls: Calls) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 4, 48, activation="gelu", batch_first=True, norm_first=norm_first
    )
    stock = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()
    for parameter in stock.parameters():  # layers that are told apart, and biases
        nn.init.normal_(parameter, std=0.2)
    mine, x = with_our_attention(stock), torch.randn(3, 6, 32)
    kwargs: dict[str, Any] = {}
    if "padding" in masked:
        kwargs["src_key_padding_mask"] = PADDING
    if "causal" in masked:
        kwargs["mask"] = torch.ones(6, 6, dtype=torch.bool).triu(1)
    with CONTEXTS[context]():
        out = mine(x, **kwargs)
        assert (calls.ours, calls.fused) == (3, 0)
        calls.ours = 0
        baseline = stock(x, **kwargs)
        assert calls.ours == 0
        assert (calls.fused > 0) == (context != "grad")  # the way that ours must not go
        exact = copy.deepcopy(stock).double()(x.double(), **kwargs)
    assert_parity(out, baseline, exact)


def test_encoder_built_of_our_layer(calls: Calls) -> None:
    """The encoder copies the layer, and asks it whether it may make nested tensors."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    layer.self_attn = MultiheadAttention(32, 4, batch_first=True)
    encoder, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 6, 32)
    with torch.inference_mode():
        out = encoder(x, src_key_padding_mask=PADDING)
    assert (calls.ours, calls.fused) == (2, 0)
    assert torch.equal(out[PADDING], torch.zeros_like(out[PADDING]))  # as torch has it


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_decoder(batch_first: bool, context: str, calls: Calls) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=batch_first)
    stock = nn.TransformerDecoder(layer, 2).eval()
    mine = with_our_attention(stock)
    target, memory = torch.randn(3, 5, 32), torch.randn(3, 6, 32)

    def call(model: nn.Module, dtype: torch.dtype) -> Tensor:
        inputs = [
            x.to(dtype) if batch_first else x.to(dtype).transpose(0, 1) for x in (target, memory)
        ]
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=dtype)
        return model(*inputs, tgt_mask=causal, memory_key_padding_mask=PADDING)

    with CONTEXTS[context]():
        out = call(mine, torch.float32)
        assert (calls.ours, calls.fused) == (4, 0)
        exact = call(copy.deepcopy(stock).double(), torch.float64)
        assert_parity(out, call(stock, torch.float32), exact)


@pytest.mark.parametrize("training", [False, True])
def test_transformer(training: bool, calls: Calls) -> None:
    torch.manual_seed(0)
    stock = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True).train(training)
    mine = with_our_attention(stock)
    source, target = torch.randn(3, 6, 32), torch.randn(3, 5, 32)

    def call(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=dtype)
        out = model(
            source.to(dtype), target.to(dtype), tgt_mask=causal, src_key_padding_mask=PADDING,
            memory_key_padding_mask=PADDING, tgt_is_causal=True,
        )  # fmt: skip
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        return [out, torch.cat([gradient.flatten() for gradient in gradients])]

    results = call(mine, torch.float32)
    assert (calls.ours, calls.fused) == (6, 0)
    truth = call(copy.deepcopy(stock).double(), torch.float64)
    for triple in zip(results, call(stock, torch.float32), truth, strict=True):
        assert_parity(*triple)


@pytest.mark.parametrize("average", [False, True])
def test_nested_tensors(average: bool, calls: Calls) -> None:
    module = plain().module()
    stock = stock_of(module, torch.float32)
    x = torch.randn(9, 32)
    wide = stock_of(module, torch.float64)
    results = []
    for model in (module, stock, wide):
        dtype = model.out_proj.weight.dtype
        nested = torch.nested.nested_tensor(list(x.to(dtype).split([6, 3, 0])))
        with torch.no_grad():
            out, weights = model(nested, nested, nested, average_attn_weights=average)
        assert out.is_nested
        results.append((out.to_padded_tensor(7.0), weights))
    assert calls.fused == 2
    assert calls.ours == 1
    for triple in zip(*results, strict=True):
        assert_parity(*triple)
    nested = torch.nested.nested_tensor(list(x.split([6, 3])))
    with pytest.raises(ValueError, match="must be None where query is nested"):
        module(nested, nested, nested, key_padding_mask=torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be the same tensor where one is nested"):
        module(nested, nested.clone(), nested)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_in_training(layout: torch.layout) -> None:
    """As each sequence by itself, with gradients. torch raises here."""
    module = plain(training=True).module()
    x = torch.randn(9, 32)

    def gradients(model: nn.Module, nested: bool, dtype: torch.dtype) -> Tensor:
        pieces = list(x.to(dtype).split([6, 3]))
        if nested:
            whole = torch.nested.nested_tensor(pieces, layout=layout)
            out = model(whole, whole, whole, need_weights=False)[0]
            assert out.layout == layout
            outs = out.unbind()
        else:
            outs = [model(one, one, one, need_weights=False)[0] for one in pieces]
        loss = sum(out.square().sum() for out in outs)
        own = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([out.flatten() for out in (*outs, *own)])

    stock = stock_of(module, torch.float32)
    assert_parity(
        gradients(module, True, torch.float32),
        gradients(stock, False, torch.float32),
        gradients(stock_of(module, torch.float64), False, torch.float64),
    )
