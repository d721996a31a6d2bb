"""Devices that are not there, or that torch cannot use, are refused in our words."""

from __future__ import annotations

import pytest
import torch

import anybit
from anybit.errors import DeviceProblem
from anybit.platforms import named
from conftest import CHECKPOINTS, genuine

FOLDER = CHECKPOINTS / genuine("gptq-v2-*")[0]


@pytest.mark.parametrize("device", ["mps", "foo", "cuda:x", "tpu:0"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(DeviceProblem, match="no such device"):
        anybit.load(FOLDER, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers to torch")
@pytest.mark.parametrize("device", ["cuda", 0, "cuda:3", torch.device("cuda")])
def test_a_gpu_that_torch_cannot_use_is_refused(device: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anybit.hosts.transformers.detect", lambda name: named("cpu" if name == "cpu" else "h100"))
    with pytest.raises(DeviceProblem, match="torch cannot use"):
        anybit.load(FOLDER, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU answers to torch")
def test_a_gpu_beside_a_cpu_build_of_torch_leaves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anybit.hosts.transformers.detect", lambda name: named("cpu" if name == "cpu" else "h100"))
    assert anybit.load(FOLDER).device.type == "cpu"


@pytest.mark.parametrize("elsewhere", ["disk", "cuda:0"])
def test_a_device_map_over_unlike_devices_is_refused_by_the_take_over_door(elsewhere: str) -> None:
    from anybit.hosts.quantizer import _one_kind

    with pytest.raises(DeviceProblem, match="one kind"):
        _one_kind({"model": "cpu", "lm_head": elsewhere})
    assert _one_kind({"": "cpu"}) == torch.device("cpu")
    assert _one_kind({"model": 0, "lm_head": 1}) == torch.device("cuda:0")
