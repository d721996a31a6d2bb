"""Plans from descriptions alone: layers made by hand, platforms from the table, no file and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from anybit.errors import Unsupported
from anybit.planning.plan import plan_layers
from anybit.platforms import PLATFORMS, named
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Layer, Offset, ScaleLevel, Scheme, dense, group

INT4 = Scheme("uint4", (ScaleLevel("float16", group(128)),), offset=Offset("zero_point", "uint4", group(128)))
ACT_ORDER = Scheme(
    "uint4", (ScaleLevel("float16", group(128), placement="gathered"),),
    offset=Offset("zero_point", "uint4", group(128), placement="gathered"), act_order=True,
)
ODD = Scheme("int4", (ScaleLevel("float16", group(24)),))
NVFP4 = Scheme(
    "fp4_e2m1", (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR)),
    activation=ActivationSpec("fp4_e2m1", False, "group", "nvfp4", 16),
)
FP8 = Scheme("fp8_e4m3fn", (ScaleLevel("float32", CHANNEL),),
             activation=ActivationSpec("fp8_e4m3fn", True, "token", "fp8_token"))


def checkpoint(*schemes: Scheme, shape: tuple[int, int] = (4096, 4096)) -> SimpleNamespace:
    layers = {f"l{i}": Layer(f"l{i}", "linear", shape, s, stored_bytes=1000) for i, s in enumerate(schemes)}
    config = {"num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    return SimpleNamespace(dialect="made", layers=layers, config=config, plain_elements=10)


@pytest.mark.parametrize("name", PLATFORMS)
@pytest.mark.parametrize("scheme", [INT4, ACT_ORDER, NVFP4, FP8, dense("bfloat16")], ids=str)
def test_every_scheme_runs_on_every_platform(name: str, scheme: Scheme) -> None:
    plan = plan_layers(checkpoint(scheme), named(name), dtype="bfloat16")
    assert not plan.refused
    assert plan.to_dict()["refused"] == {}


def test_a_packed_layer_decodes_with_the_compiled_kernel_on_a_cpu() -> None:
    unit = plan_layers(checkpoint(INT4), named("cpu"), dtype="float32").units[0]
    assert unit.choice.layout == "planes"
    assert unit.kernel("decode") == "native-matvec"
    assert unit.kernel("prefill") == "native-expand"


def test_act_order_runs_compiled_with_its_columns_sorted() -> None:
    unit = plan_layers(checkpoint(ACT_ORDER), named("cpu"), dtype="float32").units[0]
    assert unit.kernel("decode") == "native-matvec"


def test_odd_groups_are_refused_by_the_compiled_kernel_with_the_reason() -> None:
    unit = plan_layers(checkpoint(ODD), named("cpu"), dtype="float32").units[0]
    assert unit.kernel("decode") == "torch-tiled"
    reasons = [r["text"] for row in unit.to_dict()["refused"] if row["kernel"] == "native-matvec" for r in row["reasons"]]
    assert any("groups of 24" in text for text in reasons)


def test_a_gpu_refuses_the_cpu_kernels_by_vendor() -> None:
    unit = plan_layers(checkpoint(INT4), named("mi300x"), dtype="bfloat16").units[0]
    codes = {r["code"] for row in unit.to_dict()["refused"] for r in row["reasons"]}
    assert {"vendor", "quantized"} <= codes
    assert not unit.kernel("decode").startswith("native")


def test_equal_layers_are_one_unit() -> None:
    plan = plan_layers(checkpoint(INT4, INT4, FP8), named("cpu"), dtype="float32")
    assert sorted(len(u.layers) for u in plan.units) == [1, 2]


def test_an_override_that_cannot_run_is_an_error_with_its_reasons() -> None:
    with pytest.raises(Unsupported) as refused:
        plan_layers(checkpoint(ODD), named("cpu"), dtype="float32", kernel="native-matvec")
    assert "groups of 24" in refused.value.found


def test_an_override_by_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(Unsupported) as refused:
        plan_layers(checkpoint(INT4), named("cpu"), dtype="float32", kernel="marlin")
    assert "torch-tiled" in refused.value.wanted


def test_an_override_that_can_run_is_obeyed() -> None:
    plan = plan_layers(checkpoint(INT4), named("cpu"), dtype="float32", kernel="torch-tiled")
    assert plan.units[0].kernel("decode") == "torch-tiled"


def test_the_cache_prediction_counts_both_tensors_of_every_layer() -> None:
    plan = plan_layers(checkpoint(INT4), named("cpu"), dtype="float32")
    assert plan.memory.cache_per_token == 2 * 2 * 8 * 128 * 4


def test_a_plan_is_a_pure_function_and_its_digest_says_so() -> None:
    first, second = (plan_layers(checkpoint(INT4, NVFP4), named("h100"), dtype="bfloat16").to_dict() for _ in range(2))
    assert first == second
    assert json.loads(json.dumps(first))["digest"] == second["digest"]
    other = plan_layers(checkpoint(INT4, FP8), named("h100"), dtype="bfloat16").to_dict()
    assert other["digest"] != first["digest"]


def test_declared_and_executed_are_both_named() -> None:
    unit = plan_layers(checkpoint(NVFP4), named("mi300x"), dtype="bfloat16").units[0].to_dict()
    assert unit["declared"] == "nvfp4·g16·fp8_e4m3fn·fp32-global | a: fp4_e2m1 static g16"
    assert unit["execution"] == "exact emulation"
    assert "fp4_e2m1 activations" in unit["executed"]


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from anybit.planning.plan import plan_layers\n"
        "from anybit.platforms import named, detect\n"
        "from anybit.kernels.catalogue import KERNELS\n"
        "detect()\n"
        "raise SystemExit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
