"""Which config group a module belongs to, and whether `ignore` names it: compressed-tensors' own order; torch-free.

A target is an exact module name, `re:` and a pattern anchored at the start, or a class name. Exact names come before
regexes before class names, regexes in the order of their text; the order of the groups plays no role.
Rules: docs/formats/compressed_tensors.md §2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from anybit.checkpoints.dialects._shared.compressed_tensors_config import WHERE, Config, Group
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Inconsistent

_REGEX: Final = "re:"
# the classes that hold codes, and the names that their hierarchy answers to
_CLASSES: Final = {"Linear": ("Linear", "Module"), "Embedding": ("Embedding", "Module")}


class Targets:
    """The targets of all groups with weights, and the ignore list, ready to be asked for many modules."""

    def __init__(self, config: Config) -> None:
        self._groups: dict[str, Group] = {}
        for group in config.groups:
            if group.weights is not None:  # groups of attention classes carry activations only
                self._groups |= dict.fromkeys(group.targets, group)
        self._regexes = sorted(t for t in self._groups if t.startswith(_REGEX))
        self._patterns = Patterns.match(_patterns(self._regexes), where=f"{WHERE}.config_groups")
        self._ignored_names = {entry for entry in config.ignore if not entry.startswith(_REGEX)}
        self._ignored_patterns = Patterns.match(_patterns(config.ignore), where=f"{WHERE}.ignore")

    def group_of(self, module: str, class_name: str) -> Group:
        """The group of a module that holds codes; Inconsistent if none targets it or `ignore` names it."""
        if self.is_ignored(module, class_name):
            raise Inconsistent("codes in a module that the config ignores", where=module,
                               found=f"{WHERE}.ignore names it", wanted="a float weight",
                               remedy="use the config.json that was written with these weights")
        found = self._groups.get(module)
        if found is None and (first := self._patterns.first(module)) is not None:
            found = self._groups[self._regexes[first]]
        if found is None:
            found = next((self._groups[c] for c in _CLASSES[class_name] if c in self._groups), None)
        if found is None:
            raise Inconsistent("codes in a module that no config group targets", where=module,
                               found=f"targets {', '.join(self._groups)}"[:400], wanted="a group that targets it",
                               remedy="use the config.json that was written with these weights")
        return found

    def is_ignored(self, module: str, class_name: str) -> bool:
        """True if `ignore` names the module, its class, or matches it."""
        classes = (c in self._ignored_names for c in _CLASSES[class_name])
        return module in self._ignored_names or any(classes) or self._ignored_patterns.first(module) is not None


def _patterns(entries: Iterable[str]) -> list[str]:
    return [entry.removeprefix(_REGEX) for entry in entries if entry.startswith(_REGEX)]
