"""Protect rollouts on a server: what the engine's own sampler gives, or a refusal.

The server is a fake one whose writer is the engine itself, with another copy of the model.

Run: pytest tests/engine/test_remote.py
"""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

import engine.server
from data.files import DataError
from engine.collate import collate_rows
from engine.completion import SamplingConfig
from engine.encode import EncodedRow
from engine.generate import generate
from engine.nucleus import nucleus
from engine.out_of_memory import Limits
from engine.random_numbers import server_seed
from engine.remote import Served, generate_remote, own_pass
from engine.runtime import StopRequested
from engine.server import ServerError, ServerGone
from tests.helpers.engine_writer import RemoteSetting
from tests.helpers.tiny import examples_of, save_images, uniform_for

SAMPLED, GREEDY = SamplingConfig(0.8, 0.9, 8), SamplingConfig(0.0, 1.0, 8)
WHOLE = SamplingConfig(1.3, 1.0, 8)
COUNT, GENERATIONS = 4, 3
SEEDS = [server_seed("rollout", 0, place) for place in range(COUNT)]
FAMILIES = ["qwen2_5_vl", "gemma3"]


class Setting(RemoteSetting):
    """Ask the server and the engine's own sampler for the same."""

    def own(self, sampling, together=1):
        """Return what the engine's sampler gives, so many prompts at a time."""
        uniform = uniform_for(COUNT, GENERATIONS, sampling.max_completion_length)
        found = []
        for i in range(0, COUNT, together):
            part = slice(i, i + together)
            found += generate(
                self.policy,
                self.prompts[part],
                sampling,
                num_generations=GENERATIONS,
                uniform=uniform[part],
            )
        return found

    def remote(self, sampling, **more):
        """Return what comes from the server."""
        asked = self.served, self.policy, self.prompts, self.examples, sampling
        more = {"seeds": SEEDS, "num_generations": GENERATIONS} | more
        return generate_remote(*asked, **more)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tiny_checkpoint, tiny_images, tmp_path_factory):
    save_images(tiny_images / "61", 3, 61)
    examples = examples_of(tiny_images, 56, 84, 61, 112)
    folders = tiny_checkpoint(request.param), tmp_path_factory.mktemp("sent")
    setting = Setting(folders[0], examples, folders[1], SEEDS)
    with setting.fake:
        yield setting


@pytest.fixture
def setting(made, monkeypatch):
    monkeypatch.setattr(engine.server, "PAUSES", (0.01, 0.02))
    fake = made.fake
    fake.requests.clear()
    yield made
    fake.changed, fake.statuses, fake.raw = (lambda path, document: document), [], None


@pytest.mark.parametrize("sampling", [SAMPLED, WHOLE, GREEDY], ids=["nucleus", "whole", "greedy"])
def test_a_rollout_over_http_is_the_engines(setting, sampling):
    """To the bit, as the sampler gives for a prompt alone; the mass is from another pass.

    Completions of prompts that are sampled together are the same, and rounded otherwise.
    """
    came = []
    own = setting.own(sampling)
    remote = setting.remote(sampling, on_finished=lambda i, found: came.append((i, found)))
    assert sorted(came, key=lambda one: one[0]) == list(enumerate(remote))
    together = setting.own(sampling, COUNT)
    if sampling is not GREEDY:
        assert len({one.truncated for group in own for one in group}) == 2  # both kinds of ends
    for mine, theirs, third in zip(sum(own, []), sum(remote, []), sum(together, []), strict=True):
        assert torch.equal(third.ids, theirs.ids)
        assert torch.equal(mine.ids, theirs.ids) and mine.ids.dtype == theirs.ids.dtype
        assert mine.truncated == theirs.truncated
        assert theirs.logprobs.dtype == theirs.top_p_mass.dtype == torch.float32
        if sampling is SAMPLED:
            assert torch.allclose(mine.top_p_mass, theirs.top_p_mass, atol=1e-5, rtol=0)
            assert torch.allclose(mine.logprobs, theirs.logprobs, atol=2e-5, rtol=0)
        else:
            assert torch.equal(mine.logprobs, theirs.logprobs)
            assert torch.allclose(mine.top_p_mass, theirs.top_p_mass, atol=1e-6, rtol=0)
    if sampling is SAMPLED:
        assert min(one.top_p_mass.min() for group in own for one in group) < 0.97


def test_it_is_bit_equal_where_the_mass_is_the_samplers(setting, monkeypatch):
    """What travels loses nothing: only the mass' own pass rounds otherwise."""
    own = setting.own(SAMPLED)
    drawn = {
        (id(prompt), *one.ids.tolist()): one.top_p_mass
        for prompt, group in zip(setting.prompts, own, strict=True)
        for one in group
    }

    def masses(policy, prompt, completions, measure, should_stop):
        return [drawn[(id(prompt), *ids.tolist())] for ids in completions]

    monkeypatch.setattr("engine.remote.own_pass", masses)
    remote = setting.remote(SAMPLED)
    for mine, theirs in zip(sum(own, []), sum(remote, []), strict=True):
        for name in ("ids", "logprobs", "top_p_mass"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def test_what_is_asked(setting):
    setting.remote(SAMPLED)
    setting.remote(GREEDY, seeds=())
    bodies = setting.fake.bodies()
    sampled, greedy = bodies[:COUNT], bodies[COUNT:]
    assert sorted(body["seed"] for body in sampled) == sorted(SEEDS)
    for body in sampled:
        assert (body["n"], body["temperature"], body["top_p"]) == (GENERATIONS, 0.8, 0.9)
        assert body["model"] == "base" and body["max_tokens"] == 8 and body["ignore_eos"]
        assert body["logprobs"] is body["return_token_ids"] is True and body["top_k"] == 0
    for body in greedy:
        assert (body["n"], body["temperature"], body["top_p"]) == (1, 0.0, 1.0)
        assert "seed" not in body


def test_greedy_completions_are_repeated(setting):
    for group in setting.remote(GREEDY, seeds=()):
        assert len(group) == GENERATIONS and group[0] is group[1]


def test_sampling_needs_seeds(setting):
    with pytest.raises(ValueError, match="sampling needs seeds"):
        setting.remote(SAMPLED, seeds=())
    with pytest.raises(ValueError):
        setting.remote(SAMPLED, seeds=SEEDS[:-1])
    assert setting.fake.requests == []


def test_requests_at_a_time_are_bounded_by_default(setting):
    assert Served(setting.served.server, "base").concurrency == 32


def test_the_policy_is_evaluated_and_its_mode_put_back(setting):
    """Dropout would change the nucleus' mass."""
    modes, net = [], setting.policy.net
    net.train()
    setting.remote(SAMPLED, on_finished=lambda i, found: modes.append(net.training))
    assert net.training and modes == [False] * COUNT
    net.eval()


def test_a_system_text_that_the_template_folds_is_sent_folded(setting, monkeypatch):
    """The server's template is the same, so it would refuse a system message too."""
    monkeypatch.setattr(setting.policy.encoder.chat, "folds_system", True)
    setting.fake.statuses = [400]
    with pytest.raises(ServerError, match="400"):
        setting.remote(GREEDY, seeds=())
    (message,) = setting.fake.bodies()[0]["messages"]
    kinds = [part["type"] for part in message["content"]]
    assert message["role"] == "user" and kinds == ["text", "image_url", "text"]
    assert message["content"][0]["text"] == "Read.\n\n"


def test_the_own_pass_is_the_training_forward(setting):
    """By hand: the nucleus of the softmax of what the head makes of each state."""
    (group, *_) = setting.remote(SAMPLED)
    policy, prompt = setting.policy, setting.prompts[0]
    for one in group:
        row = EncodedRow(prompt, one.ids, torch.ones(len(one.ids), dtype=torch.bool))
        hidden, targets = policy.hidden_states(collate_rows([row], policy.encoder.pad_token_id))
        assert torch.equal(targets, one.ids)
        logits = (hidden @ policy.head.t()) / 0.8
        logits[:, list(policy.base.suppressed_ids)] = -torch.inf
        logprobs = logits.log_softmax(1)
        _, mass = nucleus(logprobs, 0.9)
        assert torch.allclose(one.top_p_mass, mass, atol=1e-5, rtol=0)
        whole = logprobs.gather(1, one.ids[:, None])[:, 0]
        assert torch.allclose(one.logprobs, whole, atol=2e-5, rtol=0)


def test_the_own_pass_is_cut_where_memory_runs_out(setting):
    ids = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([10])]
    sizes = []

    def measure(hidden, targets):
        sizes.append(len(targets))
        if len(targets) > 3:
            raise torch.OutOfMemoryError("tried to allocate")
        return targets * 2

    policy = dataclasses.replace(setting.policy, limits=Limits())
    policy.limits.report = lambda cut: None
    found = own_pass(policy, setting.prompts[0], ids, measure)
    assert [own.tolist() for own in found] == [[10, 12, 14], [16, 18], [20]]
    assert sizes[0] == 6 and sizes[-1] <= 3


# ---- what is refused -----------------------------------------------------------------------------
def at(place, change):
    """Change a chat answer at a place, leaving other documents alone."""

    def changed(path, document):
        if path == "/v1/chat/completions":
            inner = document
            for name in place[:-1]:
                inner = inner[name]
            inner[place[-1]] = change(inner[place[-1]])
        return document

    return changed


def refused(setting, says="the server read another prompt"):
    """Return the line of a refusal, which names the example."""
    with pytest.raises(ServerError, match=says) as raised:
        setting.remote(SAMPLED)
    text = str(raised.value)
    assert text.isprintable() and len(text) < 600 and "example 'e" in text
    return text


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda ids: ids[:-1],
            r"tokens, and the engine's has \d+; from token \d+ on it read nothing",
        ),
        (lambda ids: [*ids, 7], r"on it read 7 \('.+'\), and the engine's has nothing"),
        (lambda ids: [*ids[:3], 11, *ids[4:]], r"from token 3 on it read 11 \('.+'\), and"),
        (lambda ids: [*ids[:3], 2**31 - 1, *ids[4:]], r"on it read 2147483647 \(None\), and"),
        (lambda ids: [], "0 tokens, and the engine's has"),
    ],
)
def test_another_prompt_is_refused_with_its_first_difference(setting, change, says):
    setting.fake.changed = at(["prompt_token_ids"], change)
    text = refused(setting, says)
    assert "the server read another prompt" in text and "Let it serve the same checkpoint" in text


def test_an_image_of_another_size_is_another_prompt(setting):
    """Qwen's models have as many tokens as the image is large; Gemma's would pass here."""
    if setting.policy.family.fixed_images:
        pytest.skip("an image of this family has as many tokens at any size")
    theirs = setting.write.policy.encoder.image_processor
    before, theirs.size = theirs.size, dataclasses.replace(theirs.size, longest_edge=4 * 28 * 28)
    try:
        refused(setting)
    finally:
        theirs.size = before


def test_an_image_that_is_resized_already_stays_as_it_is(setting):
    """The server's own bounds may be wider: nothing is left to resize."""
    theirs = setting.write.policy.encoder.image_processor
    theirs.do_resize = False
    try:
        for mine, other in zip(setting.own(GREEDY), setting.remote(GREEDY, seeds=()), strict=True):
            assert torch.equal(mine[0].ids, other[0].ids)
    finally:
        theirs.do_resize = True


def test_what_the_sampler_would_never_draw_is_refused(setting):
    policy = setting.policy
    stop, first = sorted(policy.base.stop_ids)[0], ["choices", 0, "token_ids"]
    suppressed = policy.base.suppressed_ids[0]
    size = len(policy.head)
    for change, says in (
        (lambda ids: [size, *ids[1:]], f"token {size} came, and the model has {size}"),
        (lambda ids: [suppressed, *ids[1:]], rf"drew {suppressed} \('.+'\), which logit_bias"),
        (lambda ids: [stop] * len(ids), rf"goes on after its stop token {stop} \("),
    ):
        setting.fake.changed = at(first, change)
        refused(setting, says)


def test_a_completion_that_ends_too_early_is_refused(setting):
    def changed(path, document):
        for choice in document.get("choices", []):
            if choice["finish_reason"] == "length":
                choice["token_ids"].pop()
                choice["logprobs"]["content"].pop()
        return document

    setting.fake.changed = changed
    refused(setting, "ends after 7 of 8 tokens, without a stop token")


def test_a_stop_token_in_the_last_place_is_no_truncation(setting):
    """Whatever the server calls it: some look at the length first."""

    def changed(path, document):
        for choice in document.get("choices", []):
            choice["finish_reason"] = "length"
        return document

    own = setting.own(SAMPLED)
    setting.fake.changed = changed
    remote = setting.remote(SAMPLED)
    ends = [[one.truncated for one in group] for group in own]
    assert [[one.truncated for one in group] for group in remote] == ends


@pytest.mark.parametrize(
    "fault, kind, says",
    [
        (lambda fake: fake.statuses.extend([503] * 99), ServerGone, "status 503.*3 times"),
        (lambda fake: setattr(fake, "raw", b""), ServerGone, "3 times in a row"),
        (lambda fake: setattr(fake, "changed", lambda path, one: b"{"), ServerError, "no JSON"),
        (
            lambda fake: setattr(fake, "changed", at(["model"], lambda name: "other")),
            ServerError,
            "'other' answered",
        ),
        (
            lambda fake: setattr(fake, "changed", at(["choices"], lambda all_: all_[:-1])),
            ServerError,
            "completions came",
        ),
    ],
)
def test_a_server_that_fails_ends_the_rollout(setting, fault, kind, says):
    fault(setting.fake)
    with pytest.raises(kind, match=says):
        setting.remote(SAMPLED)
    assert not [thread for thread in threading.enumerate() if thread.name == "ask"]


def test_a_busy_server_changes_nothing(setting):
    own = setting.own(GREEDY)
    setting.fake.statuses = [503, 200, 429, 500]
    for mine, theirs in zip(own, setting.remote(GREEDY, seeds=()), strict=True):
        assert torch.equal(mine[0].ids, theirs[0].ids)
    assert len(setting.fake.bodies()) == COUNT + 3


def test_an_image_that_cannot_be_read_is_named(setting):
    bad = [dataclasses.replace(setting.examples[0], image="56/none.png"), *setting.examples[1:]]
    with pytest.raises(DataError, match="none.png"):
        generate_remote(
            setting.served, setting.policy, setting.prompts, bad, GREEDY, num_generations=1
        )


def test_a_stop_ends_the_rollout(setting):
    finished = []
    with pytest.raises(StopRequested):
        setting.remote(
            SAMPLED,
            should_stop=lambda: bool(finished),
            on_finished=lambda i, found: finished.append(i),
        )
    assert 1 <= len(finished) < COUNT
