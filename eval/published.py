"""Hold the scores that ChexReason (arXiv 2512.23090v2) prints in tables 1 to 6, as data.

Beside them stands why a score may not compare.

Labels are in CheXpert's order here. The paper's tables list them by the alphabet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data.labels import LABELS, NIH_NINE

SOURCE = "ChexReason, arXiv 2512.23090v2"

# Table 1: {prompt: (micro-F1, macro-F1, fail rate)} of base MedGemma-4B.
TABLE_1: dict[str, tuple[float, float, float]] = {
    "Reasoning Narrative": (0.524, 0.270, 0.002),
    "Reasoning Self-Check": (0.514, 0.253, 0.010),
    "Reasoning Hypothesis": (0.357, 0.188, 0.022),
    "Reasoning A": (0.498, 0.245, 0.000),
    "Reasoning B": (0.427, 0.170, 0.000),
    "Reasoning C": (0.260, 0.132, 0.482),
    "Reasoning D": (0.329, 0.170, 0.000),
    "Reasoning E": (0.404, 0.218, 0.000),
    "Reasoning F": (0.269, 0.108, 0.180),
}

# Tables 2 and 3: {SFT format: (micro P, R, F1, macro P, R, F1, fail rate)} of MedGemma-4B and of
# Qwen2.5-VL-3B-Instruct.
TABLE_2: dict[str, tuple[float, ...]] = {
    "Only Label": (0.596, 0.375, 0.461, 0.332, 0.214, 0.241, 0.000),
    "Free Reasoning": (0.480, 0.365, 0.415, 0.358, 0.227, 0.253, 0.032),
    "Reasoning Narrative": (0.565, 0.281, 0.376, 0.345, 0.141, 0.180, 0.210),
    "Reasoning A": (0.405, 0.230, 0.293, 0.381, 0.143, 0.139, 0.004),
}
TABLE_3: dict[str, tuple[float, ...]] = {
    "Only Label": (0.333, 0.199, 0.249, 0.153, 0.122, 0.080, 0.000),
    "Free Reasoning": (0.200, 0.200, 0.200, 0.150, 0.142, 0.131, 0.056),
    "Reasoning Narrative": (0.396, 0.198, 0.264, 0.122, 0.076, 0.075, 0.170),
    "Reasoning A": (0.322, 0.436, 0.371, 0.194, 0.265, 0.208, 0.002),
}

# Table 4: {(reward, checkpoint): the same seven scores} of GRPO from MedGemma-4B's Free Reasoning
# SFT checkpoint.
TABLE_4: dict[tuple[str, str], tuple[float, ...]] = {
    ("nuanced", "best F1"): (0.342, 0.445, 0.387, 0.248, 0.311, 0.257, 0.020),
    ("nuanced", "last step"): (0.335, 0.424, 0.374, 0.228, 0.271, 0.232, 0.030),
    ("hard", "best F1"): (0.343, 0.455, 0.391, 0.250, 0.328, 0.258, 0.028),
    ("hard", "last step"): (0.340, 0.418, 0.375, 0.243, 0.279, 0.242, 0.018),
}

# Tables 5 and 6: {model: its F1 by label}, CheXpert test and NIH.
MODELS = ("NV-Reason", "MedGemma", "Qwen2.5", "MedGemma (SFT)", "MedGemma (ChexReason)")
_BY_LABEL_5 = {
    "Atelectasis": (0.758, 0.288, 0.354, 0.229, 0.240),
    "Cardiomegaly": (0.853, 0.627, 0.385, 0.442, 0.664),
    "Consolidation": (0.188, 0.000, 0.097, 0.205, 0.000),
    "Edema": (0.807, 0.174, 0.128, 0.385, 0.132),
    "Enlarged Cardiomediastinum": (0.879, 0.016, 0.407, 0.075, 0.000),
    "Fracture": (0.750, 0.143, 0.009, 0.150, 0.200),
    "Lung Lesion": (0.875, 0.300, 0.042, 0.211, 0.133),
    "Lung Opacity": (0.961, 0.748, 0.464, 0.161, 0.743),
    "No Finding": (0.775, 0.625, 0.318, 0.579, 0.607),
    "Pleural Effusion": (0.822, 0.634, 0.264, 0.464, 0.625),
    "Pleural Other": (0.667, 0.000, 0.026, 0.000, 0.000),
    "Pneumonia": (0.429, 0.400, 0.031, 0.143, 0.400),
    "Pneumothorax": (0.842, 0.308, 0.033, 0.179, 0.286),
    "Support Devices": (0.970, 0.808, 0.637, 0.728, 0.818),
}
_BY_LABEL_6 = {
    "Atelectasis": (0.422, 0.300, 0.000, 0.264, 0.260),
    "Cardiomegaly": (0.543, 0.482, 0.000, 0.440, 0.312),
    "Consolidation": (0.056, 0.029, 0.109, 0.200, 0.178),
    "Edema": (0.273, 0.522, 0.000, 0.526, 0.429),
    "Lung Lesion": (0.397, 0.195, 0.115, 0.113, 0.179),
    "No Finding": (0.283, 0.275, 0.215, 0.343, 0.250),
    "Pleural Other": (0.152, 0.180, 0.000, 0.248, 0.082),
    "Pneumonia": (0.000, 0.202, 0.117, 0.138, 0.182),
    "Pneumothorax": (0.552, 0.000, 0.000, 0.416, 0.317),
}


def _by_model(
    by_label: Mapping[str, tuple[float, ...]], labels: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    return {
        model: {label: by_label[label][column] for label in labels}
        for column, model in enumerate(MODELS)
    }


TABLE_5 = _by_model(_BY_LABEL_5, LABELS)
TABLE_6 = _by_model(_BY_LABEL_6, NIH_NINE)
# "Overall Average (Macro F1)" as printed. Each is the plain mean of its column, zeros kept, to
# within 0.001.
MACRO_5 = dict(zip(MODELS, (0.755, 0.362, 0.228, 0.282, 0.346), strict=True))
MACRO_6 = dict(zip(MODELS, (0.297, 0.243, 0.062, 0.299, 0.243), strict=True))


def macro_f1(by_label: Mapping[str, float], labels: Sequence[str]) -> float:
    """Average a model's published F1 over some labels, as the paper does over all of them."""
    return sum(by_label[label] for label in labels) / len(labels)


# Positives of each label among the 500 studies of CheXpert's test set (its public groundtruth.csv),
# in CheXpert's order.
CHEXPERT_TEST_STUDIES = 500
CHEXPERT_TEST_SUPPORT: dict[str, int] = dict(
    zip(LABELS, (62, 253, 151, 264, 8, 78, 29, 11, 153, 9, 104, 4, 5, 261), strict=True)
)

CHEXPERT_TEST_PATIENTS = 64741, 65240  # first and last; one study each

# Readers of CheXpert's test studies: {who: (micro-F1, macro-F1)} against the published consensus,
# computed from the repository's files as they stand. Of the labeler only macro-F1 is at hand.
READERS_SOURCE = (
    "rajpurkarlab/cheXpert-test-set-labels at commit a03eb343, computed from its files; No Finding"
    " as in the file, 62 positives"
)
CHEXPERT_READERS: dict[str, tuple[float | None, float]] = {
    "radiologist bc4": (0.749, 0.579),
    "radiologist bc6": (0.749, 0.618),
    "radiologist bc8": (0.745, 0.578),
    "CheXpert's report labeler": (None, 0.323),
    "all 14 labels of every study": (0.332, 0.291),
}

# Why a score cannot be compared in principle, by table.
VALIDATION_NOTE = (
    "Not comparable in principle: the paper's 'CheXpert validation' images are not published. Every"
    " fail rate is a multiple of 0.002, so there were probably 500; CheXpert's own validation set"
    " has 234."
)
NOTES: dict[int, tuple[str, ...]] = {
    1: (
        VALIDATION_NOTE,
        (
            "The texts of the nine prompts are not published; ours follow the design cues of the"
            " paper."
        ),
    ),
    2: (
        VALIDATION_NOTE,
        (
            "Which 2,000 MIMIC-CXR-JPG images were used for SFT is not published, and MIMIC's"
            " licence forbids passing them on."
        ),
    ),
    3: (
        VALIDATION_NOTE,
        (
            "Which 2,000 MIMIC-CXR-JPG images were used for SFT is not published, and MIMIC's"
            " licence forbids passing them on."
        ),
    ),
    4: (
        VALIDATION_NOTE,
        (
            "The paper's best checkpoint was chosen on the images that it is scored on here, which"
            " flatters it."
        ),
    ),
    5: (
        (
            "CheXpert's test labels are those of 500 studies. 32 of them have no label at all: No"
            " Finding has 62 positives in the file, 94 where such studies count as No Finding; the"
            " paper does not say which."
        ),
        (
            "NV-Reason's published training example contains the CheXpert test set, and its score"
            " is above the three radiologists' (macro-F1 0.58 to 0.62 on the same labels): possibly"
            " exposed. Its weights may not be used commercially."
        ),
        (
            "The paper gives neither intervals nor seeds. With 4 positives, one hit more in Pleural"
            " Other moves macro-F1 by 0.02 to 0.03."
        ),
    ),
    6: (
        (
            "Not comparable in principle: the paper's NIH subset and its size are not published."
            " Edema at 0.526 cannot come from the natural test set's 3.6 % prevalence without a far"
            " better model, so the subset was probably enriched."
        ),
        (
            "The paper's nine categories leave out Effusion, which NIH labels; the variant with ten"
            " puts it back."
        ),
    ),
}
