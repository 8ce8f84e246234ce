"""Protect the finding of images in the hospitals' downloads and in copies of them.

Checked: every layout in which people have the images gives paths that exist, and where there is no
image one line says what was looked for and where.

Run: pytest tests/data/test_layouts.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from data.chexpert import load_chexpert
from data.layouts import folders
from data.mimic import load_mimic
from data.nih import load_nih
from data.select import main
from data.sources import Report
from tests.helpers.hospitals import (
    CHEXPERT,
    cells,
    chexpert_row,
    dicom,
    mimic,
    nih,
    touch,
    write,
)


def paths(examples) -> list[str]:
    """List the examples' images, each of which must be there."""
    assert all((example.image_root / example.image).is_file() for example in examples)
    return [example.image for example in examples]


# ---- NIH -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("folder", "suffix"),
    [
        ("png/", ".png"),  # NIH's bucket on Google Cloud
        ("", ".png"),  # beside the label file
        ("images/", ".png"),
        ("images-224/images-224/", ".png"),  # Kaggle's resized copy
        ("data/images/", ".png"),
        ("archive/images_004/images/", ".png"),
        ("CXR8/images/images/", ".png"),
        ("images/", ".jpg"),
        ("images/", ".JPG"),
    ],
)
def test_nih(tmp_path, folder, suffix):
    nih(tmp_path)
    stems = ["00000013_005", "00000013_004"]
    touch(tmp_path, *(f"{folder}{stem}{suffix}" for stem in stems), f"{folder}._{stems[0]}.png")
    report = Report()
    assert paths(load_nih(tmp_path, report=report)) == [f"{folder}{s}{suffix}" for s in stems]
    assert report.no_images == ""
    # the same folder given from above, where the label file lies deeper
    outer = tmp_path.parent / f"{tmp_path.name}-outer"
    outer.mkdir()
    tmp_path.rename(outer / "nih")
    assert paths(load_nih(outer, report=Report())) == [f"nih/{folder}{s}{suffix}" for s in stems]


def test_nih_in_twelve_archives(tmp_path):
    """As the twelve archives unpack: each image is found in its own folder."""
    nih(tmp_path)
    names = ("images_001/images/00000013_005.png", "images_012/images/00000013_004.png")
    touch(tmp_path, *names, "images_002/images/00000099_000.png")
    assert paths(load_nih(tmp_path, report=Report())) == [*names]


@pytest.mark.parametrize("bom", [False, True])
def test_the_lists_of_kaggles_copy(tmp_path, bom):
    nih(tmp_path)
    (tmp_path / "train_val_list.txt").unlink()
    (tmp_path / "test_list.txt").unlink()
    write(tmp_path / "train_val_list_NIH.txt", "00000013_004.png", "00000013_005.png", bom=bom)
    write(tmp_path / "test_list_NIH.txt", "00000014_001.png", "00000014_000.png", newline="\r\n")
    touch(tmp_path, *(f"images-224/images-224/0000001{i}.png" for i in ("3_004", "3_005")))
    assert len(paths(load_nih(tmp_path, report=Report()))) == 2
    assert len(load_nih(tmp_path, "test", report=Report())) == 2


def test_a_list_that_is_no_text_is_named(tmp_path):
    nih(tmp_path)
    (tmp_path / "test_list.txt").write_bytes(b"\xff\xfe0\0")
    with pytest.raises(ValueError, match=r"test_list\.txt: cannot be read .*download it again"):
        load_nih(tmp_path, "test", report=Report())


# ---- MIMIC ---------------------------------------------------------------------------------------
SHAPES = {
    "release": "files/p10/p10000001/s5000000{study}/{dicom}",
    "beside the label files": "p10/p10000001/s5000000{study}/{dicom}",
    "an inner folder": "mimic-cxr-jpg-small/files/p10/p10000001/s5000000{study}/{dicom}",
    "a resized copy": "images-512/p10/p10000001/s5000000{study}/{dicom}",
    "by patient": "files/p10000001/s5000000{study}/{dicom}",
    "by study": "images/s5000000{study}/{dicom}",
    "flat in files": "files/{dicom}",
    "flat in images": "images/{dicom}",
    "flat beside the label files": "{dicom}",
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".jpeg", ".JPG"])
@pytest.mark.parametrize("shape", SHAPES)
def test_mimic(tmp_path, shape, suffix):
    mimic(tmp_path)
    path = SHAPES[shape] + suffix
    touch(tmp_path, *(path.format(study=s, dicom=dicom(i)) for i, s in ((1, 1), (3, 1), (2, 1))))
    touch(tmp_path, "index.html", "files/IMAGE_FILENAMES.txt")
    report = Report()
    assert paths(load_mimic(tmp_path, report=report)) == [path.format(study=1, dicom=dicom(3))]
    assert report.no_images == ""


def test_mimic_takes_the_release_before_a_copy(tmp_path):
    mimic(tmp_path)
    for shape in ("a resized copy", "release", "flat in images"):
        touch(tmp_path, SHAPES[shape].format(study=1, dicom=dicom(3)) + ".jpg")
    (image,) = paths(load_mimic(tmp_path, report=Report()))
    assert image.startswith("files/p10/")


# ---- CheXpert ------------------------------------------------------------------------------------
@pytest.mark.parametrize("release", ["CheXpert-v1.0-small/", "CheXpert-v1.0/", ""])
@pytest.mark.parametrize(
    "folder",
    [
        "train/",
        "CheXpert-v1.0-small/train/",
        "CheXpert-v1.0 batch 2 (train 1)/",
        "CheXpert-v1.0 batch 2 (train 1)/train/",
        "images/",
        "data/resized/",
    ],
)
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_chexpert(tmp_path, release, folder, suffix):
    patients = [f"patient0000{i}/study1/view1_frontal" for i in (1, 2)]
    rows = [chexpert_row(f"{release}train/{p}.jpg", labels=cells(Edema=1.0)) for p in patients]
    write(tmp_path / "train.csv", CHEXPERT, *rows)
    expected = [f"{folder}{patient}{suffix}" for patient in patients]
    touch(tmp_path, *expected)
    report = Report()
    assert paths(load_chexpert(tmp_path, report=report)) == expected
    assert report.no_images == ""


# ---- none ----------------------------------------------------------------------------------------
def test_where_no_image_is_one_line_says_what_was_looked_for(tmp_path, capsys):
    nih(tmp_path / "nih")
    mimic(tmp_path / "mimic")
    touch(tmp_path / "mimic", f"files/p10/p10000001/s50000001/{dicom(3)}.dcm")
    row = chexpert_row("train/patient00001/study1/view1_frontal.jpg")
    write(tmp_path / "chexpert/train.csv", CHEXPERT, row)
    said = []
    for load, name in ((load_nih, "nih"), (load_mimic, "mimic"), (load_chexpert, "chexpert")):
        report = Report()
        assert len(load(tmp_path / name, report=report)) > 0
        assert f"  note: {report.no_images}" in report.text().splitlines()
        said.append(report.no_images)
    assert said[0] == (
        f"no image found: looked for 00000001_000.png and the like in {tmp_path / 'nih'}: images*/,"
        " images*/images/, png/, the folder itself and four levels below"
    )
    assert said[1].startswith("no image found: looked for images by dicom_id (.jpg, .jpeg, .png)")
    assert said[1].endswith(f"; {dicom(3)}.dcm is DICOM: convert it with data.dicom")
    assert said[2].startswith("no image found: looked for patientN/studyN/viewN_frontal.jpg in ")
    # data.select says it before it says which images are missing
    flags = ["--nih", str(tmp_path / "nih"), "--output_dir", str(tmp_path / "out")]
    sizes = ["--sft_size", "1", "--rl_size", "0", "--validation_size", "0", "--tests", "none"]
    assert main([*flags, *sizes]) == 2
    out, err = capsys.readouterr()
    assert said[0] in out and "no such image" in err


def test_a_folder_that_nobody_may_read_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "png").mkdir()
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "lost+found":
            raise PermissionError
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert list(folders(tmp_path)) == [tmp_path, tmp_path / "png"]


def test_a_folder_of_many_folders_is_not_searched_for_ever(tmp_path):
    nih(tmp_path)
    for i in range(30):
        (tmp_path / f"{i}" / "a" / "b" / "c" / "d").mkdir(parents=True)
    touch(Path(tmp_path), "3/a/b/00000013_005.png", "3/a/b/c/d/00000013_004.png")
    images = [example.image for example in load_nih(tmp_path, report=Report())]
    # four levels down, and no further
    assert images == ["3/a/b/00000013_005.png", "images/00000013_004.png"]
