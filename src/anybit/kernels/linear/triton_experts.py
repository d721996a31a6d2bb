"""What must compile of the experts' kernel (`kernels/triton/experts_jit.py`): a single weight's cases, carried over.

Torch-free. The kernel runs the device code of `matmul_kernel` with the launches that `experts.py` takes from it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from anybit.kernels.compiling import CompileCase

__all__ = ["experts_case"]

_STEPS: Final = ("c0_step", "c1_step", "c2_step", "s_step", "ss_step", "z_step", "a_step", "as_step")
_SEGMENTS: Final = ("expert_ptr", "first_ptr", "length_ptr")


def experts_case(case: CompileCase) -> CompileCase:
    """The experts' case of a case of `matmul_kernel`."""
    types = {name: kind for name, kind in case.types.items() if name != "M"}
    types |= dict.fromkeys(_SEGMENTS, "*i32") | dict.fromkeys(_STEPS, "i32")
    constants = {name: value for name, value in case.constants.items() if name != "WAITS"}
    return replace(
        case, function="anybit.kernels.triton.experts_jit:experts_kernel", label=f"experts, {case.label}", types=types,
        constants=constants, divisible=(*case.divisible, *_STEPS), options={},
    )
