"""The gradient of 2 and of 4 ranks is the gradient of one. What they compute is in gradients.py."""

from __future__ import annotations

import json

import pytest

from tests.helpers import tiny
from tests.helpers.torchrun import torchrun
from tests.ranks.gradients import DTYPES, FAMILIES

CLOSE = {"float32": 1e-6, "float64": 1e-12}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny.SAVE[family](folder / family)
    tiny.save_images(folder / "images" / "56", 3)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_several_ranks_have_the_gradient_of_one(size, models):
    end = torchrun(size, "tests.ranks.gradients:compare", models)
    assert end.code == 0 and not end.left, end.told()
    told = {}
    for rank in range(size):
        for line in map(json.loads, end.out[rank].splitlines()):
            told[rank, line.pop("about")] = line
    kinds = ("grpo", "sft", "short sft")
    names = [
        f"{family} {dtype} {kind}" for family in FAMILIES for dtype in DTYPES for kind in kinds
    ]
    assert set(told) == {(rank, name) for rank in range(size) for name in names}
    for (rank, name), ways in told.items():
        right = ways["Ranks"]
        assert right["equal on all"], (rank, name)
        assert right["relative"] < CLOSE[name.split()[1]], (rank, name, right)
        if len(ways) == 1:  # the mutants are tried on one model
            continue
        # each mutant is far off: what a mean, a rank's own total, a skipped gradient would give
        assert ways["Mean"]["relative"] == pytest.approx(1 - 1 / size, rel=1e-3), (rank, name)
        assert ways["OwnTotal"]["relative"] > 0.1 or "short" in name and size == 2, (rank, name)
        if "short" in name:  # the ranks are not equal, and the one without rows has no gradient
            assert not ways["SkipsNone"]["equal on all"], (rank, name)
            lacking = [one for one in range(size) if told[one, name]["SkipsNone"]["relative"] == 1]
            assert len(lacking) == 1
