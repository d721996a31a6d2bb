"""Options that several commands share, named with the words of the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anybit.errors import Unsupported
from anybit.platforms import Platform

INPUT = "Input"
CHOICE = "Choice"
SAMPLING = "Sampling"
OUTPUT = "Output"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="smollm2, a folder, a .gguf file, or a hub id", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="one document with stable keys", rich_help_panel=OUTPUT)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="results only", rich_help_panel=OUTPUT)]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="of activations: float32, bfloat16, float16", rich_help_panel=CHOICE,
                 show_default="float32 on a CPU, the model's own on a GPU"),
]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", metavar="SCHEME[,RULE=SCHEME...]", help="quantize the weights while loading: "
                 "nvfp4, mxfp4, fp8_per_channel, int8_per_channel, int4_g128, ...; RULE=SCHEME for some layers, none "
                 "leaves them", rich_help_panel=CHOICE, show_default=False),
]
QuantizeOnly = Annotated[
    list[str] | None,
    typer.Option("--quantize-only", metavar="RULE", help="quantize these layers and no others: a module's name, "
                 "Linear, Embedding, experts, re:PATTERN; repeatable", rich_help_panel=CHOICE, show_default=False),
]
QuantizeIgnore = Annotated[
    list[str] | None,
    typer.Option("--quantize-ignore", metavar="RULE", help="leave these layers as they are; repeatable",
                 rich_help_panel=CHOICE, show_default=False),
]
Kernel = Annotated[
    list[str] | None,
    typer.Option("--kernel", metavar="[LAYERS=]NAME", help="use this kernel, or say why it cannot run: NAME, "
                 "linear=NAME, MODULE=NAME or re:PATTERN=NAME; repeatable", rich_help_panel=CHOICE,
                 show_default="the cheapest, or what ANYBIT_KERNEL says"),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="refuse to run any layer otherwise than the checkpoint declares",
                 rich_help_panel=CHOICE),
]
BatchInvariant = Annotated[
    bool,
    typer.Option("--batch-invariant", help="one kernel for any number of tokens: a row's product is the same bits in "
                 "every batch", rich_help_panel=CHOICE),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="exactly the kernels of this plan (from explain --save), or a refusal "
                 "that lists what differs", rich_help_panel=CHOICE, show_default=False),
]
KVCache = Annotated[
    str,
    typer.Option("--kv-cache", metavar="auto|none", help="a quantized key-value cache that the checkpoint declares: "
                 "carried out, or left as it is", rich_help_panel=CHOICE),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1", rich_help_panel=CHOICE, show_default="a GPU where there is one"),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=4096, help="of the CPU", rich_help_panel=CHOICE, show_default="one a core"),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, max=10_000_000, help="stop after so many", rich_help_panel=SAMPLING)
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, max=100.0, help="0 takes the likeliest token",
                        rich_help_panel=SAMPLING)
]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="keep the likeliest tokens of this share",
                        rich_help_panel=SAMPLING)
]
TopK = Annotated[
    int, typer.Option("--top-k", min=0, help="keep so many likeliest tokens; 0 keeps all", rich_help_panel=SAMPLING)
]
Seed = Annotated[
    int | None, typer.Option("--seed", min=0, max=2**63 - 1, help="of sampling", rich_help_panel=SAMPLING,
                             show_default="a new one each time")
]
System = Annotated[
    str | None, typer.Option("--system", help="the system message", rich_help_panel=INPUT, show_default=False)
]


def platform_names(on: str | None) -> list[str | None]:
    """The names of --on, [None] (this machine) where it was not given. Raises Unsupported for nothing but commas."""
    if on is None:
        return [None]
    names: list[str | None] = [name for part in on.split(",") if (name := part.strip())]
    if not names:
        raise Unsupported("--on names no platform", found=repr(on), wanted="one or more, with commas",
                          remedy="--on mi300x,h100")
    return names


def torch_device(device: str | None, platform: Platform) -> str:
    """What torch calls the device that --device asked for, or that was found."""
    if device is not None and device != "auto":
        return device
    return "cpu" if platform.vendor == "cpu" else "cuda"
