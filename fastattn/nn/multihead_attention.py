"""`torch.nn.MultiheadAttention`, computed by fastattn."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fastattn import functional
from fastattn.biases import Bias
from fastattn.dropout import Dropout
from fastattn.masks import Mask, Packed
from fastattn.nn.attending import Attending, check_head_dim
from fastattn.nn.torch_masks import (
    as_mask_and_bias,
    causal_top_left,
    check_masks,
    four_dimensional,
)
from fastattn.validation import check_tensor, describe


class MultiheadAttention(Attending, torch.nn.MultiheadAttention):
    """The same module, to a caller, as `torch.nn.MultiheadAttention`; also by isinstance.

        attention = fastattn.nn.MultiheadAttention(512, 8, batch_first=True)
        out, _ = attention(x, x, x, need_weights=False)

    Constructor, parameters, `state_dict`, arguments and results are torch's: see there. Inside
    `nn.TransformerEncoderLayer`, `nn.TransformerDecoderLayer` and `nn.Transformer` it is really
    called: a forward pre-hook that does nothing tells their fused inference path to stay away, and
    nested tensors, which `nn.TransformerEncoder` makes of padded batches, are attended packed.

    need_weights=True is the default, as in torch, and builds the (batch, num_heads, L, S) weights
    or their mean. need_weights=False is the fast way.

    What differs:
        - A query that may attend to nothing gives attention 0 (and so `out_proj.bias`), and weights
          0. torch gives NaN.
        - `is_causal=True` needs an `attn_mask`, as in torch, and then does not read it: the hint
          says that row i sees keys 0 to i. Only with keys that are added (`add_bias_kv`,
          `add_zero_attn`) it is read where torch reads it.
        - Nested tensors, strided or jagged, work in training too.
        - TorchScript (jit.script, jit.trace) is not supported; compile and export are.
        - Dropout of weights is drawn in the kernel: the same distribution as torch's, other bits.
          In training, the weights returned are those that were applied, dropped ones being 0.
        - head_dim is at most 256.

    Weights are differentiable, like torch's; with `torch.no_grad()` they cost much less memory.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
        device, dtype: as `torch.nn.MultiheadAttention`.

    Raises:
        ValueError: head_dim is not 1 to 256; or as torch.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype,
        )  # fmt: skip
        check_head_dim(self.head_dim, f"embed_dim {embed_dim}, num_heads {num_heads}")
        self.register_forward_pre_hook(_must_be_called)

    @classmethod
    def from_torch(cls, module: torch.nn.MultiheadAttention) -> MultiheadAttention:
        """`module` in another guise: the same parameters, submodules, settings and hooks.

        Nothing is copied. What is loaded into, moved or registered on one of the two is so on the
        other too; only forward pre-hooks and the training flag are each one's own from here on.

        Args:
            module: a `torch.nn.MultiheadAttention`, not of a class derived from it (whose forward
                may do something else). One that is a fastattn module already is returned.

        Raises:
            TypeError: `module` is of another class.
            ValueError: its head_dim is above 256, or its forward was replaced or compiled.
        """
        if isinstance(module, MultiheadAttention):
            return module
        _check_replaceable(module)
        twin = cls.__new__(cls)
        twin.__dict__.update(module.__dict__)
        # Its own, or the hook below would slow down the stock module if it is put back.
        for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            twin.__dict__[name] = OrderedDict(module.__dict__[name])
        twin.register_forward_pre_hook(_must_be_called)
        return twin

    @staticmethod
    def convert(module: torch.nn.MultiheadAttention) -> Callable[[], None]:
        """Makes a module of torch one of these, in place: whoever holds it holds this.

        Args, Raises: as `from_torch`.

        Returns:
            What makes it torch's again.
        """
        _check_replaceable(module)
        module.__class__ = MultiheadAttention
        hook = module.register_forward_pre_hook(_must_be_called)

        def undo() -> None:
            hook.remove()
            module.__class__ = torch.nn.MultiheadAttention

        return undo

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`; see the class for what differs.

        Args:
            query: (L, N, embed_dim), with batch_first (N, L, embed_dim), unbatched (L, embed_dim).
            key: (S, N, kdim), (N, S, kdim) or (S, kdim).
            value: (S, N, vdim), (N, S, vdim) or (S, vdim).
            key_padding_mask: (N, S) or (S,): bool, True = hidden, or floating, added to the scores.
            need_weights: also return the weights.
            attn_mask: (L, S) or (N * num_heads, L, S), bool or floating likewise.
            average_attn_weights: return their mean over the heads.
            is_causal: `attn_mask` is the causal mask, and need not be read.

        Returns:
            Output in the shape of query, and None or the weights, (N, L, S) if averaged, else
            (N, num_heads, L, S); unbatched without N.

        Raises:
            RuntimeError: is_causal without attn_mask.
            TypeError, ValueError: an argument is not as described; the message names it.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "attn_mask must be given where is_causal is True, which is a hint about it, got "
                "None: nn.Transformer.generate_square_subsequent_mask makes one"
            )
        if query.is_nested or key.is_nested or value.is_nested:
            if key_padding_mask is not None or attn_mask is not None:
                raise ValueError(
                    "key_padding_mask and attn_mask must be None where query is nested: its lengths"
                    " say what is padding"
                )
            return self._forward_nested(query, key, value, need_weights, average_attn_weights)

        batched = query.dim() == 3
        self._check_inputs(query, key, value)
        batch_first = batched and self.batch_first
        q, k, v = (_batch_first(x, batched, batch_first) for x in self._project(query, key, value))
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        check_masks(
            attn_mask, key_padding_mask, batch, self.num_heads, (seqlen_q, seqlen_k), batched
        )
        added = (self.bias_k is not None) + self.add_zero_attn
        # torch's mask hides nothing of what is added, its hint all that is past the diagonal.
        by_hint = is_causal and (added == 0 or (key_padding_mask is None and not need_weights))
        masks = four_dimensional(
            None if by_hint else attn_mask, key_padding_mask, batch, self.num_heads
        )
        if added:
            k, v = self._with_added_keys(k, v)
            masks = [pad(mask, (0, added)) for mask in masks]
        unseen = max(0, k.shape[1] - seqlen_q) if by_hint else 0
        if unseen:
            k, v = k[:, :seqlen_q], v[:, :seqlen_q]
            masks = [mask[..., :seqlen_q] for mask in masks]
        mask, bias = as_mask_and_bias(masks)
        if by_hint:
            causal = causal_top_left(seqlen_q, k.shape[1])
            mask = causal if mask is None else causal & mask

        out, weights = self._attend_with_dropout(
            q, k, v, mask, bias, need_weights, average_attn_weights
        )
        if batched and not batch_first:
            out = out.transpose(0, 1)
        out = self._project_out(out)
        if weights is not None and unseen:
            weights = pad(weights, (0, unseen))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out, weights

    def _forward_nested(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of a nested tensor, whose sequences are attended packed."""
        if query is not key or key is not value:
            raise ValueError("query, key and value must be the same tensor where one is nested")
        sequences = query.unbind()
        lengths = [len(sequence) for sequence in sequences]
        x = torch.cat(sequences)
        ends = list(itertools.accumulate(lengths, initial=0))
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=x.device)
        packed = Packed(cu_seqlens, max_seqlen_q=max(lengths))
        q, k, v = self._project(x, x, x)
        out, weights = self._attend_with_dropout(q, k, v, packed, None, need_weights, average)
        pieces = list(self._project_out(out).split(lengths))
        return torch.nested.as_nested_tensor(pieces, layout=query.layout), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v in the layout of what they come from, with heads: (..., num_heads, head_dim).

        Inputs that are the same tensor are projected by one product.
        """
        weight: Tensor | None = self.in_proj_weight
        bias: Tensor | None = self.in_proj_bias
        size = self.embed_dim
        q: Tensor
        k: Tensor
        v: Tensor
        if weight is not None and query is key and key is value:
            q, k, v = linear(query, weight, bias).chunk(3, -1)
        elif weight is not None and key is value:
            q_weight, kv_weight = weight.split([size, 2 * size])
            q_bias, kv_bias = (None, None) if bias is None else bias.split([size, 2 * size])
            q = linear(query, q_weight, q_bias)
            k, v = linear(key, kv_weight, kv_bias).chunk(2, -1)
        else:
            weights: tuple[Tensor, ...]
            if weight is None:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            else:
                weights = weight.chunk(3)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = map(linear, (query, key, value), weights, biases)
        heads = (self.num_heads, self.head_dim)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)

    def _project_out(self, out: Tensor) -> Tensor:
        return linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias)

    def _with_added_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """With the learned key and value (add_bias_kv), then those of zeros, behind all others."""
        results = []
        for x, bias in ((k, self.bias_k), (v, self.bias_v)):
            shape = (x.shape[0], 1, self.num_heads, self.head_dim)
            pieces = [x]
            if bias is not None:
                pieces.append(bias.view(1, *shape[1:]).expand(shape))
            if self.add_zero_attn:
                pieces.append(x.new_zeros(shape))
            results.append(torch.cat(pieces, 1))
        return results[0], results[1]

    def _attend_with_dropout(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None,
        bias: Bias | None,
        need_weights: bool,
        average: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, and the weights that it applied if they are asked for."""
        p = self.dropout if self.training else 0.0
        nothing_left = p == 1.0  # which the kernels do not take
        if nothing_left:
            p, v = 0.0, v * 0.0
        options: dict[str, Any] = {"mask": mask, "bias": bias}
        if not need_weights:
            return self._attend(q, k, v, dropout_p=p, **options), None
        seed = None
        if p > 0.0:
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
        lse = None
        if self.impl == "triton" or (self.impl == "auto" and q.is_cuda):
            out, lse = self._attend(
                q, k, v, dropout_p=p, dropout_seed=seed, return_lse=True, **options
            )
        else:  # torch's own path, which knows no lse, and weights on their own are faster
            out = self._attend(q, k, v, dropout_p=p, dropout_seed=seed, **options)
        impl = self.impl
        if impl == "sdpa" or (lse is not None and lse.requires_grad):
            impl = "reference"  # weights that are differentiated, whoever computes the output
        dropped = seed is not None or nothing_left
        weights = functional.attention_weights(
            q, k, lse, average_heads=average and not dropped, impl=impl, **options
        )
        if seed is not None:
            weights = weights * Dropout(p, seed).keep(*weights.shape) / (1.0 - p)
        elif nothing_left:
            weights = weights * 0.0
        if average and dropped:
            weights = weights.mean(1)
        # torch's softmax stays float32 within autocast on a GPU.
        stays_wide = q.is_cuda and torch.is_autocast_enabled("cuda")
        return out, weights if stays_wide else weights.to(out.dtype)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, size), tensor in zip(sizes.items(), (query, key, value), strict=True):
            check_tensor(name, tensor)
            if tensor.dim() not in (2, 3) or tensor.dim() != query.dim():
                raise ValueError(
                    f"{name} must have 3 dimensions, or 2 where query, key and value are all "
                    f"unbatched, got {describe(tensor)}"
                )
            if tensor.shape[-1] != size:
                raise ValueError(
                    f"{name} must have {size} features in its last dimension, got "
                    f"{describe(tensor)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value must agree with key ({describe(key)}) in all but its last dimension, got "
                f"{describe(value)}"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(
                f"key must have the batch size of query, {query.shape[batch]}, got {describe(key)}"
            )


def _check_replaceable(module: torch.nn.Module) -> None:
    if type(module) is not torch.nn.MultiheadAttention:
        raise TypeError(
            "module must be a torch.nn.MultiheadAttention itself, got "
            f"{type(module).__module__}.{type(module).__qualname__}"
        )
    for name, how in (
        ("forward", "a forward of its own"),
        ("_compiled_call_impl", "compile()"),
    ):
        if module.__dict__.get(name) is not None:
            raise ValueError(
                f"module must be called through its class, got one with {how} "
                f"({name} is set): undo that before, and redo it after"
            )
    check_head_dim(module.head_dim, f"of {module}")


def _batch_first(x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """(batch, seqlen, num_heads, head_dim) of what was projected, without a copy."""
    if not batched:
        return x[None]
    return x if batch_first else x.transpose(0, 1)


def _must_be_called(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    """Does nothing: by its presence, `nn.TransformerEncoderLayer` calls the module.

    Without hooks its inference path computes the layer from the module's weights, past `forward`.
    """
