"""inspect, explain and doctor: from headers alone, without torch."""

import json
import os
import subprocess
import sys

import pytest

from anybit.cli import doctor, main
from cli.tiny_model import tiny_model, write_tiny_llama  # noqa: F401 - a fixture
from conftest import SMOLLM2, needs_smollm2

WITHOUT_TORCH = (
    "import sys; from anybit.cli.main import main; code = main(sys.argv[1:]); "
    "heavy = [m for m in ('torch', 'transformers', 'numpy', 'gguf') if m in sys.modules]; "
    "sys.stderr.write(f'code {code} heavy {heavy}')"
)


def command(*words, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **options.pop("env", {})}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=120,
                          check=False, **options)


@pytest.mark.parametrize("name", ["inspect", "explain"])
def test_no_torch_is_imported(name, tiny):
    assert command("-c", WITHOUT_TORCH, name, str(tiny)).stderr.endswith("code 0 heavy []")


@needs_smollm2
@pytest.mark.parametrize("name", ["inspect", "explain"])
def test_no_torch_is_imported_for_gguf(name):
    assert command("-c", WITHOUT_TORCH, name, str(SMOLLM2)).stderr.endswith("code 0 heavy []")


def test_inspect_folds_repeated_layers(tiny, capfd):
    assert main.main(["inspect", str(tiny)]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    head, first, *_ = out.splitlines()
    assert f"{tiny} · plain · llama · 1 file, 23" in head
    assert first.split() == ["15", "bf16", "q", "k", "v", "o", "gate", "up", "down", "lm_head", "16.00", "bits", "a",
                             "weight", "196.9", "kB"]  # (2 * (4 * 64 * 64 + 3 * 64 * 128) + 258 * 64) * 2 bytes
    assert "activations    not quantized\n" in out


def test_inspect_layers_has_a_line_for_each(tiny, capfd):
    assert main.main(["inspect", str(tiny), "--layers"]) == 0
    assert "  model.layers.1.mlp.down_proj     linear     64 x 128  bf16  16.4 kB\n" in capfd.readouterr().out


def test_inspect_json_has_stable_keys(tiny, capfd):
    assert main.main(["inspect", str(tiny), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["version"] == 1
    assert told["kind"] == "inspect"
    assert told["dialect"] == "plain"
    assert told["bits_per_weight"] == {"quantized_layers": 0.0, "all": 16.0}
    assert sum(s["count"] for s in told["schemes"]) == len(told["layers"]) == 16


def test_inspect_says_that_code_is_not_run(tmp_path, capfd):
    folder = write_tiny_llama(tmp_path / "m")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    assert main.main(["inspect", str(folder)]) == 0
    assert "modeling_evil.py" in capfd.readouterr().out


@needs_smollm2
def test_inspect_of_the_demo_model(capfd):
    assert main.main(["inspect", str(SMOLLM2)]) == 0
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert "210 uint4·g32·fp16·min q k v o gate up down 5.00 bits a weight 66.4 MB" in lines
    assert "1 int8·g32·fp16 embed_tokens 8.50 bits a weight 30.1 MB" in lines
    assert "bits a weight 5.74 in quantized layers, 5.74 in all" in lines
    assert "weights 134,515,008" in lines


def test_explain_shows_kernels_arithmetic_refusals_and_memory(tiny, capfd):
    assert main.main(["explain", str(tiny), "--on", "cpu", "--quantization", "nvfp4"]) == 0
    out = capfd.readouterr().out
    for word in ("decode", "prefill", "declared", "executed", "refused", "memory", "--quantization makes it nvfp4"):
        assert word in out


def test_explain_takes_several_platforms(tiny, capfd):
    assert main.main(["explain", str(tiny), "--on", "cpu, cpu-avx512", "--json"]) == 0
    plans = json.loads(capfd.readouterr().out)["plans"]
    assert [plan["platform"]["name"] for plan in plans] == ["cpu", "cpu-avx512"]


def test_explain_of_an_unknown_platform_lists_the_known(tiny, capfd):
    assert main.main(["explain", str(tiny), "--on", "mi300"]) == 2
    assert "perhaps mi300x" in capfd.readouterr().err


def test_explain_json_is_the_plan(tiny, capfd):
    assert main.main(["explain", str(tiny), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["kind"] == "explain"
    assert {"layers", "kernel", "refused", "executed", "declared"} <= set(told["units"][0])


def test_a_name_that_is_nothing_is_refused_with_the_near_ones(tmp_path, capfd):
    write_tiny_llama(tmp_path / "qwen")
    assert main.main(["inspect", str(tmp_path / "qwem")]) == 2
    err = capfd.readouterr().err
    assert "no such model" in err
    assert "qwen" in err


def test_a_path_with_odd_characters_is_shown_escaped(tmp_path, capfd):  # CL12
    folder = write_tiny_llama(tmp_path / "a\nb\x1b[2J")
    assert main.main(["inspect", str(folder)]) == 0
    out = capfd.readouterr().out
    assert "a\\nb\\x1b[2J" in out
    assert "\x1b" not in out


def test_a_closed_pipe_is_exit_0_in_silence(tiny):  # CL10
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for words in (["inspect", str(tiny), "--layers"], ["inspect", str(tiny), "--json"], ["explain", str(tiny)]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, "-m", "anybit", *words], stdout=writer, stderr=subprocess.PIPE,
                              env=environment, timeout=60, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, b"")


def test_no_escape_sequences_on_a_pipe(tiny):
    done = command("-m", "anybit", "inspect", str(tiny), env={"TERM": "xterm-256color"})
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("setting", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_it_is_unwanted(setting, tiny):  # CL10
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path), **setting}
    done = subprocess.run([sys.executable, "-m", "anybit", "inspect", str(tiny)], stdout=theirs, stderr=theirs,
                          stdin=subprocess.DEVNULL, env=environment, timeout=60, check=False)
    os.close(theirs)
    told = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "\x1b[3" not in told


def test_doctor_lists_versions_and_remedies(capfd):
    code = main.main(["doctor", "--json"])
    told = json.loads(capfd.readouterr().out)
    assert code == (0 if told["healthy"] else 1)
    checks = {check["name"]: check for check in told["checks"]}
    assert checks["torch"]["state"] == "ok"
    assert {"python", "compiled kernels", "C compiler", "GPU", "demo model", "cache folder", "triton"} <= set(checks)
    assert all(check["remedy"] for check in told["checks"] if check["state"] == "missing")


def test_doctor_without_torch_is_exit_1_with_the_command_that_mends_it(monkeypatch, capfd):
    def absent(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert main.main(["doctor"]) == 1
    out = capfd.readouterr().out
    assert "MISSING  torch" in out
    assert "do: pip install 'torch>=2.9'" in out
