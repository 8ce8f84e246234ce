"""Protect the optimizer's numbers.

Checked: what is trained, AdamW's update, the learning rate of each step, the clipped gradient.

A schedule that is off by a step, or a decay that is not applied, shows in no curve. The worked
cases P17 and P23 are in test_objective.py.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import get_scheduler

from engine.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate_at,
    scheduled_rate,
    set_learning_rate,
    trainable_parameters,
    whole_step,
)
from engine.runtime import DoesNotFit, StepFailed
from engine.settings import TrainingConfig
from engine.state_tensors import load_optimizer, optimizer_to_tensors
from tests.faults.acts import raises
from tests.faults.inject import at_calls
from tests.helpers.op_counts import OpCounts, as_on_cuda


def model_of(**values: float) -> nn.Module:
    """Make a model with one parameter of one number for each name, in this order."""
    model = nn.Module()
    for name, value in values.items():
        model.register_parameter(name, nn.Parameter(torch.tensor([value], dtype=torch.float64)))
    return model


def test_only_what_requires_a_gradient_is_trained_in_the_models_order():
    model = model_of(z=1.0, frozen=2.0, a=3.0)
    model.frozen.requires_grad_(False)
    assert [name for name, _ in trainable_parameters(model)] == ["z", "a"]
    (group,) = build_optimizer(model, learning_rate=0.1, weight_decay=0.0).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(model.z), id(model.a)]


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="the model has no trainable parameters"):
        build_optimizer(model_of(), learning_rate=0.1, weight_decay=0.0)


def test_adamw_by_hand():
    model = model_of(w=1.0)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.02)
    assert type(optimizer) is torch.optim.AdamW
    # Step 1, gradient 0.5: the decay is decoupled, 1 x (1 - 0.1 x 0.02) = 0.998. Both corrected
    # moments are those of one gradient, so the update is 0.1 x 0.5 / (0.5 + 1e-8) = 0.1 less 2e-9.
    model.w.grad = torch.tensor([0.5], dtype=torch.float64)
    optimizer.step()
    assert model.w.item() == pytest.approx(0.898 + 2e-9, abs=1e-12)
    # Step 2, gradient -0.5: m = 0.9 x 0.05 - 0.1 x 0.5 = -0.005, corrected -0.005 / (1 - 0.81) =
    # -0.0263157895; v = 0.999 x 0.00025 + 0.001 x 0.25 = 0.00049975, corrected 0.00049975 / (1 -
    # 0.998001) = 0.25, root 0.5. 0.898 x 0.998 + 0.1 x 0.0263157895 / 0.5 = 0.896204 + 0.0052631579
    # = 0.9014671579
    model.w.grad = torch.tensor([-0.5], dtype=torch.float64)
    optimizer.step()
    assert model.w.item() == pytest.approx(0.9014671579, abs=1e-8)


def test_on_a_gpu_one_kernel_makes_the_step():
    model = nn.Module()
    with FakeTensorMode():  # of a device that need not be there
        model.weight = nn.Parameter(torch.empty(3, 2, device="cuda"))
        optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.0)
    assert optimizer.param_groups[0]["fused"] is True
    optimizer = build_optimizer(nn.Linear(2, 3), learning_rate=0.1, weight_decay=0.0)
    assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize(("saved_by", "goes_on_with"), [(True, None), (None, True)])
def test_a_state_goes_on_with_the_kernels_of_todays_device(saved_by, goes_on_with):
    """A run may go on elsewhere: the state is the same, how a step is made is not saved with it."""

    def after(steps: int, fused: bool | None) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(2, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        for _ in range(steps):
            step(model, optimizer)
        return model, optimizer

    def step(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        model(torch.ones(4, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, saved = after(2, saved_by)
    other, optimizer = after(0, goes_on_with)
    other.load_state_dict(model.state_dict())
    tensors, record = optimizer_to_tensors(saved)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # as from the disk
    load_optimizer(optimizer, copies, json.loads(json.dumps(record)))
    assert optimizer.param_groups[0]["fused"] is goes_on_with
    assert all(
        torch.equal(optimizer.state[mine][name], saved.state[its][name])
        for mine, its in zip(other.parameters(), model.parameters(), strict=True)
        for name in ("step", "exp_avg", "exp_avg_sq")
    )
    step(other, optimizer)
    step(model, saved)  # in the other kernels: the same but for rounding
    for mine, its in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-6, atol=1e-7)


def test_learning_rate_by_hand():
    # 4 steps of warm-up from 0, then half a cosine over 8: 2 x (1 + cos(pi x done/8)) / 2; cos 0 =
    # 1, cos(pi/2) = 0, cos pi = -1
    schedule = {"base": 2.0, "warmup_steps": 4, "total_steps": 12}
    by_step = {
        0: 0.0,
        1: 0.5,
        3: 1.5,
        4: 2.0,
        6: 1 + 0.5**0.5,
        8: 1.0,
        10: 1 - 0.5**0.5,
        12: 0.0,
        13: 0.0,
        20: 0.0,
    }
    for step, expected in by_step.items():
        assert learning_rate_at(step, **schedule) == pytest.approx(expected, abs=1e-12), step


def test_learning_rate_without_warmup_starts_at_the_base():
    assert learning_rate_at(0, base=2.0, warmup_steps=0, total_steps=2) == 2.0
    assert learning_rate_at(1, base=2.0, warmup_steps=0, total_steps=2) == pytest.approx(1.0)


def test_learning_rate_of_nothing_but_warmup():
    # The first step after it is the end of a cosine of no length: still the base; the next one is
    # beyond the end.
    assert learning_rate_at(4, base=2.0, warmup_steps=4, total_steps=4) == 2.0
    assert learning_rate_at(5, base=2.0, warmup_steps=4, total_steps=4) == 0.0


def test_other_schedules_by_hand():
    # 4 steps of warm-up from 0 to 2, then 8 more: linear falls by 2/8 = 0.25 a step, constant does
    # not fall, and "constant" without its warm-up does not rise either
    by_step = {
        "linear": {0: 0.0, 3: 1.5, 4: 2.0, 5: 1.75, 8: 1.0, 11: 0.25, 12: 0.0, 20: 0.0},
        "constant_with_warmup": {0: 0.0, 1: 0.5, 3: 1.5, 4: 2.0, 11: 2.0, 20: 2.0},
        "constant": {0: 2.0, 3: 2.0, 4: 2.0, 11: 2.0, 20: 2.0},
    }
    for kind, rates in by_step.items():
        for step, expected in rates.items():
            rate = learning_rate_at(step, base=2.0, warmup_steps=4, total_steps=12, kind=kind)
            assert rate == pytest.approx(expected, abs=1e-12), (kind, step)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant_with_warmup", "constant"])
def test_schedules_are_those_of_transformers(kind):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=3, num_training_steps=11)
    for step in range(11):
        ours = learning_rate_at(step, base=0.3, warmup_steps=3, total_steps=11, kind=kind)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_the_settings_choose_the_schedule():
    # 10 steps, a warm-up of a fifth: at step 6 half of the linear fall is done, 0.4 / 2
    config = TrainingConfig(learning_rate=0.4, warmup_ratio=0.2, lr_scheduler_type="linear")
    assert scheduled_rate(config, 6, 10) == pytest.approx(0.2)
    assert scheduled_rate(replace(config, lr_scheduler_type="constant"), 0, 10) == 0.4


def test_learning_rate_is_set_in_every_group():
    model = model_of(a=1.0, b=1.0)
    optimizer = torch.optim.AdamW(
        [{"params": [model.a], "lr": 0.1}, {"params": [model.b], "lr": 0.2}]
    )
    set_learning_rate(optimizer, 0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_gradients_are_scaled_together_and_only_when_too_long():
    model = model_of(a=0.0, b=0.0)
    model.a.grad, model.b.grad = (
        torch.tensor([3.0], dtype=torch.float64),
        torch.tensor([4.0], dtype=torch.float64),
    )
    assert clip_gradients(model.parameters(), 10.0).item() == pytest.approx(5)  # 3, 4, 5
    assert (model.a.grad.item(), model.b.grad.item()) == (3.0, 4.0)
    assert clip_gradients(model.parameters(), 1.0).item() == pytest.approx(5)  # the norm before
    # coefficient 1 / (5 + 1e-6)
    assert (model.a.grad.item(), model.b.grad.item()) == pytest.approx((0.6, 0.8), abs=1e-6)


# ---- a step wholly or not at all -----------------------------------------------------------------
def stepped(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Make a model of three parameters and its optimizer after so many steps, with gradients."""
    model = model_of(a=1.0, b=2.0, c=3.0)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.02)
    for number in range(steps + 1):
        for parameter in model.parameters():
            parameter.grad = torch.tensor([0.5 + number], dtype=torch.float64)
        if number < steps:
            optimizer.step()
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def test_a_whole_step_is_the_optimizers_own():
    (one, ours), (other, theirs) = stepped(2), stepped(2)
    whole_step(ours, 0.3, 3)
    set_learning_rate(theirs, 0.3)
    theirs.step()
    assert everything(one, ours) == everything(other, theirs)


# Memory that runs out twice is DoesNotFit: nothing of a step can be halved.
@pytest.mark.parametrize(
    ("error", "calls_each", "raised"),
    [(RuntimeError("device lost"), 1, RuntimeError), (torch.OutOfMemoryError(), 2, DoesNotFit)],
)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_step_that_fails_in_the_middle_changes_nothing(
    monkeypatch, steps, place, error, calls_each, raised
):
    model, optimizer = stepped(steps)
    before, calls = everything(model, optimizer), []
    update = torch.Tensor.addcdiv_  # of one parameter: the last thing that AdamW does to it

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) % place == 0:
            raise error
        return update(*arguments, **options)

    with monkeypatch.context() as context:
        context.setattr(torch.Tensor, "addcdiv_", failing)
        with pytest.raises(raised):
            whole_step(optimizer, 0.3, steps + 1)
    assert len(calls) == calls_each * place and everything(model, optimizer) == before
    # and the step can be made after all, as if nothing had been
    whole_step(optimizer, 0.3, steps + 1)
    other, theirs = stepped(steps)
    whole_step(theirs, 0.3, steps + 1)
    assert everything(model, optimizer) == everything(other, theirs)


def test_a_step_in_which_memory_runs_out_once_is_made():
    (one, ours), (other, theirs) = stepped(2), stepped(2)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with at_calls("torch.Tensor.addcdiv_", 2, raises(error)):
        whole_step(ours, 0.3, 3)
    whole_step(theirs, 0.3, 3)
    assert everything(one, ours) == everything(other, theirs)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_is_taken_back(steps):
    model, optimizer = stepped(steps)
    before = everything(model, optimizer)
    kept: list = []
    whole_step(optimizer, 0.3, steps + 1, kept.append)
    assert everything(model, optimizer) != before
    (take_back,) = kept
    take_back()
    assert everything(model, optimizer) == before
    take_back()  # as after an error in the middle, which has put it back already
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("rate", [1e308, math.nan])
def test_a_step_that_would_make_weights_that_are_no_numbers_is_not_made(rate):
    model, optimizer = stepped(1)
    before = everything(model, optimizer)
    with pytest.raises(
        StepFailed, match="step 2 would make weights of the adapter infinite or NaN"
    ):
        for _ in range(9):  # 1e308 more each time
            whole_step(optimizer, rate, 2)
            before = everything(model, optimizer)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_weight_of_all_is_no_number(place, value):
    model, optimizer = stepped(1)
    parameter = list(model.parameters())[place]
    parameter.grad = torch.full_like(parameter, value)
    if math.isinf(value):  # AdamW divides by the gradient's size, but not by that of the weight
        parameter.grad.zero_()
        with torch.no_grad():
            parameter.fill_(value)
    before = everything(model, optimizer)
    with pytest.raises(StepFailed, match="infinite or NaN"):
        whole_step(optimizer, 0.3, 2)
    assert str(everything(model, optimizer)) == str(before)  # NaN is not equal to itself


def test_a_large_weight_is_a_number():
    """Its square is none, so it is looked at once more."""
    model, optimizer = stepped(1)
    with torch.no_grad():
        model.b.fill_(1e200)
    whole_step(optimizer, 0.3, 2)


class Counting(torch.optim.Optimizer):
    """A fork's optimizer: numbers beside tensors in its state, and no state of some parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state.setdefault("sum", torch.zeros_like(parameter)).add_(parameter.grad)
                parameter.sub_(state["sum"])


def test_any_optimizers_state_is_put_back():
    model = nn.ParameterList([torch.ones(2), torch.ones(3, 2).t(), torch.ones(())])
    optimizer = Counting(model.parameters(), {"lr": 0.1})
    model[0].grad, model[1].grad = torch.ones(2), torch.ones(2, 3)
    whole_step(optimizer, 0.1, 1)
    before, kept = everything(model, optimizer), []
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    whole_step(optimizer, 0.1, 2, kept.append)
    assert [optimizer.state[one]["count"] for one in model] == [2, 2, 1]
    assert optimizer.state[model[1]]["sum"].tolist() == [[2.0] * 3] * 2
    kept[0]()
    assert str(everything(model, optimizer)) == str(before)
    assert [optimizer.state[one]["count"] for one in optimizer.state] == [1, 1]
    assert [*map(id, optimizer.state)] == [id(model[0]), id(model[1])]


def test_a_gpu_makes_an_optimizer_step_in_a_few_launches():
    """Without one, on the meta device: 200 matrices of 16 x 128, as a GPU would be asked.

    Copies: of the weights and of each moment 64 a launch, 4 launches each, and of the steps'
    counters 4. Counters up: 110 a launch, 2. AdamW: 36 a launch, 6. Is every weight finite: zeros,
    2 launches and their sums, 2 to put the 200 together, 1 for the norm of all, 4 for isfinite
    (|x|, x == x, |x| != infinity, and), and the look.
    """
    model = nn.ParameterList([torch.empty(16, 128, device="meta") for _ in range(200)])
    for parameter in model:
        parameter.grad = torch.empty_like(parameter)
    with as_on_cuda(), OpCounts(answer=True) as counter:
        optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.0)
        whole_step(optimizer, 0.1, 1)
        counter.take()
        whole_step(optimizer, 0.1, 2)
        counts = counter.take()
    assert counts.launches == 4 * 4 + 2 + 6 + (1 + 2 + 1) + 2 + 1 + 4 + 1
    assert counts.waits == 1
