"""The table of strategies: its numbers are those of what was generated."""

from __future__ import annotations

import pytest
import torch

from fastattn.generation import Contrast, GenerationConfig, compare_strategies, generate
from fastattn.generation.compare import distinct_n
from tests.generation.adapter import Recomputing, make


def _text(tokens: list[int]) -> str:
    return "".join(chr(ord("A") + token) for token in tokens)


def test_default_strategies() -> None:
    hf = make("llama")
    model, small = Recomputing(hf), Recomputing(make("llama", seed=1, layers=1))
    prompt = [5, 9, 30]
    table = compare_strategies(
        model, prompt, decode=_text, max_new_tokens=12, small_model=small, draft_model=small
    )
    names = [row.strategy for row in table.rows]
    assert len(set(names)) == len(names) == 7
    shown = str(table)
    for row in table.rows:
        assert 0 < len(row.tokens) <= 12 and row.seconds > 0
        assert row.text == _text(list(row.tokens))
        assert repr(row.text) in shown and row.strategy in shown
        ids = torch.tensor([prompt + list(row.tokens)])
        with torch.no_grad():
            log_p = hf(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = log_p.gather(1, ids[0, len(prompt) :, None]).sum()
        assert row.logprob == pytest.approx(float(total), rel=1e-5)
        assert f"{row.logprob:.2f}" in shown
    assert table["greedy"].tokens == table["greedy, with drafts"].tokens
    assert table["greedy"].tokens != table["contrastive"].tokens
    beams = generate(model, torch.tensor([prompt]), GenerationConfig(12, num_beams=4))
    assert list(table["4 beams"].tokens) == beams.new_tokens()[0]


def test_strategies_of_ones_own_without_text() -> None:
    model = Recomputing(make("llama"))
    table = compare_strategies(
        model, torch.tensor([5, 9]), {"short": GenerationConfig(3), "never": GenerationConfig(1)}
    )
    assert [row.strategy for row in table.rows] == ["short", "never"]
    assert table.rows[0].text is None
    assert " ".join(map(str, table["short"].tokens)) in str(table)
    with pytest.raises(KeyError, match="short"):
        table["long"]
    with pytest.raises(ValueError, match="small_model"):
        compare_strategies(model, [5], {"contrast": GenerationConfig(3, contrast=Contrast())})
    with pytest.raises(ValueError, match="prompt must be one sequence"):
        compare_strategies(model, torch.ones(2, 3).long())


def test_distinct_n() -> None:
    assert distinct_n([1, 2, 1, 2], 1) == 0.5
    assert distinct_n([1, 2, 1, 2], 2) == 2 / 3
    assert distinct_n([], 1) == distinct_n([3], 2) == 1.0
