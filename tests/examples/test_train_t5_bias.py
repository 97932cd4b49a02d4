"""The T5 example on catalogs made here: data, padding, decoding, and that it learns."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import random
import struct
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("typer")

import gettext_pairs
import t5_kernel_check
import t5_scores
import t5_small
import train_t5_bias
import typer
from gettext_pairs import Example, Pair
from typer.testing import CliRunner, Result

WORDS = {
    "file": "Datei", "branch": "Zweig", "commit": "Commit", "option": "Option", "name": "Name",
    "type": "Typ", "value": "Wert", "line": "Zeile",
}  # fmt: skip
STATES = {
    "is missing": "fehlt", "is empty": "ist leer", "was not found": "wurde nicht gefunden",
    "cannot be read": "kann nicht gelesen werden", "is too long": "ist zu lang",
}  # fmt: skip
FRAMES = (
    ("the {} %s {}", "{} %s {}"),
    ("error: the {} {}", "Fehler: {} {}"),
    ("'%s': the {} {}", "'%s': {} {}"),
    ("warning: this {} {}", "Warnung: {} {}"),
    ("note: %s, the {} {}", "Hinweis: %s, {} {}"),
)
PAIRS = [
    Pair(english.format(noun, state), german.format(WORDS[noun], STATES[state]))
    for (english, german), noun, state in itertools.product(FRAMES, WORDS, STATES)
]


def write_mo(path: Path, messages: dict[str, str]) -> None:
    """A little-endian gettext catalog, as msgfmt writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = sorted((a.encode(), b.encode()) for a, b in messages.items())
    tables, texts = [], b""
    start = 28 + 16 * len(items)
    for side in (0, 1):
        for item in items:
            tables.append(struct.pack("<2I", len(item[side]), start + len(texts)))
            texts += item[side] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(items), 28, 28 + 8 * len(items), 0, start)
    path.write_bytes(header + b"".join(tables) + texts)


def write_catalogs(folder: Path, pairs: list[Pair]) -> None:
    """One catalog of each domain that the example wants, together holding `pairs`."""
    header = {"": "Content-Type: text/plain; charset=UTF-8\n"}
    names = list(gettext_pairs.CATALOGS)
    for index, name in enumerate(names):
        messages = dict(pairs[index :: len(names)])
        write_mo(folder / "de" / "LC_MESSAGES" / f"{name}.mo", {**header, **messages})


def command_line(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(train_t5_bias.main)
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def tokenizer():
    return gettext_pairs.train_tokenizer(PAIRS, 400)


@pytest.fixture(scope="module")
def examples(tokenizer) -> list[Example]:
    return gettext_pairs.encode(tokenizer, PAIRS)


@pytest.fixture
def model(tokenizer) -> t5_small.T5Small:
    """Small, with tables that matter."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "num_heads": 2, "num_layers": 2, "dropout": 0.0}
    model = t5_small.T5Small(t5_small.Config(tokenizer.get_vocab_size(), **sizes))
    for table in (model.encoder_table, model.decoder_table):
        torch.nn.init.normal_(table)
    return model


def test_reads_what_is_worth_learning(tmp_path: Path) -> None:
    path = tmp_path / "x.mo"
    kept = {
        "cannot open '%s'\n": "Kann '%s'\nnicht öffnen\n",
        "menu\4%d of them": "%d davon",
        "%d file\0%d files": "%d Datei\0%d Dateien",
    }
    dropped = {
        "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n",
        "untranslated here": "untranslated here",
        "%s: %s\n": "%s: »%s«\n",
        "long " * 40: "lang " * 40,
        "short": "ganz und gar nicht so kurz wie im englischen Original",
    }
    write_mo(path, {**kept, **dropped})
    assert sorted(gettext_pairs.read_catalog(path)) == [
        ("%d file", "%d Datei"),
        ("%d of them", "%d davon"),
        ("cannot open '%s'", "Kann '%s' nicht öffnen"),
    ]


def test_catalogs_are_found_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gettext_pairs, "SYSTEM_FOLDER", tmp_path / "nowhere")
    write_catalogs(tmp_path / "usr" / "share" / "locale", PAIRS)
    found = gettext_pairs.find_catalogs(tmp_path)
    assert list(found) == list(gettext_pairs.CATALOGS)
    found["gcc-12"].unlink()
    with pytest.raises(gettext_pairs.DataError, match=r"gcc-12\.mo.*(.|\n)*apt-get download"):
        gettext_pairs.find_catalogs(tmp_path)
    found["git"].write_bytes(b"not a catalog")
    with pytest.raises(gettext_pairs.DataError, match="not a gettext catalog"):
        gettext_pairs.read_catalog(found["git"])


def test_split_keeps_the_same_message_on_one_side() -> None:
    variants = [Pair(p.english.upper() + "!", p.german) for p in PAIRS]
    split = gettext_pairs.split_pairs([*PAIRS, *variants], 20, 30)
    assert [len(part) for part in split] == [len(PAIRS) - 50, 20, 30]
    assert sorted(pair for part in split for pair in part) == sorted(PAIRS)
    shuffled = random.Random(0).sample(PAIRS, len(PAIRS))
    assert gettext_pairs.split_pairs(shuffled, 20, 30) == split
    with pytest.raises(gettext_pairs.DataError, match="too few"):
        gettext_pairs.split_pairs(PAIRS[:50], 20, 30)


def test_tokens_give_the_text_back(tokenizer, examples: list[Example]) -> None:
    for pair, example in zip(PAIRS, examples, strict=True):
        assert example.target[-1] == gettext_pairs.END
        assert tokenizer.decode(example.target).strip() == pair.german
    text = "»%<…%>« größer als 64 KiB"  # characters that were not in the training text
    assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_hold_every_example_once(examples: list[Example], seed: int | None) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    groups = list(gettext_pairs.batches(examples, 100, generator))
    assert sorted(e for group in groups for e in group) == sorted(examples)
    for group in groups:
        assert len(group) * max(len(side) for example in group for side in example) <= 100


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_padding_never_changes_the_loss(model, examples: list[Example], impl: str) -> None:
    model.double()
    lengths = sorted(examples, key=lambda example: len(example.source))
    chosen = [*lengths[:2], *lengths[-2:]]
    batch = gettext_pairs.collate(chosen)
    assert batch.source_lengths.unique().numel() > 1
    value = t5_small.loss(model, batch, impl)
    padded = gettext_pairs.collate(chosen, extra=5)
    padded.source[:, -5:] = 7  # whatever stands in the padding
    padded.target[:, -5:] = 9
    torch.testing.assert_close(t5_small.loss(model, padded, impl), value)
    tokens = [len(example.target) for example in chosen]
    alone = [t5_small.loss(model, gettext_pairs.collate([example]), impl) for example in chosen]
    mean = sum(a * n for a, n in zip(alone, tokens, strict=True)) / sum(tokens)
    torch.testing.assert_close(mean, value)


def test_decoding_is_greedy(model, examples: list[Example]) -> None:
    """Every token is the likeliest after those before it, seen without the key/value cache."""
    chosen = examples[:24:3]
    settings = train_t5_bias.Settings(60, learning_rate=1e-2, evaluations=1)
    train_t5_bias.train(model, chosen, chosen, settings)
    model.double().eval()
    batch = gettext_pairs.collate(chosen)
    limit = 5
    rows = model.translate(batch.source, batch.source_lengths, limit)
    ended = [row for row in rows if len(row) < limit]
    assert 0 < len(ended) < len(rows)
    assert len({token for row in rows for token in row}) > 5
    for row, example in zip(rows, chosen, strict=True):
        target = [*row, gettext_pairs.END][:limit]
        again = gettext_pairs.collate([Example(example.source, target)])
        assert model(again, "reference").argmax(-1).tolist() == target
        assert gettext_pairs.END not in row


def within_parity_rule(steps: dict[str, list[float]]) -> bool:
    """Over all steps together: in a single one, plain torch's error may be small by chance."""
    ours, plain = (
        torch.tensor(steps[key]).square().mean().sqrt() for key in ("error", "reference_error")
    )
    return bool(ours <= 2 * plain + torch.finfo(torch.float32).eps)


def test_implementations_train_alike(tokenizer, examples: list[Example]) -> None:
    """The part that is for the kernels, with torch's attention in their place."""
    config = t5_small.Config(tokenizer.get_vocab_size())
    result = t5_kernel_check.train_beside_reference(examples, config, 12, "cpu", 0, "sdpa")
    ours, other = result["losses"]["impl"], result["losses"]["reference"]
    assert len(ours) == 12
    assert ours[-1] < ours[0] - 0.5
    assert ours == pytest.approx(other, rel=1e-5)
    for name, steps in result["table_gradients"].items():
        assert within_parity_rule(steps)
        assert len(steps["within_parity_rule"]) == 12
        assert min(steps["norm"]) > 0
        assert result["tables_after"][name]["largest_entry"] > 1e-3
        assert result["tables_after"][name]["largest_difference"] < 1e-4


def test_a_wrong_table_gradient_is_seen(
    tokenizer, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the check is for: a table gradient that is one per mille off fails it at every step."""
    real = t5_kernel_check._table_gradients

    def off(model, batch, impl):
        value, gradients = real(model, batch, impl)
        if impl == "sdpa":
            gradients["encoder_table"] *= 1.001
        return value, gradients

    monkeypatch.setattr(t5_kernel_check, "_table_gradients", off)
    config = t5_small.Config(tokenizer.get_vocab_size())
    result = t5_kernel_check.train_beside_reference(examples, config, 2, "cpu", 0, "sdpa")
    encoder, decoder = result["table_gradients"].values()
    assert encoder["within_parity_rule"] == [0.0, 0.0]
    assert not within_parity_rule(encoder)
    assert within_parity_rule(decoder)


def test_most_similar(tokenizer) -> None:
    queries = [PAIRS[3], Pair("the file %s is  missing", "")]
    found = t5_scores.most_similar(tokenizer, PAIRS, queries)
    assert found == [PAIRS[3].german, PAIRS[0].german]


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in (*train_t5_bias.NEEDS, "triton")),
    reason=f"needs {', '.join(train_t5_bias.NEEDS)} and triton",
)
def test_learns_to_translate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From catalogs to plots: unseen sentences of a tiny language are translated."""
    monkeypatch.setattr(gettext_pairs, "SYSTEM_FOLDER", tmp_path / "nowhere")
    sizes = {"d_model": 64, "d_ff": 128, "num_heads": 2, "num_layers": 1, "dropout": 0.0}
    counts = {"vocab_size": 400, "num_valid": 20, "num_test": 20, "batch_tokens": 200}
    for name, values in (("Config", sizes), ("Settings", counts)):
        full = functools.partial(getattr(train_t5_bias, name), **values)
        monkeypatch.setattr(train_t5_bias, name, full)
    write_catalogs(tmp_path / "data", PAIRS)
    arguments = {"--data": tmp_path / "data", "--output": tmp_path / "out", "--device": "cpu"}
    steps = {"--steps": 60, "--check-steps": 2}
    done = command_line(*(str(word) for item in {**arguments, **steps}.items() for word in item))
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "out" / "train_t5_bias.json").read_text())
    records = results["training"]
    assert results["pairs"] == {"train": 160, "valid": 20, "test": 20}
    assert records[-1]["step"] == 60
    assert list(results["beside_reference"]) == ["triton", "sdpa"]
    for check in results["beside_reference"].values():
        for steps in check["table_gradients"].values():
            assert within_parity_rule(steps)
    assert records[-1]["valid"] < records[0]["valid"] / 3
    scores = results["scores"]
    assert scores["model"]["bleu"] > scores["English left as it is"]["bleu"] + 20
    assert scores["model"]["exact"] >= 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"train_t5_bias{end}" for end in (".json", ".txt", ".png", "_tables.png")
    }


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_t5_bias, "NEEDS", ("torch", "no_such_package"))
    done = command_line()
    assert done.exit_code == 1
    assert "pip install no_such_package" in done.output
    monkeypatch.setattr(train_t5_bias, "NEEDS", ())
    monkeypatch.setattr(gettext_pairs, "SYSTEM_FOLDER", tmp_path)
    done = command_line("--data", str(tmp_path))
    assert done.exit_code == 1
    assert "dpkg -x" in done.output
