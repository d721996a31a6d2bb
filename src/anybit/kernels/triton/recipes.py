"""How the quantizer kernels carry out each activation recipe, as data. Torch-free.

`quantizers.py` holds the kernels; what a recipe means stands in numerics/activations.py, which they equal bit for bit.
Here stands, for each recipe, which statistic of x it takes, the rule that makes a scale of it, and whether the codes'
values fit a 16 bit float, so that a product can take them without knowing the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

from anybit.kernels.compiling import OVERLAPPING, CompileCase
from anybit.numerics.formats import number_format
from anybit.platforms.archs import ARCHS

__all__ = [
    "ARITHMETIC", "Arithmetic", "Element", "Spec", "can_fake_quantize", "can_quantize", "compile_case",
    "constants_of", "edges", "element_of", "group_launch", "has_native_e4m3", "is_heavy", "reads_row",
    "row_launch", "statistic_of",
]

Statistic = Literal["none", "absmax", "range", "row_absmax", "call_absmax", "call_range"]


class Spec(Protocol):
    """What is read of `schemes.ActivationSpec`."""

    def __hash__(self) -> int:
        """Equal specs share compiled kernels."""

    @property
    def element(self) -> str:
        """Number format of the codes."""

    @property
    def granularity(self) -> str:
        """tensor, token or group."""

    @property
    def recipe(self) -> str:
        """A name in ARITHMETIC."""

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, 0 = the row."""

    @property
    def bound(self) -> float | None:
        """The recipe's own constant."""


@dataclass(frozen=True)
class Arithmetic:
    """One recipe in the kernels' words.

    rule         name of the scale rule in `quantizers.py`
    divide       x / factor instead of x * factor
    is_shifted   codes carry a zero point
    given        the static tensor that the rule reads ("" where it reads none)
    optional     a static tensor that the rule reads where it is there
    scale_codes  number format of 8 bit scales that the quantizer stores beside the codes
    floor        smallest scale of the asymmetric rules
    """

    rule: str
    divide: bool = False
    is_shifted: bool = False
    given: str = ""
    optional: str = ""
    scale_codes: str = ""
    floor: float = 0.0


def _mx(exponent: str, rule: str = "mx") -> Arithmetic:
    return Arithmetic(f"{rule}:{exponent}", scale_codes="e8m0")


ARITHMETIC: Final[Mapping[str, Arithmetic]] = MappingProxyType({
    "int8_static": Arithmetic("static", given="scale", optional="zero_point"),
    "int8_static_divide": Arithmetic("static", divide=True, given="scale", optional="zero_point"),
    "int8_token": Arithmetic("int8_token"),
    "int8_token_asym": Arithmetic("range", is_shifted=True),
    "torchao_int8_token": Arithmetic("torchao_int8"),
    "torchao_int8_token_asym": Arithmetic("range_with_zero", is_shifted=True, floor=2.0**-23),
    "torchao_8da4w": Arithmetic("range_with_zero", is_shifted=True, floor=2.0**-126),
    "int4_group": Arithmetic("int4_group", divide=True),
    "fp8_static": Arithmetic("static", given="scale"),
    "fp8_static_divide": Arithmetic("static", divide=True, given="scale"),
    "fp8_tensor": Arithmetic("fp8_tensor"),
    "fp8_token": Arithmetic("fp8_token", divide=True),
    "fp8_group": Arithmetic("fp8_group"),
    "fp8_group_divide": Arithmetic("fp8_group", divide=True),
    "fp8_group_ue8m0": _mx("ue8m0"),
    "torchao_fp8_token": Arithmetic("torchao_fp8", divide=True, optional="lower_bound"),
    "mxfp4_even": _mx("even", "mx_zero_dies"),
    "mxfp8_log2": _mx("vllm_mxfp8"),
    "mx_even": _mx("even"),
    "mx_floor": _mx("quark_floor"),
    "mx_ceil": _mx("quark_ceil"),
    "mx_floor_autoround": _mx("autoround_floor"),
    "mx_rceil": _mx("vllm_mxfp8"),
    "mx_rceil_torchao": _mx("torchao_rceil", "mx_zero_is_one"),
    "mx_floor_torchao": _mx("floor", "mx_normal"),
    "mx_ceil_torchao": _mx("ceil", "mx_normal"),
    "mx_even_torchao": _mx("even", "mx_normal"),
    "nvfp4": Arithmetic("nvfp4", given="global_scale", scale_codes="fp8_e4m3fn"),
    "nvfp4_reciprocal": Arithmetic("nvfp4_reciprocal", given="scale", scale_codes="fp8_e4m3fn"),
    "nvfp4_token": Arithmetic("nvfp4_token", scale_codes="fp8_e4m3fn"),
    "torchao_nvfp4": Arithmetic("torchao_nvfp4", optional="scale", scale_codes="fp8_e4m3fn"),
    "amdfp4": Arithmetic("fp4_ue5m3:divide", divide=True),
    "fp4_ue5m3_autoround": Arithmetic("fp4_ue5m3:times", divide=True),
})

_CANNOT: Final[Mapping[str, str]] = MappingProxyType({
    "llm_int8": "outlier columns depend on the data of the whole call and stay in 16 bits",
    "int8_static_output": "quantizes outputs, not inputs",
})
_BY_CALL: Final = ("fp8_tensor",)


@dataclass(frozen=True)
class Element:
    """A number format in the encoder's words: value = q * 2^(E - mantissa), E >= smallest_exponent (see codec.py)."""

    is_integer: bool
    bits: int
    mantissa: int
    smallest_exponent: int
    largest_exponent: int
    minimum: float
    maximum: float
    nan_code: int


def element_of(name: str) -> Element:
    """The constants of a number format; codes are signed."""
    row = number_format(name)
    largest = row.maximum
    exponent = 0
    while 2.0 ** (exponent + 1) <= largest:
        exponent += 1
    return Element(row.is_integer, row.bits, row.mantissa, 1 - row.bias, exponent, row.minimum, largest,
                   row.nan_codes[0] if row.nan_codes else 0)


_ELEMENTS: Final = ("int8", "int7", "int4", "fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3fn", "fp8_e5m2")


def can_quantize(spec: Spec) -> str | None:
    """Why the kernels cannot make the codes of a recipe, or None."""
    if spec.recipe not in ARITHMETIC:
        return f"{spec.recipe}: {_CANNOT.get(spec.recipe, 'no such recipe in the quantizer kernels')}"
    if spec.element not in _ELEMENTS:
        return f"activations of {spec.element} have no quantizer kernel"
    if spec.granularity == "group" and not 1 < spec.group_size <= 8192:
        return f"groups of {spec.group_size} inputs"
    return None


def can_fake_quantize(spec: Spec) -> str | None:
    """Why the values of a recipe cannot be handed on as exact bfloat16 with one float32 factor a row, or None."""
    cannot = can_quantize(spec)
    if cannot is not None:
        return cannot
    arithmetic = ARITHMETIC[spec.recipe]
    if arithmetic.rule == "range":
        return f"{spec.recipe}: its zero point is unbounded, and the difference to a code does not fit 16 bits"
    if spec.granularity == "group" and not arithmetic.scale_codes and not arithmetic.rule.startswith("fp4_ue5m3"):
        return f"{spec.recipe}: its float32 scale changes within a row"
    return None


def statistic_of(spec: Spec) -> Statistic:
    """What the kernel has to find in x before it can make a scale."""
    arithmetic = ARITHMETIC[spec.recipe]
    if arithmetic.rule == "static":
        return "none"
    if spec.recipe in _BY_CALL or (spec.granularity == "tensor" and not arithmetic.is_shifted):
        return "call_absmax"
    if arithmetic.is_shifted:
        return "call_range" if spec.granularity == "tensor" else "range"
    return "absmax"


def reads_row(spec: Spec) -> bool:
    """True if a group's scale depends on the largest magnitude of its row."""
    return ARITHMETIC[spec.recipe].rule == "nvfp4_token"


# --- launches ---------------------------------------------------------------------------------------------------------

_GROUP_TILE: Final = 2048  # elements that a program of the group kernel takes
_ROW_BLOCK: Final = 16384  # columns that a program of the row kernel takes at a time


@cache
def constants_of(spec: Spec) -> dict[str, Any]:
    """Compile-time constants that the row and the group kernel share."""
    arithmetic, element = ARITHMETIC[spec.recipe], element_of(spec.element)
    rule, _, exponent = arithmetic.rule.partition(":")
    whole = int if element.is_integer else float
    return {
        "RULE": rule, "EXPONENT": exponent, "DIVIDE": arithmetic.divide,
        "BOUND": float("inf") if spec.bound is None else float(spec.bound),
        "IS_INTEGER": element.is_integer, "MANTISSA": element.mantissa, "SMALLEST": element.smallest_exponent,
        "EMAX": element.largest_exponent, "TOP": element.maximum / 2.0**element.largest_exponent,
        "MINIMUM": whole(element.minimum), "MAXIMUM": whole(element.maximum), "BITS": element.bits,
        "NAN_CODE": element.nan_code,
    }


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


_FEW_ROWS: Final = 16  # so few that several programs share a row: each finds its statistic anew
_MANY_ROWS: Final = 512  # so many that throughput counts, not how soon a row is done
_PART: Final = 2048  # columns that each of them writes, and that are held where a row would take too many registers


def row_launch(
    k: int, rows: int = _FEW_ROWS + 1, *, is_shared: bool = False, is_heavy: bool = False
) -> tuple[int, int, int]:
    """Columns that a program reads at a time, those that it writes (0 = all), and its warps, for rows of k columns.

    is_shared   programs may share a row: none needs all its codes
    is_heavy    a code takes many registers (see `is_heavy`): long rows are read twice, from the cache the second time
    """
    block = min(_power_of_two(max(k, 16)), _ROW_BLOCK)
    if is_shared and rows <= _FEW_ROWS and block > _PART:
        return (block, _PART, _warps(block)) if block <= 2 * _PART else (_PART, _PART, 16)
    if is_heavy and block > 2 * _PART and rows >= _MANY_ROWS:
        return _PART, 0, 8
    return block, 0, _warps(block) if rows < _MANY_ROWS else max(1, _warps(block) // 2)


def is_heavy(spec: Spec) -> bool:
    """True for divisions that are corrected, and for codes with zero points."""
    arithmetic = ARITHMETIC[spec.recipe]
    return arithmetic.divide or arithmetic.is_shifted


def _warps(elements: int) -> int:
    """Sixteen elements a thread, in one to sixteen warps of 32: latency counts where one row is all there is."""
    return min(16, max(1, elements // 512))


def group_launch(group_size: int, k: int = 0, rows: int = 0) -> tuple[int, int, int, int]:
    """Padded group size, groups that a program takes, ROW of quantize_groups, its warps.

    k    columns, where the rule reads the largest magnitude of the row
    """
    padded = _power_of_two(group_size)
    if k == 0:
        return padded, max(1, _GROUP_TILE // padded), 0, 4
    block, part, warps = row_launch(k, rows, is_shared=True)
    is_whole = k <= block and not part
    if is_whole:
        warps = max(warps, block // 1024)  # 32 elements a thread: more of a long row do not stay in registers
    return padded, max(1, (part or block) // padded), -1 if is_whole else block, warps


def edges(k: int, columns: int, step: int) -> dict[str, bool]:
    """EVEN and PADDED of rows of k columns, written as `columns`, of which a program takes `step` at a time.

    step    0 where what it takes has gaps
    """
    return {"EVEN": step > 0 and columns == k and k % step == 0, "PADDED": columns != k}


def has_native_e4m3(arch: str) -> bool:
    """True where the chip's own conversion makes e4m3 codes: it rounds as the definition says."""
    facts = ARCHS.get(arch)
    return facts is not None and facts.vendor == "nvidia" and facts.fp8 == "fn"


def compile_case(
    kernel: str, arch: str, label: str, spec: Spec, *, values: bool = False, k: int = 4096
) -> CompileCase:
    """Codes, or values, of bfloat16 rows of k columns by a recipe, as `quantizers.py` launches it for `kernel`."""
    arithmetic = ARITHMETIC[spec.recipe]
    codes = "*bf16" if values else "*i8" if element_of(spec.element).is_integer else "*u8"
    native = spec.element == "fp8_e4m3fn" and not values and has_native_e4m3(arch)
    shared = {**constants_of(spec), "HAS_GIVEN": bool(arithmetic.given), "VALUES": values, "FNUZ": False,
              "NATIVE": native}
    if spec.granularity != "group":
        block, part, warps = row_launch(k, 1, is_shared=not arithmetic.is_shifted, is_heavy=is_heavy(spec))
        types = {"x_ptr": "*bf16", "out_ptr": codes, "scale_ptr": "*fp32", "zero_ptr": "*i32", "sums_ptr": "*i32",
                 "given_ptr": "*fp32", "given_zero_ptr": "*i8", "K": "i32", "KP": "i32", "stride": "i32"}
        constants = {**shared, "IS_SHIFTED": arithmetic.is_shifted, "FLOOR": arithmetic.floor,
                     "STATISTIC": statistic_of(spec), "HAS_ZERO": False, "SUMS": arithmetic.is_shifted and not values,
                     "WHOLE": k <= block and not part, "BK": block, "PART": part, **edges(k, k, max(block, part)),
                     "LEADS": arch in OVERLAPPING, "FOLLOWS": False}
        return CompileCase(kernel, "anybit.kernels.triton.quantizers_jit:quantize_rows", arch, label, types, constants,
                           divisible=("K", "KP", "stride"), num_warps=warps, options={"enable_fp_fusion": False})
    padded, at_a_time, row, warps = group_launch(spec.group_size, k if reads_row(spec) else 0, 1)
    has_outer = arithmetic.scale_codes == "fp8_e4m3fn"
    types = {"x_ptr": "*bf16", "out_ptr": codes, "scale_ptr": "*fp32", "scale_code_ptr": "*u8", "outer_ptr": "*fp32",
             "given_ptr": "*fp32", "M": "i32", "K": "i32", "KP": "i32", "G": "i32", "stride": "i32",
             "given_stride": "i32"}
    constants = {**shared, "ROW": row, "SCALES": not values, "SCALE_CODES": bool(arithmetic.scale_codes) and not values,
                 "OUTER": has_outer, "OWN": values, "PACKED": False, "SIZE": spec.group_size, "GS": padded,
                 "BG": at_a_time, **edges(k, k, at_a_time * padded * (padded == spec.group_size)),
                 "LEADS": arch in OVERLAPPING, "FOLLOWS": False}
    return CompileCase(kernel, "anybit.kernels.triton.quantizers_jit:quantize_groups", arch, label, types, constants,
                       divisible=("K", "KP", "stride"), num_warps=warps, options={"enable_fp_fusion": False})
