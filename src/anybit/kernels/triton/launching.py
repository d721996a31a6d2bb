"""Launches of Triton kernels past Triton's own launcher, which costs the host about 25 us a launch.

Triton binds the arguments of every call, works out what the kernel is specialized on (dtypes, addresses and integers
that are multiples of 16, integers equal to 1), makes a key of it and looks the compiled kernel up. Here all that does
not change between calls is bound once, in a `Launch`; the first call goes Triton's way, which gives the compiled
kernel; later ones only put the addresses in. Whatever does not fit what was compiled (an unaligned tensor, another
dtype, a storage beyond 2 GiB on AMD), an installed launch hook (profilers), the interpreter, and a Triton that we have
not read (`_READ`) goes Triton's way again: slower, never wrong.

A `Call` is a product as it is launched for one number of rows: the quantizer of its input, the product, what ends it.
Launches go to the device of their tensors, on its current stream. Zeros for the programs of split products: `zeros.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from anybit.kernels.triton.devices import on_device
from anybit.kernels.triton.zeros import zeros_for

__all__ = ["ALIGNED", "Call", "Described", "Launch", "Piece", "Quantizing", "Zeros", "launch", "remember"]

# CompiledKernel.run(x, y, z, stream, function, packed_metadata, launch_metadata, enter_hook, exit_hook, *arguments),
# pointers as tensors or as integers: triton/runtime/jit.py, triton/backends/{nvidia,amd}/driver.py of these versions
_READ: Final = ((3, 5), (3, 6), (3, 7), (3, 9))
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
    """A piece given as a tensor descriptor: its shape, and the block that one access takes."""

    piece: Piece
    shape: tuple[int, int]
    block: tuple[int, int]


class Zeros(NamedTuple):
    """So many int32, zero at the start, which the kernel leaves zero; `kept` holds those that graphs were given."""

    needed: int
    kept: list[Tensor]


# an argument that stays (a tensor, a number, a tensor descriptor), or what a call brings: a tensor of this dtype (given
# in the kernel's order), an integer that the kernel is not specialized on (`int` itself), a part of the scratch, zeros
Argument = Tensor | float | torch.dtype | type[int] | Piece | Described | Zeros | Any


class _Compiled(NamedTuple):
    """What a call past the launcher needs: CompiledKernel's run, function, metadata, and the arguments that stay."""

    run: Any
    function: int
    metadata: Any
    arguments: list[Any]
    descriptors: dict[int, Any]


class Launch:
    """A kernel with its constants, its options, and the arguments that no call changes.

    A Launch is one specialization: integers are fixed in it, but for those that the kernel does not specialize on.
    """

    __slots__ = ("_arguments", "_compiled", "_constants", "_device", "_dtypes", "_index", "_kernel", "_options",
                 "_pieces", "_places", "_zeros")  # fmt: skip

    def __init__(
        self, kernel: Any, arguments: Sequence[Argument], constants: Mapping[str, object], device: torch.device,
        **options: object,
    ) -> None:  # fmt: skip
        """`arguments` in the kernel's order, then `constants` by name; `options` as Triton's launcher takes them."""
        self._kernel, self._constants, self._options, self._device = kernel, constants, options, device
        self._index = device.index
        self._arguments = list(arguments)
        brought = [(i, a) for i, a in enumerate(arguments) if isinstance(a, torch.dtype) or a is int]
        self._places = tuple(i for i, _ in brought)
        self._dtypes = tuple(a for _, a in brought)
        self._pieces = tuple((i, a.offset) for i, a in enumerate(arguments) if isinstance(a, Piece))
        self._zeros = tuple((i, a) for i, a in enumerate(arguments) if isinstance(a, Zeros))
        self._compiled: _Compiled | None = None

    def __call__(self, x: int, y: int, scratch: Tensor | None, values: Sequence[Tensor | int]) -> None:
        """Launch x by y programs; `values` are what the call brings, in the kernel's order."""
        compiled = self._compiled
        if compiled is None or _is_hooked():
            return self._by_triton(x, y, scratch, values)
        if _current_device() != self._index:
            with on_device(self._device):
                return self(x, y, scratch, values)
        run, function, metadata, kept, descriptors = compiled
        arguments = kept.copy()
        for place, dtype, value in zip(self._places, self._dtypes, values, strict=True):
            if dtype is not int:
                if value.dtype is not dtype:  # type: ignore[union-attr]
                    return self._by_triton(x, y, scratch, values)
                address = value.data_ptr()  # type: ignore[union-attr]
                if address & 15 or (_IS_HIP and _is_large(value)):
                    return self._by_triton(x, y, scratch, values)
                value = address
            arguments[place] = value
        if scratch is not None:
            base = scratch.data_ptr()
            if base & 15 or (_IS_HIP and _is_large(scratch)):
                return self._by_triton(x, y, scratch, values)
            for place, offset in self._pieces:
                arguments[place] = base + offset
            for place, template in descriptors.items():
                arguments[place] = _moved(template, base)
        stream = _current_stream(self._index)
        held = None
        for place, (count, takers) in self._zeros:
            held = zeros_for(self._device, stream, count, takers)
            arguments[place] = held.data_ptr()
        run(x, y, 1, stream, function, metadata, None, None, None, *arguments)
        return None

    def _by_triton(self, x: int, y: int, scratch: Tensor | None, values: Sequence[Tensor | int]) -> None:
        """Triton's own way; where nothing is out of the ordinary, what it compiled is taken for the next calls."""
        arguments = list(self._arguments)
        for place, value in zip(self._places, values, strict=True):
            arguments[place] = value
        for place, argument in enumerate(arguments):
            if isinstance(argument, Piece):
                arguments[place] = _piece(scratch, argument)
            elif isinstance(argument, Described):
                arguments[place] = _described(scratch, argument)
        if self._device.type not in _LAUNCHED:  # the interpreter
            for place, (count, _) in self._zeros:
                arguments[place] = torch.zeros(count, dtype=torch.int32, device=self._device)
            self._kernel[(x, y)](*arguments, **self._constants, **self._options)
            return
        with on_device(self._device):
            for place, (count, takers) in self._zeros:
                arguments[place] = zeros_for(self._device, _current_stream(self._index), count, takers)
            found = self._kernel[(x, y)](*arguments, **self._constants, **self._options)
        if self._compiled is None and _may_pass() and self._is_usual(scratch, values):
            self._compiled = self._taken(found, arguments)

    def _is_usual(self, scratch: Tensor | None, values: Sequence[Tensor | int]) -> bool:
        """True where this call was specialized on what `__call__` demands of later ones."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        dtypes = [dtype for dtype in self._dtypes if dtype is not int]
        kept = [a for a in self._arguments if isinstance(a, Tensor)]
        every = [*tensors, *([] if scratch is None else [scratch])]
        return (
            len(tensors) == len(dtypes) and all(t.dtype is d for t, d in zip(tensors, dtypes, strict=True))
            and not any(t.data_ptr() & 15 for t in every)
            and not (_IS_HIP and any(_is_large(t) for t in every))
            and all(t.device == self._device for t in [*every, *kept])
        )  # fmt: skip

    def _taken(self, found: Any, arguments: list[Any]) -> _Compiled | None:
        """What later calls need of a CompiledKernel: tensors that stay become addresses."""
        known = all(hasattr(found, name) for name in ("run", "function", "packed_metadata"))
        if not known or self._kernel.pre_run_hooks:
            return None
        names = self._kernel.arg_names
        every = [*arguments, *(self._constants[name] for name in names[len(arguments) :])]
        described = {i: a for i, a in enumerate(self._arguments) if isinstance(a, Described)}
        addresses = [a.data_ptr() if isinstance(a, Tensor) else None if i in described else a
                     for i, a in enumerate(every)]  # fmt: skip
        templates = {i: _Template(every[i], a.piece.offset) for i, a in described.items()}
        return _Compiled(found.run, found.function, found.packed_metadata, addresses, templates)


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Tensor | float | None], device: torch.device,
    **options: object,
) -> None:  # fmt: skip
    """One launch of a kernel that is launched seldom: Triton's way, on the device."""
    with on_device(device):
        kernel[grid](*arguments, **options)


# --- what Triton is -------------------------------------------------------------------------------------------------


@cache
def _may_pass() -> bool:
    """True for a version whose launcher is known to be called as it is called here, not interpreting."""
    import triton
    from triton import knobs

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version in _READ and not knobs.runtime.interpret


@cache
def _hooks() -> tuple[Any, Any, Any]:
    from triton import knobs

    return knobs.runtime, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook


def _is_hooked() -> bool:
    """True where somebody wants to know of launches."""
    runtime, enter, leave = _hooks()
    return bool(
        runtime.launch_enter_hook is not enter or runtime.launch_exit_hook is not leave or enter.calls or leave.calls
    )


def _is_large(tensor: Any) -> bool:
    return bool(tensor.untyped_storage().nbytes() > _LARGEST)


# --- parts of a scratch ---------------------------------------------------------------------------------------------


def _piece(scratch: Tensor | None, piece: Piece) -> Tensor:
    assert scratch is not None
    return scratch[piece.offset :].view(piece.dtype)


def _described(scratch: Tensor | None, argument: Described) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, columns = argument.shape
    tensor = _piece(scratch, argument.piece)[: rows * columns].view(rows, columns)
    return TensorDescriptor.from_tensor(tensor, list(argument.block))


class _Address:
    """A tensor as far as a tensor descriptor's launch asks for it."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class _Template:
    """A tensor descriptor without its base, which Triton's own class looks at once more at every construction."""

    __slots__ = ("fields", "kind", "offset")

    def __init__(self, descriptor: Any, offset: int) -> None:
        self.kind, self.offset = type(descriptor), offset
        self.fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
        self.fields |= {"shape": list(descriptor.shape), "strides": list(descriptor.strides)}


def _moved(template: _Template, base: int) -> Any:
    """The descriptor in a scratch that begins at `base`."""
    made = object.__new__(template.kind)
    made.__dict__ = {**template.fields, "base": _Address(base + template.offset)}
    return made


# --- calls ----------------------------------------------------------------------------------------------------------


class Quantizing(Protocol):
    """What quantizes the rows of a call into its scratch."""

    def __call__(self, scratch: Tensor, x: Tensor) -> None:
        """Codes and scales of x [M, K] at their places."""


@dataclass(slots=True)
class Call:
    """A product as it is launched for one number of rows.

    shape, dtype   of the result [M, N]
    scratch_bytes  of what lives during the call: codes of x and their scales, parts of split sums
    quantize       of x into the scratch; None: the product takes x itself
    product        the launch, `grid` programs; it is brought (x, (factors of its rows)), (bias), out and M
    finish         a launch that adds split sums where the product does not: it is brought (bias), out and M
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    scratch_bytes: int
    quantize: Quantizing | None
    product: Launch
    grid: tuple[int, int]
    finish: Launch | None = None
    finish_grid: tuple[int, int] = (1, 1)

    def __call__(self, x: Tensor, bias: Tensor | None, factors: Tensor | None = None) -> Tensor:
        """x [M, K] (columns side by side) times the weight: a new [M, N]."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        values: tuple[Tensor | int, ...] = (out, self.shape[0]) if bias is None else (bias, out, self.shape[0])
        scratch = None
        if self.scratch_bytes:
            scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=self.device)
        if self.quantize is not None:
            assert scratch is not None
            self.quantize(scratch, x)
            self.product(*self.grid, scratch, values)
        else:
            self.product(*self.grid, scratch, (x, *values) if factors is None else (x, factors, *values))
        if self.finish is not None:
            self.finish(*self.finish_grid, scratch, values)
        return out


def remember(calls: dict[Any, Any], key: Any, made: Any) -> Any:
    """Keep what was made for a key, and forget the oldest where there are many (prompts of every length)."""
    if len(calls) >= _MOST_CALLS:
        calls.pop(next(iter(calls)), None)
    calls[key] = made
    return made
