"""Do a piece of work again with less at once where memory runs out, and keep the smaller size.

    limits = Limits(config)
    limits.each("update", rows, backward, undo)     forward and backward, micro-batch by micro-batch
    limits.decoded("rollout", SAMPLING, count, ...) completions that are decoded together
    limits.once_more("vision tower", work)          nothing to halve: the allocator's cache is freed

A piece of work that fails is undone by its caller: gradients, metrics and the random state of forks
are as they were before it. Everything that it held is let go before it is done again. Sums run over
the whole optimizer step, so that a cut changes its gradient by rounding only.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar
from weakref import WeakSet

import torch

from engine.runtime import DoesNotFit, StopRequested

Result = TypeVar("Result")


class Holder(Protocol):
    """Describe what holds memory beside the work's own variables, as engine/graphs.py does.

    release() lets go of it, and returns whether there was any that will not be held again.
    """

    def release(self) -> bool: ...


HOLDERS: WeakSet[Holder] = WeakSet()  # of this process
Undo = Sequence[Callable[[], object]]

# the settings that are halved
TOKENS = "max_tokens_per_forward"
SAMPLING = "sampling_batch_size"
EVALUATION = "per_device_eval_batch_size"

# What torch says in a plain RuntimeError, of a CPU, of oneDNN, which cannot say more, and of CUDA's
# libraries.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "could not create a primitive",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",  # cuDNN 9 and later
    "HOST_ALLOCATION_FAILED",
)


class MicroBatches(Protocol):
    """Describe rows that are run in micro-batches, as `engine.collate.Rows` holds them."""

    def micro_batches(self, max_tokens: int | None) -> list[list[int]]: ...
    def tokens(self, indices: Sequence[int]) -> int: ...


@dataclass(frozen=True)
class Cut:
    """Say what was halved, and why.

    phase: of the run, such as "update". setting: its name. before, after: its values, before None
    where nothing bounded it. reason: what torch said.
    """

    phase: str
    setting: str
    before: int | None
    after: int
    reason: str

    def line(self) -> str:
        """Write the cut as one line for a console or a log."""
        before = "none" if self.before is None else self.before
        return (
            f"out of memory in {self.phase} ({self.reason}): done again with --{self.setting}"
            f" {self.after} (was {before}), which stays"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def let_go(error: BaseException) -> None:
    """Empty the frames that an exception holds, and those of the exceptions that it came from.

    A frame's variables hold the graph of a failed forward, and so all memory that ran out.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        waiting += [one.__cause__, one.__context__]
        if one.__traceback__ is not None:
            traceback.clear_frames(one.__traceback__)
        one.__traceback__ = one.__cause__ = one.__context__ = None


def free_memory() -> bool:
    """Give back what HOLDERS hold, what nothing holds any more, and the allocator's cache.

    Returns whether anything was held that will not be again.
    """
    released = [holder.release() for holder in list(HOLDERS)]
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return any(released)


def said_by(error: BaseException) -> str:
    """Shorten what an exception says of memory to one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    found = text.find("ried to allocate")
    if found >= 0:
        return "t" + text[found:].split(". ")[0]
    return text if len(text) <= 80 else f"{text[:80]}..."


class Limits:
    """Hold how much is run at once, and halve it where memory runs out.

    values: by the settings' names, those that the config has.
    halved: the settings that memory has cut in this process. smallest: {setting: the smallest value
    to which memory has cut it on any rank}, as far as told (`tell_cuts`).
    alone: whether forwards and backwards of this process are no other's business. Where the base is
        sharded among ranks, all run them together, and none can do them again.
    report: called with every cut. advise(phase): which setting to lower, with a number.
    """

    def __init__(self, config: object = None):
        """Begin with the values of the settings."""
        names = (TOKENS, SAMPLING, EVALUATION)
        self.values: dict[str, int | None] = {name: getattr(config, name, None) for name in names}
        self.halved: set[str] = set()
        self.alone = True
        self.report: Callable[[Cut], object] = lambda cut: print(
            f"warning: {cut.line()}", file=sys.stderr
        )
        self.advise: Callable[[str], str] = lambda phase: ""
        self.smallest: dict[str, int] = {}
        self._to_tell: list[Cut] = []  # cuts that other ranks do not know of

    @property
    def max_tokens(self) -> int | None:
        """Return how many tokens a forward of training or scoring has at most, None for any."""
        return self.values[TOKENS]

    def each(
        self,
        phase: str,
        rows: MicroBatches,
        work: Callable[[list[int]], Result],
        undo: Undo = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> tuple[list[list[int]], list[Result]]:
        """Do the work of every micro-batch -> (their rows, what the work returned for each).

        Where memory runs out, all of them are done again, none larger than half of the one that
        failed, down to a row at a time.

        work: called with a micro-batch's indices. What it makes must be its own, so that it goes
        with it. undo: put back what the failed work has changed. should_stop(): asked before every
        micro-batch.

        Raises DoesNotFit where a single row is too large, or ranks run it together (`alone`).
        Raises StopRequested once should_stop says so.
        """
        at: list[int] = []  # the micro-batch that is run

        def attempt() -> tuple[list[list[int]], list[Result]]:
            micro_batches, results = rows.micro_batches(self.max_tokens), []
            for indices in micro_batches:
                if should_stop():
                    raise StopRequested
                at[:] = indices
                results.append(work(indices))
            return micro_batches, results

        def smaller() -> int | None:
            return rows.tokens(at) // 2 if len(at) > 1 else None

        return self._again(phase, attempt, TOKENS, smaller, undo)

    def decoded(
        self,
        phase: str,
        setting: str,
        together: int | None,
        left: Callable[[], int],
        work: Callable[[int | None], Result],
        *,
        group: int = 1,
    ) -> Result:
        """Decode completions -> what the work returned.

        setting: SAMPLING or EVALUATION. together: its value before memory cut it, None for any
        number. left(): counts the completions that are still to be decoded. work: called with the
        most that may be decoded together. group: completions that only memory parts.

        Raises DoesNotFit where a single one is too large.
        """

        def most() -> int | None:
            return self.values[setting] if setting in self.halved else together

        def smaller() -> int | None:
            rows, bound = left(), most()
            if bound is not None:
                rows = min(rows, bound if setting in self.halved else max(bound, group))
            return rows // 2 or None

        return self._again(phase, lambda: work(most()), setting, smaller, ())

    def once_more(self, phase: str, work: Callable[[], Result], undo: Undo = ()) -> Result:
        """Do work of which nothing can be halved, and once more with the allocator's cache freed.

        Raises DoesNotFit where that is not enough.
        """
        return self._again(phase, work, "", lambda: None, undo)

    def _again(
        self,
        phase: str,
        work: Callable[[], Result],
        setting: str,
        smaller: Callable[[], int | None],
        undo: Undo,
    ) -> Result:
        """Do the work until it fits. smaller(): the setting's next value, None where there is none.

        What is held for speed alone is given up before anything is halved.
        Where nothing is left to halve, it is tried once more: other work may have left the
        allocator's cache in pieces.
        """
        tried = False
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = said_by(error)
                let_go(error)
            # outside of the block: inside, the exception itself is held
            after = None if free_memory() else smaller()
            if setting == TOKENS and not self.alone:
                raise DoesNotFit(
                    f"out of memory in {phase} ({reason}): with --shard_base all ranks run a"
                    " forward together, and none can do it again in smaller micro-batches. Go on"
                    " from the last checkpoint "
                    + (f"with --{TOKENS} {after}" if after else "with more ranks on a node")
                )
            if after is None and tried:
                advice = self.advise(phase)
                raise DoesNotFit(
                    f"out of memory in {phase} ({reason}), with nothing left to cut"
                    + (f": {advice}" if advice else "")
                )
            if after is None:
                tried = True
            else:
                self._cut(Cut(phase, setting, self.values[setting], after, reason))
            for put_back in undo:
                put_back()

    def _cut(self, cut: Cut) -> None:
        self.values[cut.setting] = cut.after
        self.halved.add(cut.setting)
        self._to_tell.append(cut)
        self._note(cut)

    def tell_cuts(self, gather: Callable[[list[dict]], list[list[dict]]], rank: int) -> None:
        """Report on every rank what memory has cut on the others since the last call.

        The smaller value stays that of the rank whose memory ran out.

        gather: gives every rank's value to all, in the ranks' order. rank: this one.
        """
        cuts, self._to_tell = [asdict(cut) for cut in self._to_tell], []
        for other, of_rank in enumerate(gather(cuts)):
            for cut in of_rank if other != rank else ():
                self._note(Cut(**cut))

    def _note(self, cut: Cut) -> None:
        smallest = self.smallest.get(cut.setting, cut.after)
        self.smallest[cut.setting] = min(smallest, cut.after)
        self.report(cut)
