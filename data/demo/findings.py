"""Draw the findings onto a chest: one function a label, each of which returns where it drew it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.demo.anatomy import SIDES, Chest, edge, ellipse, rib_course, ridge, texture
from data.labels import SUPPORT_DEVICES


def _choose_side(rng: np.random.Generator) -> tuple[str, float]:
    side = "right" if rng.random() < 0.5 else "left"
    return side, SIDES[side]


def _wide_mediastinum(chest: Chest, rng: np.random.Generator) -> str:
    half_width = rng.uniform(0.31, 0.39)
    wide = (
        edge(half_width - np.abs(chest.x - 0.01), 0.03)
        * edge(0.10 - chest.y, 0.10)
        * edge(chest.y + 0.72, 0.06)
    )
    chest.pixels += 0.32 * np.maximum(wide - chest.mediastinum, 0.0) * chest.lungs
    return ""


def _cardiomegaly(chest: Chest, rng: np.random.Generator) -> str:
    heart_rx = rng.uniform(0.66, 0.80) * (chest.lung_x + chest.lung_rx)
    heart_y = chest.diaphragm["left"] - rng.uniform(0.20, 0.26)
    big = ellipse(chest, 0.09, heart_y, heart_rx, rng.uniform(0.32, 0.38), power=2.2, softness=0.05)
    chest.pixels += 0.34 * np.maximum(big - chest.heart, 0.0) * chest.lungs
    return ""


def _edema(chest: Chest, rng: np.random.Generator) -> str:
    strength = rng.uniform(0.18, 0.24)
    mottled = np.maximum(1.0 + 0.35 * texture(rng, 24), 0.2)
    for side, sign in SIDES.items():
        wing = np.exp(
            -np.square((chest.x - sign * 0.26) / 0.28) - np.square((chest.y - 0.02) / 0.42)
        )
        chest.pixels += strength * wing * chest.lungs * mottled
        for line in range(4):  # Kerley B lines at the lateral base
            septum = ridge(chest.y - (0.16 + 0.06 * line), 0.003, 0.008) * edge(
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
    lobe = chest.lung[side] * edge(above if zone == "upper" else -above, 0.015)
    bronchi = np.maximum(
        *(
            ridge((chest.x - sign * cx) * 0.7 - above * 0.7 * sign, 0.006, 0.012)
            for cx in (0.30, 0.48)
        )
    )
    chest.pixels += 0.30 * lobe * (1.0 - 0.6 * bronchi)
    return f"{side} {zone}"


def _pneumonia(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    for _ in range(7):
        cx, cy = sign * rng.uniform(0.24, 0.58), rng.uniform(-0.22, 0.36)
        patch = ellipse(
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
        cavity = ellipse(
            chest,
            SIDES[name] * chest.lung_x,
            chest.lung_y,
            chest.lung_rx,
            1.15 * chest.lung_ry,
            2.6,
            0.05,
        )
        fluid = 0.9 * cavity * edge(chest.y - meniscus, 0.025) * edge(0.95 - chest.y, 0.1)
        chest.pixels += (0.66 - chest.pixels) * fluid
    return "bilateral" if len(sides) == 2 else side


def _lung_lesion(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    radius = rng.uniform(0.075, 0.15)
    zone, low, high = ("upper", -0.48, -0.26) if rng.random() < 0.5 else ("mid", -0.12, 0.14)
    cx, cy = sign * rng.uniform(0.32, 0.54), rng.uniform(low, high)
    chest.pixels += 0.36 * ellipse(chest, cx, cy, radius, radius, softness=0.06) * chest.lung[side]
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
            * ridge(chest.y - height - slope * offset, 0.018, 0.010)
            * ridge(offset, 0.20, 0.03)
            * inside
        )
    return side


def _pneumothorax(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    collapse = rng.uniform(0.66, 0.80)
    remnant = ellipse(
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
        ellipse(
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
    lateral = edge(sign * chest.x - chest.lung_x + 0.02, 0.03) * edge(
        0.40 - np.abs(chest.y - middle), 0.03
    )
    lumps = 0.8 + 0.4 * np.sin(30.0 * chest.y + rng.uniform(0.0, 6.0))
    chest.pixels += 0.38 * np.clip(outer - inner, 0.0, 1.0) * lateral * lumps
    return side


def _fracture(chest: Chest, rng: np.random.Generator) -> str:
    side, sign = _choose_side(rng)
    rib_y, break_x = chest.rib_y[int(rng.integers(3, 7))], rng.uniform(0.48, 0.62)
    break_y = rib_course(rib_y, break_x)
    across = sign * chest.x
    chest.pixels -= 0.10 * np.exp(
        -np.square((across - break_x) / 0.035) - np.square((chest.y - break_y) / 0.05)
    )
    # The outer piece is displaced downwards, the inner one upwards; callus makes both brighter than
    # a rib.
    outer = ridge(chest.y - (break_y + 0.085 + 0.9 * (across - break_x)), 0.024, 0.010)
    inner = ridge(chest.y - (break_y - 0.045 + 0.5 * (across - break_x)), 0.024, 0.010)
    chest.pixels += (
        0.42 * outer * edge(across - break_x - 0.01, 0.01) * edge(break_x + 0.20 - across, 0.01)
    )
    chest.pixels += (
        0.42 * inner * edge(break_x - 0.01 - across, 0.01) * edge(across - break_x + 0.20, 0.01)
    )
    return side


def _support_devices(chest: Chest, rng: np.random.Generator) -> str:
    device = ("pacemaker", "central line", "endotracheal tube")[int(rng.integers(3))]
    if device == "pacemaker":
        cx, cy = 0.50 + rng.uniform(-0.05, 0.05), -0.48 + rng.uniform(-0.05, 0.05)
        chest.pixels = np.maximum(
            chest.pixels, 0.98 * ellipse(chest, cx, cy, 0.12, 0.10, power=3.0, softness=0.06)
        )
        along = np.clip((cx - chest.x) / (cx - 0.05), 0.0, 1.0)
        lead = ridge(chest.y - (cy + 0.75 * along**2), 0.008, 0.008)
        chest.pixels += 0.40 * lead * (chest.x < cx) * (chest.x > 0.05)
    elif device == "central line":
        _, sign = _choose_side(rng)
        along = np.clip((chest.y + 0.95) / 0.9, 0.0, 1.0)
        line = ridge(chest.x - (sign * 0.45 * (1.0 - along) ** 1.5 - 0.08), 0.010, 0.008)
        chest.pixels += 0.44 * line * (chest.y < 0.0) * (chest.y > -0.95)
    else:
        walls = ridge(np.abs(chest.x - 0.005) - 0.035, 0.008, 0.008)
        chest.pixels += 0.38 * walls * (chest.y < -0.26)
        for cx in (-0.60, 0.10, 0.55):  # ECG electrodes, as on most intubated patients
            electrode = 0.9 * ellipse(chest, cx, -0.55 + 0.9 * abs(cx), 0.045, 0.045, softness=0.15)
            chest.pixels = np.maximum(chest.pixels, electrode)
    return device


# In drawing order: fluid first, so that it does not cover lines and nodules, and metal last.
FINDINGS: dict[str, Callable[[Chest, np.random.Generator], str]] = {
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
