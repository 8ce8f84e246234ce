"""Replay work on a GPU as CUDA graphs, so that launching its kernels costs next to nothing.

A kernel of a decoding step runs for a few microseconds and takes longer to be launched from Python.
A CUDA graph records the kernels with the addresses that they read and write, and is replayed in one
launch. It is right only while the work would do the same with the same memory. So the first time in
every call the work runs as it is, and its operations are compared with those of the call before:
other weights, adapters of other shapes and other settings all show there.

Not run on a GPU yet. Tests replay the operations one by one on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.out_of_memory import HOLDERS, is_out_of_memory

Held = TypeVar("Held")


class Trace(TorchDispatchMode):
    """Note the operations of a block: what runs, with which numbers, on which memory.

    The address of memory that the block allocates itself is left out, for it differs every time.
    """

    def __init__(self) -> None:
        """Begin with nothing noted."""
        super().__init__()
        self.operations: list[tuple] = []
        self._own: set[int] = set()  # nothing else lies there while the block runs

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and note it."""
        given = tree_leaves((args, kwargs))
        self.operations.append((function, *map(self._noted, given)))
        result = function(*args, **(kwargs or {}))
        known = {_address(one) for one in given if isinstance(one, Tensor)}
        made = {_address(one) for one in tree_leaves(result) if isinstance(one, Tensor)}
        self._own |= made - known
        return result

    def _noted(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        place = None if _address(value) in self._own else _address(value)
        return place, value.storage_offset(), value.shape, value.stride(), value.dtype


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Graphs:
    """Hold the graphs of one model's decoding, with the memory that they read and write.

    They outlive a call that keeps them. Whatever goes wrong in a call drops them. Whatever runs out
    of memory later drops them for good (`engine.out_of_memory.free_memory`): then no call keeps
    any, for the next would run out as well.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self.unable = False  # once a capture has failed
        self._released = False  # once what a call had kept was in the way
        self._stream: Any = None
        self.drop()
        HOLDERS.add(self)

    @property
    def count(self) -> int:
        """Return how many there are."""
        return len(self._replay)

    def drop(self) -> None:
        """Let go of the graphs and all that they read and write."""
        self._placed: dict[Hashable, Tensor] = {}
        self._drop_shapes()

    def _drop_shapes(self) -> None:
        """Let go of the graphs and what has their shapes, but for what `placed` holds."""
        self._replay: dict[tuple, Callable[[], None]] = {}
        self._traces: dict[str, list[tuple]] = {}
        self._warm: set[tuple] = set()
        self._compared: set[str] = set()
        self._held: tuple[Hashable, Any] | None = None
        self._pool: Any = None

    def release(self) -> bool:
        """Let go of what a call has kept, and keep nothing from now on.

        Returns whether there was anything.
        """
        if self._held is None:
            return False
        print(
            "note: memory is short: decoding keeps neither cache nor CUDA graphs for the next"
            " rollout from now on",
            file=sys.stderr,
        )
        self._released = True
        self.drop()
        return True

    @contextmanager
    def call(self, *, keep: bool) -> Iterator[None]:
        """Run one call in the block. keep: hold graphs and memory afterwards, for the next."""
        self._compared.clear()
        fine = False
        try:
            yield
            fine = True
        finally:
            if self._released or not (keep and fine):
                self.drop()

    def held(self, key: Hashable, make: Callable[[], Held]) -> Held:
        """Return what was made for this key, or drop what was made for another and make it."""
        if self._held is None or self._held[0] != key:
            self._drop_shapes()
            self._held = key, make()
        return self._held[1]

    def placed(self, key: Hashable, made: Tensor) -> Tensor:
        """Put a tensor where the call before had it, so that graphs that read it stay right.

        key: names it among those of a call. made: for this call, and nobody else's.
        """
        known = self._placed.get(key)
        if known is None or known.shape != made.shape or known.dtype != made.dtype:
            self._placed[key] = made
            return made
        return known.copy_(made)

    def run(self, name: str, shape: Hashable, work: Callable[[], None]) -> None:
        """Do the work once, by its graph where there is one.

        name: of the work. shape: on which its operations depend beside what the call began with.

        A shape that comes for the first time warms up. The second time it is captured. Where that
        fails all work runs without graphs from then on, and one line says why. Raises what the work
        raises where it runs as it is, and what runs out of memory.
        """
        if self.unable:
            return work()
        key = name, shape
        if name not in self._compared:
            self._compare(name, key, work)
        elif key in self._replay:
            self._replay[key]()
        elif key not in self._warm:
            self._warm.add(key)
            self._aside(work)
        else:
            self._capture(key, work)

    def _compare(self, name: str, key: tuple, work: Callable[[], None]) -> None:
        """Do the work as it is, and drop all graphs where it is not what its own recorded."""
        self._compared.add(name)
        with Trace() as trace:
            self._aside(work)
        if self._traces.get(name) != trace.operations:
            # Those of other works go as well: when a graph ends, torch gives back the memory that
            # cuBLAS works in on its stream, and all graphs are of one stream.
            self._replay, self._pool = {}, None
            self._warm = {of for of in self._warm if of[0] != name} | {key}
            self._traces[name] = trace.operations

    def _capture(self, key: tuple, work: Callable[[], None]) -> None:
        """Capture the work and replay it."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        said, ran_out = "", False  # by the work itself: the capture's end fails after it
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                try:
                    work()
                except RuntimeError as error:
                    said, ran_out = str(error), is_out_of_memory(error)
                    raise
        except RuntimeError as error:
            said = said or str(error)
            if ran_out or is_out_of_memory(error):
                raise torch.OutOfMemoryError(said) from error
            said = said.partition("\n")[0]
            print(f"note: decoding goes on without CUDA graphs: {said}", file=sys.stderr)
            self.unable = True
        else:
            self._replay[key] = graph.replay
        finally:
            # Where the capture cannot be ended either, torch stays on its stream.
            torch.cuda.set_stream(before)
        # A capture runs nothing.
        self._replay.get(key, work)()

    def _aside(self, work: Callable[[], None]) -> None:
        """Do the work on the stream of the captures, which prepares torch's libraries there."""
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
