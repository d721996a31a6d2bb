"""The kernels in Gluon of "triton-planes": which products they take, how they are launched, and on a GPU what they give.

The family's own tests (test_triton_planes.py) run them too where the GPU is sm_90: NaN, graphs, the same bits again.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch

from anybit.kernels.linear.triton_planes import _OF_HOPPER, _SAMPLES, FUSED, MATVEC
from anybit.kernels.request import Request
from anybit.kernels.trials import Oracle, compare, sample_weight
from anybit.kernels.triton import planes
from anybit.kernels.triton import planes_hopper_launch as launch
from anybit.kernels.triton import planes_hopper_roles_launch as roles_launch
from anybit.kernels.triton.planes_form import ROWS, form_of
from anybit.kernels.triton.planes_hopper_roles_launch import RolesConfig, roles_bytes
from anybit.kernels.triton.planes_launch import PINNED_CALL, PINNED_TOKENS, SCRATCH_BYTES, scratch_rows
from anybit.kernels.triton.planes_one_launch import planned_one
from anybit.kernels.triton.planes_prepare import pack
from anybit.platforms.archs import ARCHS
from anybit.schemes import CHANNEL, Offset, ScaleLevel, Scheme, group

TAKEN = {name: _SAMPLES[name] for name in ("int4 g128", "uint4 g128 zp", "mxfp4", "nvfp4")} | {
    "int4 g32": Scheme("int4", (ScaleLevel("float16", group(32)),)),
    "uint4 g32 zp": Scheme("uint4", (ScaleLevel("bfloat16", group(32)),), offset=Offset("zero_point", "uint4", group(32))),
    "int4 g16": Scheme("int4", (ScaleLevel("bfloat16", group(16)),)),
    "int4 g512": Scheme("int4", (ScaleLevel("float32", group(512)),)),
    "uint4 channel zp": Scheme("uint4", (ScaleLevel("bfloat16", CHANNEL),), offset=Offset("zero_point", "uint4", CHANNEL)),
}
SHAPES = [(64, 512), (200, 640), (192, 4096), (1024, 4096), (6144, 4096), (4096, 14336), (13824, 5120), (28672, 4096),
          (57344, 8192), (152064, 3584)]  # fmt: skip
TOKENS = (1, 8, 9, 16, 17, 24, 32, 33, 64, 65, 96, 128, 129, 200, 300, 1000, 4096)
LAUNCHES = [(name, n, k, m, config) for name, scheme in TAKEN.items() for n, k in SHAPES for m in TOKENS
            if (config := launch.planned(form_of(scheme, k), n, k, m)) is not None]  # fmt: skip


def test_every_form_has_launches() -> None:
    assert {name for name, *_ in LAUNCHES} == set(TAKEN)


FEW = [(name, n, k, m, config) for name, n, k, m, config in LAUNCHES if not isinstance(config, RolesConfig)]
ROLES = [(name, n, k, m, config) for name, n, k, m, config in LAUNCHES if isinstance(config, RolesConfig)]


def test_tiles_cover_the_padded_rows_and_are_what_the_instruction_takes() -> None:
    for name, n, _, m, config in FEW:
        assert -(-n // ROWS) * ROWS % config.rows == 0, (name, n, m, config)
        assert config.rows % (16 * config.warps) == 0 and config.warps % 4 == 0
    for _, _, _, _, config in ROLES:
        assert config.rows % (64 * config.teams) == 0 and config.teams in (2, 4)
    for _, _, _, _, config in LAUNCHES:
        assert config.tokens % 8 == 0 and config.tokens <= 256


def test_programs_of_few_tokens_have_every_step_once_and_each_has_some() -> None:
    for name, n, k, m, config in FEW:
        form, rows = form_of(TAKEN[name], k), -(-n // ROWS) * ROWS
        blocks = -(-form.padded(k) // 256)
        line = config.line(m, rows, form.padded(k))
        lengths = [line.share + (p < line.longer) for p in range(line.programs)]
        begins = [0, *accumulate(lengths)]
        assert begins[-1] == config.tiles(m, rows) * line.blocks, (name, n, k, m, config)
        has = [sum(step % line.blocks < blocks for step in range(a, b)) for a, b in pairwise(begins)]
        assert min(has) > 0 and sum(has) == config.tiles(m, rows) * blocks, (name, n, k, m, config)
        if line.blocks > blocks:  # steps beyond the last: no program goes on into another tile
            assert all(a // line.blocks == (b - 1) // line.blocks for a, b in pairwise(begins))


def test_a_program_of_few_tokens_has_at_most_two_unfinished_tiles() -> None:
    for name, n, k, m, config in FEW:
        padded, rows = form_of(TAKEN[name], k).padded(k), -(-n // ROWS) * ROWS
        line = config.line(m, rows, padded)
        if not config.is_shared:
            assert line.blocks == line.share and not line.longer, (name, n, k, m, config)
        begin = 0
        for p in range(min(line.programs, 400)):
            end = begin + line.share + (p < line.longer)
            cut = {t for t in range(begin // line.blocks, (end - 1) // line.blocks + 1)
                   if t * line.blocks < begin or (t + 1) * line.blocks > end}  # fmt: skip
            assert cut <= {begin // line.blocks, (end - 1) // line.blocks} and (config.is_shared or not cut)
            begin = end


def test_small_weights_are_not_cut_into_single_steps() -> None:
    for name, n, k, m, config in FEW:
        if config.resident:
            line = config.line(m, -(-n // ROWS) * ROWS, form_of(TAKEN[name], k).padded(k))
            assert line.share + (line.longer > line.programs // 2) > 1, (name, n, k, m, config)
    assert any(n <= 1024 and not config.resident for _, n, _, m, config in FEW if m <= 16)


def test_where_results_must_not_depend_on_the_other_rows_no_share_is_cut_by_their_number() -> None:
    for name, scheme in TAKEN.items():
        for n, k in SHAPES:
            config = launch.planned(form_of(scheme, k), n, k, 16, pinned=True)
            assert config is None or config.resident == 0, (name, n, k, config)


def steps_of(program: int, config: RolesConfig, tiles: int) -> list[tuple[int, int]]:
    """Tiles and blocks of K that a program multiplies: what the kernel's docstring says of WAVES and SHARE."""
    programs = config.programs if config.share else min(tiles, 132)
    waves = config.waves if config.share else -(-(tiles - program) // programs)
    whole = [(program + wave * programs, block) for wave in range(waves) for block in range(config.blocks)]
    if not config.share:
        return whole
    left = (tiles - config.waves * programs) * config.blocks
    mine = range(program * config.share, min((program + 1) * config.share, left))
    return whole + [(config.waves * programs + i // config.blocks, i % config.blocks) for i in mine]


def test_programs_share_every_step_once_and_each_has_some() -> None:
    for name, n, k, m, config in ROLES:
        tiles = config.tiles(m, -(-n // ROWS) * ROWS)
        programs = config.grid(m, -(-n // ROWS) * ROWS)
        assert config.blocks == -(-k // 256) or (config.blocks > -(-k // 256) and config.share and not config.waves)
        assert 0 < programs <= 132, (name, n, k, m, config)
        if tiles * config.blocks > 2**18:
            continue
        taken = [steps_of(program, config, tiles) for program in range(programs)]
        assert all(taken), (name, n, k, m, config)
        steps = [step for program in taken for step in program]
        assert len(steps) == len(set(steps)) == tiles * config.blocks, (name, n, k, m, config)


def test_work_is_shared_in_all_ways() -> None:
    found = {(bool(config.share), config.waves > 0) for *_, config in ROLES}
    assert found == {(False, False), (True, False), (True, True)}


def test_teams_begin_groups_in_turn_only_where_scales_are_of_groups() -> None:
    for name, _, k, _, config in ROLES:
        assert not config.turns or form_of(TAKEN[name], k).scaling == "group"


@pytest.mark.parametrize("name", ["int4 g128", "uint4 g32 zp", "mxfp4"])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (17408, 5120), (4096, 14336), (200, 640)])
def test_what_a_plan_predicts_holds_the_sums_of_every_smaller_call(name: str, n: int, k: int) -> None:
    scheme = TAKEN[name]
    for most in (1, 3, 16, 40, 256, 2048):
        predicted = FUSED.workspace(Request("linear", scheme, (n, k), "bfloat16").of(most))
        for m in sorted({*range(1, most + 1, 13), *range(1, min(most, 32) + 1)}):
            config, form = launch.planned(form_of(scheme, k), n, k, m), form_of(scheme, k)
            if isinstance(config, RolesConfig) and config.share:
                assert 4 * config.parts <= predicted, (m, config)
            pinned = launch.planned(form, n, k, PINNED_TOKENS, pinned=True)
            for count, found in ((m, config), (min(m, PINNED_CALL), pinned)):
                if isinstance(found, launch.HopperConfig):
                    assert found.part_bytes(count, -(-n // ROWS) * ROWS, form.padded(k)) <= predicted, (m, found)


def test_every_launch_of_few_tokens_has_something_to_compile() -> None:
    """Of the schemes that the gate compiles, for more weights than it has; so for one token from registers."""
    cases = [case for kernel in (MATVEC, FUSED) for case in kernel.cases("sm_90")]
    few, one = set(), set()
    for case in cases:
        name = case.label.removeprefix("Gluon, ").removeprefix("registers, ").split(" bfloat16")[0]
        if case.function.endswith(":few_kernel") and " bfloat16" in case.label:
            c = case.constants
            few.add((name, c["BM"], c["BN"], c["STAGES"], c["SPLIT"], case.num_warps, case.options.get("maxnreg", 0)))
        elif case.function.endswith(":one_kernel") and " bfloat16" in case.label:
            c = case.constants
            one.add((name, c["BN"], c["SPLIT"], case.num_warps, c["WK"]))
    for name, scheme in _OF_HOPPER.items():
        for n, k in ((4096, 4096), (6144, 4096), (57344, 8192), (4096, 14336), (14336, 4096), (32064, 4096), (1024, 4096),
                     (28672, 4096), (17408, 5120), (9728, 2560), (18944, 3584), (1024, 8192), (2048, 2048)):  # fmt: skip
            form = form_of(scheme, k)
            for m, pinned in ((1, False), (4, False), (8, False), (16, False), (32, False), (PINNED_TOKENS, True)):
                config = launch.planned(form, n, k, m, pinned=pinned)
                if isinstance(config, launch.HopperConfig):
                    assert (name, config.tokens, config.rows, config.stages, config.is_shared, config.warps,
                            config.registers) in few, (n, k, m, pinned, config)
            config = planned_one(form, n, k)
            assert config is None or (name, config.rows, config.split > 1, config.warps, config.along) in one, (n, k)


def test_a_team_has_its_next_words_while_it_multiplies_the_last() -> None:
    assert all(config.w_stages > 1 for *_, config in ROLES)


def test_stages_fit_the_shared_memory_and_the_pipeline() -> None:
    for name, _, k, m, config in FEW:
        assert launch.shared_bytes(form_of(TAKEN[name], k), config) <= ARCHS["sm_90"].shared_bytes, (name, k, m, config)
        assert config.stages >= 2
    for name, _, k, m, config in ROLES:
        assert roles_bytes(form_of(TAKEN[name], k), config) <= ARCHS["sm_90"].shared_bytes - 8192, (name, k, m, config)


def test_units_of_products_lie_within_groups() -> None:
    for name, _, k, _, config in ROLES:
        group = form_of(TAKEN[name], k).group
        assert form_of(TAKEN[name], k).scaling != "group" or group % config.unit == 0


@pytest.mark.parametrize("name", ["int3 g128", "int8 channel", "q4_k", "q6_k", "mxfp6_e2m3", "nf4 g64", "uint4 g64 float zp"])
def test_other_forms_are_left_to_the_portable_kernel(name: str) -> None:
    assert launch.planned(form_of(_SAMPLES[name], 4096), 4096, 4096, 64) is None


def test_ragged_k_that_cannot_be_copied_16_bytes_at_a_time_is_left_to_the_portable_kernel() -> None:
    form = form_of(_SAMPLES["int4 g128"], 4104)
    assert launch.planned(form, 4096, 4096, 64) is not None
    assert launch.planned(form, 4096, 4104, 64) is None


@pytest.mark.parametrize(("installed", "few", "many"), [
    ("3.4.0", False, False), ("3.5.1", True, False), ("3.6.0+git1", True, True), ("3.9.0", True, True),
    ("4.0.0", False, False), ("broken", False, False), (None, False, False),
])  # fmt: skip
def test_a_triton_that_the_kernels_were_not_written_for_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, installed: str | None, few: bool, many: bool
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise launch.PackageNotFoundError(name)
        return installed

    def forget() -> None:
        launch._triton.cache_clear()
        launch.hopper_config.cache_clear()

    monkeypatch.setattr(launch, "version", version)
    forget()
    found = [launch.hopper_config(form_of(_SAMPLES["int4 g128"], 4096), 4096, 4096, m, "sm_90") for m in (8, 64)]
    forget()
    assert [config is not None for config in found] == [few, many]


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


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def on_hopper(test):  # type: ignore[no-untyped-def]
    is_one = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(not is_one, reason="no GPU of sm_90")(test))


def stored_on_gpu(weight, dtype: torch.dtype = torch.bfloat16):  # type: ignore[no-untyped-def]
    from anybit.kernels.triton.planes import StoredPlanes

    return StoredPlanes(pack(weight, dtype), None)


@on_hopper
@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_products_of_every_m_are_within_the_bound(name: str, dtype: torch.dtype) -> None:
    """Rows that fill tiles and rows that do not; K of whole times 256 inputs and not; parts of K and none."""
    for n, k in ((200, 640), (384, 1152), (320, 4096)):
        weight = sample_weight(TAKEN[name], (n, k), device="cuda", seed=n)
        stored = stored_on_gpu(weight, dtype)
        for m in (1, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 128, 129, 257, 300):
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            found = compare(weight, lambda x, stored=stored: stored.linear(x, "small", None, x.dtype), x)
            assert found.ok, f"{name} M={m} N={n} K={k}: {found.fault}"


@on_hopper
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_zero_blocks_and_scales_far_apart_are_exact(name: str) -> None:
    weight = sample_weight(TAKEN[name], (256, 1024), device="cuda")
    scale = weight.scales[0].clone()
    low, high = (127 - 60, 127 + 59) if name == "mxfp4" else (0x08, 0x7E)  # the largest and small ones of e4m3
    scale[::3] = low
    scale[1::3] = high
    codes = weight.codes.clone()
    codes[5:60] = 0
    weight = replace(weight, stored_codes=codes, scales=(scale, *weight.scales[1:]))
    stored = stored_on_gpu(weight)
    for m in (1, 40, 200, 300, 700):
        x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
        found = compare(weight, lambda x: stored.linear(x, "small", None, x.dtype), x)
        assert found.ok, f"{name} M={m}: {found.fault}"


@on_hopper
@pytest.mark.parametrize("m", [3, 40, 150])
def test_where_rows_of_x_begin_does_not_matter(m: int) -> None:
    stored = stored_on_gpu(sample_weight(TAKEN["int4 g128"], (256, 512), device="cuda"))
    held = torch.randn(m * 528 + 1, device="cuda", dtype=torch.bfloat16)
    narrow = held[: m * 520 + 1]
    for x in (held[:-1].view(m, 528)[:, :512], held[1:].view(m, 528)[:, :512], narrow[1:].view(m, 520)[:, :512],
              narrow[:-1].view(m, 520)[:, :512], held[1 : 1 + m * 512].view(m, 512)):
        wanted = stored.linear(x.clone(), "small", None, torch.bfloat16)
        assert torch.equal(stored.linear(x, "small", None, torch.bfloat16), wanted)


@on_hopper
@pytest.mark.parametrize("name", TAKEN)
def test_work_divided_in_any_way_gives_the_same_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile of the form; whole tiles, parts that begin with one, and shares that begin anywhere; the bits again."""
    for n, k, m in ((1008, 4096, 150), (8960, 2048, 300)):
        weight = sample_weight(TAKEN[name], (n, k), device="cuda")
        oracle = Oracle(weight, x := torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
        form, rows = form_of(TAKEN[name], k), -(-n // ROWS) * ROWS
        ways = [config for tile in roles_launch.tiles(form) for _, config in roles_launch.divided(tile, rows, k, m)]
        assert {0} < {config.share for config in ways}
        assert any(config.waves for config in ways) == (n == 8960)
        for config in ways:
            monkeypatch.setattr(planes, "hopper_config", lambda *_, config=config, **__: config)
            stored = stored_on_gpu(weight)
            y = stored.linear(x, "prefill", None, torch.bfloat16)
            assert not (fault := oracle.difference(y).fault), (config, fault)
            for _ in range(3):
                assert torch.equal(stored.linear(x, "prefill", None, torch.bfloat16), y), config


@on_hopper
@pytest.mark.parametrize("m", [40, 150, 300])
def test_launches_that_overlap_read_what_the_one_before_has_written(m: int) -> None:
    """Layer behind layer, each launched while the one before it ends: the bits of launches that wait for each other."""
    names = ("int4 g128", "mxfp4", "uint4 g32 zp", "nvfp4", "uint4 g128 zp")
    layers = [stored_on_gpu(sample_weight(TAKEN[name], (2048, 2048), device="cuda")) for name in names]

    def chain(x: torch.Tensor, *, waits: bool) -> torch.Tensor:
        for stored in layers * 3:
            x = stored.linear(x, "prefill", None, torch.bfloat16)
            if waits:
                torch.cuda.synchronize()
        return x

    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16) * 2.0**-40
    wanted = chain(x, waits=True)
    assert torch.isfinite(wanted).all() and wanted.abs().amax() > 0
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        chain(x, waits=False)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(x, waits=False)
    for _ in range(25):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, wanted)


@on_hopper
@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize(("n", "k", "split"), [(1000, 4080, 3), (20050, 1280, 1)])  # padded to whole tiles of 128 rows
def test_few_tokens_divided_in_any_way_give_the_same_product(
    name: str, n: int, k: int, split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile that some shape has, in even shares of one step and of several, in parts and whole; the bits again."""
    tiles = {replace(config, split=split, resident=0, registers=0) for form, *_, config in FEW
             if form == name and config.tokens <= 16}  # fmt: skip
    shared = {config for form, *_, config in FEW if form == name and config.resident}
    assert all(-(-n // ROWS) * ROWS % config.rows == 0 for config in tiles | shared)
    weight = sample_weight(TAKEN[name], (n, k), device="cuda")
    for m in (5, 16, 37):  # 37: tiles of tokens, as where launches are pinned
        oracle = Oracle(weight, x := torch.randn(m, k, device="cuda", dtype=torch.bfloat16))
        for config in tiles | shared:
            if config.tokens < m <= 16:
                continue
            monkeypatch.setattr(planes, "one_config", lambda *_: None)
            monkeypatch.setattr(planes, "hopper_config", lambda *_, config=config, **__: config)
            stored = stored_on_gpu(weight)
            y = stored.linear(x, "small", None, torch.bfloat16)
            assert not (fault := oracle.difference(y).fault), (m, config, fault)
            for _ in range(3):
                assert torch.equal(stored.linear(x, "small", None, torch.bfloat16), y), (m, config)


@on_hopper
def test_every_row_is_computed_as_it_would_be_in_a_full_tile() -> None:
    stored = stored_on_gpu(sample_weight(TAKEN["nvfp4"], (384, 1024), device="cuda"))
    x = torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16)
    whole = stored.linear(x, "prefill", None, torch.bfloat16)
    for m in (260, 290):  # the same launch, other rows beyond the last
        assert torch.equal(stored.linear(x[:m], "prefill", None, torch.bfloat16), whole[:m])
