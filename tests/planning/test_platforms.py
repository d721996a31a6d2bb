"""Platforms are values with sources."""

from __future__ import annotations

import pytest

from anybit.errors import DeviceProblem, Unsupported
from anybit.platforms import PLATFORMS, detect, named


@pytest.mark.parametrize("name", PLATFORMS)
def test_every_figure_has_a_source(name: str) -> None:
    platform = named(name)
    assert platform.sources
    assert platform.memory_bytes > 0
    assert platform.bandwidth > 0
    assert platform.rates["float32"] > 0


def test_fp8_flavours_follow_the_chip() -> None:
    assert named("mi300x").fp8 == "fnuz"
    assert named("mi355x").fp8 == "fn"
    assert named("h100").fp8 == "fn"
    assert named("a100").fp8 == "none"


def test_an_unknown_name_says_the_near_ones() -> None:
    with pytest.raises(Unsupported) as refused:
        named("mi300")
    assert "mi300x" in refused.value.remedy


def test_the_cpu_at_hand_has_cores_and_memory() -> None:
    here = detect("cpu")
    assert here.is_detected
    assert here.vendor == "cpu"
    assert here.cores >= 1
    assert here.memory_bytes > 2**28


def test_a_gpu_that_is_not_there_is_a_device_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anybit.platforms.detection._nvidia", lambda index: None)
    monkeypatch.setattr("anybit.platforms.detection._amd", lambda index: None)
    with pytest.raises(DeviceProblem):
        detect("cuda")


def test_nvidia_smi_that_hangs_counts_as_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nsleep 30\n")
    tool.chmod(0o755)
    monkeypatch.setattr("anybit.platforms.detection.shutil.which", lambda _: str(tool))
    monkeypatch.setattr("anybit.platforms.detection._TIMEOUT", 0.2)
    assert detect("auto").vendor == "cpu" or detect("auto").vendor == "amd"


def test_nvidia_smi_answers_become_a_platform(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("anybit.platforms.detection.shutil.which", lambda _: str(tool))
    found = detect("cuda")
    assert (found.arch, found.vendor, found.fp8) == ("sm_90", "nvidia", "fn")
    assert found.bandwidth == named("h200").bandwidth
    assert found.memory_bytes == 143771 * 2**20
