"""Draw the demo's data sets: which seeds belong to which split, and their files.

    python -m data.demo.splits FOLDER

draws every split that the run scripts use. Each split owns a block of seeds of its own, so no
picture can be in two splits, and none of them can be among the pictures from which the base
checkpoint learned.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.command_line import Parser, exit_code
from data.demo.radiographs import GENERATOR_VERSION, Radiograph, draw
from data.demo.sites import SiteName
from data.demo.teacher import reasoning_trace
from data.files import write_jsonl

_SEEDS_PER_SPLIT = 1_000_000
_FIRST_SEED = 101_000_000  # pictures of generator version 1 had smaller seeds


@dataclass(frozen=True)
class Split:
    """Describe one data set of the demo."""

    site: SiteName
    count: int  # images drawn unless told otherwise
    answers: bool = False  # with the teacher's traces


# The position in this table fixes a split's seeds: add at the end, never reorder.
SPLITS: dict[str, Split] = {
    "base-train": Split("general", 10_000),
    "base-validation": Split("general", 300),
    "sft-train": Split("a", 1000, answers=True),
    "rl-train": Split("a", 800),
    "rl-train-b": Split("b", 400),
    "validation-a": Split("a", 150, answers=True),
    "validation-a2": Split("a2", 150),
    "validation-b": Split("b", 150),
    "test-a": Split("a", 300),
    "test-a2": Split("a2", 300),
    "test-b": Split("b", 300),
    "study-validation-a": Split("a", 400),
    "study-validation-a2": Split("a2", 400),
    "study-validation-b": Split("b", 400),
    "study-a": Split("a", 600),
    "study-a2": Split("a2", 600),
    "study-b": Split("b", 600),
}
WRITTEN_SPLITS: tuple[str, ...] = tuple(name for name in SPLITS if not name.startswith("base-"))


def seeds(name: str, count: int | None = None) -> range:
    """Return the first `count` seeds of the block that belongs to split `name`.

    count: None for the split's own.

    Raises ValueError for an unknown split or a count that does not fit the block.
    """
    if name not in SPLITS:
        raise ValueError(f"no such split: {name!r}; known: {', '.join(SPLITS)}")
    count = SPLITS[name].count if count is None else count
    if not 0 < count <= _SEEDS_PER_SPLIT:
        raise ValueError(
            f"split {name}: the count must be between 1 and {_SEEDS_PER_SPLIT}, not {count}"
        )
    first = _FIRST_SEED + list(SPLITS).index(name) * _SEEDS_PER_SPLIT
    return range(first, first + count)


def draw_split(name: str, count: int | None = None) -> list[Radiograph]:
    """Draw the pictures of a split, in memory."""
    return [draw(seed, SPLITS[name].site) for seed in seeds(name, count)]


def write_split(name: str, count: int | None, folder: Path) -> Path:
    """Draw a split into `<folder>/<name>/<id>.png` and `<folder>/<name>.jsonl` -> the JSONL file.

    count: None for the split's own.

    A JSONL file of the same count and generator version whose images exist is reused as it stands.
    It is written last and under a temporary name first, so a complete one always has its images.
    """
    split_seeds = seeds(name, count)
    folder = Path(folder)
    data_file = folder / f"{name}.jsonl"
    if _is_complete(data_file, len(split_seeds)):
        return data_file
    data_file.unlink(missing_ok=True)  # it may describe pictures that are about to be replaced
    (folder / name).mkdir(parents=True, exist_ok=True)
    return write_jsonl(data_file, _draw_rows(name, split_seeds, folder))


def _draw_rows(name: str, split_seeds: range, folder: Path) -> Iterator[dict]:
    """Draw the pictures of a split one by one into its folder, and give the row of each."""
    for number, seed in enumerate(split_seeds):
        radiograph = draw(seed, SPLITS[name].site)
        row = _row(name, f"{name}-{number:05d}", radiograph)
        Image.fromarray(radiograph.image).save(folder / row["image"])
        yield row


def _row(name: str, example_id: str, radiograph: Radiograph) -> dict:
    row = {
        "id": example_id,
        # every picture is another patient
        "patient_id": f"demo-{radiograph.site}-{radiograph.seed}",
        "image": f"{name}/{example_id}.png",
        "labels": list(radiograph.labels),
        "dataset": f"demo-{radiograph.site}",
        "evaluated_labels": list(radiograph.evaluated_labels),
        "source_labels": list(radiograph.source_labels),
        "generator_version": GENERATOR_VERSION,
    }
    if SPLITS[name].answers:
        row["answer"] = reasoning_trace(radiograph, radiograph.seed)
    return row


def _is_complete(data_file: Path, count: int) -> bool:
    if not data_file.is_file():
        return False
    # of bytes, so that no U+2028 in a text ends a line
    rows = [json.loads(line) for line in data_file.read_bytes().splitlines()]
    return len(rows) == count and all(
        row["generator_version"] == GENERATOR_VERSION
        and (data_file.parent / row["image"]).is_file()
        for row in rows
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(
        prog="python -m data.demo.splits", description="Draw the demo's synthetic data sets."
    )
    parser.add_argument(
        "folder", type=Path, help="where the JSONL files and the folders of images go"
    )
    folder = parser.parse_args(arguments).folder
    for name in WRITTEN_SPLITS:
        data_file = write_split(name, None, folder)
        print(f"{data_file}  {SPLITS[name].count} images, site {SPLITS[name].site}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
