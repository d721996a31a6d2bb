"""One pass through a model multiplies the matrices that its tokens need: chosen experts, and a tied head."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anybit.cli.explain_tables import decode_seconds
from anybit.planning.fit import BETWEEN_SECONDS, fit
from anybit.planning.passes import expected_experts
from anybit.planning.plan import Plan, plan_layers
from anybit.planning.units import Part, units_of
from anybit.platforms import named
from anybit.schemes import Layer, ScaleLevel, Scheme, dense, group
from planning.test_fit import CONFIG, INT4, Model, layer, llama

EXPERTS = {**CONFIG, "num_experts": 16, "num_experts_per_tok": 2}


def planned(model: Model) -> Plan:
    return plan_layers(model, named("h100"), dtype="bfloat16")


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 2.0), (2, 2 + 2 * 14 / 16), (10_000, 16.0)])
def test_tokens_choose_experts_evenly(tokens: int, chosen: float) -> None:
    assert expected_experts(16, 2, tokens) == pytest.approx(chosen)


def test_a_token_runs_the_experts_that_it_chooses_and_a_prompt_all() -> None:
    layers = [layer(f"model.layers.0.mlp.experts.{e}.up_proj", 2048, 4096, INT4) for e in range(16)]
    (unit,) = planned(Model({x.name: x for x in layers}, EXPERTS)).to_dict()["units"]
    assert unit["count"] == 16
    assert unit["runs_a_pass"]["decode"] == 2.0
    assert unit["runs_a_pass"]["prefill"] == pytest.approx(16.0)


def test_a_stack_of_experts_runs_as_many_as_single_ones() -> None:
    stack = Layer("model.layers.0.mlp.experts.up_proj", "experts", (16, 2048, 4096), INT4, stored_bytes=1)
    (unit,) = planned(Model({stack.name: stack}, EXPERTS)).to_dict()["units"]
    assert unit["runs_a_pass"]["decode"] == 2.0


def test_a_table_counts_as_a_product_only_where_it_is_the_head() -> None:
    own_head = llama(INT4)
    tied = Model({name: x for name, x in own_head.layers.items() if name != "lm_head"})
    runs = [next(u.runs["decode"] for u in planned(m).units if u.kind == "embedding") for m in (own_head, tied)]
    assert runs == [0.0, 1.0]
    fits = [fit(planned(m), m.layers, m.config, 1, 1) for m in (own_head, tied)]
    assert fits[0].decode == pytest.approx(fits[1].decode, rel=0.05)  # the same matrix, read once either way


def test_fit_adds_to_the_decode_time_of_explain_what_lies_between_the_products() -> None:
    model = replace(llama(INT4), config={**CONFIG, "num_key_value_heads": 1, "head_dim": 1})  # next to no cache
    plan = planned(model)
    found = fit(plan, model.layers, model.config, 1, 1)
    assert found.decode is not None
    between = 32 * BETWEEN_SECONDS["nvidia"]
    assert 1 / found.decode - between == pytest.approx(decode_seconds(plan.to_dict()), rel=1e-3)


def test_what_no_user_can_change_is_nothing_better() -> None:
    """A scheme for which another chip or another checkpoint would have a faster kernel is no advice."""
    plan = planned(llama(Scheme("fp8_e4m3fn", (ScaleLevel("float32", (128, 128)),))))
    codes = {need["code"] for u in plan.to_dict()["units"] for row in u["better"] for need in row["needs"]}
    assert codes <= {"provider", "dtype", "strict", "batch-invariant"}


def test_parts_that_lie_in_other_layouts_were_not_asked_for_another_kernel() -> None:
    parts = {f"a.{name}": layer(f"a.{name}", 64, 64, Scheme("int4", (ScaleLevel("bfloat16", group(32)),)))
             for name in ("gate_proj", "up_proj")}
    (unit,) = units_of(parts, lambda name: Part(parts[name], parts[name].scheme, "triton-planes",
                                                {"decode": "triton-matvec"}), pinned=False)
    assert unit.reasons == ("layout triton-planes stores each layer alone",)


def test_an_unquantized_model_has_its_head_counted_once() -> None:
    model = llama(dense("bfloat16"))
    weights = sum(u.stored_bytes * u.runs["decode"] for u in planned(model).units)
    assert weights == pytest.approx(2 * (128256 * 4096 + 32 * (2 * 4096 + 2 * 1024 + 3 * 14336) * 4096))
