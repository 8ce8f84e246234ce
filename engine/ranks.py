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
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from engine.config import Resolved, UsageError
from engine.launch import Launch, OneProcess
from engine.runtime import SIGNALS, PeerError, StopRequested

Value = TypeVar("Value")

# How long a rank waits for the others. It must exceed what one rank does alone between two
# exchanges: hashing a base, saving, the longest of the ranks' rollouts less the shortest.
TIMEOUT = timedelta(minutes=30)
# The first byte of a message: what an exchange is of. Ranks that are out of step notice by it.
_VALUE, _STATUS, _WORK = b"v", b"s", b"w"
# How a block ended where this rank has not failed in it. Any other status says what failed.
_NO_FAILURE = _WELL, _STOPPED, _INTERRUPTED, _TOLD = "well", "stopped", "interrupted", "told"


class Ranks(OneProcess):
    """Divide work, exchange what all must know, and add up gradients.

    rank: this process's number. size: how many there are. first: whether this is rank 0, which
    alone writes and shows.

    Messages travel over gloo, on the CPU, as JSON and safetensors. Only the sum of the gradients
    takes NCCL, and only once a message over gloo has said that every rank has come so far: NCCL
    would wait for a dead one.
    """

    def __init__(self, launch: Launch | None = None):
        """Take part as `launch` says, alone without one. Several ranks wait here for each other.

        Raises UsageError where a node has fewer GPUs than ranks: a GPU is never shared.
        """
        launch = launch or Launch()
        self.rank, self.size, self.first = launch.rank, launch.size, launch.first
        self.local_rank, self.local_size = launch.local_rank, launch.local_size
        self._messages: dist.ProcessGroup | None = None
        # How many blocks lie around what runs (`together`), and the outermost of them that others
        # have left already, from 1.
        self._depth, self._left = 0, sys.maxsize
        if self.size > 1:
            on_gpus = torch.cuda.is_available()
            if on_gpus:
                self._take_gpu(torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
            with _ended_by_signals():
                dist.init_process_group(backend, timeout=TIMEOUT)
                # Of its own: where ranks fall out of step, another exchange's sizes would make
                # gloo end the process.
                self._messages = dist.new_group(backend="gloo", timeout=TIMEOUT)
        # What this rank does of the others' work once it has come to the end of a block (`meet`).
        self.parts: dict[str, Callable[[], object]] = {}

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
        self._messages = None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _take_gpu(self, count: int) -> None:
        if self.local_size > count:
            problem = f"{self.local_size} processes on a node with {count} GPUs"
            if self.local_rank == 0:  # one of them says it
                raise UsageError(f"{problem}: give torchrun --nproc_per_node {count}")
            raise PeerError(problem)
        torch.cuda.set_device(self.local_rank)

    # ---- divide ----------------------------------------------------------------------------------
    def share(self, count: int, together: int = 1) -> range:
        """Return this rank's part of `count` things, in their order.

        together: things that are not parted, such as the rows of a micro-batch. The parts differ by
        so many at most, and the last may be smaller.
        """
        units = -(-count // together)
        first, end = (rank * units // self.size * together for rank in (self.rank, self.rank + 1))
        return range(min(first, count), min(end, count))

    # ---- exchange --------------------------------------------------------------------------------
    def gather(self, value: Value) -> list[Value]:
        """Give every rank's value to all, in the ranks' order. value: what JSON holds."""
        if self.size == 1:
            return super().gather(value)
        return [json.loads(data) for data in self._values(json.dumps(value).encode())]

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Give every rank's named tensors to all, in the ranks' order.

        They are copies on the CPU. With one rank they are the tensors themselves.
        """
        if self.size == 1:
            return [dict(tensors)]
        packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        return [load(data) for data in self._values(save(packed))]

    def from_first(self, value: Value) -> Value:
        """Give rank 0's value to all. value: what JSON holds; the other ranks' is not looked at."""
        if self.size == 1:
            return super().from_first(value)
        data = json.dumps(value if self.first else None).encode()
        return json.loads(self._values(data)[0])

    def on_first(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 alone -> what it returned, on all. It returns what JSON holds.

        What it raises, all raise (`together`).
        """
        with self.together():
            value = function() if self.first else None
        return self.from_first(value)  # type: ignore[return-value]

    def first_then_others(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0, then on the others: it finds or makes files that all read."""
        values: list[Value] = []
        for turn in (True, False)[: self.size]:
            with self.together():
                if self.first is turn:
                    values.append(function())
        return values[0]

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
        """Exchange values. Raises what another rank tells that is at the end of a block."""
        said = self._exchange(_VALUE + data)
        if not all(message.startswith(_VALUE) for message in said):
            self._raise_told(said)
        return [message[1:] for message in said]

    def _exchange(self, data: bytes) -> list[bytes]:
        """Give every rank's bytes to all. Raises PeerError where a rank has ended."""
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._connected():
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self._messages)
        padded = bytearray(int(torch.stack(sizes).max()))
        padded[: len(data)] = data
        mine = torch.frombuffer(padded, dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        with self._connected():
            dist.all_gather(parts, mine, group=self._messages)
        return [
            part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)
        ]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Raise PeerError in place of what gloo says of a rank that has ended or waits elsewhere.

        This rank leaves the others then, so that those that wait for it are told at once: gloo
        notices only the end of neighbours.
        """
        told = "a rank has ended: torchrun names it as the root cause"
        if not dist.is_initialized():
            raise PeerError(told)
        try:
            yield
        except RuntimeError as broken:
            traceback.clear_frames(broken.__traceback__)  # they hold the connections
            self.close()
            if "timed out" in str(broken).lower():
                told = f"a rank has not come to the others for {TIMEOUT.seconds // 60} minutes"
            raise PeerError(told) from broken

    def meet(self, work: str) -> None:
        """Wait until all ranks come to a piece of work that each does a part of.

        Ranks at the end of their block do it as `parts[work]` says, until nobody has any left.
        Raises what another rank tells where it has failed or stopped.
        """
        own = _WORK + work.encode()
        said = self._exchange(own)
        if not all(message == own or _is_well(message) for message in said):
            self._raise_told(said)

    def _raise_told(self, said: Sequence[bytes]) -> NoReturn:
        """Raise what ranks at the end of a block tell to this one, which is not there."""
        ends = any(message.startswith(_STATUS) for message in said)
        error = self._of_all(said, None) if ends else None
        raise error or RuntimeError("the ranks are out of step")

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
        with self._connected():
            dist.all_reduce(flat)
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
        self._depth += 1
        depth = self._depth
        try:
            yield
        except BaseException as caught:  # told to the others, then raised again
            error = caught
        self._depth = depth - 1
        if self._left <= depth:  # the others have left this block before
            self._left = sys.maxsize if self._left == depth else self._left
        elif self.size > 1:
            said, error = self._ends(depth, error)
            error = self._of_all(said, error)
        if error is not None:
            raise error

    def _ends(
        self, depth: int, error: BaseException | None
    ) -> tuple[list[bytes], BaseException | None]:
        """Exchange how a block has ended, and do this rank's part of what others still do in it.

        Returns the ranks' messages, and what this rank raises, its part's error included.
        """
        while True:
            try:
                said = self._exchange(_STATUS + json.dumps([depth, _status(error)]).encode())
            except PeerError:
                if error is None:
                    raise
                raise error from None  # one's own is the one to see
            works = {message for message in said if message.startswith(_WORK)}
            if len(works) != 1 or not all(m in works or _is_well(m) for m in said):
                return said, error
            try:
                self.parts[works.pop()[1:].decode()]()
            except BaseException as caught:  # told in the next exchange
                error = caught

    def _of_all(self, said: Sequence[bytes], error: BaseException | None) -> BaseException | None:
        """Read how a block has ended on each rank -> what this rank is to raise.

        said: the ranks' messages. A rank that waits elsewhere has not failed. error: what this rank
        raises itself.
        """
        ends = {
            rank: json.loads(message[1:])
            for rank, message in enumerate(said)
            if message.startswith(_STATUS)
        }
        depths = [depth for depth, _ in ends.values()]
        if min(depths) <= self._depth:
            self._left = min(depths)
        told = [ends[rank][1] if rank in ends else _WELL for rank in range(self.size)]
        failed = [rank for rank, how in enumerate(told) if how not in _NO_FAILURE]
        other: BaseException | None = None
        if failed and failed[0] != self.rank:
            other = PeerError(f"rank {failed[0]} failed: {told[failed[0]]}")
        elif not failed and _INTERRUPTED in told and _status(error) in (_WELL, _STOPPED):
            other = KeyboardInterrupt()
        elif not failed and _STOPPED in told and error is None:
            other = StopRequested()
        elif not failed and _TOLD in told and error is None:
            other = PeerError(f"rank {told.index(_TOLD)} has left, as another did")
        elif set(told) == {_WELL} and depths != [depths[0]] * self.size:
            other = RuntimeError("the ranks are out of step")
        if other is None:
            return error
        other.__cause__ = error
        return other

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


def on_this_rank(
    run: Callable[[Resolved, Ranks], int], resolved: Resolved | None, *config_classes: type
) -> int:
    """Take part in what torchrun has started, or run alone -> the exit code.

    run: what all ranks do, with rank 0's settings. resolved, config_classes: see `Ranks.resolved`.
    """
    with Ranks(Launch.of()) as ranks, ranks.silent_but_first(), ranks.together():
        return run(ranks.resolved(resolved, *config_classes), ranks)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let signals end this process within the block, in which it waits for the other ranks.

    A rank that was refused its command line never comes. torchrun ends the others then, and
    Python's own handlers would wait as well.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, signal.SIG_DFL)
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)


def _status(error: BaseException | None) -> str:
    """Say in one line how a block ended."""
    if error is None:
        return _WELL
    if isinstance(error, PeerError):  # of an inner block: who failed raises it here once more
        return _TOLD
    if isinstance(error, StopRequested):
        return _STOPPED
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _line(error)


def _is_well(message: bytes) -> bool:
    """Tell whether a rank is at the end of a block in which it has not failed."""
    return message.startswith(_STATUS) and json.loads(message[1:])[1] == _WELL


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"


ALONE = Ranks()  # of a process that was not started by torchrun, or takes no part
