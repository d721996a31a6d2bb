"""Launches past Triton's launcher: the same launches as through it, and zeros that no two launches count in at once."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from anybit.checkpoints.online import quantizer
from anybit.hosts.modules import AnybitLinear
from anybit.kernels.catalogue import implementation
from anybit.kernels.product import product_of
from anybit.kernels.request import Request, regime_of
from anybit.kernels.trials import sample_weight
from anybit.kernels.triton import launching, zeros
from anybit.kernels.triton.launching import Call, Given, Launch, Piece, stream_of
from anybit.kernels.triton.straight import straight
from anybit.planning.choose import Choice, choose
from anybit.platforms import Platform, detect
from anybit.schemes import Layer, dense

CPU = torch.device("cpu")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SCHEMES = ("none", "int4_g128", "nvfp4_a16", "nvfp4", "fp8_per_channel", "fp8_per_block", "int8_per_channel", "int8_asym")


class Kernel:
    """Stands in for a jitted function: remembers what it was launched with, by Triton and past it."""

    def __init__(self, *names: str) -> None:
        self.arg_names = list(names)
        self.pre_run_hooks: list[object] = []
        self.by_triton: list[tuple[object, tuple[object, ...], dict[str, object]]] = []
        self.past: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def launched(*arguments: object, **named: object) -> object:
            self.by_triton.append((grid, arguments, named))
            return SimpleNamespace(run=lambda *a: self.past.append(a), function=11, packed_metadata=(4, 1, 0))

        return launched


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The CPU as a device with streams: `stream` is the current one, `capturing` true while a graph is captured."""
    pytest.importorskip("triton")
    now = SimpleNamespace(stream=7, capturing=False, hooks=SimpleNamespace(calls=[]))
    runtime = SimpleNamespace(launch_enter_hook=now.hooks, launch_exit_hook=SimpleNamespace(calls=[]))
    monkeypatch.setattr(launching, "_LAUNCHED", ("cpu",))
    monkeypatch.setattr(launching, "_current_stream", lambda index: now.stream)
    monkeypatch.setattr(launching, "_hooks", lambda: (runtime, runtime.launch_enter_hook, runtime.launch_exit_hook))
    monkeypatch.setattr(zeros, "_is_capturing", lambda: now.capturing)
    monkeypatch.setattr(zeros._Zeros, "_cleared", lambda self, count: torch.zeros(count, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    zeros._of.cache_clear()
    zeros._SETS.clear()
    yield now
    zeros._of.cache_clear()
    zeros._SETS.clear()


def launch_of(kernel: Kernel) -> tuple[Launch, torch.Tensor]:
    """(x, weight, part of the scratch, out, M, K, a constant), and the weight."""
    weight = torch.zeros(64)
    made = Launch(kernel, [torch.float32, weight, Piece(128, torch.int32), torch.bfloat16, int, 48], {"BLOCK": 32}, CPU,
                  num_warps=2)
    return made, weight


NAMES = ("x", "weight", "part", "out", "M", "K", "BLOCK")


def test_the_first_launch_goes_through_triton_and_the_others_past_it(device: SimpleNamespace) -> None:
    kernel = Kernel(*NAMES)
    launch, weight = launch_of(kernel)
    for m in (3, 5):
        x, out, scratch = torch.zeros(m, 48), torch.zeros(m, 16, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.uint8)
        launch(4, 2, stream_of(0), scratch, (x, out), m)
    (grid, arguments, named), = kernel.by_triton
    assert grid == (4, 2) and named == {"BLOCK": 32, "num_warps": 2}
    assert [type(a) for a in arguments] == [torch.Tensor] * 4 + [int] * 2
    assert arguments[2].dtype == torch.int32 and arguments[4:] == (3, 48)
    assert kernel.past == [(4, 2, 1, 7, 11, (4, 1, 0), None, None, None, x.data_ptr(), weight.data_ptr(),
                            scratch.data_ptr() + 128, out.data_ptr(), 5, 48, 32)]


@pytest.mark.parametrize("odd", ["x begins between two aligned addresses", "x has another dtype",
                                 "a profiler wants to know of launches"])
def test_what_does_not_fit_goes_through_triton(device: SimpleNamespace, odd: str) -> None:
    kernel = Kernel(*NAMES)
    launch, _ = launch_of(kernel)
    x, out, scratch = torch.zeros(3, 48), torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.uint8)
    launch(4, 2, stream_of(0), scratch, (x, out), 3)
    if odd.startswith("x begins"):
        x = torch.zeros(200)[1:145].view(3, 48)
    elif odd.startswith("x has"):
        x = x.half()
    else:
        device.hooks.calls.append(print)
    launch(4, 2, stream_of(0), scratch, (x, out), 3)
    assert len(kernel.by_triton) == 2 and kernel.past == []
    assert kernel.by_triton[1][1][0] is x


def test_a_tensor_that_a_call_brings_as_a_descriptor_is_described_anew_at_each_call(device: SimpleNamespace) -> None:
    from triton.experimental.gluon.language import NVMMASharedLayout

    kernel = Kernel("x", "out", "M")
    layout = NVMMASharedLayout(128, 16, 2)
    launch = Launch(kernel, [Given(torch.bfloat16, (16, 64), layout), torch.bfloat16, int], {}, CPU)
    out = torch.zeros(3, 16, dtype=torch.bfloat16)
    held = [torch.zeros(3, 80, dtype=torch.bfloat16)[:, :48] for _ in range(2)]
    for x in held:
        launch(4, 2, stream_of(0), None, (x, out), 3)
    described = kernel.by_triton[0][1][0]
    assert described.base is held[0] and described.block_shape == [16, 64] and described.layout is layout
    (*_, moved, address, tokens), = kernel.past
    assert moved.base.data_ptr() == held[1].data_ptr() and (address, tokens) == (out.data_ptr(), 3)
    assert (moved.shape, moved.strides) == ([3, 48], [80, 1])
    launch(4, 2, stream_of(0), None, (held[0].half(), out), 3)  # another dtype goes Triton's way
    assert len(kernel.by_triton) == 2


def test_rows_of_three_dimensions_are_described_as_rows(device: SimpleNamespace) -> None:
    from triton.experimental.gluon.language import NVMMASharedLayout

    kernel = Kernel("x", "out", "M")
    launch = Launch(kernel, [Given(torch.bfloat16, (16, 64), NVMMASharedLayout(128, 16, 2)), torch.bfloat16, int], {}, CPU)
    out = torch.zeros(1, 3, 16, dtype=torch.bfloat16)
    first, second = (torch.zeros(1, 3, 48, dtype=torch.bfloat16) for _ in range(2))
    launch(4, 2, stream_of(0), None, (first, out), 3)
    described = kernel.by_triton[0][1][0]
    assert (list(described.shape), list(described.strides)) == ([3, 48], [48, 1])
    assert described.base.data_ptr() == first.data_ptr()
    launch(4, 2, stream_of(0), None, (second, out), 3)
    (*_, moved, _, _), = kernel.past
    assert (moved.base.data_ptr(), moved.shape, moved.strides) == (second.data_ptr(), [3, 48], [48, 1])


@pytest.mark.parametrize("odd", ["an unaligned first call", "a version that nobody has read", "a hook on the kernel"])
def test_nothing_is_remembered_of_a_first_launch_that_later_ones_may_differ_from(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    kernel = Kernel(*NAMES)
    launch, _ = launch_of(kernel)
    out, scratch = torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.uint8)
    x = torch.zeros(200)[1:145].view(3, 48) if odd.startswith("an unaligned") else torch.zeros(3, 48)
    if odd.startswith("a version"):
        monkeypatch.setattr(launching, "_hooks", lambda: None)
    if odd.startswith("a hook"):
        kernel.pre_run_hooks.append(print)
    for _ in range(2):
        launch(4, 2, stream_of(0), scratch, (x, out), 3)
    assert len(kernel.by_triton) == 2 and kernel.past == []


def test_a_version_that_nobody_has_read_has_no_stream_to_launch_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(launching, "_current_stream", lambda index: 7)
    for found, wanted in (((3, 6), 7), ((3, 4), None), ((4, 0), None)):
        monkeypatch.setattr(launching, "version", lambda found=found: found)
        launching._hooks.cache_clear()
        assert stream_of(0) == wanted and stream_of(None) is None
    launching._hooks.cache_clear()


class CudaLauncher:
    """As Triton 3.5 and 3.6 have it."""

    global_scratch_size, profile_scratch_size, launch_cooperative_grid, launch_pdl = 0, 0, False, True

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def launch(self, *arguments: object) -> None:
        self.seen.append(arguments)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *arguments: object) -> None:
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, None, None, *arguments)


@pytest.mark.parametrize("version", [(3, 6), (3, 7)])
@pytest.mark.parametrize("allocates", [False, True])
def test_the_function_behind_the_launcher_is_given_what_the_launcher_gives_it(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], allocates: bool
) -> None:
    monkeypatch.setattr("anybit.kernels.triton.straight.version", lambda: version)
    launcher = CudaLauncher()
    launcher.global_scratch_size = 64 if allocates else 0
    found = SimpleNamespace(run=launcher, function=11, packed_metadata=(4, 1, 0), metadata=SimpleNamespace())
    made = straight(found, [100, None, 7], {})
    assert made is not None and made.describes == {}
    assert (made.run is launcher) is (allocates or version == (3, 7))
    arguments = made.arguments.copy()
    arguments[:4] = [5, 6, 1, 9]
    arguments[made.places[1]] = 200
    made.run(*arguments)
    launcher(5, 6, 1, 9, 11, (4, 1, 0), None, None, None, 100, 200, 7)
    assert launcher.seen[0] == launcher.seen[1]


def test_a_call_keeps_nothing_that_it_allocated(device: SimpleNamespace) -> None:
    kernel = Kernel("x", "parts", "out", "M")
    call = Call((3, 16), torch.bfloat16, CPU, 3, 256, None,
                Launch(kernel, [torch.float32, Piece(0, torch.float32), torch.bfloat16, int], {}, CPU), (1, 1))
    for _ in range(2):
        out = call(torch.zeros(3, 48), None)
        given = kernel.by_triton.pop()[1] if kernel.by_triton else ()
        seen = [weakref.ref(t) for t in (out, *given) if isinstance(t, torch.Tensor)]
        del out, given
        gc.collect()
        assert [ref() for ref in seen] == [None] * len(seen)


def test_a_call_goes_to_the_device_of_its_tensors(device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    current, asked = [1], []

    @contextmanager
    def on_device(wanted: torch.device) -> Iterator[None]:
        asked.append(wanted)
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    def stream(index: int) -> int:
        assert current[0] == index
        return 7

    monkeypatch.setattr(launching, "_current_device", lambda: current[0])
    monkeypatch.setattr(launching, "on_device", on_device)
    monkeypatch.setattr(launching, "_current_stream", stream)
    kernel, own = Kernel("x", "out", "M"), torch.device("cpu", 0)
    call = Call((3, 16), torch.bfloat16, own, 3, 0, None, Launch(kernel, [torch.float32, torch.bfloat16, int], {}, own),
                (1, 1))
    for times, first in ((1, 1), (2, 1), (2, 0)):
        current[0] = first
        call(torch.zeros(3, 48), None)
        assert asked == [own] * times and current[0] == first


def counted(device: SimpleNamespace, kept: list[torch.Tensor], count: int = 100) -> torch.Tensor:
    return zeros.zeros_for(CPU, device.stream, count, kept)


def test_a_stream_has_one_set_of_zeros_and_another_stream_another(device: SimpleNamespace) -> None:
    first = counted(device, [])
    assert counted(device, []).data_ptr() == first.data_ptr()
    device.stream = 8
    second = counted(device, [])
    assert second.data_ptr() != first.data_ptr()
    device.stream = 7
    assert counted(device, []).data_ptr() == first.data_ptr()


def test_a_larger_set_takes_the_place_of_one_that_launches_under_way_still_count_in(device: SimpleNamespace) -> None:
    small = weakref.ref(counted(device, []))
    assert counted(device, [], 10_000).numel() >= 10_000
    gc.collect()
    assert small() is not None


def test_launches_of_graphs_share_zeros_with_nobody_and_their_owner_keeps_them(device: SimpleNamespace) -> None:
    eager, kept = counted(device, []), []
    device.capturing = True
    ranges = []
    for _ in range(50):
        found = counted(device, kept, 33)
        ranges.append((found.data_ptr(), found.data_ptr() + 4 * found.numel()))
    ranges.append((eager.data_ptr(), eager.data_ptr() + 4 * eager.numel()))
    ranges.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
    assert len(kept) == 50


def test_a_slab_that_runs_low_is_replaced_at_the_next_call_outside_of_a_graph(device: SimpleNamespace) -> None:
    counted(device, [])
    kept: list[torch.Tensor] = []
    device.capturing = True
    for _ in range(3):  # three quarters of it
        counted(device, kept, zeros._SLAB // 4)
    slab = kept[0].untyped_storage().data_ptr()
    device.capturing = False
    counted(device, [])
    device.capturing = True
    counted(device, kept, zeros._SLAB // 2)
    assert kept[3].untyped_storage().data_ptr() != slab
    beyond = counted(device, kept, zeros._SLAB)  # too much for the slab: cleared inside of the graph
    assert beyond.numel() == zeros._SLAB and len(kept) == 4


def test_before_any_call_a_graph_clears_zeros_of_its_own(device: SimpleNamespace) -> None:
    device.capturing = True
    first, second = counted(device, []), counted(device, [])
    assert first.data_ptr() != second.data_ptr() and not bool(first.any())


# --- on a GPU -----------------------------------------------------------------------------------------------------------


@cache
def this_gpu() -> Platform:
    return detect("cuda")


def layer_of(name: str, n: int, k: int, device: str = "cuda", *, bias: bool = False) -> AnybitLinear:
    plain = dense("bfloat16")
    scheme = plain if name == "none" else quantizer(name).scheme_of(Layer("layer", "linear", (n, k), plain))
    choice = choose(Request("linear", scheme, (n, k), "bfloat16"), this_gpu())
    assert isinstance(choice, Choice)
    weight = sample_weight(scheme, (n, k), device=device)
    ours = {"decode": "triton-skinny", "small": "triton-skinny", "prefill": "torch-dense"}  # torch's own may be planned
    stored = implementation(choice.spec).prepare(weight, torch.bfloat16, ours if name == "none" else choice.names)
    product = product_of(weight, stored, device)
    if bias:
        product.bias = torch.randn(n, device=device, dtype=torch.bfloat16)
    return AnybitLinear(product)


def through_triton(call: Callable[[], torch.Tensor], launches: list[object]) -> torch.Tensor:
    """A call with a launch hook installed, which makes every launch Triton's own; what the hook was told."""
    from triton import knobs

    hook = launches.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        return call()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 100])
def test_past_the_launcher_the_bits_are_those_of_tritons_launch(name: str, m: int) -> None:
    torch.manual_seed(m)
    layer = layer_of(name, 328, 1000 if name == "none" else 1024, bias=m == 7)
    k = layer.in_features
    wide = torch.randn(m, k + 24, device="cuda", dtype=torch.bfloat16)
    inputs = {"contiguous": wide[:, :k].contiguous(), "rows apart": wide[:, 8 : k + 8], "unaligned": wide[:, 3 : k + 3],
              "columns apart": wide.T.contiguous().T[:, :k], "of three dimensions": wide[None, :, :k].contiguous(),
              "of three dimensions, rows apart": wide[None, :, 8 : k + 8]}
    launches: list[object] = []
    with torch.inference_mode():
        for form, x in inputs.items():
            layer.product(x)
            past = layer.product(x)  # the second call goes past the launcher
            poison = torch.full((m, 328), float("nan"), device="cuda", dtype=torch.bfloat16)
            del poison
            assert torch.equal(past, through_triton(lambda x=x: layer.product(x), launches)), form
            assert past.shape == (*x.shape[:-1], 328)
    assert launches or (name == "none" and m > 64)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_the_second_call_goes_past_the_launcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(name, 256, 2048)
    x = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        wanted = layer(x)

        def refuse(*_: object) -> None:
            raise AssertionError("went through Triton's launcher")

        monkeypatch.setattr(Launch, "_by_triton", refuse)
        assert torch.equal(layer(x), wanted)


def blocked(streams: list[torch.cuda.Stream]) -> None:
    """Holds the streams up until much has been queued, so that they run at once then."""
    torch.cuda._sleep(40_000_000)
    held = torch.cuda.Event()
    held.record()
    for stream in streams:
        stream.wait_event(held)


def differences(runs: list[tuple[torch.cuda.Stream, Callable[[], torch.Tensor]]], wanted: list[torch.Tensor],
                times: int) -> int:
    """How many of the results that streams computed at once are not the wanted bits."""
    torch.cuda.synchronize()
    blocked([stream for stream, _ in runs])
    results: list[list[torch.Tensor]] = [[] for _ in runs]
    for _ in range(times):
        for (stream, call), found in zip(runs, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    return sum(not torch.equal(y, right) for found, right in zip(results, wanted, strict=True) for y in found)


SPLIT = ("none", "int4_g128", "nvfp4", "fp8_per_channel", "int8_per_channel")  # 256 rows: K is split


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", SPLIT)
def test_one_layer_runs_on_two_streams_at_once(name: str) -> None:
    layer = layer_of(name, 256, 8192)
    xs = [torch.randn(1, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    with torch.inference_mode():
        wanted = [layer(x) for x in xs]
        streams = [torch.cuda.Stream() for _ in xs]
        runs = [(stream, lambda x=x: layer(x)) for stream, x in zip(streams, xs, strict=True)]
        assert sum(differences(runs, wanted, 200) for _ in range(5)) == 0


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", SPLIT)
def test_graphs_are_replayed_beside_eager_calls_and_each_other(name: str) -> None:
    layer = layer_of(name, 256, 8192)
    xs = [torch.randn(1, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    with torch.inference_mode():
        wanted = [layer(x) for x in xs]
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        results = []
        for graph, x in zip(graphs, xs, strict=False):  # nothing is called between the captures
            with torch.cuda.graph(graph):
                results.append([layer(x) for _ in range(40)])
        streams = [torch.cuda.Stream() for _ in xs]

        def replayed(i: int) -> torch.Tensor:
            graphs[i].replay()
            return torch.stack(results[i])

        runs = [(streams[0], lambda: replayed(0)), (streams[1], lambda: replayed(1)),
                (streams[2], lambda: torch.stack([layer(xs[2]) for _ in range(40)]))]
        assert differences(runs, [w.expand(40, *w.shape) for w in wanted], 20) == 0


@on_gpu
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_runs_on_its_own_device_whichever_is_the_current_one(name: str) -> None:
    layer = layer_of(name, 256, 2048, "cuda:1")
    x = torch.randn(3, 2048, device="cuda:1", dtype=torch.bfloat16)
    with torch.inference_mode():
        with torch.cuda.device(1):
            wanted = layer(x)
        for current in (0, 1, 0):
            with torch.cuda.device(current):
                assert torch.equal(layer(x), wanted)
                assert torch.cuda.current_device() == current


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEMES)
def test_a_compiled_layer_is_one_graph(name: str) -> None:
    layer = layer_of(name, 256, 2048)
    x = torch.randn(3, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        compiled = torch.compile(lambda x: layer(x * 2) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x * 2) + 1)
        assert layer(x[:0]).shape == (0, 256)
        assert regime_of(3) == "decode"


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", SPLIT)
def test_a_compiler_may_record_a_layer_into_graphs_of_its_own(name: str) -> None:
    layer = layer_of(name, 256, 8192)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        for _ in range(4):  # warmed up, recorded, replayed twice
            x = torch.randn(3, 8192, device="cuda", dtype=torch.bfloat16)
            assert torch.equal(compiled(x).clone(), layer(x))
