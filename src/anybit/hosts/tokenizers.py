"""The tokenizer of a checkpoint, and prompts made with its chat template.

Templates are programs of the file: they run in transformers' sandbox, and here also within limits of time and memory.
No template and no tokenizer code of a checkpoint runs outside it.
"""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from anybit.checkpoints.checkpoint import Checkpoint
from anybit.errors import AnybitError, Inconsistent, LimitExceeded, Unsafe, Unsupported
from anybit.limits import MAX_PROMPT_BYTES, MAX_TEMPLATE, RENDER_BYTES, RENDER_SECONDS

Message = Mapping[str, str]  # {"role": "user", "content": "..."}

_FILES: Final = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json", "vocab.txt")
_RENDER_MEMORY: Final = 512 * 2**20  # what a template may allocate beside RENDER_BYTES of output


def tokenizer_for(checkpoint: Checkpoint) -> Any:
    """The transformers tokenizer of a checkpoint: a GGUF file's own, or the folder's.

    Raises Unsupported for a folder without one, Unsafe where it is code.
    """
    if checkpoint.contents.gguf is not None:
        from anybit.hosts.gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(checkpoint.contents)
    demand_tokenizer(checkpoint)
    return _from_folder(checkpoint.path)


def demand_tokenizer(checkpoint: Checkpoint) -> None:
    """Raise Unsupported for a checkpoint without a tokenizer; looks at file names only."""
    if checkpoint.contents.gguf is not None or any((checkpoint.path / name).is_file() for name in _FILES):
        return
    raise Unsupported(
        "this folder has no tokenizer",
        where=str(checkpoint.path),
        found="none of " + ", ".join(_FILES[:3]),
        wanted="the tokenizer files of the model",
        remedy="`anybit.load` takes it as it is, run needs one: copy the tokenizer from the original model",
    )


def _from_folder(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            raise Unsafe("the tokenizer is code of the checkpoint, which is never run", where=str(folder),
                         found=first, wanted="tokenizer.json", remedy="copy tokenizer.json from the model's source"
                         ) from error
        raise Unsupported("transformers cannot read the tokenizer", where=str(folder), found=first,
                          wanted="a sound tokenizer.json, or the package that the message names",
                          remedy="copy the tokenizer from the original model") from error


def raw_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of `text` as it stands; text such as <|im_start|> means the special token."""
    _demand_size(text)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation under the model's chat template, ready for the answer.

    What a message's content says is text: the name of a special token in it stays text.
    Raises Unsupported without a template, Unsafe or LimitExceeded for one that misbehaves.
    """
    for message in messages:
        _demand_size(message["content"])
    specials = _special_names(tokenizer)
    if not any(name in message["content"] for message in messages for name in specials):
        return _encode(tokenizer, render(tokenizer, messages))
    marks = [secrets.token_hex(16) for _ in messages]
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    rest, ids = render(tokenizer, marked), []
    for mark, message in zip(marks, messages, strict=True):
        before, found, after = rest.partition(mark)
        if not found:  # a template that leaves a message out
            continue
        ids += _encode(tokenizer, before) + _encode(tokenizer, message["content"], as_text=True)
        rest = after
    return ids + _encode(tokenizer, rest)


def _encode(tokenizer: Any, text: str, *, as_text: bool = False) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]
    return ids


def _special_names(tokenizer: Any) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)


def render(tokenizer: Any, messages: Sequence[Message], *, for_answer: bool = True) -> str:
    """The text of a conversation under the chat template, with the opening of the answer unless `for_answer` is off."""
    template = tokenizer.chat_template
    if not template:
        raise Unsupported("this model has no chat template", found="no chat_template beside its tokenizer",
                          wanted="a model tuned for chat", remedy="--raw continues the text as it stands")
    if len(str(template)) > MAX_TEMPLATE:
        raise LimitExceeded("the chat template is too long", found=f"{len(str(template)):,} characters",
                            wanted=f"at most {MAX_TEMPLATE:,} (MAX_TEMPLATE)", remedy="--raw works without it")
    try:
        with _limited():
            text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=for_answer)
    except AnybitError:
        raise
    except MemoryError as error:
        raise LimitExceeded("the chat template takes too much memory", wanted=f"at most {_RENDER_MEMORY:,} bytes",
                            remedy="--raw works without it; report it where you got the model") from error
    except Exception as error:  # whatever the file's program raises, from jinja2 or through it
        raise _template_problem(error) from error
    if len(text) > RENDER_BYTES:
        raise LimitExceeded("the chat template writes too much", found=f"{len(text):,} characters",
                            wanted=f"at most {RENDER_BYTES:,} (RENDER_BYTES)", remedy="--raw works without it")
    return text


def _template_problem(error: Exception) -> AnybitError:
    found = f"{type(error).__name__}: {error}".split("\n")[0]
    if type(error).__name__ == "SecurityError":
        return Unsafe("the chat template tries to leave its sandbox", found=found,
                      wanted="a template that only writes text",
                      remedy="do not load this model; report it where you got it")
    return Inconsistent("the chat template refuses this conversation", found=found,
                        wanted="roles and contents that it knows", remedy="leave --system out, or use --raw")


@contextmanager
def _limited() -> Iterator[None]:
    """At most RENDER_SECONDS and _RENDER_MEMORY more memory inside, where the system can hold a process to it."""
    timed = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")

    def stop(number: int, frame: FrameType | None) -> None:
        raise LimitExceeded("the chat template takes too long",
                            wanted=f"at most {RENDER_SECONDS:.0f} s (RENDER_SECONDS)",
                            remedy="--raw works without it; report it where you got the model")

    before = signal.signal(signal.SIGALRM, stop) if timed else None
    if timed:
        signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    try:
        with _memory_limited():
            yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


@contextmanager
def _memory_limited() -> Iterator[None]:
    """A lower soft limit of address space; Linux only, elsewhere systems do not keep to it."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + _RENDER_MEMORY + 2 * RENDER_BYTES
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _demand_size(text: str) -> None:
    count = len(text.encode("utf-8", "surrogatepass"))
    if count > MAX_PROMPT_BYTES:
        raise LimitExceeded("the prompt is too long", found=f"{count:,} bytes",
                            wanted=f"at most {MAX_PROMPT_BYTES:,} (MAX_PROMPT_BYTES)", remedy="a shorter prompt")


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: of the generation config, the config, the tokenizer, and the chat template."""
    found: set[int] = set()
    for said in (model.generation_config.eos_token_id, getattr(model.config, "eos_token_id", None),
                 tokenizer.eos_token_id):
        found |= set(said) if isinstance(said, (list, tuple)) else set() if said is None else {int(said)}
    ending = _turn_ending(tokenizer)
    return frozenset(found if ending is None else found | {ending})


def _turn_ending(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an answer, if it is one."""
    if not tokenizer.chat_template:
        return None
    mark = secrets.token_hex(16)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        text = render(tokenizer, messages, for_answer=False)
    except AnybitError:
        return None  # rendering the real conversation will say why
    tail = _encode(tokenizer, text.rpartition(mark)[2][:200])
    return tail[0] if tail and tail[0] in tokenizer.added_tokens_decoder else None
