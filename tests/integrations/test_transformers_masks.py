"""The mask function for transformers: always as exact as transformers' own dense mask."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from transformers import masking_utils

import fastattn.integrations.transformers as fastattn_hf
from fastattn.integrations.transformers_masks import LazyMask, _lengths
from fastattn.masks import Causal, DenseMask, Lengths, Window, take_apart

BIDIRECTIONAL = masking_utils.bidirectional_mask_function
CAUSAL = masking_utils.causal_mask_function
SLIDING = masking_utils.sliding_window_causal_mask_function(6)
SLIDING_BOTH_WAYS = masking_utils.sliding_window_bidirectional_mask_function(4)
FIRST_THREE = masking_utils.or_masks(CAUSAL, lambda b, h, q, kv: kv < 3)
PACKED = masking_utils.packed_sequence_mask_function(
    torch.arange(20)[None].expand(4, -1).div(7).int()
)
CHUNKED = masking_utils.chunked_causal_mask_function(5, torch.zeros(4, dtype=torch.int64))
KNOWN = {
    "bidirectional": BIDIRECTIONAL,
    "causal": CAUSAL,
    "sliding": SLIDING,
    "sliding both ways": SLIDING_BOTH_WAYS,
}
UNKNOWN = {"or": FIRST_THREE, "packed": PACKED, "chunked": CHUNKED}


def visible_keys(kind: str) -> torch.Tensor | None:
    """2-D masks (4, 20): all True, cut on a side, with holes; one row sees nothing."""
    if kind == "none":
        return None
    visible = torch.arange(20) < torch.tensor([20, 7, 13, 0])[:, None]
    if kind == "full":
        return torch.ones_like(visible)
    if kind == "left":
        return visible.flip(1)
    if kind == "holes":
        return visible & (torch.arange(20) % 5 != 2)
    return visible


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("shape", [(20, 20, 0, 0), (3, 20, 17, 0), (1, 20, 19, 0), (5, 12, 15, 8)])
@pytest.mark.parametrize("padding", ["none", "full", "right", "left", "holes"])
@pytest.mark.parametrize("kind", [*KNOWN, *UNKNOWN])
def test_mask_function_is_exact(kind, padding, shape, encoder):
    """Whatever it returns says the same as transformers' own dense mask."""
    q_length, kv_length, q_offset, kv_offset = shape
    function = {**KNOWN, **UNKNOWN}[kind]
    options = {
        "batch_size": 4, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": function, "attention_mask": visible_keys(padding),
    }  # fmt: skip
    expected = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
    config = transformers.BertConfig() if encoder else transformers.BartConfig()
    causal = kind in ("causal", "sliding")
    result = fastattn_hf.attention_mask(
        **options,
        allow_is_causal_skip=causal,
        allow_is_bidirectional_skip=not causal and kind in KNOWN,
        config=config,
    )
    if result is None:
        meant = Causal().dense(q_length, kv_length) if causal else torch.ones(1, dtype=torch.bool)
        assert torch.equal(meant.expand_as(expected), expected)
        return
    assert tuple(result.shape) == tuple(expected.shape)
    assert isinstance(result, LazyMask) or kind in UNKNOWN
    if isinstance(result, LazyMask):
        assert not result.touched
        structure = result.structure.dense(q_length, kv_length).expand_as(expected)
        rows = take_apart(result.structure).seqlens_q
        live = torch.ones(4, q_length, dtype=torch.bool)
        if rows is not None:
            # Rows are dropped only where the row itself is padding.
            assert q_length == kv_length and (causal or encoder)
            live = torch.arange(q_length) < rows[:, None]
            assert not bool((visible_keys(padding) & ~live).any())
        assert torch.equal(structure[:, 0][live], expected[:, 0][live])
    assert torch.equal(result & True, expected)


def test_static_caches_get_the_exact_mask():
    """Keys run on past the queries there, so a mask aligned at the last key would be wrong."""
    for offset in (2, torch.tensor(2)):
        options = {"batch_size": 2, "q_length": 4, "kv_length": 16, "q_offset": offset}
        mask = fastattn_hf.attention_mask(**options, mask_function=CAUSAL)
        expected = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
        assert torch.equal(mask, expected)


def test_padding_takes_lengths_and_no_dense_mask():
    """What a kernel gets for plain padding is bounds, with a mask only where there are holes."""
    options = {"batch_size": 4, "q_length": 20, "kv_length": 20, "mask_function": CAUSAL}
    plain = fastattn_hf.attention_mask(**options, attention_mask=visible_keys("right"))
    parts = take_apart(plain.structure)
    assert parts.mask is None and parts.starts_k is None and parts.window_right == 0
    assert parts.seqlens_k.tolist() == parts.seqlens_q.tolist() == [20, 7, 13, 0]
    holes = fastattn_hf.attention_mask(**options, attention_mask=visible_keys("holes"))
    assert take_apart(holes.structure).mask.shape == (4, 1, 1, 20)


@pytest.mark.parametrize("padding", ["full", "right", "left", "holes"])
def test_bounds_without_reading_them(padding):
    """On a GPU nothing waits for values: bounds and mask both, right in every case."""
    visible = visible_keys(padding)
    lengths, has_holes, within = _lengths(visible, queries_are_keys=True, readable=False)
    assert has_holes and within == -1 and lengths.starts_k is not None
    joined = lengths & DenseMask(visible[:, None, None, :])
    live = torch.arange(20) < lengths.seqlens_q[:, None]
    expected = visible[:, None, None, :].expand(4, 1, 20, 20)
    assert torch.equal(joined.dense(20, 20)[:, 0][live], expected[:, 0][live])
    assert not bool((visible & ~live).any())


def test_lazy_mask_is_a_tensor_to_whoever_operates_on_it():
    visible = visible_keys("right")
    shape = (4, 1, 20, 20)

    def lazy() -> LazyMask:
        return LazyMask(shape, torch.device("cpu"), (Causal(), Window(5, None)), visible, True)

    expected = (Window(5, 0) & Lengths(visible.sum(1))).dense(20, 20)
    assert isinstance(lazy(), torch.Tensor) and lazy().dtype == torch.bool
    assert torch.equal(lazy()[:, :, -3:], expected[:, :, -3:])
    assert torch.equal(torch.where(lazy(), 1, 0), expected.int())
    assert torch.equal(lazy().to(torch.float64), expected.double())
    assert torch.equal(torch.cat([lazy(), lazy()], -1), torch.cat([expected, expected], -1))
    assert "LazyMask" in repr(lazy())


@pytest.mark.parametrize("windows", [(Causal(),), ()])
def test_a_model_may_write_into_its_mask(windows, monkeypatch):
    monkeypatch.setattr(fastattn_hf, "_FLOPS_PER_SEQUENCE", -1)  # to use the structure
    monkeypatch.setattr(fastattn_hf, "_FLOPS_PER_WINDOWED_SEQUENCE", -1)
    padding = visible_keys("right")
    mask = LazyMask((4, 1, 20, 20), torch.device("cpu"), windows, padding, True)
    assert not mask.touched
    mask[:, :, :, 0].fill_(False)  # a view
    mask.masked_fill_(torch.eye(20, dtype=torch.bool), True)
    q = torch.randn(4, 2, 20, 8)
    out, _ = fastattn_hf.attention_forward(torch.nn.Identity(), q, q, q, mask)
    visible = padding[:, None, None, :] & torch.ones(20, 20, dtype=torch.bool)
    visible = visible.tril() if windows else visible
    visible[..., 0] = False
    visible |= torch.eye(20, dtype=torch.bool)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=visible)
    torch.testing.assert_close(out.transpose(1, 2), expected)
