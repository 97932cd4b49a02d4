"""Translates held-out messages and scores them, beside what takes no model at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from gettext_pairs import Example, Pair, collate
from t5_kernel_check import progress_bar
from t5_small import T5Small
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def translate(
    model: T5Small, tokenizer: Tokenizer, examples: Sequence[Example], impl: str = "auto"
) -> list[str]:
    """Greedy translations in the order of `examples`, computed in batches of similar lengths."""
    model.eval()
    device = str(model.embedding.weight.device)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].source))
    texts = [""] * len(examples)
    with progress_bar() as bar:
        task = bar.add_task("translating", total=len(examples), note="")
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            batch = collate([examples[index] for index in chosen]).to(device)
            longest = 2 * batch.source.shape[1] + 10
            rows = model.translate(batch.source, batch.source_lengths, longest, impl)
            for index, row in zip(chosen, rows, strict=True):
                texts[index] = tokenizer.decode(row).strip()
            bar.update(task, advance=len(chosen))
    return texts


def most_similar(
    tokenizer: Tokenizer, train_pairs: Sequence[Pair], queries: Sequence[Pair]
) -> list[str]:
    """What a translation memory gives: the German of the training message most like each query.

    Alike by the share of tokens that both have (Jaccard). It shows how far repetition alone leads.
    """

    def bags(pairs: Sequence[Pair]) -> Tensor:
        result = torch.zeros(len(pairs), tokenizer.get_vocab_size())
        for row, encoding in enumerate(tokenizer.encode_batch([p.english for p in pairs])):
            result[row, encoding.ids] = 1.0
        return result

    asked = bags(queries)
    best = torch.full((len(queries),), -1.0)
    answers = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(train_pairs), 4000):
        known = bags(train_pairs[start : start + 4000])
        shared = asked @ known.T
        score, index = (shared / (asked.sum(1)[:, None] + known.sum(1) - shared)).max(1)
        answers = torch.where(score > best, index + start, answers)
        best = best.maximum(score)
    return [train_pairs[index].german for index in answers.tolist()]


def score(hypotheses: list[str], pairs: Sequence[Pair]) -> dict[str, Any]:
    """BLEU, chrF and how many are the catalog's translation to the letter."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    references = [[pair.german for pair in pairs]]
    bleu, chrf = BLEU(), CHRF()
    return {
        "bleu": bleu.corpus_score(hypotheses, references).score,
        "chrf": chrf.corpus_score(hypotheses, references).score,
        "exact": sum(text == pair.german for text, pair in zip(hypotheses, pairs, strict=True)),
        "signatures": [str(bleu.get_signature()), str(chrf.get_signature())],
    }
