"""Encode one example as token ids, loss mask and image tensors, for a checkpoint of any family.

The mask is made together with the tokens: an answer's row is the prompt (not supervised) followed
by the answer and its end-of-turn token (supervised). For every row it is checked that its tokens
begin with the tokens of the prompt, and that the supervised ones write the answer as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from data.answers import TAGS
from data.examples import Example
from data.files import DataError, first_problems
from data.images import load_image
from data.prompts import Prompt
from engine.chat import PROBE, ChatTemplate, change_of_answer, same_but_for
from engine.config import UsageError
from engine.families import Family, ImageTensors, family_of
from engine.model_checks import read_object
from engine.processor_files import load_tokenizer, one_line, pan_and_scan, parsed_config
from engine.text_length import text_length

logger = logging.getLogger(__name__)

IMAGE_TYPE = 1  # token type of an image placeholder; 0 is text
# A special token of plain words, such as a label that somebody added, belongs to answers.
_WORDS = re.compile(r"[^\W_](?:[\w ,./()'-]*\w)?")


@dataclass(frozen=True)
class EncodedPrompt:
    """Hold one image and instruction, ready for the model.

    input_ids [P] int64: ends with the generation prompt.
    token_types [P] int64: 1 on the image's placeholders, else 0.
    vision: tensors of the image (see ImageTensors). A loaded model puts its features here, which
    the decoder needs. An Encoder alone has no vision tower and puts its pixels here.
    example: id of the image's example, for messages.
    """

    input_ids: Tensor
    token_types: Tensor
    vision: ImageTensors
    example: str = ""


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

        config: config.json of the checkpoint, with its class's defaults.

        control_tokens: special tokens, which are no part of any text. tags: special tokens that an
        answer is written with all the same, such as <think>. They are text. notes: what a user
        should know of this checkpoint, one line each.

        Raises ValueError for a tokenizer without the family's end of turn, or with a chat template
        that cannot be used.
        """
        self.family = family
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.image_token_id = family.image_token_id(config)
        end_of_turn_id = tokenizer.get_vocab().get(family.end_of_turn)
        if end_of_turn_id is None:
            raise ValueError(
                f"its tokenizer has no token {family.end_of_turn!r}, which ends a turn of a"
                f" {family.model_type} model"
            )
        self.end_of_turn_id: int = end_of_turn_id
        placeholders = [tokenizer.get_vocab().get(token) for token in family.image_token_names]
        if self.image_token_id not in placeholders:
            raise ValueError(
                f"config.json says that token {self.image_token_id} stands for images, and its"
                f" tokenizer has {tokenizer.convert_ids_to_tokens(self.image_token_id)!r} there,"
                f" not {family.image_token_names[0]!r}"
            )
        # By the special flag: `all_special_tokens` leaves out what has no role, such as Gemma's
        # <end_of_turn>.
        special = {
            id: token.content
            for id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        roles = {getattr(tokenizer, f"{role}_token", None) for role in _ROLES}
        roles |= {family.end_of_turn, *family.image_token_names}
        self.tags = [token for token in special.values() if _writes_answers(token, roles)]
        self.control_tokens = [token for token in special.values() if token not in self.tags]
        self._control_ids = {id for id, token in special.items() if token not in self.tags}
        self.notes = (
            [
                f"the tokenizer marks {', '.join(self.tags)} as special tokens; they belong to"
                " answers and stay in their text"
            ]
            if self.tags
            else []
        )
        self.pad_token_id = tokenizer.pad_token_id
        if self.pad_token_id is None:
            # Padding is masked by its place, never by its id, so any token will do.
            eos = tokenizer.eos_token_id
            self.pad_token_id = self.end_of_turn_id if eos is None else eos
            self.notes.append(
                "the tokenizer has no padding token;"
                f" {tokenizer.convert_ids_to_tokens(self.pad_token_id)} fills rows up, where masks"
                " hide it"
            )
        self.chat = ChatTemplate(tokenizer)
        if self.chat.folds_system:
            self.notes.append(
                "the chat template has no system message; the system text stands at the beginning"
                " of the user's message"
            )
        probe = self.chat.prompt(PROBE)
        self._tokenize(probe, 1)  # the template has a place for one image
        if opened := re.search(r"<\w+>(?=\s*$)", probe):
            self.notes.append(
                f"the chat template opens {opened[0]} itself, before the answer: a model that was"
                " not trained here does not write it again, so its answers count as malformed;"
                " take an edition whose template leaves the tag to the model"
            )
        self._said: set[str] = set()  # harmless differences of answers, each said once
        self._prompt_texts: dict[Prompt, str] = {}
        self._pieces: dict[int, str] = {}  # token id -> what it writes

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, min_visual_tokens: int, max_visual_tokens: int
    ) -> Encoder:
        """Load tokenizer and image processor of a checkpoint (a local folder or a hub name).

        min_visual_tokens, max_visual_tokens: bounds on the tokens of one image. Qwen's models
        resize it to lie between them. Gemma 3 ignores them and always has the 256
        (mm_tokens_per_image) of its configuration.

        Raises ValueError and OSError as `read_config` does.
        """
        config = read_config(path)
        family = family_of(config["model_type"])
        parsed = parsed_config(path)
        config = parsed.to_dict()
        tokenizer = load_tokenizer(path)
        image_processor = family.image_processor(
            path,
            config,
            min_visual_tokens=min_visual_tokens,
            max_visual_tokens=max_visual_tokens,
        )
        encoder = cls(family, tokenizer, image_processor, config)
        encoder._check_sizes(parsed)
        if pan_and_scan(path):
            encoder.notes.append(
                "its image processor cuts wide and high images into crops (do_pan_and_scan); here"
                " every image is one, of a fixed number of tokens"
            )
        return encoder

    def _check_sizes(self, parsed: PretrainedConfig) -> None:
        """Try an image, and compare its pixels with what the model takes.

        parsed: the model's configuration.

        Raises ValueError where they do not fit.
        """
        try:
            pixels = self._process(Image.new("RGB", (64, 64), "grey"))
            count = self.family.num_image_tokens(self.config, self.image_processor, pixels)
            patches, values = self.family.patches(parsed)
        except Exception as error:  # of many classes: its settings can be anything
            raise ValueError(
                "its image processor fails on a plain image"
                f" ({type(error).__name__}: {one_line(error)})"
            ) from error
        if not torch.isfinite(pixels["pixel_values"]).all():
            raise ValueError(
                "its image processor makes numbers of an image that are not finite; image_mean or"
                " image_std in its preprocessor_config.json is wrong"
            )
        if count * patches * values != pixels["pixel_values"].numel():
            raise ValueError(
                f"its image processor makes {pixels['pixel_values'].numel()} numbers of an image of"
                f" {count} tokens, and the model takes {count * patches * values}; its"
                " preprocessor_config.json is another model's, or was changed"
            )

    def check_vocabulary(self, rows: int) -> None:
        """Check that the model has an embedding for every token.

        rows: of its embedding. Raises ValueError where the tokenizer has more.
        """
        token, highest = max(self.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if highest >= rows:
            raise ValueError(
                f"its tokenizer has a token {highest} ({token!r}), and config.json says that the"
                f" model has {rows} (vocab_size); the tokenizer is another model's, or tokens were"
                " added to it and not to the model"
            )

    def encode_image(self, example: Example, content: bytes | None = None) -> ImageTensors:
        """Turn the example's image into the pixels that the vision tower takes.

        content: of the image file, where it has been read already.

        Raises DataError for an image that cannot be read.
        """
        return self._process(load_image(example, content))

    def final_image(self, example: Example) -> Image.Image:
        """Open the example's image at the size that the vision tower sees.

        An image processor with the same settings leaves it at that size. Raises DataError as
        `encode_image` does.
        """
        return self.family.resized(self.image_processor, load_image(example))

    def _process(self, image: Image.Image) -> ImageTensors:
        processed = self.image_processor(images=[image], return_tensors="pt")
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
        return EncodedPrompt(input_ids, token_types, vision, example.id)

    def encode_answer(
        self, example: Example, prompt: Prompt, answer: str, vision: ImageTensors | None = None
    ) -> EncodedRow:
        """Encode the example with an answer to learn: only it and its end-of-turn are supervised.

        vision: as in `encode_prompt`.

        Raises DataError for an answer that holds one of the tokenizer's control tokens, that
        changes how the prompt is tokenised, or that the chat template or the tokenizer changes.
        """
        encoded = self.encode_prompt(example, prompt, vision)
        completion = self._completion(example, prompt, answer, encoded.input_ids.tolist())
        supervised = torch.ones(len(completion), dtype=torch.bool)
        return EncodedRow(encoded, torch.tensor(completion), supervised)

    def check_answers(self, examples: Iterable[Example], prompt: Prompt) -> None:
        """Encode every answer without its image, before a run and not after an hour of it.

        Raises DataError naming all examples that `encode_answer` refuses.
        """
        prompt_ids = self._tokenize(self._prompt_text(prompt), 1)
        problems: list[str] = []
        for example in examples:
            try:
                self._completion(example, prompt, example.answer or "", prompt_ids)
            except DataError as error:
                problems += error.problems
        if problems:
            raise DataError(first_problems(problems, "and {} more answers"))

    def _completion(
        self, example: Example, prompt: Prompt, answer: str, prompt_ids: list[int]
    ) -> list[int]:
        """Tokenise an answer and its end of turn, as they follow the prompt.

        prompt_ids: of the prompt with its image places.

        The chat template's own text is taken where it has the answer as it is. Some templates cut,
        change or refuse an answer, for they expect one of an earlier turn. What is sampled comes
        straight after the prompt, so such an answer is put there as the data have it.

        Raises DataError as `encode_answer` does.
        """
        try:
            self._check_text(answer)
            start = self._prompt_text(prompt)
            try:
                written = self.chat.with_answer(prompt, answer)
            except ValueError as error:
                change: str | None = str(error)
            else:
                completion = self._after_prompt(written, prompt_ids)
                learnt = self._decode(completion[:-1])
                change = change_of_answer(answer, learnt)
            if change is not None:
                completion = self._after_prompt(
                    start + answer + self.family.end_of_turn, prompt_ids
                )
                learnt = self._decode(completion[:-1])
                if own_change := change_of_answer(answer, learnt):
                    raise ValueError(f"the tokenizer changes the answer: {own_change}")
                change = (
                    f"the chat template changes answers ({change}); they are learnt as they are"
                )
        except ValueError as error:
            raise DataError([f"example {example.id!r}: {error}"]) from error
        self._say_once(change or same_but_for(answer, learnt), example)
        return completion

    def _check_text(self, answer: str) -> None:
        """Raise ValueError for an answer that no tokens can stand for."""
        control = [token for token in self.control_tokens if token in answer]
        if control:
            raise ValueError(
                f"the answer holds the control token {control[0]!r}; remove it from the text"
            )
        if not _is_text(answer):
            raise ValueError(
                "the answer holds half a character (a lone surrogate), which no tokenizer takes;"
                " remove it from the text"
            )

    def _after_prompt(self, text: str, prompt_ids: list[int]) -> list[int]:
        """Tokenise a chat with an answer -> the tokens after the prompt, up to the end of turn.

        Raises ValueError where it does not begin with the prompt's tokens, or has no end of turn.
        """
        ids = self._tokenize(text, prompt_ids.count(self.image_token_id))
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                "prompt + answer does not begin with the tokens of the prompt, so a loss mask would"
                " be wrong; the answer or the chat template joins its first characters with the"
                " prompt's last"
            )
        completion = ids[len(prompt_ids) :]
        if self.end_of_turn_id not in completion:
            raise ValueError(
                f"the chat template does not end the answer with {self.family.end_of_turn!r}, so"
                " the model would never learn to stop"
            )
        # what the template writes after its end of turn is not the answer
        return completion[: completion.index(self.end_of_turn_id) + 1]

    def _say_once(self, difference: str | None, example: Example) -> None:
        """Warn of a difference between answers and what is learnt, at the first one of its kind."""
        kind = (difference or "").partition("(")[0]
        if difference is not None and kind not in self._said:
            self._said.add(kind)
            logger.warning("%s; the first is that of example %r", difference, example.id)

    def decode(self, ids: Tensor) -> str:
        """Turn the ids of one completion into text, without control tokens.

        Special tokens that answers are written with stay in it (see `tags`).
        """
        kept = [id for id in torch.as_tensor(ids).tolist() if id not in self._control_ids]
        return self._decode(kept)

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
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
        """Render a prompt. Raises UsageError where the checkpoint's template cannot."""
        if prompt not in self._prompt_texts:
            try:
                self._prompt_texts[prompt] = self.chat.prompt(prompt)
            except ValueError as error:
                raise UsageError(f"prompt {prompt.name!r}, with this model: {error}") from error
        return self._prompt_texts[prompt]

    def _tokenize(self, text: str, num_image_tokens: int) -> list[int]:
        """Tokenise a rendered chat, its one image place expanded to `num_image_tokens`."""
        text = self.family.expand_placeholder(text, num_image_tokens, self.tokenizer)
        # the template has already written <bos> where there is one
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if ids.count(self.image_token_id) != num_image_tokens:
            raise UsageError(
                f"the chat template gave {ids.count(self.image_token_id)} image placeholders for"
                f" {num_image_tokens} image tokens"
            )
        return ids


# what a special token can be to a tokenizer
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def _writes_answers(token: str, roles: set[str | None]) -> bool:
    """Tell whether a special token is a part of answers: a tag, a piece of one, or plain words."""
    text = token.strip().casefold()
    if text and any(text in tag or tag in text for tag in TAGS):
        return True
    return token not in roles and _WORDS.fullmatch(token) is not None


def _is_text(answer: str) -> bool:
    try:
        answer.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_config(path: str | Path) -> dict:
    """Read config.json of a checkpoint as written, before any class interprets it.

    path: a local folder or a hub name.

    Raises ValueError for one that is not JSON or of another family, OSError where there is none or
    the hub gives none.
    """
    file = cached_file(str(path), "config.json")
    if file is None:  # the hub's answer for a repository without one
        raise OSError(f"{path} holds no config.json")
    config = read_object(Path(file))
    if not isinstance(config.get("model_type"), (str, type(None))):
        raise ValueError(f"its config.json has the model_type {config['model_type']!r}, no name")
    family_of(config.get("model_type"))
    return config
