"""The CPU benchmarks of models on tiny ones: their parts, and what they write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import encoder_cpu, generation_cpu


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
             "--batches", "1", "8", "--out", str(tmp_path)]
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    tasks = [(task.strategy, task.batch) for task in generation_cpu.TASKS]
    assert [(row.model, row.strategy, row.batch) for row in rows] == [
        (model, *task) for model in "ab" for task in tasks
    ]
    same = [row.same_tokens for row in rows]
    assert same == [None if row.strategy == "sampling" else 1.0 for row in rows]
    assert all(row.fastattn_ms > 0 < row.transformers_ms for row in rows)
    record = json.loads((tmp_path / "generation_cpu.json").read_text())
    assert record["rows"][1]["over_greedy"] == pytest.approx(
        record["rows"][1]["fastattn_ms"] / record["rows"][0]["fastattn_ms"]
    )
    assert (tmp_path / "generation_cpu.png").stat().st_size > 0


def test_all_matrices_of_a_step_are_read(tiny: None) -> None:
    ours = generation_cpu.make_models("a").ours
    counted = sum(weight.numel() for weight in generation_cpu.weights_of_a_step(ours))
    matrices = sum(p.numel() for p in ours.parameters() if p.dim() == 2)
    assert counted == matrices - ours.embedding.weight.numel()  # of which a step reads one row
    ours = generation_cpu.make_models("b").ours
    counted = sum(weight.numel() for weight in generation_cpu.weights_of_a_step(ours))
    matrices = sum(p.numel() for p in ours.parameters() if p.dim() == 2)
    assert counted == matrices - ours.positions.weight.numel()


def test_an_encoder_without_its_padding_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {
        "vocab_size": 71, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }  # fmt: skip
    monkeypatch.setattr(encoder_cpu, "CONFIG", sizes)
    monkeypatch.setattr(encoder_cpu, "TASKS", (("as drawn", 6, 1.7), ("sorted by length", 3, None)))
    threads = torch.get_num_threads()
    try:
        rows = encoder_cpu.main(
            ["--texts", "8", "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]
        )
    finally:
        torch.set_num_threads(threads)
    drawn, by_length = rows
    assert drawn.lengths == by_length.lengths and len(drawn.lengths) == 8
    assert drawn.tokens == sum(drawn.lengths) < by_length.padded_tokens < drawn.padded_tokens
    assert all(row.max_difference < 1e-5 for row in rows)
    record = json.loads((tmp_path / "encoder_cpu.json").read_text())
    assert record["rows"][0]["speedup"] == pytest.approx(drawn.transformers_ms / drawn.fastattn_ms)
