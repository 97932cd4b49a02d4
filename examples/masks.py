"""Who may attend to whom: six masks, and the attention of an encoder, a decoder and a T5.

One English sentence goes through MiniLM (bidirectional) and SmolLM2 (causal): every head of a
layer is drawn, and for each word the one it attends to most is listed. Then the last word is
replaced, to see which tokens notice. The T5 of train_t5_bias.py translates messages that it has not
seen: does cross-attention find the source of a token that it copies, such as "%s" or a name? The T5
is trained on the first run (minutes), and kept in the user's cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import fastattn
from examples import gallery, gallery_data
from examples.gallery import Options, Results
from fastattn import visualize
from fastattn.cli.demo_pairs import HEAT_MAP_SENTENCE as SENTENCE

TOKENS, LONG, TILE = 12, 4096, 64
LAYERS = {"MiniLM": 1, "SmolLM2": 11}  # of 6 and of 30, from 0
HEAD = 7  # of MiniLM's layer: its verbs look at their objects


def six_masks(n: int) -> dict[str, tuple[Any, int]]:
    """Masks by their names, and how many keys there are for n queries."""
    packed = fastattn.Packed(torch.tensor([0, n // 4, n // 2, n]))
    return {
        "bidirectional": (torch.ones(n, n, dtype=torch.bool), n),
        "causal": (fastattn.Causal(), n),
        "cross": (torch.ones(n, n // 2, dtype=torch.bool), n // 2),
        "prefix (UniLM)": (fastattn.Prefix(torch.tensor([n // 3])), n),
        "sliding window": (fastattn.Window(n // 4, 0), n),
        "packed, causal": (packed & fastattn.Causal(), n),
    }


def draw_masks(path: Path) -> None:
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    masks = six_masks(TOKENS).items()
    for axes, (name, (mask, keys)) in zip(figure.subplots(2, 3).flat, masks, strict=True):
        dense = fastattn.masks.as_mask(mask).dense(TOKENS, keys)[0, 0]
        axes.imshow(dense, cmap="Blues", vmin=0, vmax=1.4)
        axes.set_xticks(torch.arange(keys) - 0.5, [])
        axes.set_yticks(torch.arange(TOKENS) - 0.5, [])
        axes.grid(color="white", linewidth=1.5)
        axes.tick_params(length=0)
        axes.set(title=f"{name}: {dense.float().mean():.0%}", xlabel="key", ylabel="query")
    figure.savefig(path)


def work_of_masks() -> dict[str, dict[str, float]]:
    """Of a long sequence, the share of pairs that a mask shows, and of tiles that are visited."""
    found = {}
    for name, (mask, keys) in six_masks(LONG).items():
        dense = fastattn.masks.as_mask(mask).dense(LONG, keys)[0, 0]
        tiles = fastattn.masks.as_mask(dense).tiles(LONG, keys, TILE, TILE)[0]
        shares = dense.float().mean(), (tiles > 0).float().mean()
        found[name] = {"pairs": shares[0].item(), "tiles": shares[1].item()}
    return found


@torch.no_grad()
def look(name: str, model: Any, tokenizer: Any, states: Any, out: Path) -> dict[str, Any]:
    """Draws a layer of a model, and says where its words look; `states` of what it returns."""
    ids = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    labels = visualize.token_labels(tokenizer, ids[0])
    seen = visualize.capture(model, {"input_ids": ids}, layer=LAYERS[name])
    options = {"title": f"{name}, {seen.title}", "path": out / f"masks_{name.lower()}.png"}
    visualize.head_grid(seen, labels, columns=3, **options)
    weights = seen.weights[HEAD] if name == "MiniLM" else seen.weights.mean(0)
    best = 1 + weights[1:-1, 1:-1].argmax(-1)
    with visualize.record_attention(model) as record:
        before = states(model(ids))
    every = torch.stack([call.weights() for call in record.calls])
    other = tokenizer(SENTENCE.replace("stories", "jokes"), return_tensors="pt")["input_ids"]
    change = (before - states(model(other))).norm(dim=-1)[0]
    changed = (ids != other)[0].nonzero()[0, 0].item()
    return {
        "layers": len(record.calls),
        "share_on_later_tokens": every.triu(1).sum(-1).mean().item(),
        "share_on_first_token": every[..., 1:, 0].mean().item(), "earlier_tokens": changed,
        "earlier_tokens_that_notice": int((change[:changed] > 0).sum()),
        "looks_at": [[labels[row].strip("▁"), labels[key].strip("▁")]
                     for row, key in enumerate(best.tolist(), 1)],
    }  # fmt: skip


def align(options: Options) -> dict[str, Any]:
    """Cross-attention of the T5: a picture, and how often a copied token's place is found."""
    from transformers import PreTrainedTokenizerFast

    model, tokenizer = gallery_data.load_t5()
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    pairs = gallery_data.unseen_messages()[: 20 if options.quick else 500]
    hits, drawn = [], False
    for texts in gallery.track(pairs, "aligning"):
        source, target = ([*tokenizer.encode(text).ids, 1] for text in texts)
        once = [t for t in target[:-1] if target.count(t) == source.count(t) == 1]
        read = {"input_ids": torch.tensor([source]),
                "decoder_input_ids": torch.tensor([[0, *target[:-1]]])}  # fmt: skip
        first, last = (visualize.capture(model, read, layer=i, kind="cross") for i in (0, 1))
        if not drawn and len(once) > 1 and 8 <= len(target) <= 14:
            title = "T5, last layer, mean of heads: where a token looks when it is written"
            labels = [visualize.token_labels(named, ids) for ids in (source, target)]
            path = options.out / "masks_alignment.png"
            visualize.alignment(last.weights.mean(0), *labels, title=title, path=path)
            drawn = True
        maps = torch.cat([first.weights, last.weights, last.weights.mean(0, keepdim=True)])
        for token in once:
            found = maps[:, target.index(token)].argmax(-1) == source.index(token)
            hits.append([*found.float().tolist(), 1 / len(source)])
    *heads, mean, chance = torch.tensor(hits).mean(0).tolist()
    return {"copied_tokens": len(hits), "best_head": max(heads), "worst_head": min(heads),
            "mean_of_last_layer": mean, "chance": chance}  # fmt: skip


def run(options: Options) -> Results:
    draw_masks(options.out / "masks.png")
    figures: dict[str, Any] = {"work": work_of_masks()}
    for name, load, states in (
        ("MiniLM", gallery_data.load_minilm, lambda output: output.last_hidden_state),
        ("SmolLM2", gallery_data.load_smollm2, lambda logits: logits),
    ):
        figures[name] = look(name, *load(), states, options.out)
    if not options.quick or gallery_data.t5_folder().is_dir():
        figures["alignment"] = align(options)
    return Results(figures)


def describe(figures: dict[str, Any]) -> str:
    """The section of docs/gallery.md."""
    work = [(name, f"{share['pairs']:.1%}", f"{share['tiles']:.1%}")
            for name, share in figures["work"].items()]  # fmt: skip
    smollm2 = dict(figures["SmolLM2"]["looks_at"])
    looks = [(word, key, smollm2[word]) for word, key in figures["MiniLM"]["looks_at"]
             if len(word) > 3 and word in smollm2]  # fmt: skip
    return gallery.fill(
        "masks", figures, length=LONG,
        work_table=gallery.table(("mask", "pairs seen", f"{TILE} x {TILE} tiles visited"), work),
        looks_table=gallery.table(("word", "in MiniLM", "in SmolLM2"), looks),
    )  # fmt: skip


if __name__ == "__main__":
    gallery.main(__file__, __doc__, run, describe)
