"""Times one case: all providers in turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.profiling.batches import Batch
from fastattn.profiling.clocks import make_clock
from fastattn.profiling.counts import Counts
from fastattn.profiling.memory import PeakMemory, storage_bytes
from fastattn.profiling.operators import measure_shares
from fastattn.profiling.providers import Decoding, Provider, weight_bytes
from fastattn.profiling.results import (
    Case,
    Ceilings,
    Memory,
    Phase,
    Row,
    Shares,
    Timing,
    Work,
    describe,
)

WARM_UP_STEPS = 4
PROFILED_STEPS = 4
LEAST_PASSES = 5
"""Timed forward passes of an encoder, at least: `repeats` of them, times this."""


@dataclass
class Runs:
    """What the timed runs of one provider gave.

    Attributes:
        first_ms: prompts to the first token, or a forward pass; one a run.
        steps_ms: the steps of decoding after it, a list a run.
        tokens: (rows, new tokens) of the last run.
        error: what it raised, if it did.
    """

    first_ms: list[float] = field(default_factory=list)
    steps_ms: list[list[float]] = field(default_factory=list)
    tokens: Tensor | None = None
    error: str | None = None


def time_case(
    case: Case,
    batch: Batch,
    providers: Sequence[Provider],
    repeats: int,
    tick: Callable[[str], None] = lambda text: None,
) -> dict[str, Runs]:
    """Times a case with all providers in turns, `repeats` times after a warm-up.

    Args:
        tick: called before each run, with what it is.

    Returns:
        By provider's name. One that raises is not run again.
    """
    runs = {provider.name: Runs() for provider in providers}
    for turn in range(repeats + 1):
        for provider in providers:
            found = runs[provider.name]
            if found.error is not None:
                continue
            tick(f"{provider.name}, {case}" + ("" if turn else ", warm-up"))
            try:
                with torch.no_grad(), provider.active():
                    _time_once(provider, batch, case, found, warm_up=not turn)
            except Exception as error:
                found.error = describe(error)
    return runs


def _time_once(provider: Provider, batch: Batch, case: Case, runs: Runs, warm_up: bool) -> None:
    device = batch.ids.device
    if not case.new_tokens:
        clock = make_clock(device)
        clock.mark()
        for _ in range(1 if warm_up else LEAST_PASSES):
            provider.encode(batch.ids, batch.mask)
            clock.mark()
        if not warm_up:
            runs.first_ms += clock.intervals_ms()
        return
    steps = case.new_tokens - 1
    steps = min(steps, WARM_UP_STEPS) if warm_up else steps
    clock = make_clock(device)
    clock.mark()
    _, decoding = provider.start(batch.ids, case.new_tokens)
    clock.mark()
    clock.pause()
    decoding.prepare()
    chosen = [decoding.tokens.clone()]
    clock.mark()
    for _ in range(steps):
        decoding.step()
        chosen.append(decoding.tokens.clone())
        clock.mark()
    if warm_up:
        return
    first, *rest = clock.intervals_ms()
    runs.first_ms.append(first)
    runs.steps_ms.append(rest)
    runs.tokens = torch.cat(chosen, 1)


def look_closer(provider: Provider, batch: Batch, case: Case) -> tuple[Memory, tuple[Shares, ...]]:
    """Memory at its peak and shares of time, in runs of their own: looking slows a run down."""
    device = batch.ids.device
    weights = weight_bytes(provider.model)
    with torch.no_grad(), provider.active():
        state: dict[str, Any] = {}

        def prefill() -> None:
            state.clear()
            if case.new_tokens:
                state["decoding"] = provider.start(batch.ids, case.new_tokens)[1]
            else:
                provider.encode(batch.ids, batch.mask)

        with PeakMemory(device) as memory:
            prefill()
            decoding: Decoding | None = state.get("decoding")
            if decoding is not None:
                decoding.prepare()
                for _ in range(case.new_tokens - 1):
                    decoding.step()
            cache = storage_bytes(decoding.cache_tensors()) if decoding is not None else 0
        state.clear()
        del decoding
        if not case.new_tokens:
            shares, held = measure_shares("forward", prefill, 1, device)
            found = [shares]
        else:
            found, held = _shares_of_phases(prefill, state, case, device)
    if device.type == "cuda":
        activations = memory.peak - memory.before - cache
    else:
        activations = held
    return (
        Memory(memory.peak, memory.source, weights, cache, max(activations, 0)),
        tuple(found),
    )


def _shares_of_phases(
    prefill: Callable[[], None], state: dict[str, Any], case: Case, device: torch.device
) -> tuple[list[Shares], int]:
    """Of prefill and a few steps; and the bytes that they hold at once beside the cache."""
    shares, held = measure_shares("prefill", prefill, 1, device)
    found, decoding = [shares], state["decoding"]
    held -= storage_bytes(decoding.cache_tensors())
    steps = min(PROFILED_STEPS, case.new_tokens - 1)
    if steps:
        decoding.prepare()
        before = storage_bytes(decoding.cache_tensors())
        shares, of_steps = measure_shares("decode", decoding.step, steps, device)
        found.append(shares)
        grown = storage_bytes(decoding.cache_tensors()) - before
        held = max(held, of_steps - grown)
    return found, held


def make_row(
    provider: str, case: Case, batch: Batch, runs: Runs, counts: Counts, ceilings: Ceilings
) -> Row:
    """The figures of timed runs."""
    rows, lengths = case.batch, batch.lengths
    first = Timing.of(runs.first_ms)
    prefill = Phase.of(first, sum(lengths), counts.prefill(lengths), ceilings)
    if not case.new_tokens:
        per_s = 1e3 / first.p50_ms
        return Row(
            provider, case, prefill, tokens_per_s=prefill.tokens_per_s, texts_per_s=rows * per_s
        )
    whole_ms = statistics.median(
        begin + sum(steps) for begin, steps in zip(runs.first_ms, runs.steps_ms, strict=True)
    )
    decode, request = None, None
    if case.new_tokens > 1:
        timing = Timing.of([ms for steps in runs.steps_ms for ms in steps])
        decode = Phase.of(timing, rows, _mean_step(counts, case, lengths), ceilings)
        request = 1e3 / timing.p50_ms
    return Row(
        provider, case, prefill, decode,
        tokens_per_s_request=request,
        tokens_per_s=rows * case.new_tokens * 1e3 / whole_ms,
        texts_per_s=rows * 1e3 / whole_ms,
        step_ms=tuple(statistics.median(times) for times in zip(*runs.steps_ms, strict=True)),
    )  # fmt: skip


def _mean_step(counts: Counts, case: Case, lengths: Sequence[int]) -> Work:
    """Over the steps of a run."""
    before = counts.cached(case.prompt)
    works = [counts.step(lengths, before + step) for step in range(case.new_tokens - 1)]
    parts = [(work.flops, work.weight_bytes, work.cache_bytes) for work in works]
    return Work(*(statistics.fmean(part) for part in zip(*parts, strict=True)))


def release() -> None:
    """Gives memory back between cases."""
    with contextlib.suppress(RuntimeError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
