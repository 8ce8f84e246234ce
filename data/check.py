"""Check data files before a long run: every row, every image, and the answers if there are any.

    python -m data.check train.jsonl validation.jsonl [--image_root FOLDER]

All problems are printed, one line each. The exit code is 0 where nothing is wrong, 1 where
something is, and 2 where the command cannot be carried out.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from data.answers import parse_answer
from data.examples import Example, data_file, scan_jsonl
from data.files import DataError
from data.images import image_problems
from data.labels import LABELS, NO_FINDING, SUPPORT_DEVICES


def check_file(spec: str, image_root: str | None = None) -> tuple[list[Example], list[str]]:
    """Read all of a data file -> (its sound rows, problems of rows, labels, answers and images).

    spec: a JSONL file or demo:SPLIT.
    image_root: folder that image paths are relative to, or None for the data file's own.

    Raises DataError for a missing file.
    """
    path = data_file(spec)
    examples, problems = scan_jsonl(path, image_root)
    problems += [f"{path}, {problem}" for example in examples for problem in _row_problems(example)]
    problems += [
        f"{path}, {problem}"
        for problem in image_problems(examples, f"{path.name} (images)")
        if problem
    ]
    return examples, problems


def _row_problems(example: Example) -> list[str]:
    problems = []
    if not example.evaluated_labels:
        problems.append(
            f"example {example.id!r}: evaluated_labels is empty, so nothing can be rewarded or"
            " scored; leave the row out"
        )
    if example.answer is not None:
        answer = parse_answer(example.answer)
        wrong = answer.problem if not answer.valid else None
        if not wrong and (
            answer.unknown or answer.duplicates or set(answer.labels) != example.target.labels
        ):
            wrong = f"says {', '.join((*answer.labels, *answer.unknown)) or 'no label'}"
        if wrong:
            problems.append(
                f"example {example.id!r}: the answer is not its labels in the form think_solution"
                f" ({wrong}); write it again with data.traces"
            )
    return problems


def summary(spec: str, examples: Sequence[Example]) -> str:
    """Count the sound rows of a file, their patients, answers and labels, in one line."""
    counts = Counter(label for example in examples for label in example.target.labels)
    without = sum(not example.target.labels for example in examples)
    contradictory = sum(
        NO_FINDING in example.labels and bool({*example.labels} - {NO_FINDING, SUPPORT_DEVICES})
        for example in examples
    )
    return (
        f"{spec}: {len(examples)} examples of {len({example.patient_id for example in examples})}"
        f" patients, {sum(example.answer is not None for example in examples)} with an answer;"
        " labels: "
        + ", ".join(f"{label} {counts[label]}" for label in LABELS if counts[label])
        + (f", none {without}" if without else "")
        + (f"; {NO_FINDING} beside a finding {contradictory}" if contradictory else "")
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
    parser = argparse.ArgumentParser(
        prog="python -m data.check", description="Check every row and every image of data files."
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSONL data files, or demo:SPLIT")
    parser.add_argument(
        "--image_root",
        help="folder that image paths are relative to (default: each data file's own folder)",
    )
    arguments = parser.parse_args(argv)
    found, missing = 0, False
    for spec in arguments.files:
        try:
            examples, problems = check_file(spec, arguments.image_root)
        except DataError as error:
            print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
            missing = True
            continue
        found += len(problems)
        print("\n".join([summary(spec, examples), *problems]))
    print("no problem found" if not found else f"{found} problem{'s' if found > 1 else ''} found")
    return 2 if missing else 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
