"""How to decode, as a value: what `generate` is told beside the model and the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fastattn.sampling import SamplingParams
from fastattn.validation import check_flag, check_number

DEFAULT_NEW_TOKENS = 20
"""How many tokens come where neither max_new_tokens nor max_length says so."""

DEFAULT_DRAFT_TOKENS = 4
"""How many tokens a draft model is ahead of the one that checks them."""

_SAMPLING = SamplingParams()
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p", "min_tokens_to_keep", "joint", "seed")


@dataclass(frozen=True)
class Contrast:
    """Contrastive decoding (Li et al., arXiv:2210.15097); see `contrastive_scores`.

    Args:
        plausibility: in 0..1: only tokens at least this many times as probable as the likeliest.
        amateur_weight: at least 0: how much the small model's log-probability takes away.
        amateur_temperature: above 0: divides the small model's logits.
    """

    plausibility: float = 0.1
    amateur_weight: float = 1.0
    amateur_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("plausibility", self.plausibility, "a number in 0..1", 0.0, 1.0 + 2**-52)
        check_number("amateur_weight", self.amateur_weight, "a number of at least 0", 0.0)
        check_number("amateur_temperature", self.amateur_temperature, "a number above 0", 5e-324)


@dataclass(frozen=True, eq=False)
class GenerationConfig:
    """How to decode. The defaults are greedy.

    The strategy follows from what is set: `do_sample` draws, `num_beams` searches, both together
    search among drawn continuations; a small model or a draft model is given to `generate`.
    Settings that would say nothing, or contradict each other, raise here or before the model runs.

    Args:
        max_new_tokens: at least 1; None: by max_length, or else 20, or what positions are left.
        max_length: instead: columns of the result, the prompt's with its padding included, as
            Hugging Face counts. Of an encoder-decoder the decoder's, its start token included.
        min_new_tokens, min_length: the same from below: until then no row ends by a token.
        do_sample: draw by `sampling`, and otherwise take the best.
        sampling: its penalties, bias and bans hold for every strategy; temperature, cuts and seed
            need `do_sample`. A setting may be a tensor of one value a prompt, or one for each row
            of the result. Every row has a seed of its own: an int is that of the first, and the
            others follow from it; of the copies of a prompt the first has the seed that is given
            for it. With `logprobs` the result has `drawn`.
        num_beams: 1 does not search. In each step the best `num_beams` continuations go on.
        length_penalty: beams: a sequence's score is the sum of its log-probabilities, divided by
            its number of new tokens to this power.
        early_stopping: beams: True stops at `num_beams` ended sequences; False when no beam could
            do better, if it ended now; "never" only when none could at its best length.
        num_return_sequences: rows of the result for each prompt.
        no_repeat_ngram: n: no n-gram comes twice in a row, prompt included; 0 is off.
        bad_words: sequences of token ids that do not come.
        suppress_tokens: never come.
        begin_suppress_tokens: are not the first new token (with `forced_bos`: not the second).
        forced_bos: the first new token.
        forced_eos: the last token of a row that reaches its greatest length.
        eos_tokens: end a row, and are part of it; None: the model's; (): none.
        stop_tokens: end a row too.
        stop_strings: end a row with the token that completes one in the text of its new tokens;
            need `generate(decode=...)`, which is called with all of these at each of them.
        pad_token: what follows the end of a row; None: the model's, or the first end token, or 0.
        contrast: settings of contrastive decoding, which needs `generate(small_model=...)`.
        draft_tokens: how many tokens `generate(draft_model=...)` is ahead; None: 4.
        check_every: after so many steps the host looks whether all rows have ended, and waits for
            the device to do so. None: 1 on the CPU, 8 elsewhere. The result does not depend on it.
        return_logprobs: give the log-probability of each new token under the model's own softmax.
        return_scores: give what each new token was chosen by: logits after penalties and bans, and
            if drawn after temperature and cuts; with beams log-probabilities in the place of
            logits. Takes float32 of rows * tokens * vocabulary.

    Raises:
        TypeError, ValueError: a setting is not as described, or contradicts another; names it.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    do_sample: bool = False
    sampling: SamplingParams = _SAMPLING
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    no_repeat_ngram: int = 0
    bad_words: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    forced_bos: int | None = None
    forced_eos: int | None = None
    eos_tokens: Sequence[int] | None = None
    stop_tokens: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    pad_token: int | None = None
    contrast: Contrast | None = None
    draft_tokens: int | None = None
    check_every: int | None = None
    return_logprobs: bool = False
    return_scores: bool = False

    def __post_init__(self) -> None:
        for name, least in _COUNTS.items():
            _check_count(name, getattr(self, name), least)
        for name in ("do_sample", "return_logprobs", "return_scores"):
            check_flag(name, getattr(self, name))
        if not isinstance(self.sampling, SamplingParams):
            raise TypeError(f"sampling must be SamplingParams, got {self.sampling!r}")
        if self.contrast is not None and not isinstance(self.contrast, Contrast):
            raise TypeError(f"contrast must be a Contrast or None, got {self.contrast!r}")
        check_number("length_penalty", self.length_penalty, "a finite number")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(
                f'early_stopping must be True, False or "never", got {self.early_stopping!r}'
            )
        self._check_tokens()
        self._check_lengths()
        self._check_strategy()
        self._check_forced()

    def _check_tokens(self) -> None:
        for name in ("suppress_tokens", "begin_suppress_tokens", "stop_tokens"):
            _check_token_list(name, getattr(self, name))
        if self.eos_tokens is not None:
            _check_token_list("eos_tokens", self.eos_tokens)
        _check_list("bad_words", self.bad_words, "token lists")
        for word in self.bad_words:
            _check_token_list("bad_words", word)
            if not len(word):
                raise ValueError("bad_words must not hold an empty list of tokens, got []")
        _check_list("stop_strings", self.stop_strings, "strings")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop_strings must hold strings that are not empty, got {text!r}")

    def _check_lengths(self) -> None:
        for end in ("max", "min"):
            new, whole = (getattr(self, f"{end}_{what}") for what in ("new_tokens", "length"))
            if new is not None and whole is not None:
                raise ValueError(
                    f"{end}_length must be None where {end}_new_tokens is given, got {whole} "
                    f"and {new}"
                )
        for what in ("new_tokens", "length"):
            most, least = (getattr(self, f"{end}_{what}") for end in ("max", "min"))
            if most is not None and least is not None and most < least:
                raise ValueError(f"max_{what} must be at least min_{what} = {least}, got {most}")

    def _check_strategy(self) -> None:
        default, beams = _SAMPLING, self.num_beams > 1
        for name in _OF_DRAWING:
            value = getattr(self.sampling, name)
            if not self.do_sample and (
                isinstance(value, Tensor) or value != getattr(default, name)
            ):
                means = (
                    f"num_beams={self.num_beams} without drawing" if beams else "greedy decoding"
                )
                raise ValueError(
                    f"sampling.{name} must be {getattr(default, name)!r}, its default, with "
                    f"do_sample=False, which is {means}, got {_show(value)}: set do_sample=True"
                )
        top_p = self.sampling.top_p
        if not isinstance(top_p, Tensor) and top_p == 0:
            raise ValueError(
                f"sampling.top_p must be above 0, which keeps nothing but the likeliest token, got "
                f"{top_p!r}: greedy decoding is do_sample=False"
            )
        if self.sampling.logprobs is not None and beams:
            raise ValueError(
                f"sampling.logprobs must be None with num_beams={self.num_beams}, got "
                f"{self.sampling.logprobs}: return_logprobs and return_scores are there"
            )
        if not beams:
            for name, value in (("length_penalty", 1.0), ("early_stopping", False)):
                if getattr(self, name) != value:
                    raise ValueError(
                        f"{name} must be {value!r} with num_beams=1, which has no beams that it "
                        f"would speak of, got {getattr(self, name)!r}"
                    )
            if self.num_return_sequences > 1 and not self.do_sample:
                raise ValueError(
                    f"num_return_sequences must be 1 for greedy decoding, of which there is one "
                    f"result, got {self.num_return_sequences}: set do_sample or num_beams"
                )
        elif self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences must be at most num_beams = {self.num_beams}, got "
                f"{self.num_return_sequences}"
            )

    def _check_forced(self) -> None:
        banned = self.sampling.banned
        bans = {
            "suppress_tokens": set(self.suppress_tokens),
            "sampling.banned": set(banned) if isinstance(banned, (list, tuple)) else set(),
        }
        if self.forced_bos is not None:
            self._refuse("forced_bos", self.forced_bos, bans)
        if self.forced_eos is not None:
            self._refuse("forced_eos", self.forced_eos, bans)

    def _refuse(self, name: str, token: int, bans: dict[str, set[int]]) -> None:
        for ban, tokens in bans.items():
            if token in tokens:
                raise ValueError(f"{name} must not be a token of {ban}, got {token}")

    def __repr__(self) -> str:
        """The settings that differ from the defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        shown = [f"{name}={value!r}" for name, (value, usual) in values.items() if value != usual]
        return f"GenerationConfig({', '.join(shown)})"


_COUNTS: dict[str, int] = {
    "max_new_tokens": 1,
    "max_length": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram": 0,
    "forced_bos": 0,
    "forced_eos": 0,
    "pad_token": 0,
    "draft_tokens": 1,
    "check_every": 1,
}
_OPTIONAL = frozenset(_COUNTS) - {"num_beams", "num_return_sequences", "no_repeat_ngram"}


def _check_count(name: str, value: Any, least: int) -> None:
    if value is None and name in _OPTIONAL:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_list(name: str, value: Any, of: str) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of {of}, got {value!r}")


def _check_token_list(name: str, tokens: Any) -> None:
    _check_list(name, tokens, "token ids")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"{name} must hold token ids, got {token!r}")
        if token < 0:
            raise ValueError(f"{name} must hold token ids of at least 0, got {token}")


def _show(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
