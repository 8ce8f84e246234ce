"""Note what a step or an evaluation may change beside the weights, and put it back.

The weights are put back by what `engine.optim.whole_step` gives for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch

from engine.state_tensors import load_rng, rng_to_tensors

if TYPE_CHECKING:
    from engine.run import TrainerState


class Stateful(Protocol):
    """Describe what a run puts back when a step fails: a reward's window, the monitors."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass(frozen=True)
class Before:
    """Hold what was before a step or an evaluation.

    random: as `rng_to_tensors` gives it. parts: of what is stateful, by name. state: the fields of
    TrainerState. log_length: of its log_history, which only grows. saved: whether all of it is on
    disk.
    """

    random: tuple[dict[str, torch.Tensor], dict[str, Any]]
    parts: dict[str, Any]
    state: dict[str, Any]
    log_length: int
    saved: bool

    @classmethod
    def of(cls, state: TrainerState, stateful: Mapping[str, Stateful], *, saved: bool) -> Before:
        """Note everything as it is now. Its arguments are those of `put_back`."""
        return cls(
            rng_to_tensors(),
            {name: part.state_dict() for name, part in stateful.items()},
            {field.name: getattr(state, field.name) for field in fields(state)},
            len(state.log_history),
            saved,
        )

    def put_back(self, state: TrainerState, stateful: Mapping[str, Stateful]) -> None:
        """Make everything as it was, in the objects that there are."""
        load_rng(*self.random)
        for name, part in stateful.items():
            part.load_state_dict(self.parts[name])
        for name, value in self.state.items():
            setattr(state, name, value)
        del state.log_history[self.log_length :]  # the logger's own list, which stays the same
