"""Figures: the picture holds the weights, and its labels can be read."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn import visualize
from fastattn.masks import Causal, Lengths, Packed, Prefix, Window
from tests.visualize.common import assert_nothing_is_cut, drawn, family, labels, random

pytest.importorskip("matplotlib")

TOKENS = ["[CLS]", "a", "$x$", "b$", "##c", "[SEP]"]


def test_heat_map(tmp_path: Path) -> None:
    weights = random(6, 6).softmax(-1)
    path = tmp_path / "head.png"
    figure = visualize.heat_map(weights, TOKENS, title="100$ or $1", marked=[(1, 2)], path=path)
    axes = figure.axes[0]
    assert torch.equal(drawn(axes), weights)
    assert labels(axes.xaxis) == labels(axes.yaxis) == TOKENS
    texts = [*axes.get_xticklabels(), *axes.get_yticklabels(), figure._suptitle]
    assert not any(text.get_parse_math() for text in texts)  # dollars are no formulas
    assert figure._suptitle.get_text() == "100$ or $1"
    assert [text.get_text() for text in axes.texts] == [f"{weights[1, 2]:.2f}".lstrip("0")]
    assert axes.patches[0].get_xy() == (1.5, 0.5)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert_nothing_is_cut(figure)
    svg = tmp_path / "head.svg"
    visualize.heat_map(weights, TOKENS, path=svg)
    assert b"<svg" in svg.read_bytes()


@pytest.mark.parametrize("count", [1, 30, 72, 150])
@pytest.mark.parametrize("named", [False, True])
def test_labels_of_long_sequences_are_readable(count: int, named: bool) -> None:
    tokens = [f"token{i}" for i in range(count)] if named else None
    figure = visualize.heat_map(random(count, count).softmax(-1), tokens)
    figure.canvas.draw()
    assert_nothing_is_cut(figure)
    written = labels(figure.axes[0].xaxis)
    assert written[0] == ("token0" if named else "0")
    assert (len(written) == count) == (count <= (72 if named else 24))
    assert max(figure.get_size_inches()) < 16


def test_head_grid(tmp_path: Path) -> None:
    weights = random(5, 4, 6).softmax(-1)
    path = tmp_path / "heads.png"
    figure = visualize.head_grid(weights, TOKENS[:4], TOKENS, columns=3, path=path)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 5 and path.stat().st_size > 0
    for head, axes in enumerate(panels):
        assert torch.equal(drawn(axes), weights[head])
        assert axes.get_title() == f"head {head + 1}"
        assert axes.images[0].get_clim() == (0.0, weights.max().item())  # one scale
        assert labels(axes.yaxis) == (TOKENS[:4] if head % 3 == 0 else [])
        assert labels(axes.xaxis) == (TOKENS if head < 3 else [])
    assert_nothing_is_cut(figure)


def test_pictures_of_a_captured_layer(tmp_path: Path) -> None:
    model, inputs = family("t5")
    source = [f"s{i}" for i in range(11)]
    target = [f"t{i}" for i in range(6)]
    seen = visualize.capture(model, inputs, layer=1, kind="cross", sequence=1, average_heads=True)
    path = tmp_path / "alignment.png"
    figure = visualize.alignment(seen, source, target, path=path)
    axes = figure.axes[0]
    assert torch.equal(drawn(axes), seen.weights[0])
    assert figure._suptitle.get_text() == "cross, layer 2 of 2, mean of heads"
    assert labels(axes.xaxis) == source[:7] and labels(axes.yaxis) == target[:4]  # no padding
    framed = [(int(p.get_xy()[1] + 0.5), int(p.get_xy()[0] + 0.5)) for p in axes.patches]
    assert framed == list(enumerate(seen.weights[0].argmax(1).tolist()))
    heads = visualize.capture(model, inputs, layer=0, kind="encoder", sequence=1, heads=[3, 1])
    figure = visualize.heat_map(heads, source, head=1)
    assert torch.equal(drawn(figure.axes[0]), heads.weights[1])
    assert figure._suptitle.get_text() == "encoder, layer 1 of 2, head 2"
    assert labels(figure.axes[0].yaxis) == source[:7]
    titles = [axes.get_title() for axes in visualize.head_grid(heads).axes if axes.images]
    assert titles == ["head 4", "head 2"]


MASKS = {
    "causal": Causal(),
    "window": Window(3, 1),
    "prefix": Prefix(torch.tensor([4, 2])),
    "lengths": Lengths(torch.tensor([5, 8]), starts_k=torch.tensor([1, 0])),
    "packed": Packed(torch.tensor([0, 3, 9])) & Causal(),
    "dense": torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5,
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_matrix(name: str, tmp_path: Path) -> None:
    mask = MASKS[name]
    path = tmp_path / "mask.png"
    several = name in ("prefix", "lengths", "dense")
    head = 2 if name == "dense" else 0
    figure = visualize.mask_matrix(mask, 9, 9, sequence=int(several), head=head, path=path)
    dense = mask if isinstance(mask, Tensor) else mask.dense(9, 9)
    assert torch.equal(drawn(figure.axes[0]).bool(), dense[int(several), head])
    assert path.stat().st_size > 0
    assert_nothing_is_cut(figure)


def test_tiles_of_a_mask() -> None:
    figure = visualize.mask_matrix(Causal(), 64, 64, blocks=(16, 16))
    text = figure._suptitle.get_text()
    assert text == "Causal\n10 of 16 tiles visited, 6 without a mask"
    assert len(figure.axes[0].lines) == 6


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: visualize.heat_map(random(6, 6), TOKENS[:5]), ValueError, "tokens must be 6 lab"),
        (lambda: visualize.heat_map(random(6, 6), "abcdef"), TypeError, "tokens must be a list of"),
        (lambda: visualize.heat_map(random(2, 6, 6)), ValueError, r"head must be one of \[0, 1\]"),
        (lambda: visualize.heat_map(random(2, 6, 6), head=2), ValueError, r"head .* got 2"),
        (lambda: visualize.heat_map(random(6)), ValueError, r"weights must be \(rows, keys\)"),
        (lambda: visualize.heat_map(random(0, 6)), ValueError, "and not empty, got"),
        (lambda: visualize.heat_map([[1.0]]), TypeError, "weights must be an AttentionMap or a"),
        (
            lambda: visualize.heat_map(random(6, 6), marked=[(6, 0)]),
            ValueError,
            r"marked must hold cells of \(6, 6\), got \(6, 0\)",
        ),
        (lambda: visualize.head_grid(random(2, 3, 3), columns=0), ValueError, "columns must be an"),
        (lambda: visualize.alignment(random(2, 3), ["a"]), ValueError, "source must be 3 labels"),
        (lambda: visualize.mask_matrix(Causal(), 0, 4), ValueError, "seqlen_q must be an int of"),
        (
            lambda: visualize.mask_matrix(MASKS["dense"], 9, 9, sequence=2),
            ValueError,
            r"sequence must be in 0\.\.1, got 2",
        ),
        (
            lambda: visualize.mask_matrix(MASKS["dense"], 9, 9, head=3),
            ValueError,
            r"head must be in 0\.\.2, got 3",
        ),
        (lambda: visualize.mask_matrix("causal", 2, 2), TypeError, "mask must be a bool tensor"),
    ],
)
def test_bad_arguments(call, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
