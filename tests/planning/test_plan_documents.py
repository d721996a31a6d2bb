"""Plans as documents: written and read back, pinned and replayed, compared; strictness, overrides, batch invariance."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from anybit.errors import AnybitError, Damaged, Inconsistent, Unsupported
from anybit.kernels import catalogue
from anybit.kernels.request import KernelSpec, Reason, Request, Verdict, gather
from anybit.planning import choose as chooser
from anybit.planning.choose import Choice, Policy, choose
from anybit.planning.difference import differences
from anybit.planning.overrides import Overrides
from anybit.planning.plan import Plan, digest_of, plan_layers
from anybit.planning.replay import demand_same, pinned_kernels
from anybit.platforms import Platform, named
from anybit.schemes import CHANNEL, TENSOR, ActivationSpec, Layer, Offset, ScaleLevel, Scheme, dense, group

INT4 = Scheme("uint4", (ScaleLevel("float16", group(128)),), offset=Offset("zero_point", "uint4", group(128)))
ACT_ORDER = replace(INT4, scales=(ScaleLevel("float16", group(128), placement="gathered"),), offset=None,
                    act_order=True)
KQUANT = Scheme("uint4", (ScaleLevel("uint6", group(32)), ScaleLevel("float16", (1, 256))),
                offset=Offset("minimum", "uint6", group(32), (ScaleLevel("float16", (1, 256)),), subtract=True))
NVFP4 = Scheme("fp4_e2m1", (ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR, divide=True)),
               activation=ActivationSpec("fp4_e2m1", False, "group", "nvfp4", 16))
W8A8 = Scheme("int8", (ScaleLevel("float32", CHANNEL),),
              activation=ActivationSpec("int8", True, "token", "int8_token_asym", symmetric=False),
              output=ActivationSpec("int8", False, "tensor", "int8_static_output"))
WHOLE = Scheme("fp8_e4m3fn", (ScaleLevel("float32", TENSOR),),
               activation=ActivationSpec("fp8_e4m3fn", True, "tensor", "fp8_tensor"))
SCHEMES = (INT4, ACT_ORDER, KQUANT, NVFP4, W8A8, dense("bfloat16"))


def model(*schemes: Scheme, shape: tuple[int, int] = (1024, 512), **layers: Scheme) -> SimpleNamespace:
    named_layers = {f"l{i}": s for i, s in enumerate(schemes)} | {name.replace("__", "."): s for name, s in layers.items()}
    made = {n: Layer(n, "linear", shape, s, stored_bytes=1000) for n, s in named_layers.items()}
    return SimpleNamespace(dialect="made", layers=made, config={"num_hidden_layers": 2}, plain_elements=10)


def plan(*schemes: Scheme, on: str = "cpu", **options: object) -> Plan:
    return plan_layers(model(*schemes), named(on), dtype="float32", **options)  # type: ignore[arg-type]


def made_up(name: str, layout: str, seconds: float, **facts: object) -> KernelSpec:
    """A kernel that runs everything, in a time that does not depend on what."""
    return KernelSpec(name, layout, "nowhere:Nothing", lambda request, platform: Verdict(),
                      lambda request, platform: seconds, lambda request: 1, **facts)  # type: ignore[arg-type]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Adds kernels to the catalogue for one test."""
    def add(*specs: KernelSpec) -> None:
        more = (*catalogue.KERNELS, *specs)
        for module in (catalogue, chooser):
            monkeypatch.setattr(module, "KERNELS", more)

    return add


# --- documents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["cpu", "h100", "mi300x"])
def test_a_plan_read_back_is_the_plan(on: str) -> None:
    made = plan(*SCHEMES, on=on)
    document = json.loads(json.dumps(made.to_dict()))
    again = Plan.from_dict(document)
    assert again.to_dict() == document
    assert [u.scheme for u in again.units] == [u.scheme for u in made.units]
    assert pinned_kernels(again) == pinned_kernels(made)


def test_what_the_command_line_puts_around_a_plan_is_no_part_of_it() -> None:
    document = plan(INT4).to_dict()
    assert Plan.from_dict({**document, "kind": "explain", "model": "here"}).to_dict() == document


@pytest.mark.parametrize("spoil", [
    lambda d: d["units"][0].pop("runs_a_pass"), lambda d: d["units"][0]["scheme_fields"].pop("element"),
    lambda d: d.update(units="none"), lambda d: d.update(memory=None), lambda d: d["platform"].clear(),
    lambda d: d["units"][0].update(kernels=[1]),
], ids=["unit", "scheme", "units", "memory", "platform", "kernels"])
def test_a_changed_document_with_a_digest_of_its_own_is_damaged(spoil) -> None:  # type: ignore[no-untyped-def]
    document = json.loads(json.dumps(plan(INT4).to_dict()))
    spoil(document)
    with pytest.raises(Damaged):
        Plan.from_dict({**document, "digest": digest_of(document)})


def test_a_changed_document_is_refused_by_its_digest() -> None:
    document = plan(INT4).to_dict()
    document["units"][0]["kernels"]["decode"]["name"] = "torch-tiled"
    with pytest.raises(Inconsistent) as refused:
        Plan.from_dict(document)
    assert refused.value.wanted == document["digest"]


@pytest.mark.parametrize(("change", "kind"), [
    (lambda d: d.pop("units"), Damaged), (lambda d: d.update(version=1), Unsupported), (lambda d: d.clear(), Unsupported),
], ids=["without units", "of another version", "empty"])
def test_what_is_no_plan_is_refused(change, kind: type[AnybitError]) -> None:  # type: ignore[no-untyped-def]
    document = plan(INT4).to_dict()
    change(document)
    with pytest.raises(kind):
        Plan.from_dict(document)


def test_a_plan_with_a_kernel_that_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.planning import replay

    document = plan(INT4).to_dict()
    monkeypatch.setattr(replay, "KERNELS", [k for k in catalogue.KERNELS if k.name != "native-matvec"])
    with pytest.raises(Unsupported, match="kernels that this anybit does not have") as refused:
        Plan.from_dict(document)
    assert refused.value.found == "native-matvec"


# --- replay -----------------------------------------------------------------------------------------------------------


def replayed(written: Plan, checkpoint: SimpleNamespace, platform: Platform) -> Plan:
    here = plan_layers(checkpoint, platform, dtype=written.dtype, pinned=pinned_kernels(written))
    demand_same(written, here)
    return here


def test_a_replayed_plan_keeps_kernels_that_the_chooser_would_not_take() -> None:
    written = plan(INT4, kernel="torch-tiled")
    here = replayed(written, model(INT4), named("cpu-avx512"))
    assert here.units[0].choice.names == dict.fromkeys(("decode", "small", "prefill"), "torch-tiled")
    assert plan(INT4).units[0].kernel("decode") == "native-matvec"


@pytest.mark.parametrize(("checkpoint", "platform", "words"), [
    (model(INT4), named("h100"), ["architecture: cpu x86_64 in the plan, nvidia sm_90 here", "l0: its kernels cannot run"]),
    (model(NVFP4), named("cpu"), ["l0: scheme uint4·g128·fp16·zp in the plan, nvfp4"]),
    (model(INT4, INT4), named("cpu"), ["l1: in the model, not in the plan"]),
    (model(), named("cpu"), ["l0: in the plan, not in the model"]),
    (model(INT4, shape=(512, 512)), named("cpu"), ["l0: shape (1024, 512) in the plan, (512, 512) here"]),
], ids=["another chip", "another scheme", "one more layer", "one less", "another shape"])
def test_a_plan_that_does_not_fit_lists_what_differs(
    checkpoint: SimpleNamespace, platform: Platform, words: list[str]
) -> None:
    with pytest.raises(Inconsistent) as refused:
        replayed(plan(INT4), checkpoint, platform)
    assert all(word in refused.value.found for word in words), refused.value.found


def test_a_replayed_kernel_whose_library_is_gone_says_so() -> None:
    bare = replace(named("cpu"), providers=frozenset({"torch"}))
    with pytest.raises(Inconsistent, match="compiled library"):
        replayed(plan(INT4), model(INT4), bare)


# --- differences ------------------------------------------------------------------------------------------------------


def test_equal_plans_do_not_differ() -> None:
    assert differences(plan(INT4).to_dict(), plan(INT4).to_dict()) == []


def test_a_difference_names_kernel_and_layers() -> None:
    before, after = plan(INT4, INT4, NVFP4), plan(INT4, INT4, NVFP4, kernel=Overrides.parse(["l1=torch-tiled"]))
    found = {d.what: d for d in differences(before.to_dict(), after.to_dict())}
    assert (found["kernel in decode"].before, found["kernel in decode"].after) == ("native-matvec", "torch-tiled")
    assert found["kernel in decode"].layers == found["layout"].layers == ("l1",)
    assert found["seconds of a decode pass"].after > found["seconds of a decode pass"].before


def test_a_layer_that_is_gone_and_one_that_is_refused_differ() -> None:
    whole = plan(INT4, WHOLE, policy=Policy(batch_invariant=True))
    found = [d for d in differences(plan(INT4, WHOLE, INT4).to_dict(), whole.to_dict()) if d.what == "layer"]
    assert {(d.after, d.layers) for d in found} == {("no kernel", ("l1",)), ("not in the model", ("l2",))}


# --- strict -----------------------------------------------------------------------------------------------------------


def test_a_strict_plan_leaves_out_kernels_that_round(kernels) -> None:  # type: ignore[no-untyped-def]
    kernels(made_up("rounding", "own", 1e-9, rounds=lambda request, platform: "weights to bfloat16"))
    assert plan(INT4).units[0].kernel("decode") == "rounding"
    assert [c.what for c in plan(INT4).changes] == ["rounding: rounds weights to bfloat16 (in decode, small, prefill)"]
    unit = plan(INT4, policy=Policy(strict=True)).units[0]
    assert unit.kernel("decode") == "native-matvec"
    assert [r.reasons[0].code for r in unit.choice.refused if r.kernel == "rounding"] == ["strict"] * 3


def test_weight_only_execution_is_a_change_only_where_activations_are_declared(kernels) -> None:  # type: ignore[no-untyped-def]
    kernels(made_up("careless", "own", 1e-9, executes=lambda request, platform: "weight-only"))
    assert plan(INT4).changes == ()
    made = plan(NVFP4)
    assert made.changes_declared
    assert "activations are not quantized (fp4_e2m1 static g16 declared)" in made.changes[0].what
    assert made.to_dict()["units"][0]["execution"] == "weight-only"
    assert plan(NVFP4, policy=Policy(strict=True)).units[0].kernel("decode") == "native-matvec"


def test_a_strict_plan_refuses_quantization_while_loading_and_lists_the_layers() -> None:
    made = plan(dense("bfloat16"), INT4, quantize=lambda layer: NVFP4 if not layer.scheme.is_quantized else None,
                quantization="nvfp4", policy=Policy(strict=True))
    with pytest.raises(Unsupported, match="changes the arithmetic") as refused:
        made.demand_complete()
    assert refused.value.where == "l0"
    assert "bf16 declared, nvfp4" in refused.value.found


def test_a_strict_plan_refuses_a_cache_that_is_not_carried_out() -> None:
    cache = {"declared": "fp8_e4m3fn static tensor", "executed": "float32, not quantized", "is_executed": False}
    made = replace(plan(INT4, policy=Policy(strict=True)), kv_cache=cache)
    with pytest.raises(Unsupported, match="key-value cache"):
        made.demand_complete()
    replace(made, kv_cache={**cache, "is_executed": True}).demand_complete()


def test_a_strict_plan_of_declared_arithmetic_is_complete() -> None:
    plan(*SCHEMES, policy=Policy(strict=True)).demand_complete()


# --- prices -----------------------------------------------------------------------------------------------------------


def test_a_measured_time_beats_the_model_and_is_called_measured() -> None:
    measured = {("torch-tiled", str(INT4), 1024, 512, regime): 1e-9 for regime in (1, 16, 512)}
    unit = plan(INT4, policy=Policy(measured=measured)).units[0]
    assert unit.kernel("decode") == "torch-tiled"
    row = unit.to_dict()["kernels"]["decode"]
    assert (row["price"], row["seconds"]) == ("measured", 1e-9)
    other = plan_layers(model(INT4, shape=(512, 512)), named("cpu"), dtype="float32", policy=Policy(measured=measured))
    assert other.units[0].to_dict()["kernels"]["decode"]["price"] == "interpolated"
    assert plan(KQUANT, policy=Policy(measured=measured)).to_dict()["units"][0]["kernels"]["decode"]["price"] == "modelled"


def test_a_kernel_that_was_wrong_here_is_left_out_with_what_was_wrong() -> None:
    disproved = {("native-matvec", str(INT4)): "rows 3 to 7 differ"}
    unit = plan(INT4, NVFP4, policy=Policy(disproved=disproved)).units
    assert [u.kernel("decode") for u in unit] == ["native-expand", "native-matvec"]
    assert "rows 3 to 7 differ" in str(unit[0].to_dict()["refused"])


def test_what_would_be_faster_names_what_is_missing() -> None:
    bare = replace(named("cpu"), providers=frozenset({"torch"}))
    row = plan_layers(model(INT4), bare, dtype="float32").to_dict()["units"][0]["better"][0]
    assert row["kernel"] in ("native-matvec", "native-expand")
    assert row["times_faster"] > 1
    assert [need["code"] for need in row["needs"]] == ["provider"]


def test_a_kernel_for_another_vendor_is_not_something_better() -> None:
    assert all(need["code"] != "vendor" for u in plan(INT4, on="h100").to_dict()["units"]
               for row in u["better"] for need in row["needs"])


def test_a_kernel_that_would_not_be_faster_is_not_something_better(kernels) -> None:  # type: ignore[no-untyped-def]
    slow = made_up("slow", "own", 1.0)
    kernels(replace(slow, can_implement=lambda request, platform: gather(Reason("provider", "not installed"))))
    assert all(row["kernel"] != "slow" for row in plan(INT4).to_dict()["units"][0]["better"])


# --- overrides --------------------------------------------------------------------------------------------------------


def kernels_of(made: Plan) -> dict[str, str]:
    return {name: unit.kernel("decode") for unit in made.units for name in unit.layers}


def test_the_more_particular_rule_wins_whatever_the_order() -> None:
    checkpoint = model(a__up_proj=INT4, a__down_proj=INT4, b__down_proj=INT4)
    rules = Overrides.parse(["b.down_proj=native-matvec", "re:.*down_proj=torch-tiled", "linear=native-matvec"])
    found = kernels_of(plan_layers(checkpoint, named("cpu"), dtype="float32", kernel=rules))
    assert found == {"a.up_proj": "native-matvec", "a.down_proj": "torch-tiled", "b.down_proj": "native-matvec"}


def test_a_module_stands_for_the_layers_below_it() -> None:
    checkpoint = model(a__mlp__up_proj=INT4, a__mlp2__up_proj=INT4)
    found = kernels_of(plan_layers(checkpoint, named("cpu"), dtype="float32",
                                   kernel=Overrides.parse(["a.mlp=torch-tiled"])))
    assert found == {"a.mlp.up_proj": "torch-tiled", "a.mlp2.up_proj": "native-matvec"}


def test_the_command_line_wins_over_the_environment() -> None:
    rules = Overrides.parse(["linear=native-matvec"], environment="linear=torch-tiled")
    assert kernels_of(plan(INT4, kernel=rules)) == {"l0": "native-matvec"}
    assert kernels_of(plan(INT4, kernel=Overrides.parse([], environment="torch-tiled"))) == {"l0": "torch-tiled"}


def test_a_kernel_named_for_a_layer_that_it_is_not_made_for_is_an_error() -> None:
    with pytest.raises(Unsupported, match="cannot run this layer") as refused:
        plan(dense("bfloat16"), kernel=Overrides.parse(["l0=torch-tiled"]))
    assert "not quantized" in refused.value.found


def test_a_kind_leaves_out_layers_that_the_kernel_is_not_made_for() -> None:
    found = kernels_of(plan(INT4, dense("bfloat16"), kernel=Overrides.parse(["linear=torch-tiled"]), on="h100"))
    assert found["l0"] == "torch-tiled"
    assert found["l1"] != "torch-tiled"


@pytest.mark.parametrize("rule", ["l9=torch-tiled", "re:.*q_proj=torch-tiled"])
def test_a_rule_that_meets_no_layer_is_an_error(rule: str) -> None:
    with pytest.raises(Unsupported, match="meets no layer"):
        plan(INT4, kernel=Overrides.parse([rule]))


def test_a_rule_of_the_environment_that_meets_no_layer_is_a_note() -> None:
    made = plan(INT4, kernel=Overrides.parse([], environment="re:.*q_proj=torch-tiled"))
    assert made.notes == ("the kernel rule re:.*q_proj=torch-tiled decides for no layer here",)


@pytest.mark.parametrize("text", ["=torch-tiled", "linear=", "linear=marlin", "marlin"])
def test_text_that_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(Unsupported):
        Overrides.parse([text])


def test_an_override_is_used_in_every_regime_that_it_can_run() -> None:
    unit = plan(INT4, kernel="native-expand").units[0]
    assert unit.choice.names == dict.fromkeys(("decode", "small", "prefill"), "native-expand")
    unit = plan(INT4, kernel="native-matvec").units[0]
    assert unit.choice.names == {"decode": "native-matvec", "small": "native-matvec", "prefill": "native-expand"}


# --- batch invariance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("on", ["cpu", "h100", "mi300x"])
def test_a_batch_invariant_plan_has_one_kernel_for_all_regimes(on: str, scheme: Scheme) -> None:
    made = plan(scheme, on=on, policy=Policy(batch_invariant=True))
    assert made.to_dict()["policy"]["batch_invariant"]
    assert not made.refused
    names = set(made.units[0].choice.names.values())
    assert len(names) == 1
    assert catalogue.kernel(names.pop()).is_batch_invariant


def test_activations_scaled_over_the_whole_call_are_never_batch_invariant() -> None:
    made = plan(WHOLE, policy=Policy(batch_invariant=True))
    with pytest.raises(Unsupported, match="quantizes all rows of a call together"):
        made.demand_complete()


def test_the_recipes_that_look_at_the_whole_call_are_known_without_torch() -> None:
    from anybit.numerics.activations import RECIPES
    from anybit.planning.invariance import WHOLE_CALL_RECIPES

    assert {name for name, recipe in RECIPES.items() if not recipe.by_row} == WHOLE_CALL_RECIPES


# --- units ------------------------------------------------------------------------------------------------------------


def attention(q: Scheme, k: Scheme, v: Scheme, **options: object) -> Plan:
    return plan_layers(model(a__q_proj=q, a__k_proj=k, a__v_proj=v), named("cpu"), dtype="float32", **options)  # type: ignore[arg-type]


def test_layers_that_read_the_same_input_run_as_one_product() -> None:
    made = attention(INT4, INT4, INT4)
    assert made.runs_as_one(("a.q_proj", "a.k_proj", "a.v_proj"))
    assert made.to_dict()["joined"] == [{"parts": ["q_proj", "k_proj", "v_proj"], "modules": ["a"], "count": 1,
                                         "is_joined": True, "reasons": []}]


WEIGHT_ONLY_NVFP4 = replace(NVFP4, activation=None)


@pytest.mark.parametrize(("schemes", "options", "reason"), [
    ((INT4, INT4, KQUANT), {}, "schemes differ"),
    ((NVFP4, NVFP4, NVFP4), {}, "inputs are quantized"),
    ((ACT_ORDER, ACT_ORDER, ACT_ORDER), {}, "inputs are transformed"),
    ((INT4, INT4, INT4), {"kernel": "torch-tiled"}, "stores each layer alone"),
    ((INT4, INT4, INT4), {"kernel": "native-expand"}, "another kernel was asked for"),
    ((INT4, INT4, INT4), {"policy": Policy(batch_invariant=True)}, "batch invariance"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_layers_that_cannot_run_as_one_product_say_why(
    schemes: tuple[Scheme, ...], options: dict[str, object], reason: str
) -> None:
    made = attention(*schemes, **options)
    assert not made.runs_as_one(("a.q_proj", "a.k_proj", "a.v_proj"))
    assert any(reason in why for row in made.to_dict()["joined"] for why in row["reasons"]), made.to_dict()["joined"]


def test_unequal_global_scales_do_not_part_a_unit() -> None:
    assert attention(WEIGHT_ONLY_NVFP4, WEIGHT_ONLY_NVFP4, WEIGHT_ONLY_NVFP4).joined[0].is_joined


def test_choosing_again_with_the_same_facts_gives_the_same_choice() -> None:
    request = Request("linear", INT4, (1024, 512), "float32")
    first, second = (choose(request, named("cpu")) for _ in range(2))
    assert isinstance(first, Choice)
    assert first == second


def test_a_saved_plan_is_replayed_from_its_file(tmp_path: Path) -> None:
    from anybit.hosts.plans import read_plan

    made = plan(*SCHEMES)
    (tmp_path / "plan.json").write_text(json.dumps(made.to_dict()))
    assert read_plan(tmp_path / "plan.json").to_dict() == made.to_dict()
    assert read_plan(made) is made
