"""Greedy decoding of a batch of prompts: by Hugging Face, and through fastattn's caches."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastattn import dispatch
from fastattn.cli.demo_llama import LlamaDecoder
from fastattn.nn import BaseKVCache
from fastattn.testing import Comparison, compare


@dataclass(frozen=True)
class Generated:
    """What was generated, and how long it took.

    Attributes:
        tokens: int64 (rows, steps) on the CPU, the largest logit's each.
        logits: (rows, steps, vocabulary) on the CPU.
        first: seconds to the first token (of a prompt alone: their mean).
        seconds: for everything.
        served: calls of attention by the name of the implementation.
    """

    tokens: Tensor
    logits: Tensor
    first: float
    seconds: float
    served: Counter[str]

    @property
    def steps(self) -> int:
        return self.tokens.shape[1]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens.numel() / self.seconds


@dataclass(frozen=True)
class Difference:
    """A place where two runs choose different tokens after the same ones.

    Attributes:
        row, step: the place.
        tokens: what the own run chose, and what the other did.
        own, other, exact: their two logits, in each run and in float64.
        rounding: how far any two logits of the runs are apart at that place.
        within: whether rounding explains it: float64 tells the two apart by less than twice the
            error that the parity rule allows for a logit at this place. (The rule follows from the
            own run and float64 alone: a wrong logit of the other run does not widen it.)
    """

    row: int
    step: int
    tokens: tuple[int, int]
    own: tuple[float, float]
    other: tuple[float, float]
    exact: tuple[float, float]
    rounding: float
    within: bool


def generate_alone(model: Any, prompts: list[list[int]], steps: int) -> Generated:
    """Hugging Face's `generate`, greedy, one prompt after another, without padding."""
    runs, firsts, started = [], [], time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        clock = _Clock()
        runs.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
                do_sample=False,
                streamer=clock,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
        firsts.append(clock.times[1] - clock.times[0])
    seconds = time.perf_counter() - started
    tokens = torch.cat([run.sequences[:, -steps:] for run in runs]).cpu()
    logits = torch.cat([torch.stack(run.logits, 1) for run in runs]).cpu()
    return Generated(tokens, logits, sum(firsts) / len(firsts), seconds, Counter())


class _Clock:
    """What `generate` calls with the prompt, then with each token."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, tokens: Tensor) -> None:
        if tokens.dim() == 1:  # the prompt comes as (1, seqlen)
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_cached(
    decoder: LlamaDecoder,
    cache: BaseKVCache,
    prompts: list[list[int]],
    steps: int,
    *,
    forced: Tensor | None = None,
    impl: str = "auto",
    prompt_impl: str = "auto",
    seconds: float = float("inf"),
) -> Generated:
    """All prompts as one batch: each row at its own length, padded on its right, then decoded.

    Args:
        decoder: the model.
        cache: one row a prompt; what a row holds already is the beginning of its prompt.
        prompts: token ids, each longer than its row in the cache.
        steps: tokens to generate a row.
        forced: (rows, steps), goes on with these tokens instead of those that are chosen.
        impl, prompt_impl: of the decoding steps and of the prompts.
        seconds: begin no step that would end later than this, going by the step before.
    """
    rest = [prompt[length:] for prompt, length in zip(prompts, cache.lengths, strict=True)]
    counts: list[int] | None = [len(ids) for ids in rest]
    ids = pad_sequence([torch.tensor(row) for row in rest], batch_first=True).to(decoder.device)
    chosen, logits, times = [], [], [time.perf_counter()]
    with record_served() as served:
        for step in range(steps):
            now = decoder.step(ids, cache, counts, impl=impl if step else prompt_impl).cpu()
            logits.append(now)
            chosen.append(now.argmax(-1))
            ids = (chosen[-1] if forced is None else forced[:, step])[:, None].to(decoder.device)
            counts = None
            times.append(time.perf_counter())
            # The first step of an implementation says nothing about the prompt's time.
            if step and times[-1] - times[0] + times[-1] - times[-2] > seconds:
                break
    return Generated(
        torch.stack(chosen, 1),
        torch.stack(logits, 1),
        times[1] - times[0],
        times[-1] - times[0],
        served,
    )


@contextlib.contextmanager
def record_served() -> Iterator[Counter[str]]:
    """Counts which implementation serves the calls of attention within."""
    served: Counter[str] = Counter()

    def note(name: str, problem: Any) -> None:
        served[name] += 1

    dispatch.listeners.append(note)
    try:
        yield served
    finally:
        dispatch.listeners.remove(note)


@torch.no_grad()
def exact_logits(exact: Any, prompts: list[list[int]], tokens: Tensor) -> Tensor:
    """Logits (rows, steps, vocabulary) of a float64 model, given the prompts and the tokens."""
    rows = []
    for prompt, generated in zip(prompts, tokens.tolist(), strict=True):
        ids = torch.tensor([prompt + generated[:-1]], device=exact.device)
        rows.append(exact(ids, use_cache=False, logits_to_keep=len(generated)).logits.cpu())
    return torch.cat(rows)


def compare_logits(other: Generated, own: Generated, exact: Tensor) -> Comparison:
    """The parity rule for the logits of all steps. All three follow the same tokens.

    `other` may have fewer rows and fewer steps than `own` and `exact`, the first of them.
    """
    rows, steps = other.tokens.shape
    return compare(other.logits, own.logits[:rows, :steps], exact[:rows, :steps])


def find_differences(other: Generated, own: Generated, exact: Tensor) -> list[Difference]:
    """Every place where `other`, following the tokens of `own`, would choose another one."""
    differences = []
    rows, steps = other.tokens.shape
    for row, step in (other.tokens != own.tokens[:rows, :steps]).nonzero().tolist():
        pair = [int(own.tokens[row, step]), int(other.tokens[row, step])]
        at = [logits[row, step] for logits in (other.logits, own.logits, exact)]
        other_pair, own_pair, exact_pair = (tuple(logits[pair].tolist()) for logits in at)
        allowed = compare(*at).allowed_max_error
        differences.append(
            Difference(
                row=row,
                step=step,
                tokens=(pair[0], pair[1]),
                own=own_pair,
                other=other_pair,
                exact=exact_pair,
                rounding=(at[0] - at[1]).abs().max().item(),
                within=abs(exact_pair[0] - exact_pair[1]) <= 2 * allowed,
            )
        )
    return differences
