"""Encoders in checkpoints: older names, prefixes, models made here, configs that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastattn.models import checkpoint
from fastattn.models.checkpoint import CheckpointError, load, save
from fastattn.models.encoder import FAMILIES, build
from fastattn.models.encoder_config import read_config, write_config
from fastattn.models.layers import initialize
from fastattn.testing import assert_parity
from tests.models.encoder_cases import (
    SMALL,
    first_options,
    make_batch,
    make_model,
    ours,
    theirs,
    theirs_exact,
)

transformers.utils.logging.disable_progress_bar()

MODEL_TYPES = list(FAMILIES)


def test_names_of_older_checkpoints(tmp_path):
    """gamma and beta, buffers, the tied decoder saved again, heads that are not there."""
    model = make_model("bert", "BertForMaskedLM", **first_options("bert"))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    expected = load(tmp_path)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for name, value in weights.items()
    }
    assert renamed.keys() != weights.keys()
    extra = {
        "bert.embeddings.position_ids": torch.arange(9)[None],
        "bert.pooler.dense.weight": torch.ones(3, 3),
        "bert.pooler.dense.bias": torch.ones(3),
        "cls.seq_relationship.weight": torch.ones(2, 3),
        "cls.seq_relationship.bias": torch.ones(2),
        "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": weights["cls.predictions.bias"].clone(),
    }
    without = {name: value for name, value in renamed.items() if name != "cls.predictions.bias"}
    del extra["cls.predictions.decoder.weight"]
    for tensors in ({**renamed, **extra}, {**without, **extra}):
        save_file(tensors, tmp_path / "model.safetensors")
        found = load(tmp_path).state_dict()
        for name, value in expected.state_dict().items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("strip", [True, False])
def test_base_prefix_present_or_not(model_type, strip, tmp_path):
    family = FAMILIES[model_type]
    model = make_model(model_type, family.bare, **first_options(model_type))
    model.save_pretrained(tmp_path)
    expected = load(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith(family.prefix) for name in weights)
    prefix = "" if strip else family.prefix
    save_file(
        {prefix + name: value for name, value in weights.items()}, tmp_path / "model.safetensors"
    )
    inputs = make_batch(model.config, "right")
    assert torch.equal(load(tmp_path)(**inputs).packed, expected(**inputs).packed)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_models_made_here_load_there(model_type, tmp_path):
    family = FAMILIES[model_type]
    architecture = next(
        one for one in family.architectures if one.endswith("ForSequenceClassification")
    )
    hf = {"model_type": model_type, **first_options(model_type), "architectures": [architecture]}
    config = replace(read_config(hf), num_labels=4)
    mine = initialize(build(config, architecture), std=0.2).eval()
    save(mine, tmp_path)
    model = getattr(transformers, architecture).from_pretrained(tmp_path).eval()
    assert model.config.num_labels == 4
    inputs = make_batch(model.config, "right")
    with torch.no_grad():
        baseline, exact = theirs(model, inputs), theirs_exact(model, inputs)
        for name, value in ours(mine, inputs).items():
            assert_parity(value, baseline[name], exact[name], name=name)
    assert load(tmp_path).config == mine.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "is_decoder must be False"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"hidden_act": "laplace"}, "activation must be one of"),
        ({"hidden_size": 20, "num_attention_heads": 3}, "hidden_size must be a multiple"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout must be .* in \[0, 1\), got 1.5"),
        ({"pad_token_id": 99}, r"pad_token must lie in 0..36, the vocabulary, or be None, got 99"),
        ({"architectures": ["BertLMHeadModel"]}, "architecture of a bert model must be one of"),
        (
            {"architectures": ["BertForQuestionAnswering"], "num_labels": 3},
            "num_labels must be 2 to answer questions, start and end, got 3",
        ),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(changes, message):
    hf = {**write_config(SMALL), "architectures": ["BertModel"], **changes}
    with pytest.raises(CheckpointError, match=message):
        build(read_config(hf), hf["architectures"][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_types": 0, "model_type": "distilbert"}, "pooler must be False in a distilbert"),
        ({"sequence_head": "tanh"}, "sequence_head must be 'pooler' in a bert model, got 'tanh'"),
        ({"pre_norm": True}, "pre_norm must be False in a bert model, got True"),
        ({"embedding_size": 5}, "embedding_size must be None in a bert model, got 5"),
        ({"sequence_dropout": 0.2, "token_dropout": 0.3}, "token_dropout must be 0.2"),
    ],
)
def test_configs_that_a_family_cannot_say(changes, message):
    with pytest.raises(CheckpointError, match=message):
        write_config(replace(SMALL, **changes))


def test_roberta_needs_a_padding_token():
    with pytest.raises(ValueError, match="pad_token must be given where counts_tokens is True"):
        replace(SMALL, counts_tokens=True, pad_token=None)
    with pytest.raises(ValueError, match="max_positions must leave a position after pad_token = 7"):
        replace(SMALL, counts_tokens=True, pad_token=7, max_positions=8)
    assert replace(SMALL, counts_tokens=True, pad_token=7, max_positions=10).max_seqlen == 2


def test_order_of_shared_layers():
    """Which group a block belongs to is rounded as transformers rounds it."""
    assert replace(SMALL, num_layers=4).layer_order == (0, 1, 2, 3)
    assert replace(SMALL, num_layers=4, num_groups=1).layer_order == (0,) * 4
    shared = replace(SMALL, num_layers=5, num_groups=2, group_size=2)
    assert shared.layer_order == (0, 1, 0, 1, 0, 1, 2, 3, 2, 3)
    order = replace(SMALL, num_layers=18, num_groups=14).layer_order
    assert order == tuple(int(block / (18 / 14)) for block in range(18))
    assert order[9] == 6  # and not 9 * 14 / 18 = 7


@pytest.fixture(autouse=True)
def _known_to_checkpoint(monkeypatch):
    for model_type in MODEL_TYPES:
        monkeypatch.setitem(checkpoint.FAMILY_MODULES, model_type, "encoder")
