"""The public function that draws tokens: documentation, validation, and one call down."""

from __future__ import annotations

from torch import Tensor

from fastattn import dispatch
from fastattn.sampling.params import SamplingParams
from fastattn.sampling.problem import Sample, make_sample_problem
from fastattn.sampling.state import SamplerState
from fastattn.validation import device_checks_enabled

_DEFAULT = SamplingParams()


def sample(
    logits: Tensor,
    params: SamplingParams = _DEFAULT,
    state: SamplerState | None = None,
    *,
    impl: str = "auto",
) -> Tensor | Sample:
    """Draws a token from each row of logits: penalties, cuts and the draw in one pass.

        params = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, repetition_penalty=1.2)
        state = SamplerState.from_prompt(input_ids, vocab_size)
        tokens = sample(logits, params, state)  # (batch,); the state knows them now

    The draw is the largest of score + Gumbel noise over the tokens that are kept. The noise of a
    token follows from the row's seed, its step and the token's id (`fastattn.sampling.noise`), so
    all implementations draw the same token, but for float32's rounding, whatever else is in the
    batch. Without a `state` every call is step 0: with a fixed seed it draws the same.

    Args:
        logits: (batch, vocab_size), float16, bfloat16 or float32, with any row stride; float64 for
            impl="reference".
        params: how to draw; see `SamplingParams`.
        state: what was seen, counted and drawn before, needed for penalties; updated in place.
        impl: "auto", or "triton" (one launch), "cpu" (NumPy on one core, without a full sort),
            "reference" (the specification). One that is named runs or raises. "auto" takes
            "triton" on a GPU and "cpu" on the CPU.

    Returns:
        int64 (batch,); with `params.logprobs` a `Sample` with log-probabilities. `ERROR_TOKEN`, -1,
        for a row without a distribution: its logits hold NaN where no ban is, or are all -inf
        after penalties and bans. +inf wins, the lowest id among several.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it. Within
            `fastattn.testing.debug()` also where a row has no distribution.
        NotImplementedError: `impl` was named and cannot serve the call; lists every reason.
    """
    problem = make_sample_problem(logits, params, state)
    drawn = Sample(*dispatch.run(problem, impl))
    if device_checks_enabled():
        failed = (drawn.tokens < 0).nonzero()[:, 0].tolist()
        if failed:
            raise ValueError(
                f"logits must have a number above -inf and no NaN after penalties and bans, got "
                f"rows {failed} without a distribution"
            )
    return drawn.tokens if params.logprobs is None else drawn
