"""fastattn.nn.Sampler against `sample` with a state kept by hand."""

import copy

import pytest
import torch

from fastattn.nn import Sampler
from fastattn.sampling import Sample, SamplerState, SamplingParams, sample

VOCAB = 100
PARAMS = SamplingParams(
    temperature=0.9, top_k=40, repetition_penalty=1.4, presence_penalty=0.3,
    frequency_penalty=0.2, seed=7,
)  # fmt: skip
STRICT = SamplingParams(seed=7, repetition_penalty=20.0)


def steps(count: int, batch: int = 3) -> torch.Tensor:
    return 3 * torch.randn(count, batch, VOCAB, generator=torch.Generator().manual_seed(count))


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.tensor([[0, 0, 5, 6], [9, 8, 7, 6], [0, 3, 3, 3]])
    return input_ids, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def drawn(sampler: Sampler, logits: torch.Tensor) -> list[list[int]]:
    return [sampler(row).tolist() for row in logits]


@pytest.mark.parametrize("vocab_size", [None, VOCAB])
def test_draws_what_sample_draws(vocab_size: int | None) -> None:
    input_ids, mask = prompt()
    sampler = Sampler(PARAMS, vocab_size=vocab_size)
    sampler.start(input_ids, mask)
    state = SamplerState.from_prompt(input_ids, VOCAB, mask, counts=True)
    logits = steps(12)
    assert drawn(sampler, logits) == [sample(row, PARAMS, state).tolist() for row in logits]
    assert torch.equal(sampler.state.seen, state.seen)
    assert torch.equal(sampler.state.counts, state.counts)
    assert sampler.state.step.tolist() == [12, 12, 12]


def test_without_start_nothing_was_seen() -> None:
    sampler, state = Sampler(PARAMS), SamplerState.make(3, VOCAB, counts=True)
    logits = steps(6)
    assert drawn(sampler, logits) == [sample(row, PARAMS, state).tolist() for row in logits]


def test_the_mask_counts() -> None:
    input_ids, mask = prompt()
    logits = torch.zeros(3, VOCAB)
    logits[:, 0], logits[:, 50] = 1.0, 0.8
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=2.0))
    sampler.start(input_ids, mask)
    assert sampler(logits).tolist() == [0, 0, 0]
    sampler.start(input_ids)
    assert sampler(logits).tolist() == [50, 0, 50]


def test_logprobs_give_a_sample() -> None:
    made = Sampler(SamplingParams(seed=1, logprobs=2))(steps(1)[0])
    assert isinstance(made, Sample)
    assert made.top_tokens.shape == (3, 2)


def test_tensors_stay_where_they_are() -> None:
    input_ids, mask = prompt()
    sampler = Sampler(PARAMS)
    sampler.start(input_ids, mask)
    first = drawn(sampler, steps(4))
    state = sampler.state
    places = [t.data_ptr() for t in (state.seen, state.step, state.counts)]
    sampler.start(input_ids, mask)
    assert drawn(sampler, steps(4)) == first  # seen, counts and step are those of a new batch
    assert sampler.state is state
    assert [t.data_ptr() for t in (state.seen, state.step, state.counts)] == places
    sampler.start(input_ids[:2])
    assert sampler(steps(1, batch=2)[0]).shape == (2,)


def test_rows_may_be_begun_alone() -> None:
    input_ids, mask = prompt()
    sampler, alone = Sampler(STRICT, vocab_size=VOCAB), Sampler(STRICT)
    sampler.start(input_ids, mask)
    before = drawn(sampler, steps(3))
    others = Sampler(STRICT)
    others.start(input_ids, mask)
    assert drawn(others, steps(3)) == before
    new = torch.tensor([[11, 12], [13, 14]])
    sampler.start(new, rows=torch.tensor([2, 0]))
    alone.start(new)
    logits = steps(5)
    logits[:, [2, 0], [11, 13]] = 11.0
    got, middle = drawn(sampler, logits), drawn(others, logits)
    assert [row[1] for row in got] == [row[1] for row in middle]
    assert [[row[2], row[0]] for row in got] == drawn(alone, logits[:, [2, 0]])


@pytest.mark.parametrize("begun", [False, True])
def test_reorder(begun: bool) -> None:
    input_ids, mask = prompt()
    sampler, plain = Sampler(STRICT), Sampler(STRICT)
    index = torch.tensor([2, 0, 0])
    sampler.start(input_ids, mask)
    plain.start(input_ids if begun else input_ids[index], mask if begun else mask[index])
    if begun:
        drawn(sampler, steps(3))
        drawn(plain, steps(3))
        plain.state = SamplerState(plain.state.seen[index], plain.state.step[index], VOCAB)
    sampler.reorder(index)
    logits = steps(5)
    logits[:, :, 0] = 11.0  # the padding
    assert drawn(sampler, logits) == drawn(plain, logits)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("rows", [torch.tensor([1]), torch.tensor([False, True, False])])
def test_reset_rows(begun: bool, rows: torch.Tensor) -> None:
    input_ids, mask = prompt()
    given = mask.clone()
    sampler, other = Sampler(STRICT), Sampler(STRICT)
    for one in (sampler, other):
        one.start(input_ids, mask)
        if begun:
            drawn(one, steps(3))
    sampler.reset(rows)
    logits = steps(5)
    logits[:, 1, 9] = 11.0  # a token of the prompt
    got, kept = drawn(sampler, logits), drawn(other, logits)
    free = drawn(Sampler(STRICT), logits)
    assert [row[1] for row in got] == [row[1] for row in free] != [row[1] for row in kept]
    assert [row[::2] for row in got] == [row[::2] for row in kept]
    assert torch.equal(mask, given)


def test_reset_forgets_the_batch() -> None:
    sampler = Sampler(PARAMS)
    drawn(sampler, steps(2))
    sampler.reset()
    assert drawn(sampler, steps(4, batch=2)) == drawn(Sampler(PARAMS), steps(4, batch=2))


def test_is_no_part_of_a_checkpoint() -> None:
    sampler = Sampler(PARAMS)
    sampler(steps(1)[0])
    assert sampler.state_dict() == {}
    assert not list(sampler.parameters()) and not list(sampler.buffers())
    sampler.load_state_dict({})
    assert "top_k=40" in repr(sampler)


def test_a_copy_goes_its_own_way() -> None:
    sampler = Sampler(PARAMS)
    sampler.start(*prompt())
    drawn(sampler, steps(3))
    other = copy.deepcopy(sampler)
    assert drawn(sampler, steps(4)) == drawn(other, steps(4))
    assert sampler.state.seen.data_ptr() != other.state.seen.data_ptr()


def test_moves_with_its_module() -> None:
    params = SamplingParams(
        temperature=torch.full((3,), 0.7), seed=torch.arange(3), banned=[4], frequency_penalty=0.1
    )
    sampler = Sampler(params)
    sampler.start(*prompt())
    sampler(steps(1)[0])
    sampler.start(*prompt())
    module = torch.nn.Sequential(sampler)
    module.half()
    assert sampler.params is params  # nothing is rounded
    module.to("meta")
    moved = sampler.params
    state = sampler.state
    tensors = [moved.temperature, moved.seed, state.seen, state.step, state.counts]
    tensors += sampler._prompt
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.temperature.dtype == torch.float32
    assert (moved.banned, moved.frequency_penalty) == ([4], 0.1)


@pytest.mark.cuda
def test_moves_to_a_gpu() -> None:
    sampler, other = Sampler(PARAMS), Sampler(PARAMS)
    for one in (sampler, other):
        one.start(*prompt())
        drawn(one, steps(3))
    assert drawn(sampler.cuda(), steps(5).cuda()) == drawn(other, steps(5))


def test_errors() -> None:
    input_ids, mask = prompt()
    sampler = Sampler(PARAMS)
    with pytest.raises(TypeError, match=r"params must be SamplingParams, got 0\.7"):
        Sampler(0.7)
    with pytest.raises(ValueError, match=r"reorder needs a batch"):
        sampler.reorder(torch.tensor([0]))
    with pytest.raises(ValueError, match=r"input_ids must be integers"):
        sampler.start(input_ids[0])
    with pytest.raises(ValueError, match=r"attention_mask must be of shape \(3, 4\)"):
        sampler.start(input_ids, mask[:2])
    with pytest.raises(ValueError, match=r"rows must be None before the first draw"):
        sampler.start(input_ids, mask, rows=torch.arange(3))
    sampler.start(input_ids, mask)
    with pytest.raises(ValueError, match=r"logits must be \(batch, vocab_size\)"):
        sampler(steps(1))
    with pytest.raises(ValueError, match=r"the 3 rows of the batch that was begun.*start\(\)"):
        sampler(steps(1, batch=2)[0])
    sampler(steps(1)[0])
    with pytest.raises(ValueError, match=r"rows must be int64 \(3,\)"):
        sampler.start(input_ids, mask, rows=torch.arange(2))
    with pytest.raises(ValueError, match=r"index must be of shape \(3,\)"):
        sampler.reorder(torch.tensor([0, 1]))
