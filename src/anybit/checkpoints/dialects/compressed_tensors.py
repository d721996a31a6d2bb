"""compressed-tensors, the format of llm-compressor: tensors to canonical weights.

Stored per module: weight_packed (int32 words, fp4 nibbles or fp6 triplets along K) or weight (int8, fp8), weight_scale,
and as the scheme needs weight_shape, weight_zero_point, weight_g_idx, weight_global_scale, input_scale, ... . A module
is quantized iff such tensors are there; its group in config.json says how to read them and how inputs are quantized.
Rules, worked examples and sources with versions: docs/formats/compressed_tensors.md. The config alone is read by
`_shared/compressed_tensors_config.py`, the headers of one module by `compressed_tensors_headers.py` there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

from anybit.checkpoints.checks import need_all
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents
from anybit.checkpoints.dialects import plain
from anybit.checkpoints.dialects._shared.compressed_tensors_config import WHERE, Config, read_config
from anybit.checkpoints.dialects._shared.compressed_tensors_headers import Module, choose_packings
from anybit.checkpoints.dialects._shared.compressed_tensors_targets import Targets
from anybit.checkpoints.dialects._shared.kv_scales import demand_scales, kv_scales
from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.schemes import KVCacheSpec, Layer, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, PackedCodes, QuantizedWeight

NAME: Final = "compressed-tensors"

_METHODS: Final = ("compressed-tensors", "compressed_tensors")


def recognizes(contents: Contents) -> bool:
    """True if config.json names this method; `config_groups` alone proves nothing, ModelOpt uses the key too."""
    return contents.quant_method in _METHODS


def declare(contents: Contents) -> dict[str, Layer]:
    """All layers, from headers and config; of `weight_shape` tensors 16 bytes where no other header tells K.

    Raises Unsupported for what docs/formats/compressed_tensors.md §11 refuses, Inconsistent where tensors and config
    disagree, each naming the module.
    """
    config = read_config(contents.quantization)
    modules = _modules_with_codes(contents)
    _refuse_uncompressed(contents, config, modules)
    targets = Targets(config)
    parts = {}
    for module in modules:
        class_name = "Embedding" if module.rpartition(".")[2] in plain.EMBEDDINGS else "Linear"
        group, remarks = targets.group_of(module, class_name)
        parts[module] = Module(contents, module, group, config, remarks)
    parts = choose_packings(parts, config)
    layers = {module: part.layer() for module, part in parts.items()}
    taken = {name for layer in layers.values() for name in layer.tensors.values()}
    return layers | plain.dense_layers(contents, taken)


def notes(contents: Contents) -> tuple[str, ...]:
    """Remarks on targets and entries of `ignore` that name no module: most likely slips of the pen."""
    modules: set[str] = set()
    for name in contents.tensors:
        while name := name.rpartition(".")[0]:
            modules.add(name)
    targets, ignored = Targets(read_config(contents.quantization)).idle(modules)
    remarks = []
    for entries, what in ((targets, "targets that match no module"), (ignored, "ignored modules that are not there")):
        if entries:
            more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
            remarks.append(f"{what}: {entries[0][:100]}{more}")
    return tuple(remarks)


def _modules_with_codes(contents: Contents) -> list[str]:
    """Names of the modules that hold codes; quantized weights without their scales are refused, all named."""
    modules = []
    for name, info in contents.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            if f"{module}.weight" in contents.tensors:
                raise Inconsistent("a module stored twice", where=module, found="weight and weight_packed",
                                   wanted="one of them", remedy="remove the one that its group does not mean")
        elif leaf != "weight" or len(info.shape) < 2 or info.dtype in (*FLOAT_DTYPES, "F64"):
            continue
        elif info.dtype not in ("I8", "F8_E4M3"):
            raise Unsupported("a weight in a dtype that no known compressed-tensors writes", where=name,
                              found=info.dtype, wanted="I8, F8_E4M3 or a float", remedy="export the model again")
        modules.append(module)
    need_all(contents, (f"{module}.weight_scale" for module in modules))
    return modules


def _refuse_uncompressed(contents: Contents, config: Config, modules: Collection[str]) -> None:
    """Refuse float weights that would be quantized at run time only (docs/formats/compressed_tensors.md §11)."""
    told = f"format {config.format or 'not said'}, quantization_status {config.status or 'not said'}"
    remedy = "save the model again compressed (save_compressed=True)"
    float_weights = [
        name.removesuffix("_scale")
        for name in contents.tensors
        if name.endswith(".weight_scale")
        and (info := contents.tensors.get(name.removesuffix("_scale"))) is not None
        and info.dtype in FLOAT_DTYPES
    ]
    if float_weights:
        raise Unsupported("a float weight with a scale beside it: quantized at run time only", where=float_weights[0],
                          found=f"{contents.tensors[float_weights[0]].dtype}; {told}", wanted="codes", remedy=remedy,
                          more=float_weights[1:])
    unsaved = config.format in ("dense", "fakequant") or config.status not in ("", "compressed")
    if unsaved and not modules and any(g.weights is not None for g in config.groups):
        raise Unsupported("weights are declared quantized but none is stored so", where=WHERE, found=told,
                          wanted="codes", remedy=remedy)


def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The canonical weight, codes kept packed as the file packs them where packing runs along K.

    Raises Damaged for values that no writer means: NaN scales or codes, codes or zero points out of range, a g_idx
    outside the groups, a weight_shape unlike the headers.
    """
    from anybit.weights import QuantizedWeight

    if not layer.scheme.is_quantized:
        return plain.canonicalize(layer, tensors)
    _check_shape(layer, tensors)
    group_map = _group_map(layer, tensors)
    return QuantizedWeight(
        scheme=_gathered(layer.scheme) if group_map is not None else layer.scheme,
        shape=layer.shape,
        stored_codes=_codes(layer, tensors),
        scales=_scales(layer, tensors),
        offset=_zero_points(layer, tensors),
        group_map=group_map,
        activation=_activation(layer, tensors),
        bias=tensors.get("bias"),
    )


def _check_shape(layer: Layer, tensors: Mapping[str, Tensor]) -> None:
    stored = tensors.get("weight_shape")
    if stored is not None and tuple(stored.tolist()) != layer.shape:
        raise Inconsistent("weight_shape and the other tensors disagree", where=layer.tensors["weight_shape"],
                           found=str(stored.tolist()), wanted=str(list(layer.shape)),
                           remedy="the file is damaged: download it again")


def _codes(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor | PackedCodes:
    from anybit.checkpoints.dialects._shared import stored
    from anybit.numerics.packing import PackedCodes, as_bytes

    kind, columns = layer.storage["codes"], layer.shape[-1]
    if kind in ("int8", "fp8"):
        where = layer.tensors["weight"]
        if kind == "fp8":
            return stored.fp8_codes(tensors["weight"], where)
        return stored.int_codes(tensors["weight"], layer.scheme.weight_bits, where)
    packed, bits = tensors["weight_packed"], layer.scheme.weight_bits
    if kind in ("fp4", "fp6"):
        return PackedCodes(packed, bits, columns)
    if layer.storage["packing"] == "dense":
        return PackedCodes(as_bytes(packed), bits, columns, sign="offset_binary")
    return stored.padded_codes(packed, bits, columns)


def _scales(layer: Layer, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    from anybit.checkpoints.dialects._shared import stored
    from anybit.weights import block_count

    level = layer.scheme.scales[0]
    rows, columns = layer.shape
    where = layer.tensors["weight_scale"]
    signed = level.format != "fp8_e4m3fn"  # AutoRound writes negative float16 scales here too
    finest = stored.scales(tensors["weight_scale"], level.format, where, allow_negative=signed)
    finest = finest.reshape(block_count(rows, level.block[0]), block_count(columns, level.block[1]))
    if "weight_global_scale" not in tensors:
        return (finest,)
    above = stored.one_value(tensors["weight_global_scale"], layer.tensors["weight_global_scale"])
    return finest, above.reshape(1, 1)


def _zero_points(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Zero points [N, G] int8 in the domain of the signed codes; int32 words hold them packed along N."""
    from anybit.checkpoints.dialects._shared import stored
    from anybit.numerics.packing import PackedCodes, as_bytes
    from anybit.weights import block_count

    given, offset, bits = tensors.get("weight_zero_point"), layer.scheme.offset, layer.scheme.weight_bits
    if given is None:
        return None
    where = layer.tensors["weight_zero_point"]
    if offset is None:
        _refuse_fp8_zero_points(given, where)
        return None
    rows, columns = (block_count(size, block) for size, block in zip(layer.shape, offset.block, strict=True))
    if given.element_size() == 1:
        return stored.int_codes(given, bits, where).reshape(rows, columns)
    along_rows = given.t().contiguous()  # [G, words]
    if layer.storage["packing"] == "dense":
        codes = PackedCodes(as_bytes(along_rows), bits, rows, sign="offset_binary").unpack()
    else:
        codes = stored.padded_codes(along_rows, bits, rows)
    return codes.t().contiguous()


def _group_map(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The group of each input column, None where columns lie in order; any -1 means that it was never written."""
    import torch

    stored = tensors.get("weight_g_idx")
    if stored is None:
        return None
    level = layer.scheme.scales[0]
    columns, groups = layer.shape[-1], layer.shape[-1] // level.block[1]
    in_order = torch.arange(columns) // level.block[1]
    indices = stored.long()
    if int(indices.max()) >= groups:
        first = int((indices >= groups).byte().argmax())
        raise Damaged("index out of range", where=layer.tensors["weight_g_idx"],
                      found=f"{int(indices[first])} at position {first}", wanted=f"0 … {groups - 1} ({groups} groups)",
                      remedy="the file is damaged: download it again")
    never_written = bool((indices < 0).any()) or not bool(indices.any())
    if never_written or torch.equal(indices, in_order):
        return in_order if layer.scheme.act_order else None
    return indices


def _gathered(scheme: Scheme) -> Scheme:
    """The scheme with columns scattered over groups, as a g_idx demands whatever the config says."""
    offset = None if scheme.offset is None else replace(scheme.offset, placement="gathered")
    levels = tuple(replace(level, placement="gathered") for level in scheme.scales)
    return replace(scheme, scales=levels, offset=offset, act_order=True)


def _activation(layer: Layer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Static activation tensors under their canonical names."""
    from anybit.checkpoints.dialects._shared import stored

    found = {}
    names = {"input_scale": "scale", "input_global_scale": "global_scale", "output_scale": "output_scale"}
    for leaf, name in names.items():
        if leaf in tensors:  # an output scale of 0 means: do not quantize the output
            found[name] = stored.one_value(tensors[leaf], layer.tensors[leaf], allow_zero=leaf == "output_scale")
    if "input_zero_point" in tensors:
        found["zero_point"] = tensors["input_zero_point"].reshape(1).int()
    return found


def _refuse_fp8_zero_points(given: Tensor, where: str) -> None:
    if bool(given.float().any()):
        raise Unsupported("asymmetric fp8 weights", where=where, found="zero points other than 0", wanted="0 or none",
                          remedy="quantize the model symmetrically")


def kv_cache(contents: Contents) -> KVCacheSpec | None:
    """The key-value cache that `kv_cache_scheme` declares: stored = e4m3(x / scale), after the rotary embedding.

    Scales may be missing (then 1.0) or, for a dynamic scheme, absent by design: stored ones are not used then. Raises
    Unsupported for other caches (§8).
    """
    scheme = read_config(contents.quantization).kv_cache
    if scheme is None:
        return None
    sound = (scheme.type, scheme.bits, scheme.symmetric) == ("float", 8, True)
    if not sound or scheme.strategy not in ("tensor", "attn_head"):
        raise Unsupported("this key-value cache is not read", where=f"{WHERE}.kv_cache_scheme", found=str(scheme),
                          wanted="float8 symmetric, strategy tensor or attn_head",
                          remedy="remove kv_cache_scheme from config.json: the cache then stays as it is")
    granularity: Literal["tensor", "head"] = "head" if scheme.strategy == "attn_head" else "tensor"
    scales = kv_scales(contents, output_scales=True)
    return demand_scales(contents, KVCacheSpec("fp8_e4m3fn", scales, scheme.dynamic == "dynamic", granularity))
