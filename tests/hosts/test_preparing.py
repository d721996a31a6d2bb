"""A kernel that cannot be made for a weight gives way to the next best, once, aloud, and not where it was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anybit.errors import DeviceProblem, Unsupported
from anybit.hosts import preparing
from anybit.hosts.preparing import Preparing
from anybit.kernels.request import Request
from anybit.kernels.trials import sample_weight
from anybit.planning.choose import Choice, Policy, choose
from anybit.platforms import named
from anybit.schemes import ScaleLevel, Scheme, group

INT4 = Scheme("int4", (ScaleLevel("bfloat16", group(128)),))
ASKED = Request("linear", INT4, (256, 512), "bfloat16")
WEIGHT = sample_weight(INT4, (256, 512))


def plan(*kernels: str, **policy: Any) -> Any:
    platform = replace(named("h200"), providers=frozenset({"torch", "triton", "humming"}))
    return SimpleNamespace(platform=platform, policy=Policy(**policy), kernels=kernels)


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
        assert Preparing(made, torch.bfloat16)(first(made), WEIGHT, ASKED) == "triton-planes"
    assert seen == ["humming", "triton-planes"]


def test_a_fault_of_the_device_is_met_once(tried: Any) -> None:
    seen = tried(DeviceProblem("kernels do not build"))
    made = plan()
    prepare = Preparing(made, torch.bfloat16)
    with pytest.warns(UserWarning, match="humming"):
        prepare(first(made), WEIGHT, ASKED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(first(made), WEIGHT, ASKED)
    assert seen == ["humming", "triton-planes", "triton-planes"]


def test_values_of_one_weight_say_nothing_of_the_next(tried: Any) -> None:
    seen = tried(Unsupported("its arithmetic does not hold this weight"))
    made = plan()
    prepare = Preparing(made, torch.bfloat16)
    for _ in range(2):
        with pytest.warns(UserWarning, match="humming"):
            prepare(first(made), WEIGHT, ASKED)
    assert seen == ["humming", "triton-planes"] * 2


def test_a_kernel_that_was_asked_for_fails_with_its_own_error(tried: Any) -> None:
    seen = tried(DeviceProblem("kernels do not build"))
    made = plan("linear=humming")
    with pytest.raises(DeviceProblem, match="do not build"):
        Preparing(made, torch.bfloat16)(first(made), WEIGHT, ASKED)
    assert seen == ["humming"]


def test_a_strict_plan_stays_strict(tried: Any) -> None:
    tried(DeviceProblem("kernels do not build"))
    made = plan(strict=True)
    choice = first(plan())
    with pytest.warns(UserWarning, match="humming"):
        Preparing(made, torch.bfloat16)(choice, WEIGHT, ASKED)
    found = choose(ASKED, made.platform, policy=made.policy)
    assert isinstance(found, Choice) and "triton-expand" not in found.names.values()
