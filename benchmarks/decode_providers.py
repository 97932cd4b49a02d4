"""Who decodes: fastattn, SDPA on the live part of the cache, and the peers installed here.

A peer that is not there keeps its place, with the reason, as in `providers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.decode_cases import DecodeCase, DecodeInputs
from benchmarks.providers import SDPA_BACKENDS, Provider, explained, find_module
from fastattn import attention_with_kv_cache
from fastattn.version import __version__

# SDPA's MATH backend copies keys and values for each query head, partly in float32.
_MATH_BYTES = 2**29
_FLASH_2_BLOCK = 256  # flash-attn 2 takes blocks of a multiple of that
_FLASHINFER_PAGE = 16
_WORKSPACE_BYTES = 256 << 20


def find_decode_providers() -> list[Provider]:
    """Everyone, installed or not; fastattn first."""
    return [
        fastattn_decode(),
        *(sdpa_decode(backend) for backend in SDPA_BACKENDS),
        _flash_attn("flash-attn 2", "flash_attn"),
        _flash_attn("flash-attn 3", "flash_attn_interface"),
        _flash_attn("fa3-fwd", "fa3_fwd_interface"),
        _flashinfer(),
    ]


def fastattn_decode(name: str = "fastattn", impl: str = "triton") -> Provider:
    """The public function, with what dispatch chooses."""

    def prepare(inputs: DecodeInputs) -> Callable[[], Any]:
        operands, kwargs = (inputs.q, inputs.k_cache, inputs.v_cache), inputs.kwargs
        return lambda: attention_with_kv_cache(*operands, impl=impl, **kwargs)

    return Provider(name, prepare, __version__, note=_chosen if impl == "triton" else _nothing)


def _chosen(inputs: DecodeInputs) -> dict[str, Any]:
    """The config that dispatch chooses."""
    from benchmarks.decode_sweep import config_fields, current_config

    return config_fields(current_config(inputs.case, inputs.q.device))


def _nothing(inputs: DecodeInputs) -> dict[str, Any]:
    return {}


def sdpa_decode(backend: str) -> Provider:
    """torch's scaled_dot_product_attention with one backend forced, on a slice of the cache."""
    name = f"SDPA {backend.removesuffix('_ATTENTION')}"

    def prepare(inputs: DecodeInputs) -> Callable[[], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen, q = getattr(SDPBackend, backend), inputs.q.transpose(1, 2)
        k, v = inputs.sliced()
        mask = _lower_right(inputs, backend)

        def run() -> Tensor:
            with sdpa_kernel(chosen):
                out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return out.transpose(1, 2)

        return explained(run)

    def skip(case: DecodeCase) -> str:
        if case.stored:
            return "it reads no 8-bit cache"
        if case.block_size:
            return "it takes no block table"
        if backend == "MATH" and case.bytes > _MATH_BYTES:
            return "its copies of keys and values are too large to be worth the time"
        return ""

    return Provider(name, prepare, f"torch {torch.__version__}", skip=skip)


def _lower_right(inputs: DecodeInputs, backend: str) -> Any:
    """The mask of several query rows: the last sees all keys. FLASH knows it by its name only."""
    rows, length = inputs.case.seqlen_q, inputs.case.length
    if rows == 1:
        return None
    if backend == "FLASH_ATTENTION":
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(rows, length)
    visible = torch.ones(rows, length, dtype=torch.bool, device=inputs.q.device)
    return visible.tril(length - rows)


def _flash_attn(name: str, module: str) -> Provider:
    """flash-attn 2 and 3: `flash_attn_with_kvcache` on the same memory."""
    library, version, absent = find_module(module)
    if not absent and not hasattr(library, "flash_attn_with_kvcache"):
        absent = f"{module} {version} has no flash_attn_with_kvcache"
    # The argument is named differently in the two generations.
    table = "block_table" if module == "flash_attn" else "page_table"

    def prepare(inputs: DecodeInputs) -> Callable[[], Tensor]:
        kwargs: dict[str, Any] = {"cache_seqlens": inputs.seqlens, "causal": True}
        if inputs.block_table is not None:
            kwargs[table] = inputs.block_table

        def run() -> Tensor:
            found = library.flash_attn_with_kvcache(
                inputs.q, inputs.k_cache, inputs.v_cache, **kwargs
            )
            return found[0] if isinstance(found, tuple) else found

        return run

    def skip(case: DecodeCase) -> str:
        if case.stored:
            return "it reads no 8-bit cache with queries in 16 bits"
        if module == "flash_attn" and case.block_size % _FLASH_2_BLOCK:
            return f"it takes blocks of a multiple of {_FLASH_2_BLOCK}"
        return ""

    return Provider(name, prepare, version, absent, skip)


def _flashinfer() -> Provider:
    """FlashInfer on pages: its decoding wrapper, or for several rows its prefill wrapper."""
    library, version, absent = find_module("flashinfer")

    def prepare(inputs: DecodeInputs) -> Callable[[], Tensor]:
        case, q = inputs.case, inputs.q
        caches, indptr, indices, last = flashinfer_pages(inputs)
        size = caches[0].shape[1]
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        heads = (case.num_heads, case.num_heads_kv, case.head_dim, size)
        if case.seqlen_q == 1:
            # Groups of four query heads go to tensor cores, as its documentation advises.
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=True
            )
            wrapper.plan(indptr, indices, last, *heads, q_data_type=q.dtype, kv_data_type=q.dtype)
        else:
            wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            rows = torch.arange(case.batch + 1, dtype=torch.int32, device=q.device) * case.seqlen_q
            wrapper.plan(
                rows, indptr, indices, last, *heads, causal=True, q_data_type=q.dtype,
                kv_data_type=q.dtype,
            )  # fmt: skip
        flat = q.flatten(0, 1)
        return lambda: wrapper.run(flat, caches).view_as(q)

    def skip(case: DecodeCase) -> str:
        return "an 8-bit cache has one scale in all there" if case.stored else ""

    return Provider("FlashInfer", prepare, version, absent, skip)


def flashinfer_pages(
    inputs: DecodeInputs,
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
    """A cache as FlashInfer takes it.

    Returns:
        Keys and values as pages (num_pages, page_size, heads, dim), views of the same memory; where
        each row's page numbers begin, int32 (batch + 1,); the page numbers; and tokens of each
        row's last page.
    """
    case, cache, device = inputs.case, inputs.cache, inputs.q.device
    if inputs.block_table is not None:
        size, table = case.block_size, inputs.block_table
        k, v = cache.k, cache.v
    else:
        size = _FLASHINFER_PAGE
        k, v = (x.view(-1, size, *x.shape[2:]) for x in (cache.k, cache.v))
        numbers = torch.arange(k.shape[0], dtype=torch.int32, device=device)
        table = numbers.view(case.batch, -1)
    used = -(-case.length // size)
    indptr = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * used
    last = torch.full_like(inputs.seqlens, case.length - (used - 1) * size)
    return (k, v), indptr, table[:, :used].flatten(), last
