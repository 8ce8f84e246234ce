"""Keep the books of a GRPO run: what is logged of a rollout, of an update and of a step."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from data.files import write_json
from data.hospitals import is_demo
from engine.checkpoint import Checkpoint, CheckpointError, fitting
from engine.inherited import FRESH
from engine.model_files import DEMO_RECIPES
from engine.policy import Policy
from engine.resume import SERVERS, heal_reference, resumed_folder
from engine.run import Run, RunFolder, Schedule, TrainerState
from engine.runtime import StepFailed
from engine.saving import save_start
from engine.settings import validation_files
from engine.tracking import MetricAccumulator
from rl.dump import step_tensors, write_step
from rl.logs import (
    completion_rows,
    grpo_charts,
    hospital_metrics,
    mismatch_metrics,
    rollout_metrics,
    show_samples,
)
from rl.monitors import Monitors
from rl.objective import ObjectiveConfig, objective_metrics
from rl.reward_checks import Memory, check_kept, take_over
from rl.rollout import Rollouts
from rl.samples import MicroBatch, pack_samples, unpack_samples
from rl.settings import GRPOConfig, check_watched, length_warning


@dataclass(frozen=True)
class Computed:
    """Hold what is left of a micro-batch after its backward pass, free of the graph.

    loss: scalar. logprobs, entropy, weights and each of terms [N,T]. advantages [N]. mask [N,T].
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    weights: Tensor
    terms: dict[str, Tensor]
    advantages: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls,
        loss: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        weights: Tensor,
        terms: Mapping[str, Tensor],
        micro: MicroBatch,
    ) -> Computed:
        """Detach everything: the graph holds the GPU's memory."""
        detached = {name: term.detach() for name, term in terms.items()}
        loss, logprobs, entropy = loss.detach(), logprobs.detach(), entropy.detach()
        return cls(loss, logprobs, entropy, weights, detached, micro.advantages, micro.mask)


# ---- what it begins with -------------------------------------------------------------------------
@dataclass(frozen=True)
class Start:
    """Hold what policy and reference begin as.

    adapter: its folder, None for a fresh one. about: what the banner says of it.
    """

    adapter: Path | None
    about: str

    def keep(self, policy: Policy) -> Callable[[Path], None]:
        """Give what writes the start adapter of a new run into a folder."""
        return partial(save_start, policy, self.adapter)


def start_of(config: GRPOConfig, checkpoint: Checkpoint | None) -> Start:
    """Find what a run begins as. A resumed one has it in its own folder."""
    adapter = config.adapter_name_or_path
    fresh = f"a fresh LoRA of rank {config.lora_r} as policy, the model itself as frozen reference"
    about = fresh if adapter == FRESH else f"{adapter} as policy and frozen reference"
    if checkpoint is not None:
        in_place = resumed_folder(config.resume_from_checkpoint, config.output_dir) is not None
        if in_place and not config.dry_run:
            heal_reference(checkpoint, None if adapter == FRESH else adapter)
        return Start(checkpoint.path.parent / "reference", about)
    return Start(None if adapter == FRESH else Path(adapter), about)


# ---- in a checkpoint -----------------------------------------------------------------------------
def saved_rollouts(rollouts: Rollouts, monitors: Monitors, step: int) -> dict[str, Any]:
    """Make the files of a GRPO checkpoint beside those of every run.

    They are the rollout that steps after `step` still learn from, and what rewards and monitors
    remember. Returns {"tensors", "records"} as `save_training_checkpoint` takes them.
    """
    tensors, samples = pack_samples(rollouts.unfinished(step))
    functions = rollouts.reward_functions.items()
    records = {
        "rollout.json": samples,
        "rewards.json": {name: function.state_dict() for name, function in functions},
        "monitors.json": monitors.state_dict(),
    }
    return {"tensors": {"rollout": tensors}, "records": records}


def restore_rollouts(
    checkpoint: Checkpoint,
    rollouts: Rollouts,
    monitors: Monitors,
    decode: Callable[[Tensor], str],
) -> None:
    """Put back what `saved_rollouts` made. decode: turns ids [C] into text.

    Raises CheckpointError for a checkpoint of an earlier version, whose monitors and rewards
    remembered completions without their images: the run would not go on as it had begun. Also for
    one whose rollout holds a number that is not finite.
    """
    rollout, watched = checkpoint.record("rollout.json"), checkpoint.record("monitors.json")
    if isinstance(watched, dict) and "labels" not in watched:
        raise CheckpointError(
            f"{checkpoint.path}: saved by an earlier version, whose GRPO runs this one cannot go on"
            " with; start a new run from its adapter"
        )
    saved, tensors = checkpoint.record("rewards.json"), checkpoint.tensors("rollout")
    config = rollouts.config
    trained = {config.trained_reward, *config.reward_choice.weights}
    with fitting(checkpoint):
        for name, function in rollouts.reward_functions.items():
            if name in saved:
                take_over(name, function, saved[name])
            elif name in trained:  # one that is only logged begins anew
                raise CheckpointError(
                    f"{checkpoint.path}: rewards.json has no {name!r}, a reward that was added"
                    " since; start a new run from its adapter, or take the reward out again"
                )
        monitors.load_state_dict(watched)
        rollouts.samples = unpack_samples(
            tensors, rollout, rollouts.data, decode, rollouts.config.answer_format
        )
        try:
            rollouts.check_finite()
            for sample in rollouts.samples:
                check_kept(sample.example.id, sample.reward, sample.rewards)
        except StepFailed as error:  # of an earlier version, which saved whatever there was
            raise CheckpointError(
                f"{checkpoint.path}: {error}, so no step can follow from it; go on from an earlier"
                " checkpoint-<step>"
            ) from error


# ---- the books -----------------------------------------------------------------------------------
class GRPORun(Run):
    """Add to a run's books what GRPO knows: rollouts, monitors, conditions, dumps."""

    def __init__(
        self,
        folder: RunFolder,
        state: TrainerState,
        schedule: Schedule,
        rollouts: Rollouts,
        monitors: Monitors,
        *,
        save: Callable[..., object],
        evaluate: Callable[[], object],
    ) -> None:
        """Open the books as `Run` does. monitors: watch every rollout and every logged number.

        A run that is made longer goes on, whatever condition of --stop_when had ended it.
        """
        if folder.longer:
            monitors.stopped = None
        super().__init__(
            folder,
            state,
            schedule,
            title="GRPO",
            save=save,
            evaluate=evaluate,
            stateful={"monitors": monitors}
            | {name: Memory(name, one) for name, one in rollouts.reward_functions.items()},
        )
        self.config, self.monitors, self.rollouts = rollouts.config, monitors, rollouts
        if self.config.reward_choice.paths:  # a resume imports what its own command names
            self._resume += f" {shlex.join(['--reward', self.config.reward])}"
        self.hospitals = list(rollouts.order.counts)
        sets = list(validation_files(self.config))
        self.log.charts("GRPO", grpo_charts(sets, self.hospitals))
        self._noted: set[str] = set()

    def begin(self, policy: Policy) -> None:
        """Begin as `Run` does, with the server that samples, which shows first that it is right.

        Raises UsageError where it does not answer, or answers as another policy.
        """
        super().begin(policy)
        if self.config.use_vllm:
            from rl.server_sampler import ServerSampler  # here: others need none of it

            server = ServerSampler(self.config, self.folder, self.ranks, self._note_server)
            self.rollouts.server = server
            server.begin(policy, self.rollouts.data, self.step, self.should_stop)

    def _note_server(self, entry: dict[str, Any]) -> None:
        """Keep in config.json how a server compared with the policy. Later checkpoints have it."""
        self.record[SERVERS] = [*self.record.get(SERVERS, []), entry]
        self.ranks.on_first(lambda: write_json(self.folder / "config.json", self.record))

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        """Leave as `Run` does, and let the server forget the adapter.

        The end is noted after that, for it is the last thing written in the folder. The state of a
        run that was cut short is saved before, for a server may not answer.
        """
        server = self.rollouts.server
        if server is not None and self.finished and error is None:
            server.close()
        try:
            return super().__exit__(kind, error, trace)
        finally:
            if server is not None:
                server.close(at_once=kind is KeyboardInterrupt)

    @property
    def stopped(self) -> str | None:
        """Return the condition of --stop_when that ended the run, or None."""
        return self.monitors.stopped

    def log_rollout(self, rollouts: Rollouts) -> None:
        """Add the metrics of a new rollout, and those of the monitors, to the next log."""
        samples = rollouts.samples
        if self.step == 0 and (warning := length_warning(self.config, samples)):
            self.write(f"warning: {warning}")
        self.add(rollout_metrics(samples) | self.monitors.observe(samples))
        self.metrics.add_all(hospital_metrics(samples, self.hospitals))
        self.add({"time/rollout": time.perf_counter() - self._began})

    def log_update(
        self,
        computed: Sequence[Computed],
        micro_batches: Sequence[Sequence[int]],
        rollouts: Rollouts,
        objective: ObjectiveConfig,
    ) -> float:
        """Add the metrics of one update's micro-batches, and dump them where --dump_step asks.

        Those of all ranks: each comes with its own. Returns the loss of the whole step.

        Called once a step and after all passes: to read a number is to wait for the GPU. A dump is
        written before the gradient is looked at, so that a step that fails can be seen too.
        """
        measured = MetricAccumulator()
        for micro in computed:
            measured.add_all(
                objective_metrics(micro.terms, micro.advantages, micro.mask, objective)
            )
            if micro.mask.any():
                entropy, tokens = micro.entropy[micro.mask].mean(), int(micro.mask.sum())
                measured.add("entropy", entropy, weight=tokens)
        self.merge(measured)
        if rollouts.update_of(self.step) == 0:
            self.add(mismatch_metrics(rollouts.samples))
        if self.step + 1 == self.config.dump_step:
            self._dump(computed, micro_batches, rollouts, objective)
        return self.total_loss([done.loss for done in computed])

    def _dump(
        self,
        computed: Sequence[Computed],
        micro_batches: Sequence[Sequence[int]],
        rollouts: Rollouts,
        objective: ObjectiveConfig,
    ) -> None:
        """Write the tensors of all ranks' micro-batches."""
        ranks = self.ranks
        parts = [
            step_tensors(micro.loss, micro.logprobs, micro.entropy, micro.weights, micro.terms)
            for micro in computed
        ]
        flat = {f"{i}/{name}": one for i, part in enumerate(parts) for name, one in part.items()}
        told = zip(ranks.gather_tensors(flat), ranks.gather(list(micro_batches)), strict=True)
        tensors: list[dict[str, Tensor]] = []
        rows: list[Sequence[int]] = []
        for of_rank, its_rows in told:
            rows += its_rows
            tensors += [{} for _ in its_rows]
            first = len(tensors) - len(its_rows)
            for name, tensor in of_rank.items():
                number, _, field = name.partition("/")
                tensors[first + int(number)][field] = tensor
        with ranks.together():
            if ranks.first:
                write_step(
                    self.folder,
                    self.step + 1,
                    tensors,
                    rows,
                    rollouts.samples,
                    rollouts.prompts,
                    self.config,
                    objective,
                )

    def finish_step(
        self,
        rollouts: Rollouts,
        loss: float,
        grad_norm: Tensor,
        learning_rate: float,
    ) -> None:
        """Log an optimizer step, and the completions of a new rollout in completions.jsonl."""
        samples, step = rollouts.samples, self.step + 1
        new = rollouts.update_of(self.step) == 0
        prompts = [len(rollouts.prompts[sample.group].input_ids) for sample in samples]
        completions = [len(sample.ids) for sample in samples]
        self.count_tokens(sum(prompts) + sum(completions) if new else 0)
        self.add({"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate})
        if new:
            rows = completion_rows(samples, self.config.instruction.name, self.config.answer_format)
            self.log.append_jsonl("completions.jsonl", rows, step=step)
            if self.ranks.first:
                show_samples(self.log, samples, step)
        reward = sum(sample.reward for sample in samples) / len(samples)
        self.step_done(epoch=rollouts.epoch_after(step), shown={"reward": reward, "loss": loss})

    def watch(self, logged: Mapping[str, float]) -> None:
        """Check the conditions on what was just logged, and say and keep each that became true."""
        if self.step == self.config.logging_steps:
            check_watched(self.config, logged)
        self.warn(self.monitors.check(logged))

    def note_evaluation(self, rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
        """Keep what an evaluation measured in evaluations.jsonl, and say each note once.

        A resumed run says them again: it has another console.
        """
        self.log.append_jsonl("evaluations.jsonl", rows, self.step)
        for note in notes:
            if note not in self._noted:
                self._noted.add(note)
                self.write(note)


def next_command(recipes: Sequence[str], folder: Path, train_file: Sequence[str]) -> str:
    """Write the command that evaluates the run, with NAME=FILE for the user to fill in.

    recipes, train_file: of the run.
    """
    files = ["--data_file", "NAME=FILE"]
    if set(recipes) & set(DEMO_RECIPES) and is_demo(train_file):
        files = [
            "--data_file",
            *(f"{name}=demo:{name}" for name in ("test-a", "test-a2", "test-b")),
        ]
    command = ["python", "-m", "eval.evaluate", "--adapter_name_or_path", str(folder), *files]
    return shlex.join(command)
