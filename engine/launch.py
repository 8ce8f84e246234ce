"""Read how this process was started: alone, or by torchrun as one of several ranks.

Everything in it is plain Python, so a wrong launch is answered before torch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from data.command_line import LAUNCHERS
from engine.config import UsageError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Launch:
    """Say which of how many processes this one is.

    rank: its number, from 0. size: how many there are on all nodes. local_rank: its number on its
    node. local_size: how many there are on its node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str] | None = None) -> Launch:
        """Read the variables that torchrun sets. Without them there is one process.

        environment: os.environ unless given.

        Raises UsageError where another launcher has started several processes, each of which would
        train the same, or where the variables are not whole.
        """
        found = os.environ if environment is None else environment
        if "RANK" not in found and "WORLD_SIZE" not in found:
            for launcher, (name, _) in LAUNCHERS.items():
                if found.get(name, "1") not in ("0", "1"):
                    raise UsageError(
                        f"{launcher} has started {found[name]} processes, which know nothing of"
                        " each other; let it start one `torchrun` on each node, which starts a"
                        " process for each GPU (engine/README.md,"
                        " 'Several GPUs, several machines')"
                    )
            return cls()
        problems = [
            f"{name} is {found.get(name) or 'not set'}: torchrun sets it; start with torchrun, or"
            " unset RANK and WORLD_SIZE for a single process"
            for name in _TORCHRUN
            if not found.get(name)
            or not name.startswith("MASTER_A")
            and not found[name].isdecimal()
        ]
        if problems:
            raise UsageError(problems)
        rank, size, local_rank, local_size = (int(found[name]) for name in _TORCHRUN[:4])
        if not rank < size or not local_rank < local_size <= size:
            raise UsageError(
                f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE"
                f" {local_size}: a rank is below its size; start with torchrun"
            )
        return cls(rank, size, local_rank, local_size)

    @property
    def first(self) -> bool:
        """Tell whether this process parses, writes and shows: rank 0, or the only one."""
        return self.rank == 0


class OneProcess:
    """Be the only process of a command: what ranks do together (engine/ranks.py), it does alone.

    rank, size, first: as of `Ranks`, which has the same methods for several.
    """

    rank: int = 0
    size: int = 1
    first: bool = True

    def gather(self, value: Value) -> list[Value]:
        """Give every rank's value to all: the own one."""
        return [value]

    def from_first(self, value: Value) -> Value:
        """Give rank 0's value to all: the own one."""
        return value

    def on_first(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 -> what it returned."""
        return function()

    def first_then_others(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0, then on the others, of which there are none."""
        return function()

    def together(self) -> AbstractContextManager[None]:
        """Leave the block as one: as it ends."""
        return nullcontext()


ONE_PROCESS = OneProcess()
