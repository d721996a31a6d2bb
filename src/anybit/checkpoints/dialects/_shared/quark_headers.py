"""The layers of a Quark checkpoint as tensor headers tell them: which layer config fits, layout, shape, scheme.

Torch-free. A layout is a line of `LAYOUTS` and one function that compares a weight's stages with the stored tensors: it
gives the weight's description, or says why the stages do not fit. The tensors decide: saved configs have their patterns
in another order than the user meant. Rules: docs/formats/quark.md §2, §3, §5, §6, §11.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.checkpoints.dialects._shared.quark_activations import asks_for_scales, input_spec
from anybit.checkpoints.dialects._shared.quark_config import Config, LayerConfig, Spec, Stages
from anybit.checkpoints.dialects.plain import EMBEDDINGS
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Inconsistent, Unsupported
from anybit.schemes import CHANNEL, TENSOR, Block, Layer, LayerKind, Offset, ScaleLevel, Scheme, group

ROLES: Final = (
    "weight", "weight_scale", "weight_zero_point", "weight_scale_2", "weight_zero_point_2", "input_scale",
    "input_zero_point", "input_scale_2", "output_scale", "output_zero_point", "bias", "bias_scale", "bias_zero_point",
)
_CODE_DTYPES: Final = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2")
_E8M0: Final = ("U8", "F8_E8M0")
_SCALAR: Final = ((), (1,))
_NOT_STORABLE: Final = ("mx6", "mx9", "bfp16")
_ONLINE: Final = (".input_rotation", ".input_prescale")  # ends of tensor names that a run-time rotation leaves
_SVDQUANT: Final = (".correction.l1.weight", ".correction.l2.weight", ".smooth_factor")
_WRONG_CONFIG: Final = "use the config.json that was written with these weights"


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


# --- the layers ----------------------------------------------------------------------------------------------------

def quantized_layers(contents: Contents, config: Config) -> dict[str, Layer]:
    """Layers with codes; raises Unsupported or Inconsistent, naming the module, where one cannot be read."""
    _refuse_run_time_parts(contents, config)
    choice = _Choice(config)
    layers = {}
    for name, info in contents.tensors.items():
        module, _, leaf = name.rpartition(".")
        has_scale = f"{module}.weight_scale" in contents.tensors
        if leaf == "weight" and (info.dtype in _CODE_DTYPES or (has_scale and info.dtype not in FLOAT_DTYPES)):
            layers[module] = _layer(contents, module, config, choice)
        elif leaf == "weight" and has_scale:
            raise Unsupported("an unquantized weight beside a scale", where=module, found=info.dtype,
                              wanted=" · ".join(_CODE_DTYPES), remedy="export the model again as real_quantized")
    return layers


def _layer(contents: Contents, name: str, config: Config, choice: _Choice) -> Layer:
    need(contents, f"{name}.weight_scale", name)
    found = {role: info for role in ROLES if (info := contents.tensors.get(f"{name}.{role}")) is not None}
    module = Module(contents, name, config, found)
    weight = found["weight"]
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise Unsupported("codes that are no matrix", where=weight.name, found=str(list(weight.shape)),
                          wanted="[rows, columns]", remedy="export the experts one by one, as Quark does")
    chosen, fit = choice.fitting(module)
    _check_outputs(module, chosen, choice)
    _check_small_tensors(module, fit.shape[0])
    is_embedding = name.rpartition(".")[2] in EMBEDDINGS
    kind: LayerKind = "embedding" if is_embedding else "linear"
    activation, roles, remark = input_spec(() if is_embedding else chosen.inputs, found)
    for role in roles:
        expect_shape(found[role], *_SCALAR)
        expect_dtype(found[role], *(("I8", "U8", "I32") if role.endswith("zero_point") else FLOAT_DTYPES))
    scheme = Scheme(fit.element, fit.scales, "code_first" if fit.is_code_first else "scales_first", fit.offset,
                    activation=activation)
    names = {role: info.name for role, info in found.items()}
    storage = {"codes": fit.codes, "order": fit.order, "zeros": fit.zeros, "activation": roles,
               "has_transposed_scales": fit.has_transposed_scales}
    notes = (remark,) if remark else ()
    return Layer(name, kind, fit.shape, scheme, names, storage, contents.bytes_of(*names.values()), notes)


def _check_small_tensors(module: Module, rows: int) -> None:
    bias, scale = module.tensors.get("bias"), module.tensors.get("bias_scale")
    if bias is None:
        return
    expect_shape(bias, (rows,))
    expect_dtype(bias, *(FLOAT_DTYPES if scale is None else ("I8", "U8", "I32", "F8_E4M3")))
    if scale is not None:
        expect_dtype(scale, *FLOAT_DTYPES)
        for role in ("bias_scale", "bias_zero_point"):
            if role in module.tensors:
                expect_shape(module.tensors[role], (), (1,), (rows,))


def _check_outputs(module: Module, chosen: LayerConfig, choice: _Choice) -> None:
    """Refuse quantized outputs that are neither the key-value cache's nor the attention's queries (§8)."""
    if not chosen.outputs:
        return
    spec = chosen.outputs[0]
    is_fp8 = len(chosen.outputs) == 1 and (spec.dtype, spec.qscheme, spec.dynamic) == ("fp8_e4m3", "per_tensor", False)
    is_attention = choice.is_cache(module.name) or module.name.endswith("q_proj")
    if not (is_fp8 and is_attention):
        raise Unsupported("quantized outputs outside the key-value cache", where=module.name,
                          found=f"output_tensors {' + '.join(map(str, chosen.outputs))}",
                          wanted="fp8_e4m3 per_tensor, on the layers of export.kv_cache_group",
                          remedy="quantize the model without output_tensors")


def _refuse_run_time_parts(contents: Contents, config: Config) -> None:
    """Refuse by name what a runtime would have to apply beside the weights (§10)."""
    for name in contents.tensors:
        if name.endswith(_ONLINE) or name.rpartition(".")[2].startswith("shared_input_rotation"):
            raise Unsupported("rotation: online rotations are applied at run time and not read", where=name,
                              found=name.rpartition(".")[2], wanted="offline rotations only (r1, r2)",
                              remedy="quantize the model without them")
        if name.endswith(_SVDQUANT):
            raise Unsupported("svdquant: a weight plus a low-rank branch is not read", where=name,
                              found=name.rpartition(".")[2], wanted="weights that stand alone",
                              remedy="quantize the model without svdquant")
    if config.unknown_algorithms:
        _refuse_extra_tensors(contents, config.unknown_algorithms)


def _refuse_extra_tensors(contents: Contents, algorithms: tuple[str, ...]) -> None:
    """Refuse an unknown algorithm that left tensors of its own beside quantized weights."""
    for name in contents.tensors:
        module, _, leaf = name.rpartition(".")
        if f"{module}.weight_scale" in contents.tensors and leaf not in ROLES:
            raise Unsupported("an unknown algorithm left tensors of its own", where=name,
                              found=f"algo_config {' · '.join(algorithms)}"[:80], wanted=" · ".join(ROLES),
                              remedy="a newer anybit may read it")


# --- which layer config a module has -------------------------------------------------------------------------------

class _Choice:
    """Layer configs in the order in which a module may have them; compiled once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.names = tuple(config.layers)
        self.patterns = Patterns.fnmatch(self.names, where="quantization_config.layer_quant_config")
        self.cache = Patterns.fnmatch(config.kv_patterns, where="quantization_config.export.kv_cache_group")

    def is_cache(self, module: str) -> bool:
        return any(self.cache.first(name) is not None for name in _spellings(module))

    def fitting(self, module: Module) -> tuple[LayerConfig, Fit]:
        """The first config that fits; of one tier those first whose inputs agree with the stored input scales."""
        tried = []
        has_input_scale = any(role in module.tensors for role in ("input_scale", "input_scale_2"))
        for tier in self._tiers(module.name):
            fits = []
            for candidate in tier:
                fit = _fit(module, candidate.weight)
                if isinstance(fit, str):
                    tried.append(f"{candidate.name}: {fit}")
                else:
                    fits.append((candidate, fit))
            agreeing = [found for found in fits if asks_for_scales(found[0].inputs) == has_input_scale]
            if fits:
                return (agreeing or fits)[0]
        raise _no_fit(module, tried)

    def _tiers(self, module: str) -> Iterator[list[LayerConfig]]:
        """Exact name, patterns in file order, layer type, global."""
        spellings = _spellings(module)
        yield [self.config.layers[name] for name in spellings if name in self.config.layers]
        matching = sorted({index for name in spellings for index in self.patterns.all(name)})
        yield [self.config.layers[self.names[index]] for index in matching]
        type_name = "Embedding" if module.rpartition(".")[2] in EMBEDDINGS else "Linear"
        yield [self.config.types[type_name]] if type_name in self.config.types else []
        yield [self.config.default]


def _spellings(module: str) -> tuple[str, ...]:
    """The name as stored, and with a leading "model." removed or added."""
    return module, module.removeprefix("model.") if module.startswith("model.") else f"model.{module}"


def _no_fit(module: Module, tried: list[str]) -> Unsupported | Inconsistent:
    stored = " · ".join(f"{role} {info.dtype} {list(info.shape)}" for role, info in module.tensors.items()
                        if role.startswith("weight"))
    refused = next((reason for reason in tried if _REFUSED in reason), "")
    if refused:
        return Unsupported(refused.partition(_REFUSED)[2], where=module.name, found=stored,
                           wanted=" · ".join(sorted({dtype for dtype, _ in LAYOUTS})), more=tried[:8],
                           remedy="quantize the model in a format that Quark can export")
    return Inconsistent("no layer config fits the stored tensors", where=module.name, found=stored,
                        wanted=" | ".join(tried)[:1000] or "a layer config", remedy=_WRONG_CONFIG)


# --- one weight under the stages of one layer config ---------------------------------------------------------------

_REFUSED: Final = "refused: "  # before a reason that no other file could mend


def _fit(module: Module, stages: Stages) -> Tried:
    if not stages:
        return "its weight is not quantized"
    first = stages[0]
    if len(stages) == 2:
        layout = TWO_STAGES.get((first.dtype, stages[1].dtype))
        if layout is None:
            return f"{_REFUSED}unknown stages {first} + {stages[1]}"
        return layout(module, first, stages[1])
    if len(stages) > 2:
        return f"{_REFUSED}{len(stages)} stages"
    if first.dtype in _NOT_STORABLE:
        return f"{_REFUSED}element format not storable: {first.dtype}"
    if first.dtype == "mx":
        return _mx(module, first)
    made = LAYOUTS.get((first.dtype, first.qscheme))
    return made(module, first) if made is not None else f"{_REFUSED}no layout of {first}"


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
    return CHANNEL if spec.axis in (0, None) else f"{_REFUSED}scales along axis {spec.axis} of a weight"


def _plain_shapes(shape: tuple[int, int], block: Block) -> tuple[tuple[int, ...], ...]:
    return _SCALAR if block == TENSOR else ((shape[0],), (shape[0], 1))


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

_ZEROS_MISSING: Final = "zero points are missing"


def _zero_point(module: Module, spec: Spec, block: Block, *shapes: tuple[int, ...], role: str = "weight_zero_point",
                kind: str, element: str = "") -> tuple[Offset | None, str] | str:
    """(offset, how it is stored) of an integer weight; all-zero tensors of symmetric signed codes are no offset."""
    dtypes = {"words": ("I32",), "plain": ("I8", "U8", "I32"), "bytes": ("U8",), "integers": ("I32", "I8", "F32")}[kind]
    problem = _missing(module, role, dtypes, *shapes)
    if problem:
        return problem
    if spec.symmetric and spec.dtype.startswith("int"):
        return None, kind
    return Offset("zero_point", element or spec.dtype, block), kind


def _integer(module: Module, spec: Spec, shape: tuple[int, int], block: Block, codes: str, order: str,
             zero: tuple[Offset | None, str] | str) -> Tried:
    if isinstance(zero, str):
        return zero
    is_transposed = codes.endswith("_transposed")
    return Fit(shape, spec.dtype, (_level(module, block),), codes, order, is_transposed, *zero)


def _int8(module: Module, spec: Spec) -> Tried:
    block = _plain_block(spec)
    if isinstance(block, str):
        return block
    shape = module.matrix
    shapes = _plain_shapes(shape, block)
    problem = _codes_are(module, "I8", "U8") or _missing(module, "weight_scale", tuple(FLOAT_DTYPES), *shapes)
    if problem:
        return problem
    if "weight_zero_point" not in module.tensors:
        is_symmetric = spec.symmetric and spec.dtype == "int8"
        return _integer(module, spec, shape, block, "int8", "", (None, "") if is_symmetric else _REFUSED + _ZEROS_MISSING)
    return _integer(module, spec, shape, block, "int8", "", _zero_point(module, spec, block, *shapes, kind="plain"))


def _int8_groups(module: Module, spec: Spec) -> Tried:
    """Stored [K, N], scales [K/g, N]."""
    columns, rows = module.matrix
    size = _size(spec, columns)
    stored = (-(-columns // size), rows)
    problem = _codes_are(module, "I8", "U8") or _missing(module, "weight_scale", tuple(FLOAT_DTYPES), stored)
    if not problem and "weight_zero_point" not in module.tensors:
        problem = _REFUSED + _ZEROS_MISSING
    return problem or _integer(module, spec, (rows, columns), group(size), "int8_transposed", "",
                               _zero_point(module, spec, group(size), stored, kind="plain"))


def _int4_groups(module: Module, spec: Spec) -> Tried:
    """Words [K, N/8] along N; without zero points the file-to-file writer's, in order, its scales [N, K/g] (§5)."""
    problem = _codes_are(module, "I32")
    if problem:
        return problem
    if "weight_zero_point" not in module.tensors:
        return _int4_groups_file_to_file(module, spec)
    columns, words = module.matrix
    scale = module.shape("weight_scale") or ()
    size = _size(spec, columns)
    rows = scale[1] if len(scale) == 2 else 8 * words
    groups = -(-columns // size)
    problem = _missing(module, "weight_scale", tuple(FLOAT_DTYPES), (groups, rows))
    if not problem and words != -(-rows // 8):
        problem = f"weight has {words} words a row, wanted {-(-rows // 8)}"
    return problem or _integer(module, spec, (rows, columns), group(size), "int4_transposed", module.config.pack_method,
                               _zero_point(module, spec, group(size), (groups, words), kind="words"))


def _int4_groups_file_to_file(module: Module, spec: Spec) -> Tried:
    if spec.dtype != "int4" or not spec.symmetric:
        return _REFUSED + _ZEROS_MISSING
    columns, words = module.matrix
    scale = module.shape("weight_scale") or ()
    size = _size(spec, columns)
    shape = (scale[0] if len(scale) == 2 else 8 * words, columns)
    problem = _missing(module, "weight_scale", tuple(FLOAT_DTYPES), _grid(shape, group(size)))
    if not problem and words != -(-shape[0] // 8):
        problem = f"weight has {words} words a row, wanted {-(-shape[0] // 8)}"
    return problem or Fit(shape, "int4", (_level(module, group(size)),), "int4_transposed", "order")


def _int4(module: Module, spec: Spec) -> Tried:
    """One scale, or one for each row: words [N, K/8] along K, zero points packed along N."""
    block = _plain_block(spec)
    if isinstance(block, str):
        return block
    rows, words = module.matrix
    shape = (rows, 8 * words)
    problem = _codes_are(module, "I32") or _missing(module, "weight_scale", tuple(FLOAT_DTYPES),
                                                    *_plain_shapes(shape, block))
    if problem:
        return problem
    zero: tuple[Offset | None, str] | str
    order = module.config.pack_method
    if "weight_zero_point" not in module.tensors:
        is_symmetric = spec.symmetric and spec.dtype == "int4"
        zero = (None, "") if is_symmetric else _REFUSED + _ZEROS_MISSING
    elif block == TENSOR:  # one plain value, not packed
        zero = _zero_point(module, spec, block, *_SCALAR, kind="plain")
    else:
        zero = _zero_point(module, spec, block, (-(-rows // 8),), kind="words")
    return _integer(module, spec, shape, block, "int4", order, zero)


def _uint2_groups(module: Module, spec: Spec) -> Tried:
    """Bytes [K, N/4] along N, first code in the top bits."""
    columns, width = module.matrix
    scale = module.shape("weight_scale") or ()
    rows = scale[1] if len(scale) == 2 else 4 * width
    size = _size(spec, columns)
    groups = -(-columns // size)
    problem = _codes_are(module, "U8") or _missing(module, "weight_scale", tuple(FLOAT_DTYPES), (groups, rows))
    if not problem and width != -(-rows // 4):
        problem = f"weight has {width} bytes a row, wanted {-(-rows // 4)}"
    if problem:
        return problem
    if "weight_zero_point" not in module.tensors:
        return _REFUSED + _ZEROS_MISSING
    if module.dtype("weight_zero_point") == "U8":
        zero = _zero_point(module, spec, group(size), (groups, width), kind="bytes")
    else:  # float zero points, already truncated to integers, and not bound to two bits
        zero = _zero_point(module, spec, group(size), (groups, rows), kind="integers", element="float32")
    return _integer(module, spec, (rows, columns), group(size), "uint2_transposed", "", zero)


def _int2_groups(module: Module, spec: Spec) -> Tried:
    """Words [K, N], one code each."""
    columns, rows = module.matrix
    size = _size(spec, columns)
    stored = (-(-columns // size), rows)
    problem = _codes_are(module, "I32") or _missing(module, "weight_scale", tuple(FLOAT_DTYPES), stored)
    if not problem and "weight_zero_point" not in module.tensors:
        problem = _REFUSED + _ZEROS_MISSING
    return problem or _integer(module, spec, (rows, columns), group(size), "int2_transposed", "",
                               _zero_point(module, spec, group(size), stored, kind="integers", element="float32"))


def _int3(module: Module, spec: Spec) -> Tried:
    """Bytes [N, 3K/8] along K: 8 codes in 3 bytes."""
    block = _plain_block(spec)
    if isinstance(block, str):
        return block
    rows, width = module.matrix
    if width % 3:
        return f"weight has {width} bytes a row, wanted a multiple of 3"
    shape = (rows, 8 * width // 3)
    problem = _codes_are(module, "U8") or _missing(module, "weight_scale", tuple(FLOAT_DTYPES), (rows,))
    if problem or "weight_zero_point" not in module.tensors:
        is_symmetric = spec.symmetric
        return problem or _integer(module, spec, shape, block, "int3", "",
                                   (None, "") if is_symmetric else _REFUSED + _ZEROS_MISSING)
    packed = (-(-rows // 8) * 3,)
    return _integer(module, spec, shape, block, "int3", "", _zero_point(module, spec, block, packed, kind="bytes"))


def _int3_groups(module: Module, spec: Spec) -> Tried:
    return f"{_REFUSED}int3 per_group: no Quark can write it"


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
            return f"{_REFUSED}dtype mx without mx_element_dtype: not four bits, and of six there are two kinds"
        dtype = "fp4"
    if dtype not in _ELEMENTS:
        return f"{_REFUSED}element format not storable: mx of {dtype}"
    element, codes, width = _ELEMENTS[dtype]
    if stored % width:
        return f"weight has {stored} bytes a row, wanted a multiple of {width}"
    shape = (rows, stored * codes // width)
    problem = _codes_are(module, "U8") or _missing(module, "weight_scale", ("U8", "I8"), _grid(shape, group(size)))
    return problem or Fit(shape, element, (ScaleLevel("e8m0", group(size)),), "fp4" if dtype == "fp4" else "fp6_planes",
                          order="signed_exponents")


# --- two stages ----------------------------------------------------------------------------------------------------

def _fp4_global(module: Module, first: Spec, second: Spec) -> Tried:
    """NVFP4 and AMDFP4 under a global scale: code * (scale of the group * one number)."""
    rows, stored = module.matrix
    shape = (rows, 2 * stored)
    block = group(_size(first, shape[1]))
    format, dtype = {"fp8_e4m3": ("fp8_e4m3fn", "F8_E4M3"), "fp8_e5m3": ("ue5m3", "U8")}[second.dtype]
    problem = (_codes_are(module, "U8") or _missing(module, "weight_scale", (dtype,), _grid(shape, block))
               or _missing(module, "weight_scale_2", tuple(FLOAT_DTYPES), *_SCALAR))
    levels = ScaleLevel(format, block), _level(module, TENSOR, "weight_scale_2")
    return problem or Fit(shape, "fp4_e2m1", levels, "fp4")


def _int4_under_fp8(module: Module, first: Spec, second: Spec) -> Tried:
    """((q - z2) * s2[n]) * s1: int4 by row whose values would be fp8, never rounded to it."""
    if (first.qscheme, second.qscheme) != ("per_tensor", "per_channel"):
        return f"{_REFUSED}unknown stages {first} + {second}"
    rows, words = module.matrix
    problem = (_codes_are(module, "I32") or _missing(module, "weight_scale", tuple(FLOAT_DTYPES), *_SCALAR)
               or _missing(module, "weight_scale_2", tuple(FLOAT_DTYPES), (rows,), (rows, 1)))
    if problem:
        return problem
    zero: tuple[Offset | None, str] | str = (None, "")  # file-to-file exports store none: 0
    if "weight_zero_point_2" in module.tensors:
        zero = _zero_point(module, second, CHANNEL, (-(-rows // 8),), role="weight_zero_point_2", kind="words")
    elif not second.symmetric:
        zero = _REFUSED + _ZEROS_MISSING
    if isinstance(zero, str):
        return zero
    levels = _level(module, CHANNEL, "weight_scale_2"), _level(module, TENSOR)
    return Fit((rows, 8 * words), second.dtype, levels, "int4", module.config.pack_method, False, *zero, is_code_first=True)


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
