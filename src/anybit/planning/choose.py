"""The one chooser: for every distinct layer, the layout and the kernels of least time.

A layer has one stored layout; its kernels for all numbers of tokens read it. So the choice is among layouts: the sum of
their best kernels' times over the regimes, weighted by how a chat uses them. Within the layout each bucket of M takes
its own kernel. A time is measured where a measurement of this very product is at hand, interpolated where the kernel
was measured on other shapes of the scheme (`interpolate.py`), and modelled otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from anybit.errors import Unsupported
from anybit.kernels.catalogue import KERNELS
from anybit.kernels.request import ANY, BUCKETS, REGIMES, Kernels, KernelSpec, Reason, Regime, Request, regime_of
from anybit.planning.interpolate import Near, Points, nearest, ratio_at
from anybit.planning.invariance import reason_against_invariance
from anybit.platforms import Platform

# calls of each regime for one answer of 200 tokens to a prompt of 512: what the sum of prices stands for
WEIGHTS: Final[Mapping[Regime, float]] = {"decode": 200.0, "small": 1.0, "prefill": 1.0}

MeasuredKey = tuple[str, str, int, int, int]
"""(kernel, printed scheme, N, K, M)."""
# reasons that say a kernel is made for other layers, not that something is wanting
NOT_MEANT: Final = frozenset({"quantized", "unquantized", "kind"})


def _nothing_measured() -> Mapping[MeasuredKey, float]:
    return MappingProxyType({})


def _none_wrong() -> Mapping[tuple[str, str], str]:
    return MappingProxyType({})


def _none_near() -> Mapping[str, tuple[Near, ...]]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Policy:
    """What narrows and informs every choice of a plan, beside the platform.

    strict            only kernels that carry out the declared arithmetic without further rounding
    batch_invariant   one kernel for all M, whose rows do not depend on their batch
    measured          seconds of one call on this machine, or on one like it
    near              kernel -> what was measured of it on any scheme, for schemes that were not
    disproved         (kernel, printed scheme) -> what was wrong when it ran here: such kernels are left out
    """

    strict: bool = False
    batch_invariant: bool = False
    measured: Mapping[MeasuredKey, float] = field(default_factory=_nothing_measured)
    disproved: Mapping[tuple[str, str], str] = field(default_factory=_none_wrong)
    near: Mapping[str, tuple[Near, ...]] = field(default_factory=_none_near)

    @cached_property
    def points(self) -> Mapping[tuple[str, str], Points]:
        """`measured` by (kernel, printed scheme)."""
        found: dict[tuple[str, str], Points] = {}
        for (kernel, scheme, n, k, tokens), seconds in self.measured.items():
            found.setdefault((kernel, scheme), {}).setdefault((n, k), {})[tokens] = seconds
        return found


Source = Literal["measured", "interpolated", "modelled"]


@dataclass(frozen=True)
class Price:
    """Seconds of one call: measured, interpolated from measurements, or modelled from bytes and operations."""

    seconds: float
    source: Source = "modelled"

    @property
    def is_measured(self) -> bool:
        """True if this very product was timed."""
        return self.source == "measured"


class Chosen(NamedTuple):
    """A kernel and its price in a regime."""

    spec: KernelSpec
    price: Price


@dataclass(frozen=True)
class Refusal:
    """A kernel that was not chosen because it cannot run the request."""

    kernel: str
    regime: Regime
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Better:
    """A kernel that would be faster, and what stands against it.

    times   how many times faster, over the regimes named
    """

    kernel: str
    regimes: tuple[Regime, ...]
    times: float
    needs: tuple[Reason, ...]


@dataclass(frozen=True)
class Choice:
    """Layout and kernels of one request, with every refusal.

    kernels   regime -> kernel and price at the M that stands for it
    slower    layouts that could run it but are dearer: name -> seconds over the weighted regimes
    better    kernels that would be faster but for reasons that could be removed
    buckets   (largest M, kernel and price), ascending: what runs
    """

    layout: str
    kernels: Mapping[Regime, Chosen]
    refused: tuple[Refusal, ...] = ()
    slower: Mapping[str, float] = field(default_factory=dict)
    better: tuple[Better, ...] = ()
    buckets: tuple[tuple[int, Chosen], ...] = ()

    @property
    def spec(self) -> KernelSpec:
        """The kernel of a decode step, whose implementation stores the weight."""
        return self.kernels["decode"].spec

    @property
    def names(self) -> Kernels:
        """Names of the kernels by M: what an implementation is prepared for."""
        return Kernels((most, chosen.spec.name) for most, chosen in self.buckets)

    def at(self, tokens: int) -> Chosen:
        """Kernel and price of a call with M tokens; the price is that of its bucket."""
        return next(chosen for most, chosen in self.buckets if tokens <= most)


Able = dict[int, list[Chosen]]
"""M at which a bucket is priced -> the kernels that can run it."""
Layouts = dict[str, dict[int, Chosen]]
"""Layout -> M at which a bucket is priced -> its kernel there."""


def regimes_of(request: Request) -> tuple[Regime, ...]:
    """The regimes that matter for the kind of layer: a lookup has one."""
    return ("decode",) if request.kind == "embedding" else tuple(REGIMES)


def buckets_of(request: Request) -> tuple[tuple[int, int], ...]:
    """(largest M, M at which it is priced) for the kind of layer: a lookup has one."""
    return ((ANY, REGIMES["decode"][1]),) if request.kind == "embedding" else BUCKETS


def choose(
    request: Request,
    platform: Platform,
    override: str | None = None,
    policy: Policy | None = None,
    pinned: Kernels | None = None,
) -> Choice | tuple[Refusal, ...]:
    """The choice for a layer, or all refusals where no layout covers its regimes.

    override  a kernel that must be used for every M that it can run; the others take the cheapest of its layout.
              Raises Unsupported with the kernel's own reasons where it can run none.
    pinned    exactly these kernels, of a plan that was made before; refusals where one cannot run
    """
    policy = policy or Policy()
    refused: list[Refusal] = []
    able: Able = {}
    for _, priced in buckets_of(request):
        asked = request.of(priced)
        able[priced] = []
        for spec in KERNELS:
            reasons = tuple(reasons_against(spec, asked, platform, policy))
            if not reasons:
                able[priced].append(Chosen(spec, price_of(spec, asked, platform, policy)))
            elif priced == REGIMES[asked.regime][1]:  # one refusal stands for the regime
                refused.append(Refusal(spec.name, asked.regime, reasons))
    if pinned is not None:
        able = {priced: [c for c in found if pinned.steps and c.spec.name == pinned.at(priced)]
                for priced, found in able.items()}
    if override is not None:
        able = _with_override(able, override, refused)
    complete = _one_kernel_each(able) if policy.batch_invariant else _cheapest(able)
    in_order = tuple(sorted(refused, key=lambda r: [k.name for k in KERNELS].index(r.kernel)))
    if not complete:
        return in_order
    total = {layout: _total(found) for layout, found in complete.items()}
    layout = min(total, key=lambda name: total[name])
    slower = {name: seconds for name, seconds in total.items() if name != layout}
    by_regime = _by_regime(complete[layout])
    better = tuple(_better(request, platform, policy, by_regime, in_order))
    buckets = tuple((most, complete[layout][priced]) for most, priced in buckets_of(request))
    return Choice(layout, by_regime, in_order, slower, better, buckets)


def reasons_against(spec: KernelSpec, asked: Request, platform: Platform, policy: Policy) -> Iterator[Reason]:
    """Everything that keeps a kernel from the request: its own reasons, then those of the policy."""
    own = spec.can_implement(asked, platform).reasons
    if policy.batch_invariant and spec.is_batch_invariant:  # such a kernel takes any M; it is only not the fastest
        own = tuple(reason for reason in own if reason.code != "regime")
    yield from own
    if not own and policy.strict:
        yield from _strict_reasons(spec, asked, platform)
    if policy.batch_invariant:  # lookup tables too: a tied head multiplies by them
        yield from reason_against_invariance(spec, asked.scheme)
    wrong = policy.disproved.get((spec.name, str(asked.scheme)))
    if wrong is not None:
        yield Reason("disproved", f"was wrong when it was tried on this machine: {wrong}", {"found": wrong})


def changes_of(spec: KernelSpec, asked: Request, platform: Platform) -> Iterator[str]:
    """What a kernel does otherwise than the checkpoint declares, in words."""
    if asked.scheme.activation is not None and spec.executes(asked, platform) == "weight-only":
        yield f"activations are not quantized ({asked.scheme.activation} declared)"
    rounds = spec.rounds(asked, platform)
    if rounds is not None:
        yield f"rounds {rounds}"


def _strict_reasons(spec: KernelSpec, asked: Request, platform: Platform) -> Iterator[Reason]:
    for change in changes_of(spec, asked, platform):
        yield Reason("strict", f"changes the declared arithmetic: {change}", {"change": change})


def price_of(spec: KernelSpec, asked: Request, platform: Platform, policy: Policy) -> Price:
    """Measured if a measurement of this product by this kernel is at hand, else interpolated, else modelled."""
    shape, tokens = asked.shape[-2:], asked.tokens
    points = policy.points.get((spec.name, str(asked.scheme)))
    seconds = None if points is None else points.get((shape[0], shape[1]), {}).get(tokens)
    if seconds is not None:
        return Price(seconds, "measured")
    like = None if points is not None else nearest(policy.near.get(spec.name, ()), asked.scheme, asked.dtype)
    modelled = spec.seconds(asked, platform)
    if points is None and like is None:
        return Price(modelled)
    known = asked if like is None else replace(asked, scheme=like.scheme, dtype=like.dtype)

    def model(shape: tuple[int, int], tokens: int) -> float:
        return spec.seconds(replace(known, kind="linear", shape=shape, regime=regime_of(tokens), at=tokens), platform)

    ratio = ratio_at(points or like.points, model, (shape[0], shape[1]), tokens)  # type: ignore[union-attr]
    return Price(modelled * ratio, "interpolated")


def demand_known(kernel: str) -> None:
    """Raise Unsupported, with the list of names, for a kernel that does not exist."""
    names = [k.name for k in KERNELS]
    if kernel not in names:
        near = get_close_matches(kernel, names, n=2)
        raise Unsupported(f"no kernel is called {kernel!r}", found=kernel, wanted="one of: " + ", ".join(names),
                          remedy=f"perhaps {' or '.join(near)}" if near else "`anybit explain MODEL` shows why not")


_TIE: Final = 1.02  # two measurements of one kernel differ by as much


def _cheapest(able: Able) -> Layouts:
    """Layout -> its cheapest kernel in every bucket, for the layouts that cover all.

    The kernel of the bucket before goes on where none is faster beyond a tie, so that noise makes no steps.
    """
    made: Layouts = {}
    for priced, found in able.items():
        for chosen in found:
            best = made.setdefault(chosen.spec.layout, {}).get(priced)
            if best is None or chosen.price.seconds < best.price.seconds:
                made[chosen.spec.layout][priced] = chosen
        for chosen_here in made.values():
            if priced in chosen_here:
                chosen_here[priced] = _going_on(chosen_here, priced, found)
    return {layout: found for layout, found in made.items() if set(found) == set(able)}


def _going_on(chosen: Mapping[int, Chosen], priced: int, found: list[Chosen]) -> Chosen:
    """The cheapest kernel of a bucket, or that of the bucket before where they tie."""
    least = chosen[priced]
    before = [c.spec for m, c in chosen.items() if m < priced][-1:]
    ties = (c for c in found if c.spec in before and c.price.seconds <= _TIE * least.price.seconds)
    return next(ties, least)


def _one_kernel_each(able: Able) -> Layouts:
    """Layout -> the one kernel of least time that runs every bucket."""
    made: Layouts = {}
    for name in dict.fromkeys(chosen.spec.name for found in able.values() for chosen in found):
        same = {priced: c for priced, found in able.items() for c in found if c.spec.name == name}
        if set(same) != set(able):
            continue
        layout = next(iter(same.values())).spec.layout
        if layout not in made or _total(same) < _total(made[layout]):
            made[layout] = same
    return made


def _by_regime(found: Mapping[int, Chosen]) -> dict[Regime, Chosen]:
    """The kernels at the M that stand for the regimes."""
    return {regime: found[priced] for regime, (_, priced) in REGIMES.items() if priced in found}


def _total(found: Mapping[int, Chosen]) -> float:
    return sum(WEIGHTS[regime] * chosen.price.seconds for regime, chosen in _by_regime(found).items())


def _with_override(able: Able, override: str, refused: list[Refusal]) -> Able:
    """`able` narrowed to the kernel where it can run, and to its layout elsewhere."""
    demand_known(override)
    spec = next(k for k in KERNELS if k.name == override)
    narrowed = {}
    for priced, found in able.items():
        same_layout = [chosen for chosen in found if chosen.spec.layout == spec.layout]
        narrowed[priced] = [chosen for chosen in same_layout if chosen.spec is spec] or same_layout
    runs = any(chosen.spec is spec for found in narrowed.values() for chosen in found)
    if not runs or not all(narrowed.values()):
        reasons = [f"{r.regime}: {reason.text}" for r in refused if r.kernel == override for reason in r.reasons]
        raise Unsupported(
            f"kernel {override} cannot run this layer",
            found="; ".join(dict.fromkeys(reasons)) or "no kernel of its layout covers the other regimes",
            wanted="a kernel without refusals",
            remedy="leave --kernel out, or see `anybit explain`",
        )
    return narrowed


# --- what would be faster ---------------------------------------------------------------------------------------------

# codes of reasons that a user can remove for this checkpoint on this chip: an installation or an option
_REMOVABLE: Final = frozenset({"provider", "dtype", "strict", "batch-invariant"})
_WORTH_NAMING: Final = 1.05  # a kernel less than 5 % faster is not better


def _better(
    request: Request, platform: Platform, policy: Policy, chosen: Mapping[Regime, Chosen], refused: tuple[Refusal, ...]
) -> Iterator[Better]:
    """Kernels whose modelled time would be less, with the reasons that would have to go."""
    specs = {k.name: k for k in KERNELS}
    by_kernel: dict[tuple[str, tuple[Reason, ...]], list[tuple[Regime, float]]] = {}
    for refusal in refused:
        if not _REMOVABLE.issuperset(reason.code for reason in refusal.reasons):
            continue
        spec, asked = specs[refusal.kernel], replace(request, regime=refusal.regime)
        then = price_of(spec, asked, platform, policy).seconds
        times = chosen[refusal.regime].price.seconds / then if then > 0 else 0.0
        if times >= _WORTH_NAMING:
            by_kernel.setdefault((refusal.kernel, refusal.reasons), []).append((refusal.regime, times))
    for (kernel, reasons), found in by_kernel.items():
        yield Better(kernel, tuple(regime for regime, _ in found), max(times for _, times in found), reasons)
