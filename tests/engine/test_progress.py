"""Protect the bar of a run, and the plain lines where there is no terminal.

Run: pytest tests/engine/test_progress.py
"""

from __future__ import annotations

import io

import pytest

from engine import progress as module
from engine.progress import Progress


class Console(io.StringIO):
    def __init__(self, *, terminal: bool = False):
        super().__init__()
        self.isatty = lambda: terminal


def console_at(monkeypatch, times: list[float], **options) -> list[str]:
    """Return the lines of a run whose updates come at these times, the first being its start."""
    clock = iter(times)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    console = Console()
    with Progress(stream=console, interval=30.0, **options) as progress:
        for step in range(len(times) - 1):
            progress.update({"loss": 1 / (step + 3), "note": "ok"})
    return console.getvalue().splitlines()


def test_without_a_terminal_there_are_plain_lines_no_more_often_than_the_interval(monkeypatch):
    times = [0.0, 10.0, 20.0, 39.9, 40.0, 41.0]
    # shown: the first (10 s), the fourth (30 s after it) and the last step. None has 5 steps since
    # the first update and a step to go, so none tells how much time is left.
    assert console_at(monkeypatch, times, total=10, initial=5, description="SFT") == [
        "SFT 6/10 loss=0.3333 note=ok [00:10]",
        "SFT 9/10 loss=0.1667 note=ok [00:40]",
        "SFT 10/10 loss=0.1429 note=ok [00:41]",
    ]


def test_the_time_that_is_left_is_told_once_it_is_settled_and_without_what_came_before(monkeypatch):
    # An evaluation of 100 s comes before the first step, then a step takes 8 s. The old way, the
    # first line would have said 399 x 108 s, 11:58:12.
    times = [0.0, *(108.0 + 8 * n for n in range(9))]
    lines = console_at(monkeypatch, times, total=400, description="GRPO")
    assert [line.rpartition("[")[2] for line in lines] == [
        "01:48]",
        "02:20]",  # step 5: 4 steps and 32 s since the first update
        "02:52<52:08]",  # step 9: 64 s for 8 steps, so 391 x 8 s = 3128 s remain
    ]
    # 6 steps in 3 s are no pace yet
    quick = console_at(monkeypatch, [0.0, 0.5, 1, 1.5, 2, 2.5, 30.6], total=99, description="x")
    assert quick[-1].endswith("6/99 loss=0.125 note=ok [00:30<09:19]")  # 30.1 s / 5 x 93 = 559.9 s
    lines = console_at(monkeypatch, [0.0, 40.0, 41, 42, 43, 44, 45, 70], total=99, description="x")
    assert [line.rpartition("[")[2] for line in lines] == ["00:40]", "01:10<07:40]"]  # 30 / 6 x 92


def test_what_is_done_at_once_has_one_line(monkeypatch):
    lines = console_at(
        monkeypatch, [0.0, 0.1, 3.0, 8.0], total=3, description="site-a", show_first=False
    )
    assert lines == ["site-a 3/3 loss=0.2 note=ok [00:08]"]
    # what is not done after the interval tells so then
    lines = console_at(
        monkeypatch, [0.0, 1.0, 31.0, 35.0], total=9, description="site-a", show_first=False
    )
    assert lines == ["site-a 2/9 loss=0.25 note=ok [00:31]"]


def test_a_bar_tells_no_time_before_it_is_settled(monkeypatch):
    console, clock = Console(terminal=True), iter([0.0, *(100.0 + 4 * n for n in range(6))])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with Progress(100, description="GRPO", stream=console) as progress:
        progress._bar.mininterval = 0.0  # every update is drawn
        for _ in range(6):
            progress.update({"reward": 1.0})
    drawn = [line for line in console.getvalue().split("\r") if "/100" in line]
    assert not any("<" in line for line in drawn if " 6/100" not in line)
    assert any(" 6/100" in line and "<06:16, reward=1]" in line for line in drawn)  # 94 x 4 s


def test_a_terminal_gets_a_bar_and_lines_do_not_break_it():
    console = Console(terminal=True)
    with Progress(4, initial=3, description="GRPO", stream=console) as progress:
        progress.write("a line")
        progress.update({"reward": 1.0})
    assert (
        "a line\n" in console.getvalue()
        and "4/4" in console.getvalue()
        and "reward=1" in console.getvalue()
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_an_odd_console_never_raises(terminal):
    class Broken(Console):
        def write(self, text):
            raise BrokenPipeError

    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    progress = Progress(2, stream=ascii_only)
    progress.write("caf\u00e9")
    ascii_only.seek(0)
    assert ascii_only.read() == "caf?\n"

    closed = Console(terminal=terminal)
    progress = Progress(2, stream=closed)
    closed.close()
    for silent in (progress, Progress(2, stream=Broken())):
        silent.update({"loss": 1.0})
        silent.write("x")
        silent.update()
        silent.close()


def test_a_stream_that_cannot_say_whether_it_is_a_terminal_gets_plain_lines(monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    Progress(1, stream=closed).update()
    monkeypatch.setattr(module.sys, "stderr", None)
    progress = Progress(1)
    progress.update()
    assert capsys.readouterr().out == ""
