"""Read the flags that rl/objective.py declares, without loading torch.

The objective is one file that a fork edits, ObjectiveConfig included, so it imports torch at its
top and uses it in a decorator and in defaults. A command line needs none of that: only the class,
its fields and its checks.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.objective import ObjectiveConfig

OBJECTIVE = "rl.objective"


class _StandIn(ModuleType):
    """Stand in for torch while a module is read: its attributes and calls give stand-ins again."""

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name)

    def __call__(self, *arguments: Any, **keywords: Any) -> _StandIn:
        return _StandIn(self.__name__)


def objective_config() -> type[ObjectiveConfig]:
    """Return rl.objective.ObjectiveConfig, from a reading of the file in which torch is a stand-in.

    Where torch is loaded already, and where a fork does more with it than a stand-in can, it is the
    real class: then torch is loaded, and the answer only comes later.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = _StandIn("torch")
        try:
            found = _read(OBJECTIVE).ObjectiveConfig
            if "torch" not in inspect.getsource(found):
                return found
        except Exception:  # whatever it is, the real import below shows it as it is
            pass
        finally:
            del sys.modules["torch"]
    return importlib.import_module(OBJECTIVE).ObjectiveConfig


def _read(name: str) -> ModuleType:
    """Execute the file of module `name` as another module, so that `name` can be imported later."""
    origin = importlib.util.find_spec(name)
    assert origin is not None and origin.origin is not None
    spec = importlib.util.spec_from_file_location(f"{name}_flags", origin.origin)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the fields' types are looked up
    spec.loader.exec_module(module)
    return module
