"""Turn flat frozen dataclasses into command-line flags and TOML recipes, and read them back.

Several dataclasses feed one flat flag namespace. Every field is a flag: its type gives the
conversion, its metadata the help text. A value is a flag's, else a recipe's, else the dataclass
default, and its origin is kept. Every problem of one command line (flags, recipe, combinations) is
collected and reported together.

Supported field types: bool, int, float, str, Literal[...], KeptFile (a file that config.json keeps
whole), NameOrFile (a name, or such a file where it ends in .toml), any of these `| None`, and
tuple[one of these, ...]. None is a value like others ("no bound"). That a value was not given is
told by its origin, "default".
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.resources
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_type_hints

from data.files import DataError, KeptFile, NameOrFile
from engine.peer_flags import advice
from engine.values import (
    ANY,
    Range,
    Setting,
    checked,
    expected,
    from_text,
    from_toml,
    show,
    take_apart,
)

_LARGEST_RECIPE = 1_000_000  # bytes; shipped ones have 1,500
_MOST_KEYS = 1_000
# one table per script; keys above the first table are shared by all of them
RECIPE_TABLES = ("sft", "grpo", "eval", "merge")
Changes = dict[str, tuple[Any, str]]  # the value and the origin of settings, by name


class UsageError(ValueError):
    """Report a mistake that the user can correct: scripts print `problems` and exit with code 2."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(UsageError):
    """Report everything that is wrong with one command line."""


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    source: str = "",
    unset: str = "",
    within: str = "",
    aliases: tuple[str, ...] = (),
    group: str = "",
) -> Any:
    """Declare a dataclass field that becomes a flag.

    default: what the flag has where nothing gives it.
    help: what --help says of it.
    unit: what the number counts.
    source: where the default comes from ("paper 3.2.1").
    unset: what --help says in place of the default, where something else decides without the flag.
    within: the interval of a number, "[0, 1)". Every setting of a number needs one.
    aliases: further names of the flag, without dashes.
    group: the heading in --help, or empty for the name of the class.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "source": source,
        "unset": unset,
        "within": within,
        "aliases": aliases,
        "group": group,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Resolved:
    """Hold one command line as read: a config of each class, and where every value came from.

    The configs are in the order of the classes that were asked for.
    """

    configs: tuple[Any, ...]
    origins: dict[str, str]  # by setting: "default", "recipe NAME", "flag", "resumed run", ...
    recipes: tuple[str, ...] = ()  # names or files, in the order in which they apply

    def with_value(self, name: str, value: Any, origin: str) -> Resolved:
        """Copy it all with one value that a script found itself, such as the newest adapter.

        Raises KeyError for a name that is no field of the configs.
        """
        if name not in self.origins:
            raise KeyError(name)
        configs = tuple(
            dataclasses.replace(config, **{name: value}) if name in _field_names(config) else config
            for config in self.configs
        )
        return dataclasses.replace(self, configs=configs, origins=self.origins | {name: origin})

    def record(self) -> dict[str, Any]:
        """Write it all in values that JSON keeps, for another process (`of_record`)."""
        return {"settings": to_json(self), "recipes": list(self.recipes)}

    @classmethod
    def of_record(cls, config_classes: Sequence[type], record: dict[str, Any]) -> Resolved:
        """Make again what `record` wrote. config_classes: those of its configs, in their order."""
        settings = record["settings"]
        values = {name: _from_list(entry["value"]) for name, entry in settings.items()}
        configs = tuple(
            config_class(**{name: values[name] for name in _field_names(config_class)})
            for config_class in config_classes
        )
        origins = {name: entry["origin"] for name, entry in settings.items()}
        return cls(configs, origins, tuple(record["recipes"]))


def _field_names(config: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _settings(config_classes: Sequence[type]) -> dict[str, Setting]:
    """Gather every field of every class, by name.

    Raises TypeError where a class cannot be turned into flags.
    """
    found: dict[str, Setting] = {}
    for owner in config_classes:
        hints = get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if field.name in found:
                raise TypeError(
                    f"{field.name} is a field of both {found[field.name].owner.__name__} and"
                    f" {owner.__name__}"
                )
            if field.default is dataclasses.MISSING:
                raise TypeError(
                    f"{owner.__name__}.{field.name} needs a default that is not a factory"
                )
            kind, choices, optional, repeated = take_apart(hints[field.name])
            found[field.name] = Setting(
                field.name,
                owner,
                kind,
                choices,
                optional,
                repeated,
                field.default,
                _help_text(field),
                field.metadata.get("group") or _group_of(owner, field.name),
                tuple(field.metadata.get("aliases", ())),
                _range_of(field, kind),
            )
    return found


def _range_of(field: dataclasses.Field, kind: type) -> Range | None:
    """Read the interval that a field of a number declares.

    A plain dataclass field without one has any finite number. Raises TypeError where `setting`
    declares a number without an interval.
    """
    if kind not in ANY:
        return None
    if field.metadata.get("within") == "":
        raise TypeError(
            f"{field.name} is a number and needs its interval: setting(within='[0, 1)')"
        )
    return Range.of(field.metadata.get("within", ANY[kind]))


def range_problems(config: Any) -> list[str]:
    """Name the values of a config that are not in their range, wherever they came from."""
    problems = []
    for name, setting in _settings([type(config)]).items():
        value = getattr(config, name)
        if setting.range is not None and value is not None:
            try:
                checked(setting, value)
            except ValueError as error:
                problems.append(f"--{name}: {error}")
    return problems


def _group_of(owner: type, name: str) -> str:
    """Name the class that declares a field: inherited fields are listed under its heading."""
    declaring = next(
        cls for cls in owner.__mro__ if name in cls.__dict__.get("__annotations__", {})
    )
    return declaring.__name__.removesuffix("Config").lower() or declaring.__name__


def _help_text(field: dataclasses.Field) -> str:
    unit, source = field.metadata.get("unit", ""), field.metadata.get("source", "")
    facts = [f"default {field.metadata.get('unset') or show(field.default)}"]
    if unit:
        facts = (
            [f"{facts[0]} {unit}"]
            if isinstance(field.default, (int, float)) and not field.metadata.get("unset")
            else [*facts, f"in {unit}"]
        )
    if source:
        facts.append(source)
    return f"{field.metadata.get('help', '')} [{'; '.join(facts)}]".strip()


def _nearest(name: str, names: Sequence[Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, [str(known) for known in names], n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


_METAVARS = {KeptFile: "FILE", NameOrFile: "NAME|FILE.toml"}


# ---- flags ---------------------------------------------------------------------------------------
def _build_parser(
    settings: dict[str, Setting], *, prog: str, description: str, recipes: list[str]
) -> argparse.ArgumentParser:
    """Make a parser that only splits into raw strings, so that no conversion stops at one error."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--recipe NAME|FILE.toml ...] [--flag value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Flags may be written with - in place of _. A flag overrides the recipes, a later"
            " recipe\nthe earlier ones, a recipe the default.\n\nExit codes: 0 done, 1 failed,"
            " 2 what you can correct, 141 where nobody reads the output,\nafter a signal 129"
            " (HUP), 130 (Ctrl-C), 138 (USR1), 140 (USR2) or 143 (TERM)."
        ),
    )
    parser.add_argument(
        "--recipe",
        "--config",
        dest="recipe",
        action="append",
        metavar="NAME|FILE.toml",
        help=(
            f"values from a TOML file or a shipped recipe ({', '.join(recipes) or 'none shipped'});"
            " repeatable, later ones win"
        ),
    )
    # in the order of first appearance
    titles = dict.fromkeys(setting.group for setting in settings.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    for setting in settings.values():
        flags = [f"--{name}" for name in (setting.name, *setting.aliases)]
        text = setting.help.replace("%", "%%")
        options: dict[str, Any] = {"nargs": "+"} if setting.repeated else {}
        if setting.kind is bool:
            options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
            text += f" (off: --no_{setting.name})"
        elif setting.choices:
            options["metavar"] = "{" + ",".join(map(str, setting.choices)) + "}"
        else:
            options["metavar"] = _METAVARS.get(setting.kind) or setting.kind.__name__.upper()
        groups[setting.group].add_argument(
            *flags, dest=setting.name, action="append", help=text, **options
        )
    return parser


def _normalise(argv: Sequence[str], settings: dict[str, Setting]) -> tuple[list[str], list[str]]:
    """Rewrite argv in the one spelling that argparse cannot stumble over -> (tokens, problems).

    --a-b becomes --a_b, --no_x of a bool becomes --x=false, and --x value becomes --x=value, so
    that -1e-5 is a value. A flag whose value is missing is taken out and reported.
    """
    by_flag = {
        f"--{alias}": setting
        for setting in settings.values()
        for alias in (setting.name, *setting.aliases)
    }
    off = {
        flag.replace("--", "--no_"): f"{flag}=false"
        for flag, setting in by_flag.items()
        if setting.kind is bool
    }
    needed = {
        flag: expected(setting) for flag, setting in by_flag.items() if setting.kind is not bool
    }
    needed |= dict.fromkeys(("--recipe", "--config"), "a name or a .toml file")
    tokens, problems, rest = [], [], list(argv)
    while rest:
        token = rest.pop(0)
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            flag = "--" + flag[2:].replace("-", "_")
            token = off.get(flag + equals, flag + equals + value)
            if flag in needed and not equals:
                if not rest or rest[0].startswith("--"):
                    problems.append(f"{flag}: expected {needed[flag]}, got nothing")
                    continue
                if flag not in by_flag or not by_flag[flag].repeated:
                    token = f"{flag}={rest.pop(0)}"
        tokens.append(token)
    return tokens, problems


def _split(
    parser: argparse.ArgumentParser, argv: Sequence[str], settings: dict[str, Setting]
) -> tuple[dict[str, list[str]], list[str]]:
    """Split argv -> ({field: its raw values in order}, problems)."""
    tokens, problems = _normalise(argv, settings)
    namespace, extras = parser.parse_known_args(tokens)
    raw: dict[str, list[str]] = {}
    for name, occurrences in vars(namespace).items():
        is_repeated = name == "recipe" or settings[name].repeated
        if len(occurrences or []) > 1 and not is_repeated:
            problems.append(f"--{name} is given {len(occurrences)} times; give it once")
        for occurrence in occurrences or []:
            raw.setdefault(name, []).extend(
                occurrence if isinstance(occurrence, list) else [occurrence]
            )
        if is_repeated and name in raw:
            counts = Counter(raw[name])
            problems += [
                f"--{name} {value} is given {count} times; give it once"
                for value, count in counts.items()
                if count > 1
            ]
            raw[name] = list(counts)
    known = [
        "recipe",
        *(alias for setting in settings.values() for alias in (setting.name, *setting.aliases)),
    ]
    after_unknown = False
    for extra in extras:
        is_flag = extra.startswith("-") and not extra[1:2].isdigit()
        if is_flag:
            flag = extra.partition("=")[0]
            said = advice(flag)
            hint = f": {said}" if said else _nearest(flag.lstrip("-"), known, prefix="--")
            problems.append(f"unknown flag {flag}{hint}")
        elif not after_unknown:  # the value of an unknown flag is not a second problem
            problems.append(f"unexpected argument {extra!r}: every value needs a flag in front")
        after_unknown = is_flag
    return raw, problems


# ---- recipes -------------------------------------------------------------------------------------
def _shipped_recipes(package: str) -> list[str]:
    files = importlib.resources.files(package).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def _read_recipe(recipe: str, package: str) -> dict[str, Any]:
    """Read a recipe's TOML.

    recipe: a shipped name, or a file whose name ends in .toml.

    Raises ConfigError where there is none or it is not TOML.
    """
    source: Path | Traversable
    if recipe.endswith(".toml"):
        source = Path(recipe)
    else:
        shipped = _shipped_recipes(package)
        if recipe not in shipped:
            raise ConfigError(
                f"--recipe {recipe}: no such recipe{_nearest(recipe, shipped)} (shipped:"
                f" {', '.join(shipped) or 'none'}; the name of a file ends in .toml)"
            )
        source = importlib.resources.files(package) / f"{recipe}.toml"
    try:
        with source.open("rb") as file:
            content = file.read(_LARGEST_RECIPE + 1)
        if len(content) > _LARGEST_RECIPE:
            raise ValueError(f"it has more than {_LARGEST_RECIPE:,} bytes")
        found = tomllib.loads(content.decode("utf-8"))
        keys = len(found) + sum(len(part) for part in found.values() if isinstance(part, dict))
        if keys > _MOST_KEYS:
            raise ValueError(f"it has {keys:,} keys, and there are not so many settings")
        return found
    except OSError as error:
        raise ConfigError(f"--recipe {recipe}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also of a number with 5,000 digits
        raise ConfigError(f"--recipe {recipe}: is not valid TOML: {error}") from error


def _recipe_values(
    recipe: str, content: dict[str, Any], settings: dict[str, Setting], script: str
) -> tuple[dict[str, Any], list[str]]:
    """Read the shared keys and this script's table, which wins -> ({field: value}, problems)."""
    names = {
        alias: setting.name
        for setting in settings.values()
        for alias in (setting.name, *setting.aliases)
    }
    shared = {key: value for key, value in content.items() if not isinstance(value, dict)}
    values: dict[str, Any] = {}
    problems = [
        f"{recipe}: unknown table [{key}]{_nearest(key, RECIPE_TABLES)}; known:"
        f" {', '.join(RECIPE_TABLES)}"
        for key, value in content.items()
        if isinstance(value, dict) and key not in RECIPE_TABLES
    ]
    own = content.get(script, {})
    if not isinstance(own, dict):
        own = {}  # reported below: a plain value under the table's name is an unknown shared key
    for where, table in (("", shared), (f" in [{script}]", own)):
        seen: set[str] = set()
        for key, value in table.items():
            name = names.get(key)
            if name is None:
                problems.append(f"{recipe}: unknown key {key!r}{where}{_nearest(key, list(names))}")
                continue
            if name in seen:
                problems.append(f"{recipe}: {name} is given twice{where}, once as an alias")
            seen.add(name)
            try:
                values[name] = from_toml(settings[name], value)
            except ValueError as error:
                problems.append(f"{recipe}: {key}{where}: {error}")
    return values, problems


# ---- all together --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Resuming:
    """Say how a command line goes on with an earlier run.

    flag: the setting whose value names the run.
    settings_of: `settings_of(that value)` gives the settings of that run. They stand in for the
        defaults, and a recipe or a flag that would change one is a problem. None for a new run.
    free_to_change: settings that a resumed run may change.
    settle: `settle(that value, values, origins)` returns values of these that the resumed run takes
        instead, with their origins. It raises UsageError for values that it cannot take.
    named: the run's name, whatever the flag says.
    """

    flag: str
    settings_of: Callable[[str], dict[str, Any] | None]
    free_to_change: Sequence[str] = ()
    settle: Callable[[str, dict[str, Any], dict[str, str]], Changes] = lambda *_: {}
    named: str | None = None


@dataclass
class _Layers:
    """Lay the values of recipes, a resumed run and flags over the defaults, with their origins."""

    settings: dict[str, Setting]
    problems: list[str]

    def __post_init__(self) -> None:
        self.values = {name: setting.default for name, setting in self.settings.items()}
        self.origins = dict.fromkeys(self.values, "default")

    def add_recipe(self, recipe: str, package: str, script: str) -> None:
        try:
            content = _read_recipe(recipe, package)
        except ConfigError as error:
            self.problems += error.problems
            return
        values, problems = _recipe_values(recipe, content, self.settings, script)
        self.problems += problems
        self.values |= values
        self.origins |= dict.fromkeys(values, f"recipe {recipe}")

    def add_resumed(self, inherited: dict[str, Any]) -> None:
        for name, value in inherited.items():
            if self.origins[name] == "default":
                self.values[name] = value
                if value != self.settings[name].default:
                    self.origins[name] = "resumed run"

    def add_flags(self, raw: dict[str, list[str]]) -> None:
        for name, texts in raw.items():
            try:
                self.values[name] = from_text(self.settings[name], texts)
                self.origins[name] = "flag"
            except DataError as error:  # of a file, which it names
                self.problems += [f"--{name} {problem}" for problem in error.problems]
            except ValueError as error:
                self.problems.append(f"--{name}: {error}")

    def add(self, changes: Changes) -> None:
        for name, (value, origin) in changes.items():
            self.values[name], self.origins[name] = value, origin

    def refuse_changes(self, inherited: dict[str, Any], free_to_change: Sequence[str]) -> None:
        self.problems += [
            f"--{name}: the resumed run has {show(before)}, not {show(self.values[name])}"
            f" ({self.origins[name]}); a resumed run keeps its settings: leave it out, or start a"
            " new run"
            for name, before in inherited.items()
            if self.values[name] != before and name not in free_to_change
        ]


def parse_config(
    config_classes: Sequence[type],
    argv: Sequence[str],
    *,
    script: str,
    prog: str,
    description: str = "",
    recipes_package: str = "engine.recipes",
    default_recipe: str | None = None,
    default_recipe_unless: Sequence[str] = (),
    validate: Callable[..., list[str]] = lambda *_: [],
    resuming: Resuming | None = None,
) -> Resolved:
    """Read one command line into one instance of each class.

    script: the recipe table that applies.
    prog, description: for --help.
    recipes_package: the package whose .toml files are the shipped recipes.
    default_recipe: applies when neither --recipe nor a field of default_recipe_unless is given. Of
        several recipes later ones win.
    validate: `validate(*configs)` returns the problems of values that do not combine. It sees the
        default or recipe value in place of one that could not be read.
    resuming: how a run goes on, for a script whose runs can.

    Raises ConfigError with every problem found. --help prints and raises SystemExit(0), as argparse
    does.
    """
    if script not in RECIPE_TABLES:
        raise ValueError(f"script must be one of {RECIPE_TABLES}, not {script!r}")
    settings = _settings(config_classes)
    parser = _build_parser(
        settings, prog=prog, description=description, recipes=_shipped_recipes(recipes_package)
    )
    raw, problems = _split(parser, argv, settings)
    recipes = tuple(dict.fromkeys(raw.pop("recipe", ())))
    named, inherited = _resumed(resuming, raw, settings) if resuming else (None, None)
    by_default = inherited is None and not any(name in raw for name in default_recipe_unless)
    if not recipes and default_recipe is not None and by_default:
        recipes = (default_recipe,)

    layers = _Layers(settings, problems)
    for recipe in recipes:
        layers.add_recipe(recipe, recipes_package, script)
    if inherited is not None:
        layers.add_resumed(inherited)
    layers.add_flags(raw)
    refused: list[str] = []
    if resuming and resuming.named is not None:
        layers.add({resuming.flag: (resuming.named, "unfinished run")})
    if resuming and named and inherited:
        layers.refuse_changes(inherited, resuming.free_to_change)
        try:
            layers.add(resuming.settle(named, layers.values, layers.origins))
        except UsageError as error:
            refused += error.problems
    configs, found = _instances(config_classes, layers.values)
    refused += found
    problems += refused or validate(*configs)
    if problems:
        raise ConfigError(problems)
    return Resolved(tuple(configs), layers.origins, recipes)


def _resumed(
    resuming: Resuming, raw: dict[str, list[str]], settings: dict[str, Setting]
) -> tuple[str | None, dict[str, Any] | None]:
    """Find the run that is resumed -> (its name, its settings), None where there is none."""
    named = resuming.named or (raw[resuming.flag][-1] if resuming.flag in raw else None)
    saved = resuming.settings_of(named) if named else None
    if saved is None:
        return named, None
    return named, _inherited(saved, settings, resuming.free_to_change)


def _inherited(
    saved: dict[str, Any], settings: dict[str, Setting], free_to_change: Sequence[str]
) -> dict[str, Any]:
    """Convert a saved run's settings to the types of today's dataclasses.

    free_to_change: settings that change no number. An earlier version may not have had them yet.

    Raises ConfigError where the names of others differ.
    """
    different = sorted((saved.keys() ^ settings.keys()) - (set(free_to_change) - saved.keys()))
    if different:
        raise ConfigError(
            "the run that is resumed and this version do not have the same settings"
            f" ({', '.join(different)} differ), so it cannot go on bit for bit; start a new run"
            " from its adapter"
        )
    return {
        # an earlier version kept one text where there are several now
        name: _from_list([value] if value else [])
        if isinstance(value, str) and name in settings and settings[name].repeated
        else _from_list(value)
        for name, value in saved.items()
    }


def _instances(
    config_classes: Sequence[type], values: dict[str, Any]
) -> tuple[list[Any], list[str]]:
    """Make one instance of each class -> (instances, what a __post_init__ refused)."""
    configs: list[Any] = []
    problems: list[str] = []
    for config_class in config_classes:
        try:
            configs.append(
                config_class(**{name: values[name] for name in _field_names(config_class)})
            )
        except ValueError as error:
            problems += str(error).splitlines()
    return configs, problems


def recipe_entry(recipes: Sequence[str]) -> str | list[str] | None:
    """Write recipes as config.json has them: null for none, the name of one, a list of several."""
    return list(recipes) if len(recipes) > 1 else next(iter(recipes), None)


def recipes_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the recipes of a run out of its config.json, as `recipe_entry` wrote them."""
    recipe = record.get("recipe")
    return tuple(recipe) if isinstance(recipe, list) else (recipe,) if recipe else ()


def describe(resolved: Resolved) -> str:
    """List the values that differ from the dataclass defaults, one a line with their origin."""
    rows = [
        (field.name, show(getattr(config, field.name)), resolved.origins[field.name])
        for config in resolved.configs
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    if not rows:
        return "every setting has its default value"
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows
    )


def to_json(resolved: Resolved) -> dict[str, dict[str, Any]]:
    """Write every setting as {name: {"value", "origin"}}, in values that JSON keeps."""
    return {
        field.name: {
            "value": _json_value(getattr(config, field.name)),
            "origin": resolved.origins[field.name],
        }
        for config in resolved.configs
        for field in dataclasses.fields(config)
    }


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    return value.record() if isinstance(value, KeptFile) else value


def _from_list(value: Any) -> Any:
    """Read the value of a setting that JSON holds: a list was a tuple."""
    return tuple(map(from_json, value)) if isinstance(value, list) else from_json(value)


def from_json(value: Any) -> Any:
    """Read one value that `to_json` wrote. Raises DataError for a kept file that is not whole."""
    return KeptFile.from_record(value) if isinstance(value, dict) else value
