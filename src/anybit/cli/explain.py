"""`anybit explain`: what would run each layer on a platform, why, and why not something else. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer

import anybit
from anybit.checkpoints import Checkpoint
from anybit.checkpoints.online import online
from anybit.cli import options
from anybit.cli.explain_difference import print_difference
from anybit.cli.explain_html import page
from anybit.cli.explain_markdown import markdown
from anybit.cli.explain_tables import (
    CONTEXT,
    better_lines,
    comparison,
    decode_seconds,
    joined_lines,
    memory_parts,
    steps_line,
    took,
)
from anybit.cli.files import write_text
from anybit.cli.folding import part_names
from anybit.cli.output import ERROR_CHARS, Output, duration, make_output, shown, size, to_json
from anybit.errors import Unsupported
from anybit.kernels.request import REGIMES, Regime
from anybit.planning.choose import NOT_MEANT, WEIGHTS
from anybit.planning.plan import Plan, PlanUnit
from anybit.planning.records import reasons_to_dict


def explain(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="smollm2, a folder, a .gguf file, or a hub id",
                                   show_default=False)
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="PLATFORM", help="one or more, with commas: cpu, h100, mi300x, ...",
                     rich_help_panel=options.CHOICE, show_default="this machine"),
    ] = None,
    quantization: options.Quantization = None,
    quantize_only: options.QuantizeOnly = None,
    quantize_ignore: options.QuantizeIgnore = None,
    dtype: options.Dtype = None,
    kernel: options.Kernel = None,
    kv_cache: options.KVCache = "auto",
    strict: options.Strict = False,
    batch_invariant: options.BatchInvariant = False,
    plan: options.PlanFile = None,
    all_: Annotated[
        bool, typer.Option("--all", help="every shape on its own, with the names of its layers",
                           rich_help_panel=options.OUTPUT)
    ] = False,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="write the plan, for run --plan and --diff",
                                  rich_help_panel=options.OUTPUT, show_default=False)
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="write one self-contained page",
                                  rich_help_panel=options.OUTPUT, show_default=False)
    ] = None,
    md: Annotated[bool, typer.Option("--md", help="as Markdown", rich_help_panel=options.OUTPUT)] = False,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--diff", metavar="BEFORE AFTER", help="what differs between two saved plans; without a MODEL",
                     rich_help_panel=options.OUTPUT, show_default=False),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """What would run and why: kernels, arithmetic, times, memory, every refusal's reasons, and what would be faster.

    anybit explain smollm2

    anybit explain ./qwen3-8b-w4a16 --on mi300x,h100 --html plan.html

    anybit explain smollm2 --quantization 'nvfp4,*.down_proj=fp8_per_channel' --json

    anybit explain smollm2 --save plan.json

    anybit explain --diff before.json after.json
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    if (model is None) == (diff is None):
        raise Unsupported("explain takes a model, or two plans to compare",
                          found="both" if model is not None else "neither", wanted="MODEL, or --diff BEFORE AFTER",
                          remedy="anybit explain smollm2")
    if diff is not None or model is None:
        assert diff is not None
        print_difference(output, *diff)
        return
    checkpoint = anybit.open(model)
    names = options.platform_names(on)
    asked = online(quantization, quantize_only, quantize_ignore)
    plans = [anybit.plan(checkpoint, name, dtype=dtype, quantization=asked, kernel=kernel, kv_cache=kv_cache,
                         strict=strict, batch_invariant=batch_invariant, plan=plan) for name in names]
    if strict:
        for made in plans:
            made.demand_complete()
    documents = [made.to_dict() for made in plans]
    _write_files(output, model, documents, save, html)
    if json:
        output.document("explain", {"model": model, **documents[0]} if len(plans) == 1
                        else {"model": model, "plans": documents})
        return
    if md:
        output.text(markdown(model, documents))
        return
    if len(plans) > 1:
        _print_comparison(output, documents)
    for made, document in zip(plans, documents, strict=True):
        _print(output, model, checkpoint, made, document, folded=not all_)
    output.hint(f"next: anybit run {shown(model)} \"What is the capital of France?\"")


def _write_files(
    output: Output, model: str, documents: list[dict[str, Any]], save: Path | None, html: Path | None
) -> None:
    if save is not None:
        if len(documents) > 1:
            raise Unsupported("--save writes one plan", found=f"{len(documents)} platforms", wanted="one --on PLATFORM")
        write_text(save, to_json(documents[0], indent=1) + "\n")
        output.remark(f"wrote {shown(save)}")
    if html is not None:
        write_text(html, page(model, documents))
        output.remark(f"wrote {shown(html)}")


def _print_comparison(output: Output, documents: list[dict[str, Any]]) -> None:
    lines = comparison(documents)
    rows = [("layers", "declared", *(shown(d["platform"]["name"]) for d in documents))]
    for line in lines:
        head = f"{line.kind} ×{len(line.layers)}" if line.kind else f"×{len(line.layers)}"
        rows.append((head, shown(line.declared), *(f"{c.execution}: {c.short}" for c in line.cells)))
    rows.append(("decode", "products", *(duration(decode_seconds(d)) for d in documents)))
    rows.append(("memory", f"{CONTEXT:,} tokens", *(size(sum(memory_parts(d).values())) for d in documents)))
    output.rows(rows, indent=0)
    output.line()


def _print(
    output: Output, model: str, checkpoint: Checkpoint, plan: Plan, document: dict[str, Any], *, folded: bool
) -> None:
    output.line(f"{shown(model)} · {plan.dialect} · on {shown(plan.platform.title)} · activations {plan.dtype}")
    for group in fold_units(plan.units, folded=folded):
        output.line()
        output.line(group.title)
        output.rows(list(_rows(group, checkpoint, names=not folded)))
    if plan.refused:
        output.line()
        output.rows(list(_refused_rows(plan)))
    output.line()
    output.rows(cache_rows(plan) + memory_rows(plan), indent=0)
    output.rows([("unit", line) for line in joined_lines(document)], indent=0)
    output.rows([("changes", shown(what)) for what in dict.fromkeys(c.what for c in plan.changes)], indent=0)
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
        """Time of one pass through all layers of the group; None where the regime does not occur."""
        times = [seconds for unit in self.units if (seconds := unit.seconds(regime)) is not None]
        return sum(times) if times else None

    def slower(self) -> dict[str, float]:
        """How many times dearer each other layout is, over the regimes as the chooser weighs them."""
        chosen = sum(len(u.layers) * WEIGHTS[r] * c.price.seconds
                     for u in self.units for r, c in u.choice.kernels.items())
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
            price = f"{took(seconds, chosen.price.source)} at M = {priced}"
            rounds = first.rounds[regime]
            yield regime, (f"{chosen.spec.name}  {price}  ({bound}), {first.executions[regime]}"
                           + (f", rounds {rounds}" if rounds else ""))
    for line in _steps_lines(group):
        yield "by M", line
    yield "declared", declared_arithmetic(first)
    yield "executed", first.executed
    assumes = first.choice.spec.assumes(first.request())
    if assumes is not None:
        yield "if", f"{assumes}; otherwise torch-tiled"
    for line in better_lines(first.to_dict()):
        yield "faster", shown(line, ERROR_CHARS)
    for name, times in group.slower().items():
        yield "slower", f"layout {name}: {times:.1f}× the time"
    elsewhere = []
    for refusal in reasons_to_dict(first.choice.refused):
        if not names and any(reason["code"] in _OTHER_KERNELS for reason in refusal["reasons"]):
            elsewhere.append(refusal["kernel"])
            continue
        regimes = refusal["regimes"]
        where = "" if len(regimes) == len(first.choice.kernels) else f" ({', '.join(regimes)})"
        reasons = "; ".join(shown(reason["text"]) for reason in refusal["reasons"])
        yield "refused", f"{refusal['kernel']}{where}: {reasons}"
    if elsewhere:
        yield "not for it", ", ".join(dict.fromkeys(elsewhere)) + " (other chips or layers; --all tells why)"


def _steps_lines(group: UnitGroup) -> Iterator[str]:
    """Kernels by number of tokens where they change within a regime; with the shapes where those differ."""
    by_line: dict[str, list[str]] = {}
    for unit in group.units:
        by_line.setdefault(steps_line(unit.to_dict()), []).append(" x ".join(map(str, unit.shape)))
    for line, shapes in by_line.items():
        if line:
            yield line + (f"  [{', '.join(shapes)}]" if len(by_line) > 1 else "")


# a kernel refused for one of these is made for another chip or another kind of layer: nobody would expect it here
_OTHER_KERNELS: Final = frozenset({"vendor", *NOT_MEANT})


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


def cache_rows(plan: Plan) -> list[tuple[str, ...]]:
    """What happens to a declared key-value cache, as label and text; nothing where none is declared."""
    cache = plan.kv_cache
    if cache is None:
        return []
    return [("cache", f"declared {cache['declared']}"), ("", f"executed {cache['executed']}"),
            *(("", shown(note)) for note in cache["notes"])]


def memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Predicted memory as label and text."""
    memory = plan.memory
    parts = [f"weights {size(memory.weights)} ({size(memory.checkpoint)} before repacking)",
             f"plain tensors {size(memory.plain)}",
             f"workspace {size(memory.workspace)}", f"cache {size(memory.cache_per_token)} a token"]
    total = f"{size(memory.at(CONTEXT))} with {CONTEXT:,} tokens, {size(memory.loading)} more while loading"
    return [("memory", " · ".join(parts)), ("", f"predicted: {total}")]


def summary(plan: Plan) -> dict[str, Any]:
    """The plan in short, as data: what `run --json` tells."""
    return {
        "dialect": plan.dialect,
        "platform": plan.platform.name,
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "kernels": [
            {"kind": g.units[0].kind, "count": len(g.layers), "scheme": str(g.units[0].scheme),
             "declared": str(g.units[0].declared), "executed": g.units[0].executed,
             "kernels": {r: spec.name for r, (spec, _) in g.units[0].choice.kernels.items()}}
            for g in fold_units(plan.units)
        ],
        "kv_cache": None if plan.kv_cache is None else dict(plan.kv_cache),
        "memory": plan.memory.to_dict(),
        "notes": list(plan.notes),
    }
