"""Strictness reaches both doors into transformers: load and enable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers

import anybit
from anybit.errors import Unsupported
from anybit.hosts.quantizer import AnybitConfig
from anybit.planning import choose
from conftest import TRIMMED

FOLDER = TRIMMED / "checkpoints" / "ct-llama-w4a16-g128"


@pytest.fixture
def all_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel says that it rounds something: nothing is left under a strict policy."""
    rounding = tuple(replace(k, rounds=lambda request, platform: "weights to bfloat16") for k in choose.KERNELS)
    monkeypatch.setattr(choose, "KERNELS", rounding)


@pytest.mark.usefixtures("all_round")
def test_the_take_over_door_refuses_under_strict_what_it_loads_otherwise() -> None:
    anybit.enable(strict=True)
    try:
        with pytest.raises(Unsupported, match="no kernel runs this layer") as refused:
            transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
        assert "changes the declared arithmetic: rounds weights to bfloat16" in refused.value.found
        assert "leave --strict out" in refused.value.remedy
    finally:
        anybit.enable()
    transformers.AutoModelForCausalLM.from_pretrained(FOLDER)


@pytest.mark.usefixtures("all_round")
def test_the_main_door_refuses_under_strict_what_it_loads_otherwise() -> None:
    with pytest.raises(Unsupported, match="no kernel runs this layer"):
        anybit.load(FOLDER, device="cpu", strict=True)
    assert anybit.load(FOLDER, device="cpu").anybit.plan.changes_declared


def test_the_config_that_transformers_carries_keeps_strictness() -> None:
    assert AnybitConfig.from_dict(AnybitConfig("here", strict=True).to_dict()).strict
    assert not AnybitConfig.from_dict({"source": "here"}).strict
