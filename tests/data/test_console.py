"""Protect what commands print: for every console, and against names that would control one.

Run: pytest tests/data/test_console.py
"""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from data.console import Console, message_line, print_errors, printable

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("clear \x1b[2J", "clear \\x1b[2J"),
        ("title \x1b]0;x\x07", "title \\x1b]0;x\\x07"),
        ("turned \u202egnp.exe", "turned \\u202egnp.exe"),
        ("C1 \x9b2J", "C1 \\x9b2J"),
        ("zero \0", "zero \\x00"),
        ("over\rwritten", "over\\rwritten"),
        ("\rbar: 50%", "\rbar: 50%"),
        ("line\r\nline\tcell\n", "line\r\nline\tcell\n"),
        ("\x1b[31mred\x1b[0m\x1b[A", "\x1b[31mred\x1b[0m\x1b[A"),
        ("\x1b", "\\x1b"),
        ("Ödem \u80ba \U0001fac1", "Ödem \u80ba \U0001fac1"),
    ],
)
def test_what_controls_a_terminal_is_escaped(text, shown):
    assert printable(text) == shown


def test_a_message_is_one_line_that_can_be_read(capsys):
    print_errors(["a\nerror: b", "x" * 1_000_000])
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: a\\nerror: b"
    assert len(second) < 4100 and second.endswith("... (1,000,000 characters)")
    assert message_line("a\rb") == "a\\rb"


def test_an_ascii_console_gets_escapes_and_the_bytes_of_paths():
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.write("Ödem \u2192 /tmp/t\udcc3\udca9rm\n")
    assert raw.getvalue() == b"\\xd6dem \\u2192 /tmp/t\xc3\xa9rm\n"


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_stdout_says_so_once_and_a_broken_stderr_never():
    out, err = Console(Broken(), name="standard output"), Console(Broken())
    err.write("x")
    err.flush()
    with pytest.raises(OSError, match="'standard output'"):
        out.write("x")
    with pytest.raises(OSError, match="'standard output'"):
        out.flush()  # of what argparse has passed over
    out.flush()


# ---- whole commands, by their cheapest answers ---------------------------------------------------
HELP = [sys.executable, "-m", "data.traces", "export", "--help"]


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"P": sys.executable} | environment,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("line", "code", "err"),
    [
        ('"$P" -m data.check --help > /dev/full', 1, b"error: standard output: No space left"),
        ('"$P" -m data.check --help >&- 2>&- <&-', 0, b""),
        ('"$P" -m data.check --nonsense 2>/dev/full', 2, b""),
        ('"$P" -m data.check --nonsense 2>&-', 2, b""),
        ('"$P" -W error -X utf8=0 -m data.check --help >/dev/null', 0, b""),
    ],
)
def test_streams_that_are_closed_or_full(line, code, err):
    done = shell(line)
    assert done.returncode == code
    assert done.stderr.startswith(err) and b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == (1 if err else 0)


def test_a_closed_stderr_is_not_taken_by_the_next_file(tmp_path):
    """Its number would be: then messages of a library would land in a file of the run."""
    code = (
        "import os, sys; from data.command_line import exit_code;"
        f"main = lambda: [open({str(tmp_path / 'log')!r}, 'w'), os.write(2, b'message')] and 0;"
        "sys.exit(exit_code(main))"
    )
    assert shell(f'"$P" -c "{code}" 2>&-').returncode == 0
    assert (tmp_path / "log").read_text() == ""


def test_an_ascii_locale(tmp_path):
    (tmp_path / "says.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from data.command_line import exit_code\n"
        "sys.exit(exit_code(lambda: print('Ödem \u2192', '\\udcc3\\udca9')))\n",
        encoding="utf-8",
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for environment in (plain, {"PYTHONIOENCODING": "ascii"}):
        done = shell(f'"$P" {tmp_path}/says.py', **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout == b"\\xd6dem \\u2192 \xc3\xa9\n"


@pytest.mark.parametrize("columns", [40, 1, 0])
def test_a_narrow_terminal(columns):
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"}
    process = subprocess.Popen(HELP, stdout=slave, stderr=slave, cwd=ROOT, env=environment)
    os.close(slave)
    text = b""
    while True:
        try:
            text += os.read(master, 65536)
        except OSError:  # its other end is closed
            break
    os.close(master)
    assert process.wait() == 0
    assert b"Traceback" not in text and b"--output_dir" in text and b"\x1b" not in text
