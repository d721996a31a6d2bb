"""From names in a checkpoint to places in a transformers model.

transformers 5 renames some architectures' keys while loading (Mixtral's block_sparse_moe became mlp) and holds the
experts of a layer as one module. The renamings are its own table; the experts' pieces are recognised here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, cast

from torch import nn

# the hubs' names of an expert's projections
ROLES: Final = {
    "gate_proj": "gate_proj", "w1": "gate_proj", "up_proj": "up_proj", "w3": "up_proj", "down_proj": "down_proj",
    "w2": "down_proj", "gate_up_proj": "gate_up_proj",
}
_EXPERT: Final = re.compile(r"^(?P<experts>.*\bexperts)\.(?P<index>\d+)\.(?P<role>\w+)$")
_STACK: Final = re.compile(r"^(?P<experts>.*\bexperts)\.(?P<role>\w+)$")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint layer belongs.

    module  path of the module that takes it (the experts module for a piece of it)
    role    projection of the experts, "" for a layer of its own
    expert  index of the expert, -1 for all of them
    """

    module: str
    role: str = ""
    expert: int = -1


class Naming:
    """The names of one model, as it was before any module was replaced."""

    def __init__(self, model: nn.Module) -> None:
        """`model` is a transformers model, parameters on meta or not."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.parameters: dict[str, Any] = dict(model.state_dict())
        self.modules = dict(model.named_modules())
        mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix: str = getattr(model, "base_model_prefix", "")
        host = cast("Any", model)
        head = host.get_output_embeddings() if hasattr(host, "get_output_embeddings") else None
        is_tied = getattr(getattr(host, "config", None), "tie_word_embeddings", False)
        # path of an output head that the config ties to the embedding table, "" where there is none
        self.tied_head = next((name for name, m in self.modules.items() if m is head), "") if is_tied else ""

    def parameter(self, name: str) -> str:
        """The model's parameter for the checkpoint's tensor `name`; "" if it has none of its own."""
        renamed, pattern = self._renamed(name)
        return renamed if renamed in self.parameters and pattern is None else ""

    def renamed(self, name: str) -> str:
        """The name that transformers gives the tensor `name` while loading, whether the model has it or not."""
        return self._renamed(name)[0]

    def _renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        found = rename_source_key(name, self._renamings, self._converters, self._prefix, self.parameters)
        if found[0] in self.parameters or name in self.parameters:
            return found if found[0] in self.parameters else (name, None)
        return rename_source_key(name, [], [], self._prefix, self.parameters) if found[1] is None else found

    def place(self, layer: str) -> Place | None:
        """Where the layer called so in the checkpoint goes; None if the model has no place for it."""
        parameter = self.parameter(f"{layer}.weight")
        if parameter:
            return Place(parameter.removesuffix(".weight"))
        piece = _EXPERT.match(layer) or _STACK.match(layer)
        if piece is None or piece["role"] not in ROLES:
            return None
        role = ROLES[piece["role"]]
        index = int(piece["index"]) if "index" in piece.groupdict() else -1
        module = self._experts_module(piece["experts"])
        return Place(module, role, index) if module else None

    def _experts_module(self, name: str) -> str:
        """The model's experts module for the checkpoint's `...experts`."""
        for probe in (f"{name}.0.gate_proj.weight", f"{name}.0.w1.weight", f"{name}.gate_up_proj"):
            renamed, _ = self._renamed(probe)
            module = renamed.rpartition(".")[0]
            if renamed in self.parameters and module.endswith("experts"):
                return module
        return name if name in self.modules else ""
