"""Encoder-decoders against transformers: logits, hidden states, gradients, checkpoints, bad input.

The models are in `seq2seq_cases.py`.
"""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from fastattn.models import checkpoint
from fastattn.models.seq2seq import FAMILIES as OURS
from fastattn.models.seq2seq import Encoded, Seq2Seq
from fastattn.testing import assert_parity
from tests.integrations.families import run_three
from tests.models.seq2seq_cases import (
    CASES,
    FAMILIES,
    VOCAB,
    build,
    call_ours,
    make,
    of_each,
    padded_batch,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def save_and_load(theirs: Any, folder: Any, **options: Any) -> Seq2Seq:
    """What transformers saved, as ours."""
    theirs.save_pretrained(folder)
    return checkpoint.load(folder, **options)


def results_of_ours(model: Seq2Seq, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hidden states and logits by name, where there are tokens."""
    output = call_ours(model, inputs, hidden_states=True)
    found = {}
    for stack, states, mask in (
        ("encoder", output.encoder_hidden_states, inputs.get("attention_mask")),
        ("decoder", output.hidden_states, inputs["decoder_attention_mask"]),
    ):
        for index, state in enumerate(states):
            found[f"{stack} {index}"] = state if mask is None else state[mask.bool()]
    if output.logits is not None:
        found["logits"] = output.logits[inputs["decoder_attention_mask"].bool()]
    assert torch.equal(output.states, output.hidden_states[-1])
    assert torch.equal(output.encoded.padded(), output.encoder_hidden_states[-1])
    return found


def results_of_theirs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of a model of transformers."""
    if "input_features" in inputs:
        inputs = {**inputs, "input_features": inputs["input_features"].to(model.dtype)}
    output = model(**inputs, output_hidden_states=True)
    found = {}
    for stack, mask in (
        ("encoder", inputs.get("attention_mask")), ("decoder", inputs["decoder_attention_mask"]),
    ):  # fmt: skip
        for index, state in enumerate(output[f"{stack}_hidden_states"]):
            found[f"{stack} {index}"] = state if mask is None else state[mask.bool()]
    if "logits" in output:
        found["logits"] = output.logits[inputs["decoder_attention_mask"].bool()]
    return found


def eager(model: Any) -> Any:
    """A model of transformers that computes attention plainly."""
    model.set_attn_implementation("eager")
    return model.eval()


def case_ids(cases: list[tuple[str, str]]) -> list[str]:
    return ["-".join(case) for case in cases]


# ---- what transformers saved, loaded here


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "name"), CASES, ids=case_ids(CASES))
@torch.no_grad()
def test_hidden_states_and_logits_are_those_of_transformers(family, name, dtype, tmp_path):
    theirs = make(family, name)
    inputs = padded_batch(family)
    ours = save_and_load(theirs, tmp_path, dtype=DTYPES[dtype])
    assert {parameter.dtype for parameter in ours.parameters()} == {DTYPES[dtype]}
    baseline = eager(theirs.to(DTYPES[dtype]))
    exact = copy.deepcopy(baseline).double()
    actual = results_of_ours(ours, inputs)
    plain, right = run_three((baseline, exact), lambda model: results_of_theirs(model, inputs))
    assert actual.keys() == plain.keys()
    assert ("logits" in actual) == (name != "bare")
    for part in actual:
        assert_parity(actual[part], plain[part], right[part], name=part)


@pytest.mark.parametrize(("family", "name"), CASES, ids=case_ids(CASES))
@torch.no_grad()
def test_what_is_saved_here_loads_there(family, name, tmp_path):
    theirs = eager(make(family, name))
    ours = save_and_load(theirs, tmp_path / "theirs")
    checkpoint.save(ours, tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    # Untied from it, BART's `shared` embeddings are read by nobody.
    allowed = {"shared.weight", "model.shared.weight"} if family == "bart" else set()
    assert set(info["missing_keys"]) <= allowed
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = padded_batch(family)
    before, after = (results_of_theirs(eager(model), inputs) for model in (theirs, again))
    for part in before:
        assert torch.equal(before[part], after[part]), part
    assert checkpoint.load(tmp_path / "ours").config == ours.config
    kept = {"eos_token_id", "pad_token_id", "decoder_start_token_id", "dropout_rate", "dropout"}
    for option in kept & set(theirs.config.to_dict()):
        assert getattr(again.config, option) == getattr(theirs.config, option), option


@of_each
def test_older_files_load_too(family, name, tmp_path):
    theirs = make(family, name)
    ours = save_and_load(theirs, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    everything = theirs.state_dict()  # tied weights by all of their names
    torch.save(everything, tmp_path / "pytorch_model.bin")
    text = (tmp_path / "config.json").read_text()
    hf = {name: value for name, value in json.loads(text).items() if value is not None}
    hf.pop("dtype")
    if family in ("t5-1.1", "mt5"):  # as Google's are
        hf.pop("scale_decoder_outputs", None)
        hf["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(hf))
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    again = checkpoint.load(tmp_path)
    assert again.config == ours.config
    for (name, weight), (_, other) in zip(
        ours.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(weight, other), name


# ---- gradients


def by_stack(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of encoder, decoder, embeddings, ... as a vector each; tables by themselves.

    A vector of few numbers is no measure: its errors come from one place, here and there.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        found = re.match(r".*relative_bias|[a-z_]+", name)
        assert found is not None
        parts.setdefault(found[0], []).append(gradient.flatten())
    return {stack: torch.cat(vectors) for stack, vectors in parts.items()}


@of_each
def test_gradients_are_those_of_transformers(family, name, tmp_path):
    theirs = eager(make(family, name))
    ours = save_and_load(theirs, tmp_path)
    exact = copy.deepcopy(theirs).double()
    inputs = padded_batch(family)
    real = inputs["decoder_attention_mask"].bool()
    upstream = torch.randn(int(real.sum()), VOCAB)

    def gradients_of_theirs(model: Any) -> dict[str, Tensor]:
        features = {n: x.to(model.dtype) for n, x in inputs.items() if x.is_floating_point()}
        logits = model(**{**inputs, **features}).logits
        (logits[real] * upstream.to(logits.dtype)).sum().backward()
        by_name = {name: parameter.grad for name, parameter in model.named_parameters()}
        weights = OURS[ours.config.model_type].weights(ours.config, ours.config.architecture)
        return {
            weight.ours: torch.cat([by_name[one] for one in weight.theirs])
            for weight in weights
            if all(by_name.get(one) is not None for one in weight.theirs)
        }

    logits = call_ours(ours, inputs).logits
    (logits[real] * upstream).sum().backward()
    actual = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    plain, right = run_three((theirs, exact), gradients_of_theirs)
    assert actual.keys() == plain.keys()
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert actual.keys() == trained
    actual, plain, right = (by_stack({n: one[n] for n in plain}) for one in (actual, plain, right))
    assert ("encoder.relative_bias" in actual) == ("t5" in family)
    assert {"encoder", "decoder", "embedding"} <= actual.keys()
    for part in actual:
        assert_parity(actual[part], plain[part], right[part], name=part)


def test_labels_are_shifted_as_by_transformers():
    from transformers.models.bart.modeling_bart import shift_tokens_right

    labels = torch.randint(2, VOCAB, (3, 6))
    labels[1, 3:] = labels[2, 0] = -100
    model = build("bart", decoder_start_token_id=7, pad_token_id=9)
    assert torch.equal(model.shift_right(labels), shift_tokens_right(labels, 9, 7))


def test_training_reduces_the_loss():
    model = build("t5", dropout_rate=0.1).train()
    ids, lengths = torch.randint(2, VOCAB, (4, 6)), torch.tensor([6, 2, 4, 3])
    labels = torch.where(torch.arange(6) < lengths[:, None], ids, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        logits = model(ids, model.shift_right(labels), lengths, lengths).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_is_in_training_alone(kind):
    none = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = build("bart", **{**none, kind: 0.3})
    ids = torch.randint(2, VOCAB, (2, 6))

    def run() -> Tensor:
        return model(ids, ids).logits

    assert torch.equal(run(), run())
    model.train()
    assert not torch.equal(run(), run())
    encoded = model.eval().encode(ids)
    assert not torch.equal(model.train().encode(ids).states, encoded.states)


# ---- bad input


IDS = torch.randint(2, VOCAB, (2, 5), generator=torch.Generator().manual_seed(0))
BAD_CALLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "id beyond": ("bart", {"input_ids": IDS + VOCAB}, r"input_ids must lie in 0\.\.52"),
    "decoder id": ("bart", {"decoder_input_ids": IDS - 60}, r"decoder_input_ids must lie in"),
    "too long": ("bart", {"input_ids": IDS.repeat(1, 9)}, "input_ids must have at most 40 tokens"),
    "decoder too long": (
        "bart", {"decoder_input_ids": IDS.repeat(1, 9)}, "decoder_input_ids must have at most 40",
    ),
    "empty": ("t5", {"input_ids": IDS[:, :0]}, "input_ids must be .* at least one row"),
    "length 0": ("t5", {"lengths": torch.tensor([0, 5])}, r"lengths must lie in 1\.\.5"),
    "length 6": ("t5", {"decoder_lengths": torch.tensor([6, 5])}, "decoder_lengths must lie in"),
    "other batch": ("t5", {"decoder_input_ids": IDS[:1]}, "must have a row for each input, 2"),
    "not ids": ("t5", {"input_ids": IDS.float()}, "input_ids must be int32 or int64"),
    "both": ("t5", {"encoded": Encoded.from_states(torch.randn(2, 3, 16))}, "one of them"),
    "neither": ("t5", {"input_ids": None}, "one of them and not both"),
    "other states": (
        "t5", {"input_ids": None, "encoded": Encoded.from_states(torch.randn(2, 3, 9))},
        "encoded states must have 16 features",
    ),
    "ids for sound": ("whisper", {}, "floating features"),
    "short sound": ("whisper", {"input_ids": torch.randn(2, 6, 4)}, r"\(batch, 6, 22\)"),
    "lengths of sound": (
        "whisper", {"input_ids": torch.randn(2, 6, 22), "lengths": torch.tensor([1, 2])},
        "lengths must be None in a model that reads sound",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_calls_are_told(what):
    family, change, message = BAD_CALLS[what]
    with pytest.raises((TypeError, ValueError), match=message):
        build(family)(**{"input_ids": IDS, "decoder_input_ids": IDS, **change})


def test_bad_decoding_is_told():
    model = build("bart")
    with pytest.raises(ValueError, match="max_seqlen must be at most 40"):
        model.start(IDS, max_seqlen=41)
    with pytest.raises(ValueError, match="max_seqlen must be at least 5"):
        model.start(IDS, max_seqlen=4, decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        model.start(IDS, max_seqlen=4, copies=0)
    _, session = model.start(IDS, max_seqlen=4)
    for tokens, counts, message in (
        (IDS[:1, :1], None, "tokens must have a row for each"),
        (IDS[:, :1] + VOCAB, None, "tokens must lie in"),
        (IDS[:, :2], [3, 0], r"counts must be 2 numbers in 0\.\.2"),
        (IDS[:, :4], None, "row 0 has 1 tokens and no room for 4 more"),
    ):
        with pytest.raises(ValueError, match=message):
            model.step(tokens, session, counts)
    with pytest.raises(TypeError, match="session must be what start"):
        model.step(IDS[:, :1], session.cache)
    model.step(IDS[:, :4], session, [3, 2])  # padding needs no room
    assert session.lengths == (4, 3)
    model.start_token = None
    with pytest.raises(ValueError, match="decoder_input_ids must be given"):
        model.start(IDS, max_seqlen=4)
    with pytest.raises(ValueError, match="must have a start token and a pad token"):
        model.shift_right(IDS)


def test_a_model_without_a_head_does_not_decode(tmp_path):
    model = save_and_load(make("bart", "bare"), tmp_path)
    with pytest.raises(ValueError, match="BartModel has no head"):
        model.start(IDS, max_seqlen=4)


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("t5", "feed_forward_proj", "sparse-relu"),
        ("t5", "feed_forward_proj", "mish"),
        ("t5", "is_decoder", True),
        ("bart", "normalize_before", True),
        ("bart", "encoder_attention_heads", 7),
        ("whisper", "activation_function", "unheard"),
    ],
)
def test_options_that_are_not_there_are_told(family, option, value):
    theirs = make(family, "b")
    hf = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__], option: value}
    with pytest.raises(ValueError, match=f"{option}|activation") as caught:
        Seq2Seq(OURS[family].config(hf))
    assert repr(value).strip("'") in str(caught.value)


def test_a_checkpoint_of_another_kind_is_told(tmp_path):
    make("t5", "a").save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"relu"', '"gated-relu"'))
    with pytest.raises(checkpoint.CheckpointError, match="wi_0"):
        checkpoint.load(tmp_path)


def test_there_are_five_cases_of_each_family():
    assert all(len(cases) >= 5 for cases in FAMILIES.values())
