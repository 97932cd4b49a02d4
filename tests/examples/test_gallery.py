"""The gallery: entries run, what they show is so, docs/gallery.md says what their JSON says."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import gallery

ROOT = Path(__file__).parents[2]
NAMES = [entry.name for entry in gallery.entries()]
COMMITTED = [name for name in NAMES if (gallery.RESULTS / f"{name}.json").is_file()]


def check_masks(figures):
    # Of n tokens causal attention sees (n + 1) / 2n of the pairs, and as much of n tiles.
    assert figures["work"]["causal"]["pairs"] == pytest.approx(4097 / 8192, rel=1e-3)
    assert figures["work"]["causal"]["tiles"] == pytest.approx(65 / 128, rel=1e-3)
    assert figures["SmolLM2"]["share_on_later_tokens"] == 0
    assert figures["SmolLM2"]["earlier_tokens_that_notice"] == 0
    encoder = figures["MiniLM"]
    assert encoder["earlier_tokens_that_notice"] == encoder["earlier_tokens"] == 18
    assert {("tasted", "soup"), ("told", "stories")} <= {tuple(p) for p in encoder["looks_at"]}
    if "alignment" in figures:  # a T5 has been trained on this machine
        assert figures["alignment"]["mean_of_last_layer"] > 4 * figures["alignment"]["chance"]


CHECKS = {
    "masks": check_masks,
}


@pytest.mark.parametrize("name", NAMES)
def test_entry_runs_and_shows_what_it_says(name, tmp_path):
    docs = gallery.DOCS.read_text(encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert gallery.DOCS.read_text(encoding="utf-8") == docs  # only a whole run writes there
    written = gallery.load_results(name, tmp_path)
    places = [place for place, _ in gallery.leaves(written["figures"])]
    for pattern in written["spread"].keys() - {"*"}:
        assert any(gallery.spread_of(place, {pattern: 0, "*": 1}) == 0 for place in places), (
            f"the spread of {pattern} is stated, but there is no such figure"
        )
    for picture in tmp_path.glob("*.png"):
        assert picture.stat().st_size > 10_000
    assert list(tmp_path.glob(f"{name}*.png"))
    CHECKS[name](written["figures"])


@pytest.mark.parametrize("name", COMMITTED)
def test_section_says_what_the_committed_figures_say(name):
    entry = importlib.import_module(f"examples.{name}")
    written = gallery.load_results(name)
    assert not written["settings"]["quick"]
    section = gallery.read_section(name)
    assert section == entry.describe(written["figures"]).strip()
    pictures = re.findall(r"\]\(\.\./examples/results/([^)]+)\)", section)
    assert pictures
    for picture in pictures:
        assert (gallery.RESULTS / picture).is_file(), picture


@pytest.mark.parametrize("name", NAMES)
def test_entry_is_short_and_has_its_place(name):
    assert len((gallery.HERE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 150
    begin, end = gallery.marks(name)
    assert begin in gallery.DOCS.read_text(encoding="utf-8").split(end)[0]
    assert name in CHECKS


def test_figures_outside_of_their_spread_are_found(capsys):
    committed = {
        "figures": {"a": {"x": 1.0, "y": 1.0}, "seconds": 5.0, "text": ["as it was"]},
        "spread": {"a.x": 0.5, "seconds": None, "*": "rounding"},
    }
    same = {"a": {"x": 1.4, "y": 1.0001}, "seconds": 50.0, "text": ["as it was"]}
    assert gallery.compare("one", same, committed) == 0
    for other in (
        {**same, "a": {"x": 1.6, "y": 1.0}},
        {**same, "a": {"x": 1.0, "y": 1.01}},
        {**same, "text": ["another"]},
        {**same, "text": []},
        {**same, "a": {"x": 1.0, "y": 1.0, "z": 0}},
    ):
        assert gallery.compare("one", other, committed) == 1
    assert "0.01" not in capsys.readouterr().err
