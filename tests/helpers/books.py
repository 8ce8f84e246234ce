"""Look for models and optimizers in the books of a run, which must hold none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch

from engine.policy import Policy
from engine.run import Run

TRAINED = (torch.nn.Module, torch.optim.Optimizer, torch.nn.Parameter, Policy)


def held_by(run: Run) -> list[str]:
    """Name the attributes of a run that are a model or an optimizer, or hold one.

    It looks at each attribute, at the items of containers, and at the attributes of the objects
    that are found so, with their items.
    """
    found = []
    for name, value in vars(run).items():
        for path, item in _with_items(name, value):
            inner = [one for key, own in _attributes(item) for one in _with_items(key, own)]
            if isinstance(item, TRAINED):
                found.append(path)
            elif kept := {key for key, own in inner if isinstance(own, TRAINED)}:
                found += [f"{path}.{key}" for key in sorted(kept)]
    return found


def _attributes(value: object) -> list[tuple[str, object]]:
    return list(getattr(value, "__dict__", {}).items())


def _with_items(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Give the value itself and, of a container, its items, all under the attribute's name."""
    yield name, value
    if isinstance(value, Mapping):
        yield from ((name, item) for item in value.values())
    elif isinstance(value, Sequence | AbstractSet) and not isinstance(value, str | bytes):
        yield from ((name, item) for item in value)
