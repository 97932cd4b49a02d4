"""One prompt, decoded by several strategies, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastattn.generation.config import Contrast, GenerationConfig
from fastattn.generation.generate import generate
from fastattn.models.protocol import GenerativeModel
from fastattn.sampling import SamplingParams

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class StrategyRow:
    """What one strategy made of the prompt.

    Attributes:
        strategy: its name.
        tokens: the new tokens, without padding.
        text: of these; None without `decode`.
        logprob: sum of their log-probabilities under the model's own softmax, natural logarithm.
        distinct: for n = 1 and 2: different n-grams among all n-grams of the new tokens, 0 to 1
            (Li et al., arXiv:1510.03055); 1 where there are none.
        seconds: for prompt and tokens, wall clock.
    """

    strategy: str
    tokens: tuple[int, ...]
    text: str | None
    logprob: float
    distinct: tuple[float, float]
    seconds: float


@dataclass(frozen=True)
class StrategyTable:
    """What `compare_strategies` returns; `str()` shows it.

    Attributes:
        rows: one a strategy, in the order in which they were given.
    """

    rows: tuple[StrategyRow, ...]

    def __getitem__(self, strategy: str) -> StrategyRow:
        for row in self.rows:
            if row.strategy == strategy:
                return row
        raise KeyError(f"strategy must be one of {[row.strategy for row in self.rows]}: {strategy}")

    def __str__(self) -> str:
        heads = ("strategy", "tokens", "log p", "a token", "distinct-1", "distinct-2", "seconds")
        cells = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
        lines = []
        for index, row in enumerate(cells):
            numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            shown = "continuation" if index == 0 else _shown(self.rows[index - 1])
            lines.append("  ".join([row[0].ljust(widths[0]), *numbers, shown]))
        lines.insert(1, "-" * max(len(line) for line in lines))
        return "\n".join(lines)


def compare_strategies(
    model: GenerativeModel,
    prompt: Tensor | Sequence[int],
    strategies: Mapping[str, GenerationConfig] | None = None,
    decode: Decode | None = None,
    *,
    max_new_tokens: int = 40,
    small_model: GenerativeModel | None = None,
    draft_model: GenerativeModel | None = None,
) -> StrategyTable:
    """Decodes one prompt by each strategy.

    Args:
        model: as for `generate`.
        prompt: token ids, int64 (seqlen,) or (1, seqlen) or a list.
        strategies: a config by name. One with `contrast` gets the small model, and one with
            `draft_tokens` the draft model. None: greedy, beams, sampling with seed 0, and contrast
            and speculation where there are models for them.
        decode: text of token ids, such as a tokenizer's `decode`.
        max_new_tokens: of the default strategies.
        small_model, draft_model: as for `generate`.

    Returns:
        StrategyTable, a row for each strategy, of several returned sequences the first.

    Raises:
        TypeError, ValueError: as `generate`.
    """
    ids = prompt if isinstance(prompt, Tensor) else torch.tensor(list(prompt), dtype=torch.int64)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1:
        raise ValueError(f"prompt must be one sequence of token ids, got shape {tuple(ids.shape)}")
    if strategies is None:
        strategies = default_strategies(
            max_new_tokens, contrast=small_model is not None, draft=draft_model is not None
        )
    rows = []
    for name, config in strategies.items():
        started = time.perf_counter()
        out = generate(
            model,
            ids,
            replace(config, return_logprobs=True),
            small_model=None if config.contrast is None else small_model,
            draft_model=None if config.draft_tokens is None else draft_model,
            decode=decode,
        )
        tokens = out.new_tokens()[0]  # waits for the device, so it is part of the time
        seconds = time.perf_counter() - started
        assert out.logprobs is not None  # were asked for
        rows.append(
            StrategyRow(
                strategy=name,
                tokens=tuple(tokens),
                text=None if decode is None else decode(tokens),
                logprob=float(out.logprobs[0].sum()),
                distinct=(distinct_n(tokens, 1), distinct_n(tokens, 2)),
                seconds=seconds,
            )
        )
    return StrategyTable(tuple(rows))


def default_strategies(
    max_new_tokens: int, *, contrast: bool = False, draft: bool = False
) -> dict[str, GenerationConfig]:
    """What `compare_strategies` shows if it is not told."""
    drawing = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=0)
    result = {
        "greedy": GenerationConfig(max_new_tokens),
        "greedy, no 3-gram twice": GenerationConfig(max_new_tokens, no_repeat_ngram=3),
        "4 beams": GenerationConfig(max_new_tokens, num_beams=4),
        "sampling": GenerationConfig(
            max_new_tokens, do_sample=True, sampling=SamplingParams(seed=0)
        ),
        "temperature 0.8, top-k 50, top-p 0.9": GenerationConfig(
            max_new_tokens, do_sample=True, sampling=drawing
        ),
    }
    if contrast:
        result["contrastive"] = GenerationConfig(max_new_tokens, contrast=Contrast())
    if draft:
        result["greedy, with drafts"] = GenerationConfig(max_new_tokens, draft_tokens=4)
    return result


def distinct_n(tokens: Sequence[int], n: int) -> float:
    """Different n-grams among all n-grams, n = 1 or 2; 1 where there are none."""
    grams: list[tuple[int, ...]] = list(pairwise(tokens)) if n == 2 else [(t,) for t in tokens]
    return len(set(grams)) / len(grams) if grams else 1.0


def _cells(row: StrategyRow) -> tuple[str, ...]:
    count = len(row.tokens)
    return (
        row.strategy,
        str(count),
        f"{row.logprob:.2f}",
        f"{row.logprob / count:.3f}" if count else "-",
        f"{row.distinct[0]:.2f}",
        f"{row.distinct[1]:.2f}",
        f"{row.seconds:.3f}",
    )


def _shown(row: StrategyRow) -> str:
    return repr(row.text) if row.text is not None else " ".join(map(str, row.tokens))
