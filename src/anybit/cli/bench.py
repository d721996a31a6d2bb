"""`anybit bench`: speed of single kernels by shape, and of decoding with a whole model of random weights."""

from __future__ import annotations

import json as json_module
import math
import os
import platform as host
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from anybit.checkpoints.online import quantizer
from anybit.cli import options
from anybit.cli.output import make_output, shown
from anybit.errors import Unsupported
from anybit.planning import measured
from anybit.platforms import Platform, detect
from anybit.schemes import Layer, Scheme, dense

if TYPE_CHECKING:
    from anybit.hosts.tuning import Timing

# (K, N): attention and feed-forward layers of models of 8 and 70 billion weights
SHAPES: Final = "4096x6144,14336x4096,4096x28672,8192x57344"
TOKENS: Final = "1,16,64,256,1024,4096"
SCHEMES: Final = "int4_g128,int4_g32_asym,mxfp4,nvfp4,fp8_per_channel,fp8_per_block,int8_per_channel,int8_asym"
_SHAPE: Final = re.compile(r"(\d+)x(\d+)")


def bench(
    what: Annotated[Literal["kernels", "model"], typer.Argument(help="kernels by shape, or decoding with a model")],
    schemes: Annotated[
        str, typer.Option("--schemes", metavar="NAMES", help="online schemes, with commas; _a16 after a name leaves "
                          "its activations as they are", rich_help_panel=options.CHOICE)
    ] = SCHEMES,
    shapes: Annotated[
        str, typer.Option("--shapes", metavar="KxN", help="of kernels, with commas", rich_help_panel=options.CHOICE)
    ] = SHAPES,
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="M", help="rows of x, with commas", rich_help_panel=options.CHOICE)
    ] = TOKENS,
    kernel: Annotated[
        str | None, typer.Option("--kernel", metavar="NAMES", help="only these kernels, with commas",
                                 rich_help_panel=options.CHOICE, show_default="all that can run")
    ] = None,
    config: Annotated[
        str, typer.Option("--config", help="of the model: llama-8b or llama-1b", rich_help_panel=options.CHOICE)
    ] = "llama-8b",
    compiled: Annotated[
        bool, typer.Option("--compile", help="of the model's step: torch.compile fuses what lies between the products",
                           rich_help_panel=options.CHOICE)
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="keep the results with machine and versions",
                                  rich_help_panel=options.OUTPUT, show_default=False)
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time kernels or a model of random weights on this machine, beside torch's own unquantized product.

    Every kernel is compared with the float64 product first; a wrong one is not timed.

    anybit bench kernels --schemes nvfp4,int4_g128 --tokens 1,16

    anybit bench model --schemes none,nvfp4,int4_g128,fp8_per_channel
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    say = (lambda text: None) if json else output.line
    platform = detect(device or "auto")
    place = options.torch_device(device, platform)
    kind = dtype or ("float32" if platform.vendor == "cpu" else "bfloat16")
    names = [name.strip() for name in schemes.split(",") if name.strip()]
    if what == "kernels":
        wanted = [k.strip() for k in kernel.split(",")] if kernel else None
        found = _kernels(say, platform, place, kind, names, _numbers(shapes), _counts(tokens), wanted)
    else:
        found = _model(say, platform, place, kind, names, config, compiled=compiled)
    document = {"what": what, "machine": machine(platform), "dtype": kind, **found}
    if write is not None:
        write.write_text(json_module.dumps(document, indent=1) + "\n")
    if json:
        output.document("bench", document)


def machine(platform: Platform) -> dict[str, Any]:
    """What a figure depends on."""
    return {**measured.key_of(platform), "python": host.python_version(), "cores": platform.cores or os.cpu_count()}


def _numbers(text: str) -> list[tuple[int, int]]:
    """(N, K) of every KxN."""
    found = []
    for part in text.split(","):
        matched = _SHAPE.fullmatch(part.strip())
        if matched is None:
            raise Unsupported("no such shape", found=part, wanted="KxN, for example 4096x6144")
        found.append((int(matched[2]), int(matched[1])))
    return found


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise Unsupported("no such number of tokens", found=text, wanted="numbers with commas: 1,16,256") from error


def scheme_named(name: str, shape: tuple[int, int]) -> Scheme:
    """The scheme that an online name gives a layer of this shape; "none" is a layer that is not quantized."""
    if name == "none":
        return dense("bfloat16")
    made = quantizer(name).scheme_of(Layer(name, "linear", shape, dense("bfloat16")))
    if made is None:
        raise Unsupported(f"{name} leaves a layer of {shape[0]} x {shape[1]} as it is", found=name,
                          wanted="a scheme that fits the shape")
    return made


def _kernels(
    say: Callable[[str], None], platform: Platform, device: str, dtype: str, names: list[str],
    shapes: list[tuple[int, int]], tokens: list[int], wanted: list[str] | None,
) -> dict[str, Any]:
    from anybit.hosts.tuning import copy_bandwidth, dense_timings, floor_seconds, measure
    from anybit.kernels.trials import sample_weight

    bandwidth = copy_bandwidth(device)
    say(f"memory {bandwidth / 1e9:.0f} GB/s (a copy), on {shown(platform.title)}, activations {dtype}")
    say("m n k · scheme · kernel · µs · TFLOP/s · GB/s · share of the streaming floor · × unquantized · match")
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        base = dense_timings(shape, platform, device, dtype, tokens)
        for name in names:
            scheme = scheme_named(name, shape)
            weight = sample_weight(scheme, shape, device=device)
            floor = floor_seconds(scheme, shape, 1, dtype, bandwidth)
            for timing in measure(weight, platform, device, dtype, tokens, wanted, floor):
                floor_here = floor_seconds(scheme, shape, timing.tokens, dtype, bandwidth)
                row = _row(timing, name, floor_here, base.get(timing.tokens, math.nan), bandwidth)
                rows.append(row)
                say(_line(row))
            del weight
    return {"copy_bytes_per_second": bandwidth, "rows": rows}


def _row(timing: Timing, name: str, floor: float, base: float, bandwidth: float) -> dict[str, Any]:
    return {**timing.to_dict(), "name": name, "floor_seconds": floor, "unquantized_seconds": base,
            "times_unquantized": base / timing.seconds, "share_of_floor": floor / timing.seconds,
            "flop_per_second": timing.flops / timing.seconds, "bytes_per_second": floor * bandwidth / timing.seconds}


def _line(row: dict[str, Any]) -> str:
    n, k = row["shape"]
    head = f"{row['tokens']} {n} {k} · {row['name']} · {row['kernel']}"
    if row["fault"]:
        return f"{head} · WRONG: {shown(row['fault'])}"
    return (f"{head} · {row['seconds'] * 1e6:.1f} · {row['flop_per_second'] / 1e12:.2f} · "
            f"{row['bytes_per_second'] / 1e9:.0f} · {row['share_of_floor']:.0%} · × {row['times_unquantized']:.2f} · "
            f"{row['relative_error']:.1e}")


def _model(
    say: Callable[[str], None], platform: Platform, device: str, dtype: str, names: list[str], config: str,
    *, compiled: bool,
) -> dict[str, Any]:
    from anybit.hosts.benching import CONFIGS, decode_speed

    if config not in CONFIGS:
        raise Unsupported(f"no model configuration is called {config!r}", wanted=", ".join(CONFIGS))
    rows = []
    for name in names:
        row = decode_speed(config, None if name == "none" else name, platform, device, dtype,
                           compiled=compiled)
        rows.append(row)
        first = rows[0]["tokens_per_second"]
        say(f"{config} · {name} · {row['tokens_per_second']:.1f} tokens/s · "
            f"{row['held_bytes'] / 2**30:.2f} GiB (predicted {row['predicted_bytes'] / 2**30:.2f}) · "
            f"{row['share_of_floor']:.0%} of the streaming floor · × {row['tokens_per_second'] / first:.2f} · "
            f"predicted {row['predicted_tokens_per_second']:.1f} tokens/s")
    return {"config": config, "rows": rows}
