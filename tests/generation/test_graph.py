"""The steps that a CUDA graph replays, with a graph that records torch's operators on the CPU.

What is not tested here is CUDA: that every launch of a step can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.generation import GenerationConfig, generate, loop
from fastattn.nn import KVCache

VOCAB = 23


class RecordedGraph(TorchDispatchMode):
    """As a CUDA graph: a capture has no effect, a replay runs on the tensors that there were."""

    capturing = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "a capture reads a value"
        for place, argument in enumerate(func._schema.arguments[: len(args)]):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.append((args[place], args[place].clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        self._before = []

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            if not func._schema.is_mutable:
                pairs = [(out, new)] if isinstance(out, Tensor) else zip(out, new, strict=True)
                for old, value in pairs:
                    old.copy_(value)


@contextmanager
def _capture(graph: RecordedGraph) -> Iterator[None]:
    RecordedGraph.capturing = True
    try:
        with graph:
            yield
    finally:
        RecordedGraph.capturing = False
    graph.undo()


class CachedSession:
    replayable = True

    def __init__(self, rows: int, max_seqlen: int) -> None:
        self.cache = KVCache(1, rows, max_seqlen, 1, 8, dtype=torch.float32)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.cache.lengths

    def reorder(self, rows: Sequence[int]) -> None:
        self.cache.reorder(rows)

    def rollback(self, counts: Sequence[int]) -> None:
        self.cache.rollback(counts)


class Counting:
    """Logits by the last token and by the length that the device knows; a cache that is written."""

    is_encoder_decoder, start_token, eos_tokens, pad_token = False, None, (2,), 0
    vocab_size, max_positions = VOCAB, None

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.by_token = torch.randn(VOCAB, VOCAB, generator=generator)
        self.by_length = torch.randn(64, VOCAB, generator=generator)
        self.eager = 0

    def start(
        self, input_ids: Tensor, lengths: Tensor | None = None, *, max_seqlen: int, **options: Any
    ) -> tuple[Tensor, CachedSession]:
        batch, seqlen = input_ids.shape
        counts = [seqlen] * batch if lengths is None else lengths.tolist()
        session = CachedSession(batch, max_seqlen)
        self._write(session, seqlen, counts)
        last = input_ids[torch.arange(batch), torch.tensor(counts) - 1]
        return self._logits(last, session), session

    def step(self, tokens: Tensor, session: CachedSession) -> Tensor:
        if RecordedGraph.capturing:
            # The length of the moment of the replay, and this token.
            return self.by_token[tokens[:, 0]] + self.by_length[session.cache.seqlens + 1]
        self.eager += 1
        self._write(session, 1, [1] * len(tokens))
        return self._logits(tokens[:, 0], session)

    def _write(self, session: CachedSession, n: int, counts: list[int]) -> None:
        k = torch.zeros(len(counts), n, 1, 8)
        session.cache.append(0, k, k)
        session.cache.advance(counts)

    def _logits(self, last: Tensor, session: CachedSession) -> Tensor:
        return self.by_token[last] + self.by_length[session.cache.seqlens]


@pytest.mark.parametrize(
    ("settings", "whole", "alone"),
    [
        ({}, 19 - 2, 0),
        ({"no_repeat_ngram": 2, "bad_words": [[5], [6, 7]]}, 19 - 2, 0),
        # Until the sixth token, and for the last, a step differs from others.
        ({"min_new_tokens": 6, "forced_eos": 2}, 19 - 2 - 4, 4),
        ({"return_logprobs": True, "return_scores": True}, 0, 19 - 2),
    ],
)
def test_replayed_steps(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], whole: int, alone: int
) -> None:
    ids = torch.tensor([[0, 4, 5], [6, 7, 8], [0, 0, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    config = GenerationConfig(20, check_every=50, **settings)
    wanted = generate(Counting(), ids, config, attention_mask=mask)  # type: ignore[arg-type]
    graphs: list[RecordedGraph] = []

    def new_graph() -> RecordedGraph:
        graphs.append(RecordedGraph())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(loop, "can_capture", lambda sessions: True)
    model = Counting()
    out = generate(model, ids, config, attention_mask=mask)  # type: ignore[arg-type]
    assert out.sequences.tolist() == wanted.sequences.tolist()
    assert out.finished.tolist() == wanted.finished.tolist()
    torch.testing.assert_close(out.logprobs, wanted.logprobs)
    torch.testing.assert_close(out.scores, wanted.scores)
    assert model.eager == 2
    assert sorted(graph.replays for graph in graphs) == sorted(n for n in (whole, alone) if n)
