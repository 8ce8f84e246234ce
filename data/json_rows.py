"""Read JSONL files strictly: every line is a row or a problem that names the line.

What no other tool could read back is refused here, so that it never enters a run: half a surrogate
pair, NaN, a key twice, numbers and nestings beyond reason. A file of another kind (CSV, a JSON
array, a compressed or a binary file, UTF-16) is named as what it is, with the way out.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.csv_text import HEAD, SEPARATORS, separator_of, wide_encoding
from data.files import DataError

MAX_LINE = 16 * 2**20  # bytes; the longest answers that are read have 100,000 characters
MAX_DEPTH = 100  # of brackets in brackets; data files have 2
MAX_DIGITS = 300  # of one number; a longer one fits no float

# One half of a surrogate pair. JSON can escape it; a file in UTF-8 cannot hold it.
_HALF = re.compile("[\ud800-\udfff]")

# {first bytes: what the file is, and what to do with it}
_OTHER_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "compressed by gzip: unpack it with gunzip"),
    (b"BZh", "compressed by bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed by xz: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it with unzstd"),
    (b"PAR1", 'Parquet: pandas writes JSONL by to_json(FILE, orient="records", lines=True)'),
    (b"ARROW1", 'Arrow: pandas writes JSONL by to_json(FILE, orient="records", lines=True)'),
    (b"PK\x03\x04", "a zip archive or an Excel sheet: unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an Excel sheet: save it as CSV and convert it with data.table"),
    (b"SQLite format 3", "an SQLite database: export the table as CSV"),
    (b"\x89HDF", "an HDF5 file: export the table as CSV"),
    (b"\x80\x04", "a pickle, which is never opened here: export the table as CSV"),
    (b"\x80\x05", "a pickle, which is never opened here: export the table as CSV"),
    (b"\x89PNG", "a PNG image: give the file whose rows name the images"),
    (b"\xff\xd8\xff", "a JPEG image: give the file whose rows name the images"),
    (b"%PDF", "a PDF: give the file whose rows name the images"),
    (b"<", "HTML or XML, as a page that a download asks to log in on: look into it"),
)


def json_rows(path: str | Path, *, strict: bool = True) -> Iterator[tuple[int, Any, list[str]]]:
    """Read a JSONL file line by line -> (line number from 1, value, what is wrong with the line).

    A line that is blank is passed over. Lines may end by a line feed, by a carriage return, or by
    both.

    strict: see `parse_json`.

    Raises DataError for a file that is not JSONL at all, with what it is and what to do.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if kind := other_kind(file.read(HEAD)):
                raise DataError([f"{path}: is no JSONL file of one object a line, but {kind}"])
            file.seek(0)
            number = 0
            while chunk := file.readline(MAX_LINE + 1):
                if len(chunk) > MAX_LINE:
                    raise DataError(
                        [
                            f"{path}, line {number + 1}: has more than {MAX_LINE:,} bytes; write"
                            " one object a line"
                        ]
                    )
                for line in chunk.splitlines():
                    number += 1
                    if line.strip():
                        yield number, *parse_json(line, strict=strict)
    except OSError as error:
        raise DataError([f"{path}: cannot be read ({error.strerror or error})"]) from error


def other_kind(head: bytes) -> str | None:
    """Say what a file is that is not JSONL, and what to do with it, or None where it may be JSONL.

    head: the first bytes of the file.
    """
    if wide := wide_encoding(head):
        return f"{wide} text: save it as UTF-8, as by iconv -f {wide} -t UTF-8 FILE > NEW"
    for magic, kind in _OTHER_KINDS:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(magic):
            return kind
    lines = [line.strip() for line in head.removeprefix(b"\xef\xbb\xbf").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return None
    start = b"".join(lines[:2]).replace(b" ", b"")
    if start.startswith(b"[{"):
        return "a JSON array: write one object a line, as by jq -c '.[]' FILE > NEW.jsonl"
    if lines[0] == b"{" and len(lines) > 1 and lines[1].startswith(b'"'):
        return "JSON over several lines: write one object a line, as by jq -c . FILE > NEW.jsonl"
    return _table(lines)


def _table(lines: list[bytes]) -> str | None:
    """Name a CSV file by its first lines, or None: two lines with as many separators."""
    if lines[0][:1] in b"{[" or len(lines) < 2:
        return None
    header = lines[0].decode(errors="replace")
    sign = separator_of(header)
    if sign not in header or sign.encode() not in lines[1]:
        return None
    columns = header.split(sign)
    signs = next(f"{name}s" for name, one in SEPARATORS.items() if one == sign)
    shown = ", ".join(repr(column.strip().strip('"')) for column in columns[:8])
    more = ", ..." if len(columns) > 8 else ""
    return (
        f"a table (CSV with {signs}) with the columns {shown}{more}: convert it with"
        " python -m data.table FILE --help"
    )


class _Refused(ValueError):
    """Say what is wrong with a line that Python would accept as JSON."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise _Refused(f"field {twice!r} is there twice; only one of them can be meant")
    return found


def _no_constant(name: str) -> Any:
    raise _Refused(f"holds {name}, which is no JSON; write null, or leave the field out")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused(f"holds the number {digits[:20]}, which is too large for a computer")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Refused(
            f"holds a number of {len(digits):,} digits, {digits[:10]}...; at most {MAX_DIGITS} are"
            " read: write it as a string"
        )
    return int(digits)


# of what another tool could not read, or would read otherwise
_CHECKS: dict[str, Any] = {
    "object_pairs_hook": _object,
    "parse_constant": _no_constant,
    "parse_float": _float,
}


def parse_json(line: bytes | str, *, strict: bool = True) -> tuple[Any, list[str]]:
    """Parse one line of a JSONL file -> (its value, what is wrong with it).

    A byte order mark, which some tools put in front of a file, is passed over. A lone half of a
    surrogate pair stays in the value: `half_pairs` finds it.

    strict: refuse what another tool could not read or would read otherwise: a key twice, NaN and
    Infinity, bytes that are not UTF-8. Else the last of two keys counts, and U+FFFD stands for
    such bytes: for what a service has written, of which a single text is wanted.
    """
    try:
        errors = "strict" if strict else "replace"
        text = line if isinstance(line, str) else line.decode(errors=errors)
        text = text.removeprefix("\ufeff").rstrip()
        if too_deep(text):
            raise RecursionError
        return json.loads(text, parse_int=_integer, **(_CHECKS if strict else {})), []
    except json.JSONDecodeError as error:
        zeros = "; it holds zero bytes, so the file is damaged" if "\0" in text else ""
        return None, [f"not valid JSON ({error.msg}, column {error.colno}){zeros}"]
    except UnicodeDecodeError as error:
        return None, [
            f"not UTF-8 text ({error.reason}, byte {error.start + 1}); save the file as UTF-8"
        ]
    except _Refused as error:
        return None, [str(error)]
    except RecursionError:
        return None, [f"not valid JSON (nested too deep: at most {MAX_DEPTH} brackets are read)"]


def too_deep(text: str) -> bool:
    """Tell a text with more than MAX_DEPTH brackets open at once, without parsing it."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth, in_string = 0, False
    for sign in re.finditer(r'\\.|["\[\]{}]', text):
        if sign[0] == '"':
            in_string = not in_string
        elif not in_string:
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(sign[0], 0)
            if depth > MAX_DEPTH:
                return True
    return False


# ---- half a surrogate pair -----------------------------------------------------------------------
def half_pairs(row: dict[str, Any], *, besides: tuple[str, ...] = ()) -> list[str]:
    """Find the fields of a row that hold half a surrogate pair -> problems, one line each.

    Half a pair, such as the first half of an emoji that a length limit has cut, is in no UTF-8 file
    and no tokenizer takes it.

    besides: fields that may hold it.
    """
    problems = []
    for name, value in row.items():
        found = name not in besides and (_HALF.search(name) or _HALF.search(_texts(value)))
        if found:
            problems.append(
                f"field {ascii(name)} holds {ascii(found[0])}, half a surrogate pair, which no"
                " tokenizer takes; remove it, or write the whole character"
            )
    return problems


def whole_characters(value: Any) -> tuple[Any, bool]:
    """Put U+FFFD in the place of each lone half of a surrogate pair -> (the value, were there any).

    value: as `parse_json` gives it.
    """
    if not _HALF.search(_texts(value)):
        return value, False
    return _replaced(value), True


def _texts(value: Any) -> str:
    """Write a value so that all of its strings can be searched, keys too."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [_replaced(item) for item in value]
    if isinstance(value, dict):
        return {_replaced(key): _replaced(item) for key, item in value.items()}
    return value
