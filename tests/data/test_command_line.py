"""Protect the command lines of data's commands: a flag once, in full, and numbers in range.

Run: pytest tests/data/test_command_line.py
"""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

import data.check
import data.demo.build_base
import data.dicom
import data.select
import data.table
import data.traces
from data.command_line import Parser, plain_integer

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
