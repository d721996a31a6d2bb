"""Platforms are values with sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from anybit.errors import DeviceProblem, Unsupported
from anybit.platforms import ARCHS, PLATFORMS, detect, named


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


@pytest.mark.parametrize("arch", ARCHS)
def test_an_architecture_is_a_name_too(arch: str) -> None:
    assert named(arch).arch == arch


@pytest.mark.parametrize(("typed", "device"), [("RTX 4090", "rtx4090"), ("MI300X", "mi300x"), ("dgx_spark", "dgx-spark"),
                                               ("gfx942", "mi300x"), ("SM_90", "h100")])
def test_case_blanks_and_hyphens_of_a_name_do_not_count(typed: str, device: str) -> None:
    assert named(typed).name == device


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
    monkeypatch.setattr("anybit.platforms.detection._NVIDIA_FILES", ())
    assert detect("auto").vendor == "cpu" or detect("auto").vendor == "amd"


def test_a_slow_nvidia_smi_is_waited_for_where_the_driver_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool, driver = tmp_path / "nvidia-smi", tmp_path / "nvidiactl"
    tool.write_text("#!/bin/sh\nsleep 1\necho 'NVIDIA H200, 9.0, 143771, 580.1'\n")
    tool.chmod(0o755)
    driver.touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("anybit.platforms.detection.shutil.which", lambda _: str(tool))
    monkeypatch.setattr("anybit.platforms.detection._TIMEOUT", 0.2)
    monkeypatch.setattr("anybit.platforms.detection._NVIDIA_FILES", (driver,))
    assert detect("cuda").arch == "sm_90"


def test_nvidia_smi_answers_become_a_platform(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0, 143771, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("anybit.platforms.detection.shutil.which", lambda _: str(tool))
    found = detect("cuda")
    assert (found.arch, found.vendor, found.fp8) == ("sm_90", "nvidia", "fn")
    assert found.bandwidth == named("h200").bandwidth
    assert found.memory_bytes == 143771 * 2**20


@pytest.mark.parametrize("name", [n for n, p in PLATFORMS.items() if p.vendor != "cpu"])
def test_every_named_gpu_has_the_facts_of_its_architecture(name: str) -> None:
    platform = named(name)
    assert platform.facts is not None
    assert platform.facts.source
    assert platform.facts.shared_bytes >= 64 * 1024
    assert platform.fp8 == platform.facts.fp8


def test_the_architectures_of_both_vendors_are_described() -> None:
    assert set(ARCHS) >= {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"}
    assert set(ARCHS) >= {"gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1151", "gfx1200", "gfx1201"}
    assert {p.arch for p in PLATFORMS.values() if p.vendor != "cpu"} == set(ARCHS)


def test_only_gfx942_multiplies_the_fnuz_flavour() -> None:
    assert [name for name, arch in ARCHS.items() if "fp8_e4m3fnuz" in arch.matrix] == ["gfx942"]


def test_matrix_units_of_the_mi200_read_subnormal_halves_as_zero() -> None:
    assert [name for name, arch in ARCHS.items() if arch.flushes] == ["gfx90a"]


def test_cpus_are_described_by_what_they_add() -> None:
    assert named("cpu").features < named("cpu-avx512").features < named("cpu-avx512-vnni").features
    assert "avx512_bf16" in named("cpu-avx512-bf16").features
    assert "amx_bf16" in named("cpu-amx").features
    assert "sve" in named("cpu-arm-sve").features


def _smi(monkeypatch: pytest.MonkeyPatch, folder: Path, *lines: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(lines) + "\nEND\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("anybit.platforms.detection.shutil.which", lambda _: str(tool))


def test_a_chip_that_shares_the_hosts_memory_names_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _smi(monkeypatch, tmp_path, "NVIDIA GB10, 12.1, [N/A], 580.95.05")
    found = detect("cuda")
    assert (found.arch, found.memory_bytes) == ("sm_121", named("dgx-spark").memory_bytes)


def test_the_first_visible_gpu_is_the_one_that_the_process_sees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _smi(monkeypatch, tmp_path, "NVIDIA A100-SXM4-80GB, 8.0, 81920, 580.1", "NVIDIA H200, 9.0, 143771, 580.1")
    assert detect("cuda").arch == "sm_80"
    assert detect("cuda:1").arch == "sm_90"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert detect("cuda").arch == "sm_90"


def test_an_unknown_nvidia_chip_has_no_figures_and_no_features(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _smi(monkeypatch, tmp_path, "NVIDIA Quadro P400, 6.1, 2048, 470.1")
    found = detect("cuda")
    assert (found.arch, found.features, found.fp8, found.facts) == ("sm_61", frozenset(), "none", None)


def _kfd(folder: Path, *nodes: tuple[int, int]) -> Path:
    for number, (version, memory) in enumerate(nodes):
        bank = folder / str(number) / "mem_banks" / "0"
        bank.mkdir(parents=True)
        (folder / str(number) / "properties").write_text(f"cpu_cores_count 0\ngfx_target_version {version}\n")
        (bank / "properties").write_text(f"heap_type 1\nsize_in_bytes {memory}\nflags 0\n")
    return folder


@pytest.mark.parametrize(("version", "gib", "arch", "device"), [
    (90402, 192, "gfx942", "mi300x"), (90402, 256, "gfx942", "mi325x"), (90402, 128, "gfx942", "mi300a"),
    (90010, 64, "gfx90a", "mi210"), (90500, 288, "gfx950", "mi355x"), (110000, 48, "gfx1100", "w7900"),
    (110501, 96, "gfx1151", "strix-halo"), (120001, 16, "gfx1201", "rx9070xt"),
])
def test_the_amd_drivers_files_become_a_platform(
    version: int, gib: int, arch: str, device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("anybit.platforms.detection.shutil.which", lambda _: None)
    monkeypatch.setattr("anybit.platforms.detection._KFD", _kfd(tmp_path, (0, 2**39), (version, gib * 2**30)))
    found = detect("cuda")
    assert (found.vendor, found.arch, found.memory_bytes) == ("amd", arch, gib * 2**30)
    if arch != "gfx90a":  # one die of an MI250X and an MI210 have the same memory
        assert found.rates == named(device).rates


def test_files_of_the_amd_driver_that_say_nothing_are_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("anybit.platforms.detection.shutil.which", lambda _: None)
    monkeypatch.setattr("anybit.platforms.detection._KFD", _kfd(tmp_path, (0, 2**39)))
    (tmp_path / "0" / "properties").write_text("gfx_target_version unknown\n")
    assert detect("auto").vendor == "cpu"
