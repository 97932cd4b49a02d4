"""Attention modules for models that are written anew: self-attention and cross-attention.

    rotary = fastattn.Rotary.make(64, max_position=4096)
    attention = SelfAttention(1024, 16, num_heads_kv=4, causal=True, rotary=rotary)
    out = attention(x)                                        # training, or a whole prompt
    out = attention(x, cache=cache, layer=3)                  # the same, token by token

Tensors are (batch, seqlen, features). Masks: True means attend.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.biases import Bias, T5Bias, as_bias
from fastattn.masks import Causal, Lengths, Mask, Window, as_mask
from fastattn.nn.arguments import check_positive
from fastattn.nn.attending import Attending, check_head_dim
from fastattn.nn.base_cache import BaseKVCache
from fastattn.rotary import Rotary, check_position_values, check_positions
from fastattn.validation import check_tensor, describe


@dataclass(frozen=True)
class ScoreOptions:
    """How scores are made from queries and keys, where it is not the usual way.

    Args:
        softmax_scale: factor on q @ k.T; default head_dim ** -0.5. (T5 uses 1.)
        softcap: if > 0, scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: learn one logit a head that joins the softmax's sum without a value (gpt-oss).
        qk_norm: RMS-normalize each head of q and k, with learned weights, before rotation (Qwen3).
        qk_norm_eps: its epsilon.
    """

    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    qk_norm: bool = False
    qk_norm_eps: float = 1e-6


class RelativeBias(nn.Module):
    """T5's relative position bias with its table, `weight` (num_buckets, num_heads).

    Layers that are given the same module share the table, and its gradient.

    Args:
        num_heads: of the layers that use it.
        num_buckets, bidirectional, max_distance: as for `fastattn.T5Bias`; a decoder's is not
            bidirectional.
        device, dtype: of the table; default torch's.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        bidirectional: bool = True,
        max_distance: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("num_heads", num_heads)
        check_positive("num_buckets", num_buckets)
        self.bidirectional, self.max_distance = bidirectional, max_distance
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self()  # whose checks raise here, not at the first call of a model

    def forward(self) -> T5Bias:
        """The bias as a value. No (num_heads, N, N) tensor is made of it where a kernel runs."""
        return T5Bias(self.weight, self.bidirectional, self.max_distance)

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        return (
            f"{heads}, num_buckets={buckets}, bidirectional={self.bidirectional}, "
            f"max_distance={self.max_distance}"
        )


class _Projected(Attending):
    """Projections, normalization and sinks, which self- and cross-attention have alike."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None,
        head_dim: int | None,
        memory_dim: int,
        biases: tuple[bool, bool],
        scores: ScoreOptions,
        dropout: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_positive("embed_dim", embed_dim)
        check_positive("num_heads", num_heads)
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        check_positive("num_heads_kv", num_heads_kv)
        if num_heads % num_heads_kv:
            raise ValueError(
                f"num_heads must be a multiple of num_heads_kv, got {num_heads} and {num_heads_kv}"
            )
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    "embed_dim must be a multiple of num_heads where head_dim is None, got "
                    f"{embed_dim} and {num_heads}"
                )
            head_dim = embed_dim // num_heads
        check_positive("head_dim", head_dim)
        check_head_dim(head_dim, f"embed_dim {embed_dim}, num_heads {num_heads}")
        if not isinstance(scores, ScoreOptions):
            raise TypeError(f"scores must be ScoreOptions, got {scores!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be a probability in [0, 1), got {dropout!r}")
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, num_heads_kv
        self.head_dim, self.scores, self.dropout = head_dim, scores, dropout
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        size, size_kv = num_heads * head_dim, num_heads_kv * head_dim
        self.q_proj = nn.Linear(embed_dim, size, bias=biases[0], **made)
        self.k_proj = nn.Linear(memory_dim, size_kv, bias=biases[0], **made)
        self.v_proj = nn.Linear(memory_dim, size_kv, bias=biases[0], **made)
        self.out_proj = nn.Linear(size, embed_dim, bias=biases[1], **made)
        norm = scores.qk_norm
        eps = scores.qk_norm_eps
        self.q_norm = nn.RMSNorm(head_dim, eps=eps, **made) if norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=eps, **made) if norm else None
        sinks = nn.Parameter(torch.zeros(num_heads, **made)) if scores.sinks else None
        self.register_parameter("sinks", sinks)

    def _queries(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        return q if self.q_norm is None else self.q_norm(q)

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.num_heads_kv, self.head_dim)
        k, v = self.k_proj(x).unflatten(-1, heads), self.v_proj(x).unflatten(-1, heads)
        return k if self.k_norm is None else self.k_norm(k), v

    def _score_options(self) -> dict[str, Any]:
        scores = self.scores
        return {
            "softmax_scale": scores.softmax_scale, "softcap": scores.softcap, "sinks": self.sinks,
        }  # fmt: skip

    def _dropout_options(self) -> dict[str, Any]:
        return {"dropout_p": self.dropout} if self.training and self.dropout else {}

    def _check_x(self, name: str, x: Tensor, size: int) -> None:
        check_tensor(name, x)
        if x.dim() != 3 or x.shape[-1] != size:
            raise ValueError(f"{name} must be (batch, seqlen, {size}), got {describe(x)}")

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, num_heads={self.num_heads}"
        if self.num_heads_kv != self.num_heads:
            text += f", num_heads_kv={self.num_heads_kv}"
        return text + f", head_dim={self.head_dim}, dropout={self.dropout}"


class SelfAttention(_Projected):
    """Multi-head or grouped-query self-attention, with or without a cache.

    Parameters are those of `q_proj`, `k_proj`, `v_proj` and `out_proj` (nn.Linear), `q_norm` and
    `k_norm` (nn.RMSNorm), `sinks` and `relative_bias.weight`, where they exist.

    Args:
        embed_dim: features of the input and the output.
        num_heads: query heads.
        num_heads_kv: key heads, of which num_heads is a multiple; default num_heads.
        head_dim: default embed_dim // num_heads; at most 256.
        bias: of the projections of queries, keys and values.
        out_bias: of the output's projection; default as `bias`.
        causal: a token sees those up to itself.
        window: (left, right): how many tokens before and after itself it sees; None is no limit.
        rotary: how queries and keys are rotated by their positions; its tables follow the module
            to another device (once for all layers that share them), and stay in their dtype.
        relative_bias: a `RelativeBias`, which layers may share.
        scores: scale, softcap, sinks and normalization.
        dropout: probability with which weights are dropped in training.
        device, dtype: of the parameters; default torch's.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        causal: bool = False,
        window: tuple[int | None, int | None] | None = None,
        rotary: Rotary | None = None,
        relative_bias: RelativeBias | None = None,
        scores: ScoreOptions = ScoreOptions(),
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        biases = (bias, bias if out_bias is None else out_bias)
        super().__init__(
            embed_dim, num_heads, num_heads_kv, head_dim, embed_dim, biases, scores, dropout,
            device, dtype,
        )  # fmt: skip
        masks: list[Mask] = [Causal()] if causal else []
        if window is not None:
            if not isinstance(window, tuple) or len(window) != 2:
                raise TypeError(f"window must be (left, right) or None, got {window!r}")
            masks.append(Window(*window))
        self.mask = _joined(*masks)
        if rotary is not None:
            if not isinstance(rotary, Rotary):
                raise TypeError(f"rotary must be a fastattn.Rotary, got {rotary!r}")
            if rotary.rotary_dim > self.head_dim:
                raise ValueError(
                    f"rotary must rotate at most head_dim = {self.head_dim} dimensions, got "
                    f"{rotary.rotary_dim}"
                )
        self.rotary = rotary
        if relative_bias is not None:
            if not isinstance(relative_bias, RelativeBias):
                raise TypeError(f"relative_bias must be a RelativeBias, got {relative_bias!r}")
            if relative_bias.weight.shape[1] != num_heads:
                raise ValueError(
                    f"relative_bias must have num_heads = {num_heads} heads, got "
                    f"{relative_bias.weight.shape[1]}"
                )
        self.relative_bias = relative_bias
        self._rotary_to(self.q_proj.weight.device)

    def forward(
        self,
        x: Tensor,
        *,
        cache: BaseKVCache | None = None,
        layer: int | None = None,
        rows: Sequence[int] | Tensor | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
    ) -> Tensor:
        """Attention of `x` to itself, and to what the cache holds before it.

        Args:
            x: (batch, seqlen, embed_dim).
            cache: keys and values are written behind what its rows hold, and attended with them.
                When all layers are done, its owner calls `cache.advance(seqlen)`. There are no
                gradients: call within `torch.no_grad()`.
            layer: which of the cache's layers this is.
            rows: which of the cache's rows x stands for; default all.
            lengths: integer (batch,), how many tokens of each row of x are real; the rest is
                padding behind them, gives the output's bias, and costs no attention.
            positions: integer (batch, seqlen), for the rotation; default those of `rotary`, or
                0 to seqlen - 1, counted from what the cache holds.
            mask: who may attend beside that: a value, or bool that broadcasts to (batch,
                num_heads, seqlen, keys), True = attend; keys are seqlen, or the cache's capacity.
            bias: added to the scores: a value, or floating of the same shape.

        Returns:
            (batch, seqlen, embed_dim). Tokens that may attend to nothing give the output's bias.

        Raises:
            TypeError, ValueError, RuntimeError: an argument is not as described.
        """
        self._check_x("x", x, self.embed_dim)
        if (cache is None) != (layer is None) or (cache is None and rows is not None):
            raise ValueError(
                "layer must be given with a cache, and layer and rows with nothing else, got cache "
                f"{cache!r}, layer {layer!r}, rows {rows!r}"
            )
        if positions is not None:
            if self.rotary is None:
                raise ValueError(
                    "positions must be None in a module without rotary, which would ignore them, "
                    f"got {describe(positions)}"
                )
            check_positions("positions", positions)
            if positions.shape != x.shape[:2]:
                raise ValueError(
                    f"positions must have shape (batch, seqlen) = {tuple(x.shape[:2])}, got "
                    f"{tuple(positions.shape)}"
                )
        q = self._queries(x)
        k, v = self._keys_and_values(x)
        options = self._score_options()
        options["bias"] = self._bias(bias)
        rotary = self.rotary
        if rotary is not None and positions is not None:
            rotary = dataclasses.replace(rotary, positions=positions)
        if cache is None:
            if rotary is not None:
                q, k = _rotated(rotary, q, k)
            if lengths is not None:
                mask = _joined(mask, Lengths(lengths, seqlens_q=lengths))
            out = self._attend(
                q, k, v, mask=_joined(self.mask, mask), **options, **self._dropout_options()
            )
        else:
            if self._dropout_options():
                raise ValueError(
                    f"cache must be None in training with dropout {self.dropout}: call .eval()"
                )
            if lengths is not None:
                held = cache.seqlens if rows is None else cache.seqlens[_index(rows, x.device)]
                mask = _joined(mask, Lengths(held + lengths, seqlens_q=lengths))
            out = self._attend(
                q, k, v, cache=cache, layer=layer, rows=rows, rotary=rotary,
                mask=_joined(self.mask, mask), **options,
            )  # fmt: skip
        return self.out_proj(out.flatten(-2))

    def _bias(self, bias: Bias | Tensor | None) -> Bias | None:
        own = None if self.relative_bias is None else self.relative_bias()
        if bias is None or own is None:
            return own if bias is None else as_bias(bias)
        return own + bias

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SelfAttention:
        super()._apply(fn, recurse)
        self._rotary_to(self.q_proj.weight.device)
        return self

    def _rotary_to(self, device: torch.device) -> None:
        if self.rotary is not None and device.type != "meta":
            self.rotary = _rotary_on(self.rotary, device)


@dataclass(frozen=True, eq=False)
class ProjectedMemory:
    """Keys and values that `CrossAttention.project` made of a memory.

    Args:
        k, v: (batch, seqlen_k, num_heads_kv, head_dim).
        lengths: integer (batch,), how many tokens of each row are real; None: all.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor | None = None

    def select(self, rows: Tensor) -> ProjectedMemory:
        """These rows of the batch, an integer tensor: for beams, or where some are done."""
        lengths = None if self.lengths is None else self.lengths.index_select(0, rows)
        return ProjectedMemory(self.k.index_select(0, rows), self.v.index_select(0, rows), lengths)


class CrossAttention(_Projected):
    """Attention of a sequence to another one, the memory: an encoder's output, an image.

        projected = attention.project(memory, lengths)     # once
        for ...:
            out = attention(x, projected)                  # in every step of decoding

    Args:
        embed_dim, num_heads, num_heads_kv, head_dim, bias, out_bias, scores, dropout, device,
            dtype: as for `SelfAttention`.
        memory_dim: features of the memory; default embed_dim.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        memory_dim: int | None = None,
        num_heads_kv: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        scores: ScoreOptions = ScoreOptions(),
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        memory_dim = embed_dim if memory_dim is None else memory_dim
        check_positive("memory_dim", memory_dim)
        biases = (bias, bias if out_bias is None else out_bias)
        super().__init__(
            embed_dim, num_heads, num_heads_kv, head_dim, memory_dim, biases, scores, dropout,
            device, dtype,
        )  # fmt: skip
        self.memory_dim = memory_dim

    def project(self, memory: Tensor, lengths: Tensor | None = None) -> ProjectedMemory:
        """Keys and values of the memory, to be attended as often as wanted.

        Args:
            memory: (batch, seqlen_k, memory_dim).
            lengths: integer (batch,), how many tokens of each row are real; None: all.
        """
        self._check_x("memory", memory, self.memory_dim)
        return ProjectedMemory(*self._keys_and_values(memory), lengths)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | ProjectedMemory,
        *,
        lengths: Tensor | None = None,
        mask: Mask | Tensor | None = None,
        bias: Bias | Tensor | None = None,
    ) -> Tensor:
        """Attention of every token of x to the memory.

        Args:
            x: (batch, seqlen_q, embed_dim).
            memory: (batch, seqlen_k, memory_dim), or what `project` made of one.
            lengths: of a memory that is not projected yet, as for `project`.
            mask: who may attend beside that: a value, or bool that broadcasts to (batch,
                num_heads, seqlen_q, seqlen_k), True = attend.
            bias: added to the scores: a value, or floating of the same shape.

        Returns:
            (batch, seqlen_q, embed_dim). Tokens that may attend to nothing give the output's bias.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        self._check_x("x", x, self.embed_dim)
        if not isinstance(memory, ProjectedMemory):
            memory = self.project(memory, lengths)
        elif lengths is not None:
            raise ValueError(
                "lengths must be None where memory is projected: give them to project(), got "
                f"{describe(lengths)}"
            )
        if memory.lengths is not None:
            mask = _joined(mask, Lengths(memory.lengths))
        out = self._attend(
            self._queries(x), memory.k, memory.v, mask=_joined(mask), bias=bias,
            **self._score_options(), **self._dropout_options(),
        )  # fmt: skip
        return self.out_proj(out.flatten(-2))


def _joined(*masks: Mask | Tensor | None) -> Mask | None:
    result: Mask | None = None
    for mask in masks:
        if mask is not None:
            result = as_mask(mask) if result is None else result & mask
    return result


def _index(rows: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(rows, device=device)


def _rotated(rotary: Rotary, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k of tokens that stand at the rotary's positions, or at 0, 1, ..."""
    seqlen = q.shape[1]
    positions = rotary.positions
    if positions is None:
        if seqlen > rotary.max_position:
            raise ValueError(
                f"x must have at most {rotary.max_position} tokens, the positions of rotary, got "
                f"{seqlen}"
            )
        positions = torch.arange(seqlen, device=q.device)[None]
    else:
        check_position_values("positions", positions, rotary.max_position)
    turns = rotary.turns(positions, q.dtype)
    return rotary.rotate(q, *turns), rotary.rotate(k, *turns)


_moved: weakref.WeakKeyDictionary[Rotary, dict[torch.device, Rotary]] = weakref.WeakKeyDictionary()
"""Rotary tables on other devices, so that layers that share tables still do when they are moved."""


def _rotary_on(rotary: Rotary, device: torch.device) -> Rotary:
    if rotary.cos.device == device:
        return rotary
    elsewhere = _moved.setdefault(rotary, {})
    if device not in elsewhere:
        positions = None if rotary.positions is None else rotary.positions.to(device)
        elsewhere[device] = dataclasses.replace(
            rotary, cos=rotary.cos.to(device), sin=rotary.sin.to(device), positions=positions
        )
    return elsewhere[device]
