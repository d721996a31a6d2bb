"""The same bits on a GPU as on the CPU: codes, recipes, quantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anybit.numerics.activations import quantize
from anybit.numerics.codec import decode, encode
from anybit.numerics.formats import FORMATS, WIDE_FLOATS
from anybit.numerics.packing import pack_stream, unpack_stream
from anybit.numerics.quantize import WEIGHT_RULES, quantize_weight
from anybit.numerics.scales import quotient
from numerics.test_activations import SPECS, inputs, tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
NARROW = [name for name in FORMATS if name not in WIDE_FLOATS]


def same_bits(gpu: Tensor, cpu: Tensor) -> bool:
    return torch.equal(gpu.cpu().nan_to_num(-12345.0) if gpu.is_floating_point() else gpu.cpu(),
                       cpu.nan_to_num(-12345.0) if cpu.is_floating_point() else cpu)  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
def test_encoding_and_decoding_give_the_same_bits(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator) * torch.exp2(torch.randn(100_000, generator=generator) * 6)
    x = torch.cat([x, torch.arange(-4000, 4000) / 16, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    codes = encode(name, x)
    assert same_bits(encode(name, x.cuda()), codes)
    assert same_bits(decode(name, codes.cuda()), decode(name, codes))


def test_quotients_are_rounded_once() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) + 0.01
    for number in (6, 127, 127.5, 448):
        assert same_bits(quotient(x.cuda(), number), quotient(x, number))
        assert same_bits(quotient(number, x.cuda()), quotient(number, x))
    assert same_bits(1 / x.cuda(), 1 / x)


@pytest.mark.parametrize("recipe", SPECS)
def test_recipes_give_the_same_codes_and_scales(recipe: str) -> None:
    x = inputs(300, 512, seed=9)
    cpu = quantize(x, SPECS[recipe], tensors(recipe))
    gpu = quantize(x.cuda(), SPECS[recipe], {k: v.cuda() for k, v in tensors(recipe).items()})
    assert same_bits(gpu.codes, cpu.codes)
    assert same_bits(gpu.scale, cpu.scale)
    assert same_bits(gpu.dequantize(), cpu.dequantize())


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_weights_are_quantized_to_the_same_codes(rule: str) -> None:
    w = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)) * 0.02
    cpu, gpu = quantize_weight(rule, w), quantize_weight(rule, w.cuda())
    if rule == "int4_g128":  # sums of squares choose the divisor: another order of summation may choose another
        assert (gpu.codes.cpu() == cpu.codes).float().mean() > 0.99
        return
    assert same_bits(gpu.codes, cpu.codes)
    assert all(same_bits(a, b) for a, b in zip(gpu.scales, cpu.scales, strict=True))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_unpack_there(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (7, 100), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert same_bits(unpack_stream(pack_stream(codes.cuda(), bits, torch.int32), bits, 100), codes)
