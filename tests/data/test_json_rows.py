"""Protect the strict reading of JSONL files.

Checked: no line and no file ends a command with a traceback. Every one is read, or refused with
file and line and what to do.

Run: pytest tests/data/test_json_rows.py
"""

from __future__ import annotations

import gzip
import json

import pytest

import data.check
from data.examples import MAX_ANSWER_CHARACTERS, read_jsonl, scan_jsonl
from data.files import DataError
from data.join import read_answers
from data.json_rows import half_pairs, json_rows, parse_json, whole_characters
from data.predictions import read_predictions

ROW = {"id": "a", "patient_id": "p", "image": "a.png", "labels": ["Edema"], "dataset": "d"}
TEXT = json.dumps(ROW)


def with_field(name: str, value: str) -> str:
    """Write the row with one more field, its value as JSON text."""
    return f'{TEXT[:-1]}, "{name}": {value}}}'


# {what: (line of a file as bytes, what is said of it, None where it is read)}
LINES: dict[str, tuple[bytes, str | None]] = {
    "byte order mark": (b"\xef\xbb\xbf" + TEXT.encode(), None),
    "accents": (with_field("note", '"Ödem 肺"').encode(), None),
    "a whole pair": (with_field("note", r'"\ud83d\ude00"').encode(), None),
    "an escaped backslash": (with_field("note", r'"\\ud83d"').encode(), None),
    "300 digits": (with_field("note", "9" * 300).encode(), None),
    "100 brackets": (with_field("note", "[" * 99 + "]" * 99).encode(), None),
    "brackets in a text": (with_field("note", json.dumps('[{"' * 999)).encode(), None),
    "NUL, escaped": (with_field("note", r'"\u0000"').encode(), None),
    "Latin-1": (with_field("note", '"Ödem"').encode("latin-1"), "not UTF-8 text (invalid"),
    "half a pair as bytes": (
        with_field("note", '"x"').encode().replace(b"x", b"\xed\xa0\xbd"),
        "not UTF-8 text (invalid",
    ),
    "NUL in a name": (
        json.dumps(ROW | {"patient_id": "p\0"}).encode(),
        "field 'patient_id' holds a zero character",
    ),
    "NUL as the view": (with_field("view", r'"\u0000"').encode(), "field 'view' is"),
    "NUL": (with_field("note", '"\0"').encode(), "not valid JSON (Invalid control character"),
    "a block of NULs": (b"\0" * 512, "it holds zero bytes, so the file is damaged"),
    "200,000 brackets": (b"[" * 200_000, "nested too deep: at most 100"),
    "200,000 brackets, closed": (
        with_field("note", "[" * 200_000 + "]" * 200_000).encode(),
        "nested too deep",
    ),
    "101 brackets": (with_field("note", "[" * 100 + "]" * 100).encode(), "nested too deep"),
    "200,000 braces": (b'{"a":' * 200_000, "nested too deep"),
    "10,000 digits": (with_field("note", "9" * 10_000).encode(), "a number of 10,000 digits"),
    "an age of 10,000 digits": (with_field("age", "9" * 10_000).encode(), "10,000 digits, 99999"),
    "an age of 200 digits": (with_field("age", "9" * 200).encode(), "it must be whole years"),
    "1e999": (with_field("note", "1e999").encode(), "holds the number 1e999, which is too large"),
    "NaN": (with_field("note", "NaN").encode(), "holds NaN, which is no JSON; write null"),
    "Infinity": (with_field("age", "Infinity").encode(), "holds Infinity, which is no JSON"),
    "-Infinity": (with_field("note", "[-Infinity]").encode(), "holds -Infinity, which is no"),
    "a key twice": (with_field("id", '"b"').encode(), "field 'id' is there twice"),
    "a key twice, inside": (
        with_field("note", '{"x": 1, "x": 2}').encode(),
        "field 'x' is there twice",
    ),
    "cut": (TEXT[:44].encode(), "not valid JSON (Unterminated string"),
    "two rows": (f"{TEXT}{TEXT}".encode(), "not valid JSON (Extra data"),
    "single quotes": (str(ROW).encode(), "not valid JSON (Expecting property name"),
    "a list": (b"[1, 2]", "holds list, not an object"),
    "a number": (b"3", "holds int, not an object"),
    "null": (b"null", "holds NoneType, not an object"),
    "an id that is blank": (json.dumps(ROW | {"id": " "}).encode(), "field 'id' is blank"),
    "no patient": (json.dumps(ROW | {"patient_id": ""}).encode(), "field 'patient_id' is blank"),
    "no image": (json.dumps(ROW | {"image": ""}).encode(), "field 'image' is blank"),
    "a list of lists": (json.dumps(ROW | {"labels": [["Edema"]]}).encode(), "a list of strings"),
    "a 1 MB answer": (
        with_field("answer", json.dumps("x" * 1_000_000)).encode(),
        "field 'answer' has 1,000,000 characters; at most 100,000",
    ),
} | {
    f"half a pair in {name}": (
        TEXT.replace(f'"{name}": "', rf'"{name}": "\ud83d').encode(),
        rf"field '{name}' holds '\ud83d', half a surrogate pair",
    )
    for name in ("id", "patient_id", "image", "dataset")
} | {
    "half a pair in a label": (
        TEXT.replace('["Edema"', r'["\uDE00Edema"').encode(),
        r"field 'labels' holds '\ude00', half a surrogate pair",
    ),
    "half a pair in the answer": (
        with_field("answer", r'"Hazy \ud83d"').encode(),
        r"field 'answer' holds '\ud83d', half",
    ),
    "half a pair in another field": (
        with_field("note", r'{"x": ["\udfff"]}').encode(),
        r"field 'note' holds '\udfff', half",
    ),
    "half a pair in a field's name": (with_field(r"\ud800", "1").encode(), r"field '\ud800' holds"),
}  # fmt: skip


@pytest.mark.parametrize("what", LINES)
def test_a_line_is_read_or_refused_by_its_number(tmp_path, capsys, what):
    line, said = LINES[what]
    file = tmp_path / "data.jsonl"
    other = json.dumps(ROW | {"id": "other"}).encode()
    file.write_bytes(other + b"\n\n" + line + b"\n")
    examples, problems = scan_jsonl(file)
    if said is None:
        assert problems == [] and [example.id for example in examples] == ["other", "a"]
        return
    assert [example.id for example in examples] == ["other"]
    assert all(problem.startswith(f"{file}, line 3: ") for problem in problems)
    assert said in problems[0]
    with pytest.raises(DataError):
        read_jsonl(file)
    # the command says the same
    assert data.check.main([str(file)]) == 1
    assert problems[0] in capsys.readouterr().out


# {what: (bytes of a file, what is said of it, None where it is read)}
SIMPLE = '{"x": 1}\n{"x": 2}\n'
FILES: dict[str, tuple[bytes, str | None]] = {
    "line feeds": (SIMPLE.encode(), None),
    "carriage returns and line feeds": (SIMPLE.replace("\n", "\r\n").encode(), None),
    "carriage returns": (SIMPLE.replace("\n", "\r").encode(), None),
    "no line end at the end": (SIMPLE.strip().encode(), None),
    "blank lines": (b"\n \n" + SIMPLE.encode() + b"\t\n", None),
    "a mark in front of every line": (SIMPLE.replace("{", "\ufeff{").encode(), None),
    "another line separator in a text": (
        '{"x": 1}\n{"x": "\u2028\u0085\x1c"}'.replace("\x1c", "").encode(),
        None,
    ),
    "UTF-16": (SIMPLE.encode("utf-16"), "UTF-16LE text: save it as UTF-8, as by iconv -f UTF-16LE"),
    "UTF-16, little-endian, no mark": (SIMPLE.encode("utf-16-le"), "UTF-16LE text"),
    "UTF-16, big-endian, no mark": (SIMPLE.encode("utf-16-be"), "UTF-16BE text"),
    "UTF-16, big-endian": (b"\xfe\xff" + SIMPLE.encode("utf-16-be"), "UTF-16BE text"),
    "UTF-32": (SIMPLE.encode("utf-32"), "UTF-32LE text"),
    "gzip": (gzip.compress(SIMPLE.encode()), "compressed by gzip: unpack it with gunzip"),
    "bzip2": (b"BZh91AY&SY", "compressed by bzip2"),
    "xz": (b"\xfd7zXZ\0", "compressed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "compressed by zstd"),
    "Parquet": (b"PAR1\x15\x04", "Parquet: pandas writes JSONL"),
    "Arrow": (b"ARROW1\0\0", "Arrow: pandas writes JSONL"),
    "Excel": (b"PK\x03\x04\x14\0", "a zip archive or an Excel sheet"),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1", "an Excel sheet: save it as CSV"),
    "pickle": (b"\x80\x04\x95\x1c", "a pickle, which is never opened here"),
    "SQLite": (b"SQLite format 3\0", "an SQLite database"),
    "PNG": (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    "JPEG": (b"\xff\xd8\xff\xe0", "a JPEG image"),
    "a page": (b"\n<!DOCTYPE html>", "HTML or XML, as a page that a download asks to log in on"),
    "a JSON array": (b'[{"x": 1}, {"x": 2}]', "a JSON array: write one object a line"),
    "a JSON array over lines": (b'[\n  {"x": 1}\n]', "a JSON array: write one object a line"),
    "JSON over lines": (b'{\n  "x": 1\n}', "JSON over several lines"),
    "CSV": (
        b"image,patient,Edema\na.png,p,1\n",
        "a table (CSV with commas) with the columns 'image', 'patient', 'Edema': convert it with"
        " python -m data.table",
    ),
    "CSV with a mark": (b"\xef\xbb\xbfimage,patient\na.png,p\n", "columns 'image', 'patient'"),
    "CSV with semicolons": (b"image;patient\na.png;p\n", "a table (CSV with semicolons)"),
    "CSV with tabs": (b"image\tpatient\na.png\tp\n", "a table (CSV with tabs)"),
    "CSV with pipes": (b"image|patient\na.png|p\n", "a table (CSV with pipes)"),
    "CSV with commas in a name": (b'"a,b,c";d\n1;2\n', "a table (CSV with semicolons)"),
    "CSV with quotes": (b'"image","patient"\n"a.png","p"\n', "columns 'image', 'patient'"),
    "CSV of nine columns": (b"a,b,c,d,e,f,g,h,i\n1,2,3,4,5,6,7,8,9\n", "'g', 'h', ...: convert"),
    "CSV, Latin-1": ("Bild;Größe\na;1\n".encode("latin-1"), "a table (CSV with semicolons)"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_is_read_or_called_what_it_is(tmp_path, what):
    content, said = FILES[what]
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    if said is None:
        rows = list(json_rows(file))
        assert [row for _, row, _ in rows][0] == {"x": 1} and len(rows) == 2
        assert [problems for *_, problems in rows] == [[], []]
        return
    for read in (json_rows, read_jsonl, read_predictions):
        with pytest.raises(DataError) as caught:
            list(read(file))
        (problem,) = caught.value.problems
        assert problem.startswith(f"{file}: is no JSONL file of one object a line, but ")
        assert said in problem
    with pytest.raises(DataError, match="is no JSONL file"):
        read_answers(file, [], data_file="x")


def test_an_empty_file_and_one_that_cannot_be_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert list(json_rows(tmp_path / "a")) == []
    with pytest.raises(DataError, match="cannot be read"):
        list(json_rows(tmp_path))  # a folder


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a").write_bytes(end.join(['{"x": 1}', "", "{", '{"x": 2}', "]"]).encode())
        found = [(number, bool(problems)) for number, _, problems in json_rows(tmp_path / "a")]
        assert found == [(1, False), (3, True), (4, False), (5, True)]


def test_the_answer_of_the_longest_length_is_taken(tmp_path):
    file = tmp_path / "a.jsonl"
    for count, problems in ((MAX_ANSWER_CHARACTERS, 0), (MAX_ANSWER_CHARACTERS + 1, 1)):
        file.write_text(json.dumps(ROW | {"answer": "x" * count}))
        assert len(scan_jsonl(file)[1]) == problems


def test_a_completion_may_end_in_half_a_character(tmp_path):
    """A model's answer, cut at a length limit, is scored as it stands; nothing else may hold it."""
    row = ROW | {"completion": "cut \ud83d", "id": "a"}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row))
    assert read_predictions(file)[0].completion == "cut \ud83d"
    file.write_text(json.dumps(row | {"note": "\ud83d"}))
    with pytest.raises(DataError, match=r"line 1: field 'note' holds '\\ud83d', half"):
        read_predictions(file)
    # an array of names would drop it, and two patients be one
    file.write_text(json.dumps(row | {"patient_id": "p\0"}))
    with pytest.raises(DataError, match="line 1: field 'patient_id' holds a zero character"):
        read_predictions(file)
    file.write_text(json.dumps(row | {"completion_length": 10**10}))
    with pytest.raises(DataError, match="it must be a number from 0 up to 1,000,000,000"):
        read_predictions(file)


def test_halves_are_found_and_replaced():
    value = {"a": ["x\ud83d", {"\udc00": 1}], "b": 2.5, "c": None}
    assert half_pairs({"ok": "\U0001f600", "n": 1}) == []
    assert [problem[:9] for problem in half_pairs(value)] == ["field 'a'"]
    assert half_pairs(value, besides=("a",)) == []
    assert whole_characters(value) == ({"a": ["x\ufffd", {"\ufffd": 1}], "b": 2.5, "c": None}, True)
    assert whole_characters("\U0001f600") == ("\U0001f600", False)


def test_a_key_twice_is_found_among_many():
    """Looking for it takes one pass: comparing each with each would take hours."""
    names = "".join(f'"{i}": 0, ' for i in range(300_000))
    for twice in ("7", "299999"):
        value, problems = parse_json(f'{{{names} "{twice}": 1}}')
        assert value is None and problems[0].startswith(f"field '{twice}' is there twice")


def test_what_a_service_wrote_is_read_leniently():
    line = b'{"x": NaN, "x": "\xe9"}'
    assert parse_json(line)[1] and parse_json(line, strict=False) == ({"x": "\ufffd"}, [])
    assert parse_json("[" * 999, strict=False)[1] and parse_json("9" * 9999, strict=False)[1]
