"""The quantizer behind the take-over door: transformers builds and loads the plain tensors, we replace and fill.

Our modules' tensors never pass through transformers' converters, which would hold two copies of the experts and merge
packed bytes. Hooks differ between transformers 5.17 and later ones; both signatures are accepted.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from anybit.checkpoints import open as open_checkpoint
from anybit.errors import DeviceProblem
from anybit.hosts.filling import Assignment, Filler, assign, demand_filled, wanted_dtype
from anybit.planning.plan import plan_layers
from anybit.platforms import detect


class AnybitConfig(QuantizationConfigMixin):
    """What transformers carries around: where the checkpoint is."""

    def __init__(self, source: str = "", **options: Any) -> None:
        """`source` is the checkpoint's folder."""
        self.quant_method = "anybit"  # type: ignore[assignment]
        self.source = source

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config from its dictionary."""
        made = cls(source=str(config_dict.get("source", "")))
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary."""
        return {"quant_method": "anybit", "source": self.source}


class AnybitQuantizer(HfQuantizer):
    """Replaces modules before transformers loads, fills them afterwards."""

    requires_calibration = False
    requires_parameters_quantization = False

    def __init__(self, quantization_config: AnybitConfig, **kwargs: Any) -> None:
        """Always of an already quantized checkpoint."""
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True
        self.checkpoint = open_checkpoint(quantization_config.source)
        self.filler: Filler | None = None

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map") or {"": "cpu"}
        first = _one_kind(device_map)
        dtype = model.dtype
        name = str(dtype).removeprefix("torch.")
        plan = plan_layers(self.checkpoint, detect("cpu" if first.type == "cpu" else str(first)), dtype=name)
        plan.demand_complete()
        assignment = assign(model, self.checkpoint, plan, only_quantized=True)
        self._leave_to_us(model, assignment)
        self.filler = Filler(
            model, self.checkpoint, plan, assignment, dtype, device_of=lambda path: _device_for(path, device_map)
        )

    def _leave_to_us(self, model: Any, assignment: Assignment) -> None:
        """Tensors of our modules are neither unexpected nor missing for transformers."""
        ours = [*assignment.modules.values()]
        ours += [name for roles in assignment.experts.values() for by in roles.values() for name in by.values()]
        tensors = {t for name in ours for t in self.checkpoint.layers[name].tensors.values()}
        names = tensors | set(assignment.unused)
        names |= {assignment.naming.renamed(name) for name in names}
        prefix = f"{model.base_model_prefix}."
        names |= {name.removeprefix(prefix) for name in tensors}
        ignored = [f"^{re.escape(name)}$" for name in sorted(names)]
        replaced = {f"{path}.weight" for path in assignment.modules}
        tied = model.all_tied_weights_keys  # of a packed table nothing can be tied: our head reads it
        model.all_tied_weights_keys = {k: v for k, v in tied.items() if k not in replaced and v not in replaced}
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | set(ignored)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self.filler is not None
        with torch.no_grad():
            self.filler.fill(with_plain=False)
            # transformers 5.17 leaves renamed parameters in the file's dtype
            for name, parameter in model.named_parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(wanted_dtype(model, name, self.filler.dtype))
        demand_filled(model, self.filler.assignment.unused)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Unchanged: converters whose modules are gone match nothing."""
        return weight_conversions

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` is refused: `anybit convert` writes checkpoints."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the inputs, so adapters can be trained; the packed weights cannot."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Every product is one custom operator."""
        return True


def _one_kind(device_map: dict[str, Any]) -> torch.device:
    """The first device of the map; DeviceProblem unless all are of its kind, since a layout belongs to one."""
    names = [_device_name(device) for device in device_map.values()]
    kinds = {name.partition(":")[0] for name in names}
    if len(kinds) > 1 or not kinds <= {"cpu", "cuda"}:
        raise DeviceProblem(
            "packed layers need devices of one kind", where="device_map", found=", ".join(sorted(kinds)),
            wanted="cpu alone, or GPUs alone", remedy="device_map='cpu', or a GPU that holds the model",
        )
    return torch.device(names[0])


def _device_name(device: Any) -> str:
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def _device_for(path: str, device_map: dict[str, Any]) -> torch.device:
    """The entry of the longest prefix of `path`."""
    while path not in device_map and path:
        path = path.rpartition(".")[0]
    return torch.device(_device_name(device_map.get(path, next(iter(device_map.values())))))
