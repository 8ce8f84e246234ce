"""End a run as SIGKILL does, in a child process: nothing is cleaned, flushed or saved."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

KILLED = 137  # exit code of a child that `killed_at` ended


def in_child(function: Callable[[], int]) -> int:
    """Call a function in a fork of this process and return its exit code, 1 after an exception."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(function())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(owner: Any, name: str, number: int, run: Callable[[], int], *, after: bool = False):
    """Run in a child that dies at call `number` (from 1) of `owner.name`: before it, or after."""
    function, calls = getattr(owner, name), []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number and not after:
            os._exit(KILLED)
        result = function(*arguments, **options)
        if len(calls) == number:
            os._exit(KILLED)
        return result

    def child() -> int:
        setattr(owner, name, wrapped)
        return run()

    assert in_child(child) == KILLED, f"{name} was called {len(calls)} times"
