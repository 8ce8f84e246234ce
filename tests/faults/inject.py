"""Bring about a fault at the n-th file operation in a folder, or at the n-th call of a function.

    with at_files(run, 17, kill): ...                          # before the 17th operation
    with at_files(run, 1, fails(errno.ENOSPC), kinds=["fsync"], times=None): ...    # from the first
    with at_files(run) as seen: ...                            # only count: seen is [Point]
    with at_calls("run_grpo.clip_gradients", 3, raises(RuntimeError("device lost"))): ...

Both put everything back at the end of the block. What the interpreter does through Python is seen:
`open` and what is written to the files that it gives, and the functions of `os`, which pathlib and
shutil call. What a library writes by its own system calls is not: safetensors' `save_file`, and
`renameat2` by ctypes. The renames before and after it are.
"""

from __future__ import annotations

import builtins
import fnmatch
import io
import os
import pkgutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests.faults.acts import Act, Point

# Functions of `os` that change a folder, and which of their arguments are paths or descriptors.
CHANGES = {
    "mkdir": 1, "rmdir": 1, "unlink": 1, "remove": 1, "rename": 2, "replace": 2, "symlink": 2,
    "link": 2, "truncate": 1, "ftruncate": 1, "fsync": 1, "fdatasync": 1, "chmod": 1, "utime": 1,
    "sendfile": 1, "write": 1, "copy_file_range": 2,
}  # fmt: skip
KINDS = ("open", "write", "flush", "close", *CHANGES)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Counter:
    """Count the points that are reached, and act at the chosen ones.

    first: the number of the first one that is acted at, None for none. times: at how many from
    there, None for all. With `main_thread`, those of other threads pass uncounted, so that numbers
    repeat: TensorBoard writes from a thread of its own.
    """

    def __init__(
        self, first: int | None, act: Act | None, times: int | None, *, main_thread: bool = False
    ) -> None:
        self.first, self.act, self.times = first, act, times
        self.main_thread = main_thread
        self.seen: list[Point] = []
        self._lock = threading.RLock()
        self._acting = False

    def reach(
        self,
        kind: str,
        name: str,
        go_on: Callable[[], Any],
        half: Callable[[], Any] | None = None,
    ) -> Any:
        """Count a point, and act or go on."""
        other = self.main_thread and threading.current_thread() is not threading.main_thread()
        if self._acting or other:
            return go_on()
        with self._lock:
            number = len(self.seen) + 1
            point = Point(kind, name, number, go_on, half)
            self.seen.append(Point(kind, name, number, lambda: None))  # holds nothing alive
        first, act = self.first, self.act
        if first is None or act is None or number < first:
            return go_on()
        if self.times is not None and number >= first + self.times:
            return go_on()
        self._acting = True  # what the act itself does is not counted
        try:
            return act(point)
        finally:
            self._acting = False


# ---- files ---------------------------------------------------------------------------------------
@contextmanager
def at_files(
    folder: str | Path,
    number: int | None = None,
    act: Act | None = None,
    *,
    kinds: Collection[str] = KINDS,
    names: str = "*",
    times: int | None = 1,
    main_thread: bool = False,
) -> Iterator[list[Point]]:
    """Act at the n-th operation that changes a folder, and yield the list of those seen.

    number: from 1, None to count only. kinds: of KINDS, which are counted at all. names: a pattern
    of paths relative to the folder, such as "checkpoint-*/rng.json", that are counted at all.
    times: at how many operations from there, None for all. main_thread: pass those of other threads
    over. Opening a file counts where it is opened to write.
    """
    counter = Counter(number, act, times, main_thread=main_thread)
    watch = _Watch(os.path.realpath(folder), names, frozenset(kinds), counter)
    with ExitStack() as stack:
        opened = watch.opening(builtins.open)
        for owner in (builtins, io):
            stack.enter_context(mock.patch.object(owner, "open", opened))
        stack.enter_context(mock.patch.object(os, "open", watch.opening_by_number(os.open)))
        for name in CHANGES:
            changed = watch.changing(name, getattr(os, name))
            stack.enter_context(mock.patch.object(os, name, changed))
        yield counter.seen


@dataclass(frozen=True)
class _Watch:
    """Stand before the functions that change files, and count those of one folder.

    root: the folder, without links. names, wanted: as `at_files` takes names and kinds.
    """

    root: str
    names: str
    wanted: Collection[str]
    counter: Counter

    def place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return the path relative to the folder, None for one outside or not counted."""
        try:
            if isinstance(path, int):
                full = os.readlink(f"/proc/self/fd/{path}")
            else:
                base = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
                full = os.path.normpath(os.path.join(base, os.fsdecode(path)))
                # a link on the way is followed, but the last name may be one that is meant itself
                full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        except (OSError, TypeError, ValueError):
            return None
        if full != self.root and not full.startswith(self.root + os.sep):
            return None
        relative = os.path.relpath(full, self.root)
        return relative if fnmatch.fnmatch(relative, self.names) else None

    def changing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """Make a function of `os` count, which changes what its first arguments name."""
        kind = {"remove": "unlink"}.get(name, name)

        def changed(*arguments: Any, **options: Any) -> Any:
            fds = [options.get(key) for key in ("dir_fd", "src_dir_fd", "dst_dir_fd")]
            fd = next((fd for fd in fds if fd is not None), None)
            paths = [self.place(path, fd) for path in arguments[: CHANGES[name]]]
            found = next((path for path in reversed(paths) if path is not None), None)
            if found is None or kind not in self.wanted:
                return real(*arguments, **options)
            half = None
            if name == "write":
                cut = bytes(arguments[1])[: len(arguments[1]) // 2]
                half = partial(real, arguments[0], cut)
            return self.counter.reach(kind, found, partial(real, *arguments, **options), half)

        return changed

    def opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Make the built-in `open` count, and what is done to the files that it gives."""

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            found = self.place(file) if set(mode) & set("wax+") else None
            if found is None:
                return real(file, mode, *arguments, **options)

            def go_on() -> Any:
                stream = real(file, mode, *arguments, **options)
                return _Watched(stream, self.counter, found, self.wanted)

            return self.counter.reach("open", found, go_on) if "open" in self.wanted else go_on()

        return opened

    def opening_by_number(self, real: Callable[..., int]) -> Callable[..., int]:
        """Make `os.open` count, where it opens a file to write."""

        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            found = self.place(path, options.get("dir_fd")) if flags & WRITING else None
            if found is None or "open" not in self.wanted:
                return real(path, flags, *arguments, **options)
            return self.counter.reach(
                "open", found, partial(real, path, flags, *arguments, **options)
            )

        return opened


class _Watched:
    """Stand for a file that was opened to write, and count what is done to it."""

    def __init__(self, stream: Any, counter: Counter, name: str, wanted: Collection[str]) -> None:
        self._stream, self._counter, self._name, self._wanted = stream, counter, name, wanted

    def write(self, content: Any) -> int:
        def half() -> None:
            self._stream.write(content[: len(content) // 2])
            self._stream.flush()

        def whole() -> int:
            return self._stream.write(content)

        return self._reach("write", whole, half)

    def writelines(self, parts: Any) -> None:
        for part in parts:
            self.write(part)

    def flush(self) -> None:
        self._reach("flush", self._stream.flush)

    def truncate(self, size: int | None = None) -> int:
        return self._reach("truncate", lambda: self._stream.truncate(size))

    def close(self) -> None:
        if not self._stream.closed:
            self._reach("close", self._stream.close)

    def _reach(
        self, kind: str, go_on: Callable[[], Any], half: Callable[[], Any] | None = None
    ) -> Any:
        if kind not in self._wanted:
            return go_on()
        try:
            return self._counter.reach(kind, self._name, go_on, half)
        except BaseException:
            if kind == "close":  # it fails, but the descriptor is gone, as with a real one
                self._stream.close()
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Watched:
        self._stream.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def __next__(self) -> Any:
        return next(self._stream)


# ---- calls ---------------------------------------------------------------------------------------
@contextmanager
def at_calls(
    name: str, number: int | None = None, act: Act | None = None, *, times: int | None = 1
) -> Iterator[list[Point]]:
    """Act at the n-th call of a function or method, and yield the list of those seen.

    name: where the caller looks it up, such as "run_grpo.clip_gradients" (the script's own name of
    it) or "rl.rollout.Rollouts.score". number: from 1, None to count only. times: at how many calls
    from there, None for all. Raises AttributeError for a name that is not there.
    """
    counter = Counter(number, act, times)
    path, _, last = name.rpartition(".")
    owner = pkgutil.resolve_name(path)
    stored = vars(owner).get(last) if hasattr(owner, "__dict__") else None
    static = isinstance(stored, (staticmethod, classmethod))
    real = getattr(owner, last)  # bound already, where it is a class method

    def called(*arguments: Any, **options: Any) -> Any:
        return counter.reach("call", name, lambda: real(*arguments, **options))

    with mock.patch.object(owner, last, staticmethod(called) if static else called):
        yield counter.seen
