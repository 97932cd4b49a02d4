"""How tokens are drawn from logits, as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.validation import check_tensor, describe, values_readable

TINY_TEMPERATURE = 1e-10
"""A temperature below this is 0: the largest logit wins."""

INT32_MAX = 2**31 - 1


class Range(NamedTuple):
    """What a setting may be, and what a tensor's entries out of range become on a GPU."""

    low: float
    high: float
    nan: float
    integer: bool = False
    low_is_excluded: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        above = value > self.low if self.low_is_excluded else value >= self.low
        return above and value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high) and self.high > 0:
            if math.isinf(self.low):
                return "a finite number"
            return f"{'above' if self.low_is_excluded else 'at least'} {self.low:g}"
        return f"in {'(' if self.low_is_excluded else '['}{self.low:g}, {self.high:g}]"


FLOAT_MAX = torch.finfo(torch.float32).max

RANGES = {
    "temperature": Range(0.0, FLOAT_MAX, nan=0.0),
    "top_k": Range(0, INT32_MAX, nan=0, integer=True),
    "top_p": Range(0.0, 1.0, nan=1.0),
    "min_p": Range(0.0, 1.0, nan=0.0),
    "min_tokens_to_keep": Range(1, INT32_MAX, nan=1, integer=True),
    "repetition_penalty": Range(0.0, FLOAT_MAX, nan=1.0, low_is_excluded=True),
    "presence_penalty": Range(-FLOAT_MAX, FLOAT_MAX, nan=0.0),
    "frequency_penalty": Range(-FLOAT_MAX, FLOAT_MAX, nan=0.0),
}
"""The settings that are a number, or one number a row."""

Number = float | Tensor


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """How a token is drawn from each row of logits. The defaults draw from their softmax.

    Each number is a Python number, or a tensor of shape (batch,) with one value a row: greedy rows
    and any settings side by side in one batch. What is done, in this order, in float32:

        penalties -> logit_bias -> bans -> temperature -> top_k -> top_p -> min_p -> draw

    which is the order, and the meaning, of the processors of Hugging Face's `generate`. Sets are
    cut by value: tokens of equal score are kept or cut together.

    Numbers out of range raise. A tensor on a GPU is not looked at, since that would make the host
    wait (within `fastattn.testing.debug()` it is, and raises): there a value below or above its
    range becomes the nearest end of it, NaN becomes the default (temperature: 0), and a repetition
    penalty that is not above 0 becomes 1.

    Args:
        temperature: divides the logits; below 1e-10 the largest wins, the lowest id on a tie.
        top_k: keeps scores at least the k-th largest, so all that tie with it; 0, or the size of
            the vocabulary or more, is off.
        top_p: in [0, 1]. Keeps a token if the tokens of strictly larger score have together a
            probability below p (Holtzman et al., arXiv:1904.09751); 1 is off. Probabilities are
            over what top_k left.
        min_p: in [0, 1]. Keeps tokens at least min_p times as probable as the likeliest (Nguyen et
            al., arXiv:2407.01082); 0 is off.
        min_tokens_to_keep: none of the three cuts any of this many largest scores.
        repetition_penalty: divides the positive and multiplies the other logits of tokens that
            `SamplerState.seen` holds (Keskar et al., arXiv:1909.05858); 1 is off.
        presence_penalty: taken from logits of tokens with `SamplerState.counts` above 0.
        frequency_penalty: times the token's count, taken from its logit.
        logit_bias: added: floating (vocab_size,) or (batch, vocab_size), or a number by token id.
        banned: token ids that are never drawn, or bool (vocab_size,) or (batch, vocab_size), True =
            banned.
        allowed: int32 (batch or 1, ceil(vocab_size / 32)): only tokens whose bit is set may be
            drawn; bit t % 32 of word t // 32 is token t (see `pack_mask`).
        joint: the probabilities of top_p are over all tokens, not over what top_k left.
        seed: an int, or int64 (batch,), the key of each row's noise. The draw of a row follows from
            its logits, seed and step alone, not from its place in the batch: rows of equal logits
            and seed draw the same token. None draws one for each row and call from torch's
            generator.
        logprobs: None gives tokens alone; 0 also the log-probability of each; n also those of the
            n likeliest tokens.
        logprobs_of: "filtered", the distribution that is drawn from, or "raw", the softmax of the
            logits as they are given.

    Raises:
        TypeError, ValueError: a value is not as described; the message names it.
    """

    temperature: Number = 1.0
    top_k: int | Tensor = 0
    top_p: Number = 1.0
    min_p: Number = 0.0
    min_tokens_to_keep: int | Tensor = 1
    repetition_penalty: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: Tensor | dict[int, float] | None = None
    banned: Tensor | list[int] | None = None
    allowed: Tensor | None = None
    joint: bool = False
    seed: int | Tensor | None = None
    logprobs: int | None = None
    logprobs_of: str = "filtered"
    # What was made of logit_bias, banned and allowed for a device and size, kept between calls.
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            _check_number(name, getattr(self, name), allowed)
        self._made["row_tensors"] = [
            name for name in RANGES if isinstance(getattr(self, name), Tensor)
        ]
        seed = self.seed
        if seed is not None and not isinstance(seed, Tensor):
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise TypeError(f"seed must be an int, an int64 tensor or None, got {seed!r}")
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"seed must fit into 64 bits with sign, got {seed}")
        if self.logprobs is not None:
            if isinstance(self.logprobs, bool) or not isinstance(self.logprobs, int):
                raise TypeError(f"logprobs must be an int or None, got {self.logprobs!r}")
            if self.logprobs < 0:
                raise ValueError(f"logprobs must be at least 0, got {self.logprobs}")
        if self.logprobs_of not in ("filtered", "raw"):
            raise ValueError(f'logprobs_of must be "filtered" or "raw", got {self.logprobs_of!r}')

    @property
    def row_tensors(self) -> list[str]:
        """The settings that are a tensor, one value a row."""
        names: list[str] = self._made["row_tensors"]
        return names

    @property
    def needs_seen(self) -> bool:
        """Whether the repetition penalty may be on."""
        return not _is_host(self.repetition_penalty, 1.0)

    @property
    def needs_counts(self) -> bool:
        """Whether the presence or frequency penalty may be on."""
        return not (_is_host(self.presence_penalty, 0) and _is_host(self.frequency_penalty, 0))

    def check(self, logits: Tensor) -> None:
        """Raises unless these settings fit `logits` (batch, vocab_size); launches nothing on a GPU.

        Raises:
            TypeError, ValueError: naming the argument, its value and what was expected.
        """
        batch, vocab_size = logits.shape
        for name in self.row_tensors:
            _check_row_tensor(name, getattr(self, name), RANGES[name], logits)
        if isinstance(self.seed, Tensor):
            _check_on("seed", self.seed, logits)
            if self.seed.dtype != torch.int64 or self.seed.shape != (batch,):
                raise ValueError(f"seed must be int64 ({batch},), got {describe(self.seed)}")
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise ValueError(
                f"logprobs must be at most vocab_size = {vocab_size}, got {self.logprobs}"
            )
        self._check_bias(logits)
        if isinstance(self.banned, Tensor):
            _check_vocabulary("banned", self.banned, logits)
            if self.banned.dtype != torch.bool:
                raise TypeError(f"banned must be bool, got {describe(self.banned)}")
        elif self.banned is not None:
            _check_tokens("banned", self.banned, vocab_size)
        if self.allowed is not None:
            _check_on("allowed", self.allowed, logits)
            words = -(-vocab_size // 32)
            shape = tuple(self.allowed.shape)
            if self.allowed.dtype != torch.int32 or shape not in ((1, words), (batch, words)):
                raise ValueError(
                    f"allowed must be int32 of shape ({batch}, {words}) or (1, {words}), a bit a "
                    f"token, got {describe(self.allowed)}"
                )

    def _check_bias(self, logits: Tensor) -> None:
        bias = self.logit_bias
        if isinstance(bias, Tensor):
            _check_vocabulary("logit_bias", bias, logits)
            if not bias.is_floating_point():
                raise TypeError(f"logit_bias must be floating, got {describe(bias)}")
            return
        if bias is None:
            return
        if not isinstance(bias, dict):
            raise TypeError(f"logit_bias must be a tensor, a dict or None, got {bias!r}")
        _check_tokens("logit_bias", list(bias), logits.shape[1])
        for token, value in bias.items():
            if math.isnan(value) or value == math.inf:
                raise ValueError(
                    f"logit_bias of token {token} must be finite or -inf, got {value!r}"
                )


def clamp(name: str, value: Number) -> Number:
    """A setting with tensors' values brought into range, as `SamplingParams` says."""
    if not isinstance(value, Tensor):
        return value
    allowed = RANGES[name]
    if allowed.integer:
        return value.clamp(int(allowed.low), int(allowed.high))
    value = value.to(torch.float32)
    bad = value.isnan() | (value <= 0) if allowed.low_is_excluded else value.isnan()
    return value.clamp(allowed.low, allowed.high).masked_fill(bad, allowed.nan)


def _is_host(value: Number, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def _check_number(name: str, value: Any, allowed: Range) -> None:
    if isinstance(value, Tensor):
        return
    wanted = (int,) if allowed.integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted):
        kind = "an int" if allowed.integer else "a number"
        raise TypeError(
            f"{name} must be {kind} or a tensor (batch,), got {value!r} ({type(value).__name__})"
        )
    if value not in allowed:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _check_on(name: str, value: Any, logits: Tensor) -> None:
    check_tensor(name, value)
    if value.device != logits.device:
        raise ValueError(f"{name} must be on {logits.device} like logits, got {describe(value)}")


def _check_row_tensor(name: str, value: Tensor, allowed: Range, logits: Tensor) -> None:
    _check_on(name, value, logits)
    if allowed.integer:
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {describe(value)}")
    elif not value.is_floating_point():
        raise TypeError(f"{name} must be floating, got {describe(value)}")
    if value.shape != (logits.shape[0],):
        raise ValueError(
            f"{name} must have one value a row, shape ({logits.shape[0]},), got {describe(value)}"
        )
    if value.numel() and values_readable(value):
        for row, number in enumerate(value.tolist()):
            if number not in allowed:
                raise ValueError(f"{name} must be {allowed}, got {number!r} in row {row}")


def _check_vocabulary(name: str, value: Tensor, logits: Tensor) -> None:
    _check_on(name, value, logits)
    batch, vocab_size = logits.shape
    if tuple(value.shape) not in ((vocab_size,), (1, vocab_size), (batch, vocab_size)):
        raise ValueError(
            f"{name} must be of shape ({vocab_size},) or ({batch}, {vocab_size}), got "
            f"{describe(value)}"
        )


def _check_tokens(name: str, tokens: Any, vocab_size: int) -> None:
    if not isinstance(tokens, (list, tuple)):
        raise TypeError(f"{name} must be a list of token ids or a tensor, got {tokens!r}")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name} must hold token ids, got {token!r}")
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name} must hold token ids in 0..{vocab_size - 1}, got {token}")
