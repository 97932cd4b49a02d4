"""Encoders that leave their padding out, against the same models with eager attention."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

import fastattn.integrations.transformers as fastattn_hf
from fastattn.integrations.transformers_unpad import ENCODERS, PACKED, UNPADDED, repad, unpad
from fastattn.testing import assert_parity

VOCAB, PAD = 60, 1
BATCH, SEQLEN = 5, 13
LENGTHS = (6, 13, 1, 6, 9)
WIDTHS = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": PAD,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "Bert": WIDTHS,
    "Roberta": WIDTHS,
    "XLMRoberta": WIDTHS,
    "Camembert": WIDTHS,
    "Albert": {**WIDTHS, "embedding_size": 16},
    "DistilBert": {
        "vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
        "max_position_embeddings": 40, "pad_token_id": PAD,
    },
    "Electra": {**WIDTHS, "embedding_size": 16},
}  # fmt: skip
FAMILIES = list(OPTIONS)
WITH_TOKEN_TYPES = [name for name in FAMILIES if name not in ("DistilBert",)]


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def make(family: str, kind: str = "Model", **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**OPTIONS[family], **options})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:  # as small as they start, attention is nearly uniform
                weight.mul_(4)
            else:  # and biases of zero would hide what goes wrong at padding
                weight.add_(torch.randn_like(weight) / 8)
    return model


def three_of(model: Any) -> tuple[Any, Any, Any]:
    """The model unpadded, with eager attention, and with eager attention in float64."""
    ours = copy.deepcopy(model)
    unpad(ours)
    return ours, model, copy.deepcopy(model).double()


def batch(padding: str) -> dict[str, Tensor]:
    visible = torch.arange(SEQLEN) < torch.tensor(LENGTHS)[:, None]
    if padding == "left":
        visible = visible.flip(1)
    if padding == "holes":
        visible[:, 2:4] = False
    if padding == "empty rows":
        visible[1] = visible[4] = False
    ids = torch.randint(2, VOCAB, visible.shape)
    return {"input_ids": torch.where(visible, ids, PAD), "attention_mask": visible.long()}


def calls_of(model: nn.Module) -> dict[str, int]:
    return unpad(model).calls()


def gradients_by_layer(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a layer as one vector: that of a keys' bias is 0, but for rounding."""
    by_layer: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        numbered = re.match(r".*?\.\d+\.", name)
        layer = numbered[0] if numbered else name.rpartition(".")[0]
        by_layer.setdefault(layer, []).append(grad.flatten())
    return {name: torch.cat(parts) for name, parts in by_layer.items()}


class CountRows:
    """Rows that enter each linear layer within a module, one entry a call."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.LayerNorm)):
                part.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.rows.append(args[0].shape[:-1].numel())


@pytest.mark.parametrize("padding", ["right", "left", "holes", "empty rows"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_real_tokens_equal_eager_and_padding_is_zero(family: str, padding: str) -> None:
    models = three_of(make(family))
    inputs = batch(padding)
    real = inputs["attention_mask"].bool()
    outs = [model(**inputs, output_hidden_states=True) for model in models]
    for hidden in zip(*(out.hidden_states for out in outs), strict=True):
        assert hidden[0].shape == (BATCH, SEQLEN, 32 if hidden[0].shape[-1] == 32 else 16)
        assert_parity(*(states[real] for states in hidden), name="hidden states")
        assert not hidden[0][~real].any()
    assert_parity(*(out.last_hidden_state[real] for out in outs))
    assert not outs[0].last_hidden_state[~real].any()
    if padding == "right" and "pooler_output" in outs[0]:
        assert_parity(*(out.pooler_output for out in outs), name="pooler")
    assert calls_of(models[0]) == {PACKED: 1}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_layer_sees_padding(family: str) -> None:
    model = make(family)
    unpad(model)
    inputs = batch("holes")
    counts = CountRows(model)
    model(**inputs)
    tokens = int(inputs["attention_mask"].sum())
    pooled = [rows for rows in counts.rows if rows == BATCH]
    assert len(pooled) <= 1 < len(counts.rows)
    assert [rows for rows in counts.rows if rows != BATCH] == [tokens] * (
        len(counts.rows) - len(pooled)
    )


HEADS = ["ForSequenceClassification", "ForMaskedLM", "ForTokenClassification"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_losses_and_all_gradients(family: str, head: str) -> None:
    models = three_of(make(family, head, num_labels=3))
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    if head == "ForSequenceClassification":
        labels = torch.randint(3, (BATCH,))
    else:
        classes = VOCAB if head == "ForMaskedLM" else 3
        labels = torch.where(real, torch.randint(classes, real.shape), -100)
    outs = [model(**inputs, labels=labels) for model in models]
    seen = slice(None) if head == "ForSequenceClassification" else real
    assert_parity(*(out.logits[seen].detach() for out in outs), name="logits")
    assert_parity(*(out.loss.detach() for out in outs), name="loss")
    for out in outs:
        out.loss.backward()
    gradients = [gradients_by_layer(model) for model in models]
    for name in gradients[1]:
        assert_parity(*(found[name] for found in gradients), name=f"gradient of {name}")
    assert calls_of(models[0]) == {PACKED: 1}


@pytest.mark.parametrize("family", WITH_TOKEN_TYPES)
@torch.no_grad()
def test_token_types_and_positions_are_packed_too(family: str) -> None:
    types = 1 if family in ("Roberta", "XLMRoberta", "Camembert") else 2
    models = three_of(make(family))
    inputs = batch("left")
    real = inputs["attention_mask"].bool()
    inputs["token_type_ids"] = torch.randint(types, real.shape)
    for positions in (torch.randint(2, 40, real.shape), torch.randint(2, 40, (1, SEQLEN))):
        outs = [model(**inputs, position_ids=positions) for model in models]
        assert_parity(*(out.last_hidden_state[real] for out in outs))
    assert calls_of(models[0]) == {PACKED: 2}


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_embeddings_instead_of_ids(family: str) -> None:
    models = three_of(make(family))
    mask = batch("right")["attention_mask"]
    embeds = torch.randn(*mask.shape, 32)
    given = [embeds.clone(), embeds.clone(), embeds.double()]
    for model, one in zip(models, given, strict=True):
        one.requires_grad_()
        states = model(inputs_embeds=one, attention_mask=mask).last_hidden_state
        states[mask.bool()].square().sum().backward()
    gradients = [one.grad for one in given if one.grad is not None]
    assert_parity(*gradients, name="gradient of inputs_embeds")
    assert calls_of(models[0]) == {PACKED: 1}


@torch.no_grad()
def test_pad_tokens_within_a_sequence_keep_robertas_positions() -> None:
    models = three_of(make("Roberta"))
    inputs = batch("right")
    inputs["input_ids"][1, 4] = PAD  # seen by the mask all the same
    real = inputs["attention_mask"].bool()
    assert_parity(*(model(**inputs).last_hidden_state[real] for model in models))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_padding_nothing_is_touched(family: str) -> None:
    model = make(family)
    plain = fastattn_hf.enable(copy.deepcopy(model))
    unpad(model)
    ids = batch("right")["input_ids"].clamp(min=2)
    for mask in (None, torch.ones_like(ids)):
        expected = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(model(ids, mask).last_hidden_state, expected)
    assert calls_of(model) == {UNPADDED: 2}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_batch_of_padding_alone_is_zero(family: str) -> None:
    model = make(family)
    unpad(model)
    inputs = batch("right")
    out = model(inputs["input_ids"], torch.zeros_like(inputs["attention_mask"]))
    assert out.last_hidden_state.shape == (BATCH, SEQLEN, 32)
    assert not out.last_hidden_state.any()


@torch.no_grad()
def test_positional_arguments_tuples_and_one_row() -> None:
    models = three_of(make("Bert"))
    inputs = {name: tensor[:1] for name, tensor in batch("right").items()}
    real = inputs["attention_mask"].bool()
    outs = [
        model(*inputs.values(), output_hidden_states=True, return_dict=False) for model in models
    ]
    for out in outs:
        assert [type(value) for value in out] == [Tensor, Tensor, tuple]
    for states in zip(*([out[0], *out[2]] for out in outs), strict=True):
        assert_parity(*(one[real] for one in states))


@torch.no_grad()
def test_what_cannot_be_packed_runs_as_it_came_and_is_told() -> None:
    ours, stock, exact = three_of(make("Bert"))
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    outs = [model(**inputs, output_attentions=True) for model in (ours, stock, exact)]
    assert_parity(*(out.last_hidden_state[real] for out in outs))
    assert outs[0].attentions[0].shape == (BATCH, 4, SEQLEN, SEQLEN)
    inputs["attention_mask"] = real[:, None, None].expand(-1, 1, SEQLEN, -1)
    ours(**inputs)
    ours(inputs["input_ids"], torch.ones(BATCH, SEQLEN + 1))
    ours.set_attn_implementation("sdpa")
    ours(**batch("left"))
    calls = calls_of(ours)
    assert PACKED not in calls
    assert list(calls.values()) == [1, 1, 1, 1]
    for reason in ("output_attentions", "4-D", "length of the tokens", 'no longer "fastattn"'):
        assert any(reason in how for how in calls), reason
    assert "4-D" in str(unpad(ours))


def test_dropout_in_training_drops_and_keeps_padding_zero() -> None:
    model = make("Bert").train()
    unpad(model)
    inputs = batch("right")
    outs = [model(**inputs).last_hidden_state for _ in range(2)]
    assert not torch.equal(*outs)
    assert not outs[0][~inputs["attention_mask"].bool()].any()
    outs[0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.encoder.parameters())


def test_gradient_checkpointing_computes_the_same_gradients() -> None:
    model = make("Bert")
    unpad(model)
    again = copy.deepcopy(model).train()
    for part in again.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    # The older name is deprecated, and older releases have no other.
    getattr(again, "activation_checkpointing_enable", again.gradient_checkpointing_enable)()
    inputs = batch("left")
    gradients = []
    for one in (model, again):
        one(**inputs).last_hidden_state.square().sum().backward()
        gradients.append(one.encoder.layer[0].output.dense.weight.grad)
    assert torch.equal(*gradients)


@torch.no_grad()
def test_undone_it_is_the_model_it_was() -> None:
    model = make("Bert", "ForTokenClassification")
    inputs = batch("right")
    expected = model(**inputs).logits
    hooks = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]
    done = unpad(model)
    assert done.encoders == ("bert",)
    assert unpad(model) == done  # nothing happens twice
    tokens = int(inputs["attention_mask"].sum())
    counts = CountRows(model.bert)
    model(**inputs)
    assert set(counts.rows) == {tokens}
    done.undo()
    counts.rows.clear()
    assert torch.equal(model(**inputs).logits, expected)
    assert set(counts.rows) == {BATCH * SEQLEN}
    assert model.config._attn_implementation == "eager"
    for part in model.modules():
        part._forward_pre_hooks.clear() if isinstance(part, (nn.Linear, nn.LayerNorm)) else None
    after = [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()]
    assert after == hooks
    repad(model)  # without it, nothing


@torch.no_grad()
def test_copies_and_pickles_are_unpadded_on_their_own() -> None:
    model = make("Roberta")
    unpad(model)
    inputs = batch("right")
    expected = model(**inputs).last_hidden_state
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(other(**inputs).last_hidden_state, expected)
        assert calls_of(other) == {PACKED: 2}
        repad(other)
        assert other.config._attn_implementation == "eager"
    model(**inputs)
    assert calls_of(model) == {PACKED: 2}


@torch.no_grad()
def test_an_error_within_a_call_leaves_nothing_behind() -> None:
    model = make("Bert")
    unpad(model)
    inputs = batch("right")
    expected = model(**inputs).last_hidden_state
    with pytest.raises(IndexError):
        model(inputs["input_ids"] + VOCAB, inputs["attention_mask"])
    assert torch.equal(model(**inputs).last_hidden_state, expected)


@torch.no_grad()
def test_kernels_in_the_interpreter() -> None:
    models = three_of(make("Bert", num_hidden_layers=1))
    inputs = batch("holes")
    real = inputs["attention_mask"].bool()
    with fastattn_hf.use_impl("triton"):
        ours = models[0](**inputs).last_hidden_state[real]
    assert_parity(ours, *(model(**inputs).last_hidden_state[real] for model in models[1:]))
    layer = fastattn_hf.report(models[0]).layers[0]
    assert layer.calls == {"triton": 1}


@torch.no_grad()
def test_a_compiled_model_runs_padded() -> None:
    models = three_of(make("Bert", num_hidden_layers=1))
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    compiled = torch.compile(models[0], backend="eager")
    outs = [model(**inputs).last_hidden_state[real] for model in (compiled, *models[1:])]
    assert_parity(*outs)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: nn.Linear(2, 2), "Linear has none"),
        (lambda: make("Bert", is_decoder=True), "is_decoder"),
        (
            lambda: transformers.T5EncoderModel(
                transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1)
            ),
            "T5EncoderModel has none",
        ),
    ],
)
def test_other_models_are_refused(other: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named) as raised:
        unpad(other())
    assert all(name in str(raised.value) for name in ENCODERS)


def test_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="str"):
        unpad("bert")  # type: ignore[arg-type]
