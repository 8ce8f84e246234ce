"""Read and write files the way every command here does: whole or not at all, all problems at once.

Everything in it is plain Python: commands that only read files need neither torch nor transformers.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

REPLACED = ".old-"  # begins the name of what is complete and aside while it is replaced
MAX_PROBLEMS = 20  # a message that lists more of them helps nobody
_NAME = re.compile(r"[^\W_][\w-]*")  # names become parts of file names and of metrics


class DataError(ValueError):
    """Report what is wrong with data files, one line a problem, with file, line and field."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def first_problems(problems: Sequence[str], more: str = "and {} more problems") -> list[str]:
    """Cut a list of problems after MAX_PROBLEMS lines, and say in a last line how many were cut.

    problems: one line each.
    more: the last line, with {} for the number.
    """
    hidden = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], *([more.format(hidden)] if hidden > 0 else [])]


# ---- NAME=FILE -----------------------------------------------------------------------------------
def is_name(name: str) -> bool:
    """Check that a data set's name has letters, digits, - and _, a letter or digit first."""
    return _NAME.fullmatch(name) is not None


def named_files(
    values: Sequence[str], flag: str, taken: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Read the values of a repeatable NAME=FILE flag -> ({name: file}, problems).

    values: as the user gave them.
    flag: its name without dashes, for the problems.
    taken: names that are in use elsewhere, such as "train".
    """
    files: dict[str, str] = {}
    problems: list[str] = []
    for value in values:
        name, _, file = value.partition("=")
        if not file or not is_name(name):
            problems.append(
                f"--{flag} {value}: expected NAME=FILE, with a name of letters, digits, - and _"
            )
        elif name in files or name in taken:
            problems.append(f"--{flag} {value}: the name {name} is taken; choose another")
        else:
            files[name] = file
    return files, problems


# ---- write whole or not at all -------------------------------------------------------------------
def process_mark() -> str:
    """Name this process in temporary files: no other that shares the file system has this name.

    Processes of two nodes can have equal numbers. The host's name is hashed, since it can be long.
    """
    host = hashlib.sha256(os.fsencode(socket.gethostname())).hexdigest()[:8]
    return f"{host}-{os.getpid()}"


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it when the block ends without an error.

    So a reader sees the old file or the new one, never a part of it, also after a power cut: the
    file is flushed to the disk before it is renamed, and its folder after. A link at `path` is
    replaced, not followed. It can be read by whom the umask says, also where a library put a file
    of its own in the temporary's place. Missing parent folders are made. After an error nothing is
    left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{process_mark()}-{path.name}")
    temporary.unlink(missing_ok=True)  # it may be a link that waits there for what is written
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that nobody but their owner may read
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty folder beside `path`, which takes its place when the block ends without error.

    As `written_whole` does for a file. A folder that is there already is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for inner in temporary.rglob("*"):
            flush_to_disk(inner)
        flush_to_disk(temporary)
        replace_folder(temporary, path)
    finally:
        remove(temporary)


def replace_folder(temporary: Path, path: Path) -> None:
    """Rename a complete folder into its place, and remove the one that was there.

    The two are exchanged in one step. Where the file system cannot, the old one has another name,
    that begins with REPLACED, between two renames, because a folder that is not empty cannot be
    replaced in one call.
    """
    aside = path.with_name(REPLACED + path.name)
    if os.path.lexists(path) and exchange(temporary, path):
        flush_to_disk(path.parent)
        remove(temporary)  # which holds the old one now
        return
    if os.path.lexists(path):
        remove(aside)
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(path):
            os.rename(aside, path)
        raise
    flush_to_disk(path.parent)
    remove(aside)


def flush_to_disk(path: Path) -> None:
    """Flush a file or a folder to the disk, so that what is there survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap what two names stand for in one step, which no end of a process can part.

    Returns False, and changes nothing, where the system or the file system cannot, and where one of
    the two is not there. Python has no function for it, so Linux's own is called.
    """
    call = _renameat2()
    if call is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)


@lru_cache
def _renameat2() -> Any:
    try:
        return ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None


def write_json(path: str | Path, record: Any) -> None:
    """Write a JSON file whole or not at all, indented for a reader."""
    with written_whole(path) as temporary:
        text = json.dumps(record, indent=2, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # a path that is not text in this locale: escaped, it stays
            text = json.dumps(record, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> Path:
    """Write rows as JSONL, one a line, whole or not at all, and return the path."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            text = json.dumps(row, ensure_ascii=False)
            try:
                text.encode()
            except UnicodeEncodeError:  # half an emoji, as a cut answer may end: escaped, it stays
                text = json.dumps(row)
            file.write(text + "\n")
    return Path(path)


# ---- files that are kept -------------------------------------------------------------------------
MAX_KEPT = 1_000_000  # bytes; no list of labels and no prompt comes near it


@dataclass(frozen=True)
class KeptFile:
    """Hold a small text file that a setting names, so that later commands need the file no more.

    path: as it was given. text: all of it. Two are equal where their texts are, wherever they lie.
    """

    path: str = field(compare=False)
    text: str

    @classmethod
    def read(cls, path: str) -> KeptFile:
        """Read a file. Raises DataError, one line, where it is none of UTF-8 text."""
        try:
            with open(path, "rb") as file:
                content = file.read(MAX_KEPT + 1)
            if len(content) > MAX_KEPT:
                raise DataError(
                    [f"{path}: has more than {MAX_KEPT:,} bytes; is it the right file?"]
                )
            return cls(path, content.decode("utf-8"))
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            if isinstance(error, UnicodeDecodeError):
                why = f"is not UTF-8 text (byte {error.start + 1}); save it as UTF-8"
            raise DataError([f"{path}: {why}"]) from error

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> KeptFile:
        """Read what `record` wrote. Raises DataError where it is not whole."""
        kept = cls(str(record.get("file")), str(record.get("text")))
        if kept.sha256 != record.get("sha256"):
            raise DataError([f"the kept text of {kept.path} does not have its SHA-256"])
        return kept

    def record(self) -> dict[str, str]:
        """Return what config.json keeps."""
        return {"file": self.path, "sha256": self.sha256, "text": self.text}

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def name(self) -> str:
        """Return the file's name without its ending."""
        return Path(self.path).stem

    def __str__(self) -> str:
        return f"{self.path}, SHA-256 {self.sha256[:12]}"


NameOrFile = str | KeptFile  # what a setting holds that takes a name, or a file of one's own


def sha256_of(path: str | Path) -> str:
    """Hash a file -> its SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
