"""Protect `python -m data.table`, which makes a data file of a hospital's own CSV.

Checked: separators, encodings, values and lists of labels as people write them, every problem by
row and at once, and that what is written is read back as it was meant.

Run: pytest tests/data/test_table.py
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shlex

import numpy as np
import pytest
from PIL import Image

import data.check
from data.examples import read_jsonl
from data.labels import LABELS
from data.table import main
from data.table_reading import parts_of, value_of
from tests.helpers.runs import lines, overriding

HEADER = ["path", "pid", "Edema", "Pneumonia", "Fracture"]
ROWS = [["a.png", "1", "1", "0", ""], ["b.png", "2", "-1", "1", "0"]]


def written(rows, separator: str = ",", end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator=end).writerows(rows)
    return out.getvalue()


@pytest.fixture
def convert(tmp_path, capsys):
    """Run the command on a table: `convert(content, *flags)` -> (exit code, out, err, rows)."""

    def run(content: str | bytes | list, *flags: str, name: str = "in.csv", labels: bool = True):
        content = written(content) if isinstance(content, list) else content
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(content)
        out = tmp_path / "out.jsonl"
        given = ["--image", "path", "--patient", "pid", "--output", str(out)]
        given += ["--labels", "Edema,Pneumonia,Fracture"] if labels else []
        code = main(overriding([str(tmp_path / name), *given, *flags]))
        said = capsys.readouterr()
        return code, said.out, said.err, lines(out) if out.exists() else []

    return run


def test_a_table_becomes_a_data_file(convert, tmp_path):
    code, out, err, rows = convert([HEADER, *ROWS], "--dataset", "st-mary")
    assert (code, err) == (0, "")
    evaluated = ["No Finding", "Edema", "Pneumonia", "Fracture"]
    # a finding excludes No Finding; the other columns are not there, so they are not evaluated
    assert rows == [
        {
            "id": "st-mary-a",
            "patient_id": "st-mary-1",
            "image": "a.png",
            "labels": ["Edema"],
            "dataset": "st-mary",
            "evaluated_labels": evaluated,
            "source_labels": ["Edema=1", "Pneumonia=0"],
        },
        {
            "id": "st-mary-b",
            "patient_id": "st-mary-2",
            "image": "b.png",
            "labels": ["Pneumonia"],
            "dataset": "st-mary",
            "evaluated_labels": evaluated,
            "source_labels": ["Edema=-1", "Pneumonia=1", "Fracture=0"],
        },
    ]
    assert out.splitlines() == [
        f"{tmp_path / 'in.csv'}: kept 2 of 2 rows (2 patients)",
        f"  note: 2 of 2 images are not below {tmp_path}, such as a.png; give --image_root, or see"
        " data.check",
        "  without any label 0; called No Finding by rule 0",
        "  label                            true  evaluated  uncertain    blank",
        "  No Finding                          0          2          0        0",
        "  Edema                               1          2          1        0",
        "  Pneumonia                           1          2          0        0",
        "  Fracture                            0          2          0        1",
        f"written: {tmp_path / 'out.jsonl'}; next: python -m data.check {tmp_path / 'out.jsonl'}",
    ]
    examples = read_jsonl(tmp_path / "out.jsonl")
    assert [example.labels for example in examples] == [("Edema",), ("Pneumonia",)]


def test_the_file_passes_data_check(convert, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(tmp_path / name)
    assert convert([HEADER, *ROWS])[0] == 0
    assert data.check.main([str(tmp_path / "out.jsonl")]) == 0


# ---- how it is written ---------------------------------------------------------------------------
PLAIN = written([HEADER, *ROWS])
FORMS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "commas": (PLAIN.encode(), ()),
    "semicolons": (written([HEADER, *ROWS], ";").encode(), ()),
    "tabs": (written([HEADER, *ROWS], "\t").encode(), ()),
    "pipes": (written([HEADER, *ROWS], "|").encode(), ()),
    "semicolons, by flag": (written([HEADER, *ROWS], ";").encode(), ("--separator", "semicolon")),
    "carriage returns and line feeds": (written([HEADER, *ROWS], end="\r\n").encode(), ()),
    "carriage returns": (written([HEADER, *ROWS], end="\r").encode(), ()),
    "no line end at the end": (PLAIN.strip().encode(), ()),
    "byte order mark": (PLAIN.encode("utf-8-sig"), ()),
    "UTF-16": (PLAIN.encode("utf-16"), ()),
    "UTF-16 without a mark": (PLAIN.encode("utf-16-le"), ()),
    "UTF-16, by flag": (PLAIN.encode("utf-16"), ("--encoding", "utf-16")),
    "gzip": (gzip.compress(PLAIN.encode()), ()),
    "blank lines": (f"\n{PLAIN.replace(chr(10), chr(10) * 2)}\n\n".encode(), ()),
    "separators at the ends": (PLAIN.replace("\n", ",,\n").encode(), ()),
    "quotes": (PLAIN.replace("a.png", '"a.png"').replace("path", '"path"').encode(), ()),
    "blanks around": (written([[f" {c} " for c in row] for row in [HEADER, *ROWS]]).encode(), ()),
    "another case": (PLAIN.replace("path", "PATH").replace("pid", "Pid").encode(), ()),
    "separators in a quoted header": (
        PLAIN.replace("Fracture", 'Fracture,"a;b;c;d;e;f"').replace("\n", ",x\n", 9)
        .replace('f",x', 'f"').encode(),
        (),
    ),
    "decimal points": (PLAIN.replace(",1,0,", ",1.0,0.0,").replace("-1", "-1.0").encode(), ()),
    "decimal commas": (
        written([HEADER, ["a.png", "1", "1,0", "0,00", ""], ["b.png", "2", "-1,0", "1,", "0"]], ";")
        .encode(),
        (),
    ),
    "quoted line breaks": (
        written([[*HEADER, "report"], *([*row, "line 1\nline 2; x, y"] for row in ROWS)]).encode(),
        (),
    ),
    "Latin-1, by flag": (
        written([[*HEADER, "Befund"], *([*row, "Ödem"] for row in ROWS)]).encode("latin-1"),
        ("--encoding", "latin-1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_says_the_same(convert, form):
    content, flags = FORMS[form]
    code, _, err, rows = convert(content, *flags)
    assert (code, err) == (0, "")
    assert [(r["id"], r["patient_id"], r["labels"]) for r in rows] == [
        ("in-a", "in-1", ["Edema"]),
        ("in-b", "in-2", ["Pneumonia"]),
    ]


@pytest.mark.parametrize(
    ("cells", "value"),
    [
        (("1", "1.0", "1,0", "1.", "01", "+1", "yes", "Y", "TRUE", "t", "Positive", "x", "ja"), 1),
        (("0", "0.0", "0,0", "-0", "00", "no", "N", "False", "negative", "absent", "nein"), 0),
        (("-1", "-1.0", "-1,0", "uncertain", "U", "?", "possible", "Maybe", "Fraglich"), -1),
        (("", " ", "nan", "NaN", "NA", "n/a", "NULL", "None", "<NA>"), None),
    ],
)
def test_the_values_of_a_cell(cells, value):
    for cell in cells:
        assert value_of(cell) == (value, True), cell
        assert value_of(f" {cell}\n") == (value, True), cell


@pytest.mark.parametrize("cell", ["2", "0.5", "0,87", "-2", "1e0", "10", "perhaps", "-", "1;0"])
def test_what_is_no_value(convert, cell):
    assert value_of(cell)[1] is False
    code, _, err, rows = convert([HEADER, ["a.png", "1", cell, "0", ""], ROWS[1]])
    assert (code, rows) == (2, [])
    assert f"in.csv, row 2, column 'Edema': {cell!r} is no label value; they are 1, 0, -1" in err


# ---- the rules -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "labels", "unknown"),
    [
        # Edema 1 and blank Fracture; Edema -1 and Pneumonia 1; all 0; all blank. Findings without a
        # column may be there, so the last two are not called No Finding, and of those two nobody
        # knows whether they are normal.
        ([], [["Edema"], ["Pneumonia"], [], []], [[], [], ["No Finding"], ["No Finding"]]),
        (
            ["--uncertain", "ones"],
            [["Edema"], ["Edema", "Pneumonia"], [], []],
            [[], [], ["No Finding"], ["No Finding"]],
        ),
        (
            ["--uncertain", "ones", "Edema=ignore"],
            [["Edema"], ["Pneumonia"], [], []],
            [[], ["Edema"], ["No Finding"], ["No Finding"]],
        ),
        (
            ["--blank", "ignore"],
            [["Edema"], ["Pneumonia"], [], []],
            [["Fracture"], [], ["No Finding"], ["No Finding", "Edema", "Pneumonia", "Fracture"]],
        ),
        (["--no_label", "drop"], [["Edema"], ["Pneumonia"]], [[], []]),
    ],
)
def test_the_rules_of_data_select(convert, flags, labels, unknown):
    more = [["c.png", "3", "0", "0", "0"], ["d.png", "4", "", "", ""]]
    code, out, _, rows = convert([HEADER, *ROWS, *more], *flags)
    assert code == 0 and [row["labels"] for row in rows] == labels
    wanted = ["No Finding", "Edema", "Pneumonia", "Fracture"]
    assert [
        [name for name in wanted if name not in row["evaluated_labels"]] for row in rows
    ] == unknown
    assert ("dropped 2: no label is true" in out) == ("drop" in flags)


def test_a_table_of_all_labels_calls_an_empty_row_no_finding(convert):
    header = ["path", "pid", *LABELS]
    rows = [
        ["a.png", "1", *["0"] * 14],
        ["b.png", "2", *[""] * 14],
        ["c.png", "3", "1", *[""] * 13],
    ]
    code, out, _, rows = convert([header, *rows], "--labels", "auto", labels=False)
    assert code == 0 and [row["labels"] for row in rows] == [["No Finding"]] * 3
    assert "called No Finding by rule 2" in out
    assert all(row["evaluated_labels"] == list(LABELS) for row in rows)


def test_columns_of_other_names_are_mapped(convert):
    names = ["Herz", "Pleural_Effusion", "Ödem", "Kyphose"]
    table = [["path", "pid", *names], ["a.png", "1", "1", "1", "0", "1"]]
    flags = ["--labels", "Herz, Pleural_Effusion,Ödem,Kyphose"]
    code, _, err, _ = convert(table, *flags, labels=False)
    assert code == 2
    for name in ("Herz", "Ödem", "Kyphose"):
        assert f"--labels {name}: is no label; say which it is, as --rename '{name}=LABEL'" in err
    renames = ["--rename", "herz=Cardiomegaly", "Ödem=edema", "Kyphose="]
    code, _, _, (row,) = convert(table, *flags, *renames, labels=False)
    assert code == 0 and row["labels"] == ["Cardiomegaly", "Pleural Effusion"]
    assert "Edema" in row["evaluated_labels"] and "Kyphose=1" not in row["source_labels"]


def test_a_letter_and_its_mark_may_be_written_as_two_characters(convert):
    # "Ö" as O and U+0308, as some systems write names, against one character on the command line
    table = [["path", "pid", "O\u0308dem"], ["a.png", "1", "1"]]
    flags = ["--labels", "\u00d6dem", "--rename", "\u00f6dem=Edema"]
    code, _, _, (row,) = convert(table, *flags, labels=False)
    assert code == 0 and row["labels"] == ["Edema"]


# ---- one column that lists labels ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("cell", "separator", "parts"),
    [
        ("Edema|Pleural Effusion", None, ["Edema", "Pleural Effusion"]),
        ("Edema; Pleural Effusion ;", None, ["Edema", "Pleural Effusion"]),
        ("Edema, Pleural Effusion", None, ["Edema", "Pleural Effusion"]),
        ("Edema\nPleural Effusion", None, ["Edema", "Pleural Effusion"]),
        ("['Edema', 'Pleural Effusion']", None, ["Edema", "Pleural Effusion"]),
        ('["Edema"]', None, ["Edema"]),
        ("[]", None, []),
        ("", None, []),
        ("Edema", None, ["Edema"]),
        ("Edema + Fracture", "+", ["Edema", "Fracture"]),
        ("Edema, left; Fracture", None, ["Edema, left", "Fracture"]),
    ],
)
def test_a_cell_is_parted(cell, separator, parts):
    assert parts_of(cell, separator) == parts


LISTED = [
    ["path", "pid", "findings"],
    ["a.png", "1", "Edema|Mass"],
    ["b.png", "2", "No Finding"],
    ["c.png", "3", ""],
    ["d.png", "4", "Effusion"],
]


def test_a_column_that_lists_labels(convert, tmp_path):
    flags = ["--label_column", "findings", "--rename", "Mass=Lung Lesion"]
    code, out, _, rows = convert(LISTED, *flags, labels=False)
    assert code == 0
    assert [row["labels"] for row in rows] == [
        ["Lung Lesion", "Edema"],
        ["No Finding"],
        [],
        ["Pleural Effusion"],
    ]
    assert rows[0]["source_labels"] == ["Edema", "Mass"]
    # nobody knows whether the labels were looked for that no row lists, but with No Finding
    listed = ["No Finding", "Lung Lesion", "Edema", "Pleural Effusion"]
    assert rows[0]["evaluated_labels"] == listed
    assert rows[1]["evaluated_labels"] == [name for name in LABELS if name != "Support Devices"]
    # other findings may be there, so nobody knows whether it is normal
    assert rows[2]["evaluated_labels"] == listed[1:] and "without any label 1" in out
    # said to be all that was looked for
    every = ["--evaluated", ",".join(LABELS)]
    (tmp_path / "out.jsonl").unlink()
    _, out, _, rows = convert(LISTED, *flags, *every, labels=False)
    assert [row["labels"] for row in rows][2] == ["No Finding"]
    assert all(row["evaluated_labels"] == list(LABELS) for row in rows)
    assert "called No Finding by rule 1" in out


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_entry_that_is_no_label_is_named_by_row(convert):
    code, _, err, rows = convert(LISTED, "--label_column", "findings", labels=False)
    assert (code, rows) == (2, [])
    assert (
        "in.csv, row 2, column 'findings': 'Mass' is no label; say which it is, as --rename"
        " 'Mass=LABEL', or leave it out with 'Mass='" in err
    )
    code, _, _, rows = convert(
        LISTED, "--label_column", "findings", "--rename", "Mass=", labels=False
    )
    assert code == 0 and rows[0]["labels"] == ["Edema"]


def test_labels_of_ones_own(convert, tmp_path):
    label_file = tmp_path / "labels of ours.txt"
    label_file.write_text("exclusive: Normal\nTuberculosis | TB\nSilicosis\n")
    table = [["path", "pid", "TB", "silicosis"], ["a.png", "1", "1", "0"], ["b.png", "2", "0", "0"]]
    flags = ["--labels", "auto", "--label_file", str(label_file)]
    code, out, _, rows = convert(table, *flags, labels=False)
    # all findings were looked for, so the second is normal
    assert code == 0 and [row["labels"] for row in rows] == [["Tuberculosis"], ["Normal"]]
    assert rows[1]["evaluated_labels"] == ["Normal", "Tuberculosis", "Silicosis"]
    assert "called Normal by rule 1" in out
    command = out.splitlines()[-1].partition("next: python -m data.check ")[2]
    assert data.check.main(shlex.split(command)) == 1  # the two images are not there
    assert command.endswith(f"out.jsonl --label_file '{label_file}'")


# ---- image, ids, who -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cell", "flags", "image", "name"),
    [
        ("a.png", [], "a.png", "a"),
        ("./sub/a.png", [], "sub/a.png", "sub-a"),
        ("sub\\deep\\a.png", [], "sub/deep/a.png", "sub-deep-a"),
        ("a", ["--image", "png/{path}.png"], "png/a.png", "png-a"),
        ("a", ["--image", "{pid}/{path}.png"], "1/a.png", "1-a"),
        ("a.b.png", [], "a.b.png", "a.b"),
        ("{root}/a.png", [], "a.png", "a"),
        ("a.png", ["--id", "acc"], "a.png", "X7"),
    ],
)
def test_where_the_image_is_and_what_it_is_called(convert, tmp_path, cell, flags, image, name):
    table = [[*HEADER, "acc"], [cell.replace("{root}", str(tmp_path)), "1", "1", "0", "0", "X7"]]
    code, _, err, rows = convert(table, *flags)
    assert (code, err) == (0, "") and (rows[0]["image"], rows[0]["id"]) == (image, f"in-{name}")


def test_an_id_does_not_depend_on_the_order_of_the_rows(convert, tmp_path):
    _, _, _, rows = convert([HEADER, *ROWS])
    (tmp_path / "out.jsonl").unlink()
    _, _, _, turned = convert([HEADER, *reversed(ROWS)])
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in turned)
    assert rows == turned[::-1]


def test_sex_age_and_view(convert):
    people = [["F", "58", "PA"], ["male", "058Y", ""], ["w", "11M", "AP"], ["?", "411", "PA"]]
    table = [[*HEADER, "sex", "age", "view"]]
    table += [[f"{i}.png", f"{i}", "1", "0", "0", *who] for i, who in enumerate(people)]
    code, out, _, rows = convert(table, "--sex", "sex", "--age", "age", "--view", "view")
    assert code == 0
    assert [(r.get("sex"), r.get("age"), r.get("view")) for r in rows] == [
        ("F", 58, "PA"),
        ("M", 58, None),
        ("F", 0, "AP"),
        (None, None, "PA"),
    ]
    assert "  note: taken as unknown: sex '?' (1), age '411' (1)" in out


# ---- what is wrong -------------------------------------------------------------------------------
def test_every_bad_row_is_named_at_once_and_nothing_is_written(convert, tmp_path):
    table = [
        HEADER,
        ["a.png", "1", "1", "0", ""],
        ["", "1", "1", "0", ""],
        ["b.png", " ", "1", "0", ""],
        ["a.png", "2", "1", "0", ""],
        ["../c.png", "2", "1", "0", ""],
        ["/elsewhere/c.png", "2", "1", "0", ""],
        ["https://x.org/c.png", "2", "1", "0", ""],
        ["C:\\c.png", "2", "1", "0", ""],
        ["c.png", "2", "maybe so", "7", ""],
        ["d.png", "2", "1"],
        ["e.png", "2", "1", "0", "", "more"],
        ["f\x01.png", "2", "1", "0", ""],
    ]
    code, out, err, rows = convert(table)
    assert (code, out, rows) == (2, "", [])
    said = [line.partition("in.csv, ")[2] for line in err.splitlines()]
    value = "is no label value; they are 1, 0, -1 and blank, or yes, no and uncertain"
    root = f"--image_root {tmp_path}"
    assert said == [
        "row 11: has 3 fields, the header has 5",
        "row 12: has 6 fields, the header has 5",
        "row 3, column 'path': is blank; every row needs an image",
        "row 4, the patient's column is blank; every image needs a patient",
        "row 5, image 'a.png' is also in row 2; each image has one row",
        f"row 6, image '../c.png' is no path below {root}",
        f"row 7, image '/elsewhere/c.png' lies outside {root}",
        f"row 8, image 'https://x.org/c.png' is no path below {root}",
        f"row 9, image 'C:/c.png' is no path below {root}",
        f"row 10, column 'Edema': 'maybe so' {value}",
        f"row 10, column 'Pneumonia': '7' {value}",
        "row 13, the image holds a control character",
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--image", "file"], "column 'file' is missing; it has 'path', 'pid', 'Edema'"),
        (["--patient", "pidd"], "column 'pidd' is missing; it has 'path', 'pid', 'Edema',"),
        (["--patient", "pidd"], "; did you mean 'pid'?"),
        (["--image", "x/{acc}.png"], "column 'acc' is missing"),
        (["--age", "years"], "column 'years' is missing"),
        (["--uncertain", "one"], "--uncertain one: no such rule; known: zeros, ones, ignore"),
        (["--uncertain", "Mass=ones"], "--uncertain Mass=ones: 'Mass' is no label"),
        (["--rename", "Edema"], "--rename Edema: expected NAME=LABEL"),
        (["--rename", "x=Mass"], "--rename x=Mass: 'Mass' is no label; the labels are:"),
        (["--rename", "x=Edema", "X=Fracture"], "'X' is renamed twice"),
        (["--dataset", "a b"], "--dataset a b: a name has letters, digits, - and _"),
        (["--encoding", "klingon"], "--encoding klingon: no such encoding"),
        (["--evaluated", "Edema"], "--evaluated goes with --label_column"),
        (["--id", "Edema"], "row 2, id '1' is also in row"),
        (["--label_file", "none.txt"], "--label_file none.txt: cannot be read: No such file"),
    ],
)
def test_wrong_flags_and_columns(convert, flags, said):
    code, _, err, rows = convert([HEADER, ROWS[0], ["b.png", "2", "1", "1", "0"]], *flags)
    assert (code, rows) == (2, []) and said.replace("row 2, id '1' is also in row", "id '1'") in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no header row"),
        (b"path,pid,Edema,Pneumonia,Fracture\n", "no row is left to write"),
        (
            written([[*HEADER, "Ö"], [*ROWS[0], "x"]]).encode("latin-1"),
            "line 1: byte 0xd6 is no utf-8",
        ),
        (PLAIN.encode() + b'"c.png,1,1,0,0\n', "row 4: cannot be read (unexpected end of data)"),
        (b"PK\x03\x04\x14\0\0", "is no table, but a zip archive or an Excel sheet"),
        (b"PAR1\x15", "is no table, but Parquet"),
        (json.dumps({"id": "a"}).encode(), "is no table, but JSON: a data file already"),
        (b'[{"id": "a"}]', "is no table, but JSON"),
        (b"\x1f\x8b\x08\0", "cannot be read"),
        (b"path,pid,Edema,Pneumonia,Fracture,path\na.png,1,1,0,0,b\n", "'path' is there 2 times"),
        (b"Edema;Pneumonia\n1;0\n", "column 'path' is missing; it has 'Edema', 'Pneumonia'"),
    ],
)
def test_what_is_no_table(convert, content, said):
    code, _, err, rows = convert(content)
    assert (code, rows) == (2, []) and said in err and "Traceback" not in err


def test_nothing_is_overwritten(convert, tmp_path):
    (tmp_path / "out.jsonl").write_text('{"x": 1}\n')
    code, _, err, rows = convert([HEADER, *ROWS])
    assert code == 2 and rows == [{"x": 1}]
    assert f"--output {tmp_path / 'out.jsonl'} exists and nothing is overwritten" in err


def test_no_such_table_and_no_such_place(tmp_path, capsys):
    given = ["--image", "path", "--patient", "pid", "--labels", "auto", "--output"]
    assert main(["none.csv", *given, "o.jsonl"]) == 2
    assert "none.csv: no such file; give a CSV file" in capsys.readouterr().err
    (tmp_path / "in.csv").write_text(PLAIN)
    (tmp_path / "file").write_text("")
    assert main(["in.csv", *given, "file/o.jsonl"]) == 2
    assert "--output file/o.jsonl: cannot be written" in capsys.readouterr().err
