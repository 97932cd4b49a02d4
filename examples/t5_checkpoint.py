"""The trained T5 as a checkpoint: one that `fastattn.models` loads, and transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from gettext_pairs import END, PAD
from t5_small import DecoderLayer, EncoderLayer, T5Small
from tokenizers import Tokenizer
from torch import Tensor

from fastattn.models import checkpoint
from fastattn.models.seq2seq import FAMILIES, Seq2Seq


def to_seq2seq(model: T5Small) -> Seq2Seq:
    """The same model as a `fastattn.models.seq2seq.Seq2Seq`, with weights of its own."""
    config = model.config
    hf = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_model // config.num_heads,
        "d_ff": config.d_ff,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "decoder_start_token_id": PAD,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }
    # It scales what it embeds by sqrt(d_model), and T5 its logits by the inverse: with embeddings
    # that are scaled already both are the same.
    weights = {"embedding.weight": model.embedding.weight * config.d_model**0.5}
    for stack, layers, table, norm in (
        ("encoder", model.encoder, model.encoder_table, model.encoder_norm),
        ("decoder", model.decoder, model.decoder_table, model.decoder_norm),
    ):
        weights[f"{stack}.relative_bias.weight"] = table
        weights[f"{stack}.norm.weight"] = norm.weight
        for index, layer in enumerate(layers):
            own = _of_layer(layer)
            weights |= {f"{stack}.layers.{index}.{name}": values for name, values in own.items()}
    result = Seq2Seq(FAMILIES["t5"].config(hf))
    result.load_state_dict({name: values.detach() for name, values in weights.items()})
    return result.to(model.embedding.weight.device).train(model.training)


def _of_layer(layer: EncoderLayer) -> dict[str, Tensor]:
    attention = layer.attention
    weights: dict[str, Tensor] = {
        "attention.qvk.weight": torch.cat(
            [part.weight for part in (attention.query, attention.value, attention.key)]
        ),
        "attention.out.weight": attention.out.weight,
        "attention_norm.weight": layer.attention_norm.weight,
        "mlp.up.weight": layer.feed_forward.wide.weight,
        "mlp.down.weight": layer.feed_forward.out.weight,
        "mlp_norm.weight": layer.feed_forward_norm.weight,
    }
    if isinstance(layer, DecoderLayer):
        cross = layer.cross
        weights |= {
            "cross.q.weight": cross.query.weight,
            "cross.vk.weight": torch.cat([cross.value.weight, cross.key.weight]),
            "cross.out.weight": cross.out.weight,
            "cross_norm.weight": layer.cross_norm.weight,
        }
    return weights


def save(model: T5Small, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes config.json, model.safetensors and tokenizer.json to a folder."""
    checkpoint.save(to_seq2seq(model), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
