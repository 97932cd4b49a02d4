"""Beam search, and beam search among drawn continuations: as Hugging Face's `generate` does them.

In each step a prompt's `num_beams` rows are continued by their best tokens (`beam_step`). Of the
best 2 * num_beams continuations (more where more tokens end a sequence), those that end are kept
aside by their score over length, if they are among the first num_beams; the best that do not end
go on. The host reads which rows go on in each step, since the cache is told so.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastattn.generation.bans import Bans
from fastattn.generation.choose import change_logits, changes_logits
from fastattn.generation.plan import Plan
from fastattn.generation.progress import Progress
from fastattn.generation.result import Generated
from fastattn.generation.rows import Rows
from fastattn.generation.watch import StopStrings
from fastattn.models.protocol import GenerativeModel
from fastattn.sampling import BeamStep, SamplerState, beam_step, log_probabilities
from fastattn.sampling.reference import filtered
from fastattn.sampling.statistics import softmax_moments


def beam_search(
    plan: Plan, model: GenerativeModel, rows: Rows, strings: StopStrings, progress: Progress
) -> Generated:
    """The best sequences of each prompt.

    Args:
        strings: which end a sequence too.

    Raises:
        ValueError: logits hold a NaN, or nothing may come next in all beams of a prompt.
    """
    logits, session = plan.start(model)
    search = _Search(plan, rows, strings)
    for length in range(1, plan.max_new + 1):
        origins = search.step(logits, length)
        progress.show_count(length)
        if origins is None:
            break
        if origins != list(range(len(origins))):
            session.reorder(origins)
        logits = model.step(rows.tokens, session)
    return search.result()


class _Ended:
    """The best sequences of each prompt that have ended.

    Attributes:
        scores: float64 (batch, num_beams), over length; -inf where there is none yet.
        notes: of each, what `_Search` has noted of the row; (batch, num_beams, ...).
    """

    def __init__(self, scores: Tensor, notes: dict[str, Tensor]) -> None:
        self.scores = torch.full_like(scores, -math.inf)
        self.notes = {name: torch.zeros_like(note) for name, note in notes.items()}

    @property
    def full(self) -> Tensor:
        """Which prompts have num_beams of them, bool (batch, 1)."""
        return (self.scores > -math.inf).all(1, keepdim=True)

    def add(self, scores: Tensor, notes: dict[str, Tensor]) -> None:
        """Keeps the best of what there is and these, (batch, n); -inf does not count."""
        beams = self.scores.shape[1]
        self.scores, at = torch.cat([self.scores, scores], 1).topk(beams)
        for name, note in notes.items():
            self.notes[name] = _pick(torch.cat([self.notes[name], note], 1), at)


class _Search:
    def __init__(self, plan: Plan, rows: Rows, strings: StopStrings) -> None:
        config, device = plan.config, plan.device
        self._plan, self._rows, self._strings = plan, rows, strings
        self._shape = (plan.prompts.batch, config.num_beams)
        self._candidates = max(2, 1 + len(plan.ends)) * config.num_beams
        self._bans = Bans(plan)
        self._changes = changes_logits(plan.params)
        self._params, self._generators = plan.params, []
        if config.do_sample:
            # So that at least one token stays which does not end the sequence.
            least = max(2, len(plan.ends) + 1)
            keep = plan.params.min_tokens_to_keep
            keep = keep.clamp(min=least) if isinstance(keep, Tensor) else max(keep, least)
            self._params = dataclasses.replace(plan.params, min_tokens_to_keep=keep)
            self._generators = _generators(plan)
        self._state: SamplerState | None = None
        if self._changes:
            ids, real = rows.buffer[:, : rows.width], rows.real()[:, : rows.width]
            counts = plan.params.needs_counts
            self._state = SamplerState.from_prompt(ids, plan.vocab_size, real, counts)
        self._scores = torch.full(self._shape, -math.inf, dtype=torch.float64, device=device)
        self._scores[:, 0] = 0.0  # as yet all beams are the same
        # What is known of each row: tokens, and where asked for their log-probabilities and the
        # rows that each was chosen for.
        per_token = (*self._shape, plan.max_new)
        self._notes = {
            "tokens": torch.full(per_token, plan.pad, device=device),
            "length": torch.zeros(self._shape, dtype=torch.int64, device=device),
            "by_token": torch.zeros(self._shape, dtype=torch.bool, device=device),
        }
        if config.return_logprobs:
            self._notes["logprobs"] = torch.zeros(per_token, device=device)
        if config.return_scores:
            self._notes["origins"] = torch.zeros(per_token, dtype=torch.int64, device=device)
        self._steps: list[Tensor] = []
        self._ended = _Ended(self._scores, self._notes)
        self._improvable = torch.ones(self._shape[0], 1, dtype=torch.bool, device=device)

    def step(self, logits: Tensor, length: int) -> list[int] | None:
        """Goes on by one token.

        Args:
            logits: (batch * num_beams, vocab_size).
            length: new tokens that there will be then.

        Returns:
            The row that each row goes on from, or None where the search is over.
        """
        found = self._continue(logits, length)
        notes, by_token = self._noted(found, logits, length)
        if self._strings:
            by_token = by_token | self._strings_hit(found, notes, length)
            notes["by_token"] = by_token
        ends = by_token | (length == self._plan.max_new)
        self._keep(found.scores, notes, ends, length)
        # The candidates that do not end go on, the best first.
        self._scores, at = found.scores.masked_fill(ends, -math.inf).topk(self._shape[1])
        self._notes = {name: _pick(note, at) for name, note in notes.items()}
        origin = _pick(found.beams, at)
        first = torch.arange(self._shape[0], device=origin.device)[:, None] * self._shape[1]
        index = (origin + first).flatten()
        self._rows.reorder(index)
        self._rows.take(_pick(found.tokens, at).flatten())
        if self._state is not None:
            self._state.reorder(index)
            self._state.add(self._rows.tokens[:, 0])
        return self._look(found.scores, ends, index, length)

    def _continue(self, logits: Tensor, length: int) -> BeamStep:
        """The best candidates, or drawn ones."""
        config, step = self._plan.config, length - 1
        bans = self._bans.changes(step, step)
        if not (bans or self._changes or config.do_sample or config.return_scores):
            return beam_step(logits, self._scores, num_candidates=self._candidates)
        # What is changed are log-probabilities, and they are not normalized again.
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        if bans:
            self._bans.apply_(log_p, self._rows, step, step)
        if config.do_sample:
            failed = log_p.isnan().any(-1, keepdim=True)
            log_p = filtered(log_p, self._params, self._state)
            # NaN throughout also says that nothing is left, which one beam of several may be.
            log_p = log_p.masked_fill(log_p.isnan() & ~failed, -math.inf)
        elif self._changes:
            assert self._state is not None
            log_p = change_logits(log_p, self._params, self._state)
        if config.return_scores:
            self._steps.append(log_p.float())
        if config.do_sample:
            return self._draw(log_p)
        moments = softmax_moments(log_p)
        total = (moments.maximum + moments.log_sum).view(self._shape)
        return beam_step(log_p, self._scores + total, num_candidates=self._candidates)

    def _draw(self, log_p: Tensor) -> BeamStep:
        """Candidates without replacement, by the exponential of score and log-probability.

        The first of an exponential race (Efraimidis and Spirakis 2006) of rates exp(total), then
        the best first, as in Hugging Face's since 5.24.
        """
        vocab_size = log_p.shape[-1]
        log_p = log_p.view(*self._shape, vocab_size)
        totals = (self._scores[..., None] + log_p.double()).flatten(1)
        noise = torch.empty(totals.shape, dtype=torch.float32, device=totals.device)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        drawn = totals - noise.clamp_(min=torch.finfo(noise.dtype).tiny).log().double()
        count = min(self._candidates, drawn.shape[1])
        places = drawn.topk(count).indices
        scores, order = totals.gather(1, places).sort(-1, descending=True)
        places = places.gather(1, order)
        return BeamStep(scores, places % vocab_size, places // vocab_size)

    def _noted(
        self, found: BeamStep, logits: Tensor, length: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What is known of each candidate, and whether it ends by its token."""
        notes = {name: _pick(note, found.beams) for name, note in self._notes.items()}
        notes["tokens"][:, :, length - 1] = found.tokens
        notes["length"] = torch.full_like(found.tokens, length)
        notes["by_token"] = self._rows.is_stop(found.tokens)
        first = torch.arange(self._shape[0], device=logits.device)[:, None] * self._shape[1]
        if "logprobs" in notes:
            rows = logits[(found.beams + first).flatten()]
            gained = log_probabilities(rows, found.tokens.flatten()).view(found.tokens.shape)
            notes["logprobs"][:, :, length - 1] = gained.float()
        if "origins" in notes:
            notes["origins"][:, :, length - 1] = found.beams + first
        return notes, notes["by_token"]

    def _strings_hit(self, found: BeamStep, notes: dict[str, Tensor], length: int) -> Tensor:
        texts = notes["tokens"][:, :, :length].flatten(0, 1).tolist()
        alive = (found.scores > -math.inf).flatten().tolist()
        hits = [here and self._strings.hit(ids) for here, ids in zip(alive, texts, strict=True)]
        return torch.tensor(hits, device=found.tokens.device).view(found.tokens.shape)

    def _keep(self, scores: Tensor, notes: dict[str, Tensor], ends: Tensor, length: int) -> None:
        """Keeps candidates aside that end, if they are among the best num_beams."""
        config, ended = self._plan.config, self._ended
        places = torch.arange(scores.shape[1], device=scores.device)
        kept = ends & (places < self._shape[1]) & self._improvable
        if config.early_stopping is True:
            kept &= ~ended.full
        over_length = scores / length**config.length_penalty
        ended.add(over_length.masked_fill(~kept, -math.inf), notes)

    def _look(
        self, candidates: Tensor, ends: Tensor, index: Tensor, length: int
    ) -> list[int] | None:
        """Whether to go on, and from which rows: the one place where the host waits."""
        config, ended = self._plan.config, self._ended
        # Up to which length a beam might still do better: by its present one, or by its best.
        hopes = config.early_stopping == "never" and config.length_penalty > 0
        best = (
            self._scores[:, :1] / (self._plan.max_new if hopes else length) ** config.length_penalty
        )
        self._improvable &= (best > ended.scores.amin(1, keepdim=True)).any(1, keepdim=True)
        over = ~self._improvable.any() | ends.all()
        if config.early_stopping is True:
            over |= ended.full.all()
        dead = (self._scores[:, 0] == -math.inf) & (ended.scores[:, 0] == -math.inf)
        failed = candidates.isnan().any() | dead.any()
        *origins, done, bad = torch.cat([index, torch.stack([over, failed]).long()]).tolist()
        if bad:
            raise ValueError(
                "logits must have a number above -inf and no NaN after penalties and bans, got a "
                "prompt without one in any beam: nothing is left that may come next"
            )
        return None if done else origins

    def result(self) -> Generated:
        """The best sequences. Waits for the device."""
        plan, ended = self._plan, self._ended
        kept = plan.config.num_return_sequences
        scores = ended.scores[:, :kept].flatten()
        notes = {name: note[:, :kept].flatten(0, 1) for name, note in ended.notes.items()}
        lengths = notes["length"].masked_fill(scores == -math.inf, 0)
        longest = int(lengths.max())
        inside = torch.arange(longest, device=scores.device) < lengths[:, None]
        tokens = notes["tokens"][:, :longest].masked_fill(~inside, plan.pad)
        logprobs = notes["logprobs"][:, :longest] * inside if "logprobs" in notes else None
        all_scores = None
        if "origins" in notes:
            steps = torch.stack(self._steps[:longest])  # (steps, batch * num_beams, vocab_size)
            at = torch.arange(longest, device=scores.device)
            all_scores = steps[at, notes["origins"][:, :longest]].masked_fill(~inside[..., None], 0)
        return Generated(
            sequences=plan.prompts.append(tokens, plan.pad),
            tokens=tokens,
            lengths=lengths,
            finished=notes["by_token"] & (scores > -math.inf),
            sequence_scores=scores.float(),
            logprobs=logprobs,
            scores=all_scores,
        )


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values (batch, n, ...) at index (batch, m) of their second dimension: (batch, m, ...)."""
    if values.dim() == 2:
        return values.gather(1, index)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _generators(plan: Plan) -> list[torch.Generator]:
    """A source of noise for each prompt, so that its draws do not depend on the batch."""
    assert isinstance(plan.params.seed, Tensor)
    seeds = plan.params.seed[:: plan.copies].tolist()
    return [torch.Generator(plan.device).manual_seed(seed) for seed in seeds]
