"""Which config group a module belongs to, and whether `ignore` names it: compressed-tensors' own order; torch-free.

A target is an exact module name, `re:` and a pattern anchored at the start, or a class name. Exact names come before
regexes before class names, regexes in the order of their text; the order of the groups plays no role.
Rules: docs/formats/compressed_tensors.md §2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from anybit.checkpoints.dialects._shared.compressed_tensors_config import WHERE, Config, Group
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Inconsistent

_REGEX: Final = "re:"
# the classes that hold codes, and the names that their hierarchy answers to
_CLASSES: Final = {"Linear": ("Linear", "Module"), "Embedding": ("Embedding", "Module")}


_HEAD: Final = "lm_head"  # tied heads have no tensor, and every tool's recipes ignore them all the same


class Targets:
    """The targets of all groups with weights, and the ignore list, ready to be asked for many modules."""

    def __init__(self, config: Config) -> None:
        self._groups: dict[str, Group] = {}
        self._repeated: set[str] = set()  # targets of several groups
        for group in config.groups:
            if group.weights is not None:  # groups of attention classes carry activations only
                self._repeated |= self._groups.keys() & set(group.targets)
                self._groups |= dict.fromkeys(group.targets, group)
        self._regexes = sorted(t for t in self._groups if t.startswith(_REGEX))
        self._patterns = Patterns.match(_patterns(self._regexes), where=f"{WHERE}.config_groups")
        self._ignored_names = {entry for entry in config.ignore if not entry.startswith(_REGEX)}
        self._ignored_regexes = [entry for entry in config.ignore if entry.startswith(_REGEX)]
        self._ignored_patterns = Patterns.match(_patterns(self._ignored_regexes), where=f"{WHERE}.ignore")

    def group_of(self, module: str, class_name: str) -> tuple[Group, tuple[str, ...]]:
        """The group of a module that holds codes, and remarks; Inconsistent if none targets it.

        A module that `ignore` names has codes all the same: it is decoded as its group says, and remarked on.
        """
        target, rivals = self._target_of(module, class_name)
        if not target:
            raise Inconsistent("codes in a module that no config group targets", where=module,
                               found=f"targets {', '.join(self._groups)}"[:400], wanted="a group that targets it",
                               remedy="use the config.json that was written with these weights")
        found = self._groups[target]
        remarks = []
        if self.is_ignored(module, class_name):
            remarks.append("config.json ignores it, but it holds codes: the tensors decide")
        if target in self._repeated:
            remarks.append(f"several config groups target {target}: the last, {found.name}, counts")
        elif rivals:
            remarks.append(f"{target} of group {found.name} counts, not {', '.join(rivals)}: the first by its text")
        return found, tuple(remarks)

    def _target_of(self, module: str, class_name: str) -> tuple[str, list[str]]:
        """The target that counts, "" if there is none, and regexes of other groups that match as well."""
        if module in self._groups:
            return module, []
        matching = [self._regexes[index] for index in self._patterns.all(module)]
        if matching:
            return matching[0], [t for t in matching[1:] if self._groups[t] is not self._groups[matching[0]]]
        return next((c for c in _CLASSES[class_name] if c in self._groups), ""), []

    def is_ignored(self, module: str, class_name: str) -> bool:
        """True if `ignore` names the module, its class, or matches it."""
        classes = (c in self._ignored_names for c in _CLASSES[class_name])
        return module in self._ignored_names or any(classes) or self._ignored_patterns.first(module) is not None

    def idle(self, modules: Collection[str]) -> tuple[list[str], list[str]]:
        """Targets and entries of `ignore` that name none of the modules; class names are left out, and lm_head."""
        matched: set[str] = set()
        ignored: set[str] = set()
        for module in modules:
            matched.update(self._regexes[index] for index in self._patterns.all(module))
            ignored.update(self._ignored_regexes[index] for index in self._ignored_patterns.all(module))
        named = {entry for entry in (*self._groups, *self._ignored_names)
                 if entry in modules or entry == _HEAD or entry[:1].isupper()}
        targets = [t for t in self._groups if t not in matched and t not in named]
        return targets, sorted({*self._ignored_names, *self._ignored_regexes} - ignored - named)


def _patterns(entries: Iterable[str]) -> list[str]:
    return [entry.removeprefix(_REGEX) for entry in entries if entry.startswith(_REGEX)]
