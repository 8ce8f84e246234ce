"""Protect data.select.

Checked: sets that share no patient, draws that a seed decides, files that the other commands read,
what is noted of them, and refusals that leave nothing behind.

A patient in two sets makes every score too good.

Run: pytest tests/data/test_select.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

import data.select
from data.draw import check_disjoint, deal_patients, draw
from data.examples import Example, read_jsonl, row_of, selection_file
from data.files import DataError, write_jsonl
from data.join import read_answers
from data.labels import LABELS, NIH_NINE, NIH_TEN, LabelPolicy
from data.mimic import labeler_answers
from data.same_pictures import equal_files, same_pictures
from data.select import Pool, balance_table, main
from data.sources import Report
from engine.config import UsageError, parse_config
from engine.resume import run_record
from eval.settings import EvalConfig
from tests.helpers.hospitals import (
    ALPHABETICAL,
    CHEXPERT,
    cells,
    chexpert_row,
    mimic,
    mimic_labels,
    nih,
    sample,
    touch,
    write,
)
from tests.helpers.runs import overriding

SIZES = ("--sft_size", "6", "--rl_size", "3", "--validation_size", "2")


def chexpert(folder: Path, patients: int = 12) -> Path:
    """Write CheXpert's files, with all images there.

    train.csv has two studies a patient, Edema in every third. groundtruth.csv has four patients.
    """
    paths = [
        f"train/patient{p:05d}/study{s}/view1_frontal.jpg" for p in range(patients) for s in (1, 2)
    ]
    write(
        folder / "train.csv",
        CHEXPERT,
        *(
            chexpert_row(
                f"CheXpert-v1.0/{path}", labels=cells(Edema=float(i % 3 == 0), Fracture=-1.0)
            )
            for i, path in enumerate(paths)
        ),
    )
    studies = [f"test/patient{p}/study1" for p in range(64741, 64745)]
    write(
        folder / "groundtruth.csv",
        "Study," + ",".join(LABELS),
        *(f"CheXpert-v1.0/{study},{cells(Pneumonia=1)}" for study in studies),
    )
    touch(folder, *paths, *(f"{study}/view1_frontal.jpg" for study in studies))
    return folder


def run(*arguments: object) -> int:
    """Return the exit code of a command line. The last of two flags of one name counts."""
    return main(overriding([str(argument) for argument in arguments]))


def errors(capsys) -> list[str]:
    return [
        line.removeprefix("error: ")
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("error: ")
    ]


def patients_of(file: Path) -> set[str]:
    return {example.patient_id for example in read_jsonl(file)}


# ---- whole command -------------------------------------------------------------------------------
def test_the_sets_of_two_hospitals(tmp_path, capsys):
    chexpert(tmp_path / "CheXpert-v1.0")
    touch(
        nih(tmp_path / "nih"),
        *(
            f"images/{name}.png"
            for name in ("00000013_004", "00000013_005", "00000014_000", "00000014_001")
        ),
    )
    assert (
        run(
            "--chexpert",
            tmp_path / "CheXpert-v1.0",
            "--nih",
            tmp_path / "nih",
            "--output_dir",
            tmp_path,
            *SIZES,
        )
        == 0
    )
    sizes = {"sft": 6, "rl": 3, "validation": 2, "test-chexpert": 4, "test-nih": 2}
    # no --image_root: all lies under the output folder
    sets = {name: read_jsonl(tmp_path / f"{name}.jsonl") for name in sizes}
    assert {name: len(examples) for name, examples in sets.items()} == sizes
    assert all(
        (example.image_root / example.image).is_file()
        for examples in sets.values()
        for example in examples
    )
    people = [patients_of(tmp_path / f"{name}.jsonl") for name in sizes]
    assert sum(map(len, people)) == len(set.union(*people))
    assert {e.evaluated_labels for e in sets["test-nih"]} == {NIH_NINE} and {
        e.dataset for e in sets["sft"]
    } == {"chexpert"}
    assert sorted(e.source_labels for e in sets["test-nih"]) == [
        ("Infiltration",),
        ("Pleural_Thickening", "Effusion"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(
        f"{name}.{ending}" for name in sizes for ending in ("jsonl", "select.json")
    )
    printed = capsys.readouterr().out
    assert (
        "CheXpert train: kept 24 of 24 images (24 studies, 12 patients)" in printed
        and "--image_root" not in printed
    )
    edema = sum("Edema" in e.labels for e in sets["sft"])
    [row] = [
        line
        for line in printed.splitlines()
        if line.startswith("Edema") and f"{edema:,} {edema / 6:6.1%} ( 33.3%)" in line
    ]
    assert row.count("( 33.3%)") == 3  # 8 of the 24 images of the pool
    # CheXpert's rows say Female, 68, AP or PA, NIH's M, 58, PA; the test studies' file neither
    assert {(e.sex, e.age) for e in sets["sft"]} == {("F", 68)}
    assert {(e.sex, e.age, e.view) for e in sets["test-nih"]} == {("M", 58, "PA")}
    assert {(e.sex, e.age, e.view) for e in sets["test-chexpert"]} == {(None, None, "frontal")}


def test_labels_that_no_set_can_express_are_not_printed(tmp_path, capsys):
    touch(
        nih(tmp_path / "nih"),
        *(f"images/{n}.png" for n in ("00000013_004", "00000013_005", "00000014_000")),
        "images/00000014_001.png",
    )
    out = ("--output_dir", tmp_path / "out", "--image_root", tmp_path, "--nih", tmp_path / "nih")
    none = ("--sft_size", 0, "--rl_size", 0, "--validation_size", 0)
    assert run(*out, *none) == 0
    printed = capsys.readouterr().out
    report, table = printed.split("images with the label")
    for text in (report, table):  # NIH's nine of the paper, in CheXpert's order
        named = [label for label in LABELS if f"\n{label}  " in text.replace("\n  ", "\n")]
        assert named == list(NIH_NINE)


def test_what_was_done_is_noted_and_reaches_the_configuration_of_a_run(tmp_path):
    folder = chexpert(tmp_path / "c")
    assert (
        run(
            "--chexpert",
            folder,
            "--output_dir",
            tmp_path,
            *SIZES,
            "--uncertain",
            "ones",
            "Fracture=ignore",
            "--seed",
            4,
        )
        == 0
    )
    file = tmp_path / "sft.jsonl"
    note = json.loads(selection_file(file).read_text())
    assert note["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert note["pool"]["label_files"] == {
        str(folder / "train.csv"): hashlib.sha256((folder / "train.csv").read_bytes()).hexdigest()
    }
    assert (note["set"], note["images"], note["patients"]) == ("sft", 6, len(patients_of(file)))
    assert (
        note["settings"]["uncertain"],
        note["settings"]["uncertain_by_label"],
        note["settings"]["seed"],
    ) == ("ones", {"Fracture": "ignore"}, 4)
    assert note["labels"]["Edema"] == sum("Edema" in example.labels for example in read_jsonl(file))
    assert (
        note["pool"]["by_label"]["uncertain"]["Fracture"] == 24
        and note["pool"]["by_label"]["evaluated"]["Fracture"] == 0
    )
    assert all("Fracture" not in example.evaluated_labels for example in read_jsonl(file))

    resolved = parse_config([EvalConfig], [], script="eval", prog="x")
    other = write_jsonl(tmp_path / "other.jsonl", [{"id": "1"}])
    record = run_record(resolved, "eval", {"train": file, "other": other}, {})
    assert record["data"]["train"] == {
        "file": str(file),
        "sha256": note["sha256"],
        "selection": note,
    }
    assert record["data"]["other"].keys() == {"file", "sha256"}
    selection_file(other).write_text("{")
    with pytest.raises(UsageError, match=r"other\.select\.json: is not valid JSON"):
        run_record(resolved, "eval", {"other": other}, {})


def test_a_seed_decides_everything(tmp_path):
    folder = chexpert(tmp_path / "c", patients=40)
    file = folder / "train.csv"

    def sets(name: str, seed: int) -> list[str]:
        assert (
            run(
                "--chexpert",
                folder,
                "--output_dir",
                tmp_path / name,
                "--image_root",
                tmp_path,
                *SIZES,
                "--seed",
                seed,
            )
            == 0
        )
        return [
            (tmp_path / name / f"{part}.jsonl").read_text()
            for part in ("sft", "rl", "validation", "test-chexpert")
        ]

    first = sets("a", 1)
    assert sets("b", 1) == first
    different = [one != other for one, other in zip(sets("c", 2), first, strict=True)]
    assert different == [True] * 4
    header, *rows = file.read_text().splitlines()
    write(file, header, *reversed(rows))  # the order of the label file decides nothing
    assert sets("d", 1) == first


def test_test_sets_are_cut_by_a_draw_whose_beginning_is_a_draw(tmp_path):
    folder = chexpert(tmp_path / "c")
    ids = {}
    for count in (2, 3, 100):
        assert (
            run(
                "--chexpert",
                folder,
                "--output_dir",
                tmp_path / str(count),
                "--tests",
                "chexpert",
                "--max_samples",
                count,
                *["--sft_size", "0", "--rl_size", "0", "--validation_size", "0"],
            )
            == 0
        )
        assert [path.name for path in sorted((tmp_path / str(count)).iterdir())] == [
            "test-chexpert.jsonl",
            "test-chexpert.select.json",
        ]
        ids[count] = [
            example.id for example in read_jsonl(tmp_path / str(count) / "test-chexpert.jsonl")
        ]
    assert ids[2] == ids[100][:2] and ids[3] == ids[100][:3] and len(ids[100]) == 4


def test_mimic_has_a_validation_part_of_its_own(tmp_path):
    mimic(
        tmp_path / "m",
        split=["cafecafe-aaaaaaaa-bbbbbbbb-cccccccc-dddddddd,50000009,10000009,validate"],
        metadata=["cafecafe-aaaaaaaa-bbbbbbbb-cccccccc-dddddddd,10000009,50000009,,AP,,,,,,,"],
        chexpert=["10000009,50000009,,,1.0,,,,,,,,,,,"],
    )
    sizes = [
        "--sft_size",
        "1",
        "--rl_size",
        "0",
        "--validation_size",
        "1",
        "--missing_images",
        "fail",
    ]
    images = [
        f"files/p10/p10000001/s50000001/{3:08x}",
        "files/p10/p10000009/s50000009/cafecafe",
        f"files/p10/p10000002/s50000003/{6:08x}",
    ]
    touch(tmp_path / "m", *(f"{image}-aaaaaaaa-bbbbbbbb-cccccccc-dddddddd.jpg" for image in images))
    assert run("--mimic", tmp_path / "m", "--output_dir", tmp_path / "a", *sizes) == 0
    assert patients_of(tmp_path / "a" / "validation.jsonl") == {"mimic-10000009"}
    assert patients_of(tmp_path / "a" / "sft.jsonl") == {"mimic-10000001"}
    assert read_jsonl(tmp_path / "a" / "test-mimic.jsonl")[0].labels == ("No Finding",)
    # one patient there
    assert (
        run(
            "--mimic",
            tmp_path / "m",
            "--output_dir",
            tmp_path / "b",
            *sizes,
            "--validation_from",
            "train",
        )
        == 2
    )
    assert (
        run(
            "--mimic",
            tmp_path / "m",
            "--output_dir",
            tmp_path / "c",
            *sizes,
            "--mimic_test_labels",
            "radiologist",
            "--mimic_labels",
            "negbio",
            "--validation_size",
            0,
        )
        == 0
    )
    assert read_jsonl(tmp_path / "c" / "test-mimic.jsonl")[0].labels == ("Lung Opacity",)
    assert read_jsonl(tmp_path / "c" / "sft.jsonl")[0].labels == ("Edema", "Pleural Effusion")
    # the labeler says nothing of the study, which is No Finding by rule; the radiologist does
    [test] = read_jsonl(tmp_path / "c" / "test-mimic.jsonl")
    [said] = (tmp_path / "c" / "labeler-mimic.jsonl").read_text().splitlines()
    assert json.loads(said) == {
        "id": test.id,
        "completion": "<solution>No Finding</solution>",
        "answer_format": "solution",
    }
    [row] = read_answers(tmp_path / "c" / "labeler-mimic.jsonl", [test], data_file="test")
    assert (row.labels, row.answer.labels) == (("Lung Opacity",), ("No Finding",))
    assert not (tmp_path / "a" / "labeler-mimic.jsonl").exists()  # no radiologist asked for
    # nothing is overwritten, this file neither
    for name in ("test-mimic", "sft", "rl"):
        for ending in ("jsonl", "select.json"):
            (tmp_path / "c" / f"{name}.{ending}").unlink(missing_ok=True)
    flags = ("--output_dir", tmp_path / "c", *sizes, "--mimic_test_labels", "radiologist")
    assert run("--mimic", tmp_path / "m", *flags) == 2


def test_a_study_that_the_labeler_does_not_have_is_a_failed_answer(tmp_path):
    mimic(tmp_path)
    write(
        tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz",
        "subject_id,study_id," + ",".join(ALPHABETICAL),
        f"10000001,50000001,{mimic_labels(Edema=-1.0, Fracture=1.0)}",
    )
    ids = ("s50000001", "s50000003")
    examples = [
        Example(name, "p", "x.jpg", (), "mimic", tmp_path, extra={"study_id": name}) for name in ids
    ]
    for rule, said in (("zeros", "Fracture"), ("ones", "Edema, Fracture")):
        rows = labeler_answers(tmp_path, examples, "chexpert", LabelPolicy(rule))
        assert [row["completion"] for row in rows] == [f"<solution>{said}</solution>", ""]
    with pytest.raises(DataError, match="labeler 'radiologist' is not known"):
        labeler_answers(tmp_path, examples, "radiologist")


def test_study_or_image_level(tmp_path):
    folder = chexpert(tmp_path / "c")
    write(
        folder / "test_labels.csv",
        "Path," + ",".join(LABELS),
        *(f"test/patient64741/study1/view{i}_frontal.jpg,{cells(Edema=1.0)}" for i in (1, 2, 3)),
    )
    touch(
        folder,
        "test/patient64741/study1/view2_frontal.jpg",
        "test/patient64741/study1/view3_frontal.jpg",
    )
    none = ["--sft_size", "0", "--rl_size", "0", "--validation_size", "0", "--frontals", "all"]
    counts = {}
    for level in ("study", "image"):
        assert (
            run(
                "--chexpert", folder, "--output_dir", tmp_path / level, "--test_level", level, *none
            )
            == 0
        )
        counts[level] = Counter(
            example.labels for example in read_jsonl(tmp_path / level / "test-chexpert.jsonl")
        )
    assert counts == {"study": {("Pneumonia",): 4}, "image": {("Edema",): 3}}


def test_nih_map_and_the_rule_for_no_label(tmp_path):
    touch(nih(tmp_path), *(f"images/{name}.png" for name in ("00000014_000", "00000014_001")))
    none = ["--sft_size", "0", "--rl_size", "0", "--validation_size", "0"]

    def labels(name: str, *more: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        assert (
            run(
                "--nih",
                tmp_path,
                "--output_dir",
                tmp_path / name,
                "--image_root",
                tmp_path,
                *none,
                *more,
            )
            == 0
        )
        return sorted(
            (e.labels, e.evaluated_labels) for e in read_jsonl(tmp_path / name / "test-nih.jsonl")
        )

    assert labels("a") == [((), NIH_NINE), (("Pleural Other",), NIH_NINE)]
    assert labels("b", "--label_map", "nih_ten") == [
        ((), NIH_TEN),
        (("Pleural Effusion", "Pleural Other"), NIH_TEN),
    ]
    assert labels("c", "--no_label", "no_finding") == [
        (("No Finding",), NIH_NINE),
        (("Pleural Other",), NIH_NINE),
    ]
    assert labels("d", "--no_label", "drop") == [(("Pleural Other",), NIH_NINE)]


# ---- refusals ------------------------------------------------------------------------------------
def test_too_few_patients_are_named_with_the_counts(tmp_path, capsys):
    folder = chexpert(tmp_path / "c")
    assert (
        run(
            "--chexpert",
            folder,
            "--output_dir",
            tmp_path / "out",
            "--sft_size",
            20,
            "--rl_size",
            4,
            "--validation_size",
            4,
        )
        == 2
    )
    # 12 patients of 2 images: 24 images for 28.
    [error] = errors(capsys)
    assert error.startswith(
        "--sft_size 20, --rl_size 4, --validation_size 4: too few patients; CheXpert train has 24"
        " images of 12 patients"
    )
    shares = [
        int(error.split(f"{name} ")[1].split(" of ")[0])
        for name in ("sets: sft", "rl", "validation")
    ]
    assert sum(shares) == 24 and shares[0] < 20
    assert not (tmp_path / "out").exists()


def test_a_missing_image_is_an_error_or_is_not_drawn(tmp_path, capsys):
    folder = chexpert(tmp_path / "c")
    (folder / "test/patient64743/study1/view1_frontal.jpg").rename(
        folder / "test/patient64743/study1/view2_frontal.jpg"
    )
    for path in list(folder.glob("train/*0/*/*.jpg")):
        path.unlink()  # patients 0 and 10
    everything = ["--sft_size", "22", "--rl_size", "0", "--validation_size", "0", "--tests", "none"]
    assert run("--chexpert", folder, "--output_dir", tmp_path / "out", *everything) == 2
    error = errors(capsys)
    assert (
        error[0].startswith(f"sft: {folder}/train/patient00") and "missing_images drop" in error[-1]
    )
    assert (
        run(
            "--chexpert",
            folder,
            "--output_dir",
            tmp_path / "out",
            *everything,
            "--missing_images",
            "drop",
        )
        == 2
    )
    assert "20 images of 10 patients" in errors(capsys)[0]
    assert (
        run(
            "--chexpert",
            folder,
            "--output_dir",
            tmp_path / "out",
            *everything,
            "--missing_images",
            "drop",
            "--sft_size",
            20,
        )
        == 0
    )
    assert json.loads((tmp_path / "out" / "sft.select.json").read_text())["pool"]["dropped"] == {
        "image file is missing": 4
    }


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            "",
            ["no data: give --mimic FOLDER, --chexpert FOLDER or --nih FOLDER, or several of them"],
        ),
        (
            "--chexpert x --train_on mimic --sft_size -1 --max_samples 0 --tests nih",
            [
                "--train_on mimic: give its folder too",
                "--sft_size -1: must be 0 or more",
                "--max_samples 0: must be at least 1",
                "--tests nih: give its folder too",
            ],
        ),
        (
            "--nih x --validation_from valid",
            ["--validation_from valid: nih has no validation part"],
        ),
        (
            "--nih x --uncertain zeros ones Edma=ones Edema=maybe",
            [
                "--uncertain Edma=ones: 'Edma' is no label",
                "--uncertain maybe: no such rule",
                "--uncertain zeros ones: one rule for all",
            ],
        ),
        ("--nih x --sft_size 0 --rl_size 0 --validation_size 0 --tests none", ["nothing to write"]),
        ("--nih x --seed y", ["argument --seed: expected an integer, got 'y'"]),
        ("--nih x --sed 1", ["unrecognized arguments: --sed 1"]),
        # each source says what is wrong with it
        ("--nih x --chexpert y", ["y: no such folder", "x: no such folder"]),
    ],
)
def test_mistakes_of_the_command_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments.split(), "--output_dir", "out") == 2
    found = errors(capsys)
    assert len(found) == len(said) and all(
        begin in error for begin, error in zip(said, found, strict=True)
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, capsys):
    folder = chexpert(tmp_path / "c")
    (tmp_path / "rl.jsonl").write_text("mine")
    assert run("--chexpert", folder, "--output_dir", tmp_path, *SIZES) == 2
    assert errors(capsys) == [
        f"{tmp_path}/rl.jsonl exists and nothing is overwritten; give another --output_dir"
    ]
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["c", "rl.jsonl"]
        and (tmp_path / "rl.jsonl").read_text() == "mine"
    )


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, capsys):
    folder = chexpert(tmp_path / "c")
    replace, names = os.replace, []

    def full(source, target):
        names.append(target)
        if len(names) == 3:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(data.select.os, "replace", full)
    assert run("--chexpert", folder, "--output_dir", tmp_path / "out", *SIZES) == 2
    assert (
        "No space left on device" in errors(capsys)[0] and list((tmp_path / "out").iterdir()) == []
    )


def test_image_root_must_be_above_the_images(tmp_path, capsys):
    folder = chexpert(tmp_path / "c")
    assert (
        run(
            "--chexpert",
            folder,
            "--output_dir",
            tmp_path / "out",
            "--image_root",
            tmp_path / "out",
            *SIZES,
        )
        == 2
    )
    assert errors(capsys) == [f"--image_root {tmp_path}/out: {folder} does not lie under it"]
    # by itself: the folder of the images
    assert run("--chexpert", folder, "--output_dir", tmp_path / "out", *SIZES) == 0
    assert f"--image_root {folder}" in capsys.readouterr().out
    examples = read_jsonl(tmp_path / "out" / "sft.jsonl", folder)
    assert all(
        (folder / example.image).is_file() and not os.path.isabs(example.image)
        for example in examples
    )


def test_parts_that_share_a_patient_are_refused(tmp_path, capsys):
    folder = nih(tmp_path)
    # patient 13 is in the training list, too
    write(folder / "test_list.txt", "00000013_005.png", "00000014_000.png")
    touch(
        folder, *(f"images/{name}.png" for name in ("00000013_004", "00000013_005", "00000014_000"))
    )
    assert (
        run(
            "--nih",
            folder,
            "--output_dir",
            tmp_path / "out",
            *["--sft_size", "2", "--rl_size", "0", "--validation_size", "0"],
        )
        == 2
    )
    assert errors(capsys)[0].startswith("sft and test-nih share 1 patients, such as nih-00000013")
    assert not (tmp_path / "out").exists()


# ---- draws ---------------------------------------------------------------------------------------
def examples(*labels: tuple[str, ...], per_patient: int = 1) -> list[Example]:
    return [
        Example(f"e{i:04d}", f"p{i // per_patient}", "x", names, "site", Path())
        for i, names in enumerate(labels)
    ]


def test_patients_are_dealt_in_proportion():
    pools = deal_patients(
        examples(*[()] * 700, per_patient=2),
        {"sft": 200, "rl": 100, "validation": 50},
        random.Random(0),
    )
    check_disjoint(pools)
    # 350 patients of 2 images, always to the set that has least of what it needs: 400, 200 and 100
    # images, give or take a patient.
    assert sum(map(len, pools.values())) == 700
    assert [
        abs(len(pools[name]) - size) <= 2
        for name, size in (("sft", 400), ("rl", 200), ("validation", 100))
    ] == [True] * 3


def drawn_labels(pool: list[Example], count: int, sampling: str) -> Counter[str]:
    return Counter(
        "+".join(example.labels) or "none"
        for example in draw(pool, count, sampling, random.Random(1))
    )


def test_natural_draws_keep_the_frequencies_and_balanced_ones_do_not():
    pool = examples(*[("Edema",)] * 700, *[("Fracture",)] * 200, *[("Pneumonia",)] * 60, *[()] * 40)
    natural = drawn_labels(pool, 500, "natural")
    # Hypergeometric: half of each count in the mean; the variance is 500 p (1 - p) / 2, so three
    # standard deviations are below 22.
    assert all(
        abs(natural[name] - count / 2) < 22
        for name, count in {"Edema": 700, "Fracture": 200, "Pneumonia": 60, "none": 40}.items()
    )
    # Each of the four in turn while all last, then the other three: 200 - 40 = 160 = 54 + 53 + 53,
    # Edema first in CheXpert's order.
    assert drawn_labels(pool, 160, "balanced") == {
        "Edema": 40,
        "Fracture": 40,
        "Pneumonia": 40,
        "none": 40,
    }
    assert drawn_labels(pool, 200, "balanced") == {
        "Edema": 54,
        "Fracture": 53,
        "Pneumonia": 53,
        "none": 40,
    }


def test_a_balanced_draw_counts_all_labels_of_an_image():
    pool = examples(*[("Edema", "Fracture")] * 10, *[("Fracture",)] * 10, *[("Pneumonia",)] * 10)
    # Edema is first of equal ones and brings Fracture along, so only Edema and Pneumonia are ever
    # behind.
    assert drawn_labels(pool, 12, "balanced") == {"Edema+Fracture": 6, "Pneumonia": 6}


def test_a_draw_is_of_different_examples_and_never_of_more_than_there_are():
    pool = examples(*[("Edema", "Fracture")] * 30, *[()] * 5)
    for sampling in ("natural", "balanced"):
        for count in (1, 17, 35, 99):
            ids = [example.id for example in draw(pool, count, sampling, random.Random(count))]
            assert len(ids) == len(set(ids)) == min(count, 35)


def test_each_two_sets_that_share_a_patient_are_named():
    one, two, three = (
        examples((), ()),
        examples(
            (),
        ),
        examples((), (), ()),
    )
    with pytest.raises(DataError) as caught:
        check_disjoint({"a": one, "b": two, "c": [three[2]], "d": [three[1]]})
    assert [problem.split(" patients")[0] for problem in caught.value.problems] == [
        "a and b share 1",
        "a and d share 1",
    ]


def test_a_row_is_read_as_the_example_that_it_was_written_from(tmp_path):
    example = Example(
        "i",
        "p",
        "a/b.png",
        ("Edema",),
        "nih",
        tmp_path,
        NIH_NINE,
        ("Edema",),
        "<think>x</think>",
        {"study_id": "s1"},
        "M",
        0,
        "PA",
    )
    plain = Example("j", "p", "a.png", (), "nih", tmp_path)
    assert read_jsonl(write_jsonl(tmp_path / "x.jsonl", [row_of(example), row_of(plain)])) == [
        example,
        plain,
    ]
    assert "answer" not in row_of(plain)


# ---- the sample ----------------------------------------------------------------------------------
@sample
def test_the_sample_in_all_three_formats(tmp_path):
    folder = Path(os.environ["CXR_SAMPLE"])
    hospitals = (
        "--mimic",
        folder / "mimic-cxr-jpg",
        "--chexpert",
        folder / "chexpert",
        "--nih",
        folder / "nih",
    )
    for train_on, sizes in (("mimic", (10, 6, 4)), ("chexpert", (12, 6, 3)), ("nih", (16, 8, 4))):
        out = tmp_path / train_on
        flags = (
            flag
            for name, size in zip(("sft", "rl", "validation"), sizes, strict=True)
            for flag in (f"--{name}_size", size)
        )
        assert (
            run(
                *hospitals,
                "--train_on",
                train_on,
                "--output_dir",
                out,
                "--image_root",
                folder,
                *flags,
            )
            == 0
        )
        sets = {path.stem: read_jsonl(path, folder) for path in out.glob("*.jsonl")}
        assert {name: len(examples) for name, examples in sets.items()} == {
            "sft": sizes[0],
            "rl": sizes[1],
            "validation": sizes[2],
            "test-mimic": 5,
            "test-chexpert": 8,
            "test-nih": 4,
        }
        check_disjoint(sets)
        # Data_Entry_2017_v2020.csv knows all three of each image, the CheXpert fixture's
        # groundtruth.csv neither, MIMIC the view alone
        assert all(e.sex in ("F", "M") and 0 < e.age < 95 for e in sets["test-nih"])
        assert {e.view for e in sets["test-nih"]} <= {"PA", "AP"}
        assert all((e.sex, e.age) == (None, None) for e in sets["test-mimic"])
        assert {e.view for e in sets["test-mimic"]} <= {"PA", "AP"}
        assert all(
            (folder / example.image).is_file() for examples in sets.values() for example in examples
        )


# ---- one picture under two names -----------------------------------------------------------------
def test_equal_files_under_two_names_are_noted_and_kept_in_the_record(tmp_path, capsys):
    """Two of the training images have the same bytes, and one more has as many."""
    folder = chexpert(tmp_path / "chexpert")
    images = sorted((folder / "train").glob("*/study1/*.jpg"))
    for number, content in enumerate((b"the same", b"the same", b"another!")):
        images[number].write_bytes(content)
    sizes = ("--sft_size", "24", "--rl_size", "0", "--validation_size", "0", "--tests", "none")
    assert run("--chexpert", folder, "--output_dir", tmp_path / "out", *sizes) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    first, second = (f"chexpert-patient0000{i}" for i in (0, 1))
    assert f"'{first}-study1-view1_frontal'" in note and f"'{second}-study1-view1_frontal'" in note
    assert "of another patient (" in note and "with other labels (" in note
    record = json.loads((tmp_path / "out" / "sft.select.json").read_text())
    assert [f"note: {line}" for line in record["same_pictures"]] == [note]


def test_files_that_only_have_one_size_are_no_equal_files(tmp_path):
    for name, content in (("a", b"1234"), ("b", b"5678"), ("c", b"1234"), ("d", b""), ("e", b"")):
        (tmp_path / name).write_bytes(content)
    sets = {
        "one": [Example(n, "p", n, (), "s", tmp_path) for n in "abd"],
        "two": [Example(n, "q", n, (), "s", tmp_path) for n in ("c", "e", "gone")],
    }
    found = [(name, example.id, digest) for name, example, digest in equal_files(sets)]
    assert [(name, id) for name, id, _ in found] == [("one", "a"), ("one", "b"), ("two", "c")]
    assert found[0][2] == found[2][2] != found[1][2]
    problems, notes = same_pictures(equal_files(sets))
    assert problems == [
        "one, example 'a' shows the same picture as two, example 'c', of another patient ('p', 'q')"
    ]
    assert notes == [
        "pictures of two that are in one too: 1, such as 'c'; training, validation and test sets"
        " must share none"
    ]


def test_the_table_has_no_figures_for_what_a_hospital_cannot_express():
    """NIH names no fracture: its column is blank there, and not 0 of 1."""
    example = Example("a", "p", "a.png", ("Edema",), "x", Path())
    nih_example = Example("b", "q", "b.png", (), "nih", Path(), NIH_NINE)
    sets = {
        "test-mimic": ([example], Pool([example], Report())),
        "test-nih": ([nih_example], Pool([nih_example], Report())),
    }
    lines = balance_table(sets).splitlines()[2:]
    rows = {line[:28].strip(): (line[28:54].strip(), line[54:].strip()) for line in lines}
    assert rows["Edema"] == ("1 100.0% (100.0%)", "0   0.0% (  0.0%)")
    assert rows["Fracture"] == ("0   0.0% (  0.0%)", "") and len(rows) == 14
    only = {"test-nih": sets["test-nih"]}
    names = [line[:28].strip() for line in balance_table(only).splitlines()[2:]]
    assert names == list(NIH_NINE)
