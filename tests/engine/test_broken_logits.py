"""Protect that logits which are not finite never become tokens: the sampler stops and names them.

Run: pytest tests/engine/test_broken_logits.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import engine.decoding
from engine.base_model import BaseModel
from engine.completion import SamplingConfig
from engine.decoding import STEPS
from engine.encode import EncodedPrompt
from engine.generate import generate
from engine.runtime import StepFailed
from tests.helpers.tiny import SHORT, examples_of, load, policy_of, uniform_for, with_features

LENGTH = 6


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> BaseModel:
    return load(tiny_checkpoint("qwen2_5_vl"))


@pytest.fixture(scope="module")
def prompts(model, tiny_images) -> list[EncodedPrompt]:
    return [
        with_features(model, model.encoder.encode_prompt(example, SHORT))
        for example in examples_of(tiny_images, 56, 56, 84)
    ]


def poison(monkeypatch, call: int, change: Callable[[torch.Tensor], object]) -> None:
    """Change the logits [n,V] of the `call`-th token that is written, from 1 on."""
    scaled, calls = engine.decoding.scaled_logits, []

    def poisoned(*arguments):
        logits = scaled(*arguments)
        calls.append(1)
        if len(calls) == call:
            change(logits)
        return logits

    monkeypatch.setattr(engine.decoding, "scaled_logits", poisoned)


def written(model, prompts, temperature: float = 1.0, generations: int = 2, **more):
    return generate(
        policy_of(model.net, model),
        prompts,
        SamplingConfig(temperature, 0.95, LENGTH),
        num_generations=generations,
        uniform=uniform_for(len(prompts), generations, LENGTH),
        **more,
    )


def never_stop(monkeypatch) -> None:
    """Let all completions reach their limit, so that the rows stay where they are."""
    isin = torch.isin
    monkeypatch.setattr(torch, "isin", lambda *values: torch.zeros_like(isin(*values)))


# the longest prompt is written first, so rows 2 and 3 of 6 are the second prompt's completions
@pytest.mark.parametrize(
    "value", [math.nan, math.inf], ids=["one logit is NaN", "one logit is infinite"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_one_logit_of_one_token_stops_the_sampler(model, prompts, monkeypatch, value, temperature):
    def change(logits):
        logits[3, 17] = value

    never_stop(monkeypatch)
    poison(monkeypatch, 4, change)
    with pytest.raises(StepFailed) as failed:
        written(model, prompts, temperature)
    assert str(failed.value) == (
        f"example {prompts[1].example!r}: the model's logits are not finite numbers at token 4 of"
        " its answer; the weights of the model or of its adapter are damaged, or too large for"
        " float32"
    )
    assert prompts[1].example == "e1"


@pytest.mark.parametrize("every", [1, 4, 8])
def test_the_token_is_named_however_seldom_rows_are_looked_at(model, prompts, monkeypatch, every):
    never_stop(monkeypatch)
    monkeypatch.setitem(STEPS, "cpu", replace(STEPS["cpu"], look_every=every))
    poison(monkeypatch, 3, lambda logits: logits[0].fill_(math.nan))
    with pytest.raises(StepFailed, match=r"example 'e2': .* at token 3 of its answer"):
        written(model, prompts)


def test_what_follows_a_stop_token_is_no_fault(model, prompts, monkeypatch):
    """Where rows are looked at seldom a completion is decoded on after it has stopped."""
    plain = written(model, prompts)
    stop = int(plain[2][0].ids[1])
    stopping = replace(model, stop_ids=frozenset([stop]))
    expected = written(stopping, prompts)
    assert expected[2][0].ids.tolist() == plain[2][0].ids[:2].tolist()
    monkeypatch.setitem(STEPS, "cpu", replace(STEPS["cpu"], look_every=4, sizes=(1 / 2,)))
    poison(monkeypatch, 3, lambda logits: logits[0].fill_(math.nan))
    found = written(stopping, prompts)
    for one, other in zip(sum(found, []), sum(expected, []), strict=True):
        assert one.ids.tolist() == other.ids.tolist()


@pytest.mark.parametrize("call", [1, LENGTH])
def test_the_first_and_the_last_token_are_looked_at_too(model, prompts, monkeypatch, call):
    never_stop(monkeypatch)
    poison(monkeypatch, call, lambda logits: logits.fill_(-math.inf))
    with pytest.raises(StepFailed, match=rf"example 'e2': .* at token {call} of its answer"):
        written(model, prompts)


def test_a_prompt_that_is_not_finite_is_named_also_where_it_waited(model, prompts, monkeypatch):
    """Protects a NaN that the prompt's own forward makes: in its cache and its first token."""
    broken = dict(prompts[2].vision) | {
        "features": torch.full_like(prompts[2].vision["features"], math.nan)
    }
    waiting = [*prompts[:2], EncodedPrompt(*list(vars(prompts[2]).values())[:2], broken, "e2")]
    with pytest.raises(StepFailed, match=r"example 'e2': .* at token 1 of its answer"):
        written(model, waiting, generations=1, max_rows=1)


def test_a_suppressed_id_is_no_fault(model, prompts, monkeypatch):
    never_stop(monkeypatch)
    poison(monkeypatch, 2, lambda logits: logits[:, :9].fill_(-math.inf))
    assert len(written(model, prompts)) == len(prompts)
