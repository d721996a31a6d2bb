"""What ModelOpt's two config files say together, checked; torch-free and without tensors.

config.json drops keys that hf_quant_config.json has and the other way round: a key that only one file holds counts,
a key that both hold with different values is refused. Rules: docs/formats/modelopt.md §1, §6, §8, §9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from anybit.checkpoints.contents import JSON, Contents
from anybit.checkpoints.dialects._shared import config_values as values
from anybit.errors import Damaged, Inconsistent, Unsupported

SIDE_FILE: Final = "hf_quant_config.json"

_KV_CACHES: Final = {"FP8": "fp8_e4m3fn", "NVFP4": "fp4_e2m1"}
_T = TypeVar("_T")


@dataclass(frozen=True)
class LayerRule:
    """What MIXED_PRECISION says of one module, or of all below one name; `group_size` 0 where it says none."""

    algorithm: str
    group_size: int = 0


@dataclass(frozen=True)
class Settings:
    """Both files as one.

    algorithm     quant_algo in upper case, "" where there is none (then only the cache is quantized)
    layers        MIXED_PRECISION: module, or prefix of experts -> rule
    exclude       wildcards of unquantized modules; the tensors decide, these only check
    group_size    0 where no file says it
    weight_only   every config group says that inputs stay as they are
    kv_cache      number format of the cache, "" where it is not quantized
    """

    algorithm: str = ""
    layers: Mapping[str, LayerRule] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    group_size: int = 0
    weight_only: bool = False
    kv_cache: str = ""

    def rule_for(self, module: str) -> LayerRule | None:
        """The rule of a module: its own, or the one of the nearest name above it that has one."""
        if self.algorithm != "MIXED_PRECISION":
            return LayerRule(self.algorithm, self.group_size) if self.algorithm else None
        name = module
        while name:
            if name in self.layers:
                return self.layers[name]
            name = name.rpartition(".")[0]
        return None


def speaks_modelopt(contents: Contents) -> bool:
    """True if config.json names the method, or names none and either file has ModelOpt's form."""
    if contents.quant_method:
        return contents.quant_method.startswith("modelopt")
    if contents.quantization:
        producer = contents.quantization.get("producer")
        named = isinstance(producer, dict) and producer.get("name") == "modelopt"
        return named or isinstance(contents.quantization.get("quantization"), dict)
    side = contents.side.get(SIDE_FILE)
    return isinstance(side, dict) and isinstance(side.get("quantization"), dict)


def read_settings(contents: Contents) -> Settings:
    """The settings of a checkpoint; raises Inconsistent where the files disagree, Unsupported for caches unread."""
    said = []
    inner = contents.quantization
    if inner:
        where = "config.json: quantization_config"
        nested = values.table(inner, "quantization", where)  # some hubs nest the other file's content here
        said.append((where, _settings(nested or inner, where)))
    side = values.table(contents.side, SIDE_FILE, str(contents.path))
    if side:
        where = f"{SIDE_FILE}: quantization"
        said.append((where, _settings(values.table(side, "quantization", SIDE_FILE), where)))
    if not said:
        return Settings()
    return said[0][1] if len(said) == 1 else _merged(*said)


def _settings(raw: JSON, where: str) -> Settings:
    exclude = values.strings(raw, "ignore", where) or values.strings(raw, "exclude_modules", where)
    groups = values.table(raw, "config_groups", where)
    rules = values.table(raw, "quantized_layers", where)
    return Settings(
        algorithm=(values.text(raw, "quant_algo", where) or "").upper(),
        layers={name: _rule(rules, name, f"{where}.quantized_layers") for name in rules},
        exclude=exclude,
        group_size=_group_size(raw, where),
        weight_only=bool(groups) and not any(values.table(groups, g, where).get("input_activations") for g in groups),
        kv_cache=_kv_cache(raw, where),
    )


def _rule(rules: JSON, name: str, where: str) -> LayerRule:
    raw = values.table(rules, name, where)
    place = f"{where}.{name}"
    return LayerRule((values.text(raw, "quant_algo", place) or "").upper(), _group_size(raw, place))


def _group_size(raw: JSON, where: str) -> int:
    """The declared group size, 0 where the file says none, or -1 for whole rows."""
    size = values.integer(raw, "group_size", where, least=-1)
    if size == 0:
        raise Damaged("group_size has no sound value", where=where, found="0", wanted="-1 or a positive integer",
                      remedy="compare the file with the one where you got the model")
    return max(size or 0, 0)


def _kv_cache(raw: JSON, where: str) -> str:
    """`kv_cache_scheme` as a dict or a bare name, `kv_cache_quant_algo` in the other file."""
    given = raw.get("kv_cache_scheme")
    if isinstance(given, dict):
        if (given.get("num_bits"), given.get("type")) == (8, "float") and not given.get("dynamic"):
            return _KV_CACHES["FP8"]
        name = str(given)[:80]
    else:
        key = "kv_cache_scheme" if given is not None else "kv_cache_quant_algo"
        name = (values.text(raw, key, where) or "").upper()
    if not name or name in _KV_CACHES:
        return _KV_CACHES.get(name, "")
    raise Unsupported("this key-value cache is not read", where=where, found=name, wanted=" · ".join(_KV_CACHES),
                      remedy="export the model with an FP8 cache, or without a quantized one")


def _merged(first: tuple[str, Settings], second: tuple[str, Settings]) -> Settings:
    """The union of two files; hf_quant_config.json's group size wins, being the fuller one."""
    (here, a), (there, b) = first, second

    def one(what: str, x: _T, y: _T) -> _T:
        if x and y and x != y:
            raise Inconsistent(f"config.json and {SIDE_FILE} disagree about {what}", where=there,
                               found=f"{here}: {_shown(x, y)} · {there}: {_shown(y, x)}"[:400],
                               wanted="the same in both",
                               remedy="keep the file that the exporting tool wrote last")
        return x or y

    layers = one("the layers", _algorithms(a), _algorithms(b))
    return Settings(
        algorithm=one("the algorithm", a.algorithm, b.algorithm),
        layers={name: b.layers.get(name) or a.layers[name] for name in layers},
        exclude=tuple(sorted(one("the unquantized modules", frozenset(a.exclude), frozenset(b.exclude)))),
        group_size=one("the group size", a.group_size, b.group_size),
        weight_only=a.weight_only or b.weight_only,
        kv_cache=one("the key-value cache", a.kv_cache, b.kv_cache),
    )


def _shown(value: object, other: object) -> str:
    """A value as text; of names or layers what the other side lacks or tells otherwise."""
    if isinstance(value, frozenset) and isinstance(other, frozenset):
        return ", ".join(sorted(value - other)) or "nothing more"
    if isinstance(value, dict) and isinstance(other, dict):
        return ", ".join(f"{name} {value[name]}" for name in value if other.get(name) != value[name]) or "nothing more"
    return str(value)


def _algorithms(settings: Settings) -> dict[str, str]:
    return {name: rule.algorithm for name, rule in settings.layers.items()}
