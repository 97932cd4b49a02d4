"""SamplerState and sets of tokens as bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastattn import SamplerState, SamplingParams, sample
from fastattn.sampling import ERROR_TOKEN, pack_mask, unpack_mask

VOCAB = 77  # no multiple of 32


def _seen(state: SamplerState) -> list[set[int]]:
    return [set(row.nonzero()[:, 0].tolist()) for row in unpack_mask(state.seen, VOCAB)]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 77, 128])
def test_bits_hold_what_was_packed(vocab_size: int) -> None:
    mask = torch.rand(3, vocab_size) < 0.5
    words = pack_mask(mask)
    assert words.dtype == torch.int32 and words.shape == (3, -(-vocab_size // 32))
    assert torch.equal(unpack_mask(words, vocab_size), mask)
    for token in range(vocab_size):  # the layout that kernels rely on
        assert torch.equal(((words[:, token // 32] >> (token % 32)) & 1).bool(), mask[:, token])


def test_a_prompt_is_seen_but_not_counted() -> None:
    prompt = torch.tensor([[3, 31, 32, 3], [76, 0, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    state = SamplerState.from_prompt(prompt, VOCAB, mask, counts=True)
    assert _seen(state) == [{3, 31, 32}, {0, 76}]
    assert state.counts is not None and not state.counts.any()
    assert state.step.tolist() == [0, 0]


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    assert _seen(SamplerState.from_prompt(torch.tensor([[-100, 77, 5]]), VOCAB)) == [{5}]


def test_add_marks_counts_and_steps() -> None:
    state = SamplerState.make(3, VOCAB, counts=True)
    for tokens in ([31, 76, ERROR_TOKEN], [31, 63, 4]):
        state.add(torch.tensor(tokens))
    assert _seen(state) == [{31}, {63, 76}, {4}]
    assert state.counts is not None
    assert state.counts.sum(1).tolist() == [2, 2, 1]
    assert state.counts[0, 31] == 2
    assert state.step.tolist() == [2, 2, 2]


def test_rows_move_and_are_freed_in_place() -> None:
    state = SamplerState.make(3, VOCAB, counts=True)
    state.add(torch.tensor([1, 2, 3]))
    tensors = (state.seen, state.step, state.counts)
    copy = state.clone()
    state.reorder(torch.tensor([2, 2, 0]))
    assert _seen(state) == [{3}, {3}, {1}]
    state.reset(torch.tensor([0]))
    assert _seen(state) == [set(), {3}, {1}] and state.step.tolist() == [0, 1, 1]
    state.reset(torch.tensor([False, True, False]))
    assert _seen(state) == [set(), set(), {1}] and state.step.tolist() == [0, 0, 1]
    assert state.counts is not None and state.counts.sum(1).tolist() == [0, 0, 1]
    assert all(a is b for a, b in zip(tensors, (state.seen, state.step, state.counts), strict=True))
    assert _seen(copy) == [{1}, {2}, {3}]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_sample_keeps_the_state_up_to_date(impl: str) -> None:
    """A sequence drawn with a forbidding frequency penalty never repeats a token."""
    state = SamplerState.make(4, VOCAB, counts=True)
    params = SamplingParams(frequency_penalty=1e4, seed=torch.arange(4))
    logits = torch.randn(4, VOCAB)
    drawn: list[Tensor] = []
    for _ in range(VOCAB):
        tokens = sample(logits, params, state, impl=impl)
        assert isinstance(tokens, Tensor)
        drawn.append(tokens)
    rows = torch.stack(drawn, 1)
    assert torch.equal(rows.sort(1).values, torch.arange(VOCAB).expand(4, -1))
    assert state.step.tolist() == [VOCAB] * 4
    assert state.counts is not None and bool((state.counts == 1).all())
    assert _seen(state) == [set(range(VOCAB))] * 4
