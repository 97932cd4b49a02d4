"""From torch tensors to the named tuples that the sampling kernel takes. Nothing is copied."""

from dataclasses import dataclass

import torch

from fastattn.kernels.sampling.logits import Setting, Table

Number = float | torch.Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings and state of a draw, already validated.

    Numbers are floats, or tensors (batch,) of any dtype. `seed` is an int or int64 (batch,).
    Bitmasks are int32 (batch or 1, ceil(vocab_size / 32)), `bias` (batch or 1, vocab_size).
    `seen`, `counts` (batch, vocab_size) int32 and `step` (batch,) int64 are updated in place.
    """

    temperature: Number = 1.0
    top_k: Number = 0.0
    top_p: Number = 1.0
    min_p: Number = 0.0
    min_tokens_to_keep: Number = 1.0
    repetition_penalty: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    seed: int | torch.Tensor = 0
    bias: torch.Tensor | None = None
    allowed: torch.Tensor | None = None
    seen: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    step: torch.Tensor | None = None
    joint: bool = False

    @property
    def reads_seen(self) -> bool:
        """Whether a penalty looks at which tokens were seen."""
        return self.seen is not None and not _is(self.repetition_penalty, 1.0)

    @property
    def reads_counts(self) -> bool:
        """Whether a penalty looks at how often tokens were drawn."""
        zero = _is(self.presence_penalty, 0.0) and _is(self.frequency_penalty, 0.0)
        return self.counts is not None and not zero


def _is(number: Number, value: float) -> bool:
    return not isinstance(number, torch.Tensor) and number == value


def setting(number: Number) -> Setting:
    """A number for all rows or one a row, as the kernel takes it."""
    if isinstance(number, torch.Tensor):
        return Setting(number.contiguous(), None)
    return Setting(None, float(number))


def table(tensor: torch.Tensor | None) -> Table:
    """(batch or 1, entries), entries next to each other."""
    if tensor is None:
        return Table(None, None)
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        tensor = tensor.contiguous()
    return Table(tensor, 0 if tensor.shape[0] == 1 else tensor.stride(0))
