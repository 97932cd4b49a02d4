"""Hugging Face models as `GenerativeModel`s: without a cache, everything is computed anew.

Nothing of fastattn is in here, so what is decoded through it is an independent check.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

# Hugging Face pads ended beams with the end token where the pad token is 0.
VOCAB, EOS, PAD, START = 61, 2, 1, 1


class Texts:
    """The session: the tokens of each row, and the encoder's states."""

    def __init__(self, rows: list[list[int]], states: Tensor | None, mask: Tensor | None) -> None:
        self.rows, self.states, self.mask = rows, states, mask

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(map(len, self.rows))

    def reorder(self, rows: Sequence[int]) -> None:
        assert len(rows) == len(self.rows)
        self.rows = [list(self.rows[row]) for row in rows]
        if self.states is not None and self.mask is not None:
            self.states, self.mask = self.states[list(rows)], self.mask[list(rows)]

    def rollback(self, counts: Sequence[int]) -> None:
        assert all(0 <= n < len(row) for n, row in zip(counts, self.rows, strict=True))
        self.rows = [row[: len(row) - n] for n, row in zip(counts, self.rows, strict=True)]


class Recomputing:
    """A model of transformers; `calls` counts passes."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model.eval(), 0
        config = model.config
        self.vocab_size = config.vocab_size
        self.is_encoder_decoder = config.is_encoder_decoder
        self.max_positions = None if self.is_encoder_decoder else config.max_position_embeddings
        self.start_token = START if self.is_encoder_decoder else None
        self.eos_tokens, self.pad_token = (EOS,), PAD

    def start(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        max_seqlen: int,
        copies: int = 1,
        decoder_input_ids: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Texts]:
        self.room = max_seqlen
        states = mask = None
        if self.is_encoder_decoder:
            mask = _mask(input_ids, lengths)
            with torch.no_grad():
                states = self.model.get_encoder()(input_ids, attention_mask=mask.long())[0]
            states, mask = states.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
            if decoder_input_ids is None:
                input_ids, lengths = torch.full((len(input_ids), 1), START), None
            else:
                input_ids, lengths = decoder_input_ids, decoder_lengths
        else:
            assert decoder_input_ids is None and decoder_lengths is None
        rows = [
            ids[real].tolist()
            for ids, real in zip(input_ids, _mask(input_ids, lengths), strict=True)
        ]
        session = Texts([list(row) for row in rows for _ in range(copies)], states, mask)
        return self._logits(session, 1)[:, -1], session

    def step(
        self,
        tokens: Tensor,
        session: Texts,
        counts: Sequence[int] | None = None,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        n = tokens.shape[1]
        counts = [n] * len(tokens) if counts is None else counts
        for row, new, count in zip(session.rows, tokens.tolist(), counts, strict=True):
            row.extend(new[:count])
        assert max(session.lengths) <= self.room
        wanted = [max(count, 1) for count in counts]
        logits = self._logits(session, max(wanted))
        if not all_logits:
            return logits[:, -1]
        result = torch.full((len(tokens), n, self.vocab_size), torch.nan, dtype=logits.dtype)
        for row, count in enumerate(counts):
            result[row, :count] = logits[row, logits.shape[1] - count :]
        return result

    @torch.no_grad()
    def _logits(self, session: Texts, n: int) -> Tensor:
        """The logits at the last n tokens of each row, (rows, n, vocab_size); fewer: NaN first."""
        self.calls += 1
        lengths = torch.tensor(session.lengths)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in session.rows], True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        if self.is_encoder_decoder:
            logits = self.model(
                encoder_outputs=(session.states,),
                attention_mask=session.mask.long(),
                decoder_input_ids=ids,
                decoder_attention_mask=mask,
                use_cache=False,
            ).logits
        else:
            logits = self.model(ids, attention_mask=mask, use_cache=False).logits
        at = lengths[:, None] - n + torch.arange(n)
        picked = logits.gather(1, at.clamp(min=0)[..., None].expand(-1, -1, logits.shape[-1]))
        return picked.masked_fill(at[..., None] < 0, torch.nan)


def _mask(ids: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return torch.arange(ids.shape[1]) < lengths[:, None]


def make(kind: str, seed: int = 0, vocab: int = VOCAB, layers: int = 2) -> Any:
    """A tiny random model in float64, so that no two logits are as good as equal."""
    torch.manual_seed(seed)
    special = {"eos_token_id": EOS, "pad_token_id": PAD}
    if kind == "llama":
        config: Any = transformers.LlamaConfig(
            vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            initializer_range=0.4, bos_token_id=0, **special,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab, n_embd=32, n_layer=layers, n_head=4, n_positions=64,
            initializer_range=0.4, bos_token_id=0, **special,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.T5Config(
            vocab_size=vocab, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4,
            decoder_start_token_id=START, initializer_factor=3.0, **special,
        )  # fmt: skip
        model = transformers.T5ForConditionalGeneration(config)
    return model.double().eval()


def prompts(number: int = 20, longest: int = 11, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Random prompts of 1 to `longest` tokens, padded on the left, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (number,), generator=generator)
    lengths[0] = longest
    mask = torch.arange(longest) >= longest - lengths[:, None]
    ids = torch.randint(3, VOCAB, (number, longest), generator=generator)
    return ids.masked_fill(~mask, PAD), mask.long()
