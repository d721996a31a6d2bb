"""What was measured on this machine: times of kernels and kernels that were found wrong. A versioned file, torch-free.

A record belongs to one device, driver and set of library versions (its key). A file that is damaged, of another
version or of another key is ignored, and the reader says so: plans then use the modelled prices. Kernels that gave a
wrong answer are kept apart: they are refused for that scheme until a library or the driver changes.

Beside the user's file, `priors/` holds times measured on machines that we had; a user's own measurement comes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from anybit.planning.choose import MeasuredKey, Policy
from anybit.planning.interpolate import Near, Points
from anybit.planning.records import scheme_from_dict, scheme_to_dict
from anybit.platforms import Platform
from anybit.schemes import Scheme

VERSION: Final = 2
_LIBRARIES: Final = ("anybit", "torch", "triton", "humming-kernels", "aiter")


Cell = tuple[str, str, int, int, str, int]
"""What a time belongs to: kernel, printed scheme, N, K, dtype of the activations, M."""


@dataclass
class Measured:
    """Times of one machine, and kernels that were found wrong on it.

    seconds    cell -> seconds of one call
    disproved  (kernel, printed scheme) -> what was wrong when it ran here
    remarks    why a file was ignored, for the user
    source     where the times come from
    schemes    printed scheme -> the scheme, of those that were measured
    """

    seconds: dict[Cell, float] = field(default_factory=dict)
    disproved: dict[tuple[str, str], str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    source: str = "measured here"
    schemes: dict[str, Scheme] = field(default_factory=dict)

    def policy(self, dtype: str, *, strict: bool = False, batch_invariant: bool = False) -> Policy:
        """The policy of a plan that knows all this, for activations of one dtype."""
        return Policy(strict, batch_invariant, self.prices(dtype), self.disproved, self._near())

    def _near(self) -> dict[str, tuple[Near, ...]]:
        points: dict[str, dict[tuple[str, str], Points]] = {}
        for (kernel, scheme, n, k, dtype, tokens), seconds in self.seconds.items():
            if scheme in self.schemes:
                by_shape = points.setdefault(kernel, {}).setdefault((scheme, dtype), {})
                by_shape.setdefault((n, k), {})[tokens] = seconds
        return {kernel: tuple(Near(self.schemes[scheme], dtype, found) for (scheme, dtype), found in by_scheme.items())
                for kernel, by_scheme in points.items()}

    def prices(self, dtype: str) -> dict[MeasuredKey, float]:
        """The times for activations of one dtype, as the chooser wants them."""
        return {(kernel, scheme, n, k, tokens): seconds
                for (kernel, scheme, n, k, kind, tokens), seconds in self.seconds.items() if kind == dtype}


def key_of(platform: Platform) -> dict[str, str]:
    """What a measurement depends on: device, driver, versions of the libraries."""
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"device": platform.name, "arch": platform.arch, "driver": platform.driver, **versions}


def folder() -> Path:
    """Where measurements are kept: ANYBIT_CACHE, else the user's cache folder."""
    chosen = os.environ.get("ANYBIT_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anybit"
    return base / "measured"


def path_of(platform: Platform) -> Path:
    """The file of a platform."""
    text = json.dumps(key_of(platform), sort_keys=True)
    return folder() / f"{platform.arch}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def read(platform: Platform) -> Measured:
    """What is known of a platform: the user's measurements over the shipped ones; nothing for a described device.

    Never raises: a file that cannot be used is a remark.
    """
    prior = _prior(platform)
    if not platform.is_detected:
        return prior
    path = path_of(platform)
    if not path.is_file():
        return prior
    try:
        found = _parse(path.read_text(), key_of(platform))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        prior.remarks = (*prior.remarks, f"measurements in {path} are ignored: {error}")
        return prior
    found.seconds = {**prior.seconds, **found.seconds}
    found.schemes = {**prior.schemes, **found.schemes}
    return found


def _parse(text: str, key: Mapping[str, str]) -> Measured:
    document: dict[str, Any] = json.loads(text)
    if document.get("version") != VERSION:
        raise ValueError(f"of version {document.get('version')}, wanted {VERSION}")
    if document["key"] != dict(key):
        raise ValueError("of another device or other library versions")
    disproved = {(str(row["kernel"]), str(row["scheme"])): str(row["what"]) for row in document["disproved"]}
    return Measured(_cells(document["cells"]), disproved, schemes=_schemes(document["schemes"]))


def _schemes(rows: Iterable[Mapping[str, Any]]) -> dict[str, Scheme]:
    found = [scheme_from_dict(row) for row in rows]
    return {str(scheme): scheme for scheme in found}


def _cells(rows: Iterable[Mapping[str, Any]]) -> dict[Cell, float]:
    found: dict[Cell, float] = {}
    for row in rows:
        n, k = row["shape"]
        for tokens, seconds in row["seconds"].items():
            if int(n) < 1 or int(k) < 1 or int(tokens) < 1 or not 0.0 < float(seconds) < 1e6:
                raise ValueError(f"no time of a product: {n} x {k}, {tokens} tokens: {seconds}")
            cell = (str(row["kernel"]), str(row["scheme"]), int(n), int(k), str(row["dtype"]), int(tokens))
            found[cell] = float(seconds)
    return found


def cells_to_rows(seconds: Mapping[Cell, float]) -> list[dict[str, Any]]:
    """Times as data, those of a kernel and layer together by number of tokens."""
    rows: dict[tuple[str, str, int, int, str], dict[str, float]] = {}
    for (kernel, scheme, n, k, dtype, tokens), time in sorted(seconds.items()):
        rows.setdefault((kernel, scheme, n, k, dtype), {})[str(tokens)] = time
    return [{"kernel": kernel, "scheme": scheme, "shape": [n, k], "dtype": dtype, "seconds": times}
            for (kernel, scheme, n, k, dtype), times in rows.items()]


def _prior(platform: Platform) -> Measured:
    """Times that we measured on a device of this name."""
    plain = platform.name.lower().replace(" ", "").replace("-", "")
    for file in files("anybit.planning").joinpath("priors").iterdir():
        if not file.name.endswith(".json"):
            continue
        document = json.loads(file.read_text())
        if document["arch"] == platform.arch and document["device"] in plain:
            return Measured(_cells(document["cells"]), source=f"measured on {document['title']}",
                            schemes=_schemes(document["schemes"]))
    return Measured(source="modelled")


def write(platform: Platform, measured: Measured) -> Path:
    """Keep measurements for this machine; the file is complete or not there. Returns its path."""
    path = path_of(platform)
    path.parent.mkdir(parents=True, exist_ok=True)
    disproved = [{"kernel": kernel, "scheme": scheme, "what": what}
                 for (kernel, scheme), what in sorted(measured.disproved.items())]
    document = {"version": VERSION, "key": key_of(platform), "cells": cells_to_rows(measured.seconds),
                "disproved": disproved,
                "schemes": [scheme_to_dict(scheme) for scheme in measured.schemes.values()]}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        json.dump(document, part, indent=1)
    Path(part.name).replace(path)
    return path
