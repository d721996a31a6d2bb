"""What a GGUF file says about its tokenizer, checked before any tokenizer library sees it.

Source: llama.cpp 0c1e57098 (llama-vocab.cpp), docs/formats/gguf.md §6.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.checkpoints.contents import Contents
from anybit.checkpoints.gguf_header import GgufArray
from anybit.errors import Damaged, Inconsistent, LimitExceeded, Unsupported
from anybit.limits import MAX_TOKEN_BYTES

__all__ = ["TokenizerData", "tokenizer_data"]

NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6
_TYPES: Final = range(7)  # 0 undefined, 5 unused
_MODELS: Final = ("gpt2", "llama", "t5", "gemma4")
_WITH_MERGES: Final = ("gpt2", "gemma4")
# ids that llama.cpp takes where a file names none
_DEFAULT_IDS: Final[Mapping[str, Mapping[str, int]]] = {"t5": {"eos": 1, "unk": 2, "pad": 0}}
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_IDS: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True)
class TokenizerData:
    """The metadata under `tokenizer.`, one value a field.

    model    gpt2 (byte-level BPE with `merges`), llama (sentencepiece BPE with `scores`), t5 (unigram with `scores`)
             or gemma4 (BPE with `merges` over sentencepiece's alphabet)
    pre      which regular expressions split the text (gpt2)
    types    of each token: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
    special  bos, eos, unk, pad -> id, those that the file names
    add_bos, add_eos, add_space_prefix, remove_extra_whitespaces  None where the file does not say
    charsmap  sentencepiece's compiled normalization, empty where the file has none
    is_phi3   control tokens swallow the space after them: llama.cpp decides so by the model's name
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    special: Mapping[str, int]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    remove_extra_whitespaces: bool | None
    charsmap: bytes
    is_phi3: bool
    chat_template: str | None
    context_length: int | None


def tokenizer_data(contents: Contents) -> TokenizerData:
    """The tokenizer of a GGUF file.

    Raises Unsupported for models other than BPE and unigram, Inconsistent or LimitExceeded where its parts do not fit
    together.
    """
    keys = _Keys(contents)
    model = keys.word("tokenizer.ggml.model")
    if model not in _MODELS:
        raise Unsupported("the file's tokenizer is not supported", where=keys.where,
                          found="no tokenizer.ggml.model" if model is None else f"tokenizer.ggml.model {model!r:.80}",
                          wanted=", ".join(_MODELS), remedy="give a folder with tokenizer.json")
    tokens = keys.strings("tokenizer.ggml.tokens")
    longest = max(map(len, tokens), default=0)
    if longest > MAX_TOKEN_BYTES:
        raise LimitExceeded("a token is too long", where=keys.where, found=f"{longest:,} characters",
                            wanted=f"at most {MAX_TOKEN_BYTES:,} (MAX_TOKEN_BYTES)")
    types = keys.numbers("tokenizer.ggml.token_type", len(tokens), NORMAL)
    _check_types(tokens, types, keys.where)
    _check_vocabulary(contents, len(tokens), keys.where)
    architecture = keys.word("general.architecture")
    context = (contents.gguf or {}).get(f"{architecture}.context_length")
    return TokenizerData(
        model=model,
        pre=keys.word("tokenizer.ggml.pre") or "default",
        tokens=tokens,
        types=types,
        scores=keys.numbers("tokenizer.ggml.scores", len(tokens), 0.0),
        merges=_merges(keys) if model in _WITH_MERGES else [],
        special={**_DEFAULT_IDS.get(model, {}), **_special(keys, len(tokens))},
        add_bos=keys.flag("tokenizer.ggml.add_bos_token"),
        add_eos=keys.flag("tokenizer.ggml.add_eos_token"),
        add_space_prefix=keys.flag("tokenizer.ggml.add_space_prefix"),
        remove_extra_whitespaces=keys.flag("tokenizer.ggml.remove_extra_whitespaces"),
        charsmap=_charsmap(keys) if model == "t5" else b"",
        is_phi3=any(name in (keys.word("general.name") or "").lower() for name in ("phi-3", "phi3")),
        chat_template=keys.word("tokenizer.chat_template"),
        context_length=context if isinstance(context, int) else None,
    )


class _Keys:
    """Typed access to the metadata; a value of another type is Inconsistent, a missing one None."""

    def __init__(self, contents: Contents) -> None:
        self._metadata = contents.gguf or {}
        self.where = contents.path.name

    def get(self, key: str, kind: type, wanted: str) -> Any:
        found = self._metadata.get(key)
        if found is not None and not isinstance(found, kind):
            raise Inconsistent(f"{key} is no {wanted}", where=self.where, found=f"{found!r:.80}", wanted=wanted)
        return found

    def word(self, key: str) -> str | None:
        found: str | None = self.get(key, str, "text")
        return found

    def flag(self, key: str) -> bool | None:
        found: bool | None = self.get(key, bool, "yes or no")
        return found

    def number(self, key: str) -> int | None:
        found: int | None = self.get(key, int, "number")
        return found

    def strings(self, key: str) -> list[str]:
        array = self.get(key, GgufArray, "list")
        if array is None or not array.is_strings or not len(array):
            raise Inconsistent(f"{key} is missing or no list of strings", where=self.where, wanted="a list of strings")
        if bytes in set(map(type, array.values)):
            raise Damaged(f"{key} holds a string that is not UTF-8", where=self.where, wanted="UTF-8")
        values: list[str] = array.values
        return values

    def numbers(self, key: str, count: int, default: Any) -> list[Any]:
        """One number a token, `default` for all of them where the key is absent."""
        array = self.get(key, GgufArray, "list")
        if array is None:
            return [default] * count
        if array.is_strings or len(array) != count:
            raise Inconsistent(f"{key} does not fit the tokens", where=self.where, found=f"{len(array):,} entries",
                               wanted=f"{count:,} numbers, one a token")
        values: list[Any] = array.values
        return values


def _check_types(tokens: list[str], types: list[int], where: str) -> None:
    strange = set(types) - set(_TYPES)
    if strange:
        raise Inconsistent("tokens of an unknown type", where=where, found=f"{sorted(strange)[:8]}", wanted="0 … 6")
    for token, kind in zip(tokens, types, strict=True):
        if kind == BYTE and not _BYTE_TOKEN.fullmatch(token):
            raise Inconsistent("a byte token names no byte", where=where, found=f"{token!r:.80}",
                               wanted="<0x00> … <0xFF>")


def _check_vocabulary(contents: Contents, count: int, where: str) -> None:
    rows = contents.config.get("vocab_size")
    if isinstance(rows, int) and count > rows:
        raise Inconsistent("more tokens than rows of the embedding", where=where, found=f"{count:,} tokens",
                           wanted=f"at most {rows:,}")


def _special(keys: _Keys, count: int) -> dict[str, int]:
    special = {}
    for name, word in _IDS.items():
        key = f"tokenizer.ggml.{word}_token_id"
        found = keys.number(key)
        if found is None or found in (-1, 0xFFFF_FFFF):  # both stand for none
            continue
        if not 0 <= found < count:
            raise Inconsistent(f"{key} lies outside the vocabulary", where=keys.where, found=f"{found:,}",
                               wanted=f"0 … {count - 1:,}")
        special[name] = found
    return special


def _charsmap(keys: _Keys) -> bytes:
    """sentencepiece's precompiled_charsmap, written as an array of bytes."""
    key = "tokenizer.ggml.precompiled_charsmap"
    array = keys.get(key, GgufArray, "list")
    if array is None:
        return b""
    if array.is_strings or any(not isinstance(v, int) or not -128 <= v <= 255 for v in array.values):
        raise Inconsistent(f"{key} is no list of bytes", where=keys.where, wanted="numbers from 0 to 255")
    return bytes(v & 0xFF for v in array.values)


def _merges(keys: _Keys) -> list[tuple[str, str]]:
    """Pairs "a b"; the first space after the first character separates them."""
    pairs = []
    for text in keys.strings("tokenizer.ggml.merges"):
        cut = text.find(" ", 1)
        if cut < 0:
            raise Inconsistent("a merge is no pair", where=keys.where, found=f"{text!r:.80}", wanted="two tokens")
        pairs.append((text[:cut], text[cut + 1 :]))
    return pairs
