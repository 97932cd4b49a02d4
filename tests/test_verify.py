"""`fastattn verify`: it passes what is right, and above all fails what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from torch import Tensor
from typer.testing import CliRunner

from fastattn import ALiBi, T5Bias, dispatch, functional, reference, torch_ops
from fastattn.cli.verify import verify as verify_command
from fastattn.problem import AttentionProblem
from fastattn.testing.features import FEATURES, Draw, Feature
from fastattn.testing.gradients import DIFFERENTIABLE, run
from fastattn.testing.verify import Result, check_feature, find_features, verify
from fastattn.testing.verify_model import SENTENCES, verify_model

ROOT = Path(__file__).parents[1]
SMALL = ("one query, one key", "no keys")
ROWS = [row for row in FEATURES if row.name in SMALL]

app = typer.Typer()
app.command()(verify_command)
runner = CliRunner()


# The function.


def test_every_row_and_dtype_has_a_result_in_order(device: str) -> None:
    seen: list[Result] = []
    results = verify(device, ["fp32", "bf16"], ROWS, progress=seen.append)
    assert [(r.feature, r.dtype) for r in results] == [
        (name, dtype) for name in SMALL for dtype in ("fp32", "bf16")
    ]
    assert seen == results
    assert all(result.passed and result.verdict == "pass" for result in results)
    assert set(results[0].parts) == {"out", "lse"}
    assert set(results[2].parts) == {"out", "lse", "weights"}
    assert json.loads(json.dumps(results[0].to_dict()))["parts"]["out"]["passed"] is True


@pytest.mark.interpreter
def test_several_processes_give_the_same_results() -> None:
    def numbers(results: list[Result]) -> list[Any]:
        return [{**result.to_dict(), "seconds": 0} for result in results]

    together = verify("cpu", ["fp32", "fp16"], ROWS, grad=True, jobs=2)
    assert "dq" in together[0].parts
    assert numbers(together) == numbers(verify("cpu", ["fp32", "fp16"], ROWS, grad=True))


def test_a_row_that_raises_is_a_failure_and_the_others_run(device: str) -> None:
    def broken(draw: Any) -> dict[str, Any]:
        return {"softcap": -1.0}

    results = verify(device, ["fp32"], [Feature("broken", broken), ROWS[0]])
    assert [result.passed for result in results] == [False, True]
    assert results[0].verdict.startswith("FAIL: ValueError: softcap must be")
    assert results[0].to_dict()["error"]


def _row(name: str) -> Feature:
    return next(row for row in FEATURES if row.name == name)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("part", ["out", "lse"])
def test_a_wrong_result_fails(
    part: str, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element of one row, off by 16 rounding units of the largest."""
    right = torch_ops.attention_forward

    def wrong(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        results = dict(zip(("out", "lse"), right(problem), strict=True))
        off = results[part].double()
        off.view(-1)[off.numel() // 2] += 16 * torch.finfo(problem.q.dtype).eps * off.abs().max()
        results[part] = off.to(results[part].dtype)
        return results["out"], results["lse"]

    row = _row("one past a tile")
    assert check_feature(row, dtype, device).passed
    monkeypatch.setattr(torch_ops, "attention_forward", wrong)
    result = check_feature(row, dtype, device)
    assert not result.passed
    assert [name for name, found in result.parts.items() if not found.passed] == [part]
    assert result.verdict.startswith(f"FAIL: {part} (max error")
    assert "PyTorch" in str(result)


def test_rows_that_are_not_written_fail(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = torch_ops.kernels()
    monkeypatch.setattr(attention, "launch_attention_forward", lambda *args, **kwargs: None)
    result = check_feature(_row("one query, one key"), "fp32", device)
    assert result.verdict == "FAIL: out (NaN or infinity), lse (NaN or infinity)"


@pytest.mark.interpreter
def test_a_read_outside_of_an_operand_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A k that claims one row more than there is: in its storage, but not its own."""
    launch = torch_ops.kernels().launch_attention_forward

    def past_the_end(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> None:
        longer = k.as_strided((*k.shape[:1], k.shape[1] + 1, *k.shape[2:]), k.stride())
        launch(q, longer, *args, **kwargs)

    monkeypatch.setattr(torch_ops.kernels(), "launch_attention_forward", past_the_end)
    (result,) = verify("cpu", ["fp32"], [_row("strides with gaps everywhere")])
    assert "OutOfBoundsError" in result.verdict


# Gradients.

GRADIENTS = [f"d{name}" for name in DIFFERENTIABLE]


def _all_tensors(draw: Draw) -> dict[str, Any]:
    bias = ALiBi(draw.slopes(2)) + T5Bias(draw.normal(8, 2), max_distance=20)
    return {"bias": bias + draw.normal(2, 9, 12), "sinks": draw.normal(2)}


ALL_TENSORS = Feature("all tensors", _all_tensors, seqlen_q=9, seqlen_k=12, head_dim=8)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_gradient_is_a_part(dtype: str, device: str) -> None:
    result = check_feature(ALL_TENSORS, dtype, device, grad=True)
    assert result.passed, str(result)
    assert list(result.parts) == ["out", "lse", *GRADIENTS]
    plain = check_feature(ALL_TENSORS, dtype, device)
    assert list(plain.parts) == ["out", "lse"]
    assert plain.worst_gradient is None
    assert {name: result.parts[name] for name in plain.parts} == plain.parts
    results = verify(device, [dtype], [ALL_TENSORS, ROWS[0]], grad=True)
    assert results[0].parts == result.parts
    assert list(results[1].parts) == ["out", "lse", "dq", "dk", "dv"]


@pytest.mark.parametrize("part", GRADIENTS)
def test_a_wrong_gradient_fails(part: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of one gradient, off by 16 rounding units of the largest."""
    kernels = torch_ops.kernels()
    right = kernels.launch_attention_backward

    def wrong(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        (gradients,) = (arg for arg in args if isinstance(arg, kernels.Gradients))
        off = getattr(gradients, {"dtable": "drelative"}.get(part, part))
        largest = off.abs().max()
        if part == "dtable":  # a bucket's gradient is the sum over its distances
            largest = off.abs().sum()
        off.view(-1)[off.numel() // 2] += 16 * torch.finfo(torch.bfloat16).eps * largest

    monkeypatch.setattr(kernels, "launch_attention_backward", wrong)
    result = check_feature(ALL_TENSORS, "bf16", device, grad=True)
    assert [name for name, found in result.parts.items() if not found.passed] == [part]
    assert result.worst_gradient == part
    assert result.verdict.startswith(f"FAIL: {part} (max error")


def test_gradients_that_are_not_written_fail(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = torch_ops.kernels()
    monkeypatch.setattr(kernels, "launch_attention_backward", lambda *args, **kwargs: None)
    result = check_feature(_row("one query, one key"), "fp32", device, grad=True)
    assert result.verdict == "FAIL: " + ", ".join(f"d{x} (NaN or infinity)" for x in "qkv")


@pytest.mark.interpreter
@pytest.mark.parametrize("position", [1, 5], ids=["k", "dout"])
def test_a_backward_read_between_the_elements_of_an_operand_fails(
    position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = torch_ops.kernels().launch_attention_backward

    def one_further(*args: Any, **kwargs: Any) -> None:
        operands = list(args)
        tensor = operands[position]
        operands[position] = tensor.as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset() + 1
        )
        launch(*operands, **kwargs)

    monkeypatch.setattr(torch_ops.kernels(), "launch_attention_backward", one_further)
    row = _row("strides with gaps everywhere")
    (result,) = verify("cpu", ["fp32"], [row], grad=True)
    assert "OutOfBoundsError" in result.verdict


def test_incoming_gradients_have_the_strides_of_the_row() -> None:
    for row in FEATURES:
        case = row.case(torch.float16)
        out, lse = row.output_gradients(case)
        with torch.no_grad():
            results = run(reference.attention, case)
        for name, start in (("out", out), ("lse", lse)):
            if start is not None:
                assert (start.shape, start.dtype) == (results[name].shape, results[name].dtype)
                assert bool(torch.isfinite(start).all())
    gaps = _row("strides with gaps everywhere")
    out, lse = gaps.output_gradients(gaps.case(torch.float32))
    assert out is not None and lse is not None
    assert min(out.stride()) > 1
    assert min(lse.stride()) > 1
    ones, no_lse = _row("gradient of out.sum()").output_gradients(ROWS[0].case(torch.float32))
    assert ones is not None and no_lse is None
    assert set(ones.stride()) == {0}
    with pytest.raises(ValueError, match=r"gradient must be one of .*'none'"):
        Feature("mine", gradient="none").output_gradients(ROWS[0].case(torch.float32))


def test_a_reference_that_gives_nan_is_no_measure(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reference.attention

    def square_root_of_nothing(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, lse = right(q, *args, **kwargs)
        return out + (q * 0).sqrt(), lse

    row = _row("one query, one key")
    monkeypatch.setattr(reference, "attention", square_root_of_nothing)
    with pytest.raises(ValueError, match="dq of the reference in float64 is NaN"):
        check_feature(row, "fp32", device, impl="reference", grad=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtypes": ["fp8"]}, "dtype must be one of .*'fp8'"),
        ({"jobs": 0}, "jobs must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify("cpu", **arguments)


def test_rows_of_ones_own_stay_in_this_process(device: str) -> None:
    if device == "cpu":
        with pytest.raises(ValueError, match="jobs must be 1 for rows that are not in FEATURES"):
            verify(device, ["fp32"], [Feature("mine"), ROWS[0]], jobs=2)


def test_where_kernels_cannot_run_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "is_interpreting", lambda: False)
    with pytest.raises(RuntimeError, match=r"kernels cannot run on cpu: .*TRITON_INTERPRET=1"):
        verify("cpu")


# The command.


@pytest.mark.interpreter
def test_command_passes(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--feature", "one query, one", "--json", str(path)]
    result = runner.invoke(app, [*arguments, "--jobs", "1"])
    assert result.exit_code == 0, result.output
    assert "3 of 3 passed on cpu, in Triton's interpreter" in result.output
    for word in ("feature", "dtype", "fastattn", "torch", "ratio", "fp32", "fp16", "bf16", "pass"):
        assert word in result.output
    written = json.loads(path.read_text())
    assert written["passed"] is True
    assert written["versions"]["torch"] == torch.__version__
    assert [row["dtype"] for row in written["results"]] == ["fp32", "fp16", "bf16"]


@pytest.mark.interpreter
def test_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: AttentionProblem) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(problem.q), torch.zeros(2, 2, 1)

    monkeypatch.setattr(torch_ops, "attention_forward", wrong)
    path = tmp_path / "results.json"
    arguments = ["--device", "cpu", "--feature", "one query, one", "--dtype", "fp16", "--jobs", "1"]
    result = runner.invoke(app, [*arguments, "--json", str(path)])
    assert result.exit_code == 1
    assert "FAIL: out (max error, RMS error), lse (max error, RMS error)" in result.output
    assert "0 of 1 passed" in result.output
    assert json.loads(path.read_text())["passed"] is False


@pytest.mark.interpreter
def test_command_with_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    arguments = ["--grad", "--device", "cpu", "--feature", "sinks, rows", "--dtype", "bf16"]
    arguments += ["--json", str(path), "--jobs", "1"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 of 1 passed" in result.output
    (row,) = (line for line in result.output.splitlines() if "sinks, rows" in line)
    assert any(name in row.split() for name in GRADIENTS)
    written = json.loads(path.read_text())
    assert written["grad"] is True
    parts = written["results"][0]["parts"]
    assert list(parts) == ["out", "lse", "dq", "dk", "dv", "dsinks"]

    kernels = torch_ops.kernels()
    monkeypatch.setattr(kernels, "launch_attention_backward", lambda *args, **kwargs: None)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1
    assert "dsinks" in result.output
    assert json.loads(path.read_text())["passed"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grad", "--model", "folder"], "gradients are verified feature by feature"),
        (["--feature", "no such row"], "feature must be part of one of these names"),
        (["--dtype", "fp8"], "dtype must be one of"),
        (["--device", "tpu"], "expected cpu or cuda, got tpu"),
    ],
)
@pytest.mark.interpreter
def test_command_refuses(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    # Typer breaks long messages into lines of a box.
    assert message in " ".join(result.output.replace("│", " ").split())


def test_command_turns_the_interpreter_on_though_triton_is_imported() -> None:
    code = "import triton, typer; from fastattn.cli.verify import verify; typer.run(verify)"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    arguments = ["--device", "cpu", "--feature", SMALL[0], "--dtype", "fp32", "--jobs", "1"]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert "1 of 1 passed on cpu, in Triton's interpreter" in process.stdout


# Models.


def _save_tokenizer(folder: Path) -> int:
    """A tokenizer of the words of the sentences; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"])
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    )
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=_save_tokenizer(folder), hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=96, max_position_embeddings=128,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_encoder_on_sentences(bert: str, dtype: str) -> None:
    result = verify_model(bert, "cpu", dtype, impl="sdpa")
    assert result.passed, result
    assert (result.layers_served, result.layers_total) == (2, 2)
    assert list(result.parts) == [f"hidden state {i}" for i in range(3)] + ["logits"]
    assert result.argmax is not None
    assert "2 of 2 attention layers served" in result.report
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True


def test_a_decoder_without_tokenizer_on_random_tokens(llama: str, device: str) -> None:
    """Grouped heads and a causal mask, in the kernels."""
    result = verify_model(llama, device, "fp32", impl="triton")
    assert result.passed, result
    assert result.layers_served == result.layers_total == 2
    assert "_attention_forward_kernel" in result.report


def test_an_encoder_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    result = verify_model(str(tmp_path), "cpu", "fp32")
    assert result.passed, result
    assert result.layers_served == result.layers_total == 3
    assert list(result.parts) == [
        f"{side} hidden state {i}" for side in ("encoder", "decoder") for i in range(2)
    ] + ["logits"]


def test_a_model_that_is_computed_wrongly_fails(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.attention

    def wrong(*args: Any, mask: Any = None, **kwargs: Any) -> Any:
        return right(*args, **kwargs)  # attends to the padding

    monkeypatch.setattr(functional, "attention", wrong)
    result = verify_model(bert, "cpu", "fp32")
    assert not result.passed
    assert result.parts["hidden state 0"].passed
    assert not result.parts["hidden state 1"].passed


def test_command_on_a_model(bert: str) -> None:
    result = runner.invoke(app, ["--device", "cpu", "--model", bert])
    assert result.exit_code == 0, result.output
    for text in ("BertForMaskedLM, fp32", "hidden state 2", "argmax of the logits", "2 of 2"):
        assert text in result.output


def test_command_on_a_model_that_does_not_exist(tmp_path: Path) -> None:
    result = runner.invoke(app, ["--device", "cpu", "--model", str(tmp_path / "nothing")])
    assert result.exit_code == 2


def test_names_of_rows_are_fit_for_a_command_line() -> None:
    for row in find_features():
        assert row in find_features(row.name)
        assert row.name == row.name.strip()
        assert len(row.name) <= 45
