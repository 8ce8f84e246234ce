"""Load MIMIC-CXR-JPG 2.0.0 and 2.1.0 (Johnson et al., 2019): images, views, official split.

The data are given out for credentialed access only.

    load_mimic("mimic-cxr-jpg/2.1.0")                       # prints what it kept and dropped

Release 2.1.0 kept the file names mimic-cxr-2.0.0-*.csv.gz and added
mimic-cxr-2.1.0-test-set-labeled.csv, the labels that a radiologist gave to the reports of part of
the test split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data.examples import Example
from data.files import DataError
from data.label_tables import (
    LabelCells,
    Reading,
    Table,
    cell_problems,
    find_file,
    raise_problems,
    source_folder,
)
from data.labels import DEFAULT_POLICY, LabelPolicy
from data.layouts import Layout, find_layout, folders, looked_for, relative
from data.prompts import solution_text
from data.sources import (
    VIEWS,
    Candidate,
    Report,
    choose,
    collector_paused,
    known,
    view_rank,
)

PARTS = ("train", "validate", "test")
LABEL_SOURCES = ("chexpert", "negbio", "radiologist")
_FRONTAL = ("AP", "PA")
_IDS = {
    "subject_id": re.compile(r"\d{8}"),
    "study_id": re.compile(r"\d{8}"),
    "dicom_id": re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}"),
}
_DICOM = _IDS["dicom_id"].pattern
# (how an image's path goes on from its root, a glob for such files, their stem): the release's own,
# without the groups of patients, by studies, and all images in one folder
_SHAPES = (
    ("p{group}/p{subject}/s{study}/{dicom}", "p[0-9][0-9]/p*/s*/*", _DICOM),
    ("p{subject}/s{study}/{dicom}", "p*/s*/*", _DICOM),
    ("s{study}/{dicom}", "s*/*", _DICOM),
    ("{dicom}", "*", _DICOM),
)


@collector_paused()
def load_mimic(
    folder: str | Path,
    part: str = "train",
    *,
    policy: LabelPolicy = DEFAULT_POLICY,
    labels: str = "chexpert",
    views: str = "frontal",
    frontals: str = "pa_first",
    drop_missing: bool = False,
    report: Report | None = None,
) -> list[Example]:
    """Load the examples of one part of the official split, with image paths relative to `folder`.

    folder: the release's folder, or the one that holds it. The images are those of the release or
    of a copy of it: in files/p10/ and so on, all in one folder, resized, or as PNG.
    part: "train", "validate" or "test".
    labels: from the automatic labeler "chexpert" or "negbio", or "radiologist" for the reports of
    the test part that one read. They belong to studies: every image of a study has them.
    views: "frontal" is ViewPosition AP or PA, or "all".
    policy, frontals, drop_missing, report: as in `load_chexpert`.

    Raises DataError naming every row and column that is wrong, and for a missing file or column.
    """
    folder = source_folder(folder)
    known("part", part, PARTS)
    known("labels", labels, LABEL_SOURCES)
    known("views", views, VIEWS)
    names = {
        name: [f"mimic-cxr-{version}-{name}.csv" for version in ("2.0.0", "2.1.0")]
        for name in ("metadata", "split", "chexpert", "negbio")
    }
    names["radiologist"] = ["mimic-cxr-2.1.0-test-set-labeled.csv"]
    files, problems = {}, []
    for name in ("metadata", "split", labels):
        try:
            files[name] = find_file(folder, names[name])
        except DataError as error:
            problems += error.problems
    raise_problems(problems)
    filled = (Report() if report is None else report).begin(
        f"MIMIC-CXR-JPG {part}", *files.values()
    )
    studies = _label_table(Table(files[labels]), policy, problems)
    in_part = _split(Table(files["split"]), part, problems)
    home = files["metadata"].parent
    layout = find_layout(folder, _roots(folder, home), _SHAPES)
    if layout is None:
        where = ["files/", "images/", "the folders of the label files", "each with p10/ or flat"]
        filled.no_images = looked_for("images by dicom_id (.jpg, .jpeg, .png)", folder, where)
        layout = Layout(relative(home / "files", folder), _SHAPES[0][0], ".jpg")
    candidates = _images(
        Table(files["metadata"]), in_part, studies, layout, views, filled, problems
    )
    raise_problems(problems)
    examples = choose(
        candidates,
        "mimic",
        folder,
        filled,
        frontals=frontals,
        no_label=policy.no_label,
        drop_missing=drop_missing,
    )
    if report is None:
        print(filled.text())
    return examples


def labeler_answers(
    folder: str | Path,
    examples: Sequence[Example],
    labeler: str,
    policy: LabelPolicy = DEFAULT_POLICY,
) -> list[dict[str, str]]:
    """Take what an automatic labeler says of the studies of examples, as a model's answers.

    Scored against the radiologist's labels of the same reports, they bound what a model that
    learnt from the labeler can reach.

    folder: as in `load_mimic`. labeler: "chexpert" or "negbio". policy: what its cells become.

    Returns rows {"id", "completion", "answer_format"} for `eval.evaluate --predictions`. A study
    that the labeler does not have gets the empty completion, a failed answer. Raises DataError
    naming every row and column that is wrong, and for a missing file or column.
    """
    known("labeler", labeler, LABEL_SOURCES[:2])
    names = [f"mimic-cxr-{version}-{labeler}.csv" for version in ("2.0.0", "2.1.0")]
    problems: list[str] = []
    studies = _label_table(Table(find_file(source_folder(folder), names)), policy, problems)
    raise_problems(problems)
    rows = []
    for example in examples:
        found = studies.get(str(example.extra["study_id"]).removeprefix("s"))
        completion = "" if found is None else solution_text(found[1].labels)
        rows.append({"id": example.id, "completion": completion, "answer_format": "solution"})
    return rows


def _label_table(
    table: Table, policy: LabelPolicy, problems: list[str]
) -> dict[str, tuple[str | None, Reading]]:
    """Read a label file -> {study_id: (subject_id, its labels)}.

    The radiologist's file names no subject.
    """
    cells = LabelCells(table, policy)
    with_subject = table.has("subject_id")
    ids = ["study_id", "subject_id" if with_subject else "study_id"]
    studies: dict[str, tuple[str | None, Reading]] = {}
    for number, (study, subject), labels in table.rows(problems, table.find(*ids), cells.indices):
        reading = cells.read(labels)
        found = [
            *_id_problems(table, number, dict(zip(ids, (study, subject), strict=True))),
            *cell_problems(table, number, reading),
        ]
        if not found and study in studies:
            found = [f"{table.path}, row {number}, column 'study_id': {study} is there twice"]
        problems += found
        if not found:
            studies[study] = (subject if with_subject else None, reading)
    return studies


def _split(table: Table, part: str, problems: list[str]) -> set[str]:
    """Read the split file -> the images (dicom_id) of the part."""
    chosen: set[str] = set()
    for number, (dicom, split), _ in table.rows(problems, *[table.find("dicom_id", "split")] * 2):
        if split == part:
            chosen.add(dicom)
        elif split not in PARTS:
            problems.append(
                f"{table.path}, row {number}, column 'split': {split!r} is none of"
                f" {', '.join(PARTS)}"
            )
    return chosen


def _images(
    table: Table,
    in_part: set[str],
    studies: dict[str, tuple[str | None, Reading]],
    layout: Layout,
    views: str,
    report: Report,
    problems: list[str],
) -> list[Candidate]:
    candidates: list[Candidate] = []
    row_of: dict[str, int] = {}
    columns = table.find("dicom_id", "subject_id"), table.find("study_id", "ViewPosition")
    for number, (dicom, subject), (study, view) in table.rows(problems, *columns):
        if dicom not in in_part:
            continue
        report.rows += 1
        found = _id_problems(
            table, number, {"dicom_id": dicom, "subject_id": subject, "study_id": study}
        )
        owner, reading = studies.get(study, (None, None))
        if owner is not None and owner != subject:
            found.append(
                f"{table.path}, row {number}, column 'subject_id': study {study} belongs to {owner}"
                f" in the label file, not {subject}"
            )
        if not found and row_of.setdefault(dicom, number) != number:
            found = [
                f"{table.path}, row {number}, column 'dicom_id': {dicom} is also in row"
                f" {row_of[dicom]}"
            ]
        problems += found
        if found:
            continue
        frontal = view in _FRONTAL
        if views == "frontal" and not frontal:
            report.drop(f"view {view or 'not given'}")
        elif reading is None:
            report.drop("the study has no row in the label file")
        else:
            candidates.append(
                Candidate(
                    f"s{study}",
                    dicom,
                    subject,
                    layout.of(group=subject[:2], subject=subject, study=study, dicom=dicom),
                    view or None,
                    view_rank(view, frontal),
                    number,
                    reading,
                )
            )
    return candidates


def _roots(folder: Path, home: Path) -> list[Path]:
    """List the folders that images may lie below, the release's own first.

    home: folder of the label files.
    """
    own = [home / "files", home, folder / "files", folder / "images"]
    return [path for path in dict.fromkeys([*own, *folders(folder)]) if path.is_dir()]


def _id_problems(table: Table, number: int, ids: dict[str, str]) -> list[str]:
    """Hold ids to their form, since they become parts of paths."""
    return [
        f"{table.path}, row {number}, column {name!r}: {value!r} is no {name}"
        for name, value in ids.items()
        if not _IDS[name].fullmatch(value)
    ]
