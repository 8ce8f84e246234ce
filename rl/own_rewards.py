"""Import rewards of the user's own, make them, and note which files they came from.

A reward is named MODULE:NAME. MODULE is found on Python's path or in the current folder. NAME is a
subclass of `RewardFunction`, or a function that makes one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from data.files import sha256_of
from engine.config import UsageError
from rl.reward_checks import raised
from rl.rewards import RewardFunction


def own_reward(path: str, given: Mapping[str, Any]) -> RewardFunction:
    """Import a reward of the user's own and make it.

    path: MODULE:NAME. given: what it may ask for, by the names of its parameters.

    Raises UsageError, in one line, where that fails or makes no `RewardFunction`.
    """
    where, name = f"--reward {path}", path.partition(":")[2]
    with _current_folder_first():
        make = _named(_imported(path, where), name, where)
        asked = _asked_for(make, name, where, given)
        try:
            made = make(**{parameter: given[parameter] for parameter in asked})
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UsageError(f"{where}: {name}() {raised(make, error)}") from error
    if not isinstance(made, RewardFunction):
        raise UsageError(
            f"{where}: {name} makes a {type(made).__name__}, not a RewardFunction of rl.rewards;"
            " name a subclass of it, or a function that makes one"
        )
    return made


def _imported(path: str, where: str) -> ModuleType:
    name = path.partition(":")[0]
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lacks = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if lacks and f"{name}.".startswith(f"{lacks}."):
            raise UsageError(
                f"{where}: there is no module {lacks}, neither on Python's path nor in the current"
                f" folder {os.getcwd()}"
            ) from None
        if isinstance(error, SyntaxError) and error.filename:
            file = Path(error.filename).name
            told = f"raised SyntaxError: {error.msg} in {file}, line {error.lineno}"
        else:
            told = raised(None, error)
        raise UsageError(f"{where}: importing {name} {told}") from error


def _named(module: ModuleType, name: str, where: str) -> Callable[..., Any]:
    make = getattr(module, name, None)
    if callable(make):
        return make
    near = difflib.get_close_matches(name, [one for one in vars(module) if one[0] != "_"], 1)
    hint = f"; did you mean {near[0]}?" if near and near[0] != name else ""
    raise UsageError(f"{where}: {module.__name__} has no class or function {name}{hint}")


def _asked_for(
    make: Callable[..., Any], name: str, where: str, given: Collection[str]
) -> list[str]:
    """List the parameters that a reward is made with: those of its own that are known here."""
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):  # not to be looked at: it is called without arguments
        return []
    missing = [
        one.name
        for one in parameters
        if one.default is one.empty
        and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        and (one.name not in given or one.kind is one.POSITIONAL_ONLY)
    ]
    if missing:
        raise UsageError(
            f"{where}: {name} asks for {', '.join(missing)}; what makes a reward is given"
            f" {', '.join(given)} where it names them, and nothing else"
        )
    return [one.name for one in parameters if one.name in given]


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Let modules be found in the current folder within the block, as `python -m` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()  # the file may be seconds old
        yield
    finally:
        sys.path.remove(here)


# ---- in config.json ------------------------------------------------------------------------------
def reward_code(
    paths: Collection[str], known: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Hash the files of own rewards -> {module: its file and SHA-256}, and say which has changed.

    paths: of the rewards, MODULE:NAME, which are imported. known: what config.json of the
    checkpoint has of them that the run goes on from, {} for a new run.
    """
    code: dict[str, dict[str, str]] = {}
    for module in (path.partition(":")[0] for path in paths):
        file = getattr(sys.modules[module], "__file__", None)
        if file is not None:
            code[module] = {"file": file, "sha256": sha256_of(Path(file))}
    for module, now in code.items():
        was = known.get(module, now)["sha256"]
        if was != now["sha256"]:
            print(
                f"warning: {now['file']} is not what it was when the checkpoint was saved (SHA-256"
                f" {now['sha256'][:12]}, was {was[:12]}): from here on the run is rewarded by what"
                " it says now",
                file=sys.stderr,
            )
    return code
