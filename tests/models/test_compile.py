"""Steps of decoding whose layers are compiled: the same results, and what is compiled when."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.generation import GenerationConfig, generate
from fastattn.models import load, save
from fastattn.models.decoder import Decoder
from fastattn.models.layers import SMALL_WEIGHT, Linear
from tests.models.test_decoder import DECODERS, assert_same, make_ours


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.fixture
def graphs() -> list[Any]:
    """One entry for each graph that was compiled."""
    return []


def count(graphs: list[Any]) -> Any:
    """A backend that runs what it was given, and notes that it was."""

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def decode(model: Decoder, ids: Tensor, steps: int) -> Tensor:
    """Logits of the last step."""
    logits, session = model.start(ids, max_seqlen=40)
    for step in range(steps):
        logits = model.step(ids[:, step : step + 1], session)
    return logits


@pytest.mark.parametrize("kind", DECODERS)
def test_a_compiled_step_gives_the_same(kind: str, graphs: list[Any]) -> None:
    model = make_ours(**DECODERS[kind])
    ids = torch.randint(3, model.vocab_size, (1, 7))
    model.compile(backend=count(graphs))
    logits = decode(model, ids, 3)
    assert len(graphs) == 2  # both halves, once for all layers and steps
    assert_same(logits, model, [torch.cat((ids[0], ids[0, :3]))])


def test_prompts_batches_and_training_are_not_compiled(graphs: list[Any]) -> None:
    model = make_ours()
    model.compile(backend=count(graphs))
    ids = torch.randint(3, model.vocab_size, (2, 7))
    decode(model, ids, 2)
    model(ids[:1]).sum().backward()
    assert not graphs


def test_the_default_compiler_on_layers_of_some_size() -> None:
    """Whose single rows are sums over a weight, which only a compiler makes fast."""
    sizes = {"hidden_size": 264, "intermediate_size": 270, "tied": True}
    model = make_ours(**sizes)
    weights = [part.weight for part in model.layers.modules() if isinstance(part, Linear)]
    assert any(weight.numel() >= SMALL_WEIGHT for weight in weights)
    ids = torch.randint(3, model.vocab_size, (1, 7))
    want = generate(model, ids, GenerationConfig(8)).tokens
    model.compile()
    assert generate(model, ids, GenerationConfig(8)).tokens.tolist() == want.tolist()
    assert_same(decode(model, ids, 3), model, [torch.cat((ids[0], ids[0, :3]))])


def test_a_compiled_model_is_saved_as_it_was(tmp_path: Path) -> None:
    model = make_ours(**DECODERS["gpt2"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.compile()
    save(model, tmp_path)
    again = load(tmp_path)
    assert dataclasses.asdict(again.config) == dataclasses.asdict(model.config)
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name]), name
