"""Tell whether answers depend on the image, and whether they agree with their own reasoning.

A vision-language model may answer from what is usual. So every image is answered a second time from
another patient's X-ray: what stays the same did not come from the image. And an answer may give
labels that its reasoning never mentions, or leave out those that it states: then the reasoning is
no account of the answer.

What a reasoning says of a label is read by rules that accuse late. A label is stated where its
name, or another spelling of it, stands in a sentence without any word of negation, doubt or search.
A label is mentioned wherever its name or a word for it stands, negated or not. Labels of one's own
have no other words than their names and aliases. No Finding, or their exclusive label, is left out
of both: normality has no fixed words.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from data.answers import Answer
from data.examples import Example
from data.files import DataError
from data.labels import CHEXPERT, LabelSet
from data.predictions import Prediction
from eval.end_table import METRICS, clipped
from eval.metrics import RESAMPLES, drawn_patients, known_interval, patient_totals, scores_of_totals
from eval.scores import answer_matrices, evaluated_columns, label_set_of


# ---- another patient's image ---------------------------------------------------------------------
def partners_of(examples: Sequence[Example], seed: int) -> list[Example]:
    """Give every example another patient's, whose image it gets, each once, the same for a seed.

    The patients are put into random order and the examples, patient by patient, handed on by as
    many places as the patient with the most images has. So nobody gets an own image.

    Raises DataError where one patient has more than half of all images.
    """
    by_patient: defaultdict[str, list[int]] = defaultdict(list)
    for position, example in enumerate(examples):
        by_patient[example.patient_id].append(position)
    most = max(map(len, by_patient.values()))
    if 2 * most > len(examples):
        patient = max(by_patient, key=lambda name: len(by_patient[name]))
        raise DataError(
            [
                f"--swap_images: patient {patient!r} has {most} of the {len(examples)} images, so"
                " not all of them can get another patient's; give more patients"
            ]
        )
    rng = np.random.default_rng(seed)
    patients = sorted(by_patient)
    order = [
        position
        for index in rng.permutation(len(patients))
        for position in rng.permutation(by_patient[patients[index]]).tolist()
    ]
    partners = list(examples)
    for place, position in enumerate(order):
        partners[position] = examples[order[(place + most) % len(order)]]
    return partners


# ---- what a reasoning says -----------------------------------------------------------------------
# Words of negation, doubt, choice or search. A sentence with one of them states nothing.
_CUES = (
    r"no|not|n't|none|nor|neither|never|nothing|without|absent|absence|negative|free|clear\w*"
    r"|den(?:y|ies|ied)|unlikely|exclud\w*|rul(?:e|es|ed|ing) out|resol\w+|unremarkable|normal\w*"
    r"|or|vs|versus|if|whether|may|might|could|can|cannot|would|should|possib\w+|probab\w+|perhaps"
    r"|maybe|likely|question\w*|suspect\w*|suspici\w+|suggest\w*|concern\w*|consider\w*"
    r"|differential|uncertain\w*|unclear|rather|instead|history|previous\w*|prior|former\w*"
    r"|check\w*|look\w*|search\w*|assess\w*|evaluat\w+|examin\w+|let"
)
_CUE = re.compile(rf"\b(?:{_CUES})\b|n['\u2019]t\b|\?")
_BULLET = re.compile(r"[-*\u2022]|\d+[.)]")
_SENTENCE_END = re.compile(r"(?<=[.!?;]) ")
_ELSEWHERE = r"(?<!pericardial )(?<!subcutaneous )(?<!tissue )"
# Words by which a reading may mean a label: it is enough to write one of them.
_WORDS = {
    "Enlarged Cardiomediastinum": r"mediastin\w*|cardiomediastin\w*|silhouette|hilum|hilar|hila",
    "Cardiomegaly": r"cardi\w*|heart",
    "Lung Opacity": r"opaci\w*|haz\w+|dens\w+|shadow\w*|infiltrat\w*|patch\w*|airspace|consolid\w*"
    r"|ground[- ]glass|white\w*",
    "Lung Lesion": r"lesion\w*|nodul\w*|mass\w*|tumou?r\w*|round\w*|solitary|outlined|cavit\w*",
    "Edema": r"o?edema\w*|congest\w*|vascul\w*|vessel\w*|perihilar|septal|interstiti\w*|kerley|wet"
    r"|fluid",
    "Consolidation": r"consolid\w*|solid|bronchogram\w*|airspace|dens\w+|opaci\w*",
    "Pneumonia": r"pneumon\w*|infect\w*|infiltrat\w*|patch\w*|consolid\w*|airspace",
    "Atelectasis": r"atelecta\w*|collaps\w*|volume|basal|band\w*|linear|plate",
    "Pneumothorax": r"pneumothora\w*|pleural|free air|lung edge|collaps\w*",
    "Pleural Effusion": r"effusion\w*|fluid|blunt\w*|angle\w*|costophrenic|meniscus|pleura\w*",
    "Pleural Other": r"pleura\w*|thicken\w*|plaque\w*|lumpy",
    "Fracture": r"fractur\w*|broken|break\w*|ribs?|displac\w*|bon(?:e|es|y)|clavic\w*|vertebra\w*",
    "Support Devices": r"device\w*|tub(?:e|es|ing)|lines?|cathet\w*|pacemaker\w*|leads?|wires?"
    r"|clips?|port|drain\w*|valve\w*|hardware|sternotomy|picc|icd|stent\w*|implant\w*|in place",
}


@lru_cache(maxsize=8)
def _stated(label_set: LabelSet) -> Mapping[str, re.Pattern[str]]:
    """Make the pattern of each label's names in a sentence of small letters."""
    patterns = {}
    for label in label_set.names:
        if label != label_set.exclusive:
            aliases = (alias for alias, of in label_set.aliases.items() if of == label)
            names = "|".join(re.escape(name.casefold()) for name in (label, *aliases))
            patterns[label] = re.compile(rf"{_ELSEWHERE}(?<!\w)(?:{names})s?(?!\w)")
    return patterns


@lru_cache(maxsize=8)
def _mentioned(label_set: LabelSet) -> Mapping[str, re.Pattern[str]]:
    """Make the pattern of each label's names and, for those of CheXpert, of words for them."""
    words = _WORDS if label_set == CHEXPERT else {}
    return {
        label: re.compile(rf"\b(?:{words[label]})\b|{named.pattern}") if label in words else named
        for label, named in _stated(label_set).items()
    }


def sentences_of(reasoning: str) -> list[str]:
    """Cut a reasoning into sentences, in small letters. A list is one with its heading."""
    paragraphs: list[list[str]] = []
    for line in reasoning.casefold().splitlines():
        words = " ".join(line.split())
        if words and paragraphs and _BULLET.match(words):
            paragraphs[-1].append(words)
        elif words:
            paragraphs.append([words])
    return [sentence for lines in paragraphs for sentence in _SENTENCE_END.split(" ".join(lines))]


@lru_cache(maxsize=4096)
def stated_labels(reasoning: str, label_set: LabelSet = CHEXPERT) -> frozenset[str]:
    """Find the labels that a reasoning states by name, without negation or doubt."""
    sentences = [one for one in sentences_of(reasoning) if not _CUE.search(one)]
    return frozenset(
        label
        for label, pattern in _stated(label_set).items()
        if any(pattern.search(sentence) for sentence in sentences)
    )


@lru_cache(maxsize=4096)
def mentioned_labels(reasoning: str, label_set: LabelSet = CHEXPERT) -> frozenset[str]:
    """Find the labels that a reasoning mentions at all, by name or by a word for them."""
    text = " ".join(reasoning.casefold().split())
    patterns = _mentioned(label_set)
    return frozenset(label for label, pattern in patterns.items() if pattern.search(text))


def stated_not_answered(answer: Answer, label_set: LabelSet = CHEXPERT) -> frozenset[str]:
    """Find the labels that an answer's reasoning states and the answer leaves out."""
    return stated_labels(answer.think or "", label_set) - set(answer.labels)


def answered_not_mentioned(answer: Answer, label_set: LabelSet = CHEXPERT) -> frozenset[str]:
    """Find the labels that an answer gives and its reasoning never mentions."""
    mentioned = mentioned_labels(answer.think or "", label_set)
    return frozenset(answer.labels) - mentioned - {label_set.exclusive or ""}


def has_reasoning(answer: Answer) -> bool:
    """Tell whether an answer could be read and has any words of reasoning."""
    return answer.parsed and bool(answer.think and answer.think.strip())


# ---- scores --------------------------------------------------------------------------------------
def same_answer(own: Prediction, other: Prediction) -> bool:
    """Tell whether two answers have the same entries, or are the same unreadable text."""
    first, second = own.answer, other.answer
    if not (first.parsed and second.parsed):
        return first.parsed == second.parsed and own.completion == other.completion
    return set(first.labels) == set(second.labels) and set(first.unknown) == set(second.unknown)


def same_reasoning(own: Prediction, other: Prediction) -> bool | None:
    """Tell whether two reasonings are the same words, None where neither answer has any."""
    first, second = ((one.answer.think or "").split() for one in (own, other))
    return first == second if first or second else None


def faithfulness_scores(
    own: Sequence[Prediction],
    swapped: Sequence[Prediction],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """Compare answers to the own images with those to another patient's -> "faithfulness".

    own: predictions of a data set. swapped: those of the same examples from swapped images, in the
    same order, with the other example's id as "image_of". Both are scored against the own truth.
    seed, resamples: of the 95 % intervals by patient.

    "same_truth" is the share of the images whose partner has the same true labels, where an
    unchanged answer is no fault. "labels_changed" is the mean number of labels that come or go.
    "per_label" counts the images of which a label is said, said from the swapped image, and both.
    Shares of reasoning are among the answers with reasoning, None where there is none.
    """
    columns = evaluated_columns(own)
    patients = [prediction.patient_id for prediction in own]
    matrices = [answer_matrices(rows, columns) for rows in (own, swapped)]
    totals = [patient_totals(*one[:3], patients, one.jaccard) for one in matrices]
    counted = _counted(own, swapped)
    values = np.array(list(counted.values()), dtype=float).T  # [N, S], None is NaN
    sums = np.zeros((len(totals[0]), 2 * len(counted)))  # [P, 2S]: values, and how many there are
    rows = np.concatenate([np.nan_to_num(values), ~np.isnan(values)], axis=1)
    np.add.at(sums, np.unique(patients, return_inverse=True)[1], rows)
    tables = [*totals, sums]
    seen = _statistics([table.sum(axis=0, keepdims=True) for table in tables], list(counted))
    drawn: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    # counts and sums of Jaccard values, far below 2^24: fp32 is exact to 7 digits
    small = [table.astype(np.float32) for table in tables]
    for weights in drawn_patients(len(set(patients)), seed=seed, resamples=resamples):
        weights = weights.astype(np.float32)
        resampled = _statistics([weights @ table for table in small], list(counted))
        for name, numbers in resampled.items():
            drawn[name].append(numbers)
    point = {name: float(numbers[0]) for name, numbers in seen.items()}
    intervals = {name: known_interval(np.concatenate(numbers)) for name, numbers in drawn.items()}
    result: dict[str, Any] = {
        "n": len(own),
        "num_patients": len(sums),
        "same_truth": _same_truth(own, swapped),
    }
    for group in ("own", "swapped", "difference"):
        result[group] = {metric: point[f"{group}/{metric}"] for metric in METRICS}
    result["difference_intervals"] = {
        metric: intervals[f"difference/{metric}"] for metric in METRICS
    }
    for place, name in enumerate(counted):
        number = int((~np.isnan(values[:, place])).sum())
        result[name] = {
            "mean": point[name] if number else None,
            "interval": intervals[name],
            "n": number,
        }
    return result | {
        "stated_not_answered_labels": _by_label(own, stated_not_answered),
        "answered_not_mentioned_labels": _by_label(own, answered_not_mentioned),
        "per_label": _label_changes(own, swapped, columns),
    }


def _counted(
    own: Sequence[Prediction], swapped: Sequence[Prediction]
) -> dict[str, list[float | None]]:
    """Say of each image what is averaged over a data set, None where it has no say."""
    pairs = list(zip(own, swapped, strict=True))
    return {
        "answers_unchanged": [same_answer(*pair) for pair in pairs],
        "labels_changed": [
            len(set(one.answer.labels) ^ set(other.answer.labels)) for one, other in pairs
        ],
        "reasoning_unchanged": [same_reasoning(*pair) for pair in pairs],
        "stated_not_answered": [
            bool(stated_not_answered(one.answer, one.label_set))
            if has_reasoning(one.answer)
            else None
            for one in own
        ],
        "answered_not_mentioned": [
            bool(answered_not_mentioned(one.answer, one.label_set))
            if has_reasoning(one.answer)
            else None
            for one in own
        ],
    }


def _statistics(tables: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute all statistics of R totals -> {name: [R]}, NaN for a mean over nothing.

    tables: of the own answers, of those to swapped images, and of what `_counted` names.
    """
    own, other = (scores_of_totals(table.astype(float)) for table in tables[:2])
    sums, numbers = np.split(tables[2].astype(float), 2, axis=1)  # [R, S] each
    with np.errstate(invalid="ignore"):
        means = sums / numbers
    statistics = {}
    for metric in METRICS:
        statistics[f"own/{metric}"] = own[metric]
        statistics[f"swapped/{metric}"] = other[metric]
        statistics[f"difference/{metric}"] = other[metric] - own[metric]
    return statistics | {name: means[:, place] for place, name in enumerate(names)}


def _same_truth(own: Sequence[Prediction], swapped: Sequence[Prediction]) -> float:
    truth = {prediction.id: set(prediction.labels) for prediction in own}
    same = [truth[other.id] == truth[other.extra["image_of"]] for other in swapped]
    return float(np.mean(same))


def _by_label(
    own: Sequence[Prediction], found: Callable[[Answer, LabelSet], frozenset[str]]
) -> dict[str, int]:
    """Count the answers with reasoning in which a label is found -> {label: count above 0}."""
    counts = Counter(
        label
        for one in own
        if has_reasoning(one.answer)
        for label in found(one.answer, one.label_set)
    )
    return {label: counts[label] for label in label_set_of(own).ordered(counts)}


def _label_changes(
    own: Sequence[Prediction], swapped: Sequence[Prediction], columns: Sequence[str]
) -> dict[str, dict[str, int]]:
    said = [[set(one.answer.labels) for one in rows] for rows in (own, swapped)]
    return {
        label: {
            "said": sum(label in labels for labels in said[0]),
            "said_swapped": sum(label in labels for labels in said[1]),
            "both": sum(label in a and label in b for a, b in zip(*said, strict=True)),
        }
        for label in columns
    }


# ---- text ----------------------------------------------------------------------------------------
def format_faithfulness(results: Mapping[str, dict[str, Any]]) -> str:
    """Say in plain words what swapped images changed, "" where none were swapped.

    results: {data set: scores}.
    """
    paragraphs = [
        "\n".join(textwrap.wrap(_in_words(clipped(name), scores["faithfulness"]), 100))
        for name, scores in results.items()
        if "faithfulness" in scores
    ]
    return "\n\n".join(paragraphs)


def _in_words(name: str, scores: Mapping[str, Any]) -> str:
    low, high = scores["difference_intervals"]["jaccard"]
    own, swapped = scores["own"], scores["swapped"]
    reasoning = scores["reasoning_unchanged"]
    kept = f"{_percent(scores['answers_unchanged'])} of the answers"
    if reasoning["n"]:
        kept += f" and {_percent(reasoning)} of the reasonings"
    words = [
        f"{name}: {verdict(scores)} From another patient's X-ray Jaccard goes"
        f" {own['jaccard']:.3f} -> {swapped['jaccard']:.3f} ({low:+.3f}..{high:+.3f}), macro-F1"
        f" {own['macro_f1']:.3f} -> {swapped['macro_f1']:.3f}.",
        f"{kept} stay the same ({100 * scores['same_truth']:.0f} % of the swapped pairs have the"
        " same true labels).",
    ]
    if scores["stated_not_answered"]["n"]:
        words.append(
            f"{_percent(scores['stated_not_answered'])} of the answers leave out a label that their"
            f" reasoning states, {_percent(scores['answered_not_mentioned'])} give one that it"
            " never mentions."
        )
    return " ".join(words)


def verdict(scores: Mapping[str, Any]) -> str:
    """Say in a sentence whether the answers depend on the images.

    scores: as `faithfulness_scores` makes them.
    """
    if scores["answers_unchanged"]["mean"] == 1:
        return "No answer depends on the image."
    if scores["difference_intervals"]["jaccard"][1] < 0:
        return "The answers use the image."
    return "No clear sign that the answers use the image."


def _percent(share: Mapping[str, Any]) -> str:
    return f"{100 * share['mean']:.0f} %"
