"""Every name that vLLM's ROCm list has for a method lands in a dialect or an online scheme of ours."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import anybit
from anybit.checkpoints.online import ONLINE
from conftest import CHECKPOINTS, SHARED, needs_shared

# name -> a genuine folder whose quant_method is set to it
NAMES = {
    "awq": "awq-gemm-mixtral", "awq_marlin": "awq-gemm-mixtral", "gptq": "gptq-v2-w4-llama",
    "gptq_marlin": "gptq-v2-w4-llama", "compressed-tensors": "ct-llama-nvfp4", "modelopt": "modelopt-fp8-llama",
    "modelopt_fp4": "modelopt-nvfp4-llama", "modelopt_mxfp8": "modelopt-mxfp8-llama",
    "modelopt_mixed": "modelopt-mixed-llama", "fp8": "fp8-autofp8-static-llama", "fbgemm_fp8": "fbgemm-fp8-llama",
    "mxfp4": "gptoss-mxfp4", "gpt_oss_mxfp4": "gptoss-mxfp4", "torchao": "torchao-int8da-llama",
    "bitsandbytes": "bnb-nf4-llama", "quark": "quark-fp8-ptpc-qwen3",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_declared_name_is_recognised(name: str, tmp_path: Path) -> None:
    source = CHECKPOINTS / NAMES[name]
    if not source.is_dir():
        pytest.skip("the full set of genuine checkpoints (../shared) is absent")
    copy = tmp_path / "m"
    shutil.copytree(source, copy)
    for file in copy.iterdir():
        file.chmod(0o644)
    config = json.loads((copy / "config.json").read_text())
    config.setdefault("quantization_config", {})["quant_method"] = name
    (copy / "config.json").write_text(json.dumps(config))
    found, wanted = anybit.open(copy), anybit.open(source)
    assert found.dialect == wanted.dialect
    assert {n: layer.scheme for n, layer in found.layers.items()} == {n: x.scheme for n, x in wanted.layers.items()}


@pytest.mark.parametrize("name", ["fp8_per_tensor", "fp8_per_block", "online", "mxfp4", "mxfp8"])
def test_names_of_online_schemes_mean_quantizing_while_loading(name: str) -> None:
    assert name in ONLINE


@needs_shared
def test_the_record_of_schemes_is_current() -> None:
    assert SHARED is not None
    tool = Path(__file__).resolve().parents[2] / "tools" / "record_schemes.py"
    spec = importlib.util.spec_from_file_location("record_schemes", tool)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.RECORD.read_text() == module.text_of(module.record(SHARED / "checkpoints"))
