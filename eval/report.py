"""What transferred: the paper's tables and figures, honest scores, and sample cases, from runs or
kept predictions.

    python -m eval.report base=runs/base sft=runs/sft grpo=runs/grpo --output_dir report
    python -m eval.report --output_dir paper                 # no run: the paper's own figures in
    its tables

Writes report.html, one page that needs no network, and report.md with its pictures beside it.
Models are given in the order of training. A folder is that of a run, or of `python -m
eval.evaluate`; which model it holds and which run trained it is read from the documents in it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.examples import Example, read_examples
from data.files import DataError, sha256_of
from engine.config import UsageError, parse_config, setting
from engine.runtime import main_guard, run_directory
from engine.settings import ENGINE
from eval.cases import sample_cases
from eval.contrasts import Comparison, Transfer, compare, nih_variants, pairs_of, transfers
from eval.figures import MISSING, available, draw_labels, training_pictures
from eval.folders import Entry, flag_first, load_entry, load_predictions, named_folders
from eval.page import (
    Bullets,
    Document,
    Picture,
    Section,
    Table,
    Text,
    picture_file,
    to_html,
    to_markdown,
)
from eval.paired import PERMUTATIONS, RESAMPLES
from eval.published import SOURCE
from eval.tables import (
    ARROW,
    diversity_table,
    marginals_table,
    movers_table,
    paper_tables,
    paradox_table,
    reading,
    scores_table,
    transfer_table,
)


@dataclass(frozen=True)
class ReportConfig:
    """Flags of `python -m eval.report`."""

    run: tuple[str, ...] = setting(
        (),
        "results to report, each FOLDER or NAME=FOLDER, in the order of training; may stand first"
        " without the flag",
    )
    output_dir: str | None = setting(
        None, "new folder for the report", unset="a new folder runs/<time>-report"
    )
    in_distribution: tuple[str, ...] = setting(
        (),
        "data sets with the training data's label scheme; without it, those that evaluate all 14"
        " labels",
    )
    train_file: str | None = setting(
        None,
        "training data whose label frequencies the baselines imitate",
        unset="each data set's own frequencies",
    )
    image_root: str | None = setting(
        None,
        "folder that image paths are relative to",
        unset="as in the evaluation, else the data file's folder",
    )
    cases: int = setting(
        24, "sample cases, with their images; 0 for none", unit="images", source=ENGINE
    )
    resamples: int = setting(
        RESAMPLES, "bootstrap resamples of the patients", unit="resamples", source=ENGINE
    )
    permutations: int = setting(
        PERMUTATIONS, "of the permutation test", unit="permutations", source=ENGINE
    )
    seed: int = setting(
        0,
        "of the intervals, the permutation test, the random baseline and the choice of cases",
        source=ENGINE,
    )


def config_problems(config: ReportConfig) -> list[str]:
    """What is wrong with the values of one command line, beyond their types."""
    problems = [
        f"--{name} {getattr(config, name)}: must be at least 1"
        for name in ("resamples", "permutations")
        if getattr(config, name) < 1
    ]
    return problems + (
        [f"--cases {config.cases}: must not be negative"] if config.cases < 0 else []
    )


# ---- gather --------------------------------------------------------------------------------------
def compare_sets(
    entries: Sequence[Entry], config: ReportConfig, reference: Sequence[Example] | None
) -> tuple[list[Comparison], dict[str, Comparison]]:
    """(the comparison on each data set that any model answered, {"nine", "ten": that on the first
    NIH set under each mapping}).
    """
    pairs = pairs_of(entries)
    options = {
        "reference": reference,
        "resamples": config.resamples,
        "permutations": config.permutations,
    }
    comparisons, nih = [], {}
    for place, data_set in enumerate(
        sorted({data_set for entry in entries for data_set in entry.sets})
    ):
        answers = {
            entry.name: load_predictions(entry.sets[data_set])
            for entry in entries
            if data_set in entry.sets
        }
        comparisons.append(compare(data_set, answers, pairs, seed=config.seed + place, **options))
        for name, (relabelled, labels) in ({} if nih else nih_variants(answers)).items():
            same = labels == comparisons[-1].labels and all(
                np.array_equal(relabelled[model].targets, answers[model].targets)
                for model in answers
            )
            nih[name] = (
                comparisons[-1]
                if same
                else compare(
                    data_set, relabelled, (), labels=labels, seed=config.seed + place, **options
                )
            )
    return comparisons, nih


def home_sets(comparisons: Sequence[Comparison], named: Sequence[str]) -> list[str]:
    """Names of the in-distribution sets: those named, else those that evaluate all 14 labels.
    Raises UsageError for a name that no model has answered.
    """
    known = [comparison.data_set for comparison in comparisons]
    missing = [name for name in named if name not in known]
    if missing:
        raise UsageError(
            f"--in_distribution {missing[0]}: no such data set; there are:"
            f" {', '.join(known) or 'none'}"
        )
    return list(named) or [comparison.data_set for comparison in comparisons if comparison.is_home]


# ---- sections ------------------------------------------------------------------------------------
def build(
    entries: Sequence[Entry], config: ReportConfig, reference: Sequence[Example] | None
) -> Document:
    """The whole report as data."""
    comparisons, nih = compare_sets(entries, config, reference)
    home = home_sets(comparisons, config.in_distribution)
    comparisons.sort(key=lambda comparison: comparison.data_set not in home)  # the home sets first
    pairs = [
        pair
        for pair in pairs_of(entries)
        if any(pair in comparison.p_values for comparison in comparisons)
    ]
    papers = Section(
        "The paper's tables",
        [
            Text(
                f"Figures of {SOURCE} beside ours. Bold: the best of each row, among the paper's"
                " models and among ours."
            ),
            *paper_tables(entries, comparisons, home, nih),
        ],
    )
    if not comparisons:
        return Document(
            "The paper's tables", f"Figures of {SOURCE}; no run of ours was given.", [papers]
        )
    found = transfers(comparisons, home, pairs)
    drawn: list[Picture] = (
        [*map(draw_labels, comparisons), *training_pictures(entries)] if available() else []
    )
    charts, curves = drawn[: len(comparisons)], drawn[len(comparisons) :]
    sections = (
        [
            Section(
                "What transferred",
                [
                    Bullets(headlines(found)),
                    paradox_table(found),
                    transfer_table(comparisons, home, pairs),
                ],
            )
        ]
        if pairs
        else []
    )
    sections.append(Section("Scores", [*map(scores_table, comparisons), *charts]))
    if pairs:
        sections.append(
            Section(
                "What moved, label by label",
                [
                    movers_table(comparison, *pair)
                    for pair in pairs
                    for comparison in comparisons
                    if pair in comparison.p_values
                ],
            )
        )
    sections.append(
        Section(
            "What is said, whatever the image",
            [*map(marginals_table, comparisons), diversity_table(comparisons)],
        )
    )
    sections.append(papers)
    if curves or not available():
        sections.append(Section("Training", curves or [Text(f"Without pictures: {MISSING}")]))
    if config.cases:
        sections.append(
            Section(
                "Sample cases",
                [
                    Text(
                        "Chosen by the last model's answers: failed, wrong and right by turns,"
                        " labels as varied as possible, so their shares say nothing. Right: exactly"
                        " the true labels among those that the data set evaluates. Reward parts are"
                        " those that run_grpo.py recorded."
                    ),
                    sample_cases(
                        entries,
                        comparisons,
                        config.cases,
                        seed=config.seed,
                        image_root=config.image_root,
                    ),
                ],
            )
        )
    sections.append(Section("Where the figures come from", [_provenance(entries)]))
    images = ", ".join(
        f"{comparison.data_set} {len(comparison.first.ids):,}" for comparison in comparisons
    )
    return Document(
        "What transferred",
        f"{', '.join(entry.name for entry in entries)} on {images} images. In distribution:"
        f" {', '.join(home) or 'none'}.",
        sections,
    )


def headlines(found: Sequence[Transfer]) -> list[str]:
    """One line a step: what moved where, with 95 % intervals, and how that reads."""
    lines = []
    for transfer in found:
        sides = [
            f"{where} {moved.after - moved.before:+.3f} ({moved.difference[0]:+.3f} to"
            f" {moved.difference[1]:+.3f})"
            for where, moved in (
                ("in distribution", transfer.home),
                ("across schemes", transfer.away),
            )
            if moved is not None
        ]
        lines.append(
            f"{transfer.before} {ARROW} {transfer.after}, macro-F1 {', '.join(sides)}:"
            f" {reading(transfer)}."
        )
    return lines


def _provenance(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        for data_set, path in entry.sets.items():
            rows.append(
                [
                    entry.name,
                    entry.stage,
                    entry.base or "-",
                    entry.prompt or "-",
                    entry.checkpoint or "-",
                    data_set,
                    str(path),
                    sha256_of(path)[:16],
                ]
            )
    return Table(
        "Predictions that were read, parsed anew",
        ["Model", "Stage", "Base", "Prompt", "Checkpoint", "Data set", "File", "SHA-256, first 16"],
        rows,
        numbers_from=99,
    )


# ---- command -------------------------------------------------------------------------------------
def write(document: Document, folder: Path) -> None:
    """report.html, report.md and the pictures that the latter names."""
    (folder / "report.html").write_text(to_html(document), encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(document, "pictures"), encoding="utf-8")
    pictures = [
        block
        for section in document.sections
        for block in section.blocks
        if isinstance(block, Picture)
    ]
    for picture in pictures:
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / picture_file(picture)).write_bytes(picture.data)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 usage or data."""
    return main_guard(lambda: _run(sys.argv[1:] if argv is None else argv), errors=(DataError,))


def _run(argv: Sequence[str]) -> int:
    started = time.perf_counter()
    resolved = parse_config(
        [ReportConfig],
        flag_first(argv, "run"),
        script="eval",
        prog="python -m eval.report",
        validate=config_problems,
        description="Tables, figures and sample cases from runs or kept predictions.",
    )
    config: ReportConfig = resolved.configs[0]
    entries = [
        load_entry(name, folder) for name, folder in named_folders(config.run, "run").items()
    ]
    empty = [entry for entry in entries if not entry.sets]
    if empty:
        raise UsageError(
            [
                f"--run {entry.folder}: holds no predictions-<set>.jsonl; evaluate it first: python"
                " -m eval.evaluate"
                for entry in empty
            ]
        )
    reference = None if config.train_file is None else read_examples(config.train_file)
    document = build(entries, config, reference)
    folder = run_directory(config.output_dir, "report")
    write(document, folder)
    for section in document.sections[:1]:
        for block in section.blocks:
            if isinstance(block, Bullets):
                print("\n".join(block.items))
    print(f"report: {folder / 'report.html'} ({time.perf_counter() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
