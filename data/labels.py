"""The 14 CheXpert labels, their spellings, and how another hospital's categories map onto them.

Everything that compares labels goes through `canonical_label`, so that a model answer, a data file and a
score table can never disagree about spelling.
"""
from __future__ import annotations

import unicodedata
from dataclasses import dataclass

NO_FINDING = "No Finding"
SUPPORT_DEVICES = "Support Devices"

# CheXpert's order (Irvin et al., 2019, train.csv). Score tables and label vectors use this order.
LABELS: tuple[str, ...] = (
    NO_FINDING,
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    SUPPORT_DEVICES,
)

# Spellings that mean exactly one of the 14 and nothing else. Deliberately short: 'nodule', 'normal' or 'infiltrate'
# are findings or judgements, not other names of a label, and an answer that uses them counts as unknown.
ALIASES: dict[str, str] = {
    "airspace opacity": "Lung Opacity",  # MIMIC-CXR-JPG 2.1.0, the radiologists' test labels
    "lung opacities": "Lung Opacity",
    "lung lesions": "Lung Lesion",
    "pulmonary edema": "Edema",
    "oedema": "Edema",
    "effusion": "Pleural Effusion",
    "pleural effusions": "Pleural Effusion",
    "fractures": "Fracture",
    "support device": SUPPORT_DEVICES,
    "no findings": NO_FINDING,
    "enlarged cardiomediastinal silhouette": "Enlarged Cardiomediastinum",
}

_CANONICAL = {label.casefold(): label for label in LABELS} | {alias.casefold(): label for alias, label in ALIASES.items()}
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))


def canonical_label(text: str) -> str | None:
    """The CheXpert label that `text` spells, or None.

    Case, Unicode compatibility forms, invisible characters, runs of white space, underscores, a list bullet in front
    and a full stop at the end are folded; nothing else is guessed.
    """
    folded = unicodedata.normalize("NFKC", text).translate(_INVISIBLE).replace("_", " ")
    folded = " ".join(folded.split()).strip("\"'`").lstrip("-*\u2022 ").rstrip(".: ").casefold()
    return _CANONICAL.get(folded)


@dataclass(frozen=True)
class Target:
    """What is true of one image, and which labels its source can express at all.

    A label outside `evaluated_labels` is unknown, not absent: rewards and scores must ignore it.
    """

    labels: frozenset[str]
    evaluated_labels: frozenset[str] = frozenset(LABELS)


# NIH ChestX-ray14's strings -> CheXpert labels. None: NIH has the category, but none of the 14 says the same thing
# ('Infiltration' is at best an approximate Lung Opacity), so it is dropped.
NIH_TO_CHEXPERT: dict[str, str | None] = {
    "No Finding": NO_FINDING,
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Emphysema": None,
    "Fibrosis": None,
    "Hernia": None,
    "Infiltration": None,
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
}

# The nine categories of the paper's Table 6, in CheXpert's order. NIH does label effusions; the paper's nine leave them
# out, so the ten are offered as a variant.
NIH_NINE: tuple[str, ...] = (
    NO_FINDING, "Cardiomegaly", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
    "Pleural Other",
)
NIH_TEN: tuple[str, ...] = tuple(label for label in LABELS if label in {*NIH_NINE, "Pleural Effusion"})


def chexpert_labels_of_nih(
    source_labels: list[str] | tuple[str, ...], evaluated: tuple[str, ...] = NIH_NINE
) -> tuple[str, ...]:
    """NIH strings of one image -> the CheXpert labels among `evaluated`, in CheXpert's order.

    Raises ValueError for a string that is not one of NIH's 15.
    """
    unknown = [s for s in source_labels if s not in NIH_TO_CHEXPERT]
    if unknown:
        raise ValueError(
            f"not a label of NIH ChestX-ray14: {', '.join(map(repr, unknown))}; known: {', '.join(NIH_TO_CHEXPERT)}"
        )
    mapped = {NIH_TO_CHEXPERT[s] for s in source_labels}
    return tuple(label for label in LABELS if label in mapped and label in evaluated)
