"""How a recipe of `--quantization` is written: as text, JSON or vLLM's quantization_config. Torch-free.

    nvfp4                                                every linear layer and expert
    nvfp4,re:.*down_proj=fp8_per_channel,*.o_proj=none   but some otherwise, some not at all
    re:.*mlp.*=mxfp4                                     nothing but these
    {"name": "fp8_per_tensor", "moe": "fp8_per_block"}   vLLM's keys: linear, moe, ignore, targets

What rules mean: `online_rules.py`. Source of vLLM's keys: vLLM 0.30, vllm/config/quantization.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Final

from anybit.checkpoints.online_rules import NONE, WHERE, Online, Targets, is_none, sorted_targets
from anybit.checkpoints.online_schemes import WEIGHT_ONLY, online_scheme
from anybit.errors import LimitExceeded, Unsupported
from anybit.limits import MAX_CONFIG_JSON

__all__ = ["Quantization", "online", "online_list"]

_ENDS: Final = re.compile(r"(?<![?<])=\s*\w+\s*$")  # RULE=NAME is complete; the = of a look-around is the pattern's

Quantization = str | Online | Mapping[str, object]
"""What `quantization=` takes: a name, text with rules, an Online, or vLLM's quantization_config."""


def online(
    quantization: Quantization | None, targets: Targets | None = None, ignore: Sequence[str] | str | None = None
) -> Online | None:
    """`quantization` with further rules as an Online; None for None and "none" without rules.

    Raises Unsupported for anything else that is not in the module's text.
    """
    if isinstance(quantization, str):
        recipes = online_list(quantization)
        if len(recipes) > 1:
            raise Unsupported("more than one scheme for the same layers", where=WHERE, found=quantization,
                              wanted="one name, then RULE=NAME", remedy="say which layers the second is for: "
                              f"{recipes[0] or NONE},Linear={recipes[1] or NONE}")
        quantization = recipes[0] if recipes else None
    elif isinstance(quantization, Mapping):
        quantization = _of_config(quantization)
    if quantization is not None and not isinstance(quantization, Online):
        raise _no_recipe(quantization)
    if not targets and not ignore:
        return quantization
    more = [ignore] if isinstance(ignore, str) else [*(ignore or ())]
    if quantization is None:
        return Online(None, targets or (), more)
    alone, pairs = sorted_targets(targets or ())
    if not alone:
        return Online(quantization.name, [*quantization.targets, *pairs], [*quantization.ignore, *more])
    only = Online(quantization.name, alone)
    return Online(None, [*quantization.targets, *pairs, *only.targets], [*quantization.ignore, *more])


def online_list(text: str) -> list[Online | None]:
    """Text with several recipes: each bare name begins one, a RULE=NAME belongs to the one before; None for "none".

    >>> [str(recipe) for recipe in online_list("none,nvfp4,*.o_proj=mxfp8,int4_g128")]
    ['None', 'nvfp4,*.o_proj=mxfp8', 'int4_g128']
    """
    if text.lstrip().startswith("{"):
        return [_of_json(text)]
    found: list[tuple[str | None, list[tuple[str, str]]]] = []
    for entry in _entries(text):
        rule, equals, name = entry.rpartition("=")
        if not equals:
            found.append((entry, []))
            continue
        if not found:
            found.append((None, []))
        found[-1][1].append((rule.strip(), name.strip()))
    return [None if (base is None or is_none(base)) and not pairs else Online(base, pairs) for base, pairs in found]


def _entries(text: str) -> Iterator[str]:
    """The fields between commas; a comma in a regular expression is its own, such a field ends with =NAME."""
    pending = ""
    for piece in text.split(","):
        pending = f"{pending},{piece}" if pending else piece.strip()
        if pending.startswith("re:") and not _ENDS.search(pending):
            continue
        if not pending.strip():
            raise Unsupported("an empty field", where=WHERE, found=repr(text), wanted="NAME or RULE=NAME",
                              remedy="leave the comma out")
        yield pending.strip()
        pending = ""
    if pending:
        raise Unsupported("a rule without a scheme", where=WHERE, found=pending, wanted="RULE=NAME",
                          remedy=f"{pending}=fp8_per_channel, or {pending}=none, or --quantize-only '{pending}'")


def _no_recipe(found: object) -> Unsupported:
    return Unsupported("no quantization", where=WHERE, found=f"{type(found).__name__} {found!r}"[:200],
                       wanted="a name, text, an Online or a mapping", remedy='quantization="nvfp4"')


_KEYS: Final = ("name", "linear", "moe", "ignore", "targets")
_KEYS_BEFORE: Final = {"global_scheme": "name", "linear_scheme_override": "linear", "moe_scheme_override": "moe"}
# vLLM's names of weight formats -> ours
_WEIGHTS: Final = {
    "fp8_per_tensor_static": "fp8_per_tensor", "fp8_per_channel_static": "fp8_per_channel",
    "fp8_per_block_static": "fp8_per_block", "int8_per_channel_static": "int8_per_channel",
}  # fmt: skip
# vLLM's names of activation formats -> (element, granularity) of ours
_ACTIVATIONS: Final = {
    "fp8_per_token": ("fp8_e4m3fn", "token"), "fp8_per_block_dynamic": ("fp8_e4m3fn", "g128"),
    "mxfp8": ("fp8_e4m3fn", "g32"), "mxfp4": ("fp4_e2m1", "g32"),
}  # fmt: skip


def _of_json(text: str) -> Online | None:
    if len(text) > MAX_CONFIG_JSON:
        raise LimitExceeded("the quantization is too long", where=WHERE, found=f"{len(text):,} characters",
                            wanted=f"at most {MAX_CONFIG_JSON:,} (MAX_CONFIG_JSON)")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unsupported("no JSON", where=WHERE, found=text[:200], wanted='{"name": "nvfp4", "ignore": ["lm_head"]}',
                          remedy=str(error)) from error
    return _of_config(data)


def _of_config(data: Mapping[str, object]) -> Online | None:
    """vLLM's keys, and `name` for what vLLM has as --quantization beside them."""
    facts = {_KEYS_BEFORE.get(key, key): value for key, value in data.items()}
    for key in facts:
        if key not in _KEYS:
            near = get_close_matches(str(key), [*_KEYS, *_KEYS_BEFORE], n=1)
            raise Unsupported(f"no such key: {key!r}", where=WHERE, found=", ".join(map(str, data)),
                              wanted=", ".join(_KEYS), remedy=f"perhaps {near[0]}" if near else "leave it out")
    base, ignore, targets = facts.get("name"), facts.get("ignore") or [], facts.get("targets")
    if base is not None and not isinstance(base, str):
        raise _no_recipe(base)
    if not isinstance(ignore, list | tuple) or not all(isinstance(rule, str) for rule in ignore):
        raise Unsupported("no list of rules", where="ignore", found=repr(ignore)[:200], wanted='["lm_head", "re:..."]')
    if targets is not None:
        if not isinstance(targets, Mapping) or "linear" in facts or "moe" in facts:
            raise Unsupported("targets beside linear or moe, or no mapping", where="targets",
                              found=repr(targets)[:200], wanted='{"re:.*o_proj": "fp8_per_block"} alone')
        return Online(base, targets, ignore)
    kinds = [_of_spec(key, facts[key], base) if key in facts else base for key in ("linear", "moe")]
    linear, moe = (None if name is None or is_none(name) else name for name in kinds)
    if linear is None and moe is None:
        return None
    if linear is not None and linear != base and online_scheme(linear).experts_only:
        raise Unsupported(f"{linear} is for experts alone", where="linear", wanted="a scheme for linear layers",
                          remedy=f'{{"moe": "{linear}"}}')
    if linear is None:
        return Online(None, {"experts": moe}, ignore)
    if moe is None:
        return Online(linear, (), [*ignore, "experts"])
    return Online(linear, {"experts": moe} if moe != linear else (), ignore)


def _of_spec(key: str, spec: object, base: str | None) -> str | None:
    """The name for one of vLLM's QuantSpecs: a name, or weight and activation; None leaves the layers."""
    if spec is None or isinstance(spec, str):
        return _WEIGHTS.get(spec, spec) if spec else base
    if not isinstance(spec, Mapping) or not set(spec) <= {"weight", "activation"}:
        raise Unsupported("no quantization of a kind of layers", where=key, found=repr(spec)[:200],
                          wanted='a name, or {"weight": name, "activation": name}')
    weight = spec.get("weight", base)
    if weight is None:
        return None
    name = _WEIGHTS.get(str(weight), str(weight))
    chosen = online_scheme(name).scheme.activation
    if "activation" not in spec or (chosen is None and spec["activation"] is None):
        return name
    wanted = spec["activation"]
    if wanted is None:
        return name + WEIGHT_ONLY
    granularity = str(chosen).split()[-1] if chosen is not None else ""
    if chosen is None or _ACTIVATIONS.get(str(wanted)) != (chosen.element, granularity):
        raise Unsupported(f"{weight} weights with {wanted} activations", where=key, found=repr(dict(spec))[:200],
                          wanted=f"{chosen or 'no activation quantization'}",
                          remedy='leave "activation" out, or null for weight-only')
    return name
