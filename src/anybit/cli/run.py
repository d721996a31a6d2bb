"""`anybit run`: one prompt, one streamed answer."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anybit.checkpoints.online import online
from anybit.cli import options
from anybit.cli.explain import summary
from anybit.cli.loading import Choices, load, open_for_running, print_summary, warm_up
from anybit.cli.output import Output, make_output, size
from anybit.errors import LimitExceeded, Unsupported
from anybit.limits import MAX_PROMPT_BYTES

if TYPE_CHECKING:
    from anybit.hosts.generating import Stats


def run(
    model: options.Model,
    prompt_: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="what to say to it", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="the same as an option", rich_help_panel=options.INPUT,
                     show_default="read from stdin"),
    ] = None,
    system: options.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="continue the text as it stands, without chat template",
                           rich_help_panel=options.INPUT)
    ] = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    quantize_only: options.QuantizeOnly = None,
    quantize_ignore: options.QuantizeIgnore = None,
    kernel: options.Kernel = None,
    kv_cache: options.KVCache = "auto",
    strict: options.Strict = False,
    batch_invariant: options.BatchInvariant = False,
    plan: options.PlanFile = None,
    threads: options.Threads = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="print the text when it is complete", rich_help_panel=options.OUTPUT)
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask a model something: the answer on stdout, how it ran on stderr.

    anybit run smollm2 "What is the capital of France?"

    anybit run ./qwen3-8b-w4a16 --prompt "Write a haiku" --temperature 0.7 --seed 1

    anybit run smollm2 --quantization nvfp4 < question.txt
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    text = _prompt(output, prompt_, prompt)
    if not text.strip():
        raise Unsupported("the prompt is empty", wanted="a question, or text to continue", remedy="--prompt TEXT")
    asked = online(quantization, quantize_only, quantize_ignore)
    importing = warm_up()
    checkpoint = open_for_running(model, output)
    importing.join()
    choices = Choices(device, dtype, asked, kernel, threads, kv_cache, strict, batch_invariant, plan)
    loaded, tokenizer = load(checkpoint, choices, output)

    from anybit.hosts.generating import Options, Session
    from anybit.hosts.tokenizers import chat_ids, raw_ids, stop_ids

    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
    ids = raw_ids(tokenizer, text) if raw else chat_ids(tokenizer, messages)
    if not ids:
        raise Unsupported("the prompt is empty", wanted="at least one token", remedy="--prompt TEXT")
    print_summary(output, model, loaded.anybit)
    session = Session(loaded, tokenizer, stop_ids(loaded, tokenizer))
    pieces: list[str] = []
    streams = not (no_stream or json)
    stats = session.generate(ids, Options(max_new_tokens, temperature, top_p, top_k, seed),
                             output.text if streams else pieces.append)
    if json:
        output.document("run", _document(model, loaded, "".join(pieces), stats))
        return
    output.text("".join(pieces) + "\n")
    print_stats(output, stats)


def _prompt(output: Output, argument: str | None, option: str | None) -> str:
    """The prompt of the command line, or all of stdin."""
    if argument is not None and option is not None:
        raise Unsupported("two prompts", found="one as argument, one as --prompt", wanted="one of them",
                          remedy="leave --prompt out")
    given = argument if argument is not None else option
    if given is not None and given != "-":
        data = given.encode("utf-8", "surrogateescape")
    elif sys.stdin is None or sys.stdin.isatty():
        raise Unsupported("no prompt", found="nothing on the command line, and stdin is a terminal",
                          wanted="a prompt", remedy='anybit run MODEL "What is the capital of France?"')
    else:
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise LimitExceeded("the prompt is too long", found=f"more than {MAX_PROMPT_BYTES:,} bytes",
                            wanted=f"at most {MAX_PROMPT_BYTES:,} (MAX_PROMPT_BYTES)", remedy="a shorter prompt")
    return decoded(output, data)


def decoded(output: Output, data: bytes) -> str:
    """Text of a prompt; bytes that are no UTF-8 are replaced, and that is said."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        output.warning(f"the prompt is no UTF-8 at byte {error.start:,}: such bytes become U+FFFD")
        return data.decode("utf-8", "replace")


def print_stats(output: Output, stats: Stats) -> None:
    """Speeds and peak memory, on stderr."""
    cached = f" ({stats.cached_tokens:,} more from the cache)" if stats.cached_tokens else ""
    parts = [
        f"prompt {stats.prompt_tokens:,} tokens{cached}, {stats.prompt_tokens_per_second:.1f} tokens/s",
        f"decode {stats.new_tokens:,} tokens, {stats.new_tokens_per_second:.1f} tokens/s",
        f"peak memory {size(stats.peak_bytes)}",
    ]
    if stats.ended_by != "stop token":
        parts.append(f"ended by {stats.ended_by}")
    output.remark(" · ".join(parts))


def stats_document(stats: Stats) -> dict[str, Any]:
    """Stats as data, units in the names."""
    return {
        **asdict(stats),
        "prompt_tokens_per_second": stats.prompt_tokens_per_second,
        "new_tokens_per_second": stats.new_tokens_per_second,
    }


def _document(name: str, model: Any, text: str, stats: Stats) -> dict[str, Any]:
    loading = model.anybit
    return {
        "model": name,
        "text": text,
        "plan": summary(loading.plan),
        "loading": {"held_bytes": loading.held_bytes, "peak_bytes": loading.peak_bytes},
        "stats": stats_document(stats),
    }
