"""What kernels claim is what compiles: the committed record is current, and a broken claim is caught."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from anybit.kernels.catalogue import KERNELS
from anybit.kernels.compiling import CompileCase
from anybit.kernels.request import KernelSpec, Request, Verdict
from anybit.platforms import ARCHS, Platform, named

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "gfx942", "gfx1100")  # recompiled by the suite where their code has changed


def _gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gate", ROOT / "tools" / "gate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gate"] = module
    spec.loader.exec_module(module)
    return module


gate = _gate()
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CASES = gate.all_cases()
RECORD = gate.read_record()


def test_every_case_of_every_kernel_is_in_the_record_current_and_clean() -> None:
    assert gate.check(CASES, RECORD) == []


def test_the_record_holds_nothing_else() -> None:
    assert set(RECORD) == {gate.name_of(case) for case in CASES}


@needs_triton
def test_cases_that_changed_compile_for_four_targets() -> None:
    due = [case for case in gate.stale(CASES, RECORD) if case.arch in TARGETS]
    for case, row in gate.compile_all(due):
        assert gate.faults(case, row) == [], gate.name_of(case)


@needs_triton
@pytest.mark.parametrize("arch", TARGETS)
def test_a_recorded_case_compiles_to_what_the_record_says(arch: str) -> None:
    case = next(case for case in CASES if case.arch == arch)
    [(_, row)] = gate.compile_all([case])
    assert gate.faults(case, row) == []
    recorded = RECORD[gate.name_of(case)]
    if row["triton"] == recorded["triton"]:
        assert {k: row[k] for k in ("registers", "spills", "shared_bytes", "instructions")} == {
            k: recorded[k] for k in ("registers", "spills", "shared_bytes", "instructions")
        }


def _case() -> CompileCase:
    return next(case for case in CASES if case.arch == "sm_90" and case.expects)


def test_a_changed_setting_makes_the_record_stale() -> None:
    changed = replace(_case(), num_warps=_case().num_warps * 2)
    assert gate.stale([changed], RECORD) == [changed]


def test_a_matrix_instruction_that_is_not_there_is_a_fault() -> None:
    case = replace(_case(), expects=(r"v_mfma_scale_f32",))
    assert "no v_mfma_scale_f32 in the assembly" in gate.faults(case, RECORD[gate.name_of(case)])[0]


def test_more_shared_memory_than_the_chip_has_is_a_fault() -> None:
    row = RECORD[gate.name_of(_case())] | {"shared_bytes": ARCHS["sm_90"].shared_bytes + 1}
    assert "bytes of shared memory" in gate.faults(_case(), row)[0]


def test_a_spilled_register_is_a_fault() -> None:
    row = RECORD[gate.name_of(_case())] | {"spills": _case().spills + 1}
    assert "spilled" in gate.faults(_case(), row)[0]


@needs_triton
def test_a_function_that_does_not_compile_is_a_fault_and_the_next_case_is_compiled() -> None:
    broken = replace(_case(), label="broken", types={**_case().types, next(iter(_case().types)): "*fp8e4b8"},
                     constants=dict(list(_case().constants.items())[1:]))
    rows = {gate.name_of(c): gate.faults(c, r) for c, r in gate.compile_all([broken, _case()])}
    assert rows[gate.name_of(broken)] != []
    assert rows[gate.name_of(_case())] == []


def test_a_claim_without_a_case_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(spec for spec in KERNELS if spec.cases("sm_90"))

    def everything(request: object, platform: object) -> Verdict:
        return Verdict()

    boastful: KernelSpec = replace(spec, name="boastful", can_implement=everything,
                                   cases=lambda arch: () if arch == "gfx90a" else spec.cases(arch))
    monkeypatch.setattr(gate, "KERNELS", (*KERNELS, boastful))
    assert any(text.startswith("boastful claims gfx90a") for text in gate.unclaimed())


def test_a_kernel_of_one_family_that_claims_an_architecture_it_is_not_compiled_for_is_caught(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = next(spec for spec in KERNELS if spec.name == "triton-mx-native")

    def on_every_chip(request: Request, platform: Platform) -> Verdict:
        return spec.can_implement(request, named("mi355x"))

    boastful = replace(spec, can_implement=on_every_chip)
    monkeypatch.setattr(gate, "KERNELS", (boastful,))
    assert any(text.startswith("triton-mx-native claims gfx90a (") for text in gate.unclaimed())


def test_a_native_claim_for_which_no_matrix_instruction_is_expected_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(spec for spec in KERNELS if spec.name == "triton-expand")
    assert not any(case.expects for case in spec.cases("sm_80"))
    monkeypatch.setattr(gate, "KERNELS", (replace(spec, executes=lambda request, platform: "native"),))
    assert any(text.startswith("triton-expand claims sm_80 natively (") for text in gate.unclaimed())
