"""What the compile report compiles of sampling: the kernel with few and with all operands."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastattn.testing.compile_report import CompileCase, Target

_BATCH = 8


def _seen(vocab_size: int) -> torch.Tensor:
    return torch.zeros(_BATCH, -(-vocab_size // 32), dtype=torch.int32)


def _everything(vocab_size: int) -> dict[str, Any]:
    """A number for each row, every penalty, a mask, and the most likely tokens."""
    one = torch.ones(_BATCH)
    names = (
        "temperature", "top_k", "top_p", "min_p", "min_tokens_to_keep", "repetition_penalty",
        "presence_penalty", "frequency_penalty",
    )  # fmt: skip
    return {
        **dict.fromkeys(names, one),
        "seed": torch.zeros(_BATCH, dtype=torch.int64),
        "seen": _seen(vocab_size),
        "allowed": _seen(vocab_size),
        "counts": torch.zeros(_BATCH, vocab_size, dtype=torch.int32),
        "bias": torch.zeros(1, vocab_size),
        "step": torch.zeros(_BATCH, dtype=torch.int64),
    }


def sample_cases(target: Target) -> Iterator[CompileCase]:
    """The sampling kernel: dtypes x vocabularies x what is asked of it, on one target."""
    from fastattn.kernels.sampling.config import FEW_ROWS, select_sample_config

    for dtype, vocab_size, name in (
        (torch.bfloat16, 128256, "plain"),
        (torch.bfloat16, 128256, "penalty, state"),
        (torch.bfloat16, 128256, "everything"),
        (torch.float16, 151936, "penalty, state"),
        (torch.float32, 32000, "plain"),
        (torch.float32, 50257, "everything"),
        (torch.float32, 100, "penalty, state"),
    ):
        top_n = 5 if name == "everything" else 0
        many, few = (
            select_sample_config(target.name, vocab_size, top_n, batch)
            for batch in (FEW_ROWS + 1, FEW_ROWS)
        )
        for config, rows in ((many, ""), (few, ", few rows"))[: 1 if few == many else 2]:
            yield CompileCase(
                kernel="sample",
                case=f"{str(dtype).removeprefix('torch.')} V{vocab_size} {name}{rows}",
                config=config,
                launch=partial(launch, dtype, vocab_size, name, top_n, config),
                expect_tensor_cores=False,
            )


def launch(dtype: torch.dtype, vocab_size: int, name: str, top_n: int, config: Any) -> None:
    """Launches the sampling kernel on empty tensors, for a compiler that runs nothing."""
    from fastattn.kernels.sampling import Sampling, launch_sample

    seed = 5 if name == "plain" else 2**40
    settings: dict[str, Any] = {"top_k": 50.0, "top_p": 0.9, "seed": seed}
    if name == "penalty, state":
        steps = torch.zeros(_BATCH, dtype=torch.int64)
        settings |= {"repetition_penalty": 1.2, "seen": _seen(vocab_size), "step": steps}
    elif name == "everything":
        settings = _everything(vocab_size)
    launch_sample(
        torch.empty(_BATCH, vocab_size, dtype=dtype),
        Sampling(**settings),
        torch.empty(_BATCH, dtype=torch.int64),
        torch.zeros(_BATCH, dtype=torch.int32),
        logprobs=torch.empty(_BATCH) if top_n else None,
        top_tokens=torch.empty(_BATCH, top_n, dtype=torch.int64) if top_n else None,
        top_logprobs=torch.empty(_BATCH, top_n) if top_n else None,
        config=config,
    )
