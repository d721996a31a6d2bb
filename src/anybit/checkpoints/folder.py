"""A checkpoint's folder: config, index, shards, side files; what may be opened and what must not.

Shards are the folder's own listing: an index may only name files that are there. A link may lead into the folder or
into the blobs of the same hub repository, nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from anybit import limits
from anybit.checkpoints.contents import JSON, Contents, TensorInfo
from anybit.checkpoints.jsonfile import integer, open_regular, read_json, refuse_lfs_pointer
from anybit.checkpoints.safetensors import Header, Stamp, read_header
from anybit.errors import Damaged, Inconsistent, LimitExceeded, Unsafe, Unsupported

INDEX: Final = "model.safetensors.index.json"
SIDE_FILES: Final = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".pkl")
_UNFINISHED: Final = (".incomplete", ".part", ".crdownload", ".aria2")
PARTIAL: Final = ".anybit-partial"  # ending of a folder that `convert` is still writing


@dataclass(frozen=True)
class FolderContents:
    """What a folder holds: contents, the stamps of its shards, and what is odd but decided."""

    contents: Contents
    stamps: dict[Path, Stamp]
    remarks: tuple[str, ...] = ()


def read_folder(folder: Path) -> FolderContents:
    """Everything but tensors. Raises AnybitErrors for whatever is unsafe, damaged, missing or contradictory."""
    names = _listing(folder)
    if folder.resolve().name.endswith(PARTIAL):
        raise Damaged("an unfinished conversion", where=str(folder), found=f"a folder named *{PARTIAL}",
                      wanted="a finished checkpoint", remedy="run the conversion again")
    _refuse_adapter(folder, names)
    if not any(name.endswith(".safetensors") for name in names) and INDEX not in names:
        _refuse_without_tensors(folder, names)
    unfinished = sorted(name for name in names if name.endswith(_UNFINISHED))
    if unfinished:
        raise Damaged("an unfinished download", where=str(folder), found=", ".join(unfinished[:20]),
                      wanted="finished files", remedy="download again, then remove these", more=unfinished[1:])
    for name in names.intersection(TOKENIZERS):
        _refuse_lfs_file(folder, name)
    config = read_config(folder)
    shards = _Shards(folder)
    shards.read(names)
    side: dict[str, JSON] = {name: read_json(safe_file(folder, name)) for name in SIDE_FILES if name in names}
    contents = Contents(folder, config, shards.tensors, side, shards.metadata)
    return FolderContents(contents, shards.stamps, tuple(shards.remarks))


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))  # noqa: PTH208 (names are wanted, not paths)
    except OSError as error:
        raise Damaged("the folder cannot be read", where=str(folder), found=error.strerror or str(error),
                      wanted="a folder") from error


def _refuse_lfs_file(folder: Path, name: str) -> None:
    descriptor = open_regular(safe_file(folder, name))
    try:
        refuse_lfs_pointer(os.pread(descriptor, 512, 0), name)
    finally:
        os.close(descriptor)


def _refuse_adapter(folder: Path, names: set[str]) -> None:
    tensors = [name for name in names if name.endswith(".safetensors")]
    if "adapter_config.json" in names and all(name.startswith("adapter") for name in tensors):
        raise Unsupported("only an adapter, without its base model", where=str(folder), found="adapter_config.json",
                          wanted="the merged model", remedy="merge the adapter with its own tool first")


def _refuse_without_tensors(folder: Path, names: set[str]) -> None:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise Unsafe(
            "only pickle files: a pickle can run code", where=str(folder), found=", ".join(pickles[:8]),
            wanted="*.safetensors or a .gguf file",
            remedy="use the model's safetensors release, or convert it where you trust it",
        )
    raise Inconsistent("no tensors in this folder", where=str(folder), found=", ".join(sorted(names)[:8]) or "nothing",
                       wanted="*.safetensors or a .gguf file", remedy="is the path right, the download complete?")


def read_config(folder: Path) -> JSON:
    """config.json, with its sizes proven sane."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise Inconsistent("config.json is missing", where=str(folder), wanted="the model's config.json",
                           remedy="download it from where the tensors came from")
    config = read_json(safe_file(folder, "config.json"))
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise Damaged("quantization_config is not an object", where="config.json", found=type(quantization).__name__,
                      wanted="an object, or null")
    _check_sizes(config)
    return config


# key -> (smallest, largest); a null or absent key is the architecture's default
_SIZES: Final = {
    "hidden_size": (1, limits.MAX_HIDDEN),
    "intermediate_size": (1, limits.MAX_HIDDEN * 16),
    "num_hidden_layers": (1, limits.MAX_LAYERS),
    "num_attention_heads": (1, 65536),
    "num_key_value_heads": (1, 65536),
    "head_dim": (1, 65536),
    "vocab_size": (1, limits.MAX_VOCABULARY),
    "num_experts": (0, 65536),
    "num_local_experts": (0, 65536),
    "moe_intermediate_size": (1, limits.MAX_HIDDEN * 16),
}
_NEVER_NULL: Final = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def _check_sizes(config: dict[str, Any]) -> None:
    text = config.get("text_config")
    for holder in (config, text):
        if isinstance(holder, dict):
            for key, (low, high) in _SIZES.items():
                if isinstance(holder.get(key), list):  # some architectures give one a layer
                    continue
                if integer(holder, key, "config.json", low, high) is None and key in holder and key in _NEVER_NULL:
                    raise Damaged(f"{key} is null", where="config.json", found="null", wanted=f"{low} … {high}")


def safe_file(folder: Path, name: str) -> Path:
    """The file `name` of the folder, if it really lies there. Raises Unsafe, Damaged."""
    path = folder / name
    home = folder.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle
        raise Damaged("a link that leads nowhere, or a file that is gone: download unfinished?", where=name,
                      found=f"a link to {path.readlink()}" if path.is_symlink() else "no such file",
                      wanted="the file", remedy="download again") from None
    allowed = [home]
    if home.parent.name == "snapshots":  # the hub's cache: snapshots/REVISION/file leads to blobs/HASH
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise Unsafe("a link leads out of the folder", where=name, found=str(target), wanted="a file in this folder",
                     remedy="do not load this model; report it where you got it")
    return path


@dataclass
class _Shards:
    """The tensors of a folder's safetensors files, gathered file by file."""

    folder: Path
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    stamps: dict[Path, Stamp] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def read(self, names: set[str]) -> None:
        """Read the headers of the shards among `names`, those of the index where there is one."""
        listed = sorted(name for name in names if name.endswith(".safetensors"))
        index, total = _read_index(self.folder) if INDEX in names else (None, None)
        used = _indexed_shards(self.folder, index) if index is not None else _without_duplicates(listed)
        if len(used) > limits.MAX_SHARDS:
            raise LimitExceeded("too many shards", where=str(self.folder), found=f"{len(used):,}",
                                wanted=f"at most {limits.MAX_SHARDS:,} (MAX_SHARDS)")
        for shard in used:
            self._add(shard, self._header(shard), index)
        if index is not None:
            _refuse_lacking(index, self.tensors)
            present = sum(info.nbytes for info in self.tensors.values())
            if total is not None and total != present:
                self.remarks.append(f"total_size of the index is {repr(total)[:40]}, its tensors have {present} bytes")
        self._set_aside([name for name in listed if name not in used], is_indexed=index is not None)

    def _header(self, shard: str) -> Header:
        header = read_header(safe_file(self.folder, shard))
        self.stamps[self.folder / shard] = header.stamp
        return header

    def _add(self, shard: str, header: Header, index: dict[str, str] | None) -> None:
        elsewhere = more = 0
        for name, info in header.tensors.items():
            if index is not None and index.get(name, shard) != shard:
                elsewhere += 1  # the index says which file counts
                continue
            if name in self.tensors:
                raise Inconsistent("the same tensor in two files", where=name,
                                   found=f"{self.tensors[name].file.name} and {shard}",
                                   wanted="one, or an index that decides")
            more += index is not None and name not in index
            self.tensors[name] = info
        if len(self.tensors) > limits.MAX_TENSORS:
            raise LimitExceeded("too many tensors", where=str(self.folder), found=f"{len(self.tensors):,}",
                                wanted=f"at most {limits.MAX_TENSORS:,} (MAX_TENSORS)")
        if elsewhere:
            self.remarks.append(f"{shard} holds {elsewhere} tensors that the index takes from other files")
        if more:
            self.remarks.append(f"{shard} holds {more} tensors that the index does not name")
        self.metadata |= header.metadata

    def _set_aside(self, shards: list[str], *, is_indexed: bool) -> None:
        """Say which files are not read; refuse one that holds other tensors under the same names."""
        for shard in shards:
            tensors = read_header(safe_file(self.folder, shard)).tensors
            shared = sorted(tensors.keys() & self.tensors.keys())
            unlike = [n for n in shared if _facts(tensors[n]) != _facts(self.tensors[n])]
            is_whole = shard == "model.safetensors" or shard.startswith("consolidated")
            if is_whole and unlike:
                raise Inconsistent(
                    "two different models in one folder", where=shard,
                    found=f"{unlike[0]}: {_told(tensors[unlike[0]])} here, {_told(self.tensors[unlike[0]])} in "
                          f"{self.tensors[unlike[0]].file.name}",
                    wanted="one model", remedy="remove the file that does not belong here", more=unlike[1:])
            why = "the index does not name it" if is_indexed else "it holds the model a second time"
            self.remarks.append(f"{shard} is not read: {why}")


def _facts(info: TensorInfo) -> tuple[str, tuple[int, ...]]:
    return info.dtype, info.shape


def _told(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _indexed_shards(folder: Path, index: dict[str, str]) -> list[str]:
    """The files that the index names, all of which must be there."""
    used = sorted(set(index.values()))
    missing = [name for name in used if not os.path.lexists(folder / name)]
    if missing:
        raise Inconsistent("shards of the index are missing", where=INDEX, found=f"no {missing[0]}",
                           wanted=", ".join(missing[:20]), remedy="download the missing files", more=missing[1:])
    return used


def _refuse_lacking(index: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    lacking = sorted(name for name in index if name not in tensors)
    if lacking:
        raise Inconsistent("tensors of the index are missing", where=INDEX,
                           found=f"no {lacking[0]} in {index[lacking[0]]}", wanted="every indexed tensor in its shard",
                           remedy="download the shards again", more=lacking[1:])


def _without_duplicates(shards: list[str]) -> list[str]:
    """Some repositories hold the same tensors a second time as consolidated*.safetensors."""
    kept = [name for name in shards if not name.startswith("consolidated")]
    return kept or shards


def _read_index(folder: Path) -> tuple[dict[str, str], object]:
    """The map of tensor names to files, and what the index says about their bytes."""
    index = read_json(safe_file(folder, INDEX), limit=limits.MAX_INDEX_JSON)
    found, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise Damaged("weight_map is not a map of names to files", where=INDEX, found=repr(found)[:80],
                      wanted="an object: tensor name to file name", remedy="download the index again")
    if len(found) > limits.MAX_TENSORS:
        raise LimitExceeded("too many tensors", where=INDEX, found=f"{len(found):,}",
                            wanted=f"at most {limits.MAX_TENSORS:,} (MAX_TENSORS)")
    _refuse_outside(folder, found)
    return found, metadata.get("total_size") if isinstance(metadata, dict) else None


def _refuse_outside(folder: Path, weight_map: dict[str, str]) -> None:
    for name in set(weight_map.values()):
        parts = name.split("/")
        if not name.isprintable() or any(c in name for c in "\\:") or any(part in ("", ".", "..") for part in parts) \
                or (folder / name).is_dir():
            tensor = next(tensor for tensor, file in weight_map.items() if file == name)
            raise Unsafe(
                "weight_map names a file outside the folder", where=INDEX, found=f"{name[:200]!r} for {tensor[:200]}",
                wanted="a file in this folder", remedy="do not load this model; report it where you got it",
            )


# --- what a host must not follow -----------------------------------------------------------------------------------

_DTYPES: Final = ("float32", "float16", "bfloat16", "float64", "auto")


def demand_no_code(config: dict[str, Any]) -> None:
    """Raise Unsafe for a config whose model only code of the checkpoint can build, or that names kernels to fetch.

    Raises Unsupported for a dtype that is no wide float: hosts look it up as an attribute of torch.
    """
    for holder in _holders(config):
        for key, value in holder.items():
            if "_implementation" in key and "/" in str(value):  # organisation/kernel: hosts fetch and run it
                raise Unsafe("the config names code to fetch and run", where="config.json",
                             found=f"{key}: {value!r}"[:200], wanted="the name of a built-in implementation",
                             remedy="remove the key if you trust the rest")
        if holder is config.get("quantization_config"):  # its dtypes and classes are the dialect's
            continue
        for key in ("torch_dtype", "dtype"):
            dtype = holder.get(key)
            if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
                raise Unsupported(f"{key} is no dtype of a model", where="config.json", found=repr(dtype)[:80],
                                  wanted=", ".join(_DTYPES), remedy=f"correct {key}")
        if "auto_map" in holder:
            _demand_known_class(holder)


def _holders(config: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The config and the configs inside it."""
    inner = (value for key, value in config.items() if key.endswith("_config"))
    return [holder for holder in (config, *inner) if isinstance(holder, dict)]


def _demand_known_class(holder: dict[str, Any]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = holder.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise Unsafe("the model needs code from the checkpoint, which is never run", where="config.json",
                     found=f"auto_map, model_type {model_type!r}"[:200], wanted="a model type that transformers knows",
                     remedy="a newer transformers may know it")
