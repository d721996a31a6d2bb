"""Values of a plan as JSON and back: schemes, platforms, refusals, choices. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from anybit.kernels.catalogue import kernel
from anybit.kernels.request import Reason, Regime
from anybit.planning.choose import Better, Choice, Chosen, Price, Refusal
from anybit.platforms import Platform
from anybit.schemes import ActivationSpec, Offset, ScaleLevel, Scheme


def plain(value: Any) -> Any:
    """`value` as JSON knows it: lists for tuples and sets, text for whatever else."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """The fields of a scheme."""
    made: dict[str, Any] = plain(asdict(scheme))
    return made


def scheme_from_dict(fields: Mapping[str, Any]) -> Scheme:
    """A scheme from `scheme_to_dict`."""
    return Scheme(**{
        **fields,
        "scales": tuple(_level(level) for level in fields["scales"]),
        "offset": None if fields["offset"] is None else _offset(fields["offset"]),
        "activation": None if fields["activation"] is None else ActivationSpec(**fields["activation"]),
        "output": None if fields["output"] is None else ActivationSpec(**fields["output"]),
    })


def _block(found: Iterable[int]) -> tuple[int, int]:
    rows, columns = found
    return rows, columns


def _level(fields: Mapping[str, Any]) -> ScaleLevel:
    return ScaleLevel(**{**fields, "block": _block(fields["block"])})


def _offset(fields: Mapping[str, Any]) -> Offset:
    return Offset(**{**fields, "block": _block(fields["block"]),
                     "levels": tuple(_level(level) for level in fields["levels"])})


def platform_from_dict(fields: Mapping[str, Any]) -> Platform:
    """A platform from `Platform.to_dict`."""
    return Platform(
        name=fields["name"],
        vendor=fields["vendor"],
        arch=fields["arch"],
        features=frozenset(fields["features"]),
        providers=frozenset(fields["providers"]),
        memory_bytes=fields["memory_bytes"],
        bandwidth=fields["bandwidth_bytes_per_second"],
        rates=dict(fields["rates_flop_per_second"]),
        cores=fields["cores"],
        fp8=fields["fp8"],
        sources=dict(fields["sources"]),
        is_detected=fields["is_detected"],
    )


def reason_to_dict(reason: Reason) -> dict[str, Any]:
    """Code, text and values."""
    made: dict[str, Any] = plain(reason.to_dict())
    return made


def _reasons(rows: Iterable[Mapping[str, Any]]) -> tuple[Reason, ...]:
    return tuple(Reason(row["code"], row["text"], row["values"]) for row in rows)


def reasons_to_dict(refused: Iterable[Refusal]) -> list[dict[str, Any]]:
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
                "reasons": [reason_to_dict(r) for r in refusal.reasons],
            },
        )
        row["regimes"].append(refusal.regime)
    return list(folded.values())


def refusals_from_dict(rows: Iterable[Mapping[str, Any]]) -> tuple[Refusal, ...]:
    """Refusals from `reasons_to_dict`."""
    return tuple(Refusal(row["kernel"], regime, _reasons(row["reasons"])) for row in rows for regime in row["regimes"])


def better_to_dict(better: Iterable[Better]) -> list[dict[str, Any]]:
    """What would be faster, as data."""
    return [
        {"kernel": b.kernel, "regimes": list(b.regimes), "times_faster": b.times,
         "needs": [reason_to_dict(reason) for reason in b.needs]}
        for b in better
    ]


def choice_from_dict(unit: Mapping[str, Any]) -> Choice:
    """The choice of a unit's document; KeyError for a kernel that does not exist."""
    kernels: dict[Regime, Chosen] = {
        regime: Chosen(kernel(row["name"]), Price(row["seconds"], row["price"]))
        for regime, row in unit["kernels"].items()
    }
    slower = {row["layout"]: row["seconds"] for row in unit["slower"]}
    better = tuple(Better(row["kernel"], tuple(row["regimes"]), row["times_faster"], _reasons(row["needs"]))
                   for row in unit["better"])
    buckets = tuple((row["up_to_tokens"], Chosen(kernel(row["name"]), Price(row["seconds"], row["price"])))
                    for row in unit["by_tokens"])
    return Choice(unit["layout"], kernels, refusals_from_dict(unit["refused"]), slower, better, buckets)
