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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from data.chexpert import load_chexpert
from data.command_line import exit_code
from data.console import print_errors
from data.draw import balance, check_disjoint, deal_patients, draw
from data.examples import Example, row_of, selection_file
from data.files import MAX_PROBLEMS, DataError, first_problems, written_whole
from data.labels import LABEL_MAPS, LABELS, LabelPolicy
from data.mimic import labeler_answers, load_mimic
from data.nih import load_nih
from data.same_pictures import equal_files, same_pictures
from data.select_flags import HOSPITALS, TRAINING_SETS, VALIDATION_PARTS, settings_of
from data.sources import Report

LABELER_FILE = "labeler-mimic.jsonl"


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
    part = VALIDATION_PARTS["mimic"] if part == "valid" else part
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
    _check_new([*files.values(), *map(selection_file, files.values()), labeler_file])
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
    _print_end(flags, files, labeler_file, same, root)


def _check_new(paths: Sequence[Path | None]) -> None:
    """Check that no file is there that would be written. Raises DataError naming all that are."""
    existing = [path for path in paths if path and path.exists()]
    if existing:
        raise DataError(
            f"{path} exists and nothing is overwritten; give another --output_dir"
            for path in existing
        )


def _print_end(
    flags: argparse.Namespace,
    files: Mapping[str, Path],
    labeler_file: Path | None,
    same: Sequence[str],
    root: Path,
) -> None:
    """Say what was written and how the other commands take it."""
    output_dir = Path(flags.output_dir)
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
        print_errors(error.problems)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
