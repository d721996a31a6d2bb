"""Scales from absolute maxima: MX shared exponents, NVFP4's two levels, integer scales; every tool's variant by name.

Reading a checkpoint needs none of this: scales are stored. Dynamic activations (`activations.py`) and re-quantization
(`quantize.py`) do, and there the variants give different codes. All arithmetic is float32, in the order written.
Sources: docs/formats/numerics.md §5, §6, §8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from anybit.numerics.codec import decode, encode
from anybit.numerics.formats import NumberFormat, number_format

__all__ = [
    "NVFP4_RECIPES",
    "SHARED_EXPONENTS",
    "Nvfp4Recipe",
    "asymmetric_scale",
    "largest_exponent",
    "quotient",
    "shared_exponent",
    "symmetric_scale",
]

_SMALLEST_NORMAL: Final = 2.0**-126


def quotient(a: Tensor | float, b: Tensor | float) -> Tensor:
    """The quotient a / b in float32, rounded once, on every device; at least one of them a tensor.

    torch means something else: `number / tensor` is the reciprocal times the number, and on GPUs `tensor / number` is a
    product with 1/number, each rounded twice. (`1 / tensor` and `tensor / tensor` are true divisions.)
    """
    if isinstance(a, Tensor):
        return torch.div(a, b if isinstance(b, Tensor) else torch.full((), b, dtype=torch.float32, device=a.device))
    assert isinstance(b, Tensor)
    return torch.div(torch.full((), a, dtype=torch.float32, device=b.device), b)


# --- MX: one exponent for a block -------------------------------------------------------------------------------------


def largest_exponent(format: str) -> int:
    """Exponent emax of the format's largest power of two: fp4 2, e2m3 2, e3m2 4, e4m3 8, e5m2 15."""
    return math.frexp(number_format(format).maximum)[1] - 1


def shared_exponent(recipe: str, absmax: Tensor, format: str) -> Tensor:
    """The e8m0 codes of blocks whose largest magnitudes are `absmax`, by a recipe of SHARED_EXPONENTS.

    absmax float32 >= 0, any shape -> uint8 of that shape. NaN gives 255 (NaN); infinity and everything too large for
    e8m0 saturate at 254. A zero block gets what its tool stores: its element codes are 0 and so is its value.

    >>> shared_exponent("even", torch.tensor([6.0, 7.0]), "fp4_e2m1").tolist()
    [127, 128]
    """
    exponent = SHARED_EXPONENTS[recipe](absmax, number_format(format))
    codes = (exponent.nan_to_num(0.0).clamp(-127, 127) + 127).to(torch.uint8)
    return codes.masked_fill_(absmax.isnan(), 255)


def _binade(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Fraction in [1, 2) and float exponent of absmax, exactly, subnormals included; those of 0 mean nothing."""
    fraction, exponent = torch.frexp(absmax)
    return fraction * 2, torch.where(absmax.isinf(), 128.0, exponent.float() - 1)


def _emax(spec: NumberFormat) -> int:
    return largest_exponent(spec.name)


def _zero_is(value: float, absmax: Tensor, exponent: Tensor) -> Tensor:
    return torch.where(absmax == 0, value, exponent)


def _floor(absmax: Tensor, spec: NumberFormat) -> Tensor:
    return _zero_is(-127, absmax, _binade(absmax)[1] - _emax(spec))


def _even(absmax: Tensor, spec: NumberFormat) -> Tensor:
    """The absmax rounded half up to the element's mantissa bits, in the bits of the float, then floor."""
    rounded = absmax.view(torch.int32) + (1 << (22 - spec.mantissa))
    return ((rounded >> 23) - 127 - _emax(spec)).float()


def _ceil(absmax: Tensor, spec: NumberFormat) -> Tensor:
    fraction, exponent = _binade(absmax)
    return _zero_is(-127, absmax, exponent + (fraction > 1) - _emax(spec))


def _rceil(absmax: Tensor, spec: NumberFormat) -> Tensor:
    """ceil(log2(absmax / max)), exactly: compare the fractions."""
    fraction, exponent = _binade(absmax)
    top = spec.maximum / 2.0 ** _emax(spec)
    return _zero_is(-127, absmax, exponent - _emax(spec) + (fraction > top))


def _round_down(absmax: Tensor, spec: NumberFormat) -> Tensor:
    fraction, exponent = _binade(absmax)
    top = spec.maximum / 2.0 ** _emax(spec)
    return _zero_is(-127, absmax, exponent - _emax(spec) - (fraction < top).float())


def _floor_log2(absmax: Tensor, spec: NumberFormat) -> Tensor:
    """Through the float32 log2, which rounds up just below powers of two: so do the tools."""
    return _zero_is(-23, absmax, torch.log2(absmax).floor() - _emax(spec))


def _ceil_log2(absmax: Tensor, spec: NumberFormat) -> Tensor:
    return _zero_is(-23, absmax, torch.log2(absmax).ceil() - _emax(spec))


def _floor_log2_one(absmax: Tensor, spec: NumberFormat) -> Tensor:
    """AutoRound: a zero block takes the logarithm of 1."""
    return torch.where(absmax == 0, 1.0, absmax).log2().floor() - _emax(spec)


def _rceil_log2(absmax: Tensor, spec: NumberFormat) -> Tensor:
    return torch.log2(quotient(absmax, spec.maximum)).ceil()


def _rceil_log2_normal(absmax: Tensor, spec: NumberFormat) -> Tensor:
    return torch.log2(quotient(absmax.clamp(min=_SMALLEST_NORMAL), spec.maximum)).ceil()


SHARED_EXPONENTS: Final[Mapping[str, Callable[[Tensor, NumberFormat], Tensor]]] = {
    "floor": _floor,  # OCP MX 1.0
    "even": _even,  # Quark's default, torchao EVEN; vLLM's MXFP4, whose code 0 means a zero block
    "ceil": _ceil,  # torchao CEIL
    "rceil": _rceil,  # Triton ROUND_UP, TRT-LLM, the hardware conversion rounding to +infinity
    "round_down": _round_down,  # Triton ROUND_DOWN
    "quark_floor": _floor_log2,  # zero block: scale 2^-23
    "quark_ceil": _ceil_log2,
    "autoround_floor": _floor_log2_one,
    "modelopt_rceil": _rceil_log2,  # zero block: 2^-127
    "torchao_rceil": _rceil_log2,
    "vllm_mxfp8": _rceil_log2_normal,
}
"""Exponent X of the scale 2^X as float32, before clamping to the e8m0 range; -infinity for log2 of 0."""


# --- NVFP4: a float8 scale for 16 elements under one float32 scale ----------------------------------------------------


@dataclass(frozen=True)
class Nvfp4Recipe:
    """One tool's NVFP4 arithmetic: a, s1 [.., G, 1] over blocks x [.., G, 16]; A, s2 one number for the tensor.

    global_scale  A -> s2 as the tool stores it
    block_scale   a, s2 -> s1 as stored, e4m3 codes
    scaled        x, s1, s2 -> what is rounded to e2m1, unclamped
    value         decoded e2m1, s1, s2 -> the value
    """

    global_scale: Callable[[Tensor], Tensor]
    block_scale: Callable[[Tensor, Tensor], Tensor]
    scaled: Callable[[Tensor, Tensor, Tensor], Tensor]
    value: Callable[[Tensor, Tensor, Tensor], Tensor]

    def quantize(self, x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [.., G, 16] uint8, block scale codes [.., G] uint8, global scale of blocks x [.., G, 16] float32."""
        if global_scale is None:
            global_scale = self.global_scale(x.abs().amax())
        block = self.block_scale(x.abs().amax(-1, keepdim=True), global_scale)
        codes = encode("fp4_e2m1", self.scaled(x, decode("fp8_e4m3fn", block), global_scale))
        return codes, block.squeeze(-1), global_scale

    def dequantize(self, codes: Tensor, block: Tensor, global_scale: Tensor) -> Tensor:
        """The values [.., G, 16] float32 of what `quantize` gave, in the tool's order."""
        return self.value(decode("fp4_e2m1", codes), decode("fp8_e4m3fn", block).unsqueeze(-1), global_scale)


def _e4m3(x: Tensor) -> Tensor:
    return encode("fp8_e4m3fn", x)


def _modelopt_block(a: Tensor, s2: Tensor) -> Tensor:
    scale = torch.where(a == 0, 1.0, a / (6 * s2))
    return _e4m3(scale.clamp(2.0**-9, 448))


def _compressed_tensors_block(a: Tensor, g: Tensor) -> Tensor:
    codes = _e4m3(quotient(g * a, 6))
    return codes.masked_fill(codes == 0, 0x20)  # 0.125, the eps of e4m3


def _multiplier(amax: Tensor) -> Tensor:
    s2 = quotient(amax, 6 * 448)
    return torch.where(s2 == 0, 1.0, s2)  # a tensor of zeros, or of nothing above 2^-139


def _divisor(amax: Tensor) -> Tensor:
    g = quotient(448 * 6, amax)
    return torch.where(g.isfinite(), g, 1.0)


def _vllm_scaled(x: Tensor, s1: Tensor, g: Tensor) -> Tensor:
    r = 1 / (s1 * (1 / g))
    return x * torch.where(s1 == 0, 0.0, r)


def _quark_block(a: Tensor, s2: Tensor) -> Tensor:
    return _e4m3(torch.where(a == 0, 1.0, quotient(a, 6) / s2))


SIXTH: Final = 0.16666667163372040  # float32(1/6)

NVFP4_RECIPES: Final[Mapping[str, Nvfp4Recipe]] = {
    "modelopt": Nvfp4Recipe(
        global_scale=_multiplier,
        block_scale=_modelopt_block,
        scaled=lambda x, s1, s2: x / (s1 * s2),
        value=lambda v, s1, s2: v * s1 * s2,
    ),
    "compressed-tensors": Nvfp4Recipe(
        global_scale=_divisor,
        block_scale=_compressed_tensors_block,
        scaled=lambda x, s1, g: x / (s1 / g),
        value=lambda v, s1, g: v * (s1 / g),
    ),
    "vllm": Nvfp4Recipe(  # ref_nvfp4_quant; the CUDA kernel takes approximate reciprocals
        global_scale=_divisor,
        block_scale=lambda a, g: _e4m3(g * (a * SIXTH)),
        scaled=_vllm_scaled,
        value=lambda v, s1, g: v * (s1 / g),
    ),
    "torchao": Nvfp4Recipe(
        global_scale=_multiplier,
        block_scale=lambda a, s2: _e4m3((quotient(a, 6) / s2).clamp(2.0**-6, 448)),
        scaled=lambda x, s1, s2: x * ((1 / s2) / s1),
        value=lambda v, s1, s2: v * (s1 * s2),
    ),
    "torchao-single": Nvfp4Recipe(
        global_scale=lambda amax: torch.ones_like(amax),
        block_scale=lambda a, _: _e4m3(quotient(a, 6).clamp(2.0**-6, 448)),
        scaled=lambda x, s1, _: x * (1 / s1),
        value=lambda v, s1, _: v * s1,
    ),
    "quark": Nvfp4Recipe(
        global_scale=_multiplier,
        block_scale=_quark_block,
        scaled=lambda x, s1, s2: x / (s1 * s2),
        value=lambda v, s1, s2: v * (s1 * s2),
    ),
}


# --- integers ---------------------------------------------------------------------------------------------------------


def symmetric_scale(absmax: Tensor, bits: int, *, half: bool = False) -> Tensor:
    """Scale absmax / (2^(bits-1) - 1), or with `half` absmax / ((2^bits - 1) / 2): 127.5, 7.5; it clips the largest.

    Quark and compressed-tensors quantize weights with half, torchao activations too; vLLM and most others without.
    """
    return quotient(absmax, (2**bits - 1) / 2 if half else 2 ** (bits - 1) - 1)


def asymmetric_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point (as float32) of a signed `bits`-bit code for the range [low, high] and 0.

    0 is forced into the range; a range of nothing but 0 gets scale 0 and zero point 0.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    smallest, largest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = quotient(high - low, 2**bits - 1)
    zero_point = torch.where(scale == 0, 0.0, torch.round(smallest - low / scale))
    return scale, zero_point.clamp(smallest, largest)
