"""Heads on an encoder: from packed tokens to logits. Which one, its architecture's name says.

    model = load("path/to/a/BertForQuestionAnswering")  # fastattn.models.checkpoint
    start, end = model(input_ids, attention_mask, token_type_ids)
    span = best_span(start, end, mask=token_type_ids == 1, max_length=30)

Every head is called as `Encoder.forward` is, and works on tokens that are not padding. Losses are
left to the caller: logits go to torch's functions as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastattn.models.encoder import Encoder, EncoderOutput
from fastattn.models.encoder_config import EncoderConfig
from fastattn.models.encoder_weights import NAMES, find_head
from fastattn.models.layers import find_activation
from fastattn.validation import check_tensor, describe, values_readable


class Head(nn.Module):
    """An encoder, and what a subclass makes of its output."""

    ending = ""  # of the architecture's name
    uses_pooler = False

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        architecture = NAMES[config.model_type].name + self.ending
        find_head(config, architecture)
        self.config = config = replace(config, architecture=architecture)
        self.encoder = Encoder(config, pooler=self.needs_pooler(config))

    @classmethod
    def needs_pooler(cls, config: EncoderConfig) -> bool:
        """Whether the head reads the pooler's output."""
        return cls.uses_pooler

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        lengths: Tensor | Sequence[int] | None,
    ) -> EncoderOutput:
        """The encoder's output, for `forward`."""
        return self.encoder(input_ids, attention_mask, token_type_ids, lengths=lengths)


class TokenScores(nn.Module):
    """Logits of the vocabulary: decoder(norm(activation(dense(x)))) + bias.

    A tied decoder is the encoder's table of embeddings, and only the bias is the head's own.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size = config.embedded_size
        self.dense = nn.Linear(config.hidden_size, size)
        self.activation = find_activation(config.masked_lm_activation or config.activation)
        self.norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.weight: Tensor | None
        own = None if config.tied else nn.Parameter(torch.zeros(config.vocab_size, size))
        self.register_parameter("weight", own)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, encoder: Encoder) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)."""
        x = self.norm(self.activation(self.dense(x)))  # (..., embedded_size)
        weight = encoder.embeddings.word.weight if self.weight is None else self.weight
        return functional.linear(x, weight, self.bias)


class MaskedLM(Head):
    """Which token stands at a place: BertForMaskedLM and its like, ELECTRA's generator."""

    ending = "ForMaskedLM"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tokens = TokenScores(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        select: Tensor | None = None,
    ) -> Tensor:
        """Logits (batch, seqlen, vocab_size), 0 at padding.

        Args:
            input_ids, attention_mask, token_type_ids, lengths: as in `Encoder.forward`.
            select: bool (batch, seqlen), tokens whose logits are wanted, such as those that are
                masked: only they are computed, (selected, vocab_size) in the order of
                `input_ids[select]`.
        """
        if select is not None:
            _check_mask("select", select, input_ids.shape, input_ids.device)
        output = self.encode(input_ids, attention_mask, token_type_ids, lengths)
        if select is None:
            return output.packing.pad(self.tokens(output.packed, self.encoder))
        chosen = output.packing.pack(select)
        if values_readable(select) and int(chosen.sum()) != int(select.sum()):
            raise ValueError(
                f"select must be False at padding, got {int(select.sum() - chosen.sum())} places "
                "without a token"
            )
        return self.tokens(output.packed[chosen], self.encoder)


class NextSentence(Head):
    """Whether the second segment follows the first (class 0) or not: (batch, 2)."""

    ending = "ForNextSentencePrediction"
    uses_pooler = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.sentence = nn.Linear(config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Logits (batch, 2); arguments as in `Encoder.forward`."""
        output = self.encode(input_ids, attention_mask, token_type_ids, lengths)
        return self.sentence(output.pooler_output)


class PreTrainingLogits(NamedTuple):
    """Logits of `PreTraining`: (batch, seqlen, vocab_size), 0 at padding, and (batch, 2)."""

    tokens: Tensor
    sentence: Tensor


class PreTraining(Head):
    """Masked tokens and a pair of sentences together.

    BertForPreTraining: 1 is a random second segment. AlbertForPreTraining: 1 is segments in the
    wrong order.
    """

    ending = "ForPreTraining"
    uses_pooler = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tokens = TokenScores(config)
        of_order = config.model_type == "albert"
        self.dropout = nn.Dropout(_or_hidden(config.sequence_dropout, config) if of_order else 0.0)
        self.sentence = nn.Linear(config.hidden_size, config.num_labels if of_order else 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> PreTrainingLogits:
        """Logits of tokens and of the pair; arguments as in `Encoder.forward`."""
        output = self.encode(input_ids, attention_mask, token_type_ids, lengths)
        return PreTrainingLogits(
            output.packing.pad(self.tokens(output.packed, self.encoder)),
            self.sentence(self.dropout(output.pooler_output)),
        )


class SequenceClassifier(Head):
    """Classes of a row, from its first token: by the pooler, or a layer of the head's own."""

    ending = "ForSequenceClassification"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.dense: nn.Linear | None = None
        if not self.needs_pooler(config):
            self.dense = nn.Linear(config.hidden_size, config.hidden_size)
            self.activation = find_activation(config.sequence_head)
        p = _or_hidden(config.sequence_dropout, config)
        self.input_dropout = nn.Dropout(p if config.sequence_head_drops_input else 0.0)
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    @classmethod
    def needs_pooler(cls, config: EncoderConfig) -> bool:
        """Whether the head reads the pooler's output."""
        return config.sequence_head == "pooler"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Logits (batch, num_labels); arguments as in `Encoder.forward`."""
        output = self.encode(input_ids, attention_mask, token_type_ids, lengths)
        if self.dense is None:
            x = output.pool("pooler")  # (batch, hidden_size)
        else:
            x = self.activation(self.dense(self.input_dropout(output.pool("first"))))
        return self.classifier(self.dropout(x))


class TokenClassifier(Head):
    """Classes of each token."""

    ending = "ForTokenClassification"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(_or_hidden(config.token_dropout, config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Logits (batch, seqlen, num_labels), 0 at padding; arguments as in `Encoder.forward`."""
        output = self.encode(input_ids, attention_mask, token_type_ids, lengths)
        return output.packing.pad(self.classifier(self.dropout(output.packed)))


class ReplacedTokens(Head):
    """ELECTRA's discriminator: whether a token has been replaced."""

    ending = "ForPreTraining"

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = find_activation(config.activation)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Logits (batch, seqlen), above 0 where replaced is likelier than not; 0 at padding.

        Arguments as in `Encoder.forward`.
        """
        output = self.encode(input_ids, attention_mask, token_type_ids, lengths)
        logits = self.classifier(self.activation(self.dense(output.packed)))  # (total, 1)
        return output.packing.pad(logits.squeeze(-1))


class SpanLogits(NamedTuple):
    """Logits of the first and of the last token of an answer, (batch, seqlen), -inf at padding."""

    start: Tensor
    end: Tensor


class Span(NamedTuple):
    """The best span of each row.

    Attributes:
        start, end: int64 (batch,), its first and its last token; -1 where no span is allowed.
        probability: float32 (batch,); 0 where no span is allowed.
    """

    start: Tensor
    end: Tensor
    probability: Tensor


def best_span(
    start: Tensor, end: Tensor, mask: Tensor | None = None, max_length: int | None = None
) -> Span:
    """The most probable span of tokens that ends where it starts or later.

    Work and memory are in proportion to seqlen * max_length.

    Args:
        start, end: floating logits (batch, seqlen), -inf where nothing may start or end.
        mask: bool (batch, seqlen), tokens at which an answer may start and end (those of the
            context, and not of the question); None: all.
        max_length: tokens that a span has at most; None: any number.

    Returns:
        The span, and its probability: softmax of `start` over the allowed tokens, at its first,
        times softmax of `end`, at its last. Of equally probable ones the first, and the shortest.
    """
    for name, logits in (("start", start), ("end", end)):
        check_tensor(name, logits)
        if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
            raise ValueError(
                f"{name} must be floating (batch, seqlen), seqlen > 0, got {describe(logits)}"
            )
    if start.shape != end.shape:
        raise ValueError(
            f"start and end must have one shape, got {describe(start)} and {describe(end)}"
        )
    seqlen = start.shape[1]
    if max_length is None:
        max_length = seqlen
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"max_length must be an int, at least 1, or None, got {max_length!r}")
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, or None, got {max_length}")
    reach = min(max_length, seqlen)
    start, end = start.float(), end.float()
    if mask is not None:
        _check_mask("mask", mask, start.shape, start.device)
        start, end = (logits.masked_fill(~mask, float("-inf")) for logits in (start, end))
    # Of a row where nothing is allowed NaN, which counts as -inf.
    log_start, log_end = (
        logits.log_softmax(-1).nan_to_num(float("-inf"), neginf=float("-inf"))
        for logits in (start, end)
    )
    # (batch, seqlen, reach): spans that start at a token, by their length less 1. Ends lie one
    # after the other, so that a view shows each start its own ones.
    ends = functional.pad(log_end, (0, reach - 1), value=float("-inf")).unfold(1, reach, 1)
    best, place = (log_start[:, :, None] + ends).flatten(1).max(-1)
    first = place // reach
    found = best > float("-inf")
    return Span(first.where(found, -1), (first + place % reach).where(found, -1), best.exp())


class QuestionAnswering(Head):
    """Where in the text an answer starts and ends."""

    ending = "ForQuestionAnswering"
    best_span = staticmethod(best_span)

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels must be 2 to answer questions, start and end, got {config.num_labels}"
            )
        self.dropout = nn.Dropout(config.span_dropout)
        self.span = nn.Linear(config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> SpanLogits:
        """Logits of start and end; arguments as in `Encoder.forward`."""
        output = self.encode(input_ids, attention_mask, token_type_ids, lengths)
        logits = self.span(self.dropout(output.packed))  # (total, 2)
        start, end = output.packing.pad(logits, float("-inf")).unbind(-1)
        return SpanLogits(start, end)


def _or_hidden(p: float | None, config: EncoderConfig) -> float:
    return config.hidden_dropout if p is None else p


def _check_mask(name: str, mask: Tensor, shape: Sequence[int], device: torch.device) -> None:
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {describe(mask)}")
    if mask.shape != torch.Size(shape) or mask.device != device:
        raise ValueError(f"{name} must be bool {tuple(shape)} on {device}, got {describe(mask)}")


_HEADS = (
    MaskedLM, NextSentence, PreTraining, SequenceClassifier, TokenClassifier, QuestionAnswering
)  # fmt: skip


def find_class(config: EncoderConfig, architecture: str) -> type[Head] | None:
    """The class of an architecture such as "BertForMaskedLM"; None for the encoder alone.

    Raises:
        CheckpointError: the family has no such architecture.
    """
    ending = find_head(config, architecture)
    if architecture == "ElectraForPreTraining":
        return ReplacedTokens
    return next((head for head in _HEADS if ending and head.ending == ending), None)
