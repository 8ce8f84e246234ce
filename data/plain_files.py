"""Read and write files in folders that somebody else may have written: plain files, nothing else.

A run folder can be shared, or come from elsewhere. A link in it could name any file of the reader,
a pipe would wait for ever, and a file without an end would fill the memory. So what lies in one is
opened as a regular file, without following a link, and is read up to a limit.

Files that a user names on a command line, and those of a model or an adapter, may be links: the
hub's own cache is made of them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

LARGEST_RECORD = 256 * 2**20  # bytes of a JSON file: scores and histories have some MB
LARGEST_LOG_LINE = 16 * 2**20  # bytes
_MODES = {
    "rb": os.O_RDONLY,
    "ab": os.O_RDWR | os.O_APPEND | os.O_CREAT,
    "r+b": os.O_RDWR | os.O_CREAT,
}
# How the hub's cache shows a file: all of a snapshot are links to the files beside it, by hash.
_HUB_LINK = re.compile(r"\.\./\.\./blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")
_CHECKPOINT = re.compile(r"checkpoint-(?:0|[1-9][0-9]{0,11})")
_DEEPEST = 20  # folders in folders; a run has two


def open_plain(path: str | Path, mode: str = "rb") -> Any:
    """Open a regular file, in binary, without following a link -> a file object.

    mode: "rb", or "ab" and "r+b", which make the file where there is none.

    Raises OSError for a link and for what is no file. For writing also for a file that has a second
    name (a hard link), which may be somebody's only copy.
    """
    # without waiting: opening a pipe for reading waits for somebody who writes
    options = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    opened = _in_hub_cache(path) if mode == "rb" else path
    try:
        descriptor = os.open(opened, _MODES[mode] | options, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            said = "it is a link, and none is followed here"
            raise OSError(errno.ELOOP, said, str(path)) from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        if mode != "rb" and found.st_nlink > 1:
            raise OSError(errno.EMLINK, "it has a second name (a hard link)", str(path))
        return os.fdopen(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise


def is_plain(path: str | Path) -> bool:
    """Tell whether there is a regular file, which is no link."""
    try:
        return stat.S_ISREG(os.lstat(_in_hub_cache(path)).st_mode)
    except (OSError, ValueError):
        return False


def _in_hub_cache(path: str | Path) -> str:
    """Give the file of the hub's cache that a link of its own form stands for, else the path."""
    try:
        target = os.readlink(path)
    except (OSError, ValueError):  # no link, or nothing there
        return str(path)
    if _HUB_LINK.fullmatch(target) is None:
        return str(path)
    return os.path.join(os.path.dirname(path), target)


def read_plain(path: str | Path, most: int = LARGEST_RECORD) -> bytes:
    """Read a regular file that is no link.

    Raises OSError where it is none, and where it has more than `most` bytes.
    """
    with open_plain(path) as file:
        # no more is asked for than the file has: memory for all of it is taken at once
        size = min(most, os.fstat(file.fileno()).st_size)
        content = file.read(size + 1)
    if len(content) > size:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return content


def parse_record(content: bytes | str) -> Any:
    """Parse a JSON file. Raises ValueError, one line, for anything that is none."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None


def plain_lines(path: str | Path) -> Iterator[str]:
    """Read the lines of a log in a run's folder, without those that are longer than any of ours.

    Bytes that are not UTF-8 become U+FFFD. Raises OSError as `open_plain` does.
    """
    with open_plain(path) as file:
        whole = True
        while line := file.readline(LARGEST_LOG_LINE):
            ends = line.endswith(b"\n")
            if whole and (ends or len(line) < LARGEST_LOG_LINE):
                yield line.decode(errors="replace")
            whole = ends


def strange_entries(
    folder: Path, links: Collection[str] = (), depth: int = _DEEPEST
) -> Iterator[str]:
    """Find what no run leaves in its folder, at any depth: links, pipes, devices.

    links: names at the top that may be links to a checkpoint beside them. depth: how many folders
    may lie in one another.

    Gives "NAME is a link to TARGET" and the like.
    """
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda found: found.name):
            if entry.is_symlink():
                target = os.readlink(entry.path)
                if entry.name not in links or not is_checkpoint_name(target):
                    yield f"{entry.name!r} is a link to {target!r}"
            elif entry.is_dir(follow_symlinks=False):
                if depth == 0:
                    yield f"{entry.name!r} lies deeper than {_DEEPEST} folders"
                    return
                for inner in strange_entries(Path(entry.path), (), depth - 1):
                    yield f"{entry.name!r}/{inner}"
            elif not entry.is_file(follow_symlinks=False):
                yield f"{entry.name!r} is not a regular file"


def is_checkpoint_name(name: Any) -> bool:
    """Check that a name is checkpoint-<step>, in plain digits, so that no two are of one step."""
    return isinstance(name, str) and _CHECKPOINT.fullmatch(name) is not None
