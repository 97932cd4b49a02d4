"""Every deterministic strategy against `transformers.generate`, token by token."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.generation import GenerationConfig, generate
from fastattn.sampling import SamplingParams
from tests.generation.adapter import EOS, PAD, START, VOCAB, Recomputing, make, prompts

KINDS = ("llama", "gpt2", "t5")
PENALIZED = SamplingParams(repetition_penalty=1.7)

# Ours, and the same in Hugging Face's words. There padding takes part in n-grams, so that a model
# that writes the pad token is banned from more than here: it does not write it in these.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "beams": ({"num_beams": 4}, {"num_beams": 4}),
    "beams, early": (
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    ),
    "beams, never early, 3 returned": (
        {
            "num_beams": 4, "length_penalty": 1.5, "early_stopping": "never",
            "num_return_sequences": 3,
        },
        {
            "num_beams": 4, "length_penalty": 1.5, "early_stopping": "never",
            "num_return_sequences": 3,
        },
    ),
    "beams for short ones, n-grams": (
        {
            "num_beams": 4, "length_penalty": -1.0, "no_repeat_ngram": 2,
            "suppress_tokens": [PAD],
        },
        {
            "num_beams": 4, "length_penalty": -1.0, "no_repeat_ngram_size": 2,
            "suppress_tokens": [PAD],
        },
    ),
    "n-grams": (
        {"no_repeat_ngram": 2, "suppress_tokens": [PAD]},
        {"no_repeat_ngram_size": 2, "suppress_tokens": [PAD]},
    ),
    "repetition penalty": ({"sampling": PENALIZED}, {"repetition_penalty": 1.7}),
    "beams, repetition penalty": (
        {"num_beams": 3, "sampling": PENALIZED}, {"num_beams": 3, "repetition_penalty": 1.7},
    ),
    "beams, many stop tokens": (
        {"num_beams": 3, "stop_tokens": list(range(3, 33))},
        {"num_beams": 3, "eos_token_id": [EOS, *range(3, 33)]},
    ),
    "min new tokens": ({"min_new_tokens": 15}, {"min_new_tokens": 15}),
    "min and max length": (
        {"max_new_tokens": None, "max_length": 22, "min_length": 17},
        {"max_new_tokens": None, "max_length": 22, "min_length": 17},
    ),
    "bad words": (
        {"bad_words": [[9], [11, 9], [60, 26], [5, 26, 3], [58, 58]]},
        {"bad_words_ids": [[9], [11, 9], [60, 26], [5, 26, 3], [58, 58]]},
    ),
    "suppressed": (
        {"begin_suppress_tokens": [9, 36, 15], "suppress_tokens": [60, 46]},
        {"begin_suppress_tokens": [9, 36, 15], "suppress_tokens": [60, 46]},
    ),
    "forced end": ({"forced_eos": EOS}, {"forced_eos_token_id": EOS}),
    "beams, forced end, min new tokens": (
        {"num_beams": 3, "forced_eos": EOS, "min_new_tokens": 9},
        {"num_beams": 3, "forced_eos_token_id": EOS, "min_new_tokens": 9},
    ),
    "stop tokens": ({"stop_tokens": [9, 60]}, {"eos_token_id": [EOS, 9, 60]}),
    "beams, stop tokens": (
        {"num_beams": 3, "stop_tokens": [9, 60]}, {"num_beams": 3, "eos_token_id": [EOS, 9, 60]},
    ),
}  # fmt: skip


@cache
def _model(kind: str) -> Any:
    return make(kind)


def _theirs(kind: str, ids: Tensor, mask: Tensor, settings: dict[str, Any]) -> Any:
    return _model(kind).generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **{"max_new_tokens": 20, "eos_token_id": EOS, **settings},
    )


def _check(kind: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    ids, mask = prompts()
    config = GenerationConfig(**{"max_new_tokens": 20, **ours})
    out = generate(Recomputing(_model(kind)), ids, config, attention_mask=mask)
    wanted = _theirs(kind, ids, mask, theirs)
    assert out.sequences.tolist() == wanted.sequences.tolist()
    ends = {EOS, *config.stop_tokens}
    for row, length in zip(
        wanted.sequences[:, -out.tokens.shape[1] :].tolist(), out.lengths, strict=True
    ):
        ended = [place for place, token in enumerate(row) if token in ends]
        assert length == (ended[0] + 1 if ended else len(row))
    # Different rows: else this would say little.
    assert len({tuple(row) for row in out.tokens.tolist()}) > 5
    if config.num_beams > 1:
        assert out.sequence_scores is not None
        rounding = 20 * torch.finfo(torch.float32).eps * wanted.sequences_scores.abs().max()
        assert (out.sequence_scores - wanted.sequences_scores).abs().max() <= rounding


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens(kind: str, name: str) -> None:
    _check(kind, *SETTINGS[name])


def test_forced_bos() -> None:
    settings = {"num_beams": 2, "begin_suppress_tokens": [15, 20]}
    _check("t5", {**settings, "forced_bos": 7}, {**settings, "forced_bos_token_id": 7})


def test_a_decoders_prompt() -> None:
    ids, mask = prompts()
    begin, begin_mask = prompts(longest=4, seed=8)
    begin[torch.arange(20), begin_mask.argmax(1)] = START  # else Hugging Face puts one before it
    out = generate(
        Recomputing(_model("t5")),
        ids,
        GenerationConfig(max_new_tokens=9, num_beams=2),
        attention_mask=mask,
        decoder_input_ids=begin.clone(),
        decoder_attention_mask=begin_mask,
    )
    for row in range(0, 20, 6):  # each alone: Hugging Face's T5 does not count padding's positions
        real, real_begin = ids[row][mask[row] > 0][None], begin[row][begin_mask[row] > 0][None]
        alone = _model("t5").generate(
            real, decoder_input_ids=real_begin, max_new_tokens=9, num_beams=2, do_sample=False,
            eos_token_id=EOS, pad_token_id=PAD,
        )  # fmt: skip
        new = alone[0, real_begin.shape[1] :].tolist()
        assert out.new_tokens()[row] == new[: len(out.new_tokens()[row])]
        assert set(new[len(out.new_tokens()[row]) :]) <= {PAD}


@pytest.mark.parametrize("ours", [{}, {"sampling": PENALIZED, "min_new_tokens": 4}])
def test_scores(ours: dict[str, Any]) -> None:
    ids, mask = prompts()
    config = GenerationConfig(max_new_tokens=6, return_scores=True, return_logprobs=True, **ours)
    out = generate(Recomputing(_model("llama")), ids, config, attention_mask=mask)
    theirs = {"repetition_penalty": 1.7, "min_new_tokens": 4} if ours else {}
    wanted = _theirs("llama", ids, mask, {"max_new_tokens": 6, "output_logits": True, **theirs})
    assert out.scores is not None and out.logprobs is not None
    for step, (scores, logits) in enumerate(zip(wanted.scores, wanted.logits, strict=True)):
        inside = step < out.lengths
        torch.testing.assert_close(out.scores[inside, step], scores[inside].float())
        log_p = logits.log_softmax(-1).gather(1, out.tokens[:, step, None])[:, 0]
        torch.testing.assert_close(out.logprobs[:, step], log_p.float().where(inside, 0))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores_of_drawn_tokens_are_what_they_are_drawn_from(num_beams: int) -> None:
    ids, mask = prompts(4)
    params = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, repetition_penalty=1.3, seed=1)
    config = GenerationConfig(
        max_new_tokens=5, do_sample=True, sampling=params, num_beams=num_beams, return_scores=True
    )
    out = generate(Recomputing(_model("llama")), ids, config, attention_mask=mask)
    assert out.scores is not None
    for row, tokens in enumerate(out.new_tokens()):
        for step, token in enumerate(tokens):
            scores = out.scores[row, step]
            assert scores[token] > -torch.inf
            assert 1 <= int((scores > -torch.inf).sum()) <= 9


def test_scores_of_beams_follow_their_rows() -> None:
    ids, mask = prompts()
    config = GenerationConfig(
        max_new_tokens=8, num_beams=3, num_return_sequences=2, length_penalty=0.7,
        no_repeat_ngram=2, return_scores=True, return_logprobs=True,
    )  # fmt: skip
    out = generate(Recomputing(_model("llama")), ids, config, attention_mask=mask)
    assert out.scores is not None and out.sequence_scores is not None and out.logprobs is not None
    for row, tokens in enumerate(out.new_tokens()):
        chosen = out.scores[row, torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(chosen, out.logprobs[row, : len(tokens)])  # only bans changed it
        total = chosen.double().sum() / len(tokens) ** 0.7
        torch.testing.assert_close(total.float(), out.sequence_scores[row])
    assert out.scores.shape[-1] == VOCAB
