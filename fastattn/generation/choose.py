"""The next token of every row, from the model's logits: the largest, a draw, or by contrast."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fastattn.generation.bans import Bans
from fastattn.generation.config import Contrast
from fastattn.generation.plan import Plan
from fastattn.generation.result import Records
from fastattn.generation.rows import Rows
from fastattn.nn import Sampler
from fastattn.sampling import (
    ERROR_TOKEN,
    Sample,
    SamplerState,
    SamplingParams,
    contrastive_scores,
    log_probabilities,
)
from fastattn.sampling.problem import make_sample_problem
from fastattn.sampling.reference import filtered, processed

# What a penalty or a ban of the settings is, and what cuts or draws.
_CHANGES = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "banned",
    "allowed",
)  # fmt: skip


def changes_logits(params: SamplingParams) -> bool:
    """Whether a penalty, a bias or a ban is set."""
    default = SamplingParams()
    return any(
        isinstance(getattr(params, name), Tensor) or getattr(params, name) != getattr(default, name)
        for name in _CHANGES
    )


def without_changes(params: SamplingParams) -> SamplingParams:
    """The same without penalties, bias and bans."""
    default = SamplingParams()
    return dataclasses.replace(params, **{name: getattr(default, name) for name in _CHANGES})


def change_logits(logits: Tensor, params: SamplingParams, state: SamplerState) -> Tensor:
    """Logits (rows, vocab_size) after penalties, bias and bans, float32 (float64)."""
    return processed(make_sample_problem(logits, params, state))


def largest(logits: Tensor) -> Tensor:
    """The token of the largest logit of each row, lowest on a tie, or `ERROR_TOKEN`."""
    tokens = logits.argmax(-1, keepdim=True)
    # False for NaN too.
    return torch.where(logits.gather(-1, tokens) > -torch.inf, tokens, ERROR_TOKEN)[..., 0]


class Choose:
    """Greedy decoding and sampling.

    Args:
        contrast: logits of a second, smaller model are given too, and taken away.
    """

    def __init__(
        self, plan: Plan, rows: Rows, records: Records, contrast: Contrast | None = None
    ) -> None:
        self._plan, self._rows, self._records, self._contrast = plan, rows, records, contrast
        self._bans = Bans(plan)
        self._draws = plan.config.do_sample
        self._changes = changes_logits(plan.params)
        params = plan.params
        # A contrast is of what may come, so penalties and bans have to come before it.
        self._before = params if contrast is not None and self._changes else None
        self._sampler: Sampler | None = None
        if self._draws or self._changes or params.logprobs is not None:
            drawing = params if self._before is None else without_changes(params)
            self._sampler = Sampler(drawing, vocab_size=plan.vocab_size)
            ids = rows.buffer[:, : rows.width]
            self._sampler.start(ids, rows.real()[:, : rows.width])
            if params.needs_counts and self._before is not None:
                self._sampler.state = SamplerState.from_prompt(
                    ids, plan.vocab_size, rows.real()[:, : rows.width], counts=True
                )

    def is_steady(self, step: int) -> bool:
        """Whether this step does what all others do that are, and leaves nothing behind but in
        tensors that stay where they are: then a CUDA graph may hold it."""
        records = self._records
        recording = (
            records.logprobs is not None
            or records.scores is not None
            or self._plan.params.logprobs is not None
        )
        return not recording and not self._bans.by_length(step, step)

    def __call__(self, logits: tuple[Tensor, ...], step: int) -> None:
        """Appends a token to each row.

        Args:
            logits: (rows, vocab_size), of the model, and of the small one. The first may be
                overwritten from the second step on.
            step: number of tokens that were appended before.
        """
        raw, scores = logits[0], logits[0]
        records = self._records
        if self._bans.changes(step, step):
            # The first logits may be one row for all copies of a prompt.
            if step == 0 or records.logprobs is not None:
                scores = scores.clone()
            scores = self._bans.apply_(scores, self._rows, step, step)
        if self._contrast is not None:
            scores = self._apply_contrast(scores, logits[1])
        if records.scores is not None:
            records.scores[:, step] = self._scores(scores)
        drawn = largest(scores) if self._sampler is None else self._sampler(scores)
        if isinstance(drawn, Sample):
            records.drawn.append(drawn)
            drawn = drawn.tokens
        if records.logprobs is not None:
            records.logprobs[:, step] = log_probabilities(raw, drawn.clamp(min=0))
        self._rows.take(drawn)

    def _apply_contrast(self, scores: Tensor, amateur: Tensor) -> Tensor:
        assert self._contrast is not None
        if self._before is not None:
            assert self._sampler is not None and self._sampler.state is not None
            scores = change_logits(scores, self._before, self._sampler.state)
        return contrastive_scores(
            scores,
            amateur,
            plausibility=self._contrast.plausibility,
            amateur_weight=self._contrast.amateur_weight,
            amateur_temperature=self._contrast.amateur_temperature,
        )

    def _scores(self, scores: Tensor) -> Tensor:
        """What the token is chosen by."""
        if self._sampler is None:
            return scores.float()
        params, state = self._sampler.params, self._sampler.state
        assert state is not None  # made at the start, since the vocabulary is known
        find = filtered if self._draws else change_logits
        return find(scores, params, state).float()
