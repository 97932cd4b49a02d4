"""A module that draws tokens step by step and remembers what penalties and noise need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.sampling import Sample, SamplerState, SamplingParams, sample
from fastattn.validation import check_tensor, describe


class Sampler(nn.Module):
    """`fastattn.sample` with its settings and its state.

        sampler = Sampler(SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.2))
        sampler.start(input_ids, attention_mask)
        tokens = input_ids
        for _ in range(max_new_tokens):
            logits = model(tokens)[:, -1]            # (batch, vocab_size)
            new = sampler(logits)                    # (batch,)
            tokens = torch.cat([tokens, new[:, None]], 1)

    Without `start` the first call begins a batch of which nothing was seen, at step 0. The state
    follows `.to(device)`, with the settings that are tensors, but is no part of a checkpoint:
    `state_dict()` is empty. Its tensors stay where they are from step to step, and when `start`
    begins another batch of the same size, so that a CUDA graph may hold them.

    Args:
        params: how to draw. May be set anew between steps; penalties on counts must be on already
            when a batch begins.
        vocab_size: tokens, where known: `start` makes the state at once, which a CUDA graph needs.
            None: made at the first call, from the logits.
        impl: as for `sample`.
    """

    def __init__(
        self,
        params: SamplingParams | None = None,
        *,
        vocab_size: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.params = SamplingParams() if params is None else params
        if not isinstance(self.params, SamplingParams):
            raise TypeError(f"params must be SamplingParams, got {params!r}")
        self.vocab_size = vocab_size
        self.impl = impl
        self.state: SamplerState | None = None
        # A prompt, and which of it is real, that waits for the vocabulary's size.
        self._prompt: tuple[Tensor, Tensor] | None = None

    def forward(self, logits: Tensor) -> Tensor | Sample:
        """Draws a token a row, and remembers it.

        Args:
            logits: (batch, vocab_size), float16, bfloat16 or float32, any row stride.

        Returns:
            As `sample`: int64 (batch,), or a `Sample` where `params.logprobs` is set.

        Raises:
            TypeError, ValueError, NotImplementedError: as `sample`; also where logits have not the
                rows of the batch that was begun.
        """
        check_tensor("logits", logits)
        if logits.dim() != 2:
            raise ValueError(f"logits must be (batch, vocab_size), got {describe(logits)}")
        batch, vocab_size = logits.shape
        begun = self._rows()
        if begun is not None and begun != batch:
            raise ValueError(
                f"logits must have the {begun} rows of the batch that was begun, got "
                f"{describe(logits)}: begin another with start()"
            )
        if self._prompt is not None:
            self._make_state(vocab_size)
        elif self.state is None:
            counts = self.params.needs_counts
            self.state = SamplerState.make(batch, vocab_size, logits.device, counts)
        return sample(logits, self.params, self.state, impl=self.impl)

    def start(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: Tensor | None = None
    ) -> None:
        """Begins a batch: its prompt was seen, nothing was drawn, step 0.

        Args:
            input_ids: int (batch, seqlen), the prompts.
            attention_mask: bool or integer (batch, seqlen), non-zero for real tokens; None: all.
            rows: int64 (batch,), where these prompts take the place of sequences that have
                finished, in the batch that is under way, whose other rows go on.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers (batch, seqlen), got {describe(input_ids)}"
            )
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask)
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask must be of shape {tuple(input_ids.shape)} like input_ids, got "
                    f"{describe(attention_mask)}"
                )
        if rows is not None:
            self._start_rows(input_ids, attention_mask, rows)
            return
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._prompt = (input_ids, real != 0)
        if self.vocab_size is not None:
            self._make_state(self.vocab_size)

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row `index[b]` was, as beam search needs; index: int64 (batch,)."""
        check_tensor("index", index)
        batch = self._rows()
        if batch is None:
            raise ValueError("reorder needs a batch: begin one with start()")
        if index.shape != (batch,):
            raise ValueError(f"index must be of shape ({batch},), got {describe(index)}")
        if self._prompt is not None:
            input_ids, real = self._prompt
            self._prompt = (input_ids.index_select(0, index), real.index_select(0, index))
        elif self.state is not None:
            self.state.reorder(index)

    def reset(self, rows: Tensor | None = None) -> None:
        """Frees rows, int64 numbers or bool (batch,): nothing seen, step 0. None: forgets the
        batch, so that the next may be of another size."""
        if rows is None:
            self.state = self._prompt = None
        elif self._prompt is not None:
            _, real = self._prompt
            # Not the caller's mask: `start` made this one.
            if rows.dtype == torch.bool:
                real.masked_fill_(rows[:, None], False)
            else:
                real.index_fill_(0, rows.to(torch.int64), False)
        elif self.state is not None:
            self.state.reset(rows)

    def extra_repr(self) -> str:
        """What `print` shows: the settings that differ from the defaults."""
        default = SamplingParams()
        parts = []
        for field in dataclasses.fields(SamplingParams):
            value = getattr(self.params, field.name)
            if isinstance(value, Tensor):
                parts.append(f"{field.name}=tensor {describe(value)}")
            elif field.repr and value != getattr(default, field.name):
                parts.append(f"{field.name}={value!r}")
        return ", ".join([*parts, f"impl={self.impl!r}"])

    def _rows(self) -> int | None:
        """Rows of the batch that was begun."""
        if self._prompt is not None:
            return self._prompt[0].shape[0]
        return None if self.state is None else self.state.batch

    def _make_state(self, vocab_size: int) -> None:
        """Turns the prompt that waits into the state, in the tensors of the last one if it can."""
        assert self._prompt is not None
        input_ids, real = self._prompt
        counts = self.params.needs_counts
        fresh = SamplerState.from_prompt(input_ids, vocab_size, real, counts)
        old, self._prompt = self.state, None
        fits = (
            old is not None
            and old.seen.shape == fresh.seen.shape
            and (old.vocab_size, old.seen.device) == (vocab_size, fresh.seen.device)
            and (old.counts is None) == (not counts)
        )
        if not fits:
            self.state = fresh
            return
        for old_tensor, tensor in zip(_tensors(old), _tensors(fresh), strict=True):
            old_tensor.copy_(tensor)

    def _start_rows(self, input_ids: Tensor, attention_mask: Tensor | None, rows: Tensor) -> None:
        check_tensor("rows", rows)
        if rows.shape != (input_ids.shape[0],) or rows.dtype != torch.int64:
            raise ValueError(
                f"rows must be int64 ({input_ids.shape[0]},), a row for each prompt, got "
                f"{describe(rows)}"
            )
        if self.state is None or self._prompt is not None:
            raise ValueError(
                "rows must be None before the first draw of a batch: start() the whole batch, or "
                "give Sampler its vocab_size"
            )
        fresh = SamplerState.from_prompt(
            input_ids, self.state.vocab_size, attention_mask, self.state.counts is not None
        )
        for old, new in zip(_tensors(self.state), _tensors(fresh), strict=True):
            old.index_copy_(0, rows, new)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Sampler:
        super()._apply(fn, recurse)
        # Only where things lie is taken over: .half() must not round a temperature.
        own = [self.params.seed] + [getattr(self.params, name) for name in self.params.row_tensors]
        own += [self.params.logit_bias, self.params.banned, self.params.allowed]
        own += [] if self.state is None else [self.state.seen]
        own += [] if self._prompt is None else [self._prompt[0]]
        here = next((value.device for value in own if isinstance(value, Tensor)), None)
        if here is None:
            return self
        device = fn(torch.empty(0, dtype=torch.int64, device=here)).device
        self.params = _params_on(self.params, device)
        if self.state is not None:
            seen, step, *counts = (tensor.to(device) for tensor in _tensors(self.state))
            self.state = SamplerState(seen, step, self.state.vocab_size, *counts)
        if self._prompt is not None:
            self._prompt = (self._prompt[0].to(device), self._prompt[1].to(device))
        return self


def _tensors(state: SamplerState | None) -> list[Tensor]:
    assert state is not None
    return [t for t in (state.seen, state.step, state.counts) if t is not None]


def _params_on(params: SamplingParams, device: torch.device) -> SamplingParams:
    """The same settings, tensors among them on `device`."""
    moved: dict[str, Any] = {}
    for field in dataclasses.fields(SamplingParams):
        value = getattr(params, field.name)
        if field.init and isinstance(value, Tensor) and value.device != device:
            moved[field.name] = value.to(device)
    return dataclasses.replace(params, **moved) if moved else params
