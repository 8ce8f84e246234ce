"""Draw the training and test sets from downloaded hospitals' data.

    python -m data.select --mimic data/mimic-cxr-jpg/2.1.0 \
        --chexpert data/CheXpert-v1.0-small --nih data/nih --output_dir data

writes sft.jsonl, rl.jsonl and validation.jsonl of one hospital (the first of mimic, chexpert and
nih given, or --train_on), and test-<hospital>.jsonl of each. No patient is in two sets. Beside each
NAME.jsonl lies NAME.select.json: every setting, the SHA-256 of the label files, what was dropped
and why, and the balance. The run scripts and eval.evaluate copy it into a run's configuration. No
image is decoded: of those drawn, files of equal size are compared byte by byte, and a picture that
is there under two names is noted. Nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from data.chexpert import load_chexpert
from data.command_line import LARGEST_SEED, Parser, exit_code, plain_integer
from data.examples import Example, row_of, selection_file
from data.files import MAX_PROBLEMS, DataError, first_problems, written_whole
from data.labels import (
    BLANK_RULES,
    LABEL_MAPS,
    LABELS,
    NO_LABEL_RULES,
    UNCERTAIN_RULES,
    LabelPolicy,
)
from data.mimic import LABEL_SOURCES, labeler_answers, load_mimic
from data.nih import load_nih
from data.same_pictures import equal_files, same_pictures
from data.sources import FRONTALS, VIEWS, Report, uncertain_rules

HOSPITALS = ("mimic", "chexpert", "nih")
TRAINING_SETS = ("sft", "rl", "validation")
SAMPLINGS = ("natural", "balanced")
LABELER_FILE = "labeler-mimic.jsonl"
# the hospital's own validation part, where it has one
_VALIDATION_PARTS = {"mimic": "validate", "chexpert": "valid"}


# ---- command line --------------------------------------------------------------------------------
class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        raise DataError([message])


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags of the command."""
    parser = _Parser(
        prog="python -m data.select",
        description="Draw the training and test sets from downloaded hospitals' data.",
    )

    def group(title: str) -> Callable[..., None]:
        add = parser.add_argument_group(title).add_argument

        def flag(name: str, *, help: str, default: Any = None, **options: Any) -> None:
            shown = help if default is None else f"{help} [default: {default}]"
            add(name, default=default, help=shown, **options)

        return flag

    flag = group("folders")
    flag(
        "--mimic",
        metavar="FOLDER",
        help="MIMIC-CXR-JPG: the release's folder or the one that holds it",
    )
    flag(
        "--chexpert",
        metavar="FOLDER",
        help="CheXpert: the release's folder, or the one that holds it or the batch folders",
    )
    flag(
        "--nih",
        metavar="FOLDER",
        help="NIH ChestX-ray14: the folder of Data_Entry_2017*.csv, the lists and the images",
    )
    flag(
        "--output_dir",
        metavar="FOLDER",
        required=True,
        help="where the JSONL files go; nothing is overwritten",
    )
    flag(
        "--image_root",
        metavar="FOLDER",
        help=(
            "folder that image paths are relative to, above all images [default: output_dir where"
            " all images lie under it, else the nearest folder above all of them; the run scripts"
            " then need --image_root]"
        ),
    )
    flag = group("sets")
    flag(
        "--train_on",
        choices=HOSPITALS,
        help=(
            "hospital of the three training sets [default: the first of mimic, chexpert, nih given]"
        ),
    )
    flag(
        "--sft_size",
        type=plain_integer,
        default=2000,
        metavar="N",
        help="images of sft.jsonl; 0: no such file; the paper's number",
    )
    flag(
        "--rl_size",
        type=plain_integer,
        default=1000,
        metavar="N",
        help="images of rl.jsonl; 0: no such file; the paper's number",
    )
    flag(
        "--validation_size",
        type=plain_integer,
        default=500,
        metavar="N",
        help=(
            "images of validation.jsonl; 0: no such file; not "
            "published, but the paper's failure rates are multiples of 1/500"
        ),
    )
    flag(
        "--validation_from",
        choices=("train", "valid"),
        help=(
            "draw validation.jsonl from the hospital's training part or from its own validation"
            " part [default: valid for MIMIC, whose part is large enough, else train]"
        ),
    )
    flag(
        "--tests",
        nargs="+",
        choices=(*HOSPITALS, "none"),
        metavar="HOSPITAL",
        help="hospitals to write test-<hospital>.jsonl of, or none [default: every one given]",
    )
    flag(
        "--test_level",
        choices=("study", "image"),
        default="study",
        help=(
            "test sets of MIMIC and CheXpert: one image a "
            "study (CheXpert: groundtruth.csv), or every image (CheXpert: test_labels.csv)"
        ),
    )
    flag(
        "--max_samples",
        type=plain_integer,
        metavar="N",
        help="images a test set at most, drawn with --seed [default: all]",
    )
    flag("--seed", type=plain_integer, default=0, help="of every draw")
    flag(
        "--sampling",
        choices=SAMPLINGS,
        default="natural",
        help=(
            "of the training sets: natural draws images as they come, "
            "balanced draws from the label that has fewest so far"
        ),
    )
    flag(
        "--test_sampling",
        choices=SAMPLINGS,
        default="natural",
        help="the same for test sets cut by --max_samples",
    )
    flag = group("labels")
    flag(
        "--uncertain",
        nargs="+",
        metavar="RULE",
        help=(
            f"what -1 becomes: {', '.join(UNCERTAIN_RULES)} (unknown for this image), "
            "and exceptions, as in: zeros Edema=ones 'Pleural Effusion=ones' [default: zeros]"
        ),
    )
    flag(
        "--blank",
        choices=BLANK_RULES,
        default="zeros",
        help="what a label that is not mentioned becomes",
    )
    flag(
        "--no_label",
        choices=NO_LABEL_RULES,
        help=(
            "an image without any label is called No Finding, keeps its empty set, or "
            "is left out [default: no_finding; NIH: empty, because it names No Finding itself]"
        ),
    )
    flag(
        "--label_map",
        choices=LABEL_MAPS,
        default="nih_nine",
        help="NIH: the nine categories of the paper, or ten with Pleural Effusion",
    )
    flag(
        "--mimic_labels",
        choices=LABEL_SOURCES[:2],
        default="chexpert",
        help="MIMIC: labeler of the training sets",
    )
    flag(
        "--mimic_test_labels",
        choices=LABEL_SOURCES,
        default="chexpert",
        help=(
            "MIMIC: labels of the test set; radiologist: "
            "of the reports that one read (release 2.1.0), and labeler-mimic.jsonl with what the"
            " labeler says of them"
        ),
    )
    flag(
        "--chexpert_labels",
        metavar="FILE.csv",
        help="CheXpert: another label file of the training part [default: train.csv]",
    )
    flag = group("images")
    flag(
        "--views",
        choices=VIEWS,
        default="frontal",
        help="frontal: MIMIC's AP and PA, CheXpert's Frontal; NIH has no others",
    )
    flag(
        "--frontals",
        choices=FRONTALS,
        default="pa_first",
        help=(
            "which of several images of a study: PA before AP and then the first, the first, or all"
        ),
    )
    flag(
        "--missing_images",
        choices=("fail", "drop"),
        default="fail",
        help=(
            "fail: a drawn image that is not there is an "
            "error; drop: draw from the images that are there"
        ),
    )
    return parser


def settings_of(argv: Sequence[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises DataError with every problem of their values."""
    flags = build_parser().parse_args(argv)
    given = [name for name in HOSPITALS if getattr(flags, name) is not None]
    problems = (
        []
        if given
        else ["no data: give --mimic FOLDER, --chexpert FOLDER or --nih FOLDER, or several of them"]
    )
    flags.train_on = flags.train_on or (given[0] if given else None)
    if flags.train_on not in (None, *given):
        problems.append(
            f"--train_on {flags.train_on}: give its folder too, --{flags.train_on} FOLDER"
        )
    for name in ("sft_size", "rl_size", "validation_size"):
        if getattr(flags, name) < 0:
            problems.append(f"--{name} {getattr(flags, name)}: must be 0 or more")
    if flags.max_samples is not None and flags.max_samples < 1:
        problems.append(f"--max_samples {flags.max_samples}: must be at least 1")
    if not 0 <= flags.seed <= LARGEST_SEED:
        problems.append(f"--seed {flags.seed}: must be from 0 to {LARGEST_SEED}")
    flags.tests = (
        given if flags.tests is None else [name for name in HOSPITALS if name in flags.tests]
    )
    problems += [
        f"--tests {name}: give its folder too, --{name} FOLDER"
        for name in flags.tests
        if name not in given
    ]
    if flags.validation_from is None:
        flags.validation_from = "valid" if flags.train_on == "mimic" else "train"
    elif flags.validation_from == "valid" and flags.train_on not in (None, *_VALIDATION_PARTS):
        problems.append(
            f"--validation_from valid: {flags.train_on} has no validation part of its own; use"
            " train"
        )
    flags.uncertain, flags.uncertain_by_label = uncertain_rules(
        flags.uncertain or ["zeros"], problems
    )
    if not flags.tests and not any(getattr(flags, f"{name}_size") for name in TRAINING_SETS):
        problems.append("nothing to write: all sizes are 0 and there is no test set")
    if problems:
        raise DataError(problems)
    return flags


# ---- load ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pool:
    """Hold all examples that a set may be drawn from, and how they came to be."""

    examples: list[Example]
    report: Report


def _policy(flags: argparse.Namespace) -> LabelPolicy:
    return LabelPolicy(
        flags.uncertain, flags.uncertain_by_label, flags.blank, flags.no_label or "no_finding"
    )


def _asks_labeler(flags: argparse.Namespace) -> bool:
    """Tell whether the labeler's own answers go beside the radiologist's labels."""
    return "mimic" in flags.tests and flags.mimic_test_labels == "radiologist"


def _loader(
    flags: argparse.Namespace, hospital: str, part: str
) -> Callable[[Report], list[Example]]:
    """Choose how the pool of a hospital's part ("train", "valid" or "test") is loaded."""
    folder, drop_missing = getattr(flags, hospital), flags.missing_images == "drop"
    if hospital == "nih":
        return lambda report: load_nih(
            folder,
            part,
            evaluated=LABEL_MAPS[flags.label_map],
            no_label=flags.no_label or "empty",
            drop_missing=drop_missing,
            report=report,
        )
    frontals = flags.frontals
    if part == "test":
        frontals = (
            "all" if flags.test_level == "image" else "pa_first" if frontals == "all" else frontals
        )
    options: dict[str, Any] = {
        "policy": _policy(flags),
        "views": flags.views,
        "frontals": frontals,
        "drop_missing": drop_missing,
    }
    if hospital == "chexpert":
        label_file = flags.chexpert_labels if part == "train" else None
        return lambda report: load_chexpert(
            folder, part, label_file=label_file, report=report, **options
        )
    labels = flags.mimic_test_labels if part == "test" else flags.mimic_labels
    part = _VALIDATION_PARTS["mimic"] if part == "valid" else part
    return lambda report: load_mimic(folder, part, labels=labels, report=report, **options)


def load_pools(flags: argparse.Namespace) -> dict[tuple[str, str], Pool]:
    """Load every part that a set is drawn from -> {(hospital, part): pool}.

    Raises DataError with the problems of all parts.
    """
    sizes = {name: getattr(flags, f"{name}_size") for name in TRAINING_SETS}
    parts = {
        (flags.train_on, flags.validation_from if name == "validation" else "train"): None
        for name in TRAINING_SETS
        if sizes[name]
    }
    parts |= {(hospital, "test"): None for hospital in flags.tests}
    pools, problems = {}, []
    for hospital, part in parts:
        report = Report()
        try:
            pools[hospital, part] = Pool(_loader(flags, hospital, part)(report), report)
        except DataError as error:
            problems += error.problems
    if problems:
        # two parts of one folder may have the same problem
        raise DataError(dict.fromkeys(problems))
    return pools


# ---- draw ----------------------------------------------------------------------------------------
def deal_patients(
    examples: Sequence[Example], sizes: Mapping[str, int], rng: random.Random
) -> dict[str, list[Example]]:
    """Deal patients out among the sets -> {set: the examples of its patients}.

    Patients come in random order, each to the set that has the smallest part of what it needs, so
    that the pools are in proportion to the sizes.
    """
    by_patient: dict[str, list[Example]] = {}
    # the draw does not depend on the order of the label file
    for example in sorted(examples, key=lambda example: example.id):
        by_patient.setdefault(example.patient_id, []).append(example)
    patients = list(by_patient)
    rng.shuffle(patients)
    pools: dict[str, list[Example]] = {name: [] for name in sizes}
    for patient in patients:
        neediest = min(sizes, key=lambda name: len(pools[name]) / sizes[name])
        pools[neediest] += by_patient[patient]
    return pools


def draw(
    examples: Sequence[Example], count: int, sampling: str, rng: random.Random
) -> list[Example]:
    """Draw `count` of the examples, or all where there are fewer, in random order.

    sampling: natural, or balanced: each from the label that has fewest images so far and has any
    left. Images without a label count as one more label.

    The first n of them are a draw of n, too.
    """
    remaining = list(examples)
    rng.shuffle(remaining)
    if sampling == "natural":
        return remaining[:count]
    names = (*LABELS, None)
    queues = {
        name: [e for e in reversed(remaining) if (name in e.labels if name else not e.labels)]
        for name in names
    }
    drawn: dict[str, Example] = {}
    counts: Counter[str | None] = Counter()
    while len(drawn) < min(count, len(remaining)):
        for queue in queues.values():
            while queue and queue[-1].id in drawn:
                queue.pop()
        # of equal ones, CheXpert's order
        name = min((name for name in names if queues[name]), key=lambda name: counts[name])
        example = queues[name].pop()
        drawn[example.id] = example
        counts.update(example.labels or (None,))
    return list(drawn.values())


def draw_sets(
    flags: argparse.Namespace, pools: Mapping[tuple[str, str], Pool]
) -> dict[str, tuple[list[Example], Pool]]:
    """Draw all sets -> {file name without .jsonl: (its examples, the pool they come from)}.

    Raises DataError where patients do not suffice, and where a patient is in two sets.
    """
    sets: dict[str, tuple[list[Example], Pool]] = {}
    problems: list[str] = []
    for part in ("train", "valid"):
        sizes = {
            name: size
            for name in TRAINING_SETS
            if (size := getattr(flags, f"{name}_size"))
            and part == (flags.validation_from if name == "validation" else "train")
        }
        if not sizes:
            continue
        pool = pools[flags.train_on, part]
        dealt = deal_patients(pool.examples, sizes, random.Random(f"{flags.seed} patients {part}"))
        problems += _too_few(pool, dealt, sizes)
        for name, size in sizes.items():
            sets[name] = (
                draw(dealt[name], size, flags.sampling, random.Random(f"{flags.seed} {name}")),
                pool,
            )
    for hospital in flags.tests:
        pool, name = pools[hospital, "test"], f"test-{hospital}"
        if not pool.examples:
            problems.append(
                f"{name}.jsonl: {pool.report.source} has no image left; {_dropped(pool.report)}"
            )
        count = flags.max_samples or len(pool.examples)
        sets[name] = (
            draw(pool.examples, count, flags.test_sampling, random.Random(f"{flags.seed} {name}")),
            pool,
        )
    if problems:
        raise DataError(problems)
    check_disjoint({name: examples for name, (examples, _) in sets.items()})
    return sets


def _too_few(
    pool: Pool, dealt: Mapping[str, Sequence[Example]], sizes: Mapping[str, int]
) -> list[str]:
    if all(len(dealt[name]) >= size for name, size in sizes.items()):
        return []
    wanted = ", ".join(f"--{name}_size {size}" for name, size in sizes.items())
    shares = ", ".join(f"{name} {len(dealt[name])} of {size}" for name, size in sizes.items())
    patients = len({example.patient_id for example in pool.examples})
    return [
        f"{wanted}: too few patients; {pool.report.source} has {len(pool.examples)} images of"
        f" {patients} patients, dealt out so that no patient is in two sets: {shares}"
        f" ({_dropped(pool.report)}); ask for less"
    ]


def _dropped(report: Report) -> str:
    reasons = [f"{count} {reason}" for reason, count in report.dropped.most_common()]
    return f"listed {report.rows}, dropped: {', '.join(reasons) or 'none'}"


def check_disjoint(sets: Mapping[str, Sequence[Example]]) -> None:
    """Check that no patient is in two sets. Raises DataError naming each two that share one."""
    patients = {
        name: {example.patient_id for example in examples} for name, examples in sets.items()
    }
    names, problems = list(patients), []
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            shared = sorted(patients[first] & patients[second])
            if shared:
                problems.append(
                    f"{first} and {second} share {len(shared)} patients, such as {shared[0]}: the"
                    " hospital's own parts overlap; check its split file or lists"
                )
    if problems:
        raise DataError(problems)


# ---- write ---------------------------------------------------------------------------------------
def common_root(flags: argparse.Namespace, output_dir: Path) -> Path:
    """Choose the folder that image paths are relative to.

    Raises DataError where --image_root is not above the hospitals' folders.
    """
    folders = [
        Path(getattr(flags, name)).resolve()
        for name in HOSPITALS
        if getattr(flags, name) is not None
    ]
    if flags.image_root is None:
        inside = all(folder.is_relative_to(output_dir.resolve()) for folder in folders)
        return output_dir.resolve() if inside else Path(os.path.commonpath(folders))
    root = Path(flags.image_root).resolve()
    outside = [folder for folder in folders if not folder.is_relative_to(root)]
    if outside:
        raise DataError(
            [
                f"--image_root {flags.image_root}: {folder} does not lie under it"
                for folder in outside
            ]
        )
    return root


def rebased(example: Example, root: Path) -> Example:
    """Make the path of an example's image relative to `root`."""
    image = (example.image_root.resolve() / example.image).relative_to(root).as_posix()
    return replace(example, image=image, image_root=root)


def check_present(sets: Mapping[str, Sequence[Example]]) -> None:
    """Check that every image that was drawn is there. Raises DataError where one is not."""
    missing = [
        f"{name}: {path}: no such image"
        for name, examples in sets.items()
        for example in examples
        if not (path := example.image_root / example.image).is_file()
    ]
    if missing:
        drawn = sum(map(len, sets.values()))
        advice = (
            f"{len(missing)} of the {drawn} images drawn are missing; download them, or draw from"
            " those that are there: --missing_images drop"
        )
        raise DataError([*missing[:MAX_PROBLEMS], advice])


def balance(examples: Sequence[Example]) -> dict[str, int]:
    """Count the images that have each label, in CheXpert's order."""
    counts = Counter(label for example in examples for label in example.target.labels)
    return {label: counts[label] for label in LABELS}


def write_all(output_dir: Path, contents: Mapping[Path, str]) -> None:
    """Write every file under a temporary name, then give all of them their names.

    After an error nothing is left behind.

    Raises DataError where the folder cannot be written to.
    """
    all_written = False
    try:
        with ExitStack() as renames:  # at its end
            for path, content in contents.items():
                temporary = renames.enter_context(written_whole(path))
                temporary.write_text(content, encoding="utf-8")
            all_written = True
    except OSError as error:
        if all_written:  # one could not be renamed: take the others back
            for path in contents:
                path.unlink(missing_ok=True)
        where = error.filename2 or error.filename
        raise DataError(
            [f"--output_dir {output_dir}: cannot be written to ({error.strerror}: {where})"]
        ) from error


# ---- all together --------------------------------------------------------------------------------
def run(argv: Sequence[str]) -> None:
    """Load, draw, write and report the sets that the flags ask for."""
    flags = settings_of(argv)
    output_dir = Path(flags.output_dir)
    names = [name for name in TRAINING_SETS if getattr(flags, f"{name}_size")] + [
        f"test-{hospital}" for hospital in flags.tests
    ]
    files = {name: output_dir / f"{name}.jsonl" for name in names}
    labeler_file = output_dir / LABELER_FILE if _asks_labeler(flags) else None
    existing = [
        path for file in files.values() for path in (file, selection_file(file)) if path.exists()
    ]
    if labeler_file and labeler_file.exists():
        existing.append(labeler_file)
    if existing:
        raise DataError(
            [
                f"{path} exists and nothing is overwritten; give another --output_dir"
                for path in existing
            ]
        )
    pools = load_pools(flags)
    for pool in pools.values():
        print(pool.report.text() + "\n")
    root = common_root(flags, output_dir)
    drawn = draw_sets(flags, pools)
    sets = {
        name: [rebased(example, root) for example in examples]
        for name, (examples, _) in drawn.items()
    }
    check_present(sets)
    same = [*chain(*same_pictures(equal_files(sets)))]
    contents = {}
    for name, file in files.items():
        contents[file] = "".join(
            json.dumps(row_of(example), ensure_ascii=False) + "\n" for example in sets[name]
        )
        record = _record(flags, name, sets[name], drawn[name][1], contents[file])
        record["same_pictures"] = same
        contents[selection_file(file)] = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    if labeler_file:
        answers = labeler_answers(
            flags.mimic, sets["test-mimic"], flags.mimic_labels, _policy(flags)
        )
        contents[labeler_file] = "".join(json.dumps(row) + "\n" for row in answers)
    write_all(output_dir, contents)
    for group in (TRAINING_SETS, [f"test-{hospital}" for hospital in HOSPITALS]):
        if chosen := {name: drawn[name] for name in group if name in drawn}:
            print(balance_table(chosen) + "\n")
    print(
        f"written to {output_dir}: {', '.join(file.name for file in files.values())}, each with its"
        " .select.json; no patient is in two of them"
    )
    for line in first_problems(same, "and {} more, which .select.json has"):
        print(f"note: {line}")
    if labeler_file:
        command = ["python", "-m", "eval.evaluate", "--predictions", f"labeler={labeler_file}"]
        command += ["--data_file", f"radiologist={files['test-mimic']}"]
        print(
            f"{labeler_file.name}: what the labeler {flags.mimic_labels} says of test-mimic.jsonl;"
            f" score it: {shlex.join(command)}"
        )
    if root != output_dir.resolve():
        print(
            f"image paths are relative to {root}: give the other commands --image_root"
            f" {shlex.quote(str(root))}"
        )


def _record(
    flags: argparse.Namespace, name: str, examples: Sequence[Example], pool: Pool, content: str
) -> dict:
    """Collect what NAME.select.json says of a set."""
    return {
        "set": name,
        "images": len(examples),
        "patients": len({example.patient_id for example in examples}),
        "labels": balance(examples),
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "settings": vars(flags),
        "pool": pool.report.record(),
    }


def balance_table(sets: Mapping[str, tuple[Sequence[Example], Pool]]) -> str:
    """Tabulate the positives of every set by label, with their share in the set and in its pool.

    A label that a set cannot express has no figures there, and without one in any set no row.
    """
    titles = [f"{name} ({len(examples):,})" for name, (examples, _) in sets.items()]
    lines = [
        f"{'images with the label':<28}" + "".join(f"{title:>26}" for title in titles),
        f"{'n, share (in the pool)':<28}",
    ]
    counts = [
        (
            balance(examples),
            len(examples),
            balance(pool.examples),
            len(pool.examples),
            {label for e in (*examples, *pool.examples) for label in e.evaluated_labels},
        )
        for examples, pool in sets.values()
    ]
    for label in LABELS:
        cells = [
            f"{drawn[label]:,} {drawn[label] / n:6.1%} ({natural[label] / of:6.1%})"
            if label in evaluated
            else ""
            for drawn, n, natural, of, evaluated in counts
        ]
        if any(cells):
            lines.append(f"{label:<28}{''.join(f'{cell:>26}' for cell in cells)}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 0 done, 2 usage or data."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except DataError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
