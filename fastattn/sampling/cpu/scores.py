"""Scores of some rows as NumPy sees them: penalties, bias, bans and temperature.

What is sparse is done to the tokens it concerns, and a row without any of it is not copied.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastattn.sampling.params import TINY_TEMPERATURE
from fastattn.sampling.problem import SampleProblem

_local = threading.local()


def scratch(name: str, *shape: int) -> NDArray:
    """A float32 array of this thread, used again: fresh pages cost more than a pass over it."""
    buffers: dict[str, NDArray] = _local.__dict__.setdefault("buffers", {})
    size = math.prod(shape)
    if name not in buffers or buffers[name].size < size:
        buffers[name] = np.empty(size, dtype=np.float32)
    return buffers[name][:size].reshape(shape)


def few_places(flags: NDArray) -> NDArray:
    """Where flags, bool (n,), are set: `flatnonzero`, but quick where few are.

    Eight flags are looked at at once.
    """
    end = len(flags) // 8 * 8
    words = flags[:end].view(np.uint64).nonzero()[0]
    word, bit = flags[:end].reshape(-1, 8)[words].nonzero()
    places = words[word] * 8 + bit
    if end == len(flags):
        return places
    return np.concatenate((places, end + flags[end:].nonzero()[0]))


@dataclass(frozen=True, eq=False)
class Settings:
    """The numbers of each row, as arrays (batch,); what is off is neutral."""

    temperature: NDArray  # float32, 1 where greedy
    greedy: NDArray  # bool
    top_k: NDArray  # int64, vocab_size where off
    top_p: NDArray  # float64, inf where off
    min_p: NDArray  # float32
    least: NDArray  # int64, in 1..vocab_size
    repetition: NDArray | None  # float32, None where off for all
    presence: NDArray | None
    frequency: NDArray | None
    uncut: NDArray  # bool, nothing is cut at all
    cuts_mass_of_all: NDArray  # bool, top_p is a share of all tokens' mass
    joint: bool
    # Whether any row has one at all.
    divides: bool
    cuts_mass: bool
    cuts_ratio: bool
    keeps_several: bool

    @staticmethod
    def of(problem: SampleProblem) -> Settings:
        """From a problem, as `SamplingParams` says; made once where all are host values."""
        params = problem.params
        if params.row_tensors:
            return Settings._make(problem)
        key = ("settings", problem.batch, problem.vocab_size)
        if key not in params._made:
            params._made[key] = Settings._make(problem)
        made: Settings = params._made[key]
        return made

    @staticmethod
    def _make(problem: SampleProblem) -> Settings:
        vocab_size = problem.vocab_size

        def rows(name: str, dtype: type) -> NDArray:
            value = problem.setting(name)
            if isinstance(value, torch.Tensor):
                return value.detach().numpy().astype(dtype)
            return np.full(problem.batch, value, dtype=dtype)

        temperature = rows("temperature", np.float32)
        greedy = temperature < np.float32(TINY_TEMPERATURE)
        temperature[greedy] = 1
        least = np.minimum(rows("min_tokens_to_keep", np.int64), vocab_size)
        top_k = rows("top_k", np.int64)
        top_k = np.where((top_k < 1) | (top_k > vocab_size), vocab_size, np.maximum(top_k, least))
        top_p = rows("top_p", np.float32).astype(np.float64)
        top_p[top_p >= 1] = np.inf
        min_p = rows("min_p", np.float32)
        params = problem.params
        all_k, all_p = top_k >= vocab_size, np.isinf(top_p)
        return Settings(
            temperature, greedy, top_k, top_p, min_p, least,
            rows("repetition_penalty", np.float32) if params.needs_seen else None,
            rows("presence_penalty", np.float32) if params.needs_counts else None,
            rows("frequency_penalty", np.float32) if params.needs_counts else None,
            all_k & all_p & (min_p <= 0), ~all_p & (all_k | params.joint),
            params.joint, bool((temperature != 1).any()), bool((~all_p).any()),
            bool((min_p > 0).any()), bool((least > 1).any()),
        )  # fmt: skip

    def take(self, rows: slice) -> Settings:
        """Those of some rows."""
        if rows.stop - rows.start == len(self.top_k):
            return self
        taken: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            taken[item.name] = value[rows] if isinstance(value, np.ndarray) else value
        return Settings(**taken)


def scores(problem: SampleProblem, settings: Settings, rows: slice) -> NDArray:
    """Processed scores of some rows over the temperature: float32 (rows, vocab_size).

    To be read only: it may be the caller's logits.
    """
    logits = problem.logits[rows]
    given = (logits if logits.dtype == torch.float32 else logits.float()).numpy()
    temperature = settings.temperature[rows, None]
    if not _changes(problem):
        if not settings.divides:
            return given
        return np.divide(given, temperature, out=scratch("scores", *given.shape))
    values = scratch("scores", *given.shape)
    params = problem.params
    if settings.repetition is not None and not _changes_more(problem):
        # The commonest: divided while copied, and only what was seen is computed anew.
        np.divide(given, temperature, out=values)
        row, token = _seen(problem, rows)
        values[row, token] = _repeated(settings, rows, row, given[row, token]) / temperature[row, 0]
        return values
    np.copyto(values, given)
    _penalize(problem, settings, rows, values)
    if isinstance(params.logit_bias, dict):
        tokens, bias = problem.listed_bias()
        values[:, tokens.numpy()] += bias.numpy()
    elif params.logit_bias is not None:
        dense = problem.dense_bias()
        assert dense is not None
        values += dense.numpy() if dense.shape[0] == 1 else dense[rows].numpy()
    if isinstance(params.banned, torch.Tensor):
        banned = params.banned.view(-1, problem.vocab_size)
        banned = banned if banned.shape[0] == 1 else banned[rows]
        np.copyto(values, -np.inf, where=banned.numpy())
    elif params.banned is not None:
        values[:, problem.listed_bans().numpy()] = -np.inf
    if params.allowed is not None:
        allowed = params.allowed if params.allowed.shape[0] == 1 else params.allowed[rows]
        bits = _bits(allowed.numpy()).reshape(len(allowed), -1)[:, : problem.vocab_size]
        np.copyto(values, -np.inf, where=bits == 0)
    if settings.divides:
        np.divide(values, temperature, out=values)
    return values


def _changes(problem: SampleProblem) -> bool:
    return problem.params.needs_seen or _changes_more(problem)


def _changes_more(problem: SampleProblem) -> bool:
    params = problem.params
    return (
        params.needs_counts
        or params.logit_bias is not None
        or params.banned is not None
        or params.allowed is not None
    )


def _penalize(problem: SampleProblem, settings: Settings, rows: slice, values: NDArray) -> None:
    if settings.repetition is not None:
        row, token = _seen(problem, rows)
        values[row, token] = _repeated(settings, rows, row, values[row, token])
    if settings.presence is not None and settings.frequency is not None:
        assert problem.state is not None and problem.state.counts is not None
        counts = problem.state.counts[rows].numpy()
        row, token = np.divmod(few_places((counts != 0).ravel()), counts.shape[1])
        count = counts[row, token]
        presence = settings.presence[rows][row] * (count > 0)
        frequency = settings.frequency[rows][row] * count.astype(np.float32)
        values[row, token] -= presence + frequency


def _seen(problem: SampleProblem, rows: slice) -> tuple[NDArray, NDArray]:
    """Row and token of all that was seen, int64 (n,) each."""
    assert problem.state is not None
    seen = problem.state.seen.numpy()[rows]
    words = (seen != 0).ravel().nonzero()[0]
    word, bit = _bits(seen.ravel()[words]).reshape(-1, 32).nonzero()
    word = words[word]
    row = word // seen.shape[1]
    return row, (word - row * seen.shape[1]) * 32 + bit


def _repeated(settings: Settings, rows: slice, row: NDArray, values: NDArray) -> NDArray:
    assert settings.repetition is not None
    penalty = settings.repetition[rows][row]
    return np.where(values > 0, values / penalty, values * penalty)


def _bits(words: NDArray) -> NDArray:
    """The bits of int32 words one after another, uint8 (32 * words,)."""
    little = np.ascontiguousarray(words, dtype="<i4")
    return np.unpackbits(little.view(np.uint8), bitorder="little")
