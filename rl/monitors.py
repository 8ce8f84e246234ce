"""Watch a run for what its reward cannot see: a collapse of the policy, and a reward that is gamed.

`Monitors.observe` takes each rollout and returns monitors/<name>, measured over a window of the
last completions. A share is a share of these completions unless it says otherwise:

    identical_text       share whose text was also given for another image
    identical_labels     share of the most frequent label set. Answers that cannot be read count as
                         one set
    label_shift          the largest of the labels' |share that name it - share of these images that
                         have it|. By label, with its sign: label_shift/<label>
    all_labels           share that name more than half of the labels that their image is evaluated
                         on
    contradiction        share with No Finding, or the label file's exclusive label, beside a
                         finding
    unknown_label        share with an entry that is none of the labels
    duplicate_label      share that name a label twice
    empty_reasoning      share whose <think> block is blank
    looping_reasoning    share whose reasoning mostly repeats its own four-word sequences
    copied_reasoning     share whose reasoning, word for word, was also given for an image with
                         other labels
    padding              mean share of a completion's tokens that are blank or filler: white space,
                         and words or phrases said over and over (engine/text_length.py)
    truncated            share cut at max_completion_length
    length_to_cap        mean length as a share of max_completion_length
    distinct_per_group   mean share of different texts among a prompt's completions
    entropy              nats a token, estimated from the sampled tokens' own log-probabilities, at
                         the sampling temperature
    entropy_drop         by what share the entropy has fallen since the start

These are over the last IMAGES images, where an image's completions count together as one:

    silenced_labels      number of labels that at least 10 of these images have and that are said
                         less than a quarter as often. A warning comes for each such
                         label, once a run, and names all that are silent then
    said_ratio/<label>   (times said + 1) / (times true + 1), for each label that occurs. The 1
                         keeps a label that is hardly ever true near a ratio of 1

These compare with the start, in standard deviations of the start, so that they fit one chart:

    trained_gain         change of the mean of the reward trained on
    other_gain           mean change of the other rewards, none of which is trained on
    f1_gain              change of the mean F1 of a completion's labels
    hacking              trained_gain - f1_gain: what the reward has won and the labels have not

The start is the run's first full window. Nothing is returned before the window holds SETTLED
completions, and nothing of the last images before there are IMAGES_SETTLED. Comparisons with the
start are returned once the start is complete.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.answers import Answer
from data.labels import CHEXPERT, LabelSet, Target, metric_name, silenced_labels
from rl.conditions import Watch

if TYPE_CHECKING:  # at run time it would import torch, and flags are checked without it
    from rl.samples import Sample
    from rl.settings import GRPOConfig

WINDOW = 200  # completions, also of the start
SETTLED = 50
# A label of 5 % of the images is true in 20 of so many. With fewer, chance alone silences rare
# labels: tests/benchmarks/false_alarms.py.
IMAGES, IMAGES_SETTLED = 400, 100
SILENCED = "monitors/silenced_labels"
NGRAM, LOOP_WORDS = 4, 20  # loops are not looked for in reasoning of fewer words
SERIES = ("trained", "f1")
OTHER = "other/"  # begins the name of the series of a reward that is not trained on
FROM_THE_START = ("entropy_drop", "hacking", *(f"{name}_gain" for name in (*SERIES, "other")))
OF_ALL = tuple(
    f"monitors/{name}"
    for name in (
        "identical_text",
        "identical_labels",
        "label_shift",
        "all_labels",
        "contradiction",
        "unknown_label",
        "duplicate_label",
        "empty_reasoning",
        "looping_reasoning",
        "copied_reasoning",
        "padding",
        "truncated",
        "length_to_cap",
        "distinct_per_group",
        "entropy",
        "silenced_labels",
        *FROM_THE_START,
    )
)


def shift_name(label: str) -> str:
    """Name the monitor of how far a label is said more often than it is true."""
    return f"label_shift/{metric_name(label)}"


def ratio_name(label: str) -> str:
    """Name the monitor of how often a label is said for each time that it is true."""
    return f"said_ratio/{metric_name(label)}"


def monitor_names(label_set: LabelSet) -> tuple[str, ...]:
    """List the monitors that a run with these labels logs, by their full names."""
    by_label = (name(label) for name in (shift_name, ratio_name) for label in label_set.names)
    return (*OF_ALL, *(f"monitors/{name}" for name in by_label))


# A run of the demo stays clear of each bound by a factor of 1.3 or more, but for silenced labels:
# it has some.
WARN_WHEN = tuple(
    f"monitors/{condition}"
    for condition in (
        "identical_text>0.5",
        "identical_labels>0.75",
        "label_shift>0.4",
        "all_labels>0.3",
        "contradiction>0.1",
        "unknown_label>0.1",
        "duplicate_label>0.5",
        "empty_reasoning>0.2",
        "looping_reasoning>0.2",
        "copied_reasoning>0.35",
        "padding>0.2",
        "silenced_labels>0",
        "truncated>0.3",
        "distinct_per_group<0.3",
        "entropy_drop>0.6",
        "hacking>0.75",
    )
)


class Monitors:
    """Measure one run's monitors, and check the conditions on them and on all other metrics."""

    def __init__(
        self,
        trained_reward: str,
        max_completion_length: int,
        warn_when: Sequence[str] = (),
        stop_when: Sequence[str] = (),
        label_set: LabelSet = CHEXPERT,
        mixed: Collection[str] = (),
    ):
        """Begin with empty windows. mixed: the rewards in a mixture that is trained on."""
        self.label_set = label_set
        self.is_trained = {trained_reward, *mixed}
        self.trained_reward, self.max_completion_length = trained_reward, max_completion_length
        self.warnings, self.stops = Watch(warn_when), Watch(stop_when)
        self.window: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self.labels = LabelWindow(label_set)
        self.silenced: list[str] = []  # labels found so since the last check
        self.num_seen = 0
        self.start: dict[str, tuple[float, float]] = {}  # series -> mean, standard deviation
        self.stopped: str | None = None  # the condition that ended the run

    @classmethod
    def of(cls, config: GRPOConfig) -> Monitors:
        """Make the monitors that a run's settings ask for."""
        return cls(
            config.trained_reward,
            config.max_completion_length,
            config.warn_when,
            config.stop_when,
            config.label_set,
            config.reward_choice.weights,
        )

    def observe(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Take in one rollout, once, and return the monitors."""
        start = self.num_seen
        self._observe_labels(samples)
        for sample in samples:
            fact = _facts(sample, f"{start}/{sample.group}", self.trained_reward)
            totals = {name: reward.total for name, reward in sample.rewards.items()}
            fact["others"] = {name: totals[name] for name in totals if name not in self.is_trained}
            self.window.append(fact)
            self.num_seen += 1
            if self.num_seen == WINDOW:
                self.start = {
                    name: _mean_and_std([fact[name] for fact in self.window])
                    for name in ("entropy", *SERIES)
                } | {
                    f"{OTHER}{name}": _mean_and_std([fact["others"][name] for fact in self.window])
                    for name in fact["others"]
                }
        if len(self.window) < SETTLED:
            return {}
        values = self._now() | self.labels.metrics() | self._since_the_start()
        return {f"monitors/{name}": value for name, value in values.items()}

    def _observe_labels(self, samples: Sequence[Sample]) -> None:
        """Count the labels of a rollout, and note which are silenced."""
        groups: dict[int, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(sample.group, []).append(sample)
        for of_image in groups.values():
            self.labels.add(of_image[0].example.target, [sample.answer for sample in of_image])
        silenced = {*self.silenced, *self.labels.silenced()}
        self.silenced = list(self.label_set.ordered(silenced))

    def check(self, metrics: Mapping[str, float | None]) -> list[str]:
        """Return lines to show for these metrics, as they were logged.

        Sets `stopped` where the run has to end.
        """
        named = {SILENCED: self.silenced}
        lines = [f"warning: {line}" for line in self.warnings.check(metrics, named)]
        stops = self.stops.check(metrics, named)
        if SILENCED in metrics:
            self.silenced = []
        if stops:
            self.stopped = stops[0]
        return lines + [f"stopping: {line}" for line in stops]

    def _now(self) -> dict[str, float]:
        facts, total = list(self.window), len(self.window)

        def share(name: str) -> float:
            return sum(fact[name] for fact in facts) / total

        images = _others(facts, "text", "image")
        truths = _others([fact for fact in facts if fact["reasoning"]], "reasoning", "true")
        groups: dict[str, list[str]] = {}
        for fact in facts:
            groups.setdefault(fact["group"], []).append(fact["text"])
        label_sets = Counter(tuple(fact["said"]) if fact["parsed"] else None for fact in facts)
        shifts = {
            shift_name(label): shift
            for label in self.label_set.names
            if (shift := _shift(facts, label)) is not None
        }
        return {
            "identical_text": sum(len(images[fact["text"]]) > 1 for fact in facts) / total,
            "identical_labels": max(label_sets.values()) / total,
            "label_shift": max(map(abs, shifts.values()), default=0.0),
            **shifts,
            **{
                name: share(name)
                for name in (
                    "all_labels",
                    "contradiction",
                    "unknown_label",
                    "duplicate_label",
                    "empty_reasoning",
                    "looping_reasoning",
                    "padding",
                )
            },
            "copied_reasoning": (
                sum(len(truths[fact["reasoning"]]) > 1 for fact in facts if fact["reasoning"])
                / total
            ),
            "truncated": share("truncated"),
            "length_to_cap": share("length") / self.max_completion_length,
            "distinct_per_group": (
                sum(len(set(texts)) / len(texts) for texts in groups.values()) / len(groups)
            ),
            "entropy": share("entropy"),
        }

    def _since_the_start(self) -> dict[str, float]:
        if not self.start:
            return {}
        gains = {
            f"{name}_gain": self._gain(name, [f[name] for f in self.window]) for name in SERIES
        }
        # a window of an earlier version has fewer rewards
        known = [name for name in self.window[0]["others"] if f"{OTHER}{name}" in self.start]
        others = [
            self._gain(f"{OTHER}{name}", [fact["others"][name] for fact in self.window])
            for name in known
        ]
        entropy = self.start["entropy"][0]
        now = sum(fact["entropy"] for fact in self.window) / len(self.window)
        return gains | {
            "other_gain": sum(others) / len(others) if others else 0.0,
            "hacking": gains["trained_gain"] - gains["f1_gain"],
            "entropy_drop": 1 - now / entropy if entropy > 0 else 0.0,
        }

    def _gain(self, name: str, values: Sequence[float]) -> float:
        """Say by how many standard deviations of the start a mean has changed since."""
        mean, deviation = self.start[name]
        return (sum(values) / len(values) - mean) / deviation if deviation else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON can hold it."""
        return {
            "window": list(self.window),
            "labels": self.labels.state_dict(),
            "silenced": self.silenced,
            "num_seen": self.num_seen,
            "start": self.start,
            "stopped": self.stopped,
            "warnings": self.warnings.state_dict(),
            "stops": self.stops.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint.

        A run that a condition had ended may continue where that condition is no longer asked for.
        """
        window, start = list(state["window"]), dict(state["start"])
        if any("other" in fact for fact in window):  # of an earlier version, which had two rewards
            other = "nuanced" if self.trained_reward == "hard" else "hard"
            window = [fact | {"others": {other: fact["other"]}} for fact in window]
            start |= {f"{OTHER}{other}": start["other"]} if "other" in start else {}
        self.window = deque(window, maxlen=WINDOW)
        self.labels.load_state_dict(state["labels"])
        self.silenced = list(state["silenced"])
        self.num_seen = state["num_seen"]
        self.start = {name: tuple(values) for name, values in start.items()}
        self.warnings.load_state_dict(state["warnings"])
        self.stops.load_state_dict(state["stops"])
        stopped = state["stopped"] or ""
        asked_for = any(stopped.startswith(f"{text}: ") for text in self.stops.held)
        self.stopped = stopped if asked_for else None


# ---- the labels of the last images ---------------------------------------------------------------
class LabelWindow:
    """Count how often each label is said and is true over the last IMAGES images."""

    def __init__(self, label_set: LabelSet = CHEXPERT) -> None:
        self.label_set = label_set
        # of each image: the labels that it has, and by label the share of its answers that say it
        self.images: deque[tuple[list[str], dict[str, float]]] = deque(maxlen=IMAGES)

    def add(self, target: Target, answers: Sequence[Answer]) -> None:
        """Take in one image with all its answers. One that cannot be read says nothing."""
        said = Counter(
            label
            for answer in answers
            for label in target.evaluated_labels.intersection(answer.labels)
        )
        true = target.labels & target.evaluated_labels
        self.images.append(
            (
                list(self.label_set.ordered(true)),
                {label: said[label] / len(answers) for label in self.label_set.ordered(said)},
            )
        )

    def counts(self) -> tuple[dict[str, float], dict[str, int]]:
        """Count, of the images in the window, {label: how often said}, {label: how often true}."""
        names = self.label_set.names
        said, true = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for labels, shares in self.images:
            for label in labels:
                true[label] += 1
            for label, share in shares.items():
                said[label] += share
        return said, true

    def silenced(self) -> list[str]:
        """List the labels that have fallen silent. None before IMAGES_SETTLED images are seen."""
        if len(self.images) < IMAGES_SETTLED:
            return []
        return silenced_labels(*self.counts(), self.label_set.names)

    def metrics(self) -> dict[str, float]:
        """Return silenced_labels and said_ratio/<label> once IMAGES_SETTLED images are seen."""
        if len(self.images) < IMAGES_SETTLED:
            return {}
        said, true = self.counts()
        return {"silenced_labels": float(len(self.silenced()))} | {
            ratio_name(label): (said[label] + 1) / (true[label] + 1)
            for label in self.label_set.names
            if said[label] or true[label]
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the window as JSON can hold it."""
        return {"images": list(self.images)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a `state_dict()`."""
        self.images = deque(((true, said) for true, said in state["images"]), maxlen=IMAGES)


# ---- one completion ------------------------------------------------------------------------------
def _facts(sample: Sample, group: str, trained_reward: str) -> dict[str, Any]:
    """Collect all that the window keeps of a completion, texts as hashes."""
    answer, target = sample.answer, sample.example.target
    said = sorted(set(answer.labels) & target.evaluated_labels)
    words = (answer.think or "").split()
    return {
        "group": group,
        "image": "/".join(filter(None, (sample.example.hospital, sample.example.id))),
        "true": sorted(target.labels & target.evaluated_labels),
        "evaluated": sorted(target.evaluated_labels),
        "said": said,
        "parsed": answer.parsed,
        "text": _hash(sample.text),
        "reasoning": _hash(" ".join(words)) if words else None,
        "all_labels": 2 * len(said) > len(target.evaluated_labels),
        "contradiction": bool(answer.contradictions),
        "unknown_label": bool(answer.unknown),
        "duplicate_label": bool(answer.duplicates),
        "empty_reasoning": answer.think is not None and not words,
        "looping_reasoning": _loops(words),
        "padding": 1 - sample.text_length / len(sample.ids),
        "truncated": sample.truncated,
        "length": len(sample.ids),
        "entropy": -float(sample.sampling_logprobs.double().mean()),
        "trained": sample.rewards[trained_reward].total,
        "f1": _f1(answer, target),
    }


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _loops(words: Sequence[str]) -> bool:
    """Tell whether more than half of the four-word sequences have occurred before."""
    sequences = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    return len(words) >= LOOP_WORDS and 2 * len(set(sequences)) < len(sequences)


def _f1(answer: Answer, target: Target) -> float:
    """Compute 2 TP / (said + true) over the evaluated labels.

    1 where both are empty, 0 for an answer that cannot be read.
    """
    if not answer.parsed:
        return 0.0
    said = set(answer.labels) & target.evaluated_labels
    true = target.labels & target.evaluated_labels
    return 2 * len(said & true) / (len(said) + len(true)) if said or true else 1.0


# ---- the window ----------------------------------------------------------------------------------
def _others(facts: Sequence[Mapping[str, Any]], key: str, value: str) -> dict[str, set]:
    """Collect, for each fact[key], all values that it came with."""
    found: dict[str, set] = {}
    for fact in facts:
        found.setdefault(fact[key], set()).add(str(fact[value]))
    return found


def _shift(facts: Sequence[Mapping[str, Any]], label: str) -> float | None:
    """Compute the share that names the label less the share that has it, where it is evaluated.

    None where it never is.
    """
    rows = [fact for fact in facts if label in fact["evaluated"]]
    if not rows:
        return None
    return sum((label in fact["said"]) - (label in fact["true"]) for fact in rows) / len(rows)


def _mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
