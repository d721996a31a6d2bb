"""The stored form "triton-planes" at run time: what a host holds, and the launches of its kernels.

x may have any float dtype: where it is not the 16-bit dtype that the operands are exact in, it is split into two or
three bfloat16 pieces whose sum it is, which are further rows of the same product; their float32 results are added. So
activations that were dequantized to float32 lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from anybit.kernels.catalogue import Stored
from anybit.kernels.compiling import overlap
from anybit.kernels.linear.tiled_torch import Tiled, as_bits
from anybit.kernels.linear.triton_planes import expands_exactly
from anybit.kernels.request import Kernels, Regime
from anybit.kernels.triton import gemm16_hopper
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.launching import ALIGNED, Argument, Call, Launch, Piece, Zeros, launch, remember
from anybit.kernels.triton.opaque import Launched, Run
from anybit.kernels.triton.planes_hopper_launch import hopper_config
from anybit.kernels.triton.planes_launch import (
    PINNED_CALL,
    PINNED_TOKENS,
    configure,
    constants,
    expansion,
    half_factor,
    product_constants,
    scratch_rows,
    terms_of,
    waits,
)
from anybit.kernels.triton.planes_one_launch import one_config
from anybit.kernels.triton.planes_prepare import Packed, pack, unpacked
from anybit.kernels.triton.recipes import can_fake_quantize
from anybit.numerics.formats import number_format
from anybit.schemes import ActivationSpec
from anybit.weights import Dense, Weight

if TYPE_CHECKING:
    from anybit.kernels.triton.quantizers import Quantizer, QuantizerPlan

__all__ = ["StoredPlanes", "TritonPlanes"]

# in the kernels' order
PARTS: Final = ("plane_0", "plane_1", "plane_2", "scale", "scale_super", "zeros", "addend", "addend_super", "row",
                "table")
_ACTIVATION: Final = "activation_"  # of the names of static activation tensors
_NO_TENSORS: Final[Mapping[str, Tensor]] = MappingProxyType({})
# torch's product takes up to six times as long (H200) where the rows that it writes are no multiples of 16 bytes
_ALIGNED_OUTPUTS: Final = 8  # numbers of 16 bits
# pieces of 8 significant bits that hold 24, 11 and 8 of them
_PIECES: Final = {torch.float32: 3, torch.float64: 3, torch.float16: 2, torch.bfloat16: 1}
_FLUSHES_HALF: Final = ("gfx90a",)  # its matrix unit reads float16 subnormals as zero


# --- the stored weight ------------------------------------------------------------------------------------------------


class StoredPlanes(Launched):
    """A weight [N, K] in the layout, with the activation quantization in front of it.

    kernels          by number of tokens, as planned: `triton-expand` decodes rows to memory and leaves the product to
                     torch, the others decode in registers; None: always in registers
    is_pinned        one launch configuration for every M, so that a row's result does not depend on the other rows
    quantizes_input  the recipe's values are exact in bfloat16 but for a factor of each row, and a kernel makes them
    """

    def __init__(
        self, packed: Packed, kernels: Kernels | None, *, is_pinned: bool = False,
        spec: ActivationSpec | None = None, activation: Mapping[str, Tensor] = _NO_TENSORS,
    ) -> None:  # fmt: skip
        """`packed` on the device that it runs on; `spec` and its static tensors where the input is quantized here."""
        super().__init__()
        self.shape = packed.shape
        self.quantizes_input = spec is not None
        self._packed = packed
        self._spec = spec
        self._activation = dict(activation) if spec is not None else {}
        self._kernels = kernels
        self._is_pinned = is_pinned
        self._captured: list[Tensor] = []  # zeros that graphs count in
        self._dtypes = {name: t.dtype for name, t in self._held().items()}
        self._take()
        self._static_factor = self._find_static_factor()

    @property
    def packed(self) -> Packed:
        """The tensors and what they mean."""
        return self._packed

    @property
    def parts(self) -> list[Tensor]:
        """The tensors in the order of PARTS."""
        return self._parts

    @property
    def spec(self) -> ActivationSpec | None:
        """How the input is quantized here."""
        return self._spec

    @property
    def activation(self) -> Mapping[str, Tensor]:
        """The static numbers of that quantization."""
        return self._activation

    @property
    def is_half(self) -> bool:
        """True if products may be computed in float16 here."""
        return self._is_half

    @property
    def is_pinned(self) -> bool:
        """True where a row's result must not depend on the other rows."""
        return self._is_pinned

    def _held(self) -> dict[str, Tensor]:
        return self._packed.tensors | {f"{_ACTIVATION}{name}": t for name, t in self._activation.items()}

    def _take(self) -> None:
        """What the kernels are given: absent parts are stood in for by one that is never read."""
        self._calls = {}
        tensors = self._packed.tensors
        self._parts = [tensors.get(name, tensors["row"]) for name in PARTS]
        if "zeros" not in tensors:
            self._parts[5] = tensors["row"][None]
        self._permutation = tensors.get("permutation")
        device = tensors["row"].device
        flushes = device.type == "cuda" and arch_of(device) in _FLUSHES_HALF
        self._is_half = self._packed.is_half and not flushes
        self._quantizer: Quantizer | None = None
        if self._spec is not None:
            from anybit.kernels.triton.quantizers import Quantizer  # needs Triton; weights are stored without it too

            self._quantizer = Quantizer(self._spec, self._activation, self.shape[1], values=torch.bfloat16, own=True)

    def _pitch(self) -> int:
        """How far apart values of neighbouring groups lie: the padded rows, those of the whole for a part of one."""
        return next((self._parts[i].stride(-2) for i in (3, 6, 5) if self._parts[i].dim() > 1), self._parts[8].shape[0])

    def _find_static_factor(self) -> float | None:
        """The factor that every row of quantized activations has, read once; None where rows differ.

        Integer codes cannot hold NaN: there a row's factor is NaN instead, so it cannot be one for all.
        """
        spec, device = self._spec, self._packed.tensors["row"].device
        if spec is None or spec.dynamic or device.type != "cuda" or number_format(spec.element).is_integer:
            return None
        _, factors = self._quantized(torch.zeros(1, self.shape[1], dtype=torch.bfloat16, device=device))
        return 1.0 if factors is None else float(factors[0])

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, floats as bit patterns."""
        return {name: as_bits(t) for name, t in self._held().items()}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        real = {name: tensors[name].view(dtype) for name, dtype in self._dtypes.items()}
        self._packed.tensors = {name: real[name] for name in self._packed.tensors}
        self._activation = {name: real[f"{_ACTIVATION}{name}"] for name in self._activation}
        self._take()

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes times their block scales in bfloat16, exact, and the float32 factor of each row."""
        assert self._quantizer is not None
        found = self._quantizer(x)
        return found.codes, found.factor

    def _prepared(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Run:
        """How calls like this one are carried out: float32 sums, one rounding."""
        if 0 in (x.shape[0], self.shape[0]):
            return partial(_nothing, rows=self.shape[0], out_dtype=out_dtype)
        dtype = torch.bfloat16 if self._quantizer is not None else x.dtype
        is_exact_dtype = dtype == torch.bfloat16 or (dtype == torch.float16 and self._is_half)
        is_plain = (self._quantizer is None or self._static_factor is not None) and out_dtype == dtype and (
            bias is None or bias.dtype == dtype)
        expands = is_exact_dtype and self._expands(x.shape[0], is_plain=is_plain)
        is_direct = is_exact_dtype and not expands and self._permutation is None and not self._is_cut(x)
        if is_direct:
            return self._direct(x, bias, out_dtype)
        return partial(self._general, out_dtype=out_dtype, expands=expands, splits=not is_exact_dtype)

    def _general(
        self, x: Tensor, bias: Tensor | None, *, out_dtype: torch.dtype, expands: bool, splits: bool
    ) -> Tensor:
        """Step by step, where one or two launches do not do."""
        factors = None
        if self._quantizer is not None:
            x, factors = self._quantized(x)
        if self._permutation is not None:
            x = x.index_select(1, self._permutation)
        if splits:
            return self._by_pieces(x, bias, out_dtype)
        if expands:
            return self._by_expanding(x, factors, bias, out_dtype)
        return self._multiply(x, factors, bias, out_dtype)

    def _is_cut(self, x: Tensor) -> bool:
        """True where a call needs several launches, so that each row is computed as it would be alone."""
        return self._is_pinned and x.shape[0] > PINNED_CALL

    def _expands(self, tokens: int, *, is_plain: bool) -> bool:
        """True where the plan writes the weights out; ROCm's product gives no float32 result for 16-bit operands."""
        expands = self._kernels is not None and self._kernels.at(tokens) == "triton-expand"
        return expands and (is_plain or not torch.version.hip)

    def _multiply(self, x: Tensor, factors: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """The product of exact operands x [M, K], with float32 factors of its rows."""
        x = x if x.stride(1) == 1 else x.contiguous()
        if self._is_cut(x):
            parts = torch.split(x, PINNED_CALL)
            some = [None] * len(parts) if factors is None else torch.split(factors, PINNED_CALL)
            return torch.cat([self._multiply(a, b, bias, out_dtype) for a, b in zip(parts, some, strict=True)])
        has_factors = factors is not None
        key = ("exact", x.shape, x.stride(), x.dtype, out_dtype, None if bias is None else bias.dtype, has_factors)
        call = self._calls.get(key)
        if call is None:
            kind = torch.float32 if has_factors else None
            call = remember(self._calls, key, self._launched(x, kind, bias, out_dtype))
        result: Tensor = call(x, bias, factors)
        return result

    def _direct(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Call:
        """The launches of one product, with its quantizer."""
        if self._quantizer is None:
            return self._launched(x, None, bias, out_dtype)
        plan = self._quantizer.plan(x)
        factors = plan.pieces.get("scale", plan.pieces.get("outer"))
        return self._launched(x, factors, bias, out_dtype, plan)

    def _launched(
        self, x: Tensor, factors: Piece | torch.dtype | None, bias: Tensor | None, out_dtype: torch.dtype,
        quantize: QuantizerPlan | None = None,
    ) -> Call:  # fmt: skip
        """The launch of the product for calls like this one: of x itself, or of what `quantize` makes of it.

        factors  of x's rows, where they have any: a part of the scratch, or (a dtype) a tensor that the call brings
        """
        from anybit.kernels.triton.planes_kernels import matmul_kernel

        (tokens, columns), rows, form = x.shape, self.shape[0], self._packed.form
        device, arch = x.device, arch_of(x.device)
        planned = PINNED_TOKENS if self._is_pinned else tokens
        one = one_config(form, rows, columns, arch) if planned == 1 else None
        if one is not None:
            from anybit.kernels.triton.planes_one_run import one_call

            return one_call(one, form, rows, self._parts, self._pitch(), self._captured, x, factors, bias, out_dtype,
                            quantize)
        hopper = hopper_config(form, rows, columns, planned, arch, pinned=self._is_pinned)
        if hopper is not None:
            from anybit.kernels.triton.planes_hopper_run import hopper_call

            return hopper_call(hopper, form, rows, self._parts, self._pitch(), self._captured, x, factors, bias,
                               out_dtype, quantize)
        config = configure(form, rows, columns, planned, arch)
        row = self._parts[8]  # stands in for what a specialization does not read
        padded_rows, padded, pitch = row.shape[0], form.padded(columns), self._pitch()
        tiles, is_split = -(-tokens // config.tokens) * (padded_rows // config.rows), config.split > 1
        size = 0 if quantize is None else quantize.scratch_bytes
        parts: Argument = row
        if is_split:
            parts = Piece(size, torch.float32)
            size += -(-config.split * tokens * rows * 4 // ALIGNED) * ALIGNED
        is_half = quantize is None and x.dtype == torch.float16
        is_waiting = waits(form, tokens, arch, is_quantized=factors is not None or quantize is not None)
        made = Launch(
            matmul_kernel,
            [x.dtype if quantize is None else quantize.pieces["codes"], *self._parts,
             row if factors is None else factors, row if bias is None else bias.dtype, out_dtype, parts,
             Zeros(tiles, self._captured) if is_split else row, int, rows, pitch, columns, padded,
             x.stride(0) if quantize is None and tokens > 1 else columns,
             pitch if self._parts[5].shape[0] > 1 else 0, half_factor(form, is_half=is_half)],
            {**product_constants(form, columns, arch), "TERMS": terms_of(form, is_half=is_half), "BM": config.tokens,
             "BN": config.rows, "SPLIT": is_split, "TOKENS": factors is not None, "BIAS": bias is not None,
             "EVEN": columns == padded, "ASM": config.assembly, "WAITS": is_waiting},
            device, num_warps=config.warps, num_stages=config.stages, **overlap(is_waiting),
        )  # fmt: skip
        return Call((tokens, rows), out_dtype, device, tokens, size, quantize, made, (tiles, config.split))

    def _expanded_rows(
        self, start: int, count: int, dtype: torch.dtype, *, with_rows: bool, room: int
    ) -> Tensor:
        """Rows of the weight from `start` on, decoded: [room, K] in a 16-bit dtype, those after `count` undefined."""
        from anybit.kernels.triton.planes_kernels import expand_kernel

        form, row, columns = self._packed.form, self._parts[8], self.shape[1]
        out = torch.empty((room, columns), dtype=dtype, device=row.device)
        pitch, padded = self._pitch(), form.padded(columns)
        tile_rows, blocks = expansion(form)
        launch(
            expand_kernel, (-(-count // tile_rows), -(-(padded // form.block) // blocks)),
            [*self._parts, out, start, count, pitch, columns, padded,
             pitch if self._parts[5].shape[0] > 1 else 0, half_factor(form, is_half=dtype == torch.float16)],
            out.device, **constants(form), ROW=with_rows, BN=tile_rows, NB=blocks, num_warps=4, num_stages=1,
        )  # fmt: skip
        return out

    def _by_pieces(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """The product of x's bfloat16 pieces, added in float32."""
        pieces = split(x, _PIECES[x.dtype])
        rows = torch.cat(pieces)
        if self._expands(x.shape[0], is_plain=False):
            y = self._by_expanding(rows, None, None, torch.float32)
        else:
            y = self._multiply(rows, None, None, torch.float32)
        y = y.view(len(pieces), x.shape[0], -1).sum(0)
        return (y if bias is None else y + bias.float()).to(out_dtype)

    def _by_expanding(self, x: Tensor, factors: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Rows decoded a scratch at a time, multiplied by torch with float32 sums.

        A factor common to all rows is left to the product's own alpha (float32); others are part of the weight's
        rounding to 16 bits.
        """
        n, k = self.shape
        form, factor, alpha = self._packed.form, self._packed.factor, 1.0
        is_common = factor is not None and form.scaling != "decode"
        if factor is not None and is_common:
            alpha = factor * half_factor(form, is_half=x.dtype == torch.float16)
        if factors is not None and self._static_factor is not None:
            alpha, factors = alpha * self._static_factor, None
        step = scratch_rows(n, k)
        room = -(-n // _ALIGNED_OUTPUTS) * _ALIGNED_OUTPUTS
        out = torch.empty((x.shape[0], room), dtype=out_dtype, device=x.device)
        for start in range(0, n, step):
            count, wide = min(step, n - start), min(step, room - start)
            tile = self._expanded_rows(start, count, x.dtype, with_rows=not is_common, room=wide)
            part = None if bias is None else torch.nn.functional.pad(bias[start : start + count], (0, wide - count))
            _product_into(out[:, start : start + wide], x, tile, factors, part, alpha)
        return out if room == n else out[:, :n].contiguous()

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight's rows [.., K] for integer `index` [..]."""
        return unpacked(self._packed, index.reshape(-1)).to(dtype).reshape(*index.shape, self.shape[1])

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        return unpacked(self._packed)


def _nothing(x: Tensor, bias: Tensor | None, *, rows: int, out_dtype: torch.dtype) -> Tensor:
    """The product of no rows."""
    return torch.empty((x.shape[0], rows), dtype=out_dtype, device=x.device)


def _finish(y: Tensor, factors: Tensor | None, bias: Tensor | None, out: Tensor, alpha: float) -> None:
    """out = alpha y (times factors of rows) + bias for float32 y, rounded once."""
    from anybit.kernels.triton.planes_kernels import finish_kernel

    (tokens, rows), columns = y.shape, 1024
    launch(
        finish_kernel, (tokens, -(-rows // columns)),
        [y, y if factors is None else factors, y if bias is None else bias, out, tokens, rows, out.stride(0), alpha],
        y.device, TOKENS=factors is not None, BIAS=bias is not None, BN=columns, num_warps=4,
    )  # fmt: skip


def split(x: Tensor, count: int) -> list[Tensor]:
    """x as the sum of `count` bfloat16 tensors, exact for 8 significant bits each; infinities stay in the first."""
    rest = x.float()
    pieces = []
    for _ in range(count):
        piece = rest.to(torch.bfloat16)
        pieces.append(piece)
        rest = torch.where(piece.isfinite(), rest - piece.float(), 0.0)
    return pieces


def _product_into(
    out: Tensor, x: Tensor, weight: Tensor, factors: Tensor | None, bias: Tensor | None, alpha: float
) -> None:
    """out [M, n] = alpha x W^T (times factors of rows) + bias, with float32 sums and one rounding."""
    is_plain = out.dtype == x.dtype and factors is None and (bias is None or _may_add(bias, x))
    if not is_plain and gemm16_hopper.takes(x, weight, out):
        gemm16_hopper.product_into(out, x, weight, factors, bias, alpha)
        return
    with _full_sums():
        if not is_plain:
            wide = torch.mm(x, weight.T, out_dtype=torch.float32)
            _finish(wide, factors, bias, out, alpha)
        elif bias is not None:
            torch.addmm(bias, x, weight.T, alpha=alpha, out=out)
        elif alpha == 1.0:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(out, x, weight.T, beta=0, alpha=alpha, out=out)


def _may_add(bias: Tensor, x: Tensor) -> bool:
    """True where the library may add the bias: it adds parts of the sums in 16 bits too where rows are not aligned."""
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) % _ALIGNED_OUTPUTS == 0 and x.shape[1] % _ALIGNED_OUTPUTS == 0
    return bias.dtype == x.dtype and is_aligned


@contextmanager
def _full_sums() -> Iterator[None]:
    """Partial sums of split-K in float32: by default the library may add them in 16 bits."""
    flags = torch.backends.cuda.matmul
    found = flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction
    flags.allow_bf16_reduced_precision_reduction = flags.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction = found


class TritonPlanes:
    """Implementation of `triton-matvec`, `triton-fused` and `triton-expand`."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> Stored:
        """Planes, scales by group, factors by row; columns sorted by group where act-order scatters them."""
        if isinstance(weight, Dense):
            raise TypeError("a Dense weight belongs to torch-dense")
        packed = pack(weight, dtype)
        if packed is None:
            return Tiled().prepare(weight, dtype, kernels, pinned=pinned)
        spec = weight.scheme.activation
        if spec is not None and can_fake_quantize(spec) is not None:
            spec = None
        operand = dtype if spec is None else torch.bfloat16
        planned = Kernels.of(kernels) if is_expandable(packed, operand) and not pinned else None
        return StoredPlanes(packed, planned, is_pinned=pinned, spec=spec, activation=weight.activation)


# exponents of e8m0 scales with which every code stays exact in the dtype (docs/formats/numerics.md §4)
_EXACT_RANGE: Final = {
    (torch.bfloat16, "fp4_e2m1"): (-125, 125), (torch.bfloat16, "fp6_e2m3"): (-125, 125),
    (torch.bfloat16, "fp6_e3m2"): (-123, 123), (torch.bfloat16, "fp8_e4m3fn"): (-117, 119),
    (torch.bfloat16, "fp8_e5m2"): (-110, 112), (torch.float16, "fp4_e2m1"): (-13, 13),
    (torch.float16, "fp6_e2m3"): (-11, 13), (torch.float16, "fp6_e3m2"): (-10, 11),
    (torch.float16, "fp8_e4m3fn"): (-5, 7), (torch.float16, "fp8_e5m2"): (0, 0),
}  # fmt: skip


def is_expandable(packed: Packed, dtype: torch.dtype) -> bool:
    """True unless weights reach beyond the 16-bit dtype, which headers cannot show and a folded scale avoids."""
    if dtype == torch.float16 and not expands_exactly(packed.scheme, "float16"):
        return _fits_half(packed)
    level = packed.scheme.scales[0] if packed.scheme.scales else None
    if level is None or level.format != "e8m0" or packed.form.scaling != "group":
        return True
    low, high = _EXACT_RANGE.get((dtype, packed.scheme.element), (-110, 110))
    return low <= packed.lowest and packed.highest <= high


# the largest weight of a row as float16: the least one whose row loses no more than by a rounding, the largest number
_HALF_RANGE: Final = (2.0**-12, 65504.0)
_CHUNK: Final = 1 << 22  # weights looked at together


def _fits_half(packed: Packed) -> bool:
    """True if every row, rounded to float16, is what a rounding leaves of it: no infinity, nothing lost below 2^-24."""
    n, k = packed.shape
    least, most = _HALF_RANGE
    step = max(1, _CHUNK // max(k, 1))
    for start in range(0, n, step):
        index = torch.arange(start, min(start + step, n), device=packed.tensors["row"].device)
        largest = unpacked(packed, index).abs().amax(-1)
        if bool((((largest != 0) & (largest < least)) | ~(largest <= most)).any()):
            return False
    return True
