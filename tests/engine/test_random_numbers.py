"""Protect that random numbers depend on their place in the run and on nothing else.

Checked: against Philox written out anew and its published test vectors, that places and seeds share
no numbers, and that dropout is the same after a resume and under gradient checkpointing.

Run: pytest tests/engine/test_random_numbers.py
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.collate import collate_rows
from engine.logprobs import token_logprobs
from engine.model import attach_new_adapter, enable_gradient_checkpointing
from engine.random_numbers import dropout_numbers, server_seed, uniform_numbers
from tests.helpers.tiny import SAVE, SHORT, examples_of, load, policy_of

ONES = 2**64 - 1


# ---- the numbers of completions ------------------------------------------------------------------
def philox(counter: list[int], key: list[int]) -> list[int]:
    """Compute a block of Philox 4x64-10 as Salmon et al. (SC 2011) define it."""
    (a, b, c, d), (left, right) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b = second >> 64 ^ b ^ left, second & ONES
        c, d = first >> 64 ^ d ^ right, first & ONES
        left, right = (left + 0x9E3779B97F4A7C15) & ONES, (right + 0xBB67AE8584CAA73B) & ONES
    return [a, b, c, d]


def test_philox_is_written_out_as_published():
    """Test vectors of Random123 1.14, file kat_vectors, lines "philox4x64 10"."""
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox([ONES] * 4, [ONES] * 2) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


def by_hand(purpose: int, seed: int, position: int, count: int) -> list[float]:
    """Compute numbers as numpy does: blocks from 1, the low half of a word first, 24 bits each."""
    words = [
        word
        for block in range(1, count // 8 + 2)
        for word in philox([block, 0, 0, purpose], [seed, position])
    ]
    halves = [half for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    return [(half >> 8) / 2**24 for half in halves[:count]]


@pytest.mark.parametrize(("purpose", "stream"), [("rollout", 0), ("evaluation", 1)])
@pytest.mark.parametrize(("seed", "position"), [(0, 0), (42, 7), (2**32 - 1, 10**9), (2**63, 1)])
def test_the_numbers_of_a_place(purpose, stream, seed, position):
    found = uniform_numbers(purpose, seed, position, 3, 7)
    assert found.dtype == torch.float32 and found.shape == (3, 7)
    assert found.flatten().tolist() == by_hand(stream, seed, position, 21)
    assert found.min() >= 0 and found.max() < 1


def test_golden_numbers():
    """Written down once, from the blocks above: a run's completions must not change by version."""
    assert uniform_numbers("rollout", 42, 0, 1, 4).tolist() == [GOLDEN["rollout"]]
    assert uniform_numbers("evaluation", 42, 0, 1, 4).tolist() == [GOLDEN["evaluation"]]


GOLDEN: dict[str, list[float]] = {
    "rollout": [0.30228471755981445, 0.820198118686676, 0.3624339699745178, 0.1892455816268921],
    "evaluation": [0.3225353956222534, 0.13234943151474, 0.7136917114257812, 0.8654850721359253],
}


def test_numbers_move_nothing_and_depend_on_nothing_before():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = [uniform_numbers("rollout", 1, position, 2, 5) for position in range(6)]
    for position in (5, 0, 3):  # as another rank, or a resumed run, asks for them
        assert torch.equal(uniform_numbers("rollout", 1, position, 2, 5), first[position])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_fewer_completions_have_the_first_numbers_of_more():
    many = uniform_numbers("evaluation", 3, 11, 16, 9)
    for generations in (1, 2, 5):
        assert torch.equal(uniform_numbers("evaluation", 3, 11, generations, 9), many[:generations])


def test_no_two_places_share_numbers():
    """Among them seeds that torch's CPU generator cannot tell apart, and places that a sum of seed
    and position would mix up.
    """
    places = [
        (purpose, seed, position)
        for purpose in ("rollout", "evaluation")
        for seed in (0, 1, 5, 5 + 2**32, 1_000_003)
        for position in (0, 1, 2, 5, 2**32, 1_000_003)
    ]
    rows = {tuple(uniform_numbers(*place, 1, 8)[0].tolist()) for place in places}
    assert len(rows) == len(places)
    one, other = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.rand(8, generator=one), torch.rand(8, generator=other))  # the trap


def test_numbers_are_uniform_and_independent_over_places():
    """Of 400 neighbouring positions: mean and variance, and correlation with the next one's."""
    rows = torch.cat([uniform_numbers("rollout", 42, i, 1, 500) for i in range(400)]).double()
    standard_error = (1 / 12 / rows.numel()) ** 0.5
    assert abs(float(rows.mean()) - 0.5) < 4 * standard_error
    assert float(rows.var()) == pytest.approx(1 / 12, rel=0.01)
    centred = rows - 0.5
    for one, other in ((centred[:-1], centred[1:]), (centred[:, :-1], centred[:, 1:])):
        assert abs(float((one * other).mean()) * 12) < 4 / one.numel() ** 0.5


# ---- dropout -------------------------------------------------------------------------------------
def masks(seed: int, step: int, row: int) -> list[float]:
    dropout_numbers(seed, step, row)
    return torch.rand(8).tolist()


def test_dropout_depends_on_seed_step_and_row():
    with torch.random.fork_rng(devices=[]):
        places = [
            (seed, step, row)
            for seed in (0, 1, 5, 5 + 2**32)
            for step in (0, 1, 2)
            for row in (0, 1, 2, 8)
        ]
        found = {place: masks(*place) for place in places}
        assert len({tuple(numbers) for numbers in found.values()}) == len(places)
        torch.rand(100)
        assert all(masks(*place) == found[place] for place in reversed(places))
        # numpy's SeedSequence is promised to stay; written down once
        dropout_numbers(42, 3, 8)
        assert torch.initial_seed() == DROPOUT_SEED


DROPOUT_SEED = 12561999758359968150


def test_every_device_is_seeded(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)  # torch's own: CPU, CUDA and others
    dropout_numbers(42, 3, 8)
    assert seeds == [DROPOUT_SEED] and type(seeds[0]) is int


@pytest.mark.parametrize("family", list(SAVE))
def test_checkpointing_drops_the_same(family, tiny_checkpoint, tiny_images):
    """The backward pass computes layers again. It must meet the masks of the forward."""
    model = load(tiny_checkpoint(family))
    net = attach_new_adapter(model, r=4, alpha=8, dropout=0.5)
    with torch.no_grad():  # else B is 0 and A has no gradient
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    policy = policy_of(net, model)
    examples = examples_of(tiny_images, 56, 84)
    rows = [model.encode_answer(one, SHORT, "ab, cd") for one in examples]

    def gradients(row: int) -> list[torch.Tensor]:
        net.zero_grad()
        net.train()
        dropout_numbers(1, 2, row)
        batch = collate_rows(rows, policy.encoder.pad_token_id)
        hidden, targets = policy.hidden_states(batch)
        token_logprobs(hidden, policy.head, targets)[0].sum().backward()
        return [one.grad.clone() for one in policy.parameters]

    plain, other = gradients(0), gradients(4)
    enable_gradient_checkpointing(net)
    again = gradients(0)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


# ---- the seeds of a server -----------------------------------------------------------------------
def test_a_servers_seeds_are_functions_of_their_place_that_lie_far_apart():
    """A server adds the index of a completion, so neighbours would share completions."""
    places = [(seed, place) for seed in (0, 1, 2**40) for place in range(200)]
    seeds = {server_seed(purpose, *at) for purpose in ("rollout", "evaluation") for at in places}
    assert len(seeds) == 1200 and max(seeds) < 2**48 and max(seeds) > 2**47
    ordered = sorted(seeds)
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) > 1000
    assert server_seed("rollout", 3, 5) == server_seed("rollout", 3, 5) > 0
    # by numpy alone: the 64 bits of the hash without the 16 lowest
    (bits,) = np.random.SeedSequence(3, spawn_key=(1, 5)).generate_state(1, np.uint64)
    assert server_seed("evaluation", 3, 5) == int(bits) // 2**16
