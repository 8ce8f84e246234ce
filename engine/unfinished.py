"""Find the unfinished run that a command goes on with, so that the same command can be given again.

A job that was ended, by whatever, is often queued again as it was. Its command names the folder of
the run, or says `--resume_from_checkpoint auto`. The run goes on where its settings are those of
the command. Everything in it is plain Python, so it is answered without torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from data.files import sha256_of
from engine.checkpoint import RUN_ID, latest_valid_checkpoint, list_checkpoints, load_checkpoint
from engine.config import Resolved, UsageError, from_json, recipes_of
from engine.launch import Launch
from engine.longer import LENGTHS, is_shorter
from engine.model_files import same_base
from engine.resume import (
    AUTO,
    FREE_TO_CHANGE,
    OUT_OF_MEMORY,
    begun_record,
    find_checkpoint,
    resumed_folder,
    saved_record,
    trained_weights,
)
from engine.run_batch import BATCH_SETTINGS, RunBatch
from engine.runtime import FINISHED, is_finished, runs_of
from engine.values import show

Script = Literal["sft", "grpo"]
_DECIDED = (OUT_OF_MEMORY, "memory forecast")  # origins of values that no command gave
_PATHS = ("model_name_or_path", "adapter_name_or_path")
IMPORTS = ("reward",)  # settings with an import path where there is a colon in them


def unfinished_run(resolved: Resolved, files: Mapping[str, str], script: Script) -> Path | None:
    """Find the folder of the run that a command goes on with, None where it begins a new one.

    resolved: the command as that of a new run, with the settings of the resumed one where it names
    one. files: its data files by name.

    Raises UsageError with the differences where --output_dir holds an unfinished run with other
    settings, and SystemExit(0) where `auto` finds it finished.
    """
    config = resolved.configs[0]
    named, place = config.resume_from_checkpoint, config.output_dir
    if named is not None and named != AUTO:
        elsewhere = place is not None and resumed_folder(named, place) is None
        return Path(place) if elsewhere and _goes_on_there(named, Path(place)) else None
    if named is None and (place is None or config.dry_run or config.show_batch):
        return None
    if place is not None:
        return _own_run(resolved, files, Path(place), script)
    for folder in runs_of(Path("runs"), script):
        record = _record_of(folder)
        if record is None or is_finished(folder, record):
            continue
        if not differences(resolved, record, files):
            return folder
    return None


def _goes_on_there(named: str, folder: Path) -> bool:
    """Tell whether a folder holds what an earlier try of a command made of the run it names."""
    record = _record_of(folder)
    if record is None or is_finished(folder, record) or not list_checkpoints(folder):
        return False
    source = find_checkpoint(named)[0].record("config.json")
    return bool(record.get(RUN_ID)) and record.get(RUN_ID) == source.get(RUN_ID)


def _own_run(
    resolved: Resolved, files: Mapping[str, str], folder: Path, script: Script
) -> Path | None:
    record = _record_of(folder)
    if record is None or record.get("script") != script:
        return None  # it begins there, or is refused, as any folder that is not empty
    found = differences(resolved, record, files)
    if is_finished(folder, record):
        if found:
            return None
        if lengths_of(resolved) != _saved_lengths(record):
            return folder
        if resolved.configs[0].resume_from_checkpoint == AUTO:
            step = (record.get(FINISHED) or {}).get("step", "the last")
            print(f"{folder}: the run is finished (step {step}); nothing is left to do")
            raise SystemExit(0)
        return None
    if found:
        raise UsageError(
            [
                f"--output_dir {folder} holds an unfinished run with other settings; give the"
                " settings that it has and it goes on, or name another folder",
                *found,
            ]
        )
    return folder


def _record_of(folder: Path) -> dict[str, Any] | None:
    """Read config.json of a run, from its newest sound checkpoint where the folder has none."""
    try:
        if not folder.is_dir():
            return None
        record = saved_record(folder)[0]
    except OSError:  # no folder can have this name, which is told elsewhere
        return None
    except UsageError:
        record = {}
    if not record.get("settings") and list_checkpoints(folder):
        newest, _ = latest_valid_checkpoint(folder)
        record = {} if newest is None else load_checkpoint(newest).record("config.json")
    settings = record.get("settings")
    return record if isinstance(settings, dict) and settings else None


def lengths_of(resolved: Resolved) -> dict[str, Any]:
    """Read what decides how many steps the run of a command has."""
    return {name: getattr(resolved.configs[0], name) for name in LENGTHS}


def _saved_lengths(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record["settings"].get(name, {}).get("value") for name in LENGTHS}


def differences(
    resolved: Resolved, record: Mapping[str, Any], files: Mapping[str, str]
) -> list[str]:
    """Compare a command with the config.json of a run -> what differs, one line each.

    By value: what the command leaves open and the run did not get from its command either (the base
    of its adapter, the newest SFT run) is the run's. A run can be longer than it was, and its batch
    can be divided among other ranks.
    """
    values = {
        name: getattr(config, name)
        for config in resolved.configs
        for name in resolved.origins
        if hasattr(config, name)
    }
    batch, found = RunBatch.saved_in(record), []
    same_batch = batch is not None and batch.is_made_by(values, Launch.of().size)
    for name, entry in record["settings"].items():
        if name in FREE_TO_CHANGE or name in LENGTHS or name not in values:
            continue
        if name in BATCH_SETTINGS and (same_batch or batch and batch.has_given(name, values[name])):
            continue
        before, now = _value(entry.get("value")), values[name]
        derived = resolved.origins[name] == "default" and not _given(entry.get("origin"))
        if _same(name, before, now) or derived or entry.get("origin") in _DECIDED:
            continue
        found.append(
            f"--{name}: the run has {show(before)}, the command {show(now)}"
            f" ({resolved.origins[name]})"
        )
    before, now = _saved_lengths(record), lengths_of(resolved)
    if is_shorter(before, now):
        found += [
            f"--{name}: the run has {show(before[name])}, the command {show(now[name])}; a run can"
            " be made longer, not shorter"
            for name in LENGTHS
            if before[name] != now[name]
        ]
    return found + _changed_data(record.get("data") or {}, files, trained_weights(resolved))


def _changed_data(
    data: Mapping[str, Any], files: Mapping[str, str], weights: Mapping[str, float]
) -> list[str]:
    """Name the data files that are not those of the run, by SHA-256, and other weights of them."""
    found = [
        f"{name}: the {'command' if name in data else 'run'} has no data of this name"
        for name in sorted(data.keys() ^ files.keys())
    ]
    for name in sorted(data.keys() & files.keys()):
        path = Path(files[name])
        if path.is_file() and sha256_of(path) != data[name].get("sha256"):
            found.append(f"{name}: {path} is another file than the run began with (SHA-256)")
        if data[name].get("weight") != weights.get(name):
            found.append(
                f"{name}: the run has the weight {data[name].get('weight', 'none')}, the command"
                f" {weights.get(name, 'none')}"
            )
    return found


def _value(value: Any) -> Any:
    return tuple(map(from_json, value)) if isinstance(value, list) else from_json(value)


def _given(origin: Any) -> bool:
    return origin == "flag" or str(origin).startswith("recipe ")


def _same(name: str, before: Any, now: Any) -> bool:
    if name in _PATHS and before and now:
        return same_base(before, now)
    return bool(before == now)


def placed(resolved: Resolved) -> Resolved:
    """Say which run a command goes on with, and let one without a checkpoint begin again.

    `auto` without a run to go on with is a new run.
    """
    named = resolved.configs[0].resume_from_checkpoint
    if named is None:
        return resolved
    if named == AUTO:
        return resolved.with_value("resume_from_checkpoint", None, "default")
    folder = Path(named)
    begun = begun_record(folder)
    if begun is not None:
        print(f"{folder}: was ended before its first checkpoint, begins again", file=sys.stderr)
        again = _with_origins(resolved, begun)
        again = again.with_value("resume_from_checkpoint", None, "default")
        if again.configs[0].output_dir is None:
            return again.with_value("output_dir", str(folder), "resumed run")
        return again
    return resolved


def _with_origins(resolved: Resolved, begun: Mapping[str, Any]) -> Resolved:
    """Say of values and recipes where they came from when the run began. begun: its config.json.

    A setting that makes a run import code keeps the origin "resumed run": a file that says that
    somebody gave it as a flag is no flag.
    """
    code = {
        name
        for config in resolved.configs
        for name in IMPORTS
        if ":" in str(getattr(config, name, ""))
    }
    origins = {
        name: begun["settings"][name]["origin"]
        if origin == "resumed run" and name not in code
        else origin
        for name, origin in resolved.origins.items()
    }
    return dataclasses.replace(resolved, origins=origins, recipes=recipes_of(begun))
