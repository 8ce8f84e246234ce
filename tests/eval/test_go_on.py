"""Protect answers from a disk that fails: the file of partial answers is a help and not a result.

Run: pytest tests/eval/test_go_on.py
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

import eval.answering
import eval.decode
import eval.go_on
from data.examples import Example
from data.predictions import Prediction, read_predictions
from engine.completion import SamplingConfig
from engine.runtime import StepFailed
from eval.decode import Decoding, evaluate_sets
from eval.go_on import kept

DECODING = Decoding(SamplingConfig(0.0, max_completion_length=6), "think_solution", 2)
EXAMPLES = [
    Example(f"e{i}", f"p{i}", "image.png", ("Edema",), "site", Path("images")) for i in range(4)
]
ANSWERS = [
    Prediction.of_example(
        example,
        prompt="short",
        completion="<think>a</think><solution>Edema</solution>",
        completion_length=6,
        answer_format="think_solution",
        extra={"text_length": 6},
    )
    for example in EXAMPLES
]
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def answered(policy, examples, decoding, *, done, should_stop, on_prediction, ranks):
    for answer in ANSWERS:
        on_prediction(answer)
    return ANSWERS


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(eval.decode, "predict", answered)


class FullDisk:
    """Take so many rows, and half of the next one."""

    def __init__(self, file, rows: int):
        self.file, self.rows = file, rows

    def write(self, row: bytes) -> None:
        self.file.write(row if self.rows > 0 else row[:20])
        self.rows -= 1
        if self.rows < 0:
            raise FULL

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        raise FULL  # what is in its buffer cannot be written either


def fill_the_disk(monkeypatch, rows: int) -> None:
    open_plain = eval.go_on.open_plain
    monkeypatch.setattr(
        eval.go_on, "open_plain", lambda path, mode: FullDisk(open_plain(path, mode), rows)
    )


def evaluated(folder: Path) -> None:
    evaluate_sets(None, {"site": EXAMPLES}, DECODING, folder)  # type: ignore[arg-type]  # no model


def test_a_full_disk_does_not_end_an_evaluation(tmp_path, monkeypatch, capsys):
    evaluated(tmp_path / "straight")
    capsys.readouterr()
    fill_the_disk(monkeypatch, rows=1)
    evaluated(tmp_path / "full")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "predictions-site.partial.jsonl: No space left on device); the evaluation" in warnings[0]
    for name in ("predictions-site.jsonl", "scores-site.json"):
        assert (tmp_path / "full" / name).read_text() == (tmp_path / "straight" / name).read_text()
    assert not list((tmp_path / "full").glob("*.partial.*"))


@pytest.mark.parametrize("function", ["write_json", "write_predictions", "open_plain"])
def test_a_disk_that_takes_nothing_does_not_end_it_either(tmp_path, monkeypatch, capsys, function):
    def full(*arguments):
        raise FULL

    monkeypatch.setattr(eval.go_on, function, full)
    with kept(tmp_path, "site", [], {"of": "this"}, "predictions") as keep:
        for answer in ANSWERS:
            keep(answer)
    assert capsys.readouterr().err.count("warning: the answers so far cannot be kept") == 1
    assert not list(tmp_path.iterdir())


def test_what_was_kept_before_the_disk_was_full_is_named_at_an_interrupt(
    tmp_path, monkeypatch, capsys
):
    fill_the_disk(monkeypatch, rows=2)
    with (
        pytest.raises(KeyboardInterrupt),
        kept(tmp_path, "site", [], {"of": "this"}, "predictions") as keep,
    ):
        for answer in ANSWERS:
            keep(answer)
        raise KeyboardInterrupt
    file = tmp_path / "predictions-site.partial.jsonl"
    assert f"the answers so far are kept in {file}: the same command" in capsys.readouterr().err
    assert file.read_bytes().count(b"\n") == 2  # and half a row, which is passed over


def no_results(monkeypatch, error: OSError) -> None:
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(eval.answering, "write_results", failing)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_answers_stay_where_the_results_cannot_be_written(tmp_path, monkeypatch, number):
    no_results(monkeypatch, OSError(number, os.strerror(number), "scores-site.json"))
    with pytest.raises(StepFailed) as failed:
        evaluated(tmp_path)
    file = tmp_path / "predictions-site.partial.jsonl"
    assert str(failed.value) == (
        "site is answered, but its results cannot be written (scores-site.json:"
        f" {os.strerror(number)}). Its 4 answers: they are kept in {file}; to score them: python -m"
        f" eval.evaluate --predictions site={file}"
    )
    assert read_predictions(file) == ANSWERS


def test_answers_go_to_a_temporary_folder_where_the_disk_is_full(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    fill_the_disk(monkeypatch, rows=1)
    no_results(monkeypatch, FULL)
    with pytest.raises(StepFailed) as failed:
        evaluated(tmp_path / "full")
    [file] = elsewhere.glob("answers-*/predictions-site.jsonl")
    assert f"they are kept in {file}; to score them" in str(failed.value)
    assert read_predictions(file) == ANSWERS


def test_answers_that_can_be_kept_nowhere_are_told(tmp_path, monkeypatch):
    def full(*arguments):
        raise FULL

    fill_the_disk(monkeypatch, rows=1)
    no_results(monkeypatch, FULL)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: full())
    with pytest.raises(StepFailed, match="4 answers: they can be kept nowhere else either"):
        evaluated(tmp_path)
