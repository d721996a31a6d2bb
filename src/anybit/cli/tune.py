"""`anybit tune`: measure the kernels of this machine, so that plans need not model them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import typer

from anybit.checkpoints.online import quantizer
from anybit.cli import options
from anybit.cli.bench_kernels import finite, numbers
from anybit.cli.output import Output, counted, duration, make_output, shown
from anybit.errors import Unsupported
from anybit.kernels.request import BUCKETS, Request
from anybit.planning import measured
from anybit.planning.choose import Choice, Policy, choose
from anybit.planning.regret import Regret, regrets, worst
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


# M at which kernels are timed: on a GPU those of every bucket, on a CPU the others are interpolated
TOKENS: Final = {"cpu": "1,16,64,512"}
ALL_TOKENS: Final = ",".join(str(priced) for _, priced in BUCKETS)


def tune(
    what: Annotated[
        list[str], typer.Argument(metavar="MODEL|NxK:SCHEME ...", show_default=False,
                                  help="a model, or shapes with an online scheme: 4096x14336:nvfp4")
    ],
    device: options.Device = None,
    dtype: options.Dtype = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="M", help="rows of x, with commas",
                                 rich_help_panel=options.CHOICE, show_default="those that plans price")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="keep nothing; fail where the plan's kernel is over 5 % slower than the "
                           "best of its layout", rich_help_panel=options.CHOICE)
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure every capable kernel on the layers of a model; plans on this machine then use the times.

    A kernel is checked against the float64 product before it is timed; a wrong one is disqualified by name. Printed
    beside the times: what the plan runs, the best kernel of its layout and of others, what the choice loses to them.

    anybit tune smollm2

    anybit tune 4096x14336:int4_g128 4096x14336:nvfp4 --device cuda --dtype bfloat16

    anybit tune smollm2 --check
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    platform = detect(device or "auto")
    name = dtype or ("float32" if platform.vendor == "cpu" else "bfloat16")
    known = measured.read(platform)
    for remark in known.remarks:
        output.warning(remark)
    subjects = list(dict.fromkeys(subject for text in what for subject in _subjects(text)))
    counts = numbers(tokens or TOKENS.get(platform.vendor, ALL_TOKENS))
    device = options.torch_device(device, platform)
    timings = _timings(output, subjects, platform, device, name, counts, known)
    if not check:
        known.schemes |= {str(subject.scheme): subject.scheme for subject in subjects}
        _keep(platform, known, timings)
    found = [regret for subject in subjects for regret in _regrets(subject, platform, name, known, timings)]
    if json:
        output.document("tune", {"platform": platform.to_dict(), "file": str(measured.path_of(platform)),
                                 "is_kept": not check, "timings": [finite(t.to_dict()) for t in timings],
                                 "choices": [regret.to_dict() for regret in found], "worst_regret": worst(found)})
    else:
        _print(output, timings)
        _print_choices(output, found)
        kept = "nothing is kept (--check)" if check else f"kept in {measured.path_of(platform)}"
        output.line(f"{counted(len(timings), 'time')} {kept}")
    wrong = [t for t in timings if t.fault] if check else []
    if check and (wrong or not all(regret.is_allowed for regret in found)):
        raise typer.Exit(1)


def _timings(
    output: Output, subjects: list[Subject], platform: Platform, device: str, dtype: str, tokens: list[int],
    known: measured.Measured,
) -> list[Timing]:
    from anybit.hosts.tuning import measure
    from anybit.hosts.warming import tasks_of, warm, workers_for
    from anybit.kernels.trials import sample_weight

    timings: list[Timing] = []
    if platform.vendor != "cpu":
        tasks = tasks_of([(subject.scheme, subject.shape) for subject in subjects], platform, dtype, tokens)
        warm(tasks, device, workers_for(len(tasks)))
    with output.progress("measuring", len(subjects), unit="layers") as advance:
        for subject in subjects:
            weight = sample_weight(subject.scheme, subject.shape)
            choice = choose(_asked(subject, dtype), platform, policy=_policy(known, dtype))
            planned = choice.names.used if isinstance(choice, Choice) else ()
            timings += measure(weight, platform, device, dtype, tokens, always=planned)
            advance(1)
    return timings


def _regrets(
    subject: Subject, platform: Platform, dtype: str, known: measured.Measured, timings: list[Timing]
) -> list[Regret]:
    """What the plan loses on a layer, as it stands by what is known."""
    times: dict[int, dict[str, float]] = {}
    for timing in timings:
        if (timing.scheme, timing.shape) == (str(subject.scheme), subject.shape) and not timing.fault:
            times.setdefault(timing.tokens, {})[timing.kernel] = timing.seconds
    return list(regrets(_asked(subject, dtype), platform, _policy(known, dtype), times))


def _asked(subject: Subject, dtype: str) -> Request:
    return Request("linear", subject.scheme, subject.shape, dtype)


def _policy(known: measured.Measured, dtype: str) -> Policy:
    return known.policy(dtype)


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
            cell = (timing.kernel, timing.scheme, *timing.shape, timing.dtype, timing.tokens)
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


def _print_choices(output: Output, found: list[Regret]) -> None:
    rows = [("m", "n", "k", "scheme", "runs", "best of its layout", "lost", "best of others", "lost")]
    for regret in found:
        n, k = regret.request.shape
        other = "" if regret.other is None else f"{regret.other[0]} {duration(regret.other[1])}"
        rows.append((str(regret.request.tokens), str(n), str(k), shown(regret.request.scheme), regret.chosen[0],
                     f"{regret.best[0]} {duration(regret.best[1])}", _lost(regret.within), other,
                     _lost(regret.against_others)))
    if len(rows) > 1:
        output.line()
        output.rows(rows, indent=0, right=(0, 1, 2, 6, 8))


def _lost(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
