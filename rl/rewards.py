"""Compute the paper's two rewards as named parts: Eq. 3 (`HardReward`) and Eq. 4 (`NuancedReward`).

Two further ones, which do not silence rare labels, are in label_rewards.py.

A reward is called as `reward(answer, target, completion_length)` and returns signed parts and their
sum. The call is pure. What a reward remembers of earlier rollouts changes only in `observe`, so
rewards can be logged, recomputed and resumed without surprise. Another reward is another subclass
of `RewardFunction`.

Both rewards look only at `target.evaluated_labels`, the labels that the image's source can express.
A predicted label outside them is ignored: it is neither right nor wrong.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from data.answers import Answer
from data.labels import LABELS, Target


@dataclass(frozen=True)
class Reward:
    """Hold a completion's reward in the reward's own units: signed parts, which sum to the total.

    `RewardFunction.scaled` makes the number that is trained on.
    """

    total: float
    parts: dict[str, float]


def rewards_record(rewards: Mapping[str, Reward]) -> dict[str, dict[str, float]]:
    """Write rewards as rows of files have them: {name: {"total", its parts}}."""
    return {name: {"total": reward.total} | reward.parts for name, reward in rewards.items()}


class RewardFunction:
    """Say what the loop asks of a reward. One without memory inherits the last three methods."""

    scale: float = 1.0  # reward units -> units of the advantage

    def __call__(self, answer: Answer, target: Target, completion_length: int) -> Reward:
        """Reward one answer.

        target: the image's labels.
        completion_length: in tokens, with the stop token. The caller counts them, by --length_of.
        """
        raise TypeError("use a subclass")

    def scaled(self, reward: Reward) -> float:
        """Return the number that advantages are computed from."""
        return self.scale * reward.total

    def observe(
        self,
        answers: Iterable[Answer],
        groups: Iterable[int] | None = None,
        targets: Iterable[Target] | None = None,
    ) -> None:
        """Remember one rollout: all its answers, in prompt order.

        The loop calls this once a rollout, and evaluation never does. It gives all three. A
        subclass whose method does not name `targets` is given the first two.

        groups: which image of the rollout each answer is about. None: each is about one of its own.
        targets: the labels of each answer's image.
        """

    def state_dict(self) -> dict:
        """Return what `observe` has gathered, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take over the state of a `state_dict()`."""


@dataclass
class Mixture(RewardFunction):
    """Add rewards up, each with a weight and as it would be trained on by itself (`scaled`).

    It computes none of them: `reward_checks.all_rewards` has them already. Its parts are theirs.
    """

    weights: Mapping[str, float]  # {name of a reward: its weight}
    scale: float = 1.0

    def of(self, scaled: Mapping[str, float]) -> Reward:
        """Mix the rewards of one completion. scaled: {name: the number of `scaled`}."""
        parts = {name: weight * scaled[name] for name, weight in self.weights.items()}
        return reward_of_parts(**parts)


def jaccard(predicted: Collection[str], true: Collection[str]) -> float:
    """Compute |predicted & true| / |predicted | true|, by convention 1 where both are empty."""
    union = set(predicted) | set(true)
    return len(set(predicted) & set(true)) / len(union) if union else 1.0


@dataclass
class HardReward(RewardFunction):
    """Compute Eq. 3: J for a valid answer, less `length_penalty` if it is short, and 0 otherwise.

    J is the Jaccard index of predicted and true labels. Unknown labels count as predicted, so they
    enlarge the union. Short means fewer than `min_length` tokens. Taken to the letter, as here, a
    short wrong answer (-length_penalty) is worth less than an invalid one (0).

    This reward asks for the strict form, `Answer.valid`, and not for `Answer.parsed`: in the right
    form, entries of which none is a label are a wrong answer like any other.
    """

    # lambda_len. Its value is not published: here, a tenth of the best reward.
    length_penalty: float = 0.1
    # Published without a unit. Counted in tokens, as |t| in Eq. 2 is.
    min_length: int = 250
    scale: float = 1.0

    def __call__(self, answer: Answer, target: Target, completion_length: int) -> Reward:
        overlap = length = 0.0
        if answer.valid:
            predicted, true = comparable_labels(answer, target)
            overlap = jaccard(predicted.union(answer.unknown), true)
            length = -self.length_penalty if completion_length < self.min_length else 0.0
        return reward_of_parts(jaccard=overlap, length=length)


@dataclass
class NuancedReward(RewardFunction):
    """Compute Eq. 4, in points: match + partial - false_positive - collapse - format.

    match           100 if the predicted labels are the true ones
    partial         30 TP/|true| + 20 TP/|predicted|, also for a match, so an exact answer is
                    worth 150
    false_positive  for each label predicted and not true, points that grow with the label's share
                    of the training data: of its own hospital's where there are several
    collapse        for an answer that contains a dominant label: 50, and 30 for each dominant
                    label in it. A label is dominant when more than 70 % of the predictions for the
                    last 100 images contain it
    format          100 for each unknown label and 25 for each repeated one, both of which then
                    count for nothing else. 25 where the answer can be read but is not in the
                    strict form

    This reward asks for labels that can be read, `Answer.parsed`. An answer without, also one of
    which not one entry is a label, gets `unparsed_penalty` as its format part and nothing else.
    Where no label is true and none is predicted, the answer is a match with full recall and
    precision.

    Raises ValueError for a frequency that is no share of a label, and for a window that can never
    hold `min_window` images.
    """

    # Share of the training images that have each label, 0 to 1. A label that is missing has 0.
    label_frequency: dict[str, float]
    # Published as 100 predictions. Counted in images, each with all its predictions: those of one
    # image are alike, so 100 predictions of 25 images are as noisy as 25 images. A right policy
    # would then be punished for a label of 60 % in one of six windows, now in one of 68.
    window: int = 100
    # Fewer are too noisy: among 10 images a label of 45 % passes 70 % in 1 of 37 cases.
    min_window: int = 50
    dominance: float = 0.7  # published
    match_points: float = 100.0  # published
    recall_points: float = 30.0  # published
    precision_points: float = 20.0  # published
    # Not published, only that 'No Finding' and 'Support Devices' must cost more than rare findings.
    # Here a rare label costs 10, half of the precision credit. A label of half of the images costs
    # 30, all of the recall credit, so listing the common labels on chance loses more than it gains.
    false_positive_base: float = 10.0
    false_positive_slope: float = 40.0  # additional points at frequency 1
    collapse_points: float = 50.0  # published
    # 30 is published. What counts as an 'excess repetition' is not: here, each dominant label that
    # the answer repeats. Of the 14 labels that is at most 14 x 30, and 30 or 60 in practice.
    repetition_points: float = 30.0
    unknown_points: float = 100.0  # published
    duplicate_points: float = 25.0  # published
    # Published as a penalty on text outside the blocks, without a number. Here it equals the
    # mildest published penalty, a duplicate. It also applies to a missing or misplaced <think>
    # block, or leaving out the reasoning would cost nothing.
    form_points: float = 25.0
    # Not published. An unreadable answer must not be a way around the other penalties. Three labels
    # that half of the images have, all wrong and one of them dominant, lose 3 x 30 + 80 = 170.
    unparsed_penalty: float = 200.0
    # In points, before scaling: one answer with a long list of inventions must not set the scale of
    # its group.
    floor: float = -300.0
    scale: float = 0.01  # the 100 points of a match become 1, the size of the hard reward
    labels: tuple[str, ...] = LABELS  # those that there are
    # The same shares of one hospital's images, by its name. A target of another hospital, or of
    # none, has those of label_frequency.
    by_hospital: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = (self.label_frequency, *self.by_hospital.values())
        for label, frequency in (share for table in tables for share in table.items()):
            if label not in self.labels or not 0 <= frequency <= 1:
                raise ValueError(
                    f"label_frequency needs shares from 0 to 1 of the {len(self.labels)} labels,"
                    f" got {label!r}: {frequency!r}"
                )
        if self.window < self.min_window:
            raise ValueError(
                f"window {self.window} is below min_window {self.min_window}: mode collapse would"
                " never be seen"
            )
        # for each image, the labels of every prediction
        self._images: deque[list[tuple[str, ...]]] = deque(maxlen=self.window)

    def __call__(self, answer: Answer, target: Target, completion_length: int) -> Reward:
        if not answer.parsed:
            return reward_of_parts(
                match=0.0,
                partial=0.0,
                false_positive=0.0,
                collapse=0.0,
                format=-self.unparsed_penalty,
            )
        predicted, true = comparable_labels(answer, target)
        match = predicted == true
        hits = len(predicted & true)
        recall = hits / len(true) if true else float(match)
        precision = hits / len(predicted) if predicted else float(match)
        repeated = predicted & self.dominant_labels()
        return reward_of_parts(
            match=self.match_points * match,
            partial=self.recall_points * recall + self.precision_points * precision,
            # fsum is exact in any order: a set's order differs between processes, and a resumed run
            # must agree to the last bit.
            false_positive=-math.fsum(
                self._false_positive_points(label, target.hospital) for label in predicted - true
            ),
            collapse=(
                -(self.collapse_points + self.repetition_points * len(repeated))
                if repeated
                else 0.0
            ),
            format=-(
                self.unknown_points * len(answer.unknown)
                + self.duplicate_points * len(answer.duplicates)
                + self.form_points * (not answer.valid)
            ),
        )

    def scaled(self, reward: Reward) -> float:
        return self.scale * max(reward.total, self.floor)

    def dominant_labels(self) -> frozenset[str]:
        """Return the labels in more than `dominance` of the window's predictions.

        There are none while the window holds fewer than `min_window` images.
        """
        if len(self._images) < self.min_window:
            return frozenset()
        predictions = [labels for image in self._images for labels in image]
        counts = Counter(label for labels in predictions for label in labels)
        return frozenset(
            label for label, count in counts.items() if count / len(predictions) > self.dominance
        )

    def observe(
        self,
        answers: Iterable[Answer],
        groups: Iterable[int] | None = None,
        targets: Iterable[Target] | None = None,
    ) -> None:
        # An answer that could not be read predicts nothing. Counting it would hide a dominant label
        # behind format failures.
        answers, images = list(answers), dict[int, list[tuple[str, ...]]]()
        groups = range(len(answers)) if groups is None else groups
        for answer, image in zip(answers, groups, strict=True):
            if answer.parsed:
                images.setdefault(image, []).append(answer.labels)
        self._images.extend(images.values())

    def state_dict(self) -> dict:
        return {"images": [[list(labels) for labels in image] for image in self._images]}

    def load_state_dict(self, state: dict) -> None:
        self._images = deque(
            ([tuple(labels) for labels in image] for image in state["images"]), maxlen=self.window
        )

    def _false_positive_points(self, label: str, hospital: str | None) -> float:
        frequency = self.by_hospital.get(hospital or "", self.label_frequency)
        return self.false_positive_base + self.false_positive_slope * frequency.get(label, 0.0)


def comparable_labels(answer: Answer, target: Target) -> tuple[frozenset[str], frozenset[str]]:
    """Return the predicted and the true labels among those that the source can express."""
    return (
        target.evaluated_labels.intersection(answer.labels),
        target.evaluated_labels & target.labels,
    )


def reward_of_parts(**parts: float) -> Reward:
    """Make a reward of its signed parts, of which the total is the sum."""
    # + 0.0 turns -0.0, which logs would show, into 0.0.
    parts = {name: value + 0.0 for name, value in parts.items()}
    return Reward(total=sum(parts.values()), parts=parts)
