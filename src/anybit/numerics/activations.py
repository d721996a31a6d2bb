"""Activation quantization, one named recipe for each way a checkpoint's runtime does it, exact to the last bit.

A recipe is a pure function of x float32 [.., M, K], the layer's ActivationSpec and its static tensors; what it returns
holds codes and scales, and `dequantize()` gives the float32 values that the weight is multiplied with. The order of
operations is that of the documents, literally: x * (1/s) and x / s give different codes.

All recipes: round half to even, saturating; zero rows and groups give exactly 0; M = 0 works; a last group may be
short. NaN is propagated to everything that shares its scale (static int8: to its row). The genuine CUDA kernels ignore
NaN in maxima and turn it into the largest code or 0; no checkpoint relies on it.
Sources: docs/formats/numerics.md §6 to §8 and the activation section of each dialect, named in RECIPES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from anybit.errors import Inconsistent
from anybit.numerics.codec import decode, encode
from anybit.numerics.formats import number_format
from anybit.numerics.scales import SIXTH, quotient, shared_exponent

__all__ = ["RECIPES", "QuantizedActivation", "Recipe", "Spec", "Tensors", "quantize", "quantize_dequantize"]

Tensors = Mapping[str, Tensor]
_NONE: Final[Tensors] = MappingProxyType({})

E4M3: Final = "fp8_e4m3fn"
E4M3_MAX: Final = 448.0
TOKEN_FLOOR: Final = 1 / (448 * 512)  # vLLM's smallest per-token scale; zero rows have it
GROUP_FLOOR: Final = 1e-10  # of absmax, not of the scale
FLOAT32_EPS: Final = 2.0**-23


class Spec(Protocol):
    """What a recipe reads of `schemes.ActivationSpec`, which stands above this module."""

    @property
    def element(self) -> str:
        """Number format of the codes."""

    @property
    def granularity(self) -> str:
        """tensor, token or group."""

    @property
    def recipe(self) -> str:
        """A name in RECIPES."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, 0 = the row."""

    @property
    def bound(self) -> float | None:
        """The recipe's own constant."""


@dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """Codes of x [.., M, K] and what they mean: (code - zero_point) * scale.

    codes         [.., M, K] int8 for int elements, else uint8
    scale         float32 [.., M or 1, groups or 1]; what a value is multiplied with, all levels combined
    group_size    consecutive columns that share a column of `scale`; 0 = all
    zero_point    int32, of the shape of scale
    scale_format, scale_codes    the stored form of a scale of 8 bits, of the shape of scale (NVFP4: without its global)
    kept_columns, kept    columns that stay as they are (LLM.int8's outliers): int64 [C] and float32 [.., M, C]
    """

    codes: Tensor
    element: str
    scale: Tensor
    group_size: int = 0
    zero_point: Tensor | None = None
    scale_format: str | None = None
    scale_codes: Tensor | None = None
    kept_columns: Tensor | None = None
    kept: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The values that the product sees: [.., M, K] float32, one rounding an element."""
        if self.zero_point is None:
            value = decode(self.element, self.codes)
        else:
            value = (self.codes.int() - self._spread(self.zero_point)).float()
        value = value * self._spread(self.scale)
        if self.kept_columns is not None and self.kept is not None:
            value[..., self.kept_columns] = self.kept
        return value

    def _spread(self, t: Tensor) -> Tensor:
        if self.group_size == 0 or t.shape[-1] == 1:
            return t
        return t.repeat_interleave(self.group_size, dim=-1)[..., : self.codes.shape[-1]]


@dataclass(frozen=True)
class Recipe:
    """A recipe: its arithmetic, the static tensors that it needs, its source in docs/formats.

    by_row  the result for a token does not depend on the other tokens of the call
    """

    quantize: Callable[[Tensor, Spec, Tensors], QuantizedActivation]
    source: str
    tensors: tuple[str, ...] = ()
    by_row: bool = True

    def __call__(self, x: Tensor, spec: Spec, tensors: Tensors = _NONE) -> QuantizedActivation:
        """Quantize x [.., M, K]; Inconsistent if a static tensor is missing."""
        missing = [name for name in self.tensors if name not in tensors]
        if missing:
            raise Inconsistent(
                "static activation quantization without its tensors",
                found=", ".join(tensors) or "none", wanted=", ".join(self.tensors),
                remedy="run it weight-only, or export the checkpoint again",
            )
        return self.quantize(x.float(), spec, tensors)


def quantize(x: Tensor, spec: Spec, tensors: Tensors = _NONE) -> QuantizedActivation:
    """Codes and scales of x [.., M, K] by the recipe that the spec names."""
    return RECIPES[spec.recipe](x, spec, tensors)


def quantize_dequantize(x: Tensor, spec: Spec, tensors: Tensors = _NONE) -> Tensor:
    """What the layer multiplies with instead of x [.., M, K]: float32, by the recipe that the spec names."""
    return quantize(x, spec, tensors).dequantize()


# --- pieces -----------------------------------------------------------------------------------------------------------


def _row_max(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def _grouped(x: Tensor, size: int) -> Tensor:
    """[.., K] as [.., groups, size]; a short last group is filled with zeros, which no maximum of magnitudes sees."""
    short = -x.shape[-1] % size
    if short:
        x = pad(x, (0, short))
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _absmax(x: Tensor, spec: Spec) -> Tensor:
    """Largest magnitude of each group, row or the whole: [.., M or 1, groups or 1]."""
    if spec.granularity == "group":
        return _grouped(x, spec.group_size).abs().amax(-1)
    if spec.granularity == "tensor":
        whole = x.abs().amax() if x.numel() else x.new_zeros(())
        return whole.reshape((1,) * x.dim())
    return _row_max(x)


def _group_size(spec: Spec) -> int:
    return spec.group_size if spec.granularity == "group" else 0


def _each(x: Tensor, factor: Tensor, size: int, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """act(x, factor) with a factor for each group of `size` columns, 0 = factor broadcasts as it is."""
    if size == 0:
        return act(x, factor)
    return act(_grouped(x, size), factor.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]]


def _times(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor


def _over(x: Tensor, divisor: Tensor) -> Tensor:
    return x / divisor


def _static(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    """A static tensor of one number, float32 [1, 1] on the device of x; of more (one a row of x), as it is."""
    t = tensors[name].to(x.device).float()
    return t.reshape((1,) * x.dim()) if t.numel() == 1 else t


def _nan_rows(scale: Tensor, x: Tensor) -> Tensor:
    """The scale with NaN for rows that hold NaN: integer codes cannot hold it."""
    return torch.where(x.isnan().any(-1, keepdim=True), torch.nan, scale)


def _shifted_codes(rounded: Tensor, zero_point: Tensor, element: str) -> Tensor:
    """saturate(rounded + zero_point) in integers: a float sum would round beyond 2^24."""
    spec = number_format(element)
    total = rounded.nan_to_num(0.0, 2.0**31, -(2.0**31)).clamp(-(2.0**31), 2.0**31).to(torch.int64) + zero_point
    return total.clamp(int(spec.minimum), int(spec.maximum)).to(torch.int8 if spec.kind == "int" else torch.uint8)


def _integer(t: Tensor) -> Tensor:
    """A rounded zero point as int32, with room for subtraction."""
    return t.nan_to_num(0.0, 2.0**30, -(2.0**30)).clamp(-(2.0**30), 2.0**30).to(torch.int32)


# --- int8 -------------------------------------------------------------------------------------------------------------


def int8_static(x: Tensor, spec: Spec, tensors: Tensors, *, divide: bool = False) -> QuantizedActivation:
    """saturate(round(x * (1/s)) + z), or x / s; z is 0 where none is stored. The value is (q - z) * s."""
    s = _static(tensors, "scale", x)
    scaled = x / s if divide else x * (1 / s)
    scale = _nan_rows(s, x)
    if "zero_point" not in tensors:
        return QuantizedActivation(encode(spec.element, scaled), spec.element, scale)
    stored = tensors["zero_point"].to(x.device)
    z = stored.to(torch.int32).reshape(s.shape)
    return QuantizedActivation(_shifted_codes(scaled.round(), z, spec.element), spec.element, scale, zero_point=z)


def int8_token(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """round(x * (127/a)) with the value q * (a/127); a zero row has the factor 0."""
    a = _row_max(x)
    factor = torch.where(a == 0, 0.0, quotient(127, a))
    return QuantizedActivation(encode(spec.element, x * factor), spec.element, quotient(a, 127))


def int8_token_asym(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """Scale (max - min)/255, 0 not forced into the range, z = round(-128 - min/s) unclamped; a constant row gives 0."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    s = quotient(high - low, 255)
    constant = s == 0
    z = _integer(torch.where(constant, 0.0, (-128 - low / s).round()))
    rounded = (x * torch.where(constant, 0.0, 1 / s)).round()
    return QuantizedActivation(_shifted_codes(rounded, z, spec.element), spec.element, s, zero_point=z)


def int8_static_output(y: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """Fake quantization of an output: round(y / s) * s; a stored scale of 0 leaves y as it is."""
    s = _static(tensors, "output_scale", y)
    if bool((s == 0).all()):
        codes = torch.zeros_like(y, dtype=torch.int8)
        columns = torch.arange(y.shape[-1], device=y.device)
        return QuantizedActivation(codes, spec.element, s, kept_columns=columns, kept=y)
    return QuantizedActivation(encode(spec.element, y / s), spec.element, _nan_rows(s, y))


def llm_int8(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """LLM.int8: columns with an outlier (a magnitude >= bound after rounding to float16) stay, the rest is int8 by row.

    The row maximum counts the ordinary elements of outlier columns. The columns depend on all rows of the call.
    """
    a = x.half().float()
    threshold = spec.bound or 0.0
    outlier = a.abs() >= threshold if threshold > 0 else torch.zeros_like(a, dtype=torch.bool)
    ordinary = a.masked_fill(outlier, 0.0)
    absmax = _row_max(ordinary)
    columns = outlier.flatten(0, -2).any(0).nonzero().squeeze(-1)
    codes = encode("int8", ordinary * torch.where(absmax == 0, 0.0, quotient(127, absmax)))
    codes[..., columns] = 0
    return QuantizedActivation(codes, "int8", quotient(absmax, 127), kept_columns=columns, kept=x[..., columns])


def torchao_int8_token(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """Scale max(absmax/127.5, 2^-23), x * (1/s): the largest value is clipped. Element int7 is reduce_range."""
    half_range = (2 ** number_format(spec.element).bits - 1) / 2
    s = quotient(_absmax(x, spec), half_range).clamp(min=FLOAT32_EPS)
    size = _group_size(spec)
    codes = encode(spec.element, _each(x, 1 / s, size, _times))
    return QuantizedActivation(codes, spec.element, s, size)


def torchao_int8_token_asym(
    x: Tensor, spec: Spec, tensors: Tensors, *, floor: float = FLOAT32_EPS
) -> QuantizedActivation:
    """0 forced into [lo, hi]; s = max((hi - lo)/255, floor); z = clamp(-128 - round(lo/s)); x * (1/s), + z.

    Element int7 is reduce_range: 127 steps from -64.
    """
    codes = number_format(spec.element)
    dims = tuple(range(x.dim())) if spec.granularity == "tensor" else (-1,)
    low = x.amin(dims, keepdim=True).clamp(max=0.0)
    high = x.amax(dims, keepdim=True).clamp(min=0.0)
    s = quotient(high - low, codes.maximum - codes.minimum).clamp(min=floor)
    z = _integer((codes.minimum - (low / s).round()).clamp(codes.minimum, codes.maximum))
    shifted = _shifted_codes((x * (1 / s)).round(), z, spec.element)
    return QuantizedActivation(shifted, spec.element, s, zero_point=z)


def int4_group(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """Scale s = absmax/7.5 for each group, x / s, clamp(-8, 7); a zero group has s = 2^-23."""
    s = quotient(_absmax(x, spec), 7.5)
    s = torch.where(s == 0, FLOAT32_EPS, s)
    size = _group_size(spec)
    return QuantizedActivation(encode(spec.element, _each(x, s, size, _over)), spec.element, s, size)


# --- fp8 --------------------------------------------------------------------------------------------------------------


def fp8_static(x: Tensor, spec: Spec, tensors: Tensors, *, divide: bool = False) -> QuantizedActivation:
    """e4m3(x * (1/s)), or x / s."""
    s = _static(tensors, "scale", x)
    return QuantizedActivation(encode(spec.element, x / s if divide else x * (1 / s)), spec.element, s)


def fp8_tensor(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """Scale s = absmax/448 of the whole call, x * (1/s)."""
    whole = x.abs().amax() if x.numel() else x.new_zeros(())
    s = quotient(whole, E4M3_MAX).reshape((1,) * x.dim())
    return QuantizedActivation(encode(spec.element, x * torch.where(s == 0, 0.0, 1 / s)), spec.element, s)


def fp8_token(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """Scale s = max(min(absmax, bound)/448, 1/(448*512)), x / s."""
    a = _row_max(x) if spec.bound is None else _row_max(x).clamp(max=spec.bound)
    s = quotient(a, E4M3_MAX).clamp(min=TOKEN_FLOOR)
    return QuantizedActivation(encode(spec.element, x / s), spec.element, s)


def fp8_group(x: Tensor, spec: Spec, tensors: Tensors, *, divide: bool = False) -> QuantizedActivation:
    """Scale s = max(absmax, 1e-10)/448 for each group, x * (1/s), or x / s."""
    s = quotient(_absmax(x, spec).clamp(min=GROUP_FLOOR), E4M3_MAX)
    size = _group_size(spec)
    codes = encode(spec.element, _each(x, s, size, _over) if divide else _each(x, 1 / s, size, _times))
    return QuantizedActivation(codes, spec.element, s, size)


def fp8_group_ue8m0(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """Scale s = 2^ceil(log2(max(absmax/448, 1e-10))) through the float32 log2, x / s."""
    s = quotient(_absmax(x, spec).clamp(min=GROUP_FLOOR), E4M3_MAX)
    exponent = s.clamp(min=GROUP_FLOOR).log2().ceil()
    codes = (exponent.nan_to_num(0.0).clamp(-127, 127) + 127).to(torch.uint8).masked_fill_(exponent.isnan(), 255)
    return _power_of_two(x, spec, codes)


def torchao_fp8_token(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """Scale s = absmax/448 (e5m2: /57344), x / s; a zero row gives 0 (torchao's own path gives NaN).

    The bounds of absmax are optional: `spec.bound` from above, the tensor "lower_bound" from below.
    """
    a = _absmax(x, spec)
    if "lower_bound" in tensors:
        a = torch.maximum(a, _static(tensors, "lower_bound", x))
    s = quotient(a if spec.bound is None else a.clamp(max=spec.bound), number_format(spec.element).maximum)
    size = _group_size(spec)
    divisor = torch.where(s == 0, 1.0, s)
    return QuantizedActivation(encode(spec.element, _each(x, divisor, size, _over)), spec.element, s, size)


# --- MX: powers of two ------------------------------------------------------------------------------------------------


def _power_of_two(x: Tensor, spec: Spec, scale_codes: Tensor) -> QuantizedActivation:
    """Elements of x over e8m0 scales; the division is exact, barring underflow."""
    scale = decode("e8m0", scale_codes)
    size = _group_size(spec)
    codes = encode(spec.element, _each(x, scale, size, _over))
    return QuantizedActivation(codes, spec.element, scale, size, scale_format="e8m0", scale_codes=scale_codes)


def mx(x: Tensor, spec: Spec, tensors: Tensors, *, exponent: str) -> QuantizedActivation:
    """Any MX element under the shared exponent that the recipe names in `scales.SHARED_EXPONENTS`."""
    return _power_of_two(x, spec, shared_exponent(exponent, _absmax(x, spec), spec.element))


def mxfp4_even(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """The even exponent; a group whose scale code is 0 or would be below is a zero group."""
    scale_codes = shared_exponent("even", _absmax(x, spec), spec.element)
    alive = (scale_codes != 0).float()
    return _power_of_two(_each(x, alive, _group_size(spec), _times), spec, scale_codes)


def mx_rceil_torchao(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """ceil(log2(absmax/max)) through the float32 log2; scale code 0 has the factor 1, so its elements round to 0."""
    scale_codes = shared_exponent("torchao_rceil", _absmax(x, spec), spec.element)
    scale = decode("e8m0", scale_codes)
    factor = torch.where(scale_codes == 0, 1.0, 1 / scale)
    size = _group_size(spec)
    codes = encode(spec.element, _each(x, factor, size, _times))
    return QuantizedActivation(codes, spec.element, scale, size, scale_format="e8m0", scale_codes=scale_codes)


def mx_torchao(x: Tensor, spec: Spec, tensors: Tensors, *, exponent: str) -> QuantizedActivation:
    """The modes FLOOR, CEIL and EVEN: x over the scale, which counts as 2^-126 where its code is 0 (2^-127)."""
    scale_codes = shared_exponent(exponent, _absmax(x, spec), spec.element)
    scale = decode("e8m0", scale_codes)
    size = _group_size(spec)
    codes = encode(spec.element, _each(x, scale.clamp(min=2.0**-126), size, _over))
    return QuantizedActivation(codes, spec.element, scale, size, scale_format="e8m0", scale_codes=scale_codes)


# --- fp4 under float scales -------------------------------------------------------------------------------------------


def _nvfp4(x: Tensor, spec: Spec, g: Tensor, vanished: float) -> QuantizedActivation:
    """As vLLM's ref_nvfp4_quant: block scale e4m3(G * (a * 1/6)), x * (1/(s * (1/G))), value q * (s/G).

    `vanished` is the factor of a block whose scale rounds to 0: its codes are 0 whichever it is, but for their sign.
    """
    scale_codes = encode(E4M3, g * (_absmax(x, spec) * SIXTH))
    s = decode(E4M3, scale_codes)
    step = s * (1 / g)
    factor = torch.where(step == 0, vanished, 1 / step)
    size = _group_size(spec)
    codes = encode(spec.element, _each(x, factor, size, _times))
    return QuantizedActivation(codes, spec.element, s / g, size, scale_format=E4M3, scale_codes=scale_codes)


def nvfp4(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """NVFP4 with the stored global scale G, which multiplies on the way in and divides on the way out."""
    return _nvfp4(x, spec, _static(tensors, "global_scale", x), 0.0)


def nvfp4_reciprocal(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """NVFP4 with the stored decode scale s2 = 1/G (ModelOpt, Quark)."""
    return _nvfp4(x, spec, 1 / _static(tensors, "scale", x), 1e-8)


def nvfp4_token(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """NVFP4 without calibration: G = 448 * 6 / absmax of the row, so that a row does not depend on its batch."""
    g = quotient(448 * 6, _row_max(x))
    # a row below 2^-116 has no finite G; any finite one makes it 0 (NaN stays NaN)
    return _nvfp4(x, spec, torch.where(g.isinf(), 1.0, g), 0.0)


def torchao_nvfp4(x: Tensor, spec: Spec, tensors: Tensors) -> QuantizedActivation:
    """s2 stored or absmax/(448*6) of the call; s = e4m3(clamp((a/6)/s2, 2^-6, 448)); x * ((1/s2)/s); q * (s*s2)."""
    whole = x.abs().amax() if x.numel() else x.new_zeros(())
    s2 = _static(tensors, "scale", x) if "scale" in tensors else quotient(whole, 448 * 6).reshape((1,) * x.dim())
    s2 = torch.where(s2 == 0, 1.0, s2)
    scale_codes = encode(E4M3, (quotient(_absmax(x, spec), 6) / s2).clamp(2.0**-6, E4M3_MAX))
    s = decode(E4M3, scale_codes)
    size = _group_size(spec)
    codes = encode(spec.element, _each(x, (1 / s2) / s, size, _times))
    return QuantizedActivation(codes, spec.element, s * s2, size, scale_format=E4M3, scale_codes=scale_codes)


def fp4_under_ue5m3(x: Tensor, spec: Spec, tensors: Tensors, *, divide: bool) -> QuantizedActivation:
    """Scale s = ue5m3(absmax/6), or ue5m3(absmax * (1/6)); 0 becomes 2^-23; x / s."""
    a = _absmax(x, spec)
    s = decode("ue5m3", encode("ue5m3", quotient(a, 6) if divide else a * SIXTH))
    s = torch.where(s == 0, FLOAT32_EPS, s)
    size = _group_size(spec)
    return QuantizedActivation(encode(spec.element, _each(x, s, size, _over)), spec.element, s, size)


RECIPES: Final[Mapping[str, Recipe]] = {
    "int8_static": Recipe(int8_static, "compressed_tensors.md §7 A4, quark.md §7", ("scale",)),
    "int8_static_divide": Recipe(
        partial(int8_static, divide=True), "compressed_tensors.md §7 A3, modelopt.md §10", ("scale",)),
    "int8_token": Recipe(int8_token, "compressed_tensors.md §7 A1, quark.md §7"),
    "int8_token_asym": Recipe(int8_token_asym, "compressed_tensors.md §7 A2, quark.md §7"),
    "int8_static_output": Recipe(int8_static_output, "compressed_tensors.md §7 A11", ("output_scale",)),
    "llm_int8": Recipe(llm_int8, "bitsandbytes.md §3", by_row=False),
    "torchao_int8_token": Recipe(torchao_int8_token, "torchao.md §5"),
    "torchao_int8_token_asym": Recipe(torchao_int8_token_asym, "torchao.md §5"),
    "torchao_8da4w": Recipe(partial(torchao_int8_token_asym, floor=2.0**-126), "torchao.md §5, int8_asym_per_token"),
    "int4_group": Recipe(int4_group, "quark.md §7"),
    "fp8_static": Recipe(fp8_static, "compressed_tensors.md §7 A5, modelopt.md §10, quark.md, fp8.md §7", ("scale",)),
    "fp8_static_divide": Recipe(partial(fp8_static, divide=True), "modelopt.md §10, TensorRT-LLM", ("scale",)),
    "fp8_tensor": Recipe(fp8_tensor, "quark.md §7", by_row=False),
    "fp8_token": Recipe(fp8_token, "compressed_tensors.md §7 A6, fp8.md §7 B; with a bound fbgemm_fp8.md §5"),
    "fp8_group": Recipe(fp8_group, "compressed_tensors.md §7 A7"),
    "fp8_group_divide": Recipe(partial(fp8_group, divide=True), "fp8.md §7 C, modelopt.md §10"),
    "fp8_group_ue8m0": Recipe(fp8_group_ue8m0, "fp8.md §7 D"),
    "torchao_fp8_token": Recipe(torchao_fp8_token, "torchao.md §5"),
    "mxfp4_even": Recipe(mxfp4_even, "compressed_tensors.md §7 A9"),
    "mxfp8_log2": Recipe(partial(mx, exponent="vllm_mxfp8"), "compressed_tensors.md §7 A10, fp8.md §7 F"),
    "mx_even": Recipe(partial(mx, exponent="even"), "quark.md §7"),
    "mx_floor": Recipe(partial(mx, exponent="quark_floor"), "quark.md §7"),
    "mx_ceil": Recipe(partial(mx, exponent="quark_ceil"), "quark.md §7"),
    "mx_floor_autoround": Recipe(partial(mx, exponent="autoround_floor"), "auto_round.md §5"),
    "mx_rceil": Recipe(partial(mx, exponent="vllm_mxfp8"), "auto_round.md §5, mx_fp_rceil"),
    "mx_rceil_torchao": Recipe(mx_rceil_torchao, "torchao.md §5"),
    "mx_floor_torchao": Recipe(partial(mx_torchao, exponent="floor"), "torchao.md §5, scaling_mode FLOOR"),
    "mx_ceil_torchao": Recipe(partial(mx_torchao, exponent="ceil"), "torchao.md §5, scaling_mode CEIL"),
    "mx_even_torchao": Recipe(partial(mx_torchao, exponent="even"), "torchao.md §5, scaling_mode EVEN"),
    "nvfp4": Recipe(nvfp4, "compressed_tensors.md §7 A8", ("global_scale",)),
    "nvfp4_reciprocal": Recipe(nvfp4_reciprocal, "modelopt.md §10, quark.md §7", ("scale",)),
    "nvfp4_token": Recipe(nvfp4_token, "anybit's own, numerics.md §6"),
    "torchao_nvfp4": Recipe(torchao_nvfp4, "torchao.md §5", by_row=False),
    "amdfp4": Recipe(partial(fp4_under_ue5m3, divide=True), "quark.md §7"),
    "fp4_ue5m3_autoround": Recipe(partial(fp4_under_ue5m3, divide=False), "auto_round.md §5, NVFP4 E5M3"),
}
