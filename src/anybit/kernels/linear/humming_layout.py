"""Canonical weights to humming's tensors and back: see `humming.py`.

On the way there humming's own functions order codes, scales and zero points. On the way back nothing of that order is
assumed: it is a permutation of the bits of tiles of 64 x 64 codes, which one pass over numbered bits shows.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from anybit.kernels.linear.humming import Settings
from anybit.kernels.linear.humming_library import Library
from anybit.kernels.linear.tiled_torch import compact
from anybit.numerics.codec import decode
from anybit.numerics.formats import number_format
from anybit.numerics.packing import PackedCodes, pack_stream, unpack_stream
from anybit.schemes import TENSOR, ScaleLevel
from anybit.weights import QuantizedWeight

__all__ = ["codes_of", "plain_of", "scales_of", "unfit", "zeros_of"]

TILE: Final = 64  # rows and columns of the tiles within which codes are permuted, rows within which scales are
_BITS_AT_A_TIME: Final = 2**27  # of unpacking, one a byte
_E8M0_ONE: Final = 127
# exponents of e8m0 scales with which codes stay exact, and inside what humming's arithmetic reaches
_EXPONENTS: Final = {torch.bfloat16: (-100, 100), torch.float16: (-11, 11)}


def unfit(weight: QuantizedWeight, settings: Settings, dtype: torch.dtype) -> str | None:
    """What headers did not show and humming's arithmetic does not hold, or None."""
    first = weight.scheme.scales[0]
    scale = weight.scales[0]
    if first.format == "e8m0":
        low, high = (int(v) - _E8M0_ONE for v in torch.aminmax(scale))
        least, most = _EXPONENTS[dtype]
        if low < least or high > most:
            return f"powers of two from {low} to {high}, exact are {least} to {most}"
    elif not _scales_hold(first, scale, dtype):
        return f"scales that are not finite, or leave the normal range of {dtype}"
    form = number_format(weight.scheme.element)
    if form.kind == "float" and form.bits == 8 and not _codes_are_finite(weight):
        return "codes of infinities or NaN"
    if weight.offset is not None:
        zeros = weight.offset.to(torch.int16) + settings.shift
        if int(zeros.min()) < 0 or int(zeros.max()) >= 2**settings.bits:
            return f"zero points outside of the {settings.bits} bits of a code"
    return None


def _scales_hold(level: ScaleLevel, scale: Tensor, dtype: torch.dtype) -> bool:
    """True if every scale is finite, and keeps its precision in the dtype that it is cast to."""
    if number_format(level.format).bits == 8:
        return bool(decode(level.format, scale).isfinite().all())
    kept = scale if level.block == TENSOR else scale.to(dtype)
    is_small = (kept.abs() < torch.finfo(kept.dtype).tiny) & (scale != 0)
    return bool(kept.isfinite().all()) and (kept.dtype == scale.dtype or not bool(is_small.any()))


def _codes_are_finite(weight: QuantizedWeight) -> bool:
    every = torch.arange(256, dtype=torch.uint8)
    special = every[~decode(weight.scheme.element, every).isfinite()].tolist()
    parts = torch.split(weight.codes, 1024)
    return not any(bool((part == code).any()) for part in parts for code in special)


def plain_of(weight: QuantizedWeight, settings: Settings, dtype: torch.dtype, factor: float) -> dict[str, Tensor]:
    """A weight in humming's formats and plain order: what its transformation takes.

    weight [N, K bits / 32] int32; weight_scale [rows, groups]; zero_point [N bits / 32, groups] int32; weight_scale_2
    [1] float32.

    factor  of the matrix, beside the scheme's own: that of quantized activations
    """
    tensors = {"weight": _words(weight, settings.bits)}
    level, scale = weight.scheme.scales[0], weight.scales[0]
    kept = {"e8m0": torch.float8_e8m0fnu, "fp8_e4m3fn": torch.float8_e4m3fn}.get(level.format)
    if kept is not None:
        tensors["weight_scale"] = scale.contiguous().view(kept)
    elif settings.is_tensor:
        tensors["weight_scale"] = scale.float().reshape(1) * factor
    else:
        tensors["weight_scale"] = scale.contiguous() if settings.block_rows else scale.to(dtype).contiguous()
    if weight.offset is not None:
        fields = (weight.offset.to(torch.int16) + settings.shift).to(torch.uint8)  # [N, groups]
        packed = pack_stream(fields.T.contiguous(), settings.bits).contiguous().view(torch.int32)
        tensors["zero_point"] = packed.T.contiguous()
    if settings.factor:
        above = weight.scales[1].float().reshape(1)
        tensors["weight_scale_2"] = (1.0 / above if settings.factor == "divide" else above) * factor
    return tensors


def _words(weight: QuantizedWeight, bits: int) -> Tensor:
    """Codes as a stream along K, offset binary: [N, K bits / 32] int32. K is a multiple of 64."""
    stored = weight.stored_codes
    if not isinstance(stored, PackedCodes) or stored.order != "stream":
        stored = compact(QuantizedWeight(weight.scheme, weight.shape, weight.codes)).stored_codes
    if isinstance(stored, PackedCodes):
        data, is_shifted = stored.data, stored.sign == "twos_complement"
    else:
        data, is_shifted = stored.view(torch.uint8), stored.dtype == torch.int8
    words = data[..., : weight.shape[-1] * bits // 8].contiguous().view(torch.int32)
    return words ^ _sign_bits(words, bits) if is_shifted else words


def _sign_bits(words: Tensor, bits: int) -> Tensor:
    """The highest bit of each field of the stream, as words of a row: x ^ these is x + half of the range."""
    length = words.shape[-1]
    codes = torch.full((length * 32 // bits,), 2 ** (bits - 1), dtype=torch.uint8, device=words.device)
    return pack_stream(codes, bits).view(torch.int32)


# --- and back ---------------------------------------------------------------------------------------------------------


def codes_of(
    library: Library, config: Any, stored: Tensor, settings: Settings, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The codes [N, K] uint8, offset binary, of humming's tensor [K / columns, columns N bits / 32] int32.

    Its rows hold 16, 32 or 64 columns of the weight; a tile has as many rows as that takes.
    """
    bits, (n, k) = settings.bits, shape
    source = _bit_order(library, config, settings, stored.device)
    rows = stored.shape[0] * TILE // k
    tiles = stored.view(k // TILE, rows, n // TILE, -1).permute(2, 0, 1, 3).reshape(-1, TILE * TILE * bits // 32)
    at_a_time = max(1, _BITS_AT_A_TIME // (TILE * TILE * bits))
    parts = [_fields(_bits(part)[:, source], bits) for part in torch.split(tiles, at_a_time)]
    codes = torch.cat(parts).view(n // TILE, k // TILE, TILE, TILE).transpose(1, 2).reshape(n, k)
    if settings.codes or (settings.element == "uint8" and dtype == torch.bfloat16):
        middle = 2 ** (bits - 1)  # kept as distances from the middle up, and from the code below it down
        return torch.where(codes < middle, codes + middle, 2 * middle - 1 - codes)
    return codes


def _bit_order(library: Library, config: Any, settings: Settings, device: torch.device) -> Tensor:
    """int64 [4096 bits]: where a stored tile has each bit of the plain one, read off tiles of numbered bits."""
    bits, width = settings.bits, 8 if settings.codes else 16
    count = TILE * TILE * bits
    numbers = torch.arange(count, device=device)
    found = torch.zeros(count, dtype=torch.int64, device=device)
    for digit in range((count - 1).bit_length()):
        words = _as_words((numbers >> digit & 1).to(torch.uint8)).view(TILE, TILE * bits // 32)
        stored = library.ops.repack_weight(words, bits, width, True, use_packed_k_layout=config.use_packed_k_layout,
                                           use_native_dequant=config.use_native_dequant)
        found |= _bits(stored.reshape(1, -1))[0].long() << digit
    source = torch.empty_like(found)
    source[found] = numbers
    assert torch.equal(found.sort().values, numbers), "humming's order of a tile is no permutation of its bits"
    return source


def _bits(words: Tensor) -> Tensor:
    """[.., W] int32 -> [.., 32 W] uint8 of 0 and 1, lowest first."""
    data = words.contiguous().view(torch.uint8)
    shifts = torch.arange(8, device=words.device, dtype=torch.uint8)
    return (data[..., None] >> shifts & 1).flatten(-2)


def _as_words(bits: Tensor) -> Tensor:
    """The inverse of `_bits`."""
    weights = 2 ** torch.arange(8, device=bits.device, dtype=torch.int32)
    data = (bits.view(-1, 8).int() * weights).sum(-1).to(torch.uint8)
    return data.view(torch.int32)


def _fields(bits: Tensor, width: int) -> Tensor:
    """[T, F width] of 0 and 1 -> [T, F] uint8."""
    found = torch.zeros(*bits.shape[:-1], bits.shape[-1] // width, dtype=torch.uint8, device=bits.device)
    for place in range(width):
        found |= bits[..., place::width] << place
    return found


def scales_of(library: Library, config: Any, stored: Tensor, settings: Settings, dtype: torch.dtype) -> Tensor:
    """Scales [rows, groups] as `plain_of` gave them, of humming's: transposed, rows permuted within runs of 64."""
    if settings.is_tensor:
        return stored.reshape(1, 1)
    if settings.block_rows:
        return stored.T
    plain = _rows_in_order(library, stored, on_sums=config.should_apply_bs_on_c)
    if settings.scale == "float8e8m0" and dtype == torch.float16:  # kept with the exponent bias of float16
        return ((plain.view(torch.uint8) >> 3) + 112).view(plain.dtype)
    return plain


def zeros_of(library: Library, stored: Tensor, settings: Settings, n: int) -> Tensor:
    """Zero points [N, groups] uint8 of humming's [groups, N bits / 32] int32: nibbles, or bytes for wider codes."""
    fields = unpack_stream(stored, 4 if settings.bits <= 4 else 8, n)
    return _rows_in_order(library, fields, on_sums=False)


def _rows_in_order(library: Library, stored: Tensor, *, on_sums: bool) -> Tensor:
    """[groups, N] in humming's order of rows -> [N, groups]."""
    numbers = torch.arange(TILE, dtype=torch.int32, device=stored.device)[:, None]
    order = library.transform.transform_humming_weight_scale(numbers, to_apply_on_c=on_sums).flatten().long()
    groups = stored.shape[0]
    return stored.reshape(groups, -1, TILE)[..., order.argsort()].reshape(groups, -1).T
