"""run, chat and eval, on a tiny model of random weights and on the demo model."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from anybit.cli import main
from cli.tiny_model import tiny_model, write_tiny_llama  # noqa: F401 - a fixture
from conftest import SMOLLM2, needs_smollm2


@pytest.fixture
def typed(monkeypatch):
    """What a pipe hands to stdin."""

    def give(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return give


def environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def test_run_json_tells_text_plan_memory_and_speeds(tiny, capfd):
    assert main.main(["run", str(tiny), "hello", "--max-new-tokens", "5", "--json"]) == 0
    out, err = capfd.readouterr()
    told = json.loads(out)
    assert err == ""
    assert told["kind"] == "run"
    assert told["stats"]["new_tokens"] <= 5
    assert told["stats"]["prompt_tokens"] == len("<>user\nhello<>\n<>assistant\n") - 3  # each <> is one special token
    assert told["plan"]["kernels"]
    assert told["loading"]["held_bytes"] >= 0


def test_text_goes_to_stdout_and_all_else_to_stderr(tiny, capfd):
    words = ["run", str(tiny), "--prompt", "hello", "--max-new-tokens", "4", "--seed", "1", "--temperature", "1"]
    assert main.main([*words, "--json"]) == 0
    text = json.loads(capfd.readouterr().out)["text"]
    assert main.main(words) == 0
    out, err = capfd.readouterr()
    assert out == text + "\n"
    for label in ("declared", "executed", "kernels", "memory", "tokens/s", "peak memory"):
        assert label in err
    assert main.main([*words, "--quiet", "--no-stream"]) == 0
    assert capfd.readouterr() == (text + "\n", "")


def test_the_prompt_comes_from_stdin(tiny, typed, capfd):
    typed(b"hello")
    assert main.main(["run", str(tiny), "--max-new-tokens", "2", "-q"]) == 0
    piped = capfd.readouterr().out
    assert main.main(["run", str(tiny), "hello", "--max-new-tokens", "2", "-q"]) == 0
    assert capfd.readouterr().out == piped


def test_a_prompt_that_is_no_utf8_is_taken_and_said(tiny, typed, capfd):  # CL08
    typed(b"a\xffb\0")
    assert main.main(["run", str(tiny), "--max-new-tokens", "1"]) == 0
    assert "warning: the prompt is no UTF-8 at byte 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["", ], "the prompt is empty"),
        (["a", "--prompt", "b"], "two prompts"),
        (["a", "--device", "cuda"], "no GPU answers to 'cuda'"),
        (["a", "--dtype", "int8"], "no such dtype: 'int8'"),
        (["a", "--quantization", "int5"], "no such quantization: 'int5'"),
        (["a", "--quantization", "nvfp4", "--kernel", "magic"], "no kernel is called 'magic'"),
        (["x" * 300], "the prompt is longer than the model's context"),
    ],
)
def test_what_run_refuses(words, said, tiny, capfd):
    if said.startswith("no GPU"):
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    assert main.main(["run", str(tiny), *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_a_folder_without_tokenizer_is_refused_by_run_with_the_reason(tmp_path, capfd):
    folder = write_tiny_llama(tmp_path / "m", tokenizer=False)
    assert main.main(["run", str(folder), "hello"]) == 2
    assert "this folder has no tokenizer" in capfd.readouterr().err


def test_a_model_without_template_is_run_raw_only(tmp_path, capfd):
    folder = write_tiny_llama(tmp_path / "m", template=None)
    assert main.main(["run", str(folder), "hello"]) == 2
    assert "no chat template" in capfd.readouterr().err
    assert main.main(["run", str(folder), "hello", "--raw", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["stats"]["prompt_tokens"] == len("hello")


def test_quantization_while_loading_is_said(tiny, capfd):
    assert main.main(["run", str(tiny), "hello", "--quantization", "nvfp4", "--max-new-tokens", "2"]) == 0
    err = capfd.readouterr().err
    assert "other arithmetic than the checkpoint declares, as asked: --quantization nvfp4" in err
    assert "fp4_e2m1 weights × fp4_e2m1 activations" in err


def test_chat_from_a_pipe_takes_a_line_as_a_turn_and_reuses_the_cache(tiny, typed, capfd):
    typed(b"one\n\ntwo\n/reset\nthree\n/exit\nnever\n")
    assert main.main(["chat", str(tiny), "--max-new-tokens", "3", "--json"]) == 0
    out, err = capfd.readouterr()
    turns = [json.loads(line) for line in out.splitlines()]
    assert err == ""
    assert [turn["user"] for turn in turns] == ["one", "two", "three"]
    assert [turn["stats"]["cached_tokens"] > 0 for turn in turns] == [False, True, False]


def test_chat_on_a_pipe_prints_answers_only_on_stdout(tiny, typed, capfd):
    typed(b"one\n/stats\n")
    assert main.main(["chat", str(tiny), "--max-new-tokens", "3"]) == 0
    out, err = capfd.readouterr()
    assert ">" not in out.replace("\ufffd", "")[:1]
    assert "tokens/s" in err


def test_eval_compares_quantizations_in_one_table(tiny, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    words = ["eval", str(tiny), "--text", str(text), "--window", "64", "--limit-windows", "2", "--quantization",
             "none,int8_per_channel"]
    assert main.main([*words, "--json"]) == 0
    results = json.loads(capfd.readouterr().out)["results"]
    assert [r["quantization"] for r in results] == ["none", "int8_per_channel"]
    assert [r["tokens"] for r in results] == [126, 126]
    assert results[0]["text_bytes"] == 126  # one byte a token
    assert results[0]["bits_per_weight"] == 16
    assert 8 < results[1]["bits_per_weight"] < 12.5
    assert results[1]["bits_per_byte"] == pytest.approx(results[0]["bits_per_byte"], rel=0.01)
    assert main.main([*words, "-q"]) == 0
    assert capfd.readouterr().out.splitlines()[0].split()[0] == "quantization"


def test_eval_refuses_a_missing_or_short_text(tiny, tmp_path, capfd):
    assert main.main(["eval", str(tiny), "--text", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: no such file or directory" in capfd.readouterr().err
    (tmp_path / "short.txt").write_text("short")
    assert main.main(["eval", str(tiny), "--text", str(tmp_path / "short.txt")]) == 2
    assert "the text is shorter than one window" in capfd.readouterr().err


def test_ctrl_c_while_generating_ends_with_130_and_no_traceback(tiny):  # CL09
    words = [sys.executable, "-m", "anybit", "run", str(tiny), "hello", "--raw", "--max-new-tokens", "200", "--temperature", "9"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    running.stdout.read(1)  # the first character of the answer
    started = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    if running.returncode == 0:
        pytest.skip("the answer was complete before the signal came")
    assert running.returncode == 130
    assert b"Traceback" not in err
    assert time.monotonic() - started < 20  # 2 s on an idle machine


@needs_smollm2
def test_the_demo_model_answers(capfd):
    words = ["run", str(SMOLLM2), "What is the capital of France?", "--dtype", "float32"]
    assert main.main(words) == 0
    out, err = capfd.readouterr()
    assert out == "The capital of France is Paris.\n"
    assert "uint4·g32·fp16·min" in err


@needs_smollm2
def test_a_conversation_with_the_demo_model_remembers(typed, capfd):
    typed(b"What is the capital of France?\nAnd of Italy?\n")
    assert main.main(["chat", str(SMOLLM2), "-q"]) == 0
    assert capfd.readouterr().out == "The capital of France is Paris.\nThe capital of Italy is Rome.\n"
