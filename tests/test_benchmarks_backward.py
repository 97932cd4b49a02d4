"""Training in the benchmarks, without a GPU: its cases, its check, its tiles and its targets."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, parity, plan, stages, sweep, targets
from benchmarks.accuracy import WrongResult
from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.gradients import GradientOracle, PartOfDropout
from benchmarks.measure import with_gradients
from benchmarks.progress import Progress
from benchmarks.providers import Provider, find_providers, sdpa_provider
from benchmarks.results import Results
from benchmarks.timing import HostTimer, Timing
from fastattn import attention
from fastattn.dropout import Dropout

CPU = torch.device("cpu")
TINY = Case(2, 80, 4, 2, 16, causal=True, dtype="float32", part="training")


class Spoil(torch.autograd.Function):
    """The identity, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient.clone()), None


def provider(
    name: str = "reference",
    operand: str = "",
    change: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Provider:
    """The reference implementation; `change` may spoil the gradient of one of q, k and v."""

    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            qkv = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
            if operand:
                qkv[operand] = Spoil.apply(qkv[operand], change)
            return attention(*qkv.values(), impl="reference", **inputs.kwargs)

        return run

    return Provider(name, prepare, "1.0")


class StepTimer:
    """Runs everything once; forward takes 2 ms, forward and backward 8 ms."""

    def __call__(self, runs: list[Callable[[], Any]]) -> Timing:
        ms = 8.0 if all(isinstance(run(), dict) for run in runs) else 2.0
        return Timing(ms, ms, ms, 1, "made up")


def make_bench(tmp_path: Path, own_plan: plan.Plan, providers: list[Provider]) -> stages.Bench:
    return stages.Bench(
        plan=own_plan,
        device=CPU,
        chip="interpreter",
        timer=StepTimer(),
        host_timer=HostTimer(calls=1, samples=2),
        providers=providers,
        results=Results(tmp_path / "results.json"),
        progress=Progress(own_plan.total_seconds, io.StringIO()),
    )


def _add(index: tuple[Any, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(gradient: Tensor) -> Tensor:
        gradient[index] += value
        return gradient

    return change


# --- cases


def test_training_counts_seven_products_and_single_launches_what_they_do() -> None:
    case = Case(2, 48, 4, 4, 16, dtype="float32")
    inputs = make_inputs(replace(case, part="training"), CPU)
    run = with_gradients(provider().prepare(inputs), inputs)
    with FlopCounterMode(display=False) as counter:
        run()
    # torch saves the weights, so it does six products; the field counts the scores' again.
    product = case.flops / 2
    assert counter.get_total_flops() == 6 * product
    assert inputs.case.flops == 7 * product == 3.5 * case.flops
    rows, keys = (replace(case, part=part).flops for part in ("rows", "keys"))
    assert rows + keys == 7 * product
    assert replace(case, part="training").bytes == 3 * case.bytes


def test_most_telling_shapes_come_first() -> None:
    found = cases.backward_cases()
    assert len(found) == len(set(found)) == 24 + 5
    first = [(case.seqlen, case.head_dim, case.causal) for case in found[:2]]
    assert first == [(4096, 128, False), (4096, 128, True)]
    assert (found[2].feature, found[2].seqlen) == ("T5 bias", 2048)
    assert {case.feature for case in found} == {
        "plain", "T5 bias", "dense bias", "padded", "dropout",
    }  # fmt: skip
    assert any(case.num_heads_kv < case.num_heads for case in found)
    assert all(case.part == "training" for case in found)
    quick = cases.backward_cases(quick=True)
    assert quick[:4] == found[:4] and set(quick) < set(found)
    tokens = {case.batch * case.seqlen for case in found}
    assert tokens == {case.batch * case.seqlen for case in cases.forward_cases()}


# --- no time without the right gradients


@pytest.mark.parametrize("feature", ["plain", "T5 bias", "dense bias", "padded"])
def test_sdpa_with_dense_tensors_has_the_gradients_of_the_oracle(feature: str) -> None:
    """The table's gradient too, which torch adds up from the dense bias's."""
    inputs = make_inputs(replace(TINY, feature=feature, causal=feature == "plain"), CPU)
    results = with_gradients(sdpa_provider("MATH").prepare(inputs), inputs)()
    # In blocks of rows: what is added up must not depend on them.
    assert GradientOracle(inputs, most_rows=32).check(results).passed
    bias = {"T5 bias": ["dtable"], "dense bias": ["dbias"]}.get(feature, [])
    assert list(results) == ["out", "dq", "dk", "dv", *bias]


def test_dropout_is_checked_against_the_mask_of_the_seed() -> None:
    inputs = make_inputs(replace(TINY, feature="dropout"), CPU)
    oracle = GradientOracle(inputs, most_rows=32)
    run = with_gradients(provider().prepare(inputs), inputs)
    assert oracle.check(run()).passed
    inputs.kwargs["dropout_seed"] += 1
    with pytest.raises(WrongResult, match="max error"):
        oracle.check(run())


def test_part_of_dropout_is_the_part_of_its_mask() -> None:
    seed = torch.tensor([2**40 + 7])
    whole = Dropout(0.3, seed).keep(3, 4, 20, 10)
    part = PartOfDropout(0.3, seed, first_sequence=1, first_head=2, first_row=5)
    assert torch.equal(part.keep(1, 2, 7, 10), whole[1:2, 2:4, 5:12])


@pytest.mark.parametrize(
    ("operand", "change", "message"),
    [
        ("q", _add((1, 79, 3, 5), 0.05), "dq FAILED"),
        ("k", lambda gradient: gradient * 1.01, "dk FAILED"),
        ("k", _add((0, 40, 0, 3), 0.1), "dk FAILED"),
        ("v", _add((1, 0, 1, 0), 0.05), "dv FAILED"),
        # A head that is not compared with anything must be finite at least.
        ("v", _add((0, 7, 1, 0), math.nan), "elements of dv"),
    ],
)
def test_a_provider_whose_gradient_is_wrong_gets_no_time(
    operand: str, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    providers = [
        provider("fastattn"),
        provider("wrong", operand, change),
        replace(provider("forward only"), trains=False),
    ]
    own_plan = plan.Plan(stages=["backward"], backward=[TINY], total_seconds=300)
    bench = make_bench(tmp_path, own_plan, providers)
    assert stages.run_plan(bench)
    document = json.loads(bench.results.path.read_text())
    rows = {row["provider"]: row for row in document["rows"]}
    assert message in rows["wrong"]["error"] and "ms" not in rows["wrong"]
    assert rows["forward only"]["skipped"] == "it has no backward pass"
    ours = rows["fastattn"]
    assert (ours["ms"], ours["forward_ms"], ours["backward_ms"]) == (8.0, 2.0, 6.0)
    assert ours["tflops"] == pytest.approx(TINY.flops / 8e9, rel=1e-5)
    assert ours["backward_tflops"] == pytest.approx(TINY.flops * 5 / 7 / 6e9, rel=1e-5)


def test_our_own_wrong_gradient_fails_the_run(tmp_path: Path) -> None:
    own_plan = plan.Plan(stages=["backward"], backward=[TINY], total_seconds=300)
    wrong = provider("fastattn", "k", lambda gradient: gradient * 1.01)
    bench = make_bench(tmp_path, own_plan, [wrong, provider()])
    assert not stages.run_plan(bench)
    assert len(bench.failures) == 1 and "backward, " in bench.failures[0]


def test_a_peers_dropout_is_checked_without_dropping(tmp_path: Path) -> None:
    case = replace(TINY, feature="dropout", num_heads_kv=4)
    own_plan = plan.Plan(stages=["backward"], backward=[case], total_seconds=300)
    wrong = replace(sdpa_provider("MATH"), name="wrong")
    wrong = replace(wrong, prepare=lambda inputs: _scaled(sdpa_provider("MATH"), inputs))
    bench = make_bench(tmp_path, own_plan, [provider("fastattn"), sdpa_provider("MATH"), wrong])
    assert stages.run_plan(bench)
    ours, peer, spoiled = bench.results.rows
    assert "ms" in ours and "checked" not in ours
    assert "ms" in peer and peer["checked"] == "without dropout"
    assert "FAILED" in spoiled["error"]


def _scaled(base: Provider, inputs: Inputs) -> Callable[[], Tensor]:
    run = base.prepare(inputs)
    return lambda: Spoil.apply(run(), lambda gradient: gradient * 1.01)


def test_peers_that_do_not_train_are_named() -> None:
    found = {provider.name: provider for provider in find_providers()}
    math_backend = found["SDPA MATH"]
    assert math_backend.skip(Case(16, 1024, 32, 32, 64, part="training")) == ""
    assert math_backend.skip(Case(4, 4096, 16, 16, 128, part="training"))
    assert found["SDPA FLASH"].skip(replace(TINY, feature="dropout")) == ""
    assert found["SDPA FLASH"].skip(replace(TINY, feature="T5 bias"))


# --- tiles


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_backward_tile_that_dispatch_may_choose_is_checked(chip: str) -> None:
    from fastattn.kernels.attention import config as tile_configs

    checked = parity.gradient_checks(chip, parity.DTYPES)
    assert len(checked) == len(set(checked))
    found = {
        (check.rows, check.keys, check.head_dim, check.dtype, check.causal) for check in checked
    }
    tables = (tile_configs.HALF_BACKWARD_CONFIGS, tile_configs.FLOAT32_BACKWARD_CONFIGS)
    biases = {
        (check.bias, check.head_dim, check.dtype)
        for check in checked
        if "dense bias" in check.modifiers and check.shape[0] > 1
    }
    for name, dtype in parity.DTYPES.items():
        by_head_dim = tables[name == "fp32"][chip]
        seen = set()
        for head_dim, tiles in by_head_dim.items():
            for count in (0, 1, 2, 5):
                for by_distance in (False, True) if count else (False,):
                    chosen = tile_configs.select_backward_config(
                        chip, head_dim, dtype, count, by_distance
                    )
                    seen |= {(head_dim, chosen.rows), (head_dim, chosen.keys)}
                    rows, keys, bias = map(parity.as_tuple, (chosen.rows, chosen.keys, chosen.bias))
                    assert (bias, head_dim, name) in biases
                    for causal in (False, True):
                        assert (rows, keys, head_dim, name, causal) in found
            # Nothing that the table holds was left out above.
            for tile in (
                tiles.by_distance, *vars(tiles.rows).values(), *vars(tiles.keys).values()
            ):  # fmt: skip
                assert (head_dim, tile) in seen
    for check in checked:
        _, seqlen_q, seqlen_k, *_ = check.shape
        for seqlen in (seqlen_q, seqlen_k):
            assert seqlen % 16 == 0
            assert all(seqlen % size for tile in (check.rows, check.keys) for size in tile[:2]
                       if size > 16)  # fmt: skip
    groups = {check.shape[3] // check.shape[4] for check in checked}
    assert groups == {1, 2}


def test_a_tile_keeps_its_limit_of_registers() -> None:
    from fastattn.kernels.attention import config as tile_configs

    tile = tile_configs.TileConfig(32, 32, 8, 1, 255)
    assert tile_configs.TileConfig(*parity.as_tuple(tile)) == tile
    assert parity.show_config(parity.as_tuple(tile)) == "32x32 w8 s1 r255"
    assert "r255" in str(parity.gradient_checks("sm_90", ["fp32"])[0])


SMALL = parity.GradientCheck(
    (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), 16, "fp32", shape=(2, 80, 112, 2, 1)
)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("modifiers", "causal"),
    [(("T5 bias", "softcap"), True), (("dense bias",), False), (("dropout",), True)],
)
def test_check_of_backward_tiles_passes(modifiers: tuple[str, ...], causal: bool) -> None:
    result = parity.run_check(replace(SMALL, modifiers=modifiers, causal=causal), "cpu")
    assert "error" not in result and result["max_error"] <= result["allowed_max_error"]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("from_call", "value", "message"),
    [(1, math.nan, "dk FAILED"), (1, 0.01, "dk FAILED"), (2, 1e-8, "two runs differ in 1 of")],
)
def test_check_of_backward_tiles_finds_wrong_and_unsteady_ones(
    from_call: int, value: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.kernels import attention as kernels

    launch, calls = kernels.launch_attention_backward, []

    def wrong_launch(*args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)
        calls.append(kwargs["config"])
        if len(calls) >= from_call:
            dk = args[8].dk
            dk[0, 5, 0, 3] = dk[0, 5, 0, 3] * (1 + value) + value

    monkeypatch.setattr(kernels, "launch_attention_backward", wrong_launch)
    tiles = {"rows": (32, 64, 4, 1), "keys": (64, 32, 4, 1), "bias": (32, 32, 4, 1)}
    task = replace(SMALL, shape=(1, 80, 112, 2, 2), **tiles)
    assert message in parity.run_check(task, "cpu")["error"]
    assert {name: parity.as_tuple(tile) for name, tile in vars(calls[0]).items()} == tiles


@pytest.mark.interpreter
def test_check_of_a_feature_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.kernels import attention as kernels

    check = parity.FeatureCheck("one past a tile", "fp32")
    assert "error" not in parity.run_check(check, "cpu")
    launch = kernels.launch_attention_backward

    def wrong_launch(*args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)
        args[8].dv[0, 64] *= 1.01

    monkeypatch.setattr(kernels, "launch_attention_backward", wrong_launch)
    assert "dv (max error" in parity.run_check(check, "cpu")["error"]


@pytest.mark.interpreter
@pytest.mark.parametrize("part", ["rows", "keys"])
def test_a_single_launch_is_checked_by_its_own_gradients(part: str) -> None:
    inputs = make_inputs(replace(TINY, part=part), CPU)
    results = sweep.tile_provider((64, 32, 4, 1), part).prepare(inputs)()
    oracle = GradientOracle(inputs)
    assert oracle.check(results).passed
    with pytest.raises(WrongResult, match="expected"):
        oracle.check({})
    name = list(results)[-1]
    results[name][-1, -1] = 0
    with pytest.raises(WrongResult, match=f"{name} FAILED"):
        oracle.check(results)


def test_sweep_checks_each_walk_beside_todays_other() -> None:
    from fastattn.kernels.attention import config as tile_configs

    found = cases.sweep_cases(quick=True)
    assert {case.part for case in found} == {"forward", "rows", "keys"}
    names = {"rows": "BACKWARD_ROWS_CANDIDATES", "keys": "BACKWARD_KEYS_CANDIDATES"}
    for case in found:
        if case.part == "forward":
            continue
        tiles = sweep.candidates("sm_90", case)
        assert tiles[0] == sweep.current_tile("sm_90", case)
        assert set(map(parity.as_tuple, getattr(tile_configs, names[case.part]))) <= set(tiles)
        today = parity.backward_tiles("sm_90", case.head_dim, "bf16")
        for tile in tiles:
            check = sweep.check_of("sm_90", case, tile)
            swept = {"rows": (tile, today[1]), "keys": (today[0], tile)}[case.part]
            assert (check.rows, check.keys) == swept
            assert (check.head_dim, check.causal) == (case.head_dim, case.causal)
            assert check.shape[3] == check.shape[4]  # no groups, as in what is timed


# --- targets


def timed(case: Case, name: str, ms: float | None) -> dict[str, Any]:
    row = {"stage": "backward", "provider": name, "case": case.to_dict()}
    return {**row, "error": "wrong"} if ms is None else {**row, "ms": ms}


def plain(seqlen: int, ours: float | None, flash: float | None, **kwargs: Any) -> list[dict]:
    case = Case(4, seqlen, 16, 16, 128, part="training", **kwargs)
    return [timed(case, "fastattn", ours), timed(case, "SDPA FLASH", flash)]


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [target["met"] for target in targets.evaluate(rows)]


def test_targets_without_figures_are_not_measured() -> None:
    assert verdicts([]) == [None] * 4
    # Other dtypes, grouped heads, other stages and faster peers of other names say nothing.
    rows = plain(4096, 1.0, 2.0, dtype="float16")
    rows += [{**row, "stage": "forward"} for row in plain(4096, 1.0, 2.0)]
    grouped = Case(4, 4096, 32, 8, 128, causal=True, part="training")
    rows += [timed(grouped, "fastattn", 1.0), timed(grouped, "SDPA FLASH", 2.0)]
    assert verdicts(rows) == [None] * 4
    (target, *_) = targets.evaluate(plain(4096, 1.0, None))
    assert target["met"] is None and target["missing"] == {"N=4096": "no peer has a time"}


def test_flash_target_is_met_only_where_every_length_is_ahead() -> None:
    assert verdicts(plain(4096, 1.0, 1.1))[:2] == [True, None]
    assert verdicts(plain(4096, 1.0, 1.1, causal=True))[:2] == [None, True]
    assert verdicts(plain(4096, 1.0, 1.0))[0] is False  # ahead, not level
    rows = plain(4096, 1.0, 1.1) + plain(16384, 1.0, 0.9)
    (target, *_) = targets.evaluate(rows)
    assert target["met"] is False
    assert target["measured"] == {"N=4096": pytest.approx(1.1), "N=16384": pytest.approx(0.9)}
    assert verdicts(plain(4096, 1.0, 1.1) + plain(16384, None, 0.9))[0] is False
    # A faster peer that is not FlashAttention-2 is not what this target is about.
    case = Case(4, 4096, 16, 16, 128, part="training")
    assert verdicts([*plain(4096, 1.0, 1.1), timed(case, "SDPA CUDNN", 0.5)])[0] is True


def test_t5_target_takes_the_best_of_sdpa_with_each_dense_bias() -> None:
    table, dense = (
        Case(8, 2048, 16, 16, 64, feature=feature, part="training")
        for feature in ("T5 bias", "dense bias")
    )
    rows = [timed(table, "fastattn", 1.0), timed(table, "SDPA MATH", 9.0)]
    rows += [timed(table, "SDPA EFFICIENT", 2.0), timed(table, "SDPA CUDNN", None)]
    _, _, from_table, alone = targets.evaluate(rows)
    assert from_table["met"] is True and from_table["peers"] == {"N=2048": "SDPA EFFICIENT"}
    assert from_table["missing"] == {"N=2048, SDPA CUDNN": "wrong"}
    assert alone["met"] is None
    rows += [timed(dense, "fastattn", 0.1), timed(dense, "SDPA EFFICIENT", 1.9)]
    assert verdicts(rows)[2:] == [True, False]
    rows[0] = timed(table, "fastattn", None)
    assert verdicts(rows)[2:] == [False, False]
