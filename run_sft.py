"""Supervised fine-tuning on teacher reasoning traces: Eq. 1 of ChexReason (arXiv 2512.23090), with
LoRA.

    python run_sft.py                                            # the embedded demo, a few minutes
    on a CPU
    python run_sft.py --recipe medgemma-4b-free-reasoning --train_file sft.jsonl --validation_file
    val=val.jsonl

    L_SFT = - sum_j log pi(t*_j | x, t*_<j)      over the answer's tokens and its end-of-turn; the
    prompt and the image are
    not scored

Each optimizer step divides the sum by the number of supervised tokens of the WHOLE step, so neither
the micro-batch size nor the accumulation changes the gradient. The loop is in `train` below, top to
bottom; nothing else calls backward().
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data.examples import Example, data_file, read_jsonl, split_by_patient
from data.files import DataError, write_json
from data.prompts import PROMPTS
from data.traces import answers_to_learn
from engine.checkpoint import clean_leftovers, load_rng, rng_to_tensors, set_later_checkpoints_aside
from engine.collate import collate_rows, plan_batches
from engine.config import ConfigError, Resolved, UsageError, describe, parse_config, setting
from engine.families import lm_head_weight, logit_softcap
from engine.forward import completion_hidden_states
from engine.generate import SamplingConfig
from engine.logprobs import predicted_correctly, token_logprobs
from engine.model import (
    EMBEDDED,
    LoadedModel,
    adapter_config,
    attach_adapter,
    attach_new_adapter,
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
from engine.preview import dry_run_report, show_answers
from engine.run import (
    FREE_TO_CHANGE,
    TrainerState,
    bad_image_counts,
    bad_images_line,
    bring_logs,
    continued_record,
    find_checkpoint,
    in_chunks,
    inherited_settings,
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
from engine.settings import (
    FALLBACKS,
    PAPER_SFT,
    TrainingConfig,
    from_adapter,
    load_base,
    training_problems,
)
from engine.tracking import MetricAccumulator, Progress, RunLogger
from eval.evaluate import evaluate_sets, format_scores


@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Settings of supervised fine-tuning."""

    adapter_name_or_path: str | None = setting(
        None,
        "adapter to go on training, with its own rank and alpha",
        unset="a fresh one",
        group="model and data",
    )
    lora_r: int = setting(16, "rank of the LoRA matrices", source=PAPER_SFT, group="adapter")
    lora_alpha: int = setting(
        32, "LoRA scaling: the update is multiplied by alpha / r", source=PAPER_SFT, group="adapter"
    )
    lora_dropout: float = setting(
        0.1, "dropout on the adapter's input", source=PAPER_SFT, group="adapter"
    )
    validation_split: float = setting(
        0.1,
        "share of the training data held out for the validation loss, by patient, where no"
        " --validation_file has answers",
        source=PAPER_SFT,
        group="model and data",
    )
    early_stopping_patience: int = setting(
        2,
        "stop after this many epochs in a row without a better validation loss",
        unit="epochs",
        source=PAPER_SFT,
        group="optimization",
    )


def problems(config: SFTConfig) -> list[str]:
    found = training_problems(config)
    if config.train_file is None and config.resume_from_checkpoint is None:
        found.append("--train_file is missing: give the JSONL file with the teacher's answers")
    if (
        config.model_name_or_path is None
        and config.adapter_name_or_path is None
        and config.resume_from_checkpoint is None
    ):
        found.append(
            "--model_name_or_path is missing: give a checkpoint's folder, a hub name or 'demo'"
        )
    if config.lora_r < 1 or config.lora_alpha < 1:
        found.append(
            f"--lora_r {config.lora_r} and --lora_alpha {config.lora_alpha} must be at least 1"
        )
    if not 0 <= config.lora_dropout < 1 or not 0 < config.validation_split < 1:
        found.append(
            f"--lora_dropout {config.lora_dropout} must lie in [0, 1), --validation_split"
            f" {config.validation_split} in (0, 1)"
        )
    if config.early_stopping_patience < 1:
        found.append(
            f"--early_stopping_patience is {config.early_stopping_patience}; it must be at least 1"
        )
    return found


def with_rank_of_adapter(resolved: Resolved) -> Resolved:
    """lora_r and lora_alpha are those of the adapter that training goes on with. Raises UsageError
    for a flag that says otherwise.
    """
    config: SFTConfig = resolved.configs[0]
    adapter = adapter_config(Path(config.adapter_name_or_path))
    for name, value in (("lora_r", adapter.r), ("lora_alpha", adapter.lora_alpha)):
        if resolved.origins[name] == "flag" and getattr(config, name) != value:
            raise UsageError(
                f"--{name} {getattr(config, name)}: {config.adapter_name_or_path} has {value};"
                " leave the flag out"
            )
        resolved = resolved.with_value(name, value, "adapter")
    return resolved


@dataclass(frozen=True)
class SFTData:
    """train and validation have answers; decoded are the named sets that get scores at the end;
    files and bad_images (rows of the examples left out, by data set) go into config.json.
    """

    train: list[Example]
    validation: list[Example]
    decoded: dict[str, list[Example]]
    files: dict[str, Path]
    bad_images: dict[str, list[dict]]


def load_data(config: SFTConfig, resumed: dict | None = None) -> SFTData:
    """Read every data file; without a validation file that has answers, hold out a share of the
    training patients.

    resumed: config.json of the run that goes on. With the answer form `solution` (Only Label) every
    example has an answer.
    """
    files = {"train": data_file(config.train_file)}
    files |= {
        name: data_file(spec)
        for name, _, spec in (entry.partition("=") for entry in config.validation_file)
    }
    sets = {name: read_jsonl(path, config.image_root) for name, path in files.items()}
    sets, bad_images = usable_examples(sets, config.bad_images, resumed)
    train = answers_to_learn(sets.pop("train"), config.answer_format, files["train"])
    with_answers = (
        name
        for name, examples in sets.items()
        if config.answer_format == "solution" or all(e.answer for e in examples)
    )
    name = next(with_answers, None)
    if name is None:
        train, validation = split_by_patient(train, config.validation_split, config.seed)
    else:
        validation = answers_to_learn(sets[name], config.answer_format, files[name])
    return SFTData(train, validation, sets or {"validation": validation}, files, bad_images)


def train(
    config: SFTConfig,
    model: LoadedModel,
    wrapped,
    data: SFTData,
    log: RunLogger,
    state: TrainerState,
    optimizer,
    guard: SignalGuard,
    save,
) -> None:
    """The loop, from state.global_step to the end, an early stop or a signal."""
    head, softcap, prompt = lm_head_weight(wrapped), logit_softcap(wrapped), PROMPTS[config.prompt]
    parameters = [parameter for _, parameter in trainable_parameters(wrapped)]
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps_per_epoch, total_steps = step_counts(config, len(data.train))
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)
    metrics = MetricAccumulator(state.unlogged_metrics)
    bar = Progress(total_steps, initial=state.global_step, description="SFT")

    state.log_history = log.log_history

    def validate_when_due() -> bool:
        """At the end of each epoch; what a signal cuts short is done again when the run is resumed."""
        due = state.global_step > 0 and (
            state.global_step % steps_per_epoch == 0 or state.global_step == total_steps
        )
        if not due or state.evaluated_step == state.global_step or guard.stop is not None:
            return False
        save()  # first: a validation can be long, and can meet a damaged image
        try:
            validation = validation_metrics(
                config, model, wrapped, data.validation, should_stop=lambda: guard.stop is not None
            )
        except KeyboardInterrupt:
            if guard.stop is None:
                raise
            return False
        log.scalars(state.global_step, validation, split="eval", epoch=state.epoch)
        better = state.record_evaluation(validation["loss"], greater_is_better=False)
        bar.write(
            f"epoch {state.epoch:.2f}: validation loss {validation['loss']:.4f}, token accuracy "
            f"{validation['mean_token_accuracy']:.3f}" + (" (best so far)" if better else "")
        )
        state.evaluated_step = state.global_step
        save()
        return True

    def stopped_early() -> bool:
        return state.evaluations_without_improvement >= config.early_stopping_patience

    validate_when_due()  # one that a signal cut short
    while state.global_step < total_steps and guard.stop is None and not stopped_early():
        started = time.perf_counter()
        epoch, step_of_epoch = divmod(state.global_step, steps_per_epoch)
        order = shuffled(len(data.train), epoch, config.seed)
        examples = [
            data.train[i]
            for i in order[step_of_epoch * batch_size : (step_of_epoch + 1) * batch_size]
        ]
        try:
            # with the frozen tower's features
            rows = [model.encode_answer(example, prompt, example.answer) for example in examples]
        except DataError:
            # a damaged image in the middle of a run: nothing of this step has happened yet
            save()
            raise
        # of the whole optimizer step
        supervised_tokens = sum(int(row.completion_mask.sum()) for row in rows)
        random_state = rng_to_tensors()

        wrapped.train()
        losses = []
        for indices in plan_batches(
            rows, config.per_device_train_batch_size, config.max_tokens_per_forward
        ):
            batch = collate_rows([rows[i] for i in indices], model.encoder.pad_token_id).to(
                head.device
            )
            hidden, targets = completion_hidden_states(wrapped, model.family, batch)  # [K,H], [K]
            logprobs, _ = token_logprobs(hidden, head, targets, softcap=softcap)  # [K]
            # Eq. 1; micro-batches add up to the step's mean
            loss = -logprobs.sum() / supervised_tokens
            loss.backward()
            losses.append(loss.detach())
            metrics.add(
                "mean_token_accuracy",
                predicted_correctly(hidden, head, targets).float().mean(),
                weight=len(targets),
            )

        # only now: to read a number is to wait for the GPU
        step_loss = sum(float(loss) for loss in losses)
        grad_norm = clip_gradients(parameters, config.max_grad_norm)
        if not torch.isfinite(grad_norm):
            optimizer.zero_grad()
            load_rng(*random_state)
            save()
            raise RuntimeError(
                f"the gradient of step {state.global_step + 1} is not finite, the state before it"
                f" was saved; examples: {', '.join(example.id for example in examples)}"
            )
        learning_rate = learning_rate_at(
            state.global_step,
            base=config.learning_rate,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        optimizer.zero_grad()

        state.global_step += 1
        state.epoch = state.global_step / steps_per_epoch
        metrics.add("loss", step_loss, weight=supervised_tokens)
        metrics.add("grad_norm", grad_norm)
        metrics.add("learning_rate", learning_rate)
        state.num_tokens += supervised_tokens
        metrics.add("num_tokens", state.num_tokens, reduction="max")
        metrics.add("step_time", time.perf_counter() - started)
        bar.update({"loss": step_loss})
        if state.global_step % config.logging_steps == 0 or state.global_step == total_steps:
            log.scalars(state.global_step, metrics.collect(), epoch=state.epoch)

        state.unlogged_metrics = metrics.state_dict()
        validated = validate_when_due()
        if not validated and config.save_steps and state.global_step % config.save_steps == 0:
            save()
    if stopped_early():
        bar.write(
            f"stopped early: no better validation loss in {config.early_stopping_patience} epochs"
        )
    if guard.stop is not None:
        save()
    bar.close()


@torch.no_grad()
def validation_metrics(
    config: SFTConfig,
    model: LoadedModel,
    wrapped,
    examples: list[Example],
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Loss (nats a token) and token accuracy over all supervised tokens of the validation set,
    without dropout.

    Raises KeyboardInterrupt once should_stop says so.
    """
    wrapped.eval()
    head, softcap = lm_head_weight(wrapped), logit_softcap(wrapped)
    metrics = MetricAccumulator()
    for chunk in in_chunks(examples, config.per_device_eval_batch_size):
        if should_stop():
            raise KeyboardInterrupt
        rows = [
            model.encode_answer(example, PROMPTS[config.prompt], example.answer)
            for example in chunk
        ]
        for indices in plan_batches(rows, len(rows), config.max_tokens_per_forward):
            batch = collate_rows([rows[i] for i in indices], model.encoder.pad_token_id).to(
                head.device
            )
            hidden, targets = completion_hidden_states(wrapped, model.family, batch)
            logprobs, _ = token_logprobs(hidden, head, targets, softcap=softcap)
            metrics.add("loss", -logprobs.mean(), weight=len(targets))
            metrics.add(
                "mean_token_accuracy",
                predicted_correctly(hidden, head, targets).float().mean(),
                weight=len(targets),
            )
    return metrics.collect()


def step_counts(config: SFTConfig, num_examples: int) -> tuple[int, int]:
    """(optimizer steps an epoch, optimizer steps in all)."""
    steps_per_epoch = math.ceil(
        num_examples / (config.per_device_train_batch_size * config.gradient_accumulation_steps)
    )
    return steps_per_epoch, config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch)


def banner(
    config: SFTConfig,
    resolved: Resolved,
    model: LoadedModel,
    wrapped,
    data: SFTData,
    run_dir: Path | str,
    device,
) -> str:
    trainable = sum(parameter.numel() for _, parameter in trainable_parameters(wrapped))
    total = sum(parameter.numel() for parameter in wrapped.parameters())
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    steps_per_epoch, total_steps = step_counts(config, len(data.train))
    return "\n".join(
        [
            f"SFT -> {run_dir}",
            environment_banner(device),
            (
                f"model       {model.name} ({model.family.model_type}), {total:,} parameters,"
                f" {trainable:,} trainable (LoRA r {config.lora_r})"
            ),
            f"data        {len(data.train)} training, {len(data.validation)} validation examples;"
            " scored at the end: "
            + ", ".join(f"{name} {len(examples)}" for name, examples in data.decoded.items())
            + bad_images_line(data.bad_images),
            (
                f"batch       {micro} sequences x {accumulation} accumulated ="
                f" {micro * accumulation} an optimizer step; {steps_per_epoch} steps an epoch,"
                f" {total_steps} steps in all, early stop after {config.early_stopping_patience}"
                " epochs without a better loss"
            ),
            "settings that differ from the paper's or the engine's defaults:",
            describe(resolved),
            "",
        ]
    )


def next_command(recipe: str | None, run_dir: Path, model: str | None = None) -> str:
    """The command that goes on with GRPO; FILE is the user's to fill in. model: one that a flag has
    put in the place of the recipe's.
    """
    data = "" if recipe in EMBEDDED else " --train_file FILE"
    flags = (f" --recipe {recipe}" if recipe else "") + (
        f" --model_name_or_path {model}" if model else ""
    )
    return f"python run_grpo.py{flags} --adapter_name_or_path {run_dir}{data}"


def main(argv: list[str] | None = None) -> int:
    resolved = parse_config(
        [SFTConfig],
        sys.argv[1:] if argv is None else argv,
        script="sft",
        prog="run_sft.py",
        description=__doc__.splitlines()[0],
        validate=problems,
        default_recipe="demo",
        default_recipe_unless=("model_name_or_path", "adapter_name_or_path", "train_file"),
        inherit_with="resume_from_checkpoint",
        inherit=partial(inherited_settings, script="sft"),
        free_to_change=FREE_TO_CHANGE,
    )
    if resolved.configs[0].adapter_name_or_path and not resolved.configs[0].resume_from_checkpoint:
        resolved = with_rank_of_adapter(from_adapter(resolved))
    for name, value in FALLBACKS.items():
        resolved = (
            resolved.with_value(name, value, "default")
            if getattr(resolved.configs[0], name) is None
            else resolved
        )
    config: SFTConfig = resolved.configs[0]
    if problems(config):
        raise ConfigError(problems(config))
    if config.answer_format is None:
        resolved = resolved.with_value(
            "answer_format", PROMPTS[config.prompt].answer_format, "prompt"
        )
        config = resolved.configs[0]
    checkpoint, rejected = (
        find_checkpoint(config.resume_from_checkpoint)
        if config.resume_from_checkpoint
        else (None, [])
    )
    for line in rejected:
        print(f"passed over a damaged checkpoint: {line}", file=sys.stderr)

    seed_everything(config.seed)
    device = pick_device(config.num_threads)
    data = load_data(config, checkpoint.record("config.json") if checkpoint else None)
    if config.show_batch:
        return show_answers(config, data.train, sys.stdout)
    record = run_record(resolved, "sft", data.files, data.bad_images)
    if checkpoint is not None:
        record = continued_record(checkpoint, record)
    model = load_base(config, device)
    # a wrong path or template shows now, not after an epoch
    for example in data.train[:1] + data.validation[:1]:
        model.encode_answer(example, PROMPTS[config.prompt], example.answer)
    if config.adapter_name_or_path and checkpoint is None:
        wrapped = attach_adapter(
            model, config.adapter_name_or_path, trainable=True, dropout=config.lora_dropout
        )
    else:
        wrapped = attach_new_adapter(
            model, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout
        )
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(wrapped)
    if config.compile:
        compile_decoder(wrapped)
    optimizer = build_optimizer(
        wrapped, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    if config.dry_run:
        print(
            banner(config, resolved, model, wrapped, data, "dry run", device)
            + dry_run_report(
                config, model, wrapped, data.train, {"validation": data.validation} | data.decoded
            )
        )
        return 0

    run_dir = run_folder(checkpoint, config.output_dir, "sft")
    with lock_run(run_dir), SignalGuard() as guard:
        clean_leftovers(run_dir)
        state = TrainerState()
        if checkpoint is not None:
            bring_logs(checkpoint, run_dir)
            set_later_checkpoints_aside(run_dir, checkpoint.step)
            state = restore(checkpoint, wrapped, optimizer)
        write_json(run_dir / "config.json", record)
        write_bad_images(run_dir, data.bad_images)
        print(banner(config, resolved, model, wrapped, data, run_dir, device))
        with RunLogger(
            run_dir,
            resume_step=state.global_step if checkpoint else None,
            log_history=state.log_history,
        ) as log:

            def save() -> None:
                save_training_checkpoint(
                    run_dir,
                    state,
                    wrapped,
                    optimizer,
                    base_name=model.name,
                    config_record=record,
                    limit=config.save_total_limit,
                )

            train(config, model, wrapped, data, log, state, optimizer, guard, save)
            if guard.stop is not None:
                print(f"stopped; go on with: python run_sft.py --resume_from_checkpoint {run_dir}")
                return guard.exit_code
            best = load_best_adapter(run_dir, state, wrapped)
            save_final_adapter(run_dir, state, wrapped, base_name=model.name)
            print(
                f"final adapter: that of {best}, validation loss {state.best_metric:.4f}"
                if best
                else "final adapter: the last one, since no validation loss was a number"
            )
            sampling = SamplingConfig(
                temperature=0.0, max_completion_length=config.max_completion_length
            )
            try:
                scores = evaluate_sets(
                    wrapped,
                    model,
                    data.decoded,
                    PROMPTS[config.prompt],
                    sampling,
                    run_dir,
                    reference=data.train,
                    answer_format=config.answer_format,
                    notes=bad_image_counts(data.decoded, data.bad_images),
                    batch_size=config.per_device_eval_batch_size,
                    should_stop=lambda: guard.stop is not None,
                )
            except KeyboardInterrupt:
                print(f"stopped while scoring; training is finished and saved in {run_dir}")
                return guard.exit_code or 130
            model_flag = record["recipe"] and resolved.origins["model_name_or_path"] == "flag"
            command = next_command(
                record["recipe"], run_dir, config.model_name_or_path if model_flag else None
            )
            print(f"\n{format_scores(scores)}\n\nnext: {command}")
    return 0


def cli() -> None:
    sys.exit(main_guard(main, errors=(DataError,)))


if __name__ == "__main__":
    cli()
