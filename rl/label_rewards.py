"""Compute two rewards that pay more for rare labels: `WeightedReward` and `FBetaReward`.

Eq. 3 scores an image by the share of it that is right. Over many images a label then counts by how
often it occurs, and a policy gains by no longer saying the rare ones. Macro-F1 counts each label
once. The first reward here weighs labels by their prevalence, the second scores labels, not images.

Prevalence is the share of the training images that have a label, among those whose source can
express it. Both take that of the image's own hospital, since each hospital's set has a macro-F1 of
its own, and a label can be rare at one and common at another.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from data.answers import Answer
from data.labels import Target
from rl.rewards import Reward, RewardFunction, comparable_labels, reward_of_parts

# A label of fewer images than 1 in 50 is treated as one of 1 in 50, one that was never seen too.
# Of 400 images 8 have such a label. From fewer nothing is learned, and their weight would be noise.
RAREST = 0.02

Table = Mapping[str, float]  # of a label: the share of the training images that have it


@dataclass
class WeightedReward(RewardFunction):
    """Compute Eq. 3's Jaccard index with weights, for a valid answer, and 0 otherwise.

        J_w = sum of w over predicted & true / sum of w over predicted | true

        w_l = 1/sqrt(p_l), divided by the mean over the labels

    p_l is the label's prevalence, at least `rarest`. In a sum over images a label occurs p_l times
    each. What it adds has the mean p w and the second moment p w^2, and advantages are made of
    differences, so the second moment decides who is heard. With w = 1 (Eq. 3) it is p: the common
    labels alone. With w = 1/p it is 1/p: the rare ones alone, and their few images are noise. With
    1/sqrt(p) it is 1 for every label.

    Unknown labels count as predicted with weight 1, the mean. Like Eq. 3 it asks for `Answer.valid`
    and takes both sides empty as 1. It has no length penalty.

    Answers that need no image earn little more than in Eq. 3: always No Finding the share of images
    that have it alone, always nothing the share without a label, all labels the mean over images of
    (weights of the true labels) / (weights of all).
    """

    label_frequency: Table
    by_hospital: Mapping[str, Table] = field(default_factory=dict)
    rarest: float = RAREST
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._weights: dict[str | None, dict[str, float]] = {
            name: self._weights_of(table) for name, table in self.by_hospital.items()
        }
        self._weights[None] = self._weights_of(self.label_frequency)

    def __call__(self, answer: Answer, target: Target, completion_length: int) -> Reward:
        if not answer.valid:
            return reward_of_parts(weighted_jaccard=0.0)
        weights = self._weights.get(target.hospital, self._weights[None])
        predicted, true = comparable_labels(answer, target)
        # fsum is exact in any order: a set's order differs between processes
        both = math.fsum(weights.get(label, 1.0) for label in predicted & true)
        either = math.fsum(weights.get(label, 1.0) for label in predicted | true)
        either += len(set(answer.unknown))
        return reward_of_parts(weighted_jaccard=both / either if either else 1.0)

    def _weights_of(self, table: Table) -> dict[str, float]:
        raw = {label: max(p, self.rarest) ** -0.5 for label, p in table.items()}
        mean = math.fsum(raw.values()) / len(raw) if raw else 1.0
        return {label: weight / mean for label, weight in raw.items()}


@dataclass
class FBetaReward(RewardFunction):
    """Compute what an answer adds to the F-beta of the labels that it says: macro-F's own gradient.

    Over the last images of a hospital let a label be true P times, said S times, and right TP
    times. Each answer of an image counts by its share. With b for `beta`,

        F = (1 + b^2) TP / D        D = b^2 P + S

    Saying the label once more, of an image that has it (t = 1) or not (t = 0), makes F larger by
    ((1 + b^2) (TP + t)) / (D + 1) - F = ((1 + b^2) t - F) / (D + 1). So each label that is said is
    worth

        credit = unit ((1 + b^2) t - F) / D        over labels said, of those that can be evaluated

    A right label that is rare is worth more, for its D is small. It pays to say a label from the
    chance F / (1 + b^2) on, and where F has fallen to 0 a wrong one costs nothing. That is what
    brings a silenced label back. Labels that are not said need no term: what they add to P is given
    by the image, equal for all answers of its group, and leaves the advantage.

    Counts begin with those of `prior` images of the label's prevalence, said as often as true and
    right in the share `prior_f`. So F and D are finite at the start and for a silenced label. P is
    at least what prevalence expects: a window in which few are true by chance must not raise their
    price.

    unit = (1 + b^2) (n + prior) mean(p) / (1 + b^2 - prior_f), of n images. At the start a right
    label is then worth mean(p) / p. Over the true labels of the data the mean of that is 1, as the
    best of Eq. 3 is, so learning rate and beta of Eq. 2 mean what they meant.

    right, wrong   the credits of the labels said that are true, and that are not
    unknown        each entry that is no label costs as much as a wrong label of the mean prevalence
                   at the start
    format         `invalid_penalty` for an answer that is not `Answer.valid`, and nothing else.
                   What is trained on is never less: no valid answer is worth less than an invalid

    Answers that need no image earn hardly anything. With No Finding in 44 % of the images, 13
    findings in 8 % each, F1, and a large window that knows the policy: always No Finding earns 0.03
    an image, all labels 0.05, always nothing 0, always right 0.99. In Eq. 3 always No Finding
    earns 0.44 of 1.
    """

    label_frequency: Table
    by_hospital: Mapping[str, Table] = field(default_factory=dict)
    beta: float = 1.0  # above 1, finding a label counts more than not claiming it wrongly
    window: int = 400  # images, those of monitors.py
    prior: float = 50.0  # images
    prior_f: float = 0.5  # of macro-F1 0.4 to 0.6, with which GRPO begins
    invalid_penalty: float = 1.0  # a typical right label
    rarest: float = RAREST
    scale: float = 1.0

    def __post_init__(self) -> None:
        self._images: deque[_Image] = deque(maxlen=self.window)
        self._known: dict[str | None, dict[str, tuple[float, float]]] = {}

    def __call__(self, answer: Answer, target: Target, completion_length: int) -> Reward:
        if not answer.valid:
            return reward_of_parts(right=0.0, wrong=0.0, unknown=0.0, format=-self.invalid_penalty)
        predicted, true = comparable_labels(answer, target)
        worth = {label: self.worth(label, target.hospital) for label in predicted}
        typical = self.prior_f / (1 + self.beta**2 - self.prior_f)
        return reward_of_parts(
            right=math.fsum(worth[label][0] for label in predicted & true),
            wrong=-math.fsum(worth[label][1] for label in predicted - true),
            unknown=-typical * len(set(answer.unknown)),
            format=0.0,
        )

    def scaled(self, reward: Reward) -> float:
        return self.scale * max(reward.total, -self.invalid_penalty)

    def worth(self, label: str, hospital: str | None = None) -> tuple[float, float]:
        """Return what a right one of a label is worth at a hospital, and what a wrong one costs."""
        known = self._known.setdefault(hospital, {})
        if label not in known:
            known[label] = self._worth(label, hospital)
        return known[label]

    def _worth(self, label: str, hospital: str | None) -> tuple[float, float]:
        known = hospital in self.by_hospital  # of another, as in an evaluation, all images count
        table = self.by_hospital[hospital or ""] if known else self.label_frequency
        shares = [max(p, self.rarest) for p in table.values()]
        p = max(table.get(label, 0.0), self.rarest)
        seen = [
            image
            for image in self._images
            if label in image.evaluated and (not known or image.hospital == hospital)
        ]
        said = math.fsum(image.said.get(label, 0.0) for image in seen)
        right = math.fsum(image.said.get(label, 0.0) for image in seen if label in image.true)
        true = sum(label in image.true for image in seen)

        both = 1 + self.beta**2
        before = self.prior * p
        tp = right + self.prior_f * before
        d = self.beta**2 * (max(true, len(seen) * p) + before) + said + before
        f = both * tp / d
        mean = math.fsum(shares) / len(shares) if shares else p
        unit = both * (len(seen) + self.prior) * mean / (both - self.prior_f)
        return unit * (both - f) / d, unit * f / d

    def observe(
        self,
        answers: Iterable[Answer],
        groups: Iterable[int] | None = None,
        targets: Iterable[Target] | None = None,
    ) -> None:
        # Without targets there is nothing to count: the window stays as it is.
        if targets is None:
            return
        answers, images = list(answers), dict[int, tuple[Target, list[Answer]]]()
        groups = range(len(answers)) if groups is None else groups
        for answer, image, target in zip(answers, groups, targets, strict=True):
            images.setdefault(image, (target, []))[1].append(answer)
        self._images.extend(_Image.of(*one) for one in images.values())
        self._known.clear()

    def state_dict(self) -> dict:
        return {"images": [image.record() for image in self._images]}

    def load_state_dict(self, state: dict) -> None:
        self._images = deque((_Image(*image) for image in state["images"]), maxlen=self.window)
        self._known.clear()


@dataclass(frozen=True)
class _Image:
    """Hold what the window keeps of an image.

    evaluated, true: its labels. said: {label: the share of its answers that say it}.
    """

    hospital: str | None
    evaluated: list[str]
    true: list[str]
    said: dict[str, float]

    @classmethod
    def of(cls, target: Target, answers: list[Answer]) -> _Image:
        counts = {
            label: sum(label in answer.labels for answer in answers) / len(answers)
            for label in sorted({label for answer in answers for label in answer.labels})
        }
        evaluated, true = target.evaluated_labels, target.labels & target.evaluated_labels
        said = {label: share for label, share in counts.items() if label in evaluated}
        return cls(target.hospital, sorted(evaluated), sorted(true), said)

    def record(self) -> list:
        """Write it as JSON can hold it."""
        return [self.hospital, self.evaluated, self.true, self.said]
