"""Protect when a server is compared with the policy, and that a run leaves it when it should.

Run: pytest tests/rl/test_server_sampler.py
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

import engine.served_adapter
import rl.server_sampler
from engine.config import UsageError
from engine.ranks import ALONE, Ranks
from engine.runtime import PeerError, StepFailed, StopRequested
from engine.server import ServerError
from rl.server_sampler import ServerSampler
from rl.settings import GRPOConfig
from tests.helpers.fake_server import FakeServer
from tests.helpers.threads import in_threads

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

    def should_stop() -> bool:
        return path in [asked for _, asked, *_ in fake.requests]

    with pytest.raises(StopRequested):
        sampler.begin(POLICY, ["e"], 0, should_stop)
    assert should_stop() and not fake.adapters and not (tmp_path / "vllm").exists()
    fake.requests.clear()
    with pytest.raises(StopRequested):
        rollout(sampler, 1, should_stop)
    assert should_stop()


def test_of_several_ranks_the_first_asks_and_all_note(fake, opened, monkeypatch):
    monkeypatch.setattr(rl.server_sampler, "probe", lambda *asked: {"adapter_seen": True})
    asked = []
    monkeypatch.setattr(
        rl.server_sampler, "generate_remote", lambda served, *_, **__: asked.append(served.model)
    )

    def work(ranks: Ranks) -> list[int]:
        sampler, entries = opened(ranks)
        sampler.begin(POLICY, ["e"], 0, never)
        rollout(sampler, 0)
        return [entry["step"] for entry in entries]

    assert in_threads(2, work) == [[0], [0]]
    assert len(asked) == 2 and set(asked) == set(fake.adapters)


def test_all_ranks_hear_of_a_key_that_cannot_be_sent(opened, monkeypatch):
    """Else they would wait for the one whose environment has it."""

    def of(base_url, timeout):
        if threading.current_thread() in second:
            raise ServerError("the key holds blanks")

    second: list[threading.Thread] = []
    monkeypatch.setattr(rl.server_sampler, "Server", SimpleNamespace(of=of))

    def work(ranks: Ranks) -> object:
        if not ranks.first:
            second.append(threading.current_thread())
        return opened(ranks)

    waits, fails = in_threads(2, work)
    assert isinstance(waits, PeerError) and isinstance(fails, UsageError)
    assert "the key holds blanks" in str(fails)
