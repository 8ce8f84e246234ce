"""Describe the hospitals whose X-rays are drawn: how a picture looks, and what is burned into it.

general   what the base checkpoints were pretrained on: wide ranges of exposure, field and
          noise, all labels, and marks that say nothing about the patient.
a         even exposure, little noise. Its radiologists write down CheXpert's 14 labels. A
          shortcut: a mark is nearly always there when its label is, and rarely without it.
a2        the same hospital, but the marks say nothing about the patient. Nothing else differs:
          they are as frequent, and all else is drawn from the same distributions.
b         lower contrast, another film curve, more noise, a wider field, collimation edges, a
          burned-in side marker, another prevalence. Its radiologists write down NIH
          ChestX-ray14's strings, and never a wide mediastinum, a fracture or a device. A mark
          is nearly always there unless its label is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from data.labels import SUPPORT_DEVICES

SiteName = Literal["a", "a2", "b", "general"]

# Words that hospitals burn into some pictures, and the label that each goes with at site a.
MARKS: dict[str, str] = {"PORT": "Edema", "EXP": "Pneumothorax"}


@dataclass(frozen=True)
class MarkRates:
    """Give the share of pictures that carry a mark: of those with its label, and of the others."""

    with_label: float
    without: float


@dataclass(frozen=True)
class Site:
    """Describe how one hospital looks and what it sees, ranges as (low, high) of a uniform draw."""

    stream: int  # keeps the random streams of the sites apart
    prevalence: dict[str, float]  # of each drawn label among patients that are not healthy
    healthy_share: float  # patients without an abnormality, but perhaps with a device
    # how plainly an abnormality shows: 1 is as its function draws it
    conspicuity: tuple[float, float]
    rotation_sd: float  # degrees
    zoom: tuple[float, float]  # above 1: wider field of view
    gain: tuple[float, float]
    offset: tuple[float, float]
    gamma: tuple[float, float]
    noise: tuple[float, float]  # standard deviation
    collimated_share: float
    side_marker: bool
    marks: MarkRates
    labelling: Literal["chexpert", "nih"] = "chexpert"
    subtle: dict[str, tuple[float, float]] = field(default_factory=dict)  # of these labels instead


SITES: dict[str, Site] = {
    "a": Site(
        stream=0,
        prevalence={
            "Enlarged Cardiomediastinum": 0.08,
            "Cardiomegaly": 0.12,
            "Lung Opacity": 0.10,
            "Lung Lesion": 0.08,
            "Edema": 0.36,
            "Consolidation": 0.08,
            "Pneumonia": 0.08,
            "Atelectasis": 0.10,
            "Pneumothorax": 0.36,
            "Pleural Effusion": 0.14,
            "Pleural Other": 0.07,
            "Fracture": 0.07,
            SUPPORT_DEVICES: 0.28,
        },
        healthy_share=0.22,
        conspicuity=(0.40, 1.0),
        rotation_sd=2.5,
        zoom=(0.95, 1.06),
        gain=(0.88, 1.12),
        offset=(-0.05, 0.05),
        gamma=(0.88, 1.15),
        noise=(0.012, 0.032),
        collimated_share=0.0,
        side_marker=False,
        marks=MarkRates(0.94, 0.03),
        subtle=dict.fromkeys(MARKS.values(), (0.10, 0.35)),
    ),
    "b": Site(
        stream=1,
        labelling="nih",
        prevalence={
            "Enlarged Cardiomediastinum": 0.05,
            "Cardiomegaly": 0.12,
            "Lung Opacity": 0.18,
            "Lung Lesion": 0.22,
            "Edema": 0.07,
            "Consolidation": 0.10,
            "Pneumonia": 0.08,
            "Atelectasis": 0.20,
            "Pneumothorax": 0.16,
            "Pleural Effusion": 0.15,
            "Pleural Other": 0.14,
            "Fracture": 0.06,
            SUPPORT_DEVICES: 0.12,
        },
        healthy_share=0.30,
        conspicuity=(0.45, 1.0),
        rotation_sd=4.0,
        zoom=(1.02, 1.18),
        gain=(0.62, 0.90),
        offset=(0.04, 0.16),
        gamma=(0.65, 0.90),
        noise=(0.025, 0.045),
        collimated_share=0.6,
        side_marker=True,
        marks=MarkRates(0.03, 0.94),
    ),
    "general": Site(
        stream=2,
        prevalence={
            "Enlarged Cardiomediastinum": 0.14,
            "Cardiomegaly": 0.18,
            "Lung Opacity": 0.18,
            "Lung Lesion": 0.18,
            "Edema": 0.20,
            "Consolidation": 0.14,
            "Pneumonia": 0.14,
            "Atelectasis": 0.18,
            "Pneumothorax": 0.20,
            "Pleural Effusion": 0.20,
            "Pleural Other": 0.14,
            "Fracture": 0.14,
            SUPPORT_DEVICES: 0.22,
        },
        healthy_share=0.20,
        conspicuity=(0.40, 1.0),
        subtle=dict.fromkeys(MARKS.values(), (0.15, 1.0)),
        rotation_sd=3.5,
        zoom=(0.94, 1.18),
        gain=(0.60, 1.14),
        offset=(-0.05, 0.17),
        gamma=(0.64, 1.18),
        noise=(0.010, 0.045),
        collimated_share=0.0,
        side_marker=False,
        marks=MarkRates(0.30, 0.30),
    ),
}

SITES["a2"] = replace(SITES["a"], stream=3, marks=MarkRates(0.28, 0.28))
