"""How a process was started: alone, by torchrun, or by a launcher that would start equal copies."""

from __future__ import annotations

import pytest

from engine.config import UsageError
from engine.launch import Launch

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}


def test_without_torchrun_there_is_one_process():
    assert Launch.of({"PATH": "/bin"}) == Launch(rank=0, size=1, local_rank=0, local_size=1)
    assert Launch.of({}).first


def test_torchruns_variables_are_read(monkeypatch):
    launch = Launch.of(TORCHRUN)
    assert launch == Launch(rank=5, size=8, local_rank=1, local_size=4) and not launch.first
    assert Launch.of(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).first
    assert Launch.of(TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}) == launch  # srun starts torchrun
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert Launch.of() == launch


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("SLURM_STEP_NUM_TASKS", "srun"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun"),
        ("PMI_SIZE", "mpiexec"),
    ],
)
def test_a_launcher_of_equal_copies_is_refused(name, launcher):
    assert Launch.of({name: "1"}).size == 1
    with pytest.raises(UsageError) as told:
        Launch.of({name: "8"})
    (line,) = told.value.problems
    assert line.startswith(f"{launcher} has started 8 processes") and "`torchrun`" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in TORCHRUN for value in (None, "")]
    + [(n, v) for n in TORCHRUN if n != "MASTER_ADDR" for v in ("x", "-1", "1.5", "²")],
)
def test_variables_that_are_not_whole_are_named(name, value):
    found = {n: v for n, v in TORCHRUN.items() if n != name}
    with pytest.raises(UsageError) as told:
        Launch.of(found if value is None else found | {name: value})
    (line,) = told.value.problems
    said = f"{name} is {value or 'not set'}: torchrun sets it; "
    assert line == said + "start with torchrun, or unset RANK and WORLD_SIZE for a single process"


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(UsageError) as told:
        Launch.of({"WORLD_SIZE": "2"})
    assert [line.split()[0] for line in told.value.problems] == [
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "8"},
        {"LOCAL_RANK": "4"},
        {"LOCAL_WORLD_SIZE": "9"},
        {"WORLD_SIZE": "0", "RANK": "0"},
        {"LOCAL_WORLD_SIZE": "0", "LOCAL_RANK": "0"},
    ],
)
def test_a_number_beyond_its_size_is_refused(wrong):
    with pytest.raises(UsageError, match=r"^RANK \d of WORLD_SIZE \d.* a rank is below its size"):
        Launch.of(TORCHRUN | wrong)
