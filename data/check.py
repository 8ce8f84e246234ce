"""Check data files before a long run: every row, every image, and the answers if there are any.

    python -m data.check train.jsonl validation.jsonl [--image_root FOLDER]

All problems are printed, one line each, and notes on what may be meant. The exit code is 0 where
nothing is wrong, 1 where something is, and 2 where the command cannot be carried out.

One picture under two ids is found by its pixels, in one file and across the files of the command,
whatever the names, formats and metadata of its files. The same id in two files is a problem where
they disagree on the patient or on the labels, else a note: only you know which files are apart.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.answers import ANSWER_FORMATS, blocks_of, parse_answer
from data.command_line import Parser, exit_code
from data.console import print_errors
from data.examples import Example, data_file, scan_jsonl
from data.files import DataError
from data.images import all_image_facts
from data.label_sets import add_label_flag, labels_named
from data.labels import CHEXPERT, LabelSet
from data.predictions import DEFAULT_FORMAT
from data.same_pictures import same_pictures

# What the chat templates of the model families write around turns and images. In an answer it would
# end the turn or stand for an image, so SFT refuses it.
CONTROL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<bos>",
    "<eos>",
    "<pad>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)


@dataclass
class Checked:
    """Hold what was found in one data file.

    name: as the command names the file.
    examples: its sound rows.
    problems, notes: one line each. A note is no reason to refuse the file.
    pictures: digest of each sound example's pixels, by the example's id.
    """

    name: str
    examples: list[Example] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)


def check_file(
    spec: str,
    image_root: str | None = None,
    answer_format: str = DEFAULT_FORMAT,
    label_set: LabelSet = CHEXPERT,
) -> Checked:
    """Read all of a data file: its rows, labels, answers and images.

    spec: a JSONL file or demo:SPLIT.
    image_root: folder that image paths are relative to, or None for the data file's own.
    answer_format: form of the answers. label_set: the labels that rows may hold.

    Raises DataError for a missing file, and for one that is no JSONL.
    """
    path = data_file(spec, label_set)
    examples, problems = scan_jsonl(path, image_root, label_set)
    checked = Checked(str(path), examples, problems)
    checked.problems += [
        f"{path}, {problem}"
        for example in examples
        for problem in _row_problems(example, answer_format)
    ]
    facts = all_image_facts(examples, f"{path.name} (images)")
    checked.problems += [f"{path}, {fact.problem}" for fact in facts if fact.problem]
    checked.pictures = {
        example.id: fact.digest
        for example, fact in zip(examples, facts, strict=True)
        if not fact.problem
    }
    without = [example.id for example in examples if example.answer is None]
    if 0 < len(without) < len(examples):
        checked.notes.append(
            f"{len(without)} of {len(examples)} rows have no answer, such as {without[0]!r};"
            " run_sft.py learns from such a file only with --prompt only_label"
        )
    clipped = {
        example.id: fact.clipped
        for example, fact in zip(examples, facts, strict=True)
        if fact.clipped is not None
    }
    if clipped:
        most = max(clipped, key=lambda name: clipped[name])
        checked.notes.append(
            f"images of 16 bits: {len(clipped)}; of their pixels"
            f" {sum(clipped.values()) / len(clipped):.3%} lie beyond the range that becomes 8 bits,"
            f" at most {clipped[most]:.3%} ({most!r})"
        )
    flat = [example.id for example, fact in zip(examples, facts, strict=True) if fact.flat]
    if flat:
        checked.notes.append(
            f"images of nearly one grey value all over: {len(flat)}, such as {flat[0]!r}; look at"
            " how they were made"
        )
    return checked


def _row_problems(example: Example, answer_format: str) -> list[str]:
    problems = []
    if not example.evaluated_labels:
        problems.append(
            f"example {example.id!r}: evaluated_labels is empty, so nothing can be rewarded or"
            " scored; leave the row out"
        )
    if example.answer is not None:
        control = next((token for token in CONTROL_TOKENS if token in example.answer), None)
        if control:
            problems.append(
                f"example {example.id!r}: the answer holds {control!r}, a control token of chat"
                " templates, which run_sft.py refuses; remove it"
            )
        if wrong := _wrong_answer(example, example.answer, answer_format):
            problems.append(
                f"example {example.id!r}: the answer is not its labels in the form {answer_format}"
                f" ({wrong}); {_remedy(example.answer, answer_format)}"
            )
    return problems


def _wrong_answer(example: Example, text: str, answer_format: str) -> str | None:
    answer = parse_answer(text, answer_format, example.label_set)
    if not answer.valid:
        return answer.problem
    if answer.unknown or answer.duplicates or set(answer.labels) != example.target.labels:
        return f"says {', '.join((*answer.labels, *answer.unknown)) or 'no label'}"
    return None


def _remedy(text: str, answer_format: str) -> str:
    """Name the form that the answer has, among those that tags tell apart."""
    fits = [
        name
        for name in ANSWER_FORMATS
        if blocks_of(name) and name != answer_format and parse_answer(text, name).valid
    ]
    if fits:
        return f"it has the form {fits[0]}: give --answer_format {fits[0]}, here and to run_sft.py"
    return "write it again with data.traces"


# ---- what is shown -------------------------------------------------------------------------------
def summary(spec: str, examples: Sequence[Example]) -> str:
    """Count the sound rows of a file, their patients, answers and labels, in one line."""
    counts = Counter(label for example in examples for label in example.target.labels)
    without = sum(not example.target.labels for example in examples)
    label_set = examples[0].label_set if examples else CHEXPERT
    contradictory = sum(bool(label_set.contradictions(example.labels)) for example in examples)
    return (
        f"{spec}: {len(examples)} examples of {len({example.patient_id for example in examples})}"
        f" patients, {sum(example.answer is not None for example in examples)} with an answer;"
        " labels: "
        + ", ".join(f"{label} {counts[label]}" for label in label_set.ordered(counts))
        + (f", none {without}" if without else "")
        + (f"; {label_set.exclusive} beside a finding {contradictory}" if contradictory else "")
        + _who_line(examples)
    )


def _who_line(examples: Sequence[Example]) -> str:
    """Count sexes and views and give the range of ages, as far as the rows know them."""
    counts = {
        name: Counter(value for example in examples if (value := getattr(example, name)))
        for name in ("sex", "view")
    }
    shown = [
        f"{name} " + ", ".join(f"{value} {count}" for value, count in sorted(found.items()))
        for name, found in counts.items()
        if found
    ]
    ages = [example.age for example in examples if example.age is not None]
    shown += [f"age {min(ages)} to {max(ages)} ({len(ages)} known)"] if ages else []
    return "".join(f"; {part}" for part in shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser(
        prog="python -m data.check", description="Check every row and every image of data files."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSONL data files, or demo:SPLIT")
    parser.add_argument(
        "--image_root",
        help="folder that image paths are relative to (default: each data file's own folder)",
    )
    parser.add_argument(
        "--answer_format",
        choices=ANSWER_FORMATS,
        default=DEFAULT_FORMAT,
        help=f"form of the answers, as run_sft.py's --answer_format (default: {DEFAULT_FORMAT})",
    )
    add_label_flag(parser)
    arguments = parser.parse_args(argv)
    files: list[Checked] = []
    try:
        label_set = labels_named(arguments.label_file)
    except DataError as error:
        print_errors(error.problems)
        return 2
    for spec in arguments.files:
        try:
            checked = check_file(spec, arguments.image_root, arguments.answer_format, label_set)
        except DataError as error:
            print_errors(error.problems)
            continue
        files.append(checked)
        notes = [f"note: {checked.name}: {note}" for note in checked.notes]
        print("\n".join([summary(spec, checked.examples), *checked.problems, *notes]))
    problems, notes = same_pictures(
        (checked.name, example, checked.pictures[example.id])
        for checked in files
        for example in checked.examples
        if example.id in checked.pictures
    )
    for line in [*problems, *(f"note: {note}" for note in notes)]:
        print(line)
    found = len(problems) + sum(len(checked.problems) for checked in files)
    if unread := len(arguments.files) - len(files):
        print(f"not checked: {unread} of {len(arguments.files)} files", file=sys.stderr)
    if found or not unread:
        several = "s" if found > 1 else ""
        print(f"{found} problem{several} found" if found else "no problem found")
    return 2 if unread else 1 if found else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
