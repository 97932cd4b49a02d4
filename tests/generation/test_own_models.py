"""Strategies through fastattn's own models and their caches, against `transformers.generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.generation import Contrast, GenerationConfig, generate
from fastattn.models import load
from fastattn.sampling import SamplingParams
from tests.generation.adapter import EOS, PAD, Recomputing, make, prompts

OURS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 1.5},
    "penalty": {"sampling": SamplingParams(repetition_penalty=1.7)},
}
THEIRS: dict[str, dict[str, Any]] = {**OURS, "penalty": {"repetition_penalty": 1.7}}


@pytest.fixture(scope="module", params=["llama", "gpt2", "t5"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of transformers, and the same loaded here."""
    theirs = make(request.param)
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load(folder, dtype=torch.float64)


@pytest.mark.parametrize("name", OURS)
def test_same_tokens(pair: Any, name: str) -> None:
    theirs, ours = pair
    ids, mask = prompts()
    out = generate(ours, ids, GenerationConfig(16, **OURS[name]), attention_mask=mask)
    wanted = theirs.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=16, eos_token_id=EOS,
        pad_token_id=PAD, **THEIRS[name],
    )  # fmt: skip
    assert out.sequences.tolist() == wanted.tolist()
    assert len({tuple(row) for row in out.tokens.tolist()}) > 5


def test_every_other_strategy_as_without_a_cache(pair: Any) -> None:
    theirs, ours = pair
    plain = Recomputing(theirs)
    plain.eos_tokens, plain.pad_token = ours.eos_tokens, ours.pad_token
    ids, mask = prompts()
    drawing = SamplingParams(temperature=1.2, top_k=30, seed=1, frequency_penalty=0.3)
    for settings, partner in (
        ({"do_sample": True, "sampling": drawing, "num_return_sequences": 2}, None),
        ({"do_sample": True, "sampling": drawing, "num_beams": 2}, None),
        ({"do_sample": True, "sampling": drawing, "draft_tokens": 3}, "draft_model"),
        ({"draft_tokens": 3}, "draft_model"),
        ({"contrast": Contrast(amateur_temperature=2.0)}, "small_model"),
    ):
        config = GenerationConfig(12, **settings)
        results = []
        for model in (ours, plain):
            partners = {} if partner is None else {partner: model}
            out = generate(model, ids, config, attention_mask=mask, **partners)
            results.append(out.sequences.tolist())
        assert results[0] == results[1], settings
