"""Protect users from files that others made: a small sample of tests/benchmarks/hostile_inputs.py.

Run: pytest tests/scripts/test_hostile_inputs.py
"""

from __future__ import annotations

import pytest

from tests.faults.children import Ended
from tests.helpers.benchmarks import benchmark_module


@pytest.fixture(scope="module")
def benchmark():
    with benchmark_module("hostile_inputs") as module:
        yield module


@pytest.mark.parametrize("kind", ["code beside", "chat template", "links in a run", "manifest"])
def test_a_sample_does_no_harm(benchmark, kind):
    results, _, harms = benchmark.run_cases(kind, every=7)
    assert harms == [] and sum(sum(counts.values()) for counts in results.values()) >= 3


@pytest.mark.parametrize(
    ("end", "result"),
    [
        (Ended(0, None, "", "", 0.1), "worked"),
        (Ended(2, None, "", "error: x\n", 0.1), "one line"),
        (Ended(1, None, "", "Traceback (most recent call last):", 0.1), "traceback"),
        (Ended(2, None, "", "error: \x1b[2J\n", 0.1), "traceback"),
        (Ended(None, 9, "", "", 0.1), "traceback"),
        (Ended(None, 9, "", "", 30.0, timed_out=True), "hang"),
    ],
)
def test_harm_is_seen(benchmark, end, result):
    assert benchmark.verdict(end) == result


def test_a_change_elsewhere_is_seen(benchmark, tmp_path):
    (tmp_path / "a").write_text("a")
    before = benchmark.tree(tmp_path)
    assert benchmark._changed(before, benchmark.tree(tmp_path)) == []
    (tmp_path / "a").write_text("b")
    assert benchmark._changed(before, benchmark.tree(tmp_path)) == [str(tmp_path / "a")]
