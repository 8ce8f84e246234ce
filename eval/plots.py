"""Draw curves with matplotlib, the only file that needs it.

Faint lines are the logged values, bold lines their exponential moving average (`curves.ema`). A
picture says in words (`Picture.alt`) what each of its curves shows.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import UsageError
from eval.curves import (
    GAP_SPAN,
    GapCurve,
    Log,
    Panel,
    Points,
    axis_limits,
    ema,
    evaluated_sets,
    gap_curve,
    panels_to_draw,
    points_of,
    series,
    smoothing_for,
)
from eval.page import Picture
from eval.pictures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "the pictures need matplotlib: pip install -e '.[plots]'"
_DASHES = ("-", "--", "-.", ":")  # 7 colours and 4 dashes: 28 curves before a pair comes again
_MARKERS = "osD^vPX"
_WIDE = 2  # charts side by side: more could not be read on a phone
_FAINT_AND_BOLD = "Faint: as logged; bold: smoothed"


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
