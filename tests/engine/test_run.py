"""Protect the books of a run and what they must not hold.

Checked: when it evaluates, saves, logs and ends, what a step that fails leaves, and that every line
that trains stands in the scripts alone.

Run: pytest tests/engine/test_run.py
"""

from __future__ import annotations

import ast
import contextlib
import errno
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import run_sft
from data.files import DataError
from engine.ranks import Ranks
from engine.run import Run, RunFolder, Schedule, TrainerState
from engine.runtime import SignalGuard, StepFailed, StopRequested
from engine.tracking import RunLogger
from tests.helpers.books import held_by
from tests.helpers.repository import ROOT
from tests.helpers.runs import lines, sft
from tests.helpers.threads import in_threads

SCRIPTS = ("run_sft.py", "run_grpo.py")


# ---- what a run may not be -----------------------------------------------------------------------
def test_a_real_run_holds_no_model_and_no_optimizer(
    tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    runs: list[Run] = []
    train = run_sft.train
    monkeypatch.setattr(
        run_sft, "train", lambda run, *others: runs.append(run) or train(run, *others)
    )
    assert sft(tiny_checkpoint("qwen2_5_vl"), tiny_data, tmp_path / "run", "--max_steps", "1") == 0
    (run,) = runs
    assert run.step == 1 and type(run) is Run
    assert held_by(run) == []


def test_a_model_or_an_optimizer_in_a_run_is_found(run_of):
    """Protects the test above: the search finds what it looks for, at each depth it has."""
    run, model = run_of(), torch.nn.Linear(1, 1)
    assert held_by(run) == []
    run.own = model
    run.stateful["part"] = torch.optim.SGD(model.parameters())
    run.state.log_history = [model.weight]
    assert sorted(held_by(run)) == ["own", "state.log_history", "stateful"]


TRAINS = {"backward", "clip_gradients", "optimizer.step", "whole_step", "zero_grad"}


def calls(path: Path) -> set[str]:
    """Name what a file calls of all that trains: `optimizer.step` with its object, else the last
    name.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute):
            owner = node.func.value
            found.add(node.func.attr)
            if isinstance(owner, ast.Name | ast.Attribute):
                name = owner.id if isinstance(owner, ast.Name) else owner.attr
                found.add(f"{name}.{node.func.attr}")
        elif isinstance(node.func, ast.Name):
            found.add(node.func.id)
    return found & TRAINS


def test_what_trains_stands_in_the_scripts_alone():
    files = [*SCRIPTS, *(f"{path.relative_to(ROOT)}" for path in product_files())]
    found = {name: calls(ROOT / name) for name in files}
    # it made the demo's base model, once, and no run imports it
    assert found.pop("data/demo/build_base.py") >= {"backward", "optimizer.step"}
    assert found.pop("engine/optim.py") == {"optimizer.step"}  # in `whole_step`
    assert found.pop("engine/shard.py") == {"backward"}  # of weight 0, beside that of another rank
    everything = TRAINS - {"optimizer.step"}
    assert {name: words for name, words in found.items() if words} == dict.fromkeys(
        SCRIPTS, everything
    )
    assert len(found) > 60


def product_files() -> Iterator[Path]:
    for package in ("data", "engine", "eval", "rl"):
        yield from sorted((ROOT / package).rglob("*.py"))


def loop_of(script: str) -> ast.FunctionDef:
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    (found,) = (
        one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == "train"
    )
    return found


def complexity(function: ast.AST) -> int:
    """Count the ways through a function: 1, and 1 for each branch, loop, condition and handler."""
    found = 1
    for node in ast.walk(function):
        if isinstance(
            node, ast.If | ast.IfExp | ast.For | ast.While | ast.ExceptHandler | ast.Assert
        ):
            found += 1
        elif isinstance(node, ast.comprehension):
            found += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            found += len(node.values) - 1
        elif isinstance(node, ast.Match):
            found += len(node.cases)
    return found


def test_complexity_by_hand():
    source = """
def f(rows):
    assert rows                                                    # 1 more, 2
    for row in rows:                                               # 3
        if row and row[0] or not row:                              # 4; `and`, `or`: 6
            return [one for one in row if one]                     # for, if: 8
        elif row:                                                  # 9
            return 1 if row else 2                                 # 10
    try:
        while True:                                                # 11
            pass
    except ValueError:                                             # 12
        pass
"""
    assert complexity(ast.parse(source)) == 12


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loop_reads_in_one_sitting(script):
    loop = loop_of(script)
    given = loop.args
    assert len(given.posonlyargs + given.args + given.kwonlyargs) <= 6
    assert given.vararg is None and given.kwarg is None
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.body[0].lineno + 1 <= 72  # its docstring included
    assert complexity(loop) <= 18
    assert len((ROOT / script).read_text(encoding="utf-8").splitlines()) <= 276


# ---- books without a model -----------------------------------------------------------------------
@pytest.fixture
def run_of(tmp_path) -> Iterator[Callable[..., Run]]:
    """Make runs: `run_of(Schedule(...), state, save=..., ...)`. They log below `tmp_path`."""
    logs = []

    def make(
        schedule: Schedule | None = None,
        state: TrainerState | None = None,
        *,
        save: Callable[..., object] = lambda: None,
        evaluate: Callable[[], object] = lambda: None,
        **parts: Any,
    ) -> Run:
        state = state or TrainerState()
        log = RunLogger(tmp_path, log_history=state.log_history)
        logs.append(log)
        return Run(
            RunFolder(tmp_path, log, SignalGuard(), "sft"),
            state,
            schedule or Schedule(total=4, logging_steps=1, eval_steps=None, save_steps=None),
            title="test",
            save=save,
            evaluate=evaluate,
            **parts,
        )

    yield make
    for log in logs:
        log.close()


def done(run: Run, **metrics: float) -> None:
    """Make a step of these metrics."""
    run.add(metrics)
    run.step_done(epoch=(run.step + 1) / 10, shown={})


@pytest.fixture
def history(run_of) -> Callable[..., tuple[list[str], Run]]:
    """Drive runs: `history(Schedule(...))` -> (what happens, in this order, the run).

    state: where the run stands before.
    signal: the step during which one comes.
    scores: those of the evaluations, of which the lower is the better.
    """

    def drive(
        schedule: Schedule,
        state: TrainerState | None = None,
        *,
        signal: int | None = None,
        scores: tuple[float, ...] = (),
    ) -> tuple[list[str], Run]:
        found, given = [], iter(scores)

        def evaluate() -> None:
            found.append(f"evaluate {run.step}")
            if scores:
                run.state.record_evaluation(next(given), greater_is_better=False)

        run = run_of(
            schedule, state, save=lambda: found.append(f"save {run.step}"), evaluate=evaluate
        )
        with run:
            while run.goes_on():
                done(run)
                found.append(f"step {run.step}")
                if run.step == signal:
                    run.signals.stop = 15
        return found, run

    return drive


def words(text: str) -> list[str]:
    """Split a history: `words("step 1, save 1")` -> ["step 1", "save 1"]."""
    return [part.strip() for part in text.split(",")]


# ---- the schedule --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # an evaluation lies between two saves: it can be long, and it changes what is the best
        (
            Schedule(5, 1, eval_steps=2, save_steps=None),
            "step 1, step 2, save 2, evaluate 2, save 2, step 3, step 4, save 4, evaluate 4,"
            " save 4, step 5, save 5, evaluate 5, save 5",
        ),
        (
            Schedule(2, 1, eval_steps=None, save_steps=None),
            "step 1, step 2, save 2, evaluate 2, save 2",
        ),
        (
            Schedule(2, 1, eval_steps=None, save_steps=None, eval_at_start=True),
            "save 0, evaluate 0, save 0, step 1, step 2, save 2, evaluate 2, save 2",
        ),
        (
            Schedule(5, 1, eval_steps=None, save_steps=2),
            "step 1, step 2, save 2, step 3, step 4, save 4, step 5, save 5, evaluate 5, save 5",
        ),
        # where both are due, the evaluation's saves are enough
        (
            Schedule(3, 1, eval_steps=2, save_steps=1),
            "step 1, save 1, step 2, save 2, evaluate 2, save 2, step 3, save 3, evaluate 3,"
            " save 3",
        ),
    ],
)
def test_what_is_due(history, schedule, expected):
    assert history(schedule)[0] == words(expected)


def test_a_resumed_step_is_neither_saved_nor_evaluated_again(history):
    schedule = Schedule(4, 1, eval_steps=2, save_steps=1, eval_at_start=True)
    found, run = history(schedule, TrainerState(global_step=2, evaluated_step=2))
    assert found == words("step 3, save 3, step 4, save 4, evaluate 4, save 4")
    assert run.bar.step == 4


def test_an_evaluation_that_was_cut_short_is_made_when_the_run_is_resumed(history):
    schedule = Schedule(3, 1, eval_steps=2, save_steps=None)
    found, _ = history(schedule, TrainerState(global_step=2, evaluated_step=0))
    assert found == words("save 2, evaluate 2, save 2, step 3, save 3, evaluate 3, save 3")
    start = Schedule(1, 1, eval_steps=None, save_steps=None, eval_at_start=True)
    assert history(start, TrainerState())[0][:2] == ["save 0", "evaluate 0"]


def test_a_finished_run_that_is_resumed_does_nothing(history):
    schedule = Schedule(3, 1, eval_steps=2, save_steps=1)
    assert history(schedule, TrainerState(global_step=3, evaluated_step=3))[0] == []


def test_a_run_without_a_better_evaluation_ends(history):
    schedule = Schedule(9, 1, eval_steps=1, save_steps=None, patience=2)
    found, run = history(schedule, scores=(3.0, 2.0, 2.0, float("nan"), 1.0))
    # 2 is better than 3; another 2 is not, and NaN never is
    assert [word for word in found if "step" in word] == words("step 1, step 2, step 3, step 4")
    assert run.stopped == "2 evaluations in a row were no better than the best"
    assert run.state.best_metric == 2.0 and run.state.best_model_checkpoint == "checkpoint-2"
    unending, run = history(Schedule(9, 1, eval_steps=1, save_steps=None), scores=(1.0, *[2.0] * 8))
    assert "step 9" in unending and run.stopped is None


def test_a_run_that_stops_by_itself_evaluates_its_last_step(run_of):
    """GRPO's --stop_when ends a run where no evaluation is due."""
    found = []

    class Stopping(Run):
        @property
        def stopped(self) -> str | None:
            return "enough" if self.step == 2 else None

    made = run_of(Schedule(9, 1, eval_steps=5, save_steps=None))
    run = Stopping(
        RunFolder(made.folder, made.log, made.signals, "grpo"),
        TrainerState(),
        made.schedule,
        title="test",
        save=lambda: found.append(f"save {run.step}"),
        evaluate=lambda: found.append(f"evaluate {run.step}"),
    )
    with run:
        while run.goes_on():
            done(run)
    assert found == words("save 2, evaluate 2, save 2")


def test_a_signal_ends_a_run_after_its_step(history):
    found, run = history(Schedule(5, 1, eval_steps=None, save_steps=None), signal=3)
    assert found == words("step 1, step 2, step 3, save 3")
    assert run.should_stop() and run.step == 3
    # no evaluation is begun, at the end neither: it is made when the run is resumed
    found, run = history(Schedule(2, 1, eval_steps=1, save_steps=None), signal=1)
    assert found == words("step 1, save 1")
    assert run.state.evaluated_step == -1


def test_a_signal_cuts_an_evaluation_short(run_of):
    saved = []

    def evaluate() -> None:
        run.signals.stop = 2
        raise StopRequested

    run = run_of(
        Schedule(3, 1, eval_steps=1, save_steps=None),
        save=lambda: saved.append((run.step, run.state.evaluated_step)),
        evaluate=evaluate,
    )
    with run:
        assert run.goes_on()
        done(run)
        assert not run.goes_on()
    assert set(saved) == {(1, -1)}  # not noted as finished, so it is made again


@pytest.mark.parametrize("first", [None, 2])
def test_a_ctrl_c_that_is_to_stop_at_once_does(run_of, first):
    """Protects the promise of the first signal's notice: the second Ctrl-C waits for nothing."""

    def evaluate() -> None:
        run.signals.stop = first
        raise KeyboardInterrupt

    run = run_of(Schedule(3, 1, eval_steps=1, save_steps=None), evaluate=evaluate)
    with pytest.raises(KeyboardInterrupt), run:
        run.goes_on()
        done(run)
        run.goes_on()
    assert run.state.evaluated_step == -1


# ---- saves by the clock, and a disk that refuses -------------------------------------------------
@pytest.mark.parametrize(
    ("minutes", "save_steps", "expected"),
    [
        # steps take a minute; the clock begins with the run and at every save
        (2.0, None, "2t, 4t, 6t, 7, 7"),
        (2.5, None, "3t, 6t, 7, 7"),
        (2.0, 3, "2t, 3, 5t, 6, 7, 7"),  # a step that is due anyway is not the clock's
        (0.0, None, "7, 7"),
        (None, 3, "3, 6, 7, 7"),
    ],
)
def test_saves_by_the_clock(run_of, monkeypatch, minutes, save_steps, expected):
    now, saved = [1e6], []
    monkeypatch.setattr("engine.run.time.monotonic", lambda: now[0])
    schedule = Schedule(7, 1, None, save_steps, save_minutes=minutes)
    run = run_of(
        schedule, save=lambda timed=False: saved.append(f"{run.step}{'t' if timed else ''}")
    )
    with run:
        while run.goes_on():
            now[0] += 60
            done(run)
    assert saved == words(expected)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_refuses_a_save_ends_no_training(run_of, number, capsys):
    tried, saved = [], []

    def save() -> None:
        tried.append(run.step)
        if len(tried) in (2, 3):
            raise OSError(number, f"checkpoint-{run.step} was not saved: full; it needs 7 bytes")
        saved.append(run.step)

    run = run_of(Schedule(5, 1, eval_steps=None, save_steps=1), save=save)
    with run:
        while run.goes_on():
            done(run)
    assert (tried, saved) == ([1, 2, 3, 4, 5, 5], [1, 4, 5, 5])
    found = [line["warning"] for line in lines(run.folder / "warnings.jsonl")]
    assert found == [
        f"warning: checkpoint-{step} was not saved: full; it needs 7 bytes; training goes on, the"
        " next save tries again"
        for step in (2, 3)
    ]
    assert found[0] in capsys.readouterr().err


@pytest.mark.parametrize(("start", "refused"), [(0, 0), (0, 3), (2, 2)])
def test_a_disk_that_refuses_the_first_or_the_last_save_ends_the_run(run_of, start, refused):
    """At the first nothing is lost, and at the last nothing is left to wait for."""

    def save() -> None:
        if run.step == refused:
            raise OSError(errno.ENOSPC, "full")

    schedule = Schedule(3, 1, eval_steps=2, save_steps=None, eval_at_start=True)
    run = run_of(schedule, TrainerState(global_step=start), save=save)
    with pytest.raises(OSError, match="full"), run:
        while run.goes_on():
            done(run)
    assert run.step == refused and not run.finished


# ---- the log -------------------------------------------------------------------------------------
def logged(run: Run) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name in ("step", "epoch", "loss")}
        for line in lines(run.folder / "metrics.jsonl")
    ]


def test_a_run_logs_the_steps_since_its_last_log_and_its_last_step(run_of):
    run = run_of(Schedule(5, logging_steps=2, eval_steps=None, save_steps=None))
    kept = []
    with run:
        while run.goes_on():
            done(run, loss=float(run.step))  # 0, 1, 2, 3, 4
            kept.append("loss" in run.state.unlogged_metrics)
    assert logged(run) == [
        {"step": 2, "epoch": 0.2, "loss": 0.5},
        {"step": 4, "epoch": 0.4, "loss": 2.5},
        {"step": 5, "epoch": 0.5, "loss": 4.0},
    ]
    assert kept == [True, False, True, False, False]
    assert run.state.epoch == 0.5 and len(run.state.log_history) == 3
    assert all(line["step_time"] >= 0 for line in lines(run.folder / "metrics.jsonl"))


def test_a_resumed_run_logs_the_steps_before_it_too(run_of):
    schedule = Schedule(4, logging_steps=2, eval_steps=None, save_steps=None)
    begun = run_of(schedule)
    assert begun.goes_on()
    done(begun, loss=1.0)
    run = run_of(
        schedule,
        TrainerState(global_step=1, unlogged_metrics=begun.state.unlogged_metrics),
    )
    assert run.goes_on()
    done(run, loss=4.0)
    assert logged(run) == [{"step": 2, "epoch": 0.2, "loss": 2.5}]


def test_tokens_are_counted_over_the_whole_run(run_of):
    run = run_of(state=TrainerState(num_tokens=100))
    for number in (10, 0, 7):
        assert run.goes_on()
        run.count_tokens(number)
        done(run)
    found = [line["num_tokens"] for line in lines(run.folder / "metrics.jsonl")]
    assert found == [110, 110, 117] and run.state.num_tokens == 117


def test_what_was_logged_is_looked_at(run_of, monkeypatch):
    seen = []
    monkeypatch.setattr(Run, "watch", lambda run, metrics: seen.append((run.step, metrics["loss"])))
    run = run_of(Schedule(3, logging_steps=2, eval_steps=None, save_steps=None))
    with run:
        while run.goes_on():
            done(run, loss=float(run.step))
    assert seen == [(2, 0.5), (3, 2.0)]


# ---- what cuts a step short ----------------------------------------------------------------------
class Window:
    """Remember numbers, as a reward does."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def state_dict(self) -> list[float]:
        return list(self.seen)

    def load_state_dict(self, state: list[float]) -> None:
        self.seen = list(state)


class Draws:
    """Draw from every source of random numbers that a fork's step may use."""

    def __call__(self) -> list[float]:
        return [
            torch.rand(()).item(),
            float(np.random.rand()),
            random.random(),
        ]


@pytest.mark.parametrize(
    ("error", "swallowed"),
    [(StepFailed("failed"), False), (DataError("damaged"), False), (StopRequested(), True)],
)
def test_a_step_that_fails_is_as_if_it_had_not_begun(run_of, error, swallowed):
    draws, window, saved = Draws(), Window(), []

    def save() -> None:
        state = torch.get_rng_state(), random.getstate()
        saved.append((run.step, list(window.seen), run.state.unlogged_metrics["loss"], state))

    run = run_of(
        Schedule(4, logging_steps=3, eval_steps=None, save_steps=None),
        save=save,
        stateful={"window": window},
    )

    def step(fails: bool) -> None:
        window.seen += draws()
        run.add({"loss": float(len(window.seen))})
        if fails:
            raise error
        run.step_done(epoch=0.0, shown={})

    def loop() -> None:
        with run:
            for fails in (False, True):
                assert run.goes_on()
                before[:] = draws_ahead()
                step(fails)

    def draws_ahead() -> list[float]:
        """Say what would be drawn next, and draw nothing."""
        states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        found = draws()
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        return found

    before: list[float] = []
    if swallowed:
        loop()
    else:
        with pytest.raises(type(error)):
            loop()
    ((step_saved, seen, losses, _),) = saved  # once
    # step 1 is done and in the log to come; of step 2 nothing is left
    assert (step_saved, run.step, len(seen)) == (1, 1, 3)
    assert losses == ["mean", [[3.0, 1.0]]]
    assert draws() == before


def test_a_fault_of_ours_leaves_the_last_whole_step(run_of, capsys):
    saved, window = [], Window()
    run = run_of(
        save=lambda: saved.append((run.step, list(window.seen), run.state.num_tokens)),
        stateful={"window": window},
    )
    with pytest.raises(RuntimeError, match="a bug"), run:
        assert run.goes_on()
        window.seen.append(1.0)
        run.count_tokens(7)
        done(run)
        assert run.goes_on()
        window.seen.append(2.0)
        run.count_tokens(9)
        raise RuntimeError("a bug")
    assert saved == [(1, [1.0], 7)]
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"saved after step 1; go on with: python run_sft.py --resume_from_checkpoint {run.folder}"
    )


def test_a_step_that_fails_while_it_is_logged_is_undone_whole(run_of, monkeypatch):
    """The step is counted by then, and its line is in the history."""

    def watch(run: Run, logged: object) -> None:
        if run.step == 2:
            raise ZeroDivisionError

    saved = []
    monkeypatch.setattr(Run, "watch", watch)
    run = run_of(
        Schedule(9, logging_steps=1, eval_steps=None, save_steps=None),
        save=lambda: saved.append((run.step, run.state.epoch, list(run.state.log_history))),
    )
    with pytest.raises(ZeroDivisionError), run:
        while run.goes_on():
            done(run, loss=float(run.step))
    ((step, epoch, history),) = saved
    assert (step, epoch, [line["loss"] for line in history]) == (1, 0.1, [0.0])
    assert run.metrics.state_dict() == {}


def test_an_evaluation_that_fails_while_it_is_logged_leaves_nothing(run_of):
    """Neither at the very start: the resumed run makes it again, and must not find its scores."""
    saved, window = [], Window()

    def evaluate() -> None:
        run.log.scalars(run.step, {"loss": 1.0}, split="eval")
        window.seen.append(torch.rand(()).item())
        run.state.record_evaluation(1.0, greater_is_better=False)
        raise ZeroDivisionError

    def save() -> None:
        best = run.state.best_model_checkpoint
        saved.append((list(window.seen), list(run.state.log_history), best, torch.get_rng_state()))

    run = run_of(
        Schedule(9, 1, eval_steps=None, save_steps=None, eval_at_start=True),
        save=save,
        evaluate=evaluate,
        stateful={"window": window},
    )
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), run:
        run.goes_on()
    ((seen, history, best, drawn),) = saved  # before it; what is undone needs no second save
    assert (seen, history, best) == ([], [], None) and torch.equal(drawn, before)
    assert (window.seen, run.state.log_history, run.state.best_metric) == ([], [], None)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [None, 15])
def test_a_state_that_cannot_be_saved_hides_no_error(run_of, capsys, stop):
    def save() -> None:
        raise OSError(28, "checkpoint x was not saved: No space left; it needs 7 bytes")

    run = run_of(save=save)
    with contextlib.ExitStack() as stack:
        if stop is None:
            stack.enter_context(pytest.raises(ZeroDivisionError))
        stack.enter_context(run)
        assert run.goes_on()
        run.signals.stop = stop
        raise ZeroDivisionError if stop is None else StopRequested
    assert run.exit_code == 1
    error, how = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: the state after step 0 is not saved: ")
    assert error.endswith("checkpoint x was not saved: No space left; it needs 7 bytes")
    assert how == f"go on with: python run_sft.py --resume_from_checkpoint {run.folder}"


def test_a_save_that_fails_is_not_tried_at_once_again(run_of, capsys):
    tried = []

    def save() -> None:
        tried.append(run.step)
        raise ZeroDivisionError

    run = run_of(Schedule(9, 1, eval_steps=None, save_steps=1), save=save)
    with pytest.raises(ZeroDivisionError), run:
        while run.goes_on():
            done(run)
    assert tried == [1]
    assert "go on with: " in capsys.readouterr().err


def test_a_second_ctrl_c_waits_for_no_save(run_of, capsys):
    saved = []
    run = run_of(save=lambda: saved.append(run.step))
    with pytest.raises(KeyboardInterrupt), run:
        assert run.goes_on()
        raise KeyboardInterrupt
    assert saved == []
    assert capsys.readouterr().err.splitlines()[-1].startswith("go on with: ")


def test_a_signal_ends_a_step_between_its_parts(run_of):
    saved, made = [], []
    run = run_of(save=lambda: saved.append(run.step))
    with run:
        assert run.goes_on()
        for part in run.polled(range(9)):
            made.append(part)
            run.signals.stop = 10 if part == 2 else None
    assert (made, saved, run.exit_code) == ([0, 1, 2], [0], 138)


@pytest.mark.parametrize(("stop", "code"), [(None, 130), (1, 129)])
def test_what_comes_after_training_is_cut_short_without_a_save(run_of, capsys, stop, code):
    """The policy may be that of the best checkpoint by then."""
    saved = []
    run = run_of(Schedule(1, 1, None, None), save=lambda: saved.append(run.step))
    with run:
        while run.goes_on():
            done(run)
        assert run.finished
        del saved[:]
        run.signals.stop = stop
        raise StopRequested if stop else KeyboardInterrupt
    assert (saved, run.exit_code) == ([], code)
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"stopped while scoring; training is finished and saved in {run.folder}"
    assert second.startswith("go on with: ")
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    assert saved == [] and capsys.readouterr().err.startswith("go on with: ")


def test_a_closed_terminal_hides_no_exit_code(run_of, monkeypatch):
    class Closed:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return False

        def write(self, text: str) -> None:
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr("sys.stdout", Closed())
    monkeypatch.setattr("sys.stderr", Closed())
    saved = []
    run = run_of(save=lambda: saved.append(run.step))
    with run:
        assert run.goes_on()
        run.signals.stop = 1
        raise StopRequested
    assert (saved, run.exit_code) == ([0], 129)


def test_a_damaged_image_in_an_evaluation_undoes_no_step(run_of):
    """The step before it is done: its weights are changed, and so the draws stay those after it."""
    saved, window = [], Window()

    def evaluate() -> None:
        raise DataError("damaged")

    run = run_of(
        Schedule(3, 1, eval_steps=1, save_steps=None),
        save=lambda: saved.append((run.step, list(window.seen))),
        evaluate=evaluate,
        stateful={"window": window},
    )
    with pytest.raises(DataError), run:
        assert run.goes_on()
        window.seen.append(1.0)
        after = torch.rand(1), torch.get_rng_state()
        done(run)
        run.goes_on()
    assert set(map(str, saved)) == {"(1, [1.0])"}
    assert torch.equal(torch.get_rng_state(), after[1]) and run.state.evaluated_step == -1


def test_an_optimizer_step_is_taken_back_until_the_step_is_done(run_of, monkeypatch):
    monkeypatch.setattr(Run, "watch", lambda run, logged: 1 / (3 - run.step))
    taken, saved = [], []
    run = run_of(save=lambda: saved.append((run.step, list(taken))))
    with pytest.raises(ZeroDivisionError), run:
        while run.goes_on():
            number = run.step + 1
            run.can_take_back(lambda number=number: taken.append(number))
            done(run)
    assert saved == [(2, [3])]  # the third alone, and before the save


def test_bad_steps_are_skipped_and_counted_up_to_so_many_in_a_row(run_of):
    schedule = Schedule(9, logging_steps=2, eval_steps=None, save_steps=None, max_bad_steps=2)
    run, accepted, saved = run_of(schedule), [], []
    run.save = lambda: saved.append((run.step, run.state.bad_steps, run.state.bad_steps_in_a_row))
    losses = iter([1.0, math.nan, math.inf, 3.0, -math.inf, math.nan, math.nan])
    examples = [SimpleNamespace(id="e1"), SimpleNamespace(id="e7")]
    with pytest.raises(StepFailed, match="the loss of step 7 is not finite"), run:
        while run.goes_on():
            loss = next(losses)
            accepted.append(run.accepts(torch.tensor(1.0), loss, examples))
            done(run, loss=loss)
    assert accepted == [True, False, False, True, False, False]
    assert saved == [(6, 4, 2)]
    found = [(line["loss"], line["bad_steps"]) for line in lines(run.folder / "metrics.jsonl")]
    # of steps 1 and 2 the first alone; of 5 and 6 neither is a number
    assert found == [(1.0, 1), (3.0, 2), (None, 4)]
    warned = [(line["step"], line["warning"]) for line in lines(run.folder / "warnings.jsonl")]
    assert [step for step, _ in warned] == [2, 3, 5, 6]
    assert warned[0][1] == (
        "warning: the loss of step 2 is not finite: it is skipped. Examples: e1, e7"
    )


def test_without_bad_steps_nothing_is_logged_of_them(run_of):
    run = run_of()
    assert run.goes_on() and run.accepts(torch.tensor(1.0), 1.0, [])
    done(run)
    assert "bad_steps" not in lines(run.folder / "metrics.jsonl")[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(run_of, value):
    run = run_of(state=TrainerState(global_step=4))
    examples = [SimpleNamespace(id="e1"), SimpleNamespace(id="e7")]
    with pytest.raises(StepFailed, match=r"step 5 is not finite; .* was saved. Examples: e1, e7$"):
        run.accepts(torch.tensor(value), 1.0, examples)
    with pytest.raises(StepFailed, match=r"the loss of step 5 is not finite; .* Examples: e1, e7$"):
        run.accepts(torch.tensor(1.0), value, examples)
    assert run.accepts(torch.tensor(3e38), 1e308, examples)


def test_a_signal_to_one_rank_while_scoring_is_the_exit_code_of_all(tmp_path):
    def scoring(ranks: Ranks) -> int:
        signals, log = SignalGuard(), RunLogger(tmp_path, writes=False)
        folder = RunFolder(tmp_path, log, signals, "sft", ranks=ranks)
        schedule = Schedule(total=1, logging_steps=1, eval_steps=None, save_steps=None)
        run = Run(
            folder,
            TrainerState(),
            schedule,
            title="test",
            save=lambda: None,
            evaluate=lambda: None,
        )
        signals.stop = 15 if ranks.rank == 1 else None
        with run, ranks.together():
            run.finished = True
            if signals.stop is not None:
                raise StopRequested
        return run.exit_code

    assert in_threads(3, scoring) == [143, 143, 143]
