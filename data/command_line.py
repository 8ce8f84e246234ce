"""Read the command lines of data's commands: no flag twice, none abbreviated, plain numbers.

`exit_code` ends every command of the project, those of `engine` and `eval` too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from data.console import STDOUT, guard_console, let_go, print_errors

LARGEST_SEED = 2**32 - 1  # of every command here, as numpy's
# What a launcher tells each process that it starts: how many there are, and its own number.
LAUNCHERS = {
    "torchrun": ("WORLD_SIZE", "RANK"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
}
# Seconds for which a process waits before it ends because of another: torchrun takes the one that
# ends first for the cause, and ends the others.
AFTER_THE_CAUSE = 5.0


class Parser(argparse.ArgumentParser):
    """Parse as argparse does, but take no abbreviation, and no flag or value that is given twice.

    argparse itself would keep the last of two flags and say nothing of the first.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.given: set[str] = set()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Begin to count anew: a parser may read several command lines."""
        self.given = set()
        return super().parse_known_args(args, namespace)


class _Once(argparse.Action):
    """Store the value of a flag, once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, Parser)  # no other registers this action
        if option_string is not None:
            if self.dest in parser.given:
                more = ", with all its values" if self.nargs == "+" else ""
                raise argparse.ArgumentError(self, f"is given twice; give it once{more}")
            parser.given.add(self.dest)
        if isinstance(values, list) and self.nargs in ("+", "*"):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise argparse.ArgumentError(self, f"{twice} is given twice; give it once")
        if isinstance(values, str) and not values:
            raise argparse.ArgumentError(self, "expected text, got ''")
        setattr(namespace, self.dest, values)


def plain_integer(text: str) -> int:
    """Read the plain digits of a flag: the `type` of an integer. Its command checks the range.

    `int` alone would also take 1_000 and blanks.

    Raises ArgumentTypeError for anything else.
    """
    if re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        return int(text)
    shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}..."
    raise argparse.ArgumentTypeError(f"expected an integer, got {shown}")


def exit_code(main: Callable[[], int | None], *, of_ranks: bool = False) -> int:
    """Call a command's main and return the process's exit code, where main does not decide it.

    main: returns its own code (None is 0). of_ranks: whether several processes of a launcher may
    share the command's work. Any other command is not called where a launcher has started several,
    which would all do the same: the first says so, and the code is 2.

    As a shell counts: 130 after Ctrl-C, 141 where nobody reads what is printed any more (`| head`),
    1 where it cannot be written (a full disk). The code of a signal, above 128, stays. What is
    printed is made safe for the console first.
    """
    guard_console()
    if not of_ranks and _is_a_copy():
        return 2
    code: int | None = None
    try:
        try:
            code = main()
        except SystemExit as end:  # of --help, or of a signal, which has a code of its own
            code = end.code if isinstance(end.code, int) else None
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # else a closed pipe is noticed when Python ends, with a traceback
        return code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _unread_output():
            raise  # of something else
        return code if code is not None and code > 128 else 141
    except OSError as error:
        if error.filename != STDOUT:
            raise  # of something else
        with contextlib.suppress(OSError):
            sys.stdout.flush()  # which says so, too
        print_errors([f"{STDOUT}: {error.strerror}"])
        return code if code is not None and code > 128 else 1


def _is_a_copy() -> bool:
    """Tell whether a launcher has started several of this process. The first of them says so."""
    for launcher, (count, number) in LAUNCHERS.items():
        started = os.environ.get(count, "")
        if started in ("", "0", "1"):
            continue
        if os.environ.get(number, "0") == "0":
            print_errors(
                [
                    f"this command is one process, and {launcher} has started {started}: start it"
                    f" without {launcher}"
                ]
            )
        else:
            time.sleep(AFTER_THE_CAUSE)
        return True
    return False


def _unread_output() -> bool:
    """Tell whether a stream of output is closed at its other end. What it holds is let go."""
    unread = False
    for stream in (sys.stdout, sys.stderr):
        ends = select.poll()
        ends.register(stream, 0)  # nothing but errors, such as that nobody reads
        if ends.poll(0):
            let_go(stream)
            unread = True
    return unread
