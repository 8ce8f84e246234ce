"""Protect what is said to be free: the strictest of the machine's and the process's limits.

The files are written by hand as Linux writes them.

Run: pytest tests/engine/test_free_memory.py
"""

from __future__ import annotations

import resource

import pytest

from engine.free_memory import Free, free_on_host

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Write /proc and /sys of a machine: 20 GiB available, 3 GiB of swap, no other limit."""
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)

    def write(files: dict[str, str], group: str = "0::/") -> Free | None:
        for name, text in {"proc/self/cgroup": group + "\n", **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return free_on_host(tmp_path)

    write(
        {
            "proc/meminfo": "MemTotal:       25165824 kB\nMemFree:         1048576 kB\n"
            "MemAvailable:   20971520 kB\nSwapTotal: 4194304 kB\nSwapFree: 3145728 kB\n",
            "proc/self/status": "Name:\tpython\nVmSize:\t 5242880 kB\nVmData:\t 1048576 kB\n",
        }
    )
    return write


def test_the_machine_alone(machine):
    assert machine({}) == Free(20 * GIB, 3 * GIB, "the machine's available memory")
    assert machine({}).total == 23 * GIB


def test_nothing_is_known_without_proc(tmp_path, monkeypatch):
    assert free_on_host(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemFree: 1000 kB\n")  # a kernel before 3.14
    assert free_on_host(tmp_path) is None


def test_a_container_of_version_2_and_its_parents(machine):
    group = "sys/fs/cgroup/slurm/job"
    files = {
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": f"{9 * GIB}\n",
        "sys/fs/cgroup/slurm/memory.max": f"{10 * GIB}\n",
        "sys/fs/cgroup/slurm/memory.current": f"{9 * GIB}\n",
        # 4 of the 9 GiB are file pages that can be dropped; shared memory is no such page
        "sys/fs/cgroup/slurm/memory.stat": f"file {6 * GIB}\nshmem {2 * GIB}\n"
        f"inactive_file {3 * GIB}\nactive_file {GIB}\n",
        "sys/fs/cgroup/slurm/memory.swap.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/slurm/memory.swap.current": f"{GIB}\n",
    }
    found = machine(files, "0::/slurm/job")
    assert found == Free(5 * GIB, GIB, "the control group /slurm/job")
    # without swap accounting the machine's 3 GiB of swap stay
    del files["sys/fs/cgroup/slurm/memory.swap.max"]
    assert found.total == 6 * GIB


def test_a_container_of_version_1_whose_folder_is_the_mount(machine):
    mount = "sys/fs/cgroup/memory"
    files = {
        f"{mount}/memory.limit_in_bytes": str(8 * GIB),
        f"{mount}/memory.usage_in_bytes": str(3 * GIB),
        f"{mount}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n"
        "total_active_file 0\n",
    }
    group = "9:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/"
    # 8 - (3 - 1) = 6
    assert machine(files, group) == Free(6 * GIB, 3 * GIB, "the control group /docker/1")
    # memory and swap together: 9 - (3 - 1) = 7 are left, 6 of them memory
    more = {
        f"{mount}/memory.memsw.limit_in_bytes": str(9 * GIB),
        f"{mount}/memory.memsw.usage_in_bytes": str(3 * GIB),
    }
    assert machine(files | more, group) == Free(6 * GIB, GIB, "the control group /docker/1")
    unlimited = {f"{mount}/memory.limit_in_bytes": "9223372036854771712"}
    assert machine(files | unlimited, group).limit == "the machine's available memory"


def test_ulimit(machine, monkeypatch):
    limits = {resource.RLIMIT_AS: 6 * GIB, resource.RLIMIT_DATA: 2 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind],) * 2)
    # 6 - 5 GiB of address space in use, 2 - 1 GiB of data: either leaves 1, and swap helps neither
    assert machine({}) == Free(GIB, 0, "ulimit -v")
    limits[resource.RLIMIT_DATA] = GIB
    assert machine({}) == Free(0, 0, "ulimit -d")


def test_this_machine_has_a_number():
    found = free_on_host()
    assert found is None or 2**20 < found.memory < 2**60
