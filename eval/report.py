"""Report what transferred: the paper's tables and figures, honest scores, and sample cases.

    python -m eval.report base=runs/base sft=runs/sft grpo=runs/grpo --output_dir report
    python -m eval.report --output_dir paper    # no run: the paper's own scores in its tables

Writes report.html, one page that needs no network, and report.md with its pictures beside it.
Models are given in the order of training. A folder is that of a run, or of `python -m
eval.evaluate`. Which model it holds and which run trained it is read from the records in it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.examples import Example
from data.files import DataError, sha256_of
from data.hospitals import train_files
from data.labels import CHEXPERT
from data.sets import read_training_examples
from engine.config import UsageError, parse_config, setting
from engine.runtime import check_output_dir, main_guard, run_directory
from engine.settings import ENGINE, SEED
from eval.cases import case_strip, sample_cases
from eval.confusion import DEFINITION, heat_map, silenced_table
from eval.context_tables import readers_table, seen_table
from eval.contrasts import (
    Contrast,
    Transfer,
    contrast_models,
    nih_variants,
    pairs_of,
    transfers,
)
from eval.faithfulness_tables import faithfulness_tables
from eval.figures import reliability_pictures, training_pictures
from eval.folders import Entry, added_votes, answers_by_set, flag_first, load_entries, one_label_set
from eval.frontier import (
    CHOICE,
    Frontier,
    choice_text,
    chosen_before,
    frontier_of,
    frontier_section,
)
from eval.group_tables import groups_tables
from eval.page import (
    ARROW,
    Block,
    Bullets,
    Cases,
    Folded,
    Lead,
    Page,
    Picture,
    Section,
    Table,
    Text,
)
from eval.page_files import write_page
from eval.page_text import console_lines
from eval.paired import DRAWS, PERMUTATIONS, RESAMPLES, Change
from eval.paper_tables import paper_tables
from eval.pictures import dumbbell_picture, labels_picture
from eval.plots import MISSING, available
from eval.published import SOURCE
from eval.tables import diversity_table, marginals_table, movers_table, scores_table
from eval.transfer_tables import matched_table, paradox_table, reading, shared_title, transfer_table
from eval.verdict import last_step, verdict
from eval.vote_tables import threshold_tables, vote_tables


@dataclass(frozen=True)
class ReportConfig:
    """Hold the flags of `python -m eval.report`."""

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
        "data sets with the training data's label scheme; without it, those that evaluate all"
        " labels",
    )
    train_file: tuple[str, ...] = setting(
        (),
        "training data whose label frequencies the baselines imitate, as run_grpo.py takes them:"
        " FILE, or NAME=FILE of several hospitals, all images counted once",
        unset="each data set's own frequencies",
    )
    image_root: str | None = setting(
        None,
        "folder that image paths are relative to",
        unset="as in the evaluation, else the data file's folder",
    )
    cases: int = setting(
        12,
        "sample cases, with their images; 0 for none",
        unit="images",
        source=ENGINE,
        within="[0, 100000]",
    )
    chosen_alpha: str | None = setting(
        None,
        "chosen-alpha.json that a report on validation sets wrote: marks that share among adapters"
        " between two others, and refuses one that was chosen on patients shown here",
        unset="chosen on what is shown, and said so",
    )
    resamples: int = setting(
        RESAMPLES,
        "bootstrap resamples of the patients",
        unit="resamples",
        source=ENGINE,
        within=DRAWS,
    )
    permutations: int = setting(
        PERMUTATIONS,
        "of the permutation test",
        unit="permutations",
        source=ENGINE,
        within=DRAWS,
    )
    seed: int = setting(
        0,
        "of the intervals, the permutation test, the random baseline and the choice of cases",
        source=ENGINE,
        within=SEED,
    )


# ---- gather --------------------------------------------------------------------------------------
def contrast_sets(
    entries: Sequence[Entry],
    config: ReportConfig,
    baseline_examples: Sequence[Example] | None = None,
) -> tuple[list[Contrast], dict[str, Contrast]]:
    """Set the models side by side on each data set, and on NIH's under each mapping.

    Returns (a contrast for each data set that any model answered, {"nine", "ten": that of the first
    NIH set under the mapping}).
    """
    pairs = pairs_of(entries)
    contrasts: list[Contrast] = []
    nih: dict[str, Contrast] = {}
    for index, (data_set, answers) in enumerate(answers_by_set(entries)):
        own = contrast_models(
            data_set,
            answers,
            pairs,
            baseline_examples=baseline_examples,
            seed=config.seed + index,
            resamples=config.resamples,
            permutations=config.permutations,
        )
        contrasts.append(own)
        for name, (relabelled, labels) in ({} if nih else nih_variants(answers)).items():
            same = labels == own.labels and all(
                np.array_equal(relabelled[model].targets, answers[model].targets)
                for model in answers
            )
            nih[name] = (
                own
                if same
                else contrast_models(
                    data_set,
                    relabelled,
                    (),
                    labels=labels,
                    baseline_examples=baseline_examples,
                    seed=config.seed + index,
                    resamples=config.resamples,
                    permutations=config.permutations,
                )
            )
    return contrasts, nih


def home_sets(contrasts: Sequence[Contrast], named: Sequence[str]) -> list[str]:
    """Choose the in-distribution sets: those named, else those that evaluate all labels.

    Raises UsageError for a name that no model has answered.
    """
    known = [contrast.data_set for contrast in contrasts]
    missing = [name for name in named if name not in known]
    if missing:
        raise UsageError(
            f"--in_distribution {missing[0]}: no such data set; there are:"
            f" {', '.join(known) or 'none'}"
        )
    return list(named) or [contrast.data_set for contrast in contrasts if contrast.is_home]


# ---- sections ------------------------------------------------------------------------------------
def report_page(
    entries: Sequence[Entry],
    config: ReportConfig,
    baseline_examples: Sequence[Example] | None = None,
) -> Page:
    """Put the whole report together as a page, what matters most first.

    entries: the models' folders, in the order of training. baseline_examples: whose label sets the
    baselines imitate.
    """
    contrasts, nih = contrast_sets(entries, config, baseline_examples)
    home = home_sets(contrasts, config.in_distribution)
    contrasts.sort(key=lambda contrast: contrast.data_set not in home)  # the home sets first
    if not contrasts:
        note = f"Scores of {SOURCE}; no run of ours was given."
        papers = Section("The paper's tables", paper_tables(entries, contrasts, home, nih))
        return Page("The paper's tables", note, [papers])
    pairs = [
        pair
        for pair in pairs_of(entries)
        if any(pair in contrast.p_values for contrast in contrasts)
    ]
    step = last_step([entry.name for entry in entries], pairs)
    found = transfers(contrasts, home, pairs)
    between = frontier_of(entries, contrasts, home)
    chosen = None
    if config.chosen_alpha is not None:
        chosen = chosen_before(config.chosen_alpha, between)
    cases = _cases(entries, contrasts, config, step)
    # drawn images, and other labels, have nothing in common with the paper's hospitals
    with_paper = contrasts[0].label_set == CHEXPERT and not any(entry.is_demo for entry in entries)
    sections = [
        _first_screen(contrasts, home, found, step, cases),
        *_frontier_sections(between, config.chosen_alpha, chosen),
        *_transfer_sections(contrasts, home, pairs, found, with_paper=with_paper),
        _confusion_section(contrasts, step),
        _label_section(contrasts, pairs),
        _score_section(contrasts),
        *_group_sections(contrasts, pairs, config.seed),
        *_vote_sections(entries),
        *_faithfulness_sections(entries),
        *_training_sections(entries),
        *_case_sections(cases),
        *([_paper_section(entries, contrasts, home, nih)] if with_paper else []),
        Section(
            "Sources", [Folded("Files", [_provenance(entries)]), seen_table(entries, contrasts)]
        ),
    ]
    images = ", ".join(f"{contrast.data_set} {len(contrast.first.ids):,}" for contrast in contrasts)
    return Page(
        "What transferred",
        f"{', '.join(entry.name for entry in entries)} on {images} images. At home:"
        f" {', '.join(home) or 'none'}.",
        sections,
        {CHOICE: choice_text(between)} if between is not None and chosen is None else {},
    )


def _first_screen(
    contrasts: Sequence[Contrast],
    home: Sequence[str],
    found: Sequence[Transfer],
    step: tuple[str, str] | None,
    cases: Cases | None,
) -> Section:
    """Put together what a reader sees first: a sentence, a picture, four cases."""
    transfer = next((one for one in found if (one.before, one.after) == step), None)
    blocks: list[Block] = [
        verdict(contrasts, step, transfer),
        dumbbell_picture(contrasts, home),
    ]
    if cases is not None and cases.cases:
        blocks.append(case_strip(cases, step))
    return Section("In one sentence", blocks)


def _transfer_sections(
    contrasts: Sequence[Contrast],
    home: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    found: Sequence[Transfer],
    *,
    with_paper: bool,
) -> list[Section]:
    if not pairs:
        return []
    blocks: list[Block] = [
        Bullets(headlines(found)),
        paradox_table(found, with_paper=with_paper),
        matched_table(found, with_paper=with_paper),
        Folded(
            "Every step on every data set, with p-values", [transfer_table(contrasts, home, pairs)]
        ),
    ]
    return [Section("Step by step", blocks)]


def _frontier_sections(
    between: Frontier | None, chosen_on: str | None, chosen: float | None
) -> list[Section]:
    """Show the line between two adapters. chosen: the alpha of a choice on other data."""
    if between is None:
        return []
    alpha = between.chosen.alpha if chosen is None else chosen
    return [frontier_section(between, chosen_on, alpha)]


def _group_sections(
    contrasts: Sequence[Contrast], pairs: Sequence[tuple[str, str]], seed: int
) -> list[Section]:
    tables = [
        table for contrast in contrasts for table in groups_tables(contrast, pairs, seed=seed)
    ]
    if not tables:
        return []
    rest = [Folded("Other groups and data sets", tables[1:])] if tables[1:] else []
    return [Section("By sex, age and view", [tables[0], *rest])]


def _confusion_section(contrasts: Sequence[Contrast], step: tuple[str, str] | None) -> Section:
    """Show the heat maps of the last step on the first data set, and fold all others."""
    first, *others = contrasts
    shown = [model for model in first.answers if step is None or model in step]
    rest = [heat_map(first, model) for model in first.answers if model not in shown]
    blocks: list[Block] = [heat_map(first, model) for model in shown]
    blocks.append(Text(DEFINITION))
    if rest:
        blocks.append(Folded(f"Other models on {first.data_set}", rest))
    blocks += [
        Folded(f"On {contrast.data_set}", [heat_map(contrast, model) for model in contrast.answers])
        for contrast in others
    ]
    return Section("Which label is taken for which", blocks)


def _label_section(contrasts: Sequence[Contrast], pairs: Sequence[tuple[str, str]]) -> Section:
    """Show precision, recall and F1 by label on the first data set, and fold the others."""
    tables = [
        movers_table(contrast, *pair)
        for pair in pairs
        for contrast in contrasts
        if pair in contrast.p_values
    ]
    first, *others = contrasts
    folded = [Folded(f"On {contrast.data_set}", [labels_picture(contrast)]) for contrast in others]
    if tables:
        folded.append(Folded("F1 by label before and after each step", tables))
    return Section("Label by label", [labels_picture(first), silenced_table(contrasts), *folded])


def _score_section(contrasts: Sequence[Contrast]) -> Section:
    about_answers = "Length and variety of the answers, entries that are no label"
    blocks: list[Block] = [
        *map(scores_table, contrasts),
        Folded("How often each label is said", [*map(marginals_table, contrasts)]),
        Folded(about_answers, [diversity_table(contrasts)]),
    ]
    return Section("Scores", blocks)


def _vote_sections(entries: Sequence[Entry]) -> list[Section]:
    """Show what votes gain and how far their shares are probabilities, where a model voted."""
    gains, by_label = vote_tables(entries)
    carried, thresholds = threshold_tables(entries)
    drawn = reliability_pictures(entries) if available() else []
    folded = [Folded("AUROC and AUPRC by label", by_label)] if by_label else []
    if thresholds:
        folded.append(Folded("Thresholds by label", thresholds))
    if drawn[1:]:
        folded.insert(0, Folded("Reliability on the other data sets", drawn[1:]))
    blocks: list[Block] = [*gains, *drawn[:1], *carried, *folded]
    return [Section("Votes as probabilities", blocks)] if blocks else []


def _faithfulness_sections(entries: Sequence[Entry]) -> list[Section]:
    tables = faithfulness_tables(entries)
    return [Section("Does the answer come from the image?", tables)] if tables else []


def _training_sections(entries: Sequence[Entry]) -> list[Section]:
    if not available():
        voted = any("probabilities" in record for one in entries for record in one.records.values())
        what = "training and of the votes' reliability" if voted else "training"
        return [Section("Training", [Text(f"Without pictures of {what}: {MISSING}")])]
    # a vote that nobody named stands for no run
    curves: list[Picture] = training_pictures([one for one in entries if not one.is_added])
    if not curves:
        return []
    rest = [Folded("More curves", curves[1:])] if curves[1:] else []
    return [Section("Training", [curves[0], *rest])]


def _cases(
    entries: Sequence[Entry],
    contrasts: Sequence[Contrast],
    config: ReportConfig,
    step: tuple[str, str] | None,
) -> Cases | None:
    if not config.cases:
        return None
    return sample_cases(
        entries,
        contrasts,
        config.cases,
        seed=config.seed,
        step=step,
        image_root=config.image_root,
    )


def _case_sections(cases: Cases | None) -> list[Section]:
    if cases is None:
        return []
    about = Text(
        "Chosen by the last model's answers: fixed, broken, failed, wrong and right by turns,"
        " labels as varied as possible, so their shares say nothing. Right: exactly the true labels"
        " among those that the data set evaluates. Fixed and broken: against the model before it."
        " Reward parts are those that run_grpo.py recorded."
    )
    return [Section("Sample cases", [about, cases])]


def _paper_section(
    entries: Sequence[Entry],
    contrasts: Sequence[Contrast],
    home: Sequence[str],
    nih: dict[str, Contrast],
) -> Section:
    about = Text(
        f"Scores of {SOURCE} beside ours. Bold: the best of each row, among the paper's models and"
        " among ours."
    )
    tables = [*paper_tables(entries, contrasts, home, nih), readers_table(contrasts)]
    return Section("The paper's tables", [about, Folded("Tables 1 to 6", tables)])


def headlines(found: Sequence[Transfer]) -> list[str]:
    """Write one line a step: what moved where, with 95 % intervals, and how that reads.

    Where the sides have different labels, the line goes on with the labels that both can express.
    """
    lines = []
    for transfer in found:
        sides = _sides(transfer.home, transfer.away)
        line = f"{transfer.before} {ARROW} {transfer.after}, macro-F1 {sides}: {reading(transfer)}."
        if transfer.gap_shared is not None and not transfer.same_labels:
            shared = _sides(transfer.home_shared, transfer.away_shared)
            line += f" On the {shared_title(transfer)}: {shared}: {reading(transfer, shared=True)}."
        lines.append(line)
    return lines


def _sides(home: Change | None, away: Change | None) -> str:
    return ", ".join(
        f"{where} {moved.size:+.3f} ({moved.difference[0]:+.3f} to {moved.difference[1]:+.3f})"
        for where, moved in (("in distribution", home), ("across schemes", away))
        if moved is not None
    )


def _provenance(entries: Sequence[Entry]) -> Table:
    rows = [
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
        for entry in entries
        for data_set, path in entry.sets.items()
    ]
    return Table(
        "Predictions that were read, parsed anew",
        ["Model", "Stage", "Base", "Prompt", "Checkpoint", "Data set", "File", "SHA-256, first 16"],
        rows,
        numbers_from=99,
    )


# ---- command -------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 usage or data."""
    return main_guard(lambda: _run(sys.argv[1:] if argv is None else argv), errors=(DataError,))


def _run(argv: Sequence[str]) -> int:
    started = time.perf_counter()
    resolved = parse_config(
        [ReportConfig],
        flag_first(argv, "run"),
        script="eval",
        prog="python -m eval.report",
        description="Tables, figures and sample cases from runs or kept predictions.",
        validate=lambda config: train_files(config.train_file)[1],
    )
    config: ReportConfig = resolved.configs[0]
    check_output_dir(config.output_dir, "report")
    entries = load_entries(config.run, "run", with_votes=True)
    empty = [entry for entry in entries if not entry.sets]
    if empty:
        raise UsageError(
            [
                f"--run {entry.folder}: holds no predictions-<set>.jsonl; evaluate it first: python"
                " -m eval.evaluate"
                for entry in empty
            ]
        )
    label_set = one_label_set(entries)
    baseline_examples = read_training_examples(config.train_file, label_set=label_set)
    page = report_page(entries, config, baseline_examples)
    folder = run_directory(config.output_dir, "report")
    write_page(page, folder)
    if added := added_votes(entries):
        print(added)
    for block in page.sections[0].blocks:
        if isinstance(block, Lead):
            print("\n".join(console_lines(block)).replace(ARROW, "->").strip())
    if CHOICE in page.files:
        alpha = json.loads(page.files[CHOICE])["alpha"]
        print(
            f"chosen alpha: {alpha:g}, on the images shown; for other data: --chosen_alpha", end=" "
        )
        print(folder / CHOICE)
    print(f"report: {folder / 'report.html'} ({time.perf_counter() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
