"""A small T5: an encoder and a decoder whose only notion of position is a learned bias.

As in Raffel et al., arXiv:1910.10683: RMSNorm before every sublayer, no bias vectors, ReLU
feed-forward, scores that are not scaled, tied embeddings, and for each stack one table of relative
position biases, (num_buckets, num_heads), that all its layers share. All attention is
`fastattn.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gettext_pairs import END, PAD, Batch
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn
from fastattn import Lengths, T5Bias
from fastattn.biases import Bias
from fastattn.masks import Mask

KeysValues = tuple[Tensor, Tensor]  # each (batch, seqlen, num_heads, head_dim)


@dataclass(frozen=True)
class Config:
    """Sizes of the model; positions are T5's own: 32 buckets up to a distance of 128."""

    vocab_size: int
    d_model: int = 128
    d_ff: int = 512
    num_heads: int = 8
    num_layers: int = 2
    num_buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.0


class Attention(nn.Module):
    """Multi-head attention of `x` to itself or to the encoder's output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config.d_model
        self.num_heads = config.num_heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(size, size, bias=False) for _ in range(4)
        )

    def keys_and_values(self, source: Tensor) -> KeysValues:
        """Each (batch, seqlen, num_heads, head_dim)."""
        k, v = (
            layer(source).unflatten(-1, (self.num_heads, -1)) for layer in (self.key, self.value)
        )
        return k, v

    def forward(
        self,
        x: Tensor,
        keys_and_values: KeysValues,
        mask: Mask | None,
        impl: str,
        causal: bool = False,
        bias: Bias | None = None,
    ) -> Tensor:
        q = self.query(x).unflatten(-1, (self.num_heads, -1))
        out = fastattn.attention(
            q, *keys_and_values, mask=mask, causal=causal, bias=bias, softmax_scale=1.0, impl=impl
        )
        assert isinstance(out, Tensor)
        return self.out(out.flatten(-2))


class FeedForward(nn.Module):
    """ReLU between two linear layers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wide = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.out = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(self.wide(x).relu()))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normalized before and added to what came in."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm, self.feed_forward_norm = norm(config), norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Mask, bias: Bias, impl: str) -> Tensor:
        normed = self.attention_norm(x)
        pairs = self.attention.keys_and_values(normed)
        x = x + self.dropout(self.attention(normed, pairs, mask, impl, bias=bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class DecoderLayer(EncoderLayer):
    """The same, causal, with attention to the encoder's output in between."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.cross = Attention(config)
        self.cross_norm = norm(config)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Mask | None,
        bias: Bias,
        impl: str,
        memory: KeysValues,
        cross_mask: Mask,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """The output, and the keys and values of `x` behind those of `past`."""
        normed = self.attention_norm(x)
        k, v = self.attention.keys_and_values(normed)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        x = x + self.dropout(self.attention(normed, (k, v), mask, impl, causal=True, bias=bias))
        x = x + self.dropout(self.cross(self.cross_norm(x), memory, cross_mask, impl))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), (k, v)


def norm(config: Config) -> nn.RMSNorm:
    """Root mean square normalization, T5's layer norm."""
    return nn.RMSNorm(config.d_model, eps=1e-6)


class T5Small(nn.Module):
    """English ids in, logits of the next German token out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        shape = (config.num_buckets, config.num_heads)
        self.encoder_table = nn.Parameter(torch.zeros(shape))
        self.decoder_table = nn.Parameter(torch.zeros(shape))
        layers = range(config.num_layers)
        # To type checkers a ModuleList is one of modules of any kind.
        self.encoder: Sequence[EncoderLayer] = nn.ModuleList(EncoderLayer(config) for _ in layers)  # type: ignore[assignment]
        self.decoder: Sequence[DecoderLayer] = nn.ModuleList(DecoderLayer(config) for _ in layers)  # type: ignore[assignment]
        self.encoder_norm, self.decoder_norm = norm(config), norm(config)
        self.dropout = nn.Dropout(config.dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and not name.endswith("table"):
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if name.endswith("query.weight"):  # in place of a scale on the scores
                with torch.no_grad():
                    parameter.mul_((config.d_model // config.num_heads) ** -0.5)

    def biases(self) -> tuple[T5Bias, T5Bias]:
        """The relative position biases of encoder and decoder."""
        distance = self.config.max_distance
        return (
            T5Bias(self.encoder_table, bidirectional=True, max_distance=distance),
            T5Bias(self.decoder_table, bidirectional=False, max_distance=distance),
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of unit scale; the weights are small, for the logits' sake."""
        return self.dropout(self.embedding(ids) * self.config.d_model**0.5)

    def encode(self, source: Tensor, lengths: Tensor, impl: str) -> Tensor:
        """The encoder's output (batch, seqlen, d_model)."""
        mask, bias = Lengths(lengths, seqlens_q=lengths), self.biases()[0]
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x, mask, bias, impl)
        return self.dropout(self.encoder_norm(x))

    def remember(self, encoded: Tensor) -> list[KeysValues]:
        """Keys and values of the encoder's output, for each layer of the decoder."""
        return [layer.cross.keys_and_values(encoded) for layer in self.decoder]

    def decode(
        self,
        inputs: Tensor,
        mask: Mask | None,
        memory: list[KeysValues],
        cross_mask: Mask,
        impl: str,
        past: list[KeysValues] | None = None,
    ) -> Tensor:
        """The decoder's output (batch, seqlen, d_model).

        Args:
            inputs: token ids (batch, seqlen), each the token before the one to predict.
            mask: lengths of `inputs`; None if there is no padding.
            memory: from `remember`.
            cross_mask: lengths of `inputs` and of the encoder's output.
            impl: the implementation of `fastattn.attention`.
            past: keys and values of the tokens before `inputs`, for each layer, brought up to date
                here; empty before the first. Causal masks and biases align the last query with the
                last key, so a new token finds its distances without being told where it stands.
        """
        bias = self.biases()[1]
        x = self.embed(inputs)
        new: list[KeysValues] = []
        for index, layer in enumerate(self.decoder):
            before = past[index] if past else None
            x, own = layer(x, mask, bias, impl, memory[index], cross_mask, before)
            new.append(own)
        if past is not None:
            past[:] = new
        return self.dropout(self.decoder_norm(x))

    def logits(self, decoded: Tensor) -> Tensor:
        """Scores of every token, (..., vocab_size), by the embeddings' own weights."""
        return F.linear(decoded, self.embedding.weight)

    def forward(self, batch: Batch, impl: str = "auto") -> Tensor:
        """Logits of the real target tokens, batch row after batch row: (tokens, vocab_size)."""
        memory = self.remember(self.encode(batch.source, batch.source_lengths, impl))
        mask = Lengths(batch.target_lengths, seqlens_q=batch.target_lengths)
        cross_mask = Lengths(batch.source_lengths)
        inputs = F.pad(batch.target[:, :-1], (1, 0), value=PAD)
        decoded = self.decode(inputs, mask, memory, cross_mask, impl)
        return self.logits(decoded[real_tokens(batch)])

    @torch.no_grad()
    def translate(
        self, source: Tensor, lengths: Tensor, max_tokens: int, impl: str = "auto"
    ) -> list[list[int]]:
        """Greedy translations, the likeliest token each time, without END.

        Args:
            source: token ids (batch, seqlen).
            lengths: (batch,) how many of them are real.
            max_tokens: where a translation is cut off that has not come to an end.
            impl: the implementation of `fastattn.attention`.
        """
        memory = self.remember(self.encode(source, lengths, impl))
        cross_mask = Lengths(lengths)
        past: list[KeysValues] = []
        token = source.new_full((len(source), 1), PAD)
        ended = torch.zeros_like(token, dtype=torch.bool)
        columns: list[Tensor] = []
        while len(columns) < max_tokens and not bool(ended.all()):
            decoded = self.decode(token, None, memory, cross_mask, impl, past)
            token = self.logits(decoded).argmax(-1)
            ended |= token == END
            columns.append(token.masked_fill(ended, END))
        rows = torch.cat(columns, 1).tolist() if columns else [[] for _ in source]
        return [row[: row.index(END)] if END in row else row for row in rows]


def real_tokens(batch: Batch) -> Tensor:
    """Which columns of the target are not padding: bool (batch, seqlen)."""
    position = torch.arange(batch.target.shape[1], device=batch.target.device)
    return position < batch.target_lengths[:, None]


def loss(model: T5Small, batch: Batch, impl: str = "auto") -> Tensor:
    """Mean cross entropy of a target token, in nats."""
    targets = batch.target[real_tokens(batch)]
    return F.cross_entropy(model(batch, impl), targets)


def make_optimizer(model: T5Small, rate: float, table_rate: float) -> torch.optim.Adam:
    """Adam, with a learning rate of their own for the relative position tables.

    They start at 0 and have to grow to the size of scores, further than any other weight.
    """
    tables = [model.encoder_table, model.decoder_table]
    others = [p for p in model.parameters() if all(p is not table for table in tables)]
    groups = [{"params": others, "lr": rate}, {"params": tables, "lr": table_rate}]
    return torch.optim.Adam(groups, betas=(0.9, 0.98))
