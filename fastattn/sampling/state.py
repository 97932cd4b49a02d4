"""What a sampler remembers of each row: which tokens were seen, how often, and the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.sampling.bits import WORD_BITS, num_words, pack_mask
from fastattn.validation import check_tensor, describe


@dataclass(frozen=True, eq=False)
class SamplerState:
    """Penalty state and step of each row. The tensors never move: all updates are in place, without
    a synchronisation, so that a CUDA graph may hold them.

    `sample` keeps it up to date itself; make one with `make` or `from_prompt`.

    Args:
        seen: int32 (batch, ceil(vocab_size / 32)), a bit for each token of prompt and output: bit
            t % 32 of word t // 32 is token t.
        step: int64 (batch,), how many tokens were drawn; part of the noise's place.
        vocab_size: tokens.
        counts: int32 (batch, vocab_size), how often each token was *drawn*; None where neither
            presence nor frequency penalty is used.
    """

    seen: Tensor
    step: Tensor
    vocab_size: int
    counts: Tensor | None = None

    @staticmethod
    def make(
        batch: int,
        vocab_size: int,
        device: torch.device | str | None = None,
        counts: bool = False,
    ) -> SamplerState:
        """A state in which nothing was seen.

        Raises:
            ValueError: `batch` or `vocab_size` is not positive.
        """
        for name, value, least in (("batch", batch, 0), ("vocab_size", vocab_size, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        return SamplerState(
            seen=torch.zeros(batch, num_words(vocab_size), dtype=torch.int32, device=device),
            step=torch.zeros(batch, dtype=torch.int64, device=device),
            vocab_size=vocab_size,
            counts=torch.zeros(batch, vocab_size, dtype=torch.int32, device=device)
            if counts
            else None,
        )

    @staticmethod
    def from_prompt(
        input_ids: Tensor, vocab_size: int, mask: Tensor | None = None, counts: bool = False
    ) -> SamplerState:
        """A state in which the tokens of a prompt were seen; counts, which are of output, are 0.

        Args:
            input_ids: int (batch, seqlen). Ids outside 0..vocab_size-1 are no tokens: ignored.
            vocab_size: tokens.
            mask: bool or integer (batch, seqlen), True or non-zero for real tokens, as a
                tokenizer's `attention_mask`; None: all are.
            counts: also make `counts`.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be integers (batch, seqlen), got {describe(input_ids)}"
            )
        real = (input_ids >= 0) & (input_ids < vocab_size)
        if mask is not None:
            check_tensor("mask", mask)
            if mask.shape != input_ids.shape or mask.device != input_ids.device:
                raise ValueError(
                    f"mask must have the shape and device of input_ids ({describe(input_ids)}), "
                    f"got {describe(mask)}"
                )
            real = real & (mask != 0)
        state = SamplerState.make(input_ids.shape[0], vocab_size, input_ids.device, counts)
        # One column more takes what is no token.
        marks = torch.zeros(
            input_ids.shape[0], vocab_size + 1, dtype=torch.bool, device=input_ids.device
        )
        marks.scatter_(1, torch.where(real, input_ids, vocab_size).to(torch.int64), True)
        state.seen.copy_(pack_mask(marks[:, :vocab_size]))
        return state

    @property
    def batch(self) -> int:
        """Rows."""
        return self.seen.shape[0]

    def add(self, tokens: Tensor) -> None:
        """Marks one drawn token a row as seen, counts it, and goes a step on.

        Args:
            tokens: int64 (batch,); an id outside 0..vocab_size-1, such as `ERROR_TOKEN`, marks
                nothing.
        """
        index = tokens.to(torch.int64).clamp(0, self.vocab_size - 1)[:, None]
        real = index == tokens[:, None]
        word = index // WORD_BITS
        bit = (real.to(torch.int64) << (index % WORD_BITS)).to(torch.int32)
        self.seen.scatter_(1, word, self.seen.gather(1, word) | bit)
        if self.counts is not None:
            self.counts.scatter_add_(1, index, real.to(torch.int32))
        self.step.add_(1)

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row `index[b]` was, as beam search needs."""
        for tensor in self._tensors():
            tensor.copy_(tensor.index_select(0, index))

    def reset(self, rows: Tensor) -> None:
        """Frees rows for new sequences: nothing seen, nothing counted, step 0.

        Args:
            rows: int64 row numbers, or bool (batch,), True = free.
        """
        for tensor in self._tensors():
            if rows.dtype == torch.bool:
                # Not indexed by the mask, which would make the host wait for its count.
                tensor.masked_fill_(rows.view(-1, *[1] * (tensor.dim() - 1)), 0)
            else:
                tensor.index_fill_(0, rows.to(torch.int64), 0)

    def clone(self) -> SamplerState:
        """A copy that shares nothing."""
        counts = None if self.counts is None else self.counts.clone()
        return SamplerState(self.seen.clone(), self.step.clone(), self.vocab_size, counts)

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.seen, self.step, self.counts) if tensor is not None]
