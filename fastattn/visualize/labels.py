"""What a tokenizer's tokens stand for, as labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

SPACE = "\u2581"
"""Stands for a space, as in the tokens of SentencePiece."""

CONTINUED = "\u00b7"
"""Label of a token that holds the rest of a character, which the token before it began."""


def token_labels(tokenizer: Any, ids: Sequence[int] | Tensor) -> list[str]:
    """A label for each token, that of a byte-level tokenizer in letters and not in bytes.

    GPT-2, LLaMA 3, Qwen and others write each byte of a text as a letter: a space as "Ġ", and
    characters of other scripts as two to four odd ones. Here, a space is "▁", and a character that
    several tokens share stands at the first, the others being "·". Tokens of other tokenizers stay
    as they are.

    Args:
        tokenizer: of transformers, or another with `convert_ids_to_tokens`.
        ids: token ids of one sequence.
    """
    listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(listed)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = repr(getattr(backend, "decoder", None))
    if "ByteLevel" not in decoder and not hasattr(tokenizer, "byte_decoder"):
        return tokens
    return _in_letters(tokens, set(getattr(tokenizer, "all_special_tokens", ())))


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes of Latin-1 are themselves, the others come from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


def _in_letters(tokens: list[str], special: Iterable[str]) -> list[str]:
    byte_of = _byte_of()
    labels = list(tokens)
    started, pending = 0, b""
    for place, token in enumerate(tokens):
        if token in special or not all(letter in byte_of for letter in token):
            pending = b""  # what was begun before it has no end: its tokens stay as they are
            continue
        own = bytes(byte_of[letter] for letter in token)
        for begun in (pending, b""):  # the rest of a character, or a beginning
            text, unfinished = _decoded(begun + own)
            if text is not None or unfinished:
                break
        started = started if begun else place
        pending = begun + own if unfinished else b""
        if text is not None:
            labels[started] = text.replace(" ", SPACE)
            labels[started + 1 : place + 1] = [CONTINUED] * (place - started)
    return labels


def _decoded(data: bytes) -> tuple[str | None, bool]:
    """The text, None where it is none; and whether more bytes could make it one."""
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError as error:
        return None, error.reason == "unexpected end of data"
