"""What is planned by number of tokens is what runs: each layout's implementation follows the steps of its plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anybit.kernels.catalogue import implementation, kernel
from anybit.kernels.product import product_of
from anybit.kernels.request import ANY, Kernels
from anybit.kernels.trials import sample_weight
from anybit.schemes import ScaleLevel, Scheme, dense, group

INT4 = Scheme("int4", (ScaleLevel("bfloat16", group(32)),))
TOKENS = (1, 8, 9, 40, 41, 100, 101, 300)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_triton_planes_are_written_out_where_the_plan_says_so(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anybit.kernels.triton.planes import StoredPlanes

    seen: list[str] = []

    def expanding(self: StoredPlanes, x: Tensor, *rest: object) -> Tensor:
        seen.append("triton-expand")
        return torch.zeros(tokens, 64)

    def direct(self: StoredPlanes, *rest: object) -> Callable[..., Tensor]:
        seen.append("triton-fused")
        return lambda x, bias: torch.zeros(tokens, 64)

    monkeypatch.setattr(StoredPlanes, "_by_expanding", expanding)
    monkeypatch.setattr(StoredPlanes, "_direct", direct)
    weight = sample_weight(INT4, (64, 96))
    steps = [(8, "triton-matvec"), (40, "triton-fused"), (100, "triton-expand"), (ANY, "triton-fused")]
    stored = implementation(kernel("triton-fused")).prepare(weight, torch.bfloat16, Kernels(steps))
    product_of(weight, stored)(torch.randn(tokens, 96).bfloat16())
    assert seen == ["triton-expand" if 40 < tokens <= 100 else "triton-fused"]


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_compiled_planes_run_the_kernel_of_the_step(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.kernels.native.planes import Planes as NativePlanes

    seen: list[str] = []
    for method, name in (("linear", "native-matvec"), ("gemm", "native-gemm"), ("decode_into", "native-expand")):
        found = getattr(NativePlanes, method)
        monkeypatch.setattr(NativePlanes, method, lambda self, *rest, found=found, name=name: (
            seen.append(name), found(self, *rest))[1])
    weight = sample_weight(INT4, (64, 96))
    steps = Kernels([(8, "native-matvec"), (40, "native-gemm"), (100, "native-expand"), (ANY, "native-gemm")])
    stored = implementation(kernel("native-matvec")).prepare(weight, torch.float32, steps)
    product_of(weight, stored)(torch.randn(tokens, 96))
    assert set(seen) == {steps.at(tokens)}


def test_a_plain_weight_is_stored_for_whichever_kernel_of_its_layout_runs_some_tokens() -> None:
    weight = sample_weight(dense("bfloat16"), (64, 96))
    both = Kernels([(16, "torch-dense"), (64, "triton-skinny"), (ANY, "torch-dense")])
    stored = implementation(kernel("torch-dense")).prepare(weight, torch.bfloat16, both)
    assert type(stored).__name__ == "StoredSkinny"
    alone = implementation(kernel("torch-dense")).prepare(weight, torch.bfloat16, Kernels([(ANY, "torch-dense")]))
    assert type(alone).__name__ == "StoredDense"
