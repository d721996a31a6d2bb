"""Tiles of the 8 bit by 8 bit products: operands and configurations by architecture, and what must compile. Torch-free.

What a launch specializes on is decided here, purely; `triton_w8a8.py` says what is claimed, at what price. The compiled
cases are the very configurations that `configure` gives to a launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from anybit.kernels.compiling import CompileCase, overlap
from anybit.kernels.linear.quantizer_cases import quantizer_cases
from anybit.kernels.linear.triton_endings import epilogue_case
from anybit.kernels.linear.triton_experts import experts8_case
from anybit.kernels.triton.recipes import ARITHMETIC
from anybit.platforms.archs import ARCHS
from anybit.schemes import ActivationSpec, Scheme

__all__ = [
    "CASES", "FP8_EXACT_NAME", "FP8_NAME", "INT8_NAME", "PAD", "UNITS", "Config", "Operands", "Product8",
    "column_block", "compile_cases", "configure", "constants_of", "expected_instruction", "has_zero_points",
    "is_shifted", "of_experts", "operands", "product_of",
]

INT8_NAME: Final = "triton-w8a8-int8"
FP8_NAME: Final = "triton-w8a8-fp8"
FP8_EXACT_NAME: Final = "triton-w8a8-fp8-exact"
PAD: Final = 16  # of K: vector loads, tensor memory access and torch's kernels want rows of whole 16 bytes
# multiprocessors (compute units, work-group processors) of the usual chip of each architecture: how far K is split
UNITS: Final[Mapping[str, int]] = {
    "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_103": 148, "sm_120": 170, "sm_121": 48,
    "gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 48, "gfx1151": 20, "gfx1200": 16, "gfx1201": 32,
}
BANDWIDTH: Final = 4.2e12  # at which an H200 reads weights
_BLOCK, _ADDING = 0.2e-6, 2e-6  # see _pays
_PINNED_M: Final = 64  # rows for which tiles are chosen where every M must give the same bits


@dataclass(frozen=True)
class Product8:
    """What a product is, whatever its size: everything that a launch specializes on.

    element        number format of W's codes
    activation     how x is quantized
    w_rows, w_group    block of W's scale, group 0 = one scale a row
    w_shifted      W's rows have zero points
    """

    element: str
    activation: ActivationSpec
    w_rows: int = 1
    w_group: int = 0
    w_shifted: bool = False

    @property
    def x_group(self) -> int:
        """Columns of x that share a scale; 0 = the row."""
        return self.activation.group_size if self.activation.granularity == "group" else 0

    @property
    def is_integer(self) -> bool:
        """True for int8 codes."""
        return self.element == "int8"


@dataclass(frozen=True)
class Operands:
    """What the matrix unit is given.

    kind      "int8"; an 8 bit float by name (native); "float16": values decoded from codes, exact
    promote   its adder is narrower than float32, so partial sums leave it every block
    """

    kind: str
    promote: bool = False


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch options of one call.

    split   programs that share K
    swap, tma, band   as in w8a8_matmul
    waits   launched while x is quantized, and waits for that itself
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    split: int = 1
    swap: bool = False
    tma: bool = False
    band: int = 8
    waits: bool = False


@lru_cache(maxsize=1024)
def operands(product: Product8, arch: str, *, exact: bool = False) -> Operands | None:
    """The operands on an architecture: native where it has them and `exact` does not forbid its adder, else float16."""
    facts = ARCHS.get(arch)
    if facts is None:
        return None
    if product.is_integer:
        return Operands("int8") if "int8" in facts.matrix else None
    x, w = product.activation.element, product.element
    if not exact and x == w and w in facts.matrix:
        return Operands(w, promote=w in facts.accumulators)
    if not exact and x == "fp8_e4m3fn" and w in (x, "fp8_e4m3fnuz") and "fp8_e4m3fnuz" in facts.matrix:
        return Operands("fp8_e4m3fnuz")  # the same values under doubled scales (docs/formats/numerics.md §3)
    return Operands("float16") if "float16" in facts.matrix else None


def column_block(product: Product8) -> int:
    """The largest power of two of columns inside which no scale changes, at most 128; 0 where it is below 32."""
    widths = [size for size in (product.x_group, product.w_group) if size]
    block = math.gcd(128, *widths)
    return block if block >= 32 else 0


@lru_cache(maxsize=4096)
def configure(n: int, k: int, m: int | None, arch: str, product: Product8, given: Operands) -> Config:
    """Tiles for M rows by [N, K]; pure. M None: tiles for any M, the same for all, and K in one piece."""
    if m is None:
        return _with(configure(n, k, _PINNED_M, arch, product, given), split=1)
    facts = ARCHS[arch]
    is_wide = given.kind == "float16"
    bk = min(column_block(product), 64) if is_wide else column_block(product)
    in_blocks = bool(product.x_group or product.w_group)
    if arch == "sm_90" and not is_wide:
        return _hopper(n, k, m, bk, in_blocks=in_blocks, keeps_two=in_blocks or given.promote)
    if facts.vendor == "amd":
        tile = _amd_tile(m, bk, facts.wave, is_wide=is_wide)
    elif m > 64 and not is_wide:
        corrected = product.w_shifted or not product.activation.symmetric  # zero points take registers of the epilogue
        tile = _large_tile(m, bk, arch, keeps_two=in_blocks or given.promote or corrected)
    else:
        bm = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
        small = bm <= 32 or not facts.shared_bytes >= 160 * 1024
        small = small or (arch == "sm_103" and given.kind == "int8")  # no tensor memory for int8 there: registers
        tile = Config(bm, 64 if small or in_blocks else 128, bk, 4 if bm < 128 else 8, 4 if bk >= 128 else 5, swap=True)
    return _fitting(_split(tile, n, k, m, arch), facts.shared_bytes, 2 if is_wide else 1)


def of_experts(config: Config) -> Config:
    """The launch of a single weight for experts, whose addresses are known on the device only."""
    return replace(config, tma=False, waits=False)


def _amd_tile(m: int, bk: int, wave: int, *, is_wide: bool) -> Config:
    """LDS holds one stage of both tiles beside the registers of the next; waves of 32 have half the registers."""
    bm = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    if wave == 32:
        bm = min(bm, 64) if is_wide else bm
        return Config(bm, 64, bk, 8 if bm >= 64 else 4, 2)
    bn = 64 if bm <= 32 else 128
    return Config(bm, bn, bk, 8 if bm * bn >= 128 * 128 else 4, 2, band=4)


def _hopper(n: int, k: int, m: int, bk: int, *, in_blocks: bool, keeps_two: bool) -> Config:
    """As measured on an H200 (planning/priors) for 6144, 4096, 28672 and 57344 outputs.

    Few rows: narrow tiles in many stages, without tensor descriptors (they cost the host a few microseconds) unless
    scales are loaded in between, and as many parts of K as give two programs a multiprocessor, where that pays for
    adding them; wide tiles where there are enough of them. Many rows: tiles of 64 rows where the sums of a block lie
    beside the float32 sums, and until those of 128 fill the chip.
    """
    units = UNITS["sm_90"]
    if m <= 32:
        bm = 16 if m <= 16 else 32
        if n >= 128 * units:
            if m <= 16 and not keeps_two and bk == 128:  # int32 sums, which any number of columns adds to exactly
                return Config(bm, 128, 256, 4, 3, swap=True, waits=True)
            return Config(bm, 128, bk, 4, 5, swap=True, tma=True, waits=True)
        tile = Config(bm, 64, bk, 4, 6 if in_blocks else 8, swap=True, tma=in_blocks, waits=True)
        shared = _share(tile, n, k, m, 2 * units)
        return shared if in_blocks or _pays(shared, n, k) else tile
    if m <= 64:
        wide = n >= 128 * units
        tile = Config(64, 128 if wide else 64, bk, 4, 4 if wide else 5, tma=True, waits=True)
        return tile if -(-n // tile.bn) > 0.7 * units else _share(tile, n, k, m, 2 * units)
    if m <= 256 and (keeps_two or -(-m // 128) * -(-n // 128) < 2 * units):
        return _share(Config(64, 128, bk, 4, 4, tma=True), n, k, m, 2 * units)
    return Config(64 if keeps_two else 128, 128, bk, 4, 3, tma=True)


def _pays(shared: Config, n: int, k: int) -> bool:
    """True where parts of K, for a few rows on sm_90, are done sooner than one program for all of it.

    As measured on an H200: a program takes _BLOCK for a block of 64 rows of W, all together at least as long as W's
    bytes take to come, and _ADDING where sums meet in memory.
    """
    read, alone = n * k / BANDWIDTH, -(-k // shared.bk) * _BLOCK
    return max(read, alone / shared.split) + _ADDING < max(read, alone)


def _large_tile(m: int, bk: int, arch: str, *, keeps_two: bool) -> Config:
    """Wide tiles where registers hold them: a promoted product keeps two sets of sums."""
    if keeps_two or m <= 128 or arch in ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"):
        return Config(128, 128, bk, 8, 3)
    return Config(128, 256, bk, 8, 3)


def _split(tile: Config, n: int, k: int, m: int, arch: str) -> Config:
    """Programs along K until the chip is full; never in prefill."""
    if m > 256:
        return tile
    return _share(tile, n, k, m, UNITS.get(arch, 64) * (4 if tile.bm <= 32 else 2 if tile.bm <= 64 else 1))


def _share(tile: Config, n: int, k: int, m: int, wanted: int) -> Config:
    """As many programs along K as make `wanted` of them altogether, each with at least four blocks."""
    tiles = -(-n // tile.bn) * -(-m // tile.bm)
    blocks = -(-k // tile.bk)
    split = max(1, min(wanted // max(tiles, 1), blocks // 4, 16))
    while split > 1 and -(-blocks // split) * (split - 1) >= blocks:
        split -= 1  # no program without work
    return _with(tile, split=split)


def _fitting(tile: Config, shared_bytes: int, x_width: int) -> Config:
    """Fewer stages until both tiles fit."""
    stages = tile.stages
    while stages > 2 and stages * tile.bk * (tile.bm * x_width + tile.bn * x_width) > shared_bytes - 4096:
        stages -= 1
    return _with(tile, stages=stages)


def _with(tile: Config, *, split: int | None = None, stages: int | None = None) -> Config:
    return replace(tile, stages=stages or tile.stages, split=split or tile.split)


def product_of(scheme: Scheme) -> Product8 | None:
    """The product of a scheme whose scales are one a row or one a block; None for others.

    Unsigned bytes with integer zero points are multiplied as int8: both are 128 less there.
    """
    if scheme.activation is None or any(level.placement != "grid" for level in scheme.scales):
        return None
    if scheme.offset is not None and not has_zero_points(scheme):
        return None
    rows, columns = 1, 0
    for level in scheme.scales:  # a level of whole rows is folded into the finer one
        if level.block[1] != 0:
            columns = math.gcd(columns, level.block[1]) if columns else level.block[1]
    finest = scheme.scales[0].block[0] if scheme.scales else 1
    if columns and len(scheme.scales) == 1 and finest != 0:
        rows = finest
    element = "int8" if scheme.element == "uint8" and scheme.offset is not None else scheme.element
    return Product8(element, scheme.activation, rows, columns, scheme.offset is not None)


def has_zero_points(scheme: Scheme) -> bool:
    """True for one integer zero point a row, or one a matrix, of the width of the codes."""
    offset = scheme.offset
    return (offset is not None and offset.kind == "zero_point" and offset.placement == "grid" and not offset.levels
            and offset.block[1] == 0 and scheme.element in ("int8", "uint8") and offset.format == scheme.element)


def is_shifted(scheme: Scheme) -> bool:
    """True where codes of x may carry a zero point."""
    spec = scheme.activation
    if spec is None or spec.recipe not in ARITHMETIC:
        return False
    return ARITHMETIC[spec.recipe].is_shifted or ARITHMETIC[spec.recipe].optional == "zero_point"


# --- what must compile ------------------------------------------------------------------------------------------------

_TYPES: Final[Mapping[str, str]] = {
    "int8": "i8", "fp8_e4m3fn": "fp8e4nv", "fp8_e4m3fnuz": "fp8e4b8", "fp8_e5m2": "fp8e5",
}
_INSTRUCTIONS: Final[Mapping[tuple[str, str], str]] = {  # (architecture's family, operand kind) -> assembly
    ("sm_80", "int8"): r"mma\.sync\S*s32\.s8\.s8", ("sm_80", "float16"): r"mma\.sync\S*f32\.f16\.f16",
    ("sm_89", "fp8"): r"mma\.sync\S*(e4m3|e5m2)", ("sm_90", "int8"): r"wgmma\S*s32\.s8\.s8",
    ("sm_90", "fp8"): r"wgmma\S*f32\.e[45]m[23]", ("sm_90", "float16"): r"wgmma\S*f32\.f16\.f16",
    ("gfx9", "int8"): r"v_mfma_i32_\w*i8", ("gfx9", "fp8"): r"v_mfma_f32_\w*(fp8|bf8|f8f6f4)",
    ("gfx9", "float16"): r"v_mfma_f32_\w*f16", ("gfx1", "int8"): r"v_wmma_i32_\w*iu8",
    ("gfx1", "fp8"): r"v_wmma_f32_\w*(fp8|bf8)", ("gfx1", "float16"): r"v_wmma_f32_\w*f16",
}
CASES: Final[tuple[tuple[str, Product8], ...]] = (
    ("int8 token", Product8("int8", ActivationSpec("int8", True, "token", "int8_token"))),
    ("int8 token asymmetric", Product8("int8", ActivationSpec("int8", True, "token", "int8_token_asym",
                                                              symmetric=False))),
    ("int8 zero points", Product8("int8", ActivationSpec("int8", True, "token", "int8_token_asym", symmetric=False),
                                  w_shifted=True)),
    ("e4m3 token", Product8("fp8_e4m3fn", ActivationSpec("fp8_e4m3fn", True, "token", "fp8_token"))),
    ("e5m2 token", Product8("fp8_e5m2", ActivationSpec("fp8_e5m2", True, "token", "torchao_fp8_token"))),
    ("e4m3 128x128", Product8("fp8_e4m3fn", ActivationSpec("fp8_e4m3fn", True, "group", "fp8_group", 128), 128, 128)),
)
# M, N, K; the fourth ends within a block, those after it are compiled where their tiles are others
_CASE_SIZES: Final = ((1, 4096, 14336), (64, 4096, 14336), (512, 4096, 14336), (16, 4096, 1008), (1, 28672, 4096),
                      (64, 28672, 4096), (200, 4096, 14336), (32, 4096, 14336))


def expected_instruction(arch: str, kind: str, bm: int) -> str:
    """A regular expression for the matrix instruction of an operand kind."""
    fp8 = "fp8" if kind.startswith("fp8") else kind
    if arch.startswith("gfx"):
        return _INSTRUCTIONS[("gfx9" if arch.startswith("gfx9") else "gfx1", fp8)]
    if arch == "sm_90":
        return f"{_INSTRUCTIONS[('sm_90', fp8)]}|{_mma(fp8)}" if bm <= 32 else _INSTRUCTIONS[("sm_90", fp8)]
    if arch in ("sm_100", "sm_103"):
        return f"tcgen05|{_mma(fp8)}"
    return _mma(fp8)


def _mma(kind: str) -> str:
    return _INSTRUCTIONS[("sm_89" if kind == "fp8" else "sm_80", kind)]


def cases_of_sm_90(
    arch: str, cases_of: Callable[[str, Product8, Operands], Iterable[CompileCase]]
) -> list[CompileCase]:
    """What a kernel for sm_90 alone compiles: the cases of each product, by label, each label once."""
    if arch != "sm_90":
        return []
    found: dict[str, CompileCase] = {}
    for label, product in CASES:
        given = operands(product, arch)
        assert given is not None
        for case in cases_of(label, product, given):
            found.setdefault(case.label, case)
    return list(found.values())


def compile_cases(arch: str) -> list[CompileCase]:
    """Products in several sizes, as `configure` launches them on `arch`."""
    if arch not in UNITS:
        return []
    cases = []
    for label, product in CASES:
        for exact in (False, True):
            given = operands(product, arch, exact=exact)
            if given is None or (exact and (product.is_integer or not operands(product, arch).promote)):  # type: ignore[union-attr]
                continue
            if given.kind == "float16" and arch == "gfx90a" and product.element == "fp8_e5m2":
                continue
            name = INT8_NAME if product.is_integer else FP8_EXACT_NAME if exact else FP8_NAME
            made = set()
            for m, n, k in _CASE_SIZES:
                config = configure(n, k, m, arch, product, given)
                seen = replace(config, split=1), k % config.bk
                if seen not in made:
                    place = f"K={k}" if n == 4096 else f"K={k} N={n}"
                    cases.append(_case(name, f"{label} M={m} {place}", arch, product, given, config, k))
                made.add(seen)
            for m in (1, 64):
                config = of_experts(configure(4096, 14336, m, arch, product, given))
                cases.append(experts8_case(_case(name, f"{label} M={m}", arch, product, given, config, 14336)))
    for name, integer in ((INT8_NAME, True), (FP8_NAME, False)):
        cases += quantizer_cases(name, arch, integer=integer)
        cases.append(epilogue_case(name, arch, integer=integer))
    return cases


def _case(
    name: str, label: str, arch: str, product: Product8, given: Operands, config: Config, k: int
) -> CompileCase:
    is_wide = given.kind == "float16"
    shifted = is_shifted(Scheme(product.element, activation=product.activation))
    x = "fp16" if is_wide else _TYPES[given.kind]
    w = "u8" if is_wide else _TYPES[given.kind]
    kept = "i32" if product.is_integer and not (product.x_group or product.w_group) else "fp32"
    types = {
        "x_ptr": f"tensordesc<{x}[{config.bm}, {config.bk}]>" if config.tma else f"*{x}",
        "w_ptr": f"tensordesc<{w}[{config.bn}, {config.bk}]>" if config.tma else f"*{w}",
        "sx_ptr": "*fp32", "sw_ptr": "*fp32", "zx_ptr": "*i32", "cs_ptr": "*i32" if kept == "i32" else "*fp32",
        "xs_ptr": "*i32", "zw_ptr": "*i32",
        "bias_ptr": "*bf16", "out_ptr": "*bf16", "part_ptr": f"*{kept}", "count_ptr": "*i32",
        "M": "i32", "N": "i32", "K": "i32", "GROUPS": "i32", "unit": "fp32",
    }
    constants = constants_of(product, given, config, k, shifted=shifted, has_bias=False,
                             fused=not arch.startswith("gfx"))
    return CompileCase(name, "anybit.kernels.triton.w8a8_jit:w8a8_matmul", arch, label, types, constants,
                       divisible=("N", "K"), num_warps=config.warps, num_stages=config.stages,
                       options=overlap(config.waits),
                       expects=(expected_instruction(arch, given.kind, config.bm),))


def constants_of(
    product: Product8, given: Operands, config: Config, k: int, *, shifted: bool, has_bias: bool, fused: bool
) -> dict[str, object]:
    """Compile-time arguments of `w8a8_matmul`."""
    return {
        "FORMAT": product.element if given.kind == "float16" else "", "IS_INTEGER": product.is_integer,
        "IS_SHIFTED": shifted, "W_SHIFTED": product.w_shifted, "PROMOTE": given.promote,
        "X_GROUP": product.x_group, "W_GROUP": product.w_group, "W_ROWS": product.w_rows,
        "HAS_BIAS": has_bias, "BM": config.bm, "BN": config.bn, "BK": config.bk,
        "SPLIT": config.split > 1, "FUSED": fused and config.split > 1, "SWAP": config.swap, "TMA": config.tma,
        "EVEN_K": k % config.bk == 0, "BAND": config.band, "WAITS": config.waits,
    }
