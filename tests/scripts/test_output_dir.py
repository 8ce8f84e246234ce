"""Protect --output_dir: what is wrong with it is told before a model is loaded, in one line.

Run: pytest tests/scripts/test_output_dir.py
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

import engine.base_model
import engine.merge
import eval.evaluate
import eval.figures
import eval.matrix
import eval.report
from data.files import DataError
from engine.config import UsageError
from engine.runtime import check_output_dir, check_writable, lock_run, main_guard
from engine.settings import resolve_sft
from rl.settings import resolve_grpo
from tests.helpers.runs import sft, snapshot


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def no_weights(monkeypatch) -> None:
    """Fail where a model is loaded from now on."""
    monkeypatch.setattr(
        engine.base_model.AutoModelForImageTextToText,
        "from_pretrained",
        lambda *_, **__: pytest.fail("weights were read"),
    )


def wrong_places() -> dict[str, str]:
    """Make what is in the way -> {--output_dir: what its message ends with}."""
    Path("file").write_text("x")
    return {
        "file": "Not a directory",
        "file/below": "Not a directory",
        "n" * 300: "File name too long",
        "/proc/nowhere": "No such file or directory",
        "/sys/nowhere/below": "Operation not permitted",
    }


def refusal(output_dir: str) -> str:
    with pytest.raises(UsageError) as error:
        check_writable(output_dir)
    [line] = error.value.problems
    return line


def test_what_forbids_a_folder_is_named_and_nothing_is_left():
    places = wrong_places()
    before = snapshot(Path())
    for place in places:
        assert refusal(place).startswith(f"--output_dir {place[:200]}")
        assert ": cannot be used: " in refusal(place) and len(refusal(place)) < 300
    assert refusal("file/below").endswith("Not a directory")
    assert refusal("n" * 300).endswith("File name too long")
    assert refusal("a\0b").endswith("null byte")
    check_writable("new/folder/below")
    assert snapshot(Path()) == before and not Path("new").exists()


def test_a_parent_without_permission(monkeypatch):
    """As a user sees it. Root may write everywhere, so the system's answer is put in its place."""

    def refused(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    assert refusal("below") == "--output_dir below: cannot be used: Permission denied"
    with pytest.raises(UsageError, match="^--output_dir runs: cannot be used: Permission denied$"):
        check_output_dir(None, "sft")


def test_a_folder_in_use_is_refused_before_the_start():
    with Path("held.lock").open("a+") as other:
        Path("held").mkdir()
        os.rename("held.lock", "held/.lock")
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.write("4711")
        other.flush()
        with pytest.raises(UsageError, match=r"^held is in use by another run \(process 4711\)$"):
            check_output_dir("held", "sft")
    check_output_dir("held", "sft")  # let go of
    with lock_run(Path("held")):
        pass


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300, "/proc/nowhere"])
def test_no_command_loads_a_model_for_a_folder_that_cannot_be(
    place, tiny_checkpoint, tiny_sft_run, tiny_data, monkeypatch, capsys
):
    wrong_places()
    model, data = str(tiny_checkpoint("qwen2_5_vl")), str(tiny_data)
    run = str(tiny_sft_run("qwen2_5_vl"))
    no_weights(monkeypatch)
    capsys.readouterr()
    base = ["--model_name_or_path", model]
    adapter = ["--adapter_name_or_path", run]
    commands = {
        resolve_sft: [*base, "--train_file", data],
        resolve_grpo: [*adapter, "--train_file", data],
        eval.evaluate.main: [*base, "--data_file", f"a={data}"],
        eval.matrix.main: ["--model", f"a={model}", "--prompt", "demo", "--data_file", f"a={data}"],
        eval.report.main: [run],
        eval.figures.main: [run],
        engine.merge.main: adapter,
    }
    for main, flags in commands.items():
        code = main_guard(
            lambda main=main, flags=flags: main([*flags, "--output_dir", place]),
            errors=(DataError,),
        )
        lines = capsys.readouterr().err.splitlines()
        assert code == 2 and len(lines) == 1, (main, lines)
        assert lines[0].startswith(f"error: --output_dir {place[:200]}"), main


def test_a_run_that_is_held_is_not_resumed(tiny_sft_run):
    run = tiny_sft_run("qwen2_5_vl")
    with (run / ".lock").open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UsageError, match="is in use by another run"):
            resolve_sft(["--resume_from_checkpoint", str(run)])
        resolve_sft(["--resume_from_checkpoint", str(run), "--dry_run"])
        resolve_sft(["--resume_from_checkpoint", str(run), "--output_dir", "elsewhere"])


def test_a_dry_run_writes_nothing_and_needs_no_folder(tiny_checkpoint, tiny_data):
    Path("file").write_text("x")
    flags = ["--model_name_or_path", str(tiny_checkpoint("qwen2_5_vl"))]
    flags += ["--train_file", str(tiny_data), "--output_dir", "file", "--show_batch"]
    resolve_sft(flags)


def test_the_check_is_made_before_the_run(tiny_checkpoint, tiny_data):
    Path("file").write_text("x")
    with pytest.raises(UsageError, match="^--output_dir file: cannot be used: "):
        sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, Path("file"))
