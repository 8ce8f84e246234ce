"""Protect users of several processes: torchrun never runs a command once for each of them.

Four commands share their work among ranks. Every other one refuses, in one line.

Run: pytest tests/scripts/test_one_process.py
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Iterator

import pytest

import data.command_line
import eval.evaluate
from data.command_line import LAUNCHERS, exit_code
from engine.runtime import SIGNALS, main_guard
from tests.helpers.repository import ROOT, product_files

OF_RANKS = {"run_sft", "run_grpo", "eval.evaluate", "eval.matrix"}
COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in product_files()
    if 'if __name__ == "__main__":\n' in file.read_text(encoding="utf-8")
)
LINE = "this command is one process, and torchrun has started 2: start it without torchrun"


@pytest.fixture(autouse=True)
def signals_stay() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def started(monkeypatch, rank: int, size: int = 2, launcher: str = "torchrun") -> list[float]:
    """Let this process be one that a launcher has started -> the seconds that it sleeps."""
    slept: list[float] = []
    count, number = LAUNCHERS[launcher]
    monkeypatch.setenv(count, str(size))
    monkeypatch.setenv(number, str(rank))
    monkeypatch.setattr(data.command_line.time, "sleep", slept.append)
    return slept


def test_the_commands_are_known():
    assert set(COMMANDS) > OF_RANKS | {"data.table", "eval.report", "engine.merge"}


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - OF_RANKS))
def test_a_command_of_one_process_is_not_run_twice(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", [command, "--flags", "that", "nobody", "knows"])
    monkeypatch.chdir(tmp_path)
    for rank, expected in ((0, f"error: {LINE}\n"), (1, "")):
        slept = started(monkeypatch, rank)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{command.replace('.', '/')}.py"), run_name="__main__")
        told = capsys.readouterr()
        assert (end.value.code, told.out, told.err) == (2, "", expected)
        # torchrun ends rank 0 as soon as another has ended, before it can say why
        assert slept == [5.0] * rank
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_copies_of_any_launcher_are_refused(launcher, monkeypatch, capsys):
    started(monkeypatch, 0, 3, launcher)
    assert exit_code(lambda: pytest.fail("called")) == 2
    expected = f"{launcher} has started 3: start it without {launcher}"
    assert expected in capsys.readouterr().err
    started(monkeypatch, 0, 1, launcher)
    assert exit_code(lambda: 7) == 7  # the only one


def test_a_command_of_ranks_is_called(monkeypatch):
    started(monkeypatch, 1)
    assert exit_code(lambda: 7, of_ranks=True) == main_guard(lambda: 7, of_ranks=True) == 7


def test_kept_answers_are_scored_by_one_process(monkeypatch, capsys, tmp_path):
    """Though the same command decodes with several."""
    launch = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    for name, value in (launch | {"MASTER_ADDR": "here", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "answers.jsonl").write_text("")
    files = ["--predictions", f"a={tmp_path / 'answers.jsonl'}", "--output_dir", str(tmp_path)]
    assert eval.evaluate.main(files) == 2
    line = "error: --predictions: kept answers are scored by one process; start it without torchrun"
    assert capsys.readouterr().err == f"{line}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
