"""Protects the layout of a training batch, place by place: a token that is read from the wrong
place trains without any error. Run: pytest tests/engine/test_collate.py
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.collate import collate_prompts, collate_rows
from engine.encode import EncodedPrompt, EncodedRow


def prompt(*ids: int) -> EncodedPrompt:
    vision = {"features": torch.zeros(0, 8)}
    return EncodedPrompt(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.long), vision)


def ragged_batch():
    """Collate six completions of two prompts of 1 and 3 tokens; the first row's prompt is Q.

    Scored are all tokens of the first four, the first token of the fifth, the last of the sixth.
    """
    q, p = prompt(4), prompt(1, 2, 3)
    rows = [
        (q, [11, 12], [1, 1]),
        (p, [21, 22, 23, 24], [1, 1, 1, 1]),
        (p, [31], [1]),
        (q, [41, 42, 43, 44, 45], [1, 1, 1, 1, 1]),
        (p, [51, 52, 53], [1, 0, 0]),
        (p, [61, 62, 63], [0, 0, 1]),
    ]
    return collate_rows(
        [EncodedRow(of, torch.tensor(ids), torch.tensor(mask).bool()) for of, ids, mask in rows], 9
    )


def test_completions_are_padded_on_the_right_and_know_their_prompt():
    batch = ragged_batch()
    assert batch.prompts.input_ids.tolist() == [[9, 9, 4], [1, 2, 3]]
    assert batch.prompt_of_row.tolist() == [0, 1, 1, 0, 1, 1]
    assert batch.completion_ids.tolist() == [
        [11, 12, 9, 9, 9],
        [21, 22, 23, 24, 9],
        [31, 9, 9, 9, 9],
        [41, 42, 43, 44, 45],
        [51, 52, 53, 9, 9],
        [61, 62, 63, 9, 9],
    ]
    assert batch.completion_mask.long().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0],
    ]


def test_what_is_read_of_a_completion_ends_before_its_last_scored_token():
    # 1, 3, 0, 4, 0 and 2 tokens are read, so R is 4
    assert ragged_batch().read_mask.long().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [0, 0, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
        [1, 1, 0, 0],
    ]


def test_buckets_hold_completions_of_similar_lengths_the_longest_first():
    # Read are 4, 3, 2 and 1 tokens of rows 3, 1, 5 and 0. 3 is not below 0.75 x 4, so rows 3 and 1
    # share a bucket; 2 is, and 1 is below 0.75 x 2. Nothing is read of rows 2 and 4.
    first, second, third = ragged_batch().buckets
    assert (first.rows.tolist(), first.prompts.tolist(), first.length) == ([3, 1], [0, 1], 4)
    assert first.places.tolist() == [0, 1, 2, 3, 4, 5, 6]  # of 2 x 4; the last is padding
    assert (second.rows.tolist(), second.prompts.tolist(), second.length) == ([5], [1], 2)
    assert second.places.tolist() == [0, 1]
    assert (third.rows.tolist(), third.prompts.tolist(), third.length) == ([0], [0], 1)
    assert third.places.tolist() == [0]


def test_places_in_the_packed_row():
    # The packed row: 0 is prompt Q, 1 to 3 are P, then the buckets' completions: row 3 at 4 to 7,
    # row 1 at 8 to 10, row 5 at 11 and 12, row 0 at 13.
    batch = ragged_batch()
    assert batch.prompt_places.tolist() == [2, 3, 4, 5]  # in the flat [2,3]; 0 and 1 are padding
    # in the flat [6,4]: row 3, row 1, row 5, row 0
    assert batch.read_places.tolist() == [12, 13, 14, 15, 4, 5, 6, 20, 21, 0]
    # in the flat [6,5]
    assert batch.scored_places.tolist() == [0, 1, 5, 6, 7, 8, 10, 15, 16, 17, 18, 19, 20, 27]
    # A first token is predicted by its prompt's last one, 0 or 3, any other by the one before it.
    assert batch.predictors.tolist() == [0, 13, 3, 8, 9, 10, 3, 0, 4, 5, 6, 7, 3, 12]


def tensors_of(value) -> list[torch.Tensor]:
    """List the tensors of a batch and of all that it holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    elif not isinstance(value, list):
        return []
    return [tensor for item in value for tensor in tensors_of(item)]


def test_the_whole_batch_moves_to_a_device():
    batch = ragged_batch()
    here, there = tensors_of(batch), tensors_of(batch.to("meta"))
    # 8 of the batch, 3 of its prompts, 2 of their images, 3 of each of 3 buckets
    assert len(here) == len(there) == 22
    assert {tensor.device.type for tensor in here} == {"cpu"}
    assert {tensor.device.type for tensor in there} == {"meta"}
    assert [tensor.shape for tensor in here] == [tensor.shape for tensor in there]


def test_a_batch_is_not_changed_in_place():
    batch = ragged_batch()
    for value in (batch, batch.prompts, batch.buckets[0]):
        assert type(value).__dataclass_params__.frozen is True


def test_an_image_with_more_or_fewer_features_than_placeholders_is_refused():
    types, vision = torch.tensor([0, 1, 1]), {"features": torch.zeros(3, 8)}
    with pytest.raises(
        ValueError,
        match=(
            "^2 image placeholders for 3 image features; the image processor and the model disagree"
        ),
    ):
        collate_prompts([EncodedPrompt(torch.tensor([1, 2, 2]), types, vision)], 9)
