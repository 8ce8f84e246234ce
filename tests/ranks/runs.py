"""Run the scripts on several ranks, with faults on one of them, for tests/ranks/test_runs.py.

A job is {"name", "script": "sft" or "grpo", "argv", "rank", "fault", "mutant"}: a fault is the name
of one below, and the rank is where it happens. A mutant's windows and monitors keep what they saw
in a step that is broken off.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pkgutil
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import rl.reward_choice
import run_grpo
import run_sft
from engine.undo import Before
from rl.rewards import NuancedReward
from tests.faults.acts import Act, Point, fails, kill, raises, sends
from tests.faults.inject import at_calls
from tests.helpers.repository import ROOT
from tests.helpers.runs import speak
from tests.helpers.torchrun import meet_again

MAIN = {"sft": run_sft.main, "grpo": run_grpo.main}


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Let random models write answers, and let a window decide rewards that is soon full."""
    with pytest.MonkeyPatch.context() as patch:
        speak(patch)
        small = partial(NuancedReward, window=6, min_window=2, dominance=0.4)
        patch.setattr(rl.reward_choice, "NuancedReward", small)
        yield


# ---- faults --------------------------------------------------------------------------------------
@contextlib.contextmanager
def _at_call(name: str, number: int, act: Callable[..., Any]) -> Iterator[None]:
    """Call act(function, *arguments) in the place of the n-th call of a function."""
    owner, _, last = name.rpartition(".")
    function, calls = pkgutil.resolve_name(name), []

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        do = partial(function, **options)
        return act(do, *arguments) if len(calls) == number else do(*arguments)

    with mock.patch.object(pkgutil.resolve_name(owner), last, called):
        yield


def _damage(encode: Callable, policy: Any, example: Any) -> Any:
    """Damage the image of the example that is to be encoded."""
    (example.image_root / example.image).write_bytes(b"damaged")
    return encode(policy, example)


def _drift(step: Callable, optimizer: Any, *more: Any) -> None:
    """Let this rank's adapter differ in a bit, as a faulty device would."""
    step(optimizer, *more)
    weight = optimizer.param_groups[0]["params"][0].data.view(-1)
    weight[0] = torch.nextafter(weight[0], weight[0] + 1)


def _told(act: Act) -> Act:
    """Say when a fault happens, in the seconds of `time.time`."""

    def told(point: Point) -> Any:
        os.write(1, f"fault at {time.time()}\n".encode())
        return act(point)

    return told


ON_PURPOSE = RuntimeError("on purpose")
# A step of a rank is two micro-batches, a rollout is two steps: calls 5 and 6 are the first update
# of the second rollout, 7 and 8 the next one.
# Rank 1 encodes 6 of 13 images for the first evaluation and 4 for each rollout.
SECOND = 6 + 4 + 1
FAULTS: dict[str, Callable[[], AbstractContextManager]] = {
    "none": contextlib.nullcontext,
    "first update": lambda: at_calls("run_grpo.grpo_loss", 5, raises(ON_PURPOSE)),
    "later update": lambda: at_calls("run_grpo.grpo_loss", 8, raises(ON_PURPOSE)),
    "exception": lambda: at_calls("rl.objective.grpo_loss", 7, _told(raises(ON_PURPOSE))),
    "kill": lambda: at_calls("rl.objective.grpo_loss", 7, _told(kill)),
    "SIGTERM": lambda: at_calls("rl.objective.grpo_loss", 7, _told(sends(signal.SIGTERM))),
    "full disk": lambda: at_calls(
        "engine.tracking.RunLogger.append_jsonl", 2, _told(fails(errno.ENOSPC)), times=None
    ),
    "image": lambda: _at_call("engine.policy.Policy.encode", SECOND, _damage),
    "full disk of features": lambda: at_calls(
        "engine.policy.Policy.encode", SECOND, fails(errno.ENOSPC)
    ),
    "drift": lambda: _at_call("run_grpo.whole_step", 3, _drift),
}


@contextlib.contextmanager
def prepared(job: dict) -> Iterator[None]:
    mine = int(os.environ.get("RANK", "0")) == job["rank"]
    with (
        readable(),
        FAULTS[job["fault"] if mine else "none"](),
        pytest.MonkeyPatch.context() as patch,
    ):
        if job["mutant"]:  # on all ranks
            patch.setattr(Before, "put_back", lambda *arguments: None)
        yield


# ---- in one process after another, and as a user runs it -----------------------------------------
def several(path: str) -> None:
    """Run jobs, one after the other, and print how each ended: its exit code or its exception.

    path: of a JSON file with the list of jobs.
    """
    for job in json.loads(Path(path).read_text()):
        meet_again()
        ended: object
        with prepared(job):
            try:
                ended = MAIN[job["script"]](job["argv"])
            except (Exception, KeyboardInterrupt) as error:
                ended = f"{type(error).__name__}: {error}"
        os.write(1, f"{json.dumps({'ended': ended, 'job': job['name']})}\n".encode())


def as_script(path: str) -> None:
    """Run one job as the script itself, to the exit of the process. path: of a JSON file."""
    job = json.loads(Path(path).read_text())
    script = f"run_{job['script']}.py"
    sys.argv = [script, *job["argv"]]
    with prepared(job):
        runpy.run_path(str(ROOT / script), run_name="__main__")
