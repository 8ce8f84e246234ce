"""Hold what decoding and training would ask of a GPU: kernels, bytes, waits, shapes, memory.

Counted on the published models in all their sizes, without values (tests/benchmarks/
gpu_readiness.py), and compared with the table of tests/benchmarks/README.md: nothing may become
more. tests/engine/test_op_counts.py protects the counter.

Run: pytest tests/engine/test_gpu_readiness.py
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.benchmarks import benchmark_module

HELD = Path(__file__).parents[1] / "benchmarks" / "gpu_readiness_now.json"
FAMILIES = ["qwen2_5_vl", "gemma3"]


@cache
def rollout(family: str) -> dict:
    with benchmark_module("gpu_readiness") as counts:
        return counts.rollout_rows(family)


@cache
def training(family: str) -> dict:
    with benchmark_module("gpu_readiness") as counts:
        return counts.training_rows(family)


def assert_no_more(found: dict, held: dict) -> None:
    """Compare all numbers. The smallest part of a percent is for sums of floats."""
    more = {
        (phase, what): (number, held[phase][what])
        for phase, numbers in found.items()
        for what, number in numbers.items()
        if number > held[phase][what] * (1 + 1e-9)
    }
    assert not more, f"more than before: {more}"


@pytest.mark.parametrize("family", FAMILIES)
def test_training_asks_for_no_more(family):
    assert_no_more(training(family), json.loads(HELD.read_text())[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_asks_for_no_more(family):
    assert_no_more(rollout(family), json.loads(HELD.read_text())[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_is_captured_in_few_graphs_and_rarely_waited_for(family):
    """512 tokens: one shape for drawing and one for each 64 tokens of length; every 8 tokens a look
    at finished rows.
    """
    found = rollout(family)["512 tokens"]
    assert found == {"shapes": 1 + 8, "waits in 64 tokens": 8}


@pytest.mark.parametrize(
    ("family", "token", "layer"), [(FAMILIES[0], 1500, 40), (FAMILIES[1], 1700, 40)]
)
def test_a_token_launches_little(family, token, layer):
    """Before graphs. It was 3,667 and 4,983, of which 95 and 139 a layer."""
    found = rollout(family)
    assert found["token"]["launches"] <= token
    assert 0 < found["decoder layer, of a token"]["launches"] <= layer


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_moves_little(family):
    """peft's path moved 37 MB a token and forward."""
    assert training(family)["LoRA, of a token and forward"]["MB"] <= 12


@pytest.mark.parametrize("family", FAMILIES)
def test_drawing_moves_little(family):
    """Thirty passes over 64 rows of the vocabulary moved 8 and 14 GB."""
    assert rollout(family)["drawing, of a token"]["GB"] <= 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_waits_for_nothing_and_a_step_once(family):
    """The look at the weights."""
    waits = {phase: numbers.get("waits") for phase, numbers in training(family).items()}
    assert waits.pop("optimizer step") == 1
    assert [waits[phase] for phase in ("scoring", "policy forward", "backward")] == [0, 0, 0]


def test_a_table_names_each_phase_and_family():
    with benchmark_module("gpu_readiness") as counts:
        before = {family: {"token": {"launches": 3667.0, "GB": 19.414}} for family in FAMILIES}
        now = {family: {"token": {"launches": 1325.0, "GB": 7.0}} for family in FAMILIES}
        lines = counts.table({", before": before, ", now": now}).splitlines()
    assert lines[0] == (
        "| phase | | Qwen2.5-VL-3B, before | Qwen2.5-VL-3B, now | MedGemma-4B, before"
        " | MedGemma-4B, now |"
    )
    assert lines[2:] == [
        "| token | launches | 3,667 | 1,325 | 3,667 | 1,325 |",
        "| token | GB | 19.41 | 7.00 | 19.41 | 7.00 |",
    ]
