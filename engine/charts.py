"""Make charts for TensorBoard whose curves can be told apart and whose axes do not exaggerate.

TensorBoard colours curves by run, so several curves of one run have one colour. And it zooms each
chart to its values. So the curves of a `Chart` have one tag, charts/<chart>, and lie in folders of
their own under the run's, charts/<curve>, which TensorBoard takes for runs. The ends of an axis are
two more of these curves, straight lines at values that the axis has to reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "charts"  # in the run's folder, and in front of the charts' tags
ENDS = ("axis low", "axis high")  # curves that hold the ends of axes
SHARE = (-0.03, 1.03)  # ends of the axis of a share or a score: a line at 1 would hide the values
ITSELF = ""  # the name of a curve that lies in the run's own folder


@dataclass(frozen=True)
class Chart:
    """Describe one chart.

    tag: of its curves, below charts/. title: on the page of custom scalars. curves: {name of the
    curve: the tag under which its values are logged}, the name ITSELF for one of the run's own
    folder. ends: what the vertical axis reaches at least, from below. error: tag of the standard
    error of the only curve, which then gets a band of two of them.
    """

    tag: str
    title: str
    curves: Mapping[str, str] = field(hash=False)
    ends: tuple[float, ...] = ()
    error: str | None = None

    @property
    def tags(self) -> list[str]:
        """Return the tags of a curve: its value, and the lower and upper end of its band."""
        tag = f"{FOLDER}/{self.tag}"
        return [tag] if self.error is None else [tag, f"{tag}_low", f"{tag}_high"]

    def points(self, logged: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
        """Give the points that were just logged of the chart, and its ends -> (curve, tag, value).

        logged: values by the tag under which they were logged.
        """
        curves = {name: logged[tag] for name, tag in self.curves.items() if tag in logged}
        for name, value in curves.items():
            margin = 2 * logged.get(self.error or "", 0.0)
            yield from zip(
                [name] * 3, self.tags, (value, value - margin, value + margin), strict=False
            )
        for name, end in zip(ENDS, self.ends, strict=False):
            if curves:
                yield from ((name, tag, end) for tag in self.tags)


def layout(category: str, charts: Sequence[Chart]) -> dict[str, dict[str, list]]:
    """Write the charts as the page of custom scalars wants them, under one heading."""
    return {
        category: {
            chart.title: ["Margin", chart.tags] if chart.error else ["Multiline", chart.tags]
            for chart in charts
        }
    }


class ChartWriters:
    """Write the curves of a run's charts, each by a writer of its own."""

    def __init__(
        self, run_dir: Path, charts: Sequence[Chart], make: Callable[[Path], Any], main: Any
    ):
        """Take the curves of the run up again that are there.

        make: opens a writer of a folder. main: the run's own writer.
        """
        self.charts, self._make = charts, make
        self._folder = run_dir / FOLDER
        self._writers: dict[str, Any] = {ITSELF: main}
        if self._folder.is_dir():
            # now, and not with their next point: opened again they drop the points of later steps
            for path in sorted(self._folder.iterdir()):
                if path.is_dir():
                    self._writer(path.name)

    def write(self, logged: Mapping[str, float], step: int) -> None:
        """Add what was just logged to the charts that show it."""
        for chart in self.charts:
            for curve, tag, value in chart.points(logged):
                self._writer(curve).add_scalar(tag, value, step)

    def flush(self) -> None:
        """Write what is waiting. The run's own writer is not flushed."""
        for name, writer in self._writers.items():
            if name != ITSELF:
                writer.flush()

    def close(self) -> None:
        """Close the curves' writers. The run's own stays open."""
        for name, writer in self._writers.items():
            if name != ITSELF:
                writer.close()

    def _writer(self, curve: str) -> Any:
        if curve not in self._writers:
            self._writers[curve] = self._make(self._folder / curve)
        return self._writers[curve]


def macro_f1_chart(data_sets: Sequence[str]) -> Chart:
    """Describe the chart of scores, which SFT and GRPO share. data_sets: those that are scored."""
    curves = {name: f"eval/{name}/macro_f1" for name in data_sets}
    return Chart("macro_f1", "macro-F1, greedy, by set", curves, SHARE)


def sft_charts(data_sets: Sequence[str]) -> list[Chart]:
    """List the charts of an SFT run in TensorBoard. data_sets: those that its end scores."""
    charts = [
        Chart(
            "loss",
            "loss, nats a token",
            {ITSELF: "train/loss", "validation": "eval/loss"},
            (0.0,),
        ),
        Chart(
            "token_accuracy",
            "token accuracy",
            {ITSELF: "train/mean_token_accuracy", "validation": "eval/mean_token_accuracy"},
            SHARE,
        ),
        macro_f1_chart(data_sets),
    ]
    return [chart for chart in charts if chart.curves]
