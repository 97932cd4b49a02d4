"""BERT, RoBERTa, ALBERT, DistilBERT and ELECTRA in one model, which padding never enters.

    model = load("path/to/a/sentence/model")            # fastattn.models.checkpoint
    vectors = model.embed(input_ids, attention_mask, pooling="mean")

    output = model(input_ids, attention_mask)
    output.last_hidden_state        # (batch, seqlen, hidden_size), 0 at padding
    output.packed                   # (total_tokens, hidden_size): what was computed

The tokens of a padded batch are laid end to end before the embedding, and everything after it works
on (total_tokens, features): linear layers and norms know nothing of sequences, and attention takes
`fastattn.Packed`. The families differ in their `EncoderConfig` alone; their heads are in
`encoder_heads.py`.

From the papers: BERT arXiv:1810.04805, RoBERTa arXiv:1907.11692, ALBERT arXiv:1909.11942,
DistilBERT arXiv:1910.01108, ELECTRA arXiv:2003.10555.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastattn
from fastattn.models import encoder_weights
from fastattn.models.checkpoint import CheckpointError, Family, Weight
from fastattn.models.encoder_config import POOLINGS, EncoderConfig, read_config, write_config
from fastattn.models.layers import MLP, check_token_ids
from fastattn.validation import check_tensor, describe, values_readable


@dataclass(frozen=True)
class Packing:
    """Which places of a padded batch hold tokens.

    Attributes:
        batch, seqlen: shape of the padded batch.
        lengths: tokens of each row, each at least 1.
        places: int64 (total,), the places of the tokens in the flattened batch, in order; None
            where all of them hold tokens.
        starts: int64 (batch,), where each row starts among the packed tokens.
        mask: for attention on packed tokens; None where there is no padding.
    """

    batch: int
    seqlen: int
    lengths: tuple[int, ...]
    places: Tensor | None
    starts: Tensor
    mask: fastattn.Packed | None

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seqlen, ...) -> (total, ...)."""
        flat = x.reshape(self.batch * self.seqlen, *x.shape[2:])
        return flat if self.places is None else flat[self.places]

    def pad(self, x: Tensor, value: float = 0.0) -> Tensor:
        """(total, ...) -> (batch, seqlen, ...), with `value` at padding."""
        if self.places is not None:
            padded = x.new_full((self.batch * self.seqlen, *x.shape[1:]), value)
            x = padded.index_copy_(0, self.places, x)
        return x.reshape(self.batch, self.seqlen, *x.shape[1:])


def make_packing(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
) -> Packing:
    """Where the tokens of a padded batch are.

    A mask, or lengths on a GPU, are read on the host once, which waits for the device.

    Args:
        input_ids: (batch, seqlen).
        attention_mask: bool or integer (batch, seqlen), not 0 where there is a token; may have
            holes, or padding on the left.
        lengths: instead, of rows that are padded on the right: integers (batch,).

    Raises:
        TypeError, ValueError: arguments are not as described, or a row has no token.
    """
    batch, seqlen = input_ids.shape
    device = input_ids.device
    visible, counts = None, [seqlen] * batch
    if attention_mask is not None:
        if lengths is not None:
            raise ValueError("attention_mask and lengths say the same: give one of them, got both")
        visible = _check_mask(attention_mask, input_ids) != 0
        counts = visible.sum(1).tolist()
    elif lengths is not None:
        counts = _check_lengths(lengths, input_ids)
    if 0 in counts:
        raise ValueError(
            "attention_mask must have a token in every row, got none in row "
            f"{counts.index(0)} of {batch}"
        )
    total = sum(counts)
    ends = list(itertools.accumulate(counts, initial=0))
    cu_seqlens = torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)
    starts = cu_seqlens[:-1].long()
    if total == batch * seqlen:
        return Packing(batch, seqlen, tuple(counts), None, starts, None)
    if visible is None:
        columns = torch.arange(seqlen, device=device)
        visible = columns < cu_seqlens.diff()[:, None]
    # The number of places is known: nothing needs to wait for the device to count them.
    places = torch.nonzero_static(visible.flatten(), size=total).squeeze(-1)
    mask = fastattn.Packed(cu_seqlens, max_seqlen_q=max(counts))
    return Packing(batch, seqlen, tuple(counts), places, starts, mask)


def _check_mask(mask: Tensor, input_ids: Tensor) -> Tensor:
    check_tensor("attention_mask", mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            "attention_mask must be bool or integer, not 0 where there is a token, got "
            f"{describe(mask)}"
        )
    if mask.shape != input_ids.shape or mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask must be like input_ids, {describe(input_ids)}, got {describe(mask)}"
        )
    return mask


def _check_lengths(lengths: Tensor | Sequence[int], input_ids: Tensor) -> list[int]:
    batch, seqlen = input_ids.shape
    counts = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if not isinstance(counts, list) or len(counts) != batch:
        raise ValueError(f"lengths must be {batch} integers, one a row, got {lengths!r}")
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"lengths must be {batch} integers, one a row, got {lengths!r}")
        if not 1 <= count <= seqlen:
            raise ValueError(f"lengths must lie in 1..{seqlen}, the tokens of a row, got {count}")
    return counts


@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder computes.

    Attributes:
        packed: (total, hidden_size), all tokens of all rows end to end, without padding.
        packing: where these belong in the padded batch.
        pooler_output: (batch, hidden_size); None if the model has no pooler.
        packed_states: `packed` after the embeddings and after each layer, if asked for.
    """

    packed: Tensor
    packing: Packing
    pooler_output: Tensor | None = None
    packed_states: tuple[Tensor, ...] | None = None

    @property
    def last_hidden_state(self) -> Tensor:
        """(batch, seqlen, hidden_size), 0 at padding."""
        return self.packing.pad(self.packed)

    @property
    def hidden_states(self) -> tuple[Tensor, ...] | None:
        """After the embeddings and after each layer, padded with 0, if asked for."""
        if self.packed_states is None:
            return None
        return tuple(self.packing.pad(state) for state in self.packed_states)

    def pool(self, pooling: str) -> Tensor:
        """One vector a row, (batch, hidden_size).

        Args:
            pooling: "first" token of the row, "mean" of its tokens, or the output of the "pooler".
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
        if pooling == "first":
            return self.packed[self.packing.starts]
        if pooling == "mean":
            # From the padded form, since sums by index have no fixed order on a GPU.
            lengths = torch.tensor(self.packing.lengths, device=self.packed.device)
            wide = torch.promote_types(self.packed.dtype, torch.float32)
            sums = self.last_hidden_state.sum(1, dtype=wide)
            return (sums / lengths[:, None]).to(self.packed.dtype)
        if self.pooler_output is None:
            raise ValueError('pooling="pooler" needs a model with a pooler: this one has none')
        return self.pooler_output


class Embeddings(nn.Module):
    """Word + token type + position, normed, and led to the size of the layers where it differs."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size, pad = config.embedded_size, config.pad_token
        self.word = nn.Embedding(config.vocab_size, size, padding_idx=pad)
        self.token_type = nn.Embedding(config.token_types, size) if config.token_types else None
        self.position = nn.Embedding(
            config.max_positions, size, padding_idx=pad if config.counts_tokens else None
        )
        self.norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.projection = nn.Linear(size, config.hidden_size) if config.projected else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.config = config

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, packing: Packing) -> Tensor:
        """Two of (batch, seqlen) -> (total, hidden_size)."""
        x = self.word(packing.pack(input_ids))  # (total, embedded_size), as all that follows
        if self.token_type is not None:
            if token_type_ids is None:
                x = x + self.token_type.weight[0]
            else:
                x = x + self.token_type(packing.pack(token_type_ids))
        x = x + self.position(packing.pack(self.positions(input_ids)))
        x = self.dropout(self.norm(x))
        return x if self.projection is None else self.projection(x)

    def positions(self, input_ids: Tensor) -> Tensor:
        """Rows of the table of positions, (batch, seqlen): columns, or counts of tokens."""
        pad = self.config.pad_token
        if not self.config.counts_tokens or pad is None:
            return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        token = input_ids.ne(pad)
        return token.cumsum(1) * token + pad


class SelfAttention(nn.Module):
    """Every token attends to all tokens of its own row."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        self.heads = (3, config.num_heads, config.head_dim)
        self.dropout_p = config.attention_dropout

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(total, hidden_size) -> (total, hidden_size)."""
        qkv = self.qkv(x).unflatten(-1, self.heads)  # (total, 3, num_heads, head_dim)
        if packing.mask is None:  # (batch, seqlen, 3, num_heads, head_dim)
            qkv = qkv.unflatten(0, (packing.batch, packing.seqlen))
        q, k, v = qkv.unbind(-3)
        dropout_p = self.dropout_p if self.training else 0.0
        out = fastattn.attention(q, k, v, mask=packing.mask, dropout_p=dropout_p)
        assert isinstance(out, Tensor)  # it returns a pair only with return_lse
        return self.out(out.reshape(x.shape))


class EncoderLayer(nn.Module):
    """Attention and an MLP, each added to what it reads and normed, after it or before it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.mlp = MLP(size, config.intermediate_size, config.activation)
        self.mlp_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        # ALBERT has none behind its MLP.
        self.mlp_dropout = nn.Dropout(0.0 if config.model_type == "albert" else self.dropout.p)
        self.pre_norm = config.pre_norm

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """(total, hidden_size) -> (total, hidden_size)."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), packing))
            return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, packing)))
        return self.mlp_norm(x + self.mlp_dropout(self.mlp(x)))


class Encoder(nn.Module):
    """An encoder of the BERT family, as its config says.

    Args:
        config: sizes and options.
        pooler: whether to have a pooler; default as the config says.
    """

    def __init__(self, config: EncoderConfig, pooler: bool | None = None) -> None:
        super().__init__()
        bare = encoder_weights.NAMES[config.model_type].architectures[0]
        self.config = replace(config, architecture=bare)
        self.embeddings = Embeddings(config)
        # Fewer than are run, where layers share weights.
        self.layers = nn.ModuleList(
            EncoderLayer(config) for _ in range(max(config.layer_order) + 1)
        )
        size = config.hidden_size
        self.final_norm = nn.LayerNorm(size, eps=config.norm_eps) if config.pre_norm else None
        self.pooler: nn.Linear | None = None
        if config.pooler if pooler is None else pooler:
            self.pooler = nn.Linear(size, size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encodes a padded batch.

        Args:
            input_ids: int64 or int32 (batch, seqlen), both at least 1, seqlen at most
                `config.max_seqlen`. What stands at padding means nothing (but must be a token).
            attention_mask: bool or integer (batch, seqlen), not 0 where there is a token, at least
                one a row; None: everywhere. Padding may be anywhere.
            token_type_ids: like input_ids, below `config.token_types`; None: all 0.
            lengths: instead of a mask: tokens of each row, the rest of it is padding.
            hidden_states: keep what each layer gives.

        Raises:
            TypeError, ValueError: an argument is not as described. On a GPU the values of token ids
                and types are looked at only within `fastattn.testing.debug()`.
        """
        config = self.config
        check_token_ids("input_ids", input_ids, config.vocab_size, config.max_seqlen)
        if token_type_ids is not None:
            self._check_token_types(token_type_ids, input_ids)
        packing = make_packing(input_ids, attention_mask, lengths)
        x = self.embeddings(input_ids, token_type_ids, packing)  # (total, hidden_size) from here on
        states = [x]
        for index in config.layer_order:
            x = self.layers[index](x, packing)
            if hidden_states:
                states.append(x)
        if self.final_norm is not None:
            x = self.final_norm(x)
            states[-1] = x
        pooled = None
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(x[packing.starts]))  # (batch, hidden_size)
        return EncoderOutput(x, packing, pooled, tuple(states) if hidden_states else None)

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        pooling: str = "mean",
        normalize: bool = True,
    ) -> Tensor:
        """One vector a row, (batch, hidden_size): sentence embeddings.

        Args:
            input_ids, attention_mask, token_type_ids, lengths: as in `forward`.
            pooling: "first", "mean" or "pooler", see `EncoderOutput.pool`.
            normalize: to length 1.
        """
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {POOLINGS}, got {pooling!r}")
        output = self(input_ids, attention_mask, token_type_ids, lengths=lengths)
        vectors = output.pool(pooling)
        return functional.normalize(vectors, dim=-1) if normalize else vectors

    def _check_token_types(self, token_type_ids: Tensor, input_ids: Tensor) -> None:
        types = self.config.token_types
        check_tensor("token_type_ids", token_type_ids)
        if types == 0:
            raise ValueError(
                f"token_type_ids must be None: a {self.config.model_type} model has no token "
                f"types, got {describe(token_type_ids)}"
            )
        if token_type_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"token_type_ids must be int32 or int64, got {describe(token_type_ids)}"
            )
        if token_type_ids.shape != input_ids.shape or token_type_ids.device != input_ids.device:
            raise ValueError(
                f"token_type_ids must be like input_ids, {describe(input_ids)}, got "
                f"{describe(token_type_ids)}"
            )
        if values_readable(token_type_ids):
            low, high = (int(x) for x in token_type_ids.aminmax())
            if low < 0 or high >= types:
                raise ValueError(f"token_type_ids must lie in 0..{types - 1}, got {low}..{high}")


def build(config: EncoderConfig, architecture: str) -> nn.Module:
    """An encoder with the head of an architecture such as "BertForMaskedLM", or alone.

    Raises:
        CheckpointError: the family has no such architecture, or the config does not suit it.
    """
    from fastattn.models.encoder_heads import find_class  # which is built upon this module

    head = find_class(config, architecture)
    try:
        return Encoder(config) if head is None else head(config)
    except ValueError as error:
        raise CheckpointError(f"{architecture}: {error}") from error


def _weights(config: EncoderConfig, architecture: str) -> list[Weight]:
    with torch.device("meta"):
        parameters = dict(build(config, architecture).named_parameters())
    return encoder_weights.find_weights(config, architecture, parameters)


FAMILIES = {
    model_type: Family(
        config=read_config,
        to_hf=write_config,
        build=build,
        weights=_weights,
        bare=names.architectures[0],
        prefix=names.prefix,
        architectures=names.architectures,
        ignored=names.ignored,
    )
    for model_type, names in encoder_weights.NAMES.items()
}
