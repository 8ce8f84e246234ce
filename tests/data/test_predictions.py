"""Protect the row of predictions-<name>.jsonl and completions.jsonl.

Checked: its fields and their order, what is read back from it, which files are refused, and that
rollouts are scored completion by completion.

Run: pytest tests/data/test_predictions.py
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import data.predictions
from data.answers import parse_answer
from data.examples import Example
from data.files import DataError, write_jsonl
from data.labels import LABELS, NIH_NINE, NIH_TEN, Target
from data.predictions import (
    Prediction,
    iter_predictions,
    read_predictions,
    relabel,
    write_predictions,
)

RIGHT = "<think>x</think><solution>Edema</solution>"
EXAMPLE = Example(
    "e1",
    "p1",
    "e1.png",
    ("Edema", "Fracture"),
    "site",
    Path("images"),
    ("Edema", "Pneumonia"),
    ("oedema",),
)


def predicted(completion: str = RIGHT, **fields) -> Prediction:
    prediction = Prediction.of_example(
        EXAMPLE,
        prompt="demo",
        completion=completion,
        completion_length=7,
        answer_format="think_solution",
    )
    return replace(prediction, **fields)


ROW = {
    "id": "e1",
    "patient_id": "p1",
    "dataset": "site",
    "labels": ["Edema", "Fracture"],
    "evaluated_labels": ["Edema", "Pneumonia"],
    "source_labels": ["oedema"],
    "prompt": "demo",
    "completion": "<solution>Edema, nodule</solution>",
    "completion_length": 7,
    "predicted": ["Edema"],
    "valid": False,
    "parsed": True,
    "problem": "think_missing",
    "unknown": ["nodule"],
    "answer_format": "think_solution",
}


def test_a_row_has_its_fields_in_their_order():
    row = predicted("<solution>Edema, nodule</solution>").with_extra(rewards={"hard": {"total": 1}})
    assert list(row.to_row().items()) == [*ROW.items(), ("rewards", {"hard": {"total": 1}})]
    assert Prediction.from_row(row.to_row()) == row
    # the labels that are not evaluated are unknown, not true
    assert row.target == Target(frozenset({"Edema"}), frozenset({"Edema", "Pneumonia"}))


def test_a_row_of_another_order_or_of_few_fields_is_read():
    few = {name: ROW[name] for name in reversed(ROW) if name not in ("predicted", "unknown")}
    assert Prediction.from_row(few | {"source_labels": None}).to_row() == ROW | {
        "source_labels": []
    }
    assert Prediction.from_row(few, "solution").answer == parse_answer(
        few["completion"], "solution"
    )


def test_an_answer_that_is_there_is_not_parsed_again(monkeypatch):
    def refused(text, answer_format):
        raise AssertionError("parsed again")

    answer = parse_answer(RIGHT)
    monkeypatch.setattr(data.predictions, "parse_answer", refused)
    row = Prediction.of_example(
        EXAMPLE,
        prompt="demo",
        completion=RIGHT,
        completion_length=7,
        answer_format="think_solution",
        answer=answer,
        extra={"group": 3},
    )
    assert row.answer is answer and row.to_row()["group"] == 3
    assert row.with_extra(step=1).extra == {"group": 3, "step": 1}


def test_who_is_on_the_image_goes_along_and_is_absent_where_unknown(tmp_path):
    example = replace(EXAMPLE, sex="F", age=0, view="PA")
    row = Prediction.of_example(
        example, prompt="demo", completion=RIGHT, completion_length=7, answer_format="solution"
    )
    assert (row.sex, row.age, row.view) == ("F", 0, "PA")
    assert list(row.to_row())[-4:] == ["answer_format", "sex", "age", "view"]
    assert read_predictions(write_predictions(tmp_path / "p.jsonl", [row])) == [row]
    # a row of before, and one that says null, come back as they would have been written before
    for unknown in (ROW, ROW | {"sex": None, "age": None, "view": None}):
        [read] = read_predictions(write_jsonl(tmp_path / "old.jsonl", [unknown]))
        assert read.extra == {} and not {"sex", "age", "view"} & read.to_row().keys()
    with pytest.raises(DataError, match="line 1: field 'sex' is \"woman\"; it must be"):
        read_predictions(write_jsonl(tmp_path / "bad.jsonl", [ROW | {"sex": "woman"}]))


def test_files_are_written_and_read(tmp_path):
    rows = [predicted(id=name) for name in ("a", "b", "c")]
    file = write_predictions(tmp_path / "predictions.jsonl", rows)
    assert read_predictions(file) == rows
    assert list(iter_predictions(file, ids={"c", "a"})) == [rows[0], rows[2]]


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_a_file_without_rows_is_an_error(tmp_path, content):
    file = tmp_path / "predictions.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        DataError, match="no such predictions file" if content is None else "holds no"
    ):
        read_predictions(file)


def test_only_twenty_problems_are_listed_and_the_others_counted(tmp_path):
    file = write_jsonl(tmp_path / "predictions.jsonl", [ROW | {"id": None}] * 23)
    with pytest.raises(DataError) as caught:
        read_predictions(file)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == f"{file}: and 3 more problems"


# ---- rollouts ------------------------------------------------------------------------------------
def test_an_id_may_come_again_in_rollouts_alone(tmp_path):
    rollout = [ROW | {"step": 2, "group": 0, "advantage": advantage} for advantage in (-1.0, 1.0)]
    again = [*rollout, ROW | {"step": 4, "group": 1, "advantage": 0.0}]
    read = read_predictions(write_jsonl(tmp_path / "completions.jsonl", again))
    assert [(row.extra["step"], row.extra["group"], row.extra["advantage"]) for row in read] == [
        (2, 0, -1.0),
        (2, 0, 1.0),
        (4, 1, 0.0),
    ]
    for field in ("step", "group"):  # either alone says nothing of a rollout
        rows = [{name: row[name] for name in row if name != field} for row in rollout]
        with pytest.raises(DataError, match="line 2: id 'e1' is also on line 1"):
            read_predictions(write_jsonl(tmp_path / f"without-{field}.jsonl", rows))
    with pytest.raises(DataError, match="line 2: field 'completion' is null"):
        read_predictions(
            write_jsonl(tmp_path / "bad.jsonl", [rollout[0], rollout[1] | {"completion": None}])
        )


# ---- another label map ---------------------------------------------------------------------------
def test_truth_is_taken_anew_from_nihs_own_strings():
    rows = [
        predicted(id="a", source_labels=("Effusion", "Mass")),
        predicted(id="b", source_labels=("Infiltration",)),
    ]
    for label_map, evaluated, first in (
        ("nih_nine", NIH_NINE, ("Lung Lesion",)),
        ("nih_ten", NIH_TEN, ("Lung Lesion", "Pleural Effusion")),
    ):
        new = relabel(rows, label_map)
        assert [row.labels for row in new] == [first, ()]
        assert {row.evaluated_labels for row in new} == {evaluated}
        assert [row.answer for row in new] == [row.answer for row in rows]
    assert [row.labels for row in relabel(rows, "nih_ten", "no_finding")][1] == ("No Finding",)
    assert [row.id for row in relabel(rows, "nih_ten", "drop")] == ["a"]
    with pytest.raises(DataError, match="old.jsonl, id 'c': no source_labels"):
        relabel([predicted(id="c", source_labels=())], "nih_ten", source="old.jsonl")


def test_labels_of_a_row_must_be_known(tmp_path):
    bad = ROW | {"evaluated_labels": ["Oedema"]}
    file = tmp_path / "predictions.jsonl"
    file.write_text(json.dumps(bad) + "\n")
    with pytest.raises(DataError) as caught:
        read_predictions(file)
    assert caught.value.problems == [
        f"{file}, line 1: field 'evaluated_labels' holds 'Oedema'; the labels are:"
        f" {', '.join(LABELS)}; labels of your own need --label_file"
    ]
