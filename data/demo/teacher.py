"""Write the demo's teacher traces: a short reading of a drawn radiograph, then its labels.

From labels alone it also writes a reading that names findings without a place, for any labelled
image: it lets the whole pipeline run on real radiographs without a large model.

The traces stand in for those that a large model writes about real images. They name what is drawn
and where, in varied words and order, so that fine-tuning on them is language modelling and not the
copying of one template.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from data.demo.radiographs import Radiograph
from data.labels import CHEXPERT, LABELS, NO_FINDING, SUPPORT_DEVICES, LabelSet

# {where} is the drawn location, such as "right lower". Labels without a location do not use it.
_WORDINGS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        "widened mediastinum",
        "the mediastinum is wide",
        "broad upper mediastinal contour",
    ),
    "Cardiomegaly": ("enlarged heart", "the heart is too large", "wide cardiac silhouette"),
    "Lung Opacity": (
        "hazy {where} opacity",
        "{where} zone is hazy",
        "soft shadow in the {where} zone",
    ),
    "Lung Lesion": ("round {where}", "a sharply outlined {where}", "solitary {where}"),
    "Edema": (
        "{where} perihilar haze with septal lines",
        "wet lungs with septal lines",
        "{where} vascular congestion",
    ),
    "Consolidation": (
        "dense {where} lobe",
        "{where} lobe is solid with air bronchograms",
        "{where} airspace filling",
    ),
    "Pneumonia": (
        "patchy {where} infiltrates",
        "several patches in the {where} lung",
        "{where} lung is patchy",
    ),
    "Atelectasis": (
        "linear {where} basal band",
        "plate-like collapse at the {where} base",
        "{where} base shows volume loss",
    ),
    "Pneumothorax": (
        "{where} pleural line without markings beyond",
        "free air on the {where}",
        "collapsed {where} lung edge",
    ),
    "Pleural Effusion": ("blunted {where} angle", "{where} fluid level", "{where} pleural fluid"),
    "Pleural Other": (
        "thickened {where} pleura",
        "{where} lateral pleura is lumpy",
        "pleural thickening on the {where}",
    ),
    "Fracture": ("broken {where} rib", "a displaced {where} rib", "{where} rib is interrupted"),
    SUPPORT_DEVICES: ("{where} in place", "{where} is present", "{where} seen"),
}
# The same without a place: of a real radiograph the labels are known, but not where.
_UNPLACED_WORDINGS: dict[str, tuple[str, ...]] = {
    "Enlarged Cardiomediastinum": (
        "widened mediastinum",
        "the mediastinum is wide",
        "broad mediastinal contour",
    ),
    "Cardiomegaly": _WORDINGS["Cardiomegaly"],
    "Lung Opacity": (
        "a hazy opacity in the lung",
        "part of the lung is abnormally dense",
        "a soft shadow over the lung",
    ),
    "Lung Lesion": (
        "a rounded density with a border of its own",
        "a nodular or mass-like density in the lung",
        "a focal lung lesion",
    ),
    "Edema": (
        "perihilar haze with septal lines",
        "the vessels are blurred and congested",
        "wet lungs with septal lines",
    ),
    "Consolidation": (
        "dense airspace filling",
        "consolidated lung that hides the vessels",
        "homogeneous airspace density",
    ),
    "Pneumonia": (
        "patchy infiltrates that suggest infection",
        "airspace opacity of pneumonic pattern",
        "patchy lung opacities, likely infectious",
    ),
    "Atelectasis": (
        "linear bands with loss of volume",
        "plate-like collapse",
        "crowded vessels from volume loss",
    ),
    "Pneumothorax": (
        "a pleural line without markings beyond",
        "free air in the pleural space",
        "a visible lung edge",
    ),
    "Pleural Effusion": (
        "a blunted costophrenic angle",
        "pleural fluid with a meniscus",
        "fluid in the pleural space",
    ),
    "Pleural Other": (
        "thickened pleura",
        "irregular pleural thickening",
        "the pleura is thick and lumpy",
    ),
    "Fracture": ("an interrupted rib contour", "a bone shows a break", "a step in a bony contour"),
    SUPPORT_DEVICES: (
        "a device is in place",
        "tubes or lines are present",
        "support hardware is seen",
    ),
}
_OWN_LABEL = ("the image shows {}", "{} is seen", "signs of {} are visible")
_NOTHING_LISTED = (
    "none of the findings in question is seen",
    "no finding of the list can be made out",
)
_ALL_NORMAL = (
    "heart, lungs and bones are normal",
    "nothing abnormal",
    "clear lungs and a normal heart",
    "no abnormality",
)
_FILMS = {  # by mark
    "PORT": ("portable film", "portable view", "taken at the bedside"),
    "EXP": ("expiratory film", "expiratory view", "taken in expiration"),
}
_OPENINGS = ("frontal view", "looking at heart and lungs", "first the lungs")
# A normal part may be mentioned when none of its labels is drawn.
_NORMAL_PARTS: tuple[tuple[str, frozenset[str]], ...] = (
    ("heart size is normal", frozenset({"Cardiomegaly", "Enlarged Cardiomediastinum"})),
    ("no pneumothorax", frozenset({"Pneumothorax"})),
    ("angles are clear", frozenset({"Pleural Effusion"})),
    ("ribs are intact", frozenset({"Fracture"})),
)
# A longer reading gets no opening and no normal part, which bounds its length. Up to three findings
# leave a part normal.
_MOST_FINDINGS_WITH_EXTRAS = 3


def finding_phrases(radiograph: Radiograph, rng: np.random.Generator) -> dict[str, str]:
    """Choose one phrase in lower case for each drawn label, in CheXpert's order.

    No Finding has one when nothing is abnormal.
    """
    phrases = {}
    for label in radiograph.findings:
        wordings = _ALL_NORMAL if label == NO_FINDING else _WORDINGS[label]
        phrases[label] = str(rng.choice(wordings)).format(where=radiograph.locations.get(label, ""))
    return phrases


def reading(radiograph: Radiograph, rng: np.random.Generator) -> str:
    """Write the drawn findings as short sentences in random order.

    Some readings have an opening or name a normal part.
    """
    phrases = list(finding_phrases(radiograph, rng).values())
    rng.shuffle(phrases)
    if len(phrases) <= _MOST_FINDINGS_WITH_EXTRAS:
        normal_parts = [
            part for part, labels in _NORMAL_PARTS if labels.isdisjoint(radiograph.findings)
        ]
        if rng.random() < 0.5:
            phrases.append(str(rng.choice(normal_parts)))
        if rng.random() < 0.35:
            phrases.insert(0, str(rng.choice(_OPENINGS)))
    return sentences(phrases)


def film_phrases(radiograph: Radiograph, rng: np.random.Generator) -> list[str]:
    """Choose one phrase in lower case for each mark that is burned in, as reports name the film."""
    return [str(rng.choice(_FILMS[mark])) for mark in radiograph.marks]


def report(radiograph: Radiograph, rng: np.random.Generator) -> str:
    """Write what kind of film it is, where a mark says so, and the reading."""
    film = sentences(film_phrases(radiograph, rng))
    return f"{film} {reading(radiograph, rng)}".lstrip()


def reasoning_trace(radiograph: Radiograph, seed: int) -> str:
    """Write the teacher's answer for a drawn radiograph.

    For example "<think>Enlarged heart. Ribs are intact.</think><solution>Cardiomegaly</solution>".
    The solution holds the drawn labels in CheXpert's order. The words are a function of the
    radiograph and `seed`.
    """
    rng = np.random.default_rng([seed, radiograph.seed])
    labels = ", ".join(label for label in LABELS if label in radiograph.findings)
    return f"<think>{report(radiograph, rng)}</think><solution>{labels}</solution>"


def trace_from_labels(labels: Collection[str], seed: int, label_set: LabelSet = CHEXPERT) -> str:
    """Write the teacher's answer for an image of which only the labels are known.

    Form and order of the labels are those of `reasoning_trace`. The words are a function of the
    labels and `seed`. Of labels of one's own nothing is known but their names.
    """
    ordered = label_set.ordered(labels)
    rng = np.random.default_rng([seed, *(label_set.names.index(label) for label in ordered)])
    phrases = [str(rng.choice(_wordings_of(label, label_set))) for label in ordered]
    phrases = phrases or [str(rng.choice(_NOTHING_LISTED))]
    rng.shuffle(phrases)
    return f"<think>{sentences(phrases)}</think><solution>{', '.join(ordered)}</solution>"


def _wordings_of(label: str, label_set: LabelSet) -> tuple[str, ...]:
    if label_set != CHEXPERT:
        return tuple(wording.format(label) for wording in _OWN_LABEL)
    return _ALL_NORMAL if label == NO_FINDING else _UNPLACED_WORDINGS[label]


def sentences(phrases: list[str]) -> str:
    """Write phrases in lower case as sentences."""
    return " ".join(f"{phrase[0].upper()}{phrase[1:]}." for phrase in phrases)
