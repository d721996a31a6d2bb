"""A kernel that cannot be made for a weight gives way to the next best, once, aloud, and not where it was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import anybit
from anybit.errors import DeviceProblem, Unsupported
from anybit.hosts import preparing
from anybit.hosts.filling import Filler
from anybit.hosts.preparing import Preparing
from anybit.kernels.request import Request
from anybit.kernels.trials import sample_weight
from anybit.planning.choose import Choice, Policy, choose
from anybit.platforms import named
from anybit.schemes import ScaleLevel, Scheme, group

TRIMMED = Path(__file__).parent.parent / "checkpoints" / "trimmed" / "checkpoints"
INT4 = Scheme("int4", (ScaleLevel("bfloat16", group(128)),))
ASKED = Request("linear", INT4, (256, 512), "bfloat16")
WEIGHT = sample_weight(INT4, (256, 512))


def plan(*kernels: str, **policy: Any) -> Any:
    platform = replace(named("h200"), providers=frozenset({"torch", "triton", "humming"}))
    return SimpleNamespace(platform=platform, policy=Policy(**policy), kernels=kernels)


def preparing_of(made: Any) -> Preparing:
    return Preparing(made.platform, made.policy, torch.bfloat16, is_named=bool(made.kernels))


def first(made: Any) -> Choice:
    found = choose(ASKED, made.platform, policy=made.policy, override="humming")
    assert isinstance(found, Choice) and found.layout == "humming"
    return found


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], list[str]]:
    """Kernels of layout humming raise what is given; the others answer with their layout's name."""

    def arrange(error: Exception) -> list[str]:
        seen: list[str] = []

        def implementation(spec: Any) -> Any:
            def prepare(*given: Any, **more: Any) -> str:
                seen.append(spec.layout)
                if spec.layout == "humming":
                    raise error
                return str(spec.layout)

            return SimpleNamespace(prepare=prepare)

        monkeypatch.setattr(preparing, "implementation", implementation)
        return seen

    return arrange


def test_the_next_best_layout_takes_over_and_says_so(tried: Any) -> None:
    seen = tried(DeviceProblem("kernels do not build", found="nvcc: not found"))
    made = plan()
    with pytest.warns(UserWarning, match=r"humming is left out for int4.* \(nvcc: not found\)"):
        stored, choice = preparing_of(made)(first(made), WEIGHT, ASKED)
    assert stored == choice.layout == "triton-planes"
    assert seen == ["humming", "triton-planes"]


def test_a_fault_of_the_device_is_met_once(tried: Any) -> None:
    seen = tried(DeviceProblem("kernels do not build"))
    made = plan()
    prepare = preparing_of(made)
    with pytest.warns(UserWarning, match="humming"):
        prepare(first(made), WEIGHT, ASKED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(first(made), WEIGHT, ASKED)
    assert seen == ["humming", "triton-planes", "triton-planes"]


def test_values_of_one_weight_say_nothing_of_the_next(tried: Any) -> None:
    seen = tried(Unsupported("its arithmetic does not hold this weight"))
    made = plan()
    prepare = preparing_of(made)
    for _ in range(2):
        with pytest.warns(UserWarning, match="humming"):
            prepare(first(made), WEIGHT, ASKED)
    assert seen == ["humming", "triton-planes"] * 2


def test_a_kernel_that_was_asked_for_fails_with_its_own_error(tried: Any) -> None:
    seen = tried(DeviceProblem("kernels do not build"))
    made = plan("linear=humming")
    with pytest.raises(DeviceProblem, match="do not build"):
        preparing_of(made)(first(made), WEIGHT, ASKED)
    assert seen == ["humming"]


def test_a_strict_plan_stays_strict(tried: Any) -> None:
    tried(DeviceProblem("kernels do not build"))
    made = plan(strict=True)
    choice = first(plan())
    with pytest.warns(UserWarning, match="humming"):
        preparing_of(made)(choice, WEIGHT, ASKED)
    found = choose(ASKED, made.platform, policy=made.policy)
    assert isinstance(found, Choice) and "triton-expand" not in found.names.values()


def test_a_single_layer_takes_the_next_best_too_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 128)
    usual = anybit.linear(weight, "int4_g32", dtype=torch.float32)
    real = preparing.implementation

    def without_it(spec: Any) -> Any:
        if spec.layout != usual.choice.layout:
            return real(spec)
        raise DeviceProblem("kernels do not build")

    monkeypatch.setattr(preparing, "implementation", without_it)
    with pytest.warns(UserWarning, match="is left out for int4"):
        made = anybit.linear(weight, "int4_g32", dtype=torch.float32)
    assert made.choice.layout != usual.choice.layout
    x = torch.randn(3, 128)
    # both add 128 products in float32, in different orders
    assert torch.allclose(made(x), usual(x), rtol=0, atol=2 * 128 * 2.0**-24 * float((x.abs() @ weight.abs().T).max()))


def test_a_replayed_plan_gives_way_to_nothing() -> None:
    folder = next(p for p in sorted(TRIMMED.iterdir()) if p.is_dir())
    checkpoint = anybit.open(folder)
    made = anybit.plan(checkpoint, named("cpu"), dtype="float32")
    again = anybit.plan(checkpoint, named("cpu"), plan=made)

    def filler(followed: Any) -> Filler:
        return Filler(torch.nn.Module(), checkpoint, followed, None, torch.float32, torch.device)  # type: ignore[arg-type]

    assert not filler(made)._preparing.is_named
    assert filler(again)._preparing.is_named
