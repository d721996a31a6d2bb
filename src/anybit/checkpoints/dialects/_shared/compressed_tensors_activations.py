"""Which activation recipe a compressed-tensors group asks for; torch-free.

The arithmetic itself is in `numerics/activations.py`; the numbers A1 ... A12 are those of
docs/formats/compressed_tensors.md §7, whose reference is vLLM's kernels. Activations that no recipe computes leave the
layer weight-only, and the layer says so: its weight is exact all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from anybit.checkpoints.dialects._shared.compressed_tensors_config import Args
from anybit.schemes import ActivationSpec, Granularity

_ELEMENTS: Final = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8_e4m3fn", ("float", 4): "fp4_e2m1"}
_Key = tuple[str, str, str, bool]  # element, dynamic, strategy, symmetric
_Recipe = tuple[str, Granularity, tuple[str, ...]]  # recipe, granularity, tensors in the file

_RECIPES: Final[Mapping[_Key, _Recipe]] = {
    ("int8", "dynamic", "token", True): ("int8_token", "token", ()),  # A1
    ("int8", "dynamic", "token", False): ("int8_token_asym", "token", ()),  # A2
    ("int8", "static", "tensor", True): ("int8_static_divide", "tensor", ("input_scale",)),  # A3
    ("int8", "static", "tensor", False): ("int8_static", "tensor", ("input_scale", "input_zero_point")),  # A4
    ("int4", "dynamic", "token", True): ("int4_group", "token", ()),  # only the tool's own forward is known
    ("int4", "dynamic", "group", True): ("int4_group", "group", ()),
    ("fp8_e4m3fn", "static", "tensor", True): ("fp8_static", "tensor", ("input_scale",)),  # A5
    ("fp8_e4m3fn", "dynamic", "token", True): ("fp8_token", "token", ()),  # A6
    ("fp8_e4m3fn", "dynamic", "tensor", True): ("fp8_token", "token", ()),  # A12: vLLM runs it per token
    ("fp8_e4m3fn", "dynamic", "group", True): ("fp8_group", "group", ()),  # A7; A10 below
    ("fp4_e2m1", "local", "tensor_group", True): ("nvfp4", "group", ("input_global_scale",)),  # A8
    ("fp4_e2m1", "dynamic", "group", True): ("mxfp4_even", "group", ()),  # A9
}


def input_spec(args: Args | None) -> tuple[ActivationSpec | None, tuple[str, ...], str]:
    """The recipe of a group's input activations, the tensors that it takes from the file, and a remark.

    The recipe is None for weight-only; the remark then says why, "" where the config asks for nothing.
    """
    if args is None:
        return None, (), ""
    element = _ELEMENTS.get((args.type, args.bits), "")
    found = _RECIPES.get((element, args.dynamic, args.strategy, args.symmetric))
    sizes = {"mxfp4_even": 32, "nvfp4": 16}
    if found is None or args.group_size != sizes.get(found[0], args.group_size):
        return None, (), f"no known runtime computes its input activations ({args}): weight-only"
    recipe, granularity, tensors = found
    if recipe == "fp8_group" and args.group_size == 32 and args.scale_dtype == "uint8":
        recipe = "mxfp8_log2"  # A10
    spec = ActivationSpec(element, args.dynamic != "static", granularity, recipe,
                          args.group_size if granularity == "group" else 0, args.symmetric)
    return spec, tensors, ""


def output_spec(args: Args | None) -> tuple[ActivationSpec | None, tuple[str, ...], str]:
    """The fake quantization of a group's outputs (A11), its tensor, and a remark as `input_spec` gives it."""
    if args is None:
        return None, (), ""
    if (args.type, args.bits, args.dynamic, args.strategy, args.symmetric) != ("int", 8, "static", "tensor", True):
        return None, (), f"no known runtime computes its output activations ({args}): they stay as they are"
    return ActivationSpec("int8", False, "tensor", "int8_static_output"), ("output_scale",), ""
