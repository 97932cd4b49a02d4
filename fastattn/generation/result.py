"""What `generate` returns, and what is noted down step by step on the way there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.generation.plan import Plan
from fastattn.generation.rows import Rows
from fastattn.sampling import Sample


class Speculation(NamedTuple):
    """How well the draft model did.

    Attributes:
        rounds: passes of the model, that of the prompt not counted.
        drafted: tokens that were drafted for rows that had not ended.
        accepted: tokens of those that the model kept.
    """

    rounds: int
    drafted: int
    accepted: int


@dataclass(frozen=True, eq=False)
class Generated:
    """Decoded rows: those of one prompt next to each other, of beams the best first.

    Attributes:
        sequences: int64 (rows, columns + n): the prompts as they came (of an encoder-decoder the
            decoder's), then the new tokens, as many as the longest row has, and pads behind a
            row's end. Prompts that came padded on the right have their new tokens next to them.
        tokens: int64 (rows, n), the new tokens alone.
        lengths: int64 (rows,), how many of these are not padding; an end token counts.
        finished: bool (rows,), whether a row ended by a token or string, and not by its length.
        sequence_scores: of beams: float32 (rows,), sum of log-probabilities over length to the
            power of length_penalty; -inf where fewer sequences were possible than asked for.
        logprobs: with return_logprobs: float32 (rows, n), of each new token under the softmax of
            the model's logits; 0 behind a row's end.
        scores: with return_scores: float32 (rows, n, vocab_size), what each new token was chosen
            by; 0 behind a row's end.
        drawn: with `sampling.logprobs`: what the sampler says to each new token, each (rows, n) or
            (rows, n, k). Behind a row's end it means nothing.
        speculation: of a draft model.
    """

    sequences: Tensor
    tokens: Tensor
    lengths: Tensor
    finished: Tensor
    sequence_scores: Tensor | None = None
    logprobs: Tensor | None = None
    scores: Tensor | None = None
    drawn: Sample | None = None
    speculation: Speculation | None = None

    def new_tokens(self) -> list[list[int]]:
        """The new tokens of each row, without padding. Waits for the device."""
        lengths = self.lengths.tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths, strict=True)]


class Records:
    """What was asked for beside tokens, written step by step."""

    def __init__(self, plan: Plan) -> None:
        shape, device = (plan.rows, plan.max_new), plan.device
        config = plan.config
        self.logprobs = torch.zeros(shape, device=device) if config.return_logprobs else None
        self.scores = None
        if config.return_scores:
            self.scores = torch.zeros((*shape, plan.vocab_size), device=device)
        self.drawn: list[Sample] = []

    def result(self, plan: Plan, rows: Rows, speculation: Speculation | None = None) -> Generated:
        """Puts everything together. Waits for the device."""
        lengths = rows.new_tokens()
        longest = int(lengths.max())
        tokens = rows.buffer[:, rows.width : rows.width + longest]
        inside = torch.arange(longest, device=tokens.device) < lengths[:, None]
        tokens = tokens.masked_fill(~inside, plan.pad)
        logprobs, scores, drawn = self.logprobs, self.scores, None
        if logprobs is not None:
            logprobs = logprobs[:, :longest].masked_fill(~inside, 0.0)
        if scores is not None:
            scores = scores[:, :longest].masked_fill(~inside[..., None], 0.0)
        if self.drawn:
            drawn = stack(self.drawn[:longest])
        return Generated(
            sequences=plan.prompts.append(tokens, plan.pad),
            tokens=tokens,
            lengths=lengths,
            finished=rows.finished.clone(),
            logprobs=logprobs,
            scores=scores,
            drawn=drawn,
            speculation=speculation,
        )


def stack(drawn: list[Sample]) -> Sample:
    """Samples of steps, as one whose tensors have the steps as their second dimension."""

    def join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.stack(present, 1) if present else None

    tokens, *others = (join(parts) for parts in zip(*drawn, strict=True))
    assert tokens is not None  # they are always there
    return Sample(tokens, *others)
