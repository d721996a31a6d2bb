"""q/k/v and gate/up as one product: every part equals the layer alone, in any order of asking, for any batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from anybit.kernels.request import REGIMES
from anybit.platforms import detect
from anybit.schemes import CHANNEL, TENSOR, Block, Offset, ScaleLevel, Scheme, group
from anybit.weights import QuantizedWeight, concatenate

if "native" not in detect("cpu").providers:
    pytest.skip("the compiled library is not built", allow_module_level=True)

from anybit.kernels.linear.planes_unit import StoredPart, as_unit


def weight(rows: int, block: Block = (1, 32), bias: bool = True, columns: int = 96) -> QuantizedWeight:
    groups = (1 if block[0] == 0 else rows, 1 if block[1] == 0 else columns // block[1])
    scheme = Scheme("uint4", (ScaleLevel("float16", block),), offset=Offset("zero_point", "uint4", group(32)))
    return QuantizedWeight(
        scheme, (rows, columns), torch.randint(0, 16, (rows, columns), dtype=torch.uint8), (torch.rand(groups).half(),),
        torch.randint(0, 16, (rows, columns // 32), dtype=torch.uint8), bias=torch.randn(rows) if bias else None,
    )

KERNELS_OF = {"decode": "native-matvec", "small": "native-expand", "prefill": "native-gemm"}


def unit_of(weights: list[QuantizedWeight]) -> list[StoredPart]:
    found = as_unit(weights, KERNELS_OF)
    assert found is not None
    return found


@pytest.mark.parametrize("block", [group(32), CHANNEL, TENSOR], ids=str)
def test_concatenated_weights_are_the_weights_below_each_other(block: Block) -> None:
    weights = [weight(n, block) for n in (5, 1, 8)]
    together = concatenate(weights)
    assert together is not None
    assert torch.equal(together.dequantize(), torch.cat([w.dequantize() for w in weights]))


def test_unlike_weights_are_not_concatenated() -> None:
    assert concatenate([weight(4), weight(4, CHANNEL)]) is None
    assert concatenate([weight(4), weight(4, bias=False)]) is None
    assert concatenate([weight(4), weight(4, columns=64)]) is None


@pytest.mark.parametrize("tokens", [0, 1, 3, 40, 100])
def test_each_part_equals_its_layer_alone(tokens: int) -> None:
    weights = [weight(n) for n in (24, 8, 16)]
    parts = unit_of(weights)
    x = torch.randn(tokens, 96)
    regime = next(name for name, (most, _) in REGIMES.items() if tokens <= most)
    for part, alone in zip(parts, weights, strict=True):
        w = alone.dequantize().double()
        assert alone.bias is not None
        wanted = x.double() @ w.T + alone.bias.double()
        bound = 98 * 2.0**-23 * (x.double().abs() @ w.abs().T + alone.bias.double().abs())
        for y in (part.linear(x, regime, alone.bias, torch.float32), part.step(x)):
            assert ((y.double() - wanted).abs() <= bound).all()
        assert torch.equal(part.dequantize(), alone.dequantize())
        assert torch.equal(part.rows(torch.tensor([2, 0]), torch.float32), alone.dequantize()[[2, 0]])


def test_parts_may_be_asked_in_any_order_and_again() -> None:
    weights = [weight(n) for n in (4, 4, 4)]
    parts = unit_of(weights)
    first, second = torch.randn(1, 96), torch.randn(1, 96)
    alone = {(i, id(x)): unit_of(weights)[i].step(x).clone() for i in range(3) for x in (first, second)}
    for i, x in [(0, first), (0, first), (2, second), (1, first), (0, second), (1, second), (2, first), (2, first)]:
        assert torch.equal(parts[i].step(x), alone[i, id(x)])


def test_an_input_changed_in_place_between_steps_is_computed_again() -> None:
    parts = unit_of([weight(4), weight(4)])
    x = torch.randn(1, 96)
    for _ in range(3):
        wanted = unit_of_clone(parts, x)
        assert torch.equal(parts[0].step(x), wanted[0])
        assert torch.equal(parts[1].step(x), wanted[1])
        x += 1


def unit_of_clone(parts: list[StoredPart], x: torch.Tensor) -> list[torch.Tensor]:
    return [part.linear(x.clone(), "decode", None, torch.float32) for part in parts]


def test_threads_with_inputs_of_their_own_never_see_each_others_rows() -> None:
    weights = [weight(16), weight(16)]
    parts = unit_of(weights)

    def many(seed: int) -> bool:
        x = torch.randn(1, 96, generator=torch.Generator().manual_seed(seed))
        wanted = [part.linear(x.clone(), "decode", None, torch.float32) for part in unit_of(weights)]
        return all(torch.equal(part.step(x), y) for _ in range(200) for part, y in zip(parts, wanted, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))
