"""Check adapter_config.json of a LoRA adapter by a whitelist of keys, types and ranges.

Nothing else of the file reaches peft, so one from elsewhere can neither import a module nor change
the frozen base, ask for more memory than its weights have, or hang in a regular expression.

Everything in it is plain Python, so a wrong adapter on a command line is answered without torch.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

LARGEST_RANK = 16_384
LARGEST_ALPHA = 1e6
LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes, as file systems have it
PATTERN_SECONDS = 3.0  # that the regular expressions of a file may take on the model's names

Check = Callable[[Any], str | None]  # of a value that is not null -> what is wrong with it


def base_problem(value: Any) -> str | None:
    """Say what is wrong with the name of a base model, None where it may be one."""
    if value is None:
        return None
    if not isinstance(value, str) or not value.isprintable():
        return f"is {shown(value)}, expected printable text or null"
    longest = max(len(part.encode()) for part in value.split("/"))
    if longest > LONGEST_NAME or len(value.encode()) > LONGEST_PATH:
        return f"is {shown(value)}, too long for a folder or a hub name"
    return None


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else f"is {shown(value)}, expected text"


def _truth(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"is {shown(value)}, expected true or false"


def _rank(value: Any) -> str | None:
    if type(value) is int and 1 <= value <= LARGEST_RANK:
        return None
    return f"is {shown(value)}, expected a whole number from 1 to {LARGEST_RANK:,}"


def _alpha(value: Any) -> str | None:
    if type(value) in (int, float) and 0 < value <= LARGEST_ALPHA:
        return None
    return f"is {shown(value)}, expected a number above 0, at most {LARGEST_ALPHA:,.0f}"


def _dropout(value: Any) -> str | None:
    if type(value) in (int, float) and 0 <= value < 1:
        return None
    return f"is {shown(value)}, expected a number in [0, 1)"


def _names(value: Any) -> str | None:
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        return None
    return f"is {shown(value)}, expected a list of names"


def _modules(value: Any) -> str | None:
    """Check names of modules: a list of them or one regular expression."""
    return _pattern(value) if isinstance(value, str) else _names(value)


def _patterns(value: Any) -> str | None:
    if isinstance(value, str):
        return _pattern(value)
    return _names(value) or next(filter(None, map(_pattern, value)), None)


def _pattern(value: str) -> str | None:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        return f"{shown(value)} is no regular expression ({error})"
    return None


def _by_pattern(check: Check) -> Check:
    """Check an object whose keys are regular expressions and whose values pass `check`."""

    def problem(value: Any) -> str | None:
        if not isinstance(value, dict):
            return f"is {shown(value)}, expected an object"
        for key, item in value.items():
            if found := _pattern(key):
                return found
            if found := check(item):
                return f"[{shown(key)}] {found}"
        return None

    return problem


def _indices(value: Any) -> str | None:
    if isinstance(value, list) and all(type(index) is int and index >= 0 for index in value):
        return None
    return f"is {shown(value)}, expected a list of whole numbers from 0"


def _layers(value: Any) -> str | None:
    return None if type(value) is int and value >= 0 else _indices(value)


def _tokens(value: Any) -> str | None:
    if not isinstance(value, dict):
        return _indices(value)
    return next(filter(None, map(_indices, value.values())), None)


def _bias(value: Any) -> str | None:
    known = ("none", "all", "lora_only")
    return None if value in known else f"is {shown(value)}, expected one of {', '.join(known)}"


# Beginnings of A and B for which peft subtracts their product from the frozen base, anew at every
# attachment. A run that is saved without peft's conversion then depends on a base that is nowhere.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


def _beginning(value: Any) -> str | None:
    if isinstance(value, bool) or isinstance(value, str) and value.lower() in _KEEPS_BASE:
        return None
    if isinstance(value, str) and value.lower().startswith(_CHANGES_BASE):
        return (
            f"is {shown(value)}, which changes the frozen base: save it as a plain LoRA, by peft's"
            " save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START)"
        )
    return f"is {shown(value)}, expected true, false or one of {', '.join(_KEEPS_BASE)}"


# What of adapter_config.json reaches peft, null counts as not there.
_CHECKS: dict[str, Check] = {
    "r": _rank,
    "lora_alpha": _alpha,
    "lora_dropout": _dropout,
    "target_modules": _modules,
    "exclude_modules": _modules,
    "layers_to_transform": _layers,
    "layers_pattern": _patterns,
    "rank_pattern": _by_pattern(_rank),
    "alpha_pattern": _by_pattern(_alpha),
    "modules_to_save": _patterns,
    "trainable_token_indices": _tokens,
    "bias": _bias,
    "use_rslora": _truth,
    "use_dora": _truth,
    "lora_bias": _truth,
    "task_type": _text,
}
# What must be off: it makes another function than base + LoRA, or another shape of the model.
_MUST_BE_OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# What says nothing of a trained adapter: how it was begun, where it was made.
_NO_MATTER = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",  # of Conv1D layers, which no family has
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
_KNOWN = frozenset((*_CHECKS, *_MUST_BE_OFF, *_NO_MATTER))


def accepted_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments of peft's LoraConfig out of a record without problems."""
    settings = {name: record[name] for name in _CHECKS if record.get(name) is not None}
    if isinstance(settings.get("modules_to_save"), str):
        settings["modules_to_save"] = [settings["modules_to_save"]]
    if "lora_alpha" in settings:
        settings["lora_alpha"] = alpha_of_peft(settings["lora_alpha"])
    return settings


def alpha_of_peft(alpha: float) -> Any:
    """Give an alpha as peft writes it: a whole one is no float, whatever a file or flag has."""
    return int(alpha) if float(alpha).is_integer() else alpha


def unknown_settings(record: dict[str, Any]) -> list[str]:
    """List the settings that are switched on and not known here, as ASCII."""
    return [ascii(key) for key in sorted(record) if key not in _KNOWN and record[key]]


def settings_problems(record: dict[str, Any]) -> list[str]:
    """Name what is wrong with the settings of adapter_config.json, one line each."""
    kind = record.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {shown(kind)}; only LORA adapters can be used here"]
    found = [
        f"{name} {problem}"
        for name, check in (_CHECKS | {"init_lora_weights": _beginning}).items()
        if record.get(name) is not None and (problem := check(record[name]))
    ]
    found += [
        f"{name} is {shown(record[name])}; adapters with it cannot be used here"
        for name in _MUST_BE_OFF
        if record.get(name)
    ]
    if not record.get("target_modules"):
        found.append("target_modules is missing; it names the layers that have LoRA")
    return found


def shown(value: Any) -> str:
    """Show a value of a foreign file in a message: short and printable."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# ---- regular expressions -------------------------------------------------------------------------
@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the block takes longer, also inside a regular expression.

    Only Python's main thread can be interrupted so. Elsewhere the block runs without a limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)


def slow_pattern(settings: dict[str, Any], names: Iterable[str]) -> str | None:
    """Name the pattern of the settings that takes too long on modules' names, or return None."""
    names = list(names)
    now = "", ""
    try:
        with time_limit(PATTERN_SECONDS):
            for now in _all_patterns(settings):
                for name in names:
                    re.match(rf"(.*\.)?({now[1]})$", f"{name}!")
    except TimeoutError:
        return f"{now[0]} {shown(now[1])} takes too long to compare with the modules' names"
    return None


def _all_patterns(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Give every regular expression of the settings with its setting's name."""
    for setting in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(settings.get(setting), str):
            yield setting, settings[setting]
    for setting in ("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"):
        value = settings.get(setting) or ()
        yield from ((setting, pattern) for pattern in value if not isinstance(value, str))
