"""Look into a base model's folder before anything of it is loaded.

Quantised checkpoints, weights in other formats, missing and damaged shards are answered here, in
one line and without torch. Only names, sizes and the headers of safetensors files are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from engine.config import UsageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files beside the weights that decide what a model is. A tokenizer is in tokenizer.json or in the
# files of a slow one, and special tokens may stand in files of their own.
DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# What quantisers leave beside config.json where they do not write into it.
_QUANTISERS_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTISED_NAME = re.compile(
    r"(?i)[-_.](?:unsloth[-_.])?(bnb|awq|gptq|aqlm|hqq|gguf|exl[23]|eetq|quanto|quantized|nf4|fp[48]"
    r"|[mn][xv]fp4|int[48]|[48][-_]?bits?|w[48]a(?:16|8)|q[2-8](?:_[k01])?)(?=$|[-_.])"
)
_OTHER_FORMATS = {
    "pytorch_model*.bin": "PyTorch's pickle format, which runs code when it is read",
    "*.bin": "a pickle format, which runs code when it is read",
    "*.pt*": "PyTorch's pickle format, which runs code when it is read",
    "*.gguf": "llama.cpp's GGUF, which is quantised",
    "*.h5": "TensorFlow's format",
    "*.msgpack": "Flax's format",
}
# What trainers leave in a model's folder under such names: settings, their own state, an adapter.
_NO_WEIGHTS = re.compile(
    r"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model)[._]"
)
# Element types of quantised weights. Plain checkpoints have floats, old ones position ids in I64.
_QUANTISED_DTYPE = re.compile(r"[UI]8|[UI]4|F[468]_?\w*(?<!F64)|C64")
_PACKED_NAME = re.compile(r"(?:qweight|qzeros|weight_packed|_blocks|quant_state[\w.]*)$")
MAX_HEADER = 25_000_000  # bytes; one of 10,000 tensors has 1,500,000
MAX_OBJECT = 64 * 2**20  # bytes of a JSON file that is read here
_SAMPLES, _SAMPLE_BYTES = 256, 65_536  # of a weights file: 16 MiB, spread over it


# ---- quantised checkpoints -----------------------------------------------------------------------
def quantised_name(name: str) -> str | None:
    """Read from a hub name how a checkpoint is quantised, or None: 'awq' of owner/model-AWQ."""
    found = _QUANTISED_NAME.search(name.rpartition("/")[2])
    return found.group(1).lower() if found else None


def refuse_quantised(name: str, method: str, hub_name: bool = False) -> None:
    """Raise UsageError for a quantised checkpoint, naming the one that it was made from."""
    owner, _, model = name.rpartition("/")
    full = _QUANTISED_NAME.split(model)[0]
    such = f", such as {owner}/{full}" if hub_name and full else ""
    raise UsageError(
        f"--model_name_or_path {name}: a quantised checkpoint ({method}); quantised weights are"
        f" neither trained on nor run here. Give the model in full precision (bf16) that it was"
        f" made from with --model_name_or_path{such}"
    )


def check_not_quantised(name: str, folder: Path, config: dict[str, Any]) -> None:
    """Raise UsageError where config.json or a file beside it says that the weights are quantised.

    config: the content of config.json.
    """
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("quantization_config", "quantization", "compression_config"):
            noted = part.get(key) if isinstance(part, dict) else None
            if noted:
                known = noted if isinstance(noted, dict) else {}
                bits = "4 bits" if known.get("load_in_4bit") else ""
                bits = "8 bits" if known.get("load_in_8bit") else bits
                method = known.get("quant_method") or known.get("quant_algo") or bits
                refuse_quantised(name, str(method or key))
    for file in _QUANTISERS_FILES:
        if (folder / file).is_file():
            refuse_quantised(name, file)


# ---- weights -------------------------------------------------------------------------------------
def check_weights(name: str, folder: Path) -> None:
    """Check that all weights of a folder are there, whole, and of floating-point numbers.

    Raises UsageError naming the file, and what to do.
    """
    try:
        shards = weight_files(folder)
        tensors: dict[str, str] = {}  # name -> file
        for file in shards:
            for tensor, dtype in _header(folder / file).items():
                if _QUANTISED_DTYPE.fullmatch(dtype) or _PACKED_NAME.search(tensor):
                    refuse_quantised(name, f"{tensor} in {file} is {dtype}")
                tensors[tensor] = file
        for tensor, file in _weight_map(folder).items():
            if tensors.get(tensor) != file:
                raise ValueError(f"{INDEX} puts {tensor} into {file}, which does not hold it")
    except UsageError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"--model_name_or_path {name}: {reason}") from error


def holds_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights, in any format."""
    names = [path.name for path in folder.iterdir() if not _NO_WEIGHTS.match(path.name)]
    formats = ("*.safetensors", *_OTHER_FORMATS)
    return any(fnmatch(name, pattern) for name in names for pattern in formats)


def weight_files(folder: Path) -> list[str]:
    """List the weights files of a folder: one, or the shards of its index.

    Raises ValueError where there are none, or one is missing.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    shards = sorted(set(_weight_map(folder).values()))
    for file in shards:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {file!r}, which is no .safetensors file beside it")
    missing = [file for file in shards if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of its {len(shards)} weights files are missing, such as {missing[0]};"
            " download it again, all of it"
        )
    if shards:
        return shards
    names = sorted(path.name for path in folder.iterdir() if not _NO_WEIGHTS.match(path.name))
    for pattern, what in _OTHER_FORMATS.items():
        found = [name for name in names if fnmatch(name, pattern)]
        if found:
            raise ValueError(
                f"its weights are in {found[0]} ({what}), and only .safetensors are read; save"
                " it anew with transformers' save_pretrained, or download the .safetensors files"
            )
    raise ValueError(f"the folder holds no weights ({SINGLE}, or {INDEX} and its shards)")


def _weight_map(folder: Path) -> dict[str, str]:
    """Read which tensor is in which shard, {} for a folder without an index."""
    path = folder / INDEX
    if (folder / SINGLE).is_file() or not path.is_file():
        return {}
    found = read_object(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{INDEX} has no 'weight_map' from tensors to files")
    return found


def _header(path: Path) -> dict[str, str]:
    """Read the header of a safetensors file -> {tensor: its dtype}.

    Raises ValueError for a file that is damaged or not whole.
    """
    damaged = f"{path.name} is damaged or not whole"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{damaged} (its header has {length:,} bytes, the file {size:,})")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            dtypes = {name: str(entry["dtype"]) for name, entry in header.items()}
            end = max([entry["data_offsets"][1] for entry in header.values()], default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as e:
            raise ValueError(f"{damaged} (its header cannot be read: {type(e).__name__})") from e
    if end != size - 8 - length:
        raise ValueError(f"{damaged} (it has {size - 8 - length:,} bytes of weights, not {end:,})")
    return dtypes


# Sizes in config.json and what the largest model of today is far from. Memory is asked for by them.
_LARGEST = {
    "num_hidden_layers": 1_000,
    "depth": 1_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 1_000_000,
    "out_hidden_size": 1_000_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "num_heads": 10_000,
    "head_dim": 100_000,
    "vocab_size": 10_000_000,
    "num_position_embeddings": 10_000_000,
    "image_size": 100_000,
    "patch_size": 1_000,
    "num_channels": 1_000,
    "in_channels": 1_000,
    "in_chans": 1_000,
}
# And of others that end so, which differ by family: patches, windows, what is merged, tokens.
_LARGEST_OF_END = {"_size": 10_000, "_tokens_per_image": 100_000}


def check_sizes(config: dict[str, Any]) -> None:
    """Raise ValueError for a size in config.json that no model has, before memory is asked for."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for name, value in part.items() if isinstance(part, dict) else ():
            ends = (bound for end, bound in _LARGEST_OF_END.items() if name.endswith(end))
            largest = _LARGEST.get(name) or next(ends, None)
            if largest and type(value) in (int, float) and not 1 <= value <= largest:
                shown = f"{value:,}" if abs(value) < 1e30 else "a number without end"
                raise ValueError(
                    f"its config.json says {name} {shown}, expected a number from 1 to {largest:,}"
                )


def check_enough_weights(folder: Path, text: Any) -> None:
    """Raise ValueError where config.json makes a model that is larger than its weights files.

    text: the text_config, as its class reads it. Only the embedding and the feed-forward layers are
    counted, which every family has.
    """
    needed = text.vocab_size * text.hidden_size
    needed += 3 * text.num_hidden_layers * text.hidden_size * text.intermediate_size
    held = sum((folder / file).stat().st_size for file in weight_files(folder))
    if needed > held:  # a number has a byte at least
        raise ValueError(
            f"its config.json makes a model of at least {needed:,} numbers, and its weights files"
            f" have {held:,} bytes; they belong to different models"
        )


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ValueError naming one that does not."""
    if path.stat().st_size > MAX_OBJECT:
        raise ValueError(f"its {path.name} has {path.stat().st_size:,} bytes")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error) or "nested too deep"
        raise ValueError(f"its {path.name} is not valid JSON ({reason})") from error
    if not isinstance(found, dict):
        raise ValueError(f"its {path.name} holds a {type(found).__name__}, not an object")
    return found


# ---- what a run was made from --------------------------------------------------------------------
def base_hashes(folder: Path, how: Literal["sample", "full"]) -> dict[str, Any]:
    """Hash a base model's files, so that a changed one is noticed -> {"hash": how, "files": {...}}.

    how: of weights files "sample" hashes the size, the header, and 16 MiB of the content in 256
    places, which is all of a small file. "full" hashes everything. Files that describe the model
    are always hashed whole.
    """
    files = {}
    for file in (*weight_files(folder), *DESCRIPTIONS):
        path = folder / file
        if path.is_file():
            whole = how == "full" or file in DESCRIPTIONS
            files[file] = {"bytes": path.stat().st_size, "sha256": _hash(path, whole)}
    return {"hash": how, "files": files}


def _hash(path: Path, whole: bool) -> str:
    if whole:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    size = path.stat().st_size
    total = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        total.update(file.read(min(length, MAX_HEADER)))
        begin = file.tell()
        step = max(_SAMPLE_BYTES, (size - begin) // _SAMPLES)
        for place in range(begin, size, step):
            file.seek(place)
            total.update(file.read(_SAMPLE_BYTES))
        file.seek(max(begin, size - _SAMPLE_BYTES))
        total.update(file.read())
    return total.hexdigest()
