"""Protect a user's files from the folder of a run: nothing is read or written through a link in it.

Run: pytest tests/engine/test_run_folder.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.checkpoint import load_checkpoint, point_link, save_checkpoint
from engine.config import UsageError
from engine.resume import bring_logs, find_checkpoint
from engine.run import TrainerState, opened_run
from engine.runtime import lock_run
from tests.helpers.records import CONFIG, STATE


@pytest.fixture
def victim(tmp_path):
    """Make a folder of somebody's files, and see afterwards that nothing happened to it."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "id_rsa").write_text("mine")
    (folder / "checkpoint-1").mkdir()
    before = tree(folder)
    yield folder
    assert tree(folder) == before


def tree(folder: Path) -> list[tuple]:
    found = []
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found.append((str(path), status.st_mode, status.st_mtime_ns, content))
    return found


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (2, 4):
        state = STATE | {"global_step": step}
        records = {"config.json": CONFIG, "trainer_state.json": state}
        save_checkpoint(folder, step, tensors={}, records=records)
    point_link(folder, "last", folder / "checkpoint-4")
    point_link(folder, "best", folder / "checkpoint-2")
    (folder / "metrics.jsonl").write_text('{"step": 2}\n{"step": 9}\n')
    return folder


def go_on(run: Path) -> None:
    checkpoint, _ = find_checkpoint(str(run))
    with opened_run("grpo", None, checkpoint, dict(CONFIG), {}, TrainerState(**STATE)) as opened:
        opened.log.scalars(5, {"loss": 1.0})
        opened.log.warn("w", 5)


NAMES = [
    ".lock",
    "metrics.jsonl",
    "completions.jsonl",
    "evaluations.jsonl",
    "warnings.jsonl",
    "config.json",
    "trainer_state.json",
    "adapter_model.safetensors",
    "adapter_config.json",
    "predictions-val.jsonl",
    "predictions-val.partial.jsonl",
    "scores-val.json",
    "summary.json",
    "README.md",
    "report.html",
    "figure.png",
    "events.out.tfevents.1.x.2.0",
    "charts",
    "charts/validation",
    "charts/validation/events.out.tfevents.1.x.2.0",
    "reference",
    "reference/adapter_model.safetensors",
    "start",
    "start/predictions-val.jsonl",
    "start-vote",
    "checkpoint-9",
    "checkpoint-4/rng.json",
    "after-2-checkpoint-4",
    ".old-checkpoint-9",
    "step-3.safetensors",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "pipe"])
def test_a_run_does_not_go_on_in_a_folder_with_a_link(run, victim, name, kind):
    place = run / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    else:
        target = {"file": "id_rsa", "folder": "checkpoint-1", "dangling": "new"}[kind]
        place.symlink_to(victim / target)
    with pytest.raises(UsageError) as refused:
        go_on(run)
    (line,) = refused.value.problems
    assert Path(name).name.removeprefix(".old-") in line and line.isprintable()


@pytest.mark.parametrize("name", ["best", "last"])
@pytest.mark.parametrize("target", ["../victim", "../victim/checkpoint-1", "checkpoint-2/..", "/"])
def test_the_two_links_of_a_run_lead_to_its_own_checkpoints(run, victim, name, target):
    (run / name).unlink()
    (run / name).symlink_to(target)
    with pytest.raises(UsageError, match=f"'{name}' is a link to '{target}'"):
        go_on(run)


def test_what_a_kill_leaves_of_a_link_is_no_obstacle(run):
    (run / ".tmp-last").symlink_to("checkpoint-4")
    go_on(run)
    assert not (run / ".tmp-last").is_symlink()


def test_a_copy_by_hard_links_goes_on_and_leaves_the_other_as_it_is(run, tmp_path):
    """As `cp -al` makes backups: logs are written anew, never into the other's file."""
    backup = tmp_path / "backup"
    os.link(run / "metrics.jsonl", backup)
    before = backup.stat()
    go_on(run)
    after = backup.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert backup.read_text() == '{"step": 2}\n{"step": 9}\n'
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2  # steps 2 and 5


def test_a_lock_with_a_second_name_is_refused(run, victim):
    os.link(victim / "id_rsa", run / ".lock")
    with pytest.raises(UsageError, match="second name"), lock_run(run):
        pass
    (run / ".lock").unlink()


def test_logs_are_never_appended_through_a_link_that_comes_in_the_middle(run, victim, caplog):
    """A writer of a shared folder may put it there while the run goes on."""
    checkpoint, _ = find_checkpoint(str(run))
    with opened_run("grpo", None, checkpoint, dict(CONFIG), {}, TrainerState(**STATE)) as opened:
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to(victim / "id_rsa")
        (run / "warnings.jsonl").symlink_to(victim / "new")
        opened.log.scalars(5, {"loss": 1.0})
        opened.log.warn("w", 5)
    assert "it is a link" in caplog.text
    assert (victim / "id_rsa").read_text() == "mine"


def test_nothing_leaves_or_enters_a_run_that_goes_on_elsewhere(run, victim, tmp_path):
    (run / "start").mkdir()
    (run / "start" / "predictions-val.jsonl").symlink_to(victim / "id_rsa")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(UsageError, match="'start'/'predictions-val.jsonl' is a link"):
        bring_logs(load_checkpoint(run / "checkpoint-4"), target, "checkpoint-2")
    assert list(target.iterdir()) == []
    (run / "start" / "predictions-val.jsonl").unlink()
    bring_logs(load_checkpoint(run / "checkpoint-4"), target, "checkpoint-2")
    assert (target / "checkpoint-2").is_dir() and not (target / "start").is_symlink()


def test_a_linked_parent_folder_is_the_users_own_choice(run, tmp_path):
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    go_on(tmp_path / "elsewhere" / "run")
    assert '"loss": 1.0' in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_links_are_no_checkpoints(run, victim, kind):
    (run / "checkpoint-9").symlink_to(run / "checkpoint-4")
    assert find_checkpoint(str(run))[0].step == 4
    (run / "checkpoint-9").unlink()
    file = run / "checkpoint-4" / "trainer_state.json"
    content = file.read_bytes()
    file.unlink()
    if kind == "file":
        (run / "same").write_bytes(content)
        file.symlink_to(run / "same")
    else:
        os.mkfifo(file)
    checkpoint, rejected = find_checkpoint(str(run))
    assert checkpoint.step == 2
    assert rejected[0].endswith("is a link" if kind == "file" else "is missing")


def test_a_checkpoint_under_another_steps_name_is_passed_over(run):
    (run / "checkpoint-4").rename(run / "checkpoint-6")
    checkpoint, rejected = find_checkpoint(str(run))
    assert checkpoint.step == 2
    assert rejected[0].endswith("is of step 4, so the folder is not checkpoint-6")
