"""Pairs of text segments: does the second follow the first, or are they swapped."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.objectives import randomness
from fastattn.objectives.arguments import check_int, check_share
from fastattn.validation import check_cu_seqlens, check_integers, values_readable


class SentencePairs(NamedTuple):
    """A batch of pairs, `[CLS] A [SEP] B [SEP]`.

    Attributes:
        input_ids: int64 (num_pairs, max_seqlen), padded with `pad_token`.
        token_types: int64 (num_pairs, max_seqlen): 1 from B's first token to the last [SEP].
        lengths: int64 (num_pairs,).
        labels: int64 (num_pairs,): 0 where B follows A in the text. 1 where it is from another
            document (next-sentence), where the two are swapped (sentence-order).
    """

    input_ids: Tensor
    token_types: Tensor
    lengths: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of sentences of tokens, laid end to end.

    Args:
        tokens: int32 or int64 (total,).
        sentences: int32 or int64 (num_sentences + 1,): 0, then the token at which each ends.
        documents: int32 or int64 (num_documents + 1,): 0, then the sentence at which each ends.
    """

    tokens: Tensor
    sentences: Tensor
    documents: Tensor

    def __post_init__(self) -> None:
        check_integers("tokens", self.tokens, self.tokens.device)
        total, device = self.tokens.numel(), self.tokens.device
        check_cu_seqlens("sentences", self.sentences, total, total, device)
        num_sentences = self.sentences.numel() - 1
        check_cu_seqlens("documents", self.documents, num_sentences, num_sentences, device)
        for name, ends in (("sentences", self.sentences), ("documents", self.documents)):
            if values_readable(ends) and bool((ends.diff() == 0).any()):
                empty = int((ends.diff() == 0).nonzero()[0])
                raise ValueError(
                    f"{name} must not be empty, got none between the ends {empty} and {empty + 1}"
                )

    @classmethod
    def of(
        cls, documents: Sequence[Sequence[Sequence[int]]], device: torch.device | str | None = None
    ) -> Documents:
        """From lists: documents of sentences of token ids, neither of them empty.

        Raises:
            ValueError: a document or a sentence is empty.
        """
        for number, document in enumerate(documents):
            if not document or not all(document):
                what = "an empty sentence" if document else "no sentences"
                raise ValueError(f"documents[{number}] must have sentences of tokens, got {what}")
        sentences = list(itertools.chain.from_iterable(documents))
        tokens = list(itertools.chain.from_iterable(sentences))
        sentence_ends = itertools.accumulate(map(len, sentences), initial=0)
        document_ends = itertools.accumulate(map(len, documents), initial=0)
        made = (tokens, list(sentence_ends), list(document_ends))
        return cls(*(torch.tensor(x, dtype=torch.int64, device=device) for x in made))


class _Segments(NamedTuple):
    """Two runs of sentences each: where their tokens start in a text, and how many they are."""

    first: Tensor
    first_size: Tensor
    second: Tensor
    second_size: Tensor


def next_sentence_pairs(
    documents: Documents,
    num_pairs: int | None = None,
    *,
    cls_token: int,
    sep_token: int,
    pad_token: int = 0,
    max_seqlen: int = 512,
    random_share: float = 0.5,
    short_share: float = 0.1,
    starts: Tensor | None = None,
    seed: randomness.Seed = None,
) -> SentencePairs:
    """BERT's next-sentence pairs (Devlin et al., arXiv:1810.04805).

    From a sentence on, as many as fit into the pair, at least two and within one document, are cut
    in two at a random place. With probability `random_share` the second part is replaced by as much
    as fits of a random other document, from a random sentence on. What is too long still is cut at
    its end, the longer segment first.

    Args:
        documents: at least two, one of them with at least two sentences.
        num_pairs: how many, each from a random sentence that is not its document's last; None with
            `starts`.
        cls_token, sep_token, pad_token: ids that stand around and behind the segments.
        max_seqlen: of a pair with its three separators, at least 5.
        random_share: probability of a pair that does not belong together.
        short_share: probability that a pair aims at a random length from 2 on, and not the longest.
        starts: int32 or int64 (num_pairs,), the sentences that pairs start with.
        seed: an int, which fixes the result, or a generator; None draws from torch's.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    random_share = check_share("random_share", random_share)
    setting = _setting(documents, num_pairs, starts, max_seqlen, short_share, seed)
    if documents.documents.numel() < 3:
        raise ValueError("documents must be at least two, for a random second segment, got one")
    segments = _neighbors(documents, setting)
    coin, document, sentence, _ = setting.words(1)
    random = randomness.chance(coin, random_share)
    place, size = _elsewhere(
        documents, setting, setting.room - segments.first_size, document, sentence
    )
    segments = segments._replace(
        second=torch.where(random, place, segments.second),
        second_size=torch.where(random, size, segments.second_size),
    )
    return _join(documents, segments, random, max_seqlen, (cls_token, sep_token, pad_token))


def sentence_order_pairs(
    documents: Documents,
    num_pairs: int | None = None,
    *,
    cls_token: int,
    sep_token: int,
    pad_token: int = 0,
    max_seqlen: int = 512,
    swapped_share: float = 0.5,
    short_share: float = 0.1,
    starts: Tensor | None = None,
    seed: randomness.Seed = None,
) -> SentencePairs:
    """ALBERT's sentence-order pairs (Lan et al., arXiv:1909.11942): two segments, maybe swapped.

    Args:
        documents: one of them with at least two sentences.
        swapped_share: probability that the segment that comes later is first.
        num_pairs, cls_token, sep_token, pad_token, max_seqlen, short_share, starts, seed: as of
            `next_sentence_pairs`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
    """
    swapped_share = check_share("swapped_share", swapped_share)
    setting = _setting(documents, num_pairs, starts, max_seqlen, short_share, seed)
    first, first_size, second, second_size = _neighbors(documents, setting)
    swapped = randomness.chance(setting.words(1)[0], swapped_share)
    segments = _Segments(
        torch.where(swapped, second, first),
        torch.where(swapped, second_size, first_size),
        torch.where(swapped, first, second),
        torch.where(swapped, first_size, second_size),
    )
    return _join(documents, segments, swapped, max_seqlen, (cls_token, sep_token, pad_token))


class _Setting(NamedTuple):
    """What pairs start from: the key, their first sentences, and tokens that each aims at."""

    key: Tensor
    starts: Tensor
    room: Tensor

    def words(self, round_: int) -> tuple[Tensor, ...]:
        """Four random words for each pair."""
        drawn = randomness.words(self.key, randomness.PAIRS, self.starts.numel(), 1, round_)
        return tuple(word[:, 0] for word in drawn)


def _setting(
    documents: Documents,
    num_pairs: int | None,
    starts: Tensor | None,
    max_seqlen: int,
    short_share: float,
    seed: randomness.Seed,
) -> _Setting:
    if not isinstance(documents, Documents):
        raise TypeError(f"documents must be Documents, got {type(documents).__name__}")
    short_share = check_share("short_share", short_share)
    room = check_int("max_seqlen", max_seqlen, 5) - 3
    if (num_pairs is None) == (starts is None):
        raise ValueError("num_pairs or starts must be given, and not both")
    device = documents.tokens.device
    key = randomness.seed_tensor(seed, device)
    followed = torch.ones(documents.sentences.numel(), dtype=torch.bool, device=device)
    followed[documents.documents.to(torch.int64) - 1] = False  # the last of each document
    if starts is None:
        assert num_pairs is not None  # one of the two is given
        check_int("num_pairs", num_pairs, 0)
        candidates = followed[:-1].nonzero()[:, 0]
        if candidates.numel() == 0:
            raise ValueError("documents must have one of at least two sentences, got none")
        word = randomness.words(key, randomness.PAIRS, num_pairs, 1)[2][:, 0]
        starts = candidates[randomness.below(word, candidates.numel())]
    else:
        check_integers("starts", starts, device)
        inside = (starts >= 0) & (starts < followed.numel() - 1)
        fits = inside & followed[starts.clamp(0, followed.numel() - 1)]
        if not bool(fits.all()):
            raise ValueError(
                "starts must be sentences that another of their document follows, got "
                f"{int(starts[~fits][0])}"
            )
        starts = starts.to(torch.int64)
    coin, length = randomness.words(key, randomness.PAIRS, starts.numel(), 1)[:2]
    short = randomness.chance(coin[:, 0], short_share)
    target = torch.where(short, 2 + randomness.below(length[:, 0], room - 1), room)
    return _Setting(key, starts, target)


def _neighbors(documents: Documents, setting: _Setting) -> _Segments:
    """Two runs of sentences that follow each other, at least one sentence each."""
    starts, sentences = setting.starts, documents.sentences.to(torch.int64)
    end = torch.maximum(_reach(documents, starts, setting.room), starts + 2)
    word = setting.words(0)[3]
    middle = starts + 1 + randomness.below(word, end - starts - 1)
    at, cut, stop = sentences[starts], sentences[middle], sentences[end]
    return _Segments(at, cut - at, cut, stop - cut)


def _reach(documents: Documents, starts: Tensor, room: Tensor) -> Tensor:
    """Up to which sentence of its document there is room for, from each start on."""
    sentences = documents.sentences.to(torch.int64)
    fits = torch.searchsorted(sentences, sentences[starts] + room, right=True) - 1
    return torch.minimum(fits, _document_end(documents, starts))


def _document_end(documents: Documents, starts: Tensor) -> Tensor:
    """The sentence after the last of each start's document."""
    ends = documents.documents.to(torch.int64)
    return ends[torch.searchsorted(ends, starts, right=True)]


def _elsewhere(
    documents: Documents, setting: _Setting, room: Tensor, document: Tensor, sentence: Tensor
) -> tuple[Tensor, Tensor]:
    """A random run of sentences of another document for each pair: first token, and how many."""
    ends = documents.documents.to(torch.int64)
    own = torch.searchsorted(ends, setting.starts, right=True) - 1
    other = randomness.below(document, ends.numel() - 2)
    other = other + (other >= own)
    start = ends[other] + randomness.below(sentence, ends[other + 1] - ends[other])
    end = torch.maximum(_reach(documents, start, room.clamp(min=0)), start + 1)
    sentences = documents.sentences.to(torch.int64)
    return sentences[start], sentences[end] - sentences[start]


def _join(
    documents: Documents,
    segments: _Segments,
    labels: Tensor,
    max_seqlen: int,
    tokens: tuple[int, int, int],
) -> SentencePairs:
    """Both segments with their separators, cut where they are too long."""
    cls_token, sep_token, pad_token = tokens
    for name, token in zip(("cls_token", "sep_token", "pad_token"), tokens, strict=True):
        check_int(name, token, 0)
    room = max_seqlen - 3
    # As if a token at a time were taken from the end of the longer one, of B where both are equal.
    second = torch.minimum(segments.second_size, (room - segments.first_size).clamp(min=room // 2))
    first = torch.minimum(segments.first_size, room - second)
    column = torch.arange(max_seqlen, device=first.device)
    first_sep, last_sep = (first + 1)[:, None], (first + second + 2)[:, None]
    in_first = (column >= 1) & (column < first_sep)
    in_second = (column > first_sep) & (column < last_sep)
    place = torch.where(in_first, segments.first[:, None] + column - 1, 0)
    behind = segments.second[:, None] + column - first_sep - 1
    place = torch.where(in_second, behind, place)
    ids = torch.where(in_first | in_second, documents.tokens.to(torch.int64)[place], pad_token)
    ids = torch.where((column == first_sep) | (column == last_sep), sep_token, ids)
    ids[:, 0] = cls_token
    types = ((column > first_sep) & (column <= last_sep)).to(torch.int64)
    return SentencePairs(ids, types, first + second + 3, labels.to(torch.int64))
