"""Keep the batch of a run where it goes on with another number of ranks, or in other micro-batches.

What makes the run are its completions (SFT: rows) an optimizer step, and its completions a rollout.
How they are divided among ranks and micro-batches changes numbers by rounding alone:

    a step      per_device_train_batch_size x gradient_accumulation_steps x ranks
    a rollout   per_device_train_batch_size x steps_per_generation x ranks

So a run that goes on with another number of ranks keeps its micro-batches, and accumulates more or
fewer of them. Everything in it is plain Python, so a number of ranks that does not divide is
answered without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.config import Resolved, UsageError

BATCH = "batch"  # in config.json
MICRO_BATCH = "per_device_train_batch_size"
ACCUMULATION = "gradient_accumulation_steps"
ROLLOUT = "steps_per_generation"
GROUP = "num_generations"
BATCH_SETTINGS = (MICRO_BATCH, ACCUMULATION, ROLLOUT)
RECOMPUTED = "recomputed for "  # begins the origin of a value that follows from the ranks
_MOST = 65536  # ranks, or completions of a micro-batch, that are tried

Settings = Mapping[str, Any]  # values by name


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


@dataclass(frozen=True)
class RunBatch:
    """Hold the batch of a run, which it keeps as long as it goes on.

    step: completions (SFT: rows) of an optimizer step. rollout: completions of a rollout, None in
    SFT. group: completions of a prompt, 1 in SFT.
    begun: BATCH_SETTINGS as the run began with them, which its command goes on giving.
    now: BATCH_SETTINGS as they were written down last.
    """

    step: int
    rollout: int | None
    group: int
    begun: dict[str, int | None]
    now: dict[str, int | None]

    @classmethod
    def of(cls, settings: Settings, ranks: int) -> RunBatch:
        """Compute the batch of a run that begins with these settings on so many ranks.

        Raises KeyError or ValueError for settings that no run has.
        """
        micro, accumulated = settings[MICRO_BATCH], settings[ACCUMULATION]
        rollout, group = settings.get(ROLLOUT), settings.get(GROUP, 1)
        if not all(map(_is_count, (micro, accumulated, group, 1 if rollout is None else rollout))):
            raise ValueError("no run has such a batch")
        micro_batches = rollout or 2 * accumulated
        values = {name: settings[name] for name in BATCH_SETTINGS if name in settings}
        return cls(
            step=micro * accumulated * ranks,
            rollout=micro * micro_batches * ranks if GROUP in settings else None,
            group=group,
            begun=values,
            now=values,
        )

    @classmethod
    def saved_in(cls, record: Mapping[str, Any]) -> RunBatch | None:
        """Read the batch of a run from its config.json, or compute it as one rank's.

        An earlier version wrote none, and knew one rank. Returns None where the record is damaged,
        which what reads it says.
        """
        try:
            now = cls.of({name: entry["value"] for name, entry in record["settings"].items()}, 1)
            return now._as_in(record[BATCH]) if record.get(BATCH) else now
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def _as_in(self, saved: Mapping[str, Any]) -> RunBatch:
        step, rollout, begun = saved["step"], saved["rollout"], dict(saved["begun"])
        counts = [step, *(count for count in (rollout, *begun.values()) if count is not None)]
        if not all(map(_is_count, counts)) or (rollout is None) != (self.rollout is None):
            raise ValueError("no run has such a batch")
        return replace(self, step=step, rollout=rollout, begun=begun)

    def record(self, ranks: int) -> dict[str, Any]:
        """Write it for config.json. ranks: how many go on with it."""
        return {"step": self.step, "rollout": self.rollout, "ranks": ranks, "begun": self.begun}

    def is_made_by(self, settings: Settings, ranks: int) -> bool:
        """Tell whether settings make the same batch on so many ranks."""
        try:
            made = RunBatch.of(settings, ranks)
        except (KeyError, ValueError):
            return False
        return (made.step, made.rollout) == (self.step, self.rollout)

    def has_given(self, setting: str, value: Any) -> bool:
        """Tell whether the run's own command may give a setting this value."""
        return value in (self.now.get(setting), self.begun.get(setting))

    # ---- divide it -------------------------------------------------------------------------------
    def divided(
        self, values: Settings, named: Callable[[str], bool], ranks: int
    ) -> dict[str, int | None]:
        """Divide the batch among so many ranks -> the settings that change, by name.

        values: the settings of today. Their micro-batches stay.
        named(setting): whether today's command gives it a value of its own, which then stays too.

        Raises UsageError where nothing divides, with what does.
        """
        micro = values[MICRO_BATCH]
        if not self._divides(micro, ranks):
            raise UsageError(self._refusal(micro, ranks))
        accumulated = self.step // (micro * ranks)
        wanted: dict[str, int | None] = {ACCUMULATION: accumulated}
        if self.rollout is not None:
            wanted[ROLLOUT] = accumulated * self.rollout // self.step
            if values[ROLLOUT] is None and wanted[ROLLOUT] == 2 * accumulated:
                wanted[ROLLOUT] = None
        problems = [
            f"--{name} {values[name]}: the resumed run has {self._said(name)}, which is"
            f" --{name} {value} with --{MICRO_BATCH} {micro} on {_ranks(ranks)}; leave it out, or"
            " start a new run"
            for name, value in wanted.items()
            if named(name) and values[name] != value
        ]
        if problems:
            raise UsageError(problems)
        return {name: value for name, value in wanted.items() if values[name] != value}

    def _divides(self, micro: int, ranks: int) -> bool:
        """Tell whether so many ranks can have whole micro-batches, and several whole groups."""
        of_rank, rest = divmod(self.step, ranks)
        return not rest and of_rank % micro == 0 and (ranks == 1 or of_rank % self.group == 0)

    def _refusal(self, micro: int, ranks: int) -> str:
        """Say that a number of ranks does not divide the batch, and what is nearest that does."""
        groups = f" and groups of --{GROUP} {self.group}" if self.group > 1 < ranks else ""
        nearest = _nearest(ranks, lambda number: self._divides(micro, number))
        sizes = _nearest(micro, lambda size: self._divides(size, ranks))
        remedies = [f"start {' or '.join(map(str, nearest))} ranks"] if nearest else []
        remedies += [f"give --{MICRO_BATCH} {' or '.join(map(str, sizes))}"] if sizes else []
        if not remedies:  # both have to change
            number = _nearest(ranks, lambda number: self._divides(1, number))[0]
            size = _nearest(micro, lambda size: self._divides(size, number))[0]
            remedies = [f"start {_ranks(number)} with --{MICRO_BATCH} {size}"]
        return (
            f"the resumed run has {self._said(ACCUMULATION)}, which {_ranks(ranks)} cannot divide"
            f" into micro-batches of --{MICRO_BATCH} {micro}{groups}: {', or '.join(remedies)}"
        )

    def _said(self, setting: str) -> str:
        things = "rows" if self.rollout is None else "completions"
        of_step = f"{self.step} {things} an optimizer step"
        return f"{self.rollout} completions a rollout" if setting == ROLLOUT else of_step


def _nearest(number: int, fits: Callable[[int], bool]) -> list[int]:
    """Find the nearest numbers that fit, below and above another one."""
    below = next(filter(fits, range(number - 1, 0, -1)), None)
    above = next(filter(fits, range(number + 1, _MOST + 1)), None)
    return [found for found in (below, above) if found is not None]


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


# ---- the command line ----------------------------------------------------------------------------
def settled_batch(
    record: Mapping[str, Any], values: Settings, origins: Mapping[str, str], ranks: int
) -> dict[str, tuple[int | None, str]]:
    """Let a command go on with a run on so many ranks -> {setting: its value and origin} to change.

    record: config.json of the run. values, origins: the settings of the command.

    A value that the run began with, or has now, is its own even where the command gives it: a job
    is queued again with the same command and another number of nodes. Raises UsageError where
    nothing divides, or where the command's own values make another batch.
    """
    saved = RunBatch.saved_in(record)
    try:
        RunBatch.of(values, ranks)
    except (KeyError, ValueError):  # which the checks of single values answer
        return {}
    if saved is None or saved.is_made_by(values, ranks):
        return {}

    def named(setting: str) -> bool:
        given = origins[setting] not in ("default", "resumed run")
        return given and not saved.has_given(setting, values[setting])

    origin = f"{RECOMPUTED}{_ranks(ranks)}"
    changed = saved.divided(values, named, ranks)
    return {name: (value, origin) for name, value in changed.items()}


def recomputed_line(resolved: Resolved, ranks: int) -> str | None:
    """Say in a line what was recomputed for so many ranks, None where nothing was."""
    config = resolved.configs[0]
    changed = [
        f"--{name} {getattr(config, name)}"
        for name in BATCH_SETTINGS
        if resolved.origins.get(name, "").startswith(RECOMPUTED)
    ]
    if not changed:
        return None
    values = {name: getattr(config, name) for name in BATCH_SETTINGS if hasattr(config, name)}
    kept = RunBatch.of(values, ranks).step
    return (
        f"goes on with {_ranks(ranks)}: {', '.join(changed)}, so that an optimizer step keeps its"
        f" {kept} {'completions' if ROLLOUT in values else 'rows'}"
    )
