"""Say what a fault does: kill the process, raise, return, send a signal, hang, write a half.

An act is a function of the `Point` that was reached. `at_files` and `at_calls` (inject.py) take
one. It runs in the place of the operation or call: with `Point.go_on()` it does what would have
been done.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Point:
    """Hold one file operation or call that was reached.

    kind: such as "open", "write", "rename", or "call". name: the file's path in the watched folder,
    or the dotted name of the function. number: counted from 1 among those that are watched.
    go_on: does it, and returns its result. half: does the first half of a write, None elsewhere.
    """

    kind: str
    name: str
    number: int
    go_on: Callable[[], Any]
    half: Callable[[], Any] | None = None


Act = Callable[[Point], Any]


def kill(point: Point | None = None) -> None:
    """End this process by SIGKILL, before the operation."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal to oneself may take a moment to arrive


def then_kill(point: Point) -> None:
    """Do the operation, then end this process by SIGKILL."""
    point.go_on()
    kill()


def half_then_kill(point: Point) -> None:
    """Write the first half, then end this process by SIGKILL. What is no write is killed before."""
    if point.half is not None:
        point.half()
    kill()


def fails(number: int) -> Act:
    """Raise the OSError of an errno, such as ENOSPC, EDQUOT, EIO, EROFS, ESTALE."""

    def act(point: Point) -> None:
        raise OSError(number, os.strerror(number), point.name)

    return act


def half_then_fails(number: int) -> Act:
    """Write the first half, then raise the OSError of an errno, as a full disk does."""

    def act(point: Point) -> None:
        if point.half is not None:
            point.half()
        raise OSError(number, os.strerror(number), point.name)

    return act


def raises(error: BaseException | type[BaseException]) -> Act:
    """Raise an exception in the place of the call."""

    def act(point: Point) -> None:
        raise error

    return act


def returns(value: Any) -> Act:
    """Return a value in the place of the call. A function is called with the real result."""

    def act(point: Point) -> Any:
        return value(point.go_on()) if callable(value) else value

    return act


def sends(number: int, times: int = 1) -> Act:
    """Send this process a signal, then do the operation."""

    def act(point: Point) -> Any:
        for _ in range(times):
            os.kill(os.getpid(), number)
        return point.go_on()

    return act


def hangs(seconds: float = 600.0) -> Act:
    """Sleep, then do the operation. A signal's handler that raises ends it earlier."""

    def act(point: Point) -> Any:
        time.sleep(seconds)
        return point.go_on()

    return act
