"""An open checkpoint: layers from headers, canonical weights on demand."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from anybit.checkpoints.contents import Contents
from anybit.checkpoints.dialects import Dialect
from anybit.checkpoints.dialects._shared.kv_scales import companions, read_scales
from anybit.errors import AnybitError, Inconsistent
from anybit.schemes import KVCacheSpec, Layer

if TYPE_CHECKING:
    from torch import Tensor

    from anybit.checkpoints.contents import TensorInfo
    from anybit.weights import Dense, QuantizedWeight


class Reader(Protocol):
    """Reads one tensor of a container."""

    def __call__(self, info: TensorInfo, /) -> Tensor:
        """The tensor."""


class Checkpoint:
    """What `anybit.open` gives.

    path      the folder, or the (first) .gguf file
    dialect   name of the dialect that recognised it
    layers    module name -> Layer, from headers alone
    config    the model's config.json (for GGUF: made from the metadata)
    plain     name for the host -> stored name, of tensors that belong to no layer
    notes     remarks for a reader of `inspect`
    has_new_names  tensors go by other names than in the files: a host that reads those itself does not find them
    """

    def __init__(self, contents: Contents, dialect: Dialect, read_tensor: Reader, notes: tuple[str, ...] = ()) -> None:
        """Declare all layers; no tensor is read."""
        self.contents = contents
        self.path: Path = contents.path
        self.config: dict[str, Any] = contents.config
        self.dialect: str = dialect.NAME
        self.layers: Mapping[str, Layer] = MappingProxyType(dialect.declare(contents))
        self._dialect = dialect
        self._read_tensor = read_tensor
        self.has_new_names = False
        remarks = getattr(dialect, "notes", None)
        self.notes = (*notes, *(remarks(contents) if remarks is not None else ()))
        self.plain: Mapping[str, str] = MappingProxyType(self._plain())

    def _plain(self) -> dict[str, str]:
        named = getattr(self._dialect, "plain", None)
        if callable(named):
            found: dict[str, str] = named(self.contents)
            return found
        used = {tensor for layer in self.layers.values() for tensor in layer.tensors.values()}
        cache = self.kv_cache
        if cache is not None:
            used |= {tensor for pair in cache.scales.values() for tensor in pair} | companions(self.contents, cache)
        return {name: name for name in self.contents.tensors if name not in used}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold its tensors."""
        return tuple(sorted({info.file for info in self.contents.tensors.values()}))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.contents.tensors.values())

    @property
    def plain_elements(self) -> int:
        """Number of elements in tensors that belong to no layer."""
        return sum(self.contents.tensors[stored].elements for stored in self.plain.values())

    @property
    def kv_cache(self) -> KVCacheSpec | None:
        """The quantized key-value cache that the checkpoint declares, if any."""
        declared = getattr(self._dialect, "kv_cache", None)
        found: KVCacheSpec | None = declared(self.contents) if declared is not None else None
        return found

    def read(self, name: str) -> QuantizedWeight | Dense:
        """The canonical weight of the layer called `name`.

        Its `.dequantize()` is the genuine tool's value, bit for bit.
        Raises Inconsistent for a name that is no layer, and what the dialect finds wrong with the tensors.
        """
        layer = self.layers.get(name)
        if layer is None:
            raise _unknown(name, self.layers, "layer")
        tensors = {role: self._read_tensor(self.contents.tensors[t]) for role, t in layer.tensors.items()}
        try:
            return self._dialect.canonicalize(layer, tensors)
        except AnybitError as error:
            error.where = error.where or name
            raise

    def read_plain(self, name: str) -> Tensor:
        """The tensor of `plain` called so by the host. Raises Inconsistent for a name that is not in `plain`."""
        if name not in self.plain:
            raise _unknown(name, self.plain, "tensor outside the layers")
        stored = self.plain[name]
        tensor = self._read_tensor(self.contents.tensors[stored])
        adjust = getattr(self._dialect, "adjust_plain", None)  # a dialect whose files hold them in another form
        adjusted: Tensor = tensor if adjust is None else adjust(self.contents, name, stored, tensor)
        return adjusted

    def read_kv_scales(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Attention module -> checked scales of keys and values, float32 [1] or [heads]; None where one is missing.

        Empty without a declared cache. Raises Damaged, naming the tensor, for scales that cannot be scales.
        """
        cache = self.kv_cache
        return {} if cache is None else read_scales(cache, lambda name: self._read_tensor(self.contents.tensors[name]))

    def demand_loadable(self) -> None:
        """Raise if running the model would need code of the checkpoint, or if it is no model that can run."""
        from anybit.checkpoints.folder import demand_no_code

        demand_no_code(self.config)
        demand = getattr(self._dialect, "require_loadable", None)
        if demand is not None:
            demand(self.contents)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, dialect={self.dialect!r}, layers={len(self.layers)})"


def _unknown(name: str, known: Mapping[str, object], what: str) -> Inconsistent:
    last = name.rpartition(".")[2]
    alike = [other for other in known if other.rpartition(".")[2] == last] or list(known)
    near = get_close_matches(name, alike[:10_000], n=3)  # some models have 300,000 names
    return Inconsistent(f"no {what} is called so", where=name, found=f"{len(known)} others",
                        wanted=f"the name of a {what}",
                        remedy="perhaps " + " or ".join(near) if near else "`anybit inspect` lists them")
