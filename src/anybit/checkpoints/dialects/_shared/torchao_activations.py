"""torchao's `act_quant_kwargs` as activation schemes; torch-free. Recipes: docs/formats/torchao.md §5."""

from __future__ import annotations

from typing import Any, Final

from anybit.checkpoints.contents import JSON
from anybit.checkpoints.dialects._shared.torchao_header import Parameter
from anybit.errors import Damaged, Unsupported
from anybit.schemes import ActivationSpec, Granularity

E4M3: Final = "fp8_e4m3fn"
FP8_DTYPES: Final = {"float8_e4m3fn": E4M3, "float8_e5m2": "fp8_e5m2"}
MX_RECIPES: Final = {  # scaling_mode -> recipe; torchao's own default was FLOOR before RCEIL
    "RCEIL": "mx_rceil_torchao", "FLOOR": "mx_floor_torchao", "CEIL": "mx_ceil_torchao", "EVEN": "mx_even_torchao",
}


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
    element = "int7" if is_reduced else "int8"
    if is_static:
        return ActivationSpec(element, False, "tensor", "int8_static", symmetric=is_symmetric)
    recipe = "torchao_int8_token" if is_symmetric else "torchao_int8_token_asym"
    return ActivationSpec(element, True, granularity, recipe, symmetric=is_symmetric)


def int4(parameter: Parameter) -> ActivationSpec | None:
    """Int4Tensor: none, or fp8 by row where `activation_dtype` says so."""
    found = str(parameter.data.get("activation_dtype") or "bfloat16").removeprefix("torch.")
    if found in ("bfloat16", "float16", "float32"):
        return None
    if found != "float8_e4m3fn":
        raise _unknown(parameter, "activation_dtype", found, "bfloat16 or float8_e4m3fn")
    return ActivationSpec(E4M3, True, "token", "torchao_fp8_token")


def float8(parameter: Parameter) -> ActivationSpec | None:
    """Float8Tensor: by row, for the whole call, or by groups of 128; the bound is the one from above."""
    found = _arguments(parameter)
    if found is None:
        return None
    dtype = str(found.get("float8_dtype") or "float8_e4m3fn").removeprefix("torch.")
    if dtype not in FP8_DTYPES:
        raise _unknown(parameter, "float8_dtype", dtype, " or ".join(FP8_DTYPES))
    granularity, size = _granularity(parameter, found)
    return ActivationSpec(FP8_DTYPES[dtype], True, granularity, "torchao_fp8_token", group_size=size,
                          bound=_bound(parameter, found, "hp_value_ub"))


def float8_lower_bound(parameter: Parameter) -> float | None:
    """What the row maximum is raised to, None where nothing says it."""
    return _bound(parameter, _arguments(parameter) or {}, "hp_value_lb")


def _bound(parameter: Parameter, arguments: JSON, key: str) -> float | None:
    found = arguments.get(key)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e38:
        raise Damaged(f"{key} has no sound value", where=parameter.where, found=repr(found)[:80],
                      wanted="a positive number, or null")
    return float(found)


def mx(parameter: Parameter, element: str, size: int) -> ActivationSpec | None:
    """MXTensor: the same kind of element by blocks, shared exponents rounded as `scaling_mode` says."""
    found = _arguments(parameter)
    if found is None:
        return None
    names = {**FP8_DTYPES, "float4_e2m1fn_x2": "fp4_e2m1"}
    told = found.get("elem_dtype")
    own = element if told is None else names.get(str(told).removeprefix("torch."))
    if own is None:
        raise _unknown(parameter, "elem_dtype", told, ", ".join(names))
    mode = str(found.get("scaling_mode") or "RCEIL").upper()
    if mode not in MX_RECIPES:
        raise _unknown(parameter, "scaling_mode", mode, ", ".join(MX_RECIPES))
    if found.get("block_size") not in (None, size):
        raise _unknown(parameter, "block_size", found["block_size"], str(size))
    return ActivationSpec(own, True, "group", MX_RECIPES[mode], group_size=size)


def nvfp4(parameter: Parameter, size: int, *, is_static: bool) -> ActivationSpec | None:
    """NVFP4Tensor: blocks of 16 under a scale of the call, under the stored one, or (neither) under 1."""
    found = _arguments(parameter)
    if found is None:
        return None
    told = found.get("use_dynamic_per_tensor_scale")
    is_dynamic = told if isinstance(told, bool) else not is_static
    return ActivationSpec("fp4_e2m1", is_dynamic, "group", "torchao_nvfp4", group_size=size)


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
