"""Speculative decoding: a draft model goes ahead, the model checks what it wrote in one pass.

Exact: what comes out is distributed as if the model had drawn token by token, and for greedy
decoding is what the model itself would have written, up to rounding (`speculative_verify`). The
host reads in each round how many tokens every row has kept, since both caches are told so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastattn.generation.bans import Bans
from fastattn.generation.choose import change_logits, changes_logits, largest
from fastattn.generation.plan import Plan, draft_tokens
from fastattn.generation.result import Generated, Records, Speculation
from fastattn.generation.rows import Rows
from fastattn.generation.watch import Watch
from fastattn.models.protocol import GenerativeModel
from fastattn.sampling import (
    SamplerState,
    SamplingParams,
    log_probabilities,
    sample,
    speculative_verify,
)
from fastattn.sampling.reference import filtered

_PLAIN = SamplingParams()


def spare_columns(plan: Plan) -> int:
    """Columns that `Rows` needs behind the last: for drafts that are not kept."""
    return draft_tokens(plan.config) + 2


def decode_speculatively(
    plan: Plan,
    model: GenerativeModel,
    draft_model: GenerativeModel,
    rows: Rows,
    watch: Watch,
) -> Generated:
    """Decodes until all rows have ended, or have max_new tokens.

    Args:
        draft_model: of the same vocabulary; the faster and the more alike, the better.
    """
    records = Records(plan)
    rounds = _Rounds(plan, model, draft_model, rows, records)
    rounds.first()
    while True:
        done = watch.look(all_given=False)
        if done or not rounds.room():
            break
        rounds.round()
    return records.result(plan, rows, Speculation(rounds.count, rounds.drafted, rounds.accepted))


class _Drafts(NamedTuple):
    """Drafted tokens int64 (rows, n), how many of each row count, and what each was drawn from
    (rows, n, vocab_size); None if greedy."""

    tokens: Tensor
    counts: list[int]
    scores: Tensor | None


class _Text:
    """Rows and penalties' state that may go on by tokens which are then not kept."""

    def __init__(self, rows: Rows, state: SamplerState | None) -> None:
        self.rows, self.state = rows, state

    def fork(self) -> _Text:
        return _Text(self.rows.fork(), None if self.state is None else self.state.clone())

    def take(self, tokens: Tensor) -> None:
        self.rows.take(tokens)
        if self.state is not None:
            self.state.add(tokens)


class _Rounds:
    """Both models, and how far they are.

    Each cache lacks a few tokens of its rows: that of the model the last one, that of the draft
    model also the one before, where a whole draft was kept, whose last token it never read.
    """

    def __init__(
        self,
        plan: Plan,
        model: GenerativeModel,
        draft_model: GenerativeModel,
        rows: Rows,
        records: Records,
    ) -> None:
        self._plan, self._model, self._draft_model = plan, model, draft_model
        self._rows, self._records = rows, records
        self._bans = Bans(plan)
        self._draws = plan.config.do_sample
        self._changes = changes_logits(plan.params)
        state = None
        if self._changes:
            ids, real = rows.buffer[:, : rows.width], rows.real()[:, : rows.width]
            counts = plan.params.needs_counts
            state = SamplerState.from_prompt(ids, plan.vocab_size, real, counts)
        self._text = _Text(rows, state)
        self._lengths = [0] * plan.rows  # new tokens of each row
        self._ended = [False] * plan.rows
        self._lacking: list[list[int]] = [[] for _ in range(plan.rows)]  # in the draft's cache
        self.count = self.drafted = self.accepted = 0

    def first(self) -> None:
        """Reads the prompts, and takes the first token from the model's own logits."""
        logits, self._session = self._plan.start(self._model)
        _, self._draft_session = self._plan.start(self._draft_model)
        scores = self._scores(logits, self._text, 0, 0)
        tokens = self._draw(scores)
        self._note(logits[:, None], scores[:, None], tokens[:, None], [1] * len(tokens))
        self._text.take(tokens)
        self._lengths = [1] * self._plan.rows
        self._lacking = [[token] for token in tokens.clamp(min=0).tolist()]

    def room(self) -> bool:
        """Whether a row goes on."""
        # The watch may have ended rows, by a string.
        self._ended = self._rows.finished.tolist()
        lengths = self._rows.new_tokens().tolist()
        return any(
            not ended and length < self._plan.max_new
            for ended, length in zip(self._ended, lengths, strict=True)
        )

    def round(self) -> None:
        """Drafts, checks, and goes on by what is kept and one token more."""
        most = draft_tokens(self._plan.config)
        goes_on = [
            not ended and length < self._plan.max_new
            for ended, length in zip(self._ended, self._lengths, strict=True)
        ]
        counts = [
            min(most, self._plan.max_new - length - 1) if here else 0
            for here, length in zip(goes_on, self._lengths, strict=True)
        ]
        drafts = self._draft(counts)
        fed = torch.cat([self._rows.last(1)[0], drafts.tokens], 1)
        logits = self._model.step(
            fed,
            self._session,
            [count + 1 if here else 0 for here, count in zip(goes_on, counts, strict=True)],
            all_logits=True,
        )
        scores = self._target_scores(logits, drafts)
        verified = speculative_verify(
            drafts.tokens,
            scores,
            draft_logits=drafts.scores,
            draft_lengths=torch.tensor(counts, device=fed.device),
            temperature=1.0 if self._draws else 0.0,
            seed=self._plan.params.seed,
            step=self._rows.new_tokens(),
        )
        self._advance(verified.tokens, verified.num_accepted, logits, scores, goes_on, counts)

    def _draft(self, counts: list[int]) -> _Drafts:
        """Up to counts[b] tokens by the draft model, under the same bans, penalties and cuts."""
        device, number = self._plan.device, max(counts)
        if number == 0:
            empty = torch.zeros(len(counts), 0, dtype=torch.int64, device=device)
            none = torch.zeros(len(counts), 0, self._plan.vocab_size, device=device)
            return _Drafts(empty, counts, none if self._draws else None)
        lacking = [
            torch.tensor(tokens if count else [], dtype=torch.int64)
            for tokens, count in zip(self._lacking, counts, strict=True)
        ]
        fed = pad_sequence(lacking, batch_first=True, padding_value=self._plan.pad).to(device)
        logits = self._draft_model.step(fed, self._draft_session, [len(row) for row in lacking])
        text = self._text.fork()
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        least, most = self._bounds()
        for place in range(number):
            if place:
                more = [1 if count > place else 0 for count in counts]
                logits = self._draft_model.step(tokens[-1][:, None], self._draft_session, more)
            here = self._scores(logits, text, least + place, most + place)
            # A row that drafts no more may have any logits, NaN too.
            drawn = self._draw(here, text.rows.new_tokens()).clamp(min=0)
            tokens.append(drawn)
            scores.append(here)
            text.take(drawn)
        drawn_from = torch.stack(scores, 1) if self._draws else None
        return _Drafts(torch.stack(tokens, 1), counts, drawn_from)

    def _target_scores(self, logits: Tensor, drafts: _Drafts) -> Tensor:
        """What the model chooses by after each drafted token, (rows, n + 1, vocab_size)."""
        text = self._text.fork()
        least, most = self._bounds()
        result = []
        for place in range(logits.shape[1]):
            if place:
                text.take(drafts.tokens[:, place - 1])
            result.append(self._scores(logits[:, place], text, least + place, most + place))
        return torch.stack(result, 1)

    def _bounds(self) -> tuple[int, int]:
        """Least and largest number of new tokens of the rows that go on."""
        lengths = [n for n, ended in zip(self._lengths, self._ended, strict=True) if not ended]
        return min(lengths), max(lengths)

    def _scores(self, logits: Tensor, text: _Text, least: int, most: int) -> Tensor:
        """Logits after bans and penalties, and if something is drawn after temperature and cuts."""
        scores = logits
        if self._bans.changes(least, most):
            scores = self._bans.apply_(logits.clone(), text.rows, least, most)
        if self._draws:
            return filtered(scores, self._plan.params, text.state)
        if self._changes:
            assert text.state is not None
            return change_logits(scores, self._plan.params, text.state)
        return scores

    def _draw(self, scores: Tensor, step: Tensor | None = None) -> Tensor:
        """A token by scores that are cut already."""
        if not self._draws:
            return largest(scores)
        state = SamplerState.make(len(scores), self._plan.vocab_size, scores.device)
        if step is not None:
            state.step.copy_(step)
        params = SamplingParams(seed=self._plan.params.seed)
        tokens = sample(scores, params, state)
        assert isinstance(tokens, Tensor)  # no log-probabilities were asked for
        return tokens

    def _advance(
        self,
        tokens: Tensor,
        num_accepted: Tensor,
        logits: Tensor,
        scores: Tensor,
        goes_on: list[bool],
        counts: list[int],
    ) -> None:
        """Keeps what was emitted, up to an end token, and takes the rest back from both caches."""
        width = tokens.shape[1]
        places = torch.arange(width, device=tokens.device)
        stops = self._rows.is_stop(tokens)
        first_stop = torch.where(stops, places, width).amin(1)
        kept = torch.minimum(num_accepted + 1, first_stop + 1)
        accepted, emitted, drawn = num_accepted.tolist(), kept.tolist(), tokens.tolist()
        emitted = [n if here else 0 for n, here in zip(emitted, goes_on, strict=True)]
        self._note(logits, scores, tokens, emitted)
        self._extend(tokens, torch.tensor(emitted, device=tokens.device))
        takes_back, draft_takes_back = [0] * len(emitted), [0] * len(emitted)
        for row, (n, count) in enumerate(zip(emitted, counts, strict=True)):
            if not n:
                continue
            self._lengths[row] += n
            new = [max(token, 0) for token in drawn[row][:n]]
            # The caches keep all but the last token, which the next round begins with.
            takes_back[row] = count - (n - 1)
            if count:
                read = count - 1  # drafted tokens that the draft model was given back
                held = min(n - 1, read)
                draft_takes_back[row] = read - held
                self._lacking[row] = new[held:]
            self.accepted += min(accepted[row], count)
            self.drafted += count
        self.count += 1
        self._session.rollback(takes_back)
        self._draft_session.rollback(draft_takes_back)

    def _extend(self, tokens: Tensor, counts: Tensor) -> None:
        rows, state = self._rows, self._text.state
        present = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        rows.failed |= (present & (tokens < 0)).any(1)
        rows.finished |= (present & rows.is_stop(tokens)).any(1)
        rows.extend(tokens.clamp(min=0), counts)
        if state is not None:
            for column in tokens.where(present, -1).unbind(1):
                state.add(column)  # -1 marks nothing

    def _note(self, logits: Tensor, scores: Tensor, tokens: Tensor, counts: list[int]) -> None:
        """Writes down what was asked for of the first counts[b] tokens of each row."""
        records = self._records
        if records.logprobs is None and records.scores is None:
            return
        pairs = [(row, place) for row, n in enumerate(counts) for place in range(n)]
        if not pairs:
            return
        row, place = torch.tensor(pairs, device=tokens.device).unbind(1)
        at = (row, torch.tensor(self._lengths, device=tokens.device)[row] + place)
        if records.logprobs is not None:
            token = tokens[row, place].clamp(min=0)
            records.logprobs[at] = log_probabilities(logits[row, place], token).float()
        if records.scores is not None:
            records.scores[at] = scores[row, place].float()
