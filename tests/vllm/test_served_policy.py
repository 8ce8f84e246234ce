"""Protect what the client relies on, against a real vLLM server of the demo's base.

Checked: prompts, images, greedy answers, samples and log-probabilities of a served adapter are the
engine's own, and the probe tells it from one that lacks a layer, from one of another scale and from
the base.

The server is that of tests/vllm/serve.py, in float32, on this machine. Each test loads adapters
under names of its own and unloads them. The demo's SFT adapter is trained first, in some three
minutes, unless VLLM_TEST_ADAPTER names a finished run.

Run: VLLM_TEST_URL=http://127.0.0.1:8811 pytest tests/vllm -s
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.images import load_image
from data.prompts import build_messages
from data.records import read_examples
from engine.chat_api import Answer, ask, ask_all, chat_messages, training_options
from engine.collate import collate_rows
from engine.completion import SamplingConfig
from engine.encode import EncodedRow
from engine.generate import generate
from engine.probe import probe
from engine.random_numbers import server_seed
from engine.remote import Served, generate_remote
from engine.server import ServerError
from tests.vllm.serve import BASE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
LONGEST = 96
CLOSE = 1e-4  # a token's log-probability in float32, in nats


def test_greedy_answers_are_those_of_the_engine(policy, server, sft_run, loaded):
    """100 images: the same tokens of the prompts, the same answers, the same log-probabilities."""
    examples = read_examples("demo:test-a")[:100]
    options = training_options(policy.base.stop_ids, policy.base.suppressed_ids)
    options |= {"model": loaded(sft_run), "temperature": 0.0, "max_tokens": LONGEST}

    def answers(*, with_ids: bool) -> list[Answer]:
        def asked(example):
            messages = chat_messages(build_messages(policy.prompt), [load_image(example)])
            return partial(ask, server, {"messages": messages, **options}, with_ids=with_ids)

        return ask_all([asked(example) for example in examples], 16, lambda: False)

    found, texts = answers(with_ids=True), answers(with_ids=False)
    prompts = [policy.encode(example) for example in examples]
    own = generate(policy, prompts, SamplingConfig(0.0, 1.0, LONGEST), max_rows=50)
    furthest = 0.0
    for prompt, answer, said, [completion] in zip(prompts, found, texts, own, strict=True):
        [choice], [text] = answer.choices, said.choices
        assert answer.prompt_ids == prompt.input_ids.tolist()
        assert choice.ids == completion.ids.tolist()
        assert text.text == policy.encoder.decode(completion.ids)
        difference = (torch.tensor(choice.logprobs) - completion.logprobs).abs().max().item()
        furthest = max(furthest, difference)
    print(f"100 greedy answers: equal; log-probabilities differ by {furthest:.1e} at most")
    assert furthest < CLOSE


def test_images_of_other_sizes_are_seen_as_the_engine_sees_them(
    policy, server, sft_run, loaded, tmp_path
):
    """The engine resizes them, and the server leaves them so."""
    sizes, examples = [(384, 384), (300, 400), (640, 360), (90, 130)], []
    for example, size in zip(read_examples("demo:test-a"), sizes * 3, strict=False):
        path = tmp_path / f"{example.id}.png"
        load_image(example).resize(size).save(path)
        examples.append(dataclasses.replace(example, image=path.name, image_root=tmp_path))
    prompts = [policy.encode(example) for example in examples]
    assert len({len(prompt.input_ids) for prompt in prompts}) > 1
    greedy = SamplingConfig(0.0, 1.0, LONGEST)
    theirs = generate_remote(Served(server, loaded(sft_run)), policy, prompts, examples, greedy)
    own = generate(policy, prompts, greedy)
    for [one], [other] in zip(theirs, own, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        assert (one.logprobs - other.logprobs).abs().max() < CLOSE


def test_samples_have_the_log_probabilities_that_training_computes(policy, server, sft_run, loaded):
    """Over the whole vocabulary, although the server's are of the nucleus. Seeds decide them."""
    examples = read_examples("demo:rl-train")[:16]
    prompts = [policy.encode(example) for example in examples]
    served = Served(server, loaded(sft_run))

    def sampled(seed):
        return generate_remote(
            served,
            policy,
            prompts,
            examples,
            SamplingConfig(0.8, 0.95, LONGEST),
            num_generations=4,
            seeds=[server_seed("rollout", seed, place) for place in range(len(prompts))],
        )

    groups = sampled(1)
    ids = [[one.ids.tolist() for one in group] for group in groups]
    assert ids == [[one.ids.tolist() for one in group] for group in sampled(1)]
    assert ids != [[one.ids.tolist() for one in group] for group in sampled(2)]
    rows = [
        EncodedRow(prompt, one.ids, torch.ones(len(one.ids), dtype=torch.bool))
        for prompt, group in zip(prompts, groups, strict=True)
        for one in group
    ]
    with torch.no_grad():
        own, _ = policy.logprobs_and_entropy(collate_rows(rows, policy.encoder.pad_token_id))
    theirs = [one for group in groups for one in group]
    differences = torch.cat(
        [row[: len(one.ids)] - one.logprobs for row, one in zip(own, theirs, strict=True)]
    )
    masses = torch.cat([one.top_p_mass for one in theirs])
    distinct = sum(len({tuple(one) for one in group}) for group in ids) / len(ids)
    print(
        f"{len(differences)} sampled tokens: log-probabilities differ by"
        f" {differences.abs().mean():.1e}, {differences.abs().max():.1e} at most; without the"
        f" nucleus' mass by {(-masses.log()).mean():.1e}, {(-masses.log()).max():.1e} at most;"
        f" {distinct:.2f} of 4 answers to an image are distinct"
    )
    assert differences.abs().max() < CLOSE < (-masses.log()).mean()
    assert distinct > 3


def test_the_probe_finds_the_policy_and_nothing_else(policy, server, sft_run, loaded, tmp_path):
    """vLLM takes an adapter without its last layer, or with another scale, as a sound one."""
    examples = read_examples("demo:rl-train")[:4]
    prompts = [policy.encode(example) for example in examples]

    def probed(name):
        return probe(Served(server, name), policy, prompts, examples)

    print("\nprobe:", probed(loaded(sft_run)))
    weights = load_file(sft_run / "adapter_model.safetensors")
    settings = json.loads((sft_run / "adapter_config.json").read_text())
    wrong = {
        "half": ({key: value for key, value in weights.items() if ".layers.3." not in key}, {}),
        "strong": (weights, {"lora_alpha": settings["lora_alpha"] * 1.1}),
    }
    assert len(wrong["half"][0]) == len(weights) * 3 / 4
    for name, (own, changed) in wrong.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file(own, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(settings | changed))
        with pytest.raises(ServerError, match="are not the policy's") as refused:
            probed(loaded(folder))
        print(f"{name}: {refused.value}")
    with pytest.raises(ServerError, match="the base's without the adapter") as refused:
        probed(BASE)
    print(f"{BASE}: {refused.value}")
