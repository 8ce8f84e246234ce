"""Show on the console how far a run or an evaluation is, and how long it will take."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

SETTLED_STEPS, SETTLED_SECONDS = 5, 10.0  # after the first update


class Progress:
    """Show a bar over optimizer steps.

    Where stderr is no terminal, a plain line comes at most every `interval` seconds instead. The
    time that is left is shown once it can be told: from the pace since the first update, which
    itself may have waited for an evaluation or a compilation. A console that cannot be written to
    (closed, broken pipe, odd encoding) is ignored, because the logs are elsewhere.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        description: str = "",
        interval: float = 30.0,
        show_first: bool = True,
        stream: TextIO | None = None,
    ):
        """Begin at step `initial` of `total`.

        show_first: print a plain line for the first update, whenever it comes. False: no line
        before `interval` seconds, so that what is done by then has one line, its last.
        """
        self.total, self.step = total, initial
        self.description, self.interval = description, interval
        self._start = time.monotonic()
        self._printed = -math.inf if show_first else self._start
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._stream = sys.stderr if stream is None else stream
        self._bar = None
        if _is_terminal(self._stream):
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=_bar_format(None),
            )

    def update(self, postfix: Mapping[str, float | str] | None = None) -> None:
        """Advance by one step and show the values, numbers with four digits."""
        self.step += 1
        now = time.monotonic()
        self._first = self._first or (self.step, now)
        shown = " ".join(f"{name}={_short(value)}" for name, value in (postfix or {}).items())
        if self._bar is not None:
            with self._ignoring_console():
                self._bar.bar_format = _bar_format(self._remaining(now))
                self._bar.set_postfix_str(shown, refresh=False)
                self._bar.update()
            return
        if now - self._printed >= self.interval or self.step >= self.total:
            self._printed = now
            self.write(
                f"{self.description} {self.step}/{self.total} {shown} {self._times(now)}".strip()
            )

    def write(self, line: str) -> None:
        """Print a line without breaking the bar. What the console cannot show is replaced."""
        if self._stream is None:  # Python without a console
            return
        with self._ignoring_console():
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            line = line.encode(encoding, errors="replace").decode(encoding)
            if self._bar is not None:
                self._bar.write(line, file=self._stream)
            else:
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            with self._ignoring_console():
                self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _times(self, now: float) -> str:
        elapsed, remaining = now - self._start, self._remaining(now)
        left = "" if remaining is None else f"<{tqdm.format_interval(remaining)}"
        return f"[{tqdm.format_interval(elapsed)}{left}]"

    def _remaining(self, now: float) -> float | None:
        """Estimate the seconds that are left, None before the pace is settled and at the end."""
        if self._first is None or self.step >= self.total:
            return None
        steps, seconds = self.step - self._first[0], now - self._first[1]
        if steps < SETTLED_STEPS or seconds < SETTLED_SECONDS:
            return None
        return seconds / steps * (self.total - self.step)

    def _ignoring_console(self) -> contextlib.AbstractContextManager:
        # A closed stream, a broken pipe, an unknown encoding.
        return contextlib.suppress(OSError, ValueError, LookupError)


def _bar_format(remaining: float | None) -> str:
    left = "" if remaining is None else f"<{tqdm.format_interval(remaining)}"
    return f"{{l_bar}}{{bar}}| {{n_fmt}}/{{total_fmt}} [{{elapsed}}{left}{{postfix}}]"


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError, AttributeError):
        return False


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
