"""Compute each image's features once in the frozen vision tower, without gradient, and keep them.

Nothing of the tower is trained, so an image's features never change. Rollouts, the old, reference
and policy passes, the epochs of SFT and evaluation take them from here. An image goes through the
tower alone, so that its features do not depend on which images came with it: with a warm cache, a
cold one or none a run is the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import PreTrainedModel

from data.examples import Example
from data.files import written_whole
from data.images import image_path, read_image
from engine.config import UsageError
from engine.encode import Encoder
from engine.families import Family, ImageTensors

logger = logging.getLogger(__name__)


class VisionCache:
    """Look up the features of an example's image: `look(example)`.

    max_bytes: of features kept in the host's memory. Those not used for longest are dropped first.
    folder: where features are kept across runs as well, by the tower's and the processor's
    fingerprint and the image file's SHA-256. Nothing is ever deleted there.

    Raises UsageError where `folder` is no folder.
    """

    def __init__(
        self,
        net: PreTrainedModel,
        family: Family,
        encoder: Encoder,
        *,
        max_bytes: int,
        folder: str | Path | None = None,
    ):
        self.net, self.family, self.encoder, self.max_bytes = net, family, encoder, max_bytes
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise UsageError(
                f"--vision_cache_dir {folder}: not a folder; give one, it need not exist yet"
            )
        self.folder = None if folder is None else Path(folder) / fingerprint(net, encoder)
        # by the image file's SHA-256, the last used at the end
        self._kept: OrderedDict[str, ImageTensors] = OrderedDict()
        self._kept_bytes = 0
        self._digests: dict[tuple, str] = {}

    def look(self, example: Example) -> ImageTensors:
        """Find or compute the image's `features` [tokens,H] and what places them, on the CPU.

        The image file is read at most once, and not at all where it is known and has not changed.

        Raises DataError for an image that cannot be read, unless it is known.
        """
        path = image_path(example)
        status = path.stat()
        known = path, status.st_size, status.st_mtime_ns
        content = None
        if known not in self._digests:
            content = read_image(example)
            self._digests[known] = hashlib.sha256(content).hexdigest()
        digest = self._digests[known]
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        image = self._read(digest)
        if image is None:
            image = self._compute(example, content)
            self._write(digest, image)
        self._keep(digest, image)
        return image

    @torch.no_grad()
    def _compute(self, example: Example, content: bytes | None) -> ImageTensors:
        image = self.encoder.encode_image(example, content)
        pixels = {name: tensor.to(self.net.device) for name, tensor in image.items()}
        features = self.family.image_features(self.net, pixels).cpu()
        rest = {name: tensor for name, tensor in image.items() if name != "pixel_values"}
        return {"features": features} | rest

    def _keep(self, digest: str, image: ImageTensors) -> None:
        self._kept[digest] = image
        self._kept_bytes += num_bytes(image)
        while self._kept_bytes > self.max_bytes:
            self._kept_bytes -= num_bytes(self._kept.popitem(last=False)[1])

    def _read(self, digest: str) -> ImageTensors | None:
        try:
            return None if self.folder is None else load_file(self.folder / f"{digest}.safetensors")
        except (FileNotFoundError, SafetensorError):
            # not there yet, or cut short by a full disk: made anew
            return None

    def _write(self, digest: str, image: ImageTensors) -> None:
        if self.folder is None:
            return
        content = save({name: tensor.contiguous() for name, tensor in image.items()})
        try:
            with written_whole(self.folder / f"{digest}.safetensors") as temporary:
                temporary.write_bytes(content)
        except OSError as error:  # a full disk must not end a run that needs nothing of it
            logger.warning("image features are not kept in %s any more: %s", self.folder, error)
            self.folder = None


def num_bytes(image: ImageTensors) -> int:
    """Add up the bytes of an image's tensors."""
    return sum(tensor.nbytes for tensor in image.values())


def fingerprint(net: PreTrainedModel, encoder: Encoder) -> str:
    """Hash all that an image's features depend on -> 32 hexadecimal digits.

    Hashed are the weights outside the decoder with their dtype, the image processor, the device's
    kind and the libraries' versions.
    """
    digest = hashlib.sha256(
        json.dumps(
            [
                net.device.type,
                torch.__version__,
                transformers.__version__,
                encoder.image_processor.to_dict(),
            ],
            sort_keys=True,
            default=str,
        ).encode()
    )
    for name, tensor in net.state_dict().items():
        if "language_model." not in name and "lm_head" not in name:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
