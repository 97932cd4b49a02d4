"""The last part of the demo, on models that are small or little trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastattn.cli import demo_families, demo_segmentation
from fastattn.cli.demo_segmentation import Trained, decode, encode, find_pairs, segment, train
from fastattn.models.encoder import Encoder

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec(demo_families.ENCODER_PACKAGE) is None, reason="needs MiniLM"
)

LITTLE = [("catdog", "cat dog"), ("sunray", "sun ray"), ("bigblue", "big blue"), ("hat", "h at")]


def test_names_are_taken_apart_where_their_words_begin(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "assertRaisesRegex = getHTTPResponse(some_snake_case, one, x_y, __init_subclass__)"
    )
    assert find_pairs(tmp_path) == [
        ("assertraisesregex", "assert raises regex"),
        ("gethttpresponse", "get http response"),
        ("initsubclass", "init subclass"),
        ("somesnakecase", "some snake case"),
    ]


def test_the_standard_library_has_thousands() -> None:
    pairs = find_pairs()
    assert len(pairs) > 3000
    assert all(text.replace(" ", "") == name and " " in text for name, text in pairs)


def test_letters_there_and_back() -> None:
    tokens, lengths = encode(["get item", "x"])
    assert tokens.shape == (2, 9) and lengths.tolist() == [9, 2]
    assert [decode(row) for row in tokens.tolist()] == ["get item", "x"]


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Has learnt a few names by heart."""
    with pytest.MonkeyPatch.context() as patch:
        make = demo_segmentation.make_model
        patch.setattr(demo_segmentation, "make_model", lambda: make(32, 1))
        patch.setattr(demo_segmentation, "RATE", 1e-2)
        result = train(LITTLE, device="cpu", steps=100, batch=8, held_out=0)
    return Trained(result.model, LITTLE, result.known, result.losses, result.seconds)


def test_a_little_model_learns_and_beams_agree(trained: Trained) -> None:
    assert trained.losses[-1] < 0.1 < trained.losses[0]
    names, wanted = (list(texts) for texts in zip(*LITTLE, strict=True))
    assert segment(trained.model, names) == segment(trained.model, names, 4) == wanted


def test_training_holds_names_back_and_is_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    make = demo_segmentation.make_model
    monkeypatch.setattr(demo_segmentation, "make_model", lambda: make(32, 1))
    runs = [train(LITTLE, device="cpu", steps=2, batch=4, held_out=1) for _ in range(2)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].known == 3 and runs[0].unseen == runs[1].unseen and len(runs[0].unseen) == 1


def test_an_alignment_is_drawn_and_judged(trained: Trained, tmp_path: Path) -> None:
    names, wanted = (list(texts) for texts in zip(*LITTLE, strict=True))
    # Nothing came out right: there is nothing that it should have looked at.
    assert demo_families.draw_alignment(trained, names, ["a b"] * 4, wanted, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    # A letter that the name does not have cannot be one that was looked at.
    wrong = ["zz z"] * 4
    assert not demo_families.draw_alignment(trained, names, wrong, wrong, tmp_path / "b.png")


@needs_minilm
def test_the_encoder_is_compared_with_sentences_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = demo_families.PAIRS[:1] + demo_families.PAIRS[-6:-5] + demo_families.PAIRS[-1:]
    monkeypatch.setattr(demo_families, "PAIRS", pairs)
    assert demo_families.show_encoder("cpu", tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 10_000
    embed = Encoder.embed

    def spoilt(self: Encoder, ids: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        return embed(self, ids, *args) + (1e-4 if len(ids) > 1 else 0.0)

    monkeypatch.setattr(Encoder, "embed", spoilt)
    assert not demo_families.show_encoder("cpu", tmp_path / "heads.png")
    assert "FAILED" in capsys.readouterr().out
