"""prove, tune, bench and fit: what they find, keep and tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import anybit
from anybit.cli import main
from anybit.kernels.linear.planes_native import StoredPlanes
from anybit.kernels.linear.tiled_torch import StoredCanonical
from anybit.planning import measured
from anybit.platforms import detect
from cli.test_inspecting import WITHOUT_TORCH, command
from cli.tiny_model import tiny_model, write_tiny_llama  # noqa: F401 - a fixture

QUANTIZED = ["--device", "cpu", "--quantization", "int4_g32_asym"]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANYBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def told(capfd: Any) -> dict[str, Any]:
    out, _ = capfd.readouterr()
    return json.loads(out)["data"] if "data" in json.loads(out) else json.loads(out)


def test_every_kernel_of_the_plan_is_right_here(tiny: Path, capfd: Any) -> None:
    assert main.main(["prove", str(tiny), *QUANTIZED, "--json"]) == 0
    document = told(capfd)
    assert document["ok"]
    assert document["disqualified"] == []
    proofs = document["proofs"]
    assert {p["kind"] for p in proofs} == {"linear", "embedding"}
    assert all(p["error_over_bound"] <= 1 and p["ok"] for p in proofs)
    planned = {step["name"] for layer in document["kernels_now"].values() for step in layer}
    assert {p["kernel"] for p in proofs} == planned


def test_a_wrong_kernel_is_named_disqualified_and_routed_around(
    tiny: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = anybit.plan(str(tiny), detect("cpu"), quantization="int4_g32_asym")
    name = next(u for u in before.units if u.kind == "linear" and u.scheme.is_quantized).kernel("prefill")
    right = StoredPlanes.linear if name.startswith("native") else StoredCanonical.linear
    owner = StoredPlanes if name.startswith("native") else StoredCanonical

    def wrong(self: Any, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        y = right(self, x, *rest, **named)
        if x.shape[0] > 64:
            y[:, 0] = y[:, 0] * 1.05 + 0.01
        return y

    monkeypatch.setattr(owner, "linear", wrong)
    assert main.main(["prove", str(tiny), *QUANTIZED]) == 1
    out, err = capfd.readouterr()
    assert "WRONG" in out
    assert name in out
    assert f"{name} is wrong on" in err
    after = anybit.plan(str(tiny), detect("cpu"), quantization="int4_g32_asym")
    kernels = {u.kernel(r) for u in after.units if u.scheme.is_quantized for r in u.choice.kernels}
    assert name not in kernels
    refusals = [r for u in after.units if u.scheme.is_quantized for r in u.choice.refused if r.kernel == name]
    assert any(reason.code == "disproved" for r in refusals for reason in r.reasons)

    monkeypatch.setattr(owner, "linear", right)
    assert main.main(["prove", str(tiny), *QUANTIZED, "--forget"]) == 0
    mended = anybit.plan(str(tiny), detect("cpu"), quantization="int4_g32_asym")
    assert name in {u.kernel(r) for u in mended.units for r in u.choice.kernels}


def test_a_kernel_that_raises_is_named_with_what_it_said(
    tiny: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, *_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(StoredPlanes, "linear", broken)
    monkeypatch.setattr(StoredCanonical, "linear", broken)
    assert main.main(["prove", str(tiny), *QUANTIZED, "--json"]) == 1
    document = told(capfd)
    assert {p["fault"] for p in document["proofs"] if not p["ok"]} == {"RuntimeError: illegal instruction"}
    assert len(document["without_kernel"]) > 0  # both families that could run them are wrong here
    assert main.main(["prove", str(tiny), *QUANTIZED]) == 2
    _, err = capfd.readouterr()
    assert "anybit prove MODEL --forget" in err


def test_a_store_that_cannot_be_written_does_not_hide_a_wrong_kernel(
    tiny: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = StoredPlanes.linear
    monkeypatch.setattr(StoredPlanes, "linear", lambda self, *rest, **named: 1.01 * right(self, *rest, **named))
    monkeypatch.setenv("ANYBIT_CACHE", "/dev/null/nowhere")
    assert main.main(["prove", str(tiny), *QUANTIZED]) == 1
    out, err = capfd.readouterr()
    assert "WRONG" in out
    assert "cannot be kept" in err
    assert "ANYBIT_CACHE" in err


def test_measured_times_are_kept_and_planned_with(tiny: Path, capfd: Any) -> None:
    assert main.main(["tune", str(tiny), "--device", "cpu", "--json"]) == 0
    timings = told(capfd)["timings"]
    assert {t["tokens"] for t in timings} == {1, 16, 64, 512}
    assert all(t["seconds"] > 0 and not t["fault"] for t in timings)
    plan = anybit.plan(str(tiny), detect("cpu"), dtype="float32")
    prices = [c.price for u in plan.units if u.kind == "linear" for c in u.choice.kernels.values()]
    assert prices
    assert all(price.is_measured for price in prices)


def test_what_is_tuned_is_chosen_from_within_5_percent_of_the_best_of_the_layout(capfd: Any) -> None:
    assert main.main(["tune", "512x768:int4_g128", "--device", "cpu", "--tokens", "1,16,64", "--json"]) == 0
    document = told(capfd)
    assert document["is_kept"]
    assert {row["tokens"] for row in document["choices"]} == {1, 16, 64}
    assert document["worst_regret"] <= 0.05
    for row in document["choices"]:
        assert row["best_of_layout"]["seconds"] <= row["chosen"]["seconds"]


def test_a_check_fails_where_the_plan_does_not_take_the_best_of_its_layout_and_keeps_nothing(capfd: Any) -> None:
    here = detect("cpu")
    words = ["tune", "768x1024:int4_g128", "--device", "cpu", "--tokens", "1", "--check", "--json"]
    scheme = "int4·g128·bf16"
    lie = {("native-expand", scheme, 768, 1024, "float32", 1): 1e-9}  # slow at one token, said to be fast
    measured.write(here, measured.Measured(dict(lie)))
    assert main.main(words) == 1
    document = told(capfd)
    [choice] = document["choices"]
    assert choice["chosen"]["kernel"] == "native-expand"
    assert choice["best_of_layout"]["kernel"] == "native-matvec"
    assert choice["regret"] > 0.05
    assert not document["is_kept"]
    assert measured.read(here).seconds == lie


def test_shapes_can_be_measured_without_a_model(capfd: Any) -> None:
    assert main.main(["tune", "96x256:nvfp4", "--device", "cpu"]) == 0
    out, _ = capfd.readouterr()
    assert "kept in" in out
    assert any("nvfp4" in cell[1] for cell in measured.read(detect("cpu")).seconds)


@pytest.mark.parametrize("words", [["0x5:nvfp4"], ["96x256:nothing"], ["96x256:"]])
def test_shapes_that_are_none_are_refused(words: list[str], capfd: Any) -> None:
    assert main.main(["tune", *words, "--device", "cpu"]) == 2
    _, err = capfd.readouterr()
    assert "Traceback" not in err


def test_a_damaged_store_is_ignored_and_said(tiny: Path, capfd: Any, store: Path) -> None:
    assert main.main(["tune", "96x256:nvfp4", "--device", "cpu"]) == 0
    path = measured.path_of(detect("cpu"))
    path.write_text("{]")
    capfd.readouterr()
    assert main.main(["prove", str(tiny), *QUANTIZED]) == 0
    _, err = capfd.readouterr()
    assert str(path) in err.replace("\n", "")


def test_bench_prints_a_line_a_shape_after_its_correctness(capfd: Any, tmp_path: Path) -> None:
    words = ["bench", "kernels", "--device", "cpu", "--shapes", "256x96", "--tokens", "1,40", "--schemes", "int4_g128",
             "--write", str(tmp_path / "r.json"), "--json"]
    assert main.main(words) == 0
    document = told(capfd)
    assert {row["tokens"] for row in document["rows"]} == {1, 40}
    for row in document["rows"]:
        assert row["fault"] == ""
        assert row["error_over_bound"] <= 1
        assert row["times_unquantized"] > 0
        assert row["shape"] == [96, 256]
    assert json.loads((tmp_path / "r.json").read_text())["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("words", [["--shapes", "12"], ["--tokens", "few"], ["--schemes", "nothing"]])
def test_bench_refuses_what_it_cannot_measure(words: list[str], capfd: Any) -> None:
    assert main.main(["bench", "kernels", "--device", "cpu", *words]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_random_shapes_are_those_of_their_seed_and_ragged() -> None:
    from anybit.cli.bench_kernels import random_shapes

    assert random_shapes(4, 7) == random_shapes(4, 7) != random_shapes(4, 8)
    assert all(k % 128 == 0 and 512 < n < 20_000 and 512 < k < 20_000 for n, k in random_shapes(20, 1))
    assert {n % 2 for n, _ in random_shapes(4, 7)} == {0, 1}


def test_bench_times_a_kernel_and_the_unquantized_product_in_turn(capfd: Any) -> None:
    words = ["bench", "kernels", "--device", "cpu", "--shapes", "256x96,250x96", "--tokens", "3", "--schemes",
             "int4_g128,int8_per_channel", "--kernel", "native-matvec,torch-tiled", "--json"]
    assert main.main(words) == 0
    document = told(capfd)
    names = {(row["name"], row["shape"][1]) for row in document["rows"]}
    assert names == {(name, k) for name in ("int4_g128", "int8_per_channel") for k in (256, 250)}
    for row in document["rows"]:
        assert row["unquantized_seconds"] > 0
        assert row["times_unquantized"] > 0
        assert row["spread"] >= 0


def test_a_plan_is_proved_as_it_was_written(tiny: Path, capfd: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    made = anybit.plan(str(tiny), detect("cpu"), dtype="float32", quantization="int4_g32_asym", kernel="torch-tiled")
    plan.write_text(json.dumps(made.to_dict()))
    assert main.main(["prove", str(tiny), "--device", "cpu", "--plan", str(plan), "--json"]) == 0
    proofs = told(capfd)["proofs"]
    quantized = {p["kernel"] for p in proofs if p["kind"] == "linear" and p["scheme"].startswith("uint4")}
    assert quantized == {"torch-tiled"}


def test_batch_invariant_kernels_are_proved_as_they_are_pinned(
    tiny: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    found = StoredPlanes.__init__

    def seeing(self: Any, *rest: Any, pinned: bool = False, **named: Any) -> None:
        seen.append(pinned)
        found(self, *rest, pinned=pinned, **named)

    monkeypatch.setattr(StoredPlanes, "__init__", seeing)
    assert main.main(["prove", str(tiny), *QUANTIZED, "--batch-invariant", "--json"]) == 0
    document = told(capfd)
    assert all(len(steps) == 1 for steps in document["kernels_now"].values())
    assert seen
    assert all(seen)


def test_a_strict_proof_refuses_what_a_strict_run_would(tiny: Path, capfd: Any) -> None:
    assert main.main(["prove", str(tiny), *QUANTIZED, "--strict"]) == 2
    assert "changes the arithmetic" in capfd.readouterr().err


def test_fit_prices_the_kernels_that_are_asked_for(tiny: Path, capfd: Any) -> None:
    speeds = []
    for words in ([], ["--kernel", "linear=torch-tiled"]):
        assert main.main(["fit", str(tiny), "--on", "cpu", "--quantization", "int4_g32_asym", "--json", *words]) == 0
        [answer] = told(capfd)["answers"]
        speeds.append(answer["decode_tokens_per_second"])
    assert speeds[1] < speeds[0]


def test_fit_quantizes_only_what_is_named(tiny: Path, capfd: Any) -> None:
    needed = []
    for words in ([], ["--quantize-only", "re:.*down_proj"]):
        assert main.main(["fit", str(tiny), "--on", "cpu", "--quantization", "int4_g32_asym", "--json", *words]) == 0
        [answer] = told(capfd)["answers"]
        needed.append(answer["needed_bytes"])
    assert needed[1] > needed[0]


def test_fit_answers_from_headers_without_torch(tiny: Path) -> None:
    said = command("-c", WITHOUT_TORCH, "fit", str(tiny), "--on", "rtx4090,mi300x", "--context", "64")
    assert said.stderr.endswith("code 0 heavy []")
    assert "on rtx4090 (sm_89): fits" in said.stdout
    assert "on mi300x (gfx942): fits" in said.stdout


def test_fit_as_data_names_its_assumptions(tiny: Path, capfd: Any) -> None:
    assert main.main(["fit", str(tiny), "--on", "h100", "--batch", "3", "--json"]) == 0
    [answer] = told(capfd)["answers"]
    assert answer["fits"]
    assert answer["batch"] == 3
    assert answer["assumptions"]
    assert {row["size"] for row in answer["tensor_parallel"]} == {2, 4, 8, 16}


@pytest.mark.filterwarnings("ignore")
def test_decoding_with_a_model_of_random_weights_is_timed(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.hosts import benching

    tiny_sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 320}
    monkeypatch.setitem(benching.CONFIGS, "llama-1b", tiny_sizes)
    words = ["bench", "model", "--device", "cpu", "--config", "llama-1b", "--schemes", "none,int4_g32_asym", "--json"]
    assert main.main(words) == 0
    plain, packed = told(capfd)["rows"]
    assert packed["weight_bytes"] < plain["weight_bytes"]
    assert all(row["tokens_per_second"] > 0 and row["predicted_tokens_per_second"] > 0 for row in (plain, packed))
    assert main.main(["bench", "model", "--config", "llama-9000b", "--device", "cpu"]) == 2


@pytest.mark.parametrize("name", ["fit", "explain"])
def test_commas_alone_name_no_platform(name: str, tiny: Path, capfd: Any) -> None:
    assert main.main([name, str(tiny), "--on", ","]) == 2
    _, err = capfd.readouterr()
    assert "--on names no platform" in err
