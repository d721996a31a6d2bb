"""Which activation recipe a Quark input spec asks for; torch-free.

The arithmetic is in `numerics/activations.py`; recipes and what they were compared with: docs/formats/quark.md §7. An
input that no recipe computes leaves the layer weight-only, and the layer says so: its weight is exact all the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from anybit.checkpoints.dialects._shared.quark_config import Spec, Stages
from anybit.schemes import ActivationSpec, Granularity

_E4M3: Final = "fp8_e4m3fn"
_MX_ELEMENTS: Final = {"fp4": "fp4_e2m1", "fp6_e2m3": "fp6_e2m3", "fp6_e3m2": "fp6_e3m2"}
_Made = tuple[str, Granularity, str, tuple[str, ...]]  # element, granularity, recipe, tensors in the file

# dtype, qscheme, dynamic, symmetric -> how; int8 static takes its zero point from the file, 0 when symmetric
_RECIPES: Final[dict[tuple[str, str, bool, bool], _Made]] = {
    ("fp8_e4m3", "per_tensor", False, True): (_E4M3, "tensor", "fp8_static", ("input_scale",)),
    ("fp8_e4m3", "per_tensor", True, True): (_E4M3, "tensor", "fp8_tensor", ()),
    ("fp8_e4m3", "per_channel", True, True): (_E4M3, "token", "fp8_token", ()),
    ("fp8_e4m3", "per_group", True, True): (_E4M3, "group", "fp8_group_divide", ()),
    ("int8", "per_tensor", False, True): ("int8", "tensor", "int8_static", ("input_scale", "input_zero_point")),
    ("int8", "per_tensor", False, False): ("int8", "tensor", "int8_static", ("input_scale", "input_zero_point")),
    ("int8", "per_channel", True, True): ("int8", "token", "int8_token", ()),
    ("int8", "per_channel", True, False): ("int8", "token", "int8_token_asym", ()),
    ("int4", "per_group", True, True): ("int4", "group", "int4_group", ()),
}


def input_spec(stages: Stages, present: Collection[str]) -> tuple[ActivationSpec | None, tuple[str, ...], str]:
    """(recipe, roles of the tensors that it takes, remark) of a layer whose tensors have the roles `present`.

    The recipe is None for weight-only; the remark then says why, "" where the config asks for nothing.
    """
    if not stages:
        return None, (), ""
    made = _made(stages)
    shown = " + ".join(str(stage) for stage in stages)
    if made is None:
        return None, (), f"no known runtime computes its input quantization ({shown}): weight-only"
    element, granularity, recipe, roles = made
    needed = next((role for role in roles if role not in present and role != "input_zero_point"), "")
    if needed:  # file-to-file exports store no calibrated scales
        return None, (), f"its input quantization ({shown}) lacks {needed}: weight-only"
    first = stages[0]
    size = first.group_size if granularity == "group" else 0
    spec = ActivationSpec(element, not roles, granularity, recipe, size, first.symmetric)
    return spec, tuple(role for role in roles if role in present), ""


def asks_for_scales(stages: Stages) -> bool:
    """True if the inputs' scales are calibrated, hence in the file."""
    return bool(stages) and not stages[-1].dynamic


def _made(stages: Stages) -> _Made | None:
    first = stages[0]
    if len(stages) == 2:
        is_nvfp4 = (first.dtype, first.group_size, stages[1].dtype) == ("fp4", 16, "fp8_e4m3")
        return ("fp4_e2m1", "group", "nvfp4_reciprocal", ("input_scale_2",)) if is_nvfp4 else None
    if len(stages) > 2:
        return None
    if first.dtype in ("mx", *_MX_ELEMENTS):
        return _microscaled(first)
    if first.qscheme == "per_channel" and first.axis not in (1, -1):  # on inputs axis 1 means per token
        return None
    if first.qscheme == "per_group" and first.group_size <= 0:
        return None
    return _RECIPES.get((first.dtype, first.qscheme, first.dynamic, first.symmetric))


def _microscaled(spec: Spec) -> _Made | None:
    element = _MX_ELEMENTS.get(spec.element if spec.dtype == "mx" else spec.dtype)
    if element is None or not spec.dynamic or spec.group_size <= 0:
        return None
    if spec.dtype == "fp4" and spec.scale_format == "e5m3":
        return element, "group", "amdfp4", ()
    if spec.scale_format != "e8m0" and spec.dtype != "mx":
        return None
    return element, "group", f"mx_{spec.mode}", ()
