"""The processor side of both model families: one Example -> token ids, loss mask and vision
tensors.

The mask is made together with the tokens: an answer's row is the prompt (not supervised) followed
by the answer and its end-of-turn token (supervised). That the tokens of prompt + answer really
begin with the tokens of the prompt is checked for every row. Image processors are the PIL ones of
both families, so torchvision is never needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from data.examples import Example
from data.files import DataError
from data.images import load_image
from data.prompts import Prompt, build_messages

FAMILIES = ("qwen2_5_vl", "gemma3")  # `model_type` of config.json
IMAGE_TYPE = 1  # token type of an image placeholder; 0 is text


@dataclass(frozen=True)
class EncodedPrompt:
    """One image and instruction, ready for the model.

    input_ids [P] int64, ends with the generation prompt. token_types [P] int64, 1 on the image's
    placeholders. vision: this one image, as the vision tower takes it (pixel_values) or as it
    leaves it (features); for Qwen also image_grid_thw [1,3].
    """

    input_ids: Tensor
    token_types: Tensor
    vision: dict[str, Tensor]


@dataclass(frozen=True)
class EncodedRow:
    """A prompt and one completion of it: a teacher's answer or a sampled one.

    completion_ids [C] int64, stop token included. completion_mask [C] bool: the tokens that the
    loss sees.
    """

    prompt: EncodedPrompt
    completion_ids: Tensor
    completion_mask: Tensor


class Encoder:
    """Tokenizer, image processor and chat template of one checkpoint."""

    def __init__(
        self,
        family: str,
        tokenizer: PreTrainedTokenizerBase,
        image_processor,
        image_token_id: int,
        image_seq_length: int | None,
    ):
        self.family = family
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.image_token_id = image_token_id
        # Gemma 3: every image is the same number of tokens
        self.image_seq_length = image_seq_length
        self.pad_token_id = tokenizer.pad_token_id
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids(
            "<|im_end|>" if family == "qwen2_5_vl" else "<end_of_turn>"
        )
        # By the special flag: `all_special_tokens` leaves out what has no role, such as Gemma's
        # <end_of_turn>.
        self.control_tokens = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        self._prompt_texts: dict[Prompt, str] = {}

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, min_visual_tokens: int, max_visual_tokens: int
    ) -> Encoder:
        """Tokenizer and image processor of a checkpoint (a local folder or a hub name).

        min_visual_tokens, max_visual_tokens: bounds on the tokens of one image. Qwen2.5-VL resizes
        the image to lie between them; Gemma 3 always has the 256 (mm_tokens_per_image) of its
        configuration and ignores them. Raises ValueError and OSError as `read_config` does.
        """
        config = read_config(path)
        family = config["model_type"]
        tokenizer = AutoTokenizer.from_pretrained(path)
        if family == "gemma3":
            image_processor = AutoImageProcessor.from_pretrained(path, backend="pil")
            return cls(
                family,
                tokenizer,
                image_processor,
                (
                    config["image_token_index"]
                    if "image_token_index" in config
                    else config["image_token_id"]
                ),
                config["mm_tokens_per_image"],
            )
        vision = config["vision_config"]
        pixels_per_token = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
        bounds = {
            "min_pixels": min_visual_tokens * pixels_per_token,
            "max_pixels": max_visual_tokens * pixels_per_token,
        }
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **bounds)
        # A checkpoint's own bounds have been seen to win silently; the ones asked for must be the
        # ones in force.
        in_force = (image_processor.size["shortest_edge"], image_processor.size["longest_edge"])
        if in_force != tuple(bounds.values()):
            raise RuntimeError(
                f"the image processor of {path} uses pixel bounds {in_force}, not"
                f" {tuple(bounds.values())} as asked for"
            )
        return cls(family, tokenizer, image_processor, config["image_token_id"], None)

    def encode_image(self, example: Example) -> dict[str, Tensor]:
        """What the vision tower takes. Raises DataError for an image that cannot be read."""
        vision = self.image_processor(images=[load_image(example)], return_tensors="pt")
        return {name: vision[name] for name in ("pixel_values", "image_grid_thw") if name in vision}

    def encode_prompt(
        self, example: Example, prompt: Prompt, vision: dict[str, Tensor] | None = None
    ) -> EncodedPrompt:
        """The instruction and the example's image, which is not read where `vision` is given.
        Raises DataError as `encode_image`.
        """
        vision = self.encode_image(example) if vision is None else vision
        # [P]
        input_ids = torch.tensor(
            self._tokenize(self._prompt_text(prompt), self._num_image_tokens(vision))
        )
        return EncodedPrompt(
            input_ids, (input_ids == self.image_token_id).long() * IMAGE_TYPE, vision
        )

    def encode_answer(
        self, example: Example, prompt: Prompt, answer: str, vision: dict[str, Tensor] | None = None
    ) -> EncodedRow:
        """The example with an answer to learn: all of the answer and its end-of-turn token are
        supervised, nothing else is.

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
        text = self.tokenizer.apply_chat_template(build_messages(prompt, answer), tokenize=False)
        ids = self._tokenize(text, num_image_tokens)
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
                    f" {self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id)!r}, so the model"
                    " would never learn to stop"
                ]
            )
        completion = completion[
            : completion.index(self.end_of_turn_id) + 1
        ]  # what the template writes after it is not the answer
        return EncodedRow(
            encoded, torch.tensor(completion), torch.ones(len(completion), dtype=torch.bool)
        )

    def decode(self, ids: Tensor) -> str:
        """Completion ids -> text, without control tokens."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _prompt_text(self, prompt: Prompt) -> str:
        if prompt not in self._prompt_texts:
            self._prompt_texts[prompt] = self.tokenizer.apply_chat_template(
                build_messages(prompt), tokenize=False, add_generation_prompt=True
            )
        return self._prompt_texts[prompt]

    def _num_image_tokens(self, vision: dict[str, Tensor]) -> int:
        if self.family == "gemma3":
            return self.image_seq_length
        return int(vision["image_grid_thw"].prod()) // self.image_processor.merge_size**2

    def _tokenize(self, text: str, num_image_tokens: int) -> list[int]:
        """Chat text with one image placeholder -> ids with as many placeholders as the image has
        tokens.
        """
        if self.family == "gemma3":
            begin, image, end = (
                self.tokenizer.boi_token,
                self.tokenizer.image_token,
                self.tokenizer.eoi_token,
            )
            text = text.replace(begin, f"\n\n{begin}{image * num_image_tokens}{end}\n\n", 1)
        else:
            text = text.replace("<|image_pad|>", "<|image_pad|>" * num_image_tokens, 1)
        ids = self.tokenizer(
            text, add_special_tokens=False
        ).input_ids  # the template has already written <bos> where there is one
        if ids.count(self.image_token_id) != num_image_tokens:
            raise ValueError(
                f"the chat template gave {ids.count(self.image_token_id)} image placeholders for"
                f" {num_image_tokens} image tokens"
            )
        return ids


def read_config(path: str | Path) -> dict:
    """config.json of a checkpoint (a local folder or a hub name) as written, before any class
    interprets it.

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
    if config.get("model_type") not in FAMILIES:
        raise ValueError(
            f"a {config.get('model_type')!r} model; this engine trains {' and '.join(FAMILIES)}"
            " models"
        )
    return config
