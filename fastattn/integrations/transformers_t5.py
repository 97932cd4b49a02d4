"""T5's position bias as its table: the tensor (1, heads, queries, keys) is not built.

T5 and its kin call transformers' attention interface with a dense `position_bias`. The first layer
of a stack computes it with `compute_bias` and passes it on; cross-attention, which has none, gets a
tensor of zeros. With the adapter below `compute_bias` gives a `LazyBias` and cross-attention gets
None. Without it (the first forward pass of a model that `enable` has not seen) the results are the
same, from the dense tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.biases import Bias, DenseBias, T5Bias
from fastattn.integrations.transformers_call import wants_dense
from fastattn.integrations.transformers_lazy import LazyTensor
from fastattn.integrations.transformers_report import NAME


class LazyBias(LazyTensor):
    """A position bias that poses as the tensor (1, num_heads, queries, keys).

    Attributes:
        structure: the table behind it, aligned at the last query and the last key.
    """

    structure: T5Bias
    _dense: Callable[[], Tensor]

    def __new__(
        cls, structure: T5Bias, seqlen_q: int, seqlen_k: int, dense: Callable[[], Tensor]
    ) -> LazyBias:
        """A bias from a T5 table; `dense()` builds the tensor that the model would have."""
        table = structure.table
        shape = (1, table.shape[1], seqlen_q, seqlen_k)
        bias = cls.posing_as(shape, table.dtype, table.device)
        assert isinstance(bias, LazyBias)
        bias.structure, bias._dense = structure, dense
        return bias

    def build(self) -> Tensor:
        """The tensor as the model itself builds it, for all layers that share it."""
        return self._dense()


def as_bias(position_bias: Tensor, q: Tensor, k: Tensor) -> Bias:
    """What to attend with: the table, or the tensor where that is faster or needed.

    Args:
        position_bias: (1 or batch, num_heads, seqlen_q, seqlen_k), a `LazyBias` or any tensor.
        q, k: (batch, seqlen, num_heads, head_dim).
    """
    if not isinstance(position_bias, LazyBias):
        return DenseBias(position_bias)
    fits = tuple(position_bias.shape[1:]) == (q.shape[2], q.shape[1], k.shape[1])
    if position_bias.touched or not fits or wants_dense(q.device):
        return DenseBias(position_bias.built())
    return position_bias.structure


class TableBias(nn.Module):
    """Mixed into an attention class of the T5 family: its bias is given as a table.

    Takes effect while the layer's attn_implementation is "fastattn", outside of compiled graphs,
    whose tensors are plain.
    """

    config: Any
    is_decoder: bool
    is_causal: bool
    has_relative_attention_bias: bool
    relative_attention_bias: nn.Embedding
    relative_attention_max_distance: int

    @property
    def without_bias(self) -> bool:
        """Whether it is the cross-attention of a decoder, which is given zeros for a bias."""
        bare = self.is_decoder and not self.is_causal and not self.has_relative_attention_bias
        return bare and self.config._attn_implementation == NAME

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As before; cross-attention asks `compute_bias` instead of making zeros."""
        if not self.without_bias:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        self.has_relative_attention_bias = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.has_relative_attention_bias = False

    def compute_bias(
        self,
        query_length: int,
        key_length: int,
        device: torch.device | None = None,
        past_seen_tokens: int | Tensor = 0,
    ) -> Tensor | None:
        """The bias of this layer, (1, num_heads, query_length, key_length); None for no bias."""
        if "relative_attention_bias" not in self._modules:
            return None

        def dense() -> Tensor:
            return super(TableBias, self).compute_bias(  # type: ignore[misc]
                query_length, key_length, device=device, past_seen_tokens=past_seen_tokens
            )

        # A static cache has keys past the last query, and its length is a tensor.
        aligned = (
            isinstance(past_seen_tokens, int) and past_seen_tokens + query_length == key_length
        )
        # Checkpointing may detach what passes from layer to layer, and a value has no gradient.
        checkpointed = self.training and getattr(self, "gradient_checkpointing", False)
        served = self.config._attn_implementation == NAME
        if torch.compiler.is_compiling() or checkpointed or not aligned or not served:
            return dense()
        table = self.relative_attention_bias.weight
        try:
            structure = T5Bias(table, not self.is_decoder, self.relative_attention_max_distance)
        except ValueError:  # buckets that are not T5's
            return dense()
        return LazyBias(structure, query_length, key_length, dense)
