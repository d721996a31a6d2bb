"""GGUF as a dialect: ggml's blocks under Hugging Face names.

Tables say what a tensor is called there and what Scheme each ggml type is; `gguf_blocks.py` takes blocks apart. For
architecture llama the converter permuted the rows of q and k from half-split to interleaved rotary order; a row is
whole blocks, so the raw rows are put back before anything is taken apart. Types of vectors from large code books (IQ1,
IQ2, IQ3) are decoded to float32 while reading, which a note says.
Source: ggml 0c1e57098, docs/formats/gguf.md §3, §4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from anybit.checkpoints import gguf, gguf_config
from anybit.checkpoints.contents import FLOAT_DTYPES, Contents, TensorInfo
from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.schemes import TENSOR, Layer, LayerKind, Offset, ScaleLevel, Scheme, dense, group

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.weights import Dense, QuantizedWeight

NAME: Final = "gguf"


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

# GGUF module -> Hugging Face module
_TOP: Final = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_IN_BLOCK: Final = re.compile(r"blk\.([0-9]+)\.([a-z_0-9]+)")
_ONE_EXPERT: Final = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)\.([0-9]+)")  # before April 2024
_PERMUTED: Final = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}  # module -> count of its heads
_FROM_VECTOR: Final = ("ffn_gate_inp_shexp",)  # a matrix [1, K] that is stored as a vector

# Tensors that are no parameters of the Hugging Face model: frequencies, and scales of activations that llama.cpp
# itself does not quantize.
_NOT_PARAMETERS: Final = re.compile(r"rope_freqs\.weight|blk\.[0-9]+\.attn_rot_embd\..*|.*\.input_scale")


def recognizes(contents: Contents) -> bool:
    """True for the contents of a GGUF file."""
    return contents.gguf is not None


def declare(contents: Contents) -> dict[str, Layer]:
    """Every matrix under its Hugging Face name; under its own in a file of an unknown architecture."""
    known = _architecture(contents) is not None
    layers = {}
    for name, info in contents.tensors.items():
        module, dot, part = name.rpartition(".")
        if not dot or part != "weight":
            continue
        target = _hf_module(module) if known else module
        if target is None or not _is_matrix(module, info):
            continue
        layer = _layer(contents, module, target, info)
        layers[target] = layer
    return layers


def plain(contents: Contents) -> dict[str, str]:
    """Norms and other vectors: Hugging Face tensor name -> GGUF tensor name."""
    known = _architecture(contents) is not None
    found = {}
    for name in contents.tensors:
        module, _, part = name.rpartition(".")
        target = _hf_module(module) if known else module
        weight = contents.tensors.get(f"{module}.weight")
        if target is None or part not in ("weight", "bias") or weight is None or _is_matrix(module, weight):
            continue
        found[f"{target}.{part}"] = name
    return found


def notes(contents: Contents) -> tuple[str, ...]:
    """What is odd but legal about the files."""
    return gguf.remarks(contents)


def require_loadable(contents: Contents) -> None:
    """Raise Unsupported for a file that can be inspected but not run: no model, or parts without a place here."""
    gguf_config.require_loadable(contents)
    used = {name for layer in declare(contents).values() for name in layer.tensors.values()}
    used.update(plain(contents).values())
    unknown = [name for name in contents.tensors if name not in used and not _NOT_PARAMETERS.fullmatch(name)]
    if unknown:
        raise Unsupported("the file has tensors that its architecture does not have here", where=contents.path.name,
                          found=unknown[0], wanted="tensors of docs/formats/gguf.md §4",
                          remedy="use a safetensors checkpoint of the same model", more=unknown[1:])


def canonicalize(layer: Layer, tensors: Mapping[str, Tensor]) -> QuantizedWeight | Dense:
    """The blocks of one layer as codes and scales, rows of q and k in Hugging Face order."""
    from anybit.checkpoints import gguf_blocks
    from anybit.weights import Dense, QuantizedWeight

    raw, bias = tensors["weight"], tensors.get("bias")
    heads = layer.storage.get("heads")
    if isinstance(heads, int):
        order = _half_split_rows(layer.shape[0], heads, raw)
        raw = raw.index_select(0, order)
        bias = None if bias is None else bias.index_select(0, order)
    kind = str(layer.storage["type"])
    if kind in FLOAT_DTYPES:
        return Dense(layer.scheme, raw.view(layer.shape), bias)
    if kind in gguf_blocks.GRID_TYPES:
        return Dense(layer.scheme, gguf_blocks.decode_grid(kind, raw), bias)
    parts = gguf_blocks.take_apart(kind, raw)
    if kind == "MXFP4":
        _refuse_largest_exponent(parts.scales[0], layer)
    scales = [*parts.scales]
    if "scale" in tensors:
        scales.append(tensors["scale"].float().reshape(*layer.shape[:-2], 1))
    offset = parts.minimum
    if layer.scheme.offset == _ONE:
        offset = raw.new_ones(*layer.shape[:-2], 1, 1)
    for tensor in (*scales, *parts.minimum_scales, *(() if offset is None else (offset,))):
        _refuse_infinite(tensor, layer)
    return QuantizedWeight(
        scheme=layer.scheme,
        shape=layer.shape,
        stored_codes=parts.codes,
        scales=tuple(s if s.dim() == len(layer.shape) else s.unsqueeze(-1) for s in scales),
        offset=offset,
        offset_scales=parts.minimum_scales,
        bias=bias,
    )


def _architecture(contents: Contents) -> gguf_config.Architecture | None:
    return gguf_config.architecture_of(contents.gguf or {}, contents.tensors)


def _hf_module(module: str) -> str | None:
    """The Hugging Face name of a GGUF module, None where it has none."""
    if module in _TOP:
        return _TOP[module]
    expert = _ONE_EXPERT.fullmatch(module)
    if expert:
        return f"model.layers.{expert[1]}.mlp.experts.{expert[3]}.{expert[2]}_proj"
    block = _IN_BLOCK.fullmatch(module)
    if block and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}"
    return None


def _is_matrix(module: str, info: TensorInfo) -> bool:
    return len(info.shape) in (2, 3) or module.endswith(_FROM_VECTOR)


def _layer(contents: Contents, module: str, target: str, info: TensorInfo) -> Layer:
    shape = (1, *info.shape) if len(info.shape) == 1 else info.shape
    if 0 in shape:
        raise Inconsistent(f"{info.name} is empty", where=info.file.name, found=" x ".join(map(str, shape)),
                           wanted="a matrix")
    names = {"weight": info.name}
    for role in ("bias", "scale"):
        if f"{module}.{role}" in contents.tensors:
            names[role] = f"{module}.{role}"
    storage: dict[str, object] = {"type": info.dtype}
    heads = _heads(contents, module, shape)
    if heads is not None:
        storage["heads"] = heads
    kind: LayerKind = "embedding" if module == "token_embd" else "experts" if len(shape) == 3 else "linear"
    return Layer(
        name=target,
        kind=kind,
        shape=shape,
        scheme=_scheme(contents, info, names),
        tensors=names,
        storage=storage,
        stored_bytes=contents.bytes_of(*names.values()),
        notes=_layer_notes(contents, module, info),
    )


def _scheme(contents: Contents, info: TensorInfo, names: Mapping[str, str]) -> Scheme:
    scale = names.get("scale")
    if scale is not None:
        _check_scale(contents.tensors[scale], info)
        return _NVFP4_SCALED
    if info.dtype in SCHEMES:
        return SCHEMES[info.dtype]
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


def _layer_notes(contents: Contents, module: str, info: TensorInfo) -> tuple[str, ...]:
    said = []
    if info.dtype.startswith("IQ") and info.dtype not in SCHEMES:
        said.append(f"{info.dtype} is decoded to float32 while reading: no kernel reads its code book")
    if f"{module}.input_scale" in contents.tensors:
        said.append("input_scale is not used: activations stay unquantized, as in llama.cpp")
    return tuple(said)


def _heads(contents: Contents, module: str, shape: tuple[int, ...]) -> int | None:
    """How many heads the rows of q or k hold, where the converter permuted them."""
    architecture = _architecture(contents)
    block = _IN_BLOCK.fullmatch(module)
    if architecture is None or not architecture.permuted or block is None or block[2] not in _PERMUTED:
        return None
    heads: int = contents.config[_PERMUTED[block[2]]]
    if shape[0] % (2 * heads):
        raise Inconsistent(f"{module}.weight does not hold whole heads", where=contents.path.name,
                           found=f"{shape[0]} rows", wanted=f"a multiple of {2 * heads} ({heads} heads)")
    return heads


def _half_split_rows(rows: int, heads: int, like: Tensor) -> Tensor:
    """For each row in half-split order the row of the file that holds it: [rows] int64."""
    import torch

    interleaved = torch.arange(rows, device=like.device).view(heads, rows // heads // 2, 2)
    return interleaved.transpose(1, 2).reshape(rows)


def _refuse_largest_exponent(exponents: Tensor, layer: Layer) -> None:
    """Exponent 255 is 2^127 for ggml and NaN for everyone else; a canonical e8m0 cannot say the former."""
    count = int((exponents == 255).sum())
    if count:
        raise Unsupported("an MXFP4 block has exponent 255", where=layer.name, found=f"{count} blocks",
                          wanted="exponents 0 … 254")


def _refuse_infinite(scale: Tensor, layer: Layer) -> None:
    import torch

    if scale.is_floating_point() and not bool(torch.isfinite(scale).all()):
        count = int((~torch.isfinite(scale)).sum())
        raise Damaged("a scale is not finite", where=layer.name, found=f"{count} of {scale.numel()}",
                      wanted="finite scales", remedy="download the file again")
