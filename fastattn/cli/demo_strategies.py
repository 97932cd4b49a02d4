"""Decoding a prompt through fastattn's cache: by settings a row, by contrast, and by beams."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import SamplerState, SamplingParams, sample
from fastattn.cli.demo_llama import LlamaDecoder
from fastattn.nn import KVCache
from fastattn.sampling import Sample
from fastattn.sampling.beams import beam_step
from fastattn.sampling.contrastive import contrastive_scores
from fastattn.sampling.statistics import log_probabilities


@dataclass(frozen=True)
class Texts:
    """What was decoded.

    Attributes:
        tokens: int64 (rows, steps).
        logprobs: float32 (rows, steps), of each token under the softmax of the raw logits.
        seconds: for everything, prompt and all.
        logits: (steps, rows, vocabulary) that were drawn from; None where rows change places.
        margin: of beams: the least by which one that was kept led the first that was not.
    """

    tokens: Tensor
    logprobs: Tensor
    seconds: float
    logits: Tensor | None = None
    margin: float = float("inf")

    @property
    def tokens_per_second(self) -> float:
        return self.tokens.numel() / self.seconds


def row_params(rows: Sequence[tuple[float, float]], seed: int, device: Any) -> SamplingParams:
    """Settings of a batch: temperature and top_p of each row, and seeds from `seed` on."""
    temperatures, top_ps = zip(*rows, strict=True)
    return SamplingParams(
        temperature=torch.tensor(temperatures, device=device),
        top_p=torch.tensor(top_ps, device=device),
        seed=seed + torch.arange(len(rows), device=device),
        logprobs=0,
        logprobs_of="raw",
    )


def draw_again(texts: Texts, params: SamplingParams, steps: Sequence[int], impl: str) -> Tensor:
    """Tokens (rows, steps) that `impl` draws at these steps from the logits that there were."""
    drawn = []
    for step in steps:
        assert texts.logits is not None  # of `decode_rows`
        logits = texts.logits[step]
        state = SamplerState.make(logits.shape[0], logits.shape[1], logits.device)
        state.step.fill_(step)
        drawn.append(_sample(logits, params, state, impl).tokens)
    return torch.stack(drawn, 1).cpu()


def _sample(
    logits: Tensor, params: SamplingParams, state: SamplerState, impl: str = "auto"
) -> Sample:
    drawn = sample(logits, params, state, impl=impl)
    assert isinstance(drawn, Sample)  # log-probabilities were asked for
    return drawn


def _read_prompt(decoder: LlamaDecoder, cache: KVCache, prompt: list[int]) -> Tensor:
    """Reads the prompt once, for all rows of the cache; logits (rows, vocabulary)."""
    logits = decoder.step(torch.tensor([prompt], device=decoder.device), cache, rows=[0])
    rows = len(cache.lengths)
    cache.reorder([0] * rows)
    return logits.expand(rows, -1)


def decode_rows(
    decoder: LlamaDecoder, cache: KVCache, prompt: list[int], steps: int, params: SamplingParams
) -> Texts:
    """Draws `steps` tokens a row, each row by its own settings."""
    started = time.perf_counter()
    logits = _read_prompt(decoder, cache, prompt)
    state = SamplerState.make(logits.shape[0], logits.shape[1], decoder.device)
    drawn: list[Sample] = []
    seen: list[Tensor] = []
    for step in range(steps):
        if step:
            logits = decoder.step(drawn[-1].tokens[:, None], cache)
        seen.append(logits)
        drawn.append(_sample(logits, params, state))
    seconds = time.perf_counter() - started
    tokens = torch.stack([step.tokens for step in drawn], 1)
    logprobs = torch.stack([step.logprobs for step in drawn if step.logprobs is not None], 1)
    return Texts(tokens.cpu(), logprobs.cpu(), seconds, torch.stack(seen))


def decode_contrastive(
    decoder: LlamaDecoder,
    cache: KVCache,
    prompt: list[int],
    steps: int,
    amateur_layers: int,
    plausibility: float,
) -> Texts:
    """Greedy by log p_model - log p_amateur among plausible tokens; a cache of one row.

    The amateur is the model without its last layers: the final norm and the head on what its layer
    `amateur_layers` gives, which the model's own pass computes on its way.
    """
    model = decoder.model
    early: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor]) -> None:
        early[:] = [args[0][:, -1]]

    hook = model.model.layers[amateur_layers].input_layernorm.register_forward_pre_hook(keep)
    started = time.perf_counter()
    tokens: list[Tensor] = []
    logprobs: list[Tensor] = []
    try:
        logits = _read_prompt(decoder, cache, prompt)
        for step in range(steps):
            if step:
                logits = decoder.step(tokens[-1][:, None], cache)
            with torch.no_grad():
                amateur = model.lm_head(model.model.norm(early[0]))
            scores = contrastive_scores(logits, amateur, plausibility=plausibility)
            tokens.append(scores.argmax(-1))
            logprobs.append(log_probabilities(logits, tokens[-1]))
    finally:
        hook.remove()
    seconds = time.perf_counter() - started
    return Texts(torch.stack(tokens, 1).cpu(), torch.stack(logprobs, 1).cpu(), seconds)


def decode_beams(decoder: LlamaDecoder, cache: KVCache, prompt: list[int], steps: int) -> Texts:
    """The best of as many beams as the cache has rows, all of `steps` tokens."""
    started = time.perf_counter()
    logits = _read_prompt(decoder, cache, prompt)
    beams = len(cache.lengths)
    scores = torch.full((1, beams), -torch.inf, device=decoder.device)
    scores[0, 0] = 0.0  # as yet all are the same
    tokens = torch.empty(beams, 0, dtype=torch.int64, device=decoder.device)
    logprobs = torch.empty(beams, 0, device=decoder.device)
    margin = float("inf")
    for step in range(steps):
        if step:
            logits = decoder.step(tokens[:, -1:], cache)
        found = beam_step(logits, scores)
        margin = min(margin, float(found.scores[0, beams - 1] - found.scores[0, beams]))
        origin, new = found.beams[0, :beams], found.tokens[0, :beams]
        gained = log_probabilities(logits[origin], new)
        tokens = torch.cat([tokens[origin], new[:, None]], 1)
        logprobs = torch.cat([logprobs[origin], gained[:, None]], 1)
        scores = found.scores[:, :beams]
        cache.reorder(origin.tolist())
    seconds = time.perf_counter() - started
    return Texts(tokens[:1].cpu(), logprobs[:1].cpu(), seconds, margin=margin)


def distinct_2(tokens: Sequence[int]) -> float:
    """Different pairs of neighbors among all pairs (Li et al., arXiv:1510.03055)."""
    pairs = list(itertools.pairwise(tokens))
    return len(set(pairs)) / max(1, len(pairs))
