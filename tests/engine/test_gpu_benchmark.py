"""Protect the command that measures a GPU (tests/benchmarks/gpu.py), by its rehearsal.

Checked: all phases of a GRPO step run for both models and stand in the table, the ratio is exactly
1 in bf16, the arithmetic beside the times, and what it says where there is no GPU.

Run: pytest tests/engine/test_gpu_benchmark.py
"""

from __future__ import annotations

import re

import pytest
import torch

from engine.decoding import DecodingStep
from tests.helpers.benchmarks import benchmark_module

PHASES = [
    "images",
    "sampling, no graphs",
    "reference and old log-probabilities",
    "update: forward and backward",
    "first optimizer step",
    "optimizer step",
]


def test_the_rehearsal_goes_through_every_phase(capsys):
    with benchmark_module("gpu") as gpu:
        assert gpu.main(["--scale", "16", "--prompts", "1", "--new_tokens", "3"]) == 0
    said = capsys.readouterr().out
    assert re.match(r"(cpu|cuda): .*; torch 2\..*, transformers .* \(setup.cfg: torch ~= ", said)
    for title in ("## MedGemma-4B, divided by 16", "## Qwen2.5-VL-3B, divided by 16"):
        assert title in said
    for phase in PHASES:
        assert len(re.findall(rf"^\| {phase} \| \d+\.\d{{3}} \|", said, re.MULTILINE)) == 2
    assert said.count("* ratio exactly 1 before the first step: yes") == 2
    assert said.count("* CUDA graphs: none on this device") == 2
    # the forecast of sampling, scoring and the update is there
    found = re.findall(r"^\| (sampling|reference|update)[^|]*\|[^|]*\|[^|]*\| (\S*) \|", said, re.M)
    assert len(found) >= 6 and all(float(gib) > 0 for _, gib in found)


def test_the_ragged_rollout_drops_rows_and_takes_places_again(monkeypatch):
    counts = set()
    with benchmark_module("gpu") as gpu:
        read = DecodingStep.read
        monkeypatch.setattr(
            DecodingStep,
            "read",
            lambda self, rows, *more: counts.add(rows) or read(self, rows, *more),
        )
        policy = gpu.random_policy("qwen2.5-vl-3b", 16, torch.device("cpu"))
        work = gpu.Work(gpu.model_shape(policy.base.net.config, 0), 4, 24)
        monkeypatch.setattr(gpu, "STOP_EVERY", 8)
        gpu.sample_ragged(policy, [gpu.random_prompt(policy) for _ in range(4)], work)
    assert 8 in counts and len(counts) > 2  # two prompts of four at a time


def test_without_a_gpu_it_says_how_to_rehearse(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with benchmark_module("gpu") as gpu, pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "no CUDA device" in (said := capsys.readouterr().err) and "--scale 16" in said


@pytest.mark.parametrize("flags", [["--prompts", "0"], ["--scale", "0"], ["--new_tokens", "1"]])
def test_numbers_that_are_too_small_are_refused(flags, capsys):
    with benchmark_module("gpu") as gpu, pytest.raises(SystemExit) as ended:
        gpu.main(["--scale", "16", *flags])
    assert ended.value.code == 2 and flags[0] in capsys.readouterr().err


def test_what_phases_are_compared_with():
    """Two layers of width 8, one head of 4 for queries and keys, intermediate 16, vocabulary 32.

    A layer: 8 (2 x 4 + 2 x 4 + 3 x 16) = 512 weights. The head 256. Two prompts x G 4, 10 tokens.
    """
    with benchmark_module("gpu") as gpu:
        shape = gpu.ModelShape(
            base_parameters=2000,
            hidden=8,
            layers=2,
            heads=1,
            kv_heads=1,
            head_dim=4,
            intermediate=16,
            vocabulary=32,
            layer_norms=2,
            head_norms=False,
            window=None,
            fixed_images=False,
            vision_hidden=8,
            vision_intermediate=8,
            patches_per_token=4,
            pixel_values_per_patch=4,
        )
        work = gpu.Work(shape, prompts=2, new_tokens=10)
        assert (work.weights, work.head, work.rows) == (1024, 256, 8)
        # bf16: 2 x 1,280 of weights and head. Keys and values of a token 2 x 2 bytes x 2 layers x
        # 4; there are 2 x 600 of prompts and on average 8 x 5 of completions.
        assert work.decoding_bytes() == 10 * (2560 + 32 * (1200 + 40))
        # one prompt's group: 600 + 40 tokens through the layers, 40 through the head
        assert work.operations(1, 3, 2) == 2 * (3 * 1024 * 640 + 2 * 256 * 40)
        phases = [
            gpu.Phase("images", 4.0, 0),
            gpu.Phase("sampling, no graphs", 5.0, 0),
            gpu.Phase("sampling, graphs", 2.0, 0),
            gpu.Phase("reference and old log-probabilities", 3.0, 0),
            gpu.Phase("update: forward and backward", 6.4, 0),
            gpu.Phase("first optimizer step", 9.0, 0),
            gpu.Phase("optimizer step", 0.3, 0),
        ]
        # SFT: 2,000 (4 / 2 + 6.4 / 2 x 610 / 640) = 10,100 s. GRPO: 1,000 (2 + (2 + 3 + 6.4 + 0.6)
        # / 2) = 8,000 s. 80 tokens in 2 s.
        assert gpu.hours(phases, work) == [
            "* 40 tokens a second while sampling",
            "* 2,000 images of SFT: 2.81 h; 1,000 of GRPO: 2.22 h (without evaluations and saves)",
        ]
        phases[1].peak, phases[1].forecast, phases[1].moved = 2**30, 2**31, 5e9
        phases[4].operations = 3.2e12
        lines = gpu.table([phases[1], phases[4]], (2e9, 1e12)).splitlines()
    assert lines[0] == "Reached in a copy: 2 GB/s; in a product: 1.00 TFLOP/s."
    assert lines[4:] == [
        "| sampling, no graphs | 5.000 | 1.00 | 2.00 | 50% |  |",
        "| update: forward and backward | 6.400 |  |  |  | 50% |",
    ]
