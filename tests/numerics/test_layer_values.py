"""Recorded layer values of genuine checkpoints: y = recipe(x) @ W^T in float64, for recipes of every family.

The weights are read here by hand, from tensors alone, so that this test needs no dialect; the dialects' own tests
compare all folders through `anybit.open`.
"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from anybit.numerics.activations import quantize_dequantize
from anybit.numerics.codec import decode
from anybit.numerics.packing import unpack_stream
from anybit.schemes import ActivationSpec
from conftest import CHECKPOINTS, EXPECTED, digest, expected

E4M3, FP4 = "fp8_e4m3fn", "fp4_e2m1"


def static(recipe: str, element: str) -> ActivationSpec:
    return ActivationSpec(element, False, "tensor", recipe)


def token(recipe: str, element: str, bound: float | None = None) -> ActivationSpec:
    return ActivationSpec(element, True, "token", recipe, bound=bound)


def group(recipe: str, element: str, size: int) -> ActivationSpec:
    return ActivationSpec(element, True, "group", recipe, group_size=size)


# folder -> (element of the weight, format of its scales, activation)
FOLDERS = {
    "ct-qwen3-fp8-static-tensor": (E4M3, "", static("fp8_static", E4M3)),
    "ct-qwen3-fp8-dynamic": (E4M3, "", token("fp8_token", E4M3)),
    "ct-llama-fp8-block": (E4M3, "", group("fp8_group", E4M3, 128)),
    "ct-qwen2-w8a8-int8-dynamic": ("int8", "", token("int8_token", "int8")),
    "ct-llama-w8a8-int8-asym-dynamic": ("int8", "", token("int8_token_asym", "int8")),
    "ct-llama-w8a8-int8-static": ("int8", "", static("int8_static_divide", "int8")),
    "ct-llama-w8a8-int8-static-asym": ("int8", "", static("int8_static", "int8")),
    "ct-llama-nvfp4": (FP4, E4M3, group("nvfp4", FP4, 16)),
    "ct-llama-mxfp4": (FP4, "e8m0", group("mxfp4_even", FP4, 32)),
    "ct-llama-mxfp6": ("fp6_e2m3", "e8m0", group("mxfp8_log2", E4M3, 32)),
    "ct-llama-mxfp8": (E4M3, "e8m0", group("mxfp8_log2", E4M3, 32)),
    "modelopt-nvfp4-llama": (FP4, E4M3, group("nvfp4_reciprocal", FP4, 16)),
    "modelopt-fp8-pcpt-qwen2": (E4M3, "", token("fp8_token", E4M3)),
    "modelopt-w4a8-nvfp4-fp8-llama": (FP4, E4M3, static("fp8_static_divide", E4M3)),
    "quark-mxfp6-e3m2-qwen3": ("fp6_e3m2", "e8m0", group("mx_even", "fp6_e3m2", 32)),
    "quark-mxfp4-a-mxfp6-e2m3-llama": (FP4, "e8m0", group("mx_even", "fp6_e2m3", 32)),
    "quark-amdfp4-e5m3-llama": (FP4, "ue5m3", group("amdfp4", FP4, 16)),
    "autoround-mxfp4-llama": (FP4, "e8m0", group("mx_floor_autoround", FP4, 32)),
    "fbgemm-fp8-llama": (E4M3, "", token("fp8_token", E4M3, bound=2.5)),  # activation_scale_ub
    "fp8-deepseek-block-llama-ragged": (E4M3, "", group("fp8_group_divide", E4M3, 128)),
    "fp8-block-e8m0-qwen3": (E4M3, "e8m0", group("fp8_group_ue8m0", E4M3, 128)),
    "torchao-fp8da-qwen3": (E4M3, "", token("torchao_fp8_token", E4M3)),
    "torchao-int8da-llama": ("int8", "", token("torchao_int8_token", "int8")),
    "bnb-int8-llama": ("int8", "", token("llm_int8", "int8", bound=6.0)),
}
VALUES_IN_FLOAT64 = ("torchao", "bnb")  # whose recorded x was code * scale in float64
STATIC_NAMES = {"input_scale": "scale", "input_zero_point": "zero_point", "input_global_scale": "global_scale"}


def tensors_of(folder: str, module: str) -> dict[str, Tensor]:
    found = {}
    for file in (CHECKPOINTS / folder).glob("*.safetensors"):
        with safe_open(str(file), "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                if name.startswith(f"{module}."):
                    found[name.removeprefix(f"{module}.").removeprefix("_weight_")] = stored.get_tensor(name)
    return found


def first(stored: dict[str, Tensor], *names: str) -> Tensor:
    return next(stored[name] for name in names if name in stored)


def reference_weight(
    stored: dict[str, Tensor], element: str, scale_format: str, shape: tuple[int, int], *, blocks: bool
) -> Tensor:
    """[N, K] float32; scales on a grid of groups or rows, or of 128 x 128 blocks."""
    rows, columns = shape
    codes = first(stored, "weight", "weight_packed", "qdata")
    if element in (FP4, "fp6_e2m3", "fp6_e3m2"):
        codes = unpack_stream(codes, 4 if element == FP4 else 6, columns)
    value = decode(element, codes)
    if "SCB" in stored:  # bitsandbytes.md §3: two roundings, in this order
        return (value * stored["SCB"][:, None]) * torch.tensor(0.007874015718698502)
    scale = first(stored, "weight_scale", "weight_scale_inv", "scale")
    scale = decode(scale_format, scale) if scale_format else scale.float()
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    width = 128 if blocks else -(-columns // scale.shape[1])
    scale = scale.repeat_interleave(128 if blocks else 1, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    if "weight_global_scale" in stored:
        scale = scale / stored["weight_global_scale"]
    return value * (scale * stored["weight_scale_2"] if "weight_scale_2" in stored else scale)


def modules_of(folder: str) -> list[str]:
    with safe_open(str(EXPECTED / f"{folder}.safetensors"), "pt") as recorded:
        return sorted({name[6:-2] for name in recorded.keys() if name.startswith("layer/")})  # noqa: SIM118


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_recipe_gives_the_recorded_layer_values(folder: str) -> None:
    if not (CHECKPOINTS / folder).is_dir():
        pytest.skip(f"{folder} is not in this copy of the genuine checkpoints")
    element, scale_format, spec = FOLDERS[folder]
    for module in modules_of(folder):
        with safe_open(str(EXPECTED / f"{folder}.safetensors"), "pt") as recorded:
            x, y = recorded.get_tensor(f"layer/{module}/x"), recorded.get_tensor(f"layer/{module}/y").double()
        stored = tensors_of(folder, module)
        shape = (y.shape[1], x.shape[1])
        weight = reference_weight(stored, element, scale_format, shape, blocks=spec.group_size == 128)
        assert digest(weight) == expected(folder)["weights"][module]["sha256"]
        seen = quantize_dequantize(x, spec, {STATIC_NAMES.get(k, k): v for k, v in stored.items()})
        product = seen.double() @ weight.double().T
        if "bias" in stored:
            product = product + stored["bias"].double()
        # y was rounded once, from float64 to float32; the float64 sums differ by less than 2^-40 of the largest
        bound = y.abs() * 2.0**-24 + y.abs().max() * 2.0**-40
        if folder.startswith(VALUES_IN_FLOAT64):  # ours are float32: scale and product are rounded
            bound = bound + 2 * 2.0**-24 * (seen.double().abs() @ weight.double().abs().T)
        assert bool(((product - y).abs() <= bound).all()), (module, (product - y).abs().max())
