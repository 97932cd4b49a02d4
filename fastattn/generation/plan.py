"""One checked call of `generate`: settings, prompts and models brought together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.generation.config import DEFAULT_DRAFT_TOKENS, DEFAULT_NEW_TOKENS, GenerationConfig
from fastattn.generation.prompts import Prompts, make_prompts
from fastattn.models.protocol import GenerativeModel, Session
from fastattn.sampling import SamplingParams
from fastattn.sampling.params import RANGES
from fastattn.validation import describe

# The golden ratio in 64 bits, as int64 holds it. Seeds of rows are far apart: with neighboring ones
# a batch of seed 1 would repeat most of what a batch of seed 0 has drawn.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


@dataclass(frozen=True)
class Plan:
    """What to do, with everything that was left open decided.

    Attributes:
        config: as given.
        source: the prompts as given, of an encoder-decoder what the encoder reads.
        prompts: with what the rows of the result begin.
        decoder_given: whether those were given apart from `source`.
        copies: rows for each prompt.
        vocab_size: tokens.
        max_new, min_new: tokens that a row gets at most, and before it may end by a token.
        ends: tokens that end a row.
        pad: behind a row's end.
        params: settings of the draw, tensors with one value a row; temperature 0 if nothing is
            drawn.
        check_every: steps between two looks of the host.
    """

    config: GenerationConfig
    source: Prompts
    prompts: Prompts
    decoder_given: bool
    copies: int
    vocab_size: int
    max_new: int
    min_new: int
    ends: tuple[int, ...]
    pad: int
    params: SamplingParams
    check_every: int

    @property
    def rows(self) -> int:
        """Rows that are decoded."""
        return self.prompts.batch * self.copies

    @property
    def device(self) -> torch.device:
        return self.prompts.given.device

    def start(self, model: GenerativeModel) -> tuple[Tensor, Session]:
        """Has a model read the prompts: logits (rows, vocab_size), and its rows."""
        ids, lengths = self.source.padded_right(self.pad)
        decoder_ids, decoder_lengths = None, None
        if self.decoder_given:
            decoder_ids, decoder_lengths = self.prompts.padded_right(self.pad)
        return model.start(
            ids,
            lengths,
            max_seqlen=self.prompts.longest + self.max_new,
            copies=self.copies,
            decoder_input_ids=decoder_ids,
            decoder_lengths=decoder_lengths,
        )


def make_plan(
    model: GenerativeModel,
    input_ids: Any,
    config: GenerationConfig,
    *,
    attention_mask: Any,
    decoder_input_ids: Any,
    decoder_attention_mask: Any,
    small_model: GenerativeModel | None,
    draft_model: GenerativeModel | None,
    decode: Callable[[list[int]], str] | None,
    streamer: Any,
) -> Plan:
    """Checks a call of `generate`; nothing has run when it raises.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected.
    """
    if not isinstance(config, GenerationConfig):
        raise TypeError(f"config must be a GenerationConfig, got {config!r}")
    _check_partners(model, config, small_model, draft_model, decode, streamer)
    vocab_size = model.vocab_size
    source = make_prompts("input_ids", input_ids, "attention_mask", attention_mask, vocab_size)
    prompts = source
    if model.is_encoder_decoder:
        prompts = _decoder_prompts(model, source, decoder_input_ids, decoder_attention_mask)
    elif decoder_input_ids is not None or decoder_attention_mask is not None:
        raise ValueError(
            "decoder_input_ids and decoder_attention_mask must be None for a model without an "
            "encoder, whose prompt is input_ids"
        )
    others = [other for other in (small_model, draft_model) if other is not None]
    max_new, min_new = _lengths(config, prompts, [model, *others])
    eos = model.eos_tokens if config.eos_tokens is None else tuple(config.eos_tokens)
    ends = tuple(dict.fromkeys((*eos, *config.stop_tokens)))
    pad = config.pad_token if config.pad_token is not None else model.pad_token
    pad = pad if pad is not None else (ends[0] if ends else 0)
    _check_vocabulary(config, ends, pad, vocab_size)
    searches = config.num_beams > 1
    copies = config.num_beams if searches else config.num_return_sequences
    params = _row_params(config, prompts.batch, copies, source.given.device)
    params.check(
        source.given.new_zeros((), dtype=torch.float32).expand(
            len(source.given) * copies, vocab_size
        )
    )
    on_cpu = source.given.device.type == "cpu"
    return Plan(
        config=config,
        source=source,
        prompts=prompts,
        decoder_given=decoder_input_ids is not None,
        copies=copies,
        vocab_size=vocab_size,
        max_new=max_new,
        min_new=min_new,
        ends=ends,
        pad=pad,
        params=params,
        check_every=config.check_every or (1 if on_cpu else 8),
    )


def draft_tokens(config: GenerationConfig) -> int:
    """How far the draft model goes ahead."""
    return config.draft_tokens or DEFAULT_DRAFT_TOKENS


def _check_partners(
    model: GenerativeModel,
    config: GenerationConfig,
    small_model: GenerativeModel | None,
    draft_model: GenerativeModel | None,
    decode: Any,
    streamer: Any,
) -> None:
    """Raises where models and settings do not go together."""
    if small_model is not None and draft_model is not None:
        raise ValueError("draft_model must be None where a small_model is given, got both")
    for name, other in (("small_model", small_model), ("draft_model", draft_model)):
        if other is None:
            continue
        if config.num_beams > 1:
            raise ValueError(f"num_beams must be 1 with a {name}, got {config.num_beams}")
        if other.vocab_size != model.vocab_size:
            raise ValueError(
                f"{name} must have the model's vocabulary of {model.vocab_size} tokens, got "
                f"{other.vocab_size}"
            )
        if other.is_encoder_decoder != model.is_encoder_decoder:
            kind = "an encoder-decoder" if model.is_encoder_decoder else "a decoder"
            raise ValueError(f"{name} must be {kind} like the model, got {type(other).__name__}")
    if config.contrast is not None and small_model is None:
        raise ValueError(
            f"small_model must be given for contrastive decoding, got None with "
            f"contrast={config.contrast}"
        )
    if config.draft_tokens is not None and draft_model is None:
        raise ValueError(
            f"draft_model must be given for speculative decoding, got None with "
            f"draft_tokens={config.draft_tokens}"
        )
    if draft_model is not None and config.sampling.logprobs is not None:
        raise ValueError(
            f"sampling.logprobs must be None with a draft_model, got {config.sampling.logprobs}: "
            "return_logprobs and return_scores are there"
        )
    if config.stop_strings and decode is None:
        raise ValueError(
            f"decode must be a function from token ids to text with "
            f"stop_strings={list(config.stop_strings)}, got None"
        )
    if streamer is not None:
        if config.num_beams > 1:
            raise ValueError(
                f"streamer must be None with num_beams={config.num_beams}, since beams may still "
                f"change their first tokens at the end, got {streamer!r}"
            )
        if not callable(streamer) and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"streamer must be callable, or have put and end, got {streamer!r}")


def _decoder_prompts(model: GenerativeModel, source: Prompts, ids: Any, mask: Any) -> Prompts:
    if ids is None:
        if mask is not None:
            raise ValueError("decoder_attention_mask must be None without decoder_input_ids")
        if model.start_token is None:
            raise ValueError(
                "decoder_input_ids must be given for a model without a start_token, got None"
            )
        ids = torch.full((source.batch, 1), model.start_token, device=source.given.device)
    prompts = make_prompts(
        "decoder_input_ids", ids, "decoder_attention_mask", mask, model.vocab_size
    )
    if prompts.batch != source.batch or prompts.given.device != source.given.device:
        raise ValueError(
            f"decoder_input_ids must have the {source.batch} rows of input_ids and be on "
            f"{source.given.device}, got {describe(prompts.given)}"
        )
    return prompts


def _lengths(
    config: GenerationConfig, prompts: Prompts, models: list[GenerativeModel]
) -> tuple[int, int]:
    """max_new and min_new."""
    limits = [model.max_positions for model in models if model.max_positions is not None]
    room = min(limits) - prompts.longest if limits else None
    name = "decoder_input_ids" if models[0].is_encoder_decoder else "input_ids"
    if room is not None and room < 1:
        raise ValueError(
            f"{name} must be shorter than the model's max_positions = {min(limits)}, to leave room "
            f"for a token, got a prompt of {prompts.longest}"
        )
    if config.max_new_tokens is not None:
        max_new, said = config.max_new_tokens, f"max_new_tokens={config.max_new_tokens}"
    elif config.max_length is not None:
        max_new, said = config.max_length - prompts.columns, f"max_length={config.max_length}"
        if max_new < 1:
            raise ValueError(
                f"max_length must be above the {prompts.columns} columns of {name}, got "
                f"{config.max_length}"
            )
    else:
        max_new = DEFAULT_NEW_TOKENS if room is None else min(DEFAULT_NEW_TOKENS, room)
        said = f"the default of {max_new} new tokens"
    if room is not None and max_new > room:
        raise ValueError(
            f"max_new_tokens must be at most {room}, what max_positions = {min(limits)} leaves "
            f"behind a prompt of {prompts.longest}, got {max_new} by {said}"
        )
    min_new = config.min_new_tokens or max(0, (config.min_length or 0) - prompts.columns)
    if min_new > max_new:
        what = "min_length" if config.min_length is not None else "min_new_tokens"
        raise ValueError(
            f"{what} must not ask for more than {max_new} new tokens, which is {said}, got "
            f"{getattr(config, what)} with {prompts.columns} columns of {name}"
        )
    return max_new, min_new


def _check_vocabulary(
    config: GenerationConfig, ends: tuple[int, ...], pad: int, vocab_size: int
) -> None:
    lists: dict[str, list[int]] = {
        "eos_tokens and stop_tokens": list(ends),
        "pad_token": [pad],
        "suppress_tokens": list(config.suppress_tokens),
        "begin_suppress_tokens": list(config.begin_suppress_tokens),
        "bad_words": [token for word in config.bad_words for token in word],
        "forced_bos": [] if config.forced_bos is None else [config.forced_bos],
        "forced_eos": [] if config.forced_eos is None else [config.forced_eos],
    }
    for name, tokens in lists.items():
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name} must be in 0..{vocab_size - 1}, the model's vocabulary, got {token}"
                )
    for word in config.bad_words:
        if len(word) == 1 and word[0] in ends:
            raise ValueError(
                f"bad_words must not hold an end token alone, got {list(word)}: rows that are not "
                "to end by a token have eos_tokens=()"
            )


def _row_params(
    config: GenerationConfig, batch: int, copies: int, device: torch.device
) -> SamplingParams:
    """The settings of the draw with tensors of one value a row, and a seed for each row."""
    params, changed = config.sampling, {}
    rows = batch * copies
    for name in (*RANGES, "logit_bias", "banned", "allowed"):
        value = getattr(params, name)
        by_row = isinstance(value, Tensor) and (name in RANGES or value.dim() == 2)
        if by_row and copies > 1 and value.shape[0] == batch:
            changed[name] = value.repeat_interleave(copies, 0)
    if not config.do_sample:
        changed["temperature"] = 0.0
    return dataclasses.replace(params, **changed, seed=_seeds(params.seed, batch, rows, device))


def _seeds(seed: int | Tensor | None, batch: int, rows: int, device: torch.device) -> Tensor:
    """int64 (rows,): the key of each row's noise, drawn once where none is given."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (rows,), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        start = torch.tensor(seed, dtype=torch.int64, device=device)
        return start + torch.arange(rows, device=device) * _GOLDEN
    copies = rows // batch
    if copies == 1 or seed.shape != (batch,) or seed.dtype != torch.int64:
        return seed
    return (seed[:, None] + torch.arange(copies, device=seed.device) * _GOLDEN).flatten()
