"""Protect training from a server whose model is not the policy, though its answers are well-formed.

Run: pytest tests/engine/test_probe.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

import engine.probe
from engine.gemma3 import Gemma3
from engine.probe import EACH, MEAN, _differs, probe
from engine.runtime import StopRequested
from engine.server import ServerError
from tests.helpers.engine_writer import RemoteSetting
from tests.helpers.tiny import examples_of, load, policy_of

FAMILIES = ["qwen2_5_vl", "gemma3"]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tiny_checkpoint, tiny_images, tmp_path_factory):
    examples = examples_of(tiny_images, 56, 112)
    folders = tiny_checkpoint(request.param), tmp_path_factory.mktemp("sent")
    setting = RemoteSetting(folders[0], examples, folders[1], [])
    with setting.fake:
        yield setting


@pytest.fixture
def setting(made, monkeypatch):
    monkeypatch.setattr(engine.probe, "TOKENS", 12)
    for name in ("policy", "raw", "whole", "seen"):
        monkeypatch.setattr(made.write, name, getattr(made.write, name))
    monkeypatch.setattr(made.fake, "changed", made.fake.changed)
    return made


def asked(setting, **more):
    return probe(setting.served, setting.policy, setting.prompts, setting.examples, **more)


def refused(setting, says):
    """Return the line of a refusal: the address, what was found and what is allowed."""
    with pytest.raises(ServerError, match=says) as raised:
        asked(setting)
    text = str(raised.value)
    assert text.startswith(f"{setting.fake.url}, model 'base': its log-probabilities")
    assert "tokens they differ by" in text and "allowed is 0.0001 each in float32" in text
    assert text.isprintable() and len(text) < 800
    return text


def test_the_same_model_differs_by_rounding(setting):
    tokens = []

    def counted(path, document):
        tokens.append(document["usage"]["completion_tokens"])
        return document

    setting.fake.changed = counted
    found = asked(setting)
    assert set(found) == {"tokens", "mean", "largest", "nucleus_mean", "adapter_seen"}
    assert 0 <= found["mean"] <= found["largest"] < 5e-5 and 0 <= found["nucleus_mean"] < 5e-5
    assert len(tokens) == 4 and found["tokens"] == sum(tokens)
    bodies = setting.fake.bodies()[-4:]
    assert sorted(body["top_p"] for body in bodies) == [0.95, 0.95, 1.0, 1.0]
    assert {(body["temperature"], body["n"], body["max_tokens"]) for body in bodies} == {
        (0.8, 2, 12)
    }


def test_an_adapter_is_seen_where_it_is_told_from_the_base(setting):
    """One without effect passes where the server ignores it. What is trained stays the same."""
    policy, theirs = setting.policy, setting.write.policy
    frozen = policy.parameters[0].requires_grad_(False)
    trained = policy.digest()
    try:
        assert asked(setting)["adapter_seen"] is True
        assert policy.digest() == trained and not frozen.requires_grad
    finally:
        frozen.requires_grad_()
    seconds = [one for name, one in policy.net.named_parameters() if "lora_B" in name]
    kept = [one.data.clone() for one in seconds]
    for one in seconds:
        one.data.zero_()
    try:
        with theirs.adapted.disable_adapter():
            assert asked(setting)["adapter_seen"] is False
    finally:
        for one, before in zip(seconds, kept, strict=True):
            one.data.copy_(before)


def test_raw_log_probabilities_are_named(setting):
    setting.write.raw = True
    refused(setting, "They are those of temperature 1: start it with --logprobs-mode processed")


def test_a_missing_adapter_is_named(setting):
    theirs = setting.write.policy
    with theirs.adapted.disable_adapter():
        refused(setting, "They are the base's without the adapter: name the adapter")


def changed_weights(setting, name, factor):
    """Multiply the server's weights of a name."""
    for path, parameter in setting.write.policy.net.named_parameters():
        if name in path:
            parameter.data.mul_(factor)


@pytest.mark.parametrize(
    "name, factor",
    [("layers.1.self_attn.q_proj.lora_B", 0), ("mlp.up_proj.base_layer", 1.01)],
    ids=["half an adapter", "another base"],
)
def test_other_weights_are_seen(setting, name, factor):
    net = setting.write.policy.net
    kept = {path: one.data.clone() for path, one in net.named_parameters() if name in path}
    assert kept
    changed_weights(setting, name, factor)
    try:
        refused(setting, "Likely: other weights of the base; an adapter of which only a part")
    finally:
        for path, parameter in net.named_parameters():
            if path in kept:
                parameter.data.copy_(kept[path])


def test_an_image_that_the_server_changes_is_seen(setting):
    def blurred(image):
        half = [side // 2 for side in image.size]
        return image.resize(half, Image.Resampling.BILINEAR).resize(image.size)

    setting.write.seen = blurred
    refused(setting, "Likely: .* images that it changes")


class CausalGemma3(Gemma3):
    """See images as text is seen, as most attention backends of servers do."""

    def attention_masks(self, net, attention_mask, token_types, queries):
        return super().attention_masks(net, attention_mask, 0 * token_types, queries)


def test_attention_that_is_causal_within_images_is_seen(setting):
    if not setting.policy.family.fixed_images:
        pytest.skip("this family's attention is causal within images")
    theirs = setting.write.policy
    base = dataclasses.replace(theirs.base, family=CausalGemma3())
    setting.write.policy = dataclasses.replace(theirs, base=base)
    refused(setting, "Likely: .* tokens of an image do not see each other")


def test_a_nucleus_that_is_not_made_whole_again_is_seen(setting):
    setting.write.whole = True
    refused(setting, r"of a nucleus \(top_p\) are not those of what is left in it")


def test_a_base_without_an_adapter_is_probed(setting, tiny_checkpoint):
    """As in an evaluation of a base model: there is no adapter that could be missing."""
    family = setting.policy.family.model_type
    base = dataclasses.replace(load(tiny_checkpoint(family)), stop_ids=setting.policy.base.stop_ids)
    theirs = setting.write.policy
    bare = policy_of(base.net, base, theirs.prompt)
    with theirs.adapted.disable_adapter():
        found = probe(setting.served, bare, setting.prompts, setting.examples)
        assert found["largest"] < 5e-5 and found["adapter_seen"] is False
    with pytest.raises(ServerError, match="Likely"):
        probe(setting.served, bare, setting.prompts, setting.examples)


def test_a_stop_ends_the_probe(setting):
    with pytest.raises(StopRequested):
        asked(setting, should_stop=lambda: True)


# ---- how much is allowed -------------------------------------------------------------------------
def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    "values, share, strict, differs",
    [
        ((EACH, EACH), 0, True, False),
        ((0, 1.01 * EACH), 0, True, True),
        ((0, float("nan")), 0, True, True),
        ((0,) * 38 + (1, 1), 0.05, True, False),  # two of forty lie on the border
        ((0,) * 37 + (1, 1, 1), 0.05, True, True),
        ((0, 1.99 * MEAN), 0, False, False),
        ((0, 2.01 * MEAN), 0, False, True),
        ((0, float("nan")), 0, False, True),
    ],
)
def test_what_is_allowed(values, share, strict, differs):
    assert _differs(tensor(*values), share, strict=strict) == differs


def test_bfloat16_is_told_by_the_head(setting, monkeypatch):
    """What it allows on average stands in the line."""
    net = setting.policy.net
    monkeypatch.setattr(engine.probe, "MEAN", -1.0)
    head = net.base_model.model.lm_head
    before = head.weight.data
    head.weight.data = before.bfloat16()
    try:
        with pytest.raises(ServerError, match="allowed is -1 on average in bfloat16"):
            asked(setting)
    finally:
        head.weight.data = before
