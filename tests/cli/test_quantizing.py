"""--quantization on the command line: rules reach the plan, remarks reach stderr, mistakes are refused with 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anybit.cli import main
from cli.tiny_model import tiny_model, write_tiny_llama  # noqa: F401 - a fixture

RECIPE = ["--quantization", "mxfp8,re:.*down_proj=fp8_per_channel", "--quantize-ignore", "*.o_proj"]


def document(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main.main([*words, "--json"]) == 0
    told: dict[str, object] = json.loads(capfd.readouterr().out)
    return told


def schemes(told: dict[str, object]) -> dict[str, set[str]]:
    """Last part of a layer's name -> the schemes that run."""
    found: dict[str, set[str]] = {}
    for unit in told["units"]:  # type: ignore[attr-defined]
        for name in unit["layers"]:
            found.setdefault(name.rpartition(".")[2], set()).add(unit["scheme"].split("·")[0])
    return found


def test_explain_shows_what_the_rules_make_of_each_layer(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = document(capfd, "explain", str(tiny), *RECIPE)
    assert told["quantization"] == "mxfp8,re:.*down_proj=fp8_per_channel,*.o_proj=none"
    assert schemes(told) == {
        "embed_tokens": {"bf16"}, "lm_head": {"bf16"}, "o_proj": {"bf16"}, "q_proj": {"mxfp8"}, "k_proj": {"mxfp8"},
        "v_proj": {"mxfp8"}, "gate_proj": {"mxfp8"}, "up_proj": {"mxfp8"}, "down_proj": {"fp8_e4m3fn"},
    }  # fmt: skip


def test_only_leaves_all_other_layers(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--quantization", "int4_g32", "--quantize-only", "re:.*gate_proj", "--quantize-only", "lm_head"]
    found = schemes(document(capfd, "explain", str(tiny), *words))
    assert {name for name, made in found.items() if made == {"int4"}} == {"gate_proj", "lm_head"}


def test_run_tells_the_recipe_and_the_rules_without_effect(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(tiny), "hello", "--max-new-tokens", "2", *RECIPE, "--quantize-ignore", "o_proj"]
    told = document(capfd, *words)
    assert told["plan"]["notes"] == ["the rule o_proj takes no layer; perhaps *.o_proj"]  # type: ignore[index]
    assert main.main(words) == 0
    err = capfd.readouterr().err
    assert "note      the rule o_proj takes no layer; perhaps *.o_proj\n" in err
    assert "as asked: --quantization mxfp8,re:.*down_proj=fp8_per_channel,*.o_proj=none,o_proj=none" in err
    assert "--quantization makes it fp8_e4m3fn·channel·fp32 | a: fp8_e4m3fn dynamic token" in err


def test_eval_compares_recipes(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("abcdefgh" * 12)
    words = ["eval", str(tiny), "--text", str(tmp_path / "t.txt"), "--window", "16", "--limit-windows", "1"]
    told = document(capfd, *words, "--quantization", "none,int4_g32,re:.*mlp.{1,9}=none", "--quantization", "mxfp8",
                    "--quantize-ignore", "*.o_proj")
    rows = told["results"]
    assert [row["quantization"] for row in rows] == [  # type: ignore[attr-defined]
        "none", "int4_g32,re:.*mlp.{1,9}=none,*.o_proj=none", "mxfp8,*.o_proj=none"]
    bits = [row["bits_per_weight"] for row in rows]  # type: ignore[attr-defined]
    assert bits[0] == 16.0
    assert bits[2] < bits[1] < bits[0]


@pytest.mark.parametrize("command", ["run", "explain"])
@pytest.mark.parametrize(("words", "said"), [
    (["--quantization", "nvfp4,mxfp4"], "more than one scheme for the same layers"),
    (["--quantization", "nvfp4,re:.*(=mxfp4"], "a pattern does not compile"),
    (["--quantization", "nvfp4,*.o_proj=nvfp5"], "no such quantization: 'nvfp5'"),
    (["--quantize-only", "re:.*"], "rules without a scheme"),
    (["--quantize-ignore", "lm_head"], "nothing would be quantized"),
    (["--quantization", '{"moe": 4}'], "no quantization of a kind of layers"),
])  # fmt: skip
def test_mistakes_are_refused(
    command: str, words: list[str], said: str, tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main.main([command, str(tiny), *(["hello"] if command == "run" else []), *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
