"""Rules of --kernel: which layers run on which kernel because the user says so. Torch-free.

    NAME                        every layer that the kernel is made for
    linear=NAME                 every such layer of a kind: linear, experts, embedding
    re:.*down_proj=NAME         layers whose whole name the pattern matches
    model.layers.0.mlp=NAME     the layer of that name, or all layers below that module

The more particular rule wins: a name over a pattern over a kind over none; of equals the last one given. What
ANYBIT_KERNEL says counts as given before the command line. A kernel that is named for a layer and cannot run it is an
error with its reasons; NAME alone and a kind leave out layers that the kernel is not made for (an unquantized one, a
lookup table).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Final

from anybit.checkpoints.patterns import Patterns
from anybit.errors import Unsupported
from anybit.kernels.catalogue import kernel
from anybit.kernels.request import Request
from anybit.planning.choose import NOT_MEANT, demand_known, regimes_of
from anybit.platforms import Platform
from anybit.schemes import Layer

VARIABLE: Final = "ANYBIT_KERNEL"
_KINDS: Final = ("linear", "experts", "embedding")
_WIDTH: Final = {"all": 0, "kind": 1, "pattern": 2, "name": 3}  # the wider loses


@dataclass(frozen=True)
class Rule:
    """One rule: `text` as given, the kernel, and which layers `what` means."""

    text: str
    kernel: str
    width: str
    what: str
    is_from_environment: bool = False

    def kernel_for(self, request: Request, platform: Platform) -> str | None:
        """The kernel for a layer that the rule meets; None where a wide rule meets a layer of another sort."""
        is_particular = self.width in ("pattern", "name")
        return self.kernel if is_particular or _is_meant(self.kernel, request, platform) else None


def _is_meant(name: str, request: Request, platform: Platform) -> bool:
    """False if the kernel refuses every regime because it is made for other layers."""
    verdicts = [kernel(name).can_implement(replace(request, regime=r), platform) for r in regimes_of(request)]
    if not request.scheme.is_quantized:
        return any(verdict.ok for verdict in verdicts)
    return not all(any(reason.code in NOT_MEANT for reason in verdict.reasons) for verdict in verdicts)


@dataclass(frozen=True)
class Overrides:
    """The rules in the order in which they were given."""

    rules: tuple[Rule, ...] = ()

    @staticmethod
    def parse(texts: Iterable[str], environment: str = "") -> Overrides:
        """Rules of the command line, and of the environment, which hold several separated by blanks.

        Raises Unsupported for a kernel that does not exist, and for text that is no rule.
        """
        from_environment = tuple(_rule(word, is_from_environment=True) for word in environment.split())
        return Overrides((*from_environment, *(_rule(word) for text in texts for word in text.split())))

    @property
    def texts(self) -> tuple[str, ...]:
        """The rules as they were given."""
        return tuple(rule.text for rule in self.rules)

    def by_layer(self, layers: Iterable[Layer]) -> dict[str, Rule]:
        """The rule of each layer that has one. Raises Unsupported for a name or pattern that meets no layer."""
        layers = list(layers)
        found: dict[str, Rule] = {}
        for rule in sorted(self.rules, key=lambda r: _WIDTH[r.width]):
            met = [layer.name for layer in _met(rule, layers)]
            if not met and rule.width in ("pattern", "name") and not rule.is_from_environment:
                near = get_close_matches(rule.what, [layer.name for layer in layers], n=2)
                raise Unsupported(
                    "a rule of --kernel meets no layer", where=rule.text, found=rule.what,
                    wanted="a layer's name, a module above it, or re: and a pattern of whole names",
                    remedy=f"perhaps {' or '.join(near)}" if near else "`anybit inspect MODEL --layers` lists them",
                )
            found |= dict.fromkeys(met, rule)
        return found

    def notes(self, used: Mapping[str, Rule]) -> tuple[str, ...]:
        """Remarks about rules that decide nothing here."""
        idle = [rule.text for rule in self.rules if rule not in used.values()]
        return tuple(f"the kernel rule {text} decides for no layer here" for text in dict.fromkeys(idle))


def _rule(text: str, *, is_from_environment: bool = False) -> Rule:
    what, separator, name = text.rpartition("=")
    if not name or (separator and not what):
        raise Unsupported("no rule for a kernel", where=VARIABLE if is_from_environment else "--kernel", found=text,
                          wanted="NAME, linear=NAME, re:PATTERN=NAME or MODULE=NAME",
                          remedy="--kernel linear=torch-tiled")
    demand_known(name)
    width = "all"
    if separator:
        width = "kind" if what in _KINDS else "pattern" if what.startswith("re:") else "name"
    return Rule(text, name, width, what, is_from_environment)


def _met(rule: Rule, layers: list[Layer]) -> list[Layer]:
    if rule.width == "all":
        return layers
    if rule.width == "kind":
        return [layer for layer in layers if layer.kind == rule.what]
    if rule.width == "name":
        return [layer for layer in layers if layer.name == rule.what or layer.name.startswith(f"{rule.what}.")]
    patterns = Patterns([rule.what.removeprefix("re:")], "fullmatch", "--kernel")
    return [layer for layer in layers if patterns.first(layer.name) is not None]
