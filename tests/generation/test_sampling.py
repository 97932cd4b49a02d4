"""Draws: their distribution, their seeds, settings of each row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastattn.generation import GenerationConfig, generate
from fastattn.sampling import SamplingParams
from tests.generation.adapter import Recomputing, make, prompts
from tests.generation.tables import Table, count_pairs, improbability, improbability_of_two

VOCAB, PROMPT = 12, 5


def _table(seed: int = 0) -> Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5


def _pairs(first: Tensor, then: Tensor) -> Tensor:
    """Probabilities of pairs (vocab**2,) by those of the first and those that follow each."""
    return (first[:, None] * then).flatten().double()


@pytest.mark.parametrize("cut", ["none", "temperature", "top_k and top_p", "penalty"])
def test_pairs_of_tokens_are_distributed_as_they_should_be(cut: str) -> None:
    table = _table()
    first, then = table[PROMPT], table.clone()
    if cut == "none":
        params = SamplingParams(seed=3)
    elif cut == "temperature":
        params = SamplingParams(temperature=0.6, seed=3)
        first, then = first / 0.6, then / 0.6
    elif cut == "top_k and top_p":
        params = SamplingParams(top_k=5, top_p=0.8, seed=3)
        first, then = _cut(first[None])[0], _cut(then)
    else:
        params = SamplingParams(repetition_penalty=2.0, seed=3)
        seen = torch.eye(VOCAB, dtype=torch.bool)
        seen[:, PROMPT] = True
        first = _penalize(first[None], seen[PROMPT][None])[0]
        then = _penalize(then, seen)
    config = GenerationConfig(2, do_sample=True, sampling=params, num_return_sequences=20_000)
    out = generate(Table(table), torch.tensor([[PROMPT]]), config)
    counts = count_pairs(out.tokens, VOCAB)
    assert abs(improbability(counts, _pairs(first.softmax(-1), then.softmax(-1)))) < 4
    # The same counts are improbable under another temperature.
    other = _pairs((first * 1.2).softmax(-1), (then * 1.2).softmax(-1))
    assert improbability(counts, other) > 4


def _cut(logits: Tensor) -> Tensor:
    """top_k 5, then top_p 0.8 of what is left, one row after another."""
    result = torch.full_like(logits, -math.inf)
    for row, scores in enumerate(logits):
        order = scores.argsort(descending=True)[:5]
        p, total = scores[order].softmax(-1), 0.0
        for token, share in zip(order.tolist(), p.tolist(), strict=True):
            if total >= 0.8:
                break
            result[row, token] = scores[token]
            total += share
    return result


def _penalize(logits: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, torch.where(logits > 0, logits / 2, logits * 2), logits)


@pytest.mark.parametrize("top_k", [0, 6])
def test_beam_sampling_is_distributed_as_hugging_faces(top_k: int) -> None:
    rows = 3000
    model = make("gpt2", seed=4, vocab=VOCAB, layers=1)
    model.transformer.wte.weight.data *= 0.4  # so that many tokens are likely
    ids = torch.full((rows, 1), PROMPT)
    params = SamplingParams(temperature=0.9, top_k=top_k, seed=9)
    config = GenerationConfig(3, do_sample=True, sampling=params, num_beams=2)
    out = generate(Recomputing(model), ids, config)
    torch.manual_seed(1)
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=True, num_beams=2,
        temperature=0.9, top_k=top_k, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    theirs = torch.nn.functional.pad(wanted[:, 1:], (0, 4 - wanted.shape[1]), value=1)
    counts = [count_pairs(tokens, VOCAB) for tokens in (out.tokens, theirs)]
    assert improbability_of_two(*counts) < 4
    searched = generate(Recomputing(model), ids[:2], GenerationConfig(3, num_beams=2))
    alone = count_pairs(searched.tokens.repeat(rows // 2, 1), VOCAB)
    assert improbability_of_two(counts[0], alone) > 10


def test_beams_keep_tokens_enough_to_go_on() -> None:
    params = SamplingParams(top_k=1, seed=9)  # as in Hugging Face's: one more than end tokens
    config = GenerationConfig(
        3, do_sample=True, sampling=params, num_beams=3, num_return_sequences=3,
        eos_tokens=[0, 1], return_scores=True,
    )  # fmt: skip
    out = generate(Table(_table()), torch.tensor([[PROMPT]]), config)
    assert out.scores is not None and out.sequence_scores is not None
    assert int((out.scores[0, 0] > -math.inf).sum()) == 3
    assert out.sequence_scores.isfinite().all()


def test_same_seeds_draw_the_same_whatever_else_is_in_the_batch() -> None:
    model = Recomputing(make("llama"))
    ids, mask = prompts()
    seeds = torch.arange(20) * 7 + 1

    def draw(rows: slice, seed: int | Tensor, beams: int = 1) -> list[list[int]]:
        params = SamplingParams(temperature=1.3, top_p=0.95, seed=seed)
        config = GenerationConfig(8, do_sample=True, sampling=params, num_beams=beams)
        return generate(model, ids[rows], config, attention_mask=mask[rows]).new_tokens()

    for beams in (1, 2):
        whole = draw(slice(0, 20), seeds, beams)
        assert whole == draw(slice(0, 20), seeds, beams)
        assert whole[6:9] == draw(slice(6, 9), seeds[6:9], beams)
        assert whole != draw(slice(0, 20), seeds + 1, beams)
    assert draw(slice(0, 20), 5)[:1] == draw(slice(0, 1), torch.tensor([5]))
    torch.manual_seed(0)
    params = SamplingParams(temperature=1.3)
    config = GenerationConfig(8, do_sample=True, sampling=params)
    drawn = [generate(model, ids, config, attention_mask=mask).new_tokens() for _ in range(2)]
    torch.manual_seed(0)
    assert drawn[0] == generate(model, ids, config, attention_mask=mask).new_tokens()
    assert drawn[0] != drawn[1]


def test_copies_of_a_prompt_differ_and_the_first_has_the_seed_that_is_given() -> None:
    model, ids = Recomputing(make("llama")), torch.tensor([[5, 9], [5, 9]])

    def draw(seed: int | Tensor, copies: int) -> list[list[int]]:
        params = SamplingParams(temperature=2.0, seed=seed)
        config = GenerationConfig(8, do_sample=True, sampling=params, num_return_sequences=copies)
        return generate(model, ids, config).new_tokens()

    rows = draw(torch.tensor([4, 90]), 3)
    assert len({tuple(row) for row in rows}) == 6
    assert rows[::3] == draw(torch.tensor([4, 90]), 1)
    # Equal prompts: with an int every row has a seed of its own, and no other int has them too.
    drawn = [tuple(row) for seed in range(4) for row in draw(seed, 3)]
    long = [row for row in drawn if len(row) > 3]
    assert len(set(long)) == len(long) > 12
    assert list(drawn[0]) == draw(torch.tensor([0, 90]), 1)[0]


def test_settings_of_each_row() -> None:
    model = Recomputing(make("llama"))
    ids, mask = prompts(4)
    params = SamplingParams(
        temperature=torch.tensor([0.0, 1.5, 0.0, 1.5]), top_k=torch.tensor([0, 1, 0, 0]), seed=1
    )
    config = GenerationConfig(9, do_sample=True, sampling=params)
    mixed = generate(model, ids, config, attention_mask=mask).new_tokens()
    greedy = generate(model, ids, GenerationConfig(9), attention_mask=mask).new_tokens()
    assert mixed[:3] == greedy[:3]
    assert mixed[3] != greedy[3]
    twice = GenerationConfig(9, do_sample=True, sampling=params, num_return_sequences=2)
    rows = generate(model, ids, twice, attention_mask=mask).new_tokens()
    assert rows[:6] == [row for row in greedy[:3] for _ in range(2)]
    assert rows[6] != rows[7]


def test_what_the_sampler_says() -> None:
    ids, mask = prompts(5)
    params = SamplingParams(temperature=1.5, top_k=20, seed=3, logprobs=4)
    config = GenerationConfig(6, do_sample=True, sampling=params, return_scores=True)
    out = generate(Recomputing(make("llama")), ids, config, attention_mask=mask)
    assert out.drawn is not None and out.scores is not None
    log_p = out.scores.log_softmax(-1)
    for row, tokens in enumerate(out.new_tokens()):
        for step, token in enumerate(tokens):
            torch.testing.assert_close(out.drawn.logprobs[row, step], log_p[row, step, token])
            best = log_p[row, step].topk(4)
            assert out.drawn.top_tokens[row, step].tolist() == best.indices.tolist()
            torch.testing.assert_close(out.drawn.top_logprobs[row, step], best.values)
