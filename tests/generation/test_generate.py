"""What surrounds the choice of tokens: padding, stop strings, streamers, the host's looks."""

from __future__ import annotations

import io
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastattn.generation import Contrast, GenerationConfig, generate
from fastattn.generation.choose import Choose
from fastattn.generation.graph import can_capture
from fastattn.generation.plan import make_plan
from fastattn.generation.result import Records
from fastattn.generation.rows import Rows
from fastattn.sampling import SamplingParams
from tests.generation.adapter import EOS, PAD, VOCAB, Recomputing, make, prompts
from tests.generation.tables import Table

DRAWN = SamplingParams(temperature=1.2, repetition_penalty=1.3, seed=4)


@cache
def _model() -> Recomputing:
    return Recomputing(make("llama"))


def _text(tokens: list[int]) -> str:
    """A letter a token, but one: text that goes on changes the end of what there was."""
    return "".join(chr(ord("A") + token) for token in tokens).replace("JM", "j")


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"do_sample": True, "sampling": DRAWN},
    "n-grams, lengths": {"no_repeat_ngram": 2, "min_new_tokens": 5, "forced_eos": EOS},
    "strings": {"stop_strings": ["J", "ob"], "stop_tokens": [44]},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("check_every", [3, 8, 50])
def test_how_often_the_host_looks_changes_nothing(name: str, check_every: int) -> None:
    ids, mask = prompts()
    results = []
    for every in (1, check_every):
        put: list[list[int]] = []
        config = GenerationConfig(20, check_every=every, return_logprobs=True, **SETTINGS[name])
        calls = _model().calls
        out = generate(
            _model(), ids, config, attention_mask=mask, decode=_text,
            streamer=lambda tokens, put=put: put.append(tokens.tolist()),
        )  # fmt: skip
        assert torch.tensor(put).T.tolist() == out.tokens.tolist()
        assert out.tokens.shape[1] == int(out.lengths.max())
        results.append((out, _model().calls - calls))
    (first, _), (second, _) = results
    assert first.sequences.tolist() == second.sequences.tolist()
    assert first.finished.tolist() == second.finished.tolist()
    torch.testing.assert_close(first.logprobs, second.logprobs)
    assert int(first.finished.sum()) > 0


def test_the_loop_ends_when_all_rows_have() -> None:
    table = torch.full((6, 6), -5.0)
    for token, after in ((1, 2), (2, 3), (3, 5), (5, 5)):
        table[token, after] = 5.0
    ids = torch.tensor([[1], [3]])
    for every, steps in ((1, 2), (2, 3), (8, 7), (50, 19)):
        model = Table(table, eos=(5,))
        step, count = model.step, [0]

        def counted(*args: Any, step: Any = step, count: Any = count, **options: Any) -> Tensor:
            count[0] += 1
            return step(*args, **options)

        model.step = counted  # type: ignore[method-assign]
        out = generate(model, ids, GenerationConfig(20, check_every=every))
        assert out.tokens.tolist() == [[2, 3, 5], [5, 0, 0]] and out.finished.all()
        assert count[0] == steps


def test_a_string_ends_a_row_with_the_token_that_completes_it() -> None:
    ids, mask = prompts()
    strings = ["JM", "J", "ob"]
    plain = generate(_model(), ids, GenerationConfig(20), attention_mask=mask).new_tokens()
    for beams in (1, 3):
        config = GenerationConfig(20, stop_strings=strings, num_beams=beams)
        out = generate(_model(), ids, config, attention_mask=mask, decode=_text)
        ended = 0
        for tokens, whole in zip(out.new_tokens(), plain, strict=True):
            texts = [_text(tokens[: n + 1]) for n in range(len(tokens))]
            hits = [any(string in text for string in strings) for text in texts]
            assert not any(hits[:-1])
            ended += hits[-1]
            if beams == 1:
                assert tokens == whole[: len(tokens)]
                assert hits[-1] or len(tokens) == len(whole)
        assert 3 < ended < 20


def test_padding_on_the_right_gives_the_same_rows_on_the_right() -> None:
    ids, mask = prompts()
    left = generate(_model(), ids, GenerationConfig(15), attention_mask=mask)
    lengths = mask.sum(1)
    right_mask = torch.arange(ids.shape[1]) < lengths[:, None]
    right_ids = torch.full_like(ids, 7)
    for row, n in enumerate(lengths.tolist()):
        right_ids[row, :n] = ids[row, ids.shape[1] - n :]
    right = generate(_model(), right_ids, GenerationConfig(15), attention_mask=right_mask)
    assert right.tokens.tolist() == left.tokens.tolist()
    assert right.sequences.shape == left.sequences.shape
    for row, n in enumerate(lengths.tolist()):
        real = ids[row, ids.shape[1] - n :].tolist() + left.new_tokens()[row]
        assert right.sequences[row].tolist() == real + [PAD] * (
            right.sequences.shape[1] - len(real)
        )


@pytest.mark.parametrize("beams", [1, 3])
def test_columns_of_padding_alone_and_what_stands_there_do_not_matter(beams: int) -> None:
    ids, mask = prompts(6)
    config = GenerationConfig(9, no_repeat_ngram=2, num_beams=beams, bad_words=[[9, 11]])
    wanted = generate(_model(), ids, config, attention_mask=mask)
    wide = torch.cat([torch.full((6, 3), VOCAB + 9), ids.masked_fill(mask == 0, 11)], 1)
    wide_mask = torch.nn.functional.pad(mask, (3, 0)).bool()
    out = generate(_model(), wide.int(), config, attention_mask=wide_mask)
    assert out.tokens.tolist() == wanted.tokens.tolist()
    assert torch.equal(out.sequences[:, : wide.shape[1]], wide)


def test_padding_takes_part_in_no_ban() -> None:
    table = torch.zeros(8, 8)
    table[5, 6], table[6, 7] = 2.0, 2.0
    # Were padding a prompt, 4 5 6 would be a bad word and 5 6 an n-gram for the second time.
    ids, mask = torch.tensor([[4, 5], [6, 5], [5, 6]]), torch.tensor([[0, 1], [0, 1], [1, 1]])
    ids, mask = (
        torch.cat([torch.tensor([[7], [5], [0]]), ids], 1),
        torch.cat([mask[:, :1] * 0, mask], 1),
    )
    config = GenerationConfig(2, no_repeat_ngram=2, bad_words=[[4, 5, 6], [7, 4, 5, 6]])
    out = generate(Table(table), ids, config, attention_mask=mask)
    assert out.tokens.tolist() == [[6, 7], [6, 7], [7, 0]]


class _Streamer:
    """What Hugging Face's streamers are."""

    def __init__(self) -> None:
        self.got: list[Tensor] = []
        self.ended = False

    def put(self, tokens: Tensor) -> None:
        assert not self.ended
        self.got.append(tokens)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_with_put_and_end_gets_the_prompt_first() -> None:
    streamer = _Streamer()
    out = generate(_model(), torch.tensor([[5, 6, 7]]), GenerationConfig(6), streamer=streamer)
    assert streamer.ended and streamer.got[0].tolist() == [[5, 6, 7]]
    assert torch.stack(streamer.got[1:], 1).tolist() == out.tokens.tolist()


def test_hugging_faces_streamer(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    class Tokenizer:
        def decode(self, tokens: Any, **options: Any) -> str:
            return _text([tokens] if isinstance(tokens, int) else list(map(int, tokens)))

    streamer = TextStreamer(Tokenizer(), skip_prompt=True)  # type: ignore[arg-type]
    out = generate(_model(), torch.tensor([[5, 6, 7]]), GenerationConfig(6), streamer=streamer)
    shown = capsys.readouterr().out.replace("\n", "")
    assert shown == "".join(_text([token]) for token in out.new_tokens()[0])


def test_a_progress_bar_only_for_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    generate(_model(), ids, GenerationConfig(6), progress=True)
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for beams in (1, 2):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        generate(_model(), ids, GenerationConfig(6, num_beams=beams), progress=True)
        assert "tokens a row" in terminal.getvalue() and "6/6" in terminal.getvalue()


def test_a_row_with_nothing_left_is_told() -> None:
    table = torch.zeros(5, 5)
    table[3] = torch.nan
    ids = torch.tensor([[3], [1]])
    for config in (
        GenerationConfig(4),
        GenerationConfig(4, num_beams=2),
        GenerationConfig(4, do_sample=True),
        GenerationConfig(4, check_every=4),
        GenerationConfig(4, draft_tokens=2),
    ):
        draft = Table(torch.zeros(5, 5)) if config.draft_tokens else None
        with pytest.raises(ValueError, match="nothing is left that may come next"):
            generate(Table(table), ids, config, draft_model=draft)
    banned = SamplingParams(banned=list(range(5)))
    for beams in (1, 2):
        config = GenerationConfig(4, sampling=banned, num_beams=beams)
        with pytest.raises(ValueError, match="nothing is left that may come next"):
            generate(Table(torch.zeros(5, 5)), ids, config)


def test_fewer_sequences_than_beams_are_possible() -> None:
    table = torch.full((5, 5), -torch.inf)
    table[1, 2], table[2, 3] = 0.0, 0.0
    config = GenerationConfig(2, num_beams=3, num_return_sequences=3, eos_tokens=())
    out = generate(Table(table), torch.tensor([[1]]), config)
    assert out.new_tokens() == [[2, 3], [], []]
    assert out.sequence_scores.tolist() == [0.0, -torch.inf, -torch.inf]


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_beam_with_nothing_left_gives_way(do_sample: bool) -> None:
    table = torch.zeros(5, 5)
    table[:, 3] = 3.0
    config = GenerationConfig(
        3, num_beams=2, do_sample=do_sample, bad_words=[[3, token] for token in range(5)]
    )
    out = generate(Table(table), torch.tensor([[1]] * 50), config)
    assert {tuple(row[:2]) for row in out.tokens.eq(3).tolist()} == {(False, False)}
    assert out.sequence_scores.isfinite().all()


@pytest.mark.parametrize("contrast", [None, Contrast()])
def test_a_step_does_not_wait_for_the_device(contrast: Contrast | None) -> None:
    ids, mask = prompts(3)
    config = GenerationConfig(
        6, no_repeat_ngram=2, bad_words=[[4], [5, 6]], min_new_tokens=3, forced_eos=EOS,
        begin_suppress_tokens=[7], return_logprobs=True, return_scores=True,
    )  # fmt: skip
    plan = make_plan(
        _model(), ids, config, attention_mask=mask, decoder_input_ids=None,
        decoder_attention_mask=None, small_model=None, draft_model=None, decode=None,
        streamer=None,
    )  # fmt: skip
    # Fake tensors have no values: whoever looks at one raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = Rows(plan)
        choose = Choose(plan, rows, Records(plan), contrast)
        for step in range(6):
            choose((torch.randn(3, VOCAB), torch.randn(3, VOCAB)), step)
        with pytest.raises(DataDependentOutputException):
            rows.finished.all().item()


def test_graphs_are_for_caches_on_a_gpu() -> None:
    _, session = _model().start(torch.tensor([[5]]), max_seqlen=3)
    assert not can_capture([session])


def test_import_brings_neither_transformers_nor_triton() -> None:
    code = (
        "import sys, fastattn.generation\n"
        "assert not {'transformers', 'triton', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
