"""Decoding with a second model: speculation, which changes nothing, and contrast."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.generation import Contrast, GenerationConfig, generate
from fastattn.sampling import SamplingParams
from tests.generation.adapter import Recomputing, make, prompts
from tests.generation.tables import Table, count_pairs, improbability

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one ahead": {"draft_tokens": 1},
    "bans": {"no_repeat_ngram": 2, "bad_words": [[9, 11], [46]], "suppress_tokens": [60]},
    "lengths": {"min_new_tokens": 12, "forced_eos": 2, "begin_suppress_tokens": [9, 40]},
    "penalties": {"sampling": SamplingParams(repetition_penalty=1.5, frequency_penalty=0.7)},
}


def _close(kind: str, model: Any) -> Any:
    """A model that often agrees with another: the same, a little moved."""
    other = make(kind)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for weight in other.parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.data += 0.1 * weight.data.std() * noise
    return other


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_greedy_speculation_is_greedy(kind: str, name: str) -> None:
    model = make(kind)
    ids, mask = prompts()
    settings = {"max_new_tokens": 20, **SETTINGS[name]}
    config = GenerationConfig(**settings, return_logprobs=True, return_scores=True)
    settings.pop("draft_tokens", None)
    plain = GenerationConfig(**settings, return_logprobs=True, return_scores=True)
    out = generate(
        Recomputing(model), ids, config, attention_mask=mask,
        draft_model=Recomputing(_close(kind, model)),
    )  # fmt: skip
    wanted = generate(Recomputing(model), ids, plain, attention_mask=mask)
    assert out.sequences.tolist() == wanted.sequences.tolist()
    assert out.finished.tolist() == wanted.finished.tolist()
    torch.testing.assert_close(out.logprobs, wanted.logprobs)
    torch.testing.assert_close(out.scores, wanted.scores)
    assert out.speculation is not None
    assert 0 < out.speculation.accepted < out.speculation.drafted


def test_a_draft_of_the_model_itself_is_kept() -> None:
    model = make("llama")
    ids, mask = prompts()
    target = Recomputing(model)
    config = GenerationConfig(20, draft_tokens=4, eos_tokens=())
    out = generate(target, ids, config, attention_mask=mask, draft_model=Recomputing(model))
    assert out.speculation is not None
    assert out.speculation.accepted == out.speculation.drafted == 20 * 15
    # A token by the prompt, then five a round, of which the last has room for three drafts alone.
    assert out.speculation.rounds == 4 and target.calls == 5


@pytest.mark.parametrize("cut", [{}, {"temperature": 0.7, "top_k": 6}, {"repetition_penalty": 1.6}])
def test_sampled_speculation_keeps_the_distribution(cut: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(2)
    table = torch.randn(12, 12, generator=generator) * 1.3
    draft = table + torch.randn(12, 12, generator=generator)
    sampling = SamplingParams(**cut, seed=5)
    config = GenerationConfig(
        3, do_sample=True, sampling=sampling, num_return_sequences=20_000, draft_tokens=2
    )
    out = generate(Table(table), torch.tensor([[4]]), config, draft_model=Table(draft))
    first, then = table[4], table.clone()
    if "top_k" in cut:
        first, then = (
            x.masked_fill(x < x.topk(6).values[..., -1:], -math.inf) / 0.7 for x in (first, then)
        )
    if "repetition_penalty" in cut:
        seen = torch.eye(12, dtype=torch.bool)
        seen[:, 4] = True
        first, then = _penalize(first, seen[4]), _penalize(then, seen)
    p = (first.softmax(-1)[:, None] * then.softmax(-1)).flatten().double()
    assert abs(improbability(count_pairs(out.tokens, 12), p)) < 4
    if not cut:  # the third token comes after a kept or a replaced one
        second = p.view(12, 12).sum(0)
        later = (second[:, None] * table.softmax(-1).double()).flatten()
        assert abs(improbability(count_pairs(out.tokens[:, 1:], 12), later)) < 4
    assert out.speculation is not None and out.speculation.accepted < out.speculation.drafted
    # The draft model's own distribution is another.
    q = (draft[4].softmax(-1)[:, None] * draft.softmax(-1)).flatten().double()
    assert improbability(count_pairs(out.tokens, 12), q) > 10 or "top_k" in cut


def _penalize(logits: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, torch.where(logits > 0, logits / 1.6, logits * 1.6), logits)


def test_rows_that_end_at_different_times_and_strings() -> None:
    model = make("llama")
    ids, mask = prompts()

    def decode(tokens: list[int]) -> str:
        return "".join(chr(ord("A") + token) for token in tokens)

    config = GenerationConfig(20, draft_tokens=3, stop_strings=["J", "yM"])
    plain = GenerationConfig(20, stop_strings=["J", "yM"])
    drafts = Recomputing(_close("llama", model))
    got: list[list[int]] = []
    out = generate(
        Recomputing(model), ids, config, attention_mask=mask, draft_model=drafts, decode=decode,
        streamer=lambda tokens: got.append(tokens.tolist()),
    )  # fmt: skip
    wanted = generate(Recomputing(model), ids, plain, attention_mask=mask, decode=decode)
    assert out.sequences.tolist() == wanted.sequences.tolist()
    assert len(set(out.lengths.tolist())) > 4
    assert torch.tensor(got).T.tolist() == out.tokens.tolist()


@pytest.mark.parametrize("sampled", [False, True])
@torch.no_grad()
def test_contrast_is_its_plain_statement(sampled: bool) -> None:
    large, small = make("llama"), make("llama", seed=1, layers=1)
    ids, mask = prompts()
    contrast = Contrast(plausibility=0.05, amateur_weight=0.6, amateur_temperature=1.4)
    params = SamplingParams(repetition_penalty=1.2, **({"seed": 2, "top_k": 1} if sampled else {}))
    config = GenerationConfig(
        12, contrast=contrast, suppress_tokens=[9, 40], sampling=params, do_sample=sampled
    )
    out = generate(
        Recomputing(large), ids, config, attention_mask=mask, small_model=Recomputing(small)
    )
    penalty = SamplingParams(repetition_penalty=1.2)
    greedy = generate(
        Recomputing(large), ids, GenerationConfig(12, suppress_tokens=[9, 40], sampling=penalty),
        attention_mask=mask,
    )  # fmt: skip
    assert out.new_tokens() != greedy.new_tokens()
    for row, tokens in enumerate(out.new_tokens()):
        text = ids[row][mask[row] > 0].tolist()
        for token in tokens:
            expert = large(torch.tensor([text])).logits[0, -1].clone()
            expert[[9, 40]] = -math.inf
            for seen in set(text):
                expert[seen] = expert[seen] / 1.2 if expert[seen] > 0 else expert[seen] * 1.2
            p = expert.softmax(-1)
            q = (small(torch.tensor([text])).logits[0, -1] / 1.4).softmax(-1)
            scores = {
                t: math.log(p[t]) - 0.6 * math.log(q[t])
                for t in range(len(p))
                if p[t] >= 0.05 * p.max()
            }
            assert token == max(scores, key=scores.__getitem__)
            text.append(token)
        assert len(tokens) == 12 or text[-1] == 2
