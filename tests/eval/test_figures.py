"""Protect the figures.

Checked: the smoothing, which runs go into which figure, files in both forms, and what is said
without matplotlib.

Run: pytest tests/eval/test_figures.py
"""

from __future__ import annotations

import pytest
from PIL import Image

import eval.figures
from data.files import write_jsonl
from engine.config import UsageError
from eval.figures import (
    FIGURE_1,
    draw_training,
    ema,
    main,
    series,
    training_pictures,
)
from eval.folders import load_entry
from eval.report import main as report_main
from tests.helpers.reports import AFTER, BEFORE, FEW, save, training_run


def test_the_moving_average_by_hand():
    # 1; 0.95 + 0.05 x 3 = 1.1; 0.95 x 1.1 + 0.05 x 1.1 = 1.1
    assert ema([1.0, 3.0, 1.1]) == pytest.approx([1.0, 1.1, 1.1])
    assert ema([2.0, 4.0], smoothing=0.5) == [2.0, 3.0] and ema([]) == []


def test_a_series_leaves_out_evaluations_and_gaps():
    log = [
        {"step": 1, "split": "train", "loss": 2.0},
        {"step": 2, "split": "train", "loss": None},
        {"step": 2, "split": "eval", "loss": 9.0},
        {"step": 3, "split": "train"},
        {"step": 4, "split": "train", "loss": 1},
    ]
    assert series(log, "loss") == ([1, 4], [2.0, 1.0])


def test_each_run_goes_into_its_figure(tmp_path):
    runs = [
        training_run(tmp_path / "s1", "sft"),
        training_run(tmp_path / "s2", "sft"),
        training_run(tmp_path / "h", "grpo"),
        training_run(tmp_path / "n", "grpo", "nuanced"),
    ]
    pictures = training_pictures([load_entry(run.name, run) for run in runs])
    assert [picture.name for picture in pictures] == ["figure-1", "figure-2", "figure-3"]
    assert "of s1" in pictures[0].alt and "of s2" in pictures[0].alt
    assert "Mean nuanced reward of n" in pictures[1].alt and "of h" not in pictures[1].alt
    # Logged 1/10 + 1 at step 1; the last average lies near 3 + 1 less the lag of 19 steps at 1/10.
    assert "Mean hard reward of h: 1.1 at step 1" in pictures[2].alt
    assert [picture.name for picture in training_pictures([load_entry("n", runs[3])])] == [
        "figure-2"
    ]


def test_reward_hacking_is_drawn_for_runs_that_were_monitored(tmp_path):
    runs = {
        name: training_run(tmp_path / name, "grpo") for name in ("a", "b", "c", "d", "unwatched")
    }
    for place, name in enumerate(["a", "b", "c", "d"]):
        rows = [
            {
                "step": step,
                "split": "train",
                "monitors/trained_gain": step / 10,
                "monitors/other_gain": 0.0,
                "monitors/f1_gain": -place / 10,
            }
            for step in range(5, 31)
        ]
        write_jsonl(runs[name] / "metrics.jsonl", rows)
    pictures = training_pictures([load_entry(name, run) for name, run in runs.items()])
    assert [picture.name for picture in pictures] == [
        "figure-3",
        "reward-hacking-1",
        "reward-hacking-2",
    ]
    assert (
        "reward trained on of a: +3.00 at step 30; the other reward of a: +0.00" in pictures[1].alt
    )
    assert (
        "F1 of the labels of d: -0.30 at step 30" in pictures[2].alt
        and "of a" not in pictures[2].alt
        and "unwatched" not in pictures[1].alt
    )


def test_a_picture_is_the_same_for_the_same_log():
    log = [{"step": step, "split": "train", "loss": 1.0 / step} for step in range(1, 9)]
    first, again = (draw_training("x", "", {"<run>": log}, FIGURE_1) for _ in range(2))
    assert first == again and first.data.startswith(b"<?xml") and b"<script" not in first.data
    other = draw_training("x", "", {"<run>": log[:5]}, FIGURE_1)
    assert other.data != first.data


def test_the_command_writes_png_and_svg_and_overwrites_nothing(tmp_path, capsys):
    run, out = training_run(tmp_path / "run", "sft"), tmp_path / "out"
    assert main([str(run), "--output_dir", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["figure-1.png", "figure-1.svg"]
    with Image.open(out / "figure-1.png") as image:
        assert image.size[0] > image.size[1] > 400
    before = (out / "figure-1.svg").read_bytes()
    assert main([str(run), "--output_dir", str(out)]) == 2
    assert "figure-1.svg exists and nothing is overwritten" in capsys.readouterr().err
    assert (out / "figure-1.svg").read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), "--output_dir", str(tmp_path / "none")]) == 2
    assert "nothing to draw" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert main([]) == 2
    assert [line for line in capsys.readouterr().err.splitlines()] == [
        "error: --run is missing: give one or more FOLDER or NAME=FOLDER of training runs",
        "error: --output_dir is missing: give a folder for the pictures",
    ]


def test_without_matplotlib_a_report_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval.figures, "available", lambda: False)
    monkeypatch.setattr("eval.report.available", lambda: False)
    for name, rows in (("base", BEFORE), ("sft", AFTER)):
        (tmp_path / name).mkdir()
        save(tmp_path / name, home=rows)
    assert (
        report_main(
            [
                str(tmp_path / "base"),
                str(tmp_path / "sft"),
                "--output_dir",
                str(tmp_path / "out"),
                *FEW,
            ]
        )
        == 0
    )
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (
        "the pictures need matplotlib: pip install -e &#x27;.[plots]&#x27;" in page
        and "image/svg" not in page
    )
    with pytest.raises(UsageError, match="need matplotlib"):
        draw_training("x", "", {}, FIGURE_1)
