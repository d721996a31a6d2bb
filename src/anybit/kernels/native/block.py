"""A decoder block as a single call of the compiled library: for one token, and for many.

What stands between the products of a block costs more in Python than many of them; and torch's threads, awake for it,
take the cores from ours: docs/performance.md.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anybit.kernels.native import ABI, BlockStruct, ProductStruct, library
from anybit.kernels.native.planes import FORMATS, Planes, threads

__all__ = ["Block", "BlockParts", "Caches", "Chain", "release_scratch"]

_LANES = 32  # a head's dimension must be a multiple, for many tokens
_MOST_DIM = 256
_shared = threading.local()  # the scratch of many tokens, and of a chain's step: one for all that a thread runs


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of; every product is one to three Planes whose rows lie below each other.

    norm1, norm2    [hidden] float32
    q_norm, k_norm  [dim] float32, or None
    """

    qkv: Sequence[Planes]
    o: Sequence[Planes]
    gate_up: Sequence[Planes]
    down: Sequence[Planes]
    norm1: Tensor
    norm2: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    scaling: float
    heads: int
    kv_heads: int
    dim: int


class Block:
    """The C struct of a block, and the tensors that it points at."""

    def __init__(self, parts: BlockParts) -> None:
        """Raises ValueError without the library."""
        native = library()
        if native is None:
            raise ValueError("the compiled library is missing")
        self._parts = parts
        self._norms = [None if t is None else t.detach().float().contiguous()
                       for t in (parts.norm1, parts.norm2, parts.q_norm, parts.k_norm)]
        addresses = [None if t is None else t.data_ptr() for t in self._norms]
        hidden = parts.norm1.numel()
        self._struct = BlockStruct(
            abi=ABI, size=ctypes.sizeof(BlockStruct), qkv=_product(parts.qkv), o=_product(parts.o),
            gate_up=_product(parts.gate_up), down=_product(parts.down), norm1=addresses[0], norm2=addresses[1],
            q_norm=addresses[2], k_norm=addresses[3], eps=parts.eps, scaling=parts.scaling, hidden=hidden,
            inner=parts.down[0].cols, heads=parts.heads, kv_heads=parts.kv_heads, dim=parts.dim, rotated=parts.dim,
        )  # fmt: skip
        self.hidden, self.dim, self.kv_heads = hidden, parts.dim, parts.kv_heads
        self._address = ctypes.addressof(self._struct)
        self._step, self._scratch_size = native.block_step, native.block_scratch
        self._many, self._many_size = native.block_many, native.block_many_scratch
        self._scratch = torch.empty(0)

    @property
    def takes_many(self) -> bool:
        """True if `many` can run: heads of a size that fills vectors."""
        return self.dim % _LANES == 0 and self.dim <= _MOST_DIM

    def step(self, x: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """y [like x] for one token x [.., hidden] float32.

        cosine, sine  [.., dim] float32, contiguous
        keys, values  [1, kv_heads, room, dim] float32, contiguous; the token's own go to `position`
        """
        room = keys.shape[2]
        scratch = self._scratch
        if scratch.numel() < self._scratch_size(self._address, position):
            scratch = self._scratch = torch.empty(self._scratch_size(self._address, room), dtype=torch.float32)
        y = torch.empty_like(x)
        wrong = self._step(
            self._address, x.data_ptr(), y.data_ptr(), cosine.data_ptr(), sine.data_ptr(), keys.data_ptr(),
            values.data_ptr(), room * self.dim, position, scratch.data_ptr(), threads(),
        )
        if wrong:
            raise ValueError(f"a block of {self.hidden} does not fit its parts")
        return y


    def many(self, x: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """As `step` for several tokens x [.., T, hidden]; each attends to the cache and to the tokens up to itself.

        cosine, sine  [.., T, dim] float32, contiguous
        keys, values  as in `step`; the tokens' own go to `position` and after
        """
        tokens, room = x.numel() // self.hidden, keys.shape[2]
        size = self._many_size(self._address, position, tokens, threads())
        scratch: Tensor | None = getattr(_shared, "scratch", None)
        if scratch is None or scratch.numel() < size:
            scratch = _shared.scratch = torch.empty(size, dtype=torch.float32)
        y = torch.empty_like(x)
        wrong = self._many(
            self._address, x.data_ptr(), y.data_ptr(), cosine.data_ptr(), sine.data_ptr(), keys.data_ptr(),
            values.data_ptr(), room * self.dim, position, tokens, scratch.data_ptr(), threads(),
        )
        if wrong:
            raise ValueError(f"a block of {self.hidden} does not fit its parts")
        return y


class Caches:
    """Where the blocks of a chain keep keys and values: buffers [1, kv_heads, room, dim] float32, one pair a block."""

    def __init__(self, rooms: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.rooms = list(rooms)
        self.room = min(keys.shape[2] for keys, _ in self.rooms)
        self.scratch = 0  # numbers that a step works in: set by the chain
        count = len(self.rooms)
        self.keys = (ctypes.c_void_p * count)(*(keys.data_ptr() for keys, _ in self.rooms))
        self.values = (ctypes.c_void_p * count)(*(values.data_ptr() for _, values in self.rooms))
        self.strides = (ctypes.c_int64 * count)(*(keys.shape[2] * keys.shape[3] for keys, _ in self.rooms))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is read back from a file, finds the addresses of its own buffers."""
        return Caches, (self.rooms,)


class Chain:
    """Blocks of one hidden size that feed each other: a step through all is one call."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        """Raises ValueError for blocks of different sizes, or without the library."""
        native = library()
        if native is None or len({block.hidden for block in blocks}) != 1:
            raise ValueError("no library, or blocks of several hidden sizes")
        self.blocks = list(blocks)
        self._pointers = (ctypes.c_void_p * len(blocks))(*(block._address for block in blocks))
        self._step = native.blocks_step

    def step(self, x: Tensor, cosine: Tensor, sine: Tensor, caches: Caches, position: int) -> Tensor:
        """As `Block.step` through all blocks; the token's keys and values go to `position` of every cache."""
        scratch: Tensor | None = getattr(_shared, "step", None)
        if caches.scratch == 0:
            caches.scratch = max(block._scratch_size(block._address, caches.room) for block in self.blocks)
        if scratch is None or scratch.numel() < caches.scratch:
            scratch = _shared.step = torch.empty(caches.scratch, dtype=torch.float32)
        y = torch.empty_like(x)
        wrong = self._step(
            self._pointers, len(self.blocks), x.data_ptr(), y.data_ptr(), cosine.data_ptr(), sine.data_ptr(),
            caches.keys, caches.values, caches.strides, position, scratch.data_ptr(), threads(),
        )
        if wrong:
            raise ValueError(f"a chain of blocks of {self.blocks[0].hidden} does not fit its parts")
        return y


def release_scratch() -> None:
    """Give back what `many` works in on this thread."""
    _shared.scratch = None


def _product(parts: Sequence[Planes]) -> ProductStruct:
    made = ProductStruct(parts=len(parts))
    for i, planes in enumerate(parts):
        made.part[i] = planes.address
        if planes.bias is not None:
            made.bias[i] = planes.bias.data_ptr()
            made.bias_format[i] = FORMATS[planes.bias.dtype]
    return made
