"""Protect the one function that turns hidden states into log-probabilities.

Checked: values, gradients, precision and memory.

Run: pytest tests/engine/test_logprobs.py
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from engine.attention import spread
from engine.encode import EncodedPrompt, EncodedRow
from engine.logprobs import CHUNK_SIZE, predicted_correctly, scaled_logits, token_logprobs
from tests.helpers.plain import plain_batch, predicted_tokens

M, H, V = 7, 5, 11


def problem(dtype=torch.float64, m=M, v=V, scale=1.0, seed=0):
    """Draw (hidden [m,H] with gradient, head [v,H], targets [m])."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (
        (scale * torch.randn(m, H, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
    )
    head = torch.randn(v, H, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, head, torch.randint(0, v, (m,), generator=generator)


def head_for(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make hidden and head whose product is `logits` [M,V]."""
    return logits, torch.eye(logits.shape[1], dtype=logits.dtype)


# Worked cases


def test_p20_entropy(case):
    with case("P20_entropy") as p20:
        hidden, head = head_for(torch.tensor(p20.inputs["logits"]))
        targets = torch.zeros(2, dtype=torch.long)
        p20.close("entropy_T1", token_logprobs(hidden, head, targets, entropy=True)[1])
        p20.close(
            "entropy_T08",
            token_logprobs(
                hidden, head, targets, temperature=p20.inputs["temperature"], entropy=True
            )[1],
        )


def test_p16_supervised_tokens_and_eq1(case):
    with case("P16_sft_mask_loss") as p16:
        ids, mask = (
            torch.tensor(p16.inputs["input_ids"]),
            torch.tensor(p16.inputs["assistant_mask"]).bool(),
        )
        rows = []
        for i in range(2):
            # what follows the answer's end of turn is in the row, but not supervised
            start = int(mask[i].long().argmax())
            prompt = EncodedPrompt(ids[i, :start], torch.zeros(start, dtype=torch.long), {})
            rows.append(EncodedRow(prompt, ids[i, start:], mask[i, start:]))
        batch = plain_batch(rows, pad_token_id=0)
        at, columns = predicted_tokens(batch.loss_mask)
        ignored = torch.full_like(ids, -100)
        p16.close("labels", ignored.where(~batch.loss_mask, batch.prompts.input_ids))
        p16.close(
            "labels_shifted_for_logits",
            ignored.index_put((at, columns - 1), batch.prompts.input_ids[at, columns]),
        )
        p16.close("supervised_tokens_per_row", batch.loss_mask.sum(1))

        # Logits at t - 1 that give token t the case's probability and share the rest evenly
        probability = torch.tensor(p16.inputs["nll_of_token"]).neg().exp()[..., None]  # [2,9,1]
        logits = ((1 - probability) / 107).log().expand(2, 9, 108).clone()
        logits.scatter_(2, ids[..., None], probability.log())
        states = logits.roll(-1, 1)  # the state at t - 1 predicts t
        supervised, contributions = int(batch.completion_mask.sum()), []
        for indices in p16.inputs["micro_batches"]:
            micro = plain_batch([rows[i] for i in indices], pad_token_id=0)
            at, columns = predicted_tokens(micro.loss_mask)
            hidden, head = head_for(states[indices][at, columns - 1])
            contributions.append(
                -token_logprobs(hidden, head, micro.prompts.input_ids[at, columns])[0].sum()
                / supervised
            )
        p16.close("correct_microbatch_contributions", torch.stack(contributions))
        p16.close("token_mean_loss_global", sum(contributions))
        p16.differs("wrong_mean_of_microbatch_means", sum(contributions))


# Values


@pytest.mark.parametrize("temperature", [1.0, 0.8, 2.0, 2.5])
def test_equals_log_softmax(temperature):
    hidden, head, targets = problem()
    logprobs, entropies = token_logprobs(
        hidden, head, targets, temperature=temperature, entropy=True
    )
    full = torch.log_softmax(hidden @ head.t() / temperature, 1)
    torch.testing.assert_close(logprobs, full[torch.arange(M), targets], rtol=0, atol=1e-13)
    torch.testing.assert_close(entropies, -(full.exp() * full).sum(1), rtol=0, atol=1e-13)
    assert token_logprobs(hidden, head, targets)[1] is None


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_chunks_do_not_matter(chunk_size):
    results = []
    for size in (M, chunk_size):
        hidden, head, targets = problem()
        logprobs, entropies = token_logprobs(
            hidden,
            head,
            targets,
            temperature=0.8,
            suppress_token_ids=[0],
            chunk_size=size,
            entropy=True,
        )
        (logprobs.nan_to_num(neginf=0.0).sum() + 2 * entropies.sum()).backward()
        results.append((logprobs, entropies, hidden.grad))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_chunks_do_not_matter_without_a_gradient(chunk_size):
    hidden, head, targets = problem()
    logprobs, _ = token_logprobs(hidden.detach(), head, targets, chunk_size=chunk_size)
    torch.testing.assert_close(
        logprobs, token_logprobs(hidden, head, targets)[0].detach(), rtol=0, atol=1e-13
    )


def test_suppressed_ids_leave_the_vocabulary():
    suppressed = (2, 9)
    rest = [i for i in range(V) if i not in suppressed]
    hidden, head, _ = problem()
    settings = {"temperature": 0.8, "entropy": True}
    results = [
        token_logprobs(hidden, head, torch.full((M,), i), suppress_token_ids=suppressed, **settings)
        for i in range(V)
    ]
    everything = torch.stack([logprobs for logprobs, _ in results], 1)  # [M,V]
    torch.testing.assert_close(
        everything[:, rest].exp().sum(1), torch.ones(M, dtype=torch.float64), rtol=0, atol=1e-13
    )
    assert (everything[:, list(suppressed)] == float("-inf")).all()
    smaller, entropies = token_logprobs(
        hidden, head[rest], torch.zeros(M, dtype=torch.long), **settings
    )
    # as if the vocabulary had never held them
    torch.testing.assert_close(everything[:, 0], smaller, rtol=0, atol=1e-13)
    torch.testing.assert_close(results[0][1], entropies, rtol=0, atol=1e-13)


def test_soft_capping_by_hand():
    # 2 tanh(x / 2) of 2 artanh(1/2) = 1.098612 is 1, of 0 it is 0; divided by temperature 0.5:
    # logits 2 and 0. p_0 = 1 / (1 + e^-2) = 0.880797, log p_0 = -0.126928; H = -0.880797 log
    # 0.880797 - 0.119203 log 0.119203 = 0.365334
    hidden, head = head_for(torch.tensor([[1.098612, 0.0]]))
    hidden.requires_grad_()
    logprobs, entropies = token_logprobs(
        hidden, head, torch.tensor([0]), temperature=0.5, softcap=2.0, entropy=True
    )
    torch.testing.assert_close(logprobs, torch.tensor([-0.126928]), rtol=0, atol=1e-6)
    torch.testing.assert_close(entropies, torch.tensor([0.365334]), rtol=0, atol=1e-6)
    # d log p_0 / d logits = (1 - p_0, -p_1) = (0.119203, -0.119203), by the slopes 1 - 1/4 and 1,
    # by 1 / 0.5
    (by_hidden,) = torch.autograd.grad(logprobs, hidden, torch.ones(1), retain_graph=True)
    torch.testing.assert_close(by_hidden, torch.tensor([[0.178804, -0.238406]]), rtol=0, atol=1e-6)
    # dH / d logit_0 = -p_0 (log p_0 + H) = -0.880797 (-0.126928 + 0.365334) = -0.209987, and its
    # opposite
    (by_hidden,) = torch.autograd.grad(entropies, hidden, torch.ones(1))
    torch.testing.assert_close(by_hidden, torch.tensor([[-0.314981, 0.419974]]), rtol=0, atol=2e-6)


def test_soft_capped_logits_are_of_the_sampler_too():
    # 3 tanh(3 / 3) = 2.284783, 3 tanh(-1 / 3) = -0.964538, divided by 0.5; a suppressed id stays
    # out
    logits = scaled_logits(torch.tensor([[3.0, -1.0, 30.0]]), 0.5, torch.tensor([2]), 3.0)
    torch.testing.assert_close(
        logits, torch.tensor([[4.569566, -1.929075, float("-inf")]]), rtol=0, atol=1e-5
    )


def test_no_tokens():
    hidden, head, targets = problem(m=0)
    logprobs, entropies = token_logprobs(hidden, head, targets, entropy=True)
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden.grad.shape == (0, H)
    assert predicted_correctly(hidden, head, targets).shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="need a positive one"):
        token_logprobs(*problem(), temperature=temperature)


def test_predicted_correctly_is_the_argmax():
    hidden, head = head_for(
        torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 0.0], [0.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    )
    for chunk_size in (1, 3, 256):
        correct = predicted_correctly(
            hidden, head, torch.tensor([1, 1, 2, 0]), chunk_size=chunk_size
        )
        assert correct.tolist() == [True, False, True, True]


def test_values_are_put_back_in_their_places():
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    rows = spread(values, torch.tensor([0, 2, 6]), (3, 3))
    assert rows.tolist() == [[1, 0, 2], [0, 0, 0], [3, 0, 0]]
    (rows * torch.arange(9.0).view(3, 3)).sum().backward()
    assert values.grad.tolist() == [0, 2, 6]


# Precision


def test_bfloat16_in_float32_out():
    hidden, head, targets = problem(torch.bfloat16, m=40, scale=4.0)
    logprobs, entropies = token_logprobs(hidden, head, targets, temperature=0.8, entropy=True)
    assert logprobs.dtype == entropies.dtype == torch.float32
    # the product is bf16, as in sampling; what follows is not
    logits = (hidden @ head.t()).double() / 0.8
    exact = torch.log_softmax(logits, 1)[torch.arange(40), targets]
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-5)
    logprobs.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_the_product_runs_in_the_heads_dtype():
    # 1 + 2^-9 is 1 in bf16: the two logits are equal, so each has the probability 1/2, and the
    # first is the argmax.
    hidden, head = torch.tensor([[1.0, 1 + 2**-9]]), torch.eye(2, dtype=torch.bfloat16)
    assert token_logprobs(hidden, head, torch.tensor([0]))[0].tolist() == pytest.approx(
        [-0.6931472], abs=1e-7
    )
    assert predicted_correctly(hidden, head, torch.tensor([0])).tolist() == [True]


def test_the_gradient_is_divided_in_the_dtype_of_hidden():
    # p = (1/2, 1/2), so d logprob_0 / d logits = (1/2, -1/2), exact in bf16; 0.5 / 0.7 = 0.714286,
    # which bf16 would make 0.714844
    hidden = torch.zeros(1, 2, requires_grad=True)
    token_logprobs(hidden, torch.eye(2, dtype=torch.bfloat16), torch.tensor([0]), temperature=0.7)[
        0
    ].sum().backward()
    torch.testing.assert_close(
        hidden.grad, torch.tensor([[0.714286, -0.714286]]), rtol=0, atol=1e-6
    )
    # The entropy of two logits z, 0 has the gradient -p (1 - p) z and its opposite; z = 0.6875 /
    # 0.7 = 0.982143, p = 0.727533. The product with the head makes 0.194690 the bf16 number
    # 199/1024; 199/1024/0.7 = 0.277623, which bf16 would make 0.277344.
    hidden = torch.tensor([[0.6875, 0.0]], requires_grad=True)
    head, targets = torch.eye(2, dtype=torch.bfloat16), torch.tensor([0])
    token_logprobs(hidden, head, targets, temperature=0.7, entropy=True)[1].sum().backward()
    torch.testing.assert_close(
        hidden.grad, torch.tensor([[-0.277623, 0.277623]]), rtol=0, atol=1e-6
    )


def test_everything_stays_on_the_device_of_hidden():
    hidden, head, targets = (tensor.detach().to("meta") for tensor in problem())
    logprobs, entropies = token_logprobs(
        hidden.requires_grad_(), head, targets, suppress_token_ids=[1], entropy=True
    )
    (logprobs.sum() + entropies.sum()).backward()
    assert {tensor.device.type for tensor in (logprobs, entropies, hidden.grad)} == {"meta"}


def test_large_logits_are_stable():
    hidden, head = head_for(torch.tensor([[3e4, 0.0, -1e4], [-1e4, 1e4, 1e4]]))
    logprobs, entropies = token_logprobs(
        hidden.requires_grad_(), head, torch.tensor([1, 2]), entropy=True
    )
    # The second is one of two equal ones: log 1/2. At 1e4 fp32 numbers lie 0.001 apart, so the
    # logits must be shifted first, and each row by its own maximum.
    torch.testing.assert_close(logprobs, torch.tensor([-3e4, -0.693147]), rtol=0, atol=1e-6)
    torch.testing.assert_close(entropies, torch.tensor([0.0, 0.693147]), rtol=0, atol=1e-6)
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden.grad.isfinite().all()


def test_scaled_logits_divide_after_the_cast():
    # 3 / 0.7 = 4.285714; in bf16 it would be 4.28125
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    assert scaled_logits(logits, 0.7, torch.tensor([0])).tolist() == [
        [float("-inf"), pytest.approx(3 / 0.7, abs=1e-6)]
    ]


# Gradients


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("suppressed", [(), (1, 4)])
def test_gradients_by_finite_differences(chunk_size, suppressed, softcap):
    hidden, head, targets = problem()
    targets = targets.where(~torch.isin(targets, torch.tensor(suppressed, dtype=torch.long)), 0)

    def values(hidden):
        return token_logprobs(
            hidden,
            head,
            targets,
            temperature=0.8,
            suppress_token_ids=suppressed,
            softcap=softcap,
            chunk_size=chunk_size,
            entropy=True,
        )

    assert gradcheck(lambda h: values(h)[0], hidden)
    assert gradcheck(lambda h: values(h)[1], hidden)
    assert gradcheck(values, hidden)
    assert gradcheck(lambda h: values(h)[0] + 2 * values(h)[1], hidden)  # both in one backward pass


def test_gradient_of_the_mean_nll_by_hand():
    # logits (0, 0), target 0: p = (1/2, 1/2); d(-log p_0)/d logits = p - (1, 0) = (-1/2, 1/2),
    # halved again by temperature 2
    hidden, head = head_for(torch.zeros(1, 2))
    hidden.requires_grad_()
    (-token_logprobs(hidden, head, torch.tensor([0]), temperature=2.0)[0].sum()).backward()
    assert hidden.grad.tolist() == [[-0.25, 0.25]]


def test_inputs_are_left_as_they_were():
    hidden, head, targets = problem()
    before = hidden.detach().clone(), head.clone(), targets.clone()
    logprobs, entropies = token_logprobs(
        hidden, head, targets, suppress_token_ids=[3], entropy=True
    )
    (logprobs[logprobs.isfinite()].sum() + entropies.sum()).backward()
    assert (
        torch.equal(hidden, before[0])
        and torch.equal(head, before[1])
        and torch.equal(targets, before[2])
    )


# Memory


def saved_bytes(v: int, entropy: bool) -> int:
    """Count the bytes that the backward pass keeps, the head itself apart."""
    hidden, head, targets = problem(torch.float32, m=64, v=v)
    kept = []
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        token_logprobs(hidden, head, targets, chunk_size=8, entropy=entropy)
    return sum(t.numel() * t.element_size() for t in kept if t.data_ptr() != head.data_ptr())


@pytest.mark.parametrize(("entropy", "copies"), [(False, 1), (True, 2)])
def test_nothing_of_the_vocabularys_size_is_kept(entropy, copies):
    # d logprob / d hidden [M,H], and hidden and the entropy where it is asked for, fp32
    assert (
        saved_bytes(50, entropy)
        == saved_bytes(5000, entropy)
        == copies * 64 * H * 4 + entropy * 64 * 4
    )


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """Keep the size of the largest tensor that is made (views apart), and count matrix products."""

    largest = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, result.numel())
        self.products += function is torch.ops.aten.mm.default
        return result


def test_no_more_than_a_chunk_of_logits_at_once():
    hidden, head, targets = problem(torch.float32, m=64, v=5000)
    with Watched() as watched:
        logprobs, entropies = token_logprobs(hidden, head, targets, chunk_size=8, entropy=True)
        (logprobs.sum() + entropies.sum()).backward()
    assert watched.largest == 8 * 5000
    # Eight chunks, each once: logits and d logprob / d hidden forward, logits and d entropy / d
    # hidden backward.
    assert watched.products == 8 * 4


def allocated_peak(step) -> int:
    """Measure the bytes that torch holds at most at once while `step` runs.

    Kernels' buffers are included.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [
        event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return max(
        itertools.accumulate(
            event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
        )
    )


@pytest.mark.parametrize(
    ("dtype", "entropy", "softcap", "gradient", "copies"),
    [
        # of [chunk,V] in fp32: the exponentials, in place of the logits
        (torch.float32, False, None, False, 1),
        (torch.float32, False, None, True, 1),
        # both: the entropy is made of both
        (torch.float32, True, None, False, 2),
        (torch.float32, True, None, True, 2),
        # and the slope
        (torch.float32, False, 9.0, True, 2),
        (torch.float32, True, 9.0, True, 3),
        (torch.float32, False, 9.0, False, 1),
        # the product of the head in bf16; its gradient's input
        (torch.bfloat16, False, None, False, 1.5),
        (torch.bfloat16, False, None, True, 1.5),
        (torch.bfloat16, True, None, True, 2),
    ],
)
def test_how_many_chunks_of_logits_there_are_at_once(dtype, entropy, softcap, gradient, copies):
    hidden, head, targets = problem(dtype, m=64, v=20_000)
    hidden = hidden.detach().requires_grad_(gradient)

    def step():
        logprobs, entropies = token_logprobs(
            hidden, head, targets, softcap=softcap, chunk_size=16, entropy=entropy
        )
        if gradient:
            (logprobs.sum() + (entropies.sum() if entropy else 0)).backward()

    chunk = 16 * 20_000 * 4
    # In bf16 some processors' products have a buffer of the head's size (seen with AMX).
    direction = torch.zeros(16, 20_000, dtype=dtype)
    packed = allocated_peak(lambda: direction @ head) if dtype == torch.bfloat16 else 0
    # the rest: [M,H], [M], and what a product packs
    assert copies * chunk < allocated_peak(step) < (copies + 0.15) * chunk + packed


def test_without_a_gradient_only_the_logits_are_made():
    hidden, head, targets = problem(torch.float32, m=64, v=10)
    with Watched() as watched:
        token_logprobs(hidden.detach(), head, targets, chunk_size=8)
        predicted_correctly(hidden, head, targets, chunk_size=8)
    assert watched.largest == 8 * 10  # less than hidden's 64 x 5
    assert watched.products == 8 + 8


def test_the_default_chunk_of_gemmas_logits_takes_256_mib():
    # fp32; 256 x 262,208 x 4 / 1,048,576 = 256.06
    assert pytest.approx(256, abs=0.1) == CHUNK_SIZE * 262_208 * 4 / 2**20


def test_the_gradients_of_log_probabilities_and_entropy_add_up():
    # as in an entropy bonus: each part alone, and both in one backward pass, over several chunks
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (
        torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (5, 7)
    )
    targets = torch.arange(5)

    def gradient(of_logprobs: float, of_entropy: float) -> torch.Tensor:
        states = hidden.clone().requires_grad_()
        logprobs, entropy = token_logprobs(
            states, weight, targets, temperature=0.8, chunk_size=2, entropy=True
        )
        (of_logprobs * logprobs.sum() + of_entropy * entropy.sum()).backward()
        return states.grad

    both = gradient(1.0, 0.3)
    torch.testing.assert_close(both, gradient(1.0, 0.0) + gradient(0.0, 0.3), rtol=0, atol=1e-12)
    states = hidden.clone().requires_grad_()
    plain = (states @ weight.T / 0.8).log_softmax(1)
    (plain.gather(1, targets[:, None]).sum() - 0.3 * (plain.exp() * plain).sum()).backward()
    torch.testing.assert_close(both, states.grad, rtol=0, atol=1e-12)
