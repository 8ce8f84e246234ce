"""Make the tables of what transferred: what each step changed at home and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from data.labels import LABELS, NIH_NINE
from eval import published
from eval.contrasts import Contrast, Transfer
from eval.page import ARROW, Cell, Table
from eval.paired import NO_CLEAR_CHANGE, Change, clear_change
from eval.tables import change_cells, holm_note, p_cells, signed, signed_change
from eval.transfer import shared_labels

_PAPER_TRANSFER = (
    ("MedGemma", "MedGemma (SFT)"),
    ("MedGemma (SFT)", "MedGemma (ChexReason)"),
    ("MedGemma", "MedGemma (ChexReason)"),
)


_GAP_MOVED = {
    "gain": "; the gap moved towards home",
    "loss": "; the gap moved towards the other schemes",
    "": "",
}


def transfer_table(
    contrasts: Sequence[Contrast], home: Sequence[str], pairs: Sequence[tuple[str, str]]
) -> Table:
    """List macro-F1 before and after each step, on each data set.

    The relative change is there too, as the paper states it. A set whose labels another side
    cannot all express has a row for the labels that both can.
    """
    steps, moves, patients = [], [], []
    for before, after in pairs:
        for contrast in contrasts:
            if (before, after) not in contrast.p_values:
                continue
            where = "in distribution" if contrast.data_set in home else "across schemes"
            for labels, name in _label_choices(contrast, contrasts, home):
                steps.append((f"{before} {ARROW} {after}", name, where))
                moves.append(contrast.macro_change(before, after, labels))
                patients.append(contrast.num_patients)
    p_values = [moved.p_value for moved in moves]
    rows: list[list[Cell | str]] = [
        [
            *step,
            *change_cells(moved, drawn),
            _relative(moved, drawn),
            p_cell,
        ]
        for step, moved, drawn, p_cell in zip(
            steps, moves, patients, p_cells(p_values), strict=True
        )
    ]
    return Table(
        "Change of macro-F1",
        ["Step", "Data set", "Labels", "Before", "After", "Difference", "Relative", "p (Holm)"],
        rows,
        [
            "In distribution: the label scheme of the training data, all its labels. Across"
            " schemes: the labels that another hospital's scheme can express. Rows with a number of"
            " labels: only those that the named set can express too. Intervals are paired: both"
            f" models on the same resampled patients. {holm_note(p_values)}"
        ],
        numbers_from=3,
    )


def _label_choices(
    contrast: Contrast, contrasts: Sequence[Contrast], home: Sequence[str]
) -> list[tuple[tuple[str, ...], str]]:
    """Choose on which labels a data set is scored -> (labels, the data set's name with them)."""
    name = contrast.data_set
    choices = {contrast.labels: name}
    for other in contrasts:
        if (other.data_set in home) != (contrast.data_set in home):
            labels = shared_labels(contrast.labels, other.labels)
            if labels:
                choices.setdefault(labels, f"{name}, {len(labels)} shared with {other.data_set}")
    return list(choices.items())


def _relative(moved: Change, patients: int) -> Cell:
    if not moved.before:
        return Cell("-")
    return signed(moved.size / moved.before, moved.relative, patients, percent=True)


_WHO_GAINED = [
    "Step",
    "In distribution",
    "Across schemes",
    "Gap: the former minus the latter",
    "Reading",
]


def paradox_table(found: Sequence[Transfer], *, with_paper: bool = True) -> Table:
    """List who gained where, each side on all of its labels: each step of ours, and the paper's.

    with_paper: the paper's steps can be set beside ours.
    """
    rows: list[list[Cell | str]] = [
        [
            f"{transfer.before} {ARROW} {transfer.after}",
            *(_side(moved, transfer) for moved in (transfer.home, transfer.away)),
            _gap(transfer.gap),
            reading(transfer),
        ]
        for transfer in found
    ]
    rows += [_paper_row(*pair, None, None) for pair in (_PAPER_TRANSFER if with_paper else ())]
    return Table(
        "Who gained where: change of macro-F1",
        _WHO_GAINED,
        rows,
        [
            "Gap: positive where a step did more for the scheme it was trained on than for the"
            " others. Each side counts all labels of its own, so that the sides differ in their"
            " labels too. A reading of 'gains' or 'loses' needs a 95 % interval without 0"
            " and 20 patients."
            + (" The paper's data sets: CheXpert test and NIH." if with_paper else ""),
        ],
        numbers_to=4,
    )


def matched_table(found: Sequence[Transfer], *, with_paper: bool = True) -> Table:
    """List who gained where on the labels that both sides can express, and what the rest did.

    The rest are the labels that only the home side can express. with_paper: the paper's steps can
    be set beside ours, computed from its Tables 5 and 6.
    """
    rows: list[list[Cell | str]] = []
    for transfer in found:
        step = f"{transfer.before} {ARROW} {transfer.after}"
        if transfer.gap_shared is not None:
            rows.append(
                [
                    f"{step}, {shared_title(transfer)}",
                    _side(transfer.home_shared, transfer),
                    _side(transfer.away_shared, transfer),
                    _gap(transfer.gap_shared),
                    reading(transfer, shared=True),
                ]
            )
        if transfer.home_only is not None:
            only = _side(transfer.home_only, transfer)
            rows.append([f"{step}, labels only at home", only, "", "", ""])
    rest = tuple(label for label in LABELS if label not in NIH_NINE)
    for pair in _PAPER_TRANSFER if with_paper else ():
        rows += [_paper_row(*pair, NIH_NINE, NIH_NINE), _paper_row(*pair, rest, ())]
    return Table(
        "The same labels on both sides: change of macro-F1",
        _WHO_GAINED,
        rows,
        [
            "Each side is scored on the labels that both can express, so that the gap is one of"
            " hospitals and not of labels. With several sets a side, each pair of sets is compared"
            " on its own shared labels and the pairs are averaged.",
            *_shared_notes(found),
        ],
        numbers_to=4,
    )


def _gap(gap: tuple[float, tuple[float, float]] | None) -> Cell:
    return Cell("-") if gap is None else signed(*gap)


def shared_title(transfer: Transfer) -> str:
    """Name the labels that both sides of a step can express, by their number."""
    counts = sorted({len(labels) for labels in transfer.labels.values() if labels})
    return f"{' to '.join(map(str, dict.fromkeys([counts[0], counts[-1]])))} shared labels"


def _shared_notes(found: Sequence[Transfer]) -> list[str]:
    """Name the shared labels of each pair of data sets, once for all steps."""
    pairs = {
        pair: labels
        for transfer in found
        if not transfer.same_labels
        for pair, labels in transfer.labels.items()
    }
    return [
        f"Shared by {home} and {away}: {', '.join(labels) or 'no label'}."
        for (home, away), labels in pairs.items()
    ]


def _paper_row(
    before: str, after: str, home: Sequence[str] | None, away: Sequence[str] | None
) -> list[Cell | str]:
    """Make the row of one of the paper's steps.

    home, away: the labels to average on each side. None for the macro-F1 that the paper prints,
    none at all for a side that cannot express them.
    """
    cells, moved = [], []
    for by_label, printed, labels in (
        (published.TABLE_5, published.MACRO_5, home),
        (published.TABLE_6, published.MACRO_6, away),
    ):
        if labels is not None and not labels:
            cells.append(Cell(""))
            continue
        old, new = (
            printed[model] if labels is None else published.macro_f1(by_label[model], labels)
            for model in (before, after)
        )
        moved.append(new - old)
        detail = f"{old:.3f} to {new:.3f}, {100 * (new - old) / old:+.0f} %"
        cells.append(Cell(f"{new - old:+.3f}", detail))
    title = (
        ""
        if home is None
        else f", {len(home)} shared labels"
        if away
        else f", the other {len(home)} labels"
    )
    both = len(moved) == 2
    return [
        Cell(f"paper: {before} {ARROW} {after}{title}", tone="muted"),
        *cells,
        f"{moved[0] - moved[1]:+.3f}" if both else "",
        "no interval published" if both else "",
    ]


def _side(moved: Change | None, transfer: Transfer) -> Cell:
    return Cell("-") if moved is None else signed_change(moved, transfer.num_patients)


def reading(transfer: Transfer, *, shared: bool = False) -> str:
    """Say in words what a step changed: a gain or loss is clear by `paired.clear_change`.

    shared: on the labels that both sides can express, not on all of each side.
    """

    def word(moved: Change | None) -> str:
        if moved is None:
            return "not measured"
        direction = clear_change(moved.difference, transfer.num_patients)
        return {"gain": "gains", "loss": "loses", "": NO_CLEAR_CHANGE}[direction]

    sides = (
        (transfer.home_shared, transfer.away_shared) if shared else (transfer.home, transfer.away)
    )
    gap = transfer.gap_shared if shared else transfer.gap
    home, away = map(word, sides)
    if (home, away) == ("gains", "loses"):
        return "gains at home, loses elsewhere: the paper's trade-off"
    if (home, away) == ("loses", "gains"):
        return "loses at home, gains elsewhere: the paper's paradox"
    moved = "" if gap is None else _GAP_MOVED[clear_change(gap[1], transfer.num_patients)]
    return (f"in both: {home}" if home == away else f"at home: {home}; elsewhere: {away}") + moved
