"""Note what a run was made from, and go on with an earlier one: checkpoint, settings, data, logs.

Everything in it is plain Python, so a wrong run on a command line is answered without torch.
"""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from data.examples import selection_file
from data.files import remove, sha256_of, written_folder, written_whole
from data.plain_files import is_plain, parse_record, read_plain
from data.sets import DataSets, train_name
from engine.charts import FOLDER
from engine.checkpoint import (
    OTHER_RUN,
    RUN_ID,
    Checkpoint,
    CheckpointError,
    checkpoint_step,
    latest_valid_checkpoint,
    list_checkpoints,
    load_checkpoint,
    standing_place,
)
from engine.config import Resolved, UsageError, from_json, recipe_entry, to_json
from engine.longer import EXTENDED, LENGTHS, extension
from engine.model_checks import base_hashes
from engine.model_files import ADAPTER_FILES, model_path, same_base
from engine.run_batch import BATCH, RunBatch
from engine.runtime import (
    STEP_LOGS,
    check_plain_folder,
    is_finished,
    refuse_content,
    run_directory,
    versions,
)
from engine.saved_records import checked

# What may differ in a resumed run. Data files may have moved: their contents are compared by
# SHA-256.
FREE_TO_CHANGE = (
    "output_dir",
    "resume_from_checkpoint",
    "max_bad_steps",
    "save_steps",
    "save_minutes",
    "save_total_limit",
    "train_file",
    "validation_file",
    "image_root",
    "dump_step",
    "stop_when",
    "warn_when",
    "show_batch",
    "dry_run",
    "vision_cache_gb",
    "vision_cache_dir",
    "memory_check",
    "base_hash",
    "reward_timeout",
    # where the rollouts are sampled: a server is started anew elsewhere
    "vllm_server_base_url",
    "vllm_server_timeout",
    "allow_remote_server",
    # how much is run at once: numbers change by rounding alone
    "max_tokens_per_forward",
    "sampling_batch_size",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "sampling_copies",
    "sampling_product",
    "shard_base",
)


# A value of --resume_from_checkpoint: go on with this command's run, if there is one.
AUTO = "auto"
# In config.json: the servers that have sampled rollouts, and how exactly.
SERVERS = "rollout_servers"
# The origin of a value that memory cut while a run was going on.
OUT_OF_MEMORY = "out of memory"


# ---- config.json ---------------------------------------------------------------------------------
def run_record(
    resolved: Resolved,
    script: str,
    data_files: Mapping[str, Path],
    bad_images: Mapping[str, list[dict]],
) -> dict[str, Any]:
    """Gather what config.json holds, so that a run can be understood and repeated from it.

    It has every setting with its origin, the data files with their SHA-256 and what data.select
    noted of them, the examples left out for their images, and the versions that ran.
    """
    weights = trained_weights(resolved)
    data = {
        name: {"file": str(path), "sha256": sha256_of(path)}
        | ({"weight": weights[name]} if name in weights else {})
        | _selection(path)
        for name, path in data_files.items()
    }
    return {
        "script": script,
        "recipe": recipe_entry(resolved.recipes),
        "settings": to_json(resolved),
        "data": data,
        "bad_images": dict(bad_images),
        "versions": versions(),
    }


def trained_weights(resolved: Resolved) -> dict[str, float]:
    """Read how often a run's hospitals come -> {name of the training set: weight}, of those given.

    They decide the order of the examples, so a run keeps them.
    """
    weights = getattr(resolved.configs[0], "hospital_weights", {})
    return {train_name(hospital): weight for hospital, weight in weights.items()}


def _selection(data_file: Path) -> dict[str, Any]:
    """Read NAME.select.json beside a data file -> {"selection": its content}, or {} without one."""
    path = selection_file(data_file)
    if not path.is_file():
        return {}
    try:
        return {"selection": parse_record(path.read_bytes())}
    except ValueError as error:
        raise UsageError(
            f"{path}: is not valid JSON ({error}); data.select wrote it: restore or remove it"
        ) from error


def saved_record(run_dir: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read config.json of an earlier run -> (all of it, the settings in it by name).

    Both are empty where the folder has none (an adapter from elsewhere). Raises UsageError for a
    config.json that cannot be read.
    """
    path = Path(run_dir) / "config.json"
    if not os.path.lexists(path):
        return {}, {}
    try:
        record = parse_record(read_plain(path))
        settings = record.get("settings", {}).items()
        return record, {name: from_json(entry["value"]) for name, entry in settings}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(
            f"{path}: is not a run's configuration ({type(error).__name__}: {error}); repair or"
            " remove it"
        ) from error


def saved_settings(run_dir: str | Path) -> dict[str, Any]:
    """Read the settings of an earlier run by name, as `saved_record` does."""
    return saved_record(run_dir)[1]


# ---- the checkpoint to go on from ----------------------------------------------------------------
def find_checkpoint(named: str) -> tuple[Checkpoint, list[str]]:
    """Find the verified checkpoint that --resume_from_checkpoint names.

    named: a checkpoint-<step> folder, which must be sound, or a run folder, whose newest sound
    checkpoint is taken.

    Returns the checkpoint, and a line for each damaged file of newer ones that were passed over.
    Raises CheckpointError naming the damaged file.
    """
    path = Path(named)
    if not standing_place(path).is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {named}: no such folder")
    if path.is_symlink() and checkpoint_step(path.name) is not None:
        raise CheckpointError(f"--resume_from_checkpoint {named}: is a link, so it is not read")
    resolved = path.resolve()  # `last` and `best` are links
    if checkpoint_step(resolved.name) is not None:
        here = Path.cwd()
        found = load_checkpoint(
            resolved.relative_to(here) if resolved.is_relative_to(here) else resolved
        )
        return checked(found), []
    newest, rejected = latest_valid_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            [
                f"--resume_from_checkpoint {named}: the folder holds no sound checkpoint-<step>",
                *rejected,
            ]
        )
    return checked(load_checkpoint(newest)), rejected


def checkpoint_to_resume(named: str | None) -> Checkpoint | None:
    """Find the checkpoint that a run goes on from, and print which damaged ones were passed over.

    named: the value of --resume_from_checkpoint, None for a new run.

    Raises CheckpointError as `find_checkpoint` does.
    """
    if named is None:
        return None
    checkpoint, rejected = find_checkpoint(named)
    for line in rejected:
        kind = "a checkpoint" if OTHER_RUN in line else "a damaged checkpoint"
        print(f"passed over {kind}: {line}", file=sys.stderr)
    return checkpoint


def inherited_settings(named: str, script: Literal["sft", "grpo"]) -> dict[str, Any] | None:
    """Read the settings of the run that --resume_from_checkpoint names, for `parse_config`.

    Its output_dir is left out: a run goes on where its checkpoint lies now, which may be a copy or
    a renamed folder. A run that was ended before its first checkpoint has them in its config.json.
    None for AUTO, which names no run. Raises UsageError for a checkpoint of the other script.
    """
    if named == AUTO:
        return None
    begun = begun_record(named)
    checkpoint = None if begun else find_checkpoint(named)[0]
    record = begun if checkpoint is None else checkpoint.record("config.json")
    assert record is not None
    if record["script"] != script:
        raise UsageError(
            f"--resume_from_checkpoint {named}: a checkpoint of run_{record['script']}.py; resume"
            " it with that script"
        )
    settings = {name: entry["value"] for name, entry in record["settings"].items()}
    if checkpoint is None:
        return settings | {"output_dir": None}
    whole = saved_record(named)[0]
    if whole.get(RUN_ID) and whole[RUN_ID] == record.get(RUN_ID):
        # the run may have been made longer since its newest checkpoint
        settings |= {name: whole["settings"][name]["value"] for name in LENGTHS}
    cuts = {name: entry["value"] for name, entry in memory_cuts(checkpoint).items()}
    return settings | cuts | {"output_dir": None}


def begun_record(named: str | Path) -> dict[str, Any] | None:
    """Read config.json of a run that was ended before its first checkpoint.

    named: its folder. None for any other one, and for a checkpoint's.
    """
    folder = Path(named)
    if not folder.is_dir() or checkpoint_step(folder.resolve().name) is not None:
        return None
    record = saved_record(folder)[0]
    begun = RUN_ID in record and not list_checkpoints(folder) and not is_finished(folder, record)
    return record if begun else None


def record_of(named: str) -> dict[str, Any]:
    """Read config.json of the run that --resume_from_checkpoint names: its checkpoint's, if any."""
    return begun_record(named) or find_checkpoint(named)[0].record("config.json")


def memory_cuts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """Find what memory has cut in a run -> {setting: its entry in config.json}.

    The run's folder may know of cuts since the checkpoint.
    """
    records = [checkpoint.record("config.json"), saved_record(checkpoint.path.parent)[0]]
    return {
        name: entry
        for record in records
        for name, entry in record.get("settings", {}).items()
        if entry.get("origin") == OUT_OF_MEMORY
    }


def with_memory_cuts(resolved: Resolved) -> Resolved:
    """Keep what memory cut in the resumed run, unless a flag gives it another value than at first.

    So the command that began the run also goes on with it.
    """
    named = resolved.configs[0].resume_from_checkpoint
    if named is None:
        return resolved
    for name, entry in memory_cuts(find_checkpoint(named)[0]).items():
        if resolved.origins[name] != "flag" or getattr(resolved.configs[0], name) == entry["was"]:
            resolved = resolved.with_value(name, entry["value"], OUT_OF_MEMORY)
    return resolved


def resumed_folder(named: str | None, output_dir: str | None) -> Path | None:
    """Find the folder in which a resumed run goes on, None where that is a new one.

    named: the value of --resume_from_checkpoint, None for a new run.
    """
    if named is None:
        return None
    path = Path(named).resolve()  # `last` and `best` are links
    folder = path if checkpoint_step(path.name) is None else path.parent
    return folder if output_dir is None or Path(output_dir).resolve() == folder else None


def run_folder(
    checkpoint: Checkpoint | None, output_dir: str | None, kind: Literal["sft", "grpo"]
) -> Path:
    """Choose the folder of this run: its checkpoint's, or a new one where output_dir names another.

    Raises UsageError where that other folder is not empty.
    """
    if checkpoint is not None and (
        output_dir is None or Path(output_dir).resolve() == checkpoint.path.parent.resolve()
    ):
        return checkpoint.path.parent
    return run_directory(output_dir, kind)


def begin_again(folder: Path, kind: Literal["sft", "grpo"]) -> None:
    """Make the folder of a new run ready, in which one may have been ended before it got on.

    Raises UsageError where there is more in it by now than that, as of another process.
    """
    refuse_content(folder, kind)
    for name in ("start", "start-vote"):
        remove(folder / name)


def continued_record(checkpoint: Checkpoint, record: dict[str, Any]) -> dict[str, Any]:
    """Complete config.json of a resumed run with what only its beginning knows: recipe and origins.

    record: the `run_record` of the resumed run.

    Raises UsageError naming each data file that is not the one that the run began with.
    """
    saved = checkpoint.record("config.json")
    before, now = saved["data"], record["data"]
    changed = [
        f"{name}: {now[name]['file'] if name in now else before[name]['file']} has SHA-256"
        f" {now.get(name, {}).get('sha256', '(not given)')[:12]}, the resumed run used"
        f" {before.get(name, {}).get('sha256', '(none)')[:12]}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name, {}).get("sha256") != now.get(name, {}).get("sha256")
    ]
    problems = [
        f"--train_file: the weight of {name} is {now[name].get('weight', 'not given')}, the resumed"
        f" run had {before[name].get('weight', 'none')}; a resumed run keeps its weights"
        for name in sorted(before.keys() & now.keys())
        if before[name].get("weight") != now[name].get("weight")
    ]
    if problems:
        raise UsageError(problems)
    if changed:
        raise UsageError(
            [
                f"data file changed since {checkpoint.path.name} was saved; restore it or start a"
                f" new run. {line}"
                for line in changed
            ]
        )
    settings = {
        name: (
            saved["settings"][name]
            if saved["settings"].get(name, {}).get("value") == entry["value"]
            else entry
        )
        for name, entry in record["settings"].items()
    }  # a value that did not change keeps its origin
    for name, entry in memory_cuts(checkpoint).items():
        if settings[name]["value"] == entry["value"]:
            settings[name] = entry
    kept = ("recipe", RUN_ID, EXTENDED, SERVERS)
    of_run = {name: saved[name] for name in kept if name in saved}
    return record | of_run | {"settings": settings}


def training_record(
    resolved: Resolved,
    script: Literal["sft", "grpo"],
    sets: DataSets,
    checkpoint: Checkpoint | None,
    count: Callable[[Any, int, int], int],
    ranks: int = 1,
) -> dict[str, Any]:
    """Make config.json of a training run, new or resumed.

    count: the optimizer steps of a whole run, from its settings, the number of examples and ranks.
    ranks: how many there are.

    Raises UsageError where a data file, the base or the frozen reference is not the one that the
    resumed run began with, or the base not the one that the adapter was trained on.
    """
    record = run_record(resolved, script, sets.files, sets.bad_images)
    config = resolved.configs[0]
    record[BATCH] = _batch_record(record, checkpoint, config.output_dir, ranks)
    saved = None if checkpoint is None else checkpoint.record("config.json").get("base")
    how = saved["hash"] if saved else config.base_hash
    record["base"] = base_record(config.model_name_or_path, how)
    if saved and (line := _changed_base(saved, record["base"])):
        raise UsageError(f"{line} than when the resumed run began; restore it or start a new run")
    if checkpoint is None and config.adapter_name_or_path:
        line = changed_base_of(config.adapter_name_or_path, config.model_name_or_path)
        noted = saved_base(config.adapter_name_or_path) or {}
        if line and same_base(noted["name"], config.model_name_or_path):
            raise UsageError(
                f"{line}; restore it, or give the base that the adapter belongs to with"
                " --model_name_or_path"
            )
        if line:
            print(f"warning: {line}", file=sys.stderr)
    for name, examples in sets.by_name().items():
        if name in record["data"]:  # a share of the training patients has no file of its own
            record["data"][name] |= {
                "datasets": sorted({example.dataset for example in examples}),
                "images": len(examples),
                "patients": len({example.patient_id for example in examples}),
            }
    if checkpoint is None:
        return record | {RUN_ID: uuid.uuid4().hex}
    longer = extension(
        checkpoint, config, len(sets.train), lambda of, examples: count(of, examples, ranks)
    )
    record = continued_record(checkpoint, record)
    if longer is not None:
        record[EXTENDED] = [*record.get(EXTENDED, []), longer]
    if "reference" in checkpoint.record("config.json"):
        record["reference"] = check_same_reference(checkpoint)
    return record


def _batch_record(
    record: Mapping[str, Any], checkpoint: Checkpoint | None, output_dir: str | None, ranks: int
) -> dict[str, Any]:
    """Note the batch of a run: what it began with stays, also where it begins again.

    record: what config.json will hold. output_dir: of the run, None for a new one.
    """
    before = None if output_dir is None else begun_record(output_dir)
    if checkpoint is not None:
        before = checkpoint.record("config.json")
    settings = {name: entry["value"] for name, entry in record["settings"].items()}
    batch = None if before is None else RunBatch.saved_in(before)
    if batch is None or not batch.is_made_by(settings, ranks):
        batch = RunBatch.of(settings, ranks)
    return batch.record(ranks)


# ---- the base model ------------------------------------------------------------------------------
def base_record(name: str, how: Literal["sample", "full"] = "sample") -> dict[str, Any]:
    """Hash the files of a base model -> its `base_hashes` with its name.

    It is {} for a hub model that is not on this machine yet, and for a folder whose weights are not
    whole, which loading it answers.
    """
    folder = Path(model_path(name))
    if not folder.is_dir():
        from transformers.utils import cached_file  # here: a folder needs no transformers

        found = cached_file(
            name,
            "config.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is None:
            return {}
        folder = Path(found).parent
    try:
        return {"name": name} | base_hashes(folder, how)
    except (OSError, ValueError):
        return {}


def saved_base(adapter: str | Path) -> dict[str, Any] | None:
    """Read what the run of an adapter noted of its base, None for one that noted nothing."""
    noted = saved_record(adapter)[0].get("base")
    return noted if isinstance(noted, dict) and noted.keys() >= {"name", "hash", "files"} else None


def changed_base_of(adapter: str | Path, name: str) -> str | None:
    """Say which file of a base is not the one that an adapter was trained on, or None.

    adapter: its folder. Only one of a run that noted its base can tell.
    """
    before = saved_base(adapter)
    if before is None:
        return None
    now = base_record(name, before["hash"])
    line = _changed_base(before, now)
    return line and f"{line} than when {adapter} was trained"


def _changed_base(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say which file of a base is not the one it was, None for none, or where that is unknown."""
    if not now:
        return None
    was, files = before["files"], now["files"]
    shards = {file for file in was.keys() | files.keys() if file.endswith(".safetensors")}
    if any(file not in was or file not in files for file in shards):
        return None  # saved anew in other shards, which cannot be compared
    # a copy elsewhere may well have been described anew, by another version of transformers
    same_place = same_base(before["name"], now["name"])
    compared = sorted(was.keys() | files.keys() if same_place else shards)
    file = next((name for name in compared if was.get(name) != files.get(name)), None)
    if file is None:
        return None
    sums = [of.get(file, {}).get("sha256", "missing")[:12] for of in (files, was)]
    return f"{now['name']}: {file} is another one (SHA-256 {sums[0]}, was {sums[1]})"


def bring_logs(checkpoint: Checkpoint, run_dir: Path, best: str | None) -> None:
    """Copy an earlier run's logs and results into the folder where it goes on, so that it is whole.

    This checkpoint comes along, and the one of the name `best`. Nothing is done where the folder
    stays the same. Raises UsageError where there is something in the earlier folder that no run
    leaves: a link, a pipe.
    """
    source = checkpoint.path.parent
    if source.resolve() == run_dir.resolve():
        return
    check_plain_folder(source)
    events = ("events.out.tfevents.*", f"{FOLDER}/*/events.out.tfevents.*")
    for pattern in (*STEP_LOGS, *events, "predictions-*.jsonl", "scores-*.json"):
        for path in source.glob(pattern):
            with written_whole(run_dir / path.relative_to(source)) as copy:
                shutil.copyfile(path, copy, follow_symlinks=False)
    # what GRPO began with, the best checkpoint, and last the one that the run goes on from
    names = ("reference", "start", "start-vote", best or "", checkpoint.path.name)
    for name in filter(None, names):
        place = standing_place(source / name)
        if place.is_dir():
            with written_folder(run_dir / name) as copy:
                shutil.copytree(place, copy, symlinks=True, dirs_exist_ok=True)


# ---- the frozen reference of GRPO ----------------------------------------------------------------
def keep_reference(save: Callable[[Path], None], run_dir: Path) -> dict[str, str]:
    """Keep the adapter that the run starts from in run_dir/reference -> {file: SHA-256}.

    With it a run folder is whole, whatever happens to the SFT run.

    save: writes the adapter's files into a folder.
    """
    with written_folder(run_dir / "reference") as temporary:
        save(temporary)
    return _reference_hashes(run_dir / "reference")


def check_same_reference(checkpoint: Checkpoint) -> dict[str, str]:
    """Check that the reference is the adapter that the run began with -> {file: SHA-256}.

    Raises UsageError where it is not.
    """
    folder = checkpoint.path.parent / "reference"
    before = checkpoint.record("config.json")["reference"]
    now = _reference_hashes(folder)
    if now != before:
        changed = next(name for name in before if now.get(name) != before[name])
        raise UsageError(
            f"{folder / changed}: not the frozen reference that the run began with (SHA-256"
            f" {now.get(changed, 'missing')[:12]}, was {before[changed][:12]}); restore it or start"
            " a new run"
        )
    return now


def heal_reference(checkpoint: Checkpoint, adapter: str | None) -> None:
    """Copy a reference that is lost or damaged again from where its files still are, by SHA-256.

    They may be in the SFT run or in a checkpoint. Another whole adapter in its place is not
    touched: `check_same_reference` refuses it. adapter: that which the run began with.
    """
    run_dir = checkpoint.path.parent
    folder, before = run_dir / "reference", checkpoint.record("config.json")["reference"]
    if _reference_hashes(folder) == before or not any(map(_is_damaged, _files_of(folder))):
        return
    places = [folder, *([Path(adapter)] if adapter else []), *list_checkpoints(run_dir)]
    found: dict[str, Path] = {}
    for name, expected in before.items():
        for file in (place / name for place in places):
            if file.is_file() and sha256_of(file) == expected:
                found.setdefault(name, file)
    if found.keys() != before.keys():
        return
    try:
        with written_folder(folder) as copy:
            for name, file in found.items():
                shutil.copyfile(file, copy / name)
    except OSError:  # as in a folder that is only read: the check says what is wrong
        return
    weights = found.get(ADAPTER_FILES[1], folder)
    print(f"{folder}: was damaged, copied again from {weights.parent}", file=sys.stderr)


def _files_of(adapter: Path) -> list[Path]:
    return [adapter / name for name in ADAPTER_FILES]


def _is_damaged(file: Path) -> bool:
    """Tell whether an adapter's file is missing or cut, and not merely another one."""
    try:
        if file.suffix == ".json":
            parse_record(read_plain(file))
        else:
            with safe_open(file, "numpy"):
                pass
    except (OSError, ValueError, SafetensorError):
        return True
    return False


def _reference_hashes(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in ADAPTER_FILES if is_plain(folder / name)}
