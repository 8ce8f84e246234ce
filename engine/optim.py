"""Build AdamW, compute the learning rate of a step, clip the gradients, make the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.out_of_memory import Limits
from engine.runtime import StepFailed
from engine.settings import Scheduler, TrainingConfig, rounded_up
from engine.state_tensors import not_finite

Keep = Callable[[Callable[[], None]], object]


def trainable_parameters(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters that are trained, in the model's order.

    The optimizer's state is kept in the same order.
    """
    return [
        (name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad
    ]


def build_optimizer(
    net: nn.Module, *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters: betas 0.9 and 0.999, eps 1e-8.

    The paper names only AdamW. LoRA matrices all have two dimensions, so all are decayed, in one
    group. They are fp32, and so is the optimizer's state. On a GPU one kernel updates all of them
    and makes no tensor beside them; numbers differ by rounding from those of a CPU.

    Raises ValueError where nothing is trainable.
    """
    parameters = [parameter for _, parameter in trainable_parameters(net)]
    if not parameters:
        raise ValueError(
            "the model has no trainable parameters; the adapter was not attached or is frozen"
        )
    fused = None if any(parameter.is_cpu for parameter in parameters) else True
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def learning_rate_at(
    step: int, *, base: float, warmup_steps: int, total_steps: int, kind: Scheduler = "cosine"
) -> float:
    """Compute the learning rate of an optimizer step (0-based), as HF's schedules of these names.

    It rises linearly from 0 over `warmup_steps`, so with a warm-up the first step has learning rate
    0. Then it falls from `base` to 0 at `total_steps`, by half a cosine or linearly, or stays. Only
    "constant" has no warm-up at all.
    """
    if kind == "constant":
        return base
    if step < warmup_steps:
        return base * step / warmup_steps
    if kind == "constant_with_warmup":
        return base
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "linear":
        return base * (1.0 - progress)
    return base * 0.5 * (1.0 + math.cos(math.pi * progress))


def scheduled_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of an optimizer step (0-based) as the settings describe it."""
    return learning_rate_at(
        step,
        base=config.learning_rate,
        warmup_steps=rounded_up(config.warmup_ratio * total_steps),
        total_steps=total_steps,
        kind=config.lr_scheduler_type,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Put this step's learning rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients together so that their global L2 norm is at most `max_norm`.

    The factor is torch's min(1, max_norm / (norm + 1e-6)). Returns the norm before clipping, a
    scalar tensor.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)


def whole_step(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    step: int,
    keep: Keep = lambda take_back: None,
    limits: Limits | None = None,
) -> None:
    """Make an optimizer step wholly or not at all, so that an error leaves no half-changed weights.

    Parameters and the optimizer's state are copied first, and put back where anything raises in the
    middle: memory that runs out, a fault of the device.

    learning_rate: of this step. step: its number, for a message. keep: is given a function that
    takes the step back, before it is made. That holds the copies, so it is to be let go once the
    step is counted. limits: those of the run. Nothing of a step can be halved, so where memory runs
    out it is made once more, with the allocator's cache freed.

    Raises StepFailed where the step would make a parameter infinite or NaN, or where memory runs
    out twice.
    """
    step_once = partial(_step, optimizer, learning_rate, step, keep)
    (limits or Limits()).once_more("optimizer step", step_once)


def _step(optimizer: torch.optim.Optimizer, learning_rate: float, step: int, keep: Keep) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = [parameter.detach() for parameter in parameters]
    values = _copied(weights)
    states = _copied_states([optimizer.state.get(parameter) for parameter in parameters])
    rates = [group["lr"] for group in optimizer.param_groups]

    @torch.no_grad()
    def take_back() -> None:
        for parameter, value, state in zip(parameters, values, states, strict=True):
            parameter.copy_(value)
            if state is None:  # before its first step
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = state
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    keep(take_back)
    try:
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
        # A sum of squares is infinite or NaN where a weight is, but also where weights are huge.
        if not torch.nn.utils.get_total_norm(weights).isfinite() and not_finite(
            {str(place): weight for place, weight in enumerate(weights)}
        ):
            raise OverflowError
    except BaseException as error:
        take_back()
        keep(lambda: None)  # the copies are not held while it is made once more
        # torch's own words for a factor that is infinite in the weights' dtype
        if isinstance(error, OverflowError) or "without overflow" in str(error):
            raise StepFailed(
                f"step {step} would make weights of the adapter infinite or NaN (learning rate"
                f" {learning_rate:g}), and was not made"
            ) from error
        raise


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    """Copy tensors, on a GPU in a few launches where clone() would take one for each."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _copied_states(states: Sequence[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    """Copy what the optimizer holds of each parameter, None where it has nothing yet."""
    copies = [None if state is None else dict(state) for state in states]
    for name in {name: None for copy in copies for name in copy or ()}:
        having = [copy for copy in copies if copy and isinstance(copy.get(name), Tensor)]
        if having:
            tensors = _copied([copy[name] for copy in having])
            for copy, tensor in zip(having, tensors, strict=True):
                copy[name] = tensor
    return copies
