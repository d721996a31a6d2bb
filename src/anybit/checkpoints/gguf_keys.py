"""Facts of a GGUF file for its config: typed access to the hyper-parameters, sizes that only tensors show.

Every key that is asked for is remembered, so that what nobody asked for can be named (`gguf_config.remarks`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from anybit.checkpoints.contents import TensorInfo
from anybit.checkpoints.gguf_header import GgufArray
from anybit.errors import Inconsistent, LimitExceeded, Unsupported
from anybit.limits import MAX_HIDDEN, MAX_LAYERS, MAX_VOCABULARY

__all__ = ["BLOCK", "EMBEDDING", "HEAD", "Facts", "Keys", "ReadFloats"]

ReadFloats = Callable[[TensorInfo], list[float]]

# Names of GGUF tensors that a config or a dialect asks for.
EMBEDDING: Final = "token_embd.weight"
HEAD: Final = "output.weight"
BLOCK: Final = re.compile(r"((?:enc\.|dec\.)?blk)\.([0-9]{1,10})\.(.+)")  # stack, number, the rest


class Keys:
    """Hyper-parameters `A.key` of architecture A; a value of a wrong type or size is refused by name."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        """`where` is the file's name, for messages."""
        self._metadata = metadata
        self._prefix = architecture
        self.where = where
        self.asked: set[str] = set()

    def raw(self, key: str) -> Any:
        """The stored value, None where the key is absent."""
        self.asked.add(key)
        return self._metadata.get(f"{self._prefix}.{key}")

    def value(self, key: str) -> Any:
        """The stored value; an array with one number a layer counts as that number where all are equal."""
        found = self.raw(key)
        if isinstance(found, GgufArray):
            if len(set(found.values)) != 1:
                raise Unsupported(f"{self._prefix}.{key} differs from layer to layer", where=self.where,
                                  found=f"{found.values[:8]}", wanted="the same number in all layers",
                                  remedy="use a safetensors checkpoint of the same model")
            return found.values[0]
        return found

    def numbers(self, key: str, count: int) -> list[int] | None:
        """One whole number a layer, the same for all where the file holds a single one; None where it is absent."""
        found = self.raw(key)
        if found is None:
            return None
        values = list(found.values) if isinstance(found, GgufArray) else [found] * count
        if len(values) < count or not all(isinstance(v, int) for v in values[:count]):
            raise Inconsistent(f"{self._prefix}.{key} does not fit the layers", where=self.where,
                               found=f"{len(values)} entries", wanted=f"{count} whole numbers")
        return [int(v) for v in values[:count]]

    def optional(self, key: str) -> int | None:
        """A whole number above 0, None where the key is absent."""
        found = self.value(key)
        if found is None:
            return None
        if not isinstance(found, int) or isinstance(found, bool) or found < 1:
            raise Inconsistent(f"{self._prefix}.{key} is no size", where=self.where, found=f"{found!r:.80}",
                               wanted="a whole number above 0")
        return found

    def size_or_zero(self, key: str) -> int:
        """A whole number, 0 where the key is absent."""
        return self.optional(key) or 0 if self.value(key) != 0 else 0

    def positive(self, key: str, limit: int | None = None, constant: str = "") -> int:
        """A whole number above 0 that must be there."""
        found = self.optional(key)
        if found is None:
            raise Inconsistent(f"{self._prefix}.{key} is missing", where=self.where, wanted="a whole number above 0")
        if limit is not None and found > limit:
            raise LimitExceeded(f"{self._prefix}.{key} is too large", where=self.where, found=f"{found:,}",
                                wanted=f"at most {limit:,} ({constant})")
        return found

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        found = self.value(key)
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
            raise Inconsistent(f"{self._prefix}.{key} is no number", where=self.where, found=f"{found!r:.80}",
                               wanted="a finite number")
        return float(found)

    def flag(self, key: str) -> bool | None:
        """Yes or no, None where the key is absent or something else."""
        found = self.value(key)
        return found if isinstance(found, bool) else None

    def word(self, key: str) -> str | None:
        """A string, None where the key is absent or something else."""
        found = self.value(key)
        return found if isinstance(found, str) else None


class Facts:
    """What metadata and tensors of one file say together.

    `layers` counts the blocks that transformers' model has: without those of multi-token prediction.
    """

    def __init__(self, keys: Keys, tensors: Mapping[str, TensorInfo], read_floats: ReadFloats) -> None:
        """Reads the number of blocks, which everything else hangs on."""
        self.keys = keys
        self.tensors = tensors
        self.read_floats = read_floats
        blocks = keys.positive("block_count")
        self._check_blocks(blocks)
        if blocks > MAX_LAYERS:
            raise LimitExceeded("too many layers", where=keys.where, found=f"{blocks:,}",
                                wanted=f"{MAX_LAYERS:,} (MAX_LAYERS)")
        self.layers = blocks - keys.size_or_zero("nextn_predict_layers")
        if self.layers < 1:
            raise Inconsistent("no block is left for the model", where=keys.where,
                               found=f"block_count {blocks:,}, nextn_predict_layers {blocks - self.layers:,}",
                               wanted="more blocks than those that predict further tokens")

    def _check_blocks(self, blocks: int) -> None:
        numbers = {int(m[2]) for m in map(BLOCK.fullmatch, self.tensors) if m and m[1] != "dec.blk"}
        if len(numbers) != blocks or max(numbers, default=-1) != blocks - 1:
            raise Inconsistent("block_count and the tensors disagree", where=self.keys.where,
                               found=f"block_count {blocks:,}",
                               wanted=f"{len(numbers)}, the blocks that have tensors",
                               remedy="a part of a split model may be missing; download it again")

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.keys.positive("embedding_length", MAX_HIDDEN, "MAX_HIDDEN")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.keys.positive("attention.head_count")

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.keys.optional("attention.head_count_kv") or self.heads

    @property
    def head_dim(self) -> int:
        """Inputs of one head."""
        found = self.keys.optional("attention.key_length") or self.hidden // self.heads
        if found == 0:
            raise Inconsistent("more heads than hidden inputs", where=self.keys.where,
                               found=f"{self.heads:,} heads, {self.hidden:,} inputs",
                               wanted="at least one input a head")
        value = self.keys.optional("attention.value_length") or found
        if value != found:
            raise Unsupported("keys and values have heads of different sizes", where=self.keys.where,
                              found=f"key_length {found}, value_length {value}", wanted="the same size")
        return found

    @property
    def context(self) -> int:
        """Tokens that the model was trained for."""
        return self.keys.optional("context_length") or 2048

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding; files that lack it say it in a key."""
        table = self.tensors.get(EMBEDDING)
        is_table = table is not None and len(table.shape) == 2
        stated = self.keys.optional("vocab_size")
        size = table.shape[0] if table is not None and is_table else stated or self.keys.positive("vocab_size")
        if size > MAX_VOCABULARY:
            raise LimitExceeded("vocabulary too large", where=self.keys.where, found=f"{size:,}",
                                wanted=f"at most {MAX_VOCABULARY:,} (MAX_VOCABULARY)")
        return size

    def has(self, *suffixes: str) -> bool:
        """Whether any block has a tensor whose name ends so."""
        return any(match[3] in suffixes for match in map(BLOCK.fullmatch, self.tensors) if match)

    def rows(self, suffix: str) -> int | None:
        """N of the first block tensor called so."""
        for name, info in self.tensors.items():
            match = BLOCK.fullmatch(name)
            if match and match[3] == suffix and len(info.shape) >= 2:
                return info.shape[-2]
        return None

    def columns(self, suffix: str) -> int | None:
        """Last dimension of the first block tensor called so."""
        for name, info in self.tensors.items():
            match = BLOCK.fullmatch(name)
            if match and match[3] == suffix:
                return info.shape[-1]
        return None

    def floats(self, name: str) -> list[float] | None:
        """Values of a small F32 tensor, None where the file has none or one of another type."""
        info = self.tensors.get(name)
        if info is None or info.dtype != "F32" or len(info.shape) != 1 or info.elements > MAX_HIDDEN:
            return None
        return self.read_floats(info)
