"""A sharded base computes what the whole one does, to the bit, however much each rank has to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, UsageError
from engine.launch import Launch
from engine.model import check_adapter
from engine.resume import FREE_TO_CHANGE
from engine.settings import resolve_sft
from tests.helpers.adapters import KINDS, make_adapter
from tests.helpers.runs import sft_flags, write_data
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
    write_data(path / "data", 9)
    write_data(path / "three", 3)
    return path


@pytest.fixture(scope="module")
def two_ranks(folder) -> list[list[tuple[str, Any]]]:
    return told(torchrun(2, f"{PROGRAM}:two_ranks", folder, time_limit=900))


def told(end: Ended) -> list[list[tuple[str, Any]]]:
    """Read what every rank printed."""
    assert end.code == 0, end.told(20_000)
    mark = "told "  # a run prints lines of its own
    return [
        [tuple(json.loads(line[len(mark) :])) for line in out.splitlines() if line.startswith(mark)]
        for out in end.out
    ]


def check_exact(found: dict[str, Any]) -> None:
    """See that nothing differs, and that there was something that could."""
    assert set(found["differences"].values()) == {0.0}, found
    assert found["loaded"] and found["same stops"], found
    assert found["tied"] is found["case"][3] and found["share"] == 0.5, found
    assert found["changed"] > 0.01, found


def test_what_a_sharded_base_computes_is_what_the_whole_one_does(two_ranks):
    for of_rank in two_ranks:
        found = [value for what, value in of_rank if what == "exact"]
        assert len(found) == 4
        for case in found:
            check_exact(case)


def test_a_run_with_a_sharded_base_is_the_run_with_the_whole_one(two_ranks, folder):
    for name, logs in {"sft": [], "grpo": ["completions.jsonl"]}.items():
        for file in ("adapter_model.safetensors", "predictions-site.jsonl", *logs):
            paths = [folder / f"{name}-{kind}" / file for kind in ("whole", "sharded")]
            assert paths[0].read_bytes() == paths[1].read_bytes(), paths
        # ranks had other numbers of forwards to make, which only the sharded base evens out
        empty = [dict(of_rank)["runs"][name] for of_rank in two_ranks]
        assert [whole for whole, _ in empty] == [0, 0]
        assert max(sharded for _, sharded in empty) > 0


def test_of_two_nodes_each_holds_a_copy(folder):
    for of_rank in told(torchrun(4, f"{PROGRAM}:two_nodes", folder, time_limit=600)):
        ((what, found),) = of_rank
        assert what == "exact"
        check_exact(found)


def test_adapters_and_embedding_are_not_sharded(two_ranks):
    """FSDP with the adapters would leave each rank a shard of their gradients, without a word."""
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


# ---- what is refused -----------------------------------------------------------------------------
def test_a_base_is_sharded_among_two_ranks_at_least(folder, tmp_path, monkeypatch):
    flags = sft_flags(folder / "gemma3-tied", folder / "data/data.jsonl", tmp_path / "run")
    with pytest.raises(ConfigError, match="--shard_base shards .* there is one: start with tor"):
        resolve_sft([*flags, "--shard_base"])
    monkeypatch.setattr(Launch, "of", classmethod(lambda cls: Launch(0, 4, 0, 2)))
    assert resolve_sft([*flags, "--shard_base"]).configs[0].shard_base
    with pytest.raises(ConfigError, match="--shard_base and --compile do not go together"):
        resolve_sft([*flags, "--shard_base", "--compile"])
    assert not (tmp_path / "run").exists()
    assert "shard_base" in FREE_TO_CHANGE


@pytest.mark.parametrize("kind", ["DoRA", "bias all", "decoder", "modules_to_save embed_tokens"])
def test_adapters_whose_place_in_a_layer_would_be_sharded_are_refused(kind, folder, tmp_path):
    base = folder / "qwen2_5_vl-tied"
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    assert check_adapter(str(base), adapter) is not None
    if kind in ("decoder", "modules_to_save embed_tokens"):
        assert check_adapter(str(base), adapter, sharded=True) is not None
        return
    what = {"DoRA": "lora_magnitude_vector", "bias all": "bias"}[kind]
    with pytest.raises(UsageError, match=f"plain LoRA, such as .*layers.*{what}.*without --shard"):
        check_adapter(str(base), adapter, sharded=True)
