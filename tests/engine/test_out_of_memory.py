"""Protect work that is done again where memory runs out: what counts, what is let go, what is cut.

Run: pytest tests/engine/test_out_of_memory.py
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch

from engine.collate import Rows, collate_rows
from engine.encode import EncodedPrompt, EncodedRow
from engine.logprobs import token_logprobs
from engine.out_of_memory import (
    EVALUATION,
    HOLDERS,
    SAMPLING,
    TOKENS,
    Cut,
    Limits,
    is_out_of_memory,
    said_by,
)
from engine.runtime import DoesNotFit, StopRequested, main_guard
from engine.settings import SFTConfig
from engine.tracking import MetricAccumulator
from rl.settings import GRPOConfig
from tests.faults.acts import raises
from tests.faults.inject import at_calls
from tests.helpers.tiny import attach_random_adapter, examples_of, load, policy_of

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of"
    " which 1.05 GiB is free."
)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(CUDA)


# ---- what counts -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        out_of_memory(),
        MemoryError(),
        MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"),
        # what torch 2.13 raises under `ulimit -v`, as it was seen
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 1073741824 bytes. Error code 12 (Cannot allocate"
            " memory)"
        ),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),  # of oneDNN, in the sampler
        RuntimeError(
            "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."  # Windows
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    ],
)
def test_an_error_of_memory_is_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("can't start new thread"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
        OSError(28, "No space left on device"),
        StopRequested(),
    ],
)
def test_no_other_error_is_taken_for_one(error):
    assert not is_out_of_memory(error)

    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        Limits().once_more("update", work)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (out_of_memory(), "tried to allocate 2.00 GiB"),
        (
            RuntimeError("x alloc_cpu.cpp:127] you tried to allocate 64 bytes. Error code 12"),
            "tried to allocate 64 bytes",
        ),
        (MemoryError(), "MemoryError"),
        (RuntimeError("a\n" + 100 * "b"), f"a {78 * 'b'}..."),
    ],
)
def test_a_reason_is_one_short_line(error, said):
    assert said_by(error) == said


# ---- micro-batches -----------------------------------------------------------------------------
def rows_of(*lengths: int, size: int = 8, prompt: int = 10) -> Rows:
    """Make rows of these completion lengths, each pair of which shares a prompt."""
    rows = []
    for i, length in enumerate(lengths):
        if i % 2 == 0:
            shared = EncodedPrompt(torch.zeros(prompt), torch.zeros(prompt), {})
        rows.append(EncodedRow(shared, torch.zeros(length), torch.ones(length, dtype=torch.bool)))
    return Rows(rows, size)


@dataclass
class Device:
    """Hold a memory of so many tokens, and what was run in it."""

    rows: Rows
    room: int
    ran: list[list[int]] = field(default_factory=list)

    def run(self, indices: list[int]) -> int:
        if self.rows.tokens(indices) > self.room:
            raise out_of_memory()
        self.ran.append(indices)
        return len(indices)


def said(limits: Limits) -> list[Cut]:
    cuts: list[Cut] = []
    limits.report = cuts.append
    return cuts


def test_the_tokens_of_a_micro_batch_count_each_prompt_once():
    rows = rows_of(1, 2, 3)
    assert rows.tokens([0, 1, 2]) == 10 + 1 + 2 + 10 + 3
    assert rows.tokens([1, 2]) == 10 + 2 + 10 + 3
    behind = Rows(rows.rows[1:], 8, range(1, len(rows.rows)))
    assert behind.tokens([2]) == 13 and behind.micro_batches(None) == [[1, 2]]


def test_no_micro_batch_has_rows_of_two_steps():
    assert Rows(rows_of(1, 1, 1, 1, 1).rows, 4, per_step=2).micro_batches(None) == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_an_update_is_done_again_in_halves_until_it_fits():
    rows = rows_of(2, 2, 2, 2, 2, 2, 2, 2)  # 4 prompts of 10, 8 completions of 2: 56 tokens
    device, undone = Device(rows, 14), []
    limits = Limits(SFTConfig(max_tokens_per_forward=None))
    cuts = said(limits)
    micro_batches, results = limits.each(
        "update", rows, device.run, [lambda: undone.append(len(device.ran))]
    )
    # half of 56 holds four rows (28), half of those two (14)
    assert micro_batches == [[0, 1], [2, 3], [4, 5], [6, 7]] and results == [2, 2, 2, 2]
    assert [(cut.before, cut.after) for cut in cuts] == [(None, 28), (28, 14)]
    assert undone == [0, 0] and limits.max_tokens == 14
    assert cuts[1].line() == (
        "out of memory in update (tried to allocate 2.00 GiB): done again with"
        " --max_tokens_per_forward 14 (was 28), which stays"
    )
    # what was found out stays, for other work as well
    device.ran.clear()
    limits.each("validation", rows, device.run)
    assert device.ran == [[0, 1], [2, 3], [4, 5], [6, 7]] and len(cuts) == 2


@pytest.mark.parametrize("room", range(11, 57))
def test_every_size_down_to_a_row_is_found(room):
    rows = rows_of(1, 1, 1, 1, 1, 1, 1, 1)
    device, limits = Device(rows, room), Limits(SFTConfig())
    cuts = said(limits)
    _, results = limits.each("update", rows, device.run)
    assert sum(results) == 8 and device.ran[-1][-1] == 7
    assert len(cuts) <= 3  # 8 rows, 4, 2, 1


def test_all_micro_batches_are_done_again_where_a_later_one_fails():
    rows = rows_of(1, 1, 5, 5, size=2)
    device, limits = Device(rows, 15), Limits(SFTConfig())
    said(limits)
    micro_batches, _ = limits.each("update", rows, device.run)
    assert micro_batches == [[0], [1], [2], [3]]  # half of 20, which the first two exceed too
    assert device.ran == [[0, 1], [0], [1], [2], [3]]


def test_a_row_that_does_not_fit_ends_with_the_setting_to_lower():
    rows, limits = rows_of(2, 9, size=1), Limits(SFTConfig())
    device, undone, cuts = Device(rows, 18), [], said(limits)
    limits.advise = lambda phase: f"--max_visual_tokens 640 would need 7.1 GiB in {phase}"
    with pytest.raises(DoesNotFit) as caught:
        limits.each("update", rows, device.run, [lambda: undone.append(True)])
    assert str(caught.value) == (
        "out of memory in update (tried to allocate 2.00 GiB), with nothing left to cut:"
        " --max_visual_tokens 640 would need 7.1 GiB in update"
    )
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    # once more with the allocator's cache freed, and not for ever
    assert device.ran == [[0], [0]] and undone == [True] and cuts == []


def test_a_row_that_fits_the_second_time_goes_on():
    calls = []

    def work(indices: list[int]) -> None:
        calls.append(indices)
        if len(calls) == 2:
            raise out_of_memory()

    Limits(SFTConfig()).each("update", rows_of(1, 1, size=1), work)
    assert calls == [[0], [1], [0], [1]]


def test_what_is_held_for_speed_is_given_up_before_anything_is_cut():
    class Held:
        size = 10

        def release(self) -> bool:
            had, self.size = self.size > 0, 0
            return had

    holder, rows, undone = Held(), rows_of(2, 2, 2, 2), []  # 2 prompts of 10, 4 of 2: 28 tokens
    limits, ran = Limits(SFTConfig(max_tokens_per_forward=None)), []
    cuts = said(limits)
    HOLDERS.add(holder)

    def run(indices: list[int]) -> None:
        ran.append((indices, holder.size))
        if rows.tokens(indices) + holder.size > room:
            raise out_of_memory()

    room = 28
    limits.each("update", rows, run, [lambda: undone.append(True)])
    assert ran == [([0, 1, 2, 3], 10), ([0, 1, 2, 3], 0)] and undone == [True] and cuts == []
    room = 14  # what is left to give up is the size
    limits.each("update", rows, run)
    assert [cut.after for cut in cuts] == [14]


def test_a_signal_is_asked_for_before_every_micro_batch():
    ran: list[list[int]] = []
    with pytest.raises(StopRequested):
        Limits().each("update", rows_of(1, 1, 1, size=1), ran.append, (), lambda: len(ran) == 2)
    assert ran == [[0], [1]]


# ---- completions -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("together", "left", "group", "fits", "asked"),
    [
        (None, 24, 1, 24, [None]),
        (None, 24, 1, 12, [None, 12]),
        (8, 24, 1, 1, [8, 4, 2, 1]),
        (8, 3, 1, 1, [8, 1]),  # three are left: half of them is one
        (8, 24, 6, 3, [8, 4, 2]),
        (2, 24, 6, 3, [2, 3]),  # a group of 6 is decoded together before memory parts it
    ],
)
def test_completions_are_decoded_again_in_halves(together, left, group, fits, asked):
    limits, seen = Limits(GRPOConfig()), []
    cuts = said(limits)

    def decode(max_rows: int | None) -> str:
        seen.append(max_rows)
        rows = left if max_rows is None else min(left, max_rows)
        if (rows if EVALUATION in limits.halved else max(rows, group)) > fits:
            raise out_of_memory()
        return "done"

    assert limits.decoded("evaluation", EVALUATION, together, lambda: left, decode, group=group)
    assert seen == asked
    assert [cut.after for cut in cuts] == asked[1:]


def test_a_completion_that_does_not_fit_is_tried_once_more():
    limits, calls = Limits(GRPOConfig()), []
    cuts = said(limits)

    def decode(max_rows: int | None) -> None:
        calls.append(max_rows)
        raise out_of_memory()

    with pytest.raises(DoesNotFit, match="out of memory in rollout"):
        limits.decoded("rollout", SAMPLING, None, lambda: 4, decode)
    assert calls == [None, 2, 1, 1] and [cut.after for cut in cuts] == [2, 1]


def test_the_limits_are_those_of_the_settings():
    assert Limits(SFTConfig()).values == {TOKENS: 8192, SAMPLING: None, EVALUATION: 8}
    config = GRPOConfig(
        max_tokens_per_forward=7, sampling_batch_size=5, per_device_eval_batch_size=3
    )
    assert Limits(config).values == {TOKENS: 7, SAMPLING: 5, EVALUATION: 3}


# ---- what is let go ----------------------------------------------------------------------------
ALIVE: list[weakref.ref] = []  # of what the first attempt made
HELD: list[BaseException] = []  # what a debugger, a logger or C++ holds of it


def fail() -> None:
    """Raise an error of memory that came from another, each with a frame of its own."""
    kept = torch.ones(10)
    ALIVE.append(weakref.ref(kept))
    HELD.append(out_of_memory())
    try:
        deeper()
    except KeyError as error:
        raise HELD[-1] from error


def deeper() -> None:
    kept = torch.ones(10)
    cycle: list = [kept]
    cycle.append(cycle)
    ALIVE.append(weakref.ref(kept))
    HELD.append(KeyError("first"))
    raise HELD.pop()


class Layer(torch.autograd.Function):
    """Fail in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.ones(10))
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        fail()


def live_tensors() -> int:
    gc.collect()
    return sum(type(one) in (torch.Tensor, torch.nn.Parameter) for one in gc.get_objects())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_of_the_failed_work_is_held_when_it_is_done_again(where):
    """The graph, the frames and the exceptions of the first attempt are gone before the second."""
    ALIVE.clear()
    HELD.clear()
    weight, rows = torch.nn.Parameter(torch.ones(10)), rows_of(1, 1)
    before, seen = live_tensors(), []

    def work(indices: list[int]) -> None:
        if ALIVE:  # the second attempt
            assert all(one() is None for one in ALIVE), "the first attempt is still held"
            seen.append(live_tensors() - before)
            return
        x = (weight * torch.ones(5, 10)).exp()
        ALIVE.append(weakref.ref(x))
        Layer.apply(x).sum().backward() if where == "backward" else fail()

    def clear() -> None:
        weight.grad = None

    said(limits := Limits(SFTConfig()))
    limits.each("update", rows, work, [clear])
    assert len(HELD) == 1 and len(ALIVE) == 3 and seen == [0, 0]


# ---- what is put back --------------------------------------------------------------------------
def test_metrics_of_the_failed_work_are_dropped():
    metrics = MetricAccumulator({"loss": ["mean", [[1.0, 1.0]]]})
    back = metrics.mark()
    metrics.add("loss", 5.0)
    metrics.add("new", 2.0, reduction="max")
    back()
    assert metrics.state_dict() == {"loss": ["mean", [[1.0, 1.0]]]}
    metrics.add("new", 3.0)  # under another reduction, which the dropped one does not forbid
    assert metrics.collect() == {"loss": 1.0, "new": 3.0}


def test_a_command_says_in_one_line_that_it_does_not_fit(capsys):
    def main() -> int:
        raise DoesNotFit("out of memory in evaluation: --max_completion_length 128 would fit")

    assert main_guard(main) == 1
    assert capsys.readouterr().err == (
        "error: out of memory in evaluation: --max_completion_length 128 would fit\n"
    )


# ---- the gradient of a cut step ----------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("number", [1, 2])
def test_a_cut_step_has_the_gradient_of_the_uncut_one(
    tiny_checkpoint, tiny_images, dtype, bound, number
):
    """Eq. 1 of six rows in two micro-batches. Memory runs out in the backward pass of one."""
    base = load(tiny_checkpoint("qwen2_5_vl"), dtype=dtype)
    policy = policy_of(attach_random_adapter(base), base)
    policy.net.to(dtype)
    examples = [
        replace(example, answer=f"<think>{'x' * i}</think><solution>Edema</solution>")
        for i, example in enumerate(examples_of(tiny_images, 56, 84, 56, 84, 112, 56))
    ]
    rows = [policy.encode_answer(example) for example in examples]
    supervised = sum(int(row.completion_mask.sum()) for row in rows)

    def backward(indices: list[int]) -> None:
        batch = collate_rows([rows[i] for i in indices], base.encoder.pad_token_id)
        hidden, targets = policy.hidden_states(batch)
        logprobs, _ = token_logprobs(hidden, policy.head, targets)
        (-logprobs.sum() / supervised).backward()

    def gradient() -> torch.Tensor:
        found = torch.cat([one.grad.flatten() for one in policy.parameters])
        clear()
        return found

    def clear() -> None:
        for parameter in policy.parameters:
            parameter.grad = None

    policy.limits.each("update", Rows(rows, 3), backward)
    whole, found = gradient(), said(policy.limits)
    with at_calls("torch.Tensor.backward", number, raises(out_of_memory())):
        micro_batches, _ = policy.limits.each("update", Rows(rows, 3), backward, [clear])
    assert len(found) == 1 and len(micro_batches) > 2
    assert ((gradient() - whole).norm() / whole.norm()).item() <= bound
