"""Draw the pictures of a report as SVG, without any library.

Each is drawn twice, for a wide and for a narrow screen. Scores stand on an axis from 0 to 1, so no
difference looks larger than it is. The line between two adapters alone is a window: as wide on both
axes, at least 0.2, and its title says so. Models are told apart by the shape of their marks as well
as by colours, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.contrasts import Contrast
from eval.page import Picture, plain

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3478a", "#5b5b5b", "#b08900", "#56a0d3")
WIDE, NARROW = 1180, 370  # pixels
_INK, _SOFT, _LINE = "#1b1f24", "#4f5965", "#c9d0d8"
_TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)
_ROW = 19  # pixels from one model to the next
_SHAPES = ("circle", "square", "diamond", "triangle")


@dataclass
class Drawing:
    """Hold the parts of an SVG picture while it is drawn. Texts are escaped here."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> None:
        """Draw a straight line."""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"'
            f' stroke-width="{width}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        size: int = 13,
        bold: bool = False,
        colour: str = _INK,
    ) -> None:
        """Write a text, whose base line begins, has its middle or ends at (x, y)."""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
            f' fill="{colour}"{" font-weight=" + chr(34) + "600" + chr(34) if bold else ""}>'
            f"{html.escape(plain(text))}</text>"
        )

    def mark(self, x: float, y: float, model: int, size: float = 5) -> None:
        """Draw the mark of the model with this number."""
        colour, shape = COLOURS[model % len(COLOURS)], _SHAPES[model % len(_SHAPES)]
        if shape == "circle":
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{colour}"/>')
            return
        corners = {
            "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
            "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
            "triangle": ((0, -1.2), (1.2, 1), (-1.2, 1)),
        }[shape]
        points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
        self.parts.append(f'<polygon points="{points}" fill="{colour}"/>')

    def svg(self) -> bytes:
        """Return the picture as a file."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:.0f}"'
            f' height="{self.height:.0f}" viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
            f' font-family="system-ui, sans-serif"><rect width="100%" height="100%" fill="#fff"/>'
            f"{''.join(self.parts)}</svg>\n"
        ).encode()


# ---- stages by data set --------------------------------------------------------------------------
def dumbbell_picture(contrasts: Sequence[Contrast], home: Sequence[str]) -> Picture:
    """Draw macro-F1 of every model on every data set, with 95 % intervals, marks joined by a line.

    home: names of the in-distribution sets.
    """
    told = [
        f"{model} on {contrast.data_set} {contrast.values[model]['macro_f1'][0]:.3f}"
        f" ({low:.3f} to {high:.3f})"
        for contrast in contrasts
        for model in contrast.values
        for low, high in [contrast.interval(model, "macro_f1")]
    ]
    return Picture(
        "macro-f1",
        _dumbbell(contrasts, home, WIDE),
        "image/svg+xml",
        f"Macro-F1 with 95 % intervals: {'; '.join(told)}.",
        narrow=_dumbbell(contrasts, home, NARROW),
    )


def _dumbbell(contrasts: Sequence[Contrast], home: Sequence[str], width: int) -> bytes:
    is_narrow = width < 600
    left, right = (110, width - 50) if is_narrow else (200, width - 190)
    rows = sum(len(contrast.values) for contrast in contrasts)
    drawing = Drawing(width, 24 * len(contrasts) + _ROW * rows + 34)
    order = list(dict.fromkeys(model for contrast in contrasts for model in contrast.values))

    def at(score: float) -> float:
        return left + score * (right - left)

    bottom = drawing.height - 30
    for tick in _TICKS:
        drawing.line(at(tick), 4, at(tick), bottom, "#e3e6ea", 1)
        drawing.text(at(tick), bottom + 13, f"{tick:g}", anchor="middle", size=11, colour=_SOFT)
    title = "macro-F1, 95 % interval"
    drawing.text((left + right) / 2, bottom + 26, title, anchor="middle", size=11, colour=_SOFT)
    size = 12 if is_narrow else 13
    y = 0.0
    for contrast in contrasts:
        y += 16
        where = "at home" if contrast.data_set in home else "elsewhere"
        title = f"{contrast.data_set}, {where}, {len(contrast.labels)} labels"
        drawing.text(0, y, title, bold=True, size=size)
        y += 8
        last: tuple[float, float] | None = None
        for model in contrast.values:
            middle, number = y + _ROW / 2, order.index(model)
            colour = COLOURS[number % len(COLOURS)]
            value = float(contrast.values[model]["macro_f1"][0])
            low, high = contrast.interval(model, "macro_f1")
            if last is not None:
                drawing.line(*last, at(value), middle, "#8b949e", 1.5)
            last = at(value), middle
            drawing.line(at(low), middle, at(high), middle, colour, 2)
            for end in (low, high):
                drawing.line(at(end), middle - 4, at(end), middle + 4, colour, 2)
            drawing.mark(*last, number)
            shown = f"{value:.3f}" + ("" if is_narrow else f"  ({low:.3f} to {high:.3f})")
            name = _fitting(model, 15 if is_narrow else 28)
            drawing.text(left - 10, middle + 4, name, anchor="end", size=size)
            drawing.text(right + 10, middle + 4, shown, size=size)
            y += _ROW
    return drawing.svg()


def _fitting(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"


# ---- between two adapters ------------------------------------------------------------------------
SharePoint = tuple[str, float, float, tuple[float, float], float, tuple[float, float]]
_LEAST_WINDOW = 0.2


def frontier_picture(points: Sequence[SharePoint], chosen: float) -> Picture:
    """Draw the score at home over that elsewhere, one mark a share, joined, with 95 % intervals.

    points: (model, alpha, score at home with its interval, elsewhere with its interval), the
    smallest alpha first. chosen: the alpha to mark.
    """
    told = [
        f"alpha {alpha:g}{' (chosen)' if alpha == chosen else ''} {home:.3f} ({at[0]:.3f} to"
        f" {at[1]:.3f}) at home, {away:.3f} ({off[0]:.3f} to {off[1]:.3f}) elsewhere"
        for _, alpha, home, at, away, off in points
    ]
    return Picture(
        "frontier",
        _frontier(points, chosen, 640),
        "image/svg+xml",
        f"Macro-F1 of each share with 95 % intervals: {'; '.join(told)}.",
        narrow=_frontier(points, chosen, NARROW),
    )


def _frontier(points: Sequence[SharePoint], chosen: float, width: int) -> bytes:
    left, top, below = 62, 34, 48
    side = width - left - 16
    drawing = Drawing(width, top + side + below)
    bounds = [score for _, _, _, at, _, off in points for score in (at, off)]
    span = [(low, high) for low, high in bounds]
    size = max(
        _LEAST_WINDOW,
        1.1 * max(max(high for _, high in part) - min(low for low, _ in part) for part in
                  (span[0::2], span[1::2])),
    )  # fmt: skip
    starts = []
    for part in (span[1::2], span[0::2]):  # elsewhere to the right, home upwards
        middle = (max(high for _, high in part) + min(low for low, _ in part)) / 2
        starts.append(min(max(0.0, middle - size / 2), max(0.0, 1 - size)))

    def across(score: float) -> float:
        return left + (score - starts[0]) / size * side

    def up(score: float) -> float:
        return top + side - (score - starts[1]) / size * side

    title = f"macro-F1, 95 % intervals, a window of {size:.2f} on both axes"
    drawing.text(0, 16, title, bold=True, size=12 if width < 600 else 14)
    step = 0.05 if size <= 0.4 else 0.2
    for tick in np.arange(0, 1 + step / 2, step):
        if starts[0] <= tick <= starts[0] + size:
            drawing.line(across(tick), top, across(tick), top + side, "#e3e6ea", 1)
            drawing.text(
                across(tick), top + side + 15, f"{tick:.2f}", anchor="middle", size=11, colour=_SOFT
            )
        if starts[1] <= tick <= starts[1] + size:
            drawing.line(left, up(tick), left + side, up(tick), "#e3e6ea", 1)
            drawing.text(left - 6, up(tick) + 4, f"{tick:.2f}", anchor="end", size=11, colour=_SOFT)
    drawing.text(left + side / 2, top + side + 34, "elsewhere, shared labels", anchor="middle")
    drawing.text(left + 4, top + 14, "at home")
    places = [(across(away), up(home)) for _, _, home, _, away, _ in points]
    for begin, end in zip(places, places[1:], strict=False):
        drawing.line(*begin, *end, "#8b949e", 1.5)
    for number, (_, alpha, _, at, _, off) in enumerate(points):
        colour = COLOURS[number % len(COLOURS)]
        x, y = places[number]
        drawing.line(across(off[0]), y, across(off[1]), y, colour, 1.4)
        drawing.line(x, up(at[0]), x, up(at[1]), colour, 1.4)
        drawing.mark(x, y, number, 7 if alpha == chosen else 5)
        name = f"{alpha:g}{', chosen' if alpha == chosen else ''}"
        beside = y - 8 if number % 2 == 0 else y + 18  # neighbours are often close to each other
        drawing.text(x + 9, beside, name, bold=alpha == chosen, size=12)
    return drawing.svg()


# ---- labels --------------------------------------------------------------------------------------
def labels_picture(contrast: Contrast) -> Picture:
    """Draw precision, recall and F1 of each label for each model, with 95 % intervals.

    Labels without positives are left out. The most frequent label stands first.
    """
    models = list(contrast.values)
    return Picture(
        f"labels-{contrast.data_set}",
        _labels(contrast, WIDE),
        "image/svg+xml",
        f"Precision, recall and F1 of each label on {contrast.data_set} for {', '.join(models)},"
        " one mark a model with its 95 % interval. The F1 scores and recalls are in the tables of"
        " this page.",
        narrow=_labels(contrast, NARROW),
    )


def _labels(contrast: Contrast, width: int) -> bytes:
    is_narrow = width < 600
    models = list(contrast.values)
    labels = [int(k) for k in np.argsort(-contrast.support, kind="stable") if contrast.support[k]]
    step = 9 * len(models) + 7
    left = 0 if is_narrow else 225
    above = 18 if is_narrow else 0  # the label's name stands above its marks
    top = 20 * _key_lines(models, width) + 46
    drawing = Drawing(width, top + (step + above) * len(labels) + 24)
    title = f"{contrast.data_set}, positives in brackets, 95 % intervals"
    drawing.text(0, 14, title, bold=True, size=12 if is_narrow else 14)
    _key(drawing, models, width)
    gap = 16 if is_narrow else 30
    panel = (width - left - 3 * gap) / 3
    for place, score in enumerate(("precision", "recall", "f1")):
        start = left + gap / 2 + place * (panel + gap)
        title = "F1" if score == "f1" else score.capitalize()
        drawing.text(start + panel / 2, top - 10, title, anchor="middle", bold=True)
        bottom = drawing.height - 20
        for tick in (0, 0.5, 1) if is_narrow else _TICKS:
            x = start + tick * panel
            drawing.line(x, top - 4, x, bottom, "#e3e6ea", 1)
            drawing.text(x, bottom + 14, f"{tick:g}", anchor="middle", size=11, colour=_SOFT)
        _panel(drawing, contrast, labels, f"label_{score}", (start, panel, top, step, above))
    for row, k in enumerate(labels):
        y = top + row * (step + above)
        name = f"{contrast.labels[k]} ({contrast.support[k]:,})"
        if is_narrow:
            drawing.text(0, y + 12, name, size=11)
        else:
            drawing.text(left - 6, y + step / 2 + 4, name, anchor="end")
            drawing.line(0, y, width, y, "#eef0f3", 1)
    return drawing.svg()


def _panel(
    drawing: Drawing,
    contrast: Contrast,
    labels: Sequence[int],
    score: str,
    place: tuple[float, float, float, float, float],
) -> None:
    """Draw the marks of one score. place: left edge, width, top, height of a label, above it."""
    start, width, top, step, above = place
    for number, model in enumerate(contrast.values):
        lows, highs = contrast.label_bounds[model][score]  # [K] each
        values = contrast.values[model][score][0]
        colour = COLOURS[number % len(COLOURS)]
        for row, k in enumerate(labels):
            y = top + row * (step + above) + above + 8 + 9 * number
            drawing.line(start + lows[k] * width, y, start + highs[k] * width, y, colour, 1.4)
            drawing.mark(start + values[k] * width, y, number, 3.6)


def _key_positions(models: Sequence[str], width: int) -> list[tuple[float, int]]:
    """Place the entries of a key -> (x, line) of each."""
    placed = []
    x, line = 0.0, 0
    for model in models:
        size = 34 + 7.5 * len(model)
        if x and x + size > width:
            x, line = 0.0, line + 1
        placed.append((x, line))
        x += size
    return placed


def _key_lines(models: Sequence[str], width: int) -> int:
    return 1 + max(line for _, line in _key_positions(models, width))


def _key(drawing: Drawing, models: Sequence[str], width: int) -> None:
    """Draw the key under the picture's title."""
    for number, (x, line) in enumerate(_key_positions(models, width)):
        drawing.mark(x + 8, 30 + 20 * line, number, 4.5)
        drawing.text(x + 18, 34 + 20 * line, models[number], size=12)
