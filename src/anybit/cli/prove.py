"""`anybit prove`: whether every kernel of the plan is right on this device, with this model's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from anybit.checkpoints import Checkpoint
from anybit.checkpoints.online import OnlineQuantizer, online, quantizer
from anybit.cli import options
from anybit.cli.loading import open_for_running
from anybit.cli.output import EXIT_OK, Output, counted, make_output, shown
from anybit.hosts.plans import make_plan
from anybit.planning import measured
from anybit.planning.measured import Measured
from anybit.platforms import Platform, detect

if TYPE_CHECKING:
    from anybit.hosts.proving import Proof
    from anybit.planning.plan import Plan

_EXIT_FAILED = 1


def prove(
    model: options.Model,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    quantize_only: options.QuantizeOnly = None,
    quantize_ignore: options.QuantizeIgnore = None,
    kernel: options.Kernel = None,
    strict: options.Strict = False,
    batch_invariant: options.BatchInvariant = False,
    plan: options.PlanFile = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="first forget which kernels were found wrong on this machine",
                           rich_help_panel=options.CHOICE)
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run every kernel of the plan on the model's own weights and compare with the float64 product.

    A kernel outside its derived bound is named, disqualified on this machine, and the next best is planned and proved
    in its place (not with --plan or --kernel, which leave no choice). Exit code 1 if any failed.

    anybit prove smollm2

    anybit prove ./qwen3-8b-nvfp4 --device cuda

    anybit prove ./model --forget --json

    anybit prove ./model --plan plan.json
    """
    output = make_output("json" if json else "quiet" if quiet else "human")
    checkpoint = open_for_running(model, output, tokenizer=False)
    platform = detect(device or "auto")
    known = measured.read(platform)
    for remark in known.remarks:
        output.warning(remark)
    if forget and known.disproved:
        known.disproved.clear()
        measured.write(platform, known)
    asked = online(quantization, quantize_only, quantize_ignore)
    proofs: list[Proof] = []
    failed: list[Proof] = []
    while True:
        made = make_plan(checkpoint, platform, dtype=dtype, quantization=asked, kernel=kernel, strict=strict,
                         batch_invariant=batch_invariant, plan=plan, known=known)
        if not failed:
            made.demand_complete()  # later, what runs no more is part of the report
        rules = quantizer(made.quantization) if made.quantization is not None else None
        done = {(p.kernel, p.scheme, p.planned_shape) for p in proofs}
        found = _prove(checkpoint, made, options.torch_device(device, platform), rules, output, done)
        wrong = [proof for proof in found if not proof.ok]
        proofs += found
        failed += wrong
        if not wrong:
            break
        _disqualify(platform, known, wrong, output)
        if kernel is not None or plan is not None:
            break
    _report(output, model, made, proofs, failed, json=json)
    raise typer.Exit(_EXIT_FAILED if failed else EXIT_OK)


def _prove(
    checkpoint: Checkpoint, plan: Plan, device: str, rules: OnlineQuantizer | None, output: Output,
    done: set[tuple[str, str, tuple[int, ...]]],
) -> list[Proof]:
    """Proofs of what was not proved before."""
    from anybit.hosts.proving import prove as run

    units = tuple(u for u in plan.units
                  if not {(name, str(u.scheme), u.shape) for name in u.choice.names.used} <= done)
    with output.progress("proving", len(units), unit="layers") as advance:
        return list(run(checkpoint, replace(plan, units=units), device, rules,
                        lambda _: advance(1)))


def _disqualify(platform: Platform, known: Measured, wrong: list[Proof], output: Output) -> None:
    """Leave the wrong kernels out of the next plan, and of every later one where the store can be written.

    A kernel that refused this very weight is not wrong: it is left out of this model's next plan alone.
    """
    before = dict(known.disproved)
    known.disproved |= {(proof.kernel, proof.scheme): f"{proof.fault} ({proof.probe})" for proof in wrong}
    kept = {(proof.kernel, proof.scheme) for proof in wrong if not proof.is_refusal}
    lasting = {key: text for key, text in known.disproved.items() if key in kept or key in before}
    try:
        measured.write(platform, replace(known, disproved=lasting))
    except OSError as error:
        output.warning(f"what was found cannot be kept in {shown(str(measured.path_of(platform)))}: "
                       f"{shown(str(error))}; set ANYBIT_CACHE to a folder that can be written")


def _report(
    output: Output, model: str, plan: Plan, proofs: list[Proof], failed: list[Proof], *, json: bool
) -> None:
    if json:
        output.document("prove", {
            "model": model, "platform": plan.platform.to_dict(), "dtype": plan.dtype, "ok": not failed,
            "proofs": [proof.to_dict() for proof in proofs],
            "disqualified": [{"kernel": p.kernel, "scheme": p.scheme, "fault": p.fault} for p in failed],
            "kernels_now": {
                unit.layers[0]: [{"up_to_tokens": most, "name": name} for most, name in unit.choice.names.steps]
                for unit in plan.units
            },
            "without_kernel": list(plan.refused),
        })
        return
    rows = [("", "kernel", "scheme", "shape", "layers", "error / bound", "relative error", "worst probe")]
    for proof in proofs:
        shape = " x ".join(map(str, proof.shape))
        rows.append(("ok" if proof.ok else "WRONG", proof.kernel, shown(proof.scheme), shape, str(proof.layers),
                     f"{proof.worst:.2g}", f"{proof.relative:.1e}", shown(proof.fault or proof.probe)))
    output.rows(rows, indent=0, right=(4, 5, 6))
    for proof in failed:
        output.warning(f"{proof.kernel} is wrong on {shown(proof.scheme)} here and will not be planned on this machine "
                       f"({shown(proof.layer)}: {shown(proof.fault)}); `anybit prove MODEL --forget` forgets that")
    if plan.refused:
        output.warning(f"no kernel is left for {counted(len(plan.refused), 'layer')}, "
                       f"{shown(next(iter(plan.refused)))} among them: the model does not run on this machine")
    right = sum(proof.ok for proof in proofs)
    output.line(f"{counted(right, 'kernel')} of {len(proofs)} within the derived bound on "
                f"{shown(plan.platform.title)}, activations {plan.dtype}")
