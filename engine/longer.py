"""Make a run longer than it was begun: which settings do it, and what becomes of the earlier end.

Everything in it is plain Python, so a wrong length on a command line is answered without torch.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data.files import written_folder
from data.plain_files import is_plain, parse_record, read_plain
from engine.checkpoint import Checkpoint
from engine.config import UsageError
from engine.model_files import ADAPTER_FILES

LENGTHS = ("num_train_epochs", "max_steps")  # what decides how many steps a run has
EXTENDED = "extended"  # in config.json: each time that the run was made longer
# What is kept of the end of a run that goes on longer.
_RESULT = (
    *ADAPTER_FILES,
    "config.json",
    "trainer_state.json",
    "README.md",
    "summary.json",
    "predictions-*.jsonl",
    "scores-*.json",
)


def is_shorter(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Tell whether one command's length is surely less than another's, before the data are read.

    before, now: the values of LENGTHS.
    """
    if before["max_steps"] is not None and now["max_steps"] is not None:
        return bool(now["max_steps"] < before["max_steps"])
    if before["max_steps"] is None and now["max_steps"] is None:
        return bool(now["num_train_epochs"] < before["num_train_epochs"])
    return False


def extension(
    checkpoint: Checkpoint, config: Any, num_examples: int, count: Callable[[Any, int], int]
) -> dict[str, Any] | None:
    """Find out whether a run is made longer -> an entry of config.json's "extended", or None.

    config: the settings of today. count: the steps of a whole run, from settings and examples.

    The learning rate of each step is that of a run of the new length. The entry has it for the next
    step, before and after. Raises UsageError where the run is made shorter.
    """
    from engine.optim import scheduled_rate  # here: a command line is answered without torch

    saved = checkpoint.record("config.json")["settings"]
    values = {name: saved[name]["value"] for name in LENGTHS}
    before, step = dataclasses.replace(config, **values), checkpoint.step
    was, now = count(before, num_examples), count(config, num_examples)
    if now < was:
        raise UsageError(
            f"--max_steps or --num_train_epochs: {now} steps, but the run has {was} and stands at"
            f" step {step}; a run can be made longer, not shorter"
        )
    if now == was:
        return None
    rates = [scheduled_rate(of, step, total) for of, total in ((before, was), (config, now))]
    return {
        "from": step,
        "total_before": was,
        "total": now,
        "learning_rate_before": rates[0],
        "learning_rate": rates[1],
    }


def is_extended(record: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Tell whether a run is longer now than its checkpoint says. record: its config.json."""
    before = checkpoint.record("config.json").get(EXTENDED, [])
    return bool(record.get(EXTENDED, []) != before)


def extension_line(record: Mapping[str, Any]) -> str:
    """Say in a line that a run goes on longer, and with which learning rate."""
    entry = record[EXTENDED][-1]
    return (
        f"goes on longer, from step {entry['from']}: {entry['total']} steps in all, not"
        f" {entry['total_before']}; the learning rate is that of a run of this length, at the next"
        f" step {entry['learning_rate']:.4g}, not {entry['learning_rate_before']:.4g}"
    )


def keep_result(run_dir: Path) -> Path | None:
    """Copy the end of a finished run to result-<step>, before its folder gets another one.

    Returns the folder, None where the run has no end yet.
    """
    if not all(is_plain(run_dir / name) for name in (*ADAPTER_FILES, "trainer_state.json")):
        return None
    try:
        step = int(parse_record(read_plain(run_dir / "trainer_state.json"))["global_step"])
    except (ValueError, KeyError, TypeError):
        return None
    place = run_dir / f"result-{step}"
    if not place.is_dir():
        with written_folder(place) as copy:
            for pattern in _RESULT:
                for path in filter(is_plain, run_dir.glob(pattern)):
                    shutil.copyfile(path, copy / path.name, follow_symlinks=False)
    return place
