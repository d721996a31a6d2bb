"""The configuration that the GPTQ and AWQ writers share: old and new key names, side files, `dynamic` rules.

Torch-free. Writers: AutoGPTQ, AutoAWQ, gptqmodel, auto-round's exports of both, transformers and optimum.
Rules and versions: docs/formats/gptq.md §1, §6, §9 and docs/formats/awq.md §1, §6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.checkpoints.contents import JSON, Contents
from anybit.checkpoints.dialects._shared import config_values as values
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Damaged, Inconsistent, Unsupported

WHERE: Final = "config.json: quantization_config"
AWQ_FORMATS: Final = ("gemm", "gemv", "gemv_fast", "llm-awq")
SIDE_FILES: Final = ("quantize_config.json", "quant_config.json")

_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {  # the later names are those of old repositories
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size"),
    "format": ("format", "checkpoint_format", "version"),
}
_WHOLE_ROW: Final = -1  # group_size: one group over K
_DEFAULT_GROUP: Final = 128  # gptqmodel and transformers where the key is absent; checked against the tensors
_LORA: Final = (".lora_A", ".lora_B", ".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True)
class Settings:
    """How one module is quantized, as the config says.

    bits         None where nothing says it (the tensors do)
    group_size   -1 is one group over K
    symmetric    all zero points in the middle; never trusted, the tensors hold them
    act_order    `desc_act`: columns may be scattered over groups
    """

    bits: int | None
    group_size: int
    symmetric: bool
    act_order: bool

    def group_of(self, columns: int) -> int:
        """Inputs that share a scale."""
        return columns if self.group_size == _WHOLE_ROW else self.group_size


@dataclass(frozen=True)
class Config:
    """A quantization config of this family; `raw` keeps what only one dialect asks for."""

    raw: JSON
    base: Settings
    rules: tuple[tuple[str, JSON], ...]  # `dynamic` in file order, signs kept
    where: str
    patterns: Patterns

    @property
    def is_by_gptqmodel(self) -> bool:
        """True if `meta.quantizer` names gptqmodel."""
        return self._quantizer().startswith("gptqmodel:")

    @property
    def is_by_auto_round(self) -> bool:
        """True if AutoRound wrote it."""
        provider = self.raw.get("provider")
        return provider == "auto-round" or "autoround_version" in self.raw

    @property
    def has_static_groups(self) -> bool:
        """True if groups were fixed before columns were sorted (AutoGPTQ's key, gptqmodel's under meta)."""
        meta = self.raw.get("meta")
        return any(isinstance(h, dict) and h.get("static_groups") is True for h in (self.raw, meta))

    def _quantizer(self) -> str:
        meta = self.raw.get("meta")
        quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
        first = quantizer[0] if isinstance(quantizer, list) and quantizer else quantizer
        return first if isinstance(first, str) else ""

    def settings(self, module: str) -> tuple[Settings, bool]:
        """Settings of a module and whether a negative rule skips it; the first matching rule wins, none is merged."""
        found = self.patterns.first(module)
        if found is None:
            return self.base, False
        pattern, overrides = self.rules[found]
        if pattern.startswith("-:"):
            return self.base, True
        return _settings(overrides, f"{self.where}.dynamic[{pattern!r}]", self.base), False


def raw_config(contents: Contents) -> tuple[JSON, str]:
    """The quantization config and its place: config.json's, else a side file's (old repositories), else {}."""
    if contents.quantization:
        return contents.quantization, WHERE
    for name in SIDE_FILES:
        if contents.side.get(name):
            return contents.side[name], name
    return {}, WHERE


def method(raw: JSON) -> str:
    """`quant_method`, or gptqmodel 7's `method`, in lower case."""
    for key in ("quant_method", "method"):
        value = raw.get(key)
        if isinstance(value, str):
            return value.lower()
    return ""


def says_awq(raw: JSON) -> bool:
    """True if a format key names one of AWQ's layouts; AutoGPTQ read such files under quant_method gptq."""
    named = (raw.get(key) for key in _ALIASES["format"])
    return any(isinstance(value, str) and value.lower() in AWQ_FORMATS for value in named)


def format_name(raw: JSON, where: str, *keys: str) -> str:
    """What `format`, `checkpoint_format` and `version` (or only `keys`) say, in lower case, "" where none does.

    Raises Inconsistent where two of them differ.
    """
    names = {}
    for key in keys or _ALIASES["format"]:
        value = raw.get(key)
        if value is not None and not isinstance(value, str):
            raise Damaged(f"{key} has no sound value", where=where, found=repr(value)[:80], wanted="a string")
        if value:
            names[key] = value.lower()
    if len(set(names.values())) > 1:
        raise Inconsistent("keys that mean the same disagree", where=where,
                           found=" · ".join(f"{key}: {name}" for key, name in names.items()), wanted="one format",
                           remedy="use the config.json that was written with these weights")
    return next(iter(names.values()), "")


def read_config(contents: Contents) -> Config:
    """The checked config; raises Damaged for unsound values."""
    raw, where = raw_config(contents)
    zero_point = values.flag(raw, "zero_point", where, default=False)
    symmetric = values.flag(raw, "sym", where, default=not zero_point)  # absent means symmetric, as for gptqmodel
    act_order = values.flag(raw, "desc_act", where, default=False)
    base = _settings(raw, where, Settings(None, _DEFAULT_GROUP, symmetric, act_order))
    rules = tuple(_rules(contents, raw, where))
    patterns = Patterns.match([_pattern(text) for text, _ in rules], where=f"{where}.dynamic")
    return Config(raw, base, rules, where, patterns)


def refuse_run_time_parts(contents: Contents, config: Config) -> None:
    """Refuse what the stored weights alone do not contain: rotated inputs, adapters (docs/formats/gptq.md §9)."""
    remedies = {
        "rotation": "quantize the model without rotation",
        "adapter": "merge the adapter into the weights before quantizing",
    }
    for key, remedy in remedies.items():
        if config.raw.get(key):
            raise Unsupported(f"weights that need {key} at run time", where=config.where,
                              found=f"{key}: {str(config.raw[key])[:80]}", wanted="none", remedy=remedy)
    lora = [name for name in contents.tensors if name.endswith(_LORA)]
    if lora:
        raise Unsupported("weights that need an adapter at run time", where=lora[0], found="an adapter's tensors",
                          wanted="none", remedy=remedies["adapter"], more=lora[1:])


def refuse_incomplete(contents: Contents, leaf: str, *others: str) -> None:
    """Refuse modules that have `leaf` but not all of the others, naming every one."""
    codes = [name.removesuffix(leaf) for name in contents.tensors if name.endswith(f".{leaf}")]
    missing = [f"{stem}{other}" for stem in codes for other in others if f"{stem}{other}" not in contents.tensors]
    if missing:
        raise Inconsistent("a tensor of a quantized layer is missing", where=missing[0], found=f"{leaf} without it",
                           wanted=" · ".join((leaf, *others)), remedy="the checkpoint is incomplete: download it again",
                           more=missing[1:])


def _settings(raw: Mapping[str, Any], where: str, base: Settings) -> Settings:
    """`base` with what `raw` overrides."""
    holder = dict(raw)
    bits = _one(holder, "bits", where, least=2, most=8)
    group_size = _one(holder, "group_size", where, least=_WHOLE_ROW)
    if group_size == 0:
        raise Damaged("group_size has no sound value", where=where, found="0", wanted="-1 or a positive integer")
    return Settings(
        base.bits if bits is None else bits,
        base.group_size if group_size is None else group_size,
        values.flag(holder, "sym", where, default=base.symmetric),
        values.flag(holder, "desc_act", where, default=base.act_order),
    )


def _one(holder: JSON, key: str, where: str, *, least: int, most: int = 2**31 - 1) -> int | None:
    """The integer under any of the names of `key`; Inconsistent where two of them differ."""
    names = [name for name in _ALIASES[key] if holder.get(name) is not None]
    found = {name: values.integer(holder, name, where, least=least, most=most) for name in names}
    if len(set(found.values())) > 1:
        raise Inconsistent("keys that mean the same disagree", where=where,
                           found=" · ".join(f"{name}: {value}" for name, value in found.items()), wanted="one value",
                           remedy="use the config.json that was written with these weights")
    return next(iter(found.values()), None)


def _rules(contents: Contents, raw: JSON, where: str) -> list[tuple[str, JSON]]:
    """`dynamic` in file order. Tools that sort config.json lose the order; the side file then still has it."""
    rules = values.table(raw, "dynamic", where)
    side = contents.side.get("quantize_config.json", {}).get("dynamic")
    if isinstance(side, dict) and side == rules:
        rules = side
    checked = []
    for pattern, overrides in rules.items():
        if overrides is not None and not isinstance(overrides, dict):
            raise Damaged("a dynamic rule has no sound value", where=f"{where}.dynamic[{pattern!r}]",
                          found=repr(overrides)[:80], wanted="an object")
        checked.append((pattern, overrides or {}))
    return checked


def _pattern(text: str) -> str:
    return text[2:] if text.startswith(("+:", "-:")) else text
