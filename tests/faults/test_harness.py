"""Protect the harness: a fault falls where it is asked for, once, and leaves nothing behind.

Run: pytest tests/faults/test_harness.py
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from data.files import write_json, write_jsonl
from engine.checkpoint import point_link, save_checkpoint
from engine.tracking import RunLogger
from tests.faults import compare
from tests.faults.acts import (
    fails,
    half_then_fails,
    half_then_kill,
    hangs,
    kill,
    raises,
    returns,
    sends,
    then_kill,
)
from tests.faults.children import forked, fresh
from tests.faults.compare import differences, masked
from tests.faults.inject import at_calls, at_files


def two_files(argv: list[str]) -> int:
    """Write two files and rename one, as a run does with a record."""
    folder = Path(argv[0])
    folder.mkdir(exist_ok=True)
    with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 1}\n')
    (folder / ".tmp-record").write_text("record")
    os.replace(folder / ".tmp-record", folder / "record")
    return 0


# mkdir, open/write/close of the log, open/write/close of the record, its rename
WHOLE = ["mkdir", "open", "write", "close", "open", "write", "close", "replace"]


# ---- files ---------------------------------------------------------------------------------------
def test_operations_are_seen_by_kind_and_name(tmp_path):
    before = builtins.open, os.open, os.replace
    with at_files(tmp_path / "run") as seen:
        two_files([str(tmp_path / "run")])
        (tmp_path / "outside").write_text("not counted")
        (tmp_path / "run/record").read_text()  # reading neither
    assert [point.kind for point in seen] == WHOLE
    assert [point.name for point in seen] == [
        ".", *["log.jsonl"] * 3, *[".tmp-record"] * 3, "record"
    ]  # fmt: skip
    assert [point.number for point in seen] == list(range(1, 9))
    assert (builtins.open, os.open, os.replace) == before


def test_every_way_to_change_a_folder_is_seen(tmp_path):
    (tmp_path / "tree/inner").mkdir(parents=True)
    (tmp_path / "tree/inner/file").write_text("x")
    with at_files(tmp_path) as seen:
        descriptor = os.open(tmp_path / "raw", os.O_WRONLY | os.O_CREAT)
        os.write(descriptor, b"abc")
        os.fsync(descriptor)
        os.close(descriptor)
        os.symlink("raw", tmp_path / "link")
        shutil.copyfile(tmp_path / "raw", tmp_path / "copy")
        shutil.rmtree(tmp_path / "tree")  # by descriptors of folders
        (tmp_path / "raw").unlink()
    assert [(point.kind, point.name) for point in seen] == [
        ("open", "raw"), ("write", "raw"), ("fsync", "raw"), ("symlink", "link"),
        ("open", "copy"), ("sendfile", "copy"), ("sendfile", "copy"), ("close", "copy"),
        ("unlink", "tree/inner/file"), ("rmdir", "tree/inner"), ("rmdir", "tree"),
        ("unlink", "raw"),
    ]  # fmt: skip


def test_an_error_falls_once_or_for_ever_at_the_chosen_kind(tmp_path):
    folder = tmp_path / "run"
    with at_files(folder, 2, fails(errno.ENOSPC), kinds=["write"]) as seen:
        with pytest.raises(OSError, match="No space left") as error:
            two_files([str(folder)])
        assert error.value.errno == errno.ENOSPC and len(seen) == 2
        two_files([str(folder)])  # the disk has room again
    with at_files(folder, 1, fails(errno.EIO), names="*record", times=None):
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                two_files([str(folder)])
    assert (folder / "log.jsonl").read_text().count("\n") == 4


def test_half_a_write_is_half_a_write(tmp_path):
    folder = tmp_path / "run"
    with (
        at_files(folder, 1, half_then_fails(errno.EDQUOT), kinds=["write"]),
        pytest.raises(OSError, match="quota"),
    ):
        two_files([str(folder)])
    assert (folder / "log.jsonl").read_text() == '{"step": 1}\n'[:6]


@pytest.mark.parametrize(
    ("act", "log", "record"),
    [(kill, "", None), (half_then_kill, '{"step', None), (then_kill, "", None)],
)
def test_a_kill_leaves_what_was_on_the_disk(tmp_path, act, log, record):
    """The text of `then_kill` is in a buffer of Python's, which dies with the process."""
    ended = forked(two_files, [str(tmp_path / "run")], faults=[at_files(tmp_path / "run", 3, act)])
    assert (ended.code, ended.signal) == (None, signal.SIGKILL)
    assert (tmp_path / "run/log.jsonl").read_text() == log
    assert not (tmp_path / "run/record").exists()


def test_the_files_of_a_checkpoint_and_a_log_are_seen(tmp_path):
    """What the campaign kills at: 3 files of a checkpoint with their fsync, its rename, a link."""
    with at_files(tmp_path, main_thread=True) as seen:
        path = save_checkpoint(
            tmp_path, 3, tensors={"a": {"x": torch.ones(2)}}, records={"b.json": {"y": 1}}
        )
        point_link(tmp_path, "last", path)
        write_json(tmp_path / "config.json", {})
        with RunLogger(tmp_path) as log:
            log.scalars(1, {"loss": 1.0})
    kinds = [point.kind for point in seen]
    assert kinds.count("fsync") >= 4 and "symlink" in kinds
    names = {point.name.split("/")[-1] for point in seen}
    assert {"a.safetensors", "b.json", "manifest.json", "last", "metrics.jsonl"} <= names


# ---- calls ---------------------------------------------------------------------------------------
def test_a_call_is_counted_by_the_name_that_its_caller_uses():
    real = json.dumps
    with at_calls("json.dumps", 2, raises(MemoryError("no room"))) as seen:
        assert json.dumps(1) == "1"
        with pytest.raises(MemoryError, match="no room"):
            json.dumps(2)
        assert json.dumps(3) == "3" and len(seen) == 3
    assert json.dumps is real


def test_calls_of_methods_can_return_something_else_hang_or_send_a_signal():
    with at_calls("pathlib.Path.exists", 1, returns(False), times=None):
        assert not Path("/").exists()
    with at_calls("pathlib.Path.exists", 1, returns(lambda real: not real)):
        assert not Path("/").exists() and Path("/").exists()
    with at_calls("pathlib.Path.cwd", 1, returns(Path("/there"))):  # a class method
        assert Path.cwd() == Path("/there") and Path.cwd() != Path("/there")
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    with at_calls("pathlib.Path.exists", 1, sends(signal.SIGUSR1, times=1)):
        assert Path("/").exists()
    signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1]
    began = time.monotonic()
    with at_calls("pathlib.Path.exists", 1, hangs(0.05)):
        assert Path("/").exists()
    assert time.monotonic() - began >= 0.05
    with pytest.raises(AttributeError), at_calls("json.no_such_function"):
        pass


# ---- children ------------------------------------------------------------------------------------
def test_a_forked_child_ends_as_its_script_would(tmp_path):
    def speaks(argv):
        print("out", argv[0])
        print("err", file=sys.stderr)
        return 3

    ended = forked(speaks, ["x"])
    assert (ended.code, ended.signal, ended.out, ended.err) == (3, None, "out x\n", "err\n")

    def breaks(argv):
        raise KeyError("a bug")

    ended = forked(breaks, [])
    assert ended.code == 1 and ended.err.splitlines()[-1] == "KeyError: 'a bug'"

    def stops(argv):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    assert forked(stops, []).code == 130
    assert forked(lambda argv: os.chdir("data"), [], into=Path(__file__).parents[2]).code == 0


def sleeper(argv: list[str]) -> None:
    time.sleep(30)


def test_a_child_is_killed_at_a_time_and_says_where_it_was():
    ended = forked(sleeper, [], after=[(0.2, signal.SIGKILL)])
    assert ended.signal == signal.SIGKILL and 0.2 <= ended.seconds < 5 and not ended.timed_out
    assert ended.where[0] == "sleeper"
    slow = forked(sleeper, [], limit=0.2)
    assert slow.timed_out and slow.where[0] == "sleeper"


def test_streams_can_be_closed_missing_or_left_by_their_reader():
    def prints(argv):
        for number in range(5):
            print(number, flush=True)
            time.sleep(0.05)

    assert forked(prints, [], stdout="closed").code == 141
    head = forked(prints, [], stdout=2)
    assert head.out == "0\n1\n" and head.code == 141
    nowhere = forked(prints, [], stdout="missing", stderr="missing")
    assert (nowhere.code, nowhere.out, nowhere.err) == (0, "", "")


def test_a_fresh_interpreter_has_the_same_streams_and_signals():
    ended = fresh(["-c", "import sys; print(sys.flags.utf8_mode); sys.exit(4)"])
    assert (ended.code, ended.out) == (4, "0\n")
    assert fresh(["-c", "import sys; sys.exit(sys.stderr is None)"], stderr="missing").code == 1
    slow = ["-c", "import time; time.sleep(30)"]
    assert fresh(slow, after=[(0.2, signal.SIGTERM)]).signal == signal.SIGTERM
    assert fresh(slow, limit=0.2).timed_out
    closed = fresh(["-c", "print(1)"], stdout="closed", environment={"PYTHONUNBUFFERED": "1"})
    assert closed.code == 1 and "BrokenPipeError" in closed.err


# ---- comparison ----------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Make two equal folders of a run, written at different times and places."""
    made = tmp_path / "one", tmp_path / "two"
    for number, folder in enumerate(made):
        folder.mkdir()
        path = save_checkpoint(
            folder,
            2,
            tensors={"adapter_model": {"x": torch.ones(3)}},
            records={"trainer_state.json": {"step_time": number, "global_step": 2}},
        )
        point_link(folder, "last", path)
        save_file({"x": torch.ones(3)}, folder / "adapter_model.safetensors")
        write_json(
            folder / "config.json",
            {"output_dir": {"value": str(folder)}, "lr": 1, "versions": number},
        )
        (folder / ".lock").write_text(str(number))
        with RunLogger(folder) as log:
            for step in (1, 2):
                log.scalars(step, {"loss": 1.0 / step, "step_time": number + step})
            log.text("sample", f"in {0}", 2)
    return made


def test_two_runs_are_equal_but_for_times_and_places(folders):
    assert differences(*folders) == {}
    assert masked({"time/rollout": 1, "a": [{"step_time": 2, "b": 3}]}) == {"a": [{"b": 3}]}


def swapped_point(folder: Path) -> None:
    (path,) = folder.glob("events.out.tfevents.*")
    path.unlink()
    with SummaryWriter(str(folder)) as writer:
        writer.add_scalar("train/loss", 1.0, 1)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda f: save_file({"x": torch.ones(3) + 1e-7}, f / "adapter_model.safetensors"),
         "state", "1 of 1 tensors differ: x"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "state", "is missing"),
        (lambda f: (f / ".tmp-x").mkdir(), "state", ".tmp-x: should not be there"),
        (lambda f: (f / "checkpoint-2/trainer_state.json").write_text("{}"),
         "state", "global_step is missing"),
        (lambda f: write_json(f / "config.json", {"lr": 2}), "state", "lr: 2, not 1"),
        (lambda f: point_link(f, "last", f / "checkpoint-1"),
         "links", "points to checkpoint-1, not checkpoint-2"),
        (lambda f: (f / "last").unlink(), "links", "is missing"),
        (lambda f: write_jsonl(f / "metrics.jsonl", [{"step": 1}] * 3), "logs", "split is missing"),
        (lambda f: (f / "metrics.after-1.jsonl").write_text('{"step": 2, "loss": 9}\n'),
         "logs", "a line that was set aside was not written again"),
        (swapped_point, "TensorBoard", "train/loss: 1 entries, not 2"),
    ],
)  # fmt: skip
def test_each_difference_is_told_under_its_kind(folders, change, kind, said):
    change(folders[1])
    found = differences(*folders)
    assert list(found)[:1] == [kind] and any(said in line for line in found[kind]), found


def test_lines_that_were_set_aside_and_written_again_are_no_difference(folders):
    log = (folders[1] / "metrics.jsonl").read_text()
    last = log.splitlines()[-1].replace('"step_time": 3.0', '"step_time": 9.0')
    (folders[1] / "metrics.after-1.jsonl").write_text(f'{last}\n{{"step": 2, "tor')
    assert differences(*folders) == {}


def test_the_data_server_drops_what_a_smaller_step_follows(tmp_path):
    for steps in ((1, 2, 3), (3, 4)):
        with RunLogger(tmp_path, resume_step=None if steps[0] == 1 else 2) as log:
            for step in steps:
                log.scalars(step, {"loss": float(10 * steps[0] + step)})
        time.sleep(1.1)  # event files are named by the second
    points = compare.as_data_server(tmp_path)["train/loss"]
    assert points == [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0)]
    assert compare.tensorboard_of(tmp_path)[".: train/loss"] == points
