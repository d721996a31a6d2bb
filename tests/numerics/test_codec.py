"""Every code of every format, every tie, the edges: against ml_dtypes where it has the format, literals elsewhere."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from anybit.errors import Damaged
from anybit.numerics.codec import code_values, decode, encode, to_fnuz
from anybit.numerics.formats import FORMATS

ML_DTYPES: dict[str, Any] = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "fp8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}
FLOATS = [name for name in ML_DTYPES if name != "e8m0"]
SMALL = ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2"]
UNSIGNED = ["ue4m3", "ue5m3"]


def all_codes(name: str) -> Tensor:
    spec = FORMATS[name]
    if spec.kind == "int":
        return torch.arange(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1)).to(torch.int8)
    return torch.arange(2**spec.bits).to(torch.uint8)


def finite_values(name: str) -> Tensor:
    values = decode(name, all_codes(name))
    return values[values.isfinite()].unique()  # sorted


def bits_of(values: Tensor) -> Tensor:
    return values.view(torch.int32)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_decodes_as_ml_dtypes_does(name: str) -> None:
    codes = all_codes(name)
    oracle = torch.from_numpy(codes.numpy().view(ML_DTYPES[name]).astype(np.float32))
    ours = decode(name, codes)
    assert torch.equal(ours.isnan(), oracle.isnan())
    assert torch.equal(bits_of(ours)[~ours.isnan()], bits_of(oracle)[~oracle.isnan()])  # -0 too


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e5m2"])
def test_unsigned_floats_are_the_signed_ones_without_sign(name: str) -> None:
    if name == "fp8_e4m3fn":
        assert torch.equal(decode("ue4m3", torch.arange(127).to(torch.uint8)), decode(name, torch.arange(127).to(torch.uint8)))
    else:  # ue5m3 has one mantissa bit more: every second code is an e5m2 value
        even = torch.arange(0, 0x7C).to(torch.uint8)
        assert torch.equal(decode("ue5m3", even * 2), decode(name, even))


def test_ue5m3_bytes_decode_as_in_a_genuine_file() -> None:  # docs/formats/quark.md
    stored = torch.tensor([0x78 - 40, 0x00, 0xFF, 0xFE], dtype=torch.uint8)
    assert decode("ue5m3", stored)[1].item() == 0.0
    assert decode("ue5m3", stored)[3].item() == 114688.0
    assert math.isnan(decode("ue5m3", stored)[2].item())


@pytest.mark.parametrize("name", [f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 9)])
def test_integers_decode_to_themselves(name: str) -> None:
    codes = all_codes(name)
    assert torch.equal(decode(name, codes), codes.to(torch.float32))
    assert torch.equal(encode(name, codes.float()), codes)


@pytest.mark.parametrize("name", ["nf4", "fp4_bnb", "iq4_nl", "fp4_doubled", "mxint4"])
def test_code_books_decode_to_their_values_and_back(name: str) -> None:
    values = torch.tensor(FORMATS[name].values)
    assert torch.equal(decode(name, all_codes(name)), values)
    assert torch.equal(decode(name, encode(name, values)), values)


def test_e8m0_has_no_zero() -> None:  # OCP MX 1.0; genuine files contain byte 0
    assert decode("e8m0", torch.tensor([0], dtype=torch.uint8)).item() == 2.0**-127
    assert math.isnan(decode("e8m0", torch.tensor([255], dtype=torch.uint8)).item())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_float8_tensors_are_taken_by_their_bytes(dtype: torch.dtype) -> None:
    name = "e8m0" if dtype == torch.float8_e8m0fnu else f"fp8_{str(dtype).removeprefix('torch.float8_')}"
    codes = torch.arange(255).to(torch.uint8)
    assert torch.equal(decode(name, codes.view(dtype)).nan_to_num(-1), decode(name, codes).nan_to_num(-1))


def test_codes_of_another_kind_are_a_mistake_of_the_caller() -> None:
    for name, dtype in (("int4", torch.uint8), ("uint4", torch.int8), ("fp4_e2m1", torch.int8), ("nf4", torch.int32)):
        with pytest.raises(TypeError):
            decode(name, torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("name", FLOATS)
def test_encoding_rounds_as_ml_dtypes_does(name: str) -> None:
    """Values, all midpoints and the float32 on either side of them, random magnitudes over the whole range."""
    values = finite_values(name)
    middle = (values[1:] + values[:-1]) / 2
    near = [middle, torch.nextafter(middle, torch.tensor(torch.inf)), torch.nextafter(middle, torch.tensor(-torch.inf))]
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(20_000, generator=generator) * torch.exp2(torch.randn(20_000, generator=generator) * 6)
    top = FORMATS[name].maximum
    x = torch.cat([values, *near, wide.clamp(-top, top), torch.tensor([0.0, -0.0, 1e-9, -1e-9, 1e-42])])
    oracle = torch.from_numpy(x.numpy().astype(ML_DTYPES[name]).view(np.uint8))
    wrong = (encode(name, x) != oracle).nonzero().flatten()[:5]
    assert wrong.numel() == 0, (x[wrong], encode(name, x)[wrong], oracle[wrong])


TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]  # docs/formats/numerics.md §2


@pytest.mark.parametrize(
    ("rounding", "rounded"),
    [("even", [0, 1, 1, 2, 2, 4, 4]), ("up", [0.5, 1, 1.5, 2, 3, 4, 6]), ("down", [0, 0.5, 1, 1.5, 2, 3, 4])],
)
def test_ties_of_fp4_go_where_the_rounding_says(rounding: Any, rounded: list[float]) -> None:
    x = torch.tensor(TIES)
    assert decode("fp4_e2m1", encode("fp4_e2m1", x, rounding=rounding)).tolist() == rounded
    assert decode("fp4_e2m1", encode("fp4_e2m1", -x, rounding=rounding)).tolist() == [-v for v in rounded]


@pytest.mark.parametrize("name", [*FLOATS, *UNSIGNED])
def test_roundings_agree_off_the_ties_and_part_on_them(name: str) -> None:
    values = finite_values(name)
    values = values[values >= 0]
    low, high = values[:-1], values[1:]
    tie = (low + high) / 2
    assert torch.equal(decode(name, encode(name, tie, rounding="up")), high)
    assert torch.equal(decode(name, encode(name, tie, rounding="down")), low)
    assert torch.equal(encode(name, tie) % 2, torch.zeros_like(encode(name, tie)))
    above = torch.nextafter(tie, torch.tensor(torch.inf))
    below = torch.nextafter(tie, torch.tensor(-torch.inf))
    for rounding in ("even", "up", "down"):
        assert torch.equal(decode(name, encode(name, above, rounding=rounding)), high)
        assert torch.equal(decode(name, encode(name, below, rounding=rounding)), low)


def test_integer_ties_and_the_float_below_one_half() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997])
    assert encode("int8", x).tolist() == [0, 2, 2, 0, -2, 0]
    assert encode("int8", x, rounding="up").tolist() == [1, 2, 3, -1, -2, 0]
    assert encode("int8", x, rounding="down").tolist() == [0, 1, 2, 0, -1, 0]


@pytest.mark.parametrize("name", [*FLOATS, *UNSIGNED, "e8m0", "int4", "int8", "uint4", "uint8", "nf4", "iq4_nl"])
@pytest.mark.parametrize("beyond", [1.0001, 8.0, math.inf])
def test_encoding_saturates(name: str, beyond: float) -> None:
    spec = FORMATS[name]
    x = torch.tensor([max(spec.maximum * beyond, 3.4e38 if beyond == math.inf else 0), -math.inf], dtype=torch.float32)
    if name == "e8m0":
        assert decode(name, encode(name, x)).tolist() == [2.0**127, 2.0**-127]
    else:
        assert decode(name, encode(name, x)).tolist() == [spec.maximum, spec.minimum]


@pytest.mark.parametrize("name", [*FLOATS, *UNSIGNED, "e8m0"])
def test_nan_is_kept_where_the_format_has_it_and_is_code_0_elsewhere(name: str) -> None:
    for rounding in ("even", "up", "down"):
        code = encode(name, torch.tensor([math.nan]), rounding=rounding)
        if FORMATS[name].nan_codes:
            assert int(code) & 0x7F | 0x80 in {c | 0x80 for c in FORMATS[name].nan_codes}
            assert bool(decode(name, code).isnan())
        else:
            assert int(code) == 0


def test_nan_becomes_code_0_in_integers_and_code_books() -> None:
    nan = torch.tensor([math.nan])
    assert [int(encode(name, nan)) for name in ("int4", "uint8")] == [0, 0]
    assert decode("nf4", encode("nf4", nan)).item() == 0.0


def test_minus_zero_keeps_its_sign_where_there_is_one() -> None:
    zero = torch.tensor([-0.0])
    tiny = torch.tensor([-1e-9])
    codes = {name: (int(encode(name, zero)), int(encode(name, tiny))) for name in (*SMALL, "fp8_e4m3fn", "fp8_e4m3fnuz")}
    assert codes == {
        "fp4_e2m1": (0x8, 0x8), "fp6_e2m3": (0x20, 0x20), "fp6_e3m2": (0x20, 0x20),
        "fp8_e4m3fn": (0x80, 0x80), "fp8_e4m3fnuz": (0, 0),
    }


def test_e8m0_rounds_to_the_nearest_value_and_ties_up() -> None:
    x = torch.tensor([1.4, 1.5, 2.9, 3.0, 0.0, -2.0, 2.0**-127, 1.5 * 2.0**-127, 2.0**-126])
    assert encode("e8m0", x).tolist() == [127, 128, 128, 129, 0, 0, 0, 1, 1]


def test_nf4_takes_the_lower_value_at_a_midpoint() -> None:
    # the thresholds of bitsandbytes' dQuantizeNF4, which takes the upper value only if x is greater
    thresholds = torch.tensor([
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ])
    assert encode("nf4", thresholds).tolist() == list(range(15))
    assert encode("nf4", torch.nextafter(thresholds, torch.tensor(2.0))).tolist() == list(range(1, 16))


def test_fp4_of_bitsandbytes_encodes_a_sign_and_the_nearest_magnitude() -> None:
    x = torch.tensor([0.9, -0.9, 0.0, 0.001, 0.2083333, -0.004, 0.6])
    assert encode("fp4_bnb", x).tolist() == [3, 11, 0, 0, 6, 9, 2]


def test_large_tensors_are_encoded_in_pieces_with_the_same_result() -> None:
    x = torch.randn(3, 2**18 + 7, generator=torch.Generator().manual_seed(1)) * 4
    for name in ("fp4_e2m1", "fp8_e4m3fn", "int4"):
        pieces = torch.cat([encode(name, part) for part in x.flatten().split(1000)]).view(x.shape)
        assert torch.equal(encode(name, x), pieces)


def test_e4m3fn_becomes_e4m3fnuz_with_twice_the_scale_for_all_codes() -> None:  # docs/formats/numerics.md §3
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    scale = torch.tensor([0.3])
    narrow, doubled = to_fnuz(codes, scale)
    values = decode("fp8_e4m3fnuz", narrow)
    assert torch.equal(values * doubled, decode("fp8_e4m3fn", codes) * scale)
    assert int(narrow[codes == 0x80]) == 0
    assert torch.equal(narrow[codes != 0x80], codes[codes != 0x80])


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_not_turned_into_240(code: int) -> None:
    with pytest.raises(Damaged):
        to_fnuz(torch.tensor([1, code], dtype=torch.uint8), torch.ones(1))


# docs/formats/numerics.md §4: exponents of the e8m0 scale for which every code gives an exact finite product
EXACT_EXPONENTS = {
    "fp4_e2m1": ((-127, 125), (-23, 13), (-127, 125)),
    "fp6_e2m3": ((-127, 125), (-21, 13), (-127, 125)),
    "fp6_e3m2": ((-127, 123), (-20, 11), (-127, 123)),
    "fp8_e4m3fn": ((-124, 119), (-15, 7), (-127, 119)),
    "fp8_e5m2": ((-117, 112), (-8, 0), (-127, 112)),
    "int8": ((-127, 120), (-24, 8), (-127, 120)),
}


@pytest.mark.parametrize("name", EXACT_EXPONENTS)
@pytest.mark.parametrize(("index", "dtype"), [(0, torch.bfloat16), (1, torch.float16), (2, torch.float32)])
def test_products_with_powers_of_two_are_exact_in_the_stated_range(name: str, index: int, dtype: torch.dtype) -> None:
    values = finite_values(name).double()
    scales = code_values("e8m0")[:255].double()
    products = values[None, :] * scales[:, None]  # exact in float64
    exact = (products.to(dtype).double() == products).all(dim=1)
    exponents = exact.nonzero().flatten() - 127
    low, high = EXACT_EXPONENTS[name][index]
    assert exponents.tolist() == list(range(low, high + 1))


@pytest.mark.parametrize(
    ("element", "scale", "share"),
    [
        ("fp4_e2m1", "fp8_e4m3fn", 1.0), ("fp6_e2m3", "fp8_e4m3fn", 1.0), ("fp6_e3m2", "fp8_e4m3fn", 1.0),
        ("fp8_e4m3fn", "fp8_e4m3fn", 0.9939), ("fp8_e5m2", "fp8_e4m3fn", 0.919), ("fp4_e2m1", "ue5m3", 0.9485),
    ],
)
def test_products_with_float8_scales_are_exact_in_bf16_and_float32(element: str, scale: str, share: float) -> None:
    codes, factors = decode(element, all_codes(element)).double(), decode(scale, all_codes(scale)).double()
    products = codes[codes.isfinite()][:, None] * factors[factors.isfinite()]
    assert torch.equal(products.bfloat16().double(), products)
    assert torch.equal(products.float().double(), products)
    assert (products.half().double() == products).double().mean().item() == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4", "int8", "uint8", "fp8_e4m3fn", "fp4_e2m1"])
def test_products_with_16_bit_scales_are_exact_in_float32(name: str, dtype: torch.dtype) -> None:
    scales = (torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e-3).to(dtype)
    products = finite_values(name).double()[:, None] * scales.double()
    assert torch.equal(finite_values(name)[:, None] * scales.float(), products.float())
    assert torch.equal(products.float().double(), products)
