"""Options that several commands share, named with the words of the vocabulary."""

from __future__ import annotations

from typing import Annotated

import typer

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
    typer.Option("--quantization", metavar="SCHEME", help="quantize the weights while loading: nvfp4, mxfp4, "
                 "fp8_per_channel, int8_per_channel, int4_g128, ...", rich_help_panel=CHOICE, show_default=False),
]
Kernel = Annotated[
    str | None,
    typer.Option("--kernel", help="use this kernel, or say why it cannot run", rich_help_panel=CHOICE,
                 show_default="the cheapest"),
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
