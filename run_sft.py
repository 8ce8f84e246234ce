"""Fine-tune on teacher reasoning traces with LoRA: Eq. 1 of ChexReason (arXiv 2512.23090).

    python run_sft.py      # the embedded demo, a few minutes on a CPU
    python run_sft.py --recipe NAME --train_file sft.jsonl --validation_file val=val.jsonl

    L_SFT = - sum_j log pi(t*_j | x, t*_<j)      over the answer's tokens and its end-of-turn,
                                                 the prompt and the image are not scored

Each optimizer step divides the sum by the number of supervised tokens of the WHOLE step, so neither
the micro-batch size nor the accumulation changes the gradient. The loop is `train`, top to bottom.
"""

from __future__ import annotations

import sys

from engine.config import Resolved, recipes_of
from engine.runtime import StopRequested, accepted_by_first, main_guard, read_by_first
from engine.settings import SFTConfig, data_specs, resolve_sft

if __name__ == "__main__":  # --help and mistakes are answered before torch is loaded
    RESOLVED = accepted_by_first(resolve_sft)

from collections.abc import Callable
from functools import partial

import torch

from data.examples import Example
from data.files import DataError
from data.sets import (
    SFTDataSets,
    bad_image_counts,
    data_line,
    in_chunks,
    load_data_sets,
    with_answers_to_learn,
)
from engine.card import write_run_card
from engine.charts import sft_charts
from engine.collate import Rows, collate_rows
from engine.device import pick_device, seed_everything
from engine.fit import advise_training, fitted
from engine.logprobs import predicted_correctly, token_logprobs
from engine.optim import build_optimizer, clip_gradients, scheduled_rate, whole_step
from engine.order import Order
from engine.policy import Policy, encoder_for, policy_to_fine_tune
from engine.preview import banner, dry_run_report, only_described, show_answers
from engine.random_numbers import dropout_numbers
from engine.ranks import ALONE, Ranks, on_this_rank
from engine.resume import checkpoint_to_resume, training_record
from engine.run import Run, Schedule, TrainerState, next_command, opened_run
from engine.saving import load_best_adapter, restore, save_final_adapter, save_training_checkpoint
from engine.tracking import MetricAccumulator
from eval.decode import Decoding, evaluate_sets
from eval.scores import evaluated_metrics, format_scores


def train(
    run: Run,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    config: SFTConfig,
) -> None:
    """Fit the policy to the examples' answers until the run ends.

    Lines that begin with `run.` are book-keeping: without them the same model is trained.
    """
    ranks, order = run.ranks, Order(examples, config.hospital_weights, config.seed)
    steps_per_epoch = config.steps_per_epoch(len(examples), ranks.size)
    step_size, micro_batch = config.step_size(ranks.size), config.per_device_train_batch_size
    while run.goes_on():  # validates and saves what is due; False at the end or at a signal
        # 1 take examples: epochs, each in an order of its own
        chosen = order.of_step(run.step, steps_per_epoch, step_size)
        following = order.of_step(run.step + 1, steps_per_epoch, step_size)
        # of several ranks each has a share of every step, in whole micro-batches
        own = ranks.share(len(chosen), micro_batch)
        with ranks.together():
            rows = [policy.encode_answer(chosen[i]) for i in run.polled(own)]
        policy.expect(following[i] for i in ranks.share(len(following), micro_batch))

        # 2 one optimizer step: its total, then forward and backward of each micro-batch. Where
        #   memory runs out, all of it again in smaller ones. The ranks' gradients are added up
        tokens = ranks.gather(sum(int(row.completion_mask.sum()) for row in rows))
        supervised_tokens, measured = sum(tokens), MetricAccumulator()
        policy.net.train()  # with dropout, and for gradient checkpointing

        def backward(indices: list[int]) -> torch.Tensor:
            dropout_numbers(config.seed, run.step, own.start + indices[0])
            micro = [rows[i] for i in indices]
            batch = collate_rows(micro, policy.encoder.pad_token_id).to(policy.device)
            hidden, targets = policy.hidden_states(batch)  # [K,H], [K]
            logprobs, _ = token_logprobs(hidden, policy.head, targets, softcap=policy.softcap)
            loss = -logprobs.sum() / supervised_tokens  # Eq. 1; micro-batches add up to the step's
            loss.backward()
            correct = predicted_correctly(hidden, policy.head, targets).float()
            measured.add("mean_token_accuracy", correct.mean(), weight=len(targets))
            return loss.detach()

        undo = [run.mark(), measured.mark(), optimizer.zero_grad]
        step = Rows(rows, micro_batch)
        with ranks.together():  # what one rank raises all raise, before gradients are added up
            _, losses = policy.limits.each("update", step, backward, undo, run.should_stop)
        run.merge(measured)
        step_loss = run.total_loss(losses)

        ranks.sum_gradients(policy.parameters)
        grad_norm = clip_gradients(policy.parameters, config.max_grad_norm)
        learning_rate = scheduled_rate(config, run.step, run.total)
        if run.accepts(grad_norm, step_loss, chosen):  # both are finite
            whole_step(optimizer, learning_rate, run.step + 1, run.can_take_back, policy.limits)
        optimizer.zero_grad()

        # 3 log
        run.metrics.add("loss", step_loss, weight=supervised_tokens)
        run.add({"grad_norm": grad_norm, "learning_rate": learning_rate})
        read = sum(len(row.prompt.input_ids) + len(row.completion_ids) for row in rows)
        run.count_tokens(sum(ranks.gather(read)))
        run.step_done(epoch=(run.step + 1) / steps_per_epoch, shown={"loss": step_loss})


@torch.no_grad()
def validation_metrics(
    policy: Policy,
    examples: list[Example],
    config: SFTConfig,
    should_stop: Callable[[], bool],
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Measure loss (nats a token) and token accuracy on the validation set, without dropout.

    Both are over all supervised tokens. Raises StopRequested once should_stop says so.
    """
    policy.net.eval()
    metrics, own = MetricAccumulator(), [examples[i] for i in ranks.share(len(examples))]
    policy.expect(own)
    with ranks.together():
        for chunk in in_chunks(own, config.per_device_eval_batch_size):
            if should_stop():
                raise StopRequested
            rows = [policy.encode_answer(example) for example in chunk]

            def measure(indices: list[int]) -> None:
                batch = collate_rows([rows[i] for i in indices], policy.encoder.pad_token_id)
                hidden, targets = policy.hidden_states(batch.to(policy.device))  # [K,H], [K]
                logprobs, _ = token_logprobs(hidden, policy.head, targets, softcap=policy.softcap)
                metrics.add("loss", -logprobs.mean(), weight=len(targets))
                correct = predicted_correctly(hidden, policy.head, targets).float()
                metrics.add("mean_token_accuracy", correct.mean(), weight=len(targets))

            policy.limits.each("validation", Rows(rows, len(rows)), measure, [metrics.mark()])
    return metrics.collect_all(ranks.gather)


def run_command(resolved: Resolved, ranks: Ranks) -> int:
    """Make, resume or preview the run that the settings describe, and return the exit code."""
    config: SFTConfig = resolved.configs[0]
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint)
    seed_everything(config.seed)
    device = pick_device(config.num_threads, ranks, config.tf32)

    # data
    begun = checkpoint.record("config.json") if checkpoint else None
    files, root = data_specs(config), config.image_root
    load = partial(load_data_sets, files, root, config.bad_images, begun, config.label_set)
    sets = ranks.first_then_others(load)  # the demo's are drawn first
    data = with_answers_to_learn(
        sets, config.answer_format, validation_split=config.validation_split, seed=config.seed
    )
    if config.show_batch:
        return show_answers(config, data.train, sys.stdout)
    encoder = encoder_for(config, data.train + data.validation)  # which checks all answers
    evaluated = {"validation": data.validation} | data.evaluated
    adapter = None if checkpoint else config.adapter_name_or_path
    size, weights = len(data.train), config.hospital_weights
    lines = [data_line(data, weights), config.batch_line(size, ranks.size)]
    if only_described(config, adapter, data.train, evaluated, lines):
        return 0
    resolved = fitted(resolved, device, data.train, evaluated, adapter, None, encoder, ranks)
    config = resolved.configs[0]
    count = SFTConfig.total_steps
    note = partial(training_record, resolved, "sft", data, checkpoint, count, ranks.size)
    record = ranks.on_first(note)

    # policy and optimizer
    policy = policy_to_fine_tune(config, device, checkpoint, encoder, ranks)
    advise_training(policy.limits, config, device, data.train, evaluated, adapter, ranks=ranks)
    for example in data.train[:1] + data.validation[:1]:
        policy.encode_answer(example)  # a wrong image path shows now, not after an epoch
    optimizer = build_optimizer(
        policy.net, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    about = f"LoRA of rank {config.lora_r}"
    if config.dry_run:
        print(banner("SFT", "dry run", policy, about, lines, resolved))
        print(dry_run_report(config, policy, data.train, evaluated, ranks=ranks))
        return 0

    # run
    state = TrainerState() if checkpoint is None else restore(checkpoint, policy, optimizer)
    where = config.output_dir, checkpoint, record, data.bad_images, state
    with opened_run("sft", *where, ranks=ranks) as folder:
        print(banner("SFT", folder.path, policy, about, lines, resolved), flush=True)

        def validate() -> None:
            stop = run.should_stop
            scores = validation_metrics(policy, data.validation, config, stop, ranks)
            run.log.scalars(run.step, scores, split="eval", epoch=state.epoch)
            better = state.record_evaluation(scores["loss"], greater_is_better=False)
            run.write(
                f"epoch {state.epoch:.2f}: validation loss {scores['loss']:.4f}, token accuracy"
                f" {scores['mean_token_accuracy']:.3f}" + (" (best so far)" if better else "")
            )

        def save(timed: bool = False) -> None:
            limit = config.save_total_limit
            save_training_checkpoint(folder, state, policy, optimizer, record, limit, timed=timed)

        steps = config.total_steps(size, ranks.size)
        in_epoch = config.steps_per_epoch(size, ranks.size)
        patience = config.early_stopping_patience
        schedule = Schedule.of(config, steps, eval_steps=in_epoch, patience=patience)
        run = Run(folder, state, schedule, title="SFT", save=save, evaluate=validate)
        run.begin(policy)
        run.log.charts("SFT", sft_charts(list(data.evaluated)))
        recipes, by_flag = recipes_of(record), resolved.origins["model_name_or_path"] == "flag"
        model = config.model_name_or_path if recipes and by_flag else None
        command = next_command(recipes, folder.path, model, config.train_file)
        with run:
            train(run, policy, optimizer, data.train, config)
            if run.finished:
                finish(run, policy, data, config, command)
        return run.exit_code


def finish(run: Run, policy: Policy, data: SFTDataSets, config: SFTConfig, command: str) -> None:
    """Save the best epoch's adapter as the final one, score it, and say what to run next."""
    if run.stopped:
        print(f"stopped early: {run.stopped}", file=sys.stderr)
    best = load_best_adapter(run.folder, run.state, policy)
    run.ranks.on_first(lambda: save_final_adapter(run.folder, run.state, policy))
    print(
        f"final adapter: that of {best}, validation loss {run.state.best_metric:.4f}"
        if best
        else "final adapter: the last one, since no validation loss was a number"
    )
    stage = f"SFT ({best.rpartition('-')[2] if best else run.step})"
    left_out = bad_image_counts(data.evaluated, data.bad_images)
    scores = evaluate_sets(
        policy,
        data.evaluated,
        Decoding.greedy(config),
        run.folder,
        baseline_examples=data.train,
        notes={name: note | {"stage": stage} for name, note in left_out.items()},
        should_stop=run.should_stop,
        ranks=run.ranks,
    )
    run.ranks.on_first(lambda: write_run_card(run.folder))
    run.log_scores({name: evaluated_metrics(of_set) for name, of_set in scores.items()})
    print(f"\n{format_scores(scores)}\n\nnext: {command}")


def take_part(resolved: Resolved | None) -> int:
    """Run what rank 0 has read, which the others are told, and return the exit code."""
    return on_this_rank(run_command, resolved, SFTConfig)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit code."""
    return take_part(read_by_first(resolve_sft, sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main_guard(lambda: take_part(RESOLVED), errors=(DataError,), of_ranks=True))
