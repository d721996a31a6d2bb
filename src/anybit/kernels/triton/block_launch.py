"""How the kernels between a decoder block's products are launched, torch-free, and what the gate compiles of them.

The same functions serve the launcher (`block.py`) and the gate's compile cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from anybit.kernels.compiling import OVERLAPPING, CompileCase, overlap
from anybit.kernels.triton.recipes import (
    ARITHMETIC,
    Spec,
    can_fake_quantize,
    can_quantize,
    constants_of,
    element_of,
    has_native_e4m3,
    reads_row,
    statistic_of,
)
from anybit.platforms.archs import ARCHS
from anybit.schemes import ActivationSpec

__all__ = ["LARGEST_M", "NAME", "PLAIN", "attention_launch", "compile_cases", "gate_launch", "input_constants",
           "is_made_in_passing", "needs_row", "norm_launch", "overlapping"]

NAME: Final = "triton-block"
LARGEST_M: Final = 8  # tokens of all sequences together
LARGEST_ROW: Final = 32768  # of a norm, or of a gate whose recipe reads the whole row
_PLAIN_GROUP: Final = 16  # columns that a tile holds together where no recipe says
_GATE_TILE: Final = 2048  # columns that a program of the gate takes where it need not see the row
_FEWEST_ROWS: Final = 16  # of a matrix instruction


def overlapping(arch: str) -> tuple[dict[str, bool], dict[str, bool]]:
    """Constants and options of kernels that are launched while the one before them ends: measured on sm_90 alone."""
    waits = arch in OVERLAPPING
    return {"WAITS": waits}, overlap(waits)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# --- inputs of products -----------------------------------------------------------------------------------------------

PLAIN: Final[dict[str, Any]] = {
    "MODE": 0, "RULE": "", "EXPONENT": "", "DIVIDE": False, "BOUND": 0.0, "IS_INTEGER": False, "MANTISSA": 0,
    "SMALLEST": 0, "EMAX": 0, "TOP": 0.0, "MINIMUM": 0.0, "MAXIMUM": 0.0, "BITS": 0, "NAN_CODE": 0, "HAS_GIVEN": False,
    "READS_ROW": False, "SCALES": False, "OUTER": False, "VALUES": False, "OWN": False, "FNUZ": False, "NATIVE": False,
}


def is_made_in_passing(spec: Spec) -> bool:
    """True if the kernel that makes rows can quantize them too: symmetric, by row or by whole groups of one row."""
    if can_quantize(spec) is not None or ARITHMETIC[spec.recipe].is_shifted:
        return False
    if spec.granularity == "group":
        return spec.group_size == _power_of_two(spec.group_size) and spec.group_size >= 8
    return statistic_of(spec) in ("none", "absmax")


def needs_row(spec: Spec) -> bool:
    """True if a code depends on numbers of its row beyond its group; integer codes leave NaN to the row's scale."""
    is_static = statistic_of(spec) == "none" and not element_of(spec.element).is_integer
    return reads_row(spec) or (spec.granularity != "group" and not is_static)


def input_constants(
    spec: Spec, arch: str, *, has_given: bool, values: bool, own: bool, fnuz: bool
) -> dict[str, Any]:
    """Compile-time constants of a quantized input: codes or values, of groups times their `own` scales or without."""
    in_groups = spec.granularity == "group"
    native = spec.element == "fp8_e4m3fn" and not fnuz and not values and has_native_e4m3(arch)
    return {**constants_of(spec), "MODE": 2 if in_groups else 1, "HAS_GIVEN": has_given, "READS_ROW": reads_row(spec),
            "SCALES": in_groups and not own, "OUTER": in_groups and ARITHMETIC[spec.recipe].scale_codes == "fp8_e4m3fn",
            "VALUES": values, "OWN": own and in_groups, "FNUZ": fnuz, "NATIVE": native}


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLaunch:
    """A program's tile of a row: groups, their size, warps."""

    groups: int
    size: int
    warps: int


@dataclass(frozen=True)
class AttentionLaunch:
    """One launch of `decode_attention`.

    rows, half   query rows and half of a head, as wide as the matrix unit and powers of two need
    block        cached tokens at a time; `splits` programs share them
    """

    rows: int
    half: int
    block: int
    splits: int
    warps: int
    stages: int


def _group_of(spec: Spec | None) -> int:
    return spec.group_size if spec is not None and spec.granularity == "group" else _PLAIN_GROUP


def _tile(columns: int, size: int) -> RowLaunch:
    groups = max(1, _power_of_two(-(-columns // size)))
    # eight numbers a thread: of a single row the latency is what counts
    return RowLaunch(groups, size, min(16, max(1, groups * size // 256)))


def norm_launch(spec: Spec | None, columns: int) -> RowLaunch:
    """A program has a whole row."""
    return _tile(columns, _group_of(spec))


def gate_launch(spec: Spec | None, columns: int) -> RowLaunch:
    """Several programs share a row unless its scale is one for all of it."""
    size = _group_of(spec)
    is_whole = spec is not None and needs_row(spec)
    return _tile(columns if is_whole else min(columns, max(_GATE_TILE // 2, size)), size)


# programs that fill a chip
_PROGRAMS: Final[Mapping[str, int]] = MappingProxyType({"nvidia": 132, "amd": 128, "cpu": 2})


def attention_launch(dim: int, rows: int, pairs: int, room: int, arch: str) -> AttentionLaunch:
    """For `rows` query rows at each of `pairs` heads of sequences, and a cache with room for `room` tokens; pure."""
    vendor = ARCHS[arch].vendor if arch in ARCHS else "cpu"
    half = max(16, _power_of_two(dim // 2))
    padded = max(_FEWEST_ROWS, _power_of_two(rows))
    # queries and sums stay in registers, and half as many threads a warp hold half of them
    is_narrow = vendor == "amd" and ARCHS[arch].wave == 32
    is_large = padded * half >= 2048
    block = 32 if is_narrow or half > 64 or padded > 32 else 64
    if is_narrow and is_large:
        block, warps = 16, 16
    else:
        warps = 8 if is_large or (is_narrow and padded * half >= 1024) else 4
    splits = max(1, min(_PROGRAMS[vendor] // pairs, -(-room // block), 32))
    return AttentionLaunch(padded, half, block, splits, warps, 1 if vendor == "amd" else 2)


# --- what the gate compiles -------------------------------------------------------------------------------------------

_SPECS: Final[Mapping[str, ActivationSpec | None]] = MappingProxyType({
    "as they are": None,
    "nvfp4": ActivationSpec("fp4_e2m1", False, "group", "nvfp4", 16),
    "nvfp4 token": ActivationSpec("fp4_e2m1", True, "group", "nvfp4_token", 16),
    "mxfp4": ActivationSpec("fp4_e2m1", True, "group", "mx_even", 32),
    "fp8 token": ActivationSpec("fp8_e4m3fn", True, "token", "fp8_token"),
    "fp8 group": ActivationSpec("fp8_e4m3fn", True, "group", "fp8_group", 128),
    "int8 token": ActivationSpec("int8", True, "token", "int8_token"),
})
_DTYPES: Final = ("bf16", "fp16")
_SPILLS: Final = 32  # of heads of 256 where a matrix instruction wants its operands twice: slower, and right
_MODULE: Final = "anybit.kernels.triton.block_jit"


def _input_case(spec: ActivationSpec | None, arch: str, dtype: str) -> tuple[dict[str, str], dict[str, Any]]:
    types = {"out_ptr": f"*{dtype}", "scale_ptr": "*fp32", "outer_ptr": "*fp32", "given_ptr": "*fp32"}
    if spec is None:
        return types, PLAIN
    by_value = can_fake_quantize(spec) is None and spec.granularity == "group"
    if not by_value:
        types["out_ptr"] = "*i8" if spec.element == "int8" else "*u8"
    return types, input_constants(
        spec, arch, has_given=bool(ARITHMETIC[spec.recipe].given), values=by_value, own=by_value,
        fnuz=not by_value and ARCHS[arch].fp8 == "fnuz" and spec.element == "fp8_e4m3fn")


def _row_cases(spec: ActivationSpec | None, label: str, arch: str, dtype: str) -> list[CompileCase]:
    """The norm of 4096 columns with a residual, the gate of 14336."""
    own, constants = _input_case(spec, arch, dtype)
    waits, overlap = overlapping(arch)
    pointer, options = f"*{dtype}", {"enable_fp_fusion": False, **overlap}
    launch = norm_launch(spec, 4096)
    norm = CompileCase(
        NAME, f"{_MODULE}:norm_rows", arch, f"norm {dtype}, {label}",
        {"x_ptr": pointer, "delta_ptr": pointer, "weight_ptr": pointer, "sum_ptr": pointer, **own, "count_ptr": "*i64",
         "M": "i32", "K": "i32", "KP": "i32", "G": "i32", "x_stride": "i32", "delta_stride": "i32", "eps": "fp32",
         "added": "i32"},
        {**constants, "HAS_DELTA": True, "COUNTS": True, "BG": launch.groups, "GS": launch.size, **waits},
        divisible=("K", "KP", "x_stride", "delta_stride"), num_warps=launch.warps, options=options)
    launch = gate_launch(spec, 14336)
    gate = CompileCase(
        NAME, f"{_MODULE}:gate_rows", arch, f"gate {dtype}, {label}",
        {"gate_ptr": pointer, "up_ptr": pointer, **own, "M": "i32", "K": "i32", "KP": "i32", "G": "i32",
         "gate_stride": "i32", "up_stride": "i32"},
        {**constants, "BG": launch.groups, "GS": launch.size, "WHOLE": launch.groups * launch.size >= 14336,
         **waits},
        divisible=("K", "KP", "gate_stride", "up_stride"), num_warps=launch.warps, options=options)
    return [norm, gate]


def _attention_case(
    arch: str, dtype: str, dim: int, tokens: int, room: int, *, counted: bool, norms: bool
) -> CompileCase:
    """Four query heads to each of eight heads of the cache."""
    launch = attention_launch(dim, 4 * tokens, 8, room, arch)
    pointers = ("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr", "keys_ptr", "values_ptr",
                "out_ptr")
    integers = ("q_stride", "k_stride", "v_stride", "turn_batch", "turn_token", "key_batch", "key_head", "value_batch",
                "value_head", "mask_batch", "mask_token", "held", "room", "heads")
    types = {**dict.fromkeys(pointers, f"*{dtype}"), "mask_ptr": "*u8" if counted else f"*{dtype}",
             "count_ptr": "*i64" if counted else f"*{dtype}", "part_ptr": "*fp32", "peak_ptr": "*fp32",
             "arrived_ptr": "*i32", **dict.fromkeys(integers, "i32"), "scaling": "fp32", "eps": "fp32"}
    constants = {"T": tokens, "GROUP": 4, "ROWS": launch.rows, "DIM": dim, "HALF": launch.half, "BN": launch.block,
                 "SPLITS": launch.splits, "Q_NORM": norms, "K_NORM": norms, "MASK": counted, "COUNTED": counted,
                 **overlapping(arch)[0]}
    label = f"attention {dtype} heads of {dim}, {tokens} tokens, {'static' if counted else 'growing'}"
    return CompileCase(
        NAME, f"{_MODULE}:decode_attention", arch, label, types, constants,
        divisible=("q_stride", "k_stride", "v_stride", "key_batch", "key_head", "value_batch", "value_head"),
        num_warps=launch.warps, num_stages=launch.stages, options={"enable_fp_fusion": False, **overlapping(arch)[1]},
        spills=_SPILLS if arch.startswith("gfx11") and dim > 128 else 0)


def compile_cases(arch: str) -> list[CompileCase]:
    """Rows of every kind of input, attention of static and growing caches."""
    if "bfloat16" not in ARCHS[arch].matrix or ARCHS[arch].vendor == "cpu":
        return []
    rows = [case for label, spec in _SPECS.items() for dtype in (_DTYPES if spec is None else _DTYPES[:1])
            for case in _row_cases(spec, label, arch, dtype)]
    return [*rows, _attention_case(arch, "bf16", 128, 1, 4096, counted=True, norms=False),
            _attention_case(arch, "fp16", 64, 1, 4096, counted=False, norms=False),
            _attention_case(arch, "bf16", 128, 8, 32768, counted=True, norms=True),
            _attention_case(arch, "bf16", 256, 2, 200, counted=False, norms=True)]
