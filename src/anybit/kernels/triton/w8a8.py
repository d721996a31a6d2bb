"""Products of 8 bit codes: the layouts "int8-rows" and "fp8-rows", and the operator that runs them.

A weight is its codes, one a byte, [N, K] with K padded to 16 by code 0, and a float32 factor for each row or block, all
scale levels combined in the order of the scheme. A call quantizes x and multiplies; what it multiplies with (our Triton
kernel, or torch's own) is the plan's choice, by name. Device code: `w8a8_jit.py`, on sm_90 `w8a8_hopper_jit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final, cast

import torch
from torch import Tensor

from anybit.errors import Damaged, Inconsistent
from anybit.kernels.compiling import OVERLAPPING, overlap
from anybit.kernels.linear.tiled_torch import as_bits
from anybit.kernels.linear.torch_low_precision import INT_MM, SCALED_MM
from anybit.kernels.linear.triton_rows8 import OneConfig, configure_one, constants_of_one
from anybit.kernels.linear.triton_w8a8 import FP8, FP8_EXACT, INT8
from anybit.kernels.linear.triton_w8a8_hopper import (
    BLOCK,
    LAYOUT,
    VERSIONS,
    HopperConfig,
    configure_hopper,
    constants_of_hopper,
)
from anybit.kernels.linear.triton_w8a8_tiles import (
    PAD,
    Config,
    Operands,
    Product8,
    configure,
    constants_of,
    operands,
    product_of,
)
from anybit.kernels.request import Kernels, Regime
from anybit.kernels.triton import w8a8_jit as jit
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.launching import ALIGNED, Argument, Call, Described, Launch, Piece, Zeros, described, launch
from anybit.kernels.triton.opaque import Launched, Run
from anybit.kernels.triton.quantizers import Quantized, Quantizer
from anybit.kernels.triton.recipes import ARITHMETIC
from anybit.kernels.triton.straight import version
from anybit.numerics.codec import decode
from anybit.platforms.archs import ARCHS
from anybit.schemes import CHANNEL, ScaleLevel, Scheme
from anybit.weights import Dense, QuantizedWeight, Weight

__all__ = ["Rows8", "StoredRows8", "epilogue"]

_ONE: Final = {"int8": 1, "fp8_e4m3fn": 0x38, "fp8_e4m3fnuz": 0x40, "fp8_e5m2": 0x3C}  # the code of 1.0
_VIEW: Final = {
    "int8": torch.int8, "fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2": torch.float8_e5m2,
}
_EPILOGUE_COLUMNS: Final = 1024
_STATIC: Final = ("scale", "zero_point", "lower_bound")
_ROWS_A_TIME: Final = 2**24  # weights looked at together while preparing: bounds the temporaries
_LEADING_ROWS: Final = 64  # up to so many the product is launched while they are quantized, not only at the end


class StoredRows8(Launched):
    """A weight of 8 bit codes with what its product needs."""

    quantizes_input = True

    def __init__(self, weight: QuantizedWeight, kernels: Mapping[Regime, str], *, pinned: bool = False) -> None:
        """`weight` [N, K] of a scheme that `product_of` knows; `pinned` gives every M the same tiles."""
        super().__init__()
        product = product_of(weight.scheme)
        assert product is not None and len(weight.shape) == 2
        self.shape = weight.shape
        self._product, self._kernels, self._pinned = product, Kernels.of(kernels), pinned
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
        self._captured: list[Tensor] = []  # zeros that graphs count in
        self._is_flavoured = False
        self._dtypes = {name: t.dtype for name, t in self._parts().items()}
        self._adopt()

    # --- what a stack of such weights is made of (experts_rows8.py) ---

    @property
    def product(self) -> Product8:
        """What is multiplied."""
        return self._product

    @property
    def kernels(self) -> Kernels:
        """The plan's choice."""
        return self._kernels

    @property
    def codes(self) -> Tensor:
        """[N, K padded], one a byte."""
        return self._codes

    @property
    def factor(self) -> Tensor:
        """float32 [N], or one a block."""
        return self._factor

    @property
    def sums(self) -> Tensor | None:
        """Of each row's codes, where x has zero points."""
        return self._sums

    @property
    def zeros(self) -> Tensor | None:
        """Zero points of rows, int32 [N]."""
        return self._zeros

    @property
    def static(self) -> Mapping[str, Tensor]:
        """Static numbers of the quantization of x."""
        return self._static

    @property
    def is_pinned(self) -> bool:
        """True where a row's result must not depend on the other rows."""
        return self._pinned

    @property
    def arch(self) -> str:
        """Where it runs."""
        return _arch_or_generic(self._codes.device)

    def operands(self, *, exact: bool = False) -> Operands:
        """What the matrix unit is given here."""
        given = operands(self._product, self.arch, exact=exact)
        assert given is not None
        return given

    def view(self, given: Operands) -> torch.dtype:
        """The dtype that the kernel takes codes of W in."""
        return torch.uint8 if given.kind == "float16" else _VIEW[given.kind]

    def _parts(self) -> dict[str, Tensor]:
        parts = {"codes": self._codes, "factor": self._factor}
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
        self._codes, self._factor = real["codes"], real["factor"]
        self._sums, self._zeros = real.get("sums"), real.get("zeros")
        self._weight = replace(self._weight, scales=tuple(real[f"scale_{i}"] for i in range(len(self._weight.scales))))
        self._static = {name: real[f"static_{name}"] for name in self._static}
        self._adopt()

    def _adopt(self) -> None:
        """Codes in the flavour of 8 bit float that the device multiplies: once, in place, where that is fnuz.

        Codes of x will be halved as well, so the factor takes both powers of two. Converted codes keep their bits but
        for -0: read as e4m3fn they mean what they meant.
        """
        self._calls = {}
        self._quantizers: dict[str, Quantizer] = {}
        given = operands(self._product, arch_of(self._codes.device))
        if given is None or self._is_flavoured:
            return
        is_fn = self._product.element == "fp8_e4m3fn"
        if given.kind == "float16" or FP8_EXACT.name in self._kernels.used or (
                given.kind == "fp8_e4m3fnuz" and is_fn):
            _demand_numbers_only(self._codes, self._product.element)
        if given.kind == "fp8_e4m3fnuz":
            if is_fn:
                self._codes.masked_fill_(self._codes == 0x80, 0)
            self._factor.mul_(4.0 if is_fn else 2.0)
            self._is_flavoured = True

    def _prepared(self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Run:
        """How calls like this one are carried out: Q(x) times W^T, plus bias in float32."""
        if 0 in (*x.shape, self.shape[0]):
            return partial(_nothing, rows=self.shape[0], out_dtype=out_dtype)
        kernel = self._kernels.at(x.shape[0])
        if kernel == SCALED_MM.name and (bias is not None or out_dtype != torch.bfloat16):
            kernel = FP8.name  # torch would round to bfloat16 before the bias
        given = operands(self._product, _arch_or_generic(x.device), exact=kernel == FP8_EXACT.name)
        assert given is not None
        if kernel in (SCALED_MM.name, INT_MM.name):
            return partial(self._by_torch, kernel=kernel, given=given, out_dtype=out_dtype)
        return self._by_us(x, kernel, given, bias, out_dtype)

    def quantizer(self, given: Operands) -> Quantizer:
        """What makes the operand of a kind of x."""
        found = self._quantizers.get(given.kind)
        if found is None:
            found = self._quantizers[given.kind] = Quantizer(
                self._product.activation, self._static, self._codes.shape[1], fnuz=given.kind == "fp8_e4m3fnuz",
                values=torch.float16 if given.kind == "float16" else None, sums=self._product.w_shifted,
            )
        return found

    def _by_torch(
        self, x: Tensor, bias: Tensor | None, *, kernel: str, given: Operands, out_dtype: torch.dtype
    ) -> Tensor:
        from anybit.kernels.linear import torch_low_precision_run as provider

        out = torch.empty((x.shape[0], self.shape[0]), dtype=out_dtype, device=x.device)
        xq = self.quantizer(given)(x)
        return provider.PRODUCTS[kernel](xq, self._codes, self._factor, self._sums, self._zeros, bias, out, given)

    def _by_us(self, x: Tensor, kernel: str, given: Operands, bias: Tensor | None, out_dtype: torch.dtype) -> Call:
        """The launches of our kernel for calls like this one."""
        product, codes, factor = self._product, self._codes, self._factor
        (m, n), k, device, arch = (x.shape[0], self.shape[0]), codes.shape[1], x.device, _arch_or_generic(x.device)
        tuned_for = None if self._pinned else m
        if arch == "sm_90" and version() in VERSIONS:
            one = configure_one(n, k, tuned_for, product, given)
            if one is not None:
                return self._by_one(x, one, given, bias, out_dtype)
            roles = configure_hopper(n, k, tuned_for, product, given)
            if roles is not None:
                return self._by_roles(x, roles, given, bias, out_dtype)
        config = configure(n, k, tuned_for, arch, product, given)
        # a few rows: the product is launched while they are quantized
        leads = kernel in (FP8.name, INT8.name) and m <= _LEADING_ROWS and arch in OVERLAPPING
        quantize = self.quantizer(given).plan(x, leads=leads)
        pieces, size = quantize.pieces, quantize.scratch_bytes
        is_split = config.split > 1
        fused = is_split and ARCHS[arch].vendor == "nvidia"
        tiles = -(-m // config.bm) * -(-n // config.bn)
        parts: Argument = factor  # what a specialization does not read is given the place of the factors
        if is_split:
            parts, size = self._room(size, config.split * m * n)
        shifted, offsets = self._offsets(pieces)
        x_codes, w_codes = self._operands(pieces["codes"], m, config, given)
        constants = constants_of(product, given, config, k, shifted=shifted, has_bias=bias is not None, fused=fused)
        bias_dtype: Argument = factor if bias is None else bias.dtype
        made = Launch(
            jit.w8a8_matmul,
            [x_codes, w_codes, pieces["scale"], factor, *offsets, bias_dtype, out_dtype, parts,
             Zeros(tiles, self._captured) if fused else factor, int, n, k,
             factor.shape[1] if product.w_group else 1, 1.0],
            constants, device, num_warps=config.warps, num_stages=config.stages,
            **overlap(config.waits),
        )  # fmt: skip
        finish = None
        if is_split and not fused:
            finish = Launch(
                jit.w8a8_epilogue, [parts, pieces["scale"], factor, *offsets, bias_dtype, out_dtype, int, n],
                _ending(config.split, product, shifted, self._zeros is not None, bias is not None), device, num_warps=4,
            )  # fmt: skip
        return Call((m, n), out_dtype, device, m, size, quantize, made, (tiles, config.split), finish,
                    (m, -(-n // _EPILOGUE_COLUMNS)))

    def _by_one(
        self, x: Tensor, config: OneConfig, given: Operands, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Call:
        """The launches of the kernel of one token."""
        from anybit.kernels.triton.rows8_one_jit import rows8_one

        product, factor = self._product, self._factor
        (m, n), k = (x.shape[0], self.shape[0]), self._codes.shape[1]
        quantize = self.quantizer(given).plan(x, leads=True, follows=True)
        pieces = quantize.pieces
        shifted, offsets = self._offsets(pieces)
        made = Launch(
            rows8_one,
            [Piece(pieces["codes"].offset, torch.int32), self._codes.view(torch.int32), pieces["scale"], factor,
             *offsets, factor if bias is None else bias.dtype, out_dtype, n, k,
             factor.shape[1] if product.w_group else 1],
            constants_of_one(product, given, config, k, shifted=shifted, has_bias=bias is not None), x.device,
            num_warps=config.warps, **overlap(True),
        )  # fmt: skip
        return Call((m, n), out_dtype, x.device, m, quantize.scratch_bytes, quantize, made, (config.grid(n), 1))

    def _by_roles(
        self, x: Tensor, config: HopperConfig, given: Operands, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Call:
        """The launches of the kernel whose warps have different work."""
        from triton.experimental.gluon.language import NVMMASharedLayout

        from anybit.kernels.triton.w8a8_hopper_jit import w8a8_hopper

        product, factor, view = self._product, self._factor, _VIEW[given.kind]
        (m, n), k = (x.shape[0], self.shape[0]), self._codes.shape[1]
        quantize = self.quantizer(given).plan(x, leads=config.waits and m <= _LEADING_ROWS, follows=config.waits)
        pieces, size = quantize.pieces, quantize.scratch_bytes
        parts, counters = cast("tuple[Argument, Argument]", (factor, factor))
        if config.share:
            parts, size = self._room(size, config.parts)
            counters = Zeros(config.tiles(m, n) * config.teams, self._captured)
        shifted, offsets = self._offsets(pieces)
        layout = NVMMASharedLayout(*LAYOUT)
        made = Launch(
            w8a8_hopper,
            [Described(Piece(pieces["codes"].offset, view), (m, k), (config.bm // config.teams, BLOCK), layout),
             described(self._codes.view(view), (config.bn, BLOCK), layout), pieces["scale"], factor, *offsets,
             factor if bias is None else bias.dtype, out_dtype, parts, counters, int, n, k,
             factor.shape[1] if product.w_group else 1, config.share],
            constants_of_hopper(product, config, shifted=shifted, has_bias=bias is not None), x.device, num_warps=4,
            **overlap(config.waits),
        )  # fmt: skip
        return Call((m, n), out_dtype, x.device, m, size, quantize, made, (config.grid(m, n), 1))

    def _room(self, size: int, count: int) -> tuple[Piece, int]:
        """Room for so many partial sums at the end of a scratch of `size` bytes, and its new size."""
        in_blocks = self._product.x_group or self._product.w_group
        kept = torch.int32 if self._product.is_integer and not in_blocks else torch.float32
        return Piece(size, kept), size + -(-count * kept.itemsize // ALIGNED) * ALIGNED

    def _offsets(self, pieces: Mapping[str, Piece]) -> tuple[bool, list[Argument]]:
        """Are codes of x shifted; zero points of x, sums of W's codes, sums of x's codes, zero points of W."""
        factor = self._factor
        shifted = self._sums is not None and "zero_point" in pieces
        return shifted, [
            pieces["zero_point"] if shifted else factor,
            self._sums if shifted and self._sums is not None else factor,
            pieces.get("sums", factor),
            factor if self._zeros is None else self._zeros,
        ]

    def _operands(self, x: Piece, m: int, config: Config, given: Operands) -> tuple[Argument, Argument]:
        """Codes of x and of W as the kernel takes them."""
        k = self._codes.shape[1]
        view = self.view(given)
        x = x if given.kind == "float16" else Piece(x.offset, view)
        if not config.tma:
            return x, self._codes.view(view)
        from triton.tools.tensor_descriptor import TensorDescriptor

        w = TensorDescriptor.from_tensor(self._codes.view(view), [config.bn, config.bk])
        return Described(x, (m, k), (config.bm, config.bk)), w

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


# --- calls ------------------------------------------------------------------------------------------------------------


def _nothing(x: Tensor, bias: Tensor | None, *, rows: int, out_dtype: torch.dtype) -> Tensor:
    """The product where a dimension is 0."""
    out = torch.zeros((x.shape[0], rows), dtype=out_dtype, device=x.device)
    return out if bias is None else out.copy_(bias.expand_as(out))


def _arch_or_generic(device: torch.device) -> str:
    """The device's architecture; the interpreter on a CPU counts as one with plain matrix units."""
    arch = arch_of(device)
    return "sm_80" if arch == "cpu" else arch


def _ending(count: int, product: Product8 | None, shifted: bool, w_shifted: bool, has_bias: bool) -> dict[str, object]:
    """Compile-time arguments of `w8a8_epilogue`."""
    return {
        "PARTS": count, "IS_SHIFTED": shifted, "W_SHIFTED": w_shifted,
        "X_IN_BLOCKS": bool(product and product.x_group), "W_IN_BLOCKS": bool(product and product.w_group),
        "HAS_BIAS": has_bias, "BN": _EPILOGUE_COLUMNS,
    }


def epilogue(
    parts: Tensor, xq: Quantized, factor: Tensor, sums: Tensor | None, zeros: Tensor | None, bias: Tensor | None,
    out: Tensor,
) -> None:
    """out [M, N] from sums of codes [M, N], in true scales by row and with bias."""
    m, n = out.shape
    scale = xq.scale
    assert scale is not None and (sums is None or xq.zero_point is not None)
    launch(
        jit.w8a8_epilogue, (m, -(-n // _EPILOGUE_COLUMNS)),
        [parts, scale, factor, scale if sums is None else xq.zero_point, factor if sums is None else sums,
         scale if xq.sums is None else xq.sums, factor if zeros is None else zeros, out if bias is None else bias, out,
         m, n],
        out.device, **_ending(1, None, sums is not None, zeros is not None, bias is not None), num_warps=4,
    )  # fmt: skip
