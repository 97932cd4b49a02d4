"""What the tests of pictures share."""

import itertools

import pytest
import torch
from torch import Tensor, nn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def family(name: str, head: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small random model, maybe with a head over tokens, and a padded batch."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 37,
    }  # fmt: skip
    ids = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    torch.manual_seed(0)
    if name == "bert":
        return transformers.BertModel(transformers.BertConfig(**sizes)).eval(), inputs
    if name == "llama":
        inputs["attention_mask"] = mask.flip(1)
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
        made = transformers.LlamaForCausalLM if head else transformers.LlamaModel
        return made(config).eval(), inputs
    inputs |= {"decoder_input_ids": ids[:, :6], "decoder_attention_mask": mask[:, 3:9]}
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4
        )
        made = transformers.T5ForConditionalGeneration if head else transformers.T5Model
        return made(config).eval(), inputs
    config = transformers.BartConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=3, encoder_ffn_dim=37,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=37,
    )  # fmt: skip
    return transformers.BartModel(config).eval(), inputs


def drawn(axes) -> Tensor:
    return torch.from_numpy(axes.images[0].get_array().data)


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def assert_nothing_is_cut(figure) -> None:
    """All text lies within the figure, and labels of an axis do not lie on each other."""
    renderer = figure.canvas.get_renderer()
    for axes in (axes for axes in figure.axes if axes.axison):
        for axis, low, high in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            boxes = [t.get_window_extent(renderer) for t in axis.get_ticklabels() if t.get_text()]
            boxes.sort(key=lambda box: getattr(box, low))
            for one, other in itertools.pairwise(boxes):
                assert getattr(one, high) <= getattr(other, low) + 1
            for box in boxes:
                assert box.x0 >= 0 and box.y0 >= 0
                assert box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
