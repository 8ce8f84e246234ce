"""Protect label files: what they may hold, every problem by its line, and answers in their labels.

Run: pytest tests/data/test_label_sets.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.answers import parse_answer
from data.entries import unknown_kind
from data.examples import read_jsonl
from data.files import DataError
from data.label_sets import label_lines, read_labels
from data.labels import CHEXPERT, LabelPolicy, LabelSet, canonical_label, metric_name
from data.predictions import Prediction, iter_predictions, read_predictions, write_predictions

TEXT = """\ufeff# findings of a screening programme
exclusive: Normal | no abnormality
beside: Old Sutures
Tuberculosis | TB | phthisis   # two spellings more

Silicosis
肺炎|pneumonie
Mass/Nodule
"""
OWN = LabelSet(
    ("Normal", "Old Sutures", "Tuberculosis", "Silicosis", "肺炎", "Mass/Nodule"),
    {
        "no abnormality": "Normal",
        "TB": "Tuberculosis",
        "phthisis": "Tuberculosis",
        "pneumonie": "肺炎",
    },
    "Normal",
    ("Old Sutures",),
)


def problems_of(text: str) -> list[str]:
    with pytest.raises(DataError) as error:
        read_labels(text, "labels.txt")
    return error.value.problems


def said(solution: str, labels: LabelSet = OWN):
    return parse_answer(f"<think>x</think><solution>{solution}</solution>", label_set=labels)


# ---- the file ------------------------------------------------------------------------------------
def test_a_label_file_holds_names_aliases_marks_and_comments():
    assert read_labels(TEXT, "labels.txt") == OWN
    for end in ("\r\n", "\r"):
        assert read_labels(TEXT.replace("\n", end), "labels.txt") == OWN


def test_lines_of_a_label_set_are_its_file_again():
    assert label_lines(OWN) == [
        "exclusive: Normal | no abnormality",
        "beside: Old Sutures",
        "Tuberculosis | TB | phthisis",
        "Silicosis",
        "肺炎 | pneumonie",
        "Mass/Nodule",
    ]
    assert read_labels("\n".join(label_lines(OWN)), "a row") == OWN
    assert read_labels("\n".join(label_lines(CHEXPERT)), "the 14") is CHEXPERT


def test_a_decomposed_letter_is_the_composed_one_and_order_is_the_files():
    assert read_labels("Zyste\nO\u0308dem\n", "f").names == ("Zyste", "\u00d6dem")


@pytest.mark.parametrize("text", ["", "\n \n", "# nothing\n", "\ufeff"])
def test_a_file_without_labels_is_refused(text):
    assert problems_of(text) == ["labels.txt: holds no label; write one a line"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("Edema\nEdema", 2, "'Edema' is also on line 1"),
        ("Edema\nEDEMA", 2, "'EDEMA' looks like 'Edema' on line 1"),
        ("Lung Mass\nlung-mass", 2, "looks like 'Lung Mass' on line 1"),
        ("Lung_Mass\nLung Mass", 2, "looks like 'Lung_Mass'"),
        ("\uff25dema\nEdema", 2, "looks like"),  # a full-width letter
        ("A/B\nA+B", 2, "only by marks"),
        # a Cyrillic E, a Greek O; then whole words in Cyrillic or Greek letters
        ("\u0415dema\nMass", 1, "mixes letters of Latin and Cyrillic in one word"),
        ("COPD | C\u039fPD", 1, "mixes letters of Latin and Greek in one word"),
        ("TB\n\u0422\u0412", 2, "looks like 'TB' on line 1, in Cyrillic letters; labels must"),
        ("\u03a4\u0392\ntb", 2, "looks like '\u03a4\u0392' on line 1, in Latin letters"),
        ("Ex\n\u0401\u0445 | \u0395\u03a7", 2, "is the label on line 1, in Greek letters"),
        ("TB | Silicosis\nSilicosis", 1, "the alias 'Silicosis' of 'TB' is the label on line 2"),
        ("A | x\nB | X", 2, "the alias 'X' of 'B' is an alias of 'A' on line 1"),
        ("exclusive: A\nexclusive: B", 2, "'B' cannot be exclusive as well"),
        ("A\nbeside: B", 2, "'B' is beside nothing"),
        ("normal: A\nB", 1, "'normal' is no keyword; before a colon stands exclusive or beside"),
        ("exclusive:\nA", 1, "no label stands behind exclusive:"),
        ("A\nB |", 2, "a name or alias is empty"),
        ("| A\nB", 1, "a name or alias is empty"),
        ("Mass, left", 1, "holds ',', which ends an entry"),
        ("Mass; left", 1, "holds ';', which ends an entry"),
        ("Mass\u3001B", 1, "which ends an entry"),
        ("A | B\uff1a", 1, "which ends a heading"),
        ("<think>", 1, "holds '<', which belongs to tags"),
        ("Mass > 3 cm", 1, "holds '>', which belongs to tags"),
        ("A {b}", 1, "holds '{', which belongs to the texts of prompts"),
        ("A\tB\x07", 1, "control character"),
        ("12", 1, "has no letter"),
        ("---", 1, "has no letter"),
        ("3-vessel disease", 1, "which leaves 'vesseldisease'"),
        ("a) Mass", 1, "counts as markup"),
        ("+ve sign", 1, "cannot be read back"),
        ("Mass\nNodule\nMass and Nodule", 3, "reads as the labels Mass, Nodule"),
        ("x" * 201, 1, "201 characters, at most 200"),
    ],
)
def test_what_cannot_be_a_label_is_named_by_its_line(text, line, words):
    (problem,) = problems_of(text)
    assert problem.startswith(f"labels.txt, line {line}: ") and words in problem


def test_all_problems_come_at_once_in_the_files_order():
    found = problems_of("A, B\nEdema\nnormal: C\nedema\nTB | Edema\n")
    assert [problem.partition(":")[0] for problem in found] == [
        f"labels.txt, line {line}" for line in (1, 3, 4, 5)
    ]


def test_names_that_are_words_of_the_parser_are_still_labels():
    names = ("Absent", "None", "No Edema", "Edema", "Possible", "Findings", "Not seen")
    labels = read_labels("\n".join(names), "f")
    assert said(", ".join(names), labels).labels == names


def test_names_of_another_script_and_of_letters_beside_words_are_labels():
    names = (
        "\u041d\u043e\u0440\u043c\u0430",
        "\u03b11-Defizit",
        "\u03b2 Thal",
        "X-Kontrast",
        "\u80ba\u708eX",
    )
    assert read_labels("\n".join(names), "f").names == names


def test_hundreds_of_labels_are_read_in_a_moment():
    assert len(read_labels("\n".join(f"Label of number {i}" for i in range(500)), "f").names) == 500


# ---- answers -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("solution", "labels", "unknown", "contradictions"),
    [
        ("Tuberculosis", ("Tuberculosis",), (), ()),
        ("tb; *SILICOSIS*", ("Tuberculosis", "Silicosis"), (), ()),
        ("肺炎", ("肺炎",), (), ()),
        ("Mass/Nodule / TB", (), ("Mass/Nodule / TB",), ()),  # a joint cuts both, or none
        ("Mass/Nodule, Edema", ("Mass/Nodule",), ("Edema",), ()),  # none of CheXpert's is left
        ("No Finding, Pneumonia", (), ("No Finding", "Pneumonia"), ()),
        ("no abnormality, old sutures", ("Normal", "Old Sutures"), (), ()),
        (
            "Normal, TB, Old Sutures",
            ("Normal", "Tuberculosis", "Old Sutures"),
            (),
            ("Tuberculosis",),
        ),
        ("no TB, Silicosis", ("Silicosis",), ("no TB",), ()),
        ("negative for TB, Silicosis", (), ("negative for TB, Silicosis",), ()),
        ("Normal: TB", (), ("Normal: TB",), ()),
    ],
)
def test_answers_are_read_by_the_labels_of_the_file(solution, labels, unknown, contradictions):
    answer = said(solution)
    assert (answer.labels, answer.unknown, answer.contradictions) == (
        labels,
        unknown,
        contradictions,
    )


def test_without_an_exclusive_label_nothing_contradicts():
    labels = read_labels("Normal\nTuberculosis", "f")
    assert said("Normal, Tuberculosis", labels).contradictions == ()


def test_kinds_of_unknown_entries_know_the_labels_of_the_file():
    assert unknown_kind("left TB", OWN) == "qualified"
    assert unknown_kind("TB: yes", OWN) == "affirmed"
    assert unknown_kind("no TB", OWN) == "negated"
    assert unknown_kind("left Edema", OWN) == "other" and unknown_kind("left Edema") == "qualified"


def test_the_14_stay_what_answers_are_read_by_where_nothing_is_said():
    assert parse_answer("<solution>tb, edema</solution>", "solution").labels == ("Edema",)
    assert canonical_label("TB") is None and canonical_label("oedema") == "Edema"


# ---- rows ----------------------------------------------------------------------------------------
def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def row(id: str, **fields) -> dict:
    return {"id": id, "patient_id": id, "image": "x.png", "dataset": "own", **fields}


def test_rows_of_a_data_file_hold_the_labels_of_the_set_in_its_order(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        row("a", labels=["肺炎", "Tuberculosis"]),
        row("b", labels=[], evaluated_labels=["Silicosis", "Normal"]),
    )
    a, b = read_jsonl(path, label_set=OWN)
    assert a.labels == ("Tuberculosis", "肺炎") and a.evaluated_labels == OWN.names
    assert b.evaluated_labels == ("Normal", "Silicosis") and a.label_set is OWN
    with pytest.raises(DataError, match=r"line 1: field 'labels' holds '肺炎', 'Tuberculosis'"):
        read_jsonl(path)
    with pytest.raises(DataError, match="holds 'Edema'; the labels are: Normal, Old Sutures, Tube"):
        read_jsonl(write(tmp_path / "e.jsonl", row("a", labels=["Edema"])), label_set=OWN)


def prediction(tmp_path: Path, labels: LabelSet = OWN) -> Prediction:
    named = [labels.names[2]]
    (example,) = read_jsonl(write(tmp_path / "d.jsonl", row("a", labels=named)), label_set=labels)
    return Prediction.of_example(
        example,
        prompt="mine",
        completion="<solution>phthisis</solution>",
        completion_length=4,
        answer_format="solution",
    )


def test_a_row_of_answers_brings_its_labels_along(tmp_path):
    own = prediction(tmp_path)
    assert own.answer.labels == ("Tuberculosis",)
    assert own.to_row()["label_set"] == label_lines(OWN)
    path = write_predictions(tmp_path / "p.jsonl", [own])
    assert read_predictions(path) == [own] == read_predictions(path, label_set=OWN)
    assert "label_set" not in prediction(tmp_path, CHEXPERT).to_row()


def test_rows_of_other_labels_are_named(tmp_path):
    first = prediction(tmp_path).to_row()
    other = first | {"id": "b", "label_set": ["Tuberculosis"], "evaluated_labels": None}
    with pytest.raises(DataError, match="line 2: field 'label_set' has other labels than"):
        read_predictions(write(tmp_path / "p.jsonl", first, other))
    with pytest.raises(DataError, match="line 1: field 'label_set' has other labels than"):
        read_predictions(write(tmp_path / "q.jsonl", first), label_set=LabelSet(("A",)))
    wrong = [{"label_set": 3}, {"label_set": ["A, B"]}, {"label_set": ["A"], "labels": ["Edema"]}]
    path = write(tmp_path / "r.jsonl", *(first | {"evaluated_labels": None} | one for one in wrong))
    with pytest.raises(DataError) as error:
        list(iter_predictions(path))
    assert [problem.partition(": ")[2] for problem in error.value.problems] == [
        "field 'label_set' is 3; it must be a list of strings",
        "field 'labels' holds 'Tuberculosis'; the labels are: "
        + ", ".join(CHEXPERT.names)
        + "; labels of your own need --label_file",
        "field 'label_set', line 1: 'A, B' holds ',', which ends an entry of an answer",
        "field 'labels' holds 'Tuberculosis'",  # which labels there are is said once
        "field 'labels' holds 'Edema'; the labels are: A",
    ]


# ---- tables of hospitals -------------------------------------------------------------------------
def test_a_policy_treats_the_exclusive_label_as_it_treats_no_finding():
    labels = read_labels("exclusive: Normal\nbeside: Sutures\nTB\nMass", "f")
    policy = LabelPolicy(label_set=labels)
    names = ("Normal", "Sutures", "TB", "Mass")
    absent = dict.fromkeys(names, "false")
    assert policy.combine(absent | {"TB": "true"}) == (("TB",), names)
    assert policy.combine(absent) == (("Normal",), names)
    assert policy.combine({"Normal": "true"}) == (("Normal",), ("Normal", "TB", "Mass"))
    assert policy.combine(absent | {"TB": "ignored"}) == ((), ("Sutures", "Mass"))
    with pytest.raises(ValueError, match="'Edema' is no label; the labels are: Normal, Sutures"):
        LabelPolicy(uncertain_by_label={"Edema": "ones"}, label_set=labels)
    without = LabelPolicy(label_set=LabelSet(("TB", "Mass")))
    assert without.combine({"TB": "false"}) == ((), ("TB",))


def test_a_label_is_a_part_of_a_metrics_name():
    assert metric_name("Enlarged Cardiomediastinum") == "Enlarged_Cardiomediastinum"
    assert metric_name("Mass/Nodule > 3") == "Mass_Nodule___3" and metric_name("肺炎") == "肺炎"


def test_a_list_without_end_is_refused_at_once():
    text = "\n".join(f"L{number}" for number in range(10_001))
    with pytest.raises(DataError, match="^x: holds 10,001 labels and aliases, at most 10,000"):
        read_labels(text, "x")
