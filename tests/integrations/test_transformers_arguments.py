"""Wrong uses of the Hugging Face integration that would change results in silence."""

import itertools
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import AttentionInterface, AttentionMaskInterface

import fastattn.integrations.transformers as fastattn_hf
from fastattn.integrations import transformers_arguments as arguments
from tests.integrations.families import VOCAB, family, results


@pytest.fixture(autouse=True)
def _names_as_they_were() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for interface in (AttentionInterface, AttentionMaskInterface):
            patch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
        yield


@pytest.fixture
def file(monkeypatch) -> types.ModuleType:
    """A file with a model in it, which has an attention class."""
    module = types.ModuleType("modeling_made_up")
    monkeypatch.setitem(sys.modules, "modeling_made_up", module)
    module.Attention = type("Attention", (torch.nn.Module,), {"__module__": "modeling_made_up"})
    return module


def call(layer: torch.nn.Module, **kwargs):
    q = torch.randn(1, 2, 4, 8)
    return fastattn_hf.attention_forward(layer, q, q, q, None, **kwargs)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(arguments.UNSERVED))
def test_arguments_that_change_the_result_raise(name):
    layer = torch.nn.Identity()
    with pytest.raises(NotImplementedError, match=f"Identity passes {name}, which changes"):
        call(layer, **{name: torch.ones(2)})
    call(layer, **{name: None})


def test_what_the_models_own_attention_uses_raises(file):
    def eager_attention_forward(module, query, key, value, attention_mask, tilt=None, **kwargs):
        return query * kwargs.get("hidden_tilt", 1) + tilt

    file.eager_attention_forward = eager_attention_forward
    layer = file.Attention()
    for name in ("tilt", "hidden_tilt"):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=f"Attention passes {name}, which"):
                call(layer, **{name: torch.ones(2)})
        call(layer, **{name: None})
    heir = type("Heir", (file.Attention,), {"__module__": __name__})()
    with pytest.raises(NotImplementedError, match="Heir passes tilt"):
        call(heir, tilt=1.0)


def test_what_the_models_own_attention_never_looks_at_is_ignored(file):
    def eager_attention_forward(module, query, key, value, attention_mask, **kwargs):
        return query

    file.eager_attention_forward = eager_attention_forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(file.Attention(), colour="red")


def test_what_nobody_knows_warns_once(file):
    layer = file.Attention()
    with pytest.warns(fastattn_hf.UnknownArgumentWarning, match="Attention passes colour"):
        call(layer, colour="red")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(layer, colour="blue", use_cache=True, position_ids=torch.arange(4))


def test_every_argument_that_models_pass_is_known():
    """Of this release of transformers: a new one must be judged, and put into one of the lists."""
    positional = {"module", "query", "key", "value", "scale"}
    known = arguments.SERVED | arguments.UNSERVED | arguments.HARMLESS | positional
    passed: dict[str, str] = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for lines in path.read_text().split("attention_interface(\n")[1:]:
            indent = re.match(" *", lines)[0]
            own = itertools.takewhile(lambda line: line.startswith(indent), lines.splitlines())  # noqa: B023
            for found in (re.match(rf"{indent}(\w+)=", line) for line in own):
                if found:
                    passed[found[1]] = path.stem
    assert len(passed) > 12 and {"scaling", "sliding_window", "indices"} <= passed.keys()
    assert {name: where for name, where in passed.items() if name not in known} == {}


def test_models_that_select_keys_raise():
    """The indexer of DeepSeek 3.2 passes indices: leaving them out would attend to all keys."""
    config = transformers.DeepseekV32Config(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_n_heads=2, index_head_dim=8,
        index_topk=4, first_k_dense_replace=1, pad_token_id=0,
    )  # fmt: skip
    model = fastattn_hf.enable(transformers.DeepseekV32Model(config).eval())
    with pytest.raises(NotImplementedError, match="DeepseekV32Attention passes indices"):
        model(input_ids=torch.randint(3, VOCAB, (1, 9)))


# --- names ----------------------------------------------------------------------------------------


def test_a_name_of_somebody_elses_raises():
    def other(*args, **kwargs):
        raise AssertionError("never called")

    model = family("bert").make()
    for interface, ours in (
        (AttentionInterface, fastattn_hf.attention_forward),
        (AttentionMaskInterface, fastattn_hf.attention_mask),
    ):
        interface.register("fastattn", other)
        message = rf'"fastattn" of transformers\' {interface.__name__} is .*other, not fastattn'
        with pytest.raises(RuntimeError, match=message):
            fastattn_hf.enable(model)
        with pytest.raises(RuntimeError, match=message):
            arguments.register(fastattn_hf.attention_forward, fastattn_hf.attention_mask)
        interface.register("fastattn", ours)
    fastattn_hf.enable(model)


def test_a_mask_function_that_is_missing_raises():
    model = family("bert").make()
    del AttentionMaskInterface._global_mapping["fastattn"]
    with pytest.raises(RuntimeError, match="AttentionMaskInterface is missing"):
        fastattn_hf.enable(model)


def test_another_name_without_its_mask_function_raises():
    inputs = family("bert").inputs("right")
    AttentionInterface.register("my_attention", fastattn_hf.attention_forward)
    model = family("bert").make().eval()
    expected = results(fastattn_hf.enable(model)(**inputs), inputs)
    model.set_attn_implementation("my_attention")
    with pytest.raises(RuntimeError, match='registered as "my_attention", and no mask function'):
        model(**inputs)
    AttentionMaskInterface.register("my_attention", fastattn_hf.attention_mask)
    found = results(model(**inputs), inputs)
    assert torch.equal(found["last_hidden_state"], expected["last_hidden_state"])


def test_loading_the_module_anew_registers_again():
    """Its functions are new objects then, and the names are still its own."""
    renewed = types.FunctionType(
        fastattn_hf.attention_forward.__code__, vars(fastattn_hf), "attention_forward"
    )
    arguments.register(renewed, fastattn_hf.attention_mask)
    assert AttentionInterface._global_mapping["fastattn"] is renewed
