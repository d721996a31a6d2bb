"""GGUF bytes made by hand, the document's layout spelled out: no reader of ours or of others takes part.

A `File` holds pairs and tensors as they shall be written, each field open to damage.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
# ggml type -> (elements of a block, bytes)
SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 12: (256, 144), 30: (1, 2)}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: object) -> bytes:
    if kind == STRING:
        assert isinstance(value, str | bytes)
        return text(value)
    return struct.pack("<" + LETTERS[kind], value)


def pair(key: str | bytes, kind: int, value: object) -> bytes:
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(key: str, kind: int, values: Sequence[object]) -> bytes:
    head = text(key) + struct.pack("<IIQ", ARRAY, kind, len(values))
    return head + b"".join(scalar(kind, value) for value in values)


@dataclass
class Tensor:
    """dims fastest first; offset None = where it belongs; data None = zeros of the right length."""

    name: str | bytes
    dims: tuple[int, ...]
    type: int = 0
    offset: int | None = None
    data: bytes | None = None

    def bytes_(self) -> bytes:
        if self.data is not None:
            return self.data
        block, size = SIZES.get(self.type, (1, 4))
        return bytes(math.prod(self.dims) // block * size)


@dataclass
class File:
    pairs: list[bytes] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    magic: bytes = b"GGUF"
    n_pairs: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    tail: bytes = b""

    def header(self) -> bytes:
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        head = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_pairs) + b"".join(self.pairs)
        at = 0
        for t in self.tensors:
            head += text(t.name) + struct.pack(f"<I{len(t.dims)}Q", len(t.dims), *t.dims)
            head += struct.pack("<IQ", t.type % 2**32, at if t.offset is None else t.offset)
            at += -(-len(t.bytes_()) // self.alignment) * self.alignment
        return head

    def bytes_(self) -> bytes:
        body = b"".join(self.padded(t.bytes_()) for t in self.tensors)
        return self.padded(self.header()) + body + self.tail

    def padded(self, raw: bytes) -> bytes:
        return raw + bytes(-len(raw) % self.alignment)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes_())
        return path


# a small but whole llama: hidden 64, 2 heads of 32, 1 key-value head, intermediate 64, 8 tokens
LLAMA_PAIRS: tuple[tuple[str, int, object], ...] = (
    ("general.architecture", STRING, "llama"),
    ("llama.block_count", U32, 2),
    ("llama.context_length", U32, 128),
    ("llama.embedding_length", U32, 64),
    ("llama.feed_forward_length", U32, 64),
    ("llama.attention.head_count", U32, 2),
    ("llama.attention.head_count_kv", U32, 1),
    ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
    ("llama.rope.freq_base", F32, 10000.0),
)
BLOCK_TENSORS = (
    ("attn_norm.weight", (64,)),
    ("attn_q.weight", (64, 64)),
    ("attn_k.weight", (64, 32)),
    ("attn_v.weight", (64, 32)),
    ("attn_output.weight", (64, 64)),
    ("ffn_norm.weight", (64,)),
    ("ffn_gate.weight", (64, 64)),
    ("ffn_up.weight", (64, 64)),
    ("ffn_down.weight", (64, 64)),
)


def llama(
    *, type: int = 2, changed: Mapping[str, object] | None = None, more: Sequence[bytes] = (), architecture: str = "llama"
) -> File:
    """The small llama with matrices of ggml type `type`; `changed` replaces or (None) drops pairs.

    With another `architecture` the same pairs and tensors go under that name.
    """
    changed = changed or {}
    pairs = []
    for key, kind, default in LLAMA_PAIRS:
        value = changed.get(key, architecture if key == "general.architecture" else default)
        if value is not None:
            pairs.append(pair(key.replace("llama.", f"{architecture}."), kind, value))
    tensors = [Tensor("token_embd.weight", (64, 8), type)]
    for n in range(2):
        tensors += [Tensor(f"blk.{n}.{name}", dims, 0 if len(dims) == 1 else type) for name, dims in BLOCK_TENSORS]
    tensors.append(Tensor("output_norm.weight", (64,), 0))
    return File([*pairs, *more], tensors)
