"""Compile cases of the small kernels that end a product: sums of the parts of K, scales, bias. Torch-free."""

from __future__ import annotations

from typing import Final

from anybit.kernels.compiling import CompileCase

__all__ = ["epilogue_case", "finish_cases", "sums_cases"]

_COLUMNS: Final = 1024  # of a row, for each program: as the launchers say
_ROOM: Final = "anybit.kernels.triton"


def sums_cases(kernel: str, arch: str) -> list[CompileCase]:
    """Parts of K added in order, by the second kernel of a split product on AMD."""
    types = {"part_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16", "M": "i32", "N": "i32"}
    return [CompileCase(kernel, f"{_ROOM}.skinny_jit:add_parts", arch, f"sums of parts, bias {bias}", types,
                        {"PARTS": 4, "HAS_BIAS": bias, "BN": _COLUMNS}, divisible=("N",)) for bias in (False, True)]


def epilogue_case(kernel: str, arch: str, *, integer: bool) -> CompileCase:
    """The same for codes: int32 sums with zero points on both sides, or float32 sums."""
    names = ("sx_ptr", "sw_ptr", "zx_ptr", "cs_ptr", "xs_ptr", "zw_ptr")
    kinds = ("*fp32", "*fp32", "*i32", "*i32", "*i32", "*i32") if integer else ("*fp32",) * 6
    types = {"part_ptr": "*i32" if integer else "*fp32", **dict(zip(names, kinds, strict=True)), "bias_ptr": "*bf16",
             "out_ptr": "*bf16", "M": "i32", "N": "i32"}
    constants = {"PARTS": 4, "IS_SHIFTED": integer, "W_SHIFTED": integer, "X_IN_BLOCKS": False, "W_IN_BLOCKS": False,
                 "HAS_BIAS": True, "BN": _COLUMNS}
    return CompileCase(kernel, f"{_ROOM}.w8a8_jit:w8a8_epilogue", arch, "epilogue of parts", types, constants,
                       divisible=("N",))


def finish_cases(kernel: str, arch: str) -> list[CompileCase]:
    """Factors of tokens and the bias after torch's product."""
    types = {"y_ptr": "*fp32", "token_ptr": "*fp32", "bias_ptr": "*bf16", "o_ptr": "*bf16", "M": "i32", "N": "i32",
             "o_stride": "i32", "alpha": "fp32"}
    return [CompileCase(kernel, f"{_ROOM}.planes_kernels:finish_kernel", arch, f"finish, factors {tokens}", types,
                        {"TOKENS": tokens, "BIAS": True, "BN": _COLUMNS}, divisible=("N", "o_stride"))
            for tokens in (False, True)]
