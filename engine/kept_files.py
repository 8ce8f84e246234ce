"""Bring a run's folder back where it is deleted, or its file system goes away, under the run.

The files that a resume needs and that only the run has are held open. So what was in them can still
be read after their names are gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import write_json, written_whole
from data.plain_files import open_plain
from engine.runtime import LOCK_FILE, STEP_LOGS

_HELD = ("reference/*", "start/*", "start-vote/*", *STEP_LOGS)
_CHUNK = 2**20  # bytes

logger = logging.getLogger(__name__)


class KeptFiles:
    """Hold open the files of a run that nothing else could write again."""

    def __init__(self, run_dir: Path):
        """Begin with none. run_dir: the run's folder."""
        self.run_dir = run_dir
        self._held: dict[str, Any] = {}
        self._lock: Any = None

    def hold(self) -> None:
        """Open what is there by now and is not held yet."""
        for pattern in _HELD:
            for path in self.run_dir.glob(pattern):
                with contextlib.suppress(OSError):
                    self._hold(str(path.relative_to(self.run_dir)), path)

    def _hold(self, name: str, path: Path) -> None:
        held = self._held.get(name)
        if held is not None and os.path.samestat(os.fstat(held.fileno()), os.lstat(path)):
            return
        self._held[name] = open_plain(path)
        if held is not None:
            held.close()

    def bring_back(self, record: Mapping[str, Any]) -> bool:
        """Make the folder again where config.json is gone -> whether it was.

        record: the contents of config.json. Raises OSError where it cannot be made.
        """
        if os.path.lexists(self.run_dir / "config.json"):
            return False
        logger.warning("%s was deleted under the run: it is made again", self.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = open_plain(self.run_dir / LOCK_FILE, "r+b")
        with contextlib.suppress(OSError):  # as `lock_run`, where it cannot be had
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock.write(str(os.getpid()).encode())
        self._lock.flush()
        for name, held in self._held.items():
            if not os.path.lexists(self.run_dir / name):
                with written_whole(self.run_dir / name) as path, open(path, "wb") as copy:
                    _copy(held, copy)
        write_json(self.run_dir / "config.json", dict(record))  # last: now the folder is whole
        return True

    def close(self) -> None:
        """Let go of all files."""
        for file in (*self._held.values(), self._lock):
            if file is not None:
                file.close()
        self._held.clear()


def _copy(held: Any, copy: Any) -> None:
    place = 0
    while chunk := os.pread(held.fileno(), _CHUNK, place):
        copy.write(chunk)
        place += len(chunk)
