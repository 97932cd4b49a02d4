"""The `fastattn::sample` operator: schema, fake implementation, and the launch of the kernel.

Beside `torch_ops` and `torch_decode_ops` the only file that imports kernels. The operator updates
the sampler's state, which its schema says, so that torch.compile keeps the order of things.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType

import torch
from torch import Tensor

from fastattn.sampling.params import RANGES
from fastattn.sampling.problem import ERROR_TOKEN, Sample, SampleProblem
from fastattn.testing.interpreter import is_interpreting
from fastattn.torch_ops import LIBRARY, empty, on_device, zero_counters

# The settings that are a number or a tensor of numbers, in the order of the schema.
_NAMES = tuple(RANGES)

LIBRARY.define(
    "sample(Tensor logits, Tensor(a!)? seen, Tensor(b!)? counts, Tensor(c!)? step, Tensor? seeds, "
    "int seed, Tensor? bias, Tensor? allowed, Tensor?[] tensors, float[] numbers, bool joint, "
    "int logprobs) -> (Tensor, Tensor, Tensor, Tensor)"
)


def sample(problem: SampleProblem) -> Sample:
    """Draws a token from each row, and marks it in the state."""
    params, state = problem.params, problem.state
    wanted = -1 if params.logprobs is None else params.logprobs
    raw = wanted >= 0 and params.logprobs_of == "raw"
    settings = [getattr(params, name) for name in _NAMES]
    tokens, logprobs, top_tokens, top_logprobs = torch.ops.fastattn.sample(
        problem.logits,
        None if state is None else state.seen,
        None if state is None else state.counts,
        None if state is None else state.step,
        problem.seed if isinstance(problem.seed, Tensor) else None,
        0 if isinstance(problem.seed, Tensor) else problem.seed,
        problem.dense_bias(),
        problem.allowed_bits(),
        [value if isinstance(value, Tensor) else None for value in settings],
        [0.0 if isinstance(value, Tensor) else float(value) for value in settings],
        params.joint,
        -1 if raw else wanted,
    )
    if raw:
        return _raw_logprobs(problem.logits, tokens, wanted)
    if wanted < 0:
        return Sample(tokens)
    return Sample(tokens, logprobs, *((top_tokens, top_logprobs) if wanted else ()))


def _raw_logprobs(logits: Tensor, tokens: Tensor, n: int) -> Sample:
    """Log-probabilities by the logits as they are given, in a few more passes over them."""
    failed = tokens == ERROR_TOKEN
    infinite = logits == math.inf
    scores = logits.float()
    # The first +inf has all of the mass.
    first = infinite & (infinite.cumsum(-1) == 1)
    alone = torch.where(first, 0.0, -math.inf)
    scores = torch.where(infinite.any(-1, keepdim=True), alone, scores)
    total = torch.logsumexp(scores, -1)
    own = scores.gather(1, tokens.clamp_min(0)[:, None])[:, 0] - total
    own = own.masked_fill(failed, math.nan)
    if not n:
        return Sample(tokens, own)
    values, top = scores.topk(n, dim=-1)
    top = top.masked_fill((values == -math.inf) | failed[:, None], ERROR_TOKEN)
    values = (values - total[:, None]).masked_fill(failed[:, None], math.nan)
    return Sample(tokens, own, top, values)


@functools.cache
def kernels() -> ModuleType:
    """The kernels of sampling, imported once; under the interpreter, after it was repaired."""
    if is_interpreting():
        from fastattn.testing.interpreter import repair

        repair()
    from fastattn.kernels import sampling

    return sampling


@torch.library.impl(LIBRARY, "sample", "CompositeExplicitAutograd")
def _sample(
    logits: Tensor,
    seen: Tensor | None,
    counts: Tensor | None,
    step: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    bias: Tensor | None,
    allowed: Tensor | None,
    tensors: list[Tensor | None],
    numbers: list[float],
    joint: bool,
    logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _results(logits, logprobs)
    tokens, own, top_tokens, top_logprobs = results
    settings = {
        name: number if tensor is None else tensor
        for name, tensor, number in zip(_NAMES, tensors, numbers, strict=True)
    }
    sampling = kernels().Sampling(
        **settings,
        seed=seed if seeds is None else seeds,
        bias=bias,
        allowed=allowed,
        seen=seen,
        counts=counts,
        step=step,
        joint=joint,
    )
    with on_device(logits):
        kernels().launch_sample(
            logits,
            sampling,
            tokens,
            zero_counters(logits, logits.shape[0]),
            logprobs=own if logprobs >= 0 else None,
            top_tokens=top_tokens if logprobs > 0 else None,
            top_logprobs=top_logprobs if logprobs > 0 else None,
        )
    return results


def _results(logits: Tensor, logprobs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = logits.shape[0]
    ranked = (batch, logprobs) if logprobs > 0 else (0,)
    return (
        logits.new_empty((batch,), dtype=torch.int64),
        empty(logits, (batch,) if logprobs >= 0 else (0,), torch.float32),
        logits.new_empty(ranked, dtype=torch.int64),
        empty(logits, ranked, torch.float32),
    )


@torch.library.register_fake("fastattn::sample")
def _fake_sample(
    logits: Tensor,
    seen: Tensor | None,
    counts: Tensor | None,
    step: Tensor | None,
    seeds: Tensor | None,
    seed: int,
    bias: Tensor | None,
    allowed: Tensor | None,
    tensors: list[Tensor | None],
    numbers: list[float],
    joint: bool,
    logprobs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(logits, logprobs)
