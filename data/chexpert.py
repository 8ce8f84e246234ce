"""Load CheXpert (Irvin et al., 2019): small and full release, batch folders, test labels.

    load_chexpert("CheXpert-v1.0-small")                    # prints what it kept and dropped

Label files of the parts:

    train   train.csv
    valid   valid.csv, or CheXlocalize's val_labels.csv
    test    groundtruth.csv (one row a study), or test_labels.csv (one row an image, without the
            columns of the view)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data.examples import Example
from data.label_tables import (
    LabelCells,
    Reading,
    Table,
    cell_problems,
    find_file,
    places,
    raise_problems,
    source_folder,
)
from data.labels import DEFAULT_POLICY, LabelPolicy
from data.layouts import SUFFIXES, folders, looked_for, relative
from data.sources import (
    VIEWS,
    Candidate,
    Report,
    choose,
    collector_paused,
    known,
    view_rank,
)
from data.who import WhoCells

# {part: names of its folder of images}
PARTS = {"train": ("train",), "valid": ("valid", "val"), "test": ("test",)}
_LABEL_FILES = {
    "train": ("train.csv",),
    "valid": ("valid.csv", "val_labels.csv"),
    "test": ("groundtruth.csv", "test_labels.csv"),
}
YOUNGEST = 1  # CheXpert's patients are adults: age 0 (three rows of train.csv) says nothing
_STUDY = re.compile(r"(?:.*/)?(patient\d+)/(study\d+)")
_IS_FRONTAL = {"Frontal": True, "_frontal": True, "Lateral": False, "_lateral": False}
_IMAGE = re.compile(_STUDY.pattern + r"/(view(\d+)(_frontal|_lateral)?\.(?:jpg|jpeg|png))")


@collector_paused()
def load_chexpert(
    folder: str | Path,
    part: str = "train",
    *,
    policy: LabelPolicy = DEFAULT_POLICY,
    views: str = "frontal",
    frontals: str = "pa_first",
    label_file: str | None = None,
    drop_missing: bool = False,
    report: Report | None = None,
) -> list[Example]:
    """Load the examples of one part of CheXpert, with image paths relative to `folder`.

    folder: the release's folder (with train.csv in it), or the one that holds it or the downloaded
    batch folders.
    part: "train", "valid" or "test".
    policy: what the cells of the label file become.
    views: "frontal" by the Frontal/Lateral column, else by the file's name, or "all".
    frontals: which of several images of a study, see `sources.choose`. At "all" each image has its
    own labels, so the image-level test_labels.csv goes before groundtruth.csv.
    label_file: another CSV of the release, such as train_visualCheXbert.csv.
    drop_missing: leave out images that are not there.
    report: filled with what was kept and dropped. Without one it is printed.

    The images are found as they were unpacked or copied, see `_roots`, in PNG too.

    Raises DataError naming every row and column that is wrong, and for a missing file or column.
    """
    folder = source_folder(folder)
    known("part", part, tuple(PARTS))
    known("views", views, VIEWS)
    names = (
        (label_file,)
        if label_file
        else _LABEL_FILES[part][:: -1 if part == "test" and frontals == "all" else 1]
    )
    table = Table(find_file(folder, names))
    filled = (Report() if report is None else report).begin(f"CheXpert {part}", table.path)
    cells, who = LabelCells(table, policy), WhoCells(table, youngest=YOUNGEST)
    roots = _roots(folder, table.path.parent, part)
    locate, suffix = _locator(folder, roots), _suffix(roots)
    problems: list[str] = []
    if _is_study_level(table):
        candidates = _studies(table, cells, locate, folder, views, drop_missing, filled, problems)
    else:
        candidates = _images(table, cells, who, locate, views, filled, problems)
        filled.notes += who.notes()
    raise_problems(problems)
    if suffix is None:
        where = [relative(root, folder) for root in roots] + ["batch N (train N)/", "below them"]
        filled.no_images = looked_for("patientN/studyN/viewN_frontal.jpg", folder, where)
    elif not _is_study_level(table):
        candidates = [_with_suffix(candidate, suffix) for candidate in candidates]
    if "No Finding" not in cells.labels:
        filled.notes.append("the label file has no column 'No Finding'")
    examples = choose(
        candidates,
        "chexpert",
        folder,
        filled,
        frontals=frontals,
        no_label=policy.no_label,
        drop_missing=drop_missing,
    )
    if report is None:
        print(filled.text())
    return examples


def _images(
    table: Table,
    cells: LabelCells,
    who: WhoCells,
    locate: Callable[[str], str],
    views: str,
    report: Report,
    problems: list[str],
) -> list[Candidate]:
    """Collect the candidates of a table with one row an image."""
    with_view = table.has("Frontal/Lateral")
    view_columns = (
        [*table.find("Frontal/Lateral"), *table.find("AP/PA")]
        if with_view
        else table.find("Path") * 2
    )
    candidates: list[Candidate] = []
    row_of: dict[str, int] = {}
    columns = [*table.find("Path"), *view_columns, *who.indices]
    for number, (path, side, projection, *person), labels in table.rows(
        problems, columns, cells.indices
    ):
        report.rows += 1
        image = _IMAGE.fullmatch(path)
        if image is None:
            problems.append(
                f"{table.path}, row {number}, column 'Path': {path!r} does not end in"
                " patientN/studyN/viewN_frontal.jpg"
            )
            continue
        if with_view:
            frontal = _IS_FRONTAL.get(side)
        else:
            frontal, projection = _IS_FRONTAL.get(image[5]), ""
        if frontal is None:
            where = (
                f"column 'Frontal/Lateral': {side!r} is"
                if with_view
                else f"column 'Path': {path!r} names"
            )
            problems.append(f"{table.path}, row {number}, {where} neither Frontal nor Lateral")
            continue
        reading = cells.read(labels)
        if reading.bad:
            problems += cell_problems(table, number, reading)
            continue
        if row_of.setdefault(path, number) != number:
            problems.append(
                f"{table.path}, row {number}, column 'Path': {path!r} is also in row {row_of[path]}"
            )
            continue
        if views == "frontal" and not frontal:
            report.drop("lateral view")
            continue
        candidate = _candidate(image, locate(image[1]), projection, frontal, reading)
        candidates.append(candidate._replace(**who.read(person)))
    return candidates


def _studies(
    table: Table,
    cells: LabelCells,
    locate: Callable[[str], str],
    folder: Path,
    views: str,
    drop_missing: bool,
    report: Report,
    problems: list[str],
) -> list[Candidate]:
    """Collect the candidates of a table with one row a study, from the study's folder.

    Such a table names no images.
    """
    candidates: list[Candidate] = []
    row_of: dict[str, int] = {}
    for number, (path, _), labels in table.rows(
        problems, table.find("Study", "Study"), cells.indices
    ):
        study = _STUDY.fullmatch(path)
        if study is None:
            problems.append(
                f"{table.path}, row {number}, column 'Study': {path!r} does not end in"
                " patientN/studyN"
            )
            continue
        reading = cells.read(labels)
        if reading.bad:
            problems += cell_problems(table, number, reading)
            continue
        if row_of.setdefault(path, number) != number:
            problems.append(
                f"{table.path}, row {number}, column 'Study': {path!r} is also in row"
                f" {row_of[path]}"
            )
            continue
        root = locate(study[1])
        inside = folder / root / study[1] / study[2]
        names = sorted(os.listdir(inside)) if inside.is_dir() else []
        images = [
            image
            for name in names
            if (image := _IMAGE.fullmatch(f"{study[1]}/{study[2]}/{name}")) and image[5]
        ]
        report.rows += len(images)
        if not images and drop_missing:
            report.drop("image files of a study are missing (studies)")
        elif not images:
            problems.append(
                f"{table.path}, row {number}, column 'Study': {inside} holds no viewN_frontal.jpg"
            )
        for image in images:
            if views == "frontal" and image[5] == "_lateral":
                report.drop("lateral view")
            else:
                candidates.append(_candidate(image, root, "", image[5] == "_frontal", reading))
    return candidates


def _candidate(
    image: re.Match, root: str, projection: str, frontal: bool, reading: Reading
) -> Candidate:
    """Describe one image. image: a match of _IMAGE."""
    patient, study, name, order = image.group(1, 2, 3, 4)
    return Candidate(
        f"{patient}/{study}",
        f"{patient}-{study}-{name.partition('.')[0]}",
        patient,
        f"{root}/{patient}/{study}/{name}",
        projection or ("frontal" if frontal else "lateral"),
        view_rank(projection, frontal),
        int(order),
        reading,
    )


def _is_study_level(table: Table) -> bool:
    """Tell a table with one row a study, which names no images."""
    return table.has("Study") and not table.has("Path")


def _with_suffix(candidate: Candidate, suffix: str) -> Candidate:
    """Give the image the suffix that the files have."""
    return candidate._replace(image=f"{candidate.image.rpartition('.')[0]}{suffix}")


def _roots(folder: Path, base: Path, part: str) -> list[Path]:
    """Find the folders whose folders are a part's patients.

    Paths of the CSV name the release's own folder. Downloads have other ones: `val` for `valid`,
    and `batch 2 (train 1)` and so on with the training patients directly in them.

    base: folder of the label file.
    """
    around = list(dict.fromkeys([base, *places(base), *places(folder)]))
    roots = [place / name for place in around for name in PARTS[part] if (place / name).is_dir()]
    roots += [
        place for place in around if part == "train" and re.search(r"batch \d+ \(train", place.name)
    ]
    if not roots:  # somewhere else: patients of another part have other numbers
        roots = [place for place in folders(folder) if any(place.glob("patient*/study*"))]
    return roots or [base / PARTS[part][0]]


def _locator(folder: Path, roots: Sequence[Path]) -> Callable[[str], str]:
    """Make a function from a patient to its root, relative to `folder`.

    A patient that is nowhere gets the first root.
    """
    names = [relative(root, folder) for root in roots]
    if len(names) == 1:
        return lambda patient: names[0]
    home: dict[str, str] = {}
    for root, name in zip(roots, names, strict=True):
        for entry in os.scandir(root):
            home.setdefault(entry.name, name)
    return lambda patient: home.get(patient, names[0])


def _suffix(roots: Sequence[Path]) -> str | None:
    """Find the suffix of the image files, None where there are none: copies have PNG for JPEG."""
    files = (file for root in roots for file in root.glob("patient*/study*/view*.*"))
    return next((file.suffix for file in files if file.suffix.lower() in SUFFIXES), None)
