"""The public function: opens a model, checks all that can be checked, then measures."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn.profiling.batches import Batch, make_batch
from fastattn.profiling.ceilings import best, measure_ceilings
from fastattn.profiling.counts import Counts, MeasuredCounts, count
from fastattn.profiling.measure import Runs, look_closer, make_row, release, time_case
from fastattn.profiling.operators import write_trace
from fastattn.profiling.parity import References, samples, wide_dtype
from fastattn.profiling.providers import NAMES, Ours, Provider, Stock, check_names
from fastattn.profiling.results import Case, Ceilings, Parity, Profile, Row, describe
from fastattn.profiling.stock import make_stock
from fastattn.profiling.subject import Subject, check_memory, count_parameters, open_subject
from fastattn.profiling.sweep import make_cases

Progress = Callable[[int, int, str], None]
"""Called with how many parts of the work are done, of how many, and what comes now."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRACED_STEPS = 4


@dataclass(frozen=True)
class Plan:
    """All that was asked for, checked.

    Attributes:
        subject: the model.
        cases: to measure.
        providers: by name, in order.
        dtype, device: of the weights.
        repeats: timed runs.
        trace: file to write a trace of the first case to; None: none.
    """

    subject: Subject
    cases: tuple[Case, ...]
    providers: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    repeats: int
    trace: Path | None


def profile(
    model: str | os.PathLike[str] | nn.Module | None = None,
    *,
    random: str | None = None,
    cases: Sequence[Case] | None = None,
    providers: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    repeats: int = 3,
    trace: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Profiles a model: latency, throughput, utilization, memory, and where the time goes.

        profile("path/to/llama", cases=[Case(batch=4, prompt=128, new_tokens=64)])
        profile(random="bert-base", cases=[Case(8, 128, padding=0.5)]).save("bert.json")

    Every provider is first compared with the stock model and with float64 (see `parity.py`): one
    whose outputs are wrong has its error in place of its figures. Then all providers take turns,
    `repeats` times after a warm-up; medians are kept, and percentiles. Ceilings are measured in the
    same run, before and after, and the higher ones count. Memory and shares of time come from runs
    of their own, since looking slows them down.

    Args:
        model: a Hugging Face folder, a GGUF file, or a model in memory of `fastattn.models` or of
            transformers, which is then profiled as it is, on its device.
        random: instead, the name of known shapes, with random weights (`PRESETS`).
        cases: what to measure; default: batches of 1, 128 tokens, and 32 new ones; of an encoder
            batches of 8, without padding and with half of it.
        providers: "fastattn" (`fastattn.models`), "transformers" (its own loop over SDPA and its
            default cache), "transformers+fastattn" (its model with our attention; encoders without
            padding). Default: the first two, of an encoder all three; of a model that
            `fastattn.models` does not have the last two; of a model in memory what it is.
        dtype: "fp32", "fp16" or "bf16" of the weights; default fp32 on a CPU, bf16 on a GPU.
        device: default: cuda if there is one.
        repeats: timed runs of each case.
        trace: file for a Chrome trace of the first case, where several providers are measured one a
            provider, with its name before the suffix.
        progress: called as the work goes on.

    Raises:
        ValueError, FileNotFoundError: an argument is not as described, a case is longer than the
            model's positions, or memory will not do (`TooLargeError`): before a weight is made.
        OSError: the trace cannot be written there.
    """
    plan = make_plan(
        open_subject(model, random=random), cases=cases, providers=providers, dtype=dtype,
        device=device, repeats=repeats, trace=trace,
    )  # fmt: skip
    return run_plan(plan, progress or (lambda done, total, text: None))


def make_plan(
    subject: Subject,
    *,
    cases: Sequence[Case] | None = None,
    providers: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    repeats: int = 3,
    trace: str | os.PathLike[str] | None = None,
) -> Plan:
    """Checks all arguments of `profile`; nothing heavy."""
    place = _device(subject, device)
    kind = _dtype(subject, dtype, place)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    cases = tuple(make_cases(subject.kind) if cases is None else cases)
    for case in cases:
        check_case(case, subject.kind)
        subject.check(case)
    names = tuple(_default_providers(subject) if providers is None else providers)
    check_names(names, subject.is_ours, subject.why_not_ours)
    path = None if trace is None else Path(trace)
    if path is not None:
        check_writable("trace", path)
    stock = any(name != "fastattn" for name in names)
    # Of a model that only transformers has there is one copy, whatever computes its attention.
    shares = not subject.is_ours or kind != torch.float32 or place.type != "cpu"
    copies = 2 if stock and "fastattn" in names and not shares else 1
    check_memory(subject, kind, place, copies, max(_cache_bytes(subject, kind, c) for c in cases))
    return Plan(subject, cases, names, kind, place, repeats, path)


def check_case(case: Case, kind: str) -> None:
    """Raises ValueError where a case makes no sense for a kind of model."""
    for name in ("batch", "prompt"):
        if getattr(case, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(case, name)}")
    if kind == "encoder" and case.new_tokens:
        raise ValueError(f"new_tokens must be 0: an encoder makes none, got {case.new_tokens}")
    if kind != "encoder" and case.new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {case.new_tokens}")
    if kind != "encoder" and case.padding:
        raise ValueError(f"padding must be 0: only encoders are given any, got {case.padding}")
    if not 0 <= case.padding < 1:
        raise ValueError(f"padding must lie in [0, 1), a share of the batch, got {case.padding}")


def check_writable(name: str, path: Path) -> None:
    """Raises OSError unless a file can be written there. Leaves nothing behind."""
    existed = path.exists()
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise OSError(f"{name} must be a file that can be written, got {path}: {error}") from error
    if not existed:
        path.unlink()


def _device(subject: Subject, device: str | torch.device | None) -> torch.device:
    if subject.model is not None:
        return next(subject.model.parameters()).device
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {chosen}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu, since torch finds no CUDA device; got cuda")
    return chosen


def _dtype(subject: Subject, dtype: str | None, device: torch.device) -> torch.dtype:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if subject.model is not None:
        return next(subject.model.parameters()).dtype
    return DTYPES[dtype or ("fp32" if device.type == "cpu" else "bf16")]


def _default_providers(subject: Subject) -> Sequence[str]:
    if subject.is_ours:
        return NAMES if subject.kind == "encoder" else NAMES[:2]
    return NAMES[1:]


def _cache_bytes(subject: Subject, dtype: torch.dtype, case: Case) -> float:
    """Of keys and values at the end of a case, by the formulas; 0 where there are none."""
    if subject.kind == "encoder" or not subject.is_ours:
        return 0.0
    counts = count(subject.meta())
    last = counts.step([case.prompt] * case.batch, counts.cached(case.prompt) + case.new_tokens - 1)
    itemsize = next(iter(subject.meta().parameters())).element_size()
    return last.cache_bytes * dtype.itemsize / itemsize


# ---- measuring


def run_plan(plan: Plan, progress: Progress) -> Profile:
    """Loads, compares, measures."""
    subject, device = plan.subject, plan.device
    total = len(plan.cases) * (1 + len(plan.providers) * (plan.repeats + 2)) + 3
    done = 0

    def tick(text: str) -> None:
        nonlocal done
        progress(done, total, text)
        done += 1

    tick(f"loading {subject.name}")
    ours, stock = _load(plan)
    providers = _make_providers(plan, ours, stock)
    counts: Counts = MeasuredCounts(Stock(stock), device) if ours is None else count(ours)
    verdicts, notes = _compare(plan, ours, stock, providers, tick)
    tick("ceilings")
    ceilings = measure_ceilings(device, plan.dtype)
    timed: dict[Case, dict[str, Runs]] = {}
    for case in plan.cases:
        timed[case] = time_case(case, _make_batch(plan, case), providers, plan.repeats, tick)
        release()
    tick("ceilings once more")
    ceilings = best(ceilings, measure_ceilings(device, plan.dtype))
    rows: list[Row] = []
    for case, runs in timed.items():
        for provider in providers:
            tick(f"{provider.name}, {case}, memory and operators")
            parity = _with_tokens(verdicts[case].get(provider.name), provider.name, runs)
            batch, own = _make_batch(plan, case), runs[provider.name]
            rows.append(_finish(provider, case, batch, own, parity, counts, ceilings))
        release()
    if plan.trace is not None:
        case = plan.cases[0]
        _write_traces(plan.trace, providers, case, _make_batch(plan, case))
    progress(total, total, "done")
    model = ours if ours is not None else stock
    return Profile(
        model=subject.name, kind=subject.kind, dtype=str(plan.dtype).removeprefix("torch."),
        device=_describe_device(device), parameters=count_parameters(model), repeats=plan.repeats,
        environment=_environment(device), ceilings=ceilings, rows=tuple(rows),
        counted=counts.source, notes=tuple(notes),
    )  # fmt: skip


def _load(plan: Plan) -> tuple[Any, Any]:
    """Our model and transformers', as far as the providers need them."""
    subject = plan.subject
    if not subject.is_ours:
        return None, subject.load_stock(plan.dtype, plan.device)
    ours = subject.load(plan.dtype, plan.device)
    wanted = any(name != "fastattn" for name in plan.providers)
    return ours, make_stock(ours) if wanted else None


def _make_providers(plan: Plan, ours: Any, stock: Any) -> list[Provider]:
    made: dict[str, Callable[[], Provider]] = {
        "fastattn": lambda: Ours(ours),
        "transformers": lambda: Stock(stock),
        "transformers+fastattn": lambda: Stock(stock, with_fastattn=True),
    }
    return [made[name]() for name in plan.providers]


def _pad_token(subject: Subject) -> int | None:
    token = subject.hf.get("pad_token_id")
    return token if isinstance(token, int) and 0 <= token < subject.vocab_size else None


def _compare(
    plan: Plan, ours: Any, stock: Any, providers: list[Provider], tick: Callable[[str], None]
) -> tuple[dict[Case, dict[str, Parity]], list[str]]:
    """The verdicts by case and provider's name, and what a reader should know of them."""
    verdicts: dict[Case, dict[str, Parity]] = {case: {} for case in plan.cases}
    if stock is None:
        return verdicts, ["not compared with the stock model, which is none of the providers"]
    wide = wide_dtype(stock if ours is None else ours, plan.dtype, plan.device)
    wider = None
    if wide is not None:
        wider = _widen(plan, wide) if ours is None else make_stock(ours, wide, "eager")
    references = References(Stock(stock), wider, plan.subject.kind)
    for case in plan.cases:
        tick(f"parity, {case}")
        batches = [_make_batch(plan, case, sample) for sample in range(samples(case.batch))]
        verdicts[case] = references.check(providers, batches, case.new_tokens)
    notes = [] if wide is not None else ["memory holds no wider model: tokens were compared alone"]
    return verdicts, notes


def _make_batch(plan: Plan, case: Case, sample: int = 0) -> Batch:
    subject = plan.subject
    return make_batch(case, subject.vocab_size, _pad_token(subject), plan.device, sample)


def _widen(plan: Plan, wide: torch.dtype) -> Any:
    """A model that only transformers has, in a wider dtype."""
    import copy

    subject = plan.subject
    if subject.model is not None:
        model: Any = copy.deepcopy(subject.model).to(wide)
    else:
        model = subject.load_stock(wide, plan.device)
    model.set_attn_implementation("eager")
    return model


def _with_tokens(parity: Parity | None, name: str, runs: dict[str, Runs]) -> Parity | None:
    """With the share of the timed runs' tokens that are the stock model's."""
    stock, own = (runs[one].tokens if one in runs else None for one in ("transformers", name))
    if parity is None or stock is None or own is None:
        return parity
    return replace(parity, same_tokens=float((stock == own).float().mean()))


def _finish(
    provider: Provider,
    case: Case,
    batch: Batch,
    runs: Runs,
    parity: Parity | None,
    counts: Counts,
    ceilings: Ceilings,
) -> Row:
    """The row of a provider: figures where its outputs are right, else its error."""
    if parity is not None and not parity.passed:
        return Row(provider.name, case, parity=parity, error=f"wrong outputs: {parity.text}")
    if runs.error is not None:
        return Row(provider.name, case, parity=parity, error=runs.error)
    try:
        row = make_row(provider.name, case, batch, runs, counts, ceilings)
        memory, shares = look_closer(provider, batch, case)
    except Exception as error:
        return Row(provider.name, case, parity=parity, error=describe(error))
    return replace(row, parity=parity, memory=memory, shares=shares)


def _write_traces(path: Path, providers: list[Provider], case: Case, batch: Batch) -> None:
    for provider in providers:
        own = path if len(providers) == 1 else trace_path(path, provider.name)
        state: dict[str, Any] = {}

        def prefill(provider: Provider = provider, state: dict[str, Any] = state) -> None:
            if case.new_tokens:
                state["decoding"] = provider.start(batch.ids, case.new_tokens)[1]
            else:
                provider.encode(batch.ids, batch.mask)

        def decode(state: dict[str, Any] = state) -> None:
            for _ in range(min(TRACED_STEPS, case.new_tokens - 1)):
                state["decoding"].step()

        with torch.no_grad(), provider.active():
            if case.new_tokens > 1:
                passes: dict[str, Callable[[], object]] = {"prefill": prefill, "decode": decode}
            else:
                passes = {"prefill" if case.new_tokens else "forward": prefill}
            write_trace(own, passes, batch.ids.device)


def trace_path(path: Path, provider: str) -> Path:
    """Where the trace of one of several providers goes."""
    return path.with_name(f"{path.stem}.{provider}{path.suffix}")


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return f"{name}, {torch.get_num_threads()} threads"


def _environment(device: torch.device) -> dict[str, str]:
    from fastattn import __version__

    found = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "fastattn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
    for name in ("transformers", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if device.type == "cuda" and torch.version.cuda:
        found["cuda"] = torch.version.cuda
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found["commit"] = subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], text=True, stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parent,
        ).strip()  # fmt: skip
    return found
