"""Load a checkpoint's tokenizer with its chat template, and its image processor, however kept.

Checkpoints of every age have to work: templates stand in chat_template.jinja, chat_template.json or
tokenizer_config.json, tokenizers in tokenizer.json or in the files of slow ones, and the names of
image processors have changed. No code of a checkpoint is run, and none is asked about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from engine.model_checks import read_object

_LARGEST_SIZE, _LARGEST_SIDE = 1_000, 8_192  # of patches and what is merged, and of an image
_REMEDY = "Put the tokenizer.json of the model that it was made from beside them"


def parsed_config(path: str | Path) -> PretrainedConfig:
    """Read config.json by its class, which checks its values and fills in what it leaves out.

    Raises ValueError for one that its class refuses, OSError where the hub gives none.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # of many classes: its values can be anything
        raise ValueError(f"its config.json cannot be used ({one_line(error)})") from error


def pan_and_scan(path: str | Path) -> bool:
    """Tell whether a checkpoint's image processor is set to cut images into crops."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = _has(path, name)
        record = {} if file is None else read_object(Path(file))
        inner = record.get("image_processor")
        if (inner if isinstance(inner, dict) else record).get("do_pan_and_scan"):
            return True
    return False


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer (local folder or hub name), with the chat template that goes with it.

    Raises ValueError where it cannot be loaded, OSError where the hub gives none.
    """
    _check_file_sizes(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # of many classes: whatever a damaged file makes transformers do
        raise ValueError(_unusable_tokenizer(path, error)) from error
    except BaseException as error:  # a panic of the tokenizers library
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(_unusable_tokenizer(path, error)) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"its tokenizer is a {type(tokenizer).__name__}, which writes no text")
    if _has(path, "tokenizer.json") is None and not _numbers_special_tokens(path):
        raise ValueError(
            "it has no tokenizer.json, and nothing beside it says which numbers its special tokens"
            " have (added_tokens_decoder in tokenizer_config.json), so they would get wrong ones."
            f" {_REMEDY}"
        )
    template = _own_template(path)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


# Files that libraries read whole, with the bytes that the largest of today are far from.
_LARGEST = {
    "tokenizer.json": 200_000_000,
    "vocab.json": 200_000_000,
    "merges.txt": 200_000_000,
    "tokenizer.model": 200_000_000,
    "added_tokens.json": 20_000_000,
    "special_tokens_map.json": 20_000_000,
    "tokenizer_config.json": 20_000_000,
    "preprocessor_config.json": 1_000_000,
    "processor_config.json": 1_000_000,
    "video_preprocessor_config.json": 1_000_000,
    "generation_config.json": 1_000_000,
    "chat_template.jinja": 1_000_000,
    "chat_template.json": 1_000_000,
}


def _check_file_sizes(path: str | Path) -> None:
    for name, largest in _LARGEST.items():
        file = _has(path, name) if Path(path).is_dir() else None
        if file is not None and Path(file).stat().st_size > largest:
            raise ValueError(
                f"its {name} has {Path(file).stat().st_size:,} bytes, at most {largest:,} are read"
            )


def _unusable_tokenizer(path: str | Path, error: BaseException) -> str:
    if _has(path, "tokenizer.json") is None:
        return (
            "it has no tokenizer.json, and its other tokenizer files cannot be converted here"
            f" ({one_line(error, 120)}). {_REMEDY}"
        )
    return f"its tokenizer cannot be loaded ({type(error).__name__}: {one_line(error)})"


def _has(path: str | Path, name: str) -> str | None:
    """Find a file of a checkpoint, None where it has none of that name."""
    return cached_file(str(path), name, _raise_exceptions_for_missing_entries=False)


def _numbers_special_tokens(path: str | Path) -> bool:
    """Tell whether the files of a slow tokenizer say which numbers its special tokens have."""
    if _has(path, "added_tokens.json") or _has(path, "tokenizer.model"):
        return True
    config = _has(path, "tokenizer_config.json")
    return config is not None and bool(read_object(Path(config)).get("added_tokens_decoder"))


def _own_template(path: str | Path) -> Any:
    """Read chat_template.json, where processors of transformers 4.45 to 4.51 put the template.

    None where there is none, or a chat_template.jinja, which the tokenizer has read.
    """
    file = _has(path, "chat_template.json")
    if file is None or _has(path, "chat_template.jinja") is not None:
        return None
    template = read_object(Path(file)).get("chat_template")
    if isinstance(template, list):  # named ones, in the older form
        try:
            template = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError):
            template = None
    if not template or not isinstance(template, (str, dict)):
        raise ValueError("its chat_template.json holds no 'chat_template'")
    return template


def load_image_processor(kind: type, path: str | Path, **options: Any) -> Any:
    """Load an image processor of the class that the family uses, whatever name the file has.

    kind: the class, the one of Pillow. path: local folder or hub name. options: values that win
    over those of the file.

    Raises ValueError where it cannot be loaded, OSError where the hub gives none.
    """
    loader: Any = kind
    try:
        return _of_possible_sizes(loader.from_pretrained(path, **options))
    except OSError as error:
        if not Path(path).is_dir():
            raise
        raise ValueError(
            "it has no preprocessor_config.json that can be read; put the one of the model that it"
            f" was made from beside its config.json ({one_line(error, 80)})"
        ) from error
    except Exception as error:  # of many classes: whatever a damaged file makes transformers do
        raise ValueError(
            f"its image processor cannot be loaded ({type(error).__name__}: {one_line(error)})"
        ) from error


def _of_possible_sizes(image_processor: Any) -> Any:
    """Return an image processor that makes images of a possible size. Raises ValueError else."""
    sizes: dict[str, Any] = {
        name: value for name, value in vars(image_processor).items() if name.endswith("_size")
    }
    largest = dict.fromkeys(sizes, _LARGEST_SIZE)
    for name in ("size", "crop_size"):
        for side in ("height", "width"):
            value = getattr(getattr(image_processor, name, None), side, None)
            sizes[f"{name}[{side}]"], largest[f"{name}[{side}]"] = value, _LARGEST_SIDE
    for name, value in sizes.items():
        if type(value) in (int, float) and not 1 <= value <= largest[name]:
            raise ValueError(f"{name} is {value:,}, expected 1 to {largest[name]:,}")
    return image_processor


def one_line(error: BaseException, length: int = 200) -> str:
    """Write an error's message in one line of at most `length` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]}..."
