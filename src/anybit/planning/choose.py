"""The one chooser: for every distinct layer, the layout and the kernels of least modelled time.

A layer has one stored layout; the kernels of its three regimes read it. So the choice is among layouts: the sum of
their best kernels' times over the regimes, weighted by how a chat uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from anybit.errors import Unsupported
from anybit.kernels.catalogue import KERNELS
from anybit.kernels.request import REGIMES, KernelSpec, Reason, Regime, Request
from anybit.platforms import Platform

# calls of each regime for one answer of 200 tokens to a prompt of 512: what the sum of prices stands for
WEIGHTS: Final[Mapping[Regime, float]] = {"decode": 200.0, "small": 1.0, "prefill": 1.0}


@dataclass(frozen=True)
class Refusal:
    """A kernel that was not chosen because it cannot run the request."""

    kernel: str
    regime: Regime
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Choice:
    """Layout and kernels of one request, with every refusal.

    kernels   regime -> (kernel, modelled seconds)
    slower    kernels that could run it but were dearer: name -> modelled seconds over the regimes
    """

    layout: str
    kernels: Mapping[Regime, tuple[KernelSpec, float]]
    refused: tuple[Refusal, ...]
    slower: Mapping[str, float]


def regimes_of(request: Request) -> tuple[Regime, ...]:
    """The regimes that matter for the kind of layer: a lookup has one."""
    return ("decode",) if request.kind == "embedding" else tuple(REGIMES)


def choose(request: Request, platform: Platform, override: str | None = None) -> Choice | tuple[Refusal, ...]:
    """The choice for a layer, or all refusals where no layout covers its regimes.

    `override` names a kernel that must be used wherever its layout allows; raises Unsupported with the kernel's own
    reasons where it cannot run.
    """
    refused: list[Refusal] = []
    candidates: dict[str, dict[Regime, tuple[KernelSpec, float]]] = {}
    for spec in KERNELS:
        for regime in regimes_of(request):
            asked = replace(request, regime=regime)
            verdict = spec.can_implement(asked, platform)
            if not verdict.ok:
                refused.append(Refusal(spec.name, regime, verdict.reasons))
                continue
            seconds = spec.seconds(asked, platform)
            best = candidates.setdefault(spec.layout, {}).get(regime)
            if best is None or seconds < best[1]:
                candidates[spec.layout][regime] = (spec, seconds)
    wanted = set(regimes_of(request))
    complete = {layout: found for layout, found in candidates.items() if set(found) == wanted}
    if override is not None:
        complete = _only(complete, override, refused)
    if not complete:
        return tuple(refused)
    total = {layout: _total(found) for layout, found in complete.items()}
    layout = min(total, key=lambda name: total[name])
    chosen = complete[layout]
    slower = {name: seconds for name, seconds in total.items() if name != layout}
    return Choice(layout, chosen, tuple(refused), slower)


def demand_known(kernel: str) -> None:
    """Raise Unsupported, with the list of names, for a kernel that does not exist."""
    names = [k.name for k in KERNELS]
    if kernel not in names:
        raise Unsupported(f"no kernel is called {kernel!r}", wanted="one of: " + ", ".join(names))


def _total(found: Mapping[Regime, tuple[KernelSpec, float]]) -> float:
    return sum(WEIGHTS[regime] * seconds for regime, (_, seconds) in found.items())


def _only(
    complete: dict[str, dict[Regime, tuple[KernelSpec, float]]], override: str, refused: list[Refusal]
) -> dict[str, dict[Regime, tuple[KernelSpec, float]]]:
    demand_known(override)
    layout = next(k.layout for k in KERNELS if k.name == override)
    if layout not in complete:
        reasons = [f"{r.regime}: {reason.text}" for r in refused if r.kernel == override for reason in r.reasons]
        raise Unsupported(
            f"kernel {override} cannot run this layer",
            found="; ".join(dict.fromkeys(reasons)) or "its layout does not cover every regime",
            wanted="a kernel without refusals",
            remedy="leave --kernel out, or see `anybit explain`",
        )
    return {layout: complete[layout]}


def reasons_to_dict(refused: tuple[Refusal, ...]) -> list[dict[str, Any]]:
    """Refusals as data, the regimes with equal reasons folded."""
    folded: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {}
    for refusal in refused:
        key = (refusal.kernel, tuple(r.text for r in refusal.reasons))
        row = folded.setdefault(
            key,
            {
                "kernel": refusal.kernel,
                "regimes": [],
                "reason": "; ".join(key[1]),
                "reasons": [r.to_dict() for r in refusal.reasons],
            },
        )
        row["regimes"].append(refusal.regime)
    return list(folded.values())
