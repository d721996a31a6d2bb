"""GGUF as a dialect: ggml's blocks under Hugging Face names.

Tables say what a tensor is called there and what Scheme each ggml type is; `gguf_blocks.py` takes blocks apart. For
architecture llama the converter permuted the rows of q and k from half-split to interleaved rotary order; a row is
whole blocks, so the raw rows are put back before anything is taken apart. Types of vectors from large code books (IQ1,
IQ2, IQ3) are decoded to float32 while reading, which a note says.
Source: ggml 0c1e57098, docs/formats/gguf.md §3, §4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from anybit.checkpoints import gguf, gguf_config
from anybit.checkpoints.contents import FLOAT_DTYPES, JSON, Contents, TensorInfo
from anybit.checkpoints.gguf_architectures import Architecture, Order
from anybit.checkpoints.gguf_keys import BLOCK
from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.schemes import TENSOR, Block, Layer, LayerKind, Offset, ScaleLevel, Scheme, dense, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "gguf"
Levels = tuple[ScaleLevel, ...]


def _half(columns: int) -> ScaleLevel:
    return ScaleLevel("float16", group(columns))


def _k_type(element: str, sub: str, columns: int) -> Scheme:
    """Two levels: an integer for `columns` inputs, a float16 for 256."""
    return Scheme(element, (ScaleLevel(sub, group(columns)), _half(256)))


def _k_type_with_minimum(element: str, sub: str, columns: int) -> Scheme:
    """The same, and a minimum of two levels that is subtracted."""
    minimum = Offset("minimum", sub, group(columns), levels=(_half(256),), subtract=True)
    return Scheme(element, (ScaleLevel(sub, group(columns)), _half(256)), offset=minimum)


_ONE: Final = Offset("zero_point", "uint2", TENSOR)  # the number 1 for all codes

SCHEMES: Final[Mapping[str, Scheme]] = {
    "Q4_0": Scheme("int4", (_half(32),)),
    "Q4_1": Scheme("uint4", (_half(32),), offset=Offset("minimum", "float16", group(32))),
    "Q5_0": Scheme("int5", (_half(32),)),
    "Q5_1": Scheme("uint5", (_half(32),), offset=Offset("minimum", "float16", group(32))),
    "Q8_0": Scheme("int8", (_half(32),)),
    "Q2_K": _k_type_with_minimum("uint2", "uint4", 16),
    "Q3_K": _k_type("int3", "int6", 16),
    "Q4_K": _k_type_with_minimum("uint4", "uint6", 32),
    "Q5_K": _k_type_with_minimum("uint5", "uint6", 32),
    "Q6_K": _k_type("int6", "int8", 16),
    "IQ4_NL": Scheme("iq4_nl", (_half(32),)),
    "IQ4_XS": _k_type("iq4_nl", "int6", 32),
    "TQ1_0": Scheme("int2", (_half(256),)),
    "TQ2_0": Scheme("uint2", (_half(256),), offset=_ONE),
    "Q1_0": Scheme("int2", (_half(128),)),
    "Q2_0": Scheme("uint2", (_half(64),), offset=_ONE),
    "MXFP4": Scheme("fp4_e2m1", (ScaleLevel("e8m0", group(32)),)),
    "NVFP4": Scheme("fp4_e2m1", (ScaleLevel("fp8_e4m3fn", group(16)),)),
}
# NVFP4 with the factor of its `.scale` tensor: the decoded value meets it last, the one rounding of the format
_NVFP4_SCALED: Final = Scheme(
    "fp4_e2m1", (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR)), order="code_first"
)

_ONE_EXPERT: Final = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)\.([0-9]+)")  # before April 2024
_FROM_VECTOR: Final = ("ffn_gate_inp_shexp",)  # a matrix [1, K] that is stored as a vector
_LARGEST_EXPONENT: Final = 255
_TABLES: Final = ("token_embd", "per_layer_token_embd", "position_embd")
_NORM: Final = re.compile(r".*(norm(_[12])?|layer_norm|layernorm|ln_[12f]|norm_f)")  # modules, by either name

# Tensors that are no parameters of the Hugging Face model: frequencies, and scales of activations that llama.cpp
# itself does not quantize.
_NOT_PARAMETERS: Final = re.compile(
    r"rope_(freqs|factors_long|factors_short)\.weight|blk\.[0-9]+\.attn_rot_embd\..*|.*\.input_scale"
)


@dataclass(frozen=True)
class _Target:
    """Where a stored module or tensor goes: the name in transformers, and what makes the file's rows its rows."""

    name: str
    orders: tuple[Order, ...] = ()
    columns: tuple[Order, ...] = ()
    undo: str = ""


def recognizes(contents: Contents) -> bool:
    """True for the contents of a GGUF file."""
    return contents.gguf is not None


def declare(contents: Contents) -> dict[str, Layer]:
    """Every matrix under its Hugging Face name; under its own in a file of an unknown architecture."""
    layers = {}
    for name, info in contents.tensors.items():
        module, dot, part = name.rpartition(".")
        if not dot or part != "weight" or _parameters(contents, name) or not _is_matrix(module, info):
            continue
        for target in _modules(contents, module):
            layers[target.name] = _layer(contents, module, target, info)
    return layers


def plain(contents: Contents) -> dict[str, str]:
    """Norms and other vectors: Hugging Face tensor name -> GGUF tensor name."""
    found = {}
    for name in contents.tensors:
        for target in _plain_targets(contents, name):
            found[target.name] = name
    return found


def adjust_plain(contents: Contents, name: str, stored: str, tensor: Tensor) -> Tensor:
    """The tensor `stored` as transformers has it under `name`: what the converter did to it undone."""
    from anybit.checkpoints import gguf_orders

    info = contents.tensors[stored]
    if info.dtype not in FLOAT_DTYPES:
        tensor = _decoded(info, tensor)
    targets = _plain_targets(contents, stored)
    place = next(i for i, target in enumerate(targets) if target.name == name)
    target = targets[place]
    if len(targets) > 1 and not target.orders:
        tensor = tensor[place]
    if target.orders:
        tensor = tensor.index_select(0, gguf_orders.row_index(len(tensor), target.orders, stored))
    return gguf_orders.UNDO[target.undo](tensor)


def notes(contents: Contents) -> tuple[str, ...]:
    """What is odd but legal about the files."""
    return (*gguf.remarks(contents), *gguf_config.remarks(contents))


def require_loadable(contents: Contents) -> None:
    """Raise Unsupported for a file that can be inspected but not run: no model, or parts without a place here."""
    gguf_config.require_loadable(contents)
    used = {name for layer in declare(contents).values() for name in layer.tensors.values()}
    used.update(plain(contents).values())
    unknown = [name for name in contents.tensors if name not in used and not _NOT_PARAMETERS.fullmatch(name)
               and not _is_beyond(contents, name)]
    if unknown:
        raise Unsupported("the file has tensors that its architecture does not have here", where=contents.path.name,
                          found=unknown[0], wanted="tensors of docs/formats/gguf.md §4",
                          remedy="use a safetensors checkpoint of the same model", more=unknown[1:])


def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The blocks of one layer as codes and scales, rows and columns in Hugging Face order."""
    from anybit.checkpoints import gguf_blocks
    from anybit.checkpoints.gguf_orders import row_index
    from anybit.weights import Dense

    raw, bias = tensors["weight"], tensors.get("bias")
    kind, orders = str(layer.storage["type"]), layer.storage.get("rows")
    if isinstance(orders, tuple):
        index = row_index(raw.shape[-2], orders, layer.tensors["weight"])
        raw = raw.index_select(-2, index)
        bias = None if bias is None else bias.index_select(-1, index)
    columns = layer.storage.get("columns")
    if isinstance(columns, tuple):
        return _with_moved_columns(layer, kind, raw, columns, tensors.get("scale"), bias)
    if kind in FLOAT_DTYPES:
        return Dense(layer.scheme, raw.view(layer.shape), bias)
    if kind in gguf_blocks.GRID_TYPES:
        return Dense(layer.scheme, gguf_blocks.decode_grid(kind, raw), bias)
    return _quantized(layer, kind, raw, tensors.get("scale"), bias)


def _with_moved_columns(
    layer: Layer, kind: str, raw: Tensor, columns: tuple[Order, ...], scale: Tensor | None, bias: Tensor | None
) -> QuantizedWeight | Dense:
    """The layer with its columns put back: as codes with their scales where the units that move allow it."""
    from anybit.checkpoints import gguf_blocks
    from anybit.checkpoints.gguf_orders import row_index
    from anybit.weights import Dense

    index = row_index(layer.shape[-1], columns, layer.tensors["weight"])
    if kind in FLOAT_DTYPES:
        return Dense(layer.scheme, raw.view(layer.shape).index_select(-1, index), bias)
    if kind in gguf_blocks.GRID_TYPES:
        return Dense(layer.scheme, gguf_blocks.decode_grid(kind, raw).index_select(-1, index), bias)
    own = replace(layer, scheme=_NVFP4_SCALED if scale is not None else SCHEMES[kind])
    weight = _quantized(own, kind, raw, scale, bias)
    if isinstance(weight, Dense) or not layer.scheme.is_quantized:
        return Dense(dense("float32"), weight.dequantize().index_select(-1, index), bias)
    return _moved(weight, layer.scheme, index)


def _moved(weight: QuantizedWeight, scheme: Scheme, index: Tensor) -> QuantizedWeight:
    """Columns in the order of `index`; `scheme` is the weight's with scales that serve no more than what moves."""

    def move(values: Tensor, stored: Block, wanted: Block) -> Tensor:
        if stored[1] == 0:  # one for a whole row or matrix
            return values
        finer = values.repeat_interleave(stored[1] // wanted[1], dim=-1)
        return finer.index_select(-1, index[:: wanted[1]] // wanted[1])

    def levels(values: Sequence[Tensor], old: Levels, new: Levels) -> tuple[Tensor, ...]:
        return tuple(move(v, o.block, n.block) for v, o, n in zip(values, old, new, strict=True))

    old, offset, offset_scales = weight.scheme, weight.offset, weight.offset_scales
    if offset is not None and old.offset is not None and scheme.offset is not None:
        offset = move(offset, old.offset.block, scheme.offset.block)
        offset_scales = levels(offset_scales, old.offset.levels, scheme.offset.levels)
    return replace(weight, scheme=scheme, stored_codes=weight.codes.index_select(-1, index), offset=offset,
                   scales=levels(weight.scales, old.scales, scheme.scales), offset_scales=offset_scales)


def _decoded(info: TensorInfo, raw: Tensor) -> Tensor:
    """The values of a tensor of blocks that is no layer of its own, float32."""
    from anybit.checkpoints import gguf_blocks

    if info.dtype in gguf_blocks.GRID_TYPES:
        return gguf_blocks.decode_grid(info.dtype, raw)
    layer = Layer(info.name, "linear", info.shape, SCHEMES[info.dtype], {"weight": info.name})
    return _quantized(layer, info.dtype, raw).dequantize()


def _quantized(
    layer: Layer, kind: str, raw: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> QuantizedWeight | Dense:
    from anybit.checkpoints import gguf_blocks
    from anybit.weights import QuantizedWeight

    parts = gguf_blocks.take_apart(kind, raw)
    scales = [*parts.scales]
    if scale is not None:
        scales.append(scale.float().reshape(*layer.shape[:-2], 1))
    offset = parts.minimum
    if layer.scheme.offset == _ONE:
        offset = raw.new_ones(*layer.shape[:-2], 1, 1)
    for tensor in (*scales, *parts.minimum_scales, *(() if offset is None else (offset,))):
        _refuse_infinite(tensor, layer)
    weight = QuantizedWeight(
        scheme=layer.scheme,
        shape=layer.shape,
        stored_codes=parts.codes,
        scales=tuple(s if s.dim() == len(layer.shape) else s.unsqueeze(-1) for s in scales),
        offset=offset,
        offset_scales=parts.minimum_scales,
        bias=bias,
    )
    is_beyond_e8m0 = kind == "MXFP4" and bool((scales[0] == _LARGEST_EXPONENT).any())
    return _with_largest_exponent(weight) if is_beyond_e8m0 else weight


def _with_largest_exponent(weight: QuantizedWeight) -> Dense:
    """With MXFP4 blocks of exponent 255, 2^128 for ggml and NaN in a canonical e8m0: as the floats that ggml has."""
    from anybit.weights import Dense

    exponents = weight.scales[0]
    is_largest = exponents == _LARGEST_EXPONENT
    low = replace(weight, scales=(exponents.masked_fill(is_largest, 127), *weight.scales[1:])).dequantize()
    factor = is_largest.repeat_interleave(32, dim=-1)
    return Dense(dense("float32"), low.where(~factor, low * 2 * 2.0**127), weight.bias)


def _architecture(contents: Contents) -> Architecture | None:
    return gguf_config.architecture_of(contents.gguf or {}, contents.tensors)


# names ----------------------------------------------------------------------------------------------------------------


def _modules(contents: Contents, module: str) -> list[_Target]:
    """Where the weight and bias of a GGUF module go: one place, or several for layers that the file holds as one."""
    architecture = _architecture(contents)
    if architecture is None:
        return [_Target(module)]
    if module in architecture.top:
        return [_Target(architecture.top[module])]
    block = BLOCK.fullmatch(module)
    if block is None or _is_beyond(contents, module):
        return []
    stack, inner = architecture.stacks.get(block[1]), block[3]
    if stack is None:
        return []
    place = f"{stack.prefix}.{block[2]}."
    orders, columns = architecture.orders(contents.config), architecture.columns(contents.config)
    expert = _ONE_EXPERT.fullmatch(module)
    if expert and "ffn_gate_exps" in stack.modules:
        return [_Target(f"{place}mlp.experts.{expert[3]}.{expert[2]}_proj")]
    if inner == "attn_qkv" and inner not in stack.modules and "attn_q" in stack.modules:
        return [_Target(place + stack.modules[part], (rows, *_order(orders, part)))
                for part, rows in _joined_attention(contents.config).items()]
    if inner not in stack.modules:
        return []
    return [_Target(place + stack.modules[inner], _order(orders, inner), _order(columns, inner))]


def _order(orders: Mapping[str, Order], module: str) -> tuple[Order, ...]:
    return (orders[module],) if module in orders else ()


def _joined_attention(config: JSON) -> dict[str, Order]:
    """Rows of q, k and v in a tensor that holds the three one after the other (--fuse-qkv of the converter)."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    q, k = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {"attn_q": ("part", 0, q), "attn_k": ("part", q, k), "attn_v": ("part", q + k, k)}


def _parameters(contents: Contents, name: str) -> list[_Target]:
    """Where a tensor goes that is no part of a layer of ours: what the architecture names, or keeps as it is."""
    architecture, block = _architecture(contents), BLOCK.fullmatch(name)
    module, _, part = name.rpartition(".")
    if architecture is not None and (block[3].rpartition(".")[0] if block else module) in architecture.kept:
        return [replace(target, name=f"{target.name}.{part}") for target in _modules(contents, module)]
    if architecture is None or block is None or _is_beyond(contents, name):
        return []
    stack = architecture.stacks.get(block[1])
    parameter = stack.parameters.get(block[3]) if stack is not None else None
    if stack is None or parameter is None:
        return []
    place = f"{stack.prefix}.{block[2]}.{parameter.name}"
    if "*" in place:
        return [_Target(place.replace("*", str(row))) for row in range(contents.tensors[name].shape[0])]
    module = block[3].removesuffix(".weight").removesuffix(".bias")
    return [_Target(place, _order(architecture.orders(contents.config), module), undo=parameter.undo)]


def _plain_targets(contents: Contents, name: str) -> list[_Target]:
    """Where a tensor outside the layers goes: norms, other vectors, and what `_parameters` knows."""
    named = _parameters(contents, name)
    module, _, part = name.rpartition(".")
    weight = contents.tensors.get(f"{module}.weight")
    if named or part not in ("weight", "bias") or weight is None or _is_matrix(module, weight):
        return named
    architecture = _architecture(contents)
    kept = architecture.one_less if architecture is not None else None
    is_raised = kept is not None and part == "weight" and not module.endswith(kept or "\0")
    return [_Target(f"{target.name}.{part}", target.orders, undo="one_less" if is_raised else "")
            for target in _modules(contents, module)]


def _is_beyond(contents: Contents, name: str) -> bool:
    """A block after the last layer of the model: it predicts further tokens, which transformers does not do."""
    block = BLOCK.fullmatch(name)
    layers = contents.config.get("num_hidden_layers")
    return block is not None and block[1] == "blk" and isinstance(layers, int) and int(block[2]) >= layers


def _is_matrix(module: str, info: TensorInfo) -> bool:
    if module.endswith(_FROM_VECTOR):
        return True
    return len(info.shape) in (2, 3) and not _NORM.fullmatch(module)


# layers ---------------------------------------------------------------------------------------------------------------


def _layer(contents: Contents, module: str, target: _Target, info: TensorInfo) -> Layer:
    shape = (1, *info.shape) if len(info.shape) == 1 else info.shape
    if 0 in shape:
        raise Inconsistent(f"{info.name} is empty", where=info.file.name, found=" x ".join(map(str, shape)),
                           wanted="a matrix")
    names = {"weight": info.name}
    for role in ("bias", "scale"):
        if f"{module}.{role}" in contents.tensors and not _parameters(contents, f"{module}.{role}"):
            names[role] = f"{module}.{role}"
    storage: dict[str, object] = {"type": info.dtype}
    stored = contents.bytes_of(*names.values())
    if target.orders:
        storage["rows"] = target.orders
        _check_order(target.orders, shape[-2], info)
        order, *numbers = target.orders[0]
        if order == "part":
            stored = stored * numbers[1] // shape[-2]
            shape = (*shape[:-2], numbers[1], shape[-1])
    if target.columns:
        storage["columns"] = target.columns
    scheme = _scheme(contents, info, names, target)
    kind: LayerKind = "embedding" if module in _TABLES else "experts" if len(shape) == 3 else "linear"
    return Layer(
        name=target.name,
        kind=kind,
        shape=shape,
        scheme=scheme,
        tensors=names,
        storage=storage,
        stored_bytes=stored,
        notes=_layer_notes(contents, module, info, target, scheme),
    )


def _check_order(orders: tuple[Order, ...], rows: int, info: TensorInfo) -> None:
    """Refuse rows that are no whole heads by what the header says."""
    for order, *numbers in orders:
        if order == "part":
            needed, rows = numbers[0] + numbers[1], numbers[1]
            if needed > info.shape[-2]:
                raise Inconsistent(f"{info.name} does not hold the rows of q, k and v", where=info.file.name,
                                   found=f"{info.shape[-2]} rows", wanted=f"at least {needed}")
        unit = _whole(order, numbers)
        if rows % unit:
            raise Inconsistent(f"{info.name} does not hold whole heads", where=info.file.name,
                               found=f"{rows} rows", wanted=f"a multiple of {unit}")


def _whole(order: str, numbers: list[int]) -> int:
    """The rows of an order are a multiple of this."""
    if order == "half_split":
        return 2 * numbers[0]
    return {"grouped": lambda: numbers[0] * (numbers[1] + 2), "alternating": lambda: numbers[0]}.get(order, lambda: 1)()


def _scheme(contents: Contents, info: TensorInfo, names: Mapping[str, str], target: _Target) -> Scheme:
    scale = names.get("scale")
    if scale is not None:
        _check_scale(contents.tensors[scale], info)
    if info.dtype in SCHEMES:
        scheme = SCHEMES[info.dtype] if scale is None else _NVFP4_SCALED
        return _for_units(scheme, int(target.columns[0][-1])) if target.columns else scheme
    if info.dtype in FLOAT_DTYPES:
        return dense(FLOAT_DTYPES[info.dtype])
    if info.dtype.startswith("IQ"):
        return dense("float32")
    raise Unsupported(f"{info.name} is no weight", where=info.file.name, found=info.dtype,
                      wanted="a float or block type")


def _check_scale(scale: TensorInfo, weight: TensorInfo) -> None:
    experts = weight.shape[0] if len(weight.shape) == 3 else 1
    if weight.dtype != "NVFP4":
        raise Unsupported(f"{scale.name} scales a weight of another type than NVFP4", where=scale.file.name,
                          found=weight.dtype, wanted="NVFP4")
    if scale.dtype != "F32" or scale.elements != experts:
        raise Inconsistent(f"{scale.name} does not fit its weight", where=scale.file.name,
                           found=f"{scale.dtype} {list(scale.shape)}", wanted=f"F32 [{experts}]")


def _for_units(scheme: Scheme, unit: int) -> Scheme:
    """The scheme with scales that serve at most `unit` columns, which move together; float32 where that cannot be."""

    def fits(block: Block) -> bool:
        return block[1] == 0 or block[1] % unit == 0 or unit % block[1] == 0

    def cut(level: ScaleLevel) -> ScaleLevel:
        return replace(level, block=group(unit)) if level.block[1] > unit else level

    offset = scheme.offset
    levels = (*scheme.scales, *(offset.levels if offset is not None else ()))
    if not all(fits(level.block) for level in levels) or (offset is not None and not fits(offset.block)):
        return dense("float32")
    if offset is not None:
        block = group(unit) if offset.block[1] > unit else offset.block
        offset = replace(offset, block=block, levels=tuple(cut(level) for level in offset.levels))
    return replace(scheme, scales=tuple(cut(level) for level in scheme.scales), offset=offset)


def _layer_notes(
    contents: Contents, module: str, info: TensorInfo, target: _Target, scheme: Scheme
) -> tuple[str, ...]:
    said = []
    if info.dtype in SCHEMES and target.columns and not scheme.is_quantized:
        said.append(f"{info.dtype} is decoded to float32 while reading: its columns move in parts of a block")
    if info.dtype.startswith("IQ") and info.dtype not in SCHEMES:
        said.append(f"{info.dtype} is decoded to float32 while reading: no kernel reads its code book")
    if f"{module}.input_scale" in contents.tensors:
        said.append("input_scale is not used: activations stay unquantized, as in llama.cpp")
    return tuple(said)


def _refuse_infinite(scale: Tensor, layer: Layer) -> None:
    import torch

    if scale.is_floating_point() and not bool(torch.isfinite(scale).all()):
        count = int((~torch.isfinite(scale)).sum())
        raise Damaged("a scale is not finite", where=layer.name, found=f"{count} of {scale.numel()}",
                      wanted="finite scales", remedy="download the file again")
