"""benchmarks/generation_cpu.py on a tiny model: its parts, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import generation_cpu


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "vocab_size": 67, "hidden_size": 60, "intermediate_size": 37, "num_hidden_layers": 1,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    gpt2 = {"vocab_size": 67, "n_embd": 60, "n_layer": 1, "n_head": 5, "n_positions": 64}
    monkeypatch.setattr(generation_cpu, "CONFIGS", {"a": ("Llama", sizes), "b": ("GPT2", gpt2)})


def test_both_generate_the_same_and_it_is_written_down(tiny: None, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        rows = generation_cpu.main(
            ["--tokens", "5", "--repeats", "1", "--threads", "1", "--models", "a", "b",
             "--batches", "1", "2", "--out", str(tmp_path)]
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert [(row.model, row.batch) for row in rows] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert all(row.same_tokens == 1.0 and row.fastattn_ms > 0 for row in rows)
    record = json.loads((tmp_path / "generation_cpu.json").read_text())
    assert record["rows"][1]["speedup"] == pytest.approx(rows[1].speedup)
    assert (tmp_path / "generation_cpu.png").stat().st_size > 0


def test_all_matrices_of_a_step_are_read(tiny: None) -> None:
    _, ours = generation_cpu.make_models("a")
    counted = sum(weight.numel() for weight in generation_cpu.weights_of_a_step(ours))
    matrices = sum(p.numel() for p in ours.parameters() if p.dim() == 2)
    assert counted == matrices - ours.embedding.weight.numel()  # of which a step reads one row
    _, ours = generation_cpu.make_models("b")
    counted = sum(weight.numel() for weight in generation_cpu.weights_of_a_step(ours))
    matrices = sum(p.numel() for p in ours.parameters() if p.dim() == 2)
    assert counted == matrices - ours.positions.weight.numel()
