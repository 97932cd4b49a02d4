"""Small pieces that the families share: norms, activations, MLPs, checks of token ids.

Modules are made on torch's default device and dtype, and named as in our checkpoints' tables:
`weight` and `bias` of torch's own modules, `gate_up` and `down`, `up` and `down`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastattn.validation import check_tensor, describe, values_readable

Activation = Callable[[Tensor], Tensor]


FEW_ROWS = 64
"""Up to so many rows a linear layer is bound by reading its weights, on a CPU."""
SMALL_WEIGHT = 2**16
"""Weights of fewer elements are not worth another path than torch's own."""
LARGE_WEIGHT = 2**23
"""Weights of as many elements or more, 32 MiB, exceed the cache of a CPU: heads over tokens."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as torch's, which it is but for a step of decoding on a CPU.

    There torch's own is MKL's: one thread for a single row, and half of the speed of oneDNN for a
    few. oneDNN it is instead, fastest on a weight that lies as `Linear` has it. A single row and a
    weight that no cache holds is read fastest in slices, one a thread; and compiled, a single row
    is a sum that torch's compiler reads the weight for as fast as memory is.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,).
    """
    few = 0 < x.numel() <= FEW_ROWS * x.shape[-1]
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    if not (few and on_cpu) or torch.is_grad_enabled() or weight.numel() < SMALL_WEIGHT:
        return functional.linear(x, weight, bias)
    single = x.numel() == x.shape[-1]
    if torch.compiler.is_compiling():
        if not single:
            return functional.linear(x, weight, bias)
        out = (weight * x.reshape(1, -1)).sum(-1).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    transposed = weight.stride(0) == 1
    if not (transposed or weight.is_contiguous()):
        return functional.linear(x, weight, bias)
    if not (single and transposed and weight.numel() >= LARGE_WEIGHT):
        if not _has_onednn():
            return functional.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    slices = _count_slices(x.shape[-1], torch.get_num_threads())
    if slices == 1:
        return functional.linear(x, weight, bias)
    parts = torch.bmm(x.reshape(slices, 1, -1), weight.t().view(slices, -1, weight.shape[0])).sum(0)
    return (parts if bias is None else parts + bias).view(*x.shape[:-1], -1)


@functools.cache
def _count_slices(size: int, threads: int) -> int:
    """How many equal slices `size` is cut into: at most one a thread, and 8."""
    return next(n for n in range(min(threads, 8), 0, -1) if size % n == 0)


@functools.cache
def _has_onednn() -> bool:
    # What torch's own compiler calls for float32; a build may lack it.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """torch's, with a weight (out_features, in_features) that lies in memory as its transpose.

    For which `linear` is fast on a CPU. Where a checkpoint is loaded in another dtype or to another
    device, it lies there as usual.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight = transposed_in_memory(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def transposed_in_memory(weight: Tensor) -> nn.Parameter:
    """The same matrix, whose columns are contiguous."""
    return nn.Parameter(weight.detach().t().contiguous().t(), weight.requires_grad)


class RMSNorm(nn.Module):
    """Root mean square norm, x / sqrt(mean(x ** 2) + eps) * weight, without a mean or a bias.

    Zhang and Sennrich, arXiv:1910.07467; the norm of LLaMA, Qwen and T5. Computed in float32 or
    better, and rounded once to the dtype of x.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.dim, self.eps = (dim,), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), in the dtype of x."""
        return functional.rms_norm(x, self.dim, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim[0]}, eps={self.eps}"


class MLP(nn.Module):
    """down(activation(up(x))): GPT-2's, BERT's, BART's and T5 1.0's.

    Args:
        dim, hidden: sizes outside and inside.
        activation: by Hugging Face's name, see `find_activation`.
        bias: of both linear layers.
    """

    def __init__(self, dim: int, hidden: int, activation: str, bias: bool = True) -> None:
        super().__init__()
        self.up = Linear(dim, hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)
        self.activation = find_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)): LLaMA's, Qwen's and T5 1.1's (Shazeer, arXiv:2002.05202).

    One linear layer `gate_up` computes both, the gate's rows first: one pass over the weights.

    Args:
        dim, hidden: sizes outside and inside.
        activation: by Hugging Face's name, see `find_activation`.
        bias: of both linear layers.
    """

    def __init__(self, dim: int, hidden: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)
        self.activation = find_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(self.activation(gate) * up)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_gelu_tanh = functools.partial(functional.gelu, approximate="tanh")

ACTIVATIONS: dict[str, Activation] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_tanh,  # Hendrycks and Gimpel, arXiv:1606.08415, by its tanh approximation
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""By the names that a Hugging Face config has for them."""


def find_activation(name: str) -> Activation:
    """An activation by the name that a Hugging Face config has for it.

    Raises:
        ValueError: it is none of `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def take_last(hidden: Tensor, lengths: Tensor | None) -> Tensor:
    """The last real token of each row: (batch, seqlen, ...) -> (batch, ...).

    Args:
        lengths: int64 (batch,), real tokens of each row, at least 1; None: all.
    """
    if lengths is None:
        return hidden[:, -1]
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths - 1]


def find_lengths(input_ids: Tensor, pad_token: int) -> Tensor:
    """Up to the last token of each row that is no padding, at least 1: int64 (B,)."""
    place = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    return (place * (input_ids != pad_token)).amax(1).clamp(min=1)


def check_token_ids(
    name: str, ids: Tensor, vocab_size: int, max_positions: int | None = None
) -> None:
    """Raises unless `ids` are tokens of the vocabulary that a model can read.

    Args:
        name: the argument, for the message.
        ids: integer (batch, seqlen), seqlen at least 1. On a GPU their values are not looked at,
            which would wait for the device (but within `fastattn.testing.debug()`).
        vocab_size: every id lies below it.
        max_positions: the longest seqlen; None: any.
    """
    check_tensor(name, ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64 token ids, got {describe(ids)}")
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"{name} must be (batch, seqlen) with at least one row and one token, got "
            f"{describe(ids)}"
        )
    if max_positions is not None and ids.shape[1] > max_positions:
        raise ValueError(
            f"{name} must have at most {max_positions} tokens a row, the positions that the model "
            f"has, got {ids.shape[1]}"
        )
    if values_readable(ids):
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name} must lie in 0..{vocab_size - 1}, the vocabulary, got {low}..{high}"
            )


def check_row_lengths(name: str, lengths: Tensor | None, ids: Tensor) -> None:
    """Raises unless `lengths` are the real tokens of each row of `ids`, padded on the right.

    Args:
        name: the argument, for the message.
        lengths: int32 or int64 (batch,) on the device of `ids`, each 1 to seqlen; None: all.
        ids: (batch, seqlen).
    """
    if lengths is None:
        return
    check_tensor(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {describe(lengths)}")
    if lengths.shape != ids.shape[:1] or lengths.device != ids.device:
        raise ValueError(
            f"{name} must have one entry a row, shape ({ids.shape[0]},), on {ids.device}, got "
            f"{describe(lengths)}"
        )
    if values_readable(lengths):
        low, high = (int(x) for x in lengths.aminmax())
        if low < 1 or high > ids.shape[1]:
            raise ValueError(
                f"{name} must lie in 1..{ids.shape[1]}, the real tokens of a row, got {low}..{high}"
            )


def initialize(model: nn.Module, std: float = 0.02) -> nn.Module:
    """Draws all weights anew: normal of `std`, biases 0, norms 1. For training from scratch.

    Parameters that belong to no Linear, Embedding or norm are drawn from the normal too.
    """
    with torch.no_grad():
        for module in model.modules():
            norm = isinstance(module, (nn.LayerNorm, RMSNorm))
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif norm:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, std)
    return model
