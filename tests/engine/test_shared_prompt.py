"""Protect the forward that shares prompts.

Checked: its log-probabilities and gradients are those of the plain forward
(tests/helpers/plain.py), in which every completion has a prompt of its own, for every family,
ragged lengths, with and without checkpointing; and the comparison fails where positions, masks or
layout are wrong.

Run: pytest tests/engine/test_shared_prompt.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import engine.attention
import engine.forward
import engine.qwen3_vl
from data.prompts import Prompt
from engine.attention import additive_mask
from engine.collate import collate_rows, plan_batches
from engine.encode import EncodedRow
from engine.families import Gemma3
from engine.forward import completion_logprobs
from engine.model import enable_gradient_checkpointing
from tests.helpers import plain
from tests.helpers.tiny import SAVE, attach_random_adapter, examples_of, load

# Of three prompts of different lengths and images; no group is in one piece, one completion is a
# single token, and the 30, 27 and 25 tokens of two prompts are laid out together. Prompts
# have 60 to 90 tokens, so most of a completion lies beyond Gemma's window of 24 from their images.
GROUPS = ((0, 30), (0, 1), (1, 17), (0, 25), (2, 9), (1, 40), (2, 2), (1, 27))
# As SFT packs them: one answer a prompt.
ANSWERS = ((2, 9), (0, 30), (1, 17))


def rows_of(model, images, groups=GROUPS) -> list[EncodedRow]:
    texts = (
        Prompt("a", "Which?"),
        Prompt("b", "A longer question about this image?"),
        Prompt("c", "Where?"),
    )
    prompts = [
        model.encode_prompt(*pair)
        for pair in zip(examples_of(images, 56, 112, 84), texts, strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    return [
        EncodedRow(
            prompts[p],
            torch.randint(40, 200, (n,), generator=generator),
            torch.ones(n, dtype=torch.bool),
        )
        for p, n in groups
    ]


def shared(wrapped, model, rows) -> torch.Tensor:
    return completion_logprobs(wrapped, model.family, collate_rows(rows, 0), temperature=0.8)[0]


def unshared(wrapped, model, rows) -> torch.Tensor:
    return plain.logprobs_of(wrapped, model.family, rows, temperature=0.8)


def one_by_one(wrapped, model, rows) -> torch.Tensor:
    """Compute [N,T] as `unshared` does, by a plain forward for every row, without padding."""
    found = [unshared(wrapped, model, [row])[0] for row in rows]
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


def cut(wrapped, model, rows, max_tokens: int) -> torch.Tensor:
    """Compute [N,T] as `shared` does, by forwards of at most max_tokens tokens."""
    result = torch.zeros(len(rows), max(len(row.completion_ids) for row in rows))
    for indices in plan_batches(rows, len(rows), max_tokens):
        found = shared(wrapped, model, [rows[i] for i in indices])
        result = result.to(found.dtype).index_put(
            (torch.tensor(indices)[:, None], torch.arange(found.shape[1])), found
        )
    return result


def run(
    forward,
    checkpoint,
    images,
    *,
    groups=GROUPS,
    dtype=torch.float32,
    checkpointing=False,
    **options,
):
    """Run a random model and adapter, under random weights of the tokens.

    Returns (log-probabilities [N,T], {parameter: gradient}).
    """
    model = load(checkpoint)
    model.net.to(dtype)
    wrapped = attach_random_adapter(model).to(dtype).train()
    if checkpointing:
        enable_gradient_checkpointing(wrapped)
    logprobs = forward(wrapped, model, rows_of(model, images, groups), **options)
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    (logprobs * weights.to(dtype)).sum().backward()
    return logprobs.detach(), {
        name: parameter.grad
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }


def gradient_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Compute the largest relative distance of two gradients over parameters, in L2."""
    assert one.keys() == other.keys() and all(gradient.norm() > 0 for gradient in other.values())
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-9)])
@pytest.mark.parametrize("family", list(SAVE))
def test_equals_the_plain_forward(
    family, dtype, tolerance, checkpointing, tiny_checkpoint, tiny_images
):
    ours, gradients = run(
        shared, tiny_checkpoint(family), tiny_images, dtype=dtype, checkpointing=checkpointing
    )
    expected, theirs = run(
        unshared, tiny_checkpoint(family), tiny_images, dtype=dtype, checkpointing=checkpointing
    )
    assert ours.dtype == dtype and float((ours - expected).abs().max()) < tolerance
    assert gradient_difference(gradients, theirs) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-9)])
@pytest.mark.parametrize("family", list(SAVE))
def test_packed_answers_are_those_of_the_rows_one_by_one(
    family, dtype, tolerance, tiny_checkpoint, tiny_images
):
    ours, gradients = run(
        shared,
        tiny_checkpoint(family),
        tiny_images,
        groups=ANSWERS,
        dtype=dtype,
        checkpointing=True,
    )
    expected, theirs = run(
        one_by_one, tiny_checkpoint(family), tiny_images, groups=ANSWERS, dtype=dtype
    )
    assert float((ours - expected).abs().max()) < tolerance
    assert gradient_difference(gradients, theirs) < 1e-5


@pytest.mark.parametrize("max_tokens", [1, 150, 250])
@pytest.mark.parametrize("family", list(SAVE))
def test_where_batches_are_cut_changes_nothing(family, max_tokens, tiny_checkpoint, tiny_images):
    ours, gradients = run(cut, tiny_checkpoint(family), tiny_images, max_tokens=max_tokens)
    expected, theirs = run(shared, tiny_checkpoint(family), tiny_images)
    assert float((ours - expected).abs().max()) < 5e-6
    assert gradient_difference(gradients, theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", list(SAVE))
def test_tokens_that_are_not_scored_are_run_only_where_a_scored_one_follows(
    family, tiny_checkpoint, tiny_images
):
    model = load(tiny_checkpoint(family))
    rows = rows_of(model, tiny_images)
    whole = shared(model.net, model, rows)
    masks = [torch.arange(len(row.completion_ids)) % 3 == 1 for row in rows]
    masks[0][:] = False  # left out of the loss as a whole
    partly = [
        dataclasses.replace(row, completion_mask=mask)
        for row, mask in zip(rows, masks, strict=True)
    ]
    scored = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    torch.testing.assert_close(shared(model.net, model, partly), whole * scored, rtol=0, atol=5e-6)
    batch = collate_rows(partly, 0)
    # of 17 tokens the last scored one is number 16, from 0
    assert not batch.read_mask[0].any() and batch.read_mask[2].sum() == 16


@pytest.mark.parametrize("window", [24, 4096])
@pytest.mark.parametrize("family", list(SAVE))
def test_one_group_has_one_mask(family, window, tiny_checkpoint, tiny_images, monkeypatch):
    """However long its completions; and one for all layers where the window is longer than the
    rows.
    """
    group, kept, masks = ((0, 30), (0, 1), (0, 17)), [], engine.forward.shared_prompt_masks

    def with_window(model, *arguments):
        model.config.get_text_config().sliding_window = window
        found = masks(model, *arguments)
        kept.extend(found.values())
        return found

    expected, theirs = run(unshared, tiny_checkpoint(family), tiny_images, groups=group)
    monkeypatch.setattr(engine.forward, "shared_prompt_masks", with_window)
    ours, gradients = run(shared, tiny_checkpoint(family), tiny_images, groups=group)
    assert {(len(mask.prompts), len(mask.completions)) for mask in kept} == {(1, 1)}
    assert len({id(mask) for mask in kept}) == (2 if family == "gemma3" and window == 24 else 1)
    if window == 24:  # as the plain forward has it
        assert (
            float((ours - expected).abs().max()) < 5e-6
            and gradient_difference(gradients, theirs) < 1e-5
        )
    model = load(tiny_checkpoint(family))
    found = masks(model.net, model.family, collate_rows(rows_of(model, tiny_images), 0))[
        "full_attention"
    ]
    # prompts of other lengths
    assert (len(found.prompts), len(found.completions)) == (3, len(GROUPS))


@torch.no_grad()
@pytest.mark.parametrize("family", list(SAVE))
def test_the_row_holds_each_prompt_once_and_no_padding(family, tiny_checkpoint, tiny_images):
    model = load(tiny_checkpoint(family))
    rows, lengths = rows_of(model, tiny_images), []
    hook = model.net.model.language_model.layers[0].mlp.register_forward_hook(
        lambda _, inputs, __: lengths.append(inputs[0].shape[:2])
    )
    shared(model.net, model, rows)
    hook.remove()
    prompts = {id(row.prompt): len(row.prompt.input_ids) for row in rows}
    # a completion's last token predicts nothing
    assert lengths == [(1, sum(prompts.values()) + sum(n - 1 for _, n in GROUPS))]


@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (2, 8), (7, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_laid_out_for_the_memory_efficient_kernel(dtype, queries, keys):
    mask = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(0)) < 0.5
    added = additive_mask(mask, dtype, 3)
    assert added.dtype == dtype and added.shape == (2, 1, 3 * queries, keys)
    assert added.stride(-1) == 1 and all(stride % 8 == 0 for stride in added.stride()[:-1])
    assert (
        torch.equal(added == 0, mask.repeat(1, 1, 3, 1)) and (added[added != 0] == -torch.inf).all()
    )


# ---- controls: each makes the comparison fail ----------------------------------------------------
def differs(checkpoint, images, least: float, groups=GROUPS) -> None:
    model = load(checkpoint)
    rows = rows_of(model, images, groups)
    with torch.no_grad():
        difference = float(
            (shared(model.net, model, rows) - unshared(model.net, model, rows)).abs().max()
        )
    assert difference > least, difference


@pytest.mark.parametrize("family", list(SAVE))
def test_control_positions_that_are_not_restarted(
    family, tiny_checkpoint, tiny_images, monkeypatch
):
    packed = engine.forward.packed_positions

    def running_on(*arguments):
        positions = packed(*arguments)
        first = len(arguments[2].prompt_places)
        tail = positions[..., :first].max() + 1 + torch.arange(positions.shape[-1] - first)
        return torch.cat([positions[..., :first], tail.expand(*positions.shape[:-1], -1)], -1)

    monkeypatch.setattr(engine.forward, "packed_positions", running_on)
    differs(tiny_checkpoint(family), tiny_images, 1e-2)


@pytest.mark.parametrize("family", list(SAVE))
def test_control_a_completion_that_sees_another(family, tiny_checkpoint, tiny_images, monkeypatch):
    attend = engine.attention.attend

    def leaking(query, key, value, *others):
        # completions: the keys of each one's first token are those of another
        if len(query) > 1 and key.shape[1] > query.shape[1]:
            key = torch.cat(
                [
                    key[:, : -query.shape[1]],
                    key[:, -query.shape[1] :][:, :1].roll(1, 0),
                    key[:, 1 - query.shape[1] :],
                ],
                1,
            )
        return attend(query, key, value, *others)

    monkeypatch.setattr(engine.attention, "attend", leaking)
    differs(tiny_checkpoint(family), tiny_images, 1e-2)


@pytest.mark.parametrize("groups", [GROUPS, ANSWERS])
@pytest.mark.parametrize("family", list(SAVE))
def test_control_another_completions_prompt(
    family, groups, tiny_checkpoint, tiny_images, monkeypatch
):
    masks = engine.forward.shared_prompt_masks

    def crossed(*arguments):
        found = masks(*arguments)
        for mask in found.values():
            buckets = [
                dataclasses.replace(bucket, prompts=2 - bucket.prompts)
                for bucket in mask.places.buckets
            ]
            mask.places = dataclasses.replace(mask.places, buckets=buckets)
        return found

    monkeypatch.setattr(engine.forward, "shared_prompt_masks", crossed)
    differs(tiny_checkpoint(family), tiny_images, 1e-2, groups)


@pytest.mark.parametrize("family", list(SAVE))
def test_control_padding_beside_shorter_prompts_is_seen(
    family, tiny_checkpoint, tiny_images, monkeypatch
):
    masks = engine.forward.shared_prompt_masks

    def seeing(model, of_family, batch):
        everything = dataclasses.replace(
            batch.prompts, attention_mask=torch.ones_like(batch.prompts.attention_mask)
        )
        return masks(model, of_family, dataclasses.replace(batch, prompts=everything))

    monkeypatch.setattr(engine.forward, "shared_prompt_masks", seeing)
    differs(tiny_checkpoint(family), tiny_images, 1e-2, ANSWERS)


@pytest.mark.parametrize("change", ["window", "bidirectional", "window of the completion alone"])
def test_control_gemmas_masks(change, tiny_checkpoint, tiny_images, monkeypatch):
    masks = Gemma3.attention_masks

    def changed(self, model, attention_mask, token_types, queries):
        found = masks(
            self,
            model,
            attention_mask,
            0 * token_types if change == "bidirectional" else token_types,
            queries,
        )
        of_completions = len(queries) < attention_mask.shape[1]
        if change == "window" or of_completions and change == "window of the completion alone":
            found["sliding_attention"] = found["full_attention"]
        return found

    monkeypatch.setattr(Gemma3, "attention_masks", changed)
    model = load(tiny_checkpoint("gemma3"))
    rows = rows_of(model, tiny_images)
    with torch.no_grad():
        ours = shared(model.net, model, rows)
        monkeypatch.setattr(Gemma3, "attention_masks", masks)
        assert float((ours - unshared(model.net, model, rows)).abs().max()) > 1e-2


@pytest.mark.parametrize("change", ["none", "of other layers", "of other tokens", "on completions"])
def test_control_qwen3s_deepstack(change, tiny_checkpoint, tiny_images, monkeypatch):
    of_row = engine.qwen3_vl.deepstack_of_row

    def changed(prompts, places, embeddings):
        layers = of_row(prompts, places, embeddings)
        return {
            "none": [torch.zeros_like(layer) for layer in layers],
            "of other layers": layers[::-1],
            "of other tokens": [layer.roll(1, 0) for layer in layers],
            "on completions": [
                torch.cat([layer[: len(places)], layer[: len(embeddings) - len(places)]])
                for layer in layers
            ],
        }[change]

    monkeypatch.setattr(engine.qwen3_vl, "deepstack_of_row", changed)
    differs(tiny_checkpoint("qwen3_vl"), tiny_images, 1e-2)
