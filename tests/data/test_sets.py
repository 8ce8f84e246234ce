"""Protect the data sets of a run.

Checked: which examples are trained on, validated and evaluated, which are left out for their
images, and that a resumed run leaves out the same.

Run: pytest tests/data/test_sets.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from data.files import DataError
from data.sets import (
    bad_image_counts,
    bad_images_line,
    data_line,
    in_chunks,
    load_data_sets,
    read_training_examples,
    train_specs,
    usable_examples,
    with_answers_to_learn,
    write_bad_images,
)

EDEMA = "<think>Haze.</think><solution>Edema</solution>"


def write(folder: Path, name: str, count: int, answer: str | None = EDEMA) -> Path:
    """Write a data file of `count` rows of as many patients, and the images that are not there."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    with file.open("w") as out:
        for number in range(count):
            row = {"id": f"{name}-{number}", "patient_id": f"p{number}", "dataset": "site"}
            row |= {"image": f"{number}.png", "labels": ["Edema"]}
            row |= {} if answer is None else {"answer": answer}
            out.write(json.dumps(row) + "\n")
            if not (folder / row["image"]).exists():
                Image.new("L", (8, 8), number).save(folder / row["image"])
    return file


def ids(examples) -> list[str]:
    return [example.id for example in examples]


def test_a_run_has_a_training_set_and_named_sets(tmp_path):
    train, one, two = (write(tmp_path, name, n) for name, n in (("t", 3), ("one", 2), ("two", 1)))
    sets = load_data_sets({"train": str(train), "b": str(two), "a": str(one)}, None, "fail")
    assert ids(sets.train) == ["t-0", "t-1", "t-2"]
    # in the order of the flags
    assert {name: ids(examples) for name, examples in sets.evaluated.items()} == {
        "b": ["two-0"],
        "a": ["one-0", "one-1"],
    }
    assert list(sets.evaluated) == ["b", "a"]
    assert sets.files == {"train": train, "b": two, "a": one}
    assert list(sets.files) == ["train", "b", "a"]
    assert sets.bad_images == {"train": [], "b": [], "a": []}


def test_images_may_lie_elsewhere(tmp_path):
    train = write(tmp_path / "images", "t", 2)
    elsewhere = train.rename(tmp_path / "t.jsonl")
    with pytest.raises(DataError, match="no such file under the image root"):
        load_data_sets({"train": str(elsewhere)}, None, "fail")
    sets = load_data_sets({"train": str(elsewhere)}, str(tmp_path / "images"), "fail")
    assert ids(sets.train) == ["t-0", "t-1"] and sets.evaluated == {}


# ---- several hospitals ---------------------------------------------------------------------------
def test_a_training_set_of_several_hospitals(tmp_path):
    a, b, v = (write(tmp_path, name, n) for name, n in (("a", 3), ("b", 2), ("v", 1)))
    specs = train_specs([f"nih={b}@1", f"mimic={a}@2"]) | {"nih": str(v), "other": str(v)}
    sets = load_data_sets(specs, None, "fail")
    # in the order of the names
    assert [(one.hospital, one.id) for one in sets.train] == [
        ("mimic", "a-0"),
        ("mimic", "a-1"),
        ("mimic", "a-2"),
        ("nih", "b-0"),
        ("nih", "b-1"),
    ]
    assert sets.files == {"train.mimic": a, "train.nih": b, "nih": v, "other": v}
    # a set that is evaluated under a hospital's name is of that hospital
    assert [sets.evaluated[name][0].hospital for name in ("nih", "other")] == ["nih", None]
    assert {name: ids(examples) for name, examples in sets.by_name().items()} == {
        "train.mimic": ["a-0", "a-1", "a-2"],
        "train.nih": ["b-0", "b-1"],
        "nih": ["v-0"],
        "other": ["v-0"],
    }
    line = data_line(sets, {"mimic": 1.0, "nih": 4.0})  # 5 positions: 1 and 4
    assert line == (
        "data        5 to train on (mimic 1 of an epoch, from 3; nih 4 of an epoch, from 2);"
        " scored: nih 1, other 1"
    )
    with pytest.raises(DataError, match="--train_file mimic: the weight 1 gives it none of the 5"):
        data_line(sets, {"mimic": 1.0, "nih": 40.0})


def test_one_hospital_is_trained_on_as_ever(tmp_path):
    train = write(tmp_path, "t", 3)
    sets = load_data_sets(train_specs([str(train)]), None, "fail")
    assert [one.hospital for one in sets.train] == [None] * 3 and list(sets.files) == ["train"]
    assert data_line(sets, {}) == "data        3 to train on; scored: nothing"


def test_images_are_left_out_of_each_hospital(tmp_path):
    a, b = write(tmp_path / "a", "a", 3), write(tmp_path / "b", "b", 2)
    (tmp_path / "b" / "0.png").write_bytes(b"damaged")
    sets = load_data_sets(train_specs([f"a={a}", f"b={b}"]), None, "skip")
    assert ids(sets.train) == ["a-0", "a-1", "a-2", "b-1"]
    assert {name: [row["id"] for row in rows] for name, rows in sets.bad_images.items()} == {
        "train.a": [],
        "train.b": ["b-0"],
    }
    write_bad_images(tmp_path, sets.bad_images)
    assert (tmp_path / "bad-images-train.b.jsonl").is_file()


def test_patients_are_held_out_in_each_hospital(tmp_path):
    """Half of 4 and of 6. Both files have patients p0 to p3 of one data set, on one side each."""
    a, b = write(tmp_path, "a", 4), write(tmp_path, "b", 6)
    sets = load_data_sets(train_specs([f"a={a}", f"b={b}"]), None, "fail")
    held = with_answers_to_learn(sets, "think_solution", validation_split=0.5, seed=0)
    # of a as of one file alone: p2 and p0. b has these two held out, and p4 or p5 makes three
    assert ids(held.validation)[:2] == ["a-0", "a-2"]
    of_b = ids(held.validation)[2:]
    assert {"b-0", "b-2"} < set(of_b) and of_b[2] in ("b-4", "b-5") and len(of_b) == 3
    sides = [{one.patient_id for one in side} for side in (held.train, held.validation)]
    assert not sides[0] & sides[1]
    assert {name: len(examples) for name, examples in held.evaluated.items()} == {"a": 2, "b": 3}


def test_the_same_number_is_another_patient_in_another_data_set(tmp_path):
    a, b = write(tmp_path, "a", 4), write(tmp_path, "b", 4)
    b.write_text(b.read_text().replace('"site"', '"other"'))
    sets = load_data_sets(train_specs([f"a={a}", f"b={b}"]), None, "fail")
    held = with_answers_to_learn(sets, "think_solution", validation_split=0.5, seed=0)
    assert ids(held.validation) == ["a-0", "a-2", "b-0", "b-2"]  # each as a file alone


def test_problems_of_all_hospitals_come_at_once(tmp_path):
    a, b = write(tmp_path, "a", 2, None), write(tmp_path, "b", 2, "no form")
    sets = load_data_sets(train_specs([f"a={a}", f"b={b}"]), None, "fail")
    with pytest.raises(DataError) as error:
        with_answers_to_learn(sets, "think_solution", validation_split=0.5, seed=0)
    assert [line.partition(":")[0] for line in error.value.problems] == [str(a), str(b)]
    one = load_data_sets(train_specs([f"a={write(tmp_path, 'c', 1)}"]), None, "fail")
    with pytest.raises(DataError, match=r"--train_file a: cannot hold out a part of 1 examples"):
        with_answers_to_learn(one, "think_solution", validation_split=0.5, seed=0)


def test_baselines_read_all_hospitals(tmp_path):
    a, b = write(tmp_path, "a", 2), write(tmp_path, "b", 1)
    assert ids(read_training_examples([f"b={b}@1", f"a={a}@2"])) == ["a-0", "a-1", "b-0"]
    assert ids(read_training_examples([str(b)])) == ["b-0"]
    assert read_training_examples([]) is None


# ---- SFT's validation ----------------------------------------------------------------------------
def learn(tmp_path, answer_format="think_solution", train_answer=EDEMA, **files):
    """Make the sets of a run with four training examples from {name of the set: (rows, answer)}."""
    train = write(tmp_path, "t", 4, train_answer)
    specs = {name: str(write(tmp_path, name, *file)) for name, file in files.items()}
    sets = load_data_sets({"train": str(train)} | specs, None, "fail")
    return with_answers_to_learn(sets, answer_format, validation_split=0.5, seed=0)


def test_the_first_set_with_answers_is_the_validation_set(tmp_path):
    sets = learn(tmp_path, a=(2, None), b=(1, EDEMA), c=(3, EDEMA))
    assert ids(sets.validation) == ["b-0"] and list(sets.evaluated) == ["a", "b", "c"]
    assert ids(sets.train) == ["t-0", "t-1", "t-2", "t-3"]


def test_without_one_training_patients_are_held_out(tmp_path):
    # seed 0 shuffles p0 p1 p2 p3 to p2 p0 p1 p3, and the first two are half
    sets = learn(tmp_path, a=(2, None))
    assert ids(sets.validation) == ["t-0", "t-2"] and ids(sets.train) == ["t-1", "t-3"]
    assert list(sets.evaluated) == ["a"]


def test_without_any_set_the_held_out_examples_are_evaluated(tmp_path):
    sets = learn(tmp_path)
    assert {name: ids(examples) for name, examples in sets.evaluated.items()} == {
        "validation": ["t-0", "t-2"]
    }
    assert list(sets.files) == ["train"]


def test_only_label_needs_no_answers_in_the_files(tmp_path):
    sets = learn(tmp_path, "solution", None, a=(2, None))
    assert ids(sets.validation) == ["a-0", "a-1"]
    assert {example.answer for example in (*sets.train, *sets.validation)} == {
        "<solution>Edema</solution>"
    }
    assert sets.evaluated["a"][0].answer is None  # what is scored stays as the file has it


def test_a_training_set_without_answers_is_an_error(tmp_path):
    with pytest.raises(DataError, match="4 of 4 examples have no 'answer' to learn from"):
        learn(tmp_path, "think_solution", None, a=(2, EDEMA))


# ---- images --------------------------------------------------------------------------------------
def test_fail_looks_for_files_and_skip_into_them(tmp_path):
    train = write(tmp_path, "t", 4)
    (tmp_path / "1.png").write_text("<html>404</html>")
    assert len(load_data_sets({"train": str(train)}, None, "fail").train) == 4
    (tmp_path / "3.png").unlink()
    with pytest.raises(DataError, match="example 't-3': image '3.png': no such file"):
        load_data_sets({"train": str(train)}, None, "fail")
    sets = load_data_sets({"train": str(train)}, None, "skip")
    assert ids(sets.train) == ["t-0", "t-2"]
    assert [row["id"] for row in sets.bad_images["train"]] == ["t-1", "t-3"]


def test_a_resumed_run_leaves_out_what_it_left_out_before(tmp_path):
    train = write(tmp_path, "t", 4)
    left_out = {"train": [{"id": "t-2", "reason": "it was damaged"}]}
    (tmp_path / "1.png").write_text("<html>404</html>")  # it has been damaged since
    sets = load_data_sets({"train": str(train)}, None, "skip", {"bad_images": left_out})
    assert ids(sets.train) == ["t-0", "t-1", "t-3"] and sets.bad_images == left_out
    # a set that the run did not have
    other = {"other": load_data_sets({"train": str(train)}, None, "fail").train}
    assert len(usable_examples(other, "skip", {"bad_images": left_out})[0]["other"]) == 4


def test_what_is_said_of_the_examples_left_out(tmp_path):
    bad = {"train": [{"id": "a"}, {"id": "b"}], "x": [], "y": [{"id": "c"}]}
    assert bad_images_line(bad) == (
        "; left out for their images: train 2 (bad-images-train.jsonl), y 1 (bad-images-y.jsonl)"
    )
    assert bad_images_line({"train": []}) == ""
    assert bad_image_counts(["x", "y", "z"], bad) == {
        "x": {"bad_images": 0},
        "y": {"bad_images": 1},
        "z": {"bad_images": 0},
    }
    write_bad_images(tmp_path, bad)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "bad-images-train.jsonl": '{"id": "a"}\n{"id": "b"}\n',
        "bad-images-y.jsonl": '{"id": "c"}\n',
    }


def test_pieces():
    assert in_chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert in_chunks([1, 2], 2) == [[1, 2]] and in_chunks([], 3) == []
