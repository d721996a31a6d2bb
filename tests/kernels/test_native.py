"""The compiled CPU kernel against the canonical reference weight, on every instruction set of this machine.

Weights must be equal bit for bit; products may differ from the float64 product of the same weights by accumulation
only. Outputs are poisoned with NaN first, so that an unwritten element cannot pass.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from anybit.checkpoints.dialects import gguf
from anybit.kernels import native
from anybit.numerics.formats import number_format
from anybit.numerics.packing import PackedCodes, pack_halves32
from anybit.schemes import CHANNEL, TENSOR, Offset, ScaleLevel, Scheme, group
from anybit.weights import Dense, QuantizedWeight

LIBRARY = native.library()
if LIBRARY is None:
    pytest.skip(f"the compiled CPU kernel is missing: {native.why_missing()}", allow_module_level=True)

from anybit.kernels.native.experts import Experts  # noqa: E402
from anybit.kernels.native.planes import Planes, from_weight, pack_planes  # noqa: E402
from anybit.kernels.native.support import code, reasons_against  # noqa: E402

ISAS = [isa for isa in ("generic", "avx2", "avx512", "avx512_vbmi") if LIBRARY.set_isa(isa)]
LIBRARY.set_isa("")

INTEGERS = [f"{kind}{bits}" for kind in ("uint", "int") for bits in range(1, 9)]
SMALL_FLOATS = ["fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fnuz"]
CODEBOOKS = ["nf4", "fp4_bnb", "iq4_nl", "fp4_doubled", "mxint4"]
ELEMENTS = [*INTEGERS, *SMALL_FLOATS, *CODEBOOKS]
WIDE = ["float32", "float16", "bfloat16"]
SCALES = [*WIDE, "e8m0", "fp8_e4m3fn", "ue5m3", "uint8", "int8", "fp8_e5m2"]
BLOCKS = [group(16), group(32), group(48), group(64), group(128), CHANNEL, TENSOR, (128, 128), (3, 32)]
OFFSETS = [("zero_point", f) for f in ("uint4", "uint8", "int8", *WIDE)] + [("minimum", f) for f in (*WIDE, "uint6")]
SHAPES = [(5, 96), (4, 64), (7, 33), (1, 1), (9, 150), (130, 320), (6, 1100), (2, 31), (8, 2048)]
TOKENS = [1, 3, 0, 2, 5, 1, 8, 9]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Case = tuple[QuantizedWeight, int]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert LIBRARY is not None
    LIBRARY.set_isa(request.param)
    yield request.param
    LIBRARY.set_isa("")


def random_codes(element: str, shape: tuple[int, ...]) -> Tensor:
    form = number_format(element)
    low, high = (-(2 ** (form.bits - 1)), 2 ** (form.bits - 1)) if form.kind == "int" else (0, 2**form.bits)
    return torch.randint(low, high, shape, dtype=torch.int8 if form.kind == "int" else torch.uint8)


def random_values(format: str, shape: tuple[int, ...], finite: bool) -> Tensor:
    """Stored scales or offsets; without `finite` also NaN, infinities, zeros, subnormals and huge numbers."""
    if format in WIDE:
        dtype = getattr(torch, format)
        values = torch.randn(shape) * (0.02 if finite else 1.0)
        if not finite:
            special = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 1e-45, 6e-8, 3e38, -1e-39])
            values = torch.where(torch.rand(shape) < 0.1, special[torch.randint(0, 8, shape)], values)
        return values.to(dtype)
    if number_format(format).is_integer:
        return random_codes(format, shape)
    return torch.randint(90, 110, shape, dtype=torch.uint8) if finite else random_codes("uint8", shape)


def blocks_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    *lead, rows, cols = shape
    return (*lead, *(1 if size == 0 else -(-n // size) for n, size in ((rows, block[0]), (cols, block[1]))))


def build(
    element: str, shape: tuple[int, ...], scales: tuple[ScaleLevel, ...], offset: Offset | None = None,
    order: str = "scales_first", round_to: str | None = None, finite: bool = True,
) -> QuantizedWeight:
    scheme = Scheme(element, scales, order, offset, round_to)  # type: ignore[arg-type]
    codes = random_codes(element, shape)
    if finite:
        bad = torch.tensor([*number_format(element).nan_codes, *number_format(element).inf_codes], dtype=torch.uint8)
        codes[torch.isin(codes.view(torch.uint8), bad)] = 1
    stored = tuple(random_values(s.format, blocks_of(shape, s.block), finite) for s in scales)
    values, levels = None, ()
    if offset is not None:
        values = random_values(offset.format, blocks_of(shape, offset.block), finite)
        levels = tuple(random_values(s.format, blocks_of(shape, s.block), finite) for s in offset.levels)
    return QuantizedWeight(scheme, shape, codes, stored, values, levels)


def cases(element: str, finite: bool) -> Iterator[Case]:
    """All scales x blocks, and all offsets x blocks; shapes and token counts take turns."""
    turn = itertools.count(ELEMENTS.index(element))
    for format, block in itertools.product(SCALES, BLOCKS):
        i = next(turn)
        yield build(element, SHAPES[i % 9], (ScaleLevel(format, block),), finite=finite), TOKENS[i % 8]
    if code(element) is None or code(element).kind == 2:  # type: ignore[union-attr]
        return
    for (kind, format), block in itertools.product(OFFSETS, BLOCKS):
        i = next(turn)
        levels = (ScaleLevel("float16", (1, 256)),) if format == "uint6" else ()
        if format == "uint6" and 256 % max(block[1], 256 * (block[1] == 0)):
            block = group(32)
        if format == "uint6":
            block = (1, block[1] or 32)
        offset = Offset(kind, format, block, levels, subtract=bool(levels))  # type: ignore[arg-type]
        scale = ScaleLevel(WIDE[i % 3], BLOCKS[i // 3 % 9])
        yield build(element, SHAPES[i % 9], (scale,), offset, finite=finite), TOKENS[i % 8]


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, signed zeros included; any NaN equals any NaN."""
    nan = torch.isnan(b)
    same = a.view(torch.int32) == b.view(torch.int32)
    return a.shape == b.shape and bool((torch.isnan(a) == nan).all()) and bool((same | nan).all())


def decoded(planes: Planes, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return planes.decode_into(torch.full((count, planes.cols), float("nan"), dtype=dtype))


def assert_product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, extra: int = 0) -> None:
    """Within the bound of float32 accumulation: at most K + 1 roundings of 2^-24 on each term, then y's own."""
    w64, x64 = w.double(), x.double()
    exact = x64 @ w64.T
    size = x64.abs() @ w64.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[y.dtype]
    terms = (w.shape[1] + 2 + extra) * 2.0**-24 * size
    bound = terms + unit * (exact.abs() + terms) + torch.finfo(y.dtype).smallest_normal * unit
    limit = torch.finfo(y.dtype).max
    inside = exact.abs() + bound < limit
    wrong = ((y.double() - exact).abs() > bound) & inside
    assert not wrong.any(), (w.shape, x.shape, y[wrong][:4], exact[wrong][:4])
    assert not torch.isnan(y).any()


@pytest.mark.parametrize("element", ELEMENTS)
def test_decoded_rows_equal_the_reference_bit_for_bit(isa: str, element: str) -> None:
    torch.manual_seed(ELEMENTS.index(element))
    for weight, _ in cases(element, finite=False):
        got, wanted = decoded(from_weight(weight), weight.shape[0]), weight.dequantize().expand(weight.shape)
        assert equal(got, wanted.contiguous()), (weight.scheme, weight.shape)


@pytest.mark.parametrize("element", ELEMENTS)
def test_products_differ_by_accumulation_only(isa: str, element: str) -> None:
    torch.manual_seed(1000 + ELEMENTS.index(element))
    for i, (weight, tokens) in enumerate(cases(element, finite=True)):
        n, k = weight.shape
        x = torch.randn(tokens, k).to(DTYPES[i % 3])
        out = torch.full((tokens, n), float("nan"), dtype=DTYPES[i // 3 % 3])
        from_weight(weight).linear(x, out)
        assert_product(out, x, weight.dequantize().expand(n, k))


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 7, 8, 9, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_tokens(isa: str, tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(tokens)
    for shape in [(13, 96), (40, 2100), (64, 576)]:
        weight = build("uint4", shape, (ScaleLevel("float16", group(32)),), Offset("minimum", "float16", group(32)))
        x = torch.randn(tokens, shape[1]).to(dtype)
        assert_product(from_weight(weight).linear(x), x, weight.dequantize())


TWO_LEVELS = {
    "nvfp4": ("fp4_e2m1", ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR)),
    "nvfp4-divided": ("fp4_e2m1", ScaleLevel("fp8_e4m3fn", group(16)), ScaleLevel("float32", TENSOR, divide=True)),
    "q6_k": ("int6", ScaleLevel("int8", group(16)), ScaleLevel("float16", group(256))),
    "q3_k": ("int3", ScaleLevel("int6", group(16)), ScaleLevel("float16", group(256))),
    "rows": ("int8", ScaleLevel("bfloat16", group(64)), ScaleLevel("float32", CHANNEL)),
}


@pytest.mark.parametrize("order", ["scales_first", "code_first"])
@pytest.mark.parametrize("name", TWO_LEVELS)
def test_two_levels_of_scales(isa: str, name: str, order: str) -> None:
    element, fine, coarse = TWO_LEVELS[name]
    for shape in [(9, 512), (6, 2304), (5, 80)]:
        weight = build(element, shape, (fine, coarse), order=order)
        if reasons_against(weight.scheme, shape):
            assert order == "code_first"
            continue
        planes = from_weight(weight)
        assert equal(decoded(planes, shape[0]), weight.dequantize())
        x = torch.randn(3, shape[1])
        # code_first: linear multiplies the sum, the reference each weight: one rounding more a term
        assert_product(planes.linear(x), x, weight.dequantize(), extra=2)


@pytest.mark.parametrize("fine", ["uint6", "uint4"])
def test_a_minimum_of_two_levels_as_in_k_quants(isa: str, fine: str) -> None:
    scales = (ScaleLevel(fine, group(32)), ScaleLevel("float16", group(256)))
    minimum = Offset("minimum", fine, group(32), (ScaleLevel("float16", group(256)),), subtract=True)
    for element in ("uint2", "uint4", "uint5"):
        weight = build(element, (6, 1536), scales, minimum)
        assert equal(decoded(from_weight(weight), 6), weight.dequantize())


@pytest.mark.parametrize("round_to", ["float16", "bfloat16", "float32"])
def test_weights_that_the_format_rounds(isa: str, round_to: str) -> None:
    for element, block, finite in itertools.product(["nf4", "fp4_bnb"], [group(16), group(64), CHANNEL], [True, False]):
        weight = build(element, (6, 192), (ScaleLevel("float32", block),), round_to=round_to, finite=finite)
        assert equal(decoded(from_weight(weight), 6), weight.dequantize())


def test_flat_blocks_that_end_with_a_row(isa: str) -> None:
    weight = build("nf4", (6, 192), ())
    scale = torch.rand(6 * 3)
    scheme = Scheme("nf4", (ScaleLevel("float32", (1, 64), placement="flat"),))
    weight = QuantizedWeight(scheme, weight.shape, weight.codes, (scale,))
    assert equal(decoded(from_weight(weight), 6), weight.dequantize())


@pytest.mark.parametrize("element", WIDE)
def test_unquantized_weights(isa: str, element: str) -> None:
    for shape in [(9, 150), (5, 31), (8, 2048), (1, 1)]:
        tensor = torch.randn(shape).to(getattr(torch, element))
        planes = from_weight(Dense(Scheme(element), tensor))
        assert equal(decoded(planes, shape[0]), tensor.float())
        for tokens in (1, 4):
            x = torch.randn(tokens, shape[1])
            assert_product(planes.linear(x), x, tensor.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_rounded_as_torch_rounds(isa: str, dtype: torch.dtype) -> None:
    weight = build("int8", (7, 77), (ScaleLevel("float32", group(16)),), finite=False)
    got = decoded(from_weight(weight), 7, dtype)
    assert equal(got.float(), weight.dequantize().to(dtype).float())


def test_gathered_rows_are_an_embedding(isa: str) -> None:
    weight = build("uint4", (50, 70), (ScaleLevel("float16", group(32)),), Offset("zero_point", "uint4", group(32)))
    planes, ids = from_weight(weight), torch.tensor([[3, 49], [0, 3]])
    assert equal(planes.gather(ids), weight.dequantize()[ids])
    with pytest.raises(IndexError):
        planes.gather(torch.tensor([50]))
    with pytest.raises(IndexError):
        planes.gather(torch.tensor([-1]))


def test_a_nan_row_of_x_stays_in_its_row(isa: str) -> None:
    weight = build("int5", (11, 100), (ScaleLevel("float16", group(32)),))
    x = torch.randn(5, 100)
    x[2, 7] = float("nan")
    y = from_weight(weight).linear(x)
    assert torch.isnan(y[2]).all() and not torch.isnan(y[[0, 1, 3, 4]]).any()


@pytest.mark.parametrize("element", ["uint1", "int2", "int3", "uint4", "int5", "int6", "int7", "int8", "fp6_e3m2", "fp8_e4m3fn"])
@pytest.mark.parametrize("cols", [32, 160, 256, 416, 2080, 4384])  # less and more than a run, of 128 or 256, than a piece
def test_codes_in_lanes_at_the_ends_of_runs(isa: str, element: str, cols: int) -> None:
    torch.manual_seed(cols)
    weight = build(element, (7, cols), (ScaleLevel("float16", group(32)),))
    planes, w = from_weight(weight), weight.dequantize()
    for tokens in (1, 2, 4, 7):
        x = torch.randn(tokens, cols)
        assert_product(planes.linear(x), x, w)
        x[tokens - 1, cols - 1] = float("nan")
        y = planes.linear(x)
        assert torch.isnan(y[tokens - 1]).all() and not torch.isnan(y[: tokens - 1]).any()


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("element", ["int2", "int3", "int5", "int7", "fp8_e5m2"])
def test_what_lies_around_an_x_reaches_no_result(isa: str, element: str, tokens: int) -> None:
    weight = build(element, (5, 96), (ScaleLevel("float16", group(16)),))
    around = torch.full((tokens, 96 + 512), float("nan"))
    around[:, 256:352] = torch.randn(tokens, 96)
    x = around[:, 256:352]
    assert_product(from_weight(weight).linear(x), x, weight.dequantize())


@pytest.mark.parametrize(("element", "zero"), [("uint2", 1), ("uint4", 8), ("uint5", 16), ("uint7", 3), ("uint8", 128)])
def test_a_zero_point_of_all_groups_equals_one_for_each(isa: str, element: str, zero: int) -> None:
    """Symmetric files with an explicit zero point: the values of the codes hold it, and no bit changes."""
    torch.manual_seed(zero)
    offset = Offset("zero_point", "uint8", group(32))
    weight = build(element, (6, 352), (ScaleLevel("float16", group(32)),), offset)
    same = QuantizedWeight(weight.scheme, weight.shape, weight.codes, weight.scales, torch.full((6, 11), zero, dtype=torch.uint8))
    planes = from_weight(same)
    assert equal(decoded(planes, 6), same.dequantize())
    assert (planes._struct.offset_kind == 0) == (element != "uint8")
    x = torch.randn(2, 352)
    assert_product(planes.linear(x), x, same.dequantize())


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_lies_beyond_a_row_reaches_no_result(isa: str, tokens: int) -> None:
    scheme = Scheme("fp8_e4m3fn", (ScaleLevel("float32", CHANNEL),))
    plane = torch.full((4, 64), 0x7F, dtype=torch.uint8)  # NaN in the padding
    plane[:, :40] = 0x38  # 1.0
    planes = Planes(scheme, (4, 40), [plane], [torch.ones(4, 1)])
    padded = torch.full((tokens, 64), float("inf"))
    padded[:, :40] = 1.0
    assert torch.equal(planes.linear(padded[:, :40]), torch.full((tokens, 4), 40.0))


def test_x_and_out_may_have_strides_and_more_dimensions(isa: str) -> None:
    weight = build("uint3", (10, 64), (ScaleLevel("bfloat16", group(16)),))
    planes, w = from_weight(weight), weight.dequantize()
    wide = torch.randn(6, 200)
    assert_product(planes.linear(wide[:, 5:69]), wide[:, 5:69], w)
    assert_product(planes.linear(wide[::2, 5:69]), wide[::2, 5:69], w)
    tall = torch.randn(64, 3).T
    assert_product(planes.linear(tall), tall, w)
    cube = torch.randn(2, 3, 64)
    y = planes.linear(cube)
    assert y.shape == (2, 3, 10)
    assert_product(y.view(6, 10), cube.view(6, 64), w)
    vector = torch.randn(64)
    assert planes.linear(vector).shape == (10,)
    with pytest.raises(ValueError, match="x "):
        planes.linear(torch.randn(2, 65))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_is_added_once_in_float32(isa: str, dtype: torch.dtype) -> None:
    weight = build("uint2", (9, 96), (ScaleLevel("float16", group(32)),))
    bias = torch.randn(9).to(dtype)
    weight = QuantizedWeight(weight.scheme, weight.shape, weight.codes, weight.scales, bias=bias)
    for tokens in (1, 4):
        x = torch.randn(tokens, 96)
        assert_product(from_weight(weight).linear(x), x, weight.dequantize(), bias)


@pytest.mark.parametrize("element", ["uint4", "int8", "fp6_e3m2", "int3"])
def test_experts_in_one_call_give_what_each_alone_gives(isa: str, element: str) -> None:
    levels = (ScaleLevel("float16", group(16)), ScaleLevel("float32", TENSOR))
    weights = [build(element, (10, 80), levels) for _ in range(4)]
    weights = [QuantizedWeight(w.scheme, w.shape, w.codes, w.scales, bias=torch.randn(10)) for w in weights]
    planes = [from_weight(weight) for weight in weights]
    assert Experts.are_alike(planes)
    every = Experts(planes)
    x = torch.randn(5, 80)
    tokens = torch.tensor([0, 4, 1, 4, *[0, 1, 2, 3, 4] * 2, 2], dtype=torch.int32)
    found = every(x, [2, 0, 3, 1], [0, 1, 3, 4, 15], tokens)
    for expert, begin, end in ((2, 0, 1), (0, 1, 3), (3, 3, 4), (1, 4, 15)):
        rows = x[tokens[begin:end].long()]
        assert torch.equal(found[begin:end], planes[expert].linear(rows))
        assert_product(found[begin:end], rows, weights[expert].dequantize(), weights[expert].bias)
    one_each = every(x[:4].bfloat16(), [3, 2, 1, 0], [0, 1, 2, 3, 4])
    for p in range(4):
        assert torch.equal(one_each[p : p + 1], planes[3 - p].linear(x[p : p + 1].bfloat16()))
    for wrong in (5, -1):
        with pytest.raises(IndexError):
            every(x, [0], [0, 1], torch.tensor([wrong], dtype=torch.int32))
    with pytest.raises(ValueError, match="6 pairs"):
        every(x, [0], [0, 6])
    assert every(x, [0], [0, 0]).shape == (0, 10)


def test_experts_of_other_sizes_kinds_or_biases_are_not_called_together() -> None:
    scale = (ScaleLevel("float16", group(16)),)
    first = build("uint4", (10, 80), scale)
    others = [build("uint4", (12, 80), scale), build("uint8", (10, 80), scale),
              QuantizedWeight(first.scheme, first.shape, first.codes, first.scales, bias=torch.randn(10))]
    assert Experts.are_alike([from_weight(first), from_weight(build("uint4", (10, 80), scale))])
    for other in others:
        assert not Experts.are_alike([from_weight(first), from_weight(other)])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    torch.manual_seed(0)
    weight = build("uint4", (1000, 640), (ScaleLevel("float16", group(32)),))
    planes, x, before = from_weight(weight), torch.randn(2, 640), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = planes.linear(x)
        torch.set_num_threads(threads)
        assert all(torch.equal(planes.linear(x), alone) for _ in range(20))
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads_and_after_fork() -> None:
    weight = build("uint4", (1000, 640), (ScaleLevel("float16", group(32)),))
    planes, x = from_weight(weight), torch.randn(3, 640)
    wanted = planes.linear(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, wanted) for y in pool.map(lambda _: planes.linear(x), range(200)))
    child = os.fork()
    if child == 0:  # its pool has no workers
        os._exit(0 if torch.equal(planes.linear(x), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_subnormal_weights_are_kept(isa: str) -> None:
    weight = build("uint4", (4, 32), (ScaleLevel("float32", CHANNEL),))
    weight = QuantizedWeight(weight.scheme, (4, 32), weight.codes, (torch.full((4, 1), 1e-42),))
    assert equal(decoded(from_weight(weight), 4), weight.dequantize())
    y = from_weight(weight).linear(torch.ones(1, 32))
    assert torch.equal(y[0], weight.dequantize().sum(1))  # sums of subnormals are exact


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_are_as_documented(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 70), dtype=torch.uint8)
    padded = torch.nn.functional.pad(codes, (0, 26)).view(3, 5, 3, 32).int()
    planes, shift = pack_planes(codes, bits), 0
    for plane in planes:
        width = plane.shape[-1] // 12
        runs = plane.view(3, 5, 3, 4 * width).int()
        for j in range(32):
            byte, place = {8: (j, 0), 4: (j % 16, 4 * (j // 16)), 2: (j // 4, 2 * (j % 4)), 1: (j // 8, j % 8)}[width]
            want = padded[..., j] >> shift & (2**width - 1)
            assert torch.equal(runs[..., byte] >> place & (2**width - 1), want)
        shift += width
    assert shift == bits


def test_ggufs_nibbles_are_taken_as_they_are(isa: str) -> None:
    weight = build("uint4", (6, 96), (ScaleLevel("float16", group(32)),))
    packed = PackedCodes(pack_halves32(weight.codes), 4, 96, order="halves32")
    ready = QuantizedWeight(weight.scheme, weight.shape, packed, weight.scales)
    planes = from_weight(ready)
    assert planes._struct.plane[0] == packed.data.data_ptr()
    assert equal(decoded(planes, 6), weight.dequantize())


def test_large_weights_lie_in_memory_that_goes_with_them() -> None:
    """A chunk is given back with the last weight in it; what a file held is copied bit for bit."""
    from anybit.kernels.native import memory

    tensors = [torch.randn(300, 500), torch.randint(0, 255, (5, 4097), dtype=torch.uint8), torch.randn(3)]
    settled = [memory.settled(t) for t in tensors]
    assert all(torch.equal(a, b) and a.data_ptr() % 64 == 0 for a, b in zip(tensors, settled, strict=True))
    assert settled[2] is tensors[2]
    if settled[0] is not tensors[0]:
        assert memory._last is not None and memory._last[0]() is not None
        held = memory._last[0]
        alone = memory.settled(torch.ones(memory._CHUNK // 4 + 1))  # more than a chunk: one of its own
        assert bool((alone == 1).all()) and memory._last[0]() is not held()
        del alone
        assert memory._last[0]() is None


def test_packed_codes_of_other_orders() -> None:
    from anybit.numerics.packing import pack_stream

    weight = build("uint3", (6, 72), (ScaleLevel("float16", CHANNEL),))
    packed = PackedCodes(pack_stream(weight.codes, 3), 3, 72)
    assert equal(decoded(from_weight(QuantizedWeight(weight.scheme, (6, 72), packed, weight.scales)), 6),
                 weight.dequantize())  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (Scheme("fp8_e5m2fnuz", (ScaleLevel("float32", TENSOR),)), "elements fp8_e5m2fnuz"),
        (Scheme("uint4", (ScaleLevel("float16", group(8)),)), "groups of 8 columns"),
        (Scheme("uint4", (ScaleLevel("float16", group(32), placement="gathered"),), act_order=True), "act-order"),
        (Scheme("nf4", (ScaleLevel("float32", (1, 48), placement="flat"),)), "run across rows"),
        (Scheme("int8", (ScaleLevel("float32", TENSOR),), round_to="bfloat16"), "rounded"),
        (Scheme("fp8_e4m3fn", (ScaleLevel("float32", TENSOR),), offset=Offset("minimum", "float32", CHANNEL)), "offset"),
    ],
)
def test_what_it_cannot_run_is_said(scheme: Scheme, reason: str) -> None:
    assert any(reason in text for text in reasons_against(scheme, (64, 64)))


@pytest.mark.parametrize(("variable", "word"), [("0", "ANYBIT_NATIVE"), ("1", "")])
def test_the_loader_needs_no_torch_and_can_be_switched_off(variable: str, word: str) -> None:
    program = "import sys; from anybit.kernels import native; print(native.why_missing()); assert 'torch' not in sys.modules"
    environment = {**os.environ, "ANYBIT_NATIVE": variable}
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert word in out.stdout


@pytest.mark.parametrize("isa", ["avx512_vbmi", "avx512", "avx2", "generic"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 32), (13, 48), (29, 2080), (64, 4100), (100, 96)])
def test_a_product_of_many_tokens_equals_the_float64_product(isa: str, rows: int, cols: int) -> None:
    from anybit.kernels.native import library
    from anybit.kernels.native.planes import from_weight
    from anybit.kernels.trials import sample_weight
    from anybit.schemes import Offset, ScaleLevel, Scheme, group

    native = library()
    assert native is not None
    if not native.set_isa(isa):
        pytest.skip(f"this processor lacks {isa}")
    scheme = Scheme("uint4", (ScaleLevel("float16", group(32)),), offset=Offset("minimum", "float16", group(32)))
    try:
        weight = sample_weight(scheme, (rows, cols), seed=rows)
        planes = from_weight(weight)  # type: ignore[arg-type]
        wanted_weight = weight.dequantize().double()
        for tokens, dtype in ((1, torch.float32), (31, torch.float16), (33, torch.bfloat16), (70, torch.float32)):
            x = torch.randn(tokens, cols + 3).to(dtype)[:, :cols]  # rows of x lie apart
            x[tokens // 2] = torch.nan
            first = rows // 3
            out = torch.full((tokens, rows - first + 5), torch.nan, dtype=torch.float32)[:, : rows - first]
            found = planes.gemm(x, first, rows - first, out)
            assert torch.isnan(found[tokens // 2]).all()
            kept = torch.arange(tokens) != tokens // 2
            wanted = (x.double() @ wanted_weight[first:].T)[kept]
            bound = (cols + 2) * 2.0**-24 * (x.double().abs() @ wanted_weight[first:].abs().T)[kept] + 1e-30
            assert ((found[kept].double() - wanted).abs() <= bound).all()
    finally:
        native.set_isa("")


def test_rows_of_a_product_of_many_tokens_do_not_depend_on_their_number() -> None:
    from anybit.kernels.native.planes import from_weight
    from anybit.kernels.trials import sample_weight
    from anybit.schemes import ScaleLevel, Scheme, group

    weight = sample_weight(Scheme("int4", (ScaleLevel("bfloat16", group(64)),)), (70, 2176))
    planes = from_weight(weight)  # type: ignore[arg-type]
    x = torch.randn(100, 2176)
    whole = planes.gemm(x, 0, 70, torch.empty(100, 70))
    for first, count in ((0, 1), (5, 33), (99, 1)):
        part = planes.gemm(x[first : first + count], 0, 70, torch.empty(count, 70))
        assert torch.equal(part, whole[first : first + count])


@pytest.mark.parametrize("name", sorted(gguf.SCHEMES))
@pytest.mark.parametrize("shape", [(9, 256), (6, 768), (5, 4352)])  # 4352: more than a piece
def test_every_form_of_gguf_files_equals_the_reference_bit_for_bit(isa: str, name: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(shape[1])
    scheme = gguf.SCHEMES[name]
    assert not reasons_against(scheme, shape)
    for finite in (True, False):  # infinities, NaN and subnormals among the scales too
        weight = build(scheme.element, shape, scheme.scales, scheme.offset, scheme.order, finite=finite)
        planes = from_weight(weight)
        assert equal(decoded(planes, shape[0]), weight.dequantize().expand(shape).contiguous())
        if finite:
            for tokens in (1, 2, 5):
                x = torch.randn(tokens, shape[1])
                assert_product(planes.linear(x), x, weight.dequantize().expand(shape))
                out = torch.full((tokens, shape[0]), float("nan"))
                assert_product(planes.gemm(x, 0, shape[0], out), x, weight.dequantize().expand(shape))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_of_many_tokens_with_more_rows_than_an_item_holds(isa: str, threads: int) -> None:
    """Items of several tiles, columns of several pieces, and rows that end within a tile."""
    torch.manual_seed(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in [(1000, 96), (701, 2112)]:
            weight = build("int4", shape, (ScaleLevel("float16", group(32)),))
            planes, x = from_weight(weight), torch.randn(70, shape[1])
            out = torch.full((70, shape[0] - 3), float("nan"))
            assert_product(planes.gemm(x, 3, shape[0] - 3, out), x, weight.dequantize()[3:])
    finally:
        torch.set_num_threads(before)


def test_a_system_without_large_pages_or_addresses_keeps_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from anybit.kernels.native import memory

    if memory._ADVICE is None:
        pytest.skip("no such advice on this system")
    tensor = torch.arange(4096.0)
    monkeypatch.setattr(memory, "_last", None)
    monkeypatch.setattr(memory, "_ADVICE", 12345)  # what such a kernel says of it: EINVAL
    assert torch.equal(memory.settled(tensor), tensor)

    def none_left(nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory, "_place", none_left)
    assert memory.settled(tensor) is tensor
