"""Burn a mark into a picture, as hospitals do: a word in bright letters on a dark box."""

from __future__ import annotations

import numpy as np

_LETTERS = {  # rows of 3 pixels
    "E": ("###", "#..", "##.", "#..", "###"),
    "O": ("###", "#.#", "#.#", "#.#", "###"),
    "P": ("##.", "#.#", "##.", "#..", "#.."),
    "R": ("##.", "#.#", "##.", "#.#", "#.#"),
    "T": ("###", ".#.", ".#.", ".#.", ".#."),
    "X": ("#.#", "#.#", ".#.", "#.#", "#.#"),
}
_MARK_PLACES = {"PORT": (4, 4), "EXP": (94, 4)}  # (top, left) of the box, in pixels


def _in_letters(mark: str) -> np.ndarray:
    """Write a mark in letters of 6 x 10 pixels, with a margin of 2 -> bool [14,8n+2]."""
    rows = [".".join(_LETTERS[letter][row] for letter in mark) for row in range(5)]
    letters = np.array([[pixel == "#" for pixel in row] for row in rows])
    return np.pad(np.kron(letters, np.ones((2, 2), dtype=bool)), 2)


def burn_in(pixels: np.ndarray, mark: str) -> None:
    """Burn a mark into a picture, [112,112] of brightness."""
    text, (top, left) = _in_letters(mark), _MARK_PLACES[mark]
    height, width = text.shape
    pixels[top : top + height, left : left + width] = np.where(text, 0.97, 0.03)
