"""One quantized weight of Quark under the stages of one layer config: does it fit the stored tensors, and as what.

Torch-free. A layout is a line of `LAYOUTS` (of `TWO_STAGES`) and one function that compares dtypes and shapes: it gives
the weight's description, or says why the stages do not fit. Rules: docs/formats/quark.md §3-§5, §10, §11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.checkpoints.dialects._shared.quark_config import Config, Spec, Stages
from anybit.schemes import CHANNEL, TENSOR, Block, Offset, ScaleLevel, group

SCALAR: Final = ((), (1,))
REFUSED: Final = "refused: "  # before a reason that no other file could mend
_E8M0: Final = ("U8", "F8_E8M0")
_NOT_STORABLE: Final = ("mx6", "mx9", "bfp16")


@dataclass(frozen=True)
class Fit:
    """A weight's description under the stages that fit its tensors.

    codes   how `quark.canonicalize` unpacks: a key of its table
    order   pack method of int4 words; "signed_exponents" for dtype mx
    zeros   how zero points are stored, "" where there are none or all must be 0
    """

    shape: tuple[int, int]
    element: str
    scales: tuple[ScaleLevel, ...]
    codes: str
    order: str = ""
    has_transposed_scales: bool = False
    offset: Offset | None = None
    zeros: str = ""
    is_code_first: bool = False


@dataclass(frozen=True)
class Module:
    """A quantized module: its tensors by role and the config they were written under."""

    contents: Contents
    name: str
    config: Config
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    def shape(self, role: str) -> tuple[int, ...] | None:
        info = self.tensors.get(role)
        return info.shape if info is not None else None

    def dtype(self, role: str) -> str:
        info = self.tensors.get(role)
        return info.dtype if info is not None else ""

    @property
    def matrix(self) -> tuple[int, int]:
        shape = self.tensors["weight"].shape
        return shape[0], shape[1]


Tried = Fit | str  # a fit, or why there is none


def fit_of(module: Module, stages: Stages) -> Tried:
    if not stages:
        return "its weight is not quantized"
    first = stages[0]
    if len(stages) == 2:
        layout = TWO_STAGES.get((first.dtype, stages[1].dtype))
        if layout is None:
            return f"{REFUSED}unknown stages {first} + {stages[1]}"
        return layout(module, first, stages[1])
    if len(stages) > 2:
        return f"{REFUSED}{len(stages)} stages"
    if first.dtype in _NOT_STORABLE:
        return f"{REFUSED}element format not storable: {first.dtype}"
    if first.dtype == "mx":
        return _mx(module, first)
    made = LAYOUTS.get((first.dtype, first.qscheme))
    return made(module, first) if made is not None else f"{REFUSED}no layout of {first}"


def _missing(module: Module, role: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> str:
    """Why the tensor is not one of these, "" if it is."""
    shape = module.shape(role)
    if shape is None:
        return f"no {role}"
    if module.dtype(role) not in dtypes:
        return f"{role} is {module.dtype(role)}, wanted {' or '.join(dtypes)}"
    if shape not in shapes:
        return f"{role} is {list(shape)}, wanted {' or '.join(str(list(s)) for s in shapes)}"
    return ""


def _codes_are(module: Module, *dtypes: str) -> str:
    stored = module.dtype("weight")
    return "" if stored in dtypes else f"weight is {stored}, wanted {' or '.join(dtypes)}"


def _grid(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    rows, columns = (1 if size == 0 else -(-extent // size) for extent, size in zip(shape, block, strict=True))
    return rows, columns


def _plain_block(spec: Spec) -> Block | str:
    """The block of a weight whose scales are a scalar or one for each row."""
    if spec.qscheme == "per_tensor":
        return TENSOR
    return CHANNEL if spec.axis in (0, None) else f"{REFUSED}scales along axis {spec.axis} of a weight"


def _plain_shapes(shape: tuple[int, int], block: Block) -> tuple[tuple[int, ...], ...]:
    return SCALAR if block == TENSOR else ((shape[0],), (shape[0], 1))


def _level(module: Module, block: Block, role: str = "weight_scale") -> ScaleLevel:
    return ScaleLevel(FLOAT_DTYPES.get(module.dtype(role), "e8m0"), block)


def _size(spec: Spec, columns: int) -> int:
    """Group size; -1 is the whole row."""
    return spec.group_size if spec.group_size > 0 else columns


_FP8: Final = {"fp8_e4m3": ("fp8_e4m3fn", "F8_E4M3"), "fp8_e5m2": ("fp8_e5m2", "F8_E5M2")}


def _fp8(module: Module, spec: Spec) -> Tried:
    element, dtype = _FP8[spec.dtype]
    block = _plain_block(spec)
    if isinstance(block, str):
        return block
    shape = module.matrix
    problem = _codes_are(module, dtype) or _missing(module, "weight_scale", tuple(FLOAT_DTYPES),
                                                    *_plain_shapes(shape, block))
    return problem or Fit(shape, element, (_level(module, block),), "fp8")


def _fp8_blocks(module: Module, spec: Spec) -> Tried:
    """Blocks of rows and columns, or MXFP8's groups: powers of two as bytes, or numbers; both multiply."""
    element, dtype = _FP8[spec.dtype]
    shape = module.matrix
    is_group = spec.qscheme == "per_group"
    block = group(_size(spec, shape[1])) if is_group else spec.block
    if 0 in block:
        return "no block_size"
    kinds = _E8M0 if is_group else (*FLOAT_DTYPES, *_E8M0)
    problem = _codes_are(module, dtype) or _missing(module, "weight_scale", kinds, _grid(shape, block))
    return problem or Fit(shape, element, (_level(module, block),), "fp8")


# --- integers ------------------------------------------------------------------------------------------------------

_ZEROS_MISSING: Final = REFUSED + "zero points are missing"
_ZERO_DTYPES: Final = {"words": ("I32",), "bytes": ("U8",), "plain": ("I8", "U8", "I32"),
                       "integers": ("I32", "I8", "F32")}
_Zero = tuple[Offset | None, str]  # the offset, how it is stored


def _zero_point(
    module: Module, spec: Spec, block: Block, kind: str, *shapes: tuple[int, ...], role: str = "weight_zero_point"
) -> _Zero | str:
    """The zero points of an integer weight; all-zero tensors of symmetric signed codes are no offset.

    Without any (file-to-file exports) they are 0 for symmetric signed codes, and missing otherwise.
    """
    is_zero = spec.symmetric and spec.dtype.startswith("int")
    if role not in module.tensors:
        return (None, "") if is_zero else _ZEROS_MISSING
    problem = _missing(module, role, _ZERO_DTYPES[kind], *shapes)
    if problem:
        return problem
    element = "float32" if kind == "integers" else spec.dtype  # truncated floats are not bound to the code's range
    return (None if is_zero else Offset("zero_point", element, block)), kind


def _rows(module: Module, spec: Spec, codes: str, width: int, *dtypes: str) -> Tried:
    """One scale, or one for each row: codes along K, `width` units of storage for 8; zero points packed along N."""
    block = _plain_block(spec)
    if isinstance(block, str):
        return block
    rows, stored = module.matrix
    if width == 3 and stored % 3:
        return f"weight has {stored} bytes a row, wanted a multiple of 3"
    shape = (rows, 8 * stored // width)
    scales = _plain_shapes(shape, block)
    problem = _codes_are(module, *dtypes) or _missing(module, "weight_scale", tuple(FLOAT_DTYPES), *scales)
    if problem:
        return problem
    kind = "plain" if width == 8 or block == TENSOR else "words" if width == 1 else "bytes"
    packed = scales if kind == "plain" else ((-(-rows // 8) * width,),)
    zero = _zero_point(module, spec, block, kind, *packed)
    if isinstance(zero, str):
        return zero
    is_file_to_file = "weight_zero_point" not in module.tensors  # whose pack method is order, whatever it declares
    order = "order" if is_file_to_file else module.config.pack_method
    return Fit(shape, spec.dtype, (_level(module, block),), codes, order, False, *zero)


def _int8(module: Module, spec: Spec) -> Tried:
    """Codes [N, K], one a byte."""
    return _rows(module, spec, "int8", 8, "I8", "U8")


def _int4(module: Module, spec: Spec) -> Tried:
    """Words [N, K/8]."""
    return _rows(module, spec, "int4", 1, "I32")


def _int3(module: Module, spec: Spec) -> Tried:
    """Bytes [N, 3K/8]: 8 codes in 3."""
    return _rows(module, spec, "int3", 3, "U8")


def _groups(module: Module, spec: Spec, codes: str, per_unit: int, kind: str, *dtypes: str) -> Tried:
    """Scales of a group along K: stored transposed, [K, N / per_unit]; scales and zero points [K/g, ..].

    Without zero points the file-to-file writer's (§5): scales [N, K/g], pack method order whatever it declares.
    """
    problem = _codes_are(module, *dtypes)
    if problem:
        return problem
    columns, units = module.matrix
    size = _size(spec, columns)
    groups = -(-columns // size)
    scale = module.shape("weight_scale") or ()
    is_file_to_file = "weight_zero_point" not in module.tensors
    rows = scale[0 if is_file_to_file else 1] if len(scale) == 2 else per_unit * units
    grid = (rows, groups) if is_file_to_file else (groups, rows)
    problem = _missing(module, "weight_scale", tuple(FLOAT_DTYPES), grid)
    if not problem and units != -(-rows // per_unit):
        problem = f"weight has {units} a row, wanted {-(-rows // per_unit)}"
    if problem:
        return problem
    zero = _zero_point(module, spec, group(size), kind, (groups, rows if kind == "integers" else units))
    if isinstance(zero, str):
        return zero
    order = "order" if is_file_to_file else module.config.pack_method
    return Fit((rows, columns), spec.dtype, (_level(module, group(size)),), codes, order, not is_file_to_file, *zero)


def _int8_groups(module: Module, spec: Spec) -> Tried:
    return _groups(module, spec, "int8_transposed", 1, "plain", "I8", "U8")


def _int4_groups(module: Module, spec: Spec) -> Tried:
    return _groups(module, spec, "int4_transposed", 8, "words", "I32")


def _uint2_groups(module: Module, spec: Spec) -> Tried:
    """Bytes along N; float zero points lie unpacked, truncated to integers."""
    kind = "integers" if module.dtype("weight_zero_point") == "I32" else "bytes"
    return _groups(module, spec, "uint2_transposed", 4, kind, "U8")


def _int2_groups(module: Module, spec: Spec) -> Tried:
    """One code a word."""
    return _groups(module, spec, "int2_transposed", 1, "integers", "I32")


def _int3_groups(module: Module, spec: Spec) -> Tried:
    return f"{REFUSED}int3 per_group: no Quark can write it"


# --- microscaled floats --------------------------------------------------------------------------------------------

_ELEMENTS: Final = {"fp4": ("fp4_e2m1", 2, 1), "fp6_e2m3": ("fp6_e2m3", 4, 3), "fp6_e3m2": ("fp6_e3m2", 4, 3)}
_SCALE_FORMATS: Final = {"e8m0": ("e8m0", _E8M0), "e5m3": ("ue5m3", ("U8",)), "e4m3": ("fp8_e4m3fn", ("F8_E4M3",))}


def _floats(module: Module, spec: Spec) -> Tried:
    """fp4 or fp6 under scales of a group: bytes in the format that `scale_format` names, or numbers."""
    element, codes, width = _ELEMENTS[spec.dtype]
    rows, stored = module.matrix
    if stored % width:
        return f"weight has {stored} bytes a row, wanted a multiple of {width}"
    shape = (rows, stored * codes // width)
    block = group(_size(spec, shape[1]))
    format, dtypes = _SCALE_FORMATS.get(spec.scale_format, ("", ()))
    if module.dtype("weight_scale") in FLOAT_DTYPES:  # file-to-file exports keep values: the dtype decides (§5)
        format, dtypes = FLOAT_DTYPES[module.dtype("weight_scale")], tuple(FLOAT_DTYPES)
    problem = _codes_are(module, "U8") or _missing(module, "weight_scale", dtypes, _grid(shape, block))
    return problem or Fit(shape, element, (ScaleLevel(format, block),), _float_codes(spec.dtype, module.config))


def _float_codes(dtype: str, config: Config) -> str:
    if dtype == "fp4":
        return "fp4"
    return "fp6_planes" if config.has_old_fp6 else "fp6"


def _mx(module: Module, spec: Spec) -> Tried:
    """dtype mx: exponents without a bias, signed; six-bit codes always in the old planes (§4)."""
    scale = module.shape("weight_scale") or ()
    rows, stored = module.matrix
    size = spec.group_size if spec.group_size > 0 else 32
    dtype = spec.element
    if not dtype:  # 0.8 and older: from the bytes of a group
        if len(scale) != 2 or 2 * stored != size * scale[1]:
            return f"{REFUSED}dtype mx without mx_element_dtype: not four bits, and of six there are two kinds"
        dtype = "fp4"
    if dtype not in _ELEMENTS:
        return f"{REFUSED}element format not storable: mx of {dtype}"
    element, codes, width = _ELEMENTS[dtype]
    if stored % width:
        return f"weight has {stored} bytes a row, wanted a multiple of {width}"
    shape = (rows, stored * codes // width)
    problem = _codes_are(module, "U8") or _missing(module, "weight_scale", ("U8", "I8"), _grid(shape, group(size)))
    kind = "fp4" if dtype == "fp4" else "fp6_planes"
    return problem or Fit(shape, element, (ScaleLevel("e8m0", group(size)),), kind, "signed_exponents")


# --- two stages ----------------------------------------------------------------------------------------------------

def _fp4_global(module: Module, first: Spec, second: Spec) -> Tried:
    """NVFP4 and AMDFP4 under a global scale: code * (scale of the group * one number)."""
    rows, stored = module.matrix
    shape = (rows, 2 * stored)
    block = group(_size(first, shape[1]))
    format, dtype = {"fp8_e4m3": ("fp8_e4m3fn", "F8_E4M3"), "fp8_e5m3": ("ue5m3", "U8")}[second.dtype]
    problem = (_codes_are(module, "U8") or _missing(module, "weight_scale", (dtype,), _grid(shape, block))
               or _missing(module, "weight_scale_2", tuple(FLOAT_DTYPES), *SCALAR))
    levels = ScaleLevel(format, block), _level(module, TENSOR, "weight_scale_2")
    return problem or Fit(shape, "fp4_e2m1", levels, "fp4")


def _int4_under_fp8(module: Module, first: Spec, second: Spec) -> Tried:
    """((q - z2) * s2[n]) * s1: int4 by row whose values would be fp8, never rounded to it."""
    if (first.qscheme, second.qscheme) != ("per_tensor", "per_channel"):
        return f"{REFUSED}unknown stages {first} + {second}"
    rows, words = module.matrix
    problem = (_codes_are(module, "I32") or _missing(module, "weight_scale", tuple(FLOAT_DTYPES), *SCALAR)
               or _missing(module, "weight_scale_2", tuple(FLOAT_DTYPES), (rows,), (rows, 1)))
    if problem:
        return problem
    zero = _zero_point(module, second, CHANNEL, "words", (-(-rows // 8),), role="weight_zero_point_2")
    if isinstance(zero, str):
        return zero
    levels = _level(module, CHANNEL, "weight_scale_2"), _level(module, TENSOR)
    order = module.config.pack_method
    return Fit((rows, 8 * words), second.dtype, levels, "int4", order, False, *zero, is_code_first=True)


LAYOUTS: Final[Mapping[tuple[str, str], Callable[[Module, Spec], Tried]]] = {
    **{(dtype, scheme): _fp8 for dtype in _FP8 for scheme in ("per_tensor", "per_channel")},
    **{(dtype, scheme): _fp8_blocks for dtype in _FP8 for scheme in ("per_group", "per_block")},
    **{(dtype, scheme): _int8 for dtype in ("int8", "uint8") for scheme in ("per_tensor", "per_channel")},
    **{(dtype, scheme): _int4 for dtype in ("int4", "uint4") for scheme in ("per_tensor", "per_channel")},
    ("int8", "per_group"): _int8_groups,
    ("uint8", "per_group"): _int8_groups,
    ("int4", "per_group"): _int4_groups,
    ("uint4", "per_group"): _int4_groups,
    ("uint2", "per_group"): _uint2_groups,
    ("int2", "per_group"): _int2_groups,
    ("int3", "per_channel"): _int3,
    ("int3", "per_group"): _int3_groups,
    ("fp4", "per_group"): _floats,
    ("fp6_e2m3", "per_group"): _floats,
    ("fp6_e3m2", "per_group"): _floats,
}
TWO_STAGES: Final[Mapping[tuple[str, str], Callable[[Module, Spec, Spec], Tried]]] = {
    ("fp4", "fp8_e4m3"): _fp4_global,
    ("fp4", "fp8_e5m3"): _fp4_global,
    ("fp8_e4m3", "int4"): _int4_under_fp8,
    ("fp8_e4m3", "uint4"): _int4_under_fp8,
}
