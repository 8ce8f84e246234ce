"""Protect a resume from what a checkpoint says of its run: names, counters, settings.

Run: pytest tests/engine/test_saved_records.py
"""

from __future__ import annotations

import copy

import pytest

from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from engine.resume import find_checkpoint
from engine.saved_records import checked
from tests.helpers.records import CONFIG, STATE


def saved(folder, config=CONFIG, state=STATE):
    records = {"config.json": config, "trainer_state.json": state}
    return load_checkpoint(save_checkpoint(folder, 4, tensors={}, records=records))


def test_records_of_a_run_pass_and_so_do_those_of_an_earlier_version(tmp_path):
    checked(saved(tmp_path))
    early = {name: CONFIG[name] for name in ("script", "recipe", "settings", "data")}
    checked(saved(tmp_path, early, {"global_step": 4, "best_model_checkpoint": None}))


def test_the_training_sets_of_several_hospitals_pass(tmp_path):
    file = {"file": "a", "sha256": "0" * 64}
    data = {"train.mimic": file | {"weight": 2.0}, "train.nih": file | {"weight": 0.5}}
    checked(saved(tmp_path, CONFIG | {"data": data, "bad_images": {"train.nih": [{"id": "1"}]}}))


DELETED = object()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("config script", "evil"),
        ("config script", {}),
        ("config recipe", {"a": 1}),
        ("config recipe", "a\x1b[2J"),
        ("config settings", []),
        ("config settings", DELETED),
        ("config settings seed", 1),
        ("config settings seed origin", None),
        ("config settings ../x", {"value": 1, "origin": "default"}),
        ("config data", DELETED),
        ("config data train sha256", "0" * 63 + "g"),
        ("config data train", "a.jsonl"),
        ("config data train./x", {"file": "a", "sha256": "0" * 64}),
        ("config data train weight", -1.0),
        ("config data train weight", "2"),
        ("config data ../../x", {"file": "a", "sha256": "0" * 64}),
        ("config bad_images ../../x", []),
        ("config bad_images val", [1]),
        ("config reference ../../x", "1" * 64),
        ("config reference", [1]),
        ("config base files", {"../../x": {"bytes": 1, "sha256": "0" * 64}}),
        ("config base hash", "md5"),
        ("config base", 3),
        ("state best_model_checkpoint", "../../victim"),
        ("state best_model_checkpoint", "/etc"),
        ("state best_model_checkpoint", "checkpoint-2/.."),
        ("state best_model_checkpoint", "checkpoint-2\n"),
        ("state best_model_checkpoint", "best"),
        ("state best_model_checkpoint", ""),
        ("state best_model_checkpoint", 2),
        ("state global_step", 5),
        ("state global_step", -1),
        ("state global_step", True),
        ("state global_step", DELETED),
        ("state epoch", "1"),
        ("state best_metric", "1"),
        ("state num_tokens", 10**400),
        ("state log_history", {}),
        ("state log_history", [{"loss": 1.0}]),
        ("state unlogged_metrics", {"loss": ["median", []]}),
        ("state unlogged_metrics", {"loss": ["mean", [["1", 1]]]}),
    ],
)
def test_what_is_no_runs_is_refused_in_one_line(tmp_path, place, value):
    records = copy.deepcopy({"config": CONFIG, "state": STATE})
    *way, last = place.split()
    holder = records
    for name in way:
        holder = holder[name]
    if value is DELETED:
        del holder[last]
    else:
        holder[last] = value
    saved(tmp_path, **records)
    for named in (tmp_path, tmp_path / "checkpoint-4"):
        with pytest.raises(CheckpointError) as refused:
            find_checkpoint(str(named))
        (line,) = refused.value.problems
        assert line.isprintable() and len(line) < 400
        assert "config.json" in line or "trainer_state.json" in line


@pytest.mark.parametrize("record", [None, [], 3, "x"])
def test_a_record_that_is_no_object(tmp_path, record):
    with pytest.raises(CheckpointError, match="not an object"):
        checked(saved(tmp_path, record))
