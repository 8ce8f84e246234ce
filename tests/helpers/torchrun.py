"""Start ranks on this machine by torchrun, and see how each of them ended.

    end = torchrun(2, "tests.helpers.rank_programs:exchange", folder)   # a function of a module
    end = torchrun(2, "run_grpo.py", *flags)                            # a script of the project
    end = torchrun(2, "import sys\\nsys.exit(3)\\n")                      # a script's text
    assert end.code == 1 and end.root_cause == (0, 3), end.told()

The ranks are new processes, which import torch and more: about ten CPU seconds each. So one call
should check much. A function gets the arguments as strings, and ends its process by sys.exit or an
exception.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.repository import ROOT

MARK = "TESTS_TORCHRUN"  # in the environment of all processes of one call, by which they are found
_meetings = 0


@dataclass(frozen=True)
class Ended:
    """Hold how the ranks ended.

    code: torchrun's own exit code. out, err: each rank's standard output and error. torchrun: what
    torchrun wrote itself. timed_out: everything was killed after the time limit. left: how many
    processes outlived torchrun, and were killed then.
    """

    code: int
    seconds: float
    out: Sequence[str]
    err: Sequence[str]
    torchrun: str
    timed_out: bool = False
    left: int = 0

    @property
    def root_cause(self) -> tuple[int, int] | None:
        """Read whom torchrun takes for the cause -> (rank, its exit code, -9 after SIGKILL)."""
        found = re.search(
            r"Root Cause.*?rank\s*: (\d+).*?exitcode\s*: (-?\d+)", self.torchrun, re.DOTALL
        )
        return (int(found[1]), int(found[2])) if found else None

    @property
    def tracebacks(self) -> list[int]:
        """List the ranks that show a traceback, each as often as it shows one."""
        start = "Traceback (most recent call last)"
        return [rank for rank, text in enumerate(self.err) for _ in range(text.count(start))]

    def told(self, most: int = 3000) -> str:
        """Write all that was said, for the message of an assert."""
        parts = {"torchrun": self.torchrun}
        for rank, (out, err) in enumerate(zip(self.out, self.err, strict=True)):
            parts |= {f"rank {rank}, stdout": out, f"rank {rank}, stderr": err}
        head = f"torchrun ended with {self.code} after {self.seconds:.1f} s"
        head += f"{', timed out' * self.timed_out}, {self.left} processes left"
        return "\n".join([head, *(f"---- {n}\n{t[-most:]}" for n, t in parts.items() if t)])


def torchrun(
    ranks: int,
    program: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    time_limit: float = 240,
    flags: Sequence[str] = (),
) -> Ended:
    """Let torchrun start so many ranks of a program, on the CPU, and wait for their end.

    program: `module:function`, the path of a script of the project, or the text of a script.
    environment: variables beside this process's. time_limit: seconds, after which all are killed.
    flags: of torchrun itself.

    Nothing outlives the call: what torchrun leaves is counted and killed.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), "--log-dir", str(folder / "logs")]
        command += ["--redirects", "3", *flags, *_program(program, folder)]
        start = time.monotonic()
        with (folder / "torchrun").open("wb") as said:
            process = subprocess.Popen(
                [*command, *map(str, arguments)],
                cwd=ROOT,
                env=os.environ | given | (environment or {}) | {MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
            timed_out = False
            try:
                process.wait(time_limit)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                seconds = time.monotonic() - start
                left = _kill_all(mark)
                process.wait()
        streams = [_streams(folder, rank) for rank in range(ranks)]
        text = (folder / "torchrun").read_text(errors="replace")
    out, err = zip(*streams, strict=True)
    return Ended(process.returncode, seconds, out, err, text, timed_out, 0 if timed_out else left)


def marked(mark: str) -> list[int]:
    """List the processes of one call, wherever in the tree they are: ranks have own sessions."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _kill_all(mark: str) -> int:
    """Kill the processes of one call, also those that they start meanwhile -> how many."""
    killed: set[int] = set()
    while left := marked(mark):
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed.update(left)
        time.sleep(0.05)
    return len(killed)


def _program(program: str, folder: Path) -> list[str]:
    if "\n" in program:
        script = folder / "script.py"
        script.write_text(program, encoding="utf-8")
        return [str(script)]
    if program.endswith(".py"):
        return [str(ROOT / program)]
    return ["-m", "tests.helpers.torchrun", program]


def _streams(folder: Path, rank: int) -> tuple[str, str]:
    """Read what a rank wrote, from the folder that torchrun makes for each call."""
    texts = []
    for stream in ("stdout", "stderr"):
        found = [
            path.read_text(errors="replace")
            for path in folder.glob(f"logs/*/*/{rank}/*.log")
            if path.stem == stream
        ]
        texts.append("".join(found))
    return texts[0], texts[1]


def meet_again() -> None:
    """Let the next Ranks of this process meet under a new name, for one run after another in it.

    torchrun keeps the addresses of the first meeting, and a second one would read those.
    """
    from torch import distributed as dist
    from torch.distributed import distributed_c10d

    global _meetings
    _meetings += 1
    name = f"meeting-{_meetings}"

    def rendezvous(*arguments: Any, **options: Any) -> Iterator[Any]:
        for store, rank, size in dist.rendezvous(*arguments, **options):
            yield dist.PrefixStore(name, store), rank, size

    distributed_c10d.rendezvous = rendezvous


def call(program: str, *arguments: str) -> None:
    """Call a function that is named `module:function` with strings."""
    module, _, function = program.partition(":")
    getattr(importlib.import_module(module), function)(*arguments)


if __name__ == "__main__":
    call(*sys.argv[1:])
