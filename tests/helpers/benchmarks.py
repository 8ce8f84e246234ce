"""Import a script of tests/benchmarks as its command does, from its own folder."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest


@contextmanager
def benchmark_module(name: str) -> Iterator[ModuleType]:
    """Import one, which also finds the scripts beside it: `with benchmark_module("steps") as it:`.

    name: of the file, without .py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module(name)
