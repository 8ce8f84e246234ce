"""Protect when a server is compared with the policy, and that a run leaves it when it should.

Run: pytest tests/rl/test_server_sampler.py
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

import engine.served_adapter
import rl.server_sampler
from engine.config import UsageError
from engine.ranks import ALONE
from engine.runtime import StepFailed, StopRequested
from engine.server import ServerError
from rl.server_sampler import ServerSampler
from rl.settings import GRPOConfig
from tests.helpers.fake_server import FakeServer

DIGEST = "ab" * 32
POLICY: Any = SimpleNamespace(digest=lambda: DIGEST, encode=lambda example: example)


@pytest.fixture
def fake(monkeypatch):
    def save(policy, folder):
        (folder / "adapter_config.json").write_text("{}")

    monkeypatch.setattr(engine.served_adapter, "save_adapter", save)
    monkeypatch.setattr(engine.served_adapter, "LAST_WORDS", 0.3)
    monkeypatch.setattr(rl.server_sampler, "generate_remote", lambda *asked, **options: [])
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def opened(fake, tmp_path):
    """Make samplers: `opened()` -> (sampler, the entries that it notes)."""

    def make(ranks=ALONE) -> tuple[ServerSampler, list[dict]]:
        entries: list[dict] = []
        config = GRPOConfig(use_vllm=True, vllm_server_base_url=fake.url, vllm_server_timeout=9.0)
        return ServerSampler(config, tmp_path, ranks, entries.append), entries

    return make


def never() -> bool:
    return False


def rollout(sampler: ServerSampler, step: int, should_stop=never) -> None:
    sampler.sample(POLICY, ["e"], ["e"], [0], step, should_stop)


@pytest.mark.parametrize(
    "begun, seen, compared",
    [
        (0, 0, [0]),
        (0, 3, [0, 1, 2, 4]),
        (0, 99, [0, 1, 2, 4, 8]),
        (3, 99, [3, 6]),  # a resume
    ],
)
def test_a_server_is_compared_until_the_adapter_is_seen(opened, monkeypatch, begun, seen, compared):
    asked = []

    def probe(served, policy, prompts, examples, should_stop):
        asked.append(served.model)
        return {"adapter_seen": begun + len(asked) > seen}

    monkeypatch.setattr(rl.server_sampler, "probe", probe)
    sampler, entries = opened()
    sampler.begin(POLICY, ["e"], begun, never)
    for step in range(begun, 10):
        rollout(sampler, step)
    assert [entry["step"] for entry in entries] == compared and len(asked) == len(compared)
    assert {entry["version"] for entry in entries} == {"0.32.0"}


def test_a_later_comparison_that_differs_fails_the_step(opened, monkeypatch):
    found: list[Any] = [{"adapter_seen": False}]

    def probe(*asked):
        if not found:
            raise ServerError("they are not the policy's")
        return found.pop()

    monkeypatch.setattr(rl.server_sampler, "probe", probe)
    sampler, entries = opened()
    sampler.begin(POLICY, ["e"], 0, never)
    rollout(sampler, 0)
    with pytest.raises(StepFailed, match="they are not the policy's"):
        rollout(sampler, 1)
    assert [entry["step"] for entry in entries] == [0]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/load_lora_adapter", "/version"])
def test_a_signal_is_heard_whatever_is_asked(fake, opened, monkeypatch, tmp_path, path):
    monkeypatch.setattr(rl.server_sampler, "probe", lambda *asked: {"adapter_seen": True})
    answer = fake.answer
    fake.answer = lambda verb, asked, body: (
        fake.wait() if asked == path else answer(verb, asked, body)
    )
    sampler, _ = opened()
    with pytest.raises(StopRequested):
        sampler.begin(POLICY, ["e"], 0, lambda: fake.requests and fake.requests[-1][1] == path)
    assert not fake.adapters and not (tmp_path / "vllm").exists()
    if path != "/version":
        with pytest.raises(StopRequested):
            rollout(sampler, 1, lambda: fake.requests[-1][1] == path)


def test_all_ranks_hear_of_a_key_that_cannot_be_sent(opened, monkeypatch):
    """Else they would wait for the one whose environment has it."""
    told = []

    @contextmanager
    def together():
        try:
            yield
        except UsageError as error:
            told.append(str(error))
            raise

    monkeypatch.setenv("VLLM_API_KEY", "two words")
    with pytest.raises(UsageError):
        opened(SimpleNamespace(first=False, together=together))
    assert len(told) == 1 and "VLLM_API_KEY" in told[0]
