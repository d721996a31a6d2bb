"""Tasks that compile beforehand: none is lost, and few are shared out by numbers of tokens."""

from __future__ import annotations

import pytest

from anybit.cli.bench_kernels import scheme_named
from anybit.hosts.warming import Task, split, tasks_of, workers_for
from anybit.platforms import named
from anybit.schemes import dense


def task(tokens: tuple[int, ...], n: int = 64) -> Task:
    return Task(dense("bfloat16"), (n, 64), "triton-skinny", "bfloat16", tokens)


@pytest.mark.parametrize("workers", [1, 3, 16, 100])
def test_splitting_loses_no_number_of_tokens(workers: int) -> None:
    tasks = [task((1, 16, 64, 256, 512), n) for n in (64, 128, 192)]
    parts = split(tasks, workers)
    for whole in tasks:
        assert [m for part in parts if part.shape == whole.shape for m in part.tokens] == list(whole.tokens)


def test_few_tasks_are_shared_among_the_workers() -> None:
    assert len(split([task((1, 16, 64, 256))], 16)) == 4
    assert len(split([task((1, 16, 64, 256), n) for n in range(64, 96)], 16)) == 32


def test_only_what_compiles_is_a_task_and_large_weights_come_first() -> None:
    layers = [(scheme_named("int4_g128", shape), shape) for shape in ((1024, 1024), (4096, 4096))]
    found = tasks_of([(scheme, shape) for scheme, shape in layers if scheme is not None], named("h200"), "bfloat16",
                     (1, 512))
    assert {t.kernel for t in found} == {"triton-matvec", "triton-fused", "triton-expand"}
    assert [t.shape for t in found] == sorted((t.shape for t in found), reverse=True)
    assert {t.tokens for t in found if t.kernel == "triton-matvec"} == {(1,)}


def test_one_product_needs_no_other_process() -> None:
    assert workers_for(1) == 0
    assert workers_for(1, asked=5) == 5
    assert 0 < workers_for(50) <= 16
