"""HQQ: packed slabs of a group matrix, with a float zero point and a scale a group.

Stored per module M: W_q, scale, zero and a description of shape, bits, groups and packing; as safetensors (layout A),
as qmodel.pt of hqq 0.2 (B) or of hqq 0.1 (C, everything inside "meta", scales and zeros often quantized themselves).
The weight is (code - zero) * scale, in float32. The tensors decide; the config is for reporting.
Rules, worked examples and sources with versions: docs/formats/hqq.md. Descriptions are read by `_shared/hqq_meta.py`,
qmodel.pt by `checkpoints/torch_pickle.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from anybit.checkpoints.checks import expect_dtype, expect_shape
from anybit.checkpoints.contents import FLOAT_DTYPES, JSON, Contents, TensorInfo
from anybit.checkpoints.dialects import plain
from anybit.checkpoints.dialects._shared import hqq_meta as metas
from anybit.checkpoints.dialects._shared.hqq_meta import AGAIN, Meta, Source
from anybit.checkpoints.dialects._shared.small_tensors import SmallTensors
from anybit.checkpoints.torch_pickle import QMODEL
from anybit.errors import Inconsistent, Unsupported
from anybit.schemes import CHANNEL, TENSOR, Block, Layer, LayerKind, Offset, Placement, ScaleLevel, Scheme, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "hqq"
CODES: Final = ".W_q"


@dataclass(frozen=True)
class _Part:
    """Scales or zeros of a weight: their tensor's role, or codes with a description of their own.

    index   0 or 1 where zeros and scales lie in one tensor, `zero_scale`
    """

    role: str
    index: int | None
    meta: Meta | None


def recognizes(contents: Contents) -> bool:
    """True if the config names this method, any tensor is HQQ's packed codes, or the folder is HQQ's own."""
    if contents.quantization.get("quant_method") is not None:
        return contents.quant_method == NAME
    return QMODEL in contents.side or any(name.endswith(CODES) for name in contents.tensors)


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and the descriptions beside the codes.

    Raises Unsupported for what docs/formats/hqq.md §7 refuses, Inconsistent where a description does not fit its codes.
    """
    described = contents.side.get(QMODEL, {})
    layers = {}
    with SmallTensors() as small:
        for name in contents.tensors:
            if name.endswith(CODES):
                module = name.removesuffix(CODES)
                layers[module] = _module(contents, module, described.get(module, {}), small)
    taken = {tensor for layer in layers.values() for tensor in layer.tensors.values()}
    return layers | plain.dense_layers(contents, taken)


# --- one module from its headers -------------------------------------------------------------------------------------

def _module(contents: Contents, module: str, values: JSON, small: SmallTensors) -> Layer:
    _refuse_adapters(contents, module, values)
    whole = Source(contents, module, values, small)
    source = whole.inner("meta") or whole
    codes = whole.need("W_q")
    meta = metas.read_meta(source, codes)
    tensors = {"codes": codes.name}
    scale, zero = (_part(source, meta, key, tensors) for key in ("scale", "zero"))
    rows = meta.shape[0]
    bias = whole.tensor("bias")
    if bias is not None:
        expect_shape(bias, (rows,))
        tensors["bias"] = bias.name
    for key in (*metas.NUMBERS, *metas.TEXTS, "shape"):
        if (info := source.tensor(key)) is not None:
            tensors[f"description.{key}"] = info.name
    block, placement = _placement(meta)
    scheme = Scheme(
        meta.element,
        (ScaleLevel(_format(contents, scale, tensors), block, placement=placement),),
        offset=Offset("zero_point", _format(contents, zero, tensors), block, placement=placement),
    )
    kind: LayerKind = "embedding" if module.rpartition(".")[2] in plain.EMBEDDINGS else "linear"
    storage = {"meta": meta, "scale": scale, "zero": zero}
    size = contents.bytes_of(*set(tensors.values()))
    return Layer(module, kind, meta.shape, scheme, tensors, storage, size, _remarks(scale, zero))


def _refuse_adapters(contents: Contents, module: str, values: JSON) -> None:
    keys = [key for key in values if key.startswith("lora")]
    keys += [leaf for leaf in ("lora_A", "lora_B", "lora_a", "lora_b") if f"{module}.{leaf}" in contents.tensors]
    if keys or module.endswith(".linear_layer"):
        raise Unsupported("an HQQ module with an adapter patched into it", where=module,
                          found=keys[0] if keys else "linear_layer", wanted="a module of its own",
                          remedy="merge or remove the adapter with hqq, then save again")


def _part(source: Source, meta: Meta, key: str, tensors: dict[str, str]) -> _Part:
    """Where the scales (or zeros) lie; adds their tensors' roles."""
    both = source.tensor("zero_scale")
    own = source.inner(f"meta_{key}")
    codes = source.tensor(f"{key}_q") if both is None else both
    if codes is not None and (both is None or both.dtype == "U8"):
        if own is None:
            raise Inconsistent(f"a quantized {key} without its description", where=source.prefix,
                               found=codes.name, wanted=f"meta_{key}", remedy=AGAIN)
        return _quantized_part(own, codes, meta, key, tensors, is_shared=both is not None)
    if both is not None:
        expect_dtype(both, *FLOAT_DTYPES)
        if both.shape[:1] != (2,) or both.elements != 2 * max(meta.groups, 1):
            raise Inconsistent("zeros and scales do not fit the groups", where=both.name, found=str(list(both.shape)),
                               wanted=f"2 x {max(meta.groups, 1)}", remedy=AGAIN)
        tensors["zero_scale"] = both.name
        return _Part("zero_scale", _INDEX[key], None)
    plain_tensor = source.need(key)
    metas.expect_scales(plain_tensor, meta)
    tensors[key] = plain_tensor.name
    return _Part(key, None, None)


_INDEX: Final = {"zero": 0, "scale": 1}  # order within `zero_scale`


def _quantized_part(
    own: Source, codes: TensorInfo, meta: Meta, key: str, tensors: dict[str, str], *, is_shared: bool
) -> _Part:
    view = codes
    if is_shared:
        if codes.shape[:1] != (2,):
            raise Inconsistent("zeros and scales do not fit the groups", where=codes.name,
                               found=str(list(codes.shape)), wanted="[2, ..]", remedy=AGAIN)
        view = TensorInfo(codes.name, codes.dtype, codes.shape[1:], codes.file, codes.offset, codes.nbytes // 2)
    count = max(meta.groups, 1)
    described = metas.read_meta(own, view)
    if described.shape[0] * described.shape[1] != count:
        raise Inconsistent(f"the quantized {key} does not fit the groups", where=own.prefix,
                           found=str(list(described.shape)), wanted=f"{count} groups", remedy=AGAIN)
    role = "zero_scale" if is_shared else f"{key}_q"
    tensors[role] = codes.name
    for inner in ("scale", "zero"):
        info = own.need(inner)
        metas.expect_scales(info, described)
        tensors[f"{key}.{inner}"] = info.name
    return _Part(role, _INDEX[key] if is_shared else None, described)


def _format(contents: Contents, part: _Part, tensors: Mapping[str, str]) -> str:
    return "float32" if part.meta is not None else FLOAT_DTYPES[contents.tensors[tensors[part.role]].dtype]


def _remarks(scale: _Part, zero: _Part) -> tuple[str, ...]:
    names = [name for name, part in (("scales", scale), ("zero points", zero)) if part.meta is not None]
    return (f"{' and '.join(names)} are stored as 8-bit codes with scales of their own",) if names else ()


def _placement(meta: Meta) -> tuple[Block, Placement]:
    """Who shares a scale: blocks of the grid where the groups are such, else by position in the flat weight."""
    columns = meta.shape[1]
    if meta.groups == 0:
        return TENSOR, "grid"
    if meta.axis == 1:
        if meta.size == columns:
            return CHANNEL, "grid"
        return group(meta.size), "grid" if columns % meta.size == 0 else "flat"
    if meta.groups == columns:  # one group an input: all its outputs
        return (0, 1), "grid"
    return group(meta.size), "strided"


# --- tensors ---------------------------------------------------------------------------------------------------------

def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight. Raises Damaged for codes above their width and scales that are not finite."""
    from anybit.checkpoints.checks import refuse_bad_scales
    from anybit.checkpoints.dialects._shared import hqq_tensors
    from anybit.weights import QuantizedWeight

    if not layer.scheme.is_quantized:
        return plain.canonicalize(layer, tensors)
    meta = layer.storage["meta"]
    assert isinstance(meta, Meta)
    grid = _grid(layer)
    parts = {}
    for key in ("scale", "zero"):
        part = layer.storage[key]
        assert isinstance(part, _Part)
        parts[key] = _values(part, key, tensors).reshape(grid)
        place = layer.tensors[part.role]
        # quantized scales may decode to 0 or a little below: the tool does not clamp them
        refuse_bad_scales(parts[key], place, allow_zero=True, allow_negative=key == "zero" or part.meta is not None)
    codes = hqq_tensors.unpack(tensors["codes"], meta, layer.tensors["codes"]).view(layer.shape)
    return QuantizedWeight(layer.scheme, layer.shape, codes, (parts["scale"],), offset=parts["zero"],
                           bias=tensors.get("bias"))


def _grid(layer: Layer) -> tuple[int, ...]:
    from anybit.weights import block_count

    level = layer.scheme.scales[0]
    if level.placement != "grid":
        return (-1,)
    return block_count(layer.shape[0], level.block[0]), block_count(layer.shape[1], level.block[1])


def _values(part: _Part, key: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Scales or zeros as stored, or decoded to float32, one a group, in the groups' order."""
    from anybit.checkpoints.dialects._shared import hqq_tensors

    found = tensors[part.role]
    if part.index is not None:
        found = found[part.index]
    if part.meta is None:
        return found
    codes = hqq_tensors.unpack(found, part.meta, part.role)
    return hqq_tensors.decode(codes, part.meta, tensors[f"{key}.scale"], tensors[f"{key}.zero"])
