"""Protect the loaders of the three hospitals.

Checked: label policies, every header and folder variant, the choice of images, what is counted as
dropped, and refusals that name file, row and column.

A label that is read wrongly, or an image under the wrong study, trains and scores without any
error. The files are written by the tests; the sample of real NIH images and of the other two
formats is used where CXR_SAMPLE names it.

Run: pytest tests/data/test_sources.py
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from data.chexpert import load_chexpert
from data.examples import row_of
from data.files import MAX_PROBLEMS, DataError
from data.labels import LABELS, NIH_NINE, NIH_TEN, LabelPolicy
from data.mimic import load_mimic
from data.nih import load_nih
from data.sources import Report, Table
from tests.helpers.hospitals import (
    ALPHABETICAL,
    BLANKS,
    CHEXPERT,
    cells,
    chexpert_row,
    dicom,
    mimic,
    mimic_labels,
    nih,
    sample,
    touch,
    write,
)

# not NIH's nine
NINE_OTHERS = (
    "Enlarged Cardiomediastinum",
    "Lung Opacity",
    "Pleural Effusion",
    "Fracture",
    "Support Devices",
)


def refusal(load, *arguments, **options) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(*arguments, report=Report(), **options)
    return caught.value.problems


def without(*labels: str) -> tuple[str, ...]:
    return tuple(label for label in LABELS if label not in labels)


# ---- label policies ------------------------------------------------------------------------------
def read(
    policy: LabelPolicy, absent: tuple[str, ...] = (), **cells: int
) -> tuple[set[str], tuple[str, ...]]:
    """Read one row of cells -> (labels, the labels that are NOT evaluated).

    cells: by label with _ for the space. The others are blank.
    """
    values = {label: cells.get(label.replace(" ", "_")) for label in LABELS if label not in absent}
    labels, evaluated = policy.combine(
        {label: policy.meaning(label, value) for label, value in values.items()}
    )
    assert [label for label in LABELS if label in labels] == list(labels)
    return set(labels), tuple(label for label in LABELS if label not in evaluated)


def test_uncertain_becomes_absent_present_or_unknown():
    cells = {"Edema": -1, "Atelectasis": -1, "Fracture": 1, "Pneumonia": 0}
    assert read(LabelPolicy(), **cells) == ({"Fracture"}, ())
    assert read(LabelPolicy("ones"), **cells) == ({"Edema", "Atelectasis", "Fracture"}, ())
    assert read(LabelPolicy("ignore"), **cells) == ({"Fracture"}, ("Edema", "Atelectasis"))
    mixed = LabelPolicy("ignore", {"Atelectasis": "ones", "Pneumonia": "zeros"})
    assert read(mixed, **cells) == ({"Atelectasis", "Fracture"}, ("Edema",))


def test_blank_is_absent_or_unknown():
    assert read(LabelPolicy(), Edema=1) == ({"Edema"}, ())
    # Unknown, but for No Finding, which a finding excludes.
    assert read(LabelPolicy(blank="ignore"), Edema=1, Pneumonia=0) == (
        {"Edema"},
        without("No Finding", "Edema", "Pneumonia"),
    )
    # No Finding excludes all but Support Devices.
    assert read(LabelPolicy(blank="ignore"), No_Finding=1) == ({"No Finding"}, ("Support Devices",))
    assert read(LabelPolicy(blank="ignore"), Support_Devices=1) == (
        {"Support Devices"},
        without("Support Devices"),
    )


def test_no_label_at_all_is_no_finding_or_stays_empty():
    for given in ({}, {"No_Finding": 0, "Edema": 0}, {"Edema": -1}):
        assert read(LabelPolicy(no_label="no_finding"), **given) == ({"No Finding"}, ())
        assert read(LabelPolicy(no_label="empty"), **given) == (set(), ())
        # left out by whoever reads the table
        assert read(LabelPolicy(no_label="drop"), **given) == (set(), ())
    assert read(LabelPolicy(), Support_Devices=1) == ({"Support Devices"}, ())  # has a label


def test_an_image_with_an_unknown_finding_is_not_called_normal():
    assert read(LabelPolicy("ignore"), Edema=-1) == (set(), ("No Finding", "Edema"))
    assert read(LabelPolicy("ignore", no_label="empty"), Edema=-1) == (set(), ("Edema",))
    # a device is no finding
    assert read(LabelPolicy("ignore"), Support_Devices=-1) == ({"No Finding"}, ("Support Devices",))
    # the table itself is not sure
    assert read(LabelPolicy("ignore"), No_Finding=-1) == (set(), ("No Finding",))
    assert read(LabelPolicy(blank="ignore")) == (set(), LABELS)


def test_contradictions_are_kept():
    assert read(LabelPolicy("ones"), No_Finding=1, Edema=-1) == ({"No Finding", "Edema"}, ())


def test_a_table_without_the_column_no_finding():
    absent = ("No Finding",)
    # a finding settles it
    assert read(LabelPolicy(no_label="empty"), absent, Edema=1) == ({"Edema"}, ())
    assert read(LabelPolicy(no_label="empty"), absent) == (set(), ("No Finding",))
    assert read(LabelPolicy(), absent) == ({"No Finding"}, ())


def test_unknown_rules_are_refused():
    for options, said in (
        ({"uncertain": "one"}, "uncertain: 'one'"),
        ({"blank": "ones"}, "blank: 'ones'"),
        ({"no_label": ""}, "no_label: ''"),
        ({"uncertain_by_label": {"Edema": "x"}}, "uncertain Edema: 'x'"),
        ({"uncertain_by_label": {"Mass": "ones"}}, "'Mass' is no label"),
    ):
        with pytest.raises(ValueError, match=said):
            LabelPolicy(**options)


# ---- CheXpert ------------------------------------------------------------------------------------
ONE = "patient00001/study1/view1_frontal.jpg"
TWO = "patient00002/study2/view1_frontal.jpg"
TRAIN_ROWS = (
    chexpert_row(f"CheXpert-v1.0-small/train/{ONE}", labels=cells(Edema=1.0, Lung_Opacity=-1.0)),
    chexpert_row(f"CheXpert-v1.0-small/train/{TWO}", "Frontal,PA", cells(No_Finding=1.0)),
)


def found(examples) -> list[tuple[str, str, tuple[str, ...]]]:
    """List (patient, image, labels) of examples, and check that every image is there."""
    assert all((example.image_root / example.image).is_file() for example in examples)
    return [(example.patient_id, example.image, example.labels) for example in examples]


def expected(prefix: str, second: str | None = None) -> list[tuple[str, str, tuple[str, ...]]]:
    return [
        ("chexpert-patient00001", f"{prefix}/{ONE}", ("Edema",)),
        ("chexpert-patient00002", f"{second or prefix}/{TWO}", ("No Finding",)),
    ]


def test_chexpert_small_in_full(tmp_path):
    file = write(tmp_path / "train.csv", CHEXPERT, *TRAIN_ROWS)
    touch(tmp_path, f"train/{ONE}", f"train/{TWO}")
    report = Report()
    first, second = load_chexpert(tmp_path, report=report)
    assert found([first, second]) == expected("train")
    assert (first.id, first.dataset, first.evaluated_labels) == (
        "chexpert-patient00001-study1-view1_frontal",
        "chexpert",
        LABELS,
    )
    assert first.source_labels == ("Lung Opacity=-1.0", "Edema=1.0") and second.source_labels == (
        "No Finding=1.0",
    )
    assert first.extra == {"study_id": "patient00001/study1"} and (first.view, second.view) == (
        "AP",
        "PA",
    )
    assert report.files == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}


@pytest.mark.parametrize(
    "variant",
    [
        "full release",
        "outer folder",
        "gz",
        "gz without the suffix",
        "no final newline",
        "CRLF and mark",
        "other order and case",
        "airspace opacity",
        "integers",
        "blank line",
    ],
)
def test_chexpert_label_file_variants(tmp_path, variant):
    lines, name, options = [CHEXPERT, *TRAIN_ROWS], "train.csv", {}
    if variant == "full release":
        lines = [line.replace("v1.0-small", "v1.0") for line in lines]
    elif variant == "outer folder":
        name = "CheXpert-v1.0-small/train.csv"
    elif variant.startswith("gz"):
        name = "train.csv.gz"
    elif variant == "no final newline":
        options = {"end": ""}
    elif variant == "CRLF and mark":
        options = {"newline": "\r\n", "end": "\r\n", "bom": True}
    elif variant == "other order and case":
        lines = [",".join(reversed(line.split(","))) for line in lines]
        lines[0] = lines[0].upper().replace("LUNG OPACITY", " lung opacity ")
    elif variant == "airspace opacity":
        lines[0] = lines[0].replace("Lung Opacity", "Airspace Opacity")
    elif variant == "integers":
        lines = [line.replace(".0,", ",") for line in lines]
    elif variant == "blank line":
        lines.insert(2, "")
    file = write(tmp_path / name, *lines, **options)
    if variant == "gz without the suffix":
        file.rename(tmp_path / "train.csv")
    touch(file.parent, f"train/{ONE}", f"train/{TWO}")
    outer = "CheXpert-v1.0-small/" if variant == "outer folder" else ""
    assert found(load_chexpert(tmp_path, report=Report())) == expected(f"{outer}train")


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_a_label_file_that_was_saved_again(tmp_path, sign, encoding, end, packed):
    """As office programs write a table: other separators, encodings and line ends."""
    text = end.join([CHEXPERT, *TRAIN_ROWS]).replace(",", sign)
    (tmp_path / "train.csv").write_bytes(packed(text.encode(encoding)))
    touch(tmp_path, f"train/{ONE}", f"train/{TWO}")
    assert found(load_chexpert(tmp_path, report=Report())) == expected("train")


def test_chexpert_batch_folders(tmp_path):
    """As downloaded: label files in batch 1, the training patients directly in batches 2 and 3."""
    batches = [
        "CheXpert-v1.0 batch 1 (validate & csv)",
        "CheXpert-v1.0 batch 2 (train 1)",
        "CheXpert-v1.0 batch 3 (train 2)",
    ]
    rows = [row.replace("v1.0-small", "v1.0") for row in TRAIN_ROWS]
    write(tmp_path / batches[0] / "train.csv", CHEXPERT, *rows)
    write(
        tmp_path / batches[0] / "valid.csv",
        CHEXPERT,
        *(row.replace("train", "valid") for row in rows),
    )
    touch(
        tmp_path,
        f"{batches[1]}/{ONE}",
        f"{batches[2]}/{TWO}",
        f"{batches[0]}/valid/{ONE}",
        f"{batches[0]}/valid/{TWO}",
    )
    assert found(load_chexpert(tmp_path, report=Report())) == expected(batches[1], batches[2])
    assert found(load_chexpert(tmp_path, "valid", report=Report())) == expected(
        f"{batches[0]}/valid"
    )


@pytest.mark.parametrize(
    "name, folder", [("valid.csv", "valid"), ("valid.csv", "val"), ("val_labels.csv", "val")]
)
def test_chexpert_validation_is_called_valid_or_val(tmp_path, name, folder):
    write(tmp_path / name, CHEXPERT, *(row.replace("train", "valid") for row in TRAIN_ROWS))
    touch(tmp_path, f"{folder}/{ONE}", f"{folder}/{TWO}")
    assert found(load_chexpert(tmp_path, "valid", report=Report())) == expected(folder)


def test_chexpert_test_labels_take_the_view_from_the_name(tmp_path):
    """test_labels.csv has no columns of the view, and a patient can have two frontals."""
    lines = [
        f"test/patient64791/study1/{name}.jpg,{cells(**values)}"
        for name, values in (
            ("view2_frontal", {"Edema": 1.0}),
            ("view1_frontal", {"Edema": 1.0}),
            ("view3_lateral", {"Edema": 1.0}),
        )
    ]
    write(tmp_path / "CheXpert" / "test_labels.csv", "Path," + ",".join(LABELS), *lines)
    report = Report()
    [example] = load_chexpert(tmp_path, "test", report=report)
    assert example.image == "CheXpert/test/patient64791/study1/view1_frontal.jpg"
    assert report.dropped == {"lateral view": 1, "another image of the study was chosen": 1}
    assert len(load_chexpert(tmp_path, "test", frontals="all", report=Report())) == 2
    # Without the column No Finding (and its blank cells) it is unknown, unless a rule or a finding
    # says otherwise.
    lines = [
        "Path," + ",".join(LABELS[1:]),
        *(line.replace(f".jpg,{cells()[:1]}", ".jpg,", 1) for line in lines),
    ]
    write(tmp_path / "CheXpert" / "test_labels.csv", *lines)
    report = Report()
    [example] = load_chexpert(tmp_path, "test", report=report)
    assert (example.labels, example.evaluated_labels) == (("Edema",), LABELS)
    assert report.notes == ["the label file has no column 'No Finding'"]


def test_chexpert_study_level_labels(tmp_path):
    """groundtruth.csv names studies, no images, and ends without a newline; Lung Lesion stands
    before Lung Opacity in some files.
    """
    swapped = [*LABELS[:3], "Lung Lesion", "Lung Opacity", *LABELS[5:]]
    lines = [
        "Study," + ",".join(swapped),
        "CheXpert-v1.0/test/patient64741/study1,"
        + ",".join("01"[label == "Lung Lesion"] for label in swapped),
        "CheXpert-v1.0/test/patient64742/study1," + ",".join("0" * 14),
    ]
    write(tmp_path / "groundtruth.csv", *lines, end="")
    write(
        tmp_path / "test_labels.csv",
        "Path," + ",".join(LABELS),
        "test/patient64741/study1/view1_frontal.jpg," + cells(Edema=1.0),
    )
    touch(
        tmp_path,
        *(
            f"test/patient64741/study1/{name}"
            for name in ("view1_lateral.jpg", "view2_frontal.jpg", "view3_frontal.jpg", "notes.txt")
        ),
        "test/patient64742/study1/view1_frontal.jpg",
    )
    report = Report()
    first, second = load_chexpert(
        tmp_path, "test", policy=LabelPolicy(no_label="empty"), report=report
    )
    assert (first.image, first.labels) == (
        "test/patient64741/study1/view2_frontal.jpg",
        ("Lung Lesion",),
    )
    # all zero, and No Finding is one of the zeros
    assert (second.labels, second.evaluated_labels) == ((), LABELS)
    assert report.rows == 4 and report.dropped == {
        "lateral view": 1,
        "another image of the study was chosen": 1,
    }
    # 32 of the 500 real studies are all zero: by the other convention they are No Finding.
    assert load_chexpert(tmp_path, "test", report=Report())[1].labels == ("No Finding",)
    # At image level each image has labels of its own, where there is a file with them.
    assert [e.labels for e in load_chexpert(tmp_path, "test", frontals="all", report=Report())] == [
        ("Edema",)
    ]

    (tmp_path / "test/patient64742/study1/view1_frontal.jpg").unlink()
    [problem] = refusal(load_chexpert, tmp_path, "test")
    assert (
        f"{tmp_path}/groundtruth.csv, row 3, column 'Study'" in problem
        and "holds no viewN_frontal.jpg" in problem
    )
    report = Report()
    assert len(load_chexpert(tmp_path, "test", drop_missing=True, report=report)) == 1
    assert report.dropped["image files of a study are missing (studies)"] == 1


def several_frontals(tmp_path: Path) -> None:
    study = "CheXpert-v1.0/train/patient00009/study7/view"
    write(
        tmp_path / "train.csv",
        CHEXPERT,
        chexpert_row(f"{study}4_lateral.jpg", "Lateral,"),
        chexpert_row(f"{study}3_frontal.jpg", "Frontal,PA"),
        chexpert_row(f"{study}10_frontal.jpg", "Frontal,PA"),
        chexpert_row(f"{study}2_frontal.jpg", "Frontal,AP"),
        chexpert_row(f"{study}1_frontal.jpg", "Frontal,LL"),
        chexpert_row("CheXpert-v1.0/train/patient00009/study2/view1_lateral.jpg", "Lateral,"),
    )


@pytest.mark.parametrize(
    "options, views",
    [
        ({}, ["3"]),  # PA before AP before another; of two PA the first, by number and not by text
        ({"frontals": "first"}, ["1"]),
        ({"frontals": "all"}, ["3", "10", "2", "1"]),
        ({"views": "all", "frontals": "all"}, ["4", "3", "10", "2", "1", "1"]),
        ({"views": "all"}, ["3", "1"]),  # the second study has a lateral image alone
    ],
)
def test_the_choice_among_several_images_of_a_study(tmp_path, options, views):
    several_frontals(tmp_path)
    report = Report()
    examples = load_chexpert(tmp_path, report=report, **options)
    assert [example.image.rpartition("view")[2].partition("_")[0] for example in examples] == views
    assert len(examples) + report.dropped.total() == report.rows == 6


def test_a_missing_image_is_not_chosen_where_it_should_be_dropped(tmp_path):
    several_frontals(tmp_path)
    touch(tmp_path, "train/patient00009/study7/view2_frontal.jpg")
    # nobody looked
    assert load_chexpert(tmp_path, report=Report())[0].image.endswith("view3_frontal.jpg")
    report = Report()
    [example] = load_chexpert(tmp_path, drop_missing=True, report=report)
    assert example.image.endswith("view2_frontal.jpg") and report.dropped == {
        "lateral view": 2,
        "image file is missing": 3,
    }


def test_the_report_counts_by_reason_and_by_label(tmp_path, capsys):
    paths = [f"CheXpert-v1.0/train/patient0000{i}/study1/view1_frontal.jpg" for i in range(5)]
    write(
        tmp_path / "train.csv",
        CHEXPERT,
        *(
            chexpert_row(path, labels=cells(**values))
            for path, values in zip(
                paths,
                (
                    {"Edema": 1.0, "Fracture": -1.0},
                    {"Edema": 1.0, "No_Finding": 1.0},
                    {"Edema": -1.0},
                    {"Edema": 0.0},
                    {},
                ),
                strict=True,
            )
        ),
        chexpert_row(paths[0].replace("view1_frontal", "view2_lateral"), "Lateral,"),
    )
    touch(tmp_path, "train/patient00000/study1/view1_frontal.jpg")
    load_chexpert(tmp_path, policy=LabelPolicy("ignore"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "CheXpert train: kept 5 of 6 images (5 studies, 5 patients)"
    assert printed[2:4] == [
        "  dropped 1: lateral view",
        "  without any label 1; called No Finding by rule 2; No Finding beside a finding 1",
    ]
    rows = {line[2:30].strip(): line[30:].split() for line in printed[5:]}
    # Edema of five: 1, 1, -1 (unknown), 0, blank. No Finding: stated once and twice by rule;
    # unknown where Edema is; blank in 4.
    assert rows["Edema"] == ["2", "4", "1", "1"] and rows["Fracture"] == ["0", "4", "1", "4"]
    assert rows["No Finding"] == ["3", "4", "0", "4"] and list(rows) == list(LABELS)

    report = Report()
    assert len(load_chexpert(tmp_path, policy=LabelPolicy(no_label="drop"), report=report)) == 2
    assert (
        report.dropped == {"lateral view": 1, "no label is true": 3}
        and capsys.readouterr().out == ""
    )


def test_every_bad_row_is_named_with_its_column(tmp_path):
    good = "CheXpert-v1.0/train/patient0000{}/study1/view1_frontal.jpg"
    file = write(
        tmp_path / "train.csv",
        CHEXPERT,
        chexpert_row(good.format(1)),
        chexpert_row("CheXpert-v1.0/train/../secret.jpg"),
        chexpert_row(good.format(2), "Oblique,"),
        chexpert_row(good.format(3), labels=cells(Edema="yes", Fracture=2.0)),
        chexpert_row(good.format(4)) + ",",
        chexpert_row(good.format(5))[:-1],
        chexpert_row(good.format(6)) + ",x",
        chexpert_row(good.format(1)),
    )
    said = refusal(load_chexpert, tmp_path)
    assert all(problem.startswith(f"{file}, row ") for problem in said)
    assert [problem.removeprefix(f"{file}, ") for problem in said] == [
        (
            "row 3, column 'Path': 'CheXpert-v1.0/train/../secret.jpg' does not end in"
            " patientN/studyN/viewN_frontal.jpg"
        ),
        "row 4, column 'Frontal/Lateral': 'Oblique' is neither Frontal nor Lateral",
        "row 5, column 'Edema': 'yes' is no label value; they are 1, 0, -1 and blank",
        "row 5, column 'Fracture': '2.0' is no label value; they are 1, 0, -1 and blank",
        "row 7: has 18 fields, the header has 19",
        "row 8: has 20 fields, the header has 19",
        f"row 9, column 'Path': '{good.format(1)}' is also in row 2",
    ]


def test_a_long_list_of_bad_rows_is_cut(tmp_path):
    write(tmp_path / "train.csv", CHEXPERT, *[chexpert_row("x")] * (MAX_PROBLEMS + 7))
    said = refusal(load_chexpert, tmp_path)
    assert len(said) == MAX_PROBLEMS + 1 and said[-1] == "and 7 more problems"


@pytest.mark.parametrize(
    "header, said",
    [
        (CHEXPERT.replace("Path,", "File,"), "column 'Path' is missing; it has File, Sex"),
        (CHEXPERT.replace("AP/PA,", "Projection,"), "column 'AP/PA' is missing"),
        (
            CHEXPERT.replace("Edema,", "Oedem,").replace(",Fracture", ",Broken"),
            "label column 'Edema', 'Fracture' is missing; it has Path",
        ),
        (CHEXPERT + ",edema", "column 'edema' occurs twice"),
        (
            CHEXPERT + ",Airspace Opacity",
            "columns 'Lung Opacity' and 'Airspace Opacity' are both Lung Opacity",
        ),
        ("", "has no header row"),
    ],
)
def test_a_wrong_header_names_the_column(tmp_path, header, said):
    write(
        tmp_path / "train.csv",
        header,
        chexpert_row("CheXpert-v1.0/train/patient1/study1/view1_frontal.jpg"),
    )
    [problem] = refusal(load_chexpert, tmp_path)
    assert problem.startswith(f"{tmp_path}/train.csv: ") and said in problem


def test_a_column_that_says_more_than_a_label_is_no_label_column(tmp_path):
    """Columns and answers share `canonical_label`: it takes off markup, and never a word."""
    path = "CheXpert-v1.0/train/patient1/study1/view1_frontal.jpg"
    row = chexpert_row(path, labels=cells(Edema=1))
    write(tmp_path / "plain" / "train.csv", CHEXPERT, row)
    plain = load_chexpert(tmp_path / "plain")
    more = ["No Edema", "Edema (uncertain)", "left Fracture", "Edema: no", "Edema?", "[ ] Fracture"]
    more += ["Edema and Fracture", "Edema/Fracture", "0. Edema", "Edema -", "Labels: Fracture"]
    write(tmp_path / "more" / "train.csv", f"{CHEXPERT},{','.join(more)}", row + ",1" * len(more))
    assert [r.labels for r in load_chexpert(tmp_path / "more")] == [r.labels for r in plain]
    assert plain[0].labels == ("Edema",)
    # spelt with exactly the letters of a label, a column is that label's, in any markup
    marked = CHEXPERT.replace("Pleural Effusion", '"[Pleural_Effusion]"').replace(
        "Edema", "1. Edema"
    )
    write(tmp_path / "marked" / "train.csv", marked, row)
    assert [r.labels for r in load_chexpert(tmp_path / "marked")] == [r.labels for r in plain]


def test_files_that_cannot_be_read(tmp_path):
    assert refusal(load_chexpert, tmp_path / "none") == [f"{tmp_path}/none: no such folder"]
    assert refusal(load_chexpert, tmp_path) == [
        f"{tmp_path}: holds none of train.csv (nor with .gz), and no folder in it does; put the"
        " file there, or give the folder above that holds it"
    ]
    whole = write(tmp_path / "train.csv.gz", CHEXPERT, *TRAIN_ROWS).read_bytes()
    # the last is neither UTF-8 nor marked as UTF-16
    for content in (whole[:-9], whole[:40] + b"\0\0\0\0" + whole[44:], b"\xff\xfd\0a,b"):
        (tmp_path / "train.csv.gz").write_bytes(content)
        [problem] = refusal(load_chexpert, tmp_path)
        assert (
            problem.startswith(f"{tmp_path}/train.csv.gz, after row ")
            and "cannot be read" in problem
        )
    (tmp_path / "train.csv.gz").unlink()
    for name in ("CheXpert-v1.0", "CheXpert-v1.0-small"):
        write(tmp_path / name / "train.csv", CHEXPERT, *TRAIN_ROWS)
    assert refusal(load_chexpert, tmp_path) == [
        f"{tmp_path}: train.csv is in CheXpert-v1.0 and in CheXpert-v1.0-small; name one of them"
    ]


def test_another_label_file_of_the_release(tmp_path):
    write(tmp_path / "train.csv", CHEXPERT, *TRAIN_ROWS)
    write(
        tmp_path / "train_visualCheXbert.csv",
        CHEXPERT,
        chexpert_row(f"CheXpert-v1.0/train/{ONE}", labels=cells(Fracture=1.0)),
    )
    [example] = load_chexpert(tmp_path, label_file="train_visualCheXbert.csv", report=Report())
    assert example.labels == ("Fracture",)


@pytest.mark.parametrize("load", [load_chexpert, load_mimic, load_nih])
def test_an_unknown_part_is_refused(tmp_path, load):
    assert "part 'val' is not known; it may be train, " in refusal(load, tmp_path, "val")[0]


# ---- MIMIC-CXR-JPG -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "suffix, version, inner",
    [(".csv.gz", "2.0.0", "2.1.0"), (".csv", "2.0.0", ""), (".csv.gz", "2.1.0", "")],
)
def test_mimic_joins_views_split_and_labels(tmp_path, suffix, version, inner):
    mimic(tmp_path / inner, suffix, version)
    report = Report()
    [example] = load_mimic(tmp_path, report=report)
    files = f"{inner}/files" if inner else "files"
    assert example.image == f"{files}/p10/p10000001/s50000001/{dicom(3)}.jpg"  # PA before AP
    assert (example.id, example.patient_id, example.dataset) == (
        f"mimic-{dicom(3)}",
        "mimic-10000001",
        "mimic",
    )
    assert (example.labels, example.source_labels) == (
        ("Pleural Effusion",),
        ("Edema=-1.0", "Pleural Effusion=1.0"),
    )
    assert example.extra == {"study_id": "s50000001"}
    # MIMIC's files know no sex and no age
    assert (example.sex, example.age, example.view) == (None, None, "PA")
    assert report.rows == 5 and report.dropped == {
        "view LATERAL": 1,
        "view not given": 1,
        "the study has no row in the label file": 1,
        "another image of the study was chosen": 1,
    }
    assert sorted(Path(file).name for file in report.files) == [
        f"mimic-cxr-{version}-{name}{suffix}" for name in ("chexpert", "metadata", "split")
    ]


def test_mimic_labelers_and_the_radiologists_labels(tmp_path):
    mimic(tmp_path)
    [example] = load_mimic(tmp_path, labels="negbio", report=Report())
    assert example.labels == ("Edema", "Pleural Effusion")
    [example] = load_mimic(tmp_path, "test", report=Report())
    assert example.labels == ("No Finding",)  # a study that is all blank: 2,414 of the real ones
    [example] = load_mimic(
        tmp_path, "test", policy=LabelPolicy("ignore"), labels="radiologist", report=Report()
    )
    assert example.patient_id == "mimic-10000002"  # which that file does not name
    assert (example.labels, example.source_labels) == (
        ("Lung Opacity",),
        ("Airspace Opacity=1.0", "Edema=-1.0"),
    )
    assert example.evaluated_labels == without("Edema")
    report = Report()
    assert load_mimic(tmp_path, labels="radiologist", report=report) == []
    assert report.dropped["the study has no row in the label file"] == 3


def test_mimic_every_view_with_the_labels_of_its_study(tmp_path):
    mimic(tmp_path)
    examples = load_mimic(tmp_path, views="all", frontals="all", report=Report())
    assert [(example.view, example.labels) for example in examples] == [
        (view, ("Pleural Effusion",)) for view in ("LATERAL", "AP", "PA")
    ]


def test_mimic_bad_rows_of_all_files_at_once(tmp_path):
    mimic(
        tmp_path,
        ".csv",
        metadata=[
            f"{dicom(7)},1000000x,50000001,,PA,,,,,,,",
            "../../etc,10000001,50000001,,PA,,,,,,,",
            f"{dicom(8)},10000009,50000001,,PA,,,,,,,",
        ],
        split=[
            f"{dicom(7)},50000001,10000001,train",
            "../../etc,50000001,10000001,train",
            f"{dicom(8)},50000001,10000009,train",
            f"{dicom(9)},50000001,10000001,val",
        ],
        chexpert=[
            f"10000001,50000001,{mimic_labels()}",
            f"10000001,5000000,{mimic_labels(Edema=3)}",
        ],
    )
    said = [
        problem.removeprefix(f"{tmp_path}/mimic-cxr-2.0.0-")
        for problem in refusal(load_mimic, tmp_path)
    ]
    assert said == [
        "chexpert.csv, row 3, column 'study_id': '5000000' is no study_id",
        "chexpert.csv, row 3, column 'Edema': '3' is no label value; they are 1, 0, -1 and blank",
        "chexpert.csv, row 4, column 'study_id': 50000001 is there twice",
        "split.csv, row 5, column 'split': 'val' is none of train, validate, test",
        "metadata.csv, row 2, column 'subject_id': '1000000x' is no subject_id",
        (
            "metadata.csv, row 2, column 'subject_id': study 50000001 belongs to 10000001 in the"
            " label file, not 1000000x"
        ),
        "metadata.csv, row 3, column 'dicom_id': '../../etc' is no dicom_id",
        (
            "metadata.csv, row 4, column 'subject_id': study 50000001 belongs to 10000001 in the"
            " label file, not 10000009"
        ),
    ]


def test_mimic_names_every_missing_file(tmp_path):
    mimic(tmp_path)
    for name in ("split", "chexpert"):
        (tmp_path / f"mimic-cxr-2.0.0-{name}.csv.gz").unlink()
    said = refusal(load_mimic, tmp_path)
    assert (
        len(said) == 2
        and "mimic-cxr-2.0.0-split.csv" in said[0]
        and "mimic-cxr-2.0.0-chexpert.csv" in said[1]
    )


# ---- NIH ChestX-ray14 ----------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["v2017", "v2020", "box", "kaggle sample"])
def test_nih_header_variants(tmp_path, variant):
    nih(tmp_path, variant)
    report = Report()
    first, second = load_nih(tmp_path, report=report)
    assert (first.id, first.patient_id, first.image) == (
        "nih-00000013_005",
        "nih-00000013",
        "images/00000013_005.png",
    )
    assert (first.labels, first.evaluated_labels) == (("Lung Lesion",), NIH_NINE)
    assert first.source_labels == ("Effusion", "Mass", "Nodule")
    # 58 or, in the older files, 058Y; the column is Patient Gender or Patient Sex
    assert (first.sex, first.age, first.view) == ("M", 58, "PA")
    assert second.labels == ("No Finding",)
    assert [example.id for example in load_nih(tmp_path, "test", report=Report())] == [
        "nih-00000014_000",
        "nih-00000014_001",
    ]
    assert len(load_nih(tmp_path, "all", report=Report())) == 4
    assert len(report.files) == 2  # the list decides, too


@pytest.mark.parametrize(
    "cell, age",
    [
        ("058Y", 58),
        ("58", 58),
        (" 7 ", 7),
        ("0", 0),  # NIH has infants: 11 months and 13 days are 0 years, 30 months are 2
        ("011M", 0),
        ("800D", 2),
        ("130W", 2),
        ("030M", 2),
        ("013D", 0),
        ("058y", 58),
        ("120", 120),
        ("121", None),
        ("411", None),
        ("0411", None),
        ("-3", None),
        ("Y", None),
        ("58 or 59", None),
        ("", None),
    ],
)
def test_nih_ages(tmp_path, cell, age):
    nih(tmp_path)
    file = tmp_path / "Data_Entry_2017_v2020.csv"
    file.write_text(file.read_text().replace(",58,", f",{cell},", 1))
    report = Report()
    first, second = load_nih(tmp_path, report=report)
    assert (first.age, second.age) == (age, 58)
    noted = [f"taken as unknown: Patient Age {cell!r} (1)"] if age is None and cell else []
    assert report.notes == noted


def test_nih_files_without_sex_and_age_stay_valid(tmp_path):
    nih(tmp_path)
    file = tmp_path / "Data_Entry_2017_v2020.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()]
    file.write_text("\n".join(",".join((*row[:4], *row[6:])) for row in rows))
    first, _ = load_nih(tmp_path, report=Report())
    assert (first.sex, first.age, first.view) == (None, None, "PA")


@pytest.mark.parametrize(
    "sex, age, read, noted",
    [
        ("Female", "68", ("F", 68), []),
        ("male", "90.0", ("M", 90), []),
        ("F", "18", ("F", 18), []),
        ("Unknown", "0", (None, None), ["taken as unknown: Sex 'Unknown' (1), Age '0' (1)"]),
        ("", "", (None, None), []),
        ("Female", "abc", ("F", None), ["taken as unknown: Age 'abc' (1)"]),
    ],
)
def test_chexpert_sex_and_age(tmp_path, sex, age, read, noted):
    """CheXpert's patients are adults, and its one sex 'Unknown' and three ages 0 say nothing."""
    write(
        tmp_path / "train.csv",
        CHEXPERT,
        f"CheXpert-v1.0-small/train/{ONE},{sex},{age},Frontal,LL,{BLANKS}",
        f"CheXpert-v1.0-small/train/{TWO},Male,40,Frontal,PA,{BLANKS}",
    )
    report = Report()
    first, second = load_chexpert(tmp_path, report=report)
    assert ((first.sex, first.age), first.view) == (read, "LL")
    assert (second.sex, second.age, second.view) == ("M", 40, "PA")
    assert report.notes == noted


def test_chexpert_test_files_know_the_view_alone(tmp_path):
    write(
        tmp_path / "CheXpert/test_labels.csv",
        "Path," + ",".join(LABELS),
        "test/patient64741/study1/view1_frontal.jpg," + cells(Edema=1.0),
    )
    [example] = load_chexpert(tmp_path, "test", report=Report())
    assert (example.sex, example.age, example.view) == (None, None, "frontal")


def test_a_mimic_image_without_a_view_has_none(tmp_path):
    mimic(tmp_path)
    options = {"views": "all", "frontals": "all", "labels": "chexpert"}
    file = tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz"
    write(
        file,
        "subject_id,study_id," + ",".join(ALPHABETICAL),
        f"10000001,50000002,{mimic_labels(Edema=1.0)}",
    )
    examples = load_mimic(tmp_path, report=Report(), **options)
    # study 2 has an image without a ViewPosition, and an AP
    assert [example.view for example in examples] == [None, "AP"]
    assert ["view" in row_of(example) for example in examples] == [False, True]


def test_nih_nine_or_ten_categories_and_images_without_one(tmp_path):
    nih(tmp_path)

    def labels(**options) -> list[tuple[str, ...]]:
        examples = load_nih(tmp_path, "all", report=Report(), **options)
        return [example.labels for example in examples]

    assert labels() == [("Lung Lesion",), ("No Finding",), (), ("Pleural Other",)]
    assert labels(evaluated=NIH_TEN) == [
        ("Lung Lesion", "Pleural Effusion"),
        ("No Finding",),
        (),
        ("Pleural Effusion", "Pleural Other"),
    ]
    assert labels(no_label="no_finding")[2] == ("No Finding",)
    report = Report()
    assert len(
        load_nih(tmp_path, "all", no_label="drop", report=report)
    ) == 3 and report.dropped == {"no label is true": 1}
    assert all(
        e.evaluated_labels == NIH_TEN
        for e in load_nih(tmp_path, evaluated=NIH_TEN, report=Report())
    )
    assert set(NINE_OTHERS) == set(LABELS) - set(NIH_NINE) and set(NIH_TEN) - set(NIH_NINE) == {
        "Pleural Effusion"
    }


@pytest.mark.parametrize(
    "folders",
    [
        ("images_001/images", "images_002/images"),
        ("images_001", "images_002"),
        ("images", "images"),
        ("nih/images", "nih/images"),
    ],
)
def test_nih_image_folders(tmp_path, folders):
    inner = folders[0].rpartition("/images")[0] if folders[0].startswith("nih") else ""
    nih(tmp_path / inner)
    touch(tmp_path, f"{folders[0]}/00000013_005.png", f"{folders[1]}/00000013_004.png")
    assert [e.image for e in load_nih(tmp_path, report=Report())] == [
        f"{folders[0]}/00000013_005.png",
        f"{folders[1]}/00000013_004.png",
    ]


def test_nih_bad_rows_and_lists(tmp_path):
    nih(tmp_path)
    file = tmp_path / "Data_Entry_2017_v2020.csv"
    lines = file.read_text().splitlines()
    lines += [
        lines[1].replace("00000013_005", "../00000013_005"),
        lines[1].replace("5,13,", "5,14,").replace("_005", "_006"),
        lines[1].replace("|Mass", "|Infiltrate").replace("_005", "_007"),
        lines[2],
    ]
    write(file, *lines)
    said = [problem.removeprefix(f"{file}, row ") for problem in refusal(load_nih, tmp_path, "all")]
    assert said[0].startswith(
        "6, column 'Image Index': '../00000013_005.png' is no name of an NIH image"
    )
    assert said[1] == "7, column 'Patient ID': '14' is not the patient of 00000013_006.png"
    assert said[2].startswith(
        "8, column 'Finding Labels': 'Infiltrate' is no category of NIH; known: No Finding, "
    )
    assert said[3:] == ["9, column 'Image Index': 00000013_004.png is also in row 3"]

    nih(tmp_path)
    write(tmp_path / "test_list.txt", "00000014_001.png", "00000099_000.png", newline="\r\n")
    report = Report()
    assert len(load_nih(tmp_path, "test", report=report)) == 1
    assert report.notes == ["1 images of test_list.txt are not in the label file"]
    (tmp_path / "test_list.txt").unlink()
    assert "holds none of test_list.txt" in refusal(load_nih, tmp_path, "test")[0]


# ---- size ----------------------------------------------------------------------------------------
def test_a_large_label_file_needs_little_memory_and_no_repeated_work(tmp_path, monkeypatch):
    """20,000 rows of 81 kinds. 224,000 rows must stay under 500 MB, so 2,200 bytes a row, and each
    kind is worked out once.

    tests/benchmarks/label_files.py has the times.
    """
    values = ("", "1.0", "0.0", "-1.0")
    with open(tmp_path / "train.csv", "w") as file:
        print(CHEXPERT, file=file)
        for i in range(20_000):
            kind = {
                "Edema": values[i % 3],
                "Fracture": values[i // 3 % 3],
                "Pneumonia": values[i // 9 % 3],
                "Atelectasis": values[i // 27 % 3 + 1],
            }
            print(
                chexpert_row(
                    f"CheXpert-v1.0/train/patient{i // 4:05d}/study{i}/view1_frontal.jpg",
                    labels=cells(**kind),
                ),
                file=file,
            )
    combined = Counter()
    combine = LabelPolicy.combine
    monkeypatch.setattr(
        LabelPolicy,
        "combine",
        lambda self, meanings: combined.update([1]) or combine(self, meanings),
    )
    tracemalloc.start()
    try:
        examples = load_chexpert(tmp_path, report=Report())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(examples) == 20_000 and peak / 20_000 < 2_200
    # zeros: only what is true counts. Three labels are 1 or not (8 kinds), Atelectasis is 1.0 or
    # not: 16.
    assert combined[1] == 16
    # rows of one kind share theirs
    assert len({id(example.source_labels) for example in examples}) == 81


def test_a_table_is_read_row_by_row(tmp_path):
    file = write(tmp_path / "x.csv", "a,b", *[f"{i},{i}" for i in range(1000)])
    rows = Table(file).rows([], [0, 1], [1, 0, 1])
    assert next(rows) == (2, ("0", "0"), ("0", "0", "0")) and next(rows) == (
        3,
        ("1", "1"),
        ("1", "1", "1"),
    )


# ---- the sample ----------------------------------------------------------------------------------
@sample
def test_the_samples_real_nih_rows():
    """44 real images of 40 patients; the counts are those of the sample's README."""
    folder = Path(os.environ["CXR_SAMPLE"]) / "nih"
    nine, ten = (
        load_nih(folder, "all", evaluated=evaluated, report=Report())
        for evaluated in (NIH_NINE, NIH_TEN)
    )
    assert len(found(nine)) == 44 and len({example.patient_id for example in nine}) == 40
    counts = Counter(label for example in nine for label in example.labels)
    assert counts == {
        "Atelectasis": 5,
        "Cardiomegaly": 8,
        "Consolidation": 5,
        "Edema": 5,
        "Lung Lesion": 5,
        "No Finding": 8,
        "Pleural Other": 5,
        "Pneumonia": 5,
        "Pneumothorax": 5,
    }
    assert sum(not example.labels for example in nine) == 6
    assert sum("Pleural Effusion" in example.labels for example in ten) == 6
    train, test = (
        load_nih(folder, "train", report=Report()),
        load_nih(folder, "test", report=Report()),
    )
    assert (len(train), len(test)) == (40, 4) and sorted(e.id for e in train + test) == sorted(
        e.id for e in nine
    )


@sample
@pytest.mark.parametrize(
    "name, count, has",
    [("Data_Entry_2017_v2020_first200", 200, 9), ("Data_Entry_2017_v2020_test_sample200", 200, 9)],
)
def test_400_real_rows_of_nih(tmp_path, name, count, has):
    source = Path(os.environ["CXR_SAMPLE"]) / "headers" / f"nih_{name}.csv"
    (tmp_path / "Data_Entry_2017_v2020.csv").write_bytes(source.read_bytes())
    examples = load_nih(tmp_path, "all", report=Report())
    assert (
        len(examples) == count
        and len({label for example in examples for label in example.labels}) == has
    )


@sample
def test_the_samples_chexpert_format():
    folder = Path(os.environ["CXR_SAMPLE"]) / "chexpert"
    report = Report()
    train = load_chexpert(folder, report=report)
    assert len(found(train)) == 28 and report.dropped == {"lateral view": 2}
    assert len(found(load_chexpert(folder / "CheXpert-v1.0-small", "valid", report=Report()))) == 8
    study, image = (
        load_chexpert(folder, "test", frontals=frontals, report=Report())
        for frontals in ("pa_first", "all")
    )
    assert found(study) == found(image) and len(study) == 8
    # Each fixture row's label set is that of the NIH image that its picture is, mapped: compare
    # through the list of the two.
    links = dict(line.split(",") for line in (folder / "link.csv").read_text().splitlines()[1:])
    by_image = {
        e.image.rpartition("/")[2]: e.labels
        for e in load_nih(folder.parent / "nih", "all", evaluated=NIH_TEN, report=Report())
    }
    fixture = load_chexpert(
        folder / "CheXpert-v1.0-small", policy=LabelPolicy(no_label="empty"), report=Report()
    )
    assert [e.labels for e in fixture] == [
        by_image[links[f"CheXpert-v1.0-small/{e.image}"]] for e in fixture
    ]


@sample
def test_the_samples_mimic_format():
    folder = Path(os.environ["CXR_SAMPLE"]) / "mimic-cxr-jpg"
    sets, reports = {}, {}
    for part in ("train", "validate", "test"):
        reports[part] = Report()
        sets[part] = load_mimic(folder, part, report=reports[part])
        found(sets[part])
    assert [len(examples) for examples in sets.values()] == [22, 7, 5]
    assert reports["train"].dropped == {
        "view LATERAL": 1,
        "view LL": 1,
        "view not given": 1,
        "the study has no row in the label file": 1,
    }
    radiologist = load_mimic(folder / "2.1.0", "test", labels="radiologist", report=Report())
    assert [e.labels for e in radiologist] == [e.labels for e in sets["test"]]
    assert {s for e in radiologist for s in e.source_labels if "Opacity" in s} == {
        "Airspace Opacity=-1.0"
    }
