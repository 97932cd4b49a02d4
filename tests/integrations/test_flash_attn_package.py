"""The flash_attn shim as a package: bert_padding, and what `import flash_attn` finds."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastattn.integrations.flash_attn as shim
from fastattn.integrations.flash_attn import bert_padding


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randn(*shape):
    return torch.randn(shape)


# Padding.


def test_unpad_and_pad():
    x = randn(3, 7, 2, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])
    for attention_mask in (mask, mask.bool(), mask.int()):
        x.grad = None
        packed, indices, cu_seqlens, longest, seqused = bert_padding.unpad_input(x, attention_mask)
        assert torch.equal(packed, x[mask.bool()])
        assert torch.equal(cu_seqlens, torch.tensor([0, 3, 9, 10], dtype=torch.int32))
        assert cu_seqlens.dtype == seqused.dtype == torch.int32
        assert (longest, seqused.tolist()) == (6, [3, 6, 1])
        assert isinstance(longest, int)
        padded = bert_padding.pad_input(packed, indices, 3, 7)
        assert torch.equal(padded, x * mask[..., None, None])
        assert torch.equal(bert_padding.pad_input(packed, indices.int(), 3, 7), padded)
    (padded * 2).sum().backward()
    assert torch.equal(x.grad, 2.0 * mask[..., None, None].expand_as(x))


def test_unpad_with_room_for_more():
    x = randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    room = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    packed, indices, cu_seqlens, longest, seqused = bert_padding.unpad_input(x, mask, room)
    assert torch.equal(packed, x[(mask + room).bool()])
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert (cu_seqlens.tolist(), longest, seqused.tolist()) == ([0, 3, 7], 4, [2, 1])


def test_unpad_concatenated_sequences():
    x = randn(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(
        x, lengths
    )
    assert torch.equal(packed, torch.cat((x[0, :5], x[1, :5], x[2])))
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, *range(12, 18)]
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)


def test_index_first_axis():
    x = randn(5, 2, 3).double().requires_grad_()
    indices = torch.tensor([3, 0, 4])
    assert torch.equal(bert_padding.index_first_axis(x, indices), x[indices])
    assert torch.autograd.gradcheck(lambda x: bert_padding.index_first_axis(x, indices), x)
    put = bert_padding.index_put_first_axis
    assert torch.equal(put(x[:3], indices, 6)[indices], x[:3])
    assert torch.equal(put(x[:3], indices, 6)[[1, 2, 5]], torch.zeros(3, 2, 3).double())
    assert torch.autograd.gradcheck(lambda x: put(x[:3], indices, 6), x)
    rows, same = bert_padding.index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices])
    assert torch.equal(same, x)


# As the package flash_attn.

needs_none = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash_attn itself is installed"
)


@pytest.fixture
def _installed() -> Iterator[None]:
    assert shim.install()
    yield
    shim.uninstall()


@needs_none
@pytest.mark.usefixtures("_installed")
def test_install():
    import flash_attn
    import flash_attn.bert_padding
    from flash_attn.bert_padding import pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    assert flash_attn.flash_attn_func is shim.flash_attn_func
    assert flash_attn_varlen_func is shim.flash_attn_varlen_func
    assert (pad_input, unpad_input) == (bert_padding.pad_input, bert_padding.unpad_input)
    assert flash_attn.bert_padding is sys.modules["flash_attn.bert_padding"]
    functions = [name for name in shim.__all__ if name.endswith(("func", "kvcache"))]
    assert len(functions) == 7
    assert set(functions) <= set(dir(flash_attn)) & set(dir(flash_attn.flash_attn_interface))
    assert not hasattr(flash_attn, "install")
    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.flash_attn_interface"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec is sys.modules[name].__spec__
        assert spec.name == name
    for name in ("flash_attn.losses", "flash_attn.layers.rotary", "flash_attn_interface"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    with pytest.raises(ImportError):
        from flash_attn.flash_attn_interface import _flash_attn_forward  # noqa: F401

    assert importlib.metadata.version("flash_attn") == flash_attn.__version__
    assert importlib.metadata.version("flash-attn") == flash_attn.__version__
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash_attn"]
    assert importlib.metadata.version("pytest") == pytest.__version__


@needs_none
def test_uninstall():
    assert not shim.installed()
    assert shim.install()
    assert shim.install()
    assert shim.installed()
    shim.uninstall()
    shim.uninstall()
    assert not shim.installed()
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]


@needs_none
def test_install_without_metadata():
    assert shim.install(metadata=False)
    try:
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("flash_attn")
        assert importlib.util.find_spec("flash_attn") is not None
    finally:
        shim.uninstall()


def test_the_real_package_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert shim.install() is False
    assert not shim.installed()
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    real = importlib.import_module("flash_attn")
    try:
        assert real.real
        assert shim.install() is False
        shim.uninstall()
        assert sys.modules["flash_attn"] is real
    finally:
        del sys.modules["flash_attn"]  # not by monkeypatch, which would put it back


# In a process of its own: transformers remembers what it found. Its two checks for a GPU are
# answered for it; without that, it refuses "flash_attention_2" on this machine, as asserted first.
TRANSFORMERS = """
import torch
import fastattn.integrations.flash_attn as shim
from fastattn import dispatch

assert shim.install()
import transformers
from transformers.utils import import_utils

config = transformers.LlamaConfig(
    vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(config).eval()
if not torch.cuda.is_available():
    try:
        model.set_attn_implementation("flash_attention_2")
    except ImportError as error:
        assert "not available on CPU" in str(error)
    else:
        raise AssertionError("transformers accepted flash_attention_2 on a CPU")
import_utils.is_torch_cuda_available = lambda: True
import_utils.is_flash_attn_2_available.cache_clear()
transformers.PreTrainedModel._flash_attn_can_dispatch = lambda *args, **kwargs: True

ids = torch.randint(3, 60, (2, 9))
mask = torch.ones(2, 9, dtype=torch.long)
mask[1, :3] = 0
results = []
calls = []
dispatch.listeners.append(lambda name, problem: calls.append(name))
for impl in ("eager", "flash_attention_2"):
    calls.clear()
    model.set_attn_implementation(impl)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    results.append((logits[mask.bool()], tokens))
torch.testing.assert_close(results[1][0], results[0][0])
assert torch.equal(results[1][1], results[0][1])
print(len(calls), "calls")
"""


@needs_none
def test_transformers_calls_it_right():
    pytest.importorskip("transformers")
    root = Path(__file__).parents[2]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "10 calls"  # two layers, a forward pass and 4 of generate
