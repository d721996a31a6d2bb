"""A transformers tokenizer out of a GGUF file's metadata, with the ids that llama.cpp gives.

Built with the `tokenizers` library directly: transformers' own conversion reads the file a second time and knows no
split expression for some families (smollm, default). Expressions are those of the models' own tokenizer.json files, as
llama.cpp groups them. Source: llama.cpp 0c1e57098 (llama-vocab.cpp), docs/formats/gguf.md §6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from anybit.checkpoints.contents import Contents
from anybit.checkpoints.gguf_tokenizer import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, TokenizerData, tokenizer_data
from anybit.errors import AnybitError, Inconsistent, Unsupported

__all__ = ["tokenizer_from_gguf"]

_SPACE: Final = "\u2581"  # sentencepiece's sign for a space

# split expressions; all but the last of a family cut pieces that later ones cut further
_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT_FORMS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = _SHORT_FORMS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_QWEN2: Final = _SHORT_FORMS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD: Final = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN: Final = rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + _REST
_GPT4O: Final = (
    rf"{_HEAD}{_UPPER}*{_LOWER}+{_SHORT_FORMS}?|{_HEAD}{_UPPER}+{_LOWER}*{_SHORT_FORMS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST
)
_QWEN35: Final = (
    _SHORT_FORMS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _REST
)
_SEED: Final = _SHORT_FORMS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _REST
_BAILING: Final = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM: Final = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{0964}\x{06D4}\x{060C})]+"
_HAN: Final = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK_CODER: Final = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")
_FALCON: Final = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEEPSEEK3: Final = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _REST,
)


@dataclass(frozen=True)
class _Family:
    """How a family of byte-level BPE tokenizers splits text, and llama.cpp's word where a file says nothing.

    whole_words  a piece that is a token by itself is taken without merging
    """

    splits: tuple[str, ...]
    add_bos: bool = False
    whole_words: bool = False


_LLAMA3_FAMILY: Final = _Family((_LLAMA3,), add_bos=True, whole_words=True)
_QWEN2_FAMILY: Final = _Family((_QWEN2,))
_DIGITS_FAMILY: Final = _Family((r"\p{N}", _GPT2))
_GPT2_FAMILY: Final = _Family((_GPT2,))
_GPT4O_FAMILY: Final = _Family((_GPT4O,))
_DEEPSEEK3_FAMILY: Final = _Family(_DEEPSEEK3)

# tokenizer.ggml.pre -> family
_FAMILIES: Final = {
    "default": _Family((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        _LLAMA3_FAMILY,
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), _Family((_LLAMA3,))),
    **dict.fromkeys(("glm4", "glm5"), _Family((_LLAMA3,), whole_words=True)),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "kormo", "hunyuan", "grok-2", "f2llmv2", "solar-open"),
        _QWEN2_FAMILY,
    ),
    "qwen35": _Family((_QWEN35,)),
    "seed-coder": _Family((_SEED,)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _Family((_BAILING,))),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        _DIGITS_FAMILY,
    ),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat",
         "a.x-4.0", "mellum"),
        _GPT2_FAMILY,
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _GPT4O_FAMILY),
    "falcon": _Family(_FALCON),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _Family((_BLOOM,))),
    "viking": _Family((_BLOOM, r"\p{N}")),
    "deepseek-coder": _Family(_DEEPSEEK_CODER),
    "tekken": _Family((_TEKKEN,), add_bos=True, whole_words=True),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), _DEEPSEEK3_FAMILY),
}


def tokenizer_from_gguf(contents: Contents) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, chat template included.

    Raises Unsupported for a tokenizer or split family that is not known here, Inconsistent for parts that do not fit.
    """
    data = tokenizer_data(contents)
    where = contents.path.name
    try:
        tokenizer = _byte_level(data, where) if data.model == "gpt2" else _OTHERS[data.model](data)
    except AnybitError:
        raise
    except Exception as error:  # tokenizers raises it bare, whatever does not suit it
        raise Inconsistent("the tokenizer's parts do not fit together", where=where, found=str(error)[:200],
                           wanted="merges of tokens that the vocabulary holds") from error
    _add_special(tokenizer, data)
    _add_ends(tokenizer, data)
    names = {f"{name}_token": data.tokens[index] for name, index in data.special.items()}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=data.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=data.context_length or int(1e30),
        **names,
    )


def _byte_level(data: TokenizerData, where: str) -> Tokenizer:
    family = _FAMILIES.get(data.pre)
    if family is None:
        raise Unsupported("the file's tokenizer splits text in a way that is not known here", where=where,
                          found=f"tokenizer.ggml.pre {data.pre!r:.80}", wanted=", ".join(_FAMILIES),
                          remedy="give a folder with tokenizer.json")
    vocabulary = {token: index for index, token in enumerate(data.tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _known(data.merges, vocabulary), ignore_merges=family.whole_words))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in family.splits]
    # add_space_prefix is sentencepiece's: llama.cpp does not look at it here
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _known(merges: list[tuple[str, str]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merges of tokens into a token; what llama.cpp makes of others ends as single bytes."""
    return [
        pair for pair in merges if pair[0] in vocabulary and pair[1] in vocabulary and pair[0] + pair[1] in vocabulary
    ]


def _sentencepiece(data: TokenizerData) -> Tokenizer:
    """BPE by scores: any two neighbours that make a token may merge, the best score first."""
    vocabulary = {token: index for index, token in enumerate(data.tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges_by_score(data, vocabulary),
            unk_token=data.tokens[data.special["unk"]] if "unk" in data.special else _first_unknown(data),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    strip: list[decoders.Decoder] = []
    if data.add_space_prefix is not False:
        steps.insert(0, normalizers.Prepend(_SPACE))
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _unigram(data: TokenizerData) -> Tokenizer:
    """The most probable pieces by the sum of their scores; what is defined by the user costs nothing."""
    scores = [
        0.0 if kind == USER_DEFINED else score for score, kind in zip(data.scores, data.types, strict=True)
    ]
    # control tokens and unused places are found only as themselves
    hidden = {i for i, kind in enumerate(data.types) if kind in (UNKNOWN, CONTROL, UNUSED)}
    pieces = [
        (token, min(data.scores) - 1e3 if i in hidden else score)
        for i, (token, score) in enumerate(zip(data.tokens, scores, strict=True))
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, data.special.get("unk"), byte_fallback=False))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(data.charsmap)] if data.charsmap else []
    merges_spaces = data.remove_extra_whitespaces is True
    if merges_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if merges_spaces or data.add_space_prefix is not False:  # llama.cpp: merged, every word has its space
        steps.append(normalizers.Replace(Regex(r"\A(?= *[^ ])"), " "))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def _merged_sentencepiece(data: TokenizerData) -> Tokenizer:
    """BPE by stated merges over sentencepiece's alphabet, lines and line ends apart."""
    vocabulary = {token: index for index, token in enumerate(data.tokens)}
    unknown = data.tokens[data.special["unk"]] if "unk" in data.special else _first_unknown(data)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _known(data.merges, vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


_OTHERS: Final[Mapping[str, Callable[[TokenizerData], Tokenizer]]] = {
    "llama": _sentencepiece, "t5": _unigram, "gemma4": _merged_sentencepiece,
}  # fmt: skip


def _first_unknown(data: TokenizerData) -> str | None:
    return next((token for token, kind in zip(data.tokens, data.types, strict=True) if kind == UNKNOWN), None)


def _merges_by_score(data: TokenizerData, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    special = {i for i, kind in enumerate(data.types) if kind in (UNKNOWN, CONTROL)}
    ranked = []
    for index, token in enumerate(data.tokens):
        if index in special or len(token) < 2:
            continue
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-data.scores[index], left, right))
    ranked.sort()
    return [(data.tokens[left], data.tokens[right]) for _, left, right in ranked]


def _add_special(tokenizer: Tokenizer, data: TokenizerData) -> None:
    """Control tokens are found in text before anything splits it, and left out of decoded text on request."""
    typed = list(zip(data.tokens, data.types, strict=True))
    named = {data.tokens[index] for index in data.special.values()}
    control = [t for t, kind in typed if kind in (CONTROL, UNKNOWN) or t in named]
    defined = [t for t, kind in typed if kind == USER_DEFINED and t not in named]
    swallowing = set(control) - {"<unk>", "<s>", "<|endoftext|>"} if data.is_phi3 else set()
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, rstrip=t in swallowing) for t in control if t]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in defined if t])


def _add_ends(tokenizer: Tokenizer, data: TokenizerData) -> None:
    """Begin and end tokens around a text, where the file or llama.cpp's rule wants them."""
    family = _FAMILIES.get(data.pre)
    add_bos = data.add_bos
    if add_bos is None:
        add_bos = data.model == "llama" or (family is not None and family.add_bos)
    before = [data.special["bos"]] if add_bos and "bos" in data.special else []
    add_eos = data.model == "t5" if data.add_eos is None else data.add_eos
    after = [data.special["eos"]] if add_eos and "eos" in data.special else []
    if not before and not after:
        return
    # names of our own: in a template a colon separates the segment, and a token may hold one
    first = [*(["bos"] if before else []), "$A", *(["eos"] if after else [])]
    second = [*(["bos:1"] if before else []), "$B:1", *(["eos:1"] if after else [])]
    special = [
        {"id": name, "ids": ids, "tokens": [data.tokens[ids[0]]]}
        for name, ids in (("bos", before), ("eos", after))
        if ids
    ]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=first, pair=[*first, *second], special_tokens=special
    )
