"""Do the parts of a checkpoint agree: config.json, the side files, the tensors, the layers that a dialect declares.

What a dialect knows about its own keys it checks itself; here is what holds for all of them. A part that disagrees is
refused; one that is only left over is remarked on. Torch-free; rules: docs/formats/*.md, each section on config files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from anybit.checkpoints.contents import JSON, Contents
from anybit.checkpoints.dialects._shared import kv_scales
from anybit.checkpoints.dialects._shared.small_tensors import MOST_BYTES, SmallTensors
from anybit.errors import Inconsistent

if TYPE_CHECKING:
    from anybit.checkpoints.checkpoint import Checkpoint

_HERE: Final = "config.json: quantization_config"

# Facts that two files must tell alike, and the keys under which any version of a writer tells them.
_FACTS: Final[Mapping[str, tuple[str, ...]]] = {
    "the method": ("quant_method", "method"),
    "the bits": ("bits", "w_bit", "wbits"),
    "the group size": ("group_size", "q_group_size"),
    "the format": ("checkpoint_format", "format", "version"),
    "the algorithm": ("quant_algo",),
}
# ModelOpt's side file is wrapped and dialect-specific: its own dialect compares it.
_COPIES: Final = ("quantize_config.json", "quant_config.json", "quantization_config.json")

# endings of tensors that belong to a quantized weight and to nothing else
_WEIGHT_SCALES: Final = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point", "scales",
    "qzeros", "scaled_zeros", "absmax", "SCB",
)
_QUANTIZED: Final = (*_WEIGHT_SCALES, "qweight", "g_idx", "weight_packed", "input_scale", "input_global_scale",
                     "quant_map", "pre_quant_scale")

# Dialects whose config means that some tensor is packed; where a key is named, only if the config holds it.
_ALWAYS_PACKED: Final[Mapping[str, str]] = {
    "gptq": "", "awq": "", "auto-round": "", "fp8": "", "fbgemm_fp8": "",
    "compressed-tensors": "config_groups", "modelopt": "quant_algo",
}


def demand_one_configuration(contents: Contents) -> None:
    """Raise Inconsistent if two descriptions of the quantization differ in a fact that both tell.

    Absent and null keys are no statement: several writers leave them out of one of the files.
    """
    main = contents.quantization
    if not main:
        return
    text = contents.config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, dict) else None
    others = [("config.json: text_config.quantization_config", inner)]
    others += [(name, contents.side.get(name)) for name in _COPIES]
    for where, other in others:
        if not isinstance(other, dict) or other is main:
            continue
        for fact, keys in _FACTS.items():
            here, there = _told(main, keys), _told(other, keys)
            if None not in (here, there) and not _same(here, there):
                raise Inconsistent(
                    f"config.json and {where.removeprefix('config.json: ')} disagree about {fact}", where=where,
                    found=f"{_HERE}: {repr(here)[:80]} · {where}: {repr(there)[:80]}", wanted="the same in both",
                    remedy="keep the one that the quantizing tool wrote together with the tensors",
                )


def _told(config: JSON, keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _same(here: Any, there: Any) -> bool:
    if isinstance(here, str) and isinstance(there, str):
        return here.lower() == there.lower()
    return bool(here == there) and isinstance(here, bool) is isinstance(there, bool)


# --- a method that nobody names --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sign:
    """What proves a method: an ending of tensors that only it writes, and a key of its config."""

    method: str
    ending: str
    key: str


_SIGNS: Final = (
    _Sign("compressed-tensors", ".weight_packed", "config_groups"),
    _Sign("compressed-tensors", ".weight_scale", "config_groups"),
    _Sign("fp8", ".weight_scale_inv", "weight_block_size"),
)


def with_method(contents: Contents) -> Contents:
    """The contents with the quant_method that their config forgot, where tensors and keys fit exactly one.

    Unchanged if a method is named, or none or several fit.
    """
    config = contents.quantization
    if not config or config.get("quant_method") is not None or config.get("method") is not None:
        return contents
    if "producer" in config or "quant_algo" in config:  # ModelOpt's own keys: its dialect reads them without a method
        return contents
    fitting = {s.method for s in _SIGNS if config.get(s.key) and any(n.endswith(s.ending) for n in contents.tensors)}
    if len(fitting) != 1:
        return contents
    named = {**config, "quant_method": fitting.pop()}
    return replace(contents, config={**contents.config, "quantization_config": named})


def remark_on_method(contents: Contents, dialect: str) -> tuple[str, ...]:
    """A remark if no config.json named the method and the dialect was found by other signs."""
    if contents.quantization.get("quant_method") is not None or dialect in ("plain", "gguf"):
        return ()
    files = [name for name in contents.side if contents.side[name]]
    source = f"{files[0]} and the tensors fit" if files and not contents.quantization else "config and tensors fit"
    return (f"config.json names no quant_method; read as {dialect}: {source}",)


# --- tensors against layers ------------------------------------------------------------------------------------------


def demand_codes(checkpoint: Checkpoint) -> None:
    """Raise Inconsistent if a config of a dialect that packs stands beside plain tensors only.

    A config for nothing but the key-value cache quantizes no layer, and is sound.
    """
    key = _ALWAYS_PACKED.get(checkpoint.dialect)
    if key is None or (key and not checkpoint.contents.quantization.get(key)):
        return
    if any(layer.scheme.is_quantized for layer in checkpoint.layers.values()) or checkpoint.kv_cache is not None:
        return
    raise Inconsistent(
        f"declared as {checkpoint.dialect}, but no tensor is quantized", where="config.json",
        found=f"{len(checkpoint.contents.tensors)} plain tensors", wanted="packed codes and scales",
        remedy="the config belongs to another file: remove quantization_config if the tensors are the plain model",
    )


def demand_claimed_scales(checkpoint: Checkpoint) -> None:
    """Raise Inconsistent for the scale of a weight that is a layer, but no quantized one.

    Such a weight is codes in a dtype that no tool writes, or a float that still has to be quantized; to use it as it
    stands would be wrong in silence.
    """
    wrong = []
    for stored in checkpoint.plain.values():
        module, _, leaf = stored.rpartition(".")
        layer = checkpoint.layers.get(module) if leaf in _WEIGHT_SCALES else None
        if layer is not None and not layer.scheme.is_quantized and "weight" in layer.tensors:
            wrong.append(stored)
    if wrong:
        weight = checkpoint.contents.tensors[checkpoint.layers[wrong[0].rpartition(".")[0]].tensors["weight"]]
        raise Inconsistent(
            "a scale beside a weight that is not quantized", where=wrong[0],
            found=f"{weight.name}: {weight.dtype} {list(weight.shape)}", wanted="codes of the declared format",
            remedy="the export is damaged or unfinished: get it again from its maker", more=wrong[1:],
        )


def demand_one_form_of_experts(checkpoint: Checkpoint) -> None:
    """Raise Inconsistent if the experts of one layer are stored twice: as a stack and one by one."""
    stacks = {name.rpartition(".")[0] for name, layer in checkpoint.layers.items() if layer.kind == "experts"}
    for name in checkpoint.layers if stacks else ():
        for parent, number, rest in _experts(name):
            if parent in stacks and rest:
                stacked = next(n for n, layer in checkpoint.layers.items()
                               if layer.kind == "experts" and n.rpartition(".")[0] == parent)
                raise Inconsistent("experts are stored twice", where=parent, found=f"{stacked} · {name}",
                                   wanted=f"a stack, or experts one by one (here expert {number})",
                                   remedy="get the model again from its maker")


def _experts(name: str) -> list[tuple[str, str, str]]:
    """(parent, number, rest) of a name with a number inside: "a.experts.3.up" gives ("a.experts", "3", "up")."""
    parts = name.split(".")
    return [(".".join(parts[:i]), part, ".".join(parts[i + 1 :])) for i, part in enumerate(parts) if part.isdecimal()]


def remark_on_leftovers(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Remarks on tensors that no layer uses although they look like parts of one, and on half-declared caches."""
    orphans = []
    strangers = []
    for stored in checkpoint.plain.values():
        module, _, leaf = stored.rpartition(".")
        layer = checkpoint.layers.get(module)
        if leaf in _QUANTIZED:
            orphans.append(stored)
        elif layer is not None and layer.scheme.is_quantized:
            strangers.append(stored)
    remarks = [
        _counted(orphans, "tensors of no quantized layer"),
        _counted(strangers, "tensors beside a quantized layer that it does not use"),
    ]
    cache = checkpoint.kv_cache
    remarks += kv_scales.remarks(cache) if cache is not None else ()
    return tuple(remark for remark in remarks if remark)


# key of config.json that says false -> part of the module names whose layers it means
_BIAS_KEYS: Final[Mapping[str, str]] = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."}


def remark_on_biases(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Remarks on biases, not all zero, of layers that have none by config.json; they count. Some tools store zeros.

    A bias too large for a small tensor is taken for one with numbers in it.
    """
    remarks = []
    for key, part in _BIAS_KEYS.items():
        if checkpoint.config.get(key) is not False or checkpoint.contents.gguf is not None:
            continue
        names = (layer.tensors["bias"] for name, layer in checkpoint.layers.items()
                 if layer.has_bias and part in f".{name}." and ".experts." not in name)
        with SmallTensors() as small:
            infos = [checkpoint.contents.tensors[name] for name in names]
            biases = [info.name for info in infos if info.nbytes > MOST_BYTES or any(small.raw(info))]
        remarks.append(_counted(biases, f"biases although config.json says {key} false, applied all the same"))
    return tuple(remark for remark in remarks if remark)


def _counted(names: list[str], what: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{what}: {names[0]}{more}"


DEMANDS: Final[tuple[Callable[[Checkpoint], None], ...]] = (
    demand_codes, demand_claimed_scales, demand_one_form_of_experts,
)
