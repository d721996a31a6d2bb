"""A checkpoint's folder: config, index, shards, side files; what may be opened and what must not.

Shards are the folder's own listing: an index may only name files that are there. A link may lead into the folder or
into the blobs of the same hub repository, nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from anybit import limits
from anybit.checkpoints.contents import JSON, Contents, TensorInfo
from anybit.checkpoints.jsonfile import integer, read_json, read_small, refuse_lfs_pointer
from anybit.checkpoints.safetensors import read_header
from anybit.errors import Damaged, Inconsistent, LimitExceeded, Unsafe, Unsupported

INDEX: Final = "model.safetensors.index.json"
SIDE_FILES: Final = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".npz", ".pkl")
_UNFINISHED: Final = (".incomplete", ".part", ".crdownload", ".aria2")


def read_folder(folder: Path) -> Contents:
    """Everything but tensors. Raises AnybitErrors for whatever is unsafe, damaged, missing or contradictory."""
    files = sorted(p for p in folder.iterdir())
    names = {p.name for p in files}
    if not any(name.endswith(".safetensors") for name in names):
        _refuse_without_tensors(folder, names)
    unfinished = [name for name in names if name.endswith(_UNFINISHED)]
    if unfinished:
        raise Damaged("an unfinished download", where=str(folder), found=", ".join(sorted(unfinished)),
                      wanted="finished files", remedy="download again")
    config = read_config(folder)
    tensors, metadata = _tensors(folder, files)
    side = {name: read_json(safe_file(folder, name)) for name in SIDE_FILES if name in names}
    return Contents(folder, config, tensors, side, metadata)


def _refuse_without_tensors(folder: Path, names: set[str]) -> None:
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if "adapter_config.json" in names:
        raise Unsupported("only an adapter, without its base model", where=str(folder), found="adapter_config.json",
                          wanted="the merged model", remedy="merge the adapter with its own tool first")
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
    if not path.exists():
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


def _check_sizes(config: dict[str, Any]) -> None:
    text = config.get("text_config")
    for holder in (config, text):
        if isinstance(holder, dict):
            for key, (low, high) in _SIZES.items():
                if not isinstance(holder.get(key), list):  # some architectures give a list, one a layer
                    integer(holder, key, "config.json", low, high)


def safe_file(folder: Path, name: str) -> Path:
    """The file `name` of the folder, if it really lies there. Raises Unsafe, Damaged."""
    path = folder / name
    if not path.is_symlink():
        return path
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise Damaged("a link that leads nowhere: download unfinished?", where=name,
                      found=str(path.readlink()), remedy="download again") from None
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append((folder.parent.parent / "blobs").resolve())
    if not any(target.is_relative_to(place) for place in allowed):
        raise Unsafe("a link leads out of the folder", where=name, found=str(target), wanted="a file in this folder",
                     remedy="do not load this model; report it where you got it")
    return path


def _tensors(folder: Path, files: list[Path]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    shards = [p.name for p in files if p.name.endswith(".safetensors")]
    index = _read_index(folder) if (folder / INDEX).exists() else None
    if index is not None:
        missing = sorted({name for name in index.values() if name not in shards})
        if missing:
            raise Inconsistent("shards of the index are missing", where=INDEX, found=f"no {missing[0]}",
                               wanted=", ".join(missing[:20]), remedy="download the missing files", more=missing[1:])
        used = set(index.values())
        shards = [name for name in shards if name in used] or shards
    else:
        shards = _without_duplicates(shards)
    if len(shards) > limits.MAX_SHARDS:
        raise LimitExceeded("too many shards", found=str(len(shards)), wanted=f"{limits.MAX_SHARDS} (MAX_SHARDS)")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        header = read_header(safe_file(folder, shard))
        for name, info in header.tensors.items():
            if index is not None and index.get(name, shard) != shard:
                continue  # the index says which shard counts
            if name in tensors:
                raise Inconsistent("the same tensor in two files", where=name,
                                   found=f"{tensors[name].file.name} and {shard}", wanted="one, or an index that decides")
            tensors[name] = info
        metadata |= header.metadata
    if index is not None:
        lacking = sorted(name for name in index if name not in tensors)
        if lacking:
            raise Inconsistent("tensors of the index are missing", where=INDEX, found=f"no {lacking[0]}",
                               wanted="every indexed tensor in its shard", remedy="download the shards again",
                               more=lacking[1:])
    return tensors, metadata


def _without_duplicates(shards: list[str]) -> list[str]:
    """Some repositories hold the same tensors a second time as consolidated*.safetensors."""
    kept = [name for name in shards if not name.startswith("consolidated")]
    return kept or shards


def _read_index(folder: Path) -> dict[str, str]:
    path = safe_file(folder, INDEX)
    refuse_lfs_pointer(read_small(path, limits.MAX_INDEX_JSON)[:512], INDEX)
    found = read_json(path, limit=limits.MAX_INDEX_JSON).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise Damaged("weight_map is not a map of names to files", where=INDEX, found=type(found).__name__)
    for tensor, name in found.items():
        if not name or name in (".", "..") or any(c in name for c in "\\\0:") or Path(name).is_absolute() \
                or ".." in Path(name).parts or (folder / name).is_dir():
            raise Unsafe(
                "weight_map names a file outside the folder", where=INDEX, found=f"{name!r} for {tensor}",
                wanted="a file in this folder", remedy="do not load this model; report it where you got it",
            )
    return found


def demand_no_code(config: dict[str, Any]) -> None:
    """Raise Unsafe for a config whose model only code of the checkpoint can build, or that names kernels to fetch."""
    for holder in (config, config.get("text_config"), config.get("quantization_config")):
        if isinstance(holder, dict) and any(key.startswith("_attn_implementation") for key in holder):
            raise Unsafe("the config names code to run for attention", where="config.json",
                         found=next(key for key in holder if key.startswith("_attn_implementation")),
                         wanted="a config without it", remedy="remove the key if you trust the rest")
    if "auto_map" in config:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise Unsafe("the model needs code from the checkpoint, which is never run", where="config.json",
                         found=f"auto_map, model_type {config.get('model_type')!r}",
                         wanted="a model type that transformers knows", remedy="a newer transformers may know it")
