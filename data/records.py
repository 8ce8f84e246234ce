"""Give what reads rows of data files under one import, for scripts of one's own."""

from __future__ import annotations

from data.examples import Example, data_file, read_examples, read_jsonl, row_of, split_by_patient
from data.files import DataError, write_jsonl

__all__ = [
    "DataError",
    "Example",
    "data_file",
    "read_examples",
    "read_jsonl",
    "row_of",
    "split_by_patient",
    "write_jsonl",
]
