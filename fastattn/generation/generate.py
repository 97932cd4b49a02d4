"""The public function that decodes: checks everything, then hands over to a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.generation.beams import beam_search
from fastattn.generation.config import Contrast, GenerationConfig
from fastattn.generation.loop import decode_in_step
from fastattn.generation.plan import make_plan
from fastattn.generation.progress import Progress
from fastattn.generation.result import Generated
from fastattn.generation.rows import Rows
from fastattn.generation.speculative import decode_speculatively, spare_columns
from fastattn.generation.watch import StopStrings, Watch
from fastattn.models.protocol import GenerativeModel

_DEFAULT = GenerationConfig()


@torch.no_grad()
def generate(
    model: GenerativeModel,
    input_ids: Tensor,
    config: GenerationConfig = _DEFAULT,
    *,
    attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    small_model: GenerativeModel | None = None,
    draft_model: GenerativeModel | None = None,
    decode: Callable[[list[int]], str] | None = None,
    streamer: Any = None,
    progress: bool = False,
) -> Generated:
    """Continues prompts, or has an encoder-decoder answer them.

        out = generate(model, input_ids, GenerationConfig(max_new_tokens=64))
        out = generate(model, input_ids, GenerationConfig(num_beams=4), attention_mask=mask)
        out = generate(model, input_ids, GenerationConfig(
            do_sample=True, sampling=SamplingParams(temperature=0.8, top_p=0.9, seed=1)))

    The host waits for the device every `config.check_every` steps, to see whether all rows have
    ended; with beams and a draft model in every step, to tell the cache which tokens stay.

    Args:
        model: whatever implements `fastattn.models.protocol.GenerativeModel`. The logits that its
            `step` returns may be overwritten here.
        input_ids: int32 or int64 (batch, seqlen), prompts; of an encoder-decoder what the encoder
            reads. Padded on the left or on the right where attention_mask says so.
        config: how to decode; see `GenerationConfig`.
        attention_mask: bool or integer (batch, seqlen), non-zero for real tokens; None: all are.
        decoder_input_ids: int (batch, seqlen), with what the decoder of an encoder-decoder begins,
            its start token included; None: that alone.
        decoder_attention_mask: as attention_mask, for these.
        small_model: contrastive decoding: what it finds likely counts against a token. Penalties
            and bans are of the model's logits, temperature and cuts of the contrast.
        draft_model: speculative decoding: drafts tokens that the model then checks, with the same
            result, or the same distribution.
        decode: text of token ids, such as a tokenizer's `decode`, for `config.stop_strings`.
        streamer: called with the new tokens, int64 (rows,) on the CPU, of one step after another;
            or an object with put and end, such as Hugging Face's streamers, which gets the prompts
            first. With check_every above 1 they come so many at a time.
        progress: a bar by rich on stderr, if that is a terminal.

    Returns:
        Generated, its rows (batch * num_return_sequences). A model's row does not depend on what
        else is in the batch, up to rounding.

    Raises:
        TypeError, ValueError: an argument is not as described, or contradicts another: before the
            model runs, and naming it. Also where nothing is left that may come next.
        ImportError: progress without rich.
    """
    plan = make_plan(
        model,
        input_ids,
        config,
        attention_mask=attention_mask,
        decoder_input_ids=decoder_input_ids,
        decoder_attention_mask=decoder_attention_mask,
        small_model=small_model,
        draft_model=draft_model,
        decode=decode,
        streamer=streamer,
    )
    rows = Rows(plan, spare=spare_columns(plan) if draft_model is not None else 1)
    with Progress(progress, plan.max_new) as bar:
        if config.num_beams > 1:
            return beam_search(plan, model, rows, StopStrings(config.stop_strings, decode), bar)
        watch = Watch(plan, rows, decode, streamer, bar)
        if draft_model is not None:
            result = decode_speculatively(plan, model, draft_model, rows, watch)
        else:
            models = [model] if small_model is None else [model, small_model]
            contrast = None if small_model is None else config.contrast or Contrast()
            result = decode_in_step(plan, models, rows, watch, contrast)
        watch.end()
        return result
