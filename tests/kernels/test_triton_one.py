"""The product of one token in Gluon: which forms it takes, how it is launched, and on a GPU what it and a few give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from anybit.kernels.linear.triton_planes import _SAMPLES, MATVEC
from anybit.kernels.trials import compare, sample_weight
from anybit.kernels.triton import planes_form
from anybit.kernels.triton import planes_one_launch as launch
from anybit.kernels.triton.planes_form import form_of
from anybit.kernels.triton.planes_prepare import pack
from anybit.platforms.archs import ARCHS
from anybit.schemes import CHANNEL, Offset, ScaleLevel, Scheme, group


def k_quant(element: str, sub: str, size: int, *, minimum: bool) -> Scheme:
    above = ScaleLevel("float16", group(256))
    offset = Offset("minimum", sub, group(size), (above,), subtract=True) if minimum else None
    return Scheme(element, (ScaleLevel(sub, group(size)), above), offset=offset)


BF16 = ScaleLevel("bfloat16", group(128))
HALF = ScaleLevel("float16", group(32))
TAKEN = {
    **{name: scheme for name, scheme in _SAMPLES.items() if launch.takes_one(form_of(scheme, 4096))},
    "q2_k": k_quant("uint2", "uint4", 16, minimum=True),
    "q3_k": k_quant("int3", "int6", 16, minimum=False),
    "q5_k": k_quant("uint5", "uint6", 32, minimum=True),
    "iq4_xs": k_quant("iq4_nl", "int6", 32, minimum=False),
    "iq4_nl": Scheme("iq4_nl", (HALF,)),
    "q4_1": Scheme("uint4", (HALF,), offset=Offset("minimum", "float16", group(32))),
    "q8_0": Scheme("int8", (HALF,)),
    "uint8 g32 zp": Scheme("uint8", (HALF,), offset=Offset("zero_point", "uint8", group(32))),
    "mxfp8": Scheme("fp8_e4m3fn", (ScaleLevel("e8m0", group(32)),)),
    "int2 g128": Scheme("int2", (BF16,)),
    "int5 channel": Scheme("int5", (ScaleLevel("float32", CHANNEL),)),
    "uint7 g32 zp": Scheme("uint7", (HALF,), offset=Offset("zero_point", "uint7", group(32))),
    "uint6 channel zp": Scheme("uint6", (ScaleLevel("bfloat16", CHANNEL),), offset=Offset("zero_point", "uint6", CHANNEL)),
    "mxfp6_e3m2": Scheme("fp6_e3m2", (ScaleLevel("e8m0", group(32)),)),
    "fp4 channel": Scheme("fp4_e2m1", (ScaleLevel("float32", CHANNEL),)),
    "nf4 g64 to fp16": Scheme("nf4", (ScaleLevel("float32", group(64)),), round_to="float16"),
    "fp4_bnb g64 to bf16": Scheme("fp4_bnb", (ScaleLevel("float32", group(64)),), round_to="bfloat16"),
    "nf4 g32 to bf16": Scheme("nf4", (ScaleLevel("float32", group(32)),), round_to="bfloat16"),
}  # fmt: skip


def test_coarse_bytes_and_codes_of_nan_are_left_to_other_kernels() -> None:
    left = [name for name, scheme in _SAMPLES.items() if name not in TAKEN]
    assert left == ["int8 channel", "fp8 block128"]
    special = replace(form_of(TAKEN["mxfp8"], 4096), special=1)
    assert launch.planned_one(special, 4096, 4096) is None


@pytest.mark.parametrize("name", TAKEN)
def test_programs_cover_rows_and_every_part_of_k_has_work(name: str) -> None:
    for n, k in ((64, 512), (4096, 4096), (28672, 4096), (4096, 14336), (200, 640), (151936, 896)):
        form = form_of(TAKEN[name], k)
        config = launch.planned_one(form, n, k)
        assert config is not None
        assert planes_form.ROWS % config.rows == 0
        blocks = form.padded(k) // (launch.fields_of(form, k) * form.tile)
        assert -(-blocks // config.split) * (config.split - 1) < blocks or config.split == 1


def test_only_the_architecture_that_it_was_measured_on_is_launched_so() -> None:
    form = form_of(TAKEN["q4_k"], 4096)
    assert [arch for arch in ARCHS if launch.one_config(form, 4096, 4096, arch)] in (["sm_90"], [])
    assert {case.arch for arch in ARCHS for case in MATVEC.cases(arch) if "registers" in case.label} == {"sm_90"}


def test_a_triton_without_the_product_of_registers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, has in (("3.5.1", False), ("3.6.0", True)):
        monkeypatch.setattr(launch, "has_gluon", lambda: True)
        monkeypatch.setattr(launch, "version", lambda name, installed=installed: installed)
        launch.has_product.cache_clear()
        assert launch.has_product() is has
    launch.has_product.cache_clear()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def on_hopper(test):  # type: ignore[no-untyped-def]
    is_one = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(not is_one, reason="no GPU of sm_90")(test))


def stored_on_gpu(weight, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    from anybit.kernels.triton.planes import StoredPlanes

    return StoredPlanes(pack(weight, dtype), None)


def shapes_of(scheme: Scheme) -> tuple[tuple[int, int], ...]:
    """Ragged rows; whole blocks and, where the groups allow, cut ones; parts of K and none."""
    above = scheme.scales[0].block[1] if scheme.scales else 0
    if len(scheme.scales) > 1 and scheme.scales[1].block[1]:
        return (200, 768), (320, 4096)
    return (200, 640), (70, 5 * above or 1000), (320, 4096)


def demand_products(name: str, dtype: torch.dtype) -> None:
    for n, k in shapes_of(TAKEN[name]):
        weight = sample_weight(TAKEN[name], (n, k), device="cuda", seed=n)
        stored = stored_on_gpu(weight, dtype)
        for m in (1, 2, 7, 8, 11, 16):
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            # scales of scales make sums beyond float16
            out = torch.float32 if dtype == torch.float16 else dtype
            found = compare(weight, lambda x, stored=stored, out=out: stored.linear(x, "decode", None, out), x)
            assert found.ok, f"{name} M={m} N={n} K={k}: {found.fault}"


@on_hopper
@pytest.mark.parametrize("name", TAKEN)
def test_products_of_bfloat16_are_within_the_bound(name: str) -> None:
    demand_products(name, torch.bfloat16)


@on_hopper
@pytest.mark.parametrize("name", ["int4 g128", "nvfp4", "mxfp4", "uint4 g128 zp", "q4_k", "int3 g128", "nf4 g32 to bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_programs_of_every_size_give_the_product(name: str, dtype: torch.dtype) -> None:
    """Many rows and few, long rows and short: each way in which warps share rows and K."""
    found = set()
    for n, k in ((21200, 768), (8500, 768), (1000, 4096), (520, 13824)):
        config = launch.planned_one(form_of(TAKEN[name], k), n, k)
        assert config is not None
        found.add((config.rows, config.warps, config.along))
        weight = sample_weight(TAKEN[name], (n, k), device="cuda", seed=n)
        x = torch.randn(1, k, device="cuda", dtype=dtype)
        stored, out = stored_on_gpu(weight, dtype), torch.float32 if dtype == torch.float16 else dtype
        difference = compare(weight, lambda x, stored=stored, out=out: stored.linear(x, "decode", None, out), x)
        assert difference.ok, f"{name} N={n} K={k}: {difference.fault}"
    assert len(found) >= 3


@on_hopper
@pytest.mark.parametrize("name", ["q4_k", "q6_k", "int3 g128", "q8_0", "mxfp6_e2m3", "nf4 g64 to fp16", "uint7 g32 zp"])
def test_products_of_float16_are_within_the_bound(name: str) -> None:
    demand_products(name, torch.float16)


@on_hopper
@pytest.mark.parametrize("name", ["q4_k", "nf4 g64 to bf16", "int3 g128", "q8_0"])
def test_bias_float32_results_and_an_unaligned_row_are_served(name: str) -> None:
    weight = sample_weight(TAKEN[name], (200, 512), device="cuda")
    stored = stored_on_gpu(weight, torch.bfloat16)
    x = torch.randn(513, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(200, device="cuda", dtype=torch.bfloat16)
    plain = stored.linear(x[1:].clone().view(1, 512), "decode", None, torch.float32)
    assert torch.equal(stored.linear(x[1:].view(1, 512), "decode", None, torch.float32), plain)
    added = stored.linear(x[1:].view(1, 512), "decode", bias, torch.bfloat16)
    assert torch.equal(added, (plain + bias.float()).bfloat16())
    held = torch.randn(5 * 520 + 1, device="cuda", dtype=torch.bfloat16)
    for rows in (held[1:].view(5, 520)[:, :512], held[:-1].view(5, 520)[:, :512]):
        wanted = stored.linear(rows.clone(), "decode", bias, torch.bfloat16)
        assert torch.equal(stored.linear(rows, "decode", bias, torch.bfloat16), wanted)


@on_hopper
@pytest.mark.parametrize("name", ["q4_k", "q8_0", "nf4 g64 to bf16", "int4 g128", "nvfp4"])
def test_nan_stays_in_its_row_and_calls_repeat_bit_for_bit(name: str) -> None:
    weight = sample_weight(TAKEN[name], (192, 1024), device="cuda")
    stored = stored_on_gpu(weight, torch.bfloat16)
    x = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    first = stored.linear(x, "decode", None, torch.bfloat16)
    for _ in range(20):
        assert torch.equal(stored.linear(x, "decode", None, torch.bfloat16), first)
    pair = torch.cat([x, torch.full_like(x, float("nan"))])
    found = stored.linear(pair, "decode", None, torch.bfloat16)
    assert not found[0].isnan().any()
    assert found[1].isnan().all()
