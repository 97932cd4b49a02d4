"""What must be right before decoding is timed, as tasks for the pool, beside those of `parity.py`.

Every config that dispatch may choose, on caches whose unused memory is NaN, and every timed shape
with an empty cache, which also compiles what is timed later. Replays of graphs and batches of other
sizes are in `decode_replay.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.accuracy import WrongResult
from benchmarks.decode_cases import DecodeCase, make_empty_inputs
from benchmarks.decode_providers import fastattn_decode
from benchmarks.decode_replay import causal, chosen, graph_checks, invariance_checks
from benchmarks.parity import DTYPES, FeatureCheck, Row, describe_result, head_dims
from fastattn.testing.cache_features import CACHE_FEATURES, CacheFeature
from fastattn.testing.features import Draw
from fastattn.testing.verify import check_feature

Config = tuple[Any, ...]
"""A DecodeConfig as plain values, in the order of its fields."""


def as_config(values: Config) -> Any:
    """The DecodeConfig of plain values."""
    from fastattn.kernels.attention.decode_config import DecodeConfig

    return DecodeConfig(*values)


# --- configs


def _softcap(draw: Draw) -> dict[str, Any]:
    return {"softcap": 4.0, "causal": True}


# Fields of a CacheFeature, by what a config is chosen for: rows of a group (4 a token), and what
# needs registers besides.
PROBLEMS: dict[str, dict[str, Any]] = {
    "one token": {},
    "one token, paged 16": {"block_size": 16},
    "one token, paged 256": {"block_size": 256},
    "one token, int8": {"stored": "int8"},
    "one token, fp8, paged 64": {"stored": "fp8", "block_size": 64},
    "one token, softcap": {"modifiers": _softcap},
    "one token, softcap, paged 16": {"modifiers": _softcap, "block_size": 16},
    "5 tokens": {"seqlen_q": 5},
    "5 tokens, paged 16": {"seqlen_q": 5, "block_size": 16},
    "5 tokens, int8": {"seqlen_q": 5, "stored": "int8"},
    "5 tokens, fp8, paged 16": {"seqlen_q": 5, "stored": "fp8", "block_size": 16},
    "12 tokens": {"seqlen_q": 12},
    "12 tokens, fp8": {"seqlen_q": 12, "stored": "fp8"},
    "40 tokens": {"seqlen_q": 40},
    "40 tokens, rotary": {"seqlen_q": 40, "rotary": True},
    "40 tokens, rotary, paged 16": {"seqlen_q": 40, "rotary": True, "block_size": 16},
}
# Splits, and whether the last program joins them. A config of one split has nothing to join.
SPLITS = ((4, False), (1, False), (16, True))


@dataclass(frozen=True)
class DecodeCheck:
    """The decoding kernels with one config.

    Attributes:
        config: values of a DecodeConfig.
        head_dim, dtype: of the problem.
        problem: a key of PROBLEMS.
        lengths, capacity, heads: of the cache; most are no multiple of a tile, one is 0.
        appends: whether there are new tokens, as many as queries.
    """

    config: Config
    head_dim: int
    dtype: str
    problem: str
    lengths: tuple[int, ...] = (300, 0, 77, 128)
    capacity: int = 512
    heads: tuple[int, int] = (8, 2)
    appends: bool = True
    kind: ClassVar[str] = "decode config"

    def __str__(self) -> str:
        problem = self.problem if self.appends else f"{self.problem}, nothing new"
        return f"{as_config(self.config)}: {self.dtype}, D{self.head_dim}, {problem}"

    def run(self, device: torch.device) -> Row:
        """The kernels with this config, by the 2x rule; also what they append.

        Raises:
            WrongResult: the rule is broken.
        """
        fields = {"modifiers": causal, **PROBLEMS[self.problem]}
        if "rotary" in fields:
            fields["rotary"] = (self.head_dim, False)
        feature = CacheFeature(
            str(self), lengths=self.lengths, capacity=self.capacity, num_heads=self.heads[0],
            num_heads_kv=self.heads[1], head_dim=self.head_dim,
            seqlen_new=None if self.appends else 0, **fields,
        )  # fmt: skip
        with chosen(lambda _: as_config(self.config)):
            return describe_result(check_feature(feature, self.dtype, device))


def problem_config(
    chip: str, head_dim: int, dtype: str, problem: str, splits: int, last_combines: bool
) -> Config:
    """The config that dispatch chooses for a problem, with a number of splits."""
    from fastattn.kernels.attention import decode_config

    fields = PROBLEMS[problem]
    tile = decode_config.decode_tile(
        chip,
        head_dim,
        DTYPES[dtype],
        fields.get("seqlen_q", 1) * DecodeCheck.heads[0] // DecodeCheck.heads[1],
        int("modifiers" in fields),
        quantized="stored" in fields,
        paged="block_size" in fields,
        rotary="rotary" in fields,
    )
    config = decode_config.DecodeConfig(
        tile.block_m, tile.block_n, tile.num_warps, tile.num_stages, splits, last_combines,
        max_registers=tile.max_registers, appends=decode_config.appends_itself(chip, DTYPES[dtype]),
    )  # fmt: skip
    return dataclasses.astuple(config)


def decode_config_checks(chip: str, dtypes: Iterable[str]) -> list[DecodeCheck]:
    """Every tile that dispatch may choose on a chip; in bfloat16 with all ways to split.

    Other dtypes take turns at the ways: the source of the kernels is the same.
    """
    checks = []
    for dtype, head_dim in itertools.product(dtypes, head_dims(chip)):
        for place, problem in enumerate(PROBLEMS):
            ways = SPLITS if dtype == "bf16" else (SPLITS[place % len(SPLITS)],)
            for splits, last in ways:
                config = problem_config(chip, head_dim, dtype, problem, splits, last)
                checks.append(DecodeCheck(config, head_dim, dtype, problem))
    return checks


# --- timed shapes


@dataclass(frozen=True)
class EmptyCheck:
    """A timed shape whose cache is empty: 0 comes out, and its kernels are compiled.

    Attributes:
        case: the shape.
        config: values of a DecodeConfig; None is what dispatch chooses.
    """

    case: DecodeCase
    config: Config | None = None
    kind: ClassVar[str] = "empty cache"

    @property
    def dtype(self) -> str:
        """The name of the case's dtype here."""
        return next(
            name for name, dtype in DTYPES.items() if dtype == getattr(torch, self.case.dtype)
        )

    def __str__(self) -> str:
        how = "" if self.config is None else f", {as_config(self.config)}"
        return f"empty cache of {self.case}{how}"

    def run(self, device: torch.device) -> Row:
        """Runs the step.

        Raises:
            WrongResult: something else than 0 came out.
        """
        from benchmarks.decode_sweep import config_provider

        provider = fastattn_decode() if self.config is None else config_provider(self.config)
        out = provider.prepare(make_empty_inputs(self.case, device))()
        if wrong := int((out != 0).sum()):  # NaN is not 0 either
            raise WrongResult(f"{wrong} of {out.numel()} elements are not 0")
        return {}


def empty_checks(cases: Iterable[DecodeCase]) -> list[EmptyCheck]:
    """One for each case, those first that need kernels of their own, so that none waits."""
    checks: list[EmptyCheck] = []
    later: list[EmptyCheck] = []
    seen = set()
    for case in cases:
        key = (case.batch, case.block_size, case.stored, case.seqlen_q)
        (later if key in seen else checks).append(EmptyCheck(case))
        seen.add(key)
    return checks + later


def decode_checks(chip: str, dtype: str) -> list[Any]:
    """All checks of decoding in one dtype, apart from the timed shapes."""
    features = [FeatureCheck(feature.name, dtype) for feature in CACHE_FEATURES]
    checks: list[Any] = decode_config_checks(chip, [dtype])
    return [*checks, *graph_checks(dtype), *invariance_checks(dtype), *features]
