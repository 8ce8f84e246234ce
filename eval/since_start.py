"""Keep what a training run answers before its first step, and tell what has changed since.

The answers of the start lie in <run>/start, a folder of results like any other. Each later
evaluation is compared with them image by image, so that a change has a paired interval. A resumed
run reads them back: they are all the memory that this needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.files import DataError, write_json, written_folder
from data.predictions import read_predictions
from engine.config import UsageError
from engine.inherited import FRESH
from engine.ranks import ALONE, Ranks
from eval.end_table import METRICS, SHARED, row_of
from eval.folders import (
    START,
    VOTE,
    Answers,
    load_answers,
    read_record,
    result_files,
    write_results,
)
from eval.metrics import RESAMPLES, interval, scores_of_totals
from eval.paired import shared_resamples
from eval.transfer import (
    Moved,
    gap_on_all_labels,
    gap_on_shared_labels,
    mean_macro,
    shared_labels,
)

EVALUATIONS = "evaluations.jsonl"  # a row a data set and evaluation
_ERRORS = ("gap_se", "gap_shared_se", "gain_shared_se")


# ---- keep ----------------------------------------------------------------------------------------
def keep_start(
    folder: Path,
    names: Sequence[str],
    vote: Callable[[Path], object] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Copy the results of the evaluation before the first step to <run>/start.

    Beside them <run>/start-vote keeps what the same model answers by a vote. It costs no training,
    so it is what GRPO has to beat.

    folder: the run's, with the results in it. names: the data sets. vote: decodes all of them with
    a vote, into the folder that it is given. None for no such baseline. ranks: all of them decode
    the vote, rank 0 alone writes.
    """
    if not names:
        return
    ranks.on_first(lambda: _copy_results(folder, names))
    # once, also where step 0 is the best
    if vote is None or ranks.on_first(lambda: (folder / VOTE).is_dir()):
        return
    with ExitStack() as written:

        def begin() -> str:
            return str(written.enter_context(written_folder(folder / VOTE)))

        def finish(temporary: Path) -> None:
            _say_who_answered(temporary, folder)
            written.close()  # the folder takes its place

        temporary = Path(ranks.on_first(begin))
        vote(temporary)
        ranks.on_first(lambda: finish(temporary))


def _copy_results(folder: Path, names: Sequence[str]) -> None:
    """Copy the results in a run's folder to <run>/start."""
    with written_folder(folder / START) as temporary:
        for name in names:
            predictions_file, scores_file = result_files(folder, name)
            scores = read_record(scores_file)
            scores.pop("step", None)  # of this run, while the folder is about the one before
            write_results(temporary, name, read_predictions(predictions_file), scores)
        _say_who_answered(temporary, folder)


def _say_who_answered(place: Path, folder: Path) -> None:
    """Note in the scores that the adapter answered from which the run in `folder` started.

    They get the record of an evaluation, so that a report reads the model from the folder.
    """
    record = read_record(folder / "config.json")
    settings = record.get("settings") or {}
    of_model = ("adapter_name_or_path", "model_name_or_path", "prompt", "answer_format")
    known = {name: settings[name] for name in of_model if name in settings}
    if known.get("adapter_name_or_path", {}).get("value") == FRESH:
        del known["adapter_name_or_path"]  # a fresh adapter changes nothing: it was the base
    for file in place.glob("scores-*.json"):
        name = file.stem.removeprefix("scores-")
        data = {key: value for key, value in (record.get("data") or {}).items() if key == name}
        run = {"script": "eval", "settings": known, "data": data}
        write_json(file, read_record(file) | {"run": run})


# ---- compare -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SinceStart:
    """Hold what an evaluation says beside its scores.

    rows: one a data set, for evaluations.jsonl. gaps: gap, gap_se, gap_shared, gap_shared_se,
    gain_shared and gain_shared_se, those that can be measured. notes: why others cannot, a line
    each.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    gaps: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def since_start(folder: Path, names: Sequence[str], now: Path | None = None) -> SinceStart:
    """Compare the results in a run's folder with those of its start, on the same images.

    gap: how much more macro-F1 the first set (hospital) has gained since the start than the others
    have on average, each over its own labels. Above 0, part of the gain does not transfer, or lies
    in labels that the others cannot express. gap_se: its standard error, from resamples of
    patients, of the same patients before and after. gap_shared, gap_shared_se: the same on the
    labels that the first set and each other can express. gain_shared, gain_shared_se: the mean of
    what both sides have gained on those labels. All are 0 in the evaluation of the start.

    A row has the change of each metric and "num_labels", those that the set can express. Where a
    set of the other side cannot express all of them, it also has macro_f1_shared, the change of
    macro-F1 on the rest, the mean over such sets, and the number of these labels as
    "shared_labels": the smallest and the largest over these sets.

    folder: the run's. names: the data sets, that of the home hospital first. now: the folder whose
    results are compared with the start, None for the run's own.
    """
    now = now or folder
    found = SinceStart()
    moved: list[Moved] = []
    of_one_patient: list[str] = []
    for index, name in enumerate(names):
        scores = read_record(result_files(now, name)[1])
        if not scores:  # nothing was decoded
            continue
        changes: dict[str, Any] = {}
        try:
            pair = _answers(folder / START, now, name)
        except (DataError, UsageError) as error:
            found.notes.append(
                f"{name}: nothing is compared with the start, so there is no gap:"
                f" {str(error).splitlines()[0]}"
            )
        else:
            labels, values, drawn = _scored(*pair, seed=index)
            if len(set(pair[1].patients.tolist())) == 1:
                of_one_patient.append(name)
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
        row = {"dataset": name} | row_of(scores) | {"since_start": changes}
        found.rows.append(row | ({"num_labels": len(moved[-1].labels)} if changes else {}))
    if len(moved) == len(names) > 1:
        _measure_gaps(moved, found)
        _measure_shared(moved, found)
    if found.gaps and of_one_patient:
        # each resample is the set itself, and 0 would read as certainty
        for gap in _ERRORS:
            found.gaps.pop(gap, None)
        found.notes.append(
            f"{', '.join(of_one_patient)}: all images are of one patient, so"
            f" {', '.join(_ERRORS)} are not measured"
        )
    return found


def since_start_on_all(ranks: Ranks, folder: Path, names: Sequence[str]) -> SinceStart:
    """Compare as `since_start` does, on rank 0, whose files they are, and tell all ranks."""
    return SinceStart(**ranks.on_first(lambda: asdict(since_start(folder, names))))


def _answers(before: Path, after: Path, name: str) -> tuple[Answers, Answers]:
    """Read the answers of the start and of now to one data set.

    Raises DataError where a file is missing or damaged, UsageError where they are to other images.
    """
    files = [result_files(place, name)[0] for place in (before, after)]
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
    totals = {"start": start.totals(columns), "now": now.totals(columns)}
    values = {stage: scores_of_totals(rows.sum(axis=0)[None]) for stage, rows in totals.items()}
    drawn = shared_resamples(totals, seed=seed, resamples=RESAMPLES)
    return tuple(now.label_set.names[k] for k in columns), values, drawn


def _measure_gaps(moved: Sequence[Moved], found: SinceStart) -> None:
    """Add the gaps of the first data set against the others, and say what cannot be measured."""
    home, away = moved[:1], moved[1:]
    whole = gap_on_all_labels(home, away)
    shared = gap_on_shared_labels(home, away)
    if whole is not None:
        found.gaps.update(gap=whole.value, gap_se=whole.standard_error)
    if shared is not None:
        gain, error = shared.gain
        found.gaps.update(gap_shared=shared.value, gap_shared_se=shared.standard_error)
        found.gaps.update(gain_shared=gain, gain_shared_se=error)
    else:
        found.notes.append(
            f"{home[0].data_set} shares no label with {', '.join(one.data_set for one in away)}, so"
            " gap_shared, gain_shared and their errors are not measured"
        )


def _measure_shared(moved: Sequence[Moved], found: SinceStart) -> None:
    """Add to the rows the change of macro-F1 on the labels that the other side can express.

    Of home it is the mean over the sets that express only some of its labels.
    """
    home, away = moved[0], moved[1:]
    for row, one in zip(found.rows, moved, strict=True):
        others = away if one is home else [home]
        labels = [shared_labels(one.labels, other.labels) for other in others]
        labels = [some for some in labels if some and some != one.labels]
        if labels:
            macro = mean_macro([one.macro(some) for some in labels])
            change = {"difference": macro.difference, "interval": list(interval(macro.drawn))}
            counts = sorted({len(some) for some in labels})
            row["since_start"][SHARED] = change
            row["shared_labels"] = [counts[0], counts[-1]]
