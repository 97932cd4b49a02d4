"""The sweep of sampling configs: what is tried, which came out best, and that as source.

    python -m benchmarks.sampling_sweep benchmarks/results/FILE.json [--write config.py]

prints the winners of a file as a table for `kernels/sampling/config.py`, with the file that
measured them, or writes it there in place of the table before.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measured import TableCommand, Winner, best_everywhere, score
from benchmarks.providers import Provider
from benchmarks.sampling_cases import SETTINGS, SamplingCase, SamplingInputs
from benchmarks.sampling_checks import Config, SampleCheck, as_config
from fastattn.torch_sample_ops import kernels

Row = dict[str, Any]

STAGE = "sampling-sweep"
BLOCKS, CAPACITIES, WARPS = (2048, 4096, 8192), (64, 128), (4, 8, 16)
# Scores of a tile, and candidates of a row, that a thread holds at most: with more of them compile
# reports show spills of kilobytes.
MOST_SCORES, MOST_CANDIDATES = 32, 16
# Few rows get a config of their own only if it is faster there than the common one by this much.
WORTH_TWO_CLASSES = 1.03


def current_config(case: SamplingCase, device: torch.device) -> Config:
    """What dispatch chooses for a case today."""
    kernels()
    from fastattn.kernels.sampling.config import chip_of, select_sample_config

    config = select_sample_config(chip_of(device), case.vocab_size, 0, case.batch)
    return dataclasses.astuple(config)


def candidates(case: SamplingCase, device: torch.device) -> list[Config]:
    """Today's config first; then all whose tiles and rows fit into registers."""
    found = [current_config(case, device)]
    for config in itertools.product(BLOCKS, CAPACITIES, WARPS):
        block, capacity, num_warps = config
        tiles = 1 << (-(-case.vocab_size // block) - 1).bit_length()
        threads = 32 * num_warps
        if block <= MOST_SCORES * threads and tiles * capacity <= MOST_CANDIDATES * threads:
            found.append(config)
    return list(dict.fromkeys(found))


def joint_config(rows: Iterable[Row]) -> Config | None:
    """None: all combinations are timed."""
    return None


def checks_of(case: SamplingCase, config: Config) -> list[SampleCheck]:
    """What must be right before a config is timed on a case: also what compiles it."""
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[case.dtype]
    return [SampleCheck("numbers", dtype, case.vocab_size, (7,), config)]


def config_provider(values: Config) -> Provider:
    """The launcher with one config, as a provider."""

    def prepare(inputs: SamplingInputs) -> Callable[[], Tensor]:
        sampling, config, logits = kernels(), as_config(values), inputs.logits
        state = inputs.state
        own = {} if state is None else {"seen": state.seen, "step": state.step}
        operands = sampling.Sampling(seed=inputs.seeds, **{**SETTINGS[inputs.case.setting], **own})
        counters = torch.zeros(logits.shape[0], dtype=torch.int32, device=logits.device)
        tokens = torch.full_like(inputs.seeds, -2)

        def run() -> Tensor:
            sampling.launch_sample(logits, operands, tokens, counters, config=config)
            return tokens

        return run

    def note(inputs: SamplingInputs) -> Row:
        return {"predicted_bytes": inputs.case.predicted_bytes(*values[:2])}

    return Provider(f"fastattn {as_config(values)}", prepare, note=note)


def config_fields(values: Config) -> Row:
    """A config as fields of a row."""
    config = as_config(values)
    return {"config": dataclasses.asdict(config), "config_label": str(config)}


def _timed(rows: Iterable[Row]) -> dict[str, dict[Config, Row]]:
    """Timed rows of the sweep by case and config."""
    found: dict[str, dict[Config, Row]] = {}
    for row in rows:
        if row["stage"] == STAGE and "ms" in row:
            own = found.setdefault(row["case"]["label"], {})
            own[tuple(row["config"].values())] = row
    return found


def best_configs(rows: Iterable[Row]) -> list[Row]:
    """For each case of the sweep the configs from the fastest on, beside today's."""
    found = []
    for label, own in _timed(rows).items():
        ranked = sorted(own.values(), key=lambda row: row["ms"])
        today = next((row for row in ranked if row["current"]), None)
        found.append(
            {
                "chip": ranked[0]["chip"],
                "case": label,
                "batch": ranked[0]["case"]["batch"],
                "config": ranked[0]["config"],
                "config_label": ranked[0]["config_label"],
                "ms": ranked[0]["ms"],
                "gb_per_s": ranked[0]["gb_per_s"],
                "current_label": today and today["config_label"],
                "current_ms": today and today["ms"],
                "speedup_over_current": today and today["ms"] / ranked[0]["ms"],
                "runners_up": [row["config_label"] for row in ranked[1:4]],
            }
        )
    return found


def winners(document: Row) -> list[Winner]:
    """The best config of each class of batches of each chip.

    It is the one of the best score over the cases of the class, `measured.score`, among those that
    ran on all of them. Few and many rows share the config that is best over all cases, unless few
    rows gain 3% by one of their own: with one config a draw is the same bits in any batch.
    """
    from fastattn.kernels.sampling.config import SAMPLE_SPACE, sample_class

    groups: dict[str, dict[Any, dict[str, dict[Config, Row]]]] = {}
    for label, own in _timed(document["rows"]).items():
        row = next(iter(own.values()))
        key = sample_class(row["chip"], row["case"]["batch"])
        if key is not None:
            groups.setdefault(row["chip"], {}).setdefault(key, {})[label] = own
    found = []
    for classes in groups.values():
        common = best_everywhere([own for cases in classes.values() for own in cases.values()])
        for key, cases in sorted(classes.items(), reverse=True):
            best = best_everywhere(list(cases.values()))
            if best is None:
                continue
            if common is not None:
                shared = (common[0], score(common[0], cases.values()))
                best = best if best[1] >= WORTH_TWO_CLASSES * shared[1] else shared
            config, reached = best
            rows = {label: own[config] for label, own in cases.items()}
            values = dict(zip(SAMPLE_SPACE.values, config, strict=True))
            found.append(Winner(key, values, reached, rows))
    return found


def _space() -> Any:
    from fastattn.kernels.sampling.config import SAMPLE_SPACE

    return SAMPLE_SPACE


TABLE = TableCommand("benchmarks.sampling_sweep", STAGE, winners, _space)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints or writes the winners of the file on the command line; returns the exit status."""
    return TABLE.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
