"""Compute each image's features once in the frozen vision tower, without gradient, and keep them.

Nothing of the tower is trained, so an image's features never change while the same adapters act on
it. Rollouts, the old, reference and policy passes, the epochs of SFT and evaluation take them from
here. Images are opened and resized in threads, before they are looked at (engine/ahead.py). An
image goes through the tower alone, so that its features do not depend on which images came with it:
with a warm cache, a cold one or none a run is the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from transformers import PreTrainedModel

from data.examples import Example
from data.files import DataError, written_whole
from data.images import image_status, read_image
from engine.ahead import ImagesAhead, place_of
from engine.config import UsageError
from engine.device import on_device
from engine.encode import Encoder
from engine.families import Family, ImageTensors
from engine.launch import Launch
from engine.vision_key import TowerState, fingerprint, tower_modules

logger = logging.getLogger(__name__)

MOST_WORKERS = 4  # threads that prepare images for a GPU, if there are as many cores for each


class WrongFile(ValueError):
    """Report why a kept file is not the features of its image."""


@dataclass(frozen=True)
class Prepared:
    """Hold an image that was read and resized ahead.

    known: by what its file was recognised before it was read. digest: its SHA-256. pixels: what the
    tower takes, None where its features are kept.
    """

    known: tuple
    digest: str
    pixels: ImageTensors | None


class VisionCache:
    """Look up the features of an example's image: `look(example)`.

    max_bytes: of features kept in the host's memory. Those not used for longest are dropped first.
    folder: where features are kept across runs as well, by the `fingerprint` of all that they
    depend on and the image file's SHA-256. Nothing is ever deleted there, but a file that is not
    what it should be is named in a warning and replaced.

    The model may get, switch or change adapters at any time: the next look takes account of it.

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
        self.folder = None if folder is None else Path(folder)
        self._state: TowerState | None = None  # in which the features below were made
        self._key = ""  # its fingerprint, where there is a folder
        # by the image file's SHA-256, the last used at the end
        self._kept: OrderedDict[str, ImageTensors] = OrderedDict()
        self._kept_bytes = 0
        self._digests: dict[tuple, str] = {}
        self._last: dict[tuple, str] = {}  # of each image, by where the example says that it lies
        self._warned = False
        self._ahead = ImagesAhead(self._prepare, _workers(net.device))

    def expect(self, examples: Iterable[Example]) -> None:
        """Prepare the images that are looked at next, in this order, while the model computes."""
        self._ahead.expect(examples)

    def look(self, example: Example) -> ImageTensors:
        """Find or compute the image's `features` [tokens,H] and what places them, on the CPU.

        The image file is read at most once, and not at all where it is known and has not changed.

        Raises DataError for an image that cannot be read, and for features that are not finite. An
        image whose file or drive is gone, but whose features are in memory, is only warned of.
        """
        self._notice_changes()
        place, prepared = place_of(example), self._ahead.take(example)
        try:
            path, status = image_status(example)
        except DataError as error:
            image = None
            if isinstance(error.__cause__, OSError) and place in self._last:
                image = self._kept.get(self._last[place]) or self._read(self._last[place])
            if image is None:
                raise
            if not self._warned:
                logger.warning("%s; its features are kept, and serve on", error)
            self._warned = True
            return image
        self._last.pop(place, None)
        known, content = _known(path, status), None
        if prepared is not None and prepared.known != known:  # the file has changed since
            prepared = None
        if prepared is not None:
            self._digests[known] = prepared.digest
        elif known not in self._digests:
            content = read_image(example)
            self._digests[known] = hashlib.sha256(content).hexdigest()
        digest = self._digests[known]
        self._last[place] = digest
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        image = self._read(digest)
        if image is None:
            pixels = prepared and prepared.pixels
            image = self._compute(example, pixels or self.encoder.encode_image(example, content))
            self._write(digest, image)
        self._keep(digest, image)
        return image

    def _notice_changes(self) -> None:
        """Forget what was made with another tower, adapter or image processor."""
        state = TowerState(self.net, self.encoder)
        if state == self._state:
            return
        self._state = state
        self._kept.clear()
        self._kept_bytes = 0
        self._key = "" if self.folder is None else fingerprint(self.net, self.encoder)

    def _prepare(self, example: Example) -> Prepared | None:
        """Read and resize an image, unless its features are kept. Called in threads."""
        known = _known(*image_status(example))
        digest = self._digests.get(known)
        if digest is not None and self._is_kept(digest):
            return None
        content = read_image(example)
        digest = hashlib.sha256(content).hexdigest()
        kept = self._is_kept(digest)
        return Prepared(
            known, digest, None if kept else self.encoder.encode_image(example, content)
        )

    def _is_kept(self, digest: str) -> bool:
        """Tell whether an image's features are in memory or, as far as one can see, on the disk."""
        folder = self.folder
        return digest in self._kept or folder is not None and self._file(folder, digest).exists()

    @torch.no_grad()
    def _compute(self, example: Example, image: ImageTensors) -> ImageTensors:
        """Run the tower on an image's pixels."""
        pixels = {name: on_device(tensor, self.net.device) for name, tensor in image.items()}
        # an adapter's dropout would make other features at every look
        training = [module for _, module in tower_modules(self.net) if module.training]
        _set_training(training, False)
        try:
            seen = self.family.embed_image(self.net, pixels)
        finally:
            _set_training(training, True)
        rest = {name: tensor for name, tensor in image.items() if name != "pixel_values"}
        computed = {name: tensor.cpu() for name, tensor in seen.items()} | rest
        if not _finite(computed):
            raise DataError(
                [
                    f"example {example.id!r}: the model's features of image {example.image!r} are"
                    " not finite numbers; the weights of its vision tower are damaged, or too large"
                    f" for {str(computed['features'].dtype).removeprefix('torch.')}"
                ]
            )
        return computed

    def _keep(self, digest: str, image: ImageTensors) -> None:
        self._kept[digest] = image
        self._kept_bytes += num_bytes(image)
        while self._kept_bytes > self.max_bytes:
            self._kept_bytes -= num_bytes(self._kept.popitem(last=False)[1])

    # ---- on the disk -----------------------------------------------------------------------------
    def _file(self, folder: Path, digest: str) -> Path:
        return folder / self._key / f"{digest}.safetensors"

    def _read(self, digest: str) -> ImageTensors | None:
        """Read an image's kept features, None where there are none or not those of this image."""
        if self.folder is None:
            return None
        path = self._file(self.folder, digest)
        try:
            content = _read_regular(path)
            return None if content is None else self._verified(digest, content)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            logger.warning(
                "%s: not the image features that were kept there (%s); they are made anew",
                path,
                reason,
            )
            return None

    def _verified(self, digest: str, content: bytes) -> ImageTensors:
        """Parse a kept file.

        Raises WrongFile for one of other tensors or another image. safetensors' parser raises
        errors of several kinds for a damaged one.
        """
        image = load(content)
        if "features" not in image:
            raise WrongFile(f"it has no 'features', only {', '.join(sorted(image)) or 'nothing'}")
        hidden, shape = self.net.config.get_text_config().hidden_size, image["features"].shape
        if len(shape) != 2 or shape[1] != hidden:
            raise WrongFile(f"its features have shape {tuple(shape)}, not [tokens,{hidden}]")
        if not _finite(image):
            raise WrongFile("its features are not finite")
        if _noted_sum(content) != self._sum(digest, image):  # which covers names, shapes, dtypes
            raise WrongFile("its SHA-256 is not that of these features, or is missing")
        return image

    def _sum(self, digest: str, image: ImageTensors) -> str:
        """Hash an image's tensors together with what they belong to -> hexadecimal SHA-256."""
        total = hashlib.sha256(f"{self._key} {digest}".encode())
        for name, tensor in sorted(image.items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return total.hexdigest()

    def _write(self, digest: str, image: ImageTensors) -> None:
        if self.folder is None:
            return
        path = self._file(self.folder, digest)
        tensors = {name: tensor.contiguous() for name, tensor in image.items()}
        content = save(tensors, {"sha256": self._sum(digest, image)})
        try:
            with written_whole(path) as temporary:
                temporary.write_bytes(content)
        except IsADirectoryError:
            pass  # it was named when it was read, and is not ours to remove
        except OSError as error:  # a full disk must not end a run that needs nothing of it
            logger.warning("image features are not kept in %s any more: %s", path.parent, error)
            self.folder = None


def _known(path: Path, status: os.stat_result) -> tuple:
    """Tell a file from another one, and from itself once it has been changed."""
    return path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _workers(device: torch.device) -> int:
    """Choose how many threads prepare images: on a CPU one, beside those that compute."""
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // Launch.of().local_size - 1))


def num_bytes(image: ImageTensors) -> int:
    """Add up the bytes of an image's tensors."""
    return sum(tensor.nbytes for tensor in image.values())


def _set_training(modules: list[nn.Module], mode: bool) -> None:
    for module in modules:
        module.training = mode


def _finite(image: ImageTensors) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in image.values())


def _noted_sum(content: bytes) -> str | None:
    """Read the SHA-256 from the header of a safetensors file that has been parsed already."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]).get("__metadata__", {}).get("sha256")


def _read_regular(path: Path) -> bytes | None:
    """Read a file that is a regular one, not through a link. None where there is none.

    Raises OSError where it cannot be read, WrongFile for anything else than a file.
    """
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):  # a pipe would wait for ever
        raise WrongFile("it is not a regular file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
