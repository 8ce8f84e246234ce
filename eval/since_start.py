"""Keep what a training run answers before its first step, and tell what has changed since.

The answers of the start lie in <run>/start, a folder of results like any other. Each later
evaluation is compared with them image by image, so that a change has a paired interval. A resumed
run reads them back: they are all the memory that this needs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.files import DataError
from data.labels import LABELS
from data.predictions import read_predictions
from engine.config import UsageError
from eval.end_table import METRICS, row_of
from eval.folders import (
    Answers,
    load_answers,
    read_record,
    result_files,
    write_results,
)
from eval.metrics import interval, patient_totals, scores_of_totals
from eval.paired import shared_resamples
from eval.transfer import Moved, gap_on_all_labels, gap_on_shared_labels

START = "start"  # the folder in the run's folder
EVALUATIONS = "evaluations.jsonl"  # a row a data set and evaluation
RESAMPLES = 1000  # as many as the intervals in scores-<set>.json have


# ---- keep ----------------------------------------------------------------------------------------
def keep_start(folder: Path, names: Sequence[str]) -> None:
    """Copy the results of the evaluation before the first step to <run>/start.

    Their scores get the record of an evaluation of the adapter that the run started from, so that a
    report reads from the folder which model answered.

    folder: the run's, with the results in it. names: the data sets.
    """
    if not names:
        return
    record = read_record(folder / "config.json")
    settings = record.get("settings") or {}
    of_model = ("adapter_name_or_path", "model_name_or_path", "prompt", "answer_format")
    run = {
        "script": "eval",
        "settings": {name: settings[name] for name in of_model if name in settings},
        "data": {name: file for name, file in (record.get("data") or {}).items() if name in names},
    }
    temporary = folder / f".tmp-{START}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name in names:
        predictions_file, scores_file = result_files(folder, name)
        scores = {
            key: value for key, value in read_record(scores_file).items() if key != "step"
        } | {"run": run}
        write_results(temporary, name, read_predictions(predictions_file), scores)
    shutil.rmtree(folder / START, ignore_errors=True)
    os.rename(temporary, folder / START)


# ---- compare -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SinceStart:
    """Hold what an evaluation says beside its scores.

    rows: one a data set, for evaluations.jsonl. gaps: gap_se, gap_shared and gap_shared_se, those
    that can be measured. notes: why others cannot, a line each.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    gaps: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def since_start(folder: Path, names: Sequence[str]) -> SinceStart:
    """Compare the results in a run's folder with those of its start, on the same images.

    gap_se: standard error of the gap, from resamples of patients, of the same patients before and
    after. gap_shared, gap_shared_se: the same on the labels that the first set and each other can
    express. All are 0 in the evaluation of the start itself.

    folder: the run's. names: the data sets, that of the home hospital first.
    """
    found = SinceStart()
    moved: list[Moved] = []
    for index, name in enumerate(names):
        _, scores_file = result_files(folder, name)
        scores = read_record(scores_file)
        if not scores:  # nothing was decoded
            continue
        changes: dict[str, Any] = {}
        try:
            pair = _answers(folder, name)
        except (DataError, UsageError) as error:
            found.notes.append(
                f"{name}: nothing is compared with the start, so gap_se, gap_shared and"
                f" gap_shared_se are not measured: {str(error).splitlines()[0]}"
            )
        else:
            labels, values, drawn = _scored(*pair, seed=index)
            moved.append(
                Moved(
                    name,
                    labels,
                    *(values[stage]["label_f1"][0] for stage in ("start", "now")),
                    *(drawn[stage]["label_f1"] for stage in ("start", "now")),
                )
            )
            changes = {
                metric: {
                    "difference": float(values["now"][metric][0] - values["start"][metric][0]),
                    "interval": list(interval(drawn["now"][metric] - drawn["start"][metric])),
                }
                for metric in METRICS
            }
        found.rows.append({"dataset": name} | row_of(scores) | {"since_start": changes})
    if len(moved) == len(names) > 1:
        _measure_gaps(moved, found)
    return found


def _answers(folder: Path, name: str) -> tuple[Answers, Answers]:
    """Read the answers of the start and of now to one data set.

    Raises DataError where a file is missing or damaged, UsageError where they are to other images.
    """
    files = [result_files(place, name)[0] for place in (folder / START, folder)]
    if not files[0].is_file():
        raise UsageError(
            f"{files[0]} is missing; the run was begun by an earlier version, or the file removed"
        )
    start, now = map(load_answers, files)
    if set(start.ids) != set(now.ids):
        raise UsageError(f"{files[0]} answers other images than {files[1]}")
    start = start.taken(now.ids)
    if not np.array_equal(start.targets, now.targets):
        raise UsageError(f"{files[0]} has other labels than {files[1]} for the same images")
    return start, now


def _scored(
    start: Answers, now: Answers, *, seed: int
) -> tuple[tuple[str, ...], dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """Score both -> (labels, {"start", "now": scores}, the same in resamples of the same patients).

    seed: of the draws, another one for each data set.
    """
    columns = now.columns
    totals = {
        stage: patient_totals(
            one.targets[:, columns],
            one.predictions[:, columns],
            one.evaluated[:, columns],
            one.patients.tolist(),
            one.jaccard,
        )
        for stage, one in (("start", start), ("now", now))
    }
    values = {stage: scores_of_totals(rows.sum(axis=0)[None]) for stage, rows in totals.items()}
    drawn = shared_resamples(totals, seed=seed, resamples=RESAMPLES)
    return tuple(LABELS[k] for k in columns), values, drawn


def _measure_gaps(moved: Sequence[Moved], found: SinceStart) -> None:
    """Add the gaps of the first data set against the others, and say what cannot be measured."""
    home, away = moved[:1], moved[1:]
    whole = gap_on_all_labels(home, away)
    shared = gap_on_shared_labels(home, away)
    if whole is not None:
        found.gaps["gap_se"] = whole.standard_error
    if shared is not None:
        found.gaps.update(gap_shared=shared.value, gap_shared_se=shared.standard_error)
    else:
        found.notes.append(
            f"{home[0].data_set} shares no label with {', '.join(one.data_set for one in away)}, so"
            " gap_shared and gap_shared_se are not measured"
        )
