"""The tokenizer of a GGUF file gives the ids that llama.cpp gives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from anybit.checkpoints.gguf import read_contents
from anybit.errors import AnybitError
from anybit.hosts.gguf_tokenizer import tokenizer_from_gguf
from checkpoints.gguf_writing import BOOL, F32, I32, STRING, U32, Tensor, array, llama, pair
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
    start = time.process_time()
    tokenizer = tokenizer_from_gguf(contents)
    assert time.process_time() - start < 3.0  # 0.3 s; the bound leaves room for slower machines
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


# Small vocabularies, and the ids that llama.cpp 0c1e57098 (llama-cpp-python 0.3.36) gives for them ------------------


def unigram(prefix: bool = True, merge_spaces: bool = True) -> list[bytes]:
    tokens = ["<pad>", "</s>", "<unk>", "\u2581", "a", "b", "ab", "\u2581a", "ba", "<x>"]
    return [
        pair("tokenizer.ggml.model", STRING, "t5"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.scores", F32, [0, 0, 0, -2, -4, -4, -5, -3, -4.5, 0]),
        array("tokenizer.ggml.token_type", I32, [3, 3, 2, 1, 1, 1, 1, 1, 1, 4]),
        pair("tokenizer.ggml.add_space_prefix", BOOL, prefix),
        pair("tokenizer.ggml.remove_extra_whitespaces", BOOL, merge_spaces),
    ]


def merged_sentencepiece() -> list[bytes]:
    tokens = ["<pad>", "<eos>", "<unk>", "<bos>", "\u2581", "a", "b", "\u2581a", "ab", "<0xC3>", "<0xA9>", "\n", "\n\n"]
    return [
        pair("tokenizer.ggml.model", STRING, "gemma4"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.scores", F32, [0] * len(tokens)),
        array("tokenizer.ggml.token_type", I32, [3, 3, 2, 3, 1, 1, 1, 1, 1, 6, 6, 1, 1]),
        array("tokenizer.ggml.merges", STRING, ["\u2581 a", "a b", "\n \n"]),
        pair("tokenizer.ggml.bos_token_id", U32, 3),
        pair("tokenizer.ggml.unknown_token_id", U32, 2),
        pair("tokenizer.ggml.add_bos_token", BOOL, 1),
    ]


def phi3() -> list[bytes]:
    tokens = ["<unk>", "<s>", "</s>", "<|end|>", "\u2581", "a", "<0x0A>", "<|endoftext|>"]
    return [
        pair("general.name", STRING, "Phi-3 Mini"),
        pair("tokenizer.ggml.model", STRING, "llama"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.scores", F32, [0, 0, 0, 0, -1, -1, 0, 0]),
        array("tokenizer.ggml.token_type", I32, [2, 3, 3, 3, 1, 1, 6, 3]),
        pair("tokenizer.ggml.bos_token_id", U32, 1),
        pair("tokenizer.ggml.eos_token_id", U32, 2),
        pair("tokenizer.ggml.unknown_token_id", U32, 0),
    ]


def small_words(pre: str) -> list[bytes]:
    letters = [*"abc123.,`", "Ġ", "Ċ"]
    joined = ["12", "123", "a.", ".,", ",a", "ĠĠ", "ab", "Ġa", "1.", "a1", "`a"]
    return [
        pair("tokenizer.ggml.model", STRING, "gpt2"),
        pair("tokenizer.ggml.pre", STRING, pre),
        array("tokenizer.ggml.tokens", STRING, [*letters, *joined]),
        array("tokenizer.ggml.token_type", I32, [1] * len([*letters, *joined])),
        array("tokenizer.ggml.merges", STRING,
              ["1 2", "12 3", "a .", ". ,", ", a", "Ġ Ġ", "a b", "Ġ a", "1 .", "a 1", "` a"]),
    ]  # fmt: skip


SMALL = {
    "t5": (unigram(), {"ab a": [3, 6, 7, 1], " a  b ": [7, 3, 5, 1], "": [1],
                         "a<x>b": [7, 9, 3, 5, 1], "aé": [7, 2, 1], "</s>a": [1, 7, 1]}),
    "t5, no prefix": (unigram(prefix=False), {"ab a": [3, 6, 7, 1]}),
    "t5, spaces kept": (unigram(merge_spaces=False), {" a  b ": [3, 7, 3, 3, 5, 3, 1]}),
    "gemma4": (merged_sentencepiece(), {"a ab": [3, 5, 7, 6], "a\n\nb": [3, 5, 12, 6],
                                        "é": [3, 9, 10], "<eos>a": [3, 1, 5]}),
    "phi3": (phi3(), {"a<|end|> a": [1, 4, 5, 3, 4, 5], "<|endoftext|> a": [1, 7, 4, 4, 5], "a\n": [1, 4, 5, 6]}),
    "falcon": (small_words("falcon"), {"a.,a 1231": [0, 14, 0, 9, 12, 3], "1.a": [3, 6, 0], "a  b": [0, 9, 9, 1],
                                      "`a": [8, 0]}),
    "bloom": (small_words("bloom"), {"a.,a 123": [0, 14, 0, 9, 12], "a  a1": [0, 9, 18, 3], "ab,a": [17, 7, 0]}),
    "viking": (small_words("viking"), {"a.,a 123": [0, 14, 0, 9, 3, 4, 5]}),
    "qwen35": (small_words("qwen35"), {"a.,a 123": [0, 14, 0, 9, 3, 4, 5], ".a": [6, 0]}),
    "minimax-m2": (small_words("minimax-m2"), {"a.,a 1231": [0, 14, 0, 9, 12, 3]}),
    "deepseek-coder": (small_words("deepseek-coder"), {"a.,a 123\n": [0, 14, 0, 9, 3, 4, 5, 10]}),
    "seed-coder": (small_words("seed-coder"), {"a.,\n a 12": [0, 14, 10, 18, 9, 3, 4]}),
    "bailingmoe": (small_words("bailingmoe"), {"a.,\n\n a 12": [0, 14, 10, 10, 18, 9, 3, 4]}),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_vocabularies_give_the_ids_of_llama_cpp(name: str, tmp_path: Path) -> None:
    more, cases = SMALL[name]
    file = llama(more=more)
    file.tensors[0] = Tensor("token_embd.weight", (64, 32), 2)
    tokenizer = tokenizer_from_gguf(read_contents(file.write(tmp_path / "m.gguf")))
    assert {text: tokenizer(text)["input_ids"] for text in cases} == cases
