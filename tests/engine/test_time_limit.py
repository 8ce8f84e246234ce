"""Protect that a call which hangs is ended, and leaves timers and handlers as they were.

Run: pytest tests/engine/test_time_limit.py
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import engine.time_limit
from engine.runtime import StopRequested
from engine.time_limit import TimedOut, TimeLimit

ROOT = Path(engine.time_limit.__file__).parents[1]
SECONDS = 0.15


def spin() -> None:
    while True:
        pass


def read_a_socket_that_nobody_writes() -> None:
    one, other = socket.socketpair()
    with one, other:
        one.recv(1)


def wait_for_a_thread() -> None:
    """Wait for a worker twice: for its result, and again when the pool is closed."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 0.6).result()


def retry_for_ever() -> None:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def catch_everything_once() -> None:
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


HANGS: dict[str, Callable[[], object]] = {
    "Python code": spin,
    "sleep": lambda: time.sleep(60),
    "a lock": lambda: threading.Semaphore(0).acquire(),
    "a socket": read_a_socket_that_nobody_writes,
    "a process": lambda: subprocess.run(["sleep", "60"]),
    "a thread": wait_for_a_thread,
    "a regular expression": lambda: re.fullmatch("(a+)+b", "a" * 60),
    "a retry of every Exception": retry_for_ever,
    "a wait in its clean-up": catch_everything_once,
}


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """See that all is put back. The mark of a call that was cut off stays out of other tests."""
    monkeypatch.setattr(engine.time_limit, "_cut_off", False)
    handler, (left, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    yield
    assert signal.getsignal(signal.SIGALRM) is handler
    # of pytest's own limit of a test, which has gone on
    assert max(0.0, left - 60) <= signal.getitimer(signal.ITIMER_REAL)[0] <= left


@pytest.mark.parametrize("what", HANGS)
def test_a_call_that_hangs_is_ended(what):
    began = time.monotonic()
    with pytest.raises(TimedOut):
        TimeLimit(SECONDS).call(HANGS[what])
    assert SECONDS <= time.monotonic() - began < 10


def test_a_call_that_ends_in_time_returns_and_raises_what_it_does():
    limit = TimeLimit(60)
    assert limit.call(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        limit.call(lambda: 1 / 0)
    assert not engine.time_limit._cut_off


def test_each_call_has_the_whole_time():
    limit = TimeLimit(0.4)
    for _ in range(3):
        limit.call(time.sleep, 0.2)


def test_no_limit_touches_no_timer(monkeypatch):
    monkeypatch.setattr(signal, "setitimer", None)
    monkeypatch.setattr(signal, "signal", None)
    assert TimeLimit(0).call(divmod, 7, 2) == (3, 1)


def test_a_call_that_caught_its_interrupt_was_too_long_all_the_same():
    def caught() -> str:
        try:
            time.sleep(60)
        except BaseException:
            return "as if nothing had been"
        return ""

    with pytest.raises(TimedOut):
        TimeLimit(SECONDS).call(caught)


def test_off_the_main_thread_a_call_that_took_too_long_is_told_when_it_returns():
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(TimeLimit(SECONDS).call, time.sleep, 3 * SECONDS)
        assert isinstance(late.exception(), TimedOut)
        assert pool.submit(TimeLimit(60).call, divmod, 7, 2).result() == (3, 1)


# ---- timers of the user --------------------------------------------------------------------------
def test_a_timer_outside_the_call_goes_on_afterwards():
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    of_pytest = signal.setitimer(signal.ITIMER_REAL, 30.0, 7.0)
    try:
        TimeLimit(60).call(time.sleep, 0.2)
        left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 29.0 < left <= 29.8 and interval == pytest.approx(7.0)
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # due within the call: late, but not lost
        TimeLimit(60).call(time.sleep, 0.2)
        time.sleep(0.05)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, *of_pytest)
        signal.signal(signal.SIGALRM, before)


def test_a_call_may_have_a_time_limit_of_its_own():
    class Mine(Exception):
        pass

    def limited() -> str:
        def ring(number, frame):
            raise Mine

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(60)
        except Mine:
            return "in time"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return ""

    assert TimeLimit(30).call(limited) == "in time"


# ---- a signal that asks to stop ------------------------------------------------------------------
def test_once_a_stop_is_asked_for_the_call_has_a_short_grace(monkeypatch):
    monkeypatch.setattr(engine.time_limit, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(engine.time_limit, "GRACE", 0.2)
    asked = time.monotonic() + 0.2
    limit = TimeLimit(60, lambda: time.monotonic() > asked)
    limit.call(time.sleep, 0.05)
    began = time.monotonic()
    with pytest.raises(StopRequested):
        limit.call(time.sleep, 60)
    assert time.monotonic() - began < 10
    assert engine.time_limit._cut_off


def test_a_quick_call_is_not_cut_by_a_stop(monkeypatch):
    monkeypatch.setattr(engine.time_limit, "GRACE", 0.0)
    assert TimeLimit(60, lambda: True).call(divmod, 7, 2) == (3, 1)


# ---- the end of the process ----------------------------------------------------------------------
HANGING = """
import subprocess, sys, threading, time
from engine.time_limit import TimedOut, TimeLimit, end_process
def call():
    threading.Thread(target=time.sleep, args=(600,)).start()
    time.sleep({sleep})
try:
    TimeLimit(0.2).call(call)
except TimedOut:
    print("ended")
end_process(7)
"""


def test_a_thread_of_a_call_that_was_ended_does_not_hold_the_process():
    ended = subprocess.run(
        [sys.executable, "-c", HANGING.format(sleep=600)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, "ended\n", "")


def test_a_process_ends_as_ever_where_no_call_was_ended():
    with pytest.raises(SystemExit) as ended:
        engine.time_limit.end_process(3)
    assert ended.value.code == 3
