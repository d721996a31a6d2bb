"""Rules of --quantization: what they take, who decides, how they are written, and what vLLM's configuration means."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from anybit.checkpoints.online import ONLINE, Online, online, online_list, quantizer
from anybit.errors import AnybitError, Unsafe, Unsupported
from anybit.schemes import Layer, LayerKind, dense

PROJECTIONS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def layer(name: str, kind: LayerKind = "linear", shape: tuple[int, ...] = (256, 384)) -> Layer:
    return Layer(name, kind, shape, dense("bfloat16"), {"weight": f"{name}.weight"})


DENSE = [layer(f"model.layers.{i}.{name}") for i in range(2) for name in PROJECTIONS]
MODEL = [layer("model.embed_tokens", "embedding"), *DENSE, layer("lm_head")]
MIXTURE = [
    layer("model.layers.0.self_attn.q_proj"), layer("model.layers.0.mlp.gate"),
    layer("model.layers.0.mlp.shared_expert.up_proj"),
    *(layer(f"model.layers.0.mlp.experts.{i}.{name}") for i in range(2) for name in ("up_proj", "down_proj")),
]  # fmt: skip
STACKED = [layer("model.layers.0.self_attn.q_proj"), layer("model.layers.0.mlp.experts.gate_up_proj", "experts",
                                                           (4, 256, 384))]  # fmt: skip


def names(recipe: object, layers: list[Layer] = MODEL) -> dict[str, str]:
    """layer -> name of its scheme, the layers that stay left out."""
    asked = quantizer(recipe)  # type: ignore[arg-type]
    return {x.name: name for x in layers if (name := asked.decide(x).name) is not None}


def of_layer(number: int, recipe: object) -> dict[str, str]:
    start = f"model.layers.{number}."
    return {name.removeprefix(start): scheme for name, scheme in names(recipe).items() if name.startswith(start)}


# ---- what a rule takes ----

def test_a_bare_name_takes_the_projections_and_nothing_else() -> None:
    assert names("mxfp4") == {x.name: "mxfp4" for x in DENSE}


def test_an_exact_name_takes_one_module() -> None:
    assert names("model.layers.1.mlp.up_proj=nvfp4") == {"model.layers.1.mlp.up_proj": "nvfp4"}


def test_the_name_of_a_tensor_is_the_name_of_its_module() -> None:
    assert names("model.layers.1.mlp.up_proj.weight=nvfp4") == {"model.layers.1.mlp.up_proj": "nvfp4"}


def test_a_module_stands_for_everything_in_it() -> None:
    assert of_layer(0, "nvfp4,model.layers.0.mlp=none") == {"self_attn.q_proj": "nvfp4", "self_attn.o_proj": "nvfp4"}
    assert names("model.layers.1=mxfp8") == {f"model.layers.1.{name}": "mxfp8" for name in PROJECTIONS}


def test_a_part_of_a_name_takes_nothing() -> None:
    assert names("down_proj=nvfp4") == {}
    assert names("model.layers.1.mlp.up=nvfp4") == {}


def test_a_pattern_is_matched_from_the_start_as_vllm_and_compressed_tensors_do() -> None:
    assert set(names(r"re:.*down_proj=nvfp4")) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert names("re:down_proj=nvfp4") == {}
    assert set(names(r"re:model\.layers\.1\.mlp=nvfp4")) == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}


def test_a_shell_pattern_takes_whole_names() -> None:
    assert set(names("*.layers.0.*_proj=mxfp4")) == {f"model.layers.0.{name}" for name in PROJECTIONS}
    assert names("*.layers.0.mlp=mxfp4") == {}


@pytest.mark.parametrize("written", ["experts", "FusedMoE", "RoutedExperts", "MixtralExperts"])
def test_experts_are_a_class_whether_stacked_or_one_by_one(written: str) -> None:
    assert names(f"{written}=mxfp4", MIXTURE) == {x.name: "mxfp4" for x in MIXTURE if ".experts." in x.name}
    assert names(f"{written}=mxfp4", STACKED) == {"model.layers.0.mlp.experts.gate_up_proj": "mxfp4"}


def test_the_class_linear_takes_all_projections_experts_too_but_never_heads_and_routers() -> None:
    assert names("Linear=mxfp4", MIXTURE) == {x.name: "mxfp4" for x in MIXTURE if not x.name.endswith(".gate")}
    assert names("Linear=mxfp4") == names("mxfp4")


@pytest.mark.parametrize("rule", ["model.layers.0.mlp.experts", r"re:.*mlp\.experts$", "*.experts"])
def test_the_experts_module_stands_for_its_pieces(rule: str) -> None:
    assert set(names(f"{rule}=mxfp4", MIXTURE)) == {x.name for x in MIXTURE if ".experts." in x.name}
    assert set(names(f"{rule}=mxfp4", STACKED)) == {"model.layers.0.mlp.experts.gate_up_proj"}


# ---- embeddings, heads, routers ----

@pytest.mark.parametrize(("rule", "taken"), [
    ("lm_head", "lm_head"), ("re:.*lm_head", "lm_head"), ("*embed_tokens", "model.embed_tokens"),
    ("Embedding", "model.embed_tokens"), ("model.embed_tokens", "model.embed_tokens"),
])  # fmt: skip
def test_a_head_or_an_embedding_is_quantized_where_a_rule_spells_it(rule: str, taken: str) -> None:
    assert names(f"{rule}=fp8_per_channel") == {taken: "fp8_per_channel"}


@pytest.mark.parametrize("rule", ["re:.*", "*", "model", "Linear"])
def test_no_wide_rule_takes_a_head_or_an_embedding_by_chance(rule: str) -> None:
    assert names(f"{rule}=mxfp4") == {x.name: "mxfp4" for x in DENSE}


def test_a_router_is_quantized_by_its_full_name_only() -> None:
    router = "model.layers.0.mlp.gate"
    assert router not in names("re:.*gate=mxfp4", MIXTURE)
    assert router not in names("*.gate=mxfp4", MIXTURE)
    assert names(f"{router}=mxfp8", MIXTURE) == {router: "mxfp8"}


# ---- who decides ----

def test_none_wins_over_every_other_rule() -> None:
    made = names("nvfp4,model.layers.0.mlp.up_proj=mxfp8,re:.*up_proj=none")
    assert not any(name.endswith("up_proj") for name in made)


def test_the_most_particular_rule_decides() -> None:
    recipe = "nvfp4,Linear=mxfp8,re:.*mlp.*=mxfp4,model.layers.0=fp8_per_block,model.layers.0.mlp.up_proj=int8_per_channel"
    assert of_layer(0, recipe) == {"self_attn.q_proj": "fp8_per_block", "self_attn.o_proj": "fp8_per_block",
                                   "mlp.up_proj": "int8_per_channel", "mlp.down_proj": "fp8_per_block"}
    assert of_layer(1, recipe) == {"self_attn.q_proj": "mxfp8", "self_attn.o_proj": "mxfp8", "mlp.up_proj": "mxfp4",
                                   "mlp.down_proj": "mxfp4"}


def test_of_two_patterns_the_first_decides_whatever_its_kind() -> None:
    assert of_layer(0, "*.up_proj=mxfp4,re:.*up_proj=mxfp8")["mlp.up_proj"] == "mxfp4"
    assert of_layer(0, "re:.*up_proj=mxfp8,*.up_proj=mxfp4")["mlp.up_proj"] == "mxfp8"


def test_experts_go_before_linear() -> None:
    made = names("Linear=fp8_per_channel,experts=mxfp4", MIXTURE)
    assert made["model.layers.0.mlp.experts.1.up_proj"] == "mxfp4"
    assert made["model.layers.0.mlp.shared_expert.up_proj"] == "fp8_per_channel"


# ---- further options ----

def test_only_limits_the_name_to_some_layers() -> None:
    assert str(online("nvfp4", ["re:.*down_proj", "*.q_proj"])) == "re:.*down_proj=nvfp4,*.q_proj=nvfp4"
    assert set(of_layer(0, online("nvfp4", ["re:.*down_proj", "*.q_proj"]))) == {"mlp.down_proj", "self_attn.q_proj"}


def test_only_leaves_other_rules_their_scheme() -> None:
    recipe = online("nvfp4,re:.*down_proj=fp8_per_channel", ["re:.*mlp.*"])
    assert of_layer(0, recipe) == {"mlp.up_proj": "nvfp4", "mlp.down_proj": "fp8_per_channel"}


def test_the_library_and_the_command_line_say_the_same() -> None:
    said = Online("nvfp4", targets={"re:.*down_proj": "fp8_per_channel", "*.o_proj": None}, ignore=["lm_head"])
    assert said == online("nvfp4", {"re:.*down_proj": "fp8_per_channel", "*.o_proj": "none"}, "lm_head")
    assert set(said.ignore) == {"*.o_proj", "lm_head"}
    assert online(str(said)) == said
    assert names(said) == names("nvfp4,re:.*down_proj=fp8_per_channel,*.o_proj=none")


@pytest.mark.parametrize("nothing", [None, "none", "None"])
def test_none_is_the_checkpoint_as_it_is(nothing: str | None) -> None:
    assert online(nothing) is None


# ---- text ----

@pytest.mark.parametrize("rule", [r"re:.*\.(q|k){1,2}_proj", "re:.*(?=a,b)x{2,}", r"re:model\.layers\.[0,1]\..*"])
def test_a_comma_in_a_pattern_is_its_own(rule: str) -> None:
    assert online(f"nvfp4,{rule}=mxfp8,lm_head=none") == Online("nvfp4", {rule: "mxfp8"}, ["lm_head"])


def test_an_equals_sign_in_a_pattern_is_its_own() -> None:
    assert online("re:(?=model).*=mxfp8") == Online(None, {"re:(?=model).*": "mxfp8"})


def test_several_recipes_begin_with_a_bare_name_each() -> None:
    assert online_list("none,nvfp4,*.o_proj=mxfp8,int4_g128,re:.*mlp.{1,2}=none") == [
        None, Online("nvfp4", {"*.o_proj": "mxfp8"}), Online("int4_g128", ignore=["re:.*mlp.{1,2}"])]  # fmt: skip


def test_names_may_be_written_in_capitals() -> None:
    assert online("NVFP4,lm_head=None") == Online("nvfp4", ignore=["lm_head"])


@pytest.mark.parametrize(("text", "problem", "part", "value"), [
    ("nvpf4", "no such quantization: 'nvpf4'", "remedy", "perhaps nvfp4 "),
    ("nvfp4,re:.*=fp8_per_chanel", "no such quantization: 'fp8_per_chanel'", "remedy", "perhaps fp8_per_channel "),
    ("nvfp4,mxfp4", "more than one scheme for the same layers", "remedy",
     "say which layers the second is for: nvfp4,Linear=mxfp4"),
    ("nvfp4,re:.*down_proj", "a rule without a scheme", "found", "re:.*down_proj"),
    ("nvfp4,,mxfp4", "an empty field", "found", "'nvfp4,,mxfp4'"),
    ("nvfp4,=mxfp4", "an empty rule", "found", "''"),
    ("nvfp4,re:=mxfp4", "an empty rule", "found", "'re:'"),
    ("nvfp4,lm_head=", "no such quantization: ''", "wanted", "nvfp4, mxfp4"),
    ("", "an empty field", "found", "''"),
    ("lm_head=none", "nothing would be quantized", "found", "lm_head"),
    ("nvfp4,a=mxfp4,a=mxfp8", "a rule has two schemes", "found", "mxfp4 and mxfp8"),
    ("nvfp4,a=mxfp4,a=none", "a rule has two schemes", "found", "mxfp4 and none"),
    ('{"weight": ', "no JSON", "found", '{"weight": '),
    ('{"lineer": "nvfp4"}', "no such key: 'lineer'", "remedy", "perhaps linear"),
    ('{"name": 4}', "no quantization", "found", "int 4"),
    ('{"name": "nvfp4", "ignore": "lm_head"}', "no list of rules", "found", "'lm_head'"),
    ('{"name": "nvfp4", "targets": ["a"]}', "targets beside linear or moe, or no mapping", "found", "['a']"),
    ('{"targets": {"a": "mxfp4"}, "moe": "mxfp4"}', "targets beside linear or moe, or no mapping", "where", "targets"),
])  # fmt: skip
def test_what_means_nothing_is_refused_and_said(text: str, problem: str, part: str, value: str) -> None:
    with pytest.raises(Unsupported) as caught:
        online(text)
    assert caught.value.problem == problem
    assert (f"{getattr(caught.value, part)} ").startswith(value)


def test_rules_need_a_scheme() -> None:
    with pytest.raises(Unsupported, match="rules without a scheme"):
        online(None, ["re:.*mlp"])
    with pytest.raises(Unsupported, match="nothing would be quantized"):
        online(None, ignore=["re:.*mlp"])


@pytest.mark.parametrize("wrong", [4, ["nvfp4"], b"nvfp4", {"targets": {"a": 4}}, {"ignore": [4], "name": "nvfp4"}])
def test_other_types_are_refused_not_a_type_error(wrong: object) -> None:
    with pytest.raises(AnybitError):
        online(wrong)  # type: ignore[arg-type]


def test_a_pattern_that_does_not_compile_is_the_users_to_mend() -> None:
    with pytest.raises(Unsupported, match="does not compile") as caught:
        quantizer("re:.*(=nvfp4")
    assert caught.value.where == "--quantization"


def test_a_pattern_of_exponential_time_ends() -> None:
    long = [layer("a" * 60 + str(i)) for i in range(50)]
    asked = quantizer("re:^(?:(a|aa)(?!x))+[bd]$=nvfp4")  # look-ahead, which RE2 lacks
    started = time.perf_counter()
    with pytest.raises(Unsafe, match="takes too long"):
        for x in long:
            asked.decide(x)
    assert time.perf_counter() - started < 8


# ---- vLLM's configuration ----

@pytest.mark.parametrize(("config", "wanted"), [
    ({"name": "fp8_per_tensor", "linear": "fp8_per_block"},
     Online("fp8_per_block", {"experts": "fp8_per_tensor"})),
    ({"name": "fp8_per_tensor", "moe": "fp8_per_block"}, Online("fp8_per_tensor", {"experts": "fp8_per_block"})),
    ({"global_scheme": "fp8_per_tensor", "linear_scheme_override": "fp8_per_block", "ignore": ["lm_head"]},
     Online("fp8_per_block", {"experts": "fp8_per_tensor"}, ["lm_head"])),
    ({"name": "mxfp4", "linear": {"weight": None, "activation": None}}, Online(None, {"experts": "mxfp4"})),
    ({"linear": {"weight": "fp8_per_channel_static"}}, Online("fp8_per_channel", ignore=["experts"])),
    ({"linear": {"weight": "mxfp8", "activation": "mxfp8"}}, Online("mxfp8", ignore=["experts"])),
    ({"moe": {"weight": "mxfp4", "activation": None}}, Online(None, {"experts": "mxfp4_a16"})),
    ({"moe": "int8_per_channel_static"}, Online(None, {"experts": "int8_per_channel"})),
    ({"targets": {"re:.*o_proj": "fp8_per_block"}, "ignore": ["lm_head"]},
     Online(None, {"re:.*o_proj": "fp8_per_block"}, ["lm_head"])),
    ({"name": "online", "targets": {"re:.*o_proj": "mxfp8"}}, Online(None, {"re:.*o_proj": "mxfp8"})),
])  # fmt: skip
def test_vllms_quantization_config_means_what_it_means_there(config: dict[str, object], wanted: Online) -> None:
    assert online(config) == wanted
    assert online(json.dumps(config)) == wanted


@pytest.mark.parametrize("config", [
    {"linear": "int8_per_channel_weight_only"}, {"linear": {"weight": "fp8_per_tensor", "activation": "mxfp4"}},
    {"linear": {"weight": "fp8_per_token"}}, {"linear": {"weights": "mxfp4"}}, {"linear": 4},
    {"moe": {"weight": "int8_per_channel_static", "activation": "fp8_per_token"}},
])  # fmt: skip
def test_what_vllm_refuses_or_nobody_means_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(Unsupported):
        online(config)


@pytest.mark.parametrize("name", ["int8_per_channel_weight_only", "experts_int8", "nvfp4_per_token"])
def test_vllms_names_for_experts_leave_linear_layers(name: str) -> None:
    assert set(names(name, MIXTURE)) == {x.name for x in MIXTURE if ".experts." in x.name}


def test_online_with_rules_is_what_the_rules_say() -> None:
    assert online("online,re:.*mlp.*=mxfp4") == Online(None, {"re:.*mlp.*": "mxfp4"})
    assert quantizer("online").notes(MODEL) == ("online without rules is fp8_per_tensor",)


# ---- remarks ----

@pytest.mark.parametrize(("recipe", "note"), [
    ("nvfp4,down_proj=none", "the rule down_proj takes no layer; perhaps *.down_proj"),
    ("nvfp4,re:.*downproj=mxfp4", "the rule re:.*downproj takes no layer; perhaps *.down_proj"),
    ("nvfp4,xyz=mxfp4", "the rule xyz takes no layer"),
    ("nvfp4,re:.*(head|tokens)=mxfp4", "the rule re:.*(head|tokens) takes an embedding only, which stays unless named: "
     "model.embed_tokens=mxfp4"),
    ("nvfp4,re:.*up_proj=mxfp4,*.up_proj=mxfp8",
     "the rule *.up_proj decides nothing: more particular rules, or none, take its 2 layers"),
    ("nvfp4,re:.*up_proj=nvfp4_per_token",
     "model.layers.0.mlp.up_proj and 1 more layers stay unchanged: nvfp4_per_token is for experts alone"),
    ("nvfp4_per_token", "--quantization nvfp4_per_token quantizes nothing here"),
])  # fmt: skip
def test_a_rule_without_effect_is_named(recipe: str, note: str) -> None:
    assert quantizer(recipe).notes(MODEL) == (note,)


def test_a_layer_whose_groups_do_not_fit_is_named() -> None:
    odd = layer("model.layers.0.mlp.down_proj", shape=(256, 200))
    wanted = "model.layers.0.mlp.down_proj stays unchanged: K 200 is no multiple of the group size 32"
    assert quantizer("mxfp4").notes([*DENSE, odd]) == (wanted,)


def test_a_recipe_that_does_all_it_says_leaves_no_remark() -> None:
    assert quantizer("nvfp4,re:.*down_proj=fp8_per_channel,lm_head=none").notes(MODEL) == ()


# ---- the document ----

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "quantization.md").read_text()


def test_the_python_of_the_document_runs() -> None:
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        exec(block, {})


def test_every_recipe_of_the_document_is_one() -> None:
    said = re.findall(r"--quantization (?:'([^']+)'|([\w,]+))", PAGE)
    recipes = [recipe for quoted, bare in said for recipe in online_list(quoted or bare) if recipe is not None]
    assert len(recipes) >= 7
    for recipe in recipes:
        quantizer(recipe)


def test_every_name_stands_in_the_document() -> None:
    assert all(f"`{name}`" in PAGE for name in ONLINE)
