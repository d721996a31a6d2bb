"""What a kernel is asked, and what it answers. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from anybit.kernels.compiling import CompileCase
from anybit.platforms import Platform
from anybit.schemes import LayerKind, Scheme

Regime = Literal["decode", "small", "prefill"]
# regime -> (largest M it covers, M at which it is priced)
REGIMES: Final[dict[Regime, tuple[int, int]]] = {"decode": (8, 1), "small": (64, 16), "prefill": (2**31 - 1, 512)}


def regime_of(tokens: int) -> Regime:
    """The regime of a call with M tokens."""
    if tokens <= _FEW:  # this is asked at every call of a layer
        return "decode"
    return "small" if tokens <= _SOME else "prefill"


_FEW, _SOME = REGIMES["decode"][0], REGIMES["small"][0]
ANY: Final = 2**31 - 1
# (largest M, M at which it is priced): a kernel is chosen for each. Every regime is priced at one of them and ends with
# one. Decode is not divided: hosts hand a step of so few tokens straight to the kernel. The steps between 64 and 256
# are finer since there lies the turn from decoding in registers to writing weights out.
BUCKETS: Final = ((8, 1), (16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (512, 512),
                  (1024, 1024), (ANY, 4096))
assert {most for most, _ in REGIMES.values()} <= {most for most, _ in BUCKETS}
assert {priced for _, priced in REGIMES.values()} <= {priced for _, priced in BUCKETS}


def priced_at(tokens: int) -> int:
    """The M at which calls of so many tokens are priced."""
    return next(priced for most, priced in BUCKETS if tokens <= most)


class Kernels(Mapping[Regime, str]):
    """The kernels of one layer by number of tokens, as the plan chose them; as a mapping, those of the regimes.

    steps  (largest M, kernel), ascending; equal neighbours are one step

    >>> Kernels([(64, "fused"), (128, "fused"), (ANY, "expand")]).steps
    ((128, 'fused'), (2147483647, 'expand'))
    """

    def __init__(self, steps: Iterable[tuple[int, str]]) -> None:
        """`steps` may have equal neighbours."""
        joined: list[tuple[int, str]] = []
        for most, name in steps:
            if joined and joined[-1][1] == name:
                joined.pop()
            joined.append((most, name))
        self.steps = tuple(joined)

    @classmethod
    def of(cls, kernels: Mapping[Regime, str]) -> Kernels:
        """As given, or of the kernels of regimes."""
        return kernels if isinstance(kernels, Kernels) else cls((REGIMES[r][0], kernels[r]) for r in REGIMES
                                                                if r in kernels)

    @property
    def used(self) -> frozenset[str]:
        """All of them."""
        return frozenset(name for _, name in self.steps)

    def at(self, tokens: int) -> str:
        """The kernel of a call with M tokens."""
        for most, name in self.steps:  # one to three of them; asked at every call, by a compiler too
            if tokens <= most:
                return name
        return self.steps[-1][1]

    def __getitem__(self, regime: Regime) -> str:
        return self.at(REGIMES[regime][1])

    def __iter__(self) -> Iterator[Regime]:
        return iter(REGIMES if self.steps else ())

    def __len__(self) -> int:
        return len(REGIMES) if self.steps else 0

    def __repr__(self) -> str:
        return f"Kernels({self.steps})"


@dataclass(frozen=True)
class Request:
    """One layer in one regime: kind, scheme, shape (N, K) or (E, N, K), dtype of its activations.

    at  M of the call where it is not the one that stands for the regime
    """

    kind: LayerKind
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: str = "float32"
    regime: Regime = "decode"
    at: int | None = None

    @property
    def tokens(self) -> int:
        """M at which the request is priced."""
        return REGIMES[self.regime][1] if self.at is None else self.at

    def of(self, tokens: int) -> Request:
        """The same layer asked for a call with M tokens."""
        return replace(self, regime=regime_of(tokens), at=tokens)

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the product."""
        n, k = self.shape[-2:]
        return 2.0 * self.tokens * n * k


@dataclass(frozen=True)
class Reason:
    """One reason why a kernel cannot run a request: a code, the values, and the sentence made of them."""

    code: str
    text: str
    values: dict[str, Any] = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """The reason as data."""
        return {"code": self.code, "text": self.text, "values": self.values}


@dataclass(frozen=True)
class Verdict:
    """Yes, or all reasons why not."""

    reasons: tuple[Reason, ...] = ()

    @property
    def ok(self) -> bool:
        """True if the kernel can run the request."""
        return not self.reasons


Execution = Literal["native", "exact emulation", "weight-only", "unquantized"]


def emulates(request: Request, platform: Platform) -> Execution:
    """Operands decoded to a wider float in which they are exact, and multiplied there."""
    return "exact emulation" if request.scheme.is_quantized else "unquantized"


def rounds_nothing(request: Request, platform: Platform) -> str | None:
    """No operand is rounded: the result differs from the exact product by accumulation and the output's dtype."""
    return None


def roundings(rounds: str | None) -> int:
    """How many things a kernel says that it rounds: its words, joined by commas and "and", name one each.

    >>> roundings(None), roundings("weights to bfloat16"), roundings("scales, weights and partial sums to bfloat16")
    (0, 1, 3)
    """
    return 0 if rounds is None else len(re.split(", | and ", rounds))


# what a kernel says of sums that a matrix unit keeps to so many bits, whatever the dtypes are
NARROW_ADDER: Final = "the matrix unit's own adder (about 13 bits)"


def assumes_nothing(request: Request) -> str | None:
    """All that the kernel needs is known from headers."""
    return None


@dataclass(frozen=True)
class KernelSpec:
    """A kernel without its code.

    layout          how it stores a weight; kernels of equal layout read the same buffers
    implementation  "module:Class", imported when chosen
    can_implement   (request, platform) -> Verdict with every reason
    seconds         (request, platform) -> modelled time of one call
    stored_bytes    request -> bytes of its layout
    executes        (request, platform) -> how the declared arithmetic is carried out; "native" where the chip's matrix
                    unit takes the declared formats themselves, "weight-only" where declared activation quantization
                    is left out
    rounds          (request, platform) -> what is rounded beyond the declared arithmetic ("weights to bfloat16"), each
                    thing by name (`roundings` counts them), or None; a strict plan leaves such kernels out
    workspace       request -> bytes of scratch that one call needs
    cases           architecture -> what must compile there for the kernel to be claimed (Triton kernels)
    """

    name: str
    layout: str
    implementation: str
    can_implement: Callable[[Request, Platform], Verdict]
    seconds: Callable[[Request, Platform], float]
    stored_bytes: Callable[[Request], int]
    about: str = ""
    executes: Callable[[Request, Platform], Execution] = emulates
    rounds: Callable[[Request, Platform], str | None] = rounds_nothing
    workspace: Callable[[Request], int] = lambda request: 0
    assumes: Callable[[Request], str | None] = assumes_nothing
    is_batch_invariant: bool = False
    cases: Callable[[str], Sequence[CompileCase]] = lambda arch: ()


def gather(*reasons: Reason | None) -> Verdict:
    """A verdict of all the reasons that are not None."""
    return Verdict(tuple(r for r in reasons if r is not None))


def scale_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes of all scales and offsets as the canonical form stores them."""
    from anybit.numerics.formats import number_format

    n, k = shape[-2:]
    stacks = math.prod(shape[:-2])

    def blocks(block: tuple[int, int], placement: str) -> int:
        if placement in ("flat", "strided"):
            return -(-n * k // block[1])
        rows = 1 if block[0] == 0 else -(-n // block[0])
        columns = 1 if block[1] == 0 else -(-k // block[1])
        return rows * columns

    def stored(format: str) -> int:
        return max(1, number_format(format).bits // 8)

    total = sum(blocks(level.block, level.placement) * stored(level.format) for level in scheme.scales)
    if scheme.offset is not None:
        total += blocks(scheme.offset.block, scheme.offset.placement) * stored(scheme.offset.format)
        total += sum(blocks(lv.block, lv.placement) * stored(lv.format) for lv in scheme.offset.levels)
    total += 4 * k * (scheme.act_order + scheme.pre_scale)
    return total * stacks
