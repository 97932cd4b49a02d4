"""Fonts with glyphs for every label, those of Chinese, Japanese and Korean among them."""

from __future__ import annotations

import functools
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

PREFERRED = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR",
    "Source Han Sans SC", "Source Han Sans", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Heiti SC",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei", "MS Gothic", "NanumGothic",
    "Noto Sans", "Arial Unicode MS", "Unifont",
)  # fmt: skip
"""Looked at first where the default font lacks a glyph; then whatever else is installed."""


# Fonts for formulas, with stray letters of many scripts, and one that has a box for everything.
_NOT_FOR_TEXT = ("STIX", "cm", "DejaVu Math", "Last Resort")


class MissingGlyphWarning(UserWarning):
    """No installed font has glyphs for some characters, which are drawn as code points."""


class Lettering(NamedTuple):
    """Labels as they can be drawn.

    Attributes:
        families: of matplotlib's fonts, in the order in which glyphs are looked for.
        replaced: by the characters that no font has, the text to draw.
    """

    families: list[str]
    replaced: dict[str, str]

    def label(self, text: str) -> str:
        """`text` with what cannot be drawn as code points: "\\u6ce8"."""
        return "".join(self.replaced.get(letter, letter) for letter in text)


def lettering(texts: Iterable[str]) -> Lettering:
    """Fonts for all of `texts`, and what of them has to be escaped.

    Control characters and spaces other than " " are always escaped. Warns (`MissingGlyphWarning`)
    where characters are that no installed font has.
    """
    from matplotlib import rcParams

    letters = set().union(*texts) - {" "}
    replaced = {x: _escaped(x) for x in letters if unicodedata.category(x)[0] in "CZ"}
    missing = letters - set(replaced)
    families = _defaults(rcParams["font.family"], rcParams["font.sans-serif"])
    for family in families:
        missing -= _glyphs(family)
    if missing:
        families += _covering(missing)
    if missing:
        _find_new_fonts()
        families += _covering(missing)
    if missing:
        listed = "".join(sorted(missing)[:20])
        warnings.warn(
            f"no installed font has glyphs for {len(missing)} characters of the labels ({listed}), "
            "which are drawn as code points: install one, such as Noto Sans CJK, or name its file "
            "to matplotlib.font_manager.fontManager.addfont",
            MissingGlyphWarning,
            stacklevel=4,
        )
        replaced.update((letter, _escaped(letter)) for letter in missing)
    return Lettering(families, replaced)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


def _defaults(family: Sequence[str], sans_serif: Sequence[str]) -> list[str]:
    """The families that matplotlib is set up for, those that are installed."""
    names = [family] if isinstance(family, str) else family
    wanted: list[str] = []
    for name in names:
        wanted.extend(sans_serif if name == "sans-serif" else [name])
    installed = _installed()
    return [name for name in dict.fromkeys([*wanted, "DejaVu Sans"]) if name in installed][:3]


def _covering(missing: set[str]) -> list[str]:
    """Families for letters that are `missing`, from which what they cover is taken."""
    chosen = []
    installed = _installed()
    for family in dict.fromkeys([*PREFERRED, *sorted(installed)]):
        if not missing:
            break
        if family not in installed or family.startswith(_NOT_FOR_TEXT):
            continue
        covered = missing & _glyphs(family)
        if covered:
            chosen.append(family)
            missing -= covered
    return chosen


def _installed() -> dict[str, str]:
    """Files by family, of upright fonts of normal weight where there are such."""
    from matplotlib.font_manager import fontManager

    fonts: dict[str, Any] = {}
    for font in fontManager.ttflist:
        upright = font.style == "normal" and font.weight in (400, "normal", "regular")
        if upright or font.name not in fonts:
            fonts[font.name] = font.fname
    return fonts


def _glyphs(family: str) -> frozenset[str]:
    return _glyphs_of(_installed()[family])


@functools.cache
def _glyphs_of(path: str) -> frozenset[str]:
    """The characters that a font file has glyphs for."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):  # gone since matplotlib listed it, or not readable
        return frozenset()


def _find_new_fonts() -> None:
    """Adds fonts that were installed after matplotlib made its list."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {font.fname for font in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            try:
                fontManager.addfont(path)
            except (OSError, RuntimeError):  # a font that FreeType cannot read
                continue
