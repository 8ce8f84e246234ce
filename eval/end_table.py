"""Lay out the table that ends a run or an evaluation, with the same columns wherever it is printed.

A block of lines is a data set, a line in it a stage: the start, the best and the last step of a
run, the vote of several answers, one finished model. A score has its 95 % interval, or, where the
stage is compared with a run's start, its paired change with that change's interval below. A data
set with labels that the others lack has the change of macro-F1 on the shared ones below that.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from eval.folders import Entry
from eval.names import BASELINE_TITLES, SCORE_TITLES, STAGE_TITLES

METRICS = {score: SCORE_TITLES[score] for score in ("jaccard", "micro_f1", "macro_f1")}
SHARED = "macro_f1_shared"  # change of macro-F1 on the labels that the other side can express
WIDTH = 100  # columns of a console
# beside "empty", the line of the stage
_POLICIES = {"dropped": "failed left out", "all_wrong": "failed all wrong"}
_NAME_WIDTH = 60  # of a name in a line of its own


# ---- rows ----------------------------------------------------------------------------------------
def row_of(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what the table shows out of a data set's scores, as evaluations.jsonl keeps it."""
    kept = (
        *("n", "num_patients", "jaccard", "intervals", "fail_rate", "unknown_rate"),
        *("silenced_labels", "reward"),
    )
    row = {key: scores[key] for key in kept if key in scores}
    return row | {f"{kind}_f1": scores[kind]["f1"] for kind in ("micro", "macro")}


def stage_title(entry: Entry, scores: Mapping[str, Any] | None = None) -> str:
    """Name the model of a folder: its stage with the step, and whether its answers are a vote.

    scores: of one of its data sets, which say how many answers voted.
    """
    again = entry.settings.get("predictions")  # kept answers: of whom, nobody wrote down
    title = "answers" if again else STAGE_TITLES.get(entry.stage, "answers")
    if entry.served:
        title = clipped(entry.served.rpartition("/")[2])
    votes = ((scores or {}).get("samples") or {}).get("num_generations", 1)
    if votes > 1:
        return f"vote of {votes}" if title == "answers" else f"{title} + vote of {votes}"
    return title if title == "answers" or entry.step is None else f"{title} ({entry.step})"


# ---- table ---------------------------------------------------------------------------------------
def end_table(
    stages: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
    more: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[str]:
    """Lay out stages of data sets -> lines of at most 100 columns.

    stages: {data set: [(title of a stage, its `row_of`)]}. A row that has "since_start" shows the
    change instead of an interval of its own. more: {data set: scores}, for the other treatments of
    failed answers and the baselines.
    """
    header = ("data set / stage", "n", *METRICS.values(), "fail", "unknown")
    table: list[tuple[str, ...]] = [header]
    names: dict[int, str] = {}  # line before which a data set's name stands
    for name, rows in stages.items():
        names[len(table)] = clipped(name, _NAME_WIDTH)
        for title, row in rows:
            table += _stage_lines(title, row)
        table += _other_lines((more or {}).get(name, {}))
    lines = []
    for index, line in enumerate(aligned(table, "<><<<>>")):
        lines += [names[index]] if index in names else []
        lines.append(line)
    return lines + silenced_lines(stages)


def _stage_lines(title: str, row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    changes = row.get("since_start") or {}
    cells, below = [], []
    for metric in METRICS:
        value = f"{row[metric]:.3f}"
        if metric in changes:
            cells.append(f"{value} {changes[metric]['difference']:+.3f}")
            low, high = changes[metric]["interval"]
            below.append(f"{low:+.3f} to {high:+.3f}")
        elif metric in row.get("intervals", {}):
            low, high = row["intervals"][metric]
            cells.append(f"{value} ({_bound(low)}-{_bound(high)})")
        else:
            cells.append(value)
    rates = [row.get("fail_rate"), row.get("unknown_rate")]
    shown = ["-" if rate is None else f"{rate:.3f}" for rate in rates]
    lines = [(f"  {title}", str(row["n"]), *cells, *shown)]
    if below:
        lines.append(("    95 %", "", *below, "", ""))
    if change := changes.get(SHARED):
        low, high = change["interval"]
        count = " to ".join(dict.fromkeys(map(str, row["shared_labels"])))
        lines.append((f"    {count} shared", "", "", "", f"{change['difference']:+.3f}", "", ""))
        lines.append(("    95 %", "", "", "", f"{low:+.3f} to {high:+.3f}", "", ""))
    return lines


def _bound(value: float) -> str:
    """Write a bound of an interval in four characters: .690, and 1.00 for one."""
    text = f"{value:.3f}"
    return text[:4] if text.startswith("1") else text.removeprefix("0")


def _other_lines(scores: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Show the other treatments of failed answers, where there are any, and the baselines."""
    lines = []
    if scores.get("fail_rate"):
        for key, title in _POLICIES.items():
            policy = scores["failure_policies"][key]
            both = (f"{policy[metric]:.3f}" for metric in ("micro_f1", "macro_f1"))
            lines.append((f"  {title}", "", "", *both, "", ""))
    for key, title in BASELINE_TITLES.items() if "baselines" in scores else ():
        baseline = (f"{scores['baselines'][key][metric]:.3f}" for metric in METRICS)
        lines.append((f"  {title}", "", *baseline, "", ""))
    return lines


def silenced_lines(
    stages: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]],
) -> list[str]:
    """Name the silenced labels of each stage, nothing where no row tells of them."""
    known = [row for rows in stages.values() for _, row in rows if "silenced_labels" in row]
    if not known:
        return []
    found = [
        f"{clipped(name, _NAME_WIDTH)}, {title}: {', '.join(row['silenced_labels'])}"
        for name, rows in stages.items()
        for title, row in rows
        if row.get("silenced_labels")
    ]
    if not found:
        return ["silenced labels: none"]
    lines = ["silenced labels (true 10 times or more, said less than a quarter of that):"]
    for text in found:
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def with_interval(value: float, interval: Sequence[float]) -> str:
    """Write a score with its interval."""
    return f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


def change_with_interval(change: float, interval: Sequence[float]) -> str:
    """Write a change of a score with its interval. Signs tell it from a score."""
    return f"{change:+.3f} ({interval[0]:+.3f}..{interval[1]:+.3f})"


def clipped(name: str, width: int = 22) -> str:
    """Shorten a data set's name to the width of its column, or to that of a line of its own."""
    if len(name) <= width:
        return name
    kept = width - len("...")
    return f"{name[: kept - kept // 2]}...{name[-(kept // 2) :]}"


def aligned(table: Sequence[tuple[str, ...]], alignments: str) -> list[str]:
    """Lay out the rows of a text table in columns -> its lines.

    alignments: "<" or ">" for each column.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, alignments, widths, strict=True)
        ).rstrip()
        for row in table
    ]
