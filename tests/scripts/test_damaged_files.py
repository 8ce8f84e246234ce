"""Protect the entry points from damaged files: a small sample of tests/benchmarks/damaged_files.py.

Run: pytest tests/scripts/test_damaged_files.py
"""

from __future__ import annotations

import pytest

from tests.helpers.benchmarks import benchmark_module


@pytest.fixture(scope="module")
def benchmark():
    with benchmark_module("damaged_files") as module:
        yield module


def test_nothing_breaks_down(benchmark):
    """Four files of each kind, damaged in ways that the seed decides."""
    results, breakdowns = benchmark.run_cases(88, seed=3)
    assert breakdowns == [] and len(results) == 22
    assert sum(sum(of.values()) for of in results.values()) == 88


def test_a_breakdown_is_seen(benchmark, tmp_path):
    def reader(_):
        return 1 / 0

    result, said = benchmark.result_of(reader, tmp_path)
    assert result == "breaks down" and said.startswith("ZeroDivisionError: 'division by zero' at")
    assert benchmark.result_of(lambda _: None, tmp_path) == ("works", "")
