"""Protect the order of training examples.

Checked: another one each epoch and for each seed, for ever the same. Of several hospitals: exact
shares, whole passes through the examples of each, a function of seed and position.

Run: pytest tests/engine/test_order.py
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.examples import Example
from engine.order import Order, shuffled


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


# ---- several hospitals ---------------------------------------------------------------------------
def order_of(sizes: dict[str | None, int], weights: dict[str, float], seed: int = 0) -> Order:
    """Make the order of hospitals with so many examples each."""
    examples = [
        Example(f"{name}{i}", "p", "x.png", (), "site", None, hospital=name)
        for name, size in sizes.items()
        for i in range(size)
    ]
    return Order(examples, weights, seed)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_one_hospital_has_the_order_of_before_hospitals_were_known(epoch):
    for name, weights in ((None, {}), ("a", {}), ("a", {"a": 2.0})):
        assert order_of({name: 7}, weights, 42).epoch(epoch) == shuffled(7, epoch, 42)


def test_two_files_without_weights_are_trained_on_as_one_with_all_their_rows():
    two = order_of({"a": 4, "b": 3}, {}, 42)
    assert [two.epoch(epoch) for epoch in (0, 1)] == [shuffled(7, epoch, 42) for epoch in (0, 1)]


def test_the_order_of_two_hospitals_by_hand():
    """Examples 0 and 1 are a's, 2 to 4 are b's: 5 positions, 3 of a and 2 of b.

    Passes through a are [1, 0], [0, 1], [1, 0], written down once, so its draws are 1 0 0 | 1 1 0:
    the epochs cut the passes. Those through b are [3, 4, 2], [3, 2, 4], so its draws are 3 4 | 2 3.
    The places of epoch 0 are therefore 1 0 0 3 4, of epoch 1 1 1 0 2 3. They are taken in the order
    of `shuffled`.
    """
    order = order_of({"a": 2, "b": 3}, {"a": 3.0, "b": 2.0})
    assert order.counts == {"a": 3, "b": 2}
    assert [shuffled(5, epoch, 0) for epoch in (0, 1)] == [[4, 0, 1, 3, 2], [0, 4, 2, 3, 1]]
    assert order.epoch(0) == [4, 1, 0, 3, 0]
    assert order.epoch(1) == [1, 3, 0, 2, 1]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=2, max_size=3),
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
)
def test_shares_are_exact_and_passes_whole_however_long_a_run_is(hospitals, seed, epochs):
    sizes = {chr(97 + i): size for i, (size, _) in enumerate(hospitals)}
    weights = {chr(97 + i): 4.0 + weight for i, (_, weight) in enumerate(hospitals)}
    try:
        order = order_of(sizes, weights, seed)
    except ValueError:  # a hospital without a position
        return
    hospital_of = [name for name, size in sizes.items() for _ in range(size)]
    taken: Counter[int] = Counter()
    for epoch in range(epochs):
        indices = order.epoch(epoch)
        assert Counter(hospital_of[i] for i in indices) == order.counts
        taken.update(indices)
        fresh = order_of(sizes, weights, seed)
        assert fresh.epoch(epoch) == indices  # as a resumed run asks for it
    for name in sizes:
        times = [taken[i] for i, of in enumerate(hospital_of) if of == name]
        assert max(times) - min(times) <= 1
        assert sum(times) == epochs * order.counts[name]


def test_passes_and_seeds_differ():
    weights = {"a": 1.0, "b": 3.0}
    orders = [order_of({"a": 40, "b": 40}, weights, seed).epoch(0) for seed in (0, 1)]
    assert orders[0] != orders[1]
    a, b = ([i % 40 for i in orders[0] if i // 40 == of] for of in (0, 1))
    # 20 of a's 40, and b's once and half: neither the first ones, nor the same of both
    assert len(set(a)) == 20 and set(a) != set(range(20)) and b[:20] != a
    assert sorted(Counter(b).values()) == [1] * 20 + [2] * 20
