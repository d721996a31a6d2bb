"""Hostile and damaged GGUF files: one line of bad_inputs.md, one test; the id is the line's id."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from anybit.checkpoints.dialects import gguf as dialect
from anybit.checkpoints.gguf import read_contents, read_tensor, remarks
from anybit.checkpoints.gguf_tokenizer import tokenizer_data
from anybit.errors import AnybitError
from checkpoints.gguf_writing import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    File,
    Tensor,
    array,
    llama,
    pair,
    text,
)
from conftest import CHECKPOINTS, genuine

Case = tuple[str, bytes | File, str, str]  # id, content, kind, words of the message


LINES: set[str] = set()
Test = TypeVar("Test", bound=Callable[..., None])


def line(*ids: str) -> Callable[[Test], Test]:
    """Name the lines that a test stands for: `pytest -k GG05` finds them, as it does ids of parameters."""

    def mark(test: Test) -> Test:
        for id in ids:
            setattr(test, id, True)
        LINES.update(ids)
        return test

    return mark


def refusal(path: Path) -> AnybitError:
    """What reading headers and declaring layers ends in; it must be cheap."""
    start = time.process_time()
    with pytest.raises(AnybitError) as caught:
        dialect.declare(read_contents(path))
    assert time.process_time() - start < 1.0
    return caught.value


def written(folder: Path, content: bytes | File) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(content if isinstance(content, bytes) else content.bytes_())
    return path


def with_pair(raw: bytes) -> File:
    return llama(more=[raw])


def with_tensor(tensor: Tensor) -> File:
    file = llama()
    file.tensors.append(tensor)
    return file


def raw_array(key: str, element: int, count: int, rest: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", ARRAY, element, count) + rest


def nested(depth: int) -> bytes:
    return text("deep") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * depth


def shifted(change: Callable[[File], None]) -> File:
    file = llama()
    change(file)
    return file


def move(index: int, by: int) -> File:
    """The small llama whose tensor `index` claims another offset."""
    file = llama()
    at = sum(len(file.padded(t.bytes_())) for t in file.tensors[:index])
    file.tensors[index].offset = (at + by) % 2**64
    return file


HEAD = b"GGUF" + struct.pack("<I", 3)
SMALL = llama().bytes_()

REFUSED: list[Case] = [
    *[("GG01", SMALL[:n], "damaged", "needs 24 bytes") for n in (0, 3, 4, 23)],
    *[("GG01", magic + SMALL[4:], "unsupported", "convert the original model") for magic in (b"lmgg", b"tjgg", b"FUGG")],
    ("GG01", b"PK\3\4" + SMALL[4:], "damaged", "no GGUF file"),
    *[("GG01", File(version=v), "unsupported", f"version {v}") for v in (0, 1, 4, 2**32 - 1)],
    ("GG02", HEAD[:4] + struct.pack(">IQQ", 3, 0, 0), "unsupported", "big-endian"),
    *[("GG03", HEAD + struct.pack("<QQ", 0, n), "damaged", f"{n:,} pairs") for n in (2**31, 2**63, 2**64 - 1)],
    *[("GG03", HEAD + struct.pack("<QQ", n, 0), "damaged", f"{n:,} tensors") for n in (2**31, 2**63, 2**64 - 1)],
    *[("GG03", HEAD + struct.pack("<QQQ", 0, 1, n) + bytes(24), "damaged", "left") for n in (2**63, 2**64 - 8)],
    ("GG04", HEAD + struct.pack("<QQ", 0, 1) + text("k") + struct.pack("<IQ", STRING, 1000) + b"abcdef", "damaged", "1,000"),
    *[
        ("GG05", HEAD + struct.pack("<QQ", 0, 1) + raw_array("k", U8, n), "damaged", f"{n:,} bytes declared")
        for n in (2**63, 2**30)
    ],
    ("GG06", with_pair(nested(1)), "unsupported", "nested arrays"),
    ("GG06", with_pair(nested(2000)), "unsupported", "nested arrays"),
    *[("GG07", with_pair(text("k") + struct.pack("<IQ", n, 0)), "damaged", f"type {n}") for n in (13, 77, 2**32 - 1)],
    *[("GG07", with_pair(raw_array("k", n, 0)), "damaged", f"type {n}") for n in (13, 77, 2**32 - 1)],
    ("GG07", with_pair(pair("k", BOOL, 2)), "damaged", "neither 0 nor 1"),
    ("GG07", with_pair(array("k", BOOL, [0, 1, 2])), "damaged", "neither 0 nor 1"),
    ("GG08", with_pair(pair(b"\xff\xfe", U8, 1)), "damaged", "not UTF-8"),
    ("GG08", with_pair(pair("", U8, 1)), "damaged", "0 bytes"),
    ("GG08", with_pair(pair("k" * 513, U8, 1)), "damaged", "513 bytes"),
    ("GG09", with_pair(pair("llama.block_count", U32, 2)), "damaged", "declared twice"),
    ("GG09", with_tensor(Tensor("output_norm.weight", (64,))), "damaged", "declared twice"),
    *[
        ("GG10", with_pair(pair("general.alignment", U32, n)), "damaged", "power of two up to 1 MiB, uint32")
        for n in (0, 3, 2**31)
    ],
    ("GG10", with_pair(pair("general.alignment", I32, 32)), "damaged", "power of two up to 1 MiB, uint32"),
    ("GG10", with_pair(array("general.alignment", U32, [32])), "damaged", "power of two up to 1 MiB, uint32"),
    ("GG11", with_tensor(Tensor("x", (1, 1, 1, 1, 1))), "limit", "MAX_GGUF_RANK"),
    *[
        ("GG11", HEAD + struct.pack("<QQ", 1, 0) + text("x") + struct.pack("<I", n) + bytes(64), "limit", "MAX_GGUF_RANK")
        for n in (10**6, 2**32 - 1)
    ],
    *[
        ("GG12", with_tensor(Tensor("x", dims, data=b"")), "damaged", "cannot be that large")
        for dims in ((2**63,), (2**63 - 1, 2), (2**32, 2**32), (2**32, 2**32 + 1, 2**62, 4))
    ],
    ("GG12", with_tensor(Tensor("output.weight", (64, 0))), "inconsistent", "is empty"),
    (
        "GG13",
        File(tensors=[Tensor(f"t{n}", (2**30, 2**10), data=b"", offset=n * 2**42) for n in range(3)]),
        "damaged",
        "incomplete download?",
    ),
    ("GG13", with_tensor(Tensor("x", (8,), offset=2**64 - 32)), "damaged", "incomplete download?"),
    ("GG14", SMALL[:-64], "damaged", "incomplete download?"),
    ("GG14", move(3, 2**40), "damaged", "incomplete download?"),
    ("GG14", move(0, 2**64 - 32), "damaged", "incomplete download?"),
    ("GG15", move(3, 1), "damaged", "not aligned"),
    ("GG15", move(3, -32), "damaged", "overlaps"),
    ("GG16", SMALL + bytes(-len(SMALL) % 32) + SMALL, "damaged", "second GGUF header: give the first part"),
    ("GG17", with_tensor(Tensor("x", (33, 1), 2)), "damaged", "K = 33"),
    ("GG17", with_tensor(Tensor("x", (32, 1), 12)), "damaged", "256"),
    ("GG18", with_tensor(Tensor("x", (32, 1), 4)), "unsupported", "Q4_2, removed from ggml"),
    *[("GG18", with_tensor(Tensor("x", (32, 1), n)), "unsupported", "removed from ggml") for n in (5, 31, 32, 33)],
    ("GG18", with_tensor(Tensor("x", (32, 1), 999)), "unsupported", "id 999"),
    ("GG18", with_tensor(Tensor("x", (32, 1), -1)), "unsupported", "id 4294967295"),
    *[
        ("GG20", llama(changed={"llama.block_count": n}), "inconsistent", words)
        for n, words in ((0, "no size"), (600, "block_count 600"), (10**9, "block_count 1,000,000,000"))
    ],
]


@pytest.mark.parametrize(("content", "kind", "words"), [pytest.param(*c[1:], id=c[0]) for c in REFUSED])
def test_a_bad_file_is_refused_with_place_and_reason(tmp_path: Path, content: bytes | File, kind: str, words: str) -> None:
    error = refusal(written(tmp_path, content))
    assert error.kind == kind
    assert words in str(error)
    assert error.where == "model.gguf"
    assert error.found or error.wanted


@line("GG02")
def test_version_2_is_read() -> None:
    for name in genuine("gguf-q4_0-mixtral-split-experts"):
        contents = read_contents(next((CHECKPOINTS / name).glob("*.gguf")))
        assert contents.config["model_type"] == "mixtral"


@line("GG05")
def test_a_million_empty_strings_cost_little(tmp_path: Path) -> None:
    path = written(tmp_path, with_pair(raw_array("k", STRING, 10**6, bytes(8 * 10**6))))
    start = time.process_time()
    contents = read_contents(path)
    assert time.process_time() - start < 1.0
    assert contents.gguf is not None
    assert len(contents.gguf["k"]) == 10**6


@line("GG05")
def test_more_elements_than_a_vocabulary_can_have_are_refused(tmp_path: Path) -> None:
    error = refusal(written(tmp_path, with_pair(raw_array("k", U8, 4_194_305, bytes(4_194_305)))))
    assert error.kind == "limit"
    assert "MAX_GGUF_ARRAY" in str(error)


@line("GG08")
def test_a_value_that_is_not_utf8_stays_bytes(tmp_path: Path) -> None:
    contents = read_contents(written(tmp_path, with_pair(pair("k", STRING, b"\xff"))))
    assert contents.gguf is not None
    assert contents.gguf["k"] == b"\xff"


@line("GG11", "GG12")
def test_a_scalar_and_an_empty_tensor_are_no_damage(tmp_path: Path) -> None:
    file = llama()
    file.tensors += [Tensor("x.scalar", (), data=struct.pack("<f", 2.5)), Tensor("x.empty", (0, 4))]
    contents = read_contents(written(tmp_path, file))
    assert contents.tensors["x.scalar"].shape == ()
    assert read_tensor(contents.tensors["x.scalar"]).item() == 2.5
    assert read_tensor(contents.tensors["x.empty"]).shape == (4, 0)


@line("GG15")
def test_a_gap_is_refused(tmp_path: Path) -> None:
    file = File(tensors=[Tensor("a", (8,)), Tensor("b", (8,), offset=64)], tail=bytes(32))
    error = refusal(written(tmp_path, file))
    assert error.kind == "damaged"
    assert "gap" in str(error)


@line("GG16")
def test_trailing_bytes_are_remarked(tmp_path: Path) -> None:
    file = llama()
    file.tail = b"trailing"
    (remark,) = remarks(read_contents(written(tmp_path, file)))
    assert "8 bytes after the last tensor" in remark


@line("GG19")
@pytest.mark.parametrize("architecture", [None, "elephant"])
def test_an_unknown_architecture_is_inspected_but_not_loaded(tmp_path: Path, architecture: str | None) -> None:
    contents = read_contents(written(tmp_path, llama(changed={"general.architecture": architecture})))
    assert dialect.declare(contents)["blk.0.attn_q"].shape == (64, 64)
    with pytest.raises(AnybitError) as caught:
        dialect.require_loadable(contents)
    assert caught.value.kind == "unsupported"


@line("GG19")
def test_an_architecture_that_is_a_number_is_inspected_but_not_loaded(tmp_path: Path) -> None:
    file = llama(changed={"general.architecture": None}, more=[pair("general.architecture", U32, 7)])
    contents = read_contents(written(tmp_path, file))
    assert dialect.declare(contents)
    with pytest.raises(AnybitError) as caught:
        dialect.require_loadable(contents)
    assert "7" in caught.value.found


def vocabulary(
    tokens: int = 8, scores: int | None = None, types: list[int] | None = None, special: list[bytes] | None = None,
    first: str = "t0",
) -> File:
    names = [first, *(f"t{n}" for n in range(1, tokens))]
    more = [pair("tokenizer.ggml.model", STRING, "llama"), array("tokenizer.ggml.tokens", STRING, names)]
    more.append(array("tokenizer.ggml.scores", F32, [0.0] * (tokens if scores is None else scores)))
    more.append(array("tokenizer.ggml.token_type", I32, types or [1] * tokens))
    return llama(more=[*more, *(special or [])])


@pytest.mark.parametrize(
    ("file", "kind", "words"),
    [
        pytest.param(vocabulary(scores=7), "inconsistent", "8 numbers, one a token", id="GG21"),
        pytest.param(vocabulary(types=[99] * 8), "inconsistent", "[99]", id="GG21"),
        pytest.param(vocabulary(types=[6] + [1] * 7, first="<0x-1>"), "inconsistent", "<0x-1>", id="GG21"),
        pytest.param(
            vocabulary(special=[pair("tokenizer.ggml.bos_token_id", U32, 8)]), "inconsistent", "0 … 7", id="GG21"
        ),
        pytest.param(vocabulary(first="x" * 2**20), "limit", "MAX_TOKEN_BYTES", id="GG21"),
        pytest.param(vocabulary(tokens=9), "inconsistent", "rows of the embedding", id="GG21"),
    ],
)
def test_a_tokenizer_whose_parts_disagree_is_refused(tmp_path: Path, file: File, kind: str, words: str) -> None:
    contents = read_contents(written(tmp_path, file))
    with pytest.raises(AnybitError) as caught:
        tokenizer_data(contents)
    assert caught.value.kind == kind
    assert words in str(caught.value)


def split_set(folder: Path, keys: list[tuple[int, int, int]], *, count: int | None = None) -> list[Path]:
    """The small llama in parts; keys (split.no, split.count, split.tensors.count) of each part."""
    whole = llama()
    parts = len(keys)
    size = -(-len(whole.tensors) // parts)
    paths = []
    for n, (number, declared, total) in enumerate(keys):
        pairs = [pair("split.no", U16, number), pair("split.tensors.count", I32, total)]
        pairs.append(pair("split.count", U16, declared) if declared < 2**16 else pair("split.count", U32, declared))
        file = File([*(whole.pairs if n == 0 else []), *pairs], whole.tensors[n * size : (n + 1) * size])
        paths.append(file.write(folder / f"m-{n + 1:05}-of-{count or parts:05}.gguf"))
    return paths


TOTAL = len(llama().tensors)
SOUND = [(0, 3, TOTAL), (1, 3, TOTAL), (2, 3, TOTAL)]


@line("GG22")
def test_any_part_or_the_folder_gives_the_whole_set(tmp_path: Path) -> None:
    paths = split_set(tmp_path, SOUND)
    for given in (*paths, tmp_path):
        contents = read_contents(given)
        assert contents.path == paths[0]
        assert len(contents.tensors) == TOTAL


@line("GG22")
def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = split_set(tmp_path, SOUND)
    paths[1].unlink()
    error = refusal(paths[0])
    assert error.kind == "inconsistent"
    assert "m-00002-of-00003.gguf" in str(error)


@pytest.mark.parametrize(
    ("keys", "kind", "words"),
    [
        pytest.param([(0, 3, TOTAL), (1, 2, TOTAL), (2, 3, TOTAL)], "inconsistent", "split.count 2", id="GG23"),
        pytest.param([(0, 4, TOTAL), (1, 4, TOTAL), (2, 4, TOTAL)], "inconsistent", "as the file name says", id="GG23"),
        pytest.param([(0, 10**6, TOTAL)] * 3, "limit", "MAX_SHARDS", id="GG23"),
        pytest.param([(0, 3, TOTAL), (0, 3, TOTAL), (2, 3, TOTAL)], "inconsistent", "split.no 0", id="GG23"),
        pytest.param([(1, 3, TOTAL), (2, 3, TOTAL), (3, 3, TOTAL)], "inconsistent", "split.no 1", id="GG23"),
        pytest.param([(n, 3, TOTAL + 1) for n in range(3)], "inconsistent", "split.tensors.count", id="GG23"),
    ],
)
def test_a_set_whose_parts_disagree_is_refused(
    tmp_path: Path, keys: list[tuple[int, int, int]], kind: str, words: str
) -> None:
    error = refusal(split_set(tmp_path, keys)[0])
    assert error.kind == kind
    assert words in str(error)


@line("GG23")
def test_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    for n in range(2):
        keys = [pair("split.no", U16, n), pair("split.count", U16, 2), pair("split.tensors.count", I32, 2)]
        File([*llama().pairs, *keys], [Tensor("output_norm.weight", (64,))]).write(tmp_path / f"m-{n + 1:05}-of-00002.gguf")
    error = refusal(tmp_path)
    assert error.kind == "inconsistent"
    assert "two parts" in str(error)


@line("GG23")
def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    path = split_set(tmp_path, SOUND)[1].rename(tmp_path / "renamed.gguf")
    error = refusal(path)
    assert error.kind == "inconsistent"
    assert "NAME-00001-of-0000n.gguf" in str(error)


def test_refusals_need_no_torch_and_little_memory(tmp_path: Path) -> None:
    """A fresh process with 512 MiB of address space refuses a file that declares exabytes."""
    path = written(tmp_path, HEAD + struct.pack("<QQ", 0, 1) + raw_array("k", U8, 2**62))
    program = (
        "import resource, sys, json; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))\n"
        "from pathlib import Path\n"
        "from anybit.checkpoints.gguf import read_contents\n"
        "from anybit.errors import AnybitError\n"
        "try: read_contents(Path(sys.argv[1]))\n"
        "except AnybitError as e: print(json.dumps([e.kind, 'torch' in sys.modules]))\n"
    )
    source = Path(dialect.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    assert json.loads(done.stdout) == ["damaged", False]


def test_every_cut_and_every_flipped_header_byte_gives_our_error_or_the_same_tensors(tmp_path: Path) -> None:
    """SQLite's way with malformed files, on the small llama."""
    raw = llama().bytes_()
    header = len(llama().padded(llama().header()))
    path = tmp_path / "model.gguf"

    def outcome(content: bytes) -> None:
        path.write_bytes(content)
        try:
            contents = read_contents(path)
            dialect.declare(contents)
            for info in contents.tensors.values():
                assert info.offset + info.nbytes <= len(content)
        except AnybitError:
            pass

    for cut in range(0, header, 3):
        outcome(raw[:cut])
    for position in range(header):
        flipped = bytearray(raw)
        flipped[position] ^= 0xFF
        outcome(bytes(flipped))


def test_every_line_has_a_test() -> None:
    """The table of hostile GGUF files has the lines GG01 … GG23."""
    parametrised = {"GG21", "GG22", "GG23", *(case[0] for case in REFUSED)}
    assert LINES | parametrised == {f"GG{n:02}" for n in range(1, 24)}
