"""Make the tables of the transfer study from its cells, as transfer/PLAN.md says.

    python tests/benchmarks/transfer_tables.py      # prints them; no model is needed

Every number is made anew from the answers in transfer/cells and transfer/truth.json.

Shapes: S seeds, N images of a set, K labels, R resamples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one
import numpy as np
from scipy import stats
from transfer_cells import PLACE, Answers, Truth, read_cell, read_truth, unpack

from data.labels import LABELS, NIH_NINE, NO_FINDING, silenced_labels
from eval.paired import holm
from eval.probabilities import auroc

HOME, RANDOM_MARKS, ABROAD = SETS = ("study-a", "study-a2", "study-b")
SHARED = np.array([label in NIH_NINE for label in LABELS])  # labels that every set evaluates
RESAMPLES, RESAMPLING_SEED = 2_000, 17
ALPHA = 0.05
NOTHING = 0.02  # a difference whose intervals lie within this is none
BASE, SFT, VOTE, GRPO = "base", "sft", "sft-vote", "grpo-hard"
ARMS = {
    BASE: "base",
    SFT: "SFT",
    VOTE: "SFT, vote of 4",
    "more-sft": "SFT + more SFT",
    GRPO: "GRPO, hard",
    "grpo-nuanced": "GRPO, nuanced",
    "grpo-weighted": "GRPO, weighted",
    "grpo-both": "GRPO on both sites",
    "interpolated": "GRPO, interpolated",
    "grpo-stopped": "GRPO, stopped on the gap",
}
REMEDIES = tuple(arm for arm in ARMS if arm not in (BASE, GRPO))


# ---- scores of one arm, seed and set -------------------------------------------------------------
@dataclass(frozen=True)
class Scored:
    """Hold what one model's answers to one set count to, image by image.

    hits, said [N, 14]: labels rightly said, and said, by the answer that is scored. true [N, 14].
    All are among the labels that the set evaluates. rewards [N]: Eq. 3 without its length term, a
    mean over the samples. shares [N, 14]: share of the samples that say a label.
    """

    hits: np.ndarray
    said: np.ndarray
    true: np.ndarray
    rewards: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, scored: Answers, samples: Sequence[Answers], truth: Truth) -> Scored:
        """Count the answers that F1 is made of, and the samples that reward and AUROC are."""
        said = scored.said & truth.evaluated
        true = truth.true & truth.evaluated
        return cls(
            hits=(said & true).astype(float),
            said=said.astype(float),
            true=true.astype(float),
            rewards=np.mean([hard_rewards(sample, truth) for sample in samples], axis=0),
            shares=np.mean([sample.said for sample in samples], axis=0),
        )


def hard_rewards(answers: Answers, truth: Truth) -> np.ndarray:
    """Compute Eq. 3 without its length term for N answers -> [N], as `HardReward` does.

    The Jaccard index of labels, with unknown entries in the union. 0 for an invalid answer.
    """
    said, true = answers.said & truth.evaluated, truth.true & truth.evaluated
    both, either = (said & true).sum(1), (said | true).sum(1) + answers.unknown
    index = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return np.where(answers.valid, index, 0.0)


def vote(samples: Sequence[Answers]) -> Answers:
    """Make one answer of several: the labels that at least half of them say."""
    said = np.mean([sample.said for sample in samples], axis=0) >= 0.5
    valid = np.mean([sample.valid for sample in samples], axis=0) >= 0.5
    return Answers(said, valid, np.zeros(len(said), dtype=int))


Measure = Callable[[Scored, np.ndarray], np.ndarray]  # (scored, weights [R, N]) -> [R]


def reward(scored: Scored, weights: np.ndarray) -> np.ndarray:
    """Average the rewards of weighted images."""
    return weights @ scored.rewards / weights.sum(1)


def macro_f1(scored: Scored, weights: np.ndarray, labels: np.ndarray = SHARED) -> np.ndarray:
    """Average F1 over labels, 0 for one that is neither said nor true. labels [14] bool."""
    hits, sizes = _totals(scored, weights, labels)
    return np.divide(2 * hits, sizes, out=np.zeros_like(hits), where=sizes > 0).mean(1)


def micro_f1(scored: Scored, weights: np.ndarray, labels: np.ndarray = SHARED) -> np.ndarray:
    """Compute F1 of all labels together. labels [14] bool."""
    hits, sizes = (part.sum(1) for part in _totals(scored, weights, labels))
    return np.divide(2 * hits, sizes, out=np.zeros_like(hits), where=sizes > 0)


def macro_auroc(scored: Scored, labels: np.ndarray = SHARED) -> float:
    """Average over labels how well the vote shares rank the images. labels [14] bool."""
    areas = []
    for k in np.flatnonzero(labels):
        _, place = np.unique(scored.shares[:, k], return_inverse=True)
        is_true = scored.true[:, k] > 0
        areas.append(auroc(np.bincount(place, is_true), np.bincount(place, ~is_true)))
    return float(np.nanmean(areas)) if not np.isnan(areas).all() else np.nan


def _totals(
    scored: Scored, weights: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    hits = weights @ scored.hits[:, labels]
    return hits, weights @ (scored.said + scored.true)[:, labels]


# ---- comparisons ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Comparison:
    """Name a difference of scores: terms (factor, arm, set), each a mean over the seeds."""

    title: str
    terms: tuple[tuple[float, str, str], ...]
    measure: Measure = macro_f1

    @classmethod
    def of_arms(
        cls, arm: str, start: str, data_set: str, measure: Measure = macro_f1
    ) -> Comparison:
        """Compare two arms on the same images."""
        title = f"{ARMS[arm]} - {ARMS[start]}"
        return cls(title, ((1, arm, data_set), (-1, start, data_set)), measure)


# family: (what it asks, its comparisons). Holm's correction is made within a family.
FAMILIES: dict[str, tuple[str, tuple[Comparison, ...]]] = {
    "L": (
        "Is transfer lost? Macro-F1 of the nine shared labels, but for L3",
        (
            Comparison("L1 SFT: A2 - A", ((1, SFT, RANDOM_MARKS), (-1, SFT, HOME))),
            Comparison("L2 SFT: B - A", ((1, SFT, ABROAD), (-1, SFT, HOME))),
            Comparison(
                "L3 GRPO, hard - SFT: A, sampled reward",
                ((1, GRPO, HOME), (-1, SFT, HOME)),
                reward,
            ),
            Comparison(
                "L4 GRPO, hard - SFT: A2", ((1, GRPO, RANDOM_MARKS), (-1, SFT, RANDOM_MARKS))
            ),
            Comparison("L5 GRPO, hard - SFT: B", ((1, GRPO, ABROAD), (-1, SFT, ABROAD))),
            Comparison(
                "L6 GRPO, hard - SFT: A2 - A",
                (
                    (1, GRPO, RANDOM_MARKS),
                    (-1, SFT, RANDOM_MARKS),
                    (-1, GRPO, HOME),
                    (1, SFT, HOME),
                ),
            ),
            Comparison(
                "L7 GRPO, hard - SFT: B - A",
                ((1, GRPO, ABROAD), (-1, SFT, ABROAD), (-1, GRPO, HOME), (1, SFT, HOME)),
            ),
        ),
    ),
    "R": (
        "Which remedy helps abroad? Site B, macro-F1 of the nine labels",
        tuple(Comparison.of_arms(arm, GRPO, ABROAD) for arm in REMEDIES),
    ),
    "M": (
        "Which remedy helps where marks mean nothing? Site A2, macro-F1 of the nine shared labels",
        tuple(Comparison.of_arms(arm, GRPO, RANDOM_MARKS) for arm in REMEDIES),
    ),
    "C": (
        "What does it cost at home? Site A, sampled reward",
        tuple(Comparison.of_arms(arm, GRPO, HOME, reward) for arm in REMEDIES),
    ),
}


@dataclass(frozen=True)
class Result:
    """Hold a comparison's difference with both intervals of 95 % and its p-value."""

    difference: float
    by_image: tuple[float, float]  # seeds as they are, images drawn anew
    by_seed: tuple[float, float]  # images as they are, Student's t over the seeds
    p: float  # the larger of the two
    by_each: tuple[float, ...]  # one difference a seed

    def verdict(self, adjusted_p: float) -> str:
        """Call it gain, loss, none or open, by the rule of the plan."""
        bounds = (*self.by_image, *self.by_seed)
        if adjusted_p < ALPHA and min(bounds) > 0:
            return "gain"
        if adjusted_p < ALPHA and max(bounds) < 0:
            return "loss"
        return "none" if max(map(abs, bounds)) < NOTHING else "open"


class Study:
    """Read the cells of some seeds, and score and compare their arms."""

    def __init__(self, seeds: Sequence[int], place: Path = PLACE) -> None:
        self.seeds, self.place = tuple(seeds), place
        self.truth = read_truth(place)
        self.scored, self.compare = cache(self._scored), cache(self._compare)

    def _scored(self, arm: str, seed: int, data_set: str) -> Scored:
        source = SFT if arm == VOTE else arm
        cell = read_cell(source, None if arm == BASE else seed, self.place)
        if cell is None:
            raise FileNotFoundError(f"the cell {source} of seed {seed} is not made yet")
        answers = cell["answers"][data_set]
        samples = [unpack(text) for text in answers["samples"]]
        if arm == VOTE:
            voted = vote(samples)
            of_vote = Scored.of(voted, [voted], self.truth[data_set])
            shares = self.scored(SFT, seed, data_set).shares
            return Scored(of_vote.hits, of_vote.said, of_vote.true, of_vote.rewards, shares)
        return Scored.of(unpack(answers["greedy"]), samples, self.truth[data_set])

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Draw the images of each set anew -> {set: [R, N]}, the same for all arms and seeds."""
        rng = np.random.default_rng(RESAMPLING_SEED)
        sizes = {name: len(self.truth[name].true) for name in SETS}
        return {
            name: rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES).astype(float)
            for name, size in sizes.items()
        }

    def values(self, comparison: Comparison, drawn: bool) -> np.ndarray:
        """Compute a comparison seed by seed -> [S, R], R = 1 where nothing is drawn anew."""
        rows = []
        for seed in self.seeds:
            total = np.zeros(RESAMPLES if drawn else 1)
            for factor, arm, name in comparison.terms:
                scored = self.scored(arm, seed, name)
                weights = self.weights[name] if drawn else np.ones((1, len(scored.true)))
                total += factor * comparison.measure(scored, weights)
            rows.append(total)
        return np.array(rows)

    def judged(self, comparisons: Sequence[Comparison]) -> list[tuple[Result, float]]:
        """Compare, and correct the p-values for the number of comparisons by Holm's method."""
        results = [self.compare(comparison) for comparison in comparisons]
        return list(zip(results, holm([result.p for result in results]), strict=True))

    def _compare(self, comparison: Comparison) -> Result:
        """Compute a comparison with its intervals."""
        each = self.values(comparison, drawn=False)[:, 0]
        drawn = self.values(comparison, drawn=True).mean(0)
        below, above = (drawn <= 0).sum(), (drawn >= 0).sum()
        p_image = min(1.0, 2 * (1 + min(below, above)) / (1 + RESAMPLES))
        by_seed, p_seed = student(each)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Result(
            difference=float(each.mean()),
            by_image=(float(low), float(high)),
            by_seed=by_seed,
            p=max(p_image, p_seed),
            by_each=tuple(each.tolist()),
        )


def student(values: np.ndarray) -> tuple[tuple[float, float], float]:
    """Compute the 95 % interval of a mean by Student's t, and the two-sided p of mean 0.

    Fewer than two values give an unbounded interval and p 1.
    """
    if len(values) < 2:
        return (-np.inf, np.inf), 1.0
    error = values.std(ddof=1) / np.sqrt(len(values))
    reach = stats.t.ppf(0.975, len(values) - 1) * error
    mean = values.mean()
    p = 2 * stats.t.sf(abs(mean) / error, len(values) - 1) if error > 0 else float(mean == 0)
    return (float(mean - reach), float(mean + reach)), float(p)


# ---- tables --------------------------------------------------------------------------------------
MEASURES = (
    "reward, T 0.8",
    "micro-F1, all",
    "macro-F1, all",
    "micro-F1, nine",
    "macro-F1, nine",
    "AUROC, nine",
    "silenced",
)
CONSTANT = f'always "{NO_FINDING}"'


def levels(scored: Scored, evaluated: np.ndarray) -> list[float]:
    """Compute the MEASURES of one model on one set. evaluated [14] bool: labels of the set."""
    once = np.ones((1, len(scored.true)))
    return [
        reward(scored, once)[0],
        micro_f1(scored, once, evaluated)[0],
        macro_f1(scored, once, evaluated)[0],
        micro_f1(scored, once)[0],
        macro_f1(scored, once)[0],
        macro_auroc(scored),
        len(silenced(scored, evaluated)),
    ]


def arm_levels(study: Study, data_set: str) -> dict[str, np.ndarray]:
    """Compute MEASURES of one set -> {title: [7]}, of arms (means over seeds) and of CONSTANT."""
    truth = study.truth[data_set]
    rows = {
        title: np.mean(
            [levels(study.scored(arm, seed, data_set), truth.evaluated) for seed in study.seeds],
            axis=0,
        )
        for arm, title in ARMS.items()
    }
    return rows | {CONSTANT: np.array(levels(constant(truth), truth.evaluated))}


def arm_table(study: Study, data_set: str) -> list[list[str]]:
    """Make a row for each arm, and for the constant answer: the measures of one set."""
    return [
        [title, *(f"{value:.3f}" for value in values[:-1]), f"{values[-1]:.1f}"]
        for title, values in arm_levels(study, data_set).items()
    ]


def constant(truth: Truth) -> Scored:
    """Score the answer "No Finding" to every image."""
    said = np.zeros_like(truth.true)
    said[:, LABELS.index(NO_FINDING)] = True
    answers = Answers(said, np.ones(len(said), bool), np.zeros(len(said), int))
    return Scored.of(answers, [answers], truth)


def silenced(scored: Scored, evaluated: np.ndarray) -> list[str]:
    """List the labels that the scored answers have stopped saying, by `silenced_labels`."""
    said, true = (
        dict(zip(LABELS, part.sum(0), strict=True)) for part in (scored.said, scored.true)
    )
    return silenced_labels(said, true, np.array(LABELS)[evaluated].tolist())


def family_table(study: Study, comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Make a row for each comparison of a family, with Holm's correction for their number."""
    return [
        [
            comparison.title,
            f"{result.difference:+.3f}",
            _interval(result.by_image),
            _interval(result.by_seed),
            " ".join(f"{value:+.3f}" for value in result.by_each),
            f"{p:.3f}" if p >= 0.001 else "<0.001",
            result.verdict(p),
        ]
        for comparison, (result, p) in zip(comparisons, study.judged(comparisons), strict=True)
    ]


def summary_table(study: Study) -> list[list[str]]:
    """Make a row for each arm: its levels, then how it differs from GRPO on the hard reward.

    A difference stands with the interval that holds both of its intervals, and with its verdict.
    """
    differences: dict[str, list[str]] = {ARMS[arm]: [] for arm in REMEDIES}
    for family in ("R", "M", "C"):
        judged = study.judged(FAMILIES[family][1])
        for of_arm, (result, p) in zip(differences.values(), judged, strict=True):
            bounds = (*result.by_image, *result.by_seed)
            around = _interval((min(bounds), max(bounds)))
            of_arm.append(f"{result.difference:+.3f} ({around}) {result.verdict(p)}")
    of_sets = {name: arm_levels(study, name) for name in SETS}
    reward_place, f1_place = map(MEASURES.index, ("reward, T 0.8", "macro-F1, nine"))
    shown = [(HOME, reward_place), *((name, f1_place) for name in SETS)]
    return [
        [
            title,
            *(f"{of_sets[name][title][place]:.3f}" for name, place in shown),
            *differences.get(title, [""] * 3),
        ]
        for title in of_sets[HOME]
    ]


def _interval(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:+.3f} to {bounds[1]:+.3f}"


def gap_table(study: Study) -> list[list[str]]:
    """Make a row for each arm: its loss at A2 and abroad, and how much of GRPO's loss it closes.

    The share closed is 1 - gap / GRPO's gap, given where GRPO's gap is clear by image and by seed.
    """
    arms = [arm for arm in ARMS if arm != BASE]
    gaps = {
        place: {
            arm: study.compare(Comparison("", ((1, arm, HOME), (-1, arm, place)))) for arm in arms
        }
        for place in (RANDOM_MARKS, ABROAD)
    }
    rows = []
    for arm in arms:
        cells = []
        for of_arm in gaps.values():
            result, of_grpo = of_arm[arm], of_arm[GRPO]
            clear = min(*of_grpo.by_image, *of_grpo.by_seed) > 0
            closed = f"{1 - result.difference / of_grpo.difference:.0%}" if clear else ""
            cells += [f"{result.difference:+.3f} ({_interval(result.by_image)})", closed]
        rows.append([ARMS[arm], *cells])
    return rows


def blind_table(study: Study) -> list[list[str]]:
    """Make a row for each trained arm and set that answered another patient's images."""
    rows = []
    for arm in (SFT, GRPO):
        for data_set in SETS:
            truth, own, blind = study.truth[data_set], [], []
            for seed in study.seeds:
                answers = (read_cell(arm, seed, study.place) or {})["answers"][data_set]
                own.append(hard_rewards(unpack(answers["greedy"]), truth).mean())
                blind.append(hard_rewards(unpack(answers["swapped"]), truth).mean())
            means = np.mean(own), np.mean(blind), constant(truth).rewards.mean()
            rows.append([ARMS[arm], data_set, *(f"{mean:.3f}" for mean in means)])
    return rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay a table out in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


SUMMARY = (
    "",
    "reward, A",
    "macro-F1, A",
    "A2",
    "B",
    "macro-F1 at B, less GRPO's",
    "macro-F1 at A2, less GRPO's",
    "reward at A, less GRPO's",
)
COMPARED = ("", "difference", "95 % by image", "95 % by seed", "each seed", "p, Holm", "verdict")


def tables(study: Study) -> str:
    """Write all tables in Markdown."""
    lines = ["# The transfer study: its tables", ""]
    lines += [f"Made by transfer_tables.py from the cells of seeds {_listed(study.seeds)}.", ""]
    lines += ["## In short", "", *markdown(SUMMARY, summary_table(study)), ""]
    for data_set in SETS:
        lines += [f"## {data_set}", "", *markdown(("", *MEASURES), arm_table(study, data_set)), ""]
    for letter, (question, comparisons) in FAMILIES.items():
        rows = family_table(study, comparisons)
        lines += [f"## {letter}. {question}", "", *markdown(COMPARED, rows), ""]
    header = ("", "A - A2 (by image)", "of it closed", "A - B (by image)", "of it closed")
    lines += ["## What each arm loses, macro-F1 of the nine shared labels", ""]
    lines += [*markdown(header, gap_table(study)), ""]
    header = ("", "set", "greedy reward", "from another patient's image", CONSTANT)
    lines += ["## The blind check", "", *markdown(header, blind_table(study)), ""]
    return "\n".join(lines)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def whole_seeds(seeds: Sequence[int], place: Path = PLACE) -> list[int]:
    """Return the seeds whose cells are all made."""
    own = [arm for arm in ARMS if arm not in (BASE, VOTE)]
    return [s for s in seeds if all(read_cell(arm, s, place) is not None for arm in own)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    options = parser.parse_args(arguments)
    print(tables(Study(whole_seeds(options.seeds))))


if __name__ == "__main__":
    main()
