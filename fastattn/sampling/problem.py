"""One checked draw: what every implementation of `sample` is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.problem import DTYPES
from fastattn.sampling.bits import pack_mask, unpack_mask
from fastattn.sampling.params import Number, SamplingParams, clamp
from fastattn.sampling.state import SamplerState
from fastattn.validation import check_tensor, describe

ERROR_TOKEN = -1
"""What is drawn from a row whose scores hold NaN or are all -inf."""


class Sample(NamedTuple):
    """Drawn tokens with their log-probabilities.

    Args:
        tokens: int64 (batch,), `ERROR_TOKEN` for a row without a distribution.
        logprobs: float32 (batch,), natural logarithms; NaN for a row without a distribution.
        top_tokens: int64 (batch, n), the likeliest first, the lowest id first on a tie; -1 past the
            last that has a probability. None where none were asked for.
        top_logprobs: float32 (batch, n), -inf past the last; None where none were asked for.
    """

    tokens: Tensor
    logprobs: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SampleProblem:
    """Logits, settings and state, checked.

    Args:
        logits: (batch, vocab_size), the tokens of a row next to each other, any row stride.
        params: the settings; tensors among them are not clamped yet, see `setting`.
        state: an implementation marks what it drew, in place.
        seed: the keys of the noise: int64 (batch,), or one for all rows.
    """

    logits: Tensor
    params: SamplingParams
    state: SamplerState | None
    seed: Tensor | int

    @property
    def seeds(self) -> Tensor:
        """The keys of the noise, int64 (batch,)."""
        if isinstance(self.seed, Tensor):
            return self.seed
        return torch.full((self.batch,), self.seed, dtype=torch.int64, device=self.device)

    @property
    def steps(self) -> Tensor:
        """The step of the noise, int64 (batch,): the state's, or zeros."""
        if self.state is not None:
            return self.state.step
        return torch.zeros(self.batch, dtype=torch.int64, device=self.device)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.logits.shape[0]

    @property
    def vocab_size(self) -> int:
        """Tokens."""
        return self.logits.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it all lies."""
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.logits.dtype

    def setting(self, name: str) -> Number:
        """A number of the settings: a Python number, or a tensor (batch,) clamped into range."""
        return clamp(name, getattr(self.params, name))

    def dense_bias(self) -> Tensor | None:
        """`logit_bias` as float32 (1 or batch, vocab_size)."""
        bias = self.params.logit_bias
        if bias is None:
            return None
        if isinstance(bias, Tensor):
            return bias.to(torch.float32).view(-1, self.vocab_size)
        tokens, values = self.listed_bias()
        return self._kept(
            "bias",
            lambda: torch.zeros(1, self.vocab_size, device=self.device).index_copy_(
                1, tokens, values[None]
            ),
        )

    def listed_bias(self) -> tuple[Tensor, Tensor]:
        """Token ids int64 (n,) and values float32 (n,) of a `logit_bias` that is a dict."""
        bias = self.params.logit_bias
        assert isinstance(bias, dict)
        return self._kept(
            "listed_bias",
            lambda: (
                torch.tensor(list(bias), dtype=torch.int64, device=self.device),
                torch.tensor(list(bias.values()), dtype=torch.float32, device=self.device),
            ),
        )

    def listed_bans(self) -> Tensor:
        """Token ids int64 (n,) of `banned` where that is a list."""
        banned = self.params.banned
        assert banned is not None and not isinstance(banned, Tensor)
        return self._kept(
            "listed_bans", lambda: torch.tensor(banned, dtype=torch.int64, device=self.device)
        )

    def dense_bans(self) -> Tensor | None:
        """What may not be drawn: bool (1 or batch, vocab_size), of `banned` and `allowed`."""
        banned, allowed = self.params.banned, self.params.allowed
        dense = None
        if isinstance(banned, Tensor):
            dense = banned.view(-1, self.vocab_size)
        elif banned is not None:
            tokens = self.listed_bans()
            dense = torch.zeros(1, self.vocab_size, dtype=torch.bool, device=self.device)
            dense.index_fill_(1, tokens, True)
        if allowed is not None:
            outside = ~unpack_mask(allowed, self.vocab_size)
            dense = outside if dense is None else dense | outside
        return dense

    def allowed_bits(self) -> Tensor | None:
        """What may be drawn, of `allowed` and `banned`: int32 (1 or batch, ceil(vocab_size / 32)).

        None where everything may. The bits past the vocabulary mean nothing.
        """
        banned, allowed = self.params.banned, self.params.allowed
        if banned is None:
            return allowed
        if isinstance(banned, Tensor):
            bits = pack_mask(~banned.view(-1, self.vocab_size))
        else:
            bits = self._kept("bits", lambda: pack_mask(~self._listed_bans_dense()))
        return bits if allowed is None else bits & allowed

    def _listed_bans_dense(self) -> Tensor:
        dense = torch.zeros(1, self.vocab_size, dtype=torch.bool, device=self.device)
        return dense.index_fill_(1, self.listed_bans(), True)

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        # Made of host values once for each device and size, not at every step.
        key = (name, self.device, self.vocab_size)
        made = self.params._made
        if key not in made:
            made[key] = make()
        return made[key]


def make_sample_problem(
    logits: Tensor, params: SamplingParams, state: SamplerState | None
) -> SampleProblem:
    """Checks the arguments of `fastattn.sample`.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    check_tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(
            f"logits must be (batch, vocab_size) with a token at least, got {describe(logits)}"
        )
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"logits must be float16, bfloat16, float32 or float64, got {describe(logits)}"
        )
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, got {params!r} ({type(params).__name__})")
    params.check(logits)
    _check_state(logits, params, state)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    seed = params.seed
    if seed is None:
        seed = torch.randint(
            0, 2**63 - 1, (logits.shape[0],), dtype=torch.int64, device=logits.device
        )
    return SampleProblem(logits.detach(), params, state, seed)


def _check_state(logits: Tensor, params: SamplingParams, state: SamplerState | None) -> None:
    if state is None:
        if params.needs_seen or params.needs_counts:
            raise ValueError(
                "state must be a SamplerState where a repetition, presence or frequency penalty "
                "is used, got None"
            )
        return
    if not isinstance(state, SamplerState):
        raise TypeError(f"state must be a SamplerState or None, got {state!r}")
    if (state.batch, state.vocab_size) != tuple(logits.shape):
        raise ValueError(
            f"state must be of {tuple(logits.shape)} (batch, vocab_size) like logits, got "
            f"({state.batch}, {state.vocab_size})"
        )
    if state.seen.device != logits.device:
        raise ValueError(f"state must be on {logits.device} like logits, got {state.seen.device}")
    if params.needs_counts and state.counts is None:
        raise ValueError(
            "state must have counts where a presence or frequency penalty is used: make it with "
            "counts=True"
        )
