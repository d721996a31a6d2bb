"""qmodel.pt: files written by torch.save are read without unpickling; hostile ones are refused (bad_inputs FO11, FO12)."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from writing import line

import anybit
from anybit.checkpoints.pickle_opcodes import NAMES, Machine
from anybit.errors import AnybitError
from conftest import CHECKPOINTS, genuine

M = "model.layers.0.mlp.up_proj"
GENERATOR = torch.Generator().manual_seed(2)


def folder_with(folder: Path, raw: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qmodel.pt").write_bytes(raw)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def saved(modules: dict[str, Any]) -> bytes:
    raw = io.BytesIO()
    torch.save(modules, raw)
    return raw.getvalue()


def rezipped(raw: bytes, changes: dict[str, bytes], deflate: str = "") -> bytes:
    """The archive with members replaced or added, one of them deflated."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(made, "w") as new:
        top = old.namelist()[0].split("/")[0]
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()} | changes
        for name, content in members.items():
            method = zipfile.ZIP_DEFLATED if name == deflate else zipfile.ZIP_STORED
            new.writestr(f"{top}/{name}", content, method)
    return made.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    return rezipped(saved(plain()), {"data.pkl": pickled})


def pickle_of(raw: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def plain() -> dict[str, Any]:
    return {"norm": {"weight": torch.arange(6.0).view(2, 3)}}


def refusal(folder: Path, raw: bytes) -> AnybitError:
    with pytest.raises(AnybitError) as caught:
        anybit.open(folder_with(folder, raw))
    return caught.value


def native(*, is_nested: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Any], torch.Tensor]:
    """A module as hqq 0.2 (flat) or 0.1 (in meta) writes it, 4 bits, axis 1, groups of 32; and its weight."""
    codes = torch.randint(0, 16, (32, 32), generator=GENERATOR)
    scale, zero = (torch.rand(32, 1, generator=GENERATOR).to(dtype) for _ in range(2))
    meta = {"nbits": 4, "group_size": 32, "shape": torch.Size([16, 64]), "scale": scale, "zero": zero, "axis": 1,
            "packing": "4bit_u8", "unpack_view_dtype": torch.uint8, "view_as_float": False, "quant_scale": False,
            "quant_zero": False, "compute_dtype": dtype}
    words = torch.nn.Parameter((codes[:16] << 4 | codes[16:]).to(torch.uint8), requires_grad=False)
    module = {"W_q": words, "meta": meta, "bias": None} if is_nested else {"W_q": words, "bias": None, **meta}
    return {M: module, **plain()}, ((codes.float() - zero.float()) * scale.float()).view(16, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_nested", [True, False])
def test_both_native_layouts_are_read(tmp_path: Path, is_nested: bool, dtype: torch.dtype) -> None:
    modules, wanted = native(is_nested=is_nested, dtype=dtype)
    checkpoint = anybit.open(folder_with(tmp_path, saved(modules)))
    assert checkpoint.dialect == "hqq"
    assert torch.equal(checkpoint.read(M).dequantize(), wanted)
    assert torch.equal(checkpoint.read("norm").dequantize(), torch.arange(6.0).view(2, 3))


def test_trap_8_of_hqq_meta_is_nested_zeros_are_codes_under_one_scale_and_the_bias_is_none(tmp_path: Path) -> None:
    modules, _ = native(is_nested=True, dtype=torch.float16)
    words, meta = modules[M]["W_q"], modules[M]["meta"]
    zero_codes = torch.randint(0, 256, (32, 1), generator=GENERATOR, dtype=torch.uint8)
    step, middle = torch.tensor(0.0625, dtype=torch.float16), torch.tensor(3.5, dtype=torch.float16)
    del meta["zero"]
    meta |= {"quant_zero": True, "zero_q": zero_codes, "meta_zero": {
        "nbits": 8, "group_size": None, "shape": torch.Size([32, 1]), "scale": step, "zero": middle, "axis": 0,
        "packing": "8bit_u8", "unpack_view_dtype": torch.uint8, "view_as_float": False, "channel_wise": False,
        "quant_scale": False, "quant_zero": False, "compute_dtype": torch.float16}}
    weight = anybit.open(folder_with(tmp_path, saved(modules))).read(M)
    zero = (zero_codes.float() - 3.5) * 0.0625
    codes = torch.cat((words >> 4, words & 15)).float()
    assert torch.equal(weight.dequantize(), ((codes - zero) * meta["scale"].float()).view(16, 64))
    assert weight.bias is None


def test_of_zeros_and_scales_in_one_tensor_the_zeros_are_first(tmp_path: Path) -> None:
    modules, _ = native(is_nested=True)
    meta = modules[M]["meta"]
    zero_scale = torch.stack((meta.pop("zero"), meta.pop("scale")))
    meta |= {"zero_scale": zero_scale, "offload_meta": True}
    checkpoint = anybit.open(folder_with(tmp_path, saved(modules)))
    modules[M]["meta"] |= {"zero": zero_scale[0], "scale": zero_scale[1]}
    del modules[M]["meta"]["zero_scale"]
    again = anybit.open(folder_with(tmp_path / "again", saved(modules)))
    assert torch.equal(checkpoint.read(M).dequantize(), again.read(M).dequantize())


def test_tensors_that_do_not_lie_row_by_row_are_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    views = {"a": {"weight": whole.T}, "b": {"weight": whole[1:3, 2:5]}, "c": {"weight": whole[::2]}}
    modules = {**views, **native(is_nested=False)[0]}
    checkpoint = anybit.open(folder_with(tmp_path, saved(modules)))
    for name, module in views.items():
        assert torch.equal(checkpoint.read(name).dequantize(), module["weight"])


@pytest.mark.parametrize("folder", genuine("hqq-*-pt-*"))
def test_a_genuine_file_has_the_names_of_the_table_only(folder: str) -> None:
    raw = (CHECKPOINTS / folder / "qmodel.pt").read_bytes()
    assert isinstance(Machine(pickle_of(raw), "").run(), dict)
    assert len(NAMES) == 4 + 6 + 5


def test_a_file_that_changed_after_opening_is_refused(tmp_path: Path) -> None:
    checkpoint = anybit.open(folder_with(tmp_path, saved(native(is_nested=True)[0])))
    os.utime(tmp_path / "qmodel.pt", ns=(1, 1))
    with pytest.raises(AnybitError) as caught:
        checkpoint.read(M)
    assert caught.value.kind == "damaged"


# --- FO11: what would run code -----------------------------------------------------------------------------------------

class Calls:
    """Pickled, it calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQ"
HOOKS = b"\x89ccollections\nOrderedDict\n)R"
HOSTILE = {
    "os system": pickle.dumps(Calls(os.system, "exit 3"), protocol=2),
    "eval": pickle.dumps(Calls(eval, "1"), protocol=2),
    "a ninth global": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.",
    "a name of two dots": b"\x80\x02ctorch\nstorage.os.system\n.",
    "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93.",
    "BUILD": b"\x80\x02}}b.",
    "INST": b"\x80\x02(ios\nsystem\n.",
    "OBJ": b"\x80\x02(ctorch\nSize\no.",
    "NEWOBJ": b"\x80\x02ctorch\nSize\n)\x81.",
    "EXT1": b"\x80\x02\x82\x01.",
    "a foreign persistent id": b"\x80\x02" + text("module") + b"Q.",
    "a persistent id of a path": b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + text("../0") + text("cpu")
                                 + b"K\x06tQ.",
    "calling a dtype": b"\x80\x02ctorch\nfloat16\n)R.",
    "calling a storage type": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "calling a dictionary": b"\x80\x02})R.",
}


@line("FO11")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_would_run_code_is_unsafe(name: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, with_pickle(HOSTILE[name])).kind == "unsafe"


# --- FO12: what does not fit -------------------------------------------------------------------------------------------

def tensor(offset: int, shape: tuple[int, int], strides: tuple[int, int]) -> bytes:
    """A pickle of one tensor over the storage of 6 floats."""
    def number(value: int) -> bytes:
        return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)

    def pair(values: tuple[int, int]) -> bytes:
        return number(values[0]) + number(values[1]) + b"\x86"

    made = TENSOR + b"(" + STORAGE + number(offset) + pair(shape) + pair(strides) + HOOKS + b"tR"
    return b"\x80\x02}" + text("norm") + b"}" + text("weight") + made + b"ss."


def test_the_pickle_written_by_hand_is_sound(tmp_path: Path) -> None:
    raw = with_pickle(tensor(0, (2, 3), (3, 1)))
    assert torch.equal(anybit.open(folder_with(tmp_path, raw)).read("norm").dequantize(), torch.arange(6.0).view(2, 3))


@line("FO12")
@pytest.mark.parametrize("view", [
    (1, (2, 3), (3, 1)), (0, (2, 3), (4, 1)), (0, (2, 4), (3, 1)), (-1, (2, 3), (3, 1)), (0, (2, 3), (-3, 1)),
    (0, (2**40, 1), (0, 0)), (2**60, (2, 3), (3, 1)), (0, (2**31, 2**31), (1, 1)),
])
def test_a_view_past_its_storage_is_damaged(view: tuple[int, tuple[int, int], tuple[int, int]], tmp_path: Path) -> None:
    assert refusal(tmp_path, with_pickle(tensor(*view))).kind == "damaged"


@line("FO12")
@pytest.mark.parametrize("size", [0, 23, 25, 4096])
def test_a_storage_that_does_not_fill_its_member_is_damaged(size: int, tmp_path: Path) -> None:
    assert refusal(tmp_path, rezipped(saved(plain()), {"data/0": bytes(size)})).kind == "damaged"


@line("FO12")
def test_a_deflated_member_is_damaged_whatever_it_holds(tmp_path: Path) -> None:
    for member in ("data/0", "data.pkl"):
        raw = rezipped(saved(plain()), {"data/9": bytes(10**7)}, deflate=member)
        assert "stored" in refusal(tmp_path / member.replace("/", "_"), raw).problem


@line("FO12")
@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "x\\y", "a//b"])
def test_a_member_of_an_odd_name_is_damaged(name: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, rezipped(saved(plain()), {name: b"x"})).kind == "damaged"


@line("FO12")
@pytest.mark.parametrize("pickled", [
    b"\x80\x02" + b"(" * 10**6 + b".", b"\x80\x02" + b"}" * 10**6 + b".", b"\x80\x02)" + b"\x85" * 10**6 + b".",
    b"\x80\x02", b"", b"\x80\x02}", b"\x80\x02}.x", b"\x80\x02.", b"\x80\x02t.", b"\x80\x02h\x07.", b"\x80\x02X\xff\xff",
    b"\x80\x02}" + text("a") + b"Ns.", b"\x80\x02}NNs.", b"\x80\x02X\1\0\0\0\xff.", b"\x80\x02}q\0" + text("a") + b"h\0s.",
])
def test_a_malformed_pickle_is_refused_at_once(pickled: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path, with_pickle(pickled)).kind in ("damaged", "inconsistent", "limit")


def shared(levels: int) -> bytes:
    """Opcodes of a dictionary whose hundred values are one dictionary, and so on down."""
    if levels == 0:
        return b"}"
    others = b"".join(text(str(key)) + b"h" + bytes([levels]) for key in range(1, 100))
    return b"}(" + text("0") + shared(levels - 1) + b"q" + bytes([levels]) + others + b"u"


@line("FO12")
def test_dictionaries_shared_many_times_over_end_early(tmp_path: Path) -> None:
    """A hundred keys a level, four levels: a hundred million values from three kilobytes."""
    assert refusal(tmp_path, with_pickle(b"\x80\x02" + shared(4) + b".")).kind == "limit"


@line("FO12")
def test_a_byte_of_the_pickle_changed_is_damaged(tmp_path: Path) -> None:
    raw = bytearray(saved(plain()))
    raw[raw.index(b"norm")] ^= 1
    assert "checksum" in refusal(tmp_path, bytes(raw)).problem


@line("FO12")
@pytest.mark.parametrize("keep", [0, 10, 100, 700])
def test_a_file_cut_short_is_damaged(keep: int, tmp_path: Path) -> None:
    assert refusal(tmp_path, saved(plain())[:keep]).kind == "damaged"
