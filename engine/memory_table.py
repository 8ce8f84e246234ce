"""Print a memory forecast as a table, with the cards that hold it."""

from __future__ import annotations

import torch

from engine.memory import GIB, Forecast

CARDS = (24, 40, 80, 141)  # GB
# of a card: the rest is a guess at CUDA's context and at what the caching allocator cannot reuse
USABLE = 0.9


def memory_table(found: Forecast, device: torch.device) -> str:
    """Write a forecast as a table in GiB, then its peak and the cards that hold it.

    The phases are columns, and their parts are rows.
    """
    parts = list(dict.fromkeys(part for phase in found.phases.values() for part in phase))
    width = max(map(len, (*parts, "total")))
    lines = [
        (
            "memory      forecast in GiB, at the largest moment of each phase, with the longest"
            " rows that were seen"
        ),
        f"  {'':{width}} " + " ".join(f"{phase:>10}" for phase in found.phases),
    ]
    for part in parts:
        lines.append(
            f"  {part:{width}} "
            + " ".join(f"{phase.get(part, 0) / GIB:10.3f}" for phase in found.phases.values())
        )
    lines.append(
        f"  {'total':{width}} "
        + " ".join(f"{sum(phase.values()) / GIB:10.3f}" for phase in found.phases.values())
    )
    lines.append(
        f"  peak {found.peak / GIB:.3f} GiB in {found.peak_phase}; "
        + (
            "fits "
            + ", ".join(f"{card} GB: {'yes' if fits(found, card) else 'no'}" for card in CARDS)
            + f" (at most {USABLE:.0%} of a card)"
            if device.type == "cuda"
            else "beside what Python and its libraries take"
        )
    )
    return "\n".join(lines)


def fits(found: Forecast, card: int) -> bool:
    """Tell whether a card of so many GiB holds the peak."""
    return found.peak <= USABLE * card * GIB
