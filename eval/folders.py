"""Read and write what runs and evaluations leave in their folders.

An `Entry` is one model's folder: predictions-<set>.jsonl, and from the records beside them which
model it is and which run trained it. `Answers` are the answers to one data set without their texts,
some hundred bytes an image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.entries import UNKNOWN_KINDS, unknown_kind
from data.files import DataError, NameOrFile, write_json
from data.label_sets import labels_of
from data.labels import (
    CHEXPERT,
    NIH_TEN,
    NIH_TO_CHEXPERT,
    LabelSet,
    chexpert_labels_of_nih,
)
from data.plain_files import (
    is_checkpoint_name,
    is_plain,
    parse_record,
    plain_lines,
    read_plain,
)
from data.predictions import Prediction, first_label_set, iter_predictions, write_predictions
from data.prompt_files import prompt_name
from engine.adapter_settings import shown
from engine.checkpoint import checkpoint_step
from engine.config import UsageError, from_json
from engine.merge_settings import INTERPOLATION
from engine.model_files import EMBEDDED
from eval.metrics import jaccard_per_image, patient_totals
from eval.names import name_by_stage
from eval.paired import fingerprint

Stage = Literal["base", "sft", "grpo", "other"]
START = "start"  # folder in a GRPO run's: what its start answered
VOTE = "start-vote"  # the same start, by a vote of several samples


# ---- results of an evaluation --------------------------------------------------------------------
def result_files(output_dir: str | Path, name: str) -> tuple[Path, Path]:
    """Return the paths of a data set's results: (predictions-<name>.jsonl, scores-<name>.json)."""
    folder = Path(output_dir)
    return folder / f"predictions-{name}.jsonl", folder / f"scores-{name}.json"


def more_files(output_dir: str | Path, name: str) -> dict[str, Path]:
    """Return where further answers to a data set go: its samples, and those to swapped images."""
    folder = Path(output_dir)
    return {kind: folder / f"{kind}-{name}.jsonl" for kind in ("samples", "swapped")}


def write_results(
    output_dir: str | Path,
    name: str,
    predictions: Sequence[Prediction],
    scores: Mapping[str, Any],
    *,
    more: Mapping[str, Sequence[Prediction]] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the predictions and the scores of a data set, each file whole or not at all.

    more: further answers, by the kinds of `more_files`.
    overwrite: replace results of that name, as a training run does with its own. Raises UsageError
    where there are some and they must stay.

    The scores are written last, so results that have scores are whole.
    """
    predictions_file, scores_file = result_files(output_dir, name)
    files = more_files(output_dir, name)
    if not overwrite:
        refuse_existing([predictions_file, scores_file, *files.values()])
    for kind, file in files.items():
        if more and kind in more:
            write_predictions(file, more[kind])
        else:  # of the results that are replaced
            file.unlink(missing_ok=True)
    write_predictions(predictions_file, predictions)
    write_json(scores_file, scores)


def made_folder(output_dir: str) -> Path:
    """Make the folder that --output_dir names, where it is not there yet, and return it.

    Raises UsageError where that cannot be done.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: cannot be used: {error.strerror}") from error
    return folder


def refuse_existing(files: Sequence[Path]) -> None:
    """Raise UsageError where one of the files is there already, so that nothing is overwritten."""
    existing = [file for file in files if file.exists()]
    if existing:
        raise UsageError(
            [
                f"{file} exists and nothing is overwritten; give another --output_dir or NAME"
                for file in existing
            ]
        )


# ---- answers -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answers:
    """Hold N answers to one data set as arrays. A failed answer predicts nothing.

    ids: of the examples. patients [N]. targets, predictions, evaluated [N, L] bool, columns the L
    labels of label_set. nih_targets [N, L] bool: NIH's own labels mapped to ten categories, nothing
    where the source is not NIH's. is_nih: all of the data set has NIH's own labels.
    parsed, valid [N] bool. unknown_kinds [N, 4]: entries that are no label, columns in the order of
    UNKNOWN_KINDS. lengths [N] in tokens, NaN where unknown. texts: `fingerprint` of each
    completion. prompts: names of the instructions. problems: how often each problem came.
    who [N]: (sex, age, view) of the images, None where unknown. datasets: where they come from.
    """

    ids: list[str]
    patients: np.ndarray
    targets: np.ndarray
    predictions: np.ndarray
    evaluated: np.ndarray
    nih_targets: np.ndarray
    is_nih: bool
    parsed: np.ndarray
    valid: np.ndarray
    unknown_kinds: np.ndarray
    lengths: np.ndarray
    texts: list[int]
    prompts: tuple[str, ...]
    problems: Counter[str]
    who: list[tuple[str | None, int | None, str | None]]
    datasets: tuple[str, ...]
    label_set: LabelSet = CHEXPERT

    @cached_property
    def columns(self) -> list[int]:
        """Return the positions in label_set of the labels that any image evaluates."""
        return np.flatnonzero(self.evaluated.any(axis=0)).tolist()

    @cached_property
    def jaccard(self) -> np.ndarray:
        """Return [N] as in scores-<name>.json: 0 for an answer that is not valid."""
        return np.where(
            self.valid,
            jaccard_per_image(self.targets, self.predictions, self.evaluated, self.num_unknown),
            0.0,
        )

    def totals(self, columns: Sequence[int]) -> np.ndarray:
        """Add up the answers by patient over some labels -> `patient_totals` [P, 3K + 2].

        columns [K]: positions in label_set.
        """
        return patient_totals(
            self.targets[:, columns],
            self.predictions[:, columns],
            self.evaluated[:, columns],
            self.patients.tolist(),
            self.jaccard,
        )

    @cached_property
    def num_unknown(self) -> np.ndarray:
        """Return [N]: the entries of each answer that are no label."""
        return self.unknown_kinds.sum(axis=1)

    @cached_property
    def no_label(self) -> np.ndarray:
        """Return [N] bool: the answer has entries, and none is a label."""
        return ~self.parsed & (self.num_unknown > 0)

    @cached_property
    def right(self) -> np.ndarray:
        """Return [N] bool: the answer names the true labels exactly, and nothing unknown.

        Only labels that the image evaluates count.
        """
        same = ~((self.targets ^ self.predictions) & self.evaluated).any(axis=1)
        return same & self.parsed & (self.num_unknown == 0)

    @cached_property
    def contradictions(self) -> np.ndarray:
        """Return [N] bool: No Finding stands beside a finding other than Support Devices.

        So does the exclusive label of another set. Without one there are none.
        """
        names, exclusive = self.label_set.names, self.label_set.exclusive
        if exclusive is None:
            return np.zeros(len(self.ids), dtype=bool)
        excluded = np.isin(names, (exclusive, *self.label_set.beside), invert=True)
        said = self.predictions[:, names.index(exclusive)]
        return said & self.predictions[:, excluded].any(axis=1)

    def label_sets(self) -> list[frozenset[str]]:
        """Return the predicted labels of each answer, also those that are not evaluated."""
        names = self.label_set.names
        return [frozenset(names[k] for k in np.flatnonzero(row)) for row in self.predictions]

    def taken(self, ids: Sequence[str]) -> Answers:
        """Return the answers to these images, in this order."""
        if list(ids) == self.ids:
            return self
        position = {id: n for n, id in enumerate(self.ids)}
        index = np.array([position[id] for id in ids], dtype=int)
        arrays = {
            name: value[index]
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray) and name in self.__dataclass_fields__
        }
        return dataclasses.replace(
            self,
            ids=list(ids),
            texts=[self.texts[n] for n in index],
            who=[self.who[n] for n in index],
            **arrays,
        )

    def under_nih(self, labels: Sequence[str]) -> Answers:
        """Score the same answers against NIH's own labels, mapped to `labels` of the ten."""
        shown = np.isin(np.array(self.label_set.names), list(labels))
        return dataclasses.replace(
            self,
            targets=self.nih_targets & shown,
            evaluated=np.broadcast_to(shown, self.targets.shape),
        )


def load_answers(path: Path) -> Answers:
    """Read a predictions file, parsed anew, without keeping its texts.

    Raises DataError as `iter_predictions` does, and for the rollouts of a run: a report compares
    one answer an image.
    """
    ids, texts = [], []
    numbers: list[tuple[bool, bool, list[int], int | None]] = []
    patients, bits, who = [], [], []
    same: dict[tuple, tuple] = {}  # one object for equal ones
    prompts: dict[str, None] = {}
    datasets: dict[str, None] = {}
    problems: Counter[str] = Counter()
    label_set, place = CHEXPERT, dict[str, int]()
    for prediction in iter_predictions(path):
        answer, source = prediction.answer, prediction.source_labels
        if not place:
            label_set = prediction.label_set
            place = {label: k for k, label in enumerate(label_set.names)}
        nih = (
            bool(source)
            and label_set == CHEXPERT
            and all(label in NIH_TO_CHEXPERT for label in source)
            and set(prediction.evaluated_labels) <= set(NIH_TEN)
        )
        prompts[prediction.prompt] = None
        datasets[prediction.dataset] = None
        if answer.problem:
            problems[answer.problem] += 1
        ids.append(prediction.id)
        patients.append(prediction.patient_id)
        person = (prediction.sex, prediction.age, prediction.view)
        who.append(same.setdefault(person, person))
        texts.append(fingerprint(prediction.completion))
        said = Counter(unknown_kind(entry, label_set) for entry in answer.unknown)
        kinds = [said[kind] for kind in UNKNOWN_KINDS]
        numbers.append((answer.parsed, answer.valid, kinds, prediction.completion_length))
        nih_labels = chexpert_labels_of_nih(source, NIH_TEN) if nih else ()
        sets = (prediction.labels, answer.labels, prediction.evaluated_labels, nih_labels)
        bits.append((nih, *(sum(1 << place[label] for label in set(labels)) for labels in sets)))
    if len(set(ids)) < len(ids):
        raise DataError(
            [
                f"{path}: holds several completions of one id, as rollouts do; a report compares"
                " one answer an image: score rollouts with python -m eval.evaluate --predictions"
            ]
        )
    is_nih, targets, predicted, evaluated, nih_targets = zip(*bits, strict=True)
    parsed, valid, unknown_kinds, lengths = zip(*numbers, strict=True)
    return Answers(
        ids=ids,
        patients=np.array(patients),
        targets=_matrix(targets, len(place)),
        predictions=_matrix(predicted, len(place)),
        evaluated=_matrix(evaluated, len(place)),
        nih_targets=_matrix(nih_targets, len(place)),
        is_nih=all(is_nih),
        parsed=np.array(parsed),
        valid=np.array(valid),
        unknown_kinds=np.array(unknown_kinds),
        lengths=np.array([np.nan if length is None else length for length in lengths]),
        texts=texts,
        prompts=tuple(prompts),
        problems=problems,
        who=who,
        datasets=tuple(datasets),
        label_set=label_set,
    )


def _matrix(rows: Sequence[int], num_labels: int) -> np.ndarray:
    """Spread sets of labels, as the bits of integers of any size -> [N, L] bool."""
    size = (num_labels + 7) // 8
    packed = np.frombuffer(b"".join(row.to_bytes(size, "little") for row in rows), dtype=np.uint8)
    spread = np.unpackbits(packed.reshape(len(rows), size), axis=1, bitorder="little")
    return spread[:, :num_labels].astype(bool)


# ---- folders -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Entry:
    """Describe one model's folder of results, and the run that trained the model.

    base: the base model's name, "" where unknown. reward: of GRPO, else "". step: of the checkpoint
    that answered, None where unknown. training: folder of the run that trained the model, None
    where it is no longer there. sets: {data set: predictions file}. records: {data set: its scores
    record}. settings: of the run or evaluation in the folder. trained: of the run that trained the
    model. is_told: the stage is told by records, and no guess from the name. is_added: nobody named
    the folder, it lies in that of a GRPO run that somebody named. label_set: of its answers, else
    of its run. interpolation: of a model between two adapters its "alpha" and the "sha256" of both.
    """

    name: str
    folder: Path
    stage: Stage
    base: str
    prompt: str
    reward: str
    step: int | None
    best_step: int | None
    last_step: int | None
    training: Path | None
    sets: dict[str, Path] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)
    is_told: bool = False
    is_added: bool = False
    label_set: LabelSet = CHEXPERT
    interpolation: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_read(self) -> NameOrFile:
        """Return the prompt that was asked: a built-in one's name, or a file kept whole."""
        return self.settings.get("prompt") or self.trained.get("prompt") or ""

    @property
    def votes(self) -> int:
        """Return how many samples an answer was voted from, 1 for an answer of its own."""
        return next(
            (
                int(record["samples"].get("num_generations") or 1)
                for record in self.records.values()
                if isinstance(record.get("samples"), dict)
            ),
            1,
        )

    @property
    def served(self) -> str:
        """Return the name that a server has for the model, "" for one of the engine's own."""
        return _served_name(self.settings)

    @property
    def checkpoint(self) -> str:
        """Return which checkpoint answered: "best F1", "last step", both, or its step."""
        names = [
            name
            for name, step in (("best F1", self.best_step), ("last step", self.last_step))
            if step is not None and step == self.step
        ]
        return " = ".join(names) or ("" if self.step is None else f"step {self.step}")

    @property
    def is_demo(self) -> bool:
        """Tell whether the embedded model or its drawn data took part."""
        values = [*self.trained.values(), *self.settings.values()]
        named = [one for value in values for one in (value if isinstance(value, list) else [value])]
        return self.base in EMBEDDED or any("demo:" in one for one in named if isinstance(one, str))

    def data_file(self, data_set: str) -> Path | None:
        """Find the data file of a set, for its images, or None where no record names one."""
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
    """Read the values FOLDER or NAME=FOLDER of a flag -> {name: folder}.

    The name is the folder's own where none is given. Raises UsageError for a folder that is not
    there and for a name that comes twice.
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


def load_entries(values: Sequence[str], flag: str, *, with_votes: bool = False) -> list[Entry]:
    """Read the models that the values FOLDER or NAME=FOLDER of a flag name, in their order.

    One without NAME= is named by its stage. with_votes: read the votes that GRPO runs keep, too.
    Raises UsageError as `named_folders` and `load_entry` do.
    """
    entries = [load_entry(name, folder) for name, folder in named_folders(values, flag).items()]
    if with_votes:
        entries = _among_votes(entries)
    return name_by_stage(entries, {value.partition("=")[0] for value in values if "=" in value})


def one_label_set(entries: Sequence[Entry]) -> LabelSet:
    """Return the labels that all entries have. Raises UsageError where two have other ones."""
    first = entries[0].label_set if entries else CHEXPERT
    for entry in entries:
        if entry.label_set != first:
            raise UsageError(
                f"{entries[0].name} ({entries[0].folder}) and {entry.name} ({entry.folder}) have"
                f" other labels ({_labels_in_brief(first)}; {_labels_in_brief(entry.label_set)}):"
                " their scores cannot stand side by side"
            )
    return first


def _labels_in_brief(label_set: LabelSet) -> str:
    if label_set == CHEXPERT:
        return "the 14 of CheXpert"
    shown = ", ".join(label_set.names[:3])
    return f"{len(label_set.names)} of a label file: {shown}" + ", ..." * (len(label_set.names) > 3)


def _among_votes(entries: Sequence[Entry]) -> list[Entry]:
    """Put before each GRPO run the vote over its start that its folder keeps, if it keeps one.

    What a vote reaches without training is what GRPO has to beat. It is left out where a vote of
    that stage on the same data sets is among the entries.
    """
    folders = {entry.folder.resolve() for entry in entries}
    voting = [entry for entry in entries if entry.votes > 1]
    found: list[Entry] = []
    for entry in entries:
        place = entry.folder / VOTE
        if entry.stage == "grpo" and place.is_dir() and place.resolve() not in folders:
            vote = dataclasses.replace(load_entry(f"{VOTE} of {entry.name}", place), is_added=True)
            if vote.sets and not any(_same_vote(vote, other) for other in voting):
                voting.append(vote)
                found.append(vote)
        found.append(entry)
    return found


def _same_vote(vote: Entry, other: Entry) -> bool:
    """Tell whether another vote makes one from a run's folder superfluous.

    Two from runs' folders are the same only where one model answered.
    """
    adapters = (one.settings.get("adapter_name_or_path") for one in (vote, other))
    same_model = not other.is_added or len(set(adapters)) == 1
    return same_model and vote.stage == other.stage and set(vote.sets) <= set(other.sets)


def added_votes(entries: Sequence[Entry]) -> str:
    """Say in one line which votes nobody named, "" where there are none."""
    added = [f"{entry.name} ({entry.folder})" for entry in entries if entry.is_added]
    return f"added, the vote that GRPO has to beat: {', '.join(added)}" if added else ""


def answers_by_set(entries: Sequence[Entry]) -> Iterator[tuple[str, dict[str, Answers]]]:
    """Yield every data set, by name, with its answers by the name of the entry.

    The files of a set are read when it is asked for. Raises DataError as `load_answers` does.
    """
    for data_set in sorted({data_set for entry in entries for data_set in entry.sets}):
        yield (
            data_set,
            {
                entry.name: load_answers(entry.sets[data_set])
                for entry in entries
                if data_set in entry.sets
            },
        )


def load_entry(name: str, folder: Path) -> Entry:
    """Read which model a folder holds, from a run's config.json or an evaluation's scores records.

    Where it says nothing (predictions from elsewhere), the stage is taken from the name's
    beginning. Raises UsageError for a record that is not JSON.
    """
    sets = _sets_of(folder)
    records = {data_set: _scores_of(result_files(folder, data_set)[1]) for data_set in sets}
    own = read_record(folder / "config.json")
    evaluation: dict[str, Any] = next(
        (record["run"] for record in records.values() if record.get("run")), {}
    )
    settings = _values(own or evaluation, folder)
    if settings.get("predictions"):  # scored again without a model: no prompt was asked
        settings.pop("prompt", None)
    adapter = settings.get("adapter_name_or_path") if not own else str(folder)
    found = located(adapter, folder) if isinstance(adapter, str) and adapter else None
    training = None if found is None else _run_of(found)
    run = own or (read_record(training / "config.json") if training is not None else {})
    trained = _values(run, folder if training is None else training)
    best_step, last_step = _best_and_last(training)
    step = next((record["step"] for record in records.values() if "step" in record), None)
    if step is None and found is not None:
        chosen = trained.get("load_best_model_at_end") or run.get("script") == "sft"
        step = _step_of(found, best_step if chosen else last_step)
    served = bool(_served_name(settings))
    # answers that were only scored again, or came from a server, may be any model's
    is_base = bool(evaluation and not adapter and not settings.get("predictions") and not served)
    stage = _stage_of(name, run, is_base=is_base)
    return Entry(
        name=name,
        folder=folder,
        stage=stage,
        base=str(trained.get("model_name_or_path") or settings.get("model_name_or_path") or ""),
        prompt=prompt_name(settings.get("prompt") or trained.get("prompt") or ""),
        reward=str(trained.get("reward") or "") if stage == "grpo" else "",
        step=step,
        best_step=best_step,
        last_step=last_step,
        training=training,
        sets=sets,
        records=records,
        settings=settings,
        trained=trained,
        is_told=is_base or served or run.get("script") in ("sft", "grpo"),
        label_set=next(
            (first_label_set(path) for path in sets.values()), labels_of(trained.get("label_file"))
        ),
        interpolation=_interpolation_of(run),
    )


def _served_name(settings: Mapping[str, Any]) -> str:
    """Find the name that a server has for the model of an evaluation's settings, "" for none."""
    served = settings.get("vllm_server_base_url")
    return str(settings.get("model_name_or_path") or "") if served else ""


def _interpolation_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """Read which share of which adapters a model has, {} for any other model."""
    told = run.get(INTERPOLATION)
    if not isinstance(told, dict):
        return {}
    alpha, digests = told.get("alpha"), told.get("sha256")
    if not isinstance(alpha, (int, float)) or not isinstance(digests, list) or len(digests) != 2:
        return {}
    return {"alpha": alpha, "sha256": list(map(str, digests))}


def _sets_of(folder: Path) -> dict[str, Path]:
    """Find the predictions of a folder, by data set.

    Raises UsageError for a file that is a link or a pipe, or has a name that cannot be printed.
    """
    sets = {}
    for path in sorted(folder.glob("predictions-*.jsonl")):
        if path.name.endswith(".partial.jsonl"):
            continue
        name = path.stem.removeprefix("predictions-")
        if not (is_plain(path) and name.isprintable()):
            raise UsageError(
                f"{folder}: {path.name!r} is not a regular file with a printable name; put the file"
                " itself there, or remove it"
            )
        sets[name] = path
    return sets


# Parts of a record of scores that are objects, and those that are numbers.
_OBJECTS = (
    "run",
    "micro",
    "macro",
    "per_label",
    "baselines",
    "intervals",
    "probabilities",
    "samples",
    "groups",
    "faithfulness",
)
_NUMBERS = ("n", "num_patients", "fail_rate", "jaccard", "bad_images")


def _scores_of(path: Path) -> dict[str, Any]:
    """Read scores-<name>.json. Raises UsageError naming a part that is of another type."""
    record = read_record(path)
    run = record.get("run")
    parts: dict[str, tuple[Any, Any]] = {name: (record.get(name), dict) for name in _OBJECTS}
    parts |= {name: (record.get(name), (int, float)) for name in _NUMBERS}
    parts |= {"stage": (record.get("stage"), str), "step": (record.get("step"), int)}
    if isinstance(run, dict):
        for name in ("settings", "data"):
            parts[f"run, {name}"] = run.get(name), dict
            inner = run[name] if isinstance(run.get(name), dict) else {}
            parts |= {f"run, {name}, {key!a}": (value, dict) for key, value in inner.items()}
    bins = part_of(record, "probabilities").get("reliability")
    parts["probabilities, reliability"] = bins, list
    for place, one in enumerate(bins if isinstance(bins, list) else ()):
        for key in ("confidence", "observed", "n"):
            number = one.get(key) if isinstance(one, dict) else one
            parts[f"probabilities, reliability {place}, {key}"] = number, (int, float)
    for name in ("micro", "macro"):
        numbers = record.get(name)
        for key, value in numbers.items() if isinstance(numbers, dict) else ():
            parts[f"{name}, {key!a}"] = value, (int, float)
    for name, (value, kind) in parts.items():
        if value is not None and not isinstance(value, kind):
            raise UsageError(
                f"{path}: {name} is {shown(value)}, which no evaluation writes; score the"
                " predictions again with eval.evaluate, or remove it"
            )
    return record


def _best_and_last(training: Path | None) -> tuple[int | None, int | None]:
    """Read the steps of a run's best checkpoint and of its last, None where it has none."""
    path = Path() if training is None else training / "trainer_state.json"
    state = {} if training is None else read_record(path)
    best, last = state.get("best_model_checkpoint"), state.get("global_step")
    for name, value, sound in (
        ("best_model_checkpoint", best, best is None or is_checkpoint_name(best)),
        ("global_step", last, last is None or type(last) is int),
    ):
        if not sound:
            raise UsageError(f"{path}: {name} is {shown(value)}; repair or remove it")
    return (int(best.rpartition("-")[2]) if best else None), last


def _run_of(adapter: Path) -> Path:
    """Return the run's folder of an adapter, which may be one of its checkpoints."""
    resolved = adapter.resolve()
    return adapter if checkpoint_step(resolved.name) is None else resolved.parent


def _step_of(adapter: Path, final: int | None) -> int | None:
    """Return the step of an adapter: its checkpoint's, or `final` at the top of a run's folder."""
    step = checkpoint_step(adapter.resolve().name)
    return final if step is None else step


def _stage_of(name: str, run: Mapping[str, Any], *, is_base: bool) -> Stage:
    """Tell a model's stage from its run, else from the beginning of its name."""
    script = run.get("script")
    if script == "sft" or script == "grpo":
        return script
    if is_base:
        return "base"
    stages: tuple[Stage, ...] = ("base", "sft", "grpo")
    return next((stage for stage in stages if name.lower().startswith(stage)), "other")


def _values(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    settings = record.get("settings")
    if not isinstance(settings, dict):
        return {}
    entries = {name: entry for name, entry in settings.items() if isinstance(entry, dict)}
    try:
        return {name: from_json(entry.get("value")) for name, entry in entries.items()}
    except DataError as error:
        raise UsageError(f"{folder}: {error}; repair or remove its records") from error


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file, empty where there is no such file.

    Raises UsageError for a file that is not a JSON object.
    """
    if not os.path.lexists(path):
        return {}
    try:
        record = parse_record(read_plain(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path}: is not valid JSON ({error}); repair or remove it") from error
    if not isinstance(record, dict):
        raise UsageError(
            f"{path}: holds {type(record).__name__}, not an object; repair or remove it"
        )
    return record


def part_of(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a part of a record, empty where a record of another version has none."""
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def located(named: str, folder: Path) -> Path | None:
    """Find a path that a record in `folder` names, seen from where its command ran.

    That is the current folder, or one above `folder`. None where the path is in none of them.
    """
    with contextlib.suppress(OSError, ValueError):  # no name of a file can be so long, or hold NUL
        for start in (Path(), *folder.resolve().parents):
            if (start / named).exists():
                return start / named
    return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics.jsonl, none where there is no such file."""
    rows = []
    try:
        for line in plain_lines(path) if os.path.lexists(path) else ():
            try:
                row = parse_record(line)
            except ValueError:  # torn by the end of a process
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    return rows


def flag_first(argv: Sequence[str], flag: str) -> list[str]:
    """Put `--flag` in front of a command line that begins with a value.

    `RUN RUN --x 1` is then read as `--run RUN RUN --x 1`.
    """
    return [f"--{flag}", *argv] if argv and not argv[0].startswith("-") else list(argv)
