"""Draw the order of the training examples, for both run scripts: a function of seed and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from data.examples import Example
from data.hospitals import Hospital, positions


def shuffled(count: int, epoch: int, seed: int) -> list[int]:
    """Shuffle the indices of `count` examples for one epoch.

    The order depends on seed and epoch alone, so a resume needs no position of a loader.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


class Order:
    """Say which example stands at a position of the run, from the seed and the position alone.

    An epoch has as many positions as there are examples. `data.hospitals.positions` says how many
    of them are each hospital's. A hospital fills its own with its own examples, pass after pass
    through them, each pass in another order, and goes on in the next epoch where it stopped. Then
    the positions of the epoch are shuffled. So an example of a hospital comes at most once more
    than another of it, however long the run is.

    A hospital with a position for each of its examples needs no order of its own: the epoch is
    shuffled as a whole. So one hospital has the order of `shuffled`, and files of several without
    weights that of one file with all their rows.
    """

    def __init__(self, examples: Sequence[Example], weights: Mapping[str, float], seed: int):
        """Share the positions out. weights: {hospital: weight}, {} for one position an example.

        Raises DataError for a hospital that would get no position.
        """
        self.examples, self.seed = examples, seed
        self._own: dict[Hospital, list[int]] = {}  # indices of each hospital's examples
        for index, example in enumerate(examples):
            self._own.setdefault(example.hospital, []).append(index)
        self.counts = positions({name: len(own) for name, own in self._own.items()}, weights)
        self._epochs: dict[int, list[int]] = {}  # the last one, which a loop asks for again

    def epoch(self, number: int) -> list[int]:
        """List the indices of the examples of an epoch, in their order. number: from 0."""
        if number not in self._epochs:
            places = [index for name in self._own for index in self._examples_of(name, number)]
            order = shuffled(len(places), number, self.seed)
            self._epochs = {number: [places[place] for place in order]}
        return self._epochs[number]

    def of_step(self, step: int, steps_per_epoch: int, size: int) -> list[Example]:
        """List the examples of a step (from 0) of so many. The last of an epoch may have fewer."""
        epoch, place = divmod(step, steps_per_epoch)
        return [self.examples[i] for i in self.epoch(epoch)[place * size : (place + 1) * size]]

    def _examples_of(self, hospital: Hospital, epoch: int) -> list[int]:
        """List the examples that a hospital fills its positions of an epoch with."""
        own, count = self._own[hospital], self.counts[hospital]
        if count == len(own):
            return own
        rank = list(self._own).index(hospital)
        passes: dict[int, list[int]] = {}
        chosen = []
        for draw in range(epoch * count, (epoch + 1) * count):  # draws since the run began
            number, place = divmod(draw, len(own))
            if number not in passes:
                passes[number] = _pass(len(own), number, rank, self.seed)
            chosen.append(own[passes[number][place]])
        return chosen


def _pass(count: int, number: int, hospital: int, seed: int) -> list[int]:
    """Shuffle the indices of a hospital's examples for one of its passes, as no other is.

    number: of the pass, from 0. hospital: its place among the hospitals.

    The seed is a hash of all three numbers: torch's CPU generator keeps 32 bits of it only.
    """
    words = np.random.SeedSequence(seed, spawn_key=(hospital, number)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(words[0]))
    return torch.randperm(count, generator=generator).tolist()
