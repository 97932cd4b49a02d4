"""Layers of encoder-decoders, and the stack of them between embeddings and head.

In training and in the encoder tensors are packed, (tokens, dim), with a `Packed` mask; in decoding
they are (rows, n, dim), with a cache. Only attention can tell the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastattn.biases import T5Bias
from fastattn.models.layers import Linear, RMSNorm, find_activation, linear
from fastattn.models.seq2seq_config import Seq2SeqConfig, StackConfig
from fastattn.nn import RelativeBias
from fastattn.nn.attending import Attending


class PartlyBiasedLinear(Linear):
    """A linear layer whose last outputs have no bias: Whisper's keys have none.

    Args:
        dim, out: features of input and output.
        biased: outputs that have a bias, the first ones; `bias` is (biased,).
    """

    def __init__(self, dim: int, out: int, biased: int) -> None:
        super().__init__(dim, out, bias=False)
        self.bias = nn.Parameter(torch.zeros(biased))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out)."""
        bias = functional.pad(self.bias, (0, self.out_features - self.bias.numel()))
        return linear(x, self.weight, bias)


def _linear(config: Seq2SeqConfig, dim: int, out: int, keys: int = 0) -> Linear:
    """A linear layer, the last `keys` of whose outputs are keys."""
    if config.bias and keys and not config.key_bias:
        return PartlyBiasedLinear(dim, out, out - keys)
    return Linear(dim, out, bias=config.bias)


def _norm(config: Seq2SeqConfig) -> nn.Module:
    if config.rms_norm:
        return RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps)


class _Attention(Attending):
    """What self- and cross-attention share."""

    def __init__(self, config: Seq2SeqConfig, sizes: StackConfig) -> None:
        super().__init__()
        self.heads = (sizes.num_heads, sizes.head_dim)
        self.softmax_scale, self.dropout = config.softmax_scale, config.attention_dropout
        self.out = _linear(config, sizes.num_heads * sizes.head_dim, config.dim)

    def _split(self, projected: Tensor, count: int) -> tuple[Tensor, ...]:
        """(..., count * num_heads * head_dim) -> `count` of (..., num_heads, head_dim)."""
        return projected.unflatten(-1, (count, *self.heads)).unbind(-3)

    def _attended(self, **options: Any) -> Tensor:
        """(..., num_heads, head_dim), by `Attending._attend`."""
        if self.training and self.dropout and "cache" not in options:
            options["dropout_p"] = self.dropout
        return self._attend(softmax_scale=self.softmax_scale, **options)


class SelfAttention(_Attention):
    """Attention of tokens to themselves."""

    def __init__(self, config: Seq2SeqConfig, sizes: StackConfig) -> None:
        super().__init__(config, sizes)
        inner = sizes.num_heads * sizes.head_dim
        self.qvk = _linear(config, config.dim, 3 * inner, keys=inner)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """x (tokens, dim) with a `Packed` mask, or (rows, n, dim) with a cache; the same shape."""
        q, v, k = self._split(self.qvk(x), 3)
        return self.out(self._attended(q=q, k=k, v=v, **options).flatten(-2))


class CrossAttention(_Attention):
    """Attention of the decoder's tokens to the encoder's."""

    def __init__(self, config: Seq2SeqConfig, sizes: StackConfig) -> None:
        super().__init__(config, sizes)
        inner = sizes.num_heads * sizes.head_dim
        self.q = _linear(config, config.dim, inner)
        self.vk = _linear(config, config.dim, 2 * inner, keys=inner)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of the encoder's states (tokens, dim), each (tokens, num_heads, head_dim)."""
        v, k = self._split(self.vk(states), 2)
        return k, v

    def forward(self, x: Tensor, states: Tensor | None = None, **options: Any) -> Tensor:
        """x (tokens, dim) and `states`, or x (rows, n, dim) and a cache of them; like x."""
        q = self.q(x).unflatten(-1, self.heads)
        if states is not None:
            k, v = self.keys_and_values(states)
            out = self._attended(q=q, k=k, v=v, **options)
        else:
            # Rows that decode one input are queries of one row of the cache: keys are read once.
            together = q.reshape(options["cache"].max_batch, -1, *self.heads)
            out = self._attended(q=together, k=None, v=None, **options).reshape(q.shape)
        return self.out(out.flatten(-2))


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)); the gate's rows come first."""

    def __init__(self, config: Seq2SeqConfig, sizes: StackConfig) -> None:
        super().__init__()
        self.gated = config.gated
        self.up = _linear(config, config.dim, sizes.hidden * (2 if config.gated else 1))
        self.down = _linear(config, sizes.hidden, config.dim)
        self.activation = find_activation(config.activation)
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        if self.gated:
            gate, up = self.up(x).chunk(2, -1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(self.up(x))
        return self.down(self.dropout(inner))


class Layer(nn.Module):
    """Self-attention, in a decoder cross-attention, and an MLP, each with residual and norm."""

    def __init__(self, config: Seq2SeqConfig, sizes: StackConfig, decodes: bool) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention, self.attention_norm = SelfAttention(config, sizes), _norm(config)
        if decodes:
            self.cross, self.cross_norm = CrossAttention(config, sizes), _norm(config)
        self.mlp, self.mlp_norm = FeedForward(config, sizes), _norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, attention: dict[str, Any], cross: dict[str, Any] | None = None
    ) -> Tensor:
        """x (tokens, dim) or (rows, n, dim); the others are options of the attentions."""
        x = self._residual(x, self.attention_norm, self.attention, attention)
        if cross is not None:
            x = self._residual(x, self.cross_norm, self.cross, cross)
        return self._residual(x, self.mlp_norm, self.mlp, {})

    def _residual(
        self, x: Tensor, norm: nn.Module, sublayer: nn.Module, options: dict[str, Any]
    ) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(sublayer(norm(x), **options))
        else:
            x = norm(x + self.dropout(sublayer(x, **options)))
        if x.dtype == torch.float16:  # beyond which the residual stream of large T5s grows
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class Stack(nn.Module):
    """The encoder or the decoder, between embeddings and the head."""

    def __init__(self, config: Seq2SeqConfig, sizes: StackConfig, decodes: bool) -> None:
        super().__init__()
        self.offset, self.embedding_scale = config.position_offset, config.embedding_scale
        self.positions = self.embedding_norm = self.relative_bias = self.norm = None
        if sizes.max_positions is not None:
            self.positions = nn.Embedding(sizes.max_positions + self.offset, config.dim)
        if config.embedding_norm:
            self.embedding_norm = _norm(config)
        if config.num_buckets:
            self.relative_bias = RelativeBias(
                sizes.num_heads, num_buckets=config.num_buckets, bidirectional=not decodes,
                max_distance=config.max_distance,
            )  # fmt: skip
        made = (Layer(config, sizes, decodes) for _ in range(sizes.num_layers))
        # To type checkers a ModuleList is one of modules of any kind.
        self.layers: Sequence[Layer] = nn.ModuleList(made)  # type: ignore[assignment]
        if config.norm_first:
            self.norm = _norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.output_dropout = nn.Dropout(config.dropout if config.output_dropout else 0.0)

    def bias(self) -> T5Bias | None:
        """The relative position bias of all layers."""
        return None if self.relative_bias is None else self.relative_bias()

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None,
        options: Callable[[int], tuple[dict[str, Any], dict[str, Any] | None]],
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Embeddings of tokens in, their states out.

        Args:
            x: (tokens, dim) or (rows, n, dim).
            positions: int64 (tokens,) or (rows, n), the place of each token in its sequence; None
                will do where positions are relative.
            options: of self- and cross-attention of a layer.
            seen: collects the embeddings and every layer's output, the last one with the norm.
        """
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if self.positions is not None and positions is not None:
            x = x + self.positions(positions + self.offset)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        for index, layer in enumerate(self.layers):
            if seen is not None:
                seen.append(x)
            x = layer(x, *options(index))
        if self.norm is not None:
            x = self.output_dropout(self.norm(x))
        if seen is not None:
            seen.append(x)
        return x


class SoundInput(nn.Module):
    """Whisper's embeddings: two convolutions over time, of which the second halves it."""

    def __init__(self, num_mel_bins: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(num_mel_bins, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, kernel_size=3, stride=2, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, num_mel_bins, frames) -> (batch, ceil(frames / 2), dim)."""
        x = functional.gelu(self.conv1(features))
        return functional.gelu(self.conv2(x)).transpose(1, 2)
