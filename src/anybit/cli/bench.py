"""`anybit bench`: speed of single kernels by shape, and of decoding with a whole model of random weights."""

from __future__ import annotations

import json as json_module
import os
import platform as host
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from anybit.cli import options
from anybit.cli.bench_kernels import Wanted, kernel_rows, numbers, random_shapes, shapes_of
from anybit.cli.output import make_output
from anybit.errors import Unsupported
from anybit.planning import measured
from anybit.planning.choose import demand_known
from anybit.platforms import Platform, detect

# (K, N): attention and feed-forward layers of models of 8 and 70 billion weights
SHAPES: Final = "4096x6144,14336x4096,4096x28672,8192x57344"
TOKENS: Final = "1,16,64,256,1024,4096"
SCHEMES: Final = "int4_g128,int4_g32_asym,mxfp4_a16,nvfp4_a16,nvfp4,fp8_per_channel,fp8_per_block,int8_per_channel," \
    "int8_asym"


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
    random: Annotated[
        int, typer.Option("--random-shapes", metavar="COUNT", min=0, max=64, help="beside --shapes, sizes of the dice",
                          rich_help_panel=options.CHOICE)
    ] = 0,
    seed: Annotated[
        int, typer.Option("--seed", help="of the random shapes", rich_help_panel=options.CHOICE)
    ] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="COUNT", min=0, max=256, help="processes that compile beforehand",
                                 rich_help_panel=options.CHOICE, show_default="as many as pay on a GPU")
    ] = None,
    stop_after: Annotated[
        float | None, typer.Option("--stop-after", metavar="SECONDS", min=1.0, help="begin no layer later than this",
                                   rich_help_panel=options.CHOICE, show_default=False)
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

    Every kernel is compared with the float64 product first; a wrong one is not timed. Kernel and unquantized product
    are timed in turn, three times.

    anybit bench kernels --schemes nvfp4,int4_g128 --tokens 1,16

    anybit bench kernels --random-shapes 3 --seed 7 --write results.json

    anybit bench model --schemes none,nvfp4,int4_g128,fp8_per_channel
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    say = (lambda text: None) if json else output.line
    platform = detect(device or "auto")
    place = options.torch_device(device, platform)
    kind = dtype or ("float32" if platform.vendor == "cpu" else "bfloat16")
    names = [name.strip() for name in schemes.split(",") if name.strip()]
    head: dict[str, Any] = {
        "what": what, "machine": machine(platform), "dtype": kind, "date": datetime.now(UTC).date().isoformat(),
        "command": f"anybit bench {what} --schemes {schemes} --dtype {kind}",
    }

    def keep(found: dict[str, Any]) -> dict[str, Any]:
        document = {**head, **found}
        if write is not None:
            write.write_text(json_module.dumps(document, indent=1) + "\n")
        return document

    if what == "kernels":
        wanted = [k.strip() for k in kernel.split(",")] if kernel else None
        for name in wanted or ():
            demand_known(name)
        sizes = tuple(dict.fromkeys([*shapes_of(shapes), *random_shapes(random, seed)]))
        asked = Wanted(platform, place, kind, tuple(names), sizes, tuple(numbers(tokens)), wanted, workers, stop_after)
        head["command"] += f" --shapes {','.join(f'{k}x{n}' for n, k in sizes)} --tokens {tokens}"
        found = kernel_rows(asked, say, keep, output.warning)
    else:
        found = _model(say, platform, place, kind, names, config, compiled=compiled)
    document = keep(found)
    if json:
        output.document("bench", document)


def machine(platform: Platform) -> dict[str, Any]:
    """What a figure depends on."""
    return {**measured.key_of(platform), "python": host.python_version(), "cores": platform.cores or os.cpu_count()}


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
