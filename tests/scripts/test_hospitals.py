"""Protect the way from the hospitals' folders to scores, on real X-rays in the three formats.

Checked: data.select, data.check, data.traces, run_sft.py, run_grpo.py, eval.evaluate, and scores
under another label map. The models are small and random, so the test shows that every step takes
what the one before it writes, not that anything is learned.

Run: CXR_SAMPLE=FOLDER pytest tests/scripts/test_hospitals.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import data.check
import data.select
import data.traces
import eval.evaluate
from data.examples import read_jsonl
from tests.helpers.hospitals import sample
from tests.helpers.runs import grpo, lines, record, sft, speak

TESTS = {"test-mimic": 5, "test-chexpert": 8, "test-nih": 4}


@sample
@pytest.mark.parametrize(
    ("hospital", "family", "prompt"),
    [
        ("mimic", "gemma3", "free_reasoning"),
        ("chexpert", "qwen2_5_vl", "reasoning_a"),
        ("nih", "qwen2_5_vl", "only_label"),
        ("nih", "gemma3", "reasoning_narrative"),
    ],
)
def test_from_the_folders_to_scores(
    hospital, family, prompt, tiny_checkpoint, tmp_path, monkeypatch
):
    cxr = Path(os.environ["CXR_SAMPLE"])
    xrays, root = tmp_path / "xrays", ["--image_root", str(cxr)]
    folders = [
        "--mimic",
        str(cxr / "mimic-cxr-jpg"),
        "--chexpert",
        str(cxr / "chexpert"),
        "--nih",
        str(cxr / "nih"),
    ]
    assert (
        data.select.main(
            [
                *folders,
                "--train_on",
                hospital,
                "--output_dir",
                str(xrays),
                "--sft_size",
                "8",
                "--rl_size",
                "4",
                "--validation_size",
                "3",
            ]
        )
        == 0
    )
    assert {name: len(lines(xrays / f"{name}.jsonl")) for name in TESTS} == TESTS
    files = sorted(str(path) for path in xrays.glob("*.jsonl"))
    assert len(files) == 6 and data.check.main([*files, *root]) == 0

    train = xrays / "sft.jsonl"
    if prompt != "only_label":  # whose answers are made from the labels
        train = xrays / "sft-answers.jsonl"
        assert (
            data.traces.main(
                [
                    "import",
                    "--data_file",
                    str(xrays / "sft.jsonl"),
                    *root,
                    "--teacher",
                    "template",
                    "--output",
                    str(train),
                ]
            )
            == 0
        )
        assert len(read_jsonl(train, cxr)) == 8
    start, end = tmp_path / "sft", tmp_path / "grpo"
    assert (
        sft(tiny_checkpoint(family), train, start, *root, "--prompt", prompt, "--max_steps", "2")
        == 0
    )
    noted = record(start / "config.json")["data"]["train"]["selection"]
    # with the SHA-256 of the hospital's label files
    assert noted == record(xrays / "sft.select.json")

    if prompt != "only_label":
        speak(monkeypatch)  # readable answers in the form with reasoning
    assert (
        grpo(
            start,
            xrays / "rl.jsonl",
            end,
            *root,
            "--validation_file",
            f"held-out={xrays / 'validation.jsonl'}",
            "--max_steps",
            "2",
        )
        == 0
    )
    assert record(end / "config.json")["settings"]["prompt"]["value"] == prompt
    assert record(end / "scores-held-out.json")["n"] == 3

    scores, again = tmp_path / "scores", tmp_path / "again"
    assert (
        eval.evaluate.main(
            [
                "--adapter_name_or_path",
                str(end),
                *root,
                "--no_bf16",
                "--data_file",
                f"nih={xrays / 'test-nih.jsonl'}",
                f"chexpert={xrays / 'test-chexpert.jsonl'}",
                "--max_completion_length",
                "6",
                "--output_dir",
                str(scores),
            ]
        )
        == 0
    )
    assert record(scores / "scores-chexpert.json")["n"] == 8
    assert (
        eval.evaluate.main(
            [
                "--predictions",
                f"nih={scores / 'predictions-nih.jsonl'}",
                "--label_map",
                "nih_ten",
                "--output_dir",
                str(again),
            ]
        )
        == 0
    )
    assert "Pleural Effusion" in record(again / "scores-nih.json")["labels"]
    assert "Pleural Effusion" not in record(scores / "scores-nih.json")["labels"]
