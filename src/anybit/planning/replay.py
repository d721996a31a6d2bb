"""A plan document checked and run again: exactly the kernels that it names, or a refusal that lists what differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from anybit.errors import Damaged, Inconsistent, Unsupported
from anybit.kernels.catalogue import KERNELS
from anybit.planning.plan import VERSION, PinnedKernels, Plan, digest_of

# what the command line adds around a plan in its --json document
_AROUND: Final = frozenset({"kind", "model"})
_KEYS: Final = frozenset({
    "version", "dialect", "platform", "dtype", "quantization", "policy", "kernels", "regimes", "buckets", "units",
    "joined", "refused", "changes", "memory", "kv_cache", "notes", "digest",
})
_SHOWN: Final = 20  # differences in one message


def demand_sound(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without what the command line puts around it.

    Raises Unsupported for another version or an unknown kernel, Damaged for missing keys, Inconsistent where the digest
    does not fit.
    """
    if document.get("version") != VERSION:
        raise Unsupported("a plan of another version", found=repr(document.get("version")), wanted=str(VERSION),
                          remedy="make it again: `anybit explain MODEL --save plan.json`")
    missing = sorted(_KEYS - set(document))
    if missing:
        raise Damaged("no plan, or an incomplete one", found="without " + ", ".join(missing),
                      wanted="what `anybit explain MODEL --save plan.json` writes")
    found = {key: value for key, value in document.items() if key not in _AROUND}
    digest = digest_of(found)
    if digest != found["digest"]:
        raise Inconsistent("the plan and its digest disagree", found=digest, wanted=str(found["digest"]),
                           remedy="the file was changed after it was written: make it again, or use --kernel")
    _demand_kernels(found)
    return found


def _demand_kernels(document: Mapping[str, Any]) -> None:
    known = {k.name for k in KERNELS}
    named = dict.fromkeys(row["name"] for unit in document["units"]
                          for row in (*unit["kernels"].values(), *unit["by_tokens"]))
    unknown = [name for name in named if name not in known]
    if unknown:
        raise Unsupported("the plan names kernels that this anybit does not have", found=", ".join(unknown),
                          wanted="one of: " + ", ".join(sorted(known)), remedy="make the plan again")


def pinned_kernels(plan: Plan) -> PinnedKernels:
    """layer -> kernels by M."""
    return {name: unit.choice.names for unit in plan.units for name in unit.layers}


def demand_same(written: Plan, here: Plan) -> None:
    """Raise Inconsistent, listing every difference, unless `here` is `written` made again.

    here  the plan with the kernels of `written` pinned
    """
    differences = [*_conditions(written, here), *_layers(written, here)]
    if differences:
        shown = " · ".join(differences[:_SHOWN])
        more = f" · and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise Inconsistent(
            "the plan does not fit this model and machine", found=shown + more,
            wanted="the same layers, schemes, architecture and kernels",
            remedy="make it again here: `anybit explain MODEL --save plan.json`",
        )


def _conditions(written: Plan, here: Plan) -> Iterator[str]:
    cache, cache_here = (None if p.kv_cache is None else p.kv_cache["executed"] for p in (written, here))
    for what, before, now in (
        ("architecture", f"{written.platform.vendor} {written.platform.arch}",
         f"{here.platform.vendor} {here.platform.arch}"),
        ("dialect", written.dialect, here.dialect),
        ("dtype", written.dtype, here.dtype),
        ("quantization", written.quantization, here.quantization),
        ("key-value cache", cache, cache_here),
    ):
        if before != now:
            yield f"{what}: {before} in the plan, {now} here"


def _layers(written: Plan, here: Plan) -> Iterator[str]:
    planned = pinned_kernels(written)
    present = {*pinned_kernels(here), *here.refused}
    yield from (f"{name}: in the plan, not in the model" for name in planned if name not in present)
    yield from (f"{name}: in the model, not in the plan" for name in present if name not in planned)
    for name in planned:
        if name in here.refused:
            wanted = set(planned[name].values())
            reasons = {f"{r.kernel}: {reason.text}" for r in here.refused[name] if r.kernel in wanted
                       for reason in r.reasons}
            yield f"{name}: its kernels cannot run here ({'; '.join(sorted(reasons)) or ', '.join(sorted(wanted))})"
        elif name in present:
            before, now = written.unit_of(name), here.unit_of(name)
            for what in ("kind", "declared", "scheme", "shape"):
                if getattr(before, what) != getattr(now, what):
                    yield f"{name}: {what} {getattr(before, what)} in the plan, {getattr(now, what)} here"
