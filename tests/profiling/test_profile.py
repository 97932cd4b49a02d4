"""Profiles of tiny models: figures, parity before them, files, and what is refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

from fastattn.cli import make_app
from fastattn.models import save
from fastattn.profiling import Case, Profile, make_cases, parity, parse_sweep, plot, profile, run
from fastattn.profiling.batches import lengths_with_padding
from fastattn.profiling.ceilings import best
from fastattn.profiling.results import OUTSIDE, Ceilings, Phase, Timing, Work
from fastattn.profiling.subject import TooLargeError, make_random
from tests.profiling.tiny import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tiny tied", "tiny gpt2", "tiny t5", "tiny bart"])
def test_a_model_that_decodes(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    found = profile(
        random=name, cases=[Case(2, 9, 5), Case(1, 4, 1)], repeats=2, trace=trace,
        providers=["fastattn", "transformers", "transformers+fastattn"],
    )  # fmt: skip
    assert found.passed, [row.error for row in found.rows]
    assert [(row.provider, row.case.batch) for row in found.rows] == [
        (provider, batch)
        for batch in (2, 1)
        for provider in ("fastattn", "transformers", "transformers+fastattn")
    ]
    for row in found.rows:
        assert row.prefill is not None and row.memory is not None
        assert row.prefill.timing.samples == 2
        assert (row.decode is None) == (row.case.new_tokens == 1)
        if row.decode is not None:
            assert row.decode.timing.samples == 2 * 4
            assert len(row.step_ms) == 4
            assert row.decode.tokens_per_s == pytest.approx(2 * (row.tokens_per_s_request or 0))
            assert row.memory.cache > 0
            assert min(row.decode.mbu, row.decode.mfu, row.prefill.mfu) > 0
        assert row.memory.activations > 0 and row.memory.peak > row.memory.weights > 0
        if row.provider != "transformers":
            assert row.parity is not None and row.parity.passed
            assert row.parity.reference == "float64" and row.parity.same_tokens == 1.0
        for shares in row.shares:
            for listed in (shares.operators, shares.kernels):
                assert sum(one.percent for one in listed) == pytest.approx(100, abs=0.5)
    assert {one.phase for one in found.rows[0].shares} == {"prefill", "decode"}
    for provider in found.providers:
        events = json.loads(trace.with_name(f"trace.{provider}.json").read_text())["traceEvents"]
        assert {"prefill", "decode"} <= {event.get("name") for event in events}


def test_an_encoder_with_and_without_padding(tmp_path: Path) -> None:
    found = profile(random="tiny bert", cases=[Case(4, 12), Case(4, 12, padding=0.5)], repeats=1)
    assert found.passed and found.kind == "encoder"
    assert found.providers == ("fastattn", "transformers", "transformers+fastattn")
    for row in found.rows:
        assert row.prefill is not None and row.decode is None and row.texts_per_s is not None
        assert row.prefill.tokens == sum(lengths_with_padding(4, 12, row.case.padding))
        assert row.tokens_per_s == pytest.approx(row.texts_per_s * row.prefill.tokens / 4)
    padded, whole = (found.row("fastattn", case) for case in found.cases[::-1])
    assert padded is not None and whole is not None and padded.prefill and whole.prefill
    assert padded.prefill.work.flops < 0.7 * whole.prefill.work.flops
    # What is padding is no work for ours: torch's allocator holds less at once.
    assert padded.memory and whole.memory
    assert padded.memory.activations < whole.memory.activations

    found.save(tmp_path / "bert.json")
    again = Profile.load(tmp_path / "bert.json")
    assert again.rows[0].case == found.rows[0].case
    assert again.rows[0].shares[0].operators[0].name == found.rows[0].shares[0].operators[0].name
    assert again.to_dict() == Profile.from_dict(again.to_dict()).to_dict()
    plot(again, tmp_path / "bert.png")
    assert (tmp_path / "bert.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["tiny llama", "tiny bert"])
def test_wrong_outputs_take_the_place_of_figures(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stock model and float64 are made of right weights, and then ours are changed."""
    make, calls = run.make_stock, []

    def make_and_break(ours: Any, *options: Any) -> Any:
        stock = make(ours, *options)
        calls.append(options)
        if options:  # the wide model, which is made last
            for module in ours.layers[1].modules():
                for name, old in list(module.named_parameters(recurse=False)):
                    # Not in place: the stock model may share the memory.
                    setattr(module, name, nn.Parameter(old * 1.001, requires_grad=False))
        return stock

    monkeypatch.setattr(run, "make_stock", make_and_break)
    encodes = name == "tiny bert"
    found = profile(random=name, cases=[Case(1, 9, 0 if encodes else 3)], repeats=1)
    assert len(calls) == 2 and not found.passed
    ours, stock = found.rows[:2]
    assert ours.error is not None and "wrong outputs: FAILED" in ours.error
    assert (ours.prefill, ours.decode, ours.tokens_per_s, ours.memory) == (None,) * 4
    assert stock.error is None and stock.prefill is not None
    found.save(tmp_path / "wrong.json")
    assert not Profile.load(tmp_path / "wrong.json").passed


def test_without_a_wider_model_all_tokens_must_be_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "available_bytes", lambda device: 1000)
    options: dict[str, Any] = {"random": "tiny llama", "cases": [Case(2, 9, 4)], "repeats": 1}
    found = profile(**options)
    assert found.rows[0].parity is not None and found.rows[0].parity.reference == "tokens"
    assert found.passed and found.rows[0].parity.text == "24 of 24 tokens are the stock model's"
    assert any("no wider model" in note for note in found.notes)

    def decode_wrongly(provider: Any, *given: Any) -> Any:
        logits, tokens = right(provider, *given)
        return logits, tokens + (provider.name == "fastattn")

    right = parity.decoded
    monkeypatch.setattr(parity, "decoded", decode_wrongly)
    found = profile(**options)
    assert found.rows[0].error is not None and "0 of 24 tokens are" in found.rows[0].error


def test_a_provider_that_raises_has_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *given: Any) -> None:
        raise RuntimeError("no such kernel\nat line 7")

    monkeypatch.setattr("fastattn.profiling.providers.OurDecoding.step", fail)
    found = profile(random="tiny llama", cases=[Case(1, 5, 3)], repeats=1)
    assert found.rows[0].error == "wrong outputs: RuntimeError: no such kernel"
    assert found.rows[1].error is None


def test_models_in_memory_and_in_folders(tmp_path: Path) -> None:
    ours = make_random(TINY["llama"], torch.bfloat16, CPU)
    save(ours, tmp_path / "llama")
    case = [Case(1, 6, 3)]
    found = profile(ours, cases=case, repeats=1)
    assert found.dtype == "bfloat16" and found.passed
    found = profile(tmp_path / "llama", cases=case, repeats=1, dtype="fp32")
    assert (found.model, found.dtype) == ("llama", "float32") and found.passed
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    found = profile(stock, cases=case, repeats=1)
    assert found.providers == ("transformers", "transformers+fastattn") and found.passed
    assert found.counted.startswith("torch.utils.flop_counter")


def test_a_family_that_only_transformers_has(tmp_path: Path) -> None:
    config = transformers.MistralConfig(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    found = profile(tmp_path, cases=[Case(2, 9, 3)], repeats=1)
    assert found.passed and found.providers == ("transformers", "transformers+fastattn")
    assert found.rows[1].parity is not None and found.rows[1].parity.passed
    with pytest.raises(ValueError, match=r"fastattn\.models has no such model .*mistral"):
        profile(tmp_path, providers=["fastattn"], cases=[Case(1, 9, 3)])


def test_random_weights_have_one_copy_in_their_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make_random(TINY["llama"], dtype, CPU)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert 0.015 < model.embedding.weight.float().std() < 0.025
        assert bool((model.norm.weight == 1).all())
        weight = model.layers[0].attention.out.weight
        assert (weight.stride(0) == 1) == (dtype == torch.float32)  # as `load` has it


# ---- arithmetic


def test_percentiles_are_numpys() -> None:
    values = [3.0, 1.0, 2.0, 10.0, 4.0, 4.5, 0.5]
    timing = Timing.of(values)
    for share in (20, 50, 80, 95, 99):
        assert getattr(timing, f"p{share}_ms") == pytest.approx(np.percentile(values, share))
    assert timing.samples == 7 and timing.mean_ms == pytest.approx(np.mean(values))


def test_utilization_by_hand() -> None:
    ceilings = Ceilings(100.0, 2.0, "float32", 256.0, 1024)
    timing = Timing.of([10.0])
    phase = Phase.of(timing, 4, Work(flops=5e9, weight_bytes=3e8, cache_bytes=1e8), ceilings)
    assert phase.mbu == pytest.approx(40.0)  # 0.4 GB in 10 ms are 40 GB/s
    assert phase.mfu == pytest.approx(25.0)  # 5 GFLOP in 10 ms are 0.5 TFLOP/s
    assert phase.tokens_per_s == pytest.approx(400.0)


def test_the_higher_of_two_ceilings_counts() -> None:
    one, other = (Ceilings(*rates, "float32", 256.0, 1024) for rates in ((100.0, 2.0), (70.0, 3.0)))
    assert best(one, other) == best(other, one) == Ceilings(100.0, 3.0, "float32", 256.0, 1024)


def test_lengths_leave_the_padding_that_is_asked_for() -> None:
    for padding in (0.0, 0.25, 0.5, 0.75):
        lengths = lengths_with_padding(64, 128, padding)
        assert max(lengths) == 128 and min(lengths) >= 1
        assert sum(lengths) / (64 * 128) == pytest.approx(1 - padding, abs=0.02)


def test_a_sweep_is_all_combinations() -> None:
    cases = make_cases("decoder", parse_sweep(["batch=1,4 prompt=32,128"]), new_tokens=7)
    assert cases == [Case(b, p, 7) for b in (1, 4) for p in (32, 128)]
    assert make_cases("encoder") == [Case(8, 128, 0, 0.0), Case(8, 128, 0, 0.5)]


# ---- what is refused, before a weight is made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "lama-3-8b"], "got 'lama-3-8b' (nearest: llama-3-8b"),
        (["gpt3-medium"], "'gpt3-medium' does not exist"),
        ([], "model or random must be given"),
        (["--random", "gpt2", "--sweep", "batch=1,x"], "sweep of batch must be integers, got 'x'"),
        (["--random", "gpt2", "--sweep", "batsh=1"], "got 'batsh' (nearest: batch)"),
        (["--random", "gpt2", "--sweep", "batch"], "must be words such as batch=1,2,4"),
        (["--random", "gpt2", "--sweep", "batch=1", "batch=2"], "must give batch once"),
        (["--random", "gpt2", "--sweep", "batch=1", "--batch", "2"], "batch must be given once"),
        (["--random", "gpt2", "--batch", "0"], "batch must be at least 1, got 0"),
        (["--random", "gpt2", "--prompt", "1025"], "prompt must be at most 1024 tokens"),
        (["--random", "gpt2", "--prompt", "1000"], "prompt + new_tokens must be at most 1024"),
        (["--random", "bart-base", "--new-tokens", "1024"], "new_tokens + 1 must be at most 1024"),
        (["--random", "bert-base", "--new-tokens", "8"], "--new-tokens must be left out"),
        (["--random", "bert-base", "--padding", "1"], "padding must lie in [0, 1)"),
        (["--random", "gpt2", "--padding", "0.5"], "only encoders are given any"),
        (["--random", "gpt2", "--repeats", "0"], "repeats must be at least 1"),
        (["--random", "gpt2", "--dtype", "int8"], "dtype must be one of fp32, fp16, bf16"),
        (["--random", "gpt2", "--provider", "vllm"], "provider must be one of"),
        (["--random", "gpt2", "--trace", "/nowhere/t.json"], "trace must be a file that can be"),
        (["--random", "gpt2", "--html", "/nowhere/r.html"], "--html must be a file that can be"),
        (["--random", "gpt2", "--plot", "plot.txt"], "--plot must end with one of"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*given: Any) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(run, "run_plan", refuse)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(make_app(), ["profile", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")
    assert "it ran" not in result.output and not [*tmp_path.glob("*.json")]


def test_what_memory_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.profiling.subject.available_bytes", lambda device: 20 * 2**30)
    with pytest.raises(TooLargeError, match=r"llama-3-8b .* needs 29.9 GiB of weights in float32"):
        profile(random="llama-3-8b", providers=["fastattn"], device="cpu")
    # In bfloat16 both share one copy, which fits; with this many keys and values it does not.
    subject = run.open_subject(random="llama-3-8b")
    run.make_plan(subject, dtype="bf16", device="cpu")
    with pytest.raises(TooLargeError, match="of cache"):
        run.make_plan(subject, dtype="bf16", device="cpu", cases=[Case(64, 4096, 32)])


def test_the_command_prints_tables_and_writes_files(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("p.json", "p.html", "p.png")]
    options = [word for pair in zip(("--json", "--html", "--plot"), map(str, files), strict=True)
               for word in pair]  # fmt: skip
    result = CliRunner().invoke(
        make_app(),
        ["profile", "--random", "tiny gpt2", "--sweep", "batch=1,2", "prompt=4,8", "--new-tokens",
         "3", "--repeats", "1", *options],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("batch 2, prompt 8", "transformers", "passed, 100%", "Ceilings of this run"):
        assert text in result.output
    assert len(Profile.load(files[0]).rows) == 8
    assert all(path.stat().st_size > 5000 for path in files)
    shares = Profile.load(files[0]).rows[0].shares[0]
    assert shares.operators[-1].name == OUTSIDE
