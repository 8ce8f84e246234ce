"""What tests/ranks/test_exchange.py lets each of several ranks do: a failed assert ends the rank.

Every rank can work out by itself what the others send.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn

from engine.launch import Launch
from engine.ranks import Ranks
from engine.runtime import PeerError, SignalGuard, StopRequested, main_guard


def exchange(then: str) -> None:
    """Check all that ranks tell each other, and then let rank 1 fail in one way.

    then: "raise" or "kill", see below.
    """
    with SignalGuard() as guard:  # torchrun ends the others by SIGTERM, and they are to tell more
        sys.exit(main_guard(lambda: _checked(then, guard), of_ranks=True))


def _checked(then: str, guard: SignalGuard) -> int:
    with Ranks(Launch.of()) as ranks, ranks.silent_but_first():
        assert (ranks.rank, ranks.size) == (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        _values(ranks)
        _tensors(ranks)
        _of_the_first(ranks)
        _gradients(ranks)
        _ends(ranks)
        _signals(ranks, guard)
        print("shown by the first", flush=True)
        print("shown by the first", file=sys.stderr)
        _tell("checked")
        return {"raise": _raise, "kill": _kill}[then](ranks)


def _tell(line: str) -> None:
    """Write a line for the test, of a rank whose prints go nowhere."""
    os.write(1, f"{line}\n".encode())


# ---- exchange ------------------------------------------------------------------------------------
def _values(ranks: Ranks) -> None:
    every = range(ranks.size)
    assert ranks.gather(ranks.rank) == list(every)
    for length in (0, 1, 7, 4096, 300_001):  # another one on each rank
        texts = ranks.gather("ä" * (length * (ranks.size - ranks.rank)))
        assert texts == ["ä" * (length * (ranks.size - rank)) for rank in every]
    mine = {"float": 0.1 + ranks.rank, "large": 2**70 + ranks.rank, "list": [None, True, "\n\0"]}
    assert ranks.gather(mine) == [
        {"float": 0.1 + rank, "large": 2**70 + rank, "list": [None, True, "\n\0"]} for rank in every
    ]
    odd = ranks.gather([math.nan, -math.inf, -0.0, 5e-324])
    for nan, inf, zero, small in odd:
        assert math.isnan(nan) and inf == -math.inf and small == 5e-324
        assert math.copysign(1, zero) == -1
    others = ranks.gather("x" if ranks.rank else None)
    assert others == [None] + ["x"] * (ranks.size - 1)


def _named(rank: int) -> dict[str, torch.Tensor]:
    """Make tensors of all kinds, that differ from rank to rank."""
    whole = torch.arange(12, dtype=torch.float32).view(3, 4) + rank
    quiet_nans = torch.tensor([0x7FC00000, 0x7FC00000 + 1 + rank], dtype=torch.int32)
    return {
        f"of {rank}": torch.tensor(rank),
        "bf16": torch.full((2, 3), 0.1 + rank, dtype=torch.bfloat16),
        "nan": quiet_nans.view(torch.float32),
        "empty": torch.empty(0, 5),
        "bool": torch.tensor([True, rank % 2 == 0]),
        "transposed": whole.T,
        "half": whole[:, :2],
        "other half": whole[:, 2:],
        "trained": nn.Parameter(torch.full((3,), 1e-40 * (rank + 1))),
        "long": torch.full((1000 * (rank + 1),), 2**60 + rank),
    }


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _tensors(ranks: Ranks) -> None:
    for rank, given in enumerate(ranks.gather_tensors(_named(ranks.rank))):
        expected = _named(rank)
        assert set(given) == set(expected)
        for name, tensor in expected.items():
            assert given[name].dtype == tensor.dtype and given[name].shape == tensor.shape, name
            assert _bits(given[name]) == _bits(tensor), name
    assert ranks.gather_tensors({}) == [{}] * ranks.size
    some = ranks.gather_tensors({"x": torch.ones(2)} if ranks.rank == 1 else {})
    assert [list(one) for one in some] == [["x"] if rank == 1 else [] for rank in range(ranks.size)]


def _of_the_first(ranks: Ranks) -> None:
    value = {"folder": "runs/ä", "steps": [1, 2]}
    assert ranks.from_first(value if ranks.first else object()) == value  # nobody looks at theirs
    calls = []

    def read() -> dict:
        calls.append(1)
        return value

    assert ranks.on_first(read) == value
    assert len(calls) == int(ranks.first)

    def fail() -> None:
        raise FileExistsError("the folder is in use")

    error = _raised(lambda: ranks.on_first(fail))
    if ranks.first:
        assert type(error) is FileExistsError
    else:
        assert type(error) is PeerError
        assert str(error) == "rank 0 failed: FileExistsError: the folder is in use"


# ---- gradients -----------------------------------------------------------------------------------
def _gradients(ranks: Ranks) -> None:
    shapes = [(3, 5), (), (0, 4), (1000,), (2, 2)]

    def drawn(rank: int) -> list[torch.Tensor | None]:
        generator = torch.Generator().manual_seed(rank)
        made = [torch.randn(shape, generator=generator) for shape in shapes]
        # rank 1 had nothing to do, and no rank had anything for the last one
        return [None] * 5 if rank == 1 else [*made[:4], None]

    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter, gradient in zip(parameters, drawn(ranks.rank), strict=True):
        parameter.grad = gradient
    ranks.sum_gradients(parameters)
    summed = {str(i): parameter.grad for i, parameter in enumerate(parameters)}
    of_all = [drawn(rank) for rank in range(ranks.size)]
    for i, shape in enumerate(shapes):
        there = [gradients[i] for gradients in of_all if gradients[i] is not None]
        exact = sum((one.double() for one in there), torch.zeros(shape, dtype=torch.float64))
        assert summed[str(i)].dtype == torch.float32 and summed[str(i)].shape == torch.Size(shape)
        torch.testing.assert_close(summed[str(i)].double(), exact, rtol=1e-6, atol=1e-6)
        if len(there) == 1:  # and zeros
            assert torch.equal(summed[str(i)], there[0])
    assert not summed["4"].any()
    everywhere = [
        {name: _bits(tensor) for name, tensor in one.items()}
        for one in ranks.gather_tensors(summed)
    ]
    assert everywhere == [everywhere[0]] * ranks.size
    whole = nn.Parameter(torch.zeros(4))  # whole numbers: a sum, to the bit, and no mean
    whole.grad = torch.full((4,), float(10**ranks.rank))
    ranks.sum_gradients([whole])
    assert whole.grad.tolist() == [float("1" * ranks.size)] * 4
    for value in (math.nan, math.inf):  # of one rank: all see it, and skip the step
        whole.grad = torch.full((4,), value if ranks.rank == 1 else 1.0)
        ranks.sum_gradients([whole])
        assert not whole.grad.isfinite().any()


# ---- a block's end -------------------------------------------------------------------------------
def _raised(function) -> BaseException | None:
    try:
        function()
    except BaseException as error:
        return error
    return None


@contextlib.contextmanager
def _ended_by(ranks: Ranks, errors: dict[int, BaseException]) -> Iterator[None]:
    with ranks.together():
        yield
        if ranks.rank in errors:
            raise errors[ranks.rank]


def _ends(ranks: Ranks) -> None:
    last = ranks.size - 1

    def ended(*errors: dict[int, BaseException]) -> BaseException | None:
        """Leave blocks in one another, the inner first."""

        def run() -> None:
            with contextlib.ExitStack() as stack:
                for of_one in reversed(errors):
                    stack.enter_context(_ended_by(ranks, of_one))

        return _raised(run)

    assert ended({}) is None and ended({}, {}) is None
    damaged = ValueError("a damaged image")
    error = ended({last: damaged})
    told = f"rank {last} failed: ValueError: a damaged image"
    assert error is damaged if ranks.rank == last else str(error) == told
    error = ended({last: damaged}, {})  # through an outer block too
    assert error is damaged if ranks.rank == last else str(error) == told
    error = ended({}, {last: damaged})
    assert error is damaged if ranks.rank == last else type(error) is PeerError
    both = {0: OSError(28, "No space left on device"), last: damaged}
    error = ended(both)
    assert error is both[0] if ranks.first else "rank 0 failed: OSError: " in str(error)
    assert type(ended({last: StopRequested()})) is StopRequested
    assert type(ended({last: StopRequested()}, {})) is StopRequested
    assert type(ended({last: KeyboardInterrupt()})) is KeyboardInterrupt
    assert type(ended({0: StopRequested(), last: KeyboardInterrupt()})) is KeyboardInterrupt
    assert ranks.gather(ranks.rank) == list(range(ranks.size))  # still in step


def _signals(ranks: Ranks, guard: SignalGuard) -> None:
    assert guard.agree(ranks.gather) is None
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
        while guard.stop is None:
            time.sleep(0.01)
    ranks.gather(None)
    assert guard.agree(ranks.gather) == signal.SIGUSR1 == guard.agreed
    assert guard.exit_code == 128 + signal.SIGUSR1
    assert (guard.stop is None) == (ranks.rank != 1)  # the signal was rank 1's alone


# ---- a fault -------------------------------------------------------------------------------------
def _raise(ranks: Ranks) -> int:
    """Let rank 1 fail while the others wait at the end of the block."""
    with ranks.together():
        if ranks.rank == 1:
            time.sleep(1)
            raise LookupError("rank 1 has lost\nits image")
    raise AssertionError("the block ended well")


def _kill(ranks: Ranks) -> int:
    """Kill rank 1 while the others wait at the end of the block, and see how soon they end."""
    if ranks.rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        with ranks.together():
            pass
    except PeerError as error:
        parameter = nn.Parameter(torch.zeros(4))
        after = [
            lambda: ranks.gather(1),
            lambda: ranks.on_first(lambda: 1),
            lambda: ranks.sum_gradients([parameter]),
        ]
        told = {
            "told": str(error),
            "seconds": time.monotonic() - start,
            # what comes later ends as well
            "then": [type(_raised(function)).__name__ for function in after],
        }
        _tell(json.dumps(told))
        raise
    raise AssertionError("the block ended well")
