"""`anybit fit`: does a model fit a device, how else would it, and how fast could it run? Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

import anybit
from anybit.checkpoints.online import online
from anybit.cli import options
from anybit.cli.folding import part_names
from anybit.cli.output import Output, make_output, shown, size
from anybit.planning.cuts import TensorParallel
from anybit.planning.fit import Fit, fit


def fit_command(
    model: options.Model,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="PLATFORM", help="one or more, with commas: cpu, h100, mi300x, ...",
                     rich_help_panel=options.CHOICE, show_default="this machine"),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", min=1, max=100_000_000, help="tokens of each sequence",
                          rich_help_panel=options.CHOICE)
    ] = 4096,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=1_000_000, help="sequences at a time", rich_help_panel=options.CHOICE)
    ] = 1,
    quantization: options.Quantization = None,
    quantize_only: options.QuantizeOnly = None,
    quantize_ignore: options.QuantizeIgnore = None,
    dtype: options.Dtype = None,
    kernel: options.Kernel = None,
    kv_cache: options.KVCache = "auto",
    strict: options.Strict = False,
    batch_invariant: options.BatchInvariant = False,
    plan: options.PlanFile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Whether and how a model fits: memory, devices, offload, tensor-parallel sizes, and a roofline of its speed.

    anybit fit ./qwen3-32b-awq --on rtx4090,mi300x --context 32768

    anybit fit smollm2 --on cpu --batch 16 --json

    anybit fit ./qwen3-8b --quantization nvfp4 --kv-cache none --batch-invariant
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    checkpoint = anybit.open(model)
    asked = online(quantization, quantize_only, quantize_ignore)
    answers = []
    for name in options.platform_names(on):
        made = anybit.plan(checkpoint, name, dtype=dtype, quantization=asked, kernel=kernel, kv_cache=kv_cache,
                           strict=strict, batch_invariant=batch_invariant, plan=plan)
        made.demand_complete()
        answers.append(fit(made, checkpoint.layers, checkpoint.config, context, batch))
    if json:
        output.document("fit", {"model": model, "answers": [answer.to_dict() for answer in answers]})
        return
    output.line(f"{shown(model)} · {answers[0].plan.dialect} · {context:,} tokens x {batch}")
    if len(answers) > 1:
        output.line()
        _table(output, answers)
    for answer in answers:
        output.line()
        output.line(_verdict(answer))
        output.rows(list(_rows(answer)))
    output.line()
    output.line("tensor parallel, on any of them" if len(answers) > 1 else "tensor parallel")
    output.rows([(str(row.size), _parallel_words(row)) for row in answers[0].parallel])


def _table(output: Output, answers: list[Fit]) -> None:
    rows = [("platform", "fits", "needed", "usable", "devices", "largest context", "decode", "prefill")]
    for a in answers:
        rows.append((shown(a.plan.platform.name), "yes" if a.fits else "no", size(a.needed), size(a.available),
                     str(a.devices or "more than 16"), f"{a.most_context:,}", _rate(a.decode), _rate(a.prefill)))
    output.rows(rows, right=(2, 3, 4, 5, 6, 7))


def _rate(tokens_per_second: float | None) -> str:
    return "-" if tokens_per_second is None else f"{tokens_per_second:,.0f} tok/s"


def _verdict(answer: Fit) -> str:
    title = shown(answer.plan.platform.title)
    if answer.fits:
        return f"on {title}: fits, {size(answer.available - answer.needed)} to spare"
    return f"on {title}: does not fit, {size(answer.needed - answer.available)} too much"


def _rows(answer: Fit) -> Iterator[tuple[str, ...]]:
    memory = answer.plan.memory
    yield "needs", (f"{size(answer.needed)} of {size(answer.available)}: weights {size(memory.weights)} "
                    f"({size(memory.checkpoint)} before repacking), plain tensors {size(memory.plain)}, "
                    f"cache {size(memory.cache(answer.context, answer.batch))}, workspace {size(memory.workspace)}")
    if memory.cache_per_token:
        own = f"; the model's own limit is {answer.own_context:,}" if answer.own_context else ""
        yield "context", f"up to {answer.most_context:,} tokens for each of {answer.batch}{own}"
    if not answer.fits:
        found = f"{answer.devices} of them hold it"
        yield "devices", found if answer.devices else "no tensor-parallel size up to 16 holds it"
        yield "offload", _offload_words(answer)
    if answer.decode is not None and answer.prefill is not None:
        yield "speed", (f"at most {answer.decode:,.1f} tokens/s decoding, {answer.prefill:,.0f} tokens/s reading a "
                        "prompt")
    for i, layer in enumerate(answer.largest[:3]):
        shape = " x ".join(map(str, layer.shape))
        yield "largest" if i == 0 else "", (f"{size(layer.bytes_each)} each: {shown(part_names(list(layer.layers)))} "
                                            f"[{shape}] {shown(layer.scheme)}")
    for i, text in enumerate(answer.assumptions):
        yield "assumed" if i == 0 else "", text


def _offload_words(answer: Fit) -> str:
    found = answer.offload
    if answer.plan.platform.vendor == "cpu":
        return "none: a CPU's memory is the host's"
    if found is None:
        return "not even with every block on the host"
    what = "the experts of" if found.kind == "experts" else ""
    return (f"{what} {found.count} of {found.of} blocks on the host ({size(found.host_bytes)}), "
            f"{size(found.bytes_a_token)} sent for a token").strip()


def _parallel_words(row: TensorParallel) -> str:
    told = []
    for obstacle in row.obstacles:
        where = f" ({shown(part_names(list(obstacle.layers)))})" if obstacle.layers else ""
        told.append(f"{obstacle.text}{where}")
    return ("divides" if row.divides else "does not divide") + (": " + "; ".join(told) if told else "")
