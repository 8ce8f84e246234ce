"""Put scores into context: what readers reach, and what a base model may have seen before."""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine.bases import base_facts
from eval import published
from eval.contrasts import Contrast
from eval.folders import Entry
from eval.page import Cell, Table
from eval.tables import number

_TEST_ID = re.compile(r"chexpert-patient(\d+)-study1")


def is_chexpert_test(contrast: Contrast) -> bool:
    """Tell whether all images are of CheXpert's 500 test studies, as data.select names them."""
    found = [_TEST_ID.match(id) for id in contrast.first.ids]
    first, last = published.CHEXPERT_TEST_PATIENTS
    return all(match and first <= int(match[1]) <= last for match in found)


def readers_table(contrasts: Sequence[Contrast]) -> Table:
    """List what three radiologists and the report labeler reach on CheXpert's test labels.

    Beside them stand the answer that names everything, the paper's models, and ours where they
    answered these studies.
    """
    rows: list[list[Cell | str]] = [
        [name, "published readings", number(micro), number(macro)]
        for name, (micro, macro) in published.CHEXPERT_READERS.items()
    ]
    rows += [
        [f"paper: {model}", published.SOURCE, "-", number(macro)]
        for model, macro in published.MACRO_5.items()
    ]
    rows += [
        [model, contrast.data_set, *(number(float(values[s][0])) for s in ("micro_f1", "macro_f1"))]
        for contrast in contrasts
        if is_chexpert_test(contrast)
        for model, values in contrast.values.items()
    ]
    return Table(
        "Readers and models on CheXpert's test labels",
        ["Who", "From", "Micro F1", "Macro F1"],
        rows,
        [
            f"Readers: {published.READERS_SOURCE}. Each is scored like a model, against the"
            f" consensus of {published.CHEXPERT_TEST_STUDIES} studies. A model far above them may"
            " have seen the labels. No intervals are published.",
            "MIMIC's counterpart can be computed from your own files: data.select"
            " --mimic_test_labels radiologist writes what the automatic labeler says of the same"
            " reports (see data/README.md).",
        ],
        numbers_from=2,
    )


def seen_table(entries: Sequence[Entry], contrasts: Sequence[Contrast]) -> Table:
    """List what each model's base declares of its training data, and what of ours that touches."""
    rows: list[list[Cell | str]] = []
    for entry in entries:
        facts = base_facts(entry.base) if entry.base else None
        cells: list[str] = []
        for contrast in contrasts:
            names = contrast.first.datasets
            said = [facts.may_have_seen(name) if facts else "not declared" for name in names]
            cells.append("; ".join(dict.fromkeys(said)))
        rows.append(
            [entry.name, entry.base or "-", facts.declared if facts else "not known here", *cells]
        )
    return Table(
        "What the base models may have seen",
        [
            "Model",
            "Base",
            "Declared training data",
            *(f"May have seen {contrast.data_set}" for contrast in contrasts),
        ],
        rows,
        [
            "From the makers' own statements, never checked against the images. Not among the"
            " declared: no proof that it was left out. What a run of ours trained on is in its"
            " config.json."
        ],
        numbers_from=99,
    )
