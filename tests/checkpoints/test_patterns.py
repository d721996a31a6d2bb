"""Patterns of checkpoints: each kind's meaning, and bounded time for hostile ones."""

from __future__ import annotations

import fnmatch
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anybit import limits
from anybit.checkpoints.patterns import Patterns
from anybit.errors import Damaged, LimitExceeded, Unsafe

NAMES = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.10.mlp.gate"]


def test_match_is_anchored_at_the_start_only() -> None:
    found = Patterns.match([r"model\.layers\.1", "lm"], where="here")
    assert [found.first(name) for name in NAMES] == [1, None, 0, 0]


def test_search_finds_anywhere_and_fullmatch_nowhere_else() -> None:
    assert Patterns.search(["down"], where="here").first(NAMES[2]) == 0
    assert Patterns.fullmatch(["lm_head", ".*gate"], where="here").first(NAMES[3]) == 1
    assert Patterns.fullmatch(["lm"], where="here").first("lm_head") is None


def test_the_first_pattern_in_order_wins() -> None:
    assert Patterns.fnmatch(["*", "lm_head"], where="here").first("lm_head") == 0
    assert Patterns.fnmatch(["lm_head", "*"], where="here").first("lm_head") == 0


@given(st.text("ab.*?[]!-x", max_size=8), st.text("ab.x-]", max_size=6))
def test_shell_patterns_mean_what_fnmatch_means(pattern: str, name: str) -> None:
    try:
        wanted = fnmatch.fnmatchcase(name, pattern)
    except Exception:
        return
    ranges = pattern.count("[") and "-" in pattern  # ranges like [b-a]: refused or empty, both are fine
    try:
        found = Patterns.fnmatch([pattern], where="here").first(name) is not None
    except Damaged:
        assert ranges or "[" in pattern
        return
    assert found == wanted or ranges or "[" in pattern


@pytest.mark.parametrize(("pattern", "name", "wanted"), [
    ("model.layers.[0-3].*", "model.layers.2.mlp", True),
    ("model.layers.[!0-3].*", "model.layers.2.mlp", False),
    ("model.layers.?.mlp", "model.layers.10.mlp", False),
    ("*self_attn*", "model.layers.0.self_attn.q_proj", True),
    ("*.q_proj", "model.layers.0.self_attn.q_proj.x", False),
])  # fmt: skip
def test_shell_patterns(pattern: str, name: str, wanted: bool) -> None:
    assert (Patterns.fnmatch([pattern], where="here").first(name) is not None) is wanted


def test_look_ahead_works_although_re2_lacks_it() -> None:
    found = Patterns.match([r"^(?!.*experts).*$"], where="here")
    assert found.first("model.layers.0.mlp.down_proj") == 0
    assert found.first("model.layers.0.mlp.experts.3.down_proj") is None


@pytest.mark.parametrize("pattern", [r"^(.*\.)*(.*)*$x", r"(a|aa)+$"])
def test_patterns_that_explode_cost_nothing_in_re2(pattern: str) -> None:
    start = time.process_time()
    assert Patterns.search([pattern], where="here").first("a" * 60 + "b") is None
    assert time.process_time() - start < 0.5


def test_patterns_that_explode_with_look_ahead_are_unsafe() -> None:
    found = Patterns.match([r"^(?:(a|aa)(?!x))+[bd]$"], where="config.json")
    start = time.process_time()
    with pytest.raises(Unsafe, match="takes too long"):
        found.first("a" * 60 + "c")
    assert time.process_time() - start < 5


def test_a_pattern_that_does_not_compile_is_damaged() -> None:
    with pytest.raises(Damaged):
        Patterns.match(["["], where="config.json")


def test_too_many_or_too_long_patterns_are_limited() -> None:
    with pytest.raises(LimitExceeded, match="MAX_PATTERNS"):
        Patterns.match(["a"] * (limits.MAX_PATTERNS + 1), where="here")
    with pytest.raises(LimitExceeded, match="MAX_PATTERN_CHARS"):
        Patterns.match(["a" * (limits.MAX_PATTERN_CHARS + 1)], where="here")


def test_long_lists_of_names_are_looked_up() -> None:
    names = [f"model.layers.{i}.mlp" for i in range(100_000)]
    found = Patterns.fnmatch(names, where="here")
    start = time.process_time()
    assert all(found.first(name) == i for i, name in enumerate(names))
    assert time.process_time() - start < 2


def test_a_hundred_thousand_regexes_are_matched_together() -> None:
    start = time.process_time()
    found = Patterns.match((rf".*layers\.{n}\.up$" for n in range(limits.MAX_PATTERNS)), where="here")
    assert [found.first(f"model.layers.{n}.up") for n in (0, 777, 99_999)] == [0, 777, 99_999]
    assert found.first("model.layers.100000.up") is None
    assert time.process_time() - start < 15


def test_patterns_too_large_together_are_matched_one_by_one() -> None:
    found = Patterns.search([f"a{{{n}}}b{{1000}}.{{1000}}" for n in range(1, 301)], where="here")
    assert found.first("a" * 7 + "b" * 1000 + "c" * 1000) == 0
    assert found.all("a" * 3 + "b" * 1000 + "c" * 1000) == [0, 1, 2]
