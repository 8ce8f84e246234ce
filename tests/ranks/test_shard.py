"""A sharded base computes what the whole one does, to the bit, however much each rank has to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import SAVE, save_images
from tests.helpers.torchrun import Ended, torchrun

PROGRAM = "tests.ranks.shard"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Save every model and some images before ranks start: with them only rank 0 could."""
    path = tmp_path_factory.mktemp("shard")
    for family, save in SAVE.items():
        for name, tied in {"tied": True, "untied": False}.items():
            save(path / f"{family}-{name}", tied=tied)
    for size in (56, 112):
        save_images(path / str(size), 3, size)
    return path


@pytest.fixture(scope="module")
def two_ranks(folder) -> list[list[tuple[str, Any]]]:
    return told(torchrun(2, f"{PROGRAM}:two_ranks", folder))


def told(end: Ended) -> list[list[tuple[str, Any]]]:
    """Read what every rank printed."""
    assert end.code == 0, end.told(20_000)
    return [[tuple(json.loads(line)) for line in out.splitlines()] for out in end.out]


def check_exact(found: dict[str, Any]) -> None:
    """See that nothing differs, and that there was something that could."""
    assert set(found["differences"].values()) == {0.0}, found
    assert found["loaded"] and found["same stops"], found
    assert found["tied"] is found["case"][3] and found["share"] == 0.5, found
    assert found["changed"] > 0.01, found


def test_what_a_sharded_base_computes_is_what_the_whole_one_does(two_ranks):
    for of_rank in two_ranks:
        found = [value for what, value in of_rank if what == "exact"]
        assert len(found) == 5
        for case in found:
            check_exact(case)


def test_of_two_nodes_each_holds_a_copy(folder):
    for of_rank in told(torchrun(4, f"{PROGRAM}:two_nodes", folder)):
        ((what, found),) = of_rank
        assert what == "exact"
        check_exact(found)


def test_adapters_and_embedding_are_not_sharded(two_ranks):
    """FSDP with the adapters would lose them at the first use of the reference, without a word."""
    for of_rank in two_ranks:
        found = dict(of_rank)["wrong"]
        assert found["right"] == [28, 28]
        assert found["adapters inside"] == [28, 0]
    assert "aten.embedding" in dict(two_ranks[0])["wrong"]["embedding inside"]


def test_a_rank_that_fails_between_forwards_is_told_of_at_the_next(two_ranks):
    first, other = (dict(of_rank)["faults"] for of_rank in two_ranks)
    assert other["fails"] == "ValueError: of rank 1"
    assert first["fails"] == "PeerError: rank 1 failed: ValueError: of rank 1"
    assert first["stops"] == other["stops"] == "StopRequested: "
    assert first["sampler stops"] == other["sampler stops"] == "StopRequested: "
    assert first["goes on"] == other["goes on"] == "True"


def test_a_rank_that_runs_out_of_memory_says_what_to_do(two_ranks):
    first, other = (dict(of_rank)["faults"]["memory"] for of_rank in two_ranks)
    assert other == (
        "DoesNotFit: out of memory in update (tried to allocate 2 GiB): with --shard_base all ranks"
        " run a forward together, and none can do it again in smaller micro-batches. Go on from the"
        " last checkpoint with --max_tokens_per_forward 675"
    )
    assert first == f"PeerError: rank 1 failed: {other}"


def test_a_rank_that_fails_within_a_forward_is_waited_for_until_the_timeout(two_ranks):
    first, other = (dict(of_rank)["faults"]["within a forward"] for of_rank in two_ranks)
    assert other.startswith("TypeError: ") or other.startswith("PeerError: rank 0 failed"), other
    assert first.startswith("RuntimeError: "), first
