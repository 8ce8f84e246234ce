"""Take curves out of the logs of training runs, so that they can be drawn: no picture is made here.

A log is the lines of a run's metrics.jsonl. A value that was logged as null (NaN or infinity) is a
NaN of the curve, so that a picture has a gap there. A step that comes twice, as after a resume,
counts as it was logged last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.reward_name import reward_name
from eval.folders import Entry, read_log

SMOOTHING = 0.95  # of the paper's captions
SETTLED = 400  # values from which on a curve is smoothed so much: its memory is a twentieth of them
GAP_SPAN = 0.1  # a gap's axis reaches at least this far up and down
GAPS = ("gap_shared", "gap")  # the first that is logged is drawn
HACKING = {  # logged by rl/monitors.py, in standard deviations of the run's start
    "monitors/trained_gain": "reward trained on",
    "monitors/other_gain": "other rewards",
    "monitors/f1_gain": "F1 of the labels",
}
BY_HOSPITAL = "reward/"  # in front of a hospital's name: the mean of what is trained on
_REWARDS = "rewards/"
_MEAN, _STD = "/mean", "/std"

Log = Sequence[Mapping]
Points = tuple[list[float], list[float]]  # positions on the x axis, values with NaN for gaps


@dataclass(frozen=True)
class Panel:
    """Describe one chart of a figure: a metric of a log.

    unit: what the vertical axis says. scale: "share" is 0 to 1. "zero" holds 0 and all values.
    "reward" also holds 1 where all values lie between -1 and 1. axis: panels that name the same one
    share it. split, over: see `series`.
    """

    metric: str
    title: str
    unit: str
    scale: Literal["share", "zero", "reward"] = "zero"
    axis: str = ""
    split: Literal["train", "eval"] = "train"
    over: Literal["step", "epoch"] = "step"


FIGURE_1 = (
    Panel("mean_token_accuracy", "Token accuracy", "share of tokens", "share"),
    Panel("loss", "Training loss", "nats a token", axis="loss"),
    Panel("loss", "Validation loss", "nats a token", axis="loss", split="eval", over="epoch"),
)
POLICY = (
    Panel("kl", "KL to the reference", "nats a token"),
    Panel("entropy", "Entropy", "nats a token"),
    Panel("completions/valid_rate", "Valid answers", "share of completions", "share"),
    Panel("completions/clipped_ratio", "Truncated answers", "share of completions", "share"),
)


def reward_panels(reward: str) -> tuple[Panel, ...]:
    """Return the three panels of figures 2 and 3, for the reward that was trained on.

    reward: the value of --reward.
    """
    mean = f"{_REWARDS}{reward_name(reward)}{_MEAN}"
    return (
        Panel("reward", "Total reward, as trained on", "reward", "reward"),
        Panel(mean, f"Mean {reward} reward", "its own units", "reward"),
        Panel("completions/mean_length", "Mean completion length", "tokens"),
    )


# ---- runs ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TrainingRun:
    """Hold what is drawn of one training run.

    reward: the value of --reward, "" where unknown or in SFT. log: lines of metrics.jsonl.
    """

    name: str
    stage: Literal["sft", "grpo"]
    reward: str
    log: Log


def training_runs(entries: Sequence[Entry]) -> tuple[list[TrainingRun], list[str]]:
    """Read the logs of the runs that trained the entries' models -> (runs, what is missing).

    A run that several entries name is read once. What is missing comes as one line an entry.
    """
    runs, problems, seen = [], [], set()
    for entry in entries:
        folder = entry.training or entry.folder
        file = folder / "metrics.jsonl"
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        log = read_log(file)
        if log:
            runs.append(_run_of(entry, log))
            if not _drawn(runs[-1]):
                runs.pop()
                problems.append(
                    f"{entry.name}: {file} holds none of what is drawn, such as"
                    f" {', '.join(panel.metric for panel in (*FIGURE_1[:2], *POLICY[:2]))} of"
                    " training or macro_f1 of an evaluation"
                )
        elif file.is_file():
            problems.append(f"{entry.name}: {file} holds no whole line with a step")
        elif entry.training is None:
            problems.append(
                f"{entry.name}: no training run belongs to {entry.folder}: it holds neither"
                " config.json nor metrics.jsonl, and its scores name no adapter that is there"
            )
        else:
            problems.append(f"{entry.name}: there is no {file}")
    return runs, problems


def _run_of(entry: Entry, log: Log) -> TrainingRun:
    names = reward_names(log)
    by_log: Literal["sft", "grpo"] = "grpo" if names or has_numbers(log, "reward") else "sft"
    stage = entry.stage if entry.stage in ("sft", "grpo") else by_log
    only = names[0] if len(names) == 1 else ""
    return TrainingRun(entry.name, stage, (entry.reward or only) if stage == "grpo" else "", log)


def _drawn(run: TrainingRun) -> bool:
    """Tell whether any curve is drawn of a run."""
    panels = FIGURE_1 if run.stage == "sft" else (*reward_panels(run.reward), *POLICY)
    return (
        any(points_of(run.log, panel)[0] for panel in panels)
        or bool(evaluated_sets(run.log))
        or any(has_numbers(run.log, metric) for metric in HACKING)
    )


# ---- what a log has ------------------------------------------------------------------------------
def _is_number(value: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 10**300  # a larger one is no float
    return isinstance(value, float)


def series(
    log: Log,
    metric: str,
    *,
    split: str = "train",
    data_set: str | None = None,
    over: str = "step",
) -> Points:
    """Take a metric out of a log -> (positions in rising order, values with NaN for gaps).

    split: "train" or "eval". data_set: of an evaluation, None for lines without one. over: the key
    that gives the position. Lines without the metric, or without a position, are no points.
    """
    points: dict[float, float] = {}
    for row in log:
        if row.get("split") != split or row.get("dataset") != data_set or metric not in row:
            continue
        position, value = row.get(over), row[metric]
        if _is_number(position) and (value is None or _is_number(value)):
            finite = value is not None and math.isfinite(value)
            points[row[over]] = float(value) if finite else math.nan
    positions = sorted(points)
    return positions, [points[position] for position in positions]


def has_numbers(
    log: Log, metric: str, *, split: str = "train", data_set: str | None = None
) -> bool:
    """Tell whether a log has any number of a metric."""
    values = series(log, metric, split=split, data_set=data_set)[1]
    return any(not math.isnan(value) for value in values)


def reward_names(log: Log) -> list[str]:
    """List the rewards that a log has a mean of, in the order in which they come."""
    found: dict[str, None] = {}
    for row in log:
        if row.get("split") == "train":
            for key in row:
                if key.startswith(_REWARDS) and key.endswith(_MEAN):
                    found[key.removeprefix(_REWARDS).removesuffix(_MEAN)] = None
    return list(found)


def hospital_names(log: Log) -> list[str]:
    """List the hospitals whose sampled reward a log has, in the order in which they come."""
    found: dict[str, None] = {}
    for row in log:
        if row.get("split") == "train":
            found |= {
                key.removeprefix(BY_HOSPITAL): None for key in row if key.startswith(BY_HOSPITAL)
            }
    return list(found)


def part_names(log: Log, reward: str) -> list[str]:
    """List the parts that a log has of a reward, in the order in which they come.

    reward: the name under which it is logged.
    """
    prefix = f"{_REWARDS}{reward}/"
    found: dict[str, None] = {}
    for row in log:
        if row.get("split") == "train":
            found |= {key.removeprefix(prefix): None for key in row if key.startswith(prefix)}
    return [name for name in found if f"/{name}" not in (_MEAN, _STD)]


def evaluated_sets(log: Log) -> list[str]:
    """List the data sets whose macro-F1 a log has, in the order in which they come."""
    return list(
        dict.fromkeys(
            row["dataset"]
            for row in log
            if row.get("split") == "eval" and "macro_f1" in row and row.get("dataset") is not None
        )
    )


@dataclass(frozen=True)
class GapCurve:
    """Hold a run's gap between data sets over optimizer steps.

    name: which gap it is, of GAPS. errors: its standard errors, NaN where none was logged.
    """

    name: str
    steps: list[float]
    values: list[float]
    errors: list[float]

    @property
    def reach(self) -> float:
        """Return the largest distance from 0 that the curve or its band of 2 errors has."""
        ends = [
            abs(value) + (0 if math.isnan(error) else 2 * error)
            for value, error in zip(self.values, self.errors, strict=True)
        ]
        return max((end for end in ends if not math.isnan(end)), default=0.0)


def gap_curve(log: Log) -> GapCurve | None:
    """Take the gap out of a log: gap_shared, else gap, else None where neither is there."""
    for name in GAPS:
        if has_numbers(log, name, split="eval"):
            steps, values = series(log, name, split="eval")
            errors = dict(zip(*series(log, f"{name}_se", split="eval"), strict=True))
            return GapCurve(name, steps, values, [errors.get(step, math.nan) for step in steps])
    return None


# ---- smooth, compare -----------------------------------------------------------------------------
def ema(values: Sequence[float], smoothing: float = SMOOTHING) -> list[float]:
    """Smooth values exponentially, without the lag of a start at 0 or at the first value.

    s_0 = 0, s_t = b s_(t-1) + (1 - b) x_t, and the curve is s_t / (1 - b^t): bias-corrected, as
    Adam's moments are (arXiv 1412.6980). A NaN stays NaN and counts for nothing.
    """
    smoothed, moment, weight = [], 0.0, 0.0
    for value in values:
        if math.isnan(value):
            smoothed.append(math.nan)
            continue
        moment = smoothing * moment + (1 - smoothing) * value
        weight = smoothing * weight + (1 - smoothing)  # 1 - b^t
        smoothed.append(moment / weight)
    return smoothed


def smoothing_for(count: int) -> float:
    """Choose the smoothing of a curve of so many values: 0.95, and 1 - 20 / count for a short one.

    The memory of 0.95 is 20 values. Over a run of 100 it would make any fast change look slow.
    """
    memory = (1 - SMOOTHING) * SETTLED
    return max(0.0, min(SMOOTHING, 1 - memory / max(count, 1)))


def points_of(log: Log, panel: Panel) -> Points:
    """Take what a panel draws out of a log."""
    return series(log, panel.metric, split=panel.split, over=panel.over)


def panels_to_draw(
    panels: Sequence[Panel], logs: Mapping[str, Log]
) -> tuple[list[Panel], list[str]]:
    """Leave out panels that no log has and panels equal to an earlier one -> (panels, why).

    logs: {run: its log}. why: one sentence for each panel that is left out.
    """
    kept: list[tuple[Panel, list[Points]]] = []
    left_out = []
    for panel in panels:
        curves = [points_of(log, panel) for log in logs.values()]
        if not any(values for _, values in curves):
            left_out.append(f"{panel.title}: not logged.")
            continue
        twin = next(
            (
                earlier
                for earlier, others in kept
                if (earlier.split, earlier.over) == (panel.split, panel.over)
                and _equal(curves, others)
            ),
            None,
        )
        if twin is not None:
            left_out.append(f"{panel.title}: the same curve as {twin.title}.")
            continue
        kept.append((panel, curves))
    return [panel for panel, _ in kept], left_out


def _equal(curves: Sequence[Points], others: Sequence[Points]) -> bool:
    return all(
        positions == other_positions
        and all(
            math.isclose(value, other, rel_tol=1e-9, abs_tol=1e-12)
            or (math.isnan(value) and math.isnan(other))
            for value, other in zip(values, other_values, strict=True)
        )
        for (positions, values), (other_positions, other_values) in zip(curves, others, strict=True)
    )


def axis_limits(scale: str, values: Sequence[float]) -> tuple[float, float]:
    """Choose the ends of a vertical axis, so that a small change does not look large.

    scale: as in `Panel`. values: all that is drawn on the axis, NaN ignored.
    """
    finite = [value for value in values if not math.isnan(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if scale == "share" or (scale == "reward" and low >= -1 and high <= 1):
        low, high = min(low, 0.0), max(high, 1.0)
    margin = 0.04 * (high - low) or 1.0
    return low - margin if low < 0 else -0.25 * margin, high + margin


def smoothing_note() -> str:
    """Say how faint and bold lines of a figure differ."""
    return (
        "Faint: logged values; bold: their exponential moving average s_t / (1 - b^t) with"
        f" b = {SMOOTHING}, or 1 - 20/n for a curve of n < {SETTLED} values. A break: no number was"
        " logged."
    )
