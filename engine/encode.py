"""Encode one example as token ids, loss mask and image tensors, for a checkpoint of either family.

The mask is made together with the tokens: an answer's row is the prompt (not supervised) followed
by the answer and its end-of-turn token (supervised). That the tokens of prompt + answer really
begin with the tokens of the prompt is checked for every row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from data.examples import Example
from data.files import DataError
from data.images import load_image
from data.prompts import Prompt, build_messages
from engine.families import Family, ImageTensors, family_of
from engine.text_length import text_length

IMAGE_TYPE = 1  # token type of an image placeholder; 0 is text


@dataclass(frozen=True)
class EncodedPrompt:
    """Hold one image and instruction, ready for the model.

    input_ids [P] int64: ends with the generation prompt.
    token_types [P] int64: 1 on the image's placeholders, else 0.
    vision: tensors of the image (see ImageTensors). A loaded model puts its features here, which
    the decoder needs. An Encoder alone has no vision tower and puts its pixels here.
    """

    input_ids: Tensor
    token_types: Tensor
    vision: ImageTensors


@dataclass(frozen=True)
class EncodedRow:
    """Hold a prompt and one completion of it: a teacher's answer or a sampled one.

    completion_ids [C] int64: stop token included.
    completion_mask [C] bool: true on the tokens that the loss sees.
    """

    prompt: EncodedPrompt
    completion_ids: Tensor
    completion_mask: Tensor


class Encoder:
    """Apply the tokenizer, image processor and chat template of one checkpoint."""

    def __init__(
        self,
        family: Family,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        config: dict,
    ):
        """Look up the token ids that the engine needs.

        config: config.json of the checkpoint as written.

        Raises ValueError for a tokenizer without the family's end of turn.
        """
        self.family = family
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.image_token_id = family.image_token_id(config)
        self.pad_token_id = tokenizer.pad_token_id
        end_of_turn_id = tokenizer.get_vocab().get(family.end_of_turn)
        if end_of_turn_id is None:
            raise ValueError(
                f"its tokenizer has no token {family.end_of_turn!r}, which ends a turn of a"
                f" {family.model_type} model"
            )
        self.end_of_turn_id: int = end_of_turn_id
        # By the special flag: `all_special_tokens` leaves out what has no role, such as Gemma's
        # <end_of_turn>.
        self.control_tokens = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        self._prompt_texts: dict[Prompt, str] = {}
        self._pieces: dict[int, str] = {}  # token id -> what it writes

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, min_visual_tokens: int, max_visual_tokens: int
    ) -> Encoder:
        """Load tokenizer and image processor of a checkpoint (a local folder or a hub name).

        min_visual_tokens, max_visual_tokens: bounds on the tokens of one image. Qwen2.5-VL resizes
        the image to lie between them. Gemma 3 ignores them and always has the 256
        (mm_tokens_per_image) of its configuration.

        Raises ValueError and OSError as `read_config` does.
        """
        config = read_config(path)
        family = family_of(config["model_type"])
        tokenizer = AutoTokenizer.from_pretrained(path)
        image_processor = family.image_processor(
            path,
            config,
            min_visual_tokens=min_visual_tokens,
            max_visual_tokens=max_visual_tokens,
        )
        return cls(family, tokenizer, image_processor, config)

    def encode_image(self, example: Example, content: bytes | None = None) -> ImageTensors:
        """Turn the example's image into the pixels that the vision tower takes.

        content: of the image file, where it has been read already.

        Raises DataError for an image that cannot be read.
        """
        images = [load_image(example, content)]
        processed = self.image_processor(images=images, return_tensors="pt")
        return {name: processed[name] for name in self.family.pixel_names}

    def encode_prompt(
        self, example: Example, prompt: Prompt, vision: ImageTensors | None = None
    ) -> EncodedPrompt:
        """Encode the instruction together with the example's image.

        vision: the image's features. Without them the image is read, and the prompt holds its
        pixels.

        Raises DataError as `encode_image` does.
        """
        vision = self.encode_image(example) if vision is None else vision
        count = self.family.num_image_tokens(self.config, self.image_processor, vision)
        input_ids = torch.tensor(self._tokenize(self._prompt_text(prompt), count))  # [P]
        token_types = (input_ids == self.image_token_id).long() * IMAGE_TYPE
        return EncodedPrompt(input_ids, token_types, vision)

    def encode_answer(
        self, example: Example, prompt: Prompt, answer: str, vision: ImageTensors | None = None
    ) -> EncodedRow:
        """Encode the example with an answer to learn: only it and its end-of-turn are supervised.

        vision: as in `encode_prompt`.

        Raises DataError for an answer that holds one of the tokenizer's control tokens, or that
        changes how the prompt is tokenised.
        """
        control = [token for token in self.control_tokens if token in answer]
        if control:
            raise DataError(
                [
                    f"example {example.id!r}: the answer holds the control token {control[0]!r};"
                    " remove it from the text"
                ]
            )
        encoded = self.encode_prompt(example, prompt, vision)
        num_image_tokens = int((encoded.token_types == IMAGE_TYPE).sum())
        ids = self._tokenize(self._render(prompt, answer), num_image_tokens)
        prompt_length = len(encoded.input_ids)
        if ids[:prompt_length] != encoded.input_ids.tolist():
            raise DataError(
                [
                    f"example {example.id!r}: prompt + answer does not begin with the tokens of the"
                    " prompt, so a loss mask would be wrong; the answer or the chat template joins"
                    " its first characters with the prompt's last"
                ]
            )
        completion = ids[prompt_length:]
        if self.end_of_turn_id not in completion:
            raise DataError(
                [
                    f"example {example.id!r}: the chat template does not end the answer with"
                    f" {self.family.end_of_turn!r}, so the model would never learn to stop"
                ]
            )
        # what the template writes after its end of turn is not the answer
        completion = completion[: completion.index(self.end_of_turn_id) + 1]
        supervised = torch.ones(len(completion), dtype=torch.bool)
        return EncodedRow(encoded, torch.tensor(completion), supervised)

    def decode(self, ids: Tensor) -> str:
        """Turn the ids of one completion into text, without control tokens."""
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list only for a batch of completions
        return text

    def text_length(self, ids: Tensor) -> int:
        """Count the tokens of one completion that are neither blank nor filler.

        ids [C]: the completion. Its stop token counts. See engine/text_length.py.
        """
        return text_length([self._piece(token) for token in ids.tolist()])

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            text = self.decode(torch.tensor([token]))
            if "\ufffd" in text:  # a part of a character; its own name tells it from other parts
                text = self.tokenizer.convert_ids_to_tokens([token])[0]
            self._pieces[token] = text
        return self._pieces[token]

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt not in self._prompt_texts:
            self._prompt_texts[prompt] = self._render(prompt)
        return self._prompt_texts[prompt]

    def _render(self, prompt: Prompt, answer: str | None = None) -> str:
        """Render the chat as text, up to the answer or with it."""
        text = self.tokenizer.apply_chat_template(
            build_messages(prompt, answer), tokenize=False, add_generation_prompt=answer is None
        )
        assert isinstance(text, str)  # ids only with tokenize=True
        return text

    def _tokenize(self, text: str, num_image_tokens: int) -> list[int]:
        """Tokenise a rendered chat, its one image place expanded to `num_image_tokens`."""
        text = self.family.expand_placeholder(text, num_image_tokens, self.tokenizer)
        # the template has already written <bos> where there is one
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if ids.count(self.image_token_id) != num_image_tokens:
            raise ValueError(
                f"the chat template gave {ids.count(self.image_token_id)} image placeholders for"
                f" {num_image_tokens} image tokens"
            )
        return ids


def read_config(path: str | Path) -> dict:
    """Read config.json of a checkpoint as written, before any class interprets it.

    path: a local folder or a hub name.

    Raises ValueError for one that is not JSON or of another family, OSError where there is none or
    the hub gives none.
    """
    file = cached_file(str(path), "config.json")
    if file is None:  # the hub's answer for a repository without one
        raise OSError(f"{path} holds no config.json")
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its config.json is not valid JSON ({error})") from error
    family_of(config.get("model_type"))
    return config
