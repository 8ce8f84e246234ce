"""The harness of several ranks tells how each of them ended, and leaves no process."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.torchrun import torchrun

FAILS = """
import os, subprocess, sys, time
rank = int(os.environ["RANK"])
print("rank", rank, "of", os.environ["WORLD_SIZE"], *sys.argv[1:])
print("GPUs:", os.environ["CUDA_VISIBLE_DEVICES"], os.environ["EXTRA"], file=sys.stderr)
sys.stdout.flush()
if rank == 1:
    time.sleep(0.5)
    sys.exit(3)
subprocess.Popen(["sleep", "60"], start_new_session=True)
time.sleep(60)
"""
HANGS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def alive(process: int) -> bool:
    """Tell whether a process still runs. One that has ended and waits for its parent does not."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


def test_the_end_of_each_rank_is_told():
    end = torchrun(2, FAILS, "a", 7, environment={"EXTRA": "here"}, time_limit=60)
    assert end.code == 1 and end.root_cause == (1, 3) and not end.timed_out, end.told()
    assert list(end.out) == ["rank 0 of 2 a 7\n", "rank 1 of 2 a 7\n"]
    assert list(end.err) == ["GPUs:  here\n"] * 2 and end.tracebacks == []
    assert end.left == 1  # the sleep
    assert end.seconds < 50


def test_ranks_that_hang_are_killed_at_the_time_limit():
    end = torchrun(2, HANGS, time_limit=20)  # both have long begun then, on a busy machine too
    assert end.timed_out and end.root_cause is None and end.code == -9
    assert not any(alive(int(text)) for text in end.out)
