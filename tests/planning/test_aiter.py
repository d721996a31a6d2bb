"""AITER's tuned product is planned by price: for the shapes in its table, where it is installed, and never by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from anybit.errors import DeviceProblem
from anybit.kernels.catalogue import implementation, kernel
from anybit.kernels.linear import aiter, dense
from anybit.kernels.request import REGIMES, Request
from anybit.planning.choose import Choice, choose
from anybit.platforms import Platform, named
from anybit.schemes import dense as unquantized
from anybit.weights import Dense

TABLE = """gfx,cu_num,M,N,K,bias,dtype,outdtype,scaleAB,bpreshuffle,libtype,solidx,splitK,us,kernelName,err_ratio,tflops,bw
gfx942,304,1,1024,512,False,torch.bfloat16,torch.bfloat16,False,False,asm,1,4,0.5,k,0.0,1,1
gfx942,304,16,1024,512,False,torch.bfloat16,torch.bfloat16,False,False,asm,1,4,0.6,k,0.0,1,1
gfx942,304,512,1024,512,False,torch.bfloat16,torch.bfloat16,False,False,asm,1,4,1.0,k,0.0,1,1
gfx942,304,1,1024,1024,False,torch.bfloat16,torch.float32,False,False,asm,1,4,0.1,k,0.0,1,1
gfx942,304,1,2048,512,True,torch.bfloat16,torch.bfloat16,False,False,asm,1,4,0.1,k,0.0,1,1
"""


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "tuned.csv").write_text(TABLE)
    monkeypatch.setenv("AITER_CONFIG_GEMM_BF16", str(tmp_path / "tuned.csv"))
    aiter.tuned_table.cache_clear()
    yield
    aiter.tuned_table.cache_clear()


def mi300x(*providers: str) -> Platform:
    return replace(named("mi300x"), providers=frozenset({"torch", *providers}), is_detected=True)


def request(n: int, k: int, **facts: str) -> Request:
    return Request("linear", unquantized("bfloat16"), (n, k), **{"dtype": "bfloat16", **facts})  # type: ignore[arg-type]


def names(request: Request, platform: Platform) -> set[str]:
    choice = choose(request, platform)
    assert isinstance(choice, Choice)
    return set(choice.names.values())


def test_a_tuned_shape_runs_on_aiter_and_another_on_torch(tuned: None) -> None:
    assert names(request(1024, 512), mi300x("aiter")) == {"aiter-gemm"}
    assert names(request(1000, 512), mi300x("aiter")) == {"torch-dense"}


def test_rows_of_another_output_or_with_a_bias_do_not_count(tuned: None) -> None:
    for n, k in ((1024, 1024), (2048, 512)):
        assert aiter.seconds(request(n, k), mi300x("aiter")) > dense.seconds(request(n, k), mi300x("aiter"))


def test_the_next_larger_tuned_m_is_the_price(tuned: None) -> None:
    assert aiter.seconds(request(1024, 512, regime="small"), mi300x("aiter")) == pytest.approx(2.6e-6)


def test_without_aiter_it_is_refused_whatever_the_table_says(tuned: None) -> None:
    verdict = aiter.can_implement(request(1024, 512), mi300x())
    assert [reason.code for reason in verdict.reasons] == ["provider"]
    assert names(request(1024, 512), mi300x()) == {"torch-dense"}


@pytest.mark.parametrize(("platform", "codes"), [
    ("mi250x", {"arch", "provider"}), ("h100", {"vendor", "provider"}), ("cpu", {"vendor", "provider"}),
])
def test_other_chips_are_refused_with_every_reason(platform: str, codes: set[str]) -> None:
    verdict = aiter.can_implement(request(1024, 512), named(platform))
    assert {reason.code for reason in verdict.reasons} == codes
    assert {r.code for r in aiter.can_implement(request(1024, 512, dtype="float32"), mi300x("aiter")).reasons} == {"dtype"}


def test_a_damaged_table_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.csv").write_text("gfx,M\ngfx942,x\n")
    monkeypatch.setenv("AITER_CONFIG_GEMM_BF16", f"{tmp_path / 'bad.csv'}:{tmp_path / 'absent.csv'}")
    aiter.tuned_table.cache_clear()
    assert aiter.tuned_table() == {}
    aiter.tuned_table.cache_clear()


def prepared(weight: torch.Tensor):  # type: ignore[no-untyped-def]
    made = implementation(kernel("aiter-gemm"))
    return made.prepare(Dense(unquantized("bfloat16"), weight), torch.bfloat16, dict.fromkeys(REGIMES, "aiter-gemm"))


def test_the_product_is_the_librarys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def mm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, otype: object = None) -> torch.Tensor:
        seen.append((x.shape, otype))
        return torch.nn.functional.linear(x, weight, bias)

    library = ModuleType("aiter.tuned_gemm")
    library.tgemm = SimpleNamespace(mm=mm)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiter", ModuleType("aiter"))
    monkeypatch.setitem(sys.modules, "aiter.tuned_gemm", library)
    weight = torch.randn(8, 16).bfloat16()
    stored = prepared(weight)
    x, bias = torch.randn(3, 16).bfloat16(), torch.randn(8)
    y = stored.linear(x, "decode", bias, torch.bfloat16)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias.bfloat16()))
    assert seen == [((3, 16), torch.bfloat16)]
    assert stored.linear(x[:0], "decode", None, torch.bfloat16).shape == (0, 8)
    assert len(seen) == 1  # no rows: nothing to ask the library for


def test_a_library_that_does_not_load_is_a_refusal_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter.tuned_gemm", None)
    with pytest.raises(DeviceProblem, match="does not load") as refused:
        prepared(torch.randn(8, 16))
    assert "torch-dense" in refused.value.remedy
