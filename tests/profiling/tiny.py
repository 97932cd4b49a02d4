"""Shapes of every family that take no time, by name."""

from __future__ import annotations

from typing import Any

from fastattn.profiling.presets import PRESETS

_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 120, "max_position_embeddings": 64,
}  # fmt: skip
_STACK = ("layers", "attention_heads", "ffn_dim")

TINY: dict[str, dict[str, Any]] = {
    "llama": {**PRESETS["llama-3-8b"], **_LLAMA, "num_key_value_heads": 2},
    "tied": {**PRESETS["smollm2-135m"], **_LLAMA, "num_key_value_heads": 1},
    "window": {
        **PRESETS["qwen2-0.5b"], **_LLAMA, "num_key_value_heads": 2, "use_sliding_window": True,
        "sliding_window": 5, "max_window_layers": 1,
    },
    "gpt2": {**PRESETS["gpt2"], "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 120,
             "n_positions": 64},
    "bert": {**PRESETS["bert-base"], "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120,
             "max_position_embeddings": 64},
    "t5": {**PRESETS["t5-small"], "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2,
           "d_kv": 8, "vocab_size": 120},
    "gated t5": {**PRESETS["flan-t5-base"], "d_model": 32, "d_ff": 48, "num_layers": 2,
                 "num_heads": 2, "d_kv": 8, "vocab_size": 120},
    "bart": {**PRESETS["bart-base"], "d_model": 32, "vocab_size": 120,
             "max_position_embeddings": 64,
             **{f"{stack}_{name}": size for stack in ("encoder", "decoder")
                for name, size in zip(_STACK, (2, 4, 48), strict=True)}},
}  # fmt: skip
