"""What lies between a block's products, against plain torch: norms, the gate, their quantization, attention over a cache.

Without a GPU the device code runs in Triton's interpreter, in a process of its own and in float16: it has no sound
bfloat16. Oracles: torch's operations in the host's order, the recipes of numerics/activations.py, float64 attention.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anybit.kernels.triton.block_launch import (
    LARGEST_M,
    attention_launch,
    compile_cases,
    gate_launch,
    is_made_in_passing,
    norm_launch,
)
from anybit.numerics.activations import RECIPES
from anybit.platforms.archs import ARCHS
from anybit.schemes import ActivationSpec

HERE = Path(__file__).resolve().parent
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
SPECS = {
    "nvfp4": ActivationSpec("fp4_e2m1", False, "group", "nvfp4", 16),
    "nvfp4_token": ActivationSpec("fp4_e2m1", True, "group", "nvfp4_token", 16),
    "nvfp4_reciprocal": ActivationSpec("fp4_e2m1", False, "group", "nvfp4_reciprocal", 16),
    "torchao_nvfp4": ActivationSpec("fp4_e2m1", False, "group", "torchao_nvfp4", 16),
    "mx_even": ActivationSpec("fp4_e2m1", True, "group", "mx_even", 32),
    "fp8_token": ActivationSpec("fp8_e4m3fn", True, "token", "fp8_token"),
    "fp8_static": ActivationSpec("fp8_e4m3fn", False, "tensor", "fp8_static"),
    "fp8_group": ActivationSpec("fp8_e4m3fn", True, "group", "fp8_group", 128),
    "fp8_group_divide": ActivationSpec("fp8_e4m3fn", True, "group", "fp8_group_divide", 64),
    "int8_token": ActivationSpec("int8", True, "token", "int8_token"),
    "int8_static_divide": ActivationSpec("int8", False, "tensor", "int8_static_divide"),
}
NOT_IN_PASSING = (
    ActivationSpec("int8", True, "token", "int8_token_asym"), ActivationSpec("fp8_e4m3fn", True, "tensor", "fp8_tensor"),
    ActivationSpec("int8", True, "token", "llm_int8"), ActivationSpec("int4", True, "group", "int4_group", 24),
)


# --- norms and gates --------------------------------------------------------------------------------------------------


def rows(m: int, k: int, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=made) * torch.tensor([1.0, 1e-3, 50.0, 0.1, 3.0, 1.0, 2.0, 0.5])[:m, None]
    if m > 3:
        x[3] = 0.0
    return x.to(device=device, dtype=dtype)


def host_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def steps_apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference in units of the wanted number's last place."""
    place = wanted.float().abs().clamp(min=1e-4).log2().floor().exp2() * UNIT[wanted.dtype] * 2
    return float(((found.float() - wanted.float()).abs() / place).max())


def norms(device: str, dtype: torch.dtype, k: int) -> dict[str, Any]:
    """A norm with a residual, and one without."""
    from anybit.kernels.triton.block import Norm

    x, delta = rows(5, k, 1, device, dtype), rows(5, k + 16, 2, device, dtype)[:, 16:]
    weight = (1 + 0.2 * rows(1, k, 3, device, dtype))[0]
    count = torch.tensor(41, device=device)
    norm = Norm(weight, 1e-5)
    total, made = norm(x, delta=delta, count=count, added=3)
    alone = norm(x)[1].values
    return {"total": torch.equal(total, x + delta), "normed": steps_apart(made.values, host_norm(x + delta, weight, 1e-5)),
            "alone": steps_apart(alone, host_norm(x, weight, 1e-5)), "count": int(count)}


def gates(device: str, dtype: torch.dtype, k: int) -> dict[str, Any]:
    """silu(gate) * up of the two halves of one product."""
    from anybit.kernels.triton.block import Gate

    both = rows(5, 2 * k, 4, device, dtype)
    lit, up = both[:, :k], both[:, k:]
    made = Gate()(lit, up).values
    return {"gated": steps_apart(made, torch.nn.functional.silu(lit) * up)}


def quantized(name: str, device: str, dtype: torch.dtype, k: int) -> list[str]:
    """Where rows quantized in passing differ from the recipe's answer for the same rows, in words."""
    from anybit.kernels.triton.block import Gate, Norm, Wanted
    from anybit.kernels.triton.quantizers import Quantizer

    spec = SPECS[name]
    statics = {"scale": torch.tensor([0.037], device=device), "global_scale": torch.tensor([33.3], device=device)}
    x, weight = rows(7, k, 5, device, dtype), (1 + 0.2 * rows(1, k, 6, device, dtype))[0]
    up = rows(7, k, 7, device, dtype)
    if name != "torchao_nvfp4":
        x[5, 3] = float("nan")
    norm, gate = Norm(weight, 1e-5), Gate()
    in_codes = Quantizer(spec, statics, k)
    in_values = Quantizer(spec, statics, k, values=torch.float32, own=True)
    wanted = {q: Wanted(q, q.plan(x), q.plan(x).scratch_bytes) for q in (in_codes, in_values)}
    found = []
    for what, plain, made in (
        ("norm", norm(x)[1].values, {q: norm(x, w)[1].scratch for q, w in wanted.items()}),
        ("gate", gate(x, up).values, {q: gate(x, up, w).scratch for q, w in wanted.items()}),
    ):
        codes, values = (wanted[q].plan.quantized(made[q]) for q in (in_codes, in_values))
        right = RECIPES[spec.recipe](plain.float(), spec, statics)
        exact = right.dequantize()
        lost = exact.isnan()
        if not bool((codes.codes.masked_fill(lost, 0) == right.codes.masked_fill(lost, 0)).all()):
            found.append(f"{what}: codes")
        scale = codes.scale.T if codes.scale.dim() == 2 else codes.scale[:, None]
        if not torch.equal(scale.nan_to_num(7.0), right.scale.expand_as(scale).nan_to_num(7.0)):
            found.append(f"{what}: scale")
        value = values.codes
        if values.factor is not None:
            value = value * values.factor[:, None]
        if spec.granularity == "group" and values.factor is None and "mx" not in name:
            continue  # values of a recipe whose scales are no numbers of few bits are not asked for
        near = (value - exact).abs() <= 2.0**-22 * exact.abs() + 2.0**-148  # the product's rounding and the recipe's own
        if not bool((near | (value == exact) | lost).all()) or not torch.equal(value.isnan(), lost):
            found.append(f"{what}: values")
    return found


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Attention of T new tokens of B sequences over `held` of `room` tokens."""

    heads: int
    kv_heads: int
    dim: int
    batch: int = 1
    tokens: int = 1
    held: int = 37
    room: int = 64
    mask: bool = True
    counted: bool = True
    norms: bool = False
    splits: int = 0


CASES = {
    "one token": Case(8, 2, 64),
    "an empty cache": Case(4, 4, 32, held=0, room=32),
    "growing": Case(8, 2, 64, held=130, room=256, mask=False, counted=False),
    "heads of 80": Case(4, 2, 80, held=65, room=70),
    "heads of 256": Case(4, 1, 256, held=33, room=64, norms=True),
    "three tokens": Case(4, 2, 64, tokens=3),
    "two sequences": Case(8, 4, 64, batch=2, tokens=2, norms=True),
    "padding": Case(4, 2, 64, batch=3, held=40),
    "eight tokens": Case(4, 1, 32, tokens=8, held=90, room=128),
    "many parts": Case(4, 2, 64, held=300, room=512, splits=5),
    "parts without work": Case(4, 2, 64, held=3, room=512, splits=4),
    "a full cache": Case(4, 2, 64, held=63, room=64),
}


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [B, heads, T, dim] as transformers' apply_rotary_pos_emb turns it."""
    half = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    return x * cosine[:, None] + half * sine[:, None]


def attention(case: Case, device: str, dtype: torch.dtype, monkey: Any = None) -> dict[str, Any]:
    """Errors in units of the bound, and what became of the cache."""
    from anybit.kernels.triton import block, block_launch

    made = torch.Generator().manual_seed(case.heads + case.dim)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made).to(device=device, dtype=dtype)

    b, t, dim, group = case.batch, case.tokens, case.dim, case.heads // case.kv_heads
    whole = random(b * t, (case.heads + 2 * case.kv_heads) * dim)
    q, k, v = whole.split([case.heads * dim, case.kv_heads * dim, case.kv_heads * dim], 1)
    angles = (torch.arange(t) + case.held)[None, :, None] * torch.rand(dim // 2, generator=made)
    angles = torch.cat([angles, angles], -1).to(device)
    cosine, sine = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (random(b, case.kv_heads, case.room, dim) for _ in range(2))
    q_norm, k_norm = ((1 + 0.2 * random(dim)), (1 + 0.2 * random(dim))) if case.norms else (None, None)
    places = torch.arange(case.room, device=device)
    mask = (places[None, :] <= (torch.arange(t, device=device) + case.held)[:, None]).expand(b, 1, t, case.room).clone()
    for i in range(1, b):
        mask[i, :, :, : 5 * i] = False  # padding on the left
    before = keys.clone(), values.clone()
    unit = block.Attention(case.heads, case.kv_heads, dim, dim**-0.5, q_norm, k_norm, 1e-6)
    if case.splits:
        choose = block_launch.attention_launch
        block.attention_launch = lambda *a: type(choose(*a))(*[
            case.splits if f == "splits" else getattr(choose(*a), f) for f in choose(*a).__dataclass_fields__])
    held: int | Tensor = torch.tensor(case.held, device=device) if case.counted else case.held
    try:
        found = unit(q, k, v, cosine, sine, keys, values, t, held, mask if case.mask else None)
        again = unit(q, k, v, cosine, sine, keys, values, t, held, mask if case.mask else None)
    finally:
        block.attention_launch = block_launch.attention_launch
    heads = [x.reshape(b, t, -1, dim).transpose(1, 2) for x in (q, k, v)]
    if q_norm is not None and k_norm is not None:
        heads[0], heads[1] = host_norm(heads[0], q_norm, 1e-6), host_norm(heads[1], k_norm, 1e-6)
    new_q, new_k = turned(heads[0], cosine, sine), turned(heads[1], cosine, sine)
    stop = case.held + t
    near = steps_apart(keys[:, :, case.held : stop], new_k)
    untouched = all(torch.equal(now[:, :, :case.held], old[:, :, :case.held]) and
                    torch.equal(now[:, :, stop:], old[:, :, stop:])
                    for now, old in zip((keys, values), before, strict=True))
    full_k, full_v = (x[:, :, :stop].double().repeat_interleave(group, 1) for x in (keys, values))
    score = new_q.double() @ full_k.mT * dim**-0.5
    size = new_q.double().abs() @ full_k.abs().mT * dim**-0.5
    seen = mask[..., :stop]
    weights = score.masked_fill(~seen, float("-inf")).softmax(-1)
    exact = (weights @ full_v).transpose(1, 2).reshape(b * t, -1)
    # a score errs by dim roundings of its float32 sum, a weight by twice that share and its exponential's; weights go in
    # as two numbers; their sum errs by one rounding a token; the norm of a head may round one step apart
    share = 2 * (dim + 2) * 2.0**-24 * float(size.max()) + (stop + 16) * 2.0**-22 + 2.0**-16
    share += 4 * UNIT[dtype] * float(size.max()) if case.norms else 0.0
    bound = share * (weights @ full_v.abs()).transpose(1, 2).reshape(b * t, -1) + UNIT[dtype] * exact.abs() + 1e-7
    return {"error": float(((found.double() - exact).abs() / bound).max()), "near": near, "untouched": untouched,
            "values": torch.equal(values[:, :, case.held : stop], heads[2]), "again": torch.equal(found, again)}


# --- without a GPU ----------------------------------------------------------------------------------------------------


def interpreted() -> list[str]:
    """All of it in this process, which must run with TRITON_INTERPRET=1: what is wrong, in words."""
    found = faults_of_rows("cpu", torch.float16, 200)
    for name in SPECS:
        found += [f"{name} {line}" for line in quantized(name, "cpu", torch.float16, 256)]
    for name, case in CASES.items():
        found += [f"{name}: {line}" for line in faults_of_attention(case, "cpu", torch.float16)]
    return found


def faults_of_rows(device: str, dtype: torch.dtype, k: int) -> list[str]:
    row = {**norms(device, dtype, k), **gates(device, dtype, k)}
    right = {"total": True, "count": 44}
    wrong = [f"{name} {row[name]}" for name, wanted in right.items() if row[name] != wanted]
    # a mean, a root, an exponential may fall to the other side of one rounding, and the next one doubles that
    return wrong + [f"{name} {row[name]} places" for name in ("normed", "alone", "gated") if row[name] > 2]


def faults_of_attention(case: Case, device: str, dtype: torch.dtype) -> list[str]:
    row = attention(case, device, dtype)
    wrong = [name for name in ("untouched", "values", "again") if not row[name]]
    if row["error"] > 1:
        wrong.append(f"{row['error']} of the bound")
    return wrong + ([f"keys {row['near']} places off"] if row["near"] > (3 if case.norms else 0) else [])


@pytest.mark.slow
def test_device_code_equals_plain_torch_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = "import test_triton_block as t; print('\\n'.join(t.interpreted()))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, cwd=HERE,
                          timeout=280, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
                                            "PYTHONPATH": os.pathsep.join(["../../src", *sys.path])})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ""


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 200, 4096, 14336, 32768])
@pytest.mark.parametrize("name", [None, *SPECS])
def test_a_program_of_the_norm_holds_the_whole_row(name: str | None, columns: int) -> None:
    launch = norm_launch(SPECS[name] if name else None, columns)
    assert launch.groups * launch.size >= columns
    assert launch.groups & (launch.groups - 1) == 0


@pytest.mark.parametrize("name", ["fp8_token", "nvfp4_token", "int8_token"])
def test_a_gate_whose_recipe_reads_the_row_has_it_for_itself(name: str) -> None:
    launch = gate_launch(SPECS[name], 14336)
    assert launch.groups * launch.size >= 14336
    assert gate_launch(SPECS["nvfp4"], 14336).groups * 16 < 14336


@pytest.mark.parametrize("spec", NOT_IN_PASSING, ids=lambda s: s.recipe)
def test_recipes_that_look_beyond_the_row_have_kernels_of_their_own(spec: ActivationSpec) -> None:
    assert not is_made_in_passing(spec)


def test_zero_points_sums_and_statistics_of_a_call_want_a_quantizer_of_their_own() -> None:
    pytest.importorskip("triton")
    from anybit.kernels.triton.block import makes_in_passing
    from anybit.kernels.triton.quantizers import Quantizer

    one = torch.ones(1)
    shifted = {"scale": one, "zero_point": torch.ones(1, dtype=torch.int8)}
    assert makes_in_passing(Quantizer(SPECS["int8_static_divide"], {"scale": one}, 64))
    assert not makes_in_passing(Quantizer(SPECS["int8_static_divide"], shifted, 64))
    assert makes_in_passing(Quantizer(SPECS["int8_token"], {}, 64))
    assert not makes_in_passing(Quantizer(SPECS["int8_token"], {}, 64, sums=True))
    assert makes_in_passing(Quantizer(SPECS["torchao_nvfp4"], {"scale": one}, 64))
    assert not makes_in_passing(Quantizer(SPECS["torchao_nvfp4"], {}, 64))  # the largest number of the call


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942", "gfx1100"])
@pytest.mark.parametrize(("dim", "rows", "pairs", "room"), [(64, 4, 8, 256), (128, 4, 8, 32768), (256, 64, 2, 100),
                                                            (80, 8, 600, 4096)])
def test_parts_of_a_cache_never_outnumber_its_blocks(arch: str, dim: int, rows: int, pairs: int, room: int) -> None:
    launch = attention_launch(dim, rows, pairs, room, arch)
    assert 1 <= launch.splits <= -(-room // launch.block)
    assert launch.rows >= rows
    assert 2 * launch.half >= dim


def test_every_architecture_with_16_bit_matrix_units_has_cases_to_compile() -> None:
    for arch, facts in ARCHS.items():
        names = [case.label for case in compile_cases(arch)]
        assert len(names) == len(set(names))
        assert bool(names) == (facts.vendor != "cpu" and "bfloat16" in facts.matrix)
    assert LARGEST_M == 8


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [200, 4096, 14336])
def test_norms_and_gates_round_as_the_host_does(k: int, dtype: torch.dtype) -> None:
    assert faults_of_rows("cuda", dtype, k) == []


@gpu
@needs_gpu
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("k", [256, 4096])
def test_rows_quantized_in_passing_have_the_recipes_codes(name: str, k: int) -> None:
    assert quantized(name, "cuda", torch.bfloat16, k) == []


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_float64_one_within_its_bound(name: str, dtype: torch.dtype) -> None:
    assert faults_of_attention(CASES[name], "cuda", dtype) == []


@gpu
@needs_gpu
def test_a_captured_step_goes_on_from_where_the_cache_is() -> None:
    from anybit.kernels.triton import block

    torch.manual_seed(2)
    unit = block.Attention(4, 2, 64, 0.125)
    keys, values = (torch.zeros(1, 2, 32, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    own_keys, own_values = keys.clone(), values.clone()
    count, q = torch.tensor(0, device="cuda"), torch.randn(1, 8 * 64, device="cuda", dtype=torch.bfloat16)
    turn = torch.ones(1, 1, 64, device="cuda", dtype=torch.bfloat16)
    places = torch.arange(32, device="cuda")

    def step() -> Tensor:
        mask = (places <= count)[None, None, None]
        found = unit(q[:, :256], q[:, 256:384], q[:, 384:], turn, turn, keys, values, 1, count, mask)
        count.add_(1)
        return found

    step()
    count.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    count.zero_()
    for held in range(5):
        q.copy_(torch.randn_like(q))
        graph.replay()
        alone = unit(q[:, :256], q[:, 256:384], q[:, 384:], turn, turn, own_keys, own_values, 1, held, None)
        assert torch.equal(out, alone)
    assert int(count) == 5
    assert torch.equal(keys, own_keys)
