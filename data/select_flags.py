"""Read the command line of data.select: which hospitals, which sets, which labels, which images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from data.command_line import LARGEST_SEED, Parser, plain_integer
from data.files import DataError
from data.labels import BLANK_RULES, LABEL_MAPS, NO_LABEL_RULES, UNCERTAIN_RULES
from data.mimic import LABEL_SOURCES
from data.sources import FRONTALS, VIEWS, uncertain_rules

HOSPITALS = ("mimic", "chexpert", "nih")
TRAINING_SETS = ("sft", "rl", "validation")
SAMPLINGS = ("natural", "balanced")
# the hospital's own validation part, where it has one
VALIDATION_PARTS = {"mimic": "validate", "chexpert": "valid"}

Flag = Callable[..., None]  # declares one flag: its name, `help`, `default` and argparse's options


class _Parser(Parser):
    def error(self, message: str) -> NoReturn:
        raise DataError([message])


def build_parser() -> argparse.ArgumentParser:
    """Declare the flags of the command, in groups."""
    parser = _Parser(
        prog="python -m data.select",
        description="Draw the training and test sets from downloaded hospitals' data.",
    )
    for title, declarations in _GROUPS.items():
        flag = _flag_of(parser.add_argument_group(title).add_argument)
        for declare in declarations:
            declare(flag)
    return parser


def _flag_of(add: Callable[..., Any]) -> Flag:
    """Make the function that declares a flag of a group and shows its default in its help."""

    def flag(name: str, *, help: str, default: Any = None, **options: Any) -> None:
        shown = help if default is None else f"{help} [default: {default}]"
        add(name, default=default, help=shown, **options)

    return flag


def _folders(flag: Flag) -> None:
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


def _training_sets(flag: Flag) -> None:
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


def _draws(flag: Flag) -> None:
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


def _label_rules(flag: Flag) -> None:
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


def _hospitals_labels(flag: Flag) -> None:
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


def _images(flag: Flag) -> None:
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


_GROUPS: dict[str, tuple[Callable[[Flag], None], ...]] = {
    "folders": (_folders,),
    "sets": (_training_sets, _draws),
    "labels": (_label_rules, _hospitals_labels),
    "images": (_images,),
}


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
    elif flags.validation_from == "valid" and flags.train_on not in (None, *VALIDATION_PARTS):
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
