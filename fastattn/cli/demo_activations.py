"""The decoding kernels on one layer's real queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from fastattn.cli.demo_console import console, progress, verdict
from fastattn.cli.demo_generation import generate_cached
from fastattn.cli.demo_llama import LlamaDecoder
from fastattn.nn import KVCache
from fastattn.rotary import Rotary
from fastattn.testing import compare

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Activations:
    """What one layer was called with: for prompts that are padded on their right, then a step.

    Attributes:
        lengths: of the prompts.
        prompt, step: q (batch, seqlen, num_heads, head_dim), k and v of each call, not rotated.
        rotary: the model's.
    """

    lengths: list[int]
    prompt: tuple[Tensor, Tensor, Tensor]
    step: tuple[Tensor, Tensor, Tensor]
    rotary: Rotary

    def attend_step(self, dtype: torch.dtype, impl: str, quantization: str | None = None) -> Tensor:
        """The decoding step, (batch, 1, num_heads, head_dim), from inputs rounded to bfloat16."""
        cache = self._cache(len(self.lengths), dtype, quantization)
        _, k, v = self._rounded(self.prompt, dtype)
        cache.append(0, k, v, rotary=self.rotary, impl=impl)
        cache.advance(self.lengths)
        q, k, v = self._rounded(self.step, dtype)
        return self._attend(cache, q, k, v, impl)

    def attend_prompt(self, dtype: torch.dtype, impl: str) -> Tensor:
        """The shortest prompt, (1, its length, num_heads, head_dim)."""
        row = self.lengths.index(min(self.lengths))
        one = tuple(t[row : row + 1, : self.lengths[row]] for t in self.prompt)
        q, k, v = self._rounded(one, dtype)
        return self._attend(self._cache(1, dtype, None), q, k, v, impl)

    def _attend(self, cache: KVCache, q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
        out = cache.attention(0, q, k, v, rotary=self.rotary, causal=True, impl=impl)
        assert isinstance(out, Tensor)  # return_lse was not asked for
        return out

    def _cache(self, rows: int, dtype: torch.dtype, quantization: str | None) -> KVCache:
        _, k, _ = self.prompt
        _, seqlen, *heads = k.shape
        return KVCache(
            1, rows, seqlen + 1, *heads, dtype=dtype, device=k.device, quantization=quantization
        )

    @staticmethod
    def _rounded(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
        # The same numbers for every dtype, so that float64 is exact for all of them.
        return [t.bfloat16().to(dtype) for t in tensors]


class _RecordingCache(KVCache):
    """Keeps what one layer is called with."""

    def __init__(self, watched: int, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.watched = watched
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def attention(self, layer: int, q: Tensor, *kv: Any, **options: Any) -> Any:
        if layer == self.watched:
            self.calls.append((q, *kv))
        return super().attention(layer, q, *kv, **options)


def record_activations(decoder: LlamaDecoder, layer: int, prompts: list[list[int]]) -> Activations:
    """What a layer attends with, for a batch of prompts and the step after them."""
    lengths = [len(prompt) for prompt in prompts]
    cache = _RecordingCache(
        layer, decoder.num_layers, len(prompts), max(lengths) + 1, decoder.num_heads_kv,
        decoder.head_dim, dtype=decoder.dtype, device=decoder.device,
    )  # fmt: skip
    generate_cached(decoder, cache, prompts, 2)
    prompt, step = cache.calls
    return Activations(lengths, prompt, step, decoder.rotary)


def check_activations(recorded: Activations) -> bool:
    """Prints the kernels' errors by the parity rule, and what a quantized cache adds to them."""
    table = Table("", "dtype", header_style="bold", box=None, pad_edge=False)
    for name in ("error of fastattn", "of plain torch", ""):
        table.add_column(name, justify="right")
    longest, shortest = max(recorded.lengths), min(recorded.lengths)
    calls = {
        f"a step of {len(recorded.lengths)} rows, the longest {longest + 1}": recorded.attend_step,
        f"a prompt of {shortest} tokens": recorded.attend_prompt,
    }
    passed = True
    errors = {}
    with progress() as bar:
        task = bar.add_task("running kernels", total=len(calls) * len(DTYPES) + 3)
        for name, attend in calls.items():
            exact = attend(torch.float64, "reference")
            for dtype_name, dtype in DTYPES.items():
                part = compare(attend(dtype, "triton"), attend(dtype, "reference"), exact)
                shown = (f"{part.max_error:.1e}", f"{part.baseline_max_error:.1e}")
                table.add_row(name, dtype_name, *shown, verdict(part.passed))
                passed &= part.passed
                bar.update(task, advance=1)
        out = recorded.attend_step(torch.bfloat16, "triton").double()
        bar.update(task, advance=1)
        for quantization in ("int8", "fp8"):
            quantized = recorded.attend_step(torch.bfloat16, "triton", quantization)
            errors[quantization] = _rms(quantized - out) / _rms(out)
            bar.update(task, advance=1)
    console.print(table)
    stated = ", ".join(f"{name} {error:.2%}" for name, error in errors.items())
    console.print(
        f"int8 and fp8 (e4m3) caches, a scale a token and head: error stated against the 16-bit "
        f"cache (bf16), RMS(out_q - out) / RMS(out): {stated}"
    )
    return passed


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()
