"""Encoder-decoders: T5 1.0 and 1.1, mT5, BART, and Whisper.

    model = fastattn.models.checkpoint.load("path/to/t5-small")
    logits = model(input_ids, decoder_input_ids, lengths).logits      # training

    logits, session = model.start(input_ids, lengths, max_seqlen=64)  # decoding: the encoder, once
    logits = model.step(logits.argmax(-1, keepdim=True), session)     # then token by token

What tells the families apart is data, in `seq2seq_config.py`. Padding never enters a layer: the
encoder, and in training the decoder too, run on packed tokens. Keys and values of the encoder's
output are projected once, in `start`, and rows that decode the same input share them.

From the papers: T5 arXiv:1910.10683, its gated MLP arXiv:2002.05202, mT5 arXiv:2010.11934, BART
arXiv:1910.13461, Whisper arXiv:2212.04356.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastattn.masks import Causal
from fastattn.models.checkpoint import Family
from fastattn.models.layers import (
    Linear,
    check_row_lengths,
    check_token_ids,
    linear,
    take_last,
    transposed_in_memory,
)
from fastattn.models.protocol import Session
from fastattn.models.seq2seq_config import (
    Seq2SeqConfig,
    bart_config,
    bart_to_hf,
    bart_weights,
    t5_config,
    t5_to_hf,
    t5_weights,
    whisper_config,
    whisper_to_hf,
    whisper_weights,
)
from fastattn.models.seq2seq_layers import SoundInput, Stack
from fastattn.models.seq2seq_packing import Encoded, Packing, Seq2SeqOutput
from fastattn.nn import KVCache
from fastattn.nn.attending import Attending
from fastattn.validation import check_tensor, describe

IGNORED_LABEL = -100
"""Labels that are no token to predict, as for `torch.nn.functional.cross_entropy`."""

STEP_ROOM = 16
"""Tokens that a row's room exceeds what was asked for: for the padding of a step."""


class Seq2SeqSession:
    """Rows that are being decoded; see `fastattn.models.protocol.Session`.

    Attributes:
        cache: keys and values of the decoder's own tokens, a row each.
        memory: those of the encoder's, a row for each input; `copies` rows that are next to each
            other share one.
    """

    def __init__(self, cache: KVCache, memory: KVCache, max_seqlen: int) -> None:
        self.cache, self.memory, self.max_seqlen = cache, memory, max_seqlen

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row in the cache."""
        return self.cache.lengths

    @property
    def copies(self) -> int:
        """Rows that share an input's keys and values."""
        return self.cache.max_batch // self.memory.max_batch

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes what row `rows[b]` was: as many rows as before.

        The encoder's keys stay where they are as long as rows only change places with rows of the
        same input, as beams do.
        """
        self.cache.reorder(rows)  # which checks them
        copies = self.copies
        inputs = [int(row) // copies for row in rows]
        groups = [inputs[first : first + copies] for first in range(0, len(inputs), copies)]
        if all(len(set(group)) == 1 for group in groups):
            order = [group[0] for group in groups]
            if order != list(range(len(order))):
                self.memory.reorder(order)
        else:
            self.memory = _rows_of(self.memory, inputs)

    def rollback(self, counts: Sequence[int]) -> None:
        """Row b forgets its last `counts[b]` tokens."""
        self.cache.rollback(counts)


def _cache_like(cache: KVCache, rows: int) -> KVCache:
    return KVCache(
        cache.num_layers, rows, cache.max_seqlen, cache.num_heads_kv, cache.head_dim,
        dtype=cache.dtype, device=cache.device,
    )  # fmt: skip


def _rows_of(cache: KVCache, rows: list[int]) -> KVCache:
    """A cache whose rows are copies of these of another; they may repeat."""
    result, index = _cache_like(cache, len(rows)), torch.tensor(rows, device=cache.device)
    for layer in range(cache.num_layers):
        k, v = (store.values[layer].index_select(0, index) for store in (cache.keys, cache.values))
        result.append(layer, k, v)
    result.advance([cache.lengths[row] for row in rows])
    return result


class Seq2Seq(nn.Module):
    """An encoder-decoder with or without a language modeling head; a `GenerativeModel`.

    Args:
        config: of the model. `checkpoint.load` makes one with its weights; `layers.initialize`
            draws some to start training with (not Whisper's sinusoids, which a checkpoint has).
    """

    is_encoder_decoder = True
    logits_bias: nn.Parameter | None

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.max_positions = config.vocab_size, config.decoder.max_positions
        self.start_token, self.pad_token = config.start_token, config.pad_token
        self.eos_tokens = config.eos_tokens
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.encoder_embedding = self.sound = self.head = None
        if config.num_mel_bins:
            self.sound = SoundInput(config.num_mel_bins, config.dim)
        elif not config.tied_embeddings:
            self.encoder_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = Stack(config, config.encoder, decodes=False)
        self.decoder = Stack(config, config.decoder, decodes=True)
        if self.encoder.positions is not None and config.num_mel_bins:
            self.encoder.positions.requires_grad_(False)  # sinusoids, which are not trained
        if config.has_head and not config.tied_head:
            self.head = Linear(config.dim, config.vocab_size, bias=False)
        elif config.has_head:
            self.embedding.weight = transposed_in_memory(self.embedding.weight)
        self.logits_bias = None
        if config.has_head and config.logits_bias:
            self.logits_bias = nn.Parameter(torch.zeros(1, config.vocab_size), requires_grad=False)

    @property
    def impl(self) -> str:
        """Of all attention, as for `fastattn.attention`; may be set."""
        return self.decoder.layers[0].attention.impl

    @impl.setter
    def impl(self, impl: str) -> None:
        for module in self.modules():
            if isinstance(module, Attending):
                module.impl = impl

    # ---- encoder

    def encode(
        self, input_ids: Tensor, lengths: Tensor | None = None, *, hidden_states: bool = False
    ) -> Encoded:
        """Runs the encoder.

        Args:
            input_ids: int64 (batch, seqlen), padded on the right; of Whisper log-mel features
                (batch, num_mel_bins, 2 * max_source_positions) in the dtype of the model.
            lengths: int64 (batch,), real tokens of each row, at least 1; None: all. None for sound,
                whose silence is read too.
            hidden_states: keep the embeddings and the outputs of all layers.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        if self.sound is not None:
            self._check_sound(input_ids, lengths)
            x = self.sound(input_ids)
            packing = Packing.of(x)
            x = packing.pack(x)
        else:
            limit = self.config.encoder.max_positions
            check_token_ids("input_ids", input_ids, self.vocab_size, limit)
            check_row_lengths("lengths", lengths, input_ids)
            packing = Packing.of(input_ids, lengths)
            embedding = self.embedding if self.encoder_embedding is None else self.encoder_embedding
            x = embedding(packing.pack(input_ids))  # (tokens, dim)
        options = {"mask": packing.mask(), "bias": self.encoder.bias()}
        seen: list[Tensor] | None = [] if hidden_states else None
        states = self.encoder(x, packing.positions, lambda layer: (options, None), seen)
        return Encoded(states, packing, None if seen is None else tuple(seen))

    def _check_sound(self, features: Tensor, lengths: Tensor | None) -> None:
        check_tensor("input_ids", features)
        shape = (self.config.num_mel_bins, 2 * (self.config.encoder.max_positions or 0))
        if not features.is_floating_point() or features.dim() != 3 or features.shape[1:] != shape:
            raise ValueError(
                "input_ids of a model that reads sound must be floating features (batch, "
                f"num_mel_bins, frames) = (batch, {shape[0]}, {shape[1]}), got {describe(features)}"
            )
        if lengths is not None:
            raise ValueError(
                "lengths must be None in a model that reads sound, whose silence is read too, got "
                f"{describe(lengths)}"
            )

    # ---- training

    def forward(
        self,
        input_ids: Tensor | None,
        decoder_input_ids: Tensor,
        lengths: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
        *,
        encoded: Encoded | None = None,
        hidden_states: bool = False,
    ) -> Seq2SeqOutput:
        """Encoder and decoder on whole sequences, with gradients.

        For training, `decoder_input_ids` are `shift_right(labels)`:

            logits = model(input_ids, model.shift_right(labels), lengths).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

        Args:
            input_ids, lengths: as for `encode`.
            decoder_input_ids: int64 (batch, seqlen), padded on the right.
            decoder_lengths: int64 (batch,), real tokens of each of its rows; None: all.
            encoded: instead of `input_ids` and `lengths`, which are then None.
            hidden_states: return the embeddings and the outputs of all layers.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        if (encoded is None) == (input_ids is None):
            raise ValueError("input_ids or encoded must be given, one of them and not both")
        if encoded is None:
            encoded = self.encode(input_ids, lengths, hidden_states=hidden_states)  # type: ignore[arg-type]
        elif lengths is not None:
            raise ValueError("lengths must be None where encoded is given, which has its own")
        self._check_decoder_ids(decoder_input_ids, decoder_lengths, encoded)
        packing = Packing.of(decoder_input_ids, decoder_lengths)
        own = {"mask": packing.mask() & Causal(), "bias": self.decoder.bias()}
        cross = {"mask": packing.mask(encoded.packing), "states": encoded.states}
        seen: list[Tensor] | None = [] if hidden_states else None
        x = self.embedding(packing.pack(decoder_input_ids))  # (tokens, dim)
        states = self.decoder(x, packing.positions, lambda layer: (own, cross), seen)
        logits = packing.pad(self.logits(states)) if self.config.has_head else None
        return Seq2SeqOutput(
            logits, packing.pad(states), encoded, _padded(packing, seen),
            _padded(encoded.packing, encoded.hidden_states),
        )  # fmt: skip

    def shift_right(self, labels: Tensor) -> Tensor:
        """What the decoder reads to predict `labels`: the start token, and each label but the last.

        Args:
            labels: int64 (batch, seqlen); -100 (no label) becomes the pad token.
        """
        start, pad = self.start_token, self.pad_token
        if start is None or pad is None:
            raise ValueError(
                "the config must have a start token and a pad token to shift labels, got "
                f"decoder_start_token_id {start} and pad_token_id {pad}"
            )
        shifted = functional.pad(labels[:, :-1], (1, 0), value=start)
        return shifted.masked_fill(shifted == IGNORED_LABEL, pad)

    def logits(self, states: Tensor) -> Tensor:
        """(..., dim) -> (..., vocab_size)."""
        if not self.config.has_head:
            raise ValueError(f"{self.config.architecture} has no head, and so no logits")
        if self.config.logits_scale != 1.0:
            states = states * self.config.logits_scale
        weight = self.embedding.weight if self.head is None else self.head.weight
        logits = linear(states, weight)
        return logits if self.logits_bias is None else logits + self.logits_bias[0]

    def _check_decoder_ids(self, ids: Tensor, lengths: Tensor | None, encoded: Encoded) -> None:
        check_token_ids("decoder_input_ids", ids, self.vocab_size, self.max_positions)
        check_row_lengths("decoder_lengths", lengths, ids)
        rows = len(encoded.packing.lengths)
        if ids.shape[0] != rows:
            raise ValueError(
                f"decoder_input_ids must have a row for each input, {rows}, got {describe(ids)}"
            )
        if encoded.states.shape[-1] != self.config.dim:
            raise ValueError(
                f"encoded states must have {self.config.dim} features, got "
                f"{describe(encoded.states)}"
            )

    # ---- decoding

    def start(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        max_seqlen: int,
        copies: int = 1,
        decoder_input_ids: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Seq2SeqSession]:
        """See `GenerativeModel.start`; `input_ids` and `lengths` are as for `encode`."""
        with torch.no_grad():
            encoded = self.encode(input_ids, lengths)
        return self.start_encoded(
            encoded, max_seqlen=max_seqlen, copies=copies, decoder_input_ids=decoder_input_ids,
            decoder_lengths=decoder_lengths,
        )  # fmt: skip

    @torch.no_grad()
    def start_encoded(
        self,
        encoded: Encoded,
        *,
        max_seqlen: int,
        copies: int = 1,
        decoder_input_ids: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Seq2SeqSession]:
        """`start` for an encoder's states that are there already; the other arguments are its.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        inputs, device = len(encoded.packing.lengths), encoded.states.device
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        if decoder_input_ids is None:
            if self.start_token is None:
                raise ValueError(
                    "decoder_input_ids must be given, since the config has no "
                    "decoder_start_token_id"
                )
            decoder_input_ids = torch.full((inputs, 1), self.start_token, device=device)
        self._check_decoder_ids(decoder_input_ids, decoder_lengths, encoded)
        self._check_room(max_seqlen, decoder_input_ids)
        sizes = self.config.decoder
        cache, memory = (
            KVCache(
                sizes.num_layers, rows, room, sizes.num_heads, sizes.head_dim,
                dtype=encoded.states.dtype, device=device,
            )
            for rows, room in (
                (inputs * copies, max_seqlen + STEP_ROOM), (inputs, encoded.packing.seqlen),
            )
        )  # fmt: skip
        for index, layer in enumerate(self.decoder.layers):
            k, v = layer.cross.keys_and_values(encoded.states)  # (tokens, num_heads, head_dim)
            memory.append(index, encoded.packing.pad(k), encoded.packing.pad(v))
        memory.advance(encoded.packing.lengths)
        session = Seq2SeqSession(cache, memory, max_seqlen)
        states = self._decode(decoder_input_ids, session, range(inputs))
        real = [decoder_input_ids.shape[1]] * inputs
        real = real if decoder_lengths is None else decoder_lengths.tolist()
        cache.advance(real, rows=range(inputs))
        if copies > 1:  # a row's copies stand next to it
            cache.reorder([row // copies for row in range(inputs * copies)])
        logits = self.logits(take_last(states, decoder_lengths))
        return logits if copies == 1 else logits.repeat_interleave(copies, 0), session

    def _check_room(self, max_seqlen: int, ids: Tensor) -> None:
        if max_seqlen < ids.shape[1]:
            raise ValueError(
                f"max_seqlen must be at least {ids.shape[1]}, the tokens that the decoder starts "
                f"with, got {max_seqlen}"
            )
        if self.max_positions is not None and max_seqlen > self.max_positions:
            raise ValueError(
                f"max_seqlen must be at most {self.max_positions}, the positions that the decoder "
                f"has, got {max_seqlen}"
            )

    @torch.no_grad()
    def step(
        self,
        tokens: Tensor,
        session: Session,
        counts: Sequence[int] | None = None,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Appends tokens to every row: see `GenerativeModel.step`.

        Raises:
            TypeError, ValueError: an argument is not as described, or a row has no room.
        """
        check_token_ids("tokens", tokens, self.vocab_size)
        if not isinstance(session, Seq2SeqSession):
            raise TypeError(f"session must be what start() gave, got {session!r}")
        rows, n = tokens.shape
        if rows != session.cache.max_batch:
            raise ValueError(
                f"tokens must have a row for each of the session, {session.cache.max_batch}, got "
                f"{rows}"
            )
        real = [n] * rows if counts is None else [int(count) for count in counts]
        if len(real) != rows or not 0 <= min(real) <= max(real) <= n:
            raise ValueError(f"counts must be {rows} numbers in 0..{n}, got {real}")
        for row, (length, count) in enumerate(zip(session.lengths, real, strict=True)):
            if length + count > session.max_seqlen:
                raise ValueError(
                    f"row {row} has {length} tokens and no room for {count} more: the session was "
                    f"started with max_seqlen {session.max_seqlen}"
                )
        states = self._decode(tokens, session)
        # A captured call runs nothing, so nothing counts yet: who replays it advances.
        if not (tokens.is_cuda and torch.cuda.is_current_stream_capturing()):
            session.cache.advance(real)
        if all_logits:
            return self.logits(states)
        if min(real) == n:
            return self.logits(states[:, -1])
        last = torch.tensor([max(count, 1) for count in real], device=states.device)
        return self.logits(take_last(states, last))

    def _decode(self, tokens: Tensor, session: Seq2SeqSession, rows: range | None = None) -> Tensor:
        """States (rows, n, dim) of tokens behind those of the cache, which are written there.

        What waits for no host: the part of a step that a CUDA graph can capture.
        """
        cache, memory, n = session.cache, session.memory, tokens.shape[1]
        positions = None
        if self.max_positions is not None:  # beyond which only padding stands
            held = cache.seqlens if rows is None else cache.seqlens[: len(rows)]
            positions = held[:, None] + torch.arange(n, device=tokens.device)
            positions = positions.clamp(max=self.max_positions - 1)
        # A single token sees all that is there.
        own = {"cache": cache, "rows": rows, "causal": n > 1, "bias": self.decoder.bias()}

        def options(layer: int) -> tuple[dict[str, Any], dict[str, Any]]:
            return {**own, "layer": layer}, {"cache": memory, "layer": layer}

        return self.decoder(self.embedding(tokens), positions, options)


def _padded(packing: Packing, seen: Sequence[Tensor] | None) -> tuple[Tensor, ...] | None:
    return None if seen is None else tuple(packing.pad(states) for states in seen)


def _build(config: Seq2SeqConfig, architecture: str) -> Seq2Seq:
    return Seq2Seq(config)


_T5_IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)

FAMILIES = {
    "t5": Family(
        t5_config, t5_to_hf, _build, t5_weights, bare="T5Model", prefix="",
        architectures=("T5Model", "T5ForConditionalGeneration"), ignored=_T5_IGNORED,
    ),
    "mt5": Family(
        t5_config, t5_to_hf, _build, t5_weights, bare="MT5Model", prefix="",
        architectures=("MT5Model", "MT5ForConditionalGeneration"), ignored=_T5_IGNORED,
    ),
    "bart": Family(
        bart_config, bart_to_hf, _build, bart_weights, bare="BartModel", prefix="model.",
        architectures=("BartModel", "BartForConditionalGeneration"),
        ignored=(r"(model\.)?shared\.weight", r"(model\.)?(en|de)coder\.version"),
    ),
    "whisper": Family(
        whisper_config, whisper_to_hf, _build, whisper_weights, bare="WhisperModel",
        prefix="model.", architectures=("WhisperModel", "WhisperForConditionalGeneration"),
    ),
}  # fmt: skip
