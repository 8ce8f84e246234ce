"""Say in one sentence and one table what GRPO has changed, at the end of a run.

The sentence is about the reward of sampled answers, which the run was trained on, and about the
scores of greedy answers, which decide. Both have 95 % intervals, so that a change within the noise
is called that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_json
from data.plain_files import is_plain, parse_record, plain_lines
from eval.end_table import end_table, stage_title
from eval.folders import START, VOTE, load_entry, read_log, read_record, result_files
from eval.metrics import interval, resampled_totals
from eval.paired import NO_CLEAR_CHANGE, clear_change
from eval.since_start import EVALUATIONS, since_start

SUMMARY = "summary.json"
RESAMPLES = 10_000


# ---- sampled reward ------------------------------------------------------------------------------
def sampled_reward(run: Path) -> dict[str, Any] | None:
    """Compare the reward of the run's first rollouts with that of its last -> a record, or None.

    The first and the last quarter of the rollouts in completions.jsonl, at least one each. The
    record has "first", "last", "difference", its 95 % "interval" and the number of "rollouts" in a
    quarter. With a single rollout it has "first" alone.

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
    }


def _means(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(invalid="ignore"):
        return totals[:, 0] / totals[:, 1], totals[:, 2] / totals[:, 3]


# ---- sentence ------------------------------------------------------------------------------------
def plain_sentence(
    reward: Mapping[str, Any] | None, rows: Sequence[Mapping[str, Any]], silenced: Mapping[str, Any]
) -> str:
    """Say what a run has changed, in one line.

    reward: `sampled_reward`. rows: of the final answers, as evaluations.jsonl has them.
    silenced: {data set: labels that the start still said and the final answers do not}.
    """
    parts = []
    if reward is not None and "last" not in reward:
        parts.append(f"sampled reward {reward['first']:.3f} (one rollout)")
    elif reward is not None:
        low, high = reward["interval"]
        parts.append(
            f"sampled reward {reward['first']:.3f} -> {reward['last']:.3f} (first against last"
            f" quarter, {reward['difference']:+.3f}, 95 % {low:+.3f} to {high:+.3f})"
        )
    compared = [row for row in rows if row.get("since_start")]
    if compared:
        shown = ", ".join(
            f"{row['dataset']} {change['difference']:+.3f} ({change['interval'][0]:+.3f} to"
            f" {change['interval'][1]:+.3f})"
            for row in compared
            for change in [row["since_start"]["macro_f1"]]
        )
        parts.append(f"greedy macro-F1 {shown}: {_verdict(compared)}")
        named = [f"{', '.join(labels)} ({name})" for name, labels in silenced.items() if labels]
        parts.append(f"silenced: {'; '.join(named) or 'no label'}")
    return "; ".join(parts)


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say where macro-F1 has clearly changed, by the rule of a report's verdict."""
    verdicts: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        interval_of = row["since_start"]["macro_f1"]["interval"]
        change = clear_change(interval_of, row.get("num_patients", row["n"]))
        verdicts[f"clear {change}" if change else NO_CLEAR_CHANGE].append(row["dataset"])
    numbers = " and ".join(dict.fromkeys(f"{row['n']:,}" for row in rows))
    if len(verdicts) == 1:
        return f"{next(iter(verdicts))} at n = {numbers}"
    words = "; ".join(f"{word} on {' and '.join(sets)}" for word, sets in verdicts.items())
    return f"{words}, at n = {numbers}"


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
    summary = {
        "sentence": plain_sentence(reward, since.rows, silenced),
        "sampled_reward": reward,
        "rows": since.rows,
        "gaps": since.gaps,
        "silenced": silenced,
    }
    write_json(run / SUMMARY, summary)
    return summary


def end_of_run(run: Path, names: Sequence[str], best: str | None) -> str:
    """Write summary.json of a finished GRPO run, and lay out its sentence and its end table.

    The table has the start, a vote of its answers, the best and the last evaluation of each data
    set.

    run: its folder. names: the data sets, that of the home hospital first. best: the best
    checkpoint's folder name, checkpoint-<step>, or None.
    """
    sentence = summarize(run, names)["sentence"]
    rows = {(row["dataset"], row["step"]): row for row in read_log(run / EVALUATIONS)}
    best_step = int(best.rpartition("-")[2]) if best else -1
    stages: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name in names:
        steps = [step for data_set, step in rows if data_set == name]
        chosen = [(0, "start"), (best_step, "best"), (max(steps, default=-1), "last")]
        stages[name] = [
            (f"{title} ({step})", rows[name, step] | ({"since_start": {}} if step == 0 else {}))
            for step, title in dict.fromkeys(chosen)
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
    return "\n".join([sentence, "", *end_table(stages, baselines), notes])
