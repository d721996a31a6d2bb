"""What must compile of the experts' kernels (`kernels/triton/experts_*_jit.py`): a single weight's cases, carried over.

Torch-free. The kernels run the device code of a single weight's, launched as that is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from anybit.kernels.compiling import CompileCase

__all__ = ["experts8_case", "experts_case"]

_STEPS: Final = ("c0_step", "c1_step", "c2_step", "s_step", "ss_step", "z_step", "a_step", "as_step")
_SPILLS: Final = 4  # ptxas parks a few words on the stack by its own choice, far below the registers it may use
_SEGMENTS: Final = ("expert_ptr", "first_ptr", "length_ptr")


def experts_case(case: CompileCase) -> CompileCase:
    """The experts' case of a case of `matmul_kernel`."""
    types = {name: kind for name, kind in case.types.items() if name != "M"}
    types |= dict.fromkeys(_SEGMENTS, "*i32") | dict.fromkeys(_STEPS, "i32")
    constants = {name: value for name, value in case.constants.items() if name != "WAITS"}
    return replace(
        case, function="anybit.kernels.triton.experts_planes_jit:experts_kernel", label=f"experts, {case.label}",
        types=types, constants=constants, divisible=(*case.divisible, *_STEPS), options={},
    )


def experts8_case(case: CompileCase) -> CompileCase:
    """The experts' case of a case of `w8a8_matmul` without tensor descriptors."""
    types = {name: kind for name, kind in case.types.items() if name != "M"}
    types |= dict.fromkeys(_SEGMENTS, "*i32") | {"sx_step": "i32", "sw_step": "i32"}
    constants = {name: value for name, value in case.constants.items() if name not in ("TMA", "WAITS")}
    return replace(
        case, function="anybit.kernels.triton.experts_rows8_jit:experts8_kernel", label=f"experts, {case.label}",
        types=types, constants=constants, options={}, spills=_SPILLS,
    )
