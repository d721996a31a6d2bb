"""The plan: a versioned document of what runs where and why, made from headers and a platform alone.

A plan is a pure function of (layers, config, platform, options, measurements): no tensor is read and torch is not
imported. `to_dict` and `from_dict` are inverses; `replay.py` runs a document again, `difference.py` compares two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Protocol

from anybit.errors import Damaged, Unsupported
from anybit.kernels.request import BUCKETS, REGIMES, Execution, Kernels, Regime, Request, priced_at
from anybit.planning.choose import Choice, Policy, Refusal, changes_of, choose
from anybit.planning.memory import DTYPE_BYTES, Memory, predict
from anybit.planning.overrides import Overrides
from anybit.planning.passes import is_tied, multiplications
from anybit.planning.records import (
    better_to_dict,
    choice_from_dict,
    plain,
    platform_from_dict,
    reasons_to_dict,
    refusals_from_dict,
    scheme_from_dict,
    scheme_to_dict,
)
from anybit.planning.units import Part, Unit, units_from_dict, units_of, units_to_dict
from anybit.platforms import Platform
from anybit.schemes import Layer, LayerKind, Scheme

VERSION: Final = 3
Quantize = Callable[[Layer], Scheme | None]
PinnedKernels = Mapping[str, Kernels]
"""layer -> kernels, of a plan that is replayed."""


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


_HOW: Final[Mapping[Execution, str]] = {
    "native": "multiplied by the chip in these formats",
    "exact emulation": "decoded exactly, float32 sums",
    "weight-only": "weights decoded, the declared activation quantization left out",
    "unquantized": "",
}


@dataclass(frozen=True)
class Change:
    """Arithmetic that differs from what the checkpoint declares, and for which layers."""

    layers: tuple[str, ...]
    what: str

    def to_dict(self) -> dict[str, Any]:
        """The change as data."""
        return {"layers": list(self.layers), "what": self.what}


@dataclass(frozen=True)
class PlanUnit:
    """Layers of equal kind, scheme and shape, which run on the same kernels.

    declared  the scheme in the checkpoint; `scheme` what runs (they differ under --quantization)
    runs      how often the matrix is multiplied in one pass of a regime, through all the layers: of experts those that
              some token chooses
    """

    layers: tuple[str, ...]
    kind: LayerKind
    declared: Scheme
    scheme: Scheme
    shape: tuple[int, ...]
    choice: Choice
    dtype: str
    stored_bytes: int
    platform: Platform
    runs: Mapping[Regime, float] = field(default_factory=dict)

    def seconds(self, regime: Regime) -> float | None:
        """Time of one pass through all its layers; None where the regime does not occur."""
        chosen = self.choice.kernels.get(regime)
        return None if chosen is None else self.runs[regime] * chosen.price.seconds

    def request(self, regime: Regime = "decode") -> Request:
        """What a kernel is asked for this unit."""
        return Request(self.kind, self.scheme, self.shape, self.dtype, regime)

    @property
    def executions(self) -> dict[Regime, Execution]:
        """How each regime carries out the declared arithmetic."""
        return {r: chosen.spec.executes(self.request(r), self.platform) for r, chosen in self.choice.kernels.items()}

    @property
    def rounds(self) -> dict[Regime, str | None]:
        """What each regime rounds beyond the declared arithmetic."""
        return {r: chosen.spec.rounds(self.request(r), self.platform) for r, chosen in self.choice.kernels.items()}

    @property
    def executed(self) -> str:
        """The executed arithmetic of a decode step in words."""
        if self.kind == "embedding":
            return f"{self.scheme.element} rows looked up, decoded to {self.dtype}"
        if not self.scheme.is_quantized:
            return f"{self.dtype} product"
        how = self.executions["decode"]
        activation = self.scheme.activation
        right = activation.element if activation is not None and how != "weight-only" else self.dtype
        return f"{self.scheme.element} weights × {right} activations, {_HOW[how]}"

    def changes(self) -> Iterator[Change]:
        """Where this unit runs other arithmetic than declared."""
        if self.scheme != self.declared:
            yield Change(self.layers, f"quantized while loading: {self.declared} declared, {self.scheme} executed")
        found: dict[str, dict[Regime, None]] = {}
        for most, chosen in self.choice.buckets:
            asked = self.request().of(priced_at(most) if len(self.choice.buckets) > 1 else 1)
            for change in changes_of(chosen.spec, asked, self.platform):
                found.setdefault(f"{chosen.spec.name}: {change}", {})[asked.regime] = None
        for change, regimes in found.items():
            yield Change(self.layers, f"{change} (in {', '.join(regimes)})")

    def kernel(self, regime: Regime) -> str:
        """Name of the kernel in a regime (lookups have one kernel)."""
        return (self.choice.kernels.get(regime) or self.choice.kernels["decode"]).spec.name

    def to_dict(self) -> dict[str, Any]:
        """The unit as data."""
        executions, rounds = self.executions, self.rounds
        assumes = self.choice.spec.assumes(self.request())
        return {
            "layers": list(self.layers),
            "count": len(self.layers),
            "kind": self.kind,
            "shape": list(self.shape),
            "scheme": str(self.scheme),
            "declared": str(self.declared),
            "scheme_fields": scheme_to_dict(self.scheme),
            "declared_fields": scheme_to_dict(self.declared),
            "executed": self.executed,
            "execution": executions["decode"],
            "changes": [change.what for change in self.changes()],
            "layout": self.choice.layout,
            "bytes_each": self.stored_bytes,
            "runs_a_pass": dict(self.runs),
            "kernels": {
                regime: {
                    "name": spec.name, "about": spec.about, "execution": executions[regime], "rounds": rounds[regime],
                    "seconds": price.seconds, "price": price.source,
                    "workspace_bytes": spec.workspace(self.request(regime)),
                }
                for regime, (spec, price) in self.choice.kernels.items()
            },
            "by_tokens": [
                {"up_to_tokens": most, "name": spec.name, "seconds": price.seconds, "price": price.source}
                for most, (spec, price) in self.choice.buckets
            ],
            "kernel": {"name": self.kernel("decode"), "about": self.choice.spec.about},
            "preconditions": [{"condition": assumes, "otherwise": "torch-tiled"}] if assumes else [],
            "refused": reasons_to_dict(self.choice.refused),
            "slower": [{"layout": name, "seconds": s} for name, s in self.choice.slower.items()],
            "better": better_to_dict(self.choice.better),
        }


def _unit_from_dict(row: Mapping[str, Any], dtype: str, platform: Platform) -> PlanUnit:
    return PlanUnit(
        tuple(row["layers"]), row["kind"], scheme_from_dict(row["declared_fields"]),
        scheme_from_dict(row["scheme_fields"]), tuple(row["shape"]), choice_from_dict(row), dtype, row["bytes_each"],
        platform, dict(row["runs_a_pass"]),
    )


@dataclass(frozen=True)
class Plan:
    """What runs each layer of a checkpoint on a platform, and what it needs.

    joined    layers that read the same input, and whether they run as one product
    policy    what narrowed the choice
    kernels   the rules of --kernel, as given
    is_replayed   its kernels are those of a plan that was written before, and no others may run
    """

    dialect: str
    platform: Platform
    dtype: str
    units: tuple[PlanUnit, ...]
    memory: Memory
    refused: Mapping[str, tuple[Refusal, ...]] = field(default_factory=dict)
    quantization: str | None = None
    notes: tuple[str, ...] = ()
    kv_cache: Mapping[str, Any] | None = None
    joined: tuple[Unit, ...] = ()
    policy: Policy = field(default_factory=Policy)
    kernels: tuple[str, ...] = ()
    is_replayed: bool = False

    def unit_of(self, layer: str) -> PlanUnit:
        """The unit that a layer belongs to; KeyError for a refused or unknown one."""
        return self._by_layer[layer]

    @cached_property
    def _by_layer(self) -> dict[str, PlanUnit]:
        return {name: unit for unit in self.units for name in unit.layers}

    @cached_property
    def _joined_layers(self) -> frozenset[tuple[str, ...]]:
        return frozenset(unit.layers for unit in self.joined if unit.is_joined)

    def runs_as_one(self, layers: tuple[str, ...]) -> bool:
        """True if these layers, in this order, run as one product."""
        return layers in self._joined_layers

    @property
    def changes(self) -> tuple[Change, ...]:
        """Everything that runs otherwise than the checkpoint declares."""
        found = [change for unit in self.units for change in unit.changes()]
        cache = self.kv_cache
        if cache is not None and not cache["is_executed"]:
            found.append(Change((), f"key-value cache: {cache['declared']} declared, {cache['executed']} executed"))
        return tuple(found)

    @property
    def changes_declared(self) -> bool:
        """True if some layer runs other arithmetic than the checkpoint declares."""
        return bool(self.changes)

    def demand_complete(self) -> None:
        """Raise Unsupported unless every layer runs and, under a strict policy, as declared.

        The error names the modules and every kernel's reasons, or the changes.
        """
        if self.policy.strict:
            self._demand_declared()
        if not self.refused:
            return
        name, refusals = next(iter(self.refused.items()))
        reasons = {f"{r.kernel}: {reason.text}" for r in refusals for reason in r.reasons}
        raise Unsupported(
            "no kernel runs this layer",
            where=name,
            found=" · ".join(sorted(reasons)),
            wanted="one kernel without refusals",
            remedy=self._remedy(refusals),
            more=tuple(self.refused)[1:],
        )

    def _remedy(self, refusals: tuple[Refusal, ...]) -> str:
        if any(reason.code == "disproved" for refusal in refusals for reason in refusal.reasons):
            return "mend or update what was wrong, then `anybit prove MODEL --forget`; or run on another platform"
        narrowing = [f"--{word}" for word, on in (("batch-invariant", self.policy.batch_invariant),
                                                  ("strict", self.policy.strict)) if on]
        without = f"leave {' and '.join(narrowing)} out, or " if narrowing else ""
        return f"{without}run on another platform: `anybit explain MODEL --on h100`"

    def _demand_declared(self) -> None:
        changes = self.changes
        if not changes:
            return
        layers = [name for change in changes for name in change.layers]
        raise Unsupported(
            "the plan changes the arithmetic that the checkpoint declares",
            where=layers[0] if layers else "",
            found=" · ".join(dict.fromkeys(change.what for change in changes)),
            wanted="the declared arithmetic (--strict)",
            remedy="leave --strict out, or the options that change it (--quantization, --kv-cache none, --kernel)",
            more=layers[1:],
        )

    def to_dict(self) -> dict[str, Any]:
        """The versioned document; `digest` covers everything but itself."""
        document: dict[str, Any] = {
            "version": VERSION,
            "dialect": self.dialect,
            "platform": plain(self.platform.to_dict()),
            "dtype": self.dtype,
            "quantization": self.quantization,
            "policy": {"strict": self.policy.strict, "batch_invariant": self.policy.batch_invariant},
            "kernels": list(self.kernels),
            "regimes": {name: {"up_to_tokens": most, "priced_at_tokens": m} for name, (most, m) in REGIMES.items()},
            "buckets": [{"up_to_tokens": most, "priced_at_tokens": m} for most, m in BUCKETS],
            "units": [unit.to_dict() for unit in self.units],
            "joined": units_to_dict(self.joined),
            "refused": {name: reasons_to_dict(found) for name, found in self.refused.items()},
            "changes": [change.to_dict() for change in self.changes],
            "memory": self.memory.to_dict(),
            "kv_cache": None if self.kv_cache is None else plain(self.kv_cache),
            "notes": list(self.notes),
        }
        return {**document, "digest": digest_of(document)}

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> Plan:
        """The plan of a document, with its digest, kernels and platform as they were written.

        Raises Damaged or Unsupported for another version, a digest that does not fit, a missing field, or a kernel
        that does not exist any more (`replay.demand_sound`).
        """
        from anybit.planning.replay import demand_sound

        try:
            return Plan._from_sound(demand_sound(document))
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # whoever changed it made a digest as well
            raise Damaged("no plan, or a changed one", found=f"{type(error).__name__}: {error}",
                          wanted="what `anybit explain MODEL --save plan.json` writes",
                          remedy="make it again") from error

    @staticmethod
    def _from_sound(document: Mapping[str, Any]) -> Plan:
        policy, platform = document["policy"], platform_from_dict(document["platform"])
        return Plan(
            dialect=document["dialect"],
            platform=platform,
            dtype=document["dtype"],
            units=tuple(_unit_from_dict(row, document["dtype"], platform) for row in document["units"]),
            memory=Memory.from_dict(document["memory"]),
            refused={name: refusals_from_dict(rows) for name, rows in document["refused"].items()},
            quantization=document["quantization"],
            notes=tuple(document["notes"]),
            kv_cache=document["kv_cache"],
            joined=units_from_dict(document["joined"]),
            policy=Policy(strict=policy["strict"], batch_invariant=policy["batch_invariant"]),
            kernels=tuple(document["kernels"]),
        )


def digest_of(document: Mapping[str, Any]) -> str:
    """SHA-256 of a document without its own digest."""
    text = json.dumps({k: v for k, v in document.items() if k != "digest"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plan_layers(
    checkpoint: Planned,
    platform: Platform,
    *,
    dtype: str,
    kernel: str | Overrides | None = None,
    quantize: Quantize | None = None,
    quantization: str | None = None,
    policy: Policy | None = None,
    pinned: PinnedKernels | None = None,
) -> Plan:
    """Choose kernels for every layer; layers of equal kind, scheme, shape and rule become one unit.

    kernel    rules of --kernel, or a kernel's name for all quantized layers
    quantize  gives the scheme that a layer is quantized to while loading, None to leave it
    policy    strictness, batch invariance, measurements
    pinned    kernels of an earlier plan: exactly these
    """
    policy = policy or Policy()
    rules = kernel if isinstance(kernel, Overrides) else Overrides.parse([kernel] if kernel else [])
    wanted = rules.by_layer(checkpoint.layers.values())
    fixed = pinned or {}
    schemes = {layer.name: (quantize(layer) if quantize is not None else None) or layer.scheme
               for layer in checkpoint.layers.values()}
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in checkpoint.layers.values():
        kernels = fixed[layer.name].steps if layer.name in fixed else ()
        key = (layer.kind, layer.scheme, schemes[layer.name], layer.shape, wanted.get(layer.name), kernels)
        groups.setdefault(key, []).append(layer)
    tied = is_tied(checkpoint.layers)
    units = []
    refused: dict[str, tuple[Refusal, ...]] = {}
    for layers in groups.values():
        first = layers[0]
        request = Request(first.kind, schemes[first.name], first.shape, dtype)
        rule = wanted.get(first.name)
        override = None if rule is None else rule.kernel_for(request, platform)
        written = None if pinned is None else fixed.get(first.name, Kernels(()))
        choice = choose(request, platform, override, policy, written)
        if not isinstance(choice, Choice):
            refused |= {layer.name: choice for layer in layers}
            continue
        names = tuple(layer.name for layer in layers)
        stored = choice.spec.stored_bytes(request)
        runs = {regime: multiplications(first.kind, names, first.shape, checkpoint.config, m, tied=tied)
                for regime, (_, m) in REGIMES.items()}
        units.append(PlanUnit(names, first.kind, first.scheme, request.scheme, first.shape, choice, dtype, stored,
                              platform, runs))
    plan = Plan(checkpoint.dialect, platform, dtype, tuple(units), _memory(checkpoint, units, dtype), refused,
                quantization, rules.notes(wanted), policy=policy, kernels=rules.texts)
    return replace(plan, joined=tuple(_joined(plan, checkpoint)))


def _joined(plan: Plan, checkpoint: Planned) -> Iterator[Unit]:
    def part_of(name: str) -> Part | None:
        unit = None if name in plan.refused else plan.unit_of(name)
        layer = checkpoint.layers[name]
        return None if unit is None else Part(layer, unit.scheme, unit.choice.layout, unit.choice.names)

    return units_of(checkpoint.layers, part_of, pinned=plan.policy.batch_invariant)


def _memory(checkpoint: Planned, units: list[PlanUnit], dtype: str) -> Memory:
    layers = checkpoint.layers
    return predict(
        (unit.stored_bytes * len(unit.layers) for unit in units),
        ((layer.stored_bytes, layer.elements) for layer in layers.values()),
        checkpoint.plain_elements * DTYPE_BYTES.get(dtype, 4),
        checkpoint.config,
        dtype,
        max((layer.shape[-1] * layer.shape[-2] for layer in layers.values()), default=0),
        max((c.spec.workspace(u.request(r)) for u in units for r, c in u.choice.kernels.items()), default=0),
    )


def with_notes(plan: Plan, *notes: str) -> Plan:
    """The plan with further remarks."""
    return replace(plan, notes=(*plan.notes, *notes))
