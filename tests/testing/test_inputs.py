import subprocess
import sys

import pytest
import torch

from fastattn import testing
from fastattn.testing import make_cu_seqlens, make_lengths, make_packed_qkv, make_qkv, poison


def test_qkv_have_the_public_shapes() -> None:
    q, k, v = make_qkv(2, 5, 7, 4, 2, 16, 24, dtype=torch.bfloat16)
    assert (q.shape, k.shape, v.shape) == ((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 24))
    assert {t.dtype for t in (q, k, v)} == {torch.bfloat16}
    assert all(t.is_contiguous() for t in (q, k, v))
    q, k, v = make_qkv(1, 3, 3, 2)
    assert q.shape == k.shape == v.shape == (1, 3, 2, 64)


def test_a_seed_fixes_the_values_in_every_dtype_and_layout() -> None:
    state = torch.get_rng_state()
    first = make_qkv(2, 5, 7, 4, seed=3)
    again = make_qkv(2, 5, 7, 4, seed=3, dtype=torch.float64, layout="bhsd_view")
    other = make_qkv(2, 5, 7, 4, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    for x, same, different in zip(first, again, other, strict=True):
        assert torch.equal(x.double(), same)
        assert not torch.equal(x, different)
        assert same.stride() == (*same.transpose(1, 2).contiguous().transpose(1, 2).stride(),)
        assert not same.is_contiguous()
    assert not torch.equal(first[1], first[2])
    assert abs(torch.cat([t.flatten() for t in first]).std().item() - 1) < 0.05


@pytest.mark.cuda
def test_cuda_gets_the_values_of_the_cpu() -> None:
    for x, y in zip(make_qkv(1, 3, 3, 2), make_qkv(1, 3, 3, 2, device="cuda"), strict=True):
        assert torch.equal(x, y.cpu())


def test_packed_qkv() -> None:
    q, k, v = make_packed_qkv([3, 0, 2], [1, 4, 2], 4, 2, 8)
    assert (q.shape, k.shape, v.shape) == ((5, 4, 8), (7, 2, 8), (7, 2, 8))
    with pytest.raises(ValueError, match="lengths_k must have as many sequences as lengths_q"):
        make_packed_qkv([3], [1, 2], 4)


@pytest.mark.parametrize("seed", range(20))
def test_lengths_hold_both_ends(seed: int) -> None:
    lengths = make_lengths(5, 9, min_length=2, seed=seed)
    assert lengths.dtype == torch.int32 and lengths.shape == (5,)
    assert lengths.min() == 2 and lengths.max() == 9
    assert torch.equal(lengths, make_lengths(5, 9, min_length=2, seed=seed))
    assert make_lengths(1, 9, seed=seed).tolist() == [9]


def test_cu_seqlens() -> None:
    assert make_cu_seqlens([3, 0, 2]).tolist() == [0, 3, 3, 5]
    offsets = make_cu_seqlens(torch.tensor([4], dtype=torch.int64))
    assert offsets.tolist() == [0, 4] and offsets.dtype == torch.int32
    with pytest.raises(ValueError, match=r"one dimension, got shape \(1, 2\)"):
        make_cu_seqlens(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"must not be negative, got \[2, -1\]"):
        make_cu_seqlens([2, -1])


def test_poison_fills_with_nan() -> None:
    x = torch.zeros(4, 4, dtype=torch.float16, requires_grad=True)
    assert poison(x) is x and x.isnan().all()
    view = torch.zeros(2, 4)
    poison(view[:, 1])
    assert view.isnan().sum() == 2
    with pytest.raises(TypeError, match=r"torch.int32, which has no NaN"):
        poison(torch.zeros(1, dtype=torch.int32))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_heads_kv must divide num_heads=4, got 3"):
        make_qkv(1, 2, 2, 4, 3)
    with pytest.raises(ValueError, match="seqlen_k must be at least 1, got 0"):
        make_qkv(1, 2, 0, 4)
    with pytest.raises(ValueError, match="layout must be 'bshd' or 'bhsd_view', got 'bhsd'"):
        make_qkv(1, 2, 2, 4, layout="bhsd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_length must be between 0 and max_length=3, got 4"):
        make_lengths(2, 3, min_length=4)


def test_the_package_loads_nothing_until_asked() -> None:
    code = (
        "import sys, fastattn.testing\n"
        "from fastattn.testing import compare, make_qkv, is_interpreting, WorkMeter\n"
        "assert 'triton' not in sys.modules\n"
        "try:\n    fastattn.testing.missing\nexcept AttributeError as error:\n"
        "    assert 'missing' in str(error)\nelse:\n    raise SystemExit('no AttributeError')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert all(getattr(testing, name) is not None for name in testing.__all__)
    assert set(testing.__all__) <= set(dir(testing))
