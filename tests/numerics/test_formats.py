"""The table of number formats against its document and against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from anybit.numerics.formats import FORMATS, FP4_BNB_VALUES, NF4_VALUES

# docs/formats/numerics.md §1: maximum, smallest normal, smallest subnormal
LIMITS = {
    "fp4_e2m1": (6.0, 1.0, 0.5),
    "fp6_e2m3": (7.5, 1.0, 0.125),
    "fp6_e3m2": (28.0, 0.25, 0.0625),
    "fp8_e4m3fn": (448.0, 2.0**-6, 2.0**-9),
    "fp8_e4m3fnuz": (240.0, 2.0**-7, 2.0**-10),
    "fp8_e5m2": (57344.0, 2.0**-14, 2.0**-16),
    "fp8_e5m2fnuz": (57344.0, 2.0**-15, 2.0**-17),
    "ue4m3": (448.0, 2.0**-6, 2.0**-9),
    "ue5m3": (114688.0, 2.0**-14, 2.0**-17),
    "bfloat16": (3.3895313892515355e38, 2.0**-126, 2.0**-133),
    "float16": (65504.0, 2.0**-14, 2.0**-24),
    "float32": (3.4028234663852886e38, 2.0**-126, 2.0**-149),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_a_float_are_those_of_the_document(name: str) -> None:
    spec = FORMATS[name]
    assert (spec.maximum, 2.0 ** (1 - spec.bias), 2.0 ** (1 - spec.bias - spec.mantissa)) == LIMITS[name]


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_span_their_bits(bits: int) -> None:
    signed, unsigned = FORMATS[f"int{bits}"], FORMATS[f"uint{bits}"]
    assert (signed.minimum, signed.maximum) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (unsigned.minimum, unsigned.maximum) == (0, 2**bits - 1)


def test_nf4_has_the_bits_that_bitsandbytes_stores() -> None:
    wanted = """bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
                3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"""
    bits = np.asarray(NF4_VALUES, dtype=np.float32).view(np.uint32)
    assert [f"{b:08x}" for b in bits] == wanted.split()


def test_fp4_of_bitsandbytes_is_its_own_table() -> None:
    values = torch.tensor(FP4_BNB_VALUES)
    wanted = torch.tensor([0, 0.0052083335, 0.6666667, 1, 0.33333334, 0.5, 0.16666667, 0.25])
    assert torch.equal(values, torch.cat((wanted, -wanted)))
    assert bool(torch.signbit(values[8]))


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "fp8_e4m3fnuz", "fp8_e5m2", "fp8_e5m2fnuz"])
def test_nan_and_infinity_codes_are_those_of_ml_dtypes(name: str) -> None:
    values = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, f"float8_{name[4:]}")).astype(np.float32)
    assert FORMATS[name].nan_codes == tuple(np.nonzero(np.isnan(values))[0])
    assert FORMATS[name].inf_codes == tuple(np.nonzero(np.isinf(values))[0])
