"""A LLaMA decoder that attends through fastattn's key/value caches, with a model's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.nn import BaseKVCache
from fastattn.rotary import Rotary


class LlamaDecoder:
    """Runs a transformers `LlamaForCausalLM` through a KVCache or a PagedKVCache.

    Embedding, norms, projections and MLP are the model's modules. Its attention, rotary embedding
    and cache are not used: `cache.attention` does what they do.

    Args:
        model: the LlamaForCausalLM, in eval mode; its weights are shared, not copied.
        max_position: positions that the rotary tables cover.

    Raises:
        ValueError: the model is no LLaMA, or its rotary tables depend on the sequence's length.
    """

    def __init__(self, model: Any, max_position: int) -> None:
        config = model.config
        if config.model_type != "llama":
            raise ValueError(f"model must be a LLaMA, got model_type {config.model_type!r}")
        rope_type = config.rope_parameters["rope_type"]
        if rope_type not in ("default", "linear", "llama3"):
            raise ValueError(f"rope_type must be default, linear or llama3, got {rope_type!r}")
        self.model = model
        self.num_layers: int = config.num_hidden_layers
        self.num_heads_kv: int = config.num_key_value_heads
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        weight = model.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        # The model's own tables, whose two halves are the same. In float32, whatever its dtype.
        positions = torch.arange(max_position, device=self.device)[None]
        with torch.no_grad():
            cos, sin = model.model.rotary_emb(weight.new_empty(0, dtype=torch.float32), positions)
        half = cos.shape[-1] // 2
        self.rotary = Rotary(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        cache: BaseKVCache,
        counts: Sequence[int] | None = None,
        *,
        rows: Sequence[int] | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Appends tokens to the cache's rows and gives the logits of each row's last one.

        Args:
            ids: token ids (batch, seqlen); any id where a row is padded on its right.
            cache: of `num_layers` layers; its rows may have different lengths.
            counts: how many of a row's ids are real, at least 1; default all.
            rows: which rows of the cache the batch stands for; default all.
            impl: of `attention_with_kv_cache`.

        Returns:
            Logits (batch, vocabulary) in the dtype of the model.
        """
        batch, seqlen = ids.shape
        counts = [seqlen] * batch if counts is None else counts
        hidden = self.model.model.embed_tokens(ids)
        for index, block in enumerate(self.model.model.layers):
            normed, attn = block.input_layernorm(hidden), block.self_attn
            q, k, v = (
                project(normed).unflatten(-1, (-1, self.head_dim))
                for project in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            # Padding stands behind the real tokens, where causal attention does not look.
            out = cache.attention(
                index, q, k, v, rotary=self.rotary, causal=True, rows=rows, impl=impl
            )
            assert isinstance(out, Tensor)  # return_lse was not asked for
            if index == self.num_layers - 1:  # only the last real tokens matter from here on
                last = torch.tensor(counts, device=ids.device) - 1
                every = torch.arange(batch, device=ids.device)
                hidden, out = hidden[every, last], out[every, last]
            hidden = hidden + attn.o_proj(out.flatten(-2))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        cache.advance(counts, rows=rows)
        return self.model.lm_head(self.model.model.norm(hidden))
