"""Draw the healthy chest of a patient, on which findings are drawn.

Coordinates: x and y run from -1 to 1 over the picture, y downwards. The patient's right is on the
picture's left. Brightness runs from 0 (air) to 1 (metal) until the picture is exposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.demo.sites import Site

IMAGE_SIZE = 112  # pixels; 8 x 8 patches of 14, which Qwen2.5-VL merges into 4 x 4 visual tokens
SIDES = {"right": -1.0, "left": 1.0}


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


def draw_anatomy(rng: np.random.Generator, site: Site) -> Chest:
    x, y = _coordinates(rng, site)
    shoulders = np.minimum(0.96, 0.60 + 0.52 * np.sqrt(np.maximum(y + 0.94, 0.0)))
    body = edge(shoulders - np.abs(x), 0.03) * edge(y + 1.02 - 0.25 * x**2, 0.05)
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
    for side, sign in SIDES.items():
        cx = sign * chest.lung_x
        dome = chest.diaphragm[side] + 0.16 * ((chest.x - cx) / chest.lung_rx) ** 2
        lung = ellipse(
            chest, cx, chest.lung_y, chest.lung_rx, chest.lung_ry, power=2.4, softness=0.05
        )
        chest.lung[side] = lung * edge(dome - chest.y, 0.02)
    chest.lungs = np.maximum(chest.lung["right"], chest.lung["left"])
    chest.pixels -= 0.36 * chest.lungs
    chest.pixels += (0.018 * texture(rng, 14) + 0.012 * texture(rng, 28)) * chest.lungs


def _draw_vessels(chest: Chest, rng: np.random.Generator) -> None:
    hilum_y = 0.02
    for sign in SIDES.values():
        dx, dy = sign * chest.x - 0.14, chest.y - hilum_y
        fading = 0.05 * np.exp(-np.hypot(dx, dy) / 0.28) * (sign * chest.x > 0.1) * chest.lungs
        for angle in rng.uniform(-1.2, 1.4, size=6):
            chest.pixels += fading * ridge(dx * np.sin(angle) - dy * np.cos(angle), 0.004, 0.012)
        chest.pixels += 0.10 * ellipse(chest, sign * 0.18, hilum_y, 0.09, 0.13, softness=0.4)


def _draw_mediastinum_and_heart(chest: Chest, rng: np.random.Generator) -> None:
    half_width = rng.uniform(0.11, 0.145)
    chest.mediastinum = edge(half_width - np.abs(chest.x - 0.01), 0.03) * edge(0.25 - chest.y, 0.15)
    heart_y = chest.diaphragm["left"] - rng.uniform(0.17, 0.22)
    # half of the cardiothoracic ratio's heart
    heart_rx = rng.uniform(0.36, 0.44) * (chest.lung_x + chest.lung_rx)
    chest.heart = ellipse(
        chest, 0.10, heart_y, heart_rx, rng.uniform(0.22, 0.26), power=2.2, softness=0.06
    )
    for mask, over_lung in ((chest.mediastinum, 0.27), (chest.heart, 0.31)):
        chest.pixels += mask * (0.08 + (over_lung - 0.08) * chest.lungs)
    # aortic knob
    chest.pixels += 0.10 * ellipse(chest, 0.9 * half_width + 0.02, -0.30, 0.09, 0.10, softness=0.2)
    # vertebrae
    chest.pixels += (
        0.06 * ridge(chest.x, 0.07, 0.03) * (0.7 + 0.3 * np.sign(np.sin(28.0 * chest.y)))
    )


def _draw_bones(chest: Chest) -> None:
    across = np.abs(chest.x)
    rib_span = 0.055 * edge(across - 0.12, 0.02) * edge(0.80 - across, 0.02) * chest.body
    for rib_y in chest.rib_y:
        chest.pixels += rib_span * ridge(chest.y - rib_course(rib_y, across), 0.012, 0.012)
    clavicle = ridge(chest.y + 0.74 + 0.12 * (across - 0.1), 0.02, 0.012)
    chest.pixels += 0.12 * clavicle * edge(across - 0.08, 0.02) * edge(0.72 - across, 0.03)


def rib_course(rib_y: float, across: np.ndarray | float) -> np.ndarray | float:
    return rib_y + 0.6 * (across - 0.10) ** 2


# --------------------------------------------------------------------------------------------------


def edge(distance: np.ndarray, softness: float) -> np.ndarray:
    """Make a smooth step: 0 where distance is well below 0, 1 where it is well above."""
    return 1.0 / (1.0 + np.exp(-np.clip(distance / softness, -30.0, 30.0)))


def ridge(distance: np.ndarray, half_width: float, softness: float) -> np.ndarray:
    """Make a line: 1 within half_width of it, falling off like a Gaussian outside."""
    return np.exp(-0.5 * np.square(np.maximum(np.abs(distance) - half_width, 0.0) / softness))


def ellipse(
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
    return edge(1.0 - radius, softness)


def texture(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Make smooth noise of unit scale with about `cells` bumps a side, float32 [112,112]."""
    coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
