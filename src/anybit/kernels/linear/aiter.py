"""Spec of AITER's tuned product for unquantized layers: AMD's own library, where it can be imported.

AITER picks a kernel for each (M, N, K) from a table of what its authors measured; a shape that is not in the table goes
to torch's product through it. So its price is the table's time where the table has one, and torch's plus a dispatch
otherwise: it is chosen for the shapes that were tuned, and for no others. Source: ROCm/aiter, aiter/tuned_gemm.py,
aiter/configs/bf16_tuned_gemm.csv (gfx, cu_num, M, N, K, bias, dtype, outdtype, scaleAB, bpreshuffle, ..., us).
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from anybit.kernels.linear import dense
from anybit.kernels.request import KernelSpec, Reason, Request, Verdict, gather
from anybit.platforms import Platform

ARCHS: Final = ("gfx942", "gfx950")
DTYPES: Final = ("bfloat16", "float16")
_DISPATCH_SECONDS: Final = 2e-6  # its Python looks the shape up at every call
_OVERRIDE: Final = "AITER_CONFIG_GEMM_BF16"  # AITER's own variable: files, separated by colons
_TABLE: Final = ("configs", "bf16_tuned_gemm.csv")
_Tuned = Mapping[tuple[str, str, int, int], Mapping[int, float]]


def can_implement(request: Request, platform: Platform) -> Verdict:
    """Unquantized layers in 16 bits on the chips that AITER is written for."""
    scheme = request.scheme
    return gather(
        Reason("quantized", f"the weight is quantized ({scheme.weight_name()})", {"element": scheme.element})
        if scheme.is_quantized else None,
        Reason("kind", "a lookup multiplies nothing", {"kind": request.kind}) if request.kind == "embedding" else None,
        Reason("vendor", f"runs on AMD, this is {platform.vendor} {platform.arch}",
               {"wanted": "amd", "found": platform.vendor}) if platform.vendor != "amd" else None,
        Reason("arch", f"AITER is written for {' and '.join(ARCHS)}, this is {platform.arch}",
               {"wanted": list(ARCHS), "found": platform.arch})
        if platform.vendor == "amd" and platform.arch not in ARCHS else None,
        Reason("provider", "AITER is not installed", {"wanted": "aiter"}) if "aiter" not in platform.providers
        else None,
        Reason("dtype", f"activations of {request.dtype}", {"wanted": list(DTYPES), "found": request.dtype})
        if request.dtype not in DTYPES else None,
    )


def seconds(request: Request, platform: Platform) -> float:
    """The tuned time of the nearest M that covers the request's, else torch's product behind AITER's dispatch."""
    rows, columns = request.shape[-2:]
    tuned = tuned_table().get((platform.arch, request.dtype, rows, columns), {}) if platform.is_detected else {}
    covering = min((m for m in tuned if m >= request.tokens), default=None)
    if covering is None:
        return _DISPATCH_SECONDS + dense.seconds(request, platform)
    return _DISPATCH_SECONDS + tuned[covering]


@cache
def tuned_table() -> _Tuned:
    """(arch, dtype, N, K) -> M -> seconds, of the AITER that is installed; empty where there is none to read."""
    made: dict[tuple[str, str, int, int], dict[int, float]] = {}
    for path in _tables():
        try:
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    _take(row, made)
        except (OSError, ValueError, KeyError, csv.Error):
            continue  # a table of another version: its shapes count as not tuned
    return made


def _take(row: Mapping[str, str], made: dict[tuple[str, str, int, int], dict[int, float]]) -> None:
    is_plain = all(row[name] == "False" for name in ("bias", "scaleAB", "bpreshuffle"))
    if not is_plain or row["outdtype"] != row["dtype"]:
        return
    key = (row["gfx"], row["dtype"].removeprefix("torch."), int(row["N"]), int(row["K"]))
    times = made.setdefault(key, {})
    took = float(row["us"]) * 1e-6
    times[int(row["M"])] = min(took, times.get(int(row["M"]), took))


def _tables() -> list[Path]:
    named = os.environ.get(_OVERRIDE)
    if named:
        return [Path(part) for part in named.split(":") if part]
    spec = importlib.util.find_spec("aiter")
    folders = spec.submodule_search_locations if spec is not None else None
    return [Path(folder, *_TABLE) for folder in folders or ()]


SPEC = KernelSpec(
    name="aiter-gemm",
    layout="aiter-dense",
    implementation="anybit.kernels.linear.aiter_gemm:AiterProduct",
    can_implement=can_implement,
    seconds=seconds,
    rounds=dense.rounds,
    stored_bytes=dense.stored_bytes,
    about="AITER's tuned matrix product on the unquantized weight (AMD)",
)
