"""Write small label files and folders in the forms in which the three hospitals publish theirs."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from data.labels import LABELS

sample = pytest.mark.skipif(
    "CXR_SAMPLE" not in os.environ,
    reason="CXR_SAMPLE does not name the folder of the sample X-rays",
)


def write(path: Path, *lines: str, end: str = "\n", newline: str = "\n", bom: bool = False) -> Path:
    """Write a text file. With .gz in its name it is compressed. end: what follows the last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = (newline.join(lines) + end).encode("utf-8-sig" if bom else "utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


# ---- CheXpert ----------------------------------------------------------------------------------
CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(LABELS)
BLANKS = "," * 13  # 14 blank cells


def cells(**values: float) -> str:
    """Write the 14 cells in CheXpert's order."""
    return ",".join(str(values.get(label.replace(" ", "_"), "")) for label in LABELS)


def chexpert_row(path: str, view: str = "Frontal,AP", labels: str = BLANKS) -> str:
    return f"{path},Female,68,{view},{labels}"


# ---- MIMIC-CXR-JPG -----------------------------------------------------------------------------
METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
)
ALPHABETICAL = sorted(LABELS)


def dicom(number: int) -> str:
    return f"{number:08x}-aaaaaaaa-bbbbbbbb-cccccccc-dddddddd"


def mimic_labels(**values: float) -> str:
    return ",".join(str(values.get(label.replace(" ", "_"), "")) for label in ALPHABETICAL)


def mimic(folder: Path, suffix: str = ".csv.gz", version: str = "2.0.0", **more: list[str]) -> Path:
    """Write MIMIC's tables for six images.

    Study 1 has lateral, AP and PA. Study 2 has one without a view, and AP. Study 3 is of the test
    split. more: lines to add, by table.
    """
    images = [(1, 1, "LATERAL"), (2, 1, "AP"), (3, 1, "PA"), (4, 2, ""), (5, 2, "AP"), (6, 3, "PA")]

    def subject(study: int) -> int:
        return 10000001 + (study > 2)

    name = f"mimic-cxr-{version}-"
    write(
        folder / f"{name}metadata{suffix}",
        METADATA,
        *more.get("metadata", ()),
        *(
            f"{dicom(i)},{subject(study)},5000000{study},CHEST,{view},10,10,21800506,213014.531,CHEST,,Erect"
            for i, study, view in images
        ),
    )
    write(
        folder / f"{name}split{suffix}",
        "dicom_id,study_id,subject_id,split",
        *more.get("split", ()),
        *(
            f"{dicom(i)},5000000{study},{subject(study)},{'test' if study > 2 else 'train'}"
            for i, study, view in images
        ),
    )
    for labeler, edema in (("chexpert", -1.0), ("negbio", 1.0)):
        write(
            folder / f"{name}{labeler}{suffix}",
            "subject_id,study_id," + ",".join(ALPHABETICAL),
            *more.get(labeler, ()),
            f"10000001,50000001,{mimic_labels(Pleural_Effusion=1.0, Edema=edema)}",
            f"10000002,50000003,{mimic_labels()}",
        )
    write(
        folder / "mimic-cxr-2.1.0-test-set-labeled.csv",
        "study_id," + ",".join(LABELS).replace("Lung Opacity", "Airspace Opacity"),
        f"50000003,{cells(Lung_Opacity=1.0, Edema=-1.0)}",
    )
    return folder


# ---- NIH ChestX-ray14 ---------------------------------------------------------------------------
def nih(folder: Path, variant: str = "v2020") -> Path:
    """Write NIH's tables for four images of two patients, with one release's header and cells."""
    rows = [
        ("00000013_005.png", "Effusion|Mass|Nodule", 5, 13),
        ("00000013_004.png", "No Finding", 4, 13),
        ("00000014_000.png", "Infiltration", 0, 14),
        ("00000014_001.png", "Pleural_Thickening|Effusion", 1, 14),
    ]
    header = {
        "v2020": "Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]",
        "box": "Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],",
        "kaggle sample": "Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImageWidth,OriginalImageHeight,"
        "OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y",
    }
    header["v2017"] = header["v2020"]
    ids = (
        (lambda n, p: f"{n:03d},{p:08d},058Y")
        if variant in ("v2017", "kaggle sample")
        else (lambda n, p: f"{n},{p},58")
    )
    end = "," if variant == "box" else ""
    name = {"v2020": "Data_Entry_2017_v2020.csv", "kaggle sample": "sample_labels.csv"}.get(
        variant, "Data_Entry_2017.csv"
    )
    write(
        folder / name,
        "Image Index,Finding Labels," + header[variant],
        *(
            f"{image},{findings},{ids(follow_up, patient)},M,PA,2682,2749,0.143,0.143{end}"
            for image, findings, follow_up, patient in rows
        ),
    )
    # as published: no newline at the end
    write(folder / "train_val_list.txt", "00000013_004.png", "00000013_005.png", end="")
    write(folder / "test_list.txt", "00000014_001.png", "00000014_000.png", end="")
    return folder
