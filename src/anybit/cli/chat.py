"""`anybit chat`: a conversation that keeps its key-value cache from turn to turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from anybit.checkpoints.online import online
from anybit.cli import options
from anybit.cli.loading import Choices, load, open_for_running, print_summary, warm_up
from anybit.cli.output import Output, make_output
from anybit.cli.run import decoded, print_stats, stats_document
from anybit.errors import AnybitError

if TYPE_CHECKING:
    from anybit.hosts.generating import Options, Session, Stats

_PROMPT = "> "
_COMMANDS = "/reset forgets the conversation, /stats shows speeds, /exit ends (Ctrl-D too)"


def chat(
    model: options.Model,
    system: options.System = None,
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
    max_new_tokens: options.MaxNewTokens = 1024,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    r"""Talk with a model; from a pipe, each line is a turn.

    anybit chat smollm2

    anybit chat ./qwen3-8b-w4a16 --system "Answer in one sentence." --temperature 0.7

    printf 'Hello\nAnd now?\n' | anybit chat smollm2 --json
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    asked = online(quantization, quantize_only, quantize_ignore)
    importing = warm_up()
    checkpoint = open_for_running(model, output)
    importing.join()
    choices = Choices(device, dtype, asked, kernel, threads, kv_cache, strict, batch_invariant, plan)
    loaded, tokenizer = load(checkpoint, choices, output)

    from anybit.hosts.generating import Options, Session
    from anybit.hosts.tokenizers import stop_ids

    print_summary(output, model, loaded.anybit)
    session = Session(loaded, tokenizer, stop_ids(loaded, tokenizer))
    chosen = Options(max_new_tokens, temperature, top_p, top_k, seed)
    _Conversation(output, session, chosen, system).talk()


class _Conversation:
    """The loop: its state is the messages so far."""

    def __init__(self, output: Output, session: Session, options: Options, system: str | None) -> None:
        self.output = output
        self.session = session
        self.options = options
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.last: Stats | None = None
        self._reset()

    def _reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.session.reset()

    def talk(self) -> None:
        """Turns until stdin ends or /exit."""
        is_person = sys.stdin is not None and sys.stdin.isatty()
        if is_person:
            self.output.remark(_COMMANDS)
        for line in _lines(self.output, is_person):
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                self._reset()
                self.output.remark("the conversation is forgotten")
            elif line == "/stats":
                self._stats()
            elif is_person:
                self._turn_of_a_person(line)
            elif line:
                self._turn(line)

    def _stats(self) -> None:
        if self.last is None:
            self.output.remark("nothing was said yet")
        else:
            print_stats(self.output, self.last)

    def _turn_of_a_person(self, line: str) -> None:
        """A turn that a refusal or Ctrl-C ends, not the conversation."""
        if not line:
            return
        said = len(self.messages)
        try:
            self._turn(line)
        except AnybitError as error:
            del self.messages[said:]
            self.output.error(error)
        except KeyboardInterrupt:
            del self.messages[said:]
            self.output.text("\n")
            self.output.remark("interrupted: this turn is forgotten")

    def _turn(self, line: str) -> None:
        from anybit.hosts.tokenizers import chat_ids

        self.messages.append({"role": "user", "content": line})
        pieces: list[str] = []

        def on_text(piece: str) -> None:
            pieces.append(piece)
            if self.output.mode != "json":
                self.output.text(piece)

        ids = chat_ids(self.session.tokenizer, self.messages)
        self.last = self.session.generate(ids, self.options, on_text)
        answer = "".join(pieces)
        self.messages.append({"role": "assistant", "content": answer})
        if self.output.mode == "json":
            self.output.record("chat", {"user": line, "text": answer, "stats": stats_document(self.last)})
        else:
            self.output.text("\n")


def _lines(output: Output, is_person: bool) -> Iterator[str]:
    """Lines of stdin without their ends; a prompt before each for a person."""
    if sys.stdin is None:
        return
    while True:
        if is_person:
            try:
                line = input(_PROMPT)
            except EOFError:
                return
            yield line.strip()
            continue
        data = sys.stdin.buffer.readline()
        if not data:
            return
        yield decoded(output, data).strip()
