"""The plan: a versioned document of what runs where and why, made from headers and a platform alone.

A plan is a pure function of (layers, config, platform, options): no tensor is read and torch is not imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from anybit.errors import Unsupported
from anybit.kernels.request import REGIMES, Regime, Request
from anybit.planning.choose import Choice, Refusal, choose, demand_known, reasons_to_dict
from anybit.planning.memory import DTYPE_BYTES, Memory, predict
from anybit.platforms import Platform
from anybit.schemes import Layer, LayerKind, Scheme

VERSION: Final = 1
Quantize = Callable[[Layer], Scheme | None]


class Planned(Protocol):
    """What a plan needs to know of a checkpoint."""

    @property
    def dialect(self) -> str:
        """Name of the dialect."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """Layers by module name."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config."""

    @property
    def plain_elements(self) -> int:
        """Number of elements in tensors that belong to no layer."""


@dataclass(frozen=True)
class PlanUnit:
    """Layers of equal kind, scheme and shape, which run on the same kernels.

    declared  the scheme in the checkpoint; `scheme` what runs (they differ under --quantization)
    """

    layers: tuple[str, ...]
    kind: LayerKind
    declared: Scheme
    scheme: Scheme
    shape: tuple[int, ...]
    choice: Choice
    dtype: str
    stored_bytes: int

    @property
    def executed(self) -> str:
        """The executed arithmetic in words."""
        element = self.scheme.activation.element if self.scheme.activation else None
        if self.kind == "embedding":
            return f"{self.scheme.element} rows looked up, decoded to {self.dtype}"
        if not self.scheme.is_quantized:
            return f"{self.dtype} product"
        left = f"{self.scheme.element} weights"
        right = f"{element} activations" if element else f"{self.dtype} activations"
        return f"{left} × {right}, decoded to float32 exactly, float32 sums"

    def kernel(self, regime: Regime) -> str:
        """Name of the kernel in a regime (lookups have one kernel)."""
        found = self.choice.kernels.get(regime) or self.choice.kernels["decode"]
        return found[0].name

    def to_dict(self) -> dict[str, Any]:
        """The unit as data."""
        request = Request(self.kind, self.scheme, self.shape, self.dtype)
        return {
            "layers": list(self.layers),
            "count": len(self.layers),
            "kind": self.kind,
            "shape": list(self.shape),
            "scheme": str(self.scheme),
            "declared": str(self.declared),
            "executed": self.executed,
            "execution": next(iter(self.choice.kernels.values()))[0].execution(request),
            "layout": self.choice.layout,
            "bytes_each": self.stored_bytes,
            "kernels": {
                regime: {"name": spec.name, "about": spec.about, "modelled_seconds": seconds}
                for regime, (spec, seconds) in self.choice.kernels.items()
            },
            "kernel": {"name": self.kernel("decode"), "about": self.choice.kernels["decode"][0].about},
            "refused": reasons_to_dict(self.choice.refused),
            "slower": [{"layout": name, "modelled_seconds": s} for name, s in self.choice.slower.items()],
        }


@dataclass(frozen=True)
class Plan:
    """What runs each layer of a checkpoint on a platform, and what it needs."""

    dialect: str
    platform: Platform
    dtype: str
    units: tuple[PlanUnit, ...]
    memory: Memory
    refused: Mapping[str, tuple[Refusal, ...]] = field(default_factory=dict)
    quantization: str | None = None
    notes: tuple[str, ...] = ()

    def unit_of(self, layer: str) -> PlanUnit:
        """The unit that a layer belongs to; KeyError for a refused or unknown one."""
        return self._by_layer()[layer]

    def _by_layer(self) -> dict[str, PlanUnit]:
        return {name: unit for unit in self.units for name in unit.layers}

    @property
    def changes_declared(self) -> bool:
        """True if some layer runs other arithmetic than the checkpoint declares."""
        return any(unit.scheme != unit.declared for unit in self.units)

    def demand_complete(self) -> None:
        """Raise Unsupported, naming the modules and every kernel's reasons, unless all layers run."""
        if not self.refused:
            return
        name, refusals = next(iter(self.refused.items()))
        reasons = {f"{r.kernel}: {reason.text}" for r in refusals for reason in r.reasons}
        raise Unsupported(
            "no kernel runs this layer",
            where=name,
            found=" · ".join(sorted(reasons)),
            wanted="one kernel without refusals",
            remedy="run on another platform: `anybit explain MODEL --on h100`",
            more=tuple(self.refused)[1:],
        )

    def to_dict(self) -> dict[str, Any]:
        """The versioned document; `digest` covers everything but itself."""
        document: dict[str, Any] = {
            "version": VERSION,
            "dialect": self.dialect,
            "platform": self.platform.to_dict(),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "regimes": {name: {"up_to_tokens": most, "priced_at_tokens": m} for name, (most, m) in REGIMES.items()},
            "units": [unit.to_dict() for unit in self.units],
            "refused": {name: reasons_to_dict(found) for name, found in self.refused.items()},
            "memory": self.memory.to_dict(),
            "notes": list(self.notes),
        }
        text = json.dumps(document, sort_keys=True)
        return {**document, "digest": hashlib.sha256(text.encode()).hexdigest()}


def plan_layers(
    checkpoint: Planned,
    platform: Platform,
    *,
    dtype: str,
    kernel: str | None = None,
    quantize: Quantize | None = None,
    quantization: str | None = None,
) -> Plan:
    """Choose kernels for every layer; layers of equal kind, scheme and shape become one unit.

    `quantize` gives the scheme that a layer is quantized to while loading, None to leave it.
    """
    if kernel is not None:
        demand_known(kernel)
    groups: dict[tuple[LayerKind, Scheme, Scheme, tuple[int, ...]], list[Layer]] = {}
    for layer in checkpoint.layers.values():
        scheme = (quantize(layer) if quantize is not None else None) or layer.scheme
        groups.setdefault((layer.kind, layer.scheme, scheme, layer.shape), []).append(layer)
    units = []
    refused: dict[str, tuple[Refusal, ...]] = {}
    for (kind, declared, scheme, shape), layers in groups.items():
        request = Request(kind, scheme, shape, dtype)
        choice = choose(request, platform, kernel if scheme.is_quantized else None)
        if not isinstance(choice, Choice):
            refused |= {layer.name: choice for layer in layers}
            continue
        spec = choice.kernels["decode"][0]
        names = tuple(layer.name for layer in layers)
        stored = spec.stored_bytes(request)
        units.append(PlanUnit(names, kind, declared, scheme, shape, choice, dtype, stored))
    memory = _memory(checkpoint, units, dtype)
    return Plan(checkpoint.dialect, platform, dtype, tuple(units), memory, refused, quantization)


def _memory(checkpoint: Planned, units: list[PlanUnit], dtype: str) -> Memory:
    layers = checkpoint.layers
    return predict(
        (unit.stored_bytes * len(unit.layers) for unit in units),
        ((layer.stored_bytes, layer.elements) for layer in layers.values()),
        checkpoint.plain_elements * DTYPE_BYTES.get(dtype, 4),
        checkpoint.config,
        dtype,
        max((layer.shape[-1] * layer.shape[-2] for layer in layers.values()), default=0),
    )


def with_notes(plan: Plan, *notes: str) -> Plan:
    """The plan with further remarks."""
    return replace(plan, notes=(*plan.notes, *notes))
