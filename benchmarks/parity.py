"""What must be right before anything is timed, as tasks for the pool.

`FeatureCheck` is a row of `fastattn verify`. `ConfigCheck` runs the forward kernel with one tile
config, whether dispatch may choose it on this chip or the sweep will time it. Its shape shares
Triton's cache with the timed ones, so that the sweep finds its kernels compiled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.accuracy import WrongResult, describe
from fastattn import reference
from fastattn.problem import make_problem
from fastattn.testing.inputs import make_qkv, poison
from fastattn.testing.interpreter import is_interpreting, repair
from fastattn.testing.tolerance import compare

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class FeatureCheck:
    """One row of `fastattn.testing.features` in one dtype ("bf16", "fp16" or "fp32")."""

    name: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}"


@dataclass(frozen=True)
class ConfigCheck:
    """The forward kernel with one tile.

    Attributes:
        config: (block_m, block_n, num_warps, num_stages).
        head_dim, dtype, causal: of the problem.
        modifiers: how many there are of dense bias and softcap (0 to 2), which take registers.
        shape: (batch, seqlen_q, seqlen_k, num_heads): multiples of 16, for the compiler to find the
            same alignment as in the timed shapes, and none of a tile.
    """

    config: tuple[int, int, int, int]
    head_dim: int
    dtype: str
    causal: bool = False
    modifiers: int = 0
    shape: tuple[int, int, int, int] = (2, 656, 1104, 16)

    def __str__(self) -> str:
        features = [self.dtype, f"D{self.head_dim}"]
        features += ["causal"] if self.causal else []
        features += ["dense bias", "softcap"][: self.modifiers]
        return f"tile {show_config(self.config)}, {', '.join(features)}"


def show_config(config: Iterable[int]) -> str:
    """A tile in a word: block_m x block_n, warps, stages."""
    block_m, block_n, warps, stages = config
    return f"{block_m}x{block_n} w{warps} s{stages}"


def as_tuple(config: Any) -> tuple[int, int, int, int]:
    """A TileConfig as plain numbers."""
    return (config.block_m, config.block_n, config.num_warps, config.num_stages)


def feature_checks(dtypes: Iterable[str]) -> list[FeatureCheck]:
    """Every row of `fastattn verify`, dtype by dtype."""
    from fastattn.testing.features import FEATURES

    return [FeatureCheck(feature.name, dtype) for dtype in dtypes for feature in FEATURES]


def dispatch_checks(chip: str, dtypes: Iterable[str]) -> list[ConfigCheck]:
    """Every tile that dispatch may choose on a chip, on what it is chosen for."""
    from fastattn.kernels.attention.config import HALF_CONFIGS, select_forward_config

    interpreted = chip == "interpreter"
    head_dims = [32] if interpreted else list(HALF_CONFIGS[chip])
    shape = (1, 80, 112, 2) if interpreted else ConfigCheck.shape
    checks = []
    for dtype in dtypes:
        for head_dim in head_dims:
            # Few rows get tiles of their own, and so do scores with one modifier or with more.
            for seqlen, modifiers in ((4096, 0), (64, 0), (4096, 1), (4096, 2)):
                config = as_tuple(
                    select_forward_config(chip, head_dim, DTYPES[dtype], seqlen, modifiers)
                )
                for causal in (False, True) if modifiers == 0 else (False,):
                    checks.append(ConfigCheck(config, head_dim, dtype, causal, modifiers, shape))
    return list(dict.fromkeys(checks))


def run_check(task: FeatureCheck | ConfigCheck, device: str) -> dict[str, Any]:
    """Runs one check; what it finds wrong, or raises, is the result's "error"."""
    began = time.perf_counter()
    try:
        if isinstance(task, FeatureCheck):
            result = _run_feature(task, device)
        else:
            result = run_config(task, torch.device(device))
    except Exception as error:
        result = {"error": describe_error(error)}
    return {**result, "seconds": round(time.perf_counter() - began, 3)}


def describe_error(error: BaseException) -> str:
    """The type and the first lines of an error."""
    text = f"{error}" if isinstance(error, WrongResult) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 1000 else text[:1000] + " ..."


def _run_feature(task: FeatureCheck, device: str) -> dict[str, Any]:
    from fastattn.testing.features import FEATURES
    from fastattn.testing.verify import verify

    feature = next(feature for feature in FEATURES if feature.name == task.name)
    (result,) = verify(device, [task.dtype], [feature])
    row: dict[str, Any] = {}
    if result.parts:
        row["error_ratio"] = max(part.ratio for part in result.parts.values())
        row["max_error"] = max(part.max_error for part in result.parts.values())
    if not result.passed:
        row["error"] = str(result)
    return row


def run_config(task: ConfigCheck, device: torch.device) -> dict[str, Any]:
    """Runs the kernel with a tile on a small problem, by the 2x rule.

    Raises:
        WrongResult: the rule is broken.
    """
    if is_interpreting():
        repair()  # before the kernels are defined
    from fastattn.kernels.attention import Modifiers, launch_attention_forward
    from fastattn.kernels.attention.config import TileConfig

    batch, seqlen_q, seqlen_k, num_heads = task.shape
    dtype = DTYPES[task.dtype]
    q, k, v = make_qkv(
        batch, seqlen_q, seqlen_k, num_heads, head_dim=task.head_dim, dtype=dtype, device=device
    )
    kwargs: dict[str, Any] = {}
    if task.modifiers > 0:
        generator = torch.Generator().manual_seed(2)
        bias = torch.randn(1, num_heads, seqlen_q, seqlen_k, generator=generator)
        kwargs["bias"] = bias.to(device, dtype)
    if task.modifiers > 1:
        kwargs["softcap"] = 4.0
    modifiers = Modifiers(
        softmax_scale=task.head_dim**-0.5, window_right=0 if task.causal else -1, **kwargs
    )
    out = poison(torch.empty_like(q))
    launch_attention_forward(q, k, v, out, None, modifiers, config=TileConfig(*task.config))
    exact, baseline = (
        reference.run(
            make_problem(*(x.to(wanted) for x in (q, k, v)), causal=task.causal, **kwargs)
        )
        for wanted in (torch.float64, dtype)
    )
    comparison = compare(out, baseline[0], exact[0])
    if not comparison.passed:
        raise WrongResult(str(comparison))
    return dict(describe(comparison))
