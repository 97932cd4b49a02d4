"""FLOPs by formula are torch's, and bytes are those of parameters and cache tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastattn import Window
from fastattn.profiling import counts as module
from fastattn.profiling.counts import MeasuredCounts, causal_pairs, count
from fastattn.profiling.providers import Ours, Stock
from fastattn.profiling.stock import make_stock
from fastattn.profiling.subject import make_random
from tests.profiling.tiny import TINY

CPU = torch.device("cpu")
GENERATING = ("llama", "tied", "gpt2", "t5", "gated t5", "bart")
BATCH, PROMPT = 3, 9


def pair(name: str) -> tuple[Any, Stock]:
    ours = make_random(TINY[name], torch.float32, CPU)
    return ours, Stock(make_stock(ours, attention="eager"))


def prompts() -> torch.Tensor:
    return torch.randint(3, 100, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0))


def flops(run: Any) -> tuple[int, Any]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (7, 0), (7, 5), (1, 12)])
def test_causal_pairs_are_those_that_the_mask_shows(
    tokens: int, before: int, window: int | None
) -> None:
    keys = before + tokens
    mask = Window(keys if window is None else window - 1, 0)
    assert causal_pairs(tokens, before, window) == int(mask.dense(tokens, keys).sum())


@pytest.mark.parametrize("name", GENERATING)
def test_flops_are_those_that_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = pair(name)
    counts, lengths = count(ours), [PROMPT] * BATCH
    found, (_, decoding) = flops(lambda: stock.start(prompts(), 4))
    # Eager attention computes what the mask then hides.
    with monkeypatch.context() as patch:
        patch.setattr(module, "causal_pairs", lambda n, before=0, window=None: n * (before + n))
        assert counts.prefill(lengths).flops == found
    if name in ("llama", "tied", "gpt2"):
        assert counts.prefill(lengths).flops < found
    for position in range(counts.cached(PROMPT), counts.cached(PROMPT) + 2):
        found, _ = flops(decoding.step)
        assert counts.step(lengths, position).flops == found


def test_flops_of_an_encoder_are_those_that_torch_counts() -> None:
    ours, stock = pair("bert")
    ids = prompts()
    found, _ = flops(lambda: stock.encode(ids, torch.ones_like(ids).bool()))
    assert count(ours).prefill([PROMPT] * BATCH).flops == found
    # Rows of other lengths: as if each stood alone.
    alone = [count(ours).prefill([n]).flops for n in (2, 5, 9)]
    assert count(ours).prefill([2, 5, 9]).flops == sum(alone)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "bert", "t5", "gated t5", "bart"])
def test_weight_bytes_are_those_of_the_parameters_that_are_read(name: str) -> None:
    ours, stock = pair(name)
    model = stock.model
    whole = sum(parameter.nbytes for parameter in model.parameters())
    head = model.get_output_embeddings()
    tables = {
        module.weight.data_ptr(): module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight.shape[0] > 32  # no T5 bias table
        and (head is None or module.weight is not head.weight)
    }  # fmt: skip
    if name == "bert":  # has two token types
        types = model.embeddings.token_type_embeddings.weight
        tables[types.data_ptr()] = types
    whole -= sum(table.nbytes for table in tables.values())
    work = count(ours).prefill([1])
    # A row of each of the other tables, for one token; encoder and decoder have one each.
    rows = {"llama": 1, "tied": 0, "gpt2": 1, "bert": 3, "t5": 0, "gated t5": 2, "bart": 2}[name]
    bias = 4 * 120 if name == "bart" else 0  # of the logits, a buffer there
    assert work.weight_bytes == whole + 4 * 32 * rows + bias


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_step_reads_the_decoder_alone(name: str) -> None:
    ours, stock = pair(name)
    model = stock.model
    read = sum(p.nbytes for p in model.get_decoder().parameters())
    for part, parameter in model.get_decoder().named_parameters():
        crossed = "EncDecAttention" in part or "encoder_attn." in part
        if (crossed and part.split(".")[-2] in ("k", "v", "k_proj", "v_proj")) or (
            "embed_positions" in part
        ):
            read -= parameter.nbytes
    others = 4 * 32 + 4 * 120 if name == "bart" else 0  # a position, and the logits' bias
    assert count(ours).step([PROMPT], 1).weight_bytes == read + others


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_cache_bytes_are_those_of_the_cache(name: str) -> None:
    ours, stock = pair(name)
    counts, lengths = count(ours), [PROMPT] * BATCH
    with torch.no_grad():
        _, decoding = stock.start(prompts(), 4)
        for position in range(counts.cached(PROMPT), counts.cached(PROMPT) + 2):
            decoding.step()
            held = sum(tensor.nbytes for tensor in decoding.cache_tensors())
            assert counts.step(lengths, position).cache_bytes == held


def test_a_window_bounds_what_a_step_reads() -> None:
    counts = count(make_random(TINY["window"], torch.float32, CPU))
    per_token = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8, float32
    assert counts.step([30], 30).cache_bytes == per_token * (31 + 5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_model_of_transformers_alone_is_counted_while_it_runs(name: str) -> None:
    ours, _ = pair(name)
    stock = Stock(make_stock(ours))  # SDPA, which torch does not count on a CPU
    measured, formulas = MeasuredCounts(stock, CPU), count(ours)
    lengths, first = [PROMPT] * BATCH, formulas.cached(PROMPT)
    for position in (first, first + 5):
        found, wanted = measured.step(lengths, position), formulas.step(lengths, position)
        assert (found.flops, found.cache_bytes) == (wanted.flops, wanted.cache_bytes)
    assert stock.model.config._attn_implementation == "sdpa"


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"one of fastattn\.models, got Linear"):
        count(nn.Linear(2, 2))


def test_ours_has_the_cache_that_is_counted() -> None:
    ours, _ = pair("llama")
    with torch.no_grad():
        _, decoding = Ours(ours).start(prompts(), 4)
    held = sum(tensor.nbytes for tensor in decoding.cache_tensors())
    room = PROMPT + 4 + 16  # the session's own for a step's padding
    assert held == count(ours).step([PROMPT] * BATCH, room - 1).cache_bytes
