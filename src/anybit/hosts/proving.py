"""Proof on the device at hand: every kernel of a plan on the model's real weights against the float64 product.

The answer to "the same file gives nonsense on that card": each distinct (scheme, shape, kernel) of the plan is run on
inputs that find what random ones miss, and held to the bound that `kernels/trials.py` derives. What fails is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from anybit.checkpoints.checkpoint import Checkpoint
from anybit.checkpoints.online import OnlineQuantizer
from anybit.hosts.preparing import prepared
from anybit.kernels.catalogue import Stored
from anybit.kernels.product import product_of
from anybit.kernels.request import Request
from anybit.kernels.trials import PROBE_TOKENS, Difference, compare, probes
from anybit.planning.plan import Plan, PlanUnit
from anybit.weights import Weight

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Proof:
    """One kernel on one layer.

    layer    whose weight was used; `layers` are all that it stands for
    shape    of that weight; `planned_shape` that of the layer, which may be a stack of experts
    worst    largest error over its bound: at most 1 is right
    relative Frobenius norm of the error over that of the product
    probe    the input with the worst error
    fault    what went wrong, "" where nothing did
    """

    kernel: str
    layer: str
    layers: int
    kind: str
    scheme: str
    shape: tuple[int, ...]
    planned_shape: tuple[int, ...]
    probes: int
    worst: float
    relative: float
    probe: str
    fault: str = ""

    @property
    def ok(self) -> bool:
        """True if every probe stayed within its bound."""
        return not self.fault

    @property
    def is_refusal(self) -> bool:
        """True where the kernel never ran: it does not hold this weight's values, or memory was short."""
        return self.fault.startswith(("Unsupported:", "OutOfMemoryError:", "MemoryError:"))

    def to_dict(self) -> dict[str, Any]:
        """The proof as data."""
        return {"kernel": self.kernel, "layer": self.layer, "layers": self.layers, "kind": self.kind,
                "scheme": self.scheme, "shape": list(self.shape), "probes": self.probes,
                "error_over_bound": self.worst, "relative_error": self.relative, "probe": self.probe,
                "ok": self.ok, "fault": self.fault}


def prove(
    checkpoint: Checkpoint, plan: Plan, device: torch.device | str, quantize: OnlineQuantizer | None = None,
    progress: Progress | None = None,
) -> Iterator[Proof]:
    """Run every kernel of the plan on the first layer of its unit; one Proof a kernel and unit.

    Weights are read one at a time; what a kernel raises is its fault, not ours.
    """
    dtype: torch.dtype = getattr(torch, plan.dtype)
    for unit in plan.units:
        name = unit.layers[0]
        if progress is not None:
            progress(name)
        weight: Weight = checkpoint.read(name)
        if quantize is not None:
            weight = quantize(checkpoint.layers[name], weight)
        if len(weight.shape) == 3:
            weight = weight.expert(weight.shape[0] - 1)
        weight = weight.to(device)
        yield from _unit_proofs(plan, unit, name, weight, dtype, device)


def _unit_proofs(
    plan: Plan, unit: PlanUnit, name: str, weight: Weight, dtype: torch.dtype, device: torch.device | str
) -> Iterator[Proof]:
    def proof(kernel: str, tried: int, worst: Difference, probe: str, fault: str) -> Proof:
        return Proof(kernel, name, len(unit.layers), unit.kind, str(unit.scheme), tuple(weight.shape), unit.shape,
                     tried, worst.worst, worst.relative, probe, fault)

    try:
        stored = prepared(unit.choice, weight, dtype, plan.policy)
    except Exception as error:
        yield proof(unit.choice.spec.name, 0, Difference(float("inf"), float("inf")), "prepare", _said(error))
        return
    if unit.kind == "embedding":
        yield _lookup(weight, stored, dtype, device, proof, unit.choice.spec.name)
        return
    request = Request(unit.kind, weight.scheme, tuple(weight.shape), plan.dtype)
    found: dict[str, list[tuple[Difference, str, str]]] = {}
    for label, x in (*probes(weight.shape[-1], dtype, device), *_for_the_rest(unit, weight, dtype, device)):
        chosen = unit.choice.at(x.shape[0]).spec
        rounds = chosen.rounds(request, plan.platform)
        try:
            difference = compare(weight, product_of(weight, stored), x, rounds)
            fault = difference.fault
        except Exception as error:
            difference, fault = Difference(float("inf"), float("inf")), _said(error)
        found.setdefault(chosen.name, []).append((difference, label, fault))
    for kernel, tried in found.items():
        worst, label, fault = max(tried, key=lambda row: (bool(row[2]), row[0].worst))
        yield proof(kernel, len(tried), worst, label, fault)


def _for_the_rest(
    unit: PlanUnit, weight: Weight, dtype: torch.dtype, device: torch.device | str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Inputs for kernels of the plan that no probe reaches: those of many tokens."""
    names = unit.choice.names
    tried = {names.at(tokens) for tokens in PROBE_TOKENS}
    fewest = 1
    for most, name in names.steps:
        if name not in tried:
            x = torch.randn(fewest, weight.shape[-1], generator=torch.Generator().manual_seed(fewest))
            yield f"normal, M = {fewest}", x.to(dtype).to(device)
        fewest = most + 1


def _lookup(
    weight: Weight, stored: Stored, dtype: torch.dtype, device: torch.device | str,
    proof: Callable[[str, int, Difference, str, str], Proof], kernel: str,
) -> Proof:
    """Rows of a table are decoded, not multiplied: they must be equal."""
    rows = weight.shape[0]
    index = torch.tensor([0, rows - 1, rows // 2, rows // 3], device=device)
    try:
        equal = torch.equal(stored.rows(index, dtype), weight.dequantize()[index].to(dtype))
        fault = "" if equal else "a row is not the decoded row of the table"
    except Exception as error:
        equal, fault = False, _said(error)
    return proof(kernel, len(index), Difference(0.0 if equal else float("inf"), 0.0), "lookup", fault)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
