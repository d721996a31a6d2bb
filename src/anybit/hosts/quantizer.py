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
from anybit.checkpoints.online import Quantization, online, quantizer
from anybit.errors import DeviceProblem, Inconsistent
from anybit.hosts import kv_cache
from anybit.hosts.filling import Assignment, Filler, assign, demand_filled, wanted_dtype
from anybit.hosts.plans import make_plan
from anybit.hosts.shortening import shorten
from anybit.platforms import detect


class AnybitConfig(QuantizationConfigMixin):
    """What transformers carries around: where the checkpoint is, how it may run, what to quantize while loading.

    >>> AutoModelForCausalLM.from_pretrained(path, quantization_config=AnybitConfig(quantization="nvfp4"))
    """

    def __init__(
        self, source: str = "", strict: bool = False, quantization: Quantization | None = None, kv_cache: str = "auto",
        **options: Any,
    ) -> None:
        """`source` is the checkpoint's folder; `strict` refuses any change of arithmetic; the rest as for `load`."""
        asked = online(quantization)
        self.quantization = None if asked is None else str(asked)
        self.quant_method = "anybit"  # type: ignore[assignment]
        self.source = source
        self.strict = strict
        self.kv_cache = kv_cache

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config from its dictionary."""
        made = cls(source=str(config_dict.get("source", "")), strict=bool(config_dict.get("strict", False)),
                   quantization=config_dict.get("quantization"), kv_cache=str(config_dict.get("kv_cache", "auto")))
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """The config as a dictionary."""
        return {"quant_method": "anybit", "source": self.source, "strict": self.strict,
                "quantization": self.quantization, "kv_cache": self.kv_cache}


class AnybitQuantizer(HfQuantizer):
    """Replaces modules before transformers loads, fills them afterwards."""

    requires_calibration = False
    requires_parameters_quantization = False

    def __init__(self, quantization_config: AnybitConfig, **kwargs: Any) -> None:
        """For transformers the checkpoint counts as quantized, also where we quantize it while loading."""
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True
        self.checkpoint = open_checkpoint(quantization_config.source)
        self.strict = quantization_config.strict
        self.online = online(quantization_config.quantization)
        self.kv_cache = quantization_config.kv_cache
        self.filler: Filler | None = None
        self._missing: set[str] = set()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map") or {"": "cpu"}
        first = _one_kind(device_map)
        dtype = model.dtype
        name = str(dtype).removeprefix("torch.")
        platform = detect("cpu" if first.type == "cpu" else str(first))
        plan = make_plan(self.checkpoint, platform, dtype=name, strict=self.strict, quantization=self.online,
                         kv_cache=self.kv_cache)
        plan.demand_complete()
        assignment = assign(model, self.checkpoint, plan, only_quantized=True)
        self._leave_to_us(model, assignment)
        self._learn_what_is_missing(model)
        self.filler = Filler(
            model, self.checkpoint, plan, assignment, dtype, device_of=lambda path: _device_for(path, device_map),
            quantize=None if self.online is None else quantizer(self.online),
        )

    def _learn_what_is_missing(self, model: Any) -> None:
        """Keep the names of parameters that no file has: transformers initialises them at random and only logs it."""
        adjust = model._adjust_missing_and_unexpected_keys

        def adjust_and_keep(loading_info: Any) -> Any:
            done = adjust(loading_info)
            self._missing = set(loading_info.missing_keys)
            return done

        model._adjust_missing_and_unexpected_keys = adjust_and_keep

    def _demand_loaded(self, model: Any) -> None:
        """Raise Inconsistent for random parameters of the model that the checkpoint says it holds.

        A head that the user's own class adds (for a classification, say) is his to train.
        """
        del model._adjust_missing_and_unexpected_keys
        assert self.filler is not None
        if type(model).__name__ not in (self.checkpoint.config.get("architectures") or ()):
            return
        assignment = self.filler.assignment
        filled = set(assignment.tensors) | (set(assignment.plain) if self.checkpoint.has_new_names else set())
        left = sorted(n for n, _ in model.named_parameters() if n in self._missing and n not in filled)
        if left:
            raise Inconsistent(
                "the checkpoint has no tensor for this part of the model", where=left[0], found="nothing",
                wanted="a tensor, or a config without this part",
                remedy="the checkpoint is incomplete, or its config belongs to another model", more=tuple(left[1:]),
            )

    def _leave_to_us(self, model: Any, assignment: Assignment) -> None:
        """Tensors of our modules are neither unexpected nor missing for transformers."""
        ours = [*assignment.modules.values()]
        ours += [name for roles in assignment.experts.values() for by in roles.values() for name in by.values()]
        tensors = {t for name in ours for t in self.checkpoint.layers[name].tensors.values()}
        names = tensors | set(assignment.unused) | self._cache_scales()
        names |= {assignment.naming.renamed(name) for name in names}
        prefix = f"{model.base_model_prefix}."
        names |= {name.removeprefix(prefix) for name in tensors}
        ignored = [f"^{re.escape(name)}$" for name in sorted(names)]
        replaced = {f"{path}.weight" for path in assignment.modules}
        tied = model.all_tied_weights_keys  # of a packed table nothing can be tied: our head reads it
        model.all_tied_weights_keys = {k: v for k, v in tied.items() if k not in replaced and v not in replaced}
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | set(ignored)

    def _cache_scales(self) -> set[str]:
        cache = self.checkpoint.kv_cache
        return set() if cache is None else {name for pair in cache.scales.values() for name in pair if name}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self.filler is not None
        with torch.no_grad():
            self.filler.fill(with_plain=self.checkpoint.has_new_names)
            # transformers 5.17 leaves renamed parameters in the file's dtype
            for name, parameter in model.named_parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(wanted_dtype(model, name, self.filler.dtype))
        demand_filled(model, self.filler.assignment.unused)
        self._demand_loaded(model)
        if self.kv_cache == "auto":
            kv_cache.install(model, self.checkpoint, self.filler.assignment.naming, self.filler.device_of)
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(devices) == 1:  # else transformers moves what passes between blocks by hooks
            shorten(model, self.filler.plan, devices.pop())
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
