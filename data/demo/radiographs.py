"""Draw synthetic frontal chest X-rays of several hospitals, to run everything without patients.

Nothing here is a patient. Every label is caused by something drawn, and every picture is a function
of a seed and a site. `sites.py` says how the sites differ.

A picture is drawn in four steps: anatomy, one function per finding, exposure and noise
(`_develop`), and what the hospital burns in. Each step and each finding has its own random stream,
so the same seed with one finding or mark more or less shows the same patient under the same
exposure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.demo.anatomy import IMAGE_SIZE, Chest, draw_anatomy
from data.demo.findings import FINDINGS
from data.demo.marks import burn_in
from data.demo.sites import MARKS, SITES, Site, SiteName
from data.labels import LABELS, NIH_NINE, NO_FINDING, SUPPORT_DEVICES, chexpert_labels_of_nih

GRID_SIZE = 4  # cells a side of the coarse location map, one a visual token
GENERATOR_VERSION = "2"  # raise it when a seed no longer gives the same picture, labels or trace

MAX_ABNORMALITIES = 4  # devices not counted: keeps teacher traces short

# NIH's word for a drawn label. Lung Lesion is 'Mass' or 'Nodule' by size. Labels that are not in
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
    marks: tuple[str, ...]  # burned in

    @property
    def source_labels(self) -> tuple[str, ...]:
        """Return what the site's radiologists write down, in their own vocabulary."""
        return _nih_reading(self.findings, self.locations) if self._as_nih else self.findings

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the source labels as CheXpert labels.

        Empty where the reader saw only what the nine do not cover, such as an effusion.
        """
        return chexpert_labels_of_nih(self.source_labels) if self._as_nih else self.findings

    @property
    def evaluated_labels(self) -> tuple[str, ...]:
        """Return the labels that the site's scheme can express, the only ones known there."""
        return NIH_NINE if self._as_nih else LABELS

    @property
    def _as_nih(self) -> bool:
        return SITES[self.site].labelling == "nih"


def draw(seed: int, site: SiteName) -> Radiograph:
    """Draw the picture of `seed` at `site`, with findings and marks at the site's rates."""
    findings, marks = sample(seed, site)
    return draw_findings(findings, seed, site, marks)


def sample(seed: int, site: SiteName) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Draw which findings and which marks the picture of `seed` at `site` has, without drawing it.

    The result is (findings, marks).
    """
    findings = _sample_findings(_stream(seed, site, "prevalence"), SITES[site])
    return findings, _sample_marks(findings, _stream(seed, site, "marks"), SITES[site])


def draw_findings(
    findings: tuple[str, ...], seed: int, site: SiteName, marks: tuple[str, ...] = ()
) -> Radiograph:
    """Draw the picture of `seed` at `site` with exactly the given findings.

    findings: CheXpert labels in any order. marks: what is burned in, of MARKS.

    Raises ValueError for an unknown site or label.
    """
    if site not in SITES:
        raise ValueError(f"no such site: {site!r}; known: {', '.join(SITES)}")
    if unknown := [label for label in findings if label not in LABELS]:
        raise ValueError(f"not CheXpert labels: {', '.join(unknown)}; known: {', '.join(LABELS)}")
    drawn = {label for label in findings if label != NO_FINDING}
    chest = draw_anatomy(_stream(seed, site, "anatomy"), SITES[site])
    locations: dict[str, str] = {}
    grid = np.zeros((len(LABELS), GRID_SIZE, GRID_SIZE), dtype=bool)
    for label, draw_finding in FINDINGS.items():
        if label in drawn:
            before, rng = chest.pixels.copy(), _stream(seed, site, label)
            # metal is never faint
            shown = SITES[site].subtle.get(label, SITES[site].conspicuity)
            strength = 1.0 if label == SUPPORT_DEVICES else rng.uniform(*shown)
            locations[label] = draw_finding(chest, rng)
            chest.pixels = before + strength * (chest.pixels - before)
            grid[LABELS.index(label)] = _changed_cells(before, chest.pixels)
    if drawn <= {SUPPORT_DEVICES}:  # CheXpert's rule: a device is not an abnormality
        drawn.add(NO_FINDING)
    image = _develop(chest, _stream(seed, site, "exposure"), SITES[site], marks)
    return Radiograph(
        seed,
        site,
        image,
        tuple(label for label in LABELS if label in drawn),
        locations,
        grid,
        marks,
    )


def _sample_marks(
    findings: tuple[str, ...], rng: np.random.Generator, site: Site
) -> tuple[str, ...]:
    return tuple(
        mark
        for mark, label in MARKS.items()
        if rng.random() < (site.marks.with_label if label in findings else site.marks.without)
    )


_PURPOSES = ("prevalence", "anatomy", "exposure", *LABELS, "marks")
_STREAMS = {name: number for number, name in enumerate(_PURPOSES)}


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


def mark_cells(mark: str) -> np.ndarray:
    """Find the cells in which a mark can be seen -> bool [4,4]."""
    dark = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    marked = dark.copy()
    burn_in(marked, mark)
    return _changed_cells(dark, marked)


# --------------------------------------------------------------------------------------------------


def _develop(
    chest: Chest, rng: np.random.Generator, site: Site, marks: tuple[str, ...]
) -> np.ndarray:
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
    if site.side_marker:  # a burned-in L beside the patient's left shoulder
        pixels[6:14, 96:98] = pixels[12:14, 96:102] = 0.97
    for mark in marks:
        burn_in(pixels, mark)
    return (np.clip(pixels, 0.0, 1.0) * 255.0).round().astype(np.uint8)
