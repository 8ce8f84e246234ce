"""The tables of a report: the paper's six with its figures beside ours, and what transferred."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from data.labels import LABELS, NIH_NINE
from eval import published
from eval.contrasts import Comparison, Transfer
from eval.folders import Entry
from eval.page import Cell, Table
from eval.paired import Change, all_labels_scores, diversity, said_and_true

BASELINE_TITLES = {
    "most_frequent": "most frequent answer",
    "all_labels": "all labels",
    "prevalence_matched": "prevalence-matched",
}
NO_SUPPORT = "no positives"
ARROW = "\u2192"
_SEVEN = ("Micro P", "Micro R", "Micro F1", "Macro P", "Macro R", "Macro F1", "Fail")


def number(value: float | None) -> str:
    """Three digits, "-" for what is not known."""
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def bounds(interval: tuple[float, float]) -> str:
    """An interval of a score."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def signed(
    value: float,
    interval: tuple[float, float] | None = None,
    *,
    percent: bool = False,
    tone: bool = True,
) -> Cell:
    """A change with its interval; set off as a gain or loss where the interval leaves 0 out."""
    form = (lambda x: f"{100 * x:+.1f} %") if percent else (lambda x: f"{x:+.3f}")
    clear = interval is not None and tone and (interval[0] > 0 or interval[1] < 0)
    detail = "" if interval is None else f"{form(interval[0])} to {form(interval[1])}"
    return Cell(form(value), detail, ("gain" if value > 0 else "loss") if clear else "")


def p_text(value: float) -> str:
    """A p-value; those of 10,000 permutations go down to 0.0001."""
    return "-" if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


# ---- scores --------------------------------------------------------------------------------------
def scores_table(comparison: Comparison) -> Table:
    """Every model's scores on one data set with intervals, failed answers treated in three ways,
    and the baselines.
    """
    header = [
        "Model",
        *_SEVEN[:6],
        "Jaccard",
        "Fail",
        "Macro F1, failed left out",
        "Macro F1, failed all wrong",
    ]
    rows: list[list[Cell | str]] = []
    for model, policies in comparison.scores.items():
        scores, answers = policies["empty"], comparison.predictions[model]
        shown = {
            figure: bounds(comparison.interval(model, figure))
            for figure in ("micro_f1", "macro_f1", "jaccard")
        }
        rows.append(
            [
                model,
                *(number(scores["micro"][key]) for key in ("precision", "recall")),
                Cell(number(scores["micro"]["f1"]), shown["micro_f1"]),
                *(number(scores["macro"][key]) for key in ("precision", "recall")),
                Cell(number(scores["macro"]["f1"]), shown["macro_f1"]),
                Cell(number(float(answers.jaccard.mean())), shown["jaccard"]),
                number(float((~answers.parsed).mean())),
                *(number(policies[policy]["macro"]["f1"]) for policy in ("dropped", "all_wrong")),
            ]
        )
    for name, title in BASELINE_TITLES.items():
        baseline = comparison.baselines[name]
        rows.append(
            [
                Cell(f"baseline: {title}", tone="muted"),
                "",
                "",
                number(baseline["micro_f1"]),
                "",
                "",
                number(baseline["macro_f1"]),
                number(baseline["jaccard"]),
                "",
                "",
                "",
            ]
        )
    images, patients = len(comparison.first.ids), len(set(comparison.first.patients.tolist()))
    notes = [
        f"{images:,} images of {patients:,} patients; {len(comparison.labels)} labels. Small"
        " figures: 95 % intervals, bootstrap by patient. Failed answers count as empty; an answer"
        " not in the format has Jaccard 0."
    ]
    if any(comparison.left_out.values()):
        notes.append(
            "Only images that all models answered; left out: "
            + ", ".join(
                f"{model} {count:,}" for model, count in comparison.left_out.items() if count
            )
            + "."
        )
    return Table(
        f"Scores on {comparison.data_set}", header, rows, notes + _support_notes(comparison)
    )


def _support_notes(comparison: Comparison) -> list[str]:
    empty = [label for label, count in zip(comparison.labels, comparison.support) if not count]
    if not empty:
        return []
    kept = [k for k, count in enumerate(comparison.support) if count]
    over = ", ".join(
        f"{model} {number(float(values['label_f1'][0, kept].mean()) if kept else None)}"
        for model, values in comparison.values.items()
    )
    return [
        f"Without any positive here: {', '.join(empty)}. Each counts as 0 in macro-F1, as in the"
        f" paper. Over the labels that have positives macro-F1 is: {over}."
    ]


# ---- what transferred ----------------------------------------------------------------------------
_PAPER_TRANSFER = (
    ("MedGemma", "MedGemma (SFT)"),
    ("MedGemma (SFT)", "MedGemma (ChexReason)"),
    ("MedGemma", "MedGemma (ChexReason)"),
)


def transfer_table(
    comparisons: Sequence[Comparison], home: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> Table:
    """Macro-F1 before and after, for each step and data set, with the relative change as the paper
    states it.
    """
    rows: list[list[Cell | str]] = []
    for before, after in pairs:
        for comparison in comparisons:
            if (before, after) not in comparison.p_values:
                continue
            moved = comparison.change(before, after, "macro_f1")
            where = "in distribution" if comparison.data_set in home else "across schemes"
            rows.append(
                [
                    f"{before} {ARROW} {after}",
                    comparison.data_set,
                    where,
                    number(moved.before),
                    number(moved.after),
                    signed(moved.after - moved.before, moved.difference),
                    _relative(moved),
                    p_text(moved.p_value),
                ]
            )
    return Table(
        "Change of macro-F1",
        ["Step", "Data set", "Labels", "Before", "After", "Difference", "Relative", "p"],
        rows,
        [
            "In distribution: the label scheme of the training data, all 14. Across schemes: the"
            " labels that another hospital's scheme can express. Intervals are paired: both models"
            " on the same resampled patients. p: permutation test by patient, two-sided. No"
            " correction for the number of comparisons."
        ],
        numbers_from=3,
    )


def _relative(moved: Change) -> Cell:
    if not moved.before:
        return Cell("-")
    return signed(moved.after / moved.before - 1, moved.relative, percent=True)


def paradox_table(found: Sequence[Transfer]) -> Table:
    """Who gained where: each step of ours, and the paper's."""
    rows: list[list[Cell | str]] = []
    for transfer in found:
        cells = [_verdict(side) for side in (transfer.home, transfer.away)]
        gap = Cell("-") if transfer.gap is None else signed(*transfer.gap, tone=False)
        rows.append([f"{transfer.before} {ARROW} {transfer.after}", *cells, gap, reading(transfer)])
    for before, after in _PAPER_TRANSFER:
        pair = [(macro[before], macro[after]) for macro in (published.MACRO_5, published.MACRO_6)]
        moved = [after - before for before, after in pair]
        shown = [
            Cell(
                f"{difference:+.3f}",
                f"{before:.3f} to {after:.3f}, {100 * difference / before:+.0f} %",
            )
            for difference, (before, after) in zip(moved, pair)
        ]
        rows.append(
            [
                Cell(f"paper: {before} {ARROW} {after}", tone="muted"),
                *shown,
                f"{moved[0] - moved[1]:+.3f}",
                "no interval published",
            ]
        )
    return Table(
        "Who gained where: change of macro-F1",
        [
            "Step",
            "In distribution",
            "Across schemes",
            "Gap: the former minus the latter",
            "Reading",
        ],
        rows,
        [
            "Gap: positive where a step did more for the scheme it was trained on than for the"
            " others. A reading of 'gains' or 'loses' needs a 95 % interval without 0. The paper's"
            " data sets: CheXpert test and NIH."
        ],
        numbers_to=4,
    )


def _verdict(moved: Change | None) -> Cell:
    return Cell("-") if moved is None else signed(moved.after - moved.before, moved.difference)


def reading(transfer: Transfer) -> str:
    """What a step's changes say in words: a gain or loss needs an interval without 0."""

    def word(moved: Change | None) -> str:
        return (
            "not measured"
            if moved is None
            else (
                "no clear change"
                if not moved.is_clear
                else "gains"
                if moved.after > moved.before
                else "loses"
            )
        )

    home, away = word(transfer.home), word(transfer.away)
    if (home, away) == ("gains", "loses"):
        return "gains at home, loses elsewhere: the paper's trade-off"
    if (home, away) == ("loses", "gains"):
        return "loses at home, gains elsewhere: the paper's paradox"
    gap = ""
    if transfer.gap is not None and (transfer.gap[1][0] > 0 or transfer.gap[1][1] < 0):
        gap = "; the gap moved " + (
            "towards home" if transfer.gap[0] > 0 else "towards the other schemes"
        )
    return (f"in both: {home}" if home == away else f"at home: {home}; elsewhere: {away}") + gap


def movers_table(comparison: Comparison, before: str, after: str) -> Table:
    """The F1 of each label before and after, largest gain first."""
    moves = [
        (label, int(count), comparison.label_change(before, after, label))
        for label, count in zip(comparison.labels, comparison.support)
    ]
    moves.sort(key=lambda move: move[2].before - move[2].after)
    rows = [
        [
            label,
            f"{count:,}" if count else NO_SUPPORT,
            *(number(value) if count else "-" for value in (moved.before, moved.after)),
            signed(moved.after - moved.before, moved.difference) if count else "-",
            p_text(moved.p_value) if count else "-",
        ]
        for label, count, moved in moves
    ]
    return Table(
        f"F1 by label on {comparison.data_set}: {before} {ARROW} {after}",
        ["Label", "Positives", "Before", "After", "Difference", "p"],
        rows,
        ["Largest gain first. Intervals and p-values are not adjusted for the number of labels."],
    )


def marginals_table(comparison: Comparison) -> Table:
    """How often each label is said against how often it is true."""
    columns = [LABELS.index(label) for label in comparison.labels]
    first = comparison.first
    shares = {
        model: said_and_true(
            *(
                getattr(answers, name)[:, columns]
                for name in ("targets", "predictions", "evaluated")
            )
        )
        for model, answers in comparison.predictions.items()
    }
    true = next(iter(shares.values()))[1]
    rows: list[list[Cell | str]] = [
        [
            label,
            f"{int(comparison.support[k]):,}" if comparison.support[k] else NO_SUPPORT,
            f"{100 * true[k]:.1f} %",
            *(
                Cell(f"{100 * said[k]:.1f} %", f"{said[k] / true[k]:.2f} x" if true[k] else "")
                for said, _ in shares.values()
            ),
        ]
        for k, label in enumerate(comparison.labels)
    ]
    rows.append(
        [
            Cell("mean distance from true", tone="muted"),
            "",
            "",
            *(f"{100 * np.nanmean(np.abs(said - true)):.1f} points" for said, _ in shares.values()),
        ]
    )
    base = next(iter(shares.values()))[0]
    rows.append(
        [
            Cell(f"mean distance from {next(iter(shares))}", tone="muted"),
            "",
            "",
            *(f"{100 * np.nanmean(np.abs(said - base)):.1f} points" for said, _ in shares.values()),
        ]
    )
    return Table(
        f"How often a label is said on {comparison.data_set}",
        ["Label", "Positives", "True", *(f"said by {model}" for model in shares)],
        rows,
        [
            f"Share of {len(first.ids):,} images, among those that evaluate the label; small"
            " figures: said / true."
        ],
    )


def diversity_table(comparisons: Sequence[Comparison]) -> Table:
    """Length and variety of the answers."""
    rows: list[list[Cell | str]] = []
    for comparison in comparisons:
        for model, answers in comparison.predictions.items():
            found = diversity(
                answers.texts,
                answers.label_sets(),
                answers.contradictions,
                answers.lengths,
                len(LABELS),
            )
            rows.append(
                [
                    model,
                    comparison.data_set,
                    Cell(
                        f"{found.length_mean:.1f}",
                        f"median {found.length_median:.0f}, at most {found.length_max:,}",
                    ),
                    f"{100 * found.distinct_completions / found.answers:.1f} %",
                    f"{found.distinct_label_sets:,}",
                    f"{found.label_set_entropy:.2f}",
                    f"{found.labels_per_answer:.2f}",
                    Cell(
                        f"{100 * found.most_frequent_share:.1f} %",
                        ", ".join(sorted(found.most_frequent_set)) or "(none)",
                    ),
                    f"{100 * found.contradiction_share:.1f} %",
                    f"{100 * found.all_labels_share:.1f} %",
                    Cell(f"{answers.num_unknown.sum():,}"),
                    ", ".join(
                        f"{problem} {count:,}" for problem, count in answers.problems.most_common(3)
                    )
                    or "-",
                ]
            )
    return Table(
        "Length and variety of the answers",
        [
            "Model",
            "Data set",
            "Tokens",
            "Distinct texts",
            "Label sets",
            "Their entropy, bits",
            "Labels an answer",
            "Commonest label set",
            "No Finding and a finding",
            "All 14 labels",
            "Unknown entries",
            "Commonest problems",
        ],
        rows,
        numbers_from=2,
        numbers_to=11,
    )


# ---- the paper's tables --------------------------------------------------------------------------
def prompt_key(name: str) -> str:
    """What a prompt's name and the paper's name of it share: "reasoning_self_check" and "Reasoning
    Self-Check" are one.
    """
    return re.sub("[^a-z0-9]", "", name.lower().replace("reasoning", "").replace("(baseline)", ""))


def paper_tables(
    entries: Sequence[Entry],
    comparisons: Sequence[Comparison],
    home: Sequence[str],
    nih: Mapping[str, Comparison],
) -> list[Table]:
    """Tables 1 to 6 with the paper's figures and ours. nih: {"nine", "ten": the comparison under
    that mapping}, or empty.
    """
    at_home = next((comparison for comparison in comparisons if comparison.data_set in home), None)
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


def _seven(entry: Entry, comparison: Comparison) -> list[Cell | str]:
    scores = comparison.scores[entry.name]["empty"]
    cells: list[Cell | str] = []
    for average in ("micro", "macro"):
        cells += [number(scores[average][key]) for key in ("precision", "recall")]
        cells.append(
            Cell(
                number(scores[average]["f1"]),
                bounds(comparison.interval(entry.name, f"{average}_f1")),
            )
        )
    return [*cells, number(float((~comparison.predictions[entry.name].parsed).mean()))]


def _baseline_rows(comparison: Comparison | None, skipped: int) -> list[list[Cell | str]]:
    """The rows of the trivial baselines on our data set; `skipped` empty cells lead to Micro P."""
    if comparison is None:
        return []
    return [
        [
            Cell(f"baseline: {title}", tone="muted"),
            *[""] * skipped,
            "",
            "",
            number(comparison.baselines[name]["micro_f1"]),
            "",
            "",
            number(comparison.baselines[name]["macro_f1"]),
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
    comparison: Comparison | None,
    *,
    short: bool = False,
) -> Table:
    """Tables 1 to 3: for each prompt or format the paper's row and ours; ours that have none in the
    paper come last.
    """
    ours = (
        []
        if comparison is None
        else [
            (entry, prompt_key(entry.prompt))
            for entry in entries
            if entry.name in comparison.scores
        ]
    )
    lines: list[list[Cell | str]] = []
    for name, row in rows.items():
        lines.append([name, f"paper, {model}", *map(number, row)])
        lines += [
            [name, f"{entry.name} ({entry.base})", *_seven(entry, comparison)]
            for entry, key in ours
            if key == prompt_key(name)
        ]
    known = {prompt_key(name) for name in rows}
    lines += [
        [entry.prompt, f"{entry.name} ({entry.base})", *_seven(entry, comparison)]
        for entry, key in ours
        if key not in known
    ]
    lines += _baseline_rows(comparison, 1)
    header = ["Prompt" if short else "Format", "Whose figures", *_SEVEN]
    if short:  # the paper prints only F1 and the fail rate
        kept = [0, 1, 4, 7, 8]
        header, lines = [header[k] for k in kept], [[line[k] for k in kept] for line in lines]
    return Table(
        f"Table {index}. {title}", header, lines, _notes(index, comparison), numbers_from=2
    )


def _notes(index: int, comparison: Comparison | None) -> list[str]:
    ours = (
        ["No run of ours is shown here: give one to compare."]
        if comparison is None
        else [
            f"Ours: {comparison.data_set}, {len(comparison.first.ids):,} images,"
            f" {int(comparison.support.sum()):,} positives; 95 % intervals in small figures."
        ]
    )
    return ours + list(published.NOTES[index])


def _reward_table(entries: Sequence[Entry], comparison: Comparison | None) -> Table:
    lines: list[list[Cell | str]] = []
    shown = [
        entry for entry in entries if comparison is not None and entry.name in comparison.scores
    ]
    for (reward, checkpoint), row in published.TABLE_4.items():
        lines.append([reward, checkpoint, "paper, MedGemma-4B", *map(number, row)])
        lines += [
            [reward, entry.checkpoint, f"{entry.name} ({entry.base})", *_seven(entry, comparison)]
            for entry in shown
            if entry.reward == reward
            and checkpoint in (entry.checkpoint.split(" = ") if entry.checkpoint else [])
        ]
    told = {line[2] for line in lines}
    lines += [
        [
            entry.reward,
            entry.checkpoint or "-",
            f"{entry.name} ({entry.base})",
            *_seven(entry, comparison),
        ]
        for entry in shown
        if f"{entry.name} ({entry.base})" not in told
    ]
    lines += _baseline_rows(comparison, 2)
    return Table(
        "Table 4. GRPO: rewards and checkpoints",
        ["Reward", "Checkpoint", "Whose figures", *_SEVEN],
        lines,
        _notes(4, comparison),
        numbers_from=3,
    )


def _label_tables(at_home: Comparison | None, nih: Mapping[str, Comparison]) -> list[Table]:
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
    comparison: Comparison | None,
    labels: Sequence[str],
) -> Table:
    """Tables 5 and 6: labels by the alphabet as in the paper, the best of the paper's models and
    the best of ours set off.
    """
    models = [] if comparison is None else list(comparison.values)
    lines: list[list[Cell | str]] = []
    for label in sorted(labels):
        line: list[Cell | str] = [label]
        if index == 5:
            line.append(f"{published.CHEXPERT_TEST_SUPPORT[label]}")
        line += _best([by_model[model][label] for model in by_model])
        if comparison is not None and label not in comparison.labels:
            line += ["-"] * (len(models) + 2)
        elif comparison is not None:
            k = comparison.labels.index(label)
            count = int(comparison.support[k])
            line.append(f"{count:,}" if count else NO_SUPPORT)
            values = [float(comparison.values[model]["label_f1"][0, k]) for model in models]
            line += _best(values) if count else ["-"] * len(models)
            line.append(number(2 * count / (_evaluating(comparison, k) + count)) if count else "-")
        lines.append(line)
    lines += _macro_lines(index, by_model, macros, comparison, models)
    header = [
        "Label",
        *(["Positives, paper's data"] if index == 5 else []),
        *(f"paper: {model}" for model in by_model),
    ]
    if comparison is not None:
        header += ["Positives, ours", *models, "baseline: all labels"]
    return Table(
        f"Table {index}. {title}",
        header,
        lines,
        _label_notes(index, by_model, macros, comparison, models),
    )


def _evaluating(comparison: Comparison, k: int) -> int:
    return int(comparison.first.evaluated[:, LABELS.index(comparison.labels[k])].sum())


def _best(values: Sequence[float]) -> list[Cell]:
    top = max(values, default=0.0)
    return [
        Cell(number(value), tone="best" if value == top and value > 0 else "") for value in values
    ]


def _macro_lines(
    index: int,
    by_model: Mapping[str, Mapping[str, float]],
    macros: Mapping[str, float],
    comparison: Comparison | None,
    models: Sequence[str],
) -> list[list[Cell | str]]:
    blank = [""] if index == 5 else []
    tail: list[Cell | str] = (
        []
        if comparison is None
        else [
            "",
            *_with_intervals(comparison, models, "macro_f1"),
            number(comparison.baselines["all_labels"]["macro_f1"]),
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
    if comparison is not None:
        lines.append(
            [
                "Micro F1",
                *blank,
                *[""] * len(by_model),
                "",
                *_with_intervals(comparison, models, "micro_f1"),
                number(comparison.baselines["all_labels"]["micro_f1"]),
            ]
        )
    return lines


def _with_intervals(comparison: Comparison, models: Sequence[str], figure: str) -> list[Cell]:
    values = [float(comparison.values[model][figure][0]) for model in models]
    return [
        Cell(cell.text, bounds(comparison.interval(model, figure)), cell.tone)
        for cell, model in zip(_best(values), models)
    ]


def _label_notes(
    index: int,
    by_model: Mapping[str, Mapping[str, float]],
    macros: Mapping[str, float],
    comparison: Comparison | None,
    models: Sequence[str],
) -> list[str]:
    notes = list(_notes(index, comparison)) + (
        _support_notes(comparison) if comparison is not None else []
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
