"""What the frozen vision tower makes of each image: computed once, without gradient, and kept.

Nothing of the tower is trained, so an image's features never change. Rollouts, the old, reference
and policy passes, the epochs of SFT and evaluation take them from here. An image goes through the
tower alone, so that its features do not depend on which images came with it: with a warm cache, a
cold one or none a run is the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from data.examples import Example
from data.images import image_path
from engine.config import UsageError
from engine.encode import Encoder
from engine.families import Family

logger = logging.getLogger(__name__)

Vision = dict[str, Tensor]  # "features" [tokens,H] and, of Qwen, "image_grid_thw" [1,3]; on the CPU


class VisionCache:
    """`look(example)` -> the features of the example's image.

    Keeps at most `max_bytes` of them in the host's memory and drops those that were not used for
    longest. folder: where they are kept across runs as well, by the tower's and the processor's
    fingerprint and the image file's SHA-256; nothing is ever deleted there. Raises UsageError where
    it is no folder.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        family: Family,
        encoder: Encoder,
        *,
        max_bytes: int,
        folder: Path | None = None,
    ):
        self.base, self.family, self.encoder, self.max_bytes = base, family, encoder, max_bytes
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise UsageError(
                f"--vision_cache_dir {folder}: not a folder; give one, it need not exist yet"
            )
        self.folder = None if folder is None else Path(folder) / fingerprint(base, encoder)
        self._kept: OrderedDict[str, Vision] = OrderedDict()  # by image, the last used at the end
        self._kept_bytes = 0
        self._digests: dict[tuple, str] = {}

    def look(self, example: Example) -> Vision:
        """Raises DataError for an image that cannot be read, unless it is known."""
        image = self._digest(image_path(example))
        if image in self._kept:
            self._kept.move_to_end(image)
            return self._kept[image]
        vision = self._read(image)
        if vision is None:
            vision = self._compute(example)
            self._write(image, vision)
        self._keep(image, vision)
        return vision

    @torch.no_grad()
    def _compute(self, example: Example) -> Vision:
        image = self.encoder.encode_image(example)
        pixels = {name: tensor.to(self.base.device) for name, tensor in image.items()}
        features = self.family.image_features(self.base, pixels).cpu()
        return {"features": features} | {
            name: tensor for name, tensor in image.items() if name != "pixel_values"
        }

    def _keep(self, image: str, vision: Vision) -> None:
        self._kept[image] = vision
        self._kept_bytes += num_bytes(vision)
        while self._kept_bytes > self.max_bytes:
            self._kept_bytes -= num_bytes(self._kept.popitem(last=False)[1])

    def _digest(self, path: Path) -> str:
        """SHA-256 of an image file; read again where the file has changed."""
        status = path.stat()
        known = path, status.st_size, status.st_mtime_ns
        if known not in self._digests:
            self._digests[known] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._digests[known]

    def _read(self, image: str) -> Vision | None:
        try:
            return None if self.folder is None else load_file(self.folder / f"{image}.safetensors")
        except (FileNotFoundError, SafetensorError):
            # not there yet, or cut short by a full disk: made anew
            return None

    def _write(self, image: str, vision: Vision) -> None:
        if self.folder is None:
            return
        temporary = self.folder / f".{image}.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(
                save({name: tensor.contiguous() for name, tensor in vision.items()})
            )
            os.replace(temporary, self.folder / f"{image}.safetensors")
        except OSError as error:  # a full disk must not end a run that needs nothing of it
            logger.warning("image features are not kept in %s any more: %s", self.folder, error)
            self.folder = None


def num_bytes(vision: Vision) -> int:
    return sum(tensor.nbytes for tensor in vision.values())


def fingerprint(base: PreTrainedModel, encoder: Encoder) -> str:
    """32 hex digits of all that an image's features depend on: the weights outside the decoder and
    their dtype, the image processor, the device's kind and the libraries' versions.
    """
    digest = hashlib.sha256(
        json.dumps(
            [
                base.device.type,
                torch.__version__,
                transformers.__version__,
                encoder.image_processor.to_dict(),
            ],
            sort_keys=True,
            default=str,
        ).encode()
    )
    for name, tensor in base.state_dict().items():
        if "language_model." not in name and "lm_head" not in name:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
