"""Share what the loaders of the three hospitals need: rules, the choice of images, the report.

A loader reads every row before it complains, so that one message names all bad rows (file, row,
column): label_tables.py.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.examples import Example
from data.files import DataError, sha256_of
from data.label_tables import VALUES, Reading
from data.label_tables import Table as Table  # scripts of one's own find it here too
from data.labels import (
    CHEXPERT,
    LABELS,
    NO_FINDING,
    SUPPORT_DEVICES,
    UNCERTAIN_RULES,
    LabelSet,
)

VIEWS = ("frontal", "all")
FRONTALS = ("pa_first", "first", "all")
_RANKS = {"PA": 0, "AP": 1}  # at pa_first, then other frontal views, then the rest
OTHER_FRONTAL, NOT_FRONTAL = 2, 3


@contextmanager
def collector_paused() -> Iterator[None]:
    """Switch Python's cycle collector off while a loader reads its tables.

    It would search hundreds of thousands of new rows again and again, for 40 % of the time, and
    they have no cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def uncertain_rules(
    values: Sequence[str], problems: list[str], label_set: LabelSet = CHEXPERT
) -> tuple[str, dict[str, str]]:
    """Read the values of --uncertain: ["zeros", "Edema=ones"] -> ("zeros", {"Edema": "ones"}).

    problems: gets a line for each value that is no rule. label_set: the labels that there are.
    """
    plain = [value for value in values if "=" not in value] or ["zeros"]
    by_label = {}
    for name, _, rule in (value.partition("=") for value in values if "=" in value):
        label = label_set.find(name)
        if label is None:
            problems.append(f"--uncertain {name}={rule}: {name!r} is no label{label_set.listing}")
        else:
            by_label[label] = rule
    wrong = [rule for rule in (*plain, *by_label.values()) if rule not in UNCERTAIN_RULES]
    problems += [
        f"--uncertain {rule}: no such rule; known: {', '.join(UNCERTAIN_RULES)}" for rule in wrong
    ]
    if len(plain) > 1:
        problems.append(
            f"--uncertain {' '.join(plain)}: one rule for all labels, and exceptions as LABEL=RULE"
        )
    return plain[0], by_label


def known(name: str, value: str, choices: Sequence[str]) -> str:
    """Check the value of an argument, and return it.

    Raises DataError where it is none of the choices.
    """
    if value not in choices:
        raise DataError([f"{name} {value!r} is not known; it may be {', '.join(choices)}"])
    return value


# ---- images --------------------------------------------------------------------------------------
class Candidate(NamedTuple):
    """Hold one image of a label table.

    view: as the source names it, None where it does not.
    rank: of its view, see `view_rank`.
    order: among images of one rank.
    sex, age: as in Example.
    """

    study: str
    id: str
    patient: str
    image: str
    view: str | None
    rank: int
    order: int
    reading: Reading
    sex: str | None = None
    age: int | None = None


def view_rank(view: str | None, frontal: bool) -> int:
    """Rank a view for pa_first, the smallest first: PA, AP, another frontal view, the rest."""
    return _RANKS.get(view or "", OTHER_FRONTAL) if frontal else NOT_FRONTAL


def choose(
    candidates: Sequence[Candidate],
    dataset: str,
    root: Path,
    report: Report,
    *,
    frontals: str,
    no_label: str,
    drop_missing: bool,
) -> list[Example]:
    """Choose examples among candidates, in their order, and report what is left out.

    dataset: name of the source, which begins the ids.
    root: folder that the candidates' images are relative to.
    frontals: of several images of a study, pa_first (PA before AP, then the first), first, or all.
    no_label: at "drop", leave out images without a true label.
    drop_missing: leave out images whose file is not there, before another one of the study is
    chosen.
    """
    known("frontals", frontals, FRONTALS)
    if drop_missing:
        present = [candidate for candidate in candidates if (root / candidate.image).is_file()]
        report.drop("image file is missing", len(candidates) - len(present))
        candidates = present
    if frontals != "all":
        best: dict[str, Candidate] = {}
        for candidate in candidates:
            chosen = best.setdefault(candidate.study, candidate)
            if _preference(candidate, frontals) < _preference(chosen, frontals):
                best[candidate.study] = candidate
        report.drop("another image of the study was chosen", len(candidates) - len(best))
        candidates = list(best.values())
    if no_label == "drop":
        labelled = [candidate for candidate in candidates if candidate.reading.labels]
        report.drop("no label is true", len(candidates) - len(labelled))
        candidates = labelled
    report.keep(candidates)
    return [
        Example(
            f"{dataset}-{candidate.id}",
            f"{dataset}-{candidate.patient}",
            candidate.image,
            candidate.reading.labels,
            dataset,
            root,
            candidate.reading.evaluated,
            candidate.reading.source_labels,
            extra={"study_id": candidate.study},
            sex=candidate.sex,
            age=candidate.age,
            view=candidate.view,
        )
        for candidate in candidates
    ]


def _preference(candidate: Candidate, frontals: str) -> tuple[int, int]:
    return (
        candidate.rank if frontals == "pa_first" else candidate.rank == NOT_FRONTAL,
        candidate.order,
    )


# ---- report --------------------------------------------------------------------------------------
@dataclass
class Report:
    """Count what a loader kept and dropped: images, where a reason does not say otherwise."""

    source: str = ""  # such as "CheXpert train"
    files: dict[str, str] = field(default_factory=dict)  # {label file: SHA-256}
    rows: int = 0  # images that the label file lists
    dropped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    no_images: str = ""  # where no image was found: what was looked for and where
    _kept: Counter[Reading] = field(default_factory=Counter)
    _studies: set[str] = field(default_factory=set)
    _patients: set[str] = field(default_factory=set)

    def begin(self, source: str, *files: Path) -> Report:
        """Note the source and hash its label files."""
        self.source = source
        self.files |= {str(file): sha256_of(file) for file in files}
        return self

    def drop(self, reason: str, count: int = 1) -> None:
        """Count images that are left out for a reason."""
        if count:
            self.dropped[reason] += count

    def keep(self, candidates: Sequence[Candidate]) -> None:
        """Count the images that were chosen."""
        self._kept.update(candidate.reading for candidate in candidates)
        self._studies.update(candidate.study for candidate in candidates)
        self._patients.update(candidate.patient for candidate in candidates)

    def record(self) -> dict:
        """Collect everything in values that JSON keeps."""
        names = ("true", "evaluated", "uncertain", "blank")
        by_label = {name: dict.fromkeys(LABELS, 0) for name in names}
        counts = dict.fromkeys(("without_label", "called_no_finding", "contradictory"), 0)
        for reading, count in self._kept.items():
            values = {
                label: VALUES[cell]
                for label, cell in zip(reading.columns, reading.cells, strict=True)
            }
            uncertain = [label for label, value in values.items() if value == -1]
            blank = [label for label, value in values.items() if value is None]
            kinds = (reading.labels, reading.evaluated, uncertain, blank)
            for name, labels in zip(names, kinds, strict=True):
                for label in labels:
                    by_label[name][label] += count
            normal = NO_FINDING in reading.labels
            counts["without_label"] += count * (not reading.labels)
            counts["called_no_finding"] += count * (normal and values.get(NO_FINDING) != 1)
            counts["contradictory"] += count * (
                normal and bool(set(reading.labels) - {NO_FINDING, SUPPORT_DEVICES})
            )
        return {
            "source": self.source,
            "label_files": self.files,
            "images_listed": self.rows,
            "images_kept": self._kept.total(),
            "studies_kept": len(self._studies),
            "patients_kept": len(self._patients),
            "dropped": dict(self.dropped.most_common()),
            "notes": self.notes,
            "by_label": by_label,
            **counts,
        }

    def text(self) -> str:
        """Write the record for people."""
        content = self.record()
        lines = [
            f"{self.source}: kept {content['images_kept']:,} of {self.rows:,} images "
            f"({content['studies_kept']:,} studies, {content['patients_kept']:,} patients)"
        ]
        lines += [
            f"  label file {file} (SHA-256 {digest[:12]})" for file, digest in self.files.items()
        ]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in content["dropped"].items()]
        lines += [f"  note: {note}" for note in (*self.notes, self.no_images) if note]
        lines.append(
            f"  without any label {content['without_label']:,}; called No Finding by rule"
            f" {content['called_no_finding']:,}; No Finding beside a finding"
            f" {content['contradictory']:,}"
        )
        lines.append(
            f"  {'of the images kept':<28}{'true':>9}{'evaluated':>11}{'uncertain':>11}{'blank':>9}"
        )
        columns = content["by_label"]
        lines += [
            f"  {label:<28}{columns['true'][label]:>9,}{columns['evaluated'][label]:>11,}"
            f"{columns['uncertain'][label]:>11,}{columns['blank'][label]:>9,}"
            for label in LABELS
            if columns["evaluated"][label]  # the others are not of this hospital
        ]
        return "\n".join(lines)
