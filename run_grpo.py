"""GRPO against a verifiable reward: Eq. 2 of ChexReason (arXiv 2512.23090), from an SFT adapter.

    python run_grpo.py                                           # continues the newest finished SFT
    run of the embedded demo
    python run_grpo.py --recipe medgemma-4b-free-reasoning --adapter_name_or_path runs/...
    --train_file rl.jsonl

The objective is rl/objective.py, the rewards are rl/rewards.py, the settings rl/settings.py. The
loop is in `train`, in eight blocks: 1 prompts, 2 completions, 3 rewards, 4 old and reference
log-probabilities, 5 advantages, 6 the update, 7 logs, 8 evaluation and checkpoint.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data.examples import Example, data_file, read_jsonl
from data.files import DataError, write_json
from data.prompts import PROMPTS
from engine.checkpoint import clean_leftovers, set_later_checkpoints_aside
from engine.config import Resolved, describe, parse_config
from engine.forward import completion_logprobs
from engine.generate import SamplingConfig, generate
from engine.model import (
    EMBEDDED,
    LoadedModel,
    add_reference,
    attach_adapter,
    compile_decoder,
    enable_gradient_checkpointing,
)
from engine.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    set_learning_rate,
    trainable_parameters,
)
from engine.preview import dry_run_report, show_prompts
from engine.run import (
    FREE_TO_CHANGE,
    TrainerState,
    bad_image_counts,
    bad_images_line,
    bring_logs,
    check_same_reference,
    continued_record,
    find_checkpoint,
    inherited_settings,
    keep_reference,
    load_best_adapter,
    restore,
    run_folder,
    run_record,
    save_final_adapter,
    save_training_checkpoint,
    shuffled,
    usable_examples,
    write_bad_images,
)
from engine.runtime import (
    SignalGuard,
    environment_banner,
    lock_run,
    main_guard,
    pick_device,
    seed_everything,
)
from engine.settings import load_base
from engine.tracking import MetricAccumulator, Progress, RunLogger
from eval.evaluate import evaluate_sets, format_progress
from rl.dump import step_tensors, write_step
from rl.logs import (
    completion_rows,
    mean_rewards,
    mismatch_metrics,
    pack_samples,
    record_evaluation,
    rollout_metrics,
    show_samples,
    unpack_samples,
    with_rewards,
)
from rl.monitors import HACKING_CHART, Monitors
from rl.objective import ObjectiveConfig, grpo_loss, objective_metrics, token_weights
from rl.rewards import RewardFunction
from rl.rollout import (
    Sample,
    build_samples,
    collate_samples,
    plan_micro_batches,
    score_samples,
    with_advantages,
    with_old,
)
from rl.settings import (
    SET_METRICS,
    GRPOConfig,
    batch_arithmetic,
    build_rewards,
    check_dump_step,
    check_watched,
    from_sft_run,
    length_warning,
    problems,
    prompts_per_rollout,
    total_steps,
    updates_per_rollout,
    warnings,
)


def train(
    config: GRPOConfig,
    objective: ObjectiveConfig,
    model: LoadedModel,
    wrapped,
    examples: list[Example],
    reward_functions: dict[str, RewardFunction],
    monitors: Monitors,
    sampler: torch.Generator,
    log: RunLogger,
    state: TrainerState,
    optimizer: torch.optim.Optimizer,
    samples: list[Sample],
    guard: SignalGuard,
    evaluate: Callable[[], None],
    save: Callable[[list[Sample]], None],
) -> None:
    """The loop, from state.global_step to the end or a signal. `samples`: the rollout that a
    resumed run is in the middle of, or [].
    """
    device, prompt, pad = (
        next(wrapped.parameters()).device,
        PROMPTS[config.prompt],
        model.encoder.pad_token_id,
    )
    parameters = [parameter for _, parameter in trainable_parameters(wrapped)]
    sampling = SamplingConfig(config.temperature, config.top_p, config.max_completion_length)
    steps, updates, num_prompts = (
        total_steps(config, len(examples)),
        updates_per_rollout(config),
        prompts_per_rollout(config),
    )
    plan = partial(
        plan_micro_batches,
        size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        max_tokens=config.max_tokens_per_forward,
    )
    metrics = MetricAccumulator(state.unlogged_metrics)
    bar = Progress(steps, initial=state.global_step, description="GRPO")
    state.log_history = log.log_history
    prompts, remembering = [], reward_functions | {"monitors": monitors}
    # the start, or one that was cut short
    evaluate_when_due(config, state, steps, guard, evaluate, lambda: save(samples))

    while state.global_step < steps and guard.stop is None and monitors.stopped is None:
        started = time.perf_counter()
        rollout, update = divmod(state.global_step, updates)

        # 1 take prompts: a stream of epochs, each in an order of its own
        if update == 0 or not prompts:
            positions = [
                divmod(position, len(examples))
                for position in range(rollout * num_prompts, (rollout + 1) * num_prompts)
            ]
            orders = {epoch: shuffled(len(examples), epoch, config.seed) for epoch, _ in positions}
            chosen = [examples[orders[epoch][index]] for epoch, index in positions]
            try:
                # with the frozen tower's features
                prompts = [model.encode_prompt(example, prompt) for example in chosen]
            except DataError:
                # a damaged image in the middle of a run: nothing of this step has happened yet
                save(samples)
                raise

        if update == 0:
            # 2 sample G completions each; a rollout that a signal cuts short is as if it had never
            # begun
            before = (
                sampler.get_state(),
                {name: part.state_dict() for name, part in remembering.items()},
            )
            try:
                completions = generate(
                    wrapped,
                    model,
                    prompts,
                    sampling,
                    num_generations=config.num_generations,
                    generator=sampler,
                    should_stop=lambda: guard.stop is not None,
                )
            except KeyboardInterrupt:
                if guard.stop is None:
                    raise
                sampler.set_state(before[0])
                break
            # 3 rewards: all are computed and logged, one is trained on
            samples = build_samples(
                chosen,
                completions,
                model.encoder.decode,
                reward_functions,
                config.reward,
                answer_format=config.answer_format,
                mask_truncated_completions=config.mask_truncated_completions,
            )
            if rollout == 0 and (warning := length_warning(config, samples)):
                bar.write(f"warning: {warning}")
            for function in reward_functions.values():
                function.observe(sample.answer for sample in samples)
            # 4 reference and old log-probabilities, on the micro-batches of the updates below; the
            # first update finds its own old ones
            samples = score_samples(
                wrapped,
                model,
                samples,
                prompts,
                plan(samples, prompts),
                temperature=config.temperature,
                with_reference=objective.beta > 0,
            )
            # 5 advantages, within each prompt's group; a completion's KL is known by now, for a
            # fork's reward
            samples = with_advantages(samples, objective)
            for name, value in (rollout_metrics(samples) | monitors.observe(samples)).items():
                metrics.add(name, value)
            metrics.add("time/rollout", time.perf_counter() - started)

        # 6 one update: log-probabilities, loss and backward of each micro-batch, then clip,
        # learning rate, step the same for every pass, so that the ratio is exactly 1 at first
        of_pass = plan(samples, prompts)
        # the next iteration over the rollout starts again at its first step
        of_this_step = of_pass[update % len(of_pass)]
        # totals of the whole optimizer step
        num_completions = sum(len(indices) for indices in of_this_step)
        num_tokens = sum(int(samples[i].mask.sum()) for indices in of_this_step for i in indices)
        computed, to_dump = [], []
        wrapped.train()  # for gradient checkpointing; dropout is 0
        for indices in of_this_step:
            micro = collate_samples([samples[i] for i in indices], prompts, pad, device)
            logprobs, entropy = completion_logprobs(
                wrapped,
                model.family,
                micro.batch,
                temperature=config.temperature,
                # [N,T]
                suppress_token_ids=model.suppressed_ids,
                entropy=True,
            )
            if update == 0:  # the policy is still the one that sampled
                micro = replace(micro, old_logprobs=logprobs.detach())
            weights = token_weights(
                micro.mask,
                objective.loss_type,
                num_completions=num_completions,
                num_tokens=num_tokens,
                max_completion_length=config.max_completion_length,
            )
            loss, terms = grpo_loss(
                logprobs,
                micro.old_logprobs,
                micro.ref_logprobs if objective.beta > 0 else None,
                micro.advantages,
                micro.mask,
                weights,
                objective,
                sampling_logprobs=micro.sampling_logprobs,
                entropy=entropy,
            )
            loss.backward()
            detached = {name: term.detach() for name, term in terms.items()}
            computed.append(
                (
                    loss.detach(),
                    detached,
                    entropy.detach(),
                    micro.advantages,
                    micro.mask,
                    logprobs.detach(),
                )
            )
            if state.global_step + 1 == config.dump_step:
                to_dump.append(step_tensors(loss, logprobs, entropy, weights, terms))
        # only now: to read a number is to wait for the GPU
        for _, terms, entropy, advantages, mask, _ in computed:
            metrics.add_all(objective_metrics(terms, advantages, mask, objective))
            if mask.any():
                metrics.add("entropy", entropy[mask].mean(), weight=int(mask.sum()))
        step_loss = sum(float(loss) for loss, *_ in computed)
        if update == 0:
            for indices, (*_, logprobs) in zip(of_this_step, computed, strict=True):
                samples = with_old(samples, indices, logprobs)
            for name, value in mismatch_metrics(samples).items():
                metrics.add(name, value)
        if to_dump:  # before the gradient is looked at, so that a step that fails can be seen too
            write_step(
                log.run_dir,
                state.global_step + 1,
                to_dump,
                of_this_step,
                samples,
                prompts,
                config,
                objective,
            )

        grad_norm = clip_gradients(parameters, config.max_grad_norm)
        if not torch.isfinite(grad_norm):
            optimizer.zero_grad()
            if update == 0:  # as if the rollout had never begun
                sampler.set_state(before[0])
                for name, part in remembering.items():
                    part.load_state_dict(before[1][name])
            save(samples)
            raise RuntimeError(
                f"the gradient of step {state.global_step + 1} is not finite; the state before it"
                f" was saved. Prompts: {', '.join(example.id for example in chosen)}"
            )
        learning_rate = learning_rate_at(
            state.global_step,
            base=config.learning_rate,
            warmup_steps=math.ceil(config.warmup_ratio * steps),
            total_steps=steps,
        )
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        # 7 log, write completions
        state.global_step += 1
        state.epoch = (rollout + (update + 1) / updates) * num_prompts / len(examples)
        state.num_tokens += sum(len(sample.ids) for sample in samples) if update == 0 else 0
        metrics.add("num_tokens", state.num_tokens, reduction="max")
        metrics.add("loss", step_loss)
        metrics.add("grad_norm", grad_norm)
        metrics.add("learning_rate", learning_rate)
        metrics.add("step_time", time.perf_counter() - started)
        if update == 0:
            log.append_jsonl("completions.jsonl", completion_rows(samples), step=state.global_step)
            show_samples(log, samples[: config.num_generations], state.global_step)
        if state.global_step % config.logging_steps == 0 or state.global_step == steps:
            logged = metrics.collect()
            log.scalars(state.global_step, logged, epoch=state.epoch)
            if state.global_step == config.logging_steps:
                check_watched(config, logged)
            for line in monitors.check(logged):
                bar.write(line)
                log.warn(line, state.global_step)
        bar.update(
            {"reward": sum(sample.reward for sample in samples) / len(samples), "loss": step_loss}
        )

        # 8 evaluate, save
        state.unlogged_metrics = metrics.state_dict()
        end = state.global_step if monitors.stopped else steps
        evaluated = evaluate_when_due(config, state, end, guard, evaluate, lambda: save(samples))
        if not evaluated and config.save_steps and state.global_step % config.save_steps == 0:
            save(samples)
    if guard.stop is not None:
        save(samples)
    bar.close()


def evaluate_when_due(
    config: GRPOConfig,
    state: TrainerState,
    steps: int,
    guard: SignalGuard,
    evaluate: Callable[[], None],
    save: Callable[[], None],
) -> bool:
    """Evaluate at the start, every eval_steps and at the end; what a signal cuts short is done
    again when the run is resumed.
    """
    due = state.global_step in (0, steps) or (
        config.eval_steps and state.global_step % config.eval_steps == 0
    )
    if not due or state.evaluated_step == state.global_step or guard.stop is not None:
        return False
    save()  # first: an evaluation can be long, and can meet a damaged image
    try:
        evaluate()
    except KeyboardInterrupt:
        if guard.stop is None:
            raise
        return False
    state.evaluated_step = state.global_step
    save()
    return True


def evaluate_policy(
    config: GRPOConfig,
    model: LoadedModel,
    wrapped,
    sets: dict[str, list[Example]],
    reference: list[Example],
    reward_functions: dict[str, RewardFunction],
    run_dir: Path,
    guard: SignalGuard,
    bad_images: dict[str, list[dict]],
    step: int,
) -> dict[str, dict[str, float]]:
    """Greedy decoding of every set -> {set: its SET_METRICS}. Rewards are computed, but nothing is
    observed.
    """
    notes = {
        name: {"step": step} | note for name, note in bad_image_counts(sets, bad_images).items()
    }
    scores = evaluate_sets(
        wrapped,
        model,
        sets,
        PROMPTS[config.prompt],
        SamplingConfig(0.0, 1.0, config.max_completion_length),
        run_dir,
        batch_size=config.per_device_eval_batch_size,
        reference=reference,
        answer_format=config.answer_format,
        annotate=lambda rows: with_rewards(rows, reward_functions),
        extra=lambda rows: mean_rewards(rows, config.reward, reward_functions[config.reward]),
        should_stop=lambda: guard.stop is not None,
        notes=notes,
    )
    flat = {
        name: (
            score
            | {
                "macro_f1": score["macro"]["f1"],
                "micro_f1": score["micro"]["f1"],
                "completion_length": score["completion_length"]["mean"],
            }
        )
        for name, score in scores.items()
    }
    return {
        name: {
            key: value
            for key, value in score.items()
            if key in SET_METRICS or key.startswith("rewards/")
        }
        for name, score in flat.items()
    }


def banner(
    config: GRPOConfig,
    resolved: Resolved,
    model: LoadedModel,
    wrapped,
    examples: list[Example],
    sets: dict[str, list[Example]],
    bad_images: dict[str, list[dict]],
    run_dir: Path | str,
    device: torch.device,
) -> str:
    trainable = sum(parameter.numel() for _, parameter in trainable_parameters(wrapped))
    total = sum(parameter.numel() for parameter in model.base.parameters())
    return "\n".join(
        [
            f"GRPO -> {run_dir}",
            environment_banner(device),
            (
                f"model       {model.name} ({model.family.model_type}) with"
                f" {config.adapter_name_or_path}: {total:,} parameters with both adapters,"
                f" {trainable:,} trainable"
            ),
            f"data        {len(examples)} prompts; evaluated: "
            + (", ".join(f"{name} {len(s)}" for name, s in sets.items()) or "nothing")
            + bad_images_line(bad_images),
            *batch_arithmetic(config, len(examples)),
            "settings that differ from the paper's or the engine's defaults:",
            describe(resolved),
            "",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    resolved = parse_config(
        [GRPOConfig, ObjectiveConfig],
        sys.argv[1:] if argv is None else argv,
        script="grpo",
        prog="run_grpo.py",
        description=__doc__.splitlines()[0],
        validate=problems,
        default_recipe="demo",
        default_recipe_unless=("model_name_or_path", "adapter_name_or_path", "train_file"),
        inherit_with="resume_from_checkpoint",
        inherit=partial(inherited_settings, script="grpo"),
        free_to_change=FREE_TO_CHANGE,
    )
    named = resolved.configs[0].resume_from_checkpoint
    checkpoint, rejected = find_checkpoint(named) if named else (None, [])
    for line in rejected:
        print(f"passed over a damaged checkpoint: {line}", file=sys.stderr)
    resolved = from_sft_run(resolved) if checkpoint is None else resolved
    config, objective = resolved.configs
    for line in warnings(config, objective):
        print(f"warning: {line}", file=sys.stderr)

    seed_everything(config.seed)
    device = pick_device(config.num_threads)
    files = {"train": data_file(config.train_file)}
    files |= {
        name: data_file(spec)
        for name, _, spec in (entry.partition("=") for entry in config.validation_file)
    }
    sets = {name: read_jsonl(path, config.image_root) for name, path in files.items()}
    sets, bad_images = usable_examples(
        sets, config.bad_images, checkpoint.record("config.json") if checkpoint else None
    )
    examples = sets.pop("train")
    check_dump_step(resolved, len(examples), checkpoint.step if checkpoint else 0)
    if config.show_batch:
        return show_prompts(config, examples, prompts_per_rollout(config), sys.stdout)
    record = run_record(resolved, "grpo", files, bad_images)
    if checkpoint is not None:
        record = continued_record(checkpoint, record)
        record["reference"] = check_same_reference(checkpoint)
    model = load_base(config, device)
    source = (
        Path(config.adapter_name_or_path)
        if checkpoint is None
        else checkpoint.path.parent / "reference"
    )
    wrapped = attach_adapter(model, source, trainable=True)
    add_reference(wrapped, source)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(wrapped)
    if config.compile:
        compile_decoder(wrapped)
    optimizer = build_optimizer(
        wrapped, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    sampler = torch.Generator().manual_seed(config.seed)
    reward_functions = build_rewards(config, examples)
    monitors = Monitors(
        config.reward, config.max_completion_length, config.warn_when, config.stop_when
    )
    if config.dry_run:
        print(
            banner(config, resolved, model, wrapped, examples, sets, bad_images, "dry run", device)
            + dry_run_report(
                config,
                model,
                wrapped,
                examples,
                sets,
                prompts_per_rollout(config),
                config.num_generations,
            )
        )
        return 0

    run_dir = run_folder(checkpoint, config.output_dir, "grpo")
    with lock_run(run_dir), SignalGuard() as guard:
        clean_leftovers(run_dir)
        state, samples = TrainerState(), []
        if checkpoint is None:
            record["reference"] = keep_reference(source, run_dir)
        else:
            bring_logs(checkpoint, run_dir)
            set_later_checkpoints_aside(run_dir, checkpoint.step)
            state = restore(checkpoint, wrapped, optimizer, {"sampler": sampler})
            for name, function in reward_functions.items():
                function.load_state_dict(checkpoint.record("rewards.json")[name])
            monitors.load_state_dict(checkpoint.record("monitors.json"))
            samples = unpack_samples(
                checkpoint.tensors("rollout"),
                checkpoint.record("rollout.json"),
                examples,
                model.encoder.decode,
                config.answer_format,
            )
        write_json(run_dir / "config.json", record)
        write_bad_images(run_dir, bad_images)
        print(
            banner(config, resolved, model, wrapped, examples, sets, bad_images, run_dir, device),
            flush=True,
        )
        with RunLogger(
            run_dir,
            resume_step=state.global_step if checkpoint else None,
            log_history=state.log_history,
        ) as log:

            def save(samples: list[Sample]) -> None:
                unfinished = samples if state.global_step % updates_per_rollout(config) else []
                tensors, rollout = pack_samples(unfinished)
                save_training_checkpoint(
                    run_dir,
                    state,
                    wrapped,
                    optimizer,
                    base_name=model.name,
                    config_record=record,
                    limit=config.save_total_limit,
                    generators={"sampler": sampler},
                    tensors={"rollout": tensors},
                    records={
                        "rollout.json": rollout,
                        "rewards.json": {
                            name: f.state_dict() for name, f in reward_functions.items()
                        },
                        "monitors.json": monitors.state_dict(),
                    },
                )

            def evaluate() -> None:
                metrics = evaluate_policy(
                    config,
                    model,
                    wrapped,
                    sets,
                    examples,
                    reward_functions,
                    run_dir,
                    guard,
                    bad_images,
                    state.global_step,
                )
                for line in monitors.check(
                    record_evaluation(metrics, log, state, config.metric_for_best_model)
                ):
                    print(line, file=sys.stderr)
                    log.warn(line, state.global_step)

            if checkpoint is None:
                log.charts(HACKING_CHART)
            train(
                config,
                objective,
                model,
                wrapped,
                examples,
                reward_functions,
                monitors,
                sampler,
                log,
                state,
                optimizer,
                samples,
                guard,
                evaluate,
                save,
            )
            if guard.stop is not None:
                print(f"stopped; go on with: python run_grpo.py --resume_from_checkpoint {run_dir}")
                return guard.exit_code
            best = (
                load_best_adapter(run_dir, state, wrapped)
                if config.load_best_model_at_end
                else None
            )
            save_final_adapter(run_dir, state, wrapped, base_name=model.name)
            # the scores in the folder are those of the final adapter
            if best not in (None, f"checkpoint-{state.global_step}"):
                try:
                    evaluate_policy(
                        config,
                        model,
                        wrapped,
                        sets,
                        examples,
                        reward_functions,
                        run_dir,
                        guard,
                        bad_images,
                        int(best.rpartition("-")[2]),
                    )
                except KeyboardInterrupt:
                    print(f"stopped while scoring; training is finished and saved in {run_dir}")
                    return guard.exit_code or 130
        if sets:
            print(
                "\n" + format_progress(state.log_history, list(sets), state.best_model_checkpoint)
            )
        embedded = record["recipe"] in EMBEDDED  # whose recipes have the demo's data
        test_files = (
            "--data_file test-a=demo:test-a --data_file test-b=demo:test-b"
            if embedded
            else "--data_file NAME=FILE"
        )
        print(f"\nnext: python -m eval.evaluate --adapter_name_or_path {run_dir} {test_files}")
    return 0


def cli() -> None:
    sys.exit(main_guard(main, errors=(DataError,)))


if __name__ == "__main__":
    cli()
