"""Protects the batch file for Slurm in engine/README.md: a job that comes to its limit sends TERM
to its ranks through torchrun, waits until they have saved, and queues itself again; one that ends
by itself does not. Slurm's own commands are stand-ins here.

Run: pytest tests/ranks/test_slurm.py
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.launch import Launch, UsageError
from tests.helpers.repository import ROOT

README = (ROOT / "engine/README.md").read_text(encoding="utf-8")
# A rank that saves half a second after it was told to stop, or ends by itself.
RANK = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
told = []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
(folder / f"began-{rank}").touch()
while not told and not (folder / "end").exists():
    time.sleep(0.05)
if told:
    time.sleep(0.5)
    (folder / f"saved-{rank}").touch()
    sys.exit(143)
"""
COMMANDS = {
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "$@"',
    "srun": 'echo $$ > "$FOLDER/step"; exec "$@"',  # a single node: the step is torchrun itself
    "scancel": '[ "$*" = "--signal=TERM 77" ] && kill -TERM "$(cat "$FOLDER/step")"',
    "scontrol": 'case $1 in show) echo localhost;; *) echo "$@" > "$FOLDER/requeued";; esac',
}


def batch_file() -> str:
    return re.search(r"^```bash\n(#!/bin/bash\n.*?)^```", README, re.MULTILINE | re.DOTALL)[1]


def submit(folder: Path) -> subprocess.Popen:
    """Run the batch file on two CPU ranks of one node, with a small program for the script."""
    bin = folder / "bin"
    bin.mkdir()
    for name, text in COMMANDS.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    (folder / "rank.py").write_text(RANK)
    port = 20_000 + os.getpid() % 20_000
    text, count = re.subn(r"run_grpo\.py .*? &", f"{folder}/rank.py {folder} &", batch_file())
    assert count == 1
    text = text.replace("--nproc_per_node 8", "--nproc_per_node 2").replace(":29500", f":{port}")
    (folder / "batch.sh").write_text(text)
    environment = os.environ | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "FOLDER": str(folder),
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "CUDA_VISIBLE_DEVICES": "",
    }
    job = subprocess.Popen(["bash", str(folder / "batch.sh")], env=environment, cwd=folder)
    wait_for(folder, "began-0", "began-1")
    return job


def wait_for(folder: Path, *names: str) -> None:
    limit = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < limit, names
        time.sleep(0.1)


def test_a_job_at_its_limit_saves_and_is_queued_again(tmp_path):
    job = submit(tmp_path)
    try:
        job.send_signal(signal.SIGUSR1)  # as Slurm does, to the shell alone
        job.wait(60)
    finally:
        job.kill()
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


def test_a_job_that_ends_is_not_queued_again(tmp_path):
    job = submit(tmp_path)
    try:
        (tmp_path / "end").touch()
        assert job.wait(60) == 0
    finally:
        job.kill()
    assert not (tmp_path / "requeued").exists() and not (tmp_path / "saved-0").exists()


def test_it_has_ten_lines_and_the_refusal_of_srun_names_its_section():
    assert len(batch_file().splitlines()) == 10
    with pytest.raises(UsageError) as error:
        Launch.of({"SLURM_STEP_NUM_TASKS": "8"})
    title = re.search(r"engine/README\.md, '(.*)'\)", str(error.value))
    assert title and f"\n## {title[1]}\n" in README
