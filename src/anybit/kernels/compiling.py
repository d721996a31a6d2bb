"""What must compile for a kernel to be claimed: cases that the gate compiles for each architecture, as data.

No Triton and no torch here: a case names its function by "module:function", and the gate (tools/gate.py) imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["OVERLAPPING", "CompileCase", "overlap"]

OVERLAPPING: Final = ("sm_90",)  # where launches that begin while the kernel before them ends were measured


def overlap(waits: bool) -> dict[str, bool]:
    """Options of a launch, or of its case, that begins so where the kernel waits itself (docs/decisions/0007)."""
    return {"launch_pdl": True} if waits else {}


@dataclass(frozen=True)
class CompileCase:
    """One specialization of a Triton function, in a configuration that plans use.

    kernel      name of the KernelSpec that launches it
    function    "anybit.kernels.triton.module:function", a @triton.jit function
    arch        "sm_90", "gfx942", ...: what it is compiled for
    label       what distinguishes it from the kernel's other cases: "int4 g128 bf16 M<=16"
    types       argument -> Triton type ("*bf16", "*i32", "i32", "fp32", "tensordesc<bf16[128, 64]>"); pointers count
                as divisible by 16, as the launcher infers for allocations
    constants   constexpr arguments
    divisible   integer arguments that are multiples of 16 in this case
    num_warps, num_stages    launch options
    options     further backend options (waves_per_eu, matrix_instr_nonkdim, ...)
    expects     regular expressions, each of which must occur in the assembly (the matrix instruction)
    spills      registers that may be spilled
    """

    kernel: str
    function: str
    arch: str
    label: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    expects: tuple[str, ...] = ()
    spills: int = 0
