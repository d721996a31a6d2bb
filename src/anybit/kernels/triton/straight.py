"""How a kernel that Triton compiled is called without Triton's launcher: by version, as read in its source.

All versions in `READ` end in CompiledKernel.run(x, y, z, stream, function, packed_metadata, launch_metadata,
enter_hook, exit_hook, *arguments), pointers as tensors or as integers (triton/runtime/jit.py, backends/*/driver.py). On
NVIDIA `run` is a CudaLauncher, which in the versions of `_CUDA` only puts four more arguments in front of those of a C
function, and makes tensor descriptors of both operands at every call: there the C function is called, and the weight's
descriptor is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from inspect import getclosurevars
from typing import Any, Final, NamedTuple

__all__ = ["READ", "Straight", "straight", "version"]

READ: Final = ((3, 5), (3, 6), (3, 7), (3, 9))
_CUDA: Final = ((3, 5), (3, 6))


class Straight(NamedTuple):
    """A call as a list of arguments: those of the launch in front, x and y programs and the stream first.

    run        called with all of them
    arguments  x, y, 1, the stream, ..., and the kernel's own
    places     where each of the kernel's arguments stands
    describes  for an argument that is a tensor descriptor with a new base at every call: what makes it of the address
    """

    run: Callable[..., object]
    arguments: list[Any]
    places: list[int]
    describes: dict[int, Callable[[int], object]]


@cache
def version() -> tuple[int, ...]:
    """Triton's, as far as its launcher depends on it."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def straight(found: Any, arguments: Sequence[Any], moving: Mapping[int, Any]) -> Straight | None:
    """The call of a CompiledKernel with `arguments`; None where it is not what we know.

    arguments  of the kernel, constants too, in its order: numbers, addresses, tensor descriptors
    moving     tensor descriptors among them whose base is another one at every call
    """
    if not all(hasattr(found, name) for name in ("run", "function", "packed_metadata")):
        return None
    if type(found.run).__name__ == "CudaLauncher" and version() in _CUDA:
        made = _past_cuda(found, arguments, moving)
        if made is not None:
            return made
    front = [1, 1, 1, 0, found.function, found.packed_metadata, None, None, None]
    kept = [None if i in moving else argument for i, argument in enumerate(arguments)]
    describes = {i: _mover(descriptor) for i, descriptor in moving.items()}
    return Straight(found.run, [*front, *kept], [len(front) + i for i in range(len(kept))], describes)


# --- tensor descriptors -----------------------------------------------------------------------------------------------


class _Address:
    """A tensor as far as the launch of a tensor descriptor asks for it."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _mover(descriptor: Any) -> Callable[[int], object]:
    """Makes descriptors like this one with another base; without its class's checks, which have been passed."""
    kind = type(descriptor)
    fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
    fields |= {"shape": list(descriptor.shape), "strides": list(descriptor.strides)}

    def moved(address: int) -> object:
        made = object.__new__(kind)
        made.__dict__ = {**fields, "base": _Address(address)}
        return made

    return moved


def _past_cuda(found: Any, arguments: Sequence[Any], moving: Mapping[int, Any]) -> Straight | None:
    """The C function behind a CudaLauncher that allocates nothing: what its `__call__` and its wrapper would do."""
    launcher = found.run
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    described = [i for i, argument in enumerate(arguments) if hasattr(argument, "block_shape")]
    metas = getattr(found.metadata, "tensordesc_meta", None) if described else ()
    run = getclosurevars(launcher.launch).nonlocals.get("launcher") if described else launcher.launch
    if run is None or metas is None or len(metas) != len(described) or None in metas:
        return None
    made = [1, 1, 1, 0, found.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
            found.packed_metadata, None, None, None]  # fmt: skip
    places: list[int] = []
    describes: dict[int, Callable[[int], object]] = {}
    for i, argument in enumerate(arguments):
        places.append(len(made))
        if i not in described:
            made.append(argument)
            continue
        encode = _encoder(argument, metas[described.index(i)])
        if encode is None:
            return None
        if i in moving:
            describes[i] = encode
        made += [None if i in moving else encode(argument.base.data_ptr()), *argument.shape, *argument.strides]
    return Straight(run, made, places, describes)


def _encoder(descriptor: Any, meta: Mapping[str, Any]) -> Callable[[int], object] | None:
    """make_tensordesc_arg of triton/backends/nvidia/driver.py for one descriptor: the map of an address."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime import driver

    if meta["fp4_padded"] or descriptor.padding != "zero":
        return None
    fill, kind = driver.active.utils.fill_tma_descriptor, TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    swizzle, size, block = meta["swizzle"], meta["elem_size"], meta["block_size"]
    shape, strides = list(descriptor.shape), list(descriptor.strides)

    def encoded(address: int) -> object:
        made: object = fill(address, swizzle, size, kind, block, shape, strides, 0)
        return made

    return encoded
