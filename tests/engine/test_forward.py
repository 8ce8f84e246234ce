"""Protect the forward.

Checked: each family's own positions, masks and images, equal to transformers' full forward on
official inputs.

Random checkpoints whose prompts are longer than the sliding window, images of several sizes, ragged
rows.

Run: pytest tests/engine/test_forward.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma3ForCausalLM

from data.prompts import Prompt
from engine.collate import Batch, PromptBatch, collate_prompts, collate_rows
from engine.completion import SamplingConfig
from engine.encode import EncodedPrompt, EncodedRow
from engine.families import (
    Gemma3,
    Qwen25VL,
    causal_mask,
    family_of,
    language_model,
    lm_head_weight,
    text_positions,
)
from engine.forward import completion_hidden_states, completion_logprobs, embed, packed_positions
from engine.generate import generate
from engine.logprobs import token_logprobs
from engine.model import BaseModel, enable_gradient_checkpointing, load_model
from tests.helpers import plain
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

PROMPTS = (Prompt("a", "Which?"), Prompt("b", "A longer question about this image?"))
ANSWERS = ("<think>x</think>", "ab, cd", "zzz")


@pytest.fixture(scope="module", params=list(SAVE))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family, tiny_checkpoint) -> BaseModel:
    """Load one model for all tests of a family. No test changes it."""
    return load(tiny_checkpoint(family))


@pytest.fixture
def own_model(family, tiny_checkpoint) -> BaseModel:
    return load(tiny_checkpoint(family))


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def qwen(request, tiny_checkpoint) -> BaseModel:
    """Load one of the families with M-RoPE."""
    return load(tiny_checkpoint(request.param))


@pytest.fixture
def gemma(tiny_checkpoint) -> BaseModel:
    return load(tiny_checkpoint("gemma3"))


def rows_of(model: BaseModel, images) -> list[EncodedRow]:
    """Make three rows whose prompts, images and answers have different lengths."""
    prompts = (PROMPTS[0], PROMPTS[1], PROMPTS[0])
    rows = [
        model.encoder.encode_answer(*row)
        for row in zip(examples_of(images, 56, 112, 84), prompts, ANSWERS, strict=True)
    ]
    return [with_features(model, row) for row in rows]


def logprobs_of(net, model: BaseModel, rows: list[EncodedRow]) -> list[torch.Tensor]:
    """Compute log-probabilities of every row's completion, by the product's forward."""
    batch = collate_rows(rows, model.encoder.pad_token_id)
    logprobs, _ = completion_logprobs(net, model.family, batch, temperature=1.0)
    return [row[mask] for row, mask in zip(logprobs, batch.completion_mask, strict=True)]


def official_logprobs(net, model: BaseModel, rows: list[EncodedRow]) -> list[torch.Tensor]:
    """Compute the same by transformers' own forward, with the inputs of its documentation."""
    batch = plain.plain_batch(rows, model.encoder.pad_token_id).prompts
    inputs = pixel_inputs([row.prompt for row in rows])
    inputs["token_type_ids" if model.family.model_type == "gemma3" else "mm_token_type_ids"] = (
        batch.token_types
    )
    # [B,S,V]
    logits = net(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), **inputs
    ).logits
    logprobs = logits.log_softmax(-1)
    result = []
    for row, values in zip(rows, logprobs, strict=True):
        start, length = len(row.prompt.input_ids), len(row.completion_ids)
        result.append(
            values[start - 1 : start + length - 1].gather(1, row.completion_ids[:, None])[:, 0]
        )
    return result


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(first, second, strict=True))


# Equal to transformers


@torch.no_grad()
def test_equals_transformers(model, tiny_images):
    rows = rows_of(model, tiny_images)
    assert (
        largest_difference(
            logprobs_of(model.net, model, rows), official_logprobs(model.net, model, rows)
        )
        < 1e-5
    )


@torch.no_grad()
def test_equals_transformers_with_an_adapter(own_model, tiny_images):
    rows = rows_of(own_model, tiny_images)
    bare = logprobs_of(own_model.net, own_model, rows)
    wrapped = attach_random_adapter(own_model)
    with_adapter = logprobs_of(wrapped, own_model, rows)
    assert largest_difference(with_adapter, official_logprobs(wrapped, own_model, rows)) < 1e-5
    assert largest_difference(with_adapter, bare) > 1e-2


def as_saved(folder) -> BaseModel:
    """Load the checkpoint with its own head. tiny.load gives it a random one."""
    return load_model(
        str(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        min_visual_tokens=4,
        max_visual_tokens=16,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(family, tied, tmp_path, tiny_images):
    model = as_saved(SAVE[family](tmp_path, tied=tied))
    head, embedding = lm_head_weight(model.net), model.net.get_input_embeddings().weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied and torch.equal(
        head, embedding
    ) == tied
    rows, wrapped = rows_of(model, tiny_images), attach_random_adapter(model)
    ours = logprobs_of(wrapped, model, rows)
    assert largest_difference(ours, official_logprobs(wrapped, model, rows)) < 1e-5
    sum(logprobs.sum() for logprobs in ours).backward()
    assert head.grad is None and embedding.grad is None
    assert all(
        parameter.grad.abs().max() > 0
        for parameter in wrapped.parameters()
        if parameter.requires_grad
    )


# Soft-capping of the logits, which no published Gemma 3 has


SOFTCAP = 1.5  # logits of the random model reach 2.4


def capped_logits(net, model: BaseModel, rows: list[EncodedRow]) -> torch.Tensor:
    """Compute logits [B,S,V] by transformers' own class that applies soft-capping.

    Gemma3ForCausalLM is put around the same decoder and head.
    """
    batch = plain.plain_batch(rows, model.encoder.pad_token_id).prompts
    masks = model.family.attention_masks(
        model.net, batch.attention_mask, batch.token_types, torch.arange(batch.input_ids.shape[1])
    )
    causal = Gemma3ForCausalLM._from_config(model.net.config.text_config)
    causal.model, causal.lm_head = language_model(net), model.net.lm_head
    return causal(
        inputs_embeds=plain.embed(net, model.family, batch),
        attention_mask=masks,
        position_ids=model.family.positions(model.net, batch),
    ).logits


def test_soft_capped_logits_equal_transformers(tmp_path, tiny_images, monkeypatch):
    results = []
    for ours in (True, False):
        model = as_saved(
            SAVE["gemma3"](tmp_path / str(ours), text={"final_logit_softcapping": SOFTCAP})
        )
        rows, wrapped = rows_of(model, tiny_images), attach_random_adapter(model)
        if ours:
            found = logprobs_of(wrapped, model, rows)
        else:
            logits = capped_logits(wrapped, model, rows)
            assert 0.9 * SOFTCAP < logits.detach().abs().max() <= SOFTCAP
            starts = [len(row.prompt.input_ids) - 1 for row in rows]
            found = [
                values[start : start + len(row.completion_ids)]
                .log_softmax(1)
                .gather(1, row.completion_ids[:, None])[:, 0]
                for values, start, row in zip(logits, starts, rows, strict=True)
            ]
        sum(logprobs.sum() for logprobs in found).backward()
        results.append(
            (found, {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
        )
    (found, gradients), (expected, expected_gradients) = results
    assert largest_difference(found, expected) < 1e-5
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(model.net.config.text_config, "final_logit_softcapping", None)
    assert largest_difference(logprobs_of(wrapped, model, rows), expected) > 1e-1


@torch.no_grad()
def test_the_sampler_applies_soft_capping(tmp_path, tiny_images):
    model = as_saved(SAVE["gemma3"](tmp_path, text={"final_logit_softcapping": SOFTCAP}))
    prompt = rows_of(model, tiny_images)[0].prompt
    [group] = generate(
        policy_of(model.net, model),
        [prompt],
        SamplingConfig(0.8, 0.95, 12),
        num_generations=3,
        uniform=uniform_for(1, 3, 12),
    )
    rows = [
        EncodedRow(prompt, completion.ids, torch.ones(len(completion.ids), dtype=torch.bool))
        for completion in group
    ]
    expected, _ = completion_logprobs(
        model.net,
        model.family,
        collate_rows(rows, 0),
        temperature=0.8,
        suppress_token_ids=model.suppressed_ids,
    )
    for completion, values in zip(group, expected, strict=True):
        torch.testing.assert_close(
            completion.logprobs, values[: len(completion.ids)], rtol=0, atol=1e-5
        )
    assert (
        largest_difference(
            [expected],
            [
                plain.logprobs_of(
                    model.net,
                    model.family,
                    rows,
                    temperature=0.8,
                    suppress_token_ids=model.suppressed_ids,
                )
            ],
        )
        < 1e-5
    )


# Each of the following shows that the equality above can fail.


def rows_and_expected(model, images):
    rows = rows_of(model, images)
    return rows, official_logprobs(model.net, model, rows)


@torch.no_grad()
def test_control_causal_attention_inside_an_image(gemma, tiny_images, monkeypatch):
    rows, expected = rows_and_expected(gemma, tiny_images)
    masks = Gemma3.attention_masks

    def text_only(self, model, mask, types, queries):
        return masks(self, model, mask, 0 * types, queries)

    monkeypatch.setattr(Gemma3, "attention_masks", text_only)
    assert largest_difference(logprobs_of(gemma.net, gemma, rows), expected) > 1e-2


@torch.no_grad()
def test_control_no_sliding_window(gemma, tiny_images, monkeypatch):
    rows, expected = rows_and_expected(gemma, tiny_images)
    monkeypatch.setattr(gemma.net.config.get_text_config(), "sliding_window", 10_000)
    assert largest_difference(logprobs_of(gemma.net, gemma, rows), expected) > 1e-2


@torch.no_grad()
def test_control_sliding_window_off_by_one(gemma, tiny_images, monkeypatch):
    rows, expected = rows_and_expected(gemma, tiny_images)
    monkeypatch.setattr(gemma.net.config.get_text_config(), "sliding_window", 25)  # it is 24
    assert largest_difference(logprobs_of(gemma.net, gemma, rows), expected) > 1e-4


@torch.no_grad()
def test_control_one_dimensional_positions(qwen, tiny_images, monkeypatch):
    rows, expected = rows_and_expected(qwen, tiny_images)

    def one_dimensional(self, model, prompts):
        return text_positions(prompts.attention_mask).expand(3, -1, -1)

    monkeypatch.setattr(Qwen25VL, "positions", one_dimensional)
    assert largest_difference(logprobs_of(qwen.net, qwen, rows), expected) > 1e-2


@torch.no_grad()
def test_the_image_matters(model, tiny_images):
    rows = rows_of(model, tiny_images)
    vision = [
        row.prompt.vision | {"pixel_values": torch.zeros_like(row.prompt.vision["pixel_values"])}
        for row in rows
    ]
    blind = [
        with_features(
            model, dataclasses.replace(row, prompt=dataclasses.replace(row.prompt, vision=image))
        )
        for row, image in zip(rows, vision, strict=True)
    ]
    for seen, unseen in zip(
        logprobs_of(model.net, model, rows), logprobs_of(model.net, model, blind), strict=True
    ):
        assert (seen - unseen).abs().max() > 1e-2


@torch.no_grad()
def test_images_are_not_mixed_up(model, tiny_images):
    # Three images of one size: each row keeps its own, whatever its place in the batch.
    rows = [
        with_features(model, model.encoder.encode_answer(example, PROMPTS[0], "ab"))
        for example in examples_of(tiny_images, 56, 56, 56)
    ]
    forwards, backwards = (
        logprobs_of(model.net, model, rows),
        logprobs_of(model.net, model, rows[::-1]),
    )
    assert largest_difference(forwards, backwards[::-1]) < 1e-5
    assert largest_difference(forwards, backwards) > 1e-2


# Batches


@torch.no_grad()
def test_padding_and_neighbours_change_nothing(model, tiny_images):
    rows = rows_of(model, tiny_images)
    together = logprobs_of(model.net, model, rows)
    longer = [*rows, model.encode_answer(examples_of(tiny_images, 84)[0], PROMPTS[1], "x" * 60)]
    assert largest_difference(logprobs_of(model.net, model, longer)[:3], together) < 1e-5
    alone = [logprobs_of(model.net, model, [row])[0] for row in rows]
    assert largest_difference(alone, together) < 1e-5


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(model, tiny_images):
    batch = collate_rows(rows_of(model, tiny_images), model.encoder.pad_token_id)
    prompts = dataclasses.replace(
        batch.prompts,
        input_ids=torch.where(batch.prompts.attention_mask, batch.prompts.input_ids, 65),
    )
    ids = torch.where(batch.completion_mask, batch.completion_ids, 65)
    other = dataclasses.replace(batch, prompts=prompts, completion_ids=ids)
    results = [
        completion_logprobs(model.net, model.family, b, temperature=1.0)[0] for b in (batch, other)
    ]
    assert (
        not batch.prompts.attention_mask.all()
        and not batch.completion_mask.all()
        and torch.equal(*results)
    )


@torch.no_grad()
def test_completions_of_one_prompt_share_its_image(model, tiny_images):
    shared, other = rows_of(model, tiny_images)[1], rows_of(model, tiny_images)[0]
    completions = [torch.tensor(ids) for ids in ([70, 71, 72], [80], [90, 91, 92, 93, 94])]
    rows = [
        EncodedRow(shared.prompt, ids, torch.ones(len(ids), dtype=torch.bool))
        for ids in completions
    ]
    mixed = [rows[0], other, rows[1], rows[2]]
    # four prompt objects
    apart = [dataclasses.replace(row, prompt=dataclasses.replace(row.prompt)) for row in mixed]
    assert len(collate_rows(mixed, 0).prompts.vision) == 2 and collate_rows(
        mixed, 0
    ).prompt_of_row.tolist() == [0, 1, 0, 0]
    assert len(collate_rows(apart, 0).prompts.vision) == 4
    assert (
        largest_difference(
            logprobs_of(model.net, model, mixed), logprobs_of(model.net, model, apart)
        )
        < 1e-5
    )


@torch.no_grad()
def test_completion_logprobs_are_zero_outside_the_mask(model, tiny_images):
    rows = rows_of(model, tiny_images)
    # left out of the loss
    rows[1] = dataclasses.replace(
        rows[1], completion_mask=torch.zeros_like(rows[1].completion_mask)
    )
    batch = collate_rows(rows, model.encoder.pad_token_id)
    logprobs, entropies = completion_logprobs(
        model.net, model.family, batch, temperature=0.8, entropy=True
    )
    assert (
        logprobs.shape
        == entropies.shape
        == batch.completion_mask.shape
        == (3, max(len(row.completion_ids) for row in rows))
    )
    assert (logprobs[~batch.completion_mask] == 0).all() and (
        logprobs[batch.completion_mask] < 0
    ).all()
    assert (entropies[~batch.completion_mask] == 0).all() and (
        entropies[batch.completion_mask] > 0
    ).all()
    hidden, targets = completion_hidden_states(model.net, model.family, batch)
    assert torch.equal(targets, torch.cat([rows[0].completion_ids, rows[2].completion_ids]))
    expected, _ = token_logprobs(hidden, lm_head_weight(model.net), targets, temperature=0.8)
    torch.testing.assert_close(logprobs[batch.completion_mask], expected)


def test_a_batch_without_scored_tokens(model, tiny_images):
    row = rows_of(model, tiny_images)[0]
    unscored = dataclasses.replace(row, completion_mask=torch.zeros_like(row.completion_mask))
    batch = collate_rows([unscored], model.encoder.pad_token_id)
    logprobs, _ = completion_logprobs(model.net, model.family, batch, temperature=1.0)
    assert logprobs.shape == (1, len(row.completion_ids)) and (logprobs == 0).all()


def test_features_and_placeholders_must_agree(model, tiny_images):
    prompt = rows_of(model, tiny_images)[0].prompt
    types = prompt.token_types.clone()
    types[int(types.argmax())] = 0
    with pytest.raises(ValueError, match="3 image placeholders for 4 image features"):
        collate_prompts(
            [prompt, dataclasses.replace(prompt, token_types=types)], model.encoder.pad_token_id
        )


def test_a_sampled_placeholder_is_text(model, tiny_images):
    # Its id alone must not ask for an image's features.
    prompt = rows_of(model, tiny_images)[0].prompt
    ids = torch.tensor([70, model.encoder.image_token_id, 71])
    [logprobs] = logprobs_of(
        model.net, model, [EncodedRow(prompt, ids, torch.ones(3, dtype=torch.bool))]
    )
    assert logprobs.isfinite().all()


# Gradients


def gradients(
    model: BaseModel, rows, *, checkpointing: bool
) -> tuple[dict[str, torch.Tensor], int, int]:
    """Make one training step -> (gradients, forward passes of layer 0, and of the vision tower)."""
    wrapped = attach_random_adapter(model)
    if checkpointing:
        enable_gradient_checkpointing(wrapped)
    wrapped.train()
    counts = {"layer": 0, "vision": 0}
    base = wrapped.get_base_model()
    tower = base.model.vision_tower if model.family.model_type == "gemma3" else base.model.visual

    def counted(name):
        return lambda *_: counts.__setitem__(name, counts[name] + 1)

    features = []
    tower.register_forward_hook(counted("vision"))
    tower.register_forward_hook(lambda _, args, output: features.append(output.last_hidden_state))
    language_model(wrapped).layers[0].self_attn.register_forward_hook(counted("layer"))
    prompts = {id(row.prompt): row.prompt for row in rows}
    # what engine/vision.py does, in the loops
    seen_once = {key: with_features(model, prompt) for key, prompt in prompts.items()}
    rows = [dataclasses.replace(row, prompt=seen_once[id(row.prompt)]) for row in rows]
    sum(logprobs.sum() for logprobs in logprobs_of(wrapped, model, rows)).backward()
    # no graph, so no backward pass through the tower
    assert not any(output.requires_grad for output in features)
    return (
        {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None},
        counts["layer"],
        counts["vision"],
    )


def test_gradient_checkpointing_changes_no_gradient(family, tiny_checkpoint, tiny_images):
    results = []
    for checkpointing in (False, True):
        model = load(tiny_checkpoint(family))
        rows = rows_of(model, tiny_images)
        # four rows, three images
        rows.append(
            EncodedRow(rows[0].prompt, torch.tensor([70, 71]), torch.ones(2, dtype=torch.bool))
        )
        results.append(gradients(model, rows, checkpointing=checkpointing))
    (plain, layer_plain, vision_plain), (recomputed, layer_recomputed, vision_recomputed) = results
    assert (layer_plain, layer_recomputed) == (1, 2)  # the decoder really is computed again
    # once an image, and not again in the backward pass
    assert vision_plain == vision_recomputed == 3
    # 7 projections a layer, A and B of each; only they have a gradient
    assert plain.keys() == recomputed.keys() and len(plain) == 14 * len(
        model.net.model.language_model.layers
    )
    assert all("lora_" in name and gradient.abs().max() > 0 for name, gradient in plain.items())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-6)


def test_checkpointing_asks_for_no_gradient_of_the_inputs(own_model, tiny_images):
    wrapped = attach_random_adapter(own_model)
    enable_gradient_checkpointing(wrapped)
    assert not embed(
        wrapped.train(), collate_rows(rows_of(own_model, tiny_images), 0).prompts
    ).requires_grad


def test_the_vision_tower_has_no_graph_even_where_it_is_not_frozen(own_model, tiny_images):
    own_model.net.requires_grad_(True)
    features = [
        own_model.vision.look(example)["features"]
        for example in examples_of(tiny_images, 56, 112, 84)
    ]
    assert [len(image) for image in features] == (
        [4, 4, 4] if own_model.family.model_type == "gemma3" else [4, 16, 9]
    )
    assert not any(image.requires_grad for image in features)


def test_gradient_equals_transformers(family, tiny_checkpoint, tiny_images):
    results = []
    for forward in (logprobs_of, official_logprobs):
        model = load(tiny_checkpoint(family))
        wrapped = attach_random_adapter(model).train()
        sum(
            logprobs.sum() for logprobs in forward(wrapped, model, rows_of(model, tiny_images))
        ).backward()
        results.append({name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-4, atol=1e-4)


# Positions and masks


def test_p19_text_positions(case):
    with case("P19_position_ids") as p19:
        positions = text_positions(torch.tensor(p19.inputs["attention_mask"]).bool())
        p19.close("position_ids", positions)
        p19.differs("wrong_arange", positions)


def test_gemma_positions_leave_the_padding_out(gemma, tiny_images):
    prompts = [row.prompt for row in rows_of(gemma, tiny_images)[:2]]
    batch = collate_prompts(prompts, gemma.encoder.pad_token_id)
    short, long = (len(prompt.input_ids) for prompt in prompts)
    assert gemma.family.positions(gemma.net, batch).tolist() == [
        [0] * (long - short) + list(range(short)),
        list(range(long)),
    ]


def mrope_prompt(
    model: BaseModel, token_types: list[int], grid: list[int], lead: int = 0
) -> EncodedPrompt:
    """Make a prompt of token types and image grid, with `lead` more text tokens in front."""
    types = torch.tensor([0] * lead + token_types)
    ids = torch.where(types == 1, model.encoder.image_token_id, 65)
    _, values = model.family.patches(model.net.config)  # of a patch
    patches = torch.randn(
        grid[0] * grid[1] * grid[2], values, generator=torch.Generator().manual_seed(0)
    )
    return with_features(
        model,
        EncodedPrompt(
            ids, types, {"pixel_values": patches, "image_grid_thw": torch.tensor([grid])}
        ),
    )


def seen_positions(
    model: BaseModel, prompts: list[EncodedPrompt], num_new: int
) -> list[torch.Tensor]:
    """Record the position ids that the decoder gets while sampling.

    They are those of the prompts, then of each new token.
    """
    seen = []
    hook = language_model(model.net).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    model = dataclasses.replace(model, stop_ids=frozenset({-1}))  # nothing stops
    generate(
        policy_of(model.net, model),
        prompts,
        SamplingConfig(temperature=0.0, max_completion_length=num_new + 1),
    )
    hook.remove()
    return seen


@pytest.mark.parametrize("side", ["left", "right"])
def test_mrope_positions_are_those_of_transformers(qwen, side):
    grids = [[1, 4, 4], [1, 2, 12], [1, 10, 4], [1, 2, 2]]  # square, wide, tall, one token
    leads, tails = (3, 0, 9, 1), (2, 7, 1, 0)
    prompts = [
        mrope_prompt(qwen, [1] * (h * w // 4) + [0] * tail, [t, h, w], lead)
        for (t, h, w), lead, tail in zip(grids, leads, tails, strict=True)
    ]
    # as if the image had been forgotten
    of_text = dataclasses.replace(prompts[0], token_types=torch.zeros_like(prompts[0].token_types))
    ids, types, mask = (
        pad_sequence(tensors, batch_first=True, padding_side=side)
        for tensors in zip(
            *(
                (
                    prompt.input_ids,
                    prompt.token_types,
                    torch.ones(len(prompt.input_ids), dtype=torch.bool),
                )
                for prompt in (*prompts, of_text)
            ),
            strict=True,
        )
    )
    expected, _ = qwen.net.model.get_rope_index(
        ids, mm_token_type_ids=types, image_grid_thw=torch.tensor(grids), attention_mask=mask
    )
    padded = PromptBatch(ids, types, mask, [prompt.vision for prompt in (*prompts, of_text)])
    assert torch.equal(qwen.family.positions(qwen.net, padded), expected)


def test_p18_mrope_positions(qwen, case):
    with case("P18_mrope") as p18:
        types, grid = p18.inputs["token_types_unpadded"], p18.inputs["image_grid_thw"]
        assert qwen.net.config.vision_config.spatial_merge_size == p18.inputs["spatial_merge_size"]
        assert p18.inputs["left_pad"] == 0
        prompt = mrope_prompt(qwen, types, grid)
        p18.close("num_image_tokens", len(qwen.family.image_features(qwen.net, prompt.vision)))
        positions, *following = seen_positions(qwen, [prompt], p18.inputs["num_generated"])
        p18.close("position_ids_thw", positions[:, 0])
        # the same on all three axes
        assert all(torch.equal(step, step[:1].expand(3, 1, 1)) for step in following)
        p18.close("next_generated_positions", [step[0, 0, 0] for step in following])
        delta = following[0][0, 0, 0] - len(types)
        p18.close("rope_delta_vs_unpadded_length", delta)
        p18.close("rope_delta_vs_padded_length", delta)  # no padding here

        # Beside a prompt that is 4 longer, which is read first, without padding between them: as
        # before.
        positions, *following = seen_positions(
            qwen, [prompt, mrope_prompt(qwen, types, grid, lead=4)], 2
        )
        assert positions.shape == (3, 1, 14 + 10)
        p18.close("position_ids_thw", positions[:, 0, 14:])
        p18.close("next_generated_positions", [step[0, 0, 1] for step in following])
        assert [int(step[0, 0, 0]) for step in following] == [11, 12]

        # In training, after a longer prompt; three, two and four tokens, whose last ones are not
        # read, the longest first
        def row(prompt, n):
            return EncodedRow(prompt, torch.tensor([65] * n), torch.ones(n, dtype=torch.bool))

        longer = mrope_prompt(qwen, types, grid, lead=4)
        batch = collate_rows([row(longer, 3), row(prompt, 2), row(prompt, 4)], 0)
        packed = packed_positions(qwen.net, qwen.family, batch)[:, 0]  # [3,14 + 10 + 2 + 1 + 3]
        p18.close("position_ids_thw", packed[:, 14:24])
        assert packed[:, 24:].tolist() == [[7, 8, 9, 11, 12, 7]] * 3


def test_the_causal_mask():
    mask = causal_mask(torch.tensor([[False, True, True], [True, True, False]]), torch.arange(3))
    assert mask.int().tolist() == [
        # padding sees itself, so that no row is empty; nothing else sees it
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]
    assert causal_mask(torch.tensor([[False, True, True]]), torch.tensor([2])).int().tolist() == [
        [[0, 1, 1]]
    ]


def test_gemma_masks_by_hand(gemma, monkeypatch):
    monkeypatch.setattr(gemma.net.config.get_text_config(), "sliding_window", 2)
    types = torch.tensor([[0, 1, 1, 1, 0, 0]])
    masks = gemma.family.attention_masks(
        gemma.net, torch.ones(1, 6, dtype=torch.bool), types, torch.arange(6)
    )
    assert masks["full_attention"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],  # the image sees all of itself, backwards and forwards
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    assert masks["sliding_attention"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],  # itself and the one before
        [0, 0, 0, 0, 1, 1],
    ]
    last = gemma.family.attention_masks(
        gemma.net, torch.ones(1, 6, dtype=torch.bool), types, torch.tensor([5])
    )
    assert last["sliding_attention"][0, 0].int().tolist() == [[0, 0, 0, 0, 1, 1]]


def test_families(model, family):
    assert family_of(family).model_type == family
    with pytest.raises(
        ValueError,
        match="^a 'llama' model; this engine trains qwen2_5_vl, gemma3 and qwen3_vl models$",
    ):
        family_of("llama")


def test_a_relative_of_a_family_is_told_from_it():
    with pytest.raises(
        ValueError,
        match="^a 'qwen3_vl_moe' model, a mixture of experts; of Qwen3-VL the dense models are"
        " trained; this engine trains qwen2_5_vl, gemma3 and qwen3_vl models$",
    ):
        family_of("qwen3_vl_moe")


def test_moving_a_batch_keeps_everything(model, tiny_images):
    batch = collate_rows(rows_of(model, tiny_images), model.encoder.pad_token_id)
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert len(moved.buckets) == len(batch.buckets) > 0
    for part in (moved, moved.prompts, *moved.buckets):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            tensors = (
                [tensor for image in value for tensor in image.values()]
                if field.name == "vision"
                else [value]
            )
            others = ("prompts", "alike", "buckets", "length")
            assert (
                field.name in others
                or tensors
                and all(tensor.device.type == "meta" for tensor in tensors)
            )
