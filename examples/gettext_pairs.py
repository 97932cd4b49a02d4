"""English to German pairs out of gettext catalogs, the translations that Debian's packages ship.

The texts are those of git (GPL-2) and of GCC (GPL-3+). They are read from the machine and are not
part of this repository.
"""

from __future__ import annotations

import gettext
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Catalog of each domain, the Debian package that ships it, and the licence of its texts.
CATALOGS = {
    "git": ("git", "GPL-2"),
    "gcc-12": ("gcc-12-locales", "GPL-3+"),
    "cpplib-12": ("gcc-12-locales", "GPL-3+"),
}
SYSTEM_FOLDER = Path("/usr/share/locale")
FETCH = """\
  apt-get download git gcc-12-locales
  for package in git_*.deb gcc-12-locales_*.deb; do dpkg -x "$package" gettext-data; done
and run again with --data gettext-data, or, as root: apt-get install git gcc-12-locales"""

PAD, END = 0, 1  # token ids; PAD also starts every German sentence, as in T5
MAX_CHARS = 60  # what a CPU can learn in minutes


class Pair(NamedTuple):
    """One message: English, German."""

    english: str
    german: str


class Split(NamedTuple):
    """Pairs to train on, to look at while training, and to score once at the end."""

    train: list[Pair]
    valid: list[Pair]
    test: list[Pair]


class DataError(RuntimeError):
    """The data is not here, or not what was expected; the message says what to do."""


def find_catalogs(folder: Path | None) -> dict[str, Path]:
    """The .mo file of each domain, from `folder` (searched to any depth) or the system's.

    Raises:
        DataError: a catalog is missing; names it and the commands that fetch it.
    """
    found: dict[str, Path] = {}
    for name in CATALOGS:
        own = sorted(folder.rglob(f"de/LC_MESSAGES/{name}.mo")) if folder is not None else []
        system = SYSTEM_FOLDER / "de" / "LC_MESSAGES" / f"{name}.mo"
        candidates = [*own, *([system] if system.is_file() else [])]
        if candidates:
            found[name] = candidates[0]
    missing = [name for name in CATALOGS if name not in found]
    if missing:
        where = f"{folder} or {SYSTEM_FOLDER}" if folder is not None else str(SYSTEM_FOLDER)
        raise DataError(
            f"no German {', '.join(f'{name}.mo' for name in missing)} under {where}. On Debian 12 "
            f"or in its container, fetch the catalogs without installing them:\n{FETCH}"
        )
    return found


def read_catalog(path: Path) -> list[Pair]:
    """The messages of a .mo file that are worth learning, in the file's order.

    Line wraps become spaces. Left out: the header, plural forms after the first (their English is
    not in the catalog), messages without a word, left in English, longer than `MAX_CHARS`, or of
    very unequal lengths. printf formats stay as they are.
    """
    try:
        with path.open("rb") as file:
            catalog = vars(gettext.GNUTranslations(file))["_catalog"]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a gettext catalog: {error}") from error
    pairs = []
    for key, german in catalog.items():
        english, plural = key if isinstance(key, tuple) else (key, 0)
        if plural == 0 and english:
            # A context, if there is one, stands before the message.
            pair = Pair(*(" ".join(text.split()) for text in (english.split("\4")[-1], german)))
            if _is_useful(pair):
                pairs.append(pair)
    return pairs


def _is_useful(pair: Pair) -> bool:
    lengths = [len(text) for text in pair]
    return (
        pair.english != pair.german
        and all(re.search(r"[^\W\d_]{2}", text) for text in pair)
        and max(lengths) <= MAX_CHARS
        and max(lengths) <= 3 * min(lengths) + 10
    )


def split_pairs(pairs: Sequence[Pair], num_valid: int, num_test: int) -> Split:
    """Every English message once, in three parts, chosen by a hash and not by the order.

    Messages that differ only in case, punctuation or spaces count as the same, so that none of them
    is on both sides.

    Raises:
        DataError: too few pairs.
    """
    unique: dict[str, Pair] = {}
    for pair in pairs:
        unique.setdefault(re.sub(r"[\W_]+", " ", pair.english.casefold()).strip(), pair)
    order = sorted(unique, key=lambda key: hashlib.sha256(key.encode()).digest())
    chosen = [unique[key] for key in order]
    held_out = num_valid + num_test
    if len(chosen) < 2 * held_out:
        raise DataError(f"{len(chosen)} pairs are too few to hold {held_out} of them out")
    return Split(chosen[held_out:], chosen[:num_valid], chosen[num_valid:held_out])


def train_tokenizer(pairs: Sequence[Pair], vocab_size: int) -> Tokenizer:
    """One byte-level BPE vocabulary for both languages, learned from `pairs`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer


class Example(NamedTuple):
    """A pair as token ids, each ending in END."""

    source: list[int]
    target: list[int]


def encode(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[Example]:
    """Pairs as token ids."""
    sides = (tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1))
    return [Example([*a.ids, END], [*b.ids, END]) for a, b in zip(*sides, strict=True)]


@dataclass(frozen=True)
class Batch:
    """Padded examples: ids (batch, seqlen) int64 and lengths (batch,) int32 of each side."""

    source: Tensor
    source_lengths: Tensor
    target: Tensor
    target_lengths: Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def collate(examples: Sequence[Example], extra: int = 0) -> Batch:
    """Examples as one batch, padded to the longest of each side and by `extra` columns."""
    columns = []
    for side in (0, 1):
        rows = [example[side] for example in examples]
        width = max(map(len, rows)) + extra
        columns.append(torch.tensor([row + [PAD] * (width - len(row)) for row in rows]))
        columns.append(torch.tensor([len(row) for row in rows], dtype=torch.int32))
    return Batch(*columns)


def batches(
    examples: Sequence[Example], tokens: int, generator: torch.Generator | None
) -> Iterator[list[Example]]:
    """All examples once, in batches of similar lengths and about `tokens` tokens a side.

    With a generator, in a random order, and neighbours differ from one call to the next; without
    one, from short to long.
    """
    lengths = torch.tensor([[max(map(len, e)), len(e.source)] for e in examples], dtype=torch.float)
    keys = lengths[:, 0] + lengths[:, 1] / 1000
    if generator is not None:
        keys = lengths[:, 0] + 3 * torch.rand(len(examples), generator=generator)
    groups: list[list[Example]] = [[]]
    longest = 0
    for index in keys.argsort().tolist():
        longest = max(longest, *map(len, examples[index]))
        if groups[-1] and longest * (len(groups[-1]) + 1) > tokens:
            groups.append([])
            longest = max(map(len, examples[index]))
        groups[-1].append(examples[index])
    order = list(range(len(groups)))
    if generator is not None:
        order = torch.randperm(len(groups), generator=generator).tolist()
    yield from (groups[index] for index in order)
