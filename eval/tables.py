"""Make the tables of scores, of labels and of answers, and write the numbers in tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.entries import UNKNOWN_KINDS
from eval.contrasts import Contrast
from eval.folders import Answers
from eval.names import BASELINE_TITLES
from eval.page import ARROW, Cell, Table
from eval.paired import Change, clear_change, diversity, holm, said_and_true

NO_SUPPORT = "no positives"
# the columns of the paper's tables 2 to 4
SEVEN = ("Micro P", "Micro R", "Micro F1", "Macro P", "Macro R", "Macro F1", "Fail")


def number(value: float | None) -> str:
    """Write a score with three digits, "-" for what is not known."""
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def bounds(interval: tuple[float, float]) -> str:
    """Write the interval of a score."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"


def signed(
    value: float,
    interval: tuple[float, float] | None = None,
    patients: int = 0,
    *,
    percent: bool = False,
) -> Cell:
    """Write a change with its interval, set off where it is clear by `paired.clear_change`.

    patients: on which the interval rests. 0 to set nothing off. percent: write shares as percent.
    """

    def form(x: float) -> str:
        return f"{100 * x:+.1f} %" if percent else f"{x:+.3f}"

    if interval is None:
        return Cell(form(value))
    detail = f"{form(interval[0])} to {form(interval[1])}"
    return Cell(form(value), detail, clear_change(interval, patients))


def signed_change(moved: Change, patients: int) -> Cell:
    """Write the difference of two models' scores, as `signed` does."""
    return signed(moved.size, moved.difference, patients)


def change_cells(moved: Change, patients: int) -> list[Cell]:
    """Write a score before and after, and the difference."""
    return [
        Cell(number(moved.before)),
        Cell(number(moved.after)),
        signed_change(moved, patients),
    ]


def p_text(value: float) -> str:
    """Write a p-value. Those of 10,000 permutations go down to 0.0001."""
    return "-" if np.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def p_cells(p_values: Sequence[float]) -> list[Cell]:
    """Write the p-values of a whole table, adjusted by `holm`, each with its own in small print."""
    return [
        Cell(p_text(adjusted), "" if np.isnan(p) else f"alone {p_text(p)}")
        for p, adjusted in zip(p_values, holm(p_values), strict=True)
    ]


def holm_note(p_values: Sequence[float]) -> str:
    """Say what the p-values of a table test, and for how many comparisons they are adjusted."""
    tested = int((~np.isnan(np.array(p_values, dtype=float))).sum())
    return (
        "p: permutation test by patient, two-sided, of whether the two models answer alike (not of"
        " whether they score alike: answers that differ can score the same); adjusted by Holm's"
        f" method for the {tested} comparison{'s' * (tested != 1)} of this table, in small print"
        " unadjusted."
    )


# ---- scores --------------------------------------------------------------------------------------
def scores_table(contrast: Contrast) -> Table:
    """List every model's scores on one data set with intervals, and the baselines.

    Failed answers are treated in three ways.
    """
    header = [
        "Model",
        *SEVEN[:6],
        "Jaccard",
        "Fail",
        "Macro F1, failed left out",
        "Macro F1, failed all wrong",
    ]
    rows: list[list[Cell | str]] = []
    for model, policies in contrast.policies.items():
        *scores, fail = seven_cells(contrast, model)
        jaccard = float(contrast.answers[model].jaccard.mean())
        others = [policies[policy]["macro"]["f1"] for policy in ("dropped", "all_wrong")]
        shown = Cell(number(jaccard), bounds(contrast.interval(model, "jaccard")))
        rows.append([model, *scores, shown, fail, *map(number, others)])
    for name, title in BASELINE_TITLES.items():
        jaccard = contrast.baselines[name]["jaccard"]
        cells = [*baseline_cells(contrast, name), number(jaccard), "", "", ""]
        rows.append([Cell(f"baseline: {title}", tone="muted"), *cells])
    notes = [
        f"{len(contrast.first.ids):,} images of {contrast.num_patients:,} patients;"
        f" {len(contrast.labels)} labels. In small"
        " print: 95 % intervals, bootstrap by patient. Failed answers count as empty; an answer"
        " not in the format has Jaccard 0."
    ]
    if any(contrast.left_out.values()):
        notes.append(
            "Only images that all models answered; left out: "
            + ", ".join(f"{model} {count:,}" for model, count in contrast.left_out.items() if count)
            + "."
        )
    return Table(f"Scores on {contrast.data_set}", header, rows, notes + support_notes(contrast))


def seven_cells(contrast: Contrast, model: str) -> list[Cell]:
    """Write a model's scores as SEVEN lists them, the F1 with their intervals."""
    scores = contrast.policies[model]["empty"]
    cells = []
    for average in ("micro", "macro"):
        cells += [Cell(number(scores[average][key])) for key in ("precision", "recall")]
        interval = bounds(contrast.interval(model, f"{average}_f1"))
        cells.append(Cell(number(scores[average]["f1"]), interval))
    return [*cells, Cell(number(float((~contrast.answers[model].parsed).mean())))]


def baseline_cells(contrast: Contrast, name: str) -> list[str]:
    """Write a baseline's scores under the first six of SEVEN, of which it has the F1."""
    micro, macro = (number(contrast.baselines[name][f"{kind}_f1"]) for kind in ("micro", "macro"))
    return ["", "", micro, "", "", macro]


def support_notes(contrast: Contrast) -> list[str]:
    """Note which labels have no positives, and macro-F1 over those that have some."""
    empty = [
        label for label, count in zip(contrast.labels, contrast.support, strict=True) if not count
    ]
    if not empty:
        return []
    kept = [k for k, count in enumerate(contrast.support) if count]
    over = ", ".join(
        f"{model} {number(float(values['label_f1'][0, kept].mean()) if kept else None)}"
        for model, values in contrast.values.items()
    )
    return [
        f"Without any positive here: {', '.join(empty)}. Each counts as 0 in macro-F1, as in the"
        f" paper. Over the labels that have positives macro-F1 is: {over}."
    ]


# ---- labels and answers --------------------------------------------------------------------------
def movers_table(contrast: Contrast, before: str, after: str) -> Table:
    """List the F1 of each label before and after, largest gain first."""
    moves = [
        (label, int(count), contrast.label_change(before, after, label))
        for label, count in zip(contrast.labels, contrast.support, strict=True)
    ]
    moves.sort(key=lambda move: -move[2].size)
    # a label without positives is not tested: its F1 is 0 whatever is said
    p_values = [moved.p_value if count else float("nan") for _, count, moved in moves]
    rows = [
        [
            label,
            f"{count:,}" if count else NO_SUPPORT,
            *(change_cells(moved, contrast.num_patients) if count else "---"),
            p_cell,
        ]
        for (label, count, moved), p_cell in zip(moves, p_cells(p_values), strict=True)
    ]
    return Table(
        f"F1 by label on {contrast.data_set}: {before} {ARROW} {after}",
        ["Label", "Positives", "Before", "After", "Difference", "p (Holm)"],
        rows,
        [
            "Largest gain first. Intervals are those of each label alone, not adjusted for their"
            f" number. {holm_note(p_values)}"
        ],
    )


def marginals_table(contrast: Contrast) -> Table:
    """List how often each label is said against how often it is true."""
    shares = {model: said_and_true(*contrast.matrices(model)) for model in contrast.answers}
    base, true = next(iter(shares.values()))
    rows: list[list[Cell | str]] = [
        [
            label,
            f"{int(contrast.support[k]):,}" if contrast.support[k] else NO_SUPPORT,
            f"{100 * true[k]:.1f} %",
            *(
                Cell(f"{100 * said[k]:.1f} %", f"{said[k] / true[k]:.2f} x" if true[k] else "")
                for said, _ in shares.values()
            ),
        ]
        for k, label in enumerate(contrast.labels)
    ]
    for name, other in (("true", true), (next(iter(shares)), base)):
        means = [100 * np.nanmean(np.abs(said - other)) for said, _ in shares.values()]
        title = Cell(f"mean distance from {name}", tone="muted")
        rows.append([title, "", "", *(f"{mean:.1f} points" for mean in means)])
    return Table(
        f"How often a label is said on {contrast.data_set}",
        ["Label", "Positives", "True", *(f"said by {model}" for model in shares)],
        rows,
        [
            f"Share of {len(contrast.first.ids):,} images, among those that evaluate the label; in"
            " small print: said / true."
        ],
    )


def diversity_table(contrasts: Sequence[Contrast]) -> Table:
    """List length and variety of the answers."""
    label_set = contrasts[0].label_set
    rows = [
        [model, contrast.data_set, *_diversity_cells(answers)]
        for contrast in contrasts
        for model, answers in contrast.answers.items()
    ]
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
            f"{label_set.exclusive} and a finding" if label_set.exclusive else "Contradictions",
            f"All {len(label_set.names)} labels",
            "With an unknown entry",
            "With no label at all",
            "Commonest problems",
        ],
        rows,
        [
            "With an unknown entry: answers with an entry that is no label; in small print these"
            " entries by what they say of a label L: negated (no L), affirmed (L: yes), qualified"
            " (left L) or other. With no label at all: answers whose entries are all"
            " unknown, which count as failed."
        ],
        numbers_from=2,
        numbers_to=12,
    )


def _diversity_cells(answers: Answers) -> list[Cell | str]:
    found = diversity(
        answers.texts,
        answers.label_sets(),
        answers.contradictions,
        answers.lengths,
        len(answers.label_set.names),
    )
    length = Cell("unknown")
    if not np.isnan(found.length_mean):
        spread = f"median {found.length_median:.0f}, at most {found.length_max:,.0f}"
        length = Cell(f"{found.length_mean:.1f}", spread)
    commonest = ", ".join(sorted(found.most_frequent_set)) or "(none)"
    problems = [f"{problem} {count:,}" for problem, count in answers.problems.most_common(3)]
    return [
        length,
        f"{100 * found.distinct_completions / found.answers:.1f} %",
        f"{found.distinct_label_sets:,}",
        f"{found.label_set_entropy:.2f}",
        f"{found.labels_per_answer:.2f}",
        Cell(f"{100 * found.most_frequent_share:.1f} %", commonest),
        f"{100 * found.contradiction_share:.1f} %",
        f"{100 * found.all_labels_share:.1f} %",
        _unknown_cell(answers),
        f"{100 * answers.no_label.mean():.1f} %",
        ", ".join(problems) or "-",
    ]


def _unknown_cell(answers: Answers) -> Cell:
    entries = zip(UNKNOWN_KINDS, answers.unknown_kinds.sum(axis=0), strict=True)
    return Cell(
        f"{100 * (answers.num_unknown > 0).mean():.1f} %",
        ", ".join(f"{count:,} {kind}" for kind, count in entries if count),
    )
