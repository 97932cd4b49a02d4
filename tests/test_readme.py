"""The README's examples of dropping fastattn in run, line by line."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fastattn
import fastattn.models

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
SECTION = README.partition("## Drop it into what you have")[2].partition("\n## ")[0]
BLOCKS = {
    block.partition("\n")[0]: block for block in re.findall(r"```python\n(.*?)```", SECTION, re.S)
}


class VisionModel(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(2)[:, None]
        return F.scaled_dot_product_attention(x, x, x)


def run(subject: str, **names: Any) -> dict[str, Any]:
    (block,) = (block for title, block in BLOCKS.items() if subject in title)
    assert len([line for line in block.splitlines() if line]) <= 6  # its title and five lines
    names |= {"torch": torch, "fastattn": fastattn}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_there_is_one_for_each_ecosystem() -> None:
    assert len(BLOCKS) == 4


def test_pytorch() -> None:
    names = run("PyTorch", model=nn.TransformerEncoderLayer(16, 2))
    assert isinstance(names["attention"], nn.MultiheadAttention)
    assert names["report"].replaced == 1


def test_transformers(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    names = run("transformers", AutoModel=AutoModel, folder=tmp_path)
    model = names["model"].eval()
    assert model.config._attn_implementation == "fastattn"
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    report = names["fastattn_hf"].report(model, input_ids=ids, attention_mask=mask)
    assert report.layers_served == 1


def test_sdpa() -> None:
    import fastattn.integrations.sdpa as shim

    shim.reset_calls()
    images = torch.randn(2, 3, 8, 8)
    names = run("scaled_dot_product_attention", vision_model=VisionModel(), images=images)
    assert sum(shim.calls().served.values()) == 1
    assert names["out"].shape == (2, 1, 3, 64)


def test_flash_attn() -> None:
    from fastattn.integrations import flash_attn

    try:
        names = run("flash_attn")
        q = torch.randn(1, 5, 2, 16)
        assert names["flash_attn_func"](q, q, q, causal=True).shape == q.shape
        assert sys.modules["flash_attn"].__version__.startswith("2.")
    finally:
        flash_attn.uninstall()


FAMILIES = README.partition("## Run the three families")[2].partition("\n## ")[0]


def family(title: str, config: Any, cls: Any, tmp_path: Path) -> dict[str, Any]:
    from fastattn.generation import GenerationConfig, generate

    torch.manual_seed(0)
    cls(config).save_pretrained(tmp_path)
    found = re.findall(r"```python\n(.*?)```", FAMILIES, re.S)
    (block,) = (block for block in found if block.startswith(f"# {title} ("))
    ids = torch.randint(3, 30, (2, 7))
    names = {
        "fastattn": fastattn, "generate": generate, "GenerationConfig": GenerationConfig,
        "SamplingParams": fastattn.SamplingParams, "input_ids": ids,
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    }  # fmt: skip
    exec(compile(re.sub(r'"path/to/\w+"', repr(str(tmp_path)), block), "README.md", "exec"), names)
    return names


def test_an_encoder(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    assert family("an encoder", config, BertModel, tmp_path)["hidden"].shape == (2, 7, 16)


def test_a_decoder(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=16,
    )  # fmt: skip
    out = family("a decoder", config, LlamaForCausalLM, tmp_path)["out"]
    assert out.sequences.shape[0] == 2 and out.sequences.shape[1] > 7


def test_an_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=30, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    out = family("an encoder-decoder", config, T5ForConditionalGeneration, tmp_path)["out"]
    assert out.sequences.shape[0] == 2
