"""The layers of a ModelOpt checkpoint as tensor headers tell them: algorithm, layout, shape, scheme; torch-free.

An algorithm is a line of `ALGORITHMS`, a layout one function that checks dtypes and shapes and gives the scheme.
Rules: docs/formats/modelopt.md §2-§7, §9, §10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need, need_all
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.checkpoints.dialects import plain
from anybit.checkpoints.dialects._shared.modelopt_config import LayerRule, Settings
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Inconsistent, Unsupported
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Block, Layer, LayerKind, ScaleLevel, Scheme, group

_CODE_DTYPES: Final = ("F8_E4M3", "U8", "I8")
_E8M0: Final = ("U8", "F8_E8M0")
_SCALAR: Final = ((), (1,))
_BLOCK_ROWS: Final = 128  # FP8_PB_WO: blocks of 128 x 128


def layers_with_codes(contents: Contents, settings: Settings) -> dict[str, Layer]:
    """The quantized layers; raises Unsupported or Inconsistent, naming the module, where one cannot be read."""
    _refuse_svdquant(contents, settings)
    modules = [_Module(contents, *found) for found in _modules_with_codes(contents)]
    is_excluded = _exclusion(settings)
    layers = {}
    for module in modules:
        layers[module.name] = _layer(module, settings, excluded=is_excluded(module.name))
    return layers


def _exclusion(settings: Settings) -> Callable[[str], bool]:
    """Whether a wildcard of the config names a module."""
    patterns = Patterns.fnmatch(settings.exclude, where="quantization_config.ignore")
    return lambda module: patterns.first(module) is not None


def _modules_with_codes(contents: Contents) -> list[tuple[str, bool]]:
    """(name, is a stack of experts) of all weights in a code dtype; those without their scales are refused."""
    modules = []
    scales = []
    for name, info in contents.tensors.items():
        if info.dtype not in _CODE_DTYPES:
            if info.dtype.startswith("F8_") and len(info.shape) >= 2:
                raise Unsupported("a weight in a dtype that no known ModelOpt writes", where=name, found=info.dtype,
                                  wanted=" · ".join(_CODE_DTYPES), remedy="export the model again")
        elif name.endswith(".weight"):
            module = name.removesuffix(".weight")
            if f"{module}.weight_scale_inv" not in contents.tensors:
                scales.append(f"{module}.weight_scale")
            modules.append((module, False))
        elif f"{name}_weight_scale" in contents.tensors or (len(info.shape) == 3 and not name.endswith("_scale")):
            scales.append(f"{name}_weight_scale")
            modules.append((name, True))
    need_all(contents, scales)
    return modules


def _refuse_svdquant(contents: Contents, settings: Settings) -> None:
    tensor = next((name for name in contents.tensors if "svdquant_lora" in name), "")
    if tensor or settings.algorithm == "NVFP4_SVD":
        raise Unsupported("NVFP4_SVD (SVDQuant): a weight plus a low-rank branch is not read",
                          where=tensor or "quant_algo", found=settings.algorithm or "svdquant_lora tensors",
                          wanted=" · ".join(ALGORITHMS), remedy="export the model as NVFP4")


# --- one module ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Module:
    """A module with codes: M.weight, M.weight_scale, ...; of stacked experts P, P_weight_scale, ... ."""

    contents: Contents
    name: str
    stacked: bool

    def tensor_name(self, role: str) -> str:
        if self.stacked:
            return self.name if role == "weight" else f"{self.name}_{role}"
        return f"{self.name}.{role}"

    def tensor(self, role: str) -> TensorInfo | None:
        return self.contents.tensors.get(self.tensor_name(role))

    def need(self, role: str) -> TensorInfo:
        return need(self.contents, self.tensor_name(role), self.name)

    def codes(self, *dtypes: str) -> tuple[int, ...]:
        """Shape of the code tensor, [rows, columns] or [E, in, out] as stored, its dtype and rank checked."""
        info = self.need("weight")
        expect_dtype(info, *dtypes)
        if len(info.shape) != (3 if self.stacked else 2) or 0 in info.shape:
            raise Unsupported("codes of an unknown rank", where=info.name, found=str(list(info.shape)),
                              wanted="[E, in, out]" if self.stacked else "[rows, columns]",
                              remedy="export the model again with a current ModelOpt")
        return info.shape

    def scale(self, dtypes: tuple[str, ...], *shapes: tuple[int, ...], role: str = "weight_scale") -> TensorInfo:
        info = self.need(role)
        expect_dtype(info, *dtypes)
        expect_shape(info, *shapes)
        return info


@dataclass(frozen=True)
class _Weight:
    """What a layout's function found: the weight half of a Layer. `group_size` 0 where scales are not by group."""

    shape: tuple[int, ...]
    element: str
    levels: tuple[ScaleLevel, ...]
    codes: str
    group_size: int = 0
    renamed: Mapping[str, str] | None = None


def _layer(module: _Module, settings: Settings, *, excluded: bool) -> Layer:
    rule = settings.rule_for(module.name)
    algorithm = _algorithm(module, rule)
    weight = algorithm.read(module)
    assert rule is not None
    if rule.group_size and weight.group_size and rule.group_size != weight.group_size:
        raise Inconsistent("the declared group size and the stored scales disagree", where=module.name,
                           found=f"group_size {rule.group_size} · {weight.group_size} by the shapes",
                           wanted="the same group size", remedy="use the config files written with these weights")
    activation = _activation(module, algorithm, weight, settings)
    names = {role: module.tensor_name(role) for role in _ROLES if module.tensor(role) is not None}
    names |= weight.renamed or {}
    _check_companions(module, weight.shape)
    scheme = Scheme(weight.element, weight.levels, pre_scale="pre_quant_scale" in names, activation=activation)
    notes = ("the config lists it as unquantized; the tensors decide",) if excluded else ()
    kind: LayerKind = "linear"
    if module.stacked:
        kind = "experts"
    elif module.name.rpartition(".")[2] in plain.EMBEDDINGS:
        kind = "embedding"
    return Layer(module.name, kind, weight.shape, scheme, names, {"codes": weight.codes},
                 module.contents.bytes_of(*names.values()), notes)


def _algorithm(module: _Module, rule: LayerRule | None) -> Algorithm:
    if rule is None or not rule.algorithm:
        raise Inconsistent("codes in a module that the config does not call quantized", where=module.name,
                           found=module.need("weight").dtype, wanted="a quant_algo that covers it",
                           remedy="use the config files written with these weights")
    found = ALGORITHMS.get(rule.algorithm)
    if found is None:
        raise Unsupported(f"the algorithm {rule.algorithm} is not read", where=module.name, found=rule.algorithm,
                          wanted=" · ".join(ALGORITHMS), remedy="export the model with one of these")
    return found


def _activation(module: _Module, algorithm: Algorithm, weight: _Weight, settings: Settings) -> ActivationSpec | None:
    """The recipe of the inputs; its static scale must be there. Groups of NVFP4 inputs are those of the weight."""
    spec = algorithm.activation
    if spec is None or (settings.weight_only and spec.recipe == "nvfp4_reciprocal"):
        return None
    if spec.recipe in _STATIC_RECIPES:
        module.scale(("F32",), *_SCALAR, role="input_scale")
    return replace(spec, group_size=weight.group_size) if spec.recipe == "nvfp4_reciprocal" else spec


def _check_companions(module: _Module, shape: tuple[int, ...]) -> None:
    """Shapes of the bias and of the vector that multiplies the input."""
    for role, wanted in (("bias", (*shape[:-2], shape[-2])), ("pre_quant_scale", shape[-1:])):
        if (info := module.tensor(role)) is not None:
            expect_dtype(info, *FLOAT_DTYPES)
            expect_shape(info, wanted)


_ROLES: Final = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "bias")
_STATIC_RECIPES: Final = ("fp8_static", "fp8_static_divide", "int8_static_divide", "nvfp4_reciprocal")


# --- layouts ---------------------------------------------------------------------------------------------------------

def _grouped(module: _Module, columns: int, groups: int) -> int:
    """The group size that the shapes tell."""
    if groups == 0 or columns % groups:
        raise Inconsistent("the scales do not divide the inputs into groups", where=module.tensor_name("weight_scale"),
                           found=f"{groups} scales for {columns} inputs", wanted="whole groups",
                           remedy="the file is damaged: download it again")
    return columns // groups


def _fp8_tensor(module: _Module) -> _Weight:
    shape = module.codes("F8_E4M3")
    module.scale(("F32",), *_SCALAR)
    return _Weight(_out_first(module, shape), "fp8_e4m3fn", (ScaleLevel("float32", TENSOR),), "fp8")


def _fp8_channel(module: _Module) -> _Weight:
    """A scale a row; in stacks, despite the algorithm's name, a scale an expert (§7)."""
    shape = module.codes("F8_E4M3")
    module.scale(("F32",), shape[:1])
    level = ScaleLevel("float32", TENSOR if module.stacked else CHANNEL)
    return _Weight(_out_first(module, shape), "fp8_e4m3fn", (level,), "fp8")


def _fp8_blocks(module: _Module) -> _Weight:
    """Blocks of 128 x 128: [rows, 1, columns, 1], 0-d for a single block, or DeepSeek's 2-d `weight_scale_inv`."""
    _refuse_stacked(module)
    rows, columns = module.codes("F8_E4M3")
    down, across = -(-rows // _BLOCK_ROWS), -(-columns // _BLOCK_ROWS)
    shapes: tuple[tuple[int, ...], ...] = ((down, 1, across, 1), (down, across))
    if down == across == 1:
        shapes = (*shapes, *_SCALAR)
    role = "weight_scale" if module.tensor("weight_scale") is not None else "weight_scale_inv"
    module.scale(("F32",), *shapes, role=role)
    level = ScaleLevel("float32", (_BLOCK_ROWS, _BLOCK_ROWS))
    return _Weight((rows, columns), "fp8_e4m3fn", (level,), "fp8", renamed={"weight_scale": module.tensor_name(role)})


def _mxfp8(module: _Module) -> _Weight:
    shape = module.codes("F8_E4M3")
    return _mx(module, shape, "fp8_e4m3fn", "fp8")


def _mxfp4(module: _Module) -> _Weight:
    *rows, packed = module.codes("U8")
    return _mx(module, (*rows, packed * 2), "fp4_e2m1", "fp4_along_n" if module.stacked else "fp4")


def _mx(module: _Module, shape: tuple[int, ...], element: str, codes: str) -> _Weight:
    """Groups of 32 along the last stored dimension: K of a matrix, but N of stacked experts (§7)."""
    scale = module.need("weight_scale")
    size = _grouped(module, shape[-1], scale.shape[-1] if scale.shape else 0)
    module.scale(_E8M0, (*shape[:-1], shape[-1] // 32))
    block: Block = (size, 1) if module.stacked else group(size)
    return _Weight(_out_first(module, shape), element, (ScaleLevel("e8m0", block),), codes, size)


def _nvfp4(module: _Module) -> _Weight:
    shape = module.codes("U8")
    axis = 1  # the packed dimension: in of stacks, K of matrices
    columns = shape[axis] * 2
    scale = module.need("weight_scale")
    size = _grouped(module, columns, scale.shape[axis] if len(scale.shape) == len(shape) else 0)
    module.scale(("F8_E4M3",), (shape[0], columns // size, *shape[2:]))
    module.scale(("F32",), *_SCALAR, role="weight_scale_2")
    levels = (ScaleLevel("fp8_e4m3fn", group(size)), ScaleLevel("float32", TENSOR))
    return _Weight(_out_first(module, (shape[0], columns, *shape[2:])), "fp4_e2m1", levels, "fp4", size)


def _int4_row_pairs(module: _Module) -> _Weight:
    """Rows 2i and 2i+1 share a byte, K is not packed; W4A8_AWQ's weight_scale_2 is no part of the weight (§3)."""
    _refuse_stacked(module)
    pairs, columns = module.codes("U8")
    scale = module.need("weight_scale")
    size = _grouped(module, columns, scale.shape[-1] if scale.shape else 0)
    module.scale(("F32",), (pairs * 2, columns // size))
    level = ScaleLevel("float32", group(size))
    return _Weight((pairs * 2, columns), "int4", (level,), "int4_row_pairs", size)


def _int8_channel(module: _Module) -> _Weight:
    _refuse_stacked(module)
    rows, columns = module.codes("I8")
    module.scale(("F32",), (rows,))
    return _Weight((rows, columns), "int8", (ScaleLevel("float32", CHANNEL),), "int8")


def _out_first(module: _Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The canonical shape: stacks are stored [E, in, out]."""
    return (shape[0], shape[2], shape[1]) if module.stacked else shape


def _refuse_stacked(module: _Module) -> None:
    if module.stacked:
        raise Unsupported("stacked experts that no known export writes", where=module.name,
                          found=str(list(module.need("weight").shape)), wanted="experts one by one",
                          remedy="export the model with experts one by one")


# --- algorithms ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Algorithm:
    """One quant_algo: how its weight lies and how its inputs are quantized."""

    read: Callable[[_Module], _Weight]
    activation: ActivationSpec | None = None


_FP8: Final = "fp8_e4m3fn"
_FP8_DIVIDE: Final = ActivationSpec(_FP8, False, "tensor", "fp8_static_divide")
_FP8_GROUP: Final = ActivationSpec(_FP8, True, "group", "fp8_group_divide", 128)
_NVFP4: Final = ActivationSpec("fp4_e2m1", True, "group", "nvfp4_reciprocal", 16)

# quant_algo in upper case -> layout (§3) and activation recipe (§10)
ALGORITHMS: Final[Mapping[str, Algorithm]] = {
    "FP8": Algorithm(_fp8_tensor, ActivationSpec(_FP8, False, "tensor", "fp8_static")),
    "FP8_PER_CHANNEL_PER_TOKEN": Algorithm(_fp8_channel, ActivationSpec(_FP8, True, "token", "fp8_token")),
    "FP8_PB_WO": Algorithm(_fp8_blocks, _FP8_GROUP),
    "FP8_PB_REAL": Algorithm(_fp8_blocks, _FP8_GROUP),
    "FP8_BLOCK_SCALES": Algorithm(_fp8_blocks, _FP8_GROUP),  # vLLM's name inside MIXED_PRECISION
    "MXFP8": Algorithm(_mxfp8, ActivationSpec(_FP8, True, "group", "mxfp8_log2", 32)),
    "NVFP4": Algorithm(_nvfp4, _NVFP4),
    "NVFP4_AWQ": Algorithm(_nvfp4, _NVFP4),
    "W4A16_NVFP4": Algorithm(_nvfp4),
    "W4A8_NVFP4_FP8": Algorithm(_nvfp4, _FP8_DIVIDE),
    "MXFP4": Algorithm(_mxfp4),
    "W4A8_MXFP4_FP8": Algorithm(_mxfp4, ActivationSpec(_FP8, True, "tensor", "fp8_tensor")),
    "W4A16_AWQ": Algorithm(_int4_row_pairs),
    "W4A8_AWQ": Algorithm(_int4_row_pairs, _FP8_DIVIDE),
    "W8A8_SQ_PER_CHANNEL": Algorithm(_int8_channel, ActivationSpec("int8", False, "tensor", "int8_static_divide")),
    "W8A16": Algorithm(_int8_channel),
}
