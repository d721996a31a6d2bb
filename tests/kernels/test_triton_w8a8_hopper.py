"""The kernel of sm_90 whose warps have different work: what it takes, how work is divided, and that it is its twin's.

Bounds of results: test_triton_w8a8.py, whose GPU tests run this kernel as well where `configure_hopper` chooses it. Here
tiles and shares are forced, and the portable kernel is the oracle: int8 sums are exact, so the bits are the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_triton_w8a8 import complaint, needs_gpu, prepared, rounds_here, rows_for, spec, weight_for
from torch import Tensor

from anybit.kernels.linear import triton_w8a8_hopper
from anybit.kernels.linear.triton_w8a8 import FP8, INT8
from anybit.kernels.linear.triton_w8a8_hopper import BLOCK, HopperConfig, configure_hopper, hopper_cases
from anybit.kernels.linear.triton_w8a8_tiles import CASES, Operands, Product8, operands
from anybit.kernels.request import regime_of
from anybit.platforms import ARCHS

gpu = pytest.mark.gpu
SIZES = [(4096, 6144), (14336, 4096), (5120, 13824), (1000, 1008), (16, 16), (57344, 8192), (8192, 57344)]  # N, K
ROWS = [1, 9, 16, 33, 64, 65, 128, 129, 200, 512, 1000, 4096, 20_000]


def given(product: Product8) -> Operands:
    found = operands(product, "sm_90")
    assert found is not None
    return found


@pytest.mark.parametrize(("label", "product"), CASES)
def test_tiles_fit_and_every_block_has_one_program(label: str, product: Product8) -> None:
    for n, k in SIZES:
        for m in ROWS:
            config = configure_hopper(n, k, m, product, given(product))
            if config is None:
                continue
            assert config.stages * (config.bm + config.bn) * BLOCK < ARCHS["sm_90"].shared_bytes - 8192
            steps = config.tiles(m, n) * -(-k // BLOCK)
            if config.share:
                assert config.share * config.grid(m, n) >= steps > config.share * (config.grid(m, n) - 1)
                assert config.parts == 2 * config.grid(m, n) * config.bm * config.bn
            else:
                assert 1 <= config.grid(m, n) <= config.tiles(m, n)
                assert config.parts == 0
            if not product.is_integer and product.w_group:
                assert product.w_rows % config.bn == 0  # one number for a tile


def test_the_portable_kernel_keeps_what_this_one_has_no_scales_for() -> None:
    blocks = Product8("fp8_e4m3fn", spec("fp8_e4m3fn", "fp8_group", "group", 128), 128, 128)
    assert configure_hopper(4096, 4096, 256, blocks, given(blocks)) is not None
    for other in (replace(blocks, w_rows=64), replace(blocks, w_group=64), replace(blocks, w_group=0),
                  Product8("int8", spec("int8", "int8_token"), 1, 128)):
        assert configure_hopper(4096, 4096, 256, other, Operands("fp8_e4m3fn", promote=True)) is None
    assert configure_hopper(4096, 4096, 256, blocks, Operands("float16")) is None


def test_one_row_is_another_kernels() -> None:
    for _, product in CASES:
        assert configure_hopper(4096, 14336, 1, product, given(product)) is None


def test_pinned_tiles_do_not_depend_on_the_rows_and_are_not_shared() -> None:
    for _, product in CASES:
        config = configure_hopper(4096, 14336, None, product, given(product))
        assert config is not None
        assert config.share == 0
        assert config.grid(4096, 4096) > config.grid(1, 4096)


def test_every_kind_of_tile_that_is_chosen_has_something_to_compile() -> None:
    compiled = [case.constants for case in hopper_cases("sm_90")]
    kinds = {(c["IS_INTEGER"], c["W_SHIFTED"], c["IN_BLOCKS"], c["BM"], c["BN"], c["STREAM"], c["WAITS"])
             for c in compiled}
    for _, product in CASES:
        for n, k in [*SIZES, (256, 512), (1024, 4096), (28672, 8192), (18944, 3584), (512, 28672)]:
            for m in [*ROWS, 17, 24, 48, 96, 192, 256, 384]:
                config = configure_hopper(n, k, m, product, given(product))
                if config is not None:
                    assert (product.is_integer, product.w_shifted, bool(product.w_group), config.bm, config.bn,
                            config.share > 0, config.waits) in kinds, (n, k, m)


def test_many_rows_wait_for_their_quantization_in_small_products_only() -> None:
    for _, product in CASES:
        waiting = {(n, m): config.waits for n in (4096, 28672) for m in (33, 64, 65, 512, 513)
                   if (config := configure_hopper(n, 4096, m, product, given(product))) is not None}
        assert waiting == {(n, m): m <= (512 if n == 4096 else 64) for n, m in waiting}
        assert len(waiting) == 10


def test_it_is_compiled_for_hopper_only() -> None:
    assert {case.arch for arch in ARCHS for case in hopper_cases(arch)} == {"sm_90"}


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


needs_hopper = pytest.mark.skipif(not is_hopper(), reason="no GPU of compute capability 9.0")


def forced(monkeypatch: pytest.MonkeyPatch, bm: int, bn: int, share: int, waits: bool) -> None:
    """Every call through this kernel with these tiles."""
    from anybit.kernels.triton import w8a8

    def one(n: int, k: int, m: int | None, *rest: Any) -> HopperConfig:
        made = HopperConfig(bm, bn, bm // 64, 6, share, 0, waits)
        rows = 64 if m is None else m
        steps = made.tiles(rows, n) * -(-k // BLOCK)
        return replace(made, programs=-(-steps // share) if share else min(7, made.tiles(rows, n)))

    monkeypatch.setattr(w8a8, "configure_hopper", one)


def same_numbers(found: Tensor, wanted: Tensor) -> bool:
    """The same bits, except that one NaN is as good as another."""
    return torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.nan_to_num(), wanted.nan_to_num())


TILES = [(64, 64, 0, True), (64, 64, 5, False), (64, 128, 3, True), (64, 128, 0, False), (128, 128, 0, False),
         (128, 128, 7, False), (128, 128, 100, True)]


@gpu
@needs_gpu
@needs_hopper
@pytest.mark.parametrize(("bm", "bn", "share", "waits"), TILES)
@pytest.mark.parametrize("name", ["int8-channel", "int8-tensor-asymmetric", "int8-zero-points"])
def test_int8_is_the_portable_kernels_bit_for_bit(
    name: str, bm: int, bn: int, share: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anybit.kernels.triton import w8a8

    for n, k in ((1000, 1040), (384, 4096)):
        weight = weight_for(name, n, k, "cuda")
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(w8a8, "VERSIONS", ())
            portable = prepared(weight, INT8.name)
            inputs = [rows_for(m, k, "cuda", torch.bfloat16) for m in (1, 65, 130, 300)]
            wanted = [portable.linear(x, regime_of(len(x)), bias, torch.bfloat16) for x in inputs]
        with monkeypatch.context() as patch:
            forced(patch, bm, bn, share, waits)
            stored = prepared(weight, INT8.name)
            for x, result in zip(inputs, wanted, strict=True):
                for _ in range(3):
                    y = stored.linear(x, regime_of(len(x)), bias, torch.bfloat16)
                    assert same_numbers(y, result), (n, k, len(x))


@gpu
@needs_gpu
@needs_hopper
@pytest.mark.parametrize(("bm", "bn", "share", "waits"), TILES)
@pytest.mark.parametrize("name", ["fp8-channel", "fp8-128x128", "e5m2-channel"])
def test_fp8_is_within_the_bound_and_repeats_its_bits(
    name: str, bm: int, bn: int, share: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced(monkeypatch, bm, bn, share, waits)
    for n, k in ((1000, 1040), (384, 4096), (136, 1024), (136, 2176)):  # scales are read for eight blocks of K at once
        weight = weight_for(name, n, k, "cuda")
        stored = prepared(weight, FP8.name)
        for m in (1, 65, 130, 300):
            x = rows_for(m, k, "cuda", torch.bfloat16)
            assert complaint(stored, weight, x, None, narrow=rounds_here(weight, FP8.name)) == ""
            first = stored.linear(x, regime_of(m), None, torch.bfloat16)
            for _ in range(3):
                assert same_numbers(stored.linear(x, regime_of(m), None, torch.bfloat16), first)


@gpu
@needs_gpu
@needs_hopper
def test_this_triton_is_one_that_compiles_it() -> None:
    from anybit.kernels.triton.straight import version

    assert version() in triton_w8a8_hopper.VERSIONS
