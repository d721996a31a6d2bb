"""A weight into the layout that the plan chose; into the next best one where that cannot be made here.

Whether a provider's compiler works, and whether a weight's own values fit a kernel's arithmetic, is known when the
weight is read. Such a kernel is then out of the choice for this model, which is said once; a kernel that was asked for
by name (--kernel) fails with its own error instead.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import torch

from anybit.errors import DeviceProblem, Unsupported
from anybit.kernels.catalogue import Stored, implementation
from anybit.kernels.request import Request
from anybit.planning.choose import Choice, Policy, choose
from anybit.platforms import Platform
from anybit.weights import Weight

__all__ = ["Preparing"]


_Failed = dict[tuple[str, str], str]  # (kernel, printed scheme) -> what was wrong


@dataclass
class Preparing:
    """Prepares weights as they were chosen; remembers which kernels the device cannot make for which schemes.

    is_named  a kernel was asked for by name
    """

    platform: Platform
    policy: Policy
    dtype: torch.dtype
    is_named: bool = False
    _failed: _Failed = field(default_factory=dict)

    def __call__(self, choice: Choice, weight: Weight, asked: Request) -> tuple[Stored, Choice]:
        """The weight, on its device, as `choice` stores it, or the choice after it; `asked` is what it was made for."""
        failed = dict(self._failed)
        if failed.keys() & _named(choice, asked):
            choice = self._following(asked, failed) or choice
        while True:
            try:
                return prepared(choice, weight, self.dtype, self.policy), choice
            except (DeviceProblem, Unsupported) as problem:
                found = dict.fromkeys(_named(choice, asked), problem.problem)
                failed |= found
                following = None if self.is_named else self._following(asked, failed)
                if following is None:
                    raise
                if isinstance(problem, DeviceProblem):  # holds for every layer of the scheme, a weight's values do not
                    self._failed |= found
                warnings.warn(f"{choice.spec.name} is left out for {asked.scheme}: {problem.problem} "
                              f"({problem.found})", stacklevel=3)
                choice = following

    def _following(self, asked: Request, failed: _Failed) -> Choice | None:
        """The choice without what failed, under the same policy."""
        policy = replace(self.policy, disproved={**self.policy.disproved, **failed})
        found = choose(asked, self.platform, policy=policy)
        return found if isinstance(found, Choice) else None


def prepared(choice: Choice, weight: Weight, dtype: torch.dtype, policy: Policy) -> Stored:
    """The weight, on its device, in the layout of `choice`; raises what its kernels cannot do."""
    prepare = implementation(choice.spec).prepare
    if policy.batch_invariant:
        return prepare(weight, dtype, choice.names, pinned=True)
    return prepare(weight, dtype, choice.names)


def _named(choice: Choice, asked: Request) -> set[tuple[str, str]]:
    return {(name, str(asked.scheme)) for name in choice.names.used}
