"""Check what a checkpoint says of its run, before a name or a number in it is used.

A checkpoint's SHA-256 tell that it is whole, not who wrote it. Names in it become paths, and its
numbers counters and settings.

Everything in it is plain Python, so a wrong checkpoint on a command line is answered without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from data.files import is_name
from data.plain_files import is_checkpoint_name
from data.sets import TRAIN
from engine.adapter_settings import shown
from engine.checkpoint import Checkpoint, CheckpointError
from engine.model_files import ADAPTER_FILES
from engine.run_batch import BATCH_SETTINGS

_SHA256 = re.compile(r"[0-9a-f]{64}")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_BASE_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_LARGEST_COUNT = 10**15  # of steps, tokens or bytes

Check = Callable[[Any], bool]


def checked(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose config.json and trainer_state.json are those of a run.

    Raises CheckpointError naming the first value that is not.
    """
    for file, checks in (("config.json", _CONFIG), ("trainer_state.json", _STATE)):
        record = checkpoint.record(file)
        if file == "trainer_state.json" and isinstance(record, dict):
            record = _NEW_STATE | record  # one of an earlier version lacks what had no part in it
        problem = _problem(record, checks)
        if problem is None and file == "trainer_state.json":
            problem = _other_step(record, checkpoint.step)
        if problem is not None:
            raise CheckpointError(f"{checkpoint.path / file}: {problem}; it is no run's")
    return checkpoint


def _problem(record: Any, checks: Mapping[str, Check]) -> str | None:
    if not isinstance(record, dict):
        return f"holds {shown(record)}, not an object"
    for name, check in checks.items():
        if not check(record.get(name)):
            said = f"is {shown(record[name])}" if name in record else "is missing"
            return f"{name!r} {said}"
    return None


def _other_step(record: Mapping[str, Any], step: int) -> str | None:
    named = record["global_step"]
    return None if named == step else f"'global_step' is {named}, the checkpoint is of step {step}"


# ---- kinds of values -----------------------------------------------------------------------------
def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _set(name: str) -> bool:
    """Check the name of a data set: a plain one, or train.NAME of a hospital that is trained on."""
    return is_name(name.removeprefix(f"{TRAIN}."))


def _line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 4000


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _listed(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _mapped(key: Check, check: Check) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(key(name) and check(item) for name, item in value.items())
    )


def _object(checks: Mapping[str, Check]) -> Check:
    return lambda value: _problem(value, checks) is None


def _sum(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _metric(value: Any) -> bool:
    """Check a measurement of steps that were not logged: [reduction, [[value, weight], ...]]."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    pairs = _listed(lambda pair: _listed(_number)(pair) and len(pair) == 2)
    return value[0] in ("mean", "min", "max", "sum") and pairs(value[1])


_CONFIG: dict[str, Check] = {
    "script": lambda value: value in ("sft", "grpo"),
    "recipe": lambda value: value is None or _line(value) or _listed(_line)(value),
    "settings": _mapped(str.isidentifier, _object({"value": lambda value: True, "origin": _line})),
    "data": _mapped(_set, _object({"file": _text, "sha256": _sum, "weight": _optional(_positive)})),
    "bad_images": _optional(_mapped(_set, _listed(lambda row: isinstance(row, dict)))),
    "reference": _optional(_mapped(lambda name: name in ADAPTER_FILES, _sum)),
    "run_id": _optional(
        lambda value: isinstance(value, str) and _RUN_ID.fullmatch(value) is not None
    ),
    "batch": lambda value: value is None or _object(_BATCH)(value),
    "base": lambda value: value in (None, {}) or _object(_BASE)(value),
    # the files of --reward MODULE:NAME
    "reward_code": _optional(
        _mapped(_line, _object({"file": lambda v: isinstance(v, str), "sha256": _sum}))
    ),
}
_BATCH: dict[str, Check] = {
    "step": lambda value: _count(value) and value > 0,
    "rollout": lambda value: value is None or _count(value) and value > 0,
    "ranks": lambda value: _count(value) and value > 0,
    "begun": _mapped(lambda name: name in BATCH_SETTINGS, _optional(_count)),
}
_BASE: dict[str, Check] = {
    "name": lambda value: isinstance(value, str),
    "hash": lambda value: value in ("sample", "full"),
    "files": _mapped(
        lambda name: _BASE_FILE.fullmatch(name) is not None,
        _object({"bytes": _count, "sha256": _sum}),
    ),
}
_NEW_STATE = {
    "epoch": 0.0,
    "evaluations_without_improvement": 0,
    "num_tokens": 0,
    "evaluated_step": -1,
    "evaluations": {},
    "greater_is_better": True,
    "log_history": [],
    "unlogged_metrics": {},
}
_STATE: dict[str, Check] = {
    "global_step": _count,
    "epoch": _number,
    "best_metric": _optional(_number),
    "best_model_checkpoint": _optional(is_checkpoint_name),
    "evaluations_without_improvement": _count,
    "num_tokens": _count,
    "evaluated_step": lambda value: value == -1 or _count(value),
    "evaluations": _mapped(is_checkpoint_name, _number),
    "greater_is_better": lambda value: isinstance(value, bool),
    "log_history": _listed(lambda row: isinstance(row, dict) and _count(row.get("step"))),
    "unlogged_metrics": _mapped(lambda name: True, _metric),
}
