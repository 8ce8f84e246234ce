"""Protect one model as one object: what it has adapters for, and what it answers as."""

from __future__ import annotations

import pytest

from data.prompts import PROMPTS
from engine.policy import Policy
from tests.helpers.tiny import attach_random_adapter, load


def test_a_policy_with_adapters_gives_them_and_one_without_says_so(tiny_checkpoint):
    base = load(tiny_checkpoint("qwen2_5_vl"))
    prompt = next(iter(PROMPTS.values()))
    with pytest.raises(TypeError, match="has no adapter"):
        _ = Policy(base.net, base, prompt).adapted
    net = attach_random_adapter(base)
    assert Policy(net, base, prompt).adapted is net
