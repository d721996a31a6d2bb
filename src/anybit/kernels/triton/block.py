"""What lies between the products of a decoder block, for few tokens: norms, the gate, attention over a cache.

Each in one launch where a host takes several, with the host's roundings; what a product then reads is quantized in the
same launch where its recipe allows, into the scratch that the product's own quantizer would have filled (`Wanted`).
Device code: `block_jit.py`; tiles: `block_launch.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from anybit.kernels.triton import block_jit as jit
from anybit.kernels.triton.block_launch import (
    PLAIN,
    attention_launch,
    gate_launch,
    input_constants,
    is_made_in_passing,
    norm_launch,
    overlapping,
)
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.launching import Argument, Launch, Piece, Zeros, remember, stream_of
from anybit.kernels.triton.quantizers import Quantizer, QuantizerPlan

__all__ = ["AS_THEY_ARE", "Attention", "Gate", "Norm", "Rows", "Wanted", "makes_in_passing"]


class Rows(NamedTuple):
    """The input of a product: rows [M, K] as they are, or those of so many tokens quantized into a scratch."""

    values: Tensor | None
    scratch: Tensor | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Wanted:
    """What a kernel makes for products to read.

    quantizer      the recipe; None: rows as they are
    plan           where in the scratch codes and scales go
    scratch_bytes  of the largest of the products' calls
    """

    quantizer: Quantizer | None = None
    plan: QuantizerPlan | None = None
    scratch_bytes: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What launches that make the same have in common."""
        quantizer = self.quantizer
        return () if quantizer is None else (quantizer.form, id(quantizer.static))

    def made(self, like: Tensor, stand_in: Tensor) -> _Made:
        """The arguments of a launch that makes it of rows [M, K] `like` these."""
        k = like.shape[1]
        if self.quantizer is None or self.plan is None:
            places: list[Argument] = [like.dtype, stand_in, stand_in, stand_in]
            return _Made(places, (k, 1), PLAIN)
        pieces: Mapping[str, Piece] = self.plan.pieces
        form, static = self.quantizer.form, self.quantizer.static
        constants = input_constants(
            form.spec, arch_of(like.device), has_given=static is not None, values=form.values is not None,
            own=form.own, fnuz=form.fnuz)
        columns, group = self.quantizer.columns, self.quantizer.spec.group_size
        groups = -(-columns // group) if self.quantizer.spec.granularity == "group" else 1
        return _Made([pieces["codes"], pieces.get("scale", stand_in), pieces.get("outer", stand_in),
                      stand_in if static is None else static], (columns, groups), constants)

    def rows(self, like: Tensor) -> Rows:
        """Room for it."""
        if self.quantizer is None:
            return Rows(torch.empty(like.shape, dtype=like.dtype, device=like.device))
        return Rows(None, torch.empty(self.scratch_bytes, dtype=torch.uint8, device=like.device), like.shape[0])


AS_THEY_ARE: Final = Wanted()


def makes_in_passing(quantizer: Quantizer) -> bool:
    """True if the kernels here make what a quantizer does: no zero points, sums, packed codes, nothing of a call."""
    form = quantizer.form
    is_simple = form.is_static and not (form.is_shifted or form.sums or form.packed or form.by_row)
    return is_simple and is_made_in_passing(form.spec)


class _Made(NamedTuple):
    """Of a launch: places of rows, scales, global factors, and the static number; columns and groups; constants."""

    places: list[Argument]
    sizes: tuple[int, int]
    constants: dict[str, Any]


@dataclass
class Norm:
    """A root-mean-square norm: weight [K], and what it adds to the mean of squares."""

    weight: Tensor
    eps: float
    _launches: dict[Any, Launch] = field(default_factory=dict)

    def __call__(
        self, x: Tensor, wanted: Wanted = AS_THEY_ARE, *, delta: Tensor | None = None, count: Tensor | None = None,
        added: int = 0,
    ) -> tuple[Tensor, Rows]:  # fmt: skip
        """x (+ delta) [M, K] and its norm as the input of a product.

        count  int64, grows by `added`: a cache's count of tokens, once all that read it before have run
        """
        rows = wanted.rows(x)
        total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        counts = 0 if count is None else added
        key = (x.shape, x.stride(), x.dtype, x.device, None if delta is None else delta.stride(), counts, wanted.key)
        launch = self._launches.get(key)
        if launch is None:
            launch = remember(self._launches, key, self._launch(x, wanted, delta, counts))
        tensors = [x] if delta is None else [x, delta, total]
        if rows.values is not None:
            tensors.append(rows.values)
        if count is not None:
            tensors.append(count)
        launch(x.shape[0], 1, stream_of(x.device.index), rows.scratch, tensors)
        return total, rows

    def _launch(self, x: Tensor, wanted: Wanted, delta: Tensor | None, counts: int) -> Launch:
        (m, k), weight = x.shape, self.weight
        made = wanted.made(x, weight)
        tile = norm_launch(None if wanted.quantizer is None else wanted.quantizer.spec, k)
        has_delta = delta is not None
        waits, overlap = overlapping(arch_of(x.device))
        return Launch(
            jit.norm_rows,
            [x.dtype, x.dtype if has_delta else weight, weight, x.dtype if has_delta else weight, *made.places,
             torch.int64 if counts else weight, m, k, *made.sizes, x.stride(0) if m > 1 else k,
             k if delta is None or m == 1 else delta.stride(0), self.eps, counts],
            {"HAS_DELTA": has_delta, "COUNTS": counts > 0, **made.constants, "BG": tile.groups, "GS": tile.size,
             **waits},
            x.device, num_warps=tile.warps, enable_fp_fusion=False, **overlap,
        )  # fmt: skip


@dataclass
class Gate:
    """silu(gate) * up."""

    _launches: dict[Any, tuple[Launch, int]] = field(default_factory=dict)

    def __call__(self, gate: Tensor, up: Tensor, wanted: Wanted = AS_THEY_ARE) -> Rows:
        """Of [M, K] (rows may lie apart), as the input of a product."""
        rows = wanted.rows(gate)
        key = (gate.shape, gate.stride(), up.stride(), gate.dtype, gate.device, wanted.key)
        found = self._launches.get(key)
        if found is None:
            found = remember(self._launches, key, self._launch(gate, up, wanted))
        launch, programs = found
        tensors = (gate, up) if rows.values is None else (gate, up, rows.values)
        launch(gate.shape[0], programs, stream_of(gate.device.index), rows.scratch, tensors)
        return rows

    def _launch(self, gate: Tensor, up: Tensor, wanted: Wanted) -> tuple[Launch, int]:
        m, k = gate.shape
        stand_in = torch.empty(1, dtype=gate.dtype, device=gate.device)
        made = wanted.made(gate, stand_in)
        tile = gate_launch(None if wanted.quantizer is None else wanted.quantizer.spec, k)
        groups = -(-made.sizes[0] // tile.size)
        strides = [t.stride(0) if m > 1 else k for t in (gate, up)]
        waits, overlap = overlapping(arch_of(gate.device))
        launch = Launch(
            jit.gate_rows, [gate.dtype, gate.dtype, *made.places, m, k, *made.sizes, *strides],
            {**made.constants, "BG": tile.groups, "GS": tile.size, "WHOLE": tile.groups >= groups, **waits},
            gate.device, num_warps=tile.warps, enable_fp_fusion=False, **overlap,
        )  # fmt: skip
        return launch, -(-groups // tile.groups)


@dataclass
class Attention:
    """The attention of one block.

    heads, kv_heads, dim   query heads, heads of the cache, numbers of a head
    scaling                of scores
    q_norm, k_norm, eps    weights [dim] of the norms of heads, or None
    """

    heads: int
    kv_heads: int
    dim: int
    scaling: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    _calls: dict[Any, _AttentionCall] = field(default_factory=dict)
    _captured: list[Tensor] = field(default_factory=list)  # zeros that graphs count in

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor,
        tokens: int, held: int | Tensor, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Rotates and stores the new tokens, and attends: [B T, heads dim].

        q [B T, heads dim], k, v [B T, kv_heads dim], rows may lie apart; cosine, sine [1 or B, T, dim];
        keys, values [B, kv_heads, room, dim] with `held` tokens, a number or an int64 tensor of one;
        mask bool [1 or B, 1, T, seen]: which positions each token sees, None: those before it and itself.
        """
        if mask is not None and not isinstance(held, Tensor):
            mask = mask.contiguous()  # as wide as the cache is long: its strides grow with it
        masked = None if mask is None else (mask.shape[0], *mask.stride()[:3:2]) if isinstance(held, Tensor) else (
            mask.shape[0],)
        key = (q.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.device, cosine.stride(), cosine.shape,
               keys.shape, keys.stride(), values.stride(), masked, isinstance(held, Tensor))
        call = self._calls.get(key)
        if call is None:
            call = remember(self._calls, key, self._call(q, k, v, cosine, keys, values, tokens, mask,
                                                         counted=isinstance(held, Tensor)))
        out = torch.empty((q.shape[0], self.heads * self.dim), dtype=q.dtype, device=q.device)
        scratch = torch.empty(call.scratch_bytes, dtype=torch.uint8, device=q.device) if call.scratch_bytes else None
        tensors = [q, k, v, cosine, sine, keys, values]
        if mask is not None:
            tensors.append(mask.view(torch.uint8))
        if isinstance(held, Tensor):
            tensors.append(held)
        tensors.append(out)
        known = 0 if isinstance(held, Tensor) else held
        call.launch(call.grid[0], call.grid[1], stream_of(q.device.index), scratch, tensors, known)
        return out

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, keys: Tensor, values: Tensor, tokens: int,
        mask: Tensor | None, *, counted: bool,
    ) -> _AttentionCall:  # fmt: skip
        batch, _, room, _ = keys.shape
        group, dtype, pairs = self.heads // self.kv_heads, q.dtype, batch * self.kv_heads
        tile = attention_launch(self.dim, group * tokens, pairs, room, arch_of(q.device))
        stand_in = torch.empty(1, dtype=dtype, device=q.device)
        # of a mask: strides, or in rows of it
        across, down = (0, 0) if mask is None else (mask.stride(0), mask.stride(2)) if counted else (tokens, 1)
        across = 0 if mask is not None and mask.shape[0] == 1 else across
        parts, peaks, size = stand_in, stand_in, 0
        if tile.splits > 1:
            rows = pairs * tile.splits * tile.rows
            parts, peaks = Piece(0, torch.float32), Piece(4 * rows * 2 * tile.half, torch.float32)  # type: ignore[assignment]
            size = 4 * rows * (2 * tile.half + 2)
        waits, overlap = overlapping(arch_of(q.device))
        launch = Launch(
            jit.decode_attention,
            [*[dtype] * 5, stand_in if self.q_norm is None else self.q_norm,
             stand_in if self.k_norm is None else self.k_norm, dtype, dtype,
             stand_in if mask is None else torch.uint8, torch.int64 if counted else stand_in, dtype, parts, peaks,
             Zeros(pairs, self._captured) if tile.splits > 1 else stand_in, q.stride(0), k.stride(0), v.stride(0),
             cosine.stride(0) if cosine.shape[0] > 1 else 0, cosine.stride(1), keys.stride(0), keys.stride(1),
             values.stride(0), values.stride(1), across, down, int, room, self.kv_heads, self.scaling, self.eps],
            {"T": tokens, "GROUP": group, "ROWS": tile.rows, "DIM": self.dim, "HALF": tile.half, "BN": tile.block,
             "SPLITS": tile.splits, "Q_NORM": self.q_norm is not None, "K_NORM": self.k_norm is not None,
             "MASK": mask is not None, "COUNTED": counted, **waits},
            q.device, num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False, **overlap,
        )  # fmt: skip
        return _AttentionCall(launch, (pairs, tile.splits), size)


class _AttentionCall(NamedTuple):
    """Attention as it is launched for tokens and a cache of these shapes."""

    launch: Launch
    grid: tuple[int, int]
    scratch_bytes: int
