"""GGUF files of LLaMA, Qwen2 and Qwen3, as a Hugging Face checkpoint: names, config, weights.

Quantized weights are dequantized by the package gguf, one at a time, when they are read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models.checkpoint import CheckpointError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Of a block: after "blk.N." there, after "model.layers.N." here."""


class GGUFSource:
    """Weights of a GGUF file, which is mapped and not read as a whole.

    Attributes:
        place: the file.
        config: what its `config.json` would be.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package gguf is not installed.
        CheckpointError: the file holds another architecture, or options that are not known.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        import gguf

        reader = gguf.GGUFReader(path)
        self.place = str(path)
        # The vocabulary's strings are slow to read, and of no use here.
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if gguf.GGUFValueType.ARRAY not in field.types
        }
        kind = fields.get("general.architecture")
        if kind not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: general.architecture must be one of {list(ARCHITECTURES)}, got {kind!r}"
            )
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if "rope_freqs.weight" in tensors:
            raise CheckpointError(
                f"{path}: rotary frequencies given as a tensor (rope_freqs.weight) are not known "
                "here: load the Hugging Face folder it was made of"
            )
        # A name that is not known is kept, and so found to be unexpected.
        self._tensors = {_translate(name): tensor for name, tensor in tensors.items()}
        if "token_embd.weight" not in tensors:
            raise CheckpointError(f"{path} has no token_embd.weight")
        self.config = {
            **_read_config(path, kind, fields),
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in tensors,
        }
        # GGUF's LLaMA rotates pairs (2 d, 2 d + 1), for which rows of q and k were reordered.
        heads = (self.config["num_attention_heads"], self.config["num_key_value_heads"])
        self._interleaved = dict(zip(("q_proj", "k_proj"), heads)) if kind == "llama" else {}  # noqa: B905

    def shapes(self) -> dict[str, tuple[int, ...]]:
        # GGUF counts dimensions from the innermost one.
        return {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        import gguf

        tensor = self._tensors[name]
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        # What was not quantized is the file itself, which is not to be written to.
        values = torch.from_numpy(array if array.flags.writeable else array.copy())
        heads = self._interleaved.get(name.split(".")[-2])
        if heads is None:
            return values
        # Back to pairs (d, d + D / 2): rows (heads, D / 2, 2) become (heads, 2, D / 2).
        return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _translate(name: str) -> str:
    """Hugging Face's name for a tensor; the same one where there is none."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    block, kind, suffix = found.groups()
    if block is None:
        return f"{NAMES[kind]}.{suffix}" if kind in NAMES else name
    return f"model.layers.{block}.{BLOCK_NAMES[kind]}.{suffix}" if kind in BLOCK_NAMES else name


def _read_config(path: Path, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    def get(name: str, default: Any = None) -> Any:
        value = fields.get(f"{kind}.{name}", default)
        if value is None:
            raise CheckpointError(f"{path} has no {kind}.{name}")
        return value

    heads, hidden = get("attention.head_count"), get("embedding_length")
    rope = {
        "rope_type": get("rope.scaling.type", "default"),
        "rope_theta": get("rope.freq_base", 1e4),
    }
    if rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    if rope["rope_type"] != "default":
        rope["factor"] = get("rope.scaling.factor")
        trained = fields.get(f"{kind}.rope.scaling.original_context_length")
        if trained is not None:
            rope["original_max_position_embeddings"] = trained
    config = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = fields.get(f"tokenizer.ggml.{theirs}_token_id")
    return config
