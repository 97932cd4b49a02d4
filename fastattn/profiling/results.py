"""What a profile is, as values: times, utilization, memory, shares; to and from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One batch of requests that is measured.

    Attributes:
        batch: requests, or texts.
        prompt: tokens of each (of an encoder with padding: of the longest).
        new_tokens: that each request gets; 0 for an encoder.
        padding: share of the batch that is padding, 0 to 1, encoders only.
    """

    batch: int = 1
    prompt: int = 128
    new_tokens: int = 0
    padding: float = 0.0

    def __str__(self) -> str:
        parts = [f"batch {self.batch}", f"prompt {self.prompt}"]
        if self.new_tokens:
            return ", ".join([*parts, f"{self.new_tokens} new"])
        return ", ".join([*parts, f"{self.padding:.0%} padding"])


@dataclass(frozen=True)
class Timing:
    """Samples of a time in milliseconds, by their percentiles (linear interpolation)."""

    samples: int
    mean_ms: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    p95_ms: float
    p99_ms: float

    @staticmethod
    def of(samples_ms: Sequence[float]) -> Timing:
        """Raises ValueError where there is no sample."""
        if not samples_ms:
            raise ValueError("samples_ms must have at least one time, got none")
        ordered = sorted(samples_ms)
        shares = (percentile(ordered, share) for share in (0.2, 0.5, 0.8, 0.95, 0.99))
        return Timing(len(ordered), statistics.fmean(ordered), *shares)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of sorted samples, interpolated as `numpy.percentile` does."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Work:
    """What a pass has to compute and to read, whatever an implementation makes of it.

    Attributes:
        flops: of matrix products, 2 a multiply-add.
        weight_bytes: of all weights that the pass needs, each once.
        cache_bytes: of keys and values in the cache that it reads, and writes.
    """

    flops: float
    weight_bytes: float
    cache_bytes: float

    @property
    def bytes(self) -> float:
        """Of weights and cache together."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Ceilings:
    """What the device did in this run, before or after the timed part: the higher rate of both.

    Attributes:
        copy_gb_per_s: a large copy, bytes read and written.
        matmul_tflops: a large square matrix product in the model's dtype.
        dtype, copy_mib, matmul_size: of the two.
    """

    copy_gb_per_s: float
    matmul_tflops: float
    dtype: str
    copy_mib: float
    matmul_size: int


@dataclass(frozen=True)
class Phase:
    """Prefill or decoding, or the forward pass of an encoder.

    Attributes:
        timing: of one pass: all prompts, or one token for every request.
        tokens: that a pass works on, padding not counted.
        work: of a pass; of decoding the mean over the steps.
        mbu: model bandwidth utilization, percent: `work.bytes` over the median time, as a share
            of the copy's rate. Reads alone can be faster than a copy: above 100 is possible.
        mfu: model FLOPs utilization, percent: `work.flops` over the median time, as a share of
            the matrix product's rate (Chowdhery et al., arXiv:2204.02311, appendix B). The work
            is that of the model, so an implementation that leaves out what nobody needs (the last
            layer's MLP of all but a prompt's last token) can be above 100.
    """

    timing: Timing
    tokens: float
    work: Work
    mbu: float
    mfu: float

    @staticmethod
    def of(timing: Timing, tokens: float, work: Work, ceilings: Ceilings) -> Phase:
        """From what was timed and what it had to do."""
        seconds = timing.p50_ms / 1e3
        return Phase(
            timing, tokens, work,
            mbu=100 * work.bytes / seconds / (ceilings.copy_gb_per_s * 1e9),
            mfu=100 * work.flops / seconds / (ceilings.matmul_tflops * 1e12),
        )  # fmt: skip

    @property
    def tokens_per_s(self) -> float:
        """Of all requests together, at the median time."""
        return self.tokens * 1e3 / self.timing.p50_ms


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a run, and what they are.

    Attributes:
        peak: see `source`.
        source: "allocated" (torch's CUDA allocator) or "RSS" (the whole process on a CPU, with
            libraries and whatever else it has loaded).
        weights, cache: of their tensors.
        activations: the rest of what torch's allocator held at once during the run; what libraries
            allocate by themselves (workspaces) is not in it.
    """

    peak: int
    source: str
    weights: int
    cache: int
    activations: int


@dataclass(frozen=True)
class Share:
    """One operator or kernel.

    Attributes:
        name: of the operator, or of the kernel.
        calls: in the profiled pass.
        ms: of all of them.
        percent: of the pass.
    """

    name: str
    calls: int
    ms: float
    percent: float


@dataclass(frozen=True)
class Shares:
    """Where the time of a phase goes, by torch.profiler, which itself slows a run down.

    Attributes:
        phase: "prefill", "decode" or "forward".
        wall_ms: of a pass under the profiler.
        operators: what the model's code called, with all that they called; on CUDA by the time of
            their kernels. What is left is the row `OUTSIDE`.
        kernels: on CUDA the device's kernels; on a CPU the operators that call no other one, and
            what the others do themselves.
    """

    phase: str
    wall_ms: float
    operators: tuple[Share, ...]
    kernels: tuple[Share, ...]


OUTSIDE = "(outside of operators)"
REST = "(all others)"
"""Rows of `Shares` that are no operator: what none accounts for, and the small ones together."""


@dataclass(frozen=True)
class Parity:
    """How a provider's outputs compare with the stock model's and with float64.

    Attributes:
        passed: whether the figures may be shown.
        text: the verdict in words.
        reference: "float64" or "float32", or "tokens" where memory holds no wider model.
        same_tokens: share of tokens of the timed runs that are the stock model's; None for an
            encoder.
    """

    passed: bool
    text: str
    reference: str
    same_tokens: float | None = None


@dataclass(frozen=True)
class Row:
    """One case with one provider.

    Attributes:
        provider: "fastattn", "transformers" or "transformers+fastattn".
        prefill: prompts to the first token, or the forward pass of an encoder; None with an error.
        decode: token by token; None for an encoder, or with an error.
        tokens_per_s_request: that one request sees after its first token.
        tokens_per_s: new tokens of all requests over the whole time, first token included; of an
            encoder its tokens, padding not counted.
        texts_per_s: requests or texts finished.
        step_ms: median time of each step of decoding, in order.
        memory, shares, parity: see there.
        error: in place of all figures: what was raised, or what is wrong with the outputs.
    """

    provider: str
    case: Case
    prefill: Phase | None = None
    decode: Phase | None = None
    tokens_per_s_request: float | None = None
    tokens_per_s: float | None = None
    texts_per_s: float | None = None
    step_ms: tuple[float, ...] = ()
    memory: Memory | None = None
    shares: tuple[Shares, ...] = ()
    parity: Parity | None = None
    error: str | None = None


@dataclass(frozen=True)
class Profile:
    """All that was measured of a model; `save` and `load` it, and draw it from there.

    Attributes:
        model: its name.
        kind: "decoder", "encoder" or "encoder-decoder".
        dtype, device: of the weights; the device's name.
        parameters: how many.
        repeats: timed runs of each row.
        environment: versions, threads, date, commit.
        ceilings: of this device, in this run.
        rows: in the order in which they were measured.
        counted: where FLOPs and bytes come from.
        notes: what a reader should know.
    """

    model: str
    kind: str
    dtype: str
    device: str
    parameters: int
    repeats: int
    environment: Mapping[str, str]
    ceilings: Ceilings
    rows: tuple[Row, ...]
    counted: str
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every row has figures."""
        return all(row.error is None for row in self.rows)

    @property
    def providers(self) -> tuple[str, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(row.provider for row in self.rows))

    @property
    def cases(self) -> tuple[Case, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(row.case for row in self.rows))

    def row(self, provider: str, case: Case) -> Row | None:
        """The row of a provider and a case."""
        found = (row for row in self.rows if (row.provider, row.case) == (provider, case))
        return next(found, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON."""
        text = json.dumps(_rounded(self.to_dict()), indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Profile:
        """From what `to_dict` gave."""
        return _build(Profile, values)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Profile:
        """From what `save` wrote."""
        return Profile.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def describe(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def _rounded(value: Any) -> Any:
    """Floats with six digits: more is noise, and makes files hard to read."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _build(kind: Any, value: Any) -> Any:
    """A value of a type of this module from plain values."""
    if value is None:
        return None
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{key: _build(hints[key], item) for key, item in value.items()})  # type: ignore[operator]
    if isinstance(kind, types.UnionType):  # X | None
        return _build(next(one for one in kind.__args__ if one is not type(None)), value)
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in value)
    return value
