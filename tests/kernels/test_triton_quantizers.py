"""The quantizer kernels against numerics/activations.py: equal codes and equal scales, bit for bit, on the same device.

Without a GPU the device code runs in Triton's interpreter, in a process of its own and on float32 inputs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from anybit.kernels.triton.recipes import ARITHMETIC, can_fake_quantize, can_quantize, statistic_of
from anybit.numerics.activations import RECIPES
from anybit.schemes import ActivationSpec

HERE = Path(__file__).resolve().parent
FP8 = "fp8_e4m3fn"
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def specs_of(recipe: str) -> list[ActivationSpec]:
    """The forms of a recipe that dialects declare."""
    if recipe.startswith("torchao_int8"):
        return [ActivationSpec(e, True, g, recipe, symmetric="asym" not in recipe)
                for e in ("int8", "int7") for g in ("token", "tensor")]
    if recipe == "torchao_fp8_token":
        return [ActivationSpec(e, True, g, recipe, 64 if g == "group" else 0, bound=b)
                for e, g, b in ((FP8, "token", None), (FP8, "group", None), (FP8, "tensor", 2.0),
                                ("fp8_e5m2", "token", 2.0))]
    if recipe in ("int8_token", "int8_token_asym", "torchao_8da4w", "int8_static", "int8_static_divide"):
        return [ActivationSpec("int8", "static" not in recipe, "token", recipe)]
    if recipe in ("fp8_token", "fp8_static", "fp8_static_divide", "fp8_tensor"):
        return [ActivationSpec(FP8, "static" not in recipe, "tensor" if "tensor" in recipe else "token", recipe),
                *([ActivationSpec(FP8, True, "token", recipe, bound=2.0)] if recipe == "fp8_token" else [])]
    if recipe.startswith("fp8_group"):
        return [ActivationSpec(FP8, True, "group", recipe, 128)]
    if recipe == "int4_group":
        return [ActivationSpec("int4", True, "group", recipe, 32)]
    if "nvfp4" in recipe or recipe in ("amdfp4", "fp4_ue5m3_autoround"):
        return [ActivationSpec("fp4_e2m1", False, "group", recipe, 16)]
    if recipe == "mx_even":
        return [ActivationSpec(e, True, "group", recipe, 32)
                for e in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", FP8, "fp8_e5m2")]
    assert recipe.startswith("mx"), recipe
    return [ActivationSpec(FP8 if "8" in recipe else "fp4_e2m1", True, "group", recipe, 32)]


ALL = [pytest.param(spec, id=f"{spec.recipe}-{spec.element}-{spec.granularity}-{spec.bound}")
       for recipe in ARITHMETIC for spec in specs_of(recipe)]


def statics_of(spec: ActivationSpec, device: str) -> list[dict[str, torch.Tensor]]:
    """Static tensors that a checkpoint may bring."""
    plain = {"scale": torch.tensor([0.037], device=device), "global_scale": torch.tensor([33.3], device=device)}
    if spec.recipe.startswith("int8_static"):
        return [plain, {**plain, "zero_point": torch.tensor([-13], dtype=torch.int8, device=device)}]
    if spec.recipe == "torchao_nvfp4":
        return [plain, {}]
    if spec.recipe == "torchao_fp8_token":
        return [{}, {"lower_bound": torch.tensor(0.5, device=device)}]
    return [plain]


def rows_for(spec: ActivationSpec, k: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary rows, and what recipes stumble over: zeros, constants, rows far from 0, midpoints, NaN, infinity."""
    generator = torch.Generator().manual_seed(len(spec.recipe))
    x = torch.randn(15, k, generator=generator)
    x[1] *= 1e-3
    x[2] = 0.0
    x[3] = 5.0
    x[4] = 100 + 0.5 * torch.rand(k, generator=generator)
    x[5] *= 3e4
    x[6, ::2] = -0.0
    x[7] = (2.0 ** torch.randint(-20, 20, (k,), generator=generator).float()) * (1 + 2.0**-7)
    x[8] = 2.0 ** torch.randint(-8, 8, (k,), generator=generator).float()
    x[9] = torch.nextafter(x[8], torch.zeros(k))  # just below powers of two, where logarithms round up
    # near midpoints of codes, where x / s, x * (1/s) and x * (127/a) part
    place = torch.arange(k)
    x[12] = 0.37 * (place % 127 + 0.5) / 127
    x[13] = 0.37 * (2.0 ** (place % 8) * (1 + (place % 7 + 0.5) / 8)) / 448
    x[14] = 0.37 / 6 * torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])[place % 7]
    x[12:, ::16] = 0.37  # 127 / 0.37 and 127 * (1 / 0.37) are other numbers
    if not (statistic_of(spec).startswith("call") or spec.recipe == "torchao_nvfp4"):
        x[10, 3] = float("nan")
        x[11, k // 2] = float("inf")
    return x.to(device, dtype)


def differences(spec: ActivationSpec, device: str, dtype: torch.dtype, k: int = 200) -> list[str]:
    """What differs between kernel and recipe, in words; empty if nothing does."""
    from anybit.kernels.triton.quantizers import fake_quantize, quantize

    found = []
    x = rows_for(spec, k, device, dtype)
    columns = -(-k // 16) * 16
    for tensors in statics_of(spec, device):
        wanted = RECIPES[spec.recipe](x, spec, tensors)
        got = quantize(x, spec, tensors, columns=columns)
        scale = got.scale.T[:, : wanted.scale.shape[-1]] if got.scale.dim() == 2 else got.scale[:, None]
        both = {"scale": (scale, wanted.scale.expand_as(scale))}
        is_nan = wanted.dequantize().isnan()
        both["codes"] = (got.codes[:, :k].masked_fill(is_nan, 0), wanted.codes.masked_fill(is_nan, 0))
        both["padding"] = (got.codes[:, k:], torch.zeros_like(got.codes[:, k:]))
        if wanted.zero_point is not None:
            assert got.zero_point is not None
            both["zero point"] = (got.zero_point[:, None], wanted.zero_point.expand(len(x), 1))
        if wanted.scale_codes is not None:
            assert got.scale_codes is not None
            own = got.scale_codes[:, : wanted.scale_codes.shape[-1]]
            lost = wanted.scale.isnan().expand_as(own)
            both["scale codes"] = (own.masked_fill(lost, 0), wanted.scale_codes.masked_fill(lost, 0))
        if can_fake_quantize(spec) is None:
            # exact values times the row's factor: one rounding of that product, one of the recipe's own
            values, factor = fake_quantize(x, spec, tensors, dtype=torch.float32, columns=columns)
            value = values[:, :k] if factor is None else values[:, :k] * factor[:, None]
            exact = wanted.dequantize()
            near = (value - exact).abs() <= 2.0**-22 * exact.abs() + 2.0**-148
            both["value"] = (near | (value == exact) | is_nan, torch.ones_like(is_nan))
            both["NaN"] = (value.isnan(), is_nan)
            if device == "cuda":  # the interpreter has no sound bfloat16
                held = fake_quantize(x, spec, tensors, columns=columns)[0].float()
                both["bfloat16"] = (held.nan_to_num(7.0), values.nan_to_num(7.0))
        for name, (a, b) in both.items():
            same = (a == b) | ((a != a) & (b != b))
            if not bool(same.all()):
                at = tuple((~same).nonzero()[0].tolist())
                found.append(f"{spec.recipe} {list(tensors)} {name} at {at}: {a[at].item()}, wanted {b[at].item()}, "
                             f"x {x[at[0], min(at[1], k - 1)].item()}; {int((~same).sum())} in all")
    return found


def interpreted(*recipes: str) -> list[str]:
    """`differences` of recipes in this process, which must run with TRITON_INTERPRET=1."""
    return [line for recipe in recipes for spec in specs_of(recipe) for line in differences(spec, "cpu", torch.float32)]


def wrong_quotients(bits: int, boundary_bits: int) -> tuple[int, int]:
    """Mantissas x of `bits` and y of 24 bits whose quotient lies within 2^-22 units in the last place of a midpoint of
    float32 next to a boundary of codes: how many there are, and for how many one Newton step gives the wrong float32.

    x / y is as far from a midpoint t / 2^(24 or 25), t odd, as x 2^(24 or 25) - t y tells, in integers; the two y on
    either side of it are looked at.
    """
    near = wrong = 0
    x = (1 << 23) + (np.arange(1 << (bits - 1), dtype=np.int64) << (24 - bits))
    for boundary in range(1 << (boundary_bits - 1)):
        middle = 2 * ((1 << 23) + (boundary << (24 - boundary_bits)))
        for t, power in product((middle - 1, middle + 1), (24, 25)):
            for y in ((x << power) // t, (x << power) // t + 1):
                off = np.abs((x << power) - t * y)
                close = (y >= 1 << 23) & (y < 1 << 24) & ((off << 21) < y)
                near += int(close.sum())
                wrong += sum(one_newton_step(int(a), int(b)) != rounded(Fraction(int(a), int(b)))
                             for a, b in zip(x[close], y[close], strict=True))
    return near, wrong


def rounded(value: Fraction) -> Fraction:
    """The nearest number of 24 significant bits, ties to even."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit


def one_newton_step(x: int, y: int) -> Fraction:
    """corrected_quotient of quantizers_jit.py with one step."""
    r = rounded(Fraction(1, y))
    first = rounded(x * r)
    remainder = x - first * y
    return rounded(first + (rounded(remainder) if remainder else remainder) * r)


@pytest.mark.parametrize("bits", [8, 11])  # of bfloat16 and float16
def test_one_newton_step_is_enough_for_the_codes_of_16_bit_inputs(bits: int) -> None:
    near, wrong = wrong_quotients(bits, boundary_bits=9)
    assert near >= 1  # the question arises
    assert wrong == 0


LOGARITHMS = ("quark", "autoround", "rceil", "vllm", "ue8m0")


def without_logarithm() -> list[str]:
    """Recipes that the interpreter can run: the vendor's log2 is device code."""
    return [name for name, a in ARITHMETIC.items() if not any(word in a.rule for word in LOGARITHMS)]


@pytest.mark.slow
def test_device_code_equals_the_recipes_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = "import test_triton_quantizers as t; print('\\n'.join(t.interpreted(*t.without_logarithm())))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE, timeout=280,
                          env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": os.pathsep.join(["../../src", *sys.path])})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


def test_every_recipe_has_a_kernel_or_a_reason() -> None:
    without = {name for name in RECIPES if name not in ARITHMETIC}
    assert without == {"llm_int8", "int8_static_output"}
    for name in without:
        assert "no such recipe" not in (can_quantize(ActivationSpec("int8", True, "token", name)) or "")


@pytest.mark.parametrize(("spec", "reason"), [
    (ActivationSpec("int8", True, "token", "int8_token_asym"), "zero point is unbounded"),
    (ActivationSpec(FP8, True, "group", "fp8_group", 128), "scale changes within a row"),
    (ActivationSpec("int4", True, "group", "int4_group", 32), "scale changes within a row"),
    (ActivationSpec("int8", True, "token", "llm_int8"), "outlier columns"),
])
def test_values_that_16_bits_cannot_hold_are_refused(spec: ActivationSpec, reason: str) -> None:
    assert reason in (can_fake_quantize(spec) or "")


def test_recipes_of_the_call_are_those_that_look_at_all_rows() -> None:
    by_call = {name for name in ARITHMETIC for spec in specs_of(name)
               if statistic_of(spec).startswith("call") and spec.granularity == "tensor"}
    assert by_call == {"fp8_tensor", "torchao_int8_token", "torchao_int8_token_asym", "torchao_fp8_token"}


@gpu
@needs_gpu
@pytest.mark.parametrize("spec", ALL)
def test_codes_and_scales_equal_the_recipe_bit_for_bit(spec: ActivationSpec) -> None:
    assert differences(spec, "cuda", torch.bfloat16) == []


@gpu
@needs_gpu
@pytest.mark.parametrize("recipe", ["int8_token", "fp8_token", "fp8_group", "nvfp4", "int8_token_asym"])
def test_long_rows_of_float16_and_float32_are_quantized_alike(recipe: str) -> None:
    for spec in specs_of(recipe)[:1]:
        assert differences(spec, "cuda", torch.float16, k=20_008) == []
        assert differences(spec, "cuda", torch.float32, k=4096) == []


@gpu
@needs_gpu
@pytest.mark.parametrize("recipe", ["int8_token", "fp8_group", "nvfp4_token"])
def test_no_rows_and_strided_rows_work(recipe: str) -> None:
    from anybit.kernels.triton.quantizers import quantize

    spec = specs_of(recipe)[0]
    assert quantize(torch.empty(0, 256, device="cuda", dtype=torch.bfloat16), spec, {}).codes.shape == (0, 256)
    wide = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, 128:384], wide[:, ::2], wide[:2].reshape(512, 2)[:256].T):
        assert torch.equal(quantize(x, spec, {}).codes, quantize(x.contiguous(), spec, {}).codes)


@gpu
@needs_gpu
@pytest.mark.parametrize("recipe", ["int8_token", "int8_token_asym", "fp8_token", "nvfp4_token"])
@pytest.mark.parametrize("k", [4096, 14336, 20_016])
def test_a_row_has_the_same_codes_among_many_as_among_few(recipe: str, k: int) -> None:
    from anybit.kernels.triton.quantizers import quantize

    spec = specs_of(recipe)[0]
    x = torch.randn(80, k, device="cuda", dtype=torch.bfloat16)
    x[3, ::5] = -0.0
    x[4, k - 1] = float("nan")
    x[5] *= 1e30
    x[6] *= 1e-30
    many = quantize(x, spec, {})
    wanted = RECIPES[spec.recipe](x.float(), spec, {})
    lost = wanted.scale.isnan() if wanted.scale.shape[-1] == 1 else wanted.scale.isnan().any(1, keepdim=True)
    assert bool((many.codes.masked_fill(lost, 0) == wanted.codes.masked_fill(lost, 0)).all())
    for start in range(0, 80, 8):
        few = quantize(x[start : start + 8], spec, {})
        assert torch.equal(few.codes, many.codes[start : start + 8])
        of_few, of_many = (q.scale if q.scale.dim() == 1 else q.scale.T for q in (few, many))
        assert torch.equal(of_few.nan_to_num(7.0), of_many[start : start + 8].nan_to_num(7.0))


@gpu
@needs_gpu
@pytest.mark.parametrize("k", [1000, 20_016])
def test_sums_are_those_of_the_codes(k: int) -> None:
    from anybit.kernels.triton.quantizers import quantize

    spec = specs_of("int8_token_asym")[0]
    x = 3 + torch.randn(5, k, device="cuda", dtype=torch.bfloat16)
    found = quantize(x, spec, {}, columns=k + 8, sums=True)
    assert found.sums is not None
    assert torch.equal(found.sums, found.codes.sum(1, dtype=torch.int32))


@gpu
@needs_gpu
def test_packed_codes_are_the_codes_two_a_byte() -> None:
    from anybit.kernels.triton.quantizers import quantize

    spec = specs_of("mxfp4_even")[0]
    x = torch.randn(7, 320, device="cuda", dtype=torch.bfloat16)
    one = quantize(x, spec, {}, columns=384).codes
    two = quantize(x, spec, {}, columns=384, packed=True).codes
    assert torch.equal(two, one[:, ::2] | (one[:, 1::2] << 4))
