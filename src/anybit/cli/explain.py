"""`anybit explain`: what would run each layer on a platform, why, and why not something else. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

import anybit
from anybit.checkpoints import Checkpoint
from anybit.cli import options
from anybit.cli.folding import part_names
from anybit.cli.output import Output, duration, make_output, shown, size
from anybit.kernels.request import REGIMES, Regime
from anybit.planning.choose import WEIGHTS, reasons_to_dict
from anybit.planning.plan import Plan, PlanUnit

_CONTEXT = 4096  # tokens at which the memory of the cache is shown


def explain(
    model: options.Model,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="PLATFORM", help="one or more, with commas: cpu, h100, mi300x, ...",
                     rich_help_panel=options.CHOICE, show_default="this machine"),
    ] = None,
    quantization: options.Quantization = None,
    dtype: options.Dtype = None,
    kernel: options.Kernel = None,
    all_: Annotated[
        bool, typer.Option("--all", help="every shape on its own, with the names of its layers",
                           rich_help_panel=options.OUTPUT)
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What would run and why: kernels, arithmetic, modelled times, memory, and every refusal's reasons.

    anybit explain smollm2

    anybit explain ./qwen3-8b-w4a16 --on mi300x,h100

    anybit explain smollm2 --quantization nvfp4 --json
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    checkpoint = anybit.open(model)
    names = [name.strip() for name in on.split(",") if name.strip()] if on else [None]
    plans = [anybit.plan(checkpoint, name, dtype=dtype, quantization=quantization, kernel=kernel) for name in names]
    if json:
        documents = [plan.to_dict() for plan in plans]
        output.document("explain", {"model": model, **documents[0]} if len(plans) == 1
                        else {"model": model, "plans": documents})
        return
    for plan in plans:
        _print(output, model, checkpoint, plan, folded=not all_)
    output.hint(f"next: anybit run {shown(model)} \"What is the capital of France?\"")


def _print(output: Output, model: str, checkpoint: Checkpoint, plan: Plan, *, folded: bool) -> None:
    output.line(f"{shown(model)} · {plan.dialect} · on {shown(plan.platform.title)} · activations {plan.dtype}")
    for group in fold_units(plan.units, folded=folded):
        output.line()
        output.line(group.title)
        output.rows(list(_rows(group, checkpoint, names=not folded)))
    if plan.refused:
        output.line()
        output.rows(list(_refused_rows(plan)))
    output.line()
    output.rows(memory_rows(plan), indent=0)
    output.rows([("note", shown(note)) for note in plan.notes], indent=0)


@dataclass(frozen=True)
class UnitGroup:
    """Units that differ in shape only: same kind, schemes, kernels and refusals."""

    units: tuple[PlanUnit, ...]

    @property
    def layers(self) -> list[str]:
        """All their layers."""
        return [name for unit in self.units for name in unit.layers]

    @property
    def title(self) -> str:
        """Kind, count, scheme."""
        first = self.units[0]
        shapes = ", ".join(" x ".join(map(str, unit.shape)) for unit in self.units)
        return f"{first.kind} ×{len(self.layers)}  {shown(first.scheme)}  [{shapes}]"

    def seconds(self, regime: Regime) -> float | None:
        """Modelled time of one pass through all layers of the group; None where the regime does not occur."""
        found = [(len(unit.layers), unit.choice.kernels.get(regime)) for unit in self.units]
        times = [count * chosen[1] for count, chosen in found if chosen is not None]
        return sum(times) if times else None

    def slower(self) -> dict[str, float]:
        """How many times dearer each other layout is, over the regimes as the chooser weighs them."""
        chosen = sum(len(u.layers) * WEIGHTS[r] * s for u in self.units for r, (_, s) in u.choice.kernels.items())
        names = dict.fromkeys(name for unit in self.units for name in unit.choice.slower)
        total = {n: sum(len(u.layers) * u.choice.slower.get(n, 0.0) for u in self.units) for n in names}
        return {name: seconds / chosen for name, seconds in total.items()} if chosen else {}


def fold_units(
    units: Iterable[PlanUnit], *, folded: bool = True, by_kernels: bool = True
) -> Iterator[UnitGroup]:
    """Units of a plan, those that differ in shape only put together; without `by_kernels` also where kernels differ."""
    groups: dict[object, list[PlanUnit]] = {}
    for unit in units:
        kernels = tuple((regime, spec.name) for regime, (spec, _) in unit.choice.kernels.items())
        chosen = (kernels, unit.choice.refused) if by_kernels else None
        key = (unit.kind, unit.declared, unit.scheme, chosen)
        groups.setdefault(key if folded else id(unit), []).append(unit)
    return (UnitGroup(tuple(members)) for members in groups.values())


def _rows(group: UnitGroup, checkpoint: Checkpoint, *, names: bool) -> Iterator[tuple[str, ...]]:
    first = group.units[0]
    yield "layers", shown(", ".join(group.layers), 100_000) if names else shown(part_names(group.layers))
    for regime, (largest, priced) in REGIMES.items():
        chosen = first.choice.kernels.get(regime)
        seconds = group.seconds(regime)
        if chosen is not None and seconds is not None:
            bound = f"M ≤ {largest}" if largest < 2**31 - 1 else "larger M"
            yield regime, f"{chosen[0].name}  {duration(seconds)} modelled at M = {priced}  ({bound})"
    yield "declared", declared_arithmetic(first)
    yield "executed", first.executed
    for name, times in group.slower().items():
        yield "slower", f"layout {name}: {times:.1f}× the time"
    for refusal in reasons_to_dict(first.choice.refused):
        regimes = refusal["regimes"]
        where = "" if len(regimes) == len(first.choice.kernels) else f" ({', '.join(regimes)})"
        reasons = "; ".join(shown(reason["text"]) for reason in refusal["reasons"])
        yield "refused", f"{refusal['kernel']}{where}: {reasons}"


def declared_arithmetic(unit: PlanUnit) -> str:
    """What the checkpoint declares for a unit, in words."""
    scheme = unit.declared
    weights = f"{scheme.element} weights"
    activations = f"{scheme.activation} activations" if scheme.activation else "activations not quantized"
    asked = f"; --quantization makes it {unit.scheme}" if unit.scheme != scheme else ""
    return f"{weights}, {activations}{asked}"


def _refused_rows(plan: Plan) -> Iterator[tuple[str, ...]]:
    for name, refusals in plan.refused.items():
        yield "no kernel", shown(name)
        for refusal in reasons_to_dict(refusals):
            yield "", f"{refusal['kernel']}: " + "; ".join(shown(r["text"]) for r in refusal["reasons"])


def memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Predicted memory as label and text."""
    memory = plan.memory
    parts = [f"weights {size(memory.weights)}", f"plain tensors {size(memory.plain)}",
             f"workspace {size(memory.workspace)}", f"cache {size(memory.cache_per_token)} a token"]
    total = f"{size(memory.at(_CONTEXT))} with {_CONTEXT:,} tokens, {size(memory.loading)} more while loading"
    return [("memory", " · ".join(parts)), ("", f"predicted: {total}")]


def summary(plan: Plan) -> dict[str, Any]:
    """The plan in short, as data: what `run --json` tells."""
    return {
        "dialect": plan.dialect,
        "platform": plan.platform.name,
        "dtype": plan.dtype,
        "kernels": [
            {"kind": g.units[0].kind, "count": len(g.layers), "scheme": str(g.units[0].scheme),
             "declared": str(g.units[0].declared), "executed": g.units[0].executed,
             "kernels": {r: spec.name for r, (spec, _) in g.units[0].choice.kernels.items()}}
            for g in fold_units(plan.units)
        ],
        "memory": plan.memory.to_dict(),
    }
