"""The public functions on key/value caches: documentation, validation, and one call down."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.biases import Bias
from fastattn.cache_problem import CacheProblem, make_cache_problem
from fastattn.dispatch import Explanation
from fastattn.masks import Mask
from fastattn.merge_problem import make_merge_problem
from fastattn.quantized import Quantized
from fastattn.rotary import Rotary
from fastattn.validation import check_tensor

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    rotary: Rotary | None = None,
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    batch_invariant: bool = False,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends new keys and values to a cache, then attends to all that it holds.

    Each row of the batch has its own length. The new tokens of row b are written in place, to
    positions `cache_seqlens[b] + j`. It then has `total = cache_seqlens[b] + seqlen_new` tokens,
    and query i stands at `total - seqlen_q + i`, the last query with the last key:

        cache_seqlens = [3, 1], 2 new tokens, 2 queries, causal      o  in the cache
            o o o # .    row 0                                       #  new, and may be attended
            o o o # #
            o # .        row 1
            o # #

    `cache_seqlens` itself is not changed: a model's layers share it, and its owner adds
    `seqlen_new` when all of them are done. One query a row is decoding, a few are speculation,
    many are a prompt, whole or in chunks. What lies behind a row's tokens is never read into a
    result. Work and traffic are in proportion to what may be attended, not to the cache's size.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float16, bfloat16 or float32 (float64 on the
            torch implementations); head_dim 1 to 256.
        k_cache: (batch, max_seqlen, num_heads_kv, head_dim), of any strides, in the dtype of q or a
            `Quantized`. With `block_table` paged: (num_blocks, block_size, num_heads_kv, head_dim).
            num_heads must be a multiple of num_heads_kv (grouped-query).
        v_cache: the same with head_dim_v, which may differ from head_dim.
        k: (batch, seqlen_new, num_heads_kv, head_dim), the keys to append; None: none are, and the
            cache is only read (cross-attention to an encoder, whose keys are written once).
        v: (batch, seqlen_new, num_heads_kv, head_dim_v); with k or not at all.
        cache_seqlens: int32 or int64 (batch,), tokens of each row before this call; an int is the
            same for all, at the cost of a fill, and fixed in a CUDA graph; None is a full cache,
            which has no room for new ones. On a GPU a length below 0 marks an idle row of a graph:
            nothing is written, and its output is 0.
        block_table: int32 or int64 (batch, max_blocks): token j of row b lies in block
            `block_table[b, j // block_size]`. Rows may share blocks that neither appends to.
            Entries past a row's last token may hold anything.
        rotary: rotates q and k by their positions before k is written (see `Rotary`); a query
            that stands before position 0 is not turned.
        causal: the same as joining `Causal()` to the mask.
        mask: bool tensor, True = attend, that broadcasts to (batch, num_heads, seqlen_q, capacity),
            a column for each position of the cache, or Causal, Window, Prefix, Lengths, joined with
            `&`. Lengths(starts_k=...) hides the left padding of a prompt.
        bias: floating tensor that broadcasts to the same shape, or ALiBi, T5Bias, joined with `+`.
        softmax_scale: factor on q @ k.T; default head_dim ** -0.5.
        softcap: if > 0, scores become softcap * tanh(scores / softcap), before biases.
        sinks: (num_heads,) logits, one a head, that join the softmax's sum without a value.
        batch_invariant: a row's result has the same bits in a batch of any size, at some cost.
        return_lse: also return the log-sum-exp of the modified scores (with the sink).
        impl: "auto", or "triton", "sdpa", "reference"; one that is named runs or raises. See
            `explain_with_kv_cache`. "sdpa" and "reference" read the lengths on the host.

    Returns:
        (batch, seqlen_q, num_heads, head_dim_v) in the dtype of q, contiguous. With `return_lse`,
        also float32 (batch, num_heads, seqlen_q). A row that may attend to nothing, one with an
        empty cache for instance, is 0 with lse -inf (with a sink, lse is the sink).

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, and the
            caches are as they were. On a GPU the *values* of lengths, tables and positions are
            looked at only within `fastattn.testing.debug()`.
        RuntimeError: a tensor requires grad while grad mode is on: there is no gradient here.
        NotImplementedError: `impl` was named and cannot serve the call; lists every reason.
    """
    problem = _attention_problem(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table,
        rotary=rotary, causal=causal, mask=mask, bias=bias, softmax_scale=softmax_scale,
        softcap=softcap, sinks=sinks, batch_invariant=batch_invariant, return_lse=return_lse,
    )  # fmt: skip
    out, lse = dispatch.run(problem, impl)
    return (out, lse) if return_lse else out


def append_to_kv_cache(
    k_cache: Tensor | Quantized,
    v_cache: Tensor | Quantized,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    rotary: Rotary | None = None,
    impl: str = "auto",
) -> None:
    """Writes new keys and values behind the tokens of each row, in place, and attends to nothing.

    What an encoder-decoder does once with its encoder's keys, and prefix sharing with a prefix.

    Args:
        k_cache, v_cache, k, v, cache_seqlens, block_table: as for `attention_with_kv_cache`; k and
            v have the caches' dtype, or any floating dtype where the caches are `Quantized`.
        rotary: rotates k by its positions; `positions` are (batch, seqlen_new).
        impl: "auto", "triton" or "reference" (plain torch).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as `attention_with_kv_cache`.
    """
    check_tensor("k", k)
    check_tensor("v", v)
    problem = make_cache_problem(
        None, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table,
        rotary=rotary,
    )  # fmt: skip
    dispatch.run(problem, impl)


def merge_attention_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from attention over each.

        lse = log(exp(lse_a) + exp(lse_b))
        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

    Exact, since a softmax over a union is a weighted mean of softmaxes (the recurrence of online
    softmax: Milakov and Gimelshein, arXiv:1805.02867). Keys must not be in both sets, and a sink
    belongs to one of the two calls only. The keys may lie anywhere: in two caches, or on two
    machines. A prefix that all rows share is read once for all of them (cascade):

        rows = q.flatten(0, 1)[None]  # every row's queries side by side
        out_a, lse_a = attention(rows, prefix_k, prefix_v, return_lse=True)
        out_a = out_a[0].unflatten(0, q.shape[:2])
        lse_a = lse_a[0].unflatten(1, q.shape[:2]).transpose(0, 1)
        out_b, lse_b = attention_with_kv_cache(q, k_cache, v_cache, ..., return_lse=True)
        out, lse = merge_attention_states(out_a, lse_a, out_b, lse_b)

    Args:
        out_a: (batch, seqlen, num_heads, head_dim), or packed (total, num_heads, head_dim).
        lse_a: float32 (batch, num_heads, seqlen), packed (num_heads, total); float64 for float64.
        out_b, lse_b: those of the other keys; shapes and dtypes of out_a and lse_a.
        impl: "auto", "triton" or "reference" (plain torch).

    Returns:
        out and lse, of the shapes and dtypes of out_a and lse_a, computed in float32 or better.
        Where one lse is -inf (no keys) the other state is returned, whatever that out holds; where
        both are, out is 0 and lse -inf. Differentiable.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        NotImplementedError: `impl` was named and cannot serve the call; lists every reason.
    """
    return dispatch.run(make_merge_problem(out_a, lse_a, out_b, lse_b), impl)


def _takes_the_arguments_of(
    model: Callable[_Arguments, object],
) -> Callable[[Callable[..., _Result]], Callable[_Arguments, _Result]]:
    """Gives a function of `*args, **options` the signature of `model`.

    For type checkers and `help`, and so that a wrong call raises the TypeError that `model` would.
    """
    signature = inspect.signature(model)

    def decorate(function: Callable[..., _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def checked(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
            try:
                signature.bind(*args, **options)
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(*args, **options)

        returns = inspect.signature(function).return_annotation
        shown = signature.replace(return_annotation=returns)
        checked.__signature__ = shown  # type: ignore[attr-defined]
        return checked

    return decorate


@_takes_the_arguments_of(attention_with_kv_cache)
def explain_with_kv_cache(*args: Any, impl: str = "auto", **options: Any) -> Explanation:
    """What `attention_with_kv_cache` with these arguments would run, and why not the others.

    Runs nothing and writes nothing.

    Args:
        args, impl, options: the arguments of `attention_with_kv_cache`, by the same names and in
            the same order.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as that function describes it.
    """
    return dispatch.explain(_attention_problem(*args, **options), impl)


class CheckedCalls:
    """`attention_with_kv_cache` for the layers of one cache, whose calls are checked once a step.

    A model's layers make the same call in each step, with other tensors of the same shapes. To
    check it costs more on the host than the rest of the call, so it is done for the first layer,
    and again for a call that differs in anything but the contents of its operands. Whoever holds
    an instance drops it when the lengths, the table or the caches' shapes change.
    """

    def __init__(self) -> None:
        self._checked: dict[Any, tuple[CacheProblem, dict[str, Any]]] = {}

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor | Quantized,
        v_cache: Tensor | Quantized,
        k: Tensor | None,
        v: Tensor | None,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor | None,
        impl: str = "auto",
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `attention_with_kv_cache`; k_cache and v_cache are those of any layer."""
        kind = None
        if not (torch.compiler.is_compiling() or torch.is_autocast_enabled(q.device.type)):
            kind = _kind_of_call((q, k, v), cache_seqlens, options)
        found = self._checked.get(kind)
        if found is not None:
            problem = found[0].with_tensors(q, k, v, k_cache, v_cache)
        else:
            problem = _attention_problem(
                q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table,
                **options,
            )  # fmt: skip
            if kind is not None:
                self._checked[kind] = (problem, options)  # kept, so that no id is another's
        out, lse = dispatch.run(problem, impl)
        return (out, lse) if problem.return_lse else out


def _kind_of_call(
    operands: tuple[Tensor | None, ...], seqlens: Tensor, options: dict[str, Any]
) -> Any:
    """All that the checks of a call look at, but for the contents of its options' tensors."""
    shapes = tuple(
        None if x is None else (x.shape, x.dtype, x.device, x.requires_grad) for x in operands
    )
    values = tuple(
        (name, value if isinstance(value, (int, float, str)) else id(value))
        for name, value in options.items()
    )
    # Tells whether somebody wrote to the lengths. A copy that was made in inference mode has none.
    version = None if seqlens.is_inference() else seqlens._version
    return shapes, values, version, torch.is_grad_enabled()


def _attention_problem(q: Tensor, *args: Any, **options: Any) -> CacheProblem:
    """Checks a call that attends: unlike one that only appends, it has a q."""
    check_tensor("q", q)
    return make_cache_problem(q, *args, **options)
