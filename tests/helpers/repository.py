"""Name the root of this checkout and the files of the product."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def product_files() -> list[Path]:
    packages = [
        file
        for package in ("data", "engine", "rl", "eval")
        for file in (ROOT / package).rglob("*.py")
    ]
    return sorted(packages) + sorted(ROOT.glob("run_*.py"))
