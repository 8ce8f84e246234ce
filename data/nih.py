"""Load NIH ChestX-ray14 (Wang et al., 2017).

Source: NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC

    load_nih("nih", "test")                                 # prints what it kept and dropped

Every image is frontal and a study of its own. NIH has other categories than CheXpert: an image's
labels are those among the nine of the paper, or ten with Pleural Effusion, and the others are
unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from data.examples import Example
from data.label_tables import (
    Reading,
    Table,
    find_file,
    raise_problems,
    read_text,
    source_folder,
)
from data.labels import (
    LABELS,
    NIH_NINE,
    NIH_TO_CHEXPERT,
    NO_FINDING,
    NO_LABEL_RULES,
    chexpert_labels_of_nih,
)
from data.layouts import files_by_stem, looked_for
from data.sources import (
    Candidate,
    Report,
    choose,
    collector_paused,
    known,
    view_rank,
)
from data.who import WhoCells

# {part: names of its list}: NIH's own, and those of a resized copy on Kaggle
PARTS: dict[str, tuple[str, ...]] = {
    "train": ("train_val_list.txt", "train_val_list_NIH.txt"),
    "test": ("test_list.txt", "test_list_NIH.txt"),
    "all": (),
}
_LABEL_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")
_STEM = re.compile(r"(\d{8})_\d{3}")
_NAME = re.compile(rf"{_STEM.pattern}\.png")


@collector_paused()
def load_nih(
    folder: str | Path,
    part: str = "train",
    *,
    evaluated: tuple[str, ...] = NIH_NINE,
    no_label: str = "empty",
    drop_missing: bool = False,
    report: Report | None = None,
) -> list[Example]:
    """Load the examples of one part of NIH ChestX-ray14, with image paths relative to `folder`.

    folder: that of the label file, the lists and the images. The images are found in it or up to
    four folders deeper, see layouts.py.
    part: "train" or "test" by the official lists, or "all".
    evaluated: NIH_NINE or NIH_TEN.
    no_label: an image with none of them (4,689 of the official test list under the nine) keeps its
    empty set, is called "no_finding", or is left out ("drop"). NIH names No Finding itself, so a
    finding outside the categories is not the absence of one: hence another default than the other
    hospitals'.
    drop_missing, report: as in `load_chexpert`.

    Raises DataError naming every row and column that is wrong, and for a missing file or column.
    """
    folder = source_folder(folder)
    known("part", part, tuple(PARTS))
    known("no_label", no_label, NO_LABEL_RULES)
    table = Table(find_file(folder, _LABEL_FILES))
    files = [table.path]
    listed = None
    if PARTS[part]:
        files.append(find_file(folder, PARTS[part]))
        listed = set(read_text(files[1]).split())
    filled = (Report() if report is None else report).begin(f"NIH ChestX-ray14 {part}", *files)
    problems: list[str] = []
    paths = files_by_stem(folder, _STEM)
    candidates = _images(table, listed, evaluated, no_label, paths, filled, problems)
    raise_problems(problems)
    if not paths:
        where = ("images*/", "images*/images/", "png/", "the folder itself and four levels below")
        filled.no_images = looked_for("00000001_000.png and the like", folder, where)
    if listed is not None and len(listed) > filled.rows:
        filled.notes.append(
            f"{len(listed) - filled.rows:,} images of {files[1].name} are not in the label file"
        )
    examples = choose(
        candidates,
        "nih",
        folder,
        filled,
        frontals="all",
        no_label=no_label,
        drop_missing=drop_missing,
    )
    if report is None:
        print(filled.text())
    return examples


def _images(
    table: Table,
    listed: set[str] | None,
    evaluated: tuple[str, ...],
    no_label: str,
    paths: Mapping[str, str],
    report: Report,
    problems: list[str],
) -> list[Candidate]:
    readings: dict[str, Reading] = {}
    candidates: list[Candidate] = []
    row_of: dict[str, int] = {}
    who = WhoCells(table)  # NIH has children, and infants of age 0
    columns = [*table.find("Finding Labels", "View Position"), *who.indices]
    for number, (name, patient), (findings, view, *person) in table.rows(
        problems, table.find("Image Index", "Patient ID"), columns
    ):
        if listed is not None and name not in listed:
            continue
        report.rows += 1
        where, named = f"{table.path}, row {number}, column", _NAME.fullmatch(name)
        if named is None:
            problems.append(
                f"{where} 'Image Index': {name!r} is no name of an NIH image, such as"
                " 00000013_005.png"
            )
            continue
        if not patient.isdecimal() or int(patient) != int(named[1]):
            problems.append(f"{where} 'Patient ID': {patient!r} is not the patient of {name}")
            continue
        if row_of.setdefault(name, number) != number:
            problems.append(f"{where} 'Image Index': {name} is also in row {row_of[name]}")
            continue
        if findings not in readings:
            readings[findings] = _read(findings, evaluated, no_label)
        reading = readings[findings]
        if reading.bad:
            unknown = ", ".join(repr(string) for _, string in reading.bad)
            problems.append(
                f"{where} 'Finding Labels': {unknown} is no category of NIH; known:"
                f" {', '.join(NIH_TO_CHEXPERT)}"
            )
            continue
        image_id = name.removesuffix(".png")
        candidates.append(
            Candidate(
                image_id,
                image_id,
                named[1],
                paths.get(image_id, f"images/{name}"),
                view or None,
                view_rank(view, True),
                number,
                reading,
                **who.read(person),
            )
        )
    report.notes += who.notes()
    return candidates


def _read(findings: str, evaluated: tuple[str, ...], no_label: str) -> Reading:
    strings = tuple(findings.split("|"))
    bad = tuple(("Finding Labels", string) for string in strings if string not in NIH_TO_CHEXPERT)
    if bad:
        return Reading(bad=bad)
    labels = chexpert_labels_of_nih(strings, evaluated, no_label)
    stated = "1" if NO_FINDING in strings else "0"
    return Reading(
        labels,
        tuple(label for label in LABELS if label in evaluated),
        strings,
        (NO_FINDING,),
        (stated,),
    )
