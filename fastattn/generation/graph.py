"""A decoding step as a CUDA graph: one launch for the models and the choice of their tokens.

Not run on a device so far: there was none where this was written. On the CPU it never runs.

A model takes part if its session says so, with `replayable = True` and its cache as `cache`. Its
`step` must then do nothing on the host while a stream is being captured, above all not
`cache.advance`: a captured call runs nothing, so nothing may count yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.generation.choose import Choose
from fastattn.generation.rows import Rows
from fastattn.models.protocol import GenerativeModel, Session
from fastattn.nn import BaseKVCache

# Steps that run as they are before the capture: for what is initialized at its first use.
_WARM_UP = 2


def can_capture(sessions: Sequence[Session]) -> bool:
    """Whether `GraphedStep` can serve these."""
    caches = [_cache(session) for session in sessions]
    return all(cache is not None and cache.device.type == "cuda" for cache in caches)


def _cache(session: Session) -> BaseKVCache | None:
    cache = getattr(session, "cache", None) if getattr(session, "replayable", False) else None
    return cache if isinstance(cache, BaseKVCache) else None


class GraphedStep:
    """Steps of a batch: the first few as they are, then by replaying one that was captured.

    The graph reads `rows.tokens`, which never moves, and the lengths that the caches keep on the
    device. Where a step notes something down, or bans what other steps do not, only the models
    are replayed, and the choice runs as it is.
    """

    def __init__(
        self,
        models: Sequence[GenerativeModel],
        sessions: Sequence[Session],
        rows: Rows,
        choose: Choose,
    ) -> None:
        self._models, self._sessions = models, sessions
        self._rows, self._choose = rows, choose
        self._caches = [cache for cache in map(_cache, sessions) if cache is not None]
        self._eager = 0
        self._models_alone: torch.cuda.CUDAGraph | None = None
        self._whole: torch.cuda.CUDAGraph | None = None
        self._logits: tuple[Tensor, ...] = ()

    def step(self, step: int) -> None:
        """One token more for every row.

        Args:
            step: number of new tokens so far.
        """
        if self._eager < _WARM_UP:
            self._eager += 1
            self._choose(self._forward(), step)
            return
        for cache in self._caches:
            cache.reserve(1)
        if self._choose.is_steady(step):
            if self._whole is None:
                self._whole = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._whole):
                    self._choose(self._forward(), step)
            self._whole.replay()
        else:
            if self._models_alone is None:
                self._models_alone = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._models_alone):
                    self._logits = self._forward()
            self._models_alone.replay()
            self._choose(self._logits, step)
        for cache in self._caches:
            cache.advance(1, replayed=True)

    def _forward(self) -> tuple[Tensor, ...]:
        return tuple(
            model.step(self._rows.tokens, session)
            for model, session in zip(self._models, self._sessions, strict=True)
        )
