"""`replace_attention`: what it replaces, what it leaves, what it tells."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, XLNetConfig, XLNetModel

import fastattn
from fastattn.testing import assert_parity


def transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, attn_implementation="sdpa",
    )  # fmt: skip
    return BertModel(config).eval()


def ids() -> Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """In the manner of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x)[:, None].chunk(3, -1))[:, 0]


class OwnAttention(nn.Module):
    """By hand."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ x.mT).softmax(-1) @ x


class Subclass(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_every_module_of_a_transformer_is_replaced_and_called() -> None:
    model, exact, stock = transformer(), transformer().double(), transformer()
    source, target = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    report = fastattn.replace_attention(model)
    assert [layer.name for layer in report.layers if not layer.replaced] == []
    assert report.replaced == len(report.layers) == 6
    with torch.no_grad():
        got = model(source, target, tgt_mask=causal, tgt_is_causal=True)
        wanted = stock(source, target, tgt_mask=causal, tgt_is_causal=True)
        truth = exact(source.double(), target.double(), tgt_mask=causal.double())
    assert_parity(got, wanted, truth)
    called = report.calls()
    assert [sum(layer.calls.values()) for layer in called.layers] == [1] * 6
    by_name = {layer.name: layer.shapes for layer in called.layers}
    (cross,) = by_name["decoder.layers.0.multihead_attn"]
    assert cross.q == (2, 5, 4, 8) and cross.k == (2, 7, 4, 8)
    assert "6 of 6 attention modules called fastattn" in str(called)


def test_undo_puts_back_what_was_there() -> None:
    model = transformer()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    report = fastattn.replace_attention(model)
    assert any(type(m) is fastattn.nn.MultiheadAttention for m in model.modules())
    model.train()
    report.undo()
    report.undo()
    classes = [type(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert classes == [nn.MultiheadAttention] * 6
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert all(module.training for module in model.modules())

    loaded = bert()
    report = fastattn.replace_attention(loaded)
    assert loaded.config._attn_implementation == "fastattn"
    report.undo()
    assert loaded.config._attn_implementation == "sdpa"


def test_a_module_that_is_the_model_or_shared_is_replaced_once() -> None:
    alone = nn.MultiheadAttention(8, 2)
    report = fastattn.replace_attention(alone)
    assert isinstance(alone, fastattn.nn.MultiheadAttention)
    assert "(model)" in str(report)
    shared = nn.ModuleList([nn.MultiheadAttention(8, 2)] * 3)
    assert fastattn.replace_attention(shared).replaced == 1
    assert all(isinstance(module, fastattn.nn.MultiheadAttention) for module in shared)


def test_replacing_twice_says_so_and_undoes_once() -> None:
    model = nn.MultiheadAttention(8, 2)
    first, second = fastattn.replace_attention(model), fastattn.replace_attention(model)
    assert "as before" in str(second) and second.replaced == 1
    second.undo()
    assert isinstance(model, fastattn.nn.MultiheadAttention)
    first.undo()
    assert type(model) is nn.MultiheadAttention


def test_what_is_left_is_listed_with_its_reason() -> None:
    wide = nn.MultiheadAttention(1024, 2)
    patched = nn.MultiheadAttention(8, 2)
    patched.forward = patched.forward  # type: ignore[method-assign]
    parts: dict[str, nn.Module] = {
        "subclass": Subclass(8, 2), "wide": wide, "patched": patched, "timm": Attention(),
        "own": OwnAttention(), "good": nn.MultiheadAttention(8, 2),
    }  # fmt: skip
    model = nn.ModuleDict(parts)
    report = fastattn.replace_attention(model)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert list(reasons) == ["subclass", "wide", "patched", "timm", "own", "good"]
    assert "Subclass" in reasons["subclass"]
    assert "head_dim" in reasons["wide"] and "512" in reasons["wide"]
    assert "forward" in reasons["patched"]
    assert "fastattn.integrations.sdpa" in reasons["timm"]
    assert "does not know" in reasons["own"]
    assert reasons["good"] == "" and report.replaced == 1
    calls = {layer.name: layer.reason for layer in report.calls().layers}
    assert calls["good"].startswith("nothing") and calls["own"] == reasons["own"]


def test_models_of_transformers_inside_another_model() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    model = nn.ModuleDict(
        {"text": bert(), "other": LlamaModel(config).eval(), "pool": nn.MultiheadAttention(32, 4)}
    )
    report = fastattn.replace_attention(model)
    assert report.replaced == len(report.layers) == 4
    with torch.no_grad():
        x = model["text"](ids()).last_hidden_state
        model["pool"](x, x, x, need_weights=False)
        model["other"](ids())
    called = report.calls()
    assert all(layer.calls for layer in called.layers)
    (kind,) = next(layer.shapes for layer in called.layers if layer.name.startswith("other"))
    assert kind.q == (2, 9, 4, 8) and kind.k == (2, 9, 2, 8)


def test_an_adapter_is_named() -> None:
    torch.manual_seed(0)
    model = XLNetModel(XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=4, d_inner=48))
    report = fastattn.replace_attention(model.eval())
    assert report.replaced == 2 and "adapter" in str(report)
    with torch.no_grad():
        model(ids())
    assert all(layer.calls for layer in report.calls().layers)
    report.undo()
    assert "adapter" not in str([type(module) for module in model.modules()])


def test_nothing_to_replace() -> None:
    report = fastattn.replace_attention(nn.Sequential(nn.Linear(2, 2)))
    assert report.replaced == 0 and "none that fastattn knows" in str(report)
    assert "0 of 0" in str(report.calls())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastattn.replace_attention(3)  # type: ignore[arg-type]


def test_a_replaced_model_can_be_copied_and_compiled() -> None:
    model = transformer()
    x = torch.randn(1, 4, 32)
    fastattn.replace_attention(model)
    with torch.no_grad():
        wanted = model.encoder(x)
        assert torch.equal(copy.deepcopy(model).encoder(x), wanted)
        compiled = torch.compile(model.encoder, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), wanted)
