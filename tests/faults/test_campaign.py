"""Protect runs from kills: a small sample of tests/benchmarks/fault_campaign.py.

Run: pytest tests/faults/test_campaign.py
"""

from __future__ import annotations

import pytest

from tests.helpers.benchmarks import benchmark_module


@pytest.fixture(scope="module")
def campaign():
    with benchmark_module("fault_campaign") as module:
        yield module


def test_killed_runs_that_are_given_again_end_as_if_nothing_had_been(campaign, tmp_path):
    """Four kills of SFT and four of GRPO, at file operations and at times."""
    results = []
    for family, script, variant in (("qwen2_5_vl", "sft", "1"), ("gemma3", "grpo", "2")):
        flags = ["--kills", "4", "--families", family, "--scripts", script]
        settings = campaign.settings_of([*flags, "--variants", variant, "--processes", "1"])
        folder = tmp_path / family
        folder.mkdir()
        results += campaign.run_campaign(folder, settings, lambda line: None)
    assert not any(result.problems for result in results), campaign.report(results, settings)
    assert sum(len(result.kills) for result in results) >= 8


def test_a_failure_is_told_with_the_command_that_repeats_it(campaign):
    settings = campaign.settings_of(["--seed", "3"])
    results = [
        campaign.Result("gemma3-sft-1", ["save", "links"], ["before operation 7"], 3),
        campaign.Result("gemma3-sft-2", ["save"], [], 2, {"links": ["best: is missing"]}),
        campaign.Result("gemma3-sft-3", ["update"], [], 2, {"stuck": ["exit code 2: error: no"]}),
    ]
    told = campaign.report(results, settings).splitlines()
    assert "    links: best: is missing" in told
    assert any("--seed 3" in line and "--only gemma3-sft-2" in line for line in told)
    # place | kills | state | logs | links | TensorBoard | stuck: a stuck run has nothing equal
    assert "| save | 2 | 2 | 2 | 1 | 2 | 0 |" in told
    assert "| update | 1 | 0 | 0 | 0 | 0 | 1 |" in told
    assert "| all | 4 | 3 | 3 | 2 | 3 | 1 |" in told
    assert told[-1] == "3 cases, 4 kills, 2.3 commands a case, 2 failed"
