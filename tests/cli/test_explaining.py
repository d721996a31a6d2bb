"""explain's other faces: pages, Markdown, saved plans and their differences; and the options that a plan brings."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import anybit
from anybit.cli import main
from anybit.cli.explain_html import page
from anybit.cli.explain_markdown import markdown
from anybit.errors import Unsupported
from cli.tiny_model import tiny_model  # noqa: F401 - a fixture
from conftest import TRIMMED

EVIL = '"><script>alert(1)</script>\x1b[2J&lt;'


class Page(HTMLParser):
    """Tags with their attributes, and the text outside the style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def documents(path: Path, *platforms: str) -> list[dict[str, object]]:
    checkpoint = anybit.open(path)
    return [anybit.plan(checkpoint, name).to_dict() for name in platforms]


# --- pages ------------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_loads_nothing(tiny) -> None:  # type: ignore[no-untyped-def]
    found = Page(page("tiny", documents(tiny, "cpu", "mi300x")))
    assert found.open == []  # every tag is closed, in order
    assert {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "base"} == set()
    addresses = [value for _, attributes in found.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses == []
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "url(" not in page("tiny", documents(tiny, "cpu"))
    assert "prefers-color-scheme:dark" in page("tiny", documents(tiny, "cpu"))


def test_the_page_says_kernels_memory_and_refusals_of_every_platform(tiny) -> None:  # type: ignore[no-untyped-def]
    text = Page(page("tiny", documents(tiny, "cpu", "mi300x"))).text
    for words in ("cpu", "mi300x", "torch-dense", "bits a weight", "while loading", "refusals", "gfx942", "unquantized"):
        assert words in text


def test_names_from_files_are_escaped_in_the_page(tiny) -> None:  # type: ignore[no-untyped-def]
    (document,) = documents(tiny, "cpu")
    for unit in document["units"]:  # type: ignore[attr-defined]
        unit["layers"] = [EVIL]
        unit["declared"] = unit["scheme"] = EVIL
    document["notes"] = [EVIL]
    made = page(EVIL, [document])
    found = Page(made)
    assert "script" not in {tag for tag, _ in found.tags}
    assert "\x1b" not in made
    assert "<script>alert(1)</script>\\x1b[2J&lt;" in found.text


def test_names_from_files_mean_nothing_to_markdown(tiny) -> None:  # type: ignore[no-untyped-def]
    (document,) = documents(tiny, "cpu")
    document["notes"] = ["[a](http://x) | **b** <b>"]
    assert r"- \[a\](http://x) \| \*\*b\*\* \<b\>" in markdown("tiny", [document])


def test_markdown_tables_have_a_cell_for_every_platform(tiny, capfd) -> None:  # type: ignore[no-untyped-def]
    assert main.main(["explain", str(tiny), "--on", "cpu,h100,mi300x", "--md"]) == 0
    lines = capfd.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| linear") or line.startswith("| embedding")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 1 + 2 + 3 for row in rows)
    assert {"## cpu", "## h100", "## mi300x"} <= set(lines)


def test_the_page_is_written_whole_or_refused(tiny, tmp_path, capfd) -> None:  # type: ignore[no-untyped-def]
    target = tmp_path / "plan.html"
    assert main.main(["explain", str(tiny), "--on", "cpu", "--html", str(target), "--json"]) == 0
    assert target.read_text().startswith("<!doctype html>")
    assert main.main(["explain", str(tiny), "--html", str(tmp_path / "absent" / "plan.html")]) == 2
    assert "cannot be written" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["plan.html"]


# --- saved plans ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path: Path):  # type: ignore[no-untyped-def]
    def save(name: str, *options: str) -> Path:
        path = tmp_path / name
        assert main.main(["explain", str(tiny), "--quantization", "int4_g32_asym", "--save", str(path), *options]) == 0
        return path
    return save


def test_a_saved_plan_is_run_with_its_own_kernels(tiny, saved, capfd) -> None:  # type: ignore[no-untyped-def]
    path = saved("plan.json", "--kernel", "re:.*down_proj=torch-tiled")
    capfd.readouterr()
    assert main.main(["run", str(tiny), "hello", "--plan", str(path), "--max-new-tokens", "2", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["plan"]
    tiled = sum(row["count"] for row in told["kernels"] if row["kernels"]["decode"] == "torch-tiled")
    assert tiled == 2  # down_proj of two layers


def test_a_plan_of_another_model_is_refused_with_what_differs(saved, capfd) -> None:  # type: ignore[no-untyped-def]
    path = saved("plan.json", "--on", "cpu")
    capfd.readouterr()
    other = TRIMMED / "checkpoints" / "ct-llama-w4a16-g128"
    assert main.main(["explain", str(other), "--on", "cpu", "--plan", str(path)]) == 2
    err = capfd.readouterr().err
    assert "dialect: plain in the plan, compressed-tensors here" in err
    assert "model.layers.0." in err


def test_a_plan_and_options_that_make_one_exclude_each_other(tiny, saved, capfd) -> None:  # type: ignore[no-untyped-def]
    path = saved("plan.json")
    capfd.readouterr()
    assert main.main(["run", str(tiny), "hi", "--plan", str(path), "--kernel", "torch-tiled"]) == 2
    assert "--kernel beside --plan" in capfd.readouterr().err


def test_a_plan_for_another_chip_is_refused(tiny, saved, capfd) -> None:  # type: ignore[no-untyped-def]
    path = saved("gpu.json", "--on", "mi300x")
    capfd.readouterr()
    assert main.main(["run", str(tiny), "hi", "--plan", str(path), "--device", "cpu"]) == 2
    assert "architecture: amd gfx942 in the plan, cpu" in capfd.readouterr().err


def test_a_plan_that_was_edited_is_refused(tiny, saved, capfd) -> None:  # type: ignore[no-untyped-def]
    path = saved("plan.json")
    path.write_text(path.read_text().replace("native-matvec", "torch-tiled").replace('"dtype": "float32"', '"dtype": "float16"'))
    capfd.readouterr()
    assert main.main(["run", str(tiny), "hi", "--plan", str(path)]) == 2
    assert "digest" in capfd.readouterr().err


def test_the_difference_of_two_plans_names_kernels_and_layers(saved, capfd) -> None:  # type: ignore[no-untyped-def]
    before, after = saved("a.json", "--on", "cpu"), saved("b.json", "--on", "cpu", "--kernel", "re:.*v_proj=torch-tiled")
    capfd.readouterr()
    assert main.main(["explain", "--diff", str(before), str(after)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert any(re.match(r"kernel in decode\s+native-matvec\s+torch-tiled\s+2 layers: v$", line) for line in lines), lines
    assert main.main(["explain", "--diff", str(before), str(after), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["kind"] == "explain-diff"
    assert {"what", "before", "after", "layers"} == set(told["differences"][0])
    assert main.main(["explain", "--diff", str(before), str(before)]) == 0
    assert capfd.readouterr().out == "the plans are the same\n"


@pytest.mark.parametrize("words", [["explain"], ["explain", "x", "--diff", "a", "b"]])
def test_explain_takes_a_model_or_two_plans(words: list[str], capfd) -> None:  # type: ignore[no-untyped-def]
    assert main.main(words) == 2
    assert "explain takes a model, or two plans to compare" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', '{"version": 2, "units": "x"}', "\x00"])
def test_a_file_that_is_no_plan_is_refused(tiny, tmp_path, capfd, content: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "plan.json"
    path.write_text(content)
    assert main.main(["run", str(tiny), "hi", "--plan", str(path)]) == 2
    assert "error:" in capfd.readouterr().err


# --- strictness and rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["explain"], ["run"]])
def test_strict_refuses_quantization_while_loading(tiny, capfd, command: list[str]) -> None:  # type: ignore[no-untyped-def]
    words = [*command, str(tiny), *(["hi"] if command == ["run"] else []), "--quantization", "nvfp4", "--strict"]
    assert main.main(words) == 2
    err = capfd.readouterr().err
    assert "changes the arithmetic that the checkpoint declares" in err
    assert "model.layers.0" in err


def test_strict_runs_what_is_declared(tiny, capfd) -> None:  # type: ignore[no-untyped-def]
    assert main.main(["run", str(tiny), "hi", "--strict", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["stats"]["new_tokens"] == 2


def test_the_library_refuses_under_strict_too(tiny) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Unsupported, match="changes the arithmetic"):
        anybit.load(tiny, quantization="nvfp4", strict=True, device="cpu")


def test_rules_come_from_the_environment_too(tiny, capfd, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("ANYBIT_KERNEL", "re:.*up_proj=torch-dense linear=native-matvec")
    assert main.main(["explain", str(tiny), "--on", "cpu", "--json"]) == 0
    units = json.loads(capfd.readouterr().out)["units"]
    kernels = {name: unit["kernel"]["name"] for unit in units for name in unit["layers"]}
    assert kernels["model.layers.1.mlp.up_proj"] == "torch-dense"
    assert kernels["model.layers.1.mlp.gate_proj"] == "native-matvec"


def test_a_kernel_that_cannot_run_is_refused_with_its_reasons(tiny, capfd) -> None:  # type: ignore[no-untyped-def]
    assert main.main(["explain", str(tiny), "--on", "cpu", "--kernel", "lm_head=torch-tiled"]) == 2
    err = capfd.readouterr().err
    assert "kernel torch-tiled cannot run this layer" in err
    assert "not quantized" in err


def test_batch_invariance_is_recorded_and_runs(tiny, capfd) -> None:  # type: ignore[no-untyped-def]
    assert main.main(["explain", str(tiny), "--on", "cpu", "--batch-invariant", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["policy"] == {"strict": False, "batch_invariant": True}
    assert all(len({row["name"] for row in unit["kernels"].values()}) == 1 for unit in told["units"])
    assert main.main(["run", str(tiny), "hi", "--batch-invariant", "--max-new-tokens", "2", "--json"]) == 0
