"""Load the data sets of one run: what is trained on, what is evaluated, and what is left out.

A run has the training set of one hospital or of several (data/hospitals.py), and any number of
named sets that are evaluated. Supervised fine-tuning also has a validation set with answers: one of
the named sets, or a share of the training patients of each hospital.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from data.answers import Answer, is_labels_alone, parse_answer
from data.examples import Example, data_file, read_examples, read_jsonl, split_by_patient
from data.files import DataError, write_jsonl
from data.hospitals import Hospital, by_hospital, positions, train_files
from data.images import check_images, without_bad_images
from data.labels import CHEXPERT, LabelSet
from data.prompts import solution_text

# Name of the training set: in config.json and in bad-images-train.jsonl. That of a hospital with a
# name is train.NAME, which no evaluated set can be called.
TRAIN = "train"
Item = TypeVar("Item")


@dataclass(frozen=True)
class DataSets:
    """Hold the data sets of one run.

    train: examples to train on, those of a hospital together.
    evaluated: the named sets that get scores.
    files: data file of every set that has one, the training sets under `train_name`.
    bad_images: rows of the examples that were left out for their images, by set.
    """

    train: list[Example]
    evaluated: dict[str, list[Example]]
    files: dict[str, Path]
    bad_images: dict[str, list[dict]]

    def by_name(self) -> dict[str, list[Example]]:
        """Return the examples of every set under the names of `files`."""
        trained = {train_name(of): own for of, own in by_hospital(self.train).items()}
        return trained | self.evaluated


@dataclass(frozen=True)
class SFTDataSets(DataSets):
    """Hold the data sets of supervised fine-tuning: `train` and `validation` have answers.

    validation: examples whose loss chooses the best checkpoint.
    """

    validation: list[Example]


def train_name(hospital: Hospital) -> str:
    """Name the training set of a hospital, as config.json has it."""
    return TRAIN if hospital is None else f"{TRAIN}.{hospital}"


def train_specs(values: Sequence[str]) -> dict[str, str]:
    """Read --train_file -> {name of the training set: its file, or demo:SPLIT}."""
    return {train_name(one.hospital): one.file for one in train_files(values)[0]}


def load_data_sets(
    specs: Mapping[str, str],
    image_root: str | None,
    bad_images: Literal["fail", "skip"],
    resumed: dict | None = None,
    label_set: LabelSet = CHEXPERT,
) -> DataSets:
    """Read every data file of a run and look for its images.

    specs: {name: a JSONL file or demo:SPLIT}. "train" or each train.NAME is trained on, the others
    are evaluated.
    image_root: folder that image paths are relative to, or None for each data file's own.
    bad_images: see `usable_examples`.
    resumed: config.json of the run that goes on, if one does.
    label_set: the labels that rows may hold.

    Raises DataError naming every problem of a file, and as `usable_examples` does.
    """
    files, sets, left_out = read_sets(
        specs, image_root, bad_images, resumed=resumed, label_set=label_set
    )
    hospitals = {name: name.partition(".")[2] or None for name in sets if is_trained_on(name)}
    train = [
        replace(example, hospital=hospital)
        for name, hospital in hospitals.items()
        for example in sets[name]
    ]
    evaluated = {
        name: [replace(example, hospital=name) for example in examples]
        if name in hospitals.values()
        else examples
        for name, examples in sets.items()
        if name not in hospitals
    }
    return DataSets(train, evaluated, files, left_out)


def is_trained_on(name: str) -> bool:
    """Tell whether a name of config.json is that of a training set."""
    return name.partition(".")[0] == TRAIN


def read_training_examples(
    values: Sequence[str], image_root: str | None = None, label_set: LabelSet = CHEXPERT
) -> list[Example] | None:
    """Read what --train_file names, for baselines that imitate it. None where it names nothing.

    Raises DataError naming every problem of a file.
    """
    specs = train_specs(values).values()
    examples = [one for spec in specs for one in read_examples(spec, image_root, label_set)]
    return examples or None


def read_sets(
    specs: Mapping[str, str],
    image_root: str | None,
    bad_images: Literal["fail", "skip"],
    *,
    max_samples: int | None = None,
    resumed: dict | None = None,
    label_set: LabelSet = CHEXPERT,
) -> tuple[dict[str, Path], dict[str, list[Example]], dict[str, list[dict]]]:
    """Read named data files -> (their files, the examples to use, rows of the examples left out).

    specs: {name: a JSONL file or demo:SPLIT}.
    image_root: folder that image paths are relative to, or None for each data file's own.
    max_samples: use only the first so many rows of each file, None for all.
    bad_images, resumed: see `usable_examples`. label_set: the labels that rows may hold.

    Raises DataError naming every problem of a file, and as `usable_examples` does.
    """
    files = {name: data_file(spec, label_set) for name, spec in specs.items()}
    read = {
        name: read_jsonl(path, image_root, label_set)[:max_samples] for name, path in files.items()
    }
    usable, left_out = usable_examples(read, bad_images, resumed)
    return files, usable, left_out


def with_answers_to_learn(
    sets: DataSets, answer_format: str, *, validation_split: float, seed: int
) -> SFTDataSets:
    """Give supervised fine-tuning its answers and its validation set.

    answer_format: form of the answers. Without reasoning (Only Label) they are made from the
    labels.
    validation_split: share of each hospital's training examples that is held out by patient where
    no evaluated set has answers for all its examples. Else the first such set is the validation
    set. seed: of the held-out patients.

    Where there is no evaluated set, the validation set is evaluated under the name "validation", or
    under that of its hospital.

    Raises DataError for a training example without an answer in the form, and for too few patients.
    """
    train = _learnt(sets, answer_format)
    answered = (
        name
        for name, examples in sets.evaluated.items()
        if is_labels_alone(answer_format) or all(example.answer for example in examples)
    )
    name = next(answered, None)
    if name is None:
        train, validation = _held_out(train, validation_split, seed)
    else:
        validation = answers_to_learn(sets.evaluated[name], answer_format, sets.files[name])
    evaluated = sets.evaluated or {
        hospital or "validation": own for hospital, own in by_hospital(validation).items()
    }
    return SFTDataSets(train, evaluated, sets.files, sets.bad_images, validation)


def _learnt(sets: DataSets, answer_format: str) -> list[Example]:
    """Give every training example its answer. Raises DataError with the problems of all files."""
    learnt: list[Example] = []
    problems: list[str] = []
    for hospital, own in by_hospital(sets.train).items():
        try:
            learnt += answers_to_learn(own, answer_format, sets.files[train_name(hospital)])
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return learnt


def _held_out(
    train: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out a part of each hospital's examples by patient -> (rest, held out).

    A patient whom two files of one data set share is on the same side in both.
    """
    rest: list[Example] = []
    held: list[Example] = []
    for hospital, own in by_hospital(train).items():
        datasets = {example.dataset for example in own}
        elsewhere = {one.patient_id: False for one in rest if one.dataset in datasets}
        elsewhere |= {one.patient_id: True for one in held if one.dataset in datasets}
        shared = {one.patient_id for one in own} & elsewhere.keys()
        try:
            sides = split_by_patient(own, fraction, seed, {p: elsewhere[p] for p in shared})
        except DataError as error:
            where = f"--train_file {hospital}: " if hospital else ""
            raise DataError([f"{where}{line}" for line in error.problems]) from error
        rest += sides[0]
        held += sides[1]
    return rest, held


def answers_to_learn(
    examples: Sequence[Example], answer_format: str, file: str | Path
) -> list[Example]:
    """Give each example the answer that SFT learns.

    answer_format: form of the answers. Without reasoning (`solution`, Only Label) they are made
    from the labels, for the others they are the file's own.
    file: of the examples, for messages.

    Raises DataError where an example has no answer, or one that is not strictly in the form.
    """
    if is_labels_alone(answer_format):
        return [
            replace(
                example,
                answer=solution_text(example.target.labels, example.label_set, answer_format),
            )
            for example in examples
        ]
    without = [example.id for example in examples if not example.answer]
    if without:
        raise DataError(
            [
                f"{file}: {len(without)} of {len(examples)} examples have no 'answer' to learn"
                f" from, such as {without[0]!r}; make them with `python -m data.traces`, or learn"
                " the labels alone with --prompt only_label"
            ]
        )
    problems = {
        example.id: answer.problem
        for example in examples
        if not (answer := _read_answer(example, answer_format)).valid
    }
    if problems:
        name, problem = next(iter(problems.items()))
        raise DataError(
            [
                f"{file}: {len(problems)} of {len(examples)} answers are not in the form"
                f" {answer_format}, such as that of {name!r} ({problem}); repair them, or give the"
                " --answer_format that they have"
            ]
        )
    return list(examples)


def _read_answer(example: Example, answer_format: str) -> Answer:
    return parse_answer(example.answer or "", answer_format, example.label_set)


# ---- images --------------------------------------------------------------------------------------
def usable_examples(
    sets: Mapping[str, list[Example]],
    bad_images: Literal["fail", "skip"],
    resumed: dict | None = None,
) -> tuple[dict[str, list[Example]], dict[str, list[dict]]]:
    """Sort out examples by their images -> (sets to use, rows of the examples left out by set).

    bad_images: as --bad_images says. fail: every image file must be there. What is in it shows when
    it is needed. skip: all images are read now, and examples with a bad one are left out.
    resumed: config.json of the run that goes on, if one does. At skip it leaves out again what it
    left out at its beginning, so that its data sets are the same.

    Raises DataError for missing images, and for a data set of which nothing is left.
    """
    if bad_images == "fail":
        check_images(example for examples in sets.values() for example in examples)
        return dict(sets), {name: [] for name in sets}
    if resumed is None:
        checked = {name: without_bad_images(examples, name) for name, examples in sets.items()}
        usable = {name: good for name, (good, _) in checked.items()}
        return usable, {name: bad for name, (_, bad) in checked.items()}
    left_out = resumed["bad_images"]
    ids = {name: {row["id"] for row in left_out.get(name, [])} for name in sets}
    usable = {
        name: [example for example in examples if example.id not in ids[name]]
        for name, examples in sets.items()
    }
    check_images(example for examples in usable.values() for example in examples)
    return usable, left_out


def write_bad_images(folder: Path, bad_images: Mapping[str, list[dict]]) -> None:
    """Write bad-images-<name>.jsonl for every set that examples were left out of, with reasons."""
    for name, rows in bad_images.items():
        if rows:
            write_jsonl(Path(folder) / f"bad-images-{name}.jsonl", rows)


def bad_images_line(bad_images: Mapping[str, list[dict]]) -> str:
    """Say in a banner's line on data how many examples are left out, if any."""
    counts = ", ".join(
        f"{name} {len(rows)} (bad-images-{name}.jsonl)" for name, rows in bad_images.items() if rows
    )
    return f"; left out for their images: {counts}" if counts else ""


def data_line(sets: DataSets, weights: Mapping[str, float]) -> str:
    """Say in a banner's line how many examples are learnt from, validated on and evaluated.

    weights: {hospital: weight}. Raises DataError for a hospital that no position of an epoch gets.
    """
    images = {hospital: len(own) for hospital, own in by_hospital(sets.train).items()}
    counts = positions(images, weights)
    each = [f"{name} {counts[name]} of an epoch, from {images[name]}" for name in images if name]
    hospitals = f" ({'; '.join(each)})" if each else ""
    held = f", {len(sets.validation)} to validate" if isinstance(sets, SFTDataSets) else ""
    named = ", ".join(f"{name} {len(examples)}" for name, examples in sets.evaluated.items())
    left_out = bad_images_line(sets.bad_images)
    scored = named or "nothing"
    trained = f"{len(sets.train)} to train on{hospitals}"
    return f"data        {trained}{held}; scored: {scored}{left_out}"


def bad_image_counts(
    names: Iterable[str], bad_images: Mapping[str, list[dict]]
) -> dict[str, dict[str, int]]:
    """Count the examples left out of each set, as its scores note it: {name: {"bad_images": n}}."""
    return {name: {"bad_images": len(bad_images.get(name, []))} for name in names}


# ---- pieces --------------------------------------------------------------------------------------
def in_chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut a sequence into consecutive pieces of `size`, the last one shorter where it must be."""
    return [items[start : start + size] for start in range(0, len(items), size)]
