"""Find one picture that two rows show: under two ids, or in two sets.

Splits are by patient, so a picture that is there under two patients is in the training and in the
test set unseen. With other labels it teaches two truths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data.examples import Example
from data.files import sha256_of


def same_pictures(rows: Iterable[tuple[str, Example, str]]) -> tuple[list[str], list[str]]:
    """Find pictures that several rows show, in one set and across sets -> (problems, notes).

    rows: (set, example, digest of its picture).

    Two ids are a problem, and so are two rows that disagree on the patient or on the labels. The
    same id in two sets, with the same labels, is one example that both hold: counted in a note.
    """
    by_picture: dict[str, list[tuple[str, Example]]] = {}
    for name, example, digest in rows:
        by_picture.setdefault(digest, []).append((name, example))
    problems, notes = [], []
    shared: Counter[tuple[str, str]] = Counter()
    such_as: dict[tuple[str, str], str] = {}
    for (name, first), *others in by_picture.values():
        for other_name, other in others:
            what = (
                f"{name}, example {first.id!r} shows the same picture as {other_name}, example"
                f" {other.id!r}"
            )
            if differences := list(_differences(first, other)):
                problems.append(f"{what}, {' and '.join(differences)}")
            elif first.id != other.id:
                problems.append(f"{what}, of the same patient with the same labels")
            if name != other_name:
                shared[name, other_name] += 1
                such_as.setdefault((name, other_name), other.id)
    notes += [
        f"pictures of {other} that are in {name} too: {count}, such as {such_as[name, other]!r};"
        " training, validation and test sets must share none"
        for (name, other), count in shared.items()
    ]
    return problems, notes


def _differences(first: Example, other: Example) -> Iterator[str]:
    """Say in which ways two rows of one picture disagree."""
    if first.patient_id != other.patient_id:
        yield f"of another patient ({first.patient_id!r}, {other.patient_id!r})"
    rated = {*first.evaluated_labels} & {*other.evaluated_labels}
    if {*first.labels} & rated != {*other.labels} & rated:
        listed = [", ".join(example.labels) or "none" for example in (first, other)]
        yield f"with other labels ({listed[0]}; {listed[1]})"


def equal_files(sets: Mapping[str, Sequence[Example]]) -> Iterator[tuple[str, Example, str]]:
    """Find the image files of sets that have the same bytes -> (set, example, digest) of each.

    Only files of equal size are read. An empty file and one that cannot be read are passed over.
    """
    by_size: dict[int, list[tuple[str, Example]]] = {}
    for name, examples in sets.items():
        for example in examples:
            try:
                size = (example.image_root / example.image).stat().st_size
            except OSError:
                continue
            by_size.setdefault(size, []).append((name, example))
    for size, found in by_size.items():
        if size and len(found) > 1:
            for name, example in found:
                try:
                    yield name, example, sha256_of(example.image_root / example.image)
                except OSError:
                    continue
