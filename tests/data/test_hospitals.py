"""Protect what --train_file says of a run's hospitals.

Checked: names, weights and files, and which of them an epoch's positions go to; mistakes in one
line each; label frequencies by hospital.

Run: pytest tests/data/test_hospitals.py
"""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.examples import Example
from data.files import DataError
from data.hospitals import (
    TrainFile,
    by_hospital,
    frequencies_by_hospital,
    hospital_weights,
    is_demo,
    label_frequencies,
    positions,
    train_files,
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


def read(*values: str) -> list[TrainFile]:
    found, problems = train_files(values)
    assert problems == []
    return found


def refused(*values: str) -> list[str]:
    return train_files(values)[1]


# ---- --train_file --------------------------------------------------------------------------------
def test_one_hospital_may_have_a_name_and_a_weight():
    assert read("a.jsonl") == [TrainFile(None, "a.jsonl")]
    assert read("demo:rl-train") == [TrainFile(None, "demo:rl-train")]
    assert read("mimic=a.jsonl") == [TrainFile("mimic", "a.jsonl")]
    assert read("mimic=a.jsonl@3") == [TrainFile("mimic", "a.jsonl", 3.0)]
    assert read() == []


def test_several_come_in_the_order_of_their_names():
    expected = [TrainFile("mimic", "a.jsonl", 2.0), TrainFile("nih", "demo:rl-train", 0.5)]
    assert read("mimic=a.jsonl@2", "nih=demo:rl-train@.5") == expected
    assert read("nih=demo:rl-train@5e-1", "mimic=a.jsonl@2.0") == expected
    assert hospital_weights(["nih=b.jsonl@1", "mimic=a.jsonl@2"]) == {"mimic": 2.0, "nih": 1.0}
    assert hospital_weights(["nih=b.jsonl", "mimic=a.jsonl"]) == {} == hospital_weights(["a.jsonl"])


def test_what_is_all_of_the_demo():
    assert is_demo(["demo:sft-train"]) and is_demo(["a=demo:sft-train@1", "b=demo:rl-train@2"])
    assert not is_demo(["a.jsonl"]) and not is_demo(["a=demo:sft-train", "b=b.jsonl"])


def test_file_names_with_the_signs_keep_working(folder):
    for name in ("x=1.jsonl", "c@2", "d@e.jsonl"):
        (folder / name).touch()
    assert read("x=1.jsonl") == [TrainFile(None, "x=1.jsonl")]
    assert read("h=x=1.jsonl@2") == [TrainFile("h", "x=1.jsonl", 2.0)]
    assert read("c@2") == [TrainFile(None, "c@2")]
    assert read("h=c@2") == [TrainFile("h", "c@2")]  # there is no file c
    assert read("h=c@2@3") == [TrainFile("h", "c@2", 3.0)]
    assert read("h=d@e.jsonl") == [TrainFile("h", "d@e.jsonl")]
    # not there, so that what reads it says so
    assert read("h=me@home/x.jsonl") == [TrainFile("h", "me@home/x.jsonl")]
    assert read("./y=1.jsonl") == [TrainFile(None, "./y=1.jsonl")]


def test_what_can_mean_two_files_is_refused(folder):
    for name in ("h=a.jsonl", "c", "c@2"):
        (folder / name).touch()
    assert refused("h=a.jsonl") == [
        "--train_file h=a.jsonl: both h=a.jsonl and a.jsonl are files; rename one of them"
    ]
    assert refused("n=c@2") == ["--train_file n=c@2: both c@2 and c are files; rename one of them"]


FORM = "NAME=FILE or NAME=FILE@WEIGHT, with a name of letters, digits, - and _"


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e999", "1e-999", "two", "1_0", ""])
def test_a_weight_is_a_positive_number(weight):
    assert refused(f"h=a.jsonl@{weight}") == [
        f"--train_file h=a.jsonl@{weight}: expected a positive number as weight, got {weight!r}"
    ]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("my hospital=a.jsonl", f"expected {FORM}"),
        ("a/b=demo:rl-train@2", f"expected {FORM}"),
        ("h=", f"expected {FORM}"),
        ("a.jsonl@2", f"only a hospital with a name has a weight: {FORM}"),
    ],
)
def test_a_wrong_form_is_told(value, line):
    assert refused(value) == [f"--train_file {value}: {line}"]


def test_all_mistakes_come_at_once():
    assert refused("a.jsonl", "h=b.jsonl@1", "h=c.jsonl", "i=./b.jsonl", "j=d.jsonl", "k=e@0") == [
        f"--train_file a.jsonl: several hospitals need a name each: {FORM}",
        "--train_file h=c.jsonl: the name h is taken; choose another",
        "--train_file i=./b.jsonl: is the file of h too; give each file once, and a weight to what"
        " is to come more often",
        "--train_file k=e@0: expected a positive number as weight, got '0'",
        "--train_file: j without a weight beside others that have one; give NAME=FILE@WEIGHT for"
        " all hospitals or for none",
    ]


# ---- how often each comes ------------------------------------------------------------------------
def test_without_weights_each_image_comes_once_an_epoch():
    assert positions({"a": 3, "b": 5}, {}) == {"a": 3, "b": 5}
    assert positions({None: 4}, {}) == {None: 4}
    assert positions({"a": 3}, {"a": 7.0}) == {"a": 3}


def test_weights_share_out_an_epoch_by_largest_remainder():
    # 8 positions: 8 x 2/3 = 5.33 and 8 x 1/3 = 2.67; one is left, and b's remainder is larger
    assert positions({"a": 3, "b": 5}, {"a": 2.0, "b": 1.0}) == {"a": 5, "b": 3}
    # 10 positions, 3.33 each: the first of equal remainders
    assert positions({"a": 1, "b": 4, "c": 5}, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    # as written: in floats .1 + .2 + .7 is 0.9999999999999999, and 10 x .1 / that above 1
    assert positions({"a": 8, "b": 1, "c": 1}, {"a": 0.1, "b": 0.2, "c": 0.7}) == {
        "a": 1,
        "b": 2,
        "c": 7,
    }


def test_a_hospital_that_would_never_come_is_refused():
    # 8 / 101 = 0.08 and 7.92
    with pytest.raises(DataError, match="gives it none of the 8 positions of an epoch") as error:
        positions({"a": 3, "b": 5}, {"a": 1.0, "b": 100.0})
    assert error.value.problems[0].startswith("--train_file a: the weight 1 gives")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.5, 2)), min_size=2, max_size=5),
)
def test_shares_are_those_of_the_weights_to_less_than_one_position(hospitals):
    images = {str(i): size for i, (size, _) in enumerate(hospitals)}
    weights = {str(i): weight for i, (_, weight) in enumerate(hospitals)}
    total, of_all = sum(images.values()), sum(Fraction(str(one)) for one in weights.values())
    quotas = {name: total * Fraction(str(one)) / of_all for name, one in weights.items()}
    try:
        counts = positions(images, weights)
    except DataError:
        assert min(quotas.values()) < 1
        return
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - quota) < 1 for name, quota in quotas.items())


# ---- by hospital ---------------------------------------------------------------------------------
def example(hospital: str | None, *labels: str, evaluated=("Edema", "Fracture")) -> Example:
    return Example("e", "p", "x.png", labels, "site", None, evaluated, hospital=hospital)


def test_frequencies_are_counted_on_a_hospitals_own_evaluated_labels():
    rows = [
        example("a", "Edema"),
        example("a", "Edema", "Fracture"),
        example("a", evaluated=("Edema",)),
        example("b", "Fracture"),
        example("b", "Fracture", evaluated=("Edema",)),  # cannot express it
    ]
    # a: Edema 2 of 3, Fracture 1 of 2. b: Edema 0 of 2, Fracture 1 of 1. All: 2 of 5, 2 of 3
    assert frequencies_by_hospital(rows) == {
        "a": {"Edema": 2 / 3, "Fracture": 1 / 2},
        "b": {"Edema": 0.0, "Fracture": 1.0},
    }
    assert label_frequencies(rows) == {"Edema": 2 / 5, "Fracture": 2 / 3}
    assert frequencies_by_hospital([example(None, "Edema")]) == {}
    assert list(by_hospital([*rows[3:], rows[0]])) == ["b", "a"]


def test_a_target_knows_its_hospital():
    assert example("a", "Edema").target.hospital == "a" and example(None).target.hospital is None
