"""Text from a loaded model: prefill in pieces, then one token at a time, streamed.

A loop of our own instead of transformers' generate(): greedy and sampled text need little beside the forward pass, and
the general one adds 2 ms to each token (measured with smollm2 on one thread: bare forward 15.7 ms, this loop 15.6,
generate() 17.9). Temperature, top-k and top-p are transformers' own processors; caches are its DynamicCache.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor

from anybit.errors import LimitExceeded

PREFILL_TOKENS: Final = 512  # of a prompt at once: bounds the memory of activations and keeps Ctrl-C prompt
_UNFINISHED: Final = "\ufffd"  # what a tokenizer writes for bytes that are no whole character yet
_STATUS: Final = Path("/proc/self/status")

OnText = Callable[[str], None]
StopReason = Literal["stop token", "max-new-tokens", "context full"]


@dataclass(frozen=True)
class Options:
    """How to choose tokens.

    temperature  0 takes the likeliest token
    top_p        keep the likeliest tokens whose probabilities sum to this; 1 keeps all
    top_k        keep so many; 0 keeps all
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Stats:
    """What a generation took.

    prompt_tokens  computed in prefill; `cached_tokens` before them came from the cache of an earlier turn
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    peak_bytes: int
    ended_by: StopReason

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of prefill."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def new_tokens_per_second(self) -> float:
        """Speed of decode: the first token belongs to prefill."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass
class Session:
    """A model with the key-value cache of a conversation.

    `ids` are the tokens whose keys and values are in the cache; a next turn computes only what differs from them.
    """

    model: Any
    tokenizer: Any
    stops: frozenset[int]
    ids: list[int] = field(default_factory=list)
    cache: Any = None

    def reset(self) -> None:
        """Forget the conversation."""
        self.ids, self.cache = [], None

    def generate(self, prompt: Sequence[int], options: Options, on_text: OnText) -> Stats:
        """Continue `prompt`, handing text to `on_text` as it comes.

        Raises LimitExceeded for a prompt that does not fit into the model's context.
        """
        most = self._room(len(prompt), options.max_new_tokens)
        cached = self._reuse(prompt)
        choose = chooser(options, self.model.device)
        text = TextStream(self.tokenizer, on_text)
        started = time.perf_counter()
        with torch.inference_mode():
            logits = self._prefill(prompt[cached:])
            token = choose(logits, list(prompt))
            prefilled = time.perf_counter()
            count, ended = self._decode(token, list(prompt), most, choose, text)
        text.end()
        finished = time.perf_counter()
        if ended == "max-new-tokens" and most < options.max_new_tokens:
            ended = "context full"
        return Stats(len(prompt) - cached, cached, count, prefilled - started, finished - prefilled,
                     peak_bytes(self.model.device), ended)

    def _room(self, prompt: int, wanted: int) -> int:
        """How many new tokens the context has room for, at most `wanted`."""
        context = context_length(self.model.config)
        if context and prompt >= context:
            raise LimitExceeded("the prompt is longer than the model's context", found=f"{prompt:,} tokens",
                                wanted=f"fewer than {context:,} (max_position_embeddings)", remedy="a shorter prompt")
        return min(wanted, context - prompt) if context else wanted

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache to what it shares with `prompt`, and return how many tokens that is."""
        from transformers import DynamicCache

        shared = next((i for i, (a, b) in enumerate(zip(self.ids, prompt, strict=False)) if a != b),
                      min(len(self.ids), len(prompt)))
        shared = min(shared, len(prompt) - 1)  # at least one token gives the logits
        if self.cache is not None and self.cache.get_seq_length() != len(self.ids):
            self.cache = None  # the turn before was interrupted inside a forward pass
        if self.cache is not None and shared < len(self.ids):
            try:
                self.cache.crop(shared - len(self.ids))  # negative: how many to take away
            except (ValueError, NotImplementedError, AttributeError, RuntimeError):
                self.cache = None  # sliding windows and recurrent states cannot be cut back
        if self.cache is None or shared == 0:
            self.cache, shared = DynamicCache(config=self.model.config), 0
        self.ids = list(prompt[:shared])
        return shared

    def _prefill(self, tokens: Sequence[int]) -> Tensor:
        for start in range(0, len(tokens), PREFILL_TOKENS):
            logits = self._forward(tokens[start : start + PREFILL_TOKENS])
        return logits

    def _decode(
        self, token: int, seen: list[int], most: int, choose: Choose, text: TextStream
    ) -> tuple[int, StopReason]:
        """Tokens from `token` on until a stop or `most` of them; the count includes the stop token."""
        count = 1
        while token not in self.stops:
            text.push(token)
            if count >= most:
                return count, "max-new-tokens"
            seen.append(token)
            token = choose(self._forward([token]), seen)
            count += 1
        return count, "stop token"

    def _forward(self, tokens: Sequence[int]) -> Tensor:
        """Logits [1, vocabulary] after `tokens`, which enter the cache."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        result = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **_last_only(type(self.model)))
        self.ids += tokens
        logits: Tensor = result.logits[:, -1].float()
        return logits


_LAST_ONLY: dict[type, dict[str, int]] = {}


def _last_only(kind: type) -> dict[str, int]:
    """The argument that keeps a model from computing logits nobody reads, where it has one."""
    if kind not in _LAST_ONLY:
        known = inspect.signature(kind.forward).parameters  # type: ignore[attr-defined]
        _LAST_ONLY[kind] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return _LAST_ONLY[kind]


Choose = Callable[[Tensor, list[int]], int]


def chooser(options: Options, device: torch.device) -> Choose:
    """A function from logits [1, vocabulary] and the tokens so far to the next token."""
    if options.temperature == 0:
        return lambda logits, seen: int(logits.argmax(dim=-1))
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    steps = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k:
        steps.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        steps.append(TopPLogitsWarper(options.top_p))
    generator = torch.Generator(device=device)
    if options.seed is None:
        generator.seed()
    else:
        generator.manual_seed(options.seed)

    def draw(logits: Tensor, seen: list[int]) -> int:
        scores = steps(cast("torch.LongTensor", torch.tensor([seen], device=logits.device)), logits)
        return int(torch.multinomial(torch.softmax(scores, dim=-1), 1, generator=generator))

    return draw


class TextStream:
    """Tokens in, text out: a character whose bytes are spread over tokens comes out whole.

    A tokenizer's text depends on what stands before, so each step decodes a short run: from the last piece that was
    given out, which is taken off again.
    """

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        """`on_text` gets each new piece; special tokens are left out."""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._ids: list[int] = []
        self._context = 0  # first token of the run
        self._given = 0  # tokens whose text was given out

    def push(self, token: int) -> None:
        """Take a token; give out what is whole now."""
        self._ids.append(token)
        piece = self._piece()
        if piece and not piece.endswith(_UNFINISHED):
            self._give(piece)

    def end(self) -> None:
        """Give out the rest, whole or not."""
        piece = self._piece()
        if piece:
            self._give(piece)

    def _piece(self) -> str:
        before = self._text(self._ids[self._context : self._given])
        return self._text(self._ids[self._context :])[len(before) :]

    def _give(self, piece: str) -> None:
        self._on_text(piece)
        self._context, self._given = self._given, len(self._ids)

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def context_length(config: Any) -> int:
    """Tokens that the model was made for; 0 where its config does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else 0


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the allocator on a GPU, of the process on a CPU; 0 where the system does not tell."""
    if device.type != "cpu":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
