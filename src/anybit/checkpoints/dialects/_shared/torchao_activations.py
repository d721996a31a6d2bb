"""torchao's `act_quant_kwargs` as activation schemes; torch-free. Recipes: docs/formats/torchao.md §5."""

from __future__ import annotations

from typing import Any, Final

from anybit.checkpoints.contents import JSON
from anybit.checkpoints.dialects._shared.torchao_header import Parameter
from anybit.errors import Damaged, Unsupported
from anybit.schemes import ActivationSpec, Granularity

E4M3: Final = "fp8_e4m3fn"


def intx(parameter: Parameter) -> ActivationSpec | None:
    """IntxUnpackedToInt8Tensor: none, or int8 asymmetric per token ("8da4w")."""
    found = parameter.data.get("activation_quantization")
    if found is None:
        return None
    if str(found).lower() != "int8_asym_per_token":
        raise _unknown(parameter, "activation_quantization", found, "int8_asym_per_token")
    return ActivationSpec("int8", True, "token", "torchao_8da4w", symmetric=False)


def int8(parameter: Parameter, *, is_static: bool) -> ActivationSpec | None:
    """Int8Tensor: symmetric or asymmetric, by row or for the whole call; static where a scale is stored."""
    found = _arguments(parameter)
    if found is None:
        return None
    mapping = str(found.get("mapping_type") or "SYMMETRIC").upper()
    if mapping not in ("SYMMETRIC", "ASYMMETRIC"):
        raise _unknown(parameter, "mapping_type", mapping, "SYMMETRIC or ASYMMETRIC")
    is_symmetric = mapping == "SYMMETRIC"
    granularity, _ = _granularity(parameter, found)
    if granularity == "group":
        raise _unknown(parameter, "granularity", "groups", "PerRow or PerTensor")
    is_reduced = bool(found.get("reduce_range"))
    if is_static:
        if is_reduced or granularity != "tensor":
            raise _unknown(parameter, "static arguments", found, "PerTensor over the full range")
        return ActivationSpec("int8", False, "tensor", "int8_static", symmetric=is_symmetric)
    if is_reduced and not is_symmetric:
        raise _unknown(parameter, "reduce_range", "true with ASYMMETRIC", "SYMMETRIC")
    recipe = "torchao_int8_token" if is_symmetric else "torchao_int8_token_asym"
    return ActivationSpec("int7" if is_reduced else "int8", True, granularity, recipe, symmetric=is_symmetric)


def int4(parameter: Parameter) -> ActivationSpec | None:
    """Int4Tensor: none, or fp8 by row where `activation_dtype` says so."""
    found = str(parameter.data.get("activation_dtype") or "bfloat16").removeprefix("torch.")
    if found in ("bfloat16", "float16", "float32"):
        return None
    if found != "float8_e4m3fn":
        raise _unknown(parameter, "activation_dtype", found, "bfloat16 or float8_e4m3fn")
    return ActivationSpec(E4M3, True, "token", "torchao_fp8_token")


def float8(parameter: Parameter) -> ActivationSpec | None:
    """Float8Tensor: by row, for the whole call, or by groups of 128."""
    found = _arguments(parameter)
    if found is None:
        return None
    dtype = str(found.get("float8_dtype") or "float8_e4m3fn").removeprefix("torch.")
    if dtype != "float8_e4m3fn":
        raise _unknown(parameter, "float8_dtype", dtype, "float8_e4m3fn")
    if found.get("hp_value_lb") is not None:
        raise _unknown(parameter, "hp_value_lb", found["hp_value_lb"], "null")
    bound = found.get("hp_value_ub")
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < 1e38):
        raise Damaged("hp_value_ub has no sound value", where=parameter.where, found=repr(bound)[:80],
                      wanted="a positive number, or null")
    granularity, size = _granularity(parameter, found)
    return ActivationSpec(E4M3, True, granularity, "torchao_fp8_token", group_size=size,
                          bound=None if bound is None else float(bound))


def mx(parameter: Parameter, element: str, size: int) -> ActivationSpec | None:
    """MXTensor: the same kind of element by blocks, shared exponents rounded up (RCEIL)."""
    found = _arguments(parameter)
    if found is None:
        return None
    names = {"float8_e4m3fn": E4M3, "float8_e5m2": "fp8_e5m2", "float4_e2m1fn_x2": "fp4_e2m1"}
    told = found.get("elem_dtype")
    own = element if told is None else names.get(str(told).removeprefix("torch."))
    if own is None:
        raise _unknown(parameter, "elem_dtype", told, ", ".join(names))
    mode = str(found.get("scaling_mode") or "RCEIL").upper()
    if mode != "RCEIL":
        raise _unknown(parameter, "scaling_mode", mode, "RCEIL")
    if found.get("block_size") not in (None, size):
        raise _unknown(parameter, "block_size", found["block_size"], str(size))
    return ActivationSpec(own, True, "group", "mx_rceil_torchao", group_size=size)


def nvfp4(parameter: Parameter, size: int, *, is_static: bool) -> ActivationSpec | None:
    """NVFP4Tensor: blocks of 16 under a scale of the call, or under the stored one."""
    found = _arguments(parameter)
    if found is None:
        return None
    if found.get("use_dynamic_per_tensor_scale") is False and not is_static:
        raise _unknown(parameter, "use_dynamic_per_tensor_scale", "false, no act_per_tensor_scale", "one of the two")
    return ActivationSpec("fp4_e2m1", not is_static, "group", "torchao_nvfp4", group_size=size)


def _arguments(parameter: Parameter) -> JSON | None:
    found = parameter.data.get("act_quant_kwargs")
    if found is not None and not isinstance(found, dict):
        raise Damaged("act_quant_kwargs has no sound value", where=parameter.where, found=repr(found)[:80],
                      wanted="an object, or null")
    return found


def _granularity(parameter: Parameter, arguments: JSON) -> tuple[Granularity, int]:
    """Who shares a scale, and the group size where it is a group."""
    found = arguments.get("granularity")
    kind = found.get("_type") if isinstance(found, dict) else "PerRow" if found is None else None
    if kind == "PerRow":
        return "token", 0
    if kind == "PerTensor":
        return "tensor", 0
    sizes = found.get("block_size") if isinstance(found, dict) else None
    if kind == "PerBlock" and isinstance(sizes, list | tuple) and len(sizes) == 2 and sizes[0] == 1 \
            and type(sizes[1]) is int and 0 < sizes[1] < 2**20:
        return "group", sizes[1]
    raise _unknown(parameter, "granularity", found, "PerRow, PerTensor, or PerBlock of one row")


def _unknown(parameter: Parameter, key: str, found: Any, wanted: str) -> Unsupported:
    return Unsupported(f"activation quantization with another {key}", where=parameter.where, found=repr(found)[:80],
                       wanted=wanted, remedy="quantize the model anew")
