"""What must compile of the 4 bit products in Gluon (`planes_hopper.py`, `planes_hopper_roles.py`): a product's cases.

Torch-free. `planes_hopper_launch.py` says which products they take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from anybit.kernels.compiling import CompileCase, overlap
from anybit.kernels.triton.planes_form import Form
from anybit.kernels.triton.planes_hopper_launch import HopperConfig, hopper_constants, planned
from anybit.kernels.triton.planes_hopper_roles_launch import (
    X_COLUMNS,
    RolesConfig,
    roles_constants,
    scale_layout,
    tiles,
    word_layout,
    x_layout,
)

__all__ = ["hopper_case", "roles_cases"]

_ARGUMENTS: Final = ("x_ptr", "c0_ptr", "s_ptr", "z_ptr", "row_ptr", "token_ptr", "bias_ptr", "o_ptr", "part_ptr",
                     "count_ptr", "M", "N", "NP", "K", "KP", "x_stride", "z_stride", "mult")
_LINE: Final = {"BLOCKS": "i32", "SHARE": "i32", "LONGER": "i32"}
_OF_ROLES: Final = ("row_ptr", "token_ptr", "bias_ptr", "o_ptr", "part_ptr", "count_ptr", "M", "N", "NP", "z_stride",
                    "mult")
# ptxas decodes ahead of the products where registers are left, and a little beyond; so it reads factors of results
_SPILLS: Final = 64
# scales of groups of 16 are kept beside: Triton 3.6, with which it was measured, spills 54 registers, 3.9 126
_SPILLS_OF_ROLES: Final = 128
_BITS: Final = {"bf16": 16, "fp16": 16, "fp32": 32, "i32": 32, "u8": 8}


def hopper_case(
    case: CompileCase, form: Form, shape: tuple[int, int], tokens: int, *, pinned: bool = False
) -> CompileCase | None:
    """The case of `few_kernel` of a case of `matmul_kernel` on sm_90; None where another one is launched."""
    config = planned(form, *shape, tokens, pinned=pinned) if case.arch == "sm_90" else None
    if not isinstance(config, HopperConfig):
        return None
    constants = hopper_constants(form, config, shape[1], has_factors=case.constants["TOKENS"],
                                 has_bias=case.constants["BIAS"])
    return replace(
        case, function="anybit.kernels.triton.planes_hopper:few_kernel",
        label=f"Gluon, {case.label}{' pinned' if pinned else ''}",
        types={name: case.types[name] for name in _ARGUMENTS} | _LINE, constants=constants, num_warps=config.warps,
        options=config.options, num_stages=1, expects=("wgmma",), spills=_SPILLS,
    )  # fmt: skip


def roles_cases(case: CompileCase, form: Form) -> Iterator[CompileCase]:
    """Cases of `roles_kernel` like one of `matmul_kernel`: each tile of the form, whole and in parts."""
    for tile in tiles(form):
        for parts in ("", " in parts") if tile.is_divisible else ("",):
            config = replace(tile.config, share=len(parts))
            yield replace(
                case, function="anybit.kernels.triton.planes_hopper_roles:roles_kernel", num_warps=4, num_stages=1,
                label=f"Gluon, {case.label}, {config.tokens} x {config.rows}{parts}", types=_types(case, form, config),
                constants=roles_constants(form, config, has_factors=case.constants["TOKENS"],
                                          has_bias=case.constants["BIAS"]),
                divisible=(*case.divisible, "pitch"), options=overlap(config.waits),
                expects=("wgmma",), spills=_SPILLS_OF_ROLES,
            )  # fmt: skip


def _types(case: CompileCase, form: Form, config: RolesConfig) -> dict[str, str]:
    def described(element: str, block: str, layout: tuple[int, int, int]) -> str:
        return f"tensordesc<{element}[{block}],NVMMASharedLayout{layout}>"

    x, s = case.types["x_ptr"][1:], case.types["s_ptr"][1:]
    in_a_row = {
        name: described(element, str(config.rows), scale_layout(_BITS[element] // 8)) if is_there else "*fp32"
        for name, element, is_there in (("s", s, form.scaling != "row"), ("z", "u8", form.has_zeros))
    }
    return in_a_row | {name: case.types[name] for name in _OF_ROLES} | {
        "x": described(x, f"{config.tokens}, {X_COLUMNS}", x_layout(config)),
        "w": described("i32", f"{config.rows}, 32", word_layout(form)),
        "pitch": "i32", "blocks": "i32", "WAVES": "i32", "SHARE": "i32",
    }  # fmt: skip
