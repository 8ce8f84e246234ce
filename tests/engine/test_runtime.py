"""Protect a run from its surroundings.

Checked: a signal stops it at a safe point, its directory is never overwritten or shared, and the
process ends with the documented exit code.

Run: python -m pytest tests/engine/test_runtime.py
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from data.files import sha256_of
from engine import runtime
from engine.config import ConfigError, UsageError
from engine.device import seed_everything
from engine.runtime import (
    SignalGuard,
    StepFailed,
    environment_banner,
    lock_run,
    main_guard,
    newest_finished_run,
    run_directory,
    versions,
)

REPOSITORY = Path(runtime.__file__).parents[1]


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)


# ---- signals -------------------------------------------------------------------------------------
EXIT_CODES = {
    signal.SIGHUP: 129,
    signal.SIGINT: 130,
    signal.SIGUSR1: 138,
    signal.SIGUSR2: 140,
    signal.SIGTERM: 143,
}


@pytest.fixture(autouse=True)
def hangups_are_heeded():
    """Undo what `nohup` did to the whole test run: there SIGHUP would stay ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "exit_code"), EXIT_CODES.items())
def test_a_signal_only_sets_the_flag_and_the_handlers_come_back(number, exit_code, capfd):
    before = {name: signal.getsignal(name) for name in EXIT_CODES}
    with SignalGuard() as guard:
        assert guard.stop is None and guard.exit_code == 0
        kill_self(number)
        assert guard.stop == number and guard.exit_code == exit_code
    assert {name: signal.getsignal(name) for name in before} == before
    assert number.name in capfd.readouterr().err


def test_the_handlers_come_back_after_an_error_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), SignalGuard():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("first", EXIT_CODES)
def test_an_interrupt_after_a_first_signal_stops_at_once(first):
    with SignalGuard() as guard:
        kill_self(first)
        with pytest.raises(KeyboardInterrupt):
            kill_self(signal.SIGINT)
        assert guard.stop == first


def test_further_termination_signals_do_not_enter_again(capfd):
    with SignalGuard() as guard:
        for _ in range(3):
            kill_self(signal.SIGTERM)
        assert guard.exit_code == 143
    assert capfd.readouterr().err.count("SIGTERM") == 1


@pytest.mark.parametrize("first", EXIT_CODES)
@pytest.mark.parametrize("second", [name for name in EXIT_CODES if name != signal.SIGINT])
def test_a_second_signal_of_another_kind_changes_nothing(first, second, capfd):
    with SignalGuard() as guard:
        kill_self(first)
        kill_self(second)
        assert guard.stop == first
    assert capfd.readouterr().err.count("SIG") == 1


def test_what_was_ignored_at_the_start_stays_ignored():
    """As nohup has it: the run goes on where its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalGuard() as guard:
            kill_self(signal.SIGHUP)
            assert guard.stop is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", EXIT_CODES)
def test_a_forked_worker_dies_by_the_signal_and_leaves_the_guard_alone(number, capfd):
    with SignalGuard() as guard:
        child = os.fork()
        if child == 0:
            kill_self(number)
            os._exit(0)  # reached only if the inherited handler swallowed the signal
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number
        assert guard.stop is None
    assert capfd.readouterr().err == ""


# A process that begins as a script does, and waits where libraries and weights are read.
LOADING = """
import sys
from engine.runtime import SignalGuard, accepted, main_guard
sys.argv = ["run"]
accepted(lambda argv: True)
def wait(text):
    print(text, flush=True)
    sys.stdin.read()
def main():
    try:
        wait("weights")
    finally:
        print("closed", flush=True)
if sys.stdin.readline() == "libraries\\n":
    wait("libraries")
sys.exit(main_guard(main))
"""


def stopped_while_loading(place: str, *numbers: signal.Signals, nohup: bool = False):
    """Start that process, send it the signals at a place -> (exit code, its stdout, its stderr)."""
    with subprocess.Popen(
        [*(["nohup"] if nohup else []), sys.executable, "-c", LOADING],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdin.write(f"{place}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{place}\n"
        for number in numbers:
            process.send_signal(number)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), EXIT_CODES.items())
def test_a_signal_before_training_ends_the_process_at_once(number, code):
    place = "libraries" if number == signal.SIGTERM else "weights"
    closed = "" if place == "libraries" else "closed\n"
    assert stopped_while_loading(place, number) == (code, closed, f"\n{number.name}: stopped\n")


def test_nohup_holds_before_training_too():
    assert stopped_while_loading("weights", signal.SIGHUP, nohup=True)[:2] == (0, "closed\n")


# ---- run directory -------------------------------------------------------------------------------
def test_default_directories_are_named_by_time_and_unique_within_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(
        runtime.time, "strftime", lambda form: {"%Y%m%d-%H%M%S": "20250102-030405"}[form]
    )
    made = [
        run_directory(None, kind, root=tmp_path / "runs") for kind in ("sft", "sft", "grpo", "sft")
    ]
    assert [path.relative_to(tmp_path).as_posix() for path in made] == [
        "runs/20250102-030405-sft",
        "runs/20250102-030405-sft-2",
        "runs/20250102-030405-grpo",
        "runs/20250102-030405-sft-3",
    ]
    assert all(path.is_dir() for path in made)


def test_an_output_directory_with_content_is_refused_and_left_alone(tmp_path):
    target = tmp_path / "a" / "b"
    assert run_directory(str(target), "sft") == target and target.is_dir()
    (target / runtime.LOCK_FILE).touch()  # what an earlier start that failed at once leaves
    run_directory(target, "sft")
    (target / "config.json").write_text("{}")
    with pytest.raises(
        UsageError, match=r"b is not empty \(it holds config.json\).*--resume_from_checkpoint"
    ):
        run_directory(target, "sft")
    with pytest.raises(UsageError, match="nothing is overwritten: name another folder$"):
        run_directory(target, "report")  # which cannot be resumed
    assert (target / "config.json").read_text() == "{}"


def test_an_output_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--output_dir .*file: cannot be used: File exists"):
        run_directory(tmp_path / "file", "sft")
    with pytest.raises(UsageError, match="--output_dir .*sub: cannot be used: Not a directory"):
        run_directory(tmp_path / "file" / "sub", "sft")


LOCK_IN_ANOTHER_PROCESS = """
import sys
from pathlib import Path
from engine.runtime import lock_run, main_guard
def main():
    with lock_run(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.read()
sys.exit(main_guard(main))
"""


def test_two_processes_cannot_share_a_run(tmp_path):
    command = [sys.executable, "-c", LOCK_IN_ANOTHER_PROCESS, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(UsageError, match=rf"in use by another run \(process {other.pid}\)"),
            lock_run(tmp_path),
        ):
            pass
        other.kill()  # without a chance to clean up: the kernel lets go
        other.wait()
    with lock_run(tmp_path):
        refused = subprocess.run(
            command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert refused.returncode == 2
        assert (
            refused.stderr
            == f"error: {tmp_path} is in use by another run (process {os.getpid()})\n"
        )
    with lock_run(tmp_path):  # released at the end of the block
        pass


def test_a_directory_that_cannot_hold_a_lock_is_refused(tmp_path):
    with (
        pytest.raises(UsageError, match="gone cannot be written to: No such file or directory"),
        lock_run(tmp_path / "gone"),
    ):
        pass


def finish(run: Path) -> None:
    run.mkdir()
    for name in ("config.json", "adapter_config.json"):
        (run / name).write_text("{}")
    save_file({"lora": np.zeros(2)}, run / "adapter_model.safetensors")


def test_the_newest_finished_run_of_a_kind(tmp_path):
    assert newest_finished_run(tmp_path / "none", "sft") is None
    assert newest_finished_run(tmp_path, "sft") is None
    for name in (
        "20250101-000000-sft",
        "20250102-000000-sft-9",
        "20250102-000000-sft-10",
        "20250103-000000-grpo",
        "zz-sft",
    ):
        finish(tmp_path / name)
    finish(tmp_path / "20250104-000000-sft")
    # still running, or stopped early
    (tmp_path / "20250104-000000-sft" / "adapter_model.safetensors").unlink()
    assert newest_finished_run(tmp_path, "sft") == tmp_path / "20250102-000000-sft-10"
    assert newest_finished_run(tmp_path, "grpo") == tmp_path / "20250103-000000-grpo"


def test_the_newest_finished_run_of_a_base(tmp_path):
    """GRPO of one base must not start from a newer adapter of another."""
    for day, base in enumerate(("one", "one", "other", None), start=1):
        run = tmp_path / f"2025010{day}-000000-sft"
        finish(run)
        named = json.dumps({"base_model_name_or_path": base})
        (run / "adapter_config.json").write_text(named if base else "")  # the newest is damaged
    assert newest_finished_run(tmp_path, "sft", "one") == tmp_path / "20250102-000000-sft"
    assert newest_finished_run(tmp_path, "sft", "other") == tmp_path / "20250103-000000-sft"
    assert newest_finished_run(tmp_path, "sft", "third") is None
    assert newest_finished_run(tmp_path, "sft") == tmp_path / "20250103-000000-sft"


@pytest.mark.parametrize("size", [0, 20, -1])
def test_a_run_whose_adapter_is_damaged_is_not_the_newest(tmp_path, size):
    """As a power cut can leave it: an older run is whole."""
    for day in (1, 2):
        finish(tmp_path / f"2025010{day}-000000-sft")
    weights = tmp_path / "20250102-000000-sft/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert newest_finished_run(tmp_path, "sft") == tmp_path / "20250101-000000-sft"


# ---- facts about the run -------------------------------------------------------------------------
def test_seeding_fixes_every_global_source():
    def draws():
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    seed_everything(3)
    first = draws()
    seed_everything(3)
    assert draws() == first
    seed_everything(4)
    assert all(now != then for now, then in zip(draws(), first, strict=True))


def test_the_hash_of_a_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert (
        sha256_of(tmp_path / "abc")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_the_banner_names_device_and_versions():
    assert versions()["torch"].startswith(torch.__version__.split("+")[0]) and versions()[
        "python"
    ].startswith("3.")
    assert environment_banner(torch.device("cpu")).startswith("device cpu | python 3.")


# ---- exit codes ----------------------------------------------------------------------------------
class DataError(ValueError):
    problems = ["row 1", "row 2"]


def raising(error: BaseException):
    def main():
        raise error

    return main


def test_exit_codes_and_messages(capsys):
    assert main_guard(lambda: None) == 0
    assert main_guard(lambda: 143) == 143
    assert main_guard(raising(ConfigError(["--a: bad", "--b: bad"]))) == 2
    assert capsys.readouterr().err == "error: --a: bad\nerror: --b: bad\n"
    assert main_guard(raising(DataError("both")), errors=(DataError,)) == 2
    assert capsys.readouterr().err == "error: row 1\nerror: row 2\n"
    assert main_guard(raising(FileNotFoundError("no x")), errors=(OSError,)) == 2
    assert capsys.readouterr().err == "error: no x\n"
    assert main_guard(raising(StepFailed("the reward of e1 is NaN"))) == 1
    assert capsys.readouterr().err == "error: the reward of e1 is NaN\n"
    assert main_guard(raising(KeyboardInterrupt())) == 130


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_is_one_line(number, capsys):
    reason = os.strerror(number)
    assert main_guard(raising(OSError(number, reason, "runs/a/scores.json"))) == 1
    assert capsys.readouterr().err == f"error: runs/a/scores.json: {reason}\n"
    assert main_guard(raising(OSError(number, "checkpoint x was not saved"))) == 1
    assert capsys.readouterr().err == "error: checkpoint x was not saved\n"
    with pytest.raises(FileNotFoundError):  # a fault of ours
        main_guard(raising(FileNotFoundError(errno.ENOENT, "no x")))


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError, match="a shape"):
        main_guard(raising(ValueError("a shape")), errors=(DataError,))
