"""Protect that a server answers with the adapter that is being trained, and with no earlier one.

Run: pytest tests/engine/test_served_adapter.py
"""

from __future__ import annotations

import hashlib
import logging

import pytest
import torch
from safetensors.torch import load_file

import engine.served_adapter
from engine.model import adapter_state
from engine.runtime import StopRequested
from engine.served_adapter import ServedAdapter
from engine.server import Server, ServerError, ServerGone
from tests.helpers.fake_server import FakeServer
from tests.helpers.tiny import attach_random_adapter, load, policy_of

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def policy(tiny_checkpoint):
    base = load(tiny_checkpoint("qwen2_5_vl"))
    return policy_of(attach_random_adapter(base), base)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr("engine.server.PAUSES", (0.0, 0.0))
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def run(tmp_path):
    """Make the folder of a run whose name has a blank."""
    folder = tmp_path / "my run"
    folder.mkdir()
    return folder


def served_from(fake, run) -> ServedAdapter:
    return ServedAdapter(Server.of(fake.url, 10), run)


def never() -> bool:
    return False


def train(policy) -> None:
    with torch.no_grad():
        policy.parameters[0].add_(1)


def test_each_adapter_has_a_name_and_a_folder_of_its_own_for_its_time(fake, run, policy):
    served = served_from(fake, run)
    flat = b"".join(one.detach().numpy().tobytes() for one in policy.parameters)
    first = served.serve(policy, 3, never)
    assert first == f"my_run-3-{hashlib.sha256(flat).hexdigest()[:8]}"
    assert fake.adapters == {first: str(run / "vllm" / first)}
    saved, own = load_file(run / "vllm" / first / "adapter_model.safetensors"), policy.adapted
    assert saved.keys() == adapter_state(own).keys()
    assert all(torch.equal(saved[name], one) for name, one in adapter_state(own).items())

    assert served.serve(policy, 4, never) == first  # nothing has changed
    train(policy)
    second = served.serve(policy, 4, never)
    assert second.startswith("my_run-4-") and fake.adapters == {second: str(run / "vllm" / second)}
    assert [path.name for path in (run / "vllm").iterdir()] == [second]
    # it was there before the other left
    asked = [(path, body["lora_name"]) for _, path, _, body in fake.requests if body]
    assert asked == [(LOAD, first), (LOAD, second), (UNLOAD, first)]
    # new folder, new name, nothing in place
    assert all(body.keys() == {"lora_name", "lora_path"} for body in fake.bodies(LOAD))
    served.close()
    assert not fake.adapters and not (run / "vllm").exists()


def test_a_server_that_was_started_anew_is_given_the_adapter_again(fake, run, policy):
    served = served_from(fake, run)
    first = served.serve(policy, 0, never)
    fake.adapters.clear()
    again = served.serve(policy, 0, never)
    assert again == f"{first}-2" and list(fake.adapters) == [again]
    assert [path.name for path in (run / "vllm").iterdir()] == [again]


def test_after_a_kill_no_name_is_used_again(fake, run, policy):
    """The server still has the name of a process that did not come to its end."""
    killed = served_from(fake, run).serve(policy, 0, never)
    name = served_from(fake, run).serve(policy, 0, never)
    assert name == f"{killed}-2" and fake.adapters[name] == str(run / "vllm" / name)
    assert [path.name for path in (run / "vllm").iterdir()] == [name]


def test_a_folder_that_the_server_does_not_see_is_said(fake, run, policy):
    answer = fake.answer
    elsewhere = {"lora_path": "/not/there"}
    fake.answer = lambda verb, path, body: answer(verb, path, body and body | elsewhere)
    served = served_from(fake, run)
    with pytest.raises(ServerError, match="does not see .*/vllm/my_run-0-.* one file system"):
        served.serve(policy, 0, never)
    served.close()
    assert not (run / "vllm").exists()


def test_a_server_without_adapters_by_name_is_said(fake, run, policy):
    fake.statuses = [200, 400]
    with pytest.raises(ServerError, match="status 400"):
        served_from(fake, run).serve(policy, 0, never)


def test_an_adapter_that_is_taken_and_not_listed_is_refused(fake, run, policy):
    fake.changed = lambda path, document: (
        {"data": [{"id": "base"}]} if path == "/v1/models" else document
    )
    with pytest.raises(ServerError, match="it took my_run-0-.* and does not list it"):
        served_from(fake, run).serve(policy, 0, never)


def test_a_first_answer_that_was_lost_does_no_harm(fake, run, policy):
    """The server has loaded it, and the second try is told that the name is there."""
    lost = []
    answer = fake.answer

    def breaks_once(verb, path, body):
        status, document = answer(verb, path, body)
        if path == LOAD and not lost:
            lost.append(path)
            return 503, document
        return status, document

    fake.answer = breaks_once
    name = served_from(fake, run).serve(policy, 0, never)
    assert list(fake.adapters) == [name] and len(fake.bodies(LOAD)) == 2


def test_what_was_loaded_too_late_is_unloaded(fake, run, policy):
    """The server loads it, but its answer does not come in time."""
    answer = fake.answer

    def late(verb, path, body):
        found = answer(verb, path, body)
        if path == LOAD:
            fake.wait()
        return found

    fake.answer = late
    served = ServedAdapter(Server.of(fake.url, 0.5), run)
    with pytest.raises(ServerGone, match="no answer within 0.5 s"):
        served.serve(policy, 0, never)
    assert len(fake.adapters) == 1
    served.close()
    assert not fake.adapters and not (run / "vllm").exists()


@pytest.mark.parametrize("after", [1, 2], ids=["models", "load"])
def test_a_signal_is_heard_while_the_server_is_waited_for(fake, run, policy, after):
    fake.changed = lambda path, document: (
        document if len(fake.requests) < after else fake.wait() or document
    )
    served = served_from(fake, run)
    with pytest.raises(StopRequested):
        served.serve(policy, 0, lambda: len(fake.requests) == after)
    served.close()
    assert not fake.adapters and not (run / "vllm").exists()


@pytest.fixture
def few_words(monkeypatch):
    monkeypatch.setattr(engine.served_adapter, "LAST_WORDS", 0.3)


def test_an_unload_that_hangs_is_not_waited_for(fake, run, policy, few_words, caplog):
    served, answer = served_from(fake, run), fake.answer
    first = served.serve(policy, 0, never)
    fake.answer = lambda verb, path, body: (
        fake.wait() if path == UNLOAD else answer(verb, path, body)
    )
    train(policy)
    with caplog.at_level(logging.WARNING):
        second = served.serve(policy, 1, never)
    assert second in fake.adapters
    assert caplog.messages == [f"the server may keep adapter {first}: it was not waited for"]
    assert [path.name for path in (run / "vllm").iterdir()] == [second]


def test_a_busy_server_does_not_hold_the_end(fake, run, policy, few_words):
    """It asks for a minute before the next try, which is never made."""
    served = served_from(fake, run)
    served.serve(policy, 0, never)
    fake.statuses, fake.headers = [503] * 3, {"Retry-After": "60"}
    served.close()
    assert len(fake.bodies(UNLOAD)) == 1 and not (run / "vllm").exists()


def test_a_second_interrupt_asks_for_nothing(fake, run, policy):
    served = served_from(fake, run)
    served.serve(policy, 0, never)
    served.close(at_once=True)
    assert not fake.bodies(UNLOAD) and not (run / "vllm").exists()


def test_an_end_without_a_server_is_an_end(fake, run, policy):
    served = served_from(fake, run)
    served.serve(policy, 0, never)
    fake.raw = b""
    served.close()
    assert not (run / "vllm").exists()


def test_nothing_of_a_killed_run_stays(fake, run, policy):
    left = run / "vllm" / ".tmp-run-3-12345678"
    left.mkdir(parents=True)
    served_from(fake, run)
    assert not (run / "vllm").exists()
