"""Say in one sentence and one table what GRPO has changed, at the end of a run: what rose and fell.

The sentence is about the reward of sampled answers, which the run was trained on, and about Jaccard
and macro-F1 of greedy answers on each data set. All have 95 % intervals: what lies beyond its
interval rose or fell, all else is no clear change.

Data sets differ in their labels. One with fewer is scored on its own, and home also on those that
the others share, so that a fall abroad can be told from a fall of the labels that are left.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_json
from data.plain_files import is_plain, parse_record, plain_lines
from eval.end_table import SHARED, WIDTH, clipped, end_table, stage_title
from eval.folders import START, VOTE, load_entry, read_log, read_record, result_files
from eval.metrics import interval, resampled_totals
from eval.paired import FEW_PATIENTS, NO_CLEAR_CHANGE, clear_change
from eval.since_start import EVALUATIONS, since_start

SUMMARY = "summary.json"
RESAMPLES = 10_000


# ---- sampled reward ------------------------------------------------------------------------------
def sampled_reward(run: Path) -> dict[str, Any] | None:
    """Compare the reward of the run's first rollouts with that of its last -> a record, or None.

    The first and the last quarter of the rollouts in completions.jsonl, at least one each. The
    record has "first", "last", "difference", its 95 % "interval", the number of "rollouts" in a
    quarter and of "patients" in both. With a single rollout it has "first" alone.

    Completions of one prompt and images of one patient resemble each other, and in a run of
    several epochs an image is in both quarters. So whole patients are drawn, with all of their
    completions in both.
    """
    rewards: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    path = run / "completions.jsonl"
    if not is_plain(path):
        return None
    for line in plain_lines(path):
        try:
            row = parse_record(line)
            rewards[row["step"]][row["patient_id"]].append(float(row["reward"]))
        except (ValueError, KeyError, TypeError):  # torn by the end of a process
            continue
    steps = sorted(rewards)
    if not steps:
        return None
    quarter = max(1, len(steps) // 4)
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for place, chosen in ((0, steps[:quarter]), (2, steps[-quarter:])):
        for step in chosen:
            for patient, values in rewards[step].items():
                totals[patient][place : place + 2] += sum(values), len(values)
    sums = np.stack(list(totals.values()))  # [P, 4]: reward and completions, first and last
    first, last = _means(sums.sum(axis=0)[None])
    if len(steps) == 1:
        return {"first": float(first[0]), "rollouts": 1}
    drawn = np.subtract(*reversed(_means(resampled_totals(sums, seed=0, resamples=RESAMPLES))))
    drawn = drawn[np.isfinite(drawn)]  # without the draws that miss a quarter
    return {
        "first": float(first[0]),
        "last": float(last[0]),
        "difference": float(last[0] - first[0]),
        "interval": list(interval(drawn)),
        "rollouts": quarter,
        "patients": len(totals),
    }


def _means(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(invalid="ignore"):
        return totals[:, 0] / totals[:, 1], totals[:, 2] / totals[:, 3]


# ---- sentence ------------------------------------------------------------------------------------
def plain_sentence(
    reward: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    silenced: Mapping[str, Any],
    kept: tuple[int, int] | None = None,
) -> str:
    """Say what a run has changed, in one line.

    reward: `sampled_reward`. rows: of the final answers, as evaluations.jsonl has them, home first.
    silenced: {data set: labels that the start still said and the final answers do not}. kept: the
    step of the final adapter and the last step, where the run has gone back to an earlier one.
    """
    parts = [_reward_words(reward)] if reward is not None else []
    if kept is not None:
        start = " (the start: nothing was better)" if kept[0] == 0 else ""
        parts.append(f"kept: step {kept[0]} of {kept[1]}{start}")
    compared = [row for row in rows if row.get("since_start")]
    if compared:
        parts += _greedy_words(compared, knows_home=compared[0] is rows[0])
        named = [f"{', '.join(labels)} ({name})" for name, labels in silenced.items() if labels]
        parts.append(f"silenced: {'; '.join(named) or 'no label'}")
    return "; ".join(parts)


def _reward_words(reward: Mapping[str, Any]) -> str:
    if "last" not in reward:
        return f"sampled reward {reward['first']:.3f} (one rollout)"
    word = _VERBS[clear_change(reward["interval"], reward["patients"])]
    low, high = reward["interval"]
    return (
        f"sampled reward {'' if word == NO_CLEAR_CHANGE else f'{word} '}{reward['first']:.3f} ->"
        f" {reward['last']:.3f}{f', {word}' if word == NO_CLEAR_CHANGE else ''} (first against last"
        f" quarter, {reward['difference']:+.3f}, 95 % {low:+.3f} to {high:+.3f})"
    )


_VERBS = {"gain": "rose", "loss": "fell", "": NO_CLEAR_CHANGE}


def _greedy_words(rows: Sequence[Mapping[str, Any]], *, knows_home: bool) -> list[str]:
    """Say where the scores of greedy answers have risen and fallen, Jaccard before macro-F1.

    Jaccard is what the rewards are made of, macro-F1 counts rare labels like frequent ones. Where
    nothing is clear the table has the numbers.

    rows: those that are compared with their start. knows_home: the first is of the home hospital.
    """
    enough = [row for row in rows if row.get("num_patients", row["n"]) >= FEW_PATIENTS]
    few = [clipped(row["dataset"]) for row in rows if row not in enough]
    everywhere = f"{NO_CLEAR_CHANGE}{' anywhere' if len(rows) > 1 else ''}"
    found = {}
    for metric, title in (("jaccard", "Jaccard"), ("macro_f1", "macro-F1")):
        places: dict[str, list[str]] = {word: [] for word in _VERBS.values()}
        for row in enough:
            is_home = knows_home and len(rows) > 1 and row is rows[0]
            for place, change in _places(row, rows[0], metric, is_home=is_home):
                word = _VERBS[clear_change(change["interval"], row.get("num_patients", row["n"]))]
                numbers = "" if word == NO_CLEAR_CHANGE else f" {_numbers(change)}"
                places[word].append(f"{place}{numbers}")
        moved = places["rose"] or places["fell"]
        told = [f"{word} {', '.join(where)}" for word, where in places.items() if where]
        found[title] = f" {', '.join(told)}" if moved else f": {everywhere}"
    parts = []
    if enough and all(words == f": {everywhere}" for words in found.values()):
        parts = [f"greedy {' and '.join(found)}: {everywhere}"]
    elif enough:
        parts = [f"greedy {title}{words}" for title, words in found.items()]
    if few:
        parts.append(f"too few patients to tell (under {FEW_PATIENTS}): {', '.join(few)}")
    return [*parts, f"n = {' and '.join(dict.fromkeys(format(row['n'], ',') for row in rows))}"]


def _places(
    row: Mapping[str, Any], home: Mapping[str, Any], metric: str, *, is_home: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Give the places where one data set is compared with its start -> (words for it, change).

    A set with other labels than home tells their number. For macro-F1 home is a second place on the
    labels that it shares with the others, where those are fewer.
    """
    changes, name = row["since_start"], clipped(row["dataset"])
    shared = metric == "macro_f1" and SHARED in changes
    if is_home:
        yield f"at home ({name})", changes[metric]
        if shared:
            yield f"at home on {_shared(row)}", changes[SHARED]
    elif shared:
        yield f"on {name}, {_shared(row)}", changes[SHARED]
    else:
        count = row.get("num_labels")
        labels = "" if count == home.get("num_labels") else f", {count} labels"
        yield f"on {name}{labels}", changes[metric]


def _shared(row: Mapping[str, Any]) -> str:
    counts = dict.fromkeys(row["shared_labels"])
    return f"{' to '.join(map(str, counts))} shared labels"


def _numbers(change: Mapping[str, Any]) -> str:
    low, high = change["interval"]
    return f"{change['difference']:+.3f} ({low:+.3f} to {high:+.3f})"


# ---- at the end ----------------------------------------------------------------------------------
def summarize(run: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write summary.json of a finished run and return what it holds.

    "sentence", "sampled_reward", "rows" of the final answers to each data set, "gaps", and
    "silenced" by data set: the labels that the final answers have silenced since the start.

    run: its folder. names: the data sets, that of the home hospital first.
    """
    since = since_start(run, names)
    silenced = {}
    for row in since.rows:
        before = read_record(result_files(run / START, row["dataset"])[1])
        silenced[row["dataset"]] = [
            label
            for label in row.get("silenced_labels", ())
            if label not in before.get("silenced_labels", ())
        ]
    reward = sampled_reward(run)
    steps = {read_record(result_files(run, row["dataset"])[1]).get("step") for row in since.rows}
    last = max((row["step"] for row in read_log(run / EVALUATIONS)), default=None)
    final = steps.pop() if len(steps) == 1 else None
    kept = None if final is None or last in (None, final) else (int(final), int(last))
    summary = {
        "sentence": plain_sentence(reward, since.rows, silenced, kept),
        "sampled_reward": reward,
        "rows": since.rows,
        "gaps": since.gaps,
        "silenced": silenced,
    }
    write_json(run / SUMMARY, summary)
    return summary


def end_of_run(run: Path, names: Sequence[str], best: str | None) -> str:
    """Write summary.json of a finished GRPO run, and lay out its sentence and its end table.

    The table has what the sampled reward has won, and of each data set the start, a vote of its
    answers, the best and the last evaluation. Its lines and the sentence's have at most 100
    columns.

    run: its folder. names: the data sets, that of the home hospital first. best: the best
    checkpoint's folder name, checkpoint-<step>, or None.
    """
    summary = summarize(run, names)
    sentence = textwrap.fill(
        summary["sentence"], WIDTH, break_on_hyphens=False, break_long_words=False
    )
    rows = {(row["dataset"], row["step"]): row for row in read_log(run / EVALUATIONS)}
    best_step = int(best.rpartition("-")[2]) if best else -1
    stages: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name in names:
        steps = [step for data_set, step in rows if data_set == name]
        titles: dict[int, list[str]] = defaultdict(list)  # one line where two are the same step
        for step, title in ((0, "start"), (best_step, "best"), (max(steps, default=-1), "last")):
            titles[step].append(title)
        stages[name] = [
            (
                f"{', '.join(named)} ({step})",
                rows[name, step] | ({"since_start": {}} if step == 0 else {}),
            )
            for step, named in titles.items()
            if (name, step) in rows
        ]
    for row in since_start(run, names, run / VOTE).rows:
        scores = read_record(result_files(run / VOTE, row["dataset"])[1])
        title = stage_title(load_entry("vote", run / VOTE), scores)
        stages[row["dataset"]].insert(1, (title, row))
    scores = {name: read_record(result_files(run, name)[1]) for name in names}
    baselines = {
        name: {"baselines": of_set["baselines"]} for name, of_set in scores.items() if of_set
    }
    if not any(stages.values()):
        return sentence
    notes = (
        "(95 % interval by patient; after the start, the change since then and its interval, of the"
        " same\npatients; failed answers count as empty, answers not in the format have Jaccard 0)"
    )
    header, *table = end_table(stages, baselines)
    return "\n".join([sentence, "", header, *_reward_row(summary["sampled_reward"]), *table, notes])


def _reward_row(reward: Mapping[str, Any] | None) -> list[str]:
    """Lay out what the reward of the rollouts has won, a line of the table that spans it."""
    if reward is None or "last" not in reward:
        return []
    return [
        f"rollouts, sampled reward: {reward['first']:.3f} -> {reward['last']:.3f}"
        f" {_numbers(reward)}, first and last quarter"
    ]
