"""The T5 of examples/train_t5_bias.py as a checkpoint of the reference model."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")

EXAMPLES = str(Path(__file__).parents[2] / "examples")


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [EXAMPLES, *sys.path])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@torch.no_grad()
def test_it_translates_as_the_example_does(tmp_path):
    import t5_checkpoint
    from gettext_pairs import END, Pair, collate, encode, train_tokenizer
    from t5_small import Config, T5Small

    from fastattn.models import load

    pairs = [Pair(f"{a} {b}", f"{b} {a}") for a in "abcdefg" for b in ("file", "option", "line")]
    tokenizer = train_tokenizer(pairs, 300)
    example = T5Small(Config(tokenizer.get_vocab_size(), d_model=24, d_ff=40, num_heads=3)).eval()
    for table in (example.encoder_table, example.decoder_table):
        table.normal_()
    t5_checkpoint.save(example, tokenizer, tmp_path)
    model = load(tmp_path)
    batch = collate(encode(tokenizer, pairs))
    expected = example.translate(batch.source, batch.source_lengths, 12)
    logits, session = model.start(batch.source, batch.source_lengths, max_seqlen=13)
    rows: list[list[int]] = [[] for _ in pairs]
    for _ in range(12):
        tokens = logits.argmax(-1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        logits = model.step(tokens[:, None], session)
    assert [row[: row.index(END)] if END in row else row for row in rows] == expected
    assert len({tuple(row) for row in rows}) > 3  # not the same for every source

    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    visible = torch.arange(batch.source.shape[1]) < batch.source_lengths[:, None]
    generated = theirs.generate(
        input_ids=batch.source, attention_mask=visible.long(), max_new_tokens=12, do_sample=False,
        num_beams=1,
    )  # fmt: skip
    for row, theirs_row in zip(expected, generated[:, 1:].tolist(), strict=True):
        assert theirs_row[: len(row)] == row
