"""Rules of `--quantization`: which layers, and to what; who decides where several take a layer. Torch-free.

A rule is a module's name (with everything in it), a class (Linear, Embedding, experts), `re:PATTERN`, matched from the
start of the name as vLLM and compressed-tensors do, or a shell pattern. A rule with `none` wins over every other. Of
the rest the most particular decides: the longest name, then the first pattern, then a class; `experts` and `Embedding`
before `Linear`. vLLM refuses some recipes that have a meaning here (two patterns for a layer); whatever it accepts
means the same. How recipes are written: `online_text.py`.
Source: vLLM 0.30, vllm/config/quantization.py and layers/quantization/online/base.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from anybit.checkpoints.online_schemes import ONLINE, online_scheme
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Damaged, Unsafe, Unsupported
from anybit.schemes import Layer

__all__ = ["NONE", "Match", "Matcher", "Online", "Targets", "is_expert", "is_none", "near_rules", "sorted_targets"]

NONE: Final = "none"  # instead of a scheme: the layer stays as it is
WHERE: Final = "--quantization"
_EXPERT: Final = re.compile(r"(?:^|\.)experts(?:\.|$)")

Targets = Mapping[str, str | None] | Sequence[str] | Sequence[tuple[str, str]]


@dataclass(frozen=True, init=False)
class Online:
    """What to quantize while loading, wherever a name of `--quantization` is accepted.

    name     what every linear layer and expert becomes; None: only the targets
    targets  (rule, name) pairs; may be given as a mapping, or as rules that alone get `name`
    ignore   rules whose layers stay as they are

    Raises Unsupported for a name, a rule or a combination that means nothing.

    >>> str(Online("nvfp4", targets={"re:.*down_proj": "fp8_per_channel"}, ignore=["lm_head"]))
    'nvfp4,re:.*down_proj=fp8_per_channel,lm_head=none'
    """

    name: str | None
    targets: tuple[tuple[str, str], ...]
    ignore: tuple[str, ...]

    def __init__(self, name: str | None = None, targets: Targets = (), ignore: Sequence[str] | str = ()) -> None:
        """Normalize and check; nothing is matched yet."""
        base = None if name is None or is_none(name) else _known(name)
        alone, pairs = sorted_targets(targets)
        if alone and base is None:
            raise Unsupported("rules without a scheme", where=WHERE, found=", ".join(alone), wanted="RULE=NAME",
                              remedy=f"--quantization nvfp4 --quantize-only '{alone[0]}'")
        ignored = [_rule(rule) for rule in ([ignore] if isinstance(ignore, str) else ignore)]
        ignored += [rule for rule, meant in pairs if is_none(meant)]
        chosen = [(rule, _known(meant)) for rule, meant in pairs if not is_none(meant)]
        chosen += [(rule, base) for rule in alone if base is not None]
        if base == "online" and chosen:  # vLLM's word for "as the configuration says"
            base = None
        object.__setattr__(self, "name", None if alone else base)
        object.__setattr__(self, "targets", tuple(dict.fromkeys(chosen)))
        object.__setattr__(self, "ignore", tuple(dict.fromkeys(ignored)))
        self._demand_sense()

    def _demand_sense(self) -> None:
        if self.name is None and not self.targets:
            raise Unsupported("nothing would be quantized", where=WHERE, found=", ".join(self.ignore) or NONE,
                              wanted="a scheme", remedy="--quantization nvfp4, or leave it out")
        rules = [rule for rule, _ in self.targets]
        twice = [rule for rule in rules if rules.count(rule) > 1 or rule in self.ignore]
        if twice:
            found = [*(name for rule, name in self.targets if rule == twice[0]),
                     *([NONE] if twice[0] in self.ignore else [])]
            raise Unsupported("a rule has two schemes", where=twice[0], found=" and ".join(found), wanted="one",
                              remedy="leave one of them out")

    def __str__(self) -> str:
        pairs = [f"{rule}={name}" for rule, name in self.targets] + [f"{rule}={NONE}" for rule in self.ignore]
        return ",".join([*([self.name] if self.name else []), *pairs])


def sorted_targets(targets: Targets) -> tuple[list[str], list[tuple[str, str]]]:
    """Rules that stand alone, and (rule, name) pairs."""
    if isinstance(targets, str):
        targets = [targets]
    if isinstance(targets, Mapping):
        return [], [(_rule(rule), _text(name, rule)) for rule, name in targets.items()]
    alone: list[str] = []
    pairs: list[tuple[str, str]] = []
    for entry in targets:
        if isinstance(entry, str):
            alone.append(_rule(entry))
        elif len(entry) == 2:
            pairs.append((_rule(entry[0]), _text(entry[1], entry[0])))
        else:
            raise Unsupported("no rule and scheme", where=WHERE, found=repr(entry)[:200], wanted="(rule, name)")
    return alone, pairs


def _text(name: object, rule: str) -> str:
    if name is None:
        return NONE
    if not isinstance(name, str):
        raise Unsupported("no name of a scheme", where=rule, found=repr(name)[:200], wanted=", ".join(ONLINE))
    return name


def _rule(rule: object) -> str:
    if not isinstance(rule, str) or not rule.strip() or rule.strip() == "re:":
        raise Unsupported("an empty rule", where=WHERE, found=repr(rule)[:200],
                          wanted="a module's name, Linear, Embedding, experts, or re:PATTERN")
    return rule.strip()


def is_none(name: str) -> bool:
    """True for the word that leaves layers as they are."""
    return name.strip().lower() == NONE


def _known(name: str) -> str:
    online_scheme(name)
    return name.strip().lower()


_CLASSES: Final = {"experts": "experts", "fusedmoe": "experts", "routedexperts": "experts", "moe": "experts",
                   "embedding": "Embedding", "linear": "Linear"}  # fmt: skip


def is_expert(layer: Layer) -> bool:
    """True for routed experts, one by one or stacked."""
    return layer.kind == "experts" or _EXPERT.search(layer.name) is not None


def _class_of(rule: str) -> str | None:
    """The class that a rule names: ours, torch's Linear and Embedding, transformers' ...Experts."""
    return _CLASSES.get(rule.lower()) or ("experts" if re.fullmatch(r"\w+Experts", rule) else None)


@dataclass(frozen=True)
class Match:
    """How a rule takes a layer.

    by  "name" the layer's own, "within" a module around it, "pattern", "spelled" a pattern that spells its last part,
        "class"
    """

    rule: str
    by: str
    rank: tuple[int, int]


class Matcher:
    """Rules compiled once; `matches(layer)` in bounded time (`patterns.py`).

    Raises Unsupported for a pattern that does not compile, Unsafe for one that takes too long.
    """

    def __init__(self, rules: Iterable[str]) -> None:
        """Sort the rules by kind; classes last."""
        self.rules = list(rules)
        self._names = {rule.removesuffix(".weight"): rule for rule in self.rules if not _is_pattern(rule)}
        self._classes = {_class_of(rule): rule for rule in self.rules if _class_of(rule) is not None}
        self._regular = [rule for rule in self.rules if rule.startswith("re:")]
        self._shell = [rule for rule in self.rules if _is_pattern(rule) and not rule.startswith("re:")]
        try:
            self._by_regular = Patterns.match([rule[3:] for rule in self._regular], where=WHERE)
            self._by_shell = Patterns.fnmatch(self._shell, where=WHERE)
        except Damaged as error:
            raise Unsupported(error.problem, where=error.where, found=error.found, wanted=error.wanted,
                              remedy=error.remedy) from error

    def matches(self, layer: Layer) -> list[Match]:
        """All rules that take the layer, the most particular first."""
        name = layer.name.removesuffix(".weight")
        found = [*self._by_name(name), *self._by_pattern(layer, name), *self._by_class(layer)]
        return sorted(found, key=lambda match: match.rank)

    def _by_name(self, name: str) -> Iterator[Match]:
        part = name
        while part:
            if part in self._names:
                yield Match(self._names[part], "name" if part == name else "within", (0, -len(part)))
            part = part.rpartition(".")[0]

    def _by_pattern(self, layer: Layer, name: str) -> Iterator[Match]:
        if not self._regular and not self._shell:
            return
        names = {name, _experts_module(name)} if is_expert(layer) else {name}
        try:
            taken = {self._regular[i] for n in names for i in self._by_regular.all(n)}
            taken |= {self._shell[i] for n in names for i in self._by_shell.all(n)}
        except Unsafe as error:
            raise Unsafe(error.problem, where=WHERE, found=error.found, wanted=error.wanted,
                         remedy="write the pattern without nested repeats, or name the modules") from error
        last = name.rpartition(".")[2]
        for index, rule in enumerate(self.rules):
            if rule in taken:
                yield Match(rule, "spelled" if last in rule else "pattern", (1, index))

    def _by_class(self, layer: Layer) -> Iterator[Match]:
        own = "Embedding" if layer.kind == "embedding" else "experts" if is_expert(layer) else "Linear"
        for rank, kind in enumerate(dict.fromkeys((own, *(() if own == "Embedding" else ("Linear",))))):
            if kind in self._classes:
                yield Match(self._classes[kind], "class", (2, rank))


def _is_pattern(rule: str) -> bool:
    return rule.startswith("re:") or any(c in rule for c in "*?[")


def _experts_module(name: str) -> str:
    """`mlp.experts` of `mlp.experts.3.up_proj`: the module that vLLM and transformers have for all of them."""
    found = _EXPERT.search(name)
    return name[: found.start()] + name[found.start() : found.end()].rstrip(".") if found else name


def near_rules(rule: str, names: Iterable[str]) -> str:
    """What a rule that takes no layer may have meant; "" where nothing is near."""
    listed = list(names)[:10_000]  # some models have 300,000 names
    if not _is_pattern(rule) and any(f".{name}".endswith(f".{rule}") for name in listed):
        return f"*.{rule}"
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in listed))
    near = get_close_matches(rule, listed, n=1) or get_close_matches(rule.rpartition(".")[2], parts, n=1, cutoff=0.7)
    return f"*.{near[0]}" if near and near[0] in parts and near[0] not in listed else (near[0] if near else "")

