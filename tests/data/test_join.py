"""Protect the joining of any model's answers with a data file.

Checked: the truth is the data file's, what is kept of a row, and that everything that is wrong is
named at once.

Run: pytest tests/data/test_join.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.examples import Example
from data.files import DataError, write_jsonl
from data.join import read_answers
from data.labels import LABELS, NIH_NINE
from data.predictions import read_predictions, write_predictions

EXAMPLES = [
    Example("a", "p1", "a.png", ("Edema",), "nih", Path(), NIH_NINE, ("Edema",), sex="F", age=61),
    Example("b", "p1", "b.png", (), "nih", Path(), NIH_NINE, ("Hernia",), view="PA"),
    Example("c", "p2", "c.png", ("Fracture",), "site", Path()),
]
ROWS = [
    {"id": "c", "completion": "<think>x</think><solution>Fracture</solution>"},
    {"id": "a", "completion": "Edema, nodule", "answer_format": "label_list"},
    {
        "id": "b",
        "completion": "",
        "completion_length": 0,
        "prompt": "mine",
        "cost": 0.1,
        "sex": "M",
    },
]


def answers(tmp_path, rows=ROWS, **options):
    file = write_jsonl(tmp_path / "answers.jsonl", rows)
    return read_answers(file, EXAMPLES, data_file="test.jsonl", **options)


def refusal(tmp_path, *rows, **options) -> list[str]:
    """Return the problems without the file's name, which begins each."""
    with pytest.raises(DataError) as caught:
        answers(tmp_path, rows, **options)
    file = str(tmp_path / "answers.jsonl")
    assert all(problem.startswith(file) for problem in caught.value.problems)
    return [problem.removeprefix(file) for problem in caught.value.problems]


def test_answers_get_the_truth_of_the_data_file(tmp_path):
    a, b, c = answers(tmp_path)
    assert [row.id for row in (a, b, c)] == ["a", "b", "c"]  # the data file's order
    assert (a.patient_id, a.dataset, a.labels, a.evaluated_labels) == (
        "p1",
        "nih",
        ("Edema",),
        NIH_NINE,
    )
    assert (a.source_labels, a.sex, a.age, b.view) == (("Edema",), "F", 61, "PA")
    assert c.evaluated_labels == LABELS
    assert [row.completion_length for row in (a, b, c)] == [None, 0, None]
    assert [row.answer_format for row in (a, b, c)] == [
        "label_list",
        "think_solution",
        "think_solution",
    ]
    assert a.answer.labels == ("Edema",) and a.answer.unknown == ("nodule",)
    assert not b.answer.parsed and c.answer.valid  # no answer is a failed one
    # nor is it read of b's row that b is a man
    assert b.prompt == "mine" and b.extra == {"cost": 0.1} and b.sex is None


def test_the_joined_rows_are_predictions_like_any_other(tmp_path):
    joined = answers(tmp_path)
    file = write_predictions(tmp_path / "predictions.jsonl", joined)
    assert read_predictions(file) == joined
    # and go back: what a row says of the truth is not read, so a corrected data file corrects them
    old = [json.loads(line) | {"labels": ["Pneumonia"]} for line in file.read_text().splitlines()]
    assert answers(tmp_path, old) == joined


def test_one_format_for_all_rows(tmp_path):
    assert [row.answer_format for row in answers(tmp_path, answer_format="solution")] == [
        "solution"
    ] * 3


def test_only_the_first_examples_need_answers(tmp_path):
    assert [row.id for row in answers(tmp_path, ROWS[1:], max_samples=2)] == ["a", "b"]
    assert [row.id for row in answers(tmp_path, max_samples=1)] == ["a"]  # the others are known


def test_several_samples_of_an_image(tmp_path):
    rows = [row | {"sample": k} for k in (1, 0) for row in ROWS]
    found = [(row.id, row.extra["sample"]) for row in answers(tmp_path, rows)]
    assert found == [("a", 1), ("a", 0), ("b", 1), ("b", 0), ("c", 1), ("c", 0)]


def test_everything_that_is_wrong_is_named_at_once(tmp_path):
    file = tmp_path / "answers.jsonl"
    lines = [
        {"id": "a", "completion": "x"},
        {"id": "a", "completion": "y"},
        {"id": "z", "completion": "x"},
        {"id": 3, "completion": "x"},
        {"id": "b", "completion": None, "completion_length": "9", "answer_format": "xml"},
        {"completion": "x", "prompt": 3, "sample": -1},
        ["a", "x"],
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n\n{"id": "torn'
    file.write_bytes(text.encode() + b"\n\xff{}")
    with pytest.raises(DataError) as caught:
        read_answers(file, EXAMPLES, data_file="test.jsonl")
    said = [problem.removeprefix(str(file)) for problem in caught.value.problems]
    # b has a row, which is wrong in itself: only c has none
    assert said == [
        ": 1 of the 3 images of test.jsonl have no answer: 'c'; where the model gave none, write a"
        ' row with "completion": "" (it counts as failed), else leave the images out of the data'
        " file or give --max_samples",
        ", line 2: id 'a' is also on line 1; give each image one answer, or number several by"
        ' "sample": 0, 1, ...',
        ", line 3: id 'z' is not in test.jsonl",
        ", line 4: field 'id' is 3; it must be a string",
        ", line 5: field 'completion' is null; it must be a string (\"\" where the model gave no"
        " answer)",
        ", line 5: field 'completion_length' is \"9\"; it must be a number from 0 up to"
        " 1,000,000,000",
        ", line 5: field 'answer_format' is \"xml\"; known: think_solution, solution, answer_tag,"
        " label_list",
        ", line 6: field 'id' is missing; it must be a string",
        ", line 6: field 'sample' is -1; it must be a number from 0 up to 1,000,000,000",
        ", line 6: field 'prompt' is 3; it must be a string",
        ", line 7: holds list, not an object with fields id, completion",
        ", line 9: not valid JSON (Unterminated string starting at, column 8)",
        ", line 10: not UTF-8 text (invalid start byte, byte 1); save the file as UTF-8",
    ]


def test_many_missing_answers_are_counted_and_the_first_named(tmp_path):
    examples = [Example(f"e{n}", "p", "x.png", (), "site", Path()) for n in range(1200)]
    file = write_jsonl(tmp_path / "answers.jsonl", [{"id": "e1", "completion": "x"}])
    with pytest.raises(DataError) as caught:
        read_answers(file, examples, data_file="test.jsonl")
    [problem] = caught.value.problems
    assert (
        "1,199 of the 1,200 images of test.jsonl have no answer: 'e0', 'e2', 'e3', ...;" in problem
    )


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_has_no_answers(tmp_path, content):
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(DataError, match="3 of the 3 images of test.jsonl have no answer"):
        read_answers(tmp_path / "answers.jsonl", EXAMPLES, data_file="test.jsonl")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file of answers"):
        read_answers(tmp_path / "none.jsonl", EXAMPLES, data_file="test.jsonl")


def test_half_an_emoji_is_kept(tmp_path):
    """An answer that was cut inside a character must neither stop the command nor be changed."""
    rows = [dict(row) for row in ROWS]
    rows[0]["completion"] = "cut \ud83d"
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    joined = read_answers(tmp_path / "answers.jsonl", EXAMPLES, data_file="test.jsonl")
    file = write_predictions(tmp_path / "predictions.jsonl", joined)
    assert read_predictions(file)[2].completion == "cut \ud83d"
