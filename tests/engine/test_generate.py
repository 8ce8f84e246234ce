"""Protect the sampler.

Checked: what it draws, what it records of it, and that nothing else has a say in it.

Random checkpoints of every family with ragged prompts; frequencies by chi-square with fixed seeds.

Run: pytest tests/engine/test_generate.py
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter

import pytest
import torch

import engine.generate
from data.examples import Example
from data.prompts import Prompt
from engine.cache import DecodingMask
from engine.collate import collate_prompts, collate_rows
from engine.completion import Completion, SamplingConfig, completion_mask, is_truncated
from engine.decoding import STEPS
from engine.encode import EncodedPrompt, EncodedRow
from engine.families import language_model, lm_head_weight
from engine.forward import completion_hidden_states
from engine.generate import generate
from engine.logprobs import scaled_logits, token_logprobs
from engine.model import BaseModel
from engine.nucleus import draw, nucleus
from rl.logs import rollout_metrics
from rl.rewards import HardReward
from rl.samples import build_samples
from tests.helpers.tiny import (
    SAVE,
    attach_random_adapter,
    examples_of,
    load,
    pixel_inputs,
    policy_of,
    uniform_for,
    with_features,
)

SHORT, LONG = (
    Prompt("short", "Which?"),
    Prompt("long", "A longer question about this image, if you please?"),
)
NOTHING = torch.tensor([], dtype=torch.long)
NEVER = frozenset({-1})  # stop ids that never come


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=list(SAVE))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family, tiny_checkpoint) -> BaseModel:
    """Load a model with an adapter in `model.net`'s layers. No test changes it."""
    loaded = load(tiny_checkpoint(family))
    attach_random_adapter(loaded)
    return loaded


@pytest.fixture(scope="module")
def prompts(model, tiny_images) -> list[EncodedPrompt]:
    """Make three prompts of different lengths, with images of different sizes."""
    texts = (SHORT, LONG, SHORT)
    return [
        with_features(model, model.encoder.encode_prompt(example, text))
        for example, text in zip(examples_of(tiny_images, 56, 112, 84), texts, strict=True)
    ]


def sample(
    model: BaseModel, prompts, *, num_generations=1, seed=0, stop_ids=None, net=None, **sampling
) -> list[list[Completion]]:
    if stop_ids is not None:
        model = dataclasses.replace(model, stop_ids=frozenset(stop_ids))
    config = SamplingConfig(**{"max_completion_length": 20, **sampling})
    return generate(
        policy_of(net or model.net, model),
        prompts,
        config,
        num_generations=num_generations,
        uniform=uniform_for(len(prompts), num_generations, config.max_completion_length, seed),
    )


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.ids.tolist() for completion in group] for group in groups]


@torch.no_grad()
def scored(
    model: BaseModel, prompts, groups, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, Completion]:
    """Score sampled completions by the training forward.

    Returns (log-probabilities [M], hidden states [M,H], all completions end to end).
    """
    rows = [
        EncodedRow(prompt, completion.ids, torch.ones(len(completion.ids), dtype=torch.bool))
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]
    completions = [completion for group in groups for completion in group]
    joined = [
        torch.cat([getattr(c, name) for c in completions])
        for name in ("ids", "logprobs", "top_p_mass")
    ]
    together = Completion(*joined, truncated=False)
    hidden, targets = completion_hidden_states(
        model.net, model.family, collate_rows(rows, model.encoder.pad_token_id)
    )
    assert torch.equal(targets, together.ids)
    logprobs, _ = token_logprobs(
        hidden,
        lm_head_weight(model.net),
        targets,
        temperature=temperature,
        suppress_token_ids=model.suppressed_ids,
    )
    return logprobs, hidden, together


# Where a completion ends


def as_completion(ids: torch.Tensor, stop_ids) -> Completion:
    kept = ids[completion_mask(ids[None], stop_ids)[0]]
    return Completion(
        kept, torch.zeros(len(kept)), torch.ones(len(kept)), bool(is_truncated(ids[None], stop_ids))
    )


def samples_of(rows: torch.Tensor, stop_ids, *, mask_truncated: bool):
    groups = [[as_completion(row, stop_ids) for row in rows]]
    return build_samples(
        [Example("e", "p", "x.png", (), "site", None)],
        groups,
        lambda ids: "",
        {"hard": HardReward()},
        "hard",
        answer_format="think_solution",
        mask_truncated_completions=mask_truncated,
        text_length=len,
        length_of="completion",
    )


def test_p07_completions_end_at_the_first_stop_token(case):
    with case("P07_eos_mask") as p07:
        ids, stop_ids = torch.tensor(p07.inputs["completion_ids"]), frozenset(p07.inputs["eos_ids"])
        mask = completion_mask(ids, stop_ids)
        p07.close("completion_mask", mask.int())
        p07.close("is_truncated", is_truncated(ids, stop_ids))
        kept, masked = (
            samples_of(ids, stop_ids, mask_truncated=mask_truncated)
            for mask_truncated in (False, True)
        )
        p07.close("lengths", [len(sample.ids) for sample in kept])
        metrics = rollout_metrics(kept)
        p07.close("clipped_ratio", metrics["completions/clipped_ratio"])
        p07.close("mean_length", metrics["completions/mean_length"])
        p07.close("mean_terminated_length", metrics["completions/mean_terminated_length"])
        masks = torch.nn.utils.rnn.pad_sequence(
            [sample.mask.int() for sample in masked], batch_first=True
        )
        p07.close("mask_when_truncated_completions_masked", masks)
        assert all(sample.mask.all() for sample in kept)


def test_a_padding_id_may_be_a_stop_id():
    ids = torch.tensor([[0, 0, 5, 0]])
    assert completion_mask(ids, {0}).tolist() == [[True, False, False, False]]


# Frequencies


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    total = sum(counts)
    return sum(
        (count - total * p) ** 2 / (total * p)
        for count, p in zip(counts, probabilities, strict=True)
    )


# 99.9th percentiles of the chi-square distribution by degrees of freedom
CRITICAL = {2: 13.816, 4: 18.467}


def drawn(logits: list[float], temperature: float, top_p: float, count: int = 40_000) -> list[int]:
    row = torch.tensor([logits])
    logprobs = scaled_logits(row, temperature, NOTHING).log_softmax(1)
    tokens, _ = draw(logprobs.expand(count, -1), top_p, torch.rand(count, generator=seeded(1)))
    return torch.bincount(tokens, minlength=row.shape[1]).tolist()


def test_frequencies_match_temperature_and_top_p(case):
    with case("P09_temperature_topp", "probs_at_T", "behaviour_probs") as p09:
        # 5 tokens, 4 degrees of freedom, without a nucleus
        frequencies = drawn(p09.inputs["logits"], 0.8, 1.0)
        assert chi_square(frequencies, p09.expected["probs_at_T"]) < CRITICAL[4]
        # 3 tokens in the nucleus, 2 degrees of freedom, and nothing outside it
        truncated = drawn(p09.inputs["logits"], 0.8, 0.95)
        assert chi_square(truncated[:3], p09.expected["behaviour_probs"][:3]) < CRITICAL[
            2
        ] and truncated[3:] == [0, 0]
        # The test has the power to see another temperature or another nucleus.
        assert (
            chi_square(drawn(p09.inputs["logits"], 0.85, 1.0), p09.expected["probs_at_T"])
            > CRITICAL[4]
        )
        assert (
            chi_square(
                drawn(p09.inputs["logits"], 0.8, 0.9)[:3], p09.expected["behaviour_probs"][:3]
            )
            > CRITICAL[2]
        )
        p09.unchecked.clear()  # compared by frequency, not by value


def test_frequencies_of_the_whole_sampler(model, prompts):
    # The first token of 4,000 completions of one prompt, in three cells: the likeliest, the second,
    # any other of the nucleus.
    groups = sample(
        model,
        prompts[:1],
        num_generations=4000,
        temperature=0.8,
        top_p=0.9,
        max_completion_length=1,
        seed=2,
    )
    firsts = Counter(int(completion.ids[0]) for completion in groups[0])
    _, hidden, _ = scored(model, prompts[:1], [groups[0][:1]], 0.8)
    size = len(lm_head_weight(model.net))
    logprobs, _ = token_logprobs(
        hidden.expand(size, -1),
        lm_head_weight(model.net),
        torch.arange(size),
        temperature=0.8,
        suppress_token_ids=model.suppressed_ids,
    )
    order = logprobs.argsort(descending=True)
    inside = int((logprobs[order].exp().cumsum(0) < 0.9).sum()) + 1
    assert 3 < inside < size and set(firsts) <= set(order[:inside].tolist())
    expected = logprobs[order[:inside]].exp() / logprobs[order[:inside]].exp().sum()
    top = order[:2].tolist()
    counts = [firsts[top[0]], firsts[top[1]], 4000 - firsts[top[0]] - firsts[top[1]]]
    assert (
        chi_square(counts, [float(expected[0]), float(expected[1]), float(expected[2:].sum())])
        < CRITICAL[2]
    )


# What is recorded


@pytest.mark.parametrize("temperature", [0.8, 1.7])
def test_recorded_logprobs_are_the_training_forwards(model, prompts, temperature):
    groups = sample(model, prompts, num_generations=3, temperature=temperature, top_p=0.95)
    logprobs, _, completions = scored(model, prompts, groups, temperature)
    assert (
        len(logprobs) > 60 and len({tuple(c.ids.tolist()) for group in groups for c in group}) > 6
    )
    torch.testing.assert_close(completions.logprobs, logprobs, rtol=0, atol=1e-5)


def test_every_token_lies_in_the_recorded_nucleus(model, prompts):
    groups = sample(model, prompts, num_generations=3, temperature=0.8, top_p=0.5)
    _, hidden, completions = scored(model, prompts, groups, 0.8)
    suppressed = torch.tensor(model.suppressed_ids)
    kept, mass = nucleus(
        scaled_logits(hidden @ lm_head_weight(model.net).t(), 0.8, suppressed).log_softmax(1), 0.5
    )
    torch.testing.assert_close(completions.top_p_mass, mass, rtol=0, atol=1e-5)
    assert (mass >= 0.5).all() and (mass < 1).all()
    assert (kept.gather(1, completions.ids[:, None]) > 0).all()


def test_cached_decoding_equals_teacher_forcing(model, prompts):
    groups = sample(model, prompts, temperature=0.0, max_completion_length=40)
    logprobs, hidden, completions = scored(model, prompts, groups, 1.0)
    logits = hidden @ lm_head_weight(model.net).t()
    logits[:, list(model.suppressed_ids)] = float("-inf")
    assert torch.equal(logits.argmax(1), completions.ids)
    torch.testing.assert_close(completions.logprobs, logprobs, rtol=0, atol=1e-5)
    assert (completions.top_p_mass == 1).all()
    assert len(set(completions.ids.tolist())) > 10  # not one token for ever


@torch.no_grad()
def test_greedy_equals_transformers(model, prompts):
    batch = collate_prompts(prompts, model.encoder.pad_token_id)
    inputs = pixel_inputs(prompts)
    inputs["token_type_ids" if model.family.model_type == "gemma3" else "mm_token_type_ids"] = (
        batch.token_types
    )
    output = model.net.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=sorted(model.stop_ids),
        pad_token_id=model.encoder.pad_token_id,
        suppress_tokens=list(model.suppressed_ids),
        **inputs,
    )
    theirs = output[:, batch.input_ids.shape[1] :]
    ours = sample(model, prompts, temperature=0.0, max_completion_length=30)
    for row, [completion] in zip(theirs, ours, strict=True):
        length = len(completion.ids)
        assert row[:length].tolist() == completion.ids.tolist()
        assert completion.truncated or completion.ids[-1].item() in model.stop_ids
        assert length == 30 or not completion.truncated


# What must not matter


def hostile_settings(folder) -> None:
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            settings
            | {
                "do_sample": False,
                "temperature": 9.0,
                "top_k": 1,
                "top_p": 0.01,
                "repetition_penalty": 2.0,
                "max_new_tokens": 1,
                "max_length": 3,
                "no_repeat_ngram_size": 1,
                "suppress_tokens": list(range(200)),
                "num_beams": 4,
            }
        )
    )


def test_the_models_generation_config_changes_nothing(
    family, tiny_checkpoint, tiny_images, tmp_path
):
    hostile = shutil.copytree(tiny_checkpoint(family), tmp_path / "hostile")
    hostile_settings(hostile)
    results = []
    for folder in (tiny_checkpoint(family), hostile):
        loaded = load(folder)
        prompts = [
            loaded.encode_prompt(example, SHORT) for example in examples_of(tiny_images, 56, 112)
        ]
        results.append((loaded, sample(loaded, prompts, num_generations=3)))
    (plain_model, plain), (hostile_model, changed) = results
    assert (
        hostile_model.net.generation_config.top_k == 1
        and hostile_model.net.generation_config.repetition_penalty == 2.0
    )
    assert hostile_model.stop_ids == plain_model.stop_ids
    assert (
        ids_of(changed) == ids_of(plain) and max(len(c.ids) for group in plain for c in group) > 10
    )
    for group, other in zip(plain, changed, strict=True):
        for completion, same in zip(group, other, strict=True):
            assert torch.equal(completion.logprobs, same.logprobs) and torch.equal(
                completion.top_p_mass, same.top_p_mass
            )


def test_left_padding_changes_nothing(model, prompts):
    # The first rows get the same uniform numbers in both calls; beside the longer prompt they are
    # padded.
    alone = sample(model, [prompts[0], prompts[0]], num_generations=2)
    beside = sample(model, [prompts[0], prompts[1]], num_generations=2)
    assert len(prompts[1].input_ids) > len(prompts[0].input_ids)
    assert ids_of(alone)[0] == ids_of(beside)[0] and ids_of(alone)[1] != ids_of(beside)[1]
    for completion, same in zip(alone[0], beside[0], strict=True):
        torch.testing.assert_close(completion.logprobs, same.logprobs, rtol=0, atol=1e-5)


def test_finished_rows_do_not_change_the_others(model, prompts):
    endless = sample(model, prompts, num_generations=4, stop_ids=NEVER)
    assert all(
        len(completion.ids) == 20 and completion.truncated
        for group in endless
        for completion in group
    )
    stops = {int(i) for i in torch.cat([c.ids for group in endless for c in group])[::29]}
    stopped = sample(model, prompts, num_generations=4, stop_ids=stops)
    lengths = []
    for group, whole_group in zip(stopped, endless, strict=True):
        for completion, whole in zip(group, whole_group, strict=True):
            at = [i for i, token in enumerate(whole.ids.tolist()) if token in stops]
            length = at[0] + 1 if at else 20  # up to and including the first stop token
            assert completion.ids.tolist() == whole.ids[
                :length
            ].tolist() and completion.truncated == (not at)
            torch.testing.assert_close(
                completion.logprobs, whole.logprobs[:length], rtol=0, atol=1e-5
            )
            torch.testing.assert_close(
                completion.top_p_mass, whole.top_p_mass[:length], rtol=0, atol=1e-5
            )
            lengths.append(length)
    # both of several kinds
    assert len(set(lengths)) > 3 and len({int(c.ids[-1]) for group in stopped for c in group}) > 3


# How they are written


def same_completions(groups, others) -> None:
    assert ids_of(groups) == ids_of(others)
    for completion, other in zip(
        (c for group in groups for c in group), (c for group in others for c in group), strict=True
    ):
        assert completion.truncated == other.truncated
        torch.testing.assert_close(completion.logprobs, other.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(completion.top_p_mass, other.top_p_mass, rtol=0, atol=1e-5)


@pytest.fixture
def seen_by_decoder(model) -> list[int]:
    """Record the tokens of every call of the decoder."""
    seen: list[int] = []
    hook = language_model(model.net).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    yield seen
    hook.remove()


def ragged(model, prompts, num_generations: int) -> set[int]:
    """Find stop ids with which the completions of seed 0 have many lengths."""
    endless = sample(model, prompts, num_generations=num_generations, stop_ids=NEVER)
    return {int(i) for i in torch.cat([c.ids for group in endless for c in group])[::23]}


@pytest.mark.parametrize(
    ("num_generations", "max_rows"), [(1, 1), (1, 2), (1, 4), (3, 3), (3, 7), (3, 1)]
)
def test_finished_rows_make_room_for_the_next_prompts(
    model, prompts, num_generations, max_rows, seen_by_decoder
):
    seven = [prompts[i] for i in (0, 1, 2, 1, 0, 2, 1)]
    stops = ragged(model, seven, num_generations)
    together = sample(model, seven, num_generations=num_generations, stop_ids=stops)
    assert len({len(c.ids) for group in together for c in group}) > 3
    seen_by_decoder.clear()
    told = []
    refilled = generate(
        policy_of(model.net, dataclasses.replace(model, stop_ids=frozenset(stops))),
        seven,
        SamplingConfig(max_completion_length=20),
        num_generations=num_generations,
        max_rows=max_rows,
        uniform=uniform_for(7, num_generations, 20),
        on_finished=lambda i, group: told.append((i, group)),
    )
    same_completions(refilled, together)
    assert sorted(i for i, _ in told) == list(range(7)) and all(
        group is refilled[i] for i, group in told
    )
    lengths = [len(prompt.input_ids) for prompt in seven]
    reading = [tokens for tokens in seen_by_decoder if tokens >= min(lengths)]
    writing = [tokens for tokens in seen_by_decoder if tokens < min(lengths)]
    places = max(1, max_rows // num_generations)
    assert sum(reading) == sum(lengths)  # every prompt once, for all its completions
    assert len(reading) >= 7 / places and max(writing) <= places * num_generations
    assert reading[0] == sum(sorted(lengths)[-places:])  # the longest first


def test_the_work_follows_the_rows_that_are_left(model, prompts, seen_by_decoder):
    stops = ragged(model, prompts, 4)
    seen_by_decoder.clear()
    lengths = [
        len(c.ids)
        for group in sample(model, prompts, num_generations=4, stop_ids=stops)
        for c in group
    ]
    # A completion's last token is not read; the first is predicted by its prompt.
    assert seen_by_decoder[1:] == [
        sum(length > step for length in lengths) for step in range(1, max(lengths))
    ]


@pytest.mark.parametrize("every", [2, 3, 50])
def test_looking_for_finished_rows_less_often_changes_nothing(model, prompts, monkeypatch, every):
    stops = ragged(model, prompts, 3)
    expected = sample(model, prompts, num_generations=3, stop_ids=stops)
    monkeypatch.setitem(STEPS, "cpu", dataclasses.replace(STEPS["cpu"], look_every=every))
    same_completions(sample(model, prompts, num_generations=3, stop_ids=stops), expected)
    model = dataclasses.replace(model, stop_ids=frozenset(stops))
    same_completions(
        generate(
            policy_of(model.net, model),
            prompts,
            SamplingConfig(max_completion_length=20),
            num_generations=3,
            max_rows=4,
            uniform=uniform_for(3, 3, 20),
        ),
        expected,
    )


def test_prompts_are_read_so_many_tokens_at_a_time(model, prompts, monkeypatch, seen_by_decoder):
    expected = sample(model, prompts, num_generations=2, max_completion_length=1)
    a, b, c = sorted(len(prompt.input_ids) for prompt in prompts)
    assert seen_by_decoder == [a + b + c]
    for tokens, calls in (
        (c, [c, a + b] if a + b <= c else [c, b, a]),
        (a + b, [c, a + b]),
        (1, [c, b, a]),
    ):
        seen_by_decoder.clear()
        monkeypatch.setattr(engine.generate, "READ_TOKENS", tokens)
        same_completions(
            sample(model, prompts, num_generations=2, max_completion_length=1), expected
        )
        assert seen_by_decoder == calls


def test_a_prompt_is_kept_once_and_finished_completions_are_dropped(model, prompts, monkeypatch):
    sizes = []
    attend = DecodingMask.attend

    def watched(self, layer, *arguments):
        kept = self.cache.layers[layer]
        if layer == 0:
            heads = self.cache.heads
            sizes.append(
                (len(kept.prompt_keys), len(kept.keys) // heads, len(self.places) // heads)
            )
        return attend(self, layer, *arguments)

    monkeypatch.setattr(DecodingMask, "attend", watched)
    sample(model, prompts, num_generations=8, stop_ids=ragged(model, prompts, 8), seed=1)
    sizes = sizes[19:]  # after those of finding the stop ids
    assert sizes[0][:2] == (3, 24)
    assert sizes[-1][0] < 3 and len({rows for _, rows, _ in sizes}) > 3
    assert all(rows >= written for _, rows, written in sizes)
    assert sum(written for _, _, written in sizes) > 0.4 * sum(rows for _, rows, _ in sizes)


def test_a_prompt_has_the_same_completions_beside_any_others(model, prompts):
    numbers = uniform_for(3, 2, 6)

    def each(chosen: list[int]) -> dict[int, list[list[int]]]:
        groups = generate(
            policy_of(model.net, model),
            [prompts[i] for i in chosen],
            SamplingConfig(max_completion_length=6),
            num_generations=2,
            uniform=[numbers[i] for i in chosen],
        )
        return dict(zip(chosen, ids_of(groups), strict=True))

    every = each([0, 1, 2])
    for chosen in ([2, 0], [2, 1]):
        assert each(chosen) == {i: every[i] for i in chosen}
    assert every[0][0] != every[0][1]


def test_each_stop_id_stops(model, prompts):
    [[endless]] = sample(model, prompts[:1], stop_ids=NEVER)
    for token in set(endless.ids.tolist()):
        [[completion]] = sample(model, prompts[:1], stop_ids={token, -1})
        length = endless.ids.tolist().index(token) + 1
        assert torch.equal(completion.ids, endless.ids[:length]) and not completion.truncated


def test_stop_ids_of_the_checkpoints(model, family):
    ids = model.encoder.tokenizer.convert_tokens_to_ids
    gemmas = ("<eos>", "<end_of_turn>")
    names = gemmas if family == "gemma3" else ("<|im_end|>", "<|endoftext|>")
    assert model.stop_ids == {ids(name) for name in names}


def test_a_stop_token_on_the_last_position_is_not_a_truncation(model, prompts):
    [[endless]] = sample(model, prompts[:1], stop_ids=NEVER, max_completion_length=6)
    last = int(endless.ids[-1])
    first_at = endless.ids.tolist().index(last) + 1
    [[completion]] = sample(model, prompts[:1], stop_ids={last}, max_completion_length=first_at)
    assert (
        not completion.truncated and len(completion.ids) == first_at and completion.ids[-1] == last
    )
    if first_at > 1:
        [[completion]] = sample(
            model, prompts[:1], stop_ids={last}, max_completion_length=first_at - 1
        )
        assert completion.truncated and len(completion.ids) == first_at - 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_image_tokens_are_never_sampled(family, tiny_checkpoint, tiny_images, temperature):
    favoured = load(tiny_checkpoint(family))
    head = lm_head_weight(favoured.net)
    first, second = favoured.suppressed_ids[:2]
    direction = torch.randn(head.shape[1], generator=seeded(3))
    # whatever the state, one of the two wins by far
    head[first], head[second] = 100 * direction, -100 * direction
    prompts = [favoured.encode_prompt(examples_of(tiny_images, 56)[0], SHORT)]
    unprotected = dataclasses.replace(favoured, suppressed_ids=())
    [[completion]] = sample(unprotected, prompts, temperature=temperature, max_completion_length=10)
    assert set(completion.ids.tolist()) <= {first, second}  # they would be drawn
    groups = sample(favoured, prompts, num_generations=4, temperature=temperature)
    assert not {i for c in groups[0] for i in c.ids.tolist()} & set(favoured.suppressed_ids)
    # and they do not take the others' probability away
    assert all((c.logprobs > -50).all() for c in groups[0])


def test_suppressed_ids_are_the_image_tokens(model, family):
    qwens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    gemmas = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    names = gemmas if family == "gemma3" else qwens
    assert sorted(model.encoder.tokenizer.convert_tokens_to_ids(names)) == list(
        model.suppressed_ids
    )
    assert model.encoder.image_token_id in model.suppressed_ids


# Calls


def test_a_seed_gives_the_same_completions_again(model, prompts):
    first, again, other = (
        ids_of(sample(model, prompts, num_generations=2, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    # the completions of one prompt have numbers of their own
    assert all(group[0] != group[1] for group in first)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5])
def test_parts_of_a_group_have_the_numbers_of_the_whole(model, prompts, max_rows):
    """A cut by memory changes no completion: part p has its own rows of the same numbers."""
    stops = ragged(model, prompts, 6)
    whole = sample(model, prompts, num_generations=6, stop_ids=stops)
    parted = generate(
        policy_of(model.net, dataclasses.replace(model, stop_ids=frozenset(stops))),
        prompts,
        SamplingConfig(max_completion_length=20),
        num_generations=6,
        max_rows=max_rows,
        whole_groups=False,
        uniform=uniform_for(3, 6, 20),
    )
    same_completions(parted, whole)


def test_greedy_needs_no_numbers_and_sampling_does(model, prompts):
    greedy = generate(
        policy_of(model.net, model),
        prompts,
        SamplingConfig(temperature=0.0, max_completion_length=5),
    )
    assert [len(group) for group in greedy] == [1, 1, 1]
    with pytest.raises(
        ValueError, match="sampling needs uniform numbers; give them, or temperature 0"
    ):
        generate(policy_of(model.net, model), prompts, SamplingConfig(temperature=0.8))


@pytest.mark.parametrize("wrong", [(2, 2, 5), (3, 1, 5), (3, 2, 6)])
def test_numbers_of_another_shape_are_refused(model, prompts, wrong):
    """Prompts, completions and tokens: each too few or too many."""
    with pytest.raises(ValueError, match=r"need shape \(2, 5\) for each of 3 prompts"):
        generate(
            policy_of(model.net, model),
            prompts,
            SamplingConfig(max_completion_length=5),
            num_generations=2,
            uniform=uniform_for(*wrong),
        )


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(model, prompts, training):
    model.net.train(training)
    try:
        sample(model, prompts[:1], max_completion_length=2)
        assert model.net.training == training
        with pytest.raises(KeyboardInterrupt):
            generate(
                policy_of(model.net, model),
                prompts,
                SamplingConfig(temperature=0.0),
                should_stop=lambda: True,
            )
        assert model.net.training == training
    finally:
        model.net.eval()


def test_training_mode_does_not_reach_the_samples(family, tiny_checkpoint, tiny_images):
    loaded = load(tiny_checkpoint(family))
    prompts = [loaded.encode_prompt(examples_of(tiny_images, 56)[0], SHORT)]
    wrapped = attach_random_adapter(loaded)
    for module in wrapped.modules():
        if (
            isinstance(module, torch.nn.ModuleDict)
            and "default" in module
            and isinstance(module["default"], torch.nn.Identity)
        ):
            module["default"] = torch.nn.Dropout(0.9)  # LoRA dropout, as in SFT
    expected = ids_of(sample(loaded, prompts, net=wrapped.eval()))
    assert ids_of(sample(loaded, prompts, net=wrapped.train())) == expected


def test_stopping_between_tokens(model, prompts):
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) == 4

    with pytest.raises(KeyboardInterrupt):
        generate(
            policy_of(model.net, model),
            prompts,
            SamplingConfig(temperature=0.0),
            should_stop=should_stop,
        )
    assert len(asked) == 4


def test_completions_have_the_promised_types(model, prompts):
    groups = sample(model, prompts, num_generations=2)
    assert [len(group) for group in groups] == [2, 2, 2]
    for completion in (c for group in groups for c in group):
        assert completion.ids.dtype == torch.int64 and isinstance(completion.truncated, bool)
        assert completion.logprobs.dtype == completion.top_p_mass.dtype == torch.float32
        assert len(completion.ids) == len(completion.logprobs) == len(completion.top_p_mass)
        assert not completion.logprobs.requires_grad
