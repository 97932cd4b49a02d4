"""The repairs themselves: methods that replace those of Triton's interpreter.

Importing this module imports Triton and changes nothing; :func:`install` puts the repairs in.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

from fastattn.testing.interpreter import float_formats as formats
from fastattn.testing.interpreter.accesses import (
    Access,
    BoundsCheck,
    Launch,
    OutOfBoundsError,
    observers,
    observing,
)

Handle = stock.TensorHandle
Builder = stock.InterpreterBuilder

_COMPARISONS = frozenset(
    [np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal]
)
_TRANSCENDENTALS = frozenset([np.exp, np.exp2, np.log, np.log2, np.sin, np.cos, np.sqrt])
_ONE_BIT_ARITHMETIC = frozenset([np.add, np.subtract, np.multiply])


class DeviceAssertError(AssertionError):
    """A ``tl.device_assert`` or ``tl.assume`` in a kernel does not hold."""


class NotInInterpreterError(NotImplementedError):
    """An operation that the interpreter gets wrong and that is not repaired."""


# Raised from a kernel as they are, and not wrapped in Triton's InterpreterError.
_PLAIN_ERRORS = (OutOfBoundsError, DeviceAssertError, NotImplementedError)


# Numbers: formats that NumPy does not have, and rounding.


def _name(handle: Any) -> str:
    return str(handle.dtype.scalar.name)


def _values(handle: Any) -> formats.Array:
    return formats.widen(handle.data, _name(handle))


def _handle(values: formats.Array, like: Any) -> Any:
    """Computed numbers as a handle of the scalar type of ``like``."""
    return Handle(formats.narrow(values, _name(like)), like.dtype.scalar)


def _refuse_float8(operation: str, *handles: Any) -> None:
    for handle in handles:
        if formats.is_float8(_name(handle)):
            raise NotInInterpreterError(
                f"{operation} on {_name(handle)}: cast to fp16 or fp32 first, as a GPU would"
            )


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    _refuse_float8(op.__name__, lhs, rhs)
    if op in _COMPARISONS:
        # The stock result keeps the type of its operands, which a later cast believes.
        return Handle(op(_values(lhs), _values(rhs)), tl.int1)
    if _name(lhs) == "bf16":
        return _handle(op(_values(lhs), _values(rhs)), like=lhs)
    if lhs.data.dtype == np.bool_ and rhs.data.dtype == np.bool_ and op in _ONE_BIT_ARITHMETIC:
        # One bit wraps: NumPy would saturate, or refuse to subtract.
        wide = op(lhs.data.astype(np.int8), rhs.data.astype(np.int8))
        return Handle((wide & 1).astype(np.bool_), tl.int1)
    return _STOCK["binary_op"](self, lhs, rhs, op)


def _unary_op(self: Any, arg: Any, op: Any) -> Any:
    _refuse_float8(op.__name__, arg)
    if op in _TRANSCENDENTALS:
        _report_math(op.__name__, arg)
    if _name(arg) == "bf16":
        return _handle(op(_values(arg)), like=arg)
    return _STOCK["unary_op"](self, arg, op)


def _ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
    if op is np.where:  # it moves bits, whatever they mean
        return _STOCK["ternary_op"](self, lhs, rhs, other, op)
    _refuse_float8(op.__name__, lhs, rhs, other)
    if _name(other) == "bf16":
        return _handle(op(_values(lhs), _values(rhs), _values(other)), like=other)
    return _STOCK["ternary_op"](self, lhs, rhs, other, op)


def _create_clampf(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
    if propagate_nans == ir.PROPAGATE_NAN.NONE:
        return self.binary_op(self.binary_op(arg, lo, np.fmax), hi, np.fmin)
    return self.ternary_op(arg, lo, hi, np.clip)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    _refuse_float8("fma", x, y, z)
    if _name(z) in ("fp16", "bf16", "fp32"):
        return _handle(formats.fused_multiply_add(_values(x), _values(y), _values(z)), like=z)
    if _name(z) == "fp64" and not hasattr(stock._interpreter, "fma_fp64"):
        raise NotInInterpreterError("fma on fp64: this Triton's interpreter rounds it twice")
    return _STOCK["create_fma"](self, x, y, z)


def _create_umulhi(self: Any, lhs: Any, rhs: Any) -> Any:
    """The operands are unsigned, whatever their type says."""
    dtype = lhs.data.dtype
    unsigned = np.dtype(f"u{dtype.itemsize}")
    x, y = lhs.data.view(unsigned), rhs.data.view(unsigned)
    if dtype.itemsize == 8:
        high = ((x.astype(object) * y.astype(object)) >> 64).astype(unsigned)
    else:
        high = ((x.astype(np.uint64) * y.astype(np.uint64)) >> (8 * dtype.itemsize)).astype(
            unsigned
        )
    return Handle(high.view(dtype), lhs.dtype.scalar)


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_imprecise: Any) -> Any:
    x, y = _values(a), _values(b)
    batch = int(np.prod(x.shape[:-2], dtype=np.int64))
    for observer in observers():
        observer.multiplied(batch, x.shape[-2], y.shape[-1], x.shape[-1])
    if x.dtype.kind != "f":
        return Handle(np.matmul(x, y, dtype=d.data.dtype) + d.data, d.dtype.scalar)
    if _name(a) == "fp32" and input_precision == ir.INPUT_PRECISION.TF32:
        x, y = formats.round_to_tf32(x), formats.round_to_tf32(y)
    wide = np.float64 if _name(d) == "fp64" else np.float32
    # By torch: its BLAS splits long sums, NumPy's does not, and parity is measured against torch.
    product = torch.from_numpy(x.astype(wide)) @ torch.from_numpy(y.astype(wide))
    return _handle(product.numpy() + d.data.astype(wide), like=d)


def _create_dot_scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotInInterpreterError("tl.dot_scaled")


def _create_histogram(self: Any, data: Any, bins: int, mask: Any) -> Any:
    counted = (data.data >= 0) & (data.data < bins)
    if mask is not None:
        counted &= mask.data
    counts = np.bincount(data.data[counted].astype(np.int64), minlength=bins)
    return Handle(counts.astype(np.int32), tl.int32)


# Casts and constants.


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    dst = dst_type.scalar
    if dst.is_floating():
        return Handle(formats.narrow(_values(src), dst.name), dst)
    if src.dtype.scalar.is_floating():
        return Handle(_values(src).astype(stock._get_np_dtype(dst)), dst)
    return _STOCK["cast_impl"](self, src, dst_type)


def _create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    dst = dst_type.scalar
    toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
    return Handle(formats.narrow(_values(src), dst.name, toward_zero), dst)


def _get_bf16(self: Any, value: float) -> Any:
    return Handle(formats.narrow(np.array([value], dtype=np.float64), "bf16"), tl.bfloat16)


def _implicit_cvt(arg: Any) -> Any:
    # The stock conversion of a bool is an int32 that claims to be an int1, and raises.
    if isinstance(arg, bool):
        return tl.tensor(Handle(np.array([arg]), tl.int1), tl.int1)
    return _STOCK["_implicit_cvt"](arg)


# Reductions and scans: their quick paths call NumPy on the raw bits. The slow path goes through
# the combine function, and so through the repaired builder.


def _through_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a quick path right for bf16: compute in fp32 and round the results."""

    def to_bfloat16(result: Any) -> Any:
        if result.dtype != tl.float32:
            return result  # the index of an argmax
        handle = Handle(formats.narrow(result.handle.data, "bf16"), tl.bfloat16)
        return tl.tensor(
            handle,
            result.type.with_element_ty(tl.bfloat16) if result.type.is_block() else tl.bfloat16,
        )

    @functools.wraps(method)
    def repaired(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        tensor = input[0] if isinstance(input, tuple) else input
        _refuse_float8("a reduction or scan", tensor.handle)
        if tensor.dtype != tl.bfloat16:
            return method(self, input, *args, **kwargs)
        result = method(self, self.to_tensor(_values(tensor.handle), tl.float32), *args, **kwargs)
        if isinstance(result, (list, tuple)):
            return type(result)(to_bfloat16(item) for item in result)
        return to_bfloat16(result)

    return repaired


# Memory. Every load and store of the interpreter comes through the masked ones.


def _report_access(self: Any, kind: str, ptrs: Any, mask: Any) -> None:
    active = ptrs.data.ravel() if mask is None or mask.all() else ptrs.data[mask]
    listening = observers()
    if listening and active.size:
        width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        access = Access(kind, active, width, self.grid_idx)
        # Innermost first: the check of this launch comes before whoever counts.
        for observer in reversed(listening):
            observer.accessed(access)


def _lanes(mask: Any) -> formats.Array:
    """The mask of an access; block pointers and descriptors pass it as a bare array."""
    return np.asarray(mask.data if isinstance(mask, Handle) else mask, dtype=np.bool_)


def _create_masked_load(
    self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any
) -> Any:
    lanes = _lanes(mask)
    _report_access(self, "load", ptrs, lanes)
    if other is None and not lanes.all():
        other = _undefined(ptrs)
    mask = Handle(lanes, tl.int1)
    return _STOCK["create_masked_load"](self, ptrs, mask, other, *rest, **named)


def _undefined(ptrs: Any) -> Any:
    """What masked lanes hold without an ``other``: a GPU leaves them undefined, so no zeros."""
    element = ptrs.get_element_ty()
    dtype = stock._get_np_dtype(element)
    # All bits set is NaN in every float format but the fnuz ones; 0xAA.. is far from any index.
    pattern = 0xFF if element.is_floating() else 0xAA
    size = ptrs.data.size * dtype.itemsize
    raw = np.full(size, 1 if dtype == np.bool_ else pattern, dtype=np.uint8)
    return Handle(raw.view(dtype).reshape(ptrs.data.shape), element)


def _create_masked_store(
    self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any
) -> Any:
    lanes = _lanes(mask)
    _report_access(self, "store", ptrs, lanes)
    mask = Handle(lanes, tl.int1)
    return _STOCK["create_masked_store"](self, ptrs, value, mask, *rest, **named)


def _create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
    if formats.is_raw(_name(val)) and op != ir.ATOMIC_OP.XCHG:
        raise NotInInterpreterError(f"an atomic {op.name} on {_name(val)}: use fp32")
    _report_access(self, "atomic", ptr, _lanes(mask))
    return _STOCK["create_atomic_rmw"](self, op, ptr, val, mask, *rest)


def _create_atomic_cas(self: Any, ptr: Any, *rest: Any) -> Any:
    _report_access(self, "atomic", ptr, None)
    return _STOCK["create_atomic_cas"](self, ptr, *rest)


# Assertions, control flow, launches.


def _create_assert(self: Any, condition: Any, message: str) -> None:
    if not np.all(condition.data):
        raise DeviceAssertError(f"program {self.grid_idx}: device_assert failed: {message}")


def _create_assume(self: Any, condition: Any) -> None:
    if not np.all(condition.data):
        raise DeviceAssertError(f"program {self.grid_idx}: what tl.assume says does not hold")


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _STOCK["_patch_lang_tensor"](tensor, scope)

    def index(self: Any) -> int:
        return int(self.handle.data.item())  # NumPy 2.4 has no int() of an array of one dimension

    def truth(self: Any) -> bool:
        if self.handle.data.size != 1:
            # Triton's own front end asks blocks whether they are given at all: `if other`.
            if sys._getframe(1).f_globals["__name__"].startswith("triton.language"):
                return True
            raise ValueError(
                f"the truth of a block {self.type} is ambiguous: use tl.where, & or | "
                "(the stock interpreter takes it for true)"
            )
        return bool(self.handle.data.item())

    scope.set_attr(tensor, "__index__", index)
    scope.set_attr(tensor, "__bool__", truth)


# Language modules that the launches in progress have patched, innermost launch last.
_patched: list[set[int]] = []


def _patch_lang(fn: Any) -> Any:
    """Not a fault, but half the time of a kernel with helpers: each call of one patches again."""
    languages = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
    if _patched and languages <= _patched[-1]:
        return stock._LangPatchScope()
    if _patched:
        _patched[-1] |= languages
    return _STOCK["_patch_lang"](fn)


def _report_math(function: str, arg: Any) -> None:
    for observer in observers():
        observer.computed(function, int(arg.data.size))


def _reporting(function: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def reported(self: Any, arg: Any) -> Any:
        _report_math(function, arg)
        return method(self, arg)

    return reported


def _tensors(name: str, arg: Any) -> dict[str, Any]:
    """The tensors of a kernel argument by name, those in (named) tuples too."""
    if isinstance(arg, tuple):
        fields = getattr(arg, "_fields", range(len(arg)))
        found: dict[str, Any] = {}
        for label, item in zip(fields, arg, strict=True):
            found |= _tensors(f"{name}.{label}", item)
        return found
    arg = getattr(arg, "base", arg) if not hasattr(arg, "untyped_storage") else arg
    return {name: arg} if hasattr(arg, "untyped_storage") else {}


def _init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
    host_args, host_kwargs = _STOCK["_init_args_hst"](self, args, kwargs)
    tensors: dict[str, Any] = {}
    for name, arg in [*zip(self.arg_names, host_args, strict=False), *host_kwargs.items()]:
        tensors |= _tensors(name, arg)
    launch = Launch(self.fn.__name__, tensors)
    for observer in observers():
        observer.launched(launch)
    return host_args, host_kwargs


def _run_grid(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Chips do not warn of an overflow or a NaN, and neither do we. Autocast is for the caller's
    # operations, and some of a kernel's are torch's here.
    quiet, exact = np.errstate(all="ignore"), torch.autocast("cpu", enabled=False)
    with observing(BoundsCheck()), quiet, exact:
        _patched.append(set())
        try:
            return _STOCK["__call__"](self, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, _PLAIN_ERRORS):
                raise cause from None
            raise
        finally:
            _patched.pop()


_REPAIRS: dict[Any, dict[str, Callable[..., Any]]] = {
    Builder: {
        "binary_op": _binary_op,
        "unary_op": _unary_op,
        "ternary_op": _ternary_op,
        "create_clampf": _create_clampf,
        "create_minnumf": lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin),
        "create_maxnumf": lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax),
        "create_fma": _create_fma,
        "create_umulhi": _create_umulhi,
        "create_dot": _create_dot,
        "create_histogram": _create_histogram,
        "create_erf": _reporting("erf", Builder.create_erf),
        "create_rsqrt": _reporting("rsqrt", Builder.create_rsqrt),
        "cast_impl": _cast_impl,
        "create_fp_to_fp": _create_fp_to_fp,
        "create_masked_load": _create_masked_load,
        "create_masked_store": _create_masked_store,
        "create_atomic_rmw": _create_atomic_rmw,
        "create_atomic_cas": _create_atomic_cas,
        "create_assert": _create_assert,
        "create_assume": _create_assume,
    },
    stock.ReduceOps: {
        "sum": _through_float32(stock.ReduceOps.sum),
        "min_max": _through_float32(stock.ReduceOps.min_max),
    },
    stock.ScanOps: {
        "cumsum": _through_float32(stock.ScanOps.cumsum),
        "cumprod": _through_float32(stock.ScanOps.cumprod),
    },
    stock.GridExecutor: {"_init_args_hst": _init_args_hst, "__call__": _run_grid},
    stock: {
        "_implicit_cvt": _implicit_cvt,
        "_patch_lang": _patch_lang,
        "_patch_lang_tensor": _patch_lang_tensor,
    },
}
# Methods that only newer releases have, or none.
_ADDITIONS = {"get_bf16": _get_bf16, "create_dot_scaled": _create_dot_scaled}

# What the repairs fall back on, by name; the names do not repeat between owners.
_STOCK: dict[str, Callable[..., Any]] = {}


def install() -> None:
    """Put the repairs into Triton's interpreter, once.

    Raises:
        RuntimeError: this Triton lacks something that a repair replaces.
    """
    if _STOCK:
        return
    missing = [
        f"{getattr(owner, '__name__', owner)}.{name}"
        for owner, replacements in _REPAIRS.items()
        for name in replacements
        if not hasattr(owner, name)
    ]
    if missing:
        raise RuntimeError(f"this Triton's interpreter has no {', '.join(missing)} to repair")
    for owner, replacements in _REPAIRS.items():
        for name, replacement in replacements.items():
            _STOCK[name] = getattr(owner, name)
            setattr(owner, name, replacement)
    for name, addition in _ADDITIONS.items():
        setattr(Builder, name, addition)
    # device_assert asks for debug mode, which would also turn every integer addition into a
    # check for overflow, wanted or not.
    builder = stock.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
