"""Ranks without processes: shares, the only rank, and what all raise when one does.

tests/ranks/test_exchange.py has real ones.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine.config import UsageError
from engine.launch import Launch
from engine.ranks import Ranks
from engine.runtime import PeerError, StopRequested


class Meeting:
    """Where the threads of one test exchange their messages."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=20)
        self.messages: list[bytes] = [b""] * size
        self.exchanges = 0

    def exchange(self, rank: int, data: bytes) -> list[bytes]:
        try:
            self.messages[rank] = data
            self.barrier.wait()
            said = list(self.messages)
            if self.barrier.wait() == 0:
                self.exchanges += 1
        except threading.BrokenBarrierError:
            raise PeerError("a rank has ended") from None
        return said


class Thread(Ranks):
    """One of several ranks that are threads: gloo's exchange alone is another one."""

    def __init__(self, rank: int, meeting: Meeting):
        super().__init__()
        self.rank, self.size, self.first = rank, len(meeting.messages), rank == 0
        self.meeting = meeting

    def _exchange(self, data: bytes) -> list[bytes]:
        return self.meeting.exchange(self.rank, data)


def raised_by_each(size: int, run: Callable[[Ranks], None]) -> list[BaseException | None]:
    """Let threads run a function, each as a rank -> what each raises. At the end they are in step.

    A rank that fails outside of all blocks ends, and the others' next exchange breaks.
    """
    meeting = Meeting(size)
    raised: list[BaseException | None] = [None] * size
    in_step = [False] * size

    def one(rank: int) -> None:
        ranks = Thread(rank, meeting)
        try:
            run(ranks)
        except BaseException as error:
            raised[rank] = error
        in_step[rank] = ranks.gather(["end", rank]) == [["end", other] for other in range(size)]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(in_step), raised
    return raised


def of_a_block(*errors: BaseException | None) -> list[BaseException | None]:
    """Let ranks leave a block, each with its error -> what each raises."""

    def run(ranks: Ranks) -> None:
        with ranks.together():
            error = errors[ranks.rank]
            if error is not None:
                raise error

    return raised_by_each(len(errors), run)


# ---- shares --------------------------------------------------------------------------------------
@given(st.integers(0, 300), st.integers(1, 8))
def test_shares_are_all_in_order_and_differ_by_one_at_most(count, size):
    shares = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        shares.append(ranks.share(count))
    assert [thing for share in shares for thing in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(0, 60), st.integers(1, 8), st.integers(1, 5))
def test_shares_of_micro_batches_part_none(count, size, together):
    found = []
    for rank in range(size):
        ranks = Ranks()
        ranks.rank, ranks.size = rank, size
        share = ranks.share(count, together)
        assert share.start % together == 0 or not share
        found += list(share)
    assert found == list(range(count))


def test_five_rows_in_micro_batches_of_two_are_one_and_two_micro_batches():
    ranks = Ranks()
    ranks.size = 2
    assert ranks.share(5, 2) == range(0, 2)  # of micro-batches [0 1] [2 3] [4]
    ranks.rank = 1
    assert ranks.share(5, 2) == range(2, 5)


# ---- the only rank -------------------------------------------------------------------------------
def test_the_only_rank_initialises_nothing_and_copies_nothing():
    with Ranks() as ranks, Ranks(Launch()) as same:
        assert (ranks.rank, ranks.size, ranks.first, ranks.local_rank) == (0, 1, True, 0)
        assert not dist.is_initialized() and same.size == 1
        value, tensors = {"a": (1, 2), 3: object()}, {"x": torch.ones(2)}
        assert ranks.gather(value)[0] is value and len(ranks.gather(value)) == 1
        (gathered,) = ranks.gather_tensors(tensors)
        assert gathered["x"] is tensors["x"]
        assert ranks.from_first(value) is value and ranks.on_first(lambda: value) is value
        assert ranks.share(7) == range(7)
        parameter = nn.Parameter(torch.zeros(2))
        for gradient in (None, torch.ones(2)):
            parameter.grad = gradient
            ranks.sum_gradients([parameter])
            assert parameter.grad is gradient
        with ranks.silent_but_first():
            assert sys.stdout is not None and sys.stdout.name != "/dev/null"
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    "error", [ValueError("x"), StopRequested(), KeyboardInterrupt(), SystemExit(143), PeerError()]
)
def test_the_only_rank_raises_the_exception_itself(error):
    with pytest.raises(type(error)) as raised, Ranks().together():
        raise error
    assert raised.value is error and error.__cause__ is error.__context__ is None


# ---- one raises, all raise -----------------------------------------------------------------------
def test_a_block_that_ends_well_raises_nothing():
    assert of_a_block(None, None, None) == [None, None, None]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_one_rank_raises_the_others_are_told(failing):
    error = ValueError(f"image {failing}\n is  damaged")
    errors: list[BaseException | None] = [None] * 3
    errors[failing] = error
    for rank, raised in enumerate(of_a_block(*errors)):
        if rank == failing:
            assert raised is error and error.__cause__ is error.__context__ is None
        else:
            assert type(raised) is PeerError and "\n" not in str(raised)
            assert str(raised) == f"rank {failing} failed: ValueError: image {failing} is damaged"


def test_of_several_failures_the_lowest_ranks_is_shown():
    one, two = ValueError("one"), OSError("two")
    first, second, third = of_a_block(StopRequested(), one, two)
    assert second is one
    assert str(first) == str(third) == "rank 1 failed: ValueError: one"
    assert third.__cause__ is two


def test_a_stop_of_one_rank_stops_all():
    stopped = StopRequested()
    first, second, third = of_a_block(None, stopped, None)
    assert second is stopped and type(first) is type(third) is StopRequested


def test_a_second_ctrl_c_ends_all_at_once():
    interrupt = KeyboardInterrupt()
    first, second, third = of_a_block(StopRequested(), None, interrupt)
    assert third is interrupt and type(first) is type(second) is KeyboardInterrupt


def test_an_error_crosses_all_blocks_around_it():
    own = ValueError("one")

    def run(ranks: Ranks) -> None:
        with ranks.together(), ranks.together():
            if ranks.rank == 1:
                raise own

    first, second, third = raised_by_each(3, run)
    assert second is own and str(first) == str(third) == "rank 1 failed: ValueError: one"


@pytest.mark.parametrize("own", [ValueError("own"), StopRequested(), KeyboardInterrupt()])
def test_who_waits_for_a_value_is_told_there(own):
    """Rank 1 leaves an outer block, 0 waits for a value in the inner one, 2 is at its end."""
    reached = []

    def run(ranks: Ranks) -> None:
        with ranks.together():
            if ranks.rank == 1:
                raise own
            with ranks.together():
                if ranks.rank == 0:
                    ranks.gather("a value")
            reached.append(ranks.rank)

    first, second, third = raised_by_each(3, run)
    assert second is own and not reached
    kind = PeerError if type(own) is ValueError else type(own)
    assert type(first) is type(third) is kind


def test_ranks_that_are_out_of_step_fail():
    def run(ranks: Ranks) -> None:
        with ranks.together():
            if ranks.rank == 1:
                ranks.gather("a value")  # which the others do not ask for

    assert [type(error) for error in raised_by_each(3, run)] == [RuntimeError] * 3


PROGRAMS = st.recursive(
    st.just("gather"), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=6
)
FAULTS = st.dictionaries(
    st.integers(0, 2),  # a rank
    st.tuples(
        st.integers(0, 9),  # after so many lines of its program
        st.sampled_from([ValueError, StopRequested, KeyboardInterrupt]),
    ),
    max_size=2,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PROGRAMS, min_size=1, max_size=3), FAULTS)
def test_wherever_ranks_fail_all_leave_in_step(program, faults):
    """Blocks in one another, with exchanges in them. Ranks fail anywhere, two of them perhaps.

    What happens later of two faults need not happen. All leave the outermost block together.
    """

    def run(ranks: Ranks) -> None:
        lines = 0

        def do(part) -> None:
            nonlocal lines
            if ranks.rank in faults and lines == faults[ranks.rank][0]:
                raise faults[ranks.rank][1](f"of {ranks.rank}")
            lines += 1
            if part == "gather":
                assert ranks.gather([ranks.rank, lines]) == [[rank, lines] for rank in range(3)]
                return
            with ranks.together():
                for inner in part:
                    do(inner)

        with ranks.together():
            for part in program:
                do(part)

    raised = raised_by_each(3, run)
    own = {rank for rank, error in enumerate(raised) if str(error) == f"of {rank}"}
    kinds = {faults[rank][1] for rank in own}
    if not own:
        assert raised == [None] * 3
    elif ValueError in kinds:
        (failed,) = [rank for rank in own if type(raised[rank]) is ValueError]
        others = [raised[rank] for rank in range(3) if rank != failed]
        assert [str(error) for error in others] == [
            f"rank {failed} failed: ValueError: of {failed}"
        ] * 2
    else:
        assert len({type(error) for error in raised}) == 1


# ---- a GPU each ----------------------------------------------------------------------------------
def test_fewer_gpus_than_ranks_is_one_line(monkeypatch):
    def not_reached(*arguments, **options):
        raise AssertionError("the ranks met")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", not_reached)
    monkeypatch.setattr(dist, "init_process_group", not_reached)
    with pytest.raises(UsageError, match=r"^4 processes on a node with 2 GPUs: .*_per_node 2$"):
        Ranks(Launch(rank=4, size=8, local_rank=0, local_size=4))
    with pytest.raises(PeerError):  # which nobody shows
        Ranks(Launch(rank=5, size=8, local_rank=1, local_size=4))
