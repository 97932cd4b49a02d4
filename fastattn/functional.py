"""The public functions on tensors: documentation, validation, and one call down."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch, reference
from fastattn.biases import Bias
from fastattn.dispatch import Explanation
from fastattn.masks import Mask
from fastattn.problem import AttentionProblem, make_problem
from fastattn.validation import check_integers, check_tensor, describe, values_readable


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q @ k.T * scale + bias, masked) @ v, without the score matrix in memory.

    Any strides are taken as they are, without a copy. Sums are float32. Memory beyond the output is
    O(seqlen), and work is in proportion to what may be attended: tiles of keys that no row sees are
    not read.

    The causal mask is aligned bottom-right, the last query with the last key:

        seqlen_q = 2, seqlen_k = 4        seqlen_q = 4, seqlen_k = 2
            # # # .                           . .
            # # # #                           . .    <- rows without keys give 0 and lse -inf
                                              # .
                                              # #

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float16, bfloat16 or float32 (float64 on the
            torch implementations); head_dim 1 to 256. With a `Packed` mask (total_q, num_heads,
            head_dim), or the same behind a batch axis of 1.
        k: (batch, seqlen_k, num_heads_kv, head_dim). num_heads must be a multiple of num_heads_kv
            (grouped-query): q head h uses k head h // (num_heads // num_heads_kv).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v); head_dim_v may differ from head_dim.
        causal: the same as joining `Causal()` to the mask.
        mask: bool tensor, True = attend, that broadcasts to (batch, num_heads, seqlen_q, seqlen_k),
            or a mask value: Causal, Window, Prefix, Lengths, Packed, joined with `&`.
        bias: floating tensor that broadcasts to the same shape, added after scale and softcap, or a
            bias value: ALiBi, T5Bias, joined with `+`.
        softmax_scale: factor on q @ k.T; default head_dim ** -0.5. (T5 uses 1.)
        softcap: if > 0, scores become softcap * tanh(scores / softcap), before biases (Gemma 2).
        sinks: (num_heads,) logits, one a head, that join the softmax's sum without a value.
        dropout_p: probability with which weights are dropped, the others growing by 1/(1-p).
        dropout_seed: int64 tensor of one element that fixes which (see `fastattn.dropout`); None
            draws one from torch's generator. Weights that are dropped are never stored.
        return_lse: also return the log-sum-exp of the modified scores (with the sink).
        impl: "auto", or "triton", "sdpa" (torch's scaled_dot_product_attention), "reference" (plain
            torch, differentiable twice). One that is named runs or raises. See `explain`.

    Returns:
        (batch, seqlen_q, num_heads, head_dim_v) in the dtype of q, contiguous. With `return_lse`,
        also float32 (batch, num_heads, seqlen_q), packed (num_heads, total_q). A row that may
        attend to nothing is 0 with lse -inf, never NaN.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. On a GPU the
            *values* of lengths are looked at only within `fastattn.testing.debug()`, since that
            makes the host wait; values out of range are undefined behaviour there.
        NotImplementedError: `impl` was named and cannot serve the call; lists every reason.
    """
    problem = make_problem(
        q, k, v, causal=causal, mask=mask, bias=bias, softmax_scale=softmax_scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
        return_lse=return_lse,
    )  # fmt: skip
    if problem.is_empty and not problem.return_lse and not problem.requires_grad:
        dispatch.select(problem, impl)
        return q.new_zeros((*q.shape[:-1], v.shape[-1]))
    out, lse = dispatch.run(problem, impl)
    if problem.packed is not None:
        out = out.reshape((*q.shape[:-1], v.shape[-1]))
    if not return_lse:
        return out
    assert lse is not None  # dispatch picks only implementations that return it
    return out, lse


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    heads: list[int] | Tensor | None = None,
    rows: list[int] | Tensor | None = None,
    average_heads: bool = False,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """The softmax weights of just the heads and rows asked for.

    Exact, from the log-sum-exp that `attention(..., return_lse=True)` returned for the same
    arguments: what a heat map is drawn from, without the (batch, heads, N, N) tensor.

    Args:
        q, k, causal, mask, bias, softmax_scale, softcap, sinks: as given to `attention`.
        lse: log-sum-exp (batch, num_heads, seqlen_q), packed (num_heads, total_q); None computes it
            with an attention call of its own.
        heads: query heads, a list or an integer tensor; None is all.
        rows: query rows, a list or an integer tensor; None is all. Rows of a packed batch count
            within each sequence.
        average_heads: the mean over `heads`, accumulated without the per-head weights.
        impl: "auto", "triton" or "reference". Weights that are differentiated come from the latter,
            with the whole score matrix in memory: to look at those of a model in training, call
            this within `torch.no_grad()`.

    Returns:
        float32 (batch, heads, rows, seqlen_k), or (batch, rows, seqlen_k) averaged; for a packed
        batch (num_sequences, ..., max_seqlen_k), 0 past each sequence's end. float64 for float64
        inputs.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`.
    """
    problem = make_problem(
        q, k, k, causal=causal, mask=mask, bias=bias, softmax_scale=softmax_scale,
        softcap=softcap, sinks=sinks, return_lse=True,
    )  # fmt: skip
    chosen_heads = _check_indices("heads", heads, problem.q.shape[-2], q.device)
    chosen_rows = _check_indices("rows", rows, problem.frame_seqlens[0], q.device)
    if lse is not None:
        _check_lse(lse, problem)
    differentiated = problem.requires_grad or (
        lse is not None and lse.requires_grad and torch.is_grad_enabled()
    )
    if impl == "auto":
        kernels = "triton" in dispatch.auto_candidates(q.device) and not differentiated
        serves = kernels and not dispatch.IMPLEMENTATIONS["triton"].unsupported_reasons(problem)
        impl = "triton" if serves else "reference"
    if impl not in ("triton", "reference"):
        raise ValueError(f'impl must be "auto", "triton" or "reference", got {impl!r}')
    if impl == "triton" and differentiated:
        raise NotImplementedError(
            "impl='triton' gives attention weights without a gradient, and a tensor requires one: "
            'look at weights within torch.no_grad(), or pass impl="reference"'
        )
    dispatch.select(problem, impl)
    if impl == "reference":
        return reference.attention_weights(problem, lse, chosen_heads, chosen_rows, average_heads)
    from fastattn import torch_ops

    if lse is None:
        _, lse = torch_ops.attention_forward(problem)
        assert lse is not None  # the problem says return_lse
    return torch_ops.attention_weights(problem, lse, chosen_heads, chosen_rows, average_heads)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Explanation:
    """What `attention` with these arguments would run, and why not the others. Runs nothing."""
    problem = make_problem(
        q, k, v, causal=causal, mask=mask, bias=bias, softmax_scale=softmax_scale,
        softcap=softcap, sinks=sinks, dropout_p=dropout_p, dropout_seed=dropout_seed,
        return_lse=return_lse,
    )  # fmt: skip
    return dispatch.explain(problem, impl)


def _check_indices(
    name: str, value: list[int] | Tensor | None, size: int, device: torch.device
) -> Tensor | None:
    """A list or tensor of indices as an int64 tensor on `device`."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = torch.tensor(list(value), dtype=torch.int64, device=device)
    check_integers(name, value, device)
    if value.numel() and values_readable(value):
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= size:
            raise ValueError(f"{name} must lie in 0..{size - 1}, got {low}..{high}")
    return value.to(torch.int64)


def _check_lse(lse: Tensor, problem: AttentionProblem) -> None:
    check_tensor("lse", lse)
    q = problem.q
    shape: tuple[int, ...] = (q.shape[1], q.shape[0])
    if problem.packed is None:
        shape = (q.shape[0], q.shape[2], q.shape[1])
    expected = torch.promote_types(q.dtype, torch.float32)
    if tuple(lse.shape) != shape or lse.dtype != expected or lse.device != q.device:
        raise ValueError(
            f"lse must be {expected} of shape {shape} on {q.device}, got {describe(lse)}"
        )
