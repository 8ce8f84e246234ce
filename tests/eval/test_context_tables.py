"""Protect the tables that put scores into context: readers, and what a base may have seen.

Run: pytest tests/eval/test_context_tables.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from data.labels import LABELS
from data.predictions import Prediction, write_predictions
from eval.context_tables import is_chexpert_test, readers_table, seen_table
from eval.contrasts import Contrast, contrast_models
from eval.folders import Entry, load_answers
from eval.published import CHEXPERT_READERS, CHEXPERT_TEST_STUDIES, CHEXPERT_TEST_SUPPORT
from tests.helpers.reports import answer, parsed, row, texts


def contrast(tmp_path: Path, rows: list[Prediction]) -> Contrast:
    answers = load_answers(write_predictions(tmp_path / "predictions.jsonl", rows))
    return contrast_models("test", {"GRPO": answers}, (), resamples=20, permutations=20)


def chexpert_rows(*patients: int, dataset: str = "chexpert") -> list[Prediction]:
    return parsed(
        [
            row(
                answer("Edema"),
                ("Edema",),
                id=f"chexpert-patient{n}-study1-view1_frontal",
                patient=f"p{n}",
                evaluated=LABELS,
            )
            | {"dataset": dataset}
            for n in patients
        ]
    )


@pytest.mark.parametrize(
    "patients, is_test",
    [((64741, 65240), True), ((64740, 64741), False), ((65240, 65241), False)],
)
def test_the_test_studies_are_known_by_their_patients(tmp_path, patients, is_test):
    made = contrast(tmp_path, chexpert_rows(*patients))
    assert is_chexpert_test(made) == is_test
    ours = [texts(line) for line in readers_table([made]).rows if line[0] == "GRPO"]
    # Edema is said and true of all: micro 1, macro 1 of 14 labels
    assert ours == ([["GRPO", "test", "1.000", "0.071"]] if is_test else [])


def test_readers_are_rows_beside_the_papers_models():
    rows = {line[0]: texts(line)[1:] for line in readers_table([]).rows}
    assert rows["radiologist bc6"] == ["published readings", "0.749", "0.618"]
    assert rows["CheXpert's report labeler"] == ["published readings", "-", "0.323"]
    assert rows["paper: NV-Reason"][-1] == "0.755"
    # naming all 14 labels of 500 studies: F1 of a label is 2 p / (500 + p)
    macro = sum(2 * p / (CHEXPERT_TEST_STUDIES + p) for p in CHEXPERT_TEST_SUPPORT.values()) / 14
    positives = sum(CHEXPERT_TEST_SUPPORT.values())
    micro = 2 * positives / (CHEXPERT_TEST_STUDIES * 14 + positives)
    assert CHEXPERT_READERS["all 14 labels of every study"] == pytest.approx(
        (micro, macro), abs=5e-4
    )


def test_what_each_base_may_have_seen_of_each_data_set(tmp_path):
    made = contrast(tmp_path, chexpert_rows(1, 2))
    bases = ("google/medgemma-4b-it", "nvidia/NV-Reason-CXR-3B", "Qwen/Qwen2.5-VL-3B", "x/y", "")
    entries = [
        Entry(f"m{n}", tmp_path, "base", base, "", "", None, None, None, None)
        for n, base in enumerate(bases)
    ]
    table = seen_table(entries, [made])
    assert table.header[-1] == "May have seen test"
    assert [texts(line)[-1] for line in table.rows] == [
        "not among the declared",
        "possibly exposed: the test set is its published training example",
        "not declared",
        "not declared",
        "not declared",
    ]
    mimic = contrast(tmp_path, chexpert_rows(1, 2, dataset="mimic"))
    assert texts(seen_table(entries[:1], [mimic]).rows[0])[-1] == "declared"
