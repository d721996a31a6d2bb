"""Bits per byte and perplexity of a text, by the procedure that the reference figures were made with.

Tokens of the text without special tokens; consecutive windows, the last short one dropped; each window from an empty
cache; all tokens but the first of a window are scored by log-softmax in float64 of the logits. Bits per byte divides by
the UTF-8 bytes of the scored tokens, so models with unlike tokenizers compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from anybit.errors import Unsupported

_ROWS: Final = 64  # rows of logits in float64 at once: 25 MB at 49,152 tokens


@dataclass(frozen=True)
class Window:
    """One window: negative log-likelihood in nats, tokens scored, their bytes."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Of this window alone."""
        return self.nats / math.log(2) / self.text_bytes


@dataclass(frozen=True)
class Evaluation:
    """The windows of a text and their totals."""

    windows: tuple[Window, ...]

    @property
    def nats(self) -> float:
        """Negative log-likelihood of all scored tokens."""
        return math.fsum(w.nats for w in self.windows)

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return sum(w.tokens for w in self.windows)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the scored tokens."""
        return sum(w.text_bytes for w in self.windows)

    @property
    def bits_per_byte(self) -> float:
        """Over the whole text."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """The exponential of the mean nats of a token; infinite where that overflows."""
        mean = self.nats / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(frozen=True)
class Windows:
    """A tokenized text cut into windows: ids [windows, window], and where each token ends in bytes."""

    ids: Tensor
    ends: Tensor


def windows_of(tokenizer: Any, text: str, window: int, limit: int | None = None) -> Windows:
    """The whole windows of a text, at most `limit`; Unsupported for a text shorter than one."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    count = len(ids) // window
    if count == 0:
        raise Unsupported("the text is shorter than one window", found=f"{len(ids):,} tokens",
                          wanted=f"{window:,} or more", remedy="a longer --text or a smaller --window")
    count = min(count, limit or count)
    bytes_before = [0, *accumulate(len(c.encode("utf-8", "surrogatepass")) for c in text)]
    ends = [bytes_before[end] for _, end in found["offset_mapping"]]  # a split character counts for its first token
    shape = (count, window)
    return Windows(torch.tensor(ids[: count * window]).view(shape), torch.tensor(ends[: count * window]).view(shape))


def bits_per_byte(
    model: Any, tokenizer: Any, text: str, window: int = 512, limit: int | None = None,
    on_window: Callable[[Window], None] | None = None,
) -> Evaluation:
    """The evaluation of `text` in windows of `window` tokens (at most `limit` of them); `on_window` sees each."""
    return evaluate_windows(model, windows_of(tokenizer, text, window, limit), on_window)


def evaluate_windows(model: Any, cut: Windows, on_window: Callable[[Window], None] | None = None) -> Evaluation:
    """The evaluation of windows that were cut before."""
    return Evaluation(tuple(_scored(model, cut, on_window)))


def _scored(model: Any, cut: Windows, on_window: Callable[[Window], None] | None) -> Iterator[Window]:
    for ids, ends in zip(cut.ids, cut.ends, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        found = Window(_nats(logits[:-1], ids[1:].to(logits.device)), len(ids) - 1, int(ends[-1] - ends[0]))
        if on_window is not None:
            on_window(found)
        yield found


def _nats(logits: Tensor, targets: Tensor) -> float:
    """Negative log-likelihood of targets [T] under logits [T, vocabulary], in float64."""
    total = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = torch.log_softmax(logits[start : start + _ROWS].double(), dim=-1)
        total -= float(rows.gather(-1, targets[start : start + _ROWS, None]).sum())
    return total
