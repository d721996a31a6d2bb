"""torchao's parameters as the safetensors header tells them: class, attributes, names of the stored pieces; torch-free.

Parameter a.b.weight of class C is stored as a.b._weight_<attribute>, and `__metadata__` holds under its name
{"_type": C, "_data": {attributes}, "_tensor_data_names": [pieces]}. torchao 0.14 called the pieces a.b.weight:qdata,
plain tensors a.b.bias:_data, and listed no pieces. Source: docs/formats/torchao.md §2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from anybit.checkpoints.contents import JSON, Contents, TensorInfo
from anybit.checkpoints.jsonfile import parse_json
from anybit.errors import Damaged, Inconsistent, Unsupported

HEADER: Final = "__metadata__"
_AGAIN: Final = "the checkpoint is incomplete or damaged: download it again"

# class -> (pieces that it cannot do without, pieces that it may have)
PIECES: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "Int8Tensor": (("qdata", "scale"), ("zero_point", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")),
    "IntxUnpackedToInt8Tensor": (("qdata", "scale"), ("zero_point",)),
    "Int4Tensor": (("qdata", "scale", "zero_point"), ("act_pre_scale",)),
    "Int4TilePackedTo4dTensor": (("qdata", "scale_and_zero"), ("act_pre_scale",)),
    "Float8Tensor": (("qdata", "scale"), ()),
    "MXTensor": (("qdata", "scale"), ()),
    "NVFP4Tensor": (("qdata", "scale"), ("per_tensor_scale", "act_per_tensor_scale")),
}


@dataclass(frozen=True)
class Parameter:
    """One quantized parameter.

    name    as the model calls it, "a.b.weight"
    kind    torchao's class
    data    its attributes, enums and dtypes as plain words
    pieces  attribute -> stored tensor
    """

    name: str
    kind: str
    data: JSON
    pieces: Mapping[str, TensorInfo]

    @property
    def where(self) -> str:
        """The place for messages."""
        return f"{HEADER}: {self.name}"


def with_current_names(contents: Contents) -> Contents:
    """The contents with torchao 0.14's names ("a.weight:qdata", "a.bias:_data") as later versions write them.

    Raises Inconsistent where both names of a tensor are there.
    """
    if not any(":" in name for name in contents.tensors) or not has_parameters(contents):
        return contents
    tensors: dict[str, TensorInfo] = {}
    for name, info in contents.tensors.items():
        parameter, colon, piece = name.rpartition(":")
        current = parameter if piece == "_data" else _stored_name(parameter, piece) if colon else name
        if current in tensors:
            raise Inconsistent("a tensor stored under an old and a new name", where=name, found=current,
                               wanted="one of them", remedy=_AGAIN)
        tensors[current] = replace(info, name=current)
    return replace(contents, tensors=tensors)


def _stored_name(parameter: str, piece: str) -> str:
    module, _, leaf = parameter.rpartition(".")
    return f"{module}._{leaf}_{piece}" if module else f"_{leaf}_{piece}"


def has_parameters(contents: Contents) -> bool:
    """True if the header tells torchao's classes."""
    return "tensor_names" in contents.metadata or any('"_type"' in text for text in contents.metadata.values())


def parameters(contents: Contents) -> list[Parameter]:
    """All quantized parameters.

    Raises Unsupported for classes of another layout, Inconsistent where a stored piece or a header is missing, Damaged
    for a header that is no sound JSON.
    """
    found = []
    parsed: dict[str, JSON] = {}  # parameters of one shape and config have one text; a large model has few of them
    for name, text in contents.metadata.items():
        if name == "tensor_names" or not text.lstrip().startswith("{"):  # "format": "pt"
            continue
        if text not in parsed:
            parsed[text] = parse_json(text.encode("utf-8", "surrogatepass"), f"{HEADER}: {name[:200]}")
        entry = parsed[text]
        kind = entry.get("_type")
        if kind == "Tensor" or not isinstance(kind, str):
            continue
        found.append(_parameter(contents, name, kind, entry))
    claimed = {info.name for parameter in found for info in parameter.pieces.values()}
    bare = [name for name in contents.tensors if name.endswith("_qdata") and name not in claimed]
    if bare:
        raise Inconsistent("codes that the header does not describe", where=bare[0], found=f"no entry in {HEADER}",
                           wanted="class and attributes of the parameter", remedy=_AGAIN, more=bare[1:])
    return found


def _parameter(contents: Contents, name: str, kind: str, entry: JSON) -> Parameter:
    where = f"{HEADER}: {name[:200]}"
    if kind not in PIECES:
        raise Unsupported(f"torchao's class {kind[:60]}", where=where, found=kind[:60], wanted=", ".join(PIECES),
                          remedy="quantize the model anew with one of these layouts")
    data, listed = entry.get("_data"), entry.get("_tensor_data_names", [])
    if not isinstance(data, dict) or not isinstance(listed, list) or not all(isinstance(n, str) for n in listed):
        raise Damaged("_data or _tensor_data_names has no sound value", where=where, found=", ".join(entry)[:80],
                      wanted="an object and a list of names", remedy=_AGAIN)
    needed, optional = PIECES[kind]
    unknown = sorted(set(listed) - {*needed, *optional})
    if unknown:
        raise Unsupported("a piece that nothing here knows", where=where, found=unknown[0][:60],
                          wanted=", ".join((*needed, *optional)), remedy="a newer anybit may read it")
    pieces = {}
    for piece in (*needed, *optional):
        # the pieces' names are made, never taken apart: a parameter's name may hold underscores itself
        stored = _stored_name(name, piece)
        if stored in contents.tensors:  # pieces may lie in other shards than the entry that lists them
            pieces[piece] = contents.tensors[stored]
        elif piece in listed or piece in needed:
            raise Inconsistent("a tensor of a quantized layer is missing", where=where, found=f"no {stored}",
                               wanted=stored, remedy=_AGAIN)
    return Parameter(name, kind, {key: plain_value(value) for key, value in data.items()}, pieces)


def plain_value(value: Any) -> Any:
    """An enum, dtype or object of the header without its wrapping.

    {"_type": "torch.dtype", "_data": "int4"} is "int4"; {"_type": "PerRow", "_data": {"dim": -1}} is
    {"_type": "PerRow", "dim": -1}; anything else is itself.
    """
    if not isinstance(value, dict) or "_data" not in value:
        return value
    inner = value["_data"]
    if isinstance(inner, dict):
        return {"_type": value.get("_type"), **{key: plain_value(part) for key, part in inner.items()}}
    return inner
