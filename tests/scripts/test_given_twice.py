"""Protect every command line from a flag that is given twice: no value is dropped without a word.

Checked: all flags of all commands, found by looking for them. A flag that several values repeat
refuses the same value a second time.

Run: pytest tests/scripts/test_given_twice.py
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

import pytest

import engine.config
from data.command_line import Parser
from engine.config import ConfigError, UsageError
from engine.values import Setting
from tests.helpers.repository import ROOT

COMMANDS = sorted(
    str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".")
    for folder in (".", "data", "data/demo", "engine", "eval", "rl")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
OF_SETTINGS = [one for one in COMMANDS if one.startswith(("run_", "engine.", "eval."))]
OF_PARSERS = [one for one in COMMANDS if one not in OF_SETTINGS]
# what they name is read before the other flags are looked at, and is not there
READ_FIRST = ("resume_from_checkpoint",)


class Found(Exception):
    """Carry the flags of a command out of it, before anything is done."""


def test_the_walk_is_over_all_commands():
    assert {"run_sft", "run_grpo", "engine.merge", "eval.matrix", "eval.figures"} < {*OF_SETTINGS}
    assert {"data.check", "data.select", "data.traces", "data.table", "data.dicom"} < {*OF_PARSERS}
    assert {"data.demo.splits", "data.demo.build_base"} < {*OF_PARSERS}


# ---- commands whose flags are fields of a dataclass ----------------------------------------------
def settings_of(command: str, monkeypatch) -> dict[str, Setting]:
    def found(parser: object, argv: Sequence[str], settings: dict[str, Setting]) -> Any:
        raise Found(settings)

    with monkeypatch.context() as patch:
        patch.setattr(engine.config, "_split", found)
        with pytest.raises(Found) as raised:
            importlib.import_module(command).main(["--none"])
    return raised.value.args[0]


def problems_of(command: str, argv: Sequence[str], capsys) -> list[str]:
    """List what a command that must be refused says, whichever way it leaves."""
    try:
        assert importlib.import_module(command).main(argv) == 2
    except (ConfigError, UsageError) as error:
        return error.problems
    return [line.removeprefix("error: ") for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize("command", OF_SETTINGS)
def test_no_setting_is_given_twice(command, monkeypatch, capsys, tmp_path):
    settings = settings_of(command, monkeypatch)
    monkeypatch.chdir(tmp_path)
    names = [name for name in settings if name not in READ_FIRST]
    twice = [f"--{name}=1" for name in (*names, "recipe") for _ in (1, 2)]
    found = problems_of(command, twice, capsys)
    for name in (*names, "recipe"):
        value = " 1" if name == "recipe" or settings[name].repeated else ""
        assert f"--{name}{value} is given 2 times; give it once" in found
    assert not list(tmp_path.iterdir())


# ---- commands with a parser ----------------------------------------------------------------------
def parser_of(command: str, monkeypatch) -> Parser:
    def found(parser: Parser, *arguments: Any, **options: Any) -> Any:
        raise Found(parser)

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_args", found)
        with pytest.raises(Found) as raised:
            importlib.import_module(command).main([])
    return raised.value.args[0]


def flags_of(parser: argparse.ArgumentParser) -> list[tuple[list[str], argparse.Action]]:
    """List every flag with what stands in front of it, such as the name of a sub-command."""
    found: list[tuple[list[str], argparse.Action]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, other in action.choices.items():
                found += [([name, *front], flag) for front, flag in flags_of(other)]
        elif action.option_strings and not isinstance(action, argparse._HelpAction):
            found.append(([], action))
    return found


@pytest.mark.parametrize("command", OF_PARSERS)
def test_no_flag_of_a_parser_is_given_twice(command, monkeypatch, capsys):
    parser = parser_of(command, monkeypatch)
    flags = flags_of(parser)
    assert flags or command == "data.demo.splits"  # which has positions alone
    for front, action in flags:
        flag = action.option_strings[-1]
        value = [] if action.nargs == 0 else [str(next(iter(action.choices or ["1"])))]
        told = refused(parser, [*front, flag, *value, flag, *value], capsys)
        assert f"{'/'.join(action.option_strings)}: is given twice; give it once" in told
        if action.nargs == "+":
            told = refused(parser, [*front, flag, *value, *value], capsys)
            assert f": {value[0]} is given twice; give it once" in told


def refused(parser: Parser, argv: list[str], capsys) -> str:
    with pytest.raises((SystemExit, ValueError)) as raised:  # data.select's parser raises DataError
        parser.parse_args(argv)
    return capsys.readouterr().err + str(raised.value)
