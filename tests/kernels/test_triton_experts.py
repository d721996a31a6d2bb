"""The experts of a layer as one launch: segments by expert, the products in Triton's interpreter and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from anybit.checkpoints.online import quantizer
from anybit.hosts.modules import AnybitExperts, AnybitLinear
from anybit.kernels.catalogue import implementation, kernel
from anybit.kernels.product import product_of
from anybit.kernels.trials import sample_weight
from anybit.kernels.triton.experts import stack_of
from anybit.kernels.triton.segments import Segments
from anybit.schemes import Layer, dense

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
EIGHT = {"fp8": "triton-w8a8-fp8", "int": "triton-w8a8-int8"}
NAMES = ["int4_g128", "mxfp4_a16", "nvfp4_a16", "nvfp4", "fp8_per_channel", "fp8_per_block", "int8_per_channel", "int8_asym"]


# --- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pairs", "experts"), [(1, 1), (8, 128), (33, 4), (500, 7), (64, 128), (4096, 3), (100, 1)])
def test_every_pair_lies_in_exactly_one_segment_of_its_expert(pairs: int, experts: int) -> None:
    index = torch.randint(0, experts + 1, (pairs,), generator=torch.Generator().manual_seed(pairs))
    found = Segments.of(index, experts)
    order = torch.arange(pairs) if found.order is None else found.order
    covered: Counter[int] = Counter()
    for expert, first, length in zip(found.expert.tolist(), found.first.tolist(), found.length.tolist(), strict=True):
        assert length <= found.longest
        if expert < 0:
            continue
        for row in range(first, first + length):
            assert int(index[order[row]]) == expert
            assert int(found.row_experts[row]) == expert
            covered[row] += 1
    rows_here = [row for row in range(pairs) if int(index[order[row]]) < experts]
    assert sorted(covered) == rows_here
    assert set(covered.values()) <= {1}


def test_rows_go_back_to_the_places_of_their_pairs() -> None:
    index = torch.randint(0, 5, (200,), generator=torch.Generator().manual_seed(1))
    found = Segments.of(index, 5)
    assert found.order is not None
    assert torch.equal(found.back(index[found.order][:, None]), index[:, None])


def test_the_scales_of_a_segment_lie_together() -> None:
    index = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(2))  # 4: elsewhere
    found = Segments.of(index, 4)
    assert found.counts is not None
    values = torch.arange(7 * 300).view(7, 300)
    together = found.together(values)
    assert torch.equal(together.sort().values, values.view(-1))
    for expert, first, length in zip(found.expert.tolist(), found.first.tolist(), found.length.tolist(), strict=True):
        if expert >= 0:
            part = together[7 * first : 7 * (first + length)].view(7, length)
            assert torch.equal(part, values[:, first : first + length])


def test_weights_that_lie_together_stay_where_they_are() -> None:
    scheme = quantizer("int4_g128").scheme_of(Layer("l", "linear", (64, 256), dense("bfloat16")))
    assert scheme is not None
    plan = {"decode": "triton-matvec", "small": "triton-fused", "prefill": "triton-fused"}
    prepare = implementation(kernel("triton-fused")).prepare
    stored = [prepare(sample_weight(scheme, (64, 256), seed=i), torch.bfloat16, plan) for i in range(3)]
    wanted = [one.dequantize() for one in stored]
    assert stack_of(stored, [None] * 3) is not None
    places = [{name: t.data_ptr() for name, t in one.tensors().items()} for one in stored]
    assert places[1]["plane_0"] - places[0]["plane_0"] == stored[0].tensors()["plane_0"].nbytes
    assert stack_of(stored, [None] * 3) is not None
    assert [{name: t.data_ptr() for name, t in one.tensors().items()} for one in stored] == places
    assert all(torch.equal(one.dequantize(), w) for one, w in zip(stored, wanted, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_experts_of_no_tokens_and_of_tokens_that_want_gradients() -> None:
    experts = _experts("int4_g128", 4, 256, 384)
    index = torch.zeros((0, 2), dtype=torch.int64, device="cuda")
    none = torch.empty((0, 256), dtype=torch.bfloat16, device="cuda")
    assert experts(none, index, none[:, :2]).shape == (0, 256)
    x = torch.randn(3, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.ones(3, 2, device="cuda", dtype=torch.bfloat16)
    experts(x, torch.zeros((3, 2), dtype=torch.int64, device="cuda"), weights).sum().backward()
    assert x.grad is not None and bool(x.grad.any())


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux")
def test_interpreted_experts_multiply_their_rows_within_the_bound() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("ml_dtypes")
    done = subprocess.run(
        [sys.executable, HERE / "experts_interpreted.py"], capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(HERE)))},
    )
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    assert len(rows) == 20, done.stderr[-2000:]
    for row in rows:
        assert row["error"] <= 2 * (row["columns"] + 2), row
        assert row["zero"] and row["same"], row
    rows = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("EIGHT ")]
    assert len(rows) == 16, done.stderr[-2000:]
    assert [row for row in rows if not (row["share"] <= 1 and row["zero"] and row["same"])] == []


class _Gating(nn.Module):
    """What AnybitExperts asks of the module that it replaces."""

    act_fn = nn.SiLU()


def _experts(name: str, count: int, hidden: int, inner: int) -> AnybitExperts:
    made = {}
    for role, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        scheme = quantizer(name).scheme_of(Layer("l", "linear", shape, dense("bfloat16")))
        assert scheme is not None
        weights = [sample_weight(scheme, shape, seed=17 * i + len(role), device="cuda") for i in range(count)]
        few, more = ("triton-matvec", "triton-fused") if "4" in name else (EIGHT[name[:3]],) * 2
        prepare = implementation(kernel(more)).prepare
        plan = {"decode": few, "small": more, "prefill": more}
        made[role] = [AnybitLinear(product_of(w, prepare(w, torch.bfloat16, plan), "cuda")) for w in weights]
    return AnybitExperts(_Gating(), count, made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 3, 40, 200])
def test_all_experts_at_once_give_what_one_after_another_gives(name: str, tokens: int) -> None:
    experts = _experts(name, 6, 256, 384)
    assert experts._stacks
    made = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, generator=made)
    index = torch.randint(0, 7, (tokens, 2), device="cuda", generator=made)  # 6: an expert elsewhere
    weights = torch.rand(tokens, 2, device="cuda", generator=made, dtype=torch.bfloat16)
    at_once = experts(x, index, weights)
    stacks, experts._stacks = experts._stacks, {}
    one_by_one = experts(x, index, weights)
    experts._stacks = stacks
    bound = 2**-6 * one_by_one.float().abs().amax(-1, keepdim=True).clamp(min=1e-3)  # bfloat16 between the products
    assert bool(((at_once.float() - one_by_one.float()).abs() <= bound).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 24])
def test_a_captured_step_follows_the_router(tokens: int, name: str) -> None:
    experts = _experts(name, 6, 256, 384)
    made = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, generator=made)
    weights = torch.rand(tokens, 2, device="cuda", generator=made, dtype=torch.bfloat16)
    index = torch.randint(0, 6, (tokens, 2), device="cuda", generator=made)
    other = (index + 1) % 6
    with torch.inference_mode():
        wanted = [experts(x, i, weights) for i in (index, other)]
        held = index.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts(x, held, weights)
        for i, want in zip((index, other), wanted, strict=True):
            held.copy_(i)
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, want)
