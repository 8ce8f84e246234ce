"""Prepare the images that are looked at next, in threads, while the model computes.

    ahead.expect(examples)     they are looked at soon, in this order
    ahead.take(example)        what is prepared of its image, None where nothing is

To open, decode and resize an X-ray takes a core 42 to 161 ms, in which a GPU would wait. Pillow and
numpy let go of Python's lock meanwhile, so threads do (tests/benchmarks/images_ahead.py).

Nothing but time depends on it. A thread keeps what it has found, and whoever takes it compares the
file first. What fails in a thread leaves nothing: it is done again where the image is used, and
fails there, in the same words. A thread ends where nothing is left to prepare, or MOST images of
one call wait to be taken.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from data.examples import Example

Found = TypeVar("Found")
Place = tuple[Path, str]  # where an example's image lies

MOST = 64  # images of one call of `expect` that are prepared and not yet taken
_LAST_IMAGE = 10.0  # seconds for which the end of the process waits for one that is worked on
_all: weakref.WeakSet[ImagesAhead] = weakref.WeakSet()


@dataclass
class _Image(Generic[Found]):
    """Follow one image. found: what there is of it once it is done, None where it failed."""

    example: Example
    done: bool = False
    found: Found | None = None


class _Expected(Generic[Found]):
    """Hold the images of one call of `expect` that are not taken yet: waiting, and begun."""

    def __init__(self, waiting: OrderedDict[Place, _Image[Found]]):
        self.waiting, self.begun = waiting, dict[Place, _Image[Found]]()

    def __contains__(self, place: Place) -> bool:
        return place in self.waiting or place in self.begun

    @property
    def room(self) -> int:
        """Count the images that may be begun now."""
        return max(0, min(len(self.waiting), MOST - len(self.begun)))

    def begin(self) -> _Image[Found]:
        """Begin the next one."""
        place, image = self.waiting.popitem(last=False)
        self.begun[place] = image
        return image


class ImagesAhead(Generic[Found]):
    """Prepare images in threads. Called by one thread, which looks at the images.

    prepare(example): makes what is kept of an image, None where there is nothing to do. Called in
        threads, several at a time.
    workers: threads at most.
    """

    def __init__(self, prepare: Callable[[Example], Found | None], workers: int):
        self._prepare, self._workers = prepare, workers
        self._changed = threading.Condition()  # held where one of the following is touched
        # of each call of `expect`, the last one first: it is needed soonest
        self._expected: list[_Expected[Found]] = []
        self._threads: set[threading.Thread] = set()
        self._closed = False
        _all.add(self)

    def expect(self, examples: Iterable[Example]) -> None:
        """Begin to prepare images in their order, before those that were expected earlier.

        What is expected already keeps its place.
        """
        with self._changed:
            places = ((place_of(example), example) for example in examples)
            new = OrderedDict(
                (place, _Image[Found](example))
                for place, example in places
                if not any(place in images for images in self._expected)
            )
            if new:
                self._expected.insert(0, _Expected(new))
            self._start()

    def take(self, example: Example) -> Found | None:
        """Take what is prepared of an example's image, once. Waits where it is being worked on."""
        place, image = place_of(example), None
        with self._changed:
            images = next((images for images in self._expected if place in images), None)
            if images is None:
                return None
            if images.waiting.pop(place, None) is None:
                image = images.begun[place]
                while not image.done and self._threads:
                    self._changed.wait()
                del images.begun[place]
            self._expected = [one for one in self._expected if one.waiting or one.begun]
            self._start()
        return None if image is None else image.found

    def close(self) -> None:
        """Let the threads end after the images that they work on."""
        with self._changed:
            self._closed = True
            threads = list(self._threads)
        for thread in threads:
            thread.join(_LAST_IMAGE)

    def forget_threads(self) -> None:
        """Begin anew in a process that was forked: threads stay behind, and so do their locks."""
        self._changed, self._threads = threading.Condition(), set()

    # ---- the threads -----------------------------------------------------------------------------
    def _start(self) -> None:
        """Start as many threads as there is work for."""
        room = sum(images.room for images in self._expected)
        for _ in range(min(room, self._workers - len(self._threads))):
            # a daemon: a read that hangs must not hold the end of the process
            thread = threading.Thread(target=self._work, name="images ahead", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # there is no memory for one, or no thread left
                self._threads.discard(thread)
                return

    def _work(self) -> None:
        while True:
            with self._changed:
                images = next((images for images in self._expected if images.room), None)
                if images is None or self._closed:
                    self._threads.discard(threading.current_thread())
                    return
                image = images.begin()
            # what fails is done again where the image is used, and told there
            try:
                with suppress(Exception):
                    image.found = self._prepare(image.example)
            finally:
                with self._changed:
                    image.done = True
                    self._changed.notify_all()


def place_of(example: Example) -> Place:
    """Tell where an example says that its image lies."""
    return example.image_root, example.image


@atexit.register
def _close_all() -> None:
    for ahead in list(_all):
        ahead.close()


def _forget_all_threads() -> None:
    for ahead in list(_all):
        ahead.forget_threads()


os.register_at_fork(after_in_child=_forget_all_threads)
