"""The kernels in Gluon of "triton-planes": which products they take and how they are launched.

What they compute is tested with the family (test_triton_planes.py), whose products on sm_90 they are.
"""

from __future__ import annotations

import pytest

from anybit.kernels.linear.triton_planes import _SAMPLES, FUSED, MATVEC
from anybit.kernels.triton import planes_hopper_launch as launch
from anybit.kernels.triton.planes_form import ROWS, form_of
from anybit.kernels.triton.planes_launch import SCRATCH_BYTES, scratch_rows
from anybit.platforms.archs import ARCHS
from anybit.schemes import CHANNEL, Offset, ScaleLevel, Scheme, group

TAKEN = {name: _SAMPLES[name] for name in ("int4 g128", "uint4 g128 zp", "mxfp4", "nvfp4")} | {
    "int4 g32": Scheme("int4", (ScaleLevel("float16", group(32)),)),
    "uint4 channel zp": Scheme("uint4", (ScaleLevel("bfloat16", CHANNEL),), offset=Offset("zero_point", "uint4", CHANNEL)),
}
SHAPES = [(64, 512), (200, 640), (192, 4096), (1024, 4096), (6144, 4096), (4096, 14336), (13824, 5120), (28672, 4096),
          (57344, 8192), (152064, 3584)]  # fmt: skip
TOKENS = (1, 8, 9, 16, 17, 24, 32, 33, 64, 65, 96, 128, 129, 200, 300, 1000, 4096)
LAUNCHES = [(name, n, k, m, config) for name, scheme in TAKEN.items() for n, k in SHAPES for m in TOKENS
            if (config := launch.planned(form_of(scheme, k), n, k, m)) is not None]  # fmt: skip


def test_every_form_has_launches() -> None:
    assert {name for name, *_ in LAUNCHES} == set(TAKEN)


def test_tiles_cover_the_padded_rows_and_are_what_the_instruction_takes() -> None:
    for name, n, _, m, config in LAUNCHES:
        assert -(-n // ROWS) * ROWS % config.rows == 0, (name, n, m, config)
        assert config.rows % (16 * config.warps) == 0 and config.warps % 4 == 0
        assert config.tokens % 8 == 0 and config.tokens <= 256


def test_no_part_of_k_is_without_work() -> None:
    for name, n, k, m, config in LAUNCHES:
        times = -(-k // 256)
        assert -(-times // config.split) * (config.split - 1) < times, (name, n, k, m, config)


def test_stages_fit_the_shared_memory_and_the_pipeline() -> None:
    for name, _, k, m, config in LAUNCHES:
        assert launch.shared_bytes(form_of(TAKEN[name], k), config) <= ARCHS["sm_90"].shared_bytes, (name, k, m, config)
        assert config.stages >= (3 if config.steps else 2)


@pytest.mark.parametrize("name", ["int3 g128", "int8 channel", "q4_k", "q6_k", "mxfp6_e2m3", "nf4 g64", "uint4 g64 float zp"])
def test_other_forms_are_left_to_the_portable_kernel(name: str) -> None:
    assert launch.planned(form_of(_SAMPLES[name], 4096), 4096, 4096, 64) is None


def test_ragged_k_that_cannot_be_copied_16_bytes_at_a_time_is_left_to_the_portable_kernel() -> None:
    form = form_of(_SAMPLES["int4 g128"], 4104)
    assert launch.planned(form, 4096, 4096, 64) is not None
    assert launch.planned(form, 4096, 4104, 64) is None


@pytest.mark.parametrize(("installed", "has"), [("3.4.0", False), ("3.5.1", True), ("3.6.0+git1", True), ("3.9.0", True),
                                                ("4.0.0", False), ("broken", False), (None, False)])  # fmt: skip
def test_a_triton_that_the_kernels_were_not_written_for_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, has: bool
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise launch.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(launch, "version", version)
    launch.has_gluon.cache_clear()
    launch.hopper_config.cache_clear()
    found = launch.hopper_config(form_of(_SAMPLES["nvfp4"], 4096), 4096, 4096, 64, "sm_90")
    launch.has_gluon.cache_clear()
    launch.hopper_config.cache_clear()
    assert (found is not None) is has


def test_only_sm_90_is_launched_so() -> None:
    form = form_of(_SAMPLES["nvfp4"], 4096)
    assert [arch for arch in ARCHS if launch.hopper_config(form, 4096, 4096, 64, arch)] in (["sm_90"], [])
    cases = [case for arch in ARCHS for spec in (MATVEC, FUSED) for case in spec.cases(arch) if "Gluon" in case.label]
    assert {case.arch for case in cases} == {"sm_90"}
    assert all("wgmma" in case.expects for case in cases)


@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (4096, 14336), (28672, 4096), (57344, 8192), (200, 640)])
def test_pieces_of_an_expanded_weight_are_alike_and_within_the_scratch(rows: int, columns: int) -> None:
    at_a_time = scratch_rows(rows, columns)
    pieces = -(-rows // at_a_time)
    assert 2 * at_a_time * columns <= SCRATCH_BYTES + 2 * 256 * columns
    assert pieces == max(1, -(-2 * rows * columns // SCRATCH_BYTES))
    assert pieces == 1 or rows - (pieces - 1) * at_a_time > at_a_time // 2
