"""Weights in float32 to codes and scales, for `--quantization`: no calibration data, one layer at a time.

What is stored is what the value is computed from: scales are rounded to their stored format first, codes are chosen
for the rounded scale. Rows and blocks of zeros give exactly 0. Each rule names whose it is; where tools disagree or
leave a choice, the relative root mean square errors beside it (Gaussian / Student t with 5 degrees of freedom,
2048 x 1024) say why. `checkpoints/online.py` gives the results their Scheme; reading needs none of this.
Sources: docs/formats/numerics.md §5, §6, §8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from anybit.errors import Damaged
from anybit.numerics.codec import decode, encode
from anybit.numerics.formats import number_format
from anybit.numerics.scales import NVFP4_RECIPES, asymmetric_scale, quotient, shared_exponent, symmetric_scale

__all__ = ["WEIGHT_RULES", "WeightCodes", "quantize_weight"]

INT4_DIVISORS: Final = (7.0, 8.0, 9.0)
Pack = Callable[[Tensor], Tensor]
# elements quantized at a time, 4 MiB in float32; four times as many took up to twice as long and needed three times the
# temporaries (4096 x 4096, one thread)
SLAB: Final = 2**20


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """Codes [.., N, K] (int8 for int elements, else uint8), scales finest first [.., row blocks, column blocks].

    Codes are packed rows if that was asked for. Scales of 8-bit formats are codes (uint8), others float tensors.
    zero_point as the codes, of the finest grid.
    """

    codes: Tensor
    scales: tuple[Tensor, ...]
    zero_point: Tensor | None = None


def quantize_weight(rule: str, weight: Tensor, pack: Pack | None = None) -> WeightCodes:
    """Quantize a weight [.., N, K] of any float dtype by a rule of WEIGHT_RULES; stacked experts one by one.

    K must be a multiple of the rule's group, but for the integer groups, whose last may be short. Works on slabs of
    rows: neither a float32 copy of the weight nor, with `pack` (codes [n, K] to packed rows [n, bytes]), its unpacked
    codes are ever held.
    Raises Damaged for NaN or infinity; the caller adds the layer's name.
    """
    matrices = weight.reshape(-1, *weight.shape[-2:])
    made = _Filling(matrices.shape[0], weight.shape[-2])
    for number, matrix in enumerate(matrices):
        absmax = torch.maximum(matrix.amax((-2, -1), keepdim=True), -matrix.amin((-2, -1), keepdim=True)).float()
        if not bool(absmax.isfinite()):
            raise _not_finite(weight)
        rows = max(SLAB // matrix.shape[-1] // 128, 1) * 128  # whole blocks of 128 rows
        for start in range(0, matrix.shape[0], rows):
            slab = WEIGHT_RULES[rule](matrix[start : start + rows].float(), absmax)
            made.put(number, start, slab, slab.codes if pack is None else pack(slab.codes))
    return made.result(weight.shape[:-2])


def _not_finite(weight: Tensor) -> Damaged:
    broken = weight.numel() - int(weight.isfinite().sum())
    return Damaged(
        "a weight holds NaN or infinity", found=f"{broken} of {weight.numel()} elements", wanted="finite numbers",
        remedy="download it again, or get it from its writer",
    )


@dataclass(frozen=True, eq=False)
class _Slab:
    """Some rows quantized; `global_scale` [1, 1] is the matrix's, `scale_rows` rows share one of `scale`."""

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None
    scale_rows: int = 1


class _Filling:
    """Results of E matrices of N rows, each part's tensor made when its first slab comes: nothing is held twice."""

    def __init__(self, count: int, rows: int) -> None:
        self.count, self.rows = count, rows
        self.parts: dict[str, Tensor] = {}

    def put(self, number: int, start: int, slab: _Slab, codes: Tensor) -> None:
        """The rows from `start` on of matrix `number`."""
        for name, part, per in (("codes", codes, 1), ("scale", slab.scale, slab.scale_rows),
                                ("zero_point", slab.zero_point, 1)):
            if part is not None:
                into = self._part(name, part, -(-self.rows // per))
                into[number, start // per : start // per + part.shape[0]] = part
        if slab.global_scale is not None:
            self._part("global_scale", slab.global_scale, 1)[number] = slab.global_scale

    def _part(self, name: str, like: Tensor, rows: int) -> Tensor:
        if name not in self.parts:
            self.parts[name] = like.new_empty((self.count, rows, like.shape[-1]))
        return self.parts[name]

    def result(self, leading: torch.Size) -> WeightCodes:
        """All parts with the weight's leading dimensions."""
        done = {name: t.reshape(*leading, *t.shape[1:]) for name, t in self.parts.items()}
        scales = tuple(done[name] for name in ("scale", "global_scale") if name in done)
        return WeightCodes(done["codes"], scales, done.get("zero_point"))


def _groups(weight: Tensor, size: int) -> Tensor:
    """[.., K] -> [.., ceil(K / size), size]; a short last group is filled with zeros, which change no rule here."""
    weight = pad(weight, (0, -weight.shape[-1] % size)) if weight.shape[-1] % size else weight
    return weight.reshape(*weight.shape[:-1], weight.shape[-1] // size, size)


def _row(codes: Tensor, columns: int) -> Tensor:
    """The inverse of `_groups` for codes."""
    return codes.flatten(-2)[..., :columns].contiguous()


def _safe(scale: Tensor) -> Tensor:
    """A divisor for every block: 1 where the scale is 0, so that zeros stay zeros."""
    return torch.where(scale == 0, 1.0, scale)


def _nvfp4(weight: Tensor, absmax: Tensor) -> _Slab:
    """ModelOpt's two levels: s2 = A/(6*448), s1 = e4m3(a/(6*s2)) in [2^-9, 448], codes of x/(s1*s2)."""
    recipe = NVFP4_RECIPES["modelopt"]
    s2 = recipe.global_scale(absmax)
    codes, s1, _ = recipe.quantize(_groups(weight, 16), s2.unsqueeze(-1))
    return _Slab(codes.flatten(-2), s1, global_scale=s2)


def _mx(weight: Tensor, absmax: Tensor, *, element: str, exponent: str) -> _Slab:
    """OCP MX blocks of 32 under one power of two.

    Rule of the exponent, error of even / rceil: e2m1 even .1121 / .1186 (t .1237 / .1322), e2m3 even .0279 / .0281,
    e3m2 even .0528 / .0528, e4m3 rceil .0278 / .0265 (t .0288 / .0265). So fp4 and fp6 take `even` (Quark's and
    vLLM's), fp8 takes `rceil` (ModelOpt's and vLLM's, here by bits, not through a float logarithm).
    """
    blocks = _groups(weight, 32)
    scale = shared_exponent(exponent, blocks.abs().amax(-1), element)
    codes = encode(element, blocks / decode("e8m0", scale).unsqueeze(-1))
    return _Slab(codes.flatten(-2), scale)


def _fp8_per_tensor(weight: Tensor, absmax: Tensor) -> _Slab:
    """Scale s = absmax/448 of the matrix, codes of x/s: ModelOpt's, and vLLM's, whose kernel multiplies by 1/s.

    That moves about one code in a million by one step; a division stays finite for the smallest scales.
    """
    scale = quotient(absmax, 448)
    return _Slab(encode("fp8_e4m3fn", weight / _safe(scale)), None, global_scale=scale)


def _fp8_per_channel(weight: Tensor, absmax: Tensor) -> _Slab:
    """Scale s = absmax/448 of a row, codes of x/s: vLLM's and llm-compressor's, without vLLM's floor under s.

    The floor, 1/(448*512), is meant for activations; rows of weights below 1/512 would lose their precision.
    """
    scale = quotient(weight.abs().amax(-1, keepdim=True), 448)
    return _Slab(encode("fp8_e4m3fn", weight / _safe(scale)), scale)


def _fp8_per_block(weight: Tensor, absmax: Tensor) -> _Slab:
    """Scale s = absmax/448 for each block of 128 x 128, the last ones short: DeepSeek's and vLLM's.

    vLLM's bound of 1e-4 on the maximum is left out: smaller blocks keep their precision.
    """
    rows, columns = weight.shape[-2:]
    padded = pad(weight, (0, -columns % 128, 0, -rows % 128))
    lead = padded.shape[:-2]
    tiles = padded.reshape(*lead, padded.shape[-2] // 128, 128, padded.shape[-1] // 128, 128)
    scale = quotient(tiles.abs().amax((-3, -1)), 448)  # [.., row blocks, column blocks]
    codes = encode("fp8_e4m3fn", tiles / _safe(scale).unsqueeze(-1).unsqueeze(-3)).reshape(padded.shape)
    return _Slab(codes[..., :rows, :columns].contiguous(), scale, scale_rows=128)


def _int8_per_channel(weight: Tensor, absmax: Tensor) -> _Slab:
    """Scale s = absmax/127 of a row, codes -127 to 127: vLLM's and SmoothQuant's."""
    scale = symmetric_scale(weight.abs().amax(-1, keepdim=True), 8)
    return _Slab(encode("int8", weight / _safe(scale)), scale)


def _int8_per_channel_asym(weight: Tensor, absmax: Tensor) -> _Slab:
    """Scale s = (max - min)/255 with 0 in the range, code = round(x/s) + z."""
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scale, zero_point = asymmetric_scale(low, high, 8)
    codes = ((weight / _safe(scale)).round() + zero_point).clamp(-128, 127).to(torch.int8)
    return _Slab(codes, scale, zero_point.to(torch.int8))


def _int4_symmetric(weight: Tensor, absmax: Tensor, *, group_size: int) -> _Slab:
    """For each group the best of s = absmax / 7, 8, 9 in bfloat16 by squared error; codes -8 to 7.

    Error in groups of 128: /7 .1176 (t .172), /8 .1059 (.155), best of the three .1029 (.149). Letting the scale be
    negative (Q4_0, AutoRound) would give .0987 (.142), but several formats refuse negative scales.
    """
    groups = _groups(weight, group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    least = torch.full_like(largest, torch.inf)
    scale = torch.zeros_like(largest)
    for divisor in INT4_DIVISORS:
        tried = quotient(largest, divisor).bfloat16().float()
        error = (decode("int4", encode("int4", groups / _safe(tried))) * tried - groups).square_().sum(-1, keepdim=True)
        better = error < least
        least, scale = torch.where(better, error, least), torch.where(better, tried, scale)
    codes = encode("int4", groups / _safe(scale))
    return _Slab(_row(codes, weight.shape[-1]), scale.squeeze(-1).bfloat16())


def _uint4_asymmetric(weight: Tensor, absmax: Tensor, *, group_size: int) -> _Slab:
    """Scale s = (max - min)/15 in bfloat16 with 0 in the range, z = round(-min/s), code = round(x/s) + z in 0 to 15.

    Error in groups of 32: .0809 (t .0928), against .0897 (.113) of the symmetric rule.
    """
    groups = _groups(weight, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0.0), groups.amax(-1, keepdim=True).clamp(min=0.0)
    scale = quotient(high - low, 15).bfloat16().float()
    zero_point = (-low / _safe(scale)).round().clamp(0, 15)
    codes = ((groups / _safe(scale)).round() + zero_point).clamp(0, number_format("uint4").maximum)
    stored_zero = zero_point.to(torch.uint8).squeeze(-1)
    return _Slab(_row(codes.to(torch.uint8), weight.shape[-1]), scale.squeeze(-1).bfloat16(), stored_zero)


WEIGHT_RULES: Final[Mapping[str, Callable[[Tensor, Tensor], _Slab]]] = {
    "nvfp4": _nvfp4,
    "mxfp4": partial(_mx, element="fp4_e2m1", exponent="even"),
    "mxfp6_e2m3": partial(_mx, element="fp6_e2m3", exponent="even"),
    "mxfp6_e3m2": partial(_mx, element="fp6_e3m2", exponent="even"),
    "mxfp8": partial(_mx, element="fp8_e4m3fn", exponent="rceil"),
    "fp8_per_tensor": _fp8_per_tensor,
    "fp8_per_channel": _fp8_per_channel,
    "fp8_per_block": _fp8_per_block,
    "int8_per_channel": _int8_per_channel,
    "int8_per_channel_asym": _int8_per_channel_asym,
    **{f"int4_g{size}": partial(_int4_symmetric, group_size=size) for size in (128, 64, 32)},
    **{f"int4_g{size}_asym": partial(_uint4_asymmetric, group_size=size) for size in (128, 64, 32)},
}
"""Rows [n, K] float32 and the absolute maximum [1, 1] of the whole matrix -> the rows quantized."""
