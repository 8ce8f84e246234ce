"""Protect long runs from what grows: a short version of tests/benchmarks/long_run.py.

Run: pytest tests/scripts/test_long_run.py
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers.benchmarks import benchmark_module


@pytest.fixture(scope="module")
def benchmark():
    with benchmark_module("long_run") as module:
        yield module


@pytest.fixture
def flat(benchmark):
    return [benchmark.Look(10 * i, 300, 5000, 9, 4, 400.0, 0.1) for i in range(1, 10)]


@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_tensors_files_and_threads_do_not_grow(script, benchmark, tmp_path):
    """Memory takes longer to settle: the benchmark looks at it over 1,000 steps."""
    looks = benchmark.looks_of(script, "qwen2_5_vl", 12, 2, tmp_path, often=6)
    assert [look.step for look in looks] == list(range(2, 14, 2))
    assert looks[0].tensors > 100 and looks[0].tensor_bytes > 100_000 and looks[0].files > 2
    grew = [line for line in benchmark.growth(looks) if not line.startswith(("memory", "files"))]
    assert grew == []
    assert looks[-1].files <= looks[0].files + 2  # an event file may be open at one look


def test_what_does_not_grow_is_not_told(benchmark, flat):
    growth, history = benchmark.growth, benchmark.HISTORY
    assert growth(flat) == []
    kept = [dataclasses.replace(look, memory=400 + history * look.step) for look in flat]
    warming = [dataclasses.replace(look, tensors=200 + i) for i, look in enumerate(flat[:3])]
    assert growth(kept) == growth([*warming, *flat[3:]]) == []


@pytest.mark.parametrize(
    ("name", "each", "told"),
    [
        ("tensors", 1, "tensors grew from 305.0 to 308.0 in 30 steps"),
        ("files", 1, "files grew from 14.0 to 17.0 in 30 steps"),
        ("threads", 1, "threads grew from 9.0 to 12.0 in 30 steps"),
        ("tensor_bytes", 100, "tensor_bytes grew from 5,500.0 to 5,800.0 in 30 steps"),
        ("memory", 2.0, "memory grew from 410.0 to 416.0 in 30 steps"),
    ],
)
def test_what_grows_at_every_look_is_told(benchmark, flat, name, each, told):
    looks = [
        dataclasses.replace(look, **{name: getattr(look, name) + each * i})
        for i, look in enumerate(flat, start=1)
    ]
    assert benchmark.growth(looks) == [told]
