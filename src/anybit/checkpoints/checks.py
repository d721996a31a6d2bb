"""Checks that the dialects share: each raises our error with where, found, wanted and what to do.

Header checks are torch-free; checks of values import torch when called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from anybit.checkpoints.contents import Contents, TensorInfo
from anybit.errors import Damaged, Inconsistent

if TYPE_CHECKING:
    from torch import Tensor

_REPAIR = "the export is damaged: download it again, or ask its maker; `anybit verify` lists all such tensors"


def need(contents: Contents, name: str, for_module: str) -> TensorInfo:
    """The tensor called `name`, which a quantized module cannot do without. Raises Inconsistent if it is absent."""
    info = contents.tensors.get(name)
    if info is None:
        raise _missing(contents, name, for_module, ())
    return info


def need_all(contents: Contents, names: Iterable[str]) -> None:
    """Raise Inconsistent, naming every one, if tensors `MODULE.LEAF` that layers cannot do without are absent."""
    absent = [name for name in names if name not in contents.tensors]
    if absent:
        raise _missing(contents, absent[0], absent[0].rpartition(".")[0], absent[1:])


def _missing(contents: Contents, name: str, for_module: str, more: Sequence[str]) -> Inconsistent:
    near = get_close_matches(name, [t for t in contents.tensors if t.startswith(for_module)], n=2)
    return Inconsistent(
        "a tensor of a quantized layer is missing",
        where=for_module,
        found="no " + name + (f"; near: {', '.join(near)}" if near else ""),
        wanted=name,
        remedy="the checkpoint is incomplete: download it again",
        more=more,
    )


def expect_dtype(info: TensorInfo, *wanted: str) -> None:
    """Raise Inconsistent unless the tensor has one of the dtypes."""
    if info.dtype not in wanted:
        raise Inconsistent(
            "unexpected dtype",
            where=f"{info.file.name}: {info.name}",
            found=info.dtype,
            wanted=" or ".join(wanted),
            remedy="the config belongs to another file, or the export is damaged",
        )


def expect_shape(info: TensorInfo, *wanted: tuple[int, ...]) -> None:
    """Raise Inconsistent unless the tensor has one of the shapes."""
    if info.shape not in wanted:
        raise Inconsistent(
            "unexpected shape",
            where=f"{info.file.name}: {info.name}",
            found=str(list(info.shape)),
            wanted=" or ".join(str(list(shape)) for shape in wanted),
            remedy="the config belongs to another file, or the export is damaged",
        )


def refuse_bad_scales(values: Tensor, where: str, *, allow_zero: bool, allow_negative: bool) -> None:
    """Raise Damaged, with count, first index and value, if a scale is not finite (or zero, or negative where told).

    values  any float dtype and shape
    """
    import torch

    values = values.float()
    bad = ~torch.isfinite(values)
    if not allow_zero:
        bad |= values == 0
    if not allow_negative:
        bad |= values < 0
    if not bool(bad.any()):
        return
    index = [int(i) for i in bad.nonzero()[0]]
    limits = "finite" + ("" if allow_zero else ", not zero") + ("" if allow_negative else ", not negative")
    raise Damaged(
        "scales that no writer means",
        where=where,
        found=f"{float(values[tuple(index)])} at {index}, {int(bad.sum())} such of {values.numel()}",
        wanted=limits,
        remedy=_REPAIR,
    )
