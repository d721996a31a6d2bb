"""An empty transformers model: real buffers, parameters without memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from anybit.errors import Unsupported
from anybit.hosts.filling import demand_known


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters on meta, and buffers (rotary tables) computed as usual."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None:
            kind = type(self._parameters[name])
            self._parameters[name] = kind(self._parameters[name].to("meta"), requires_grad=False)  # type: ignore[misc, union-attr]

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The causal language model that `config` describes, without weights.

    Only architectures that transformers itself knows: no code of the checkpoint runs.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    demand_known(config.get("model_type"))
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in _DROPPED}
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(kept)
        if kept.get("tie_word_embeddings") is False:
            made.tie_word_embeddings = False  # the classes of the T5 family set it, whatever the checkpoint has
        with parameters_on_meta():
            auto = AutoModelForSeq2SeqLM if getattr(made, "is_encoder_decoder", False) else AutoModelForCausalLM
            model = auto.from_config(made, dtype=dtype)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a stranger's values provoke inside the architecture
        raise Unsupported(
            f"transformers {transformers.__version__} cannot build a model from this config",
            where="config.json",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}",
            wanted=f"a config that {config['model_type']} models accept",
            remedy="take the config from where the tensors came from, or try another transformers version",
        ) from error
    return cast("Any", model.eval())


# what names code, or describes storage that is no longer there
_DROPPED = frozenset({"auto_map", "quantization_config", "compression_config", "torch_dtype", "dtype"})
