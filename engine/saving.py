"""Save what a run leaves and put it back: checkpoints, the best of them, the final adapter."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data.files import write_json, written_whole
from engine.checkpoint import (
    BY_PLACE,
    RUN_ID,
    TIMED,
    Checkpoint,
    CheckpointError,
    fitting,
    load_checkpoint,
    point_best,
    save_checkpoint,
    settle_checkpoints,
)
from engine.model import (
    adapter_config_record,
    adapter_state,
    has_no_effect,
    load_adapter_state,
)
from engine.model_files import ADAPTER_FILES
from engine.policy import Policy
from engine.run import RunFolder, TrainerState
from engine.runtime import StepFailed
from engine.state_tensors import (
    load_optimizer,
    load_rng,
    not_finite,
    optimizer_to_tensors,
    rng_to_tensors,
)

logger = logging.getLogger(__name__)


def save_training_checkpoint(
    folder: RunFolder,
    state: TrainerState,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config_record: dict[str, Any],
    limit: int | None,
    *,
    timed: bool = False,
    tensors: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    records: Mapping[str, Any] | None = None,
) -> None:
    """Save everything that the next optimizer step depends on as checkpoint-<step>.

    Then point the links `last` and `best`, and delete old checkpoints.

    config_record: the contents of config.json. limit: checkpoints to keep, None for all.
    timed: the next checkpoint takes the place of this one. tensors, records: files of the caller's
    own, by name.

    Raises StepFailed where the adapter or the optimizer's state is not finite: no step could follow
    from that. Raises OSError where the disk refuses. Both leave earlier checkpoints as they are.
    """
    adapter = adapter_state(policy.adapted)
    optimizer_tensors, optimizer_record = optimizer_to_tensors(optimizer)
    name = f"checkpoint-{state.global_step}"
    check_finite(adapter, f"{name} is not saved: the adapter")
    check_finite(optimizer_tensors, f"{name} is not saved: the optimizer's state")
    folder.bring_back(state.global_step)
    rng_tensors, rng_record = rng_to_tensors()
    notes = {name: config_record[name] for name in ("reference", RUN_ID) if name in config_record}
    path = save_checkpoint(
        folder.path,
        state.global_step,
        tensors={
            "adapter_model": adapter,
            "optimizer": optimizer_tensors,
            "rng": rng_tensors,
            **(tensors or {}),
        },
        records={
            "adapter_config.json": adapter_config_record(policy.adapted, policy.base.name),
            "optimizer.json": optimizer_record,
            "rng.json": rng_record,
            "trainer_state.json": asdict(state),
            "config.json": config_record,
            **(records or {}),
        },
        notes=notes
        | {"logs": folder.log.marks(), BY_PLACE: True}
        | ({TIMED: True} if timed else {}),
    )
    settle_checkpoints(folder.path, path, state.best_model_checkpoint, limit)
    if folder.kept is not None:
        folder.kept.hold()


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse tensors that hold infinity or NaN, and name the first.

    what: whose they are, for the message. Raises StepFailed.
    """
    wrong = not_finite(tensors)
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise StepFailed(f"{what} holds infinite numbers or NaN ({wrong[0]}{more})")


def restore(
    checkpoint: Checkpoint, policy: Policy, optimizer: torch.optim.Optimizer
) -> TrainerState:
    """Put adapter, optimizer and random numbers back, and return where the run stood.

    A checkpoint of an earlier version that drew from generators is taken, with a warning. Raises
    UsageError where the adapter does not fit the model, CheckpointError where the rest of the
    checkpoint does not fit.
    """
    moments = checkpoint.tensors("optimizer")
    try:
        check_finite(moments, "the optimizer's state")
    except StepFailed as error:  # of an earlier version, which saved whatever there was
        raise CheckpointError(
            f"{checkpoint.path}: {error}, so no step can follow from it; go on from an earlier"
            " checkpoint-<step>"
        ) from error
    load_adapter_state(
        policy.adapted, checkpoint.tensors("adapter_model"), source=str(checkpoint.path)
    )
    saved, random = checkpoint.record("optimizer.json"), checkpoint.tensors("rng")
    dropout = checkpoint.record("adapter_config.json").get("lora_dropout")
    drew = "generator.sampler" in random or dropout
    if drew and not checkpoint.manifest["notes"].get(BY_PLACE):
        logger.warning(
            "%s: saved by an earlier version, which drew random numbers in another order; the run"
            " goes on with other completions or dropout than it would have had",
            checkpoint.path,
        )
    with fitting(checkpoint):
        load_optimizer(optimizer, moments, saved)
        load_rng(random, checkpoint.record("rng.json"))
        state = TrainerState(**checkpoint.record("trainer_state.json"))
    sound_best(checkpoint.path.parent, state)
    return state


def save_final_adapter(folder: Path, state: TrainerState, policy: Policy) -> None:
    """Write the run's result at the top of its folder, as plain peft loads it.

    The presence of adapter_model.safetensors there says that the training has finished. Raises
    StepFailed where the adapter is not finite: nothing is written then.
    """
    check_finite(adapter_state(policy.adapted), "nothing is published: the final adapter")
    sound_best(folder, state)
    point_best(folder, state.best_model_checkpoint)
    write_json(folder / "trainer_state.json", asdict(state))
    save_adapter(policy, folder)


def save_start(policy: Policy, adapter: Path | None, folder: Path) -> None:
    """Put into `folder` the adapter that a run starts from, which is its frozen reference.

    adapter: the folder that it was read from, None for the policy's own fresh one.
    """
    if adapter is None:
        save_adapter(policy, folder)
        return
    if has_no_effect(policy.adapted):
        logger.warning("%s: every lora_B is 0, so the adapter answers as its base does", adapter)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, folder / name)


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the policy's adapter as plain peft loads it, the weights last."""
    write_json(
        folder / "adapter_config.json", adapter_config_record(policy.adapted, policy.base.name)
    )
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in adapter_state(policy.adapted).items()
    }
    with written_whole(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def sound_best(folder: Path, state: TrainerState) -> Checkpoint | None:
    """Find the best checkpoint of a run, or where it is damaged or gone the next best that is not.

    Then it says so in a warning, and `state` names the one that was found. Returns None where no
    evaluation chose one, or no checkpoint that was evaluated is left.
    """
    best = state.best_model_checkpoint
    if best is None:
        return None
    others = sorted(state.evaluations, key=state.evaluations.__getitem__)
    problem = ""
    for name in dict.fromkeys([best, *(reversed(others) if state.greater_is_better else others)]):
        try:
            found = load_checkpoint(folder / name)
        except CheckpointError as error:
            problem = problem or error.problems[0]
            continue
        if name != best:
            state.best_model_checkpoint, state.best_metric = name, state.evaluations[name]
            logger.warning(
                "the best checkpoint, %s, cannot be used (%s): the next best, %s, takes its place",
                best,
                problem,
                name,
            )
        return found
    logger.warning(
        "the best checkpoint, %s, cannot be used (%s), and no other that was evaluated is there",
        best,
        problem,
    )
    state.best_metric = state.best_model_checkpoint = None
    return None


def load_best_adapter(folder: Path, state: TrainerState, policy: Policy) -> str | None:
    """Put the best checkpoint's adapter into the policy, by `sound_best`.

    Returns the checkpoint's name. It is None, and the policy stays as it is, where there is none.
    """
    checkpoint = sound_best(folder, state)
    if checkpoint is None:
        return None
    load_adapter_state(
        policy.adapted, checkpoint.tensors("adapter_model"), source=str(checkpoint.path)
    )
    return state.best_model_checkpoint
