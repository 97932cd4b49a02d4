"""What must be right before anything is timed, as tasks for the pool.

`FeatureCheck` is a row of `fastattn verify --grad`, with or without a cache. `ConfigCheck` runs the
forward kernel with one tile config, `GradientCheck` the backward kernels with one each, whether
dispatch may choose them on this chip or the sweep will time them: a compiler may be right about one
tile and wrong about another; decoding's are in `decode_checks.py`. Shapes share Triton's cache with
the timed ones, which find their kernels compiled.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.accuracy import WrongResult, describe
from fastattn import T5Bias, reference
from fastattn.testing import features, gradients
from fastattn.testing.inputs import make_qkv, poison
from fastattn.testing.interpreter import is_interpreting, repair
from fastattn.testing.tolerance import compare

Row = dict[str, Any]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class FeatureCheck:
    """A row of `fastattn.testing` `features` or `cache_features` in "bf16", "fp16" or "fp32"."""

    name: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}"


Tile = tuple[int, ...]
Shape = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class ConfigCheck:
    """The forward kernel with one tile.

    Attributes:
        config: (block_m, block_n, num_warps, num_stages), and a limit of registers if there is one.
        head_dim, dtype, causal: of the problem.
        modifiers: of "dense bias", "T5 bias", "softcap", "dropout", which take registers.
        shape: (batch, seqlen_q, seqlen_k, num_heads, num_heads_kv): multiples of 16, for the
            compiler to find the same alignment as in the timed shapes, and none of a tile.
    """

    config: Tile
    head_dim: int
    dtype: str
    causal: bool = False
    modifiers: tuple[str, ...] = ()
    shape: Shape = (2, 656, 1104, 16, 16)

    def __str__(self) -> str:
        return f"tile {show_config(self.config)}, {_show_problem(self)}"


@dataclass(frozen=True)
class GradientCheck:
    """The backward kernels with one tile each: by rows, by keys, and of a shared bias.

    All gradients are checked, and that a second run gives the same bits. Attributes are as for
    `ConfigCheck`; shapes are smaller, since plain torch keeps ten tensors of scores in float64.
    """

    rows: Tile
    keys: Tile
    bias: Tile
    head_dim: int
    dtype: str
    causal: bool = False
    modifiers: tuple[str, ...] = ()
    shape: Shape = (2, 400, 656, 16, 8)

    def __str__(self) -> str:
        tiles = f"rows {show_config(self.rows)}, keys {show_config(self.keys)}"
        if "dense bias" in self.modifiers:
            tiles += f", bias {show_config(self.bias)}"
        return f"tiles by {tiles}, {_show_problem(self)}"


TileCheck = ConfigCheck | GradientCheck


class OwnCheck(Protocol):
    """A check that knows how to run, as those of decoding do."""

    kind: str

    @property
    def dtype(self) -> str:
        """A key of DTYPES."""

    def run(self, device: torch.device) -> Row:
        """What a row keeps of it; WrongResult or another error where something is wrong."""


def _show_problem(task: TileCheck) -> str:
    features = [task.dtype, f"D{task.head_dim}"]
    features += ["causal"] if task.causal else []
    group = task.shape[3] // task.shape[4]
    features += [f"groups of {group}"] if group > 1 else []
    return ", ".join([*features, *task.modifiers])


def show_config(config: Iterable[int]) -> str:
    """A tile in a word: block_m x block_n, warps, stages, limit of registers."""
    block_m, block_n, warps, stages, *limit = config
    return f"{block_m}x{block_n} w{warps} s{stages}" + (f" r{limit[0]}" if limit else "")


def as_tuple(config: Any) -> Tile:
    """A TileConfig as plain numbers."""
    tile = (config.block_m, config.block_n, config.num_warps, config.num_stages)
    return tile if config.max_registers is None else (*tile, config.max_registers)


def feature_checks(dtypes: Iterable[str]) -> list[FeatureCheck]:
    """Every row of `fastattn verify`, dtype by dtype."""
    from fastattn.testing.features import FEATURES

    return [FeatureCheck(feature.name, dtype) for dtype in dtypes for feature in FEATURES]


def dispatch_checks(chip: str, dtypes: Iterable[str]) -> list[ConfigCheck]:
    """Every forward tile that dispatch may choose on a chip, on what it is chosen for."""
    from fastattn.kernels.attention.config import select_forward_config

    shape = (1, 80, 112, 2, 2) if chip == "interpreter" else ConfigCheck.shape
    # Few rows get tiles of their own, and so do scores with one modifier or with more.
    problems: tuple[tuple[int, tuple[str, ...]], ...] = (
        (4096, ()),
        (64, ()),
        (4096, ("dense bias",)),
        (4096, ("dense bias", "softcap")),
    )
    checks = []
    for dtype, head_dim in itertools.product(dtypes, head_dims(chip)):
        for seqlen, modifiers in problems:
            for causal in (False,) if modifiers else (False, True):
                config = as_tuple(
                    select_forward_config(
                        chip, head_dim, DTYPES[dtype], seqlen, len(modifiers), causal
                    )
                )
                checks.append(ConfigCheck(config, head_dim, dtype, causal, modifiers, shape))
    return list(dict.fromkeys(checks))


# What backward tiles are chosen for, and with which masks.
_BACKWARD_PROBLEMS: tuple[tuple[tuple[str, ...], tuple[bool, ...]], ...] = (
    ((), (False, True)),
    (("T5 bias",), (False, True)),
    (("dense bias",), (False, True)),
    (("dense bias", "softcap"), (False, True)),
    (("T5 bias", "softcap"), (False,)),  # the same tiles again, where distances are summed
    (("dropout",), (True,)),  # and where the mask of dropout is transposed
)


def gradient_checks(chip: str, dtypes: Iterable[str]) -> list[GradientCheck]:
    """Every backward tile that dispatch may choose on a chip, on what it is chosen for."""
    group, alone = (2, 400, 656, 16, 8), (2, 400, 656, 16, 16)
    if chip == "interpreter":
        group, alone = (2, 80, 112, 2, 1), (1, 80, 112, 1, 1)
    checks = []
    for dtype, head_dim in itertools.product(dtypes, head_dims(chip)):
        for modifiers, masks in _BACKWARD_PROBLEMS:
            for causal in masks:
                tiles = backward_tiles(chip, head_dim, dtype, modifiers, causal=causal)
                checks.append(GradientCheck(*tiles, head_dim, dtype, causal, modifiers, group))
                if not modifiers:
                    checks.append(GradientCheck(*tiles, head_dim, dtype, causal, (), alone))
            if modifiers == ("dense bias",):
                # One sequence: nothing shares the bias, whose gradient comes from the walk by rows.
                own = (1, *group[1:])
                checks.append(GradientCheck(*tiles, head_dim, dtype, False, modifiers, own))
        if head_dim == 64 and dtype == "bf16":
            # These are timed without groups: their kernels are compiled here, by many processes.
            for modifiers in (("T5 bias",), ("dropout",)):
                tiles = backward_tiles(chip, head_dim, dtype, modifiers)
                checks.append(GradientCheck(*tiles, head_dim, dtype, False, modifiers, alone))
    return checks


def backward_tiles(
    chip: str,
    head_dim: int,
    dtype: str,
    modifiers: tuple[str, ...] = (),
    *,
    causal: bool = False,
) -> tuple[Tile, Tile, Tile]:
    """Tiles by rows, by keys and of a shared bias, as dispatch chooses them."""
    from fastattn.kernels.attention.config import select_backward_config

    config = select_backward_config(
        chip, head_dim, DTYPES[dtype], len(modifiers), "T5 bias" in modifiers, causal
    )
    return as_tuple(config.rows), as_tuple(config.keys), as_tuple(config.bias)


def head_dims(chip: str) -> list[int]:
    """Head dimensions with tiles of their own on a chip."""
    from fastattn.kernels.attention.config import HALF_CONFIGS

    return [32] if chip == "interpreter" else list(HALF_CONFIGS[chip])


def run_check(task: FeatureCheck | TileCheck | OwnCheck, device: str) -> Row:
    """Runs one check; what it finds wrong, or raises, is the result's "error"."""
    began = time.perf_counter()
    try:
        if isinstance(task, FeatureCheck):
            result = _run_feature(task, device)
        elif isinstance(task, ConfigCheck):
            result = run_config(task, torch.device(device))
        elif isinstance(task, GradientCheck):
            result = run_gradients(task, torch.device(device))
        else:
            result = task.run(torch.device(device))
    except Exception as error:
        result = {"error": describe_error(error)}
    return {**result, "seconds": round(time.perf_counter() - began, 3)}


def describe_error(error: BaseException) -> str:
    """The type and the first lines of an error."""
    text = f"{error}" if isinstance(error, WrongResult) else f"{type(error).__name__}: {error}"
    return text if len(text) <= 1000 else text[:1000] + " ..."


def _run_feature(task: FeatureCheck, device: str) -> Row:
    from fastattn.testing.cache_features import CACHE_FEATURES
    from fastattn.testing.features import FEATURES
    from fastattn.testing.verify import verify

    rows: tuple[Any, ...] = (*FEATURES, *CACHE_FEATURES)
    feature = next(feature for feature in rows if feature.name == task.name)
    (result,) = verify(device, [task.dtype], [feature], grad=True)
    return describe_result(result)


def describe_result(result: Any) -> Row:
    """What a row keeps of a `fastattn.testing.verify.Result`, the error of a failed one too."""
    row: Row = {}
    if result.parts:
        row["error_ratio"] = max(part.ratio for part in result.parts.values())
        row["max_error"] = max(part.max_error for part in result.parts.values())
    if not result.passed:
        row["error"] = str(result)
    return row


def run_config(task: ConfigCheck, device: torch.device) -> dict[str, Any]:
    """Runs the forward kernel with a tile on a small problem, by the 2x rule.

    Raises:
        WrongResult: the rule is broken.
    """
    case, modifiers = _draw_problem(task, device)
    from fastattn.kernels.attention import launch_attention_forward
    from fastattn.kernels.attention.config import TileConfig

    out = poison(torch.empty_like(case.q))
    config = TileConfig(*task.config)
    launch_attention_forward(case.q, case.k, case.v, out, None, modifiers, config=config)
    return _compare({"out": out}, case, None)


def run_gradients(task: GradientCheck, device: torch.device) -> dict[str, Any]:
    """Runs the backward kernels with some tiles on a small problem, twice, by the 2x rule.

    Raises:
        WrongResult: the rule is broken by a gradient, or the runs differ in a bit.
    """
    case, modifiers = _draw_problem(task, device)
    generator = torch.Generator().manual_seed(3)
    dout = torch.randn(case.q.shape, generator=generator).to(device, case.q.dtype)
    first, second = (_differentiate(task, case, modifiers, dout) for _ in range(2))
    row = _compare(first, case, dout)
    for name, gradient in first.items():
        if not torch.equal(gradient, second[name]):
            count = int((gradient != second[name]).sum())
            raise WrongResult(
                f"two runs differ in {count} of {gradient.numel()} elements of {name}"
            )
    return row


def _differentiate(
    task: GradientCheck, case: features.Case, modifiers: Any, dout: Tensor
) -> dict[str, Tensor]:
    """Gradients by the kernels, by name, in memory that was full of NaN."""
    from fastattn.kernels import attention as kernels
    from fastattn.kernels.attention.config import BackwardConfig, TileConfig

    q, k, v = case.q, case.k, case.v
    out = poison(torch.empty_like(q))
    stats = poison(q.new_empty(2, q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32))
    kernels.launch_attention_forward(q, k, v, out, None, modifiers, softmax_stats=stats)
    dq, dk, dv = (poison(torch.empty_like(x)) for x in (q, k, v))
    dbias = None if modifiers.bias is None else torch.zeros_like(modifiers.bias)
    relative = modifiers.relative_bias
    drelative = None if relative is None else poison(torch.empty_like(relative))
    kernels.launch_attention_backward(
        q,
        k,
        v,
        out,
        stats,
        dout,
        None,
        modifiers,
        kernels.Gradients(dq, dk, dv, dbias, drelative),
        config=BackwardConfig(*(TileConfig(*tile) for tile in (task.rows, task.keys, task.bias))),
    )
    found = {"dq": dq, "dk": dk, "dv": dv}
    if dbias is not None:
        found["dbias"] = dbias
    if drelative is not None:
        # From distances to the table: autograd of torch's own operations.
        table = case.tensors()["table"].detach().requires_grad_()
        by_distance = T5Bias(table).by_distance()
        (found["dtable"],) = torch.autograd.grad(by_distance, table, drelative)
    return found


def _draw_problem(task: TileCheck, device: torch.device) -> tuple[features.Case, Any]:
    """The problem of a check, for the reference and as the kernels' `Modifiers`."""
    if is_interpreting():
        repair()  # before the kernels are defined
    from fastattn.kernels.attention import Modifiers

    batch, seqlen_q, seqlen_k, num_heads, num_heads_kv = task.shape
    dtype = DTYPES[task.dtype]
    q, k, v = make_qkv(
        batch, seqlen_q, seqlen_k, num_heads, num_heads_kv, task.head_dim, dtype=dtype,
        device=device,
    )  # fmt: skip
    draw = features.Draw(dtype, device)
    kwargs: dict[str, Any] = {"causal": task.causal}
    flat: dict[str, Any] = {"window_right": 0 if task.causal else -1}
    if "dense bias" in task.modifiers:
        kwargs["bias"] = flat["bias"] = draw.normal(1, num_heads, seqlen_q, seqlen_k)
    if "T5 bias" in task.modifiers:
        kwargs["bias"] = T5Bias(draw.normal(32, num_heads))
        flat["relative_bias"] = kwargs["bias"].by_distance()
    if "softcap" in task.modifiers:
        kwargs["softcap"] = flat["softcap"] = 4.0
    if "dropout" in task.modifiers:
        kwargs["dropout_p"] = flat["dropout_p"] = 0.1
        # More than 32 bits, since the seed's two halves are used apart.
        kwargs["dropout_seed"] = flat["dropout_seed"] = draw.ints(2**40 + 7, dtype=torch.int64)
    modifiers = Modifiers(softmax_scale=task.head_dim**-0.5, **flat)
    return features.Case(q, k, v, kwargs), modifiers


def _compare(
    results: dict[str, Tensor], case: features.Case, dout: Tensor | None
) -> dict[str, Any]:
    """Results beside those of the reference; what a row keeps of the worst.

    Raises:
        WrongResult: the rule is broken.
    """
    starts = None if dout is None else (dout, None)
    exact, baseline = (
        gradients.run(reference.attention, own, starts, return_lse=False)
        for own in (case.double(), case)
    )
    found = {name: compare(x, baseline[name], exact[name]) for name, x in results.items()}
    if wrong := [f"{name} {part}" for name, part in found.items() if not part.passed]:
        raise WrongResult("; ".join(wrong))
    return dict(describe(max(found.values(), key=lambda part: part.ratio)))
