"""`fastattn explain`: of a call, and of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LongformerConfig, LongformerModel, T5Config, T5Model, ViTConfig, ViTModel
from typer.testing import CliRunner, Result

from fastattn.cli import make_app


def explain(*arguments: str) -> Result:
    return CliRunner().invoke(make_app(), ["explain", *arguments])


def test_a_call() -> None:
    result = explain("--shape", "1x8x4x64", "--heads-kv", "2", "--causal", "--window", "3",
                     "--softcap", "5", "--device", "cpu")  # fmt: skip
    assert result.exit_code == 0
    assert "q (1, 8, 4, 64) k (1, 8, 2, 64)" in result.output
    assert "Window & Causal" in result.output and "softcap 5.0" in result.output
    assert "sdpa: no, softcap is not in" in result.output and "reference: runs" in result.output


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--shape", "1x8x4"], "--shape must be BATCHxSEQLENxHEADSxHEAD_DIM, got '1x8x4'"),
        (["--shape", "1x8x4x512"], "head_dim"),
        (["--device", "mars"], "mars"),
        (["tests"], "config.json"),
    ],
)
def test_bad_arguments_exit_with_two(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    result = explain(*arguments)
    assert result.exit_code == 2 and text in result.output


def test_a_folder_of_t5(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5Model(config).save_pretrained(tmp_path)
    result = explain(str(tmp_path), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "T5Model: 3 of 3 attention modules replaced" in result.output
    assert "T5Model: 3 of 3 attention modules called fastattn" in result.output
    assert "position bias as a table" in result.output
    assert result.output.count("q 2x12x2x8, k 2x12x2x8") == 3


def test_images(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path)
    result = explain(str(tmp_path), "--device", "cpu", "--impl", "reference")
    assert result.exit_code == 0, result.output
    assert "plain torch, q 2x5x2x8" in result.output


def test_nothing_replaced_exits_with_one(tmp_path: Path) -> None:
    config = LongformerConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, attention_window=4, max_position_embeddings=32,
    )  # fmt: skip
    LongformerModel(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "longformer"
    result = explain(str(tmp_path), "--device", "cpu")
    assert result.exit_code == 1
    assert "LongformerModel: 0 of 1 attention modules replaced" in result.output
    assert "left: LongformerModel never calls" in result.output
