"""The kernel of one token on sm_90: what it takes, how it is launched, and that it is its twin's.

Bounds of results: test_triton_w8a8.py, whose GPU tests run this kernel as well where `configure_one` chooses it. Here
launches are forced, and the portable kernel is the oracle: int8 sums are exact, so the bits are the same.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_triton_w8a8 import complaint, needs_gpu, prepared, rows_for, spec, weight_for
from test_triton_w8a8_hopper import needs_hopper, same_numbers

from anybit.kernels.linear.triton_rows8 import OneConfig, configure_one, one_cases
from anybit.kernels.linear.triton_w8a8 import FP8, INT8
from anybit.kernels.linear.triton_w8a8_tiles import CASES, Operands, Product8, operands
from anybit.kernels.request import regime_of
from anybit.platforms import ARCHS

gpu = pytest.mark.gpu
SIZES = [(4096, 6144), (4096, 14336), (17408, 5120), (1000, 1008), (16, 16), (57344, 8192), (2512, 1536)]  # N, K


def given(product: Product8) -> Operands:
    found = operands(product, "sm_90")
    assert found is not None
    return found


def test_every_row_has_one_program_and_only_one_token_is_taken() -> None:
    for _, product in CASES:
        for n, k in SIZES:
            assert all(configure_one(n, k, m, product, given(product)) is None for m in (None, 0, 2, 16))
            config = configure_one(n, k, 1, product, given(product))
            if config is not None:
                assert config.grid(n) * config.rows >= n > (config.grid(n) - 1) * config.rows
                assert not product.w_group or product.w_rows % config.rows == 0  # one number for a program


def test_wide_fp8_weights_of_short_rows_alone_are_the_portable_kernels() -> None:
    by_row, in_blocks = {(17408, 5120), (28672, 4096), (9728, 2560), (18944, 3584)}, {(18944, 3584)}
    for _, product in CASES:
        left = {(n, k) for n, k in {*SIZES, *by_row} if configure_one(n, k, 1, product, given(product)) is None}
        assert left == (set() if product.is_integer else in_blocks if product.w_group else by_row)


def test_the_portable_kernel_keeps_what_this_one_has_no_scales_for() -> None:
    blocks = Product8("fp8_e4m3fn", spec("fp8_e4m3fn", "fp8_group", "group", 128), 128, 128)
    assert configure_one(4096, 4096, 1, blocks, given(blocks)) is not None
    for other in (replace(blocks, w_rows=64), replace(blocks, w_group=64), replace(blocks, w_group=0),
                  Product8("int8", spec("int8", "int8_token"), 1, 128)):
        assert configure_one(4096, 4096, 1, other, Operands("fp8_e4m3fn", promote=True)) is None
    assert configure_one(4096, 4096, 1, blocks, Operands("float16")) is None


def test_every_launch_that_is_chosen_has_something_to_compile() -> None:
    compiled = {tuple(case.constants[name] for name in ("KIND", "W_SHIFTED", "IN_BLOCKS", "ROWS", "AHEAD", "WARPS",
                                                        "EVEN")) for case in one_cases("sm_90")}
    for _, product in CASES:
        for n, k in [*SIZES, (256, 512), (1024, 4096), (28672, 4096), (18944, 3584), (512, 28672), (65536, 1024)]:
            config = configure_one(n, k, 1, product, given(product))
            if config is not None:
                even = k % (512 * config.warps) == 0
                assert (given(product).kind, product.w_shifted, bool(product.w_group), config.rows, config.ahead,
                        config.warps, even) in compiled, (n, k)


def test_it_is_compiled_for_hopper_only() -> None:
    assert {case.arch for arch in ARCHS for case in one_cases(arch)} == {"sm_90"}


# --- on a GPU ---------------------------------------------------------------------------------------------------------

LAUNCHES = [(4, 2, 2), (4, 1, 2), (8, 1, 2), (4, 3, 2), (2, 4, 1), (4, 1, 4)]


def forced(monkeypatch: pytest.MonkeyPatch, launch: tuple[int, int, int]) -> None:
    """Every call of one token through this kernel, launched so."""
    from anybit.kernels.triton import w8a8

    monkeypatch.setattr(w8a8, "configure_one", lambda n, k, m, *rest: OneConfig(*launch) if m == 1 else None)


@gpu
@needs_gpu
@needs_hopper
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("name", ["int8-channel", "int8-tensor-asymmetric", "int8-channel-static-zero",
                                  "int8-zero-points"])
def test_int8_is_the_portable_kernels_bit_for_bit(
    name: str, launch: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anybit.kernels.triton import w8a8

    for n, k in ((1003, 1040), (384, 4096), (50, 14336)):
        weight = weight_for(name, n, k, "cuda")
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        inputs = [rows_for(5, k, "cuda", torch.bfloat16)[row : row + 1].clone() for row in range(5)]
        with monkeypatch.context() as patch:
            patch.setattr(w8a8, "VERSIONS", ())
            portable = prepared(weight, INT8.name)
            wanted = [portable.linear(x, regime_of(1), bias, torch.bfloat16) for x in inputs]
        with monkeypatch.context() as patch:
            forced(patch, launch)
            stored = prepared(weight, INT8.name)
            for row, (x, result) in enumerate(zip(inputs, wanted, strict=True)):
                assert same_numbers(stored.linear(x, regime_of(1), bias, torch.bfloat16), result), (n, k, row)


@gpu
@needs_gpu
@needs_hopper
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("name", ["fp8-channel", "fp8-tensor-static", "fp8-128x128", "e5m2-channel"])
def test_fp8_is_within_the_bound_of_a_wide_adder_and_repeats_its_bits(
    name: str, launch: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(monkeypatch, launch)
    for n, k in ((1003, 1040), (256, 4096), (50, 14336)):
        weight = weight_for(name, n, k, "cuda")
        stored = prepared(weight, FP8.name)
        bias = torch.randn(n, device="cuda")
        for row in range(5):
            x = rows_for(5, k, "cuda", torch.bfloat16)[row : row + 1].clone()
            assert complaint(stored, weight, x, bias) == ""
            first = stored.linear(x, regime_of(1), bias, torch.float32)
            for _ in range(3):
                assert torch.equal(stored.linear(x, regime_of(1), bias, torch.float32).view(torch.int32),
                                   first.view(torch.int32))
