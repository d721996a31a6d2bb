"""Products of 8 bit codes: the layouts "int8-rows" and "fp8-rows", and the operator that runs them.

A weight is its codes, one a byte, [N, K] with K padded to 16 by code 0, and a float32 factor for each row or block, all
scale levels combined in the order of the scheme. One operator, `anybit::w8a8`, quantizes x and multiplies; what it
multiplies with (this file's Triton kernel, or torch's own) is the plan's choice, by name. Device code: `w8a8_jit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Final, cast

import torch
from torch import Tensor

from anybit.errors import Damaged, Inconsistent
from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.linear.torch_low_precision import INT_MM, SCALED_MM
from anybit.kernels.linear.triton_w8a8 import FP8, FP8_EXACT, INT8
from anybit.kernels.linear.triton_w8a8_tiles import (
    PAD,
    Operands,
    Product8,
    configure,
    constants_of,
    operands,
    product_of,
)
from anybit.kernels.request import Regime
from anybit.kernels.triton import w8a8_jit as jit
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.quantizers import Quantized, quantize
from anybit.kernels.triton.recipes import ARITHMETIC
from anybit.numerics.codec import decode
from anybit.platforms.archs import ARCHS
from anybit.schemes import CHANNEL, ActivationSpec, ScaleLevel, Scheme
from anybit.weights import Dense, QuantizedWeight, Weight

__all__ = ["Rows8", "StoredRows8", "multiply"]

TILE_COUNTERS: Final = 1024  # of the split products, which have few tiles
_ONE: Final = {"int8": 1, "fp8_e4m3fn": 0x38, "fp8_e4m3fnuz": 0x40, "fp8_e5m2": 0x3C}  # the code of 1.0
_VIEW: Final = {
    "int8": torch.int8, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2": torch.float8_e5m2,
}
_EPILOGUE_COLUMNS: Final = 1024
_STATIC: Final = ("scale", "zero_point", "lower_bound")
_ROWS_A_TIME: Final = 2**24  # weights looked at together while preparing: bounds the temporaries


class StoredRows8:
    """A weight of 8 bit codes with what its product needs."""

    quantizes_input = True

    def __init__(self, weight: QuantizedWeight, kernels: Mapping[Regime, str], *, pinned: bool = False) -> None:
        """`weight` [N, K] of a scheme that `product_of` knows; `pinned` gives every M the same tiles."""
        product = product_of(weight.scheme)
        assert product is not None and len(weight.shape) == 2
        self.shape = weight.shape
        self._product, self._kernels, self._pinned = product, dict(kernels), pinned
        self._weight = replace(weight, stored_codes=torch.empty(0), bias=None, pre_scale=None, activation={})
        self._static = {name: t for name, t in weight.activation.items() if name in _STATIC}
        _demand_numbers(self._static)
        codes = _padded(_signed(weight.codes) if product.is_integer else weight.codes)
        self._codes = codes if product.is_integer else codes.view(torch.uint8)
        self._factor = _factors(self._weight, product)
        self._zeros = _zero_points(weight) if product.w_shifted else None
        self._sums = _code_sums(self._codes, self._factor, product) if _is_shifted(product, self._static) else None
        if self._sums is not None and self._zeros is not None:
            self._sums -= self._zeros * self.shape[1]
        self._counters = torch.zeros(TILE_COUNTERS, dtype=torch.int32, device=codes.device)
        self._is_flavoured = False
        self._dtypes = {name: t.dtype for name, t in self._parts().items()}
        self._problem = _as_text(product, self.shape[1])
        self._adopt()

    def _parts(self) -> dict[str, Tensor]:
        parts = {"codes": self._codes, "factor": self._factor, "counters": self._counters}
        parts |= {f"scale_{i}": t for i, t in enumerate(self._weight.scales)}
        parts |= {f"static_{name}": t for name, t in self._static.items()}
        if self._sums is not None:
            parts["sums"] = self._sums
        if self._zeros is not None:
            parts["zeros"] = self._zeros
        return parts

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, floats as bit patterns."""
        return {name: as_bits(t) for name, t in self._parts().items()}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Take the (moved) buffers."""
        real = {name: tensors[name].view(dtype) for name, dtype in self._dtypes.items()}
        self._codes, self._factor, self._counters = real["codes"], real["factor"], real["counters"]
        self._sums, self._zeros = real.get("sums"), real.get("zeros")
        self._weight = replace(self._weight, scales=tuple(real[f"scale_{i}"] for i in range(len(self._weight.scales))))
        self._static = {name: real[f"static_{name}"] for name in self._static}
        self._adopt()

    def _adopt(self) -> None:
        """Codes in the flavour of 8 bit float that the device multiplies: once, in place, where that is fnuz.

        Codes of x will be halved as well, so the factor takes both powers of two. Converted codes keep their bits but
        for -0: read as e4m3fn they mean what they meant.
        """
        given = operands(self._product, arch_of(self._codes.device))
        if given is None or self._is_flavoured:
            return
        is_fn = self._product.element == "fp8_e4m3fn"
        if given.kind == "float16" or FP8_EXACT.name in self._kernels.values() or (
                given.kind == "fp8_e4m3fnuz" and is_fn):
            _demand_numbers_only(self._codes, self._product.element)
        if given.kind == "fp8_e4m3fnuz":
            if is_fn:
                self._codes.masked_fill_(self._codes == 0x80, 0)
            self._factor.mul_(4.0 if is_fn else 2.0)
            self._is_flavoured = True

    def linear(self, x: Tensor, regime: Regime, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Q(x) [M, K] times W^T, plus bias in float32: [M, N] in `out_dtype`."""
        static = self._static
        # outside a compiler the dispatcher would only cost time
        run = torch.ops.anybit.w8a8.default if torch.compiler.is_compiling() else multiply
        return cast("Tensor", run(
            x, self._codes, self._factor, self._sums, self._zeros, self._counters,
            static.get("scale"), static.get("zero_point"), static.get("lower_bound"), bias, self._problem,
            self._kernels[regime], self._pinned, out_dtype,
        ))

    def operand_kind(self) -> str | None:
        """What the device multiplies in a decode step, a number format; None where it has no such product."""
        exact = self._kernels["decode"] == FP8_EXACT.name
        given = operands(self._product, _arch_or_generic(self._codes.device), exact=exact)
        return None if given is None else given.kind

    def linear_of_codes(self, xq: Quantized, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """Few rows that another kernel quantized, as `operand_kind` says, times W^T plus bias: [M, N]."""
        return _multiply_codes(xq, self._codes, self._factor, self._sums, self._zeros, self._counters, bias,
                               self._product, self._kernels["decode"], self._pinned, out_dtype)

    def _canonical(self) -> QuantizedWeight:
        codes, offset = self._codes[:, : self.shape[1]], None
        if self._zeros is not None:
            offset = self._zeros[:, None].to(torch.int8)
        if self._weight.scheme.element == "uint8":
            codes, offset = _unsigned(codes), None if offset is None else _unsigned(offset)
        scheme = self._weight.scheme
        if offset is not None and scheme.offset is not None:
            scheme = replace(scheme, offset=replace(scheme.offset, block=CHANNEL))
        return replace(self._weight, scheme=scheme, stored_codes=codes, offset=offset)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded rows [.., K] for integer `index` [..]."""
        found = self._canonical().take_rows(index.reshape(-1)).dequantize()
        return found.to(dtype).reshape(*index.shape, self.shape[1])

    def dequantize(self) -> Tensor:
        """The float32 weight."""
        return self._canonical().dequantize()


class Rows8:
    """Implementation of the 8 bit by 8 bit products."""

    def prepare(
        self, weight: Weight, dtype: torch.dtype, kernels: Mapping[Regime, str], *, pinned: bool = False
    ) -> StoredRows8:
        """Codes one a byte, K padded to 16; `dtype` plays no part."""
        if isinstance(weight, Dense):
            raise TypeError("a Dense weight belongs to torch-dense")
        return StoredRows8(weight, kernels, pinned=pinned)


# --- preparing --------------------------------------------------------------------------------------------------------


def _signed(codes: Tensor) -> Tensor:
    """Codes or zero points as int8; unsigned ones less 128."""
    return codes if codes.dtype == torch.int8 else (codes ^ 0x80).view(torch.int8)


def _unsigned(codes: Tensor) -> Tensor:
    """Inverse of `_signed` for unsigned ones."""
    return codes.contiguous().view(torch.uint8) ^ 0x80


def _zero_points(weight: QuantizedWeight) -> Tensor:
    """The zero point of each row as its int8 code: int32 [N]."""
    assert weight.offset is not None and weight.scheme.offset is not None
    values = _signed(weight.offset).to(torch.int32)[..., 0]
    down = weight.scheme.offset.block[0]
    spread = values.repeat_interleave(down) if down > 1 else values.expand(weight.shape[0])
    return spread[: weight.shape[0]].contiguous()


def _padded(codes: Tensor) -> Tensor:
    """Codes [N, K] with K a multiple of 16, the rest code 0."""
    n, k = codes.shape
    columns = -(-k // PAD) * PAD
    if columns == k:
        return codes.contiguous()
    wide = torch.zeros((n, columns), dtype=codes.dtype, device=codes.device)
    wide[:, :k] = codes
    return wide


def _factors(weight: QuantizedWeight, product: Product8) -> Tensor:
    """Scales combined in the scheme's order: float32 [N], or [row blocks, column blocks].

    The reference weight of codes that all are 1.0, one for each block.
    """
    n, k = weight.shape
    rows = n if not product.w_group else -(-n // product.w_rows)
    columns = 1 if not product.w_group else -(-k // product.w_group)

    def level(found: ScaleLevel) -> ScaleLevel:
        down, across = found.block
        down = down // product.w_rows if product.w_group else down
        return replace(found, block=(down, across // product.w_group if product.w_group else 0))

    scheme = Scheme(weight.scheme.element, tuple(level(s) for s in weight.scheme.scales), weight.scheme.order)
    kind = torch.int8 if product.is_integer else torch.uint8
    scheme = replace(scheme, element=product.element)
    ones = torch.full((rows, columns), _ONE[product.element], dtype=kind, device=weight.scales[0].device
                      if weight.scales else None)
    factors = replace(weight, scheme=scheme, shape=(rows, columns), stored_codes=ones, offset=None).dequantize()
    return (factors if product.w_group else factors[:, 0]).contiguous()


def _rows_at_a_time(codes: Tensor) -> int:
    return max(1, _ROWS_A_TIME // max(codes.shape[1], 1))


def _code_sums(codes: Tensor, factors: Tensor, product: Product8) -> Tensor:
    """Sums of each row's codes: int32 [N]; where scales change along K float32 [N], scaled, summed in float64."""
    sums = []
    for start in range(0, max(len(codes), 1), _rows_at_a_time(codes)):
        part = codes[start : start + _rows_at_a_time(codes)]
        if not product.w_group:
            sums.append(part.sum(1, dtype=torch.int32))
            continue
        columns = factors.shape[1] * product.w_group
        wide = torch.nn.functional.pad(part.double(), (0, max(0, columns - part.shape[1])))[:, :columns]
        by_block = wide.reshape(len(part), -1, product.w_group).sum(2)
        row = torch.arange(start, start + len(part), device=codes.device) // product.w_rows
        sums.append((by_block * factors[row].double()).sum(1).float())
    return torch.cat(sums)


def _is_shifted(product: Product8, static: Mapping[str, Tensor]) -> bool:
    """True where codes of x carry a zero point."""
    arithmetic = ARITHMETIC[product.activation.recipe]
    return arithmetic.is_shifted or (arithmetic.optional == "zero_point" and "zero_point" in static)


def _demand_numbers(static: Mapping[str, Tensor]) -> None:
    """Static activation tensors are one number for a layer."""
    for name, tensor in static.items():
        if tensor.numel() != 1:
            raise Inconsistent("a static activation scale of several numbers", found=f"{name} {list(tensor.shape)}",
                               wanted="one number for the layer", remedy="--kernel torch-tiled runs it")


def _demand_numbers_only(codes: Tensor, element: str) -> None:
    """Refuse NaN and infinity in a weight where the decoded form has no place for them."""
    for start in range(0, len(codes), _rows_at_a_time(codes)):
        part = codes[start : start + _rows_at_a_time(codes)]
        if not bool(decode(element, part).isfinite().all()):
            raise Damaged("NaN in an fp8 weight", found=f"codes that are no number, of {element}",
                          wanted="finite codes", remedy="download the file again")


# --- the operator -----------------------------------------------------------------------------------------------------


def _as_text(product: Product8, k: int) -> str:
    """A product in one word, so that a compiled graph holds everything that a launch depends on."""
    a = product.activation
    words = (product.element, product.w_rows, product.w_group, k, a.element, int(a.dynamic), a.granularity, a.recipe,
             a.group_size, int(a.symmetric), "" if a.bound is None else repr(a.bound), int(product.w_shifted))
    return "|".join(str(word) for word in words)


@cache
def _from_text(text: str) -> tuple[Product8, int]:
    element, rows, group, k, a_element, dynamic, granularity, recipe, size, symmetric, bound, shifted = \
        text.split("|")
    activation = ActivationSpec(a_element, dynamic == "1", granularity, recipe, int(size),  # type: ignore[arg-type]
                                symmetric == "1", float(bound) if bound else None)
    return Product8(element, activation, int(rows), int(group), shifted == "1"), int(k)


def multiply(
    x: Tensor, codes: Tensor, factor: Tensor, sums: Tensor | None, zeros: Tensor | None, counters: Tensor,
    scale: Tensor | None, zero_point: Tensor | None, lower_bound: Tensor | None, bias: Tensor | None, problem: str,
    kernel: str, pinned: bool, out_dtype: torch.dtype,
) -> Tensor:
    """Q(x) [M, K] times W^T plus bias: [M, N]; codes, factor, sums and zeros as StoredRows8 keeps them."""
    product, k = _from_text(problem)
    n = codes.shape[0]
    if x.shape[0] * n == 0 or k == 0:
        out = torch.empty((x.shape[0], n), dtype=out_dtype, device=x.device)
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    given = operands(product, _arch_or_generic(x.device), exact=kernel == FP8_EXACT.name)
    assert given is not None
    static = {name: t for name, t in (("scale", scale), ("zero_point", zero_point), ("lower_bound", lower_bound))
              if t is not None}
    # a few rows: the product is launched while they are quantized
    leads = kernel in (FP8.name, INT8.name) and x.shape[0] <= 64 and _arch_or_generic(x.device) == "sm_90"
    xq = quantize(x, product.activation, static, columns=codes.shape[1], fnuz=given.kind == "fp8_e4m3fnuz",
                  values=torch.float16 if given.kind == "float16" else None, sums=product.w_shifted, leads=leads)
    return _multiply_codes(xq, codes, factor, sums, zeros, counters, bias, product, kernel, pinned, out_dtype)


def _multiply_codes(
    xq: Quantized, codes: Tensor, factor: Tensor, sums: Tensor | None, zeros: Tensor | None, counters: Tensor,
    bias: Tensor | None, product: Product8, kernel: str, pinned: bool, out_dtype: torch.dtype,
) -> Tensor:
    """Codes of x times W^T plus bias, by the kernel of that name."""
    out = torch.empty((xq.codes.shape[0], codes.shape[0]), dtype=out_dtype, device=codes.device)
    given = operands(product, _arch_or_generic(codes.device), exact=kernel == FP8_EXACT.name)
    assert given is not None
    if kernel == SCALED_MM.name and (bias is not None or out_dtype != torch.bfloat16):
        kernel = FP8.name  # torch would round to bfloat16 before the bias
    if kernel in (SCALED_MM.name, INT_MM.name):
        from anybit.kernels.linear import torch_low_precision_run as provider

        return provider.PRODUCTS[kernel](xq, codes, factor, sums, zeros, bias, out, given)
    _launch(product, given, xq, codes, factor, sums, zeros, counters, bias, out, pinned)
    return out


def _arch_or_generic(device: torch.device) -> str:
    """The device's architecture; the interpreter on a CPU counts as one with plain matrix units."""
    arch = arch_of(device)
    return "sm_80" if arch == "cpu" else arch


def _launch(
    product: Product8, given: Operands, xq: Quantized, codes: Tensor, factor: Tensor, sums: Tensor | None,
    zeros: Tensor | None, counters: Tensor, bias: Tensor | None, out: Tensor, pinned: bool,
) -> None:
    (m, n), k = out.shape, codes.shape[1]
    arch = _arch_or_generic(out.device)
    config = configure(n, k, None if pinned else m, arch, product, given)
    tiles = -(-m // config.bm) * -(-n // config.bn)
    fused = ARCHS[arch].vendor == "nvidia" and tiles <= counters.numel()
    by_row = not (product.x_group or product.w_group)
    parts = out
    if config.split > 1:
        kept = torch.int32 if product.is_integer and by_row else torch.float32
        parts = torch.empty((config.split, m, n), dtype=kept, device=out.device)
    shifted = sums is not None and xq.zero_point is not None
    cs = sums if sums is not None else factor
    zx = xq.zero_point if xq.zero_point is not None else xq.scale
    view = torch.uint8 if given.kind == "float16" else _VIEW[given.kind]
    x, w = xq.codes if given.kind == "float16" else xq.codes.view(view), codes.view(view)
    if config.tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        x = TensorDescriptor.from_tensor(x, [config.bm, config.bk])
        w = TensorDescriptor.from_tensor(w, [config.bn, config.bk])
    groups = factor.shape[1] if product.w_group else 1
    constants = constants_of(product, given, config, k, shifted=shifted, has_bias=bias is not None, fused=fused)
    jit.w8a8_matmul[(tiles, config.split)](
        x, w, xq.scale, factor, zx, cs, xq.scale if xq.sums is None else xq.sums, factor if zeros is None else zeros,
        out if bias is None else bias, out, parts, counters, m, n, k, groups, 1.0, **constants,
        num_warps=config.warps, num_stages=config.stages, **({"launch_pdl": True} if config.waits else {}),
    )
    if config.split > 1 and not fused:
        epilogue(parts, config.split, product, xq, factor, sums if shifted else None, zeros, bias, out)


def epilogue(
    parts: Tensor, count: int, product: Product8 | None, xq: Quantized, factor: Tensor, sums: Tensor | None,
    zeros: Tensor | None, bias: Tensor | None, out: Tensor,
) -> None:
    """out [M, N] from partial sums [count, M, N], in true scales and with bias; no product: scales by row."""
    m, n = out.shape
    jit.w8a8_epilogue[(m, -(-n // _EPILOGUE_COLUMNS))](
        parts, xq.scale, factor, xq.scale if sums is None else xq.zero_point, factor if sums is None else sums,
        xq.scale if xq.sums is None else xq.sums, factor if zeros is None else zeros,
        out if bias is None else bias, out, m, n, PARTS=count, IS_SHIFTED=sums is not None,
        W_SHIFTED=zeros is not None,
        X_IN_BLOCKS=bool(product and product.x_group), W_IN_BLOCKS=bool(product and product.w_group),
        HAS_BIAS=bias is not None, BN=_EPILOGUE_COLUMNS, num_warps=4,
    )


_LIBRARY: Final = torch.library.Library("anybit", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "w8a8(Tensor x, Tensor codes, Tensor factor, Tensor? sums, Tensor? zeros, Tensor counters, Tensor? scale, "
    "Tensor? zero_point, Tensor? lower_bound, Tensor? bias, str problem, str kernel, bool pinned, "
    "ScalarType out_dtype) -> Tensor"
)
_LIBRARY.impl("w8a8", multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


def _shape_only(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]), dtype=cast("torch.dtype", rest[-1]))


torch.library.register_fake("anybit::w8a8", _shape_only, lib=_LIBRARY)
