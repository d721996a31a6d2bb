"""What differs between two plans, by layer: kernel, layout, scheme, memory, price. A pure function of two documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.kernels.request import Kernels
from anybit.planning.choose import WEIGHTS

_LAYER_FACTS: Final = ("declared", "scheme", "layout", "execution", "bytes_each")
_PLAN_FACTS: Final = ("dialect", "dtype", "quantization")
_PRICE_NOISE: Final = 1e-9  # relative


@dataclass(frozen=True)
class Difference:
    """One fact that differs, and the layers for which it does (none: for the whole plan)."""

    what: str
    before: Any
    after: Any
    layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The difference as data."""
        return {"what": self.what, "before": self.before, "after": self.after, "layers": list(self.layers)}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Facts of the whole plan first, then those of layers, layers with equal differences folded."""
    folded: dict[tuple[str, str, str], tuple[Any, Any, list[str]]] = {}
    old, new = _by_layer(before), _by_layer(after)
    for name in dict.fromkeys((*old, *new)):
        for what, was, now in _of_layer(old.get(name, _ABSENT), new.get(name, _ABSENT)):
            folded.setdefault((what, repr(was), repr(now)), (was, now, []))[2].append(name)
    layers = [Difference(what, was, now, tuple(names)) for (what, _, _), (was, now, names) in folded.items()]
    return [*_of_plan(before, after), *layers]


def seconds_of(document: Mapping[str, Any], regime: str) -> float:
    """Time of all products in one pass of a regime; of experts those that some token chooses."""
    return float(sum(
        unit["runs_a_pass"][regime] * unit["kernels"][regime if regime in unit["kernels"] else "decode"]["seconds"]
        for unit in document["units"]
    ))


def _of_plan(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    for what in _PLAN_FACTS:
        if before[what] != after[what]:
            yield Difference(what, before[what], after[what])
    for what in ("name", "arch"):
        if before["platform"][what] != after["platform"][what]:
            yield Difference(f"platform {what}", before["platform"][what], after["platform"][what])
    for what, was in before["policy"].items():
        if was != after["policy"].get(what):
            yield Difference(what, was, after["policy"].get(what))
    for what, was in before["memory"].items():
        if was != after["memory"].get(what):
            yield Difference(what, was, after["memory"].get(what))
    if before["kv_cache"] != after["kv_cache"]:
        was, now = ((document["kv_cache"] or {}).get("executed") for document in (before, after))
        yield Difference("kv_cache", was, now)
    for regime in WEIGHTS:
        was, now = seconds_of(before, regime), seconds_of(after, regime)
        if abs(was - now) > _PRICE_NOISE * max(was, now):
            yield Difference(f"seconds of a {regime} pass", was, now)


_ABSENT: Final = "not in the model"
_REFUSED: Final = "no kernel"
_Found = Mapping[str, Any] | str


def _by_layer(document: Mapping[str, Any]) -> dict[str, _Found]:
    """layer -> its unit, or the word for a layer that no kernel runs."""
    found: dict[str, _Found] = {name: unit for unit in document["units"] for name in unit["layers"]}
    return found | dict.fromkeys(document["refused"], _REFUSED)


def _of_layer(was: _Found, now: _Found) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, str) or isinstance(now, str):
        before, after = (found if isinstance(found, str) else found["scheme"] for found in (was, now))
        if before != after:
            yield "layer", before, after
        return
    for what in _LAYER_FACTS:
        if was[what] != now[what]:
            yield what, was[what], now[what]
    for regime in dict.fromkeys((*was["kernels"], *now["kernels"])):
        before, after = (found["kernels"].get(regime, {}).get("name") for found in (was, now))
        if before != after:
            yield f"kernel in {regime}", before, after
    steps, steps_now = (Kernels((row["up_to_tokens"], row["name"]) for row in found["by_tokens"])
                        for found in (was, now))
    if steps.steps != steps_now.steps and dict(steps) == dict(steps_now):
        before, after = (", ".join(f"{name} to {most}" for most, name in found.steps) for found in (steps, steps_now))
        yield "kernels by M", before, after
