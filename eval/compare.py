"""Runs side by side: settings that differ, scores with paired intervals, curves on one chart.

    python -m eval.compare runs/20260101-120000-grpo runs/20260102-120000-grpo                     #
    tables on the console
    python -m eval.compare short=runs/a long=runs/b --output_dir comparison                        #
    and as a page with curves

The first run is the one that the others are compared with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from data.files import DataError
from engine.config import UsageError, parse_config, setting
from engine.runtime import main_guard, run_directory
from engine.settings import ENGINE
from eval.contrasts import Comparison, compare
from eval.figures import (
    FIGURE_1,
    MISSING,
    Panel,
    available,
    draw_labels,
    draw_training,
    reward_panels,
)
from eval.folders import (
    Entry,
    flag_first,
    load_entry,
    load_predictions,
    named_folders,
    read_log,
    read_record,
)
from eval.page import Document, Picture, Section, Table, Text, to_text
from eval.paired import PERMUTATIONS, RESAMPLES
from eval.report import write
from eval.tables import number, p_text, scores_table, signed

# settings that say nothing about the model
_OF_THE_FOLDER = ("output_dir", "resume_from_checkpoint", "dry_run", "show_batch")
_FIGURES = (("macro_f1", "Macro F1"), ("micro_f1", "Micro F1"), ("jaccard", "Jaccard"))


@dataclass(frozen=True)
class CompareConfig:
    """Flags of `python -m eval.compare`."""

    run: tuple[str, ...] = setting(
        (), "two runs or more, each FOLDER or NAME=FOLDER; may stand first without the flag"
    )
    output_dir: str | None = setting(
        None, "new folder for report.html and report.md", unset="tables on the console only"
    )
    resamples: int = setting(
        RESAMPLES, "bootstrap resamples of the patients", unit="resamples", source=ENGINE
    )
    permutations: int = setting(
        PERMUTATIONS, "of the permutation test", unit="permutations", source=ENGINE
    )
    seed: int = setting(
        0, "of the intervals, the permutation test and the random baseline", source=ENGINE
    )


def config_problems(config: CompareConfig) -> list[str]:
    """What is wrong with the values of one command line, beyond their types."""
    problems = [
        f"--{name} {getattr(config, name)}: must be at least 1"
        for name in ("resamples", "permutations")
        if getattr(config, name) < 1
    ]
    return problems + (
        []
        if len(config.run) >= 2
        else [f"--run: two runs or more are compared, got {len(config.run)}"]
    )


def settings_table(entries: Sequence[Entry]) -> Table:
    """The settings, data files and versions in which the runs differ, with where each value comes
    from.
    """
    told = [_told(entry) for entry in entries]
    names = list(dict.fromkeys(name for document in told for name in document))
    rows = [
        [name, *(document.get(name, "-") for document in told)]
        for name in names
        if len({document.get(name, "-").partition(" (")[0] for document in told}) > 1
    ]
    return Table(
        "Settings that differ",
        ["Setting", *(entry.name for entry in entries)],
        rows,
        (
            [
                "In brackets: where the value comes from. Settings that all runs share, and names"
                " of folders, are left out."
            ]
            if rows
            else ["No setting differs."]
        ),
        numbers_from=99,
    )


def _told(entry: Entry) -> dict[str, str]:
    """{setting: "value (origin)"} of the run that trained the model and of the evaluation that the
    folder holds, with the data files' SHA-256 and the versions.
    """
    own = read_record(entry.folder / "config.json")
    trained = own or (
        read_record(entry.training / "config.json") if entry.training is not None else {}
    )
    evaluated = (
        {}
        if own
        else next((found["run"] for found in entry.documents.values() if found.get("run")), {})
    )
    told = {"stage": entry.stage}
    for prefix, document in (("", trained), ("evaluation: ", evaluated)):
        told |= {
            f"{prefix}{name}": f"{value.get('value')} ({value.get('origin')})"
            for name, value in (document.get("settings") or {}).items()
            if name not in _OF_THE_FOLDER and isinstance(value, dict)
        }
        told |= {
            f"{prefix}data {name}": str(file.get("sha256"))[:16]
            for name, file in (document.get("data") or {}).items()
            if isinstance(file, dict)
        }
        told |= {
            f"{prefix}version of {name}": str(version)
            for name, version in (document.get("versions") or {}).items()
        }
    return told


def differences_table(comparison: Comparison, first: str) -> Table:
    """Each run's score minus the first run's on one data set."""
    rows = []
    for model in comparison.predictions:
        if model != first:
            for figure, title in _FIGURES:
                moved = comparison.change(first, model, figure)
                rows.append(
                    [
                        model,
                        title,
                        number(moved.before),
                        number(moved.after),
                        signed(moved.after - moved.before, moved.difference),
                        p_text(moved.p_value),
                    ]
                )
    return Table(
        f"{comparison.data_set}: difference from {first}",
        ["Run", "Figure", first, "The run", "Difference", "p"],
        rows,
        ["95 % intervals, paired by patient; p: permutation test."],
        numbers_from=2,
    )


def panels_of(entries: Sequence[Entry]) -> tuple[Panel, ...]:
    """What to draw: the panels of SFT where all runs are SFT's, of GRPO where all are; nothing for
    a mixture.
    """
    stages = {entry.stage for entry in entries}
    if stages == {"sft"}:
        return FIGURE_1
    if stages == {"grpo"}:
        rewards = dict.fromkeys(entry.reward for entry in entries)
        total, *_, length = reward_panels("")
        return (total, *(reward_panels(reward)[1] for reward in rewards), length)
    return ()


def build(entries: Sequence[Entry], config: CompareConfig) -> Document:
    """The comparison as data."""
    first = entries[0].name
    scores, charts = [], []
    for place, data_set in enumerate(
        sorted({data_set for entry in entries for data_set in entry.sets})
    ):
        answers = {
            entry.name: load_predictions(entry.sets[data_set])
            for entry in entries
            if data_set in entry.sets
        }
        if first not in answers or len(answers) < 2:
            continue
        pairs = [(first, name) for name in answers if name != first]
        comparison = compare(
            data_set,
            answers,
            pairs,
            seed=config.seed + place,
            resamples=config.resamples,
            permutations=config.permutations,
        )
        scores += [differences_table(comparison, first), scores_table(comparison)]
        charts += [draw_labels(comparison)] if config.output_dir and available() else []
    logs = {
        entry.name: log
        for entry in entries
        if entry.training is not None and (log := read_log(entry.training / "metrics.jsonl"))
    }
    curves: list[Picture | Text] = []
    if config.output_dir and panels_of(entries) and len(logs) > 1:
        caption = "Faint: logged values; bold: their exponential moving average, 0.95."
        curves = (
            [draw_training("curves", caption, logs, panels_of(entries))]
            if available()
            else [Text(f"Without curves: {MISSING}")]
        )
    return Document(
        "Comparison of runs",
        ", ".join(f"{entry.name} ({entry.folder})" for entry in entries),
        [
            Section("Settings", [settings_table(entries)]),
            Section(
                "Scores",
                [*scores, *charts]
                or [Text(f"No data set was answered by {first} and another run.")],
            ),
            *([Section("Training", curves)] if curves else []),
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 done, 2 usage or data."""
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
    entries = [
        load_entry(name, folder) for name, folder in named_folders(config.run, "run").items()
    ]
    unknown = [entry for entry in entries if not entry.sets and entry.training is None]
    if unknown:
        raise UsageError(
            [
                f"--run {entry.folder}: neither a run nor an evaluation (no config.json, no"
                " predictions-<set>.jsonl)"
                for entry in unknown
            ]
        )
    document = build(entries, config)
    if config.output_dir is not None:
        write(document, run_directory(config.output_dir, "report"))
    print(to_text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
