"""How far a plan's choice is from the best that was measured: within its layout, and against all layouts. Torch-free.

A layer has one stored layout, so a kernel of another layout may be the fastest at some M and still not be the better
choice; within the layout the chosen kernel should be the best for every M, but for the noise of measuring.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from anybit.kernels.catalogue import KERNELS
from anybit.kernels.request import Request
from anybit.planning.choose import Choice, Policy, choose
from anybit.platforms import Platform

ALLOWED: Final = 0.05  # within a layout: what two measurements of one kernel may differ by

Times = Mapping[int, Mapping[str, float]]
"""M -> kernel -> measured seconds of one layer."""


@dataclass(frozen=True)
class Regret:
    """One layer at one M: the kernel that a plan runs, and the best that were measured.

    chosen   kernel and seconds; seconds are None where it was not measured
    best     of the layout
    other    of the other layouts; None where there is none
    """

    request: Request
    layout: str
    chosen: tuple[str, float | None]
    best: tuple[str, float]
    other: tuple[str, float] | None

    @property
    def within(self) -> float | None:
        """Share of time lost to the best kernel of the layout; None where the chosen one was not measured."""
        seconds = self.chosen[1]
        return None if seconds is None else seconds / self.best[1] - 1.0

    @property
    def against_others(self) -> float | None:
        """Share of time lost to the best kernel of another layout; below 0 where the chosen one is faster."""
        seconds = self.chosen[1]
        return None if seconds is None or self.other is None else seconds / self.other[1] - 1.0

    @property
    def is_allowed(self) -> bool:
        """True if the chosen kernel is as fast as the best of its layout, within the noise of measuring."""
        return self.within is not None and self.within <= ALLOWED

    def to_dict(self) -> dict[str, Any]:
        """The regret as data."""
        n, k = self.request.shape
        return {
            "scheme": str(self.request.scheme), "shape": [n, k], "dtype": self.request.dtype,
            "tokens": self.request.tokens, "layout": self.layout,
            "chosen": {"kernel": self.chosen[0], "seconds": self.chosen[1]},
            "best_of_layout": {"kernel": self.best[0], "seconds": self.best[1]}, "regret": self.within,
            "best_of_others": None if self.other is None else {"kernel": self.other[0], "seconds": self.other[1]},
            "regret_against_others": self.against_others,
        }


def regrets(request: Request, platform: Platform, policy: Policy, times: Times) -> Iterator[Regret]:
    """The regret of a plan's choice for a layer at every M at which some kernel of its layout was measured."""
    choice = choose(request, platform, policy=policy)
    if not isinstance(choice, Choice):
        return
    layouts = {spec.name: spec.layout for spec in KERNELS}
    for tokens, seconds in sorted(times.items()):
        own = {name: s for name, s in seconds.items() if layouts.get(name) == choice.layout}
        others = {name: s for name, s in seconds.items() if layouts.get(name) != choice.layout}
        if own:
            chosen = choice.at(tokens).spec.name
            yield Regret(request.of(tokens), choice.layout, (chosen, own.get(chosen)), _least(own),
                         _least(others) if others else None)


def _least(seconds: Mapping[str, float]) -> tuple[str, float]:
    return min(seconds.items(), key=lambda item: item[1])


def worst(found: Iterable[Regret]) -> float:
    """The largest regret within a layout; 0.0 where nothing was measured."""
    return max((regret.within for regret in found if regret.within is not None), default=0.0)
