"""Protect the command lines of data's commands: a flag once, in full, and numbers in range.

Also how every command ends where nobody reads what it prints.

Run: pytest tests/data/test_command_line.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

import data.check
import data.demo.build_base
import data.dicom
import data.select
import data.table
import data.traces
from data.command_line import Parser, exit_code, plain_integer

EXPORT = ["export", "--data_file", "x", "--form", "openai", "--output_dir", "y"]
COMMANDS = {
    "check": (data.check.main, ["x.jsonl"], "--image_root"),
    "select": (data.select.main, ["--output_dir", "y"], "--mimic"),
    "export": (data.traces.main, EXPORT, "--model"),
    "import": (
        data.traces.main,
        ["import", "--data_file", "x", "--output", "y", "--teacher", "template"],
        "--rejected",
    ),
    "table": (data.table.main, ["x.csv", "--output", "y"], "--image"),
    "demo": (data.demo.build_base.main, [], "--output"),
    "dicom": (data.dicom.main, ["folder", "--output_dir", "y"], "--frame"),
}


def refusal(main, argv: list[str], capsys) -> str:
    """Return what a command line that must be refused says, whichever way it leaves."""
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_no_flag_is_taken_twice_in_any_spelling(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main, flags, flag = COMMANDS[command]
    for twice in ([flag, "1", flag, "2"], [f"{flag}=1", flag, "2"], [f"{flag}=1", f"{flag}=1"]):
        assert f"argument {flag}: is given twice; give it once" in refusal(
            main, [*flags, *twice], capsys
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", list(COMMANDS))
def test_no_flag_is_abbreviated(command, capsys):
    main, flags, flag = COMMANDS[command]
    assert flag[:-1] in refusal(main, [*flags, flag[:-1], "1"], capsys)


def test_a_flag_of_several_values_is_given_once_with_all_of_them():
    parser = Parser()
    parser.add_argument("--answers", nargs="+")
    assert parser.parse_args(["--answers", "a", "b"]).answers == ["a", "b"]
    assert parser.parse_args(["--answers", "c"]).answers == ["c"]  # another command line
    with pytest.raises(SystemExit):
        parser.parse_args(["--answers", "a", "--answers", "b"])


@pytest.mark.parametrize(
    "text", ["", "1_000", "1,000", "16k", "1e3", "2.5", "nan", " 7", "9" * 5000, "\u0663"]
)
def test_what_is_no_integer_in_plain_digits(text):
    with pytest.raises(ArgumentTypeError, match="^expected an integer, got ") as error:
        plain_integer(text)
    assert len(str(error.value)) < 120


def test_plain_integers():
    assert [plain_integer(text) for text in ("65536", "+7", "-1")] == [65536, 7, -1]


def test_numbers_of_the_commands(capsys):
    for side in ("0", "65537"):
        assert f"--max_side {side}: must be at least 1" in refusal(
            data.traces.main, [*EXPORT, "--model", "m", "--max_side", side], capsys
        )
    for seed in ("-1", str(2**32)):
        assert f"--seed {seed}: must be from 0 to 4294967295" in refusal(
            data.select.main, ["--output_dir", "y", "--mimic", "m", "--seed", seed], capsys
        )
    assert "--seed: expected an integer" in refusal(
        data.select.main, ["--output_dir", "y", "--seed", "1_0"], capsys
    )


def test_an_empty_text_is_no_value(capsys):
    assert "argument --image_root: expected text, got ''" in refusal(
        data.check.main, ["x.jsonl", "--image_root", ""], capsys
    )


# ---- the end -------------------------------------------------------------------------------------
ROOT = Path(__file__).parents[2]
PRINTING = {
    "check": ["-m", "data.check", "--help"],
    "select": ["-m", "data.select", "--help"],
    "traces": ["-m", "data.traces", "export", "--help"],
    "table": ["-m", "data.table", "--help"],
    "dicom": ["-m", "data.dicom", "--help"],
    "splits": ["-m", "data.demo.splits", "--help"],
    "sft": [str(ROOT / "run_sft.py"), "--help"],
    "grpo": [str(ROOT / "run_grpo.py"), "--help"],
    "evaluate": ["-m", "eval.evaluate", "--help"],
    "report": ["-m", "eval.report", "--help"],
    "merge": ["-m", "engine.merge", "--help"],
}


def unread(arguments: list[str], folder: Path, stream: str, unbuffered: str = "") -> tuple:
    """Run a command whose stdout or stderr nobody reads -> (exit code, what the other one says)."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write_end}
    ended = subprocess.run(
        [sys.executable, *arguments],
        **streams,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write_end)
    return ended.returncode, ended.stderr if stream == "stdout" else ended.stdout


@pytest.mark.parametrize("command", list(PRINTING))
def test_a_closed_pipe_ends_a_command_quietly(command, tmp_path):
    """As `| head` does. 141 is 128 + SIGPIPE, what a shell shows for other programs.

    A help text beyond the stream's buffer may end with 0: argparse of later Pythons passes over
    that by itself.
    """
    code, said = unread(PRINTING[command], tmp_path, "stdout")
    assert said == "" and code in ({0, 141} if command in ("sft", "grpo", "evaluate") else {141})


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_the_work_too(unbuffered, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n')
    check = ["-m", "data.check", "bad.jsonl", "missing.jsonl"]
    code, said = unread(check, tmp_path, "stdout", unbuffered)
    assert code == 141 and "Traceback" not in said and "Exception" not in said
    # messages are no result: a stderr that breaks changes no exit code
    assert unread(check[:2] + check[3:], tmp_path, "stderr", unbuffered) == (2, "")


def test_exit_codes():
    def raising(error: BaseException):
        raise error

    assert exit_code(lambda: None) == 0 and exit_code(lambda: 1) == 1
    assert exit_code(lambda: raising(KeyboardInterrupt())) == 130
    with pytest.raises(BrokenPipeError):  # of a socket, say: our output is read
        exit_code(lambda: raising(BrokenPipeError()))
    with pytest.raises(SystemExit):
        exit_code(lambda: raising(SystemExit(2)))


@pytest.mark.parametrize(
    ("ends", "code"),
    [("return 143", 143), ("sys.exit(129)", 129), ("return 0", 141), ("return 2", 141)],
)
def test_a_closed_pipe_hides_no_exit_code(ends, code):
    """What a signal has ended ends with the signal's code, also where its terminal is gone."""
    source = f"""
import sys
from data.command_line import exit_code
def main():
    print("unread")
    {ends}
sys.stdin.readline()
sys.exit(exit_code(main))
"""
    with subprocess.Popen(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert (process.stderr.read(), process.wait(timeout=30)) == ("", code)
