"""Protect a reader's other files from a folder that somebody else has written.

Run: pytest tests/data/test_plain_files.py
"""

from __future__ import annotations

import hashlib
import os
import socket

import pytest

from data.files import write_json, written_whole
from data.plain_files import (
    LARGEST_LOG_LINE,
    is_checkpoint_name,
    is_plain,
    open_plain,
    parse_record,
    plain_lines,
    read_plain,
    strange_entries,
)


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("mine")
    return path


def no_file(kind, place, victim):
    {
        "link": lambda: place.symlink_to(victim),
        "dangling": lambda: place.symlink_to(victim.with_name("new")),
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
        "device": lambda: place.symlink_to("/dev/zero"),
    }[kind]()


@pytest.mark.parametrize("mode", ["rb", "ab", "r+b"])
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder", "device"])
def test_what_is_no_plain_file_is_not_opened(tmp_path, victim, kind, mode):
    """None of them may hang, be written to, or make a file elsewhere."""
    place = tmp_path / "place"
    no_file(kind, place, victim)
    with pytest.raises(OSError), open_plain(place, mode) as file:
        file.write(b"evil")
    assert not is_plain(place)
    assert victim.read_text() == "mine" and not victim.with_name("new").exists()


@pytest.mark.parametrize("mode", ["ab", "r+b"])
def test_a_file_with_a_second_name_is_read_and_not_written(tmp_path, victim, mode):
    os.link(victim, tmp_path / "log")
    with pytest.raises(OSError, match="second name"):
        open_plain(tmp_path / "log", mode)
    assert read_plain(tmp_path / "log") == b"mine"


def test_plain_files_are_read_and_written(tmp_path):
    for mode, text in (("ab", b"one"), ("ab", b"two"), ("r+b", b"ON")):
        with open_plain(tmp_path / "log", mode) as file:
            file.write(text)
    assert read_plain(tmp_path / "log") == b"ONetwo"
    assert read_plain(tmp_path / "log", 6) == b"ONetwo"
    with pytest.raises(OSError, match="more than 5 bytes"):
        read_plain(tmp_path / "log", 5)


def test_the_links_of_the_hubs_cache_are_read(tmp_path):
    """Its snapshots hold nothing else: ../../blobs/<SHA-1 or SHA-256>."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / ("a" * 40)).write_text("{}")
    (blobs / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/" + "a" * 40)
    (snapshot / "other.json").symlink_to("../../blobs/secret")
    assert read_plain(snapshot / "config.json") == b"{}" and is_plain(snapshot / "config.json")
    assert not is_plain(snapshot / "other.json")
    with pytest.raises(OSError, match="it is a link"):
        open_plain(snapshot / "config.json", "ab")


def test_a_line_without_an_end_is_passed_over(tmp_path):
    with (tmp_path / "log").open("wb") as file:
        file.write(b'{"a": 1}\n' + b"x" * (LARGEST_LOG_LINE + 10) + b'\n{"b": 2}\n\xff')
    assert list(plain_lines(tmp_path / "log")) == ['{"a": 1}\n', '{"b": 2}\n', "\ufffd"]


def test_a_whole_write_follows_no_link_that_waits_for_it(tmp_path, victim):
    """Neither at the name nor at the one that it has before."""
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    for name in ("a.json", f".tmp-{host}-{os.getpid()}-a.json"):
        (tmp_path / name).symlink_to(victim)
    write_json(tmp_path / "a.json", {"a": 1})
    assert victim.read_text() == "mine"
    assert not (tmp_path / "a.json").is_symlink()
    mask = os.umask(0o027)
    try:
        with written_whole(tmp_path / "b") as temporary:
            temporary.write_text("b")
    finally:
        os.umask(mask)
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o640


def test_what_no_run_leaves_is_found_at_any_depth(tmp_path, victim):
    run = tmp_path / "run"
    (run / "charts" / "a").mkdir(parents=True)
    (run / "best").symlink_to("checkpoint-2")
    (run / "metrics.jsonl").touch()
    assert list(strange_entries(run, ("best", "last"))) == []
    (run / "last").symlink_to("../checkpoint-2")
    (run / "charts" / "a" / "events").symlink_to(victim)
    os.mkfifo(run / "pipe\x1b[2J")
    assert list(strange_entries(run, ("best", "last"))) == [
        f"'charts'/'a'/'events' is a link to {str(victim)!r}",
        "'last' is a link to '../checkpoint-2'",
        "'pipe\\x1b[2J' is not a regular file",
    ]
    deep = tmp_path / "deep"
    deep.joinpath(*"abcdefghijklmnopqrstuvwxyz").mkdir(parents=True)
    (problem,) = strange_entries(deep)
    assert problem.endswith("'u' lies deeper than 20 folders")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("checkpoint-0", True),
        ("checkpoint-1200", True),
        ("checkpoint-", False),
        ("checkpoint--1", False),
        ("checkpoint-1/../..", False),
        ("../checkpoint-1", False),
        ("checkpoint-1\n", False),
        ("checkpoint-\u0661", False),  # a digit, but not one of ours
        ("checkpoint-" + "1" * 13, False),
        ("12", False),
        ("", False),
        (None, False),
        (["checkpoint-1"], False),
    ],
)
def test_names_of_checkpoints(name, is_one):
    assert is_checkpoint_name(name) is is_one


def test_json_nested_too_deep_is_a_value_error():
    assert parse_record(b"[1]") == [1]
    for content in (b"[" * 100_000, b"\xff", b"", b"1" * 5000):
        with pytest.raises(ValueError):
            parse_record(content)
