"""Protect the loss mask and the image tokens.

Checked: the answer and its end of turn are supervised, nothing more and nothing less.

Checked by decoding the supervised ids again.

Run: pytest tests/engine/test_encode.py
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import Gemma3Processor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.examples import Example
from data.files import DataError
from data.prompts import PROMPTS, SYSTEM_PROMPT, Prompt, build_messages
from engine.collate import collate_prompts, collate_rows, plan_batches
from engine.encode import EncodedPrompt, EncodedRow, Encoder
from tests.helpers.tiny import SAVE, examples_of

FAMILIES = list(SAVE)
END = {"qwen2_5_vl": "<|im_end|>", "gemma3": "<end_of_turn>", "qwen3_vl": "<|im_end|>"}
HEADER = {
    "qwen2_5_vl": "<|im_start|>assistant\n",
    "gemma3": "<start_of_turn>model\n",
    "qwen3_vl": "<|im_start|>assistant\n",
}
ANSWER = "<think>Größe ≥ 2 cm.\n\nNo  pneumothorax.</think>\n<solution>Edema, No Finding</solution>"
SHORT = Prompt("short", "Which?")
PROMPT = PROMPTS["demo"]


def encoder_of(folder, lowest=4, highest=16) -> Encoder:
    return Encoder.from_pretrained(folder, min_visual_tokens=lowest, max_visual_tokens=highest)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def encoder(family, tiny_checkpoint) -> Encoder:
    return encoder_of(tiny_checkpoint(family))


@pytest.fixture
def example(tiny_images) -> Example:
    return examples_of(tiny_images, 56)[0]


# The mask


def test_the_answer_and_its_end_of_turn_are_supervised(encoder, family, example):
    row = encoder.encode_answer(example, PROMPT, ANSWER)
    assert encoder.tokenizer.decode(row.completion_ids) == ANSWER + END[family]
    assert (
        row.completion_ids[-1] == encoder.end_of_turn_id
        and (row.completion_ids == encoder.end_of_turn_id).sum() == 1
    )
    assert row.completion_mask.dtype == torch.bool and row.completion_mask.tolist() == [True] * len(
        row.completion_ids
    )
    assert encoder.decode(row.completion_ids) == ANSWER  # what the parser will read
    text = encoder.tokenizer.decode(row.prompt.input_ids)
    assert (
        text.endswith(PROMPT.text + END[family] + "\n" + HEADER[family]) and SYSTEM_PROMPT in text
    )


def test_training_and_sampling_see_the_same_prompt(encoder, example):
    row, prompt = (
        encoder.encode_answer(example, PROMPT, ANSWER),
        encoder.encode_prompt(example, PROMPT),
    )
    assert torch.equal(row.prompt.input_ids, prompt.input_ids) and torch.equal(
        row.prompt.token_types, prompt.token_types
    )


def test_supervised_tokens_of_a_batch(encoder, family, tiny_images):
    examples, answers = examples_of(tiny_images, 112, 56, 84), ["short", ANSWER, ""]
    rows = [
        encoder.encode_answer(*row)
        for row in zip(examples, (SHORT, PROMPT, SHORT), answers, strict=True)
    ]
    batch = collate_rows(rows, encoder.pad_token_id)
    assert batch.prompt_of_row.tolist() == [0, 1, 2]
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        length = len(row.completion_ids)
        assert (
            encoder.tokenizer.decode(batch.completion_ids[i][batch.completion_mask[i]])
            == answer + END[family]
        )
        assert (batch.completion_ids[i, length:] == encoder.pad_token_id).all()
        assert batch.completion_mask[i].tolist() == [
            j < length for j in range(batch.completion_mask.shape[1])
        ]
        assert torch.equal(
            batch.prompts.input_ids[i][batch.prompts.attention_mask[i]], row.prompt.input_ids
        )


def test_the_packed_row_by_hand():
    """Prompts a (3 tokens) and b (2); completions of a: 4 tokens and 1, of b: 3 tokens of which
    only the second is scored.
    """

    def prompt(*ids):
        return EncodedPrompt(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.long), {})

    a, b = prompt(1, 2, 3), prompt(4, 5)
    rows = [
        EncodedRow(a, torch.tensor([10, 11, 12, 13]), torch.ones(4, dtype=torch.bool)),
        EncodedRow(b, torch.tensor([20, 21, 22]), torch.tensor([False, True, False])),
        EncodedRow(a, torch.tensor([30]), torch.tensor([True])),
    ]
    batch = collate_rows(rows, 0)
    assert batch.prompts.input_ids.tolist() == [
        [1, 2, 3],
        [0, 4, 5],
    ] and batch.prompt_of_row.tolist() == [0, 1, 0]
    # read: 10 11 12, and 20, which predicts the scored 21; 30 is predicted by its prompt alone
    assert batch.read_mask.int().tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    # packed: 1 2 3 4 5 10 11 12 20
    assert batch.prompt_places.tolist() == [0, 1, 2, 4, 5] and batch.read_places.tolist() == [
        0,
        1,
        2,
        3,
    ]
    # scored 10 11 12 13 21 30, predicted by 3 10 11 12 20 3
    assert batch.scored_places.tolist() == [0, 1, 2, 3, 5, 8]
    assert batch.predictors.tolist() == [2, 5, 6, 7, 8, 2]
    # In another order the row is the same, but 21 is scored before the others: the longest
    # completion comes first in any order.
    batch = collate_rows([rows[1], rows[2], rows[0]], 0)
    assert batch.prompts.input_ids.tolist() == [[0, 4, 5], [1, 2, 3]]
    assert batch.read_places.tolist() == [6, 7, 8, 0]  # packed: 4 5 1 2 3 10 11 12 20
    assert batch.scored_places.tolist() == [1, 4, 8, 9, 10, 11] and batch.predictors.tolist() == [
        8,
        4,
        4,
        5,
        6,
        7,
    ]


def test_completions_of_similar_lengths_are_laid_out_together():
    """Of 4, 9, 7, 1 and 5 tokens 3, 8, 6, 0 and 4 are read. 6 is three quarters of 8, and 3 of 4;
    what has nothing to read has no place.
    """
    prompt = EncodedPrompt(torch.tensor([1, 2]), torch.zeros(2, dtype=torch.long), {})
    rows = [
        EncodedRow(prompt, torch.arange(10 * i, 10 * i + n), torch.ones(n, dtype=torch.bool))
        for i, n in enumerate((4, 9, 7, 1, 5), 1)
    ]
    batch = collate_rows(rows, 0)
    assert [(bucket.rows.tolist(), bucket.length) for bucket in batch.buckets] == [
        ([1, 2], 8),
        ([4, 0], 4),
    ]
    assert (
        batch.buckets[0].prompts.tolist() == [0, 0]
        and batch.buckets[0].places.tolist() == [*range(14)]
        and batch.buckets[1].places.tolist() == [0, 1, 2, 3, 4, 5, 6]
    )
    read = batch.completion_ids[:, :8].flatten()[batch.read_places]
    assert read.tolist() == [*range(20, 28), *range(30, 36), *range(50, 54), *range(10, 13)]
    packed = torch.cat([torch.tensor([1, 2]), read])
    before = [[2, *row.completion_ids[:-1].tolist()] for row in rows]  # each token's predecessor
    assert packed[batch.predictors].tolist() == [token for row in before for token in row]
    assert (
        collate_rows(rows[3:4], 0).buckets == []
        and collate_rows(rows[3:4], 0).read_places.tolist() == []
    )


def test_batches_are_cut_by_tokens():
    prompts = [
        EncodedPrompt(torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long), {})
        for n in (10, 20)
    ]
    rows = [
        EncodedRow(prompts[p], torch.zeros(n, dtype=torch.long), torch.ones(n, dtype=torch.bool))
        for p, n in ((0, 5), (0, 6), (0, 7), (1, 8), (1, 9), (1, 50))
    ]
    assert plan_batches(rows, 6, None) == [[0, 1, 2, 3, 4, 5]]
    assert plan_batches(rows, 4, None) == [[0, 1, 2, 3], [4, 5]]
    # 10 + 5 + 6 = 21, 10 + 7 = 17, 20 + 8 = 28, 20 + 9 = 29, 70: a row over the bound goes alone
    assert plan_batches(rows, 6, 27) == [[0, 1], [2], [3], [4], [5]]
    # 10 + 5 + 6 + 7 = 28; 20 + 8 + 9 = 37
    assert plan_batches(rows, 6, 37) == [[0, 1, 2], [3, 4], [5]]
    assert plan_batches(rows, 6, 56) == [[0, 1, 2, 3], [4], [5]]  # 28 + 28
    # 4 begins a batch of its own in any case
    assert plan_batches(rows, 4, 37) == [[0, 1, 2], [3], [4], [5]]


def test_padded_prompts_by_hand():
    def prompt(ids, types):
        return EncodedPrompt(torch.tensor(ids), torch.tensor(types), {})

    prompts = [prompt([1, 2, 3], [0, 1, 0]), prompt([4], [0])]
    batch = collate_prompts(prompts, 9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch.token_types.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert batch.attention_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.vision == [{}, {}] and not batch.alike
    # the same types, whatever the ids; the same length is not enough
    assert collate_prompts([prompts[0], prompt([7, 8, 7], [0, 1, 0])], 9).alike
    assert not collate_prompts([prompts[0], prompt([7, 8, 7], [0, 0, 1])], 9).alike


def test_prompts_are_shared_by_identity_in_order_of_appearance():
    """Two prompts with the same tokens are still two: their images differ."""
    first, second = (
        EncodedPrompt(torch.tensor([1, 2]), torch.zeros(2, dtype=torch.long), {}) for _ in range(2)
    )
    row = (torch.tensor([5]), torch.tensor([True]))
    batch = collate_rows([EncodedRow(p, *row) for p in (second, first, second, first)], 0)
    assert batch.prompt_of_row.tolist() == [0, 1, 0, 1] and len(batch.prompts.vision) == 2
    # packed: 1 2 1 2, each completion predicted by the last token of its prompt
    assert batch.predictors.tolist() == [1, 3, 1, 3] and batch.buckets == []


def test_prompts_are_padded_on_the_left(encoder, tiny_images):
    first, second = examples_of(tiny_images, 56, 112)
    prompts = [encoder.encode_prompt(first, SHORT), encoder.encode_prompt(second, PROMPT)]
    batch = collate_prompts(prompts, encoder.pad_token_id)
    gap = len(prompts[1].input_ids) - len(prompts[0].input_ids)
    assert gap > 0 and batch.input_ids[0, :gap].tolist() == [encoder.pad_token_id] * gap
    assert torch.equal(batch.input_ids[0, gap:], prompts[0].input_ids) and torch.equal(
        batch.input_ids[1], prompts[1].input_ids
    )
    assert torch.equal(batch.token_types[0, gap:], prompts[0].token_types)
    assert (
        not batch.attention_mask[0, :gap].any()
        and batch.attention_mask[0, gap:].all()
        and batch.attention_mask[1].all()
    )


def test_a_template_that_changes_the_prompt_is_refused(encoder, example):
    # As templates of thinking models do: the generation prompt opens a block that is not there in
    # front of a given answer.
    head, tail = encoder.tokenizer.chat_template.rsplit("{% endif %}", 1)
    encoder.tokenizer.chat_template = head + "<think>{% endif %}" + tail
    with pytest.raises(
        DataError,
        match="example 'e0': prompt [+] answer does not begin with the tokens of the prompt",
    ):
        encoder.encode_answer(example, PROMPT, "Edema")


def test_a_template_without_end_of_turn_is_refused(encoder, family, example):
    head, tail = encoder.tokenizer.chat_template.split(END[family])
    encoder.tokenizer.chat_template = (
        head + "{% if m['role'] != 'assistant' %}" + END[family] + "{% endif %}" + tail
    )
    with pytest.raises(
        DataError,
        match=f"example 'e0': .*does not end the answer with '{END[family].replace('|', '[|]')}'",
    ):
        encoder.encode_answer(example, PROMPT, "Edema")


def test_a_template_without_an_image_is_refused(encoder, example):
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}{% for c in m['content'] %}{{ c['text'] }}"
        "{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="0 image placeholders for 4 image tokens"):
        encoder.encode_prompt(example, PROMPT)


@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("qwen2_5_vl", "<|im_end|>"),
        ("qwen2_5_vl", "<|image_pad|>"),
        ("qwen2_5_vl", "<|endoftext|>"),
        ("qwen3_vl", "<|vision_start|>"),
        ("gemma3", "<end_of_turn>"),
        ("gemma3", "<start_of_turn>"),
        ("gemma3", "<image_soft_token>"),
        ("gemma3", "<bos>"),
    ],
)
def test_control_tokens_in_an_answer_are_refused(tiny_checkpoint, example, family, token):
    with pytest.raises(DataError) as caught:
        encoder_of(tiny_checkpoint(family)).encode_answer(
            example, PROMPT, f"<think>x{token}</think>"
        )
    assert (
        str(caught.value)
        == f"example 'e0': the answer holds the control token {token!r}; remove it from the text"
    )


def test_prompts_of_one_name_are_not_confused(encoder, example):
    prompts = [encoder.encode_prompt(example, Prompt("same", text)) for text in ("first", "second")]
    texts = [encoder.tokenizer.decode(prompt.input_ids) for prompt in prompts]
    assert "first" in texts[0] and "second" in texts[1] and "first" not in texts[1]


def test_gemma_has_one_bos(tiny_checkpoint, example):
    encoder = encoder_of(tiny_checkpoint("gemma3"))
    bos = encoder.tokenizer.bos_token_id
    # As Gemma's own tokenizer: it adds <bos> by itself, which the chat template does too.
    encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert encoder.tokenizer("x").input_ids[0] == bos
    row = encoder.encode_answer(example, PROMPT, ANSWER)
    assert (
        torch.cat([row.prompt.input_ids, row.completion_ids]) == bos
    ).nonzero().flatten().tolist() == [0]


def test_gemma_ids_are_those_of_its_own_processor(tiny_checkpoint, example):
    encoder = encoder_of(tiny_checkpoint("gemma3"))
    template = encoder.tokenizer.chat_template
    processor = Gemma3Processor(
        encoder.image_processor, encoder.tokenizer, chat_template=template, image_seq_length=4
    )
    text = processor.apply_chat_template(build_messages(PROMPT), add_generation_prompt=True)
    image = Image.open(example.image_root / example.image).convert("RGB")
    official = processor(
        text=text, images=[image], add_special_tokens=False, return_mm_token_type_ids=True
    )
    encoded = encoder.encode_prompt(example, PROMPT)
    assert encoded.input_ids.tolist() == official["input_ids"][0]
    types = "token_type_ids" if "token_type_ids" in official else "mm_token_type_ids"
    assert encoded.token_types.tolist() == list(official[types][0])


class ImageProcessorOnly(Qwen3VLProcessor):
    """Do without the video processor, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def check_argument_for_proper_class(self, name, argument) -> None:
        if name != "video_processor":
            super().check_argument_for_proper_class(name, argument)


def test_qwen3_prompts_are_those_of_its_own_processor(tiny_checkpoint, tiny_images):
    encoder = encoder_of(tiny_checkpoint("qwen3_vl"))
    template = encoder.tokenizer.chat_template
    processor = ImageProcessorOnly(encoder.image_processor, encoder.tokenizer, None, template)
    text = processor.apply_chat_template(build_messages(PROMPT), add_generation_prompt=True)
    for example in examples_of(tiny_images, 56, 84, 112):
        image = Image.open(example.image_root / example.image).convert("RGB")
        official = processor(text=text, images=[image], return_tensors="pt")
        encoded = encoder.encode_prompt(example, PROMPT)
        assert torch.equal(encoded.input_ids, official["input_ids"][0])
        assert torch.equal(encoded.token_types, official["mm_token_type_ids"][0])
        for name in ("pixel_values", "image_grid_thw"):
            assert torch.equal(encoded.vision[name], official[name])


# The image


def image_tokens(encoder, folder, height, width) -> int:
    Image.fromarray(np.zeros((height, width), dtype=np.uint8)).save(folder / "x.png")
    encoded = encoder.encode_prompt(Example("e", "p", "x.png", (), "site", folder), SHORT)
    tokens = int((encoded.token_types == 1).sum())
    assert torch.equal(encoded.token_types == 1, encoded.input_ids == encoder.image_token_id)
    if "image_grid_thw" in encoded.vision:  # 2 x 2 patches a token
        assert (
            len(encoded.vision["pixel_values"])
            == 4 * tokens
            == int(encoded.vision["image_grid_thw"].prod())
        )
    return tokens


@pytest.mark.parametrize(
    ("bounds", "height", "width", "expected"),
    [
        # A token is 28 x 28 pixels. 200 x 300 rounds to 7 x 11 = 77 tokens.
        ((64, 128), 200, 300, 77),
        # Too many for 16: scaled by 1 / sqrt(60000 / (16 * 784)) = 1 / 2.187 to 91.4 x 137.2,
        # rounded down to 3 x 4
        ((4, 16), 200, 300, 12),
        # Too few for 100: scaled by sqrt(100 * 784 / 60000) = 1.143 to 228.6 x 342.9, rounded up to
        # 9 x 13
        ((100, 200), 200, 300, 117),
        ((4, 16), 28, 28, 4),
        ((4, 16), 112, 112, 16),
        ((9, 9), 500, 500, 9),
    ],
)
def test_qwen_image_tokens_follow_the_bounds(
    tiny_checkpoint, tmp_path, bounds, height, width, expected
):
    folder = tiny_checkpoint("qwen2_5_vl")
    own = json.loads((folder / "preprocessor_config.json").read_text())
    # the checkpoint's own: nearly anything
    assert (own["min_pixels"], own["max_pixels"]) == (4 * 784, 16384 * 784)
    encoder = encoder_of(folder, *bounds)
    assert image_tokens(encoder, tmp_path, height, width) == expected
    assert bounds[0] <= expected <= bounds[1]


@pytest.mark.parametrize(
    ("bounds", "height", "width", "expected"),
    [
        # A token of Qwen3-VL is 32 x 32 pixels. 200 x 300 rounds to 6 x 9 = 54 tokens.
        ((4, 64), 200, 300, 54),
        # Too many for 16: scaled by 1 / sqrt(60000 / (16 * 1024)) = 1 / 1.914 to 104.5 x 156.8,
        # rounded down to 3 x 4
        ((4, 16), 200, 300, 12),
        # Too few for 100: scaled by sqrt(100 * 1024 / 60000) = 1.306 to 261.3 x 391.9, rounded up
        # to 9 x 13
        ((100, 200), 200, 300, 117),
        ((4, 16), 32, 32, 4),
    ],
)
def test_qwen3_image_tokens_follow_the_bounds(
    tiny_checkpoint, tmp_path, bounds, height, width, expected
):
    encoder = encoder_of(tiny_checkpoint("qwen3_vl"), *bounds)
    assert image_tokens(encoder, tmp_path, height, width) == expected
    assert bounds[0] <= expected <= bounds[1]


def test_qwen3_has_its_think_tags_as_tokens_that_are_no_control_tokens(
    tiny_checkpoint, tiny_images
):
    encoder = encoder_of(tiny_checkpoint("qwen3_vl"))
    answer = "<think>a</think>\n<solution>Edema</solution>"
    row = encoder.encode_answer(examples_of(tiny_images, 56)[0], SHORT, answer)
    think, end = encoder.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert row.completion_ids[0] == think and int((row.completion_ids == end).sum()) == 1
    assert encoder.decode(row.completion_ids) == answer


def test_bounds_that_are_not_in_force_stop_the_run(tiny_checkpoint, monkeypatch):
    original = Qwen2VLImageProcessorPil.from_pretrained

    def deaf(path, min_pixels, max_pixels, **rest):
        return original(path, **rest)

    # the family's class, which loads the file whatever name of a class it has
    monkeypatch.setattr(Qwen2VLImageProcessorPil, "from_pretrained", deaf)
    with pytest.raises(
        RuntimeError,
        match=r"uses pixel bounds \(3136, 12845056\), not \(3136, 12544\) as asked for",
    ):
        encoder_of(tiny_checkpoint("qwen2_5_vl"))


def test_gemma_image_tokens_are_fixed(tiny_checkpoint, tmp_path):
    encoder = encoder_of(tiny_checkpoint("gemma3"), 100, 200)
    assert [
        image_tokens(encoder, tmp_path, *size) for size in ((28, 28), (200, 300), (56, 56))
    ] == [4, 4, 4]


def test_the_pixels_are_the_images(encoder, family, tmp_path):
    # mean and std 0.5: white is (1 - 0.5) / 0.5 = 1, black is -1
    for name, value, expected in (("white.png", 255, 1.0), ("black.png", 0, -1.0)):
        Image.fromarray(np.full((56, 56), value, dtype=np.uint8)).save(tmp_path / name)
        vision = encoder.encode_prompt(Example("e", "p", name, (), "site", tmp_path), SHORT).vision
        torch.testing.assert_close(
            vision["pixel_values"],
            torch.full_like(vision["pixel_values"], expected),
            rtol=0,
            atol=1e-6,
        )
        assert set(vision) == (
            {"pixel_values"} if family == "gemma3" else {"pixel_values", "image_grid_thw"}
        )


def test_an_unreadable_image_is_named(encoder, tmp_path):
    with pytest.raises(DataError, match="example 'e': image 'none.png': no such file"):
        encoder.encode_prompt(Example("e", "p", "none.png", (), "site", tmp_path), SHORT)


def test_a_tokenizer_without_the_familys_end_of_turn_is_refused(tiny_checkpoint):
    """A checkpoint that says it is of one family and brings the tokenizer of the other."""
    qwen, gemma = (encoder_of(tiny_checkpoint(family)) for family in ("qwen2_5_vl", "gemma3"))
    with pytest.raises(
        ValueError,
        match="its tokenizer has no token '<end_of_turn>', which ends a turn of a gemma3 model",
    ):
        Encoder(gemma.family, qwen.tokenizer, gemma.image_processor, gemma.config)


def test_another_model_family_is_refused(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen2_5_vl"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(
        ValueError, match="a 'llama' model; this engine trains qwen2_5_vl, gemma3 and qwen3_vl"
    ):
        encoder_of(folder)


@pytest.mark.parametrize("size", [(56, 56), (61, 43), (300, 200), (200, 333), (30, 29)])
def test_the_final_image_gives_the_same_pixels_to_the_bit(encoder, tmp_path, size):
    """What a server gets is resized already: resizing it again changes nothing."""
    shape = (*reversed(size), 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    example = Example("e", "p", "image.png", ("Edema",), "site", tmp_path)
    final = encoder.final_image(example)
    once, twice = encoder.encode_image(example), encoder._process(final)
    assert final.mode == "RGB" and once.keys() == twice.keys()
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name
    height, width = once["pixel_values"].shape[-2:]
    if "image_grid_thw" in once:
        _, height, width = (encoder.image_processor.patch_size * once["image_grid_thw"][0]).tolist()
    assert final.size == (width, height)
    encoder.image_processor.do_resize = False
    assert encoder.final_image(example).size == size
