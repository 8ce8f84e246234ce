"""Protect `python -m data.check`.

Checked: every bad row, label, answer and image is named, all at once, with the right exit code.

Run: pytest tests/data/test_check.py
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from data.check import main
from tests.helpers.repository import ROOT
from tests.helpers.runs import lines, write_data, write_rows


def row(tmp_path, **fields) -> dict:
    return {
        "id": "a",
        "patient_id": "p",
        "image": "image-0.png",
        "labels": ["Edema"],
        "dataset": "site",
    } | fields


def test_a_good_file(tiny_data, tmp_path, capsys):
    file = write_rows(
        tiny_data.parent / "good.jsonl", [row | {"answer": None} for row in lines(tiny_data)]
    )
    assert main([str(file)]) == 0
    # rows 0..11: labels i % 3 of (Edema, Pneumonia, Fracture), and Fracture beside one of the first
    # two where i is odd: 1, 3, 7, 9
    assert (
        capsys.readouterr().out
        == f"{file}: 12 examples of 6 patients, 0 with an answer; labels: Edema 4, Pneumonia 4,"
        " Fracture 8\nno problem found\n"
    )


def test_the_summary_counts_who_is_known(tiny_data, tmp_path, capsys):
    rows = [row | {"answer": None} for row in lines(tiny_data)]
    rows[0] |= {"sex": "F", "age": 70, "view": "PA"}
    rows[1] |= {"sex": "M", "age": 0, "view": "AP"}
    rows[2] |= {"sex": "F", "view": "PA"}
    assert main([str(write_rows(tiny_data.parent / "who.jsonl", rows))]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.endswith("Fracture 8; sex F 2, M 1; view AP 1, PA 2; age 0 to 70 (2 known)")


def test_all_problems_at_once(tmp_path, capsys):
    write_data(tmp_path, 1)
    (tmp_path / "page.png").write_text("<html>")
    answer = "<think>a</think><solution>{}</solution>"
    content = [
        json.dumps(row(tmp_path, answer=answer.format("Edema"))),
        "{",
        json.dumps(row(tmp_path, labels="Edema", id=3)),
        json.dumps(row(tmp_path)),  # the id of line 1
        json.dumps(row(tmp_path, id="b", image="page.png")),
        json.dumps(
            row(
                tmp_path,
                id="c",
                image="../x.png",
                labels=["No Finding", "Support Devices", "Edema", "Fracture"],
            )
        ),
        json.dumps(row(tmp_path, id="d", evaluated_labels=[])),
        json.dumps(row(tmp_path, id="e", answer=answer.format("Edema, Fracture"))),
        json.dumps(row(tmp_path, id="f", answer="<solution>Edema</solution>")),
        json.dumps(
            row(tmp_path, id="g", answer=answer.format("Edema"), evaluated_labels=["Fracture"])
        ),
        json.dumps(row(tmp_path, id="h", labels=["No Finding", "Support Devices"])),
        json.dumps(row(tmp_path, id="i", image="gone.png")),
    ]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(content))
    assert main([str(file)]) == 1
    first, *problems, last = capsys.readouterr().out.splitlines()
    wrong = "the answer is not its labels in the form think_solution"
    expected = [
        f"{file}, line 2: not valid JSON (",
        f"{file}, line 3: field 'id' is 3; it must be a string",
        f"{file}, line 3: field 'labels' is \"Edema\"; it must be a list of strings",
        f"{file}, line 4: field 'id': 'a' is also on line 1; ids must differ",
        (
            f"{file}, example 'd': evaluated_labels is empty, so nothing can be rewarded or scored;"
            " leave the row out"
        ),
        f"{file}, example 'e': {wrong} (says Edema, Fracture); write it again with data.traces",
        f"{file}, example 'f': {wrong} (think_missing); write it again with data.traces",
        f"{file}, example 'g': {wrong} (says Edema); write it again with data.traces",
        f"{file}, example 'b': {tmp_path / 'page.png'} is not a readable JPEG or PNG (",
        (
            f"{file}, example 'c': image '../x.png': write the path relative to the image root,"
            " without '..' (--image_root)"
        ),
        (
            f"{file}, example 'i': image 'gone.png': no such file under the image root {tmp_path};"
            " check the row or --image_root"
        ),
    ]
    assert len(problems) == len(expected)
    assert [
        problem[: len(start)] for problem, start in zip(problems, expected, strict=True)
    ] == expected
    assert first.startswith(
        f"{file}: 9 examples of 1 patients, 4 with an answer; labels: No Finding 2, Edema 6,"
        " Fracture 1, Support"
    )
    # none: 'd' and 'g', whose labels are not evaluated
    assert first.endswith(", none 2; No Finding beside a finding 1") and last == "11 problems found"


def test_a_file_that_is_not_there_does_not_hide_the_others(tmp_path, capsys):
    good = write_rows(tmp_path / "good.jsonl", [row(tmp_path, id="a")])
    assert main([str(tmp_path / "none.jsonl"), "demo:none", str(good)]) == 2
    out, err = capsys.readouterr()
    assert (
        f"{good}: 1 examples" in out
        and "none.jsonl" in err
        and "the demo has no split 'none'" in err
    )


def test_more_problems_than_an_error_of_a_run_lists(tmp_path, capsys):
    file = write_rows(
        tmp_path / "bad.jsonl", [row(tmp_path, id=f"e{i}", image=f"{i}.png") for i in range(50)]
    )
    assert main([str(file)]) == 1
    assert sum("no such file" in line for line in capsys.readouterr().out.splitlines()) == 50


@pytest.mark.parametrize("file", ["none.jsonl", "demo:none"])
def test_no_such_file(tmp_path, monkeypatch, capsys, file):
    monkeypatch.chdir(tmp_path)
    assert main([file]) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}: ")


def test_the_command(tmp_path):
    """As a person runs it: exit codes, the image root, a progress bar only on a terminal."""
    write_data(tmp_path / "images", 2)
    file = write_rows(tmp_path / "data.jsonl", [row(tmp_path)])

    def run(*flags):
        return subprocess.run(
            [sys.executable, "-m", "data.check", *flags], cwd=ROOT, capture_output=True, text=True
        )

    good = run(str(file), "--image_root", str(tmp_path / "images"))
    assert (good.returncode, good.stderr) == (0, "") and good.stdout.endswith("no problem found\n")
    assert run(str(file)).returncode == 1
    assert run(str(file), "--images", "x").returncode == 2 and run().returncode == 2
