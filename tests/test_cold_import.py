"""What `import fastattn` must not need: Triton above all, and the optional dependencies.

Each test runs in a process of its own, where nothing has been imported yet.
"""

import os
import subprocess
import sys
import textwrap

import pytest

BLOCK_TRITON = """
import importlib.abc, sys

class BlockTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "triton":
            raise ImportError(f"{fullname} is blocked in this test", name=fullname)
        return None

sys.meta_path.insert(0, BlockTriton())
"""

# The sizes are no multiple of a tile, the heads are grouped, and seqlen_q != seqlen_k.
PROBLEM = """
import torch
import fastattn
from fastattn import reference

torch.manual_seed(0)
q = torch.randn(2, 5, 4, 16)
k, v = torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 24)

def worst(x, y):
    return (x.double() - y.double()).abs().max().item()

def plain_torch(mask):
    keys = k.repeat_interleave(2, dim=2)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, keys) / 4
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v.repeat_interleave(2, dim=2))
    return out, scores.logsumexp(-1)

def check(dense, **options):
    # dense is the mask that the options stand for
    wide = (q.double(), k.double(), v.double())
    wanted = reference.attention(*wide, return_lse=True, **options)
    plain = plain_torch(dense)
    for implementation in (fastattn.attention, reference.attention):
        # Apart, because another path may serve the call that also wants lse.
        out = implementation(q, k, v, **options)
        _, lse = implementation(q, k, v, return_lse=True, **options)
        for name, g, p, w in zip(("out", "lse"), (out, lse), plain, wanted):
            assert g.shape == p.shape == w.shape and g.dtype == torch.float32
            rounding = torch.finfo(torch.float32).eps * w.abs().max().item()
            assert worst(p, w) < 100 * rounding, f"the peer computes another {name}"
            assert worst(g, w) <= 2 * worst(p, w) + rounding, (name, implementation, options)

every = torch.ones(2, 1, 5, 7, dtype=torch.bool)
lower = every.tril(2)
"""


def run_cold(code: str, **env: str) -> str:
    """Run code in a fresh interpreter, with TRITON_INTERPRET set only if `env` sets it."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_import_takes_only_what_it_needs() -> None:
    code = """
        import sys
        import torch
        before = set(sys.modules)
        import fastattn
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
    """
    imported = set(run_cold(textwrap.dedent(code)).split())
    assert "fastattn" in imported
    unwanted = {"triton", "transformers", "tokenizers", "safetensors"}
    unwanted |= {"matplotlib", "rich", "typer", "pytest", "hypothesis"}
    assert imported & unwanted == set()


def test_using_torch_paths_does_not_import_triton() -> None:
    code = """
import sys
check(every)
check(lower, causal=True)
assert "triton" not in sys.modules
"""
    run_cold(PROBLEM + code)


# With TRITON_INTERPRET=1 the kernels may run on CPU tensors, if only there were a Triton.
@pytest.mark.parametrize("env", [{}, {"TRITON_INTERPRET": "1"}], ids=["plain", "interpret"])
def test_attention_works_without_triton(env: dict[str, str]) -> None:
    code = """
check(every)
check(lower, causal=True)
lengths = torch.tensor([7, 4])
check(every & (torch.arange(7) < lengths[:, None])[:, None, None], mask=fastattn.Lengths(lengths))
holes = torch.arange(7) % 3 != 1
check(lower & holes, mask=holes, causal=True)
"""
    run_cold(BLOCK_TRITON + PROBLEM + code, **env)


def test_triton_by_name_raises_without_triton() -> None:
    """No fallback in silence: the error names what was asked for and what is missing."""
    code = """
try:
    fastattn.attention(q, k, v, impl="triton")
except Exception as error:
    print(error)
else:
    raise SystemExit("attention(impl='triton') ran without Triton")
"""
    for env in ({}, {"TRITON_INTERPRET": "1"}):
        assert "triton" in run_cold(BLOCK_TRITON + PROBLEM + code, **env).lower()


def test_explain_says_that_triton_is_missing() -> None:
    code = "print(fastattn.explain(q, k, v))"
    text = run_cold(BLOCK_TRITON + PROBLEM + code).lower()
    assert "triton" in text
    assert "sdpa" in text or "reference" in text
