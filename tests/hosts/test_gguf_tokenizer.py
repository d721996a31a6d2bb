"""The tokenizer of a GGUF file gives the ids that llama.cpp gives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from anybit.checkpoints.gguf import read_contents
from anybit.errors import AnybitError
from anybit.hosts.gguf_tokenizer import tokenizer_from_gguf
from checkpoints.gguf_writing import BOOL, F32, I32, STRING, U32, array, llama, pair
from conftest import CHECKPOINTS, SHARED, SMOLLM2, expected, genuine, needs_shared, needs_smollm2


@pytest.mark.parametrize("name", genuine("gguf-*"))
def test_genuine_files_encode_and_decode_as_recorded(name: str) -> None:
    tokenizer = tokenizer_from_gguf(read_contents(CHECKPOINTS / name))
    recorded = expected(name)["tokenizer"]
    for case in recorded["encode"]:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]
    for case in recorded["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"], case["ids"]


@needs_smollm2
def test_the_demo_model_renders_and_encodes_the_recorded_prompts() -> None:
    assert SMOLLM2 is not None
    contents = read_contents(SMOLLM2)
    start = time.perf_counter()
    tokenizer = tokenizer_from_gguf(contents)
    assert time.perf_counter() - start < 3.0  # 0.25 s alone; the bound leaves room for a busy machine
    for chat in expected("smollm2")["chats"]:
        messages = [{"role": "user", "content": chat["user"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == chat["prompt"]
        assert tokenizer(text)["input_ids"] == chat["prompt_ids"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@needs_smollm2
@needs_shared
def test_the_evaluation_text_has_12094_tokens_and_comes_back() -> None:
    assert SMOLLM2 is not None
    assert SHARED is not None
    tokenizer = tokenizer_from_gguf(read_contents(SMOLLM2))
    text = (SHARED / "corpus" / "eval.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 12_094
    assert tokenizer.decode(ids) == text


def byte_level(pre: str | None, *more: bytes) -> list[bytes]:
    tokens = ["<s>", "</s>", "1", "2", "a", "b", "Ġ", "12"]
    pairs = [
        pair("tokenizer.ggml.model", STRING, "gpt2"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, [3, 3, 1, 1, 1, 1, 1, 1]),
        array("tokenizer.ggml.merges", STRING, ["1 2"]),
        pair("tokenizer.ggml.bos_token_id", U32, 0),
        pair("tokenizer.ggml.eos_token_id", U32, 1),
    ]
    pairs += [pair("tokenizer.ggml.pre", STRING, pre)] if pre else []
    return [*pairs, *more]


@pytest.mark.parametrize(
    ("pre", "ids"),
    [("smollm", [2, 3]), ("qwen2", [2, 3]), ("gpt-2", [7]), ("gpt-4o", [7]), ("llama-bpe", [0, 7]), (None, [7])],
)
def test_digits_split_and_begin_tokens_follow_the_family(tmp_path: Path, pre: str | None, ids: list[int]) -> None:
    contents = read_contents(llama(more=byte_level(pre)).write(tmp_path / "m.gguf"))
    assert tokenizer_from_gguf(contents)("12")["input_ids"] == ids


def test_the_file_has_the_last_word_on_begin_and_end(tmp_path: Path) -> None:
    flags = [pair("tokenizer.ggml.add_bos_token", BOOL, 1), pair("tokenizer.ggml.add_eos_token", BOOL, 1)]
    contents = read_contents(llama(more=byte_level("smollm", *flags)).write(tmp_path / "m.gguf"))
    tokenizer = tokenizer_from_gguf(contents)
    assert tokenizer("a")["input_ids"] == [0, 4, 1]
    assert tokenizer("a", "b")["input_ids"] == [0, 4, 1, 0, 5, 1]
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [4]
    off = [pair("tokenizer.ggml.add_bos_token", BOOL, 0)]
    contents = read_contents(llama(more=byte_level("llama-bpe", *off)).write(tmp_path / "m.gguf"))
    assert tokenizer_from_gguf(contents)("a")["input_ids"] == [4]


def test_control_tokens_in_a_text_are_one_token(tmp_path: Path) -> None:
    contents = read_contents(llama(more=byte_level("qwen2")).write(tmp_path / "m.gguf"))
    tokenizer = tokenizer_from_gguf(contents)
    assert tokenizer("a</s>b")["input_ids"] == [4, 1, 5]
    assert tokenizer.decode([4, 1, 5], skip_special_tokens=True) == "ab"


def test_an_unknown_split_family_or_model_is_refused(tmp_path: Path) -> None:
    contents = read_contents(llama(more=byte_level("elephant")).write(tmp_path / "m.gguf"))
    with pytest.raises(AnybitError, match="elephant") as caught:
        tokenizer_from_gguf(contents)
    assert caught.value.kind == "unsupported"
    bert = [pair("tokenizer.ggml.model", STRING, "bert")]
    with pytest.raises(AnybitError, match="bert"):
        tokenizer_from_gguf(read_contents(llama(more=bert).write(tmp_path / "m.gguf")))


def test_sentencepiece_prefers_the_better_score(tmp_path: Path) -> None:
    tokens = ["<unk>", "a", "b", "c", "ab", "bc", "\u2581", "<0x21>"]
    more = [
        pair("tokenizer.ggml.model", STRING, "llama"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.scores", F32, [0, -9, -9, -9, -5, -2, -9, 0]),
        array("tokenizer.ggml.token_type", I32, [2, 1, 1, 1, 1, 1, 1, 6]),
        pair("tokenizer.ggml.unknown_token_id", U32, 0),
    ]
    tokenizer = tokenizer_from_gguf(read_contents(llama(more=more).write(tmp_path / "m.gguf")))
    assert tokenizer("abc")["input_ids"] == [6, 1, 5]  # the space before, then a and bc
    assert tokenizer("a!")["input_ids"] == [6, 1, 7]  # a byte token
    assert tokenizer.decode([6, 1, 5]) == "abc"
