"""What must compile of the kernels in Gluon (`kernels/triton/planes_hopper.py`): a product's cases, carried over.

Torch-free. `planes_hopper_launch.py` says which products they take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from anybit.kernels.compiling import CompileCase
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_hopper_launch import hopper_constants, planned

__all__ = ["hopper_case"]

_ARGUMENTS: Final = ("x_ptr", "c0_ptr", "s_ptr", "z_ptr", "row_ptr", "token_ptr", "bias_ptr", "o_ptr", "part_ptr",
                     "count_ptr", "M", "N", "NP", "K", "KP", "x_stride", "z_stride", "mult")
# ptxas decodes ahead of the products where registers are left, and a little beyond
_SPILLS: Final = 32


def hopper_case(case: CompileCase, form: Form, shape: tuple[int, int], tokens: int) -> CompileCase | None:
    """The case in Gluon of a case of `matmul_kernel` on sm_90; None where that one is launched."""
    config = planned(form, *shape, tokens) if case.arch == "sm_90" else None
    if config is None:
        return None
    constants = hopper_constants(form, config, shape[1], has_factors=case.constants["TOKENS"],
                                 has_bias=case.constants["BIAS"])
    return replace(
        case, function=f"anybit.kernels.triton.planes_hopper:{config.kernel}", label=f"Gluon, {case.label}",
        types={name: case.types[name] for name in _ARGUMENTS}, constants=constants, num_warps=config.warps,
        options={"launch_pdl": True} if config.waits else {},
        num_stages=1, expects=("wgmma",), spills=_SPILLS,
    )
