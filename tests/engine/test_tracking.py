"""Protect the numbers people read.

Checked: metrics of micro-batches combine to those of the step, logs hold every step once after a
resume, and a failing log never stops a training.

Run: python -m pytest tests/engine/test_tracking.py
"""

from __future__ import annotations

import errno
import io
import json
import math
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from engine import tracking as module
from engine.markdown import escape_markdown
from engine.tracking import (
    MetricAccumulator,
    RunLogger,
    set_later_lines_aside,
)

Metric = namedtuple("Metric", "value weight reduction")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- accumulate ----------------------------------------------------------------------------------
def test_micro_batches_combine_to_the_metrics_of_the_step():
    # 3 tokens with mean KL 1.0 and 1 token with KL 5.0: (3 * 1 + 1 * 5) / 4 = 2.0, not the 3.0 of a
    # mean of means
    metrics = MetricAccumulator()
    metrics.add_all(
        {
            "kl": Metric(torch.tensor(1.0), 3, "mean"),
            "ratio_max": Metric(1.5, torch.tensor(3.0), "max"),
            "ratio_min": Metric(0.9, 3, "min"),
            "tokens": Metric(3, 3, "sum"),
        }
    )
    metrics.add_all(
        {
            "kl": Metric(5.0, torch.tensor(1), "mean"),
            "ratio_max": Metric(1.2, 1, "max"),
            "ratio_min": Metric(0.7, 1, "min"),
            "tokens": Metric(1, 1, "sum"),
        }
    )
    metrics.add("reward", 2.0)
    metrics.add("reward", 4.0)
    assert metrics.collect() == {
        "kl": 2.0,
        "ratio_max": 1.5,
        "ratio_min": 0.7,
        "tokens": 4.0,
        "reward": 3.0,
    }
    assert metrics.collect() == {}


def test_an_entry_of_weight_zero_measured_nothing():
    metrics = MetricAccumulator()
    for reduction in ("mean", "min", "max", "sum"):
        metrics.add(reduction, math.nan, 0.0, reduction)
        metrics.add(reduction, 2.0, 1.0, reduction)
    metrics.add("nothing", 1.0, 0.0)
    assert metrics.collect() == {"mean": 2.0, "min": 2.0, "max": 2.0, "sum": 2.0}


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("reduction", ["mean", "min", "max", "sum"])
def test_a_nan_that_was_measured_shows(values, reduction):
    metrics = MetricAccumulator()
    for value in values:
        metrics.add("loss", value, reduction=reduction)
    assert math.isnan(metrics.collect()["loss"])


def test_infinities_of_both_signs_do_not_raise():
    metrics = MetricAccumulator()
    metrics.add("x", math.inf)
    metrics.add("x", -math.inf)
    assert math.isnan(metrics.collect()["x"])


def test_a_metric_has_one_reduction_within_a_step():
    metrics = MetricAccumulator()
    metrics.add("x", 1.0, reduction="max")
    with pytest.raises(ValueError, match="metric x: reduction 'mean' after 'max'"):
        metrics.add("x", 1.0)
    with pytest.raises(ValueError, match="unknown reduction 'median'"):
        metrics.add("y", 1.0, reduction="median")
    metrics.collect()
    metrics.add("x", 1.0)  # a new step


def test_accumulated_tensors_do_not_keep_the_graph_alive_or_change():
    metrics = MetricAccumulator()
    loss = torch.tensor(2.0, requires_grad=True) * 3
    metrics.add("loss", loss)
    assert not metrics._entries["loss"][0][0].requires_grad
    assert metrics.collect() == {"loss": 6.0}


# ---- write ---------------------------------------------------------------------------------------
def test_one_event_in_three_forms(tmp_path):
    with RunLogger(tmp_path) as log:
        log.scalars(3, {"loss": 0.5, "reward/std": math.inf}, epoch=0.25)
        log.scalars(3, {"micro/f1": 0.4}, split="eval", dataset="nih")
        log.scalars(3, {"loss": 1.0}, split="eval")
        log.text("completions", "| a |", 3)
        log.image("inputs/0", np.full((4, 6), 200, dtype=np.uint8), 3)
        log.append_jsonl("completions.jsonl", [{"id": "x", "text": "\u00e9\ud800"}, {"id": "y"}], 3)
    assert rows_of(tmp_path / "metrics.jsonl") == [
        {"step": 3, "epoch": 0.25, "split": "train", "loss": 0.5, "reward/std": None},
        {"step": 3, "split": "eval", "dataset": "nih", "micro/f1": 0.4},
        {"step": 3, "split": "eval", "loss": 1.0},
    ]
    assert log.log_history == [
        {"loss": 0.5, "reward/std": None, "step": 3, "epoch": 0.25},
        {"eval_nih_micro/f1": 0.4, "step": 3},
        {"eval_loss": 1.0, "step": 3},
    ]
    assert rows_of(tmp_path / "completions.jsonl") == [
        {"step": 3, "id": "x", "text": "\u00e9\ud800"},
        {"step": 3, "id": "y"},
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "eval/loss",
        "eval/nih/micro/f1",
        "train/loss",
        "train/reward/std",
    ]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]
    assert events.Tensors("completions/text_summary")[0].tensor_proto.string_val == [b"| a |"]
    image = events.Images("inputs/0")[0]
    assert (image.height, image.width) == (4, 6)


def test_resuming_moves_later_and_torn_lines_aside_and_tells_tensorboard(tmp_path):
    with RunLogger(tmp_path) as log:
        for step in (1, 2, 3):
            log.scalars(step, {"loss": float(step)})
            log.append_jsonl("completions.jsonl", [{"id": f"{step}a"}, {"id": f"{step}b"}], step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    history = log.log_history[:2]
    with RunLogger(tmp_path, resume_step=2, log_history=history) as log:
        log.scalars(3, {"loss": 30.0})
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert [entry["loss"] for entry in log.log_history] == [1.0, 2.0, 30.0] and len(history) == 2
    aside = (tmp_path / "metrics.after-2.jsonl").read_text().splitlines()
    assert json.loads(aside[0])["loss"] == 3.0 and aside[1:] == ['{"step": 4, "lo']
    assert [row["id"] for row in rows_of(tmp_path / "completions.jsonl")] == [
        "1a",
        "1b",
        "2a",
        "2b",
    ]
    assert [row["id"] for row in rows_of(tmp_path / "completions.after-2.jsonl")] == ["3a", "3b"]
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    # TensorBoard's pages read the files in another way, which drops points only at the second start
    # that it sees.
    pages = plugin_event_accumulator.EventAccumulator(str(tmp_path)).Reload().Tensors("train/loss")
    assert [(event.step, float(make_ndarray(event.tensor_proto))) for event in pages] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert not list(tmp_path.glob(".tmp-*"))


def test_an_evaluation_that_the_history_does_not_have_is_made_again_and_stands_once(tmp_path):
    with RunLogger(tmp_path) as log:
        log.scalars(2, {"loss": 2.0})
        log.scalars(2, {"loss": 0.5}, split="eval")
        known, marks = list(log.log_history), log.marks()  # what the checkpoint of step 2 knows
        log.scalars(2, {"macro_f1": 0.4}, split="eval", dataset="site")
        log.scalars(2, {"gap": 0.1}, split="eval")
    with RunLogger(tmp_path, resume_step=2, log_history=known, marks=marks) as log:
        log.scalars(2, {"macro_f1": 0.4}, split="eval", dataset="site")
    found = [
        (row["split"], row.get("dataset"), set(row) - {"step", "split", "dataset"})
        for row in rows_of(tmp_path / "metrics.jsonl")
    ]
    assert found == [
        ("train", None, {"loss"}),
        ("eval", None, {"loss"}),
        ("eval", "site", {"macro_f1"}),
    ]
    aside = rows_of(tmp_path / "metrics.after-2.jsonl")
    assert [set(row) - {"step", "split", "dataset"} for row in aside] == [{"macro_f1"}, {"gap"}]


def test_setting_lines_aside_loses_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert set_later_lines_aside(path, 5) == 0 and not path.exists()
    kept, later = (
        [b'{"step": 1}', b'{"step": 5}'],
        [b'{"step": 6}', b"\xff\x00", b'{"id": "no step"}', b"[]"],
    )
    path.write_bytes(b"\n".join([kept[0], *later, kept[1]]))  # the last line lost only its newline
    assert set_later_lines_aside(path, 5) == 4
    assert path.read_bytes() == b'{"step": 1}\n{"step": 5}\n'
    assert set_later_lines_aside(path, 5) == 0
    path.write_bytes(b'{"step": 7}\n')
    set_later_lines_aside(path, 5)  # a second resume from the same step appends
    assert (tmp_path / "metrics.after-5.jsonl").read_bytes() == b"\n".join(
        [*later, b'{"step": 7}', b""]
    )


def test_a_full_disk_is_one_warning_and_the_log_goes_on_when_there_is_room(
    tmp_path, monkeypatch, caplog
):
    log = RunLogger(tmp_path)
    log.scalars(1, {"loss": 1.0})

    class FullDisk(io.BytesIO):
        def write(self, text: bytes) -> int:
            with open(tmp_path / "metrics.jsonl", "ab") as file:
                file.write(text.lstrip()[:8])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "open_plain", lambda *arguments: FullDisk())
    log.scalars(2, {"loss": 2.0})
    log.scalars(3, {"loss": 3.0})
    monkeypatch.undo()
    log.scalars(4, {"loss": 4.0})
    log.close()
    assert len(caplog.records) == 1
    assert "metrics.jsonl" in caplog.text and "No space left on device" in caplog.text
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss"] == 1.0 and json.loads(lines[-1])["loss"] == 4.0
    assert [entry["step"] for entry in log.log_history] == [1, 2, 3, 4]


def test_a_failing_tensorboard_is_one_warning_and_is_given_up(tmp_path, monkeypatch, caplog):
    with RunLogger(tmp_path) as log:
        calls = []

        def broken(*arguments, **options):
            calls.append(arguments)
            raise RuntimeError("the writer thread died")

        for method in ("add_scalar", "add_text"):
            monkeypatch.setattr(log._tensorboard, method, broken)
        log.scalars(1, {"loss": 1.0, "kl": 0.0})
        log.text("x", "y", 1)
    assert len(calls) == 1
    assert [record.getMessage().count("the writer thread died") for record in caplog.records] == [1]
    assert len(rows_of(tmp_path / "metrics.jsonl")) == 1


def test_a_run_directory_that_vanished_does_not_raise(tmp_path, caplog):
    log = RunLogger(tmp_path / "run")
    log.close()
    log.run_dir = tmp_path / "gone"
    log.scalars(1, {"loss": 1.0})
    assert "metrics.jsonl" in caplog.text and log.log_history == [{"loss": 1.0, "step": 1}]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("<think>a & b</think>", "&lt;think&gt;a &amp; b&lt;/think&gt;"),
        ("a|b\r\n`c`\n", "a&#124;b<br>&#96;c&#96;<br>"),
        (
            "**x** _y_ [l](u) ![i](u) # \\",
            "&#42;&#42;x&#42;&#42; &#95;y&#95; &#91;l&#93;(u) &#33;&#91;i&#93;(u) &#35; &#92;",
        ),
        ("&lt;\x00\x1b[31m", "&amp;lt;\ufffd\ufffd&#91;31m"),
    ],
)
def test_model_text_is_shown_as_it_stands(text, escaped):
    assert escape_markdown(text) == escaped


def test_monitors_have_a_place_of_their_own_in_tensorboard_alone(tmp_path):
    with RunLogger(tmp_path) as log:
        log.scalars(1, {"monitors/entropy": 0.5, "loss": 1.0})
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert sorted(tags) == ["monitors/entropy", "train/loss"]
    assert rows_of(tmp_path / "metrics.jsonl")[0]["monitors/entropy"] == 0.5


def test_warnings_are_kept_with_their_step_and_set_aside_by_a_resume(tmp_path):
    with RunLogger(tmp_path) as log:
        log.warn("gap>0.1: 0.2", 3)
        log.warn("kl>5: 6", 7)
    with RunLogger(tmp_path, resume_step=5):
        pass
    assert rows_of(tmp_path / "warnings.jsonl") == [{"step": 3, "warning": "gap>0.1: 0.2"}]
    assert rows_of(tmp_path / "warnings.after-5.jsonl") == [{"step": 7, "warning": "kl>5: 6"}]


def test_a_thread_of_tensorboard_that_dies_prints_no_traceback(tmp_path, monkeypatch, capsys):
    """What it died of is raised by the next call, and is one warning then."""
    seen: list = []
    monkeypatch.setattr(threading, "excepthook", lambda died: seen.append(died.exc_type))
    log = RunLogger(tmp_path)
    log.close()
    writer = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary"})
    for thread in (writer(target=lambda: 1 / 0), threading.Thread(target=lambda: 1 / 0)):
        thread.start()
        thread.join()
    assert seen == [ZeroDivisionError]  # of the other thread
    RunLogger(tmp_path).close()
    assert threading.excepthook.__name__ == "of_others"


def test_files_of_a_run_that_goes_on_at_once_sort_after_the_earlier_ones(tmp_path):
    """TensorBoard reads them by name: the second, then the process, which may be a smaller one."""
    for step in (None, 1):
        with RunLogger(tmp_path, resume_step=step) as log:
            log.scalars(1, {"loss": 1.0})
    seconds = [path.name.split(".")[3] for path in tmp_path.glob("events.out.tfevents.*")]
    assert len(seconds) == len(set(seconds))
