"""The tensors of one compressed-tensors module as its headers tell them: storage, shape, scheme; torch-free.

`Module.layer` turns a module's headers and its config group into a Layer; `choose_packings` settles the one question
that a module alone may leave open. Rules: docs/formats/compressed_tensors.md §1, §3, §4.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from anybit.checkpoints.checks import expect_dtype, expect_shape, need
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.checkpoints.dialects import plain
from anybit.checkpoints.dialects._shared.compressed_tensors_activations import input_spec, output_spec
from anybit.checkpoints.dialects._shared.compressed_tensors_config import Args, Config, Group
from anybit.errors import Damaged, Inconsistent, LimitExceeded, Unsupported
from anybit.limits import MAX_DIM
from anybit.schemes import CHANNEL, TENSOR, Block, Layer, Offset, ScaleLevel, Scheme, group

_E8M0: Final = ("U8", "F8_E8M0")
_ODD_BITS: Final = (3, 5, 6, 7)  # widths whose dense and padded packings differ
_FP4_OF_0_13: Final = (0, 13)  # the version that stored MXFP4 exponents 2 too small


@dataclass(frozen=True)
class Module:
    """A module with codes and its group: everything that its headers tell, computed on demand."""

    contents: Contents
    name: str
    group: Group
    config: Config
    remarks: tuple[str, ...] = ()
    packing: str = ""

    @property
    def weights(self) -> Args:
        """The args of the group's weights."""
        assert self.group.weights is not None  # Targets gives groups with weights only
        return self.group.weights

    def tensor(self, leaf: str) -> TensorInfo | None:
        """The module's tensor called so, if the files hold it."""
        return self.contents.tensors.get(f"{self.name}.{leaf}")

    def need(self, leaf: str) -> TensorInfo:
        """The module's tensor called so; raises Inconsistent without it."""
        return need(self.contents, f"{self.name}.{leaf}", self.name)

    def kind(self) -> str:
        """Which storage the tensors are, a key of `_STORAGES`; the config's format is not asked."""
        packed, scale = self.tensor("weight_packed"), self.need("weight_scale")
        if packed is None:
            stored = self.need("weight")
            return "int8" if stored.dtype == "I8" else "mxfp8" if scale.dtype in _E8M0 else "fp8"
        if packed.dtype == "I32":
            return "words"
        expect_dtype(packed, "U8", "I32")
        if self.tensor("weight_global_scale") is not None or scale.dtype == "F8_E4M3":
            return "nvfp4"
        if len(scale.shape) == len(packed.shape) == 2 and scale.shape[1] * 8 == packed.shape[1]:
            return "nvfp4_e5m3"
        return "mxfp6" if self.weights.bits == 6 else "mxfp4"

    def layer(self) -> Layer:
        """The module as a Layer; raises Inconsistent or Unsupported with the module's name."""
        kind = self.kind()
        storage = _STORAGES[kind]
        if self.weights.type != storage.type or self.weights.bits not in storage.bits:
            raise Inconsistent(
                "config.json and the stored codes disagree", where=self.name,
                found=f"config group {self.group.name}: {self.weights} · tensors: {kind}",
                wanted=f"{storage.type} of {_range(storage.bits)} bits for these tensors",
                remedy="use the config.json that was written with these weights",
            )
        weight = storage.read(self)
        names = {leaf: f"{self.name}.{leaf}" for leaf in weight.leaves}
        activation, leaves, remark = input_spec(self.group.inputs)
        output, output_leaves, output_remark = output_spec(self.group.outputs)
        if kind == "nvfp4_e5m3" and activation is not None and activation.recipe == "nvfp4":
            activation, leaves = replace(activation, recipe="fp4_ue5m3_autoround"), ()
        notes = tuple(note for note in (*self.remarks, *self._notes(storage), remark, output_remark) if note)
        for leaf in (*leaves, *output_leaves):
            self._expect_static(leaf)
            names[leaf] = f"{self.name}.{leaf}"
        if (bias := self.tensor("bias")) is not None:
            expect_dtype(bias, *FLOAT_DTYPES)
            expect_shape(bias, (weight.shape[0],))
            names["bias"] = bias.name
        scheme = replace(weight.scheme, activation=activation, output=output)
        embedding = self.name.rpartition(".")[2] in plain.EMBEDDINGS
        return Layer(self.name, "embedding" if embedding else "linear", weight.shape, scheme, names, weight.storage,
                     self.contents.bytes_of(*names.values()), notes)

    def _expect_static(self, leaf: str) -> None:
        info = self.need(leaf)
        expect_dtype(info, *(("I8",) if leaf.endswith("zero_point") else tuple(FLOAT_DTYPES)))
        expect_shape(info, (1,), ())

    def _notes(self, storage: _Storage) -> tuple[str, ...]:
        notes = []
        named = self.group.format or self.config.format
        if named not in ("", "mixed-precision", *storage.formats):
            notes.append(f"config.json says format {named}; the tensors decide")
        if self.config.status not in ("", "compressed"):
            notes.append(f"config.json says quantization_status {self.config.status}; the tensors decide")
        if self.weights.symmetric and self.tensor("weight_zero_point") is not None:
            notes.append("config.json says symmetric, zero points are stored; the tensors decide")
        inputs = self.group.inputs
        if inputs is not None and (inputs.strategy, inputs.dynamic) == ("tensor", "dynamic"):
            notes.append("dynamic per-tensor activations run per token, as vLLM does")
        return tuple(notes)


@dataclass(frozen=True)
class _Weight:
    """What a storage's reader found: the weight half of a Layer."""

    shape: tuple[int, int]
    scheme: Scheme
    leaves: tuple[str, ...]
    storage: Mapping[str, object] = field(default_factory=dict)


def _range(bits: Collection[int]) -> str:
    return " or ".join(str(b) for b in bits) if len(bits) < 3 else f"{min(bits)} … {max(bits)}"


# --- scale grids ---------------------------------------------------------------------------------------------------

def _grid(module: Module, rows: int, columns: int) -> tuple[Block, tuple[tuple[int, ...], ...]]:
    """The block that shares a scale, and the shapes `weight_scale` may have (docs/formats/compressed_tensors.md §3)."""
    args = module.weights
    if args.strategy == "tensor":
        return TENSOR, ((1,), (), (1, 1))
    if args.strategy == "channel":
        return CHANNEL, ((rows, 1),)
    if args.strategy == "group":
        if columns % args.group_size:
            raise Unsupported("the group size does not divide the inputs", where=module.name,
                              found=f"K {columns}, group size {args.group_size}", wanted="whole groups",
                              remedy="quantize the model with a group size that divides K")
        return group(args.group_size), ((rows, columns // args.group_size),)
    if args.strategy == "block":
        down, across = args.block
        return args.block, ((-(-rows // down), -(-columns // across)),)
    raise Unsupported(f"weights with strategy {args.strategy}", where=module.name, found=str(args),
                      wanted="tensor, channel, group or block", remedy="quantize the model with one of these")


def _scale_level(module: Module, rows: int, columns: int) -> ScaleLevel:
    """The one level of an int or fp8 weight, its tensor's dtype and shape checked."""
    scale = module.need("weight_scale")
    expect_dtype(scale, *FLOAT_DTYPES)
    block, shapes = _grid(module, rows, columns)
    expect_shape(scale, *shapes)
    return ScaleLevel(FLOAT_DTYPES[scale.dtype], block)


def _blocks(level: ScaleLevel, rows: int, columns: int) -> tuple[int, int]:
    """Shape of the canonical scale tensor of a level."""
    down, across = level.block
    return -(-rows // (down or rows)), -(-columns // (across or columns))


# --- integer codes: int32 words, or one code an int8 ------------------------------------------------------------------

def _read_int8(module: Module) -> _Weight:
    stored = module.need("weight")
    rows, columns = _matrix(stored)
    level = _scale_level(module, rows, columns)
    leaves = ["weight", "weight_scale"]
    offset = _offset(module, level, leaves, ((_blocks(level, rows, columns)), (1,), ()), "I8")
    act_order = _act_order(module, columns, leaves)
    return _int_weight(module, (rows, columns), level, offset, act_order, leaves, {"codes": "int8"})


def _read_words(module: Module) -> _Weight:
    packed = module.need("weight_packed")
    rows, _ = _matrix(packed)
    columns = _columns_of_words(module)
    level = _scale_level(module, rows, columns)
    leaves = ["weight_packed", "weight_scale", "weight_shape"]
    shape = module.need("weight_shape")
    expect_dtype(shape, "I64", "I32")
    expect_shape(shape, (2,))
    words = _words(rows, module.weights.bits, module.packing)
    offset = _offset(module, level, leaves, ((words, _blocks(level, rows, columns)[1]),), "I32")
    act_order = _act_order(module, columns, leaves)
    storage = {"codes": "words", "packing": module.packing}
    return _int_weight(module, (rows, columns), level, offset, act_order, leaves, storage)


def _int_weight(
    module: Module, shape: tuple[int, int], level: ScaleLevel, offset: Offset | None, act_order: bool,
    leaves: list[str], storage: Mapping[str, object],
) -> _Weight:
    if act_order:
        level = replace(level, placement="gathered")
        offset = None if offset is None else replace(offset, placement="gathered")
    scheme = Scheme(f"int{module.weights.bits}", (level,), offset=offset, act_order=act_order)
    return _Weight(shape, scheme, tuple(leaves), {**storage, "bits": module.weights.bits})


def _matrix(info: TensorInfo) -> tuple[int, int]:
    if len(info.shape) != 2 or 0 in info.shape:
        raise Unsupported("codes that are no matrix", where=info.name, found=str(list(info.shape)), wanted="[N, K]",
                          remedy="write experts one by one, as every known exporter does")
    return info.shape[0], info.shape[1]


def _offset(
    module: Module, level: ScaleLevel, leaves: list[str], shapes: tuple[tuple[int, ...], ...], dtype: str
) -> Offset | None:
    """Zero points, where the file has them; the tensor decides, an asymmetric group without one is refused."""
    info = module.tensor("weight_zero_point")
    if info is None:
        if module.weights.symmetric:
            return None
        info = module.need("weight_zero_point")
    if info.dtype == "I8" and dtype == "I32":  # a tensor-wide zero point is not packed
        shapes = ((1,), ())
    expect_dtype(info, dtype, "I8")
    expect_shape(info, *shapes)
    leaves.append("weight_zero_point")
    return Offset("zero_point", f"int{module.weights.bits}", level.block)


def _act_order(module: Module, columns: int, leaves: list[str]) -> bool:
    """True if columns are scattered over groups; a g_idx of -1 (CT 0.12 to 0.18) is sorted out when it is read."""
    info = module.tensor("weight_g_idx")
    if info is None:
        if module.weights.actorder:
            module.need("weight_g_idx")
        return False
    if module.weights.strategy != "group":
        return False
    expect_dtype(info, "I32", "I64")
    expect_shape(info, (columns,))
    leaves.append("weight_g_idx")
    return bool(module.weights.actorder)


# --- widths of packed rows ------------------------------------------------------------------------------------------

def _words(count: int, bits: int, packing: str) -> int:
    """int32 words of `count` codes: dense codes cross words, padded ones leave the high bits 0."""
    return -(-count * bits // 32) if packing == "dense" else -(-count // (32 // bits))


def _columns_of_words(module: Module) -> int:
    """K of an int32-packed module: from its groups or its g_idx, else from `weight_shape`."""
    packed, scale = module.need("weight_packed"), module.need("weight_scale")
    if (indices := module.tensor("weight_g_idx")) is not None and len(indices.shape) == 1:
        return indices.shape[0]
    if module.weights.strategy == "group" and len(scale.shape) == 2:
        return scale.shape[1] * module.weights.group_size
    rows, columns = _read_weight_shape(module.need("weight_shape"))
    if rows != packed.shape[0]:
        raise Inconsistent("weight_shape and weight_packed disagree", where=module.name,
                           found=f"{rows} rows · {packed.shape[0]} rows", wanted="the same number of rows",
                           remedy="the file is damaged: download it again")
    return columns


def _read_weight_shape(info: TensorInfo) -> tuple[int, int]:
    """[N, K] of the tensor `weight_shape`: two integers that belong to the header in all but place."""
    expect_dtype(info, "I64", "I32")
    expect_shape(info, (2,))
    with info.file.open("rb") as file:
        data = os.pread(file.fileno(), info.nbytes, info.offset)
    if len(data) != info.nbytes:
        raise Damaged("cut short", where=info.name, found=f"{len(data)} bytes", wanted=f"{info.nbytes}",
                      remedy="download the file again")
    size = info.nbytes // 2
    rows, columns = (int.from_bytes(data[i : i + size], "little", signed=True) for i in (0, size))
    if not (0 < rows <= MAX_DIM and 0 < columns <= MAX_DIM):
        raise LimitExceeded("a weight of impossible size", where=info.name, found=f"[{rows}, {columns}]",
                            wanted=f"1 … {MAX_DIM} (MAX_DIM)", remedy="the file is damaged: download it again")
    return rows, columns


def _fitting(module: Module) -> tuple[str, ...]:
    """Packings that the width of a module's codes allows, narrowed by the height of its zero points."""
    packed = module.need("weight_packed")
    rows, words = _matrix(packed)
    bits, columns = module.weights.bits, _columns_of_words(module)
    packings = ("dense", "padded") if bits in _ODD_BITS else ("dense",)
    fits = tuple(p for p in packings if _words(columns, bits, p) == words)
    if not fits:
        wanted = sorted({_words(columns, bits, p) for p in packings})
        raise Inconsistent(
            "the packed width fits no packing", where=packed.name, found=f"{words} words a row",
            wanted=f"{' or '.join(str(w) for w in wanted)} for K {columns} of int{bits}",
            remedy="use the config.json that was written with these weights",
        )
    zero_points = module.tensor("weight_zero_point")
    if zero_points is not None and len(fits) > 1:
        fits = tuple(p for p in fits if zero_points.shape[:1] == (_words(rows, bits, p),)) or fits
    return fits


def choose_packings(modules: dict[str, Module], config: Config) -> dict[str, Module]:
    """Settle dense or padded for each module: both fit a small ragged K, then the file's others or its version tell."""
    fits = {name: _fitting(module) for name, module in modules.items() if module.kind() == "words"}
    shown = {fit[0] for name, fit in fits.items() if len(fit) == 1 and modules[name].weights.bits in _ODD_BITS}
    usual = shown.pop() if len(shown) == 1 else "dense" if config.version >= (0, 18) else "padded"
    chosen = {name: fit[0] if len(fit) == 1 else usual for name, fit in fits.items()}
    return {name: replace(module, packing=chosen.get(name, "")) for name, module in modules.items()}


# --- float codes ----------------------------------------------------------------------------------------------------

def _read_fp8(module: Module) -> _Weight:
    rows, columns = _matrix(module.need("weight"))
    level = _scale_level(module, rows, columns)
    leaves = ["weight", "weight_scale"]
    if module.tensor("weight_zero_point") is not None:
        leaves.append("weight_zero_point")  # all zero in old files; anything else is refused when it is read
    return _Weight((rows, columns), Scheme("fp8_e4m3fn", (level,)), tuple(leaves), {"codes": "fp8"})


def _read_mxfp8(module: Module) -> _Weight:
    rows, columns = _matrix(module.need("weight"))
    return _mx_weight(module, rows, columns, "fp8_e4m3fn", "fp8", "weight")


def _read_mxfp4(module: Module) -> _Weight:
    rows, row_bytes = _matrix(module.need("weight_packed"))
    if module.config.version == _FP4_OF_0_13:
        raise Unsupported(
            "MXFP4 exponents that are 2 too small, an error of compressed-tensors 0.13", where=module.name,
            found=f"version {'.'.join(str(n) for n in module.config.version)}", wanted="0.14 or later",
            remedy="quantize the model again with compressed-tensors 0.14 or later",
        )
    return _mx_weight(module, rows, row_bytes * 2, "fp4_e2m1", "fp4", "weight_packed")


def _read_mxfp6(module: Module) -> _Weight:
    packed = module.need("weight_packed")
    rows, row_bytes = _matrix(packed)
    if row_bytes % 3:
        raise Damaged("packed fp6 codes end inside a triplet of bytes", where=packed.name, found=f"{row_bytes} bytes",
                      wanted="a multiple of 3", remedy="the file is damaged: download it again")
    return _mx_weight(module, rows, row_bytes * 4 // 3, "fp6_e2m3", "fp6", "weight_packed")


def _mx_weight(module: Module, rows: int, columns: int, element: str, codes: str, leaf: str) -> _Weight:
    _expect_group(module, 32, columns)
    scale = module.need("weight_scale")
    expect_dtype(scale, *_E8M0)
    expect_shape(scale, (rows, columns // 32))
    scheme = Scheme(element, (ScaleLevel("e8m0", group(32)),))
    return _Weight((rows, columns), scheme, (leaf, "weight_scale"), {"codes": codes})


def _read_nvfp4(module: Module) -> _Weight:
    rows, row_bytes = _matrix(module.need("weight_packed"))
    columns = row_bytes * 2
    _expect_group(module, 16, columns)
    scale, above = module.need("weight_scale"), module.need("weight_global_scale")
    expect_dtype(scale, "F8_E4M3")
    expect_shape(scale, (rows, columns // 16))
    expect_dtype(above, "F32")
    expect_shape(above, (1,), ())
    # the global scale divides: 448 * 6 / absmax, where ModelOpt stores the reciprocal
    levels = (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR, divide=True))
    leaves = ("weight_packed", "weight_scale", "weight_global_scale")
    return _Weight((rows, columns), Scheme("fp4_e2m1", levels), leaves, {"codes": "fp4"})


def _read_nvfp4_e5m3(module: Module) -> _Weight:
    """AutoRound's: unsigned e5m3 scales of 16 inputs, and none above them."""
    packed, scale = module.need("weight_packed"), module.need("weight_scale")
    rows, row_bytes = _matrix(packed)
    columns = row_bytes * 2
    _expect_group(module, 16, columns)
    expect_dtype(scale, "U8")
    expect_shape(scale, (rows, columns // 16))
    scheme = Scheme("fp4_e2m1", (ScaleLevel("ue5m3", group(16)),))
    return _Weight((rows, columns), scheme, ("weight_packed", "weight_scale"), {"codes": "fp4"})


def _expect_group(module: Module, size: int, columns: int) -> None:
    args = module.weights
    if args.strategy not in ("group", "tensor_group") or args.group_size != size or columns % size:
        raise Inconsistent("config.json and the stored scales disagree", where=module.name,
                           found=f"config group {module.group.name}: {args} · K {columns}",
                           wanted=f"groups of {size} inputs for these tensors",
                           remedy="use the config.json that was written with these weights")


@dataclass(frozen=True)
class _Storage:
    """One way a module is stored: the args and format names that go with it, and the reader of its headers."""

    type: str
    bits: tuple[int, ...]
    formats: tuple[str, ...]
    read: Callable[[Module], _Weight]


_STORAGES: Final[Mapping[str, _Storage]] = {
    "words": _Storage("int", tuple(range(1, 9)), ("pack-quantized",), _read_words),
    "int8": _Storage("int", tuple(range(1, 9)), ("int-quantized", "naive-quantized"), _read_int8),
    "fp8": _Storage("float", (8,), ("float-quantized", "naive-quantized"), _read_fp8),
    "nvfp4": _Storage("float", (4,), ("nvfp4-pack-quantized",), _read_nvfp4),
    "nvfp4_e5m3": _Storage("float", (4,), ("nvfp4-e5m3-pack-quantized",), _read_nvfp4_e5m3),
    "mxfp4": _Storage("float", (4,), ("mxfp4-pack-quantized",), _read_mxfp4),
    "mxfp6": _Storage("float", (6,), ("mxfp6-pack-quantized",), _read_mxfp6),
    "mxfp8": _Storage("float", (8,), ("mxfp8-quantized",), _read_mxfp8),
}
