"""Measure how long a label file of CheXpert's or MIMIC's size takes to load, and the memory for it.

    python tests/benchmarks/label_files.py [--rows 224000]

Writes made-up label files into a temporary folder (no images) and loads each in a process of its
own. Prints seconds of `load_chexpert` and `load_mimic` with all frontal images kept, CPU seconds
beside them (on a busy machine the first are longer), and the peak resident memory of the process,
Python and its imports included. Each label of a study is drawn on its own, so there are more
different combinations than in real files, which costs time.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import checkout  # noqa: F401  this checkout before an installed one

from data.chexpert import load_chexpert
from data.labels import LABELS
from data.mimic import load_mimic
from data.sources import Report

# about as often as in CheXpert's train.csv
CELLS, WEIGHTS = ("", "1.0", "0.0", "-1.0"), (75, 14, 7, 4)


def write_chexpert(folder: Path, rows: int, seed: int = 0) -> None:
    """Write train.csv with `rows` images, every seventh lateral, some 3.5 images a patient."""
    rng = random.Random(seed)
    with open(folder / "train.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS])
        for number in range(rows):
            if number % 2 == 0:  # a study's labels are copied to each of its images
                labels = rng.choices(CELLS, WEIGHTS, k=14)
            patient, study, view = number * 2 // 7, number // 2, number % 2 + 1
            side, projection = (
                ("Lateral", "") if number % 7 == 6 else ("Frontal", rng.choice(("AP", "PA")))
            )
            folder = f"CheXpert-v1.0/train/patient{patient:05d}/study{study}"
            path = f"{folder}/view{view}_{side.lower()}.jpg"
            writer.writerow([path, "Female", rng.randrange(18, 91), side, projection, *labels])


def write_mimic(folder: Path, rows: int, seed: int = 0) -> None:
    """Write metadata, split and labels of `rows` images of the train part, two a study."""
    rng = random.Random(seed)
    header = (
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
        "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
    )
    name = str(folder / "mimic-cxr-2.0.0-{}.csv.gz")
    with (
        gzip.open(name.format("metadata"), "wt") as metadata,
        gzip.open(name.format("split"), "wt") as split,
        gzip.open(name.format("chexpert"), "wt") as labels,
    ):
        print(header, file=metadata)
        print("dicom_id,study_id,subject_id,split", file=split)
        print("subject_id,study_id," + ",".join(sorted(LABELS)), file=labels)
        for number in range(rows):
            dicom = "-".join(f"{rng.getrandbits(32):08x}" for _ in range(5))
            subject, study, view = (
                10_000_000 + number // 6,
                50_000_000 + number // 2,
                rng.choice(("AP", "PA", "LATERAL")),
            )
            print(
                f"{dicom},{subject},{study},CHEST,{view},3056,2544,21800506,213014.531,CHEST,antero-posterior,Erect",
                file=metadata,
            )
            print(f"{dicom},{study},{subject},train", file=split)
            if number % 2 == 0:
                print(
                    f"{subject},{study}," + ",".join(rng.choices(CELLS, WEIGHTS, k=14)), file=labels
                )


def measure(name: str, folder: Path) -> None:
    """Load in a fresh process, and print seconds, examples and peak memory."""
    load = {"chexpert": load_chexpert, "mimic": load_mimic}[name]
    start = time.perf_counter()
    examples = load(folder, frontals="all", report=Report())
    seconds, cpu = time.perf_counter() - start, time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    print(
        f"{name}: {seconds:.2f} s ({cpu:.2f} s of CPU with the imports), {len(examples):,}"
        f" examples, peak {peak:.0f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows",
        type=int,
        default=224_000,
        help="images in CheXpert's file; MIMIC's has 377,110 / 224,000 of that",
    )
    parser.add_argument(
        "--measure",
        nargs=2,
        metavar=("SOURCE", "FOLDER"),
        help="load one folder here; what the others start",
    )
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]))
        return
    mimic_rows = arguments.rows * 377_110 // 224_000
    for name, write, rows in (
        ("chexpert", write_chexpert, arguments.rows),
        ("mimic", write_mimic, mimic_rows),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), rows)
            print(f"{rows:,} rows in the format of", end=" ", flush=True)
            subprocess.run([sys.executable, __file__, "--measure", name, folder], check=True)


if __name__ == "__main__":
    main()
