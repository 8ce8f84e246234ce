"""Protect the order of training examples.

Checked: another one each epoch and for each seed, for ever the same.

Run: pytest tests/engine/test_order.py
"""

from __future__ import annotations

import pytest

from engine.order import shuffled


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [
        # written down once; torch's CPU generator gives the same numbers on every machine
        (0, 0, [4, 0, 5, 3, 2, 6, 1]),
        (0, 1, [0, 6, 1, 3, 5, 2, 4]),
        (42, 0, [2, 1, 4, 3, 5, 6, 0]),
        (42, 1, [2, 0, 6, 5, 4, 1, 3]),
    ],
)
def test_the_order_of_an_epoch(seed, epoch, expected):
    assert shuffled(7, epoch, seed) == expected
    assert shuffled(7, epoch, seed) == expected  # a function: nothing moves on between calls


def test_every_example_once():
    assert sorted(shuffled(1000, 3, 1)) == list(range(1000)) and shuffled(1, 0, 0) == [0]
