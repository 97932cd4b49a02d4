"""What the compile report compiles of decoding: every tile with every way to keep a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastattn.testing.compile_report import CompileCase, Target

_BATCH = 2
_HEADS = 8
_HEADS_KV = 2
_CAPACITY = 1024


def _lengths() -> torch.Tensor:
    return torch.zeros(_BATCH, dtype=torch.int32)


def _paged(block_size: int) -> dict[str, Any]:
    blocks = _CAPACITY // block_size
    table = partial(torch.zeros, _BATCH, blocks, dtype=torch.int32)
    return {"block_size": block_size, "block_table": table}


_QUANTIZED = "chunk of a prompt, paged 16, fp8"
# What a case's cache, queries and scores are like; values do not matter, nothing runs.
_CASES: dict[str, dict[str, Any]] = {
    "one token": {},
    "one token, splits": {"num_splits": 4},
    "one token, last combines": {"num_splits": 4, "last_combines": True},
    "paged 16": _paged(16),
    "paged 256, splits": {**_paged(256), "num_splits": 4},
    "rotary": {"rotary": "halves"},
    "interleaved rotary, positions, paged 32": {"rotary": "pairs", "positions": True, **_paged(32)},
    "window": {"window_left": 100, "window_right": 0},
    "T5 bias": {"relative_bias": lambda: torch.zeros(_HEADS, 257)},
    "ALiBi, softcap, sinks": {
        "alibi_slopes": lambda: torch.zeros(1, _HEADS),
        "softcap": 30.0,
        "sinks": lambda: torch.zeros(_HEADS),
    },
    "int8 a token, splits": {"stored": torch.int8, "per_token": True, "num_splits": 4},
    "int8 a head": {"stored": torch.int8},
    "fp8 a token, paged 64": {"stored": torch.float8_e4m3fn, "per_token": True, **_paged(64)},
    "fp8 a head, splits": {"stored": torch.float8_e4m3fn, "num_splits": 4},
    "cross-attention": {"new": False},
    "speculative": {"seqlen_q": 8, "window_right": 0},
    "chunk of a prompt": {"seqlen_q": 256, "window_right": 0, "rotary": "halves"},
    _QUANTIZED: {
        "seqlen_q": 256,
        "window_right": 0,
        "stored": torch.float8_e4m3fn,
        "per_token": True,
        **_paged(16),
    },
    "everything": {
        "softcap": 30.0,
        "sinks": lambda: torch.zeros(_HEADS),
        "window_left": 100,
        "window_right": 0,
        "starts_k": _lengths,
        "mask": lambda: torch.ones(_BATCH, 1, 1, _CAPACITY, dtype=torch.bool),
        "bias": lambda: torch.zeros(1, _HEADS, 1, _CAPACITY),
        "relative_bias": lambda: torch.zeros(_HEADS, 257),
        "rotary": "halves",
        "stored": torch.int8,
        "per_token": True,
        "num_splits": 4,
        **_paged(16),
    },
}
_FEW = ("one token", "one token, splits", "everything", "chunk of a prompt")
_OF_CACHE = (
    "stored", "per_token", "new", "seqlen_q", "rotary", "positions", "block_size", "block_table",
    "num_splits", "last_combines",
)  # fmt: skip


def attention_decode_cases(target: Target) -> Iterator[CompileCase]:
    """Decoding, appending and combining: dtypes x head dimensions x caches, on one target."""
    for dtype, head_dim, names in (
        (torch.bfloat16, 64, (*_FEW, _QUANTIZED)),
        (torch.bfloat16, 128, tuple(_CASES)),
        (torch.bfloat16, 256, (*_FEW, _QUANTIZED)),
        (torch.float16, 128, _FEW[:2]),
        (torch.float32, 64, _FEW),
        (torch.float32, 128, _FEW),
        (torch.float32, 256, _FEW),
    ):
        for name in names:
            case = dict(_CASES[name])
            if target.name in ("sm_80", "gfx942") and case.get("stored") == torch.float8_e4m3fn:
                case["stored"] = torch.uint8  # as the launchers see it there
            config = decode_config(target.name, dtype, head_dim, case)
            yield CompileCase(
                kernel="attention_decode",
                case=f"{str(dtype).removeprefix('torch.')} D{head_dim} {name}",
                config=config,
                launch=partial(launch_decode, dtype, head_dim, case, config),
                expect_tensor_cores=dtype != torch.float32,
            )
    yield CompileCase(
        kernel="merge_states",
        case="bfloat16 D128",
        config="",
        launch=_launch_merge,
        expect_tensor_cores=False,
    )


def decode_config(chip: str, dtype: torch.dtype, head_dim: int, case: dict[str, Any]) -> Any:
    """The config that a case gets on a chip."""
    from fastattn.kernels.attention.decode_config import (
        DecodeConfig,
        appends_itself,
        decode_tile,
    )

    tile = decode_tile(
        chip,
        head_dim,
        dtype,
        case.get("seqlen_q", 1) * _HEADS // _HEADS_KV,
        _modifiers(case, head_dim).num_modifiers,
        quantized="stored" in case,
        paged="block_table" in case,
        rotary="rotary" in case,
    )
    config = DecodeConfig(
        tile.block_m,
        tile.block_n,
        tile.num_warps,
        tile.num_stages,
        max_registers=tile.max_registers,
        appends=appends_itself(chip, dtype),
    )
    splits = case.get("num_splits", 1)
    return replace(config, num_splits=splits, last_combines=case.get("last_combines", False))


def _modifiers(case: dict[str, Any | Callable[[], Any]], head_dim: int) -> Any:
    from fastattn.kernels.attention import Modifiers

    made = {
        name: value() if callable(value) else value
        for name, value in case.items()
        if name not in _OF_CACHE
    }
    return Modifiers(softmax_scale=head_dim**-0.5, **made)


def _cache(dtype: torch.dtype, head_dim: int, case: dict[str, Any]) -> Any:
    from fastattn.kernels.attention import CachedKeys

    seqlen_new = case.get("seqlen_q", 1)
    stored = case.get("stored", dtype)
    rows = (_BATCH, _CAPACITY, _HEADS_KV)
    if block_size := case.get("block_size"):
        rows = (64, block_size, _HEADS_KV)
    k, v = (torch.empty(*rows, head_dim, dtype=stored) for _ in range(2))
    k_scale, v_scale, k_new, v_new = None, None, None, None
    if stored != dtype:
        shape = rows if case.get("per_token") else rows[2:]
        k_scale, v_scale = torch.empty(shape), torch.empty(shape)
    if case.get("new", True):
        k_new, v_new = (
            torch.empty(_BATCH, seqlen_new, _HEADS_KV, head_dim, dtype=dtype) for _ in range(2)
        )
    cos, sin, positions = None, None, None
    if rotary := case.get("rotary"):
        cos, sin = torch.empty(4096, head_dim // 2), torch.empty(4096, head_dim // 2)
        if case.get("positions"):
            positions = torch.zeros(_BATCH, seqlen_new, dtype=torch.int32)
    table = case.get("block_table")
    return CachedKeys(
        k, v, k_scale, v_scale, k_new, v_new, _lengths(), None if table is None else table(),
        cos, sin, positions, rotary == "pairs",
    )  # fmt: skip


def launch_decode(dtype: torch.dtype, head_dim: int, case: dict[str, Any], config: Any) -> None:
    """Launches the decoding kernels on empty tensors, for a compiler that runs nothing."""
    from fastattn.kernels.attention import launch_attention_decode

    seqlen_q, parts = case.get("seqlen_q", 1), config.num_splits * _BATCH
    q, out = (torch.empty(_BATCH, seqlen_q, _HEADS, head_dim, dtype=dtype) for _ in range(2))
    launch_attention_decode(
        q,
        _cache(dtype, head_dim, case),
        out,
        torch.empty(_BATCH, _HEADS, seqlen_q),
        _modifiers(case, head_dim),
        config,
        partial_out=torch.empty(parts, seqlen_q, _HEADS, head_dim),
        partial_lse=torch.empty(parts, _HEADS, seqlen_q),
        counters=torch.empty(1024, dtype=torch.int32),
    )


def _launch_merge() -> None:
    from fastattn.kernels.attention import launch_merge_states

    out = torch.empty(_BATCH, 16, _HEADS, 128, dtype=torch.bfloat16)
    lse = torch.empty(_BATCH, _HEADS, 16)
    launch_merge_states(out, lse, out, lse, out.clone(), lse.clone())
