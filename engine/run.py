"""Keep the books of a training run for both scripts: where it stands, what is due, its log.

Nothing here touches a gradient.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from data.examples import Example
from data.files import write_json
from data.hospitals import is_demo, train_files
from data.sets import write_bad_images
from engine.checkpoint import (
    Checkpoint,
    clean_leftovers,
    set_later_checkpoints_aside,
    settle_checkpoints,
)
from engine.kept_files import KeptFiles
from engine.longer import extension_line, is_extended, keep_result
from engine.model_files import DEMO_RECIPES
from engine.out_of_memory import Cut, Limits
from engine.progress import Progress
from engine.ranks import ALONE, Ranks
from engine.resume import (
    OUT_OF_MEMORY,
    base_record,
    begin_again,
    bring_logs,
    keep_reference,
    run_folder,
)
from engine.run_state import Schedule, TrainerState
from engine.runtime import (
    FINISHED,
    SignalGuard,
    StepFailed,
    StopRequested,
    disk_line,
    lock_run,
)
from engine.state_tensors import load_rng, rng_to_tensors
from engine.tracking import MetricAccumulator, RunLogger
from engine.undo import Before, Stateful

if TYPE_CHECKING:
    from engine.policy import Policy

# ---- the books -----------------------------------------------------------------------------------
Part = TypeVar("Part")


@dataclass(frozen=True)
class RunFolder:
    """Hold a run's folder, which is this run's alone, with its log and the signals to heed.

    record: the contents of config.json. longer: whether the run is made longer than it was. kept:
    the files with which a folder that is deleted under the run is made again. ranks: those of the
    run, the first of which writes.
    """

    path: Path
    log: RunLogger
    signals: SignalGuard
    script: Literal["sft", "grpo"]
    record: dict[str, Any] = field(default_factory=dict)
    longer: bool = False
    kept: KeptFiles | None = None
    ranks: Ranks = ALONE

    def bring_back(self, step: int) -> None:
        """Make the folder again where it was deleted under the run, with its logs open again.

        step: at which the run stands.
        """
        if self.kept is not None and self.kept.bring_back(self.record):
            self.log.reopen(step)


class Run:
    """Keep the books of a training run: where it stands, what is due, what is logged and saved.

    It has no model, no optimizer and no gradient: without it the same model is trained. The loop
    asks `goes_on()` before every step and calls `step_done()` after it. The caller wraps the loop,
    and what comes after it, in `with run:`. Then a signal or an error of any kind leaves the state
    of the last whole step on disk, and a line says how to go on.

    With several ranks each keeps the same books. The first of them writes and shows, and what one
    alone knows (its clock, its signals) is told to all before they decide by it.

    exit_code: the process's, once the block has ended without an error.
    """

    def __init__(
        self,
        folder: RunFolder,
        state: TrainerState,
        schedule: Schedule,
        *,
        title: str,
        save: Callable[..., object],
        evaluate: Callable[[], object],
        stateful: Mapping[str, Stateful] | None = None,
    ):
        """Open the books.

        state: where the run stands. It changes with every step. title: shown before the bar.
        save: writes a checkpoint of the state as it is, with timed=True where only --save_minutes
        asks for it. evaluate: evaluates and logs the scores.
        stateful: what a step that fails must not have changed, beside torch's, numpy's and
        Python's own random numbers, from which a fork may draw.
        """
        self.folder, self.log, self.signals = folder.path, folder.log, folder.signals
        self.ranks = folder.ranks
        self.record = folder.record
        self._cuts = 0  # how often memory ran out since the last step
        self.state, self.schedule, self.save, self.evaluate = state, schedule, save, evaluate
        self.stateful = dict(stateful or {})
        self.metrics = MetricAccumulator(state.unlogged_metrics)
        self.bar = Progress(schedule.total, initial=state.global_step, description=title)
        self.state.log_history = self.log.log_history
        self._resume = resume_command(f"run_{folder.script}.py", folder.path)
        self._first, self._began = state.global_step, time.perf_counter()
        self._before: Before | None = None  # of the step or evaluation that is being made
        self._take_back: Callable[[], None] | None = None  # of its optimizer step, once it is made
        self._saved_at = time.monotonic()  # when a save was tried last
        self._saved = False  # whether the state as it is now is on disk
        self._not_saved: Exception | None = None  # why the last save failed
        self._limits: Limits | None = None
        self._digest: Callable[[], str] | None = None
        self.finished = False  # whether the loop has come to its end, with all that was due
        self.exit_code = 0

    def begin(self, policy: Policy) -> None:
        """Note cuts by memory from now on, and see at saves that all ranks have the same adapter.

        policy: what is trained. Its limits say how much is run at once.
        """
        self._limits, self._digest = policy.limits, policy.digest
        self._limits.report = self.note_cut

    # ---- where the run stands --------------------------------------------------------------------
    @property
    def step(self) -> int:
        """Return the number of optimizer steps that are done."""
        return self.state.global_step

    @property
    def total(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        return self.schedule.total

    @property
    def stopped(self) -> str | None:
        """Return why the run ends before its last step, or None."""
        patience = self.schedule.patience
        if patience is None or self.state.evaluations_without_improvement < patience:
            return None
        return f"{patience} evaluations in a row were no better than the best"

    def should_stop(self) -> bool:
        """Tell whether a signal asks this process to save and leave, for work of its own."""
        return self.signals.stop is not None

    def _all_stop(self) -> bool:
        """Tell whether a signal to any rank asks to save and leave. All ranks come here."""
        return self.signals.agree(self.ranks.gather) is not None

    def goes_on(self) -> bool:
        """Evaluate and save what is due, then tell whether there is one more step."""
        self._evaluate_or_save()
        stop = self._all_stop()
        if self.step >= self.total or stop or self.stopped is not None:
            self.finished = not stop
            self.bar.close()
            return False
        self._begin()
        self._began = time.perf_counter()
        return True

    def polled(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Go through the parts of a step, and leave it once a signal asks to.

        So what a signal waits for is one of them. Raises StopRequested.
        """
        for part in parts:
            if self.should_stop():
                raise StopRequested
            yield part

    def _evaluate_or_save(self) -> None:
        schedule, stop = self.schedule, self._all_stop()
        if self.step == 0:
            due = schedule.eval_at_start
        else:
            end = self.step >= self.total or self.stopped is not None
            due = end or self._at(schedule.eval_steps)
        if due and self.state.evaluated_step != self.step and not stop:
            self._save_due()  # first: an evaluation can be long, and can meet a damaged image
            self._begin()
            try:
                self.evaluate()
            except StopRequested:
                self._undo()  # it is made again when the run is resumed
                return
            self.state.evaluated_step = self.step
            self._before = None
            self._save_due()
        elif self.step > self._first and self._at(schedule.save_steps):
            self._save_due()
        elif self.step > self._first and self.ranks.from_first(self._overdue()):
            self._save_due(timed=True)

    def _overdue(self) -> bool:
        minutes = self.schedule.save_minutes or math.inf
        return time.monotonic() - self._saved_at >= 60 * minutes

    def _save_due(self, *, timed: bool = False) -> None:
        """Save. Where the disk refuses in the middle of training, the run goes on and says so.

        What is in memory would be lost if it ended there. The next save that is due tries again,
        and the last one must succeed. Before the first step there is nothing to lose.
        """
        with self.ranks.together():
            self._check_same()
            try:
                self._save(timed=timed)
            except OSError as error:
                stop = self.signals.agreed is not None
                ends = self.step >= self.total or self.stopped is not None or stop
                if ends or self.step == self._first:
                    raise
                line = f"warning: {disk_line(error)}; training goes on, the next save tries again"
                self.warn([line])

    def _check_same(self) -> None:
        """Refuse to save what is not the same on all ranks. All ranks come here.

        Raises StepFailed naming those that differ from the first.
        """
        if self.ranks.size == 1 or self._digest is None:
            return
        digests = self.ranks.gather(self._digest())
        others = [str(rank) for rank, one in enumerate(digests) if one != digests[0]]
        if others:
            self._not_saved = StepFailed(
                f"the adapter after step {self.step} is not the same on all ranks: that of rank"
                f" {', '.join(others)} differs from rank 0's. It is not saved; go on from the last"
                " checkpoint, and look for a device that computes wrongly, or for code that takes"
                " another branch on one rank"
            )
            raise self._not_saved

    def _save(self, *, timed: bool = False) -> None:
        """Write a checkpoint on the first rank, without an exchange: others may have left."""
        self._saved_at = time.monotonic()
        try:
            if self.ranks.first:
                self.save(timed=True) if timed else self.save()
        except Exception as error:
            self._not_saved = error
            raise
        self._saved = True

    def _at(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    # ---- a step ----------------------------------------------------------------------------------
    def add(self, metrics: Mapping[str, float | torch.Tensor]) -> None:
        """Add measurements of this step to what is logged next."""
        for name, value in metrics.items():
            self.metrics.add(name, value)

    def accepts(self, norm: torch.Tensor, loss: float, examples: Iterable[Example]) -> bool:
        """Tell whether a step may reach the weights: its gradient and its loss are finite.

        Else it is skipped: it counts, its random numbers are drawn and its completions seen, but
        weights and optimizer stay as they are.

        norm: scalar, of the whole gradient. Raises StepFailed naming the examples where it is one
        more in a row than --max_bad_steps allows.
        """
        finite = bool(torch.isfinite(norm))
        if finite and math.isfinite(loss):
            self.state.bad_steps_in_a_row = 0
            return True
        wrong = "loss" if finite else "gradient"
        line = f"the {wrong} of step {self.step + 1} is not finite"
        ids = f"Examples: {', '.join(example.id for example in examples)}"
        if self.state.bad_steps_in_a_row >= self.schedule.max_bad_steps:
            raise StepFailed(f"{line}; the state before it was saved. {ids}")
        self.state.bad_steps += 1
        self.state.bad_steps_in_a_row += 1
        self.warn([f"warning: {line}: it is skipped. {ids}"], self.step + 1)
        return False

    def can_take_back(self, take_back: Callable[[], None]) -> None:
        """Keep what takes the optimizer step back until the step is done."""
        self._take_back = take_back

    def step_done(self, *, epoch: float, shown: Mapping[str, float]) -> None:
        """Count an optimizer step and log it where that is due.

        epoch: passes over the data so far. shown: values for the progress bar.
        """
        if self._limits is not None:
            self._limits.tell_cuts(self.ranks.gather, self.ranks.rank)
        self.state.global_step += 1
        self.state.epoch = epoch
        self.metrics.add("step_time", time.perf_counter() - self._began)
        if self._cuts:
            self.metrics.add("memory_cuts", self._cuts, reduction="sum")
            self._cuts = 0
        if self.schedule.max_bad_steps:
            self.metrics.add("bad_steps", self.state.bad_steps, reduction="max")
        if self.step % self.schedule.logging_steps == 0 or self.step == self.total:
            if self.state.bad_steps:
                self.metrics.leave_out_not_finite()
            logged = self.ranks.from_first(self.metrics.collect())  # times differ by rank
            self.log.scalars(self.step, logged, epoch=epoch)
            self.watch(logged)
        self.bar.update(shown)
        self.state.unlogged_metrics = self.metrics.state_dict()
        self._before = self._take_back = None  # last: until here the step can be undone

    def merge(self, measured: MetricAccumulator) -> None:
        """Add what every rank has measured of its share of the step."""
        for of_rank in self.ranks.gather(measured.state_dict()):
            self.metrics.merge(of_rank)

    def total_loss(self, losses: Sequence[torch.Tensor]) -> float:
        """Add up the losses of every rank's micro-batches. To read them is to wait for the GPU."""
        told = self.ranks.gather([float(loss) for loss in losses])
        return sum(loss for of_rank in told for loss in of_rank)

    def mark(self) -> Callable[[], None]:
        """Return a function that puts random numbers and metrics back, for work that is done again.

        Until then nothing but these may have changed.
        """
        random, metrics = rng_to_tensors(), self.metrics.mark()

        def back() -> None:
            load_rng(*random)
            metrics()

        return back

    def note_cut(self, cut: Cut) -> None:
        """Say that memory ran out, count it, and keep the smaller value in config.json.

        Later checkpoints have it as well, and with them a resumed run.
        """
        self.write(f"warning: {cut.line()}")
        self.log.warn(cut.line(), self.step)
        self._cuts += 1
        settings = self.record.setdefault("settings", {})
        first = settings.get(cut.setting, {}).get("was", cut.before)  # as the user had it
        settings[cut.setting] = {"value": cut.after, "origin": OUT_OF_MEMORY, "was": first}
        if self.ranks.first:
            with contextlib.suppress(OSError):  # of a full disk: the next checkpoint has it too
                write_json(self.folder / "config.json", self.record)

    def count_tokens(self, number: int) -> None:
        """Add to the tokens of prompts and completions seen so far, and log their number."""
        self.state.num_tokens += number
        self.metrics.add("num_tokens", self.state.num_tokens, reduction="max")

    def log_scores(self, metrics: Mapping[str, Mapping[str, float]]) -> None:
        """Log what the final adapter scores, and write trainer_state.json anew with it.

        metrics: of each data set, by their names, as an evaluation during training logs them.
        """
        for name, of_set in metrics.items():
            self.log.scalars(self.step, of_set, split="eval", dataset=name, epoch=self.state.epoch)
        if self.ranks.first:
            write_json(self.folder / "trainer_state.json", asdict(self.state))

    def watch(self, logged: Mapping[str, float]) -> None:
        """Look at what was just logged. GRPO has conditions on it."""

    def write(self, line: str) -> None:
        """Print a line beside the progress bar."""
        self.bar.write(line)

    def warn(self, lines: Sequence[str], step: int | None = None) -> None:
        """Print warnings and keep them in warnings.jsonl. step: theirs, where it is not done."""
        for line in lines:
            self.write(line)
            self.log.warn(line, self.step if step is None else step)

    # ---- what cuts a step short ------------------------------------------------------------------
    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        """Save the state of the last whole step, whatever ended the loop, and say how to go on.

        The step or evaluation that was cut short is as if it had not begun. Nothing is saved after
        a second Ctrl-C, which waits for nothing. Returns True, and so lets nothing out of the
        block, where a signal ended it.
        """
        self.bar.close()
        if self.finished and error is None:
            return self._note_end()
        if self.finished:
            return self._left_after_the_end(error)
        polled = isinstance(error, StopRequested)
        if polled:
            self._all_stop()  # whichever rank the signal came to
        stopped = polled or (error is None and self.signals.agreed is not None)
        if error is None and not stopped:
            return False
        at_once = isinstance(error, KeyboardInterrupt) and not polled
        saved = not at_once and self._save_last_step(error)
        self.exit_code = self.signals.exit_code if stopped and saved else 1
        done = "stopped; " if stopped else f"saved after step {self.step}; "
        _say(f"{done if saved else ''}go on with: {self._resume}", failed=not (stopped and saved))
        return polled

    def _note_end(self) -> bool:
        """Note in config.json that all is done, so that the same command is refused.

        That is the last thing written in the folder: what is killed before goes on by the same
        command, and then nothing is left that a kill could cut short.
        """
        self.log.close()
        if not self.ranks.first:
            return False
        try:
            write_json(self.folder / "config.json", self.record | {FINISHED: {"step": self.step}})
        except OSError as failure:
            self.exit_code = 1
            _say(f"error: the end is not noted in config.json: {failure}", failed=True)
            _say(f"go on with: {self._resume}", failed=True)
        return False

    def _left_after_the_end(self, error: object) -> bool:
        """Say how to go on where something after training was cut short. No step is lost by it."""
        stopped = isinstance(error, KeyboardInterrupt)
        if isinstance(error, KeyboardInterrupt):
            self.exit_code = self.signals.exit_code_after(error, self.ranks.gather)
            _say(f"stopped while scoring; training is finished and saved in {self.folder}")
        if error is not None and not isinstance(error, BrokenPipeError):
            _say(f"go on with: {self._resume}", failed=not stopped)
        return stopped

    def _save_last_step(self, error: object) -> bool:
        """Undo what was cut short and save, unless that is saved. Returns whether it is."""
        try:
            self._undo()
            if not self._saved and (error is None or error is not self._not_saved):
                self._save()
        except Exception as failure:  # the first error must not be hidden by it
            self._not_saved = failure
            text = " ".join(str(failure).split()) or type(failure).__name__
            _say(f"error: the state after step {self.step} is not saved: {text}", failed=True)
        return self._saved

    def _begin(self) -> None:
        """Note what a step or an evaluation that is cut short must not have changed."""
        self._before = Before.of(self.state, self.stateful, saved=self._saved)
        self._saved = False

    def _undo(self) -> None:
        if self._before is None:
            return
        if self._take_back is not None:
            self._take_back()
        self._before.put_back(self.state, self.stateful)
        self.metrics = MetricAccumulator(self.state.unlogged_metrics)
        self._saved = self._before.saved
        self._before = self._take_back = None


def _say(line: str, *, failed: bool = False) -> None:
    """Print a line, on stderr where something failed. A terminal that is gone changes nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr if failed else sys.stdout, flush=True)


@contextlib.contextmanager
def opened_run(
    script: Literal["sft", "grpo"],
    output_dir: str | None,
    checkpoint: Checkpoint | None,
    record: dict[str, Any],
    bad_images: Mapping[str, list[dict]],
    state: TrainerState,
    reference: Callable[[Path], None] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[RunFolder]:
    """Open the folder of a run, hold it for this run, and write config.json.

    A resumed run goes on in its checkpoint's folder, or takes its logs along to a new one. Files
    that a killed process left half-written are removed. Rank 0 alone holds and writes.

    record: the contents of config.json. bad_images: rows left out, by data set. state: where the
    run stands. reference: writes the adapter that a new run keeps as its frozen reference.
    Raises UsageError where the folder is in use, not empty, or cannot be written to.
    """
    with contextlib.ExitStack() as held, SignalGuard() as signals:

        def open_folder() -> tuple[str, bool]:
            folder = run_folder(checkpoint, output_dir, script)
            held.enter_context(lock_run(folder))
            longer = _prepare(folder, script, checkpoint, record, state, reference)
            write_bad_images(folder, bad_images)
            return str(folder), longer

        named, longer = ranks.on_first(open_folder)
        if longer:
            state.evaluations_without_improvement = 0  # the end of patience was that of the run
        folder = Path(named)
        log = RunLogger(
            folder,
            resume_step=None if checkpoint is None else checkpoint.step,
            log_history=state.log_history,
            marks=None if checkpoint is None else checkpoint.manifest["notes"].get("logs"),
            writes=ranks.first,
        )
        kept = KeptFiles(folder) if ranks.first else None
        with log, contextlib.nullcontext() if kept is None else contextlib.closing(kept):
            yield RunFolder(folder, log, signals, script, record, longer, kept, ranks)


def _prepare(
    folder: Path,
    script: Literal["sft", "grpo"],
    checkpoint: Checkpoint | None,
    record: dict[str, Any],
    state: TrainerState,
    reference: Callable[[Path], None] | None,
) -> bool:
    """Make a run's folder ready, and tell whether the run is made longer than it was."""
    clean_leftovers(folder)
    longer = checkpoint is not None and is_extended(record, checkpoint)
    if longer:
        print(extension_line(record), file=sys.stderr)
        keep_result(folder)
    if checkpoint is None:
        begin_again(folder, script)
        if reference is not None:
            record["reference"] = keep_reference(reference, folder)
    if record.get("base") == {}:  # a hub model has come with its weights only now
        named, how = (
            record["settings"][name]["value"] for name in ("model_name_or_path", "base_hash")
        )
        record["base"] = base_record(named, how)
    write_json(folder / "config.json", record)  # first: it says which run the rest is of
    if checkpoint is not None:
        bring_logs(checkpoint, folder, state.best_model_checkpoint)
        set_later_checkpoints_aside(folder, checkpoint.step)
        limit = record["settings"]["save_total_limit"]["value"]
        # again, because the earlier process may have ended before it came to it
        last, best = folder / checkpoint.path.name, state.best_model_checkpoint
        settle_checkpoints(folder, last, best, limit)
    return longer


# ---- after it ------------------------------------------------------------------------------------
def next_command(
    recipes: Sequence[str], folder: Path, model: str | None = None, train_file: Sequence[str] = ()
) -> str:
    """Write the command that goes on from SFT with GRPO, with FILE for the user to fill in.

    recipes: of the run. model: one that a flag has put in the place of theirs. train_file: of the
    run. One that was not trained on the demo's data goes on with others, of the same hospitals.
    """
    command = ["python", "run_grpo.py"]
    command += [word for recipe in recipes for word in ("--recipe", recipe)]
    command += ["--model_name_or_path", model] if model else []
    command += ["--adapter_name_or_path", str(folder)]
    files = [
        f"{one.hospital}=FILE" + ("" if one.weight is None else f"@{one.weight:g}")
        for one in train_files(train_file)[0]
        if one.hospital
    ] or ["FILE"]
    if not set(recipes) & set(DEMO_RECIPES):
        command += ["--train_file", *files]
    elif not is_demo(train_file):
        command += ["--train_file", *files, "--validation_file", "NAME=FILE"]
    return shlex.join(command)


def resume_command(script: str, folder: Path) -> str:
    """Write the command that goes on with a stopped run of a script."""
    return shlex.join(["python", script, "--resume_from_checkpoint", str(folder)])
