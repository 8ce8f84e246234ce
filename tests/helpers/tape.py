"""Pretend CUDA graphs on a CPU: record the operations of a capture, and run them again.

As on a GPU a capture runs nothing, numbers from Python stay what they were, and memory is read and
written where it was. What waits for the device cannot be captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


def storages(values: object) -> dict[int, torch.UntypedStorage]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {storage.data_ptr(): storage for storage in (t.untyped_storage() for t in tensors)}


class Tape(TorchDispatchMode):
    """Stand in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.replays = 0
        self._own: dict[int, torch.UntypedStorage] = {}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        given = storages((args, kwargs))
        for address, storage in given.items():
            if address not in self._own and address not in self._before:
                self._before[address] = storage, storage.clone()
        result = function(*args, **kwargs)
        made = {at: one for at, one in storages(result).items() if at not in given}
        self._own |= made
        self.operations.append((function, args, kwargs, result if made else None))
        return result

    def undo(self) -> None:
        """Put back what the recorded operations changed outside."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, made in self.operations:
            result = function(*args, **kwargs)
            if made is not None:
                for into, new in zip(tree_leaves(made), tree_leaves(result), strict=True):
                    into.copy_(new)


class Card:
    """Stand in for torch.cuda: what was captured, in which pool, on which stream."""

    def __init__(self) -> None:
        self.graphs: list[Tape] = []
        self.pools: list[object] = []
        self.fails: Exception | None = None
        self.own_stream = self.current = _Stream()

    @contextmanager
    def graph(self, tape: Tape, *, pool, stream, capture_error_mode) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and isinstance(stream, _Stream)
        self.graphs.append(tape)
        self.pools.append(pool)
        before, self.current = self.current, stream
        try:
            with tape:
                yield
            if self.fails is not None:
                raise self.fails
        except RuntimeError as error:
            # As on a GPU: what fails within breaks the capture, whose end then fails before torch
            # has left its stream.
            if error is self.fails:
                raise
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            ) from error
        finally:
            tape.undo()
        self.current = before

    @contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def set_stream(self, stream: _Stream) -> None:
        self.current = stream

    def put(self, patch) -> None:
        """Let torch.cuda be this."""
        for name, value in {
            "CUDAGraph": Tape,
            "graph": self.graph,
            "graph_pool_handle": object,
            "Stream": _Stream,
            "current_stream": lambda: self.current,
            "set_stream": self.set_stream,
            "stream": self.stream,
        }.items():
            patch.setattr(torch.cuda, name, value)


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream)
