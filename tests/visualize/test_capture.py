"""One layer of a model of transformers, or of ours: the weights of its own eager attention."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import visualize
from fastattn.testing import assert_parity
from tests.visualize.common import family

CASES = [
    ("bert", None, 1, "attentions"),
    ("llama", None, -1, "attentions"),
    ("t5", "encoder", 0, "encoder_attentions"),
    ("t5", "decoder", 1, "decoder_attentions"),
    ("t5", "cross", -1, "cross_attentions"),
    ("bart", "encoder", 1, "encoder_attentions"),
    ("bart", "decoder", 2, "decoder_attentions"),
    ("bart", "cross", 0, "cross_attentions"),
]


@pytest.mark.parametrize(("name", "kind", "layer", "attribute"), CASES)
def test_weights_are_those_of_transformers(
    name: str, kind: str | None, layer: int, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    softmax = torch.nn.functional.softmax

    def exact_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    # Some models ask for float32 here, whatever they run in, where float64's masks overflow.
    monkeypatch.setattr(torch.nn.functional, "softmax", exact_softmax)
    model, inputs = family(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = getattr(model(**inputs, output_attentions=True), attribute)[layer][1]
        exact = getattr(model.double()(**inputs, output_attentions=True), attribute)[layer][1]
    model.float().set_attn_implementation("sdpa")
    seen = visualize.capture(model, inputs, layer=layer, kind=kind, sequence=1)
    assert model.config._attn_implementation == "sdpa"
    decoder = kind in ("decoder", "cross")
    rows = inputs["decoder_attention_mask" if decoder else "attention_mask"][1]
    keys = inputs["decoder_attention_mask" if kind == "decoder" else "attention_mask"][1]
    assert torch.equal(seen.rows, rows.nonzero()[:, 0])
    assert torch.equal(seen.keys, keys.nonzero()[:, 0])
    assert seen.kind == kind or (kind is None and seen.kind == "self")
    assert seen.heads == (0, 1, 2, 3) and seen.layer == layer % seen.num_layers
    assert_parity(
        seen.weights, plain[:, seen.rows][:, :, seen.keys], exact[:, seen.rows][:, :, seen.keys]
    )
    some = visualize.capture(model, inputs, layer=layer, kind=kind, sequence=1, heads=[2, 1])
    assert some.heads == (2, 1)
    assert torch.equal(some.weights, seen.weights[[2, 1]])


@pytest.mark.parametrize(
    ("name", "kind", "layer"), [("bert", None, 1), ("llama", None, -1), ("t5", "cross", 0)]
)
def test_our_models_attend_as_those_of_transformers(
    name: str, kind: str | None, layer: int, tmp_path: Path
) -> None:
    checkpoint = pytest.importorskip("fastattn.models.checkpoint")
    model, inputs = family(name, head=True)
    inputs = {key: value for key, value in inputs.items() if not key.endswith("mask")}
    inputs["attention_mask"] = torch.arange(11) < torch.tensor([[11], [7]])
    model.save_pretrained(tmp_path)
    ours = checkpoint.load(tmp_path).eval()
    given = dict(inputs)
    if name != "bert":
        given["lengths"] = given.pop("attention_mask").sum(1)
    actual = visualize.capture(ours, given, layer=layer, kind=kind, sequence=1)
    plain = visualize.capture(model, inputs, layer=layer, kind=kind, sequence=1)
    exact = visualize.capture(model.double(), inputs, layer=layer, kind=kind, sequence=1)
    assert torch.equal(actual.keys, torch.arange(7)) and actual.kind == plain.kind
    assert_parity(actual.weights, plain.weights, exact.weights)
    if name == "bert":
        return
    # Token by token, from the cache, the same.
    tokens = inputs["input_ids" if name == "llama" else "decoder_input_ids"][1:, :6]
    with visualize.record_attention(ours, layers=[actual.layer]) as record:
        if name == "llama":
            logits, session = ours.start(tokens[:, :5], max_seqlen=8)
        else:
            logits, session = ours.start(
                inputs["input_ids"][1:, :7], max_seqlen=8, decoder_input_ids=tokens[:, :5]
            )
        ours.step(tokens[:, 5:], session)
    step = record.find(actual.layer, plain.kind)
    keys = 6 if name == "llama" else 7
    assert step.run > 0 and logits.shape[0] == 1
    assert_parity(
        step.weights(), plain.weights[:, 5:6, :keys], exact.weights[:, 5:6, :keys].double()
    )


def test_a_model_on_packed_tokens_and_one_that_is_served_already() -> None:
    model, inputs = family("bert")
    expected = visualize.capture(model, inputs, layer=1, sequence=1)
    hf = pytest.importorskip("fastattn.integrations.transformers")
    hf.enable(model)
    served = visualize.capture(model, inputs, layer=1, sequence=1)
    assert model.config._attn_implementation == "fastattn"
    assert torch.equal(served.weights, expected.weights)
    hf.unpad(model)
    packed = visualize.capture(model, inputs, layer=1, sequence=1)
    assert torch.equal(packed.rows, expected.rows)
    assert (packed.weights - expected.weights).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_the_implementation_comes_back_where_the_model_raises() -> None:
    model, inputs = family("bert")
    model.set_attn_implementation("eager")
    with pytest.raises(IndexError):
        visualize.capture(model, {"input_ids": inputs["input_ids"] + 1000}, layer=0)
    assert model.config._attn_implementation == "eager"


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = family("bert")
    computed = []
    real = fastattn.functional.attention_weights

    def counted(q: Tensor, k: Tensor, *args, **kwargs) -> Tensor:
        weights = real(q, k, *args, **kwargs)
        computed.append(tuple(weights.shape))
        return weights

    monkeypatch.setattr(fastattn.functional, "attention_weights", counted)
    visualize.capture(model, inputs, layer=1, sequence=1, heads=[2])
    assert computed == [(1, 1, 7, 11)]


def test_a_model_around_one_of_transformers() -> None:
    model, inputs = family("bert")

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, features: dict[str, Tensor]) -> Tensor:
            return self.inner(**features).last_hidden_state.mean(1)

    before = model.config._attn_implementation
    seen = visualize.capture(Pooled(), [inputs], layer=2, sequence=0)
    assert seen.module == "inner.encoder.layer.2.attention.self"
    assert torch.equal(seen.weights, visualize.capture(model, inputs, layer=2).weights)
    by_function = visualize.capture(model, lambda: model(**inputs), layer=2, sequence=0)
    assert torch.equal(seen.weights, by_function.weights)
    assert model.config._attn_implementation == before != "fastattn"


def test_what_is_not_there_is_told() -> None:
    model, inputs = family("t5")
    words = r"kind must be one of \['encoder', 'decoder', 'cross'\], since there are several"
    with pytest.raises(LookupError, match=words):
        visualize.capture(model, inputs, layer=0)
    with pytest.raises(LookupError, match=r"layer must be in -2\.\.1, the cross .*, got 2"):
        visualize.capture(model, inputs, layer=2, kind="cross")
    with pytest.raises(LookupError, match=r"kind must be one that was called, .* got 'self'"):
        visualize.capture(model, inputs, layer=0, kind="self")
    with pytest.raises(ValueError, match=r"kind must be one of \['self', .* got 'both'"):
        visualize.capture(model, inputs, layer=0, kind="both")
    with pytest.raises(LookupError, match=r"sequence must be one of the batch, got 2"):
        visualize.capture(model, inputs, layer=0, kind="cross", sequence=2)
    with pytest.raises(LookupError, match="no attention call was seen"):
        visualize.capture(nn.Linear(2, 2), torch.zeros(1, 2), layer=0)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        visualize.capture([], inputs, layer=0)
    with pytest.raises(TypeError, match=r"inputs must be a mapping, .* got int"):
        visualize.capture(nn.Linear(2, 2), 3, layer=0)
    with pytest.raises(TypeError, match=r"layer must be an int, got None"):
        visualize.capture(nn.Linear(2, 2), 3, layer=None)
