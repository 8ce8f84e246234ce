"""Protect the replay of decoding as CUDA graphs, on graphs that are pretended (helpers/tape.py).

Run: pytest tests/engine/test_graphs.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import engine.decoding
from engine.completion import SamplingConfig
from engine.decoding import STEPS, DecodingSteps
from engine.generate import generate
from engine.graphs import Graphs, Trace
from engine.out_of_memory import free_memory
from engine.policy import Policy
from tests.helpers.tape import Card
from tests.helpers.tiny import (
    SAVE,
    SHORT,
    attach_random_adapter,
    examples_of,
    load,
    policy_of,
    uniform_for,
    with_features,
)

LENGTH, GENERATIONS = 20, 4
STEPPED = DecodingSteps(look_every=4, length=8, sizes=(1 / 2, 1 / 4), graphs=False)
EAGER = STEPS["cpu"]


@pytest.fixture(params=list(SAVE))
def policy(request, tiny_checkpoint) -> Policy:
    base = load(tiny_checkpoint(request.param))
    net = attach_random_adapter(base).eval()
    base = dataclasses.replace(base, stop_ids=frozenset(range(0, 256, 17)))
    # Merged copies are laid out by oneDNN here, which a graph of a GPU does not know.
    return dataclasses.replace(policy_of(net, base), sampling_copies=False)


@pytest.fixture
def prompts(policy, tiny_images):
    base = policy.base
    return [
        with_features(base, base.encoder.encode_prompt(example, SHORT))
        for example in examples_of(tiny_images, 56, 84)
    ]


@pytest.fixture
def card(monkeypatch) -> Card:
    """Pretend a GPU's graphs, and take steps with which shapes come again."""
    card = Card()
    card.put(monkeypatch)
    monkeypatch.setitem(STEPS, "cpu", dataclasses.replace(STEPPED, graphs=True))
    monkeypatch.setattr("engine.nucleus._may_look", lambda device: False)
    return card


def written(policy, prompts, seed=0, temperature=0.9, **more):
    return generate(
        policy,
        prompts,
        SamplingConfig(temperature, 0.9, LENGTH),
        num_generations=GENERATIONS,
        uniform=uniform_for(len(prompts), GENERATIONS, LENGTH, seed),
        **more,
    )


def as_they_are(policy, prompts, **more):
    """Sample without graphs, as on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STEPS, "cpu", EAGER)
        return written(dataclasses.replace(policy, graphs=Graphs()), prompts, **more)


def same(groups, others) -> None:
    for one, other in zip(sum(groups, []), sum(others, []), strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.truncated == other.truncated
        for name in ("logprobs", "top_p_mass"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=5e-6)


def replays(card: Card) -> int:
    return sum(graph.replays for graph in card.graphs)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("max_rows", [None, GENERATIONS])
def test_replayed_completions_are_those_of_the_cpu(policy, prompts, card, temperature, max_rows):
    more = dict(temperature=temperature, max_rows=max_rows)
    for seed in (0, 1):
        found = written(policy, prompts, seed=seed, keep=True, **more)
        same(found, as_they_are(policy, prompts, seed=seed, **more))
    assert replays(card) > 20


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """Record what is run: (name, shape)."""
    asked: list[tuple] = []
    run = Graphs.run

    def watched(self, name, shape, work):
        asked.append((name, shape))
        run(self, name, shape, work)

    monkeypatch.setattr(Graphs, "run", watched)
    return asked


def test_a_shape_is_captured_once_and_all_share_a_pool(policy, prompts, card, asked):
    for seed in range(3):
        written(policy, prompts, seed=seed, keep=True)
    # In every call the first of each part is compared. The first of a shape warms up.
    compared = 3 * len(("draw", "read"))
    warmed = len(set(asked)) - len(("draw", "read"))
    assert replays(card) == len(asked) - compared - warmed
    often = {key for key in asked if asked.count(key) >= 5}
    assert 3 < len(often) <= len(card.graphs) <= len(set(asked))
    assert len(set(map(id, card.pools))) == 1


def test_weights_that_are_trained_in_place_need_no_new_graphs(policy, prompts, card, asked):
    for seed in range(2):
        written(policy, prompts, seed=seed, keep=True)
    known, captured = set(asked), len(card.graphs)
    before = as_they_are(policy, prompts)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.mul_(1.5)
    changed = as_they_are(policy, prompts)
    same(written(policy, prompts, keep=True), changed)
    assert captured <= len(card.graphs) <= captured + len(set(asked) - known)
    with pytest.raises(AssertionError):
        same(changed, before)


def test_in_low_precision_what_is_prepared_of_an_adapter_stays_where_graphs_read_it(
    tiny_checkpoint, tiny_images, card, monkeypatch
):
    """A and B are stacked anew in every call, and lie where the call before had them."""
    base = load(tiny_checkpoint("gemma3"), dtype=torch.bfloat16)
    policy = policy_of(attach_random_adapter(base).eval(), base)
    prompts = [
        with_features(base, base.encoder.encode_prompt(example, SHORT))
        for example in examples_of(tiny_images, 56, 84)
    ]
    captured, capture = [], Graphs._capture
    monkeypatch.setattr(
        Graphs, "_capture", lambda self, key, work: captured.append(key) or capture(self, key, work)
    )
    written(policy, prompts, keep=True)
    assert len(captured) > 3
    taken = [torch.empty(1 + i % 4096) for i in range(20_000)]  # where they would come to lie
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.mul_(1.5)
    for seed in range(2):
        found = written(policy, prompts, seed=seed, keep=True)
        same(found, as_they_are(policy, prompts, seed=seed))
    assert len(captured) == len(set(captured))  # none a second time
    del taken


def other_rank(policy) -> None:
    """Repeat every A and B, which doubles the adapter's rank and its effect."""
    for module in policy.net.modules():
        if "default" in getattr(module, "lora_A", ()):
            a, b = module.lora_A["default"], module.lora_B["default"]
            a.weight = torch.nn.Parameter(torch.cat([a.weight, a.weight]).detach())
            b.weight = torch.nn.Parameter(torch.cat([b.weight, b.weight], 1).detach())


def other_scaling(policy) -> None:
    for module in policy.net.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] *= 2


@pytest.mark.parametrize("change", [other_rank, other_scaling])
def test_another_adapter_drops_them(policy, prompts, card, asked, change):
    for _ in range(2):
        written(policy, prompts, keep=True)
    captured = len(card.graphs)
    change(policy)
    expected = as_they_are(policy, prompts)
    asked.clear()
    for _ in range(2):
        same(written(policy, prompts, keep=True), expected)
    of_reading = {key for key in asked if key[0] == "read" and asked.count(key) > 3}
    assert len(card.graphs) - captured >= len(of_reading) > 1


def test_other_prompts_and_other_settings_drop_them(policy, prompts, card):
    written(policy, prompts, keep=True)
    written(policy, prompts, temperature=0.4, keep=True)
    cold = as_they_are(policy, prompts, temperature=0.4)
    same(written(policy, prompts, temperature=0.4, keep=True), cold)
    one = written(policy, prompts[:1], keep=True)
    same(one, as_they_are(policy, prompts[:1]))


def test_other_stop_ids_take_other_buffers(policy, prompts, card):
    for _ in range(2):
        written(policy, prompts, keep=True)
    base = dataclasses.replace(policy.base, stop_ids=frozenset(range(5, 256, 3)))
    stopping = dataclasses.replace(policy, base=base)
    expected = as_they_are(stopping, prompts)
    same(written(stopping, prompts, keep=True), expected)
    with pytest.raises(AssertionError):
        same(as_they_are(policy, prompts), expected)


def memory(policy) -> object:
    """Return what a policy's graphs hold."""
    return policy.graphs._held, policy.graphs._replay


NOTHING = None, {}


def test_they_are_held_for_the_next_call_alone_if_asked(policy, prompts, card):
    written(policy, prompts)
    assert memory(policy) == NOTHING
    written(policy, prompts, keep=True)
    assert memory(policy)[0] is not None and memory(policy)[1]
    with pytest.raises(KeyboardInterrupt):
        written(policy, prompts, keep=True, should_stop=lambda: True)
    assert memory(policy) == NOTHING


def test_they_are_held_no_more_once_memory_has_run_out(policy, prompts, card, capsys):
    assert not free_memory()  # there was nothing to give up, so what comes is held
    written(policy, prompts, keep=True)
    assert memory(policy) != NOTHING and free_memory()
    assert memory(policy) == NOTHING
    assert capsys.readouterr().err == (
        "note: memory is short: decoding keeps neither cache nor CUDA graphs for the next rollout"
        " from now on\n"
    )
    expected = as_they_are(policy, prompts)
    same(written(policy, prompts, keep=True), expected)
    assert memory(policy) == NOTHING and not free_memory()


def test_without_graphs_nothing_is_held(policy, prompts):
    written(policy, prompts, keep=True)
    assert memory(policy) == NOTHING


def test_what_cannot_be_captured_goes_on_without_and_says_why(policy, prompts, card, capsys):
    card.fails = RuntimeError("CUDA error: operation not permitted\nmore about it")
    expected = as_they_are(policy, prompts)
    for _ in range(2):
        same(written(policy, prompts, keep=True), expected)
    assert capsys.readouterr().err == (
        "note: decoding goes on without CUDA graphs: CUDA error: operation not permitted\n"
    )
    assert len(card.graphs) == 1 and replays(card) == 0
    assert card.current is card.own_stream


def test_what_waits_for_the_gpu_is_not_captured(policy, prompts, card, capsys, monkeypatch):
    def waits(*arguments):
        tokens, mass = draw(*arguments)
        return tokens + 0 * int(tokens.max()), mass

    draw = engine.decoding.draw
    monkeypatch.setattr(engine.decoding, "draw", waits)
    same(written(policy, prompts), as_they_are(policy, prompts))
    assert "without CUDA graphs: operation not permitted when" in capsys.readouterr().err
    assert card.current is card.own_stream


@pytest.mark.parametrize("where", ["in the work", "at the end"])
def test_memory_that_runs_out_in_a_capture_is_left_to_the_remedies(
    policy, prompts, card, monkeypatch, where
):
    def runs_out(*arguments):
        if card.current is not card.own_stream and len(card.graphs) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return draw(*arguments)

    draw = engine.decoding.draw
    if where == "in the work":
        monkeypatch.setattr(engine.decoding, "draw", runs_out)
    else:
        card.fails = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2.00 GiB"):
        written(policy, prompts, keep=True)
    assert memory(policy) == NOTHING and not policy.graphs.unable
    assert card.current is card.own_stream


def test_a_trace_knows_which_memory_is_used_again():
    first, second = torch.zeros(3), torch.zeros(3)

    def traced(last: torch.Tensor) -> list[tuple]:
        with Trace() as trace:
            first.add_(1)
            second.add_(1)
            last.mul_(2)
        return trace.operations

    assert traced(first) == traced(first) != traced(second)


def test_other_work_of_one_kind_drops_the_graphs_of_all(card):
    """When a graph ends, torch gives back what cuBLAS works in on the stream that all share."""
    graphs, results = Graphs(), torch.zeros(2)

    def call(scale: float) -> None:
        with graphs.call(keep=True):
            graphs.held("room", lambda: results)
            for _ in range(4):
                graphs.run("draw", (), lambda: results[0].add_(1))
                graphs.run("read", (), lambda: results[1].add_(scale))

    call(1.0)
    assert len(card.graphs) == 2
    call(1.0)
    assert len(card.graphs) == 2
    call(2.0)
    assert len(card.graphs) == 4 and card.pools[2] is card.pools[3] is not card.pools[0]
    assert results.tolist() == [12, 16]
