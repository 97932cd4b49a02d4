"""Encoder-decoders of transformers: small, random, of odd sizes, every option somewhere.

`FAMILIES` has at least five configurations of each family. `make` builds one with weights that
tell, `build` our model without a checkpoint, and `padded_batch` what they are called with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastattn.models.seq2seq import FAMILIES as OURS
from fastattn.models.seq2seq import Seq2Seq

VOCAB = 53
LENGTHS, DECODER_LENGTHS = (13, 5, 9), (7, 2, 5)
NUM_MEL_BINS, SOURCE_POSITIONS = 6, 11

_TOKENS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}

# Unlike BART's and Whisper's, T5's d_kv * num_heads is not d_model.
_T5: dict[str, dict[str, Any]] = {
    "a": {"d_model": 21, "d_kv": 5, "num_heads": 3, "d_ff": 17, "num_layers": 2},
    "b": {"d_model": 16, "d_kv": 9, "num_heads": 2, "d_ff": 33, "num_layers": 1,
          "num_decoder_layers": 3, "relative_attention_num_buckets": 7,
          "relative_attention_max_distance": 11},
    "c": {"d_model": 35, "d_kv": 7, "num_heads": 5, "d_ff": 11, "num_layers": 3,
          "num_decoder_layers": 1, "layer_norm_epsilon": 1e-3},
    "d": {"d_model": 9, "d_kv": 1, "num_heads": 1, "d_ff": 5, "num_layers": 1,
          "relative_attention_num_buckets": 4, "relative_attention_max_distance": 3},
    "e": {"d_model": 24, "d_kv": 3, "num_heads": 8, "d_ff": 24, "num_layers": 2,
          "num_decoder_layers": 2, "relative_attention_num_buckets": 13},
}  # fmt: skip
_BART: dict[str, dict[str, Any]] = {
    "a": {"d_model": 21, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
          "decoder_attention_heads": 3, "encoder_ffn_dim": 17, "decoder_ffn_dim": 17},
    "b": {"d_model": 30, "encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 5,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 9, "decoder_ffn_dim": 31},
    "c": {"d_model": 14, "encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 1,
          "decoder_attention_heads": 7, "encoder_ffn_dim": 33, "decoder_ffn_dim": 5},
    "d": {"d_model": 6, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
          "decoder_attention_heads": 1, "encoder_ffn_dim": 3, "decoder_ffn_dim": 4},
    "e": {"d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 8,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 25},
}  # fmt: skip


Cases = dict[str, tuple[str, dict[str, Any]]]


def _sized(architecture: str, sizes: dict[str, Any], *options: dict[str, Any]) -> Cases:
    """Five configurations: a family's sizes, each with options of its own."""
    return {
        name: (architecture, {**size, **option})
        for (name, size), option in zip(sizes.items(), options, strict=True)
    }


FAMILIES: dict[str, Cases] = {
    "t5": {
        **_sized(
            "T5ForConditionalGeneration", _T5, {}, {}, {"feed_forward_proj": "silu"},
            {"feed_forward_proj": "gelu_new"}, {"eos_token_id": [1, 4]},
        ),
        "bare": ("T5Model", {**_T5["b"], "dropout_rate": 0.0}),
    },
    "t5-1.1": _sized(
        "T5ForConditionalGeneration", _T5,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
        {"feed_forward_proj": "gated-relu", "tie_word_embeddings": True},
        {"feed_forward_proj": "relu", "tie_word_embeddings": False},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True},
    ),
    "mt5": {
        **_sized(
            "MT5ForConditionalGeneration", _T5, {}, {"feed_forward_proj": "relu"}, {},
            {"feed_forward_proj": "gated-silu"}, {"tie_word_embeddings": False},
        ),
        "bare": ("MT5Model", _T5["e"]),
    },
    "bart": {
        **_sized(
            "BartForConditionalGeneration", _BART, {}, {"scale_embedding": True},
            {"activation_function": "relu", "tie_word_embeddings": False},
            {"activation_function": "gelu_new", "tie_word_embeddings": False,
             "scale_embedding": True},
            {"activation_function": "silu", "dropout": 0.3},
        ),
        "bare": ("BartModel", _BART["b"]),
    },
    "whisper": {
        **_sized(
            "WhisperForConditionalGeneration", _BART, {"d_model": 18}, {"scale_embedding": True},
            {"activation_function": "relu"}, {"tie_word_embeddings": False},
            {"max_target_positions": 31},
        ),
        "bare": ("WhisperModel", _BART["c"]),
    },
}  # fmt: skip

CASES = [(family, name) for family, cases in FAMILIES.items() for name in cases]


ONE_OF_EACH = [("t5", "b"), ("t5-1.1", "a"), ("mt5", "e"), ("bart", "b"), ("whisper", "b")]
"""A case of each family."""


def of_each(function: Any) -> Any:
    """A test for one case of each family."""
    return pytest.mark.parametrize(
        ("family", "name"), ONE_OF_EACH, ids=[family for family, _ in ONE_OF_EACH]
    )(function)


def make(family: str, name: str, **changes: Any) -> Any:
    """A model of transformers, in float32, in evaluation."""
    architecture, options = FAMILIES[family][name]
    kind = getattr(transformers, architecture)
    options = {"vocab_size": VOCAB, **_TOKENS, **options, **changes}
    # As T5 starts: linear layers keep the size of what they are given, and scores are not all even.
    init = {"init_std": options["d_model"] ** -0.5}
    if family == "bart":
        options = {**init, "max_position_embeddings": 40, **options}
    if family == "whisper":
        sound = {"num_mel_bins": NUM_MEL_BINS, "max_source_positions": SOURCE_POSITIONS}
        options = {**init, **sound, "max_target_positions": 40, **options}
        options = {"suppress_tokens": None, "begin_suppress_tokens": None, **options}
    model = kind(kind.config_class(**options)).eval()
    if "t5" in family:
        untie_head(model, options)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros
                parameter.add_(0.2 * torch.randn(parameter.shape))
            if "relative_attention_bias" in parameter_name:
                parameter.mul_(5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model


def untie_head(model: Any, options: dict[str, Any]) -> None:
    """Gives a T5 that says so a head of its own: transformers 5 ties it at first in any case."""
    if options.get("tie_word_embeddings") is False:
        head = torch.randn(model.lm_head.weight.shape) * model.config.d_model**-0.5
        model.lm_head.weight = torch.nn.Parameter(head)


def padded_batch(family: str) -> dict[str, Tensor]:
    """Inputs of `make`'s models, padded on the right, as transformers names them."""
    decoder = _tokens(DECODER_LENGTHS)
    inputs = {f"decoder_{name}": tensor for name, tensor in decoder.items()}
    if family == "whisper":
        features = torch.randn(len(DECODER_LENGTHS), NUM_MEL_BINS, 2 * SOURCE_POSITIONS)
        return {**inputs, "input_features": features}
    return {**inputs, **_tokens(LENGTHS)}


def _tokens(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    visible = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, VOCAB, visible.shape) * visible
    return {"input_ids": ids, "attention_mask": visible.long()}


def build(family: str, **changes: Any) -> Seq2Seq:
    """Our model with random weights, without a checkpoint."""
    theirs = make(family, "b", **changes)
    hf = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}
    kind = OURS[hf["model_type"]]
    model = Seq2Seq(kind.config(hf)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def call_ours(model: Seq2Seq, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Our model on transformers' inputs."""
    masks = [inputs.get(name) for name in ("attention_mask", "decoder_attention_mask")]
    lengths = [None if mask is None else mask.sum(1) for mask in masks]
    first = inputs.get("input_ids")
    if first is None:
        first = inputs["input_features"].to(model.embedding.weight.dtype)
    return model(first, inputs["decoder_input_ids"], *lengths, **options)
