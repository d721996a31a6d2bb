"""`anybit tune`: measure the kernels of this machine, so that plans need not model them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from anybit.checkpoints.online import quantizer
from anybit.cli import options
from anybit.cli.output import Output, counted, duration, make_output, shown
from anybit.errors import Unsupported
from anybit.kernels.request import REGIMES, regime_of
from anybit.planning import measured
from anybit.platforms import Platform, detect
from anybit.schemes import Layer, Scheme, dense

if TYPE_CHECKING:
    from anybit.hosts.tuning import Timing

_SHAPE = re.compile(r"(\d+)x(\d+):(.+)")


@dataclass(frozen=True)
class Subject:
    """A scheme and shape (N, K) to measure."""

    scheme: Scheme
    shape: tuple[int, int]


def tune(
    what: Annotated[
        list[str], typer.Argument(metavar="MODEL|NxK:SCHEME ...", show_default=False,
                                  help="a model, or shapes with an online scheme: 4096x14336:nvfp4")
    ],
    device: options.Device = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure every capable kernel on the layers of a model; plans on this machine then use the times.

    A kernel is checked against the float64 product before it is timed; a wrong one is disqualified by name.

    anybit tune smollm2

    anybit tune 4096x14336:int4_g128 4096x14336:nvfp4 --device cuda --dtype bfloat16
    """
    from anybit.hosts.tuning import measure
    from anybit.kernels.trials import sample_weight

    output = make_output("json" if json else "quiet" if quiet else "human")
    platform = detect(device or "auto")
    name = dtype or ("float32" if platform.vendor == "cpu" else "bfloat16")
    known = measured.read(platform)
    for remark in known.remarks:
        output.warning(remark)
    place = options.torch_device(device, platform)
    timings: list[Timing] = []
    subjects = list(dict.fromkeys(subject for text in what for subject in _subjects(text)))
    with output.progress("measuring", len(subjects), unit="layers") as advance:
        for subject in subjects:
            weight = sample_weight(subject.scheme, subject.shape)
            tokens = [priced for _, priced in REGIMES.values()]
            timings += measure(weight, platform, place, name, tokens)
            advance(1)
    _keep(platform, known, timings)
    if json:
        output.document("tune", {"platform": platform.to_dict(), "file": str(measured.path_of(platform)),
                                 "timings": [t.to_dict() for t in timings]})
        return
    _print(output, timings)
    output.line(f"{counted(len(timings), 'time')} kept in {measured.path_of(platform)}")


def _subjects(text: str) -> Iterator[Subject]:
    """The distinct schemes and shapes of a model's linear layers, or the one that NxK:SCHEME names."""
    from anybit.checkpoints import open as open_checkpoint

    matched = _SHAPE.fullmatch(text)
    if matched:
        rows, columns, name = matched.groups()
        shape = (int(rows), int(columns))
        if min(shape) < 1 or shape[0] * shape[1] > 2**32:
            raise Unsupported("no such shape", where=text, found=f"{rows} x {columns}", wanted="N and K of a layer")
        made = quantizer(name).scheme_of(Layer(text, "linear", shape, dense("bfloat16")))
        yield Subject(made or dense("bfloat16"), shape)
        return
    for layer in open_checkpoint(text).layers.values():
        if layer.kind != "embedding":
            yield Subject(layer.scheme, (layer.shape[-2], layer.shape[-1]))


def _keep(platform: Platform, known: measured.Measured, timings: list[Timing]) -> None:
    for timing in timings:
        if timing.fault:
            known.disproved[timing.kernel, timing.scheme] = timing.fault
        else:
            cell = (timing.kernel, timing.scheme, *timing.shape, timing.dtype, regime_of(timing.tokens))
            known.seconds[cell] = timing.seconds
    measured.write(platform, known)


def _print(output: Output, timings: list[Timing]) -> None:
    rows = [("m", "n", "k", "scheme", "kernel", "time", "match")]
    for timing in timings:
        n, k = timing.shape
        took = timing.fault if timing.fault else duration(timing.seconds)
        rows.append((str(timing.tokens), str(n), str(k), shown(timing.scheme), timing.kernel, shown(took),
                     "WRONG" if timing.fault else f"{timing.relative:.1e}"))
    output.rows(rows, indent=0, right=(0, 1, 2))
