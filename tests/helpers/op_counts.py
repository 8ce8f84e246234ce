"""Count what a program would do on a GPU, without one: kernels, bytes, waits, shapes, memory.

    with as_on_cuda(), OpCounts() as counts:
        work()                  # on the meta device, whose tensors have shapes but no values
        print(counts.take())    # what was counted since the last take()

What needs a value gets an answer that is said beforehand, and is counted as a wait of the host. So
whole loops run: where every look finds zeros, no completion of a rollout ever stops.

What CUDA does otherwise than the meta device stands in the tables of this file, read in torch's
sources. A kernel reads each element of its operands once and writes each element of its results
once; one that is broadcast is read once. What a cache saves is not seen, nor what a kernel reads
twice. Operations on the CPU are not counted.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Kernels of an operation, where CUDA has more than one.
KERNELS = {
    "isin": 3,  # fill, compare each with each, any
    "masked_scatter": 5,  # copies of mask and operand, a prefix sum of two kernels, scatter
    "topk": 20,  # three for each of four digits, counts, two prefix sums of two, gather, fill, sort
}
# These copy their first operand and then change the copy in place.
COPY_FIRST = {
    "index_add",
    "index_copy",
    "index_fill",
    "index_put",
    "masked_fill",
    "scatter",
    "scatter_add",
}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# How often an operation of several kernels reads its first operand.
READS = {"topk": 5}  # for each of four digits, and to gather
# These read of their first operand only what an index names, as many elements as the result has.
READ_AT_INDEX = {"embedding", "gather", "index", "index_select"}
# These write only what an index names.
WRITTEN_AT_INDEX = {"index_add", "index_copy", "index_fill", "index_put", "scatter", "scatter_add"}
OVERWRITTEN = {"copy", "fill", "zero"}  # the first operand, without reading what was there

# One launch over lists of tensors (torch's multi_tensor_apply) takes so many tensors, by the number
# of lists, and so many chunks of so many elements.
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
CHUNKS, CHUNK = 320, 65_536
CAT_TENSORS = 128  # that one launch puts together


@dataclass(frozen=True)
class Counts:
    """Hold what was counted.

    launches: kernels and copies that the host starts. read, written: bytes.
    waits: how often the host waits for the device.
    peak: bytes of live tensors at their most, over those that were there at the beginning.
    shapes: a hash of all launches with the shapes of their tensors, in their order.
    """

    launches: int
    read: int
    written: int
    waits: int
    peak: int
    shapes: int

    @property
    def moved(self) -> int:
        """Return the bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class _Known:
    """Hold what an operation on operands of one layout does, each time that it runs.

    made: shape, stride and dtype of its result, where that is one new tensor of the device.
    in_place: it returns its first operand. is_new: its results are no views.
    """

    made: tuple[torch.Size, tuple[int, ...], torch.dtype] | None
    in_place: bool
    is_new: bool
    launches: int
    read: int
    written: int
    shapes: int

    def run(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Run the operation again. torch's own way to the shapes takes half a millisecond."""
        if self.in_place:
            return args[0]
        if self.made is None:
            return function(*args, **kwargs)
        shape, stride, dtype = self.made
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


_KNOWN: dict[Any, _Known] = {}  # by operation and layout of its operands


class OpCounts(TorchDispatchMode):
    """Count the operations on the meta device within the block.

    answer: the value of everything that the host reads from the device.
    """

    def __init__(self, answer: int = 0) -> None:
        super().__init__()
        self._answer = answer
        self._live = 0
        self._begin()

    def _begin(self) -> None:
        self._launches = self._read = self._written = self._waits = self._shapes = 0
        self._start = self._peak = self._live

    def take(self) -> Counts:
        """Return what was counted since the last call, and begin anew."""
        counts = Counts(
            self._launches,
            self._read,
            self._written,
            self._waits,
            self._peak - self._start,
            self._shapes,
        )
        self._begin()
        return counts

    def shapes_of(self, work: Callable[[], object]) -> int:
        """Do a part of the work, and return a hash of the shapes of its launches alone."""
        before, self._shapes = self._shapes, 0
        work()
        own, self._shapes = self._shapes, hash((before, self._shapes))
        return own

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta:
            self._transfer(args[0], waits=True)
            return torch.full((), self._answer, dtype=args[0].dtype).item()
        if name in ("_to_copy", "copy_") and _crosses(name, args, kwargs):
            return self._copied(function, name, args, kwargs)
        key = function, _layout(args), _layout(tuple(kwargs.items()))
        known = _KNOWN.get(key)
        if known is None:
            result = function(*args, **kwargs)
            known = _KNOWN[key] = _seen(function, name, args, kwargs, result)
        else:
            result = known.run(function, args, kwargs)
        if known.is_new:
            self._hold(result)
        if known.launches:
            self._add(known.launches, known.read, known.written, known.shapes)
        return result

    def _add(self, launches: int, read: int, written: int, shapes: int) -> None:
        self._launches += launches
        self._read += read
        self._written += written
        self._shapes = hash((self._shapes, shapes))

    def _copied(self, function: Any, name: str, args: tuple, kwargs: dict) -> Any:
        """Copy between host and device, to the host the answer. It waits unless told not to."""
        source = args[name == "copy_"]
        self._transfer(source, waits=not (kwargs.get("non_blocking") or True in args[2:]))
        if source.is_meta:  # has no values
            source = torch.full(source.shape, self._answer, dtype=source.dtype)
        args = (args[0], source, *args[2:]) if name == "copy_" else (source,)
        result = function(*args, **kwargs)
        if name == "_to_copy" and result.is_meta:
            self._hold(result)
        return result

    def _transfer(self, source: Tensor, waits: bool) -> None:
        size = stored(source)
        self._waits += waits
        self._add(1, size * source.is_meta, size * (not source.is_meta), hash(source.shape))

    def _hold(self, result: Any) -> None:
        """Follow how long new tensors live."""
        for tensor in _tensors((result,)):
            if tensor.is_meta:
                storage = tensor.untyped_storage()
                self._live += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
        self._peak = max(self._peak, self._live)

    def _free(self, size: int) -> None:
        self._live -= size


def _seen(function: Any, name: str, args: tuple, kwargs: dict, result: Any) -> _Known:
    """Note what an operation does that ran for the first time."""
    inputs = [one for one in _tensors((*args, *kwargs.values())) if one.is_meta]
    outputs = [one for one in _tensors((result,)) if one.is_meta]
    changed = _changed(function)
    there = {one.untyped_storage()._cdata for one in inputs}
    new = [one for one in outputs if one.untyped_storage()._cdata not in there]
    in_place = changed == (0,) and result is args[0] and result.is_meta
    made = None
    if new and result is new[0] and not changed:
        made = result.shape, result.stride(), result.dtype
    launches = read = written = 0
    is_view = not new and not changed
    if not is_view and name not in NO_KERNEL and any(one.numel() for one in outputs or inputs):
        if name.startswith(("_foreach", "_fused")):
            launches, read, written = _of_lists(name, args, changed, outputs)
        else:
            launches = KERNELS.get(name, 1) + (name in COPY_FIRST)
            if name in ("cat", "stack"):
                launches = -(-len(inputs) // CAT_TENSORS)
            read, written = _moved(name, args, changed, inputs, new)
    shapes = hash((name, *(one.shape for one in (*inputs, *outputs))))
    return _Known(made, in_place, bool(new), launches, read, written, shapes)


def stored(tensor: Tensor) -> int:
    """Return the bytes of the elements that a tensor really has: one that is broadcast is one."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n)
    return math.prod(sizes) * tensor.element_size()


def list_launches(sizes: list[int], lists: int) -> int:
    """Count the launches over `lists` lists of tensors of these numbers of elements."""
    launches = tensors = chunks = 0
    for place, size in enumerate(sizes):
        tensors += 1
        own = -(-size // CHUNK)
        for chunk in range(own):
            chunks += 1
            # A tensor that is parted comes again in the next launch.
            full = chunks == CHUNKS or (tensors == TENSORS[lists] and chunk == own - 1)
            last = place == len(sizes) - 1 and chunk == own - 1
            if full or last:
                launches, chunks = launches + 1, 0
                tensors = int(chunk < own - 1)
    return launches


@cache
def _changed(function: Any) -> tuple[int, ...]:
    """Find the positions of the arguments that an operation changes; -1 for one named `out`."""
    return tuple(
        -1 if argument.kwarg_only else place
        for place, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _layout(value: Any) -> Any:
    """Make a key of all that the shapes of an operation's results depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, (list, tuple)):
        return tuple(map(_layout, value))
    return type(value), value  # 1 and 1.0 give other dtypes


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _crosses(name: str, args: tuple, kwargs: dict) -> bool:
    """Tell whether a copy goes from the host to the device or back."""
    if name == "copy_":
        return args[0].is_meta != args[1].is_meta
    device = kwargs.get("device")
    return device is not None and (torch.device(device).type == "meta") != args[0].is_meta


def _moved(
    name: str, args: tuple, changed: tuple[int, ...], inputs: list[Tensor], new: list[Tensor]
) -> tuple[int, int]:
    """Return the bytes that an operation reads and writes."""
    plain = name.removesuffix("_").lstrip("_").removesuffix("_impl")
    sizes = [stored(tensor) for tensor in inputs]
    read, written = sum(sizes), sum(map(stored, new))
    if name.startswith("new_") or name.endswith("_like"):
        return 0, written  # its operand only says what to make
    if plain in READ_AT_INDEX:
        read += written - sizes[0]
    if name in READS:
        read += (READS[name] - 1) * sizes[0]
    if changed and changed != (-1,):
        written += sum(stored(args[place]) for place in changed if isinstance(args[place], Tensor))
    if changed == (-1,):  # `out` is among the inputs, the last of them
        read, written = read - sizes[-1], sizes[-1]
    elif changed and plain in OVERWRITTEN:
        read -= sizes[0]
    # what is not in place first copies the whole operand
    whole = sizes[0] if name in COPY_FIRST else 0
    if plain not in WRITTEN_AT_INDEX:
        return whole + read, whole + written
    return whole + sum(sizes[1:]), whole + _touched(plain, args, inputs)


def _touched(plain: str, args: tuple, inputs: list[Tensor]) -> int:
    """Return the bytes of a tensor's elements that an index names."""
    into = inputs[0]
    if plain.startswith("scatter"):
        return args[2].numel() * into.element_size()
    if plain == "index_put":
        indices = [index for index in args[1] if index is not None]
        named = torch.broadcast_shapes(*(index.shape for index in indices)).numel()
        among = math.prod(into.shape[i] for i, index in enumerate(args[1]) if index is not None)
    else:
        named, among = args[2].numel(), into.shape[args[1]]
    return into.numel() // among * named * into.element_size()


def _of_lists(
    name: str, args: tuple, changed: tuple[int, ...], outputs: list[Tensor]
) -> tuple[int, int, int]:
    """Return launches and bytes read and written of an operation on lists of tensors."""
    lists = [value for value in args if isinstance(value, (list, tuple)) and value]
    lists = [value for value in lists if isinstance(value[0], Tensor)]
    if name.startswith("_fused"):  # gradients are only read; the counters of steps lie beside
        steps, changed = lists.pop(), tuple(place for place in changed if place != 1)
        lists_read = [*lists, steps]
    else:
        lists_read = lists[1:] if name in ("_foreach_copy_", "_foreach_zero_") else lists
    launches = list_launches([tensor.numel() for tensor in lists[0]], len(lists))
    launches += 2 * (name == "_foreach_norm")  # zeros before it, sums of the chunks after it
    read = sum(stored(tensor) for one in lists_read for tensor in one)
    written = sum(stored(tensor) for place in changed for tensor in _tensors((args[place],)))
    return launches, read, written + sum(map(stored, outputs))


def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Attend by CUDA's memory-efficient kernel, where the meta device would multiply matrices."""
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    is_trained = torch.is_grad_enabled() and query.requires_grad
    return kernel(query, key, value, mask, is_trained, dropout_p, False, scale=scale)[0]


def _fused_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, epsilon: float) -> Tensor:
    """Normalise in CUDA's one kernel, where the meta device would take eight operations."""
    return x * (epsilon if weight is None else weight)


def _by_the_host(make: Any) -> Any:
    """Let torch.tensor and as_tensor make numbers on the host and copy them, as for CUDA."""

    def made(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        return make(data, dtype=dtype).to(device)

    return made


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Let torch do for the meta device what it does for CUDA: copies, attention, foreach, norms."""
    with ExitStack() as stack:
        for make in (torch.tensor, torch.as_tensor):
            stack.enter_context(patch(f"torch.{make.__name__}", _by_the_host(make)))
        for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
            for kind in ("foreach", "fused"):
                name = f"{module}._get_{kind}_kernels_supported_devices"
                stack.enter_context(patch(name, lambda: ["cuda", "meta"]))
        name = "engine.attention.scaled_dot_product_attention"
        stack.enter_context(patch(name, _efficient_attention))
        stack.enter_context(patch("engine.token_layers.rms_norm", _fused_norm))
        yield
