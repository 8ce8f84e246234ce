"""Draw synthetic frontal chest X-rays of two hospitals, to run everything without patients' data.

Nothing here is a patient. Every label is caused by something drawn, and every picture is a function
of a seed and a site. The two sites differ as real hospitals do:

    a   even exposure, little noise. Its radiologists write down CheXpert's 14 labels.
    b   lower contrast, another film curve, more noise, a wider field, collimation edges, a
        burned-in side marker, another prevalence. Its radiologists write down NIH ChestX-ray14's
        strings, and never a wide mediastinum, a fracture or a device.

A picture is drawn in three steps: anatomy (`_anatomy`), one function per finding (`_FINDINGS`),
exposure and noise (`_develop`). Each step and each finding has its own random stream, so the same
seed with one finding more or less shows the same patient under the same exposure.

Coordinates: x and y run from -1 to 1 over the picture, y downwards. The patient's right is on the
picture's left. Brightness runs from 0 (air) to 1 (metal) until `_develop` turns it into bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from data.labels import LABELS, NIH_NINE, NO_FINDING, SUPPORT_DEVICES, chexpert_labels_of_nih

IMAGE_SIZE = 112  # pixels; 8 x 8 patches of 14, which Qwen2.5-VL merges into 4 x 4 visual tokens
GRID_SIZE = 4  # cells a side of the coarse location map, one a visual token
GENERATOR_VERSION = "1"  # raise it when a seed no longer gives the same picture, labels or trace

SiteName = Literal["a", "b"]
_SIDES = {"right": -1.0, "left": 1.0}


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
    marker: bool


SITES: dict[str, Site] = {
    "a": Site(
        stream=0,
        prevalence={
            "Enlarged Cardiomediastinum": 0.13,
            "Cardiomegaly": 0.20,
            "Lung Opacity": 0.17,
            "Lung Lesion": 0.13,
            "Edema": 0.16,
            "Consolidation": 0.14,
            "Pneumonia": 0.13,
            "Atelectasis": 0.16,
            "Pneumothorax": 0.14,
            "Pleural Effusion": 0.24,
            "Pleural Other": 0.11,
            "Fracture": 0.12,
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
        marker=False,
    ),
    "b": Site(
        stream=1,
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
        marker=True,
    ),
}

MAX_ABNORMALITIES = 4  # devices not counted: keeps teacher traces short

# Site b's word for a drawn label. Lung Lesion is 'Mass' or 'Nodule' by size. Labels that are not in
# the table are never written down.
_NIH_STRINGS = {
    "Cardiomegaly": "Cardiomegaly",
    "Lung Opacity": "Infiltration",
    "Edema": "Edema",
    "Consolidation": "Consolidation",
    "Pneumonia": "Pneumonia",
    "Atelectasis": "Atelectasis",
    "Pneumothorax": "Pneumothorax",
    "Pleural Effusion": "Effusion",
    "Pleural Other": "Pleural_Thickening",
}


@dataclass(frozen=True)
class Radiograph:
    """Hold one drawn picture and everything that is known about it."""

    seed: int
    site: SiteName
    image: np.ndarray  # uint8 [112, 112]
    findings: tuple[str, ...]  # what is drawn, CheXpert labels in CheXpert's order
    locations: dict[str, str]  # drawn label -> words such as "right lower", "pacemaker" or ""
    # bool [14,4,4]: the cells in which each label can be seen, all False for No Finding
    grid: np.ndarray

    @property
    def source_labels(self) -> tuple[str, ...]:
        """Return what the site's radiologists write down, in their own vocabulary."""
        return self.findings if self.site == "a" else _nih_reading(self.findings, self.locations)

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the source labels as CheXpert labels.

        Empty where site b saw only what the nine do not cover, such as an effusion.
        """
        return self.findings if self.site == "a" else chexpert_labels_of_nih(self.source_labels)

    @property
    def evaluated_labels(self) -> tuple[str, ...]:
        """Return the labels that the site's scheme can express, the only ones known there."""
        return LABELS if self.site == "a" else NIH_NINE


def draw(seed: int, site: SiteName) -> Radiograph:
    """Draw the picture of `seed` at `site`, with findings at the site's prevalence."""
    return draw_findings(
        _sample_findings(_stream(seed, site, "prevalence"), SITES[site]), seed, site
    )


def draw_findings(findings: tuple[str, ...], seed: int, site: SiteName) -> Radiograph:
    """Draw the picture of `seed` at `site` with exactly the given findings.

    findings: CheXpert labels in any order.

    Raises ValueError for an unknown site or label.
    """
    if site not in SITES:
        raise ValueError(f"no such site: {site!r}; known: {', '.join(SITES)}")
    if unknown := [label for label in findings if label not in LABELS]:
        raise ValueError(f"not CheXpert labels: {', '.join(unknown)}; known: {', '.join(LABELS)}")
    drawn = {label for label in findings if label != NO_FINDING}
    chest = _anatomy(_stream(seed, site, "anatomy"), SITES[site])
    locations: dict[str, str] = {}
    grid = np.zeros((len(LABELS), GRID_SIZE, GRID_SIZE), dtype=bool)
    for label, draw_finding in _FINDINGS.items():
        if label in drawn:
            before, rng = chest.pixels.copy(), _stream(seed, site, label)
            # metal is never faint
            strength = 1.0 if label == SUPPORT_DEVICES else rng.uniform(*SITES[site].conspicuity)
            locations[label] = draw_finding(chest, rng)
            chest.pixels = before + strength * (chest.pixels - before)
            grid[LABELS.index(label)] = _changed_cells(before, chest.pixels)
    if drawn <= {SUPPORT_DEVICES}:  # CheXpert's rule: a device is not an abnormality
        drawn.add(NO_FINDING)
    image = _develop(chest, _stream(seed, site, "exposure"), SITES[site])
    return Radiograph(
        seed, site, image, tuple(label for label in LABELS if label in drawn), locations, grid
    )


_STREAMS = {
    name: number for number, name in enumerate(("prevalence", "anatomy", "exposure", *LABELS))
}


def _stream(seed: int, site: SiteName, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, SITES[site].stream, _STREAMS[purpose]])


def _sample_findings(rng: np.random.Generator, site: Site) -> tuple[str, ...]:
    healthy = rng.random() < site.healthy_share
    present = [label for label, rate in site.prevalence.items() if rng.random() < rate]
    devices = [label for label in present if label == SUPPORT_DEVICES]
    abnormal = [] if healthy else [label for label in present if label != SUPPORT_DEVICES]
    if len(abnormal) > MAX_ABNORMALITIES:
        abnormal = [str(label) for label in rng.choice(abnormal, MAX_ABNORMALITIES, replace=False)]
    return (*abnormal, *devices)


def _nih_reading(findings: tuple[str, ...], locations: dict[str, str]) -> tuple[str, ...]:
    written = [_NIH_STRINGS[label] for label in findings if label in _NIH_STRINGS]
    if "Lung Lesion" in findings:
        written.append("Mass" if "mass" in locations["Lung Lesion"] else "Nodule")
    return tuple(sorted(written)) or (NO_FINDING,)


def _changed_cells(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Find the cells in which a finding can be seen -> bool [4,4].

    Their mean change of brightness is visible, or at least half of the strongest cell's.
    """
    cell = IMAGE_SIZE // GRID_SIZE
    # [4, 4]
    change = np.abs(after - before).reshape(GRID_SIZE, cell, GRID_SIZE, cell).mean(axis=(1, 3))
    return change > min(0.012, 0.5 * change.max())


# --------------------------------------------------------------------------------------------------


def _edge(distance: np.ndarray, softness: float) -> np.ndarray:
    """Make a smooth step: 0 where distance is well below 0, 1 where it is well above."""
    return 1.0 / (1.0 + np.exp(-np.clip(distance / softness, -30.0, 30.0)))


def _ridge(distance: np.ndarray, half_width: float, softness: float) -> np.ndarray:
    """Make a line: 1 within half_width of it, falling off like a Gaussian outside."""
    return np.exp(-0.5 * np.square(np.maximum(np.abs(distance) - half_width, 0.0) / softness))


def _ellipse(
    chest: Chest,
    cx: float,
    cy: float,
    rx: float,
    ry: float,
    power: float = 2.0,
    softness: float = 0.1,
) -> np.ndarray:
    """Fill a (super)ellipse. softness: of its edge, relative to its radius."""
    radius = (np.abs((chest.x - cx) / rx) ** power + np.abs((chest.y - cy) / ry) ** power) ** (
        1.0 / power
    )
    return _edge(1.0 - radius, softness)


def _texture(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Make smooth noise of unit scale with about `cells` bumps a side, float32 [112,112]."""
    coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


# --------------------------------------------------------------------------------------------------


@dataclass
class Chest:
    """Hold a picture in the making: brightness, coordinates, the anatomy that findings refer to."""

    pixels: np.ndarray  # float32 [112, 112]
    x: np.ndarray  # float32 [112, 112]
    y: np.ndarray
    body: np.ndarray  # masks in [0, 1], [112, 112]
    lung: dict[str, np.ndarray]  # by side
    lungs: np.ndarray  # both
    heart: np.ndarray
    mediastinum: np.ndarray
    lung_x: float  # distance of a lung's centre from the midline
    lung_y: float
    lung_rx: float
    lung_ry: float
    diaphragm: dict[str, float]  # y of each dome's top
    rib_y: tuple[float, ...]  # y of each pair of ribs at the midline


def _anatomy(rng: np.random.Generator, site: Site) -> Chest:
    x, y = _coordinates(rng, site)
    shoulders = np.minimum(0.96, 0.60 + 0.52 * np.sqrt(np.maximum(y + 0.94, 0.0)))
    body = _edge(shoulders - np.abs(x), 0.03) * _edge(y + 1.02 - 0.25 * x**2, 0.05)
    right_dome = rng.uniform(0.43, 0.53)
    nothing = np.zeros_like(x)
    chest = Chest(
        pixels=0.03 + 0.52 * body,
        x=x,
        y=y,
        body=body,
        lung={},
        lungs=nothing,
        heart=nothing,
        mediastinum=nothing,
        lung_x=rng.uniform(0.40, 0.43),
        lung_y=rng.uniform(-0.17, -0.09),
        lung_rx=rng.uniform(0.29, 0.33),
        lung_ry=rng.uniform(0.60, 0.68),
        diaphragm={"right": right_dome, "left": right_dome + rng.uniform(0.02, 0.08)},
        rib_y=tuple(-0.72 + 0.165 * i + rng.uniform(-0.01, 0.01) for i in range(8)),
    )
    _draw_lungs(chest, rng)
    _draw_vessels(chest, rng)
    _draw_mediastinum_and_heart(chest, rng)
    _draw_bones(chest)
    return chest


def _coordinates(rng: np.random.Generator, site: Site) -> tuple[np.ndarray, np.ndarray]:
    """Make the picture's coordinates (x, y), each float32 [112,112].

    They follow the patient's rotation and shift and the site's field of view.
    """
    centres = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / IMAGE_SIZE * 2.0 - 1.0
    x, y = np.meshgrid(centres, centres)
    angle = np.deg2rad(rng.normal(0.0, site.rotation_sd))
    cos, sin, zoom = (
        np.float32(np.cos(angle)),
        np.float32(np.sin(angle)),
        np.float32(rng.uniform(*site.zoom)),
    )
    shift_x, shift_y = rng.normal(0.0, 0.03, size=2).astype(np.float32)
    return (x * cos + y * sin) * zoom + shift_x, (y * cos - x * sin) * zoom + shift_y


def _draw_lungs(chest: Chest, rng: np.random.Generator) -> None:
    for side, sign in _SIDES.items():
        cx = sign * chest.lung_x
        dome = chest.diaphragm[side] + 0.16 * ((chest.x - cx) / chest.lung_rx) ** 2
        lung = _ellipse(
            chest, cx, chest.lung_y, chest.lung_rx, chest.lung_ry, power=2.4, softness=0.05
        )
        chest.lung[side] = lung * _edge(dome - chest.y, 0.02)
    chest.lungs = np.maximum(chest.lung["right"], chest.lung["left"])
    chest.pixels -= 0.36 * chest.lungs
    chest.pixels += (0.018 * _texture(rng, 14) + 0.012 * _texture(rng, 28)) * chest.lungs


def _draw_vessels(chest: Chest, rng: np.random.Generator) -> None:
    hilum_y = 0.02
    for sign in _SIDES.values():
        dx, dy = sign * chest.x - 0.14, chest.y - hilum_y
        fading = 0.05 * np.exp(-np.hypot(dx, dy) / 0.28) * (sign * chest.x > 0.1) * chest.lungs
        for angle in rng.uniform(-1.2, 1.4, size=6):
            chest.pixels += fading * _ridge(dx * np.sin(angle) - dy * np.cos(angle), 0.004, 0.012)
        chest.pixels += 0.10 * _ellipse(chest, sign * 0.18, hilum_y, 0.09, 0.13, softness=0.4)


def _draw_mediastinum_and_heart(chest: Chest, rng: np.random.Generator) -> None:
    half_width = rng.uniform(0.11, 0.145)
    chest.mediastinum = _edge(half_width - np.abs(chest.x - 0.01), 0.03) * _edge(
        0.25 - chest.y, 0.15
    )
    heart_y = chest.diaphragm["left"] - rng.uniform(0.17, 0.22)
    # half of the cardiothoracic ratio's heart
    heart_rx = rng.uniform(0.36, 0.44) * (chest.lung_x + chest.lung_rx)
    chest.heart = _ellipse(
        chest, 0.10, heart_y, heart_rx, rng.uniform(0.22, 0.26), power=2.2, softness=0.06
    )
    for mask, over_lung in ((chest.mediastinum, 0.27), (chest.heart, 0.31)):
        chest.pixels += mask * (0.08 + (over_lung - 0.08) * chest.lungs)
    # aortic knob
    chest.pixels += 0.10 * _ellipse(chest, 0.9 * half_width + 0.02, -0.30, 0.09, 0.10, softness=0.2)
    # vertebrae
    chest.pixels += (
        0.06 * _ridge(chest.x, 0.07, 0.03) * (0.7 + 0.3 * np.sign(np.sin(28.0 * chest.y)))
    )


def _draw_bones(chest: Chest) -> None:
    across = np.abs(chest.x)
    rib_span = 0.055 * _edge(across - 0.12, 0.02) * _edge(0.80 - across, 0.02) * chest.body
    for rib_y in chest.rib_y:
        chest.pixels += rib_span * _ridge(chest.y - _rib_course(rib_y, across), 0.012, 0.012)
    clavicle = _ridge(chest.y + 0.74 + 0.12 * (across - 0.1), 0.02, 0.012)
    chest.pixels += 0.12 * clavicle * _edge(across - 0.08, 0.02) * _edge(0.72 - across, 0.03)


def _rib_course(rib_y: float, across: np.ndarray | float) -> np.ndarray | float:
    return rib_y + 0.6 * (across - 0.10) ** 2


# --------------------------------------------------------------------------------------------------
# Each draws one label onto the chest and returns the words of its location.


def _choose_side(rng: np.random.Generator) -> tuple[str, float]:
    side = "right" if rng.random() < 0.5 else "left"
    return side, _SIDES[side]


def _wide_mediastinum(chest: Chest, rng: np.random.Generator) -> str:
    half_width = rng.uniform(0.31, 0.39)
    wide = (
        _edge(half_width - np.abs(chest.x - 0.01), 0.03)
        * _edge(0.10 - chest.y, 0.10)
        * _edge(chest.y + 0.72, 0.06)
    )
    chest.pixels += 0.32 * np.maximum(wide - chest.mediastinum, 0.0) * chest.lungs
    return ""


def _cardiomegaly(chest: Chest, rng: np.random.Generator) -> str:
    heart_rx = rng.uniform(0.66, 0.80) * (chest.lung_x + chest.lung_rx)
    heart_y = chest.diaphragm["left"] - rng.uniform(0.20, 0.26)
    big = _ellipse(
        chest, 0.09, heart_y, heart_rx, rng.uniform(0.32, 0.38), power=2.2, softness=0.05
    )
    chest.pixels += 0.34 * np.maximum(big - chest.heart, 0.0) * chest.lungs
    return ""


def _edema(chest: Chest, rng: np.random.Generator) -> str:
    strength = rng.uniform(0.18, 0.24)
    mottled = np.maximum(1.0 + 0.35 * _texture(rng, 24), 0.2)
    for side, sign in _SIDES.items():
        wing = np.exp(
            -np.square((chest.x - sign * 0.26) / 0.28) - np.square((chest.y - 0.02) / 0.42)
        )
        chest.pixels += strength * wing * chest.lungs * mottled
        for line in range(4):  # Kerley B lines at the lateral base
            septum = _ridge(chest.y - (0.16 + 0.06 * line), 0.003, 0.008) * _edge(
                sign * chest.x - 0.55, 0.015
            )
            chest.pixels += 0.12 * septum * chest.lung[side]
    return "bilateral"


def _lung_opacity(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    zone, low, high = ("upper", -0.46, -0.30) if rng.random() < 0.5 else ("mid", -0.10, 0.08)
    cx, cy = sign * rng.uniform(0.38, 0.48), rng.uniform(low, high)
    haze = np.exp(-np.square((chest.x - cx) / 0.24) - np.square((chest.y - cy) / 0.25))
    chest.pixels += rng.uniform(0.26, 0.34) * haze * chest.lung[side]
    return f"{side} {zone}"


def _consolidation(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    zone = "upper" if rng.random() < 0.5 else "lower"
    fissure = (-0.30 if zone == "upper" else 0.10) + rng.uniform(-0.06, 0.06)
    above = fissure - chest.y
    lobe = chest.lung[side] * _edge(above if zone == "upper" else -above, 0.015)
    bronchi = np.maximum(
        *(
            _ridge((chest.x - sign * cx) * 0.7 - above * 0.7 * sign, 0.006, 0.012)
            for cx in (0.30, 0.48)
        )
    )
    chest.pixels += 0.30 * lobe * (1.0 - 0.6 * bronchi)
    return f"{side} {zone}"


def _pneumonia(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    for _ in range(7):
        cx, cy = sign * rng.uniform(0.24, 0.58), rng.uniform(-0.22, 0.36)
        patch = _ellipse(
            chest, cx, cy, rng.uniform(0.05, 0.085), rng.uniform(0.05, 0.085), softness=0.25
        )
        chest.pixels += rng.uniform(0.16, 0.24) * patch * chest.lung[side]
    return side


def _pleural_effusion(chest: Chest, rng: np.random.Generator) -> str:
    side, _ = _choose_side(rng)
    sides = ("right", "left") if rng.random() < 0.3 else (side,)
    across = np.abs(chest.x)
    for name in sides:
        level = chest.diaphragm[name] - rng.uniform(0.16, 0.34)
        meniscus = (
            level
            - 0.55 * np.maximum(across - 0.35, 0.0) ** 1.3
            - 0.22 * np.maximum(0.22 - across, 0.0)
        )
        cavity = _ellipse(
            chest,
            _SIDES[name] * chest.lung_x,
            chest.lung_y,
            chest.lung_rx,
            1.15 * chest.lung_ry,
            2.6,
            0.05,
        )
        fluid = 0.9 * cavity * _edge(chest.y - meniscus, 0.025) * _edge(0.95 - chest.y, 0.1)
        chest.pixels += (0.66 - chest.pixels) * fluid
    return "bilateral" if len(sides) == 2 else side


def _lung_lesion(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    radius = rng.uniform(0.075, 0.15)
    zone, low, high = ("upper", -0.48, -0.26) if rng.random() < 0.5 else ("mid", -0.12, 0.14)
    cx, cy = sign * rng.uniform(0.32, 0.54), rng.uniform(low, high)
    chest.pixels += 0.36 * _ellipse(chest, cx, cy, radius, radius, softness=0.06) * chest.lung[side]
    # on a chest 30 cm wide, a mass is above 3 cm
    return f"{side} {zone} {'mass' if radius > 0.115 else 'nodule'}"


def _atelectasis(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    inside = np.maximum(chest.lung[side], 0.2)
    for _ in range(int(rng.integers(1, 3))):
        height, slope = (
            chest.diaphragm[side] - rng.uniform(0.12, 0.26),
            sign * rng.uniform(-0.35, 0.35),
        )
        offset = chest.x - sign * 0.42
        chest.pixels += (
            0.25
            * _ridge(chest.y - height - slope * offset, 0.018, 0.010)
            * _ridge(offset, 0.20, 0.03)
            * inside
        )
    return side


def _pneumothorax(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    collapse = rng.uniform(0.66, 0.80)
    remnant = _ellipse(
        chest,
        sign * chest.lung_x * 0.82,
        chest.lung_y + 0.10,
        chest.lung_rx * collapse,
        chest.lung_ry * collapse * 1.08,
        power=2.4,
        softness=0.03,
    )
    chest.pixels -= 0.15 * chest.lung[side] * (1.0 - remnant)
    # the visceral pleura
    chest.pixels += 0.18 * np.exp(-np.square((remnant - 0.5) / 0.16)) * chest.lung[side]
    return side


def _pleural_thickening(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    outer, inner = (
        _ellipse(
            chest,
            sign * chest.lung_x,
            chest.lung_y,
            chest.lung_rx * rx,
            chest.lung_ry * ry,
            power=2.4,
            softness=0.03,
        )
        for rx, ry in ((0.98, 0.98), (0.78, 0.85))
    )
    middle = rng.uniform(-0.35, 0.0)
    lateral = _edge(sign * chest.x - chest.lung_x + 0.02, 0.03) * _edge(
        0.40 - np.abs(chest.y - middle), 0.03
    )
    lumps = 0.8 + 0.4 * np.sin(30.0 * chest.y + rng.uniform(0.0, 6.0))
    chest.pixels += 0.38 * np.clip(outer - inner, 0.0, 1.0) * lateral * lumps
    return side


def _fracture(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    rib_y, break_x = chest.rib_y[int(rng.integers(3, 7))], rng.uniform(0.48, 0.62)
    break_y = _rib_course(rib_y, break_x)
    across = sign * chest.x
    chest.pixels -= 0.10 * np.exp(
        -np.square((across - break_x) / 0.035) - np.square((chest.y - break_y) / 0.05)
    )
    # The outer piece is displaced downwards, the inner one upwards; callus makes both brighter than
    # a rib.
    outer = _ridge(chest.y - (break_y + 0.085 + 0.9 * (across - break_x)), 0.024, 0.010)
    inner = _ridge(chest.y - (break_y - 0.045 + 0.5 * (across - break_x)), 0.024, 0.010)
    chest.pixels += (
        0.42 * outer * _edge(across - break_x - 0.01, 0.01) * _edge(break_x + 0.20 - across, 0.01)
    )
    chest.pixels += (
        0.42 * inner * _edge(break_x - 0.01 - across, 0.01) * _edge(across - break_x + 0.20, 0.01)
    )
    return side


def _support_devices(chest: Chest, rng: np.random.Generator) -> str:
    device = ("pacemaker", "central line", "endotracheal tube")[int(rng.integers(3))]
    if device == "pacemaker":
        cx, cy = 0.50 + rng.uniform(-0.05, 0.05), -0.48 + rng.uniform(-0.05, 0.05)
        chest.pixels = np.maximum(
            chest.pixels, 0.98 * _ellipse(chest, cx, cy, 0.12, 0.10, power=3.0, softness=0.06)
        )
        along = np.clip((cx - chest.x) / (cx - 0.05), 0.0, 1.0)
        lead = _ridge(chest.y - (cy + 0.75 * along**2), 0.008, 0.008)
        chest.pixels += 0.40 * lead * (chest.x < cx) * (chest.x > 0.05)
    elif device == "central line":
        _, sign = _choose_side(rng)
        along = np.clip((chest.y + 0.95) / 0.9, 0.0, 1.0)
        line = _ridge(chest.x - (sign * 0.45 * (1.0 - along) ** 1.5 - 0.08), 0.010, 0.008)
        chest.pixels += 0.44 * line * (chest.y < 0.0) * (chest.y > -0.95)
    else:
        walls = _ridge(np.abs(chest.x - 0.005) - 0.035, 0.008, 0.008)
        chest.pixels += 0.38 * walls * (chest.y < -0.26)
        for cx in (-0.60, 0.10, 0.55):  # ECG electrodes, as on most intubated patients
            electrode = 0.9 * _ellipse(
                chest, cx, -0.55 + 0.9 * abs(cx), 0.045, 0.045, softness=0.15
            )
            chest.pixels = np.maximum(chest.pixels, electrode)
    return device


# In drawing order: fluid first, so that it does not cover lines and nodules, and metal last.
_FINDINGS: dict[str, Callable[[Chest, np.random.Generator], str]] = {
    "Enlarged Cardiomediastinum": _wide_mediastinum,
    "Cardiomegaly": _cardiomegaly,
    "Edema": _edema,
    "Lung Opacity": _lung_opacity,
    "Consolidation": _consolidation,
    "Pneumonia": _pneumonia,
    "Pleural Effusion": _pleural_effusion,
    "Lung Lesion": _lung_lesion,
    "Atelectasis": _atelectasis,
    "Pneumothorax": _pneumothorax,
    "Pleural Other": _pleural_thickening,
    "Fracture": _fracture,
    SUPPORT_DEVICES: _support_devices,
}


# --------------------------------------------------------------------------------------------------


def _develop(chest: Chest, rng: np.random.Generator, site: Site) -> np.ndarray:
    """Expose the picture -> uint8 [112,112]: film curve, uneven beam, noise, site's artefacts."""
    gain, offset, gamma, noise = (
        rng.uniform(*bounds) for bounds in (site.gain, site.offset, site.gamma, site.noise)
    )
    tilt_x, tilt_y = rng.uniform(-0.06, 0.06), rng.uniform(-0.05, 0.05)
    pixels = (
        np.clip(chest.pixels, 0.0, 1.1) ** gamma * gain
        + offset
        + tilt_x * chest.x
        + tilt_y * chest.y
    )
    pixels += noise * rng.standard_normal(pixels.shape, dtype=np.float32)
    if rng.random() < site.collimated_share:
        border = int(IMAGE_SIZE * rng.uniform(0.03, 0.08))
        pixels[:, :border] = pixels[:, IMAGE_SIZE - border :] = 0.01
    if site.marker:  # a burned-in L beside the patient's left shoulder
        pixels[6:14, 96:98] = pixels[12:14, 96:102] = 0.97
    return (np.clip(pixels, 0.0, 1.0) * 255.0).round().astype(np.uint8)
