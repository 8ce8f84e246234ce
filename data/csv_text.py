"""Tell how a table is written as text: compressed or not, its encoding, its separator.

Published label files are read by column (sources.py), a hospital's own table by the flags of its
command (table_reading.py), and where JSONL was expected a table is named as one (json_rows.py).
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import BinaryIO, cast

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
HEAD = 65_536  # bytes that show how a file is written
UNREADABLE = (OSError, EOFError, zlib.error)  # what reading a damaged or missing file raises
_GZIP = b"\x1f\x8b"


def opened(path: Path) -> BinaryIO:
    """Open a file for its bytes, plain or compressed by gzip. Raises one of UNREADABLE."""
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP
    return cast(BinaryIO, gzip.open(path)) if compressed else path.open("rb")


def wide_encoding(head: bytes) -> str | None:
    """Tell UTF-16 or UTF-32 by its byte order mark or by the zero bytes between letters.

    A byte order mark stays in text that is decoded by the name returned.
    """
    for mark, name in (
        (b"\xff\xfe\0\0", "UTF-32LE"),
        (b"\0\0\xfe\xff", "UTF-32BE"),
        (b"\xff\xfe", "UTF-16LE"),
        (b"\xfe\xff", "UTF-16BE"),
    ):
        if head.startswith(mark):
            return name
    even, odd = head[0:400:2], head[1:400:2]
    if len(odd) > 1 and not any(odd) and all(even):
        return "UTF-16LE"
    if len(odd) > 1 and not any(even) and all(odd):
        return "UTF-16BE"
    return None


def separator_of(header: str) -> str:
    """Choose the separator that a header has most of, outside of quotes. Of equal ones a comma."""
    return max(SEPARATORS.values(), key=re.sub(r'"[^"]*"', "", header).count)


def length_problem(path: Path, row: int, fields: int, columns: int) -> str:
    """Say that a row has not as many fields as the header."""
    return f"{path}, row {row}: has {fields} fields, the header has {columns}"
