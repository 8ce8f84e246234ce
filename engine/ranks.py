"""Share a run among processes that torchrun has started, one a GPU. Each of them is a rank.

Three rules keep several ranks as exact as one:

  1. every decision is made from what all ranks know (`gather`, `from_first`), so all take the same
     branch
  2. gradients and totals are summed, and what divides them is a total of the whole step
  3. what one rank raises, all raise, at the end of the block in which it happened (`together`)

With one process nothing is initialised and nothing communicates.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from engine.config import Resolved
from engine.launch import Launch
from engine.runtime import PeerError, StopRequested

Value = TypeVar("Value")

# How long a rank waits for the others. It must exceed what one rank does alone between two
# exchanges: hashing a base, saving, the longest of the ranks' rollouts less the shortest.
TIMEOUT = timedelta(minutes=30)
# The first byte of a message: what an exchange is of. Ranks that are out of step notice by it.
_VALUE, _STATUS = b"v", b"s"
# How a block ended where this rank has not failed in it. Any other status says what failed.
_WELL, _STOPPED, _INTERRUPTED, _TOLD = "well", "stopped", "interrupted", "told"


class Ranks:
    """Divide work, exchange what all must know, and add up gradients.

    rank: this process's number. size: how many there are. first: whether this is rank 0, which
    alone writes and shows.

    Messages travel over gloo, on the CPU, as JSON and safetensors. Only the sum of the gradients
    takes NCCL, and only once a message over gloo has said that every rank has come so far: NCCL
    would wait for a dead one.
    """

    def __init__(self, launch: Launch | None = None):
        """Take part as `launch` says, alone without one. Several ranks wait here for each other."""
        launch = launch or Launch()
        self.rank, self.size, self.first = launch.rank, launch.size, launch.first
        self.local_rank, self.local_size = launch.local_rank, launch.local_size
        if self.size > 1:
            on_gpus = torch.cuda.is_available()
            if on_gpus:
                torch.cuda.set_device(self.local_rank)
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", timeout=TIMEOUT)
            # Of its own: where ranks fall out of step, another exchange's sizes would make gloo
            # end the process.
            self._messages = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the others, on every way out: gloo ends a process whose peer left without it."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    # ---- divide ----------------------------------------------------------------------------------
    def share(self, count: int) -> range:
        """Return this rank's part of `count` things, in their order; sizes differ by at most 1."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    # ---- exchange --------------------------------------------------------------------------------
    def gather(self, value: Value) -> list[Value]:
        """Give every rank's value to all, in the ranks' order. value: what JSON holds."""
        if self.size == 1:
            return [value]
        return [json.loads(data) for data in self._values(json.dumps(value).encode())]

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Give every rank's named tensors to all, on the CPU, in the ranks' order."""
        if self.size == 1:
            return [dict(tensors)]
        packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return [load(data) for data in self._values(save(packed))]

    def from_first(self, value: Value) -> Value:
        """Give rank 0's value to all. value: what JSON holds; the other ranks' is not looked at."""
        if self.size == 1:
            return value
        data = json.dumps(value if self.first else None).encode()
        return json.loads(self._values(data)[0])

    def on_first(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 alone -> what it returned, on all. It returns what JSON holds.

        What it raises, all raise (`together`).
        """
        with self.together():
            value = function() if self.first else None
        return self.from_first(value)  # type: ignore[return-value]

    def resolved(self, resolved: Resolved | None, *config_classes: type) -> Resolved:
        """Give the settings that rank 0 has read to all.

        resolved: None on other ranks. config_classes: those of its configs, in their order.
        """
        if self.size == 1:
            assert resolved is not None, "the only rank reads the command line"
            return resolved
        record = self.on_first(lambda: resolved.record() if resolved else {})
        return Resolved.of_record(config_classes, record)

    def _values(self, data: bytes) -> list[bytes]:
        """Exchange values. Raises what another rank tells where it is at the end of a block."""
        said = self._exchange(_VALUE + data)
        for rank, message in enumerate(said):
            if message.startswith(_STATUS):
                _raise_told(rank, message[1:].decode())
        return [message[1:] for message in said]

    def _exchange(self, data: bytes) -> list[bytes]:
        """Give every rank's bytes to all. Raises PeerError where a rank has ended."""
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._messages)
            longest = int(torch.stack(sizes).max())
            padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self._messages)
        except RuntimeError as broken:
            raise PeerError(f"a rank has ended, or does not answer ({_line(broken)})") from broken
        return [
            part.numpy().tobytes()[: int(size)] for part, size in zip(parts, sizes, strict=True)
        ]

    # ---- add up ----------------------------------------------------------------------------------
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all ranks, in one buffer: all have the same bits then.

        A sum, never a mean: the losses are divided by totals of the whole step already. A rank
        that had nothing to do counts as zeros. To be called after a `together`.
        """
        if self.size == 1:
            return
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        )
        try:
            dist.all_reduce(flat)
        except RuntimeError as broken:
            raise PeerError(f"a rank has ended, or does not answer ({_line(broken)})") from broken
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)

    # ---- fail and stop together ------------------------------------------------------------------
    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let all ranks leave the block as one: what one raises in it, all raise at its end.

        The lowest rank that failed raises its own exception, the others PeerError. Where ranks only
        stop, as a signal asks, all raise StopRequested, or KeyboardInterrupt after a second Ctrl-C.
        Blocks and exchanges may lie within: a rank that waits in one is told there.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # told to the others, then raised again
            error = caught
        if self.size > 1:
            self._end_block(error)
        if error is not None:
            raise error

    def _end_block(self, error: BaseException | None) -> None:
        """Tell all how a block ended here, and raise what they tell where that comes first."""
        try:
            said = self._exchange(_STATUS + _status(error).encode())
        except PeerError:
            if error is None:
                raise
            return  # an error of one's own is the one to see
        # who waits in an exchange of values is told there, and has not failed
        told = [message[1:].decode() if message.startswith(_STATUS) else _WELL for message in said]
        failed = [
            rank
            for rank, how in enumerate(told)
            if how not in (_WELL, _STOPPED, _INTERRUPTED, _TOLD)
        ]
        if failed and failed[0] != self.rank:
            _raise_told(failed[0], told[failed[0]])
        for how in (_INTERRUPTED, _STOPPED):
            if how in told and error is None:
                _raise_told(told.index(how), how)

    @contextlib.contextmanager
    def silent_but_first(self) -> Iterator[None]:
        """Show nothing of what ranks other than the first print within the block.

        Errors that leave it are shown, by whoever catches them.
        """
        if self.first:
            yield
            return
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield


def _status(error: BaseException | None) -> str:
    """Say in one line how a block ended."""
    if error is None:
        return _WELL
    if isinstance(error, PeerError):  # of an inner block: who failed raises it here once more
        return _TOLD
    if isinstance(error, StopRequested):
        return _STOPPED
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _line(error)


def _raise_told(rank: int, told: str) -> NoReturn:
    """Raise what a rank has told of the end of its block."""
    if told == _STOPPED:
        raise StopRequested
    if told == _INTERRUPTED:
        raise KeyboardInterrupt
    if told == _TOLD:
        raise PeerError(f"rank {rank} has left, as another did")
    if told == _WELL:
        raise RuntimeError(f"rank {rank} has come to the end of a block, and this one has not")
    raise PeerError(f"rank {rank} failed: {told}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


ALONE = Ranks()  # of a process that was not started by torchrun, or takes no part
