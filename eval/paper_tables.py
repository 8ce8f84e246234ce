"""Make the paper's six tables with its scores and ours side by side.

What the paper prints is in eval/published.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from data.labels import LABELS, NIH_NINE
from eval import published
from eval.contrasts import Contrast
from eval.folders import Entry
from eval.names import BASELINE_TITLES
from eval.page import Cell, Table
from eval.paired import all_labels_scores
from eval.tables import (
    NO_SUPPORT,
    SEVEN,
    baseline_cells,
    bounds,
    number,
    seven_cells,
    support_notes,
)


def prompt_key(name: str) -> str:
    """Reduce a prompt's name, ours or the paper's, to what both spellings share.

    "reasoning_self_check" and "Reasoning Self-Check" are one.
    """
    return re.sub("[^a-z0-9]", "", name.lower().replace("reasoning", "").replace("(baseline)", ""))


def paper_tables(
    entries: Sequence[Entry],
    contrasts: Sequence[Contrast],
    home: Sequence[str],
    nih: Mapping[str, Contrast],
) -> list[Table]:
    """Make tables 1 to 6 with the paper's scores and ours.

    home: names of the in-distribution sets. nih: {"nine", "ten": the contrast under that mapping},
    or empty.
    """
    at_home = next((contrast for contrast in contrasts if contrast.data_set in home), None)
    base = [entry for entry in entries if entry.stage == "base"]
    sft = [entry for entry in entries if entry.stage == "sft"]
    # of another base than table 2's
    third = [entry for entry in sft if "gemma" not in entry.base.lower()]
    return [
        _format_table(
            1,
            "Prompts on a base model",
            {
                name: (None, None, *row[:1], None, None, *row[1:])
                for name, row in published.TABLE_1.items()
            },
            "MedGemma-4B",
            base,
            at_home,
            short=True,
        ),
        _format_table(
            2,
            "SFT formats, MedGemma-4B",
            published.TABLE_2,
            "MedGemma-4B",
            [entry for entry in sft if entry not in third],
            at_home,
        ),
        _format_table(
            3,
            "SFT formats, Qwen2.5-VL-3B-Instruct",
            published.TABLE_3,
            "Qwen2.5-VL-3B",
            third,
            at_home,
        ),
        _reward_table([entry for entry in entries if entry.stage == "grpo"], at_home),
        *_label_tables(at_home, nih),
    ]


def _our_rows(
    entries: Sequence[Entry], contrast: Contrast | None
) -> list[tuple[Entry, list[Cell | str]]]:
    """Make the cells of each of our models that answered the data set: whose scores, the seven."""
    if contrast is None:
        return []
    return [
        (entry, [f"{entry.name} ({entry.base})", *seven_cells(contrast, entry.name)])
        for entry in entries
        if entry.name in contrast.policies
    ]


def _baseline_rows(contrast: Contrast | None, skipped: int) -> list[list[Cell | str]]:
    """Make the rows of the trivial baselines, with `skipped` empty cells before Micro P."""
    if contrast is None:
        return []
    return [
        [
            Cell(f"baseline: {title}", tone="muted"),
            *[""] * skipped,
            *baseline_cells(contrast, name),
            "",
        ]
        for name, title in BASELINE_TITLES.items()
    ]


def _format_table(
    index: int,
    title: str,
    rows: Mapping[str, Sequence[float | None]],
    model: str,
    entries: Sequence[Entry],
    contrast: Contrast | None,
    *,
    short: bool = False,
) -> Table:
    """Make table 1, 2 or 3: for each prompt or format the paper's row and ours.

    Rows of ours that have none in the paper come last.
    """
    ours = _our_rows(entries, contrast)
    lines: list[list[Cell | str]] = []
    for name, row in rows.items():
        lines.append([name, f"paper, {model}", *map(number, row)])
        lines += [
            [name, *cells] for entry, cells in ours if prompt_key(entry.prompt) == prompt_key(name)
        ]
    known = {prompt_key(name) for name in rows}
    lines += [
        [entry.prompt, *cells] for entry, cells in ours if prompt_key(entry.prompt) not in known
    ]
    lines += _baseline_rows(contrast, 1)
    header = ["Prompt" if short else "Format", "Whose scores", *SEVEN]
    if short:  # the paper prints only F1 and the fail rate
        kept = [0, 1, 4, 7, 8]
        header, lines = [header[k] for k in kept], [[line[k] for k in kept] for line in lines]
    return Table(f"Table {index}. {title}", header, lines, _notes(index, contrast), numbers_from=2)


def _notes(index: int, contrast: Contrast | None) -> list[str]:
    ours = (
        ["No run of ours is shown here: give one to compare."]
        if contrast is None
        else [
            f"Ours: {contrast.data_set}, {len(contrast.first.ids):,} images,"
            f" {int(contrast.support.sum()):,} positives; 95 % intervals in small print."
        ]
    )
    return ours + list(published.NOTES[index])


def _reward_table(entries: Sequence[Entry], contrast: Contrast | None) -> Table:
    lines: list[list[Cell | str]] = []
    ours = _our_rows(entries, contrast)
    told: set[str] = set()
    for (reward, checkpoint), row in published.TABLE_4.items():
        lines.append([reward, checkpoint, "paper, MedGemma-4B", *map(number, row)])
        same = [
            (entry, cells)
            for entry, cells in ours
            if entry.reward == reward and checkpoint in entry.checkpoint.split(" = ")
        ]
        lines += [[reward, entry.checkpoint, *cells] for entry, cells in same]
        told |= {entry.name for entry, _ in same}
    lines += [
        [entry.reward, entry.checkpoint or "-", *cells]
        for entry, cells in ours
        if entry.name not in told
    ]
    lines += _baseline_rows(contrast, 2)
    return Table(
        "Table 4. GRPO: rewards and checkpoints",
        ["Reward", "Checkpoint", "Whose scores", *SEVEN],
        lines,
        _notes(4, contrast),
        numbers_from=3,
    )


def _label_tables(at_home: Contrast | None, nih: Mapping[str, Contrast]) -> list[Table]:
    tables = [
        _label_table(
            5, "F1 by label, CheXpert test", published.TABLE_5, published.MACRO_5, at_home, LABELS
        )
    ]
    tables.append(
        _label_table(
            6,
            "F1 by label, NIH, the paper's nine categories",
            published.TABLE_6,
            published.MACRO_6,
            nih.get("nine"),
            NIH_NINE,
        )
    )
    if "ten" in nih:
        tables.append(
            _label_table(
                6,
                "F1 by label, NIH, ten categories (a variant: with Pleural Effusion)",
                {},
                {},
                nih["ten"],
                nih["ten"].labels,
            )
        )
    return tables


def _label_table(
    index: int,
    title: str,
    by_model: Mapping[str, Mapping[str, float]],
    macros: Mapping[str, float],
    contrast: Contrast | None,
    labels: Sequence[str],
) -> Table:
    """Make table 5 or 6: labels by the alphabet as in the paper.

    The best of the paper's models and the best of ours are set off.
    """
    models = [] if contrast is None else list(contrast.values)
    lines: list[list[Cell | str]] = []
    for label in sorted(labels):
        line: list[Cell | str] = [label]
        if index == 5:
            line.append(f"{published.CHEXPERT_TEST_SUPPORT[label]}")
        line += _best([by_model[model][label] for model in by_model])
        if contrast is not None and label not in contrast.labels:
            line += ["-"] * (len(models) + 2)
        elif contrast is not None:
            k = contrast.labels.index(label)
            count = int(contrast.support[k])
            line.append(f"{count:,}" if count else NO_SUPPORT)
            values = [float(contrast.values[model]["label_f1"][0, k]) for model in models]
            line += _best(values) if count else ["-"] * len(models)
            line.append(number(2 * count / (_evaluating(contrast, k) + count)) if count else "-")
        lines.append(line)
    lines += _macro_lines(index, by_model, macros, contrast, models)
    header = [
        "Label",
        *(["Positives, paper's data"] if index == 5 else []),
        *(f"paper: {model}" for model in by_model),
    ]
    if contrast is not None:
        header += ["Positives, ours", *models, "baseline: all labels"]
    return Table(
        f"Table {index}. {title}",
        header,
        lines,
        _label_notes(index, by_model, macros, contrast, models),
    )


def _evaluating(contrast: Contrast, k: int) -> int:
    return int(contrast.first.evaluated[:, LABELS.index(contrast.labels[k])].sum())


def _best(values: Sequence[float]) -> list[Cell]:
    top = max(values, default=0.0)
    return [
        Cell(number(value), tone="best" if value == top and value > 0 else "") for value in values
    ]


def _macro_lines(
    index: int,
    by_model: Mapping[str, Mapping[str, float]],
    macros: Mapping[str, float],
    contrast: Contrast | None,
    models: Sequence[str],
) -> list[list[Cell | str]]:
    blank = [""] if index == 5 else []
    tail: list[Cell | str] = (
        []
        if contrast is None
        else [
            "",
            *_with_intervals(contrast, models, "macro_f1"),
            number(contrast.baselines["all_labels"]["macro_f1"]),
        ]
    )
    lines = [
        [
            "Macro F1, mean of the rows above",
            *blank,
            *(number(float(np.mean(list(by_model[model].values())))) for model in by_model),
            *tail,
        ]
    ]
    if macros:
        lines.append(
            ["Macro F1, as printed", *blank, *_best(list(macros.values())), *([""] * len(tail))]
        )
    if contrast is not None:
        lines.append(
            [
                "Micro F1",
                *blank,
                *[""] * len(by_model),
                "",
                *_with_intervals(contrast, models, "micro_f1"),
                number(contrast.baselines["all_labels"]["micro_f1"]),
            ]
        )
    return lines


def _with_intervals(contrast: Contrast, models: Sequence[str], score: str) -> list[Cell]:
    values = [float(contrast.values[model][score][0]) for model in models]
    return [
        Cell(cell.text, bounds(contrast.interval(model, score)), cell.tone)
        for cell, model in zip(_best(values), models, strict=True)
    ]


def _label_notes(
    index: int,
    by_model: Mapping[str, Mapping[str, float]],
    macros: Mapping[str, float],
    contrast: Contrast | None,
    models: Sequence[str],
) -> list[str]:
    notes = list(_notes(index, contrast)) + (
        support_notes(contrast) if contrast is not None else []
    )
    if macros:
        worst = max(
            abs(float(np.mean(list(by_model[model].values()))) - macros[model])
            for model in by_model
        )
        notes.append(
            "The printed macro-F1 values are plain means with zeros kept: the largest difference"
            f" is {worst:.4f}."
        )
    if index == 5:
        everything = all_labels_scores(
            list(published.CHEXPERT_TEST_SUPPORT.values()), published.CHEXPERT_TEST_STUDIES
        )
        notes.append(
            "Naming all 14 labels for every study of CheXpert's test set gives macro-F1"
            f" {everything['macro_f1']:.3f} and micro-F1 {everything['micro_f1']:.3f}, from the"
            " positives alone: above Qwen2.5 and the SFT model in macro-F1."
        )
    return notes
