"""`anybit eval`: bits per byte and perplexity of a text, for one or several quantizations of a model."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybit.checkpoints import Checkpoint
from anybit.checkpoints.online import online, online_list
from anybit.cli import options
from anybit.cli.folding import bits
from anybit.cli.loading import Choices, load, open_for_running, warm_up
from anybit.cli.output import Output, make_output, shown
from anybit.errors import Inconsistent, LimitExceeded
from anybit.kernels.request import scale_bytes
from anybit.limits import MAX_PROMPT_BYTES
from anybit.planning.plan import Plan

if TYPE_CHECKING:
    from anybit.hosts.evaluating import Evaluation

_NONE = "none"  # the checkpoint as it is


@dataclass(frozen=True)
class Result:
    """One row: a quantization, what its layers take, and how well it predicts the text."""

    quantization: str
    dtype: str
    bits_per_weight: float
    evaluation: Evaluation
    seconds: float


def evaluate(
    model: options.Model,
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="a UTF-8 text", rich_help_panel=options.INPUT,
                           show_default=False)
    ],
    window: Annotated[
        int, typer.Option("--window", min=2, max=1_000_000, help="tokens in a window", rich_help_panel=options.INPUT)
    ] = 512,
    limit_windows: Annotated[
        int | None, typer.Option("--limit-windows", min=1, help="use the first so many", rich_help_panel=options.INPUT,
                                 show_default="all")
    ] = None,
    quantization: Annotated[
        list[str] | None,
        typer.Option("--quantization", metavar="SCHEME[,RULE=SCHEME...]", help="one or more, with commas or repeated; "
                     "none is the checkpoint as it is", rich_help_panel=options.CHOICE, show_default=_NONE),
    ] = None,
    quantize_only: options.QuantizeOnly = None,
    quantize_ignore: options.QuantizeIgnore = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    kernel: options.Kernel = None,
    kv_cache: options.KVCache = "auto",
    strict: options.Strict = False,
    batch_invariant: options.BatchInvariant = False,
    plan: options.PlanFile = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """How well a model predicts a text: bits per byte, perplexity, and what a quantization costs.

    anybit eval smollm2 --text book.txt

    anybit eval smollm2 --text book.txt --quantization none,fp8_per_channel,int4_g128,nvfp4

    anybit eval ./model --text book.txt --quantization 'none,nvfp4,nvfp4,*.down_proj=fp8_per_channel'

    anybit eval ./model --text book.txt --limit-windows 4 --json
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    content = _read(text)
    listed = [recipe for text_ in quantization or [_NONE] for recipe in online_list(text_)]
    recipes = dict.fromkeys(r and online(r, quantize_only, quantize_ignore) for r in listed)
    importing = warm_up()
    checkpoint = open_for_running(model, output)
    importing.join()
    results = []
    for recipe in recipes:
        choices = Choices(device, dtype, recipe, kernel, threads, kv_cache, strict, batch_invariant, plan)
        results.append(_one(checkpoint, choices, content, window, limit_windows, output))
        gc.collect()  # the model before must be gone before the next is read
    if json:
        output.document("eval", _document(model, text, window, results))
        return
    _print(output, results)


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_PROMPT_BYTES:
        raise LimitExceeded("the text is too long", where=str(path), found=f"{path.stat().st_size:,} bytes",
                            wanted=f"at most {MAX_PROMPT_BYTES:,} (MAX_PROMPT_BYTES)", remedy="cut it")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Inconsistent("the text is no UTF-8", where=str(path), found=f"byte {error.start:,}",
                           wanted="UTF-8", remedy="convert it: iconv -t utf-8") from error


def _one(
    checkpoint: Checkpoint, choices: Choices, text: str, window: int, limit: int | None, output: Output
) -> Result:
    from anybit.hosts.evaluating import evaluate_windows, windows_of

    loaded, tokenizer = load(checkpoint, choices, output)
    cut = windows_of(tokenizer, text, window, limit)
    name = str(choices.quantization or _NONE)
    started = time.perf_counter()
    with output.progress(f"evaluating {name}", len(cut.ids), unit="windows") as advance:
        found = evaluate_windows(loaded, cut, lambda _: advance(1))
    plan: Plan = loaded.anybit.plan
    return Result(name, plan.dtype, plan_bits(checkpoint, plan), found, time.perf_counter() - started)


def plan_bits(checkpoint: Checkpoint, plan: Plan) -> float:
    """Bits of a weight over all layers, scales included: as stored, or as its online scheme would store it."""
    stored = elements = 0
    for unit in plan.units:
        for layer in (checkpoint.layers[name] for name in unit.layers):
            quantized = layer.elements * unit.scheme.weight_bits // 8 + scale_bytes(unit.scheme, layer.shape)
            stored += layer.stored_bytes if unit.scheme == unit.declared else quantized
            elements += layer.elements
    return bits(stored, elements)


def _print(output: Output, results: list[Result]) -> None:
    first = results[0].evaluation
    rows = [("quantization", "bits a weight", "bits a byte", "difference", "perplexity", "tokens/s")]
    for result in results:
        found = result.evaluation
        change = found.bits_per_byte / first.bits_per_byte - 1
        difference = "" if result is results[0] else f"{found.bits_per_byte - first.bits_per_byte:+.6f} ({change:+.2%})"
        speed = found.tokens / result.seconds if result.seconds else 0.0
        rows.append((shown(result.quantization), f"{result.bits_per_weight:.2f}", f"{found.bits_per_byte:.6f}",
                     difference, f"{found.perplexity:.4f}", f"{speed:.0f}"))
    output.rows(rows, indent=0, right=(1, 2, 3, 4, 5))
    output.remark(f"{len(first.windows)} windows, {first.tokens:,} tokens scored, {first.text_bytes:,} bytes, "
                  f"activations {results[0].dtype}; the difference is against {results[0].quantization}")


def _document(model: str, text: Path, window: int, results: list[Result]) -> dict[str, Any]:
    return {
        "model": model,
        "text": str(text),
        "window": window,
        "results": [
            {
                "quantization": r.quantization,
                "dtype": r.dtype,
                "bits_per_weight": r.bits_per_weight,
                "bits_per_byte": r.evaluation.bits_per_byte,
                "perplexity": r.evaluation.perplexity,
                "tokens": r.evaluation.tokens,
                "text_bytes": r.evaluation.text_bytes,
                "seconds": r.seconds,
                "windows": [{**asdict(w), "bits_per_byte": w.bits_per_byte} for w in r.evaluation.windows],
            }
            for r in results
        ],
    }
