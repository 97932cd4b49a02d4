"""Trains the small T5 through one implementation of attention and, beside it, through another.

Both start from the same weights and see the same batches. At every step the gradients of the
relative position tables are also computed by the other implementation, and in float64, at the
weights of the first: what differs there comes from one backward pass, not from the steps before.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from gettext_pairs import Batch, Example, collate
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from t5_small import Config, T5Small, loss, make_optimizer
from torch import Tensor

from fastattn.testing import compare

BATCH_SIZE = 4
LEARNING_RATE, TABLE_LEARNING_RATE = 3e-3, 3e-2
TABLES = ("encoder_table", "decoder_table")

# Small, so that Triton's interpreter is done soon; otherwise the model of the long training.
SMALL: dict[str, Any] = {"d_model": 64, "d_ff": 128, "num_heads": 2, "dropout": 0.0}


def progress_bar() -> Progress:
    """A bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def check_kernels(
    examples: Sequence[Example], config: Config, steps: int, device: str, seed: int, impl: str
) -> dict[str, Any]:
    """`train_beside_reference`, on the CPU in a process of its own.

    Kernels run there in Triton's interpreter, which must be chosen before Triton is imported.
    """
    arguments = (examples, config, steps, device, seed, impl)
    if device != "cpu":
        return train_beside_reference(*arguments)
    # NumPy multiplies the interpreter's tiles, which are too small to share out between threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_interpret
    ) as pool:
        return pool.submit(train_beside_reference, *arguments).result()


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def train_beside_reference(
    examples: Sequence[Example], config: Config, steps: int, device: str, seed: int, impl: str
) -> dict[str, Any]:
    """Losses of both trainings, and errors of the table gradients, one entry a step.

    Args:
        examples: to draw batches from.
        config: of the model, whose sizes are replaced by `SMALL`.
        steps: optimizer steps.
        device: where to train.
        seed: of weights and batches.
        impl: the implementation to compare with "reference".
    """
    torch.manual_seed(seed)
    ours = T5Small(replace(config, **SMALL)).to(device)
    other = copy.deepcopy(ours)
    optimizers = [
        make_optimizer(model, LEARNING_RATE, TABLE_LEARNING_RATE) for model in (ours, other)
    ]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    losses: dict[str, list[float]] = {"impl": [], "reference": []}
    tables: dict[str, dict[str, list[float]]] = {name: {} for name in TABLES}
    seconds = {"impl": 0.0, "reference": 0.0}
    with progress_bar() as bar:
        task = bar.add_task(f"training with impl={impl!r} and the reference", total=steps, note="")
        for step in range(steps):
            indices = (order[(step * BATCH_SIZE + i) % len(order)] for i in range(BATCH_SIZE))
            batch = collate([examples[index] for index in indices]).to(device)
            exact = _table_gradients(copy.deepcopy(ours).double(), batch, "reference")[1]
            plain = _table_gradients(ours, batch, "reference")[1]
            started = time.perf_counter()
            our_loss, gradients = _table_gradients(ours, batch, impl)
            seconds["impl"] += time.perf_counter() - started
            for name in TABLES:
                for key, value in _errors(gradients[name], plain[name], exact[name]).items():
                    tables[name].setdefault(key, []).append(value)
            started = time.perf_counter()
            other_loss = _table_gradients(other, batch, "reference")[0]
            seconds["reference"] += time.perf_counter() - started
            losses["impl"].append(our_loss)
            losses["reference"].append(other_loss)
            for optimizer in optimizers:
                optimizer.step()
            bar.update(task, advance=1, note=f"loss {our_loss:.2f}")
    return {
        "impl": impl,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "table_learning_rate": TABLE_LEARNING_RATE,
        "model": SMALL,
        "losses": losses,
        "table_gradients": tables,
        "tables_after": {name: _compare_tables(ours, other, name) for name in TABLES},
        "step_seconds": {name: total / steps for name, total in seconds.items()},
    }


def _table_gradients(model: T5Small, batch: Batch, impl: str) -> tuple[float, dict[str, Tensor]]:
    """The loss, and what the tables' gradients are; leaves all gradients in the model."""
    model.zero_grad()
    value = loss(model, batch, impl)
    value.backward()
    gradients = {name: getattr(model, name).grad.detach().clone() for name in TABLES}
    return value.item(), gradients


def _errors(actual: Tensor, plain: Tensor, exact: Tensor) -> dict[str, float]:
    """Of a gradient: relative to its norm, and whether the parity rule holds."""

    def relative(a: Tensor, b: Tensor) -> float:
        return ((a.double() - b.double()).norm() / exact.norm()).item()

    result = compare(actual, plain, exact)
    return {
        "norm": exact.norm().item(),
        "difference": relative(actual, plain),
        "error": relative(actual, exact),
        "reference_error": relative(plain, exact),
        "within_parity_rule": float(result.passed),
    }


def _compare_tables(ours: T5Small, other: T5Small, name: str) -> dict[str, float]:
    table, reference = (getattr(model, name).detach() for model in (ours, other))
    return {
        "largest_entry": table.abs().max().item(),
        "largest_difference": (table - reference).abs().max().item(),
    }
