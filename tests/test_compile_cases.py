"""What dispatch can select on an H100 is compiled here: tensor cores, no spill, shared memory."""

from __future__ import annotations

import torch

from fastattn.kernels.attention.config import (
    FLOAT32_BACKWARD_CONFIGS,
    FLOAT32_CONFIGS,
    FORWARD_CANDIDATES,
    HALF_BACKWARD_CONFIGS,
    HALF_CONFIGS,
    select_backward_config,
    select_forward_config,
    tiles,
)
from fastattn.testing.compile_report import TARGETS, compile_report

# One case for each tile that dispatch can select: plain (twice), modified, crowded, few rows.
TELLING = ("bidirectional", "causal", "ALiBi, causal", "everything", "few rows, causal")


def test_hopper_kernels_use_wgmma_and_do_not_spill() -> None:
    cases = [f"bfloat16 D{head_dim} {name}" for head_dim in (64, 128) for name in TELLING]
    rows = compile_report(["sm_90"], kernel=["attention_forward"], case=cases)
    assert {row.case for row in rows} == set(cases)
    for row in rows:
        assert row.ok, row.problems
        assert row.spilled_bytes == 0, row
        assert row.shared_bytes <= TARGETS["sm_90"].shared_limit, row
        assert any("GMMA" in name for name, _ in row.tensor_cores), row


def test_hopper_backward_kernels_use_wgmma_and_do_not_spill() -> None:
    cases = ["bfloat16 D64 T5 bias", "bfloat16 D128 causal"]
    rows = compile_report(["sm_90"], kernel=["attention_backward"], case=cases)
    rows = [row for row in rows if row.case in cases]
    walks = [row for row in rows if row.dots]
    assert {(row.case, row.function) for row in walks} == {
        (case, f"_attention_backward_{walk}_kernel") for case in cases for walk in ("rows", "keys")
    }
    for row in rows:
        assert row.ok, row.problems
        assert row.spilled_bytes == row.stack_bytes == 0, row
    for row in walks:
        assert any("GMMA" in name for name, _ in row.tensor_cores), row


def test_hopper_decoding_kernels_do_not_spill() -> None:
    names = (
        "one token, splits",
        "paged 16",
        "fp8 a head, splits",
        "chunk of a prompt",
        "everything",
    )
    cases = [f"bfloat16 D128 {name}" for name in names]
    rows = compile_report(["sm_90"], kernel=["attention_decode"], case=cases)
    rows = [row for row in rows if row.case in cases]
    assert {row.case for row in rows} == set(cases)
    attended = [row for row in rows if row.function == "_attention_decode_kernel"]
    assert len(attended) == len(cases)
    for row in rows:
        assert row.ok, row.problems
        assert row.spilled_bytes == row.stack_bytes == 0, row
    for row in attended:
        assert row.tensor_cores, row
        # Two programs of a step of one token share a multiprocessor: see `decode_config.py`.
        assert row.shared_bytes <= TARGETS["sm_90"].shared_limit // (2 if row.num_warps < 8 else 1)


def test_every_chip_has_decoding_tiles_for_every_head_dim() -> None:
    from fastattn.kernels.attention.decode_config import decode_tile

    for chip in TARGETS:
        for head_dim in (1, 40, 64, 65, 128, 160, 256):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for num_rows, count in ((1, 0), (16, 1), (20, 0), (33, 0), (4096, 2)):
                    for flag in (False, True):
                        tile = decode_tile(
                            chip, head_dim, dtype, num_rows, count,
                            quantized=flag, paged=flag, rotary=flag,
                        )  # fmt: skip
                        assert min(tile.block_m, tile.block_n) >= 16
                        assert tile.block_m >= num_rows or tile.block_m <= 128


def test_every_chip_has_backward_tiles_for_every_head_dim() -> None:
    assert HALF_BACKWARD_CONFIGS.keys() == FLOAT32_BACKWARD_CONFIGS.keys() == set(TARGETS)
    for chip in TARGETS:
        for head_dim in (16, 40, 64, 65, 128, 160, 256):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                for count in (0, 1, 2):
                    config = select_backward_config(chip, head_dim, dtype, count, count > 0)
                    # A gradient by distance needs tiles that are not higher than wide.
                    assert count == 0 or config.rows.block_m <= config.rows.block_n
                    # Products take 16 rows, columns and summands or more.
                    tiles = (config.rows, config.keys, config.bias)
                    assert min(min(tile.block_m, tile.block_n) for tile in tiles) >= 16


def test_every_chip_has_tiles_for_every_head_dim() -> None:
    assert set(HALF_CONFIGS) == set(TARGETS)
    for chip in HALF_CONFIGS:
        for head_dim in (16, 40, 64, 65, 128, 160, 256):
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                chosen = tiles(chip, head_dim, dtype)
                for num_modifiers, expected in ((0, chosen.plain), (1, chosen.modified)):
                    config = select_forward_config(chip, head_dim, dtype, 4096, num_modifiers)
                    assert config == expected
                few_rows = select_forward_config(chip, head_dim, dtype, 64, 0)
                assert few_rows.block_m <= 64


def test_candidates_hold_the_selected_tiles_of_hopper() -> None:
    selected = {tile for row in HALF_CONFIGS["sm_90"].values() for tile in (row.plain,)}
    assert {tile for tile in selected if tile.block_n >= 64} <= set(FORWARD_CANDIDATES)
    assert FLOAT32_CONFIGS["sm_90"].keys() == HALF_CONFIGS["sm_90"].keys()
