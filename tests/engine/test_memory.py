"""Protect the memory forecast.

Checked: it lies within 20 % of what torch really allocates, for every family, in every phase, and
its parts are those of the model.

Run: pytest tests/engine/test_memory.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.memory import (
    GRAPHS,
    KEPT,
    ModelShape,
    Packed,
    backward_temporaries,
    forecast,
    head_chunk,
    kept_by_layer,
    kept_parts,
    kv_cache,
    lora_parameters,
    model_shape,
    packed_inputs,
    sampler_head,
    sampling_weights,
    scoring_moments,
    stacked_adapter,
    static_parts,
    update_moments,
    writing_moments,
)
from engine.model import attach_new_adapter
from tests.helpers.memory import (
    CLASSES,
    DTYPES,
    PHASES,
    Sizes,
    allocated_peak,
    model_config,
    prepare,
    workload,
)
from tests.helpers.tiny import load

# Small, but activations, vocabulary and cache all count, and so does the mask that every layer
# makes.
SIZES = Sizes(
    hidden=128,
    intermediate=344,
    heads=4,
    vocabulary=1024,
    image_tokens=64,
    prompt_length=150,
    new_tokens=40,
)
CPU = torch.device("cpu")
# h = 8, q = 4 x 2 = 8, k = 2 x 2 = 4, f = 16, V = 100
SHAPE = ModelShape(
    base_parameters=1000,
    hidden=8,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=2,
    intermediate=16,
    vocabulary=100,
    layer_norms=2,
    head_norms=False,
    window=None,
    fixed_images=False,
    vision_hidden=8,
    vision_intermediate=16,
    patches_per_token=4,
    pixel_values_per_patch=12,
)
WORK = replace(workload("grpo", SIZES, torch.float32, CPU), lora_r=2)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("family", list(CLASSES))
def test_the_forecast_is_within_a_fifth_of_what_is_allocated(family, phase):
    step, expected = prepare(family, phase, SIZES, torch.float32, CPU)
    assert expected == pytest.approx(allocated_peak(step, CPU), rel=0.2)


@pytest.mark.parametrize(
    "family, phase",
    [
        ("qwen2_5_vl", "sft"),
        ("gemma3", "grpo-checkpointed"),
        ("gemma3", "rollout"),
        ("qwen3_vl", "grpo"),
    ],
)
def test_also_in_bf16(family, phase):
    step, expected = prepare(family, phase, SIZES, DTYPES["bf16"], CPU)
    assert expected == pytest.approx(allocated_peak(step, CPU), rel=0.2)


@pytest.mark.parametrize(
    "phase, sizes",
    [
        # the cache is the most
        (
            "rollout",
            replace(
                SIZES, prompt_length=90, new_tokens=100, rows=2, generations=16, vocabulary=256
            ),
        ),
        # the sampler's vocabulary
        (
            "rollout",
            replace(
                SIZES, prompt_length=90, new_tokens=10, rows=2, generations=16, vocabulary=8192
            ),
        ),
        # the head's
        (
            "grpo",
            replace(
                SIZES,
                hidden=64,
                intermediate=172,
                layers=1,
                prompt_length=90,
                new_tokens=80,
                vocabulary=8192,
                rows=8,
            ),
        ),
    ],
)
def test_also_where_another_part_is_the_most(phase, sizes):
    step, expected = prepare("qwen2_5_vl", phase, sizes, torch.float32, CPU)
    assert expected == pytest.approx(allocated_peak(step, CPU), rel=0.2)


@pytest.mark.parametrize("family", list(CLASSES))
def test_the_adapter_has_as_many_parameters_as_forecast(family, tiny_checkpoint):
    model = load(tiny_checkpoint(family))
    shape = model_shape(model.net.config, sum(p.numel() for p in model.net.parameters()))
    wrapped = attach_new_adapter(model, r=3, alpha=6, dropout=0.0)
    assert lora_parameters(shape, 3) == sum(
        p.numel() for p in wrapped.parameters() if p.requires_grad
    )


def test_what_a_layer_keeps_by_hand():
    # One prompt of 10 tokens: fp32, no dropout, r 2. Norms 2 x 4 x 8 = 64; q and output 2 x 4 x 8 =
    # 64, k and v 2 x 4 x 4 = 32; logsumexp 4 heads x 4 = 16; gate, act, up 3 x 4 x 16 = 192; inputs
    # of A: shared by q, k, v 32, o's 32, shared by gate and up 32, down's 64; A's outputs 7 x 2 x 4
    # = 56. In all 584 a token.
    prompt = Packed(1, 10, 0, 5)
    assert kept_by_layer(SHAPE, WORK, prompt) == 10 * 584
    # bf16: 64 + 32 + 16 + 16 + 96; inputs of A 16 + 16 + 16 + 32 = 80; A's outputs 28. In all 332.
    halved = replace(WORK, element_size=2)
    assert kept_by_layer(SHAPE, halved, prompt) == 10 * 332
    # Dropout: inputs of A 3 x 8 + 8 + 2 x 8 + 16 = 64 wide, each with fp32 factors, 64 x (4 + 4) in
    # place of 160, in bf16 64 x (2 + 4) in place of 80
    assert kept_by_layer(SHAPE, replace(WORK, lora_dropout=0.1), prompt) == 10 * (584 - 160 + 512)
    assert kept_by_layer(SHAPE, replace(halved, lora_dropout=0.1), prompt) == 10 * (332 - 80 + 384)
    # Gemma 3's four norms and those of q and k: 2 x 32 + 4 x (8 + 4) more
    assert kept_by_layer(replace(SHAPE, layer_norms=4, head_norms=True), WORK, prompt) == 10 * (
        584 + 64 + 48
    )
    # Three completions of 5: 25 tokens; each sees 15 keys, whose k and v in fp32 are 2 x 4 x 4 = 32
    assert kept_by_layer(SHAPE, WORK, Packed(1, 10, 3, 5)) == 25 * 584 + 3 * 15 * 32


def test_the_packed_row_by_hand():
    row = Packed(prompts=2, prompt_length=10, completions=6, completion_length=5)
    assert row.tokens == 2 * 10 + 6 * 5
    assert row.keys == 6 * 15
    work = replace(WORK, prompt_length=10, completion_length=5, num_generations=3)
    assert work.packed(6) == row
    # 10 + 2 x 5 = 20, 10 + 3 x 5 = 25, 2 x 10 + 4 x 5 = 40 tokens
    assert work.packed(7) == Packed(3, 10, 7, 5)
    assert [
        replace(work, max_tokens_per_forward=n).packed(7).completions for n in (1, 19, 20, 39, 40)
    ] == [1, 1, 2, 3, 4]


def test_the_masks_of_a_packed_row_by_hand():
    row, tokens = Packed(2, 10, 6, 5), 50 * (4 * 8 + 24)  # embeddings and ids
    # Two prompts of 10 x 10 and six completions of 5 x 15, 650 in all; as bool, and in fp32 for the
    # 2 heads that share a key
    assert packed_inputs(SHAPE, WORK, row) == tokens + 650 * (1 + 2 * 4)
    # Images of one size: one prompt's and one completion's, 100 + 75
    fixed = replace(SHAPE, fixed_images=True)
    assert packed_inputs(fixed, WORK, row) == tokens + 175 * 9
    # so in one group
    assert packed_inputs(SHAPE, WORK, Packed(1, 10, 6, 5)) == (10 + 30) * 56 + 175 * 9
    # a prompt that the sampler reads
    assert packed_inputs(SHAPE, WORK, Packed(1, 10, 0, 0)) == 10 * 56 + 100 * 9
    # A window shorter than prompt and completion makes masks of its own.
    assert packed_inputs(replace(fixed, window=15), WORK, row) == tokens + 175 * 9
    assert packed_inputs(replace(fixed, window=14), WORK, row) == tokens + 2 * 175 * 9


def test_gradients_alive_in_the_backward_pass_by_hand():
    # two of down's input, 16 wide, and two of the layer's output, 8
    assert backward_temporaries(SHAPE, WORK) == 2 * 4 * (16 + 8)
    assert backward_temporaries(SHAPE, replace(WORK, element_size=2)) == 2 * 2 * (16 + 8)


def test_static_parts_and_cache_by_hand():
    # a layer's A and B: r 2 x ((8+8) + 2 (8+4) + (8+8) + 2 (8+16) + (16+8)) = 2 x 128 = 256; 3
    # layers 768; fp32 3,072 bytes
    assert lora_parameters(SHAPE, 2) == 768
    assert static_parts(SHAPE, replace(WORK, element_size=2)) == {
        "base": 2000,
        "adapters": 2 * 3072,
        "AdamW": 2 * 3072,
    }
    # keys and values x 3 layers x 4 numbers x 2 bytes x 5 rows x 7 tokens
    assert kv_cache(SHAPE, replace(WORK, element_size=2), rows=5, length=7) == 2 * 3 * 4 * 2 * 5 * 7


def test_the_head_by_hand():
    # a chunk of 256 x 100 logits: 102,400 bytes in fp32, 51,200 in bf16. Hidden states of 8
    # numbers, their gradient and the result.
    bf16 = replace(WORK, element_size=2)
    for scored in (300, 100_000):
        assert (
            head_chunk(SHAPE, WORK, scored, gradient=False, entropy=False) == 102_400 + scored * 32
        )
        assert (
            head_chunk(SHAPE, WORK, scored, gradient=True, entropy=False) == 102_400 + scored * 96
        )
        assert head_chunk(SHAPE, WORK, scored, gradient=True, entropy=True) == 204_800 + scored * 96
        assert (
            head_chunk(SHAPE, bf16, scored, gradient=True, entropy=False) == 153_600 + scored * 48
        )
        assert head_chunk(SHAPE, bf16, scored, gradient=True, entropy=True) == 204_800 + scored * 48
    # half a chunk
    assert head_chunk(SHAPE, WORK, 128, gradient=True, entropy=True) == 102_400 + 128 * 96


def test_the_copies_of_the_sampler_by_hand():
    # a layer's weights: 8 x (2 x 8 + 2 x 4 + 3 x 16) = 576, three layers 1,728; on a CPU the head's
    # 800 too; none in bf16
    assert sampling_weights(SHAPE, WORK) == 4 * (1728 + 800)
    assert sampling_weights(SHAPE, replace(WORK, device="cuda")) == 4 * 1728
    assert sampling_weights(SHAPE, replace(WORK, element_size=2)) == 0
    # Logits and log-probabilities of 6 rows; drawn, what the nucleus needs beside the
    # log-probabilities as well
    assert sampler_head(SHAPE, 6, greedy=True) == 6 * 100 * 4 * 2
    assert sampler_head(SHAPE, 6, greedy=False) == 6 * 100 * 4 * 5


def test_the_stacked_adapter_by_hand():
    # r = 2. q, k and v: A [8,6] and B [6,8+4+4], 48 + 96 numbers; o: [8,2] and [2,8], 32; gate and
    # up: [8,4] and [4,2x16], 32 + 128; down: [16,2] and [2,8], 48. A layer 384, three 1,152
    assert stacked_adapter(SHAPE, replace(WORK, element_size=2)) == 2 * 1152
    assert stacked_adapter(SHAPE, WORK) == 0  # merged into the copies


def test_the_masks_of_the_sampler_by_hand():
    # 2 prompts of 10 tokens, 3 completions each of at most 5: 6 rows see 15 places, of 8 tokens,
    # each a number of 4 bytes. Beside these is held: 6 x 5 x 20 bytes of what was written and
    # features of 2 x 64 x 8 x 4 bytes.
    work = replace(WORK, prompt_length=10, max_completion_length=5)
    attention = list(writing_moments(SHAPE, work, 2, 3, greedy=False))[1]
    assert attention["inputs"] == 6 * 5 * 20 + 2 * 64 * 8 * 4 + 8 * 6 * 15 * 4
    two_kinds = list(writing_moments(replace(SHAPE, window=14), work, 2, 3, greedy=False))[1]
    assert two_kinds["inputs"] - attention["inputs"] == 8 * 6 * 15 * 4


def test_what_rollouts_keep_on_a_gpu_by_hand():
    # 2 prompts of 10 tokens with 3 completions each of at most 70: on a GPU room for 64 and 128.
    # Keys and values take 2 x 3 layers x 4 numbers x 4 bytes = 96 bytes a token: 2 x 64 + 6 x 128 =
    # 896 tokens, 86,016 bytes. Masks: 8 tokens x 6 rows x (64 + 128) places x 4 bytes = 36,864.
    # What is written: 6 x 128 x 20 = 15,360.
    # The graphs' pool, attention: scores of 6 rows x 4 heads x 192 places, twice and once more for
    # the softmax, x 12 bytes = 55,296, and a layer's 4 x (3 x 8 + 3 x 16) = 288 bytes a row, in all
    # 1,728. That is 57,024, more than the head's 6 x 100 x 5 x 4 = 12,000.
    work = replace(WORK, device="cuda", prompt_length=10, max_completion_length=70)
    work = replace(work, image_tokens=4, rollout_prompts=2, num_generations=3)
    held = 86_016 + 36_864 + 15_360
    assert kept_parts(SHAPE, work) == {KEPT: held + 57_024}
    # of 1,000 words the head needs 120,000
    assert kept_parts(replace(SHAPE, vocabulary=1000), work) == {KEPT: held + 120_000}
    # Two of a prompt's three rows do not fit, so two places hold one each: 2 x 64 + 2 x 128 = 384
    # tokens, and of the rest a third: 36,864 + 12,288 + 5,120 + 19,008
    assert kept_parts(SHAPE, replace(work, sampling_rows=2)) == {KEPT: 73_280}
    nothing = (dict(device="cpu"), dict(rollout_prompts=0), dict(shards=2))
    assert [kept_parts(SHAPE, replace(work, **changed)) for changed in nothing] == [{}, {}, {}]

    # It stays while the policy learns. An evaluation drops it.
    phases = forecast(SHAPE, work).phases
    assert {name: parts.get(KEPT) for name, parts in phases.items()} == {
        "rollout": None,
        "scoring": held + 57_024,
        "update": held + 57_024,
        "evaluation": None,
    }
    # the rollout itself, its graphs beside work that runs as it is, and features of 2 x 4 x 8 x 4
    rollout = phases["rollout"]
    assert (rollout["KV cache"], rollout["inputs"]) == (86_016, 36_864 + 15_360 + 256)
    assert rollout[GRAPHS] == rollout["activations"] == 57_024
    assert GRAPHS not in forecast(SHAPE, replace(work, device="cpu")).phases["rollout"]
    # An image of 64 x 4 patches takes (6 x 4 x 8 + 6 x 4 x 8 + 12 x 4) = 432 bytes each, 110,592 in
    # all, while the last rollout's buffers are there.
    seen = forecast(SHAPE, replace(work, image_tokens=64)).phases["rollout"]
    assert (seen[KEPT], seen["activations"]) == (held + 57_024, 110_592)


def test_extra_features_by_hand():
    # Two tensors of 8 numbers in fp32 beside the features: 64 bytes a token
    more = replace(SHAPE, extra_features=2)
    # In scoring for all of the row's 2 x 10 + 6 x 5 tokens, until the head; in the update for the
    # images' 64 tokens of two prompts alone, until the optimizer step
    row, work = Packed(2, 10, 6, 5), replace(WORK, image_tokens=64, micro_batch=6)
    work = replace(work, prompt_length=10, completion_length=5, num_generations=3)
    for moments, expected in (
        (lambda shape: scoring_moments(shape, work, row), [50 * 64, 0]),
        (lambda shape: update_moments(shape, work), [2 * 64 * 64, 2 * 64 * 64, 0]),
        # 2 prompts of a rollout: held for both, and while they are read for their 20 tokens
        (
            lambda shape: writing_moments(shape, work, 2, 3, greedy=False),
            [2 * 64 * 64 + 20 * 64, 2 * 64 * 64, 2 * 64 * 64],
        ),
    ):
        pairs = zip(moments(more), moments(SHAPE), strict=True)
        assert [sum(a.values()) - sum(b.values()) for a, b in pairs] == expected


def test_an_evaluation_that_draws_its_answers():
    # In fp32 two tensors of eval_rows x 1,000,000 for a greedy token, five for one that is drawn
    large = replace(SHAPE, vocabulary=10**6)
    for drawn, tensors in ((False, 2), (True, 5)):
        found = forecast(large, replace(WORK, eval_sampled=drawn)).phases["evaluation"]
        assert found["logits"] == WORK.eval_rows * 10**6 * 4 * tensors


def test_phases_of_the_two_scripts():
    grpo, sft = forecast(SHAPE, WORK), forecast(SHAPE, replace(WORK, rollout_prompts=0, adapters=1))
    assert list(grpo.phases) == ["rollout", "scoring", "update", "evaluation"]
    assert list(sft.phases) == ["update", "validation", "evaluation"]
    for found in (grpo, sft):
        assert [phase for phase, parts in found.phases.items() if "gradients" in parts] == [
            "update"
        ]
        assert found.peak == max(sum(parts.values()) for parts in found.phases.values())
    # all rows of a rollout are written at once
    many = forecast(SHAPE, replace(WORK, num_generations=256))
    assert many.phases["rollout"]["KV cache"] > 10 * grpo.phases["rollout"]["KV cache"]


def test_the_shapes_of_the_families():
    # four patches a visual token in all small models; Qwen's patch has two frames
    qwen, gemma, qwen3 = (
        model_shape(model_config(family, SIZES), 1)
        for family in ("qwen2_5_vl", "gemma3", "qwen3_vl")
    )
    assert (qwen3.patches_per_token, qwen3.pixel_values_per_patch) == (4, 3 * 2 * 16 * 16)
    assert (qwen3.layer_norms, qwen3.head_norms, qwen3.extra_features) == (2, True, 3)
    assert (qwen.head_norms, gemma.head_norms) == (False, True)
    assert qwen.extra_features == gemma.extra_features == 0
    assert (qwen.patches_per_token, qwen.pixel_values_per_patch) == (4, 3 * 2 * 14 * 14)
    assert (gemma.patches_per_token, gemma.pixel_values_per_patch) == (4, 3 * 14 * 14)
    assert (qwen.head_dim, qwen.kv_heads, gemma.head_dim) == (32, 2, 32)
