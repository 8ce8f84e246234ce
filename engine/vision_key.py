"""Say what an image's features depend on: the key of kept features, and whether it still holds.

Features come from everything outside the decoder: the vision tower, the projector, and whatever an
adapter put into them. An adapter can be attached, switched or changed after the cache was made, so
the key is taken when features are first asked for and again whenever one of its parts has changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy
import PIL
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.images import READING
from engine.encode import Encoder

FORMAT = 2  # of a kept file and of this key; a new one leaves earlier files aside
# Modules that come after the features and have no share in them.
_DECODER = ("language_model", "lm_head")
# What peft's layers note beside their tensors: which adapters act, how strongly, and how.
_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling", "use_dora")
# Of a configuration: where it was found, what it is for, and the decoder's part.
_NO_SHARE = ("_name_or_path", "architectures", "dtype", "text_config", "transformers_version")


def fingerprint(net: PreTrainedModel, encoder: Encoder) -> str:
    """Hash all that an image's features depend on -> 32 hexadecimal digits.

    net: the model, with the adapters that are attached to it now.

    Hashed are the tensors outside the decoder with their dtypes, which adapters act on them, the
    configuration, the image processor, how images are read, the device and the libraries' versions.
    """
    digest = hashlib.sha256(json.dumps(_settings(net, encoder), sort_keys=True).encode())
    for name, module in tower_modules(net):
        if state := _adapter_state(module):
            digest.update(f"{name} {state}".encode())
        for key, tensor in _own_tensors(module):
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(content.numpy().data)
    return digest.hexdigest()[:32]


def _settings(net: PreTrainedModel, encoder: Encoder) -> list[Any]:
    """List what decides beside the tensors, as plain values for JSON."""
    device = net.device
    config = {name: value for name, value in net.config.to_dict().items() if name not in _NO_SHARE}
    processor = encoder.image_processor
    return json.loads(
        json.dumps(
            [
                FORMAT,
                READING,
                torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                [module.__version__ for module in (torch, transformers, PIL, numpy)],
                type(processor).__name__,
                processor.to_dict(),
                config,
            ],
            default=str,
        )
    )


def tower_modules(net: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk the modules outside the decoder, in order, each with its dotted name."""
    yield name, net
    for child, module in net.named_children():
        if child not in _DECODER:
            yield from tower_modules(module, f"{name}.{child}" if name else child)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _adapter_state(module: nn.Module) -> dict[str, str]:
    """Read which adapters act on one of peft's layers, {} for any other module."""
    known = vars(module)
    return {name: repr(known[name]) for name in _ADAPTER_STATE if name in known}


class TowerState:
    """Remember the tensors outside the decoder, to see cheaply whether they are still the same.

    Remembered are their identities and versions, one number of each, and which adapters act.
    """

    def __init__(self, net: nn.Module, encoder: Encoder):
        """Take the state as it is now."""
        modules = [module for _, module in tower_modules(net)]
        found = [(_adapter_state(module), [*_own_tensors(module)]) for module in modules]
        self.notes = [state for state, _ in found if state]
        self.notes.append({"processor": repr(sorted(encoder.image_processor.to_dict().items()))})
        # The tensors are held, so that another one cannot come to lie in the place of one of them.
        self.tensors = [tensor for _, tensors in found for _, tensor in tensors]
        self.versions = [(tensor._version, tensor.data_ptr()) for tensor in self.tensors]
        groups: dict[Any, list[Tensor]] = {}
        for tensor in self.tensors:
            if tensor.numel():
                middle = tensor.detach()[tuple(side // 2 for side in tensor.shape)]
                groups.setdefault((tensor.dtype, tensor.device), []).append(middle)
        # a write through `.data` leaves the version as it was, but not the number
        self.numbers = [torch.stack(group) for group in groups.values()]

    def __eq__(self, other: object) -> bool:
        """Tell whether features of the other state are features of this one."""
        return (
            isinstance(other, TowerState)
            and self.notes == other.notes
            and self.versions == other.versions
            and len(self.tensors) == len(other.tensors)
            and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
            and all(map(_same_bits, self.numbers, other.numbers))
        )

    __hash__ = None  # type: ignore[assignment]  # it stands for tensors, which change


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
