"""Train by GRPO against a verifiable reward: Eq. 2 of ChexReason (arXiv 2512.23090).

    python run_grpo.py      # goes on from the newest finished SFT run of the embedded demo
    python run_grpo.py --recipe NAME --adapter_name_or_path runs/... --train_file rl.jsonl

The loop is `train`, in eight blocks: 1 prompts, 2 completions, 3 rewards, 4 reference and old
log-probabilities, 5 advantages, 6 the update, 7 logs, 8 evaluation and checkpoint. The objective is
rl/objective.py, the rewards are rl/rewards.py, the settings rl/settings.py.
"""

from __future__ import annotations

import sys

from engine.config import Resolved, recipes_of
from engine.runtime import accepted_by_first, main_guard, read_by_first
from engine.settings import data_specs
from rl.settings import GRPOConfig, check_dump_step, resolve_grpo, warnings

if __name__ == "__main__":  # --help and mistakes are answered before torch is loaded
    RESOLVED = accepted_by_first(resolve_grpo)

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from data.files import DataError
from data.sets import DataSets, bad_image_counts, data_line, load_data_sets
from engine.card import write_run_card
from engine.device import pick_device, seed_everything
from engine.fit import advise_training, fitted
from engine.optim import build_optimizer, clip_gradients, scheduled_rate, whole_step
from engine.policy import Policy, policy_with_reference
from engine.preview import banner, dry_run_report, only_described, show_prompts
from engine.ranks import Ranks, on_this_rank
from engine.resume import checkpoint_to_resume, training_record
from engine.run import Schedule, TrainerState, opened_run
from engine.saving import load_best_adapter, restore, save_final_adapter, save_training_checkpoint
from engine.time_limit import end_process
from eval.decode import Decoding, evaluate_sets
from eval.run_summary import end_of_run
from eval.scores import evaluated_metrics
from eval.since_start import keep_start, since_start_on_all
from rl.evaluation import record_evaluation, rewards_of
from rl.monitors import Monitors
from rl.objective import ObjectiveConfig, group_advantages, grpo_loss, token_weights
from rl.plan import BatchPlan, total_steps
from rl.reward_choice import build_rewards, with_reward_code
from rl.rollout import Rollouts
from rl.run import Computed, GRPORun, next_command, restore_rollouts, saved_rollouts, start_of


def train(
    run: GRPORun,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    objective: ObjectiveConfig,
    config: GRPOConfig,
) -> None:
    """Optimise the policy until the run ends.

    objective: the settings of Eq. 2. config: all others.

    R completions of a rollout, N of a micro-batch, T completion tokens (padded). Lines that begin
    with `run.` are book-keeping: without them the same model is trained.
    """
    ranks = run.ranks
    while run.goes_on():  # 8 evaluates and saves what is due; False at the end or at a signal
        update = rollouts.update_of(run.step)  # 0 begins a new rollout, the next learn from it too

        # 1 take prompts: their tokens, and the frozen vision tower's features of their images.
        #   Later updates have them already, but for the first step after a resume
        rollouts.take(run.step, policy, run.should_stop)

        if update == 0:
            # 2 sample G completions of each prompt
            completions = rollouts.sample(policy, run.should_stop)
            # 3 decode, parse and reward them: all rewards are logged, one is trained on
            rollouts.reward(completions, policy, run.should_stop)
            # 4 log pi_ref of all, and log pi_old for later updates: the first computes its own
            rollouts.score(policy, run.should_stop, with_reference=objective.beta > 0)
            # 5 advantages A_i, within each prompt's group; kl and config are for forks
            rewards, groups, kl = rollouts.rewards, rollouts.groups, rollouts.kl  # [R]
            scale, hospitals = objective.scale_rewards, rollouts.hospitals  # hospitals [R]
            advantages = group_advantages(
                rewards, groups, scale, kl=kl, config=objective, hospitals=hospitals
            )
            rollouts.set_advantages(advantages)
            run.log_rollout(rollouts)

        # 6 one optimizer step: forward and backward of each micro-batch of this rank, weighted by
        #   totals of the whole step. Where memory runs out, all of it again in smaller ones
        totals = rollouts.totals(update)
        policy.net.train()  # for gradient checkpointing; dropout is 0

        def backward(rows: list[int]) -> Computed:
            micro = rollouts.micro_batch(rows, policy)  # rows of the rollout
            logprobs, entropy = policy.logprobs_and_entropy(micro.batch)  # [N,T]
            # in the first update the policy is still the one that sampled
            old_logprobs = logprobs.detach() if update == 0 else micro.old_logprobs  # [N,T]
            weights = token_weights(micro.mask, objective.loss_type, **totals)  # [N,T]
            loss, terms = grpo_loss(
                logprobs,
                old_logprobs,
                micro.ref_logprobs if objective.beta > 0 else None,
                micro.advantages,
                micro.mask,
                weights,
                objective,
                sampling_logprobs=micro.sampling_logprobs,
                entropy=entropy,
            )
            loss.backward()
            return Computed.of(loss, logprobs, entropy, weights, terms, micro)

        step, stop = rollouts.rows(update), run.should_stop
        undo = [run.mark(), optimizer.zero_grad, lambda: rollouts.score_again(update, policy)]
        with ranks.together():  # what one rank raises all raise, before gradients are summed
            micro_batches, computed = policy.limits.each("update", step, backward, undo, stop)
        if update == 0:  # for the logs, and for a second pass over the rollout
            rollouts.keep_old(micro_batches, [done.logprobs for done in computed])
        step_loss = run.log_update(computed, micro_batches, rollouts, objective)
        ranks.sum_gradients(policy.parameters)
        grad_norm = clip_gradients(policy.parameters, config.max_grad_norm)
        learning_rate = scheduled_rate(config, run.step, run.total)
        if run.accepts(grad_norm, step_loss, rollouts.examples):  # both are finite
            whole_step(optimizer, learning_rate, run.step + 1, run.can_take_back, policy.limits)
        optimizer.zero_grad()

        # 7 log, write completions
        run.finish_step(rollouts, step_loss, grad_norm, learning_rate)


def evaluate_policy(
    policy: Policy,
    data: DataSets,
    rollouts: Rollouts,
    folder: Path,
    should_stop: Callable[[], bool],
    step: int,
) -> dict[str, dict[str, float]]:
    """Decode every evaluated set greedily and score it -> {set: its metrics}.

    Rewards are computed, nothing is observed. step: of the adapter. Step 0 is kept, with a vote.
    """
    config, names = rollouts.config, list(data.evaluated)
    notes = bad_image_counts(names, data.bad_images)
    decode = partial(
        evaluate_sets,
        policy,
        data.evaluated,
        baseline_examples=data.train,
        annotate=rewards_of(config, rollouts.reward_functions, should_stop),
        notes={name: {"step": step} | note for name, note in notes.items()},
        should_stop=should_stop,
        ranks=rollouts.ranks,
    )
    scores = decode(Decoding.greedy(config), folder)
    if step == 0:
        vote = partial(decode, Decoding.greedy(config).voting(config))
        keep_start(folder, names, vote if config.vote_baseline else None, rollouts.ranks)
    return {name: evaluated_metrics(of_set) for name, of_set in scores.items()}


def run_command(resolved: Resolved, ranks: Ranks) -> int:
    """Make, resume or preview the run that the settings describe, and return the exit code."""
    config: GRPOConfig = resolved.configs[0]
    objective: ObjectiveConfig = resolved.configs[1]
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint)
    for line in warnings(config, objective):
        print(f"warning: {line}", file=sys.stderr)
    seed_everything(config.seed)
    device = pick_device(config.num_threads, ranks, config.tf32)

    # data
    begun = checkpoint.record("config.json") if checkpoint else None
    files, root = data_specs(config), config.image_root
    load = partial(load_data_sets, files, root, config.bad_images, begun, config.label_set)
    data = ranks.first_then_others(load)  # the demo's are drawn first
    rollouts = Rollouts(data.train, build_rewards(config, data.train), config, ranks)
    plan, total = rollouts.plan, rollouts.plan.total_steps(len(data.train))
    check_dump_step(resolved, total, checkpoint.step if checkpoint else 0)
    if config.show_batch:
        return show_prompts(config, data.train, plan.prompts, sys.stdout)

    # policy and optimizer
    batches = partial(BatchPlan.of, ranks=ranks.size)
    start = ranks.first_then_others(lambda: start_of(config, checkpoint))
    lines = [data_line(data, config.hospital_weights)]
    lines += rollouts.lines()
    sets = data.train, data.evaluated
    if only_described(config, start.adapter, *sets, lines, plan):
        return 0
    resolved = fitted(resolved, device, *sets, start.adapter, batches, ranks=ranks)
    config = resolved.configs[0]
    rollouts.settle(config)
    note = partial(training_record, resolved, "grpo", data, checkpoint, total_steps, ranks.size)
    record = ranks.on_first(lambda: with_reward_code(note(), config, begun))
    temperature, limits = config.temperature, rollouts.limits
    policy = policy_with_reference(config, device, start.adapter, temperature, limits, ranks)
    advise_training(limits, config, device, *sets, start.adapter, batches, ranks)
    optimizer = build_optimizer(
        policy.net, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    monitors = Monitors.of(config)
    if config.dry_run:
        print(banner("GRPO", "dry run", policy, start.about, lines, resolved))
        print(dry_run_report(config, policy, *sets, plan, ranks))
        return 0

    # run
    state = TrainerState()
    if checkpoint is not None:
        state = restore(checkpoint, policy, optimizer)
        restore_rollouts(checkpoint, rollouts, monitors, policy.encoder.decode)
    where = config.output_dir, checkpoint, record, data.bad_images, state
    with opened_run("grpo", *where, start.keep(policy), ranks) as folder:
        print(banner("GRPO", folder.path, policy, start.about, lines, resolved), flush=True)

        def save(timed: bool = False) -> None:
            files = saved_rollouts(rollouts, monitors, run.step) | {"timed": timed}
            limit = config.save_total_limit
            save_training_checkpoint(folder, state, policy, optimizer, record, limit, **files)

        def evaluate() -> None:
            chosen, stop = config.metric_for_best_model, run.should_stop
            metrics = evaluate_policy(policy, data, rollouts, folder.path, stop, run.step)
            since = since_start_on_all(ranks, folder.path, list(metrics))
            run.note_evaluation(since.rows, since.notes)
            run.warn(monitors.check(record_evaluation(metrics, since.gaps, run.log, state, chosen)))

        schedule = Schedule.of(config, total, config.eval_steps, eval_at_start=True)
        run = GRPORun(folder, state, schedule, rollouts, monitors, save=save, evaluate=evaluate)
        run.begin(policy)
        with run:
            train(run, policy, optimizer, rollouts, objective, config)
            if run.finished:
                finish(run, policy, data, rollouts, recipes_of(record))
        return run.exit_code


def finish(
    run: GRPORun, policy: Policy, data: DataSets, rollouts: Rollouts, recipes: Sequence[str]
) -> None:
    """Save the final adapter, see that the folder's scores are its own, and show them."""
    ranks, state, choose = run.ranks, run.state, rollouts.config.load_best_model_at_end
    best = load_best_adapter(run.folder, state, policy) if choose else None
    ranks.on_first(lambda: save_final_adapter(run.folder, state, policy))
    if best not in (None, f"checkpoint-{run.step}"):
        step = int(best.rpartition("-")[2])
        evaluate_policy(policy, data, rollouts, run.folder, run.should_stop, step)

    def show() -> None:
        write_run_card(run.folder)
        summary = end_of_run(run.folder, list(data.evaluated), state.best_model_checkpoint)
        command = next_command(recipes, run.folder, rollouts.config.train_file)
        print(f"\n{summary}\n\nnext: {command}")

    ranks.on_first(show)


def take_part(resolved: Resolved | None) -> int:
    """Run what rank 0 has read, which the others are told, and return the exit code."""
    return on_this_rank(run_command, resolved, GRPOConfig, ObjectiveConfig)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit code."""
    return take_part(read_by_first(resolve_grpo, sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    end_process(main_guard(lambda: take_part(RESOLVED), errors=(DataError,), of_ranks=True))
