"""Labels in every script: drawn where a font has the letters, else written as code points."""

import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastattn import visualize
from tests.visualize.common import assert_nothing_is_cut, labels, random

matplotlib = pytest.importorskip("matplotlib")
font_manager = pytest.importorskip("matplotlib.font_manager")

CJK = ["注意", "力", "の", "주의"]


@pytest.fixture
def without_new_fonts() -> Iterator[None]:
    """matplotlib's fonts alone, and those that a test adds, which are forgotten after it."""
    manager = font_manager.fontManager
    before = list(manager.ttflist)
    shipped = str(Path(matplotlib.get_data_path()))
    manager.ttflist[:] = [font for font in before if font.fname.startswith(shipped)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(font_manager, "findSystemFonts", list)
        yield
    manager.ttflist[:] = before
    manager._findfont_cached.cache_clear()


def make_font(path: Path, letters: str) -> None:
    """A font whose every glyph is a square."""
    builder_module = pytest.importorskip("fontTools.fontBuilder")
    pen_module = pytest.importorskip("fontTools.pens.ttGlyphPen")
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    pen = pen_module.TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = builder_module.FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(x): name for x, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 100)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares of a Test", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(path)


def test_cjk_labels_without_a_font(without_new_fonts: None, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that it draws as boxes
        warnings.simplefilter("always", visualize.MissingGlyphWarning)
        with pytest.warns(
            visualize.MissingGlyphWarning, match="6 characters of the labels"
        ) as seen:
            figure = visualize.heat_map(random(4, 4), CJK, path=tmp_path / "a.png")
    assert len(seen) == 1 and seen[0].filename == __file__
    expected = [r"\u6ce8\u610f", r"\u529b", r"\u306e", r"\uc8fc\uc758"]
    assert labels(figure.axes[0].xaxis) == labels(figure.axes[0].yaxis) == expected
    assert_nothing_is_cut(figure)


def test_cjk_labels_with_a_font(without_new_fonts: None, tmp_path: Path) -> None:
    make_font(tmp_path / "squares.ttf", "注意力の주의")
    font_manager.fontManager.addfont(tmp_path / "squares.ttf")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = visualize.heat_map(random(4, 4), CJK, title="注意", path=tmp_path / "a.png")
    assert labels(figure.axes[0].xaxis) == CJK
    texts = [*figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels()]
    for text in (*texts, figure._suptitle):
        assert text.get_fontfamily() == ["DejaVu Sans", "Squares of a Test"]
    # The picture has the font's glyphs: filled squares, 0.8 of the font's size.
    figure.canvas.draw()
    box = figure.axes[0].get_yticklabels()[1].get_window_extent().padded(-2)
    pixels = torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
    pixels = pixels.reshape(*reversed(figure.canvas.get_width_height()), 4)[:, :, 0]
    height = pixels.shape[0]
    glyph = pixels[int(height - box.y1) : int(height - box.y0), int(box.x0) : int(box.x1)]
    assert (glyph < 60).float().mean() > 0.5


def test_a_font_that_was_installed_later_is_found(
    without_new_fonts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "squares.ttf"
    make_font(path, "注意力の주의")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path), "/no/such.ttf"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = visualize.heat_map(random(4, 4), CJK)
    assert labels(figure.axes[0].xaxis) == CJK


def test_spaces_and_control_characters_are_written_out() -> None:
    figure = visualize.heat_map(random(3, 3), ["a\nb", "\t", " c"], title="x\ny")
    assert labels(figure.axes[0].xaxis) == [r"a\nb", r"\t", " c"]
    assert figure._suptitle.get_text() == "x\ny"


def test_labels_of_a_byte_level_tokenizer() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    letters = sorted(byte_level.alphabet())
    vocab = {letter: number for number, letter in enumerate(letters)} | {"<end>": 256, "th": 257}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("t", "h")]))
    backend.pre_tokenizer = byte_level(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    ids = tokenizer("a th 注é\n", add_special_tokens=False).input_ids
    expected = ["a", "▁", "th", "▁", "注", "·", "·", "é", "·", "\n"]
    assert visualize.token_labels(tokenizer, [*ids, 256]) == [*expected, "<end>"]
    assert visualize.token_labels(tokenizer, torch.tensor(ids)) == expected
    # Parts of a character without its end stay as they are.
    raw = tokenizer.convert_ids_to_tokens(ids)
    cut = visualize.token_labels(tokenizer, [*ids[:5], 256, *ids[5:6], *ids[4:6], *ids[3:5]])
    assert cut == [*expected[:4], raw[4], "<end>", raw[5], raw[4], raw[5], "▁", raw[4]]


def test_labels_of_other_tokenizers() -> None:
    class Plain:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [f"##Ġ{number}" for number in ids]

    assert visualize.token_labels(Plain(), torch.tensor([1, 2])) == ["##Ġ1", "##Ġ2"]


def test_without_matplotlib() -> None:
    code = """
        import sys
        sys.modules["matplotlib"] = None
        import fastattn
        assert not {name for name in sys.modules if name.startswith("fastattn.visualize")}
        assert not {name for name in sys.modules if name.startswith("fastattn.objectives")}
        import torch
        from fastattn import objectives, visualize
        assert "transformers" not in sys.modules
        with visualize.record_attention() as record:
            fastattn.attention(*torch.randn(3, 1, 4, 2, 8))
        weights = record.find(0).weights()
        try:
            visualize.heat_map(weights[0])
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "draws with matplotlib, which is not installed: pip install matplotlib" in done.stdout
