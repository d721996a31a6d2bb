"""What lies between the products of a decoder block, for few tokens: norms, the gate, attention over a cache.

Each in one launch where a host takes several, with the host's roundings; what a product then reads is quantized in the
same launch where its recipe allows (`Input`). Device code: `block_jit.py`; launches: `block_launch.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

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
)
from anybit.kernels.triton.devices import arch_of
from anybit.kernels.triton.recipes import ARITHMETIC, has_native_e4m3
from anybit.schemes import ActivationSpec

__all__ = ["Attention", "Input", "Rows", "gate", "input_for", "norm"]

_NONE: Final[Mapping[str, Tensor]] = MappingProxyType({})


@dataclass(frozen=True)
class Rows:
    """The input of a product: rows as they are, or quantized.

    values  [M, columns]: numbers in the dtype of the activations, codes, or values of codes
    scale   float32 [M], or [G, M] for groups; None where nothing is left to multiply
    """

    values: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class Input:
    """What the kernels make for a product to read.

    spec      the recipe; None: rows as they are
    given     the static number that its rule reads
    columns   width of the rows, at least K
    as_values values of the codes instead of codes: their dtype
    own       values times their group's own scale; what is left is one factor a row, or none
    fnuz      e4m3fn codes as the e4m3fnuz codes of half the value
    """

    spec: ActivationSpec | None = None
    given: Tensor | None = None
    columns: int = 0
    as_values: torch.dtype | None = None
    own: bool = False
    fnuz: bool = False

    def is_like(self, other: Input) -> bool:
        """True if rows made for one product serve the other too."""
        alike = (self.spec, self.columns, self.as_values, self.own, self.fnuz) == (
            other.spec, other.columns, other.as_values, other.own, other.fnuz)
        if not alike or self.given is None or other.given is None:
            return alike and self.given is other.given
        return torch.equal(self.given, other.given)

    def _made(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Uninitialised rows, scales (of rows or groups), and the global factor of each row."""
        spec, device = self.spec, like.device
        if spec is None:
            return torch.empty((rows, columns), dtype=like.dtype, device=device), None, None
        integer = torch.int8 if spec.element.startswith("int") else torch.uint8
        values = torch.empty((rows, self.columns or columns), dtype=self.as_values or integer, device=device)
        if spec.granularity != "group":
            return values, torch.empty(rows, dtype=torch.float32, device=device), None
        if self.own:
            has_outer = ARITHMETIC[spec.recipe].scale_codes == "fp8_e4m3fn"
            return values, None, torch.empty(rows, dtype=torch.float32, device=device) if has_outer else None
        groups = -(-values.shape[1] // spec.group_size)
        return values, torch.empty((groups, rows), dtype=torch.float32, device=device), None


def input_for(
    spec: ActivationSpec, tensors: Mapping[str, Tensor] = _NONE, *, columns: int = 0,
    as_values: torch.dtype | None = None, own: bool = False, fnuz: bool = False,
) -> Input | None:  # fmt: skip
    """The recipe as the kernels carry it out in passing; None where it needs a kernel of its own."""
    arithmetic = ARITHMETIC.get(spec.recipe)
    if arithmetic is None or not is_made_in_passing(spec) or (
            arithmetic.optional == "zero_point" and "zero_point" in tensors):
        return None
    given = tensors.get(arithmetic.given or arithmetic.optional)
    wants_given = bool(arithmetic.given) or arithmetic.rule == "torchao_nvfp4"
    if (given is None and wants_given) or (given is not None and given.numel() != 1):
        return None
    is_own = own and spec.granularity == "group"
    return Input(spec, given, columns, as_values, is_own, fnuz)


_constants: dict[tuple[Any, ...], dict[str, Any]] = {}


def _launch_constants(wanted: Input, scales: Tensor | None, outer: Tensor | None, arch: str) -> dict[str, Any]:
    """What the kernels are compiled for, the same mapping at every call."""
    key = (wanted.spec, wanted.given is None, wanted.as_values, wanted.own, wanted.fnuz, arch)
    found = _constants.get(key)
    if found is None:
        if wanted.spec is None:
            found = PLAIN
        else:
            native = (wanted.spec.element == "fp8_e4m3fn" and wanted.as_values is None and not wanted.fnuz
                      and has_native_e4m3(arch))
            found = input_constants(
                wanted.spec, has_given=wanted.given is not None, scales=scales is not None, outer=outer is not None,
                values=wanted.as_values is not None, own=wanted.own, fnuz=wanted.fnuz, native=native)
        _constants[key] = found
    return found


def norm(
    x: Tensor, weight: Tensor, eps: float, wanted: Input, *, delta: Tensor | None = None,
    count: Tensor | None = None, added: int = 0,
) -> tuple[Tensor, Rows]:  # fmt: skip
    """x (+ delta) [M, K], and its root-mean-square norm times weight [K] as the input of a product.

    count  int64, grows by `added`: a cache's count of tokens, once all that read it before have run
    """
    m, k = x.shape
    total = x if delta is None else torch.empty((m, k), dtype=x.dtype, device=x.device)
    values, scale, outer = wanted._made(m, k, x)
    launch = norm_launch(wanted.spec, k)
    jit.norm_rows[(m,)](
        x, x if delta is None else delta, weight, total, values, x if scale is None else scale,
        x if outer is None else outer, x if wanted.given is None else wanted.given, x if count is None else count,
        m, k, values.shape[1], 1 if scale is None or scale.dim() < 2 else scale.shape[0], x.stride(0),
        0 if delta is None else delta.stride(0), eps, added, HAS_DELTA=delta is not None, COUNTS=count is not None,
        **_launch_constants(wanted, scale, outer, arch_of(x.device)), BG=launch.groups, GS=launch.size,
        num_warps=launch.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return total, Rows(values, scale if outer is None else outer)


def gate(gate: Tensor, up: Tensor, wanted: Input) -> Rows:
    """silu(gate) * up of [M, K] (rows may lie apart) as the input of a product."""
    m, k = gate.shape
    values, scale, outer = wanted._made(m, k, gate)
    launch = gate_launch(wanted.spec, k)
    groups = -(-values.shape[1] // launch.size)
    jit.gate_rows[(m, -(-groups // launch.groups))](
        gate, up, values, gate if scale is None else scale, gate if outer is None else outer,
        gate if wanted.given is None else wanted.given, m, k, values.shape[1],
        1 if scale is None or scale.dim() < 2 else scale.shape[0], gate.stride(0), up.stride(0),
        **_launch_constants(wanted, scale, outer, arch_of(gate.device)), BG=launch.groups, GS=launch.size,
        WHOLE=launch.groups >= groups, num_warps=launch.warps, enable_fp_fusion=False,
    )  # fmt: skip
    return Rows(values, scale if outer is None else outer)


@dataclass(frozen=True)
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

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor, keys: Tensor, values: Tensor,
        tokens: int, held: int | Tensor, mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Rotates and stores the new tokens, and attends: [B T, heads dim].

        q [B T, heads dim], k, v [B T, kv_heads dim], rows may lie apart; cosine, sine [1 or B, T, dim];
        keys, values [B, kv_heads, room, dim] with `held` tokens, a number or an int64 tensor of one;
        mask bool [1 or B, 1, T, room]: which positions each token sees, None: those before it and itself.
        """
        batch, _, room, _ = keys.shape
        group = self.heads // self.kv_heads
        launch = attention_launch(self.dim, group * tokens, batch * self.kv_heads, room, arch_of(q.device))
        out = torch.empty((batch * tokens, self.heads * self.dim), dtype=q.dtype, device=q.device)
        parts, peaks, arrived = _scratch(q.device, launch.splits, batch * self.kv_heads, launch.rows, 2 * launch.half)
        counted = isinstance(held, Tensor)
        jit.decode_attention[(batch * self.kv_heads, launch.splits)](
            q, k, v, cosine, sine, q if self.q_norm is None else self.q_norm,
            q if self.k_norm is None else self.k_norm, keys, values, q if mask is None else mask,
            held if counted else q, out, parts, peaks, arrived, q.stride(0), k.stride(0), v.stride(0),
            cosine.stride(0) if cosine.shape[0] > 1 else 0, cosine.stride(1), keys.stride(0), keys.stride(1),
            values.stride(0), values.stride(1), mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0,
            0 if mask is None else mask.stride(2), 0 if counted else held, room, self.kv_heads, self.scaling, self.eps,
            T=tokens, GROUP=group, ROWS=launch.rows, DIM=self.dim, HALF=launch.half, BN=launch.block,
            SPLITS=launch.splits, Q_NORM=self.q_norm is not None, K_NORM=self.k_norm is not None,
            MASK=mask is not None, COUNTED=counted, num_warps=launch.warps, num_stages=launch.stages,
            enable_fp_fusion=False,
        )  # fmt: skip
        return out


_counters: dict[torch.device, Tensor] = {}
COUNTERS: Final = 4096  # sequences times heads of the cache that share parts


def _scratch(device: torch.device, splits: int, pairs: int, rows: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Parts [pairs, splits, rows, dim] and their peaks and sums, float32; counters, zero between calls."""
    found = _counters.get(device)
    if found is None:
        found = _counters[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    assert pairs <= COUNTERS
    if splits == 1:
        return found, found, found
    parts = torch.empty((pairs, splits, rows, dim), dtype=torch.float32, device=device)
    return parts, torch.empty((pairs, splits, rows, 2), dtype=torch.float32, device=device), found
