"""What a model must have for `fastattn.generation` to decode it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Session(Protocol):
    """Rows that are being decoded: their caches, whatever these hold.

    Attributes:
        lengths: tokens of each row that are in the cache, prompt included, as the host knows them.
    """

    @property
    def lengths(self) -> tuple[int, ...]: ...

    def reorder(self, rows: Sequence[int]) -> None:
        """Row b becomes what row `rows[b]` was: as many rows as before."""

    def rollback(self, counts: Sequence[int]) -> None:
        """Row b forgets its last `counts[b]` tokens."""


class GenerativeModel(Protocol):
    """A decoder, or an encoder with a decoder.

    Attributes:
        vocab_size: tokens that there are logits for.
        max_positions: tokens that a row of the decoder can hold; None where nothing limits it.
        is_encoder_decoder: whether the prompt goes to an encoder.
        start_token: with which rows of an encoder-decoder start, else None.
        eos_tokens: which end a sequence, by the checkpoint; may be empty.
        pad_token: of the checkpoint, None without.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int | None: ...

    @property
    def is_encoder_decoder(self) -> bool: ...

    @property
    def start_token(self) -> int | None: ...

    @property
    def eos_tokens(self) -> tuple[int, ...]: ...

    @property
    def pad_token(self) -> int | None: ...

    def start(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        max_seqlen: int,
        copies: int = 1,
        decoder_input_ids: Tensor | None = None,
        decoder_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Session]:
        """Computes prompts once.

        Args:
            input_ids: int64 (batch, seqlen), padded on the right: of a decoder the prompts, of an
                encoder-decoder what the encoder reads.
            lengths: int64 (batch,), real tokens of each row, at least 1; None: all.
            max_seqlen: tokens for which a row of the decoder gets room.
            copies: rows for each prompt, next to each other, which share what they can.
            decoder_input_ids, decoder_lengths: prompts of an encoder-decoder's decoder, padded on
                the right; None: `start_token` alone. Must be None for a decoder.

        Returns:
            Logits (batch * copies, vocab_size) after the last real token of each row, and the rows.
        """
        ...

    def step(
        self,
        tokens: Tensor,
        session: Session,
        counts: Sequence[int] | None = None,
        *,
        all_logits: bool = False,
    ) -> Tensor:
        """Appends tokens to every row.

        Args:
            tokens: int64 (rows, n), padded on the right where `counts` says so.
            counts: real tokens of each row, 0 to n (0: the row stays as it is, its logits mean
                nothing); None: n.
            all_logits: give the logits after each token, and not only after the last.

        Returns:
            Logits (rows, vocab_size), or with `all_logits` (rows, n, vocab_size).
        """
        ...
