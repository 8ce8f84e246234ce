"""Draw the logs of training runs: what was learned, what transferred, and the paper's figures.

    # needs the extra: pip install -e '.[plots]'
    python -m eval.figures runs/sft-* runs/20260101-120000-grpo --output_dir figures

They are written as PNG and SVG, from each run's metrics.jsonl:

    macro-f1            macro-F1 of every evaluated set by step, and the gap between the sets
    figure-1            SFT: token accuracy, training and validation loss
    figure-2, figure-3  GRPO on the nuanced and on the hard reward, as in the paper
    training-<reward>   the same for a reward of any other name
    reward-parts-...    the parts of the reward that was trained on
    policy              KL, entropy, valid and truncated answers of GRPO
    reward-hacking      what the reward has gained beside what the labels have
    reliability-<set>   of folders with votes: how often a label is true where so many say it

Faint lines are the logged values, bold lines their exponential moving average (`curves.ema`).
"""

from __future__ import annotations

import io
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import UsageError, parse_config, setting
from engine.runtime import main_guard
from eval.curves import (
    FIGURE_1,
    GAP_SPAN,
    HACKING,
    POLICY,
    GapCurve,
    Log,
    Panel,
    Points,
    TrainingRun,
    axis_limits,
    ema,
    evaluated_sets,
    gap_curve,
    has_numbers,
    panels_to_draw,
    part_names,
    points_of,
    reward_names,
    reward_panels,
    series,
    smoothing_for,
    smoothing_note,
    training_runs,
)
from eval.folders import Entry, flag_first, load_entries
from eval.page import Picture, picture_file
from eval.pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "the pictures need matplotlib: pip install -e '.[plots]'"
_DASHES = ("-", "--", "-.", ":")  # 7 colours and 4 dashes: 28 curves before a pair comes again
_MARKERS = "osD^vPX"
_WIDE = 2  # charts side by side: more could not be read on a phone
_MOST_CHARTS = 4  # in one picture
_FAINT_AND_BOLD = "Faint: as logged; bold: smoothed"
_FIGURES = {"nuanced": "figure-2", "hard": "figure-3"}  # the paper's, by the reward trained on


# ---- draw ----------------------------------------------------------------------------------------
def available() -> bool:
    """Tell whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401  all that is asked is whether it is there
    except ImportError:
        return False
    return True


@contextmanager
def _figure(
    rows: int, columns: int, *, height: float, width: float = 4.2
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Give a figure and its axes, row by row, in one style. Raises UsageError without matplotlib.

    height, width: of one chart, inches.
    """
    if not available():
        raise UsageError(MISSING)
    # here: it is an extra. Not pyplot, which would keep state and choose a screen.
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {  # matplotlib types its parameters as a Literal of some 300 names
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e3e6ea",
        "svg.hashsalt": "chexreason",
        "legend.frameon": False,
        "text.parse_math": False,  # a run's name may hold dollars
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _rendered(figure: Figure, form: str) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None  # nothing of a picture is by the clock
    figure.savefig(file, format=form, dpi=150, metadata=metadata)
    return file.getvalue()


def _grid(charts: int) -> tuple[int, int]:
    """Return (rows, columns) for so many charts."""
    return math.ceil(charts / _WIDE), min(charts, _WIDE)


def _wrapped(name: str, width: int = 38) -> str:
    """Break a long name into lines, so that all of it can be read."""
    return "\n".join(textwrap.wrap(name, width)) or name


def _label_axes(axis: Axes, title: str, unit: str, over: str = "step") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(_wrapped(title), fontsize=10.5)
    axis.set_xlabel("epoch" if over == "epoch" else "optimizer step")
    axis.set_ylabel(unit)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _plot(
    axis: Axes, points: Points, index: int, label: str, *, smooth: bool, faint: float = 0.35
) -> str:
    """Draw one curve, with marks where it was not smoothed or a point stands alone.

    index: of the curve in its chart, for colour, dash and mark. Returns what it shows in words.
    """
    steps, values = points
    bold = ema(values, smoothing_for(len(values))) if smooth else values
    colour, dash = COLOURS[index % len(COLOURS)], _DASHES[index % len(_DASHES)]
    marker = _MARKERS[index % len(_MARKERS)]
    if smooth:
        axis.plot(steps, values, color=colour, alpha=faint, linewidth=0.9)
    number = np.concatenate([[False], ~np.isnan(bold), [False]])
    alone = number[1:-1] & ~number[:-2] & ~number[2:]  # a line would not show them
    every = np.flatnonzero(alone if smooth else number[1:-1]).tolist()
    axis.plot(
        steps,
        bold,
        color=colour,
        linewidth=2,
        linestyle=dash,
        marker=marker if every else "",
        markersize=5,
        markevery=every or None,
        label=_wrapped(label),
    )
    shown = [(step, value) for step, value in zip(steps, bold, strict=True) if value == value]
    if not shown:
        return f"{label}: no number"
    (first, start), (last, end) = shown[0], shown[-1]
    return f"{label}: {start:.3g} at {first:g}, {end:.3g} at {last:g}"


def _head(figure: Figure, text: str) -> None:
    """Say at the top what the whole picture shows."""
    columns = round(figure.get_figwidth() / 4.2)
    figure.suptitle(_wrapped(text, 62 * columns), fontsize=9, color="#444444")


def _legend_below(axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        longest = max(len(line) for label in labels for line in label.splitlines() or [""])
        axis.legend(
            handles,
            labels,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.2),
            ncols=max(1, min(len(labels), 46 // (longest + 8))),
            fontsize=9,
            handlelength=3,
        )


def _figure_legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    """Put one legend for all charts, in a place without a chart or below them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    handles, labels = list(found.values()), list(found)
    if not handles:
        return
    if not axes[-1].axison and len(labels) <= 6:
        axes[-1].legend(handles, labels, loc="center", fontsize=9, handlelength=3)
        return
    longest = max(len(line) for label in labels for line in label.splitlines() or [""])
    legend: Any = figure.legend  # its types forget `ncols`
    legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, min(len(found), 46 * columns // (longest + 8))),
        fontsize=9,
        handlelength=3,
    )


def draw_training(
    name: str,
    caption: str,
    logs: Mapping[str, Log],
    panels: Sequence[Panel],
    form: str = "svg",
    *,
    title: str = "Training",
) -> Picture:
    """Draw curves of several runs, one chart a panel.

    A panel that no run has logged, or that equals an earlier one, is left out, and the caption says
    so. Validation curves are drawn as they are, training curves faint and smoothed.

    name, caption: of the picture. logs: {run: lines of metrics.jsonl}. form: "svg" or "png".
    title: stands in the picture, as its file is also looked at alone.

    Raises UsageError without matplotlib.
    """
    panels, left_out = panels_to_draw(panels, logs)
    curves = {
        panel: {run: points for run, log in logs.items() if (points := points_of(log, panel))[0]}
        for panel in panels
    }
    told = []
    rows, columns = _grid(max(1, len(panels)))
    with _figure(rows, columns, height=3.3) as (figure, axes):
        for axis, panel in zip(axes, panels, strict=False):
            for index, run in enumerate(logs):
                if run in curves[panel]:
                    smooth = panel.split == "train"
                    shown = _plot(axis, curves[panel][run], index, run, smooth=smooth)
                    told.append(f"{panel.title} of {shown}")
                else:
                    left_out.append(f"{panel.title}: not logged by {run}.")
            sharing = [
                other
                for other in panels
                if other == panel or (panel.axis and other.axis == panel.axis)
            ]
            values = [y for other in sharing for _, ys in curves[other].values() for y in ys]
            _label_axes(axis, panel.title, panel.unit, panel.over)
            axis.set_ylim(*axis_limits(panel.scale, values))
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        _head(figure, f"{title}. {_FAINT_AND_BOLD}")
        _figure_legend(figure, axes, columns)
        data = _rendered(figure, form)
    over = sorted({panel.over for panel in panels}, reverse=True)
    alt = f"Line charts over {' and '.join(over) or 'step'}. {'; '.join(told)}."
    return _picture(name, data, form, alt, " ".join([caption, *left_out]))


def draw_macro_f1(name: str, logs: Mapping[str, Log], form: str = "svg") -> Picture:
    """Draw macro-F1 of every evaluated set by step, and beside it the gap between the sets.

    One row a run. The gap is gap_shared with a band of 2 standard errors, or gap in a run that has
    logged no other. All gaps have one axis, the same up and down.

    logs: {run: lines of metrics.jsonl}, each with an evaluation. Raises UsageError without
    matplotlib.
    """
    gaps = {run: gap_curve(log) for run, log in logs.items()}
    reach = max([GAP_SPAN, *(1.1 * gap.reach for gap in gaps.values() if gap)])
    columns = 2 if any(gaps.values()) else 1
    told = []
    with _figure(len(logs), columns, height=3.7) as (figure, axes):
        for row, (run, log) in enumerate(logs.items()):
            axis = axes[row * columns]
            for index, data_set in enumerate(evaluated_sets(log)):
                points = series(log, "macro_f1", split="eval", data_set=data_set)
                told.append(f"{_plot(axis, points, index, data_set, smooth=False)} of {run}")
            _label_axes(axis, f"{run}: macro-F1", "macro-F1")
            axis.set_ylim(-0.02, 1.02)
            _legend_below(axis)
            if columns == 1:
                continue
            axis, gap = axes[row * columns + 1], gaps[run]
            if gap is None:
                axis.set_axis_off()
                axis.text(0.5, 0.5, "no gap was logged", ha="center", transform=axis.transAxes)
                continue
            told.append(f"{_plot_gap(axis, gap)} of {run}")
            _label_axes(axis, f"{run}: {gap.name}", "difference in macro-F1")
            axis.set_ylim(-reach, reach)
            _legend_below(axis)
        _head(figure, "Greedy macro-F1 of the evaluated sets while training, as logged")
        data = _rendered(figure, form)
    caption = (
        "Greedy macro-F1 of every evaluated set by optimizer step, each over its own labels, on an"
        " axis from 0 to 1."
    )
    if columns == 2:
        caption += (
            " Gap: what the first set has gained since the run's start less what the others have"
            " gained on average. gap_shared scores both on the labels that both can express, gap"
            " each on its own. Above 0, part of the gain does not transfer. Band: 2 standard errors"
            f" up and down. Its axis reaches at least {GAP_SPAN} up and down."
        )
    alt = f"Line charts over step. {'; '.join(told)}."
    return _picture(name, data, form, alt, caption)


def _plot_gap(axis: Axes, gap: GapCurve) -> str:
    steps, values, errors = (np.array(part, float) for part in (gap.steps, gap.values, gap.errors))
    axis.axhline(0, color="#5b5b5b", linewidth=0.8)
    if not np.isnan(errors).all():
        low, high = values - 2 * errors, values + 2 * errors
        axis.fill_between(
            steps, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="2 standard errors"
        )
        axis.vlines(steps, low, high, color=COLOURS[0], alpha=0.5, linewidth=1)
    shown = _plot(axis, (gap.steps, gap.values), 0, gap.name, smooth=False)
    known = errors[~np.isnan(values)]
    return shown if not len(known) or np.isnan(known[-1]) else f"{shown} +- {2 * known[-1]:.3g}"


def draw_by_run(
    name: str,
    caption: str,
    logs: Mapping[str, Log],
    metrics: Callable[[Log], Mapping[str, str]],
    unit: str,
    form: str = "svg",
    *,
    title: str,
) -> Picture:
    """Draw one chart a run with several metrics in it, all charts on one vertical axis.

    metrics: gives the metrics to draw of a log, {metric: its name in the legend}. unit: of the
    axis. Raises UsageError without matplotlib.
    """
    told, charts = [], {}
    for run, log in logs.items():
        wanted = metrics(log)
        charts[run] = {label: series(log, metric) for metric, label in wanted.items()}
    rows, columns = _grid(len(logs))
    values = [y for curves in charts.values() for _, ys in curves.values() for y in ys]
    with _figure(rows, columns, height=3.7) as (figure, axes):
        for axis, (run, curves) in zip(axes, charts.items(), strict=False):
            for index, (label, points) in enumerate(curves.items()):
                told.append(f"{_plot(axis, points, index, label, smooth=True, faint=0.2)} of {run}")
            axis.axhline(0, color="#5b5b5b", linewidth=0.8)
            _label_axes(axis, run, unit)
            axis.set_ylim(*axis_limits("reward", values))
        for axis in axes[len(charts) :]:
            axis.set_axis_off()
        _head(figure, f"{title}. {_FAINT_AND_BOLD}")
        _figure_legend(figure, axes, columns)
        data = _rendered(figure, form)
    return _picture(name, data, form, f"Line charts over step. {'; '.join(told)}.", caption)


def draw_reliability(
    data_set: str, probabilities: Mapping[str, Mapping[str, Any]], form: str = "svg"
) -> Picture:
    """Draw how often a label is true against the share of the samples that name it.

    Left all labels together, one curve a model, and the diagonal of a share that can be taken at
    its word. Right how many answers have each share.

    data_set: its name. probabilities: {model: "probabilities" of its scores-<set>.json}. form:
    "svg" or "png". Raises UsageError without matplotlib.
    """
    told = []
    with _figure(1, 2, height=3.9) as (figure, axes):
        curve, counts = axes
        curve.plot([0, 1], [0, 1], color="#5b5b5b", linewidth=0.9, linestyle=":")
        for index, (model, scores) in enumerate(probabilities.items()):
            bins = scores["reliability"]
            said, true, number = (
                [one[key] for one in bins] for key in ("confidence", "observed", "n")
            )
            shares = np.array(number) / sum(number)
            style: Any = {
                "color": COLOURS[index % len(COLOURS)],
                "linestyle": _DASHES[index % len(_DASHES)],
                "marker": _MARKERS[index % len(_MARKERS)],
                "linewidth": 2,
                "markersize": 6,
            }
            curve.plot(said, true, label=_wrapped(model), **style)
            counts.plot(said, shares, **style)
            points = ", ".join(
                f"{one['confidence']:.2f} true in {one['observed']:.2f} of {one['n']:,}"
                for one in bins
            )
            told.append(f"{model}, calibration error {scores['ece']:.3f}: {points}")
        curve.set_title(_wrapped("Is a share right that often?"), fontsize=10.5)
        curve.set(xlabel="share of samples that name it", ylabel="share of images where it is true")
        counts.set_title(_wrapped("How common is a share?"), fontsize=10.5)
        counts.set(xlabel="share of samples that name it", ylabel="share of images x labels")
        for axis in axes:
            axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        _head(figure, f"Vote shares as probabilities on {data_set}, all labels together")
        _figure_legend(figure, axes, 2)
        data = _rendered(figure, form)
    caption = (
        "Below the dotted line a label is named more often than it is true, above it less often."
        " ECE is the mean distance from it over all images and labels: "
        + ", ".join(f"{model} {scores['ece']:.3f}" for model, scores in probabilities.items())
        + "."
    )
    alt = f"Reliability of vote shares on {data_set}. {'; '.join(told)}."
    return _picture(f"reliability-{data_set}", data, form, alt, caption)


def _picture(name: str, data: bytes, form: str, alt: str, caption: str) -> Picture:
    return Picture(name, data, "image/svg+xml" if form == "svg" else "image/png", alt, caption)


def training_pictures(entries: Sequence[Entry], form: str = "svg") -> list[Picture]:
    """Draw all that the logs of the entries' training runs have, as the head of this file lists it.

    Runs without a log are left out: `curves.training_runs` says which and why.
    """
    runs, _ = training_runs(entries)
    drawn = [
        *_macro_f1_pictures(runs, form),
        *_stage_pictures(runs, form),
        *_part_pictures(runs, form),
        *_policy_pictures(runs, form),
        *_hacking_pictures(runs, form),
    ]
    names: dict[str, int] = {}
    pictures = []
    for picture in drawn:  # two rewards' names may become one file name
        names[picture_file(picture)] = count = names.get(picture_file(picture), 0) + 1
        pictures.append(picture if count == 1 else replace(picture, name=f"{picture.name}-{count}"))
    return pictures


def _chunks(
    name: str, runs: Sequence[TrainingRun], most: int = _MOST_CHARTS
) -> Iterator[tuple[str, dict[str, Log]]]:
    """Share runs out among pictures: (name of the picture, {run: its log})."""
    for first in range(0, len(runs), most):
        number = f"-{first // most + 1}" if len(runs) > most else ""
        yield f"{name}{number}", {run.name: run.log for run in runs[first : first + most]}


def _macro_f1_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    evaluated = [run for run in runs if evaluated_sets(run.log)]
    return [draw_macro_f1(name, part, form) for name, part in _chunks("macro-f1", evaluated)]


def _rewards(runs: Sequence[TrainingRun]) -> list[str]:
    """List the rewards that runs were trained on, the paper's first."""
    found = dict.fromkeys(run.reward for run in runs if run.stage == "grpo")
    return [
        *(name for name in _FIGURES if name in found),
        *(name for name in found if name not in _FIGURES),
    ]


def _stage_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    pictures = []
    sft = {run.name: run.log for run in runs if run.stage == "sft"}
    if panels_to_draw(FIGURE_1, sft)[0]:
        caption = (
            "SFT, as in figure 1 of the paper: token accuracy and loss, with the loss on the"
            f" validation set at each epoch as it is. {smoothing_note()}"
        )
        pictures.append(draw_training("figure-1", caption, sft, FIGURE_1, form, title="SFT"))
    for reward in _rewards(runs):
        logs = {run.name: run.log for run in runs if (run.stage, run.reward) == ("grpo", reward)}
        panels = reward_panels(reward)
        if panels_to_draw(panels, logs)[0]:
            figure = _FIGURES.get(reward)
            paper = f", as in figure {figure[-1]} of the paper" if figure else ""
            caption = f"GRPO on the {reward or 'unnamed'} reward{paper}. {smoothing_note()}"
            name = figure or f"training-{reward or 'grpo'}"
            title = f"GRPO on the {reward or 'unnamed'} reward"
            pictures.append(draw_training(name, caption, logs, panels, form, title=title))
    return pictures


def _part_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    """Draw the parts of each reward that was trained on, where it has more than one."""
    pictures = []
    for reward in _rewards(runs):
        parted = [
            run
            for run in runs
            if (run.stage, run.reward) == ("grpo", reward) and len(part_names(run.log, reward)) > 1
        ]
        title = f"The parts of the {reward} reward, which add up to it"
        caption = f"{title}. {smoothing_note()}"

        def parts(log: Log, reward: str = reward) -> dict[str, str]:
            return {f"rewards/{reward}/{part}": part for part in part_names(log, reward)}

        pictures += [
            draw_by_run(name, caption, part, parts, "its own units", form, title=title)
            for name, part in _chunks(f"reward-parts-{reward}", parted)
        ]
    return pictures


def _policy_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    grpo = {run.name: run.log for run in runs if run.stage == "grpo"}
    if not panels_to_draw(POLICY, grpo)[0]:
        return []
    caption = (
        "The policy in GRPO: how far it has moved from its reference, how varied it still is, and"
        f" how many sampled answers have the right form or were cut off. {smoothing_note()}"
    )
    return [draw_training("policy", caption, grpo, POLICY, form, title="The policy in GRPO")]


def _hacking_pictures(runs: Sequence[TrainingRun], form: str) -> list[Picture]:
    watched = [run for run in runs if any(has_numbers(run.log, metric) for metric in HACKING)]
    caption = (
        "Reward hacking: the reward trained on, the other rewards and F1 of the sampled labels,"
        " over the last 200 completions, as changes since the run's start in standard deviations. A"
        f" reward that rises while F1 does not is being gamed. {smoothing_note()}"
    )
    title = "Reward against labels: changes since the start"
    return [
        draw_by_run(name, caption, part, _hacking, "change in its SD", form, title=title)
        for name, part in _chunks("reward-hacking", watched)
    ]


def _hacking(log: Log) -> dict[str, str]:
    """Choose the curves of reward hacking. Other rewards are drawn where there are any."""
    others = len(reward_names(log)) != 1
    return {
        metric: label
        for metric, label in HACKING.items()
        if has_numbers(log, metric) and (others or metric != "monitors/other_gain")
    }


def reliability_pictures(entries: Sequence[Entry], form: str = "svg") -> list[Picture]:
    """Draw the reliability of the entries that voted, one picture a data set."""
    voted: dict[str, dict[str, Any]] = {}
    for entry in entries:
        for data_set, record in entry.records.items():
            if record.get("probabilities"):
                voted.setdefault(data_set, {})[entry.name] = record["probabilities"]
    return [draw_reliability(data_set, models, form) for data_set, models in voted.items()]


# ---- command -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FiguresConfig:
    """Hold the flags of `python -m eval.figures`."""

    run: tuple[str, ...] = setting(
        (), "runs to draw, each FOLDER or NAME=FOLDER; may stand first without the flag"
    )
    output_dir: str | None = setting(
        None, "folder for the PNG and SVG files", unset="it must be given"
    )


def config_problems(config: FiguresConfig) -> list[str]:
    """Check what is missing on the command line -> problems, one line each."""
    needed = {
        "run": "one or more FOLDER or NAME=FOLDER of training runs",
        "output_dir": "a folder for the pictures",
    }
    return [
        f"--{name} is missing: give {what}"
        for name, what in needed.items()
        if not getattr(config, name)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 2 usage."""
    return main_guard(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    resolved = parse_config(
        [FiguresConfig],
        flag_first(argv, "run"),
        script="eval",
        prog="python -m eval.figures",
        validate=config_problems,
        description="Draw what runs have learned and what transferred, from their logs.",
    )
    config: FiguresConfig = resolved.configs[0]
    entries = load_entries(config.run, "run")
    _, problems = training_runs(entries)
    pictures = [
        picture
        for form in ("svg", "png")
        for picture in training_pictures(entries, form) + reliability_pictures(entries, form)
    ]
    if not pictures:
        raise UsageError([f"nothing to draw: {problem}" for problem in problems])
    for problem in problems:
        print(f"warning: not drawn: {problem}", file=sys.stderr)
    folder = Path(str(config.output_dir))
    existing = [
        folder / picture_file(picture)
        for picture in pictures
        if (folder / picture_file(picture)).exists()
    ]
    if existing:
        raise UsageError(
            [
                f"{file} exists and nothing is overwritten; give another --output_dir"
                for file in existing
            ]
        )
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (folder / picture_file(picture)).write_bytes(picture.data)
        print(folder / picture_file(picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
