"""What goes into and comes out of an encoder-decoder: batches without their padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.masks import Packed
from fastattn.models.layers import check_row_lengths
from fastattn.validation import check_tensor, describe


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the real tokens of a padded batch lie: sequences end to end, without padding.

    Attributes:
        lengths: of the sequences, on the host.
        seqlen: of the padded batch.
        cu_seqlens: int32 (batch + 1,): 0, then where each sequence ends.
        places: int64 (tokens,), of each token in the flattened padded batch; None: nothing is
            padded.
        positions: int64 (tokens,), of each token in its sequence.
    """

    lengths: tuple[int, ...]
    seqlen: int
    cu_seqlens: Tensor
    places: Tensor | None
    positions: Tensor

    @staticmethod
    def of(padded: Tensor, lengths: Tensor | None = None) -> Packing:
        """Of a batch (batch, seqlen, ...), padded on the right.

        Args:
            lengths: (batch,), real tokens of each row; None: all. On a GPU they are read, for which
                the host waits: once for a prompt.
        """
        (batch, seqlen), device = padded.shape[:2], padded.device
        real = (seqlen,) * batch if lengths is None else tuple(lengths.tolist())
        column = torch.arange(seqlen, device=device)
        ends = torch.tensor((0, *real), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        if min(real) == seqlen:
            return Packing(real, seqlen, ends.to(device), None, column.repeat(batch))
        row, position = (column < torch.tensor(real, device=device)[:, None]).nonzero().unbind(1)
        return Packing(real, seqlen, ends.to(device), row * seqlen + position, position)

    def pack(self, x: Tensor) -> Tensor:
        """(batch, seqlen, ...) -> (tokens, ...)."""
        flat = x.flatten(0, 1)
        return flat if self.places is None else flat[self.places]

    def pad(self, x: Tensor) -> Tensor:
        """(tokens, ...) -> (batch, seqlen, ...), 0 in between."""
        shape = (len(self.lengths), self.seqlen)
        if self.places is None:
            return x.unflatten(0, shape)
        flat = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
        return flat.index_copy(0, self.places, x).unflatten(0, shape)

    def mask(self, keys: Packing | None = None) -> Packed:
        """Each sequence attends to its own, or to its one of `keys`."""
        keys = self if keys is None else keys
        return Packed(self.cu_seqlens, keys.cu_seqlens, max(self.lengths), max(keys.lengths))


@dataclass(frozen=True, eq=False)
class Encoded:
    """What an encoder made of a batch, or states that another one made.

    Attributes:
        states: (tokens, dim), packed.
        packing: where they belong.
        hidden_states: packed embeddings and outputs of the layers, where they were asked for.
    """

    states: Tensor
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None = None

    @staticmethod
    def from_states(states: Tensor, lengths: Tensor | None = None) -> Encoded:
        """From padded states (batch, seqlen, dim), and how many of each row are real."""
        check_tensor("states", states)
        if states.dim() != 3 or states.numel() == 0:
            raise ValueError(f"states must be (batch, seqlen, dim), got {describe(states)}")
        check_row_lengths("lengths", lengths, states)
        packing = Packing.of(states, lengths)
        return Encoded(packing.pack(states), packing)

    def padded(self) -> Tensor:
        """(batch, seqlen, dim), 0 where there is padding."""
        return self.packing.pad(self.states)


@dataclass(frozen=True, eq=False)
class Seq2SeqOutput:
    """What `Seq2Seq` gives; 0 at padding.

    Attributes:
        logits: (batch, seqlen, vocab_size) of the decoder's tokens; None without a head.
        states: (batch, seqlen, dim), the decoder's last hidden states.
        encoded: what the encoder made.
        hidden_states: (batch, seqlen, dim) each: the decoder's embeddings and outputs of its
            layers, where they were asked for.
        encoder_hidden_states: the same of the encoder.
    """

    logits: Tensor | None
    states: Tensor
    encoded: Encoded
    hidden_states: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
