"""Find how much memory this process may still take: host memory under every limit, and a GPU's.

A process has several limits at once, and the smallest counts: what the machine has available, the
limits of its control groups (containers, SLURM, systemd) and `ulimit -v`. Nothing is known without
Linux's /proc, and then nothing is said.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A control group without a limit says "max" (v2) or a number near 2^63 (v1).
UNLIMITED = 2**60


@dataclass(frozen=True)
class Free:
    """Hold what one limit leaves to this process.

    memory: bytes that can be taken without swapping.
    swap: bytes that can be swapped out beside them.
    limit: what sets it, for a message.
    """

    memory: int
    swap: int
    limit: str

    @property
    def total(self) -> int:
        """Return the bytes beyond which the process is bound to fail."""
        return self.memory + self.swap


def free_memory(device: torch.device) -> Free | None:
    """Read what is free where a model on `device` has its tensors, or None where nothing tells."""
    return free_on_gpu(device) if device.type == "cuda" else free_on_host()


def free_on_gpu(device: torch.device) -> Free:
    """Read what is free on a GPU. Blocks that torch's allocator holds unused are free too."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Free(free + unused, 0, torch.cuda.get_device_name(device))


def free_on_host(root: Path = Path("/")) -> Free | None:
    """Read what is free on the host under its strictest limit, or None without Linux's /proc.

    root: where proc/ and sys/ lie.
    """
    machine = _machine(root)
    if machine is None:
        return None
    limits = [machine, *_control_groups(root, machine.swap), *_address_space(root)]
    strictest = min(limits, key=lambda limit: limit.total)
    memory = min(limit.memory for limit in limits)
    return Free(memory, strictest.total - memory, strictest.limit)


def _machine(root: Path) -> Free | None:
    """Read MemAvailable, which counts caches that the kernel can drop, and the free swap."""
    found = _numbers(root / "proc/meminfo")
    if "MemAvailable" not in found:
        return None
    return Free(
        1024 * found["MemAvailable"],
        1024 * found.get("SwapFree", 0),
        "the machine's available memory",
    )


def _control_groups(root: Path, swap: int) -> Iterator[Free]:
    """Read what every control group of this process leaves, of both versions.

    A container may show its own group as the root of the mount, so missing folders are passed over.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
                prefix = ""
            elif "memory" in controllers.split(","):
                mount = root / "sys/fs/cgroup/memory"
                names, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
            else:
                continue
            inner = Path(path.lstrip("/"))
            for folder in (mount / part for part in (inner, *inner.parents)):
                limit, used = (_number(folder / name) for name in names)
                if limit is None or used is None or limit >= UNLIMITED:
                    continue
                stat = _numbers(folder / "memory.stat")
                # File pages that are no shared memory can be dropped, as MemAvailable counts them.
                cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                free = max(0, limit - max(0, used - cached))
                left = min(swap, _swap_left(folder, free, cached))
                yield Free(free, left, f"the control group {path}")


def _swap_left(folder: Path, free: int, cached: int) -> int:
    """Read how much a control group may still swap out, UNLIMITED where it does not count that.

    free, cached: its memory that is free, and that of file pages. Version 1 counts memory and swap
    together.
    """
    most, used = _number(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
    if most is not None and used is not None:
        return max(0, most - used)
    names = ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes")
    most, used = (_number(folder / name) for name in names)
    if most is not None and used is not None:
        return max(0, most - (used - cached) - free)
    return UNLIMITED


def _address_space(root: Path) -> Iterator[Free]:
    """Read what `ulimit -v` and `ulimit -d` leave."""
    status = _numbers(root / "proc/self/status")
    for kind, field, flag in (
        (resource.RLIMIT_AS, "VmSize", "-v"),
        (resource.RLIMIT_DATA, "VmData", "-d"),
    ):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and field in status:
            yield Free(max(0, limit - 1024 * status[field]), 0, f"ulimit {flag}")


def _numbers(path: Path) -> dict[str, int]:
    """Read a file of lines "name: number" or "name number" -> {name: number}, {} without one."""
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            words = line.replace(":", " ").split()
            if len(words) > 1 and words[1].isdigit():
                found[words[0]] = int(words[1])
    return found


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let the block take so many bytes more than there are, and raise MemoryError beyond them.

    The limit is of the address space, which new threads take a lot of: it is for Python alone, and
    for nothing that computes. Without Linux's /proc there is none.
    """
    pages = _number_of_pages(Path("/proc/self/statm"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = 0 if pages is None else pages * os.sysconf("SC_PAGE_SIZE") + more
    if pages is None or soft != resource.RLIM_INFINITY and soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _number_of_pages(statm: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(statm.read_text().split()[0])
    return None


def _number(path: Path) -> int | None:
    """Read a file that holds one number -> it, UNLIMITED for "max", None where there is none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return UNLIMITED if text == "max" else int(text) if text.isdigit() else None
