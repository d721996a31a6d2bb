"""Choice by measurement: buckets of M, interpolated prices, regret; held to what was measured on an H200."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anybit.cli.bench_kernels import scheme_named
from anybit.kernels.catalogue import KERNELS, kernel
from anybit.kernels.request import ANY, BUCKETS, REGIMES, Kernels, Request, priced_at, regime_of
from anybit.planning import measured
from anybit.planning.choose import Choice, MeasuredKey, Policy, choose, price_of
from anybit.planning.interpolate import Near, nearest, ratio_at
from anybit.planning.measured import Measured
from anybit.planning.regret import ALLOWED, Regret, regrets, worst
from anybit.platforms import named
from anybit.schemes import CHANNEL, ActivationSpec, Offset, ScaleLevel, Scheme, dense, group

ROOT = Path(__file__).resolve().parents[2]
RESULTS = [ROOT / "benchmarks" / "results" / "h200.json"]
H200 = named("h200")
INT4 = Scheme("int4", (ScaleLevel("bfloat16", group(128)),))
FP8 = Scheme("fp8_e4m3fn", (ScaleLevel("float32", CHANNEL),),
             activation=ActivationSpec("fp8_e4m3fn", True, "token", "fp8_token"))
SHAPE = (4096, 4096)


def asked(scheme: Scheme = INT4, shape: tuple[int, int] = SHAPE) -> Request:
    return Request("linear", scheme, shape, "bfloat16")


def chosen(measured: dict[MeasuredKey, float], scheme: Scheme = INT4, **policy: bool) -> Choice:
    found = choose(asked(scheme), H200, policy=Policy(measured=measured, **policy))
    assert isinstance(found, Choice)
    return found


def times(kernel: str, seconds: dict[int, float], shape: tuple[int, int] = SHAPE) -> dict[MeasuredKey, float]:
    return {(kernel, str(INT4), *shape, tokens): s for tokens, s in seconds.items()}


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_buckets_ascend_to_any_number_of_tokens() -> None:
    bounds = [most for most, _ in BUCKETS]
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == ANY
    assert all(priced <= most for most, priced in BUCKETS)


def test_a_bucket_lies_in_one_regime() -> None:
    first = 1
    for most, priced in BUCKETS:
        assert regime_of(first) == regime_of(most) == regime_of(priced)
        first = most + 1


@pytest.mark.parametrize(("tokens", "priced"), [(1, 1), (8, 1), (9, 16), (64, 64), (65, 96), (300, 512), (9000, 4096)])
def test_a_call_is_priced_in_its_bucket(tokens: int, priced: int) -> None:
    assert priced_at(tokens) == priced


def test_equal_neighbours_are_one_step() -> None:
    kernels = Kernels([(8, "a"), (64, "a"), (128, "b"), (ANY, "a")])
    assert kernels.steps == ((64, "a"), (128, "b"), (ANY, "a"))
    assert [kernels.at(m) for m in (1, 64, 65, 128, 129, 10**6)] == ["a", "a", "b", "b", "a", "a"]


def test_kernels_of_regimes_are_kernels_by_tokens() -> None:
    kernels = Kernels.of({"decode": "a", "small": "b", "prefill": "c"})
    assert [kernels.at(m) for m in (8, 9, 64, 65)] == ["a", "b", "b", "c"]
    assert dict(kernels) == {"decode": "a", "small": "b", "prefill": "c"}
    assert Kernels.of(kernels) is kernels


# --- the choice -------------------------------------------------------------------------------------------------------


def test_each_bucket_takes_the_kernel_that_was_fastest_there() -> None:
    fused = times("triton-fused", {1: 1e-6, 16: 1e-6, 96: 3e-6, 128: 3e-6, 192: 3e-6, 512: 9e-6})
    expand = times("triton-expand", {96: 2e-6, 128: 4e-6, 192: 2e-6, 512: 5e-6})
    names = chosen(fused | expand).names
    assert [names.at(m) for m in (96, 128, 192, 512)] == ["triton-expand", "triton-fused", "triton-expand",
                                                         "triton-expand"]


def test_a_kernel_goes_on_where_another_is_faster_by_less_than_two_measurements_differ() -> None:
    fused = times("triton-fused", {1: 1e-6, 64: 1e-6, 96: 1.01e-6, 128: 1.04e-6, 192: 1e-6})
    expand = times("triton-expand", {96: 1e-6, 128: 1e-6, 192: 0.99e-6})
    names = chosen(fused | expand).names
    assert [names.at(m) for m in (96, 128, 192)] == ["triton-fused", "triton-expand", "triton-expand"]


def test_the_kernels_of_regimes_are_those_at_the_m_that_stand_for_them() -> None:
    choice = chosen({})
    for regime, (_, priced) in REGIMES.items():
        assert choice.kernels[regime] == choice.at(priced)
        assert choice.names[regime] == choice.at(priced).spec.name


def test_one_layout_holds_all_buckets() -> None:
    for scheme in (INT4, FP8, dense("bfloat16")):
        assert len({spec.layout for _, (spec, _) in chosen({}, scheme).buckets}) == 1


def test_a_batch_invariant_choice_has_one_step_whatever_was_measured() -> None:
    fast = times("triton-expand", {192: 1e-9, 512: 1e-9, 1024: 1e-9, 4096: 1e-9})
    assert len(chosen(fast, batch_invariant=True).names.steps) == 1


def test_a_lookup_has_one_kernel() -> None:
    choice = choose(Request("embedding", INT4, SHAPE, "float32"), named("cpu"))
    assert isinstance(choice, Choice)
    assert len(choice.names.steps) == 1


# --- prices between measurements --------------------------------------------------------------------------------------


def model(shape: tuple[int, int], tokens: int) -> float:
    return shape[0] * shape[1] * 1e-12 * (1 + tokens / 256)


def test_a_kernel_that_takes_twice_its_modelled_time_does_so_on_other_shapes() -> None:
    points = {shape: {m: 2 * model(shape, m) for m in (1, 256)} for shape in ((4096, 4096), (8192, 1024))}
    for shape, tokens in (((5000, 3000), 1), ((128, 65536), 40), ((4096, 4096), 5000)):
        assert ratio_at(points, model, shape, tokens) == pytest.approx(2)


def test_the_ratio_goes_over_from_one_measured_m_to_the_next() -> None:
    points = {SHAPE: {16: model(SHAPE, 16), 256: 4 * model(SHAPE, 256)}}
    assert ratio_at(points, model, SHAPE, 64) == pytest.approx(2)  # the middle of 16 and 256
    assert ratio_at(points, model, SHAPE, 1) == pytest.approx(1)
    assert ratio_at(points, model, SHAPE, 4096) == pytest.approx(4)


def test_the_nearest_measured_shape_says_most() -> None:
    points = {(1024, 1024): {1: model((1024, 1024), 1)}, (16384, 16384): {1: 3 * model((16384, 16384), 1)}}
    small, large = ((n, n) for n in (1200, 14000))
    assert 1 <= ratio_at(points, model, small, 1) < 1.1
    assert 2.7 < ratio_at(points, model, large, 1) <= 3


def test_odd_sizes_tell_nothing_of_even_ones() -> None:
    even, odd = (4096, 4096), (4097, 4096)
    points = {even: {1: model(even, 1)}, odd: {1: 5 * model(odd, 1)}}
    assert ratio_at(points, model, (4104, 4096), 1) == pytest.approx(1)
    assert ratio_at(points, model, (4099, 4096), 1) == pytest.approx(5)
    assert ratio_at({odd: points[odd]}, model, even, 1) == pytest.approx(5)  # better than nothing


def test_a_price_says_where_it_comes_from() -> None:
    policy = Policy(measured=times("triton-fused", {1: 7e-6}))
    fused = kernel("triton-fused")
    assert price_of(fused, asked().of(1), H200, policy).source == "measured"
    assert price_of(fused, asked().of(16), H200, policy).source == "interpolated"
    assert price_of(fused, asked(shape=(4096, 8192)).of(1), H200, policy).source == "interpolated"
    assert price_of(fused, asked(FP8).of(1), H200, policy).source == "modelled"
    assert price_of(kernel("triton-matvec"), asked().of(1), H200, policy).source == "modelled"


ZERO_POINTS = Scheme("uint4", (ScaleLevel("float16", group(128)),), offset=Offset("zero_point", "uint4", group(128)))
INT8 = Scheme("int8", (ScaleLevel("float32", CHANNEL),))


def test_a_scheme_that_was_not_measured_takes_the_ratios_of_the_nearest() -> None:
    policy = Measured({("triton-fused", str(INT4), *SHAPE, "bfloat16", 1): 1.0}, schemes={str(INT4): INT4}).policy(
        "float16")
    fused = kernel("triton-fused")
    of_int4 = 1.0 / fused.seconds(asked().of(1), H200)
    price = price_of(fused, replace(asked(ZERO_POINTS), dtype="float16").of(1), H200, policy)
    assert price.source == "interpolated"
    ours = fused.seconds(replace(asked(ZERO_POINTS), dtype="float16").of(1), H200)
    assert price.seconds == pytest.approx(of_int4 * ours)


@pytest.mark.parametrize("other", [INT8, FP8, dense("bfloat16")], ids=str)
def test_a_scheme_of_other_bits_or_other_activations_is_not_near(other: Scheme) -> None:
    assert nearest([Near(INT4, "bfloat16", {SHAPE: {1: 1.0}})], other, "bfloat16") is None


def test_float32_activations_are_not_near_to_16_bits() -> None:
    assert nearest([Near(INT4, "bfloat16", {SHAPE: {1: 1.0}})], INT4, "float32") is None


def test_of_two_near_schemes_the_nearer_one_counts() -> None:
    coarse = Scheme("int4", (ScaleLevel("bfloat16", CHANNEL),))
    points = {SHAPE: {1: 1.0}}
    found = nearest([Near(coarse, "bfloat16", points), Near(INT4, "bfloat16", points)], ZERO_POINTS, "bfloat16")
    assert found is not None
    assert found.scheme == INT4


# --- regret -----------------------------------------------------------------------------------------------------------


def test_regret_is_the_share_of_time_lost_within_the_layout_and_against_others() -> None:
    slow, fast = {"triton-fused": 1.2e-3, "torch-tiled": 0.6e-3}, {"triton-fused": 1.2e-3, "triton-expand": 1e-3}
    policy = Policy(measured=times("triton-fused", dict.fromkeys((1, 16, 192, 512), 1e-9)))
    found = {r.request.tokens: r for r in regrets(asked(), H200, policy, {16: slow, 192: fast})}
    assert found[16].within == pytest.approx(0.0)
    assert found[16].against_others == pytest.approx(1.0)
    assert found[192].within == pytest.approx(0.2)
    assert found[192].against_others is None
    assert (found[16].is_allowed, found[192].is_allowed) == (True, False)
    assert worst(found.values()) == pytest.approx(0.2)
    assert found[192].to_dict()["best_of_layout"] == {"kernel": "triton-expand", "seconds": 1e-3}


def test_a_choice_that_was_not_measured_is_not_allowed() -> None:
    found = list(regrets(asked(), H200, Policy(), {1: {"triton-expand": 1e-3}}))
    assert [r.within for r in found] == [None]
    assert not found[0].is_allowed


# --- what was measured on an H200 -------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """The committed measurement; of a cell that stands in both files the later one counts."""
    found = [row for path in RESULTS for row in json.loads(path.read_text())["rows"] if not row["fault"]]
    return list({(row["name"], *row["shape"], row["tokens"], row["kernel"]): row for row in found}.values())


def layers() -> Iterator[tuple[Request, dict[int, dict[str, float]]]]:
    """Every measured layer with its times."""
    found: dict[tuple[str, int, int], dict[int, dict[str, float]]] = {}
    for row in rows():
        by_tokens = found.setdefault((row["name"], *row["shape"]), {})
        by_tokens.setdefault(row["tokens"], {})[row["kernel"]] = row["seconds"]
    for (name, n, k), by_tokens in found.items():
        scheme = scheme_named(name, (n, k))
        assert scheme is not None
        yield asked(scheme, (n, k)), by_tokens


def all_regrets(without_own_shape: bool = False) -> list[Regret]:
    known = measured.read(H200).prices("bfloat16")
    found: list[Regret] = []
    for request, by_tokens in layers():
        used = {cell: s for cell, s in known.items() if not without_own_shape or cell[2:4] != request.shape}
        found += regrets(request, H200, Policy(measured=used), by_tokens)
    return found


def said(found: list[Regret]) -> list[str]:
    return [f"{r.request.scheme} {r.request.shape} M = {r.request.tokens}: {r.chosen[0]} {r.within}, {r.best[0]} is best"
            for r in found if not r.is_allowed]


def test_the_choice_is_within_5_percent_of_the_best_of_its_layout_in_every_measured_cell() -> None:
    found = all_regrets()
    assert ALLOWED == 0.05
    # in the others no kernel of the chosen layout was timed
    assert len(found) >= 0.95 * len({(row["scheme"], *row["shape"], row["tokens"]) for row in rows()})
    judged = [regret for regret in found if regret.within is not None]
    assert len(judged) >= 0.9 * len(found)  # in the others the kernel that it takes was not timed
    assert said(judged) == []


def test_a_shape_that_was_not_measured_loses_little(capsys: pytest.CaptureFixture[str]) -> None:
    """Each shape chosen for by the others alone: the median loses nothing."""
    found = all_regrets(without_own_shape=True)
    lost = [r.within for r in found if r.within is not None]
    assert len(lost) >= 0.9 * len(found)  # in the others the kernel that it takes was not timed there
    with capsys.disabled():
        print(f"\n  a shape left out: median {statistics.median(lost):.1%}, worst {max(lost):.1%} of the best's time lost, "
              f"over 5 % in {sum(share > ALLOWED for share in lost)} of {len(lost)} cells")
    assert statistics.median(lost) <= 0.01
    assert sum(share > ALLOWED for share in lost) <= 0.1 * len(lost)


def test_interpolated_prices_are_nearer_to_the_clock_than_modelled_ones() -> None:
    known = measured.read(H200).prices("bfloat16")
    off: dict[str, list[float]] = {"interpolated": [], "modelled": []}
    for request, by_tokens in layers():
        others = {cell: s for cell, s in known.items() if cell[2:4] != request.shape}
        for tokens, kernels in by_tokens.items():
            for name, seconds in kernels.items():
                for policy in (Policy(measured=others), Policy()):
                    price = price_of(kernel(name), request.of(tokens), H200, policy)
                    off[price.source].append(abs(price.seconds / seconds - 1))
    assert len(off["interpolated"]) == len(off["modelled"])
    assert statistics.median(off["interpolated"]) < 0.9 * statistics.median(off["modelled"])


def test_the_shipped_priors_are_those_of_the_committed_measurement() -> None:
    known = measured.read(H200).seconds
    for row in rows():
        cell = (row["kernel"], row["scheme"], *row["shape"], row["dtype"], row["tokens"])
        assert known[cell] == pytest.approx(row["seconds"], rel=1e-3)


def test_every_kernel_of_the_committed_measurement_exists() -> None:
    assert {row["kernel"] for row in rows()} <= {spec.name for spec in KERNELS}
