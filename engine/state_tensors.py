"""Turn an optimizer and every source of randomness into tensors and JSON, and put them back.

Together with the adapter they are all that the next optimizer step depends on.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from engine.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

# Of a parameter group: in which kernels a step is made, which is a matter of the device of today.
_KERNELS = ("fused", "foreach", "capturable")


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Name the tensors that hold infinity or NaN, with one read from each device.

    The smallest and the largest number tell: NaN is both.
    """
    ends: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            of_device = ends.setdefault(tensor.device, {})
            of_device[name] = torch.stack(torch.aminmax(tensor.detach())).double()
    return [
        name
        for of_device in ends.values()
        for name, finite in zip(
            of_device, torch.stack([*of_device.values()]).isfinite().all(1).tolist(), strict=True
        )
        if not finite
    ]


def optimizer_to_tensors(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state: (tensors keyed "<parameter index>.<name>", JSON record)."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    record = {
        "optimizer": type(optimizer).__name__,
        "shapes": [
            list(parameter.shape)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ],
        "param_groups": state["param_groups"],
        "scalars": scalars,
    }
    return tensors, record


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], record: dict[str, Any]
) -> None:
    """Restore, bit for bit, what `optimizer_to_tensors` gave.

    optimizer: built over the same parameters in the same order. It goes on with its own kernels,
    those of a CPU or of a GPU, whichever saved the state.

    Raises CheckpointError where the class, the groups, the parameters or the shape of a state
    differ.
    """
    if record["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"optimizer state is of {record['optimizer']}, the run uses {type(optimizer).__name__}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = [list(parameter.shape) for parameter in parameters]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in record["param_groups"]]
    if sizes != saved_sizes:
        raise CheckpointError(
            f"optimizer state has parameter groups of {saved_sizes}, the run has {sizes}"
        )
    for index, (saved, shape) in enumerate(zip(record["shapes"], shapes, strict=True)):
        if saved != shape:
            raise CheckpointError(
                f"optimizer state of parameter {index} has shape {saved}, the run's has {shape}"
            )
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **record["scalars"]}.items():
        index, name = key.split(".", 1)
        if (
            isinstance(value, torch.Tensor)
            and value.dim()
            and list(value.shape) != shapes[int(index)]
        ):
            raise CheckpointError(
                f"optimizer state {key} has shape {list(value.shape)}, its parameter"
                f" {shapes[int(index)]}"
            )
        state.setdefault(int(index), {})[name] = value
    groups = [
        {
            name: tuple(value) if isinstance(current.get(name), tuple) else value
            for name, value in saved.items()
        }
        | {name: current[name] for name in _KERNELS if name in current}
        for saved, current in zip(record["param_groups"], optimizer.param_groups, strict=True)
    ]  # JSON made lists of tuples such as betas
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_to_tensors() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Save every source of randomness as (tensors, JSON record).

    The sources are torch on CPU and CUDA, Python, and numpy's global state. The loops need none of
    them (engine/random_numbers.py): they are for what a fork draws.
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {
            f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())
        }
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)  # it is a dict only where legacy=False asks for one
    algorithm, key, position, has_gauss, gauss = numpy_state
    tensors["numpy"] = torch.from_numpy(key.astype(np.int64))
    version, words, python_gauss = random.getstate()
    record = {
        "python": [version, list(words), python_gauss],
        "numpy": [algorithm, position, has_gauss, gauss],
    }
    return tensors, record


def load_rng(tensors: Mapping[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Restore what `rng_to_tensors` gave, so that every source continues with the same draws.

    Raises CheckpointError for the state of another kind of device. Another number of CUDA devices
    is only a warning: what a fork draws differs then.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    saved_devices = sum(name.startswith("cuda.") for name in tensors)
    if devices != saved_devices:
        logger.warning(
            "random state of %d CUDA devices was saved, %d are here: what a fork draws there"
            " differs",
            saved_devices,
            devices,
        )
    try:
        torch.set_rng_state(tensors["torch"])
        for index in range(min(devices, saved_devices)):
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
        algorithm, position, has_gauss, gauss = record["numpy"]
        np.random.set_state(
            (algorithm, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss)
        )
        version, words, python_gauss = record["python"]
        random.setstate((version, tuple(words), python_gauss))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"random state cannot be restored: {type(error).__name__}: {error}"
        ) from error
