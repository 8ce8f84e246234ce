"""State what is published of base models and data sets: licences, terms, declared training data.

One table for the cards of adapters and for the report's column "may have seen". A model or a data
set that is not in it is said to be unknown. Everything in it is plain Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.model_files import EMBEDDED, looks_local


@dataclass(frozen=True)
class Source:
    """Describe a data set by its name in the field `dataset`, or the beginning of it.

    terms: what its licence or agreement asks of a model that is trained on it.
    """

    key: str
    title: str
    terms: str


SOURCES = (
    Source(
        "mimic",
        "MIMIC-CXR-JPG",
        "Credentialed data (PhysioNet Credentialed Health Data License and Data Use Agreement)."
        " It must not be shared with third parties, and that includes online services and their"
        " APIs. Settle with PhysioNet whether a model trained on it may be passed on before you"
        " upload this folder",
    ),
    Source(
        "chexpert",
        "CheXpert",
        "Stanford University Dataset Research Use Agreement: research without commercial use, no"
        " redistribution of the data",
    ),
    Source(
        "nih",
        "NIH ChestX-ray14",
        "Use without restriction, with a link to the NIH Clinical Center's download site, an"
        " acknowledgement and a citation of Wang et al., 2017",
    ),
    Source("demo-", "the demo's drawn X-rays", "Drawn by a program: no patient is in them"),
)
UNKNOWN_TERMS = "The terms of its source apply; they are not known here"


@dataclass(frozen=True)
class Base:
    """Describe a base model.

    pattern: regular expression of its name. licence: fields of a card's front matter.
    licence_text: the same for a reader. saw: keys of SOURCES that its makers declare, None where
    they declare nothing. declared: what they declare, in words. pixels_per_token: of an image whose
    number of visual tokens depends on its size, None where every image has the same number.
    """

    pattern: str
    title: str
    licence: dict[str, str]
    licence_text: str
    saw: tuple[str, ...] | None
    declared: str
    pixels_per_token: int | None
    notes: dict[str, str] = field(default_factory=dict)

    def may_have_seen(self, dataset: str) -> str:
        """Say in a few words whether the model may have seen a data set before: yes, no, unknown.

        dataset: the field `dataset` of its rows.
        """
        source = source_of(dataset)
        if source is None or self.saw is None:
            return "not declared"
        if source.key in self.notes:
            return self.notes[source.key]
        return "declared" if source.key in self.saw else "not among the declared"


_SIZED = 28 * 28  # pixels of a visual token: 2 x 2 patches of 14
_SIZED_32 = 32 * 32  # 2 x 2 patches of 16
_GOOGLE = {
    "license": "other",
    "license_name": "health-ai-developer-foundations",
    "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
}
_OURS = {"license": "unknown"}
_OURS_TEXT = "the embedded demo model; its repository has no licence yet"
_DEMO = (
    "10,000 drawn X-rays with their labels, of a mixed appearance that is neither site A's nor"
    " site B's"
)
_DEMO_SEEN = {"demo-": "the same findings and marks, other images of another appearance"}

BASES = (
    Base(
        "medgemma",
        "MedGemma",
        _GOOGLE,
        "Health AI Developer Foundations terms of use",
        ("mimic",),
        "MIMIC-CXR among other medical data (its model card)",
        None,
    ),
    Base(
        "nv-reason",
        "NV-Reason-CXR-3B",
        {"license": "other", "license_name": "nvidia-oneway-noncommercial-license"},
        "NVIDIA OneWay Non-Commercial",
        ("mimic",),
        "MIMIC-CXR; its published training example is the CheXpert test set, which its makers say"
        " they used for testing during development",
        _SIZED,
        {"chexpert": "possibly exposed: the test set is its published training example"},
    ),
    Base(
        r"qwen2\.5-vl-3b",
        "Qwen2.5-VL-3B",
        {
            "license": "other",
            "license_name": "qwen-research",
            "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
        },
        "Qwen Research License: no commercial use",
        None,
        "no list of its training data is published",
        _SIZED,
    ),
    Base(
        r"qwen3-vl-(?:2|4|8|32)b",  # the dense ones
        "Qwen3-VL",
        {"license": "apache-2.0"},
        "Apache License 2.0",
        None,
        "no list of its training data is published",
        _SIZED_32,
    ),
    Base("demo-gemma", "demo-gemma", _OURS, _OURS_TEXT, (), _DEMO, None, _DEMO_SEEN),
    Base("demo", "demo", _OURS, _OURS_TEXT, (), _DEMO, _SIZED, _DEMO_SEEN),
)


def base_facts(name: str) -> Base | None:
    """Find what is known of a base model, None for another one.

    name: as in a configuration: a hub name, a folder, or that of an embedded model.
    """
    if name in EMBEDDED:
        return next(base for base in BASES if base.pattern == name)
    known = (base for base in BASES if base.pattern not in EMBEDDED)
    wanted = hub_name(name) or name.rstrip("/").rpartition("/")[2]
    return next((base for base in known if re.search(base.pattern, wanted.casefold())), None)


_HUB_NAME = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")


def hub_name(name: str) -> str | None:
    """Return a model's name on the hub, also of a copy in its cache, None for any other text."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots(?:/|$)", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return name if _HUB_NAME.fullmatch(name) and not looks_local(name) else None


def source_of(dataset: str) -> Source | None:
    """Find what is known of a data set by the field `dataset` of its rows, None for another one."""
    return next((source for source in SOURCES if dataset.casefold().startswith(source.key)), None)


def titles_of(datasets: Iterable[str]) -> str:
    """Name data sets for a reader, each once."""
    titles = {name: (source_of(name) or Source("", name, "")).title for name in datasets}
    return ", ".join(dict.fromkeys(titles.values()))
