"""What reaches a terminal, and how ends become exit codes."""

import json

import pytest

from anybit.cli import inspect, main, output
from anybit.cli.output import shown, size, terminal_safe, to_json, without_secrets
from anybit.errors import Damaged


@pytest.mark.parametrize(
    ("foreign", "harmless"),
    [
        ("\x1b]8;;http://x\x07q", "\\x1b]8;;http://x\\x07q"),  # CL01: a link
        ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),  # the clipboard
        ("a\rb\x9bc", "a\\rb\\x9bc"),
        ("x\u202egpj.exe", "x\\u202egpj.exe"),
        ("lone \udcff", "lone \\udcff"),
        ("día 日本 🙂", "día 日本 🙂"),
    ],
)
def test_foreign_text_is_shown_without_control_characters(foreign, harmless):
    assert shown(foreign) == harmless


def test_a_long_value_is_cut_and_its_length_said():  # CL03
    assert shown("x" * 1_000_000) == "x" * 200 + "… (1,000,000 characters)"


def test_generated_text_keeps_its_lines_and_joined_emoji_on_a_terminal():  # CL04
    assert terminal_safe("a\n\tb 👩\u200d💻 \x1b[2Jc\u202e") == "a\n\tb 👩\u200d💻 \\x1b[2Jc\\u202e"


def test_generated_text_is_untouched_on_a_pipe(capfd):
    output.make_output().text("\x1b[31mred")
    assert capfd.readouterr().out == "\x1b[31mred"


@pytest.mark.parametrize("name", ["[link=http://x]q[/link]", "x[/]", "experts[a]", ":smile:", "[bold]b"])
def test_markup_in_names_is_shown_as_it_is(name, capfd):  # CL02
    sink = output.make_output()
    sink.line(name)
    sink.rows([(name, "1")], indent=0)
    sink.remark(name)
    out, err = capfd.readouterr()
    assert out == f"{name}\n{name}  1\n"
    assert err == f"{name}\n"


def test_json_is_ascii_without_nan():  # CL03
    text = to_json({"a": float("nan"), "b": "\udcff ü", "c": [float("inf"), 1.5]})
    assert text.isascii()
    assert json.loads(text) == {"a": None, "b": "\udcff ü", "c": [None, 1.5]}


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (98_362_432, "98.4 MB"), (5_700_000_000, "5.7 GB")])
def test_sizes_are_decimal(count, text):
    assert size(count) == text


def raising(error):
    def command(*words, **options):
        raise error

    return command


def run_with(monkeypatch, error):
    monkeypatch.setattr(inspect.anybit, "open", raising(error))
    return main.main(["inspect", "x"])


def test_a_refusal_is_exit_2_with_where_found_wanted_do(monkeypatch, capfd):
    error = Damaged("cut short", where="m\x1b.safetensors", found="1 byte", wanted="2 bytes", remedy="download again")
    assert run_with(monkeypatch, error) == 2
    assert capfd.readouterr() == (
        "",
        "error: m\\x1b.safetensors: cut short\n  found   1 byte\n  wanted  2 bytes\n  do      download again\n",
    )


def test_a_bug_is_exit_70_says_so_and_tells_no_locals_or_tokens(monkeypatch, capfd):  # CL11
    assert run_with(monkeypatch, ZeroDivisionError("with hf_abcdefghijklmnop")) == 70
    out, err = capfd.readouterr()
    assert out == ""
    assert "error: a bug in anybit\n  found   ZeroDivisionError: with hf_…\n" in err
    assert "hf_abcdef" not in err
    assert "Traceback" not in err


def test_a_bug_under_json_is_a_document(monkeypatch, capfd):
    monkeypatch.setattr(inspect.anybit, "open", raising(ZeroDivisionError("x")))
    assert main.main(["inspect", "x", "--json"]) == 70
    assert json.loads(capfd.readouterr().out)["error"]["problem"] == "a bug in anybit"


def test_an_interrupt_is_exit_130_without_traceback(monkeypatch, capfd):  # CL09
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capfd.readouterr() == ("", "interrupted\n")


def test_lack_of_memory_is_a_refusal_not_a_bug(monkeypatch, capfd):
    assert run_with(monkeypatch, MemoryError()) == 2
    assert "error: not enough memory" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspect"], "missing argument 'MODEL'"),
        (["inspekt"], "no such command 'inspekt'"),
        (["inspect", "x", "--colour"], "no such option: --colour"),
        (["run", "x", "hi", "--max-new-tokens", "-1"], "--max-new-tokens"),
        (["run", "x", "hi", "--max-new-tokens", "1000000000000"], "--max-new-tokens"),
        (["run", "x", "hi", "--temperature", "hot"], "--temperature"),
    ],
)
def test_misuse_is_exit_2_and_names_the_help(words, said, capfd):
    assert main.main(words) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "  do      anybit" in err
    assert "--help" in err


def test_misuse_under_json_is_a_document(capfd):
    assert main.main(["inspect", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["problem"] == "missing argument 'MODEL'"


def test_the_version_is_one_line_on_stdout(capfd):
    assert main.main(["--version"]) == 0
    assert capfd.readouterr() == ("anybit 0.1.0\n", "")


@pytest.mark.parametrize("command", ["run", "chat", "inspect", "explain", "eval", "doctor"])
def test_help_shows_examples_before_options(command, capfd):
    assert main.main([command, "--help"]) == 0
    out = capfd.readouterr().out
    assert out.index(f" anybit {command}") < out.index("--help  -h")
    assert "--json" in out


def test_secrets_are_blotted_out():
    assert without_secrets("token hf_AbCdEf123 and sk-123456") == "token hf_… and sk-…"
