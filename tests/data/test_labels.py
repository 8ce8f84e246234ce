"""Protect the one rule for a label that a model has stopped saying.

Run: pytest tests/data/test_labels.py
"""

from __future__ import annotations

import pytest

from data.labels import silenced_labels


@pytest.mark.parametrize(
    ("said", "true", "silenced"),
    [
        (0, 10, True),
        (0, 9, False),  # too few to tell
        (0, 0, False),
        (2, 10, True),  # a quarter of 10 is 2.5
        (2.5, 10, False),  # a share of an image's completions; no less than a quarter
        (3, 10, False),
        (24, 100, True),
        (25, 100, False),
        (200, 10, False),  # said much too often is another matter
    ],
)
def test_silenced_is_true_ten_times_and_said_less_than_a_quarter_of_that(said, true, silenced):
    assert silenced_labels({"Fracture": said}, {"Fracture": true}) == ["Fracture"] * silenced


def test_silenced_labels_come_in_chexperts_order_and_a_missing_count_is_none():
    true = {"Fracture": 20, "Edema": 20, "Pleural Other": 24, "Pneumonia": 27}
    assert silenced_labels({"Pneumonia": 10, "Edema": 4}, true) == [
        "Edema",  # 4 of 20
        "Pleural Other",  # said nowhere
        "Fracture",
    ]
    assert silenced_labels({"Edema": 30}, {}) == []  # said and never true
