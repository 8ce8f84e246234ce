"""Run a script's main in a child process, with faults in it or from outside, and see how it ends.

    end = forked(run_sft.main, argv, faults=[at_files(run, 17, kill)])
    assert end.signal == signal.SIGKILL
    end = forked(run_grpo.main, argv, after=[(1.5, signal.SIGTERM)])
    assert end.code == 143 and "go on with" in end.out
    end = forked(run_grpo.main, argv, stdout=1)              # as `| head -n 1`
    end = fresh(["run_sft.py", *argv], stdout="missing")     # a new interpreter, seconds slower

A forked child has torch, the product and the test's own patches already, so it begins in some
milliseconds. What it changes in memory stays in it. The parent must not run threads of torch's:
`torch.set_num_threads(1)`, which tests/helpers/runs.py does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.helpers.repository import ROOT

LOOK = signal.SIGRTMIN + 7  # asks a child where it is; nothing else uses it
Main = Callable[[list[str]], int | None]
Stream = Literal["kept", "closed", "missing"] | int
Sent = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Ended:
    """Hold how a child ended.

    code: of its exit, None where a signal ended it. signal: that signal, None without one.
    timed_out: it was killed after the time limit. where: the functions it was in, innermost first,
    when a SIGKILL of `after` or the time limit fell, () without one.
    """

    code: int | None
    signal: int | None
    out: str
    err: str
    seconds: float
    timed_out: bool = False
    where: tuple[str, ...] = ()


# ---- a copy of this process ----------------------------------------------------------------------
def forked(
    main: Main,
    argv: Sequence[str],
    *,
    faults: Sequence[AbstractContextManager[object]] = (),
    after: Sent = (),
    limit: float = 120.0,
    stdout: Stream = "kept",
    stderr: Stream = "kept",
    into: str | Path | None = None,
) -> Ended:
    """Run `main(argv)` as its script does, in a child of this process.

    faults: of `at_files` and `at_calls`, which hold in the child alone.
    after: (seconds, signal) that this process sends it, in their order.
    limit: seconds after which it is killed.
    stdout, stderr: "closed" for a pipe that nobody reads, "missing" for a descriptor that is not
    there (`>&-`), a number for a pipe whose reader leaves after so many lines, as `| head`.
    into: a folder to run in.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="child-"))
        paths = [os.path.join(folder, name) for name in ("out", "err", "where")]
        for path in paths:
            open(path, "wb").close()
        readers: list[int] = []
        streams = [
            stack.enter_context(_stream(how, path, readers))
            for how, path in zip((stdout, stderr), paths, strict=False)
        ]
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            for reader in readers:
                os.close(reader)
            _be_child(main, list(argv), faults, streams, paths[2], into)
        try:
            status, timed_out = _wait(child, began, list(after), limit, paths[2])
        except BaseException:  # a time limit of the test itself
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        seconds = time.monotonic() - began
        out, err, where = (Path(path).read_text(errors="replace") for path in paths)
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Ended(code, number, out, err, seconds, timed_out, _functions(where))


def _be_child(
    main: Main,
    argv: list[str],
    faults: Sequence[AbstractContextManager[object]],
    streams: Sequence[int | None],
    where: str,
    into: str | Path | None,
) -> None:
    """Run main and leave the process, whatever happens. Never returns."""
    code = 70
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)  # of pytest-timeout
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.getLogger().handlers.clear()  # pytest's, so that warnings reach stderr
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in zip((1, 2), streams, strict=True):
            if stream is None:
                os.close(number)
            else:
                os.dup2(stream, number)
        # None is what Python gives for a descriptor that is not there
        sys.stdout = None if streams[0] is None else os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = None if streams[1] is None else os.fdopen(2, "w", 1, encoding="utf-8")
        faulthandler.register(LOOK, file=open(where, "w"), all_threads=False)  # noqa: SIM115
        if into is not None:
            os.chdir(into)
        code = _as_script(main, argv, faults)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                code = 120  # as Python's own exit
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _as_script(main: Main, argv: list[str], faults: Sequence[AbstractContextManager]) -> int:
    """Return the exit code of a script that ends with `sys.exit(main_guard(...))`."""
    from data.files import DataError  # here: `fresh` needs nothing of the product
    from engine.runtime import main_guard

    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault)
        try:
            return main_guard(lambda: main(argv), errors=(DataError,))
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1


def _wait(
    child: int, began: float, after: list[tuple[float, int]], limit: float, where: str
) -> tuple[int, bool]:
    """Wait for a child and send what is due -> (its status, whether it was too slow)."""
    timed_out, pause = False, 0.001
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, timed_out
        passed = time.monotonic() - began
        due = after[0][0] - passed if after else pause
        if after and due <= 0 or passed > limit and not timed_out:
            timed_out = not after or due > 0
            number = signal.SIGKILL if timed_out else after.pop(0)[1]
            if number == signal.SIGKILL:
                _look(child, where)
            os.kill(child, number)
            pause = due = 0.001
        time.sleep(max(0.0, min(pause, due)))
        pause = min(0.02, pause * 1.5)


def _look(child: int, where: str) -> None:
    """Ask a child to write down where it is, and wait a moment for it."""
    os.kill(child, LOOK)
    for _ in range(50):
        if os.path.getsize(where):
            return
        time.sleep(0.001)


def _functions(trace: str) -> tuple[str, ...]:
    """Read the names of functions from what faulthandler wrote, innermost first."""
    return tuple(line.rpartition(" in ")[2] for line in trace.splitlines() if " in " in line)


# ---- a new interpreter ---------------------------------------------------------------------------
def fresh(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    after: Sent = (),
    limit: float = 120.0,
    stdout: Stream = "kept",
    stderr: Stream = "kept",
    into: str | Path | None = None,
) -> Ended:
    """Run Python with arguments, in an interpreter of its own, from the root of this repository.

    environment: variables beside those of this process. Others as of `forked`.
    """
    values = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="child-"))
        paths = [os.path.join(folder, name) for name in ("out", "err")]
        for path in paths:
            open(path, "wb").close()
        readers: list[int] = []
        streams = [
            stack.enter_context(_stream(how, path, readers))
            for how, path in zip((stdout, stderr), paths, strict=True)
        ]
        closing = " ".join(
            f"{number}>&-" for number, stream in zip((1, 2), streams, strict=True) if stream is None
        )
        command = [sys.executable, *arguments]
        began = time.monotonic()
        with subprocess.Popen(
            ["/bin/sh", "-c", f'exec "$@" {closing}', "sh", *command] if closing else command,
            stdin=subprocess.DEVNULL,
            stdout=streams[0],
            stderr=streams[1],
            cwd=into or ROOT,
            env=os.environ | values | dict(environment or {}),
        ) as process:
            try:
                timed_out = _attend(process, began, after, limit)
            except BaseException:
                process.kill()
                raise
        seconds, code = time.monotonic() - began, process.returncode
        out, err = (Path(path).read_text(errors="replace") for path in paths)
    number = -code if code < 0 else None
    return Ended(None if number else code, number, out, err, seconds, timed_out)


def _attend(process: subprocess.Popen[bytes], began: float, after: Sent, limit: float) -> bool:
    """Send a process the signals that are due, and return whether it was too slow."""
    for seconds, number in after:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, began + seconds - time.monotonic()))
            return False
        process.send_signal(number)
    try:
        process.wait(max(0.0, began + limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        return True
    return False


@contextlib.contextmanager
def _stream(how: Stream, path: str, readers: list[int]) -> Iterator[int | None]:
    """Open what a child's output goes to, None where it goes nowhere.

    readers: the ends of pipes that this process reads, which a copy of it has to close.
    """
    if how == "missing":
        yield None
        return
    if how == "kept":
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    else:
        read, descriptor = os.pipe()
        if how == "closed":
            os.close(read)
        else:
            readers.append(read)
            threading.Thread(target=_head, args=(read, how, path), daemon=True).start()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _head(read: int, lines: int, path: str) -> None:
    """Keep the first lines of a pipe, then leave it."""
    with open(read, "rb") as pipe, open(path, "ab") as kept:
        for _ in range(lines):
            kept.write(pipe.readline())
            kept.flush()
