"""What runs and evaluations left in their folders, read for tables and reports.

An `Entry` is one model's folder: predictions-<set>.jsonl, and from the records beside them which
model it is and which run trained it. `Predictions` are the answers to one data set without their
texts, some hundred bytes an image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.labels import (
    LABELS,
    NIH_TEN,
    NIH_TO_CHEXPERT,
    NO_FINDING,
    SUPPORT_DEVICES,
    chexpert_labels_of_nih,
)
from engine.config import UsageError
from eval.evaluate import iter_predictions
from eval.metrics import jaccard_per_image
from eval.paired import fingerprint

Stage = Literal["base", "sft", "grpo", "other"]
_FINDINGS = [LABELS.index(label) for label in LABELS if label not in (NO_FINDING, SUPPORT_DEVICES)]


# ---- answers -------------------------------------------------------------------------------------
# Fields of Predictions that hold a value, or a row of labels, for each answer
_ARRAYS = (
    "patients",
    "targets",
    "predictions",
    "evaluated",
    "nih_targets",
    "parsed",
    "valid",
    "num_unknown",
    "lengths",
)


@dataclass(frozen=True)
class Predictions:
    """N answers to one data set; matrices are bool [N, 14] in the order of LABELS. A failed answer
    predicts nothing.
    """

    ids: list[str]
    patients: np.ndarray  # [N]
    targets: np.ndarray
    predictions: np.ndarray
    evaluated: np.ndarray
    # NIH's own labels mapped to ten categories; nothing where the source is not NIH's
    nih_targets: np.ndarray
    is_nih: bool  # whether all of the data set has NIH's own labels
    parsed: np.ndarray  # [N]
    valid: np.ndarray  # [N]
    num_unknown: np.ndarray  # [N]
    lengths: np.ndarray  # [N] tokens
    texts: list[int]  # `fingerprint` of each completion
    prompts: tuple[str, ...]
    problems: Counter

    @cached_property
    def columns(self) -> list[int]:
        """Positions in LABELS of the labels that any image evaluates."""
        return np.flatnonzero(self.evaluated.any(axis=0)).tolist()

    @cached_property
    def jaccard(self) -> np.ndarray:
        """[N] as in scores-<name>.json: 0 for an answer that is not valid."""
        return np.where(
            self.valid,
            jaccard_per_image(self.targets, self.predictions, self.evaluated, self.num_unknown),
            0.0,
        )

    @cached_property
    def right(self) -> np.ndarray:
        """[N] whether a readable answer names exactly the true labels among those evaluated, and
        nothing unknown.
        """
        same = ~((self.targets ^ self.predictions) & self.evaluated).any(axis=1)
        return same & self.parsed & (self.num_unknown == 0)

    @cached_property
    def contradictions(self) -> np.ndarray:
        """[N] No Finding beside a finding other than Support Devices."""
        return self.predictions[:, LABELS.index(NO_FINDING)] & self.predictions[:, _FINDINGS].any(
            axis=1
        )

    def label_sets(self) -> list[frozenset[str]]:
        """The predicted labels of each answer, also those that are not evaluated."""
        return [frozenset(LABELS[k] for k in np.flatnonzero(row)) for row in self.predictions]

    def taken(self, ids: Sequence[str]) -> Predictions:
        """The answers to these images, in this order."""
        if list(ids) == self.ids:
            return self
        place = {id: n for n, id in enumerate(self.ids)}
        index = np.array([place[id] for id in ids], dtype=int)
        arrays = {name: getattr(self, name)[index] for name in _ARRAYS}
        return Predictions(
            list(ids),
            is_nih=self.is_nih,
            texts=[self.texts[n] for n in index],
            prompts=self.prompts,
            problems=self.problems,
            **arrays,
        )

    def under_nih(self, labels: Sequence[str]) -> Predictions:
        """The same answers scored against NIH's own labels mapped to `labels`, of the ten."""
        shown = np.isin(np.array(LABELS), list(labels))
        return Predictions(
            **{name: getattr(self, name) for name in self.__dataclass_fields__}
            | {
                "targets": self.nih_targets & shown,
                "evaluated": np.broadcast_to(shown, self.targets.shape),
            }
        )


def load_predictions(path: Path) -> Predictions:
    """Read a predictions file, parsed anew, without keeping its texts. Raises DataError as
    `iter_predictions` does.
    """
    columns: dict[str, list] = {name: [] for name in ("ids", "texts", *_ARRAYS)}
    prompts, problems, all_nih = {}, Counter(), True
    for row in iter_predictions(path):
        source = row.get("source_labels") or ()
        nih = (
            bool(source)
            and all(label in NIH_TO_CHEXPERT for label in source)
            and set(row["evaluated_labels"]) <= set(NIH_TEN)
        )
        all_nih &= nih
        prompts[str(row.get("prompt", ""))] = None
        problems.update([row["problem"]] if row["problem"] else [])
        for name, value in (
            ("ids", row["id"]),
            ("patients", row["patient_id"]),
            ("targets", _bits(row["labels"])),
            ("predictions", _bits(row["predicted"])),
            ("evaluated", _bits(row["evaluated_labels"])),
            ("nih_targets", _bits(chexpert_labels_of_nih(source, NIH_TEN)) if nih else 0),
            ("parsed", row["parsed"]),
            ("valid", row["valid"]),
            ("num_unknown", len(row["unknown"])),
            ("lengths", row["completion_length"]),
            ("texts", fingerprint(row["completion"])),
        ):
            columns[name].append(value)
    matrices = {
        name: _matrix(columns.pop(name))
        for name in ("targets", "predictions", "evaluated", "nih_targets")
    }
    arrays = {
        name: np.array(columns.pop(name))
        for name in ("patients", "parsed", "valid", "num_unknown", "lengths")
    }
    return Predictions(
        **columns, **matrices, **arrays, is_nih=all_nih, prompts=tuple(prompts), problems=problems
    )


def _bits(labels: Sequence[str]) -> int:
    return sum(1 << LABELS.index(label) for label in set(labels))


def _matrix(bits: list[int]) -> np.ndarray:
    # [N, 14]
    return (np.array(bits, dtype=np.int64)[:, None] >> np.arange(len(LABELS)) & 1).astype(bool)


# ---- folders -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """One model's folder of results."""

    name: str
    folder: Path
    stage: Stage
    base: str  # the base model's name, "" where unknown
    prompt: str
    reward: str  # of GRPO, else ""
    step: int | None  # of the checkpoint that answered, None where unknown
    best_step: int | None
    last_step: int | None
    training: Path | None  # the folder of the run that trained it, where it is still there
    sets: dict[str, Path] = field(default_factory=dict)  # {data set: predictions file}
    records: dict[str, dict] = field(default_factory=dict)  # {data set: its scores record}
    settings: dict[str, Any] = field(default_factory=dict)  # of the run or evaluation in the folder

    @property
    def checkpoint(self) -> str:
        """Which of the run's checkpoints answered: "best F1", "last step", both, or its step."""
        names = [
            name
            for name, step in (("best F1", self.best_step), ("last step", self.last_step))
            if step is not None and step == self.step
        ]
        return " = ".join(names) or ("" if self.step is None else f"step {self.step}")

    def data_file(self, data_set: str) -> Path | None:
        """The data file of a set, for its images; None where no record names one that is still
        there.
        """
        for record in (
            self.records.get(data_set, {}).get("run") or {},
            read_record(self.folder / "config.json"),
        ):
            named = (record.get("data") or {}).get(data_set)
            if (
                isinstance(named, dict)
                and named.get("file")
                and (found := located(named["file"], self.folder))
            ):
                return found
        return None


def named_folders(values: Sequence[str], flag: str) -> dict[str, Path]:
    """Values FOLDER or NAME=FOLDER -> {name: folder}; the name is the folder's own where none is
    given.

    Raises UsageError for a folder that is not there and for a name that comes twice.
    """
    folders: dict[str, Path] = {}
    problems = []
    for value in values:
        name, equals, folder = value.partition("=")
        if not equals:
            name, folder = Path(value).name or Path(value).resolve().name, value
        if not folder or not Path(folder).is_dir():
            problems.append(
                f"--{flag} {value}: {folder or 'nothing'} is no folder; give FOLDER or NAME=FOLDER"
            )
        elif name in folders:
            problems.append(f"--{flag} {value}: the name {name} is given twice; write NAME=FOLDER")
        folders.setdefault(name, Path(folder))
    if problems:
        raise UsageError(problems)
    return folders


def load_entry(name: str, folder: Path) -> Entry:
    """Read what a folder says about its model: a run's own config.json, or the scores records of
    an evaluation.

    Where it says nothing (predictions from elsewhere), the stage is taken from the name's
    beginning. Raises UsageError for a record that is not JSON.
    """
    sets = {
        path.stem.removeprefix("predictions-"): path
        for path in sorted(folder.glob("predictions-*.jsonl"))
        if not path.name.endswith(".partial.jsonl")
    }
    records = {data_set: read_record(folder / f"scores-{data_set}.json") for data_set in sets}
    own = read_record(folder / "config.json")
    evaluation = next((record["run"] for record in records.values() if record.get("run")), {})
    settings = _values(own or evaluation)
    adapter = settings.get("adapter_name_or_path") if not own else str(folder)
    found = located(adapter, folder) if adapter else None
    training = (
        None
        if found is None
        else found.resolve().parent
        if found.resolve().name.startswith("checkpoint-")
        else found
    )
    run = own or (read_record(training / "config.json") if training is not None else {})
    trained = _values(run)
    state = read_record(training / "trainer_state.json") if training is not None else {}
    best = state.get("best_model_checkpoint")
    best_step = int(best.rpartition("-")[2]) if best else None
    last_step = state.get("global_step")
    step = next((record["step"] for record in records.values() if "step" in record), None)
    if step is None and found is not None:
        folder_name = found.resolve().name
        final = (
            best_step
            if trained.get("load_best_model_at_end") or run.get("script") == "sft"
            else last_step
        )
        step = (
            int(folder_name.rpartition("-")[2]) if folder_name.startswith("checkpoint-") else final
        )
    stage: Stage = (
        run.get("script")
        if run.get("script") in ("sft", "grpo")
        else "base"
        if evaluation and not adapter
        else _stage_of(name)
    )
    return Entry(
        name=name,
        folder=folder,
        stage=stage,
        base=str(trained.get("model_name_or_path") or settings.get("model_name_or_path") or ""),
        prompt=str(settings.get("prompt") or trained.get("prompt") or ""),
        reward=str(trained.get("reward") or "") if stage == "grpo" else "",
        step=step,
        best_step=best_step,
        last_step=last_step,
        training=training,
        sets=sets,
        records=records,
        settings=settings,
    )


def _stage_of(name: str) -> Stage:
    return next(
        (stage for stage in ("base", "sft", "grpo") if name.lower().startswith(stage)), "other"
    )


def _values(record: dict) -> dict[str, Any]:
    settings = record.get("settings")
    return (
        {name: entry.get("value") for name, entry in settings.items() if isinstance(entry, dict)}
        if isinstance(settings, dict)
        else {}
    )


def read_record(path: Path) -> dict:
    """A JSON object from a file; empty where there is no such file. Raises UsageError for one that
    is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path}: is not valid JSON ({error}); repair or remove it") from error
    if not isinstance(record, dict):
        raise UsageError(
            f"{path}: holds {type(record).__name__}, not an object; repair or remove it"
        )
    return record


def located(named: str, folder: Path) -> Path | None:
    """A path that a record in `folder` names, as it was seen from the folder in which the command
    ran: the current one, or one above `folder`. None where it is in none of them.
    """
    for start in (Path(), *folder.resolve().parents):
        if (start / named).exists():
            return start / named
    return None


def read_log(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a torn last line is left out, and a missing file is empty."""
    rows = []
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def flag_first(argv: Sequence[str], flag: str) -> list[str]:
    """The command line with `--flag` in front where it begins with a value: `RUN RUN --x 1` is
    `--run RUN RUN --x 1`.
    """
    return [f"--{flag}", *argv] if argv and not argv[0].startswith("-") else list(argv)
