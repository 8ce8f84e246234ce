"""Load NIH ChestX-ray14 (Wang et al., 2017).

Source: NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC

    load_nih("nih", "test")                                 # prints what it kept and dropped

Every image is frontal and a study of its own. NIH has other categories than CheXpert: an image's
labels are those among the nine of the paper, or ten with Pleural Effusion, and the others are
unknown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from data.examples import Example
from data.labels import (
    LABELS,
    NIH_NINE,
    NIH_TO_CHEXPERT,
    NO_FINDING,
    NO_LABEL_RULES,
    chexpert_labels_of_nih,
)
from data.sources import (
    Candidate,
    Reading,
    Report,
    Table,
    WhoCells,
    choose,
    collector_paused,
    find_file,
    known,
    places,
    raise_problems,
    source_folder,
    view_rank,
)

PARTS = {"train": "train_val_list.txt", "test": "test_list.txt", "all": None}
_LABEL_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")
_NAME = re.compile(r"(\d{8})_\d{3}\.png")


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

    folder: that of the label file, the lists and the images.
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
    if (list_name := PARTS[part]) is not None:
        files.append(find_file(folder, [list_name]))
        listed = set(files[1].read_text(encoding="utf-8-sig").split())
    filled = (Report() if report is None else report).begin(f"NIH ChestX-ray14 {part}", *files)
    problems: list[str] = []
    candidates = _images(table, listed, evaluated, no_label, _locator(folder), filled, problems)
    raise_problems(problems)
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
    locate: Callable[[str], str],
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
                f"{locate(name)}/{name}",
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


def _locator(folder: Path) -> Callable[[str], str]:
    """Find folders of images -> a function from an image's name to its folder in `folder`.

    The folder is images/, or images_001/images/ and so on as some downloads unpack.
    """
    inner = sorted(
        path for place in places(folder) for path in place.glob("images*") if path.is_dir()
    )
    roots = list(
        dict.fromkeys(deeper if (deeper := path / "images").is_dir() else path for path in inner)
    )
    names = [root.relative_to(folder).as_posix() for root in roots] or ["images"]
    if len(names) == 1:
        return lambda image: names[0]
    home: dict[str, str] = {}
    for root, name in zip(roots, names, strict=True):
        for entry in os.scandir(root):
            home.setdefault(entry.name, name)
    return lambda image: home.get(image, names[0])
