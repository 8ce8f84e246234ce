"""Protect the machine from a model's folder: bounded time and memory, no code, one line.

Run: pytest tests/engine/test_hostile_models.py
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from engine.config import UsageError
from engine.free_memory import memory_limit
from engine.model import load_encoder, load_model
from tests.helpers.repository import ROOT


@pytest.fixture
def base(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint("gemma3"), tmp_path / "base")


def refusal(folder: Path, *, weights: bool = False) -> str:
    """Open a model within five seconds -> the one line that refuses it."""
    began, bounds = time.monotonic(), {"min_visual_tokens": 4, "max_visual_tokens": 16}
    with pytest.raises(UsageError) as refused:
        if weights:
            load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"), **bounds)
        else:
            load_encoder(str(folder), **bounds)
    assert time.monotonic() - began < 5
    (line,) = refused.value.problems
    assert "\n" not in line and len(line) < 600
    return line


def edit(path: Path, part: str | None = None, **values) -> None:
    record = json.loads(path.read_text())
    (record[part] if part else record).update(values)
    path.write_text(json.dumps(record))


TEMPLATES = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "text": "{{ 'x' * 10**10 }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "power": "{{ 9**9**9 }}",
    "doubling": "{% set ns = namespace(x='xx') %}{% for i in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "output": "{{ 'x' * 5000000 }}",
    "large": "{# x #}" * 200_000,
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_without_an_end_is_one_line_at_once(kind, base):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    (base / "chat_template.jinja").write_text(TEMPLATES[kind])
    assert "chat" in refusal(base)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_the_limit_of_memory_holds_in_the_block_alone():
    with pytest.raises(MemoryError), memory_limit(2**28):
        bytearray(2**30)
    assert len(bytearray(2**29)) == 2**29


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("vocab_size", 10**12),
        ("hidden_size", 0),
        ("intermediate_size", 10**400),
        ("num_attention_heads", 1e308),
    ],
)
def test_a_size_that_no_model_has_is_named(name, value, base):
    edit(base / "config.json", "text_config", **{name: value})
    assert f"its config.json says {name}" in refusal(base)


def test_a_model_larger_than_its_weights_asks_for_no_memory(base):
    edit(base / "config.json", "text_config", hidden_size=100_000, intermediate_size=900_000)
    line = refusal(base, weights=True)
    assert "makes a model of at least" in line and "they belong to different models" in line


@pytest.mark.parametrize(
    ("file", "size"),
    [
        ("config.json", 2**30),
        ("tokenizer.json", 2**30),
        ("tokenizer_config.json", 2**30),
        ("preprocessor_config.json", 2**30),
    ],
)
def test_a_file_without_an_end_is_not_read(file, size, base):
    with (base / file).open("wb") as out:
        out.truncate(size)
    refusal(base)


@pytest.mark.parametrize("side", [0, -1, 10**9])
def test_an_image_processor_of_an_impossible_size_is_refused(side, base):
    edit(base / "preprocessor_config.json", size={"height": side, "width": side})
    assert "size[height] is" in refusal(base)


# ---- no code -------------------------------------------------------------------------------------
FORBIDDEN = {
    "unpickling": r"torch\.load\(|\bpickle\b|\bmarshal\b|\bshelve\b|\bjoblib\b|\bdill\b",
    "pickles of numpy": r"allow_pickle\s*=\s*True|np\.load\(",
    "code of a checkpoint": r"trust_remote_code\s*=\s*(?!False)",
    "code as text": r"(?<![.\w])(?:eval|exec)\(|os\.system\(|shell\s*=\s*True|\bos\.popen\(",
    "YAML with objects": r"yaml\.(?:unsafe_)?load\(",
}


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_no_file_of_the_product_could_run_code_of_another(kind):
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    found = []
    for name in listed:
        if not name.startswith("tests/"):
            text = re.sub(r'"""[\s\S]*?"""|#.*', "", (ROOT / name).read_text(encoding="utf-8"))
            text = re.sub(r'"[^"\n]*"', '""', text)
            found += [f"{name}: {match[0]}" for match in re.finditer(FORBIDDEN[kind], text)]
    assert found == []


def test_every_library_call_that_could_run_code_says_that_it_must_not():
    """AutoConfig, AutoTokenizer and AutoModel ask about code where nothing is said."""
    for name in ("engine/base_model.py", "engine/processor_files.py"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in re.finditer(r"Auto\w+\.from_pretrained\(([^()]*)\)", text):
            assert "trust_remote_code=False" in match[1], match[0]
