"""Contradictory and impossible calls: told before the model runs, naming argument and value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn.generation import Contrast, GenerationConfig, generate
from fastattn.sampling import SamplingParams
from tests.bad_arguments import check
from tests.generation.adapter import Recomputing, make
from tests.generation.tables import Table

Words = tuple[str, ...]


def _params(**settings: Any) -> SamplingParams:
    return SamplingParams(**settings)


SETTINGS: list[tuple[dict[str, Any], type[Exception], Words]] = [
    ({"max_new_tokens": 0}, ValueError, ("max_new_tokens", "at least 1", "0")),
    ({"max_new_tokens": 2.0}, TypeError, ("max_new_tokens", "int", "2.0")),
    ({"num_beams": 0}, ValueError, ("num_beams", "at least 1", "0")),
    ({"num_beams": None}, TypeError, ("num_beams", "int", "None")),
    ({"check_every": 0}, ValueError, ("check_every", "at least 1", "0")),
    ({"do_sample": 1}, TypeError, ("do_sample", "True or False", "1")),
    ({"max_new_tokens": 3, "max_length": 9}, ValueError, ("max_length", "None", "9", "3")),
    ({"min_new_tokens": 3, "min_length": 9}, ValueError, ("min_length", "None", "9", "3")),
    ({"max_new_tokens": 3, "min_new_tokens": 4}, ValueError, ("max_new_tokens", "4", "3")),
    ({"max_length": 3, "min_length": 4}, ValueError, ("max_length", "min_length = 4", "3")),
    (
        {"num_beams": 2, "sampling": _params(temperature=0.7)},
        ValueError, ("sampling.temperature", "num_beams=2 without drawing", "0.7", "do_sample"),
    ),
    (
        {"sampling": _params(top_k=torch.tensor([3]))},
        ValueError, ("sampling.top_k", "greedy", "a tensor (1,)", "do_sample=True"),
    ),
    ({"sampling": _params(seed=0)}, ValueError, ("sampling.seed", "None", "greedy", "0")),
    (
        {"do_sample": True, "sampling": _params(top_p=0.0)},
        ValueError, ("sampling.top_p", "above 0", "0.0", "do_sample=False"),
    ),
    (
        {"num_beams": 2, "sampling": _params(logprobs=1)},
        ValueError, ("sampling.logprobs", "None", "num_beams=2", "1"),
    ),
    ({"length_penalty": 2.0}, ValueError, ("length_penalty", "num_beams=1", "2.0")),
    ({"early_stopping": True}, ValueError, ("early_stopping", "num_beams=1", "True")),
    ({"early_stopping": "always"}, ValueError, ("early_stopping", '"never"', "always")),
    ({"length_penalty": float("nan")}, ValueError, ("length_penalty", "finite", "nan")),
    ({"num_return_sequences": 2}, ValueError, ("num_return_sequences", "greedy", "2")),
    (
        {"num_return_sequences": 3, "num_beams": 2},
        ValueError, ("num_return_sequences", "at most num_beams = 2", "3"),
    ),
    ({"suppress_tokens": 3}, TypeError, ("suppress_tokens", "list of token ids", "3")),
    ({"stop_tokens": [-1]}, ValueError, ("stop_tokens", "at least 0", "-1")),
    ({"eos_tokens": ["a"]}, TypeError, ("eos_tokens", "token ids", "'a'")),
    ({"bad_words": [[]]}, ValueError, ("bad_words", "empty", "[]")),
    ({"bad_words": [3]}, TypeError, ("bad_words", "list of token ids", "3")),
    ({"stop_strings": "end"}, TypeError, ("stop_strings", "list of strings", "'end'")),
    ({"stop_strings": [""]}, ValueError, ("stop_strings", "not empty", "''")),
    (
        {"forced_bos": 4, "suppress_tokens": [4]},
        ValueError, ("forced_bos", "suppress_tokens", "4"),
    ),
    (
        {"forced_eos": 4, "sampling": _params(banned=[4])},
        ValueError, ("forced_eos", "sampling.banned", "4"),
    ),
    ({"sampling": {"top_k": 3}}, TypeError, ("sampling", "SamplingParams", "top_k")),
    ({"contrast": 0.1}, TypeError, ("contrast", "Contrast", "0.1")),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "error", "words"), SETTINGS)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], words: Words) -> None:
    check(lambda: GenerationConfig(**settings), error, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"plausibility": 1.5}, ("plausibility", "0..1", "1.5")),
        ({"amateur_weight": -1.0}, ("amateur_weight", "at least 0", "-1.0")),
        ({"amateur_temperature": 0.0}, ("amateur_temperature", "above 0", "0.0")),
    ],
)
def test_bad_contrast(settings: dict[str, float], words: Words) -> None:
    check(lambda: Contrast(**settings), ValueError, words)
    Contrast(plausibility=1.0, amateur_weight=0.0)


class Asleep(Table):
    """A decoder of 12 tokens and 10 positions that must not run."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(12, 12), eos=(2,))
        self.max_positions = 10  # type: ignore[assignment]

    def start(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("the model ran before the arguments were checked")


IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])

CALLS: list[tuple[dict[str, Any], type[Exception], Words]] = [
    ({"input_ids": [[3]]}, TypeError, ("input_ids", "torch.Tensor", "[[3]]")),
    ({"input_ids": IDS.float()}, TypeError, ("input_ids", "int32 or int64", "float32")),
    ({"input_ids": IDS[0]}, ValueError, ("input_ids", "(batch, seqlen)", "(3,)")),
    ({"input_ids": IDS[:, :0]}, ValueError, ("input_ids", "empty prompt", "(2, 0)")),
    (
        {"input_ids": torch.tensor([[3, 12]])},
        ValueError, ("input_ids", "0..11", "got 12", "row 0, column 1"),
    ),
    ({"input_ids": torch.tensor([[-1]])}, ValueError, ("input_ids", "0..11", "got -1")),
    (
        {"attention_mask": torch.tensor([[0, 1, 1], [0, 0, 0]])},
        ValueError, ("attention_mask", "row 1", "empty"),
    ),
    ({"attention_mask": IDS[:, :2]}, ValueError, ("attention_mask", "(2, 3)", "(2, 2)")),
    (
        {"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])},
        ValueError, ("attention_mask", "left", "right"),
    ),
    (
        {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 0]])},
        ValueError, ("attention_mask", "left", "right"),
    ),
    (
        {"input_ids": torch.ones(1, 10).long(), "config": GenerationConfig()},
        ValueError, ("input_ids", "max_positions = 10", "prompt of 10"),
    ),
    (
        {"config": GenerationConfig(8)},
        ValueError, ("max_new_tokens", "at most 7", "prompt of 3", "got 8"),
    ),
    (
        {"config": GenerationConfig(max_length=3)},
        ValueError, ("max_length", "3 columns of input_ids", "got 3"),
    ),
    (
        {"config": GenerationConfig(4, min_length=8)},
        ValueError, ("min_length", "4 new tokens", "max_new_tokens=4", "got 8"),
    ),
    ({"config": {"num_beams": 2}}, TypeError, ("config", "GenerationConfig", "num_beams")),
    ({"config": GenerationConfig(4, stop_tokens=[12])}, ValueError, ("stop_tokens", "0..11", "12")),
    ({"config": GenerationConfig(4, pad_token=12)}, ValueError, ("pad_token", "0..11", "12")),
    ({"config": GenerationConfig(4, bad_words=[[40]])}, ValueError, ("bad_words", "0..11", "40")),
    (
        {"config": GenerationConfig(4, bad_words=[[2]])},
        ValueError, ("bad_words", "end token", "[2]", "eos_tokens=()"),
    ),
    (
        {"config": GenerationConfig(4, stop_strings=["a"])},
        ValueError, ("decode", "stop_strings=['a']", "None"),
    ),
    (
        {"config": GenerationConfig(4, contrast=Contrast())},
        ValueError, ("small_model", "None", "contrast=Contrast("),
    ),
    (
        {"config": GenerationConfig(4, draft_tokens=3)},
        ValueError, ("draft_model", "None", "draft_tokens=3"),
    ),
    (
        {"small_model": Asleep(), "draft_model": Asleep()},
        ValueError, ("draft_model", "small_model", "both"),
    ),
    (
        {"small_model": Asleep(), "config": GenerationConfig(4, num_beams=2)},
        ValueError, ("num_beams", "small_model", "2"),
    ),
    (
        {"draft_model": Table(torch.zeros(7, 7))},
        ValueError, ("draft_model", "12 tokens", "got 7"),
    ),
    (
        {"draft_model": Asleep(), "config": GenerationConfig(4, sampling=_params(logprobs=1))},
        ValueError, ("sampling.logprobs", "draft_model", "1"),
    ),
    (
        {"config": GenerationConfig(4, num_beams=2), "streamer": print},
        ValueError, ("streamer", "num_beams=2", "print"),
    ),
    ({"streamer": 3}, TypeError, ("streamer", "callable", "3")),
    ({"decoder_input_ids": IDS}, ValueError, ("decoder_input_ids", "None", "without an encoder")),
    (
        {"config": GenerationConfig(4, sampling=_params(presence_penalty=torch.ones(3)))},
        ValueError, ("presence_penalty", "(2,)", "(3,)"),
    ),
    (
        {"config": GenerationConfig(4, sampling=_params(banned=[40]))},
        ValueError, ("banned", "0..11", "40"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "words"), CALLS)
def test_bad_calls(changed: dict[str, Any], error: type[Exception], words: Words) -> None:
    given = {"input_ids": IDS, "config": GenerationConfig(4), **changed}
    check(lambda: generate(Asleep(), **given), error, words)


def test_bad_calls_of_an_encoder_decoder() -> None:
    model = Recomputing(make("t5"))
    check(
        lambda: generate(model, IDS, decoder_input_ids=IDS[:1]),
        ValueError,
        ("decoder_input_ids", "2 rows", "(1, 3)"),
    )
    check(
        lambda: generate(model, IDS, decoder_attention_mask=IDS),
        ValueError,
        ("decoder_attention_mask", "without decoder_input_ids"),
    )
    check(
        lambda: generate(model, IDS, draft_model=Recomputing(make("llama"))),
        ValueError,
        ("draft_model", "an encoder-decoder"),
    )
    model.start_token = None
    check(lambda: generate(model, IDS), ValueError, ("decoder_input_ids", "start_token", "None"))


def test_the_default_length_is_what_positions_are_left() -> None:
    model = Table(torch.eye(12))
    assert generate(model, IDS).tokens.shape == (2, 20)
    model.max_positions = 10  # type: ignore[assignment]
    assert generate(model, IDS).tokens.shape == (2, 7)
