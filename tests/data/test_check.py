"""Protect `python -m data.check`.

Checked: every bad row, label, answer and image is named, all at once, with the right exit code.

Run: pytest tests/data/test_check.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data.check import CONTROL_TOKENS, main
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
    write_data(tmp_path, 7)  # a picture for each row, for one in two rows is a problem of its own
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
        json.dumps(row(tmp_path, id="d", image="image-1.png", evaluated_labels=[])),
        json.dumps(
            row(tmp_path, id="e", image="image-2.png", answer=answer.format("Edema, Fracture"))
        ),
        json.dumps(row(tmp_path, id="f", image="image-3.png", answer="<solution>Edema</solution>")),
        json.dumps(
            row(
                tmp_path,
                id="g",
                image="image-4.png",
                answer=answer.format("Edema"),
                evaluated_labels=["Fracture"],
            )
        ),
        json.dumps(
            row(tmp_path, id="h", image="image-5.png", labels=["No Finding", "Support Devices"])
        ),
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
        (
            f"{file}, example 'f': {wrong} (think_missing); it has the form solution: give"
            " --answer_format solution, here and to run_sft.py"
        ),
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
        (
            f"note: {file}: 5 of 9 rows have no answer, such as 'b'; run_sft.py learns from such a"
            " file only with --prompt only_label"
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


@pytest.mark.parametrize(
    ("answer", "form", "said"),
    [
        ("<think>Haze.</think>\n<answer> Edema </answer>", "answer_tag", None),
        ("<solution>Edema</solution>", "solution", None),
        ("Edema", "label_list", None),
        ("<think>Haze.</think><solution>Edema</solution>", "think_solution", None),
        (
            "<think>Haze.</think>\n<answer>Edema</answer>",
            "think_solution",
            "(answer_missing); it has the form answer_tag: give --answer_format answer_tag",
        ),
        (
            "<think>Haze.</think><solution>Edema</solution>",
            "answer_tag",
            "(answer_missing); it has the form think_solution: give --answer_format think_solution",
        ),
        ("<think>Haze.</think>Edema", "answer_tag", "(answer_missing); write it again with"),
        ("<think>Haze.</think><answer>Fracture</answer>", "answer_tag", "(says Fracture)"),
        (
            "<think>A<|im_end|></think><solution>Edema</solution>",
            "think_solution",
            "the answer holds '<|im_end|>', a control token of chat templates",
        ),
        (
            "<think>A<end_of_turn></think><solution>Edema</solution>",
            "think_solution",
            "the answer holds '<end_of_turn>', a control token",
        ),
    ],
)
def test_the_form_of_the_answers_is_asked_for(tmp_path, capsys, answer, form, said):
    write_data(tmp_path, 1)
    file = write_rows(tmp_path / "a.jsonl", [row(tmp_path, answer=answer)])
    flags = [] if form == "think_solution" else ["--answer_format", form]
    assert main([str(file), *flags]) == (0 if said is None else 1)
    assert (said or "no problem found") in capsys.readouterr().out


def test_every_control_token_of_the_families_is_known():
    """As the real tokenizers of both families list them."""
    assert {"<|im_end|>", "<|image_pad|>", "<end_of_turn>", "<start_of_image>"} < {*CONTROL_TOKENS}
    assert len(CONTROL_TOKENS) == len({*CONTROL_TOKENS})


# ---- one picture in two rows ---------------------------------------------------------------------
def pictures(folder, *rows: dict, name: str = "a.jsonl"):
    """Write a data file whose rows default to image-0.png, patient p and Edema."""
    return str(write_rows(folder / name, [row(folder, **fields) for fields in rows]))


@pytest.mark.parametrize(
    ("other", "code", "said"),
    [
        # the same file, another patient and other labels
        (
            {"patient_id": "q", "labels": ["No Finding"]},
            1,
            "of another patient ('p', 'q') and with other labels (Edema; No Finding)",
        ),
        # a copy under another name, and another format of the same pixels
        ({"image": "copy.png", "patient_id": "q"}, 1, "of another patient ('p', 'q')"),
        ({"image": "again.png", "labels": []}, 1, "with other labels (Edema; none)"),
        ({"image": "copy.png"}, 1, "of the same patient with the same labels"),
        # what one row does not rate cannot differ
        (
            {"labels": [], "evaluated_labels": ["Fracture"]},
            1,
            "of the same patient with the same labels",
        ),
        ({"image": "image-1.png", "patient_id": "q"}, 0, None),
    ],
)
def test_one_picture_in_two_rows(tmp_path, capsys, other, code, said):
    write_data(tmp_path, 2)
    shutil.copy(tmp_path / "image-0.png", tmp_path / "copy.png")
    Image.open(tmp_path / "image-0.png").save(tmp_path / "again.png", compress_level=0)
    file = pictures(tmp_path, {"id": "a"}, {"id": "b"} | other)
    assert main([file]) == code
    out = capsys.readouterr().out
    assert ("shows the same picture" in out) == (said is not None)
    if said:
        note = "" if code else "note: "
        line = f"{note}{file}, example 'a' shows the same picture as {file}, example 'b', {said}"
        assert line in out.splitlines()


def test_one_picture_in_two_files(tmp_path, capsys):
    write_data(tmp_path, 3)
    first = pictures(tmp_path, {"id": "a"}, {"id": "b", "image": "image-1.png"}, name="sft.jsonl")
    same = pictures(tmp_path, {"id": "a"}, {"id": "c", "image": "image-2.png"}, name="rl.jsonl")
    other = pictures(tmp_path, {"id": "x", "patient_id": "nih-1"}, name="test.jsonl")
    assert main([first, same]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"note: pictures of {same} that are in {first} too: 1, such as 'a'; training, validation"
        " and test sets must share none",
        "no problem found",
    ]
    assert main([first, other]) == 1
    assert (
        f"{first}, example 'a' shows the same picture as {other}, example 'x', of another patient"
        " ('p', 'nih-1')" in capsys.readouterr().out
    )
    # alone each of them is sound
    assert main([first]) == main([other]) == 0


def test_sixteen_bits_and_flat_pictures_are_told(tmp_path, capsys):
    values = np.linspace(0, 4000, 10_000).round().astype(np.uint16).reshape(100, 100)
    Image.fromarray(values).save(tmp_path / "image-0.png")
    values[0, :20] = 65535  # 20 of 10,000
    Image.fromarray(values).save(tmp_path / "hot.png")
    Image.new("L", (30, 30), 9).save(tmp_path / "flat.png")
    rows = [
        {"id": n, "image": i}
        for n, i in zip("abc", ("image-0.png", "hot.png", "flat.png"), strict=True)
    ]
    file = pictures(tmp_path, *rows)
    assert main([file]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"note: {file}: images of 16 bits: 2; of their pixels 0.100% lie beyond the range that"
        " becomes 8 bits, at most 0.200% ('b')",
        f"note: {file}: images of nearly one grey value all over: 1, such as 'c'; look at how they"
        " were made",
        "no problem found",
    ]


def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("image,patient,Edema\na.png,p,1\n")
    assert main([str(tmp_path / "a.csv")]) == 2
    assert "but a table (CSV with commas) with the columns 'image', 'patient', 'Edema'" in (
        capsys.readouterr().err
    )


def test_a_file_that_is_not_there_does_not_hide_the_others(tmp_path, capsys):
    good = write_rows(tmp_path / "good.jsonl", [row(tmp_path, id="a")])
    assert main([str(tmp_path / "none.jsonl"), "demo:none", str(good)]) == 2
    out, err = capsys.readouterr()
    assert (
        f"{good}: 1 examples" in out
        and "none.jsonl" in err
        and "the demo has no split 'none'" in err
    )
    assert err.endswith("not checked: 2 of 3 files\n")
    assert main([str(tmp_path / "none.jsonl")]) == 2
    assert "no problem" not in capsys.readouterr().out


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
