"""The stored form "triton-planes" at run time: what a host holds, and the operators that launch the kernels.

x may have any float dtype: where it is not the 16-bit dtype that the operands are exact in, it is split into two or
three bfloat16 pieces whose sum it is, which are further rows of the same product; their float32 results are added. So
activations that were dequantized to float32 lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, Final, cast

import torch
from torch import Tensor

from anybit.kernels.catalogue import Stored
from anybit.kernels.linear.tiled_torch import Tiled, as_bits
from anybit.kernels.request import Regime
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_launch import configure, constants, expansion, half_factor, overlaps, terms_of
from anybit.kernels.triton.planes_prepare import Packed, pack, unpacked
from anybit.kernels.triton.recipes import can_fake_quantize
from anybit.numerics.formats import number_format
from anybit.schemes import ActivationSpec
from anybit.weights import Dense, Weight

__all__ = ["StoredPlanes", "TritonPlanes"]

EXPANDED_TOKENS: Final = 192  # fewer are faster decoded in registers
SCRATCH_BYTES: Final = 64 * 2**20  # of expanded rows at a time
PARTS: Final = ("plane_0", "plane_1", "plane_2", "scale", "scale_super", "zeros", "addend", "addend_super", "row",
                "table", "counters")
_ACTIVATION: Final = "activation_"  # of the names of static activation tensors
_NO_TENSORS: Final[Mapping[str, Tensor]] = MappingProxyType({})
_PINNED_TOKENS: Final = 16  # the configuration of every M where a row's result must not depend on M
_PINNED_CALL: Final = 256  # tokens of one launch there: each has parts of split-K
# pieces of 8 significant bits that hold 24, 11 and 8 of them
_PIECES: Final = {torch.float32: 3, torch.float64: 3, torch.float16: 2, torch.bfloat16: 1}
_FLUSHES_HALF: Final = ("gfx90a",)  # its matrix unit reads float16 subnormals as zero
_FORMS: list[Form] = []
_FORM_NUMBERS: dict[Form, int] = {}


def number_of(form: Form) -> int:
    """A number for a form, the same one for equal forms: what an operator takes instead of twenty constants."""
    if form not in _FORM_NUMBERS:
        _FORM_NUMBERS[form] = len(_FORMS)
        _FORMS.append(form)
    return _FORM_NUMBERS[form]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launches go to the current device, which may be another one than the tensors'."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def _pitch(parts: list[Tensor]) -> int:
    """How far apart values of neighbouring groups lie: the padded rows, or those of the weight that this is part of."""
    return next((parts[i].stride(-2) for i in (3, 6, 5) if parts[i].dim() > 1), parts[8].shape[0])


# --- operators --------------------------------------------------------------------------------------------------------


def _matmul(x: Tensor, parts: list[Tensor], factors: Tensor | None, bias: Tensor | None, form_number: int, rows: int,
            columns: int, is_pinned: bool, out_dtype: torch.dtype) -> Tensor:  # fmt: skip
    from anybit.kernels.triton.planes_kernels import matmul_kernel

    form = _FORMS[form_number]
    tokens = x.shape[0]
    out = torch.empty((tokens, rows), dtype=out_dtype, device=x.device)
    if tokens == 0 or rows == 0:
        return out
    if is_pinned and tokens > _PINNED_CALL:
        calls = [(part, None if factors is None else factors[i * _PINNED_CALL :])
                 for i, part in enumerate(torch.split(x, _PINNED_CALL))]
        return torch.cat([_matmul(part, parts, some, bias, form_number, rows, columns, is_pinned, out_dtype)
                          for part, some in calls])
    if x.stride(1) != 1:
        x = x.contiguous()
    config = configure(form, rows, columns, _PINNED_TOKENS if is_pinned else tokens, arch_of(x.device))
    padded_rows, padded, pitch = parts[8].shape[0], form.padded(columns), _pitch(parts)
    tiles = -(-tokens // config.tokens) * (padded_rows // config.rows)
    split = config.split
    assert split == 1 or tiles <= parts[10].numel()
    partial = out if split == 1 else torch.empty((split, tokens, rows), dtype=torch.float32, device=x.device)
    is_half = x.dtype == torch.float16
    waits = factors is not None and overlaps(tokens, rows, columns, arch_of(x.device))
    with _on(x.device):
        matmul_kernel[(tiles, split)](
            x, *parts[:10], parts[8] if factors is None else factors, out if bias is None else bias, out, partial,
            parts[10], tokens, rows, pitch, columns, padded, x.stride(0),
            pitch if parts[5].shape[0] > 1 else 0, half_factor(form, is_half=is_half), **constants(form),
            R=form.run, TERMS=terms_of(form, is_half=is_half), BM=config.tokens, BN=config.rows, SPLIT=split > 1,
            TOKENS=factors is not None, BIAS=bias is not None, EVEN=columns == padded, ASM=config.assembly,
            WAITS=waits, num_warps=config.warps, num_stages=config.stages, **({"launch_pdl": True} if waits else {}),
        )  # fmt: skip
    return out


def _expand(parts: list[Tensor], form_number: int, start: int, rows: int, columns: int, with_rows: bool,
            dtype: torch.dtype) -> Tensor:  # fmt: skip
    from anybit.kernels.triton.planes_kernels import expand_kernel

    form = _FORMS[form_number]
    device = parts[0].device
    out = torch.empty((rows, columns), dtype=dtype, device=device)
    pitch, padded = _pitch(parts), form.padded(columns)
    is_half = dtype == torch.float16
    tile_rows, blocks = expansion(form)
    with _on(device):
        expand_kernel[(-(-rows // tile_rows), -(-(padded // form.block) // blocks))](
            *parts[:10], out, start, rows, pitch, columns, padded,
            pitch if parts[5].shape[0] > 1 else 0, half_factor(form, is_half=is_half),
            **constants(form), ROW=with_rows, BN=tile_rows, NB=blocks,
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def _finish(y: Tensor, factors: Tensor | None, bias: Tensor | None, out: Tensor, alpha: float) -> None:
    from anybit.kernels.triton.planes_kernels import finish_kernel

    tokens, rows = y.shape
    columns = 1024
    with _on(y.device):
        finish_kernel[(tokens, -(-rows // columns))](
            y, y if factors is None else factors, y if bias is None else bias, out, tokens, rows, out.stride(0), alpha,
            TOKENS=factors is not None, BIAS=bias is not None, BN=columns, num_warps=4,
        )  # fmt: skip


_SCHEMAS: Final = (
    "planes_matmul(Tensor x, Tensor[] parts, Tensor? factors, Tensor? bias, int form, int rows, int columns, "
    "bool is_pinned, ScalarType out_dtype) -> Tensor",
    "planes_expand(Tensor[] parts, int form, int start, int rows, int columns, bool with_rows, "
    "ScalarType dtype) -> Tensor",
    "planes_finish(Tensor y, Tensor? factors, Tensor? bias, Tensor(a!) out, float alpha) -> ()",
)


def _fake_matmul(x: Tensor, parts: list[Tensor], factors: Tensor | None, bias: Tensor | None, form: int, rows: int,
                 columns: int, is_pinned: bool, out_dtype: torch.dtype) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], rows), dtype=out_dtype)


def _fake_expand(parts: list[Tensor], form: int, start: int, rows: int, columns: int, with_rows: bool,
                 dtype: torch.dtype) -> Tensor:  # fmt: skip
    return parts[0].new_empty((rows, columns), dtype=dtype)


def _fake_finish(y: Tensor, factors: Tensor | None, bias: Tensor | None, out: Tensor, alpha: float) -> None:
    return None


_LIBRARY: Final = torch.library.Library("anybit", "FRAGMENT")  # type: ignore[no-untyped-call]
_FAKES: Final[tuple[Callable[..., Any], ...]] = (_fake_matmul, _fake_expand, _fake_finish)
for _schema, _real, _fake in zip(_SCHEMAS, (_matmul, _expand, _finish), _FAKES, strict=True):
    _name = _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _real, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"anybit::{_name}", _fake, lib=_LIBRARY)

_matmul_op = torch.ops.anybit.planes_matmul.default
_expand_op = torch.ops.anybit.planes_expand.default
_finish_op = torch.ops.anybit.planes_finish.default


# --- the stored weight ------------------------------------------------------------------------------------------------


class StoredPlanes:
    """A weight [N, K] in the layout, with the activation quantization in front of it.

    expanded         regimes that decode rows to memory and leave the product to torch
    is_pinned        one launch configuration for every M, so that a row's result does not depend on the other rows
    quantizes_input  the recipe's values are exact in bfloat16 but for a factor of each row, and a kernel makes them
    """

    def __init__(
        self, packed: Packed, expanded: frozenset[Regime], *, is_pinned: bool = False,
        spec: ActivationSpec | None = None, activation: Mapping[str, Tensor] = _NO_TENSORS,
    ) -> None:  # fmt: skip
        """`packed` on the device that it runs on; `spec` and its static tensors where the input is quantized here."""
        self.shape = packed.shape
        self.quantizes_input = spec is not None
        self._packed = packed
        self._spec = spec
        self._activation = dict(activation) if spec is not None else {}
        self._form = number_of(packed.form)
        self._expanded = expanded
        self._is_pinned = is_pinned
        self._dtypes = {name: t.dtype for name, t in self._held().items()}
        self._take()
        self._static_factor = self._find_static_factor()

    def _held(self) -> dict[str, Tensor]:
        return self._packed.tensors | {f"{_ACTIVATION}{name}": t for name, t in self._activation.items()}

    def _take(self) -> None:
        """What the operators are given: absent parts are stood in for by one that is never read."""
        tensors = self._packed.tensors
        self._parts = [tensors.get(name, tensors["row"]) for name in PARTS]
        if "zeros" not in tensors:
            self._parts[5] = tensors["row"][None]
        self._permutation = tensors.get("permutation")
        device = tensors["row"].device
        flushes = device.type == "cuda" and arch_of(device) in _FLUSHES_HALF
        self._is_half = self._packed.is_half and not flushes

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
        from anybit.kernels.triton.quantizers import fake_quantize

        assert self._spec is not None
        rows, columns = self.shape
        leads = x.device.type == "cuda" and overlaps(x.shape[0], rows, columns, arch_of(x.device))
        values, factors = fake_quantize(x, self._spec, self._activation, leads=leads)
        return values, None if factors is None else factors.contiguous()

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """x [M, K] in any float dtype times W^T (+ bias): [M, N] in `out_dtype`, float32 sums, one rounding."""
        if x.shape[0] == 0:
            return torch.empty((0, self.shape[0]), dtype=out_dtype, device=x.device)
        factors = None
        if self.quantizes_input:
            x, factors = self._quantized(x)
        if self._permutation is not None:
            x = x.index_select(1, self._permutation)
        is_exact_dtype = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and self._is_half)
        if not is_exact_dtype:
            return self._by_pieces(x, regime, bias, out_dtype)
        is_plain = (factors is None or self._static_factor is not None) and out_dtype == x.dtype and (
            bias is None or bias.dtype == x.dtype)
        if self._expands(x, regime, is_plain=is_plain):
            return self._by_expanding(x, factors, bias, out_dtype)
        return self._multiply(x, factors, bias, out_dtype)

    def _expands(self, x: Tensor, regime: Regime, *, is_plain: bool) -> bool:
        """True where writing the weights out pays; ROCm's product gives no float32 result for 16-bit operands."""
        is_many = regime in self._expanded and x.shape[0] >= EXPANDED_TOKENS
        return is_many and (is_plain or not torch.version.hip)

    def _multiply(self, x: Tensor, factors: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        n, k = self.shape
        # outside a compiler the dispatcher would only cost time
        run = _matmul_op if torch.compiler.is_compiling() else _matmul
        return cast("Tensor", run(x, self._parts, factors, bias, self._form, n, k, self._is_pinned, out_dtype))

    def _by_pieces(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """The product of x's bfloat16 pieces, added in float32."""
        pieces = split(x, _PIECES[x.dtype])
        rows = torch.cat(pieces)
        if self._expands(rows, regime, is_plain=False):
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
        step = max(64, SCRATCH_BYTES // (2 * max(k, 1)) // 64 * 64)
        out = torch.empty((x.shape[0], n), dtype=out_dtype, device=x.device)
        for start in range(0, n, step):
            count = min(step, n - start)
            tile = _expand_op(self._parts, self._form, start, count, k, not is_common, x.dtype)
            part = None if bias is None else bias[start : start + count]
            _product_into(out[:, start : start + count], x, tile, factors, part, alpha)
        return out

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight's rows [.., K] for integer `index` [..]."""
        return unpacked(self._packed, index.reshape(-1)).to(dtype).reshape(*index.shape, self.shape[1])

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        return unpacked(self._packed)


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
    with _full_sums():
        if out.dtype != x.dtype or factors is not None or (bias is not None and bias.dtype != x.dtype):
            wide = torch.mm(x, weight.T, out_dtype=torch.float32)
            _finish_op(wide, factors, bias, out, alpha)
        elif bias is not None:
            torch.addmm(bias, x, weight.T, alpha=alpha, out=out)
        elif alpha == 1.0:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(out, x, weight.T, beta=0, alpha=alpha, out=out)


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
        chosen = {regime for regime, name in kernels.items() if name == "triton-expand"}
        expanded = frozenset(chosen) if is_expandable(packed, dtype) and not pinned else frozenset()
        spec = weight.scheme.activation
        if spec is not None and can_fake_quantize(spec) is not None:
            spec = None
        return StoredPlanes(packed, expanded, is_pinned=pinned, spec=spec, activation=weight.activation)


# exponents of e8m0 scales with which every code stays exact in the dtype (docs/formats/numerics.md §4)
_EXACT_RANGE: Final = {
    (torch.bfloat16, "fp4_e2m1"): (-125, 125), (torch.bfloat16, "fp6_e2m3"): (-125, 125),
    (torch.bfloat16, "fp6_e3m2"): (-123, 123), (torch.bfloat16, "fp8_e4m3fn"): (-117, 119),
    (torch.bfloat16, "fp8_e5m2"): (-110, 112), (torch.float16, "fp4_e2m1"): (-13, 13),
    (torch.float16, "fp6_e2m3"): (-11, 13), (torch.float16, "fp6_e3m2"): (-10, 11),
    (torch.float16, "fp8_e4m3fn"): (-5, 7), (torch.float16, "fp8_e5m2"): (0, 0),
}  # fmt: skip


def is_expandable(packed: Packed, dtype: torch.dtype) -> bool:
    """True unless powers of two reach beyond the 16-bit dtype, which headers cannot show and a folded scale avoids."""
    level = packed.scheme.scales[0] if packed.scheme.scales else None
    if level is None or level.format != "e8m0" or packed.form.scaling != "group":
        return True
    low, high = _EXACT_RANGE.get((dtype, packed.scheme.element), (-110, 110))
    return low <= packed.lowest and packed.highest <= high
