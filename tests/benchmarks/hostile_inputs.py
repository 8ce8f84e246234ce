"""Give the commands files that were made to harm whoever opens them, and see that none does.

    python tests/benchmarks/hostile_inputs.py [--kinds images] [--list]

Each case is a folder with one hostile file: code that a library could be asked to run, pickles,
templates without an end, sizes that ask for terabytes, names and links that lead out of the folder,
names that control a terminal. The command that reads it runs in a child with a time limit and a
limit of memory. It has to work, or to end with lines and an exit code. A table is printed: kind x
(one line, worked, traceback, hang, files touched outside, code run) with the slowest case. The exit
code is 1 where one of the last four is not 0. `damaged_files.py` does so for random damage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import pickle
import resource
import shutil
import struct
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401  this checkout before an installed one
import torch
from damaged_files import Originals, open_data, open_encoder, open_model

import data.check
import data.table
import eval.evaluate
import eval.figures
import eval.report
import run_grpo
import run_sft
from data.examples import read_jsonl
from data.files import DataError, KeptFile
from data.images import load_image
from data.label_sets import labels_named
from data.predictions import read_predictions
from data.prompt_files import prompt_of, prompt_problems
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.model import attach_adapter, check_adapter
from engine.resume import bring_logs, find_checkpoint
from engine.run import TrainerState, opened_run
from tests.faults.children import Ended, forked
from tests.helpers.records import CONFIG, STATE
from tests.helpers.tiny import load

SECONDS, MORE_MEMORY = 30, 2**30  # of one case; bytes beyond what this process has
COLUMNS = ("one line", "worked", "traceback", "hang", "touched outside", "code run")
FAMILY = "gemma3"

Reader = Callable[[Path], object]
Make = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """Describe a hostile input.

    original: the folder that it is a copy of. make: puts the hostile file into the copy. reader:
    opens the copy, as a command does.
    """

    kind: str
    name: str
    original: str
    make: Make
    reader: Reader


# ---- what code would leave -----------------------------------------------------------------------
class Marker:
    """Make code and pickles that write a file when they are run."""

    def __init__(self, path: Path):
        self.path = path
        self.code = f"open({str(path)!r}, 'w').write('run')\n"
        self.pickle = pickle.dumps(self)

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def code_files(marker: Marker) -> Make:
    """Put a module beside a checkpoint that writes the marker where it is imported."""

    def make(folder: Path) -> None:
        (folder / "evil.py").write_text(f"{marker.code}class Evil:\n    pass\n")
        (folder / "__init__.py").write_text(marker.code)

    return make


# ---- files ---------------------------------------------------------------------------------------
def edited(file: str, **values: Any) -> Make:
    """Set values of a JSON file, `a__b` for b of the object a."""

    def make(folder: Path) -> None:
        record = json.loads((folder / file).read_text())
        for name, value in values.items():
            *way, last = name.split("__")
            holder = record
            for part in way:
                holder = holder.setdefault(part, {})
            holder[last] = value
        (folder / file).write_text(json.dumps(record))

    return make


def written(file: str, content: str | bytes) -> Make:
    def make(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def sparse(file: str, size: int) -> Make:
    """Make a file of so many zero bytes, which take no room."""

    def make(folder: Path) -> None:
        with (folder / file).open("wb") as out:
            out.truncate(size)

    return make


def replaced(file: str, by: str) -> Make:
    """Put a pipe, a device, or a link to somewhere in the place of a file."""

    def make(folder: Path) -> None:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if by == "pipe":
            os.mkfifo(path)
        elif by == "folder":
            path.mkdir()
        elif by == "hard link":
            os.link(folder.parent / "canary" / "id_rsa", path)
        else:
            path.symlink_to(by.replace("CANARY", str(folder.parent / "canary")))

    return make


def both(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for one in makes:
            one(folder)

    return make


def header(record: Any, body: bytes = b"") -> bytes:
    """Write a safetensors file by hand."""
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    return struct.pack("<Q", len(text)) + text + body


def png(width: int, height: int) -> bytes:
    """Write a PNG of one grey, which its size alone makes large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    row = b"\0" * (width + 1)
    rows = zlib.compress(row * min(height, 20_000_000 // len(row) + 1), 9)
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + end


SAFETENSORS: dict[str, bytes] = {
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 200 MB": struct.pack("<Q", 200_000_000) + b" " * 1000,
    "a terabyte": header({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}),
    "shape without end": header(
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "negative shape": header(
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "overlap": header(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        b"\0" * 12,
    ),
    "hole": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}, b"\0" * 12),
    "offsets turned round": header(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4
    ),
    "unknown dtype": header(
        {"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
    "deep header": header(b'{"a":' + b"[" * 100_000),
    "header is a list": header([1]),
    "metadata is a number": header({"__metadata__": 1}),
    "metadata names code": header({"__metadata__": {"format": "pickle", "auto_map": "evil.Evil"}}),
    "a million tensors": header(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**6)}
    ),
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "gzip": b"\x1f\x8b" + b"\0" * 100,
    "empty": b"",
    "one byte": b"x",
    "zeros": b"\0" * 4096,
}
DEEP = "[" * 200_000
NAMES = {
    "clear screen": "\x1b[2J\x1b]0;title\x07",
    "newline": "a\nerror: all your files are gone",
    "carriage return": "abc\rxyz",
    "turned round": "\u202eabc\u2066",
    "C1": "\x9b2J",
    "1 MB": "x" * 1_000_000,
    "NUL": "a\0b",
    "half a pair": "\ud800",
    "up": "../../canary/new",
    "absolute": "/tmp/x",
    "markup": "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>",
    "format": "{0.__class__} %s %n ${jndi:x} $(touch x) `touch x`",
    "mathtext": "$\\frac{1}{0}$ $$$",
    "many marks": "a" + "\u0301" * 10_000,
}


# ---- checkpoints of models -----------------------------------------------------------------------
SIZES = [0, -1, 10**9, 10**12, 10**400, 1e308, "16", None, [], {}, True]


def of_config(marker: Marker) -> Iterator[tuple[str, Make]]:
    names = ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size"]
    names += ["num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"]
    for name in names:
        for value in SIZES if name in names[:3] else SIZES[:5]:
            yield (
                f"{name} {str(value)[:12]}",
                edited("config.json", **{f"text_config__{name}": value}),
            )
    for name in ("num_hidden_layers", "hidden_size", "image_size", "patch_size", "num_channels"):
        for value in SIZES[:5]:
            make = edited("config.json", **{f"vision_config__{name}": value})
            yield f"vision {name} {str(value)[:12]}", make
    for value in (10**9, 0, "a"):
        yield f"mm tokens {value}", edited("config.json", mm_tokens_per_image=value)
    yield "deep", written("config.json", DEEP)
    yield "1 GB", sparse("config.json", 2**30)
    yield "pipe", replaced("config.json", "pipe")
    yield "device", replaced("config.json", "/dev/zero")
    yield "layer types", edited("config.json", text_config__layer_types=["x" * 1000] * 100_000)


def of_code(marker: Marker) -> Iterator[tuple[str, Make]]:
    beside = code_files(marker)
    maps: list[Any] = [
        {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForImageTextToText")},
        {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        {"AutoImageProcessor": "evil.Evil", "AutoProcessor": "evil.Evil"},
        {"AutoConfig": "other/repo--evil.Evil"},
        {"AutoConfig": "../evil.Evil"},
        {"AutoConfig": 3},
        "evil.Evil",
    ]
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        for number, value in enumerate(maps):
            yield f"{file} auto_map {number}", both(beside, edited(file, auto_map=value))
    yield (
        "tokenizer class",
        both(beside, edited("tokenizer_config.json", tokenizer_class="evil.Evil")),
    )
    yield "model type", both(beside, edited("config.json", model_type="evil"))
    kinds = edited("preprocessor_config.json", image_processor_type="evil.Evil")
    yield "image processor type", both(beside, kinds)
    record = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil"}}
    yield (
        "processor_config.json",
        both(beside, written("processor_config.json", json.dumps(record))),
    )
    generation = {"custom_generate": "evil", "auto_map": {"x": "evil.Evil"}}
    yield (
        "generation_config.json",
        both(beside, written("generation_config.json", json.dumps(generation))),
    )
    (folder_code,) = [f"{marker.code}def generate(*a, **k):\n    pass\n"]
    yield "custom_generate", written("custom_generate/generate.py", folder_code)
    yield "modeling file", written("modeling_gemma3.py", marker.code)
    yield "sitecustomize", written("sitecustomize.py", marker.code)
    yield "kernels", edited("config.json", _attn_implementation="kernels-community/evil")
    yield "quantizer", edited("config.json", quantization_config={"quant_method": "evil"})


def of_pickles(marker: Marker) -> Iterator[tuple[str, Make]]:
    for file in ("pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin"):
        yield f"{file} beside", written(file, marker.pickle)
    gone = lambda folder: (folder / "model.safetensors").unlink()  # noqa: E731
    for file in (
        "pytorch_model.bin",
        "model.bin",
        "model.pth",
        "tf_model.h5",
        "flax_model.msgpack",
    ):
        yield f"{file} alone", both(gone, written(file, marker.pickle))
    index = json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model-1.bin"}})
    pair = (
        written("pytorch_model.bin.index.json", index),
        written("pytorch_model-1.bin", marker.pickle),
    )
    yield "index of pickles", both(gone, *pair)
    for named in ("../canary/id_rsa", "/etc/passwd", "pytorch_model-1.bin", "x\0.safetensors", ""):
        content = json.dumps({"weight_map": {"a": named}})
        yield (
            f"index to {named!r}",
            both(gone, pair[1], written("model.safetensors.index.json", content)),
        )
    yield "pickle as safetensors", written("model.safetensors", marker.pickle)
    yield "npy", written("model.npy", b"\x93NUMPY\x01\x00" + marker.pickle)
    for name, content in SAFETENSORS.items():
        yield name, written("model.safetensors", content)


def of_tokenizer(marker: Marker) -> Iterator[tuple[str, Make]]:
    yield "1 GB", sparse("tokenizer.json", 2**30)
    yield "deep", written("tokenizer.json", DEEP)
    yield "pipe", replaced("tokenizer.json", "pipe")
    yield "config deep", written("tokenizer_config.json", DEEP)
    yield "config of 1 GB", sparse("tokenizer_config.json", 2**30)
    yield "added tokens", written("added_tokens.json", json.dumps({"x": 10**9}))
    for value in (10**12, -1, 10**400, "x", None):
        yield f"length {str(value)[:9]}", edited("tokenizer_config.json", model_max_length=value)
        yield (
            f"id {str(value)[:9]}",
            edited("tokenizer_config.json", added_tokens_decoder={str(value): {"content": "x"}}),
        )
    for name, text in NAMES.items():
        yield f"pad token {name}", edited("tokenizer_config.json", pad_token=text)
        yield f"class {name}", edited("tokenizer_config.json", tokenizer_class=text)
    yield (
        "pattern",
        edited(
            "tokenizer.json",
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(a+)+$"},
                "behavior": "Isolated",
                "invert": False,
            },
        ),
    )


def of_processor(marker: Marker) -> Iterator[tuple[str, Make]]:
    file = "preprocessor_config.json"
    for value in (0, -1, 10**9, 10**400, 1e308, "x"):
        for name in ("size__height", "size__width", "patch_size", "merge_size", "crop_size"):
            yield f"{name} {str(value)[:9]}", edited(file, **{name: value})
    for name, value in {
        "mean": {"image_mean": [float("nan")] * 3},
        "std": {"image_std": [0, 0, 0]},
        "rescale": {"rescale_factor": 1e308},
        "resample": {"resample": 10**9},
        "type": {"image_processor_type": "X" * 10**6},
    }.items():
        yield name, edited(file, **value)
    yield "deep", written(file, DEEP)
    yield "1 GB", sparse(file, 2**30)
    yield "pipe", replaced(file, "pipe")


TEMPLATES = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range 10^12": "{% for i in range(10**12) %}x{% endfor %}",
    "long text": "{{ 'x' * 10**10 }}",
    "padded": "{{ 'x'.rjust(10**10) }}",
    "format width": "{{ '%10000000000d' % 1 }}",
    "power": "{{ 9**9**9 }}",
    "5 MB": "{{ 'x' * 5000000 }}",
    "doubling": "{% set ns = namespace(x='xx') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "list": "{% set x = [0] * 10**10 %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends '../canary/id_rsa' %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch MARKER').read() }}",
    "self": "{{ self._TemplateReference__context }}",
    "attribute filter": "{{ ()|attr('__class__')|attr('__base__') }}",
    "format escape": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "tojson": "{{ messages|tojson|attr('__init__') }}",
    "raise": "{{ raise_exception('\x1b[2J') }}",
    "division": "{{ 1/0 }}",
    "syntax": "{% for",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "empty": "",
    "changes messages": "{{ messages.clear() }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "regex": "{{ messages|map('regex_search', '(a+)+$') }}",
    "date": "{{ strftime_now('%Y' * 10**7) }}",
}


def of_templates(marker: Marker) -> Iterator[tuple[str, Make]]:
    for name, text in TEMPLATES.items():
        text = text.replace("MARKER", str(marker.path))
        yield name, written("chat_template.jinja", text)
    yield "2 MB", written("chat_template.jinja", "{# x #}" * 300_000)
    yield "1 GB", sparse("chat_template.jinja", 2**30)
    yield "additional", written("additional_chat_templates/default.jinja", TEMPLATES["loop"])
    gone = lambda folder: (folder / "chat_template.jinja").unlink(missing_ok=True)  # noqa: E731
    for name in ("loop", "lipsum", "long text"):
        content = json.dumps({"chat_template": TEMPLATES[name]})
        yield f"json {name}", both(gone, written("chat_template.json", content))
    yield "json of lists", both(gone, written("chat_template.json", '{"chat_template": [[]]}'))


def of_generation(marker: Marker) -> Iterator[tuple[str, Make]]:
    for name, value in {
        "eos": -1,
        "eos list": list(range(1000)),
        "eos text": "x",
        "eos huge": 10**400,
        "length": 10**12,
        "beams": 10**9,
    }.items():
        key = {"length": "max_length", "beams": "num_beams"}.get(name, "eos_token_id")
        yield name, written("generation_config.json", json.dumps({key: value}))
    yield "deep", written("generation_config.json", DEEP)
    yield "1 GB", sparse("generation_config.json", 2**30)
    yield "pipe", replaced("generation_config.json", "pipe")
    yield "list", written("generation_config.json", "[1]")


# ---- adapters ------------------------------------------------------------------------------------
def of_adapter_config(marker: Marker) -> Iterator[tuple[str, Make]]:
    values: dict[str, list[Any]] = {
        "r": [0, -1, 10**7, 10**400, "16", 1.5, True, None, [8]],
        "lora_alpha": [0, -1, 1e300, 10**400, "16", float("nan")],
        "lora_dropout": [-1, 2, "x"],
        "peft_type": ["IA3", "EVIL", 3, None, [], "lora"],
        "megatron_core": ["evil", "os"],
        "auto_mapping": [{"base_model_class": "Evil", "parent_library": "evil"}],
        "init_lora_weights": ["eva", "pissa", "corda", "loftq", "evil"],
        "target_modules": [[], "(a+)+$", "(", [1], {}, "x" * 10**6, None],
        "rank_pattern": [{"x": 10**7}, {"(": 1}, [1], {"(a+)+$": 8}],
        "modules_to_save": ["evil", ["evil"], [1], {"a": 1}],
        "bias": ["evil", 1],
        "layers_to_transform": [[10**12], "x", -1],
        "layer_replication": [[[0, 10**6]]],
        "trainable_token_indices": [[10**12], {"x": [-1]}],
        "task_type": ["EVIL", 1],
        "runtime_config": [{"x": 1}],
        "eva_config": [{"rho": 1}],
        "trust_remote_code": [True],
    }
    file = "adapter_config.json"
    beside = code_files(marker)
    for name, some in values.items():
        for value in some:
            yield f"{name} {str(value)[:20]}", both(beside, edited(file, **{name: value}))
    yield "deep", written(file, DEEP)
    yield "1 GB", sparse(file, 2**30)
    yield "pipe", replaced(file, "pipe")
    yield "list", written(file, "[]")


def of_base_names(marker: Marker) -> Iterator[tuple[str, Make]]:
    named: dict[str, Any] = NAMES | {
        "number": 3,
        "null": None,
        "list": ["x"],
        "passwd": "/etc/passwd",
        "device": "/dev/zero",
        "home": "~/x",
        "url": "https://example.org/x",
        "hub": "evil/model",
        "root": "/",
        "here": ".",
    }
    for name, value in named.items():
        yield name, edited("adapter_config.json", base_model_name_or_path=value)


def of_adapter_weights(marker: Marker) -> Iterator[tuple[str, Make]]:
    file = "adapter_model.safetensors"
    for name, content in SAFETENSORS.items():
        yield name, written(file, content)
    yield "pickle", written(file, marker.pickle)
    gone = lambda folder: (folder / file).unlink()  # noqa: E731
    yield "pickle alone", both(gone, written("adapter_model.bin", marker.pickle))
    yield "pipe", replaced(file, "pipe")
    yield "device", replaced(file, "/dev/zero")
    yield "dangling", replaced(file, "CANARY/new")


# ---- checkpoints of runs -------------------------------------------------------------------------
def make_run(folder: Path, **records: Any) -> None:
    """Write a run folder with two sound checkpoints, whose records are CONFIG and STATE."""
    for step in (2, 4):
        state = STATE | {"global_step": step} | records.get("state", {})
        config = CONFIG | records.get("config", {})
        save_checkpoint(
            folder,
            step,
            tensors={"rng": {"torch": torch.zeros(4)}},
            records={"config.json": config, "trainer_state.json": state},
        )
    (folder / "metrics.jsonl").write_text('{"step": 2}\n')
    os.symlink("checkpoint-4", folder / "last")


def open_run(folder: Path) -> None:
    """Go on in a run's folder, and then in a new one beside it."""
    checkpoint, _ = find_checkpoint(str(folder))
    with opened_run("grpo", None, checkpoint, dict(CONFIG), {}, TrainerState(**STATE)) as run:
        run.log.scalars(5, {"loss": 1.0})
    elsewhere = folder.with_name("elsewhere")
    elsewhere.mkdir(exist_ok=True)
    bring_logs(checkpoint, elsewhere, "checkpoint-2")
    shutil.rmtree(elsewhere)


def of_run_records(marker: Marker) -> Iterator[tuple[str, Make]]:
    values: list[Any] = [
        "../../canary",
        "/etc",
        3,
        None,
        [],
        {},
        -1,
        10**400,
        "\x1b[2J",
        "a\0b",
        "",
    ]
    for part, names in (
        ("state", ("best_model_checkpoint", "global_step", "log_history", "unlogged_metrics")),
        ("config", ("script", "settings", "data", "bad_images", "reference", "base", "recipe")),
    ):
        for name in names:
            for value in values:

                def make(
                    folder: Path, part: str = part, name: str = name, value: Any = value
                ) -> None:
                    shutil.rmtree(folder)
                    folder.mkdir()
                    make_run(folder, **{part: {name: value}})

                yield f"{name} {str(value)[:14]!a}", make


def of_manifests(marker: Marker) -> Iterator[tuple[str, Make]]:
    file = "checkpoint-4/manifest.json"
    for name in [*NAMES.values(), "../manifest.json", "/etc/passwd", ".", "a/b.json", "x.pt"]:
        entry = {"size": 3, "sha256": "0" * 64}
        yield f"names {name[:12]!a}", edited(file, files={name: entry})
    for size in (-1, 10**18, 10**400, "3", None, 1.5, True):
        yield (
            f"size {str(size)[:12]}",
            edited(file, files={"rng.json": {"size": size, "sha256": "0"}}),
        )
    for value in (None, [], "x", {"a": 1}, {"a": None}):
        yield f"files {value}", edited(file, files=value)
    for step in (5, -4, "4", None, 4.0, True, 10**400):
        yield f"step {str(step)[:9]}", edited(file, step=step)
    yield "deep", written(file, DEEP)
    yield "1 GB", sparse(file, 2**30)
    yield "pipe", replaced(file, "pipe")


def of_run_tensors(marker: Marker) -> Iterator[tuple[str, Make]]:
    def with_manifest(content: bytes, file: str = "rng.safetensors") -> Make:
        def make(folder: Path) -> None:
            place = folder / "checkpoint-4"
            (place / file).write_bytes(content)
            manifest = json.loads((place / "manifest.json").read_text())
            entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            manifest["files"][file] = entry
            (place / "manifest.json").write_text(json.dumps(manifest))

        return make

    for name, content in (SAFETENSORS | {"pickle": marker.pickle}).items():
        yield name, with_manifest(content)
    for name in ("trainer_state.json", "config.json"):
        for content in (marker.pickle, DEEP.encode(), b"", b"null", b"\xff", b"1" * 5000):
            yield f"{name} {content[:8]!r}", with_manifest(content, name)


def of_run_links(marker: Marker) -> Iterator[tuple[str, Make]]:
    names = [
        ".lock", "metrics.jsonl", "completions.jsonl", "warnings.jsonl", "config.json", "charts",
        "charts/a", "reference", "start/scores-a.json", "checkpoint-9", "checkpoint-4/rng.json",
        "README.md", "events.out.tfevents.1", "best", "last", "adapter_model.safetensors",
    ]  # fmt: skip
    for name in names:
        for target in ("CANARY/id_rsa", "CANARY", "CANARY/new", "/dev/zero", "pipe"):
            yield f"{name} -> {target}", replaced(name, target)
    for name in (".lock", "metrics.jsonl", "README.md", "config.json"):
        yield f"{name} hard link", replaced(name, "hard link")


def open_tensors(folder: Path) -> None:
    checkpoint = load_checkpoint(folder / "checkpoint-4")
    checkpoint.tensors("rng")
    open_run(folder)


# ---- evaluations ---------------------------------------------------------------------------------
def open_report(folder: Path) -> int:
    out = str(folder.with_name("report"))
    code = eval.report.main([str(folder), "--output_dir", out, "--permutations", "20"])
    shutil.rmtree(out, ignore_errors=True)
    return code


def open_figures(folder: Path) -> int:
    out = str(folder.with_name("figures"))
    code = eval.figures.main([str(folder), "--output_dir", out])
    shutil.rmtree(out, ignore_errors=True)
    return code


def of_records(marker: Marker) -> Iterator[tuple[str, Make]]:
    values: list[Any] = [3, None, "x", [[1]], {"a": {"b": 1}}]
    for name in (
        "run", "per_label", "micro", "macro", "n", "step", "baselines", "intervals", "stage",
        "fail_rate", "label_set", "silenced_labels", "probabilities", "groups", "samples",
    ):  # fmt: skip
        for value in values:
            yield f"{name} {str(value)[:9]}", edited("scores-site.json", **{name: value})
    for name in ("settings", "data", "script", "adapter_sha256"):
        for value in values:
            yield (
                f"run {name} {str(value)[:9]}",
                edited("scores-site.json", **{f"run__{name}": value}),
            )
    for text in NAMES.values():
        settings = {"adapter_name_or_path": {"value": text}, "prompt": {"value": text}}
        yield f"adapter {text[:9]!a}", edited("scores-site.json", run__settings=settings)
    yield "deep", written("scores-site.json", DEEP)
    yield "1 GB", sparse("scores-site.json", 2**30)
    for name in ("scores-site.json", "predictions-site.jsonl", "config.json", "trainer_state.json"):
        for target in ("CANARY/id_rsa", "/dev/zero", "pipe", "CANARY/new"):
            yield f"{name} -> {target}", replaced(name, target)
    for best in ("../../canary", 3, "checkpoint-x", [], "checkpoint-1\n"):
        content = json.dumps({"best_model_checkpoint": best})
        config = written("config.json", json.dumps({"script": "grpo", "settings": {}}))
        yield f"best {best!a}", both(config, written("trainer_state.json", content))


def of_logs(marker: Marker) -> Iterator[tuple[str, Make]]:
    begin = '{"step": 1, "loss": 1.0, "split": "train"}\n'
    for name, text in {
        "long line": begin + "x" * 20_000_000,
        "deep": begin + DEEP,
        "huge step": begin + json.dumps({"step": 10**400, "loss": 1}),
        "huge value": begin + json.dumps({"step": 2, "split": "train", "loss": 10**400}),
        "text value": begin + json.dumps({"step": 2, "split": "train", "loss": "x"}),
        "bytes": begin + "\0\0\0",
        "names": begin + json.dumps({"step": 2, "split": "eval", "dataset": "\x1b[2J$\\frac{"}),
        "list split": begin + json.dumps({"step": 2, "split": ["x"], "macro_f1": 0.5}),
        "negative step": begin + json.dumps({"step": -(10**9), "split": "train", "loss": 1.0}),
        "empty": "",
    }.items():
        yield name, written("metrics.jsonl", text)
    yield "pipe", replaced("metrics.jsonl", "pipe")
    yield "link", replaced("metrics.jsonl", "CANARY/id_rsa")
    yield "device", replaced("metrics.jsonl", "/dev/zero")


# ---- data ----------------------------------------------------------------------------------------
def row_edited(file: str, **values: Any) -> Make:
    def make(folder: Path) -> None:
        rows = (folder / file).read_text().splitlines()
        rows[0] = json.dumps(json.loads(rows[0]) | values)
        (folder / file).write_text("\n".join(rows))

    return make


def of_rows(marker: Marker) -> Iterator[tuple[str, Make]]:
    for field in ("id", "patient_id", "dataset", "image", "answer", "sex", "labels"):
        for name, text in NAMES.items():
            yield f"{field} {name}", row_edited("data.jsonl", **{field: text})
    yield "labels", row_edited("data.jsonl", labels=[text for text in NAMES.values()])
    yield "10 GB line", sparse("data.jsonl", 10 * 2**30)
    yield "long line", written("data.jsonl", '{"id": "' + "x" * 30_000_000 + '"}')
    yield "deep", written("data.jsonl", DEEP)
    yield "digits", written("data.jsonl", "1" * 100_000)
    yield "pipe", replaced("data.jsonl", "pipe")
    yield "device", replaced("data.jsonl", "/dev/zero")
    yield "pickle", written("data.jsonl", marker.pickle)


def of_answers(marker: Marker) -> Iterator[tuple[str, Make]]:
    for field in ("id", "dataset", "completion", "prompt", "problem", "predicted", "label_set"):
        for name, text in NAMES.items():
            yield f"{field} {name}", row_edited("answers.jsonl", **{field: text})
    yield "10 GB line", sparse("answers.jsonl", 10 * 2**30)
    yield "deep", written("answers.jsonl", DEEP)
    yield "label set", row_edited("answers.jsonl", label_set=["x" * 1000] * 10_000)


def open_images(folder: Path) -> None:
    for example in read_jsonl(folder / "data.jsonl")[:1]:
        load_image(example)
    data.check.main([str(folder / "data.jsonl")])


def of_images(marker: Marker) -> Iterator[tuple[str, Make]]:
    contents: dict[str, bytes] = {
        "bomb": png(30_000, 30_000),
        "wide bomb": png(1_000_000, 100),
        "tall": png(1, 1_000_000),
        "2^31": png(2**31 - 1, 1),
        "pickle": marker.pickle,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
        "html": b"<html><script>1</script></html>",
        "pdf": b"%PDF-1.4\n",
        "gif": b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
        "tiff": b"II*\x00\x08\x00\x00\x00",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n(x) print",
        "bmp": b"BM" + b"\xff" * 60,
        "webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "jpeg 65535": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01"
        b"\x03\x11\x01",
        "jpeg empty": b"\xff\xd8\xff\xd9",
        "png text bomb": png(8, 8)[:33]
        + struct.pack(">I", 20)
        + b"zTXta\0\0"
        + zlib.compress(b"x" * 10**8, 9)[:13],
        "empty": b"",
        "zeros": b"\0" * 10**6,
    }
    for name, content in contents.items():
        yield (
            name,
            both(written("hostile.png", content), row_edited("data.jsonl", image="hostile.png")),
        )
    for path in (
        "../canary/id_rsa", "/etc/passwd", "file:///etc/passwd", "https://example.org/x.png",
        "x\0.png", "", ".", "..", "~", "/dev/zero", "x" * 5000, "CON", "a/../../canary/id_rsa",
        "\x1b[2J.png",
    ):  # fmt: skip
        yield f"path {path[:12]!a}", row_edited("data.jsonl", image=path)
    for by in ("CANARY/id_rsa", "/dev/zero", "pipe", "folder", "/etc/passwd"):
        yield (
            f"is {by}",
            both(replaced("hostile.png", by), row_edited("data.jsonl", image="hostile.png")),
        )


def of_label_files(marker: Marker) -> Iterator[tuple[str, Make]]:
    for name, text in NAMES.items():
        yield name, written("labels.txt", f"Edema\n{text}\n".encode(errors="surrogatepass"))
        yield (
            f"alias {name}",
            written("labels.txt", f"Edema = {text}\nB".encode(errors="surrogatepass")),
        )
    yield "a million", written("labels.txt", "\n".join(f"L{i}" for i in range(10**5)))
    yield "1 GB", sparse("labels.txt", 2**30)
    yield "empty", written("labels.txt", "")
    yield "pickle", written("labels.txt", marker.pickle)
    yield "folder", replaced("labels.txt", "folder")


def of_prompt_files(marker: Marker) -> Iterator[tuple[str, Make]]:
    for name, text in NAMES.items():
        quoted = json.dumps(text)
        for field in ("text", "system", "name"):
            content = 'text = "x <think> <solution>"\nanswer_format = "think_solution"\n'
            if field == "text":
                content = content.replace('"x <think> <solution>"', quoted)
            else:
                content += f"{field} = {quoted}\n"
            yield f"{field} {name}", written("prompt.toml", content)
    yield "deep", written("prompt.toml", "a = " + "[" * 100_000)
    yield "dots", written("prompt.toml", ".".join(["a"] * 50_000) + " = 1")
    yield "1 GB", sparse("prompt.toml", 2**30)
    yield "number", written("prompt.toml", "text = " + "9" * 100_000)
    yield "template", written("prompt.toml", 'text = "{{ 7*7 }} {% for x in y %}"')


def open_prompt(folder: Path) -> None:
    kept = KeptFile.read(str(folder / "prompt.toml"))
    if problems := prompt_problems(kept):
        raise DataError(problems)
    prompt_of(kept)


def open_recipe(folder: Path) -> int:
    return run_sft.main(["--recipe", str(folder / "recipe.toml"), "--dry_run"])


def of_recipes(marker: Marker) -> Iterator[tuple[str, Make]]:
    for name, text in {
        "deep": "a = " + "[" * 100_000,
        "deep tables": "[" + ".".join(["a"] * 50_000) + "]",
        "digits": "seed = " + "9" * 100_000,
        "rank": "lora_r = 10000000",
        "inf": "learning_rate = inf",
        "nan": "learning_rate = nan",
        "date": "seed = 1979-05-27",
        "key": '"__class__" = 1',
        "script": "[sft]\n[grpo]\n[evil]\n",
        "code": "prompt = \"__import__('os').system('x')\"",
        "binary": "\0\1\2",
        "many": "\n".join(f"k{i} = 1" for i in range(50_000)),
    }.items():
        yield name, written("recipe.toml", text)
    for name, text in NAMES.items():
        for setting in ("model_name_or_path", "output_dir", "train_file", "prompt"):
            yield f"{setting} {name}", written("recipe.toml", f"{setting} = {json.dumps(text)}")
    yield "1 GB", sparse("recipe.toml", 2**30)
    yield "not UTF-8", written("recipe.toml", b"a = '\xff'")


def of_flags(marker: Marker) -> Iterator[tuple[str, Make, Reader]]:
    """Give numbers that ask for terabytes to the demo, which takes a second to build."""
    numbers = ("10000000", "1000000000", "65536", "-1", "0", "1e12", "9" * 400)
    for script, names in (
        (run_sft.main, ("lora_r", "per_device_train_batch_size", "max_visual_tokens")),
        (run_sft.main, ("gradient_accumulation_steps", "max_completion_length", "num_threads")),
        (run_grpo.main, ("num_generations", "max_completion_length", "steps_per_generation")),
    ):
        for name in names:
            for number in numbers:

                def reader(
                    folder: Path, script: Any = script, name: str = name, number: str = number
                ) -> int:
                    more = ["--adapter_name_or_path", "none"] if script is run_grpo.main else []
                    base = ["--model_name_or_path", "demo", "--train_file", "demo:train"]
                    return script(
                        [*(base if more else []), *more, f"--{name}", number, "--dry_run"]
                    )

                yield f"{name} {number[:11]}", lambda folder: None, reader


def of_tables(marker: Marker) -> Iterator[tuple[str, Make]]:
    head = "id,patient,image,labels\n"
    for name, text in NAMES.items():
        quoted = text.replace('"', '""')
        content = f'{head}"{quoted}",p,x.png,Edema\n'.encode(errors="surrogatepass")
        yield name, written("table.csv", content)
        yield (
            f"column {name}",
            written("table.csv", f'"{quoted}",b\n1,2\n'.encode(errors="surrogatepass")),
        )
    yield "open quote", written("table.csv", head + '"' + "x" * 20_000_000)
    yield "long line", written("table.csv", head + "x" * 20_000_000)
    yield "columns", written("table.csv", "a," * 10**6 + "\n")
    import gzip

    bomb = gzip.compress(b"\0" * 200_000_000)
    yield "gzip bomb", written("table.csv", bomb)
    yield "zip", written("table.csv", b"PK\x03\x04")
    yield "pipe", replaced("table.csv", "pipe")
    yield "zeros", sparse("table.csv", 2**30)


def open_table(folder: Path) -> int:
    flags = ["--id", "id", "--patient_id", "patient", "--image", "image", "--labels", "labels"]
    out = str(folder / "out.jsonl")
    return data.table.main([str(folder / "table.csv"), "--output", out, "--dataset", "x", *flags])


# ---- all of them ---------------------------------------------------------------------------------
def all_cases(originals: Originals, marker: Marker) -> Iterator[Case]:
    base, adapter = FAMILY, f"adapter-{FAMILY}"

    def open_adapter(folder: Path) -> None:
        check_adapter(str(originals.folders[base]), folder)
        attach_adapter(load(originals.folders[base]), folder, trainable=True)

    def open_answers(folder: Path) -> int:
        read_predictions(folder / "answers.jsonl")
        out = folder / "scored"
        flags = ["--predictions", f"site={folder / 'answers.jsonl'}", "--output_dir", str(out)]
        return eval.evaluate.main(flags)

    def of_adapter_base(folder: Path) -> int:
        return run_grpo.main(
            ["--adapter_name_or_path", str(folder), "--train_file", "demo:train", "--dry_run"]
        )

    kinds: list[tuple[str, str, Callable[[Marker], Iterator[tuple]], Reader | None]] = [
        ("config.json of a model", base, of_config, open_model),
        ("code beside a model", base, of_code, open_model),
        ("weights", base, of_pickles, open_model),
        ("tokenizer", base, of_tokenizer, open_encoder),
        ("image processor", base, of_processor, open_encoder),
        ("chat template", base, of_templates, open_encoder),
        ("generation_config.json", base, of_generation, open_model),
        ("adapter_config.json", adapter, of_adapter_config, open_adapter),
        ("base named by an adapter", adapter, of_base_names, of_adapter_base),
        ("weights of an adapter", adapter, of_adapter_weights, open_adapter),
        ("records of a checkpoint", "run", of_run_records, open_run),
        ("manifest", "run", of_manifests, open_run),
        ("files of a checkpoint", "run", of_run_tensors, open_tensors),
        ("links in a run folder", "run", of_run_links, open_run),
        ("evaluation folder", "evaluation", of_records, open_report),
        ("logs of a run", "evaluation", of_logs, open_figures),
        ("data file", "data", of_rows, open_data),
        ("answers", "data", of_answers, open_answers),
        ("images", "data", of_images, open_images),
        ("label file", "data", of_label_files, lambda f: labels_named(str(f / "labels.txt"))),
        ("prompt file", "data", of_prompt_files, open_prompt),
        ("recipe", "data", of_recipes, open_recipe),
        ("flags", "data", of_flags, None),
        ("table", "data", of_tables, open_table),
    ]
    for kind, original, cases, reader in kinds:
        for name, make, *own in cases(marker):
            yield Case(kind, name, original, make, own[0] if own else reader or open_data)


def more_originals(originals: Originals, folder: Path) -> None:
    """Add a run folder and an evaluation folder."""
    (folder / "run").mkdir()
    make_run(folder / "run")
    originals.folders["run"] = folder / "run"
    answers = originals.folders["data"] / "answers.jsonl"
    flags = ["--predictions", f"site={answers}", "--output_dir", str(folder / "evaluation")]
    assert forked(eval.evaluate.main, flags).code == 0
    log = '{"step": 1, "loss": 1.0, "split": "train"}\n{"step": 2, "loss": 0.5, "split": "train"}\n'
    (folder / "evaluation" / "metrics.jsonl").write_text(log)
    originals.folders["evaluation"] = folder / "evaluation"


def tree(folder: Path) -> dict[str, tuple]:
    """Read what is in a folder, so that any change shows: content, kind, time of change."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        found[str(path)] = status.st_mode, status.st_mtime_ns, status.st_nlink, digest
    return found


def result_of(case: Case, folder: Path) -> Ended:
    """Open a hostile folder in a child with limits."""

    def main(argv: list[str]) -> int | None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, used + MORE_MEMORY))
        result = case.reader(folder)
        return result if isinstance(result, int) else 0

    return forked(main, [], limit=SECONDS, into=folder.parent)


def verdict(end: Ended) -> str:
    """Tell how a case ended, as the table has it."""
    if end.timed_out:
        return "hang"
    if end.signal is not None or end.code not in (0, 1, 2) or "Traceback" in end.err + end.out:
        return "traceback"
    raw = [sign for sign in end.out + end.err if sign in "\x1b\x07\x9b\x00\u202e"]
    long = [line for line in end.err.splitlines() if len(line) > 5000]
    return "traceback" if raw or long else "one line" if end.code else "worked"


def run_cases(
    only: str = "", every: int = 1
) -> tuple[dict[str, Counter], dict[str, tuple[float, str]], list[str]]:
    """Open hostile inputs -> (results by kind, the slowest case of each, a line for each harm).

    only: kinds with this in their name. every: take one of so many.
    """
    results: dict[str, Counter] = {}
    slowest: dict[str, tuple[float, str]] = {}
    harms: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "canary" / "checkpoint-1").mkdir(parents=True)
        (home / "canary" / "id_rsa").write_text("secret")
        marker = Marker(home / "marker")
        originals = Originals(home / "originals")
        more_originals(originals, home / "originals")
        if only in "flags":  # draws the demo's images once
            forked(run_sft.main, ["--dry_run"], limit=300, into=home)
        before = {place: tree(home / place) for place in ("canary", "originals")}
        for number, case in enumerate(all_cases(originals, marker)):
            if only not in case.kind or number % every:
                continue
            folder = home / "case"
            shutil.copytree(originals.folders[case.original], folder, symlinks=True)
            case.make(folder)
            linked = (home / "canary" / "id_rsa").stat().st_nlink > 1
            end = result_of(case, folder)
            counts = results.setdefault(case.kind, Counter())
            result = verdict(end)
            counts[result] += 1
            slowest[case.kind] = max(slowest.get(case.kind, (0.0, "")), (end.seconds, case.name))
            if result in ("traceback", "hang"):
                last = " / ".join(end.err.strip().splitlines()[-2:])[-300:]
                harms.append(f"{case.kind}, {case.name}: {result} ({end.code} {end.signal}) {last}")
            shutil.rmtree(folder)
            left = [path.name for path in home.iterdir() if path.name not in _KNOWN]
            after = {place: tree(home / place) for place in before}
            if left or after != before:
                counts["touched outside"] += 1
                changed = [p for place in before for p in _changed(before[place], after[place])]
                harms.append(f"{case.kind}, {case.name}: touched {left + changed} {linked}")
                before = after
                for path in left:
                    _remove(home / path)
            if marker.path.exists():
                counts["code run"] += 1
                harms.append(f"{case.kind}, {case.name}: code run")
                marker.path.unlink()
    return results, slowest, harms


_KNOWN = ("canary", "originals", "marker", "demo-data")  # the last is drawn by the demo once


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _changed(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    return [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]


def table(results: dict[str, Counter], slowest: dict[str, tuple[float, str]]) -> str:
    """Write results as a Markdown table, one kind a row."""
    lines = [f"| hostile | {' | '.join(COLUMNS)} | slowest |", "|---" * (len(COLUMNS) + 2) + "|"]
    for kind, counts in [*results.items(), ("all", sum(results.values(), Counter()))]:
        seconds = max(s for s, _ in slowest.values()) if kind == "all" else slowest[kind][0]
        shown = " | ".join(str(counts[name]) for name in COLUMNS)
        lines.append(f"| {kind} | {shown} | {seconds:.1f} s |")
    return "\n".join(lines)


def quiet() -> None:
    """Silence what libraries print of hostile files, and compute with one thread."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


def main() -> int:
    """Run the command and return 1 where something does harm, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", default="", help="only those with this in their name")
    parser.add_argument("--every", type=int, default=1, help="take one of so many")
    options = parser.parse_args()
    quiet()
    results, slowest, harms = run_cases(options.kinds, options.every)
    print(table(results, slowest))
    print("\n".join(harms) or "nothing does harm")
    return 1 if harms else 0


if __name__ == "__main__":
    sys.exit(main())
