"""A step of beam search, against Hugging Face's own step on the whole vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.sampling.beams import beam_step
from fastattn.testing import assert_parity


def _whole(logits: Tensor, scores: Tensor) -> Tensor:
    """Scores of all continuations (batch, num_beams, vocab_size), as `generate` computes them."""
    log_p = torch.log_softmax(logits.to(scores.dtype), -1)
    return log_p.view(*scores.shape, -1) + scores[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("beams", "vocab", "count"), [(1, 1000, None), (4, 5003, None), (3, 4, 9)])
def test_equals_hugging_faces_step(
    beams: int, vocab: int, count: int | None, dtype: torch.dtype
) -> None:
    generation = pytest.importorskip("transformers.generation")
    batch = 3
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(batch * beams, vocab, generator=generator) * 4).to(dtype)
    scores = torch.randn(batch, beams, generator=generator) * 2 - 5
    step = beam_step(logits, scores, num_candidates=count)
    kept = count or 2 * beams
    assert step.scores.dtype == torch.float32 and step.scores.shape == (batch, kept)
    assert step.tokens.dtype == step.beams.dtype == torch.int64

    mixin = generation.utils.GenerationMixin
    peer, sequences, indices = mixin._get_top_k_continuations(
        mixin, _whole(logits, scores).flatten(1), torch.zeros(batch, beams, 1, dtype=torch.int64),
        torch.zeros(batch, beams, 1, dtype=torch.int64), cur_len=0, decoder_prompt_len=0,
        do_sample=False, beams_to_keep=kept, num_beams=beams, batch_size=batch,
    )  # fmt: skip
    exact = _whole(logits, scores.double())
    assert_parity(step.scores, peer, exact.flatten(1).topk(kept).values)
    # Each is the continuation that it says, and none comes twice.
    place = step.beams * vocab + step.tokens
    assert_parity(step.scores, peer, exact.flatten(1).gather(1, place))
    assert all(len(set(row)) == kept for row in place.tolist())
    peer_place = (indices[..., 0] % beams) * vocab + sequences[..., 0]
    if dtype == torch.float32:  # half precision has ties, whose order is nobody's
        assert torch.equal(place, peer_place)


def test_a_search_by_steps_finds_the_best_sequence() -> None:
    """Two tokens by a Markov chain with beams for all first tokens: the search is exhaustive."""
    vocab = 7
    table = torch.randn(vocab + 1, vocab, generator=torch.Generator().manual_seed(0)) * 3
    start = torch.tensor([[0.0] + [-math.inf] * (vocab - 1)])
    first = beam_step(table[-1].expand(vocab, -1), start, num_candidates=vocab)
    assert (first.beams == 0).all() and sorted(first.tokens[0].tolist()) == list(range(vocab))
    second = beam_step(table[first.tokens[0]], first.scores, num_candidates=1)
    log_p = torch.log_softmax(table.double(), -1)
    both = log_p[-1][:, None] + log_p[:-1]
    best = int(both.argmax())
    last = first.tokens[0, second.beams[0, 0]]
    assert (int(last), int(second.tokens[0, 0])) == (best // vocab, best % vocab)


def test_finished_beams_are_not_continued() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    logits[1] = math.nan  # nobody looks at what a finished beam says
    scores = torch.tensor([[-1.0, 9.0], [-2.0, -3.0]])
    finished = torch.tensor([[False, True], [False, False]])
    step = beam_step(logits, scores, finished=finished)
    assert (step.beams[0] == 0).all() and step.scores[0].isfinite().all()
    alone = beam_step(logits[:1], scores[:1, :1], num_candidates=4)
    assert torch.equal(step.scores[0], alone.scores[0])
    assert torch.equal(step.tokens[0], alone.tokens[0])
    free = beam_step(logits[2:], scores[1:])
    assert torch.equal(step.scores[1], free.scores[0])

    padded = beam_step(logits, scores, finished=finished, pad_token=6)
    assert (padded.scores[0, 0], padded.tokens[0, 0], padded.beams[0, 0]) == (9.0, 6, 1)
    assert torch.equal(padded.scores[0, 1:], step.scores[0, :3])
    everything = torch.ones(2, 2, dtype=torch.bool)
    assert (beam_step(logits, scores, finished=everything).scores == -math.inf).all()


def test_banned_tokens_and_dead_beams_come_last() -> None:
    logits = torch.full((1, 2, 5), -math.inf)
    logits[0, 0, 3] = 2.0
    step = beam_step(logits, torch.tensor([[-1.0, 50.0]]))  # the second beam can say nothing
    assert (step.scores[0, 0], step.tokens[0, 0], step.beams[0, 0]) == (-1.0, 3, 0)
    assert (step.scores[0, 1:] == -math.inf).all()


def test_strides_float64_and_compile() -> None:
    wide = torch.randn(6, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits, scores = wide[:, ::3], torch.zeros(2, 3, dtype=torch.float64)
    step = beam_step(logits, scores)
    assert step.scores.dtype == torch.float64
    torch.testing.assert_close(step.scores, _whole(logits, scores).flatten(1).topk(6).values)
    compiled = torch.compile(beam_step, fullgraph=True, backend="eager")(logits, scores)
    assert torch.equal(compiled.tokens, step.tokens)
    assert torch.equal(compiled.beams, step.beams)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"logits": torch.zeros(5, 8)}, ValueError, r"logits must have shape \(2 \* 3, vocab_size"),
        ({"logits": torch.zeros(6, 8).long()}, TypeError, "logits must have a floating dtype"),
        ({"scores": torch.zeros(6)}, ValueError, r"scores must have shape \(batch, num_beams\)"),
        ({"num_candidates": 25}, ValueError, r"at most num_beams \* vocab_size = 24, got 25"),
        ({"num_candidates": 0}, ValueError, "num_candidates must be at least 1, got 0"),
        ({"finished": torch.zeros(2, 3)}, TypeError, "finished must be bool"),
        ({"pad_token": 0}, ValueError, "pad_token needs finished"),
    ],
)
def test_bad_arguments_are_named(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"logits": torch.zeros(6, 8), "scores": torch.zeros(2, 3)}
    with pytest.raises(error, match=message):
        beam_step(**{**given, **kwargs})
