r"""Make what commands print safe for every console: closed, full, ASCII, and a terminal that obeys.

`exit_code` calls `guard_console` for every command, so that all may print as usual, libraries too:

* A character that the console's encoding lacks is written as \u2192.
* Control characters are written as \x1b, for an id or a name from a file could otherwise clear the
  screen or hide a line. Colours, and what a progress bar needs, pass.
* stdout or stderr that was closed before the start leads nowhere. A stderr that breaks later never
  ends a command.
* A stdout that is full is an OSError that names it, once.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, cast

STDOUT = "standard output"
LONGEST_LINE = 4000  # characters of a message; names from a file can have any length
# Control characters (C0, C1), line ends of Unicode, and signs that turn the direction of writing.
# A carriage return passes at both ends of a text, where progress bars have it.
_CONTROL = re.compile(
    r"\x1b\[[0-9;]*[mA]"  # a colour, or a line up
    r"|(?<=.)\r(?=[^\n])"
    "|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]",
    re.DOTALL,
)


def printable(text: str) -> str:
    r"""Write control characters as \x1b, but for line ends, tabs and colours."""
    return _CONTROL.sub(lambda found: found[0] if len(found[0]) > 1 else _escaped(found[0]), text)


def message_line(text: str) -> str:
    """Write a message in one line of a length that can be read, whatever names it quotes."""
    if len(text) > LONGEST_LINE:
        text = f"{text[:LONGEST_LINE]}... ({len(text):,} characters)"
    return "".join(_escaped(sign) if sign in "\n\r" else sign for sign in text)


def print_errors(problems: Iterable[str]) -> None:
    """Print what ends a command to stderr, one line each."""
    for problem in problems:
        print(f"error: {message_line(problem)}", file=sys.stderr)


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def _unencodable(error: UnicodeError) -> tuple[str | bytes, int]:
    r"""Write what an encoding lacks as \xe4, and bytes of a path that are not text as they are."""
    assert isinstance(error, UnicodeEncodeError)
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # how Python holds such a byte
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return _escaped(sign), error.start + 1


codecs.register_error("console", _unencodable)


class Console:
    """Stand before a stream of output, and write to it what is safe there.

    Everything else is the stream's own.
    """

    def __init__(self, stream: Any, *, name: str = ""):
        """Take a stream. name: of one whose errors end a command. Those of others are ignored."""
        self._stream, self._name = stream, name
        self._failed: OSError | None = None
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="console")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text. Raises BrokenPipeError where nobody reads it, OSError where it is full."""
        with self._errors():
            self._stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is held back. Raises as `write` does, or what it raised before, once."""
        with self._errors():
            self._stream.flush()
        failed, self._failed = self._failed, None
        if failed is not None:  # argparse, for one, passes over what `write` raises
            raise failed

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if not self._name:
                return
            if isinstance(error, (BrokenPipeError, ValueError)):
                raise
            let_go(self)
            self._failed = OSError(error.errno, error.strerror or str(error), self._name)
            raise self._failed from None


def let_go(stream: Any) -> None:
    """Lead a stream nowhere from now on, with what it still holds: else Python fails at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def guard_console() -> None:
    """Put a Console before stdout and stderr, once, and keep their numbers from other files."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get the number, and the output
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    for name, label in (("stdout", STDOUT), ("stderr", "")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  until the process ends
        if not isinstance(stream, Console):
            setattr(sys, name, cast(Any, Console(stream, name=label)))
