"""The experts of a layer on a CPU: a few tokens in one call a projection, and when they take their turns instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anybit.checkpoints.online import quantizer
from anybit.hosts.modules import AnybitExperts, AnybitLinear
from anybit.kernels.catalogue import implementation
from anybit.kernels.linear.planes import MATVEC
from anybit.kernels.native import library
from anybit.kernels.product import product_of
from anybit.kernels.trials import sample_weight
from anybit.schemes import Layer, dense

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled CPU kernel is not built")
EXPERTS, HIDDEN, INNER = 6, 96, 64


class Gating(nn.Module):
    """What AnybitExperts asks of the module that it replaces."""

    act_fn = nn.SiLU()


def projection(name: str, experts: int, rows: int, columns: int) -> list[AnybitLinear]:
    made = []
    for seed in range(experts):
        layer = Layer("layer", "linear", (rows, columns), dense("bfloat16"))
        scheme = quantizer(name).scheme_of(layer)
        assert scheme is not None
        weight = sample_weight(scheme, (rows, columns), seed)
        stored = implementation(MATVEC).prepare(weight, torch.float32, dict.fromkeys(
            ("decode", "small", "prefill"), MATVEC.name))
        made.append(AnybitLinear(product_of(weight, stored)))
    return made


def layer_of(name: str, other: str | None = None) -> AnybitExperts:
    """`other` is the scheme of the last expert's gate_proj."""
    sizes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    made = {key: projection(name, EXPERTS, *size) for key, size in sizes.items()}
    if other is not None:
        made["gate_proj"][-1] = projection(other, 1, INNER, HIDDEN)[0]
    return AnybitExperts(Gating(), EXPERTS, made)


def routed(tokens: int, chosen: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, experts of which EXPERTS means one elsewhere, weights."""
    index = torch.stack([torch.randperm(EXPERTS + 1)[:chosen] for _ in range(tokens)]) if tokens else torch.empty(
        (0, chosen), dtype=torch.int64)
    return torch.randn(tokens, HIDDEN, dtype=dtype), index, torch.rand(tokens, chosen, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int4_g32_asym", "mxfp4_a16", "int8_per_channel_a16"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 8])
def test_few_tokens_at_once_give_what_the_loop_gives(
    tokens: int, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(name)
    given = routed(tokens, 3, dtype)
    calls: list[object] = []
    each = layer._together_on_cpu["gate_proj"]
    layer._together_on_cpu["gate_proj"] = lambda *rest: calls.append(1) or each(*rest)  # type: ignore[assignment,func-returns-value]
    with torch.inference_mode():
        found = layer(*given)
        assert len(calls) == (tokens > 0)
        monkeypatch.setattr(layer, "_together_on_cpu", {})
        wanted = layer(*given)
    # in 16 bits torch's gate of several rows rounds otherwise than that of one
    if dtype == torch.float32:
        assert torch.equal(found, wanted)
    elif tokens:
        assert (found - wanted).float().norm() <= 2**-7 * wanted.float().norm()


def test_tokens_whose_experts_are_all_elsewhere_get_nothing() -> None:
    x = torch.randn(2, HIDDEN)
    found = layer_of("int4_g32_asym")(x, torch.full((2, 3), EXPERTS), torch.ones(2, 3))
    assert torch.equal(found, torch.zeros_like(x))


def test_experts_of_different_schemes_take_turns() -> None:
    assert not layer_of("int4_g32_asym", "int8_per_channel_a16")._together_on_cpu
    layer = layer_of("int4_g32_asym")
    assert set(layer._together_on_cpu) == {"gate_proj", "up_proj", "down_proj"}


def test_gradients_go_through_the_products() -> None:
    layer = layer_of("int4_g32_asym")
    x, index, weights = routed(2, 3, torch.float32)
    x.requires_grad_()
    layer(x, index, weights).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["replaced", "hooked"])
def test_an_expert_that_was_changed_after_loading_is_called(how: str) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    layer = layer_of("int4_g32_asym")
    given = routed(2, EXPERTS, torch.float32)
    with torch.inference_mode():
        before = layer(*given)
        parts = layer._modules["1"]
        if how == "replaced":
            parts["up_proj"] = Adapter(parts["up_proj"])  # type: ignore[index]
        else:
            parts["up_proj"].register_forward_hook(lambda module, x, y: 2 * y)  # type: ignore[index]
        assert not torch.allclose(layer(*given), before)
        one = (given[0], torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))  # of an expert as it was
        found = layer(*one)
        layer._together_on_cpu = {}
        assert torch.equal(found, layer(*one))
