"""Let the ranks of a test be threads of its process: they exchange bytes through a list.

ends = in_threads(3, lambda ranks: ranks.gather(ranks.rank))
assert ends == [[0, 1, 2]] * 3
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from engine.launch import Launch
from engine.ranks import Ranks
from engine.runtime import PeerError

TIME_LIMIT = 60  # seconds that a rank waits for the others


class _Board:
    """Hold what the ranks have said, by round and rank, and which of them have ended."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.rounds: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self.ended: set[int] = set()


class ThreadRanks(Ranks):
    """One of several ranks of a process. All but the exchange of bytes is that of real ones."""

    def __init__(self, rank: int, size: int, board: _Board):
        super().__init__(Launch())
        self.rank, self.size, self.first = rank, size, rank == 0
        self.local_rank, self.local_size = rank, size
        self.board, self.round = board, 0

    def close(self) -> None:
        """Let nothing go: no process group was made."""

    def _exchange(self, data: bytes) -> list[bytes]:
        board, self.round = self.board, self.round + 1
        with board.changed:
            said = board.rounds[self.round]
            said[self.rank] = data
            board.changed.notify_all()
            board.changed.wait_for(
                lambda: len(said) == self.size or board.ended - set(said), TIME_LIMIT
            )
            if len(said) < self.size:
                raise PeerError("a rank has ended")
            return [said[rank] for rank in range(self.size)]


def in_threads(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Call a function on so many ranks -> what each returned, or the exception that it raised."""
    board = _Board()
    ends: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            ends[rank] = work(ThreadRanks(rank, size, board))
        except BaseException as error:
            ends[rank] = error
        with board.changed:
            board.ended.add(rank)
            board.changed.notify_all()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends
