"""Say which phases of a command cannot fit into memory, and which setting would make them fit.

Bytes are those of the forecast (engine/memory.py), which lies within a fifth of what torch
allocates. A remedy is named with the largest value that fits and that the command accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from engine.device import computes_bf16
from engine.free_memory import Free, free_memory
from engine.memory import GIB, KEPT, Forecast, Parts
from engine.out_of_memory import EVALUATION, SAMPLING, TOKENS

# Of what is free: above this share the sampler copies nothing, since allocators waste a part.
COMFORTABLE = 0.9
# The forecast lies within a fifth of what torch allocates. So much of it is certain.
CERTAIN = 0.8
# What is held all the time, whose bytes are exact.
HELD = ("base", "adapters", "AdamW")
STATIC = (*HELD, "gradients")
# What may shrink a phase that runs a single row already: switches with their better position, and
# sizes to lower.
SWITCHES = {"gradient_checkpointing": True, "sampling_copies": False, "bf16": True}
MOST_ROWS = 65536
SIZES = ("max_visual_tokens", "max_completion_length")
# Settings that shrink a phase, the one that costs least first.
REMEDIES = {
    "rollout": (
        SAMPLING,
        "per_device_train_batch_size",
        "steps_per_generation",
        "max_completion_length",
    ),
    "scoring": (
        "per_device_train_batch_size",
        "max_tokens_per_forward",
        "max_visual_tokens",
        "shard_base",
    ),
    "update": (
        "gradient_checkpointing",
        "per_device_train_batch_size",
        "max_tokens_per_forward",
        "max_visual_tokens",
        "max_completion_length",
        "shard_base",
    ),
    "validation": (
        "per_device_eval_batch_size",
        "max_tokens_per_forward",
        "max_visual_tokens",
        "shard_base",
    ),
    "evaluation": ("per_device_eval_batch_size", "max_completion_length", "max_visual_tokens"),
}


# ---- compare with what is free -------------------------------------------------------------------
def needed(parts: Parts) -> int:
    """Add up the parts that a phase cannot do without, in bytes.

    What a rollout keeps for the next is given up where memory runs out, so nothing is refused or
    made smaller for it.
    """
    return sum(size for name, size in parts.items() if name != KEPT)


def certain(parts: Parts) -> int:
    """Compute the bytes that a phase takes even where its forecast is a fifth too high."""
    static = sum(parts.get(name, 0) for name in STATIC)
    return static + int(CERTAIN * (needed(parts) - static))


def largest(fitting: Callable[[int], bool], limit: int) -> int:
    """Find the largest number up to `limit` that fits, or 0 where 1 does not.

    What fits grows no smaller with a larger number.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fitting(middle) else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Question:
    """Ask whether a command fits, with its settings as they are or as they might be.

    config: the settings. device: of the model. forecast(config): the forecast with these settings.
    allowed(config): whether the command accepts them (batches that divide).
    """

    config: Any
    device: torch.device
    forecast: Callable[[Any], Forecast]
    allowed: Callable[[Any], bool] = lambda config: True

    def problems(self, free: Free) -> list[str]:
        """Say of every phase that cannot fit what is too large and what would shrink it."""
        found = self.forecast(self.config).phases
        return [
            self._problem(phase, parts, free)
            for phase, parts in found.items()
            if certain(parts) > free.total
        ]

    def _problem(self, phase: str, parts: Parts, free: Free) -> str:
        counted = [part for part in parts.items() if part[0] != KEPT]
        listed = sorted(counted, key=lambda part: -part[1])
        said = ", ".join(f"{name} {size / GIB:.2f}" for name, size in listed[:4] if size)
        return (
            f"memory: {phase} needs {needed(parts) / GIB:.2f} GiB ({said}) and"
            f" {free.total / GIB:.2f} GiB are free ({free.limit}): {self._advice(phase, free)}"
        )

    def _advice(self, phase: str, free: Free) -> str:
        base = self.forecast(self.config).phases[phase]["base"]
        found = list(self._remedies(phase, free))
        if found:
            return f"{' or '.join(found[:2])} would fit"
        if base > free.total:
            advice = f"the base model alone takes {base / GIB:.2f} GiB; "
        else:
            advice = "no single flag makes it fit; "
        if self._may_halve(free, phase):
            return f"{advice}--bf16 would fit"
        return f"{advice}take a smaller model, or free memory"

    def last_advice(self, work: str) -> str:
        """Say what to lower where not even a single row fitted, with what it would need then.

        work: what failed: a phase of the forecast, or a part of several.
        """
        config = _at_its_smallest(self.config)
        found, free = self.forecast(config).phases, free_memory(self.device)
        phase = work if work in found else max(found, key=lambda name: needed(found[name]))
        least = needed(found[phase])
        # It failed, so it needs more than is there, whatever the forecast says.
        most, there = certain(found[phase]), ""
        if free is not None:
            room = free.memory + sum(found[phase].get(name, 0) for name in HELD)
            most = min(most, int(COMFORTABLE * room))
            there = f" of the {room / GIB:.2f} GiB that are free ({free.limit})"
        said = list(self._smaller(config, phase, most))
        if said:
            return f"{' or '.join(said)}{there}"
        return (
            f"the forecast for a single row is {least / GIB:.2f} GiB{there}; take a smaller model,"
            " or free memory"
        )

    def _smaller(self, config: Any, phase: str, most: int) -> Iterator[str]:
        """Name each setting that alone brings a phase below so many bytes, with what it needs."""

        def needs(name: str, value: Any) -> int:
            return needed(self.forecast(replace(config, **{name: value})).phases[phase])

        def fits(name: str, value: Any) -> bool:
            return needs(name, value) <= most

        for name, better in SWITCHES.items():
            known = name != "bf16" or computes_bf16(self.device)
            if known and getattr(config, name, better) != better and fits(name, better):
                flag = f"--{name}" if better else f"--no_{name}"
                yield f"{flag} would need {needs(name, better) / GIB:.2f} GiB"
        for name in SIZES:
            least = config.min_visual_tokens if name == "max_visual_tokens" else 1
            value = max(least, largest(partial(fits, name), getattr(config, name) - 1))
            if fits(name, value):
                yield f"--{name} {value} would need {needs(name, value) / GIB:.2f} GiB"

    def _fits(self, config: Any, phase: str, free: Free) -> bool:
        return needed(self.forecast(config).phases[phase]) <= COMFORTABLE * free.memory

    def _may_halve(self, free: Free, phase: str) -> bool:
        """Tell whether bf16 would fit, and is not hopelessly slow there."""
        if self.config.bf16 or not computes_bf16(self.device):
            return False
        return self._fits(replace(self.config, bf16=True), phase, free)

    def _remedies(self, phase: str, free: Free) -> Iterator[str]:
        for name in REMEDIES[phase]:
            now = getattr(self.config, name, None)
            if name == SAMPLING and now is None:  # all of them, which is no more than
                now = MOST_ROWS
            if now is False and self._fits(replace(self.config, **{name: True}), phase, free):
                yield f"--{name}"
            elif type(now) is int and (value := self._largest(name, now, phase, free)):
                yield f"--{name} {value}"

    def _largest(self, name: str, now: int, phase: str, free: Free) -> int:
        """Find the largest value below `now` that fits and is accepted, 0 where there is none."""

        def changed(value: int) -> Any:
            return replace(self.config, **{name: value})

        smallest = self.config.min_visual_tokens if name == "max_visual_tokens" else 1
        value = largest(lambda n: self._fits(changed(n), phase, free), now - 1)
        while value >= smallest and not self.allowed(changed(value)):
            value -= 1
        return value if value >= smallest else 0


def _at_its_smallest(config: Any) -> Any:
    """Return the settings with a single row at a time, as memory cuts them."""
    single: dict[str, Any] = {TOKENS: 1, SAMPLING: 1, EVALUATION: 1}
    if not hasattr(config, TOKENS):  # an evaluation's answers to one image are parted as well
        single["num_generations"] = 1
    return replace(config, **{name: 1 for name in single if hasattr(config, name)})
