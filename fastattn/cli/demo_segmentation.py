"""A T5 that learns, on the spot, where the words of a run-together name begin.

The names are the identifiers in Python's own standard library: `assertRaisesRegex` becomes the pair
"assertraisesregex" and "assert raises regex". Nothing is downloaded and nothing is kept.
"""

from __future__ import annotations

import re
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastattn.generation import GenerationConfig, generate
from fastattn.models.layers import initialize
from fastattn.models.seq2seq import Seq2Seq
from fastattn.models.seq2seq_config import t5_config
from fastattn.objectives import token_loss

PAD, END = 0, 1
LETTERS = "abcdefghijklmnopqrstuvwxyz "
"""Token 2 and on."""
RATE = 1e-3
LONGEST = 24
"""Letters of a name."""

Pair = tuple[str, str]


@dataclass(frozen=True)
class Trained:
    """The model, what it has not seen, and how it was trained."""

    model: Seq2Seq
    unseen: list[Pair]
    known: int
    losses: list[float]
    seconds: float


def find_pairs(folder: Path | None = None) -> list[Pair]:
    """Names of two words or more, run together and apart, each once, in a fixed order.

    Args:
        folder: of Python sources; default the standard library's.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    names: set[str] = set()
    for path in sorted(folder.glob("*.py")):
        names.update(re.findall(r"[A-Za-z_]{5,}", path.read_text("utf-8", errors="ignore")))
    pairs = {}
    for name in sorted(names):
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
        together = "".join(words).lower()
        if len(words) > 1 and min(map(len, words)) > 1 and len(together) <= LONGEST:
            pairs[together] = " ".join(words).lower()
    return sorted(pairs.items())


def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens (rows, longest), each row ended and then padded, and lengths (rows,)."""
    rows = [[*(2 + LETTERS.index(letter) for letter in text), END] for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows]), lengths


def decode(tokens: list[int]) -> str:
    """Up to the end token."""
    kept = tokens[: tokens.index(END)] if END in tokens else tokens
    return "".join(LETTERS[token - 2] for token in kept if token > END)


def make_model(dim: int = 128, num_layers: int = 2) -> Seq2Seq:
    """A T5 with random weights."""
    config = t5_config({
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True, "vocab_size": 2 + len(LETTERS), "d_model": dim,
        "d_kv": dim // 4, "num_heads": 4, "d_ff": 4 * dim, "num_layers": num_layers,
        "dropout_rate": 0.0, "decoder_start_token_id": PAD, "eos_token_id": END,
        "pad_token_id": PAD,
    })  # fmt: skip
    model = Seq2Seq(config)
    initialize(model, dim**-0.5)
    with torch.no_grad():
        model.embedding.weight.normal_()
        for name, parameter in model.named_parameters():
            if name.endswith((".q.weight", ".qvk.weight")):  # T5's scores are not scaled
                parameter[:dim].mul_(config.encoder.head_dim**-0.5)
    return model


def draw(by_length: dict[int, list[Pair]], count: int) -> list[Pair]:
    """Pairs of one length, the likelier the more there are: alike sequences are one on a CPU."""
    lengths = sorted(by_length)
    weights = torch.tensor([float(len(by_length[length])) for length in lengths])
    pairs = by_length[lengths[int(torch.multinomial(weights, 1))]]
    drawn = [pairs[i] for i in torch.randint(len(pairs), (count,)).tolist()]
    return sorted(drawn, key=lambda pair: len(pair[1]))


def train(
    pairs: list[Pair],
    *,
    device: str,
    steps: int,
    batch: int = 64,
    held_out: int = 400,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Trained:
    """A model trained on all but `held_out` of the pairs, by AdamW with a rate that falls to 0.

    Args:
        progress: called with the number of steps done and the last loss.
    """
    torch.manual_seed(seed)
    order = torch.randperm(len(pairs)).tolist()
    unseen, known = ([pairs[i] for i in part] for part in (order[:held_out], order[held_out:]))
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    by_length: dict[int, list[Pair]] = {}
    for pair in known:
        by_length.setdefault(len(pair[0]), []).append(pair)
    losses, started = [], time.perf_counter()
    model.train()
    for step in range(steps):
        drawn = draw(by_length, batch)
        (source, lengths), (labels, label_lengths) = (
            tuple(part.to(device) for part in encode(list(texts)))
            for texts in zip(*drawn, strict=True)
        )
        logits = model(source, model.shift_right(labels), lengths, label_lengths).logits
        loss = token_loss(logits, labels, ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    return Trained(model.eval(), unseen, len(known), losses, time.perf_counter() - started)


def segment(model: Seq2Seq, names: list[str], num_beams: int = 1) -> list[str]:
    """What the model makes of names, greedily or by beam search."""
    source, lengths = encode(names)
    device = model.embedding.weight.device
    mask = torch.arange(source.shape[1]) < lengths[:, None]
    config = GenerationConfig(2 * LONGEST, num_beams=num_beams)
    out = generate(model, source.to(device), config, attention_mask=mask.to(device))
    return [decode(tokens) for tokens in out.new_tokens()]
