"""End a call that takes longer than it may, so that no code of the user hangs a run.

The timer of the process (SIGALRM) interrupts the main thread: Python code, `time.sleep`, sockets,
locks, waits for threads and processes, `re`. A call outside Python that never looks at signals
cannot be ended so. In another thread than the main one nothing is interrupted, and a call that took
too long is told when it returns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar

from engine.runtime import StopRequested

Result = TypeVar("Result")

# Seconds between two looks at the clock. The call is interrupted again at each look, because what
# interrupts it may be caught there, or meet a wait in its clean-up.
LOOK_EVERY = 1.0
# Seconds that calls may still take once a signal has asked to stop. Batch systems kill 30 seconds
# after it, and the run must be saved by then.
GRACE = 5.0

_cut_off = False  # whether a call was ended that may have left threads or processes behind


class TimedOut(BaseException):
    """Report a call that took too long. No `except Exception` of the call may hold it back."""


class TimeLimit:
    """Call functions that may hang: `limit.call(function, *arguments)`.

    seconds: that one call may take. 0 for no limit, and then nothing is interrupted.
    should_stop: tells whether a signal has asked to stop. GRACE seconds later the call that is
    under way is ended by StopRequested.
    """

    def __init__(self, seconds: float = 0.0, should_stop: Callable[[], bool] = lambda: False):
        self.seconds, self.should_stop = seconds, should_stop
        self._stop_at: float | None = None  # once a signal has asked to stop

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call the function and return what it returns.

        A timer and a handler of SIGALRM that are there already stay as they are, less the time that
        has passed.

        Raises TimedOut where the call takes longer than it may.
        """
        if not self.seconds:
            return function(*arguments)
        began = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            result = self._interrupted(function, arguments, began)
        else:
            result = function(*arguments)
        if time.monotonic() - began > self.seconds:
            raise TimedOut
        return result

    def _interrupted(
        self, function: Callable[..., Result], arguments: tuple[Any, ...], began: float
    ) -> Result:
        global _cut_off
        running = True

        def look(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if self._stop_at is None and self.should_stop():
                self._stop_at = now + GRACE
            if not running:  # the signal came when the call had ended
                return
            if self._stop_at is not None and now >= self._stop_at:
                raise StopRequested
            if now - began >= self.seconds:
                raise TimedOut

        handler = signal.signal(signal.SIGALRM, look)
        every = min(LOOK_EVERY, self.seconds)
        left, interval = signal.setitimer(signal.ITIMER_REAL, every, every)
        try:
            try:
                return function(*arguments)
            finally:  # twice: `look` may raise in this line
                running = False
        except (TimedOut, KeyboardInterrupt):
            _cut_off = True
            raise
        finally:
            running = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
            if left:  # 0 would switch it off
                passed = time.monotonic() - began
                signal.setitimer(signal.ITIMER_REAL, max(left - passed, 1e-6), interval)


def end_process(code: int) -> NoReturn:
    """End the process with an exit code, also where a call that was cut off has left something.

    Python would wait for its threads and its processes, which may hang as the call did.
    """
    if not _cut_off:
        sys.exit(code)
    multiprocessing = sys.modules.get("multiprocessing")  # only where the call has used it
    for child in multiprocessing.active_children() if multiprocessing else ():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    logging.shutdown()
    os._exit(code)
