"""Protect the data file's contract.

Checked: what is read, what is refused and how it is said, and splits that share no patient.

A row that is read wrongly trains and scores without any error.

Run: pytest tests/data/test_examples.py
"""

from __future__ import annotations

import json
import os

import pytest

from data.examples import (
    Example,
    data_file,
    read_examples,
    read_jsonl,
    row_of,
    split_by_patient,
)
from data.files import MAX_PROBLEMS, DataError, write_jsonl
from data.labels import LABELS, NIH_NINE, LabelSet, Target

ROW = {"id": "a", "patient_id": "p1", "image": "a.png", "labels": ["Edema"], "dataset": "nih"}


def write(path, *lines) -> str:
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n",
        encoding="utf-8",
    )
    return path


def refusal(path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_jsonl(path)
    assert isinstance(caught.value, ValueError) and str(caught.value) == "\n".join(
        caught.value.problems
    )
    return caught.value.problems


# Reading


def test_a_row_with_everything(tmp_path):
    row = ROW | {
        "labels": ["Fracture", "Edema", "Fracture"],
        "evaluated_labels": ["Pneumonia", "Edema"],
        "source_labels": ["oedema", "rib #"],
        "answer": "<think>x</think>",
        "sex": "F",
        "age": 61,
        "view": "PA",
        "note": {"kind": "x"},  # not known here
    }
    [example] = read_jsonl(write(tmp_path / "d.jsonl", row))
    assert example == Example(
        # CheXpert's order, once each
        id="a",
        patient_id="p1",
        image="a.png",
        labels=("Edema", "Fracture"),
        dataset="nih",
        image_root=tmp_path,
        evaluated_labels=("Edema", "Pneumonia"),
        source_labels=("oedema", "rib #"),
        answer="<think>x</think>",
        extra={"note": {"kind": "x"}},
        sex="F",
        age=61,
        view="PA",
    )
    assert read_jsonl(write(tmp_path / "again.jsonl", row_of(example))) == [example]
    # Fracture is not evaluated here: unknown, not true
    assert example.target == Target(frozenset({"Edema"}), frozenset({"Edema", "Pneumonia"}))


@pytest.mark.parametrize(
    "field, value, shown",
    [
        ("sex", "female", 'it must be "F" or "M", and absent where unknown'),
        ("sex", "", 'it must be "F" or "M"'),
        ("sex", ["F"], 'it must be "F" or "M"'),
        ("age", "61", "it must be whole years, 0 to 120, and absent where unknown"),
        ("age", 61.0, "it must be whole years"),
        ("age", True, "it must be whole years"),
        ("age", -1, "it must be whole years"),
        ("age", 121, "it must be whole years"),
        ("view", 3, 'it must be a string such as "PA", and absent where unknown'),
        ("view", " ", "it must be a string"),
    ],
)
def test_who_is_checked(tmp_path, field, value, shown):
    [problem] = refusal(write(tmp_path / "d.jsonl", ROW | {field: value}))
    assert problem.startswith(f"{tmp_path / 'd.jsonl'}, line 1: field {field!r} is ")
    assert shown in problem


@pytest.mark.parametrize("age", [0, 120])
def test_the_ages_at_the_bounds(tmp_path, age):
    [example] = read_jsonl(write(tmp_path / "d.jsonl", ROW | {"age": age}))
    assert example.age == age


def test_a_row_of_an_unknown_person_is_written_as_before(tmp_path):
    """Files made before the fields were there keep their bytes, and null is the same as absent."""
    row = ROW | {"study_id": "s1", "view": "PA"}  # as data.select has always written it
    [example] = read_jsonl(write(tmp_path / "d.jsonl", row | {"sex": None, "age": None}))
    assert list(row_of(example))[-2:] == ["study_id", "view"]
    [plain] = read_jsonl(write(tmp_path / "e.jsonl", ROW))
    assert not {"sex", "age", "view"} & row_of(plain).keys()


def test_defaults_of_the_optional_fields(tmp_path):
    for optional in ({}, {"evaluated_labels": None, "source_labels": None, "answer": None}):
        [example] = read_jsonl(write(tmp_path / "d.jsonl", ROW | optional))
        assert (example.evaluated_labels, example.source_labels, example.answer, example.extra) == (
            LABELS,
            (),
            None,
            {},
        )
        assert example.target == Target(frozenset({"Edema"}), frozenset(LABELS))


def test_evaluating_no_label_is_not_the_default(tmp_path):
    [example] = read_jsonl(write(tmp_path / "d.jsonl", ROW | {"evaluated_labels": []}))
    assert example.target == Target(frozenset(), frozenset())


def test_no_label_at_all_is_allowed(tmp_path):
    [example] = read_jsonl(
        write(tmp_path / "d.jsonl", ROW | {"labels": [], "evaluated_labels": list(NIH_NINE)})
    )
    assert (example.labels, example.evaluated_labels) == ((), NIH_NINE)


def test_blank_lines_order_and_byte_order_mark(tmp_path):
    path = tmp_path / "d.jsonl"
    lines = [
        "",
        json.dumps(ROW | {"id": "z"}),
        "   ",
        json.dumps(ROW | {"id": "ä"}, ensure_ascii=False),
        "",
        "",
    ]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + "\r\n".join(lines).encode())
    assert [example.id for example in read_jsonl(path)] == ["a", "z", "ä"]


def test_image_root_and_names(tmp_path):
    path = write(tmp_path / "d.jsonl", ROW)
    assert read_examples(str(path))[0].image_root == tmp_path  # the file's own folder
    assert read_examples(path, tmp_path / "elsewhere")[0].image_root == tmp_path / "elsewhere"
    assert data_file("demo.jsonl").name == "demo.jsonl"
    with pytest.raises(
        DataError, match="demo:nothing: the demo has no split 'nothing'; it has .*train"
    ):
        data_file("demo:nothing")
    with pytest.raises(DataError, match="^demo:test-a: the demo's images have CheXpert's 14 label"):
        data_file("demo:test-a", LabelSet(("Tuberculosis",)))


# Refusals


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        assert refusal(path) == [
            f"{path}: no such data file; give a JSONL file with one example a line"
        ]


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    assert refusal(path) == [f"{path}: the file holds no examples; it needs at least one"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            '{"id": "a",',
            "not valid JSON (Expecting property name enclosed in double quotes, column 12)",
        ),
        ('{"id": "a"} {}', "not valid JSON (Extra data, column 13)"),
        ("[1, 2]", "holds list, not an object with fields id, patient_id, image, labels, dataset"),
        (
            "null",
            "holds NoneType, not an object with fields id, patient_id, image, labels, dataset",
        ),
    ],
)
def test_lines_that_are_no_object(tmp_path, line, said):
    path = write(tmp_path / "d.jsonl", ROW, "", line)
    assert refusal(path) == [f"{path}, line 3: {said}"]


def test_another_encoding(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + '{"id": "ä"}'.encode("latin-1"))
    assert refusal(path) == [
        f"{path}, line 2: not UTF-8 text (invalid continuation byte, byte 9); save the file as"
        " UTF-8"
    ]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("id", 7, "field 'id' is 7; it must be a string"),
        ("patient_id", None, "field 'patient_id' is null; it must be a string"),
        ("image", ["a.png"], "field 'image' is [\"a.png\"]; it must be a string"),
        ("labels", "Edema", "field 'labels' is \"Edema\"; it must be a list of strings"),
        ("labels", [1], "field 'labels' is [1]; it must be a list of strings"),
        ("labels", None, "field 'labels' is null; it must be a list of strings"),
        ("dataset", False, "field 'dataset' is false; it must be a string"),
        ("evaluated_labels", {}, "field 'evaluated_labels' is {}; it must be a list of strings"),
        ("source_labels", "x", "field 'source_labels' is \"x\"; it must be a list of strings"),
        ("answer", 3.5, "field 'answer' is 3.5; it must be a string"),
        (
            "labels",
            ["Edema", "edema", "Mass"],
            f"field 'labels' holds 'edema', 'Mass'; the labels are: {', '.join(LABELS)};"
            " labels of your own need --label_file",
        ),
        (
            "evaluated_labels",
            ["Nodule"],
            f"field 'evaluated_labels' holds 'Nodule'; the labels are: {', '.join(LABELS)};"
            " labels of your own need --label_file",
        ),
    ],
)
def test_wrong_types_and_labels(tmp_path, field, value, said):
    path = write(tmp_path / "d.jsonl", ROW | {"id": "b"}, ROW | {field: value})
    assert refusal(path) == [f"{path}, line 2: {said}"]


def test_a_forgotten_label_file_is_told_with_the_list_of_all_labels_once(tmp_path):
    own = [f"Finding {letter}" for letter in "ABCDEFG"]
    rows = [ROW | {"id": str(i), "labels": own[:1], "evaluated_labels": own} for i in range(3)]
    first, *others = refusal(write(tmp_path / "d.jsonl", *rows))
    assert first.endswith(
        f"; the labels are: {', '.join(LABELS)}; labels of your own need --label_file"
    )
    shown = ", ".join(map(repr, own[:5]))
    assert [line.partition("d.jsonl, ")[2] for line in others] == [
        f"line 1: field 'evaluated_labels' holds {shown}, ...",
        "line 2: field 'labels' holds 'Finding A'",
        f"line 2: field 'evaluated_labels' holds {shown}, ...",
        "line 3: field 'labels' holds 'Finding A'",
        f"line 3: field 'evaluated_labels' holds {shown}, ...",
    ]


@pytest.mark.parametrize("field", ROW)
def test_missing_fields(tmp_path, field):
    path = write(
        tmp_path / "d.jsonl", {name: value for name, value in ROW.items() if name != field}
    )
    assert refusal(path) == [f"{path}, line 1: field {field!r} is missing"]


def test_all_problems_at_once(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"id": 1, "image": "x"},
        ROW,
        "{",
        ROW,
        ROW | {"id": "c", "labels": ["X"]},
    )
    said = refusal(path)
    assert [line.removeprefix(f"{path}, ")[:42] for line in said] == [
        "line 1: field 'patient_id' is missing",
        "line 1: field 'labels' is missing",
        "line 1: field 'dataset' is missing",
        "line 1: field 'id' is 1; it must be a stri",
        "line 3: not valid JSON (Expecting property",
        "line 4: field 'id': 'a' is also on line 2;",
        "line 5: field 'labels' holds 'X'; the labe",
    ]


def test_a_long_list_of_problems_is_cut(tmp_path):
    path = write(tmp_path / "d.jsonl", *["{"] * (MAX_PROBLEMS + 5))
    said = refusal(path)
    assert len(said) == MAX_PROBLEMS + 1 and said[-1] == f"{path}: and 5 more problems"
    assert len(refusal(write(tmp_path / "d.jsonl", *["{"] * MAX_PROBLEMS))) == MAX_PROBLEMS


# Writing


def test_written_rows_are_read_again(tmp_path):
    rows = [ROW | {"note": 'ödem \u2028 "x"\n'}, ROW | {"id": "b"}]
    path = write_jsonl(tmp_path / "new" / "d.jsonl", rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows
    assert [example.extra for example in read_jsonl(path)] == [{"note": rows[0]["note"]}, {}]


def test_writing_is_all_or_nothing(tmp_path):
    path = write(tmp_path / "d.jsonl", ROW)

    def rows():
        yield {"id": "new"}
        # untouched while the new one is being written
        assert path.read_text() == json.dumps(ROW) + "\n"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_jsonl(path, rows())
    assert path.read_text() == json.dumps(ROW) + "\n"
    write_jsonl(path, [{"id": "new"}])
    assert path.read_text() == '{"id": "new"}\n' and os.listdir(tmp_path) == ["d.jsonl"]


# Splits


def patients(*counts: int) -> list[Example]:
    """Make `counts[i]` examples of patient i, patients in turn."""
    return [
        Example(f"{p}-{n}", f"p{p}", "x.png", (), "site", None)
        for n in range(max(counts))
        for p, count in enumerate(counts)
        if n < count
    ]


def test_a_split_shares_no_patient_and_loses_no_example():
    examples = patients(*[1, 2, 3, 4] * 25)
    rest, held = split_by_patient(examples, 0.1, seed=1)
    assert not {e.patient_id for e in rest} & {e.patient_id for e in held}
    assert sorted(e.id for e in rest + held) == sorted(e.id for e in examples)
    # order kept
    assert rest == [e for e in examples if e in rest] and held == [e for e in examples if e in held]
    # 250 examples: at least 25, and no more than one patient (4 examples) over it
    assert 25 <= len(held) < 25 + 4


def test_a_split_is_a_function_of_its_seed():
    examples = patients(*[2] * 40)
    first = split_by_patient(examples, 0.25, seed=3)
    assert split_by_patient(examples, 0.25, seed=3) == first
    # The patients decide, not the order of the file.
    assert {e.id for e in split_by_patient(examples[::-1], 0.25, seed=3)[1]} == {
        e.id for e in first[1]
    }
    assert split_by_patient(examples, 0.25, seed=4) != first


def test_both_sides_of_a_split_have_a_patient():
    examples = patients(5, 5)
    for fraction in (0.0, 0.01, 0.99, 1.0):
        rest, held = split_by_patient(examples, fraction, seed=0)
        assert len(rest) == len(held) == 5
    with pytest.raises(DataError, match=r"5 examples of 1 patient\(s\); at least two are needed"):
        split_by_patient(patients(5), 0.1, seed=0)
