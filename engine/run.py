"""The book-keeping that both run scripts share: where a run stands, its checkpoints, its resume,
its final adapter.

Nothing here touches a gradient.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import save as safetensors_bytes

from data.examples import Example, selection_file
from data.files import sha256_of, write_json, write_jsonl
from data.images import check_images, without_bad_images
from engine.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_valid_checkpoint,
    load_checkpoint,
    load_optimizer,
    load_rng,
    optimizer_to_tensors,
    point_link,
    rng_to_tensors,
    rotate_checkpoints,
    save_checkpoint,
)
from engine.config import Resolved, UsageError, to_json
from engine.model import POLICY, adapter_config_record, adapter_state, load_adapter_state
from engine.order import shuffled  # noqa: F401 - for the run scripts, which import it from here
from engine.runtime import run_directory, versions
from engine.tracking import STEP_LOGS

# What may differ in a resumed run. Data files may have moved: their contents are compared by
# SHA-256.
FREE_TO_CHANGE = (
    "output_dir",
    "resume_from_checkpoint",
    "save_steps",
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
)

logger = logging.getLogger(__name__)


@dataclass
class TrainerState:
    """Where a run stands; trainer_state.json, in the form that HF's tools read. Steps are optimizer
    steps.
    """

    global_step: int = 0
    epoch: float = 0.0
    best_metric: float | None = None
    best_model_checkpoint: str | None = None  # a folder's name in the run's folder
    evaluations_without_improvement: int = 0
    num_tokens: int = 0  # supervised or sampled so far
    evaluated_step: int = -1  # the last step whose evaluation was finished
    log_history: list[dict[str, Any]] = field(default_factory=list)
    # of the steps since the last log, where logging_steps > 1
    unlogged_metrics: dict[str, Any] = field(default_factory=dict)

    def record_evaluation(self, metric: float, *, greater_is_better: bool) -> bool:
        """Note an evaluation at this step; returns whether it is the best so far. NaN is never the
        best.
        """
        better = metric == metric and (
            self.best_metric is None
            or (metric > self.best_metric if greater_is_better else metric < self.best_metric)
        )
        if better:
            self.best_metric, self.best_model_checkpoint = metric, f"checkpoint-{self.global_step}"
        self.evaluations_without_improvement = (
            0 if better else self.evaluations_without_improvement + 1
        )
        return better


# ---- configuration of the run --------------------------------------------------------------------
def run_record(
    resolved: Resolved,
    script: str,
    data_files: Mapping[str, Path],
    bad_images: Mapping[str, list[dict]],
) -> dict:
    """config.json: every setting with its origin, the data files with their SHA-256 and what
    data.select noted of them, the examples left out for their images, and the versions that ran.
    """
    data = {
        name: {"file": str(path), "sha256": sha256_of(path)} | _selection(path)
        for name, path in data_files.items()
    }
    return {
        "script": script,
        "recipe": resolved.recipe,
        "settings": to_json(resolved),
        "data": data,
        "bad_images": dict(bad_images),
        "versions": versions(),
    }


def _selection(data_file: Path) -> dict[str, Any]:
    """{"selection": content of NAME.select.json} where that lies beside the data file: policies,
    SHA-256 of the label files.
    """
    path = selection_file(data_file)
    if not path.is_file():
        return {}
    try:
        return {"selection": json.loads(path.read_text(encoding="utf-8"))}
    except ValueError as error:
        raise UsageError(
            f"{path}: is not valid JSON ({error}); data.select wrote it: restore or remove it"
        ) from error


def saved_settings(run_dir: Path) -> dict[str, Any]:
    """The settings of an earlier run by name, from its config.json; empty where the folder has none
    (an adapter from elsewhere).

    Raises UsageError for a config.json that cannot be read.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: entry["value"] for name, entry in record.get("settings", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path}: is not a run's configuration ({type(error).__name__}: {error}); repair or"
            " remove it"
        ) from error


# ---- images --------------------------------------------------------------------------------------
def usable_examples(
    sets: Mapping[str, list[Example]], policy: Literal["fail", "skip"], resumed: dict | None = None
) -> tuple[dict[str, list[Example]], dict[str, list[dict]]]:
    """(data sets to use, {name: rows of the examples left out}), as --bad_images says.

    fail: every image file must be there; what is in it shows when it is needed. skip: all images
    are read now, unless the run goes on: then what it left out at its beginning (`resumed`, its
    config.json) is left out again, so that its data set is the same. Raises DataError for missing
    images, and for a data set of which nothing is left.
    """
    if policy == "fail":
        check_images(example for examples in sets.values() for example in examples)
        return dict(sets), {name: [] for name in sets}
    if resumed is None:
        checked = {name: without_bad_images(examples, name) for name, examples in sets.items()}
        return {name: good for name, (good, _) in checked.items()}, {
            name: bad for name, (_, bad) in checked.items()
        }
    bad = resumed["bad_images"]
    ids = {name: {row["id"] for row in bad.get(name, [])} for name in sets}
    kept = {
        name: [example for example in examples if example.id not in ids[name]]
        for name, examples in sets.items()
    }
    check_images(example for examples in kept.values() for example in examples)
    return kept, bad


def write_bad_images(folder: Path, bad: Mapping[str, list[dict]]) -> None:
    """bad-images-<name>.jsonl in `folder` for every data set that examples were left out of, with
    the reason of each.
    """
    for name, rows in bad.items():
        if rows:
            write_jsonl(Path(folder) / f"bad-images-{name}.jsonl", rows)


def bad_images_line(bad: Mapping[str, list[dict]]) -> str:
    """What the banner's line on data says of the examples left out; empty where there are none."""
    counts = ", ".join(
        f"{name} {len(rows)} (bad-images-{name}.jsonl)" for name, rows in bad.items() if rows
    )
    return f"; left out for their images: {counts}" if counts else ""


def bad_image_counts(names: Iterable[str], bad: Mapping[str, list[dict]]) -> dict[str, dict]:
    """{name: what its scores say of the examples left out}."""
    return {name: {"bad_images": len(bad.get(name, []))} for name in names}


# ---- resume --------------------------------------------------------------------------------------
def find_checkpoint(named: str) -> tuple[Checkpoint, list[str]]:
    """The verified checkpoint that --resume_from_checkpoint names, and the damaged newer ones that
    were passed over.

    named: a checkpoint-<step> folder, which must be sound, or a run folder, whose newest sound
    checkpoint is taken. Raises CheckpointError naming the damaged file.
    """
    path = Path(named)
    if not path.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {named}: no such folder")
    resolved = path.resolve()  # `last` and `best` are links
    if resolved.name.startswith("checkpoint-"):
        return (
            load_checkpoint(
                resolved.relative_to(Path.cwd())
                if resolved.is_relative_to(Path.cwd())
                else resolved
            ),
            [],
        )
    newest, rejected = latest_valid_checkpoint(path)
    if newest is None:
        raise CheckpointError(
            [
                f"--resume_from_checkpoint {named}: the folder holds no sound checkpoint-<step>",
                *rejected,
            ]
        )
    return load_checkpoint(newest), rejected


def inherited_settings(named: str, script: Literal["sft", "grpo"]) -> dict[str, Any]:
    """The settings of the run that --resume_from_checkpoint names, for `parse_config`.

    Its output_dir is left out: a run goes on where its checkpoint lies now, which may be a copy or
    a renamed folder. Raises UsageError for a checkpoint of the other script.
    """
    checkpoint, _ = find_checkpoint(named)
    record = checkpoint.record("config.json")
    if record["script"] != script:
        raise UsageError(
            f"--resume_from_checkpoint {named}: a checkpoint of run_{record['script']}.py; resume"
            " it with that script"
        )
    return {name: entry["value"] for name, entry in record["settings"].items()} | {
        "output_dir": None
    }


def run_folder(
    checkpoint: Checkpoint | None, output_dir: str | None, kind: Literal["sft", "grpo"]
) -> Path:
    """The folder of this run: that of the checkpoint it goes on from, or a new one where output_dir
    names another.

    Raises UsageError where that other folder is not empty.
    """
    if checkpoint is not None and (
        output_dir is None or Path(output_dir).resolve() == checkpoint.path.parent.resolve()
    ):
        return checkpoint.path.parent
    return run_directory(output_dir, kind)


def continued_record(checkpoint: Checkpoint, record: dict) -> dict:
    """config.json of a resumed run: `record` with what only the run's beginning knows, its recipe
    and the origins.

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
    return record | {"recipe": saved["recipe"], "settings": settings}


def bring_logs(checkpoint: Checkpoint, run_dir: Path) -> None:
    """When a run goes on in another folder, take along its logs and results, this checkpoint and
    the best: the new folder is whole.
    """
    source = checkpoint.path.parent
    if source.resolve() == run_dir.resolve():
        return
    for pattern in (*STEP_LOGS, "events.out.tfevents.*", "predictions-*.jsonl", "scores-*.json"):
        for path in source.glob(pattern):
            shutil.copyfile(path, run_dir / path.name)
    if (source / "reference").is_dir():
        shutil.copytree(source / "reference", run_dir / "reference", dirs_exist_ok=True)
    for link, name in (
        ("last", checkpoint.path.name),
        ("best", checkpoint.record("trainer_state.json")["best_model_checkpoint"]),
    ):
        if name is None or not (source / name).is_dir():
            continue
        if not (run_dir / name).exists():
            temporary = run_dir / f".tmp-{name}"
            shutil.copytree(source / name, temporary)
            os.rename(temporary, run_dir / name)
        point_link(run_dir, link, run_dir / name)


def keep_reference(adapter: Path, run_dir: Path) -> dict[str, str]:
    """Copy the SFT adapter to run_dir/reference, once; returns {file: SHA-256}. With it a run
    folder is whole, whatever happens to the SFT run.
    """
    temporary = run_dir / ".tmp-reference"
    temporary.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, temporary / name)
    os.rename(temporary, run_dir / "reference")
    return _reference_hashes(run_dir / "reference")


def check_same_reference(checkpoint: Checkpoint) -> dict[str, str]:
    """The hashes of the run's reference. Raises UsageError where it is not the adapter that the run
    began with.
    """
    folder, before = (
        checkpoint.path.parent / "reference",
        checkpoint.record("config.json")["reference"],
    )
    now = _reference_hashes(folder)
    if now != before:
        changed = next(name for name in before if now.get(name) != before[name])
        raise UsageError(
            f"{folder / changed}: not the frozen SFT adapter that the run began with (SHA-256"
            f" {now.get(changed, 'missing')[:12]}, was {before[changed][:12]}); restore it or start"
            " a new run"
        )
    return now


def _reference_hashes(folder: Path) -> dict[str, str]:
    return {
        name: sha256_of(folder / name)
        for name in ("adapter_config.json", "adapter_model.safetensors")
        if (folder / name).is_file()
    }


def restore(
    checkpoint: Checkpoint,
    wrapped: PeftModel,
    optimizer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator] | None = None,
) -> TrainerState:
    """Put adapter, optimizer and every source of randomness back where the checkpoint has them."""
    load_adapter_state(wrapped, checkpoint.tensors("adapter_model"), source=str(checkpoint.path))
    load_optimizer(optimizer, checkpoint.tensors("optimizer"), checkpoint.record("optimizer.json"))
    load_rng(checkpoint.tensors("rng"), checkpoint.record("rng.json"), generators)
    state = TrainerState(**checkpoint.record("trainer_state.json"))
    if (
        state.best_model_checkpoint is not None
        and not (checkpoint.path.parent / state.best_model_checkpoint).is_dir()
    ):
        logger.warning(
            "the best checkpoint so far, %s, is no longer there: the best is chosen among later"
            " ones",
            state.best_model_checkpoint,
        )
        state.best_metric = state.best_model_checkpoint = None
    return state


# ---- save ----------------------------------------------------------------------------------------
def save_training_checkpoint(
    run_dir: Path,
    state: TrainerState,
    wrapped: PeftModel,
    optimizer: torch.optim.Optimizer,
    *,
    base_name: str,
    config_record: dict,
    limit: int | None,
    generators: Mapping[str, torch.Generator] | None = None,
    tensors: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    records: Mapping[str, Any] | None = None,
) -> Path:
    """Save everything that the next optimizer step depends on; set the links `last` and `best`;
    delete what `limit` leaves over.
    """
    optimizer_tensors, optimizer_record = optimizer_to_tensors(optimizer)
    rng_tensors, rng_record = rng_to_tensors(generators)
    path = save_checkpoint(
        run_dir,
        state.global_step,
        tensors={
            "adapter_model": adapter_state(wrapped),
            "optimizer": optimizer_tensors,
            "rng": rng_tensors,
            **(tensors or {}),
        },
        records={
            "adapter_config.json": adapter_config_record(wrapped, base_name),
            "optimizer.json": optimizer_record,
            "rng.json": rng_record,
            "trainer_state.json": asdict(state),
            "config.json": config_record,
            **(records or {}),
        },
        notes=({"reference": config_record["reference"]} if "reference" in config_record else None),
    )
    point_link(run_dir, "last", path)
    best = run_dir / state.best_model_checkpoint if state.best_model_checkpoint else None
    if best is not None and best.is_dir():
        point_link(run_dir, "best", best)
    rotate_checkpoints(run_dir, limit, keep={path} | ({best} if best else set()))
    return path


def save_final_adapter(
    run_dir: Path, state: TrainerState, wrapped: PeftModel, *, base_name: str
) -> None:
    """The run's result at the top of its folder, as plain peft loads it; its presence says that the
    run has finished.
    """
    write_json(run_dir / "trainer_state.json", asdict(state))
    write_json(run_dir / "adapter_config.json", adapter_config_record(wrapped, base_name))
    temporary = run_dir / ".tmp-adapter_model.safetensors"
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in adapter_state(wrapped, POLICY).items()
    }
    temporary.write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    os.replace(temporary, run_dir / "adapter_model.safetensors")


def load_best_adapter(run_dir: Path, state: TrainerState, wrapped: PeftModel) -> str | None:
    """Put the best checkpoint's adapter into the model; returns its name, or None where no
    evaluation chose one.
    """
    if state.best_model_checkpoint is None:
        return None
    checkpoint = load_checkpoint(run_dir / state.best_model_checkpoint)
    load_adapter_state(wrapped, checkpoint.tensors("adapter_model"), source=str(checkpoint.path))
    return state.best_model_checkpoint


# ---- data order ----------------------------------------------------------------------------------
def in_chunks(items: Sequence, size: int) -> list[Sequence]:
    """Consecutive pieces of `size`, the last one shorter where it does not divide."""
    return [items[start : start + size] for start in range(0, len(items), size)]
