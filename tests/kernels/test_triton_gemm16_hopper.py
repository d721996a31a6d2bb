"""The 16 bit product of sm_90 with its own epilogue: how work is divided, and that results are within the bound.

Operands are exact, so |y - alpha t x W^T - b| <= (K + 4) 2^-23 alpha t |x||W| (truncated float32 sums) + half a unit in the
last place of the result. The oracle is torch's product in float64.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from anybit.kernels.linear.triton_gemm16_hopper import (
    BLOCK,
    Gemm16Config,
    configure_gemm16,
    gemm16_cases,
    gemm16_seconds,
)
from anybit.kernels.trials import sample_weight
from anybit.kernels.triton.planes import TritonPlanes
from anybit.platforms import ARCHS
from anybit.schemes import ScaleLevel, Scheme, group

gpu = pytest.mark.gpu
UNITS = 132
# M, N, K
SIZES = [(m, n, k) for m in (1, 65, 256, 300, 512, 1000, 1024, 2048, 4096, 20_000)
         for n, k in ((6144, 4096), (4096, 14336), (13824, 5120), (11008, 4096), (200, 768), (57344, 8192), (8, 8))]


def config_for(m: int, n: int, k: int) -> Gemm16Config:
    found = configure_gemm16(m, n, k)
    assert found is not None
    return found


def test_each_tile_has_one_program_and_halves_are_of_the_last_turn() -> None:
    for m, n, k in SIZES:
        config = config_for(m, n, k)
        tiles = -(-m // config.bm) * -(-n // config.bn)
        whole = tiles // config.programs * config.programs if config.halves else tiles
        assert 1 <= config.programs <= UNITS
        assert config.programs <= tiles * config.boxes
        if config.halves:
            assert 0 < 2 * (tiles - whole) <= config.programs


def test_tiles_fit_into_shared_memory() -> None:
    for m, n, k in SIZES:
        config = config_for(m, n, k)
        operands = config.stages * (config.bm + config.bn) * BLOCK * 2
        results = 2 * config.bm * BLOCK * 2
        assert operands + results < ARCHS["sm_90"].shared_bytes - 1024


def test_rows_that_begin_at_no_multiple_of_16_bytes_are_left_to_torch() -> None:
    assert configure_gemm16(512, 512, 516) is None
    assert configure_gemm16(512, 513, 512) is not None


def test_more_rows_never_take_less_time() -> None:
    for n, k in ((6144, 4096), (4096, 14336), (13824, 5120)):
        times = [gemm16_seconds(m, n, k) for m in range(128, 4096, 128)]
        assert all(b >= 0.999 * a for a, b in pairwise(times))


def test_every_kind_of_tile_that_is_chosen_has_something_to_compile() -> None:
    compiled = {(c.constants["BM"], c.constants["BN"], c.constants["STAGES"], c.constants["HALVES"])
                for c in gemm16_cases("triton-expand", "sm_90")}
    assert {(c.bm, c.bn, c.stages, c.halves) for c in (config_for(*size) for size in SIZES)} <= compiled


def test_it_is_compiled_for_hopper_only() -> None:
    assert {case.arch for arch in ARCHS for case in gemm16_cases("triton-expand", arch)} == {"sm_90"}


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


needs_hopper = pytest.mark.skipif(not is_hopper(), reason="no GPU of compute capability 9.0")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NVFP4 = Scheme("fp4_e2m1", (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", (0, 0))))
INT4 = Scheme("int4", (ScaleLevel("bfloat16", group(128)),))


def worst(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, factors: torch.Tensor | None, bias: torch.Tensor | None,
          alpha: float) -> float:
    """The largest error, as a share of its bound."""
    wide, size = x.double() @ w.double().T * alpha, x.double().abs() @ w.double().abs().T * abs(alpha)
    if factors is not None:
        wide, size = wide * factors.double()[:, None], size * factors.double().abs()[:, None]
    if bias is not None:
        wide, size = wide + bias.double(), size + bias.double().abs()
    allowed = (x.shape[1] + 4) * 2.0**-23 * size
    error = (y.double() - wide).abs() / (allowed + (wide.abs() + allowed) * UNIT[y.dtype] + 2.0**-24)
    return float(error.nan_to_num(nan=torch.inf).max())


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    made = torch.Generator("cuda").manual_seed(m * 7 + n * 3 + k)
    x = torch.randn(m, k, device="cuda", generator=made).to(dtype)
    w = torch.randn(n, k, device="cuda", generator=made).to(dtype)
    factors = torch.rand(m, device="cuda", generator=made) + 0.5
    return x, w, factors, torch.randn(n, device="cuda", generator=made)


# ragged in every dimension; less than a tile; several turns; both widths, whole and halved
CASES = [(1, 8, 8), (129, 136, 72), (300, 520, 200), (1000, 4104, 1032), (128, 256, 64), (512, 6144, 256),
         (1024, 6144, 320), (384, 4096, 2048), (700, 33000, 128), (2050, 1288, 520)]


@gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), CASES)
def test_the_product_is_within_the_bound_and_repeats_its_bits(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    from anybit.kernels.triton.gemm16_hopper import product_into, takes

    x, w, factors, bias = operands(m, n, k, dtype)
    for kind in (dtype, torch.bfloat16):
        for given, added in ((factors, None), (None, bias.to(dtype)), (factors, bias)):
            out = torch.full((m, n), float("nan"), device="cuda", dtype=kind)
            assert takes(x, w, out)
            product_into(out, x, w, given, added, 0.75)
            assert worst(out, x, w, given, added, 0.75) <= 1
            for _ in range(2):
                again = torch.full_like(out, 7.0)
                product_into(again, x, w, given, added, 0.75)
                assert torch.equal(again, out)


@gpu
@needs_hopper
@pytest.mark.parametrize(("bn", "stages", "halves"), [(256, 4, False), (256, 4, True), (128, 6, False), (128, 6, True)])
def test_each_tile_multiplies_right(bn: int, stages: int, halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.kernels.triton import gemm16_hopper

    for m, n, k in CASES:
        tiles = -(-m // 128) * -(-n // bn)
        programs = min(7, tiles)
        if halves:  # so few programs that at most half of them have a tile left
            programs = next((p for p in range(7, 140) if 0 < 2 * (tiles % p) <= p), 2 * tiles)
        config = Gemm16Config(128, bn, stages, halves, programs, 3)
        monkeypatch.setattr(gemm16_hopper, "configure_gemm16", lambda *_, config=config: config)
        x, w, factors, bias = operands(m, n, k, torch.bfloat16)
        out = torch.full((m, n), float("nan"), device="cuda", dtype=torch.bfloat16)
        gemm16_hopper.product_into(out, x, w, factors, bias, -1.5)
        assert worst(out, x, w, factors, bias, -1.5) <= 1, (m, n, k)


@gpu
@needs_hopper
def test_nothing_is_written_beside_the_outputs() -> None:
    from anybit.kernels.triton.gemm16_hopper import product_into

    x, w, factors, _ = operands(200, 520, 256, torch.bfloat16)
    whole = torch.full((203, 1024), 5.0, device="cuda", dtype=torch.bfloat16)
    product_into(whole[:200, 256:776], x, w, factors, None, 1.0)
    assert worst(whole[:200, 256:776], x, w, factors, None, 1.0) <= 1
    whole[:200, 256:776] = 5.0
    assert bool((whole == 5.0).all())


@gpu
@needs_hopper
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row(bad: float) -> None:
    from anybit.kernels.triton.gemm16_hopper import product_into

    x, w, factors, _ = operands(300, 520, 256, torch.bfloat16)
    clean, y = (torch.empty(300, 520, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_into(clean, x, w, factors, None, 1.0)
    x[3, 5] = bad
    product_into(y, x, w, factors, None, 1.0)
    others = torch.arange(300, device="cuda") != 3
    assert torch.equal(y[others], clean[others])
    assert not bool(y[3].isfinite().any())


@gpu
@needs_hopper
def test_what_it_does_not_take_is_torchs() -> None:
    from anybit.kernels.triton.gemm16_hopper import takes

    x, w, _, _ = operands(300, 520, 256, torch.bfloat16)
    out = torch.empty(300, 520, device="cuda", dtype=torch.bfloat16)
    assert takes(x, w, out)
    assert not takes(x.float(), w.float(), out)
    assert not takes(x, w, out.float())
    assert not takes(x[:, 4:], w[:, 4:], out)
    assert not takes(x.T.contiguous().T, w, out)


@gpu
@needs_hopper
@pytest.mark.parametrize("scheme", [NVFP4, INT4], ids=str)
@pytest.mark.parametrize("m", [384, 1000])
def test_expanded_products_are_the_twins_and_can_be_captured(
    scheme: Scheme, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 bias needs the epilogue; the twin is torch's product with float32 results, and one rounding after it."""
    from anybit.kernels.triton import gemm16_hopper

    n, k = 1030, 1024
    stored = TritonPlanes().prepare(sample_weight(scheme, (n, k), device="cuda"), torch.bfloat16,
                                    {"decode": "triton-matvec", "small": "triton-fused", "prefill": "triton-expand"})
    x, bias = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, device="cuda")
    y = stored.linear(x, "prefill", bias, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(gemm16_hopper, "VERSIONS", ())
        twin = stored.linear(x, "prefill", bias, torch.bfloat16)
    assert float((y.double() - twin.double()).abs().max()) <= 2 * 2.0**-8 * float(twin.double().abs().max())
    assert float((y != twin).double().mean()) < 0.02  # sums in another order are rounded otherwise now and then
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stored.linear(x, "prefill", bias, torch.bfloat16)
    for _ in range(2):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, y)
