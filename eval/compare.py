"""Compare runs: settings that differ, scores with paired intervals, curves on one chart.

    # tables on the console
    python -m eval.compare runs/20260101-120000-grpo runs/20260102-120000-grpo
    # and as a page with curves
    python -m eval.compare short=runs/a long=runs/b --output_dir comparison

The first run is the one that the others are compared with. A vote over its start that a GRPO run
keeps is a row of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data.files import DataError
from engine.config import UsageError, from_json, parse_config, setting
from engine.reward_name import reward_name
from engine.runtime import check_output_dir, main_guard, run_directory
from engine.settings import ENGINE, SEED
from eval.contrasts import Contrast, contrast_models
from eval.curves import FIGURE_1, Panel, reward_panels, smoothing_note
from eval.folders import (
    Entry,
    added_votes,
    answers_by_set,
    flag_first,
    load_entries,
    one_label_set,
    read_log,
    read_record,
)
from eval.names import SCORE_TITLES, heading
from eval.page import Block, Cell, Folded, Page, Picture, Section, Table, Text
from eval.page_files import write_page
from eval.page_text import to_text
from eval.paired import DRAWS, PERMUTATIONS, RESAMPLES
from eval.pictures import dumbbell_picture, labels_picture
from eval.plots import MISSING, available, draw_training
from eval.tables import change_cells, holm_note, p_cells, scores_table
from eval.verdict import verdict

# settings that say nothing about the model
_OF_THE_FOLDER = ("output_dir", "resume_from_checkpoint", "dry_run", "show_batch")


@dataclass(frozen=True)
class CompareConfig:
    """Hold the flags of `python -m eval.compare`."""

    run: tuple[str, ...] = setting(
        (), "two runs or more, each FOLDER or NAME=FOLDER; may stand first without the flag"
    )
    output_dir: str | None = setting(
        None, "new folder for report.html and report.md", unset="tables on the console only"
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
        "of the intervals, the permutation test and the random baseline",
        source=ENGINE,
        within=SEED,
    )


def config_problems(config: CompareConfig) -> list[str]:
    """Check the values of one command line, beyond their types -> problems, one line each."""
    if len(config.run) >= 2:
        return []
    return [f"--run: two runs or more are compared, got {len(config.run)}"]


def settings_blocks(entries: Sequence[Entry]) -> list[Block]:
    """List the settings, data files and versions in which the runs differ, with their origins.

    Those of which only some runs know, as those of another stage, are folded, unless the runs that
    know them differ.
    """
    told = [_told(entry) for entry in entries]
    differing: list[list[Cell | str]] = []
    partial: list[list[Cell | str]] = []
    for name in dict.fromkeys(name for facts in told for name in facts):
        row: list[Cell | str] = [name, *(facts.get(name, "-") for facts in told)]
        if len({facts[name].partition(" (")[0] for facts in told if name in facts}) > 1:
            differing.append(row)
        elif not all(name in facts for facts in told):
            partial.append(row)
    note = (
        "In brackets: where the value comes from. Settings that all runs share, and names of"
        " folders, are left out."
        if differing
        else "No setting differs."
    )
    header = ["Setting", *(entry.name for entry in entries)]
    blocks: list[Block] = [
        Table("Settings that differ", header, differing, [note], numbers_from=99)
    ]
    if partial:
        counts = [sum(row[column] != "-" for row in partial) for column in range(1, len(header))]
        each = ", ".join(
            f"{count} of {name}" for name, count in zip(header[1:], counts, strict=True) if count
        )
        title = f"Settings that only some runs have: {each}"
        table = Table("Settings that only some runs have", header, partial, numbers_from=99)
        blocks.append(Folded(title, [table]))
    return blocks


def _told(entry: Entry) -> dict[str, str]:
    """Gather {setting: "value (origin)"} of the training run and of the folder's evaluation.

    The SHA-256 of the data files and the versions are among them.
    """
    own = read_record(entry.folder / "config.json")
    trained: dict[str, Any] = own
    evaluated: dict[str, Any] = {}
    if not own:
        if entry.training is not None:
            trained = read_record(entry.training / "config.json")
        evaluated = next((found["run"] for found in entry.records.values() if found.get("run")), {})
    told: dict[str, str] = {"stage": entry.stage}
    for prefix, record in (("", trained), ("evaluation: ", evaluated)):
        told |= {
            f"{prefix}{name}": f"{from_json(value.get('value'))} ({value.get('origin')})"
            for name, value in (record.get("settings") or {}).items()
            if name not in _OF_THE_FOLDER and isinstance(value, dict)
        }
        told |= {
            f"{prefix}data {name}": str(file.get("sha256"))[:16]
            for name, file in (record.get("data") or {}).items()
            if isinstance(file, dict)
        }
        told |= {
            f"{prefix}version of {name}": str(version)
            for name, version in (record.get("versions") or {}).items()
        }
    return told


def differences_table(contrast: Contrast, first: str) -> Table:
    """List each run's scores minus the first run's on one data set."""
    names, moves = [], []
    for model in contrast.answers:
        if model != first:
            for score, title in SCORE_TITLES.items():
                names.append((model, heading(title)))
                moves.append(contrast.change(first, model, score))
    p_values = [moved.p_value for moved in moves]
    rows: list[list[Cell | str]] = [
        [
            *name,
            *change_cells(moved, contrast.num_patients),
            p_cell,
        ]
        for name, moved, p_cell in zip(names, moves, p_cells(p_values), strict=True)
    ]
    return Table(
        f"{contrast.data_set}: difference from {first}",
        ["Run", "Score", first, "The run", "Difference", "p (Holm)"],
        rows,
        [f"95 % intervals, paired by patient. {holm_note(p_values)}"],
        numbers_from=2,
    )


def panels_of(entries: Sequence[Entry]) -> tuple[Panel, ...]:
    """Choose what to draw: the panels of SFT or GRPO, nothing for a mixture of both."""
    stages = {entry.stage for entry in entries}
    if stages == {"sft"}:
        return FIGURE_1
    if stages == {"grpo"}:
        by_name: dict[str, set[str]] = {}
        for entry in entries:
            by_name.setdefault(reward_name(entry.reward), set()).add(entry.reward)
        # two mixtures are one curve of each run, under the name that both are logged by
        rewards = [min(texts) if len(texts) == 1 else name for name, texts in by_name.items()]
        total, *_, length = reward_panels("")
        return (total, *(reward_panels(reward)[1] for reward in rewards), length)
    return ()


def comparison_page(entries: Sequence[Entry], config: CompareConfig) -> Page:
    """Put the comparison together as a page: the scores, the curves, then the settings.

    Votes that nobody named have scores only: they stand for no run.
    """
    named = [entry for entry in entries if not entry.is_added]
    first = named[0].name
    contrasts = _contrasts(entries, config)
    blocks: list[Block] = [Text(f"No data set was answered by {first} and another run.")]
    sections = []
    if contrasts:
        last = [entry.name for entry in named if entry.name in contrasts[0].answers][-1]
        home = [contrast.data_set for contrast in contrasts if contrast.is_home]
        said: list[Block] = [
            verdict(contrasts, (first, last), None),
            dumbbell_picture(contrasts, home),
        ]
        sections = [Section("In one sentence", said)]
        blocks = []
        for contrast in contrasts:
            blocks += [differences_table(contrast, first), scores_table(contrast)]
        blocks += map(labels_picture, contrasts)
    curves: Sequence[Block] = (
        _curves(named)
        if config.output_dir
        else [Text("Curves and pictures appear only with --output_dir, on a page.")]
    )
    return Page(
        "Comparison of runs",
        ", ".join(f"{entry.name} ({entry.folder})" for entry in entries),
        [
            *sections,
            Section("Scores", blocks),
            *([Section("Training", curves)] if curves else []),
            Section("Settings", settings_blocks(named)),
        ],
    )


def _contrasts(entries: Sequence[Entry], config: CompareConfig) -> list[Contrast]:
    """Compare the others with the first run on every data set that it and another answered."""
    named = [entry.name for entry in entries if not entry.is_added]
    first = named[0]
    return [
        contrast_models(
            data_set,
            answers,
            [(first, name) for name in answers if name != first],
            seed=config.seed + index,
            resamples=config.resamples,
            permutations=config.permutations,
        )
        for index, (data_set, answers) in enumerate(answers_by_set(entries))
        if first in answers and sum(name in answers for name in named) > 1
    ]


def _curves(entries: Sequence[Entry]) -> list[Picture | Text]:
    """Draw the training curves of all runs on one chart, where two runs or more have a log."""
    logs = {
        entry.name: log
        for entry in entries
        if entry.training is not None and (log := read_log(entry.training / "metrics.jsonl"))
    }
    panels = panels_of(entries)
    if not panels or len(logs) < 2:
        return []
    if not available():
        return [Text(f"Without curves: {MISSING}")]
    return [draw_training("curves", smoothing_note(), logs, panels)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 usage or data."""
    return main_guard(lambda: _run(sys.argv[1:] if argv is None else argv), errors=(DataError,))


def _run(argv: Sequence[str]) -> int:
    resolved = parse_config(
        [CompareConfig],
        flag_first(argv, "run"),
        script="eval",
        prog="python -m eval.compare",
        validate=config_problems,
        description="Compare runs: settings, scores with paired intervals, curves.",
    )
    config: CompareConfig = resolved.configs[0]
    if config.output_dir is not None:
        check_output_dir(config.output_dir, "report")
    entries = load_entries(config.run, "run", with_votes=True)
    unknown = [entry for entry in entries if not entry.sets and entry.training is None]
    if unknown:
        raise UsageError(
            [
                f"--run {entry.folder}: neither a run nor an evaluation (no config.json, no"
                " predictions-<set>.jsonl)"
                for entry in unknown
            ]
        )
    one_label_set(entries)
    page = comparison_page(entries, config)
    if config.output_dir is not None:
        write_page(page, run_directory(config.output_dir, "report"))
    if added := added_votes(entries):
        print(added)
    print(to_text(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
