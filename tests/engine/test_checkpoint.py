"""Protect saved work.

Checked: a checkpoint is complete or absent whatever dies while it is written, damage is found and
named, and a resumed optimizer and random state go on bit for bit.

Run: python -m pytest tests/engine/test_checkpoint.py
"""

from __future__ import annotations

import builtins
import dataclasses
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import data.files
from engine import checkpoint as module
from engine.checkpoint import (
    TIMED,
    CheckpointError,
    clean_leftovers,
    latest_valid_checkpoint,
    list_checkpoints,
    load_checkpoint,
    point_link,
    rotate_checkpoints,
    save_checkpoint,
    set_later_checkpoints_aside,
    verify_checkpoint,
)
from engine.state_tensors import load_optimizer, load_rng, optimizer_to_tensors, rng_to_tensors


def save(run_dir: Path, step: int, value: float = 1.0, **options) -> Path:
    tensors = {
        "adapter_model": {"a": torch.full((2, 3), value)},
        "optimizer": {"m": torch.arange(4)},
    }
    records = {"trainer_state.json": {"value": value}} | options.pop("records", {})
    return save_checkpoint(run_dir, step, tensors=tensors, records=records, **options)


def value_of(path: Path) -> float:
    """Read the one number that `save` put into two files. They must agree."""
    checkpoint = load_checkpoint(path)
    value = checkpoint.record("trainer_state.json")["value"]
    assert torch.equal(checkpoint.tensors("adapter_model")["a"], torch.full((2, 3), value))
    return value


# ---- what is saved -------------------------------------------------------------------------------
def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    batch = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    path = save_checkpoint(
        tmp_path,
        12,
        tensors={
            "rollout": {"columns": batch[:, :2], "same storage": batch[:, :2], "flags": batch > 3}
        },
        records={
            "trainer_state.json": {"global_step": 12, "best": None},
            "adapter_config.json": {"r": 16},
            "notes.json": [1],
        },
        notes={"reference_sha256": "abc"},
    )
    assert path == tmp_path / "checkpoint-12"
    checkpoint = load_checkpoint(path)
    rollout = checkpoint.tensors("rollout")
    assert rollout["columns"].dtype == torch.bfloat16
    assert (
        rollout["columns"].tolist() == rollout["same storage"].tolist() == [[0, 1], [4, 5], [8, 9]]
    )
    assert rollout["flags"].tolist() == [[False] * 4, [True] * 4, [True] * 4]
    assert checkpoint.record("trainer_state.json") == {"global_step": 12, "best": None}
    assert checkpoint.record("adapter_config.json") == {"r": 16} and checkpoint.record(
        "notes.json"
    ) == [1]
    assert checkpoint.step == 12 and checkpoint.manifest["notes"] == {"reference_sha256": "abc"}
    assert "rollout.safetensors" in checkpoint and "optimizer.safetensors" not in checkpoint
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint-12"]


def test_the_manifest_holds_size_and_sha256_of_every_other_file(tmp_path):
    path = save(tmp_path, 1)
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(listed) == [
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "trainer_state.json",
    ]
    for name, entry in listed.items():
        content = (path / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "../up.json", "manifest.json", "sub/x.json", "optimizer.safetensors"]
)
def test_only_plain_safetensors_and_json_names_are_written(tmp_path, name):
    # a name that is not plain is said alone, one that is given twice with all
    said = r"\['.*optimizer.safetensors'\]" if name == "optimizer.safetensors" else rf"\['{name}'\]"
    with pytest.raises(ValueError, match=rf"plain names ending in .* or .*: {said}$"):
        save(tmp_path, 1, records={name: {}})
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_was_verified_does_not_change(tmp_path):
    save(tmp_path, 5, value=1.0)
    checkpoint = load_checkpoint(tmp_path / "checkpoint-5")
    with pytest.raises(dataclasses.FrozenInstanceError):
        checkpoint.step = 6  # type: ignore[misc]  # that is the test


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, value=1.0)
    save(tmp_path, 5, value=2.0)
    assert value_of(tmp_path / "checkpoint-5") == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


# ---- faults while saving -------------------------------------------------------------------------
class Killed(BaseException):
    pass


class Fault:
    """Fail at the `at`-th system call of a save.

    A kill also fails every later call: a dead process cleans nothing.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        at: int,
        error: Callable[[], BaseException],
        *,
        kill: bool,
        replacing: str | None = None,
    ):
        """replacing: how a step takes the place of an older save of it, "exchange" or "renames"."""
        self.calls, self.at, self.error, self.kill = 0, at, error, kill
        for name in ("mkdir", "rename", "fsync"):
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))
        if replacing == "renames":
            monkeypatch.setattr(data.files, "exchange", lambda one, other: False)
        else:
            monkeypatch.setattr(data.files, "exchange", self.wrap(data.files.exchange))
        if kill:
            monkeypatch.setattr(data.files, "remove", self.wrap(data.files.remove))
            monkeypatch.setattr(shutil, "rmtree", self.dead(shutil.rmtree))
        monkeypatch.setattr(module, "open", self.open, raising=False)

    def due(self) -> bool:
        self.calls += 1
        return self.calls > self.at if self.kill else self.calls == self.at + 1

    def dead(self, function):
        """Let a call fail after the kill. It is none of those that are counted."""

        def wrapped(*arguments, **options):
            if self.calls > self.at:
                raise self.error()
            return function(*arguments, **options)

        return wrapped

    def wrap(self, function):
        def wrapped(*arguments, **options):
            if self.due():
                raise self.error()
            return function(*arguments, **options)

        return wrapped

    def open(self, *arguments):
        if self.due():
            raise self.error()
        return HalfWriting(builtins.open(*arguments), self)


class HalfWriting:
    """Leave half of the data on the disk in a write that is the call to fail."""

    def __init__(self, file, fault: Fault):
        self.file, self.fault = file, fault
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data: bytes) -> None:
        due = self.fault.due()
        self.file.write(data[: len(data) // 2] if due else data)
        if due:
            self.file.flush()
            raise self.fault.error()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


# mkdir; 4 files, each opened, written and synced (12); sync of the directory, rename or exchange,
# sync of the parent: 16. In the kill also the removal at the end: 17. Where a step is replaced by
# two renames there is one more, and in the kill the removal before them.
def faults(kill: bool, replacing: str | None) -> int:
    renames = replacing == "renames"
    return 16 + renames + kill * (1 + renames)


WAYS = (None, "exchange", "renames")
KILLS = [(way, at) for way in WAYS[1:] for at in range(faults(kill=True, replacing=way))]
ERRORS = [(way, at) for way in WAYS for at in range(faults(kill=False, replacing=way))]


@pytest.mark.parametrize("replacing", WAYS)
@pytest.mark.parametrize("kill", [False, True])
def test_the_number_of_points_at_which_a_save_can_fail(tmp_path, monkeypatch, kill, replacing):
    save(tmp_path, 1)
    fault = Fault(monkeypatch, 1000, Killed, kill=kill, replacing=replacing)
    save(tmp_path, 1 if replacing else 2)
    assert fault.calls == faults(kill, replacing)


@pytest.mark.parametrize("at", range(faults(kill=True, replacing=None)))
def test_a_kill_at_any_point_leaves_the_previous_checkpoint_and_no_half_one(tmp_path, at):
    save(tmp_path, 1, value=1.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Fault(patch, at, Killed, kill=True)
        save(tmp_path, 2, value=2.0)
    assert [verify_checkpoint(path) for path in list_checkpoints(tmp_path)] in ([[]], [[], []])
    assert value_of(tmp_path / "checkpoint-1") == 1.0
    newest, rejected = latest_valid_checkpoint(tmp_path)
    # 15 calls before the rename: from the 16th point on, the new one is there, and complete
    assert newest.name == ("checkpoint-1" if at < 15 else "checkpoint-2") and rejected == []
    clean_leftovers(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert value_of(save(tmp_path, 2, value=3.0)) == 3.0


@pytest.mark.parametrize(("replacing", "at"), KILLS)
def test_a_kill_while_a_step_is_replaced_leaves_the_old_or_the_new_one(tmp_path, replacing, at):
    """The only checkpoint of the run: it is seen at every point, also through the link to it."""
    point_link(tmp_path, "last", save(tmp_path, 1, value=1.0))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Fault(patch, at, Killed, kill=True, replacing=replacing)
        save(tmp_path, 1, value=2.0)
    # mkdir, 12 of the files, sync of the directory: the 15th call exchanges the two. By renames,
    # a removal and the rename aside come first: the 17th call brings the new one in.
    value = 1.0 if at < (15 if replacing == "exchange" else 17) else 2.0
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-1"]
    newest, rejected = latest_valid_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-1" and rejected == []
    assert value_of(newest) == value_of(tmp_path / "last") == value
    held = load_checkpoint(tmp_path / "last")
    clean_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "last"]
    assert value_of(tmp_path / "checkpoint-1") == value
    assert held.record("trainer_state.json") == {"value": value}  # read after it was put back


@pytest.mark.parametrize(("replacing", "at"), ERRORS)
def test_a_full_disk_at_any_point_names_path_and_bytes_and_the_run_can_go_on(
    tmp_path, replacing, at
):
    step = 1 if replacing else 2
    save(tmp_path, 1, value=1.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError) as caught:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Fault(patch, at, lambda: full, kill=False, replacing=replacing)
        save(tmp_path, step, value=2.0)
    assert caught.value.errno == errno.ENOSPC
    # 6 floats of 4 bytes, 4 integers of 8, and the 19 bytes of '{\n  "value": 2.0\n}\n' make 75
    assert (
        f"{tmp_path}/checkpoint-{step} was not saved: No space left on device; it needs 75 bytes"
        in str(caught.value)
    )
    assert not list(tmp_path.glob(".tmp-*"))
    assert all(verify_checkpoint(path) == [] for path in list_checkpoints(tmp_path))
    # an error after the exchange, in the flush of the folder, leaves the new one
    replaced = replacing is not None and at == faults(kill=False, replacing=replacing) - 1
    assert value_of(tmp_path / "checkpoint-1") == (2.0 if replaced else 1.0)
    assert value_of(save(tmp_path, 2, value=3.0)) == 3.0


@pytest.mark.parametrize(("replacing", "at"), [case for case in ERRORS if case[0]])
def test_an_interrupt_at_any_point_is_passed_on_and_cleans_up(tmp_path, replacing, at):
    save(tmp_path, 1, value=1.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Fault(patch, at, KeyboardInterrupt, kill=False, replacing=replacing)
        save(tmp_path, 1, value=2.0)
    assert not list(tmp_path.glob(".tmp-*"))
    # the last call is after the rename
    last = faults(kill=False, replacing=replacing) - 1
    assert value_of(tmp_path / "checkpoint-1") == (1.0 if at < last else 2.0)


def test_too_little_space_is_found_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 26, 74))
    with pytest.raises(OSError, match="only 74 bytes are free; it needs 75 bytes") as caught:
        save(tmp_path, 1)
    assert caught.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_a_vanished_run_directory_is_an_error_that_names_it(tmp_path):
    with pytest.raises(OSError, match="gone/checkpoint-1 was not saved: No such file or directory"):
        save(tmp_path / "gone", 1)


def test_the_system_can_exchange_two_folders(tmp_path):
    """Else a kill between two renames leaves `last` without its target until the next start."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert data.files.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one/other").exists() and (tmp_path / "other/one").exists()
    assert not data.files.exchange(tmp_path / "one", tmp_path / "nothing")


# ---- damage found while loading ------------------------------------------------------------------
def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"]
)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "bytes, the manifest says"),
        (empty, "has 0 bytes"),
        (alter, "was altered"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage, words):
    path = save(tmp_path, 1)
    damage(path / name)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert len(caught.value.problems) == 1
    assert (
        caught.value.problems[0].startswith(f"{path}: {name}: ")
        and words in caught.value.problems[0]
    )


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"{",
        b"[]",
        b'{"step": 1}',
        b'{"step": "1", "files": {}}',
        b'{"step": 1, "files": {"a.json": 3}}',
        b"\xff",
        b'{"step": 1, "files": {"a.json": {"size": "x", "sha256": "y"}}}',
    ],
)
def test_a_manifest_that_is_none_is_a_named_problem(tmp_path, manifest):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_bytes(manifest)
    assert [problem.split(":")[0] for problem in verify_checkpoint(path)] == ["manifest.json"]
    (path / "manifest.json").unlink()
    assert verify_checkpoint(path) == ["manifest.json: No such file or directory"]


def test_a_manifest_of_another_step_is_a_named_problem(tmp_path):
    """A copy of a checkpoint under another name: its hashes are right."""
    shutil.copytree(save(tmp_path, 2), tmp_path / "checkpoint-4")
    assert verify_checkpoint(tmp_path / "checkpoint-4") == [
        "manifest.json: is of step 2, so the folder is not checkpoint-4"
    ]
    newest, rejected = latest_valid_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoint-2" and len(rejected) == 1


@pytest.mark.parametrize(
    ("of_run", "of_checkpoint", "sound"),
    [
        ({"run_id": "a"}, {"run_id": "a"}, True),
        ({"run_id": "a"}, {"run_id": "b"}, False),
        ({"run_id": "a"}, {}, False),
        ({}, {}, True),  # both of an earlier version
        ({}, {"run_id": "b"}, False),
        (None, {"run_id": "b"}, True),  # nothing tells which run the folder is of
        ([], {"run_id": "b"}, True),
    ],
)
def test_a_checkpoint_of_another_run_is_passed_over(tmp_path, of_run, of_checkpoint, sound):
    if of_run is not None:
        (tmp_path / "config.json").write_text(json.dumps(of_run))
    save(tmp_path, 2, notes=of_checkpoint)
    newest, rejected = latest_valid_checkpoint(tmp_path)
    assert (newest is not None) == sound
    assert rejected == (
        []
        if sound
        else [
            f"{tmp_path}/checkpoint-2: manifest.json: is of another run than config.json beside it"
        ]
    )


@pytest.mark.parametrize(
    "name", ["checkpoint-007", "checkpoint-+4", "checkpoint-\uff14", "checkpoint-" + "9" * 40]
)
def test_no_other_name_is_taken_for_a_checkpoint(tmp_path, name):
    save(tmp_path, 2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "checkpoint-6").symlink_to("checkpoint-2")
    assert list_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
    assert set_later_checkpoints_aside(tmp_path, 0) == [tmp_path / "after-0-checkpoint-2"]
    assert (tmp_path / name).is_dir() and (tmp_path / "checkpoint-5").is_file()


def test_a_link_in_a_checkpoint_is_not_followed(tmp_path):
    path = save(tmp_path, 1)
    os.rename(path / "trainer_state.json", tmp_path / "elsewhere.json")
    (path / "trainer_state.json").symlink_to(tmp_path / "elsewhere.json")
    assert verify_checkpoint(path) == ["trainer_state.json: is a link"]


def test_the_newest_valid_checkpoint_is_found_behind_damaged_ones_and_they_are_listed(tmp_path):
    assert latest_valid_checkpoint(tmp_path) == (None, [])
    for step in (9, 10, 100):  # by number: 'checkpoint-9' sorts last as text
        save(tmp_path, step)
    truncate(tmp_path / "checkpoint-100" / "optimizer.safetensors")
    (tmp_path / "checkpoint-1000").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    path, rejected = latest_valid_checkpoint(tmp_path)
    assert path == tmp_path / "checkpoint-10"
    assert [line.split(": ")[:2] for line in rejected] == [
        [f"{tmp_path}/checkpoint-1000", "manifest.json"],
        [f"{tmp_path}/checkpoint-100", "optimizer.safetensors"],
    ]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_pickle_is_never_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    payload = pickle.dumps(Payload())
    (path / "optimizer.pt").write_bytes(payload)  # beside the manifest: not looked at
    checkpoint = load_checkpoint(path)
    with pytest.raises(CheckpointError, match="holds no optimizer.pt"):
        checkpoint.record("optimizer.pt")

    manifest = json.loads((path / "manifest.json").read_text())
    entry = {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    manifest["files"]["optimizer.pt"] = entry  # in the manifest: refused
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"optimizer.pt: is not a plain name ending in .safetensors or .json"
    ):
        load_checkpoint(path)

    # under a name and a hash that pass: not safetensors, not JSON
    del manifest["files"]["optimizer.pt"]
    for name in ("optimizer.safetensors", "trainer_state.json"):
        (path / name).write_bytes(payload)
        manifest["files"][name] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = load_checkpoint(path)
    with pytest.raises(CheckpointError, match="optimizer.safetensors: is not a safetensors file"):
        checkpoint.tensors("optimizer")
    with pytest.raises(CheckpointError, match="trainer_state.json: is not JSON"):
        checkpoint.record("trainer_state.json")
    assert not (tmp_path / "unpickled").exists()


def test_a_manifest_cannot_point_outside_its_checkpoint(tmp_path):
    path = save(tmp_path, 1)
    (tmp_path / "secret.json").write_text("{}")
    entry = {"size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (path / "manifest.json").write_text(json.dumps({"step": 1, "files": {"../secret.json": entry}}))
    assert [problem.split(":")[0] for problem in verify_checkpoint(path)] == ["../secret.json"]


def test_no_such_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint-7: no such checkpoint directory"):
        load_checkpoint(tmp_path / "checkpoint-7")
    with pytest.raises(CheckpointError, match="holds no rollout.safetensors"):
        load_checkpoint(save(tmp_path, 1)).tensors("rollout")


# ---- housekeeping --------------------------------------------------------------------------------
def test_rotation_deletes_the_oldest_but_keeps_the_best_and_the_last(tmp_path):
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step)
    point_link(tmp_path, "best", tmp_path / "checkpoint-2")
    assert rotate_checkpoints(tmp_path, None) == []
    deleted = rotate_checkpoints(tmp_path, 3, keep={tmp_path / "best"})
    assert [path.name for path in deleted] == ["checkpoint-4", "checkpoint-6"]
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-8",
        "checkpoint-10",
    ]
    rotate_checkpoints(tmp_path, 1, keep={tmp_path / "best"})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


@pytest.mark.parametrize(
    ("limit", "left"), [(None, [1, 3, 4, 7]), (3, [1, 4, 7]), (4, [1, 3, 4, 7]), (1, [1, 7])]
)
def test_a_checkpoint_that_the_clock_asked_for_goes_with_the_next(tmp_path, limit, left):
    """They neither pile up without a limit nor push others out. The best stays in any case."""
    for step in (1, 2, 3, 4, 5, 6, 7):
        save(tmp_path, step, notes={TIMED: True} if step in (1, 2, 5, 6, 7) else None)
    rotate_checkpoints(tmp_path, limit, keep={tmp_path / "checkpoint-1"})
    assert list_checkpoints(tmp_path) == [tmp_path / f"checkpoint-{step}" for step in left]


def test_a_failed_delete_is_a_warning_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    rename = os.rename

    def refusing(source, target):
        if Path(source).name == "checkpoint-1":
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refusing)
    assert rotate_checkpoints(tmp_path, 1) == [tmp_path / "checkpoint-2"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    assert len(caplog.records) == 1 and "checkpoint-1 could not be deleted" in caplog.text


def test_links_are_relative_and_follow_the_newest_target(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    point_link(tmp_path, "last", first)
    point_link(tmp_path, "last", second)
    assert os.readlink(tmp_path / "last") == "checkpoint-2"
    assert load_checkpoint(tmp_path / "last").path == second.resolve()


def test_a_link_that_cannot_be_set_is_a_warning(tmp_path, caplog):
    (tmp_path / "best").mkdir()
    point_link(tmp_path, "best", save(tmp_path, 1))
    assert "best could not be set" in caplog.text


def test_clean_leftovers_touches_nothing_else(tmp_path):
    save(tmp_path, 1)
    for name in (".tmp-checkpoint-2-77", ".old-checkpoint-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / ".tmp-metrics.jsonl").touch()
    (tmp_path / ".lock").touch()
    removed = clean_leftovers(tmp_path)
    assert [path.name for path in removed] == [
        ".old-checkpoint-1",
        ".tmp-checkpoint-2-77",
        ".tmp-metrics.jsonl",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-1"]


# ---- optimizer and random state ------------------------------------------------------------------
def fresh_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    first, second = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first, "weight_decay": 0.01}, {"params": second, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95))


def step_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor) -> None:
    model(inputs).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_adamw_goes_on_bit_for_bit_after_a_round_trip_through_the_disk(tmp_path):
    model = fresh_model()
    optimizer = adamw(model)
    inputs = torch.randn(5, 3)
    for _ in range(3):
        step_on(model, optimizer, inputs)
    optimizer.param_groups[0]["lr"] = 0.0123  # as a schedule leaves it
    tensors, record = optimizer_to_tensors(optimizer)
    path = save_checkpoint(
        tmp_path,
        3,
        tensors={"optimizer": tensors, "model": model.state_dict()},
        records={"optimizer.json": record},
    )

    checkpoint = load_checkpoint(path)
    resumed_model = fresh_model()
    resumed_model.load_state_dict(checkpoint.tensors("model"))
    resumed = adamw(resumed_model)
    load_optimizer(resumed, checkpoint.tensors("optimizer"), checkpoint.record("optimizer.json"))
    assert resumed.param_groups[0]["lr"] == 0.0123 and resumed.param_groups[1]["betas"] == (
        0.8,
        0.95,
    )
    # 4 parameters, each with step, exp_avg, exp_avg_sq
    assert len(tensors) == 12
    assert {int(state["step"]) for state in resumed.state.values()} == {3}
    for _ in range(2):
        step_on(model, optimizer, inputs)
        step_on(resumed_model, resumed, inputs)
    for straight, again in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(straight, again)


def test_optimizer_state_that_does_not_fit_is_refused():
    model = fresh_model()
    optimizer = adamw(model)
    step_on(model, optimizer, torch.ones(1, 3))
    tensors, record = optimizer_to_tensors(optimizer)
    with pytest.raises(CheckpointError, match="is of AdamW, the run uses SGD"):
        load_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), tensors, record)
    with pytest.raises(CheckpointError, match=r"groups of \[2, 2\], the run has \[4\]"):
        load_optimizer(torch.optim.AdamW(model.parameters()), tensors, record)
    wider = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    with pytest.raises(
        CheckpointError, match=r"parameter 0 has shape \[4, 3\], the run's has \[5, 3\]"
    ):
        load_optimizer(adamw(wider), tensors, record)
    with pytest.raises(
        CheckpointError, match=r"state 1.exp_avg has shape \[1\], its parameter \[4\]"
    ):
        load_optimizer(adamw(model), {**tensors, "1.exp_avg": torch.zeros(1)}, record)


def draws() -> list[float]:
    return [
        torch.rand(()).item(),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
    ]


def test_every_source_of_randomness_goes_on_with_the_same_draws(tmp_path):
    draws()  # leaves Python's and numpy's Gaussian generators with a second value in store
    tensors, record = rng_to_tensors()
    path = save_checkpoint(tmp_path, 1, tensors={"rng": tensors}, records={"rng.json": record})
    expected = draws() + draws()

    draws()
    checkpoint = load_checkpoint(path)
    load_rng(checkpoint.tensors("rng"), checkpoint.record("rng.json"))
    assert draws() + draws() == expected


def test_random_state_that_does_not_fit_is_refused_or_warned_about(caplog):
    tensors, record = rng_to_tensors()
    with pytest.raises(CheckpointError, match="KeyError: 'torch'"):
        load_rng({name: tensors[name] for name in tensors if name != "torch"}, record)
    with pytest.raises(CheckpointError, match="random state cannot be restored"):
        load_rng({**tensors, "torch": tensors["torch"][:100]}, record)
    extra = torch.cuda.device_count()
    load_rng({**tensors, f"cuda.{extra}": tensors["torch"]}, record)
    assert f"random state of {extra + 1} CUDA devices was saved, {extra} are here" in caplog.text


def test_checkpoints_of_an_abandoned_branch_are_set_aside_and_kept(tmp_path):
    """Resumed from step 2, a run must not later take the old step 4 for its newest; twice, and both
    branches stay.
    """
    for branch in range(2):
        for step in (2, 4):
            save(tmp_path, step)
        moved = set_later_checkpoints_aside(tmp_path, 2)
        assert [path.name for path in moved] == ["after-2-checkpoint-4" + ("-2" if branch else "")]
        assert (
            list_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
            and verify_checkpoint(moved[0]) == []
        )
    assert set_later_checkpoints_aside(tmp_path, 2) == []


@pytest.fixture
def two_gpus(monkeypatch) -> dict[int, torch.Tensor]:
    """Pretend that two GPUs are here: {index: state of its generator}."""
    states = {0: torch.tensor([10]), 1: torch.tensor([11])}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states.values()))
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, index: states.update({index: state})
    )
    return states


def test_each_gpu_goes_on_with_its_own_draws(two_gpus, caplog):
    tensors, record = rng_to_tensors()
    assert tensors["cuda.0"].tolist() == [10] and tensors["cuda.1"].tolist() == [11]
    two_gpus.clear()
    load_rng(tensors, record)
    assert {index: state.tolist() for index, state in two_gpus.items()} == {0: [10], 1: [11]}
    assert caplog.messages == []


def test_another_number_of_gpus_is_said_and_the_common_ones_go_on(two_gpus, caplog):
    tensors, record = rng_to_tensors()
    two_gpus.clear()
    load_rng({**tensors, "cuda.2": torch.tensor([12])}, record)
    assert sorted(two_gpus) == [0, 1]
    del tensors["cuda.1"]
    two_gpus.clear()
    load_rng(tensors, record)
    assert sorted(two_gpus) == [0]
    assert caplog.messages == [
        "random state of 3 CUDA devices was saved, 2 are here: what a fork draws there differs",
        "random state of 1 CUDA devices was saved, 2 are here: what a fork draws there differs",
    ]


def test_a_record_of_fewer_parameters_is_refused():
    """As a damaged record has them: its shapes would be compared with nothing."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    tensors, record = optimizer_to_tensors(optimizer)
    with pytest.raises(ValueError, match="zip"):
        load_optimizer(optimizer, tensors, record | {"shapes": record["shapes"][:1]})


def test_the_name_of_a_state_may_hold_a_dot():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    _, record = optimizer_to_tensors(optimizer)
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    load_optimizer(optimizer, {"0.average.slow": value}, record)
    assert torch.equal(optimizer.state[model.weight]["average.slow"], value)
