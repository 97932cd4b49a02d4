"""The mask function for transformers: padding and windows as values instead of a 4-D mask.

A model asks once per forward pass for the mask of each kind of layer. The stock answer is a bool
tensor (batch, 1, queries, keys). Here it is a `LazyMask`: the same tensor to whoever operates on
it, and the lengths, windows and packed sequences behind it to fastattn. Patterns that are not
recognized (chunks, image blocks, a user's own) are answered with the exact 4-D tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.utils.import_utils import is_tracing

from fastattn import masks
from fastattn.integrations.transformers_lazy import LazyTensor
from fastattn.masks import Causal, DenseMask, Lengths, Mask, Packed, Window

# Encoders whose bidirectional masks are of self-attention only: query rows that are padding may be
# left out. Elsewhere such a mask may be that of a cross-attention with as many queries as keys.
_ENCODERS = frozenset(
    {
        "albert", "bert", "camembert", "distilbert", "electra", "modernbert", "roberta",
        "xlm-roberta", "xlm-roberta-xl",
    }
)  # fmt: skip


class LazyMask(LazyTensor):
    """A mask value that poses as the bool tensor (batch, 1, queries, keys), True = attend.

    fastattn takes `structure`; see `LazyTensor` for everybody else.

    Attributes:
        sizes: its shape, at the price of a Python attribute.
        structure: the mask as a value.
        windows: the positional part of it.
        visible: bool (batch, keys), which keys are no padding; None if all.
        sequences: (1, keys) numbers, equal where tokens are of one packed sequence; None if not
            packed.
        keys_within_bounds: keys that a row of the mask computes at most, on the mean over the rows
            and times the batch; -1 where that was not read (on a GPU that would wait for the
            device) or is all of them.
        pieces: into how many problems the structure takes the batch apart.
    """

    sizes: tuple[int, int, int, int]
    structure: Mask
    windows: tuple[Window, ...]
    visible: Tensor | None
    sequences: Tensor | None
    keys_within_bounds: float
    pieces: int

    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        device: torch.device,
        windows: tuple[Window, ...],
        visible: Tensor | None,
        queries_are_keys: bool,
        sequences: Tensor | None = None,
    ) -> LazyMask:
        """A mask from windows and visible keys (batch, keys), or windows and packed sequences.

        `queries_are_keys` says that query row i is key i: rows of padding at the end are dropped.
        """
        mask = cls.posing_as(shape, torch.bool, device)
        assert isinstance(mask, LazyMask)
        mask.sizes, mask.windows, mask.visible = shape, windows, visible
        mask.sequences, mask.keys_within_bounds, mask.pieces = sequences, -1, shape[0]
        parts: tuple[Mask, ...] = windows
        if visible is not None:
            readable = visible.device.type == "cpu"
            bounds, has_holes, mask.keys_within_bounds = _lengths(
                visible, queries_are_keys, readable
            )
            parts += (bounds, DenseMask(visible[:, None, None, :])) if has_holes else (bounds,)
        if sequences is not None:
            lengths = sequences[0].unique_consecutive(return_counts=True)[1].tolist()
            ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            parts += (Packed(ends.to(device), None, max(lengths)),)
            mask.pieces = len(lengths)
            mask.keys_within_bounds = sum(length**2 for length in lengths) / shape[3]
        mask.structure = masks.join(*parts)
        return mask

    def build(self) -> Tensor:
        """The plain tensor (batch, 1, queries, keys), without memory where it repeats."""
        batch, _, seqlen_q, seqlen_k = self.sizes
        dense = None if self.visible is None else self.visible[:, None, None, :]
        for window in self.windows:
            visible = window.dense(seqlen_q, seqlen_k, self.device)
            dense = visible if dense is None else dense & visible
        if self.sequences is not None:
            together = self.sequences[:, None, :, None] == self.sequences[:, None, None, :]
            dense = together if dense is None else dense & together
        assert dense is not None  # a mask without parts is not made
        return dense.expand(batch, 1, seqlen_q, seqlen_k)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"LazyMask(shape={tuple(self.shape)}, {type(self.structure).__name__})"


def _lengths(visible: Tensor, queries_are_keys: bool, readable: bool) -> tuple[Lengths, bool, int]:
    """Bounds of the visible keys; whether keys between them may be hidden; keys within bounds.

    Where values are not `readable` for free, bounds that may be needed are given in any case.
    """
    size = visible.shape[1]
    position = torch.arange(1, size + 1, device=visible.device, dtype=torch.int32)
    ends = (visible * position).amax(1)
    starts = size - (visible * position.flip(0)).amax(1)
    has_holes, within, left_padded = True, -1, True
    if readable:
        within = int((ends - starts).clamp(min=0).sum())
        has_holes = within != int(visible.sum())
        left_padded = bool((starts[ends > 0] > 0).any())
    rows = None
    if queries_are_keys:
        # Lengths has no first row: with padding on the left all rows are computed.
        rows = torch.where(starts > 0, size, ends) if left_padded else ends
    lengths = Lengths(ends, starts_k=starts if left_padded else None, seqlens_q=rows)
    return lengths, has_holes, within


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function registered as "fastattn"; arguments as transformers' `sdpa_mask`.

    Returns:
        None where `attention_forward` needs no mask: it is causal (last query with last key) if
        the module is. Else a `LazyMask`, or the exact bool tensor (batch, 1, q_length, kv_length).
    """

    def exact() -> Tensor | None:
        return masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    tracing = torch.compiler.is_compiling() or is_tracing(attention_mask)
    windows, sequences = _take_apart(mask_function, by_closure=not tracing)
    if windows is None or (windows and not _is_aligned(q_length, kv_length, q_offset, kv_offset)):
        return exact()
    if sequences is not None:
        square = sequences.shape == (1, kv_length) == (batch_size, q_length)
        if attention_mask is not None or not square:
            return exact()
        shape = (batch_size, 1, q_length, kv_length)
        return LazyMask(shape, torch.device(device), windows, None, True, sequences)
    padding = attention_mask
    if padding is not None and (padding.dim() != 2 or padding.shape[0] != batch_size):
        return exact()
    if padding is not None:
        if (missing := kv_length + kv_offset - padding.shape[1]) > 0:
            padding = torch.nn.functional.pad(padding, (0, missing))
        padding = padding[:, kv_offset : kv_offset + kv_length].to(device, torch.bool)
        if not tracing and padding.device.type == "cpu" and bool(padding.all()):
            padding = None

    is_causal = any(isinstance(window, Causal) for window in windows)
    skip = allow_is_causal_skip if is_causal else allow_is_bidirectional_skip
    windows = tuple(window for window in windows if _cuts(window, q_length, kv_length))
    if padding is None and skip and all(isinstance(window, Causal) for window in windows):
        return None
    if tracing:
        # A graph gets plain tensors. This one has no memory of its own along the queries.
        if windows or padding is None:
            return exact()
        return padding[:, None, None, :].expand(batch_size, 1, q_length, kv_length)
    if not windows and padding is None:
        return exact()
    self_attention = is_causal or _is_encoder(kwargs.get("config"))
    return LazyMask(
        (batch_size, 1, q_length, kv_length),
        torch.device(device),
        windows,
        padding,
        queries_are_keys=self_attention and q_length == kv_length,
    )


def _is_aligned(
    q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int | Tensor
) -> bool:
    """Whether the last query stands at the last key, as in fastattn's positional masks.

    Not so in a static cache, whose keys run on past the queries, and whose offset is a tensor.
    """
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return False
    return q_offset + q_length == kv_offset + kv_length


def _cuts(window: Window, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether a window hides any key of this problem."""
    right = window.right is not None and seqlen_q > 1 + window.right
    return right or (window.left is not None and seqlen_k > 1 + window.left)


def _is_encoder(config: Any) -> bool:
    if getattr(config, "model_type", None) not in _ENCODERS:
        return False
    return not getattr(config, "is_decoder", False) and not getattr(
        config, "add_cross_attention", False
    )


def _code(function: Any) -> CodeType | None:
    return getattr(function, "__code__", None)


def _closure_of(maker: str, *args: Any) -> CodeType | None:
    """The code of the mask functions that a function of transformers makes; None if it has none."""
    function = getattr(masking_utils, maker, None)
    return None if function is None else _code(function(*args))


# Mask functions of transformers that are closures are known by the code they share.
_ANY = masking_utils.causal_mask_function
_AND = _closure_of("and_masks", _ANY)
_SLIDING = _closure_of("sliding_window_overlay", 1)
_SLIDING_BOTH_WAYS = _closure_of("sliding_window_bidirectional_overlay", 1)
_PACKED = _closure_of("packed_sequence_mask_function", torch.zeros(1, 1))
_REMAPPED = _closure_of("remap_positions_for_packed_sequence", _ANY, torch.zeros(1, 1))


def _variables(mask_function: Callable) -> dict[str, Any]:
    """What a closure has closed over, by name."""
    code = _code(mask_function)
    if code is None or mask_function.__closure__ is None:
        return {}
    cells = (cell.cell_contents for cell in mask_function.__closure__)
    return dict(zip(code.co_freevars, cells, strict=True))


def _take_apart(
    mask_function: Callable, by_closure: bool
) -> tuple[tuple[Window, ...] | None, Tensor | None]:
    """Windows, as `_windows_of`, and the numbers of packed sequences (batch, keys) if there are."""
    if not by_closure or _code(mask_function) is not _AND:
        return _windows_of(mask_function, by_closure), None
    windows: tuple[Window, ...] = ()
    packed = [f for f in _variables(mask_function)["mask_functions"] if _code(f) is _PACKED]
    for part in _variables(mask_function)["mask_functions"]:
        if _code(part) is _PACKED:
            continue
        if packed and _code(part) is _REMAPPED:
            # Positions within a sequence differ by what they differ by in the row.
            part = _variables(part)["mask_function"]
        known = _windows_of(part)
        if known is None:
            return None, None
        windows += known
    if len(packed) > 1:
        return None, None
    return windows, _variables(packed[0])["packed_sequence_mask"] if packed else None


def _windows_of(mask_function: Callable, by_closure: bool = True) -> tuple[Window, ...] | None:
    """The windows that together are `mask_function`; () shows all keys, None is "not known".

    Without `by_closure`, only the plain causal and bidirectional functions are told.
    """
    if mask_function is masking_utils.causal_mask_function:
        return (Causal(),)
    if mask_function is masking_utils.bidirectional_mask_function:
        return ()
    code = _code(mask_function)
    if not by_closure or code is None:
        return None
    variables = _variables(mask_function)
    if code is _SLIDING:
        return (Window(variables["sliding_window"] - 1, None),)
    if code is _SLIDING_BOTH_WAYS:
        return (Window(variables["sliding_window"], variables["sliding_window"]),)
    if code is _AND:
        parts = [_windows_of(part) for part in variables["mask_functions"]]
        known = [part for part in parts if part is not None]
        return sum(known, ()) if len(known) == len(parts) else None
    return None
