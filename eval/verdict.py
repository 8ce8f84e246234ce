"""Say in one sentence what the last step of training changed, and on what evidence."""

from __future__ import annotations

from collections.abc import Sequence

from eval.confusion import counts_of, silenced_in
from eval.contrasts import Contrast, Transfer
from eval.names import BASELINE_TITLES
from eval.page import ARROW, Lead
from eval.paired import FEW_PATIENTS, NO_CLEAR_CHANGE, Change, clear_change, holm
from eval.tables import bounds, number, p_text
from eval.transfer_tables import shared_title

MANY_UNREAD = 0.05  # share of answers that failed or have unknown entries, from which on it is said


def last_step(names: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """Return (before, after) of the step that led to the last model, None where it has none."""
    return next((pair for pair in pairs if names and pair[1] == names[-1]), None)


def verdict(
    contrasts: Sequence[Contrast],
    step: tuple[str, str] | None,
    transfer: Transfer | None,
) -> Lead:
    """Write the verdict on the last step, from paired intervals.

    A rise or fall of macro-F1 has to be clear by `paired.clear_change`. The p-values of the
    evidence are adjusted for the number of data sets.

    contrasts: the data sets, those at home first. step: (before, after), None for a verdict on
    single models. transfer: of that step, None where it has none.
    """
    both = [contrast for contrast in contrasts if step and step in contrast.p_values]
    if step is None or not both:
        return _single(contrasts)
    before, after = step
    moved = [(contrast, contrast.change(before, after, "macro_f1")) for contrast in both]
    parts = [_changes(moved)]
    if gap := _gap_clause(transfer):
        parts.append(gap)
    if silent := _newly_silent(both, before, after):
        verb = "is" if len(silent) == 1 else "are"
        parts.append(f"{_listed(silent)} {verb} hardly said any more")
    p_values = holm([change.p_value for _, change in moved])
    details = [
        _evidence(contrast, *step, _p_of(p, len(both)))
        for contrast, p in zip(both, p_values, strict=True)
    ]
    if transfer is not None and transfer.gap_shared is not None:
        size, (low, high) = transfer.gap_shared
        details.append(
            f"gap on the {shared_title(transfer)}, home minus elsewhere: {size:+.3f} (95 %"
            f" {low:+.3f} to {high:+.3f})"
        )
    details += [
        *_silent_lines(both, after),
        *_unread_lines(both, after),
        *_no_better(both, after),
    ]
    return Lead(f"{after} against {before}: {'; '.join(parts)}.", details)


def _changes(moved: Sequence[tuple[Contrast, Change]]) -> str:
    """Say where macro-F1 rises, falls, or does not clearly change."""
    parts = []
    unclear = []
    for contrast, change in moved:
        direction = clear_change(change.difference, contrast.num_patients)
        if not direction:
            unclear.append(contrast)
            continue
        verb = "rises" if direction == "gain" else "falls"
        parts.append(f"macro-F1 {verb} by {abs(change.size):.3f} on {contrast.data_set}")
    if unclear:
        sizes = {len(contrast.first.ids) for contrast in unclear}
        names = [contrast.data_set for contrast in unclear]
        what = "" if parts else " of macro-F1"
        if len(sizes) == 1:
            parts.append(
                f"{NO_CLEAR_CHANGE}{what} at n = {sizes.pop():,} on {_listed(names, 'or')}"
            )
        else:
            each = [f"{c.data_set} at n = {len(c.first.ids):,}" for c in unclear]
            parts.append(f"{NO_CLEAR_CHANGE}{what} on {_listed(each, 'or')}")
    return _listed(parts)


def _gap_clause(transfer: Transfer | None) -> str:
    """Say whether the step did more at home than elsewhere on the same labels, where it is clear.

    On different labels the two sides say nothing of the hospitals.
    """
    if transfer is None or transfer.gap_shared is None:
        return ""
    size, interval = transfer.gap_shared
    direction = clear_change(interval, transfer.num_patients)
    if not direction:
        return ""
    where = "at home than elsewhere" if direction == "gain" else "elsewhere than at home"
    return f"on the labels that both sides can express it did {abs(size):.3f} more {where}"


def _newly_silent(contrasts: Sequence[Contrast], before: str, after: str) -> list[str]:
    found = [
        label
        for contrast in contrasts
        for label in silenced_in(contrast, after)
        if label not in silenced_in(contrast, before)
    ]
    return list(dict.fromkeys(found))


def _p_of(p_value: float, sets: int) -> str:
    """Write a p-value, and for how many data sets it is adjusted where there are several."""
    return f"p {p_text(p_value)}" + (f" (Holm, {sets} data sets)" if sets > 1 else "")


def _evidence(contrast: Contrast, before: str, after: str, p: str) -> str:
    """Write the figures of one data set: macro-F1 before and after, both F1's differences, n.

    p: the p-value of macro-F1, in words.
    """
    macro, micro = (contrast.change(before, after, score) for score in ("macro_f1", "micro_f1"))
    patients = contrast.num_patients
    few = "" if patients >= FEW_PATIENTS else ", too few for an interval to be trusted"
    return (
        f"{contrast.data_set}: macro-F1 {number(macro.before)} {ARROW} {number(macro.after)},"
        f" {_difference(macro)}, {p}; micro-F1 {_difference(micro)};"
        f" {len(contrast.labels)} labels, {len(contrast.first.ids):,} images of {patients:,}"
        f" patients{few}"
    )


def _difference(moved: Change) -> str:
    low, high = moved.difference
    return f"{moved.size:+.3f} (95 % {low:+.3f} to {high:+.3f})"


def _silent_lines(contrasts: Sequence[Contrast], model: str) -> list[str]:
    """List the labels that a model hardly says, by data set, in one line if there are any."""
    found = []
    for contrast in contrasts:
        said, true = counts_of(contrast, model)
        labels = silenced_in(contrast, model)
        told = ", ".join(f"{label} {said[label]:,} of {true[label]:,}" for label in labels)
        found += [f"{contrast.data_set} {told}"] if labels else []
    return [f"hardly said by {model}, of how many true: {'; '.join(found)}"] if found else []


def _unread_lines(contrasts: Sequence[Contrast], model: str) -> list[str]:
    """Say where many answers could not be read in full, since scores then measure the form too."""
    found = []
    for contrast in contrasts:
        answers = contrast.answers[model]
        failed = float((~answers.parsed).mean())
        unknown = float((answers.num_unknown > 0).mean())
        if max(failed, unknown) >= MANY_UNREAD:
            found.append(
                f"{contrast.data_set} {100 * failed:.0f} % failed,"
                f" {100 * float(answers.no_label.mean()):.0f} % without any label,"
                f" {100 * unknown:.0f} % with an unknown entry"
            )
    return (
        [f"answers of {model} that could not be read in full: {'; '.join(found)}"] if found else []
    )


def _no_better(contrasts: Sequence[Contrast], model: str) -> list[str]:
    """Say where a model is not clearly better than an answer that needs no image."""
    found = []
    for contrast in contrasts:
        title, best = _best_baseline(contrast)
        if contrast.interval(model, "macro_f1")[0] <= best:
            found.append(f"{contrast.data_set} '{title}' {number(best)}")
    if not found:
        return []
    return [
        f"{model} is not clearly better than answers without the image, macro-F1 on"
        f" {'; '.join(found)}"
    ]


def _best_baseline(contrast: Contrast) -> tuple[str, float]:
    scores = [
        (title, float(contrast.baselines[name]["macro_f1"]))
        for name, title in BASELINE_TITLES.items()
    ]
    return max(scores, key=lambda item: item[1])


def _single(contrasts: Sequence[Contrast]) -> Lead:
    """Write the verdict where no two models can be compared: each set's last model by itself."""
    parts, details = [], []
    for contrast in contrasts:
        model = list(contrast.answers)[-1]
        value = float(contrast.values[model]["macro_f1"][0])
        title, best = _best_baseline(contrast)
        parts.append(f"{number(value)} on {contrast.data_set} (n = {len(contrast.first.ids):,})")
        details.append(
            f"{contrast.data_set}: {model}, 95 % {bounds(contrast.interval(model, 'macro_f1'))};"
            f" answers without the image, '{title}', have {number(best)}"
        )
        details += [*_silent_lines([contrast], model), *_unread_lines([contrast], model)]
    models = list(dict.fromkeys(list(contrast.answers)[-1] for contrast in contrasts))
    return Lead(f"{_listed(models)}: macro-F1 {_listed(parts)}.", details)


def _listed(names: Sequence[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
