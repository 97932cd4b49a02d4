"""GPT-2, LLaMA, Qwen2 and Qwen3: one decoder, which reads from top to bottom.

    model = fastattn.models.load("SmolLM2-135M")
    logits = model(input_ids)                                     # training: gradients flow
    logits, session = model.start(input_ids, lengths, max_seqlen=512)
    logits = model.step(logits.argmax(-1, keepdim=True), session)  # one more token a row

Shapes in comments: B rows, N tokens of each, C channels, H heads of D channels, K key heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastattn.functional import attention
from fastattn.masks import Mask, Window
from fastattn.models import decoder_config as configs
from fastattn.models.checkpoint import Family
from fastattn.models.decoder_config import DecoderConfig, rope_frequencies
from fastattn.models.layers import (
    MLP,
    GatedMLP,
    Linear,
    RMSNorm,
    check_row_lengths,
    check_token_ids,
    find_lengths,
    linear,
    take_last,
    transposed_in_memory,
)
from fastattn.nn import KVCache
from fastattn.rotary import Rotary

STEP_ROOM = 16
"""Tokens that a row's room exceeds what was asked for: for the padding of a step."""

Turns = tuple[Tensor, Tensor]
"""Cosine and sine of positions, each (B or 1, N, 1, D), see `rotate`."""


class Attend(Protocol):
    """How a layer attends: all tokens at once, or through a cache. q (B, N, H, D) -> the same."""

    turns: Turns | None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def rotate(x: Tensor, turns: Turns) -> Tensor:
    """Rotates pairs (d, d + D / 2) of x (B, N, H, D), in float32 or better.

    With x = (a, b) in two halves: (a cos - b sin, b cos + a sin). The tables are as wide as a head,
    and the sine's first half is negated: what is left is x * cos + (b, a) * sin.
    """
    cos, sin = turns
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped heads; q, k and v are one linear layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.num_heads, config.num_heads_kv)
        inner = config.num_heads * config.head_dim
        rows = inner + 2 * config.num_heads_kv * config.head_dim
        self.qkv = Linear(config.hidden_size, rows, bias=config.qkv_bias)
        self.out = Linear(inner, config.hidden_size, bias=config.out_bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) -> q (B, N, H, D), k and v (B, N, K, D), rotated by `turns`."""
        heads, heads_kv = self.heads
        qkv = self.qkv(x).view(*x.shape[:2], -1, self.head_dim)  # (B, N, H + 2 K, D)
        qk, v = qkv.split_with_sizes((heads + heads_kv, heads_kv), 2)
        if self.qk_norm:
            q, k = qk.split_with_sizes(self.heads, 2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        if turns is not None:
            qk = rotate(qk, turns)
        q, k = qk.split_with_sizes(self.heads, 2)
        return q, k, v


class Block(nn.Module):
    """One layer: attention, then the MLP, each on its norm and added to what came in.

    Attributes:
        compiled: `before` and `after` by torch.compile, for steps of decoding; else None.
    """

    compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        mlp = GatedMLP if config.gated else MLP
        self.mlp = mlp(
            config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias
        )

    def forward(self, hidden: Tensor, attend: Attend, lengths: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); with `lengths` (B,), of the last tokens alone: (B, 1, C)."""
        before, after = Block.before, Block.after
        if self.compiled is not None and is_step(hidden):
            before, after = self.compiled
        out = attend(self.layer, *before(self, hidden, attend.turns))
        if lengths is not None:
            hidden, out = (take_last(x, lengths)[:, None] for x in (hidden, out))
        return after(self, hidden, out)

    def before(self, hidden: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor, Tensor]:
        """Up to what attends: (B, N, C) -> q (B, N, H, D), k and v (B, N, K, D)."""
        return self.attention.project(self.attention_norm(hidden), turns)

    def after(self, hidden: Tensor, out: Tensor) -> Tensor:
        """From what was attended, (B, N, H, D), on: (B, N, C) -> (B, N, C)."""
        hidden = hidden + self.attention.out(out.flatten(2))
        return hidden + self.mlp(self.mlp_norm(hidden))


def is_step(hidden: Tensor) -> bool:
    """Whether hidden (B, N, C) is of what `Decoder.compile` is for."""
    batch, seqlen = hidden.shape[:2]
    return seqlen == 1 and (hidden.device.type != "cpu" or batch == 1)


def make_norm(config: DecoderConfig) -> nn.Module:
    """A norm over the channels."""
    kind = RMSNorm if config.rms_norm else nn.LayerNorm
    return kind(config.hidden_size, config.norm_eps)


class Decoder(nn.Module):
    """A decoder with a head over tokens, over classes, or without one (see `config.head`).

    Implements `fastattn.models.protocol.GenerativeModel` where its head is over tokens.

    Args:
        config: sizes and options. Weights are torch's defaults (`layers.initialize` draws others).

    Attributes:
        impl: of attention, as for `fastattn.attention`; may be set at any time.
    """

    is_encoder_decoder = False
    start_token = None
    impl = "auto"

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
        self.eos_tokens, self.pad_token = config.eos_tokens, config.pad_token
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.head == "tokens" and config.tied:  # the head's matrix too
            self.embedding.weight = transposed_in_memory(self.embedding.weight)
        if config.rope is None:
            self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        if config.head == "classes":
            self.head = Linear(config.hidden_size, len(config.labels), bias=False)
        elif config.head == "tokens" and not config.tied:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        windows = [config.window(layer) for layer in range(config.num_layers)]
        self.masks = [None if window is None else Window(window - 1, 0) for window in windows]
        self.softmax_scales = [config.softmax_scale(layer) for layer in range(config.num_layers)]
        self._tables: dict[torch.device, Turns] = {}

    def forward(
        self, input_ids: Tensor, lengths: Tensor | None = None, *, hidden_states: bool = False
    ) -> Any:
        """All tokens at once; gradients flow.

        Args:
            input_ids: int64 (B, N), padded on the right.
            lengths: int64 (B,), real tokens of each row; None: all. A classifier without lengths
                goes by the last token that is not the pad token, where the config names one.
            hidden_states: give the hidden states too.

        Returns:
            Logits (B, N, vocab_size); of a classifier (B, number of labels), those of the last real
            token; without a head the last hidden states (B, N, C). What stands at padding means
            nothing. With `hidden_states` also a tuple of num_layers + 1 tensors (B, N, C): the
            embedding, and what each layer gave, the last one after the norm.

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        check_token_ids("input_ids", input_ids, self.vocab_size, self.max_positions)
        check_row_lengths("lengths", lengths, input_ids)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        attend = AttendAll(self, self._turns(places, input_ids.shape[1]))
        hidden = self._embed(input_ids, places)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, attend)
            states.append(hidden)
        states[-1] = hidden = self.norm(hidden)
        if self.config.head == "classes":
            if lengths is None and self.pad_token is not None:
                lengths = find_lengths(input_ids, self.pad_token)
            hidden = take_last(hidden, lengths)
        result = self._apply_head(hidden)
        return (result, tuple(states)) if hidden_states else result

    @torch.no_grad()
    def start(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        max_seqlen: int,
        copies: int = 1,
        decoder_input_ids: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
    ) -> tuple[Tensor, DecoderSession]:
        """Computes prompts once: see `GenerativeModel.start`.

        Raises:
            TypeError, ValueError: an argument is not as described, or a row of `max_seqlen` tokens
                is longer than `max_positions` or shorter than its prompt.
        """
        if self.config.head != "tokens":
            raise ValueError(
                f"only a head over tokens can generate, not {self.config.architecture}"
            )
        if decoder_input_ids is not None or decoder_lengths is not None:
            raise ValueError("decoder_input_ids and decoder_lengths must be None for a decoder")
        check_token_ids("input_ids", input_ids, self.vocab_size, self.max_positions)
        check_row_lengths("lengths", lengths, input_ids)
        batch, seqlen = input_ids.shape
        if not seqlen <= max_seqlen <= self.max_positions:
            raise ValueError(
                f"max_seqlen must lie in {seqlen}..{self.max_positions}, from the prompts' length "
                f"to the positions that the model has, got {max_seqlen}"
            )
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        session = DecoderSession(self, batch * copies, max_seqlen)
        counts = [seqlen] * batch if lengths is None else lengths.tolist()
        logits = self._append(input_ids, session, counts, rows=range(batch))
        if copies > 1:  # a row's copies stand next to it
            session.reorder([row // copies for row in range(batch * copies)])
            logits = logits.repeat_interleave(copies, 0)
        return logits, session

    @torch.no_grad()
    def step(
        self,
        tokens: Tensor,
        session: DecoderSession,
        counts: Sequence[int] | None = None,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Appends tokens to every row: see `GenerativeModel.step`.

        Raises:
            TypeError, ValueError: an argument is not as described, or a row has no room.
        """
        check_token_ids("tokens", tokens, self.vocab_size)
        rows, n = tokens.shape
        if rows != session.cache.max_batch:
            raise ValueError(
                f"tokens must have a row for each of the session, {session.cache.max_batch}, got "
                f"{rows}"
            )
        if counts is not None and (len(counts) != rows or not 0 <= min(counts) <= max(counts) <= n):
            raise ValueError(f"counts must be {rows} numbers in 0..{n}, got {list(counts)}")
        return self._append(tokens, session, counts, all_logits=all_logits)

    def _append(
        self,
        tokens: Tensor,
        session: DecoderSession,
        counts: Sequence[int] | None,
        *,
        rows: range | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Logits after the last real token of each row, or after each token."""
        n = tokens.shape[1]
        attend = session.attend(n, rows)
        hidden = self._embed(tokens, attend.places)
        lengths = None
        if not all_logits and n > 1:
            ends = [n] * tokens.shape[0] if counts is None else counts
            lengths = torch.tensor(ends, device=tokens.device)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, attend)
        hidden = self.norm(self.layers[-1](hidden, attend, lengths))
        if not session.is_capturing():  # what is captured runs nothing: its replays will count
            session.cache.advance(n if counts is None else counts, rows=rows)
        return self._apply_head(hidden if all_logits else hidden[:, 0])

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Has torch.compile fuse what layers do around attention, for steps of decoding.

        All layers share what is compiled at the first step, which takes seconds. Attention, prompts
        and training run as before. On a CPU it is for steps of one row, and float32 weights, laid
        out anew for it, are then read as fast as memory is. `options` are those of `torch.compile`.
        """
        before, after = (
            torch.compile(half, fullgraph=True, **options) for half in (Block.before, Block.after)
        )
        for layer in self.layers:
            assert isinstance(layer, Block)
            layer.compiled = (before, after)
            for part in layer.modules():
                if isinstance(part, Linear):
                    part.weight.data = part.weight.data.contiguous()

    def _embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        if self.config.rope is not None:
            return hidden
        return hidden + self.positions(places.clamp(max=self.max_positions - 1))  # padding behind

    def _apply_head(self, hidden: Tensor) -> Tensor:
        if self.config.head is None:
            return hidden
        tied = self.config.head == "tokens" and self.config.tied
        return linear(hidden, self.embedding.weight if tied else self.head.weight)

    def _turns(self, places: Tensor, end: int) -> Turns | None:
        """Tables at `places` (B, N), all of which lie below `end`."""
        if self.config.rope is None:
            return None
        cos, sin = self.tables(end)
        return cos[places][:, :, None], sin[places][:, :, None]

    def tables(self, length: int) -> Turns:
        """Cosine and sine of positions 0 to `length` - 1 or more, float32 (positions, D)."""
        assert self.config.rope is not None  # learned positions have no tables
        device = self.embedding.weight.device
        found = self._tables.get(device)
        if found is None or found[0].shape[0] < length:
            size = max(256, 1 << (length - 1).bit_length())
            speeds, factor = rope_frequencies(
                self.config.rope, self.config.head_dim, self.max_positions
            )
            # In float64: in float32 the angle of a far position is off by some 1e-3.
            angles = (
                torch.arange(size, dtype=torch.float64, device="cpu")[:, None] * speeds.double()
            )
            cos, sin = angles.cos() * factor, angles.sin() * factor
            wide = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
            found = self._tables[device] = (wide[0].float().to(device), wide[1].float().to(device))
        return found


class AttendAll:
    """Every token attends to those before it in its row. Padding stands behind them."""

    def __init__(self, model: Decoder, turns: Turns | None) -> None:
        self.model, self.turns = model, turns

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.model.masks[layer]
        out = attention(
            q, k, v, causal=mask is None, mask=mask,
            softmax_scale=self.model.softmax_scales[layer], impl=self.model.impl,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # the log-sum-exp was not asked for
        return out


class AttendCached:
    """New tokens attend to a cache, which they are appended to.

    On a GPU the cache rotates in its kernel; on the CPU it is done once for q and k together.
    """

    def __init__(self, session: DecoderSession, n: int, rows: range | None) -> None:
        model, cache = session.model, session.cache
        self.model, self.cache, self.rows, self.single = model, cache, rows, n == 1
        self.turns: Turns | None = None
        self.rotary = session.rotary
        lengths = cache.lengths if rows is None else [cache.lengths[row] for row in rows]
        end = max(lengths) + n
        if cache.device.type == "cpu" and end - n == min(lengths):
            self.places = torch.arange(end - n, end)[None]
            if model.config.rope is not None:  # a view of the tables, without an index
                cos, sin = model.tables(end)
                self.turns = cos[None, end - n : end, None], sin[None, end - n : end, None]
            return
        # A captured graph reads the lengths of the moment it is replayed.
        seqlens = cache.seqlens if rows is None else cache.seqlens[: len(rows)]
        self.places = seqlens[:, None] + torch.arange(n, device=cache.device)
        if self.rotary is None:
            self.turns = model._turns(self.places, end)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask: Mask | None = self.model.masks[layer]
        # A single token sees all that is there: no mask is needed.
        out = self.cache.attention(
            layer, q, k, v, causal=mask is None and not self.single, mask=mask,
            softmax_scale=self.model.softmax_scales[layer], rotary=self.rotary,
            rows=self.rows, impl=self.model.impl,
        )  # fmt: skip
        assert isinstance(out, Tensor)  # the log-sum-exp was not asked for
        return out


class DecoderSession:
    """Rows that a decoder is decoding, over a contiguous cache: see `fastattn.models.protocol`.

    Attributes:
        cache: keys and values of all layers, with room for `max_seqlen` tokens and a step.
        rotary: tables for all positions of the cache, on a GPU; else None.
        replayable: a step of one token can be captured in a CUDA graph, and `cache` be advanced
            with `replayed=True` after each replay.
    """

    replayable = True

    def __init__(self, model: Decoder, rows: int, max_seqlen: int) -> None:
        config, weight = model.config, model.embedding.weight
        self.model = model
        self.cache = KVCache(
            config.num_layers, rows, max_seqlen + STEP_ROOM, config.num_heads_kv, config.head_dim,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip
        self.rotary: Rotary | None = None
        if config.rope is not None:
            cos, sin = model.tables(self.cache.max_seqlen)
            half = config.head_dim // 2
            if weight.device.type != "cpu":
                self.rotary = Rotary(cos[:, half:].contiguous(), sin[:, half:].contiguous())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return self.cache.lengths

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes what row `rows[b]` was."""
        self.cache.reorder(rows)

    def rollback(self, counts: Sequence[int]) -> None:
        """Row b forgets its last `counts[b]` tokens."""
        self.cache.rollback(counts)

    def is_capturing(self) -> bool:
        """Whether a CUDA graph of a step is being captured, which replays over `cache`."""
        return self.cache.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def attend(self, n: int, rows: range | None) -> AttendCached:
        """How the layers attend when `n` tokens are appended to `rows` (None: all)."""
        return AttendCached(self, n, rows)


def _build(config: DecoderConfig, architecture: str) -> Decoder:
    return Decoder(config)


def _llama_family(name: str) -> Family:
    return Family(
        config=configs.read_llama,
        to_hf=configs.write_llama,
        build=_build,
        weights=configs.llama_weights,
        bare=f"{name}Model",
        prefix="model.",
        architectures=(f"{name}Model", f"{name}ForCausalLM", f"{name}ForSequenceClassification"),
        ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    )


FAMILIES = {
    "gpt2": Family(
        config=configs.read_gpt2,
        to_hf=configs.write_gpt2,
        build=_build,
        weights=configs.gpt2_weights,
        bare="GPT2Model",
        prefix="transformer.",
        architectures=("GPT2Model", "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    ),
    "llama": _llama_family("Llama"),
    "qwen2": _llama_family("Qwen2"),
    "qwen3": _llama_family("Qwen3"),
}
