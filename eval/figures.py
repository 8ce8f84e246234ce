"""Draw the paper's figures 1 to 3 from the logs of runs, and the pictures of a report.

    # needs the extra: pip install -e '.[plots]'
    python -m eval.figures runs/sft-* runs/20260101-120000-grpo --output_dir figures

They are written as PNG and SVG, from each run's metrics.jsonl. Figure 1 has the SFT runs, figure 2
the GRPO runs on the nuanced reward, figure 3 the GRPO runs on the hard reward. Faint lines are the
logged values, bold lines their exponential moving average s_t = 0.95 s_(t-1) + 0.05 x_t from
s_0 = x_0, as the paper's captions say. For GRPO runs there is also the chart of reward hacking:
what the reward has gained beside what the labels have.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.config import UsageError, parse_config, setting
from engine.runtime import main_guard
from eval.contrasts import Contrast
from eval.folders import Entry, flag_first, load_entries, read_log
from eval.page import Picture, picture_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 0.95
MISSING = "the pictures need matplotlib: pip install -e '.[plots]'"
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#a3478a",
    "#5b5b5b",
    "#b08900",
    "#56a0d3",
)  # told apart by colour-blind readers, dark enough on white
_DASHES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Panel:
    """Describe one chart of a figure: a logged metric over optimizer steps."""

    metric: str
    title: str
    unit: str


FIGURE_1 = (
    Panel("mean_token_accuracy", "Token accuracy", "share of tokens"),
    Panel("loss", "Training loss", "nats a token"),
)


def reward_panels(reward: str) -> tuple[Panel, ...]:
    """Return the three panels of figures 2 and 3, for the reward that was trained on."""
    return (
        Panel("reward", "Total reward, as trained on", "reward"),
        Panel(f"rewards/{reward}/mean", f"Mean {reward} reward", "its own units"),
        Panel("completions/mean_length", "Mean completion length", "tokens"),
    )


HACKING = {  # logged by rl/monitors.py, in standard deviations of the run's start
    "monitors/trained_gain": "reward trained on",
    "monitors/other_gain": "the other reward",
    "monitors/f1_gain": "F1 of the labels",
}
MOST_CHARTS = 3  # side by side in one picture


def ema(values: Sequence[float], smoothing: float = SMOOTHING) -> list[float]:
    """Smooth values exponentially: s_0 = x_0, s_t = smoothing s_(t-1) + (1 - smoothing) x_t."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(
            value if not smoothed else smoothing * smoothed[-1] + (1 - smoothing) * value
        )
    return smoothed


def series(log: Sequence[Mapping], metric: str) -> tuple[list[int], list[float]]:
    """Take a metric from the training lines of a log -> (steps, values).

    Steps where it is null or missing are left out.
    """
    points = [
        (row["step"], row[metric])
        for row in log
        if row.get("split") == "train" and isinstance(row.get(metric), (int, float))
    ]
    return [step for step, _ in points], [float(value) for _, value in points]


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
    columns: int, *, height: float, width: float = 4.2
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Give a figure and its axes in one style. Raises UsageError without matplotlib."""
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
        "grid.color": "#e3e6ea",
        "svg.hashsalt": "chexreason",
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width * columns, height), layout="constrained")
        yield figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def _rendered(figure: Figure, form: str) -> bytes:
    file = io.BytesIO()
    metadata = {"Date": None} if form == "svg" else None  # nothing of a picture is by the clock
    figure.savefig(file, format=form, dpi=150, metadata=metadata)
    return file.getvalue()


def draw_training(
    name: str,
    caption: str,
    logs: Mapping[str, Sequence[Mapping]],
    panels: Sequence[Panel],
    form: str = "svg",
) -> Picture:
    """Draw curves of several runs, one panel a metric.

    name, caption: of the picture. logs: {run: lines of metrics.jsonl}. form: "svg" or "png".

    Raises UsageError without matplotlib.
    """
    told = []
    with _figure(len(panels), height=3.3) as (figure, axes):
        for axis, panel in zip(axes, panels, strict=True):
            for index, (run, log) in enumerate(logs.items()):
                steps, values = series(log, panel.metric)
                if not steps:
                    continue
                smoothed, colour = ema(values), _COLOURS[index % len(_COLOURS)]
                axis.plot(steps, values, color=colour, alpha=0.4, linewidth=0.9)
                axis.plot(
                    steps,
                    smoothed,
                    color=colour,
                    linewidth=2,
                    linestyle=_DASHES[index % len(_DASHES)],
                    label=run,
                )
                told.append(
                    f"{panel.title} of {run}: {smoothed[0]:.3g} at step {steps[0]},"
                    f" {smoothed[-1]:.3g} at step {steps[-1]}"
                )
            axis.set(title=panel.title, xlabel="optimizer step", ylabel=panel.unit)
        if len(logs) > 1:
            axes[0].legend(fontsize=9)
        data = _rendered(figure, form)
    return _picture(
        name,
        data,
        form,
        "Line charts over optimizer steps, smoothed. " + "; ".join(told) + ".",
        caption,
    )


def draw_hacking(name: str, logs: Mapping[str, Sequence[Mapping]], form: str = "svg") -> Picture:
    """Draw a chart for each run: what both rewards and F1 have gained since its start.

    logs: {run: lines of metrics.jsonl}. Raises UsageError without matplotlib.
    """
    told = []
    with _figure(len(logs), height=3.3) as (figure, axes):
        for axis, (run, log) in zip(axes, logs.items(), strict=True):
            for index, (metric, label) in enumerate(HACKING.items()):
                steps, values = series(log, metric)
                if steps:
                    axis.plot(
                        steps,
                        values,
                        color=_COLOURS[index],
                        linewidth=2,
                        linestyle=_DASHES[index],
                        label=label,
                    )
                    told.append(f"{label} of {run}: {values[-1]:+.2f} at step {steps[-1]}")
            axis.axhline(0, color="#5b5b5b", linewidth=0.8)
            axis.set(title=run, xlabel="optimizer step", ylabel="change since the start, in its SD")
        axes[0].legend(fontsize=9)
        data = _rendered(figure, form)
    caption = (
        "Reward hacking: the reward trained on, the other reward and F1 of the sampled labels, over"
        " the last 200 completions, as changes since the run's start in standard deviations. A"
        " reward that rises while F1 does not is being gamed."
    )
    return _picture(
        name, data, form, "Line charts over optimizer steps. " + "; ".join(told) + ".", caption
    )


def draw_labels(contrast: Contrast, form: str = "svg") -> Picture:
    """Draw the F1 of each label for each model, with its 95 % interval.

    Labels without positives are left out. Raises UsageError without matplotlib.
    """
    models = list(contrast.values)
    labels = [k for k in np.argsort(contrast.support, kind="stable") if contrast.support[k]]
    with _figure(1, height=0.9 + (0.16 * len(models) + 0.2) * len(labels), width=8.4) as (
        figure,
        (axis,),
    ):
        for index, model in enumerate(models):
            resampled = contrast.resampled[model]["label_f1"]  # [R, K]
            low, high = np.percentile(resampled, [2.5, 97.5], axis=0)  # [K] each
            value = contrast.values[model]["label_f1"][0]
            height = np.arange(len(labels)) + 0.7 * ((len(models) - 1) / 2 - index) / max(
                1, len(models)
            )
            colour = _COLOURS[index % len(_COLOURS)]
            axis.hlines(height, low[labels], high[labels], color=colour, linewidth=1.4, alpha=0.7)
            axis.plot(
                value[labels],
                height,
                _MARKERS[index % len(_MARKERS)],
                color=colour,
                markersize=6,
                label=model,
            )
        axis.set_yticks(
            range(len(labels)),
            [f"{contrast.labels[k]} ({contrast.support[k]:,})" for k in labels],
        )
        axis.set(
            xlim=(-0.02, 1.02),
            xlabel="F1, 95 % interval",
            title=f"F1 by label on {contrast.data_set}, positives in brackets",
        )
        figure.legend(loc="outside lower center", ncols=min(4, len(models)), fontsize=9)
        data = _rendered(figure, form)
    alt = (
        f"F1 by label on {contrast.data_set}, one mark a model with its interval; the same"
        " scores are in the tables of this report."
    )
    return _picture(f"labels-{contrast.data_set}", data, form, alt, "")


def _picture(name: str, data: bytes, form: str, alt: str, caption: str) -> Picture:
    return Picture(name, data, "image/svg+xml" if form == "svg" else "image/png", alt, caption)


def training_pictures(entries: Sequence[Entry], form: str = "svg") -> list[Picture]:
    """Draw figures 1 to 3 and reward hacking, as far as the entries' training runs have a log."""
    logs: dict[str, dict[str, list[dict]]] = {"sft": {}, "nuanced": {}, "hard": {}}
    seen = set()
    for entry in entries:
        kind = entry.reward if entry.stage == "grpo" else entry.stage
        if entry.training is not None and entry.training.resolve() not in seen and kind in logs:
            seen.add(entry.training.resolve())
            if log := read_log(entry.training / "metrics.jsonl"):
                logs[kind][entry.name] = log
    raw = "Faint: logged values; bold: their exponential moving average, 0.95."
    figures = (
        (
            "figure-1",
            f"Figure 1 of the paper: token accuracy and loss in SFT. {raw}",
            "sft",
            FIGURE_1,
        ),
        (
            "figure-2",
            f"Figure 2 of the paper: GRPO on the nuanced reward. {raw}",
            "nuanced",
            reward_panels("nuanced"),
        ),
        (
            "figure-3",
            f"Figure 3 of the paper: GRPO on the hard reward. {raw}",
            "hard",
            reward_panels("hard"),
        ),
    )
    pictures = [
        draw_training(name, caption, logs[kind], panels, form)
        for name, caption, kind, panels in figures
        if logs[kind]
    ]
    watched = [
        (run, log)
        for kind in ("nuanced", "hard")
        for run, log in logs[kind].items()
        if any(series(log, metric)[0] for metric in HACKING)
    ]
    for first in range(0, len(watched), MOST_CHARTS):
        number = f"-{first // MOST_CHARTS + 1}" if len(watched) > MOST_CHARTS else ""
        pictures.append(
            draw_hacking(
                f"reward-hacking{number}", dict(watched[first : first + MOST_CHARTS]), form
            )
        )
    return pictures


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
        description="Draw the paper's figures 1 to 3, and reward hacking, from the logs of runs.",
    )
    config: FiguresConfig = resolved.configs[0]
    entries = load_entries(config.run, "run")
    pictures = [picture for form in ("svg", "png") for picture in training_pictures(entries, form)]
    if not pictures:
        raise UsageError(
            f"nothing to draw: no metrics.jsonl of a training run in {', '.join(config.run)}"
        )
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
