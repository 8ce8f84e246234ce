"""Protect TensorBoard's charts.

Checked: which points a chart gets, that its curves lie where TensorBoard gives each a colour, bands
and ends of axes, that a resumed run drops later points, and that a new folder takes all along.

Run: pytest tests/engine/test_charts.py
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer import event_file_writer
from tensorboard.util.tensor_util import make_ndarray

from engine.charts import ITSELF, Chart
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.resume import bring_logs
from engine.tracking import RunLogger

SCORES = Chart("macro_f1", "macro-F1", {"a": "eval/a/macro_f1", "b": "eval/b/macro_f1"}, (0.0, 1.0))
GAP = Chart("gap", "gap with band", {ITSELF: "eval/gap"}, (-0.1, 0.1), error="eval/gap_se")
LENGTH = Chart("length", "length", {ITSELF: "train/length"}, (0.0,))


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """Let a second pass for every file: TensorBoard reads them in the order of their names."""
    clock = itertools.count(1_700_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(clock)))


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Read a curve as TensorBoard's pages do."""
    events = plugin_event_accumulator.EventAccumulator(str(folder)).Reload()
    if tag not in events.Tags()["tensors"]:
        return []
    return [
        (event.step, pytest.approx(float(make_ndarray(event.tensor_proto))))
        for event in events.Tensors(tag)
    ]


def test_the_points_of_a_chart():
    # one set was evaluated: its curve and both ends of the axis
    assert list(SCORES.points({"eval/a/macro_f1": 0.5, "train/loss": 9.0})) == [
        ("a", "charts/macro_f1", 0.5),
        ("axis low", "charts/macro_f1", 0.0),
        ("axis high", "charts/macro_f1", 1.0),
    ]
    assert list(SCORES.points({"train/loss": 9.0})) == []
    assert list(LENGTH.points({"train/length": 60.0})) == [
        ("", "charts/length", 60.0),
        ("axis low", "charts/length", 0.0),
    ]


def test_a_band_is_two_standard_errors_wide_on_each_side():
    # 0.03 - 2 x 0.02 and 0.03 + 2 x 0.02; a missing error leaves no band
    of_run = [point for point in GAP.points({"eval/gap": 0.03, "eval/gap_se": 0.02})][:3]
    assert of_run == [
        ("", "charts/gap", 0.03),
        ("", "charts/gap_low", pytest.approx(-0.01)),
        ("", "charts/gap_high", pytest.approx(0.07)),
    ]
    all_points = list(GAP.points({"eval/gap": 0.03}))
    assert [value for _, _, value in all_points] == [0.03] * 3 + [-0.1] * 3 + [0.1] * 3


def test_each_curve_is_a_run_of_its_own_for_tensorboard(tmp_path):
    with RunLogger(tmp_path) as log:
        log.charts("GRPO", [SCORES, GAP])
        log.scalars(0, {"macro_f1": 0.5}, split="eval", dataset="a")
        log.scalars(0, {"macro_f1": 0.25}, split="eval", dataset="b")
        log.scalars(0, {"gap": 0.0, "gap_se": 0.5}, split="eval")
    names = sorted(path.name for path in (tmp_path / "charts").iterdir())
    assert names == ["a", "axis high", "axis low", "b"]
    assert points(tmp_path / "charts/a", "charts/macro_f1") == [(0, 0.5)]
    assert points(tmp_path / "charts/b", "charts/macro_f1") == [(0, 0.25)]
    assert points(tmp_path / "charts/axis high", "charts/macro_f1") == [(0, 1.0), (0, 1.0)]
    assert points(tmp_path, "charts/gap_high") == [(0, 1.0)]
    assert points(tmp_path, "eval/a/macro_f1") == [(0, 0.5)]  # as before


def test_the_page_of_custom_scalars_names_all_charts(tmp_path):
    with RunLogger(tmp_path) as log:
        log.charts("GRPO", [SCORES, GAP])
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    [summary] = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(make_ndarray(summary.tensor_proto).item())
    [category] = layout.category
    lines, band = category.chart
    assert (category.title, lines.title, list(lines.multiline.tag)) == (
        "GRPO",
        "macro-F1",
        ["charts/macro_f1"],
    )
    [series] = band.margin.series
    assert (series.value, series.lower, series.upper) == (
        "charts/gap",
        "charts/gap_low",
        "charts/gap_high",
    )


def evaluated(folder: Path, steps: list[int], resume_step: int | None = None) -> None:
    with RunLogger(folder, resume_step=resume_step) as log:
        log.charts("GRPO", [SCORES])
        for step in steps:
            log.scalars(step, {"macro_f1": step / 10}, split="eval", dataset="a")


def test_a_resumed_run_drops_the_points_of_later_steps(tmp_path):
    evaluated(tmp_path, [1, 2, 3])
    evaluated(tmp_path, [], resume_step=2)  # stopped before it evaluates: step 3 is gone already
    assert points(tmp_path / "charts/a", "charts/macro_f1") == [(1, 0.1), (2, 0.2)]
    evaluated(tmp_path, [3, 4], resume_step=2)
    assert [step for step, _ in points(tmp_path / "charts/a", "charts/macro_f1")] == [1, 2, 3, 4]


def test_a_run_that_goes_on_in_another_folder_takes_its_charts_along(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    evaluated(first, [1, 2])
    records = {"trainer_state.json": {"best_model_checkpoint": None}}
    save_checkpoint(first, 1, tensors={}, records=records)
    bring_logs(load_checkpoint(first / "checkpoint-1"), second, None)
    evaluated(second, [2], resume_step=1)
    curve = points(second / "charts/a", "charts/macro_f1")
    assert [step for step, _ in curve] == [1, 2]


def test_a_failing_curve_gives_tensorboard_up_and_nothing_else(tmp_path, caplog):
    (tmp_path / "charts").write_text("no folder")
    with RunLogger(tmp_path) as log:
        log.charts("GRPO", [SCORES])
        log.scalars(1, {"macro_f1": 0.5}, split="eval", dataset="a")
        log.scalars(2, {"macro_f1": 0.6}, split="eval", dataset="a")
    assert caplog.text.count("TensorBoard in") == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("macro_f1") == 2
