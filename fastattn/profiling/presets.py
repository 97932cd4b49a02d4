"""Shapes of well-known models, by name: what `config.json` of each says, and no weights."""

from __future__ import annotations

import difflib
from typing import Any

_BERT = {"model_type": "bert", "architectures": ["BertModel"]}
_LLAMA3 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
_QWEN2 = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
_GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257,
    "n_positions": 1024,
}  # fmt: skip
_T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128,
    "d_kv": 64, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_BART = {
    "model_type": "bart", "architectures": ["BartForConditionalGeneration"],
    "max_position_embeddings": 1024, "decoder_start_token_id": 2, "pad_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


def _llama(base: dict[str, Any], *sizes: int, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads")  # fmt: skip
    return {**base, **dict(zip(names, sizes, strict=True)), **others}


def _bert(*sizes: int, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {**_BERT, "vocab_size": 30522, **dict(zip(names, sizes, strict=True)), **others}


def _gpt2(*sizes: int) -> dict[str, Any]:
    return {**_GPT2, **dict(zip(("n_embd", "n_layer", "n_head"), sizes, strict=True))}


def _t5(*sizes: int, **others: Any) -> dict[str, Any]:
    names = ("d_model", "d_ff", "num_layers", "num_heads")
    return {**_T5, **dict(zip(names, sizes, strict=True)), **others}


def _bart(dim: int, layers: int, heads: int, vocab_size: int) -> dict[str, Any]:
    stacks = ("encoder", "decoder")
    return {
        **_BART, "d_model": dim, "vocab_size": vocab_size,
        **{f"{stack}_layers": layers for stack in stacks},
        **{f"{stack}_attention_heads": heads for stack in stacks},
        **{f"{stack}_ffn_dim": 4 * dim for stack in stacks},
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _llama(_LLAMA3, 4096, 14336, 32, 32, 8, max_position_embeddings=8192),
    "llama-3.1-8b": _llama(_LLAMA3, 4096, 14336, 32, 32, 8),
    "llama-3.2-1b": _llama(_LLAMA3, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(_LLAMA3, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "smollm2-135m": _llama(
        _LLAMA3, 576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "qwen2-0.5b": _llama(_QWEN2, 896, 4864, 24, 14, 2),
    "qwen2-1.5b": _llama(_QWEN2, 1536, 8960, 28, 12, 2),
    "qwen3-0.6b": _llama(
        _QWEN2, 1024, 3072, 28, 16, 8, model_type="qwen3", architectures=["Qwen3ForCausalLM"],
        head_dim=128, max_position_embeddings=40960,
    ),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bert-base": _bert(768, 3072, 12, 12),
    "bert-large": _bert(1024, 4096, 24, 16),
    "minilm-l6": _bert(384, 1536, 6, 12),
    "roberta-base": _bert(
        768, 3072, 12, 12, model_type="roberta", architectures=["RobertaModel"], vocab_size=50265,
        max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5,
    ),
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "flan-t5-base": _t5(
        768, 2048, 12, 12, feed_forward_proj="gated-gelu", tie_word_embeddings=False
    ),
    "bart-base": _bart(768, 6, 12, 50265),
    "bart-large": _bart(1024, 12, 16, 50265),
}  # fmt: skip
"""By name, as a `config.json` of Hugging Face."""


def find_preset(name: str) -> dict[str, Any]:
    """The shapes of a name.

    Raises:
        ValueError: there is no such name; lists the nearest, and all.
    """
    if name not in PRESETS:
        raise ValueError(
            f"random must be the name of known shapes, got {name!r}{nearest(name)}; there are "
            f"{', '.join(PRESETS)}"
        )
    return PRESETS[name]


def nearest(name: str) -> str:
    """ " (nearest: ...)" of the presets, or nothing."""
    found = difflib.get_close_matches(name.lower(), PRESETS, n=3, cutoff=0.4)
    return f" (nearest: {', '.join(found)})" if found else ""
