"""Encoder-decoders decode as one forward says, and compute each thing once and without padding.

The models are in `seq2seq_cases.py`.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from fastattn import dispatch
from fastattn.biases import T5Bias
from fastattn.cache_problem import CacheProblem
from fastattn.models import checkpoint
from fastattn.models.seq2seq import Encoded, Seq2Seq
from fastattn.testing import assert_parity
from tests.models.seq2seq_cases import (
    DECODER_LENGTHS,
    LENGTHS,
    VOCAB,
    build,
    call_ours,
    make,
    of_each,
    padded_batch,
)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Decoder:
    """Decodes a batch with a cache, and remembers each row, to be checked against one forward."""

    def __init__(self, model: Seq2Seq, family: str, copies: int = 1, max_seqlen: int = 24) -> None:
        self.model, self.inputs = model, padded_batch(family)
        mask = self.inputs.get("attention_mask")
        self.sources = self.inputs.get("input_ids", self.inputs.get("input_features"))
        self.lengths = None if mask is None else mask.sum(1)
        prompts = self.inputs["decoder_input_ids"]
        logits, self.session = model.start(
            self.sources, self.lengths, max_seqlen=max_seqlen, copies=copies,
            decoder_input_ids=prompts, decoder_lengths=torch.tensor(DECODER_LENGTHS),
        )  # fmt: skip
        self.rows = [
            (source, prompts[source, :length].tolist())
            for source, length in enumerate(DECODER_LENGTHS)
            for _ in range(copies)
        ]
        self.check(logits[:, None], [1] * len(self.rows))

    def step(self, counts: list[int] | None = None, n: int = 1) -> None:
        tokens = torch.randint(2, VOCAB, (len(self.rows), n))
        logits = self.model.step(tokens, self.session, counts, all_logits=True)
        counts = [n] * len(self.rows) if counts is None else counts
        for (_, row), new, count in zip(self.rows, tokens.tolist(), counts, strict=True):
            row += new[:count]
        self.check(logits, counts)

    def reorder(self, rows: list[int]) -> None:
        self.session.reorder(rows)
        self.rows = [(self.rows[row][0], list(self.rows[row][1])) for row in rows]

    def rollback(self, counts: list[int]) -> None:
        self.session.rollback(counts)
        for (_, row), count in zip(self.rows, counts, strict=True):
            del row[len(row) - count :]

    def check(self, logits: Tensor, counts: list[int]) -> None:
        """The last `counts` logits of each row by the 2x rule, with one forward as the measure."""
        assert self.session.lengths == tuple(len(row) for _, row in self.rows)
        sources = self.sources[[source for source, _ in self.rows]]
        lengths = None
        if self.lengths is not None:
            lengths = self.lengths[[source for source, _ in self.rows]]
        longest = max(len(row) for _, row in self.rows)
        ids = torch.tensor([row + [0] * (longest - len(row)) for _, row in self.rows])
        wide = sources.double() if sources.is_floating_point() else sources
        with torch.no_grad():
            plain = self.model(sources, ids, lengths).logits
            exact = copy.deepcopy(self.model).double()(wide, ids, lengths).logits
        picked: list[list[Tensor]] = [[], [], []]
        for index, ((_, row), count) in enumerate(zip(self.rows, counts, strict=True)):
            picked[0].append(logits[index, :count])
            picked[1].append(plain[index, len(row) - count : len(row)])
            picked[2].append(exact[index, len(row) - count : len(row)])
        assert_parity(*(torch.cat(part) for part in picked))


@of_each
def test_decoding_with_a_cache_is_one_forward(family, name):
    decoder = Decoder(build(family), family)
    decoder.step()
    decoder.step(n=3)
    decoder.step([2, 0, 1], n=2)
    decoder.rollback([4, 0, 2])
    decoder.step()
    decoder.reorder([2, 2, 0])  # now rows of other inputs
    decoder.step([1, 2, 2], n=2)
    decoder.step()


@of_each
def test_copies_share_the_inputs_keys(family, name):
    decoder = Decoder(build(family), family, copies=2)
    memory = decoder.session.memory
    assert memory.max_batch == len(DECODER_LENGTHS)
    decoder.step()
    decoder.reorder([1, 1, 3, 2, 4, 4])
    decoder.step(n=2)
    assert decoder.session.memory is memory
    decoder.reorder([5, 4, 0, 1, 0, 0])  # whole groups change places
    decoder.step()
    assert decoder.session.memory is memory
    decoder.reorder([0, 2, 4, 1, 3, 5])  # copies of one input are no longer together
    decoder.step()
    assert decoder.session.memory.max_batch == 6
    decoder.reorder([3, 3, 1, 0, 5, 2])
    decoder.rollback([1, 0, 2, 0, 1, 1])
    decoder.step([0, 2, 1, 2, 2, 0], n=2)


@of_each
def test_the_decoder_starts_with_its_token(family, name):
    model = build(family, decoder_start_token_id=5)
    inputs = padded_batch(family)
    first = inputs.get("input_ids", inputs.get("input_features"))
    lengths = inputs["attention_mask"].sum(1) if "attention_mask" in inputs else None
    logits, session = model.start(first, lengths, max_seqlen=3)
    assert session.lengths == (1, 1, 1)
    with torch.no_grad():
        expected = model(first, torch.full((3, 1), 5), lengths).logits[:, 0]
    torch.testing.assert_close(logits, expected)


# ---- what is computed, and how often


@of_each
def test_encoder_and_cross_keys_are_computed_once_and_without_padding(family, name):
    model = build(family)
    calls: dict[str, list[int]] = {}

    def count(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls.setdefault(path, []).append(args[0].shape[:-1].numel())

        return hook

    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count(path))
    inputs = padded_batch(family)
    mask = inputs.get("attention_mask")
    first = inputs["input_features"] if mask is None else inputs["input_ids"]
    lengths = None if mask is None else mask.sum(1)
    _, session = model.start(first, lengths, max_seqlen=9, copies=2)
    for _ in range(4):
        model.step(torch.randint(2, VOCAB, (6, 1)), session)
    tokens = sum(LENGTHS) if mask is not None else 3 * first.shape[-1] // 2
    once = {path for path in calls if path.startswith("encoder") or path.endswith("cross.vk")}
    layers = model.config.encoder.num_layers * 4 + model.config.decoder.num_layers
    assert len(once) == layers
    assert all(calls[path] == [tokens] for path in once)
    assert calls["decoder.layers.0.cross.q"] == [3, 6, 6, 6, 6]
    calls.clear()
    call_ours(model, inputs)
    of_decoder = {p: rows for p, rows in calls.items() if p.startswith("decoder") and p not in once}
    assert all(rows == [sum(DECODER_LENGTHS)] for rows in of_decoder.values())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_attention_is_given(family):
    model = build(family)
    assert model.impl == "auto"
    model.impl = "reference"
    problems: list[Any] = []

    def listen(name: str, problem: Any) -> None:
        assert name == model.impl == "reference"
        problems.append(problem)

    dispatch.listeners.append(listen)
    try:
        call_ours(model, padded_batch(family))
        _, session = model.start(torch.randint(2, VOCAB, (3, 8)), max_seqlen=4)
        model.step(torch.randint(2, VOCAB, (3, 1)), session)
    finally:
        dispatch.listeners.remove(listen)
    layers, decoder_layers = (
        model.config.encoder.num_layers, model.config.decoder.num_layers,
    )  # fmt: skip
    cached = [problem for problem in problems if isinstance(problem, CacheProblem)]
    assert len(problems) - len(cached) == 2 * layers + 2 * decoder_layers
    assert len(cached) == 4 * decoder_layers
    with_bias = [problem for problem in problems if problem.bias is not None]
    if family == "bart":
        assert not with_bias
    else:
        tables = {id(model.encoder.relative_bias.weight), id(model.decoder.relative_bias.weight)}
        assert len(with_bias) == 2 * layers + 3 * decoder_layers
        assert all(isinstance(problem.bias, T5Bias) for problem in with_bias)
        assert {id(problem.bias.table) for problem in with_bias} == tables
        assert all(problem.softmax_scale == 1.0 for problem in problems)


@pytest.mark.interpreter
@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_the_kernels_serve_it(family):
    model = build(family, num_decoder_layers=1) if family == "t5" else build(family)
    inputs = padded_batch(family)
    plain = call_ours(model, inputs).logits
    exact = call_ours(copy.deepcopy(model).double(), inputs).logits
    model.impl = "triton"
    assert_parity(call_ours(model, inputs).logits, plain, exact)
    ids = inputs["decoder_input_ids"]
    _, session = model.start(
        inputs["input_ids"], inputs["attention_mask"].sum(1), max_seqlen=9,
        decoder_input_ids=ids[:, :1],
    )  # fmt: skip
    logits = model.step(ids[:, 1:2], session)
    assert_parity(logits, plain[:, 1], exact[:, 1])


def test_whispers_decoder_on_states_of_another_encoder():
    model = build("whisper")
    states, lengths = torch.randn(3, 7, model.config.dim), torch.tensor([7, 2, 4])
    ids = torch.randint(2, VOCAB, (3, 5))
    encoded = Encoded.from_states(states, lengths)
    logits, session = model.start_encoded(encoded, max_seqlen=9, decoder_input_ids=ids[:, :4])
    logits = model.step(ids[:, 4:], session)
    for row, length in enumerate(lengths.tolist()):
        alone = Encoded.from_states(states[row : row + 1, :length])
        with torch.no_grad():
            expected = model(None, ids[row : row + 1], encoded=alone).logits[0, -1]
        torch.testing.assert_close(logits[row], expected)


def test_float16_does_not_overflow(tmp_path):
    make("t5", "a").save_pretrained(tmp_path)
    model = checkpoint.load(tmp_path, dtype=torch.float16)
    with torch.no_grad():
        model.encoder.layers[0].mlp.down.weight.fill_(3e4)
        logits = model(*(torch.randint(2, VOCAB, (2, 5)) for _ in range(2))).logits
    assert logits.dtype == torch.float16 and bool(logits.isfinite().all())
