"""Checkpoints: containers, folders, dialects, and the one door that opens them all.

`open` proves headers, finds the dialect and declares the layers; no tensor is read and torch is not imported.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from anybit.checkpoints import agreement, gguf, safetensors, torch_pickle
from anybit.checkpoints.checkpoint import Checkpoint, Reader
from anybit.checkpoints.contents import DTYPES, Contents
from anybit.checkpoints.dialects import DIALECTS, Dialect, dialect
from anybit.checkpoints.folder import PICKLES, FolderContents, read_folder
from anybit.checkpoints.jsonfile import open_regular
from anybit.checkpoints.names import Remark, find
from anybit.errors import Damaged, Inconsistent, Unsafe, Unsupported

__all__ = ["Checkpoint", "open"]

# endings of tensor names that only quantized layers have
_QUANTIZED_ENDINGS: Final = (
    ".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2",
    ".absmax", ".quant_map", ".SCB", ".W_q", "_blocks", ".weight_zero_point", ".scaled_zeros",
)
# quant_method as config.json writes it; gpt-oss and MiniMax name the number format
_METHODS: Final = ({*DIALECTS} - {"gguf", "plain", "gpt_oss_mxfp4"}) | {"mxfp4", "mxfp8"}
_CODE_DTYPES: Final = ("U8", "I8", "I32", "I16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3",
                       "F6_E3M2")


def open(name: str | os.PathLike[str], remark: Remark | None = None) -> Checkpoint:
    """The checkpoint called `name`: "smollm2", a folder, a .gguf file, or a hub id.

    `remark` is told what takes time (a download). Raises AnybitErrors.
    """
    path = find(name, remark)
    with _collector_at_rest():
        return _open(path)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Without the cycle collector.

    Opening a large model makes millions of objects that stay, and it would visit them again and again: a third of the
    time for 360,000 tensors.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(path: Path) -> Checkpoint:
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise Damaged("not a regular file or a folder", where=str(path), wanted="a folder or a .gguf file")
    ggufs = sorted(file for file in path.glob("*.gguf") if not file.is_dir())
    tensors = any(path.glob("*.safetensors"))
    if ggufs and tensors:
        raise Inconsistent("safetensors and GGUF in one folder", where=str(path),
                           found=", ".join(p.name for p in ggufs[:8]), wanted="one model",
                           remedy=f"name the file: {ggufs[0]}")
    if ggufs:
        return _open_file(_only_model(path, ggufs))
    if not tensors and torch_pickle.is_native(path):
        return _native_hqq(path)
    found = read_folder(path)
    return _declared(found, _code_note(path))


def _native_hqq(path: Path) -> Checkpoint:
    """The checkpoint of a folder that HQQ wrote itself: qmodel.pt, its pickle read by opcodes, never loaded."""
    contents, read_tensor = torch_pickle.read_folder(path)
    return _declared(FolderContents(contents, {}), _code_note(path), read_tensor)


def _declared(found: FolderContents, remarks: tuple[str, ...], read_tensor: Reader | None = None) -> Checkpoint:
    """The checkpoint of a proven folder, its parts compared with each other."""
    agreement.demand_one_configuration(found.contents)
    contents = agreement.with_method(found.contents)
    chosen = _dialect_of(contents)
    rename = getattr(chosen, "with_known_names", None)
    known = contents if rename is None else rename(contents)
    remarks = (*found.remarks, *remarks, *agreement.remark_on_method(found.contents, chosen.NAME))
    checkpoint = Checkpoint(known, chosen, read_tensor or safetensors.Reader(found.stamps), remarks)
    checkpoint.has_new_names = known is not contents
    for demand in agreement.DEMANDS:
        demand(checkpoint)
    checkpoint.notes += agreement.remark_on_leftovers(checkpoint) + agreement.remark_on_biases(checkpoint)
    return checkpoint


def _open_file(path: Path) -> Checkpoint:
    if path.suffix in PICKLES:
        raise Unsafe("a pickle can run code", where=str(path), found=f"a {path.suffix} file",
                     wanted="a folder of safetensors files, or a .gguf file",
                     remedy="use the model's safetensors release")
    if path.suffix == ".safetensors":
        raise Inconsistent("a single safetensors file has no config", where=str(path), wanted="its folder",
                           remedy=f"anybit inspect {path.parent}")
    if path.suffix != ".gguf":
        _demand_gguf(path)
    contents = gguf.read_contents(path)
    return Checkpoint(contents, dialect("gguf"), gguf.read_tensor)


def _demand_gguf(path: Path) -> None:
    """Raise Unsupported if a file of another name does not begin as GGUF does: it was never meant to be one."""
    descriptor = open_regular(path)
    try:
        first = os.pread(descriptor, 4, 0)
    except OSError as error:
        raise Damaged("cannot be read", where=str(path), found=error.strerror or str(error)) from error
    finally:
        os.close(descriptor)
    if first != b"GGUF":
        raise Unsupported("no model file", where=str(path), found=f"first bytes {first!r}",
                          wanted="a folder of safetensors files, or a .gguf file", remedy="give the model's folder")


def _only_model(folder: Path, files: list[Path]) -> Path:
    """The one GGUF model of a folder: a single file, or a split set's first part."""
    models = [f for f in files if not f.name.startswith(("mmproj", "imatrix"))]
    firsts = [f for f in models if "-of-" not in f.stem or f.stem.rsplit("-of-", 1)[0].endswith("-00001")]
    if len(firsts) == 1:
        return firsts[0]
    if not firsts and models:
        return models[0]  # the container says which parts are missing
    raise Inconsistent("several GGUF models in one folder", where=str(folder),
                       found=", ".join(f.name for f in firsts[:8]) or "none", wanted="one",
                       remedy=f"name the file: {firsts[0]}" if firsts else "give a path to a .gguf file")


def _dialect_of(contents: Contents) -> Dialect:
    method = contents.quantization.get("quant_method")
    candidates = [dialect(name) for name in DIALECTS if name != "plain"]
    found = next((d for d in candidates if d.recognizes(contents)), None)
    if found is not None:
        return found
    if method is not None:
        known = sorted(_METHODS)
        near = get_close_matches(str(method), known, n=2)
        raise Unsupported(f"unknown quant_method {str(method)[:80]!r}", where="config.json", found=str(method)[:80],
                          wanted="one of: " + ", ".join(known),
                          remedy=f"perhaps {' or '.join(near)}" if near else "a newer anybit may read it")
    signs = _quantized_signs(contents)
    if not signs:
        return dialect("plain")
    raise _undeclared(contents, signs)


def _quantized_signs(contents: Contents) -> list[str]:
    """Tensors that only a quantized checkpoint holds."""
    signs = [name for name in contents.tensors if name.endswith(_QUANTIZED_ENDINGS)]
    signs += [i.name for i in contents.tensors.values() if i.dtype in _CODE_DTYPES and len(i.shape) >= 2]
    return signs


def _undeclared(contents: Contents, signs: list[str]) -> Inconsistent:
    return Inconsistent(
        "quantized tensors without a quantization_config", where=signs[0],
        found=f"{len(signs)} such tensors, {contents.tensors[signs[0]].dtype} {list(contents.tensors[signs[0]].shape)}",
        wanted="config.json with quantization_config, or the tool's own config file beside it",
        remedy="copy the config that the quantizing tool wrote; packed codes are never taken for weights",
        more=signs[1:],
    )


def _code_note(folder: Path) -> tuple[str, ...]:
    code = sorted(p.name for p in (*folder.glob("*.py"), *folder.glob("*.pth")))
    return (f"contains code, not run: {', '.join(code[:8])}",) if code else ()


assert set(_CODE_DTYPES) <= set(DTYPES)
