"""Launches of Triton kernels past Triton's own launcher, which costs the host about 25 us a launch.

Triton binds the arguments of every call, works out what the kernel is specialized on (dtypes, addresses and integers
that are multiples of 16, integers equal to 1), makes a key of it and looks the compiled kernel up. Here all that does
not change between calls is bound once, in a `Launch`; the first call goes Triton's way, which gives the compiled
kernel; later ones only put the addresses in. Whatever does not fit what was compiled (an unaligned tensor, another
dtype, a storage beyond 2 GiB on AMD), an installed launch hook (profilers), the interpreter, and a Triton that we have
not read goes Triton's way again: slower, never wrong. How the compiled kernel is called: `straight.py`.

A `Call` is a product as it is launched for one number of rows: the quantizer of its input, the product, what ends it.
Launches go to the device of their tensors, on its current stream. Zeros for the programs of split products: `zeros.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from anybit.kernels.triton.devices import on_device
from anybit.kernels.triton.straight import READ, straight, version
from anybit.kernels.triton.zeros import zeros_for

__all__ = [
    "ALIGNED", "Call", "Described", "Given", "Launch", "Piece", "Quantizing", "Zeros", "described", "launch",
    "remember", "stream_of",
]

ALIGNED: Final = 128  # bytes: where pieces of a scratch begin; more than any access wants
_MOST_CALLS: Final = 64  # that a weight remembers: a few kilobytes each, of hundreds of weights
_LARGEST: Final = 2**31 - 1  # bytes of a storage within which AMD's kernels address by 32 bits
_LAUNCHED: Final = ("cuda",)  # devices with streams; ROCm's are called so too
_IS_HIP: Final = torch.version.hip is not None
# absent in a torch without GPUs
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Piece(NamedTuple):
    """A part of the call's scratch, from a byte on (a multiple of ALIGNED), as a tensor of some dtype."""

    offset: int
    dtype: torch.dtype


class Described(NamedTuple):
    """A piece given as a tensor descriptor: its shape, the block that one access takes, and for Gluon its layout."""

    piece: Piece
    shape: tuple[int, int]
    block: tuple[int, int]
    layout: Any = None


class Given(NamedTuple):
    """Rows [.., columns] of this dtype that a call brings, given as a tensor descriptor [rows, columns] of Gluon."""

    dtype: torch.dtype
    block: tuple[int, int]
    layout: Any


class Zeros(NamedTuple):
    """So many int32, zero at the start, which the kernel leaves zero; `kept` holds those that graphs were given."""

    needed: int
    kept: list[Tensor]


# an argument that stays (a tensor, a number, a tensor descriptor), or what a call brings: a tensor of this dtype (given
# in the kernel's order), an integer that the kernel is not specialized on (`int` itself), a part of the scratch, zeros
Argument = Tensor | float | torch.dtype | type[int] | Piece | Described | Given | Zeros | Any


class _Past(NamedTuple):
    """A launch past Triton's launcher: what is called, with which arguments, and where what changes goes."""

    run: Callable[..., object]
    arguments: list[Any]
    tensors: list[tuple[int, torch.dtype, Callable[[int], object] | None]]
    pieces: list[tuple[int, int]]
    described: list[tuple[int, int, Callable[[int], object]]]
    counted: int | None
    zeros: tuple[int, int, list[Tensor]] | None


class Launch:
    """A kernel with its constants, its options, and the arguments that no call changes.

    A Launch is one specialization: integers are fixed in it, but for one that the kernel does not specialize on.
    """

    __slots__ = ("_arguments", "_compiled", "_constants", "_device", "_kernel", "_options", "_past")

    def __init__(
        self, kernel: Any, arguments: Sequence[Argument], constants: Mapping[str, object], device: torch.device,
        **options: object,
    ) -> None:  # fmt: skip
        """`arguments` in the kernel's order, then `constants` by name; `options` as Triton's launcher takes them."""
        self._kernel, self._constants, self._options, self._device = kernel, constants, options, device
        self._arguments = list(arguments)
        self._compiled: Any = None  # kept, since Triton 3.9 unloads a kernel that nobody keeps
        self._past: _Past | None = None

    def __call__(
        self, x: int, y: int, stream: int | None, scratch: Tensor | None, tensors: Sequence[Tensor], count: int = 0
    ) -> None:
        """Launch x by y programs on the current device; `tensors` and `count` are what the call brings.

        stream  what `stream_of` said: the current one, or None for Triton's own way
        """
        past = self._past
        if stream is None or past is None:
            return self._by_triton(x, y, scratch, tensors, count)
        run, arguments, places, pieces, described, count_at, zeros = past
        arguments = arguments.copy()
        arguments[0], arguments[1], arguments[3] = x, y, stream
        for (place, dtype, describe_it), tensor in zip(places, tensors, strict=True):
            address = tensor.data_ptr()
            if address & 15 or tensor.dtype is not dtype or (_IS_HIP and _is_large(tensor)):
                return self._by_triton(x, y, scratch, tensors, count)
            arguments[place] = address if describe_it is None else describe_it(address)
        if scratch is not None:
            base = scratch.data_ptr()
            if base & 15 or (_IS_HIP and _is_large(scratch)):
                return self._by_triton(x, y, scratch, tensors, count)
            for place, offset in pieces:
                arguments[place] = base + offset
            for place, offset, describe in described:
                arguments[place] = describe(base + offset)
        if count_at is not None:
            arguments[count_at] = count
        if zeros is not None:
            place, needed, kept = zeros
            held = zeros_for(self._device, stream, needed, kept)
            arguments[place] = held.data_ptr()
        run(*arguments)
        return None

    def _by_triton(self, x: int, y: int, scratch: Tensor | None, tensors: Sequence[Tensor], count: int) -> None:
        """Triton's own way; where nothing is out of the ordinary, later calls go past it to what it compiled."""
        arguments, brought = list(self._arguments), iter(tensors)
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.dtype):
                arguments[place] = next(brought)
            elif isinstance(argument, Given):
                arguments[place] = described(next(brought).flatten(0, -2), argument.block, argument.layout)
            elif argument is int:
                arguments[place] = count
            elif isinstance(argument, Piece):
                arguments[place] = _piece(scratch, argument)
            elif isinstance(argument, Described):
                arguments[place] = _described(scratch, argument)
            elif isinstance(argument, Zeros):
                arguments[place] = self._zeros_of(argument)
        if self._past is None and "launch_pdl" in self._options and self._device.type == "cuda":
            self._see_weights()
        found = self._kernel[(x, y)](*arguments, **self._constants, **self._options)
        if self._past is None and _may_pass(self._device, self._kernel) and self._is_usual(scratch, tensors):
            self._compiled, self._past = found, self._taken(found, arguments)

    def _see_weights(self) -> None:
        """Wait for what was queued before a first launch: it may write the weight, read without a wait."""
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._device).synchronize()

    def _zeros_of(self, wanted: Zeros) -> Tensor:
        if self._device.type not in _LAUNCHED:  # the interpreter
            return torch.zeros(wanted.needed, dtype=torch.int32, device=self._device)
        return zeros_for(self._device, _current_stream(self._device.index), *wanted)

    def _is_usual(self, scratch: Tensor | None, tensors: Sequence[Tensor]) -> bool:
        """True where this call was specialized on what `__call__` demands of later ones."""
        dtypes = [_dtype_of(argument) for argument in self._arguments if isinstance(argument, (torch.dtype, Given))]
        kept = [argument for argument in self._arguments if isinstance(argument, Tensor)]
        every = [*tensors, *([] if scratch is None else [scratch])]
        return (
            all(t.dtype is d for t, d in zip(tensors, dtypes, strict=True))
            and not any(t.data_ptr() & 15 for t in every)
            and not (_IS_HIP and any(_is_large(t) for t in every))
            and all(t.device == self._device for t in [*every, *kept])
        )  # fmt: skip

    def _taken(self, found: Any, arguments: list[Any]) -> _Past | None:
        """How later calls go past the launcher: tensors that stay become addresses."""
        given: list[Any] = self._arguments
        every = [*arguments, *(self._constants[name] for name in self._kernel.arg_names[len(arguments) :])]
        moving = {i: every[i] for i, a in enumerate(given) if isinstance(a, (Described, Given))}
        made = straight(found, [a.data_ptr() if isinstance(a, Tensor) else a for a in every], moving)
        if made is None:
            return None
        at = made.places
        for i, argument in enumerate(given):
            if isinstance(argument, (torch.dtype, Piece, Zeros)):
                made.arguments[at[i]] = None  # nothing of this call stays
        return _Past(
            made.run, made.arguments,
            [(at[i], _dtype_of(a), made.describes.get(i)) for i, a in enumerate(given)
             if isinstance(a, (torch.dtype, Given))],
            [(at[i], a.offset) for i, a in enumerate(given) if isinstance(a, Piece)],
            [(at[i], given[i].piece.offset, describe) for i, describe in made.describes.items()
             if isinstance(given[i], Described)],
            next((at[i] for i, a in enumerate(given) if a is int), None),
            next(((at[i], *a) for i, a in enumerate(given) if isinstance(a, Zeros)), None),
        )  # fmt: skip


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Tensor | float | None], device: torch.device,
    **options: object,
) -> None:  # fmt: skip
    """One launch of a kernel that is launched seldom: Triton's way, on the device."""
    with on_device(device):
        kernel[grid](*arguments, **options)


# --- what Triton and the device are at the moment ---------------------------------------------------------------------


@cache
def _hooks() -> tuple[Any, Any, Any] | None:
    """Triton's settings and its launch hooks; None for a version that we have not read, and in the interpreter."""
    if version() not in READ:
        return None
    from triton import knobs

    runtime = knobs.runtime
    return None if runtime.interpret else (runtime, runtime.launch_enter_hook, runtime.launch_exit_hook)


def stream_of(index: int | None) -> int | None:
    """The current stream of a device, or None where launches go Triton's way: somebody wants to know of them."""
    hooks = None if index is None else _hooks()
    if hooks is None:
        return None
    runtime, enter, leave = hooks
    if runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave or enter.calls or leave.calls:
        return None
    stream: int = _current_stream(index)
    return stream


def _may_pass(device: torch.device, kernel: Any) -> bool:
    return device.type in _LAUNCHED and _hooks() is not None and not kernel.pre_run_hooks


def _dtype_of(brought: torch.dtype | Given) -> torch.dtype:
    return brought.dtype if isinstance(brought, Given) else brought


def _is_large(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > _LARGEST


# --- parts of a scratch -----------------------------------------------------------------------------------------------


def _piece(scratch: Tensor | None, piece: Piece) -> Tensor:
    assert scratch is not None
    return scratch[piece.offset :].view(piece.dtype)


def _described(scratch: Tensor | None, argument: Described) -> Any:
    rows, columns = argument.shape
    tensor = _piece(scratch, argument.piece)[: rows * columns].view(rows, columns)
    return described(tensor, argument.block, argument.layout)


def described(tensor: Tensor, block: tuple[int, ...], layout: Any = None) -> Any:
    """A tensor (of a product, [rows, columns]) as a tensor descriptor; with a layout of its tiles as one of Gluon."""
    if layout is not None:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor.from_tensor(tensor, list(block), layout)
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))


# --- calls ------------------------------------------------------------------------------------------------------------


class Quantizing(Protocol):
    """What quantizes the rows of a call into its scratch."""

    def __call__(self, stream: int | None, scratch: Tensor, x: Tensor) -> None:
        """Codes and scales of x [M, K] at their places."""


@dataclass(slots=True)
class Call:
    """A product as it is launched for one number of rows.

    shape, dtype   of the result: [M, N], or [.., N] for M rows in all
    scratch_bytes  of what lives during the call: codes of x and their scales, parts of split sums
    quantize       of x into the scratch; None: the product takes x itself
    product        the launch, `grid` programs; it is brought (x, (factors of its rows)), (bias), out and M
    finish         a launch that adds split sums where the product does not: it is brought (bias), out and M
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rows: int
    scratch_bytes: int
    quantize: Quantizing | None
    product: Launch
    grid: tuple[int, int]
    finish: Launch | None = None
    finish_grid: tuple[int, int] = (1, 1)

    def __call__(self, x: Tensor, bias: Tensor | None, factors: Tensor | None = None) -> Tensor:
        """x [M, K] (columns side by side) times the weight: a new [M, N]."""
        device = self.device
        index = device.index
        if index is not None and index != _current_device():
            with on_device(device):
                return self(x, bias, factors)
        stream = stream_of(index)
        # new_empty: a microsecond less than empty
        out = x.new_empty(self.shape, dtype=self.dtype)
        scratch = x.new_empty(self.scratch_bytes, dtype=torch.uint8) if self.scratch_bytes else None
        tensors = (out,) if bias is None else (bias, out)
        x_programs, y_programs = self.grid
        if self.quantize is not None:
            assert scratch is not None
            self.quantize(stream, scratch, x)
            self.product(x_programs, y_programs, stream, scratch, tensors, self.rows)
        elif factors is None:
            self.product(x_programs, y_programs, stream, scratch, (x, *tensors), self.rows)
        else:
            self.product(x_programs, y_programs, stream, scratch, (x, factors, *tensors), self.rows)
        if self.finish is not None:
            self.finish(*self.finish_grid, stream, scratch, tensors, self.rows)
        return out

    def of_made(self, scratch: Tensor, bias: Tensor | None) -> Tensor:
        """The product of rows that another kernel quantized into a scratch, as `quantize` would have."""
        stream = stream_of(self.device.index)
        out = scratch.new_empty(self.shape, dtype=self.dtype)
        tensors = (out,) if bias is None else (bias, out)
        self.product(*self.grid, stream, scratch, tensors, self.rows)
        if self.finish is not None:
            self.finish(*self.finish_grid, stream, scratch, tensors, self.rows)
        return out


def remember(calls: dict[Any, Any], key: Any, made: Any) -> Any:
    """Keep what was made for a key, and forget the oldest where there are many (prompts of every length)."""
    if len(calls) >= _MOST_CALLS:
        calls.pop(next(iter(calls)), None)
    calls[key] = made
    return made
