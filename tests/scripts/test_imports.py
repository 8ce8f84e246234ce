"""Protect the arrows of imports between the packages.

Checked too: the run-time packages, and that nothing is loaded through pickle.

data <- engine <- rl      data imports only data, and no package of models; engine also data; rl
                          and eval also data and engine, never each other;
data <- engine <- eval    the run scripts import any of them, and nothing imports a run script.
"""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.repository import ROOT, product_files

MAY_IMPORT = {
    "data": {"data"},
    "engine": {"data", "engine"},
    "rl": {"data", "engine", "rl"},
    "eval": {"data", "engine", "eval"},
    "run_sft": {"data", "engine", "eval"},
    "run_grpo": {"data", "engine", "rl", "eval"},
}
RUN_TIME = {"torch", "transformers", "peft", "safetensors", "PIL", "numpy", "tqdm", "tensorboard"}
WITH_TRANSFORMERS = {"tokenizers"}  # transformers requires it
# setup.cfg's extras `plots` and `dicom`
EXTRAS = {"eval/plots.py": {"matplotlib"}, "data/dicom.py": {"pydicom"}}
NARROWER = {"rl/objective.py": {"torch"}}  # a fork reads and copies this file alone
# Only the demo's base, which is built by hand, needs a model. A data set is looked at without one.
HEAVY = {"torch", "transformers", "tokenizers", "peft", "safetensors", "tensorboard"}
BUILDS_THE_BASE = {"data/demo/build_base.py", "data/demo/base_families.py"}
# What moves between processes is named in these two files alone.
DISTRIBUTED = {"engine/ranks.py", "engine/shard.py"}
PICKLES = {"pickle", "cPickle", "_pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}


def imported(source: str, package: str) -> dict[str, int]:
    """List the top-level names that a source imports, anywhere in it, with the line.

    A relative import is its own package.
    """
    names: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0]: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names[package if node.level else node.module.split(".")[0]] = node.lineno
    return names


def wrong_imports(source: str, path: str) -> list[str]:
    """List what the file `path` (relative to the root) must not import, one line each."""
    package = Path(path).parts[0].removesuffix(".py")
    allowed = NARROWER.get(
        path, RUN_TIME | WITH_TRANSFORMERS | MAY_IMPORT[package] | EXTRAS.get(path, set())
    )
    if package == "data" and path not in BUILDS_THE_BASE:
        allowed = allowed - HEAVY
    return [
        f"{path}:{line} imports {name}"
        for name, line in imported(source, package).items()
        if name in PICKLES or name not in allowed and name not in sys.stdlib_module_names
    ]


def names_distributed(source: str) -> bool:
    """Tell whether a source names torch.distributed, in an import or as torch's attribute."""
    return any(
        isinstance(node, ast.Import)
        and any(alias.name.startswith("torch.distributed") for alias in node.names)
        or isinstance(node, ast.ImportFrom)
        and (
            (node.module or "").startswith("torch.distributed")
            or node.module == "torch"
            and any(alias.name == "distributed" for alias in node.names)
        )
        or isinstance(node, ast.Attribute)
        and ast.unparse(node) == "torch.distributed"
        for node in ast.walk(ast.parse(source))
    )


def unsafe_loads(source: str, path: str) -> list[str]:
    """List calls that let a file run code.

    They set weights_only or allow_pickle to anything but the safe literal.
    """
    safe = {"weights_only": True, "allow_pickle": False}
    return [
        f"{path}:{node.lineno} {keyword.arg}={ast.unparse(keyword.value)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in safe and ast.unparse(keyword.value) != str(safe[keyword.arg])
    ]


@pytest.mark.parametrize("file", product_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_what_it_may(file):
    path, source = file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")
    assert wrong_imports(source, path) == []
    assert unsafe_loads(source, path) == []
    assert names_distributed(source) == (path in DISTRIBUTED)
    if file.name == "__init__.py":
        assert source == "", f"{path} must be empty"


def test_every_package_is_looked_at():
    files = {file.relative_to(ROOT).as_posix() for file in product_files()}
    packages = [name for name in MAY_IMPORT if not name.startswith("run_")]
    assert files >= {f"{package}/__init__.py" for package in packages} | {
        "rl/objective.py",
        "engine/optim.py",
    }
    unknown = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {*packages, "tests"}
    assert not unknown, f"{unknown} need a row in MAY_IMPORT"


def test_the_run_time_packages_are_those_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    required = {
        line.split()[0]
        for line in config["options"]["install_requires"].split("\n")
        if line.strip()
    }
    assert {"PIL" if name == "pillow" else name for name in required} == RUN_TIME


@pytest.mark.parametrize(
    "path, source",
    [
        ("data/labels.py", "import engine.model"),
        ("data/sets.py", "import torch"),
        ("data/images.py", "def late():\n    from transformers import AutoTokenizer"),
        ("data/demo/splits.py", "import safetensors"),
        ("engine/model.py", "from rl.objective import grpo_loss"),
        ("engine/model.py", "def late():\n    import eval.metrics"),
        ("rl/rewards.py", "from eval.metrics import multilabel_scores"),
        ("eval/metrics.py", "import rl"),
        ("rl/rollout.py", "import run_grpo"),
        ("run_grpo.py", "from run_sft import main"),
        ("rl/objective.py", "from engine.optim import learning_rate_at"),
        ("eval/metrics.py", "import sklearn.metrics"),
        ("eval/report.py", "import matplotlib.pyplot"),
        ("engine/checkpoint.py", "import json, pickle"),
    ],
)
def test_a_wrong_import_is_seen(path, source):
    assert len(wrong_imports(source, path)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "def late():\n    from torch.distributed.fsdp import fully_shard",
        "from torch import Tensor, distributed",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_a_use_of_torch_distributed_is_seen(source):
    assert names_distributed(source)
    assert not names_distributed(source.replace("distributed", "distributions"))


def test_a_right_import_is_not():
    source = "import os\nimport torch\nfrom data.labels import LABELS\nfrom . import model"
    assert wrong_imports(source, "engine/forward.py") == []


@pytest.mark.parametrize("command", ["select", "check", "dicom", "table", "traces", "demo.splits"])
def test_a_command_on_data_loads_no_model_library(command):
    """--help answers in a moment; the heavy packages take seconds to import."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{command}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('data.{command}', run_name='__main__')\n"
        "finally:\n"
        f"    print('loaded', sorted(set(sys.modules) & {HEAVY!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_an_unsafe_load_is_seen():
    assert unsafe_loads("torch.load(path, weights_only=False)", "x.py") == [
        "x.py:1 weights_only=False"
    ]
    assert unsafe_loads("torch.load(path, weights_only=not strict)", "x.py") == [
        "x.py:1 weights_only=not strict"
    ]
    assert unsafe_loads("numpy.load(path, allow_pickle=True)", "x.py") == [
        "x.py:1 allow_pickle=True"
    ]
    assert unsafe_loads("torch.load(path, weights_only=True)", "x.py") == []


# ---- tests ---------------------------------------------------------------------------------------
def imported_test_modules(source: str) -> list[str]:
    """List the test modules that a source imports, anywhere in it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in names if re.search(r"(^|\.)test_", name)]


def test_no_test_module_and_no_helper_imports_a_test_module():
    """One fixture alone hands tests on: `checks`, for broken objectives and forks."""
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("*.py")
        if imported_test_modules(path.read_text(encoding="utf-8"))
    }
    assert importers == {"tests/rl/conftest.py"}


@pytest.mark.parametrize(
    "source",
    [
        "import test_rollout",
        "def late():\n    from tests.rl.test_rollout import built",
        "from tests.rl import test_rollout as rollout",
        "from . import test_rollout",
        "from .test_rollout import built",
    ],
)
def test_an_imported_test_module_is_seen(source):
    assert imported_test_modules(source)


def test_a_helper_may_be_imported():
    assert imported_test_modules("import pytest\nfrom tests.helpers.runs import grpo") == []
