"""Turn the text of a flag, or a value of a recipe, into the value of a setting, or refuse it.

A number is written in plain digits, is finite, and lies in the setting's range. A text is neither
empty nor anything that no file name could hold. A refusal says what was expected in one line.
"""

from __future__ import annotations

import math
import re
import sys
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from data.files import KeptFile, NameOrFile
from engine.peer_flags import CHOICES

# What a setting of a number gets that declares no range: a plain field of a dataclass.
ANY = {int: "[-9223372036854775808, 9223372036854775807]", float: "(-inf, inf)"}


class Range(NamedTuple):
    """Hold the interval of a number. No number is ever infinite or NaN.

    low, high: its ends. low_open, high_open: whether they do not belong to it.
    """

    low: float
    high: float
    low_open: bool
    high_open: bool

    @classmethod
    def of(cls, text: str) -> Range:
        """Read "[0, 1)" or "(0, inf)". Raises ValueError for anything else."""
        match = re.fullmatch(r"([\[(])(\S+), (\S+)([\])])", text)
        if match is None:
            raise ValueError(f"{text!r} is no interval such as '[0, 1)'")
        low, high = (
            int(end) if re.fullmatch(r"-?\d+", end) else float(end) for end in match.groups()[1:3]
        )
        if not low < high:
            raise ValueError(f"{text!r} is empty")
        return cls(low, high, match[1] == "(", match[4] == ")")

    def holds(self, value: float) -> bool:
        """Tell whether a number lies in the interval and is finite."""
        return (
            (isinstance(value, int) or math.isfinite(value))  # an int can be too large for a float
            and (self.low < value or (value == self.low and not self.low_open))
            and (value < self.high or (value == self.high and not self.high_open))
        )

    def words(self) -> str:
        """Write the interval for a message: "from 1 to 8", "above 0 and at most 1", ""."""
        if not self.low_open and not self.high_open and math.isfinite(self.high):
            return f"from {self.low:.15g} to {self.high:.15g}"
        low = f"{'above' if self.low_open else 'at least'} {self.low:.15g}"
        high = f"{'below' if self.high_open else 'at most'} {self.high:.15g}"
        ends = (math.isfinite(self.low), math.isfinite(self.high))
        return " and ".join(word for word, finite in zip((low, high), ends, strict=True) if finite)


class Setting(NamedTuple):
    """Describe one field, with its type taken apart."""

    name: str
    owner: type  # the config class it is read from
    kind: Any  # bool, int, float, str, KeptFile or NameOrFile; str for a Literal
    choices: tuple[Any, ...]
    optional: bool
    repeated: bool
    default: Any
    help: str
    group: str
    aliases: tuple[str, ...]
    range: Range | None  # of a number


# ---- types ---------------------------------------------------------------------------------------
def take_apart(annotation: Any) -> tuple[Any, tuple[Any, ...], bool, bool]:
    """Take a field's type apart -> (kind, choices, optional, repeated).

    Raises TypeError for a type that no flag can express.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType) and annotation != NameOrFile:
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1 and len(arguments) == 2:
            kind, choices, optional, repeated = take_apart(inner[0])
            if not repeated:
                return kind, choices, True, False
    elif origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        kind, choices, optional, repeated = take_apart(arguments[0])
        if not optional and not repeated and kind is not bool:
            return kind, choices, False, True
    elif origin is Literal:
        return str, arguments, False, False
    elif annotation == NameOrFile or annotation in (bool, int, float, str, KeptFile):
        return annotation, (), False, False
    raise TypeError(f"a config field of type {annotation} cannot be a flag")


# ---- values --------------------------------------------------------------------------------------
_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    KeptFile: "the name of a file",
    NameOrFile: "a name or a .toml file",
}
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NUMBERS = {  # plain digits: no 1_000, 1,000 or 16k
    int: re.compile(r"[+-]?[0-9]{1,4000}"),
    float: re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"),
}
_SHOWN = 60  # characters of a wrong value in a message


def from_text(setting: Setting, texts: list[str]) -> Any:
    """Read the values of one flag. Raises ValueError that says what was expected."""
    if not setting.repeated:
        return _one_from_text(setting, texts[-1])
    return tuple(_one_from_text(setting, text) for text in texts)


def from_toml(setting: Setting, value: Any) -> Any:
    """Read one value of a recipe. Raises ValueError that says what was expected."""
    if not setting.repeated:
        return _one_from_toml(setting, value)
    if isinstance(value, str):  # one alone needs no array
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"expected an array, got the {_toml_type(value)} {_shown(value)}")
    return tuple(_one_from_toml(setting, item) for item in value)


def checked(setting: Setting, value: Any) -> Any:
    """Return a value of the setting's type where it may have it.

    Raises ValueError that says what was expected: a number out of range, a text that is empty, or
    one that no file name could hold.
    """
    if setting.range is not None and not setting.range.holds(value):
        raise ValueError(f"expected {expected(setting)}, got {_shown(value)}")
    if isinstance(value, str):
        if not value or "\0" in value:
            what = "text" if not value else "text without a NUL character"
            raise ValueError(f"expected {what}, got {_shown(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            hint = ""
            if sys.getfilesystemencoding() != "utf-8":
                hint = " (this locale is not UTF-8: set PYTHONUTF8=1)"
            raise ValueError(f"expected UTF-8 text, got {_shown(value)}{hint}") from None
    return value


def expected(setting: Setting) -> str:
    """Say in a message what a setting takes."""
    if setting.choices:
        return f"one of {', '.join(map(str, setting.choices))}"
    words = setting.range.words() if setting.range else ""
    return " ".join(
        part
        for part in (_KINDS[setting.kind], words, "or none" if setting.optional else "")
        if part
    )


def show(value: Any) -> str:
    """Write a value as a flag would have it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "empty"
    return str(value) or "''"


def _one_from_text(setting: Setting, text: str) -> Any:
    if setting.optional and text.lower() == "none":
        return None
    if setting.choices:
        return _choice(setting, text)
    if setting.kind in (KeptFile, NameOrFile):
        return _name_or_file(setting, text)
    value: Any = text
    if setting.kind is bool:
        value = _TRUTH.get(text.lower())
    elif setting.kind in _NUMBERS:
        value = setting.kind(text) if _NUMBERS[setting.kind].fullmatch(text) else None
        if value is not None and setting.range and not setting.range.holds(value):
            value = None
    if value is None:
        raise ValueError(f"expected {expected(setting)}, got {_shown(text)}")
    return checked(setting, value)


def _one_from_toml(setting: Setting, value: Any) -> Any:
    if setting.optional and value == "none":  # TOML has no null
        return None
    if setting.choices and isinstance(value, (str, int)):
        return _choice(setting, value)
    if setting.kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if setting.kind in (KeptFile, NameOrFile) and isinstance(value, str):
        return _name_or_file(setting, value)
    if type(value) is not setting.kind:  # exact: a TOML true is no integer, 5.0 is not 5
        raise ValueError(
            f"expected {expected(setting)}, got the {_toml_type(value)} {_shown(value)}"
        )
    return checked(setting, value)


def _name_or_file(setting: Setting, text: str) -> NameOrFile:
    """Read the file that a setting names. A .toml file that is not there is taken for a name."""
    checked(setting, text)
    is_file = text.lower().endswith(".toml") and Path(text).exists()
    return text if setting.kind == NameOrFile and not is_file else KeptFile.read(text)


def _choice(setting: Setting, value: Any) -> Any:
    for choice in setting.choices:
        if str(choice) == str(value):
            return choice
    more = f"; {CHOICES[setting.name]}" if setting.name in CHOICES else ""
    raise ValueError(f"{_shown(value)} is not {expected(setting)}{more}")


def _shown(value: Any) -> str:
    if type(value) is int and abs(value) >= 10**_SHOWN:
        return f"a number of {len(f'{abs(value):x}') * 4} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _toml_type(value: Any) -> str:
    names = {
        bool: "boolean",
        int: "integer",
        float: "float",
        str: "string",
        list: "array",
        dict: "table",
    }
    return names.get(type(value), type(value).__name__)
