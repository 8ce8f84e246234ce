"""Protect what every command does with files: NAME=FILE by one rule, whole writes, cut lists.

Run: pytest tests/data/test_files.py
"""

from __future__ import annotations

import json
import os
import socket

import pytest

from data.files import (
    MAX_PROBLEMS,
    first_problems,
    named_files,
    process_mark,
    sha256_of,
    write_json,
    write_jsonl,
    written_whole,
)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("file.jsonl", "--data_file file.jsonl: expected NAME=FILE"),
        ("=file.jsonl", "--data_file =file.jsonl: expected NAME=FILE"),
        ("a=", "--data_file a=: expected NAME=FILE"),
        ("ä b=file.jsonl", "--data_file ä b=file.jsonl: expected NAME=FILE"),
        ("../a=file.jsonl", "--data_file ../a=file.jsonl: expected NAME=FILE"),
        ("-a=file.jsonl", "--data_file -a=file.jsonl: expected NAME=FILE"),
        ("_a=file.jsonl", "--data_file _a=file.jsonl: expected NAME=FILE"),
        ("train=file.jsonl", "--data_file train=file.jsonl: the name train is taken"),
        ("good=again.jsonl", "--data_file good=again.jsonl: the name good is taken"),
    ],
)
def test_a_wrong_name_is_a_problem_and_the_others_are_kept(value, problem):
    files, (said,) = named_files(
        ["good=x.jsonl", value, "ä-1_b=y=z.jsonl"], "data_file", ("train",)
    )
    assert said.startswith(problem)
    assert files == {"good": "x.jsonl", "ä-1_b": "y=z.jsonl"}


def test_a_long_list_of_problems_is_cut_and_says_by_how_many():
    lines = [f"row {n}" for n in range(MAX_PROBLEMS + 3)]
    assert first_problems(lines[:MAX_PROBLEMS]) == lines[:MAX_PROBLEMS]
    assert first_problems(lines) == [*lines[:MAX_PROBLEMS], "and 3 more problems"]
    assert first_problems(lines, "f: {} more")[-1] == "f: 3 more"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "a.json"
    write_json(path, {"ä": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "ä": 1\n}\n'
    with pytest.raises(ZeroDivisionError), written_whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 1}, {"a": object()}])
    assert json.loads(path.read_text(encoding="utf-8")) == {"ä": 1}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_two_nodes_do_not_write_one_temporary_file(tmp_path, monkeypatch):
    """Of processes of one number, which share a file system and write the same file."""
    names = []
    for host in ("node-1", "node-2.cluster.example.org", "n" * 64):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        names.append(process_mark())
        with written_whole(tmp_path / "a") as temporary:
            assert temporary.name == f".tmp-{names[-1]}-a"
    assert len(set(names)) == 3
    assert {name.rpartition("-")[2] for name in names} == {str(os.getpid())}
    assert max(map(len, names)) <= 8 + 1 + 10  # names of files have a limit


def test_rows_and_hashes(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ({"n": n} for n in range(2)))
    assert path.read_bytes() == b'{"n": 0}\n{"n": 1}\n'
    (tmp_path / "abc").write_bytes(b"abc")  # the test vector of FIPS 180-2
    assert sha256_of(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
