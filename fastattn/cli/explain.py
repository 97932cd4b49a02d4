"""`fastattn explain`: what fastattn would run for a call, or in a model, and why not the rest."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def explain(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or name of a Hugging Face model, or a model type such as bert or llama, "
            "of which a small one with random weights is made. Left out: a call of --shape.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str, typer.Option(help="Of a call: BATCHxSEQLENxHEADSxHEAD_DIM.")
    ] = "2x1024x16x64",
    seqlen_k: Annotated[
        int, typer.Option(show_default=False, help="Keys. Default: as many as queries.")
    ] = 0,
    heads_kv: Annotated[
        int, typer.Option(show_default=False, help="Key/value heads. Default: all.")
    ] = 0,
    causal: Annotated[bool, typer.Option("--causal")] = False,
    window: Annotated[
        int | None, typer.Option(show_default=False, help="Keys to the left that a query sees.")
    ] = None,
    softcap: Annotated[float, typer.Option()] = 0.0,
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    device: Annotated[
        str, typer.Option(show_default=False, help="Default: cuda if there is one.")
    ] = "",
    impl: Annotated[str, typer.Option(help="auto, triton, sdpa or reference.")] = "auto",
) -> None:
    """Tell what would run and why not the others; of a model, what was replaced and what ran.

    A model is run once on a padded batch. Exits with 1 if nothing of it could be replaced.
    """
    import torch

    if dtype not in _DTYPES:
        raise typer.BadParameter(f"expected one of {list(_DTYPES)}, got {dtype}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind, place = getattr(torch, _DTYPES[dtype]), torch.device(device)
        if model is None:
            sizes = (_sizes(shape), seqlen_k, heads_kv)
            typer.echo(_explain_call(sizes, causal, window, softcap, kind, place, impl))
            return
        replaced = _explain_model(model, kind, place, impl)
    except (ValueError, TypeError, RuntimeError, NotImplementedError, OSError) as error:
        typer.echo(f"fastattn explain: {error}", err=True)
        raise typer.Exit(2) from error
    if not replaced:
        raise typer.Exit(1)


def _sizes(shape: str) -> tuple[int, int, int, int]:
    parts = shape.split("x")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--shape must be BATCHxSEQLENxHEADSxHEAD_DIM, got {shape!r}")
    batch, seqlen, heads, head_dim = map(int, parts)
    return batch, seqlen, heads, head_dim


def _explain_call(
    sizes: tuple[tuple[int, int, int, int], int, int],
    causal: bool,
    window: int | None,
    softcap: float,
    dtype: Any,
    device: Any,
    impl: str,
) -> str:
    import torch

    import fastattn

    (batch, seqlen, heads, head_dim), seqlen_k, heads_kv = sizes
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    q = torch.empty(batch, seqlen, heads, head_dim, **options)
    k = torch.empty(batch, seqlen_k or seqlen, heads_kv or heads, head_dim, **options)
    mask = None if window is None else fastattn.Window(window, 0 if causal else window)
    return str(fastattn.explain(q, k, k, causal=causal, mask=mask, softcap=softcap, impl=impl))


def _explain_model(name: str, dtype: Any, device: Any, impl: str) -> int:
    """Prints what was replaced and what then ran; returns how many modules were replaced."""
    import torch

    import fastattn
    from fastattn.integrations.transformers import use_impl

    model = _load(name).to(device, dtype).eval()
    report = fastattn.replace_attention(model)
    typer.echo(str(report))
    if report.replaced:
        inputs = {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in _inputs(model).items()
        }
        with torch.no_grad(), use_impl(impl):
            model(**inputs)
        typer.echo()
        typer.echo(str(report.calls()))
    return report.replaced


def _load(name: str) -> Any:
    """The model of a folder or name, or a small random one of a type."""
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if Path(name).exists() or name not in CONFIG_MAPPING:
        return AutoModel.from_pretrained(name)
    config = AutoConfig.for_model(name)
    for layers in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers",
                   "decoder_layers", "n_layer", "n_layers"):  # fmt: skip
        if isinstance(getattr(config, layers, None), int):
            setattr(config, layers, 2)
    return AutoModel.from_config(config)


def _inputs(model: Any) -> dict[str, Any]:
    """A padded batch of two random sequences, images or spectrograms: what the model takes."""
    import torch

    text = model.config.get_text_config()
    vision = getattr(model.config, "vision_config", model.config)
    taken = inspect.signature(model.forward).parameters
    inputs = {}
    if "input_ids" in taken or "decoder_input_ids" in taken:
        tokens = torch.randint(text.vocab_size, (2, 12))
        names = ("input_ids", "attention_mask")
        if model.main_input_name not in names:  # speech: only the decoder reads text
            names = ("decoder_input_ids", "decoder_attention_mask")
        mask = (torch.arange(12) < torch.tensor([[12], [7]])).long()
        inputs = dict(zip(names, (tokens, mask), strict=True))
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens
    if "pixel_values" in taken:
        inputs["pixel_values"] = torch.randn(2, vision.num_channels, *[vision.image_size] * 2)
    if "input_features" in taken:
        shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        inputs["input_features"] = torch.randn(shape)
    return inputs
